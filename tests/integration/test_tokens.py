"""Kept tokens: what a run writes of single tokens, that it learns the same with and without it, and how it is shown."""

from __future__ import annotations

import json
import re
from base64 import b64decode
from collections.abc import Sequence
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any
from zlib import decompress

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.integration.test_several_teachers import mixed
from tests.processes import run_ranks
from tests.report_run import write_lines, write_run
from tests.runs import assert_same_run, distillation, train, train_all, train_in_two, write_recipe
from understudy.cli import inspection
from understudy.cli.app import app
from understudy.errors import DataError
from understudy.linear import plan
from understudy.report.charts import charts
from understudy.report.page import write_report
from understudy.report.pictures import LOG_RATIO_EDGES, pictures
from understudy.report.read import read_run
from understudy.report.tokens import OUTLIER_NATS, describe, find_tokens, viewer
from understudy.teachers import LocalTeacher
from understudy.trainer import tokens as kept_tokens
from understudy.trainer.console import Console
from understudy.types import Sample, Scores

TASK = {"type": "arithmetic", "family": "addition", "digits": 2, "num_solutions": 12}
STEPS = {"steps": 6, "prompts_per_step": 4, "samples_per_prompt": 2, "save_samples_every": 3}


def rows(run_dir: Path) -> list[dict[str, Any]]:
    files = sorted((run_dir / "tokens").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def token_row(step: int = 1, prompt_id: str = "p", num: int = 4, **table: Any) -> dict[str, Any]:
    """A line of a token file, made up."""
    numbers = {"student_logprob": [-1.0] * num, "teacher_logprob": [-1.0 - at for at in range(num)]}
    return {
        "step": step,
        "prompt_id": prompt_id,
        "prompt": "q",
        "method": "opd",
        "num_tokens": num,
        "index": 0,
        "missing": {},
        "vocabulary": {str(at): f"w{at} " for at in range(num)},
        "tokens": {"id": [*range(num)], "kind": ["sampled"] * num} | numbers | table,
    }


def write_tokens(run_dir: Path, made: list[dict[str, Any]]) -> None:
    for step in {row["step"] for row in made}:
        write_lines(run_dir / "tokens" / f"step_{step:06d}.jsonl", [row for row in made if row["step"] == step])


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ({"type": "tropd", "k": 4, "anneal_steps": 6}, {"responses": {"type": "solutions"}}),
        ({"type": "gopd", "form": "full"}, {"reference": {"type": "start"}}),
        ({"type": "opd", "discount": 0.9}, {"train": STEPS | {"minibatches": 2, "passes": 2}}),
    ],
    ids=["tropd", "gopd", "opd"],
)
def test_a_run_learns_the_same_whether_tokens_are_kept(tmp_path: Path, method: Any, more: dict[str, Any]) -> None:
    made = {"task": TASK, "method": method, "train": STEPS} | more
    changes = distillation(tmp_path / "models", **made)
    kept = train(tmp_path / "kept", **changes)
    without = train(tmp_path / "without", **(changes | {"train": made["train"] | {"save_tokens": 0}}))
    assert_same_run(kept, without)
    assert not (without / "tokens").exists()
    assert not (without / "pictures.jsonl").exists()
    found = rows(kept)
    assert {row["step"] for row in found} >= {1, 3, 6}
    for row in found:
        size = row["num_tokens"]
        assert {len(values) for values in row["tokens"].values()} == {size}
        for whose in ("student", "teacher"):
            assert [len(top) for top in row["tokens"][f"{whose}_top"]] == [5] * size
            assert min(row["tokens"][f"{whose}_rank"]) >= 1
        # what was sampled is as likely as the engine said when it sampled it
        for kind, ours, engine in zip(
            row["tokens"]["kind"], row["tokens"]["student_logprob"], row["tokens"]["rollout_logprob"], strict=True
        ):
            assert (engine is None) == (kind == "prefix")
            if engine is not None and method["type"] != "opd":
                assert ours == pytest.approx(engine, abs=1e-3)
    pictures = read_pictures(kept)
    assert [row["step"] for row in pictures] == [1, 2, 3, 4, 5, 6]
    # every token of the student's is in one bin, and in one part of its response
    for row in pictures:
        assert sum(row["log_ratio"][""]) == sum(row["parts"]["log_ratio"][1]) > 0


def test_what_a_teacher_does_not_say_is_absent_and_said(tmp_path: Path) -> None:
    changes = distillation(tmp_path / "m", method={"type": "opd"}, train=STEPS)
    mixed = {
        "teacher": None,
        "teachers": {"a": changes["teacher"], "b": changes["teacher"]},
        "weights": {"a": 1, "b": 1},
    }
    row = rows(train(tmp_path, **changes | mixed))[0]
    assert {"teacher_logprob", "student_rank"} <= row["tokens"].keys()
    assert not {"teacher_top", "teacher_rank", "teacher_entropy"} & row["tokens"].keys()
    assert "sampled tokens alone" in row["missing"]["teacher_top"]
    imitated = train(tmp_path / "sft", train=STEPS)
    row = rows(imitated)[0]
    assert set(row["tokens"]["kind"]) == {"given"}
    assert "asks the teacher for no score" in row["missing"]["teacher_logprob"]


def test_the_same_prompt_is_kept_again_and_a_resumed_run_keeps_the_same(tmp_path: Path) -> None:
    changes = distillation(tmp_path / "m", task=TASK, method={"type": "topk", "k": 3}, train=STEPS | {"save_tokens": 2})
    whole, cut = train(tmp_path / "whole", **changes), train_in_two(tmp_path / "cut", 3, **changes)
    assert rows(whole) == rows(cut)
    assert (whole / "pictures.jsonl").read_text() == (cut / "pictures.jsonl").read_text()
    steps: dict[str, set[int]] = {}
    for row in rows(whole):
        steps.setdefault(row["prompt_id"], set()).add(row["step"])
    # twelve prompts, four a step: each comes every three steps
    assert max(map(len, steps.values())) >= 2
    # a teacher that is asked for three tokens has the whole row at hand
    table = rows(whole)[0]["tokens"]
    assert {len(top) for top in table["teacher_top"]} == {5}
    for top, rank, token in zip(table["teacher_top"], table["teacher_rank"], table["id"], strict=True):
        assert top.index(token) + 1 == rank if token in top else rank > 5


def test_rows_of_three_are_what_a_teacher_of_three_tokens_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rank where the sampled token is among them."""
    plain = LocalTeacher.score

    def score(self: LocalTeacher, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Scores]:
        return plain(self, [replace(sample, keep_tokens=False) for sample in samples], *args, **options)

    monkeypatch.setattr(LocalTeacher, "score", score)
    run_dir = train(tmp_path, **distillation(tmp_path / "m", task=TASK, method={"type": "topk", "k": 3}, train=STEPS))
    table = rows(run_dir)[0]["tokens"]
    assert {len(top) for top in table["teacher_top"]} == {3}
    for top, rank, token in zip(table["teacher_top"], table["teacher_rank"], table["id"], strict=True):
        assert (None if token not in top else top.index(token) + 1) == rank


@pytest.mark.slow
def test_two_ranks_keep_what_one_process_keeps(tmp_path: Path) -> None:
    """The same samples in the same order, and sums over the tokens of both ranks."""
    changes = distillation(tmp_path / "m", task=TASK, method={"type": "opd"}, train=STEPS)
    ways = {"plain": {}, "ahead": {"rollout": {"type": "hf", "copy": True}, "async": {"max_staleness": 0}}}
    for name, more in ways.items():
        write_recipe(tmp_path / "two" / name, **changes | more)
    run_ranks(train_all, *(tmp_path / "two" / name for name in ways), folder=tmp_path)
    for name, more in ways.items():
        one, two = train(tmp_path / "one" / name, **changes | more), tmp_path / "two" / name / "run"
        ours, theirs = rows(one), rows(two)
        assert [(row["step"], row["prompt_id"], row["index"]) for row in ours] == [
            (row["step"], row["prompt_id"], row["index"]) for row in theirs
        ]
        for row, like in zip(ours, theirs, strict=True):
            assert row["tokens"]["id"] == like["tokens"]["id"]
            assert row["tokens"]["student_logprob"] == pytest.approx(like["tokens"]["student_logprob"], abs=2e-2)
            assert None not in like["tokens"]["teacher_top"]
        for row, like in zip(read_pictures(one), read_pictures(two), strict=True):
            assert row["samples"] == like["samples"] == 8
            assert sum(row["log_ratio"][""]) == sum(like["log_ratio"][""])
            assert row["parts"]["log_ratio"][1] == like["parts"]["log_ratio"][1]


def read_pictures(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "pictures.jsonl").read_text().splitlines()]


def test_files_stay_within_their_bytes(tmp_path: Path) -> None:
    train_keys = STEPS | {"save_samples_every": 2, "save_tokens_bytes": 64_000}
    run_dir = train(tmp_path, **distillation(tmp_path / "m", train=train_keys))
    files = list((run_dir / "tokens").iterdir())
    assert sum(file.stat().st_size for file in files) <= 64_000
    cut = [row for row in rows(run_dir) if len(row["tokens"]["id"]) < row["num_tokens"]]
    assert cut
    assert cut[0]["tokens"]["id"]


def test_a_step_spreads_over_teachers_and_prefixes(tmp_path: Path) -> None:
    method = {"type": "tropd", "k": 4, "anneal_steps": 6}
    run_dir = train(
        tmp_path,
        **distillation(tmp_path / "m", task=TASK, method=method, responses={"type": "solutions"}, train=STEPS),
    )
    kinds = [set(row["tokens"]["kind"]) for row in rows(run_dir) if row["step"] == 1]
    assert {"sampled"} in kinds
    assert any("prefix" in kind for kind in kinds)


def unpacked(run_dir: Path) -> list[dict[str, Any]]:
    shown = viewer(find_tokens(run_dir))
    assert shown is not None
    return [json.loads(decompress(b64decode(text))) for text in shown.packed]


def test_the_page_holds_the_numbers_and_writes_controls_out(tmp_path: Path) -> None:
    row = token_row(teacher_logprob=[-9999.0, None, -2.5, -0.25], trusted=[1.0, 0.0, None, 1.0])
    row["vocabulary"]["0"] = "a\x1b[2J\u202eb\n"
    write_tokens(tmp_path, [row])
    sample = unpacked(tmp_path)[0]
    assert sample["columns"]["teacher_logprob"] == [-9_999_000, None, -2500, -250]
    assert sample["columns"]["trusted"] == [1.0, 0.0, None, 1.0]
    assert sample["texts"][sample["columns"]["id"][0]] == "a\\u001b[2J\\u202eb\n"


def test_steps_share_the_room_of_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts that come again go first, at the last and the first step, and the page says what it leaves out."""
    made = [token_row(step, prompt) for step in range(1, 10) for prompt in ("again", f"once {step}")]
    write_tokens(tmp_path, made)
    places = find_tokens(tmp_path)
    whole = viewer(places)
    assert whole is not None
    assert (len(whole.packed), whole.note) == (18, "")
    monkeypatch.setattr("understudy.report.tokens.MAX_PACKED_BYTES", 3 * len(whole.packed[0]) + 10)
    part = viewer(places)
    assert part is not None
    assert [(one["step"], one["prompt_id"]) for one in json.loads(part.index.unescape())["samples"]] == [
        (1, "again"),
        (5, "again"),
        (9, "again"),
    ]
    assert part.note == "3 of 18 kept samples are on this page; the others are in tokens/."


def long_run(folder: Path) -> Path:
    """A run of 10,000 steps, of which 500 samples were kept."""
    run_dir = write_run(folder, num_steps=10_000)
    num = 80
    table = {
        f"{whose}_{name}": value
        for whose in ("student", "teacher")
        for name, value in {
            "logprob": [-(at * 37 % 101) / 20 for at in range(num)],
            "entropy": [(at * 53 % 97) / 40 for at in range(num)],
            "top": [[(at * 7 + k * 31) % num for k in range(5)] for at in range(num)],
            "top_logprob": [[-(at * 13 % 29) / 10 - k for k in range(5)] for at in range(num)],
        }.items()
    }
    made = [token_row(step, f"p{at}", num, **table) for step in range(80, 10_001, 80) for at in range(4)]
    write_tokens(run_dir, made)
    return run_dir


def test_a_long_run_makes_a_small_page(tmp_path: Path) -> None:
    """Under 5 MB, and with all that its menus need."""
    page = write_report(long_run(tmp_path / "run"))
    assert page.stat().st_size < 5_000_000
    index = re.search(r'data-index="([^"]*)"', page.read_text())
    assert index is not None
    assert len(json.loads(unescape(index[1]))["samples"]) == 500


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    write_tokens(tmp_path, [token_row()])
    path = tmp_path / "tokens" / "step_000001.jsonl"
    path.write_text('{"step":1,"prompt_id":"p","tokens":{"id":[1],"kind":[]}}\n')
    with pytest.raises(DataError, match=r"step_000001.jsonl:1: 'tokens' needs lists of one length"):
        viewer(find_tokens(tmp_path))
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"step_000001.jsonl:1: not a sample with tokens"):
        find_tokens(tmp_path)
    path.write_text('{"step":1,"prompt_id":"\\x"}\n')
    with pytest.raises(DataError, match=r"step_000001.jsonl:1: not as a run writes it"):
        find_tokens(tmp_path)
    for changes in ({"tokens": None}, {"tokens": {"id": 1, "kind": 2}}, {"vocabulary": [1]}, {"missing": [1]}):
        write_tokens(tmp_path, [token_row() | changes])
        with pytest.raises(DataError, match=r"step_000001.jsonl:1: not as a run writes it"):
            viewer(find_tokens(tmp_path))
        with pytest.raises(DataError, match=r"step_000001.jsonl:1: not as a run writes it"):
            inspection._show(Console(), find_tokens(tmp_path)[0], "log_ratio", 1)


def test_hundreds_of_samples_and_long_names_leave_the_index_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script reads it as JSON; long names stay apart, and a secret in one is hidden."""
    monkeypatch.setenv("SOME_API_KEY", "canary-31415926")
    names = [f"{'data/' * 40}{at}.jsonl" for at in range(500)]
    made = [token_row(1, name) for name in [*names, "x" * 1_000_000, "canary-31415926"]]
    write_tokens(write_run(tmp_path / "run", num_steps=10), made)
    page = write_report(tmp_path / "run").read_text()
    index = json.loads(unescape(page.split('data-index="')[1].split('"')[0]))
    shown = [one["prompt_id"] for one in index["samples"]]
    assert len(set(shown)) == len(made)
    assert max(map(len, shown)) < 250
    assert "canary" not in page


def test_what_is_an_outlier_is_as_in_the_metrics() -> None:
    """By size where the method has no trust region of its own."""
    assert OUTLIER_NATS == plan.OUTLIER_NATS
    row = token_row(teacher_logprob=[-1.0, -5.9, -6.1, 0.0])
    assert ["an outlier" in describe(row, at) for at in range(4)] == [False, False, True, False]
    row["tokens"]["trusted"] = [0.0, 1.0, 1.0, None]
    assert ["an outlier" in describe(row, at) for at in range(4)] == [True, False, False, False]


def test_a_secret_that_is_written_token_by_token_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "ZqXwKvPjMhWq"
    monkeypatch.setenv("SOME_API_KEY", secret)
    parts = [secret[at : at + 2] for at in range(0, len(secret), 2)]
    pieces = ["it", " is ", *parts, ", ", "MY_TOKEN=", "ab", "cd", " !"]
    num = len(pieces)
    top = {"student_top": [[at, 0] for at in range(num)], "student_top_logprob": [[-0.1, -2.0]] * num}
    row = token_row(1, "p", num, **top) | {"vocabulary": {str(at): piece for at, piece in enumerate(pieces)}}
    write_tokens(write_run(tmp_path, num_steps=5), [row])
    sample = unpacked(tmp_path)[0]
    shown = [sample["texts"][at] for at in sample["columns"]["id"]]
    assert shown == ["it", " is ", *["[hidden]"] * (num - 3), " !"]
    assert sample["columns"]["student_top"][2:-1] == [0] * (num - 3)
    said = CliRunner().invoke(app, ["inspect", str(tmp_path)], env={"COLUMNS": "200"}).output
    assert "[hidden]" in said
    assert not any(piece in said for piece in parts)


def test_inspect_prints_the_largest_differences(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", num_steps=10)

    def said(*options: str) -> str:
        result = CliRunner().invoke(app, ["inspect", str(run_dir), *options], env={"COLUMNS": "200"})
        return result.output if result.exception is None else str(result.exception)

    assert "kept no tokens" in said()
    table = {
        "student_top": [[1, 2]] * 4,
        "student_top_logprob": [[-0.1, -3.0]] * 4,
        "trusted": [1.0, 1.0, 1.0, 0.0],
        "loss/policy_gradient": [0.0, 1.0, 2.0, None],
    }
    write_tokens(run_dir, [token_row(5, **table), token_row(10, "\x1b[31mhostile", **table)])
    lines = said("--step", "5", "-n", "2").splitlines()
    first = next(line for line in lines if "w3" in line and "-3.00" in line)
    assert "36.8 %" in first
    assert "1.83 %" in first
    assert "'w1 ' 90 %" in first
    assert "an outlier" in first
    assert "not known" in first
    assert sum("w" in line and "%" in line for line in lines) == 2
    assert "\x1b" not in said()
    assert "hostile" in said("--list")
    assert "prompt p was kept at steps 5" in said("--prompt", "p", "--step", "6")
    assert "no token of this sample has teacher_entropy" in said("--by", "teacher_entropy")


def test_pieces_of_sentencepiece_keep_their_spaces() -> None:
    class Tokenizer:
        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return ["\u2581the", "re"]

        def decode(self, ids: list[int]) -> str:
            return {1: "the", 2: "re"}[ids[0]]

    assert kept_tokens.token_pieces(Tokenizer(), [1, 2]) == {1: " the", 2: "re"}


def test_pictures_of_a_run(tmp_path: Path) -> None:
    """Shares over steps, and over the tenths of a response; what a method does not say is not drawn."""
    run_dir = write_run(tmp_path / "run", num_steps=10)
    assert 'id="pictures"' not in write_report(run_dir).read_text()

    def moved(step: int) -> list[int]:
        counts = [0] * (len(LOG_RATIO_EDGES) + 1)
        counts[0], counts[len(counts) // 2] = 100 - 10 * step, 10 * step
        return counts

    made = [
        {
            "step": step,
            "samples": 2,
            # all mass moves from the lowest bin to the middle one
            "log_ratio": {name: moved(step) for name in ("", "code", "maths")},
            "parts": {
                "log_ratio_size": [[float(step)] * 10, [2.0] * 10],
                "trusted": [[1.0] * 5 + [None] * 5, [4.0] * 5 + [0.0] * 5],
                "outliers": [[1.0] * 10, [4.0] * 10],
                "top_shared": [[step / 20] * 10, [1.0] * 10],
                "teacher/code/top_shared": [[None] * 10, [0.0] * 10],
                "teacher/maths/log_ratio_size": [[3.0] * 10, [2.0] * 10],
                "teacher/maths/top_shared": [[0.5] * 10, [2.0] * 10],
            },
        }
        for step in range(1, 11)
    ]
    write_lines(run_dir / "pictures.jsonl", made)
    found = pictures(read_run(run_dir).pictures)
    assert [chart.title for chart in found.charts] == [
        "Where they differ",
        "Outliers",
        "Trusted tokens",
        "Where they differ, teacher maths",
        "Overlap",
        "Overlap by teacher",
    ]
    differ, _, trusted, of_maths, shared, by_teacher = found.charts
    assert [line.series.values[0] for line in of_maths.lines] == [1.5, 1.5]
    # steps 1 to 4 and 8 to 10
    assert [line.series.values[0] for line in differ.lines] == pytest.approx([10 / 8, 27 / 6])
    assert [line.series.steps.tolist() for line in trusted.lines] == [[1, 2, 3, 4, 5]] * 2
    assert shared.lines[0].series.values.tolist() == pytest.approx([step / 20 for step in range(1, 11)])
    assert [(line.name, set(line.series.values)) for line in by_teacher.lines] == [("maths", {0.25})]
    behind = ("", ", teacher code", ", teacher maths")
    assert [heat.title for heat in found.heats] == [f"log T \u2212 log S{name}" for name in behind]
    heat = found.heats[0]
    assert heat.shares.sum(axis=0) == pytest.approx(1.0)
    assert heat.text == "At step 10: 100 % of the tokens within \u00b10.1 nats, 0.0 % below \u22121, 0.0 % above 1."
    page = write_report(run_dir).read_text()
    assert page.count('class="heat"') == 3
    assert heat.text in page
    # one teacher under a name is no several
    one = [{"step": row["step"], "parts": {"teacher/maths/top_shared": [[0.5], [1.0]]}} for row in made]
    assert pictures(one).charts == []
    many = {f"teacher/t{at}/log_ratio_size": [[1.0], [1.0]] for at in range(10)}
    assert len(pictures([{"step": step, "parts": many} for step in range(3)]).charts) == 8
    write_lines(run_dir / "pictures.jsonl", [{"step": step, "samples": 1, "parts": many} for step in range(3)])
    assert "2 more teachers left out" in write_report(run_dir).read_text()


def test_each_of_several_teachers_has_its_own_pictures(tmp_path: Path) -> None:
    """Their sums are those over all tokens; lengths, ages and missing ends are told apart too."""
    run_dir = train(tmp_path, **mixed(tmp_path / "m", train=STEPS, eval={"problems": 4, "every": 3}))
    for row in read_pictures(run_dir):
        for group, whole in (("log_ratio", [""]), ("parts", ["log_ratio", "log_ratio_size", "top_shared"])):
            for name in whole:
                parts = [f"teacher/{teacher}/{name}" if name else teacher for teacher in ("short", "long")]
                shares = [np.array(row[group][part], dtype=np.float64) for part in parts if part in row[group]]
                assert np.allclose(sum(shares), np.array(row[group][name], dtype=np.float64), rtol=1e-3)
    run = read_run(run_dir)
    of_teachers = ("short", "long")
    found = pictures(run.pictures)
    assert [heat.title.rpartition(" ")[2] for heat in found.heats[1:]] == sorted(of_teachers)
    overlap = next(chart for chart in found.charts if chart.title == "Overlap by teacher")
    assert [line.name for line in overlap.lines] == sorted(of_teachers)
    titles = {chart.title for chart in charts(run).usual} | {text.partition(" (")[0] for text in charts(run).constant}
    assert {"Age by teacher", "Response length by teacher", "Missing EOS by part"} <= titles
    for name in ("response_tokens", "truncated", "repetition", "staleness", "log_ratio", "overlap"):
        assert {f"teacher/{teacher}/{name}" for teacher in of_teachers} <= run.series.keys()
    assert {f"{teacher}/no_eos" for teacher in of_teachers} <= run.evals[-1].metrics.keys()
