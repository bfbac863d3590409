"""The report page: one HTML file with its style, script and charts inside; nothing is loaded from elsewhere.

Fills the templates in `page/` with results, columns and what `html_views` works out. Templates escape whatever they are
given but charts, style and script, since codec names, paths and messages are the user's. Without JavaScript the page
shows everything but sorting, tooltips and the reader's own bandwidth.
"""

from __future__ import annotations

import functools
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import generation_columns, html_views, point_columns, prediction
from pipeline.report.columns import MISSING, percent, significant
from pipeline.report.recommendation import Outlook, recommendation_text
from pipeline.report.results import Results

__all__ = ["html_page", "templates"]

_FOLDER = Path(__file__).parent / "page"


def html_page(results: Results, outlook: Outlook) -> str:
    """The whole page."""
    return templates().get_template("report.html.jinja").render(results=results, outlook=outlook)


@functools.cache
def templates() -> Environment:
    """Where the page's templates are, with what they may use besides results and outlook."""
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}
    environment.filters |= {"percent": percent, "significant": significant, "sort_value": sort_value}
    environment.globals |= {
        "style": Markup((_FOLDER / "report.css").read_text(encoding="utf-8")),
        "script": Markup((_FOLDER / "report.js").read_text(encoding="utf-8")),
        "formula": (prediction.__doc__ or "").partition("\n\n")[2].strip(),
        "missing": MISSING,
        "point_columns": point_columns.SHOWN_COLUMNS,
        "generation_columns": generation_columns.SHOWN_COLUMNS,
        "recommendation_text": recommendation_text,
        "views": html_views,
    }
    return environment


def sort_value(value: str | float | None) -> str:
    """What sorting goes by: empty where it is missing or not a number."""
    if value is None or value != value:
        return ""
    return value if isinstance(value, str) else repr(float(value)).replace("inf", "Infinity")
