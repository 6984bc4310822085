"""Runs a launch on fakes: `run_fake_launch.py MODEL_FOLDER FOLDER STEPS OPTIONS_AS_JSON`.

Options: `tool`, `rollout` and `train` are modes of the fake programs, `check` may be "hangs",
`resume` continues the run of an earlier call, `evaluate` is the code that evaluates step 2, or with
`after` the trained policy; its arguments are the file of process ids and the folder of results.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).parent
EVALUATE = {
    False: "[evaluate]\nsuite = ['x']\nbefore = false\nevery = 2\nafter = false\n",
    True: "[evaluate]\nsuite = ['x']\nbefore = false\n",
}
HANG = [sys.executable, "-c", "import signal; print(1, flush=True); signal.pause()"]


def main(model: str, folder: str, steps: str, text: str) -> int:
    # Not above: the reward's worker processes import this file, and need none of it.
    from rich.console import Console

    from openrlhf_alp.launch.commands import Commands
    from openrlhf_alp.launch.recipe import read_recipe
    from openrlhf_alp.launch.run import Options, launch
    from openrlhf_alp.launch.view import LaunchView

    options = json.loads(text)
    pids = Path(folder) / "pids"

    def service(kind):
        def command(recipe, *, url_file, port, **_):
            script = str(HERE / "fake_service.py")
            flags = ["--url-file", str(url_file), "--port", str(port), "--pids", str(pids)]
            return [sys.executable, script, *flags, "--mode", options.get(kind, "ok")]

        return command

    def train(recipe, inputs):
        script = str(HERE / "fake_train.py")
        flags = ["--run", str(inputs.folder), "--train-data", inputs.prompts, "--pids", str(pids)]
        flags += ["--resume"] if inputs.resume else []
        return [sys.executable, script, *flags, "--mode", options.get("train", "ok")]

    def evaluate(recipe, inputs, output):
        return [sys.executable, "-c", options["evaluate"], str(pids), str(output)]

    def check(plan, source, machine, supervisor):
        if options.get("check") == "hangs":
            print("checking", flush=True)
            log = Path(folder) / "check.log"
            supervisor.ended(supervisor.start("The check", HANG, log=log, grace_s=1.0))
        return replace(plan, shape={"batch_size": 8, "num_episodes": 1, "max_samples": 10**8})

    path = Path(folder) / "fake.toml"
    path.write_text(
        f'[run]\nseed = 0\nfolder = "{folder}/run"\n[model]\npath = "{model}"\n'
        f'[data]\ntask = "addition"\nsteps = {steps}\n[rollout]\nmax_restarts = 1\n'
        "[train]\nalp.method = 'seq-alp'\nrollout.max_new_tokens = 20\n"
        + ("[tool]\n" if "tool" in options else "")
        + (EVALUATE[options.get("after", False)] if "evaluate" in options else "")
    )
    recipe, source = read_recipe(path)
    fakes = Commands(
        rollout=service("rollout"), tool=service("tool"), train=train, evaluate=evaluate
    )
    resume = Path(folder) / "run" if options.get("resume") else None
    return launch(recipe, source, LaunchView(Console()), Options(resume=resume), fakes, check)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
