"""Trainer, engine and teacher killed in turn while all of them work: no prompt is skipped, none is used twice."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.leaks import nothing_left
from tests.processes import PATIENCE_S, Process, Server, command_line, stub
from tests.runs import distillation, metric_rows, write_recipe

STEPS, PROMPTS = 14, 4
MAX_STARTS = 12


class Training:
    """`understudy train` as a process."""

    def __init__(self, recipe: Path, run_dir: Path) -> None:
        self._recipe, self.run_dir = recipe, run_dir
        self._process: Process | None = None
        self.num_starts = 0
        self.errors: list[str] = []

    def start(self) -> None:
        """From the last checkpoint, where there is one; else anew."""
        self.num_starts += 1
        assert self.num_starts <= MAX_STARTS, self.errors
        resume = ["--resume"] if (self.run_dir / "recipe.yaml").is_file() else []
        command = ["train", self._recipe, "--no-doctor", *resume]
        self._process = Process(command_line, *command, log=self._recipe.with_name("train.log"))

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None

    @property
    def steps(self) -> int:
        """That are in its metrics."""
        path = self.run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.is_file() else 0

    def reach(self, step: int) -> None:
        """Waits for a step; a run that has ended with an error goes on where it stopped. Raises AssertionError when late."""
        until = time.monotonic() + PATIENCE_S
        while self.steps < step:
            self._go_on(until)
            time.sleep(0.01)

    def finish(self) -> None:
        """Waits for its end."""
        until = time.monotonic() + PATIENCE_S
        while self._process is not None:
            self._go_on(until)
            time.sleep(0.02)

    def _go_on(self, until: float) -> None:
        if self._process is None:
            return
        assert time.monotonic() < until, self._process.output
        code = self._process.poll()
        if code is None:
            return
        if code != 0:
            self.errors.append(self._process.output)
            self.start()
        else:
            self._process = None


@contextmanager
def at_work(folder: Path) -> Iterator[tuple[Training, Server, Server]]:
    """A trainer that starts, and its engine and teacher. Each step takes a few tenths of a second."""
    models = distillation(folder)
    engine_model, teacher_model = models["student"]["model"], models["teacher"]["model"]
    engine = stub(engine_model, folder / "engine.log", "--token-latency", "uniform:0.005:0.02")
    teacher = stub(teacher_model, folder / "teacher.log", "--latency", "uniform:0.01:0.1")
    with nothing_left(), ExitStack() as stack:
        for server in (engine, teacher):
            stack.callback(server.kill)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Server.start, (engine, teacher)))
        training = Training(write_recipe(folder, **models | changes(engine, teacher, teacher_model)), folder / "run")
        stack.callback(training.kill)
        training.start()
        yield training, engine, teacher


def changes(engine: Server, teacher: Server, teacher_model: str) -> dict[str, Any]:
    """RetryPolicy for a teacher that comes back, little for an engine, which comes back with other weights."""
    patient = {"timeout_s": 10.0, "deadline_s": 60.0, "max_retries": 10, "backoff_s": 0.5}
    hasty = {"timeout_s": 10.0, "deadline_s": 20.0, "max_retries": 1}
    return {
        "teacher": {"type": "http", "api": "vllm", "url": [teacher.url], "model": teacher_model} | patient,
        # in shared memory a killed run would leave them until it goes on, and a test beside this one would find them
        "rollout": {"type": "vllm", "url": [engine.url], "weights": "directory"} | hasty,
        "async": {"max_staleness": 2, "timeout_s": 60.0},
        "method": {"type": "opd"},
        "train": {"steps": STEPS, "prompts_per_step": PROMPTS, "save_every": 1, "save_samples_every": 1},
    }


def check_every_prompt_once(run_dir: Path) -> None:
    """By the run's own record and by the samples that it trained on."""
    lines = [json.loads(line) for line in (run_dir / "consumed.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    positions = [position for line in lines for position in line["positions"]]
    assert positions == list(range(STEPS * PROMPTS))
    assert [row["step"] for row in metric_rows(run_dir)] == list(range(1, STEPS + 1))
    prompts = [
        json.loads(line)["prompt_id"]
        for step in range(1, STEPS + 1)
        for line in (run_dir / "samples" / f"step_{step:06d}.jsonl").read_text().splitlines()
    ]
    assert len(prompts) == len(set(prompts)) == STEPS * PROMPTS


@pytest.mark.slow
def test_killed_in_turn(tmp_path: Path) -> None:
    with at_work(tmp_path) as (training, engine, teacher):
        training.reach(2)
        training.kill()
        training.start()
        training.reach(5)
        engine.kill()
        engine.start(wait=False)
        training.reach(8)
        teacher.kill()
        teacher.start(wait=False)
        training.reach(11)
        time.sleep(0.1)
        training.kill()
        training.start()
        training.finish()
    assert all("rollout engine" in error for error in training.errors), training.errors
    check_every_prompt_once(tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.tmp"))
    assert not list((tmp_path / "run" / "weights").rglob("*.safetensors"))
