"""A teacher and a judge behind a network that fails: the same losses where a run can go on, one clear error where not."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tests.chat_server import ChatServer, Request, Response, says
from tests.engine_stub import EngineStub
from tests.faults import (
    DEAD,
    HALF,
    HANG,
    NAN,
    NULL,
    PASS,
    TRUNCATED,
    WRONG_IDS,
    Fault,
    FaultProxy,
    Plan,
    latency,
    reset,
    seeded,
    status,
)
from tests.leaks import nothing_left
from tests.runs import assert_same_run, distillation, metric_rows, train

from understudy.errors import EngineError, ScoreError
from understudy.http.client import RetryPolicy

STEPS = 4
PATIENCE_S = 60.0
TRAIN = {"steps": STEPS, "prompts_per_step": 4, "save_every": 1}
PATIENT = {"timeout_s": 1.0, "deadline_s": 60.0, "max_retries": 8, "backoff_s": 0.01}
SHORT = PATIENT | {"max_retries": 2, "deadline_s": 4.0}
SCORES = "/v1/completions"
"""What is counted where the number of requests matters; how a server is asked is found out once beside it."""
PASSING = [
    latency(0.05),
    reset(),
    reset(middle=True),
    status(429, retry_after_s=0.1),
    status(500),
    status(503),
    HALF,
    TRUNCATED,
    HANG,
]
OF_SCORES = [WRONG_IDS, NAN, NULL]
"""What a judge that says a digit has no place for."""


def name_of(fault: Fault) -> str:
    return fault.kind


def every(nth: int, fault: Fault) -> Plan:
    return lambda number, _: fault if number % nth == 0 else PASS


def digit(request: Request, _: int) -> Response:
    """A function of the question alone."""
    return says(str(hashlib.sha256(request.question.encode()).digest()[0] % 10))


@dataclass(frozen=True)
class World:
    """A served teacher, a judge, and the changes of a recipe that uses one of them."""

    folder: Path
    served: str
    written: str
    """Address of the engine."""
    judge: str
    models: dict[str, Any]

    def http(self, *urls: str, **keys: Any) -> dict[str, Any]:
        section = {
            "type": "http",
            "api": "vllm",
            "url": list(urls or [self.served]),
            "model": self.models["teacher"]["model"],
        }
        return self.models | {"teacher": section | PATIENT | keys, "method": {"type": "opd"}, "train": TRAIN}

    def engine(self, url: str = "", **keys: Any) -> dict[str, Any]:
        """Samples by an engine, scores by the teacher."""
        section = {"type": "vllm", "url": url or self.written, "weights": "directory"} | PATIENT
        del section["backoff_s"]
        return self.http() | {"rollout": section | keys}

    def chat(self, url: str = "", **keys: Any) -> dict[str, Any]:
        section = {"type": "chat", "url": url or self.judge, "model": "judge", "constrain": "none"}
        return self.models | {
            "teacher": section | PATIENT | keys,
            "method": {"type": "ovd"},
            "responses": {"type": "solutions"},
            "task": {"num_solutions": 50},
            "train": TRAIN | {"samples_per_prompt": 2},
        }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    models = distillation(folder)
    with (
        EngineStub(models["teacher"]["model"]) as teacher,
        EngineStub(models["student"]["model"]) as engine,
        ChatServer(digit) as judge,
    ):
        yield World(folder, teacher.url, engine.url, judge.url, models)


@pytest.fixture(scope="module")
def scored(world: World) -> Path:
    """The run with the teacher that nothing disturbs."""
    return train(world.folder / "scored", **world.http())


@pytest.fixture(scope="module")
def judged(world: World) -> Path:
    """The same with the judge."""
    return train(world.folder / "judged", **world.chat())


@pytest.fixture(scope="module")
def written(world: World) -> Path:
    """The same with an engine that writes the samples."""
    return train(world.folder / "written", **world.engine())


@contextmanager
def behind(plan: Plan, upstream: str) -> Iterator[FaultProxy]:
    """A proxy, and nothing left of it or of what was run in the block."""
    with nothing_left(), FaultProxy(upstream, plan, only="completions") as proxy:
        yield proxy


# --- what passes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [*PASSING, *OF_SCORES], ids=name_of)
def test_a_teachers_passing_fault_changes_nothing(fault: Fault, world: World, scored: Path, tmp_path: Path) -> None:
    with behind(every(3, fault), world.served) as proxy:
        run = train(tmp_path, **world.http(proxy.url))
    assert proxy.seen[fault.kind] > 1
    assert_same_run(run, scored)


@pytest.mark.parametrize("fault", [reset(), status(429, retry_after_s=0.1), TRUNCATED, HANG], ids=name_of)
def test_a_judges_passing_fault_changes_nothing(fault: Fault, world: World, judged: Path, tmp_path: Path) -> None:
    """Its client is that of the teacher, which meets all of them; a judge meets one of each kind."""
    # it is asked once for each sample, and each silence takes a second
    with behind(every(9 if fault is HANG else 3, fault), world.judge) as proxy:
        run = train(tmp_path, **world.chat(proxy.url))
    assert proxy.seen[fault.kind] > 1
    assert_same_run(run, judged)


@pytest.mark.parametrize("fault", [reset(), HALF, WRONG_IDS], ids=name_of)
def test_an_engines_passing_fault_changes_nothing(
    fault: Fault, world: World, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the section of an engine has no key for it, and the default waits half a second before each of many retries
    monkeypatch.setattr(RetryPolicy, "wait_s", lambda *_: PATIENT["backoff_s"])
    with behind(every(3, fault), world.written) as proxy:
        run = train(tmp_path, **world.engine(proxy.url))
    assert proxy.seen[fault.kind] > 1
    assert_same_run(run, written)


def test_all_of_them_at_once(world: World, scored: Path, tmp_path: Path) -> None:
    """One request for each sample, many in flight."""
    with behind(seeded(5, [*PASSING, WRONG_IDS], share=0.5), world.served) as proxy:
        run = train(tmp_path, **world.http(proxy.url, batch_tokens=1, max_retries=30))
    assert len(proxy.seen) > 5
    assert_same_run(run, scored)


@pytest.mark.parametrize("dies_at", [0, 2])
def test_one_dead_replica_of_two(dies_at: int, world: World, scored: Path, tmp_path: Path) -> None:
    with (
        nothing_left(),
        FaultProxy(world.served, only=SCORES) as other,
        FaultProxy(world.served, only=SCORES) as dying,
    ):
        dying.plan = lambda number, _: DEAD if number >= dies_at else PASS
        run = train(tmp_path, **world.http(dying.url, other.url, batch_tokens=1))
    assert dying.seen["dead"] > 0
    assert dying.seen["pass"] == dies_at
    assert other.seen["pass"] == 4 * STEPS - dies_at
    assert_same_run(run, scored)


# --- what does not -----------------------------------------------------------------------------------------------------


def check_end(error: BaseException, *urls: str) -> None:
    """One error, which names every server and shows no traceback of another."""
    assert all(url in str(error) for url in urls), str(error)
    assert error.__cause__ is None
    assert error.__suppress_context__ or error.__context__ is None


@pytest.mark.parametrize("replicas", [1, 2])
def test_all_dead_and_alive_again(replicas: int, world: World, scored: Path, tmp_path: Path) -> None:
    with nothing_left(), ExitStack() as stack:
        plan: Plan = lambda number, _: DEAD if number >= 2 // replicas else PASS  # noqa: E731
        proxies = [stack.enter_context(FaultProxy(world.served, plan, only=SCORES)) for _ in range(replicas)]
        changes = world.http(*(proxy.url for proxy in proxies), **SHORT)
        with pytest.raises(EngineError) as caught:
            train(tmp_path, **changes)
        check_end(caught.value, *(proxy.url for proxy in proxies))
        assert len(metric_rows(tmp_path / "run")) == 2
        for proxy in proxies:
            proxy.plan = lambda *_: PASS
            proxy.revive()
        run = train(tmp_path, resume=True, **changes)
    assert_same_run(run, scored)


def test_a_dead_judge_and_alive_again(world: World, judged: Path, tmp_path: Path) -> None:
    with behind(lambda number, _: DEAD if number >= 20 else PASS, world.judge) as proxy:
        changes = world.chat(proxy.url, **SHORT)
        with pytest.raises(EngineError) as caught:
            train(tmp_path, **changes)
        check_end(caught.value, proxy.url)
        assert 0 < len(metric_rows(tmp_path / "run")) < STEPS
        proxy.plan = lambda *_: PASS
        proxy.revive()
        run = train(tmp_path, resume=True, **changes)
    assert_same_run(run, judged)


@pytest.mark.parametrize("fault", [WRONG_IDS, TRUNCATED, HALF, status(500), reset()], ids=name_of)
def test_what_stays_is_one_error(fault: Fault, world: World, tmp_path: Path) -> None:
    with behind(lambda *_: fault, world.served) as proxy:
        with pytest.raises(EngineError) as caught:
            train(tmp_path, **world.http(proxy.url, **SHORT))
        check_end(caught.value, proxy.url)
    assert proxy.seen[fault.kind] == 3


def test_numbers_that_stay_wrong_are_an_error(world: World, tmp_path: Path) -> None:
    with behind(lambda *_: NAN, world.served) as proxy, pytest.raises(ScoreError, match=r"sample .*not finite"):
        train(tmp_path, **world.http(proxy.url))


def by_content(share: int) -> Plan:
    """NaN for the same samples, however often they are asked about."""
    return lambda _, body: NAN if hashlib.sha256(body).digest()[0] % share == 0 else PASS


def test_or_are_dropped_and_counted(world: World, scored: Path, tmp_path: Path) -> None:
    with behind(by_content(3), world.served) as proxy:
        changes = world.http(proxy.url, batch_tokens=1)
        changes["train"] = TRAIN | {"on_missing_score": "drop"}
        rows = metric_rows(train(tmp_path, **changes))
    dropped = [row["samples_dropped"] for row in rows]
    assert 0 < sum(dropped) < STEPS * 4
    assert proxy.seen["nan"] == 3 * sum(dropped)
    first = next(step for step, number in enumerate(dropped) if number)
    assert [row["loss"] for row in rows[:first]] == [row["loss"] for row in metric_rows(scored)[:first]]


# --- Ctrl-C ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [None, {"max_staleness": 0}], ids=["in turns", "overlapped"])
def test_an_interrupt_while_all_hangs_leaves_nothing(
    overlap: dict[str, Any] | None, world: World, tmp_path: Path
) -> None:
    """What hangs is left, and done again when the run is resumed."""

    def press() -> None:
        until = time.monotonic() + PATIENCE_S
        while not proxy.seen["hang"] and time.monotonic() < until:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    with nothing_left(), FaultProxy(world.served, lambda number, _: HANG if number >= 2 else PASS) as proxy:
        changes = world.engine() | {"async": overlap}
        changes["teacher"] = world.http(proxy.url, timeout_s=PATIENCE_S)["teacher"]
        thread = Thread(target=press)
        thread.start()
        run = train(tmp_path, **changes)
        assert json.loads((run / "run.json").read_text())["status"] == "stopped by a signal"
        thread.join()
        proxy.plan = lambda *_: PASS
        run = train(tmp_path, resume=True, **changes)
    assert_same_run(run, train(tmp_path / "undisturbed", **world.engine() | {"async": overlap}))
