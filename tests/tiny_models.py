"""Models and tokenizers small enough for every test, and samples made by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from understudy.models import build_causal_lm
from understudy.packing import attach_scores
from understudy.types import Author, Finish, Prompt, Request, Sample, Scores

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama"},
    "qwen3": {"architecture": "qwen3", "num_kv_heads": 2, "tie_word_embeddings": True},
    "gemma2": {"architecture": "gemma2", "final_logit_softcapping": 0.05, "sliding_window": 4},
    "gemma3": {"architecture": "gemma3_text", "sliding_window": 4},
    "cohere": {"architecture": "cohere", "logit_scale": 0.25},
    "gpt2": {"architecture": "gpt2"},
}
ROUNDING = 1e-12
"""float64: another order of sums."""
IN_FLOAT32 = 1e-6
"""A softmax or a norm in float32 on the way, whatever the weights are in."""
BUDGET = dict.fromkeys(ARCHITECTURES, ROUNDING) | {"gemma2": IN_FLOAT32}
"""How far two routes through a float64 model may be apart: its coarsest arithmetic says, not its weights. The softmax of
Gemma 2's attention is in float32."""
NUM_ROWS = 40
EOS = 1


def tiny(
    name: str = "llama", dtype: str = "float64", num_rows: int = NUM_ROWS, sharp: float = 1.0, **extra: Any
) -> Any:
    """A model with `num_rows` rows of embedding and head; `sharp` scales its head, so that rows are far from uniform."""
    model = build_causal_lm(
        SIZES | ARCHITECTURES[name] | extra, vocab_size=num_rows, eos_token_id=EOS, pad_token_id=0, dtype=dtype
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(sharp)
    return model


def letters(num_tokens: int = NUM_ROWS) -> Any:
    """A tokenizer of "<unk>", "</s>" and single characters."""
    vocabulary = {"<unk>": 0, "</s>": EOS} | {chr(ord("A") + index): index + 2 for index in range(num_tokens - 2)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def request(name: str, ids: Sequence[int], index: int = 0, prefix: Sequence[int] | None = None) -> Request:
    given = None if prefix is None else torch.tensor(prefix, dtype=torch.int64)
    return Request(Prompt(id=name), index, torch.tensor(ids), given)


def sample(
    name: str,
    prompt: Sequence[int],
    response: Sequence[int],
    *,
    author: Author | Sequence[int] = Author.STUDENT,
    rollout_logprob: Tensor | None = None,
    finish: Finish = "stop",
) -> Sample:
    """`author`: of the response; one for all tokens, or one each."""
    wrote = [int(author)] * len(response) if isinstance(author, Author) else list(author)
    return Sample(
        prompt=Prompt(id=name),
        index=0,
        token_ids=torch.tensor([*prompt, *response], dtype=torch.int64),
        author=torch.tensor([0] * len(prompt) + wrote, dtype=torch.uint8),
        prompt_length=len(prompt),
        finish=finish,
        text="",
        rollout_logprob=rollout_logprob,
    )


def scored(samples: Sequence[Sample], scores: Sequence[Scores]) -> list[Sample]:
    """The samples with their scores; a missing one is an error."""
    return [one for one in attach_scores(samples, scores, "error") if one is not None]


@torch.no_grad()
def plain_logp(model: Any, ids: Tensor, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """Log-softmax at the response positions of one sequence, by the model's own forward without a cache. [L - 1, V]."""
    logits = model(input_ids=ids[None, :-1], use_cache=False).logits[0, :, :vocab_size]
    return (logits / temperature).log_softmax(-1)
