"""Every substitution into OpenRLHF 0.11.2, each with the upstream symbol and what it relies on.

OpenRLHF has no plug-in points, but it looks its classes up as module globals by name, so that a
substitution is an assignment. Its command line builds the parser under `if __name__ == "__main__"`.
So we set the globals below, hook the parser, and run that module as the main program; no line of it
is copied.

    openrlhf.cli.train_ppo_ray (run as __main__)
      ArgumentParser.parse_args   + our flags                      one shot
      hierarchize(args)           + settle(args), contract check   before upstream's own validation
      get_strategy                -> AlpStrategy
      ray.init                    + our shims in every worker
      create_vllm_engines         -> one RolloutEngine per service URL
      PolicyModelActor            -> AlpPolicyModelActor -> AlpActorPPOTrainer -> AlpPolicyLoss
      log_probs_from_logits,         + of the logits of actions    within a forward of the policy
        compute_entropy
      PPOTrainer                  -> AlpPPOTrainer -> AlpExperienceMaker, AlpSamplesGenerator
      PPOTrainerAsync             -> AlpPPOTrainerAsync -> AlpTrainingActor -> AlpExperienceMaker
                                                        -> AlpGenerateSamplesActor
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import inspect
import runpy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

AddArguments = Callable[[argparse.ArgumentParser], None]
Settle = Callable[[SimpleNamespace], SimpleNamespace]
RayOptions = Callable[[SimpleNamespace, dict[str, str]], dict[str, Any]]

OPENRLHF_VERSION = "0.11.2"
UPSTREAM_MAIN = "openrlhf.cli.train_ppo_ray"
USAGE = "python -m openrlhf_alp.cli.train_ppo_ray --actor.model_name_or_path MODEL [flags]"


class UpstreamDriftError(RuntimeError):
    """OpenRLHF is not the version, or not the shape, that the seams were written for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seam:
    """One upstream symbol and the parameters of it that we rely on."""

    symbol: str
    """`module:qualified.name` upstream."""
    parameters: tuple[str, ...]
    """Parameters, in order, that our override or call passes on."""
    replaced_by: str
    """`module:name` of ours that takes its place, or that calls or wraps it."""


def _methods(of: str, replaced_by: str, **parameters: str) -> tuple[Seam, ...]:
    """Seams of one upstream class or module: `name="its parameters"`."""
    return tuple(
        Seam(
            symbol=f"{of}{name}",
            parameters=tuple(names.split()),
            replaced_by=f"openrlhf_alp.learner.{replaced_by}",
        )
        for name, names in parameters.items()
    )


_RAY = "openrlhf.trainer.ray"
_PPO_UTILS = "openrlhf.trainer.ppo_utils"
_ASYNC = "openrlhf.trainer.ppo_trainer_async"

SEAMS = (
    *_methods(
        "openrlhf.utils.deepspeed:DeepspeedStrategy.",
        "strategy:AlpStrategy",
        prepare="self args",
        _get_model_parameters="self model optim weight_decay",
        moving_average="self model model_ema beta device",
        save_model="self model tokenizer output_dir kwargs",
    ),
    *_methods(
        f"{_RAY}.ppo_actor:ActorPPOTrainer.",
        "actor:AlpActorPPOTrainer",
        training_step="self experience kl_ctl step loss_batch_info",
        _init_vllm_sync_group="self backend",
    ),
    *_methods(
        f"{_RAY}.ppo_actor:PolicyModelActor.",
        "actor:RemoteAlpPolicyModelActor",
        init_model_from_pretrained="self strategy pretrain max_steps vllm_engines",
        save_checkpoint="self tag client_states metric_value metric_key",
    ),
    *_methods(
        "openrlhf.models:PolicyLoss.",
        "actor:AlpPolicyLoss",
        forward="self log_probs old_log_probs advantages action_mask rollout_log_probs dp_size "
        "batch_num_tokens global_batch_size",
    ),
    *_methods(
        "openrlhf.models:",  # called, not replaced
        "actor:AlpPolicyLoss",
        aggregate_loss="loss loss_mask token_level_loss dp_size batch_num_tokens global_batch_size",
    ),
    *_methods(
        "openrlhf.models.actor:",
        "policy_forward:logits_of_actions",
        log_probs_from_logits="logits labels temperature",
        compute_entropy="logits",
    ),
    *_methods(
        f"{_PPO_UTILS}.experience_maker:RemoteExperienceMaker.",
        "experience:AlpExperienceMaker",
        _dispatch_forward="self group sync_condition kwargs",
    ),
    *_methods(
        f"{_PPO_UTILS}.samples_generator:SamplesGenerator.",
        "experience:AlpSamplesGenerator",
        _generate_vllm="self dataloader_iter num_prompts dynamic_filtering",
        _dispatch_prompts_to_vllm="self prompts labels images generate_kwargs",
    ),
    *_methods(
        f"{_PPO_UTILS}.samples_generator:",  # called, not replaced
        "experience:AlpSamplesGenerator",
        _collect_prompt_batch="dataloader_iter num_prompts",
    ),
    *_methods(
        "openrlhf.trainer.ppo_trainer:PPOTrainer.",
        "trainer:RemoteAlpPPOTrainer",
        save_logs_and_checkpoints="self global_step logs_dict client_states",
        train_step="self rollout_samples global_step",
        evaluate="self global_step",
        init_checkpoint_states="self",  # called, not replaced
    ),
    *_methods(
        "openrlhf.trainer.ppo_trainer:",
        "evaluation:eval_metrics",
        compute_eval_metrics="eval_dataloader samples_list n_samples_per_prompt",
    ),
    *_methods(
        f"{_ASYNC}:TrainingActor.",
        "trainer:RemoteAlpTrainingActor",
        train_step="self rollout_samples global_step",
        save_logs_and_checkpoints="self global_step logs_dict client_states",
        broadcast_to_vllm="self",
        fit="self global_step",
    ),
    *_methods(
        f"{_ASYNC}:GenerateSamplesActor.",
        "trainer:RemoteAlpGenerateSamplesActor",
        fit="self episode total_consumed_prompts",
        _run_eval="self",
    ),
    *_methods(
        f"{_ASYNC}:PPOTrainerAsync.",
        "trainer:RemoteAlpPPOTrainerAsync",
        __init__="self pretrain strategy",
        fit="self",
    ),
    *_methods(
        f"{_RAY}:", "rollout_engine:create_rollout_engines", create_vllm_engines="num_engines"
    ),
    *_methods(
        f"{_RAY}.vllm_engine:RolloutRayActor.",
        "rollout_engine:RolloutEngine",
        generate_responses="self prompt label sampling_params max_length hf_tokenizer num_samples "
        "images",
    ),
    *_methods(
        "openrlhf.utils.agent:SingleTurnAgentExecutor.",  # called, not replaced
        "rollout_engine:UpstreamReward",
        _fetch_rewards_via_http="self queries_list prompts_list labels_list",
    ),
    *_methods(
        "openrlhf.utils.utils:", "compat:allow_float32", convert_to_torch_dtype="param_dtype"
    ),
    *_methods("openrlhf.utils.config:", "seams:run_upstream", hierarchize="args"),
)


def check_upstream() -> None:
    """Compare the installed OpenRLHF with what the seams rely on.

    Raises:
        UpstreamDriftError: another version, a missing symbol, or a changed signature.
    """
    version = importlib.metadata.version("openrlhf")
    if version != OPENRLHF_VERSION:
        raise UpstreamDriftError(
            f"OpenRLHF {version} is installed, the seams fit {OPENRLHF_VERSION} only. "
            f"Run `pip install --no-deps openrlhf=={OPENRLHF_VERSION}`."
        )
    for seam in SEAMS:
        _check_seam(seam)


def _check_seam(seam: Seam) -> None:
    try:
        function = _resolve(seam.symbol)
    except AttributeError as error:
        raise UpstreamDriftError(
            f"{seam.symbol} is gone ({error}); see learner/seams.py"
        ) from error
    found = tuple(inspect.signature(function).parameters)[: len(seam.parameters)]
    if found != seam.parameters:
        raise UpstreamDriftError(
            f"{seam.symbol} takes {found}, but {seam.replaced_by} expects {seam.parameters}"
        )


def _resolve(symbol: str) -> Callable[..., Any]:
    module_name, _, path = symbol.partition(":")
    found: Any = importlib.import_module(module_name)
    for name in path.split("."):
        if hasattr(found, "__ray_metadata__"):  # a remote class hides its methods' signatures
            from openrlhf_alp.learner.compat import undecorated

            found = undecorated(found)
        found = getattr(found, name)
    return found


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Put our classes where OpenRLHF looks up its own, for the length of the block."""
    import openrlhf.trainer.ppo_trainer
    import openrlhf.trainer.ppo_trainer_async
    import openrlhf.trainer.ray.ppo_actor
    import openrlhf.utils.deepspeed

    from openrlhf_alp.learner.actor import RemoteAlpPolicyModelActor
    from openrlhf_alp.learner.strategy import AlpStrategy
    from openrlhf_alp.learner.trainer import RemoteAlpPPOTrainer, RemoteAlpPPOTrainerAsync

    with (
        mock.patch.object(openrlhf.utils.deepspeed, "DeepspeedStrategy", AlpStrategy),
        mock.patch.object(
            openrlhf.trainer.ray.ppo_actor, "PolicyModelActor", RemoteAlpPolicyModelActor
        ),
        mock.patch.object(openrlhf.trainer.ppo_trainer, "PPOTrainer", RemoteAlpPPOTrainer),
        mock.patch.object(
            openrlhf.trainer.ppo_trainer_async, "PPOTrainerAsync", RemoteAlpPPOTrainerAsync
        ),
    ):
        yield


def run_upstream(add_arguments: AddArguments, settle: Settle, ray_options: RayOptions) -> None:
    """Run OpenRLHF's own command line with our flags and our classes.

    Args:
        add_arguments: adds our flags to OpenRLHF's parser.
        settle: called with the nested args before OpenRLHF validates them; returns them.
        ray_options: settled args, environment of the workers by OpenRLHF -> `ray.init`'s arguments.

    Raises:
        UpstreamDriftError: OpenRLHF is not what the seams were written for.
    """
    import openrlhf.trainer.ray
    import ray

    from openrlhf_alp.learner.rollout_engine import create_rollout_engines

    check_upstream()
    upstream_engines = openrlhf.trainer.ray.create_vllm_engines
    start_ray = ray.init
    settled: list[SimpleNamespace] = []

    # Upstream passes no args to some of what is replaced, so the settled ones are kept here.
    def settle_and_keep(args: SimpleNamespace) -> SimpleNamespace:
        settled.append(settle(args))
        return settled[0]

    def create_engines(*args: Any, **kwargs: Any) -> list[Any]:
        if settled[0].rollout_service.urls:
            return create_rollout_engines(settled[0])
        return upstream_engines(*args, **kwargs)

    def init_ray(*, runtime_env: dict[str, Any]) -> None:
        # OpenRLHF's variables are taken from its own call, so that they follow it.
        start_ray(**ray_options(settled[0], runtime_env["env_vars"]))

    with (
        installed(),
        mock.patch.object(ray, "init", init_ray),
        mock.patch.object(openrlhf.trainer.ray, "create_vllm_engines", create_engines),
        _hooked_parser(add_arguments, settle_and_keep),
    ):
        runpy.run_module(UPSTREAM_MAIN, run_name="__main__", alter_sys=True)


def parsed_args(argv: list[str], add_arguments: AddArguments, settle: Settle) -> SimpleNamespace:
    """The args that a run with `argv` would train with, parsed and validated by OpenRLHF itself.

    Nothing is started: the run ends where OpenRLHF would build its strategy.
    """
    import openrlhf.utils
    import ray

    class _Reached(Exception):
        pass

    reached: list[SimpleNamespace] = []

    def stop(args: SimpleNamespace) -> None:
        reached.append(args)
        raise _Reached

    with (
        mock.patch.object(sys, "argv", [UPSTREAM_MAIN, *argv]),
        mock.patch.object(ray, "is_initialized", lambda: True),
        mock.patch.object(openrlhf.utils, "get_strategy", stop),
        _hooked_parser(add_arguments, settle),
        contextlib.suppress(_Reached),
    ):
        runpy.run_module(UPSTREAM_MAIN, run_name="__main__", alter_sys=True)
    return reached[0]


@contextlib.contextmanager
def _hooked_parser(add_arguments: AddArguments, settle: Settle) -> Iterator[None]:
    import openrlhf.utils.config

    hierarchize = openrlhf.utils.config.hierarchize
    # The method, not the class: argparse itself refers to the class by its module global.
    parse_args = argparse.ArgumentParser.parse_args

    def parse_args_with_ours(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        # Once is enough: later parsers of the run, such as DeepSpeed's, are not ours to extend.
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
        # argparse prints the usage above an error, and 165 lines of flags would hide the error.
        parser.usage = USAGE
        add_arguments(parser)
        return parse_args(parser, *args, **kwargs)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args_with_ours),
        mock.patch.object(
            openrlhf.utils.config, "hierarchize", lambda args: settle(hierarchize(args))
        ),
    ):
        yield
