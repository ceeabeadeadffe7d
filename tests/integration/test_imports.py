"""What an import pulls in: the mathematics needs torch alone, and `--help` answers without it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

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
        ("import understudy", set()),
        ("import understudy.cli.app", set()),
        ("import understudy.cli", set()),
        ("import understudy.types", {"torch"}),
        ("import understudy.methods, understudy.linear", {"torch"}),
        ("import understudy.recipe", {"torch", "transformers"}),
    ],
)
def test_imports_stay_light(statement: str, allowed: set[str]) -> None:
    assert loaded_by(statement) <= allowed


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
