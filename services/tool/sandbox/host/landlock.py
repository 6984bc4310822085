"""What slots may do with files, in the terms of the running kernel's Landlock.

The API process works it out, and slots only make the calls: the package that knows the rights would
map seven libraries into every fork.
"""

from py_landlock import AccessFs, LandlockError, landlock_sys
from py_landlock.abi import get_supported_fs, get_supported_net, get_supported_scope

from services.tool.sandbox.plan import LandlockRights

_READING = AccessFs.READ_FILE | AccessFs.READ_DIR
_SPECIAL_FILES = AccessFs.MAKE_CHAR | AccessFs.MAKE_BLOCK | AccessFs.MAKE_SOCK
_REFUSED = _SPECIAL_FILES | AccessFs.EXECUTE | AccessFs.IOCTL_DEV


def find_rights() -> LandlockRights:
    """Ask the kernel for its version of Landlock. Raises RuntimeError when it has none."""
    try:
        abi = landlock_sys.get_abi_version()
    except LandlockError as error:
        raise RuntimeError(f"the kernel has no Landlock: {error}") from error
    handled = get_supported_fs(abi)
    return LandlockRights(
        files=int(handled),
        network=int(get_supported_net(abi)),
        scopes=int(get_supported_scope(abi)),
        reading=int(_READING & handled),
        writing=int(handled & ~_REFUSED),
        devices=int((AccessFs.READ_FILE | AccessFs.WRITE_FILE) & handled),
        of_single_files=int(
            (AccessFs.READ_FILE | AccessFs.WRITE_FILE | AccessFs.TRUNCATE) & handled
        ),
    )
