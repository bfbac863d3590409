"""The benchmark over kinds of text: manual pages without roff, and ratios to the first kind."""

import pytest

from benchmarks.kinds_of_text import add_ratios, table
from benchmarks.texts_by_kind import plain_page

PAGE = r""".\" a comment
.TH USERADD 8 "" ""
.SH "名称"
useradd \- 创建一个新用户\&。
.PP
This paragraph was not translated, 除了这里.
.TP
\fB\-D\fR 选项的\fI默认\fR值和环境变量
.br
"""


def test_a_manual_page_becomes_its_translated_lines():
    assert plain_page(PAGE) == "名称\nuseradd - 创建一个新用户。\n\n-D 选项的默认值和环境变量"


def row(text, codec, bits, change):
    return {"text": text, "codec": codec, "bits_per_value": bits, "ppl_change": change}


def test_figures_are_divided_by_those_of_the_first_kind():
    rows = [row("a", "none", 32.0, 0.0), row("a", "c", 2.0, 0.1), row("b", "none", 32.0, 0.0), row("b", "c", 3.0, 0.4)]
    add_ratios(rows)
    assert [(r["bits_ratio"], r["change_ratio"]) for r in rows] == [
        (1.0, None), (1.0, 1.0), (1.0, None), (1.5, pytest.approx(4)),
    ]  # fmt: skip
    assert table(rows).splitlines()[2:] == [
        "| a | `none` | 32.000 | +0.00% | 1.00 |  |",
        "| a | `c` | 2.000 | +10.00% | 1.00 | 1.00 |",
        "| b | `none` | 32.000 | +0.00% | 1.00 |  |",
        "| b | `c` | 3.000 | +40.00% | 1.50 | 4.00 |",
    ]
