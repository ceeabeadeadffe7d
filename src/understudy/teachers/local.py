"""A teacher whose weights are in this process: a separate model, or the student's initial weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import blake2b
from threading import RLock
from typing import Any

from understudy.errors import RecipeError, ScoreError
from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.linear import Kept, score
from understudy.linear.head import ABSENT, LMHead, project
from understudy.linear.kept import NUM_LIKELIEST
from understudy.models import backbone_hidden, lm_head, num_positions, row_style, unwrap
from understudy.models.attention import attention_name
from understudy.models.backbone import evaluating
from understudy.models.parallel import idle, longest, release, shards_of, whole
from understudy.packing import lay_out, micro_batches
from understudy.teachers.base import (
    CAN,
    ExtraIds,
    Generate,
    LoadedSection,
    Rendering,
    RunFacts,
    Setup,
    Source,
    Teacher,
    TeacherSection,
    check_need,
    check_rendering,
    gives_of,
)
from understudy.types import Need, Prompt, Sample, Sampling, Scores, map_tensors

MAX_BATCH_TOKENS = {"cpu": 2_048}
"""Slots per forward on a CPU, where activations should fit in cache: 1.4 times as fast as 16,384."""
MAX_BATCH_TOKENS_ELSEWHERE = 16_384
"""0.6 GiB of activations for a 4B model in bfloat16."""
MAX_HIDDEN_BYTES = 2 * 2**30
"""Hidden states of a step that stay on the device; more wait in host memory for their micro-batch."""
PROVENANCE = ("_name_or_path", "transformers_version", "architectures", "dtype")
"""Keys of a configuration that are only filled in by saving or loading; precision is told by the weights."""
CHUNK_ELEMENTS = 64 * 152_064
"""Logits in one chunk: 64 rows of the largest common vocabulary, 37 MiB in float32."""
ADAPTERS = (".lora_", ".modules_to_save.")
"""Parts of the names of weights that are disabled with the adapters."""


@dataclass(frozen=True)
class Local(LoadedSection):
    """The section of a recipe for a teacher loaded in this process."""

    writes_responses = True
    reads_images = True

    model: str
    """A directory or a hub name."""
    revision: str | None = None
    """Commit, branch or tag of a hub model."""
    extra_ids: ExtraIds = "mask"
    """Tokens that the student does not have: "mask" cuts them out of the softmax, "tail" leaves their probability in it."""
    rendering: Rendering = "student"
    """The prompt that it reads before a response: the student's ids, or the messages in its own chat template (own)."""

    def check_run(self, run: RunFacts) -> None:
        check_rendering(self, run)

    @property
    def source(self) -> Source:
        return Source(self.model, self.revision)

    def elsewhere(self, token_env: str) -> tuple[list[str], dict[str, Any]]:
        if self.offload or self.attn_implementation is not None:
            raise RecipeError("a served teacher has no offload and no attn_implementation; remove them, or serve none")
        words = ["serve-teacher", self.model, "--dtype", self.dtype, "--host", "{host}", "--port", "{port}"]
        words += ["--token-env", token_env, *([] if self.revision is None else ["--revision", self.revision])]
        same = {"tokenizer": self.model, "extra_ids": self.extra_ids, "rendering": self.rendering}
        return words, {"type": "served", "token_env": token_env} | same

    def open(self, setup: Setup) -> LocalTeacher:
        """Loads the model. Raises RecipeError if it cannot be loaded, VocabularyError if its head is too small."""
        model = self.load(setup.device, setup.vision)
        return LocalTeacher.beside(setup, model, self.extra_ids, offload=self.offload)


@dataclass(frozen=True, kw_only=True)
class Start(LoadedSection):
    """The section of a recipe for the student's initial weights. Missing keys default to the student's.

    With LoRA these are the student's own weights with adapters off, at no memory cost; otherwise they are loaded again.
    """

    reads_images = True

    @property
    def source(self) -> None:
        return None

    def check(self) -> str:
        return f"reference: {self.shown}"

    def open(self, setup: Setup) -> LocalTeacher:
        """Raises RecipeError for a LoRA student whose weights are not the start once its adapters are off, or which is to
        be run in another way than it is, and as `load_start`."""
        student = setup.student
        if student is None or unwrap(student) is student:
            return LocalTeacher.beside(setup, self.load_start(setup), offload=self.offload)
        trained = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
        moving = [name for name in trained if not any(part in name for part in ADAPTERS)]
        if moving:
            raise RecipeError(
                f"{len(moving)} weights outside the adapters are trained too, first {moving[0]!r}, so the student without "
                "its adapters is not its start; train adapters only, or name the start as a model of its own"
            )
        for key, value in _run_as(student).items():
            if getattr(self, key) not in (None, "auto", value):
                raise RecipeError(
                    f"{key} is {getattr(self, key)!r}, but with LoRA the student's start is the live model without its "
                    f"adapters, which has {value!r}; leave {key} out, or name the start as a model of its own"
                )
        return LocalTeacher.beside(setup, student, around=partial(without_adapters, student))

    def load_start(self, setup: Setup) -> nn.Module:
        """A model of its own with the student's initial weights.

        Raises RecipeError where there is neither a start to load nor a way to build it again.
        """
        own = {"dtype": self.dtype, "attn_implementation": self.attn_implementation}
        given = {key: value for key, value in own.items() if value not in (None, "auto")}
        options = ({} if setup.student is None else _run_as(setup.student)) | given
        if setup.start is not None:
            section = Local(setup.start, setup.start_revision, offload=self.offload, **options)
            return section.load(setup.device, setup.vision)
        if setup.fresh_student is None:
            raise RecipeError(
                f"{setup.name}: the student's start cannot be had again: it is built from scratch (student.build), and "
                "nothing says how to build it once more; set Setup.fresh_student, or name a model instead"
            )
        model = setup.fresh_student().to("cpu" if self.offload else setup.device).eval()
        return model.to(getattr(torch, options["dtype"])) if "dtype" in options else model


def _run_as(student: nn.Module) -> dict[str, Any]:
    """The keys that make a model run as the student does."""
    base = unwrap(student)
    return {"dtype": str(base.dtype).removeprefix("torch."), "attn_implementation": attention_name(student)}


@contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Switches adapters off inside; restores them and `requires_grad` on exit. Keeps existing gradients."""
    trainable: list[tuple[nn.Parameter, bool]] = [(value, value.requires_grad) for value in model.parameters()]
    try:
        with model.disable_adapter():
            yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)


REFERENCES: dict[str, type[TeacherSection]] = {"start": Start, "local": Local}
"""`reference.type` in a recipe -> its section."""


class LocalTeacher(Teacher):
    """Any causal language model: sampled-token scores, top-K of the full softmax, or hidden states.

    Scores are those at `temperature`, the student's, over the first `vocab_size` tokens without those in `absent`: padding
    rows of the head are cut off before the softmax. With `tail_size` the softmax is over that many tokens, all that the
    teacher has; the student's alone are in a row of K, and whole rows cannot be had. The weights stay in their own precision;
    softmaxes are in float32 (float64 for float64).

    `share_prompts`: what several samples begin with is computed once, where the model can (`row_style`).
    `around`: entered for every use of a model that someone else trains, to switch its adapters off. Such a model is not
    frozen here, and nothing else may run it meanwhile.
    """

    model: nn.Module
    temperature: float

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        vocab_size: int,
        absent: tuple[int, ...] = (),
        tail_size: int | None = None,
        temperature: float = 1.0,
        max_batch_tokens: int | None = None,
        device: str | torch.device | None = None,
        offload: bool = False,
        around: Callable[[], AbstractContextManager[object]] | None = None,
        generate: Generate | None = None,
        share_prompts: bool = True,
    ) -> None:
        self.model = model if around else model.requires_grad_(False)
        self._around = around or nullcontext
        """Entered for every use of the model."""
        self._keeps_adapters = around is None
        self._generate = generate
        self.style = row_style(model, share_prompts=share_prompts)
        self.name = name
        self._vocab_size = vocab_size
        self._absent = absent
        self._tail_size = tail_size
        self.temperature = temperature
        self._offload = offload
        # raises if the head is too small, before an id beyond its rows is looked up
        head = self._head()
        self._device = head.weight.device if device is None else torch.device(device)
        default = MAX_BATCH_TOKENS.get(self._device.type, MAX_BATCH_TOKENS_ELSEWHERE)
        self._max_batch_tokens = max_batch_tokens or default
        # several threads may ask, and write with it, where generation overlaps with the update
        self._lock = RLock()

    @staticmethod
    def beside(setup: Setup, model: nn.Module, extra_ids: ExtraIds = "mask", **options: Any) -> LocalTeacher:
        """The model as a teacher of the run that `setup` describes; `options` as those of the class."""
        size = setup.tail_size if extra_ids == "tail" else None
        names = ("name", "vocab_size", "absent", "temperature", "device", "generate", "share_prompts")
        return LocalTeacher(model, tail_size=size, **{name: getattr(setup, name) for name in names}, **options)

    def _head(self) -> LMHead:
        """The head over the tokens of the softmax."""
        options: dict[str, Any] = {"vocab_size": self._vocab_size, "absent": self._absent}
        if self._tail_size is not None:
            options = {"vocab_size": self._tail_size}
        return lm_head(self.model, temperature=self.temperature, **options)

    @property
    def max_tokens(self) -> int | None:
        return num_positions(self.model)

    def respond(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0) -> list[str | None]:
        """The model's own responses. Raises ScoreError if the teacher has no engine."""
        if self._generate is None:
            raise ScoreError(f"teacher {self.name!r} has no engine to write with; set Setup.generate")
        with self.on_device():
            return self._generate(self.model, prompts, Sampling(temperature=temperature, max_new_tokens=max_new_tokens))

    def head_for(self, name: str | None) -> LMHead:
        """The head for `Scores.hidden`, on the device; a copy there if the weights are offloaded."""
        with self._around():
            head = self._head()
        return map_tensors(head, lambda value: whole(value).to(self._device))

    @property
    def collective(self) -> bool:  # type: ignore[override]
        return self._keeps_adapters and shards_of(self.model) is not None

    @cached_property
    def fingerprint(self) -> str:
        """Hash of configuration, weights, temperature and vocabulary; reads all weights once, at about 1 GB/s."""
        return self.hash_weights()

    def hash_weights(self) -> str:
        """The fingerprint of the current weights."""
        digest = blake2b(digest_size=16)
        base = unwrap(self.model)
        config = {key: value for key, value in base.config.to_dict().items() if key not in PROVENANCE}
        facts = [config, self.temperature, self._vocab_size]
        if self._tail_size is not None or self._absent:
            facts += [self._absent, self._tail_size]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        for name, value in base.state_dict().items():
            if not self._keeps_adapters and any(part in name for part in ADAPTERS):
                continue
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            digest.update(f"{name}/{value.dtype}/{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    @no_grad
    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """Scores of every response token, one for each sample, in order; what was not asked for is None.

        "sampled": logprob and entropy; "topk": also the `k` most likely tokens of the full softmax, in descending
        order; "full": hidden states, on the teacher's device unless they fill it. All else is on the CPU. Samples with
        `keep_tokens` also get their most likely tokens from rows that are formed for their scores.
        Raises ScoreError for another need and for a sample longer than the teacher's positions, ValueError for "topk"
        without k.
        """
        gives = gives_of(CAN, "mask" if self._tail_size is None else "tail")
        check_need(need, k, gives, f"teacher {self.name!r} is a local model and")
        limit = self.max_tokens
        for sample in samples:
            if limit is not None and sample.token_ids.numel() - 1 > limit:
                raise ScoreError(
                    f"sample {sample.key} has {sample.token_ids.numel()} tokens, but teacher {self.name!r} has {limit} "
                    "positions (max_position_embeddings): lower max_new_tokens or drop longer prompts"
                )
        if not need - {"none"}:
            return [Scores(sample.response_ids) for sample in samples]
        found: dict[int, Scores] = {}
        weight = unwrap(self.model).get_output_embeddings().weight
        num_tokens = sum(sample.num_response_tokens for sample in samples)
        keeps_hidden = num_tokens * weight.shape[1] * weight.element_size() <= MAX_HIDDEN_BYTES
        groups = micro_batches(samples, self._max_batch_tokens, self.style)
        with self._lock, self._around(), self.on_device(), evaluating(self.model):
            number = longest(self.model, len(groups)) if self.collective else len(groups)
            for group in groups:
                scores = self._score_group([samples[index] for index in group], need, k, keeps_hidden)
                found.update(zip(group, scores, strict=True))
            if self.collective:
                head = self._head()
                for _ in range(number - len(groups)):
                    idle(self.model)
                    if head.slice is not None:
                        none = torch.zeros(0, dtype=torch.int64, device=self._device)
                        score(head.weight.new_zeros(0, head.weight.shape[1]), head, none)
                release(self.model)
        return [found[index] for index in range(len(samples))]

    def _score_group(
        self, samples: Sequence[Sample], need: frozenset[Need], k: int | None, keeps_hidden: bool
    ) -> list[Scores]:
        """One forward over packed samples."""
        layout = lay_out(samples, style=self.style)
        ids, positions = layout.input_ids.to(self._device), layout.position_ids.to(self._device)
        states = backbone_hidden(self.model, ids, positions, layout.images, layout.segments)
        hidden = states.flatten(0, 1)[layout.predicts.to(self._device)]
        fields: dict[str, tuple[Tensor, ...]] = {}
        if need & {"sampled", "topk"}:
            rows = self.score_rows(hidden, samples, k if "topk" in need else None)
            fields |= {name: value.cpu().split(layout.sizes) for name, value in rows.items()}
        if "full" in need:
            fields["hidden"] = (hidden if keeps_hidden else hidden.cpu()).split(layout.sizes)
        return scores_of(samples, fields)

    def score_rows(self, hidden: Tensor, samples: Sequence[Sample], k: int | None) -> dict[str, Tensor]:
        """`logprob` [T] of the samples' tokens and `entropy` [T]; with k also `topk_ids` and `topk_logprob` [T, min(k, V)], of
        the tokens that are the student's; `likeliest_ids`, `likeliest_logprob`, `rank` if a sample has `keep_tokens`.

        hidden [T, H]. Every logit is formed once; a chunk of them is all that is held. With a head in slices of the vocabulary
        there are only the first two.
        """
        head = self._head()
        target = torch.cat([sample.response_ids for sample in samples]).to(self._device)
        absent = torch.tensor(self._absent, dtype=torch.int64, device=hidden.device)
        keep = None
        if head.slice is None and any(sample.keep_tokens for sample in samples):
            past = torch.arange(self._vocab_size, head.num_tokens, device=hidden.device)
            closely = [torch.full((sample.num_response_tokens,), sample.keep_tokens) for sample in samples]
            keep = Kept(torch.cat(closely).to(hidden.device), torch.cat([absent, past]))
        found = self._read_rows(hidden, head, target, k, absent, keep)
        if keep is None:
            return found
        if not len(target):
            none, size = torch.zeros(0, dtype=torch.int64), min(NUM_LIKELIEST, head.num_tokens)
            top = torch.zeros(0, size)
            return found | {"likeliest_ids": top.long(), "likeliest_logprob": top.to(found["logprob"]), "rank": none}
        names = {"teacher_top": "likeliest_ids", "teacher_top_logprob": "likeliest_logprob", "teacher_rank": "rank"}
        return found | {names[name]: value for name, value in keep.columns().items()}

    def _read_rows(
        self, hidden: Tensor, head: LMHead, target: Tensor, k: int | None, absent: Tensor, keep: Kept | None
    ) -> dict[str, Tensor]:
        if k is None:
            logprob, entropy = score(hidden, head, target, keep=keep)
            return {"logprob": logprob, "entropy": entropy}
        rows = max(1, CHUNK_ELEMENTS // head.num_tokens)
        chunks = []
        for start in range(0, max(1, len(target)), rows):
            part = slice(start, start + rows)
            logits = project(hidden[part], head)
            candidates = logits[:, : self._vocab_size]
            if self._absent:
                candidates = candidates.index_fill(-1, absent, ABSENT)
            top = candidates.topk(min(k, candidates.shape[-1]), dim=-1)
            lse = logits.logsumexp(-1, keepdim=True)
            if keep is not None:
                keep.begin(torch.arange(start, start + len(logits), device=hidden.device))
                keep.read_row("teacher", slice(None), logits, lse.squeeze(-1), target[part])
            logp = logits.sub_(lse)
            chunks.append(
                {
                    "logprob": logp.gather(-1, target[part, None]).squeeze(-1),
                    "entropy": -torch.linalg.vecdot(logp.exp(), logp),
                    "topk_ids": top.indices,
                    "topk_logprob": top.values - lse,
                }
            )
        return {name: torch.cat([chunk[name] for chunk in chunks]) for name in chunks[0]}

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Offloaded weights are on the device inside; the host's copy stays, so nothing is copied back. One thread at a
        time."""
        with self._lock:
            if not self._offload:
                yield
                return
            tensors = [*self.model.parameters(), *self.model.buffers()]
            on_host = [tensor.data for tensor in tensors]
            try:
                for tensor in tensors:
                    tensor.data = tensor.data.to(self._device, non_blocking=True)
                yield
            finally:
                for tensor, data in zip(tensors, on_host, strict=True):
                    tensor.data = data


def scores_of(samples: Sequence[Sample], fields: Mapping[str, Sequence[Tensor]]) -> list[Scores]:
    """The scores of each sample from their fields, which have one tensor for each. Only those with `keep_tokens` keep their
    most likely tokens."""
    likely = ("likeliest_ids", "likeliest_logprob", "rank")
    return [
        Scores(
            sample.response_ids,
            **{name: parts[index] for name, parts in fields.items() if sample.keep_tokens or name not in likely},
        )
        for index, sample in enumerate(samples)
    ]
