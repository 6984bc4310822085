# ruff: noqa: E501 - programs are easier to compare when each of their lines is one line here
"""One row of the threat list, and the two kinds of rows that come often."""

from dataclasses import dataclass, field

ALL = ("full", "uid", "basic")
FORKING = ("full", "uid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Threat:
    """One program and the answer that is right at the given levels."""

    row: str
    code: str
    expect: tuple[str, ...] = ("ok",)
    says: str | None = None
    errors: tuple[str, ...] = ()
    """Exception types that are right when the status is `error`; empty accepts any."""
    signal: str | None = None
    levels: tuple[str, ...] = ALL
    stdin: str = ""
    files: dict[str, str] = field(default_factory=dict)
    x86_only: bool = False


def denied(row: str, body: str, levels: tuple[str, ...] = ALL) -> Threat:
    """A statement that has to raise OSError."""
    code = f"try:\n    {body}\nexcept OSError:\n    print('denied')\nelse:\n    print('ALLOWED')\n"
    return Threat(row=row, code=code, says="denied\n", levels=levels)


def system_call(row: str, *calls: str) -> list[Threat]:
    """System calls of x86_64 by number and arguments that have to fail with EPERM or ENOSYS."""
    code = (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "result = libc.syscall({call})\nnumber = ctypes.get_errno()\n"
        "print('denied' if result == -1 and number in (1, 38) else f'ALLOWED {{result}} {{number}}')\n"
    )
    return [
        Threat(row=f"{row}-{call}", code=code.format(call=call), says="denied\n", x86_only=True)
        for call in calls
    ]
