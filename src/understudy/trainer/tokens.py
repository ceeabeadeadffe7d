"""Keeps what an update knew about single tokens: `tokens/step_N.jsonl`, a few samples each, and `pictures.jsonl`, sums over
all samples of a step. No forward is made for either."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from understudy.eval.summary import sample_row, token_pieces
from understudy.files import by_step, write_atomically
from understudy.lazy import Tensor, torch
from understudy.linear import Kept
from understudy.linear.kept import NUM_LIKELIEST
from understudy.methods import METHODS, Method
from understudy.randomness import hash_name
from understudy.report.pictures import LOG_RATIO_EDGES
from understudy.trainer.distributed import Ranks
from understudy.trainer.settings import Train
from understudy.types import EXCLUDED, Author, Sample

NUM_PICTURES = 200
"""Steps of a run whose sums are kept: as many columns as a picture has room for."""
NUM_PARTS = 10
"""Equal parts of a response, by which positions are told apart."""
LEAST_TOKEN_BYTES = 60
"""A token takes more than this in a file, so no more tokens are looked at than may fit."""
_KINDS = {Author.STUDENT: "sampled", Author.TEACHER: "prefix", Author.ENVIRONMENT: "environment"}
_FOLLOWS = (
    "log_ratio",
    "log_ratio_positive",
    "log_ratio_size",
    "outlier_size",
    "outliers",
    "overlap",
    "sampler_gap",
    "teacher_excluded",
)
"""Numbers that follow from the log-probabilities beside them."""
_PLAIN = (
    "student_logprob",
    "teacher_logprob",
    "reference_logprob",
    "student_entropy",
    "teacher_entropy",
    "log_ratio",
    "log_ratio_size",
    "outlier_size",
    "overlap",
)


@dataclass(eq=False)
class StepTokens:
    """The numbers of one step's tokens, each sample's from the first update that it is part of."""

    chosen: Sequence[Sample]
    """Samples of this rank that are kept token by token."""
    order: Sequence[int] = ()
    """The rank of each sample that is kept, of all ranks."""
    columns: list[tuple[Sequence[Sample], dict[str, Tensor]]] = field(default_factory=list)
    """The samples of each micro-batch, and the numbers of its T response tokens, [T] or [T, K] each."""

    def begin(self, samples: Sequence[Sample], device: torch.device) -> Kept | None:
        """Takes up the numbers of a micro-batch; None for a further pass over its samples."""
        if any(samples[0] is one for seen, _ in self.columns for one in seen):
            return None
        chosen = {id(sample) for sample in self.chosen}
        closely = [torch.full((sample.num_response_tokens,), id(sample) in chosen) for sample in samples]
        return Kept(torch.cat(closely).to(device))

    def end(self, samples: Sequence[Sample], kept: Kept) -> None:
        """The micro-batch's evaluation is done. Most likely tokens of a teacher whose rows were not part of it came with its
        scores."""
        columns = kept.columns()
        if "teacher_top" not in columns:
            columns |= _teacher_rows(samples)
        self.columns.append((samples, columns))

    def of(self, sample: Sample) -> dict[str, Tensor] | None:
        """The numbers of one sample's tokens, [R] or [R, K] each; None where it was in no update."""
        for samples, columns in self.columns:
            sizes = [one.num_response_tokens for one in samples]
            at = next((at for at, one in enumerate(samples) if one is sample), None)
            if at is not None:
                return {name: value.split(sizes)[at] for name, value in columns.items()}
        return None


def _teacher_rows(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The teacher's most likely tokens of the samples with `keep_tokens`, -1 and NaN for others; nothing where it gave none.

    A teacher that was asked for K tokens a row has these. A token that is not among them has no rank unless the teacher said
    it.
    """
    rows: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    for at, sample in enumerate(samples):
        scores = sample.scores if sample.keep_tokens else None
        if scores is None:
            continue
        ids, logprob = scores.likeliest_ids, scores.likeliest_logprob
        if ids is None or logprob is None:
            ids, logprob = scores.topk_ids, scores.topk_logprob
        if ids is None or logprob is None:
            continue
        ids = torch.where(logprob.isnan(), -1, ids)
        hit = ids == sample.response_ids[:, None]
        own = torch.where(hit, logprob, -torch.inf).amax(-1, keepdim=True)
        rank = torch.where(hit.any(-1), (logprob > own).sum(-1) + 1, -1) if scores.rank is None else scores.rank
        top = logprob.nan_to_num(-torch.inf).topk(min(NUM_LIKELIEST, logprob.shape[-1])).indices
        rows[at] = ids.gather(-1, top), logprob.gather(-1, top).float(), rank
    if not rows:
        return {}
    width = max(ids.shape[-1] for ids, _, _ in rows.values())
    size = sum(sample.num_response_tokens for sample in samples)
    found = {
        "teacher_top": torch.full((size, width), -1),
        "teacher_top_logprob": torch.full((size, width), torch.nan),
        "teacher_rank": torch.full((size,), -1),
    }
    start = 0
    for at, sample in enumerate(samples):
        end = start + sample.num_response_tokens
        if at in rows:
            ids, logprob, rank = rows[at]
            found["teacher_top"][start:end, : ids.shape[-1]] = ids
            found["teacher_top_logprob"][start:end, : ids.shape[-1]] = logprob
            found["teacher_rank"][start:end] = rank
        start = end
    return found


class _Candidate(NamedTuple):
    """A sample of a step on some rank, as the choice of those that are kept sees it."""

    rank: int
    place: int
    """Its number among the samples of its rank."""
    prompt_id: str
    order: tuple[int, int]
    """By which candidates are compared, whatever ranks they are on."""
    kind: tuple[str | None, bool]
    """The teacher's name, and whether the sample has a prefix."""
    marked: bool


class TokenRecorder:
    """Chooses the samples of a step that are kept, over all ranks, and writes them, in runs that keep any
    (`Train.records_tokens`)."""

    def __init__(self, folder: Path, settings: Train, tokenizer: Any, ranks: Ranks) -> None:
        self._folder, self._settings, self._tokenizer, self._ranks = folder, settings, tokenizer, ranks
        self._every = settings.save_samples_every
        # a prompt that comes again may double the files
        num_files = 2 * (1 + settings.steps // self._every)
        self._sample_bytes = settings.save_tokens_bytes // (num_files * settings.save_tokens)
        # as a resumed run finds them, by what the first rank sees
        files = by_step(folder, ".jsonl") if self._ranks.is_main else {}
        first = files[min(files)].read_text(encoding="utf-8").splitlines() if files else ()
        watched = {str(json.loads(line)["prompt_id"]) for line in first}
        self._last, self._watched = self._ranks.gather((max(files, default=0), watched))[0]

    def mark(self, samples: Sequence[Sample], step: int, *, watched_only: bool = False) -> list[Sample]:
        """The samples, `keep_tokens` set for those of this rank that may be kept, so that their teacher says what it finds most
        likely with the scores that it is asked for anyway."""
        chosen = {one.place for one in self._choose(self._candidates(samples, step, watched_only))}
        return [replace(sample, keep_tokens=True) if at in chosen else sample for at, sample in enumerate(samples)]

    def begin(self, samples: Sequence[Sample], step: int) -> StepTokens | None:
        """Returns the numbers that a step has to keep; None: none. A collective call."""
        by_rank: list[list[_Candidate]] = []
        if self._is_open(step):
            by_rank = self._ranks.gather(self._candidates(samples, step))
        chosen = self._choose([one for part in by_rank for one in part])
        own = [samples[one.place] for one in chosen if one.rank == self._ranks.rank]
        is_picture = step == 1 or step % max(1, self._settings.steps // NUM_PICTURES) == 0
        return StepTokens(own, [one.rank for one in chosen]) if chosen or is_picture else None

    def _is_regular(self, step: int) -> bool:
        return step == 1 or step % self._every == 0

    def _is_open(self, step: int) -> bool:
        """Whether samples of the step may be kept."""
        return self._is_regular(step) or 2 * (step - self._last) >= self._every

    def _candidates(self, samples: Sequence[Sample], step: int, watched_only: bool = False) -> list[_Candidate]:
        """The samples of this rank that may be kept; at a step without a file of samples only those of watched prompts."""
        if not self._is_open(step):
            return []
        every = self._is_regular(step) and not watched_only
        return [
            _Candidate(
                self._ranks.rank, place, name, (hash_name(name), sample.index), _kind(sample), sample.keep_tokens
            )
            for place, (name, sample) in enumerate((sample.prompt.id, sample) for sample in samples)
            if every or name in self._watched
        ]

    def _choose(self, candidates: Sequence[_Candidate]) -> list[_Candidate]:
        """One sample a prompt. Prompts of the first file are kept again when training draws them again; the others are spread
        over teachers, and over samples with and without a prefix."""
        # those whose teacher was asked for more come first
        ordered = sorted(candidates, key=lambda one: (not one.marked, one.order))
        first = {one.prompt_id: one for one in reversed(ordered)}
        chosen = [one for name, one in first.items() if name in self._watched][: self._settings.save_tokens]
        prompts = {one.prompt_id for one in chosen}
        kinds: dict[tuple[str | None, bool], list[_Candidate]] = {}
        for one in ordered:
            kinds.setdefault(one.kind, []).append(one)
        queues = [iter(kind) for kind in kinds.values()]
        while queues and len(chosen) < self._settings.save_tokens:
            queue = queues.pop(0)
            found = next((one for one in queue if one.prompt_id not in prompts), None)
            if found is not None:
                chosen.append(found)
                prompts.add(found.prompt_id)
                queues.append(queue)
        return chosen

    def write(self, tokens: StepTokens, method: Method, step: int) -> dict[str, object] | None:
        """Writes tokens/step_N.jsonl where samples were chosen; returns the step's record in pictures.jsonl, None where no
        token was trained. A collective call."""
        known = [(sample, columns) for sample in tokens.chosen if (columns := tokens.of(sample)) is not None]
        own = [(sample.prompt.id, self._line(sample, columns, method, step)) for sample, columns in known]
        found = self._ranks.gather((own, _sums(tokens)))
        lines = [iter(part) for part, _ in found]
        kept = [line for rank in tokens.order if (line := next(lines[rank], None)) is not None]
        if kept:
            if self._ranks.is_main:
                write_atomically(self._folder / f"step_{step:06d}.jsonl", "".join(line for _, line in kept))
            self._last = step
            self._watched = self._watched or {prompt_id for prompt_id, _ in kept}
        return _picture([sums for _, sums in found], step)

    def _line(self, sample: Sample, columns: Mapping[str, Tensor], method: Method, step: int) -> str:
        num = min(sample.num_response_tokens, max(1, self._sample_bytes // LEAST_TOKEN_BYTES))
        line = self._row(sample, columns, method, step, num)
        while len(line) > self._sample_bytes and num > 1:
            num = min(num - 1, max(1, int(num * 0.95 * self._sample_bytes / len(line))))
            line = self._row(sample, columns, method, step, num)
        return line

    def _row(self, sample: Sample, columns: Mapping[str, Tensor], method: Method, step: int, num: int) -> str:
        """The sample's line, with its first `num` response tokens."""
        ids = sample.response_ids[:num].tolist()
        authors = sample.author[sample.prompt_length :][:num].tolist()
        is_given = sample.finish == "data"
        table: dict[str, list[Any]] = {
            "id": ids,
            "kind": ["given" if is_given and author == Author.TEACHER else _KINDS[author] for author in authors],
        }
        every = {name: value for name, value in columns.items() if name not in _FOLLOWS}
        if sample.rollout_logprob is not None:
            every["rollout_logprob"] = sample.rollout_logprob[sample.prompt_length :]
        for name, value in every.items():
            plain = _plain(value[:num])
            if any(one is not None for one in plain):
                table[name] = plain
        used = {token for name in ("student_top", "teacher_top") for row in table.get(name, ()) for token in row or ()}
        pieces = token_pieces(self._tokenizer, sorted(used.union(ids)))
        row = sample_row(sample)
        kept = ("prompt_id", "prompt", "finish", "score", "reward", "advantage", "teacher")
        record = {
            "step": step,
            **{name: row[name] for name in kept if row.get(name) is not None},
            "index": sample.index,
            "method": next((name for name, kind in METHODS.items() if kind is type(method)), type(method).__name__),
            "num_tokens": sample.num_response_tokens,
            "prompt_ids": sample.token_ids[: sample.prompt_length].tolist(),
            "missing": _missing(table, method, sample.scores is not None),
            "vocabulary": {str(token): piece for token, piece in pieces.items()},
            "tokens": table,
        }
        return json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n"


def _plain(value: Tensor) -> list[Any]:
    """Numbers with five digits; None where there is none, `EXCLUDED` for a log-probability of -inf."""

    def number(x: float) -> float | None:
        return None if math.isnan(x) else float(f"{max(x, EXCLUDED):.5g}")

    rows = value.tolist()
    if value.dim() == 1:
        return [number(x) if value.is_floating_point() else None if x < 0 else x for x in rows]
    # a row that is shorter than others ends in -1, or NaN
    if not value.is_floating_point():
        return [[x for x in row if x >= 0] or None for row in rows]
    return [[number(x) for x in row if not math.isnan(x)] or None for row in rows]


def _missing(table: Mapping[str, object], method: Method, is_scored: bool) -> dict[str, str]:
    """Why a number that the viewer would show is not there, by name."""
    if not is_scored:
        why = "this method asks the teacher for no score of tokens"
        names = ["teacher_logprob", "teacher_entropy", "teacher_rank", "teacher_top"]
        return {name: why for name in names if name not in table}
    reasons = {
        "teacher_logprob": "the teacher gave none",
        "teacher_entropy": "the teacher gave none",
        "teacher_rank": "it is not among the tokens that the teacher gave"
        if "teacher_top" in table
        else "the teacher gave none",
        "teacher_top": "the teacher gives the scores of sampled tokens alone",
    }
    return {name: why for name, why in reasons.items() if name not in table}


def _kind(sample: Sample) -> tuple[str | None, bool]:
    return sample.teacher, bool((sample.author == Author.TEACHER).any()) and sample.finish != "data"


_Sums = dict[tuple[str, str], NDArray[np.float64]]
"""Numbers of a step that are added up over ranks."""


def _sums(tokens: StepTokens) -> _Sums:
    """Sums over this rank's tokens of a step: under "log_ratio" a histogram by teacher, under "parts" the sum and the count of
    a number in each part of the response, over all teachers and for each; under "" the number of samples."""
    edges = torch.tensor(LOG_RATIO_EDGES)
    found: _Sums = {}

    def add(group: str, name: str, value: Tensor) -> None:
        found[group, name] = found.get((group, name), 0) + value.double().numpy()

    for samples, columns in tokens.columns:
        add("", "samples", torch.tensor(len(samples)))
        sizes = torch.tensor([sample.num_response_tokens for sample in samples])
        starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        part = (torch.arange(len(starts)) - starts) * NUM_PARTS // sizes.repeat_interleave(sizes)
        shown = {name: value for name, value in columns.items() if name in ("log_ratio", "log_ratio_size")}
        shown |= {name: value for name, value in columns.items() if _is_flag(name, value)}
        if {"student_top", "teacher_top"} <= columns.keys():
            ours, theirs = columns["student_top"], columns["teacher_top"]
            both = (ours[:, :, None] == theirs[:, None, :]).any(-1).double().mean(-1)
            shown["top_shared"] = torch.where((ours[:, 0] >= 0) & (theirs[:, 0] >= 0), both, torch.nan)
        for teacher in ("", *sorted({sample.teacher or "" for sample in samples} - {""})):
            own = torch.tensor([teacher in ("", sample.teacher) for sample in samples]).repeat_interleave(sizes)
            if "log_ratio" in columns:
                ratio = columns["log_ratio"]
                bins = torch.bucketize(ratio[own & ~ratio.isnan()], edges)
                add("log_ratio", teacher, torch.bincount(bins, minlength=len(edges) + 1))
            for name, value in shown.items():
                known = own & ~value.isnan()
                pair = torch.stack([torch.where(known, value, 0.0), known.float()]).double()
                sums = torch.zeros(2, NUM_PARTS, dtype=torch.float64).index_add_(1, part, pair)
                add("parts", f"teacher/{teacher}/{name}" if teacher else name, sums)
    return found


def _picture(parts: Sequence[_Sums], step: int) -> dict[str, object] | None:
    """The step's line in pictures.jsonl, of all ranks: a histogram of log T - log S and, by the part of the response that a
    token is in, numbers as [sums, counts], both for each of several teachers too. None where no rank has a sample.

    `top_shared` is the share of the student's five most likely tokens that are among the teacher's."""
    total: _Sums = {}
    for sums in parts:
        for name, value in sums.items():
            total[name] = total.get(name, 0) + value
    if ("", "samples") not in total:
        return None
    record: dict[str, object] = {"step": step, "samples": int(total["", "samples"])}
    record["log_ratio"] = {
        name: value.astype(int).tolist() for (group, name), value in total.items() if group == "log_ratio"
    }
    record["parts"] = {
        name: [_plain(torch.from_numpy(row)) for row in value]
        for (group, name), value in total.items()
        if group == "parts"
    }
    return record


def _is_flag(name: str, value: Tensor) -> bool:
    """Whether a metric of the method says yes or no of each token, as `trusted` does."""
    if name in _PLAIN or name.startswith("loss/") or value.dim() > 1 or not value.is_floating_point():
        return False
    return bool(((value == 0) | (value == 1) | value.isnan()).all())
