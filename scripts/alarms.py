"""The alarms that runs would have raised: `python scripts/alarms.py runs/evidence` reads the numbers of every run below it.

A run is healthy if its last evaluation is above its first by more than both 95 % intervals. For each condition of an alarm it
prints the value nearest to the bound, or furthest beyond it, that a healthy run had while all others of the alarm held.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from understudy.eval.summary import EvalSummary, read_summaries
from understudy.format import number
from understudy.trainer.alarms import ALARMS, Alarms, compare_evaluations

Nearest = dict[tuple[str, str], tuple[float, Path]]
"""By alarm and bound: the value, and the run that had it."""


def main() -> int:
    """Prints each run that raises alarms, and how near healthy ones come; the exit code is 1 where a healthy one does."""
    kinds: Counter[str] = Counter()
    nearest: Nearest = {}
    for metrics in sorted(path for folder in sys.argv[1:] for path in Path(folder).rglob("metrics.jsonl")):
        run_dir = metrics.parent
        summaries = read_summaries(run_dir / "eval")
        rise = compare_evaluations(summaries).get("accuracy_rise") if summaries else None
        kind = "healthy" if rise is not None and rise > 0 else "other"
        kinds[kind] += 1
        found = [change for change in Alarms().replay(metrics, summaries) if change.begins]
        if found:
            kinds[f"{kind} with alarms"] += 1
            names = dict.fromkeys(f"{change.alarm.name} at {change.step}" for change in found)
            print(f"{run_dir} ({kind}): {', '.join(names)}")
        if kind == "healthy":
            approach(metrics, summaries, nearest)
    print(", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    for (name, bound), (value, run_dir) in nearest.items():
        print(f"{name}, {bound}: {number(value)} in {run_dir}")
    return int(kinds["healthy with alarms"] > 0)


def approach(metrics: Path, summaries: list[EvalSummary], nearest: Nearest) -> None:
    """Takes up the values of a run that are nearer to a bound, or further beyond it, than those in `nearest`."""
    alarms, waiting = Alarms(), sorted(summaries, key=lambda summary: summary.step, reverse=True)
    for line in metrics.read_text().splitlines():
        row = json.loads(line)
        while waiting and waiting[-1].step < row["step"]:
            alarms.evaluated(waiting.pop())
        alarms.step(row["step"], {name: value for name, value in row.items() if name != "step"})
        for alarm in ALARMS:
            if row["step"] < alarm.after:
                continue
            held = [part.holds(alarms.history) for part in alarm.when]
            for at, part in enumerate(alarm.when):
                value = part.value(alarms.history)
                if value is None or not all(held[:at] + held[at + 1 :]):
                    continue
                key, sign = (alarm.name, part.bound), 1 if part.below is None else -1
                if key not in nearest or sign * value > sign * nearest[key][0]:
                    nearest[key] = (value, metrics.parent)


if __name__ == "__main__":
    sys.exit(main())
