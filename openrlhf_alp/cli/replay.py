"""`openrlhf-alp replay`: its options. The room `replay` does the work."""

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from openrlhf_alp.cli.explain import explain_model, explanation_json, show
from openrlhf_alp.objective.methods import METHODS

if TYPE_CHECKING:
    from openrlhf_alp.replay.bench.update import UpdateSettings
    from openrlhf_alp.replay.files.records import RecordedBatch
    from openrlhf_alp.replay.learner import Learner

HELP = "put one recorded batch through every method, from the same weights"

DESCRIPTION = f"""\
Make the same update from the same weights with every method, on one recorded batch, and show what
each does: loss, gradient, what it clips and masks, and the tail of the log-ratio after it.

Training with --alp.record DIR writes the batches; convert-batch makes one from JSON lines. The
model must hold the weights that the step updated: for step 1 the model that the run started from.
If its digest is not the recorded one, the ratios include that difference, and the report says so.

The optimizer is the run's AdamW: its learning rate, betas and largest gradient norm. The old policy
of grpo, mis and their kind is the clean model before the update. ALP's noise is drawn once, with
fixed sigma; --sigma0 auto gives it the KL of the batch's own mismatch. Methods that make the very
same update are computed once ("= a").

methods: {", ".join(METHODS)}

  openrlhf-alp replay runs/batches --model /models/policy
  openrlhf-alp replay runs/batches/step-000004.parquet --model checkpoint --updates 4 \\
    --methods token-bypass,token-alp,grpo --output runs/replay
  openrlhf-alp replay runs/batches --model /models/policy --explain

Results go to --output as replay.json, envelope.png and tails.png. An interrupted replay with the
same options continues. exit status: 0 done, 2 a file, model or option is not usable.
"""


_TABLE_WIDTH = 80
"""Characters of the widest table; in a narrower terminal its lines wrap."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `openrlhf-alp replay`."""
    add = parser.add_argument
    add("path", type=Path, help="a batch file, or a folder of --alp.record")
    add("--model", required=True, help="folder or Hugging Face id of the weights before the update")
    add(
        "--step",
        type=int,
        help="which file of a folder (default: the first of the model's weights)",
    )
    add(
        "--methods",
        default="all",
        help="comma-separated, the first is compared with (default: all)",
    )
    add("--lr", type=float, help="learning rate of AdamW (default: the run's, else 1e-6)")
    add("--updates", type=int, default=1, help="optimizer steps, each on a part (default: 1)")
    add("--sigma0", default="auto", help="noise of ALP, relative to |h|, or auto (default: auto)")
    add("--layers", default="all", help="--alp.layers of the noise (default: all)")
    add("--draws", type=int, default=1, help="--alp.draws, averaged draws of it (default: 1)")
    add("--seed", type=int, default=42, help="seed of the noise (default: 42)")
    add("--dtype", default="float32", choices=("float32", "bfloat16"), help="(default: float32)")
    add("--device", default="auto", help="cpu, cuda or auto (default: auto)")
    add("--max-tokens", type=int, default=1024, help="of a micro-batch, all draws (default: 1024)")
    add("--output", type=Path, default=Path("runs/replay"), help="(default: runs/replay)")
    add("--explain", action="store_true", help="say where learner and engine differ, no update")


def run(arguments: argparse.Namespace) -> int:
    """Replays; returns 0, or 2 when something given is not usable."""
    console = Console(width=max(Console().width, _TABLE_WIDTH))
    say = _Say(console)
    try:
        methods = read_methods(arguments.methods)
        _check(arguments)
        learner, path, batch = _start(arguments, say)
        _check_model(arguments, learner, path, batch, say)
        learner.temperature = batch.info.temperature
        if arguments.explain:
            _explain(arguments, learner, batch, say)
        else:
            _replay(arguments, methods, learner, path, batch, say)
    except (ValueError, OSError, FloatingPointError) as error:
        console.print(f"[bold red]Not replayed.[/] {escape(str(error))}", soft_wrap=True)
        return 2
    return 0


def read_methods(text: str) -> list[str]:
    """Names in their order, without repetition.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    names = list(METHODS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in METHODS:
            raise ValueError(f"--methods {name!r} is unknown; known are {', '.join(METHODS)}")
    return list(dict.fromkeys(names))


class _Say:
    """Prints lines to `console`."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def line(self, stage: str, text: str) -> None:
        self.console.print(f"[bold cyan]{stage:<9}[/] {escape(text)}", soft_wrap=True)

    def warning(self, text: str) -> None:
        self.console.print(f"[bold yellow]{'note':<9}[/] {escape(text)}", soft_wrap=True)


def _check(arguments: argparse.Namespace) -> None:
    for name, value, least in (
        ("--updates", arguments.updates, 1),
        ("--draws", arguments.draws, 1),
        ("--max-tokens", arguments.max_tokens, 2),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be {least} or above")
    if arguments.lr is not None and not 0 < arguments.lr < math.inf:
        raise ValueError(f"--lr is {arguments.lr}; it must be a finite number above 0")
    if arguments.sigma0 != "auto":
        try:
            sigma0 = float(arguments.sigma0)
        except ValueError:
            sigma0 = math.nan
        if not 0 <= sigma0 <= 1:
            raise ValueError(f"--sigma0 is {arguments.sigma0}; it must be auto or in [0, 1]")


def _start(arguments: argparse.Namespace, say: _Say) -> tuple["Learner", Path, "RecordedBatch"]:
    """The model and the batch. Torch and transformers, which take seconds to import, come after
    all that can be said of the files without a model."""
    from openrlhf_alp.replay.files.read import find_batches, read_batch

    infos = find_batches(arguments.path, arguments.step, say.line)
    if len(infos) == 1:
        [path] = infos
        batch = read_batch(path)
        return _learner(arguments, say), path, batch
    from openrlhf_alp.replay.pick import pick_batch

    learner = _learner(arguments, say)
    return learner, *pick_batch(infos, learner, say.line)


def _learner(arguments: argparse.Namespace, say: _Say) -> "Learner":
    import torch

    from openrlhf_alp.alp import PerturbationConfig
    from openrlhf_alp.replay.learner import DTYPES, Learner, load_model

    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # An explanation compares other dtypes with float32, and its learner has no noise.
    dtype = "float32" if arguments.explain else arguments.dtype
    say.line("model", f"{arguments.model} in {dtype} on {device}")
    model = load_model(arguments.model, dtype=DTYPES[dtype], device=device)
    if arguments.explain:
        return Learner(model)
    noise = PerturbationConfig(
        sigma0=None, layers=arguments.layers, draws=arguments.draws, seed=arguments.seed
    )
    return Learner(model, noise=noise)


def _check_model(
    arguments: argparse.Namespace, learner: "Learner", path: Path, batch: "RecordedBatch", say: _Say
) -> None:
    from openrlhf_alp.replay.files.read import require_model
    from openrlhf_alp.replay.learner import hash_of, load_tokenizer
    from openrlhf_alp.replay.pick import digest_of

    require_model(
        batch,
        path,
        vocab_size=learner.vocab_size,
        tokenizer_hash=hash_of(load_tokenizer(arguments.model)),
    )
    say.line(
        "batch",
        f"{path}: step {batch.info.step}, {len(batch.samples)} samples, "
        f"{batch.num_action_tokens} action tokens, recorded with {batch.info.method or 'unknown'}",
    )
    recorded, own = batch.info.model_digest, digest_of(learner, batch)
    if not recorded:
        say.warning("the file does not say which weights sampled it; the model is taken as given")
    elif recorded != own:
        say.warning(
            f"the model's digest is {own[:12]}, the batch was recorded at {recorded[:12]}: the "
            "ratios below include the difference of these weights. Give the weights before the "
            f"update of step {batch.info.step}"
        )


def _replay(
    arguments: argparse.Namespace,
    methods: list[str],
    learner: "Learner",
    path: Path,
    batch: "RecordedBatch",
    say: _Say,
) -> None:
    from openrlhf_alp.replay.bench.figures import write_figures
    from openrlhf_alp.replay.bench.results import Replay, known_results
    from openrlhf_alp.replay.bench.tables import method_tables
    from openrlhf_alp.replay.bench.update import Bench
    from openrlhf_alp.replay.pick import digest_of

    update = _update(arguments, batch)
    sigma0 = _start_sigma(arguments, methods, learner, batch, say)
    replay = Replay(
        batch=str(path),
        settings={
            "compared_with": methods[0],
            "model": arguments.model,
            "model_digest": digest_of(learner, batch),
            "recorded_digest": batch.info.model_digest,
            "dtype": arguments.dtype,
            **asdict(update),
            "sigma0": sigma0,
            "layers": arguments.layers,
            "draws": arguments.draws,
            "seed": arguments.seed,
        },
    )
    known = known_results(arguments.output, replay.key)
    if known:
        say.line("resumed", f"{len(known)} methods are in {arguments.output} already")
    with say.console.status("") as status:
        bench = Bench(learner, batch.samples, update, on_stage=status.update)
        for result in bench.run(methods, known):
            replay.results[result.method] = result
            replay.save(arguments.output)
            if result.method not in known and result.same_as is None:
                say.line("done", f"{result.method} in {result.seconds:.0f} s")
    say.console.print(*method_tables(replay.results.values()), sep="\n")
    pictures = write_figures(replay.results, arguments.output)
    files = [replay.save(arguments.output), *pictures]
    say.line("files", ", ".join(map(str, files)))


def _update(arguments: argparse.Namespace, batch: "RecordedBatch") -> "UpdateSettings":
    """The optimizer of the run, as far as the file knows it."""
    from openrlhf_alp.replay.bench.update import UpdateSettings

    run = batch.info.training
    recorded: dict[str, Any] = {}
    if run.get("adam_betas"):
        recorded["betas"] = tuple(run["adam_betas"])
    if run.get("max_norm"):
        recorded["max_norm"] = run["max_norm"]
    return UpdateSettings(
        learning_rate=arguments.lr or run.get("learning_rate") or 1e-6,
        updates=arguments.updates,
        max_tokens=arguments.max_tokens,
        **recorded,
    )


def _explain(
    arguments: argparse.Namespace, learner: "Learner", batch: "RecordedBatch", say: _Say
) -> None:
    with say.console.status("") as status:
        found = explain_model(
            batch,
            arguments.model,
            device=str(learner.device),
            learner=learner,
            on_stage=status.update,
        )
    show(found, say.console)
    arguments.output.mkdir(parents=True, exist_ok=True)
    path = arguments.output / "explain.json"
    path.write_text(json.dumps(explanation_json(found), indent=2) + "\n", encoding="utf-8")
    say.line("files", str(path))


def _start_sigma(
    arguments: argparse.Namespace,
    methods: list[str],
    learner: "Learner",
    batch: "RecordedBatch",
    say: _Say,
) -> float | None:
    """sigma0 of the perturbed methods; None when there is none."""
    if not any(METHODS[method].perturbed for method in methods):
        return None
    from openrlhf_alp.replay.bench.sigma import start_sigma

    given: Any = None if arguments.sigma0 == "auto" else float(arguments.sigma0)
    sigma0 = start_sigma(learner, batch.samples, arguments.max_tokens, given)
    say.line(
        "sigma0", f"{sigma0:.3g} of the median |h| of each layer, in layers {arguments.layers}"
    )
    return sigma0
