"""`python -m openrlhf_alp.learner.flags.check`: would the trainer take these flags?

Takes a JSON object with `argv`, `model` (a folder to look into, or null) and `check_data` (whether
the prompts should exist already); its last line is one
with `names` (every flag of the parser), `error` (None when all is right) and what the run would do:
`batch_size`, `num_episodes`, `max_samples`, `num_ranks`, `micro_batch_tokens`, `zero_stage`,
`adam_offload`, `num_checkpoints`. It is a process of its own, because torch and OpenRLHF would stay
in memory.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from types import SimpleNamespace
from typing import Any, NoReturn
from unittest import mock

from openrlhf_alp.learner import seams
from openrlhf_alp.learner.flags.settle import add_arguments, settle
from openrlhf_alp.learner.launch import check_data, check_model
from services.common.wire import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE, TOOL_KEY_VARIABLE


class _WrongFlag(Exception):
    """What argparse would print before it ends the process."""


def check(argv: list[str], *, model: str | None, with_data: bool) -> dict[str, Any]:
    """What OpenRLHF's parser, its validation and ours say of `argv`."""
    names: list[str] = []

    def add(parser: argparse.ArgumentParser) -> None:
        add_arguments(parser)
        # A shortened flag would be taken today and be ambiguous after the next upstream flag.
        parser.allow_abbrev = False
        names.extend(name for name in parser._option_string_actions if name.startswith("--"))

    def wrong(parser: argparse.ArgumentParser, message: str) -> NoReturn:
        raise _WrongFlag(message)

    try:
        with mock.patch.object(argparse.ArgumentParser, "error", wrong):
            args = seams.parsed_args(argv, add, settle)
        if model:
            check_model(model)
        if with_data:
            check_data(args)
    except (_WrongFlag, ValueError, AssertionError, OSError) as error:
        return {"names": names, "error": str(error) or type(error).__name__}
    return {"names": names, "error": None, **_shape(args)}


def _shape(args: SimpleNamespace) -> dict[str, Any]:
    tokens = args.train.max_tokens_per_gpu or 0
    fixed = args.train.micro_batch_size * args.data.max_len
    return {
        "batch_size": args.rollout.batch_size,
        "num_episodes": args.train.num_episodes,
        "max_samples": int(args.data.max_samples),
        "num_ranks": args.actor.num_nodes * args.actor.num_gpus_per_node,
        "micro_batch_tokens": tokens if args.train.dynamic_batch_enable else fixed,
        "weight_bytes": 4 if args.ds.param_dtype == "fp32" else 2,
        "zero_stage": args.ds.zero_stage,
        "adam_offload": bool(args.ds.adam_offload),
        "num_checkpoints": args.ckpt.max_num if args.ckpt.save_steps > 0 else 0,
    }


def main() -> int:
    """Print the answer as the last line."""
    asked = json.loads(sys.argv[1])
    # The services' keys are not flags, and whether they are right is seen when they are used.
    for name in (API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, TOOL_KEY_VARIABLE):
        os.environ.setdefault(name, "not-used")
    # Upstream prints while it validates; the last line of stdout holds the answer only.
    with contextlib.redirect_stdout(sys.stderr):
        answer = check(asked["argv"], model=asked["model"], with_data=asked["check_data"])
    sys.stderr.flush()
    print(f"\n{json.dumps(answer)}", flush=True)
    # Ray and DeepSpeed leave threads that take seconds to end, and nothing was started.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
