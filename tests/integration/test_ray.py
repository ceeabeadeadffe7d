"""Runs on local Ray clusters: they train as under torchrun, survive the death of every part, and leave nothing behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.engine_stub import EngineStub
from tests.processes import Process, command_line, run_ranks
from tests.runs import distillation, metric_rows, tiny_recipe, train_all, write_recipe
from understudy import config
from understudy.errors import EngineError, RecipeError, TrainingError
from understudy.launchers import Ray
from understudy.launchers.section import rank_keys
from understudy.recipe import Recipe

STUB = [sys.executable, "-m", "tests.engine_stub", "{model}", "--port", "{port}"]
DEADLINE_S = 500.0
RAY = {
    # statistics of its use go to the network
    "RAY_USAGE_STATS_ENABLED": "0",
    # on a loaded machine its own processes take long to start
    "RAY_raylet_start_wait_time_s": "400",
    "RAY_gcs_server_request_timeout_seconds": "400",
}


def launched(folder: Path, **changes: Any) -> dict[str, Any]:
    """Changes that make the tiny recipe a run of two ranks in shards, one rollout server and one served teacher."""
    return distillation(
        folder,
        rollout={"type": "vllm", "launch": {"command": STUB}, "dtype": "float32"},
        launcher={"type": "ray", "ranks": 2, "rank_gpus": 0, "engine_gpus": 0, "teacher_gpus": 0, "teachers": 1},
        parallel={"shard": 2},
        train={"steps": 16, "save_every": 4},
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


def wait_until(condition: Callable[[], object], run: Process | None = None) -> None:
    until = time.monotonic() + DEADLINE_S
    while not condition():
        said = "" if run is None else run.output
        assert run is None or run.poll() is None, said
        assert time.monotonic() < until, said
        time.sleep(0.05)


def starts(folder: Path, rank: int) -> list[list[str]]:
    """Process of each start of a rank, and that of its node."""
    file = folder / f"started_{rank}"
    return [line.split() for line in file.read_text().splitlines()] if file.is_file() else []


@contextmanager
def started(folder: Path, function: Callable[..., None], *arguments: object) -> Iterator[Process]:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("NO RAY CLUSTER WAS TESTED: pip install 'understudy[ray]'")
    run = Process(function, *arguments, log=folder / "driver.log", **RAY)
    try:
        yield run
    finally:
        run.kill()


@pytest.mark.slow
def test_two_ranks_train_as_under_torchrun_and_survive_the_death_of_every_part(tmp_path: Path) -> None:
    changes, run_dir = launched(tmp_path), tmp_path / "run"
    path = write_recipe(tmp_path, **changes)
    teacher, engine = changes["teacher"]["model"], changes["student"]["model"]

    def steps() -> int:
        file = run_dir / "metrics.jsonl"
        return len(file.read_text().splitlines()) if file.is_file() else 0

    with started(tmp_path, command_line, "train", path) as run:
        wait_until(lambda: steps() >= 2, run)
        (teacher_pid,), (engine_pid,) = processes(teacher), processes(engine)
        # the teacher with its actor, which is the parent of its supervisor
        os.kill(parent(parent(teacher_pid)), signal.SIGKILL)
        os.kill(engine_pid, signal.SIGKILL)
        wait_until(lambda: run.output.count("is started again") == 2, run)
        before = steps()
        wait_until(lambda: steps() >= before + 2, run)
        os.kill(processes(str(path))[-1], signal.SIGKILL)
        assert run.wait(DEADLINE_S) == 0, run.output
    words = ("teacher_0 was lost with its actor", "engine_0 ended with status 137", "from the last checkpoint")
    assert all(one in run.output for one in words), run.output
    assert {one.stem for one in run_dir.glob("*.log")} == {"rank_0", "rank_1", "engine_0", "teacher_0"}
    assert config.read_yaml(run_dir / "recipe.yaml")["teacher"]["type"] == "served"
    # nothing goes on
    assert not [*processes(teacher), *processes(engine), *processes(str(path))]
    # the same with a teacher in each rank, as torchrun starts them
    with EngineStub(engine) as stub:
        rollout = {"type": "vllm", "url": stub.url, "dtype": "float32"}
        write_recipe(tmp_path / "plain", **changes | {"rollout": rollout, "launcher": None})
        run_ranks(train_all, tmp_path / "plain", folder=tmp_path / "ranks")
    rows, plain = metric_rows(run_dir), metric_rows(tmp_path / "plain" / "run")
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in plain], rel=0, abs=1e-5)


RANKS = {
    # what hangs where another rank has failed is killed, and that is no loss
    "fails": 'if [ $RANK = 1 ]; then trap "" TERM; sleep 100; fi; exit 3',
    "is killed": 'if [ $RANK = 1 ]; then exec sleep 100; fi; echo "$@" >> words; kill -9 $$',
    "has no server": "exit 0",
    "has no room": "exit 0",
    "loses its machine": "echo $$ $RAY_RAYLET_PID >> started_$RANK; sleep 1000",
}
"""What the ranks of a run do, in shell."""


def play(folder: Path) -> None:
    """Runs two ranks of each kind on a cluster of three nodes; writes what it returned or raised."""
    import threading

    from ray.cluster_utils import Cluster

    from understudy.engines.sections import ServerCommand
    from understudy.launchers import ray as launcher
    from understudy.launchers.section import Role
    from understudy.trainer.console import Console

    launcher.STOP_S = 1.0
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]

    def lose_a_machine(place: Path) -> None:
        wait_until(lambda: all(len(starts(place, rank)) == 1 for rank in range(2)))
        taken = {starts(place, rank)[0][1] for rank in range(2)}
        by_pid = {str(node.all_processes["raylet"][0].process.pid): node for node in nodes}
        cluster.remove_node(by_pid[next(pid for pid in by_pid if pid in taken)])

    for name, script in RANKS.items():
        place = folder / name
        place.mkdir()
        (place / "recipe.yaml").touch()
        os.chdir(place)
        if name == "loses its machine":
            threading.Thread(target=lose_a_machine, args=(place,), daemon=True).start()
        server = ServerCommand(command=["sh", "-c", "exit 7"], env={}, port=0, ready_timeout_s=60.0)
        servers = [Role(name="engine_0", gpus=0.0, server=server, place="rollout")] if "server" in name else []
        section = Ray(
            address=cluster.address,
            ranks={"has no room": 9, "has no server": 1}.get(name, 2),
            rank_gpus=0.0,
            max_restarts=1,
            wait_s=0.5 if name == "has no room" else 100.0,
        )
        try:
            ending: int | str = launcher.launch(section, place, servers, ["sh", "-c", script, "sh"], Console())
        except (RecipeError, TrainingError, EngineError) as error:
            ending = f"{type(error).__name__}: {error}"
        (place / "found.json").write_text(json.dumps(ending))


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one for each kind of ranks; the last command was killed when its ranks were started again."""
    folder = tmp_path_factory.mktemp("ray")
    with started(folder, play, folder) as run:
        last = folder / "loses its machine"
        wait_until(lambda: all(len(starts(last, rank)) == 2 for rank in range(2)), run)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("fails", 3),
        ("is killed", "TrainingError: ranks died more than launcher.max_restarts times"),
        ("has no room", "RecipeError: the Ray cluster had no room within 0.5 s: 9 processes take a CPU each"),
        ("has no server", "EngineError: engine_0 ended with status 7"),
    ],
)
def test_a_run_that_cannot_go_on_ends_with_one_error(played: Path, name: str, ending: int | str) -> None:
    found = json.loads((played / name / "found.json").read_text())
    assert found == ending or (isinstance(ending, str) and found.startswith(ending))


@pytest.mark.slow
def test_killed_ranks_go_on_from_the_last_checkpoint(played: Path) -> None:
    words = (played / "is killed" / "words").read_text().splitlines()
    assert ["--resume" in line for line in words] == [False, True]


@pytest.mark.slow
def test_ranks_are_placed_over_machines_and_again_where_one_is_lost(played: Path) -> None:
    found = [starts(played / "loses its machine", rank) for rank in range(2)]
    before, after = ({rank[time][1] for rank in found} for time in range(2))
    assert len(before) == len(after) == 2
    assert len(before & after) == 1


@pytest.mark.slow
def test_nothing_outlives_a_command_that_is_killed(played: Path) -> None:
    found = [starts(played / "loses its machine", rank) for rank in range(2)]
    wait_until(lambda: not any(psutil.pid_exists(int(pid)) for rank in found for pid, _ in rank))


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
    assert [role.name for role in recipe.launcher.servers(recipe.roles)] == ["engine_0", "teacher_0"]
    keys = rank_keys(recipe.launcher.servers(recipe.roles))
    ranks = config.parse(Recipe, config.override(tiny_recipe(tmp_path, **launched(tmp_path)), keys))
    assert ranks.launcher is None
    assert ranks.teacher is not None
    assert ranks.teacher.gives >= {"full", "topk", "sampled"}
    assert config.dump(ranks)["rollout"]["url"] == ["http://127.0.0.1:0"]
