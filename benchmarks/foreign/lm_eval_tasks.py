"""What the tasks of lm-evaluation-harness call; runs in the harness's own environment.

    python lm_eval_tasks.py JOB.json

JOB.json says what to run; the harness's results and samples are written to the path that it names.
"""

import json
import sys
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from openrlhf_alp.rewards.verify import judge


def process_results(doc: dict[str, Any], results: list[Any]) -> dict[str, float]:
    """avg@n of one problem, graded by our reward."""
    answers = results[0] if isinstance(results[0], list) else results
    right = [judge(answer, doc["label"]).correct for answer in answers]
    return {"right": sum(right) / len(right)}


def main() -> None:
    """Runs the job."""
    job = json.loads(Path(sys.argv[1]).read_text())
    found = simple_evaluate(
        model="local-completions",
        model_args=job["model_args"],
        tasks=[_generation(job), _choice(job)],
        task_manager=TaskManager(),
        log_samples=True,
        bootstrap_iters=0,
    )
    Path(job["output"]).write_text(
        json.dumps({"results": found["results"], "samples": found["samples"]}, default=str)
    )


def _generation(job: dict[str, Any]) -> dict[str, Any]:
    """`n` sampled answers to each row of a file with the fields prompt and label."""
    return {
        "task": "generation",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": job["problems"]}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "{{label}}",
        "generation_kwargs": {
            "until": ["\n\nQuestion:"],
            "do_sample": True,
            "temperature": 1.0,
            "max_gen_toks": job["max_tokens"],
            # The harness would send one seed with every repeat, and get one answer n times.
            "seed": None,
        },
        "repeats": job["n"],
        "filter_list": [
            {"name": "all", "filter": [{"function": "take_first_k", "k": job["n"]}]},
        ],
        "process_results": process_results,
        "metric_list": [{"metric": "right", "aggregation": "mean", "higher_is_better": True}],
    }


def _choice(job: dict[str, Any]) -> dict[str, Any]:
    """Log-likelihood of each choice of a file with the fields text, choices and answer."""
    return {
        "task": "choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": job["choices"]}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        # The choices begin with their own space; the harness would add another.
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


if __name__ == "__main__":
    main()
