"""Examples for the OpenAPI document, one per status, and the function-calling schema."""

from typing import Any

FUNCTION_SCHEMA: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "code_interpreter",
        "description": "Run Python code in a fresh sandbox and return what it prints. numpy, sympy "
        "and scipy are available; there is no network and no state between calls.",
        "parameters": {
            "type": "object",
            "properties": {
                "code": {"type": "string", "description": "Python code; print what you need"}
            },
            "required": ["code"],
        },
    },
}


def _result(status: str, **fields: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "status": status,
        "exit_code": None,
        "signal": None,
        "error": None,
        "message": "",
        "stdout": "",
        "stderr": "",
        "stdout_truncated": False,
        "stderr_truncated": False,
        "files": {},
        "missing": {},
        "usage": {"wall_ms": 2.1, "cpu_ms": 1.8, "peak_mb": 33.0, "queue_ms": 0.0},
        "isolation": "full",
        "request_id": None,
    }
    return {"summary": status, "value": base | fields}


_ERROR = {"type": "ZeroDivisionError", "message": "division by zero", "line": 1}
_KILLED = {"signal": "SIGKILL"}
_BY_STATUS = {
    "ok": _result("ok", exit_code=0, stdout="2\n"),
    "error": _result("error", exit_code=1, error=_ERROR, stderr="Traceback ..."),
    "exit": _result("exit", exit_code=3),
    "timeout": _result("timeout", message="timeout exceeded", stdout="so far\n", **_KILLED),
    "cpu_limit": _result("cpu_limit", signal="SIGXCPU", message="cpu limit of 2 s exceeded"),
    "memory_limit": _result("memory_limit", message="memory limit exceeded", **_KILLED),
    "output_limit": _result(
        "output_limit", message="output_limit exceeded", stdout_truncated=True, **_KILLED
    ),
    "crashed": _result("crashed", signal="SIGSEGV", message="killed by SIGSEGV"),
    "rejected": _result("rejected", message="files: File name too long"),
    "sandbox_error": _result(
        "sandbox_error",
        message="the sandbox process died while the code ran; a retry runs it again",
    ),
    "overloaded": _result("overloaded", message="512 executions are already waiting"),
}
EXECUTE_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {"examples": _BY_STATUS}}}
}
BATCH: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "One JSON object per line (BatchItem), in the order they finish",
        "content": {"application/x-ndjson": {"schema": {"type": "string"}}},
    }
}
