"""A run directory as the trainer writes it, for tests of what reads it."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from understudy.eval.estimators import majority_score
from understudy.report.pictures import LOG_RATIO_EDGES
from understudy.report.watch import Watch, make_server

FACTS = {
    "status": "finished",
    "started": "2026-03-01T10:00:00Z",
    "ended": "2026-03-01T10:01:12Z",
    "steps": 120,
    "samples": 15_360,
    "training_s": 43.2,
    "student_parameters": 140_352,
    "vocabulary": 19,
    "teacher": "runs/teacher/student",
    "hardware": "a processor, 2 of 2 threads",
    "peak_memory_gib": 0.71,
    "versions": {"python": "3.11.7", "understudy": "0.1.0", "torch": "2.13.0"},
    "commit": "0123abc",
}
RECIPE = """\
seed: 7
student:
  model: runs/warm/student
teacher:
  model: runs/teacher/student
method:
  type: gkd
  beta: 1.0
"""


def write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def training_rows(num_steps: int, seed: int = 0) -> list[dict[str, object]]:
    """Metrics that look like a distillation: a falling loss, a rising log-ratio, one spike of the gradient."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(1, num_steps + 1):
        decay = math.exp(-3 * step / num_steps)
        noise = rng.normal(size=8)
        rows.append(
            {
                "step": step,
                "time_s": 0.36 * step,
                "loss": 0.9 * decay + 0.03 * abs(noise[0]),
                "log_ratio": -0.9 * decay + 0.03 * noise[1],
                "student_entropy": 0.3 + 0.4 * decay + 0.02 * noise[2],
                "teacher_entropy": 0.12 + 0.01 * noise[3],
                "response_tokens": 30 + 3 * noise[4],
                "grad_norm": (1.2 * decay + 0.2) * math.exp(0.4 * noise[5]) * (40 if step == num_steps // 3 else 1),
                "lr": 1e-3 * min(1.0, step / 10) * (1 - step / (num_steps + 1)),
                "truncated": max(0.0, 0.2 * decay + 0.02 * noise[6]),
                "generate_s": 0.19 + 0.02 * abs(noise[7]),
                "score_s": 0.04,
                "update_s": 0.12 + 0.01 * abs(noise[0]),
                "step_s": 0.36,
                "tokens_per_s": 9000 + 400 * noise[2],
                "samples_per_s": 350 + 10 * noise[2],
                "loss/divergence": 0.9 * decay + 0.03 * abs(noise[0]),
            }
        )
    return rows


def write_eval(
    run_dir: Path,
    step: int,
    scores: Mapping[str, list[float]],
    *,
    prompt: str = "{id}:",
    response: str = "",
    **extra: object,
) -> Path:
    """One evaluation: a summary and its samples. `scores` holds the score of every attempt, by prompt id."""
    attempts = len(next(iter(scores.values())))
    means = np.array([np.mean(values) for values in scores.values()])
    best = np.array([max(values) for values in scores.values()])
    majority = np.array([majority_score([_answer(value) for value in values], values) for values in scores.values()])
    half = 1.96 / math.sqrt(len(scores))

    def entry(values: np.ndarray) -> dict[str, float]:
        mean, spread = float(values.mean()), half * float(values.std())
        return {
            "value": mean,
            "low": max(0.0, mean - spread),
            "high": min(1.0, mean + spread),
            "num_problems": len(values),
        }

    summary = {
        "step": step,
        "split": "test",
        "samples_per_prompt": attempts,
        "num_problems": len(scores),
        "metrics": {
            f"avg@{attempts}": entry(means),
            f"pass@{attempts}": entry(best),
            f"maj@{attempts}": entry(majority),
            "mean_tokens": {"value": 31.4, "low": 31.0, "high": 31.9, "num_problems": len(scores)},
            "truncated": {"value": 0.02, "low": 0.01, "high": 0.04, "num_problems": len(scores)},
            "no_eos": {"value": 0.0, "low": 0.0, "high": 0.0, "num_problems": len(scores)},
        },
    } | extra
    path = run_dir / "eval" / f"step_{step:06d}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(summary))
    rows = [
        {
            "prompt_id": name,
            "prompt": prompt.replace("{id}", name),
            "response": response or f"690=15;481=13;901=10#{1035 if score == 1 else 1025}",
            "finish": "stop",
            "num_tokens": 31,
            "answer": _answer(score),
            "reference": "1035",
            "score": score,
            "note": "",
        }
        for name, values in scores.items()
        for score in values
    ]
    write_lines(path.with_suffix(".jsonl"), rows)
    return path


def _answer(score: float) -> str:
    return "1035" if score == 1 else "1025"


def random_scores(share: float, num_problems: int = 200, attempts: int = 4, seed: int = 0) -> dict[str, list[float]]:
    """Right with probability `share`, independently."""
    draws = np.random.default_rng(seed).random((num_problems, attempts)) < share
    return {f"add-{index:03d}": [float(value) for value in row] for index, row in enumerate(draws)}


def write_run(run_dir: Path, *, num_steps: int = 120, before: float = 0.41, after: float = 0.965) -> Path:
    """A finished run with two evaluations at its ends and two between them."""
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "recipe.yaml").write_text(RECIPE)
    (run_dir / "run.json").write_text(json.dumps(FACTS))
    write_lines(run_dir / "metrics.jsonl", training_rows(num_steps))
    write_lines(
        run_dir / "events.jsonl", [{"step": 40, "kind": "warning", "text": "12 prompts repeat in the test split"}]
    )
    for index in range(4):
        share = before + (after - before) * (1 - (1 - index / 3) ** 2)
        write_eval(run_dir, round(num_steps * index / 3), random_scores(share, seed=index))
    return run_dir


def write_pictures(run_dir: Path, teachers: Sequence[str], num_steps: int = 10) -> None:
    """Sums over tokens at every step, of all and of each teacher."""
    names = ("", *(f"teacher/{teacher}/" for teacher in teachers))
    sums = {"log_ratio_size": 2.0, "outliers": 0.1, "trusted": 3.9, "top_shared": 3.0}
    rows = [
        {
            "step": step,
            "samples": 2,
            "log_ratio": {teacher: [step] * (len(LOG_RATIO_EDGES) + 1) for teacher in ("", *teachers)},
            "parts": {
                before + name: [[value + at / 10 for at in range(10)], [4.0 + at for at in range(10)]]
                for before in names
                for name, value in sums.items()
            },
        }
        for step in range(1, num_steps + 1)
    ]
    write_lines(run_dir / "pictures.jsonl", rows)


@contextmanager
def watched(watch: Watch) -> Iterator[str]:
    """The address at which the page of a run is served."""
    server, address = make_server(watch)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
