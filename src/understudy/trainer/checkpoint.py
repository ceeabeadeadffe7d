"""The directory of a run, and its checkpoints: each a directory that is complete or not there.

    step_000100/student/               the model and its tokenizer, as Hugging Face or PEFT loads them
    step_000100/optimizer.safetensors  the optimizer's state by parameter name
    step_000100/optimizer/             the same in shards, by torch.distributed.checkpoint: each rank writes its part
    step_000100/teacher.safetensors    state of a teacher that follows the student; most have none
    step_000100/progress.json          steps, data position, best evaluation, fingerprints of the inputs
    step_000100/run_files.json         the same of the run's metrics, evaluations and samples until then
    step_000100/files.json             size and SHA-256 of every file of the checkpoint

A checkpoint is written under another name, synced file by file, and renamed. Random numbers and schedules are functions
of (seed, step), so the step is all of their state.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from understudy.errors import CheckpointError, RecipeError
from understudy.files import LOCK, Hashed, by_step, check_writable, compare_files, hash_file
from understudy.lazy import Tensor, safetensors, torch

FORMAT = 1
_FILES, _PROGRESS, _OPTIMIZER, STUDENT = "files.json", "progress.json", "optimizer.safetensors", "student"
_TEACHER, _SHARDS, _RUN_FILES = "teacher.safetensors", "optimizer", "run_files.json"


LOGS = ("engine_*.log", "rank_*.log", "teacher*.log")
"""Logs of the processes that a run starts."""


@dataclass(frozen=True)
class Progress:
    """The state of a run beside its weights. Written with every checkpoint."""

    step: int = 0
    """Steps done."""
    updates: int = 0
    """Optimizer updates made: all steps but the skipped ones."""
    position: int = 0
    """Prompts passed (`PromptStream`)."""
    skipped_in_row: int = 0
    """Skipped steps since the last update."""
    empty_in_row: int = 0
    """Steps since the last one that had a sample to train on."""
    num_samples: int = 0
    num_tokens: int = 0
    """Samples and response tokens so far."""
    elapsed_s: float = 0.0
    best_step: int | None = None
    best_value: float | None = None
    """The highest avg@k so far and its step."""
    inputs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Fingerprints of what the run reads, by place in the recipe: `digest` decides, the rest says what changed."""

    def evaluated(self, value: float) -> Progress:
        """With this step's avg@k as the best one if it is."""
        is_best = self.best_value is None or value > self.best_value
        return replace(self, best_step=self.step, best_value=value) if is_best else self


class RunDir:
    """Paths under one run.

    recipe.yaml    the resolved recipe          metrics.jsonl  numbers of every step
    run.json       versions, device, ending     events.jsonl   warnings and skipped steps
    doctor.json    checks before the first step of the process that wrote it last
    report.html    student/  the final student, a Hugging Face directory
    eval/step_000100.json and .jsonl            samples/step_000100.jsonl
    tokens/step_000100.jsonl                    pictures.jsonl
    checkpoints/step_000100/                    bad_batches/
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / "recipe.yaml"
        self.facts = path / "run.json"
        self.doctor = path / "doctor.json"
        self.eval = path / "eval"
        self.samples = path / "samples"
        self.tokens = path / "tokens"
        self.bad_batches = path / "bad_batches"
        self.checkpoints = path / "checkpoints"
        self.student = path / "student"
        self.check_kept: Callable[[], None] = lambda: None
        """Raises CheckpointError where the directory is no longer the one that this process has locked."""
        self._hashed: dict[tuple[str, int, int], Hashed] = {}

    def hash_files(self, whole: bool = False) -> dict[str, Hashed]:
        """Size and SHA-256 of metrics, evaluations, samples and tokens; `whole`: also of what a resumed run writes anew."""
        names = (
            ["recipe.yaml", "doctor.json", *(f"{one}.jsonl" for one in ("events", "consumed", "pictures"))]
            if whole
            else []
        )
        files = [self.path / name for name in ("metrics.jsonl", *names)]
        for folder, suffix in product((self.eval, self.samples, self.tokens), (".json", ".jsonl")):
            files += by_step(folder, suffix).values()
        table = {}
        for file in files:
            if not file.is_file():
                continue
            facts, name = file.stat(), str(file.relative_to(self.path))
            key = name, facts.st_size, facts.st_mtime_ns
            if key not in self._hashed:
                self._hashed[key] = hash_file(file)
            table[name] = self._hashed[key]
        return table

    def check_files(self, checkpoint: Path) -> list[str]:
        """Returns the files of the run that were there when the checkpoint was written, and are missing.

        Raises CheckpointError that lists those that are others.
        """
        file = checkpoint / _RUN_FILES
        # lines are added behind it
        found = compare_files(self.path, json.loads(file.read_text()) if file.is_file() else {}, grows="metrics.jsonl")
        if changed := [name for name, what in found.items() if what == "was changed"]:
            raise CheckpointError(
                f"in {self.path} {', '.join(changed)} differ from what this run wrote until {checkpoint.name}; put them back, "
                "or move them away to go on without them"
            )
        return list(found)

    def check_new(self) -> None:
        """Raises RecipeError where a run, or anything else but traces of processes that did not start, is there already, and
        where it cannot be written."""

        def is_trace(path: Path) -> bool:
            if path.name == "weights" and path.is_dir():
                return not any(path.iterdir())
            return path.name == LOCK or any(map(path.match, LOGS))

        check_writable(self.path, "run_dir")
        if self.path.is_dir() and not all(map(is_trace, self.path.iterdir())):
            raise RecipeError(
                f"run_dir {self.path} exists and is not empty; continue it with --resume (resume=True from "
                "Python), or choose another run_dir"
            )

    def check_started(self) -> None:
        """Raises RecipeError where there is no run to continue."""
        if not self.recipe.is_file():
            raise RecipeError(f"there is no run to resume in {self.path}: it has no recipe.yaml")

    def drop_after(self, step: int) -> None:
        """Removes evaluations, samples and tokens of later steps, which a resumed run writes again."""
        try:
            for folder, suffix in product((self.eval, self.samples, self.tokens), (".json", ".jsonl")):
                # a killed process may leave a file that it was writing aside
                aside = by_step(folder, f"{suffix}.tmp").values()
                for file in [*aside, *(path for number, path in by_step(folder, suffix).items() if number > step)]:
                    file.unlink()
        except OSError as error:
            raise CheckpointError(f"cannot remove {error.filename}: {error.strerror}; remove it yourself") from error


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}"


def save_checkpoint(
    folder: Path,
    progress: Progress,
    optimizer: dict[str, Tensor] | Path,
    save_student: Callable[[Path], None],
    teacher: dict[str, Tensor],
    run_files: Mapping[str, Hashed],
) -> None:
    """Writes the checkpoint of `progress.step` unless it is there. Raises as `written_whole`; older checkpoints stay.

    `optimizer`: its state, or the directory of `save_shards`, which is moved. `run_files`: as
    `RunDir.hash_files`.
    """
    target = checkpoint_path(folder, progress.step)
    if target.is_dir():
        return
    with written_whole(target) as aside:
        save_student(aside / STUDENT)
        states = {_TEACHER: teacher} if teacher else {}
        if isinstance(optimizer, Path):
            optimizer.rename(aside / _SHARDS)
        else:
            states[_OPTIMIZER] = optimizer
        for name, state in states.items():
            # clones: safetensors refuses tensors that share memory
            safetensors.save_file({key: value.detach().cpu().clone() for key, value in state.items()}, aside / name)
        (aside / _PROGRESS).write_text(json.dumps({"format": FORMAT} | asdict(progress), indent=2))
        (aside / _RUN_FILES).write_text(json.dumps(run_files, indent=2))
        (aside / _FILES).write_text(json.dumps(_digest(aside), indent=2))


@contextmanager
def written_whole(target: Path) -> Iterator[Path]:
    """Gives a directory to write into, which becomes `target` once all of it is on the disk: no killed process leaves half.

    Raises CheckpointError if it cannot be written.
    """
    aside = target.with_name(f".writing-{target.name}")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        yield aside
        for path in [*aside.rglob("*"), aside]:
            _sync(path)
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        _sync(target.parent)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise CheckpointError(f"cannot write {target}: {error}; free space, then continue with --resume") from error
        raise


def find_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint; None where there is none."""
    found = _finished(folder)
    return found[-1] if found else None


def _finished(folder: Path) -> list[Path]:
    """Complete checkpoints, by step."""
    return [path for path in by_step(folder).values() if path.is_dir()]


def _dcp() -> Any:
    from torch.distributed import checkpoint

    return checkpoint


def save_shards(folder: Path, step: int, state: Mapping[str, Tensor], group: Any) -> Callable[[], Path]:
    """Begins to write each rank's part of the tensors, as they are now, to a directory beside the checkpoints that all ranks
    see. Returns a function that waits until all parts are written, gives the directory, and raises CheckpointError.

    A collective call; `group`: a process group for CPU tensors, which nothing else uses while parts are written.
    """
    dcp = _dcp()
    path = folder / f".writing-shards-{step:06d}"
    # a copy in host memory is made before this returns
    written = dcp.async_save(dict(state), storage_writer=dcp.FileSystemWriter(path), process_group=group)

    def wait() -> Path:
        try:
            written.result()
        except (OSError, dcp.CheckpointException) as error:
            raise CheckpointError(f"cannot write {path}: {error}; free space, then continue with --resume") from error
        return path

    return wait


def load_optimizer(path: Path, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The optimizer's state; of a checkpoint in shards what this rank holds of the parameters, which is a collective call.
    Call `load_checkpoint` first: it checks the files. Raises CheckpointError for the state of other parameters."""
    if not (path / _SHARDS).is_dir():
        found: dict[str, Tensor] = safetensors.load_file(path / _OPTIMIZER)
        return found
    dcp = _dcp()
    reader = dcp.FileSystemReader(path / _SHARDS)
    saved: Mapping[str, Any] = reader.read_metadata().state_dict_metadata
    state = {}
    for key, stored in saved.items():
        name = key.rpartition("/")[0]
        if name not in parameters:
            raise CheckpointError(f"the optimizer state belongs to other parameters, first {name!r}")
        parameter, dtype = parameters[name], stored.properties.dtype
        # the number of steps is a scalar, all else is in shards as the parameter is
        like = parameter.shape == stored.size
        state[key] = torch.zeros_like(parameter, dtype=dtype) if like else torch.zeros(stored.size, dtype=dtype)
    dcp.load(state, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    return state


def load_checkpoint(path: Path) -> Progress:
    """The state of the run beside the weights; the student lies in `path / STUDENT`.

    Raises CheckpointError where a file is missing or differs from what was written.
    """
    try:
        written, found = json.loads((path / _FILES).read_text()), _digest(path)
        if not isinstance(written, dict):
            raise ValueError(f"{_FILES} holds no table")
        wrong = sorted(name for name in written.keys() | found.keys() if written.get(name) != found.get(name))
        if wrong:
            raise ValueError(f"{', '.join(wrong)} differ from what was written")
        values = json.loads((path / _PROGRESS).read_text())
        if values.pop("format") != FORMAT:
            raise CheckpointError(f"checkpoint {path} is not of format {FORMAT}: resume with the version that wrote it")
        progress = Progress(**values)
        if checkpoint_path(path.parent, progress.step) != path:
            raise ValueError(f"it holds step {progress.step}")
        return progress
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged: {error}; delete it and resume from the one before"
        ) from error


def check_same_inputs(saved: Mapping[str, Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises CheckpointError that lists the inputs which are others than when the checkpoint was written."""
    changed = []
    for name in sorted(saved.keys() & found.keys()):
        before, after = saved[name], found[name]
        if before["digest"] != after["digest"]:
            # a server may move
            keys = [key for key in before if key not in ("digest", "source") and before[key] != after.get(key)]
            what = [f"{key} {before[key]}, now {after.get(key)}" for key in keys]
            what += [f"{key} is new" for key in after.keys() - before.keys()]
            same = f"{after['rows']} rows as before, but others" if "rows" in after else "another than before"
            # of a hundred files of weights a few tell enough
            more = f" and {len(what) - 3} more" if len(what) > 3 else ""
            changed.append(f"{name} ({after['source']}): {', '.join(what[:3]) or same}{more}")
    if changed:
        raise CheckpointError(
            f"what is read is not what this run began with: {'; '.join(changed)}. Put it back and resume, or begin a new run"
        )


def load_teacher_state(path: Path) -> dict[str, Tensor]:
    """State of a teacher that follows the student; empty for others. Call `load_checkpoint` first: it checks the file."""
    file = path / _TEACHER
    return safetensors.load_file(file) if file.is_file() else {}


def prune(folder: Path, keep_last: int, keep_step: int | None) -> None:
    """Removes all but the newest `keep_last` checkpoints and that of `keep_step`, and the rest of killed writes.

    Raises CheckpointError where that is not allowed.
    """
    for path in _finished(folder)[:-keep_last]:
        if keep_step is None or path != checkpoint_path(folder, keep_step):
            # renamed first: a removal that is cut short must not leave half a checkpoint under its name
            try:
                path.rename(folder / f".removing-{path.name}")
            except OSError as error:
                raise CheckpointError(f"cannot remove {path}: {error.strerror}; fix permissions") from error
    for path in [*folder.glob(".removing-*"), *folder.glob(".writing-*")]:
        shutil.rmtree(path, ignore_errors=True)


def _digest(folder: Path) -> dict[str, list[object]]:
    """`{file: [bytes, SHA-256]}` of every file but the list itself."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _FILES)
    return {str(path.relative_to(folder)): list(hash_file(path)) for path in files}


def _sync(path: Path) -> None:
    """Waits until a file or the list of a directory is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
