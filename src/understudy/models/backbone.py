"""A causal language model in two parts: the backbone up to the final norm, and the head that forms logits."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from inspect import signature
from types import MethodType
from typing import Any, Literal, cast

from understudy.errors import RecipeError, VocabularyError, first_line
from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.linear.columns import Slice
from understudy.linear.head import LMHead
from understudy.models.attention import attention_name, keep_uncompiled, reading, use_segments
from understudy.models.files import positions_of
from understudy.models.vision import TOKEN_TYPES, Vision, in_dimensions
from understudy.types import ImageSpan, Segment

_SCALES = {
    "logit_scale": 1,
    "lm_head_multiplier": 1,
    "output_multiplier": 1,
    "logits_scaling": -1,
    "logits_mup_width_multiplier": -1,
}
"""Configuration keys whose value multiplies (1) or divides (-1) the logits; `probe_head` checks what comes out."""
TOLERANCE = {"torch.float64": 1e-4, "torch.float32": 1e-3, "torch.float16": 4e-3, "torch.bfloat16": 3e-2}
"""Error of a logit over the largest logit: a few roundings; 1e-3 in float32 leaves room for TF32 products. Norms and the
softmax of an attention may be in float32 whatever the weights are (Gemma 2), so float64 weights promise no more than that."""
_PACKING_MARGIN = 0.1
"""Nothing but the order of a sum differs; a leak between sequences may be as small as 5e-4."""


def unwrap(model: nn.Module) -> Any:
    """The Hugging Face model inside a PEFT wrapper, adapters still active; any other model as it is."""
    get_base_model = getattr(model, "get_base_model", None)
    return get_base_model() if callable(get_base_model) else model


def decoder_of(model: nn.Module) -> Any:
    """The part of the model up to the final norm. `get_decoder` returns all of Llama 4's text model, and the output layer of
    ModernBERT's decoder."""
    base = unwrap(model)
    parts = (base.get_decoder(), base.base_model, getattr(base, "model", None))
    return next(
        (part for part in parts if part is not base and hasattr(part, "get_input_embeddings")), base.get_decoder()
    )


def rope_switch(model: nn.Module) -> int | None:
    """The longest sequence that LongRoPE reads with its short frequencies: in a longer one all positions have others.

    transformers goes by the longest sequence of a call, so no call may hold sequences of both kinds. None: no LongRoPE.
    """
    parameters = getattr(unwrap(model).config.get_text_config(), "rope_parameters", None) or {}
    # some models have parameters for each kind of layer
    every = [parameters, *(part for part in parameters.values() if isinstance(part, dict))]
    found = [int(one["original_max_position_embeddings"]) for one in every if one.get("rope_type") == "longrope"]
    return min(found, default=None)


def num_positions(model: nn.Module) -> int | None:
    """`max_position_embeddings`, the longest sequence that the model takes; None where its configuration has no limit."""
    return positions_of(unwrap(model).config.get_text_config())


def vision_of(model: nn.Module) -> Vision | None:
    """The processor by which the model reads images; None for a model of text, or one that was loaded for text alone."""
    return getattr(unwrap(model), "vision", None)


def backbone_hidden(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    images: Sequence[ImageSpan] = (),
    segments: Sequence[Segment] = (),
) -> Tensor:
    """Hidden states after the final norm, without logits. [B, L], [B, L] -> [B, L, H].

    Sequences in one row are kept apart by `segments`, which cover the slots of the one row in their order (only for a model
    that `row_style` has found fit for them), or without them where positions restart, which transformers does only without a
    cache. Rows on both sides of `rope_switch` are read apart. `images`: the sequences that have some, in the order of their
    slots.
    """
    switch = rope_switch(model)
    if switch is not None:
        long = position_ids.amax(-1) >= switch
        if bool(long.any()) and not bool(long.all()):
            parts = [backbone_hidden(model, input_ids[rows], position_ids[rows]) for rows in (long, ~long)]
            order = torch.cat([long.nonzero(), (~long).nonzero()]).squeeze(-1).argsort()
            return torch.cat(parts)[order]
    options: dict[str, Any] = {"attention_mask": None, "use_cache": False}
    with reading(segments):
        output = run_backbone(model, input_ids, position_ids, images, segments, **options)
    return cast("Tensor", output.last_hidden_state)


def run_backbone(
    model: nn.Module,
    input_ids: Tensor,
    position_ids: Tensor,
    images: Sequence[ImageSpan] = (),
    segments: Sequence[Segment] = (),
    **options: Any,
) -> Any:
    """The output of the backbone. Without images only its decoder runs. `segments`: those that follow a prompt with images have
    positions behind it. `options` as of its `forward`.

    Raises RecipeError for images where the model has no processor for them, and as `Vision.inputs`.
    """
    base, vision = unwrap(model), vision_of(model)
    if not images:
        positions = position_ids if vision is None else in_dimensions(base.base_model, position_ids)
        # shards are gathered for the model as a whole, which is not what runs here
        run = getattr(base, "run_decoder", None) or decoder_of(model)
        return run(input_ids=input_ids, position_ids=positions, **options)
    if vision is None:
        raise RecipeError(f"{type(base).__name__} reads no images; choose a model that does, or leave the images out")
    inputs = vision.inputs(base.base_model, input_ids, position_ids, images, segments)
    return base.base_model(**inputs, **options)


def lm_head(
    model: nn.Module,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    absent: Sequence[int] = (),
) -> LMHead:
    """The model's head with its live weight and bias, soft-cap and scale, at a temperature, cut to `vocab_size` and without the
    ids that are `absent`. Of a model whose head is in slices (`parallel.shard`) this rank's slice of it.

    Raises RecipeError for a model without an output layer, and where `vocab_size` leaves a rank without a row of its slice;
    VocabularyError when the layer has fewer rows than `vocab_size`.
    """
    base = unwrap(model)
    layer = base.get_output_embeddings()
    if not isinstance(getattr(layer, "weight", None), torch.Tensor):
        raise RecipeError(
            f"{type(base).__name__} has no output layer with a weight; only causal language models will do"
        )
    if vocab_size is not None and vocab_size > layer.weight.shape[0]:
        raise VocabularyError(
            f"the tokenizer has {vocab_size} tokens but the head of {type(base).__name__} has {layer.weight.shape[0]} "
            "rows: this model belongs to another tokenizer"
        )
    config, scale = base.config.get_text_config(), 1.0
    for key, power in _SCALES.items():
        if (value := getattr(config, key, None)) is not None:
            scale *= float(value) ** (1 if "hyperclovax" in config.model_type else power)
    head = LMHead(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        softcap=getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None),
        scale=scale,
        temperature=temperature,
        vocab_size=vocab_size,
        absent=torch.tensor(absent, device=layer.weight.device) if absent else None,
    )
    in_slices = getattr(getattr(base, "shards", None), "head", None) is not None and hasattr(layer.weight, "to_local")
    return _own_slice(head) if in_slices else head


def _own_slice(head: LMHead) -> LMHead:
    """This rank's slice of a head whose rows are in shards."""
    weight: Any = head.weight
    mesh, size = weight.device_mesh["shard"], head.num_tokens
    # ranks have as many rows each, but for the last ones
    most = -(-weight.shape[0] // mesh.size())
    start = mesh.get_local_rank() * most
    num_tokens = min(weight.to_local().shape[0], size - start)
    # on every rank alike
    if size <= (mesh.size() - 1) * most:
        raise RecipeError(
            f"the head has {weight.shape[0]} rows for {size} tokens, of which the last of {mesh.size()} ranks gets none; "
            "remove parallel.vocabulary, or lower parallel.shard"
        )
    bias: Any = head.bias
    absent = head.absent
    if absent is not None:
        absent = absent[(absent >= start) & (absent < start + num_tokens)] - start
    return replace(
        head,
        weight=weight.to_local(),
        bias=None if bias is None else bias.to_local(),
        vocab_size=num_tokens,
        absent=absent,
        slice=Slice(start, size, mesh.get_group()),
    )


def probe_head(model: nn.Module) -> None:
    """Runs a few tokens and compares the model's logits with its head on its hidden states.

    Raises RecipeError, naming the architecture, where they differ by more than the precision explains: such a model has
    a head of a kind that `LMHead` does not know, and every loss would be wrong. Also for a model that reads what follows a
    token, as BERT does, and for one that cannot run in its precision or with its sizes.
    """
    base = unwrap(model)
    head = lm_head(model)
    ids = torch.arange(8, device=head.weight.device).remainder(head.num_tokens)[None]
    try:
        with torch.no_grad(), evaluating(model):
            expected = base(input_ids=ids, use_cache=False).logits[0]
            hidden = backbone_hidden(model, ids, torch.arange(ids.shape[1], device=ids.device)[None])
            found = head.logits(hidden[0])
            before = backbone_hidden(model, ids[:, :4], torch.arange(4, device=ids.device)[None])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as raised:
        reason = first_line(raised)
        raise RecipeError(
            f"{type(base).__name__} ({base.config.model_type}) cannot run in {base.dtype}: {reason}; choose another dtype, or "
            "correct its configuration"
        ) from raised
    error = float((found - expected.to(found.dtype)).abs().max() / expected.abs().max().clamp_min(1e-30))
    limit = TOLERANCE[str(base.dtype)]
    if not bool(expected.isfinite().all()):
        raise RecipeError(
            f"{type(base).__name__}: its logits are not finite, so its weights are damaged or have diverged"
        )
    if not float((hidden[:, :4] - before).abs().max() / hidden.abs().max().clamp_min(1e-30)) <= limit:
        raise RecipeError(
            f"{type(base).__name__} ({base.config.model_type}): a token's hidden state depends on the tokens behind it, so it "
            "cannot predict them; choose a causal language model"
        )
    if not error <= limit:
        raise RecipeError(
            f"{type(base).__name__} ({base.config.model_type}): its logits are not its head times its final hidden "
            f"states (relative error {error:.1e}, at most {limit:.0e} in {base.dtype}). Its output layer does more "
            "than scale, soft-cap and bias; choose another model, or teach `understudy.models.lm_head` about it"
        )


def row_style(
    model: nn.Module, *, share_prompts: bool = True
) -> Literal["shared", "segments", "packed", "single", "alone"]:
    """How sequences may share a row of this model (`packing.RowStyle`), found by running a few tokens.

    Sequences side by side are compared with each alone: models that ignore positions where they restart (state space models,
    ALiBi, learnt offsets) would read the neighbour, and no error would say so. A model whose attention by segments gives the
    same has it from here on.
    """
    name = str(attention_name(model))
    if name.startswith("flash"):
        return "single"
    if rope_switch(model) is not None:
        return "alone"
    if name == "sdpa" and _takes_segments(model):
        return "shared" if share_prompts else "segments"
    return "packed" if _is_apart(model, by_segments=False) else "alone"


def _takes_segments(model: nn.Module) -> bool:
    """Whether attention by segments gives what the model's own does; then it stays switched on."""
    use_segments(model, True)
    try:
        fits = _is_apart(model, by_segments=True)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # whatever an architecture raises, it cannot, and a mask does
        fits = False
    use_segments(model, fits)
    return fits


@no_grad
def _is_apart(model: nn.Module, *, by_segments: bool) -> bool:
    """Whether a sequence in a row of several is what it is alone. By segments, two of them share their prompt."""
    base = unwrap(model)
    weight = base.get_output_embeddings().weight
    ids = torch.arange(1, 14, device=weight.device).remainder(weight.shape[0])
    positions = torch.arange(6, device=weight.device)
    sequences, places = [ids[:6], ids[6:10], ids[10:]], [positions, positions[:4], positions[:3]]
    segments: tuple[Segment, ...] = ()
    if by_segments:
        # the third has the first one's prompt of 3 tokens
        segments = (Segment(0, 6), Segment(6, 10), Segment(10, 13, ((0, 3),)))
        sequences[2], places[2] = torch.cat([ids[:3], ids[10:]]), positions[3:]
    with evaluating(model):
        together = backbone_hidden(model, ids[None], torch.cat(places)[None], segments=segments)[0].split((6, 4, 3))
        pairs = []
        for found, sequence in zip(together, sequences, strict=True):
            alone = backbone_hidden(model, sequence[None], positions[None, : len(sequence)])[0]
            pairs.append((found, alone[-len(found) :]))
        if vision_of(model) is not None:
            pairs += _side_by_side_with_images(model, by_segments=by_segments)
    error = max(float((one - other).abs().max() / other.abs().max().clamp_min(1e-30)) for one, other in pairs)
    return error <= TOLERANCE[str(base.dtype)] * _PACKING_MARGIN


def _side_by_side_with_images(model: nn.Module, *, by_segments: bool) -> list[tuple[Tensor, Tensor]]:
    """Hidden states of sequences in one row, and of each alone: with two images, with none, and with one. By segments also of a
    response whose prompt with two images stands in another's slots."""
    vision = vision_of(model)
    assert vision is not None
    device = unwrap(model).get_output_embeddings().weight.device
    sequences = [_image_sequence(vision, sizes, device) for sizes in ([(64, 96), (96, 64)], [], [(96, 64)])]
    ids = torch.cat([one for one, _ in sequences], 1)
    positions = torch.cat([torch.arange(one.shape[1], device=device) for one, _ in sequences])[None]
    spans, segments, start = [], [], 0
    for _, span in sequences:
        spans += [replace(span, start=start)] if span.images else []
        segments += [Segment(start, start + span.length)] if by_segments else []
        start += span.length
    sizes = [span.length for _, span in sequences]
    if by_segments:
        # another response to the prompt that is all but the last four tokens of the first
        first, span = sequences[0]
        prompt, response = first[:, :-4], sequences[1][0][:, :6]
        segments.append(Segment(start, start + 6, ((0, span.length - 4),)))
        ids = torch.cat([ids, response], 1)
        positions = torch.cat([positions, torch.arange(span.length - 4, span.length + 2, device=device)[None]], 1)
        sequences.append((torch.cat([prompt, response], 1), replace(span, length=span.length + 2)))
        sizes.append(6)
    together = backbone_hidden(model, ids, positions, spans, segments)[0].split(sizes)
    apart = [
        backbone_hidden(model, one, torch.arange(span.length, device=device)[None], [span] if span.images else [])[0]
        for one, span in sequences
    ]
    return [(one, other[-len(one) :]) for one, other in zip(together, apart, strict=True)]


def _image_sequence(vision: Vision, sizes: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor, ImageSpan]:
    """Ids [1, L] of images of these sizes, a few tokens before and behind each."""
    images = tuple(vision.example(*size) for size in sizes)
    words = torch.tensor([index for index in range(16) if index not in vision.image_ids])[:12]
    parts = [words, *(part for image in images for part in (vision.read(image).ids, words))]
    # without images it is as long as one with some: a mask that counts places in the row instead of the sequence shows then
    parts += [] if images else [words] * 8
    ids = torch.cat(parts)[None].to(device)
    return ids, ImageSpan(0, ids.shape[1], images)


@no_grad
def probe_images(model: nn.Module) -> None:
    """Shows the model an image, by its own forward and by `backbone_hidden` with its head.

    Raises RecipeError, naming the architecture, where the two differ, or one of them does not run: its images enter in a way
    that `Vision.inputs` does not know.
    """
    base, vision = unwrap(model), vision_of(model)
    assert vision is not None
    device = base.get_output_embeddings().weight.device
    what = f"{type(base).__name__} ({base.config.model_type})"
    try:
        with evaluating(model):
            ids, span = _image_sequence(vision, [(96, 64)], device)
            features = vision.read(span.images[0]).features
            features = {
                name: value.to(device, base.dtype if value.is_floating_point() else value.dtype)
                for name, value in features.items()
            }
            types = torch.isin(ids, torch.tensor(vision.image_ids, device=device)).long()
            named = signature(base.forward).parameters
            masks = {name: types for name in TOKEN_TYPES if name in named}
            whole = base(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **features, **masks)
            expected = whole.logits[0]
            places = torch.arange(ids.shape[1], device=device)[None]
            found = lm_head(model).logits(backbone_hidden(model, ids, places, [span])[0])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # other people's code, of dozens of families
        reason = first_line(error)
        raise RecipeError(f"{what} cannot be shown an image here: {reason}; choose another model") from error
    gap = float((found - expected.to(found.dtype)).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not gap <= TOLERANCE[str(base.dtype)]:
        raise RecipeError(
            f"{what}: images enter it in another way than through its backbone's inputs (relative error {gap:.1e}); choose "
            "another model, or teach `understudy.models.vision` about it"
        )


def freeze_vision(model: nn.Module) -> None:
    """Only the decoder, the embedding and the output layer of a model that reads images stay trainable."""
    base = unwrap(model)
    parts = (decoder_of(model), base.get_input_embeddings(), base.get_output_embeddings())
    language = {id(parameter) for part in parts for parameter in part.parameters()}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and id(parameter) in language)


def disable_dropout(model: nn.Module) -> None:
    """Dropout, skipped layers and router noise off in all but LoRA's own layers: the student that learns is then the one that
    samples."""
    for name, module in model.named_modules():
        if "lora_" in name:
            continue
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for key, value in vars(module).items():
            if re.search("drop|jitter|noise", key) and isinstance(value, float):
                setattr(module, key, 0.0)
    config = unwrap(model).config.get_text_config()
    # Falcon and Persimmon read these at every call
    for key in ("attention_dropout", "hidden_dropout"):
        if isinstance(getattr(config, key, None), float):
            setattr(config, key, 0.0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside, the former mode of every module after."""
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in was_training:
            module.training = True


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The layers of the decoder, as the architecture names them; none where it names none."""
    kinds = set(getattr(unwrap(model), "_no_split_modules", None) or ())
    return [module for module in decoder_of(model).modules() if type(module).__name__ in kinds]


def compile_blocks(model: nn.Module) -> None:
    """Compiles the layers of the decoder with `torch.compile`, once for all lengths. Acts in training mode only, so that what
    generates and scores with the model runs as it did.

    Raises RecipeError for a model whose blocks are not known.
    """
    blocks = blocks_of(model)
    if not blocks:
        raise RecipeError(
            f"{type(unwrap(model)).__name__} does not say which of its modules are its blocks; set train.compile to false"
        )
    keep_uncompiled()
    for kind in {type(block) for block in blocks}:
        compiled = torch.compile(kind.forward, dynamic=True)

        def forward(
            self: nn.Module, *args: Any, compiled: Any = compiled, plain: Any = kind.forward, **given: Any
        ) -> Any:
            return (compiled if self.training else plain)(self, *args, **given)

        for block in blocks:
            if type(block) is kind:
                # bound, so that a copy of the model runs its own weights
                block.forward = MethodType(forward, block)


def enable_gradient_checkpointing(model: nn.Module) -> None:
    """Recomputes activations in backward, so that memory holds one layer's. Acts in training mode only.

    Raises RecipeError for architectures that cannot.
    """
    base = unwrap(model)
    if not base.supports_gradient_checkpointing:
        raise RecipeError(
            f"{type(base).__name__} cannot recompute activations; set train.gradient_checkpointing to false"
        )
    # transformers 5.2x renamed the method; the old name warns there and is the only one before
    renamed = getattr(base, "activation_checkpointing_enable", None)
    (renamed or base.gradient_checkpointing_enable)({"use_reentrant": False})
