"""Checks of a recipe, and what they find."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from understudy.errors import EngineError, UnderstudyError

Level = Literal["ok", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "error")
"""The most serious last."""
Stage = Literal["files", "room", "loaded", "rehearsed", "advice"]
"""The input of a check: the recipe with its files and data; models whose sizes are known; everything loaded; samples that
were rehearsed; and all data, read whole, for warnings that no run has to heed. Rules that need the recipe alone are
`schema.RULES`: no recipe is made that breaks one."""
AS_SAID = "as the message says"
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
    """The next step; it is not shown where the level is "ok"."""
    about: str = ""
    """One of several that the same check looks at; it becomes a part of the finding's name. Results about the same make
    one finding: all that is found, the worst level, and every advice."""


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
        findings: dict[str, Finding] = {}
        for item in self.run(parts):
            found, level, advice = item.found, item.level, "" if item.level == "ok" else item.advice
            if (seen := findings.get(item.about)) is not None:
                found, level = f"{seen.found}; {found}", max(seen.level, level, key=LEVELS.index)
                advice = "; ".join(dict.fromkeys(text for text in (seen.advice, advice) if text))
            name = f"{item.about}: {self.name}" if item.about else self.name
            findings[item.about] = Finding(name, level, self.checked, found, advice)
        return list(findings.values())

    def attempt(self, parts: Any) -> list[Finding]:
        """The findings, or an error with what the check raised: one check that fails must not hide what others find."""
        try:
            return self(parts)
        except UnderstudyError as error:
            return [Finding(self.name, "error", self.checked, str(error), AS_SAID)]
        except Exception as error:
            advice = "this check itself failed; report it, or skip all checks with --no-doctor"
            return [Finding(self.name, "error", self.checked, f"{type(error).__name__}: {error}", advice)]


def within(limit_s: float, what: str, call: Callable[[], Returned]) -> Returned:
    """`call()` in a thread of its own. Raises EngineError where it has not returned after `limit_s` seconds.

    The thread then ends with the call's own deadline; it is a daemon, so it does not keep the process.
    """
    future: Future[Returned] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name=f"doctor: {what}", daemon=True)
    thread.start()
    thread.join(limit_s)
    if thread.is_alive():
        raise EngineError(f"{what} has not answered in {limit_s:g} s: see whether its server is up, and what it logs")
    return future.result()
