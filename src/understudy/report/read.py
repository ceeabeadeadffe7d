"""A run directory read back: tolerant of what a killed run leaves, strict about everything else."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray

from understudy.errors import CheckpointError, DataError
from understudy.format import Interval

_STEP_FILE = re.compile(r"step_(\d+)\.jsonl?$")


@dataclass(frozen=True)
class Attempt:
    """One response of the student, as saved by an evaluation or while training."""

    prompt_id: str
    prompt: str
    response: str
    finish: str = ""
    num_tokens: int | None = None
    answer: str | None = None
    reference: str | None = None
    score: float | None = None
    note: str = ""


@dataclass(frozen=True)
class EvalRecord:
    """The summary of one evaluation and where its samples lie."""

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

    def attempts(self) -> list[Attempt]:
        """Its samples; empty where none were saved. Raises DataError as `read_attempts`."""
        samples = self.path.with_suffix(".jsonl")
        return read_attempts(samples) if samples.is_file() else []


@dataclass(frozen=True, eq=False)
class Series:
    """One number over steps. `values` is NaN where it was not finite; steps where it was absent are left out."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


@dataclass(frozen=True)
class Event:
    step: int | None
    kind: str
    text: str


@dataclass(frozen=True, eq=False)
class RunRecord:
    """All that a report shows of a run."""

    path: Path
    recipe: str | None
    settings: Mapping[str, object]
    """The recipe parsed; empty where it is missing or no YAML mapping."""
    facts: Mapping[str, object]
    series: Mapping[str, Series]
    events: tuple[Event, ...]
    evals: tuple[EvalRecord, ...]
    """By step."""
    samples: tuple[tuple[int, Path], ...]
    """Files of training samples, by step."""
    cut_files: tuple[str, ...]
    """Files whose last line is unfinished, as a killed process leaves it; that line was left out."""


def read_run(run_dir: Path) -> RunRecord:
    """Raises CheckpointError if this is no run directory and DataError (file and line) for a broken file in it."""
    if not (run_dir / "run.json").is_file() and not (run_dir / "metrics.jsonl").is_file():
        raise CheckpointError(
            f"{run_dir} is not a run directory: it has neither run.json nor metrics.jsonl; give the directory that "
            "`understudy train` wrote"
        )
    cut: list[str] = []
    recipe = _read_text(run_dir / "recipe.yaml") if (run_dir / "recipe.yaml").is_file() else None
    return RunRecord(
        path=run_dir,
        recipe=recipe,
        settings=_parse_recipe(recipe or ""),
        facts=_read_object(run_dir / "run.json") if (run_dir / "run.json").is_file() else {},
        series=_read_series(run_dir / "metrics.jsonl", cut),
        events=tuple(_read_events(run_dir / "events.jsonl", cut)),
        evals=tuple(read_eval(path) for path in _step_files(run_dir / "eval", "*.json")),
        samples=tuple((_file_step(path), path) for path in _step_files(run_dir / "samples", "*.jsonl")),
        cut_files=tuple(cut),
    )


def read_eval(path: Path) -> EvalRecord:
    """One evaluation summary. Raises DataError where it is not one."""
    data = _read_object(path)
    metrics = data.get("metrics")
    if not isinstance(metrics, dict):
        raise DataError(f"{path}: an evaluation summary needs a mapping 'metrics', this file has {metrics!r}")
    step = data.get("step")
    if step is None and _STEP_FILE.search(path.name):
        step = _file_step(path)
    return EvalRecord(
        path=path,
        step=_whole(step) or 0,
        split=str(data.get("split") or ""),
        samples_per_prompt=_whole(data.get("samples_per_prompt")),
        num_problems=_whole(data.get("num_problems")),
        metrics={str(name): _interval(value) for name, value in metrics.items()},
        unscored=_whole(data.get("unscored")) or 0,
        too_long=_whole(data.get("too_long")) or 0,
    )


def read_attempts(path: Path) -> list[Attempt]:
    """Raises DataError for a line that is not a sample; an unfinished last line is left out."""
    attempts = []
    for number, row in _rows(path, []):
        if "prompt_id" not in row or "response" not in row:
            raise DataError(f"{path}:{number}: a sample needs 'prompt_id' and 'response', this one has {sorted(row)}")
        attempts.append(
            Attempt(
                prompt_id=str(row["prompt_id"]),
                prompt=str(row.get("prompt") or ""),
                response=str(row["response"]),
                finish=str(row.get("finish") or ""),
                num_tokens=_whole(row.get("num_tokens")),
                answer=_optional_text(row.get("answer")),
                reference=_optional_text(row.get("reference")),
                score=_number(row.get("score")),
                note=str(row.get("note") or ""),
            )
        )
    return attempts


def _read_series(path: Path, cut: list[str]) -> dict[str, Series]:
    points: dict[str, dict[int, float]] = {}
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
            points.setdefault(name, {})[step] = math.nan if value is None else _finite(value)
    return {name: _series(by_step) for name, by_step in points.items()}


def _series(by_step: Mapping[int, float]) -> Series:
    return Series(np.array(list(by_step), dtype=np.int64), np.array(list(by_step.values()), dtype=np.float64))


def _read_events(path: Path, cut: list[str]) -> Iterator[Event]:
    for _, row in _rows(path, cut):
        yield Event(_whole(row.get("step")), str(row.get("kind") or "info"), str(row.get("text") or ""))


def _rows(path: Path, cut: list[str]) -> Iterator[tuple[int, dict[str, object]]]:
    """Line numbers and objects. A last line that cannot be read is left out and its file noted in `cut`."""
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                cut.append(path.name)
                return
            raise DataError(f"{path}:{number}: not JSON: {line[:80]!r}; repair or delete the line") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: not a JSON object: {line[:80]!r}; repair or delete the line")
        yield number, row


def _read_object(path: Path) -> dict[str, object]:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(data, dict):
        raise DataError(f"{path}: must hold a JSON object, not {type(data).__name__}")
    return data


def _parse_recipe(text: str) -> dict[str, object]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return {str(key): value for key, value in data.items()} if isinstance(data, dict) else {}


def _read_text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _step_files(folder: Path, pattern: str) -> list[Path]:
    return sorted((path for path in folder.glob(pattern) if _STEP_FILE.search(path.name)), key=_file_step)


def _file_step(path: Path) -> int:
    found = _STEP_FILE.search(path.name)
    return int(found[1]) if found else 0


def _interval(value: object) -> Interval:
    if isinstance(value, Mapping):
        return Interval(_number(value.get("value")), _number(value.get("low")), _number(value.get("high")))
    return Interval(_number(value))


def _number(value: object) -> float | None:
    """None also for what is not finite: a report has nothing to draw there."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _finite(value: float) -> float:
    return float(value) if math.isfinite(value) else math.nan


def _whole(value: object) -> int | None:
    return int(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _optional_text(value: object) -> str | None:
    return None if value is None else str(value)
