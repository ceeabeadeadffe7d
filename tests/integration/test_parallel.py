"""A student in shards: the losses and weights of one process, whatever the number of ranks, and none that hangs."""

from __future__ import annotations

import json
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM

from tests.engine_stub import EngineStub
from tests.processes import Process, run_ranks
from tests.runs import (
    BUILD,
    distillation,
    grade_by_length,
    metric_rows,
    save_tiny_model,
    tiny_recipe,
    train,
    weights,
    write_recipe,
)
from tests.tiny_models import letters
from understudy import config
from understudy.engines.vllm.launch import free_ports
from understudy.engines.vllm.settings import VLLM
from understudy.engines.vllm.weights import WeightStore, with_head
from understudy.errors import RecipeError
from understudy.models import build_causal_lm, parallel, save_hf
from understudy.recipe import Recipe
from understudy.tasks import Arithmetic
from understudy.trainer.distributed import Ranks
from understudy.trainer.settings import Parallel

pytestmark = pytest.mark.slow

LAYERS = BUILD | {"num_layers": 2}
TIED = LAYERS | {"architecture": "qwen3", "tie_word_embeddings": True}
EXPERTS = LAYERS | {
    "architecture": "qwen3_moe",
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
GATHERS, REDUCES = ("all_gather_single", "all_gather_into_tensor"), ("reduce_scatter_single", "reduce_scatter_tensor")
"""Collective calls by their name in this version of torch, and in older ones."""


def train_in_shards(*runs: tuple[Path, int | None]) -> None:
    """Trains the recipe of each folder, one after the other, or continues it; to the end, or until that many steps are done.

    Writes to `calls_RANK.json`, for each update, its number of micro-batches, the prompt and response tokens of its samples and
    the sizes of what it gathered and reduced.
    """
    from understudy import run
    from understudy.recipe import load_recipe
    from understudy.trainer import loop
    from understudy.trainer import update as of_update
    from understudy.trainer.console import Console

    updates: list[dict[str, Any]] = []
    plain_update, plain_step, plain_loss = loop.accumulate_gradients, loop.Trainer._take_step, of_update.evaluate
    plain_save, moved_on = loop.save_checkpoint, threading.Event()
    last: int | None = None

    def counted(names: tuple[str, ...]) -> None:
        name = next(name for name in names if hasattr(torch.distributed, name))
        plain = getattr(torch.distributed, name)

        def call(*given: Any, **named: Any) -> Any:
            if updates:
                tensors = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)]
                updates[-1].setdefault(names[0], []).append(max(tensor.numel() for tensor in tensors))
            return plain(*given, **named)

        setattr(torch.distributed, name, call)

    def update(student: Any, micros: Any, **named: Any) -> Any:
        sizes = [(one.prompt_length, one.num_response_tokens) for micro in micros for one in micro.samples]
        updates.append({"micro_batches": len(micros), "sizes": sizes})
        found = plain_update(student, micros, **named)
        updates.append({})
        return found

    def step(self: Any) -> None:
        if self.progress.step == last:
            moved_on.set()
            raise KeyboardInterrupt
        plain_step(self)
        if self.progress.step > 1:
            moved_on.set()

    def save(*given: Any, **named: Any) -> None:
        assert not folder.name.startswith("moved") or moved_on.wait(100), "training waits until a checkpoint is written"
        plain_save(*given, **named)

    def broken_loss(*given: Any, **named: Any) -> Any:
        found = plain_loss(*given, **named)
        of_update.evaluate = plain_loss  # type: ignore[attr-defined]
        return replace(found, loss=found.loss * torch.nan)

    counted(GATHERS)
    counted(REDUCES)
    loop.save_checkpoint = save  # type: ignore[attr-defined]
    loop.accumulate_gradients = update  # type: ignore[attr-defined]
    loop.Trainer._take_step = step  # type: ignore[method-assign]
    Arithmetic.grade = grade_by_length  # type: ignore[assignment, method-assign]
    ranks = Ranks.from_environment(lambda: torch.device("cpu"))
    for folder, last in runs:
        updates.clear()
        if folder.name.startswith("broken") and ranks.rank == 1:
            of_update.evaluate = broken_loss  # type: ignore[attr-defined]
        recipe, resume = load_recipe(folder / "recipe.yaml"), (folder / "run" / "checkpoints").is_dir()
        try:
            run.train(recipe, resume=resume, examine=(folder / "examined").is_file(), console=Console(quiet=True))
        except KeyboardInterrupt:
            assert last is not None
        calls = [one for one in updates if "micro_batches" in one]
        (folder / f"calls_{ranks.rank}.json").write_text(json.dumps(calls))
    ranks.close()


def _recipe(folder: Path, name: str, url: str) -> dict[str, Any]:
    """Changes of the tiny recipe. Three prompts leave one of four ranks without a sample."""
    keys = {"steps": 2, "prompts_per_step": 3, "micro_batch_tokens": 40, "lr": 1e-3, "max_grad_norm": 0.1}
    double: dict[str, Any] = {"model": None, "build": LAYERS, "dtype": "float64"}

    def distilled(**changes: Any) -> dict[str, Any]:
        made = distillation(folder, **changes)
        made["teacher"]["dtype"] = "float64"
        return made

    if name in ("slices", "topk slices"):
        method = {"type": "gkd", "beta": 0.3} if name == "slices" else {"type": "topk", "k": 5}
        # one prompt leaves one of two ranks without a sample
        more = {"minibatches": 2, "save_samples_every": 1} if name == "slices" else {"prompts_per_step": 1}
        return distilled(student=double | {"build": LAYERS}, method=method, train=keys | more)
    if name == "experts":
        # the product of groups of experts is not there in float64
        return distilled(student={"model": None, "build": EXPERTS}, train=keys)
    if name == "tied":
        # several updates a step, of which some ranks have no sample; activations are computed again
        more = {"minibatches": 2, "passes": 2, "gradient_checkpointing": True}
        return distilled(student=double | {"build": TIED}, train=keys | more)
    if name == "lora":
        # groups over ranks, and a reference that is the student without its adapters
        method = {"type": "grpo", "distil_coef": 0.5, "kl_coef": 0.1}
        lora = {"rank": 2, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        more = {"samples_per_prompt": 3}
        return distilled(student=double | {"lora": lora}, method=method, train=keys | more)
    if name == "moved":
        teacher = {"type": "privileged", "ema": 0.5, "template": "{solution};{prompt}", "dtype": "float64"}
        more = {"steps": 4, "save_every": 1}
        return distillation(
            folder, student={"dtype": "float64"}, train=keys | more, sampling={"max_new_tokens": 12}, teacher=teacher
        )
    keys |= {"prompts_per_step": 5}
    if name == "quantile":
        method = {"type": "reopold", "switch_step": 0, "top_share": 0.5}
        aside = {"rollout": {"type": "hf", "copy": True}, "async": {"max_staleness": 0}}
        return distillation(folder, method=method, train=keys, **aside)
    changes = distillation(folder, method={"type": "gkd"}, train=keys)
    if name == "served":
        return changes | {"rollout": {"type": "vllm", "url": url, "dtype": "float32"}}
    del changes["teacher"]
    models = {part: save_tiny_model(folder / part, seed=seed) for seed, part in enumerate(("one", "other"), 3)}
    parts = {
        part: {"type": "arithmetic", "family": "addition", "digits": 2, "seed": n} for n, part in enumerate(models)
    }
    return changes | {
        "task": {"type": "mix", "parts": parts},
        "teachers": {part: {"type": "local", "model": model} for part, model in models.items()},
        "eval": {"problems": 3},
    }


CASES: dict[str, tuple[int, dict[str, Any], float]] = {
    "tied": (4, {"shard": 2, "replicate": 2}, 1e-10),
    # its scores are kept in float32
    "lora": (4, {"shard": 4, "teachers": True}, 1e-8),
    "moved": (4, {"shard": 4}, 1e-10),
    "quantile": (2, {"shard": 2, "reshard": False, "gradients": "whole"}, 1e-5),
    "teachers": (2, {"shard": 2, "teachers": True}, 1e-5),
    "served": (2, {"shard": 2}, 1e-5),
    "slices": (4, {"shard": 2, "replicate": 2, "teachers": True, "vocabulary": True}, 1e-10),
    "topk slices": (2, {"shard": 2, "vocabulary": True}, 1e-8),
    # in float32, and a tie of two experts would fall either way
    "experts": (2, {"shard": 2}, 1e-5),
}
"""Ranks, shards, and how far sums in another order may take the weights."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of each case, trained by one process in `alone` and by several in `run`."""
    made = {name: tmp_path_factory.mktemp(name) for name in CASES}
    student = save_tiny_model(made["served"] / "student", seed=1)
    with EngineStub(student) as stub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Arithmetic, "grade", grade_by_length)
        changes = {name: _recipe(folder, name, stub.url) for name, folder in made.items()}
        for name, folder in made.items():
            train(folder / "alone", **changes[name])
            write_recipe(folder, **changes[name], parallel=CASES[name][1])
        (made["teachers"] / "examined").touch()
        for world in (4, 2):
            runs = [(folder, None) for name, folder in made.items() if CASES[name][0] == world and name != "moved"]
            # one step by four ranks, one more by two, the others by one; each goes on while it is saved
            moved = (made["moved"], 2 if world == 4 else 3)
            write_recipe(made["moved"], **changes["moved"], parallel={"shard": world})
            if world == 2:
                made["broken"] = tmp_path_factory.mktemp("broken")
                write_recipe(made["broken"], parallel={"shard": 2}, train={"steps": 2})
                runs.append((made["broken"], None))
            run_ranks(train_in_shards, moved, *runs, folder=tmp_path_factory.mktemp("ranks"), num_ranks=world)
            last = made["moved"] / "run" / "checkpoints" / f"step_{moved[1]:06d}"
            assert last.is_dir()
            shutil.rmtree(last)
        saved = made["moved"] / "run" / "checkpoints" / "step_000002"
        # each rank has written its part
        assert sorted(path.name for path in (saved / "optimizer").glob("*.distcp")) == ["__0_0.distcp", "__1_0.distcp"]
        train(made["moved"], resume=True, **changes["moved"])
    return made


@pytest.mark.parametrize("name", CASES)
def test_shards_are_one_run(folders: dict[str, Path], name: str) -> None:
    """Also one that goes on with fewer ranks."""
    alone, sharded, atol = folders[name] / "alone" / "run", folders[name] / "run", CASES[name][2]
    for one, other in zip(metric_rows(alone), metric_rows(sharded), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            # scores and log-probabilities that are recorded with samples are in float32
            limit = atol if key in ("loss", "grad_norm") else 1e-5
            assert other[key] == pytest.approx(value, rel=limit, abs=limit), (one["step"], key)
    assert weights(alone).keys() == weights(sharded).keys()
    for key, value in weights(alone).items():
        torch.testing.assert_close(weights(sharded)[key], value, rtol=0, atol=atol)


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_update_on_all(folders: dict[str, Path]) -> None:
    run_dir = folders["broken"] / "run"
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] is None for row in rows] == [True, False]
    assert json.loads((run_dir / "run.json").read_text())["updates"] == 1
    # each rank keeps its own samples
    assert len(list((run_dir / "bad_batches").iterdir())) == 2
    assert all(bool(value.isfinite().all()) for value in weights(run_dir).values())


def _calls(folder: Path, world: int) -> list[list[dict[str, Any]]]:
    return [json.loads((folder / f"calls_{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.parametrize("name", ["tied", "lora", "quantile"])
def test_ranks_have_the_same_number_of_tokens_but_for_one_piece(folders: dict[str, Path], name: str) -> None:
    """Of each update, whatever ranks wrote the samples."""
    world = CASES[name][0]
    for updates in zip(*_calls(folders[name], world), strict=True):
        sizes = [update["sizes"] for update in updates]
        loads = [sum(prompt + response for prompt, response in one) for one in sizes]
        assert max(loads) <= sum(loads) / world + max(sum(size) for one in sizes for size in one)


@pytest.mark.parametrize("name", ["tied", "quantile", "teachers"])
def test_an_update_gathers_the_head_once_and_reduces_once(folders: dict[str, Path], name: str) -> None:
    """On every rank alike, however many micro-batches it has; blocks are gathered for each forward and each backward."""
    world, section, _ = CASES[name]
    found = _calls(folders[name], world)
    for update in (update for calls in found for update in calls):
        del update["sizes"]
    assert all(calls == found[0] for calls in found)
    # the first of two ranks has three samples and the other two; of four ranks the last has none
    assert (max(update["micro_batches"] for update in found[0]) > 1) == (world == 2)
    num_blocks = 2 if name == "tied" else 1
    for update in found[0]:
        gathered, reduced = update.get(GATHERS[0], []), update[REDUCES[0]]
        assert len(reduced) == 1 + num_blocks * (1 if section.get("gradients") else update["micro_batches"])
        if name == "teachers":
            # embedding and head of this model are smaller than a block
            assert gathered.count(min(gathered)) == 1
            assert gathered.count(max(gathered)) >= update["micro_batches"]
        if name == "quantile":
            assert gathered == [], "the pass that scores the batch has gathered all, and nothing was dropped"


def stream_from_shards(folder: Path) -> None:
    """One of two ranks: pushes and saves models from shards, and bounds what is whole meanwhile."""
    ranks = Ranks.from_environment(lambda: torch.device("cpu"))
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    group = torch.distributed.new_group(backend="gloo")
    parallel.PIECE_BYTES = 0  # type: ignore[misc]
    plain = parallel.whole
    alive: list[StorageWeakRef] = []
    peak = 0

    def counted(value: Tensor) -> Tensor:
        nonlocal peak
        found = plain(value)
        # another name of the shards' own memory is no copy
        if hasattr(value, "to_local"):
            alive.append(StorageWeakRef(found.untyped_storage()))
            # a thread of the transport may let go of the one before a moment later
            until = time.monotonic() + 10
            while len(alive) > 2 and time.monotonic() < until:
                alive[:] = [one for one in alive if not one.expired()]
            peak = max(peak, len(alive))
        return found

    parallel.whole = counted
    for name, build in {"tied": TIED, "experts": EXPERTS}.items():
        # no number of rows that two ranks divide evenly
        model = build_causal_lm(build, vocab_size=41, eos_token_id=1, pad_token_id=0)
        expected = {key: value.clone() for key, value in model.state_dict().items()}
        empty = parallel.without_weights(model)
        parallel.shard(model, mesh, vocabulary=name == "experts")
        peak = 0
        weights = parallel.stream(model)
        if ranks.is_main:
            setup: Any = SimpleNamespace(model=model, tokenizer=letters(41), run_dir=folder / name)
            store = WeightStore(VLLM(url="http://127.0.0.1:1", weights="directory"), setup, torch.float32)
            pushed = store.write(with_head(model, weights), "v0")
            found = {key: value for file in pushed.glob("*.safetensors") for key, value in load_file(file).items()}
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items())
            assert len(list(pushed.glob("*.safetensors"))) >= 2 + 2
            store.close()
        for _ in weights:
            pass
        # the one that is handed on, and the next
        assert 1 <= peak <= 2, (name, peak)
        saved = parallel.snapshot(model, group)
        with torch.no_grad():
            for value in model.parameters():
                parallel.local(value).fill_(torch.nan)
        if ranks.is_main:
            save_hf(empty, letters(41), folder / f"{name} saved", weights=saved)
            read = AutoModelForCausalLM.from_pretrained(folder / f"{name} saved").state_dict()
            assert read.keys() == expected.keys()
            assert all(torch.equal(read[key], value) for key, value in expected.items())
            assert len(list((folder / f"{name} saved").glob("model-*-of-*.safetensors"))) >= 2 + 2
        assert not list(saved), "other ranks have sent their parts, and get nothing"
    ranks.close()


def test_weights_leave_shards_one_after_the_other(tmp_path: Path) -> None:
    run_ranks(stream_from_shards, tmp_path, folder=tmp_path / "logs")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"student": {"dtype": "bfloat16"}}, "shards are the master weights"),
        ({"parallel": {"shard": 0}}, "parallel"),
        ({"parallel": {"shard": 2, "context_parallel_size": 2}}, "each sequence is read whole by one process"),
        ({"parallel": {"shard": 2, "expert_parallel_size": 2}}, "experts are divided over processes by parallel.shard"),
        ({"parallel": {"shard": 1, "param_dtype": "bfloat16"}}, "set shard to 2 or more"),
        (
            {"parallel": {"shard": 2, "teachers": True}, "async": {}, "rollout": {"type": "hf", "copy": True}},
            "async has",
        ),
        ({"parallel": {"shard": 2, "vocabulary": True}, "student": {"lora": {}}}, "output layer that is trained"),
        ({"student": {"lora": {}}, "rollout": {"type": "vllm", "url": "http://127.0.0.1:9"}}, "cannot be merged"),
    ],
)
def test_what_does_not_work_in_shards_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        config.parse(Recipe, tiny_recipe(tmp_path, **{"parallel": {"shard": 2}} | changes))


def test_the_number_of_processes_is_that_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="2 x 3, but the run has 1 process"):
        train(tmp_path, parallel={"shard": 2, "replicate": 3})


def test_a_checkpoint_in_16_bits_needs_float32_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its float32 copies would never get a gradient."""
    changes = distillation(tmp_path, student={"dtype": "auto"}, parallel={"shard": 2})
    half = AutoModelForCausalLM.from_pretrained(changes["student"]["model"]).half()
    half.save_pretrained(changes["student"]["model"])
    monkeypatch.setattr(Parallel, "check", lambda self, world: None)
    with pytest.raises(RecipeError, match="is in 16 bits, and shards are the master weights"):
        train(tmp_path, **changes)


def train_command(folder: Path) -> None:
    from tests.processes import command_line

    command_line("train", folder / "recipe.yaml", "--no-doctor")


def test_a_killed_rank_ends_the_others_with_one_sentence(tmp_path: Path) -> None:
    changes = {"train": {"steps": 100_000, "save_every": 1}, "parallel": {"shard": 2}}
    write_recipe(tmp_path, **distillation(tmp_path, **changes))
    found = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    ranks = [
        Process(train_command, tmp_path, log=tmp_path / f"{n}.log", RANK=str(n), LOCAL_RANK=str(n), **found)
        for n in (0, 1)
    ]
    try:
        until = time.monotonic() + 200
        while not (tmp_path / "run" / "checkpoints" / "step_000001").is_dir():
            assert time.monotonic() < until, ranks[0].output
            assert ranks[0].poll() is None, ranks[0].output
            time.sleep(0.1)
        ranks[1].send_signal(signal.SIGKILL)
        assert ranks[0].wait(60) == 1
    finally:
        for rank in ranks:
            rank.kill()
    said = [line for line in ranks[0].output.splitlines() if line.startswith("error:")]
    assert len(said) == 1
    assert "rank 0 has lost another of the 2 processes" in said[0]
    assert "--resume" in said[0]
    assert "Traceback" not in ranks[0].output
