"""What a person sees of a run: calm lines in a log, one display on a terminal, never a control character of a model."""

from __future__ import annotations

import io
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from understudy.format import Interval
from understudy.trainer.console import Console

STEP = {"loss": 0.0553, "tokens_per_s": 9256.0, "generate_s": 0.19, "score_s": 0.04, "update_s": 0.13, "step_s": 0.36}


class Clock:
    """A time that passes only when told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def plain(run: Callable[[Console, Clock], None], **settings: bool) -> list[str]:
    """The lines that `run` writes to a log."""
    stream, clock = io.StringIO(), Clock()
    with Console(stream, live=False, clock=clock, **settings) as console:
        run(console, clock)
    return stream.getvalue().splitlines()


def test_a_line_has_progress_loss_speed_phases_and_the_time_left() -> None:
    def run(console: Console, clock: Clock) -> None:
        console.start(400)
        clock.now += 2.0
        console.update(1, STEP)

    assert plain(run) == [
        "step 1/400  loss 0.0553  9,256 tokens/s  generate 0.19 s, score 0.04 s, update 0.13 s  13 min 18 s left"
    ]


def test_the_time_left_of_a_resumed_run_counts_its_own_steps_alone() -> None:
    """300 steps that an earlier process did are no sign of speed: 2 s a step here, 99 to go."""

    def run(console: Console, clock: Clock) -> None:
        console.start(400, 300)
        clock.now += 2.0
        console.update(301, {})

    assert plain(run) == ["step 301/400  3 min 18 s left"]


def test_the_time_left_of_a_run_that_a_good_evaluation_ends_is_an_upper_bound() -> None:
    def run(console: Console, clock: Clock) -> None:
        console.start(400, ends_early=True)
        clock.now += 1.0
        console.update(1, {})

    assert plain(run) == ["step 1/400  at most 6 min 39 s left"]


@pytest.mark.parametrize(("step_s", "num_steps", "most"), [(0.05, 1_200, 14), (1.0, 36_000, 330), (600.0, 20, 20)])
def test_a_log_gets_lines_at_a_calm_rate(step_s: float, num_steps: int, most: int) -> None:
    """One per 5 s at first (60 s: 12, the first and the last), then one per 2 % of the time (10 h: 50 + 50 ln 144)."""

    def run(console: Console, clock: Clock) -> None:
        console.start(num_steps)
        for step in range(1, num_steps + 1):
            clock.now += step_s
            console.update(step, STEP)

    lines = plain(run)
    assert most / 2 < len(lines) <= most
    assert lines[0].startswith("step 1/")
    assert lines[-1].startswith(f"step {num_steps:,}/{num_steps:,}  ")


def test_speeds_are_means_of_the_last_steps_and_the_loss_is_the_last() -> None:
    def run(console: Console, clock: Clock) -> None:
        console.start(40)
        for step in range(1, 41):
            console.update(step, {"loss": float(step), "generate_s": 1.0 if step % 2 else 3.0})

    assert plain(run)[-1] == "step 40/40  loss 40  generate 2 s"


def test_a_number_that_was_not_recorded_is_not_shown_and_a_bad_one_is_called_bad() -> None:
    def run(console: Console, clock: Clock) -> None:
        console.start(2)
        console.update(1, {})
        console.update(2, {"loss": math.nan, "generate_s": math.nan})

    assert plain(run) == ["step 1/2  0.0 s left", "step 2/2  loss not finite"]


def test_an_evaluation_stays_in_view() -> None:
    def run(console: Console, clock: Clock) -> None:
        console.start(2)
        console.update(1, {})
        console.evaluated(1, "avg@4", Interval(0.979, 0.968, 0.989))
        console.update(2, {})

    assert plain(run)[1:] == ["step 1: avg@4 97.9 % [96.8, 98.9]", "step 2/2  avg@4 97.9 % at step 1"]


def test_progress_of_something_long_says_where_it_is() -> None:
    def run(console: Console, clock: Clock) -> None:
        with console.progress("evaluate", 40) as advance:
            for _ in range(20):
                clock.now += 1.0
                advance(2)

    assert plain(run) == [
        "evaluate: 10/40  15.0 s left",
        "evaluate: 20/40  10.0 s left",
        "evaluate: 30/40  5.0 s left",
        "evaluate: 40/40 in 20.0 s",
    ]


def test_an_error_inside_progress_passes_through_and_says_how_far_it_was() -> None:
    def run(console: Console, clock: Clock) -> None:
        with pytest.raises(KeyError), console.progress("evaluate", 40) as advance:
            advance(8)
            raise KeyError("x")

    assert plain(run) == ["evaluate: 8/40 in 0.0 s"]


def test_update_before_start_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"before Console\.start"):
        Console(io.StringIO()).update(1, STEP)


def test_model_text_cannot_steer_the_terminal_or_the_markup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "a-very-secret-value")

    def run(console: Console, clock: Clock) -> None:
        console.note("\x1b]0;owned\x07[red]a[/red] :smile: \x1b[2Jb \ud800")
        console.warn("key a-very-secret-value")
        console.table("[b]t\x1b[2J", ["[i]c"], [["[/nothing]\x1b[1A"]])

    text = "\n".join(plain(run))
    assert "\x1b" not in text
    assert "[red]a[/red] :smile: b" in text
    assert "warning: key [hidden]" in text
    assert "[b]t" in text
    assert "[/nothing]" in text


def test_a_table_shows_every_cell_and_refuses_a_short_row() -> None:
    long = "97.9 % [96.8, 98.9]"

    def run(console: Console, clock: Clock) -> None:
        console.table("Before and after", ["metric", "before", "after", "change"], [["avg@4", long, long, long]] * 2)
        with pytest.raises(ValueError, match="has 1 cells, not 2"):
            console.table("t", ["a", "b"], [["x"]])

    lines = plain(run)
    assert sum(line.split() == f"avg@4 {long} {long} {long}".split() for line in lines) == 2


def test_long_lines_are_not_broken_in_a_log() -> None:
    assert plain(lambda console, clock: console.note("x" * 500)) == ["x" * 500]


def test_a_quiet_console_writes_nothing() -> None:
    def run(console: Console, clock: Clock) -> None:
        console.start(2)
        console.update(1, STEP)
        console.warn("x")
        with console.progress("evaluate", 1) as advance:
            advance(1)

    assert plain(run, quiet=True) == []


def test_a_stream_that_knows_only_ascii_is_enough() -> None:
    """A log under LC_ALL=C: "?" in place of a character, not a dead run."""
    code = (
        "from understudy.trainer.console import Console\n"
        "with Console() as console:\n"
        "    console.note('\\u2212 \\u4f60')\n"
        "    console.table('\\u2212', ['a'], [['\\u2192']])\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("? ?\n")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_display_that_is_redrawn_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Console(stream) as console:
        console.start(4)
        for step in (1, 2):
            console.update(step, STEP)
            with console.progress("evaluate", 3) as advance:
                advance(3)
        console.note("kept above the bar")
        raise KeyboardInterrupt
    text = stream.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor was hidden and not shown again"
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.rsplit("kept above the bar", 1)[1])
    assert re.search(r"train .*2/4", last)
    assert "loss 0.0553" in last
    assert "generate 0.19 s" in last
    assert "evaluate" not in last


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Console(stream) as console:
        console.start(1)
        console.update(1, STEP)
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().startswith("step 1/1  loss")


def test_closing_twice_does_nothing() -> None:
    console = Console(io.StringIO())
    console.close()
    console.close()
