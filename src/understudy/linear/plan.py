"""Everything in an evaluation except the logits: select the trained rows, check them, weight the terms.

Batch-scope terms are computed once for a whole optimizer step and then split into its micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from operator import itemgetter
from typing import Protocol

from understudy.errors import ScoreError
from understudy.lazy import Tensor, torch
from understudy.linear.head import LMHead
from understudy.linear.kept import Kept
from understudy.losses.divergences import floor_excluded
from understudy.losses.terms import Over, Reads, Rows, Term
from understudy.types import EXCLUDED, Metric, TokenBatch, map_tensors

FullTeacher = tuple[Tensor, LMHead]


class TermsOf(Protocol):
    """The part of a method that an evaluation uses (see `methods.base.Method`)."""

    @property
    def requires(self) -> tuple[str, ...]: ...
    @property
    def scope(self) -> str: ...
    @property
    def reads(self) -> Reads: ...
    @property
    def min_log_ratio(self) -> float | None: ...
    def terms(self, batch: TokenBatch, step: int) -> list[Term]: ...
    def at(self, step: int) -> tuple[TermsOf, int]: ...


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A loss to call `backward` on, and its metrics by name."""

    loss: Tensor
    metrics: dict[str, Metric]


def count_denominators(batches: list[TokenBatch]) -> dict[str, float]:
    """The denominators of a whole optimizer step: trained "tokens" and the "sequences" that have any; "own_tokens" and
    "own_sequences" count those that the student wrote, "given_tokens" and "given_sequences" the others."""
    counts = dict.fromkeys((f"{prefix}{unit}" for prefix in PREFIXES.values() for unit in UNITS), 0.0)
    for batch in batches:
        for over, prefix in PREFIXES.items():
            names = batch.sequence[batch.mask & members_of(batch, over)]
            counts[f"{prefix}tokens"] += len(names)
            counts[f"{prefix}sequences"] += num_distinct(names)
    return counts


PREFIXES: Mapping[Over, str] = {"trained": "", "own": "own_", "given": "given_"}
UNITS = ("tokens", "sequences")


def members_of(batch: TokenBatch, over: Over) -> Tensor:
    """Tokens of a batch that a mean is over, trained or not. [T] bool."""
    if over == "trained":
        return torch.ones_like(batch.mask)
    return batch.on_policy if over == "own" else ~batch.on_policy


def num_distinct(names: Tensor) -> int:
    """Number of distinct entries."""
    return int(names.unique().numel())


@dataclass(frozen=True, eq=False)
class Trained:
    """The N trained rows of a batch, with their weights in a mean."""

    index: Tensor
    """[N] positions in the batch."""
    batch: TokenBatch
    """N rows."""
    counts: Mapping[str, float]

    def share(self, term: Term) -> Tensor:
        """Weight of each row in the term's mean. [N] float64. All 0 if the mean is over no rows.

        `counts` needs only "tokens" and "sequences" if the student wrote every token. Raises ValueError if others wrote
        some and the term's mean is over the student's own.
        """
        members = members_of(self.batch, term.over) if term.per is None else term.per
        unit = "tokens" if term.reduce == "token" else "sequences"
        key = f"{PREFIXES[term.over]}{unit}" if term.per is None else term.name
        total = self.counts.get(key)
        if total is None and self.counts and term.per is None:
            if not bool(self.batch.on_policy.all()):
                raise ValueError(
                    f"counts lacks {key!r}, over which term {term.name!r} is a mean: use count_denominators"
                )
            total = self.counts.get(unit)
        if term.reduce == "token":
            total = float(members.sum()) if total is None else total
            return members.double() / total if total else members.double() * 0.0
        names, group = self.batch.sequence.unique(return_inverse=True)
        lengths = torch.zeros(names.numel(), dtype=torch.float64, device=group.device)
        lengths.index_add_(0, group, members.double())
        total = float((lengths > 0).sum()) if total is None else total
        weight = torch.ones_like(lengths) if term.reduce == "constant" else 1.0 / lengths.clamp_min(1.0)
        return members.double() * weight[group] / total if total else members.double() * 0.0

    def weigh(self, terms: list[Term]) -> list[tuple[Term, Tensor]]:
        """Each term of a whole batch with the weight of its N rows."""
        return [(term, self.share(term)) for term in terms]


def choose_trained(
    method: TermsOf,
    batch: TokenBatch,
    teacher: FullTeacher | None,
    reference: FullTeacher | None,
    counts: Mapping[str, float] | None,
    rng: torch.Generator | None,
) -> Trained:
    """The trained rows, with nothing missing.

    Raises ScoreError if a score that the method needs is absent or NaN on a trained row.
    """
    reads = method.reads
    if reads.divergence is not None and teacher is None:
        raise ScoreError(
            f"{type(method).__name__} needs the teacher's whole next-token distribution: pass teacher=(hidden, LMHead), "
            "from a teacher that is loaded here or served (`teacher.type: local` or `served`)"
        )
    if reads.extrapolate is not None and reference is None:
        raise ScoreError(
            f"{type(method).__name__} needs the reference's whole next-token distribution: pass reference=(hidden, LMHead)"
        )
    if batch.uniform is None and rng is not None:
        draws = torch.rand(len(batch), generator=rng, device=rng.device, dtype=torch.float64)
        batch = replace(batch, uniform=draws.to(batch.target.device))
    index = batch.mask.nonzero().squeeze(-1)
    rows = batch.rows(index)
    absent: dict[str, Tensor] = {}
    for name in [*method.requires, *(["topk_ids", "topk_logprob"] if reads.topk is not None else [])]:
        whose, source = ("reference model", reference) if name.startswith("reference") else ("teacher", teacher)
        value = getattr(rows, name)
        if value is None:
            if source is not None and name not in GIVEN_WITH_THE_BATCH:
                continue
            asked = f"ask the {whose} for it (its `needs` are {sorted(getattr(method, 'needs', ()))})"
            hint = GIVEN_WITH_THE_BATCH.get(name, asked)
            raise ScoreError(f"{type(method).__name__} needs {name}, which the batch does not have: {hint}")
        if name.endswith("_ids"):
            continue
        missing = value.isnan().reshape(len(rows), -1).any(-1) if len(rows) else rows.mask
        if name == "rollout_logprob":
            missing = missing & rows.on_policy
        absent[name] = missing
    # one transfer from the device for all of them
    found = torch.stack([missing.any() for missing in absent.values()]).tolist() if absent else []
    for (name, missing), is_missing in zip(absent.items(), found, strict=True):
        if is_missing:
            row = int(missing.nonzero()[0])
            raise ScoreError(
                f"{name} is NaN on {int(missing.sum())} trained tokens, first in sample {int(rows.sequence[row])} at "
                f"trained token {row}: score it again or drop the sample (`train.on_missing_score: drop`)"
            )
    return Trained(index, rows, counts or {})


def floor_scores(batch: TokenBatch, min_log_ratio: float | None) -> TokenBatch:
    """The batch with `log S_old(y_t) + min_log_ratio` in place of the scores of tokens that the teacher or the reference
    excludes, so that every log-ratio is finite. None: a method that reads no scores."""
    student = batch.student_logprob
    if min_log_ratio is None or student is None:
        return batch
    scores = {"teacher_logprob": batch.teacher_logprob, "reference_logprob": batch.reference_logprob}
    return replace(
        batch,
        **{name: floor_excluded(value, student, min_log_ratio) for name, value in scores.items() if value is not None},
    )


GIVEN_WITH_THE_BATCH = {
    "uniform": "set it, one draw a token, or pass rng=torch.Generator()",
    "outcome_advantage": "grade the samples and compare them with their group (`losses.advantages.group_advantage`)",
    "rollout_logprob": "the engine records it",
}
"""Fields that the batch must contain, because no model can compute them -> their sources."""


OUTLIER_NATS = 5.0
"""|log T - log S| above which a token is an outlier: a factor of 150 between the two probabilities."""


def weighted_loss(terms: list[tuple[Term, Tensor]], rows: Rows, batch: TokenBatch, tally: Tally) -> Tensor:
    """`sum_terms coef * sum_t share_t loss_t` over C rows, a scalar; metrics go into `tally`."""
    total = rows.logprob.new_zeros(())
    for term, share in terms:
        mask = torch.ones_like(batch.mask) if term.mask is None else term.mask
        # where, not a product, before and after the loss: an excluded row may hold an infinity, and 0 * inf is NaN
        kept = torch.where(mask, term.loss(_detach_rows(rows, ~mask)), 0.0)
        total = total + term.coef * (kept * share.to(kept.dtype)).sum()
        tally.add(f"loss/{term.name}", kept.detach(), mask)
        for name, number in term.metrics.items():
            tally.add(name, number, ~number.isnan())
    tally.add("student_entropy", rows.entropy.detach())
    tally.add("student_logprob", rows.logprob.detach())
    if batch.rollout_logprob is not None:
        sampled = batch.on_policy & ~batch.rollout_logprob.isnan()
        gap = torch.where(sampled, batch.rollout_logprob - rows.logprob.detach(), 0.0)
        tally.add("sampler_gap", gap.abs(), sampled)
    if batch.teacher_logprob is not None:
        scored = batch.on_policy & ~batch.teacher_logprob.isnan()
        excluded = batch.teacher_logprob <= EXCLUDED
        tally.add("teacher_excluded", excluded.to(rows.logprob.dtype), scored)
        known = scored & ~excluded
        ratio = torch.where(known, batch.teacher_logprob - rows.logprob.detach(), 0.0)
        tally.add("log_ratio", ratio, known)
        tally.add("log_ratio_positive", (ratio > 0).to(ratio.dtype), scored)
        # E_S[min(1, T / S)] is the probability that the two rows have in common, 1 - TV
        tally.add("overlap", torch.where(known, ratio.clamp(max=0.0).exp(), 0.0), scored)
        size = ratio.abs()
        is_outlier = size > OUTLIER_NATS
        tally.add("outliers", is_outlier.to(ratio.dtype), known)
        tally.add("log_ratio_size", size, known)
        tally.add("outlier_size", torch.where(is_outlier, size, 0.0), known)
    if batch.teacher_entropy is not None:
        tally.add("teacher_entropy", batch.teacher_entropy)
    return total


def _detach_rows(rows: Rows, which: Tensor) -> Rows:
    """The rows, detached where `which` [C]."""

    def cut(value: Tensor) -> Tensor:
        return torch.where(which.reshape(-1, *[1] * (value.dim() - 1)), value.detach(), value)

    return map_tensors(rows, cut)


class Tally:
    """Sums of metrics. They stay on the device until the end, so that no chunk waits for a transfer."""

    def __init__(self, keep: Kept | None = None) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._keep = keep

    def add(self, name: str, value: Tensor, mask: Tensor | None = None) -> None:
        """Adds the rows of `value` where `mask` (None: all)."""
        if self._keep is not None:
            self._keep.add(name, value, mask)
        total = value.double().sum() if mask is None else torch.where(mask, value, 0.0).double().sum()
        # filled on the device: a number from the host would force a synchronisation
        count = total.new_full((), float(value.numel())) if mask is None else mask.sum().double()
        self._sums.setdefault(name, []).append(torch.stack([total, count]))

    def metrics(self) -> dict[str, Metric]:
        """One transfer from the device."""
        if not self._sums:
            return {}
        table = torch.stack([torch.stack(parts).sum(0) for parts in self._sums.values()]).tolist()
        return {name: Metric(total, count) for name, (total, count) in zip(self._sums, table, strict=True)}


@dataclass(frozen=True, eq=False)
class CutTerms:
    """A micro-batch's part of precomputed terms; stands in for the method."""

    given: list[Term]
    reads: Reads
    scope: str = "batch"
    requires: tuple[str, ...] = ()
    min_log_ratio: float | None = None

    def terms(self, batch: TokenBatch, step: int) -> list[Term]:
        """As `Method.terms`."""
        return self.given

    def at(self, step: int) -> tuple[CutTerms, int]:
        """As `Method.at`."""
        return self, step


def join(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Concatenates batches, with distinct samples. Drops fields that any of them lacks."""
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

    Every batch needs `student_logprob` and `student_entropy`. `count_own` gives the terms' own denominators.
    """
    trained = [batch.rows(batch.mask) for batch in batches]
    whole = join([*trained, *(batch.rows(batch.mask) for batch in elsewhere)])
    terms = method.terms(floor_scores(whole, method.min_log_ratio), step)
    ends = torch.tensor([len(batch) for batch in trained]).cumsum(0).tolist()
    parts = [slice(end - len(batch), end) for end, batch in zip(ends, trained, strict=True)]
    return [
        CutTerms([cut_term(term, part) for term in terms], method.reads, min_log_ratio=method.min_log_ratio)
        for part in parts
    ]


def cut_term(term: Term, part: slice) -> Term:
    """The term over some of its rows."""
    shown = {name: value[part] for name, value in term.metrics.items()}
    cut = itemgetter(part)
    return replace(map_tensors(term, cut), loss=map_tensors(term.loss, cut), metrics=shown)


def count_own(batches: Sequence[TokenBatch], cuts: Sequence[CutTerms]) -> dict[str, float]:
    """The terms' own denominators over these micro-batches, by name."""
    counts: dict[str, float] = {}
    for batch, cut in zip(batches, cuts, strict=True):
        for term in cut.given:
            if term.per is not None:
                names = batch.sequence[batch.mask][term.per]
                found = len(names) if term.reduce == "token" else num_distinct(names)
                counts[term.name] = counts.get(term.name, 0.0) + found
    return counts
