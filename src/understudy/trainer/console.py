"""A run's output for people: a live display on a terminal, plain lines at a calm rate in a log."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, TextIO, cast

import rich.console
from rich import box
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from understudy.format import Bounded, interval, number, quantity, seconds
from understudy.text import printable

PHASES = ("generate_s", "score_s", "update_s")
_WINDOW = 20
"""Steps over which speeds are averaged, so that the digits can be read."""
_REFRESH_PER_S = 4
_LINE_EVERY_S = 5.0
_LINE_AT_LATEST_S = 300.0
_LINE_SHARE = 0.02
"""Share of the time so far until the next plain line: a run of hours writes hundreds of lines, not thousands."""
_PLAIN_WIDTH = 160
"""Columns of a table in a log, which has no width of its own."""


class Console:
    """Progress, notes and tables of one run. A context manager; leaving it gives the terminal back.

    `live=None` decides by the stream: a terminal gets a display that is redrawn, everything else plain lines.
    `quiet` writes nothing (ranks other than the first). Strings may come from a model: control characters, terminal
    escape sequences and secrets are removed, and nothing is read as markup. A stream that cannot be written to, because
    nobody reads it any more or a disk is full, ends nothing: its lines are dropped.
    """

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        live: bool | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        out_stream = stream or sys.stdout
        self._stream = out_stream if isinstance(out_stream, _Enduring) else _Enduring(out_stream)
        out = rich.console.Console(
            file=cast("TextIO", self._stream),
            quiet=quiet,
            markup=False,
            highlight=False,
            emoji=False,
            force_terminal=live,
        )
        if not out.is_terminal and not out.is_jupyter:
            out.width = _PLAIN_WIDTH
        self._out = out
        # rich redraws a notebook's output through ipywidgets
        redraws = (
            find_spec("ipywidgets") is not None if out.is_jupyter else out.is_terminal and not out.is_dumb_terminal
        )
        self._live = not quiet and live is not False and redraws
        self._clock = clock
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=out,
        )
        self._display: Live | None = None
        self._run: _Pace | None = None
        self._recent: deque[Mapping[str, float]] = deque(maxlen=_WINDOW)
        self._accuracy = ""

    @property
    def problem(self) -> str | None:
        """Why something could not be written, such as "Broken pipe"; None where all of it was."""
        return self._stream.problem

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, total_steps: int, first_step: int = 0, *, ends_early: bool = False) -> None:
        """Begins a run of `total_steps`, of which `first_step` were done before it was resumed.

        `ends_early`: a good evaluation may end it, so the time left is called an upper bound.
        """
        self._run = _Pace(self._bars, "train", self._clock, total_steps, first_step)
        self._run.bound = "at most " if ends_early else ""
        # the first step has a line of its own
        self._run.said = -math.inf
        self._show()

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` is done; `metrics` are its numbers, named as in metrics.jsonl. Raises RuntimeError before `start`."""
        if self._run is None:
            raise RuntimeError("Console.update before Console.start: the number of steps is not known yet")
        self._recent.append(metrics)
        self._run.move(step)
        if not self._live and self._run.is_due():
            numbers, phases = self._facts()
            facts = [f"step {step:,}/{self._run.total:,}", *numbers, ", ".join(phases), self._run.left]
            self.note("  ".join(filter(None, facts)))

    def evaluated(self, step: int, name: str, found: Bounded) -> None:
        """The main held-out metric, such as ("avg@4", Interval(0.979, 0.968, 0.989)); it stays in view."""
        self._accuracy = f"{name} {quantity(name, found.value)} at step {step:,}"
        self.note(f"step {step:,}: {name} {interval(name, found)}")

    def note(self, text: str, style: str = "") -> None:
        self._out.print(Text(self._clean(text), style=style), soft_wrap=True)

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}", style="yellow")

    def alarm(self, text: str, *, begins: bool) -> None:
        self.note(text, style="bold red" if begins else "green")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Rows of text under `columns`; raises ValueError where a row has another length."""
        table = Table(title=Text(self._clean(title)), title_justify="left", box=box.SIMPLE_HEAD)
        for column in columns:
            table.add_column(Text(self._clean(column)), overflow="fold")
        for row in rows:
            if len(row) != len(columns):
                raise ValueError(f"table {title!r}: the row {list(row)} has {len(row)} cells, not {len(columns)}")
            table.add_row(*(Text(self._clean(cell)) for cell in row))
        self._out.print(table)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """`with console.progress("evaluate", 200) as advance: advance(8)`; also inside a run that has started."""
        title = self._clean(title)
        pace = _Pace(self._bars, title, self._clock, total)
        alone = self._display is None
        self._show()

        def advance(count: int) -> None:
            pace.move(pace.done + count)
            if not self._live and pace.done < total and pace.is_due():
                self.note(f"{title}: {pace.done:,}/{total:,}  {pace.left}")

        try:
            yield advance
        finally:
            self._bars.remove_task(pace.task)
            if alone:
                self.close()
            if alone or pace.elapsed() >= _LINE_EVERY_S:
                self.note(f"{title}: {pace.done:,}/{total:,} in {seconds(pace.elapsed())}")

    def close(self) -> None:
        """Ends the display; the last state stays on the screen. Does nothing a second time."""
        display, self._display = self._display, None
        if display is not None:
            display.stop()

    def _show(self) -> None:
        if self._live and self._display is None:
            self._display = Live(get_renderable=self._render, console=self._out, refresh_per_second=_REFRESH_PER_S)
            self._display.start()

    def _render(self) -> rich.console.Group:
        lines = [self._clean("  " + " \u00b7 ".join(line)) for line in self._facts() if line]
        texts = [Text(line, style="dim", no_wrap=True, overflow="ellipsis") for line in lines]
        return rich.console.Group(self._bars, *texts)

    def _facts(self) -> tuple[list[str], list[str]]:
        """Loss, accuracy and speed; and seconds of each phase, as ["generate 0.19 s", ...]. Means over the last steps."""
        recent = list(self._recent)

        def mean(name: str) -> float | None:
            known = [metrics[name] for metrics in recent if math.isfinite(metrics.get(name, math.nan))]
            return sum(known) / len(known) if known else None

        numbers = [f"loss {number(recent[-1]['loss'])}"] if recent and "loss" in recent[-1] else []
        numbers += [self._accuracy] if self._accuracy else []
        speed = mean("tokens_per_s")
        numbers += [] if speed is None else [f"{number(speed)} tokens/s"]
        phases = ((name.removesuffix("_s"), mean(name)) for name in PHASES)
        return numbers, [f"{name} {number(value)} s" for name, value in phases if value is not None]

    def _clean(self, text: str) -> str:
        """Makes text safe to print; characters that the stream's encoding lacks become "?"."""
        encoding = self._out.encoding
        return printable(text).encode(encoding, "replace").decode(encoding)


class _Enduring:
    """A stream whose failures are kept as `problem`, and raise nothing."""

    def __init__(self, stream: TextIO | None) -> None:
        # Python has no standard output where it was closed
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (ends with the process)
        self.problem: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, do: Callable[[], object]) -> None:
        try:
            do()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not self._stream.closed:
                raise
            self.problem = self.problem or getattr(error, "strerror", None) or "it is closed"


@contextmanager
def endured() -> Iterator[None]:
    """Inside, nothing that prints fails for a standard output or standard errors that nobody reads: libraries print too."""
    plain = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast("TextIO", _Enduring(stream)) for stream in plain)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = plain


class _Pace:
    """A bar with its progress: how far it is, when it will end and when the next line about it is due."""

    def __init__(self, bars: Progress, title: str, clock: Callable[[], float], total: int, first: int = 0) -> None:
        self._bars, self._clock, self._start, self._first = bars, clock, clock(), first
        self.task = bars.add_task(title, total=total, completed=first, left="")
        self.total, self.done, self.left = total, first, ""
        self.bound = ""
        """Stands before the time left."""
        self.said = 0.0
        """When the last line was written; at first none is due for a while."""

    def elapsed(self) -> float:
        return self._clock() - self._start

    def move(self, done: int) -> None:
        """Sets what is done, and the time `left`, as "1 min 40 s left", by the mean speed of this process; empty before the
        first unit and at the end."""
        here, self.done, self.left = done - self._first, done, ""
        if here > 0 and done < self.total:
            self.left = f"{self.bound}{seconds(self.elapsed() / here * (self.total - done))} left"
        self._bars.update(self.task, completed=done, left=self.left)

    def is_due(self) -> bool:
        """Whether to write a line now: at the end, and before it at a falling rate."""
        now = self.elapsed()
        if self.done < self.total and now - self.said < min(_LINE_AT_LATEST_S, max(_LINE_EVERY_S, _LINE_SHARE * now)):
            return False
        self.said = now
        return True
