"""Tables of the report's page."""

import html
import re

from markupsafe import Markup

from openrlhf_alp.report.html.tables import table_html

MARKUP = Markup("<b>0.1</b>")


def test_markup_is_kept_and_all_else_is_text():
    hostile = "<script>{{x}} **y** | $z$"
    table = table_html(
        {"a-0": hostile, "a-1": "value"}, [[hostile, MARKUP], [3, None]], missing="no run"
    )
    assert html.unescape(table).count(f">{hostile}<") == 2
    assert "<script" not in table and "<style" not in table
    assert re.findall(r"<td[^>]*>(.*?)</td>", table)[1:] == [
        "<b>0.1</b>",
        "3",
        '<span class="missing">no run</span>',
    ]


def test_cells_name_the_header_of_their_column():
    table = table_html({"a-0": "method", "a-1": "none"}, [["seq-alp", MARKUP]])
    assert re.findall(r'<th [^>]*scope="col" id="([^"]+)"', table) == ["a-0", "a-1"]
    assert re.findall(r'<td headers="([^"]+)"', table) == ["a-0", "a-1"]


def test_a_table_without_rows_has_its_headers():
    assert ">method</th>" in table_html({"a-0": "method"}, [])
