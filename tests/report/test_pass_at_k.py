from openrlhf_alp.report.pass_at_k import pass_at_k_figure


def test_a_curve_has_one_tick_for_each_whole_k_and_its_band():
    estimates = {
        str(k): {"value": k / 10, "low": k / 20, "high": k / 8, "stderr": 0.0} for k in (1, 2, 4, 6)
    }
    suite = {"title": "Own (first 5)", "pass_at": estimates}
    (axes,) = pass_at_k_figure({"model": "policy", "n": 6, "suites": [suite]}).axes
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "2", "4", "6"]
    assert list(axes.xaxis.get_minorticklocs()) == []
    (line,) = axes.lines
    assert list(line.get_ydata()) == [0.1, 0.2, 0.4, 0.6]
    (band,) = axes.collections
    assert band.get_paths()[0].vertices[:, 1].max() == 0.75
