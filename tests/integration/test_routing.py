"""Each sample is judged by the teacher that it names, and by no other."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny_models import NUM_ROWS, sample, tiny
from understudy.errors import CheckpointError, RecipeError, ScoreError
from understudy.linear.head import LMHead
from understudy.packing import attach_scores, pack
from understudy.teachers import LocalTeacher, Teacher
from understudy.teachers.router import RoutedTeacher, WeightedTeacher, check_names
from understudy.types import Need, Prompt, Sample, Scores

SAMPLED: frozenset[Need] = frozenset({"sampled"})


class Constant:
    """Says one number for every token; moves by one with every update."""

    concurrency = 1
    collective = False

    def __init__(self, name: str, value: float) -> None:
        self.name = name
        self.fingerprint = f"{name}={value}"
        self.value = value
        self.asked: list[list[str]] = []
        self.moved = torch.zeros(1)
        self.head = LMHead(torch.full((3, 2), value))

    def head_for(self, name: str | None) -> LMHead | None:
        return self.head if name == self.name else None

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        self.asked.append([one.key for one in samples])
        return [Scores(one.response_ids, logprob=torch.full((one.num_response_tokens,), self.value)) for one in samples]

    def follow(self, student: nn.Module) -> None:
        self.moved += 1

    def state(self) -> dict[str, Tensor]:
        return {"a/moved": self.moved}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self.moved = state["a/moved"].clone()


def named(name: str, teacher: str | None, length: int = 3) -> Sample:
    return replace(sample(name, [2, 3], list(range(2, 2 + length))), teacher=teacher)


def test_a_constant_is_a_teacher() -> None:
    judge: Teacher = RoutedTeacher({"a": Constant("a", -1.0)})
    assert judge.name == "a"


@pytest.mark.parametrize("seed", range(5))
def test_scores_come_back_in_the_order_of_the_samples(seed: int) -> None:
    """Whatever the mix; each teacher is asked once, for its own samples only."""
    values = {"code": -1.0, "math": -2.0, "web": -3.0}
    teachers = {name: Constant(name, value) for name, value in values.items()}
    draw = random.Random(seed)
    made = [named(f"p{i}", draw.choice(["code", "math"]), draw.randint(0, 6)) for i in range(20)]
    found = RoutedTeacher(teachers).score(made, SAMPLED)
    for one, scores in zip(made, found, strict=True):
        assert scores.logprob is not None
        assert scores.logprob.tolist() == [values[str(one.teacher)]] * one.num_response_tokens
        assert torch.equal(scores.token_ids, one.response_ids)
    for name, teacher in teachers.items():
        own = [one.key for one in made if one.teacher == name]
        assert teacher.asked == ([own] if own else [])


def test_real_teachers_say_what_they_say_alone() -> None:
    models = {"a": tiny(sharp=4.0), "b": tiny("gpt2", sharp=4.0)}
    teachers = {name: LocalTeacher(model, name=name, vocab_size=40) for name, model in models.items()}
    made = [named(f"p{i}", "ab"[i % 2], 3 + i) for i in range(6)]
    for one, scores in zip(made, RoutedTeacher(teachers).score(made, SAMPLED), strict=True):
        alone = teachers[str(one.teacher)].score([one], SAMPLED)[0]
        torch.testing.assert_close(scores.logprob, alone.logprob, rtol=0, atol=1e-12)


def test_a_dropped_sample_shifts_nothing() -> None:
    """One sample in the middle is not a number; its neighbours keep their own scores."""
    teachers = {"a": Constant("a", -1.0), "b": Constant("b", -2.0)}
    made = [named(f"p{i}", name, 2 + i) for i, name in enumerate("abbaab")]
    scores = RoutedTeacher(teachers).score(made, SAMPLED)
    assert scores[2].logprob is not None
    scores[2].logprob[1] = float("nan")
    attached = attach_scores(made, scores, "drop")
    kept = [one for one in attached if one is not None]
    assert attached[2] is None
    assert [one.key for one in kept] == ["p0#0", "p1#0", "p3#0", "p4#0", "p5#0"]
    batch = pack(kept)
    assert batch.teacher_logprob is not None
    expected = [value for one in kept for value in [{"a": -1.0, "b": -2.0}[str(one.teacher)]] * one.num_response_tokens]
    assert batch.teacher_logprob.tolist() == expected


@pytest.mark.parametrize("name", [None, "maths", ""])
def test_an_unknown_or_missing_name_is_an_error(name: str | None) -> None:
    """G-OPD's reference code falls back to another teacher. Here nobody is asked at all, even where there is one only."""
    teachers = {"math": Constant("math", -1.0), "code": Constant("code", -2.0)}
    made = [named("p0", "math"), named("p1", name), named("p2", "code")]
    with pytest.raises(ScoreError, match=r"p1#0.*code, math"):
        RoutedTeacher(teachers).score(made, SAMPLED)
    assert teachers["math"].asked == teachers["code"].asked == []
    with pytest.raises(ScoreError, match=r"p1#0.*math"):
        RoutedTeacher({"math": teachers["math"]}).score(made[1:2], SAMPLED)
    with pytest.raises(ScoreError, match="math"):
        RoutedTeacher(teachers).head_for(name)


def test_a_teacher_that_loses_a_sample_is_named() -> None:
    class Loses(Constant):
        def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
            return super().score(samples, need, k=k)[1:]

    with pytest.raises(ScoreError, match="'b' returned 1 scores for 2 samples"):
        RoutedTeacher({"a": Constant("a", -1.0), "b": Loses("b", -2.0)}).score(
            [named("p0", "b"), named("p1", "a"), named("p2", "b")], SAMPLED
        )


def test_heads_fingerprints_and_names() -> None:
    a, b = Constant("a", -1.0), Constant("b", -2.0)
    routed = RoutedTeacher({"a": a, "b": b})
    assert routed.head_for("a") is a.head
    assert routed.head_for("b") is b.head
    assert routed.name == "a, b"
    assert routed.fingerprint == RoutedTeacher({"b": b, "a": a}).fingerprint
    swapped = RoutedTeacher({"a": b, "b": a})
    assert len({routed.fingerprint, swapped.fingerprint, RoutedTeacher({"a": a}).fingerprint}) == 3
    with pytest.raises(ValueError, match="'a/b'"):
        RoutedTeacher({"a/b": a})
    with pytest.raises(ValueError, match="at least one"):
        RoutedTeacher({})


def test_state_goes_to_the_teacher_that_it_came_from() -> None:
    first = {"a": Constant("a", -1.0), "a.b": Constant("a.b", -2.0)}
    routed = RoutedTeacher(first)
    routed.follow(nn.Linear(1, 1))
    first["a.b"].follow(nn.Linear(1, 1))
    state = {name: value.clone() for name, value in routed.state().items()}
    assert sorted(state) == ["a.b/a/moved", "a/a/moved"]
    second = {"a": Constant("a", -1.0), "a.b": Constant("a.b", -2.0)}
    RoutedTeacher(second).load_state(state)
    assert [float(teacher.moved) for teacher in second.values()] == [1.0, 2.0]
    with pytest.raises(CheckpointError, match=r"a\.b/a/moved.*are: a\."):
        RoutedTeacher({"a": Constant("a", -1.0)}).load_state(state)


def test_prompts_are_checked_before_anything_is_loaded() -> None:
    known = ("math", "code")
    check_names([Prompt(id="p0", text="x", teacher="math"), Prompt(id="p1", text="x", teacher="code")], known)
    with pytest.raises(RecipeError, match=r"p1 names the teacher 'maht'; did you mean 'math'\? .*code, math"):
        check_names([Prompt(id="p0", teacher="math"), Prompt(id="p1", teacher="maht")], known)
    with pytest.raises(RecipeError, match=r"p0 names no teacher.*code, math.*task\.teacher_field"):
        check_names([Prompt(id="p0")], known)


class Counting(LocalTeacher):
    """Fails to close where it is told to."""

    def __init__(self, name: str, fails: bool) -> None:
        super().__init__(tiny(), name=name, vocab_size=NUM_ROWS)
        self.fails, self.closed = fails, False

    def close(self) -> None:
        self.closed = True
        if self.fails:
            raise OSError("no connection to close")


def test_all_are_closed_though_one_raises() -> None:
    teachers: dict[str, Any] = {name: Counting(name, fails) for name, fails in (("a", True), ("b", False), ("c", True))}
    routed = RoutedTeacher(teachers | {"d": LocalTeacher(tiny(), name="d", vocab_size=NUM_ROWS)})
    with pytest.raises(OSError, match="no connection"):
        routed.close()
    assert all(teacher.closed for teacher in teachers.values())


def said(teacher: Teacher, samples: Sequence[Sample]) -> list[Tensor]:
    return [present for one in teacher.score(samples, SAMPLED) if (present := one.logprob) is not None]


def test_weighted_teachers_are_the_mixture_of_their_probabilities() -> None:
    samples = [named("x", None), named("y", "b", 5)]
    one, other = Constant("a", -1.0), Constant("b", -3.0)
    both = WeightedTeacher({"a": one, "b": other}, {"a": 3.0, "b": 1.0})  # type: ignore[dict-item]
    expected = torch.tensor([0.75 * torch.tensor(-1.0).exp() + 0.25 * torch.tensor(-3.0).exp()]).log()
    for numbers, given in zip(said(both, samples), samples, strict=True):
        torch.testing.assert_close(numbers, expected.expand(given.num_response_tokens))
    # a weight of 1 beside 0 is the one teacher, and the other is not asked
    other.asked.clear()
    alone = WeightedTeacher({"a": one, "b": other}, {"a": 1.0, "b": 0.0})  # type: ignore[dict-item]
    for numbers in said(alone, samples):
        assert torch.equal(numbers, torch.full_like(numbers, -1.0))
    assert not other.asked
    # equal teachers are one
    same = WeightedTeacher({"a": one, "b": Constant("b", -1.0)}, {"a": 0.3, "b": 0.7})  # type: ignore[dict-item]
    for numbers in said(same, samples):
        torch.testing.assert_close(numbers, torch.full_like(numbers, -1.0))
    assert len({both.fingerprint, alone.fingerprint, RoutedTeacher({"a": one, "b": other}).fingerprint}) == 3  # type: ignore[dict-item]


def test_weighted_teachers_refuse_what_they_cannot_mix() -> None:
    teachers: Any = {"a": Constant("a", -1.0), "b": Constant("b", -1.0)}
    for weights in ({"a": 1.0}, {"a": 1.0, "b": -1.0}, {"a": 0.0, "b": 0.0}):
        with pytest.raises(ValueError, match="weights are"):
            WeightedTeacher(teachers, weights)
    with pytest.raises(ScoreError, match="sampled tokens alone"):
        WeightedTeacher(teachers, {"a": 1.0, "b": 1.0}).score([named("x", None)], frozenset({"full"}))
