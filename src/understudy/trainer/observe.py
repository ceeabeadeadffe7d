"""Numbers, warnings and evaluations of a run, on their way to the console, the loggers and the event files."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np

from understudy.eval.summary import EvalSummary
from understudy.format import interval
from understudy.lazy import Tensor, torch
from understudy.text import printable
from understudy.trainer.alarms import Alarms, Change
from understudy.trainer.checkpoint import Progress
from understudy.trainer.collect import Collected
from understudy.trainer.console import Console
from understudy.trainer.loggers import Dashboard, JsonLines
from understudy.types import Author, Metric, Sample

RISEN = 100.0
"""Times its beginning that a loss reaches only where training has diverged."""
RISEN_TO = 1.0
"""Nats a token below which a loss that rose is no more than noise around 0."""
MAX_PERIOD, MIN_LOOP_TOKENS = 64, 16
"""The longest part that counts as repeated, and the fewest tokens that are a loop."""
BY_TEACHER = ("response_tokens", "truncated", "repetition", "staleness", "turns", "tool_calls", "tool_errors")
"""Metrics of samples that are logged for each of several teachers too."""


class Clock:
    """Seconds of each phase of a step; on a GPU the phase ends when its kernels do."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        # kernels run behind Python: without this their time would count for a later phase
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[phase] = time.perf_counter() - begun

    def total_s(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started

    def rates(self, num_samples: int, num_tokens: int) -> dict[str, float]:
        """Returns seconds by phase, and samples and response tokens per second of the whole step."""
        total = self.total_s()
        return self.seconds | {
            "step_s": total,
            "tokens_per_s": num_tokens / total,
            "samples_per_s": num_samples / total,
        }


def collected_metrics(collected: Collected, updates: int, *, by_teacher: bool = False) -> dict[str, Metric]:
    """Returns the metrics of a step's samples on this rank; `updates`: those in the weights that learn from them.

    Lengths are of all samples, `truncated` of those that the student wrote, `staleness` of the tokens trained on.
    `by_teacher`: those in `BY_TEACHER` also for each teacher, under "teacher/NAME/".
    """
    metrics = _sample_metrics(collected.written, collected.samples, updates)
    # a rank may train on samples that another has written
    teachers = {one.teacher: None for one in (*collected.written, *collected.samples) if one.teacher and by_teacher}
    for teacher in teachers:
        written, trained = (
            [one for one in samples if one.teacher == teacher] for samples in (collected.written, collected.samples)
        )
        own = _sample_metrics(written, trained, updates)
        metrics |= {f"teacher/{teacher}/{name}": own[name] for name in BY_TEACHER if name in own}
    return metrics | collected.metrics


def _sample_metrics(written: Sequence[Sample], trained: Sequence[Sample], updates: int) -> dict[str, Metric]:
    own = [sample for sample in written if sample.finish != "data"]
    staleness = staleness_of(trained, updates)
    metrics = {
        "on_policy": Metric(len(own), len(written)),
        "staleness": Metric(float(staleness.sum()), staleness.numel()),
        "response_tokens": Metric(sum(sample.num_written_tokens for sample in written), len(written)),
        "truncated": Metric(sum(sample.truncated for sample in own), len(own)),
        "repetition": Metric(sum(ends_in_loop(own)), len(own)),
    }
    given = [int((sample.author == Author.TEACHER).sum()) for sample in own]
    if any(given):
        metrics["prefix_tokens"] = Metric(sum(given), sum(count > 0 for count in given))
    if any(sample.messages for sample in own):
        read = sum(sample.num_response_tokens - sample.num_written_tokens for sample in own)
        turns = sum(message["role"] == "assistant" for sample in own for message in sample.messages)
        failed, rewritten = (sum(sample.finish == end for sample in own) for end in ("environment", "rewritten"))
        replies = [message for sample in own for message in sample.messages if message["role"] == "tool"]
        values = {"environment_tokens": read, "turns": turns, "environment_failed": failed, "rewritten": rewritten}
        values |= {"tool_calls": len(replies), "tool_errors": sum(bool(message.get("error")) for message in replies)}
        for author in (Author.STUDENT, Author.TEACHER):
            values[f"tokens/{author.name.lower()}"] = sum(int((sample.author == author).sum()) for sample in own)
        metrics |= {name: Metric(value, len(own)) for name, value in values.items()}
        metrics["turn_tokens"] = Metric(sum(sample.num_written_tokens for sample in own), turns)
    return metrics


def why_not_learnt(num_updates: int, rows: Sequence[Mapping[str, float | None]]) -> str | None:
    """Says why a run of these steps, as in metrics.jsonl, did not learn; None where nothing speaks against it.

    It made no update, or its loss rose by orders of magnitude over the last phase of its method. The loss of rewards, a
    surrogate that begins at 0, has to be far beyond what advantages explain.
    """
    if rows and num_updates == 0:
        names = ("samples_dropped", "unscored", "unrewarded", "prompts_flat", "prompts_too_long", "samples_left_out")
        counts = {name: sum(row.get(name) or 0.0 for row in rows) for name in names}
        seen = ", ".join(f"{name} {count:g}" for name, count in counts.items() if count)
        return (
            f"it did not learn: none of its {len(rows)} steps made an update, as no sample was left to train on"
            f"{f' ({seen}, summed over the steps)' if seen else ''}; see metrics.jsonl and the warnings"
        )
    phase = [row for row in rows if row.get("phase") == rows[-1].get("phase")]
    losses = [abs(loss) for row in phase if (loss := row.get("loss")) is not None and math.isfinite(loss)]
    num = max(1, min(20, len(losses) // 10))
    if len(losses) < 2:
        return None
    before, after = median(losses[:num]), median(losses[-num:])
    if after < RISEN * before or after < RISEN_TO * (RISEN if "reward" in rows[-1] else 1.0):
        return None
    return f"it did not learn: its loss rose from {before:.3g} to {after:.3g}; lower train.lr and begin a new run"


def staleness_of(samples: Sequence[Sample], updates: int) -> Tensor:
    """Returns the updates since the weights that wrote each of the student's tokens. [N]."""
    versions = [sample.policy_version for sample in samples if sample.policy_version is not None]
    known = torch.cat(versions) if versions else torch.zeros(0, dtype=torch.int64)
    return updates - known[known >= 0]


def ends_in_loop(samples: Sequence[Sample]) -> list[bool]:
    """Whether the last tokens of each sample, `MIN_LOOP_TOKENS` or more, repeat `MAX_PERIOD` tokens or fewer at least three
    times."""
    tails = np.full((len(samples), 3 * MAX_PERIOD), -1, dtype=np.int64)
    for row, sample in zip(tails, samples, strict=True):
        ids = sample.response_ids[-tails.shape[1] :].numpy()
        row[tails.shape[1] - len(ids) :] = ids
    found = np.zeros(len(samples), dtype=bool)
    for period in range(1, MAX_PERIOD + 1):
        size = max(3 * period, MIN_LOOP_TOKENS)
        tail = tails[:, -size:]
        found |= (tail[:, 0] >= 0) & (tail[:, period:] == tail[:, :-period]).all(axis=1)
    return found.tolist()


def peak_memory_gib() -> float:
    """Returns the peak since the process began: of the GPU where there is one, else of the process (resident set)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # kilobytes on Linux, bytes on macOS
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def nonfinite_record(sample: Sample) -> dict[str, object]:
    """Returns a sample of a step that was skipped, with all that its loss was made of."""

    def numbers(values: Tensor | None) -> list[float | str] | None:
        # JSON has no NaN: a value that is not finite becomes a string
        return None if values is None else [x if math.isfinite(x) else str(x) for x in values.double().tolist()]

    score = sample.scores
    return {
        "prompt_id": sample.prompt.id,
        "index": sample.index,
        "prompt": sample.prompt.conversation,
        "response": sample.text,
        "finish": sample.finish,
        "prompt_length": sample.prompt_length,
        "token_ids": sample.token_ids.tolist(),
        "author": [Author(who).name.lower() for who in sample.author.tolist()],
        "rollout_logprob": numbers(sample.rollout_logprob),
        "teacher_logprob": None if score is None else numbers(score.logprob),
        "teacher_hidden_finite": None if score is None or score.hidden is None else bool(score.hidden.isfinite().all()),
    }


class Callback:
    """Told of a run's progress on the first rank; extend it, and override what you want to hear. What a method raises ends
    the run, which is saved first."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """`step` is done; `metrics` as in metrics.jsonl."""

    def on_evaluation(self, summary: EvalSummary) -> None:
        """An evaluation is done."""

    def on_alarm(self, change: Change) -> None:
        """An alarm begins or ends (`change.begins`): `change.alarm` says its name, what it means and what to change."""

    def on_end(self, run: Any) -> None:
        """The run, an `understudy.Run`, has ended, but not by an error."""


@dataclass
class Observer:
    """Sends numbers to the console, the loggers and files of lines. Ranks other than the first have none of these."""

    console: Console
    loggers: Sequence[JsonLines | Dashboard] = ()
    files: Mapping[str, JsonLines] = field(default_factory=dict)
    """By name: "events", and "consumed" for the prompts that each step used."""
    callbacks: Sequence[Callback] = ()
    alarms: Alarms = field(default_factory=Alarms)
    summaries: list[EvalSummary] = field(default_factory=list)
    """The evaluations of the run, by step."""
    _told_of_console: bool = False

    def step(self, progress: Progress, numbers: Mapping[str, float], positions: Sequence[int]) -> None:
        """Logs the numbers of a step; those that were not measured are left out, not zero. `alarm/NAME` is 1 while an alarm is
        on, and 0 at the step where it ends.

        `positions`: of its prompts in the order of training; empty where they are not recorded.
        """
        values = {"time_s": progress.elapsed_s, "num_samples": progress.num_samples} | dict(numbers)
        changes = self.alarms.step(progress.step, values)
        values |= {f"alarm/{change.alarm.name}": 0.0 for change in changes if not change.begins}
        values |= {f"alarm/{name}": 1.0 for name in self.alarms.on}
        for logger in self.loggers:
            logger.log(progress.step, values)
        self.console.update(progress.step, values)
        if self.console.problem is not None and not self._told_of_console:
            self._told_of_console = True
            text = f"the console cannot be written to ({self.console.problem}); training goes on, metrics.jsonl has every step"
            self._write("events", {"step": progress.step, "kind": "warning", "text": text})
            with suppress(OSError):
                print(f"warning: {text}", file=sys.stderr, flush=True)
        self._show(changes)
        if positions:
            self._write("consumed", {"step": progress.step, "positions": list(positions)})
        for callback in self.callbacks:
            callback.on_step(progress.step, values)

    def samples(self, step: int, rows: Sequence[Mapping[str, object]]) -> None:
        """Sends samples to the dashboards that have tables."""
        for logger in self.loggers:
            if isinstance(logger, Dashboard):
                logger.samples(step, rows)

    def evaluation(self, summary: EvalSummary, seconds: float) -> float | None:
        """Shows an evaluation; returns its avg@k if it was graded."""
        self.summaries.append(summary)
        for callback in self.callbacks:
            callback.on_evaluation(summary)
        changes = self.alarms.evaluated(summary)
        name = f"avg@{summary.samples_per_prompt}"
        found = summary.metrics.get(name)
        if found is None:
            text = f"evaluated at step {summary.step} in {seconds:.1f} s; no sample has a score"
            self.console.note(text)
            self._write("events", {"step": summary.step, "kind": "info", "text": text})
        else:
            self.console.evaluated(summary.step, name, found)
        if "teacher" in summary.metrics:
            self.console.note(f"step {summary.step:,}: the teacher {interval('teacher', summary.metrics['teacher'])}")
        self._show(changes)
        return None if found is None else found.value

    def warn(self, step: int, text: str) -> None:
        """Shows and records a warning."""
        self.console.warn(text)
        self._write("events", {"step": step, "kind": "warning", "text": printable(text)})

    def _show(self, changes: Sequence[Change]) -> None:
        """Says on the console and in the files which alarms begin and end; dashboards alert to those that begin."""
        for change in changes:
            text = f"step {change.step:,}: {change.text}"
            self.console.alarm(text, begins=change.begins)
            self._write("events", change.event)
            for logger in self.loggers:
                if isinstance(logger, Dashboard) and change.begins:
                    logger.alert(change.alarm.name, text)
            for callback in self.callbacks:
                callback.on_alarm(change)

    def sync(self) -> None:
        """Waits until all lines are on disk."""
        for lines in (*self.loggers, *self.files.values()):
            if isinstance(lines, JsonLines):
                lines.sync()

    def close(self) -> None:
        """Closes loggers, files and console."""
        for opened in (*self.loggers, *self.files.values()):
            opened.close()
        self.console.close()

    def _write(self, name: str, record: Mapping[str, object]) -> None:
        if name in self.files:
            self.files[name].write(record)
