"""Keeps what an update knew about single tokens: `tokens/step_N.jsonl`, a few samples each, and `pictures.jsonl`, sums over
all samples of a step. No forward is made for either."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from understudy.eval.summary import sample_row, token_pieces
from understudy.files import by_step, write_atomically
from understudy.lazy import Tensor, torch
from understudy.linear import Kept
from understudy.linear.kept import NUM_LIKELIEST
from understudy.methods import METHODS, Method
from understudy.report.pictures import LOG_RATIO_EDGES
from understudy.trainer.settings import Train
from understudy.types import EXCLUDED, Author, Sample

NUM_PICTURES = 200
"""Steps of a run whose sums are kept: as many columns as a picture has room for."""
NUM_PARTS = 10
"""Equal parts of a response, by which positions are told apart."""
LEAST_TOKEN_BYTES = 60
"""A token takes more than this in a file, so no more tokens are looked at than may fit."""
_KINDS = {Author.STUDENT: "sampled", Author.TEACHER: "prefix", Author.ENVIRONMENT: "environment"}
_FOLLOWS = ("log_ratio", "log_ratio_positive", "teacher_excluded", "sampler_gap")
"""Numbers that follow from the log-probabilities beside them."""
_PLAIN = ("student_logprob", "teacher_logprob", "reference_logprob", "student_entropy", "teacher_entropy", "log_ratio")


@dataclass(eq=False)
class StepTokens:
    """The numbers of one step's tokens, each sample's from the first update that it is part of."""

    chosen: Sequence[Sample]
    """Samples that are kept token by token."""
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
        """The micro-batch's evaluation is done.

        A teacher that sent K tokens a row, in place of whole rows, has these as its most likely ones; a token that is not
        among them has no rank.
        """
        columns, given = kept.columns(), [sample.scores for sample in samples]
        ids = [one.topk_ids for one in given if one is not None and one.topk_ids is not None]
        logprobs = [one.topk_logprob for one in given if one is not None and one.topk_logprob is not None]
        if "teacher_top" not in columns and len(ids) == len(logprobs) == len(samples):
            every, values = torch.cat(ids), torch.cat(logprobs).float()
            top = values.topk(min(NUM_LIKELIEST, values.shape[-1]))
            columns |= {"teacher_top": every.gather(-1, top.indices), "teacher_top_logprob": top.values}
            hit = every == torch.cat([sample.response_ids for sample in samples])[:, None]
            own = torch.where(hit, values, -torch.inf).amax(-1, keepdim=True)
            columns["teacher_rank"] = torch.where(hit.any(-1), (values > own).sum(-1) + 1, -1)
        self.columns.append((samples, columns))

    def of(self, sample: Sample) -> dict[str, Tensor] | None:
        """The numbers of one sample's tokens, [R] or [R, K] each; None where it was in no update."""
        for samples, columns in self.columns:
            sizes = [one.num_response_tokens for one in samples]
            at = next((at for at, one in enumerate(samples) if one is sample), None)
            if at is not None:
                return {name: value.split(sizes)[at] for name, value in columns.items()}
        return None


class TokenRecorder:
    """Chooses the samples of a step that are kept, and writes them."""

    def __init__(self, folder: Path, settings: Train, tokenizer: Any) -> None:
        self._folder, self._settings, self._tokenizer = folder, settings, tokenizer
        self._every = settings.save_samples_every
        times = 1 + settings.steps // self._every if self._every else 0
        # a prompt that comes again may double the files
        self._sample_bytes = settings.save_tokens_bytes // max(1, 2 * times * settings.save_tokens)
        # as a resumed run finds them
        files = by_step(folder, ".jsonl")
        self._last = max(files, default=0)
        self._watched: set[str] = set()
        if files:
            first = files[min(files)].read_text(encoding="utf-8").splitlines()
            self._watched = {json.loads(line)["prompt_id"] for line in first}

    def begin(self, samples: Sequence[Sample], step: int) -> StepTokens | None:
        """Returns the numbers that a step has to keep; None: none."""
        chosen = self._choose(samples, step)
        every = max(1, self._settings.steps // NUM_PICTURES)
        is_picture = bool(self._every and self._settings.save_tokens) and (step == 1 or step % every == 0)
        return StepTokens(chosen) if chosen or is_picture else None

    def _choose(self, samples: Sequence[Sample], step: int) -> list[Sample]:
        """One sample a prompt. Prompts of the first file are kept again when training draws them again; the others are spread
        over teachers, and over samples with and without a prefix."""
        if not self._every or not self._settings.save_tokens:
            return []
        is_regular = step == 1 or step % self._every == 0
        if not is_regular and 2 * (step - self._last) < self._every:
            return []
        first = {sample.prompt.id: sample for sample in reversed(samples)}
        chosen = [sample for name, sample in first.items() if name in self._watched][: self._settings.save_tokens]
        prompts = {sample.prompt.id for sample in chosen}
        kinds: dict[tuple[str | None, bool], list[Sample]] = {}
        for sample in samples if is_regular else ():
            is_guided = bool((sample.author == Author.TEACHER).any()) and sample.finish != "data"
            kinds.setdefault((sample.teacher, is_guided), []).append(sample)
        queues = [iter(kind) for kind in kinds.values()]
        while queues and len(chosen) < self._settings.save_tokens:
            queue = queues.pop(0)
            found = next((sample for sample in queue if sample.prompt.id not in prompts), None)
            if found is not None:
                chosen.append(found)
                prompts.add(found.prompt.id)
                queues.append(queue)
        return chosen

    def write(self, tokens: StepTokens, method: Method, step: int) -> None:
        """Writes tokens/step_N.jsonl where samples were chosen."""
        known = [(sample, columns) for sample in tokens.chosen if (columns := tokens.of(sample)) is not None]
        if not known:
            return
        lines = [self._line(sample, columns, method, step) for sample, columns in known]
        write_atomically(self._folder / f"step_{step:06d}.jsonl", "".join(lines))
        self._last = step
        if not self._watched:
            self._watched = {sample.prompt.id for sample, _ in known}

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

    if not value.is_floating_point():
        rows = value.tolist()
        if value.dim() == 1:
            return [None if x < 0 else x for x in rows]
        return [None if row[0] < 0 else row for row in rows]
    if value.dim() == 1:
        return [number(x) for x in value.tolist()]
    return [None if math.isnan(row[0]) else [number(x) for x in row] for row in value.tolist()]


def _missing(table: Mapping[str, object], method: Method, is_scored: bool) -> dict[str, str]:
    """Why a number that the viewer would show is not there, by name."""
    if not is_scored:
        why = "this method asks the teacher for no score of tokens"
        names = ["teacher_logprob", "teacher_entropy", "teacher_rank", "teacher_top"]
        return {name: why for name in names if name not in table}
    asked = "the teacher was asked for the sampled tokens alone, which is all that this method needs"
    reasons = {
        "teacher_logprob": "the teacher gave none",
        "teacher_entropy": "the teacher gave none",
        "teacher_rank": asked if "topk" not in method.needs else "it is not among the tokens that the teacher returned",
        "teacher_top": asked,
    }
    return {name: why for name, why in reasons.items() if name not in table}


def picture(tokens: StepTokens, step: int) -> dict[str, object]:
    """Sums over all tokens of a step's samples: a histogram of log T - log S, by teacher where there are several; numbers by
    the part of the response that a token is in, as [sums, counts]; and how many of the five most likely tokens both sides
    share, as [sum of shares, rows]."""
    edges = torch.tensor(LOG_RATIO_EDGES)
    histograms: dict[str, Tensor] = {}
    parts: dict[str, Tensor] = {}
    shared, num_rows, num_samples = 0.0, 0, 0
    for samples, columns in tokens.columns:
        num_samples += len(samples)
        sizes = torch.tensor([sample.num_response_tokens for sample in samples])
        starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        part = (torch.arange(len(starts)) - starts) * NUM_PARTS // sizes.repeat_interleave(sizes)
        shown = {name: value for name, value in columns.items() if name == "log_ratio" or _is_flag(name, value)}
        if "log_ratio" in columns:
            ratio = columns["log_ratio"]
            shown["log_ratio_size"] = ratio.abs()
            named = {sample.teacher or "" for sample in samples} - {""}
            for name in ("", *named):
                own = torch.tensor([name in ("", sample.teacher) for sample in samples]).repeat_interleave(sizes)
                found = torch.bincount(torch.bucketize(ratio[own & ~ratio.isnan()], edges), minlength=len(edges) + 1)
                histograms[name] = histograms.get(name, 0) + found
        for name, value in shown.items():
            known = ~value.isnan()
            pair = torch.stack([torch.where(known, value, 0.0), known.float()]).double()
            added = torch.zeros(2, NUM_PARTS, dtype=torch.float64).index_add_(1, part, pair)
            parts[name] = parts.get(name, 0) + added
        if "student_top" in columns and "teacher_top" in columns:
            ours, theirs = columns["student_top"], columns["teacher_top"]
            rows = (ours[:, 0] >= 0) & (theirs[:, 0] >= 0)
            both = (ours[rows][:, :, None] == theirs[rows][:, None, :]).any(-1)
            shared, num_rows = shared + float(both.double().mean(-1).sum()), num_rows + int(rows.sum())
    record: dict[str, object] = {"step": step, "samples": num_samples}
    record["log_ratio"] = {name: value.tolist() for name, value in histograms.items()}
    record["parts"] = {name: [_plain(row) for row in value] for name, value in parts.items()}
    return record | ({"top_shared": [shared, num_rows]} if num_rows else {})


def _is_flag(name: str, value: Tensor) -> bool:
    """Whether a metric of the method says yes or no of each token, as `trusted` does."""
    if name in _PLAIN or name.startswith("loss/") or value.dim() > 1 or not value.is_floating_point():
        return False
    return bool(((value == 0) | (value == 1) | value.isnan()).all())
