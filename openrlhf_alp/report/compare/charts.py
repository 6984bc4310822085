"""Charts as plain data, which the page (plotly) and the picture files (matplotlib) both draw."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One curve. `x`, `y`, `low` and `high` have the same length."""

    name: str
    """What the legend shows and switches: the method."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    """Lower edge of the band; None for a curve of one seed."""

    high: Sequence[float] | None = None
    style: Literal["solid", "dash", "dot"] = "solid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Horizontal stacked bars: one row per label, one piece per name."""

    labels: Sequence[str]
    pieces: Sequence[tuple[str, Sequence[float]]]
    """Name and its length in every row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heat:
    """A heat map; `z` has a row per y."""

    x: Sequence[float]
    y: Sequence[float]
    z: Sequence[Sequence[float | None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Points:
    """One row per label with a point and its interval."""

    labels: Sequence[str]
    values: Sequence[tuple[float, float, float]]
    """Value, low and high."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """One pair of axes."""

    title: str = ""
    lines: Sequence[Line] = ()
    bars: Bars | None = None
    heat: Heat | None = None
    points: Points | None = None

    @property
    def is_empty(self) -> bool:
        return not self.lines and self.bars is None and self.heat is None and self.points is None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One figure of the page; its panels share both axes' titles and the range of y."""

    key: str
    """Its anchor, and the name of its files."""

    title: str
    caption: str
    """What is drawn, where it comes from, how to read it."""

    x_title: str = "training step"
    y_title: str = ""
    panels: Sequence[Panel] = field(default_factory=list)
    paper: str = ""
    """Figure of arXiv 2603.19470 that shows the same, if there is one."""

    log_y: bool = False
    num_columns: int = 3
    """Panels side by side, where the page has room for them."""

    ticks: Sequence[tuple[float, str]] = ()
    """Where x has labels of its own."""

    y_limits: tuple[float, float] | None = None
    """None: what curves and seeds reach; a wide band is then cut off."""


COLORS = (
    *("#2563c9", "#d9730d", "#0f9d76", "#b4368f", "#8a6d1f", "#5b5fc7", "#c2352b", "#3a8fb7"),
    *("#6b7f2a", "#99578b", "#4d6a85", "#a35c1c"),
)
"""Of the methods of a page, in their order; distinguishable on white and on near-black."""

PIECE_COLORS = ("#2563c9", "#7aa7ea", "#0f9d76", "#e0a63a", "#d9730d", "#b4368f", "#8a93a3")
"""Of the pieces of stacked bars."""


def colors_of(methods: Sequence[str]) -> dict[str, str]:
    """The color of each method of a page."""
    return {name: COLORS[place % len(COLORS)] for place, name in enumerate(methods)}


def y_range(panels: Sequence[Panel], log: bool) -> tuple[float, float] | None:
    """What the curves themselves reach, with a margin: few seeds make bands that dwarf them."""
    values = [y for panel in panels for line in panel.lines for y in line.y if not log or y > 0]
    if not values:
        return None
    low, high = min(values), max(values)
    if log:
        return low / 1.6, high * 1.6
    margin = 0.12 * (high - low) or max(abs(high), 1.0) * 0.1
    return low - margin, high + margin
