"""The report of a comparison: one self-contained HTML page, the same as Markdown, and a picture."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from softprompt.comparison.report import plots, tables
from softprompt.comparison.report.experiment_setup import experiment_setup
from softprompt.comparison.report.ranking import MethodSummary, summarize
from softprompt.comparison.report.recommendation import recommend
from softprompt.comparison.report.samples import choose_samples
from softprompt.comparison.report.tables import MEMORY, PARAMETERS, PREDICTION, STORED, TRAINING, Cell
from softprompt.comparison.results import Result
from softprompt.data.rows import Row
from softprompt.extras import require_package
from softprompt.formatting import metric_name, metric_title
from softprompt.storage import write_text

PAGE, MARKDOWN, PICTURE = "report.html", "report.md", "report.png"
_HEIGHT = 280  # of a plot that is 360 wide
_LONGEST_NAME = 48  # in the picture


def write_report(results: Sequence[Result], rows: Sequence[Row], folder: Path) -> Path:
    """Write `report.html`, `report.md` and `report.png`, and return the path of the page.

    Args:
        results: of one comparison, one per method and seed.
        rows: the test rows, in the order of the results' predictions.
        folder: where to; created if it does not exist.
    """
    require_package("matplotlib", "the report")
    summaries = summarize(results, rows)
    measured = experiment_setup(summaries, rows)
    groups = tables.full_table(summaries)
    data, base_model = results[0].data, results[0].base_model
    quality = metric_title(summaries[0].primary)
    view = {
        "data": data,
        "base_model": base_model,
        "summaries": summaries,
        "recommendation": recommend(summaries),
        "metric": quality,
        "groups": groups,
        "figures": groups["Quality"][quality],
        "to_best": groups["Quality"][tables.TO_BEST],
        "key": (quality, TRAINING, STORED, PREDICTION),  # beside the recommendation
        "confusions": [found for s in summaries if (found := tables.confusion_table(s)) is not None],
        "samples": choose_samples(summaries, rows),
        "experiment_setup": measured,
        "picture": PICTURE,
    }
    environment = Environment(
        loader=PackageLoader("softprompt.comparison.report", "."),
        autoescape=select_autoescape(["html"]),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters.update(
        cut=_cut, code=_code, words=_words, cell=_cell, resources=tables.resources, training=tables.training
    )
    page_plots = _plots(summaries, {title: cells for lines in groups.values() for title, cells in lines.items()})
    write_text(folder / PAGE, environment.get_template(PAGE).render(view, plots=page_plots))
    write_text(folder / MARKDOWN, environment.get_template(MARKDOWN).render(view))
    title = f"{_cut(data, _LONGEST_NAME)} on {_cut(base_model, _LONGEST_NAME)}"
    plots.write_png(folder / PICTURE, summaries, title, _cut(measured.summary, 3 * _LONGEST_NAME))
    return folder / PAGE


_Plot = tuple[str, str, Markup]  # title, caption, drawing


def _plots(summaries: Sequence[MethodSummary], cells: Mapping[str, Sequence[Cell]]) -> list[_Plot]:
    """Draw the plots; `cells` are the lines of the table by title, for the description of each plot in words."""
    learned = [s for s in summaries if any(r.curve for r in s.results)]
    tall, low = max(200, 64 + 42 * len(summaries)), 24 + 32 * len(summaries)

    def said(title: str) -> str:
        return "; ".join(f"{s.info.title}: {_cell(c)}" for s, c in zip(summaries, cells[title], strict=True))

    def plot(
        title: str, note: str, draw: plots.Draw, words: str, height: int, of: Sequence[MethodSummary] = ()
    ) -> _Plot:
        legend = 20 * ((len(of) + 1) // 2)
        svg = plots.svg(draw, of or summaries, f"{title}. {words}", height + legend, legend=bool(of))
        return title, note, Markup(svg)  # noqa: S704

    def bars(title: str, note: str, draw: plots.Draw) -> _Plot:
        return plot(title, note, draw, said(title), low)

    figures = said(metric_title(summaries[0].primary))
    against = f"{figures}. {PARAMETERS}: {said(PARAMETERS)}"
    up = "Better methods are higher, smaller ones further left."
    found = [
        plot("Quality", "Test rows, 95 % intervals.", plots.draw_quality, figures, tall),
        plot("Quality and trainable parameters", up, plots.draw_parameters, against, _HEIGHT, summaries),
    ]
    name = plots.curve_metric(summaries)
    if name is not None:
        words = f"Validation {metric_name(name)} against time, for {', '.join(s.info.title for s in learned)}"
        note = "Validation rows, one line per seed."
        found.append(plot("Learning curves", note, plots.draw_curves, words, _HEIGHT, learned))
    return [
        *found,
        bars(TRAINING, "Everything before the first prediction.", plots.draw_time),
        bars(MEMORY, "While training or choosing.", plots.draw_memory),
        bars(PREDICTION, "Per test row.", plots.draw_prediction),
    ]


def _cut(text: str, most: int) -> str:
    """Shorten a text; one of spaces alone is shown quoted."""
    if not text.strip():
        return repr(text) if text else "(nothing)"
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _cell(cell: Cell) -> str:
    return f"{cell.text} ({cell.detail})" if cell.detail else cell.text


def _code(text: str) -> str:
    """Write a text as Markdown code."""
    line = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    pad = " " if "`" in line[:1] + line[-1:] else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _words(text: str) -> str:
    """Escape a text for Markdown, inside a table too."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(" ".join(text.split(" ")), quote=False).replace("\n", " "))
