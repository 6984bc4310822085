"""Every substitution into OpenRLHF 0.11.2, each with the upstream symbol and what it relies on.

OpenRLHF looks its classes up as module globals by name, so a substitution is an assignment. It has no
plug-in points and its command line builds its parser under `if __name__ == "__main__"`; so we set the
globals below, hook the parser, and run that module as the main program. Not a line of it is copied.

    openrlhf.cli.train_ppo_ray (run as __main__)
      ArgumentParser.parse_args   + our flags                      one shot
      hierarchize(args)           + settle(args), contract check   before upstream's own validation
      get_strategy                -> AlpStrategy
      create_vllm_engines         -> one RolloutEngine per service URL
      PolicyModelActor            -> AlpPolicyModelActor -> AlpActorPPOTrainer -> UnifiedPolicyLoss
      PPOTrainer                  -> AlpPPOTrainer -> AlpExperienceMaker, AlpSamplesGenerator
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

OPENRLHF_VERSION = "0.11.2"
UPSTREAM_MAIN = "openrlhf.cli.train_ppo_ray"


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
    """`module:name` of ours, or what we do with the symbol."""


SEAMS = (
    Seam(
        symbol="openrlhf.utils.deepspeed:DeepspeedStrategy.prepare",
        parameters=("self", "args"),
        replaced_by="openrlhf_alp.learner.strategy:AlpStrategy",
    ),
    Seam(
        symbol="openrlhf.utils.deepspeed:DeepspeedStrategy._get_model_parameters",
        parameters=("self", "model", "optim", "weight_decay"),
        replaced_by="openrlhf_alp.learner.strategy:AlpStrategy",
    ),
    Seam(
        symbol="openrlhf.utils.deepspeed:DeepspeedStrategy.moving_average",
        parameters=("self", "model", "model_ema", "beta", "device"),
        replaced_by="openrlhf_alp.learner.strategy:AlpStrategy",
    ),
    Seam(
        symbol="openrlhf.utils.deepspeed:DeepspeedStrategy.save_model",
        parameters=("self", "model", "tokenizer", "output_dir", "kwargs"),
        replaced_by="openrlhf_alp.learner.strategy:AlpStrategy",
    ),
    Seam(
        symbol="openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step",
        parameters=("self", "experience", "kl_ctl", "step", "loss_batch_info"),
        replaced_by="openrlhf_alp.learner.actor:AlpActorPPOTrainer",
    ),
    Seam(
        symbol="openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer._init_vllm_sync_group",
        parameters=("self", "backend"),
        replaced_by="openrlhf_alp.learner.actor:AlpActorPPOTrainer",
    ),
    Seam(
        symbol="openrlhf.trainer.ray.ppo_actor:PolicyModelActor.init_model_from_pretrained",
        parameters=("self", "strategy", "pretrain", "max_steps", "vllm_engines"),
        replaced_by="openrlhf_alp.learner.actor:RemoteAlpPolicyModelActor",
    ),
    Seam(
        symbol="openrlhf.models:PolicyLoss.forward",
        parameters=(
            "self", "log_probs", "old_log_probs", "advantages", "action_mask", "rollout_log_probs",
            "dp_size", "batch_num_tokens", "global_batch_size",
        ),
        replaced_by="openrlhf_alp.learner.policy_loss:UnifiedPolicyLoss",
    ),
    Seam(
        symbol="openrlhf.models:aggregate_loss",
        parameters=(
            "loss", "loss_mask", "token_level_loss", "dp_size", "batch_num_tokens",
            "global_batch_size",
        ),
        replaced_by="called by openrlhf_alp.learner.policy_loss:UnifiedPolicyLoss",
    ),
    Seam(
        symbol="openrlhf.trainer.ppo_utils.experience_maker:RemoteExperienceMaker._dispatch_forward",
        parameters=("self", "group", "sync_condition", "kwargs"),
        replaced_by="openrlhf_alp.learner.experience:AlpExperienceMaker",
    ),
    Seam(
        symbol="openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._generate_vllm",
        parameters=("self", "dataloader_iter", "num_prompts", "dynamic_filtering", "generate_kwargs"),
        replaced_by="openrlhf_alp.learner.experience:AlpSamplesGenerator",
    ),
    Seam(
        symbol="openrlhf.trainer.ppo_trainer:PPOTrainer.save_logs_and_checkpoints",
        parameters=("self", "global_step", "logs_dict", "client_states"),
        replaced_by="openrlhf_alp.learner.trainer:RemoteAlpPPOTrainer",
    ),
    Seam(
        symbol="openrlhf.trainer.ray:create_vllm_engines",
        parameters=("num_engines",),
        replaced_by="openrlhf_alp.learner.rollout_engine:create_rollout_engines",
    ),
    Seam(
        symbol="openrlhf.trainer.ray.vllm_engine:RolloutRayActor.generate_responses",
        parameters=(
            "self", "prompt", "label", "sampling_params", "max_length", "hf_tokenizer",
            "num_samples", "images",
        ),
        replaced_by="openrlhf_alp.learner.rollout_engine:RolloutEngine",
    ),
    Seam(
        symbol="openrlhf.utils.agent:SingleTurnAgentExecutor._fetch_rewards_via_http",
        parameters=("self", "queries_list", "prompts_list", "labels_list"),
        replaced_by="called by openrlhf_alp.learner.reward:UpstreamReward",
    ),
    Seam(
        symbol="openrlhf.utils.config:hierarchize",
        parameters=("args",),
        replaced_by="wrapped in openrlhf_alp.learner.seams:run_upstream",
    ),
)  # fmt: skip


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
        raise UpstreamDriftError(f"{seam.symbol} is gone ({error}); see learner/seams.py") from error
    found = tuple(inspect.signature(function).parameters)[: len(seam.parameters)]
    if found != seam.parameters:
        raise UpstreamDriftError(
            f"{seam.symbol} takes {found}, the seam expects {seam.parameters}; it is "
            f"{seam.replaced_by}"
        )


def _resolve(symbol: str) -> Callable[..., Any]:
    module_name, _, path = symbol.partition(":")
    found: Any = importlib.import_module(module_name)
    for name in path.split("."):
        if hasattr(found, "__ray_metadata__"):
            from openrlhf_alp.learner.remote import undecorated

            found = undecorated(found)
        found = getattr(found, name)
    return found


def install() -> None:
    """Put our classes in the places where OpenRLHF looks its own up."""
    import openrlhf.trainer.ppo_trainer
    import openrlhf.trainer.ray
    import openrlhf.trainer.ray.ppo_actor
    import openrlhf.utils.deepspeed

    from openrlhf_alp.learner.actor import RemoteAlpPolicyModelActor
    from openrlhf_alp.learner.strategy import AlpStrategy
    from openrlhf_alp.learner.trainer import RemoteAlpPPOTrainer

    openrlhf.utils.deepspeed.DeepspeedStrategy = AlpStrategy
    openrlhf.trainer.ray.ppo_actor.PolicyModelActor = RemoteAlpPolicyModelActor
    openrlhf.trainer.ppo_trainer.PPOTrainer = RemoteAlpPPOTrainer


def use_rollout_service(args: SimpleNamespace) -> None:
    """Replace OpenRLHF's in-process vLLM engines by the rollout services of `args`."""
    import openrlhf.trainer.ray

    from openrlhf_alp.learner.rollout_engine import create_rollout_engines

    def create(*_args: Any, **_kwargs: Any) -> list[Any]:
        return create_rollout_engines(args)

    openrlhf.trainer.ray.create_vllm_engines = create


def run_upstream(
    add_arguments: Callable[[argparse.ArgumentParser], None],
    settle: Callable[[SimpleNamespace], SimpleNamespace],
) -> None:
    """Run OpenRLHF's own command line with our flags and our classes.

    Args:
        add_arguments: adds our flags to OpenRLHF's parser.
        settle: called with the nested args before OpenRLHF validates them; returns them.
    """
    import openrlhf.utils.config

    check_upstream()
    install()
    hierarchize = openrlhf.utils.config.hierarchize
    openrlhf.utils.config.hierarchize = lambda args: settle(hierarchize(args))
    _add_flags_once(add_arguments)
    runpy.run_module(UPSTREAM_MAIN, run_name="__main__", alter_sys=True)


def _add_flags_once(add_arguments: Callable[[argparse.ArgumentParser], None]) -> None:
    # The method, not the class: argparse itself refers to the class by its module global.
    original = argparse.ArgumentParser.parse_args

    def parse_args(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        argparse.ArgumentParser.parse_args = original
        add_arguments(parser)
        return original(parser, *args, **kwargs)

    argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign,assignment]
