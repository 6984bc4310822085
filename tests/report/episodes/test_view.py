import math

import numpy as np
import pytest
from made_batches import batch, sample

from openrlhf_alp.report.episodes.ratios import Ratios
from openrlhf_alp.report.episodes.texts import local_vocabulary, token_texts
from openrlhf_alp.report.episodes.view import (
    NOTHING,
    UNIT,
    columns_of,
    group_rows,
    mode_rows,
    packed_columns,
    sample_rows,
)


def test_without_a_model_only_surprise_is_shown_and_only_at_actions():
    [column] = columns_of(batch(), None)["surprise"]
    assert column[2:4].tolist() == [0.5, 1.25] and column[5] == 2.0
    assert np.isnan(column[[0, 1, 4]]).all()


def test_total_is_clean_plus_noise():
    clean = np.array([math.nan, 0.25, -1.0], dtype=np.float32)
    noise = np.array([math.nan, 0.5, 0.25], dtype=np.float32)
    made = batch(
        sample(
            token_ids=np.array([1, 2, 3], dtype=np.int32),
            rollout_log_probs=np.array([0, -1, -1], dtype=np.float32),
            action_ranges=((1, 3),),
            advantages=np.zeros(3, dtype=np.float32),
        )
    )
    columns = columns_of(made, Ratios(clean=[clean], noise=[noise], notes=[]))
    assert list(columns) == ["total", "clean", "noise", "surprise"]
    assert columns["total"][0][1:].tolist() == [0.75, -0.75]


def test_numbers_travel_in_thousandths_and_end_at_the_largest():
    column = np.array([math.nan, 0.1234, -50.0], dtype=np.float32)
    values = np.frombuffer(packed_columns({"clean": [column]}), dtype="<i2")
    assert values.tolist() == [NOTHING, 123, -32767] and UNIT == 1000


def test_the_worst_tokens_come_first_and_giants_do_not_set_the_scale():
    column = np.full(1000, 0.1, dtype=np.float32)
    column[[3, 500]] = [-20.0, 30.0]
    column[0] = math.nan
    [mode] = mode_rows({"clean": [column]})
    assert mode["worst"][:2] == [500, 3] and 0 not in mode["worst"]
    assert mode["scale"] == pytest.approx(0.1)


def test_an_impossible_token_is_the_worst_and_sets_no_scale():
    column = np.array([0.1, -math.inf, 0.1, math.nan], dtype=np.float32)
    [mode] = mode_rows({"clean": [column]})
    assert mode["worst"][0] == 1 and mode["scale"] == pytest.approx(0.1)
    values = np.frombuffer(packed_columns({"clean": [column]}), dtype="<i2")
    assert values.tolist() == [100, -32767, 100, NOTHING]


def test_samples_of_a_prompt_stand_together():
    rows = group_rows([sample(0), sample(1), sample(2), sample(3, group="")])
    assert [(row["name"], row["samples"]) for row in rows] == [
        ("group 0", [0, 1]),
        ("group 1", [2]),
        ("sample 3", [3]),
    ]


def test_a_sample_has_its_turns_spans_tools_and_reward():
    first, second = sample_rows(batch(sample(0), sample(1, reward=math.nan, turns=())))
    assert (first["start"], second["start"], first["size"]) == (0, 6, 6)
    assert first["spans"] == [[3, "a" * 12, 2, 4], [4, "b" * 12, 5, 6]]
    assert first["turns"] == [[0, 0, 2, 0], [1, 2, 4, 0], [2, 4, 5, 0], [1, 5, 6, 0]]
    assert first["tools"][0]["code"] == "print(2 + 2)" and first["advantage"] == 1.0
    # Without turns they follow from what was trained on; a reward that is no number is none.
    assert second["turns"] == first["turns"] and second["reward"] is None


def test_tokens_are_places_in_the_batchs_own_vocabulary(words):
    ids, places = local_vocabulary([sample(0), sample(1)])
    assert ids == [5, 6, 7, 8, 9, 10] and places[:6].tolist() == [0, 1, 2, 3, 4, 5]
    assert token_texts([5, 7], words) == ["w5", "w7"]
    assert token_texts([5, 7], None) == ["<5>", "<7>"]
