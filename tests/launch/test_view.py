import io
from pathlib import Path

from rich.console import Console

from openrlhf_alp.data.tasks import Question
from openrlhf_alp.episodes.records import (
    Episode,
    StopReason,
    Timings,
    Turn,
    TurnKind,
    VersionSpan,
)
from openrlhf_alp.launch.processes.servers import Server, Status
from openrlhf_alp.launch.stages.accuracy import Accuracy
from openrlhf_alp.launch.view import Board, EvaluationView, LaunchView, describe
from openrlhf_alp.report.metrics import REWARD, StepMetrics

ROW = Question(question="What is 3 + 4?", label="7")


def steps_with(*rewards: float) -> list[StepMetrics]:
    return [
        StepMetrics(step=number, values={REWARD: reward})
        for number, reward in enumerate(rewards, start=1)
    ]


def accuracy(greedy: float, sampled: float, answer: str, num_not_scored: int = 0) -> Accuracy:
    return Accuracy(
        greedy=greedy,
        sampled=sampled,
        num_not_scored=num_not_scored,
        greedy_episodes=(episode(answer),),
    )


def episode(*answers: str) -> Episode:
    """A prompt, then the policy's answers with what a tool said in between; one token each."""
    said = [(TurnKind.PROMPT, ROW.question), (TurnKind.ACTION, answers[0])]
    for answer in answers[1:]:
        said += [(TurnKind.OBSERVATION, "21"), (TurnKind.ACTION, answer)]
    turns = [
        Turn(kind=kind, start=at, end=at + 1, text=text) for at, (kind, text) in enumerate(said)
    ]
    actions = [turn for turn in turns if turn.kind is TurnKind.ACTION]
    return Episode(
        request_id="r",
        prompt=ROW.question,
        label=ROW.label,
        token_ids=tuple(range(len(turns))),
        logprobs=tuple(-1.0 * (turn in actions) for turn in turns),
        action_mask=tuple(turn in actions for turn in turns),
        turns=tuple(turns),
        spans=tuple(
            VersionSpan(version=1, digest="d", start=action.start, end=action.end)
            for action in actions
        ),
        stop_reason=StopReason.EOS,
        reward=1.0,
        timings=Timings(generate_s=0.0, reward_s=0.0),
    )


def test_a_step_is_described_by_reward_ratio_and_speed():
    """exp(0.0953) = 1.100; 64 answers of 10 tokens in 4 s are 160 tokens a second."""
    step = StepMetrics(
        step=1,
        values={
            REWARD: 0.25,
            "alp/log_ratio_p99": 0.0953,
            "alp/k3_kl": 0.002,
            "alp/sigma_mean": 0.005,
            "rollout/num_samples": 64.0,
            "rollout/response_length_mean": 10.0,
            "timing/generation": 4.0,
        },
    )
    assert describe(step) == (
        "reward 0.25  ratio P99 1.100  KL 2.0e-03  sigma 5.0e-03  160 tokens/s"
    )


def test_a_metric_that_is_missing_is_shown_as_missing():
    assert describe(StepMetrics(step=1, values={})) == (
        "reward -  ratio P99 -  KL -  sigma -  - tokens/s"
    )


def test_results_show_both_shares_the_change_and_a_real_answer():
    output = io.StringIO()
    view = LaunchView(Console(file=output, width=100))
    before, after = accuracy(0.25, 0.1471, "[8]", num_not_scored=2), accuracy(0.75, 0.1324, "7")
    view.results("sums", [ROW], before, after, steps_with(0, 0, 0, 1, 1, 1))
    shown = output.getvalue()
    rows = [line.split("\u2502") for line in shown.splitlines() if "\u2502" in line]
    cells = [[cell.strip() for cell in row[1:-1]] for row in rows]
    assert ["1 held-out sums, greedy", "25%", "75%", "+50 points"] in cells
    assert ["1 held-out sums, temperature 1", "15%", "13%", "-2 points"] in cells
    assert ["training reward, first and last 3 steps", "0%", "100%", "+100 points"] in cells
    assert ["What is 3 + 4?", "[8]", "7"] in cells
    assert "2 held-out answers could not be scored" in shown


def test_a_transcript_shows_who_said_what_and_how_it_ended():
    output = io.StringIO()
    view = LaunchView(Console(file=output, width=60))
    view.transcript("before", episode("```python\nprint([3 * 7])\n```\n", "It is [21]."))
    lines = [line.strip(" \u2502") for line in output.getvalue().splitlines()]
    assert "before" in lines[0]
    assert lines[1:-1] == [
        "asked  What is 3 + 4?",
        "policy ```python",
        "print([3 * 7])",
        "```",
        "tool   21",
        "policy It is [21].",
        "reward 1, ended by eos",
    ]
    view.transcript("after", None)
    assert "could not be computed" in output.getvalue()


def server(**status: float) -> Server:
    return Server(
        name="rollout-0",
        command=lambda port: [],
        url_file=Path(__file__),
        restarts=1,
        status=Status(**status),
    )


def test_a_terminal_gets_a_table_of_services_with_the_last_step_below():
    output = io.StringIO()
    console = Console(file=output, width=120, force_terminal=True, color_system=None)
    with LaunchView(console).training(2, []) as on_change:
        on_change([server(version=3, requests=64, tokens_per_s=210.0)], None)
        on_change([server(version=3, requests=64, tokens_per_s=210.0)], steps_with(0.5)[0])
    shown = output.getvalue()
    (row,) = {line for line in shown.splitlines() if "rollout-0" in line and "64" in line}
    cells = [cell.strip() for cell in row.split("\u2502")[1:-1]]
    assert cells == ["rollout-0", "serving", "3", "64", "210", "1"]
    assert "1/2  reward 0.50" in shown


def test_without_a_terminal_each_step_is_a_line():
    output = io.StringIO()
    with LaunchView(Console(file=output, width=200)).training(None, []) as on_change:
        on_change([], None)
        for step in steps_with(0.5, 1.0):
            on_change([], step)
    lines = output.getvalue().splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "1"], ["step", "2"]]


def test_quiet_shows_errors_only():
    output = io.StringIO()
    view = LaunchView(Console(file=output), quiet=True)
    view.say("stage", "text")
    view.title("title")
    with view.training(1, []) as on_change:
        on_change([], steps_with(0.5)[0])
    assert output.getvalue() == ""
    view.error("broken")
    assert "broken" in output.getvalue()


def test_the_time_left_is_that_of_the_last_steps(monkeypatch):
    """Steps at 0, 60 and 180 s are 90 s apart on average; three more are 4.5 minutes."""
    times = iter([0.0, 60.0, 180.0])
    monkeypatch.setattr("openrlhf_alp.launch.view.time.monotonic", lambda: next(times))
    board = Board(num_steps=6, steps=[])
    for step in steps_with(0.1, 0.2, 0.3):
        board.add(step)
    assert board.line().endswith("  4 min left")


def test_an_evaluation_says_how_many_answers_are_there_and_to_go_and_writes_over_longer_lines(
    monkeypatch,
):
    clock = iter((100.0, 3700.0, 3701.0))
    monkeypatch.setattr("openrlhf_alp.launch.view.time.monotonic", lambda: next(clock))
    shown = io.StringIO()
    view = EvaluationView(Console(file=shown, force_terminal=True, color_system=None, width=40))
    on_answer = view.suite("Own", done=2, total=5)
    for _ in range(3):
        on_answer()
    there, to_go, *lines = shown.getvalue().replace("\r", "\n").splitlines()
    assert there.endswith("Own: 2 of 5 answers are there already")
    assert to_go.endswith("Own: 3 answers to go")
    assert lines[0].endswith("Own: 4/5 answers, about 1 h 0 min left")
    assert lines[1].rstrip().endswith("Own: 5/5 answers, all there")
    assert len(lines[1]) >= len(lines[0])
