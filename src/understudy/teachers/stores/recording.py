"""Recordings: samples in a directory together with a teacher's scores of them.

    meta.json                   teacher, temperature and vocabulary of the scores; size and SHA-256 of every file
    scores_00000.safetensors    some samples with their scores, under i.FIELD for the i-th; their facts in the header

A file is written whole and then entered into meta.json, so an interrupted recording can be continued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from understudy.errors import RecipeError, ScoreError
from understudy.files import write_atomically, write_json
from understudy.teachers.base import Setup, Teacher
from understudy.types import Need, Sample, Scores

FORMAT = 1
SHARD_SAMPLES = 64
"""Samples in one file: the most that a killed recording loses."""
META = "meta.json"
SAMPLE_TENSORS = ("token_ids", "author", "rollout_logprob", "policy_version")
FACTS = ("index", "prompt_length", "finish", "text")
SCORE_TENSORS = ("logprob", "entropy", "topk_ids", "topk_logprob")
NARROW = ("token_ids", "topk_ids")
"""Stored as int32."""


@dataclass(frozen=True, kw_only=True)
class ScoredMeta:
    """Facts that all scores of a recording share."""

    teacher: str
    """The teacher's name in messages."""
    fingerprint: str
    vocab_size: int
    temperature: float
    tokenizer: str
    """`tokenizer_digest` of the student's."""
    k: int | None = None
    """Tokens of each top-K row; None: sampled tokens only."""

    @staticmethod
    def of(teacher: Teacher, setup: Setup, shown: str, k: int | None = None) -> ScoredMeta:
        """Describes an open teacher and the setup that it was opened with."""
        return ScoredMeta(
            teacher=shown,
            fingerprint=teacher.fingerprint,
            vocab_size=setup.vocab_size,
            temperature=setup.temperature,
            tokenizer=tokenizer_digest(setup.tokenizer),
            k=k,
        )

    @property
    def gives(self) -> frozenset[Need]:
        """Needs that these scores meet."""
        return frozenset({"none", "sampled"} if self.k is None else {"none", "sampled", "topk"})


@dataclass(frozen=True)
class Record:
    """meta.json."""

    meta: ScoredMeta
    files: Mapping[str, tuple[int, str]]
    """Bytes and SHA-256 by name."""
    num_samples: int
    complete: bool


def tokenizer_digest(tokenizer: Any) -> str:
    """Returns a hash that changes with any token, id or the EOS. Raises ValueError for None."""
    if tokenizer is None:
        raise ValueError("Setup.tokenizer is None; stored scores are compared with the student's tokenizer")
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return blake2b(json.dumps([tokens, tokenizer.eos_token_id]).encode(), digest_size=16).hexdigest()


def recorded(path: Path, meta: ScoredMeta) -> frozenset[str]:
    """Returns the keys of samples that are there already and need not be made again.

    Raises RecipeError for a recording of something else, and for a damaged one.
    """
    if not (path / META).is_file():
        return frozenset()
    record = _continued(path, meta)
    check_sizes(path, record)
    return frozenset(f"{row['prompt']}#{row['index']}" for name in record.files for row in read_rows(path / name))


def write_scored(
    path: Path, meta: ScoredMeta, pairs: Iterable[tuple[Sample, Scores]], *, shard_samples: int = SHARD_SAMPLES
) -> int:
    """Adds samples with their scores, completes the recording, and returns how many it holds. Known samples are skipped.

    Each `shard_samples` are on disk before the next are taken from `pairs`; if `pairs` fails, what was taken before is
    written too, and the next call continues. Raises ScoreError for scores that are not what `meta` promises, RecipeError
    as `recorded`, CheckpointError if a file cannot be written.
    """
    known = set(recorded(path, meta))
    record = _continued(path, meta) if (path / META).is_file() else Record(meta, {}, 0, False)
    record = _save(path, replace(record, complete=False))
    waiting: list[tuple[Sample, Scores]] = []
    try:
        for sample, scores in pairs:
            if sample.key in known:
                continue
            _check_pair(sample, scores, meta)
            known.add(sample.key)
            waiting.append((sample, scores))
            if len(waiting) == shard_samples:
                record, waiting = _add_file(path, record, waiting), []
    finally:
        if waiting:
            record = _add_file(path, record, waiting)
    return _save(path, replace(record, complete=True)).num_samples


def _continued(path: Path, meta: ScoredMeta) -> Record:
    record = read_record(path)
    before, now = asdict(record.meta), asdict(meta)
    differing = [f"{name} was {before[name]!r}, is {now[name]!r}" for name in now if before[name] != now[name]]
    if differing:
        raise RecipeError(f"{path} holds scores of another kind: {'; '.join(differing)}. Record into another directory")
    return record


def _check_pair(sample: Sample, scores: Scores, meta: ScoredMeta) -> None:
    if not torch.equal(scores.token_ids, sample.response_ids):
        raise ScoreError(f"sample {sample.key}: the scores are of other tokens; compare the tokenizers")
    size = sample.num_response_tokens
    shapes: dict[str, tuple[int, ...]] = {"logprob": (size,)}
    if meta.k is not None:
        top = (size, min(meta.k, meta.vocab_size))
        shapes |= {"topk_ids": top, "topk_logprob": top}
    for name, shape in shapes.items():
        value: Tensor | None = getattr(scores, name)
        if value is None or tuple(value.shape) != shape:
            found = "absent" if value is None else f"of shape {tuple(value.shape)}"
            raise ScoreError(f"sample {sample.key}: {name} is {found}; the recording needs {shape}")


def _add_file(path: Path, record: Record, pairs: Sequence[tuple[Sample, Scores]]) -> Record:
    """Writes the pairs to a file of their own and enters it into the record."""
    tensors: dict[str, Tensor] = {}
    rows = []
    for number, (sample, scores) in enumerate(pairs):
        for owner, names in ((sample, SAMPLE_TENSORS), (scores, SCORE_TENSORS)):
            for name in names:
                value: Tensor | None = getattr(owner, name)
                if value is not None:
                    # a copy, because samples of one batch are views of one tensor, which safetensors refuses
                    dtype = torch.int32 if name in NARROW else value.dtype
                    tensors[f"{number}.{name}"] = value.detach().to("cpu", dtype, copy=True).contiguous()
        facts: dict[str, Any] = {name: getattr(sample, name) for name in FACTS}
        if sample.grade is not None:
            facts["grade"] = asdict(sample.grade)
        if sample.messages:
            facts["messages"] = sample.messages
        rows.append({"prompt": sample.prompt.id} | facts)
    data = save(tensors, {"samples": json.dumps(rows, default=str)})
    name = f"scores_{len(record.files):05d}.safetensors"
    write_atomically(path / name, data)
    entry = (len(data), hashlib.sha256(data).hexdigest())
    files = {**record.files, name: entry}
    return _save(path, replace(record, files=files, num_samples=record.num_samples + len(pairs)))


def _save(path: Path, record: Record) -> Record:
    values = {"format": FORMAT, "complete": record.complete, "num_samples": record.num_samples}
    write_json(path / META, values | asdict(record.meta) | {"files": dict(record.files)})
    return record


def read_record(path: Path) -> Record:
    """Reads meta.json. Raises RecipeError if it is missing or damaged."""
    file = path / META
    if not file.is_file():
        raise RecipeError(f"there are no stored scores in {path}: it has no {META}; record them first")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise RecipeError(f"{file} has format {values['format']}, not {FORMAT}: use the version that wrote it")
        meta = ScoredMeta(**{item.name: values[item.name] for item in fields(ScoredMeta)})
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in values["files"].items()}
        return Record(meta, files, int(values["num_samples"]), bool(values["complete"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{file} is damaged ({error!r}): record the scores again") from error


def check_sizes(path: Path, record: Record) -> None:
    """Raises RecipeError if a file is missing or has another length than was written."""
    for name, (size, _) in record.files.items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            said = "is missing" if found is None else f"has {found} bytes of {size}"
            raise RecipeError(f"{file} {said}: the stored scores are damaged; copy them again, or record them again")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Returns the facts of a file's samples."""
    with safe_open(file, framework="pt") as opened:
        rows: list[dict[str, Any]] = json.loads(opened.metadata()["samples"])
    return rows
