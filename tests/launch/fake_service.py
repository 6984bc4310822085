"""A rollout service that can add, once a training run has logged steps; before, it answers "0".

Token ids are character codes. Like vLLM it starts a helper in a session of its own.
"""

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import uvicorn
from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response

from services.common.routes import WireRoute, reply
from services.common.serve import bind_socket, bound_url, write_url_file
from services.rollout.wire.schemas import GenerateRequest, GenerateResponse, Sample, Span, Timings

EOS = 1
MODES = ("ok", "dies", "dies_when_asked", "hangs_when_asked", "never_ready", "stubborn")


def create_app(metrics: Path, mode: str) -> FastAPI:
    router = APIRouter(route_class=WireRoute)

    @router.post("/v1/generate")
    async def generate(body: GenerateRequest, request: Request) -> Response:
        if mode == "dies_when_asked":
            os.kill(os.getpid(), signal.SIGSEGV)
        if mode == "hangs_when_asked":
            await asyncio.sleep(600)
        question = "".join(map(chr, body.token_ids))
        first, second = map(int, re.findall(r"\d+", question))
        answer = str(first + second) if metrics.exists() else "0"
        token_ids = [*map(ord, answer), EOS]
        sample = Sample(
            token_ids=token_ids,
            logprobs=[-0.5] * len(token_ids),
            finish_reason="stop",
            stop_reason=None,
            spans=[Span(version=1, digest="d", start=0, end=len(token_ids))],
        )
        answers = GenerateResponse(
            request_id=body.request_id,
            samples=[sample] * body.n,
            contract_hash="c",
            version=1,
            timings=Timings(total_s=0.0),
        )
        return reply(request, answers)

    app = FastAPI()
    app.include_router(router)
    return app


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--url-file", type=Path, required=True)
    parser.add_argument("--pids", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--mode", choices=MODES, required=True)
    arguments = parser.parse_args()
    if arguments.mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if arguments.mode == "dies":
        sys.exit("error: no such model folder; fix: name another")
    helper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE,
                              start_new_session=True)  # fmt: skip
    with arguments.pids.open("a") as file:
        file.write(f"{psutil.Process().pid}\n{helper.pid}\n")
    if arguments.mode == "never_ready":
        signal.pause()
    sock = bind_socket("127.0.0.1", arguments.port)
    write_url_file(arguments.url_file, bound_url(sock))
    app = create_app(arguments.url_file.parents[1] / "metrics.jsonl", arguments.mode)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    if arguments.mode == "stubborn":
        server.install_signal_handlers = lambda: None
        asyncio.run(server._serve(sockets=[sock]))
    server.run(sockets=[sock])
