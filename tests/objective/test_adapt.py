"""A preset with what flags change of it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from openrlhf_alp.objective.adapt import adapted
from openrlhf_alp.objective.config import Correction, TrustRegion
from openrlhf_alp.objective.methods import DEFAULT_METHOD, METHODS


def change(method, **flags):
    return adapted(METHODS[method].objective, method=method, **flags)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_without_a_flag_a_preset_is_itself(method):
    assert change(method) == METHODS[method].objective


def test_each_flag_changes_its_field_and_no_other():
    base = METHODS["seq-mis"].objective
    changed = change("seq-mis", clip_low_high=(0.1, 0.2), correction_low_high=(0.5, 2.0))
    assert (changed.clip_low, changed.clip_high) == (0.1, 0.2)
    assert (changed.correction.low, changed.correction.high) == (0.5, 2.0)
    assert changed.correction.unit == base.correction.unit and changed.level == base.level
    assert change("dppo-kl", trust_region=0.2).trust_region.threshold == 0.2


@pytest.mark.parametrize(
    ("method", "flags", "reason"),
    [
        ("grpo", {"correction_low_high": (0.0, 2.0)}, "it has no correction"),
        ("tis", {"trust_region": 0.1}, "it has no trust region"),
        ("dppo-tv", {"clip_low_high": (0.2, 0.2)}, "it has no clip window"),
        ("dppo-tv", {"dual_clip": 3.0}, "it has no clipped surrogate"),
        ("cispo", {"dual_clip": 3.0}, "it has no clipped surrogate"),
        ("tis", {"correction_low_high": (2.0, 1.0)}, "0 <= low < high"),
        ("icepop", {"correction_low_high": (0.5, float("inf"))}, "a finite high"),
        ("dppo-tv", {"trust_region": 0.0}, "--alp.trust_region is 0"),
        ("cispo", {"clip_low_high": (0.2, float("inf"))}, "--alp.clip_low_high"),
    ],
)
def test_a_flag_without_effect_or_out_of_range_is_refused(method, flags, reason):
    with pytest.raises(ValueError, match=reason):
        change(method, **flags)


def test_a_geometric_mean_is_averaged_over_sequences():
    joined = change("seq-bypass", sequence_ratio="geometric", clip_low_high=(1e-3, 1e-3))
    assert (joined.level, joined.aggregation) == ("geometric", "seq-mean-token-mean")


def test_corrections_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="mode='mask'"):
        Correction(mode="truncate", unit="max-token", low=0, high=1, weight="unit")
    with pytest.raises(ValueError, match="weight='none'"):
        Correction(mode="mask", unit="max-token", low=0, high=1, weight="unit")
    with pytest.raises(ValueError, match="above 0"):
        TrustRegion(divergence="tv", threshold=-1)


def test_methods_of_one_level_share_window_dual_clip_and_aggregation():
    """What a method's own paper does not decide is the same for all."""
    for level in ("token", "sequence", "geometric"):
        shared = {
            (o.clip_high, o.dual_clip, o.aggregation)
            for o in (preset.objective for preset in METHODS.values())
            if o.level == level and o.clip == "ppo"
        }
        assert len(shared) == 1
    assert METHODS["cispo"].objective.clip_high == METHODS["grpo"].objective.clip_high


def test_the_default_method_is_the_papers():
    assert METHODS[DEFAULT_METHOD].paper_row == "Tables 1 and 3, Token-ALP"


def test_the_table_imports_no_torch():
    code = (
        "import sys, openrlhf_alp.objective.methods, openrlhf_alp.objective.adapt; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_documentation_has_a_row_for_every_method_and_names_the_papers():
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    rows = dict(re.findall(r"^\| `([\w-]+)` \|.*\|([^|]*)\|$", text, re.MULTILINE))
    assert list(rows) == list(METHODS)
    for name, preset in METHODS.items():
        assert rows[name].strip() == (preset.paper_row or "")
