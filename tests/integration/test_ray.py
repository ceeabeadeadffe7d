"""A run on a local Ray cluster: its rank, a rollout server and a teacher are actors, and it survives the death of each."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.processes import Process, command_line
from tests.runs import distillation, tiny_recipe, write_recipe
from understudy import config
from understudy.errors import RecipeError
from understudy.launchers import Ray
from understudy.recipe import Recipe

STUB = [sys.executable, "-m", "tests.engine_stub", "{model}", "--port", "{port}"]
DEADLINE_S = 180.0


def launched(folder: Path, **changes: Any) -> dict[str, Any]:
    """Changes that make the tiny recipe a run of one rank, one rollout server and one served teacher."""
    return distillation(
        folder,
        rollout={"type": "vllm", "launch": {"command": STUB}, "dtype": "float32"},
        launcher={"type": "ray", "rank_gpus": 0, "engine_gpus": 0, "teacher_gpus": 0, "teachers": 1},
        train={"steps": 24, "save_every": 4},
        **changes,
    )


def processes(word: str) -> list[int]:
    """Those whose command has the word, without their supervisors."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if word in words and not any("supervisor.py" in one for one in words):
            found.append(int(path.parent.name))
    return found


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for(condition: Callable[[], bool], run: Process) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        assert run.poll() is None, run.output
        assert time.monotonic() < until, run.output
        time.sleep(0.05)


@pytest.fixture
def started(tmp_path: Path) -> Iterator[tuple[Process, Path]]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("NO RAY CLUSTER WAS TESTED: pip install 'understudy[ray]'")
    path = write_recipe(tmp_path, **launched(tmp_path))
    # its usage statistics go to the network
    run = Process(command_line, "train", path, log=tmp_path / "driver.log", RAY_USAGE_STATS_ENABLED="0")
    try:
        yield run, tmp_path / "run"
    finally:
        run.kill()


@pytest.mark.slow
def test_a_run_survives_the_death_of_every_part(started: tuple[Process, Path]) -> None:
    run, run_dir = started

    def steps() -> int:
        file = run_dir / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.is_file() else 0

    wait_for(lambda: steps() >= 2, run)
    # the teacher with its actor, which is the parent of its supervisor
    (teacher,) = processes("serve-teacher")
    os.kill(parent(parent(teacher)), signal.SIGKILL)
    wait_for(lambda: "is started again" in run.output, run)
    before = steps()
    wait_for(lambda: steps() >= before + 3, run)
    (engine,) = processes("tests.engine_stub")
    os.kill(engine, signal.SIGKILL)
    before = steps()
    wait_for(lambda: steps() >= before + 3, run)
    (rank,) = [pid for pid in processes("--no-doctor") + processes("train") if "launcher=null" in cmdline(pid)][:1]
    os.kill(rank, signal.SIGKILL)
    assert run.wait() == 0, run.output
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 25))
    assert (run_dir / "student" / "model.safetensors").is_file()
    assert {path.name for path in run_dir.glob("*.log")} == {"rank_0.log", "engine_0.log", "teacher_0.log"}
    for words in ("teacher_0 was lost with its actor", "engine_0 ended with status 137", "from the last checkpoint"):
        assert words in run.output
    saved = config.read_yaml(run_dir / "recipe.yaml")
    assert saved["teacher"]["type"] == "served"
    # nothing goes on, and no token is written anywhere
    assert not processes("serve-teacher")
    assert not processes("tests.engine_stub")


def cmdline(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout": {"type": "vllm", "launch": {"env": {"CUDA_VISIBLE_DEVICES": "0"}}}}, "which GPUs a server has"),
        ({"student": {"build": {"architecture": "llama"}, "model": None}}, "but the student is built"),
    ],
)
def test_what_cannot_be_started_elsewhere_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    values = tiny_recipe(tmp_path, **launched(tmp_path)) | changes
    recipe = config.parse(Recipe, values)
    assert isinstance(recipe.launcher, Ray)
    with pytest.raises(RecipeError, match=message):
        recipe.launcher.servers(recipe.roles)


def test_ranks_are_given_addresses_and_a_token_by_name(tmp_path: Path) -> None:
    """Of the recipe's own servers and of a teacher that the ranks would load, and all else stays."""
    recipe = config.parse(Recipe, tiny_recipe(tmp_path, **launched(tmp_path)))
    assert recipe.launcher is not None
    servers = recipe.launcher.servers(recipe.roles)
    assert [role.name for role in servers] == ["engine_0", "teacher_0"]
    keys = recipe.launcher.keys(recipe.roles, servers)
    values = config.override(tiny_recipe(tmp_path, **launched(tmp_path)), keys)
    ranks = config.parse(Recipe, values)
    assert ranks.launcher is None
    assert ranks.teacher is not None
    assert ranks.teacher.gives >= {"full", "topk", "sampled"}
    assert config.dump(ranks)["rollout"]["url"] == ["http://127.0.0.1:1"]
