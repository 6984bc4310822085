"""The single controller: first push of weights, one JSON line per step."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from openrlhf.trainer import ppo_trainer

from openrlhf_alp.learner.experience import AlpExperienceMaker, AlpSamplesGenerator
from openrlhf_alp.learner.remote import undecorated

logger = logging.getLogger(__name__)


@contextmanager
def _our_parts() -> Iterator[None]:
    """Let OpenRLHF's constructors build our experience maker and samples generator."""
    with ExitStack() as stack:
        for name, ours in (
            ("RemoteExperienceMaker", AlpExperienceMaker),
            ("SamplesGenerator", AlpSamplesGenerator),
        ):
            stack.enter_context(mock.patch.object(ppo_trainer, name, ours))
        yield


class AlpPPOTrainer(undecorated(ppo_trainer.PPOTrainer)):  # type: ignore[misc]
    """Upstream: `openrlhf.trainer.ppo_trainer.PPOTrainer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.num_steps = 0
        with _our_parts():
            super().__init__(*args, **kwargs)

    def fit(self, global_step: int = 0) -> None:
        # A long-lived service may hold the weights of another run: make it ours before step 1.
        if self.args.rollout_service.urls:
            self.broadcast_to_vllm()
        super().fit(global_step)
        if self.num_steps == 0 and self.args.rollout_service.urls:
            self._require_some_groups()

    def _require_some_groups(self) -> None:
        """A run that lost every group has trained nothing and must not look like a success."""
        dropped = self._take_dropped_groups()
        if dropped:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.items())
            raise RuntimeError(
                f"no step was made: every group was dropped ({reasons}). Look at the labels and "
                "prompts of --data.prompt_dataset, and at --reward.remote_url."
            )

    def save_logs_and_checkpoints(
        self, global_step: int, logs_dict: dict | None = None, client_states: dict | None = None
    ) -> None:
        self.num_steps += 1
        logs_dict = logs_dict if logs_dict is not None else {}
        if self.args.rollout_service.urls:
            dropped = sum(self._take_dropped_groups().values())
            logs_dict["rollout/dropped_groups"] = float(dropped)
        if self.args.rollout_service.metrics_jsonl:
            _append_json_line(self.args.rollout_service.metrics_jsonl, global_step, logs_dict)
        super().save_logs_and_checkpoints(global_step, logs_dict, client_states)

    def _take_dropped_groups(self) -> Counter[str]:
        """Groups dropped since the last call, by reason; each reason is also logged."""
        counts: Counter[str] = Counter()
        for drops in ray.get([e.take_dropped_groups.remote() for e in self.vllm_engines]):
            counts.update(drops)
        for reason, count in counts.items():
            logger.warning("dropped %d group(s): %s", count, reason)
        return counts


def _append_json_line(path: str, global_step: int, logs: dict[str, Any]) -> None:
    numbers = {k: float(v) for k, v in logs.items() if isinstance(v, int | float)}
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"global_step": global_step, **numbers}) + "\n")


# Another name than the class: Ray then ships the class by reference and workers import it from
# here.
RemoteAlpPPOTrainer = ray.remote(AlpPPOTrainer)
