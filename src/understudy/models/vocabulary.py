"""Tokenizers: load them, find the tokens that end a response, compare two vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from understudy import given
from understudy.errors import RecipeError, VocabularyError
from understudy.lazy import importing, nn
from understudy.models.backbone import unwrap
from understudy.models.files import locate, read_settings, said_by

TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")
"""End a turn wherever the chat template writes them (Qwen and other ChatML, Llama 3, Gemma)."""
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>")
"""End a document in every tokenizer that has them as special tokens."""
_SHOWN = 5


def load_tokenizer(path_or_name: str, *, revision: str | None = None) -> Any:
    """A Hugging Face tokenizer. Raises RecipeError where none can be loaded."""
    with importing():
        from transformers import AutoTokenizer

    if (pair := given.find(path_or_name)) is not None:
        return pair[1]
    source, offline = locate(path_or_name)
    try:
        return AutoTokenizer.from_pretrained(
            source, config=_plain_config(source), revision=revision or "main", trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        there = {
            name: (Path(source) / name).is_file() for name in ("vocab.json", "merges.txt", "tokenizer_config.json")
        }
        if list(there.values()) == [True, True, False]:
            raise RecipeError(
                f"{path_or_name!r} has vocab.json and merges.txt, but no tokenizer_config.json that says which tokenizer they "
                "are of; load them with their class and write the rest with `save_pretrained`, such as "
                f"GPT2TokenizerFast.from_pretrained({path_or_name!r}).save_pretrained({path_or_name!r})"
            ) from error
        raise RecipeError(f"cannot load a tokenizer from {path_or_name!r}: {said_by(error, offline)}") from error


def _plain_config(folder: str) -> Any:
    """The settings in config.json without the class of their model, whose import takes a second and a half.

    None where the tokenizer's own settings do not name its class: AutoTokenizer then takes that of the model's.
    """
    from transformers import PreTrainedConfig

    named, settings = (read_settings(Path(folder) / name) for name in ("tokenizer_config.json", "config.json"))
    if not named.get("tokenizer_class") or "auto_map" in named or not settings:
        return None
    config = PreTrainedConfig(name_or_path=folder)
    config.model_type = settings.get("model_type", "")
    return config


def stop_ids(tokenizer: Any, model: nn.Module) -> tuple[int, ...]:
    """All tokens that end a response, ascending: EOS of tokenizer, model and generation settings, and ends of turns.

    Raises VocabularyError where there is none: responses would never end by themselves.
    """
    base, found = unwrap(model), tokenizer_ends(tokenizer)
    for owner in (base.config, base.config.get_text_config(), getattr(base, "generation_config", None)):
        found |= named_ids(getattr(owner, "eos_token_id", None))
    if not found:
        raise VocabularyError(
            "no EOS: neither the tokenizer nor the model names a token that ends a response; set eos_token in the "
            "tokenizer's configuration"
        )
    return tuple(sorted(found))


def saved_ends(model: str) -> set[int]:
    """The tokens that end a response as far as the configurations in a model's directory say; none for a hub name."""
    found = set[int]()
    for name in ("config.json", "generation_config.json"):
        found |= named_ids(read_settings(Path(model).expanduser() / name).get("eos_token_id"))
    return found


def tokenizer_ends(tokenizer: Any) -> set[int]:
    """The tokens that end a response as far as the tokenizer says: its EOS, ends of turns and of documents."""
    special = {str(token): index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    template = str(tokenizer.chat_template or "")
    ends = {special[token] for token in TURN_ENDS if token in special and token in template}
    return named_ids(tokenizer.eos_token_id) | ends | {special[token] for token in TEXT_ENDS if token in special}


def named_ids(value: int | list[int | None] | None) -> set[int]:
    """The tokens of an `eos_token_id`; -1 and null in a list stand for none."""
    values = value if isinstance(value, list | tuple) else [value]
    return {index for index in values if index is not None and index >= 0}


def vocabulary_size(tokenizer: Any) -> int:
    """The highest id, plus one; rows of an embedding from there on are padding."""
    return int(max(tokenizer.get_vocab().values())) + 1


def compare_vocabularies(student_tokenizer: Any, teacher_tokenizer: Any) -> dict[int, str]:
    """The tokens that the teacher has and the student has not, by id; empty where the two have the same.

    Raises VocabularyError that names the first of the student's tokens that are not the teacher's.
    """
    student, teacher = (
        {int(index): str(token) for token, index in tokenizer.get_vocab().items()}
        for tokenizer in (student_tokenizer, teacher_tokenizer)
    )
    differing = sorted(index for index, token in student.items() if teacher.get(index) != token)
    if differing:
        shown = "; ".join(
            f"{index} is {student[index]!r} for the student and {_show(teacher.get(index))} for the teacher"
            for index in differing[:_SHOWN]
        )
        raise VocabularyError(
            f"the tokenizers differ in {len(differing)} of the student's {len(student)} tokens: {shown}. Token scores only "
            "mean something where both read the same tokens: choose models of one family, or a teacher that has all of the "
            "student's tokens"
        )
    return {index: token for index, token in sorted(teacher.items()) if index not in student}


def name_tokens(tokens: Mapping[int, str]) -> str:
    """The first of some tokens with their ids."""
    shown = ", ".join(f"{token!r} ({index})" for index, token in list(tokens.items())[:_SHOWN])
    return f"{shown}, ..." if len(tokens) > _SHOWN else shown


def _show(token: str | None) -> str:
    return "absent" if token is None else repr(token)
