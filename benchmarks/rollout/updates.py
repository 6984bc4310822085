"""Weight updates of real vLLM against a plain copy of the same bytes and vLLM's own reload."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from rollout.common import KEY, report
from rollout.servers import our_service


def bench_weights(model: Path) -> None:
    """A full push, every tensor changed, against a plain copy and vLLM's reload."""
    from safetensors.torch import load_file

    from openrlhf_alp.clients.weights.carry import in_buckets
    from openrlhf_alp.clients.weights.push import WeightPusher

    tensors: dict[str, Any] = {}
    for file in sorted(model.glob("*.safetensors")):
        tensors |= load_file(file)
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    copies = []
    for _ in range(3):
        started_s = time.perf_counter()
        for file in model.glob("*.safetensors"):
            shutil.copyfile(file, folder / file.name)
        copies.append(time.perf_counter() - started_s)
    try:
        with our_service(model, "--weights-dir", str(folder)) as url:
            pusher = WeightPusher([url], api_key=KEY, admin_key=KEY)
            pushes = []
            for step in range(3):
                factor = 1.0 + 0.01 * (step + 1)
                changed = {name: tensor * factor for name, tensor in tensors.items()}
                started_s = time.perf_counter()
                result = pusher.push(in_buckets(changed.items()))
                pushes.append((time.perf_counter() - started_s, result))
                print(result)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    push_s, best = min(pushes, key=lambda push: push[0])
    base_s = min(copies) + best.load_s
    print(f"{best.num_bytes / 1e6:.0f} MB: copy {min(copies):.3f} s, reload {best.load_s:.3f} s")
    report("push / (copy + reload)", push_s / base_s, 3.0, at_least=False)
    report("stall / (copy + reload)", (best.pause_s + best.load_s) / base_s, 3.0, at_least=False)
