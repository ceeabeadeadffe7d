"""The alarms that runs would have raised: `python scripts/alarms.py runs/evidence` reads the numbers of every run below it.

A run is healthy if its last evaluation is above its first by more than both 95 % intervals.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from understudy.eval.summary import read_summaries
from understudy.trainer.alarms import Alarms, compare_evaluations


def main() -> int:
    """Prints each run that raises alarms; the exit code is 1 where a healthy one does."""
    kinds: Counter[str] = Counter()
    for metrics in sorted(path for folder in sys.argv[1:] for path in Path(folder).rglob("metrics.jsonl")):
        run_dir = metrics.parent
        summaries = read_summaries(run_dir / "eval")
        found = [change for change in Alarms().replay(metrics, summaries) if change.begins]
        rise = compare_evaluations(summaries).get("accuracy_rise") if summaries else None
        kind = "healthy" if rise is not None and rise > 0 else "other"
        kinds[kind] += 1
        if found:
            kinds[f"{kind} with alarms"] += 1
            names = dict.fromkeys(f"{change.alarm.name} at {change.step}" for change in found)
            print(f"{run_dir} ({kind}): {', '.join(names)}")
    print(", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    return int(kinds["healthy with alarms"] > 0)


if __name__ == "__main__":
    sys.exit(main())
