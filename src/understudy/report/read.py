"""Reads a run directory: tolerant of what a killed run leaves behind, strict about everything else."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from understudy import config
from understudy.errors import CheckpointError, DataError, RecipeError
from understudy.eval.summary import ScalingPoint, read_scaling
from understudy.files import by_step, compare_files, hash_values
from understudy.format import Interval
from understudy.text import printable

MAX_NAME_CHARS = 200
"""Characters of the name of a series."""
_STEP_FILE = re.compile(r"step_(\d+)\.jsonl?$")


@dataclass(frozen=True)
class Attempt:
    """One saved response of the student, from an evaluation or from training."""

    prompt_id: str
    prompt: str
    response: str
    finish: str = ""
    num_tokens: int | None = None
    answer: str | None = None
    reference: str | None = None
    score: float | None = None
    note: str = ""
    messages: Sequence[Mapping[str, str]] = ()
    """Role and content of each message of an episode of several turns, and "error" for the reply of a tool that failed."""
    tokens: Mapping[str, Sequence[object]] = field(default_factory=dict)
    """Values of each response token by name, as `eval.summary.token_table` makes them; empty where none were saved."""


@dataclass(frozen=True)
class EvalRecord:
    """The saved summary of one evaluation. Unlike `eval.EvalSummary` it may lack anything: older runs wrote less."""

    path: Path
    step: int
    split: str
    samples_per_prompt: int | None
    num_problems: int | None
    metrics: Mapping[str, Interval]
    unscored: int = 0
    """Samples without a score."""
    too_long: int = 0
    """Prompts over the token budget, which no metric counts."""
    scaling: Sequence[ScalingPoint] = ()

    def problems(self) -> dict[str, list[Attempt]]:
        """Its samples by prompt id; empty where none were saved. Raises DataError as `read_attempts`."""
        samples = self.path.with_suffix(".jsonl")
        found: dict[str, list[Attempt]] = {}
        for attempt in read_attempts(samples) if samples.is_file() else []:
            found.setdefault(attempt.prompt_id, []).append(attempt)
        return found


@dataclass(frozen=True, eq=False)
class Series:
    """One number over steps. `values` is NaN where it was not finite; steps where it was absent are left out."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, points: Mapping[int, float | None]) -> Series:
        """From `{step: value}`; None becomes NaN."""
        values = [math.nan if value is None else value for value in points.values()]
        return cls(np.array(list(points), dtype=np.int64), np.array(values, dtype=np.float64))

    def at(self, index: NDArray[np.generic]) -> Series:
        """The points that an index or a mask selects."""
        return Series(self.steps[index], self.values[index])

    def points(self) -> Iterator[tuple[int, float]]:
        """Steps and values one by one."""
        return zip(self.steps.tolist(), self.values.tolist(), strict=True)

    @property
    def finite(self) -> NDArray[np.float64]:
        return self.values[np.isfinite(self.values)]


@dataclass(frozen=True)
class Event:
    step: int | None
    kind: str
    text: str


@dataclass(frozen=True)
class AlarmSpan:
    """An alarm from its beginning to its end, in the words that it was recorded with."""

    name: str
    first: int
    last: int | None
    """None: it was on when the run ended, or is still."""
    means: str
    measured: str
    advice: str
    reads: tuple[str, ...]
    """The metrics in whose charts it is shown."""


@dataclass(frozen=True, eq=False)
class RunRecord:
    """Everything that a report shows of a run."""

    path: Path
    recipe: str | None
    settings: Mapping[str, object]
    """The recipe parsed; empty where it is missing or not a YAML mapping."""
    facts: Mapping[str, object]
    series: Mapping[str, Series]
    events: tuple[Event, ...]
    """All but those of alarms."""
    alarms: tuple[AlarmSpan, ...]
    """By their beginning."""
    findings: tuple[Mapping[str, str], ...]
    """Findings of the doctor, before the first step: name, level, checked, found, advice."""
    evals: tuple[EvalRecord, ...]
    """By step."""
    samples: tuple[tuple[int, Path], ...]
    """Files of training samples, by step."""
    pictures: tuple[Mapping[str, Any], ...]
    """Sums over the tokens of some steps, as `trainer.tokens.picture` makes them."""
    cut_files: tuple[str, ...]
    """Files whose last line was left out because a killed process had not finished it."""
    changed: Mapping[str, str] = field(default_factory=dict)
    """Files that are not as the run wrote them, and how."""

    @property
    def last_step(self) -> int | None:
        return max((int(item.steps[-1]) for item in self.series.values() if len(item.steps)), default=None)


def read_run(run_dir: Path) -> RunRecord:
    """Raises CheckpointError if this is no run directory and DataError (file and line) for a broken file in it."""
    facts, recipe = run_dir / "run.json", run_dir / "recipe.yaml"
    if not facts.is_file() and not (run_dir / "metrics.jsonl").is_file():
        raise CheckpointError(
            f"{run_dir} is not a run directory: it has neither run.json nor metrics.jsonl; give the directory that "
            "`understudy train` wrote"
        )
    cut: list[str] = []
    text = recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else None
    try:
        settings = config.load(text or "", str(recipe))
    except RecipeError:
        settings = None
    with taken_from(run_dir / "events.jsonl"):
        events = [row for _, row in _rows(run_dir / "events.jsonl", cut)]
        told = [
            Event(_whole(row.get("step")), str(row.get("kind") or "info"), str(row.get("text") or "")) for row in events
        ]
        alarms = _read_alarms([row for row in events if row.get("kind") == "alarm"])
    return RunRecord(
        path=run_dir,
        recipe=text,
        settings={str(key): value for key, value in settings.items()} if isinstance(settings, dict) else {},
        facts=read_object(facts.read_bytes(), str(facts)) if facts.is_file() else {},
        series=_read_series(run_dir / "metrics.jsonl", cut),
        events=tuple(event for event in told if event.kind != "alarm"),
        alarms=alarms,
        findings=_read_findings(run_dir / "doctor.json"),
        evals=tuple(_eval_of(step, path) for step, path in by_step(run_dir / "eval", ".json").items()),
        samples=tuple(by_step(run_dir / "samples", ".jsonl").items()),
        pictures=tuple(row for _, row in _rows(run_dir / "pictures.jsonl", cut)),
        cut_files=tuple(cut),
        changed=_changed(run_dir),
    )


@contextmanager
def taken_from(place: Path | str) -> Iterator[None]:
    """Inside, values are taken for what a run writes at the place. Raises DataError that names it where they are others."""
    try:
        yield
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError) as error:
        raise DataError(f"{place}: not as a run writes it ({error}); repair or delete it") from error


def _changed(run_dir: Path) -> dict[str, str]:
    """By the table of run.json or, where its process was killed, of the newest checkpoint; empty where there is neither."""
    facts, found = run_dir / "run.json", {}
    if facts.is_file():
        values = read_object(facts.read_bytes(), str(facts))
        if "digest" in values and values.pop("digest") != hash_values(values):
            found["run.json"] = "was changed"
        if "files" in values:
            return found | compare_files(run_dir, values["files"])
    for checkpoint in reversed(by_step(run_dir / "checkpoints").values()):
        table = checkpoint / "run_files.json"
        # a run that goes on may remove it meanwhile
        with suppress(FileNotFoundError):
            values = read_object(table.read_bytes(), str(table))
            return found | compare_files(run_dir, values, grows="metrics.jsonl")
    return found


def _read_alarms(rows: Sequence[Mapping[str, Any]]) -> tuple[AlarmSpan, ...]:
    spans: list[AlarmSpan] = []
    for row in rows:
        name, step = str(row.get("alarm") or ""), _whole(row.get("step"))
        if step is None:
            continue
        if row.get("begins"):
            means, measured, advice = (str(row.get(part) or "") for part in ("means", "measured", "advice"))
            reads = row.get("reads")
            names = tuple(map(str, reads)) if isinstance(reads, list) else ()
            spans.append(AlarmSpan(name, step, None, means, measured, advice, names))
        else:
            spans = [replace(one, last=step) if one.name == name and one.last is None else one for one in spans]
    return tuple(spans)


def _read_findings(path: Path) -> tuple[Mapping[str, str], ...]:
    """Empty for a run that nobody examined. Raises DataError for another file."""
    names = ("name", "level", "checked", "found", "advice")
    with taken_from(path):
        found = read_object(path.read_bytes(), str(path)).get("findings") if path.is_file() else []
        if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
            raise DataError(f"{path}: 'findings' must be a list of objects")
        return tuple({name: str(item.get(name) or "") for name in names} for item in found)


def read_eval(path: Path) -> EvalRecord:
    """One evaluation summary. Raises DataError where it is not one."""
    with taken_from(path):
        data = read_object(path.read_bytes(), str(path))
        metrics = data.get("metrics")
        if not isinstance(metrics, dict):
            raise DataError(f"{path}: an evaluation summary needs a mapping 'metrics', this file has {metrics!r}")
        named = _STEP_FILE.search(path.name)
        step = int(named[1]) if data.get("step") is None and named else _whole(data.get("step"))
        return EvalRecord(
            path=path,
            step=step or 0,
            split=str(data.get("split") or ""),
            samples_per_prompt=_whole(data.get("samples_per_prompt")),
            num_problems=_whole(data.get("num_problems")),
            metrics={
                str(name): Interval(*(_number(item.get(key)) for key in ("value", "low", "high")))
                if isinstance(item, Mapping)
                else Interval(_number(item))
                for name, item in metrics.items()
            },
            unscored=_whole(data.get("unscored")) or 0,
            too_long=_whole(data.get("too_long")) or 0,
            scaling=read_scaling(data.get("scaling") or ()),
        )


def _eval_of(step: int, path: Path) -> EvalRecord:
    """Raises DataError where the file is another step's than its name says."""
    record = read_eval(path)
    if record.step != step:
        raise DataError(f"{path} holds the evaluation of step {record.step}; put the right file there or delete it")
    return record


def read_baseline(path: Path) -> EvalRecord:
    """The evaluation at `path`, or the last one under it. Raises CheckpointError where there is none."""
    if path.is_file():
        return read_eval(path)
    found = list((by_step(path / "eval", ".json") or by_step(path, ".json")).values())
    if not found:
        raise CheckpointError(f"no evaluation at {path}: give a summary step_*.json or a run directory that has eval/")
    return read_eval(found[-1])


def read_attempts(path: Path) -> list[Attempt]:
    """Raises DataError for a line that is not a sample; an unfinished last line is left out."""
    attempts = []
    for number, row in _rows(path, []):
        place = f"{path}:{number}"
        if "prompt_id" not in row or "response" not in row:
            raise DataError(f"{place}: a sample needs 'prompt_id' and 'response', this one has {sorted(row)}")
        with taken_from(place):
            attempts.append(_attempt_of(row, place))
    return attempts


def _attempt_of(row: Mapping[str, Any], place: str) -> Attempt:
    tokens = row.get("tokens") or {"text": []}
    sizes = (
        {len(item) if isinstance(item, list) else -1 for item in tokens.values()} if isinstance(tokens, dict) else {}
    )
    if len(sizes) != 1 or -1 in sizes or "text" not in tokens:
        raise DataError(f"{place}: 'tokens' needs a list 'text', and lists of the same length beside it")
    if any(isinstance(one, list | dict) for item in tokens.values() for one in item):
        raise DataError(f"{place}: 'tokens' needs a text or a number for each token")
    said = row.get("messages") or []
    if not isinstance(said, list) or not all(isinstance(message, dict) for message in said):
        raise DataError(f"{place}: 'messages' needs a list of objects")
    answer, references = row.get("answer"), row.get("reference")
    if references is not None and not isinstance(references, list):
        references = [references]
    return Attempt(
        prompt_id=str(row["prompt_id"]),
        prompt=str(row.get("prompt") or ""),
        response=str(row["response"]),
        finish=str(row.get("finish") or ""),
        num_tokens=_whole(row.get("num_tokens")),
        answer=None if answer is None else str(answer),
        reference=None if references is None else " or ".join(map(str, references)),
        score=_number(row.get("score")),
        note=str(row.get("note") or ""),
        messages=[
            {
                "role": str(message.get("role") or ""),
                "content": str(message.get("content") or ""),
                "error": "failed" if message.get("error") else "",
            }
            for message in said
        ],
        tokens=tokens,
    )


def _read_series(path: Path, cut: list[str]) -> dict[str, Series]:
    points: dict[str, dict[int, float | None]] = {}
    shown: dict[str, str] = {}
    last = None
    for number, row in _rows(path, cut):
        step = row.get("step")
        if not isinstance(step, int) or (last is not None and step < last):
            raise DataError(f"{path}:{number}: step is {step!r}; it must be a whole number, not below {last}")
        last = step
        for name, value in row.items():
            if name in ("step", "nonfinite"):
                continue
            if value is not None and not isinstance(value, int | float):
                raise DataError(f"{path}:{number}: {name!r} is {value!r}; it must be a number or null")
            # every line has the same names, and cleaning one takes as long as reading ten lines
            if name not in shown:
                shown[name] = printable(name[:MAX_NAME_CHARS])
            points.setdefault(shown[name], {})[step] = _number(value)
    with taken_from(path):
        return {name: Series.of(by_step) for name, by_step in points.items()}


def _rows(path: Path, cut: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields line numbers and objects. A last line that cannot be read is left out and its file noted in `cut`."""
    lines = path.read_bytes().rstrip().split(b"\n") if path.is_file() else []
    for number, line in enumerate(lines if lines != [b""] else [], 1):
        try:
            row = read_object(line, f"{path}:{number}")
        except DataError:
            if number < len(lines):
                raise
            cut.append(path.name)
        else:
            yield number, row


def read_object(text: bytes, where: str) -> dict[str, Any]:
    try:
        data = config.load_json(text)
    except ValueError as error:
        raise DataError(f"{where}: not JSON: {text[:80]!r}; repair or delete it") from error
    if not isinstance(data, dict):
        raise DataError(f"{where}: not a JSON object: {text[:80]!r}; repair or delete it")
    return data


def _number(value: object) -> float | None:
    """None also for what is not finite, or no float is as large: a report has nothing to draw there."""
    # false for NaN too
    return float(value) if isinstance(value, int | float) and abs(value) <= sys.float_info.max else None


def _whole(value: object) -> int | None:
    number = _number(value)
    return None if number is None else int(number)
