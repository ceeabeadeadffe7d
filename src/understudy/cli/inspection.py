"""The command `inspect`: the tokens of one kept sample in a terminal."""

from __future__ import annotations

import math
import webbrowser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from understudy.errors import CheckpointError, RecipeError
from understudy.report.page import describe_changes, write_report
from understudy.report.read import read_run, taken_from
from understudy.report.tokens import EXCLUDED, Place, describe, find_tokens, largest
from understudy.trainer.console import Console

CONTEXT_CHARS = 24
"""Characters of the response that are shown before a token."""


def inspect(run_dir: Path, *, step: int | None, prompt: str | None, by: str, num: int, only_list: bool) -> None:
    """Prints a table. Raises CheckpointError where the run kept no tokens, RecipeError for a sample that it did not keep."""
    changes, places = describe_changes(read_run(run_dir)), find_tokens(run_dir)
    if not places:
        raise CheckpointError(
            f"{run_dir} kept no tokens: train.save_tokens and train.save_samples_every say of how many samples, and when"
        )
    with Console() as console:
        if changes:
            console.warn(f"not everything is as run.json says the run wrote it: {changes}")
        if only_list:
            console.table("kept samples", ["step", "prompt"], [[f"{one.step:,}", one.prompt_id] for one in places])
            return
        _show(console, _choose(places, step, prompt), by, num)


def _choose(places: Sequence[Place], step: int | None, prompt: str | None) -> Place:
    found = [one for one in places if prompt in (None, one.prompt_id) and step in (None, one.step)]
    if not found:
        steps = sorted({one.step for one in places if prompt in (None, one.prompt_id)})
        have = f"{f'prompt {prompt} was kept' if prompt else 'samples were kept'} at steps {', '.join(map(str, steps))}"
        raise RecipeError(f"no such sample was kept: {have if steps else 'see --list for those that were'}")
    return next(one for one in found if one.step == found[-1].step)


def _show(console: Console, place: Place, by: str, num: int) -> None:
    row = place.read()
    with taken_from(str(place)):
        table, texts = row["tokens"], [row["vocabulary"].get(str(one), f"[{one}]") for one in row["tokens"]["id"]]
        rows = []
        for at, value in largest(row, num, by):
            before = "".join(texts[max(0, at - CONTEXT_CHARS) : at])[-CONTEXT_CHARS:]
            sides = [_probability(table, f"{whose}_logprob", at) for whose in ("student", "teacher")]
            tops = [_likely(row, whose, at) for whose in ("student", "teacher")]
            texts_here = [repr(before)[1:-1], repr(texts[at])[1:-1]]
            rows.append([f"{at + 1:,}", *texts_here, f"{value:+.2f}", *sides, *tops, describe(row, at)])
        left = row["num_tokens"] - len(texts)
        more = f", the first {len(texts):,} of them kept" if left else ""
        teacher = f", teacher {row['teacher']}" if row.get("teacher") else ""
        title = f"step {place.step:,}, prompt {place.prompt_id}, {row['method']}{teacher}: "
        title += f"{row['num_tokens']:,} tokens{more}"
        notes = [f"{name} is not known: {why}" for name, why in row["missing"].items()]
    columns = ["token", "before", "text", "log T - log S" if by == "log_ratio" else by, "student", "teacher"]
    console.table(title, [*columns, "student expected", "teacher expected", "method"], rows)
    for note in notes:
        console.note(note)


def _probability(table: Mapping[str, Any], name: str, at: int) -> str:
    value = (table.get(name) or [None] * (at + 1))[at]
    return "not known" if value is None else "0" if value <= EXCLUDED else f"{100 * math.exp(value):.3g} %"


def _likely(row: Mapping[str, Any], whose: str, at: int) -> str:
    """The most likely tokens of a side, as far as they reach."""
    top, logprobs = (row["tokens"].get(f"{whose}_top{end}") for end in ("", "_logprob"))
    if not top or not top[at]:
        return "not known"
    pairs = list(zip(top[at], logprobs[at], strict=True))[:3]
    return ", ".join(f"{row['vocabulary'].get(str(token), token)!r} {100 * math.exp(x):.0f} %" for token, x in pairs)


def open_report(run_dir: Path) -> None:
    """Writes the report and opens it; prints where it is."""
    path = write_report(run_dir)
    with Console() as console:
        console.note(f"page     {path}")
    webbrowser.open(path.resolve().as_uri())
