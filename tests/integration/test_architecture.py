"""A newcomer is one file and one line in a table: one of each is added here, trained with and examined."""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.runs import distillation, metric_rows, tiny_recipe, train
from understudy import config
from understudy.cli import commands
from understudy.engines import ENGINES, Engine, EngineSection, EngineSetup
from understudy.environments import Environment, Step
from understudy.errors import RecipeError
from understudy.recipe import Recipe, doctor
from understudy.recipe.checks import Files, Parts, check
from understudy.tasks import TASKS, Split, Task, build_tokenizer
from understudy.tasks.verifiers import VERIFIERS, find_verifier
from understudy.teachers import TEACHERS, RunFacts, Setup, Teacher, TeacherSection
from understudy.trainer.console import Console
from understudy.types import Grade, Message, Need, Prompt, Sample, Scores

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).parents[2] / "src" / "understudy"
FOLDERS = ("engines", "tasks", "teachers")

# --- the newcomers ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uniform(TeacherSection):
    """A teacher that finds every token as likely as any other; it stands in the recipe as `type: uniform`."""

    scale: float = 1.0

    @property
    def gives(self) -> frozenset[Need]:
        return frozenset({"none", "sampled"})

    @property
    def shown(self) -> str:
        return "all tokens alike"

    def check(self) -> str:
        return f"teacher: {self.shown}"

    def check_run(self, run: RunFacts) -> None:
        if run.samples_per_prompt > 8:
            raise RecipeError(f"{run.where}: more than 8 samples of a prompt are too many")

    def open(self, setup: Setup) -> UniformTeacher:
        return UniformTeacher(setup, self.scale)


class UniformTeacher(Teacher):
    def __init__(self, setup: Setup, scale: float) -> None:
        self.name, self.setup, self.scale = setup.name, setup, scale

    @property
    def fingerprint(self) -> str:
        return f"uniform/{self.setup.vocab_size}"

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        value = -self.scale * math.log(self.setup.vocab_size)
        return [Scores(one.response_ids, logprob=torch.full((one.num_response_tokens,), value)) for one in samples]


@dataclass(frozen=True)
class Counted(EngineSection):
    """The engine of this process, which counts what it writes; `type: counted`."""

    def check(self) -> str:
        return "rollout: counted"

    @property
    def beside_update(self) -> bool:
        return False

    def open(self, setup: EngineSetup) -> Engine:
        return CountedEngine(setup.hf(setup.model))

    def pushed(self, model: nn.Module) -> None:
        return None


class CountedEngine:
    written = 0

    def __init__(self, inner: Engine) -> None:
        self.inner = inner

    def generate(self, requests: Sequence[Any], *args: Any, **options: Any) -> list[Sample]:
        CountedEngine.written += len(requests)
        return self.inner.generate(requests, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True)
class Echo(Task):
    """A digit to be said again; `type: echo`."""

    verifier: str = "first"

    @property
    def name(self) -> str:
        return "echo"

    def prompts(self, split: Split) -> Sequence[Prompt]:
        digits = range(8) if split == "train" else range(8, 10)
        return [Prompt(f"echo/{n}", text=f"{n}:", reference=(str(n),), solution=str(n)) for n in digits]

    def grade(self, prompt: Prompt, text: str) -> Grade:
        return find_verifier(self.verifier)(text, prompt.reference or ())

    @property
    def num_tokens(self) -> int:
        return len(build_tokenizer("addition"))

    def tokenizer(self) -> Any:
        return build_tokenizer("addition")


class GoOn:
    """Asks the student to go on once, then grades what it says."""

    max_turns = 2
    heard = 0

    def __init__(self) -> None:
        self.turn = 0

    def step(self, message: Message) -> Step:
        self.turn += 1
        GoOn.heard += self.turn == 2
        if self.turn == 1:
            return Step(({"role": "user", "content": "+"},))
        return Step(done=True, reward=len(message.text) % 4 / 3)

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class Talk(Echo):
    """The same digit in two turns; `type: talk`."""

    def environment(self, prompt: Prompt) -> Environment:
        return GoOn()


def first_is(text: str, reference: str) -> Grade:
    return Grade(float(text[:1] in reference + "0123456"), text[:1])


@pytest.fixture(autouse=True)
def newcomers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TEACHERS, "uniform", Uniform)
    monkeypatch.setitem(ENGINES, "counted", Counted)  # type: ignore[arg-type]
    monkeypatch.setitem(TASKS, "echo", Echo)  # type: ignore[arg-type]
    monkeypatch.setitem(TASKS, "talk", Talk)  # type: ignore[arg-type]
    monkeypatch.setitem(VERIFIERS, "first", first_is)  # type: ignore[arg-type]


CASES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "teacher": lambda folder: distillation(folder, method={"type": "opd"}, teacher={"type": "uniform"}),
    "engine": lambda folder: distillation(folder, method={"type": "opd"}, rollout={"type": "counted"}),
    "task and verifier": lambda folder: {
        "task": {"type": "echo"},
        "method": {"type": "grpo"},
        "train": {"samples_per_prompt": 4},
        "eval": {"every": 3, "split": "test"},
        "sampling": {"max_new_tokens": 4},
    },
    "environment": lambda folder: {
        "task": {"type": "talk"},
        "method": {"type": "grpo"},
        "train": {"samples_per_prompt": 4},
        "sampling": {"max_new_tokens": 24},
    },
}


@pytest.mark.parametrize("newcomer", CASES)
def test_a_newcomer_is_checked_examined_and_trained_with(tmp_path: Path, newcomer: str) -> None:
    changes = CASES[newcomer](tmp_path)
    recipe = config.parse(Recipe, tiny_recipe(tmp_path, **changes))
    assert config.parse(Recipe, config.dump(recipe)) == recipe
    assert check(recipe)
    found = doctor.examine(recipe, built)
    assert not doctor.errors_of(found), found
    assert "rehearsal" in {item.name for item in found}
    before = CountedEngine.written, GoOn.heard
    run_dir = train(tmp_path, **changes)
    assert len(metric_rows(run_dir)) == 6
    assert (CountedEngine.written > before[0]) == (newcomer == "engine")
    assert (GoOn.heard > before[1]) == (newcomer == "environment")
    assert json.loads((run_dir / "run.json").read_text())["status"] == "finished"


@contextmanager
def built(files: Files) -> Iterator[Parts]:
    with commands.loaded(files, Console(quiet=True)) as parts:
        yield parts


def test_a_newcomers_own_rules_are_asked(tmp_path: Path) -> None:
    changes = distillation(
        tmp_path, method={"type": "opd"}, teacher={"type": "uniform"}, train={"samples_per_prompt": 9}
    )
    with pytest.raises(RecipeError, match="teacher: more than 8 samples"):
        check(config.parse(Recipe, tiny_recipe(tmp_path, **changes)))
    with pytest.raises(RecipeError, match=r"topk.*|K most probable.*all tokens alike.*gives only sampled"):
        config.parse(Recipe, tiny_recipe(tmp_path, **changes | {"method": {"type": "topk", "k": 2}}))


# --- the walls ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def modules() -> list[tuple[Path, list[ast.AST]]]:
    """The syntax of every file of the package, node by node."""
    return [
        (path.relative_to(SOURCE), list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
        for path in sorted(SOURCE.rglob("*.py"))
    ]


def test_nobody_asks_for_a_concrete_kind_outside_its_folder(modules: list[tuple[Path, list[ast.AST]]]) -> None:
    """What a teacher, engine or task can do is a property of it; `isinstance` would be a list that newcomers have to find."""
    named: dict[bool, set[str]] = {True: set(), False: set()}
    for path, nodes in modules:
        names = {node.name for node in nodes if isinstance(node, ast.ClassDef)}
        named[path.parts[0] in FOLDERS] |= names
    kinds = named[True] - named[False]
    asked = [
        f"{path}:{node.lineno} {name.id}"
        for path, nodes in modules
        if path.parts[0] not in FOLDERS
        for node in nodes
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance"
        for name in ast.walk(node.args[1])
        if isinstance(name, ast.Name) and name.id in kinds
    ]
    assert asked == []


def test_nobody_reads_a_private_name_of_another_module(modules: list[tuple[Path, list[ast.AST]]]) -> None:
    found = []
    for path, nodes in modules:
        own = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        own |= {node.id for node in nodes if isinstance(node, ast.Name)}
        own |= {node.attr for node in nodes if isinstance(node, ast.Attribute) and _is_self(node.value)}
        found += [
            f"{path}:{node.lineno} {node.attr}"
            for node in nodes
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
            # the one function of a library that is public under such a name
            if node.attr not in own and node.attr != "_exit"
        ]
        found += [
            f"{path}:{node.lineno} {name.name}"
            for node in nodes
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("understudy")
            for name in node.names
            if name.name.startswith("_")
        ]
    assert found == []


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")
