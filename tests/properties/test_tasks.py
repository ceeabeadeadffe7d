"""Properties of the computed tasks and of the split of files, for any seed, size and order."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from understudy.randomness import mix64
from understudy.tasks import Arithmetic, Jsonl, build_tokenizer
from understudy.tasks.lazy import LazyPrompts, Permutation
from understudy.types import Prompt

FAMILIES = {
    "addition": Arithmetic("addition"),
    "one digit": Arithmetic("addition", digits=1),
    "nine digits": Arithmetic("addition", digits=9),
    "two ways": Arithmetic("addition", digits=8, ways=True),
    "chain": Arithmetic("chain"),
    "chain of nine": Arithmetic("chain", operations=9),
    "words": Arithmetic("words"),
}
SMALL = [
    Arithmetic("addition", digits=1),
    Arithmetic("addition", digits=2, seed=5),
    Arithmetic("chain", operations=1),
    Arithmetic("chain", operations=2, seed=9),
]
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@given(st.integers(1, 700), st.text(max_size=5))
def test_a_permutation_is_a_bijection(size: int, name: str) -> None:
    order = Permutation(size, name)
    assert sorted(order(index) for index in range(size)) == list(range(size))


def test_permutations_of_other_names_are_other_orders() -> None:
    first, second = ([Permutation(1000, name)(index) for index in range(1000)] for name in "ab")
    # Two random orders of 1,000 agree in 1 place on average; 12 has a chance below 1e-9.
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 12


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1))
def test_integers_and_arrays_are_mixed_alike(values: list[int]) -> None:
    assert mix64(np.array(values, dtype=np.uint64)).tolist() == [mix64(value) for value in values]


@given(st.slices(20), st.slices(5))
def test_lazy_prompts_are_a_sequence(first: slice, second: slice) -> None:
    lazy = LazyPrompts(lambda index: Prompt(str(index), text="x"), range(20))
    plain = [Prompt(str(index), text="x") for index in range(20)]
    assert list(lazy) == plain
    assert list(lazy[first][second]) == plain[first][second]


@pytest.mark.parametrize("name", FAMILIES)
@given(st.data())
def test_every_problem_is_solved_by_its_solution(name: str, data: st.DataObject) -> None:
    task = FAMILIES[name]
    prompt = task.problem(data.draw(st.integers(0, task.num_problems - 1)))
    assert prompt.solution is not None
    assert prompt.reference == (str(independent_answer(task, prompt.text or "")),)
    assert task.grade(prompt, prompt.solution).score == 1.0
    assert task.grade(prompt, prompt.solution + "0").score == 0.0
    assert task.grade(prompt, prompt.solution.rpartition("#")[0]).score == 0.0
    assert task.grade(prompt, "").score == 0.0


@pytest.mark.parametrize("name", FAMILIES)
@given(st.data())
def test_every_line_of_a_solution_is_true(name: str, data: st.DataObject) -> None:
    task = FAMILIES[name]
    prompt = task.problem(data.draw(st.integers(0, task.num_problems - 1)))
    steps = re.split("[;:]" if task.ways else ";", (prompt.solution or "").partition("#")[0])
    for step in steps:
        left, right = step.replace(" ", "").split("=")
        if task.family == "addition":
            assert sum(map(int, left)) == int(right)
        else:
            a, sign, b = re.fullmatch(r"(\d+)([-+*])(\d+)", left).groups()  # type: ignore[union-attr]
            value = OPERATIONS[sign](int(a), int(b))
            assert int(right) == (value % 10 if task.family == "chain" else value)


def test_ways_are_taken_equally_often_and_change_no_answer() -> None:
    one, two = Arithmetic("addition", digits=8), Arithmetic("addition", digits=8, ways=True)
    taken = {"swapped": 0, "colon": 0}
    for code in (mix64(number) % one.num_problems for number in range(400)):
        plain, varied = one.problem(code), two.problem(code)
        assert (plain.text, plain.reference) == (varied.text, varied.reference)
        sides = [(solution or "").partition("#")[0] for solution in (plain.solution, varied.solution)]
        taken["colon"] += sides[1].count(":")
        steps = zip(sides[0].split(";"), re.split("[;:]", sides[1]), strict=True)
        taken["swapped"] += sum(a != b and sorted(a[:2]) == sorted(b[:2]) for a, b in steps)
    # 7 separators and 8 pairs of digits, of which one in ten is equal, in 400 problems: half of them, within 5 standard errors
    assert abs(taken["colon"] - 1400) < 5 * (2800 / 4) ** 0.5
    assert abs(taken["swapped"] - 1440) < 5 * (2880 / 4) ** 0.5 + 5 * (3200 * 0.09 / 4) ** 0.5


def independent_answer(task: Arithmetic, text: str) -> int:
    """The answer worked out from the text alone."""
    if task.family == "addition":
        a, b = text.removesuffix(":").split("+")
        return int(a) + int(b)
    if task.family == "chain":
        value, *rest = re.findall(r"\d|[-+*]", text)
        result = int(value)
        for sign, operand in zip(rest[::2], rest[1::2], strict=True):
            result = OPERATIONS[sign](result, int(operand)) % 10
        return result
    first, *sentences, _ = text.split(" . ")
    result = int(re.findall(r"\d+", first)[0])
    for sentence in sentences:
        if "doubles" in sentence:
            result *= 2
        else:
            amount = int(re.findall(r"\d+", sentence)[0])
            gains = any(verb in sentence for verb in ("buys", "finds", "gets"))
            result += amount if gains else -amount
    return result


@pytest.mark.parametrize("task", SMALL, ids=repr)
def test_the_splits_part_all_problems(task: Arithmetic) -> None:
    ids = {split: [prompt.id for prompt in task.prompts(split)] for split in ("train", "validation", "test")}
    every = [name for names in ids.values() for name in names]
    assert len(set(every)) == len(every) == task.num_problems
    assert len(ids["test"]) == len(ids["validation"]) == max(1, task.num_problems // 20)


@given(st.integers(0, 2**32), st.integers(0, 2**32))
@settings(max_examples=20)
def test_no_seed_trains_on_what_another_evaluates(seed: int, other: int) -> None:
    trained = {prompt.id for prompt in Arithmetic("chain", operations=2, seed=seed).prompts("train")}
    held_out = Arithmetic("chain", operations=2, seed=other).prompts("test")
    assert trained.isdisjoint(prompt.id for prompt in held_out)


def test_the_seed_orders_the_training_problems_and_their_number_is_cut() -> None:
    first, second = (Arithmetic("addition", seed=seed).prompts("train")[:50] for seed in (0, 1))
    assert [prompt.id for prompt in first] != [prompt.id for prompt in second]
    assert list(Arithmetic("addition", num_solutions=50).prompts("train")) == list(first)


@pytest.mark.parametrize("family", ["addition", "chain", "words"])
@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_text_of_the_family_survives_its_tokenizer(family: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS.setdefault(family, build_tokenizer(family))  # type: ignore[arg-type]
    task = Arithmetic(family)  # type: ignore[arg-type]
    prompt = task.problem(data.draw(st.integers(0, task.num_problems - 1)))
    for text in (prompt.text, prompt.solution):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == (len(text.split()) if family == "words" else len(text))
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True).rstrip() == text


TOKENIZERS: dict[str, object] = {}


@given(st.lists(st.integers(0, 30), min_size=30, max_size=60), st.randoms(use_true_random=False), st.integers(0, 5))
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_validation_share_follows_the_prompt(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], random: object, seed: int
) -> None:
    """Rows that move or are added leave the others in their split; equal prompts stay together."""
    folder = tmp_path_factory.mktemp("rows")

    def split_of(name: str, values: list[int]) -> dict[int, str]:
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"q": f"What is {value}?"}) + "\n" for value in values))
        task = Jsonl(path=str(path), prompt_field="q", validation_share=0.5, seed=seed)
        found: dict[int, str] = {}
        for split in ("train", "validation"):
            for prompt in task.prompts(split):  # type: ignore[arg-type]
                value = int(re.findall(r"\d+", prompt.messages[-1]["content"])[0])  # type: ignore[index]
                assert found.setdefault(value, split) == split
        return found

    # 0 to 30 hold rows of both splits for each of the seeds
    before = split_of("before", [*numbers, *range(31)])
    moved = [*numbers, *range(31, 40), *range(31)]
    random.shuffle(moved)  # type: ignore[attr-defined]
    after = split_of("after", moved)
    assert before.items() <= after.items()


def test_the_validation_share_is_near_what_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"q": f"{number} + 1"}) + "\n" for number in range(4000)))
    task = Jsonl(path=str(path), prompt_field="q", validation_share=0.1)
    count = len(task.prompts("validation"))
    assert count + len(task.prompts("train")) == 4000
    assert abs(count - 400) < 5 * (4000 * 0.1 * 0.9) ** 0.5
