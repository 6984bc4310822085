"""What a fenced slot does: say that it is ready, take one job from its socket, hand it to the part
that runs it."""

import gc
import os
import resource
import site
import socket
import sys
from typing import NoReturn

from services.tool.sandbox import harness, keeper, wire


def serve(job_socket: socket.socket, place: harness.Place) -> NoReturn:
    """Wait for a job and run it. Never returns.

    A job has: mode (run or session), code, files {path: base64}, fetch [path], fetch_bytes,
    memory_bytes, cpu_s, seed.
    """
    wire.send(job_socket, {"ready": True})
    try:
        job = wire.receive(job_socket)
    except EOFError:
        os._exit(0)  # the slot was not needed
    gc.enable()
    data = place.baseline_bytes + job["memory_bytes"]
    resource.setrlimit(resource.RLIMIT_DATA, (data, data))
    harness.reseed(job["seed"])
    sys.argv = [harness.MAIN]
    sys.path.insert(0, place.home)
    site.setquit()
    try:
        harness.write_files(place.home, job["files"])
    except OSError as error:
        wire.send(job_socket, {"refused": f"files: {error.strerror or error}"})
        os._exit(1)
    if job["mode"] == "session":
        keeper.serve(job_socket, place)
    if job["fetch"]:
        keeper.run_and_collect(job_socket, job, place)
    harness.run_program(job, place, lambda report: wire.send(job_socket, report))
