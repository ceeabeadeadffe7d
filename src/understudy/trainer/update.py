"""The gradient of one optimizer update: packed micro-batches, one loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from understudy.linear import LMHead, count_denominators, count_own, cut_terms, evaluate, score
from understudy.linear.plan import FullTeacher, TermsOf
from understudy.linear.whole import CutTerms
from understudy.methods import Method
from understudy.models import backbone_hidden, lm_head
from understudy.models.backbone import evaluating
from understudy.packing import RowStyle, lay_out, micro_batches, pack
from understudy.randomness import hash_name, keyed_uniform
from understudy.trainer.distributed import Ranks
from understudy.types import Metric, Sample, Scores, TokenBatch, add_metrics, fill

MICRO_BATCH_TOKENS = {"cpu": 2_048}
MICRO_BATCH_TOKENS_ELSEWHERE = 16_384


@dataclass(frozen=True)
class StudentModel:
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

    def hidden(self, samples: Sequence[Sample]) -> Tensor:
        """Hidden states that predict the response tokens, in the order of `pack`. [T, H]."""
        layout = lay_out(samples, style=self.style)
        with self.autocast():
            states = backbone_hidden(self.model, layout.input_ids.to(self.device), layout.position_ids.to(self.device))
        return states.flatten(0, 1)[layout.predicts.to(self.device)]


@dataclass(frozen=True, eq=False)
class Judged:
    """Samples with what was said about each; None where nobody was asked."""

    samples: Sequence[Sample]
    scores: Sequence[Scores] | None = None
    reference: Sequence[Scores] | None = None

    def at(self, index: Sequence[int]) -> Judged:
        """Some of them."""
        return Judged(*(None if part is None else [part[i] for i in index] for part in self._parts))  # type: ignore[arg-type]

    @staticmethod
    def join(parts: Sequence[Judged]) -> Judged:
        """All of them, in order."""
        scores = [part.scores for part in parts if part.scores is not None]
        reference = [part.reference for part in parts if part.reference is not None]
        return Judged(
            [sample for part in parts for sample in part.samples],
            [score for part in scores for score in part] if scores else None,
            [score for part in reference for score in part] if reference else None,
        )

    @property
    def _parts(self) -> tuple[Sequence[object] | None, ...]:
        return self.samples, self.scores, self.reference


Heads = Mapping[str | None, LMHead]
"""Of the teachers whose whole rows are compared, by the name that samples have for them."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward and backward is made of."""

    judged: Judged
    batch: TokenBatch
    terms: TermsOf
    label: str | None = None
    """The teacher, where there are several."""


def prepare(
    student: StudentModel,
    method: Method,
    judged: Judged,
    *,
    step: int,
    draw: tuple[int, int],
    ranks: Ranks,
    num_minibatches: int = 1,
    fix_old: bool = False,
    by_teacher: bool = False,
) -> list[list[MicroBatch]]:
    """The micro-batches of each of `num_minibatches` updates; with `by_teacher` each has samples of one teacher.

    `step` is the method's own; `draw`, the run's seed and step, is what random draws are keyed by.

    `fix_old`: S_old is read off now, because the student will have moved when it is needed. A method that needs the whole
    batch gets it, over all updates and ranks.
    """
    cut = [_cut(student, part, by_teacher) for part in _divide(judged, num_minibatches, ranks)]
    micros = [
        [MicroBatch(one, _pack(one, method, *draw).to(student.device), method, label) for one, label in part]
        for part in cut
    ]
    if not (fix_old or method.scope == "batch"):
        return micros
    micros = [[_score_old(student, micro) for micro in part] for part in micros]
    if method.scope != "batch":
        return micros
    flat = [micro for part in micros for micro in part]
    terms = iter(_cut_whole(method, [micro.batch for micro in flat], step, ranks))
    return [[replace(micro, terms=next(terms)) for micro in part] for part in micros]


def _divide(judged: Judged, num_parts: int, ranks: Ranks) -> list[Judged]:
    """Parts of one size over all ranks, the samples of a prompt side by side; which ranks hold them makes no difference."""
    if num_parts == 1:
        return [judged]
    # a prompt may come twice under one name: rank and place tell them apart
    names = [(hash_name(item.prompt.id), item.index, ranks.rank, at) for at, item in enumerate(judged.samples)]
    everywhere = sorted(name for part in ranks.gather(names) for name in part)
    place = {name: index * num_parts // len(everywhere) for index, name in enumerate(everywhere)}
    return [judged.at([i for i, name in enumerate(names) if place[name] == part]) for part in range(num_parts)]


def _cut(student: StudentModel, judged: Judged, by_teacher: bool) -> list[tuple[Judged, str | None]]:
    names = [sample.teacher if by_teacher else None for sample in judged.samples]
    default = MICRO_BATCH_TOKENS.get(student.device.type, MICRO_BATCH_TOKENS_ELSEWHERE)
    found = []
    for name in dict.fromkeys(names):
        mine = [index for index, whose in enumerate(names) if whose == name]
        lengths = [judged.samples[index].token_ids.numel() - 1 for index in mine]
        groups = micro_batches(lengths, student.micro_batch_tokens or default, student.style)
        found += [(judged.at([mine[index] for index in group]), name) for group in groups]
    return found


def _pack(judged: Judged, method: Method, seed: int, step: int) -> TokenBatch:
    uniform = None
    if "uniform" in method.requires:
        sizes = [sample.num_response_tokens for sample in judged.samples]
        keys = [sample.key for sample in judged.samples]
        draws = keyed_uniform(seed, "trust", step, keys, max(sizes))
        uniform = torch.cat([row[:size] for row, size in zip(draws, sizes, strict=True)])
    return pack(judged.samples, judged.scores, reference=judged.reference, uniform=uniform)


@torch.no_grad()
def _score_old(student: StudentModel, micro: MicroBatch) -> MicroBatch:
    """With log S_old and its entropy at every token that is trained."""
    batch = micro.batch
    with evaluating(student.model):
        hidden = student.hidden(micro.judged.samples)
    logprob, entropy = score(hidden, student.head(), batch.target)
    return replace(micro, batch=fill(batch, student_logprob=logprob, student_entropy=entropy))


def _cut_whole(method: Method, batches: list[TokenBatch], step: int, ranks: Ranks) -> list[CutTerms]:
    everywhere = ranks.gather([batch.to(torch.device("cpu")) for batch in batches] if ranks.world > 1 else [])
    if not batches:
        return []
    device = batches[0].target.device
    elsewhere = [batch.to(device) for rank, part in enumerate(everywhere) if rank != ranks.rank for batch in part]
    return cut_terms(method, batches, step, elsewhere=elsewhere)


def accumulate_gradients(
    student: StudentModel,
    micros: Sequence[MicroBatch],
    *,
    heads: Heads,
    reference_head: LMHead | None,
    step: int,
    ranks: Ranks,
) -> tuple[float, dict[str, Metric]]:
    """Adds the gradient of the update's loss to the parameters; returns the loss and the metrics, of all ranks.

    The denominators are counted over all samples of all ranks before the first forward, so neither the cut into
    micro-batches nor the number of ranks changes the loss.
    """
    batches = [micro.batch for micro in micros]
    counts = count_denominators(batches)
    own = [micro.terms for micro in micros if isinstance(micro.terms, CutTerms)]
    if own:
        counts |= count_own(batches, own)
    counts = ranks.sum_counts(counts)
    loss, total = 0.0, dict[str, Metric]()
    for micro in micros:
        evaluation = evaluate(
            micro.terms,
            micro.batch,
            student.hidden(micro.judged.samples),
            student.head(),
            step=step,
            teacher=_whole_rows(micro.judged.scores, heads.get(micro.label), student.device),
            reference=_whole_rows(micro.judged.reference, reference_head, student.device),
            counts=counts,
        )
        evaluation.loss.backward()
        loss += float(evaluation.loss.detach())
        total = add_metrics(total, _labelled(evaluation.metrics, micro.label))
    return ranks.sum_counts({"loss": loss})["loss"], ranks.sum_metrics(total)


def _whole_rows(scores: Sequence[Scores] | None, head: LMHead | None, device: torch.device) -> FullTeacher | None:
    if scores is None or head is None:
        return None
    return torch.cat([score.hidden for score in scores if score.hidden is not None]).to(device), head


def _labelled(metrics: Mapping[str, Metric], label: str | None) -> dict[str, Metric]:
    """The metrics, and where there are several teachers what each says under its own name too."""
    if label is None:
        return dict(metrics)
    return dict(metrics) | {f"teacher/{label}/{name}": metric for name, metric in metrics.items()}
