"""A teacher whose scores were recorded with the samples (offline OPD, arXiv 2604.13010), so that none is loaded."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from understudy.errors import RecipeError, ScoreError
from understudy.models import DType, check_model_dir
from understudy.teachers.base import RunFacts, Setup, Teacher, TeacherSection
from understudy.teachers.local import Local
from understudy.teachers.stores.recording import (
    FACTS,
    NARROW,
    SAMPLE_TENSORS,
    Record,
    ScoredMeta,
    check_sizes,
    read_record,
    read_rows,
    tokenizer_digest,
)
from understudy.types import Grade, Need, Request, Sample, Scores


@dataclass(frozen=True, kw_only=True)
class Stored(TeacherSection):
    """The section of a recipe for samples and scores that were recorded before."""

    alone = True
    replays = True

    path: str
    """The directory of the recording."""
    model: str | None = None
    """The teacher that the scores must come from, a directory or hub name; it is loaded once, to compare fingerprints."""
    fingerprint: str | None = None
    """The same, by its fingerprint."""
    dtype: DType = "auto"
    revision: str | None = None
    """Precision and revision of `model`."""

    @property
    def gives(self) -> frozenset[Need]:
        """The kinds of scores in the recording. Raises RecipeError where there is none."""
        return read_record(Path(self.path)).meta.gives

    @property
    def shown(self) -> str:
        return f"scores stored in {self.path}"

    def check(self) -> str:
        """Raises RecipeError for a recording that is damaged, incomplete, or of another teacher."""
        record = self._record()
        if self.model is not None:
            check_model_dir(self.model)
        return f"teacher: {record.num_samples} samples scored by {record.meta.teacher}, stored in {self.path}"

    def check_run(self, run: RunFacts) -> None:
        """Raises RecipeError for a recording that holds less than the run reads, or was made at another temperature."""
        record = read_record(Path(self.path))
        meta = record.meta
        if meta.temperature != run.temperature:
            raise RecipeError(
                f"the scores in {self.path} were stored with temperature {meta.temperature}, this run has "
                f"{run.temperature} (sampling.temperature): set it back, or record them again"
            )
        if meta.k is not None and meta.k < min(run.k, meta.vocab_size):
            raise RecipeError(
                f"the method {run.method} reads {run.k} tokens a row (method.k), but the scores in {self.path} have "
                f"{meta.k}; lower method.k, or record them again"
            )
        if run.own_samples:
            self._check_amount(record, run.samples_per_prompt)

    def _check_amount(self, record: Record, num: int) -> None:
        """Raises RecipeError where a prompt has fewer than `num` samples, and for a file that cannot be read."""
        found: dict[str, set[int]] = {}
        for file in record.files:
            try:
                rows = read_rows(Path(self.path) / file)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                raise RecipeError(f"{Path(self.path) / file} is damaged ({error}): record the scores again") from error
            for row in rows:
                found.setdefault(row["prompt"], set()).add(row["index"])
        lacking = {prompt: min(missing) for prompt, has in found.items() if (missing := set(range(num)) - has)}
        if lacking:
            prompt, index = next(iter(lacking.items()))
            raise RecipeError(
                f"train.samples_per_prompt is {num}, but the recording in {self.path} stores no sample for request "
                f"{prompt}#{index}; {len(lacking)} of its {len(found)} prompts have too few: lower it, or record more "
                "samples a prompt"
            )

    def open(self, setup: Setup) -> StoredTeacher:
        """Raises RecipeError as `check`, for a file that differs from what was written, and where temperature, vocabulary,
        tokenizer or teacher are not those of the recording."""
        path, record = Path(self.path), self._record()
        meta = record.meta
        pairs = {
            "temperature": (meta.temperature, setup.temperature),
            "vocabulary size": (meta.vocab_size, setup.vocab_size),
            "tokenizer": (meta.tokenizer, tokenizer_digest(setup.tokenizer)),
        }
        for name, (stored, wanted) in pairs.items():
            if stored != wanted:
                raise RecipeError(
                    f"the scores in {path} were stored with {name} {stored}, this run has {wanted}: record them again"
                )
        if self.model is not None:
            # the weights are only hashed, which needs no accelerator
            model = Local(self.model, dtype=self.dtype, revision=self.revision)
            self._compare(meta, model.open(replace(setup, device="cpu")).fingerprint)
        for name, (_, digest) in record.files.items():
            with (path / name).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    raise RecipeError(f"{path / name} is damaged: it differs from what was written; record it again")
        return StoredTeacher(path, record.files, meta, name=setup.name)

    def _record(self) -> Record:
        path = Path(self.path)
        record = read_record(path)
        check_sizes(path, record)
        if not record.complete:
            raise RecipeError(
                f"the recording in {path} was cut short after {record.num_samples} samples: record again, which continues it"
            )
        if record.num_samples == 0:
            raise RecipeError(f"the recording in {path} holds no sample: record some")
        if self.fingerprint is not None:
            self._compare(record.meta, self.fingerprint)
        return record

    def _compare(self, meta: ScoredMeta, fingerprint: str) -> None:
        if meta.fingerprint != fingerprint:
            raise RecipeError(
                f"the scores in {self.path} were stored from teacher {meta.teacher} with fingerprint {meta.fingerprint}, "
                f"this recipe's teacher has {fingerprint}: record them again"
            )


class StoredTeacher(Teacher):
    """Scores of exactly the samples of a recording."""

    def __init__(self, path: Path, files: Iterable[str], meta: ScoredMeta, *, name: str) -> None:
        self.name, self.temperature = name, meta.temperature
        self._meta = meta
        self._path = path
        self._open: dict[str, Any] = {}
        self._where = {
            f"{row['prompt']}#{row['index']}": (file, number, row)
            for file in files
            for number, row in enumerate(read_rows(path / file))
        }

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the teacher that scored."""
        return self._meta.fingerprint

    @property
    def recording(self) -> StoredTeacher:
        return self

    def __len__(self) -> int:
        """Number of samples."""
        return len(self._where)

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """The recorded scores, bit for bit; of a top-K row the first `k`.

        Raises ScoreError for another need, a larger k, a sample that was not recorded and one with other tokens,
        ValueError for "topk" without k.
        """
        meta = self._meta
        if need - meta.gives:
            raise ScoreError(
                f"the scores in {self._path} have no {sorted(need - meta.gives)}; they give {sorted(meta.gives)}"
            )
        names: list[str] = ["logprob", "entropy"] if need & {"sampled", "topk"} else []
        if "topk" in need:
            if k is None or k < 1:
                raise ValueError(f"need 'topk' asks for k of at least 1; k is {k}")
            if meta.k is not None and k > meta.k and meta.k < meta.vocab_size:
                raise ScoreError(f"the method asks for k = {k}, the scores in {self._path} have {meta.k} tokens a row")
            names += ["topk_ids", "topk_logprob"]
        return [self._score(sample, names, k) for sample in samples]

    def _score(self, sample: Sample, names: Sequence[str], k: int | None) -> Scores:
        if sample.key not in self._where:
            raise ScoreError(
                f"sample {sample.key} is not among the {len(self)} of {self._path}: only recorded samples have scores; "
                "replay them, or record this one"
            )
        stored = self._tensor(sample.key, "token_ids")
        if stored is None or not torch.equal(stored, sample.token_ids):
            raise ScoreError(
                f"sample {sample.key} has other tokens than the one in {self._path}: its scores would mean nothing"
            )
        found = {name: value for name in names if (value := self._tensor(sample.key, name)) is not None}
        found |= {name: value[:, :k] for name, value in found.items() if name.startswith("topk")}
        return Scores(sample.response_ids, **found)

    def samples_for(self, requests: Sequence[Request]) -> list[Sample | None]:
        """Returns the recorded sample for each request, by prompt and index; None if there is none.

        Raises ScoreError if a prompt is rendered to other tokens than when it was recorded.
        """
        return [self._sample(request) if request.key in self._where else None for request in requests]

    @property
    def prompt_ids(self) -> frozenset[str]:
        """Prompts that have a recorded sample."""
        return frozenset(row["prompt"] for _, _, row in self._where.values())

    def _sample(self, request: Request) -> Sample:
        row = self._where[request.key][2]
        values: dict[str, Any] = {name: self._tensor(request.key, name) for name in SAMPLE_TENSORS}
        values |= {name: row[name] for name in FACTS}
        if "grade" in row:
            values["grade"] = Grade(**row["grade"])
        values["messages"] = tuple(row.get("messages", ()))
        sample = Sample(prompt=request.prompt, teacher=request.prompt.teacher, **values)
        if not torch.equal(sample.token_ids[: sample.prompt_length], request.token_ids):
            raise ScoreError(
                f"sample {request.key}: its prompt has other tokens than when it was recorded in {self._path}; compare "
                "template, system message and tokenizer, or record again"
            )
        return sample

    def _tensor(self, key: str, field: str) -> Tensor | None:
        """Reads a tensor when it is needed: a recording may be larger than memory."""
        file, number, _ = self._where[key]
        if file not in self._open:
            opened: Any = safe_open(self._path / file, framework="pt")
            self._open[file] = opened, frozenset(opened.keys())
        opened, names = self._open[file]
        if f"{number}.{field}" not in names:
            return None
        value: Tensor = opened.get_tensor(f"{number}.{field}")
        return value.long() if field in NARROW else value
