"""The folder that holds slots' working folders at the levels that cannot mount private ones."""

import os
import shutil
import tempfile
from pathlib import Path

from services.tool.sandbox.host import locked_folders

_PREFIX = "tool-service-"


class WorkRoot:
    """A fresh folder, ours until `remove`; what killed services left is removed."""

    def __init__(self) -> None:
        parent = Path(tempfile.gettempdir())
        for folder in locked_folders.abandoned(parent, _PREFIX):
            shutil.rmtree(folder, ignore_errors=True)
        self.path, self._lock = locked_folders.make(parent, _PREFIX)
        # Slots of level uid pass through as other users; nobody may list what is in here.
        self.path.chmod(0o711 if os.geteuid() == 0 else 0o700)

    def empty(self) -> None:
        """Remove the slots' folders; their processes must be dead."""
        for folder in self.path.iterdir():
            shutil.rmtree(folder, ignore_errors=True)

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
