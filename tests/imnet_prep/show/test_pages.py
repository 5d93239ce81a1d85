"""Templates: every value is escaped, none is forgotten."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from imnet_prep.show.charts import Bar, BarChart, Curve, CurveChart, Tick
from imnet_prep.show.pages import _bytes, _counted, _environment, _grouped, render

MACROS = """
{% from "parts.html" import bar_chart, curve_chart, fact, row, table, thumbnail %}
{{ fact(evil, evil) }}{{ fact(evil, [evil, evil]) }}{{ thumbnail({"alt": evil, "caption": evil, "jpeg": evil}) }}
{% call table(evil, [evil]) %}{{ row(evil, evil) }}{% endcall %}
{% for chart in bars %}{{ bar_chart(chart) }}{% endfor %}{{ curve_chart(curves) }}
"""


def test_parts_of_pages_escape_what_they_show() -> None:
    evil = "<script>alert('x')</script>\"&"
    bar, tick = (Bar(evil, 1),), (Tick(0, evil),)
    bars = BarChart(evil, bar), BarChart(evil, bar, tick, evil, evil), BarChart(evil, sentence=evil)
    curves = CurveChart(evil, (Curve(evil, 1, ((0, 1),)), Curve(evil, 2, ((0, 1),))), evil, x_name=evil)
    html = _environment("imnet_prep.show").from_string(MACROS).render(evil=evil, bars=bars, curves=curves)
    assert html.count("&lt;script&gt;") > 30
    assert "<script" not in html
    assert '"&"' not in html


def test_a_value_that_is_not_given_is_an_error() -> None:
    with pytest.raises(UndefinedError, match="name"):
        render("browse_error.html", error="?")


def test_text_that_is_not_unicode_is_shown_with_question_marks() -> None:
    html = render("browse_error.html", name=os.fsdecode(b"r\xff"), error="broken")
    assert ">r?<" in html


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1234567, "1,234,567"), (0.485, "0.485"), (12345.6, "12,346"), (0.123456, "0.1235"), ("7", "7")],
)
def test_numbers_are_grouped_and_rounded(value: object, shown: str) -> None:
    assert _grouped(value) == shown


def test_sizes_have_decimal_units() -> None:
    assert [_bytes(size) for size in (0, 999, 1000, 1_500_000, 10**12)] == ["0 B", "999 B", "1 kB", "1.5 MB", "1 TB"]


def test_every_template_is_beside_the_code() -> None:
    """A template that only compiles when it is used would fail at its user."""
    for package in ("imnet_prep.show", "mbv2.show"):
        environment = _environment(package)
        names = [name for name in environment.list_templates() if name.endswith(".html")]
        assert "base.html" in names
        for name in names:
            assert Path(str(environment.get_template(name).filename)).is_file()


def test_nouns_have_their_number() -> None:
    assert [_counted(1, "image"), _counted(2000, "class"), _counted(0, "host")] == [
        "1 image",
        "2,000 classes",
        "0 hosts",
    ]
