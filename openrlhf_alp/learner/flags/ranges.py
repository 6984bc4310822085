"""Ranges of numeric flags that no parser checks: a wrong value would surface late, or never."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

_ADAM = ("actor.adam", "critic.adam")
RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "1 or more",
        lambda value: 1 <= value < math.inf,
        (
            *("actor.num_nodes", "actor.num_gpus_per_node", "data.max_len", "data.max_samples"),
            *("rollout.batch_size", "rollout.micro_batch_size", "rollout.n_samples_per_prompt"),
            *("rollout.max_new_tokens", "rollout.max_tokens_per_gpu", "train.max_tokens_per_gpu"),
            *("train.batch_size", "train.micro_batch_size", "train.num_episodes"),
            *("train.max_epochs", "train.async_queue_size", "vllm.tensor_parallel_size"),
            *("ds.tensor_parallel_size", "ds.ring_attn_size", "ds.zpg", "ds.lora.alpha"),
            *("logger.logging_steps", "algo.kl.horizon", "eval.n_samples_per_prompt"),
        ),
    ),
    (
        "1 or more, or -1 for never",
        lambda value: value == -1 or 1 <= value < math.inf,
        ("ckpt.save_steps", "eval.steps"),
    ),
    (
        "0 or more",
        lambda value: 0 <= value < math.inf,
        (
            *(f"{adam}.{name}" for adam in _ADAM for name in ("lr", "weight_decay")),
            *("actor.muon.lr", "critic.muon.lr", "algo.kl.init_coef", "algo.kl.target"),
            *("actor.aux_loss_coef", "actor.eps_clip", "actor.eps_clip_low_high"),
            *("critic.value_clip", "ds.lora.rank", "data.dataloader_num_workers"),
            *("rollout.vllm_generate_batch_size", "eval.temperature"),
        ),
    ),
    ("0 or more, 0 to cut none", lambda value: value >= 0, ("actor.max_norm", "critic.max_norm")),
    (
        "above 0",
        lambda value: 0 < value < math.inf,
        (
            *("rollout.temperature", "rollout.ready_timeout_s", "reward.overlong_buffer_len"),
            # A weight without a gradient, such as that of a token that is not there, would be 0/0.
            *(f"{adam}.eps" for adam in _ADAM),
        ),
    ),
    ("above 1", lambda value: 1 < value < math.inf, ("actor.dual_clip",)),
    (
        "above 0 and at most 1",
        lambda value: 0 < value <= 1,
        ("rollout.top_p", "vllm.gpu_memory_utilization"),
    ),
    (
        "0 or more and below 1",
        lambda value: 0 <= value < 1,
        (*(f"{adam}.betas" for adam in _ADAM), "ds.lora.dropout"),
    ),
    (
        "from 0 to 1",
        lambda value: 0 <= value <= 1,
        (
            *("actor.lr_warmup_ratio", "actor.min_lr_ratio", "critic.lr_warmup_ratio"),
            *("critic.min_lr_ratio", "algo.advantage.gamma", "algo.advantage.lambd"),
            *("train.ema_beta", "reward.stop_properly_penalty_coef"),
        ),
    ),
    ("0, 1, 2 or 3", lambda value: value in (0, 1, 2, 3), ("ds.zero_stage",)),
    ("from 0 to 4294967295", lambda value: 0 <= value < 2**32, ("train.seed",)),
)
"""What a flag's numbers have to be, in words and as a test, and which flags."""

WINDOWS = (
    *("reward.clip_range", "algo.dynamic_filtering_range"),
    "algo.advantage.is_correction_threshold",
)
"""Flags of two numbers, the lower one first."""


def require_ranges(args: SimpleNamespace) -> None:
    """Refuses numbers that no run can have.

    Raises:
        ValueError: a number is nan or out of its flag's range; the message names flag and range.
    """
    given = dict(numbers(args))
    for name, values in given.items():
        if any(math.isnan(value) for value in values):
            raise ValueError(f"--{name} is nan. Give it a number.")
    for words, holds, names in RANGES:
        for name in names:
            for value in given.get(name, ()):
                if not holds(value):
                    raise ValueError(f"--{name} is {value}. Set it to {words}.")
    for name in WINDOWS:
        if len(window := given.get(name, [])) == 2 and not window[0] < window[1]:
            raise ValueError(f"--{name} is {window[0]} {window[1]}. Give the lower number first.")


def numbers(args: SimpleNamespace, prefix: str = "") -> Iterator[tuple[str, list[float]]]:
    """Dotted names of the flags that have numbers, with them."""
    for name, value in vars(args).items():
        if isinstance(value, SimpleNamespace):
            yield from numbers(value, f"{prefix}{name}.")
            continue
        values: list[Any] = list(value) if isinstance(value, list | tuple) else [value]
        yield f"{prefix}{name}", [v for v in values if isinstance(v, int | float)]
