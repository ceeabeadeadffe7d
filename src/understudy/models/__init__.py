"""Causal language models and tokenizers of the Hugging Face kind: load, build, run without a head, compare, save."""

from __future__ import annotations

from understudy.models.backbone import (
    backbone_hidden,
    disable_dropout,
    enable_gradient_checkpointing,
    lm_head,
    num_positions,
    positions_of,
    probe_head,
    row_style,
    unwrap,
)
from understudy.models.load import (
    DType,
    apply_lora,
    build_causal_lm,
    check_attention,
    check_build,
    check_lora_targets,
    check_model_dir,
    config_on_disk,
    drop_layers,
    has_bfloat16,
    load_causal_lm,
    positions_on_disk,
    read_back,
    save_hf,
)
from understudy.models.vocabulary import compare_vocabularies, load_tokenizer, name_tokens, stop_ids, vocabulary_size

__all__ = [
    "DType",
    "apply_lora",
    "backbone_hidden",
    "build_causal_lm",
    "check_attention",
    "check_build",
    "check_lora_targets",
    "check_model_dir",
    "compare_vocabularies",
    "config_on_disk",
    "disable_dropout",
    "drop_layers",
    "enable_gradient_checkpointing",
    "has_bfloat16",
    "lm_head",
    "load_causal_lm",
    "load_tokenizer",
    "name_tokens",
    "num_positions",
    "positions_of",
    "positions_on_disk",
    "probe_head",
    "read_back",
    "row_style",
    "save_hf",
    "stop_ids",
    "unwrap",
    "vocabulary_size",
]
