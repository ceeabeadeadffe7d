"""Tiny models that read images, one of each common kind, with the processors of their families."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image as Pillow
from PIL import ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from understudy.types import Image

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
}
ENCODER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
QWEN_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 784, "longest_edge": 784 * 8},
}
CLIP_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
}
GEMMA_PROCESSOR = {
    "image_processor_type": "Gemma3ImageProcessor",
    "size": {"height": 56, "width": 56},
    "do_pan_and_scan": False,
    "image_seq_length": 4,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for part in m['content'] %}{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS_ALONE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'image') %}IMAGE{% endfor %}"
    "{% for part in m['content'] | selectattr('type', 'equalto', 'text') %}{{ part['text'] }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""As those of LLaVA: a content that is a string is lost, and images come first."""


@dataclass(frozen=True)
class Family:
    """The tokens of a family, its settings, and what its template writes for an image."""

    tokens: list[str]
    config: dict[str, Any]
    images: dict[str, Any]
    processor: dict[str, Any]
    shown: str
    template: str = TEMPLATE


def _qwen(kind: str) -> Family:
    encoder: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2}
    text = {**TEXT, "rope_parameters": ROPE}
    if kind == "qwen2_vl":
        encoder |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    else:
        encoder |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32}
    if kind == "qwen2_5_vl":
        encoder |= {"window_size": 56, "fullatt_block_indexes": [1]}
    if kind == "qwen3_vl":
        encoder |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
        text["rope_parameters"] = {**ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    else:
        del text["head_dim"]
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = {"text_config": text, "vision_config": encoder, **{name: index for index, name in enumerate(names)}}
    return Family(QWEN_TOKENS, config, QWEN_PROCESSOR, {}, QWEN_IMAGE)


FAMILIES = {
    **{kind: _qwen(kind) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    "llava": Family(
        ["<image>"],
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**ENCODER, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14},
            "image_token_index": 0,
            "vision_feature_layer": -1,
        },
        CLIP_PROCESSOR,
        {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "<image>",
        PARTS_ALONE,
    ),
    "gemma3": Family(
        ["<image_soft_token>", "<start_of_image>", "<end_of_image>"],
        {
            "text_config": {**TEXT, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "vision_config": {**ENCODER, "image_size": 56, "patch_size": 14},
            "mm_tokens_per_image": 4,
            "image_token_index": 0,
            "boi_token_index": 1,
            "eoi_token_index": 2,
        },
        GEMMA_PROCESSOR,
        {"image_seq_length": 4},
        "<start_of_image>",
    ),
    "idefics3": Family(
        ["<image>", "<fake_token_around_image>", "<global-img>"],
        {
            "text_config": {**TEXT, "model_type": "llama"},
            "vision_config": {**ENCODER, "image_size": 56, "patch_size": 14},
            "image_token_id": 0,
            "scale_factor": 2,
        },
        {
            "image_processor_type": "Idefics3ImageProcessor",
            "size": {"longest_edge": 112},
            "max_image_size": {"longest_edge": 56},
        },
        {"image_seq_len": 4},
        "<image>",
    ),
}
NAMED = {
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"},
    "idefics3": {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<|im_end|>",
    },
}


def tokenizer_for(kind: str) -> Any:
    """Every byte is a token; the first ids are those of images, which free slots have too."""
    family = FAMILIES[kind]
    special = [*family.tokens, "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        extra_special_tokens=NAMED.get(kind, {}),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[:-1]}, replace_extra_special_tokens=False)
    tokenizer.chat_template = family.template.replace("IMAGE", family.shown)
    return tokenizer


def save_vision_model(path: Path, kind: str, *, seed: int = 0, images: dict[str, Any] | None = None) -> str:
    """A random model of the family with its processor. `images`: other settings of the processor."""
    family, tokenizer = FAMILIES[kind], tokenizer_for(kind)
    settings = {**family.config, "text_config": {**family.config["text_config"], "vocab_size": len(tokenizer)}}
    config = AutoConfig.for_model(kind, **settings, eos_token_id=tokenizer.eos_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        for name, value in model.named_parameters():
            if "projection_weight" in name:
                # Gemma's begins at 0, and images would say nothing
                torch.nn.init.normal_(value, std=0.1)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(family.images | (images or {})))
    named = {"processor_class": PROCESSOR_MAPPING_NAMES[kind], **family.processor}
    (path / "processor_config.json").write_text(json.dumps(named))
    return str(path)


def draw_image(path: Path, size: tuple[int, int], colour: str) -> Image:
    """A picture that differs from others."""
    picture = Pillow.new("RGB", size, "white")
    ImageDraw.Draw(picture).ellipse((4, 4, size[0] // 2, size[1] // 2), fill=colour)
    picture.save(path)
    return Image(str(path))


def write_rows(folder: Path, sizes: Sequence[tuple[int, int]] = ((96, 64), (64, 96), (120, 40), (56, 56))) -> Path:
    """A file of questions about pictures, with answers of one word."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, size in enumerate(sizes):
        colour = ("red", "blue", "green", "black")[number % 4]
        draw_image(folder / f"{number}.png", size, colour)
        rows.append({"question": f"Colour {number}?", "image": f"{number}.png", "answer": colour})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
