"""Charts as plotly figures: traces and layout as JSON, without colors of the theme, which the page
sets from its style sheet."""

import html
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openrlhf_alp.report.compare.charts import (
    PIECE_COLORS,
    Bars,
    Chart,
    Line,
    Panel,
    y_range,
)

_PANEL_PX, _GAP_PX, _ROW_PX, _TOP_PX, _BOTTOM_PX = 270, 64, 26, 40, 52
_BARE_TOP_PX = 12
"""Above panels without a title or legend."""
_GAP_X = 0.16
"""Between two panels, over the number of columns."""


def plotly_figure(chart: Chart, colors: Mapping[str, str]) -> dict[str, Any]:
    """`key`, `data` and `layout` of one chart; empty panels are left out."""
    panels = [panel for panel in chart.panels if not panel.is_empty]
    limits = chart.y_limits or y_range(panels, chart.log_y)
    # A logarithmic axis cannot draw the part of a band at or below 0.
    floor = limits[0] / 10 if limits and chart.log_y else -math.inf
    grid = _Grid(num_panels=len(panels), num_columns=chart.num_columns, panel_px=_tallest(panels))
    has_head = any(panel.title or panel.bars for panel in panels)
    top_px = _TOP_PX if has_head else _BARE_TOP_PX
    layout: dict[str, Any] = {
        "height": grid.height_px + top_px + _BOTTOM_PX,
        "margin": {"l": 64, "r": 16, "t": top_px, "b": _BOTTOM_PX},
        "barmode": "stack",
        "showlegend": any(panel.bars for panel in panels),
        "annotations": [],
    }
    data: list[dict[str, Any]] = []
    for place, panel in enumerate(panels):
        axis = "" if place == 0 else str(place + 1)
        across, down = grid.domains(place)
        x, y = _axes(chart, panel, limits)
        if not grid.is_last_row(place):
            del x["title"]
        if across[0] > 0:
            y.pop("title", None)
        layout[f"xaxis{axis}"] = {**x, "domain": across, "anchor": f"y{axis}"}
        layout[f"yaxis{axis}"] = {**y, "domain": down, "anchor": f"x{axis}"}
        layout["annotations"].append(_title(panel.title, across[0], down[1]))
        on = {"xaxis": f"x{axis}", "yaxis": f"y{axis}"}
        data += [{**trace, **on} for trace in _traces(panel, colors, floor)]
    return {"key": chart.key, "data": data, "layout": layout}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Grid:
    """Where panels stand: shares of the figure's width and height, from the lower left corner."""

    num_panels: int
    num_columns: int
    panel_px: int

    @property
    def columns(self) -> int:
        return min(self.num_columns, self.num_panels)

    @property
    def height_px(self) -> int:
        rows = math.ceil(self.num_panels / self.columns)
        return rows * self.panel_px + (rows - 1) * _GAP_PX

    def domains(self, place: int) -> tuple[list[float], list[float]]:
        """From left to right and from bottom to top."""
        row, column = divmod(place, self.columns)
        gap = _GAP_X / self.columns
        width = (1 - (self.columns - 1) * gap) / self.columns
        left = column * (width + gap)
        top = 1 - row * (self.panel_px + _GAP_PX) / self.height_px
        return [left, left + width], [max(0.0, top - self.panel_px / self.height_px), top]

    def is_last_row(self, place: int) -> bool:
        return place + self.columns >= self.num_panels


def _tallest(panels: Sequence[Panel]) -> int:
    return max(_panel_px(panel) for panel in panels)


def _panel_px(panel: Panel) -> int:
    if panel.bars:
        return 30 + _ROW_PX * len(panel.bars.labels)
    if panel.points:
        return 30 + _ROW_PX * len(panel.points.labels)
    return _PANEL_PX


def _title(text: str, left: float, top: float) -> dict[str, Any]:
    return {
        "text": _plain(text),
        "x": left,
        "y": top,
        "xref": "paper",
        "yref": "paper",
        "xanchor": "left",
        "yanchor": "bottom",
        "yshift": 6,
        "showarrow": False,
        "font": {"size": 12.5},
    }


def _axes(
    chart: Chart, panel: Panel, limits: tuple[float, float] | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    x: dict[str, Any] = {"title": {"text": chart.x_title, "standoff": 8}, "zeroline": False}
    y: dict[str, Any] = {"zeroline": False}
    if chart.y_title:
        y["title"] = {"text": chart.y_title, "standoff": 8}
    if chart.ticks:
        x |= {"tickvals": [at for at, _ in chart.ticks], "ticktext": [t for _, t in chart.ticks]}
        x["tickangle"] = -40
    if panel.bars or panel.points:
        return x, {**y, "autorange": "reversed", "automargin": True}
    if panel.heat:
        return {**x, "tickformat": "d"}, y
    if limits:
        low, high = limits
        y["range"] = [math.log10(low), math.log10(high)] if chart.log_y else [low, high]
    if chart.log_y:
        y |= {"type": "log", "exponentformat": "power"}
    return x, y


def _traces(panel: Panel, colors: Mapping[str, str], floor: float) -> Iterator[dict[str, Any]]:
    for line in panel.lines:
        yield from _line(line, colors[line.name], floor)
    if panel.bars:
        yield from _bars(panel.bars)
    if panel.heat:
        yield {
            "type": "heatmap",
            "x": panel.heat.x,
            "y": panel.heat.y,
            "z": panel.heat.z,
            "coloraxis": "coloraxis",
            "hovertemplate": "step %{x}, layer %{y}: %{z:+.3g} %<extra></extra>",
        }
    if panel.points:
        values = panel.points.values
        yield {
            "type": "scatter",
            "mode": "markers",
            "x": [value for value, _, _ in values],
            "y": list(map(_plain, panel.points.labels)),
            "marker": {"size": 9, "color": PIECE_COLORS[0]},
            "error_x": {
                "array": [high - value for value, _, high in values],
                "arrayminus": [value - low for value, low, _ in values],
                "thickness": 1.4,
                "color": PIECE_COLORS[0],
            },
            "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
        }


def _line(line: Line, color: str, floor: float) -> Iterator[dict[str, Any]]:
    same = {"type": "scatter", "mode": "lines", "legendgroup": line.name, "x": line.x}
    if line.low is not None and line.high is not None:
        yield {
            **same,
            "x": [*line.x, *reversed(line.x)],
            "y": _rounded([max(y, floor) for y in (*line.high, *reversed(line.low))]),
            "fill": "toself",
            "fillcolor": _faint(color),
            "line": {"width": 0},
            "hoverinfo": "skip",
            "meta": line.name,
        }
    few = len(line.x) <= 24 and line.style == "solid"
    yield {
        **same,
        "mode": "lines+markers" if few else "lines",
        # A gap stands where a logarithmic axis has no place for the value, such as a norm of 0.
        "y": [y if y > floor else None for y in _rounded(line.y)],
        "name": _plain(line.name),
        "meta": line.name,
        "marker": {"size": 4},
        "line": {"color": color, "width": 2 if line.style == "solid" else 1.3, "dash": line.style},
        "hovertemplate": "%{y:.4g}<extra>" + _plain(line.name) + "</extra>",
    }


def _bars(bars: Bars) -> Iterator[dict[str, Any]]:
    for place, (name, lengths) in enumerate(bars.pieces):
        yield {
            "type": "bar",
            "orientation": "h",
            "name": _plain(name),
            "x": _rounded(lengths),
            "y": list(map(_plain, bars.labels)),
            "marker": {"color": PIECE_COLORS[place % len(PIECE_COLORS)]},
            "hovertemplate": "%{y}: %{x:.3g}<extra>" + _plain(name) + "</extra>",
        }


def _plain(text: str) -> str:
    """Text that plotly takes as it is: it knows some tags, and fills in what stands in %{}."""
    return html.escape(text, quote=False).replace("%{", "%&#123;")


def _rounded(values: Sequence[float]) -> list[float]:
    # Six digits are finer than a pixel, and halve the page.
    return [float(f"{value:.6g}") for value in values]


def _faint(color: str) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.16)"
