"""A tiny Llama that reproduces a few dialogues from memory: a real model with known answers.

Benchmarks and tests of multi-turn episodes need a policy that writes code and that a CPU can sample
hundreds of episodes from. A few seconds of training on the dialogues make one.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = "<eos>"
PHRASES = ("```python\n", "```output\n", "\n```\n", "```\n", "print(", ")\n", "\\boxed{", "}")
"""Tokens of several characters: a program is a handful of tokens, not thirty."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
_MAX_STEPS = 1000


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Printable ASCII characters and `PHRASES`; `<eos>` and `<pad>` are special."""
    characters = ["<pad>", EOS, "\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {character: index for index, character in enumerate(characters)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_tokens([AddedToken(phrase, normalized=False) for phrase in PHRASES])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token=EOS, chat_template=CHAT_TEMPLATE
    )


def tiny_config(tokenizer: PreTrainedTokenizerFast, *, max_positions: int) -> LlamaConfig:
    """Two layers of width 64, the least that vLLM on a CPU serves."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,  # vLLM on CPU needs heads of 32 or more
        num_key_value_heads=1,
        max_position_embeddings=max_positions,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )


def save_tiny_policy(
    folder: Path,
    dialogues: Sequence[tuple[str, str]],
    *,
    dtype: torch.dtype = torch.float32,
    good_loss: float = 1e-3,
    seed: int = 0,
) -> Path:
    """Trains on `dialogues` and writes a model folder.

    Args:
        dialogues: prompt, and what follows it up to `<eos>`, observations included.
        dtype: of the weights on disk.
        good_loss: training ends below it, in nats per token.

    Raises:
        RuntimeError: the dialogues were not learnt; they may contradict each other.
    """
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(tokenizer, max_positions=512))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices this small only wait for each other
    try:
        _learn_by_heart(model, *_batch(tokenizer, dialogues), good_loss=good_loss)
    finally:
        torch.set_num_threads(num_threads)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _batch(
    tokenizer: PreTrainedTokenizerFast, dialogues: Sequence[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Padded ids and labels, (B, T); the prompt is given, so it is no label."""
    texts = [prompt + rest for prompt, rest in dialogues]
    ids = tokenizer(texts, padding=True, return_tensors="pt", add_special_tokens=False)["input_ids"]
    labels = ids.masked_fill(ids == tokenizer.pad_token_id, -100)
    for row, (prompt, _) in zip(labels, dialogues, strict=True):
        row[: len(tokenizer.encode(prompt))] = -100
    return ids, labels


def _learn_by_heart(
    model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor, *, good_loss: float
) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(_MAX_STEPS):
        # Padding stands on the right, where a causal model does not look.
        loss = model(input_ids=ids, labels=labels).loss
        if loss.item() < good_loss:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise RuntimeError(f"the dialogues were not learnt: loss {loss.item():.4f} after {_MAX_STEPS}")
