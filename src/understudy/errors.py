"""One tree of errors. Each message says what is wrong, where, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches

from understudy.text import printable

MAX_MESSAGE_CHARS = 10_000


class UnderstudyError(Exception):
    """Base of every error that this package raises on purpose. Its message has no secret and nothing that steers a terminal."""

    def __str__(self) -> str:
        # here and not where it is raised: of a million rows that are left out, nobody reads the errors
        text = printable(super().__str__())
        more = len(text) - MAX_MESSAGE_CHARS
        return text if more <= 0 else f"{text[:MAX_MESSAGE_CHARS]} [{more:,} more characters]"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"


class RecipeError(UnderstudyError):
    """A recipe, a command line or a file that it names is wrong. Raised before anything is loaded or written."""


class DataError(UnderstudyError):
    """A data set or a row of it is wrong; the message names file and line."""


class TemplateError(DataError):
    """A chat template refuses a conversation, or does not write it as it was said."""


class RewriteError(TemplateError):
    """A chat template rewrites earlier turns when a conversation goes on."""


class VocabularyError(UnderstudyError):
    """Student and teacher do not speak the same tokens."""


class ScoreError(UnderstudyError):
    """A teacher's scores are missing, misaligned or not finite; the message names the sample."""


class CheckpointError(UnderstudyError):
    """A checkpoint or run directory cannot be written, read or continued."""


class TrainingError(UnderstudyError):
    """Training cannot go on (non-finite losses in a row, an empty batch)."""


class EngineError(TrainingError):
    """A rollout engine, a served teacher or a judge does not answer, or not what was asked; the message names the server."""


class WeightsLostError(EngineError):
    """A rollout engine no longer has the weights that were pushed to it."""


def first_line(error: BaseException) -> str:
    """The first line of an error of a library, which may be a page long."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint for an unknown name: the known one from which it differs by a slip or by capitals, or all of them."""
    options = {option.lower(): option for option in sorted(known)}
    if not options:
        return "there are none"
    close = get_close_matches(name.lower(), options, n=1, cutoff=0.65)
    return f"did you mean {options[close[0]]!r}?" if close else f"known: {', '.join(options.values())}"


def written(value: object) -> str:
    """A value as a recipe writes it: null, true, text in quotes."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return "infinite" if math.isinf(value) else repr(value).removesuffix(".0")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(written, value))}]"
    return repr(value)


def brief(value: object) -> str:
    """A value as a message shows it, of its first 60 characters."""
    text = written(value)
    return text if len(text) <= 60 else text[:57] + "..."


def check_range(
    section: object, low: float, *names: str, high: float = math.inf, above: bool = False, off: str = ""
) -> None:
    """Raises ValueError for a field of `section` that is no finite number from `low`, or above it, to `high`; None passes.

    `off` tells what to write in place of 0 to do without.
    """
    for name in names:
        value = getattr(section, name)
        # not (value < low or ...), so that NaN is refused too
        if value is not None and not (low <= value <= high and value < math.inf and not (above and value == low)):
            limit = (
                f"lie in [{low:g}, {high:g}]" if high < math.inf else f"be {'above' if above else 'at least'} {low:g}"
            )
            limit += "" if math.isfinite(value) else " and finite"
            raise ValueError(f"{name} is {brief(value)}; it must {limit}{off and '; ' + off}")
