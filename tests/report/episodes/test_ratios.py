from pathlib import Path

import numpy as np
import pytest
from made_batches import sample

from openrlhf_alp.replay.files.checks import BatchFileError
from openrlhf_alp.replay.files.records import RecordedBatch
from openrlhf_alp.report.episodes.ratios import measure_ratios


def test_clean_ratios_are_the_learners_log_prob_minus_the_engines(recorded, model_folder):
    """The engine was the same model in bfloat16: its rounding is small and not 0."""
    ratios = measure_ratios(recorded, Path("b"), str(model_folder), sigma0=1e-6)
    for row, clean, noise in zip(recorded.samples, ratios.clean, ratios.noise, strict=True):
        assert np.isfinite(clean[row.action_mask]).all()
        assert np.isnan(clean[~row.action_mask]).all()
        assert np.abs(clean[row.action_mask]).max() < 0.5
        # So weak a noise changes next to nothing.
        assert np.abs(noise[row.action_mask]).max() < 1e-3
    assert max(np.nanmax(np.abs(clean)) for clean in ratios.clean) > 0


def test_noise_moves_the_tokens_and_the_page_says_how_it_was_drawn(recorded, model_folder):
    ratios = measure_ratios(recorded, Path("b"), str(model_folder), sigma0=0.1)
    again = measure_ratios(recorded, Path("b"), str(model_folder), sigma0=0.1)
    assert max(np.nanmax(np.abs(noise)) for noise in ratios.noise) > 0.01
    np.testing.assert_array_equal(ratios.noise[0], again.noise[0])
    assert "sigma 0.1 of each layer's |h|" in ratios.notes[1]


def test_a_model_that_cannot_have_sampled_the_batch_is_refused(recorded, model_folder):
    ids = np.array([5, 6, 999], dtype=np.int32)
    other = sample(
        token_ids=ids,
        rollout_log_probs=np.array([0, 0, -1], dtype=np.float32),
        action_ranges=((2, 3),),
        advantages=np.zeros(3, dtype=np.float32),
        turns=(),
        spans=(),
    )
    bad = RecordedBatch(info=recorded.info, samples=(other,))
    with pytest.raises(BatchFileError, match="999"):
        measure_ratios(bad, Path("b"), str(model_folder))
