"""What a fenced slot does: say that it is ready, take one job from its socket, hand it to the part
that runs it."""

import gc
import json
import os
import resource
import sys
from typing import NoReturn

from services.tool.sandbox import wire
from services.tool.sandbox.inside import harness, keeper

_READY = wire.encode({"ready": True})
_STARTED = wire.encode({"started": True})
_EMPTY_JOB = json.dumps({"mode": "run", "code": "0", "files": {}, "fetch": [], "seed": None})


def rehearse() -> None:
    """Read and run an empty job, without its end.

    Many times in a zygote: the interpreter's caches settle, which a child would copy to change
    them. Once in a waiting slot: it then has copies of the memory that every program touches.
    """
    job = wire.decode(_EMPTY_JOB.encode())
    harness.write_files("/", job["files"])
    harness.execute(job["code"], harness.new_main(), harness.MAIN)
    harness.flush_streams()


def serve(job_fd: int, place: harness.Place) -> NoReturn:
    """Wait for a job and run it. Never returns.

    A job has: mode (run or session), code, files {path: base64}, fetch [path], fetch_bytes,
    memory_bytes, cpu_s, seed.
    """
    harness.reseed(None)
    rehearse()
    os.write(job_fd, _READY)
    try:
        job = wire.receive(job_fd)
    except EOFError:
        os._exit(0)  # the slot was not needed
    gc.enable()
    data = place.baseline_bytes + job["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    if job["seed"] is not None:
        harness.reseed(job["seed"])
    sys.path.insert(0, place.home)
    try:
        harness.write_files(place.home, job["files"])
    except OSError as error:
        wire.send(job_fd, {"refused": f"files: {error.strerror or error}"})
        os._exit(1)
    if job["mode"] == "session":
        keeper.serve(job_fd, place)
    os.write(job_fd, _STARTED)  # from here on foreign code may write on this socket as well
    if job["fetch"]:
        keeper.run_and_collect(job_fd, job, place)
    harness.run_program(job, place, lambda report: wire.send(job_fd, report))
