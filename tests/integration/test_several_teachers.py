"""Who judges in a run: several teachers, a reference, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.integration.test_methods_train import EXTRA
from tests.runs import (
    SHORT,
    assert_close_run,
    assert_same_run,
    distillation,
    grade_by_length,
    metric_rows,
    save_tiny_model,
    tiny_recipe,
    train,
    train_in_two,
    weights,
)
from tests.tiny_models import NUM_ROWS, sample, tiny
from understudy import config
from understudy.errors import RecipeError, ScoreError
from understudy.methods import GKD, GOPD, METHODS, OPD, Method
from understudy.methods.base import present
from understudy.recipe import Recipe, load
from understudy.tasks import Arithmetic, build_tokenizer
from understudy.tasks.renderer import Renderer
from understudy.teachers import Local, LocalTeacher, RoutedTeacher, Setup, Teacher
from understudy.teachers.stores.recording import ScoredMeta, write_scored
from understudy.trainer import loop
from understudy.trainer.collect import Collector
from understudy.trainer.distributed import Ranks
from understudy.trainer.settings import Train
from understudy.trainer.update import MicroBatch, StudentModel, accumulate_gradients, prepare
from understudy.types import Sample, Sampling, Scores

pytestmark = pytest.mark.slow

MIX = {
    "type": "mix",
    "parts": {
        "short": {"type": "arithmetic", "family": "addition", "digits": 1},
        "long": {"type": "arithmetic", "family": "addition", "digits": 2},
    },
}


def mixed(folder: Path, method: str = "gkd", **keys: Any) -> dict[str, Any]:
    """Changes for two teachers of different sizes, each for its part of a mix."""
    changes = distillation(folder, method={"type": method} | keys.pop("method", {}), **keys)
    second = save_tiny_model(folder / "second", seed=7, hidden_size=24)
    first = changes.pop("teacher")
    return changes | {"teachers": {"short": first, "long": {"type": "local", "model": second}}, "task": MIX}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Sample]]:
    """What each teacher was given to score."""
    found: dict[str, list[Sample]] = {}
    plain = LocalTeacher.score

    def score(self: LocalTeacher, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Scores]:
        found.setdefault(self.name, []).extend(samples)
        return plain(self, samples, *args, **options)

    monkeypatch.setattr(LocalTeacher, "score", score)
    return found


@pytest.fixture
def updates(monkeypatch: pytest.MonkeyPatch) -> list[list[MicroBatch]]:
    seen: list[list[MicroBatch]] = []
    plain = loop.accumulate_gradients

    def accumulate(student: Any, micros: Sequence[MicroBatch], **options: Any) -> Any:
        seen.append(list(micros))
        return plain(student, micros, **options)

    monkeypatch.setattr(loop, "accumulate_gradients", accumulate)
    return seen


@pytest.mark.parametrize("shares", [{"short": 1.0, "long": 0.0}, {"short": 0.4, "long": 0.6}], ids=["one", "equal"])
def test_a_weight_of_one_and_equal_teachers_are_the_one_teacher(tmp_path: Path, shares: dict[str, float]) -> None:
    """Every sample of every part is scored by all; the run is that with the first teacher alone."""
    changes = mixed(tmp_path, "opd")
    if all(shares.values()):
        changes["teachers"]["long"] = changes["teachers"]["short"]
    first = changes["teachers"]["short"]
    mixture = train(tmp_path / "mixture", **changes, weights=shares)
    alone = train(tmp_path / "alone", **(changes | {"teachers": {}, "teacher": first}))
    for row, like in zip(metric_rows(mixture), metric_rows(alone), strict=True):
        # a mixture knows no entropy; what it does not know is left out
        assert row.keys() == like.keys() - {"teacher_entropy"}
        assert row["loss"] == pytest.approx(like["loss"], rel=1e-4, abs=1e-6)
    for name, value in weights(mixture).items():
        torch.testing.assert_close(weights(alone)[name], value, rtol=0, atol=5e-5)


def without_scores(scores: Scores) -> Scores:
    return replace(scores, logprob=torch.full_like(present(scores.logprob), float("nan")))


# --- several teachers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["gkd", "opd", "topk", "reopold"])
def test_each_sample_is_judged_by_its_own_teacher(
    tmp_path: Path, method: str, asked: dict[str, list[Sample]], updates: list[list[MicroBatch]]
) -> None:
    changes = mixed(tmp_path, method, train={"steps": 4})
    whole = train(tmp_path / "whole", **changes)
    assert set(asked) == {"short", "long"}
    assert sum(map(len, asked.values())) == 4 * 8
    for name, samples in asked.items():
        assert {sample.teacher for sample in samples} == {name}
        assert all(sample.prompt.id.startswith(f"{name}/") for sample in samples)
    for row, update in zip(metric_rows(whole), updates, strict=True):
        assert sorted(micro.teacher or "" for micro in update) == ["long", "short"]
        for micro in update:
            assert {sample.teacher for sample in micro.samples} == {micro.teacher}
        sizes = {micro.teacher: len(micro.batch) for micro in update}
        # the mean over all tokens is that of the teachers' means
        for metric in ("student_entropy", "student_logprob"):
            parts = [row[f"teacher/{name}/{metric}"] * size for name, size in sizes.items()]
            assert row[metric] == pytest.approx(sum(parts) / sum(sizes.values()))
    assert_same_run(whole, train_in_two(tmp_path / "cut", 2, **changes))


def test_whole_rows_are_those_of_the_teacher(tmp_path: Path) -> None:
    """KL(S || T) of each part is that of a run in which its teacher is the only one."""
    changes = mixed(tmp_path, train={"steps": 1, "lr": 0.0})
    row = metric_rows(train(tmp_path / "both", **changes))[0]
    for name in ("short", "long"):
        alone = changes | {"teachers": {"short": changes["teachers"][name], "long": changes["teachers"][name]}}
        other = metric_rows(train(tmp_path / name, **alone))[0]
        key = f"teacher/{name}/loss/divergence"
        assert row[key] == pytest.approx(other[key], rel=1e-6)
    assert row["teacher/short/loss/divergence"] != row["teacher/long/loss/divergence"]


@pytest.mark.parametrize("method", ["gkd", "opd"])
def test_one_teacher_under_two_names_is_one_teacher(tmp_path: Path, method: str) -> None:
    """Only the cut into micro-batches differs, so sums round otherwise."""
    changes = mixed(tmp_path, method)
    single = changes["teachers"]["long"]
    two = train(tmp_path / "two", **changes | {"teachers": {"short": single, "long": single}})
    one = train(tmp_path / "one", **changes | {"teachers": None, "teacher": single})
    for row, like in zip(metric_rows(one), metric_rows(two), strict=True):
        assert {name: like[name] for name in row} == pytest.approx(row, rel=1e-3, abs=1e-6)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", ["opd", "reopold"])
def test_a_missing_score_shifts_nothing(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch, updates: list[list[MicroBatch]]
) -> None:
    """A sample in the middle without a score: dropped and counted; the others keep their own scores."""
    plain = LocalTeacher.score
    known: dict[str, torch.Tensor] = {}

    def score(self: LocalTeacher, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Scores]:
        found = plain(self, samples, *args, **options)
        known.update(
            {sample.key: one.logprob for sample, one in zip(samples, found, strict=True) if one.logprob is not None}
        )
        bad = found[1]
        nan = torch.full((samples[1].num_response_tokens,), float("nan"))
        return [found[0], replace(bad, logprob=nan, hidden=None), *found[2:]]

    monkeypatch.setattr(LocalTeacher, "score", score)
    changes = mixed(tmp_path, method, train={"steps": 2, "on_missing_score": "drop"})
    rows = metric_rows(train(tmp_path, **changes))
    assert [row["samples_dropped"] for row in rows] == [2.0, 2.0]
    for update in updates:
        assert sum(len(micro.samples) for micro in update) == 6
        for micro in update:
            expected = torch.cat([known[sample.key] for sample in micro.samples])
            assert torch.equal(present(micro.batch.teacher_logprob), expected)
    with pytest.raises(ScoreError, match="missing"):
        train(tmp_path / "error", **mixed(tmp_path / "error", method))


def test_missing_whole_rows_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of other samples do not move up."""
    plain = LocalTeacher.score

    def score(self: LocalTeacher, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Scores]:
        found = plain(self, samples, *args, **options)
        return [found[0], replace(found[1], hidden=None), *found[2:]]

    monkeypatch.setattr(LocalTeacher, "score", score)
    with pytest.raises(ScoreError, match="hidden is missing"):
        train(tmp_path, **mixed(tmp_path))


@pytest.mark.parametrize("method", ["opd", "reopold", "tropd"])
def test_a_step_without_any_score_is_skipped(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher fails once."""
    plain, calls = LocalTeacher.score, []

    def score(self: LocalTeacher, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Scores]:
        calls.append(1)
        found = plain(self, samples, *args, **options)
        return found if len(calls) > 1 else list(map(without_scores, found))

    monkeypatch.setattr(LocalTeacher, "score", score)
    keys = {"anneal_steps": 0} if method == "tropd" else {}
    changes = distillation(
        tmp_path, method={"type": method} | keys, train={"steps": 2, "on_missing_score": "drop", "minibatches": 2}
    )
    run_dir = train(tmp_path, **changes)
    assert [row["samples_dropped"] for row in metric_rows(run_dir)] == [8.0, 0.0]
    assert json.loads((run_dir / "run.json").read_text())["updates"] == 2
    assert "step 1 was skipped: no sample with a trained token is left" in (run_dir / "events.jsonl").read_text()


# --- refusals ----------------------------------------------------------------------------------------------------------

LOCAL = {"type": "local", "model": "teacher"}
JUDGE = SHORT | {"model": "judge"}
CHAT = {"type": "chat", "url": "http://localhost:1/v1", "model": "judge"}
TWO = {"prompts_per_step": 2, "samples_per_prompt": 2}
SOLUTIONS = {"type": "solutions"}
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "tropd with a chat teacher": (
        {"method": {"type": "tropd"}, "teacher": CHAT, "responses": SOLUTIONS},
        r"TrOPD needs .*; teacher \(.*\) gives only verbal",
    ),
    "tropd with a judge": (
        {"method": {"type": "tropd"}, "teacher": JUDGE, "responses": SOLUTIONS},
        r"TrOPD needs .*; teacher \(judge\) gives only verbal",
    ),
    "tropd without responses": (
        {"method": {"type": "tropd"}, "teacher": LOCAL},
        r"TrOPD begins samples with the teacher's own; add a section `responses: .*anneal_steps: 0",
    ),
    "ovd with a teacher of scores": (
        {"method": {"type": "ovd"}, "teacher": LOCAL, "responses": SOLUTIONS, "train": TWO},
        r"OVD needs a digit from 0 to 9 for each sample; teacher \(teacher\) gives only",
    ),
    "ovd without responses": (
        {"method": {"type": "ovd"}, "teacher": JUDGE, "train": TWO},
        "OVD fills rejected slots with the teacher's own responses; add a section",
    ),
    "steps for a judge of whole responses": (
        {"method": {"type": "ovd", "steps": True, "on_reject": "drop"}, "teacher": {"type": "verifier"}, "train": TWO},
        "OVD has each step judged, but teacher .*reads whole responses; set method.steps: false",
    ),
    "groups of one": (
        {"method": {"type": "grpo"}, "train": {"samples_per_prompt": 1}},
        "set train.samples_per_prompt to 2 or more",
    ),
    "grpo with teachers": (
        {"method": {"type": "grpo"}, "teachers": {"one": LOCAL}, "train": TWO},
        "GRPO uses no teacher; remove the section teachers",
    ),
    "groups of one in a phase": (
        {"method": {"type": "phases", "parts": [{"until": 0.5, "type": "sft"}, {"type": "grpo"}]}},
        "set train.samples_per_prompt to 2 or more",
    ),
    "a reference that nobody asks for": (
        {"method": {"type": "opd"}, "teacher": LOCAL, "reference": {"type": "start"}},
        "OPD as it is set uses no reference model; remove the section reference",
    ),
    "a reference at scale 1": (
        {"method": {"type": "gopd", "scale": 1.0}, "teacher": LOCAL, "reference": {"type": "start"}},
        "GOPD as it is set uses no reference model",
    ),
    "references that nobody asks for": (
        {"method": {"type": "opd"}, "teachers": {"a": LOCAL}, "references": {"a": {"type": "start"}}},
        "OPD as it is set uses no reference model; remove the section references",
    ),
    "a reference and references": (
        {"method": {"type": "gopd"}, "teachers": {"a": LOCAL}, "reference": LOCAL, "references": {"a": LOCAL}},
        "reference and references are both given; keep one",
    ),
    "references of one teacher": (
        {"method": {"type": "gopd"}, "teacher": LOCAL, "references": {"teacher": LOCAL}},
        "references go by the names in teachers, which the recipe lacks; write one section reference",
    ),
    "a teacher without a reference": (
        {"method": {"type": "gopd"}, "teachers": {"a": LOCAL, "b": LOCAL}, "references": {"a": LOCAL}},
        r"references are for \['a'\], but the teachers are \['a', 'b'\]; give each a reference",
    ),
    "a reference of an unknown teacher": (
        {"method": {"type": "gopd"}, "teachers": {"a": LOCAL}, "references": {"a": LOCAL, "c": LOCAL}},
        r"references are for \['a', 'c'\], but the teachers are \['a'\]",
    ),
    "a reference on the student's weights beside the update": (
        {
            "method": {"type": "gopd"},
            "teachers": {"a": LOCAL},
            "references": {"a": {"type": "start"}},
            "student": {"lora": {"rank": 2}},
            "rollout": {"type": "hf", "copy": True},
            "async": {"max_staleness": 1},
        },
        r"async has the references\.a score beside the update",
    ),
    "a reference that is no model": (
        {"method": {"type": "gopd"}, "teachers": {"a": LOCAL}, "references": {"a": CHAT}},
        r"references\.a\.type is 'chat'",
    ),
    "responses that nobody reads": (
        {"method": {"type": "opd"}, "teacher": LOCAL, "responses": SOLUTIONS},
        "OPD uses no responses of a teacher; remove the section responses",
    ),
    "no teacher": ({"method": {"type": "opd"}}, "OPD needs a teacher"),
    "two sections of teachers": (
        {"method": {"type": "opd"}, "teacher": LOCAL, "teachers": {"a": LOCAL}},
        "teacher and teachers are both given; keep one",
    ),
    "one of several that cannot": (
        {"method": {"type": "gkd"}, "teachers": {"a": LOCAL, "b": JUDGE}},
        "or a stored teacher stands alone",
    ),
    "an unknown start": (
        {"student": {"build": None, "starts": {"small": "a", "large": "b"}, "start": "smal"}},
        "start is 'smal'; did you mean 'small'",
    ),
    "two starts": (
        {"student": {"build": None, "starts": {"small": "a"}, "start": "small", "model": "b"}},
        "model and start are both given; keep one",
    ),
    "one update in no part": ({"train": {"minibatches": 0}}, "minibatches is 0; it must be at least 1"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_recipe_that_cannot_be_run_is_refused_as_it_is_read(tmp_path: Path, case: str) -> None:
    changes, words = REFUSALS[case]
    with pytest.raises(RecipeError, match=words):
        config.parse(Recipe, tiny_recipe(tmp_path, **changes))


def test_every_method_says_no_to_the_wrong_teacher(tmp_path: Path) -> None:
    """What a method needs and the teacher does not give is named, whatever the method."""
    for name in METHODS:
        extra = EXTRA.get(name, {})
        method = {"type": name} | extra.get("method", {})
        given = LOCAL if extra.get("judge") else JUDGE
        changes = {"method": method, "teacher": given, "responses": extra.get("responses"), "train": TWO}
        if name in ("grpo", "dr_grpo", "dapo", "sft"):
            # asked nothing, any teacher is left alone
            del changes["responses"]
            recipe = config.parse(Recipe, tiny_recipe(tmp_path, **changes))
            assert (recipe.leaves_teacher, recipe.all_teachers) == (True, {})
            continue
        with pytest.raises(RecipeError, match="gives only"):
            config.parse(Recipe, tiny_recipe(tmp_path, **changes))


def test_scores_of_sampled_tokens_are_no_whole_rows(tmp_path: Path) -> None:
    """What was recorded is known before anything is loaded."""
    tokenizer = build_tokenizer("addition")
    teacher = Local(save_tiny_model(tmp_path / "teacher", seed=1)).open(Setup(name="t", vocab_size=17))
    samples = [sample("arithmetic/addition/12+34:", [4, 5], [6, 7, 1])]
    setup = Setup(name="t", vocab_size=17, renderer=Renderer(tokenizer))
    meta = ScoredMeta.of(teacher, setup, "big")
    write_scored(tmp_path / "stored", meta, zip(samples, teacher.score(samples, frozenset({"sampled"})), strict=True))
    stored = {"type": "stored", "path": str(tmp_path / "stored")}
    config.parse(Recipe, tiny_recipe(tmp_path, method={"type": "opd"}, teacher=stored))
    for method, lacks in (("gkd", "whole next-token distribution"), ("eopd", "K most probable tokens")):
        with pytest.raises(RecipeError, match=lacks):
            config.parse(Recipe, tiny_recipe(tmp_path, method={"type": method}, teacher=stored))


@pytest.mark.parametrize("teachers", [{"shrt": LOCAL, "long": LOCAL}, {"short": LOCAL}])
def test_an_unknown_teacher_is_refused_before_anything_is_loaded(
    tmp_path: Path, teachers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = mixed(tmp_path)
    known = changes["teachers"]["short"]
    monkeypatch.setattr(load, "load_student", lambda *a, **o: pytest.fail("a model was loaded"))
    with pytest.raises(RecipeError, match=r"names the teacher '(short|long)'.*the teachers are:"):
        train(tmp_path, **changes | {"teachers": dict.fromkeys(teachers, known)})
    assert not (tmp_path / "run").exists()


def test_a_start_by_name_is_the_model(tmp_path: Path) -> None:
    changes = distillation(tmp_path, train={"steps": 2})
    whole = train(tmp_path / "whole", **changes)
    model = changes["student"].pop("model")
    changes["student"] |= {"starts": {"small": model, "other": "nowhere"}, "start": "small"}
    assert_same_run(whole, train(tmp_path / "named", **changes))


# --- references --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}])
@pytest.mark.parametrize("form", ["sampled", "full"])
def test_the_default_reference_is_the_start(
    tmp_path: Path, lora: dict[str, int] | None, form: str, asked: dict[str, list[Sample]]
) -> None:
    """Also after a resume, where the live student is not the start any more; and named by hand it is the same run."""
    changes = distillation(tmp_path, method={"type": "gopd", "scale": 1.5, "form": form}, train={"steps": 4})
    start = changes["student"]["model"]
    changes["student"] |= {"lora": lora}
    whole = train(tmp_path / "whole", **changes)
    assert len(asked["reference"]) == len(asked["teacher"]) == 32
    assert_same_run(whole, train_in_two(tmp_path / "cut", 2, **changes))
    named = train(tmp_path / "named", **changes | {"reference": {"type": "local", "model": start}})
    # adapters of zero are left out in one and added in the other
    assert_close_run(whole, named, atol=5e-5)
    if form == "sampled":
        first = metric_rows(whole)[0]
        assert first["teacher_over_reference"] != 0.0


@pytest.mark.parametrize("form", ["sampled", "full"])
def test_the_reference_matters(tmp_path: Path, form: str) -> None:
    """Another reference is another run; the teacher as its own reference is OPD, and GKD with the whole rows."""
    method = {"type": "gopd", "scale": 2.0, "form": form}
    changes = distillation(tmp_path, method=method, train={"steps": 3})
    default = train(tmp_path / "default", **changes)
    teacher = train(tmp_path / "teacher-run", **changes | {"reference": changes["teacher"]})
    assert metric_rows(default)[0]["loss"] != metric_rows(teacher)[0]["loss"]
    plain = {"type": "opd"} if form == "sampled" else {"type": "gkd"}
    like = train(tmp_path / "like", **changes | {"method": plain})
    for name, value in weights(like).items():
        torch.testing.assert_close(weights(teacher)[name], value, rtol=0, atol=5e-5)


@pytest.mark.parametrize(("form", "method"), [("sampled", "opd"), ("full", "gkd")])
def test_at_scale_one_there_is_no_reference(
    tmp_path: Path, form: str, method: str, asked: dict[str, list[Sample]]
) -> None:
    """Bit for bit OPD, or GKD."""
    changes = distillation(tmp_path, train={"steps": 3})
    one = train(tmp_path / "one", **changes | {"method": {"type": "gopd", "scale": 1.0, "form": form}})
    other = train(tmp_path / "other", **changes | {"method": {"type": method}})
    assert_same_run(one, other)
    assert set(asked) == {"teacher"}


def test_a_reference_pulls_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GRPO's KL to the start: 0 while the student is the start, above 0 once it has moved."""
    monkeypatch.setattr(Arithmetic, "grade", grade_by_length)
    groups = {"steps": 3, "prompts_per_step": 4, "samples_per_prompt": 2, "lr": 0.01}
    changes = distillation(tmp_path, teacher=None, method={"type": "grpo", "kl_coef": 0.5}, train=groups)
    first, *others = [row["loss/reference_kl"] for row in metric_rows(train(tmp_path, **changes))]
    # two ways of summing the same logits
    assert first == pytest.approx(0.0, abs=1e-6)
    assert all(value > 1e-4 for value in others)


# --- a reference for each teacher --------------------------------------------------------------------------------------


def gopd(folder: Path, form: str, **keys: Any) -> dict[str, Any]:
    """Changes for two teachers, and two models that may be their references."""
    for name, seed in (("one", 11), ("other", 12)):
        save_tiny_model(folder / name, seed=seed)
    return mixed(folder, **keys) | {"method": {"type": "gopd", "scale": 1.5, "form": form}}


def local(folder: Path, name: str) -> dict[str, Any]:
    return {"type": "local", "model": str(folder / name)}


@pytest.mark.parametrize(
    ("form", "shares"), [("sampled", None), ("full", None), ("sampled", {"short": 0.3, "long": 0.7})]
)
def test_equal_references_are_one_reference(
    tmp_path: Path, form: str, shares: dict[str, float] | None, asked: dict[str, list[Sample]]
) -> None:
    """Bit for bit, also where teachers are weighted; it is loaded and asked once."""
    changes = gopd(tmp_path, form, train={"steps": 3}) | {"weights": shares}
    one = local(tmp_path, "one")
    single = train(tmp_path / "single", **changes, reference=one)
    assert len(asked["reference"]) == 3 * 8
    each = train(tmp_path / "each", **changes, references={"short": one, "long": dict(one)})
    assert_same_run(single, each)
    assert len(asked["references.short"]) == 3 * 8
    assert "references.long" not in asked


@pytest.mark.parametrize(("form", "lora"), [("sampled", None), ("full", None), ("full", {"rank": 4, "alpha": 8})])
def test_each_sample_is_measured_against_the_reference_of_its_teacher(
    tmp_path: Path, form: str, lora: dict[str, int] | None, asked: dict[str, list[Sample]]
) -> None:
    """The loss of each part is that of a run with its reference for all; a resumed run is the same run."""
    changes = gopd(tmp_path, form, train={"steps": 4})
    changes["student"] |= {"lora": lora}
    references = {"short": local(tmp_path, "one"), "long": {"type": "start"}}
    whole = train(tmp_path / "whole", **changes, references=references)
    for name in references:
        assert {sample.teacher for sample in asked[f"references.{name}"]} == {name}
        assert [one.key for one in asked[f"references.{name}"]] == [one.key for one in asked[name]]
    assert_same_run(whole, train_in_two(tmp_path / "cut", 2, **changes, references=references))
    key = "loss/policy_gradient" if form == "sampled" else "loss/divergence"
    first = metric_rows(whole)[0]
    for name, other in (("short", "long"), ("long", "short")):
        alike = metric_rows(train(tmp_path / name, **changes, reference=references[name]))[0]
        assert first[f"teacher/{name}/{key}"] == pytest.approx(alike[f"teacher/{name}/{key}"], rel=1e-6)
        assert first[f"teacher/{other}/{key}"] != pytest.approx(alike[f"teacher/{other}/{key}"], rel=1e-3)


def test_with_a_weight_of_one_the_reference_is_that_of_the_one_teacher(tmp_path: Path) -> None:
    """References are mixed by the weights of their teachers."""
    changes = gopd(tmp_path, "sampled")
    references = {"short": local(tmp_path, "one"), "long": local(tmp_path, "other")}
    shares = {"short": 1.0, "long": 0.0}
    mixture = train(tmp_path / "mixture", **changes, references=references, weights=shares)
    first = {"teacher": changes["teachers"]["short"], "reference": references["short"]}
    alone = train(tmp_path / "alone", **(changes | {"teachers": {}} | first))
    for row, like in zip(metric_rows(mixture), metric_rows(alone), strict=True):
        assert row["teacher_over_reference"] == pytest.approx(like["teacher_over_reference"], rel=1e-4)
        assert row["loss"] == pytest.approx(like["loss"], rel=1e-4, abs=1e-6)
    for name, value in weights(mixture).items():
        torch.testing.assert_close(weights(alone)[name], value, rtol=0, atol=5e-5)


def gradient(
    student: StudentModel, method: Method, samples: Sequence[Sample], teacher: Teacher, reference: Teacher
) -> Tensor:
    """Of the samples' update, times their tokens: a sum over tokens in place of the mean. [all parameters]."""
    settings, anything = Train(steps=1, prompts_per_step=4), cast(Any, None)
    collector = Collector(
        anything, Sampling(), anything, anything, teacher, reference, responses=None, settings=settings, seed=0
    )
    scored = [one for one in collector.score(samples, method) if one is not None]
    several = isinstance(teacher, RoutedTeacher)
    ranks = Ranks()
    micros = prepare(student, method, scored, step=0, draw=(0, 0), ranks=ranks, by_teacher=several)[0]
    trainer: Any = SimpleNamespace(
        rollouts=SimpleNamespace(collector=collector), several_teachers=several, settings=settings, student=student
    )
    heads = loop.Trainer.heads_of(trainer, method, scored)
    student.model.zero_grad()
    accumulate_gradients(student, micros, heads=heads, step=0, ranks=ranks)
    found = [value.grad.flatten() for value in student.model.parameters() if value.grad is not None]
    return torch.cat(found) * sum(len(micro.batch) for micro in micros)


@pytest.mark.parametrize(("form", "scale"), [*product(["sampled", "full"], [0.5, 1.0, 1.25])])
def test_the_gradient_of_two_teachers_is_the_sum_of_their_own(form: Any, scale: float) -> None:
    """In float64: each part's tokens count as in a batch of that part, its teacher and its reference alone."""
    # its norms are in float64; those of llama are in float32 on the way
    student = StudentModel(tiny("gpt2", sharp=2.0), torch.device("cpu"), NUM_ROWS, 0.7, None)
    kinds = {"a": "gpt2", "b": "llama"}, {"a": "qwen3", "b": "gpt2"}
    teachers, references = (
        {
            name: LocalTeacher(tiny(kind, sharp=sharp), name=name, vocab_size=NUM_ROWS, temperature=0.7)
            for name, kind in kind_of.items()
        }
        for sharp, kind_of in zip((4.0, 3.0), kinds, strict=True)
    )
    samples = [
        replace(sample(f"p{i}", [2, 3, 4 + i], list(range(5, 8 + i))), teacher="ab"[i % 3 > 0]) for i in range(6)
    ]
    method = GOPD(scale=scale, form=form)
    both = gradient(student, method, samples, RoutedTeacher(teachers), RoutedTeacher(references))
    swapped = RoutedTeacher({"a": references["b"], "b": references["a"]})
    other = gradient(student, method, samples, RoutedTeacher(teachers), swapped)
    own = {name: [one for one in samples if one.teacher == name] for name in teachers}
    parts = [gradient(student, method, own[name], teachers[name], references[name]) for name in teachers]
    limit = 1e-11 * float(both.abs().max())
    torch.testing.assert_close(both, sum(parts), rtol=0, atol=limit)
    if scale == 1.0:
        plain = OPD() if form == "sampled" else GKD(beta=1.0)
        assert torch.equal(both, other)
        assert torch.equal(both, gradient(student, plain, samples, RoutedTeacher(teachers), swapped))
    else:
        assert float((both - other).abs().max()) > 1e6 * limit


def test_the_doctor_looks_at_every_reference_once(tmp_path: Path) -> None:
    changes = gopd(tmp_path, "full", train={"steps": 1})
    references = {"short": local(tmp_path, "one"), "long": {"type": "start"}}
    run_dir = train(tmp_path / "two", examine=True, **changes, references=references)
    told = (run_dir / "doctor.json").read_text()
    assert told.count("the reference for short scores at 1") == told.count("the reference for long scores at 1") == 1
    alike = train(
        tmp_path / "one-run", examine=True, **changes, references=dict.fromkeys(references, references["short"])
    )
    assert (alike / "doctor.json").read_text().count("the reference for short, long scores at 1") == 1
