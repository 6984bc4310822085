"""Cost of the perturbation: (perturbed forward + backward) over (clean forward + backward).

Runs SmolLM2-135M's shapes with random weights on the CPU (or `--device cuda`) and prints ratios;
the variants are interleaved, because seconds on a shared machine mean little. `naive` is what one
would write first: `h + sigma * torch.randn_like(h)` in the same hooks, sigma learned as well. Where
other processes compete for the cores, read the CPU seconds of `--threads 1`, not the wall time.

    python benchmarks/perturbed_forward.py [--rounds 7] [--batch 16] [--tokens 96] [--padding 0.0]
        [--checkpoint] [--device cuda]

A second table is about the noise alone, (rows, D) at once: what one pass costs over `randn_like`
of the same shape, how many kernels inductor makes of it, how many bytes a number moves through
memory, and which share of a plain copy's bandwidth that is.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch._inductor import metrics
from transformers import LlamaConfig, LlamaForCausalLM

from openrlhf_alp.alp import LayerwisePerturbation, PerturbationConfig, attach, fused
from openrlhf_alp.alp.config import SigmaKind

SIGMA = 0.01
SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)


class NaiveNoise:
    """The baseline: stateful noise, a tensor of it kept per layer until the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.on = False
        for layer in model.get_decoder().layers:
            layer.log_sigma = nn.Parameter(torch.tensor(SIGMA, device=model.device).log())
            layer.register_forward_pre_hook(self.perturb, with_kwargs=True)

    def perturb(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple | None:
        if not self.on:
            return None
        hidden = args[0]
        noise = layer.log_sigma.exp().to(hidden.dtype) * torch.randn_like(hidden)
        return (hidden + noise, *args[1:]), kwargs


def build_models(device: str) -> tuple[dict[str, nn.Module], dict[str, LayerwisePerturbation]]:
    """One clean-by-default model per variant, all with the same weights."""
    torch.manual_seed(0)
    clean = LlamaForCausalLM(SMOLLM2).to(device, torch.bfloat16)
    models: dict[str, nn.Module] = {"clean": clean}
    perturbations = {}
    for kind in ("scalar", "vector"):
        models[kind] = twin(clean)
        perturbations[kind] = attach(models[kind], config(kind))
    models["naive"] = twin(clean)
    NaiveNoise(models["naive"]).on = True
    return models, perturbations


def config(kind: SigmaKind) -> PerturbationConfig:
    return PerturbationConfig(
        sigma0=SIGMA,
        kind=kind,
        sigma_scale="absolute",
        sigma_min=0.0,
        sigma_max=1.0,
        layers="all",
        seed=0,
    )


def twin(model: nn.Module) -> nn.Module:
    """A second model that shares the weights (and their gradients), so that memory stays small."""
    other = LlamaForCausalLM(SMOLLM2).to(model.device, torch.bfloat16)
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            other.get_submodule(name)._parameters[key] = parameter
    return other


def make_batch(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random tokens (B, T) and a mask (B, T) with the asked share of right padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(SMOLLM2.vocab_size, (args.batch, args.tokens), generator=generator)
    mask = torch.ones(args.batch, args.tokens, dtype=torch.long)
    mask[:, args.tokens - round(args.padding * args.tokens) :] = 0
    return tokens.to(args.device), mask.to(args.device)


def time_call(call: Callable[[], None], device: str) -> tuple[float, float]:
    """(wall seconds, CPU seconds of all threads)."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def print_table(title: str, seconds: dict[str, list[float]]) -> None:
    """Median and minimum of each variant, and their ratios to the clean model's."""
    clean = seconds["clean"]
    print(f"{title:12} {'median s':>9} {'min s':>8} {'ratio of medians':>17} {'of minima':>10}")
    for name, values in seconds.items():
        median, best = statistics.median(values), min(values)
        by_median, by_best = median / statistics.median(clean), best / min(clean)
        print(f"  {name:10} {median:9.3f} {best:8.3f} {by_median:17.3f} {by_best:10.3f}")


def kernels_of(call: Callable[[], object]) -> int:
    """Kernels that inductor makes of the programs behind a call, compiled anew."""
    torch._dynamo.reset()
    fused._program.cache_clear()
    metrics.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):
        call()
    return metrics.generated_kernel_count


def print_noise(args: argparse.Namespace) -> None:
    """The noise alone, on as many rows as the batch has tokens and SmolLM2's width."""
    rows, width = args.batch * args.tokens, SMOLLM2.hidden_size
    hidden = torch.randn(rows, width, device=args.device).bfloat16()
    sigma = torch.full((width,), SIGMA, device=args.device)
    keys = torch.arange(rows, device=args.device) * 0x9E3779B97F4A7C1
    passes: dict[str, tuple[Callable[[], object], float]] = {
        # Bytes of a number that the pass must move: read and write, or read alone.
        "copy": (hidden.clone, 4.0),
        "randn_like": (partial(torch.randn_like, hidden), 2.0),
        "forward": (partial(fused.add_noise, hidden, sigma, keys, None), 4.0),
        "backward": (
            partial(fused.sigma_gradient, hidden, keys, None, per_dimension=True),
            2.0,
        ),
    }
    counts = {name: kernels_of(passes[name][0]) for name in ("forward", "backward")}
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for round_number in range(4 * args.rounds + 2):
        for name, (call, _) in passes.items():
            _, cpu_s = time_call(call, args.device)
            if round_number > 1:
                seconds[name].append(cpu_s)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bandwidth = {name: passes[name][1] / medians[name] for name in passes}
    print(f"noise alone, {rows} x {width}")
    print(
        f"  {'pass':10} {'over randn_like':>15} {'kernels':>8} {'bytes/number':>13} {'of copy':>8}"
    )
    for name, (_, num_bytes) in passes.items():
        print(
            f"  {name:10} {medians[name] / medians['randn_like']:15.2f} "
            f"{counts.get(name, 1):8} {num_bytes:13.1f} {bandwidth[name] / bandwidth['copy']:8.1%}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--padding", type=float, default=0.0, help="share of padded tokens")
    parser.add_argument("--threads", type=int, help="default: PyTorch's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoint", action="store_true", help="gradient checkpointing")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    tokens, mask = make_batch(args)
    print_noise(args)
    models, perturbations = build_models(args.device)
    if args.checkpoint:
        for model in models.values():
            model.train().gradient_checkpointing_enable()
    sample_ids = torch.arange(args.batch, device=args.device)

    def step(name: str, update: int) -> None:
        models[name].zero_grad(set_to_none=True)
        on: AbstractContextManager[None] = nullcontext()
        if name in perturbations:
            on = perturbations[name].enabled(
                update=update, sample_ids=sample_ids, attention_mask=mask
            )
        with on:
            logits = models[name](tokens, attention_mask=mask, use_cache=False).logits
            nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()

    wall: dict[str, list[float]] = {name: [] for name in models}
    cpu: dict[str, list[float]] = {name: [] for name in models}
    for round_number in range(args.rounds + 1):  # the first round warms up
        for name in models:
            wall_s, cpu_s = time_call(partial(step, name, round_number), args.device)
            if round_number > 0:
                wall[name].append(wall_s)
                cpu[name].append(cpu_s)
    print(f"{torch.get_num_threads()} threads, {args.batch} x {args.tokens} tokens, bfloat16")
    print_table("wall time", wall)
    print_table("CPU time", cpu)


if __name__ == "__main__":
    main()
