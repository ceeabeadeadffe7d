"""Recordings: samples in a directory together with a teacher's scores of them, and the teacher that gives these again.

Offline OPD (arXiv 2604.13010): a run on a recording loads no teacher.

    meta.json                   teacher, temperature and vocabulary of the scores; size and SHA-256 of every file
    scores_00000.safetensors    some samples with their scores, under i.FIELD for the i-th; their facts in the header

A file is written whole and then entered into meta.json, so an interrupted recording can be continued.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from understudy.config import load_json
from understudy.errors import RecipeError, ScoreError
from understudy.files import write_atomically, write_json
from understudy.lazy import Tensor, safetensors, torch
from understudy.linear.kept import NUM_LIKELIEST
from understudy.models import DType, check_model_dir
from understudy.teachers.base import RunFacts, Setup, Teacher, TeacherSection, check_need, hash_facts
from understudy.teachers.local import Local
from understudy.types import Grade, Need, Request, Sample, Scores

FORMAT = 1
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
    return hash_facts([sorted((i, token) for token, i in tokenizer.get_vocab().items()), tokenizer.eos_token_id])


# --- writing ------------------------------------------------------------------------------------------------------------


def recorded(path: Path, meta: ScoredMeta) -> frozenset[str]:
    """Returns the keys of samples that are there already and need not be made again.

    Raises RecipeError for a recording of something else, and for a damaged one.
    """
    return frozenset(_find_rows(path, _continued(path, meta)))


def write_scored(
    path: Path, meta: ScoredMeta, pairs: Iterable[tuple[Sample, Scores]], *, shard_samples: int = 64
) -> int:
    """Adds samples with their scores, completes the recording, and returns how many it holds. Known samples are skipped.

    Each `shard_samples` are on disk before the next are taken from `pairs`; if `pairs` fails, what was taken before is
    written too, and the next call continues. Raises ScoreError for scores that are not what `meta` promises, RecipeError
    as `recorded`, CheckpointError if a file cannot be written.
    """
    record = _continued(path, meta)
    known = set(_find_rows(path, record))
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
    if not (path / META).is_file():
        return Record(meta, {}, 0, False)
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
        row: dict[str, Any] = {"prompt": sample.prompt.id} | {name: getattr(sample, name) for name in FACTS}
        if sample.grade is not None:
            row["grade"] = asdict(sample.grade)
        if sample.messages:
            row["messages"] = sample.messages
        rows.append(row)
    data = safetensors.save(tensors, {"samples": json.dumps(rows, default=str)})
    name = f"scores_{len(record.files):05d}.safetensors"
    write_atomically(path / name, data)
    files = {**record.files, name: (len(data), hashlib.sha256(data).hexdigest())}
    return _save(path, replace(record, files=files, num_samples=record.num_samples + len(pairs)))


def _save(path: Path, record: Record) -> Record:
    values = {"format": FORMAT, "complete": record.complete, "num_samples": record.num_samples}
    write_json(path / META, values | asdict(record.meta) | {"files": dict(record.files)})
    return record


# --- reading ------------------------------------------------------------------------------------------------------------


def read_record(path: Path) -> Record:
    """Reads meta.json. Raises RecipeError if it is missing or damaged, or if a file that it names is missing or has another
    length than was written."""
    file = path / META
    if not file.is_file():
        raise RecipeError(f"there are no stored scores in {path}: it has no {META}; record them first")
    try:
        values = load_json(file.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise RecipeError(f"{file} has format {values['format']}, not {FORMAT}: use the version that wrote it")
        meta = ScoredMeta(**{item.name: values[item.name] for item in fields(ScoredMeta)})
        files = {str(name): (int(size), str(digest)) for name, (size, digest) in values["files"].items()}
        record = Record(meta, files, int(values["num_samples"]), bool(values["complete"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecipeError(f"{file} is damaged ({error!r}): record the scores again") from error
    for name, (size, _) in files.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if found != size:
            said = "is missing" if found is None else f"has {found} bytes of {size}"
            raise RecipeError(
                f"{path / name} {said}: the stored scores are damaged; copy them again, or record them again"
            )
    return record


Row = tuple[str, int, dict[str, Any]]
"""A sample's file, its number there, and its facts."""


def _find_rows(path: Path, record: Record) -> dict[str, Row]:
    """All samples, by key. Raises RecipeError for a file that cannot be read."""
    found: dict[str, Row] = {}
    for name in record.files:
        try:
            with safe_open(path / name, framework="pt") as opened:
                rows = json.loads(opened.metadata()["samples"])
            found |= {f"{row['prompt']}#{row['index']}": (name, number, row) for number, row in enumerate(rows)}
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise RecipeError(f"{path / name} is damaged ({error}): record the scores again") from error
    return found


@dataclass(frozen=True, kw_only=True)
class Stored(TeacherSection):
    """The section of a recipe for samples and scores that were recorded before."""

    alone = True
    replays = True
    # its samples are of the task's prompts, which have them
    reads_images = True

    path: str
    """The directory of the recording."""
    model: str | None = None
    """The teacher that the scores must come from, a directory or hub name; it is loaded once, to compare fingerprints."""
    fingerprint: str | None = None
    """The same, by its fingerprint."""
    dtype: DType = "auto"
    """Precision of `model`."""
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
        meta, num = record.meta, run.samples_per_prompt
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
        found: dict[str, set[int]] = {}
        for _, _, row in _find_rows(Path(self.path), record).values() if run.own_samples else ():
            found.setdefault(row["prompt"], set()).add(row["index"])
        lacking = {prompt: min(missing) for prompt, has in found.items() if (missing := set(range(num)) - has)}
        for prompt, index in lacking.items():
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
        return StoredTeacher(path, record, name=setup.name)

    def _record(self) -> Record:
        record = read_record(Path(self.path))
        if not record.complete:
            raise RecipeError(
                f"the recording in {self.path} was cut short after {record.num_samples} samples: record again, which "
                "continues it"
            )
        if record.num_samples == 0:
            raise RecipeError(f"the recording in {self.path} holds no sample: record some")
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

    def __init__(self, path: Path, record: Record, *, name: str) -> None:
        self.name, self.temperature = name, record.meta.temperature
        self._meta = record.meta
        self._files = record.files
        self._path = path
        self._open: dict[str, Any] = {}
        self._rows = _find_rows(path, record)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the teacher that scored."""
        return self._meta.fingerprint

    @property
    def origin(self) -> str:
        return hash_facts([self._meta.fingerprint, sorted(self._files.items())])

    @property
    def recording(self) -> StoredTeacher:
        return self

    @property
    def prompt_ids(self) -> frozenset[str]:
        """Prompts that have a recorded sample."""
        return frozenset(row["prompt"] for _, _, row in self._rows.values())

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """The recorded scores, bit for bit; of a top-K row the first `k`.

        Raises ScoreError for another need, a larger k, a sample that was not recorded and one with other tokens,
        ValueError for "topk" without k.
        """
        meta = self._meta
        check_need(need, k, meta.gives, f"the recording in {self._path}")
        names: list[str] = ["logprob", "entropy"] if need & {"sampled", "topk"} else []
        if "topk" in need:
            names += ["topk_ids", "topk_logprob"]
            if k is not None and meta.k is not None and k > meta.k and meta.k < meta.vocab_size:
                raise ScoreError(f"the method asks for k = {k}, the scores in {self._path} have {meta.k} tokens a row")
        found = []
        for sample in samples:
            if sample.key not in self._rows:
                raise ScoreError(
                    f"sample {sample.key} is not among the {len(self._rows)} of {self._path}: only recorded samples have "
                    "scores; replay them, or record this one"
                )
            stored = self._tensor(sample.key, "token_ids")
            if stored is None or not torch.equal(stored, sample.token_ids):
                raise ScoreError(
                    f"sample {sample.key} has other tokens than the one in {self._path}: its scores would mean nothing"
                )
            values = {name: value for name in names if (value := self._tensor(sample.key, name)) is not None}
            values |= {name: value[:, :k] for name, value in values.items() if name.startswith("topk")}
            if sample.keep_tokens and names and (top := self._tensor(sample.key, "topk_ids")) is not None:
                logprob = self._tensor(sample.key, "topk_logprob")
                assert logprob is not None
                values |= {"likeliest_ids": top[:, :NUM_LIKELIEST], "likeliest_logprob": logprob[:, :NUM_LIKELIEST]}
            found.append(Scores(sample.response_ids, **values))
        return found

    def samples_for(self, requests: Sequence[Request]) -> list[Sample | None]:
        """Returns the recorded sample for each request, by prompt and index; None if there is none.

        Raises ScoreError if a prompt is rendered to other tokens than when it was recorded.
        """
        found: list[Sample | None] = []
        for request in requests:
            if request.key not in self._rows:
                found.append(None)
                continue
            row = self._rows[request.key][2]
            values: dict[str, Any] = {name: self._tensor(request.key, name) for name in SAMPLE_TENSORS}
            values |= {name: row[name] for name in FACTS}
            values["grade"] = Grade(**row["grade"]) if "grade" in row else None
            values["messages"] = tuple(row.get("messages", ()))
            sample = Sample(prompt=request.prompt, teacher=request.prompt.teacher, **values)
            if not torch.equal(sample.token_ids[: sample.prompt_length], request.token_ids):
                raise ScoreError(
                    f"sample {request.key}: its prompt has other tokens than when it was recorded in {self._path}; compare "
                    "template, system message and tokenizer, or record again"
                )
            found.append(sample)
        return found

    def _tensor(self, key: str, field: str) -> Tensor | None:
        """Reads a tensor when it is needed: a recording may be larger than memory."""
        file, number, _ = self._rows[key]
        if file not in self._open:
            opened: Any = safe_open(self._path / file, framework="pt")
            self._open[file] = opened, frozenset(opened.keys())
        opened, names = self._open[file]
        if f"{number}.{field}" not in names:
            return None
        value: Tensor = opened.get_tensor(f"{number}.{field}")
        return value.long() if field in NARROW else value
