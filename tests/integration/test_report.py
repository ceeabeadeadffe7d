"""The report of a run: what it concludes, what it shows, what it survives and what it never does."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import subprocess
import sys
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.report_run import random_scores, training_rows, write_eval, write_lines, write_run
from understudy.errors import CheckpointError, DataError
from understudy.format import Interval, change, interval, number, seconds
from understudy.report.charts import charts, phase_chart
from understudy.report.page import write_report
from understudy.report.read import EvalRecord, Series, read_eval, read_run
from understudy.report.svg import MAX_POINTS, Chart, Line, draw, smoothed, thin, ticks
from understudy.report.verdict import compare, conclude, main_metric, paired_difference, rows
from understudy.text import HIDDEN, without_secrets

HOSTILE = (
    "</pre></script><script>document.documentElement.dataset.pwned=1</script>"
    '<img src=x onerror="document.documentElement.dataset.pwned=2">\'"&amp;{{7*7}}{% raw %}'
)


class Elements(HTMLParser):
    """Start tags with their attributes, and the text that is shown."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.shown: list[str] = []
        self.inline: dict[str, str] = {}
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside in ("style", "script"):
            self.inline[self._inside] = data
        else:
            self.shown.append(data)

    @property
    def text(self) -> str:
        return "".join(self.shown)


def report(run_dir: Path) -> Elements:
    return Elements(write_report(run_dir).read_text())


def evals(run_dir: Path, before: dict[str, list[float]], after: dict[str, list[float]]) -> list[EvalRecord]:
    return [read_eval(write_eval(run_dir, 0, before)), read_eval(write_eval(run_dir, 10, after))]


# What it concludes


def test_the_verdict_is_the_paired_difference_over_problems(tmp_path: Path) -> None:
    old, new = random_scores(0.4, seed=1), random_scores(0.6, seed=2)
    before, after = evals(tmp_path, old, new)
    difference = paired_difference(compare(before, after), "avg@4")
    steps = np.array([np.mean(new[key]) - np.mean(old[key]) for key in old])
    assert difference is not None
    assert difference.value == pytest.approx(steps.mean(), abs=1e-12)
    half = 1.96 * steps.std() / math.sqrt(len(steps))
    # beside the normal interval: one problem more at an end of [-1, 1], and 1 % Monte Carlo error of 10,000 draws
    more = 2 / (len(steps) + 1)
    assert difference.low == pytest.approx(steps.mean() - half - more / 2, abs=0.06 * half + more / 2)
    assert difference.high == pytest.approx(steps.mean() + half + more / 2, abs=0.06 * half + more / 2)
    verdict = conclude(after, compare(before, after))
    assert verdict.kind == "better"
    found = Interval(difference.value, difference.low, difference.high)
    assert f"paired difference {change('avg@4', found)}" in verdict.text


def test_swapping_before_and_after_swaps_the_verdict(tmp_path: Path) -> None:
    before, after = evals(tmp_path, random_scores(0.7, seed=1), random_scores(0.4, seed=2))
    verdict = conclude(after, compare(before, after))
    assert verdict.kind == "worse"
    assert "fell from" in verdict.text


def test_an_unchanged_student_is_not_called_better(tmp_path: Path) -> None:
    scores = random_scores(0.5)
    before, after = evals(tmp_path, scores, scores)
    difference = paired_difference(compare(before, after), "avg@4")
    assert difference is not None
    assert difference.value == 0.0
    assert conclude(after, compare(before, after)).kind == "same"


def test_pairing_finds_what_two_separate_intervals_hide(tmp_path: Path) -> None:
    """Hard and easy problems spread the mean, but each one rises by a quarter of its attempts or stays."""
    old = {f"p{index}": [1.0] * (index % 4) + [0.0] * (4 - index % 4) for index in range(60)}
    new = {key: [1.0, *values[:-1]] if index % 3 == 0 else values for index, (key, values) in enumerate(old.items())}
    before, after = evals(tmp_path, old, new)
    first, last = before.metrics["avg@4"], after.metrics["avg@4"]
    assert first.high is not None
    assert last.low is not None
    assert first.high > last.low
    assert conclude(after, compare(before, after)).kind == "better"


def test_a_series_that_never_changes_is_a_line_of_text(tmp_path: Path) -> None:
    rows = [{"step": step, "loss": 1 / step, "truncated": 0.25, "extra": 3.0} for step in range(1, 6)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    text = report(tmp_path).text
    assert "Truncated responses (share of responses): 25.0 %, at every step." in text
    assert "extra: 3, at every step." in text
    titles = {chart.title for chart in charts(read_run(tmp_path)).usual}
    assert titles == {"Loss"}
    assert not charts(read_run(tmp_path)).more


def test_one_problem_is_called_one_problem(tmp_path: Path) -> None:
    before, after = evals(tmp_path, {"p": [0.0]}, {"p": [1.0]})
    assert "on 1 held-out problem;" in conclude(after, compare(before, after)).text


def test_few_problems_are_called_few(tmp_path: Path) -> None:
    before, after = evals(tmp_path, {f"p{i}": [0.0] for i in range(5)}, {f"p{i}": [1.0] for i in range(5)})
    verdict = conclude(after, compare(before, after))
    assert verdict.kind == "unknown"
    assert "too few problems" in verdict.text


def test_other_problems_other_prompts_and_other_splits_are_not_compared(tmp_path: Path) -> None:
    scores = random_scores(0.5, num_problems=20)
    before = read_eval(write_eval(tmp_path, 0, scores))
    other_prompt = read_eval(write_eval(tmp_path, 1, scores, prompt="another {id}"))
    assert paired_difference(compare(before, other_prompt), "avg@4") is None
    assert compare(before, other_prompt).unmatched == 20
    other_split = read_eval(write_eval(tmp_path, 2, scores, split="train"))
    verdict = conclude(other_split, compare(before, other_split))
    assert verdict.kind == "unknown"
    assert "another split" in verdict.text


@pytest.mark.parametrize("metric", ["avg@4", "pass@4", "maj@4"])
def test_the_recomputed_metrics_are_the_recorded_ones(tmp_path: Path, metric: str) -> None:
    """Else the paired difference would be of something other than what the table shows."""
    before, after = evals(tmp_path, random_scores(0.4, seed=1), random_scores(0.6, seed=2))
    difference = paired_difference(compare(before, after), metric)
    old, new = before.metrics[metric].value, after.metrics[metric].value
    assert difference is not None
    assert old is not None
    assert new is not None
    assert difference.value == pytest.approx(new - old, abs=1e-12)


def test_a_missing_score_is_never_taken_as_wrong(tmp_path: Path) -> None:
    before, after = evals(tmp_path, random_scores(0.4), random_scores(0.9))
    samples = after.path.with_suffix(".jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    lines[0]["score"] = None
    write_lines(samples, lines)
    assert paired_difference(compare(before, after), "avg@4") is None
    assert "cannot be tested" in conclude(after, compare(before, after)).text


def test_problems_without_a_grade_are_left_out_of_both_and_told(tmp_path: Path) -> None:
    """As the metric itself leaves them out: prompts without a reference."""
    before, after = evals(tmp_path, random_scores(0.4, seed=1), random_scores(0.9, seed=2))
    for record in (before, after):
        samples = record.path.with_suffix(".jsonl")
        lines = [json.loads(line) for line in samples.read_text().splitlines()]
        write_lines(samples, [line | {"score": None} if line["prompt_id"] == "add-000" else line for line in lines])
    difference = paired_difference(compare(before, after), "avg@4")
    assert difference is not None
    assert difference.num_problems == 199
    assert "over 199 problems" in conclude(after, compare(before, after)).text
    record = write_eval(tmp_path, 20, random_scores(0.9), unscored=4, too_long=3)
    (tmp_path / "run.json").write_text("{}")
    text = report(tmp_path).text
    assert record.is_file()
    assert "4 attempts have no score" in text
    assert "3 prompts were over the token budget" in text


def test_a_first_evaluation_after_training_began_is_called_so(tmp_path: Path) -> None:
    before = read_eval(write_eval(tmp_path, 5, random_scores(0.4, seed=1)))
    after = read_eval(write_eval(tmp_path, 10, random_scores(0.9, seed=2)))
    assert "at step 5, the first evaluation," in conclude(after, compare(before, after)).text


def test_one_attempt_gives_one_accuracy(tmp_path: Path) -> None:
    """avg@1, pass@1 and maj@1 are the same number."""
    before, after = evals(tmp_path, random_scores(0.4, attempts=1), random_scores(0.9, attempts=1))
    names = [row.name for row in rows(before, after, compare(before, after))]
    assert names == ["avg@1", "mean_tokens", "truncated", "no_eos"]


def test_the_main_metric_is_avg_at_k(tmp_path: Path) -> None:
    record = read_eval(write_eval(tmp_path, 0, random_scores(0.5)))
    assert main_metric(record) == "avg@4"


# What it shows


def test_the_page_holds_all_that_was_recorded(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run"))
    for text in (
        "Accuracy (avg@4) rose from",
        "held-out problems",
        "paired difference",
        "beta: 1.0",
        "12 prompts repeat",
    ):
        assert text in page.text
    for row in ("avg@4", "pass@4", "maj@4", "mean_tokens", "truncated", "no_eos"):
        assert row in page.text
    labels = [attributes.get("aria-label") for tag, attributes in page.tags if tag == "svg"]
    titles = {label.split(",")[0] for label in labels if label}
    usual = {"Accuracy", "Loss", "Log-ratio", "Entropy", "Response length", "Truncated responses", "Gradient norm"}
    assert usual | {"Learning rate", "Throughput", "Seconds by phase", "loss/divergence", "samples_per_s"} <= titles
    assert "versions.torch" in page.text


def test_attempts_that_changed_come_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    for path in (run / "eval").iterdir():
        path.unlink()
    cases = {"stays right": (1.0, 1.0), "stays wrong": (0.0, 0.0), "gets worse": (1.0, 0.0), "gets better": (0.0, 1.0)}
    write_eval(run, 0, {key: [before] for key, (before, _) in cases.items()})
    write_eval(run, 10, {key: [after] for key, (_, after) in cases.items()})
    text = report(run).text
    order = [text.index(f"Problem {name}") for name in ("gets better", "gets worse", "stays wrong", "stays right")]
    assert order == sorted(order)


def test_one_evaluation_shows_training_samples_and_claims_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    for path in list((run / "eval").iterdir()):
        if "000010" not in path.name:
            path.unlink()
    sample = {"prompt_id": "p", "prompt": "1+1=", "response": "two", "finish": "stop", "num_tokens": 1}
    write_lines(run / "samples" / "step_000001.jsonl", [sample])
    page = report(run)
    assert "there is no second evaluation to compare with" in page.text
    assert "Training samples of step 1" in page.text


def token_sample(**tokens: list[object]) -> dict[str, object]:
    return {"prompt_id": "p", "prompt": "1+1=", "response": "two!", "finish": "stop", "tokens": tokens}


def test_each_token_is_shown_with_its_author_and_its_values(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    alone = token_sample(text=["one"], author=["student"])
    guided = token_sample(text=[HOSTILE, "!"], author=["teacher", "student"], advantage=[None, 0.5])
    write_lines(run / "samples" / "step_000010.jsonl", [alone, guided])
    page = report(run)
    spans = [found for tag, found in page.tags if tag == "span" and "title" in found]
    assert [(found["class"], found["title"]) for found in spans] == [
        ("by-teacher", "author: teacher \u00b7 advantage: not known"),
        ("by-student", "author: student \u00b7 advantage: 0.5"),
        ("by-student", "author: student"),
    ]
    assert HOSTILE in page.text
    assert "Wrong before, right after" in page.text


def test_token_values_without_their_token_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    write_lines(run / "samples" / "step_000010.jsonl", [token_sample(text=["a", "b"], author=["student"])])
    with pytest.raises(DataError, match=r"step_000010\.jsonl:1: 'tokens' needs a list 'text'"):
        write_report(run)


def test_a_run_killed_in_its_first_step_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"status": "running", "error": None}))
    page = report(tmp_path)
    assert "No evaluation was recorded" in page.text
    assert "had not ended" in page.text
    assert "Not recorded in this run: accuracy, loss" in page.text


def test_a_failed_run_says_so_first(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    (run / "run.json").write_text(json.dumps({"status": "failed", "error": "three non-finite losses in a row"}))
    text = report(run).text
    assert text.index("three non-finite losses in a row") < text.index("Accuracy (avg@4)")


def test_a_long_run_stays_small_and_keeps_its_peak(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=30_000)
    assert write_report(run).stat().st_size < 1_500_000
    values = np.zeros(30_000)
    values[12_345], values[23_456] = 7.0, -7.0
    kept = thin(values)
    assert {0, 12_345, 23_456, 29_999} <= set(kept.tolist())
    assert len(kept) <= MAX_POINTS + 2


def test_a_value_that_is_not_finite_is_a_gap_and_is_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    rows = training_rows(10)
    rows[4] |= {"loss": None, "nonfinite": ["loss"]}
    write_lines(run / "metrics.jsonl", rows)
    assert "loss was not finite at 1 of 10 steps, first at step 5" in report(run).text
    svg = draw(Chart("Loss", "", [Line("loss", read_run(run).series["loss"])]))
    assert re.search(r'class="curve s1" d="([^"]*)"', svg)[1].count("M") == 2  # type: ignore[index]


def test_phases_without_a_common_step_give_no_chart_and_no_error() -> None:
    series = {
        "generate_s": Series(np.array([1, 2]), np.array([1.0, math.nan])),
        "score_s": Series(np.array([1, 2]), np.array([math.nan, 1.0])),
    }
    assert phase_chart(series) is None


@pytest.mark.parametrize("values", [[1.7, 1.7], [0.0, 0.0], [1.0, 1.0], [-3.0, 2.0], [1e-30, 1e30], [0.0]])
@pytest.mark.parametrize("percent", [False, True])
def test_every_curve_is_drawn_inside_its_chart(values: list[float], percent: bool) -> None:
    line = Line("x", Series(np.arange(len(values)), np.array(values)))
    svg = draw(Chart("x", "", [line], percent))
    points = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", svg.split('class="curve')[1].split('"/>')[0])
    assert len(points) == len(values)
    for x, y in points:
        assert 50 <= float(x) <= 368
        assert 22 <= float(y) <= 186


def test_smoothing_keeps_a_constant_and_the_steps() -> None:
    series = Series(np.arange(1_000), np.full(1_000, 3.5))
    assert smoothed(series).values == pytest.approx(np.full(MAX_POINTS, 3.5), abs=1e-12)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0, 4) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])
    assert ticks(-0.9, 0.05, 4) == pytest.approx([-0.75, -0.5, -0.25, 0.0])


def test_how_numbers_are_written() -> None:
    assert number(0.000012) == "1.2e-5"
    assert number(12345.6) == "12,346"
    assert number(math.nan) == "not finite"
    assert seconds(100) == "1 min 40 s"
    assert interval("avg@4", Interval(0.979, 0.968, 0.989)) == "97.9 % [96.8, 98.9]"
    assert interval("avg@4", Interval(None)) == "not recorded"
    assert change("avg@4", Interval(-0.0551, -0.1, 0.01)) == "\u22125.5 points [\u221210.0, +1.0]"


# What it survives


def test_the_half_line_of_a_killed_process_is_left_out_and_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')
    assert "The last line of metrics.jsonl was unfinished" in report(run).text


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = "nonsense"
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl:4: not JSON"):
        write_report(run)


PICTURE = {"step": 1, "log_ratio": {"": [1] * 15}, "parts": {"top_shared": [[1.0], [5.0]]}}
DEEP: object = []
for _ in range(700):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("name", "row", "changes"),
    [
        ("run.json", {"status": "finished"}, {"hardware": DEEP}),
        ("pictures.jsonl", PICTURE, {"parts": {"top_shared": [["x"], [1.0]]}}),
        ("pictures.jsonl", PICTURE, {"parts": 1e308}),
        ("pictures.jsonl", PICTURE, {"log_ratio": {"": [[]] * 15}}),
        ("metrics.jsonl", {"step": 1, "loss": 1.0}, {"step": 10**400}),
        ("doctor.json", {"findings": [{"name": "x"}]}, {"findings": [1]}),
        ("eval/step_000010.json", {"step": 10, "metrics": {}}, {"metrics": [1]}),
        ("eval/step_000010.json", {"step": 10, "metrics": {}}, {"scaling": [1]}),
        ("samples/step_000010.jsonl", {"prompt_id": "a", "response": "b"}, {"tokens": {"text": ["a"], "author": [[]]}}),
    ],
)
def test_a_value_of_another_kind_is_one_error_that_names_the_file(
    tmp_path: Path, name: str, row: dict[str, object], changes: dict[str, object]
) -> None:
    for kept in ("metrics.jsonl", "run.json"):
        write_lines(tmp_path / kept, [{"step": 1}])
    write_lines(tmp_path / name, [row])
    write_report(tmp_path)
    # behind the first line of several the last one is no half line of a killed process
    write_lines(tmp_path / name, [row | changes] * (1 if name.endswith("json") else 2))
    with pytest.raises(DataError, match=re.escape(name)):
        write_report(tmp_path)


def test_numbers_that_no_float_holds_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    write_lines(run / "metrics.jsonl", [{"step": 11, "loss": 10**400}])
    assert "loss" in read_run(run).series
    write_report(run)


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run directory"):
        write_report(tmp_path)


def test_a_full_disk_keeps_the_report_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    before = write_report(run).read_text()

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*report\.html: No space left"):
        write_report(run)
    assert (run / "report.html").read_text() == before
    assert not (run / "report.html.tmp").exists()


# What it never does


def test_the_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", num_steps=10))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
        assert not {"src", "href", "action", "srcset", "style"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in page.inline["style"]
    assert "@import" not in page.inline["style"]


def test_the_policy_allows_its_own_two_blocks_and_nothing_else(tmp_path: Path) -> None:
    page = report(write_run(tmp_path / "run", num_steps=10))
    (policy,) = (a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    hashes = {
        kind: f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for kind, text in page.inline.items()
    }
    assert policy == (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; "
        "base-uri 'none'; form-action 'none'"
    )


def test_what_a_model_wrote_is_text(tmp_path: Path) -> None:
    run = write_run(tmp_path / HOSTILE.replace("/", "-")[:60], num_steps=10)
    for step in (0, 10):
        write_eval(run, step, {HOSTILE: [0.0], "b": [1.0]}, prompt=HOSTILE + "{id}", response=HOSTILE, split=HOSTILE)
    (run / "recipe.yaml").write_text(HOSTILE)
    (run / "run.json").write_text(json.dumps({"method": HOSTILE, HOSTILE: HOSTILE, "status": HOSTILE}))
    write_lines(run / "events.jsonl", [{"step": 1, "kind": HOSTILE, "text": HOSTILE}])
    write_lines(run / "metrics.jsonl", [{"step": step, HOSTILE: 1.0, "loss": 1.0} for step in (1, 2)])
    page = report(run)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert page.text.count(HOSTILE) >= 8
    assert "49" not in page.text.replace(HOSTILE, "").split("Recipe")[1].split("Facts")[0]


def test_an_escape_sequence_without_end_swallows_nothing_after_it(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=10)
    write_eval(run, 10, random_scores(0.9), response="before \x1b]0;title\x1b[31m after \ud800 \u202e end")
    page = report(run)
    assert "before 0;title after \ufffd \\u202e end" in page.text
    assert "Facts of the run" in page.text


def test_secrets_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "value-of-the-environment")
    run = write_run(tmp_path / "run", num_steps=10)
    (run / "recipe.yaml").write_text(
        "teacher:\n  url: https://me:hunter2@host/v1\n  api_key: sk-in-the-recipe\n  max_tokens: 512\n"
    )
    (run / "run.json").write_text(
        json.dumps({"hub_token": "hf-in-the-facts", "error": "used value-of-the-environment"})
    )
    html = write_report(run).read_text()
    for secret in ("hunter2", "sk-in-the-recipe", "hf-in-the-facts", "value-of-the-environment"):
        assert secret not in html
    assert "max_tokens: 512" in html
    assert without_secrets("api_key: null") == "api_key: null"
    assert HIDDEN in html


def test_importing_the_report_is_light() -> None:
    code = "import sys, understudy.report; print(sorted({'torch', 'jinja2', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
