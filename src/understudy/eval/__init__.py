"""Evaluation: sample, grade, estimate with intervals, save."""

from __future__ import annotations

from understudy.eval.estimators import (
    RIGHT,
    Estimate,
    bootstrap_mean,
    crossed_mean,
    majority_score,
    paired_difference,
    pass_at_k,
)
from understudy.eval.evaluate import run_eval, write_eval
from understudy.eval.summary import EvalSummary, prompt_text, sample_row, summarise

__all__ = [
    "RIGHT",
    "Estimate",
    "EvalSummary",
    "bootstrap_mean",
    "crossed_mean",
    "majority_score",
    "paired_difference",
    "pass_at_k",
    "prompt_text",
    "run_eval",
    "sample_row",
    "summarise",
    "write_eval",
]
