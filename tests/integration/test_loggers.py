"""Where the numbers of a run go, with the real packages behind every logger."""

from __future__ import annotations

import errno
import json
import math
import os
import sqlite3
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.runs import distillation, train
from understudy.errors import CheckpointError, RecipeError
from understudy.trainer.loggers import LOGGERS, Dashboard, JsonLines, Opened, check_loggers, make_loggers

pytestmark = pytest.mark.slow

RECIPE = {"method": {"type": "gkd"}, "teacher": {"api_key": "sk-very-private", "url": "http://me:pass@host/v1"}}


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_is_in_the_file_before_log_returns(tmp_path: Path) -> None:
    """What is not flushed dies with a killed process."""
    log = JsonLines(tmp_path / "metrics.jsonl")
    log.log(1, {"loss": 0.25, "tokens": 7})
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.25, "tokens": 7}]


def test_a_number_that_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    """Strict JSON has no NaN, and 0.0 would be a lie."""
    with_strict = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}
    log = JsonLines(tmp_path / "m.jsonl")
    log.log(1, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-3})
    line = json.loads((tmp_path / "m.jsonl").read_text(), **with_strict)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "lr": 1e-3, "nonfinite": ["loss", "grad_norm"]}


@pytest.mark.parametrize("name", ["step", "nonfinite"])
def test_a_metric_cannot_take_the_name_of_a_key(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        JsonLines(tmp_path / "m.jsonl").log(3, {name: 1.0})


@pytest.mark.parametrize("half", [b'{"step": 3, "lo', b'{"step": 3, "note": "' + b"x" * 200_000])
def test_the_half_line_of_a_killed_process_is_cut_off(tmp_path: Path, half: bytes) -> None:
    path = tmp_path / "m.jsonl"
    whole = b'{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n'
    path.write_bytes(whole + half)
    log = JsonLines(path)
    assert path.read_bytes() == whole
    log.log(3, {"loss": 0.25})
    assert [row["step"] for row in rows(path)] == [1, 2, 3]


def test_a_file_of_one_half_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"st')
    JsonLines(path)
    assert path.read_bytes() == b""


def test_resume_drops_later_lines_and_keeps_the_others_byte_by_byte(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    kept = b'{"step":1,  "loss": 1.00}\n{"step": 2, "loss": 5e-1}\n'
    path.write_bytes(kept + b'{"step": 3}\n{"step": 4}\n')
    log = JsonLines(path)
    log.truncate_after(2)
    assert path.read_bytes() == kept
    log.log(3, {"loss": 0.25})
    assert path.read_bytes() == kept + b'{"step": 3, "loss": 0.25}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_broken_line_is_named_with_its_number_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\nnonsense\n{"step": 3}\n')
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=r"m\.jsonl:2: not a JSON object with a step"):
        JsonLines(path).truncate_after(1)
    assert path.read_bytes() == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_clear_error() -> None:
    with pytest.raises(CheckpointError, match=r"cannot write /dev/full: No space left.*--resume"):
        JsonLines(Path("/dev/full")).log(1, {"loss": 1.0})


class _AlmostFull:
    """A file that takes a part of the line, as a raw write to a full disk does."""

    def write(self, line: bytes) -> int:
        return len(line) - 3

    def fileno(self) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_line_of_which_a_part_was_written_is_an_error(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "m.jsonl")
    log._file = _AlmostFull()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="only a part of the line"):
        log.log(1, {"loss": 1.0})
    with pytest.raises(CheckpointError, match="No space left"):
        log.sync()


def test_a_full_disk_while_resuming_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')
    log = JsonLines(path)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        log.truncate_after(1)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_an_unwritable_directory_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        JsonLines(tmp_path / "file" / "m.jsonl")


def test_the_metrics_of_a_resumed_run_are_those_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def run(path: Path, first: int, last: int, resume_step: int | None) -> None:
        (log,) = make_loggers(path, [], RECIPE, resume_step=resume_step, warn=pytest.fail)
        for step in range(first, last + 1):
            log.log(step, {"loss": 1 / step})
        log.close()

    run(tmp_path / "a", 1, 9, None)
    run(tmp_path / "b", 1, 7, None)
    run(tmp_path / "b", 5, 9, 4)
    assert (tmp_path / "b" / "metrics.jsonl").read_bytes() == (tmp_path / "a" / "metrics.jsonl").read_bytes()


def test_an_unknown_logger_names_the_nearest_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'tensorboard'"):
        make_loggers(tmp_path / "run", ["tensorbord"], RECIPE, warn=pytest.fail)
    assert not (tmp_path / "run").exists()


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install understudy\[wandb\]"):
        check_loggers(["wandb"])


class _Broken:
    calls = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.calls += 1
        raise ConnectionError("https://me:secret-password@host refused")

    def close(self) -> None:
        raise ConnectionError("still refused")


ROWS = [
    {"prompt": "2+2?", "response": "4", "score": 1.0, "reference": None},
    {"prompt": "2+3?", "response": "<b>6</b>", "score": None, "reference": "5", "reward": 0.0},
]
COLUMNS = ["prompt", "response", "score", "reference", "reward"]
DATA = [["2+2?", "4", 1.0, None, None], ["2+3?", "<b>6</b>", None, "5", 0.0]]


def test_samples_become_one_table_and_a_package_without_tables_gets_none() -> None:
    logged: list[Any] = []
    opened = Opened(lambda step, values: logged.append((step, values)), lambda: None)
    Dashboard("wandb", opened._replace(table=lambda **table: table), pytest.fail).samples(7, ROWS)
    Dashboard("tensorboard", opened, pytest.fail).samples(7, ROWS)
    assert logged == [(7, {"samples": {"columns": COLUMNS, "data": DATA}})]


def test_an_alarm_is_an_alert_where_the_package_has_alerts() -> None:
    sent: list[tuple[str, str]] = []
    opened = Opened(lambda step, values: None, lambda: None)
    Dashboard("wandb", opened._replace(alert=lambda title, text: sent.append((title, text))), pytest.fail).alert(
        "a", "b"
    )
    Dashboard("tensorboard", opened, pytest.fail).alert("a", "b")
    assert sent == [("a", "b")]


def test_a_run_sends_the_samples_that_it_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []
    service = Opened(lambda step, values: logged.append((step, values)), lambda: None, lambda **table: table)
    monkeypatch.setitem(LOGGERS, "wandb", lambda *_: service)
    changes = distillation(tmp_path / "models", loggers=["wandb"], train={"save_samples_every": 3})
    run_dir = train(tmp_path, **changes)
    tables = {step: values["samples"] for step, values in logged if "samples" in values}
    assert sorted(tables) == [1, 3, 6]
    assert {"prompt", "response", "score", "reference"} <= set(tables[3]["columns"])
    saved = rows(run_dir / "samples" / "step_000003.jsonl")
    assert tables[3]["data"] == [[row.get(name) for name in tables[3]["columns"]] for row in saved]


def test_a_dashboard_that_fails_is_told_once_and_the_run_goes_on() -> None:
    warnings: list[str] = []
    inner = _Broken()
    log = Dashboard("wandb", Opened(inner.log, inner.close), warnings.append)
    for step in (1, 2, 3):
        log.log(step, {"loss": 1.0})
    log.close()
    assert inner.calls == 3
    assert len(warnings) == 1
    assert "wandb failed at step 1" in warnings[0]
    assert "secret-password" not in warnings[0]


def test_a_service_that_cannot_be_started_is_a_recipe_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setitem(LOGGERS, "wandb", refuse)  # type: ignore[arg-type]
    pytest.importorskip("wandb")
    with pytest.raises(RecipeError, match=r"'wandb' could not be started .*no network"):
        make_loggers(tmp_path, ["wandb"], RECIPE, warn=pytest.fail)


def test_tensorboard_reads_back_every_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, resumed in ((1, 7, None), (5, 9, 4)):
        _, log = make_loggers(tmp_path, ["tensorboard"], RECIPE, resume_step=resumed, warn=pytest.fail)
        for step in range(first, last + 1):
            log.log(step, {"loss": 1 / step, "loss/term": math.nan if step == 2 else 0.5})
        log.close()
    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [event.step for event in read.Scalars("loss")] == list(range(1, 10))
    assert [event.value for event in read.Scalars("loss")] == pytest.approx(
        [1 / step for step in range(1, 10)], rel=1e-6
    )
    text = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"gkd" in text
    assert b"sk-very-private" not in text
    assert b"me:pass" not in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_wandb_offline_writes_a_run_and_resumes_it_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("CONFIG", "CACHE", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    run = tmp_path / "run"
    for first, last, resumed in ((1, 3, None), (3, 4, 2)):
        warnings: list[str] = []
        _, log = make_loggers(run, ["wandb"], RECIPE, resume_step=resumed, warn=warnings.append)
        for step in range(first, last + 1):
            log.log(step, {"loss": math.nan if step == 2 else 1 / step})
            log.samples(step, ROWS)
        log.close()
        assert not warnings
    identity = (run / "wandb" / "run-id").read_text()
    written = list((run / "wandb").rglob("*.wandb"))
    assert [path.name for path in written] == [f"run-{identity}.wandb"] * 2
    content = b"".join(path.read_bytes() for path in written)
    assert b"gkd" in content
    assert b"sk-very-private" not in content
    assert b"me:pass" not in content
    tables = [json.loads(path.read_text()) for path in (run / "wandb").rglob("*.table.json")]
    assert len(tables) == 5
    assert all(table["columns"] == COLUMNS and table["data"] == DATA for table in tables)


_TRACKIO_RUN = """
import math, sys
from pathlib import Path
from understudy.trainer.loggers import make_loggers

_, log = make_loggers(Path(sys.argv[1]), ["trackio"], {"teacher": {"api_key": "sk-very-private"}}, warn=sys.exit)
log.log(1, {"loss": 1.0})
log.log(2, {"loss": math.nan})
log.samples(2, [{"response": "4", "score": 1.0}, {"response": "5"}])
log.close()
"""


def test_trackio_keeps_the_numbers_on_this_machine(tmp_path: Path) -> None:
    """In its own process: Trackio reads TRACKIO_DIR when it is imported."""
    pytest.importorskip("trackio")
    home = tmp_path / "trackio"
    settings = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO_")}
    command = [sys.executable, "-c", _TRACKIO_RUN, str(tmp_path / "run")]
    done = subprocess.run(
        command, env=settings | {"TRACKIO_DIR": str(home)}, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    (file,) = home.rglob("understudy.db")
    with sqlite3.connect(file) as database:
        written = database.execute("select step, metrics from metrics order by step").fetchall()
    assert sorted({step for step, _ in written}) == [1, 2]
    tables = [values["samples"]["_value"] for _, text in written if "samples" in (values := json.loads(text))]
    assert tables == [[{"response": "4", "score": 1.0}, {"response": "5", "score": None}]]
    assert b"sk-very-private" not in b"".join(path.read_bytes() for path in home.rglob("*") if path.is_file())
