"""The preflight repeated in training, through OpenRLHF's own actor on one CPU rank.

The asynchronous way, which asks the service, is in test_train_e2e.py.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from openrlhf_alp.learner.mismatch.measure import METRICS

Parse = Callable[..., SimpleNamespace]
pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("ignore")]

EVERY_2 = ("--alp.enable", "--alp.sigma0", "0.01", "--rollout.preflight_every", "2")


def test_every_second_step_reports_the_mismatch_of_its_own_samples(
    parse: Parse, actors: Any
) -> None:
    actor = actors.build_actor(parse(*EVERY_2))
    statuses = [actors.update(actor, mismatch=0.03, num_samples=8, seed=s) for s in range(3)]
    assert [METRICS.keys() <= status.keys() for status in statuses] == [True, False, True]
    first = statuses[0]
    # Eight sequences of 7 action tokens, three of which are padding.
    assert first["preflight/num_tokens"] == 8 * 7 - 3
    # The noise of sigma 0.01 is in the update's ratio, and not in the clean one.
    assert first["preflight/std"] == pytest.approx(0.03, rel=0.4)
    assert first["preflight/k3_kl"] == pytest.approx(first["preflight/std"] ** 2 / 2, rel=0.2)
    assert first["preflight/verdict"] == 0.0


def test_a_broken_mismatch_is_a_warning_with_its_causes_and_training_goes_on(
    parse: Parse, actors: Any, caplog: pytest.LogCaptureFixture
) -> None:
    actor = actors.build_actor(parse(*EVERY_2))
    with caplog.at_level(logging.WARNING):
        status = actors.update(actor, mismatch=1.0)
    assert status["preflight/verdict"] == 2.0
    assert actor.trainer.update_number == 1
    [message] = [r.message for r in caplog.records if r.message.startswith("preflight: broken")]
    assert "k3_kl" in message and "the service holds other weights" in message


def test_on_request_a_broken_mismatch_ends_the_run_before_the_update(
    parse: Parse, actors: Any
) -> None:
    actor = actors.build_actor(parse(*EVERY_2, "--rollout.preflight_stop"))
    with pytest.raises(RuntimeError, match="preflight: broken"):
        actors.update(actor, mismatch=1.0)
    assert actor.trainer.update_number == 0
