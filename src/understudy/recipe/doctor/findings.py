"""What a check found, and what is done about it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, TypeVar

from understudy.errors import EngineError, RecipeError, UnderstudyError
from understudy.files import write_json
from understudy.trainer.console import Console

Level = Literal["ok", "warning", "error"]
Found = TypeVar("Found")
AS_SAID = "as the message says"
UNEXPECTED = "this check itself failed; report it, or skip all checks with --no-doctor"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    name: str
    level: Level
    checked: str
    found: str
    advice: str = ""
    """What to do; empty where nothing is wrong."""


def attempt(name: str, checked: str, check: Callable[[], Iterable[Finding]]) -> list[Finding]:
    """What the check finds; where it raises, an error with what was said."""
    try:
        return list(check())
    except UnderstudyError as error:
        return [Finding(name, "error", checked, str(error), AS_SAID)]
    except Exception as error:  # one check that fails must not hide what the others find
        return [Finding(name, "error", checked, f"{type(error).__name__}: {error}", UNEXPECTED)]


def within(limit_s: float, what: str, call: Callable[[], Found]) -> Found:
    """`call()` in a thread of its own. Raises EngineError where it has not returned after `limit_s` seconds.

    The thread then ends with the call's own deadline; it is a daemon, so it does not keep the process.
    """
    results: list[Found] = []
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


def errors_of(findings: Iterable[Finding]) -> list[Finding]:
    """Those that no run should start with."""
    return [finding for finding in findings if finding.level == "error"]


def latest(findings: Iterable[Finding]) -> list[Finding]:
    """Of each name the last, in the order of their first."""
    return list({finding.name: finding for finding in findings}.values())


def refuse(findings: Iterable[Finding]) -> None:
    """Raises RecipeError that lists the errors, if there are any."""
    errors = errors_of(findings)
    if errors:
        lines = [_line(item) for item in errors]
        raise RecipeError("\n  ".join([f"{verdict(errors)} (--no-doctor trains all the same)", *lines]))


def verdict(errors: Sequence[Finding]) -> str:
    """The last line of a report that has errors."""
    count = "1 error" if len(errors) == 1 else f"{len(errors)} errors"
    return f"{count}: the run would stop, or learn something else than the recipe says"


def _line(item: Finding) -> str:
    advice = "" if item.advice in ("", AS_SAID) else f"; {item.advice}"
    return f"{item.name}: {item.found}{advice}"


def write_findings(path: Path, findings: Iterable[Finding]) -> None:
    """As JSON: `{"findings": [{name, level, checked, found, advice}]}`. Raises CheckpointError."""
    write_json(path, {"findings": [asdict(finding) for finding in findings]})


def show(console: Console, findings: Sequence[Finding]) -> None:
    """Every finding: what was checked, what was found, what to do."""
    rows = [[item.name, item.level, item.checked, item.found, item.advice] for item in findings]
    console.table("doctor", ["check", "", "what was checked", "what was found", "what to do"], rows)
    errors, warnings = errors_of(findings), [item for item in findings if item.level == "warning"]
    if errors:
        console.warn(verdict(errors))
    elif warnings:
        console.note(f"{len(findings)} checks, {len(warnings)} with a warning; the run may start")
    else:
        console.note(f"{len(findings)} checks, nothing is wrong")


def show_briefly(console: Console, findings: Sequence[Finding]) -> None:
    """A line, and one more for each warning."""
    for item in findings:
        if item.level == "warning":
            console.warn(_line(item))
    num_ok = sum(item.level == "ok" for item in findings)
    console.note(f"doctor: {num_ok} of {len(findings)} checks are fine")
