"""The report in a real browser."""

import json

import pytest

from openrlhf_alp.report.compare.page import write_report


def metrics(step):
    quantiles = {"p00_1": -3, "p01": -2, "p25": -1, "p50": 0, "p75": 1, "p99": 2, "p99_9": 3}
    return {
        **{f"alp/log_ratio_{name}": z * step / 100 for name, z in quantiles.items()},
        "alp/clean_k3_kl": 0.01 * step,
        "alp/layer_0_sigma": 0.02 + step / 1000,
        "alp/layer_1_sigma": 0.02,
        "timing/generation": 3.0,
    }


@pytest.fixture
def page(tmp_path):
    for method in ("seq-bypass", "seq-alp"):
        for seed in (1, 2):
            folder = tmp_path / "runs" / f"{method}-{seed}"
            folder.mkdir(parents=True)
            (folder / "recipe.toml").write_text(
                f'[run]\nseed = {seed}\n[train]\nalp.method = "{method}"\n'
            )
            (folder / "summary.json").write_text("{}")
            rows = [
                {"global_step": step, "rollout/reward_mean": step / 10, **metrics(step)}
                for step in range(1, 7)
            ]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return write_report([tmp_path / "runs"], tmp_path / "out").page


def test_every_chart_is_drawn(browser, page):
    drawn = browser.open(page, ready="drawn")
    charts = browser.run("document.querySelectorAll('.plot').length")
    assert int(drawn) == charts == 5
    counts = browser.run(
        "[...document.querySelectorAll('.plot')].map((p) => p.querySelectorAll("
        "'.scatterlayer .trace, .heatmaplayer image, .barlayer .point').length)"
    )
    assert len(counts) == charts and min(counts) > 0


def test_a_chip_hides_its_method_in_every_chart(browser, page):
    browser.open(page, ready="drawn")
    shown = "document.querySelectorAll('#reward .scatterlayer .trace').length"
    before = browser.run(shown)
    browser.click(".chip[data-method=seq-alp]")
    assert browser.run(shown) == before / 2
    browser.click(".chip[data-method=seq-alp]")
    assert browser.run(shown) == before


def test_tabs_show_one_measure_and_numbers_lead_to_their_run(browser, page):
    browser.open(page, ready="drawn")
    browser.click("[data-tab=kl]")
    visible = browser.run(
        "[...document.querySelectorAll('.tab')].filter((t) => !t.hidden).map((t) => t.id)"
    )
    assert visible == ["tab-kl"]
    link = browser.run("document.querySelector('#tab-kl .seeds a').getAttribute('href')")
    browser.click("#tab-kl .seeds a")
    assert browser.run("document.querySelector(':target').id") == link.removeprefix("#")
    folder = browser.run("document.querySelector(':target a').href")
    assert "/runs/seq-" in folder
