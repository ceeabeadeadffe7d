"""Chunked evaluation: computes logits once, and their gradient in the same pass.

Every loss here reads a few numbers of a row (the sampled token, K tokens, the mass outside them, the entropy, one
divergence), so the gradient of the logits is a scaled softmax, plus a scaled auxiliary row, plus a sparse correction. A
chunk of rows is projected and its numbers are read; autograd differentiates the terms with respect to these numbers alone;
then the gradient of the logits overwrites the chunk's buffer, and two products with the head consume it. The head
costs three matrix products (logits, d hidden, d weight), four with a full-vocabulary teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from understudy.lazy import Tensor, no_grad, torch
from understudy.linear import rows as row_math
from understudy.linear.columns import Columns, chunks
from understudy.linear.head import Gradients, LMHead, compute_dtype, project
from understudy.linear.kept import Kept
from understudy.linear.plan import (
    CutTerms,
    Evaluation,
    FullTeacher,
    Tally,
    TermsOf,
    Trained,
    choose_trained,
    cut_term,
    floor_scores,
    weighted_loss,
)
from understudy.losses.terms import Over, Reduce, Term
from understudy.types import TokenBatch, fill

CHUNK_ELEMENTS = 256 * 152_064
"""Logits in one chunk: 256 rows of the largest common vocabulary, 148 MiB in float32."""
CHUNK_ELEMENTS_ON_GPU = 4 * CHUNK_ELEMENTS
"""592 MiB: a GPU multiplies 256 rows in the time it takes to read the head."""


def chunk_elements(device: torch.device) -> int:
    """Maximum number of logits in a chunk."""
    return CHUNK_ELEMENTS_ON_GPU if device.type == "cuda" else CHUNK_ELEMENTS


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
    chunk_tokens: int | None = None,
    keep: Kept | None = None,
    fused: bool | None = None,
) -> Evaluation:
    """The method's loss on a batch, ready for `backward`, and its metrics.

    hidden [T, H] predicts `batch.target` row by row; the gradient reaches `hidden`, `head.weight` and `head.bias` where
    they require one. `teacher` and `reference` are ([T, H_t], LMHead) for losses over the whole vocabulary. `counts`:
    the denominators of the whole optimizer step (`count_denominators`, plus a term's own by its name); None: this
    batch's. `rng` draws `batch.uniform` if the batch has none. `keep` records
    the numbers of single tokens. `fused`: the passes over the logits are Triton kernels; None: on a GPU where Triton is
    installed. Arithmetic is in float32, or float64 for float64 inputs. Masked rows are never projected.

    With a sliced head (`LMHead.cut`; teacher and reference sliced alike) this is a collective call: each rank has its own
    batch, possibly empty, and gets its own loss, metrics and hidden-state gradient; the gradients of weight and bias are
    those of its slice over the batches of all ranks. `keep` then records nothing that needs whole
    rows (most likely tokens, ranks, gradients).

    Raises ScoreError if a score that the method needs is absent or NaN on a trained token, and ValueError for shapes
    that do not fit.
    """
    if hidden.shape != (len(batch), head.weight.shape[1]):
        raise ValueError(f"hidden is {tuple(hidden.shape)}; expected [{len(batch)}, {head.weight.shape[1]}]")
    others = {"teacher": teacher, "reference": reference}
    for whose, (states, its_head) in ((whose, other) for whose, other in others.items() if other is not None):
        if states.shape != (len(batch), its_head.weight.shape[1]):
            raise ValueError(f"the {whose}'s hidden is {tuple(states.shape)}; expected [{len(batch)}, H_t]")
        if its_head.num_tokens != head.num_tokens:
            raise ValueError(
                f"the student's vocabulary has {head.num_tokens} tokens and the {whose}'s {its_head.num_tokens}: set "
                "LMHead.vocab_size of both to the tokens that their tokenizers share"
            )
        if its_head.slice != head.slice:
            raise ValueError(
                f"the heads of student and {whose} must be in the same slices of the vocabulary: use LMHead.cut"
            )
    method, step = method.at(step)
    trained = choose_trained(method, batch, teacher, reference, counts, rng)
    chunk = chunk_tokens or _chunk_rows(head)
    # the kernels do not support slices
    fused = head.slice is None and (row_math.has_kernels(hidden.device) if fused is None else fused)
    job = _Job(method, trained, head, teacher, reference, step, chunk, keep, fused)
    loss: Tensor = _autograd_function().apply(hidden, head.weight, head.bias, job)
    return Evaluation(loss, job.tally.metrics())


@no_grad
def score(
    hidden: Tensor, head: LMHead, target: Tensor, *, chunk_tokens: int | None = None, keep: Kept | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy of their rows, without gradient. [T, H], [T] -> [T], [T].

    `keep` records the rows' most likely tokens as a teacher's.
    """
    dtype = compute_dtype(hidden)
    logprob, entropy = hidden.new_empty(len(target), dtype=dtype), hidden.new_empty(len(target), dtype=dtype)
    for part, columns in chunks(head, len(target), chunk_tokens or _chunk_rows(head)):
        logits = project(columns.rows(hidden[part]), head)
        if keep is not None:
            keep.begin(torch.arange(part.start, part.stop, device=logits.device))
        found = row_math.read_target(logits, columns.rows(target[part]), columns, keep if head.slice is None else None)
        logprob[part], entropy[part] = (columns.own(value) for value in found)
    return logprob, entropy


def _chunk_rows(head: LMHead) -> int:
    """Rows whose logits over the whole vocabulary fill a chunk."""
    return max(1, chunk_elements(head.weight.device) // (head.num_tokens if head.slice is None else head.slice.size))


@dataclass(eq=False)
class _Job:
    """One evaluation; `run` visits every chunk once."""

    method: TermsOf
    trained: Trained
    head: LMHead
    teacher: FullTeacher | None
    reference: FullTeacher | None
    step: int
    chunk: int
    keep: Kept | None = None
    fused: bool = False

    def __post_init__(self) -> None:
        self.tally = Tally(self.keep)
        self._shares: dict[tuple[Reduce, Over], Tensor] = {}

    def run(self, hidden: Tensor, gradients: Gradients) -> Tensor:
        """The loss; fills `gradients`."""
        dtype = compute_dtype(hidden)
        index = self.trained.index
        whole = self._batch_terms(hidden) if self.method.scope == "batch" else None
        total = torch.zeros((), dtype=dtype, device=hidden.device)
        buffers: row_math.Buffers | None = None
        for part, columns in chunks(self.head, len(index), self.chunk):
            if self.keep is not None:
                self.keep.begin(index[part])
            states = columns.rows(hidden[index[part]])
            # the first chunk is the largest
            buffers = buffers or row_math.Buffers(len(states), self.head.num_tokens, dtype, hidden.device)
            logits = project(states, self.head, out=buffers.of("student", len(states)))
            teacher_logits, batch = self._others(part, logits, buffers, columns)
            floor = self._floor_of(self.teacher)
            visit = row_math.Visit(
                self.method.reads, logits, teacher_logits, batch, columns, floor, self.keep, fused=self.fused
            )
            leaves, judged = visit.read(keep_logits=self.head.softcap is not None)
            with torch.enable_grad():
                if whole is not None:
                    terms = [(cut_term(term, part), share[part]) for term, share in whole]
                else:
                    found = self.method.terms(floor_scores(judged, self.method.min_log_ratio), self.step)
                    terms = [(term, self._token_share(term)[part]) for term in found]
                loss = weighted_loss(terms, leaves, judged, self.tally)
            total += loss.detach()
            if self.keep is not None:
                for name in ("teacher_logprob", "reference_logprob", "uniform", "outcome_advantage"):
                    self.keep.add(name, getattr(judged, name))
            if gradients.wanted and (loss.requires_grad or columns.slice is not None):
                visit.differentiate(loss, self.head)
                if self.keep is not None and columns.slice is None:
                    self.keep.read_gradient(logits, judged.target)
                gradients.add(index[part], states, logits, columns)
        return total

    def _floor_of(self, other: FullTeacher | None) -> float | None:
        """Log-ratio of tokens that the model excludes; None if its head excludes none."""
        return self.method.min_log_ratio if other is not None and other[1].excludes else None

    def _others(
        self, part: slice, student: Tensor, buffers: row_math.Buffers, columns: Columns
    ) -> tuple[Tensor | None, TokenBatch]:
        """The logits that the student's are compared with, and the batch with the reference's scores."""
        index, batch, size = self.trained.index[part], self.trained.batch.rows(part), len(student)
        target = batch.target if self.reference is None else columns.rows(batch.target)
        if self.reference is not None:
            hidden, head = self.reference
            reference = project(columns.rows(hidden[index]), head, out=buffers.of("reference", size))
            logprob, _ = row_math.read_target(reference, target, columns)
            batch = fill(batch, reference_logprob=columns.own(logprob))
        if self.teacher is None:
            return None, batch
        hidden, head = self.teacher
        logits = project(columns.rows(hidden[index]), head, out=buffers.of("teacher", size))
        scale = self.method.reads.extrapolate
        if scale is not None and self.reference is not None:
            # read before the target overwrites it, so that the metrics show the teacher itself
            logprob, entropy = row_math.read_target(logits, target, columns)
            batch = fill(batch, teacher_logprob=columns.own(logprob), teacher_entropy=columns.own(entropy))
            if self.keep is not None and columns.slice is None:
                lse = logits.gather(-1, batch.target[:, None]).squeeze(-1) - logprob
                self.keep.read_row("teacher", slice(None), logits, lse, batch.target)
            for other, rows in ((self.teacher, logits), (self.reference, reference)):
                floor = self._floor_of(other)
                if floor is not None:
                    lse, student_lse = columns.logsumexp(rows), columns.logsumexp(student)
                    row_math.floor_excluded_rows(rows, lse, student, student_lse, floor)
            logits.mul_(scale).add_(reference, alpha=1.0 - scale)
        return logits, batch

    def _batch_terms(self, hidden: Tensor) -> list[tuple[Term, Tensor]]:
        """The terms of a batch-scope method, after a scoring pass if the batch lacks the student's scores."""
        if isinstance(self.method, CutTerms):
            return self.trained.weigh(self.method.given)
        batch = self.trained.batch
        if batch.student_logprob is None or batch.student_entropy is None:
            logprob, entropy = self._score(hidden, self.head)
            batch = fill(batch, student_logprob=logprob, student_entropy=entropy)
        if self.teacher is not None and (batch.teacher_logprob is None or batch.teacher_entropy is None):
            logprob, entropy = self._score(*self.teacher)
            batch = fill(batch, teacher_logprob=logprob, teacher_entropy=entropy)
        if self.reference is not None and batch.reference_logprob is None:
            batch = fill(batch, reference_logprob=self._score(*self.reference)[0])
        return self.trained.weigh(self.method.terms(floor_scores(batch, self.method.min_log_ratio), self.step))

    def _token_share(self, term: Term) -> Tensor:
        """Weight of every row in the term's mean, the same in each chunk. [N]."""
        if term.per is not None:
            raise ValueError(f"term {term.name!r} has a denominator of its own; its method needs scope 'batch'")
        if (term.reduce, term.over) not in self._shares:
            self._shares[term.reduce, term.over] = self.trained.share(term)
        return self._shares[term.reduce, term.over]

    def _score(self, hidden: Tensor, head: LMHead) -> tuple[Tensor, Tensor]:
        return score(hidden[self.trained.index], head, self.trained.batch.target, chunk_tokens=self.chunk)


@cache
def _autograd_function() -> Any:
    """The autograd function, defined on first use because torch is imported late."""

    class Apply(torch.autograd.Function):
        """Holds gradients computed in the forward; the backward only scales them."""

        @staticmethod
        def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> Tensor:
            gradients = Gradients(job.head, hidden, *ctx.needs_input_grad[:3])
            loss = job.run(hidden, gradients)
            ctx.save_for_backward(*gradients.finish())
            return loss

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
            hidden, weight, bias = ctx.saved_tensors
            # an unscaled loss hands its buffers over, so there is never a second d weight
            if float(grad_output) == 1.0:
                return hidden, weight, bias, None
            given = (hidden, weight, bias)
            hidden, weight, bias = (None if one is None else (one * grad_output).to(one.dtype) for one in given)
            return hidden, weight, bias, None

    return Apply
