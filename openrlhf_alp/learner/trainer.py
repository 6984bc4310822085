"""The controller, synchronous or asynchronous: first push, staleness, one JSON line per step.

AlpPPOTrainer       rollout -> train_step -> push
AlpPPOTrainerAsync  GenerateSamplesActor -- queue --> AlpTrainingActor: train_step -> push
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import ray
from openrlhf.trainer import ppo_trainer, ppo_trainer_async

from openrlhf_alp.data.output import replace_file
from openrlhf_alp.learner.batches import BatchShape, fitting_part
from openrlhf_alp.learner.compat import undecorated
from openrlhf_alp.learner.evaluation import counting_every_prompt
from openrlhf_alp.learner.experience import (
    DROPPED_GROUPS,
    AlpExperienceMaker,
    AlpSamplesGenerator,
    StalenessGate,
)
from openrlhf_alp.learner.telemetry.recording import StepRecorder
from openrlhf_alp.rollouts.response import with_ratios

logger = logging.getLogger(__name__)

_HOLD_POLL_S = 0.2
_LOST_EVERY_S = 5.0
"""How often the servers are asked whether they still have the weights."""

_UpstreamTraining = undecorated(ppo_trainer_async.TrainingActor)
_UpstreamGenerate = undecorated(ppo_trainer_async.GenerateSamplesActor)


class _ServiceTraining:
    """What both trainers add to `BasePPOTrainer`: equal ranks, and rollouts from the service."""

    args: Any
    vllm_engines: Any
    experience_maker: AlpExperienceMaker

    def _start_counting(self) -> None:
        """Set the step counter and the gate, once upstream's constructor has set `args`."""
        self.num_steps = 0
        self.num_left_out = 0
        # Weights are pushed by one thread at a time, and not while a step changes them.
        self._pushing = threading.RLock()
        rollout = self.args.rollout
        self.gate = StalenessGate(
            samples_per_prompt=rollout.n_samples_per_prompt,
            samples_per_step=rollout.n_samples_per_prompt * rollout.batch_size,
            max_staleness=self.args.rollout_service.max_staleness,
        )
        self.recorder = StepRecorder(self.args) if self.args.alp.record else None
        if self.recorder is not None:
            self.experience_maker.on_batch = self.recorder.record

    @property
    def uses_service(self) -> bool:
        return bool(self.args.rollout_service.urls)

    def train_step(self, rollout_samples: list[Any], global_step: int) -> tuple[dict, int]:
        """One update, or none (no status, the same step) while there are too few samples."""
        if not self.uses_service:
            return self._train_equally(rollout_samples, global_step)
        # What is updated is the version of the last push; samples from a queue may be older.
        version = ray.get(self.vllm_engines[0].get_version.remote())
        admitted = self.gate.admit(rollout_samples, version)
        status, global_step = self._train_equally(admitted, global_step)
        if status:
            status = {**with_ratios(status), **self.gate.take_metrics()}
        return status, global_step

    def _train_equally(self, samples: list[Any], global_step: int) -> tuple[dict, int]:
        """One update with the part of `samples` that gives each rank the same micro-batches."""
        shape = BatchShape.of(self.args)
        fit = shape.fit(len(samples))
        kept = fitting_part(samples, fit, group_size=shape.group_size, seed=global_step)
        if left_out := len(samples) - len(kept):
            self.num_left_out += left_out
            logger.warning(
                "left out %d of %d samples: they do not give %d rank(s) equal micro-batches",
                *(left_out, len(samples), shape.num_ranks),
            )
        if not kept:
            return {}, global_step
        if self.recorder is not None:
            contract = ray.get(self.vllm_engines[0].get_contract.remote())
            self.recorder.begin(kept, step=global_step + 1, contract=contract)
        size = fit.rollout_micro_batch_size
        with self._pushing, mock.patch.object(self.args.rollout, "micro_batch_size", size):
            status, global_step = super().train_step(kept, global_step)  # type: ignore[misc]
        return {**status, "rollout/left_out_samples": float(left_out)}, global_step

    def save_logs_and_checkpoints(
        self, global_step: int, logs_dict: dict | None = None, client_states: dict | None = None
    ) -> None:
        logs_dict = logs_dict if logs_dict is not None else {}
        if "rollout/num_samples" not in logs_dict:
            return  # no update was made, so there is nothing to log: the samples wait for others
        self.num_steps += 1
        if self.uses_service:
            dropped = sum(self._take_dropped_groups().values())
            logs_dict[DROPPED_GROUPS] = float(dropped)
        if self.args.rollout_service.metrics_jsonl:
            _append_json_line(self.args.rollout_service.metrics_jsonl, global_step, logs_dict)
        super().save_logs_and_checkpoints(  # type: ignore[misc]
            global_step, logs_dict, client_states
        )
        self._hold(global_step)

    def _hold(self, global_step: int) -> None:
        """Wait where somebody evaluates the weights that the services now serve."""
        service = self.args.rollout_service
        if not service.hold_steps or not global_step or global_step % service.hold_steps:
            return
        file = Path(service.hold_file)
        logger.info("step %d: waiting until %s is removed", global_step, file)
        replace_file(file, [str(global_step)])
        while file.exists():
            time.sleep(_HOLD_POLL_S)

    @contextlib.contextmanager
    def _pushing_again(self) -> Iterator[None]:
        """Within the block, push once more whenever every server has lost the weights."""
        ended = threading.Event()

        def watch() -> None:
            while not ended.wait(_LOST_EVERY_S):
                with self._pushing:
                    engines = [e.all_lost_the_weights.remote() for e in self.vllm_engines]
                    if not any(ray.get(engines)):
                        continue
                    logger.warning("every rollout server was started again: pushing the weights")
                    try:
                        self.broadcast_to_vllm()  # type: ignore[attr-defined]
                    except Exception:
                        logger.exception("the push failed and will be tried again")

        thread = threading.Thread(target=watch, name="push-again", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()

    def _finish(self) -> None:
        """Write what is still to be recorded, and fail a run that lost every group: it has trained
        nothing and must not look successful."""
        if self.recorder is not None:
            self.recorder.close()
        if self.gate.waiting:
            logger.warning(
                "%d samples were not trained on: too few were fresh for another step",
                len(self.gate.waiting),
            )
        dropped = self._take_dropped_groups() if self.uses_service else None
        if self.num_steps == 0 and self.num_left_out:
            raise RuntimeError(
                f"no step was made: all {self.num_left_out} samples were left out, as no batch "
                "gave every rank a micro-batch. Give more prompts, fewer ranks "
                "(--actor.num_gpus_per_node) or a smaller --train.micro_batch_size."
            )
        if self.num_steps == 0 and dropped:
            reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.items())
            raise RuntimeError(
                f"no step was made: every group was dropped ({reasons}). Look at the labels and "
                "prompts of --data.prompt_dataset, and at --reward.remote_url."
            )

    def _take_dropped_groups(self) -> Counter[str]:
        """Groups dropped since the last call, by reason; each reason is also logged."""
        counts: Counter[str] = Counter()
        for drops in ray.get([e.take_dropped_groups.remote() for e in self.vllm_engines]):
            counts.update(drops)
        if stale := self.gate.take_dropped_groups():
            counts[f"older than --rollout.max_staleness {self.gate.max_staleness}"] = stale
        for reason, count in counts.items():
            logger.warning("dropped %d group(s): %s", count, reason)
        return counts


class AlpPPOTrainer(_ServiceTraining, undecorated(ppo_trainer.PPOTrainer)):  # type: ignore[misc]
    """Upstream: `openrlhf.trainer.ppo_trainer.PPOTrainer`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # OpenRLHF's constructors look up in their module the classes that they build.
        with mock.patch.multiple(
            ppo_trainer,
            RemoteExperienceMaker=AlpExperienceMaker,
            SamplesGenerator=AlpSamplesGenerator,
        ):
            super().__init__(*args, **kwargs)
        self._start_counting()

    def fit(self, global_step: int = 0) -> None:
        # A long-lived service may still hold the weights of another run.
        if self.uses_service:
            self.broadcast_to_vllm()
        with self._pushing_again() if self.uses_service else contextlib.nullcontext():
            if self.args.rollout_service.hold_steps:
                # The run may have ended while the step of its checkpoint was evaluated.
                self._hold(self.init_checkpoint_states()["global_step"])
            super().fit(global_step)
        self._finish()

    def evaluate(self, global_step: int, **generate_kwargs: Any) -> dict[str, float]:
        with counting_every_prompt(ppo_trainer):
            logs = super().evaluate(global_step, **generate_kwargs)
        if self.uses_service:
            self._take_dropped_groups()  # logged here; they are none of the next step's
        return logs


class AlpTrainingActor(_ServiceTraining, _UpstreamTraining):  # type: ignore[misc,valid-type]
    """Upstream: `openrlhf.trainer.ppo_trainer_async.TrainingActor`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with mock.patch.multiple(ppo_trainer, RemoteExperienceMaker=AlpExperienceMaker):
            super().__init__(*args, **kwargs)
        self._start_counting()

    def broadcast_to_vllm(self) -> None:
        # Needed although it only calls upstream: Ray pickles an inherited method by value, with a
        # copy of its class, and `super()` in it then refuses our instance. Our own is pickled by
        # reference.
        super().broadcast_to_vllm()

    def fit(self, global_step: int = 0) -> None:
        self._hold(global_step)  # as in `AlpPPOTrainer.fit`
        super().fit(global_step)
        self._finish()


class AlpGenerateSamplesActor(_UpstreamGenerate):  # type: ignore[misc,valid-type]
    """Upstream: `openrlhf.trainer.ppo_trainer_async.GenerateSamplesActor`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with mock.patch.multiple(ppo_trainer_async, SamplesGenerator=AlpSamplesGenerator):
            super().__init__(*args, **kwargs)

    def _run_eval(self) -> dict[str, float]:
        with counting_every_prompt(ppo_trainer_async):
            return super()._run_eval()


class AlpPPOTrainerAsync(undecorated(ppo_trainer_async.PPOTrainerAsync)):  # type: ignore[misc]
    """Upstream: `openrlhf.trainer.ppo_trainer_async.PPOTrainerAsync`."""

    def __init__(self, pretrain: str, strategy: Any, *args: Any, **kwargs: Any) -> None:
        self.uses_service = bool(strategy.args.rollout_service.urls)
        with mock.patch.multiple(
            ppo_trainer_async,
            GenerateSamplesActor=RemoteAlpGenerateSamplesActor,
            TrainingActor=RemoteAlpTrainingActor,
        ):
            super().__init__(pretrain, strategy, *args, **kwargs)

    def fit(self) -> None:
        # Before a single token is sampled, as in `AlpPPOTrainer.fit`.
        if self.uses_service:
            ray.get(self.trainer_actor.broadcast_to_vllm.remote())
        super().fit()


def _append_json_line(path: str, global_step: int, logs: dict[str, Any]) -> None:
    numbers = {k: float(v) for k, v in logs.items() if isinstance(v, int | float)}
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"global_step": global_step, **numbers}) + "\n")


# Names that differ from the classes', because Ray then pickles a class by reference and workers
# import it from here.
RemoteAlpPPOTrainer = ray.remote(AlpPPOTrainer)
RemoteAlpTrainingActor = ray.remote(AlpTrainingActor)
RemoteAlpGenerateSamplesActor = ray.remote(AlpGenerateSamplesActor)
RemoteAlpPPOTrainerAsync = ray.remote(AlpPPOTrainerAsync)
