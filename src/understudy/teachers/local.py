"""A teacher whose weights are in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from threading import RLock

import torch
from torch import Tensor, nn

from understudy.errors import ScoreError
from understudy.linear.head import LMHead
from understudy.models import (
    DType,
    backbone_hidden,
    check_model_dir,
    lm_head,
    load_causal_lm,
    num_positions,
    probe_head,
    row_style,
    unwrap,
)
from understudy.models.backbone import evaluating
from understudy.packing import lay_out, micro_batches
from understudy.teachers.base import Setup, Source, Teacher, TeacherSection, Weights
from understudy.teachers.rows import score_rows
from understudy.types import Need, Prompt, Sample, Sampling, Scores

MAX_BATCH_TOKENS = {"cpu": 2_048}
"""Slots of one forward where activations should stay in a processor's cache: 1.4 times as fast as 16,384."""
MAX_BATCH_TOKENS_ELSEWHERE = 16_384
"""0.6 GiB of activations for a 4B model in bfloat16."""
MAX_HIDDEN_BYTES = 2 * 2**30
"""Hidden states of a step that stay on the device; more wait in host memory for their micro-batch."""
PROVENANCE = ("_name_or_path", "transformers_version", "architectures", "dtype")
"""Keys of a configuration that are only filled in by saving or loading; precision is told by the weights."""
ADAPTERS = (".lora_", ".modules_to_save.")
"""Parts of the names of weights that switching adapters off takes away."""
CAN: frozenset[Need] = frozenset({"none", "sampled", "topk", "full"})


@dataclass(frozen=True)
class Local(TeacherSection):
    """The section of a recipe for a teacher that is loaded here."""

    writes_responses = True

    model: str
    """A directory or a hub name."""
    dtype: DType = "auto"
    """ "auto": the checkpoint's own."""
    offload: bool = False
    """Keep the weights in host memory between uses."""
    revision: str | None = None
    attn_implementation: str | None = None

    @property
    def gives(self) -> frozenset[Need]:
        return CAN

    @property
    def vocabulary(self) -> Source:
        return Source(self.model, self.revision)

    @property
    def weights(self) -> Weights:
        return Weights(model=self.model, dtype=self.dtype, offload=self.offload)

    @property
    def shown(self) -> str:
        return self.model

    def check(self) -> str:
        """Raises RecipeError for a directory that is no model."""
        return f"teacher: {check_model_dir(self.model)}"

    def open(self, setup: Setup) -> LocalTeacher:
        """Loads the model. Raises RecipeError where it cannot be, VocabularyError where its head is too small."""
        model = load_causal_lm(
            self.model,
            dtype=self.dtype,
            device="cpu" if self.offload else setup.device,
            attn_implementation=self.attn_implementation,
            revision=self.revision,
        )
        probe_head(model)
        return LocalTeacher(
            model,
            name=setup.name,
            vocab_size=setup.vocab_size,
            temperature=setup.temperature,
            device=setup.device,
            offload=self.offload,
            generate=setup.generate,
        )


class LocalTeacher(Teacher):
    """Any causal language model: sampled-token scores, top-K of the full softmax, or hidden states.

    Scores are those at `temperature`, the student's, over the first `vocab_size` tokens: padding rows of the head are cut
    off before the softmax. The weights stay in their own precision; softmaxes are in float32 (float64 for float64).

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
        temperature: float = 1.0,
        max_batch_tokens: int | None = None,
        device: str | torch.device | None = None,
        offload: bool = False,
        around: Callable[[], AbstractContextManager[object]] | None = None,
        generate: Callable[[nn.Module, Sequence[Prompt], Sampling], list[str | None]] | None = None,
    ) -> None:
        self.model = model if around else model.requires_grad_(False)
        self._around = around
        self._generate = generate
        self._style = row_style(model)
        self.name = name
        self._vocab_size = vocab_size
        self.temperature = temperature
        self._offload = offload
        self._device = lm_head(model, vocab_size=vocab_size).weight.device if device is None else torch.device(device)
        default = MAX_BATCH_TOKENS.get(self._device.type, MAX_BATCH_TOKENS_ELSEWHERE)
        self._max_batch_tokens = max_batch_tokens or default
        # several threads may ask, and write with it, where generation overlaps with the update
        self._lock = RLock()

    @property
    def max_tokens(self) -> int | None:
        return num_positions(self.model)

    def respond(self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float = 0.0) -> list[str | None]:
        """The model's own responses. Raises ScoreError where nobody gave the teacher an engine to write with."""
        if self._generate is None:
            raise ScoreError(f"teacher {self.name!r} has no engine to write with; set Setup.generate")
        with self.on_device():
            return self._generate(self.model, prompts, Sampling(temperature=temperature, max_new_tokens=max_new_tokens))

    def head_for(self, name: str | None) -> LMHead:
        """The head for `Scores.hidden`, on the device; a copy there if the weights are offloaded."""
        with self._alone():
            head = lm_head(self.model, temperature=self.temperature, vocab_size=self._vocab_size)
        bias = None if head.bias is None else head.bias.to(self._device)
        return LMHead(head.weight.to(self._device), bias, head.softcap, head.scale, head.temperature, head.vocab_size)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of configuration, weights, temperature and vocabulary; reads all weights once, at about 1 GB/s."""
        return self.hash_weights()

    def hash_weights(self) -> str:
        """The fingerprint of the weights as they are now."""
        digest = blake2b(digest_size=16)
        base = unwrap(self.model)
        config = {key: value for key, value in base.config.to_dict().items() if key not in PROVENANCE}
        digest.update(json.dumps([config, self.temperature, self._vocab_size], sort_keys=True, default=str).encode())
        for name, value in base.state_dict().items():
            if self._around is not None and any(part in name for part in ADAPTERS):
                continue
            name = name.replace(".base_layer.", ".").replace(".original_module.", ".")
            digest.update(f"{name}/{value.dtype}/{tuple(value.shape)}".encode())
            digest.update(value.reshape(-1).view(torch.uint8).cpu().numpy())
        return digest.hexdigest()

    @torch.no_grad()
    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """Scores of every response token, one for each sample, in order; what was not asked for is None.

        "sampled": logprob and entropy; "topk": also the `k` most likely tokens of the full softmax, in descending
        order; "full": hidden states, on the teacher's device unless they fill it. All else is on the CPU.
        Raises ScoreError for another need and for a sample longer than the teacher's positions, ValueError for "topk"
        without k.
        """
        if need - CAN:
            raise ScoreError(
                f"teacher {self.name!r} is a local model and cannot give {sorted(need - CAN)}; it gives {sorted(CAN)}"
            )
        if "topk" in need and (k is None or k < 1):
            raise ValueError(f"need 'topk' asks for k of at least 1; k is {k}")
        self._check_positions(samples)
        if not need - {"none"}:
            return [Scores(sample.response_ids) for sample in samples]
        found: dict[int, Scores] = {}
        self._keeps_hidden = self._hidden_bytes(samples) <= MAX_HIDDEN_BYTES
        lengths = [sample.token_ids.numel() - 1 for sample in samples]
        with self._lock, self._alone(), self.on_device(), evaluating(self.model):
            for group in micro_batches(lengths, self._max_batch_tokens, self._style):
                chosen = [samples[index] for index in group]
                found.update(zip(group, self._score_group(chosen, need, k), strict=True))
        return [found[index] for index in range(len(samples))]

    def _score_group(self, samples: Sequence[Sample], need: frozenset[Need], k: int | None) -> list[Scores]:
        """One forward over samples side by side."""
        layout = lay_out(samples, style=self._style)
        states = backbone_hidden(self.model, layout.input_ids.to(self._device), layout.position_ids.to(self._device))
        hidden = states.flatten(0, 1)[layout.predicts.to(self._device)]
        fields: dict[str, tuple[Tensor, ...]] = {}
        if need & {"sampled", "topk"}:
            target = torch.cat([sample.response_ids for sample in samples]).to(self._device)
            head = lm_head(self.model, temperature=self.temperature, vocab_size=self._vocab_size)
            rows = score_rows(hidden, head, target, k=k if "topk" in need else None)
            fields |= {name: value.cpu().split(layout.sizes) for name, value in rows.items()}
        if "full" in need:
            fields["hidden"] = (hidden if self._keeps_hidden else hidden.cpu()).split(layout.sizes)
        return [
            Scores(sample.response_ids, **{name: parts[index] for name, parts in fields.items()})
            for index, sample in enumerate(samples)
        ]

    def _hidden_bytes(self, samples: Sequence[Sample]) -> int:
        weight = unwrap(self.model).get_output_embeddings().weight
        return int(sum(sample.num_response_tokens for sample in samples) * weight.shape[1] * weight.element_size())

    def _check_positions(self, samples: Sequence[Sample]) -> None:
        limit = self.max_tokens
        for sample in samples:
            if limit is not None and sample.token_ids.numel() - 1 > limit:
                raise ScoreError(
                    f"sample {sample.key} has {sample.token_ids.numel()} tokens, but teacher {self.name!r} has {limit} "
                    "positions (max_position_embeddings): lower max_new_tokens or drop longer prompts"
                )

    def _alone(self) -> AbstractContextManager[object]:
        return nullcontext() if self._around is None else self._around()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Offloaded weights are on the device inside; the host's copy stays, so nothing is copied back. One thread at a
        time."""
        with self._lock:
            yield from self._moved()

    def _moved(self) -> Iterator[None]:
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
