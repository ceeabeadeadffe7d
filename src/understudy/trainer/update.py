"""One optimizer step's gradient: packed micro-batches, one loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from understudy.linear import LMHead, count_denominators, evaluate
from understudy.methods import Method
from understudy.models import backbone_hidden, lm_head
from understudy.packing import RowStyle, lay_out, micro_batches, pack
from understudy.trainer.distributed import Ranks
from understudy.types import Metric, Sample, Scores

MICRO_BATCH_TOKENS = {"cpu": 2_048}
MICRO_BATCH_TOKENS_ELSEWHERE = 16_384


@dataclass(frozen=True)
class Student:
    """The model in training, and how it is run."""

    model: nn.Module
    device: torch.device
    vocab_size: int
    temperature: float
    compute_dtype: torch.dtype | None
    micro_batch_tokens: int | None = None
    style: RowStyle = "packed"

    def head(self) -> LMHead:
        """Its head at the rollout temperature, over the tokens that exist."""
        return lm_head(self.model, temperature=self.temperature, vocab_size=self.vocab_size)

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision where it was asked for."""
        if self.compute_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)


def accumulate_gradients(
    student: Student,
    method: Method,
    samples: Sequence[Sample],
    scores: Sequence[Scores] | None,
    *,
    teacher_head: LMHead | None,
    step: int,
    ranks: Ranks,
) -> tuple[float, dict[str, Metric]]:
    """Adds the gradient of the step's loss to the parameters; returns the loss and the metrics, of all ranks.

    The denominators are counted over all samples of all ranks before the first forward, so neither the cut into
    micro-batches nor the number of ranks changes the loss.
    """
    lengths = [sample.token_ids.numel() - 1 for sample in samples]
    default = MICRO_BATCH_TOKENS.get(student.device.type, MICRO_BATCH_TOKENS_ELSEWHERE)
    groups = micro_batches(lengths, student.micro_batch_tokens or default, student.style) if samples else []
    parts = [[samples[index] for index in group] for group in groups]
    judged = [None if scores is None else [scores[index] for index in group] for group in groups]
    batches = [pack(part, found) for part, found in zip(parts, judged, strict=True)]
    counts = ranks.sum_counts(count_denominators(batches))
    loss, total = 0.0, dict[str, Metric]()
    for part, found, batch in zip(parts, judged, batches, strict=True):
        full = None
        if teacher_head is not None and found is not None:
            full = (_hidden_of(found).to(student.device), teacher_head)
        hidden = _hidden(student, part)
        evaluation = evaluate(
            method, batch.to(student.device), hidden, student.head(), step=step, teacher=full, counts=counts
        )
        evaluation.loss.backward()
        loss += float(evaluation.loss.detach())
        for name, metric in evaluation.metrics.items():
            total[name] = total[name] + metric if name in total else metric
    return ranks.sum_counts({"loss": loss})["loss"], ranks.sum_metrics(total)


def _hidden(student: Student, samples: Sequence[Sample]) -> Tensor:
    """Hidden states that predict the response tokens, in the order of `pack`. [T, H]."""
    layout = lay_out(samples, style=student.style)
    with student.autocast():
        states = backbone_hidden(
            student.model, layout.input_ids.to(student.device), layout.position_ids.to(student.device)
        )
    return states.flatten(0, 1)[layout.predicts.to(student.device)]


def _hidden_of(scores: Sequence[Scores]) -> Tensor:
    return torch.cat([score.hidden for score in scores if score.hidden is not None])
