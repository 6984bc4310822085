"""Charts as PNG and SVG files, for papers and slides."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from openrlhf_alp.report.compare.charts import PIECE_COLORS, Chart, Panel, y_range

_PANEL_INCHES = (3.6, 2.7)
_ROW_INCHES = 0.28
_DPI = 130
_STYLES = {"solid": "-", "dash": "--", "dot": ":"}


def write_pictures(charts: Sequence[Chart], colors: Mapping[str, str], folder: Path) -> list[Path]:
    """Writes KEY.png and KEY.svg of every chart into `folder` and returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    # Text stays text in an SVG: smaller, and it can be searched and edited.
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 8.5}):
        for chart in charts:
            figure = _draw(chart, colors)
            paper = f" (arXiv 2603.19470: {chart.paper})" if chart.paper else ""
            about = {"Title": f"{chart.title}{paper}", "Description": chart.caption}
            for suffix in ("png", "svg"):
                paths.append(folder / f"{chart.key}.{suffix}")
                figure.savefig(paths[-1], dpi=_DPI, metadata=about)
    return paths


def _draw(chart: Chart, colors: Mapping[str, str]) -> Figure:
    panels = [panel for panel in chart.panels if not panel.is_empty]
    columns = min(chart.num_columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    tallest = max(_num_rows(panel) for panel in panels)
    width, height = _PANEL_INCHES
    height = 0.9 + _ROW_INCHES * tallest if tallest else height
    # Bars have long labels beside them.
    size = (7.4 if tallest else width * columns + 0.3, height * rows + 0.3)
    # Without pyplot: it keeps global state, may want a display and is not safe in threads.
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    limits = chart.y_limits or y_range(panels, chart.log_y)
    for place, axes in enumerate(grid.ravel().tolist()):
        if place >= len(panels):
            axes.set_axis_off()
            continue
        _draw_panel(axes, panels[place], chart, colors, limits)
        axes.set_xlabel(chart.x_title)
        if place % columns == 0:
            axes.set_ylabel(chart.y_title)
    names = dict.fromkeys(line.name for panel in panels for line in panel.lines)
    if names:
        handles = [matplotlib.lines.Line2D([], [], color=colors[name]) for name in names]
        figure.legend(
            handles, list(map(_plain, names)), loc="outside upper center", ncols=4, frameon=False
        )
    return figure


def _plain(text: str) -> str:
    """Text that matplotlib takes as it is, and for no formula."""
    return text.replace("$", r"\$")


def _num_rows(panel: Panel) -> int:
    rows = panel.bars or panel.points
    return len(rows.labels) if rows else 0


def _draw_panel(
    axes: Axes,
    panel: Panel,
    chart: Chart,
    colors: Mapping[str, str],
    limits: tuple[float, float] | None,
) -> None:
    axes.set_title(_plain(panel.title), fontsize="medium", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    for line in panel.lines:
        color, style = colors[line.name], _STYLES[line.style]
        axes.plot(line.x, line.y, style, color=color, linewidth=1.4 if style == "-" else 0.9)
        if line.low is not None and line.high is not None:
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.16, linewidth=0)
    if panel.lines:
        if chart.log_y:
            axes.set_yscale("log", nonpositive="clip")
        if limits:
            axes.set_ylim(*limits)
    if chart.ticks:
        axes.set_xticks([at for at, _ in chart.ticks], [text for _, text in chart.ticks])
        axes.tick_params(axis="x", rotation=45, labelsize="x-small")
    _draw_rows(axes, panel)
    if panel.heat:
        _draw_heat(axes, panel)


def _draw_rows(axes: Axes, panel: Panel) -> None:
    if panel.bars:
        left = [0.0] * len(panel.bars.labels)
        for place, (name, lengths) in enumerate(panel.bars.pieces):
            color = PIECE_COLORS[place % len(PIECE_COLORS)]
            axes.barh(
                range(len(lengths)), lengths, left=left, color=color, label=_plain(name), height=0.7
            )
            left = [a + b for a, b in zip(left, lengths, strict=True)]
        axes.set_yticks(range(len(panel.bars.labels)), list(map(_plain, panel.bars.labels)))
        axes.legend(
            frameon=False, fontsize="small", ncols=4, loc="lower left", bbox_to_anchor=(0, 1)
        )
    if panel.points:
        for place, (value, low, high) in enumerate(panel.points.values):
            axes.plot([low, high], [place, place], color=PIECE_COLORS[0], linewidth=1.2)
            axes.plot([value], [place], "o", color=PIECE_COLORS[0], markersize=4)
        axes.set_yticks(range(len(panel.points.labels)), list(map(_plain, panel.points.labels)))
    if panel.bars or panel.points:
        axes.invert_yaxis()


def _draw_heat(axes: Axes, panel: Panel) -> None:
    assert panel.heat is not None
    z = [[math.nan if v is None else v for v in row] for row in panel.heat.z]
    largest = max((abs(v) for row in z for v in row if not math.isnan(v)), default=1.0) or 1.0
    mesh = axes.pcolormesh(
        panel.heat.x, panel.heat.y, z, cmap="RdBu_r", vmin=-largest, vmax=largest, shading="nearest"
    )
    axes.figure.colorbar(mesh, ax=axes, label="%")
