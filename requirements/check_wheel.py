"""Build the wheel, check what it holds, and use it in an empty environment: `make check-wheel`.

Everything happens in a temporary folder; the environment that runs this needs only the standard
library. Downloads go through pip's own configuration.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
from collections.abc import Mapping
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
TOOLS = ("build==1.6.1", "check-wheel-contents==0.6.3", "setuptools==77.0.3", "wheel==0.48.0")
START_S = 60.0

UNWANTED = ("torch", "vllm", "ray", "deepspeed", "openrlhf", "transformers")
"""What the tool service must not bring: its image would grow from 0.4 to 5 GB."""


def main() -> int:
    """Run every check; return the exit status."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        wheel = build_wheel(folder)
        python = new_environment(folder / "empty", f"{wheel}[tool]")
        check_installed(python)
        check_service(python, folder)
    print("check-wheel: the wheel is whole, and the tool service runs from it")
    return 0


def say(stage: str) -> None:
    print(f"check-wheel: {stage}", flush=True)


def new_environment(folder: Path, *wanted: str) -> Path:
    """Make a virtual environment with the packages `wanted`; return its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    lock = REPOSITORY / "requirements/cpu.lock"
    subprocess.run(
        [python, "-m", "pip", "install", "-qq", "--constraint", lock, *wanted], check=True
    )
    return python


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the files that git does not ignore and check its contents."""
    say("build")
    source = folder / "source"
    # A copy, because setuptools would also pack what an earlier build left in build/.
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        check=True,
    )
    for name in listed.stdout.decode().split("\0"):
        if (REPOSITORY / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, source / name)
    python = new_environment(folder / "tools", *TOOLS)
    command = ["-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source]
    subprocess.run([python, *command], check=True, stdout=subprocess.DEVNULL)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([folder / "tools/bin/check-wheel-contents", wheel], cwd=source, check=True)
    return wheel


def check_installed(python: Path) -> None:
    """Check the packages that came with the tool extra, and run the command line."""
    say("openrlhf-alp --help, in an environment with the extra `tool` only")
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], stdout=subprocess.PIPE, check=True
    )
    names = {package["name"] for package in json.loads(listed.stdout)}
    if found := names.intersection(UNWANTED):
        raise SystemExit(f"check-wheel: the extra `tool` brings {', '.join(sorted(found))}")
    subprocess.run(
        [python.parent / "openrlhf-alp", "--help"], check=True, stdout=subprocess.DEVNULL
    )


def check_service(python: Path, folder: Path) -> None:
    """Start the tool service and let it run a program."""
    say("the tool service")
    key = secrets.token_urlsafe()
    environment = {**os.environ, "OPENRLHF_ALP_TOOL_API_KEY": key}
    environment.pop("PYTHONPATH", None)  # the wheel is to be used, not a checkout
    url_file = folder / "url"
    command = [python, "-m", "services.tool", "--port", "0", "--url-file", url_file]
    service = subprocess.Popen(command, cwd=folder, env=environment)
    try:
        url = wait_for_url(service, url_file)
        answer = execute(url, key, {"code": "import numpy\nprint(numpy.arange(4).sum())"})
    finally:
        service.terminate()
        service.wait(START_S)
    if (answer["status"], answer["stdout"]) != ("ok", "6\n"):
        raise SystemExit(f"check-wheel: the program was answered {answer}")


def wait_for_url(service: subprocess.Popen[bytes], url_file: Path) -> str:
    deadline = time.monotonic() + START_S
    while not url_file.exists():
        if service.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"check-wheel: the tool service did not start in {START_S:.0f} s")
        time.sleep(0.1)
    return url_file.read_text().strip()


def execute(url: str, key: str, program: Mapping[str, str]) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/execute", json.dumps(program).encode(), headers)
    with urllib.request.urlopen(request, timeout=START_S) as reply:
        answer: dict[str, str] = json.load(reply)
    return answer


if __name__ == "__main__":
    sys.exit(main())
