"""The report of a run: one HTML file that needs no network, no script and no trust in what the model wrote."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from understudy import config
from understudy import format as form
from understudy.eval.estimators import RIGHT
from understudy.files import write_atomically
from understudy.format import number, seconds
from understudy.report.charts import charts
from understudy.report.pictures import pictures
from understudy.report.read import Attempt, RunRecord, read_attempts, read_baseline, read_run, taken_from
from understudy.report.svg import draw
from understudy.report.tokens import find_tokens, viewer
from understudy.report.verdict import Comparison, compare, conclude, rows
from understudy.text import encodable, plain_tree, printable

MAX_EVENTS = 200
MAX_RECIPE_CHARS = 40_000
MAX_SHOWN = MAX_RECIPE_CHARS + 100
"""Characters of any one text: a browser takes a minute to lay out a megabyte without a space."""
MAX_NAME_CHARS = 200
MAX_FACT_CHARS = 2_000
MAX_TEXT_CHARS = 3_000
"""Characters of one shown response, so that long reasoning does not make the page heavy."""
MAX_MESSAGES = 40
"""Messages of an episode that are shown."""
MAX_TOKENS = 800
"""Tokens of a response that is shown token by token."""
PER_GROUP = 4
_GROUPS: dict[tuple[bool | None, bool | None], str] = {
    (False, True): "Wrong before, right after",
    (True, False): "Right before, wrong after",
    (False, False): "Wrong both times",
    (True, True): "Right both times",
    (None, None): "Not graded",
}
_ENDS = {
    "stop": "ended by itself",
    "length": "cut at the length limit",
    "data": "from a file",
    "environment": "environment failed",
    "rewritten": "cut where the chat template rewrites earlier turns",
}


@dataclass(frozen=True)
class Group:
    title: str
    count: str
    problems: Sequence[Mapping[str, Sequence[Attempt]]]
    """Attempts at each problem, by heading. Only the first is shown; the others are counted."""


def write_report(run_dir: Path, *, baseline: Path | None = None) -> Path:
    """Writes RUN/report.html and returns its path. Raises CheckpointError where it cannot be written, and as `report_html`."""
    write_atomically(run_dir / "report.html", report_html(run_dir, baseline=baseline))
    return run_dir / "report.html"


def report_html(run_dir: Path, *, baseline: Path | None = None, live: bool = False) -> str:
    """The page of a run; `live`: it asks whoever serves it for what has changed (`watch`).

    "Before" is `baseline` (an evaluation summary, or a run directory whose last evaluation counts) or else the run's
    first evaluation; "after" is its last one. Raises CheckpointError for a directory that is no run, DataError (file and
    line) for a broken file in it.
    """
    run = read_run(run_dir)
    after = run.evals[-1] if run.evals else None
    before = read_baseline(baseline) if baseline else run.evals[0] if len(run.evals) > 1 else None
    comparison = compare(before, after) if before and after else None
    groups, note = _transcript_groups(comparison) if comparison else ([], "")
    if groups:
        groups += _training_groups(run.samples[-1:])
    else:
        groups = _training_groups(sorted({*run.samples[:1], *run.samples[-1:]}))
        note = "There are no two evaluations with samples, so these are attempts from training."
        note = note if groups else "No attempts were recorded."
    shown = {name: value for name, value in run.facts.items() if name not in ("files", "digest")}
    with taken_from(run_dir / "run.json"):
        plain = {name: plain_tree(value, name) for name, value in shown.items()}
        facts = {name: _fact(value) for name, value in config.flatten(plain).items()}
    with taken_from(run_dir / "pictures.jsonl"):
        heats = pictures(run.pictures)
    # the rarer and more telling events survive a cut, in their order
    telling = sorted(range(len(run.events)), key=lambda index: (run.events[index].kind == "info", index))[:MAX_EVENTS]
    return render(
        "report/page.html",
        kind="report",
        live=live,
        run=run,
        changed=shorten(describe_changes(run), MAX_FACT_CHARS),
        title=shorten(run.path.resolve().name, MAX_NAME_CHARS),
        settings=config.flatten(run.settings),
        verdict=conclude(after, comparison),
        missing=form.MISSING,
        status="running" if live and _goes_on(run_dir) else facts.get("status", form.MISSING),
        error=shorten(printable(str(run.facts.get("error") or "")), MAX_FACT_CHARS),
        duration=seconds(float(run.series["time_s"].values[-1])) if "time_s" in run.series else form.MISSING,
        after=after,
        unmatched=comparison.unmatched if comparison else 0,
        rows=rows(before, after, comparison) if after else [],
        before_step="" if before is None else "baseline" if baseline else f"{before.step:,}",
        drawn=charts(run),
        kept=viewer(find_tokens(run_dir)),
        pictures=heats,
        gaps={name: item.steps[bad] for name, item in run.series.items() if (bad := np.isnan(item.values)).any()},
        max_events=MAX_EVENTS,
        events=[run.events[index] for index in sorted(telling)],
        attempts_note=note,
        groups=groups,
        right=RIGHT,
        endings=_ENDS,
        max_chars=MAX_TEXT_CHARS,
        max_name=MAX_NAME_CHARS,
        max_messages=MAX_MESSAGES,
        max_tokens=MAX_TOKENS,
        recipe=None if run.recipe is None else shorten(_recipe(run), MAX_RECIPE_CHARS),
        facts={name: shorten(text, MAX_FACT_CHARS) for name, text in facts.items()},
    )


def _goes_on(run_dir: Path) -> bool:
    """Whether a step was logged since the run last ended, for run.json is written at its end."""
    metrics, facts = run_dir / "metrics.jsonl", run_dir / "run.json"
    if not metrics.is_file():
        return False
    return not facts.is_file() or metrics.stat().st_mtime_ns > facts.stat().st_mtime_ns


def describe_changes(run: RunRecord) -> str:
    """As "metrics.jsonl was changed, eval/step_000006.json is missing"; empty where everything is as the run wrote it."""
    return ", ".join(f"{name} {what}" for name, what in run.changed.items())


def render(template: str, *, live: bool = False, **values: Any) -> str:
    """A page as HTML, from a template that extends report/base.html; `live`: it may ask its own server.

    Scripts and styles other than its own are forbidden by hash, network by default-src. Every string that the template
    shows loses its control characters and secrets, is cut at `MAX_SHOWN` and then escaped.
    """
    package = files("understudy")
    names = ["page.css", "page.js", "viewer.js", *(["live.js"] if live else [])]
    style, *scripts = (package.joinpath(f"report/{name}").read_text(encoding="utf-8") for name in names)
    script = "".join(scripts)
    hashes = (f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in (style, script))
    policy = "default-src 'none'; style-src {}; script-src {}; base-uri 'none'; form-action 'none'".format(*hashes)
    policy += "; connect-src 'self'" if live else ""
    environment = Environment(
        loader=FunctionLoader(lambda name: package.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: shorten(printable(value), MAX_SHOWN) if type(value) is str else value,
    )
    helpers = (draw, shorten, form.count, form.interval, form.change, form.is_rate, form.metric_note)
    environment.globals.update({helper.__name__: helper for helper in helpers})
    own: dict[str, Any] = {"live": live, "policy": policy, "style": Markup(style), "script": Markup(script)}  # noqa: S704 our own files
    return encodable(environment.get_template(template).render(values | own))


def shorten(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} [{len(text) - limit:,} more characters]"


def _recipe(run: RunRecord) -> str:
    """The recipe of a run without secrets; its text alone where it is no YAML."""
    return config.write_yaml(plain_tree(run.settings)) if run.settings else printable(run.recipe or "")


def _fact(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, str) and "T" in value:
        with suppress(ValueError):  # a name with a T, not a date
            return datetime.fromisoformat(value).isoformat(sep=" ", timespec="seconds")
    return form.MISSING if value is None else number(value) if isinstance(value, float) else str(value)


def _transcript_groups(comparison: Comparison) -> tuple[list[Group], str]:
    """The first attempts at `PER_GROUP` problems of each group, and a sentence that says what they are."""
    members: dict[tuple[bool | None, bool | None], list[str]] = {kind: [] for kind in _GROUPS}
    for key, (first, last) in comparison.problems.items():
        old, new = first[0].score, last[0].score
        members[(None, None) if old is None or new is None else (old >= RIGHT, new >= RIGHT)].append(key)
    before, after = f"before, step {comparison.before.step:,}", f"after, step {comparison.after.step:,}"
    groups = []
    for kind, title in _GROUPS.items():
        pairs = [comparison.problems[key] for key in members[kind][:PER_GROUP]]
        if pairs:
            share = f"{len(members[kind]):,} of {form.count(len(comparison.problems), 'problem')}"
            groups.append(Group(title, share, [{before: first, after: last} for first, last in pairs]))
    note = (
        "First attempts at the same problems, before and after; the first few of each group, in the order of the "
        "evaluation. All others are in the files under eval/."
    )
    return groups, note if groups else ""


def _training_groups(samples: Sequence[tuple[int, Path]]) -> list[Group]:
    """A few of the training samples in each file, those first in which several authors wrote."""
    groups = []
    for step, path in samples:
        attempts = sorted(read_attempts(path), key=lambda attempt: -len(set(attempt.tokens.get("author", ()))))
        problems = [{"attempt": [attempt]} for attempt in attempts[:PER_GROUP]]
        groups.append(Group(f"Training samples of step {step:,}", f"{len(problems)} shown", problems))
    return groups
