"""Prompts and solutions as token ids, through a tokenizer of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from understudy.errors import DataError, RecipeError
from understudy.types import Author, Prompt, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rendered = tuple[Prompt, Tensor]
"""A prompt and its token ids [P]."""
SHOWN_CHARS = 60


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template_kwargs: Mapping[str, Any] | None = None
) -> Tensor:
    """Messages through the chat template, up to where the assistant begins; text as the tokenizer encodes it. Shape [P].

    `template_kwargs` go to the template (`enable_thinking` of Qwen3). A trailing EOS that a tokenizer adds by itself is
    taken off: the response follows. Raises RecipeError for a chat without a template, DataError for messages that the
    template refuses, text that the tokenizer cannot encode, and a prompt of no tokens.
    """
    if prompt.messages is None:
        ids = _encode_text(tokenizer, prompt.text or "")
    else:
        ids = _encode(tokenizer, _render_chat(tokenizer, prompt, template_kwargs or {}), special=False)
    if not ids:
        raise DataError(f"prompt {prompt.id} has no tokens; a response needs at least one to follow")
    return torch.tensor(ids, dtype=torch.int64)


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    try:
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])
    except Exception as error:  # what `tokenizers` raises has no type of its own
        raise DataError(f"the tokenizer cannot encode {text[:SHOWN_CHARS]!r}: {error}") from error


def _encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if tokenizer.num_special_tokens_to_add() == 0:
        return _encode(tokenizer, text, special=False)
    ids, plain = _encode(tokenizer, text, special=True), _encode(tokenizer, text, special=False)
    closes_itself = ids[-1:] == [tokenizer.eos_token_id] and plain[-1:] != ids[-1:] and len(ids) > 1
    return ids[:-1] if closes_itself else ids


def _render_chat(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, template_kwargs: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise RecipeError(
            f"the tokenizer {tokenizer.name_or_path or 'of the student'} has no chat template, and prompt {prompt.id} is "
            "a chat; set task.chat to false, or use a model with a template"
        )
    messages = [dict(message) for message in prompt.messages or ()]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template_kwargs)
    except TemplateError as error:
        raise DataError(f"the chat template refuses prompt {prompt.id}: {error}") from error
    return str(text)


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str, eos_id: int) -> Tensor:
    """The text without special tokens around it, then the EOS that ends it. Shape [R].

    A text that spells the EOS out at its end gets no second one. Raises DataError if it cannot be encoded.
    """
    ids = _encode(tokenizer, text, special=False)
    return torch.tensor(ids if ids[-1:] == [eos_id] else [*ids, eos_id], dtype=torch.int64)


def solution_sample(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    index: int,
    eos_id: int,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Sample:
    """The prompt's own solution as a sample to imitate: finish "data", written by the teacher, ended by EOS.

    Raises DataError if the prompt has none, and as `encode_prompt`.
    """
    if prompt.solution is None:
        raise DataError(f"prompt {prompt.id} has no solution to imitate; set task.solution_field, or another method")
    prompt_ids = encode_prompt(tokenizer, prompt, template_kwargs)
    response_ids = encode_response(tokenizer, prompt.solution, eos_id)
    author = torch.full((len(prompt_ids) + len(response_ids),), Author.PROMPT, dtype=torch.uint8)
    author[len(prompt_ids) :] = Author.TEACHER
    return Sample(
        prompt=prompt,
        index=index,
        token_ids=torch.cat([prompt_ids, response_ids]),
        author=author,
        prompt_length=len(prompt_ids),
        finish="data",
        text=prompt.solution,
        teacher=prompt.teacher,
    )


def split_by_length(rendered: Iterable[Rendered], max_prompt_tokens: int) -> tuple[list[Rendered], list[Prompt]]:
    """Those that fit, in their order, and the prompts that are too long, which the caller reports. Nothing is cut."""
    kept: list[Rendered] = []
    too_long: list[Prompt] = []
    for prompt, ids in rendered:
        if len(ids) <= max_prompt_tokens:
            kept.append((prompt, ids))
        else:
            too_long.append(prompt)
    return kept, too_long
