"""The definition of an evaluation: all logits at once, differentiated by autograd. `understudy.linear` is tested against it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from understudy.linear.head import LMHead
from understudy.linear.plan import Evaluation, FullTeacher, Tally, TermsOf, choose_trained, floor_scores, weighted_loss
from understudy.losses import divergences
from understudy.losses.terms import Rows
from understudy.types import TokenBatch, fill


def evaluate(
    method: TermsOf,
    batch: TokenBatch,
    hidden: Tensor,
    head: LMHead,
    *,
    step: int = 0,
    rng: torch.Generator | None = None,
    teacher: FullTeacher | None = None,
    reference: FullTeacher | None = None,
    counts: Mapping[str, float] | None = None,
) -> Evaluation:
    """Same arguments, loss and metrics as `understudy.linear.evaluate`; needs the memory of several [T, V] tensors."""
    method, step = method.at(step)
    trained = choose_trained(method, batch, teacher, reference, counts, rng)
    logp = head.logits(hidden[trained.index]).log_softmax(-1)
    with torch.no_grad():
        teacher_logp, reference_logp = (
            None if model is None else model[1].logits(model[0][trained.index]).log_softmax(-1)
            for model in (teacher, reference)
        )
    rows, judged = _read(method, trained.batch, logp, teacher_logp, reference_logp)
    tally = Tally()
    terms = method.terms(floor_scores(judged, method.min_log_ratio), step)
    loss = weighted_loss(trained.weigh(terms), rows, judged, tally)
    # hidden.sum() * 0 would spread a NaN of a masked row; an empty product does not
    return Evaluation(loss + hidden[:0].sum(), tally.metrics())


def _read(
    method: TermsOf, batch: TokenBatch, logp: Tensor, teacher_logp: Tensor | None, reference_logp: Tensor | None
) -> tuple[Rows, TokenBatch]:
    """Fills the rows, and the batch with what only the pass can know."""
    reads, least = method.reads, method.min_log_ratio
    logprob = logp.gather(-1, batch.target[:, None]).squeeze(-1)
    entropy = divergences.entropy(logp)
    batch = fill(batch, student_logprob=logprob.detach(), student_entropy=entropy.detach())
    if teacher_logp is not None:
        at_target = teacher_logp.gather(-1, batch.target[:, None]).squeeze(-1)
        batch = fill(batch, teacher_logprob=at_target, teacher_entropy=divergences.entropy(teacher_logp))
    if reference_logp is not None:
        batch = fill(batch, reference_logprob=reference_logp.gather(-1, batch.target[:, None]).squeeze(-1))
    divergence = topk_logp = tail_logp = None
    if reads.divergence is not None and teacher_logp is not None:
        assert least is not None
        toward = teacher_logp
        if reads.extrapolate is not None and reference_logp is not None:
            over, under = (divergences.floor_excluded(one, logp, least) for one in (teacher_logp, reference_logp))
            toward = (reads.extrapolate * over + (1.0 - reads.extrapolate) * under).log_softmax(-1)
        divergence = divergences.generalised_js(logp, toward, reads.divergence, least)
    if reads.topk is not None:
        if teacher_logp is not None:
            support = (teacher_logp if reads.topk == "teacher" else logp.detach()).topk(min(reads.k, logp.shape[-1]))
            at_support = teacher_logp.gather(-1, support.indices)
            batch = replace(batch, topk_ids=support.indices, topk_logprob=at_support)
        assert batch.topk_ids is not None
        topk_logp = logp.gather(-1, batch.topk_ids)
        if reads.tail and batch.topk_ids.shape[-1] < logp.shape[-1]:
            rest = torch.ones_like(logp, dtype=torch.bool).scatter(-1, batch.topk_ids, False)
            tail_logp = logp.masked_fill(~rest, -torch.inf).logsumexp(-1)
    return Rows(logprob, entropy, topk_logp, tail_logp, divergence), batch
