"""What is added to vLLM's worker: a weight reload that reads safetensors files in the worker, and
the receiving end of transfers from the learner's GPU.

Named by `worker_extension_cls`, so vLLM mixes the class into its own Worker; `model_runner` is the
worker's. The bytes go from the page cache (or /dev/shm) into the model without crossing a socket.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from services.rollout.gpu_transfer.receiver import TransferReceiver
from services.rollout.weights.checkpoint import read_tensors


class WeightReloader:
    """Worker methods that the engine calls through `collective_rpc`."""

    model_runner: Any

    def alp_reload_weights(self, plan: dict[str, list[str]]) -> int:
        """Reload the whole model: safetensors path -> names of the tensors to take from it.

        vLLM's own `reload_weights` does the work: on CPU the linear weights are repacked after
        start-up, so the plain `load_weights` would find empty parameters.

        Returns:
            Number of tensors read.
        """
        num_read = 0

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            nonlocal num_read
            for path, names in plan.items():
                for name, tensor in read_tensors(Path(path), names):
                    num_read += 1
                    yield name, tensor

        self.model_runner.reload_weights(weights_iterator=tensors())
        return num_read


class WorkerExtension(WeightReloader, TransferReceiver):
    """Everything of ours in one class, as vLLM takes one."""
