import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.common.launching import RealLaunch, StartLaunch

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def character_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder without weights whose tokens are characters, numbered by their code."""
    folder = tmp_path_factory.mktemp("model")
    vocabulary = {chr(code): code for code in range(2, 127)} | {"<pad>": 0, "<eos>": 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


class FakeLaunch:
    """A launch as a process of its own, with fake programs for services and training."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process = process
        self.folder = folder

    def read_until(self, text: str) -> str:
        """Output up to and with the first line that holds `text`."""
        assert self.process.stdout is not None
        seen = ""
        for line in self.process.stdout:
            seen += line
            if text in line:
                return seen
        raise AssertionError(f"the launch never said {text!r}:\n{seen}")

    def wait_for_pids(self, count: int) -> None:
        """Returns when so many processes have said that they run."""
        while len(self.started_pids()) < count:
            assert self.process.poll() is None, self.process.communicate()[0]
            time.sleep(0.05)

    def finish(self) -> tuple[int, str]:
        """Exit status and the rest of the output."""
        rest, _ = self.process.communicate(timeout=240)
        return self.process.returncode, rest

    def started_pids(self) -> list[int]:
        """Every process that services and training say they started, themselves included."""
        pids = self.folder / "pids"
        return [int(pid) for pid in pids.read_text().split()] if pids.exists() else []

    def still_running(self) -> list[int]:
        return [pid for pid in self.started_pids() if psutil.pid_exists(pid)]


@pytest.fixture
def start_launch(tmp_path: Path, character_model: Path) -> Iterator[Callable[..., FakeLaunch]]:
    started: list[FakeLaunch] = []

    def start(*, folder: Path = tmp_path, steps: int = 10, **options: object) -> FakeLaunch:
        folder.mkdir(exist_ok=True)
        script = str(HERE / "run_fake_launch.py")
        arguments = [str(character_model), str(folder), str(steps), json.dumps(options)]
        process = subprocess.Popen(
            [sys.executable, script, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        started.append(FakeLaunch(process, folder))
        return started[-1]

    yield start
    for launch in started:
        with launch.process:
            launch.process.kill()


@pytest.fixture
def start_real() -> Iterator[StartLaunch]:
    """Starts `openrlhf-alp launch`; what still runs at the end of the test is ended."""
    started: list[RealLaunch] = []

    def start(*arguments: str, **options: Any) -> RealLaunch:
        started.append(RealLaunch(*arguments, **options))
        return started[-1]

    yield start
    for launch in started:
        launch.process.terminate()
        launch.process.communicate(timeout=60)
