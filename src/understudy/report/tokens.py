"""The tokens that a run kept (`tokens/step_N.jsonl`), for the viewer of a page and for a terminal."""

from __future__ import annotations

import json
import re
import zlib
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from understudy.errors import DataError
from understudy.files import by_step
from understudy.format import number
from understudy.report.read import MAX_NAME_CHARS, read_object, taken_from
from understudy.text import HIDDEN, encodable, printable, without_secrets

MAX_PACKED_BYTES = 3_000_000
"""The most that a page takes for its samples; the rest of the files stays where it is."""
MAX_PROMPT_CHARS = 4_000
MILLI = ("logprob", "entropy")
"""Endings of the numbers that a page has in thousandths of a nat."""
EXCLUDED = -9999.0
OUTLIER_NATS = 5.0
"""|log T - log S| of a token above which it is an outlier, as in the metric `outliers`."""
FLAGS: Mapping[str, tuple[str, str]] = {
    "outliers": (
        "log T \u2212 log S is within \u00b15 nats",
        "an outlier, log T \u2212 log S beyond \u00b15 nats",
    ),
    "trusted": ("an outlier: outside the trust region", "inside the trust region"),
    "kept": ("not among the tokens that the method keeps in this step", "among the tokens that the method keeps"),
    "floored": ("its log-ratio is above the floor", "its log-ratio is below the floor, which takes its place"),
    "gated": ("the teacher likes it more than the student does", "the teacher does not like it more than the student"),
    "uncertain": ("the teacher is certain here", "the teacher is uncertain here: its entropy is above the threshold"),
    "outside_topk": ("among the student's K most likely tokens", "outside the student's K most likely tokens"),
}
"""A method's yes or no of a token in words: no first."""
MEASURES: Mapping[str, str] = {
    "log_ratio": "log T \u2212 log S",
    "teacher_entropy": "teacher's entropy",
    "student_entropy": "student's entropy",
    "gradient": "gradient weight",
    "trusted": "trusted or outlier",
}
"""Numbers that colour the tokens, by their names in the menu; a method's own follow by their names in metrics.jsonl."""
_HEAD = re.compile(rb'\{"step": ?(\d+), ?"prompt_id": ?("(?:[^"\\]|\\.)*")')
_NO_MEASURE = ("id", "kind", "uniform", "push", "student_rank", "teacher_rank", "outcome_advantage")


@dataclass(frozen=True)
class Place:
    """One line of a token file."""

    step: int
    prompt_id: str
    path: Path
    line: int
    run: str = ""
    """The run's name where several are shown together."""

    def __str__(self) -> str:
        return f"{self.path}:{self.line + 1}"

    def read(self) -> dict[str, Any]:
        """The sample. Raises DataError where it is none."""
        with taken_from(str(self)):
            row = read_object(self.path.read_bytes().splitlines()[self.line], str(self))
            if len({len(values) for values in row["tokens"].values()}) != 1 or not {"id", "kind"} <= set(row["tokens"]):
                raise DataError(f"{self}: 'tokens' needs lists of one length, 'id' and 'kind' among them")
            _hide_secrets(row)
        return row


def _hide_secrets(row: Mapping[str, Any]) -> None:
    """Takes out the tokens in which a secret is written, from the first to the last, and what was likely in their place."""
    table, vocabulary = row["tokens"], row["vocabulary"]
    pieces = [str(vocabulary.get(str(token), "")) for token in table["id"]]
    text = "".join(pieces)
    shown = without_secrets(text)
    if shown == text:
        return

    def same(one: str, other: str) -> int:
        """Characters at the beginning that both have."""
        pairs = zip(one, other, strict=False)
        return next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))

    first, last = sorted((same(text, shown), len(text) - same(text[::-1], shown[::-1])))
    end = 0
    vocabulary["-1"] = HIDDEN
    for at, piece in enumerate(pieces):
        begin, end = end, end + len(piece)
        if begin < last and end > first:
            table["id"][at] = -1
            for name, values in table.items():
                if name.endswith(("_top", "_top_logprob")):
                    values[at] = []


def find_tokens(run_dir: Path, run: str = "") -> list[Place]:
    """Every sample whose tokens a run kept, by step. Raises DataError for a file that is none."""
    found = []
    for step, path in by_step(run_dir / "tokens", ".jsonl").items():
        for at, line in enumerate(path.read_bytes().splitlines()):
            head = _HEAD.match(line)
            if head is None:
                raise DataError(f"{path}:{at + 1}: not a sample with tokens: {line[:80]!r}; repair or delete it")
            with taken_from(f"{path}:{at + 1}"):
                found.append(Place(step, json.loads(head[2]), path, at, run))
    return found


@dataclass(frozen=True)
class Viewer:
    """The viewer's part of a page."""

    index: Markup
    """JSON, escaped for an attribute and whole however long: what the menus list, the names of the numbers, and words for a
    method's flags."""
    packed: Sequence[Markup]
    """One sample each: JSON, deflated, in base64."""
    note: str
    """Says what is not on the page; empty where everything is."""


def viewer(places: Sequence[Place]) -> Viewer | None:
    """As many samples as a page has room for, prompts that were kept most often first; None where none was kept."""
    if not places:
        return None
    rows: list[tuple[Place, dict[str, Any], Markup]] = []
    used = 0
    for place in _by_worth(places):
        row = place.read()
        with taken_from(str(place)):
            packed = _pack(row)
        if rows and used + len(packed) > MAX_PACKED_BYTES:
            break
        used += len(packed)
        rows.append((place, row, packed))
    rows.sort(key=lambda item: (item[0].step, item[0].run, item[0].path.name, item[0].line))
    names = {name for _, row, _ in rows for name in row["tokens"]}
    own = sorted(name for name in names if name not in MEASURES and not name.endswith(("logprob", "_top")))
    measures = {name: label for name, label in MEASURES.items() if name in names or name == "log_ratio"}
    measures |= {name: FLAGS[name][1] if name in FLAGS else _safe(name) for name in own if name not in _NO_MEASURE}
    index = {
        "samples": [_heading(place, row) for place, row, _ in rows],
        "measures": measures,
        "flags": FLAGS,
        "excluded": EXCLUDED,
        "outlier_nats": OUTLIER_NATS,
    }
    left = len(places) - len(rows)
    note = f"{len(rows):,} of {len(places):,} kept samples are on this page; the others are in tokens/." if left else ""
    return Viewer(escape(json.dumps(index)), [packed for _, _, packed in rows], note)


def _by_worth(places: Sequence[Place]) -> Iterator[Place]:
    """The last and the first step of the prompts that were kept most often, then steps between them, ever closer."""
    times: dict[str, int] = {}
    for place in places:
        times[place.prompt_id] = times.get(place.prompt_id, 0) + 1
    steps = sorted({place.step for place in places})
    rank = {step: at for at, step in enumerate(_spread(steps))}
    return iter(sorted(places, key=lambda place: (-min(times[place.prompt_id], 2), rank[place.step], place.line)))


def _spread(steps: Sequence[int]) -> list[int]:
    """Last, first, the middle, the middles of the halves, and so on."""
    order = [len(steps) - 1, 0]
    gaps = [(0, len(steps) - 1)]
    for low, high in gaps:
        middle = (low + high) // 2
        if low < middle < high:
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [steps[at] for at in dict.fromkeys(order)]


def _heading(place: Place, row: Mapping[str, Any]) -> dict[str, Any]:
    names = ("index", "method", "teacher", "finish", "score", "reward", "num_tokens")
    shown = {name: _safe(row[name]) for name in names if row.get(name) is not None}
    return shown | {"step": place.step, "prompt_id": _safe(place.prompt_id), "run": _safe(place.run)}


def _safe(value: Any) -> Any:
    """As a menu shows it; of a long text both ends, in which names of files and rows differ."""
    if not isinstance(value, str):
        return value
    text, half = printable(value), MAX_NAME_CHARS // 2
    return text if len(text) <= MAX_NAME_CHARS else f"{text[:half]}...{text[-half:]}"


def _piece(text: str) -> str:
    """A token's text with control characters and bidirectional overrides written out."""
    if encodable(text) == text:
        return text
    return "".join(char if encodable(char) == char else f"\\u{ord(char):04x}" for char in text)


def _pack(row: Mapping[str, Any]) -> Markup:
    """The sample for the page: texts once, ids as places among them, rows of five in one list, thousandths as whole
    numbers."""
    table = row["tokens"]
    texts = row.get("vocabulary") or {}
    ids = list(dict.fromkeys([*map(str, table["id"]), *texts]))
    at = {token: place for place, token in enumerate(ids)}
    columns: dict[str, Any] = {}
    for name, values in table.items():
        if name == "id":
            columns[name] = [at[str(token)] for token in values]
        elif name.endswith("_top"):
            columns[name] = [[at[str(token)] for token in top] if top else 0 for top in values]
        elif name.endswith("_top_logprob"):
            columns[name] = [[round(1000 * x) for x in top] if top else 0 for top in values]
        elif name.endswith(MILLI):
            columns[name] = [None if x is None else round(1000 * x) for x in values]
        elif name == "kind":
            columns[name] = values
        else:
            columns[name] = [None if x is None else float(f"{x:.3g}") for x in values]
    packed = {
        "ids": [int(token) for token in ids],
        "texts": [_piece(str(texts.get(token, f"[{token}]"))[:MAX_PROMPT_CHARS]) for token in ids],
        "prompt": printable(str(row.get("prompt") or ""))[:MAX_PROMPT_CHARS],
        "missing": {name: _safe(why) for name, why in (row.get("missing") or {}).items()},
        "columns": columns,
    }
    text = json.dumps(packed, separators=(",", ":"))
    return Markup(b64encode(zlib.compress(text.encode(), 6)).decode())  # noqa: S704 letters and digits


def log_ratio(table: Mapping[str, Sequence[float | None]]) -> list[float | None]:
    """The log-ratio log T - log S of each token; None where either is not known or the teacher excludes the token."""
    none = [None] * len(table["id"])
    pairs = zip(table.get("teacher_logprob", none), table.get("student_logprob", none), strict=True)
    return [None if t is None or s is None or t <= EXCLUDED else t - s for t, s in pairs]


def describe(row: Mapping[str, Any], at: int) -> str:
    """Says in a line how the method took a token, and why."""
    table = row["tokens"]
    said = [FLAGS[name][int(values[at])] for name, values in table.items() if name in FLAGS and values[at] is not None]
    ratio = log_ratio(table)[at]
    if "trusted" not in table and ratio is not None and abs(ratio) > OUTLIER_NATS:
        said.append(FLAGS["outliers"][1])
    for name, values in table.items():
        if name.startswith("loss/"):
            term = name.removeprefix("loss/")
            said.append(f"no part in {term}" if values[at] is None else f"{term} {number(values[at])}")
    push = (table.get("push") or [None] * len(table["id"]))[at]
    if push:
        said.append("made more likely" if push > 0 else "made less likely")
    return "; ".join(said) or "not trained"


def largest(row: Mapping[str, Any], num: int, by: str = "log_ratio") -> list[tuple[int, float]]:
    """Places of the tokens with the largest sizes of a number, and the number. Raises DataError where no token has it."""
    table = row["tokens"]
    values = log_ratio(table) if by == "log_ratio" else table.get(by)
    known = [(at, value) for at, value in enumerate(values or ()) if isinstance(value, int | float)]
    if not known:
        have = ", ".join(
            name for name in table if name not in ("id", "kind") and not name.endswith(("_top", "_top_logprob"))
        )
        raise DataError(f"no token of this sample has {by}; it has {have}")
    return sorted(known, key=lambda item: (-abs(item[1]), item[0]))[:num]
