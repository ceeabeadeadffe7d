"""How the time and memory of a step grow, one quantity at a time, with a fitted exponent and a picture.

Steps are whole ones (generate, score, update) of tiny models (hidden 64, 2 layers, 8,192 entries, reverse KL over all of
them), each in a process of its own after a warm-up step with short responses. Time is processor seconds of one thread; memory
is by how much the step raises the peak of the process over that of the warm-up. The exponent is that of the power law through
the three largest points: 1 is proportional, 0 does not grow.

    python benchmarks/growth.py                # about fifteen minutes; writes docs/performance/growth*
    python benchmarks/growth.py length k       # some of them
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table
from shapes import save_model, words
from step import Case, Shape, run_ours, use_processor_seconds, write_prompts

from understudy.report import svg
from understudy.report.read import Series

OUT = Path(__file__).parents[1] / "docs" / "performance"
TINY = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 65_536}
FITTED = 3
"""Largest points through which an exponent is fitted."""


def case(
    *, samples: int = 32, tokens: int = 64, prompt: int = 32, vocab_size: int = 8_192, per_prompt: int = 1
) -> Case:
    """A step of so many samples; all prompts and all responses are of one length."""
    shape = Shape("", TINY, TINY, vocab_size, samples, tokens, (tokens, tokens), (prompt, prompt), steps=1)
    return Case(shape, per_prompt, ragged=False)


def powers(first: int, last: int, factor: int = 4) -> list[int]:
    found = [first]
    while found[-1] < last:
        found.append(found[-1] * factor)
    return found


AXES: Mapping[str, tuple[str, list[int], Callable[[int], Case]]] = {
    "tokens": (
        "response tokens of a step, in responses of 128",
        powers(1_024, 65_536),
        lambda value: case(samples=value // 128, tokens=128),
    ),
    "length": ("tokens of one response", powers(2_048, 32_768), lambda value: case(samples=1, tokens=value)),
    "k": ("K of top-K, 2,048 tokens", powers(16, 4_096), lambda _: case()),
    "vocabulary": ("vocabulary, 2,048 tokens", powers(4_096, 262_144), lambda value: case(vocab_size=value)),
    "samples": (
        "samples of each of 4 prompts of 256 tokens, responses of 32",
        powers(1, 64),
        lambda value: case(samples=4 * value, tokens=32, prompt=256, per_prompt=value),
    ),
    "teachers": ("teachers that share 64 samples", powers(1, 8, 2), lambda _: case(samples=64)),
}
"""Name -> title, values, and the step at a value."""


def run(axis: str, value: int, folder: Path) -> dict[str, float]:
    """Seconds by phase and GiB of one step."""
    chosen = AXES[axis][2](value)
    shape, num_teachers = chosen.shape, value if axis == "teachers" else 1
    tokenizer, draw = words(shape.vocab_size), random.Random(0)
    rows = [
        {
            "prompt": " ".join(f"t{draw.randrange(1, shape.vocab_size - 1)}" for _ in range(shape.prompt[0])),
            "teacher": f"teacher{number % num_teachers}",
        }
        for number in range(2 * chosen.num_prompts)
    ]
    write_prompts(folder, rows)
    save_model(folder / "student", shape.student, tokenizer)
    teachers = {}
    for number in range(num_teachers):
        save_model(folder / f"teacher{number}", shape.teacher, tokenizer, seed=1 + number)
        teachers[f"teacher{number}"] = {"type": "local", "model": str(folder / f"teacher{number}")}
    sections: dict[str, Any] = {"teacher": teachers["teacher0"]}
    if axis == "teachers" and num_teachers > 1:
        task = {"type": "jsonl", "path": str(folder / "prompts.jsonl"), "prompt_field": "prompt", "chat": False}
        sections = {"teacher": None, "teachers": teachers, "task": task | {"teacher_field": "teacher"}}
    if axis == "k":
        sections["method"] = {"type": "topk", "k": value}
    (row,) = run_ours(chosen, folder, **sections)
    return row | {"gib": row["gib"] - row["gib_before"]}


def exponent(values: list[int], measured: list[float]) -> float:
    """Slope of log(measured) over log(value), through the largest values; NaN where nothing was measured at all."""
    if min(measured[-FITTED:]) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(values[-FITTED:]), np.log(measured[-FITTED:]), 1)[0])


Found = dict[str, dict[int, dict[str, float]]]
"""By axis and value."""


def read() -> Found:
    """The points of the table in docs/."""
    found: Found = {}
    path = OUT / "growth.csv"
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                axis, value = row.pop("axis"), int(row.pop("value"))
                found.setdefault(axis, {})[value] = {name: float(number) for name, number in row.items()}
    return found


def write(found: Found) -> None:
    OUT.mkdir(exist_ok=True)
    names = ("generate", "score", "update", "step", "gib")
    with (OUT / "growth.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["axis", "value", *names])
        for axis in AXES:
            for value, row in sorted(found.get(axis, {}).items()):
                writer.writerow([axis, value, *(f"{row[name]:.4g}" for name in names)])


def show(found: Found) -> None:
    """The table, and a picture of the time."""
    table = Table("what grows", "from, to", "seconds", "exponent", "GiB", "exponent", box=box.MARKDOWN)
    lines = []
    for axis, (title, _, _) in AXES.items():
        points = sorted(found.get(axis, {}).items())
        if len(points) < FITTED:
            continue
        values, rows = [value for value, _ in points], [row for _, row in points]
        cells = []
        for name, form in (("step", ".2f"), ("gib", ".3f")):
            measured = [row[name] for row in rows]
            cells += [f"{measured[0]:{form}}, {measured[-1]:{form}}", f"{exponent(values, measured):.2f}"]
        table.add_row(title, f"{values[0]:,}, {values[-1]:,}", *cells)
        times = {value // values[0]: row["step"] / rows[0]["step"] for value, row in points}
        lines.append(svg.Line(axis, Series.of(times)))
    Console(width=140).print(table)
    chart = svg.Chart(
        "time of a step", "times the seconds of the smallest", lines, over="times the smallest", log_steps=True
    )
    svg.save(chart, OUT / "growth.svg")


def main() -> None:
    """Measures point by point; what is there of other axes stays."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"of {', '.join(AXES)}; none: all")
    parser.add_argument("--show", action="store_true", help="only draw what is measured")
    parser.add_argument("--point", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.axes) - set(AXES):
        parser.error(f"{', '.join(unknown)}: no such axis; they are {', '.join(AXES)}")
    if args.point is not None:
        use_processor_seconds()
        (args.folder / "found.json").write_text(json.dumps(run(args.axes[0], args.point, args.folder)))
        return
    found = read()
    for axis in [] if args.show else args.axes or AXES:
        found[axis] = {}
        for value in AXES[axis][1]:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, axis, "--point", str(value), "--folder", folder]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(f"{axis} {value} failed:\n{done.stderr[-3000:]}")
                found[axis][value] = row = json.loads((Path(folder) / "found.json").read_text())
            print(f"{axis} {value:,}: {row['step']:.2f} s, {row['gib']:.3f} GiB", flush=True)
            write(found)
    show(found)


if __name__ == "__main__":
    main()
