"""Runs EleutherAI's lm-evaluation-harness against the rollout service and compares its numbers.

    python benchmarks/foreign/lm_eval_agreement.py --model DIR --data gsm8k_test.jsonl --python PY

PY is the interpreter of the harness's own environment (`make lm-eval` makes it). Two things must
hold, otherwise the exit status is 1: the harness's log-likelihoods are those of transformers, and
its avg@n equals ours on the same answers to the last digit.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_alp.data.labels import label_texts
from openrlhf_alp.evaluate.folder import Identity, RunFolder
from openrlhf_alp.evaluate.records import Answer, SaidTurn
from openrlhf_alp.evaluate.run import regrade
from openrlhf_alp.evaluate.suites import Suite, load_suite
from openrlhf_alp.launch.processes.servers import Services, fresh_keys, local_server
from openrlhf_alp.launch.processes.supervisor import Supervisor
from openrlhf_alp.launch.view import EvaluationView
from services.common.wire import API_KEY_VARIABLE

_TASKS = Path(__file__).with_name("lm_eval_tasks.py")
_REPOSITORY = Path(__file__).parents[2]
_TOLERANCE_NATS = 0.01
"""Of a choice of a few tokens, float32 on both sides."""

_NUM_SHOTS = 3
_CHOICES = [
    ("The capital of France is", [" Paris", " banana", " running"], 0),
    ("Two plus two equals", [" purple", " four", " yesterday"], 1),
    ("The opposite of hot is", [" seven", " table", " cold"], 2),
    ("She drank a cup of", [" tea", " gravel", " Tuesday"], 0),
]


def write_inputs(data: Path, limit: int, folder: Path) -> tuple[Path, Path]:
    """Problems of GSM8K as prompts, and the choices.

    The first ones whose answer has one digit, after three solved ones: a small model is right there
    now and then, and an average of 0 on both sides would say little.
    """
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if len(label_texts(row["answer"])[0]) == 1]
    shots, rows = "".join(map(_solved, rows[-_NUM_SHOTS:])), rows[:-_NUM_SHOTS][:limit]
    problems, choices = folder / "problems.jsonl", folder / "choices.jsonl"
    _write(
        problems,
        [
            {
                "prompt": f"{shots}Question: {row['question']}\nAnswer:",
                "label": label_texts(row["answer"])[0],
            }
            for row in rows
        ],
    )
    _write(choices, [{"text": t, "choices": c, "answer": a} for t, c, a in _CHOICES])
    return problems, choices


def _solved(row: dict[str, str]) -> str:
    """A problem with its solution, whose calculator annotations are left out."""
    steps = re.sub(r"<<.*?>>", "", row["answer"].partition("####")[0]).strip()
    label = label_texts(row["answer"])[0]
    return f"Question: {row['question']}\nAnswer: {steps} The answer is \\boxed{{{label}}}.\n\n"


def run_harness(python: str, job: dict[str, Any], folder: Path, key: str) -> dict[str, Any]:
    """Results and samples of the harness."""
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    environment = {
        **os.environ,
        # The harness's client of an OpenAI-compatible server takes its key from here.
        "OPENAI_API_KEY": key,
        "PYTHONPATH": str(_REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
    }
    subprocess.run([python, str(_TASKS), str(path)], check=True, env=environment, cwd=folder)
    found: dict[str, Any] = json.loads(Path(job["output"]).read_text())
    return found


def largest_difference(samples: list[dict[str, Any]], model: str) -> float:
    """Between the harness's log-likelihoods and those of transformers, in nats."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    worst = 0.0
    for sample in samples:
        doc = sample["doc"]
        pairs = zip(doc["choices"], sample["filtered_resps"], strict=True)
        for choice, response in pairs:
            expected = _log_likelihood(network, tokenizer, doc["text"], choice)
            worst = max(worst, abs(float(response[0]) - expected))
    return worst


def _log_likelihood(network: Any, tokenizer: Any, text: str, continuation: str) -> float:
    ids = tokenizer(text + continuation, return_tensors="pt", add_special_tokens=False)["input_ids"]
    start = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    with torch.inference_mode():
        logprobs = network(ids).logits[0].log_softmax(-1)
    return sum(float(logprobs[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))


def our_average(samples: list[dict[str, Any]], problems: Path, n: int, folder: Path) -> float:
    """avg@n of the harness's answers through our store, grader and numbers."""
    suite = Suite(
        name="own", title="GSM8K", source=str(problems), problem=("prompt",), label=("label",)
    )
    loaded = load_suite(suite, data_dir=None)
    run = RunFolder(folder / "run")
    identity = Identity(
        model="lm-eval",
        weights_digest="",
        weights_version=0,
        contract_hash="",
        tokenizer_hash="",
        plan={
            "temperature": 1.0,
            "top_p": 1.0,
            "max_new_tokens": 0,
            "template": "the harness's",
            "seed": 0,
        },
        suites={loaded.name: loaded.digest},
    )
    run.open()
    run.begin(identity, [loaded], n=n)
    store = run.store(loaded.name)
    for sample in samples:
        problem = loaded.problems[sample["doc_id"]]
        for index, text in enumerate(_flat(sample["resps"])):
            store.add(_answer(problem.id, index, text))
    run.release()
    view = EvaluationView(Console(stderr=True))
    results = regrade(run.path, num_workers=1, progress=view)
    return float(results["suites"][0]["avg"]["value"])


def _answer(problem_id: str, sample: int, text: str) -> Answer:
    return Answer(
        problem_id=problem_id,
        sample=sample,
        response=text,
        turns=(SaidTurn(kind="action", text=text),),
        stop_reason="eos",
        truncated=False,
        void=False,
        num_tokens=0,
        tool_calls=(),
        token_ids="",
        logprobs="",
        action_ranges=((0, 0),),
        versions=((0, ""),),
        generate_s=0.0,
        tool_s=0.0,
    )


def _flat(responses: list[Any]) -> list[str]:
    """The texts of one problem, however the harness nests its repeats."""
    return [text for one in responses for text in (_flat(one) if isinstance(one, list) else [one])]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> int:
    """Prints the comparison; returns 1 where the numbers differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="model folder")
    parser.add_argument("--data", type=Path, required=True, help="GSM8K as published")
    parser.add_argument("--python", required=True, help="interpreter of the harness's environment")
    parser.add_argument("--limit", type=int, default=16, help="problems (default: 16)")
    parser.add_argument("--n", type=int, default=4, help="answers per problem (default: 4)")
    parser.add_argument("--max_tokens", type=int, default=128, help="of an answer (default: 128)")
    options = parser.parse_args()
    # The harness runs in a folder of its own. Not resolved: the link is what makes an environment.
    options.python, options.model = map(os.path.abspath, (options.python, options.model))
    os.environ.update(fresh_keys())
    with tempfile.TemporaryDirectory() as made, Supervisor() as supervisor:
        folder = Path(made)
        services = Services(supervisor, EvaluationView(Console(stderr=True)))
        flags = {"model": options.model, "dtype": "float32", "max_model_len": 1024}
        server = local_server("rollout-0", "services.rollout", flags, folder / "services")
        (url,) = services.start("the rollout service", [server])
        problems, choices = write_inputs(options.data, options.limit, folder)
        job = {
            "model_args": {
                "base_url": f"{url}/v1/completions",
                "model": Path(options.model).name,
                "tokenizer": options.model,
                "tokenizer_backend": "huggingface",
                "num_concurrent": 8,
                "max_length": 1024,
            },
            "problems": str(problems),
            "choices": str(choices),
            "n": options.n,
            "max_tokens": options.max_tokens,
            "output": str(folder / "lm_eval.json"),
        }
        found = run_harness(options.python, job, folder, os.environ[API_KEY_VARIABLE])
        theirs = _only_number(found["results"]["generation"], "right")
        samples = found["samples"]["generation"]
        ours = our_average(samples, problems, options.n, folder)
        worst = largest_difference(found["samples"]["choice"], options.model)
    different = len({text for sample in samples for text in _flat(sample["resps"])})
    print(f"avg@{options.n} on {len(samples)} problems, {different} different answers")
    print(f"  lm-evaluation-harness {theirs!r}\n  ours                  {ours!r}")
    print(f"log-likelihood, largest difference from transformers: {worst:.2g} nats")
    return int(theirs != ours or worst > _TOLERANCE_NATS)


def _only_number(results: dict[str, Any], metric: str) -> float:
    (value,) = (v for name, v in results.items() if name.partition(",")[0] == metric)
    return float(value)


if __name__ == "__main__":
    sys.exit(main())
