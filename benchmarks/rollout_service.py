"""What the rollout service costs. Prints ratios and says whether they reach the target.

    python benchmarks/rollout_service.py            the first three parts, without a model
    python benchmarks/rollout_service.py wire
        bytes of a reply in msgpack over JSON, and CPU by stage of one request
    python benchmarks/rollout_service.py ceiling
        requests per second of one core with an engine that answers at once; cost of the ledger
    python benchmarks/rollout_service.py overload
        ten times more requests at once than are admitted: replies and memory
    python benchmarks/rollout_service.py engine --model DIR
        tokens per second over HTTP against vLLM's in-process async engine and its own server
    python benchmarks/rollout_service.py weights --model DIR
        a weight push against a plain copy of the same bytes plus vLLM's reload

`engine` and `weights` start real services and want a quiet machine.
"""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from rollout import ceiling, throughput, updates

NEED_NO_MODEL = ("wire", "ceiling", "overload")
NEED_A_MODEL = ("engine", "weights", "in-process")
CHILDREN = ("serve-paced", "serve-bare")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=[*NEED_NO_MODEL, *NEED_A_MODEL, *CHILDREN])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--url-file", type=Path)
    parser.add_argument("--pace-s", type=float, default=0.0)
    parser.add_argument("--max-pending", type=int, default=1 << 20)
    args = parser.parse_args()
    if args.part in NEED_A_MODEL and args.model is None:
        parser.error("--model DIR is needed")
    parts: dict[str, Callable[[], object]] = {
        "wire": ceiling.bench_wire,
        "ceiling": ceiling.bench_ceiling,
        "overload": ceiling.bench_overload,
        "engine": lambda: throughput.bench_engine(args.model, args.requests),
        "weights": lambda: updates.bench_weights(args.model),
        "serve-paced": lambda: ceiling.serve_paced(args.url_file, args.pace_s, args.max_pending),
        "serve-bare": lambda: ceiling.serve_bare(args.url_file),
        "in-process": lambda: asyncio.run(throughput.serve_in_process(args.model, args.requests)),
    }
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    for part in [args.part] if args.part else NEED_NO_MODEL:
        parts[part]()


if __name__ == "__main__":
    main()
