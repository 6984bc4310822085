import struct

import numpy as np
import pytest

from openrlhf_alp.report.metrics import StepMetrics, read_steps
from openrlhf_alp.report.plots import log_ratio_figure, reward_figure, write_plots


@pytest.fixture
def steps(metrics_file):
    return read_steps(metrics_file)


def test_the_reward_plot_has_one_point_per_step(steps):
    (axes,) = reward_figure(steps, title="a run").axes
    (line,) = axes.lines
    np.testing.assert_array_equal(line.get_xydata(), [[1, 0.25], [2, 0.5], [3, 0.75]])
    assert axes.get_title() == "a run"


def test_the_log_ratio_plot_has_the_outer_and_the_inner_band_and_the_median(steps):
    (axes,) = log_ratio_figure(steps, title="a run").axes
    bands = {band.get_label(): band.get_paths()[0].vertices for band in axes.collections}
    assert set(bands) == {"P1 to P99", "P25 to P75"}
    for label, width in (("P1 to P99", 0.3), ("P25 to P75", 0.03)):
        assert bands[label][:, 1].max() == pytest.approx(width)
        assert bands[label][:, 1].min() == pytest.approx(-width)
        assert set(bands[label][:, 0]) == {1, 2, 3}
    (median,) = [line for line in axes.lines if line.get_label() == "median (P50)"]
    np.testing.assert_array_equal(median.get_xydata(), [[1, 0], [2, 0], [3, 0]])


def test_a_step_that_lacks_a_metric_is_left_out_of_its_plot_only(steps):
    with_gap = [*steps, StepMetrics(step=4, values={"rollout/reward_mean": 1.0})]
    assert len(reward_figure(with_gap, title="").axes[0].lines[0].get_xdata()) == 4
    assert len(log_ratio_figure(with_gap, title="").axes[0].lines[1].get_xdata()) == 3


def test_both_plots_are_written_as_png_images_of_a_readable_size(steps, tmp_path):
    paths = write_plots(steps, tmp_path, title="a run")
    assert [path.name for path in paths] == ["reward.png", "log_ratio.png"]
    for path in paths:
        content = path.read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert struct.unpack(">II", content[16:24]) == (1050, 600)


def test_a_run_that_stopped_before_its_first_step_still_gives_two_plots(tmp_path):
    for path in write_plots([], tmp_path, title="nothing yet"):
        assert path.stat().st_size > 1000
