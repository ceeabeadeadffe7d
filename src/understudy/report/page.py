"""The report of a run: one HTML file that needs no network, no script and no trust in what the model wrote."""

from __future__ import annotations

import os
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from understudy.errors import CheckpointError
from understudy.format import Interval, number, seconds
from understudy.report.charts import Figure, figures
from understudy.report.read import EvalRecord, Event, RunRecord, read_eval, read_run
from understudy.report.transcripts import Group, training_groups, transcript_groups
from understudy.report.verdict import Comparison, Row, Verdict, compare, judge, rows
from understudy.text import encodable, plain_tree, visible, without_secrets

MAX_EVENTS = 200
MAX_EVENT_CHARS = 600
MAX_RECIPE_CHARS = 40_000
MAX_FACT_CHARS = 2_000


@dataclass(frozen=True)
class ShownRow:
    name: str
    note: str
    before: str
    after: str
    change: str
    paired: bool
    bar: Markup


@dataclass(frozen=True)
class ShownEvent:
    step: str
    kind: str
    level: str
    text: str


@dataclass(frozen=True)
class Page:
    """Everything that the template shows, as text."""

    title: str
    subtitle: str
    verdict: Verdict
    alert: tuple[str, str] | None
    chips: Sequence[tuple[str, str]]
    table_note: str
    rows: Sequence[ShownRow]
    before_step: str | None
    after_step: str
    charts: Sequence[Figure]
    more_charts: Sequence[Figure]
    more_left_out: int
    missing: Sequence[str]
    event_notes: Sequence[str]
    events: Sequence[ShownEvent]
    attempts_note: str
    groups: Sequence[Group]
    recipe: str | None
    facts: Sequence[tuple[str, str]]


def write_report(run_dir: Path, *, baseline: Path | None = None) -> Path:
    """Writes RUN/report.html and returns its path.

    "Before" is `baseline` (an evaluation summary, or a run directory whose last evaluation counts) or else the run's
    first evaluation; "after" is its last one. Raises CheckpointError for a directory that is no run or cannot be
    written, DataError (file and line) for a broken file in it.
    """
    run = read_run(run_dir)
    html = render(build_page(run, None if baseline is None else read_baseline(baseline)))
    target, aside = run_dir / "report.html", run_dir / "report.html.tmp"
    try:
        aside.write_text(html, encoding="utf-8")
        os.replace(aside, target)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {target}: {error.strerror}; free space or fix the permissions") from error
    return target


def read_baseline(path: Path) -> EvalRecord:
    """The evaluation at `path`, or the last one under it. Raises CheckpointError where there is none."""
    if path.is_file():
        return read_eval(path)
    found = sorted((path / "eval").glob("step_*.json")) or sorted(path.glob("step_*.json"))
    if not found:
        raise CheckpointError(f"no evaluation at {path}: give a summary step_*.json or a run directory that has eval/")
    return read_eval(found[-1])


def render(page: Page) -> str:
    """The page as HTML. Scripts and styles other than its own are forbidden by hash, network by default-src."""
    folder = files("understudy.report")
    style, script = (folder.joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    sources = f"style-src {csp_hash(style)}; script-src {csp_hash(script)}"
    policy = f"default-src 'none'; {sources}; base-uri 'none'; form-action 'none'"
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=finalize
    )
    template = environment.from_string(folder.joinpath("page.html").read_text(encoding="utf-8"))
    html = template.render(page=page, policy=policy, style=Markup(style), script=Markup(script))  # noqa: S704 our own files
    return encodable(html)


def finalize(value: object) -> object:
    """Every text that the template shows, before it is escaped."""
    return visible(value) if type(value) is str else value


def build_page(run: RunRecord, baseline: EvalRecord | None) -> Page:
    """What the report of a run says; `baseline` replaces the run's first evaluation as "before"."""
    before, after = _before_and_after(run, baseline)
    comparison = compare(before, after) if before and after else None
    drawn = figures(run)
    facts = dict(_flat(plain_tree(run.facts)))
    groups, note = transcript_groups(comparison) if comparison else ([], "")
    if not groups:
        groups, note = training_groups(run.samples)
    return Page(
        title=run.path.resolve().name,
        subtitle=_subtitle(run.settings),
        verdict=judge([after] if after else [], comparison),
        alert=_alert(run),
        chips=_chips(run, facts),
        table_note=_table_note(after, comparison),
        rows=[_shown(row) for row in rows(before, after, comparison)] if after else [],
        before_step=None if before is None else "baseline" if baseline else f"{before.step:,}",
        after_step="" if after is None else f"{after.step:,}",
        charts=drawn.usual,
        more_charts=drawn.more,
        more_left_out=drawn.left_out,
        missing=drawn.missing,
        event_notes=_event_notes(run),
        events=[_shown_event(event) for event in _chosen_events(run.events)],
        attempts_note=note,
        groups=groups,
        recipe=None if run.recipe is None else _cut(without_secrets(run.recipe), MAX_RECIPE_CHARS),
        facts=[(name, _cut(text, MAX_FACT_CHARS)) for name, text in facts.items()],
    )


def _before_and_after(run: RunRecord, baseline: EvalRecord | None) -> tuple[EvalRecord | None, EvalRecord | None]:
    after = run.evals[-1] if run.evals else None
    if baseline is not None:
        return baseline, after
    return (run.evals[0] if len(run.evals) > 1 else None), after


def _subtitle(settings: Mapping[str, object]) -> str:
    method, student, teacher = (
        _inner(settings, *keys) for keys in (("method", "type"), ("student", "model"), ("teacher", "model"))
    )
    learner = f"{method}: {student or 'a student from random weights'}" if method else ""
    return without_secrets(f"{learner} learns from {teacher}" if learner and teacher else learner)


def _inner(settings: Mapping[str, object], section: str, key: str) -> str:
    part = settings.get(section)
    return str(part.get(key) or "") if isinstance(part, Mapping) else ""


def _alert(run: RunRecord) -> tuple[str, str] | None:
    status = str(run.facts.get("status") or "")
    error = without_secrets(str(run.facts.get("error") or ""))
    if status == "failed":
        return "This run failed.", _cut(error, MAX_FACT_CHARS) or "No error text was recorded."
    if status.startswith("stopped"):
        return "This run was stopped before its end.", "Continue it with --resume."
    if status == "running":
        return "This run had not ended when the report was written.", "What follows is its state until then."
    return None


def _chips(run: RunRecord, facts: Mapping[str, str]) -> list[tuple[str, str]]:
    chips = [("status", facts.get("status", "not recorded"))]
    steps = [int(item.steps[-1]) for item in run.series.values() if len(item.steps)]
    chips.append(("last step", f"{max(steps):,}" if steps else "not recorded"))
    time = run.series.get("time_s")
    chips.append(("training time", seconds(float(time.values[-1])) if time is not None else "not recorded"))
    chips += [("seed", str(run.settings["seed"]))] if isinstance(run.settings.get("seed"), int) else []
    chips += [(name, facts[name]) for name in ("hardware", "commit") if name in facts]
    return chips


def _table_note(after: EvalRecord | None, comparison: Comparison | None) -> str:
    if after is None:
        return ""
    problems = "unknown number of" if after.num_problems is None else f"{after.num_problems:,}"
    attempts = "" if after.samples_per_prompt is None else f", {after.samples_per_prompt} attempts at each"
    attempts = ", 1 attempt at each" if after.samples_per_prompt == 1 else attempts
    text = f"{problems} problems of split {after.split or 'unnamed'!r}{attempts}; [95 % intervals over problems]."
    if after.unscored:
        text += (
            f" {after.unscored:,} attempts have no score: accuracies are of the problems whose attempts all have one."
        )
    if after.too_long:
        text += f" {after.too_long:,} prompts were over the token budget and are left out."
    if comparison and comparison.unmatched:
        text += f" {comparison.unmatched:,} problems are only in one of the two evaluations and are left out of pairs."
    return text


def _shown(row: Row) -> ShownRow:
    bar = _interval_bar(row.before_interval, row.after_interval) if row.rate else Markup("")
    return ShownRow(row.name, row.note, row.before, row.after, row.change, row.paired, bar)


def _interval_bar(before: Interval | None, after: Interval | None) -> Markup:
    """Both intervals on a line from 0 to 100 %: before as a square above it, after as a disc below it."""
    out = [
        '<svg class="bar" viewBox="0 0 220 30" aria-hidden="true"><line class="track" x1="5" x2="215" y1="15" y2="15"/>'
    ]
    for item, kind, y in ((before, "was", 9), (after, "now", 21)):
        if item is None or item.value is None:
            continue
        x = 5 + 210 * item.value
        if item.low is not None and item.high is not None:
            ends = f'x1="{5 + 210 * item.low:.1f}" x2="{5 + 210 * item.high:.1f}"'
            out.append(f'<line class="{kind}" {ends} y1="{y}" y2="{y}"/>')
        shape = f'<rect class="was" x="{x - 3.5:.1f}" y="{y - 3.5}" width="7" height="7"/>'
        out.append(shape if kind == "was" else f'<circle class="now" cx="{x:.1f}" cy="{y}" r="4"/>')
    return Markup("".join(out) + "</svg>")  # noqa: S704 numbers only


def _event_notes(run: RunRecord) -> list[str]:
    notes = [f"The last line of {name} was unfinished (a killed process) and is left out." for name in run.cut_files]
    for name, item in sorted(run.series.items()):
        bad = item.steps[item.values != item.values]
        if len(bad):
            notes.append(
                f"{name} was not finite at {len(bad):,} of {len(item.steps):,} steps, first at step {bad[0]:,}."
            )
    if len(run.events) > MAX_EVENTS:
        notes.append(f"{len(run.events):,} events; shown: warnings and skipped steps first, {MAX_EVENTS} in all.")
    return notes


def _chosen_events(events: Sequence[Event]) -> list[Event]:
    if len(events) <= MAX_EVENTS:
        return list(events)
    order = sorted(range(len(events)), key=lambda index: (events[index].kind == "info", index))
    return [events[index] for index in sorted(order[:MAX_EVENTS])]


def _shown_event(event: Event) -> ShownEvent:
    step = "\u2013" if event.step is None else f"{event.step:,}"
    level = "info" if event.kind == "info" else "warning"
    return ShownEvent(step, event.kind, level, _cut(without_secrets(event.text), MAX_EVENT_CHARS))


def _flat(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested facts as ("machine.cpu_count", "2")."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        yield name, ", ".join(str(item) for item in value)
    elif value is None:
        yield name, "not recorded"
    else:
        yield name, _moment(value)


def _moment(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    text = str(value)
    try:
        moment = datetime.fromisoformat(text) if "T" in text else None
    except ValueError:
        moment = None
    return text if moment is None else moment.isoformat(sep=" ", timespec="seconds")


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} [{len(text) - limit:,} more characters]"


def csp_hash(text: str) -> str:
    """The source expression by which a content security policy allows one inline block."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
