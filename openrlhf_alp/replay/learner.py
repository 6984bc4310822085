"""The learner of a replay: a Hugging Face model on one device, clean or with its noise.

Letters: B samples, A predictions of the longest; b, a of a micro-batch; K action columns; V words.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from openrlhf_alp.alp import (
    LayerwisePerturbation,
    PerturbationConfig,
    attach,
    detached,
    find_decoder_layers,
    log_mean_exp_over_draws,
    repeat_rows,
)
from openrlhf_alp.replay.tensors import MicroBatch
from services.rollout.wire.fingerprint import (
    chat_template_hash,
    tokenizer_hash,
    weights_digest,
)
from services.rollout.wire.tensors import digest_tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Learner:
    """Log-probs of recorded tokens under a model, and its weights' digest.

    Args:
        model: a causal LM in evaluation mode.
        temperature: divides the logits, as it did when the tokens were sampled.
        noise: settings of the perturbation; None for a model that is never perturbed.
    """

    def __init__(
        self, model: nn.Module, *, temperature: float = 1.0, noise: PerturbationConfig | None = None
    ) -> None:
        self.model = model.eval()
        self.temperature = temperature
        self.perturbation: LayerwisePerturbation | None = None
        if noise is not None:
            self.perturbation = attach(model, noise)
            # One update does not learn sigma: every method gets the same noise.
            self.perturbation.requires_grad_(False)
        self._digests: dict[torch.dtype, str] = {}
        self._copies = 1  # of each sample in a forward pass: its draws while it is perturbed
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        if self.perturbation and len(find_decoder_layers(model)) in self.perturbation.layers:
            # Noise on the logits is keyed by position: the head has to run on all of them.
            self._keeps = False

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def draws(self) -> int:
        """Draws of the noise, which go through the model together; 1 without noise."""
        return 1 if self.perturbation is None else self.perturbation.draws

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.model.get_input_embeddings().weight.shape[0]

    def weights(self) -> dict[str, nn.Parameter]:
        """theta by name, without sigma."""
        with detached(self.model) if self.perturbation is not None else nullcontext():
            return dict(self.model.named_parameters())

    @torch.no_grad()
    def digests(self) -> dict[torch.dtype, str]:
        """The digest that a rollout service gives these weights, for each dtype it may hold them
        in. Of the weights as loaded: the first call computes them."""
        if not self._digests:
            self._digests = {
                dtype: weights_digest(
                    {
                        name: digest_tensor(weight.to("cpu", dtype).contiguous())
                        for name, weight in self.weights().items()
                    }
                )
                for dtype in DTYPES.values()
            }
        return self._digests

    def log_probs(self, batch: MicroBatch) -> Tensor:
        """(b, a) float32 log-prob of each action, 0.0 elsewhere; with gradient if it is enabled.

        Within `perturbed`, with several draws of the noise, the log of their mean probability.
        """
        batch = batch.to(self.device)
        columns = batch.action_mask.any(0).nonzero().squeeze(-1)
        result = torch.zeros(batch.action_mask.shape, device=self.device)
        if columns.numel() == 0:
            return result
        targets = repeat_rows(batch.token_ids[:, 1:][:, columns], self._copies)
        chosen = torch.log_softmax(self._logits(batch, columns), -1)
        drawn = chosen.gather(-1, targets[..., None]).squeeze(-1)
        picked = log_mean_exp_over_draws(drawn, self._copies)
        picked = torch.where(batch.action_mask[:, columns], picked, 0.0)
        return result.index_copy(1, columns, picked)

    def score(
        self, batches: Sequence[MicroBatch], shape: torch.Size, *, noisy: bool = False
    ) -> Tensor:
        """(B, A) float32 log-probs on the CPU, without gradient.

        Args:
            batches: whose samples are scored; the rows of others stay 0.0.
            shape: (B, A) of the whole batch.
            noisy: with the noise of `perturbed`.
        """
        found = torch.zeros(shape)
        for batch in batches:
            with torch.no_grad(), self.perturbed(batch) if noisy else nullcontext():
                log_probs = self.log_probs(batch)
            found[list(batch.rows), : log_probs.shape[1]] = log_probs.cpu()
        return found

    @contextmanager
    def perturbed(self, batch: MicroBatch) -> Iterator[None]:
        """Noise for this micro-batch, the same at every call."""
        assert self.perturbation is not None, "the learner was built without noise"
        batch = batch.to(self.device)
        with self.perturbation.enabled(
            update=0, sample_ids=batch.sample_ids, attention_mask=batch.attention_mask
        ):
            self._copies = self.draws
            try:
                yield
            finally:
                self._copies = 1

    def _logits(self, batch: MicroBatch, columns: Tensor) -> Tensor:
        """(b, K, V) float32, or draws * b rows of them. The head runs on action columns only where
        the model can do that."""
        ids, mask = (repeat_rows(t, self._copies) for t in (batch.token_ids, batch.attention_mask))
        options: dict[str, Any] = {"logits_to_keep": columns} if self._keeps else {}
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
        if logits.shape[1] != columns.numel():
            logits = logits[:, columns]
        return logits.float() / self.temperature


def load_model(
    path: str, *, dtype: torch.dtype, device: str = "cpu", attention: str | None = None
) -> nn.Module:
    """A causal LM from a folder or id.

    Raises:
        ValueError: it cannot be loaded; says what transformers says.
    """
    options: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        cause = str(error).splitlines()[0]
        raise ValueError(f"--model {path} cannot be loaded as a causal LM: {cause}") from error
    return model.to(device)


def load_tokenizer(path: str) -> Any:
    """The tokenizer of a model folder or id, or None when it has none."""
    if Path(path).is_dir() and not any(Path(path).glob("tokenizer*")):
        return None
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError):
        return None


def hash_of(tokenizer: Any) -> str | None:
    """What the rollout service's contract calls `tokenizer_hash`; None without a tokenizer."""
    return None if tokenizer is None else tokenizer_hash(tokenizer)


def hash_of_template(tokenizer: Any) -> str:
    """What the contract calls `chat_template_hash`; empty without a tokenizer."""
    return "" if tokenizer is None else chat_template_hash(tokenizer)
