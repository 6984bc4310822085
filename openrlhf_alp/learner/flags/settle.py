"""Our flags beside OpenRLHF's: added to its parser, read once, and checked against each other."""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace

from openrlhf_alp.clients.weights.gpu_carrier import Meeting
from openrlhf_alp.learner.batches import BatchShape
from openrlhf_alp.learner.flags.config import MATH_VERIFY, AlpConfig, ServiceConfig
from openrlhf_alp.learner.flags.ranges import require_ranges
from openrlhf_alp.learner.flags.spec import add_flags, read_flags
from openrlhf_alp.replay.files.read import find_files
from openrlhf_alp.rollouts.runners import ToolConfig
from services.common.wire import (
    ADMIN_KEY_VARIABLE,
    API_KEY_VARIABLE,
    TOOL_KEY_VARIABLE,
    require_keys,
)

_MEAN_BASELINES = frozenset({"group_norm", "reinforce_baseline", "dr_grpo"})
"""Estimators whose baseline is a group's mean, from which an episode can be left out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add our flags to OpenRLHF's parser; one `--help` then shows both."""
    for title, config, prefix in (
        ("Adaptive Layerwise Perturbation", AlpConfig, "alp"),
        ("rollout service and run folder", ServiceConfig, "rollout"),
        ("tool-integrated episodes", ToolConfig, "tool"),
    ):
        add_flags(parser.add_argument_group(title), config, prefix)
    _offer_float32(parser)


def _offer_float32(parser: argparse.ArgumentParser) -> None:
    """For CPUs without bfloat16 units, and for a learner that is more exact than the rollouts."""
    # The page of our own flags has a parser without upstream's.
    for flag in [a for a in parser._actions if a.dest == "ds.param_dtype"]:
        flag.choices = [*(flag.choices or ()), "fp32"]
        flag.help = "Model data type; fp32 is faster on a CPU without bfloat16 units"


def settle(args: SimpleNamespace) -> SimpleNamespace:
    """Check our flags against OpenRLHF's and set what follows from them.

    Runs between OpenRLHF's parsing and its own validation.

    Raises:
        ValueError: flags that contradict each other; the message names them and the fix.
    """
    require_ranges(args)
    args.rollout_service = read_flags(args, ServiceConfig, "rollout")
    tool = read_flags(args, ToolConfig, "tool")
    if tool.template == "auto":
        tool = replace(tool, template="chat" if args.data.apply_chat_template else "plain")
    args.tool_service = tool
    # Last, because it takes the place of the namespace that its flags are read from.
    args.alp = read_flags(args, AlpConfig, "alp")
    if args.alp.enable:
        _settle_alp(args)
    if args.rollout_service.urls:
        _settle_service(args)
        if not args.alp.dry_run:
            require_keys(API_KEY_VARIABLE, ADMIN_KEY_VARIABLE, service="rollout")
    _check_batches(args)
    _check_lengths(args)
    _check_transport(args)
    _check_staleness(args.rollout_service)
    _check_preflight(args)
    _check_tool(args)
    _check_record(args)
    return args


def _settle_alp(args: SimpleNamespace) -> None:
    if args.rollout.top_p != 1.0:
        raise ValueError(
            f"--rollout.top_p is {args.rollout.top_p}, but a ratio to the engine needs 1.0: it "
            "reports log-probs of the truncated distribution, the learner those of the full one. "
            "Set --rollout.top_p 1.0."
        )
    _refuse_upstreams_loss(args)
    if args.ds.ring_attn_size > 1 or args.ds.tensor_parallel_size > 1:
        raise ValueError(
            "--alp.enable does not support ring attention or DeepSpeed tensor parallelism: they "
            "split tokens and hidden dimensions, which key the noise. Set --ds.ring_attn_size 1 "
            "and --ds.tensor_parallel_size 1."
        )
    if args.ds.deepcompile and args.alp.perturbed:
        raise ValueError(
            "--ds.deepcompile compiles the model's forward once, and whether and with which keys a "
            "layer adds its noise is decided anew for every micro-batch. Drop --ds.deepcompile, or "
            "use --alp.method *-bypass."
        )
    if args.alp.perturbed and args.alp.noise.draws > 1 and args.data.max_images_per_prompt > 0:
        raise ValueError(
            f"--alp.draws {args.alp.noise.draws} repeats the samples of a forward pass, and images "
            "cannot be repeated. Set --alp.draws 1 or --data.max_images_per_prompt 0."
        )
    if args.actor.optim == "muon" and args.alp.perturbed:
        raise ValueError(
            "--actor.optim muon has no parameter group for sigma in DeepSpeed. Use "
            "--actor.optim adam with --alp.method *-alp."
        )
    if args.alp.objective().aggregation == "seq-mean-token-mean":
        # GSPO's gradient weighs every sequence the same; the token mean would weigh by length.
        args.actor.loss_agg_mode = "seq-mean-token-mean"
    if not args.rollout_service.urls:
        # OpenRLHF's engines return log-probs only when some correction is on. This one has no
        # effect, because the loss that would read it is replaced.
        args.algo.advantage.is_correction_level = "token"


_UPSTREAM_LOSS_FLAGS = {
    "actor.policy_loss_type": ("ppo", "--alp.method"),
    "actor.eps_clip": (0.2, "--alp.clip_low_high"),
    "actor.eps_clip_low_high": (None, "--alp.clip_low_high"),
    "actor.dual_clip": (None, "--alp.dual_clip"),
    "algo.advantage.is_correction_level": ("off", "--alp.method"),
    "algo.advantage.is_correction_mode": ("mask", "--alp.method"),
    "algo.advantage.is_correction_gating": ("ratio", "--alp.method"),
    "algo.advantage.is_correction_threshold": ([0.5, 5.0], "--alp.correction_low_high"),
}
"""OpenRLHF's flags of its own policy loss, which `--alp.method` replaces: the default of each, and
the flag of ours that does the same."""


def _refuse_upstreams_loss(args: SimpleNamespace) -> None:
    for name, (default, ours) in _UPSTREAM_LOSS_FLAGS.items():
        value = attrgetter(name)(args)
        if value != default:
            raise ValueError(
                f"--{name} {value} is of OpenRLHF's own policy loss, which --alp.method "
                f"{args.alp.method} replaces: it would have no effect. Drop it; {ours} is its "
                "counterpart."
            )


def _settle_service(args: SimpleNamespace) -> None:
    if args.train.agent_func_path:
        raise ValueError(
            "--train.agent_func_path runs inside OpenRLHF's own vLLM engines, which "
            "--rollout.service_urls replaces. Drop one of the two."
        )
    if args.data.max_images_per_prompt > 0:
        raise ValueError(
            "--rollout.service_urls serves text only. Drop --data.max_images_per_prompt."
        )
    if args.vllm.enable_sleep:
        raise ValueError(
            "--vllm.enable_sleep lets OpenRLHF's own vLLM engines share the learner's GPUs, and "
            "--rollout.service_urls replaces those engines. Drop --vllm.enable_sleep and run the "
            "services on GPUs of their own."
        )
    if args.ds.lora.rank > 0:
        raise ValueError(
            "--rollout.service_urls pushes full weights, and LoRA adapters are not merged. Set "
            "--ds.lora.rank 0."
        )
    if args.algo.dynamic_filtering_enable:
        raise ValueError(
            "--algo.dynamic_filtering_enable divides by zero in OpenRLHF 0.11.2 when a group is "
            "dropped, as --rollout.service_urls does when a reward cannot be computed. Drop one "
            "of the two."
        )
    # Upstream creates, counts and addresses our actors as if they were its engines.
    args.vllm.num_engines = len(args.rollout_service.urls)
    # With "nccl" upstream would share memory with colocated engines, and ask vLLM for its version.
    args.vllm.sync_backend = "service"
    args.reward.remote_url = args.reward.remote_url or MATH_VERIFY
    workers = args.rollout_service.reward_workers
    if workers > 1 and args.reward.remote_url not in (MATH_VERIFY, [MATH_VERIFY]):
        raise ValueError(
            f"--reward.num_workers {workers} starts processes of the math reward, and "
            f"--reward.remote_url {args.reward.remote_url} names another one. Drop the former."
        )


def _check_batches(args: SimpleNamespace) -> None:
    """A full batch gives every rank something to do; see `learner/batches.py`."""
    shape = BatchShape.of(args)
    ranks, micro = shape.num_ranks, shape.train_micro_batch_size
    divisor = ranks if shape.dynamic else ranks * micro
    if shape.train_batch_size % divisor:
        each = "" if shape.dynamic else f" with --train.micro_batch_size {micro}"
        raise ValueError(
            f"--train.batch_size {shape.train_batch_size} does not divide among {ranks} rank(s)"
            f"{each}. Set it to a multiple of {divisor}."
        )
    num_samples = args.rollout.batch_size * shape.group_size
    asked = (
        f"--rollout.batch_size {args.rollout.batch_size} x --rollout.n_samples_per_prompt "
        f"{shape.group_size} = {num_samples} samples"
    )
    if not shape.fit(num_samples).num_samples:
        unit = math.lcm(shape.group_size, divisor)
        raise ValueError(
            f"{asked} give {ranks} rank(s) no whole micro-batch each. Set --rollout.batch_size to "
            f"a multiple of {unit // shape.group_size}, or use fewer ranks "
            "(--actor.num_gpus_per_node)."
        )
    if num_samples // shape.rollout_micro_batch_size < ranks:
        raise ValueError(
            f"{asked} in forwards of --rollout.micro_batch_size {shape.rollout_micro_batch_size} "
            f"leave some of {ranks} ranks without one. Set --rollout.micro_batch_size to at most "
            f"{num_samples // ranks}."
        )


def _check_lengths(args: SimpleNamespace) -> None:
    """OpenRLHF would cut prompts to nothing, or stop after the first rollout."""
    most = args.rollout.max_new_tokens
    if most is None:
        return
    if not args.rollout_service.urls and most >= args.data.max_len:
        raise ValueError(
            f"--rollout.max_new_tokens {most} leaves no token of --data.max_len "
            f"{args.data.max_len} for the prompt. Lower the former or raise the latter."
        )
    if (args.reward.overlong_buffer_len or 0) > most:
        raise ValueError(
            f"--reward.overlong_buffer_len {args.reward.overlong_buffer_len:g} is more than "
            f"--rollout.max_new_tokens {most}, the end of which it is. Lower it."
        )


def _check_transport(args: SimpleNamespace) -> None:
    service: ServiceConfig = args.rollout_service
    transport = service.weight_transport
    if transport != "file" and not service.urls:
        raise ValueError(
            f"--rollout.weight_transport {transport} needs --rollout.service_urls: OpenRLHF's own "
            "engines are synchronised by --vllm.sync_backend."
        )
    if service.meeting != Meeting() and transport != "nccl":
        raise ValueError(
            "--rollout.weight_sync_host and --rollout.weight_sync_port say where an NCCL group "
            f"meets, but --rollout.weight_transport is {transport}. Set it to nccl, or drop them."
        )
    port = service.weight_sync_port
    if port is not None and not 0 < port < 65_536:
        raise ValueError(f"--rollout.weight_sync_port is {port}; it must be 1 to 65535.")
    num_ranks = args.actor.num_nodes * args.actor.num_gpus_per_node
    if transport == "ipc" and (num_ranks, len(service.urls)) != (1, 1):
        raise ValueError(
            "--rollout.weight_transport ipc maps the memory of one GPU: it takes one learner "
            f"process and one service on that GPU, not {num_ranks} and {len(service.urls)}. Use "
            "nccl or http."
        )


def _check_staleness(service: ServiceConfig) -> None:
    if service.max_staleness is None:
        return
    if service.max_staleness < 0:
        raise ValueError(
            f"--rollout.max_staleness is {service.max_staleness}; it must be 0 (only tokens of the "
            "version that is updated) or above. Leave it out to keep every group."
        )
    if not service.urls:
        raise ValueError(
            "--rollout.max_staleness needs --rollout.service_urls: OpenRLHF's own engines do not "
            "say which version sampled a token."
        )


def _check_preflight(args: SimpleNamespace) -> None:
    service = args.rollout_service
    if service.preflight_every < 0 or (service.preflight_stop and not service.preflight_every):
        raise ValueError(
            f"--rollout.preflight_every is {service.preflight_every}; give the number of steps "
            "from one measurement to the next. 0 means never, and then --rollout.preflight_stop "
            "has no effect."
        )
    if service.preflight_every and args.train.async_enable and not service.urls:
        raise ValueError(
            "--rollout.preflight_every with --train.async_enable needs --rollout.service_urls: the "
            "samples of a step are older than its weights, so the service is asked for new ones."
        )
    has_log_probs = service.urls or args.algo.advantage.is_correction_level != "off"
    if service.preflight_every and not has_log_probs:
        raise ValueError(
            "--rollout.preflight_every needs the log-probs of the rollouts. Set "
            "--rollout.service_urls or --alp.enable."
        )


def _check_record(args: SimpleNamespace) -> None:
    folder = args.alp.record
    if folder is None:
        return
    if not args.rollout_service.urls:
        raise ValueError(
            "--alp.record needs --rollout.service_urls: OpenRLHF's own engines say neither which "
            "weights sampled a token nor how a tool call ended."
        )
    if Path(folder).is_file():
        raise ValueError(f"--alp.record {folder} is a file; give a folder.")
    if not args.ckpt.load_enable and Path(folder).is_dir() and find_files(Path(folder))[0]:
        raise ValueError(
            f"--alp.record {folder} holds the steps of another run, which this one would replace. "
            "Give an empty folder, or continue that run with --ckpt.load_enable."
        )


def _check_tool(args: SimpleNamespace) -> None:
    tool: ToolConfig = args.tool_service
    if not tool.urls:
        if replace(tool, template="plain") != ToolConfig(template="plain"):
            raise ValueError(
                "--tool.* and --tir.* flags are given, but no --tool.service_urls: episodes would "
                "have one turn and no tool. Add the URLs, or drop the flags."
            )
        return
    for url in tool.urls:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"--tool.service_urls {url}: must begin with http:// or https://")
    if not args.rollout_service.urls:
        raise ValueError(
            "--tool.service_urls needs --rollout.service_urls: the learner drives the episode over "
            "both services. On OpenRLHF's own engines, export OPENRLHF_ALP_TOOL_URLS instead and "
            "give --train.agent_func_path the path of openrlhf_alp/learner/agent.py."
        )
    if not args.alp.dry_run:
        require_keys(TOOL_KEY_VARIABLE, service="tool")
    estimator = args.algo.advantage.estimator
    if tool.void_baseline == "drop" and estimator not in _MEAN_BASELINES:
        raise ValueError(
            "--tir.void_baseline drop takes void episodes out of a group's mean, but "
            f"--algo.advantage.estimator {estimator} has no such mean. Use one of "
            f"{', '.join(sorted(_MEAN_BASELINES))}, or --tir.void_baseline keep."
        )
