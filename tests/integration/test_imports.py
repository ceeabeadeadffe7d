"""What an import pulls in: the mathematics needs torch alone, and what needs no torch is said without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "peft",
    "pandas",
    "wandb",
    "trackio",
    "tensorboard",
    "math_verify",
    "sympy",
)


def loaded_by(statement: str) -> set[str]:
    """Heavy packages in a fresh process after a statement."""
    code = f"import sys, json; {statement}; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("import understudy; assert 'distil' in understudy.__all__", set()),
        ("from understudy import GKD, Recipe, Run, distil, evaluate, sample, train", set()),
        ("import understudy.cli.commands, understudy.cli.recording, understudy.serve, understudy.linear", set()),
        ("from understudy.methods import GKD; GKD().for_run(10, 64).uses(10)", set()),
        ("from understudy.types import torch; torch.zeros(1)", {"torch"}),
    ],
)
def test_imports_stay_light(statement: str, allowed: set[str]) -> None:
    assert loaded_by(statement) == allowed


def test_a_tokenizer_needs_no_compiler(tmp_path: Path) -> None:
    """The import of a model's class takes as long as that of torch, for a tokenizer that does not ask for it."""
    from understudy.tasks import Arithmetic

    Arithmetic().tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 8}))
    statement = "import understudy.models as models; models.load_tokenizer(PATH); print(models.positions_on_disk(PATH))"
    code = f"import sys; {statement.replace('PATH', repr(str(tmp_path)))}; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["8", "False"]


PLAIN = "run_dir: {folder}/run\nstudent: {model: {model}}\ntask: {task}\nmethod: {method}\ntrain: {train}\n"
GOOD = {"model": "{folder}", "task": "{type: arithmetic}", "method": "{type: sft}", "train": "{steps: 2}"}
SAID = [
    ({}, "train {folder}/other.yaml", "there is no recipe"),
    ({"train": "{steps: 2"}, "train RECIPE", "not valid YAML"),
    ({"train": "{stepz: 2}"}, "train RECIPE", "train.stepz: unknown key"),
    ({"method": "{type: gkd}"}, "train RECIPE", "the method GKD needs a teacher"),
    ({}, "train RECIPE train.steps=no", "train.steps is"),
    ({"model": "{folder}/nowhere"}, "train RECIPE", "no model directory"),
    ({}, "train RECIPE", "has no config.json"),
    ({"task": "{type: jsonl, path: {folder}/nowhere.jsonl, prompt_field: p}"}, "train RECIPE", "there is no file"),
    ({}, "train RECIPE run_dir={folder}", "is not empty"),
    ({}, "train RECIPE --dry-run", "has no config.json"),
    ({}, "train RECIPE --resume", "no run"),
    ({"train": "{stepz: 2}"}, "doctor RECIPE", "unknown key"),
    ({}, "doctor RECIPE", "1 error"),
    ({"train": "{stepz: 2}"}, "eval RECIPE", "unknown key"),
    ({}, "sample RECIPE --split nowhere", "--split is"),
    ({}, "record RECIPE --out {folder}/out", "no teacher"),
    ({}, "compare RECIPE --vary method.typ=sft,opd", "typ"),
    ({}, "report {folder}", "is not a run directory"),
    ({}, "methods nowhere", "no method"),
    ({}, "init RECIPE", "exists"),
    ({}, "serve-teacher {folder}/nowhere", "no model directory"),
]
"""Changes of `GOOD`, a command, and words of its output."""
RUN_ALL = """
import contextlib, io, json, sys
from understudy.cli.app import main

heavy, commands = json.load(sys.stdin)
ended = []
for words in commands:
    sys.argv[1:], said = words, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as end:
            assert end.code, words
    ended.append([said.getvalue(), [name for name in heavy if name in sys.modules]])
print(json.dumps(ended))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, list[str]]]:
    """Output of each command of `SAID`, and the heavy packages loaded by then: one process runs all in turn."""
    commands = []
    for changes, command, _ in SAID:
        folder = tmp_path_factory.mktemp("recipe")
        recipe = PLAIN
        for name, value in (GOOD | changes).items():
            recipe = recipe.replace("{" + name + "}", value)
        (folder / "recipe.yaml").write_text(recipe.replace("{folder}", str(folder)))
        filled = command.replace("{folder}", str(folder)).replace("RECIPE", str(folder / "recipe.yaml"))
        commands.append(filled.split())
    run = [sys.executable, "-c", RUN_ALL]
    done = subprocess.run(run, input=json.dumps([HEAVY, commands]), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[tuple[str, list[str]]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("number", range(len(SAID)), ids=[f"{command}-{message}" for _, command, message in SAID])
def test_what_needs_no_torch_is_said_without_it(said: list[tuple[str, list[str]]], number: int) -> None:
    text, loaded = said[number]
    assert SAID[number][2] in text
    assert loaded == []


def test_help_answers_at_once() -> None:
    """No heavy import for `--help`, and every command says what it does."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "understudy", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"UNDERSTUDY_STARTED": "1"},
    )
    assert "| torch" not in done.stderr
    commands = (
        "train",
        "eval",
        "sample",
        "record",
        "report",
        "compare",
        "methods",
        "init",
        "doctor",
        "schema",
        "serve-teacher",
    )
    assert all(name in done.stdout for name in commands)


def test_process_settings_are_for_cpus_and_leave_the_users_own() -> None:
    from understudy.cli import DONE, FOR_CPU, settings_for

    assert settings_for({}, linux=True, gpu=True) == {}
    assert settings_for({}, linux=False, gpu=False) == {}
    assert settings_for({DONE: "1"}, linux=True, gpu=False) == {}
    added = settings_for({"GOMP_SPINCOUNT": "5"}, linux=True, gpu=False)
    assert added.keys() == {DONE, *FOR_CPU} - {"GOMP_SPINCOUNT"}


def test_a_rank_leaves_with_its_status_after_what_others_do_at_exit() -> None:
    """It does not finalize the interpreter, in which a thread of gloo may abort it."""
    program = (
        "import atexit, sys, types\n"
        "from understudy.cli import entry\n"
        "class Kept:\n"
        "    def __del__(self): print('finalized')\n"
        "kept = Kept()\n"
        "def main():\n"
        "    atexit.register(print, 'registered later')\n"
        "    sys.exit(7)\n"
        "sys.modules['understudy.cli.app'] = types.SimpleNamespace(main=main)\n"
        "entry()\n"
    )
    for world, said in (("2", "registered later\n"), ("1", "registered later\nfinalized\n")):
        done = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"UNDERSTUDY_STARTED": "1", "WORLD_SIZE": world, "PYTHONUNBUFFERED": ""},
        )
        assert done.returncode == 7, done.stderr
        assert done.stdout == said


def test_every_file_of_the_package_is_installed_with_it() -> None:
    """A file that `package-data` forgets is there in a checkout and missing after `pip install`."""
    root = Path(__file__).parents[2]
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = root / "src" / "understudy"
    installed = {path for pattern in settings["understudy"] for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == installed
