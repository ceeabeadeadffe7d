"""What sections of a recipe ask of each other is found out before a model is loaded (`check`, which a dry run shows)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import BUILD, distillation, save_tiny_model, tiny_recipe, train
from tests.tiny_models import request, sample, tiny
from understudy import config
from understudy.engines import HFEngine
from understudy.errors import RecipeError, ScoreError
from understudy.packing import Unscored, attach_scores
from understudy.recipe import Recipe
from understudy.recipe.checks import check
from understudy.tasks import Arithmetic, build_tokenizer
from understudy.tasks.records import Hub
from understudy.tasks.renderer import Renderer
from understudy.teachers import LocalTeacher, Setup
from understudy.teachers.stores.recording import ScoredMeta, write_scored
from understudy.types import Sample, Sampling, Scores

ROWS = [{"q": "11+22:", "a": "33#33", "r": "33", "t": "one"}, {"q": "10+20:", "a": "30#30", "r": "30", "t": "one"}]
SUMS = {"type": "arithmetic", "family": "addition", "digits": 2}
PLAIN = "{prompt}"
OPD = {"type": "opd"}


def parse(folder: Path, **changes: Any) -> Recipe:
    return config.parse(Recipe, tiny_recipe(folder, **changes))


def records(folder: Path, rows: Sequence[Mapping[str, Any]] = ROWS, **fields: Any) -> dict[str, Any]:
    """A task of a file: all fields named but for those that are None."""
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = {"prompt_field": "q", "reference_field": "r", "solution_field": "a", "chat": False} | fields
    return {"type": "jsonl", "path": str(file)} | {key: value for key, value in named.items() if value is not None}


def hub(**fields: Any) -> dict[str, Any]:
    return {"type": "hub", "dataset": "nobody/nothing", "prompt_field": "q", "chat": False} | fields


def mix(**parts: Any) -> dict[str, Any]:
    return {"type": "mix", "parts": parts}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    return {name: save_tiny_model(tmp_path / name, seed=seed) for seed, name in enumerate(("student", "big"))}


def taught(folder: Path, models: Mapping[str, str], **changes: Any) -> Recipe:
    """A student from a checkpoint, method OPD."""
    values = {"student": {"model": models["student"], "build": None}, "method": OPD}
    return parse(folder, **(values | changes))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is fetched."""

    def rows(self: Hub, source: str) -> Any:
        raise AssertionError(f"{self.dataset} was read")

    monkeypatch.setattr(Hub, "rows", rows)


def refused(recipe: Recipe, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        check(recipe)


@pytest.mark.parametrize("word", ["solution", "reference"])
def test_what_the_privileged_template_shows_is_in_every_part(tmp_path: Path, models: dict[str, str], word: str) -> None:
    teacher = {"type": "privileged", "template": f"{PLAIN}{{{word}}}"}
    without, whole = records(tmp_path, **{f"{word}_field": None}), records(tmp_path)
    shown = rf"teacher\.template shows {{{word}}}, but task"
    refused(taught(tmp_path, models, teacher=teacher, task=without), rf"{shown}\.{word}_field")
    refused(
        taught(tmp_path, models, teacher=teacher, task=mix(sums=SUMS, rows=without)),
        rf"{shown}\.parts\.rows\.{word}_field",
    )
    refused(taught(tmp_path, models, teacher=teacher, task=mix(far=hub())), rf"{shown}\.parts\.far\.{word}_field")
    for task in (whole, SUMS, mix(sums=SUMS, rows=whole)):
        assert check(taught(tmp_path, models, teacher=teacher, task=task))
    assert check(taught(tmp_path, models, teacher=teacher | {"template": PLAIN}, task=without))


def test_of_several_teachers_each_is_asked_about_its_own_part(tmp_path: Path, models: dict[str, str]) -> None:
    shown, plain = ({"type": "privileged", "template": text} for text in (PLAIN + "{solution}", PLAIN))
    task = mix(sums=SUMS, rows=records(tmp_path, solution_field=None))
    assert check(taught(tmp_path, models, teachers={"sums": shown, "rows": plain}, task=task))
    words = r"teachers\.rows\.template shows {solution}, but task\.parts\.rows\.solution_field"
    refused(taught(tmp_path, models, teachers={"sums": shown, "rows": shown}, task=task), words)
    by_row = records(tmp_path, solution_field=None, teacher_field="t")
    assert check(taught(tmp_path, models, teachers={"one": plain, "two": shown}, task=by_row))
    refused(taught(tmp_path, models, teachers={"one": shown, "two": plain}, task=by_row), r"teachers\.one\.template")


def test_feedback_needs_a_method_that_has_samples_graded(tmp_path: Path, models: dict[str, str]) -> None:
    teacher = {"type": "privileged", "template": PLAIN + "{feedback}"}
    words = r"teacher\.template shows {feedback}.*the method OPD has no samples graded"
    refused(taught(tmp_path, models, teacher=teacher), words)
    graded = {"method": {"type": "kdrl"}, "train": {"steps": 6, "samples_per_prompt": 2}}
    assert check(taught(tmp_path, models, teacher=teacher, **graded))
    parts = [{"type": "kdrl", "until": 0.5}, {"type": "opd"}]
    phases = graded | {"method": {"type": "phases", "parts": parts}}
    refused(taught(tmp_path, models, teacher=teacher, **phases), r"teacher\.template shows {feedback}")


def test_a_privileged_teacher_has_a_start_to_be(tmp_path: Path, models: dict[str, str]) -> None:
    words = r"teacher is the student's own start.*student\.build.*set teacher\.model"
    refused(parse(tmp_path, teacher={"type": "privileged"}, method=OPD), words)
    assert check(parse(tmp_path, teacher={"type": "privileged", "model": models["big"]}, method=OPD))
    student = {"model": models["student"], "build": None, "lora": {"rank": 2}}
    moving = {"type": "privileged", "ema": 0.5}
    refused(taught(tmp_path, models, teacher=moving, student=student), r"teacher\.ema .*remove student\.lora")
    assert check(taught(tmp_path, models, teacher=moving))


def test_a_system_message_needs_a_chat(tmp_path: Path, models: dict[str, str]) -> None:
    teacher = {"type": "privileged", "system": "Be kind."}
    refused(taught(tmp_path, models, teacher=teacher), r"teacher\.system.*the problems of task are plain text")


def responding(folder: Path, models: Mapping[str, str], **changes: Any) -> Recipe:
    return taught(folder, models, **({"method": {"type": "sft"}, "responses": {"type": "solutions"}} | changes))


def test_solutions_as_responses_are_there(tmp_path: Path, models: dict[str, str]) -> None:
    words = r"responses\.type is solutions, but task\.solution_field does not say"
    refused(responding(tmp_path, models, task=records(tmp_path, solution_field=None)), words)
    refused(responding(tmp_path, models, task=mix(far=hub())), r"task\.parts\.far\.solution_field")
    assert check(responding(tmp_path, models, task=records(tmp_path)))
    # one part without them is counted while training, no error
    assert check(responding(tmp_path, models, task=mix(sums=SUMS, rows=records(tmp_path, solution_field=None))))


def test_a_file_of_responses_answers_the_first_training_prompts(tmp_path: Path, models: dict[str, str]) -> None:
    file = tmp_path / "responses.jsonl"
    section = {"type": "jsonl", "path": str(file), "prompt_field": "p", "response_field": "y"}
    for prompt, response, words in (
        ("1+1:", "2#2", "none of the 2 prompts .* has a response .*compare the problems"),
        ("11+22:", "thirty-three", "1 have one, but the student cannot say it: the tokenizer cannot encode"),
    ):
        file.write_text(json.dumps({"p": prompt, "y": response}))
        refused(responding(tmp_path, models, task=records(tmp_path), responses=section), words)
    # the second of the prompts is enough
    file.write_text(json.dumps({"p": "10+20:", "y": "30#30"}))
    recipe = responding(tmp_path, models, task=records(tmp_path), responses=section)
    assert check(recipe)
    assert check(replace(recipe, task=config.parse(Recipe, tiny_recipe(tmp_path, task=mix(far=hub()))).task))


def stored(folder: Path, *, num: int, k: int | None = None, temperature: float = 1.0) -> dict[str, Any]:
    """A recording of `num` samples of each of two prompts."""
    tokenizer = build_tokenizer("addition")
    options: dict[str, Any] = {"name": "t", "vocab_size": len(tokenizer), "temperature": temperature}
    requests = [request(f"p/{n}", [3 + n], index) for n in range(2) for index in range(num)]
    model = tiny(dtype="float32", num_rows=len(tokenizer))
    engine = HFEngine(model, tokenizer, seed=0, stop_ids=(1,), vocab_size=len(tokenizer))
    samples = engine.generate(requests, Sampling(temperature, max_new_tokens=4), step=0)
    teacher = LocalTeacher(model, **options)
    scores = teacher.score(samples, frozenset({"sampled"} if k is None else {"topk"}), k=k)
    meta = ScoredMeta.of(teacher, Setup(renderer=Renderer(tokenizer), **options), "big", k)
    path = folder / f"stored-{num}-{k}-{temperature}"
    write_scored(path, meta, zip(samples, scores, strict=True))
    return {"type": "stored", "path": str(path)}


def test_a_recording_holds_what_the_run_reads(tmp_path: Path, models: dict[str, str]) -> None:
    topk = {"type": "topk", "k": 4}
    refused(
        taught(tmp_path, models, teacher=stored(tmp_path, num=1, k=3), method=topk), r"reads 4 tokens a row.* have 3"
    )
    assert check(taught(tmp_path, models, teacher=stored(tmp_path, num=1, k=4), method=topk))
    # as many as there are tokens is all that there are
    num_tokens = len(build_tokenizer("addition"))
    whole = stored(tmp_path, num=1, k=num_tokens)
    assert check(taught(tmp_path, models, teacher=whole, method={"type": "topk", "k": num_tokens + 5}))

    twice = {"steps": 6, "samples_per_prompt": 2}
    words = r"train\.samples_per_prompt is 2, but .* stores no sample for request p/0#1; 2 of its 2 prompts"
    refused(taught(tmp_path, models, teacher=stored(tmp_path, num=1), train=twice), words)
    assert check(taught(tmp_path, models, teacher=stored(tmp_path, num=2), train=twice))
    warm = stored(tmp_path, num=1, temperature=0.5)
    refused(
        taught(tmp_path, models, teacher=warm),
        r"stored with temperature 0\.5, this run has 1\.0 .*sampling\.temperature",
    )


def test_a_recording_with_a_damaged_file_is_refused(tmp_path: Path, models: dict[str, str]) -> None:
    teacher = stored(tmp_path, num=1)
    file = next(Path(teacher["path"]).glob("*.safetensors"))
    file.write_bytes(b"\xff" * file.stat().st_size)
    refused(taught(tmp_path, models, teacher=teacher), "is damaged .*record the scores again")


def test_every_part_of_a_mix_is_checked(tmp_path: Path) -> None:
    bare = records(tmp_path, reference_field=None, solution_field=None)
    refused(
        parse(tmp_path, task=mix(sums=SUMS, rows=bare)), r"imitates solutions, but task\.parts\.rows\.solution_field"
    )
    rewarded = {"method": {"type": "grpo"}, "train": {"steps": 6, "samples_per_prompt": 2}}
    refused(parse(tmp_path, task=mix(sums=SUMS, rows=bare), **rewarded), r"but task\.parts\.rows\.reference_field")
    unsplit = mix(sums=SUMS, rows=records(tmp_path))
    refused(parse(tmp_path, task=unsplit, eval={"split": "test"}), r"task\.parts\.rows: .* has no test split")
    refused(parse(tmp_path, eval_task=unsplit, eval={"split": "test"}), r"eval_task\.parts\.rows: ")


def test_a_part_on_the_hub_stays_unchecked(tmp_path: Path, models: dict[str, str]) -> None:
    """Nothing is read from the network, also where teachers are looked up by name."""
    task = mix(sums=SUMS, far=hub(solution_field="a"))
    lines = check(taught(tmp_path, models, task=task, method={"type": "sft"}, eval={"split": "train"}))
    assert not any("first prompts" in line for line in lines)
    local = {"type": "local", "model": models["big"]}
    assert check(taught(tmp_path, models, task=task, teachers={"sums": local, "far": local}))
    words = r"task\.parts\.far names no teacher: did you mean 'fare'"
    refused(taught(tmp_path, models, task=task, teachers={"sums": local, "fare": local}), words)
    by_row = mix(sums=records(tmp_path, teacher_field="t"), far=hub())
    words = r"names the teacher 'one'; the teachers are: far, sums"
    refused(taught(tmp_path, models, task=by_row, teachers={"sums": local, "far": local}), words)
    words = r"several teachers, but task names none .*task\.teacher_field"
    refused(taught(tmp_path, models, task=hub(), teachers={"sums": local, "far": local}), words)
    with pytest.raises(AssertionError, match="nobody/nothing was read"):
        check(taught(tmp_path, models, task=task, method={"type": "sft"}), fetch=True)


def test_a_greedy_evaluation_cannot_redraw(tmp_path: Path, models: dict[str, str]) -> None:
    judged = {"teacher": {"type": "verbal", "model": models["big"]}}
    for changes, key in (
        ({"eval": {"reject_below": 5, "sampling": {"temperature": 0}}}, r"eval\.sampling"),
        ({"eval": {"reject_below": 5}, "sampling": {"temperature": 0, "max_new_tokens": 8}}, "but sampling"),
    ):
        words = rf"eval\.reject_below.*{key}\.temperature is 0, so every redraw would be the same"
        with pytest.raises(RecipeError, match=words):
            parse(tmp_path, **judged, **changes)
    assert check(parse(tmp_path, **judged, eval={"reject_below": 5}))
    assert check(parse(tmp_path, eval={"greedy": True, "sampling": {"temperature": 0, "max_new_tokens": 8}}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"on_reject": "revise"}, "nothing is rejected; set reject_below"),
        ({"reject_below": 5, "on_reject": "revise", "sampling": {"temperature": 0}}, "every redraw would be the same"),
    ],
)
def test_steps_that_stand_at_test_time_need_a_rejection(
    tmp_path: Path, models: dict[str, str], changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RecipeError, match=words):
        parse(tmp_path, teacher={"type": "verbal", "model": models["big"]}, eval=changes)


@pytest.mark.parametrize("how", ["revise", "continue"])
def test_steps_that_stand_at_test_time_need_a_judge_of_steps(
    tmp_path: Path, models: dict[str, str], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejection = {"reject_below": 5, "on_reject": how}
    judge = {"type": "verbal", "model": models["big"]}
    assert check(parse(tmp_path, teacher=judge, eval=rejection))
    if how == "continue":
        greedy = {"sampling": {"temperature": 0, "max_new_tokens": 8}}
        assert check(parse(tmp_path, teacher=judge, eval=rejection | greedy))
    with pytest.raises(RecipeError, match="reads whole responses; set eval.on_reject: resample"):
        parse(tmp_path, teacher={"type": "verifier"}, eval=rejection)
    monkeypatch.setattr(Arithmetic, "environment", lambda task, prompt: None)
    with pytest.raises(RecipeError, match="an environment answers the student; set eval.on_reject: resample"):
        parse(tmp_path, teacher=judge, eval=rejection)


def test_what_training_needs_an_evaluation_does_not(tmp_path: Path, models: dict[str, str]) -> None:
    assert check(responding(tmp_path, models, task=records(tmp_path, solution_field=None)), training=False)


def test_parts(tmp_path: Path) -> None:
    task = parse(tmp_path, task=mix(sums=SUMS, rows=records(tmp_path))).task
    assert list(task.places()) == ["task.parts.sums", "task.parts.rows"]
    assert [part.computed for part in task.places("eval_task").values()] == [True, False]
    assert Arithmetic().places() == {"task": Arithmetic()}


METHODS = [{"type": "opd"}, {"type": "topk", "k": 3}, {"type": "gkd"}]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["type"])
def test_a_privileged_prompt_that_is_too_long_costs_its_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: dict[str, Any]
) -> None:
    """One of the problems has a solution too long for the teacher's positions; the run goes on without its samples."""
    rows = [{"q": "1+2:", "a": "3#3"}, {"q": "3+4:", "a": "7" * BUILD["max_position_embeddings"]}]
    seen: list[list[Scores]] = []

    def attach(samples: Sequence[Sample], scores: Sequence[Scores], *args: Any, **options: Any) -> Any:
        seen.append(list(scores))
        return attach_scores(samples, scores, *args, **options)

    monkeypatch.setattr("understudy.trainer.collect.attach_scores", attach)
    changes = distillation(
        tmp_path,
        teacher={"type": "privileged", "template": "{solution}{prompt}"},
        task=records(tmp_path, rows, reference_field=None),
        method=method,
        train={"steps": 2, "prompts_per_step": 2, "on_missing_score": "drop"},
        sampling={"max_new_tokens": 8},
    )
    run = train(tmp_path, **changes)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["samples_dropped"] for row in metrics] == [1.0, 1.0]
    assert seen
    for scores in seen:
        (lost,) = [one for one in scores if isinstance(one, Unscored)]
        (kept,) = [one for one in scores if not isinstance(one, Unscored)]
        for name in ("logprob", "entropy", "topk_ids", "topk_logprob", "hidden"):
            mine, other = getattr(lost, name), getattr(kept, name)
            assert (mine is None) == (other is None)
            if mine is not None:
                assert (mine.dtype, mine.shape[1:]) == (other.dtype, other.shape[1:])
                assert len(mine) == lost.token_ids.numel()
                assert bool((mine == -1).all() if name == "topk_ids" else mine.isnan().all())
    stopped = changes | {"train": {"steps": 2, "prompts_per_step": 2}}
    with pytest.raises(
        ScoreError, match=r"rows/.*#0, .* is missing: the prompt that it is shown, of 68 tokens, .*64 positions"
    ):
        train(tmp_path / "error", **stopped)


def test_missing_whole_rows_are_seen() -> None:
    """A NaN in one of the hidden states, or none at all beside others; teachers may differ in their sizes."""
    samples = [sample(name, [2], [3, 4]) for name in "abc"]
    whole = [
        Scores(one.response_ids, hidden=torch.zeros(2, size)) for one, size in zip(samples, (3, 5, 3), strict=True)
    ]
    assert [one.scores for one in attach_scores(samples, whole, "error") if one is not None] == whole
    broken = torch.zeros(2, 5)
    broken[1, 4] = float("nan")
    for lost in (replace(whole[1], hidden=broken), replace(whole[1], hidden=None)):
        scores = [whole[0], lost, whole[2]]
        first, second, third = attach_scores(samples, scores, "drop")
        assert second is None
        assert [(one.key, one.scores) for one in (first, third) if one] == [("a#0", whole[0]), ("c#0", whole[2])]
        with pytest.raises(ScoreError, match=r"sample b#0, response token [01] .*hidden is missing"):
            attach_scores(samples, scores, "error")
    with pytest.raises(ScoreError, match=r"b#0: hidden has shape \(3, 5\); expected \(2, H\)"):
        attach_scores(samples, [whole[0], replace(whole[1], hidden=torch.zeros(3, 5)), whole[2]], "drop")
