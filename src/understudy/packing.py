"""From samples to packed tensors. The only place where positions shift by one.

A sample's tokens are fed without the last one, which predicts nothing: input i predicts token i + 1.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Literal

from understudy.errors import DataError, ScoreError
from understudy.lazy import Tensor, torch
from understudy.types import Author, Image, ImageSpan, Sample, Scores, Segment, TokenBatch

LOGPROB_TOLERANCE = 1e-3
"""How far above 0 a log-probability may lie: a float32 log-softmax over 1e5 logits of size 100 errs by less."""
TRAINED = (Author.STUDENT, Author.TEACHER)
ScoreField = Literal["scores", "reference_scores"]
_FIELDS = ("logprob", "entropy", "topk_logprob", "topk_ids")


@dataclass(frozen=True, eq=False, kw_only=True)
class Unscored(Scores):
    """Scores of a sample that the teacher could not read: every requested field is NaN, or id -1, in every row."""

    reason: str
    """Why, and what to do about it."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Whole sequences packed into B rows of L slots. A free slot holds id 0 at position 0, as its own sequence."""

    input_ids: Tensor
    """[B, L] int64."""
    position_ids: Tensor
    """[B, L] int64, restarting at 0 with every sequence."""
    predicts: Tensor
    """[T] int64, index into B * L of the slot that predicts each response token, samples in their order."""
    sizes: tuple[int, ...]
    """Response tokens of each sample; they add up to T."""
    images: tuple[ImageSpan, ...] = ()
    """The samples with images, in the order of their slots."""
    segments: tuple[Segment, ...] = ()
    """Segments of the one row, in the order of their slots; empty: positions keep sequences apart."""


LEAST_COMMON = 16
"""Minimum length of a shared prefix. Shorter ones cost more attention calls than they save."""
RowStyle = Literal["shared", "segments", "packed", "single", "alone"]
"""How sequences share rows. In one row, for attention by segments (`models.attention`): what several samples begin with
once ("shared"), or each sample whole ("segments"). For models that keep sequences apart by their positions: in several rows
("packed"), or all in one, which is what flash attention takes ("single"). For others: each in a row of its own ("alone")."""


class _Rows:
    """Rows of `width` slots, filled best-fit: a sequence goes where it leaves the least room."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.count = 0
        self._room: list[tuple[int, int]] = []

    def fits(self, length: int) -> bool:
        """Whether an open row has room for `length` more slots."""
        return bool(self._room) and self._room[-1][0] >= length

    def place(self, length: int) -> int:
        """Takes `length` slots and returns the first, as an index into count * width; opens a row where none has room."""
        if not self.fits(length):
            insort(self._room, (self.width, self.count))
            self.count += 1
        room, row = self._room.pop(bisect_left(self._room, (length, -1)))
        insort(self._room, (room - length, row))
        return row * self.width + self.width - room


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))


def by_prompt(samples: Sequence[Sample]) -> list[list[int]]:
    """Returns groups of indices of samples with the same prompt tokens and images, in order of first occurrence."""
    groups: dict[tuple[bytes, tuple[Image, ...]], list[int]] = {}
    for index, sample in enumerate(samples):
        name = sample.token_ids[: sample.prompt_length].numpy().tobytes(), sample.prompt.images
        groups.setdefault(name, []).append(index)
    return list(groups.values())


def in_common(sequences: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Returns the indices of token sequences, sorted by common prefixes, each with the length of the prefix that it
    shares with the one before: at least `LEAST_COMMON`, or 0. The last token of either is never shared."""
    found = []
    previous = torch.zeros(0, dtype=torch.int64)
    for index in sorted(range(len(sequences)), key=lambda index: sequences[index].numpy().tobytes()):
        sequence = sequences[index][:-1]
        size = min(len(previous), len(sequence))
        common = int((previous[:size] == sequence[:size]).cumprod(0).sum())
        found.append((index, common if common >= LEAST_COMMON else 0))
        previous = sequence
    return found


def beginning(spans: Sequence[tuple[int, int]], size: int) -> tuple[tuple[int, int], ...]:
    """Returns the first `size` slots of spans (first slot, end)."""
    found = []
    for start, stop in spans:
        if size > 0:
            found.append((start, min(stop, start + size)))
        size -= stop - start
    return tuple(found)


def _prompts_in_common(samples: Sequence[Sample]) -> list[tuple[list[int], int]]:
    """The groups of `by_prompt` in the order of `in_common`. Prompts with images share no prefix."""
    groups = by_prompt(samples)
    firsts = [samples[group[0]] for group in groups]
    prompts = [one.token_ids[: one.prompt_length] for one in firsts]
    apart = [index for index, one in enumerate(firsts) if one.prompt.images]
    text = [index for index, one in enumerate(firsts) if not one.prompt.images]
    placed = [(text[place], common) for place, common in in_common([prompts[index] for index in text])]
    return [(groups[index], common) for index, common in (*((index, 0) for index in apart), *placed)]


def micro_batches(samples: Sequence[Sample], max_tokens: int, style: RowStyle = "packed") -> list[list[int]]:
    """Returns groups of indices; the `lay_out` of one group has at most `max_tokens` slots, padding included.

    Every index occurs once; neighbours in length go together, with "shared" the samples of a prompt; a sequence above
    `max_tokens` gets a group of its own. Raises ValueError for a budget below 1.
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; a micro-batch needs room for at least one token")
    lengths = [sample.token_ids.numel() - 1 for sample in samples]
    if style == "shared":
        return _prompts_together(samples, lengths, max_tokens)
    groups: list[list[int]] = []
    # of the current group; its longest sequence comes first and sets the width
    rows = _Rows(0)
    taken = 0
    for index in _longest_first(lengths):
        length = lengths[index]
        if style == "segments":
            fits = taken + length <= max_tokens
        else:
            fits = (rows.fits(length) and style != "alone") or (rows.count + 1) * rows.width <= max_tokens
        if not groups or not fits:
            groups.append([])
            rows, taken = _Rows(length), 0
        rows.place(rows.width if style == "alone" else length)
        taken += length
        groups[-1].append(index)
    return groups


def _prompts_together(samples: Sequence[Sample], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """As `micro_batches`: a prompt starts a new group if its samples do not fit into the current one, and is split over
    several if no group has room for all."""
    groups: list[list[int]] = []
    taken = 0
    for same, common in _prompts_in_common(samples):
        prompt = samples[same[0]].prompt_length
        # the longest includes the prompt; the others only take slots for their responses
        order = [same[index] for index in _longest_first([lengths[index] for index in same])]
        whole = lengths[order[0]] - common + sum(max(0, lengths[index] - prompt) for index in order[1:])
        begins = not groups or taken + whole > max_tokens
        for number, index in enumerate(order):
            length = lengths[index] - (0 if begins else common if number == 0 else min(prompt, lengths[index]))
            if begins or taken + length > max_tokens:
                groups.append([])
                length, taken, begins = lengths[index], 0, False
            groups[-1].append(index)
            taken += length
    return groups


def lay_out(samples: Sequence[Sample], style: RowStyle = "packed") -> Layout:
    """Packs sequences, longest first, into rows. Attention over B rows costs B * L^2.

    A row is as long as the longest sequence, or as all of them where `style` is "single"; where everything fits into one
    row, it is cut to what it holds. By segments there is one row, and attention costs the sum of their squares.

    Run the model with `attention_mask=None, use_cache=False`: with a cache the sequences would see each other.
    Raises DataError for a sample without a prompt token, ValueError for no samples.
    """
    lengths = [sample.token_ids.numel() - 1 for sample in samples]
    for sample in samples:
        if sample.prompt_length < 1:
            raise DataError(f"sample {sample.key} has no prompt token, so nothing predicts its first response token")
    if not samples:
        raise ValueError("lay_out needs at least one sample")
    if style in ("shared", "segments"):
        return _in_segments(
            samples, _prompts_in_common(samples) if style == "shared" else [([at], 0) for at in range(len(samples))]
        )
    width = max(1, sum(lengths) if style == "single" else max(lengths))
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
    placed = sorted(zip(starts, lengths, (sample.prompt.images for sample in samples), strict=True), key=itemgetter(0))
    images = tuple(ImageSpan(*span) for span in placed if span[2])
    return Layout(input_ids.view(-1, width), position_ids.view(-1, width), torch.cat(predicts), sizes, images)


def _in_segments(samples: Sequence[Sample], groups: Sequence[tuple[Sequence[int], int]]) -> Layout:
    """Lays out one row. The longest sample of a group comes first, without the prefix that its prompt shares with the prompt
    before; the responses of the others follow and read its prompt. `groups`: indices, and the length of that prefix."""
    slots = torch.arange(max(1, sum(sample.token_ids.numel() for sample in samples)))
    ids, positions = list[Tensor](), list[Tensor]()
    predicts = [slots[:0]] * len(samples)
    segments: list[Segment] = []
    images: list[ImageSpan] = []
    end = 0
    # spans of the prompt that was laid out last
    path: tuple[tuple[int, int], ...] = ()
    for group, common in groups:
        prompt, first, path = samples[group[0]].prompt_length, end, beginning(path, common)
        for index in sorted(group, key=lambda index: -samples[index].token_ids.numel()):
            sample = samples[index]
            before = common if end == first else prompt
            fed = sample.token_ids[before:-1]
            stop = end + len(fed)
            ids.append(fed)
            positions.append(slots[before : before + len(fed)])
            if stop > end:
                segments.append(Segment(end, stop, path))
            if sample.prompt.images and end == first:
                images.append(ImageSpan(end, len(fed), sample.prompt.images))
            # the last token of the prompt predicts the first of every response
            last = slots[first + prompt - common - 1 :][:1]
            own = slots[max(end, int(last) + 1) : stop]
            predicts[index] = torch.cat([last, own])[: sample.num_response_tokens]
            if end == first:
                path = (*path, (first, first + prompt - common))
            end = stop
    if not segments:
        ids, positions, segments = [torch.zeros_like(slots[:1])], [slots[:1]], [Segment(0, 1)]
    sizes = tuple(sample.num_response_tokens for sample in samples)
    return Layout(
        torch.cat(ids)[None], torch.cat(positions)[None], torch.cat(predicts), sizes, tuple(images), tuple(segments)
    )


def attach_scores(
    samples: Sequence[Sample],
    scores: Sequence[Scores],
    on_missing: Literal["error", "drop"],
    *,
    field: ScoreField = "scores",
) -> list[Sample | None]:
    """Returns the samples with their scores in `field`, in order. This is the only place that looks for missing scores.

    A score is missing if a trained token has none, or one that is NaN or infinite: an error, or under "drop" None
    instead of the sample. Raises ScoreError, naming the sample, for missing scores under "error", and always for scores of
    other ids or of other shapes, log-probabilities above 0, and top-K ids that repeat.
    """
    if len(samples) != len(scores):
        raise ScoreError(f"{len(scores)} scores came back for {len(samples)} samples; each needs one, in order")
    for sample, score in zip(samples, scores, strict=True):
        _check_ids(sample, score)
    every = {name: _join(samples, [getattr(score, name) for score in scores], name) for name in _FIELDS}
    joined = {name: value for name, value in every.items() if value is not None}
    trained = _written_by(samples, TRAINED)
    missing = _missing(samples, scores, joined, trained)
    sequence = _per_token(samples, range(len(samples)), torch.int64)
    if on_missing == "error":
        for name, rows in missing.items():
            if bool(rows.any()):
                first = scores[int(sequence[rows][0])]
                why = " (absent, NaN or infinite; -inf alone is a score of 0): score it again or"
                why = f": {first.reason}; or" if isinstance(first, Unscored) else why
                _refuse(samples, rows, f"{name} is missing{why} drop such samples (train.on_missing_score: drop)")
    dropped = {index for rows in missing.values() for index in sequence[rows].tolist()}
    if dropped:
        trained &= ~torch.isin(sequence, torch.tensor(sorted(dropped)))
    for name in ("logprob", "topk_logprob"):
        if name in joined:
            above = trained & _any(joined[name] > LOGPROB_TOLERANCE)
            _refuse(samples, above, f"{name} is above 0, so no log-probability")
    if "topk_ids" in joined:
        ranked = joined["topk_ids"].sort(-1).values
        _refuse(samples, trained & _any(ranked[:, 1:] == ranked[:, :-1]), "topk_ids names a token twice")
    return [
        None if index in dropped else replace(sample, **{field: score})  # type: ignore[arg-type]
        for index, (sample, score) in enumerate(zip(samples, scores, strict=True))
    ]


def pack(samples: Sequence[Sample], *, uniform: Tensor | None = None) -> TokenBatch:
    """Returns the response tokens of all samples in their order, with what is known about each. T = sum of response
    lengths. The samples' scores are those that `attach_scores` has checked; the student's fields stay None.

    `uniform` [T]: one draw per token. Raises ScoreError where some of the samples have scores and others have none.
    """
    # one ungraded sample drops the field for the whole batch, because a bool has no NaN
    right = [sample.grade.right for sample in samples if sample.grade is not None]
    graded = bool(samples) and len(right) == len(samples)
    advantages = [float("nan") if sample.advantage is None else sample.advantage for sample in samples]
    rewarded = any(sample.advantage is not None for sample in samples)
    recorded = [
        None if sample.rollout_logprob is None else sample.rollout_logprob[sample.prompt_length :] for sample in samples
    ]
    return TokenBatch(
        target=torch.cat([torch.zeros(0, dtype=torch.int64), *(sample.response_ids for sample in samples)]),
        mask=_written_by(samples, TRAINED),
        on_policy=_written_by(samples, (Author.STUDENT,)),
        sequence=_per_token(samples, range(len(samples)), torch.int64),
        rollout_logprob=_join(samples, recorded, "rollout_logprob"),
        uniform=uniform,
        outcome_advantage=_per_token(samples, advantages, torch.float32) if rewarded else None,
        correct=_per_token(samples, right, torch.bool) if graded else None,
        teacher_logprob=_read(samples, "scores", "logprob"),
        topk_ids=_read(samples, "scores", "topk_ids"),
        topk_logprob=_read(samples, "scores", "topk_logprob"),
        teacher_entropy=_read(samples, "scores", "entropy"),
        reference_logprob=_read(samples, "reference_scores", "logprob"),
    )


def _per_token(samples: Sequence[Sample], values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """[T], one number per sample, repeated over its tokens."""
    sizes = torch.tensor([sample.num_response_tokens for sample in samples], dtype=torch.int64)
    return torch.tensor(values, dtype=dtype).repeat_interleave(sizes)


def _written_by(samples: Sequence[Sample], authors: Collection[Author]) -> Tensor:
    """[T] bool, the response tokens of these authors."""
    written = [sample.author[sample.prompt_length :] for sample in samples]
    # an empty tensor first, because torch.cat refuses an empty list
    return torch.isin(torch.cat([torch.zeros(0, dtype=torch.uint8), *written]), torch.tensor([*map(int, authors)]))


def _join(samples: Sequence[Sample], values: Sequence[Tensor | None], name: str) -> Tensor | None:
    """[T] or [T, K], the value of each sample; NaN, or id -1, for those that lack it; None where all of them do."""
    shape = next((value.shape[1:] for value in values if value is not None), None)
    if shape is None:
        return None
    parts = []
    for sample, value in zip(samples, values, strict=True):
        expected = (sample.num_response_tokens, *shape)
        if value is not None and value.shape != expected:
            raise ScoreError(
                f"sample {sample.key}: {name} has shape {tuple(value.shape)}; expected {expected}: one row for each "
                "response token, one K for all samples"
            )
        absent = -1 if name == "topk_ids" else float("nan")
        parts.append(torch.full(expected, absent) if value is None else value)
    return torch.cat(parts)


def _read(samples: Sequence[Sample], field: ScoreField, name: str) -> Tensor | None:
    """One field of the scores that the samples carry; None where they carry none."""
    scores: list[Scores | None] = [getattr(sample, field) for sample in samples]
    if None in scores and any(score is not None for score in scores):
        key = samples[scores.index(None)].key
        raise ScoreError(f"sample {key} has no {field}, but others of its batch do: attach scores to all of them")
    values = [None if score is None else getattr(score, name) for score in scores]
    if name == "entropy" and any(value is None for value in values):
        # a server gives none; a method that reads it falls back on an estimate for the whole batch
        return None
    return _join(samples, values, name)


def _check_ids(sample: Sample, score: Scores) -> None:
    """Raises ScoreError at the first token whose scores are for another id."""
    ours, theirs = sample.response_ids, score.token_ids
    if torch.equal(ours, theirs):
        return
    found = f"{theirs.numel()} tokens were scored, the response has {ours.numel()}"
    for at, (own, other) in enumerate(zip(ours.tolist(), theirs.tolist(), strict=False)):
        if own != other:
            found = f"response token {at} is {own}, the teacher scored {other} there"
            break
    raise ScoreError(
        f"sample {sample.key}: {found}. Scores must be of the ids that were sent: compare the tokenizers, "
        "chat templates and prompts of student and teacher"
    )


def lacks_score(name: str, value: Tensor) -> Tensor:
    """Entries of a field of `Scores` that are no scores: not finite, but for a log-probability of -inf, by which a teacher
    excludes a token. It cannot exclude all of the likeliest."""
    excluded = value.isneginf()
    if name == "topk_logprob":
        excluded = excluded & ~excluded.all(-1, keepdim=True)
    return ~value.isfinite() & ~excluded if name in ("logprob", "topk_logprob") else ~value.isfinite()


def _any(rows: Tensor) -> Tensor:
    """[T] or [T, K] -> [T]"""
    return rows if rows.dim() == 1 else rows.any(-1)


def _missing(
    samples: Sequence[Sample], scores: Sequence[Scores], joined: dict[str, Tensor], trained: Tensor
) -> dict[str, Tensor]:
    """Rows that are trained and lack a score, by field. [T] bool each."""
    missing = {
        name: trained & _any(lacks_score(name, value) if value.is_floating_point() else value < 0)
        for name, value in joined.items()
    }
    if "entropy" in missing:
        # servers give no entropy at all, which is allowed; a NaN among entropies is not
        missing["entropy"] &= _per_token(samples, [score.entropy is not None for score in scores], torch.bool)
    device = next((score.hidden.device for score in scores if score.hidden is not None), None)
    if device is None:
        return missing
    whole = []
    for sample, score in zip(samples, scores, strict=True):
        size, hidden = sample.num_response_tokens, score.hidden
        # teachers may differ in H, so hidden states are not joined
        if hidden is not None and hidden.shape[:-1] != (size,):
            raise ScoreError(
                f"sample {sample.key}: hidden has shape {tuple(hidden.shape)}; expected ({size}, H): one row for each "
                "response token"
            )
        finite = torch.zeros(size, dtype=torch.bool) if hidden is None else hidden.isfinite().all(-1)
        whole.append(finite.to(device))
    # moved to the CPU once: a transfer per sample would synchronise with the GPU each time
    return missing | {"hidden": trained & ~torch.cat(whole).cpu()}


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
