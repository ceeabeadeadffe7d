"""Terms of a whole optimizer step, cut to its micro-batches: for methods whose terms need every token at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from understudy.linear.plan import TermsOf, num_distinct
from understudy.losses.terms import Reads, Term
from understudy.types import TokenBatch, take_rows


@dataclass(frozen=True, eq=False)
class CutTerms:
    """A micro-batch's part of the terms, in place of the method that made them."""

    given: list[Term]
    reads: Reads
    scope: str = "batch"
    requires: tuple[str, ...] = ()

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        """As `Method.terms`."""
        return self.given

    def at(self, step: int) -> tuple[CutTerms, int]:
        """As `Method.at`."""
        return self, step


def join(batches: Sequence[TokenBatch]) -> TokenBatch:
    """The tokens of all batches one after the other; samples keep apart. Fields that one of them lacks are left out."""
    values = {}
    for item in fields(TokenBatch):
        parts = [getattr(batch, item.name) for batch in batches]
        if all(part is not None for part in parts):
            values[item.name] = torch.cat(parts)
    offset, names = 0, []
    for batch in batches:
        names.append(batch.sequence + offset)
        offset += int(batch.sequence.max()) + 1 if len(batch) else 0
    return TokenBatch(**(values | {"sequence": torch.cat(names)}))


def cut_terms(
    method: TermsOf, batches: Sequence[TokenBatch], step: int, *, elsewhere: Sequence[TokenBatch] = ()
) -> list[CutTerms]:
    """The terms over the trained tokens of all `batches` and of those on other ranks, cut to each of `batches`.

    Every batch has `student_logprob` and `student_entropy`. Denominators of the terms' own: `count_own`.
    """
    trained = [batch.rows(batch.mask) for batch in batches]
    whole = join([*trained, *(batch.rows(batch.mask) for batch in elsewhere)])
    terms = method.terms(whole, step)
    ends = torch.tensor([len(batch) for batch in trained]).cumsum(0).tolist()
    parts = [slice(end - len(batch), end) for end, batch in zip(ends, trained, strict=True)]
    return [CutTerms([cut_term(term, part) for term in terms], method.reads) for part in parts]


def cut_term(term: Term, part: slice) -> Term:
    """The term over some of its rows."""
    shown = {name: value[part] for name, value in term.metrics.items()}
    return replace(take_rows(term, part), loss=take_rows(term.loss, part), metrics=shown)


def count_own(batches: Sequence[TokenBatch], cuts: Sequence[CutTerms]) -> dict[str, float]:
    """The denominators that terms bring themselves, by their name, over these micro-batches."""
    counts: dict[str, float] = {}
    for batch, cut in zip(batches, cuts, strict=True):
        for term in cut.given:
            if term.per is not None:
                names = batch.sequence[batch.mask][term.per]
                found = len(names) if term.reduce == "token" else num_distinct(names)
                counts[term.name] = counts.get(term.name, 0.0) + found
    return counts
