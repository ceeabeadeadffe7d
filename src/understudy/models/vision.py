"""Images: the tokens and features that a model's processor makes of them, and how these enter its backbone."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from io import BytesIO
from pathlib import Path
from threading import Lock
from typing import Any, cast

from understudy import given
from understudy.errors import DataError, RecipeError
from understudy.lazy import Tensor, torch
from understudy.models.files import ADAPTER, adapter_base, locate, said_by
from understudy.types import Image, ImageSpan, Segment

CACHE_BYTES = 2**30
"""Features of images that are kept: of about 60 images of 1,000 tokens, so that the samples of a prompt share them."""
_OF_TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids", "text_replacement_offsets")
"""Outputs of a processor that are no features of an image."""
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Settings of a processor of images."""
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
"""Names by which backbones take a mask of the image tokens."""


def open_image(image: Image, *, whole: bool = True) -> Any:
    """The image in RGB, as its camera was held. `whole=False`: only its header is read, and nothing is returned.

    Raises DataError for a missing or damaged file, RecipeError where Pillow is not installed.
    """
    try:
        from PIL import Image as Pillow
        from PIL import ImageOps
    except ImportError as error:
        raise RecipeError("images need the package Pillow; run: pip install 'understudy[vision]'") from error
    try:
        with Pillow.open(BytesIO(image.data or b"") if image.path is None else image.path) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB") if whole else None
    except FileNotFoundError as error:
        raise DataError(f"there is no image {image.name}") from error
    # a damaged file raises whatever its format's reader likes
    except Exception as error:
        raise DataError(f"{image.name} cannot be read as an image: {error}; save it again, or take it out") from error


@dataclass(frozen=True, eq=False)
class ReadImage:
    """An image as a model reads it."""

    text: str
    """The tokens that stand for it, spelled out: what surrounds them and one for each row of its features."""
    ids: Tensor
    """[I] int64, the same as ids."""
    features: Mapping[str, Tensor]
    """Inputs of the backbone (`pixel_values`, `image_grid_thw`, ...), of a batch of one image."""


class Vision:
    """A model's own processor of images (transformers), which models carry as the attribute `vision`. Threads may share it.

    `files`: its settings by the names of their files, which are saved beside the model.
    """

    def __init__(self, processor: Any, files: Mapping[str, str]) -> None:
        self.processor = processor
        self.files = files
        self.image_token: str = processor.image_token
        """Stands for a whole image in what a chat template writes."""
        self.image_ids: tuple[int, ...] = tuple(processor.image_token_ids)
        """The tokens in whose places features stand."""
        self._lock = Lock()
        self._read: OrderedDict[Image, ReadImage] = OrderedDict()
        self._num_bytes = 0

    def __deepcopy__(self, memo: object) -> Vision:
        return self

    def read(self, image: Image) -> ReadImage:
        """Decodes and processes the image, unless it was read lately. Raises DataError."""
        with self._lock:
            if image in self._read:
                self._read.move_to_end(image)
                return self._read[image]
        found = self.process(open_image(image), image.name)
        with self._lock:
            if image not in self._read:
                self._read[image] = found
                self._num_bytes += _size(found)
                while self._num_bytes > CACHE_BYTES and len(self._read) > 1:
                    self._num_bytes -= _size(self._read.popitem(last=False)[1])
        return found

    def process(self, opened: Any, name: str) -> ReadImage:
        """As `read`, of an image of Pillow. Raises DataError for one that the processor refuses, such as a line of pixels."""
        try:
            made = self.processor(
                text=[self.image_token], images=[opened], return_tensors="pt", return_text_replacement_offsets=True
            )
            (replaced,) = made["text_replacement_offsets"][0]
        except Exception as error:
            raise DataError(
                f"{type(self.processor).__name__} cannot process the image {name}: {error}; take it out of the data"
            ) from error
        features = {key: value for key, value in made.items() if key not in _OF_TEXT}
        return ReadImage(str(replaced["replacement"]), made["input_ids"][0], features)

    def example(self, width: int = 96, height: int = 64) -> Image:
        """A small image, for probes of a model."""
        from PIL import Image as Pillow

        file = BytesIO()
        Pillow.linear_gradient("L").resize((width, height)).convert("RGB").save(file, "PNG")
        return Image(data=file.getvalue())

    def inputs(
        self,
        backbone: Any,
        input_ids: Tensor,
        position_ids: Tensor,
        spans: Sequence[ImageSpan],
        segments: Sequence[Segment] = (),
    ) -> dict[str, Tensor]:
        """Inputs of the backbone: ids, features, positions, and which tokens are an image's.

        Only `spans` have some: a free slot whose id is that of an image gets another. `segments`: those of the one row, if any.

        Positions are [B, L], or [4, B, L] of a model with positions in three dimensions, whose first row are those of text.
        Raises DataError where a sequence does not hold as many image tokens as its images have: they were expanded by
        another processor.
        """
        device, dtype = input_ids.device, backbone.dtype
        is_image = torch.isin(input_ids, torch.tensor(self.image_ids, device=device))
        inside = torch.zeros_like(is_image)
        every = [[self.read(image) for image in span.images] for span in spans]
        for span, images in zip(spans, every, strict=True):
            expected = sum(int(torch.isin(one.ids, torch.tensor(self.image_ids)).sum()) for one in images)
            found = int(is_image.flatten()[span.start : span.start + span.length].sum())
            if found != expected:
                raise DataError(
                    f"a sequence holds {found} image tokens, but {type(backbone).__name__} makes {expected} of its images "
                    f"({span.images[0].name}): its processor is not the student's, so the two read different tokens"
                )
            inside.flatten()[span.start : span.start + span.length] = True
        other = next(index for index in range(len(self.image_ids) + 1) if index not in self.image_ids)
        input_ids, is_image = input_ids.where(inside | ~is_image, other), is_image & inside
        features = {
            name: value.to(device, dtype) if value.is_floating_point() else value.to(device)
            for name, value in _joined([one.features for images in every for one in images]).items()
        }
        taken = signature(backbone.forward).parameters
        masks = {name: is_image.long() for name in TOKEN_TYPES if name in taken}
        positions = in_dimensions(backbone, position_ids)
        if positions.dim() == 3:
            width = input_ids.shape[-1]
            known = signature(backbone.get_rope_index).parameters
            for span, images in zip(spans, every, strict=True):
                row, first = divmod(span.start, width)
                part = slice(first, first + span.length)
                grids = _joined([one.features for one in images])
                found, _ = backbone.get_rope_index(
                    input_ids[row : row + 1, part],
                    mm_token_type_ids=is_image[row : row + 1, part].int(),
                    **{name: value.to(device) for name, value in grids.items() if name in known},
                )
                positions[1:, row, part] = found[:, 0]
            for segment in segments:
                if segment.before:
                    # as far behind its prompt as the response that stands there
                    end = segment.before[-1][1]
                    behind = positions[1:, 0, end : end + 1] - sum(stop - start for start, stop in segment.before)
                    positions[1:, 0, segment.start : segment.stop] += behind
        return {"input_ids": input_ids, "position_ids": positions, **features, **masks}


def in_dimensions(backbone: Any, position_ids: Tensor) -> Tensor:
    """Positions of text as the backbone takes them: [B, L] as they are, or [4, B, L] for one with positions in three
    dimensions, where only the first of four rows keeps sequences in one row apart."""
    if not hasattr(backbone, "get_rope_index"):
        return position_ids
    return position_ids.expand(4, *position_ids.shape).clone()


def _joined(features: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Features of several images as one batch, along the first dimension; others are filled up with zeros, as processors do."""
    joined = {}
    for name in features[0]:
        parts = [one[name] for one in features]
        shape = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        padded = []
        for part in parts:
            whole = part.new_zeros(part.shape[0], *shape)
            whole[tuple(slice(size) for size in part.shape)] = part
            padded.append(whole)
        joined[name] = torch.cat(padded)
    return joined


def _size(read: ReadImage) -> int:
    return sum(value.nbytes for value in read.features.values())


def load_vision(path_or_name: str, tokenizer: Any, *, revision: str | None = None) -> Vision:
    """The processor by which a model reads images, with a tokenizer that was loaded. It processes with Pillow, so that it gives
    the same on every machine.

    Raises RecipeError for a model of text, a processor that cannot be loaded, and one without a token for images.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import cached_file

    if importlib.util.find_spec("PIL") is None:
        raise RecipeError("images need the package Pillow; run: pip install 'understudy[vision]'")
    if (pair := given.find(path_or_name)) is not None:
        vision = getattr(pair[0], "vision", None)
        if vision is None:
            raise RecipeError(
                f"{path_or_name} was given without a processor of images; name its directory in its place"
            )
        return cast("Vision", vision)
    local = Path(path_or_name).expanduser()
    if (local / ADAPTER).is_file():
        return load_vision(adapter_base(local), tokenizer)
    source, offline = locate(path_or_name)
    options = {"revision": revision or "main", "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        if config.model_type not in KNOWN or not PROCESSOR_MAPPING_NAMES.get(config.model_type):
            raise RecipeError(
                f"{path_or_name!r} is a model of text ({config.model_type}), and the prompts have images; choose a model that "
                "reads both (qwen2_5_vl, qwen3_vl, gemma3, llava, ...), or take task.image_field out"
            )
        own: Any = getattr(transformers, PROCESSOR_MAPPING_NAMES[config.model_type])

        class ForImages(own):  # type: ignore[misc]
            """The processor without its part for videos, which needs more packages."""

            def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
                """Takes None for what is left out."""

        ForImages.__name__ = own.__name__
        parts = {
            "image_processor": transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **options),
            # a copy: some processors add tokens to theirs
            "tokenizer": deepcopy(tokenizer),
        }
        settings, _ = own.get_processor_dict(source, revision=options["revision"])
        processor = ForImages.from_args_and_dict([parts.get(name) for name in own.get_attributes()], settings)
        found = {
            name: cached_file(source, name, revision=options["revision"], _raise_exceptions_for_missing_entries=False)
            for name in _PROCESSOR_FILES
        }
        files = {name: Path(path).read_text(encoding="utf-8") for name, path in found.items() if path}
    except RecipeError:
        raise
    except Exception as error:
        # settings and packages of dozens of processors
        raise RecipeError(
            f"cannot load the processor of images of {path_or_name!r}: {said_by(error, offline)}"
        ) from error
    if not tokenizer.chat_template:
        # some keep it with the processor
        tokenizer.chat_template = processor.chat_template
    token = getattr(processor, "image_token", None)
    special = {str(one) for one in tokenizer.added_tokens_decoder.values() if one.special}
    if token not in special:
        raise RecipeError(
            f"{own.__name__} of {path_or_name!r} marks an image with {token!r}, which is no special token of its tokenizer, so "
            "a prompt could spell it; choose another model"
        )
    return Vision(processor, files)
