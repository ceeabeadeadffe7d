"""What is checked before a run: every check can fail, none changes the run, and a healthy one passes all."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine_stub import EngineStub
from tests.leaks import nothing_left
from tests.runs import (
    BUILD,
    SHORT,
    assert_same_run,
    distillation,
    grade_by_length,
    judge_by_length,
    save_tiny_model,
    tiny_recipe,
    train,
)
from understudy import config, run
from understudy.cli import commands
from understudy.engines import HFEngine
from understudy.engines.vllm.engine import VLLMEngine
from understudy.errors import EngineError, RecipeError
from understudy.models import build_causal_lm, load_causal_lm, load_tokenizer, save_hf
from understudy.recipe import Recipe, doctor
from understudy.recipe.checks import Check, Files, Finding, Parts, check, of_stage, probes, room
from understudy.recipe.checks.parts import within
from understudy.tasks import Arithmetic, build_tokenizer
from understudy.teachers import LocalTeacher
from understudy.teachers.judges.verbal import VerbalTeacher
from understudy.trainer.console import Console
from understudy.types import Sample, Scores

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
CPU = torch.device("cpu")


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return config.parse(Recipe, tiny_recipe(folder, **changes))


@contextmanager
def built(files: Files) -> Iterator[Parts]:
    with commands.loaded(files, QUIET) as parts:
        yield parts


def examined(recipe: Recipe) -> dict[str, Finding]:
    """By name."""
    return {item.name: item for item in doctor.examine(recipe, built)}


def ask(name: str, parts: Any, stage: str = "loaded") -> Finding:
    """The one finding of one check."""
    (found,) = next(check for check in of_stage(stage) if check.name == name)(parts)  # type: ignore[arg-type]
    return found


def levels(found: dict[str, Finding]) -> dict[str, str]:
    return {name: item.level for name, item in found.items() if item.level != "ok"}


@contextmanager
def parts_of(recipe: Recipe) -> Iterator[Parts]:
    with built(Files(recipe)) as parts:
        yield parts


def test_a_healthy_distillation_passes_every_check(tmp_path: Path) -> None:
    found = examined(recipe_of(tmp_path, **distillation(tmp_path)))
    assert levels(found) == {}
    assert list(found) == [
        "task",
        "student: section",
        "teacher: section",
        "machine",
        "tokenizer",
        "prompts",
        "disk",
        "memory",
        "vocabulary",
        "end of a response",
        "temperature",
        "lengths",
        "rehearsal",
        "teacher's scores",
        "log-probabilities",
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"method": {"type": "opd"}, "sampling": {"temperature": 0.7, "max_new_tokens": 24}},
        {"method": {"type": "kdrl"}, "train": {"samples_per_prompt": 2, "minibatches": 2}},
        {"method": {"type": "phases", "parts": [{"type": "gkd", "until": 0.5}, {"type": "topk", "k": 3}]}},
        {"responses": {"type": "teacher"}, "method": {"type": "tropd"}},
        {"train": {"compute_dtype": "bfloat16"}},
    ],
    ids=["gkd", "opd at 0.7", "kdrl", "phases", "tropd", "bfloat16"],
)
def test_no_method_of_a_healthy_run_has_an_error(
    tmp_path: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Arithmetic, "grade", grade_by_length)
    found = examined(recipe_of(tmp_path, **distillation(tmp_path, **changes)))
    assert not doctor.errors_of(found.values()), levels(found)
    assert "rehearsal" in found
    assert not (tmp_path / "run").exists()


def test_sampling_without_a_cache_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise TypeError("no such cache")

    assert "sampling" not in examined(recipe_of(tmp_path, **distillation(tmp_path)))
    monkeypatch.setattr("understudy.engines.hf.kv_cache.new_cache", refuse)
    found = examined(recipe_of(tmp_path, **distillation(tmp_path)))["sampling"]
    assert found.level == "warning"
    assert "without a cache, because it does not run with a cache of the common kind (TypeError)" in found.found


def test_what_does_not_apply_does_not_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imitation = examined(recipe_of(tmp_path))
    assert levels(imitation) == {}
    assert not {"temperature", "teacher's scores", "log-probabilities"} & imitation.keys()
    monkeypatch.setattr(Arithmetic, "grade", grade_by_length)
    alone = examined(recipe_of(tmp_path, method={"type": "grpo"}, train={"samples_per_prompt": 4}))
    assert levels(alone) == {}
    assert "mean reward" in alone["rehearsal"].found
    assert "engine and trainer" in alone["log-probabilities"].found
    assert "of a teacher that is" not in alone["log-probabilities"].found


def test_a_judge_is_asked_for_the_rehearsed_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def judge(self: object, samples: Sequence[Sample], **options: Any) -> Any:
        asked.append(len(samples))
        return judge_by_length(self, samples)

    monkeypatch.setattr(VerbalTeacher, "judge", judge)
    model = save_tiny_model(tmp_path / "judge", seed=5)
    method = {"type": "ovd", "on_reject": "drop"}
    found = examined(
        recipe_of(tmp_path, teacher=SHORT | {"model": model}, method=method, train={"samples_per_prompt": 2})
    )
    assert asked == [4]
    assert not doctor.errors_of(found.values())


def hashed(model: torch.nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


@pytest.mark.parametrize("method", ["gkd", "grpo", "sft", "tropd"])
def test_nothing_is_changed(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, gradients, modes, generators, optimizer, progress and files are as before."""
    monkeypatch.setattr(Arithmetic, "grade", grade_by_length)
    changes = distillation(tmp_path, method={"type": method})
    changes |= {"teacher": None} if method in ("grpo", "sft") else {}
    changes |= {"train": {"samples_per_prompt": 2}}
    changes |= {"responses": {"type": "teacher", "cache": str(tmp_path / "cache")}} if method == "tropd" else {}
    with parts_of(recipe_of(tmp_path, **changes)) as parts:
        trainer, model = parts.trainer, parts.loaded.model
        next(module for module in model.modules() if not list(module.children())).eval()
        before = hashed(model), [module.training for module in model.modules()], torch.get_rng_state()
        progress = trainer.progress
        files = sorted(tmp_path.rglob("*"))
        found = doctor.examine_parts(parts)
        assert "rehearsal" in {item.name for item in found}
        assert not doctor.errors_of(found)
        after = hashed(model), [module.training for module in model.modules()], torch.get_rng_state()
        assert all(torch.equal(one, other) for one, other in zip(before[0], after[0], strict=True))
        assert before[1] == after[1]
        assert torch.equal(before[2], after[2])
        assert all(value.grad is None for value in model.parameters())
        assert trainer.progress is progress
        assert trainer.optimizer.state() == {}
        assert sorted(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("method", ["gkd", "opd", "tropd", "sft"])
def test_a_run_after_it_is_the_same_to_the_last_bit(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = distillation(tmp_path, method={"type": method}, train={"steps": 3, "samples_per_prompt": 2})
    changes |= {"teacher": None} if method == "sft" else {}
    changes |= {"responses": {"type": "teacher"}} if method == "tropd" else {}
    plain = train(tmp_path / "plain", **changes)
    build = run.assemble
    seen: list[Finding] = []

    def looked_at(*args: Any) -> Parts:
        made = build(*args)
        seen.extend(doctor.examine_parts(made))
        return made

    monkeypatch.setattr(run, "assemble", looked_at)
    assert_same_run(plain, train(tmp_path / "looked at", **changes))
    assert "rehearsal" in {item.name for item in seen}
    assert not doctor.errors_of(seen)


class Noise:
    """`LocalTeacher.score` and a change of every log-probability, larger with each call."""

    def __init__(self, size: float) -> None:
        self.size, self.calls, self.plain = size, 0, LocalTeacher.score

    def __call__(self, teacher: LocalTeacher, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Scores]:
        scores = self.plain(teacher, samples, *args, **options)
        if teacher.name == "the student":
            return scores
        self.calls += 1
        return [replace(one, logprob=one.logprob - self.size * self.calls) for one in scores if one.logprob is not None]


@pytest.mark.parametrize(("size", "level"), [(0.0, None), (0.003, "warning"), (0.5, "error")])
def test_a_teacher_that_does_not_repeat_itself_is_found(
    tmp_path: Path, size: float, level: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = Noise(size)
    monkeypatch.setattr(LocalTeacher, "score", lambda *args, **options: noise(*args, **options))
    found = examined(recipe_of(tmp_path, **distillation(tmp_path, method={"type": "opd"})))
    assert levels(found) == ({} if level is None else {"teacher's scores": level})


def test_a_teacher_that_depends_on_its_neighbours_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same batch again gives the same, another order does not."""
    plain = LocalTeacher.score

    def score(self: LocalTeacher, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Scores]:
        scores = plain(self, samples, *args, **options)
        shift = 0.0 if self.name == "the student" else 0.01 * samples[0].num_response_tokens + 0.1 * len(samples)
        return [replace(one, logprob=one.logprob - shift) for one in scores if one.logprob is not None]

    monkeypatch.setattr(LocalTeacher, "score", score)
    found = examined(recipe_of(tmp_path, **distillation(tmp_path, method={"type": "opd"})))
    assert levels(found) == {"teacher's scores": "error"}
    assert "again 0.0e+00 nats" in found["teacher's scores"].found


def test_a_teacher_without_numbers_is_found_and_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = LocalTeacher.score

    def score(self: LocalTeacher, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Scores]:
        scores = plain(self, samples, *args, **options)
        return [replace(one, logprob=one.logprob * torch.nan) for one in scores if one.logprob is not None]

    monkeypatch.setattr(LocalTeacher, "score", score)
    found = examined(recipe_of(tmp_path, **distillation(tmp_path, method={"type": "opd"})))
    assert found["rehearsal"].level == "error"
    assert "logprob is missing" in found["rehearsal"].found


def test_an_engine_at_another_temperature_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = HFEngine.generate

    def generate(self: HFEngine, requests: Any, sampling: Any, **options: Any) -> list[Sample]:
        return plain(self, requests, replace(sampling, temperature=0.25), **options)

    changes = distillation(tmp_path)
    sharpen(tmp_path / "student")
    assert levels(examined(recipe_of(tmp_path, **changes))) == {}
    monkeypatch.setattr(HFEngine, "generate", generate)
    found = examined(recipe_of(tmp_path, **changes))
    assert levels(found) == {"log-probabilities": "error"}
    assert "temperature" in found["log-probabilities"].advice


def sharpen(path: Path) -> None:
    """A random model's rows are nearly uniform, where a temperature says little."""
    model, tokenizer = load_causal_lm(str(path)), load_tokenizer(str(path))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    save_hf(model, tokenizer, path)


def test_what_mixed_precision_moves_is_no_disagreement(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 moves this student by more than its limit; the teacher is compared without it, the engine beside it."""
    changes = distillation(tmp_path, train={"compute_dtype": "bfloat16"})
    sharpen(tmp_path / "student")
    monkeypatch.setitem(probes.LIMITS, "torch.bfloat16", 1e-4)
    found = examined(recipe_of(tmp_path, **changes))["log-probabilities"]
    moved = re.search(r"bfloat16 moves log S by (\S+) nats", found.found)
    assert moved is not None
    assert float(moved[1]) > probes.LIMITS["torch.bfloat16"]
    own = re.search(r"a teacher that is the student, which should be 0: (\S+) nats", found.found)
    assert own is not None
    assert float(own[1]) < probes.LIMITS["torch.float32"]
    assert found.level == "ok", found


@pytest.mark.parametrize(("times", "level"), [([0, 3, 3, 4], "warning"), ([0, 1, 1, 4], "ok")])
def test_mixed_precision_is_measured_on_a_cpu(
    tmp_path: Path, times: list[int], level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(times)
    monkeypatch.setattr(probes, "time", SimpleNamespace(process_time=lambda: next(clock)))
    changes = distillation(tmp_path, train={"compute_dtype": "bfloat16"})
    found = examined(recipe_of(tmp_path, **changes))["precision"]
    assert found.level == level
    assert f"{times[1]} s of processor time in bfloat16, {times[3] - times[2]} s without" in found.found


@pytest.mark.parametrize(("factor", "level"), [(1.0, "ok"), (2.0, "error")])
def test_kernels_are_compared_with_torch_where_they_run(
    tmp_path: Path, factor: float, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = probes.accumulate_gradients

    def accumulate(student: Any, *args: Any, **options: Any) -> Any:
        loss, metrics = plain(student, *args, **options)
        return loss * (factor if student.fused_kernels else 1.0), metrics

    monkeypatch.setattr(probes, "accumulate_gradients", accumulate)
    recipe = recipe_of(tmp_path, **distillation(tmp_path))
    assert "kernels" not in examined(recipe)
    monkeypatch.setattr(probes, "has_kernels", lambda device: True)
    assert examined(recipe)["kernels"].level == level


def test_bfloat16_is_used_where_the_device_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = distillation(tmp_path, train={"compute_dtype": "auto"})
    save_hf(
        load_causal_lm(changes["teacher"]["model"]).bfloat16(),
        load_tokenizer(changes["teacher"]["model"]),
        tmp_path / "teacher",
    )
    recipe = recipe_of(tmp_path, **changes)
    dtypes = {}
    for has in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: {"avx512_bf16": has})
        with parts_of(recipe) as parts:
            teacher = parts.models["teacher"]
            dtypes[has] = parts.loaded.compute_dtype, next(teacher.parameters()).dtype
    assert dtypes == {True: (torch.bfloat16, torch.bfloat16), False: (None, torch.float32)}
    assert "precision" not in examined(recipe)
    named = {"teacher": changes["teacher"] | {"dtype": "bfloat16"}}
    found = examined(recipe_of(tmp_path, **changes | named))
    assert levels(found) == {"precision": "warning"}
    assert "the teacher's weights are bfloat16, which cpu has no instructions for" in found["precision"].found


def test_precision_that_needs_no_autocast_uses_none(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """torch warns of an autocast to float32 on a CPU, and ignores it."""
    changes = distillation(tmp_path, train={"compute_dtype": "float32"})
    assert levels(examined(recipe_of(tmp_path, **changes))) == {}
    assert not [item for item in recwarn if "autocast" in str(item.message)]
    changes["student"] |= {"dtype": "bfloat16"}
    assert "set student.dtype: float32" in examined(recipe_of(tmp_path, **changes))["loading"].found


def test_a_scorer_that_disagrees_with_the_trainer_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Teacher = student: its log-ratio is 0."""
    plain = LocalTeacher.score

    def score(self: LocalTeacher, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Scores]:
        scores = plain(self, samples, *args, **options)
        return [replace(one, logprob=None if one.logprob is None else one.logprob - 0.1) for one in scores]

    monkeypatch.setattr(LocalTeacher, "score", score)
    found = examined(recipe_of(tmp_path, **distillation(tmp_path)))
    assert levels(found) == {"log-probabilities": "error"}
    assert "should be 0: 1.0e-01 nats" in found["log-probabilities"].found


def test_gaps_are_judged_by_precision() -> None:
    """gap = mean |difference|; a number that is missing is never a small difference."""
    base = torch.zeros(4)
    gap = probes.Gap.of(base, torch.tensor([0.0, 0.02, -0.02, 0.0]))
    assert (gap.mean, gap.largest) == pytest.approx((0.01, 0.02))
    by_precision = {name: gap.level(getattr(torch, name.removeprefix("torch."))) for name in probes.LIMITS}
    assert by_precision == {
        "torch.float64": "error",
        "torch.float32": "warning",
        "torch.float16": "ok",
        "torch.bfloat16": "ok",
    }
    assert probes.Gap.of(base, torch.tensor([0.0, torch.nan, 0.0, 0.0])).level(torch.bfloat16) == "error"
    assert probes.Gap.of(base, base * torch.nan).level(torch.bfloat16) == "error"
    excluded = torch.tensor([0.0, -torch.inf, 0.0, 0.0])
    assert probes.Gap.of(excluded, excluded) == probes.Gap(0.0, 0.0, 0)
    assert probes.Gap.of(base, excluded).level(torch.bfloat16) == "error"
    lacking = probes.Gap.of(base, torch.tensor([0.0, torch.nan, 0.0, 0.0]))
    assert (lacking.mean, lacking.level(torch.float32, may_lack=True)) == (0.0, "warning")
    assert probes.Gap.of(base, base + 1.0).level(torch.float32, may_lack=True) == "error"


def save_padded(path: Path, extra: int, weight: float) -> str:
    """A tiny model with `extra` rows past its tokens, whose head is `weight` times a random one there."""
    tokenizer = build_tokenizer("addition")
    size = len(tokenizer)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_causal_lm(BUILD, vocab_size=size + extra, seed=3, **ends)
    with torch.no_grad():
        model.get_output_embeddings().weight[size:] *= weight
    save_hf(model, tokenizer, path)
    return str(path)


def test_padding_is_counted_and_weighed(tmp_path: Path) -> None:
    changes = distillation(tmp_path)
    padded = save_padded(tmp_path / "padded", 7, 1.0)
    found = examined(recipe_of(tmp_path, **changes | {"student": {"model": padded, "build": None}}))
    size = len(build_tokenizer("addition"))
    assert levels(found) == {"vocabulary": "warning"}
    assert f"the student has {size + 7} rows, 7 past the {size} tokens" in found["vocabulary"].found
    assert f"the teacher has a row for each of {size} tokens" in found["vocabulary"].found


@pytest.mark.parametrize(
    ("others", "keeps_eos", "chosen", "level"),
    [([], True, True, None), ([5], True, True, "warning"), ([5], False, True, "error"), ([5], False, False, "warning")],
)
def test_an_end_that_the_student_never_writes_is_found(
    tmp_path: Path, others: list[int], keeps_eos: bool, chosen: bool, level: str | None
) -> None:
    """`chosen`: there are generation settings; a configuration alone may hold what its architecture has by default."""
    changes = distillation(tmp_path)
    folder = tmp_path / "teacher"
    ends = others + [load_tokenizer(str(folder)).eos_token_id] * keeps_eos
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text()) | {"eos_token_id": ends, "_from_model_config": not chosen}
        (folder / name).write_text(json.dumps(values))
    found = examined(recipe_of(tmp_path, **changes))
    assert levels(found) == ({} if level is None else {"end of a response": level})
    assert ("(5)" in found["end of a response"].found) == bool(others)


@pytest.mark.parametrize(
    ("settings", "evaluation", "level", "says"),
    [
        ({"top_k": 3, "repetition_penalty": 1.3}, {}, "warning", "top_k: 3}; repetition_penalty can only"),
        ({"do_sample": True, "temperature": 0.5, "top_p": 0.8}, {}, "warning", "{temperature: 0.5, top_p: 0.8}"),
        ({"top_k": 3, "top_p": 0.8}, {"sampling": {"top_k": 3, "top_p": 0.8, "max_new_tokens": 24}}, "ok", ""),
        ({"suppress_tokens": [4, 5]}, {}, "warning", "suppress_tokens can only"),
        ({"no_repeat_ngram_size": 2, "forced_eos_token_id": 1}, {}, "warning", "no_repeat_ngram_size can only"),
        ({"top_k": 3}, None, "ok", ""),
        ({"do_sample": False, "temperature": 1.0, "repetition_penalty": 1.0, "max_new_tokens": 5}, {}, None, ""),
    ],
    ids=str,
)
def test_generation_settings_of_the_student(
    tmp_path: Path, settings: dict[str, Any], evaluation: dict[str, Any] | None, level: str | None, says: str
) -> None:
    """Training and evaluation do not follow them, which the doctor says."""
    changes = distillation(tmp_path, eval=None if evaluation is None else {"problems": 4} | evaluation)
    path = tmp_path / "student" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with parts_of(recipe_of(tmp_path, **changes)) as parts:
        found = [item for check in of_stage("advice") if check.name == "generation settings" for item in check(parts)]
    assert [item.level for item in found] == ([] if level is None else [level])
    for item in found:
        assert all(name in item.found for name in settings if name != "do_sample")
        assert says in item.advice


def test_the_saved_student_keeps_its_generation_settings(tmp_path: Path) -> None:
    """They change no sample, and the tokens at which the run's responses end stand in them."""
    changes = distillation(tmp_path, eval={"problems": 4})
    plain = train(tmp_path / "plain", **changes)
    path = tmp_path / "student" / "generation_config.json"
    # without do_sample, as many models have them
    settings = {"top_k": 3, "temperature": 0.6, "repetition_penalty": 1.3, "suppress_tokens": [4]}
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | settings))
    asked = train(tmp_path / "asked", **changes)
    assert_same_run(plain, asked)
    path.write_text(json.dumps(values | settings | {"eos_token_id": 5}))
    ended = train(tmp_path / "ended", **changes)
    for run_dir, ends in ((asked, {values["eos_token_id"]}), (ended, {values["eos_token_id"], 5})):
        kept = json.loads((run_dir / "student" / "generation_config.json").read_text())
        assert settings.items() <= kept.items()
        assert set(kept["eos_token_id"]) == ends
        assert load_causal_lm(str(run_dir / "student")).generation_config.top_k == 3


@pytest.mark.parametrize(
    "name", ["v_head.summary.weight", "vision_tower.patches.weight", "model.layers.0.attn.masked_bias"]
)
def test_weights_that_loading_leaves_out_are_named(tmp_path: Path, name: str) -> None:
    changes = distillation(tmp_path)
    for side in ("student", "teacher"):
        path = tmp_path / side / "model.safetensors"
        save_file(load_file(path) | {name: torch.zeros(1, 3)}, path, metadata={"format": "pt"})
    with parts_of(recipe_of(tmp_path, **changes)) as parts:
        found = ask("weights", parts, "advice")
    assert found.level == "warning"
    assert found.found.count(f"1 tensor that LlamaForCausalLM has no part for, first '{name}'") == 2
    assert found.advice.startswith("the saved student lacks them")


CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def test_the_first_difference_of_the_templates_is_shown(tmp_path: Path) -> None:
    changes = distillation(tmp_path)
    rows = [{"prompt": f"{n}+1:", "answer": str(n + 1)} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"type": "jsonl", "path": str(tmp_path / "rows.jsonl"), "prompt_field": "prompt", "chat": True}
    for name, template in (("student", CHAT), ("teacher", CHAT + "=")):
        tokenizer = load_tokenizer(str(tmp_path / name))
        tokenizer.chat_template = template
        tokenizer.save_pretrained(tmp_path / name)
    recipe = recipe_of(tmp_path, **changes, task=task)
    found = examined(recipe)
    assert levels(found) == {"chat template": "warning"}
    text = found["chat template"].found
    assert "has 4 tokens for the student and 5 for the teacher; the first that differs is token 4" in text
    assert "the end for the student" in text
    shutil.copytree(tmp_path / "student", tmp_path / "like", dirs_exist_ok=True)
    same = recipe_of(tmp_path, **changes | {"teacher": {"type": "local", "model": str(tmp_path / "like")}}, task=task)
    assert examined(same)["chat template"].level == "ok"


def test_scores_at_another_temperature_are_found(tmp_path: Path) -> None:
    with parts_of(recipe_of(tmp_path, **distillation(tmp_path))) as parts:
        teacher: Any = parts.teachers.teacher
        teacher.temperature = 2.0
        found = ask("temperature", parts)
    assert found.level == "error"
    assert "the student samples at 1; the teacher scores at 2" in found.found


def test_prompts_and_responses_have_to_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = distillation(tmp_path)
    recipe = recipe_of(tmp_path, **changes)
    with parts_of(recipe) as parts:
        longest = max(len(ids) for _, ids in parts.prompts)
        shortest = min(len(ids) for _, ids in parts.prompts)
        fits = ask("lengths", parts)
        assert fits.level == "ok"
        assert f"{longest} prompt tokens and 24 new ones make {longest + 24}" in fits.found
        engine: Any = type(parts.rollouts.collector.engine)
        room = longest + 23
        monkeypatch.setattr(engine, "num_positions", property(lambda _: room))
        short = ask("lengths", parts)
        assert short.level == "error"
        assert "rollout engine" in short.advice
        room = longest + 24
        assert ask("lengths", parts).level == "ok"
        parts.recipe = replace(recipe, train=replace(recipe.train, max_prompt_tokens=shortest - 1))
        assert ask("lengths", parts).level == "error"
    # no prompt fits beside so many new tokens
    long = examined(recipe_of(tmp_path, **changes, sampling={"max_new_tokens": 64}))
    assert long["prompts"].level == "error"
    assert "positions" in long["prompts"].found


@pytest.mark.parametrize(("share", "level"), [(0.5, "error"), (100.0, "ok")])
def test_checkpoints_have_to_fit_on_the_disk(
    tmp_path: Path, share: float, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """(keep_last + 1) * (weights + two moments) + the student."""
    recipe = recipe_of(tmp_path, **distillation(tmp_path), train={"keep_last": 3})
    size = room.size_on_disk(recipe.student.model, "float32", CPU)
    assert size is not None
    need = 4 * 3 * size.weights + size.weights
    usage = SimpleNamespace(free=int(share * need))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    found = ask("disk", Files(recipe), "room")
    assert found.level == level
    assert "4 checkpoints" in found.found
    assert ("run_dir" in found.advice) == (level == "error")


def test_weights_gradients_and_optimizer_have_to_fit_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = distillation(tmp_path)
    recipe = recipe_of(tmp_path, **changes)
    student, teacher = (room.size_on_disk(str(tmp_path / name), "float32", CPU) for name in ("student", "teacher"))
    assert student is not None
    assert teacher is not None
    certain = 4 * student.weights + teacher.weights
    for free, level in ((certain - 1, "error"), (certain, "warning"), (2**40, "ok")):
        monkeypatch.setattr(room, "free_memory", lambda device, free=free: free)
        found = ask("memory", Files(recipe), "room")
        assert found.level == level
        for part in ("student", "teacher", "gradients", "optimizer", "activations", "generation cache"):
            assert part in found.found
    monkeypatch.setattr(room, "free_memory", lambda device: 1)
    # nothing is loaded where it cannot fit
    assert list(examined(recipe))[-2:] == ["disk", "memory"]


def test_every_reference_has_to_fit_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the student's start, which is loaded beside the student."""
    changes = distillation(tmp_path, method={"type": "gopd"})
    section = changes.pop("teacher")
    names = ("maths", "code", "law")
    start, other = {"type": "start"}, {"type": "local", "model": save_tiny_model(tmp_path / "other", seed=5)}
    student, teacher, base = (
        room.size_on_disk(str(tmp_path / name), "float32", CPU) for name in ("student", "teacher", "other")
    )
    assert student is not None
    assert teacher is not None
    assert base is not None
    certain = 4 * student.weights + 3 * teacher.weights
    for references, held in (
        ({"references": dict(zip(names, (other, start, other), strict=True))}, base.weights + student.weights),
        ({"references": dict.fromkeys(names, other)}, base.weights),
        ({"reference": other}, base.weights),
        ({}, student.weights),
    ):
        recipe = recipe_of(tmp_path, **changes, teachers=dict.fromkeys(names, section), **references)
        for free, level in ((certain + held - 1, "error"), (certain + held, "warning")):
            monkeypatch.setattr(room, "free_memory", lambda device, free=free: free)
            assert ask("memory", Files(recipe), "room").level == level


@pytest.mark.parametrize(("masters", "bytes_a_weight"), [(True, 18), (False, 8)])
def test_a_16_bit_student_needs_what_the_dry_run_says(
    tmp_path: Path, masters: bool, bytes_a_weight: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = distillation(tmp_path, train={"master_weights": masters})
    changes["student"] |= {"dtype": "bfloat16"}
    recipe = recipe_of(tmp_path, **changes)
    student, teacher = (room.size_on_disk(str(tmp_path / name), "float32", CPU) for name in ("student", "teacher"))
    assert student is not None
    assert teacher is not None
    certain = bytes_a_weight * student.weights // 4 + teacher.weights
    for free, level in ((certain - 1, "error"), (certain, "warning")):
        monkeypatch.setattr(room, "free_memory", lambda device, free=free: free)
        found = ask("memory", Files(recipe), "room")
        assert found.level == level
        assert ("master weights" in found.found) == masters
    assert f"bfloat16 takes {bytes_a_weight} bytes a weight in training" in " ".join(check(recipe))
    monkeypatch.undo()
    with parts_of(recipe) as parts:
        assert room.size_of(parts.loaded.model) == room.size_on_disk(str(tmp_path / "student"), "bfloat16", CPU)
        model = sum(value.numel() for value in parts.loaded.model.parameters())
        # what is still to come: gradients and moments
        assert (
            room.amount((bytes_a_weight - (2 + 2 if not masters else 2 + 4 + 4)) * model) in ask("memory", parts).found
        )


def test_sizes_on_disk_are_those_loaded(tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path / "model", seed=1)
    model = load_causal_lm(path)
    assert room.size_on_disk(path, "auto", CPU) == room.size_of(model)
    half = room.size_on_disk(path, "bfloat16", CPU)
    assert half is not None
    assert half.weights * 2 == room.size_of(model).weights
    assert room.size_on_disk("org/name", "auto", CPU) is None


def test_a_server_is_asked_how_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"health": lambda self: "ready, version 0.32"}
    monkeypatch.setattr(HFEngine, "health", said["health"], raising=False)
    recipe = recipe_of(tmp_path, **distillation(tmp_path))
    found = examined(recipe)
    assert found["rollout engine: health"] == Finding(
        "ready, version 0.32", name="rollout engine: health", checked="whether its server answers"
    )

    def gone(self: object) -> str:
        raise EngineError("http://host:1 does not answer: start it")

    monkeypatch.setattr(HFEngine, "health", gone, raising=False)
    assert examined(recipe)["rollout engine: health"].found == "http://host:1 does not answer: start it"


@contextmanager
def served(folder: Path, **changes: Any) -> Iterator[tuple[EngineStub, EngineStub, Recipe]]:
    """An engine that writes, and one that scores."""
    models = distillation(folder, method={"type": "opd"})
    student, teacher = models["student"]["model"], models["teacher"]["model"]
    patient = {"timeout_s": 10.0, "deadline_s": 20.0, "max_retries": 0}
    with nothing_left(), EngineStub(student) as engine, EngineStub(teacher) as scorer:
        asked = {"type": "http", "api": "vllm", "url": scorer.url, "model": teacher, "tokenizer": teacher}
        rollout = {"type": "vllm", "url": engine.url, "weights": "directory", "dtype": "float32"}
        changed = models | {"teacher": asked | patient, "rollout": rollout | patient} | changes
        yield engine, scorer, recipe_of(folder, **changed)


def test_engines_and_served_teachers_are_examined(tmp_path: Path) -> None:
    with served(tmp_path) as (engine, scorer, recipe):
        found = examined(recipe)
        assert levels(found) == {}
        assert "rollout engine: health" in found
        assert "version" in found["teacher: health"].found
        assert "the teacher has 64 positions; the rollout engine has 64 positions" in found["lengths"].found
        assert "engine and trainer" in found["log-probabilities"].found
        assert "rehearsal" in found
        # what was written for it is gone
        assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]
        assert engine.asked("/v1/completions")
        assert scorer.asked("/v1/completions")


def test_an_engine_with_other_log_probabilities_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = VLLMEngine.generate

    def generate(self: VLLMEngine, *args: Any, **options: Any) -> list[Sample]:
        samples = plain(self, *args, **options)
        return [
            replace(one, rollout_logprob=one.rollout_logprob / 0.7)
            for one in samples
            if one.rollout_logprob is not None
        ]

    monkeypatch.setattr(VLLMEngine, "generate", generate)
    with served(tmp_path) as (_, _, recipe):
        assert levels(examined(recipe)) == {"log-probabilities": "error"}


def test_an_engine_that_is_gone_is_one_clear_error(tmp_path: Path) -> None:
    with served(tmp_path) as (_, _, recipe):
        with EngineStub(str(tmp_path / "student")) as other:
            gone = other.url
        found = examined(replace(recipe, rollout=replace(recipe.rollout, url=gone)))  # type: ignore[type-var]
    (error,) = doctor.errors_of(found.values())
    assert gone in error.found


def test_a_server_that_hangs_is_given_up() -> None:
    released = threading.Event()
    with pytest.raises(EngineError, match=r"the engine has not answered in 0\.05 s"):
        within(0.05, "the engine", lambda: released.wait(20.0))
    released.set()
    for thread in threading.enumerate():
        if thread.name == "doctor: the engine":
            thread.join(20.0)
            assert not thread.is_alive()
    assert within(20.0, "the engine", lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(20.0, "the engine", lambda: 1 // 0)


def test_one_check_that_raises_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Check, parts: Parts) -> Any:
        if self.name in ("end of a response", "rehearsal"):
            raise KeyError("surprise")
        return plain(self, parts)

    plain = Check.__call__
    monkeypatch.setattr(Check, "__call__", broken)
    found = examined(recipe_of(tmp_path, **distillation(tmp_path)))
    assert levels(found) == {"end of a response": "error", "rehearsal": "error"}
    assert found["end of a response"].found == "KeyError: 'surprise'"
    assert found["lengths"].level == "ok"


def test_refusal_lists_errors_and_nothing_else() -> None:
    lines = [
        Finding("nothing is free", "error", "free some", name="disk"),
        Finding("tight", "warning", name="memory"),
        Finding("too long", "error", name="lengths"),
    ]
    doctor.refuse(lines[1:2])
    with pytest.raises(RecipeError) as raised:
        doctor.refuse(lines)
    text = str(raised.value)
    assert text.startswith("2 errors: the run would")
    assert "disk: nothing is free; free some" in text
    assert "lengths: too long" in text
    assert "tight" not in text
    assert "--no-doctor" in text


def test_findings_are_written_as_json(tmp_path: Path) -> None:
    doctor.write_findings(tmp_path / "doctor.json", [Finding("enough", name="disk", checked="space")])
    values = json.loads((tmp_path / "doctor.json").read_text())
    expected = {"name": "disk", "level": "ok", "checked": "space", "found": "enough", "advice": ""}
    assert values == {"findings": [expected]}


def test_the_command_prints_every_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import yaml

    changes = distillation(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path, **changes)))
    assert commands.doctor(path, ["train.steps=3"]) == 0
    told = capsys.readouterr().out
    for name in (
        "machine",
        "task",
        "disk",
        "memory",
        "tokenizer",
        "vocabulary",
        "lengths",
        "rehearsal",
        "log-probabilities",
    ):
        assert name in told
    assert "nothing is wrong" in told
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    assert commands.doctor(path, []) == 1
    told = capsys.readouterr().out
    assert told.rstrip().endswith("1 error: the run would stop, or learn something else than the recipe says")
    assert "choose another run_dir" in " ".join(told.split())
    assert not (tmp_path / "run").exists()


def test_other_ranks_get_what_the_first_found(tmp_path: Path) -> None:
    with parts_of(recipe_of(tmp_path, **distillation(tmp_path))) as parts:
        told: list[object] = []

        class Second:
            rank, world, is_main = 1, 2, False

            def gather(self, value: object) -> list[object]:
                told.append(value)
                return [["from the first"], value]

        parts.trainer.ranks = Second()  # type: ignore[assignment]
        found: Any = doctor.examine_parts(parts)
    assert told == [[]]
    assert found == ["from the first"]


def test_a_recipe_that_does_not_fit_together_is_the_first_error(tmp_path: Path) -> None:
    found = examined(recipe_of(tmp_path, **distillation(tmp_path, student={"model": str(tmp_path / "nowhere")})))
    assert list(found) == ["task", "section"]
    assert "nowhere" in found["section"].found


def test_what_it_finds_is_the_same_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One count of checks in the command, the run, its file and its report; warnings are events."""
    import yaml

    # nothing here is timed: a check that is may find another level the second time
    changes = distillation(tmp_path, train={"steps": 1}, eval={"problems": 2})
    changes |= {"task": jsonl_sums(tmp_path), "eval_task": jsonl_sums(tmp_path, test_path=str(tmp_path / "sums.jsonl"))}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe(tmp_path, **changes)))
    assert commands.doctor(path, []) == 0
    counted = re.search(r"(\d+) of (\d+) checks are fine; the run may start", capsys.readouterr().out)
    assert counted is not None
    recipe = config.parse(Recipe, tiny_recipe(tmp_path, **changes))
    result = run.train(recipe, console=Console())
    assert f"doctor: {counted[1]} of {counted[2]} checks are fine" in capsys.readouterr().out
    findings = json.loads((result.path / "doctor.json").read_text())["findings"]
    assert [str(sum(item["level"] == "ok" for item in findings)), str(len(findings))] == [counted[1], counted[2]]
    warned = [item for item in findings if item["level"] == "warning"]
    events = [json.loads(line) for line in (result.path / "events.jsonl").read_text().splitlines()]
    told = [event["text"] for event in events if event["kind"] == "warning"]
    assert told == [
        f"{item['name']}: {item['found']}" + f"; {item['advice']}" * bool(item["advice"]) for item in warned
    ]
    assert any("also in the training data" in text for text in told)
    assert result.report is not None
    page = result.report.read_text()
    assert f"Before the first step {counted[1]} of {counted[2]} checks were fine" in page
    assert "also in the training data" in page
    assert "No warnings" not in page


def jsonl_sums(folder: Path, **keys: Any) -> dict[str, Any]:
    file = folder / "sums.jsonl"
    file.write_text("".join(json.dumps({"q": f"{n}+1=", "a": str(n + 1)}) + "\n" for n in range(1, 9)))
    fields = {"prompt_field": "q", "reference_field": "a", "solution_field": "a", "chat": False, "verifier": "exact"}
    return {"type": "jsonl", "path": str(file)} | fields | keys
