"""The same update from the same weights with every method.

    log p_t before, shared --policy_loss--> c_t = d loss / d log p_t --backward--> gradient
                                                                                     | AdamW
    log p_t after, tails, KL <----------------- updated weights <--------------------+

A loss sees the model through its log-probs alone, so c_t decides a method's gradient. It is found
on the batch as a whole, without the model; one backward pass of sum_t c_t log p_t then gives the
gradient. Methods with the same c_t make the same update, which is computed once. Over the old
policy the first update's ratio is exactly 1, so several presets often share one.

The old policy is the clean model before the update.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openrlhf_alp.objective.loss import LossOutput, policy_loss
from openrlhf_alp.objective.methods import METHODS
from openrlhf_alp.objective.ratio import k3_kl, token_log_ratio
from openrlhf_alp.objective.telemetry import ratio_figures
from openrlhf_alp.replay.bench.memory import peak_bytes, reset_peak
from openrlhf_alp.replay.files.records import RecordedSample
from openrlhf_alp.replay.learner import Learner
from openrlhf_alp.replay.tensors import BatchTensors, MicroBatch, batch_tensors, micro_batches

_SAME = 1e-9
"""Largest difference of two methods' c_t, in relation to the largest c_t, that is rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateSettings:
    """One update, the same for every method."""

    learning_rate: float
    updates: int = 1
    """Optimizer steps: the batch is cut into as many parts, as `--train.batch_size` does."""
    betas: tuple[float, float] = (0.9, 0.95)
    max_norm: float = 1.0
    """The gradient's norm is cut to it."""
    max_tokens: int = 1024
    """Tokens of a micro-batch, with padding and all draws of the noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodResult:
    """What one method did with the batch. Log-ratios are learner over rollout, per token."""

    method: str
    same_as: str | None
    """An earlier method that makes the very same update; its figures after it are this one's."""
    loss: float
    """Of the whole batch before the update."""
    gradient_norm: float
    """Of the first update, before it is cut to `max_norm`."""
    cosine: float
    """Of that gradient with the first method's; NaN when one of them is 0."""
    cuts: dict[str, float]
    """Shares of action tokens by cut: clip, dual clip, mask, guard; before the update."""
    before: dict[str, float]
    """`ratio_figures` of the method's own numerator, noisy for ALP, before the update."""
    after: dict[str, float]
    """The same after it."""
    clean_after: dict[str, float]
    """The same of the clean learner after it."""
    kl_after: float
    """k3 KL(rollout || clean learner) after it, nats per token."""
    seconds: float
    """Of its updates and the passes after them; 0 when they are another method's."""
    peak_bytes: int
    """Largest memory of the process meanwhile; on a GPU of the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Numerators:
    """Log-probs (B, A) before the update."""

    clean: Tensor
    noisy: Tensor | None

    def of(self, method: str) -> Tensor:
        found = self.noisy if METHODS[method].perturbed else self.clean
        assert found is not None, "a perturbed method without a noisy pass"
        return found


class Bench:
    """One batch, one model, and the updates of all methods from the same weights.

    Args:
        learner: with a perturbation whose sigma is set, if a method needs it.
        samples: the batch.
        settings: of the update.
        on_stage: called with a line for each pass that begins.
    """

    def __init__(
        self,
        learner: Learner,
        samples: Sequence[RecordedSample],
        settings: UpdateSettings,
        on_stage: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.learner = learner
        self.settings = settings
        self.batch = batch_tensors(samples)
        self._on_stage = on_stage
        max_tokens = settings.max_tokens // learner.draws
        self._all = micro_batches(samples, max_tokens)
        self._parts = [
            (rows, micro_batches(samples, max_tokens, rows))
            for rows in _parts(len(samples), settings.updates)
        ]
        self._kept = {name: w.detach().clone() for name, w in learner.weights().items()}
        self._first: list[Tensor] | None = None

    def run(
        self, methods: Sequence[str], known: Mapping[str, MethodResult] | None = None
    ) -> Iterator[MethodResult]:
        """Replay the methods in their order; a result comes as soon as it is there.

        Args:
            known: results of an interrupted replay of the same batch, weights and settings; they
                are not computed again.

        Raises:
            ValueError: the batch has no action token.
        """
        if not self.batch.action_mask.any():
            raise ValueError("no sample of the batch has an action token; nothing can be replayed")
        known = known or {}
        numerators = self._score_before(methods)
        done: list[tuple[str, Tensor, MethodResult]] = []
        for method in methods:
            coefficients, figures = self._look(method, numerators)
            twin = self._twin(method, coefficients, done)
            if method in known:
                result = known[method]
                if method == methods[0] and not set(methods) <= set(known):
                    self._keep_first_gradient(method, numerators, coefficients)
            elif twin is None:
                result = self._update(method, numerators, coefficients, figures)
            else:
                result = _shared(method, twin, figures)
            done.append((method, coefficients, result))
            yield result

    def _score_before(self, methods: Sequence[str]) -> _Numerators:
        self._on_stage("log-probs of the clean learner")
        shape = self.batch.action_mask.shape
        clean = self.learner.score(self._all, shape)
        noisy = None
        if any(METHODS[method].perturbed for method in methods):
            self._on_stage("log-probs of the perturbed learner")
            noisy = self.learner.score(self._all, shape, noisy=True)
        return _Numerators(clean=clean, noisy=noisy)

    def _look(self, method: str, numerators: _Numerators) -> tuple[Tensor, dict[str, Any]]:
        """c_t (B, A) of the whole batch, and what is known before the update."""
        numerator = numerators.of(method)
        coefficients, output = _coefficients(method, numerator, numerators.clean, self.batch)
        return coefficients, {
            "loss": output.loss.item(),
            "cuts": {name: getattr(output, name) for name in output.cuts},
            "before": self._figures(numerator),
        }

    def _twin(
        self, method: str, coefficients: Tensor, done: list[tuple[str, Tensor, MethodResult]]
    ) -> MethodResult | None:
        """An earlier result of the same update. Later updates of a method can part ways."""
        if self.settings.updates > 1:
            return None
        scale = coefficients.abs().max().item()
        for other, theirs, result in done:
            same_pass = METHODS[other].perturbed == METHODS[method].perturbed
            if same_pass and (theirs - coefficients).abs().max().item() <= _SAME * scale:
                return result
        return None

    def _update(
        self, method: str, numerators: _Numerators, coefficients: Tensor, figures: dict[str, Any]
    ) -> MethodResult:
        started_s = time.monotonic()
        reset_peak(self.learner.device)
        weights = self._restore()
        noisy = METHODS[method].perturbed
        optimizer = torch.optim.AdamW(
            weights, lr=self.settings.learning_rate, betas=self.settings.betas, weight_decay=0.0
        )
        norm = cosine = 0.0
        for number, (rows, batches) in enumerate(self._parts):
            self._on_stage(f"{method}: update {number + 1} of {len(self._parts)}")
            part = coefficients
            if len(self._parts) > 1:
                part = self._part_coefficients(method, numerators, rows, batches, number)
            optimizer.zero_grad(set_to_none=True)
            self._backward(batches, part, noisy=noisy)
            if number == 0:
                cosine = self._cosine(weights)
            found = torch.nn.utils.clip_grad_norm_(weights, self.settings.max_norm).item()
            norm = found if number == 0 else norm
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del optimizer
        after = self._after(method)
        return MethodResult(
            method=method,
            same_as=None,
            gradient_norm=norm,
            cosine=cosine,
            seconds=time.monotonic() - started_s,
            peak_bytes=peak_bytes(self.learner.device),
            **figures,
            **after,
        )

    def _keep_first_gradient(
        self, method: str, numerators: _Numerators, coefficients: Tensor
    ) -> None:
        """For the cosines of other methods, when this one's result is known already."""
        self._on_stage(f"{method}: its gradient again, for the cosines")
        weights = self._restore()
        rows, batches = self._parts[0]
        if len(self._parts) > 1:
            coefficients = self._part_coefficients(method, numerators, rows, batches, 0)
        self._backward(batches, coefficients, noisy=METHODS[method].perturbed)
        self._cosine(weights)

    def _part_coefficients(
        self,
        method: str,
        numerators: _Numerators,
        rows: Sequence[int],
        batches: Sequence[MicroBatch],
        number: int,
    ) -> Tensor:
        """c_t (B, A) of one part at the weights of now; 0 in other rows."""
        numerator = numerators.of(method)
        if number:
            shape = self.batch.action_mask.shape
            numerator = self.learner.score(batches, shape, noisy=METHODS[method].perturbed)
        index = list(rows)
        found = torch.zeros_like(numerators.clean)
        found[index], _ = _coefficients(
            method, numerator[index], numerators.clean[index], self.batch.rows(rows)
        )
        return found

    def _backward(
        self, batches: Sequence[MicroBatch], coefficients: Tensor, *, noisy: bool
    ) -> None:
        for batch in batches:
            columns = batch.action_mask.shape[1]
            part = coefficients[list(batch.rows), :columns].to(self.learner.device)
            if not part.any():
                continue  # nothing of it moves a weight
            with self.learner.perturbed(batch) if noisy else nullcontext():
                (self.learner.log_probs(batch) * part).sum().backward()

    def _cosine(self, weights: Sequence[Tensor]) -> float:
        """Of the gradient with the first method's, which is kept."""
        gradient = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        if self._first is None:
            self._first = [part.clone() for part in gradient]
        dot, own, first = (
            sum((a.double() * b.double()).sum().item() for a, b in zip(x, y, strict=True))
            for x, y in (
                (gradient, self._first),
                (gradient, gradient),
                (self._first, self._first),
            )
        )
        return dot / (own * first) ** 0.5 if own > 0 and first > 0 else float("nan")

    def _after(self, method: str) -> dict[str, Any]:
        shape = self.batch.action_mask.shape
        self._on_stage(f"{method}: log-probs after the update")
        clean = self.learner.score(self._all, shape)
        numerator = clean
        if METHODS[method].perturbed:
            numerator = self.learner.score(self._all, shape, noisy=True)
        return {
            "after": self._figures(numerator),
            "clean_after": self._figures(clean),
            "kl_after": k3_kl(clean, self.batch.rollout_log_probs, self.batch.action_mask),
        }

    def _figures(self, log_probs: Tensor) -> dict[str, float]:
        mask, rollout = self.batch.action_mask, self.batch.rollout_log_probs
        return ratio_figures(token_log_ratio(log_probs, rollout, mask), mask, rollout)

    @torch.no_grad()
    def _restore(self) -> list[Tensor]:
        weights = self.learner.weights()
        for name, weight in weights.items():
            weight.copy_(self._kept[name])
            weight.grad = None
        return list(weights.values())


def _coefficients(
    method: str, numerator: Tensor, clean: Tensor, batch: BatchTensors
) -> tuple[Tensor, LossOutput]:
    """c_t = d loss / d log p_t, (B, A), and the loss's output."""
    leaf = numerator.clone().requires_grad_()
    objective = METHODS[method].objective
    output = policy_loss(
        log_probs=leaf,
        rollout_log_probs=batch.rollout_log_probs,
        advantages=batch.advantages,
        action_mask=batch.action_mask,
        config=objective,
        old_log_probs=clean if objective.needs_old_policy else None,
    )
    [coefficients] = torch.autograd.grad(output.loss, leaf)
    return coefficients, output


def _shared(method: str, twin: MethodResult, figures: dict[str, Any]) -> MethodResult:
    return MethodResult(
        method=method,
        same_as=twin.same_as or twin.method,
        gradient_norm=twin.gradient_norm,
        cosine=twin.cosine,
        after=twin.after,
        clean_after=twin.clean_after,
        kl_after=twin.kl_after,
        seconds=0.0,
        peak_bytes=twin.peak_bytes,
        **figures,
    )


def _parts(num_samples: int, updates: int) -> list[range]:
    """Consecutive rows of each update, as equal as can be."""
    edges = [num_samples * i // updates for i in range(updates + 1)]
    return [range(start, end) for start, end in itertools.pairwise(edges)]
