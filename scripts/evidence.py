"""The evidence: for each claim of the papers a small world, a grid of runs, and what the runs say. Goes on where it stopped.

    python scripts/evidence.py                  every claim, in some hours on two cores
    python scripts/evidence.py extrapolation    this claim and the models that it needs
    python scripts/evidence.py --draw           the tables and curves of docs/evidence.md from the data beside it

A claim is a folder of `recipes/evidence`: `claim.yaml` names the models that are trained first and the contrasts that decide,
`run.yaml` is what all runs share, `grid.yaml` what they differ in. The data go to `docs/evidence/CLAIM.csv`.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from understudy import config, evaluate
from understudy.eval.estimators import Estimate, crossed_mean, estimate_mean
from understudy.report import svg
from understudy.report.read import Series, read_run

RUNS, RECIPES, DATA = Path("runs/evidence"), Path("recipes/evidence"), Path("docs/evidence")
PAGE = Path("docs/evidence.md")
CURVES = {"accuracy": "accuracy", "gradient norm": "grad_norm", "entropy": "student_entropy"}
"""Drawn for each claim: what is on the axis, and its metric. Where pass@k is compared it is drawn over k too."""
MAX_POINTS = 40
"""Points of one curve in the data."""
COUNTS = ("distinct", "tokens")
"""Numbers that are no shares of problems."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Two rows of a grid and the number that they are compared by. It is shown where `more` has more of it than `less`."""

    says: str
    more: str
    less: str
    by: str = "accuracy"
    """"accuracy", "greedy" (accuracy at temperature 0), "samples" (the ratio of samples until `less` is as good as `more`
    ends), or a metric of the evaluation."""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """A quantity whose values are the first labels of the rows, for a picture of the accuracy over it."""

    over: str
    at: Mapping[str, int]
    """Label -> its place."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A file claim.yaml."""

    title: str
    source: str
    models: tuple[str, ...] = ()
    """Recipes that are trained before the grid, in order, below `recipes/evidence`."""
    merged: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Models made of weights: `{name: {start: DIR, experts: [DIR], scale: 1.0}}`, start + scale * mean(expert - start)."""
    evaluated: Mapping[str, str] = field(default_factory=dict)
    """Further rows: models that are evaluated as the runs are, by name."""
    problems: int | None = None
    """Test problems of one more evaluation of every finished student, which then decides about accuracy; None: the run's last
    evaluation does. It costs seconds a student, and the interval of a few hundred problems is wider than that of five seeds."""
    columns: tuple[str, ...] = ()
    """Further numbers of the table, beside accuracy and those of the contrasts: see `Finished.values`."""
    axis: Axis | None = None
    contrasts: tuple[Contrast, ...]

    def all_columns(self) -> list[str]:
        """The columns of the table."""
        compared = {contrast.by for contrast in self.contrasts} - {"accuracy", "samples"}
        return ["accuracy", *sorted(compared | set(self.columns))]


def read_claim(name: str) -> Claim:
    return config.parse(Claim, config.read_yaml(RECIPES / name / "claim.yaml"))


def understudy(*arguments: str | Path) -> None:
    """One command of the public command line; ends this one where it fails."""
    print(f"\n$ understudy {' '.join(map(str, arguments))}", flush=True)
    command = [str(Path(sys.executable).with_name("understudy")), *map(str, arguments)]
    if code := subprocess.run(command, check=False).returncode:  # noqa: S603 (fixed arguments)
        sys.exit(code)


def make_models(claim: Claim) -> None:
    """Trains what is not finished, and merges weights."""
    for name in claim.models:
        run_dir = RUNS / name
        facts = run_dir / "run.json"
        if facts.is_file() and json.loads(facts.read_text())["status"] in ("finished", "good enough", "did not learn"):
            continue
        resume = ("--resume",) if (run_dir / "recipe.yaml").is_file() else ()
        understudy("train", RECIPES / f"{name}.yaml", *resume)
    for name, recipe in claim.merged.items():
        merge(Path(recipe["start"]), [Path(item) for item in recipe["experts"]], recipe["scale"], RUNS / name)


def merge(start: Path, experts: Sequence[Path], scale: float, out: Path) -> None:
    """Saves start + scale * mean over experts of (expert - start): 1 averages weights, above 1 extrapolates (ExPO)."""
    from safetensors.torch import load_file, save_file

    if (out / "model.safetensors").is_file():
        return
    shutil.copytree(start, out, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    first = load_file(start / "model.safetensors")
    others = [load_file(expert / "model.safetensors") for expert in experts]
    weights = {
        name: weight + scale * sum(other[name] - weight for other in others) / len(others)
        for name, weight in first.items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True)
class Finished:
    """One run of a grid, or one model (seed 0): where its evaluations lie."""

    row: str
    seed: int
    folder: Path
    tuned: Mapping[str, Any]

    def attempts(self, kind: str) -> dict[str, list[dict[str, Any]]]:
        """The samples of an evaluation by problem: of "final" or "greedy", or the last one of the run, "eval"."""
        # a run may have no evaluation of its student at the end but its own, and a model has none but that
        folder = next(found for name in (kind, "eval", "final") if (found := self.folder / name).is_dir())
        path = max(folder.glob("step_*.jsonl"))
        found: dict[str, list[dict[str, Any]]] = {}
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            found.setdefault(sample["prompt_id"], []).append(sample)
        return found

    def values(self, by: str) -> dict[str, float]:
        """One number a problem of the last evaluation: `accuracy`, `accuracy/PART`, `greedy`, `pass@k`, `distinct` (different
        right responses), `tokens` (of a response)."""
        kind, _, part = by.partition("/")
        attempts = self.attempts({"accuracy": "final", "greedy": "greedy"}.get(kind, "eval"))
        problems = {name: found for name, found in attempts.items() if name.startswith(part)}
        if kind in ("accuracy", "greedy"):
            return {name: statistics.fmean(item["score"] for item in found) for name, found in problems.items()}
        if kind.startswith("pass@"):
            k = int(kind.removeprefix("pass@"))
            right = {name: sum(item["score"] >= 1 for item in found) for name, found in problems.items()}
            return {
                name: 1 - math.comb(len(found) - right[name], k) / math.comb(len(found), k)
                for name, found in problems.items()
            }
        if kind == "distinct":
            return {
                name: float(len({item["response"] for item in found if item["score"] >= 1}))
                for name, found in problems.items()
            }
        if kind == "tokens":
            return {name: statistics.fmean(item["num_tokens"] for item in found) for name, found in problems.items()}
        raise SystemExit(f"claim.yaml: unknown number {by!r}")

    def curve(self, metric: str) -> Series:
        """`accuracy`, a metric of training or `num_samples`, the training samples so far, by step."""
        run = read_run(self.folder)
        if metric == "accuracy":
            return Series.of({i.step: i.metrics[f"avg@{i.samples_per_prompt}"].value for i in run.evals})
        found = run.series.get(metric, Series.of({}))
        if metric != "num_samples":
            return found
        return Series.of({0: 0.0} | dict(zip(found.steps.tolist(), found.values.tolist(), strict=True)))


def finished(name: str, claim: Claim) -> dict[str, list[Finished]]:
    """Returns the finished runs and models of a claim, by row."""
    out = RUNS / f"{name}/compare"
    rows: dict[str, list[Finished]] = {}
    cells = json.loads((out / "compare.json").read_text())["cells"]
    for cell in (cell for cell in cells if cell["status"] == "finished"):
        row = ", ".join(cell["labels"].values())
        rows.setdefault(row, []).append(Finished(row, cell["seed"], Path(cell["run_dir"]), cell["tuned"]))
    for row in claim.evaluated:
        if row in rows:
            raise SystemExit(f"{RECIPES / name}: {row!r} is a row of the grid and a model of `evaluated`; rename one")
        rows[row] = [Finished(row, 0, RUNS / name / "models" / row, {})]
    recipe = RECIPES / name / "run.yaml"
    likeliest = json.dumps(config.read_yaml(recipe)["sampling"] | {"temperature": 0})
    more = () if claim.problems is None else (f"eval.problems={claim.problems}",)
    for run in (run for runs in rows.values() for run in runs):
        kinds: dict[str, tuple[str, ...]] = {}
        if claim.problems is not None or run.row in claim.evaluated:
            kinds["final"] = ()
        if any(contrast.by == "greedy" for contrast in claim.contrasts):
            kinds["greedy"] = (f"eval.sampling={likeliest}", "eval.samples_per_prompt=1")
        for kind, changes in kinds.items():
            if not (run.folder / kind).is_dir():
                model = claim.evaluated.get(run.row, str(run.folder / "student"))
                evaluate(recipe, model=model, overrides=[*more, *changes], out=run.folder / kind, quiet=True)
                print(f"evaluated ({kind}): {run.row}, seed {run.seed}", flush=True)
    return rows


def decide(contrast: Contrast, rows: Mapping[str, Sequence[Finished]]) -> Estimate:
    """The difference of the two rows, paired by seed and problem; a model stands beside every seed. For "samples" the ratio."""
    more, less = rows[contrast.more], rows[contrast.less]
    seeds = sorted({run.seed for run in more} | {run.seed for run in less})
    pairs = [[next((run for run in side if run.seed == seed), side[0]) for side in (more, less)] for seed in seeds]
    if contrast.by == "samples":
        logs = [math.log(samples_until(slow, final(slow)) / samples_until(quick, final(slow))) for quick, slow in pairs]
        found = estimate_mean(logs)
        ends = [None if end is None else math.exp(end) for end in (found.low, found.high)]
        return Estimate(math.exp(found.value), *ends, len(logs))
    values = []
    for one, other in pairs:
        high, low = one.values(contrast.by), other.values(contrast.by)
        values.append([high[problem] - low[problem] for problem in sorted(high.keys() & low.keys())])
    return crossed_mean(values)


def final(run: Finished) -> float:
    """The accuracy of the last evaluation."""
    return float(run.curve("accuracy").values[-1])


def samples_until(run: Finished, accuracy: float) -> float:
    """Training samples when an evaluation first was as good; all of them, as a lower bound, where none was."""
    used = dict(run.curve("num_samples").points())
    reached = (used[step] for step, value in run.curve("accuracy").points() if value >= accuracy and step)
    return float(next(reached, max(used.values())))


def result(contrast: Contrast, found: Estimate) -> str:
    """The word of the interval: above, around or below no difference."""
    none = 1.0 if contrast.by == "samples" else 0.0
    if found.low is not None and found.low > none:
        return "shown"
    return "contradicted" if found.high is not None and found.high < none else "not shown"


def save(name: str, claim: Claim, rows: Mapping[str, Sequence[Finished]]) -> None:
    """Writes what the page is drawn from: contrasts, rows and curves, in four digits."""
    lines: list[list[object]] = [["kind", "row", "metric", "at", "value", "low", "high", "seeds"]]
    for contrast in claim.contrasts:
        found = decide(contrast, rows)
        seeds = max(len(rows[contrast.more]), len(rows[contrast.less]))
        lines.append(["contrast", contrast.says, contrast.by, result(contrast, found), *numbers(found), seeds])
    for row, runs in rows.items():
        tuned = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in runs[0].tuned.items())
        for metric in claim.all_columns():
            found = mean_over(runs, metric)
            lines.append(["row", row, metric, tuned, *numbers(found, is_share=metric not in COUNTS), len(runs)])
        if any(metric.startswith("pass@") for metric in claim.all_columns()):
            most = min(len(found) for found in runs[0].attempts("eval").values())
            for k in (2**power for power in range(most.bit_length())):
                lines.append(
                    ["curve", row, "pass@k", k, *numbers(mean_over(runs, f"pass@{k}"), is_share=True), len(runs)]
                )
        trained = [run for run in runs if (run.folder / "metrics.jsonl").is_file()]
        used = [dict(run.curve("num_samples").points()) for run in trained]
        for metric in CURVES.values() if trained else ():
            curves = [dict(run.curve(metric).points()) for run in trained]
            steps = sorted(set.intersection(*map(set, [*used, *curves])))
            # enough for a picture
            for step in steps[:: math.ceil(len(steps) / MAX_POINTS) or 1]:
                at = round(statistics.fmean(samples[step] for samples in used))
                values = [curve[step] for curve in curves]
                drawn = [statistics.fmean(values), min(values), max(values)]
                lines.append(["curve", row, metric, at, *(f"{value:.4g}" for value in drawn), len(runs)])
    DATA.mkdir(exist_ok=True)
    with (DATA / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def mean_over(runs: Sequence[Finished], by: str) -> Estimate:
    """The mean over seeds and problems, both drawn at random."""
    return crossed_mean([list(dict(sorted(run.values(by).items())).values()) for run in runs])


def numbers(found: Estimate, *, is_share: bool = False) -> list[str]:
    """Value and interval in four digits. A share ends at 0 and 1, beyond which a t interval may go."""
    values = [found.value, found.low, found.high]
    if is_share:
        values = [None if value is None else min(max(value, 0.0), 1.0) for value in values]
    return ["" if value is None else f"{value:.4g}" for value in values]


def read(name: str) -> list[dict[str, str]]:
    with (DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def between(low: str, high: str, digits: int, factor: float) -> str:
    """The interval as it is printed."""
    return "" if not low or not high else f" [{float(low) * factor:.{digits}f}, {float(high) * factor:.{digits}f}]"


def verdict_table(claims: Mapping[str, Claim]) -> str:
    """Every contrast of every claim with its result."""
    lines = ["| claim | contrast | by | difference | result |", "|---|---|---|---|---|"]
    for name, claim in claims.items():
        for row in (row for row in read(name) if row["kind"] == "contrast"):
            factor, digits = (1.0, 1) if row["metric"] in ("samples", *COUNTS) else (100.0, 1)
            shown = f"{float(row['value']) * factor:.{digits}f}" + between(row["low"], row["high"], digits, factor)
            unit = {"samples": " x", "tokens": " tokens", "distinct": ""}.get(row["metric"], " points")
            anchor = claim.title.lower().replace(" ", "-").replace("'", "")
            where = f"[{claim.title}](#{anchor})"
            lines.append(f"| {where} | {row['row']} | {row['metric']} | {shown}{unit} | **{row['at']}** |")
    return "\n".join(lines)


def row_table(name: str) -> str:
    """The rows of one claim by their numbers at the end."""
    rows = [row for row in read(name) if row["kind"] == "row"]
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines = ["| | tuned | " + " | ".join(metrics) + " | seeds |", "|---|---|" + "---|" * len(metrics) + "---|"]
    for label in dict.fromkeys(row["row"] for row in rows):
        mine = {row["metric"]: row for row in rows if row["row"] == label}
        cells = []
        for metric in metrics:
            factor = 1.0 if metric in COUNTS else 100.0
            row = mine[metric]
            cells.append(f"{float(row['value']) * factor:.1f}" + between(row["low"], row["high"], 1, factor))
        first = mine[metrics[0]]
        lines.append(f"| {label} | {first['at']} | {' | '.join(cells)} | {first['seeds']} |")
    return "\n".join(lines)


def curves(name: str, metric: str) -> list[dict[str, str]]:
    """The points of a metric's curves."""
    return [row for row in read(name) if row["kind"] == "curve" and row["metric"] == metric]


def over_axis(name: str, axis: Axis) -> list[dict[str, str]]:
    """The rows' accuracy as points over an axis; a curve is named by the labels after the first."""
    points = []
    for row in read(name):
        first, _, rest = row["row"].partition(", ")
        if row["kind"] == "row" and row["metric"] == "accuracy" and first in axis.at:
            points.append(row | {"row": rest or "accuracy", "at": str(axis.at[first])})
    return sorted(points, key=lambda point: int(point["at"]))


def pictures(stem: str, title: str, points: Sequence[Mapping[str, str]], **options: Any) -> list[str]:
    """Draws curves, as many in a picture as there are colours; what the page shows of them. `options`: those of a chart."""
    lines = []
    for label in dict.fromkeys(point["row"] for point in points):
        mine = [point for point in points if point["row"] == label]
        # a point without an interval, of equal values, has no band
        low, high = (np.array([float(point[end] or "nan") for point in mine]) for end in ("low", "high"))
        series = Series.of({int(point["at"]): float(point["value"]) for point in mine})
        lines.append(svg.Line(label, series, low, high))
    shown = []
    for number, start in enumerate(range(0, len(lines), svg.MAX_LINES), 1):
        path = DATA / f"{stem}{f'-{number}' if start else ''}.svg"
        svg.save(svg.Chart(title, title, lines[start : start + svg.MAX_LINES], **options), path)
        shown.append(f"![{stem.partition('-')[0]}: {title}](evidence/{path.name})")
    return shown


def draw(claims: Mapping[str, Claim]) -> None:
    """Puts tables and curves into the page, each between its own pair of comments."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = {"claims": verdict_table(claims)}
    for name in claims:
        shown = []
        if (axis := claims[name].axis) is not None:
            title = f"accuracy by {axis.over}"
            shown += pictures(f"{name}-axis", title, over_axis(name, axis), percent=True, over=axis.over)
        for title, metric in CURVES.items():
            stem, percent = f"{name}-{metric.replace('_', '-')}", metric == "accuracy"
            shown += pictures(stem, title, curves(name, metric), percent=percent, over="training sample")
        attempts = curves(name, "pass@k")
        shown += pictures(f"{name}-pass-k", "pass@k", attempts, percent=True, over="attempt", log_steps=True)
        blocks[name] = "\n\n".join([row_table(name), "\n".join(shown)])
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = text.partition(begin)
        if not found or end not in rest:
            raise SystemExit(f"{PAGE} lacks {begin} and {end}, between which the data of {name} are drawn")
        text = f"{before}{begin}\n\n{block}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    known = sorted(path.parent.name for path in RECIPES.glob("*/claim.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"some of {', '.join(known)}; all of them")
    parser.add_argument("--draw", action="store_true", help="only draw the page from the data")
    parser.add_argument("--jobs", default="2", help="runs at once")
    args = parser.parse_args()
    if unknown := set(args.claims) - set(known):
        parser.error(f"no claim {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if not args.draw:
        for name in args.claims or known:
            started = time.perf_counter()
            claim = read_claim(name)
            make_models(claim)
            recipe, grid, out = RECIPES / name / "run.yaml", RECIPES / name / "grid.yaml", RUNS / name / "compare"
            understudy("compare", recipe, "--grid", grid, "--out", out, "--jobs", args.jobs)
            save(name, claim, finished(name, claim))
            print(f"\n{name}: {(time.perf_counter() - started) / 60:.0f} min; {DATA / name}.csv", flush=True)
    draw({name: read_claim(name) for name in known if (DATA / f"{name}.csv").is_file()})


if __name__ == "__main__":
    main()
