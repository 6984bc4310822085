"""Sessions: state, snapshots, exactly-once steps, files, ends, and walls between sessions."""

import asyncio
import json

import httpx
import pytest

from services.tool.service import ToolService

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def open_session(client: httpx.AsyncClient, **fields: object) -> str:
    answer = await client.post("/v1/sessions", json=fields)
    assert answer.status_code == 201, answer.text
    return str(answer.json()["session_id"])


async def cell(
    client: httpx.AsyncClient, session: str, code: str, **fields: object
) -> dict[str, object]:
    answer = await client.post(
        f"/v1/sessions/{session}/execute", json={"code": code, "timeout_s": 20.0, **fields}
    )
    assert answer.status_code == 200, answer.text
    body: dict[str, object] = answer.json()
    return body


async def test_variables_persist_and_a_last_expression_is_shown(client: httpx.AsyncClient) -> None:
    session = await open_session(client)
    first = await cell(client, session, "x = 41")
    second = await cell(client, session, "print('hi')\nx + 1")
    assert (first["result"], first["step"], first["snapshot"]) == (None, 0, True)
    assert (second["result"], second["stdout"], second["step"]) == ("42", "hi\n", 1)


@pytest.mark.parametrize("thread", [False, True], ids=["snapshot", "in place"])
async def test_a_cell_is_charged_for_its_own_cpu_time_alone(
    client: httpx.AsyncClient, thread: bool
) -> None:
    session = await open_session(client)
    if thread:
        code = (
            "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"
        )
        await cell(client, session, code)
    spin = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    busy = await cell(client, session, spin)
    after = await cell(client, session, "1")
    assert busy["snapshot"] is not thread
    assert busy["usage"]["cpu_ms"] >= 290 and busy["usage"]["peak_mb"] > 10  # type: ignore[index]
    assert after["usage"]["cpu_ms"] < 200  # type: ignore[index]


DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork(): os._exit(0)
    while True:
        os.write(1, b'daemon')
        time.sleep(0.02)
os.wait()
time.sleep(0.1)
"""


@pytest.mark.parametrize(
    "end", ["time.sleep(60)", "os.kill(os.getpid(), 9)", "os.abort()"], ids=["time", "kill", "core"]
)
async def test_a_daemon_of_a_killed_cell_dies_with_it_and_older_children_live(
    client: httpx.AsyncClient, end: str
) -> None:
    session = await open_session(client)
    code = "import os, time\nchild = os.fork()\nif child == 0:\n    time.sleep(30)\n    os._exit(0)"
    await cell(client, session, code)
    killed = await cell(client, session, DAEMON + end, timeout_s=1.0)
    assert killed["rolled_back"] and "daemon" in str(killed["stdout"])
    after = await cell(client, session, "import time\ntime.sleep(0.3)\nos.kill(child, 0)")
    assert (after["status"], after["stdout"]) == ("ok", "")


async def test_memory_that_is_taken_after_a_cell_ends_the_session(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    if service.sandbox.cgroups is not None:
        pytest.skip("the kernel counts the memory of a slot at all times")
    session = await open_session(client, memory_mb=128)
    code = (
        "import os, time\nfor _ in range(8):\n    if os.fork() == 0:\n        time.sleep(0.5)\n"
        "        block = bytearray(b'x') * (100 << 20)\n        time.sleep(20)\n        os._exit(0)"
    )
    assert (await cell(client, session, code))["status"] == "ok"
    for _ in range(200):
        answer = await client.get(f"/v1/sessions/{session}")
        if answer.status_code == 410:
            break
        await asyncio.sleep(0.05)
    assert answer.status_code == 410 and "died" in answer.text


async def test_an_exception_and_sys_exit_keep_partial_effects(client: httpx.AsyncClient) -> None:
    session = await open_session(client)
    failed = await cell(client, session, "x = 1\n1/0")
    assert (failed["status"], failed["rolled_back"], failed["state_lost"]) == (
        "error",
        False,
        False,
    )
    assert failed["error"]["line"] == 2  # type: ignore[index]
    left = await cell(client, session, "x += 1\nimport sys\nsys.exit(3)")
    assert (left["status"], left["exit_code"]) == ("exit", 3)
    assert (await cell(client, session, "x"))["result"] == "2"


@pytest.mark.parametrize(
    ("code", "status", "fields"),
    [
        ("import time\ntime.sleep(60)", "timeout", {"timeout_s": 0.5}),
        ("import ctypes\nctypes.string_at(0)", "crashed", {}),
        ("import os\nos._exit(4)", "exit", {}),
        ("import os\nos.kill(os.getpid(), 9)", "crashed", {}),
        ("while True: print('x' * 999)", "output_limit", {"output_bytes": 5000}),
        ("while True: pass", "cpu_limit", {"cpu_s": 1}),
    ],
)
async def test_a_killed_cell_leaves_the_state_before_it_and_the_files(
    client: httpx.AsyncClient, code: str, status: str, fields: dict[str, object]
) -> None:
    session = await open_session(client)
    await cell(client, session, "x = 'before'")
    killed = await cell(
        client, session, f"x = 'during'\nopen('kept', 'w').write('1')\n{code}", **fields
    )
    assert (killed["status"], killed["rolled_back"], killed["state_lost"]) == (status, True, False)
    after = await cell(client, session, "x, open('kept').read()")
    assert after["result"] == "('before', '1')"


async def test_a_cell_beside_a_living_thread_has_no_snapshot_and_says_so(
    client: httpx.AsyncClient,
) -> None:
    session = await open_session(client)
    await cell(client, session, "import threading, time\nx = 1\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()")  # fmt: skip # noqa: E501
    killed = await cell(client, session, "import os\nos._exit(1)")
    assert (killed["snapshot"], killed["rolled_back"], killed["state_lost"]) == (False, False, True)
    fresh = await cell(client, session, "x")
    assert fresh["error"]["type"] == "NameError"  # type: ignore[index]


async def test_too_much_memory_is_an_exception_and_the_session_lives(
    client: httpx.AsyncClient,
) -> None:
    session = await open_session(client, memory_mb=64)
    await cell(client, session, "x = 5")
    body = await cell(client, session, "y = bytearray(1 << 30)")
    assert body["error"]["type"] == "MemoryError"  # type: ignore[index]
    assert (await cell(client, session, "x"))["result"] == "5"


async def test_a_cell_may_change_a_state_of_nearly_all_its_memory(
    client: httpx.AsyncClient,
) -> None:
    session = await open_session(client, memory_mb=100)
    await cell(client, session, "import numpy as np\na = np.ones(90 * 131072)")
    changed = await cell(client, session, "a *= 2\nfloat(a[0])")
    assert (changed["status"], changed["result"], changed["snapshot"]) == ("ok", "2.0", True)
    killed = await cell(client, session, "a *= 2\nwhile True: pass", timeout_s=1.0)
    assert (killed["status"], killed["rolled_back"]) == ("timeout", True)
    assert (await cell(client, session, "float(a[-1])"))["result"] == "2.0"


async def test_a_limit_of_any_length_keeps_the_state(client: httpx.AsyncClient) -> None:
    session = await open_session(client)
    await cell(client, session, "x = 41\nstate = bytearray(50 << 20)")
    for timeout_s in (1e-9, 1e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3) * 3:
        late = await cell(client, session, "x = 0\nwhile True: pass", timeout_s=timeout_s)
        assert (late["status"], late["rolled_back"]) == ("timeout", True)
        assert (await cell(client, session, "x"))["result"] == "41"


async def test_a_state_that_dies_between_two_cells_is_told_once(
    client: httpx.AsyncClient,
) -> None:
    session = await open_session(client)
    code = (
        "import os, threading\nx = 1\ndef end():\n    while not os.path.exists('go'): pass\n"
        "    os.kill(os.getpid(), 9)\nthreading.Thread(target=end, daemon=True).start()"
    )
    await cell(client, session, code)
    await client.put(f"/v1/sessions/{session}/files/go", content=b"")
    answers = [await cell(client, session, "import time\ntime.sleep(1)\n'ran'") for _ in range(2)]
    assert [answer["status"] for answer in answers] == ["crashed", "ok"]
    assert [answer["state_lost"] for answer in answers] == [True, False]


async def test_special_files_and_deep_folders_are_refused_and_nothing_waits(
    client: httpx.AsyncClient,
) -> None:
    session = await open_session(client)
    base = f"/v1/sessions/{session}/files"
    make = (
        "import os, socket\nos.mkfifo('pipe')\nos.symlink('target', 'link')\nos.mkdir('folder')\n"
        "os.symlink('folder', 'shortcut')\nhome = os.getcwd()\n"
        "for _ in range(1500):\n    os.mkdir('d')\n    os.chdir('d')\n"
        "open('deep', 'w').close()\nos.chdir(home)\nx = 1"
    )
    assert (await cell(client, session, make))["status"] == "ok"
    for path in ("pipe", "link", "folder", "shortcut/a", "pipe/a"):
        put = await asyncio.wait_for(client.put(f"{base}/{path}", content=b"x"), 5)
        assert put.status_code == 409, put.text
        assert (await client.get(f"{base}/{path}")).status_code in (404, 409)
    assert (await client.put(f"{base}/new/file", content=b"x")).status_code == 204
    listed = (await client.get(base)).json()["files"]
    assert [item["path"] for item in listed] == ["link", "new/file", "pipe", "shortcut"]
    assert (await cell(client, session, "x"))["result"] == "1"


async def test_a_cell_whose_many_large_children_die_slowly_keeps_the_state(
    client: httpx.AsyncClient,
) -> None:
    session = await open_session(client)
    await cell(client, session, "x = 1")
    code = (
        "import mmap, os, time\n"
        "kept = [mmap.mmap(-1, 4096, prot=1 + 2 * (i % 2)) for i in range(20_000)]\n"
        "for _ in range(40):\n    if os.fork() == 0:\n        time.sleep(60)\n"
        "time.sleep(60)"
    )
    body = await cell(client, session, code, timeout_s=4)
    assert (body["status"], body["rolled_back"], body["state_lost"]) == ("timeout", True, False)
    assert (await cell(client, session, "x"))["result"] == "1"


async def test_memory_that_no_single_process_limit_sees_ends_the_session_and_is_told(
    client: httpx.AsyncClient,
) -> None:
    """Shared mappings escape RLIMIT_DATA; the watchdog sums them and can only kill the slot."""
    session = await open_session(client, memory_mb=64)
    code = (
        "import mmap, time\nkept = []\nwhile True:\n"
        "    kept.append(mmap.mmap(-1, 1 << 22))\n    kept[-1].write(b'x' * (1 << 22))\n"
        "    time.sleep(0.01)"
    )
    body = await cell(client, session, code)
    assert (body["status"], body["state_lost"]) == ("memory_limit", True)
    assert (await client.get(f"/v1/sessions/{session}")).status_code == 410


async def test_a_step_runs_exactly_once(client: httpx.AsyncClient) -> None:
    session = await open_session(client)
    first = await cell(client, session, "n = 1", step=0)
    await cell(client, session, "n += 1\nn", step=1)
    again = await cell(client, session, "n += 1\nn", step=1)
    assert (first["replayed"], again["replayed"], again["result"]) == (False, True, "2")
    assert (await cell(client, session, "n", step=2))["result"] == "2"
    url = f"/v1/sessions/{session}/execute"
    other = await client.post(url, json={"code": "n = 9", "step": 1})
    ahead = await client.post(url, json={"code": "n", "step": 7})
    assert (other.status_code, ahead.status_code) == (409, 409)
    assert (await client.get(f"/v1/sessions/{session}")).json()["next_step"] == 3


async def test_concurrent_repeats_of_a_step_run_it_once(client: httpx.AsyncClient) -> None:
    session = await open_session(client)
    await cell(client, session, "n = 0", step=0)
    answers = await asyncio.gather(*(cell(client, session, "n += 1\nn", step=1) for _ in range(5)))
    assert {answer["result"] for answer in answers} == {"1"}
    assert sum(not answer["replayed"] for answer in answers) == 1


async def test_files_go_up_and_down_and_links_are_not_followed(client: httpx.AsyncClient) -> None:
    session = await open_session(client)
    base = f"/v1/sessions/{session}/files"
    content = bytes(range(256)) * 100
    assert (await client.put(f"{base}/d/a.bin", content=content)).status_code == 204
    assert (await client.get(f"{base}/d/a.bin")).content == content
    await cell(client, session, "import os\nos.symlink('/etc/passwd', 'link')\nos.mkfifo('pipe')")
    assert (await client.get(f"{base}/link")).status_code == 409
    assert (await client.get(f"{base}/pipe")).status_code == 409
    assert (await client.get(f"{base}/absent")).status_code == 404
    assert (await client.get(f"{base}/..%2f..%2fetc/passwd")).status_code in (404, 422)
    listed = (await client.get(base)).json()["files"]
    assert {"path": "d/a.bin", "size_bytes": len(content)} in listed


async def test_sessions_do_not_see_each_other(client: httpx.AsyncClient) -> None:
    """Variables, files, environment and processes of one are absent in the other."""
    left, right = await open_session(client), await open_session(client)
    plant = (
        "import os, sys\nsecret = 'left'\n"
        "for name in ('left', '/tmp/left'): open(name, 'w').close()\n"
        "os.environ['LEFT'] = '1'\nsys.modules['leftmodule'] = sys"
    )
    assert (await cell(client, left, plant))["status"] == "ok"
    look = (
        "import os, sys\n('secret' in globals(), os.path.exists('left'),"
        " os.path.exists('/tmp/left'), 'LEFT' in os.environ, 'leftmodule' in sys.modules)"
    )
    assert (await cell(client, right, look))["result"] == str((False,) * 5)
    signals = (
        "import os\ndef reach(pid):\n    try: os.kill(pid, 0)\n"
        "    except OSError: return False\n    return True\n"
        "sum(reach(pid) for pid in range(2, 2000)) <= 4"
    )
    assert (await cell(client, right, signals))["result"] == "True"
    assert (await cell(client, left, "secret"))["result"] == "'left'"


async def test_an_ended_session_is_gone_with_a_reason_and_an_unknown_one_is_not_found(
    client: httpx.AsyncClient,
) -> None:
    session = await open_session(client)
    assert (await client.delete(f"/v1/sessions/{session}")).status_code == 204
    gone = await client.post(f"/v1/sessions/{session}/execute", json={"code": "1"})
    assert gone.status_code == 410 and "ended by its owner" in gone.json()["error"]["message"]
    unknown = await client.get(f"/v1/sessions/{'0' * 32}")
    assert unknown.status_code == 404
    assert (await client.get("/v1/sessions/nonsense")).status_code == 422


async def test_the_longest_idle_session_makes_room_and_is_told(
    client: httpx.AsyncClient, service: ToolService
) -> None:
    cap = service.settings.max_sessions
    opened = [await open_session(client) for _ in range(cap + 1)]
    assert len(service.sessions) == cap
    evicted = await client.get(f"/v1/sessions/{opened[0]}")
    assert evicted.status_code == 410 and "cap" in evicted.json()["error"]["message"]
    assert (await cell(client, opened[-1], "1"))["result"] == "1"


async def test_an_idle_session_expires(client: httpx.AsyncClient, service: ToolService) -> None:
    session = await open_session(client, ttl_s=0.01)
    while session in service.sessions:
        await asyncio.sleep(0.05)
    gone = await client.get(f"/v1/sessions/{session}")
    assert gone.status_code == 410 and "idle" in gone.json()["error"]["message"]


async def test_a_huge_representation_is_cut(client: httpx.AsyncClient) -> None:
    session = await open_session(client)
    body = await cell(client, session, "'x' * 10**6")
    assert len(str(body["result"])) == 10_000
    broken = await cell(client, session, "class A:\n    def __repr__(self): raise OSError\nA()")
    assert broken["result"] == "<repr raised OSError>"


async def test_a_session_is_opened_without_a_body(client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/sessions")
    assert answer.status_code == 201
    await client.delete(f"/v1/sessions/{answer.json()['session_id']}")


@pytest.mark.parametrize(
    "frames",
    [
        [{"died": 2**70}],
        [{"done": True, "exit_code": 10**400, "cpu_s": float("nan"), "peak_bytes": [1]}],
        [{"started": 1, "snapshot": True, "spent_s": "x"}],
        [{"died": 0}, {"died": 0, "reply": 7}],
        [{"died": 0}, {"died": 0, "reply": [1]}],
    ],
    ids=["status", "numbers", "started", "reply", "list"],
)
async def test_a_cell_that_forges_answers_hurts_only_its_own_session(
    client: httpx.AsyncClient, frames: list[dict[str, object]]
) -> None:
    bodies = [json.dumps(frame).encode() for frame in frames]
    forge = (
        "import os, stat, struct\n"
        f"for body in {bodies!r}:\n"
        "    for fd in range(3, 12):\n"
        "        try: mode = os.fstat(fd).st_mode\n"
        "        except OSError: continue\n"
        "        if stat.S_ISSOCK(mode): os.write(fd, struct.pack('>I', len(body)) + body); break"
    )
    forged, other = await open_session(client), await open_session(client)
    await cell(client, forged, forge, timeout_s=3.0)
    for path in ("/files", "/files/a", ""):
        answer = await client.get(f"/v1/sessions/{forged}{path}")
        assert answer.status_code in (200, 404, 409, 410, 503), answer.text
    assert (await cell(client, other, "6 * 7"))["result"] == "42"


async def test_a_result_that_cannot_be_sent_is_replaced(client: httpx.AsyncClient) -> None:
    session = await open_session(client)
    code = "class A:\n    def __repr__(self): return '\\ud800'\nopen(b'\\xff', 'w').close()\nA()"
    assert (await cell(client, session, code))["result"] == "?"
    (listed,) = (await client.get(f"/v1/sessions/{session}/files")).json()["files"]
    assert listed["size_bytes"] == 0


async def test_a_cell_is_not_blamed_for_what_an_earlier_one_used(client: httpx.AsyncClient) -> None:
    """With a thread alive cells share a process, whose children count from cell to cell."""
    session = await open_session(client)
    wait = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()"
    await cell(client, session, wait)
    burn = (
        "import os, time\npid = os.fork()\n"
        "if pid == 0:\n    while time.process_time() < 0.7: pass\n    os._exit(0)\n"
        "_ = os.waitpid(pid, 0)"
    )
    busy = await cell(client, session, burn)
    assert busy["usage"]["cpu_ms"] >= 600  # type: ignore[index]
    killed = await cell(client, session, "os.kill(os.getpid(), 9)", cpu_s=1)
    assert (killed["status"], killed["signal"]) == ("crashed", "SIGKILL")
