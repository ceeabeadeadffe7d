"""One tree of errors. Each message says what is wrong, where, and what to do next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UnderstudyError(Exception):
    """Base of every error that this package raises on purpose."""


class RecipeError(UnderstudyError):
    """A recipe, a command line or a file that it names is wrong. Raised before anything is loaded or written."""


class DataError(UnderstudyError):
    """A data set or a row of it is wrong; the message names file and line."""


class TemplateError(DataError):
    """A chat template refuses a conversation, or rewrites what was said in it."""


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


def nearest(name: str, known: Iterable[str]) -> str:
    """The hint for an unknown name: the nearest known one, or all of them."""
    options = sorted(known)
    if not options:
        return "there are none"
    close = get_close_matches(name, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(options)}"
