"""Decides which numbers of a reply are scores: those of the ids that were sent, finite or -inf, at most 0, K likeliest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from understudy.http.replies import BadReply
from understudy.lazy import Tensor, torch
from understudy.linear.kept import NUM_LIKELIEST
from understudy.packing import lacks_score
from understudy.types import EXCLUDED, Sample, Scores

TOLERANCE = 1e-4
"""A log-probability this far above 0 is taken as 0: a float32 log-softmax rounds by less."""
AGREEMENT = 1e-3
"""Largest distance of two numbers for one token in one reply; beyond it the rows belong to other tokens."""
MAX_FOREIGN_MASS = 0.01
"""Largest probability of ids that the student lacks, at any one token.

Padding rows hold some e^-10, so scores stay as the server's softmax has them: the total of all such ids is not known from a
top-K reply, and a top-K that is scaled up beside a sampled score that is not would be two distributions. A teacher that
gives more to such ids cannot teach that token. Tokens that the teacher is known to have stay in the tail, whatever they hold.
"""


@dataclass(frozen=True, eq=False)
class RawScores:
    """A server's numbers for one sample, one row for each response token."""

    token_ids: Sequence[int]
    """[R] ids that it scored, as it says itself; they are compared with what was sent."""
    logprob: Sequence[Any]
    """[R] numbers, None where one is missing."""
    top: Sequence[Sequence[tuple[int, Any]]] | None = None
    """[R] rows of (id, number), the likeliest in the server's order."""
    rank: Sequence[Any] | None = None
    """[R] the place of the scored token among all, 1 the most likely, where the server says it; it is only shown."""


@dataclass(frozen=True, eq=False)
class Answer:
    """Scores of one sample, or why there are none."""

    scores: Scores | None
    missing: str = ""
    short: int = 0
    """Entries of a top-K row that are past the student's vocabulary, so that as many more must be asked for."""


def check(
    sample: Sample,
    raw: RawScores,
    *,
    k: int | None,
    num_top: int,
    vocab_size: int,
    absent: Sequence[int] = (),
    teacher_size: int = 0,
) -> Answer:
    """Returns scores of the ids that were sent, with the `k` likeliest tokens in descending order, or what is not finite.

    `num_top`: how many were asked for, at least `k`. Ids from `vocab_size` on and those in `absent` are dropped; those from
    `teacher_size` on, which no tokenizer has, may hold little (see `MAX_FOREIGN_MASS`).
    Raises BadReply for a malformed response.
    """
    wanted = sample.response_ids
    if not torch.equal(torch.tensor(list(raw.token_ids), dtype=torch.int64), wanted):
        raise BadReply(f"{len(raw.token_ids)} tokens came back that are not the {len(wanted)} that were sent")
    logprob = _numbers(raw.logprob)
    if len(logprob) != len(wanted):
        raise BadReply(f"{len(logprob)} scores for {len(wanted)} response tokens")
    scores = Scores(wanted, logprob.clamp(max=0).float())
    if sample.keep_tokens and num_top:
        scores = _with_likeliest(scores, raw, num_top, vocab_size, absent)
    if k is None:
        return _not_finite("logprob", logprob) or Answer(scores)
    ids, values = _top_rows(raw, num_top)
    if lacking := _not_finite("logprob", logprob) or _not_finite("topk_logprob", values):
        return lacking
    # rows must be descending, and the sampled token must agree with them: be among them, or below them all
    if bool((values.diff(dim=-1) > 0).any()):
        raise BadReply("the likeliest tokens are not in descending order")
    same = ids == wanted[:, None]
    other = torch.where(same, values, 0.0).sum(-1)
    wrong = torch.where(same.any(-1), (other - logprob).abs() > AGREEMENT, logprob > values[:, -1] + AGREEMENT)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise BadReply(
            f"response token {row}: its log-probability {float(logprob[row]):.4f} contradicts the row of "
            "likeliest tokens beside it"
        )
    unknown = ids >= max(vocab_size, teacher_size)
    foreign = (ids >= vocab_size) | torch.isin(ids, torch.tensor(absent, dtype=ids.dtype))
    mass = (values.exp() * unknown).sum(-1)
    if bool((mass > MAX_FOREIGN_MASS).any()):
        row = int(mass.argmax())
        return Answer(
            None,
            f"the teacher gives {float(mass[row]):.2g} of its probability at response token {row} to ids past the student's "
            f"{vocab_size} tokens, such as {int(ids[row][unknown[row]][0])}: its vocabulary is another",
        )
    short = int((k - (~foreign).sum(-1)).max()) if len(ids) else 0
    if short > 0:
        return Answer(None, f"{short} of {num_top} likeliest tokens are past the student's vocabulary", short)
    # a stable sort moves the student's ids to the front and keeps their order
    order = foreign.to(torch.int8).argsort(dim=-1, stable=True)[:, :k]
    top = values.gather(-1, order).clamp(max=0).float()
    return Answer(replace(scores, topk_ids=ids.gather(-1, order), topk_logprob=top))


def _with_likeliest(scores: Scores, raw: RawScores, num_top: int, vocab_size: int, absent: Sequence[int]) -> Scores:
    """The scores with the most likely tokens for people to look at; those that the student lacks have no name here and leave
    -1 at the end of a row."""
    ids, values = _top_rows(raw, num_top)
    foreign = (ids >= vocab_size) | torch.isin(ids, torch.tensor(absent, dtype=ids.dtype))
    order = foreign.to(torch.int8).argsort(dim=-1, stable=True)[:, :NUM_LIKELIEST]
    rank = None
    if raw.rank is not None:
        rank = torch.tensor([place if type(place) is int and place > 0 else -1 for place in raw.rank])
    return replace(
        scores,
        likeliest_ids=torch.where(foreign, -1, ids).gather(-1, order),
        likeliest_logprob=torch.where(foreign, torch.nan, values).gather(-1, order).clamp(max=0).float(),
        rank=rank,
    )


def _not_finite(name: str, values: Tensor) -> Answer | None:
    """Returns which of numbers [R] or [R, K] are not finite, -inf aside; None if all are."""
    rows = lacks_score(name, values).reshape(len(values), -1).any(-1).nonzero()
    if not len(rows):
        return None
    return Answer(None, f"{name} of response token {int(rows[0])} (and {len(rows) - 1} more) is not finite")


def _top_rows(raw: RawScores, num_top: int) -> tuple[Tensor, Tensor]:
    """Returns ids and numbers [R, num_top]. Rows are cut: vLLM adds the sampled token to its likeliest."""
    rows = raw.top
    if rows is None or len(rows) != len(raw.token_ids):
        raise BadReply(f"{0 if rows is None else len(rows)} rows for {len(raw.token_ids)} tokens")
    if few := [row for row in rows if len(row) < num_top]:
        raise BadReply(f"{len(few[0])} likeliest tokens came back where {num_top} were asked for")
    ids = torch.tensor([[token for token, _ in row[:num_top]] for row in rows], dtype=torch.int64)
    values = _numbers([number for row in rows for _, number in row[:num_top]])
    ids, values = ids.reshape(len(rows), num_top), values.reshape(len(rows), num_top)
    if bool((ids < 0).any()) or (num_top > 1 and bool((ids.sort(-1).values.diff(dim=-1) == 0).any())):
        raise BadReply("a row of likeliest tokens names a token twice, or none")
    return ids, values


def _numbers(values: Sequence[Any]) -> Tensor:
    """Returns float64, so that rounding is left to the end. Raises BadReply for a number above 0."""
    found = torch.tensor([number(value) for value in values], dtype=torch.float64)
    if bool((found > TOLERANCE).any()):
        raise BadReply(f"{float(found[found > TOLERANCE][0])} is above 0, so no log-probability")
    # vLLM writes -9999 for -inf, which JSON lacks (`clamp_prompt_logprobs`)
    return torch.where(found <= EXCLUDED, -math.inf, found)


def number(value: Any) -> float:
    """Returns NaN for None. Raises TypeError for anything but an int or a float, True and False included."""
    if value is None:
        return math.nan
    if type(value) not in (float, int):
        raise TypeError(f"{value!r} stands where a number should")
    return float(value)


def empty_scores(sample: Sample, k: int | None) -> Scores:
    """Returns rows of NaN and -1: no row for a response without a token, which is not sent to a server."""
    size = sample.num_response_tokens
    top = {}
    if k is not None:
        top = {"topk_ids": torch.full((size, k), -1), "topk_logprob": torch.full((size, k), math.nan)}
    return Scores(sample.response_ids, torch.full((size,), math.nan), **top)
