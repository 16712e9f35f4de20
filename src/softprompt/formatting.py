"""Figures written the way people write them: `87.3 %`, `11,520`, `1.2 MB`, `4 min 10 s`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softprompt.evaluation.intervals import Metric

_SPACE = "\u00a0"  # a number and its unit stay on one line
_NONE = "–"  # for what is not a finite number
_SHARES = ("accuracy", "macro_f1", "exact_match", "rouge_l")
_OF_100 = ("bleu", "chrf")
_NAMES = {"macro_f1": "macro F1", "bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L"}


def metric_name(name: str) -> str:
    """Write a metric's name."""
    return _NAMES.get(name, name.replace("_", " "))


def metric_title(name: str) -> str:
    """Write a metric's name at the beginning of a line."""
    written = metric_name(name)
    return written if name in _OF_100 else written[:1].upper() + written[1:]


def is_share(name: str) -> bool:
    """Tell whether a metric is a share of rows, shown in percent."""
    return name in _SHARES


def metric(name: str, value: float) -> str:
    """Write a metric's value with its unit."""
    unit = f"{_SPACE}%" if is_share(name) and math.isfinite(value) else ""
    return _value(name, value) + unit


def interval(name: str, of: Metric) -> str:
    """Write a metric's 95 % interval, without its unit."""
    if math.isnan(of.low) or math.isnan(of.high):
        return "no interval"
    return f"{_value(name, of.low)} to {_value(name, of.high)}"


def _value(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    if is_share(name):
        return f"{100 * value:.1f}"
    if name in _OF_100:
        return f"{value:.1f}"
    return plain(value) if abs(value) >= 10 else f"{value:.3f}"


def plain(value: float) -> str:
    """Write a number that may be of any size, such as a perplexity."""
    if not math.isfinite(value):
        return _NONE
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"


def gap(name: str, value: float) -> str:
    """Write how far two methods are apart in a metric, with its unit."""
    return f"{_gap(name, value)}{_SPACE}{'nats' if name == 'loss' else 'points'}"


def signed_gap(name: str, value: float) -> str:
    """Write how far two methods are apart in a metric, with its sign and unit."""
    return _signed(gap(name, value), value)


def gap_interval(name: str, of: Metric) -> str:
    """Write the 95 % interval of a difference in a metric, with signs and without its unit."""
    return f"{_signed(_gap(name, of.low), of.low)} to {_signed(_gap(name, of.high), of.high)}"


def _gap(name: str, value: float) -> str:
    if not math.isfinite(value):
        return _NONE
    size = 100 * abs(value) if is_share(name) else abs(value)
    return f"{size:.3f}" if name == "loss" else f"{size:.1f}"


def _signed(text: str, value: float) -> str:
    nothing = not any(digit in text for digit in "123456789")  # it is nought as far as it is shown
    return text if nothing else f"{'−' if value < 0 else '+'}{text}"


def count(value: float) -> str:
    """Write how many there are."""
    return f"{value:,.0f}" if math.isfinite(value) else _NONE


def short_count(value: float) -> str:
    """Write a power of ten on an axis."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:,.0f}{_SPACE}{letter}"
    return f"{value:,.0f}"


def size(number: float) -> str:
    """Write a number of bytes."""
    if not math.isfinite(number):
        return _NONE
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while number >= 999.5 and len(units) > 1:
        number /= 1000
        units.pop(0)
    digits = 0 if units[0] == "bytes" or number >= 99.95 else 1
    return f"{number:.{digits}f}{_SPACE}{units[0]}"


def duration(seconds: float) -> str:
    """Write a time."""
    if not math.isfinite(seconds):
        return _NONE
    whole = round(seconds)
    if whole >= 60:
        small, unit, small_unit = (round(whole / 60), "h", "min") if whole >= 3600 else (whole, "min", "s")
        much, little = divmod(small, 60)
        return f"{much}{_SPACE}{unit}" + (f"{_SPACE}{little}{_SPACE}{small_unit}" if little else "")
    if 0 < seconds < 0.9995:
        thousandths = 1000 * seconds
        return f"{thousandths:.{0 if thousandths >= 9.95 else 1}f}{_SPACE}ms"
    return f"{seconds:.{1 if 0 < seconds < 9.95 else 0}f}{_SPACE}s"


def short_metric(name: str, value: float) -> str:
    """Write a metric's value for a terminal: `87.3%`, `0.412`."""
    return f"{value:.1%}" if is_share(name) else f"{value:.2f}" if value >= 10 else f"{value:.3f}"


def short_interval(name: str, low: float, high: float) -> str:
    """Write a metric's interval for a terminal: `(80.1% to 92.0%)`."""
    return f"({short_metric(name, low)} to {short_metric(name, high)})"


def metrics_line(values: Mapping[str, float]) -> str:
    """Write metrics in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {short_metric(name, value)}" for name, value in values.items())


def clock(seconds: float) -> str:
    """Write a time as minutes and seconds, or as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def step_time(seconds: float) -> str:
    """Write the time of a step."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def gigabytes(number: float) -> str:
    """Write an amount of memory."""
    return f"{number:.1f} GB" if number >= 0.1 else "less than 0.1 GB"
