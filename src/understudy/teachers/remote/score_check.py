"""What of a server's reply is a score: the ids that were sent, finite numbers at most 0, K distinct likeliest tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from understudy.http import BadReply
from understudy.packing import Unscored
from understudy.types import Sample, Scores

TOLERANCE = 1e-4
"""How far above 0 a log-probability may lie, which is then taken as 0: a float32 log-softmax rounds by less."""
AGREEMENT = 1e-3
"""How far two numbers for one token in one reply may lie apart; more, and the rows belong to other tokens."""
LEAST_LOGPROB = -9999.0
"""What vLLM writes for minus infinity, which JSON has not (`clamp_prompt_logprobs`): no score either."""
MAX_FOREIGN_MASS = 0.01
"""Of a teacher's probability on ids that the student lacks, at any one token.

Padding rows hold some e^-10, so scores are left as the server's softmax has them: what all such ids hold together is not
known from a top-K reply, and a top-K that is scaled up beside a sampled score that is not would be two distributions. A
teacher that means such an id is no teacher of that token.
"""


@dataclass(frozen=True, eq=False)
class Raw:
    """What a server says about one sample, one row for each response token."""

    token_ids: Sequence[int]
    """[R] the ids that it scored."""
    logprob: Sequence[Any]
    """[R] numbers; None where there is none."""
    top: Sequence[Sequence[tuple[int, Any]]] | None = None
    """[R] its likeliest tokens in its order, beside their numbers; or those that were asked for by id."""


@dataclass(frozen=True, eq=False)
class Answer:
    """What became of one sample of a reply."""

    scores: Scores | None
    missing: str = ""
    """Why there are none."""
    short: int = 0
    """Entries of a top-K row that fell to ids past the student's vocabulary and must be asked for beyond K."""


def check(sample: Sample, raw: Raw, *, k: int | None, num_top: int, vocab_size: int) -> Answer:
    """Scores of the ids that were sent, finite, at most 0, with `k` distinct likeliest tokens in descending order.

    `num_top`: how many were asked for, at least `k`. Ids past `vocab_size` are dropped (see `MAX_FOREIGN_MASS`).
    Raises BadReply for what no honest reply holds; a score that is missing is no number but a reason.
    """
    wanted = sample.response_ids
    said = torch.tensor(list(raw.token_ids), dtype=torch.int64)
    if not torch.equal(said, wanted):
        raise BadReply(f"{len(said)} tokens came back that are not the {len(wanted)} that were sent")
    logprob = _numbers(raw.logprob)
    if len(logprob) != len(wanted):
        raise BadReply(f"{len(logprob)} scores for {len(wanted)} response tokens")
    _check_sign(sample, logprob)
    if k is None:
        return _lacking("logprob", logprob) or Answer(Scores(wanted, logprob.clamp(max=0).float()))
    ids, values = _top_rows(sample, raw, num_top)
    if lacking := _lacking("logprob", logprob) or _lacking("topk_logprob", values):
        return lacking
    _check_top(sample, wanted, logprob, ids, values)
    foreign = ids >= vocab_size
    mass = (values.exp() * foreign).sum(-1)
    if bool((mass > MAX_FOREIGN_MASS).any()):
        row = int(mass.argmax())
        return Answer(
            None,
            f"the teacher gives {float(mass[row]):.2g} of its probability at response token {row} to ids past the student's "
            f"{vocab_size} tokens, such as {int(ids[row][foreign[row]][0])}: its vocabulary is another",
        )
    short = int((k - (~foreign).sum(-1)).max()) if len(ids) else 0
    if short > 0:
        return Answer(None, f"{short} of {num_top} likeliest tokens are past the student's vocabulary", short)
    # what is kept moves to the front in its order
    order = foreign.to(torch.int8).argsort(dim=-1, stable=True)[:, :k]
    top = values.gather(-1, order).clamp(max=0).float()
    return Answer(Scores(wanted, logprob.clamp(max=0).float(), ids.gather(-1, order), top))


def check_at(sample: Sample, raw: Raw, ids: Tensor) -> Answer:
    """The same with the numbers of given ids [R, K] in their order."""
    answer = check(sample, Raw(raw.token_ids, raw.logprob), k=None, num_top=0, vocab_size=0)
    if answer.scores is None:
        return answer
    rows = [dict(row) for row in raw.top or ()]
    if len(rows) != len(ids) or any(
        int(token) not in row for row, asked in zip(rows, ids, strict=True) for token in asked
    ):
        raise BadReply("not all of the ids that were asked for came back")
    values = _numbers([row[int(token)] for row, asked in zip(rows, ids, strict=True) for token in asked])
    values = values.reshape(ids.shape)
    _check_sign(sample, values)
    apart = (values - _numbers(raw.logprob)[:, None]).abs()
    wrong = (ids == sample.response_ids[:, None]) & values.isfinite() & (apart > AGREEMENT)
    if bool(wrong.any()):
        raise BadReply(f"response token {int(wrong.nonzero()[0, 0])}: two numbers for it contradict each other")
    scores = Scores(answer.scores.token_ids, answer.scores.logprob, ids, values.clamp(max=0).float())
    return _lacking("topk_logprob", values) or Answer(scores)


def _lacking(name: str, values: Tensor) -> Answer | None:
    """What is wrong with numbers [R] or [R, K] that are not all finite; None where they are."""
    missing = ~values.isfinite() | (values <= LEAST_LOGPROB)
    rows = missing.reshape(len(values), -1).any(-1).nonzero()
    if not len(rows):
        return None
    return Answer(None, f"{name} of response token {int(rows[0])} (and {len(rows) - 1} more) is not finite")


def _check_sign(sample: Sample, values: Tensor) -> None:
    if bool((values > TOLERANCE).any()):
        raise BadReply(f"{float(values[values > TOLERANCE][0])} is above 0, so no log-probability")


def _top_rows(sample: Sample, raw: Raw, num_top: int) -> tuple[Tensor, Tensor]:
    """[R, num_top] ids and numbers, cut to what was asked for: vLLM adds the sampled token to its likeliest."""
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
    _check_sign(sample, values)
    return ids, values


def _check_top(sample: Sample, wanted: Tensor, logprob: Tensor, ids: Tensor, values: Tensor) -> None:
    """Rows are descending, and the sampled token agrees with them: it is among them, or below them all."""
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


def _numbers(values: Sequence[Any]) -> Tensor:
    """float64: rounding is left to the end."""
    return torch.tensor([number(value) for value in values], dtype=torch.float64)


def number(value: Any) -> float:
    """NaN for what is not there. Raises TypeError for what is no number."""
    if value is None:
        return math.nan
    if type(value) not in (float, int):
        raise TypeError(f"{value!r} stands where a number should")
    return float(value)


def unscored(sample: Sample, k: int | None, reason: str) -> Unscored:
    """NaN, and id -1, in every row; `k`: of a top-K row, None for none. Entropies, which no server gives, stay absent."""
    return Unscored(sample.response_ids, **_blank(sample, k), reason=reason)


def no_rows(sample: Sample, k: int | None) -> Scores:
    """Of a response without a token, which no server need be asked for."""
    return Scores(sample.response_ids, **_blank(sample, k))


def _blank(sample: Sample, k: int | None) -> dict[str, Tensor]:
    size, nan = sample.num_response_tokens, math.nan
    fields = {"logprob": torch.full((size,), nan)}
    if k is not None:
        fields |= {"topk_ids": torch.full((size, k), -1), "topk_logprob": torch.full((size, k), nan)}
    return fields
