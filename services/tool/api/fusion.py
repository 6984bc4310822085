"""SandboxFusion's wire contract, so that its clients (its own SDK, verl) work unchanged.

    POST /run_code      one program       POST /run_jupyter   several cells, one fresh interpreter
    GET  /v1/ping       "pong"

Its conventions are kept: HTTP 200 whatever the code did; `stdout` and `stderr` are never null; a
timeout has no return code. verl's client retries on 504 alone, so a service whose queue is full
answers that here. It retries twice only, so a program that has a place in the queue waits for its
turn, however long that takes.
"""

import base64
import logging
import signal
import time
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from services.common.errors import ErrorSpec
from services.common.json_body import JsonRoute
from services.common.routes import answer_patiently, while_connected
from services.common.wire import Number, Whole
from services.tool.rules import LimitError, OverloadedError
from services.tool.sandbox.host.session import SessionFileError, SessionLostError
from services.tool.service import ToolService
from services.tool.sessions import OPENING_ERRORS, SessionsFullError
from services.tool.settings import ToolSettings
from services.tool.wire.schemas import (
    Base64Text,
    CellRequest,
    CellResult,
    ExecuteRequest,
    ExecuteResult,
    SafePath,
    SessionRequest,
)

Language = Literal[
    "python", "cpp", "nodejs", "go", "go_test", "java", "php", "csharp", "bash", "typescript",
    "sql", "rust", "cuda", "lua", "R", "perl", "D_ut", "ruby", "scala", "julia", "pytest", "junit",
    "kotlin_script", "jest", "verilog", "python_gpu", "lean", "swift", "racket",
]  # fmt: skip

logger = logging.getLogger(__name__)

_PATIENCE_S = 1.0
_PATH = TypeAdapter(SafePath)
_CONTENT = TypeAdapter(Base64Text)
_ANCHORS = ("/mnt/", "/tmp/")
_BUSY = ErrorSpec(
    504,
    "overloaded",
    message="The code never ran: {error}.",
    fix="Retry later, or start the service with more --slots.",
    retry_after_s="{error.retry_after_s}",
)
_RESPONSES: dict[int | str, dict[str, Any]] = {504: {"description": "no slot became free: retry"}}


class _Request(BaseModel):
    """Fields of both requests; fields that SandboxFusion does not know are ignored, as there."""

    files: dict[str, str | None] = {}
    fetch_files: list[str] = []


class RunCodeRequest(_Request):
    """One program."""

    compile_timeout: Number = 10
    run_timeout: Number = Field(default=10, gt=0)
    memory_limit_MB: Whole = -1
    code: str = Field(examples=['print("hello")'])
    stdin: str | None = None
    language: Language = Field(examples=["python"])


class RunJupyterRequest(_Request):
    """Cells that share one fresh interpreter."""

    cells: list[str] = Field(examples=[["x = 1", "print(x)"]])
    cell_timeout: Number = 0
    """Seconds per cell; 0 or less leaves only the total."""
    total_timeout: Number = Field(default=45, gt=0)
    kernel: Literal["python3"] = "python3"


class CommandRunResult(BaseModel):
    """What one command did."""

    status: Literal["Finished", "Error", "TimeLimitExceeded"]
    execution_time: float | None = None
    return_code: int | None = None
    stdout: str = ""
    stderr: str = ""


class CellRunResult(BaseModel):
    """What one cell printed, displayed and raised."""

    stdout: str
    stderr: str
    display: list[dict[str, Any]]
    error: list[dict[str, Any]]


class _Response(BaseModel):
    """Fields of both answers."""

    status: Literal["Success", "Failed", "SandboxError"]
    message: str
    executor_pod_name: str | None = None
    files: dict[str, str] = {}


class RunCodeResponse(_Response):
    """What one program did."""

    compile_result: CommandRunResult | None = None
    run_result: CommandRunResult | None = None


class RunJupyterResponse(_Response):
    """Answers of the cells that ran."""

    driver: CommandRunResult | None = None
    cells: list[CellRunResult] = []


def fusion_routes(service: ToolService) -> APIRouter:
    """Routes of SandboxFusion's contract."""
    router = APIRouter(route_class=JsonRoute, tags=["SandboxFusion"])

    @router.post("/run_code", responses=_RESPONSES, response_model=RunCodeResponse)
    async def run_code(body: RunCodeRequest, request: Request) -> Any:
        """Run one program. Languages other than python are answered as not enabled."""
        # Before the client's own read timeout, which verl sets to 10 s more than these.
        after_s = max(_PATIENCE_S, (body.compile_timeout + body.run_timeout) / 2)
        work = _run_program(body, service)
        try:
            return await answer_patiently(request, work, after_s=after_s, failed=_failed)
        except OverloadedError as error:
            raise _BUSY.fill(error) from error

    @router.post("/run_jupyter", responses=_RESPONSES)
    async def run_jupyter(body: RunJupyterRequest, request: Request) -> RunJupyterResponse:
        """Run cells one after the other in one fresh interpreter, until one exceeds a limit."""
        try:
            return await while_connected(request, _run_cells(body, service))
        except (OverloadedError, SessionsFullError) as error:
            raise _BUSY.fill(error) from error
        except (LimitError, ValidationError, SessionFileError, *OPENING_ERRORS) as error:
            return RunJupyterResponse(status="SandboxError", message=str(error))

    @router.get("/v1/ping")
    async def ping() -> str:
        """Whether the service answers, as SandboxFusion says it."""
        return "pong"

    return router


async def _run_program(body: RunCodeRequest, service: ToolService) -> RunCodeResponse:
    if body.language != "python":
        message = f"language {body.language} is not enabled here, only python is"
        return RunCodeResponse(status="SandboxError", message=message)
    try:
        return to_fusion(await service.execute(to_native(body, service.settings)))
    except (LimitError, ValidationError) as error:
        return RunCodeResponse(status="SandboxError", message=str(error))


def _failed(error: Exception) -> RunCodeResponse:
    """The answer when nothing but a body can be sent any more."""
    if not isinstance(error, OverloadedError):
        logger.error("an execution failed", exc_info=error)
        return RunCodeResponse(status="SandboxError", message="the service failed, see its log")
    return RunCodeResponse(status="SandboxError", message=f"the code never ran: {error}")


def to_native(body: RunCodeRequest, settings: ToolSettings) -> ExecuteRequest:
    """Translate a request. Raises ValidationError for paths or contents that are refused."""
    memory = body.memory_limit_MB if body.memory_limit_MB > 0 else settings.default_memory_mb
    # Paths and contents are checked above; a second validation would decode all files again.
    return ExecuteRequest.model_construct(
        code=body.code,
        stdin=body.stdin or "",
        files=_checked_files(body.files),
        fetch=[_checked_path(path) for path in body.fetch_files],
        timeout_s=min(body.run_timeout, settings.max_timeout_s),
        cpu_s=None,
        memory_mb=min(memory, settings.max_memory_mb),
        output_bytes=None,
        seed=None,
        deadline_s=settings.run_code_wait_s,
        figures=False,
        request_id=None,
    )


def to_fusion(result: ExecuteResult) -> RunCodeResponse:
    """Translate a result."""
    if result.status in ("sandbox_error", "rejected", "overloaded"):
        return RunCodeResponse(status="SandboxError", message=result.message)
    timed_out = result.status in ("timeout", "cpu_limit")
    stderr = result.stderr
    if result.message:
        line_break = "" if not stderr or stderr.endswith("\n") else "\n"
        stderr = f"{stderr}{line_break}sandbox: {result.message}\n"
    run = CommandRunResult(
        status="TimeLimitExceeded" if timed_out else "Finished",
        execution_time=result.usage.wall_ms / 1e3,
        return_code=None if timed_out else _return_code(result),
        stdout=result.stdout,
        stderr=stderr,
    )
    status: Literal["Success", "Failed"] = "Success" if result.status == "ok" else "Failed"
    return RunCodeResponse(status=status, message="", run_result=run, files=result.files)


def _return_code(result: ExecuteResult) -> int:
    if result.exit_code is not None:
        return result.exit_code
    # As subprocess reports it: minus the number of the signal.
    name = result.signal or "SIGKILL"
    return -int(getattr(signal, name, signal.SIGKILL))


def _checked_path(path: str) -> str:
    # SandboxFusion also takes these absolute folders; only what follows them is a path to check.
    for anchor in _ANCHORS:
        if path.startswith(anchor):
            return anchor + _PATH.validate_python(path.removeprefix(anchor))
    return _PATH.validate_python(path.removeprefix("./"))


def _checked_files(files: dict[str, str | None]) -> dict[str, str]:
    return {
        _checked_path(path): _CONTENT.validate_python(content)
        for path, content in files.items()
        if content is not None
    }


async def _run_cells(body: RunJupyterRequest, service: ToolService) -> RunJupyterResponse:
    files = _checked_files(body.files)
    fetch = [_checked_path(path) for path in body.fetch_files]
    service.rules.check_files(files)
    session = await service.sessions.open(SessionRequest())
    started = time.perf_counter()
    cells: list[CellRunResult] = []
    fetched: dict[str, str] = {}
    last: CellResult | None = None
    try:
        for path, content in files.items():
            await session.sandbox.write_file(path, base64.b64decode(content))
        for code in body.cells:
            left_s = body.total_timeout - (time.perf_counter() - started)
            # A cell that starts after the total has passed gets a timeout that ends it at once.
            cell_s = body.cell_timeout if body.cell_timeout > 0 else left_s
            wall_s = min(left_s, cell_s, service.settings.max_timeout_s)
            request = CellRequest(code=code, timeout_s=max(wall_s, 0.001), figures=True)
            last = await service.sessions.run_cell(session.session_id, request)
            cells.append(_to_cell(last))
            if last.status in ("timeout", "sandbox_error", "memory_limit"):
                break
        for path in fetch:
            try:
                content_bytes = await session.sandbox.read_file(path)
            except (SessionFileError, SessionLostError):
                continue  # as in SandboxFusion, a file that does not exist is left out
            fetched[path] = base64.b64encode(content_bytes).decode("ascii")
    finally:
        if session.sandbox.alive:
            service.sessions.end(session.session_id, "its request is done")
    timed_out = last is not None and last.status == "timeout"
    driver = CommandRunResult(
        status="TimeLimitExceeded" if timed_out else "Finished",
        execution_time=time.perf_counter() - started,
        return_code=None if timed_out else 0,
    )
    return RunJupyterResponse(
        status="Failed" if timed_out else "Success",
        message="",
        driver=driver,
        cells=cells,
        files={} if timed_out else fetched,
    )


def _to_cell(result: CellResult) -> CellRunResult:
    errors: list[dict[str, Any]] = []
    if result.error is not None:
        trace = result.stderr.splitlines()
        errors.append(
            {"ename": result.error.type, "evalue": result.error.message, "traceback": trace}
        )
    elif result.status != "ok":
        errors.append({"ename": result.status, "evalue": result.message, "traceback": []})
    display = [{"image/png": content} for content in result.files.values()]
    if result.result is not None:
        display.insert(0, {"text/plain": result.result})
    return CellRunResult(stdout=result.stdout, stderr=result.stderr, display=display, error=errors)
