"""Accidents of a run: damaged files in its directory, and processes that are killed. Each has to end right or with one error.

    python scripts/accidents.py files            200 directories, each with one damaged, missing, swapped or stray file
    python scripts/accidents.py kills            50 runs, killed at random instants, some by two at once or on a full disk
    python scripts/accidents.py files --count 8 --seed 1

A resumed run is right when it ends bit-equal to one that nothing happened to; a report, when its page is that of the intact
run. Otherwise there is one error, or a warning that names the file. Exit code 1 where something else came of a case.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from understudy.compare.processes import PRELOAD
from understudy.models import build_causal_lm, save_hf
from understudy.tasks import build_tokenizer
from understudy.trainer.console import Console

STEPS, CUT = 6, 4
SAVED = {"eval": "step_*.json*", "samples": "step_*.jsonl", "tokens": "step_*.jsonl"}
PATIENCE_S = 240.0
CLOCKS = ("_s", "_gib")
"""Ends of the names of numbers that a clock or the memory gives."""


# --- a world -------------------------------------------------------------------------------------------------------------


def write_world(folder: Path, seed: int = 0, steps: int = STEPS) -> Path:
    """Two tiny models, and a recipe by which one learns from the other; its run directory is beside it."""
    tokenizer = build_tokenizer("addition")
    for name, width in (("student", 16), ("teacher", 32)):
        build = {"architecture": "llama", "hidden_size": width, "num_layers": 1, "num_heads": 2}
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        model = build_causal_lm(
            build | {"max_position_embeddings": 64}, vocab_size=len(tokenizer), seed=seed + width, **ids
        )
        save_hf(model, tokenizer, folder / name)
    recipe = {
        "run_dir": str(folder / "run"),
        "seed": seed,
        "student": {"model": str(folder / "student")},
        "teacher": {"type": "local", "model": str(folder / "teacher")},
        "task": {"type": "arithmetic", "family": "addition", "digits": 2},
        "method": {"type": "gkd"},
        "sampling": {"max_new_tokens": 12},
        "train": {"steps": steps, "prompts_per_step": 4, "save_every": 2, "save_samples_every": 1, "lr": 3e-3},
        "eval": {"every": 3, "problems": 4},
        "device": "cpu",
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


def command(*arguments: object) -> None:
    """`understudy ARGUMENTS` in this process. Raises SystemExit."""
    from understudy.cli.app import main

    sys.argv = ["understudy", *map(str, arguments)]
    main()


def run_here(*arguments: object) -> tuple[int, str]:
    """Exit code, and what was said."""
    out, code = io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(out):
        try:
            command(*arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return code, out.getvalue()


def outcome(run_dir: Path) -> dict[str, Any]:
    """Everything of a finished run that has to be the same whatever happened to it: weights bit by bit, numbers, samples."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    numbers = [{key: one for key, one in json.loads(line).items() if not key.endswith(CLOCKS)} for line in lines]
    files = {
        str(path.relative_to(run_dir)): path.read_bytes()
        for folder, pattern in SAVED.items()
        for path in (run_dir / folder).glob(pattern)
        # strays have other names
        if path.stem.removeprefix("step_").isdigit()
    }
    return {
        "weights": (run_dir / "student" / "model.safetensors").read_bytes(),
        "metrics": numbers,
        "status": json.loads((run_dir / "run.json").read_text())["status"],
        **files,
    }


class _Stopping(Console):
    """Sends Ctrl-C behind a step."""

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        super().update(step, metrics)
        if step == CUT:
            signal.raise_signal(signal.SIGINT)


def cut_run(path: Path) -> None:
    """A run that was stopped after step `CUT`, with its report."""
    from understudy import run
    from understudy.recipe import load_recipe
    from understudy.report.page import write_report

    ended = run.train(load_recipe(path), examine=False, console=_Stopping(io.StringIO()))
    assert ended.ending == "stopped by a signal", ended.ending
    write_report(ended.path)


# --- damaged files --------------------------------------------------------------------------------------------------------


def _edit(change: Callable[[bytes, random.Random], bytes]) -> Callable[[Path, Path, random.Random], None]:
    return lambda file, other, draw: _write(file, change(file.read_bytes(), draw)) and None


def _write(file: Path, content: bytes) -> int:
    return file.write_bytes(content)


def _flip(content: bytes, draw: random.Random) -> bytes:
    at = draw.randrange(len(content) or 1)
    return content[:at] + bytes([(content[at] if content else 0) ^ (1 << draw.randrange(8))]) + content[at + 1 :]


def _other_digit(content: bytes, draw: random.Random) -> bytes:
    """Still JSON, or YAML, with another number in it."""
    places = [at for at, byte in enumerate(content) if chr(byte).isdigit()]
    if not places:
        return content + b"1"
    at = draw.choice(places)
    return content[:at] + str((int(chr(content[at])) + 1) % 10).encode() + content[at + 1 :]


OTHER_KINDS: list[Any] = [[], {}, "x", None, True, -1, 1e308, 10**400, [[1]], {"a": {"b": []}}]


def _other_kind(content: bytes, draw: random.Random) -> bytes:
    """Still JSON, with a value of another kind in it; noise where it is none."""
    for parts in ([content], content.splitlines()):
        with suppress(ValueError, LookupError, TypeError):
            at = draw.randrange(len(parts))
            row = inner = json.loads(parts[at])
            while True:
                key = draw.choice([*inner] if isinstance(inner, dict) else range(len(inner)))
                if draw.random() < 0.4 or not (isinstance(inner[key], dict | list) and inner[key]):
                    break
                inner = inner[key]
            inner[key] = draw.choice(OTHER_KINDS)
            return b"\n".join([*parts[:at], json.dumps(row).encode(), *parts[at + 1 :]])
    return draw.randbytes(len(content))


def _swap(file: Path, other: Path, draw: random.Random) -> None:
    """With the file of that name in another run, or with a neighbour of its kind."""
    neighbours = [
        path for path in file.parent.iterdir() if path != file and path.suffix == file.suffix and path.is_file()
    ]
    if neighbours and (draw.random() < 0.5 or not other.is_file()):
        content, neighbour = file.read_bytes(), draw.choice(sorted(neighbours))
        file.write_bytes(neighbour.read_bytes())
        neighbour.write_bytes(content)
    elif other.is_file():
        file.write_bytes(other.read_bytes())


def _swap_folder(file: Path, other: Path, draw: random.Random) -> None:
    """A folder of the run with that of another, such as a checkpoint."""
    if other.parent.is_dir() and file.parent.name != "run":
        shutil.rmtree(file.parent)
        shutil.copytree(other.parent, file.parent)
    else:
        _swap(file, other, draw)


def _stray(file: Path, other: Path, draw: random.Random) -> None:
    """Copies beside it, as file managers, editors and people name them."""
    names = (" (copy)", ".bak", ".tmp", "~", ".orig")
    stem = draw.choice([f"{file.stem} (copy){file.suffix}", *(f"{file.name}{end}" for end in names), "step_best.json"])
    beside = file.with_name(stem)
    beside.write_bytes(file.read_bytes() if draw.random() < 0.5 else b"not JSON")
    if file.parent.name.startswith("step_"):
        shutil.copytree(file.parent, file.parent.with_name(f"{file.parent.name} (copy)"), dirs_exist_ok=True)
        beside.unlink()


def _folder_in_place(file: Path, other: Path, draw: random.Random) -> None:
    file.unlink()
    file.mkdir()


def _loop_in_place(file: Path, other: Path, draw: random.Random) -> None:
    file.unlink()
    file.symlink_to(file)


DAMAGES: dict[str, Callable[[Path, Path, random.Random], None]] = {
    "a bit flipped": _edit(_flip),
    "another digit": _edit(_other_digit),
    "a value of another kind": _edit(_other_kind),
    "truncated": _edit(lambda content, draw: content[: draw.randrange(len(content) or 1)]),
    "empty": _edit(lambda content, draw: b""),
    "noise": _edit(lambda content, draw: draw.randbytes(len(content))),
    "a list": _edit(lambda content, draw: b'[1, {"step": 1}]\n'),
    "a deep list": _edit(lambda content, draw: b"[" * 100_000),
    "more behind it": _edit(lambda content, draw: content + draw.randbytes(draw.randrange(1, 200))),
    "twice": _edit(lambda content, draw: content + content),
    "missing": lambda file, other, draw: file.unlink(),
    "swapped": _swap,
    "a swapped folder": _swap_folder,
    "a stray copy": _stray,
    "a folder in its place": _folder_in_place,
    "a loop in its place": _loop_in_place,
}


def damaged_files(count: int, seed: int, folder: Path) -> Counter[str]:
    """Counts what came of report, inspect and resume in `count` directories."""
    whole, other = write_world(folder / "whole"), write_world(folder / "other", seed=1)
    code, said = run_here("train", whole, "--no-doctor")
    assert code == 0, said
    expected = outcome(folder / "whole" / "run")
    shutil.rmtree(folder / "whole" / "run")
    for path in (whole, other):
        cut_run(path)
    intact = folder / "intact"
    (folder / "whole" / "run").rename(intact)
    shown, tokens = (intact / "report.html").read_text(), run_here("inspect", intact)[1]
    files = sorted(path for path in intact.rglob("*") if path.is_file() and path.name != "report.html")
    found: Counter[str] = Counter()
    kinds = list(DAMAGES)
    run_dir = folder / "whole" / "run"
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")  # noqa: S311 (not for secrets)
        kind, name = kinds[number % len(kinds)], draw.choice(files).relative_to(intact)
        for what in ("report", "inspect", "resume"):
            shutil.rmtree(run_dir, ignore_errors=True)
            shutil.copytree(intact, run_dir, symlinks=True)
            DAMAGES[kind](run_dir / name, folder / "other" / "run" / name, random.Random(f"{seed}/{number}"))  # noqa: S311
            if what == "report":
                (run_dir / "report.html").unlink(missing_ok=True)
                code, said = run_here("report", run_dir)
                page = run_dir / "report.html"
                is_right = page.is_file() and page.read_text() == shown
                said += page.read_text() if page.is_file() and "not recorded" in page.read_text() else ""
            elif what == "inspect":
                code, said = run_here("inspect", run_dir)
                is_right = said == tokens
            else:
                code, said = run_here("train", whole, "--no-doctor", "--resume")
                is_right = code == 0 and outcome(run_dir) == expected
            ended = judge(code, said, is_right, told=name.name)
            found[f"{what}: {ended}"] += 1
            if ended in BAD:
                print(f"{number}: {what}, {kind}, {name}: {ended}, exit code {code}\n{said[-1_500:]}\n", flush=True)
        if (number + 1) % 10 == 0:
            print(f"{number + 1} of {count}: {dict(found)}", flush=True)
    return found


BAD = ("TRACEBACK", "SILENT", "SEVERAL ERRORS")


def judge(code: int, said: str, is_right: bool, *, told: str) -> str:
    """One word for what came of a case."""
    if "Traceback (most recent call last)" in said:
        return "TRACEBACK"
    if code != 0:
        return "one error" if said.count("error: ") == 1 else "SEVERAL ERRORS"
    if is_right:
        return "right"
    return "a warning" if ("warning: " in said and told in said) or "not recorded" in said else "SILENT"


# --- killed processes -----------------------------------------------------------------------------------------------------


def _train(path: str, resume: bool, log: str, most_bytes: int | None) -> None:
    """A process of its own: trains, where files may not grow beyond `most_bytes`, which fails as a full disk does."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    torch.set_num_threads(1)
    if most_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, resource.RLIM_INFINITY))
    command("train", path, "--no-doctor", *(["--resume"] if resume else []))


@contextmanager
def started(path: Path, log: Path, most_bytes: int | None = None) -> Iterator[Any]:
    """A process that trains, or resumes where a run has begun. It is killed at the end of the context."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    resume = (path.parent / "run" / "recipe.yaml").is_file()
    process = context.Process(target=_train, args=(str(path), resume, str(log), most_bytes))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def killed_runs(count: int, seed: int, folder: Path) -> Counter[str]:
    """Counts what came of `count` runs, each killed several times before it may end."""
    model = write_world(folder / "whole", steps=12)
    begun = time.monotonic()
    with started(model, folder / "whole.log") as process:
        process.join(PATIENCE_S)
        assert process.exitcode == 0, (folder / "whole.log").read_text()
    length_s = time.monotonic() - begun
    expected = outcome(folder / "whole" / "run")
    largest = max(path.stat().st_size for path in (folder / "whole" / "run").rglob("*") if path.is_file())
    found: Counter[str] = Counter()
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")  # noqa: S311 (not for secrets)
        kind = ("one", "two at once", "a full disk")[number % 3]
        case = folder / f"case-{number}"
        # the same paths as in the recipe of the intact run
        path = case / "recipe.yaml"
        case.mkdir()
        path.write_text(model.read_text().replace(str(folder / "whole" / "run"), str(case / "run")))
        log = case / "log"
        for _ in range(3):
            most = int(math.exp(draw.uniform(math.log(200), math.log(largest)))) if kind == "a full disk" else None
            with started(path, log, most) as first:
                if kind == "two at once":
                    first.join(draw.uniform(0, 0.3))
                    with started(path, log) as second:
                        second.join(draw.uniform(0, length_s))
                        if draw.random() < 0.5:
                            first.kill()
                            second.join(draw.uniform(0, length_s / 2))
                else:
                    first.join(draw.uniform(0.2, length_s))
        # an error at loading may have left the directory as it was
        with started(path, log) as last:
            last.join(PATIENCE_S)
        said = log.read_text(errors="replace")
        is_right = last.exitcode == 0 and outcome(case / "run") == expected
        ended = "TRACEBACK" if "Traceback (most recent call last)" in said else "bit-equal" if is_right else "OTHER"
        refused = said.count("is in use by process")
        found[f"{kind}: {ended}"] += 1
        found["refused, as another process was there"] += refused
        if ended != "bit-equal":
            print(f"{number}: {kind}: {ended}, exit code {last.exitcode}\n{said[-3_000:]}\n", flush=True)
        else:
            shutil.rmtree(case)
        if (number + 1) % 5 == 0:
            print(f"{number + 1} of {count}: {dict(found)}", flush=True)
    return found


def main() -> int:
    """Returns 1 where a case ended otherwise than it has to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["files", "kills"])
    parser.add_argument("--count", type=int, help="cases (files: 200, kills: 50)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun, count = time.monotonic(), options.count or {"files": 200, "kills": 50}[options.what]
    with tempfile.TemporaryDirectory(prefix="accidents-") as folder:
        make = damaged_files if options.what == "files" else killed_runs
        found = make(count, options.seed, Path(folder))
    print(f"\n{count} cases of {options.what}, seed {options.seed}, in {time.monotonic() - begun:.0f} s")
    for name, times in sorted(found.items()):
        print(f"{times:6,}  {name}")
    bad = sum(times for name, times in found.items() if name.split(": ")[-1].isupper())
    print("all as they have to be" if not bad else f"{bad} are not as they have to be")
    return int(bad > 0)


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
