"""Figures of matplotlib as PNG files: a backend whose `plt.show()` saves them for a request.

matplotlib finds this module by name in MPLBACKEND (host/launcher_handle.py) and takes from it
`FigureCanvas` and `show`. Figures go into a folder beside the working folder, from which the
supervisor takes them. A program that uses another backend has those saved that are open at its end.
"""

import contextlib
import os
import sys
import warnings
from posix import getpid  # a snippet may replace os.getpid
from typing import Any

from services.tool.sandbox.inside import files

BACKEND = f"module://{__name__}"
asked: list[tuple[int, str]] = []
"""Process and working folder of the program that the request is for, if it asks for figures."""


def ask(wanted: bool, home: str) -> None:
    """Say whether figures of the program or cell that starts now are asked for."""
    if wanted or asked:  # otherwise no page is touched
        asked[:] = [(getpid(), home)] if wanted else []


def __getattr__(name: str) -> Any:
    # Late, because most programs never import matplotlib.
    if name == "FigureCanvas":
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        globals()[name] = FigureCanvasAgg  # matplotlib also reads it from the module's names
        return FigureCanvasAgg
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def show(*_: Any, **__: Any) -> None:
    """`plt.show()`: save every open figure, then close it, as closing its window would."""
    if asked:
        _save_all()


def save_open() -> None:
    """Save the figures that a program or cell has left open. Its forked children do nothing."""
    if asked and asked[0][0] == getpid() and "matplotlib._pylab_helpers" in sys.modules:
        _save_all()


def _save_all() -> None:
    from matplotlib._pylab_helpers import Gcf

    errors = []
    for manager in Gcf.get_all_fig_managers():
        # Whole or not at all, also when the program is killed meanwhile.
        unfinished = files.figure_path(asked[0][1], -getpid())
        try:
            manager.canvas.figure.savefig(unfinished, format="png")
            _number(unfinished)
        except Exception as error:
            errors.append(error)  # the other figures are saved all the same
        finally:
            Gcf.destroy(manager)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unfinished)
    if errors:
        raise errors[0]


def _number(unfinished: str) -> None:
    """Give a saved figure the next number."""
    for number in range(1, files.MAX_FIGURES + 1):
        with contextlib.suppress(FileExistsError):
            return os.link(unfinished, files.figure_path(asked[0][1], number))
    message = f"more than {files.MAX_FIGURES} figures: the rest is not kept"
    warnings.warn(message, RuntimeWarning, stacklevel=5)  # where the program calls plt.show()
