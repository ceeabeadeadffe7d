"""What a step must not mix up: temperatures, heads and hidden states, verdicts of several ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.runs import distillation, metric_rows, train
from understudy.teachers import LocalTeacher
from understudy.trainer.distributed import Ranks
from understudy.types import Sample, Scores, Verdict


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_imitation_knows_no_rollout_temperature(tmp_path: Path, temperature: float) -> None:
    """What the teacher's samples are drawn at is not what the student's likelihood is taken at."""
    rows = []
    for folder, chosen in ((tmp_path / "one", 1.0), (tmp_path / "other", temperature)):
        changes = distillation(
            folder,
            method={"type": "sft"},
            responses={"type": "teacher", "temperature": 1.0, "cache": str(tmp_path / "cache")},
            sampling={"max_new_tokens": 24, "temperature": chosen},
            train={"steps": 1, "prompts_per_step": 64},
        )
        rows.append(metric_rows(train(folder, **changes))[0])
    assert rows[0]["loss"] == rows[1]["loss"]


def test_a_head_stays_with_its_hidden_states(tmp_path: Path) -> None:
    """A teacher that becomes the student after every update is, within a step, the one that scored its samples."""
    rows = []
    for name, average in (("frozen", None), ("moving", 0.0)):
        template = "{solution};{prompt}"
        changes = distillation(
            tmp_path / name,
            teacher={"type": "privileged", "ema": average, "template": template},
            train={"steps": 1, "prompts_per_step": 8, "passes": 3, "lr": 3e-2},
        )
        rows.append(metric_rows(train(tmp_path / name, **changes))[0])
    assert rows[0] == rows[1]


@dataclass(frozen=True)
class Rank(Ranks):
    """One of two ranks, which hears what the other has to say."""

    other: Any = None

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other] if self.rank == 0 else [self.other, value]


class Asked:
    """A judge that never says the same twice."""

    name = fingerprint = "judge"

    def __init__(self, first: float) -> None:
        self.next = first

    def judge(self, samples: Sequence[Sample], **_: object) -> list[Verdict]:
        found = [Verdict(self.next + index / 10) for index in range(len(samples))]
        self.next += 1
        return found


def test_ranks_share_their_verdicts() -> None:
    """Each sample is judged once, and every rank hears the same, in the order of the samples."""
    samples: list[Any] = list(range(5))
    mine, others = Asked(1.0).judge(samples[0::2]), Asked(5.0).judge(samples[1::2])
    first = Rank(0, 2, others).share(samples, Asked(1.0).judge)
    second = Rank(1, 2, mine).share(samples, Asked(5.0).judge)
    assert first == second
    assert [verdict.score for verdict in first] == [1.0, 5.0, 1.1, 5.1, 1.2]


def test_a_sample_that_the_reference_cannot_score_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what the teacher said of it; the scores of the others stay with their samples."""
    plain = LocalTeacher.score

    def score(self: LocalTeacher, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Scores]:
        found = plain(self, samples, *args, **options)
        if self.name == "reference":
            found[1] = replace(found[1], logprob=torch.full_like(found[1].logprob, torch.nan))
        return found

    monkeypatch.setattr(LocalTeacher, "score", score)
    changes = distillation(
        tmp_path, method={"type": "gopd"}, train={"steps": 2, "prompts_per_step": 4, "on_missing_score": "drop"}
    )
    assert [row["samples_dropped"] for row in metric_rows(train(tmp_path, **changes))] == [1.0, 1.0]


@pytest.mark.parametrize("method", ["opd", "gopd", "reopold", "eopd", "aopd", "tropd", "topk"])
def test_a_run_goes_on_where_the_teacher_excludes_a_token(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And counts it; nothing is dropped."""
    plain = LocalTeacher.score

    def score(self: LocalTeacher, samples: Sequence[Sample], *args: Any, **options: Any) -> list[Scores]:
        found = plain(self, samples, *args, **options)
        logprob = found[1].logprob
        assert logprob is not None
        return [found[0], replace(found[1], logprob=logprob.index_fill(0, torch.tensor([0]), -torch.inf)), *found[2:]]

    monkeypatch.setattr(LocalTeacher, "score", score)
    more = {"anneal_steps": 0} if method == "tropd" else {}
    changes = distillation(tmp_path, method={"type": method} | more, train={"steps": 2, "prompts_per_step": 4})
    rows = metric_rows(train(tmp_path, **changes))
    assert all(row["teacher_excluded"] > 0 and math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert all(row["samples_dropped"] == 0 for row in rows)
