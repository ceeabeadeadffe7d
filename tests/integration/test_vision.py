"""Prompts with images: read from rows, trained on, and refused where somebody cannot see them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from tests.runs import metric_rows, save_tiny_model, tiny_recipe, train, train_in_two, write_recipe
from tests.vision_models import FAMILIES, draw_image, save_vision_model, tokenizer_for, write_rows
from understudy import config
from understudy.cli import recording
from understudy.errors import DataError, RecipeError, VocabularyError
from understudy.models import load_tokenizer, load_vision
from understudy.recipe import Recipe
from understudy.recipe.checks import Files
from understudy.recipe.tokenizers import Tokenizers
from understudy.tasks import File, Renderer, num_repeated, overlap
from understudy.tasks.audit import audit, cases
from understudy.trainer import update
from understudy.types import IMAGE

FIELDS = {"prompt_field": "question", "reference_field": "answer", "image_field": "image", "verifier": "exact"}


def recipe(folder: Path, kind: str = "qwen2_5_vl", **changes: Any) -> dict[str, Any]:
    """Changes that make the tiny recipe distillation between two random models that read images."""
    folder.mkdir(parents=True, exist_ok=True)
    values: dict[str, Any] = {
        "student": {"model": save_vision_model(folder / "student", kind, seed=1), "build": None, "dtype": "float64"},
        "teacher": {"type": "local", "model": save_vision_model(folder / "teacher", kind, seed=2), "dtype": "float64"},
        "task": {"type": "file", "path": str(write_rows(folder / "data")), **FIELDS},
        "method": {"type": "gkd"},
        "sampling": {"max_new_tokens": 8},
        "train": {"steps": 5, "prompts_per_step": 3, "lr": 1e-2},
    }
    for key, value in changes.items():
        is_part = isinstance(value, dict) and isinstance(values.get(key), dict) and "type" not in value
        values[key] = values[key] | value if is_part else value
    return values


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


# --- training ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "llava", "gemma3"])
def test_five_steps_lose_what_they_lose_without_packing(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = train(tmp_path / "one", **recipe(tmp_path / "models", kind), examine=True)
    shapes = []
    plain = update.lay_out

    def alone(samples: Any, style: str) -> Any:
        shapes.append(style)
        return plain(samples, "alone")

    monkeypatch.setattr(update, "lay_out", alone)
    apart = train(tmp_path / "other", **recipe(tmp_path / "models", kind))
    assert set(shapes) == {"alone" if kind == "gemma3" else "shared"}
    losses = [[row["loss"] for row in metric_rows(run)] for run in (packed, apart)]
    assert losses[0][:2] == pytest.approx(losses[1][:2], rel=1e-9)
    # norms round to float32 whatever the weights are in, and Adam divides by a gradient's own size
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    assert losses[0][-1] != losses[0][0]


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", **recipe(tmp_path / "models"))
    again = train_in_two(tmp_path / "again", 2, **recipe(tmp_path / "models", train={"save_every": 1}))
    assert [row["loss"] for row in metric_rows(whole)] == [row["loss"] for row in metric_rows(again)]


@pytest.mark.slow
def test_only_the_language_model_is_trained_unless_the_recipe_says_so(tmp_path: Path) -> None:
    models = recipe(tmp_path / "models")
    start = weights(tmp_path / "models" / "student")
    for kept in ("frozen", "trained"):
        ended = train(tmp_path / kept, **recipe(tmp_path / "models", student={**models["student"], "vision": kept}))
        moved = {
            name for name, value in weights(ended / "student").items() if not torch.equal(value, start[name].double())
        }
        assert any("visual" not in name for name in moved)
        assert any("visual" in name for name in moved) == (kept == "trained")
    # the saved student reads images elsewhere too
    vision = load_vision(str(ended / "student"), load_tokenizer(str(ended / "student")))
    assert vision.image_ids == (0,)
    AutoModelForImageTextToText.from_pretrained(ended / "student")


@pytest.mark.slow
def test_adapters_are_for_the_language_model(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    student = {"lora": {"rank": 2, "alpha": 4.0}}
    ended = train(tmp_path / "run", **recipe(tmp_path / "models", "llava", student=student, method={"type": "gopd"}))
    names = load_file(ended / "student" / "adapter" / "adapter_model.safetensors")
    assert names
    assert not any("vision" in name or "projector" in name for name in names)


@pytest.mark.slow
def test_solutions_are_imitated_with_their_images(tmp_path: Path) -> None:
    values = recipe(tmp_path / "models", method={"type": "sft"}, teacher=None)
    values["task"]["solution_field"] = "answer"
    ended = train(tmp_path / "run", **values, eval={"split": "train", "every": 5, "samples_per_prompt": 1})
    losses = [row["loss"] for row in metric_rows(ended)]
    assert losses[-1] < losses[0]


@pytest.mark.slow
def test_a_teacher_with_a_worked_solution_sees_the_image(tmp_path: Path) -> None:
    teacher = {"type": "privileged", "template": "{reference}. {prompt}"}
    ended = train(tmp_path / "run", **recipe(tmp_path / "models", teacher=teacher))
    assert len(metric_rows(ended)) == 5


@pytest.mark.slow
def test_a_teacher_writes_responses_to_prompts_with_images(tmp_path: Path) -> None:
    values = recipe(tmp_path / "models", "llava", method={"type": "sft"}, responses={"type": "teacher"})
    # a random model seldom ends a response, and what does not end is no response
    values["sampling"] = {"max_new_tokens": 60}
    ended = train(tmp_path / "run", **values)
    assert metric_rows(ended)


@pytest.mark.slow
def test_scores_of_prompts_with_images_are_recorded_and_replayed(tmp_path: Path) -> None:
    values = recipe(tmp_path / "models", method={"type": "opd"}, train={"steps": 1, "prompts_per_step": 3, "lr": 1e-2})
    path, out = write_recipe(tmp_path, **values), tmp_path / "recorded"
    assert recording.record(path, [], out=out, prompts=3, samples=1, k=None) == "finished"
    beside = train(tmp_path / "beside", **values)
    replayed = train(tmp_path / "replayed", **values | {"teacher": {"type": "stored", "path": str(out)}})
    losses = [[row["loss"] for row in metric_rows(run)] for run in (beside, replayed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# --- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"teacher": {"type": "served", "url": "http://localhost:1"}},
            "teacher .* is not shown; take a teacher that is",
        ),
        (
            {
                "teacher": {"type": "http", "url": "http://localhost:1", "model": "m", "api": "vllm"},
                "method": {"type": "opd"},
            },
            "is not shown",
        ),
        ({"rollout": {"type": "vllm", "url": "http://localhost:1"}}, "its requests are token ids"),
        ({"student": {"model": None, "build": {"architecture": "llama"}}}, "student.build makes models of text"),
        ({"student": {"vision": "trained", "lora": {"rank": 2}}}, "vision is trained"),
    ],
)
def test_who_cannot_see_images_is_refused_with_the_recipe(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=said):
        config.parse(Recipe, tiny_recipe(tmp_path, **recipe(tmp_path / "models", **changes)))


def test_plain_text_has_no_place_for_an_image() -> None:
    with pytest.raises(ValueError, match="chat: false"):
        File(path="x.jsonl", prompt_field="q", image_field="i", chat=False)


def parsed(folder: Path, **changes: Any) -> Recipe:
    return config.parse(Recipe, tiny_recipe(folder, **recipe(folder / "models", **changes)))


def test_models_of_text_are_refused_before_they_are_loaded(tmp_path: Path) -> None:
    text = save_tiny_model(tmp_path / "text", seed=0)
    made = parsed(tmp_path, student={"model": text})
    with pytest.raises(RecipeError, match="a model of text .llama., and the prompts have images"):
        _ = Files(made).renderer
    # with the student's tokenizer, so that nothing but images is amiss
    tokenizer_for("qwen2_5_vl").save_pretrained(text)
    made = parsed(tmp_path, teacher={"type": "local", "model": text})
    with pytest.raises(RecipeError, match="a model of text"):
        train(tmp_path, **recipe(tmp_path / "models", teacher={"type": "local", "model": text}))


def test_processors_that_make_other_tokens_are_refused(tmp_path: Path) -> None:
    small = {"size": {"shortest_edge": 784, "longest_edge": 784 * 2}}
    other = save_vision_model(tmp_path / "small", "qwen2_5_vl", images=small)
    made = parsed(tmp_path, teacher={"type": "local", "model": other})
    tokenizers = Tokenizers(made)
    (source,) = tokenizers.sources
    with pytest.raises(VocabularyError, match="64 pixels is 6 tokens for the student and 1 for"):
        tokenizers.other_vision(source)


def test_rows_with_missing_and_broken_images_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    (tmp_path / "1.png").unlink()
    (tmp_path / "2.png").write_bytes(b"\x89PNG\r\n\x1a\nno picture")
    task = File(path=str(path), **FIELDS)  # type: ignore[arg-type]
    assert [prompt.images[0].path for prompt in task.prompts("train")] == [
        str(tmp_path / "0.png"),
        str(tmp_path / "3.png"),
    ]
    intake = task.intake("train")
    assert (intake.num_rows, intake.num_skipped) == (4, 2)
    assert "there is no image" in intake.skipped[0]
    assert "cannot be read as an image" in intake.skipped[1]
    for name in ("0.png", "3.png"):
        (tmp_path / name).unlink()
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match="there is no image .*none of the 4 rows"):
        File(path=str(path), **FIELDS).prompts("train")  # type: ignore[arg-type]


def test_an_image_that_is_cut_off_is_named_where_it_is_read(tmp_path: Path) -> None:
    (prompt, *_) = File(path=str(write_rows(tmp_path)), **FIELDS).prompts("train")  # type: ignore[arg-type]
    whole = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    path = save_vision_model(tmp_path / "model", "llava")
    tokenizer = load_tokenizer(path)
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image"):
        Renderer(tokenizer, vision=load_vision(path, tokenizer)).start(prompt)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"q": "<image> and <image>", "image": "0.png"}, "2 places for images .* holds 1"),
        ({"q": "<image>", "image": ["0.png", "0.png"]}, "1 places for images .* holds 2"),
        ({"q": "what?", "image": 3}, "holds 3; an image is the path of a file"),
        ({"q": "what?", "image": "https://example.com/a.png"}, "an image is the path of a file"),
        ({"q": "what?", "picture": "0.png"}, "no field 'image'"),
    ],
)
def test_rows_that_do_not_fit_their_images(
    row: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    task = File(path="rows.jsonl", prompt_field="q", image_field="image")
    with pytest.raises(DataError, match=said):
        task.to_prompt("rows.jsonl:1", row)


def test_an_image_in_a_task_of_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    with pytest.raises(DataError, match=r"type 'image'; only text is read; task\.image_field says"):
        File(path="x", prompt_field="m").to_prompt("x:1", {"m": chat})
    task = File(path="x", prompt_field="m", image_field="i")
    draw_image(tmp_path / "a.png", (8, 8), "red")
    prompt = task.to_prompt("x:1", {"m": chat, "i": ["a.png"]})
    assert prompt.messages == ({"role": "user", "content": f"{IMAGE}What?"},)


# --- rows and prompts -----------------------------------------------------------------------------------------------------


def test_images_stand_where_the_text_says_or_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    task = File(path="x", prompt_field="q", image_field="image", template="Look: {prompt}", system="S")
    first = task.to_prompt("x:1", {"q": "what?", "image": "0.png"})
    there = task.to_prompt("x:2", {"q": "is <image> <image>?", "image": ["0.png", "1.png"]})
    assert [prompt.messages[-1]["content"] for prompt in (first, there)] == [  # type: ignore[index]
        f"{IMAGE}Look: what?",
        f"Look: is {IMAGE} {IMAGE}?",
    ]
    assert len(there.images) == 2


def test_the_same_question_about_another_image_is_another_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    task = File(path="x", prompt_field="q", image_field="image")
    one, other = (task.to_prompt("x:1", {"q": "what?", "image": f"{n}.png"}) for n in range(2))
    assert one.id != other.id
    assert num_repeated([one, other]) == 0
    assert overlap([one], [other]) == []
    assert overlap([one], [one]) == [one.id]


def test_bytes_of_a_columnar_file_are_images(tmp_path: Path) -> None:
    write_rows(tmp_path)
    rows = [{"q": "what?", "image": {"bytes": (tmp_path / f"{n}.png").read_bytes(), "path": None}} for n in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    prompts = File(path=str(tmp_path / "rows.parquet"), prompt_field="q", image_field="image").prompts("train")
    assert len({prompt.id for prompt in prompts}) == 3
    assert prompts[0].images[0].data == (tmp_path / "0.png").read_bytes()


@pytest.mark.parametrize("kind", FAMILIES)
def test_prompts_have_all_tokens_of_their_images(kind: str, tmp_path: Path) -> None:
    path = save_vision_model(tmp_path / "model", kind)
    tokenizer = load_tokenizer(path)
    vision = load_vision(path, tokenizer)
    renderer = Renderer(tokenizer, vision=vision)
    for prompt in File(path=str(write_rows(tmp_path / "data")), **FIELDS).prompts("train"):  # type: ignore[arg-type]
        ids = renderer.start(prompt).tolist()
        own = vision.read(prompt.images[0]).ids.tolist()
        assert any(ids[at : at + len(own)] == own for at in range(len(ids)))
        assert sum(index in vision.image_ids for index in ids) == sum(index in vision.image_ids for index in own)


def test_data_cannot_spell_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path)
    path = save_vision_model(tmp_path / "model", "qwen2_5_vl")
    tokenizer = load_tokenizer(path)
    vision = load_vision(path, tokenizer)
    task = File(path="x", prompt_field="q", image_field="image")
    prompt = task.to_prompt("x:1", {"q": "<|image_pad|> is text", "image": "0.png"})
    ids = Renderer(tokenizer, vision=vision).start(prompt).tolist()
    assert ids.count(0) == vision.read(prompt.images[0]).ids.tolist().count(0)
    assert "<|image_pad|> is text" in tokenizer.decode([index for index in ids if index > 5])


def nlvr(shared: Path, **changes: Any) -> dict[str, Any]:
    return {"type": "vision", "dataset": "nlvr", "path": str(shared / "data" / "nlvr" / "dev_500.jsonl"), **changes}


def test_nlvr_is_read_whole(shared: Path) -> None:
    task = parsed_task(**nlvr(shared))
    prompts, intake = task.prompts("train"), task.intake("train")
    assert (len(prompts), intake.num_skipped) == (500, 0)  # type: ignore[union-attr]
    assert len({prompt.id for prompt in prompts}) == 500
    found = audit(task, list(cases(task, prompts)))
    assert (found.num_cases["gold"], found.surprises) == (2000, ())
    assert prompts[0].conversation.startswith(f"[image {shared / 'data/nlvr/images/dev-17-0-0.png'}]One box has")
    rows = [json.loads(line) for line in (shared / "data" / "nlvr" / "dev_500.jsonl").read_text().splitlines()]
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt.reference is not None
        assert prompt.reference[0] == str(row["label"]).lower()
        assert prompt.messages is not None
        assert prompt.messages[0]["content"].startswith(f"{IMAGE}{row['sentence']}\nIs this sentence true")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen3_vl", "idefics3"])
def test_a_student_learns_from_nlvr(kind: str, shared: Path, tmp_path: Path) -> None:
    changes = {"method": {"type": "reopold"}, "rollout": {"type": "hf", "copy": True}, "async": {"max_staleness": 1}}
    ended = train(tmp_path / "run", **recipe(tmp_path / "models", kind, task=nlvr(shared, limit=20), **changes))
    losses = [row["loss"] for row in metric_rows(ended)]
    assert len(losses) == 5
    assert all(map(math.isfinite, losses))


def parsed_task(**section: Any) -> Any:
    return config.parse(Recipe, tiny_recipe(Path(), task=section, student={"model": "org/name", "build": None})).task


def test_a_task_of_images_says_where_they_are() -> None:
    with pytest.raises(RecipeError, match="nlvr .*is not on the hub; set path to a copy"):
        parsed_task(type="vision", dataset="nlvr")
    with pytest.raises(RecipeError, match="image_field is missing"):
        parsed_task(type="vision", path="x.jsonl", prompt_field="q")
    assert parsed_task(type="vision", dataset="geometry3k").template.startswith("{prompt}\nPlease reason")
    asked = parsed_task(type="vision", dataset="geometry3k", template="{prompt}!")
    assert (asked.template, asked.image_field) == ("{prompt}!", "images")
