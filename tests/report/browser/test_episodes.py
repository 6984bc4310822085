"""The episode browser in a real browser."""

import numpy as np
import pytest
from made_batches import batch, sample

from openrlhf_alp.episodes.records import ToolCall, Turn, TurnKind
from openrlhf_alp.report.episodes.page import write_page
from openrlhf_alp.report.episodes.ratios import Ratios

NUM_TOKENS, NUM_PROMPT = 300, 40
BACKGROUND = "[...document.querySelectorAll('.t')].map((t) => t.style.background)"

HOSTILE = (
    "<img src=x onerror=alert(1)></script><script>document.title = 'taken'</script>",
    "\u202ereversed\u202c and \u2066isolated",
    "bell \x07 escape \x1b[31m null \x00 delete \x7f",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "x" * 100_000,
    "lone \ud800 surrogate",
)


class Texts:
    """A tokenizer whose words are these texts; the others say their number."""

    def __init__(self, texts=()):
        self.texts = dict(enumerate(texts))

    def decode(self, ids, **options):
        return self.texts.get(ids[0], f"w{ids[0]} ")


def long_batch(num_samples, *, group_size=8):
    """Episodes of 300 tokens with a tool call in the middle, and ratios drawn at random."""
    rng = np.random.default_rng(0)
    samples, clean, noise = [], [], []
    for number in range(num_samples):
        mask = np.zeros(NUM_TOKENS, dtype=bool)
        mask[NUM_PROMPT:140] = mask[180:] = True
        log_probs = np.where(mask, -rng.exponential(1.0, NUM_TOKENS), 0).astype(np.float32)
        cuts = ((0, 40), (40, 140), (140, 180), (180, 300))
        kinds = (TurnKind.PROMPT, TurnKind.ACTION, TurnKind.OBSERVATION, TurnKind.ACTION)
        samples.append(
            sample(
                number,
                token_ids=rng.integers(100, 20_000, NUM_TOKENS).astype(np.int32),
                rollout_log_probs=log_probs,
                action_ranges=((40, 140), (180, 300)),
                advantages=np.where(mask, 0.5, 0).astype(np.float32),
                group=str(number // group_size),
                reward=float(number % 2),
                spans=(),
                turns=tuple(
                    Turn(kind=kind, start=start, end=end, text="")
                    for kind, (start, end) in zip(kinds, cuts, strict=True)
                ),
            )
        )
        for column in (clean, noise):
            drawn = rng.normal(0, 0.2, NUM_TOKENS).astype(np.float32)
            column.append(np.where(mask, drawn, np.float32(np.nan)))
    clean[num_samples // 2][200] = 9.0
    return batch(*samples), Ratios(clean=clean, noise=noise, notes=["made up"])


@pytest.fixture
def page(tmp_path):
    made, ratios = long_batch(32)
    return write_page(made, tmp_path / "x.html", tokenizer=Texts(), ratios=ratios)


def test_a_thousand_episodes_open_and_are_coloured_within_two_seconds(browser, tmp_path):
    made, ratios = long_batch(1000)
    out = write_page(made, tmp_path / "big.html", tokenizer=Texts(), ratios=ratios)
    assert out.stat().st_size < 15 * 2**20
    assert float(browser.open(out, ready="ready")) < 2000
    assert browser.run("document.querySelectorAll('#list .item').length") == 125
    assert sum(bool(color) for color in browser.run(BACKGROUND)) > 1000


def test_the_switch_changes_what_the_colour_stands_for(browser, page):
    browser.open(page, ready="ready")
    total = browser.run(BACKGROUND)
    browser.click("#modes button:nth-child(3)")
    assert browser.run(BACKGROUND) != total
    browser.press("1")
    assert browser.run(BACKGROUND) == total
    assert browser.text("#modes [aria-pressed=true]") == "total"


def test_the_worst_token_is_first_and_jumps_to_its_group(browser, page):
    """Sample 16, the first of group 2, has a clean log-ratio of 9 at position 200."""
    browser.open(page, ready="ready")
    browser.press("2")
    browser.click("[data-side=worst]")
    assert browser.text("#list .item:first-child .far") == "+9.000"
    browser.press("n")
    assert "group 2" in browser.text(".prompt h2")
    assert browser.run("Number(document.querySelector('.t.at').dataset.place)") == 16 * 300 + 200
    assert "clean +9.000" in " ".join(browser.text("#inspector").split())


def test_keys_move_between_groups_and_search_jumps_to_a_text(browser, page):
    browser.open(page, ready="ready")
    browser.press("j")
    assert "group 1" in browser.text(".prompt h2")
    browser.press("k")
    assert "group 0" in browser.text(".prompt h2")
    word = browser.run("textOf(20 * 300 + 60).trim()")
    browser.press("/")
    assert browser.run("document.activeElement.id") == "search"
    browser.driver.switch_to.active_element.send_keys(word)
    assert int(browser.text("[data-side=found]").split()[1]) >= 1
    browser.driver.switch_to.active_element.send_keys("\ue007")
    assert browser.run("document.querySelectorAll('.t.hit').length") >= 1


def test_tool_calls_are_folded_and_open_with_code_and_output(browser, page):
    browser.open(page, ready="ready")
    assert (
        browser.run("document.querySelectorAll('.card:first-child details.part pre').length") == 0
    )
    browser.press("o")
    browser.run("new Promise((done) => setTimeout(done, 0))")
    shown = browser.text(".card:first-child details.part:nth-of-type(2)")
    assert "ok, 0.50 s" in shown and "print(2 + 2)" in shown


def test_void_and_truncated_episodes_and_versions_are_marked(browser, tmp_path):
    made = batch(sample(0, void=True, truncated=True), sample(1))
    browser.open(
        write_page(made, tmp_path / "x.html", tokenizer=Texts(), ratios=None), ready="ready"
    )
    first, second = browser.run("[...document.querySelectorAll('.card')].map((c) => c.textContent)")
    assert "void" in first and "truncated" in first and "void" not in second
    assert browser.run(
        "[...document.querySelectorAll('.card:first-child .span')].map((s) => s.textContent)"
    ) == [
        "v3",
        "v4",
    ]


def test_hostile_text_stays_text(browser, tmp_path):
    ids = np.array([0, *range(len(HOSTILE))], dtype=np.int32)
    mask = np.arange(len(ids)) > 0
    made = batch(
        *(
            sample(
                number,
                group=str(number),
                token_ids=ids,
                rollout_log_probs=np.where(mask, -1, 0).astype(np.float32),
                action_ranges=((1, len(ids)),),
                advantages=np.zeros(len(ids), dtype=np.float32),
                prompt=text,
                label=text[:2000],
                spans=(),
                turns=(),
                tool_calls=(ToolCall(code=text, status="ok", total_s=1, run_s=1, output=text),),
            )
            for number, text in enumerate(HOSTILE)
        )
    )
    out = write_page(made, tmp_path / "x.html", tokenizer=Texts(HOSTILE), ratios=None)
    browser.open(out, ready="ready")
    for _ in HOSTILE:
        browser.press("o")
        browser.press("j")
    assert browser.run("document.title").startswith("Episodes: ")
    assert browser.run("document.querySelectorAll('main img, main script').length") == 0
    shown = browser.text(".card .turn")
    assert HOSTILE[0] in shown and HOSTILE[4] in shown
    assert "<U+202E>reversed" in shown and "\u202e" not in shown
    assert "bell \u2407 escape \u241b[31m null \u2400 delete \u2421" in shown
    assert "lone \\ud800 surrogate" in shown
    # Nothing is wider than the window: long lines are broken.
    assert browser.run("document.documentElement.scrollWidth <= window.innerWidth")
