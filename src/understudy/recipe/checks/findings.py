"""Checks of a recipe, and what they find."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from understudy.errors import EngineError, UnderstudyError

Level = Literal["ok", "warning", "error"]
Stage = Literal["files", "room", "loaded", "rehearsed", "advice"]
"""The input of a check: the recipe with its files and data; models whose sizes are known; everything loaded; samples that
were rehearsed; and all data, read whole, for warnings that no run has to heed. Rules that need the recipe alone are
`schema.RULES`: no recipe is made that breaks one."""
AS_SAID = "as the message says"
UNEXPECTED = "this check itself failed; report it, or skip all checks with --no-doctor"
Returned = TypeVar("Returned")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    name: str
    level: Level
    checked: str
    found: str
    advice: str = ""
    """The next step; empty where nothing is wrong."""


@dataclass(frozen=True)
class Result:
    """A verdict of a check."""

    found: str
    level: Level = "ok"
    advice: str = ""
    about: str = ""
    """One of several that the same check looks at; it becomes a part of the finding's name."""


@dataclass(frozen=True)
class Check:
    """A rule about a run, in one place."""

    name: str
    stage: Stage
    checked: str
    """The two things that are compared, as the report names them."""
    run: Callable[[Any], Iterable[Result]]
    """Looks at `Files` or, from the stage "loaded" on, `Parts`. No result: the check does not apply."""

    def __call__(self, parts: Any) -> list[Finding]:
        """Raises what the check raises."""
        return [
            Finding(
                f"{item.about}: {self.name}" if item.about else self.name,
                item.level,
                self.checked,
                item.found,
                item.advice,
            )
            for item in self.run(parts)
        ]

    def attempt(self, parts: Any) -> list[Finding]:
        """The findings, or an error with what the check raised: one check that fails must not hide what others find."""
        try:
            return self(parts)
        except UnderstudyError as error:
            return [Finding(self.name, "error", self.checked, str(error), AS_SAID)]
        except Exception as error:
            return [Finding(self.name, "error", self.checked, f"{type(error).__name__}: {error}", UNEXPECTED)]


def within(limit_s: float, what: str, call: Callable[[], Returned]) -> Returned:
    """`call()` in a thread of its own. Raises EngineError where it has not returned after `limit_s` seconds.

    The thread then ends with the call's own deadline; it is a daemon, so it does not keep the process.
    """
    results: list[Returned] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name=f"doctor: {what}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise EngineError(f"{what} has not answered in {limit_s:g} s: see whether its server is up, and what it logs")
    if errors:
        raise errors[0]
    return results[0]


def worst(levels: Iterable[Level]) -> Level:
    """The most serious; "ok" where there is none."""
    found = set(levels)
    return "error" if "error" in found else "warning" if "warning" in found else "ok"
