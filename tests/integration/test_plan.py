"""The plan of a run on GPUs: its arithmetic is that of the models, counted by torch and by the doctor."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from tests.runs import distillation, tiny_recipe
from understudy import config
from understudy.cli import app
from understudy.errors import RecipeError
from understudy.models import build_causal_lm
from understudy.recipe import Recipe
from understudy.recipe.checks import room
from understudy.recipe.plan import CARDS, Layout, collectives, machine_of, plan, planned, read_shape, shapes_of
from understudy.trainer.console import Console

BUILD = {
    "architecture": "qwen3",
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "vocab_size": 97,
}


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return config.parse(Recipe, tiny_recipe(folder, **changes))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_operations_are_those_that_torch_counts(tied: bool) -> None:
    """2 a parameter and token, and the square of attention, which a causal model needs half of."""
    build = {**BUILD, "tie_word_embeddings": tied}
    shape = read_shape(None, build, "float32")
    size = build.pop("vocab_size")
    model = build_causal_lm(build, vocab_size=size, eos_token_id=0)
    assert shape.parameters == sum(value.numel() for value in model.parameters())
    assert shape.size == room.size_of(model)
    # the counter knows products of matrices, not the fused attention of a CPU
    model.set_attn_implementation("eager")
    tokens = 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(tokens)[None], use_cache=False)
    # vectors (norms) are multiplied with too, which the counter leaves out
    vectors = sum(value.numel() for value in model.parameters() if value.dim() == 1)
    # the angles of positions are a product as well, of half a head's size a token, where torch does not fold it
    positions = 2 * tokens * 64 // 4 // 2
    assert counter.get_total_flops() - shape.forward(tokens, 2 * tokens) + 2 * tokens * vectors in (0, positions)


def test_of_experts_those_count_that_a_token_is_sent_to() -> None:
    build = {
        "architecture": "qwen3_moe",
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "vocab_size": 50,
    }
    shape = read_shape(None, build, "float32")
    made = AutoConfig.for_model("qwen3_moe")
    assert made.num_experts_per_tok == 8
    experts = 2 * 8 * 3 * 32 * 16
    assert shape.parameters - shape.active == pytest.approx(experts * 6 / 8 + 50 * 32)


def test_one_gpu_needs_what_the_doctor_says(tmp_path: Path) -> None:
    changes = distillation(tmp_path)
    recipe = recipe_of(tmp_path, **changes)
    student, teacher = (
        room.size_on_disk(str(tmp_path / name), "float32", torch.device("cpu")) for name in ("student", "teacher")
    )
    assert student is not None
    assert teacher is not None
    shapes = shapes_of(recipe)
    assert {place: shape.size for place, shape in shapes.items()} == {
        "student": student,
        "teacher": replace(teacher, weights=teacher.weights // 2, trained=teacher.trained // 2,
                           trained_half=teacher.weights // 2, number_bytes=2),
    }  # fmt: skip
    rows = shapes["student"].head // student.hidden
    needs = room.Needs(
        recipe=recipe,
        device=torch.device("cuda"),
        student=student,
        others={"teacher": shapes["teacher"].size},
        vocab_size=rows,
    )
    one = planned(recipe, shapes, machine_of(recipe, 1), Layout(shard=1))
    assert one.memory["trainer"] == room.memory_items(needs)
    # what is held is divided, what a rank computes is its own
    four = planned(recipe, shapes, machine_of(recipe, 4), Layout(shard=4))
    sizes, divided = ({item.name: item.size for item in each.memory["trainer"]} for each in (one, four))
    for name in ("student", "teacher", "optimizer", "gradients"):
        assert divided[name] == -(-sizes[name] // 4)
    assert divided["gathered"] == 4 * (2 * shapes["student"].block + shapes["student"].outside)


def test_weights_are_gathered_and_gradients_summed_in_the_precision_of_the_shards(tmp_path: Path) -> None:
    """float32 weights: half of each in bfloat16; gradients have the precision of the gathered weights, or their own."""
    build = {"student": {"build": BUILD, "model": None, "dtype": "float32"}}
    found = []
    for named in ({}, {"param_dtype": "bfloat16"}, {"param_dtype": "bfloat16", "reduce_dtype": "float32"}):
        recipe = recipe_of(tmp_path, **distillation(tmp_path, parallel={"shard": 4} | named, **build))
        machine, shapes = machine_of(recipe, 4), shapes_of(recipe)
        best = plan(recipe, machine, shapes)[0]
        sizes = {item.name: item.size for item in best.memory["trainer"]}
        moved = collectives(recipe, shapes["student"], machine, best.layout, 8)
        found.append([sizes["gathered"], moved["weights gathered"], moved["gradients reduced"]])
    own, half, mixed = found
    assert half == pytest.approx([value / 2 for value in own])
    assert mixed == pytest.approx([half[0], half[1], own[2]])


def test_layouts_that_are_proposed_compute_in_16_bits(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, **distillation(tmp_path, student={"build": BUILD, "model": None, "dtype": "float32"}))
    layouts = [one.layout for one in plan(recipe, machine_of(recipe, 4)) if one.layout.shard > 1]
    assert layouts
    assert all("param_dtype: bfloat16, reduce_dtype: float32" in one.describe() for one in layouts)


def test_a_head_in_slices_is_not_gathered(tmp_path: Path) -> None:
    build = {"student": {"build": BUILD, "model": None, "dtype": "float32"}}
    parallel = {"shard": 4, "teachers": True}
    plain = recipe_of(tmp_path, **distillation(tmp_path, parallel=parallel, **build))
    sliced = recipe_of(tmp_path, **distillation(tmp_path, parallel=parallel | {"vocabulary": True}, **build))
    shapes, machine = shapes_of(plain), machine_of(plain, 4)
    one, two = (plan(each, machine, shapes)[0] for each in (plain, sliced))
    assert "vocabulary: true" in two.layout.describe()
    before, after = ({item.name: item.size for item in each.memory["trainer"]} for each in (one, two))
    head = 4 * 97 * BUILD["hidden_size"]
    assert shapes["student"].head == head // 4
    assert before["gathered"] - after["gathered"] == head
    # whole rows of the teacher, in 16 bits, are computed by the same slices
    teacher = 2 * shapes["teacher"].head
    assert before["output layer of teacher"] == teacher
    assert after["output layer of teacher"] == -(-teacher // 4)
    assert {
        name: size for name, size in before.items() if name in ("student", "optimizer", "gradients", "teacher")
    }.items() <= after.items()
    moved = [
        collectives(each, shapes["student"], machine, best.layout, 8) for each, best in ((plain, one), (sliced, two))
    ]
    assert moved[1]["weights gathered"] < moved[0]["weights gathered"]
    assert moved[1]["hidden states exchanged"] > 0
    assert "hidden states exchanged" not in moved[0]
    tied = recipe_of(
        tmp_path,
        **distillation(
            tmp_path,
            parallel=parallel | {"vocabulary": True},
            student={"model": None, "build": BUILD | {"tie_word_embeddings": True}},
        ),
    )
    with pytest.raises(RecipeError, match="one weight for embedding and output layer"):
        plan(tied, machine)


def test_twice_the_samples_are_twice_the_operations(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, **distillation(tmp_path))
    twice = replace(recipe, train=replace(recipe.train, prompts_per_step=2 * recipe.train.prompts_per_step))
    one, two = (plan(each, machine_of(each, 1))[0] for each in (recipe, twice))
    for first, second in zip(one.phases, two.phases, strict=True):
        assert second.flops == pytest.approx(2 * first.flops)
    assert {phase.name for phase in one.phases} == {"generate", "score", "update"}


def test_layouts_use_what_there_is_and_those_that_fit_come_first(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, **distillation(tmp_path))
    machine = machine_of(recipe, 8)
    found = plan(recipe, machine)
    assert all(one.layout.gpus == 8 for one in found)
    assert len({one.layout for one in found}) == len(found)
    assert {one.layout.shard for one in found} == {1, 2, 4, 8}
    assert any(one.layout.servers for one in found)
    assert any(one.layout.teachers for one in found)
    assert [one.seconds for one in found] == sorted(one.seconds for one in found)
    # a card on which whole copies do not fit, and shards do
    whole, parts = (
        planned(recipe, shapes_of(recipe), machine, Layout(shard=shard, replicate=8 // shard)).worst[1]
        for shard in (1, 8)
    )
    assert parts < whole
    tight = plan(recipe, machine_of(recipe, 8, gpu_memory=(parts + whole) / 2 / 0.9 / 1e9))
    assert tight[0].fits
    assert not all(one.fits for one in tight)


def test_the_section_parallel_is_kept(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, **distillation(tmp_path), parallel={"shard": 2, "replicate": 2, "teachers": False})
    found = plan(recipe, machine_of(recipe, 4))
    assert {(one.layout.shard, one.layout.replicate) for one in found} == {(2, 2)}
    items = {item.name: item.size for item in found[0].memory["trainer"]}
    assert items["teacher"] == shapes_of(recipe)["teacher"].size.weights
    with pytest.raises(RecipeError, match="has 2 x 2 ranks, for which 2 GPUs are not enough"):
        plan(recipe, machine_of(recipe, 2))


def test_what_does_not_fit_is_said_with_what_would(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, **distillation(tmp_path), train={"gradient_checkpointing": False})
    shapes = shapes_of(recipe)
    alone = planned(recipe, shapes, machine_of(recipe, 1), Layout(shard=1)).worst[1]
    text = io.StringIO()
    with Console(text) as console:
        from understudy.recipe.plan import show

        show(console, recipe, machine_of(recipe, 1, gpu_memory=0.8 * alone / 0.9 / 1e9), 2.0)
    assert "no layout fits" in text.getvalue()
    assert "train.gradient_checkpointing=true" in text.getvalue()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml

    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path, **distillation(tmp_path))))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("sys.argv", ["understudy", "plan", str(path), "--gpus", "2", "--price", "3"])
    with pytest.raises(SystemExit) as ending:
        app.main()
    assert not ending.value.code
    said = capsys.readouterr().out
    for words in (
        "layout:",
        "memory of one GPU",
        "time of one step",
        "GPU hours",
        "in all at 3 an hour",
        "layouts that fit",
    ):
        assert words in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"card": "h10"}, "there is no card 'h10'; did you mean 'h100'"),
        ({"gpu_memory": 0.0}, "--gpu-memory is 0.0; it must be above 0"),
        ({"response_tokens": float("nan")}, "--response-tokens is nan"),
    ],
)
def test_numbers_that_are_none_are_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    recipe = recipe_of(tmp_path)
    with pytest.raises(RecipeError, match=message):
        machine_of(recipe, 8, **given)


def test_a_model_that_cannot_be_had_is_named() -> None:
    with pytest.raises(RecipeError, match=r"the configuration of org/nowhere cannot be read: .*; give a directory"):
        read_shape("org/nowhere", None, "float32")


def test_a_model_from_scratch_has_the_tokens_of_its_task(tmp_path: Path) -> None:
    build = {key: value for key, value in BUILD.items() if key != "vocab_size"}
    shapes = shapes_of(recipe_of(tmp_path, student={"build": build}))
    assert shapes["student"].head == 17 * BUILD["hidden_size"]


def test_cards_are_plausible() -> None:
    """A machine's balance: hundreds of operations for each byte, and a link slower than the memory."""
    for name, card in CARDS.items():
        assert 100 < card.flops / card.bandwidth < 500, name
        assert card.link < card.bandwidth, name
