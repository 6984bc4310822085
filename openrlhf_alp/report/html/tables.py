"""Tables of a page, by great-tables."""

from collections.abc import Mapping, Sequence

import great_tables
import pandas as pd
from markupsafe import Markup, escape

_END = "</table>"


def table_html(
    columns: Mapping[str, str], rows: Sequence[Sequence[object]], *, missing: str = ""
) -> Markup:
    """A `<table>` whose cells name their column, for screen readers.

    Args:
        columns: id of the header, unique on its page, to its label.
        rows: cells in the order of the columns: markup as it is, other values as text.
        missing: text of a cell that is None.
    """
    cells = [[None if cell is None else str(escape(cell)) for cell in row] for row in rows]
    labels = {name: great_tables.html(_label(text)) for name, text in columns.items()}
    table = (
        great_tables.GT(pd.DataFrame(cells, columns=list(columns), dtype=object))
        .fmt(lambda cell: cell, columns=list(columns))
        .sub_missing(missing_text=great_tables.html(f'<span class="missing">{missing}</span>'))
        .cols_label(labels)
        .cols_align("left")
    )
    page = table.as_raw_html()
    # Without its style sheet, whose colours are fixed and which has rules for every table.
    return Markup(page[page.index("<table") : page.rindex(_END) + len(_END)])


def _label(text: str) -> str:
    # Two braces in a label would be read as a unit.
    return str(escape(text)).replace("{", "&#123;")
