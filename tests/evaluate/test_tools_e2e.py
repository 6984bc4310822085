"""Tool-integrated answers over both services, as training plays them."""

from __future__ import annotations

import json

import pytest
from inspect_ai.log import read_eval_log

from benchmarks.common.serving import serving
from benchmarks.policies.tiny_policy import save_tiny_policy
from openrlhf_alp.evaluate.folder import RunFolder
from openrlhf_alp.evaluate.player import Plan
from openrlhf_alp.evaluate.run import run_evaluation
from openrlhf_alp.evaluate.suites import Suite, load_suite
from openrlhf_alp.rollouts.runners import ToolConfig

# Inspect leaves a stream of anyio to the garbage collector.
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]

KEY = "key-of-a-test"


@pytest.fixture
def policy(tmp_path_factory):
    """Prints the number of the task in Python and boxes what it reads."""
    folder = tmp_path_factory.mktemp("tool-policy")
    dialogues = [
        (
            f"user: Task {k}\nassistant: ",
            f"```python\nprint({k})\n```\n```output\n{k}\n```\n\\boxed{{{k}}}<eos>",
        )
        for k in range(3)
    ]
    return save_tiny_policy(folder, dialogues)


def test_programs_run_and_only_the_policys_own_words_are_graded(
    servers, make_run, heard, tmp_path, monkeypatch
):
    path = tmp_path / "tasks.jsonl"
    rows = [{"q": f"Task {k}", "a": str(k if k < 2 else 9)} for k in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    suite = Suite(name="tasks", title="Tasks", source=str(path), problem=("q",), label=("a",))
    monkeypatch.setenv("OPENRLHF_ALP_TOOL_API_KEY", KEY)
    command = ("-m", "services.tool", "--port", "0", "--presets", "numpy", "--slots", "2")
    with serving(*command, OPENRLHF_ALP_TOOL_API_KEY=KEY) as (tool_url, _):
        plan = Plan(
            template="chat-bare",
            temperature=0.0,
            top_p=1.0,
            top_k=0,
            max_new_tokens=120,
            seed=0,
            tool=ToolConfig(urls=(tool_url,), template="plain", max_tool_turns=2),
        )
        run = make_run([servers.start()], n=2, plan=plan, suites=[load_suite(suite, data_dir=None)])
        results = run_evaluation(run, heard)
    (found,) = results["suites"]
    assert found["avg"]["value"] == pytest.approx(2 / 3)
    assert found["mean_tool_calls"] == 1 and found["tool_statuses"] == {"ok": 6}
    assert found["shares"]["void"] == 0
    answer = RunFolder(run.output).store("tasks").get(("tasks:2", 0))
    assert [turn.kind for turn in answer.turns] == ["action", "observation", "action"]
    assert answer.turns[1].text.strip() == "1" and "```" not in answer.response
    assert len(answer.action_ranges) == 2
    (log_path,) = (run.output / "logs").glob("*.eval")
    roles = [message.role for message in read_eval_log(str(log_path)).samples[0].messages]
    assert roles == ["user", "assistant", "user", "assistant"]
    # The URL of a service is no part of what a run is, its limits are.
    assert "urls" not in results["plan"]["tool"] and results["plan"]["tool"]["max_tool_turns"] == 2
