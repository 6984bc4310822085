"""DeepSpeed strategy that attaches the perturbation, keeps it out of exports, and runs on CPUs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from openrlhf.models import Actor
from openrlhf.utils.deepspeed import DeepspeedStrategy
from torch import nn

from openrlhf_alp.alp import (
    LayerwisePerturbation,
    attach,
    detached,
    find_decoder,
    find_output_layer,
)
from openrlhf_alp.learner import compat
from openrlhf_alp.learner.flags.config import AlpConfig

METHOD_STATE = "alp_method"
"""Key in a checkpoint's client states: the method that trained it."""


def perturbation_of(model: nn.Module) -> LayerwisePerturbation | None:
    """The perturbation of an OpenRLHF Actor, a DeepSpeed engine or a bare model, if any."""
    return getattr(unwrap(model), "alp", None)


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside OpenRLHF's Actor and DeepSpeed's engine."""
    if isinstance(model, Actor):
        model = model.model
    return getattr(model, "module", model)


class AlpStrategy(DeepspeedStrategy):
    """Upstream: `openrlhf.utils.deepspeed.DeepspeedStrategy`; attached through `get_strategy`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not torch.cuda.is_available() and "flash" in self.args.ds.attn_implementation:
            # OpenRLHF's default and its packing both ask for flash-attn, which is CUDA only.
            self.args.ds.attn_implementation = "sdpa"

    @property
    def alp(self) -> AlpConfig:
        return self.args.alp

    def setup_distributed(self, timeout: timedelta = timedelta(minutes=60)) -> None:
        if not torch.cuda.is_available():
            compat.disable_shm_collectives()
        compat.allow_float32()
        super().setup_distributed(timeout)

    def prepare(self, *models: Any) -> Any:
        """Attach sigma to the policy before DeepSpeed partitions its parameters.

        Only a trained `Actor` gets it: the critic is no Actor, reference and EMA models come
        without an optimizer config.
        """
        for entry in models:
            if self.alp.perturbed and isinstance(entry, tuple) and isinstance(entry[0], Actor):
                model = entry[0].model
                # DeepSpeed wants one dtype. It casts the parameters itself, but under ZeRO-3 only
                # those that it partitioned while the model was loaded, and sigma came later.
                perturbation = attach(model, self.alp.noise).to(model.dtype)
                # Without a learning rate no gradient is computed, reduced or stored.
                perturbation.requires_grad_(self.alp.lr > 0)
        prepared = super().prepare(*models)
        for entry in models:
            if isinstance(entry, tuple) and isinstance(entry[0], Actor):
                self._fetch_sigma_where_it_is_read(entry[0])
        return prepared

    def _fetch_sigma_where_it_is_read(self, actor: Actor) -> None:
        """Tell ZeRO-3 that decoder and output layer read the deltas, which are another module's.

        Otherwise DeepSpeed notices it in the first perturbed pass, and refuses when a clean pass,
        such as a calibration's, has already fixed the order in which it fetches parameters.
        """
        perturbation = perturbation_of(actor)
        if perturbation is None or self.stage != 3:
            return
        model = unwrap(actor)
        decoder = find_decoder(model)
        for layer in perturbation.layers:
            reader = decoder if layer < len(decoder.layers) else find_output_layer(model)
            deepspeed.zero.register_external_parameter(reader, perturbation.delta[str(layer)])

    def _get_model_parameters(self, model: nn.Module, **kwargs: Any) -> tuple[nn.Module, Any]:
        raw_model, groups = super()._get_model_parameters(model, **kwargs)
        perturbation = perturbation_of(raw_model)
        if perturbation is None:
            return raw_model, groups
        # A group of its own, because sigma has another learning rate and no weight decay.
        deltas = [delta for delta in perturbation.parameters() if delta.requires_grad]
        if not deltas:
            return raw_model, groups
        ours = {id(delta) for delta in deltas}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in ours]
        groups.append({"params": deltas, "lr": self.alp.lr, "weight_decay": 0.0})
        return raw_model, groups

    def get_ds_train_config(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        config = super().get_ds_train_config(*args, **kwargs)
        optimizer = config.get("optimizer")
        if not torch.cuda.is_available() and optimizer and optimizer.get("type") == "AdamW":
            # DeepSpeed's CPU Adam is compiled on first use; torch's own needs no compiler.
            optimizer["params"]["torch_adam"] = True
        return config

    def load_ckpt(
        self, model: nn.Module, load_dir: str, tag: str | None = None, **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Load a checkpoint; one of a run without sigma gives the weights, and sigma starts anew.

        Raises:
            ValueError: the checkpoint has a sigma and the run has none, or under ZeRO-3 the other
                way round; or it is of another method, and --alp.change_method is not given.
        """
        path, states = self._load_ckpt(model, load_dir, tag, **options)
        self._require_same_method(load_dir, states)
        return path, states

    def _require_same_method(self, load_dir: str, states: dict[str, Any]) -> None:
        """Only of checkpoints that say it: older ones and the critic's do not."""
        stored = states.get(METHOD_STATE, method_of(self.alp))
        if stored == method_of(self.alp):
            return
        if not self.alp.change_method:
            raise ValueError(
                f"the checkpoint in {load_dir} was trained with --alp.method {stored}, and this "
                f"run has {method_of(self.alp)}. Set --alp.method {stored}, or --alp.change_method "
                "to continue it with another method."
            )
        self.print(f"Continuing a checkpoint of --alp.method {stored} as {method_of(self.alp)}.")

    def _load_ckpt(
        self, model: nn.Module, load_dir: str, tag: str | None, **options: Any
    ) -> tuple[Any, dict[str, Any]]:
        stored = _has_sigma(Path(load_dir), tag)
        wanted = perturbation_of(model) is not None
        if stored is None or stored == wanted:
            return super().load_ckpt(model, load_dir, tag, **options)
        export = "export that checkpoint's model and start from it (--actor.model_name_or_path)"
        if stored:
            raise ValueError(
                f"the checkpoint in {load_dir} is of a run with --alp.method *-alp, and this run "
                f"has no sigma. Use that method, or {export}."
            )
        if self.stage == 3:
            raise ValueError(
                f"the checkpoint in {load_dir} is of a run without sigma. Under --ds.zero_stage 3 "
                f"its weights are in the optimizer's partitions, which sigma changes: {export}."
            )
        self.print(
            f"The checkpoint in {load_dir} is of a run without sigma. Its weights are loaded; "
            "sigma and the moments of Adam start anew."
        )
        options |= {"load_module_strict": False, "load_optimizer_states": False}
        # The stored schedule knows no learning rate for sigma, so a new one catches up instead.
        options["load_lr_scheduler_states"] = False
        loaded = super().load_ckpt(model, load_dir, tag, **options)
        for _ in range(model.global_steps):
            model.lr_scheduler.step()
        return loaded

    def moving_average(
        self, model: nn.Module, model_ema: nn.Module, beta: float = 0.992, device: str = "cpu"
    ) -> None:
        # Upstream walks both parameter lists in pairs, and the EMA copy has no sigma.
        with without_sigma(model):
            device = device if torch.cuda.is_available() else "cpu"
            super().moving_average(model, model_ema, beta, device)

    def save_model(self, model: nn.Module, tokenizer: Any, output_dir: str, **kwargs: Any) -> None:
        """Export a clean Hugging Face folder: sigma belongs to training, not to the policy."""
        with without_sigma(model):
            super().save_model(model, tokenizer, output_dir, **kwargs)


def method_of(alp: AlpConfig) -> str:
    """`--alp.method`, or `off` when OpenRLHF's own loss trains."""
    return str(alp.method) if alp.enable else "off"


def _has_sigma(folder: Path, tag: str | None) -> bool | None:
    """Whether a DeepSpeed checkpoint holds a perturbation; None when there is no checkpoint."""
    latest = folder / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text().strip()
    files = sorted((folder / tag).glob("*_model_states.pt")) if tag else []
    if not files:
        return None
    # Mapped, so that only the names are read and not gigabytes of weights. It is a file of the
    # user's own run, and DeepSpeed is about to unpickle all of it.
    states = torch.load(files[0], map_location="cpu", mmap=True, weights_only=False)
    return any(name.startswith("alp.") for name in states["module"])


def without_sigma(model: nn.Module) -> AbstractContextManager[None]:
    """Hide sigma from everything that walks the model's modules (export, weight push, EMA)."""
    return nullcontext() if perturbation_of(model) is None else detached(unwrap(model))
