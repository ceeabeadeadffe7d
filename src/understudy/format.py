"""Writes numbers alike on the pages, in their charts and in the console."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Protocol

MISSING = "not recorded"
_RATE = re.compile(
    r"^(?:[^/]+/)?((avg|pass|maj|rejection|revision)@\d+|no_eos)$|^pass\^\d+$|^score/|_(share|rate)$"
    r"|^(accuracy|greedy|assisted|teacher|truncated|repetition|overlap|outliers|trusted|teacher_excluded)$"
    r"|^(accept_rate|reject_rate|on_policy)$"
)
_LABELS = {
    "avg": "mean of {} attempts",
    "pass": "at least one of {} right",
    "pass^": "all of {} right",
    "maj": "majority of {}",
    "rejection": "drawn again while the judge rejects, at most {} times",
    "revision": "drawn again from the first rejected step on, at most {} times",
    "assisted": "continued by the teacher from the first rejected step on",
    "assisted_share": "answers that the teacher continued",
    "attempts": "draws of an answer until the judge accepts",
    "greedy": "the most likely token at every step",
    "accuracy": "",
    "mean_tokens": "response length, tokens",
    "truncated": "cut at the length limit",
    "no_eos": "ended without EOS",
}


class Bounded(Protocol):
    """A value with an interval, such as `Interval` or `eval.Estimate`."""

    @property
    def value(self) -> float | None: ...
    @property
    def low(self) -> float | None: ...
    @property
    def high(self) -> float | None: ...


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; None where the run did not record it."""

    value: float | None
    low: float | None = None
    high: float | None = None


def is_rate(name: str) -> bool:
    """Whether a metric is a share in [0, 1], which is written in percent."""
    return bool(_RATE.search(name))


def metric_note(name: str) -> str:
    """Explains a metric of an evaluation in a few words; empty for an unknown one."""
    kind, _, count = name.rpartition("/")[2].replace("^", "^@").partition("@")
    if count == "1":
        return "one attempt"
    return _LABELS.get(kind, "").format(count)


def number(value: float) -> str:
    """Four significant digits, thousands separated, powers of ten as 1.2e-5."""
    if not math.isfinite(value):
        return "not finite"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e7:
        mantissa, exponent = f"{value:.3e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{mantissa}e{int(exponent)}"
    if size >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 3 - math.floor(math.log10(size)))
    text = f"{value:.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(num: int, one: str, many: str = "") -> str:
    """A number of things: "1 problem", "1,200 problems"; `many` where it is not `one` with an s."""
    return f"{num:,} {one if num == 1 else many or one + 's'}"


def quantity(name: str, value: float | None) -> str:
    """A metric's value with its unit: "41.0 %" for a rate."""
    if value is None:
        return MISSING
    return f"{100 * value:.1f} %" if is_rate(name) else number(value)


def interval(name: str, item: Bounded | None) -> str:
    """A value with its interval: "41.0 % [35.2, 46.9]"; the value alone where no interval was recorded."""
    if item is None or item.value is None:
        return MISSING
    if item.low is None or item.high is None:
        return quantity(name, item.value)
    low, high = (f"{100 * bound:.1f}" if is_rate(name) else number(bound) for bound in (item.low, item.high))
    return f"{quantity(name, item.value)} [{low}, {high}]"


def change(name: str, item: Bounded | None) -> str:
    """A signed difference: "+55.5 points [+49.8, +61.0]" for a rate."""

    def signed(value: float) -> str:
        text = f"{100 * abs(value):.1f}" if is_rate(name) else number(abs(value))
        is_zero = float(text.replace(",", "")) == 0
        return text if is_zero else ("+" if value > 0 else "\u2212") + text

    if item is None or item.value is None:
        return MISSING
    text = signed(item.value) + (" points" if is_rate(name) else "")
    return text if item.low is None or item.high is None else f"{text} [{signed(item.low)}, {signed(item.high)}]"


def seconds(value: float) -> str:
    """A duration: "1 h 02 min", "3 min 05 s" or "12.3 s"."""
    if value < 60:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
