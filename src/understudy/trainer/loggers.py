"""Loggers of a run's numbers: always JSON lines in the run directory, on request TensorBoard, W&B and Trackio."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from understudy.errors import CheckpointError, RecipeError, nearest
from understudy.files import write_atomically
from understudy.text import plain_tree, printable

PROJECT = "understudy"
"""Project name at W&B and Trackio; WANDB_PROJECT and TRACKIO_PROJECT override it."""
Log = Callable[[int, Mapping[str, Any]], object]
"""Logs the values of a step."""
Close = Callable[[], object]
Table = Callable[..., Any]
"""A package's own table, made from `columns` and `data`."""
Alert = Callable[[str, str], object]
"""Sends a title and a text to whoever follows the run."""


class Opened(NamedTuple):
    """A package that was started; None: it has no such thing."""

    log: Log
    close: Close
    table: Table | None = None
    alert: Alert | None = None


class JsonLines:
    """One JSON object per line, written to the file before `log` returns, so that a killed process loses at most one.

    A non-finite value is written as null and its name listed under "nonfinite". Opening the file cuts off an unfinished
    last line, which a killed process leaves.

    Raises CheckpointError where the file cannot be written (a full disk) or does not hold JSON lines.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            content = path.read_bytes() if path.is_file() else b""
            if content and not content.endswith(b"\n"):
                os.truncate(path, content.rfind(b"\n") + 1)
            self._file = path.open("ab", buffering=0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name in values.keys() & {"step", "nonfinite"}:
            raise ValueError(f"a metric cannot be named {name!r}: every line of {self.path.name} has that key")
        nonfinite = [name for name, value in values.items() if not math.isfinite(value)]
        record = {"step": step} | dict(values) | dict.fromkeys(nonfinite)
        self.write(record | {"nonfinite": nonfinite} if nonfinite else record)

    def write(self, record: Mapping[str, object]) -> None:
        """Writes any record that has a "step", such as an event."""
        line = (json.dumps(record, allow_nan=False) + "\n").encode()
        with self._writing():
            if self._file.write(line) != len(line):
                raise OSError("only a part of the line was written: the disk is full")

    def truncate_after(self, step: int) -> None:
        """Drops every line of a later step, so that a run resumed from the checkpoint of `step` repeats none.

        Other lines stay byte by byte. The file is replaced in one rename.
        """
        kept = []
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), 1):
            try:
                kept += [line] if int(json.loads(line)["step"]) <= step else []
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{self.path}:{number}: not a JSON object with a step: {line[:80]!r}; repair or delete the line"
                ) from error
        write_atomically(self.path, b"".join(kept))
        self._file.close()
        self._file = self.path.open("ab", buffering=0)

    def sync(self) -> None:
        """Waits until every line is on the disk: before a checkpoint, so that a power cut leaves no gap before it."""
        with self._writing():
            os.fsync(self._file.fileno())
            # raises where the file was removed: what is written then is lost
            self.path.stat()

    def close(self) -> None:
        self._file.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path}: {error.strerror or error}; free space or fix permissions, then continue with "
                "--resume"
            ) from error


class Dashboard:
    """A viewer or service beside metrics.jsonl. Its failures (network, a full quota) are reported once and then ignored: no
    run dies of its dashboard."""

    def __init__(self, name: str, opened: Opened, warn: Callable[[str], None]) -> None:
        self._name, self._opened, self._warn = name, opened, warn
        self._warned = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._attempt(f"step {step}", lambda: self._opened.log(step, values))

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Logs samples as a table without secrets, where the package has tables; a value that a row lacks is None."""
        if (table := self._opened.table) is None:
            return
        columns = list(dict.fromkeys(name for row in rows for name in row))
        data = [[plain_tree(row.get(name)) for name in columns] for row in rows]
        self._attempt(
            f"the samples of step {step}",
            lambda: self._opened.log(step, {"samples": table(columns=columns, data=data)}),
        )

    def alert(self, title: str, text: str) -> None:
        """Sends an alert, where the package has alerts."""
        if (alert := self._opened.alert) is not None:
            self._attempt(f"the alert {title}", lambda: alert(printable(title), printable(text)))

    def close(self) -> None:
        self._attempt("the end of the run", self._opened.close)

    def _attempt(self, when: str, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as error:
            if not self._warned:
                self._warned = True
                reason = printable(f"{type(error).__name__}: {error}")
                self._warn(f"{self._name} failed at {when} ({reason}); training goes on, metrics.jsonl has every step")


def tensorboard(run_dir: Path, recipe: Mapping[str, object], resume_step: int | None) -> Opened:
    """Event files under RUN/tensorboard. On resume TensorBoard hides what an earlier process wrote of later steps."""
    package: Any = importlib.import_module("torch.utils.tensorboard")
    purge = None if resume_step is None else resume_step + 1
    writer = package.SummaryWriter(run_dir / "tensorboard", purge_step=purge)
    if resume_step is None:
        writer.add_text("recipe", f"```json\n{json.dumps(plain_tree(recipe), indent=2)}\n```", 0)

    def log(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Opened(log, writer.close)


def wandb(run_dir: Path, recipe: Mapping[str, object], resume_step: int | None) -> Opened:
    """Weights & Biases. The key comes from its own login or WANDB_API_KEY; WANDB_MODE=offline needs none.

    RUN/wandb/run-id keeps the run's id, so that a resumed run continues it; W&B itself ignores steps that it already has.
    """
    package: Any = importlib.import_module("wandb")
    id_file = run_dir / "wandb" / "run-id"
    if resume_step is None or not id_file.is_file():
        id_file.parent.mkdir(parents=True, exist_ok=True)
        id_file.write_text(uuid4().hex[:12])
    run = package.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=run_dir.name,
        id=id_file.read_text().strip(),
        dir=str(run_dir),
        config=plain_tree(recipe),
        resume="allow",
        settings=package.Settings(console="off"),
    )
    return Opened(
        lambda step, values: run.log(dict(values), step=step),
        run.finish,
        package.Table,
        partial(run.alert, level="WARN"),
    )


def trackio(run_dir: Path, recipe: Mapping[str, object], resume_step: int | None) -> Opened:
    """Trackio, local unless TRACKIO_SPACE_ID names a Space. A resumed run sends steps after its checkpoint again."""
    package: Any = importlib.import_module("trackio")
    run = package.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=run_dir.name,
        config=plain_tree(recipe),
        resume="never" if resume_step is None else "allow",
        embed=False,
    )
    alert = partial(package.alert, level=package.AlertLevel.WARN) if hasattr(package, "alert") else None
    return Opened(lambda step, values: run.log(dict(values), step=step), run.finish, package.Table, alert)


LOGGERS: Mapping[str, Callable[[Path, Mapping[str, object], int | None], Opened]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "trackio": trackio,
}


def make_loggers(
    run_dir: Path,
    names: Sequence[str],
    recipe: Mapping[str, object],
    *,
    resume_step: int | None = None,
    warn: Callable[[str], None],
) -> list[JsonLines | Dashboard]:
    """RUN/metrics.jsonl and the loggers of `names`. With `resume_step`, lines of later steps are dropped first.

    Raises RecipeError for an unknown name, a package that is not installed and a service that cannot be started.
    """
    check_loggers(names)
    lines = JsonLines(run_dir / "metrics.jsonl")
    if resume_step is not None:
        lines.truncate_after(resume_step)
    loggers: list[JsonLines | Dashboard] = [lines]
    for name in names:
        try:
            opened = LOGGERS[name](run_dir, recipe, resume_step)
        except Exception as error:
            for started in loggers:
                started.close()
            reason = printable(f"{type(error).__name__}: {error}")
            raise RecipeError(
                f"loggers: {name!r} could not be started ({reason}); log in to it, set it to offline, or remove it"
            ) from error
        loggers.append(Dashboard(name, opened, warn))
    return loggers


def check_loggers(names: Sequence[str]) -> None:
    """Checks that every name is known and its package can be found; imports and writes nothing."""
    for name in names:
        if name not in LOGGERS:
            raise RecipeError(f"loggers: unknown logger {name!r}; {nearest(name, LOGGERS)}")
        if importlib.util.find_spec(name) is None:
            raise RecipeError(f"loggers: {name!r} is not installed; run: pip install understudy[{name}]")
