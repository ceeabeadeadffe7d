"""From samples to packed tensors. The only place where positions shift by one.

A sample's tokens are fed without the last one, which predicts nothing: input i predicts token i + 1.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from understudy.errors import DataError, ScoreError
from understudy.types import Author, Sample, Scores, TokenBatch, fill

LOGPROB_TOLERANCE = 1e-3
"""How far above 0 a log-probability may lie: a float32 log-softmax over 1e5 logits of size 100 errs by less."""
TRAINED = (Author.STUDENT, Author.TEACHER)


@dataclass(frozen=True, eq=False, kw_only=True)
class Unscored(Scores):
    """Scores of a sample that the teacher could not read: whatever was asked for is NaN, or id -1, in every row."""

    reason: str
    """And what to do about it."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Whole sequences side by side in B rows of L slots. A free slot holds id 0 at position 0, a sequence by itself."""

    input_ids: Tensor
    """[B, L] int64."""
    position_ids: Tensor
    """[B, L] int64, restarting at 0 with every sequence."""
    predicts: Tensor
    """[T] int64, index into B * L of the slot that predicts each response token, samples in their order."""
    sizes: tuple[int, ...]
    """Response tokens of each sample; they add up to T."""


RowStyle = Literal["packed", "single", "alone"]
"""How sequences share rows: several side by side; all in one row, which is what flash attention keeps apart; or each in a
row of its own, for models that do not keep sequences apart by their positions."""


class _Rows:
    """Rows of `width` slots, filled best-fit: a sequence goes where it leaves the least room."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self._room: list[tuple[int, int]] = []

    def fits(self, length: int) -> bool:
        """Whether a row that is open has room."""
        return bool(self._room) and self._room[-1][0] >= length

    def place(self, length: int) -> int:
        """The first of the slots taken, as an index into count * width."""
        if not self.fits(length):
            insort(self._room, (self.width, self.count))
            self.count += 1
        room, row = self._room.pop(bisect_left(self._room, (length, -1)))
        insort(self._room, (room - length, row))
        return row * self.width + self.width - room


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def micro_batches(lengths: Sequence[int], max_tokens: int, style: RowStyle = "packed") -> list[list[int]]:
    """Groups of indices; a forward over `lay_out` of one group has at most `max_tokens` slots, padding included.

    Every index occurs once; neighbours in length go together; a length above `max_tokens` gets a group of its own.
    Raises ValueError for a budget below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; a micro-batch needs room for at least one token")
    groups: list[list[int]] = []
    rows = _Rows(0)
    for index in _longest_first(lengths):
        length = lengths[index]
        fits = rows.fits(length) and style != "alone"
        if not groups or not (fits or (rows.count + 1) * rows.width <= max_tokens):
            groups.append([])
            rows = _Rows(length)
        rows.place(rows.width if style == "alone" else length)
        groups[-1].append(index)
    return groups


def lay_out(samples: Sequence[Sample], row_tokens: int | None = None, *, style: RowStyle = "packed") -> Layout:
    """Sequences packed, longest first, into rows of `row_tokens` slots (default: the longest sequence; all of them where
    `style` is "single", and a single row is cut to what it holds). Attention over B rows costs B * L^2.

    Run the model with `attention_mask=None, use_cache=False`: with a cache the sequences would see each other.
    Raises DataError for a sample without a prompt token, ValueError for no samples and for rows that are too short.
    """
    lengths = [sample.token_ids.numel() - 1 for sample in samples]
    for sample in samples:
        if sample.prompt_length < 1:
            raise DataError(f"sample {sample.key} has no prompt token, so nothing predicts its first response token")
    if not samples:
        raise ValueError("lay_out needs at least one sample")
    default = sum(lengths) if style == "single" else max(lengths)
    width = max(1, default) if row_tokens is None else row_tokens
    if width < max(lengths):
        raise ValueError(f"row_tokens is {width}; the longest sequence needs {max(lengths)}")
    rows = _Rows(width)
    starts = [0] * len(samples)
    for index in _longest_first(lengths):
        starts[index] = rows.place(width if style == "alone" else lengths[index])
    if rows.count == 1 and style != "alone":
        width = max(1, sum(lengths))

    input_ids = torch.zeros(rows.count * width, dtype=torch.int64)
    position_ids = torch.zeros_like(input_ids)
    positions = torch.arange(input_ids.numel())
    predicts = []
    for sample, start, length in zip(samples, starts, lengths, strict=True):
        input_ids[start : start + length] = sample.token_ids[:-1]
        position_ids[start : start + length] = positions[:length]
        predicts.append(positions[start + sample.prompt_length - 1 : start + length])
    sizes = tuple(sample.num_response_tokens for sample in samples)
    return Layout(input_ids.view(-1, width), position_ids.view(-1, width), torch.cat(predicts), sizes)


def pack(
    samples: Sequence[Sample],
    scores: Sequence[Scores] | None,
    *,
    reference: Sequence[Scores] | None = None,
    train: Collection[Author] = TRAINED,
    uniform: Tensor | None = None,
) -> TokenBatch:
    """The response tokens of all samples in their order, with what is known about each. T = sum of response lengths.

    `reference`: scores of the reference model. `uniform` [T]: one draw per token. The student's fields stay None.
    Raises ScoreError, naming the sample, when ids or lengths differ from the sample's, when top-K sizes differ or ids
    repeat, and when a score of a trained token is not finite or no log-probability.
    """
    author = _response_authors(samples)
    batch = TokenBatch(
        target=_join([sample.response_ids for sample in samples], torch.int64),
        mask=_written_by(author, train),
        on_policy=author == int(Author.STUDENT),
        sequence=_sequence(samples),
        rollout_logprob=_join_rollout(samples),
        uniform=uniform,
        outcome_advantage=_join_advantages(samples),
        correct=_join_correct(samples),
    )
    teacher = {} if scores is None else _join_checked(samples, scores, batch.mask)
    second = {} if reference is None else _join_checked(samples, reference, batch.mask)
    return fill(
        batch,
        teacher_logprob=teacher.get("logprob"),
        topk_ids=teacher.get("topk_ids"),
        topk_logprob=teacher.get("topk_logprob"),
        teacher_entropy=teacher.get("entropy"),
        reference_logprob=second.get("logprob"),
    )


def split_scored(
    samples: Sequence[Sample],
    scores: Sequence[Scores],
    on_missing: Literal["error", "drop"],
    *,
    train: Collection[Author] = TRAINED,
) -> tuple[list[Sample], list[Scores], int]:
    """The samples whose trained tokens are all scored, their scores, and how many samples were dropped.

    Raises ScoreError for scores of other ids, and for a missing score (absent, NaN or infinite) under "error".
    """
    joined = _join_scores(samples, scores)
    missing = _missing(samples, scores, joined, _written_by(_response_authors(samples), train))
    if on_missing == "error":
        _refuse_missing(samples, scores, missing)
    sequence = _sequence(samples)
    gone = {index for rows in missing.values() for index in sequence[rows].tolist()}
    kept = [i for i in range(len(samples)) if i not in gone]
    return [samples[i] for i in kept], [scores[i] for i in kept], len(gone)


def _join(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([part.to(dtype) for part in parts]) if parts else torch.zeros(0, dtype=dtype)


def _sequence(samples: Sequence[Sample]) -> Tensor:
    sizes = torch.tensor([sample.num_response_tokens for sample in samples], dtype=torch.int64)
    return torch.repeat_interleave(sizes)


def _response_authors(samples: Sequence[Sample]) -> Tensor:
    return _join([sample.author[sample.prompt_length :] for sample in samples], torch.uint8)


def _written_by(author: Tensor, train: Collection[Author]) -> Tensor:
    return torch.isin(author, torch.tensor([int(who) for who in train], dtype=author.dtype))


def _join_rollout(samples: Sequence[Sample]) -> Tensor | None:
    """[T], NaN for samples that nobody sampled; None when that is all of them."""
    if all(sample.rollout_logprob is None for sample in samples):
        return None
    return torch.cat(
        [
            torch.full((sample.num_response_tokens,), float("nan"))
            if sample.rollout_logprob is None
            else sample.rollout_logprob[sample.prompt_length :]
            for sample in samples
        ]
    )


def _per_token(samples: Sequence[Sample], values: Sequence[float | bool], dtype: torch.dtype) -> Tensor:
    """[T], a number of each sample at all its tokens."""
    sizes = torch.tensor([sample.num_response_tokens for sample in samples], dtype=torch.int64)
    return torch.tensor(values, dtype=dtype).repeat_interleave(sizes)


def _join_advantages(samples: Sequence[Sample]) -> Tensor | None:
    """[T], NaN for samples that have none; None when that is all of them."""
    if all(sample.advantage is None for sample in samples):
        return None
    values = [float("nan") if sample.advantage is None else sample.advantage for sample in samples]
    return _per_token(samples, values, torch.float32)


def _join_correct(samples: Sequence[Sample]) -> Tensor | None:
    """[T]; None where a sample has no grade."""
    grades = [sample.grade for sample in samples]
    known = [grade.right for grade in grades if grade is not None]
    return _per_token(samples, known, torch.bool) if samples and len(known) == len(samples) else None


def _join_checked(samples: Sequence[Sample], scores: Sequence[Scores], mask: Tensor) -> dict[str, Tensor]:
    """The scores of all response tokens by field, nothing missing and nothing impossible where `mask`."""
    joined = _join_scores(samples, scores)
    _refuse_missing(samples, scores, _missing(samples, scores, joined, mask))
    for name in ("logprob", "topk_logprob"):
        if name in joined:
            _refuse(samples, mask & _any(joined[name] > LOGPROB_TOLERANCE), f"{name} is above 0, so no log-probability")
    if "topk_ids" in joined:
        ranked = joined["topk_ids"].sort(-1).values
        _refuse(samples, mask & _any(ranked[:, 1:] == ranked[:, :-1]), "topk_ids names a token twice")
    return joined


def _join_scores(samples: Sequence[Sample], scores: Sequence[Scores]) -> dict[str, Tensor]:
    """Fields that any score has, over all response tokens; where one score lacks a field, NaN, or id -1."""
    if len(samples) != len(scores):
        raise ScoreError(
            f"{len(scores)} scores came back for {len(samples)} samples; there must be one for each, in order"
        )
    for sample, score in zip(samples, scores, strict=True):
        _check_ids(sample, score)
    joined = {}
    for name, absent in (
        ("logprob", float("nan")),
        ("entropy", float("nan")),
        ("topk_logprob", float("nan")),
        ("topk_ids", -1),
    ):
        values = [getattr(score, name) for score in scores]
        if name == "entropy" and any(value is None for value in values):
            # a server gives none; what a method reads of it, it estimates
            continue
        shape = next((value.shape[1:] for value in values if value is not None), None)
        if shape is None:
            continue
        for sample, value in zip(samples, values, strict=True):
            if value is not None and value.shape != (sample.num_response_tokens, *shape):
                raise ScoreError(
                    f"sample {sample.key}: {name} has shape {tuple(value.shape)}; expected "
                    f"{(sample.num_response_tokens, *shape)}: one row for each response token, one K for all samples"
                )
        joined[name] = torch.cat(
            [
                torch.full((sample.num_response_tokens, *shape), absent) if value is None else value
                for sample, value in zip(samples, values, strict=True)
            ]
        )
    return joined


def _check_ids(sample: Sample, score: Scores) -> None:
    """Raises ScoreError at the first token that was scored as another one."""
    ours, theirs = sample.response_ids, score.token_ids
    if torch.equal(ours, theirs):
        return
    both = min(ours.numel(), theirs.numel())
    differs = (ours[:both] != theirs[:both]).nonzero()
    if not len(differs):
        found = f"{theirs.numel()} tokens were scored, the response has {ours.numel()}"
    else:
        at = int(differs[0])
        found = f"response token {at} is {int(ours[at])}, the teacher scored {int(theirs[at])} there"
    raise ScoreError(
        f"sample {sample.key}: {found}. Scores must be of the ids that were sent: compare the tokenizers, "
        "chat templates and prompts of student and teacher"
    )


def _any(rows: Tensor) -> Tensor:
    """[T] or [T, K] -> [T]"""
    return rows if rows.dim() == 1 else rows.any(-1)


def _missing(
    samples: Sequence[Sample], scores: Sequence[Scores], joined: dict[str, Tensor], mask: Tensor
) -> dict[str, Tensor]:
    """Rows that are trained and lack a finite score, by field. [T] bool each."""
    missing = {
        name: mask & _any(~value.isfinite() if value.is_floating_point() else value < 0)
        for name, value in joined.items()
    }
    if any(score.hidden is not None for score in scores):
        missing["hidden"] = mask & ~_whole_rows(samples, scores)
    return missing


def _whole_rows(samples: Sequence[Sample], scores: Sequence[Scores]) -> Tensor:
    """[T] bool, on the CPU: whether the hidden states are there and finite. Teachers may differ in their sizes."""
    device = next(score.hidden.device for score in scores if score.hidden is not None)
    found = []
    for sample, score in zip(samples, scores, strict=True):
        size = sample.num_response_tokens
        if score.hidden is None:
            found.append(torch.zeros(size, dtype=torch.bool, device=device))
            continue
        if score.hidden.dim() != 2 or len(score.hidden) != size:
            raise ScoreError(
                f"sample {sample.key}: hidden has shape {tuple(score.hidden.shape)}; expected ({size}, H): one row for "
                "each response token"
            )
        found.append(score.hidden.isfinite().all(-1).to(device))
    return torch.cat(found).cpu()


def _refuse_missing(samples: Sequence[Sample], scores: Sequence[Scores], missing: dict[str, Tensor]) -> None:
    for name, rows in missing.items():
        if not bool(rows.any()):
            continue
        first = scores[int(_sequence(samples)[rows][0])]
        why = (
            f": {first.reason}; or" if isinstance(first, Unscored) else " (absent, NaN or infinite): score it again or"
        )
        _refuse(samples, rows, f"{name} is missing{why} drop such samples (train.on_missing_score: drop)")


def _refuse(samples: Sequence[Sample], rows: Tensor, problem: str) -> None:
    """Raises ScoreError that names the sample and token of the first of `rows` [T] bool."""
    if not bool(rows.any()):
        return
    row = int(rows.nonzero()[0])
    for sample in samples:
        if row < sample.num_response_tokens:
            raise ScoreError(
                f"sample {sample.key}, response token {row} (and {int(rows.sum()) - 1} more tokens): {problem}"
            )
        row -= sample.num_response_tokens
