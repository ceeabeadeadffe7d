"""Alarms: how runs fail, what the numbers look like when they do, and what to change.

`ALARMS` is the table. An alarm is on while all of its conditions hold; one whose numbers a run does not have does not apply
to it. The state is a function of the numbers that were logged, so a resumed run reads it from its own metrics.jsonl.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Literal

from understudy.eval.summary import EvalSummary
from understudy.format import number

OnAlarm = Literal["warn", "stop", "ignore"]
Reading = Literal["mean", "first", "times first", "since first", "times most", "spikes"]

WINDOW = 10
"""Steps that a mean is over: the evidence's shortest runs have 40, and a step of theirs 32 samples."""
SPIKE_WINDOW = 20
SPIKE_TIMES = 10.0
"""A spike is a rise above so many times the median of the last `SPIKE_WINDOW` steps."""


@dataclass(frozen=True)
class Condition:
    """One number of a run, and the bound on its other side it is a bad sign."""

    metric: str
    reading: Reading = "mean"
    """Mean of the last `window` steps; of the first `WINDOW`; the former over or minus the latter; over the largest value so
    far; or the number of spikes in the last `SPIKE_WINDOW` steps."""
    above: float | None = None
    below: float | None = None
    per: str | None = None
    """A metric whose mean the value is divided by."""
    window: int = WINDOW
    optional: bool = False
    """Holds in a run without the number."""

    def value(self, history: History) -> float | None:
        """None: there are too few steps with this number."""
        value = history.read(self.metric, self.reading, self.window)
        if value is None or self.per is None:
            return value
        whole = history.read(self.per, "mean", self.window)
        return value / whole if whole else None

    def holds(self, history: History) -> bool:
        value = self.value(history)
        if value is None:
            return self.optional and not history.count(self.metric if self.per is None else self.per)
        return (self.above is None or value > self.above) and (self.below is None or value < self.below)

    @property
    def bound(self) -> str:
        """In words: "truncated / on_policy above 0.5"."""
        name = self.metric if self.per is None else f"{self.metric} / {self.per}"
        how = {"mean": "", "first": " at first"}.get(self.reading, f" {self.reading}")
        bounds = (("above", self.above), ("below", self.below))
        return f"{name}{how} {' and '.join(f'{word} {at:.4g}' for word, at in bounds if at is not None)}"

    def show(self, history: History) -> str:
        """The bound and the value: "truncated above 0.5: 0.61"; "" where there is none."""
        value = self.value(history)
        return "" if value is None else f"{self.bound}: {number(value)}"


@dataclass(frozen=True)
class Alarm:
    """One way to fail."""

    name: str
    when: tuple[Condition, ...]
    """All of them hold."""
    means: str
    advice: str
    source: str
    """Source of the bounds."""
    after: int = 0
    """Steps of the run until it is judged."""

    def holds(self, history: History, step: int) -> bool:
        return step >= self.after and all(part.holds(history) for part in self.when)

    @property
    def bounds(self) -> str:
        """In words: "truncated above 0.5, no_eos above 0.5"."""
        return ", ".join(part.bound for part in self.when) + (f", from step {self.after} on" if self.after else "")

    @property
    def reads(self) -> tuple[str, ...]:
        """The metrics that it cannot do without."""
        names = [name for part in self.when if not part.optional for name in (part.metric, part.per) if name]
        return tuple(dict.fromkeys(names))


EVIDENCE = "healthy runs of the evidence but the claim `sure`"
"""Runs of `sure` start at 2 % and learn so late that healthy ones raise alarms at step 60."""
ALARMS: tuple[Alarm, ...] = (
    Alarm(
        "length_explosion",
        (Condition("response_tokens", "times first", above=2.0), Condition("truncated", "since first", above=0.1)),
        "Responses are more than twice as long as at first, and more of them are cut at the limit.",
        "Compare the end tokens of student and teacher (understudy doctor); lower train.lr, or let the reward cost length "
        "(method.overlong_buffer).",
        f"{EVIDENCE}: none is cut a tenth more often than at first; ms-swift#9526 and verl#6811 are explosions",
    ),
    Alarm(
        "length_collapse",
        (
            Condition("response_tokens", "times first", below=1 / 3),
            Condition("truncated", "first", below=0.25),
            Condition("accuracy_rise", below=0.0, window=1, optional=True),
        ),
        "Responses are less than a third as long as at first, though few were cut then and accuracy has not risen.",
        "Read some in samples/: if they stop before they answer, lower train.lr, or take method.reduce: token, which does not "
        "weigh short responses more.",
        f"{EVIDENCE}: at most 5 % shorter",
    ),
    Alarm(
        "missing_eos",
        (
            Condition("truncated", above=0.5),
            Condition("response_tokens", above=8.0),
            Condition("no_eos", above=0.5, window=1, optional=True),
        ),
        "More than half of the responses do not end by themselves.",
        "If they go on behind their answer, no EOS is learnt: compare the end tokens of student, template and teacher "
        "(understudy doctor). If they are still at work, raise sampling.max_new_tokens; if they are meant to be cut, set "
        "train.on_alarm.missing_eos: ignore.",
        f"{EVIDENCE}: only one whose responses are of two tokens by design; trl#6357",
    ),
    Alarm(
        "repetition",
        (Condition("repetition", above=0.1),),
        "More than one in ten responses ends in a loop, the same tokens again and again.",
        "A teacher finds each repeated token likely, so its score rewards a loop: lower train.lr, lower "
        "sampling.max_new_tokens, or train with prefixes of the teacher (tropd).",
        "a loop: 16 tokens or more that repeat 1 to 64, three times or more; a healthy run of recipes/debugging has none",
    ),
    Alarm(
        "entropy_collapse",
        (
            Condition("on_policy", above=0.5),
            Condition("student_entropy", "times first", below=0.1),
            Condition("student_entropy", below=0.05),
            Condition("student_entropy", per="teacher_entropy", below=0.5, optional=True),
        ),
        "The student hardly varies any more: its entropy is below a tenth of what it was, and far below the teacher's.",
        "Samples of a prompt are now alike, so that rewards teach nothing: go back to an earlier checkpoint, lower train.lr or "
        "sampling, take a method with entropy (eopd) or a clip that is wider above (dapo).",
        f"Cui et al., arXiv 2505.22617; {EVIDENCE}: at least 0.15 of what it was, where it is that low",
    ),
    Alarm(
        "teacher_excludes",
        (Condition("teacher_excluded", above=0.01),),
        "The teacher gives probability 0 to more than one in a hundred of the student's tokens.",
        "Compare vocabularies and chat templates (understudy doctor); take top_p, top_k and min_p away from the teacher's "
        "server, or set teacher.extra_ids: mask.",
        "each counts as method.min_log_ratio, -20 nats: one in a hundred is 0.2 nats a token, as much as all others together",
    ),
    Alarm(
        "nothing_trusted",
        (Condition("trusted", below=0.2),),
        "Fewer than one in five tokens lie where the teacher is trusted, so that hardly anything of it is learnt.",
        "The student is too far away: train it with sft on the teacher's responses first, or set method.anneal_steps for "
        "prefixes of the teacher.",
        f"{EVIDENCE}: at least 0.85",
    ),
    Alarm(
        "nothing_accepted",
        (Condition("accepted", below=0.05),),
        "The judge turns down more than 19 of 20 samples.",
        "Read some in samples/; lower method.threshold, or train the student with sft first.",
        "at 5 % a step of 32 samples learns from fewer than two",
    ),
    Alarm(
        "few_tokens_decide",
        (
            Condition("outlier_size", per="log_ratio_size", above=0.9),
            Condition("outliers", below=0.02),
            Condition("log_ratio_size", above=0.02),
            Condition("accuracy_rise", below=0.0, window=1, optional=True),
        ),
        "A few tokens carry nine tenths of the teacher's signal, those that one of the two finds 150 times as likely as the "
        "other does, and accuracy has not risen.",
        "Look at them in the report: often they are the template or the end of a response, on which the two differ. Else take "
        "a method that bounds them (reopold, tropd).",
        f"{EVIDENCE}: at most 0.8, or accuracy has risen; below 0.02 nats a token, four times what bfloat16 explains, "
        "little is left to carry",
    ),
    Alarm(
        "overlap_falls",
        (Condition("overlap", "since first", below=-0.1),),
        "Student and teacher have less in common than at first: the student moves away from its teacher.",
        "Lower train.lr; if rewards pull it away, give the teacher more weight.",
        f"{EVIDENCE}: at most 0.02; in another that loses 0.1, accuracy falls from 14 % to 1 %",
    ),
    Alarm(
        "sampler_gap",
        (Condition("sampler_gap", above=0.05),),
        "Samples do not come from the student that is trained: the engine's log-probabilities are others.",
        "Look at push_gap and staleness: old weights, another temperature or a filter of the engine. If it is precision or "
        "age, set method.correction.",
        "ten times what bfloat16 explains: 0.005 nats between vLLM and transformers",
    ),
    Alarm(
        "stale_samples",
        (Condition("staleness", above=8.0),),
        "Samples are more than eight updates old when they are learnt from.",
        "Lower async.max_staleness, train.minibatches or train.passes, or set method.correction.",
        "AReaL, arXiv 2505.24298: harmless up to 8 with a correction",
    ),
    Alarm(
        "gradient_spikes",
        (Condition("grad_norm", "spikes", above=3.0),),
        "The gradient jumps to more than ten times its usual size, again and again.",
        "Lower train.lr or train.max_grad_norm, or add train.warmup_steps; look in samples/ for tokens that the teacher finds "
        "impossible.",
        f"{EVIDENCE}: at most three in {SPIKE_WINDOW} steps",
    ),
    Alarm(
        "reward_hacking",
        (Condition("reward", "since first", above=0.0), Condition("accuracy_fall", above=0.0, window=1)),
        "The reward rises while held-out accuracy has fallen: the student learns what the reward likes, not the task.",
        "Read the samples with the highest reward; mend the verifier or the judge, and go back to the best checkpoint "
        "(train.keep_best).",
        "the 95 % intervals of this evaluation and of the best one do not meet",
    ),
    Alarm(
        "accuracy_falls",
        (Condition("accuracy_lost", above=0.0, window=1),),
        "Held-out accuracy is below where it began.",
        "Lower train.lr by a factor of 3 to 10. If it goes on, see whether the teacher reads the student's prompt in the form "
        "that it was trained on, at the same temperature, and is better than the student (eval.teacher).",
        f"the 95 % intervals of this evaluation and of the first one do not meet; {EVIDENCE}: in none from step 50 on",
        after=50,
    ),
    Alarm(
        "no_learning",
        (
            Condition("log_ratio", "first", below=-0.1),
            Condition("log_ratio", "times first", above=0.95),
            Condition("accuracy_gain", below=0.02, window=1, optional=True),
        ),
        "After 60 steps less than a twentieth of the distance to the teacher is gone, and accuracy has not risen.",
        "Raise train.lr by a factor of 3 to 10 (compare --tune train.lr=...). If it is high already, lower it.",
        f"{EVIDENCE}: at most 0.9 by then, or accuracy has risen by 0.04",
        after=60,
    ),
    Alarm(
        "updates_lost",
        (Condition("update_survives", below=0.5, window=1), Condition("lr", "times most", above=0.1, window=1)),
        "Rounding takes most of an update away, because the weights are in 16 bits.",
        "Set train.master_weights: true or student.dtype: float32 in a new run, or raise train.lr.",
        "more is lost than left, and not because a schedule has come to its end",
    ),
    Alarm(
        "weak_teacher",
        (Condition("teacher_lead", below=0.0, window=1),),
        "The teacher solves no more of the held-out problems than the student did at the start.",
        "Take a stronger teacher, or check its prompt and sampling: a teacher that fails teaches its failures.",
        "the teacher's accuracy minus the student's (eval.teacher)",
    ),
)
"""Every alarm."""


class History:
    """The numbers of a run that alarms look at: of each the first ones and the last ones."""

    def __init__(self) -> None:
        self._first: dict[str, list[float]] = {}
        self._last: dict[str, deque[float]] = {}
        self._most: dict[str, float] = {}
        self._count: dict[str, int] = {}

    def add(self, values: Mapping[str, float | None]) -> None:
        """Adds the numbers of a step; one that is not finite counts as not measured."""
        for name in METRICS & values.keys():
            value = values[name]
            if value is None or not math.isfinite(value):
                continue
            first = self._first.setdefault(name, [])
            if len(first) < WINDOW:
                first.append(value)
            self._last.setdefault(name, deque(maxlen=max(WINDOW, SPIKE_WINDOW))).append(value)
            self._most[name] = max(value, self._most.get(name, value))
            self._count[name] = self._count.get(name, 0) + 1

    def count(self, name: str) -> int:
        """Steps that had the number."""
        return self._count.get(name, 0)

    def read(self, name: str, reading: Reading, window: int) -> float | None:
        """As `Condition` says; None before there are enough steps, which for a comparison with the first are twice as many."""
        last = list(self._last.get(name, ()))
        if reading == "spikes":
            if len(last) < SPIKE_WINDOW:
                return None
            high = [value > SPIKE_TIMES * median(last) for value in last]
            return float(sum(now and not before for before, now in pairwise(high)))
        if self.count(name) < (2 * WINDOW if "first" in reading else window):
            return None
        mean, first = sum(last[-window:]) / window, sum(self._first[name]) / len(self._first[name])
        if reading == "times most":
            return mean / self._most[name] if self._most[name] else None
        if reading == "times first":
            return mean / first if first else None
        return {"mean": mean, "first": first, "since first": mean - first}[reading]


METRICS = frozenset(name for alarm in ALARMS for part in alarm.when for name in (part.metric, part.per) if name)
"""Every number that an alarm reads."""


@dataclass(frozen=True)
class Change:
    """An alarm that begins or ends."""

    alarm: Alarm
    step: int
    begins: bool
    measured: str

    @property
    def text(self) -> str:
        if not self.begins:
            return f"alarm {self.alarm.name} has ended"
        return f"alarm {self.alarm.name}: {self.alarm.means} {self.alarm.advice} ({self.measured})"

    @property
    def event(self) -> dict[str, object]:
        """The line in events.jsonl."""
        record: dict[str, object] = {
            "step": self.step,
            "kind": "alarm",
            "alarm": self.alarm.name,
            "begins": self.begins,
        }
        if self.begins:
            record |= {"means": self.alarm.means, "advice": self.alarm.advice, "measured": self.measured}
            record["reads"] = list(self.alarm.reads)
        return record | {"text": self.text}


class Alarms:
    """The alarms of a run, on or off."""

    def __init__(self, on_alarm: Mapping[str, OnAlarm] | None = None) -> None:
        self._on_alarm = on_alarm or {}
        self._rules = [alarm for alarm in ALARMS if self._on_alarm.get(alarm.name) != "ignore"]
        self.history = History()
        self._quiet: dict[str, int] = {}
        """Steps since its conditions held, for each alarm that is on."""
        self._evaluations: list[EvalSummary] = []

    @property
    def on(self) -> tuple[str, ...]:
        """The names of those that are on, in the order of the table."""
        return tuple(alarm.name for alarm in self._rules if alarm.name in self._quiet)

    @property
    def stopping(self) -> tuple[str, ...]:
        """Those that are on and stop the run."""
        return tuple(name for name in self.on if self._on_alarm.get(name) == "stop")

    def step(self, step: int, values: Mapping[str, float | None]) -> list[Change]:
        """Returns what changes with the numbers of a step. An alarm ends after `WINDOW` steps without its conditions."""
        self.history.add(values)
        changes = []
        for alarm in self._rules:
            if alarm.holds(self.history, step):
                if alarm.name not in self._quiet:
                    changes.append(self._begin(alarm, step))
                self._quiet[alarm.name] = 0
            elif alarm.name in self._quiet:
                self._quiet[alarm.name] += 1
                if self._quiet[alarm.name] >= WINDOW:
                    del self._quiet[alarm.name]
                    changes.append(Change(alarm, step, False, ""))
        return changes

    def evaluated(self, summary: EvalSummary) -> list[Change]:
        """Returns what begins with an evaluation."""
        self._evaluations.append(summary)
        self.history.add(compare_evaluations(self._evaluations))
        begun = [
            alarm for alarm in self._rules if alarm.name not in self._quiet and alarm.holds(self.history, summary.step)
        ]
        changes = [self._begin(alarm, summary.step) for alarm in begun]
        self._quiet |= dict.fromkeys((alarm.name for alarm in begun), 0)
        return changes

    def _begin(self, alarm: Alarm, step: int) -> Change:
        shown = filter(None, (part.show(self.history) for part in alarm.when))
        return Change(alarm, step, True, ", ".join(dict.fromkeys(shown)))

    def replay(self, metrics: Path, summaries: Sequence[EvalSummary]) -> list[Change]:
        """Comes to the state in which a run was when it had logged these numbers; returns what changed on the way."""
        changes: list[Change] = []
        waiting = sorted(summaries, key=lambda summary: summary.step, reverse=True)
        for line in metrics.read_text().splitlines():
            row = json.loads(line)
            # an evaluation comes behind the step that it is named after
            while waiting and waiting[-1].step < row["step"]:
                changes += self.evaluated(waiting.pop())
            changes += self.step(row["step"], {name: value for name, value in row.items() if name in METRICS})
        for summary in reversed(waiting):
            changes += self.evaluated(summary)
        return changes


def compare_evaluations(evaluations: Sequence[EvalSummary]) -> dict[str, float]:
    """Numbers of the last evaluation beside the first and the best one; none for what was not graded.

    `accuracy_gain`: over the first one's. `accuracy_rise`, `accuracy_fall`, `accuracy_lost`: the least by which it is above the
    first one's, below the best one's, and below the first one's, if all are within their 95 % intervals. `teacher_lead`: the
    teacher's accuracy minus the student's at the start. `no_eos` as it is.
    """
    found = [summary.metrics.get(f"avg@{summary.samples_per_prompt}") for summary in evaluations]
    known = [item for item in found if item is not None]
    ends = evaluations[-1].metrics.get("no_eos")
    values = {} if ends is None else {"no_eos": ends.value}
    if found[-1] is None:
        return values
    first, best, last = known[0], max(known, key=lambda item: item.value), known[-1]
    if len(known) > 1:
        values["accuracy_gain"] = last.value - first.value
    if len(known) > 1 and None not in (bounds := (first.low, first.high, best.low, best.high, last.low, last.high)):
        low, high = [bound for bound in bounds[::2] if bound is not None], [b for b in bounds[1::2] if b is not None]
        values |= {
            "accuracy_rise": low[2] - high[0],
            "accuracy_fall": low[1] - high[2],
            "accuracy_lost": low[0] - high[2],
        }
    teacher = evaluations[0].metrics.get("teacher")
    return values if teacher is None else values | {"teacher_lead": teacher.value - first.value}
