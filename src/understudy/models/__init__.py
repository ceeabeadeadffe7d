"""Causal language models and tokenizers of the Hugging Face kind: load, build, run without a head, compare, save."""

from __future__ import annotations

from understudy.models.backbone import (
    backbone_hidden,
    compile_blocks,
    disable_dropout,
    enable_gradient_checkpointing,
    freeze_vision,
    lm_head,
    num_positions,
    probe_head,
    probe_images,
    row_style,
    unwrap,
    vision_of,
)
from understudy.models.build import build_causal_lm, check_build
from understudy.models.files import check_model_dir, config_on_disk, fingerprint_files, positions_of, positions_on_disk
from understudy.models.load import (
    DType,
    check_attention,
    drop_layers,
    has_bfloat16,
    load_causal_lm,
    read_back,
    save_hf,
)
from understudy.models.lora import apply_lora, check_lora_targets
from understudy.models.vision import Vision, load_vision, open_image
from understudy.models.vocabulary import compare_vocabularies, load_tokenizer, name_tokens, stop_ids, vocabulary_size

__all__ = [
    "DType",
    "Vision",
    "apply_lora",
    "backbone_hidden",
    "build_causal_lm",
    "check_attention",
    "check_build",
    "check_lora_targets",
    "check_model_dir",
    "compare_vocabularies",
    "compile_blocks",
    "config_on_disk",
    "disable_dropout",
    "drop_layers",
    "enable_gradient_checkpointing",
    "fingerprint_files",
    "freeze_vision",
    "has_bfloat16",
    "lm_head",
    "load_causal_lm",
    "load_tokenizer",
    "load_vision",
    "name_tokens",
    "num_positions",
    "open_image",
    "positions_of",
    "positions_on_disk",
    "probe_head",
    "probe_images",
    "read_back",
    "row_style",
    "save_hf",
    "stop_ids",
    "unwrap",
    "vision_of",
    "vocabulary_size",
]
