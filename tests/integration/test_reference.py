"""The reference is the student as it was before the first step, and stays so."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import letters, plain_logp, sample, tiny
from understudy.errors import RecipeError
from understudy.models import apply_lora, backbone_hidden, lm_head, load_causal_lm, save_hf, unwrap
from understudy.teachers import LocalTeacher, Setup, Teacher
from understudy.teachers.local import REFERENCES, Start, without_adapters
from understudy.types import Need, Sample

ROUNDING = 1e-12
"""float64: another order of sums."""
SAMPLED: frozenset[Need] = frozenset({"sampled"})
EVERYTHING: frozenset[Need] = frozenset({"sampled", "topk", "full"})
KINDS = ("full", "built", "lora", "built_lora")


def samples() -> list[Sample]:
    return [sample(f"p{i}", [2, 3, 4 + i], list(range(5, 9 + i))) for i in range(4)]


def lora(model: nn.Module, **options: Any) -> nn.Module:
    return apply_lora(model, **{"rank": 4, "alpha": 64.0, "dropout": 0.2} | options)


def student_and_setup(kind: str, folder: Path) -> tuple[Any, Setup]:
    """A fresh run. "built": from scratch, so that nothing can be loaded."""
    base = tiny(sharp=4.0)
    setup = Setup(name="reference", vocab_size=37, temperature=0.7)
    if kind.startswith("built"):
        setup = replace(setup, fresh_student=lambda: tiny(sharp=4.0))
    else:
        save_hf(base, letters(), folder)
        base = load_causal_lm(str(folder))
        setup = replace(setup, start=str(folder))
    student = lora(base) if kind.endswith("lora") else base
    return student.train(), replace(setup, student=student)


def train(student: nn.Module, steps: int = 3) -> None:
    """A few steps of anything."""
    moving = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(moving, lr=0.05)
    ids = torch.arange(2, 12)[None]
    for _ in range(steps):
        optimizer.zero_grad()
        hidden = backbone_hidden(student, ids, torch.arange(10)[None])
        (-lm_head(student).logits(hidden[0, :-1]).log_softmax(-1).gather(-1, ids[0, 1:, None]).mean()).backward()
        optimizer.step()


def every_score(judge: Teacher) -> list[Tensor]:
    fields = ("logprob", "entropy", "topk_ids", "topk_logprob", "hidden")
    return [getattr(one, name) for one in judge.score(samples(), EVERYTHING, k=5) for name in fields]


def logprob_of(model: Any, one: Sample) -> Tensor:
    """By the model's own forward, in evaluation mode, adapters as they are."""
    was = model.training
    logp = plain_logp(model.eval(), one.token_ids, 0.7, 37)[one.prompt_length - 1 :]
    model.train(was)
    return logp.gather(-1, one.response_ids[:, None]).squeeze(-1)


def distance(judge: Teacher, model: Any) -> float:
    found = judge.score(samples(), SAMPLED)
    pairs = [(scores.logprob, logprob_of(model, one)) for one, scores in zip(samples(), found, strict=True)]
    return max(float((a - b).abs().max()) for a, b in pairs if a is not None)


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_reference_is_the_student_at_step_0_and_does_not_move(kind: str, tmp_path: Path) -> None:
    student, setup = student_and_setup(kind, tmp_path)
    judge = Start().open(setup)
    assert distance(judge, student) < ROUNDING
    before, fingerprint, head = every_score(judge), judge.fingerprint, judge.head_for(None).weight.clone()
    train(student)
    assert distance(judge, student) > 0.1
    assert equal(every_score(judge), before)
    assert torch.equal(judge.head_for(None).weight, head)
    assert judge.hash_weights() == fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_has_the_same_reference(kind: str, tmp_path: Path) -> None:
    """The live student is then no longer the start."""
    student, setup = student_and_setup(kind, tmp_path)
    expected = every_score(Start().open(setup))
    train(student)
    assert equal(every_score(Start().open(setup)), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_and_head_are_the_scores(kind: str, tmp_path: Path) -> None:
    student, setup = student_and_setup(kind, tmp_path)
    judge = Start().open(setup)
    train(student)
    for one, scores in zip(samples(), judge.score(samples(), EVERYTHING, k=37), strict=True):
        assert scores.hidden is not None
        assert not scores.hidden.requires_grad
        logp = judge.head_for(None).logits(scores.hidden).log_softmax(-1)
        found = logp.gather(-1, one.response_ids[:, None]).squeeze(-1)
        torch.testing.assert_close(found, scores.logprob, rtol=0, atol=ROUNDING)


def test_lora_takes_no_second_copy(tmp_path: Path) -> None:
    student, setup = student_and_setup("lora", tmp_path)
    judge = Start(offload=True).open(replace(setup, start="nowhere/at-all"))
    assert judge.model is student
    assert judge.head_for(None).weight.data_ptr() == unwrap(student).get_output_embeddings().weight.data_ptr()
    full, setup = student_and_setup("full", tmp_path)
    own = Start().open(setup).model
    assert not {value.data_ptr() for value in own.parameters()} & {value.data_ptr() for value in full.parameters()}
    assert all(value.requires_grad for value in full.parameters())


def test_the_fingerprint_is_that_of_the_start_itself(tmp_path: Path) -> None:
    student, setup = student_and_setup("lora", tmp_path)
    plain = LocalTeacher(load_causal_lm(str(tmp_path)), name="x", vocab_size=37, temperature=0.7)
    assert Start().open(setup).fingerprint == plain.fingerprint
    merged = LocalTeacher(student, name="x", vocab_size=37, temperature=0.7)
    assert merged.fingerprint != plain.fingerprint


def state_of(student: nn.Module) -> dict[str, Any]:
    named = dict(student.named_parameters())
    return {
        "trainable": {name: value.requires_grad for name, value in named.items()},
        "grad": {name: None if value.grad is None else value.grad.clone() for name, value in named.items()},
        "training": [module.training for module in student.modules()],
        "where": [value.data_ptr() for value in named.values()],
    }


def same_state(a: dict[str, Any], b: dict[str, Any]) -> bool:
    grads = all(
        (a["grad"][name] is None and b["grad"][name] is None) or torch.equal(a["grad"][name], b["grad"][name])
        for name in a["grad"]
    )
    return grads and all(a[key] == b[key] for key in ("trainable", "training", "where"))


def some_loss(student: nn.Module) -> Tensor:
    torch.manual_seed(7)
    hidden = backbone_hidden(student, torch.arange(2, 8)[None], torch.arange(6)[None])
    return lm_head(student).logits(hidden[0]).log_softmax(-1)[:, 3].sum()


def test_the_live_student_is_left_as_it_was(tmp_path: Path) -> None:
    """Modes, adapters, what is trainable (one adapter is frozen by hand), accumulated and coming gradients."""
    student, setup = student_and_setup("lora", tmp_path)
    train(student, 1)
    frozen = next(value for name, value in student.named_parameters() if "lora_A" in name)
    frozen.requires_grad_(False)
    unwrap(student).model.layers[0].eval()
    student.zero_grad()
    some_loss(student).backward()
    before = state_of(student)
    expected = {name: value.grad.clone() for name, value in student.named_parameters() if value.grad is not None}
    adapted = logprob_of(student, samples()[0])
    unwrap(student).model.layers[0].eval()

    judge = Start().open(setup)
    judge.score(samples(), EVERYTHING, k=3)
    judge.head_for(None)
    assert same_state(before, state_of(student))

    # scored between a forward and its backward, the gradient is the same
    student.zero_grad()
    loss = some_loss(student)
    judge.score(samples(), SAMPLED)
    loss.backward()
    found = {name: value.grad for name, value in student.named_parameters() if value.grad is not None}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(logprob_of(student, samples()[0]), adapted)


def test_adapters_are_on_again_after_an_error(tmp_path: Path) -> None:
    student, setup = student_and_setup("lora", tmp_path)
    train(student, 1)
    judge = Start().open(setup)
    adapted, before = logprob_of(student, samples()[0]), state_of(student)
    seen: list[float] = []

    def fails(*_: Any) -> None:
        seen.append(1.0)
        raise RuntimeError("out of memory")

    handle = unwrap(student).model.layers[1].register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        judge.score(samples(), SAMPLED)
    handle.remove()
    assert seen
    assert same_state(before, state_of(student))
    assert torch.equal(logprob_of(student, samples()[0]), adapted)
    with pytest.raises(KeyError), without_adapters(student):
        raise KeyError
    assert torch.equal(logprob_of(student, samples()[0]), adapted)


def test_a_head_that_is_trained_whole_is_the_old_one_in_the_reference() -> None:
    """PEFT keeps the original of `modules_to_save`; the trained copy is the student's."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    student: Any = get_peft_model(tiny(sharp=4.0), config)
    judge = Start().open(Setup(name="reference", vocab_size=37, temperature=0.7, student=student))
    assert distance(judge, student) < ROUNDING
    before, head, fingerprint = every_score(judge), judge.head_for(None).weight.clone(), judge.fingerprint
    train(student)
    assert not torch.equal(lm_head(student).weight, head)
    assert torch.equal(judge.head_for(None).weight, head)
    assert equal(every_score(judge), before)
    assert judge.hash_weights() == fingerprint


def test_precision_is_the_students_unless_told_otherwise(tmp_path: Path) -> None:
    """A bfloat16 checkpoint that trains in float32: the reference agrees with the student to float32's rounding."""
    save_hf(tiny(dtype="bfloat16", sharp=4.0), letters(), tmp_path)
    student = load_causal_lm(str(tmp_path), dtype="float32")
    setup = Setup(name="r", vocab_size=37, temperature=0.7, student=student, start=str(tmp_path))
    judge = Start().open(setup)
    assert judge.head_for(None).weight.dtype == torch.float32
    assert distance(judge, student) < 1e-5
    assert Start(dtype="bfloat16").open(setup).head_for(None).weight.dtype == torch.bfloat16
    assert Start(offload=True).open(setup).score(samples(), SAMPLED)[0].logprob is not None
    built = Setup(name="r", vocab_size=37, student=tiny(), fresh_student=tiny)
    assert Start(dtype="float32").open(built).head_for(None).weight.dtype == torch.float32


def test_refusals(tmp_path: Path) -> None:
    student, setup = student_and_setup("built", tmp_path)
    with pytest.raises(RecipeError, match="from scratch"):
        Start().open(replace(setup, fresh_student=None))
    adapted, setup = student_and_setup("built_lora", tmp_path)
    with pytest.raises(RecipeError, match=r"dtype is 'bfloat16'.*'float64'.*leave dtype out"):
        Start(dtype="bfloat16").open(setup)
    Start(dtype="float64").open(setup)
    unwrap(adapted).model.norm.weight.requires_grad_(True)
    with pytest.raises(RecipeError, match=r"1 weights outside the adapters.*model\.norm\.weight"):
        Start().open(setup)
    del student


def test_sections() -> None:
    from understudy.config import parse

    assert parse(REFERENCES["start"], {"offload": True}) == Start(offload=True)
    assert EVERYTHING | {"none"} == Start().gives
    assert Start().shown in Start().check()
