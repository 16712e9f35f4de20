"""The plots of a comparison: as SVG for a page, in the page's own colors and font, and together as one PNG."""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from softprompt.comparison.report.ranking import MethodSummary
from softprompt.formatting import duration, is_share, metric, metric_name, short_count, size
from softprompt.storage import storage_errors

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Ten colors that stay apart for the color-blind as far as ten can; every method also has a marker of its own.
COLORS = (
    "#b3261e", "#b86200", "#1f5fd0", "#00796b", "#7b3fb5", "#5f6773", "#b01c74", "#5b7d00", "#8d5524", "#0081a7",
)  # fmt: skip
_MARKERS = "sDo^vpX*<>hP"
_INK, _QUIET, _GRID, _PAPER = "#1b2130", "#5b6474", "#dde1e8", "#ffffff"
# Their names in the page's style sheet, which has them for light and dark.
_IN_PAGE = {
    **{color: f"var(--series-{n})" for n, color in enumerate(COLORS)},
    _INK: "var(--ink)",
    _QUIET: "var(--quiet)",
    _GRID: "var(--line)",
    _PAPER: "var(--card)",
}
_WIDTH = 360  # of a plot, in the page's pixels on a telephone
_LONGEST_TITLE, _LONGEST_LINE = 26, 18
_ZERO_GAP = 1.1  # decades between 0, which has no logarithm, and the smallest number

Draw = Callable[["Axes", Sequence[MethodSummary]], None]


def draw_quality(axes: Axes, summaries: Sequence[MethodSummary]) -> None:
    """Draw each method's figure with its interval."""
    scale = _scale(summaries)
    for row, summary in enumerate(summaries):
        of = summary.figure
        if math.isfinite(of.value):
            _interval(axes, summary, row, vertical=False)
            words = metric(summary.primary, of.value)
            axes.annotate(words, (scale * of.value, row), (0, 7), textcoords="offset points", ha="center", color=_INK)
    _names(axes, summaries)
    axes.set_xlabel(_axis_title(summaries[0].primary), color=_QUIET)
    axes.grid(axis="x")
    axes.margins(x=0.12)


def draw_parameters(axes: Axes, summaries: Sequence[MethodSummary]) -> None:
    """Draw quality against the number of trainable parameters, on a logarithmic axis with a place for 0."""
    numbers = [s.costs.trainable_parameters for s in summaries]
    logs = [math.log10(n) for n in numbers if n]
    low, high = (math.floor(min(logs)), math.ceil(max(logs))) if logs else (0, 0)
    zero = low - _ZERO_GAP
    untrained = numbers.count(0)
    beside = iter(zero + 0.3 * (n - (untrained - 1) / 2) for n in range(untrained))  # so that none hides another
    for summary, number in zip(summaries, numbers, strict=True):
        place = math.log10(number) if number else next(beside)
        if math.isfinite(summary.figure.value):
            _interval(axes, summary, place, vertical=True)
    decades = list(range(low, high + 1, 1 + (high - low) // 4)) if logs else []
    zero_tick = [zero] if untrained else []
    axes.set_xticks([*zero_tick, *decades], [*("none" for _ in zero_tick), *(short_count(10.0**d) for d in decades)])
    if zero_tick and decades:
        axes.axvline((zero + low) / 2, color=_QUIET, linewidth=0.8, linestyle=(0, (2, 3)))
    axes.set_xlabel("trainable parameters", color=_QUIET)
    axes.set_ylabel(_axis_title(summaries[0].primary), color=_QUIET)
    axes.grid(axis="y")
    axes.margins(x=0.08, y=0.12)


def curve_metric(summaries: Sequence[MethodSummary]) -> str | None:
    """Return the metric of the learning curves: the primary one, or the loss where training did not measure that."""
    points = [point.validation for s in summaries for r in s.results for point in r.curve]
    names = [summaries[0].primary, "loss"]
    return next((name for name in names if points and all(name in point for point in points)), None)


def draw_curves(axes: Axes, summaries: Sequence[MethodSummary]) -> None:
    """Draw the validation metric against time, one line per seed."""
    name = curve_metric(summaries)
    assert name is not None
    longest = max((p.seconds for s in summaries for r in s.results for p in r.curve), default=0.0)
    unit, divisor = ("minutes", 60) if longest >= 180 else ("seconds", 1)
    scale = 100 if is_share(name) else 1
    for summary in summaries:
        for seed, result in enumerate(summary.results):
            points = [p for p in result.curve if math.isfinite(p.validation[name])]
            axes.plot(
                [p.seconds / divisor for p in points],
                [scale * p.validation[name] for p in points],
                label=_short(summary) if points and not seed else None,
                **_look(summary),
                markevery=max(1, len(points) // 6),
                linewidth=1.5,
                alpha=1 if not seed else 0.55,
            )
    axes.set_xlabel(f"{unit} of training", color=_QUIET)
    axes.set_ylabel(f"validation {_axis_title(name)}", color=_QUIET)
    axes.grid(axis="y")
    axes.set_xlim(left=0)


def draw_bars(cost: str, words: Callable[[float], str]) -> Draw:
    """Return a function that draws a cost as bars from 0, each with its value."""

    def draw(axes: Axes, summaries: Sequence[MethodSummary]) -> None:
        values = [getattr(s.costs, cost) for s in summaries]
        shown = [v if math.isfinite(v) else 0.0 for v in values]
        axes.barh(range(len(summaries)), shown, color=[_color(s) for s in summaries], height=0.62)
        for row, (length, real) in enumerate(zip(shown, values, strict=True)):
            axes.annotate(words(real), (length, row), (4, 0), textcoords="offset points", va="center", color=_INK)
        _names(axes, summaries)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_xlim(0, 1.38 * max(shown) or 1)

    return draw


draw_time = draw_bars("train_seconds", duration)
draw_memory = draw_bars("peak_bytes", size)
draw_prediction = draw_bars("prediction_seconds", duration)


def svg(draw: Draw, summaries: Sequence[MethodSummary], description: str, height: int, legend: bool = False) -> str:
    """Draw a plot as an SVG element for a page: no size, no font and no colors of its own.

    Args:
        draw, summaries: one of the functions above, and the methods that it draws.
        description: the plot in words, for screen readers.
        height: for a width of 360, in the page's pixels.
        legend: whether methods are named below.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_style(11.5) | {"svg.fonttype": "none", "svg.hashsalt": description}):
        figure = Figure(figsize=(_WIDTH / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        draw(axes, summaries)
        if legend:
            _legend(figure, axes, 2)
        drawn = io.StringIO()
        _save(figure, drawn, format="svg", transparent=True, metadata={"Date": None})
    return _for_page(drawn.getvalue(), description)


def write_png(path: Path, summaries: Sequence[MethodSummary], title: str, note: str) -> None:
    """Draw the most important plots as one picture, with a title above and a note below."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    above: dict[str, Draw] = {"Quality": draw_quality, "Quality and size": draw_parameters}
    if curve_metric(summaries) is not None:
        above["Learning"] = draw_curves
    below = {"Time to train or choose": draw_time, "Peak memory": draw_memory, "A prediction": draw_prediction}
    with rc_context(_style(11)), storage_errors(path):
        height = 7.4 + 0.3 * max(0, len(summaries) - 6)
        layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.08)
        figure = Figure(figsize=(11, height), layout=layout, facecolor=_PAPER)
        figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold", color=_INK)
        figure.supxlabel(note, x=0.01, ha="left", fontsize=11, color=_QUIET)
        parts = figure.subfigures(2, 1, squeeze=False, height_ratios=[1.35, 1])[:, 0]
        for part, draws in zip(parts, (above, below), strict=True):
            every = part.subplots(1, len(draws))
            for axes, (name, draw) in zip(every, draws.items(), strict=True):
                draw(axes, summaries)
                axes.set_title(name, loc="left", color=_INK, fontweight="bold", fontsize=12)
            if draws is above:
                _legend(part, every[1], min(len(summaries), 4))
            else:  # the names stand once
                for axes in every[1:]:
                    axes.set_yticklabels([])
        aside = path.with_name(f".{path.name}.tmp")
        _save(figure, aside, format="png", dpi=160)
        aside.replace(path)


def _style(font_size: float) -> dict[Any, Any]:
    return {
        "font.family": "DejaVu Sans",
        "font.size": font_size,
        "axes.labelsize": font_size,
        "xtick.labelsize": font_size,
        "ytick.labelsize": font_size,
        "legend.fontsize": font_size,
        "text.parse_math": False,  # a dollar in a name is a dollar
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": _GRID,
        "axes.axisbelow": True,
        "grid.color": _GRID,
        "xtick.color": _GRID,
        "ytick.color": _GRID,
        "xtick.labelcolor": _QUIET,
        "ytick.labelcolor": _QUIET,
        "ytick.major.size": 0,
    }


def _save(figure: Figure, target: Any, **how: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the font lacks letters that a name may have
        figure.savefig(target, **how)


def _for_page(drawn: str, description: str) -> str:
    """Return the part of an SVG for a page: no header, no ids that another plot has too, colors by name."""
    from markupsafe import escape

    found = re.search(r'<svg[^>]*(viewBox="[^"]*")[^>]*>(.*)</svg>', drawn, re.DOTALL)
    assert found is not None
    view, body = found.groups()
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href")
    for color, name in _IN_PAGE.items():
        body = body.replace(color, name)
    return f'<svg {view} role="img" aria-label="{escape(description)}">{body}</svg>'


def _color(summary: MethodSummary) -> str:
    return COLORS[summary.place % len(COLORS)]


def _look(summary: MethodSummary) -> dict[str, Any]:
    marker = _MARKERS[summary.place % len(_MARKERS)]
    return {"color": _color(summary), "marker": marker, "markersize": 7, "markeredgecolor": _PAPER}


def _interval(axes: Axes, summary: MethodSummary, place: float, vertical: bool) -> None:
    """Draw a method's figure and interval at a place on the other axis."""
    of, scale = summary.figure, _scale([summary])
    across, along = [place, place], [scale * of.low, scale * of.high]
    ends = (across, along) if vertical else (along, across)
    axes.plot(*ends, color=_color(summary), linewidth=2.2, alpha=0.45, solid_capstyle="round")
    point = (place, scale * of.value) if vertical else (scale * of.value, place)
    axes.plot(*point, **_look(summary) | {"markersize": 9}, linestyle="none", label=_short(summary))


def _scale(summaries: Sequence[MethodSummary]) -> int:
    return 100 if is_share(summaries[0].primary) else 1


def _axis_title(name: str) -> str:
    return f"{metric_name(name)}{', %' if is_share(name) else ', lower is better' if name == 'loss' else ''}"


def _short(summary: MethodSummary) -> str:
    title = summary.info.title
    return title if len(title) <= _LONGEST_TITLE else f"{title[: _LONGEST_TITLE - 1].rstrip()}…"


def _names(axes: Axes, summaries: Sequence[MethodSummary]) -> None:
    wrapped = ["\n".join(textwrap.wrap(_short(s), _LONGEST_LINE)) for s in summaries]
    axes.set_yticks(range(len(summaries)), wrapped)
    axes.tick_params(axis="y", labelcolor=_INK)
    axes.set_ylim(len(summaries) - 0.5, -0.6)  # the first on top


def _legend(figure: Any, axes: Axes, columns: int) -> None:
    lines, names = axes.get_legend_handles_labels()
    figure.legend(lines, names, loc="outside lower center", ncols=columns, frameon=False, labelcolor=_INK)
