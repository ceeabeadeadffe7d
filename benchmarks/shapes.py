"""Models of random weights and a given shape, whose responses are noise of a chosen length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import logging

from understudy.models import build_causal_lm, save_hf


def words(size: int) -> Any:
    """A tokenizer with a token for each of the words t0, t1, ...; the last token ends a text."""
    tokens = {f"t{index}": index for index in range(size - 1)} | {"</s>": size - 1}
    inner = Tokenizer(models.WordLevel(tokens, unk_token="t0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="t0")


def save_model(
    folder: Path, shape: dict[str, Any], tokenizer: Any, *, seed: int = 0, end_logit: float = -200.0
) -> None:
    """A model in float32 with its tokenizer. EOS has the logit `end_logit`, others are near 0: by default no response ends."""
    logging.disable_progress_bar()
    model = build_causal_lm(
        {"architecture": "llama"} | shape,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        seed=seed,
    )
    with torch.no_grad():
        # all embeddings, and so the hidden states, lean one way, which the row of EOS reads
        model.get_input_embeddings().weight.add_(0.1)
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = end_logit / model.config.hidden_size
    save_hf(model, tokenizer, folder)
