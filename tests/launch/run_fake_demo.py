"""Runs the demo on fakes: `run_fake_demo.py SERVICE_MODE TRAIN_MODE MODEL_FOLDER FOLDER`."""

import sys
from pathlib import Path

HERE = Path(__file__).parent


def main(service_mode: str, train_mode: str, model: str, folder: str) -> int:
    # Not above: the reward's worker processes import this file, and need none of it.
    from rich.console import Console

    from openrlhf_alp.launch.demo import DemoCommands, run_demo
    from openrlhf_alp.launch.recipe import DemoConfig
    from openrlhf_alp.launch.view import DemoView

    pids = Path(folder) / "pids"

    def service(*, model: Path, url_file: Path, seed: int) -> list[str]:
        script = str(HERE / "fake_service.py")
        flags = ["--url-file", str(url_file), "--pids", str(pids), "--mode", service_mode]
        return [sys.executable, script, *flags]

    def train(config: DemoConfig, *, run_folder: Path, train_data: Path, **_: object) -> list[str]:
        script = str(HERE / "fake_train.py")
        metrics = str(run_folder / "metrics.jsonl")
        flags = ["--metrics", metrics, "--train-data", str(train_data), "--pids", str(pids)]
        return [sys.executable, script, *flags, "--mode", train_mode]

    config = DemoConfig(
        steps=10,
        method="seq-alp",
        model=model,
        seed=0,
        output=Path(folder) / "run",
        overwrite=False,
    )
    return run_demo(config, DemoView(Console()), DemoCommands(service=service, train=train))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
