"""Figures of matplotlib come back as PNG files: of programs, cells and notebooks."""

import base64
import io

import httpx
import pytest
from matplotlib.image import imread

from services.tool.sandbox.host.execution import Job, Limits
from services.tool.sandbox.host.pool import Sandbox, SandboxConfig
from services.tool.sandbox.plan import PRESETS

pytestmark = pytest.mark.asyncio(loop_scope="module")

BLUE = "import matplotlib.pyplot as plt\nplt.figure(figsize=(2, 1), facecolor='blue')\n"
RED = "plt.figure(figsize=(3, 1), facecolor='red')\n"
LIMITS = Limits(
    wall_s=60.0, cpu_s=60, memory_bytes=512 << 20, output_bytes=1 << 16, fetch_bytes=1 << 20
)


def picture(content: str) -> tuple[tuple[int, int], list[float]]:
    """Width and height in pixels, and the colour of the first pixel."""
    pixels = imread(io.BytesIO(base64.b64decode(content)), format="png")
    return (pixels.shape[1], pixels.shape[0]), [float(part) for part in pixels[0, 0]]


IS_BLUE = ((200, 100), [0.0, 0.0, 1.0, 1.0])
IS_RED = ((300, 100), [1.0, 0.0, 0.0, 1.0])


async def test_shown_and_open_figures_of_a_program_come_back_in_order(
    client: httpx.AsyncClient,
) -> None:
    code = f"{BLUE}plt.show()\nprint(plt.get_fignums())\n{RED}"
    body = {"code": code, "figures": True, "timeout_s": 60}
    answer = (await client.post("/v1/execute", json=body)).json()
    assert (answer["status"], answer["stdout"], answer["stderr"]) == ("ok", "[]\n", "")
    assert sorted(answer["files"]) == ["figure-1.png", "figure-2.png"]
    assert picture(answer["files"]["figure-1.png"]) == IS_BLUE
    assert picture(answer["files"]["figure-2.png"]) == IS_RED


async def test_figures_come_beside_fetched_files_and_of_a_program_that_is_killed(
    client: httpx.AsyncClient,
) -> None:
    code = (
        "open('figure-1.png', 'w').write('mine')\nimport os, resource\n"
        f"{BLUE}plt.show()\nplt.figure()\nos.kill(os.getpid(), 9)"
    )
    body = {"code": code, "figures": True, "fetch": ["figure-1.png"], "timeout_s": 60}
    answer = (await client.post("/v1/execute", json=body)).json()
    assert answer["status"] == "crashed"
    assert base64.b64decode(answer["files"].pop("figure-1.png")) == b"mine"
    assert {name: picture(content) for name, content in answer["files"].items()} == {
        "figure-2.png": IS_BLUE
    }


async def test_a_figure_that_cannot_be_drawn_costs_no_other(client: httpx.AsyncClient) -> None:
    code = (
        "import matplotlib.pyplot as plt\nplt.figure().draw = lambda _: 1 / 0\n"
        "plt.figure(figsize=(2, 1), facecolor='blue')\nprint('end')"
    )
    body = {"code": code, "figures": True, "timeout_s": 60}
    answer = (await client.post("/v1/execute", json=body)).json()
    assert answer["stdout"] == "end\n" and "ZeroDivisionError" in answer["stderr"]
    assert picture(answer["files"]["figure-1.png"]) == IS_BLUE


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os\nos.symlink('/etc/passwd', '../figures/1.png')", "Too many levels"),
        ("import os\nos.mkfifo('../figures/1.png')", "not a regular file"),
        ("open('../figures/1.png', 'wb').truncate(9 << 20)", "the limit is 8388608"),
    ],
)
async def test_what_a_program_puts_in_place_of_a_figure_is_refused(
    client: httpx.AsyncClient, code: str, reason: str
) -> None:
    answer = (await client.post("/v1/execute", json={"code": code, "figures": True})).json()
    assert (answer["status"], answer["files"]) == ("ok", {})
    assert reason in answer["missing"]["figure-1.png"]


async def test_figures_of_cells_and_notebooks(client: httpx.AsyncClient) -> None:
    cells = [f"{BLUE}plt.show()\n7", "8", RED]
    fields = {"cells": cells, "total_timeout": 60}
    notebook = (await client.post("/run_jupyter", json=fields)).json()
    shown = [cell["display"] for cell in notebook["cells"]]
    assert shown[0][0] == {"text/plain": "7"} and picture(shown[0][1]["image/png"]) == IS_BLUE
    assert shown[1] == [{"text/plain": "8"}]
    assert picture(shown[2][-1]["image/png"]) == IS_RED

    session = (await client.post("/v1/sessions", json={})).json()["session_id"]
    path = f"/v1/sessions/{session}/execute"
    first = await client.post(path, json={"code": BLUE, "timeout_s": 60})
    assert first.json()["files"] == {}
    second = await client.post(path, json={"code": RED, "figures": True})
    files = second.json()["files"]
    assert [picture(files[f"figure-{n}.png"]) for n in (1, 2)] == [IS_BLUE, IS_RED]
    await client.delete(f"/v1/sessions/{session}")


async def test_pandas_and_matplotlib_can_be_loaded_ahead() -> None:
    sandbox = Sandbox(SandboxConfig(presets=PRESETS, warm_slots=1))
    await sandbox.start()
    # The name in two parts: a program that contains it gets the zygote that has it.
    loaded = "import sys\nprint([n in sys.modules for n in ('pandas', 'mat' 'plotlib.pyplot')])\n"
    try:
        table = loaded + "import pandas as pd\nprint(pd.DataFrame({'a': [1, 2]}).a.sum())"
        outcome = await sandbox.run(Job(code=table), LIMITS)
        assert (outcome.stdout, outcome.stderr) == ("[True, False]\n3\n", "")
        drawing = loaded + "import pandas as pd\npd.DataFrame({'a': [1, 2]}).plot()"
        outcome = await sandbox.run(Job(code=drawing, figures=True), LIMITS)
        assert (outcome.stdout, outcome.stderr) == ("[True, True]\n", "")
        assert picture(outcome.files["figure-1.png"])[0] == (640, 480)
    finally:
        await sandbox.stop()
