"""Evaluations on several tasks at once: read from a file or by name, sampled as each says, shown in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
import yaml

from tests.runs import save_tiny_model, write_recipe
from understudy import api
from understudy.errors import RecipeError
from understudy.eval.suite import SUITES, read_suite
from understudy.eval.summary import summarise
from understudy.tasks import File
from understudy.types import Author, Grade, Prompt, Sample, Sampling

SUMS = {"type": "arithmetic", "digits": 1}
LONG = {"type": "arithmetic", "digits": 2}
VALUES: dict[str, Any] = {
    "sampling": {"max_new_tokens": 8, "temperature": 0.7},
    "tasks": {
        "sums": {"task": SUMS, "problems": 5, "samples_per_prompt": 4},
        "long": {"task": LONG, "problems": 3, "sampling": {"temperature": 0.0}},
    },
}


def write(folder: Path, **changes: Any) -> str:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(VALUES | changes))
    return str(path)


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_can_be_read(name: str) -> None:
    parts = read_suite(name)
    assert parts.keys() == SUITES[name]["tasks"].keys()
    for label, part in parts.items():
        assert part.task.name == label
        part.task.check_split(part.split)
        assert part.sampling == Sampling(**SUITES[name]["sampling"])


def test_a_task_has_its_own_sampling_over_that_of_the_suite(tmp_path: Path) -> None:
    parts = read_suite(write(tmp_path), ["tasks.long.samples_per_prompt=2", "sampling.top_p=0.9"])
    assert parts["sums"].sampling == Sampling(temperature=0.7, top_p=0.9, max_new_tokens=8)
    assert parts["long"].sampling == Sampling(temperature=0.0, top_p=0.9, max_new_tokens=8)
    assert (parts["sums"].samples_per_prompt, parts["long"].samples_per_prompt) == (4, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": {}}, "it must name at least one task"),
        ({"tasks": {"a": "math"}}, r"suite\.tasks\.a is .*math.*; it must be a mapping with a section task"),
        ({"tasks": {"a": {"task": {"type": "maths"}}}}, r"suite\.tasks\.a\.task\.type is .*maths"),
        ({"tasks": {"a": {"task": SUMS, "samples": 3}}}, r"suite\.tasks\.a\.samples: unknown key"),
        ({"task": SUMS}, "unknown key 'task'; a suite has sampling and tasks"),
    ],
)
def test_what_is_no_suite_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_suite(write(tmp_path, **changes))
    with pytest.raises(RecipeError, match="no suite and no file 'reasonin'; did you mean 'reasoning'"):
        read_suite("reasonin")


def test_a_model_is_evaluated_on_each_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "model", seed=0)
    out = tmp_path / "out"
    found = api.evaluate_suite(model, write(tmp_path), overrides=["device=cpu", "suite.tasks.sums.problems=4"], out=out)
    assert {name: (one.num_problems, one.samples_per_prompt) for name, one in found.items()} == {
        "sums": (4, 4),
        "long": (3, 1),
    }
    assert found["sums"].metrics.keys() >= {"avg@4", "pass@4", "maj@4"}
    for name, num in (("sums", 16), ("long", 3)):
        assert len((out / name / "step_000000.jsonl").read_text().splitlines()) == num
        assert json.loads((out / name / "step_000000.json").read_text())["sampling"]["max_new_tokens"] == 8
    pictures = sorted((out / "sums").glob("*.svg"))
    assert [path.name for path in pictures] == ["scaling_samples.svg", "scaling_tokens.svg"]
    texts = ["".join(ElementTree.parse(path).getroot().itertext()) for path in pictures]
    assert all("pass@k" in text for text in texts)
    assert "drawn sample" in texts[0]
    assert not list((out / "long").glob("*.svg")), "one sample of each problem is no curve"
    shown = capsys.readouterr().out
    assert "T 0.7, at most 8 tokens" in shown
    assert "greedy, at most 8 tokens" in shown
    assert "avg@4" in shown
    # the same as each task by itself
    keys = (
        "task.type=arithmetic task.digits=2 eval.problems=3 sampling.max_new_tokens=8 sampling.temperature=0 device=cpu"
    )
    alone = api.evaluate(model, overrides=keys.split(), quiet=True)
    assert alone.metrics == found["long"].metrics


def test_data_that_are_for_measuring_only_need_no_train_split(tmp_path: Path) -> None:
    """As AIME, which is the first of the suite reasoning."""
    rows = tmp_path / "aime.jsonl"
    problems = [{"problem": f"{i}+{i}=", "answer": str(2 * i), "solution": f"It is {2 * i}."} for i in range(3)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in problems))
    task = {"type": "math", "dataset": "aime24", "path": str(rows), "chat": False, "template": "{prompt}"}
    suite = write(tmp_path, tasks={"aime24": {"task": task, "samples_per_prompt": 2}})
    model = save_tiny_model(tmp_path / "model", seed=0)
    found = api.evaluate_suite(model, suite, overrides=["device=cpu"], quiet=True)
    assert found["aime24"].num_problems == 3
    keys = [f"task.{key}={json.dumps(value)}" for key, value in task.items()]
    keys += ["sampling.max_new_tokens=8", "sampling.temperature=0.7", "eval.samples_per_prompt=2", "eval.split=test"]
    alone = api.evaluate(model, overrides=[*keys, "device=cpu"], quiet=True)
    assert alone.metrics == found["aime24"].metrics


def test_a_recipe_is_evaluated_on_a_suite_and_its_own_task_is_left_alone(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=0)
    recipe = write_recipe(
        tmp_path,
        student={"build": None, "model": model},
        task={"type": "file", "path": str(tmp_path / "moved.jsonl"), "prompt_field": "q"},
    )
    assert api.evaluate_suite(recipe, write(tmp_path), quiet=True).keys() == {"sums", "long"}


def test_each_part_of_a_mix_has_a_score(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=0)
    mix = {"type": "mix", "parts": {"sums": SUMS, "long": LONG}}
    suite = write(tmp_path, tasks={"both": {"task": mix, "problems": 6, "samples_per_prompt": 2}})
    metrics = api.evaluate_suite(model, suite, overrides=["device=cpu"], quiet=True)["both"].metrics
    assert metrics["sums/avg@2"].num_problems == metrics["long/avg@2"].num_problems == 3
    mean = (metrics["sums/avg@2"].value + metrics["long/avg@2"].value) / 2
    assert metrics["avg@2"].value == pytest.approx(mean)


def test_equal_answers_are_one_vote() -> None:
    task = File(path="x.jsonl", prompt_field="q", reference_field="a")
    prompt = Prompt("a", text="x", reference=("7",))
    ids, author = torch.tensor([0, 1]), torch.tensor([Author.PROMPT, Author.STUDENT], dtype=torch.uint8)

    def majority(*answers: str | None, reference: str = "7") -> float:
        asked = Prompt("a", text="x", reference=(reference,))
        samples = [
            Sample(asked, index, ids, author, 1, "stop", str(answer), grade=task.grade(asked, f"\\boxed{{{answer}}}"))
            if answer is not None
            else Sample(asked, index, ids, author, 1, "stop", "", grade=Grade(0.0))
            for index, answer in enumerate(answers)
        ]
        found = summarise(samples, step=0, split="test", eos_ids=[1], same_answer=task.same_answer)
        return found.metrics[f"maj@{len(answers)}"].value

    assert task.same_answer(prompt, "0.5", "\\frac{1}{2}")
    assert not task.same_answer(prompt, "0.5", "2")
    # spelled as they are, three wrong answers would lose to two right ones
    assert majority("1/2", "0.5", "\\frac12", "7", "7") == 0.0
    assert majority("7.0", "7", "14/2", "3", "3") == 1.0
    assert majority("1/2", "0.5", "7", "7") == 0.5
    assert majority(None, None, "7", "3") == 0.5
