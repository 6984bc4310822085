"""Run a command as root or as an ordinary user, alone in a pid namespace.

The interpreter may live below a folder that only root can enter. In the command's own mount
namespace that folder is then replaced by an empty one that shows nothing but the interpreter.
"""

import os
import shutil
import sys
from pathlib import Path

ORDINARY_ID = 65534

_SCRIPT = """
set -e
if [ -n "$CLOSED" ]; then
    hold=$(mktemp -d)
    mount --bind "$PREFIX" "$hold"
    mount -t tmpfs -o mode=755 tmpfs "$CLOSED"
    mkdir -p "$PREFIX"
    mount --bind "$hold" "$PREFIX"
    umount "$hold"
    rmdir "$hold"
fi
if [ "$AS_ROOT" = 1 ]; then exec "$@"; fi
exec setpriv --reuid {user} --regid {user} --clear-groups "$@"
"""


def unavailable(user: str) -> str | None:
    """Why commands cannot be run as `user` ("root" or "ordinary") here, or None."""
    if os.geteuid() != 0:
        return None if user == "ordinary" else "the tests do not run as root"
    missing = [tool for tool in ("unshare", "setpriv", "mount") if shutil.which(tool) is None]
    return f"no {', '.join(missing)} (util-linux)" if missing else None


def command(user: str, argv: list[str]) -> list[str]:
    """The command line that runs `argv` as `user`, when `unavailable` says nothing against it."""
    unshare = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    if os.geteuid() != 0:
        return [*unshare, "--user", "--map-current-user", *argv]
    script = _SCRIPT.format(user=ORDINARY_ID)
    return [*unshare, "--mount", "sh", "-c", script, "sh", *argv]


def environment(user: str) -> dict[str, str]:
    """Environment for `command`."""
    prefix = Path(sys.base_prefix)
    closed = next(
        (str(p) for p in reversed([prefix, *prefix.parents]) if not p.stat().st_mode & 0o001), ""
    )
    extra = {"PREFIX": str(prefix), "CLOSED": closed, "AS_ROOT": "1" if user == "root" else "0"}
    return {**os.environ, **extra}
