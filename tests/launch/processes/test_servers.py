"""Services that another process runs: their end is its business, their restart is seen."""

import io

import pytest
from rich.console import Console

from openrlhf_alp.launch.processes.servers import Server, Services
from openrlhf_alp.launch.processes.supervisor import Supervisor
from openrlhf_alp.launch.view import LaunchView


@pytest.fixture
def borrowed(tmp_path):
    """A borrowed service and whoever borrows it."""
    (tmp_path / "rollout-0.url").write_text("http://127.0.0.1:9\n")
    server = Server(name="rollout-0", command=lambda port: [], url_file=tmp_path / "rollout-0.url")
    with Supervisor() as supervisor:
        services = Services(supervisor, LaunchView(Console(file=io.StringIO())))
        assert services.borrow([server], tmp_path) == ("http://127.0.0.1:9",)
        yield server, services


def test_a_borrowed_service_that_starts_again_does_not_fail_its_borrower(borrowed):
    server, services = borrowed
    server.url_file.unlink()
    assert not server.is_ready
    services.keep_running()
    services.check()
    services.poll()
    assert server.status.requests is None


def test_a_new_life_of_a_borrowed_service_shows_in_its_file(borrowed):
    server, _ = borrowed
    before = server.life
    assert before is not None
    server.url_file.unlink()
    assert server.life is None
    server.url_file.write_text("http://127.0.0.1:9\n")
    assert server.life not in (None, before)
