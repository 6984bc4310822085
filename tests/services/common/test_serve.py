"""The runner is tested as a process, because signals and ports belong to processes."""

import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from services.common.errors import ConfigError
from services.common.serve import bind_socket, bound_url, write_url_file

PROGRAM = """
import asyncio, sys
from pathlib import Path
from fastapi import FastAPI
from services.common.serve import bind_socket, serve
app = FastAPI()
@app.get("/")
async def root():
    return {"alive": True}
sock = bind_socket("127.0.0.1", 0)
asyncio.run(serve(app, sock, url_file=Path(sys.argv[1])))
print("cleaned up", flush=True)
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_service_cleanly(tmp_path: Path, signum: signal.Signals) -> None:
    url_file = tmp_path / "url"
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(url_file)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        url = url_file.read_text().strip()
        assert line == f"listening on {url}"
        with urllib.request.urlopen(url, timeout=5) as response:
            assert response.read() == b'{"alive":true}'
        process.send_signal(signum)
        rest, _ = process.communicate(timeout=20)
    assert rest.strip() == "cleaned up"
    assert process.returncode == 0
    assert not url_file.exists()


def test_port_zero_becomes_a_real_port() -> None:
    with bind_socket("127.0.0.1", 0) as sock:
        assert bound_url(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"
        assert sock.getsockname()[1] > 0


def test_a_taken_port_is_an_error_with_a_fix() -> None:
    with bind_socket("127.0.0.1", 0) as sock:
        sock.listen()
        with pytest.raises(ConfigError, match="--port 0"):
            bind_socket("127.0.0.1", sock.getsockname()[1])


def test_the_url_file_appears_whole(tmp_path: Path) -> None:
    write_url_file(tmp_path / "url", "http://127.0.0.1:1")
    assert [p.name for p in tmp_path.iterdir()] == ["url"]
    assert (tmp_path / "url").read_text() == "http://127.0.0.1:1\n"
