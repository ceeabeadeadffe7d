"""Turns conversations into token ids and back: the only place that knows chat templates."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from understudy.errors import DataError, RecipeError, TemplateError
from understudy.lazy import Tensor, torch
from understudy.models.vocabulary import tokenizer_ends
from understudy.types import Message, Prompt, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Said = Mapping[str, Any]
"""A message as chat templates take it: role and content."""
SHOWN_CHARS = 60
_SLOT = "\ue000{}\ue001"
"""Stands for untrusted text while a template is rendered: private characters, which no template writes itself."""
_SLOTS = re.compile("\ue000([0-9]+)\ue001")
_QUESTION: Said = {"role": "user", "content": "1"}
_THINK, _END_THINK = "<think>", "</think>"
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|\Z)", re.DOTALL)
"""As Hermes and Qwen models write calls; a call that is cut off ends with the text."""


class Renderer:
    """A tokenizer with its chat template and the settings of the template (`enable_thinking` of Qwen3).

    `stop_ids`: tokens that end a response; None: those that the tokenizer names. The special token by which the template
    ends a turn is added to them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any] | None = None,
        stop_ids: Iterable[int] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self._special = {index: str(token) for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        # `split_special_tokens` is set on the tokenizer itself, which the threads of all episodes share
        self._lock = Lock()
        self._shown_roles: set[tuple[str, ...]] = set()
        ends = tokenizer_ends(tokenizer) if stop_ids is None else set(stop_ids)
        self.stop_ids: tuple[int, ...] = tuple(sorted(ends | self._terminator()))

    @property
    def special_ids(self) -> set[int]:
        """Tokens that no text may spell."""
        return set(self._special)

    @property
    def has_template(self) -> bool:
        """Whether messages can be rendered; without a chat template everything is plain text."""
        return bool(self.tokenizer.chat_template)

    def start(self, prompt: Prompt) -> Tensor:
        """Messages through the chat template, up to where the student's turn begins; text as the tokenizer encodes it. [P]

        An EOS that a tokenizer adds by itself is taken off: the response follows. Raises RecipeError for a chat without a
        template, DataError for messages that the template refuses, text that the tokenizer cannot encode, and a prompt of
        no tokens.
        """
        if prompt.messages is None:
            ids = self._encode_plain(prompt.text or "")
        elif not self.has_template:
            raise RecipeError(
                f"the tokenizer {self.tokenizer.name_or_path or 'of the student'} has no chat template, and prompt "
                f"{prompt.id} is a chat; set task.chat to false, or use a model with a template"
            )
        else:
            ids = self._encode(self._template(prompt, prompt.messages))
        if not ids:
            raise DataError(f"prompt {prompt.id} has no tokens; a response needs at least one to follow")
        return torch.tensor(ids, dtype=torch.int64)

    def append(self, ids: Tensor, prompt: Prompt, said: Sequence[Said]) -> Tensor:
        """`ids` [L], kept as they are, then what stands between the student's last message and its next turn. [L + A]

        `said`: all messages since the prompt; those after the student's last one are new. Through a template that is the
        end of the student's turn, unless the student wrote it, the new messages, and the beginning of a turn; after a
        prompt of plain text it is the contents of the new messages. A special token that a new message spells out is
        encoded as plain characters. Raises TemplateError for a template that leaves a new message out, and for one that
        changes what was said before: the student would be trained on a context that no later turn has; DataError for
        messages that cannot be encoded.
        """
        last = max(index for index, message in enumerate(said) if message["role"] == "assistant")
        new = said[last + 1 :]
        contents = [str(message["content"]) for message in new]
        if prompt.messages is None:
            added = [index for content in contents for index in self._encode_untrusted(content)]
        else:
            self._check_shown(prompt, said[: last + 1], new)
            added = self._encode_around(lambda texts: self._between(prompt, said[: last + 1], new, texts), contents)
            if added[:1] == ids[-1:].tolist() and added[0] in self.stop_ids:
                added = added[1:]
        return torch.cat([ids, torch.tensor(added, dtype=torch.int64)])

    def read(self, ids: Tensor) -> Message:
        """The student's message in the tokens of one turn [R]. A tool call that cannot be parsed is kept with its error."""
        ended = ids.numel() > 0 and int(ids[-1]) in self.stop_ids
        text = self.decode(ids[:-1] if ended else ids)
        reasoning, content = self._split_reasoning(text)
        calls = tuple(_parse_call(match) for match in _TOOL_CALL.finditer(content))
        return Message(text, _TOOL_CALL.sub("", content).strip() if calls else content, reasoning, calls, ended)

    def decode(self, ids: Tensor) -> str:
        """The text without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def response(self, text: str) -> Tensor:
        """The text without special tokens around it, then the EOS that ends it. [R]

        A text that spells the EOS out at its end gets no second one. Raises DataError if it cannot be encoded.
        """
        ids, eos_id = self._encode(text), self.tokenizer.eos_token_id
        return torch.tensor(ids if ids[-1:] == [eos_id] else [*ids, eos_id], dtype=torch.int64)

    def faithful(self, text: str) -> Tensor | None:
        """The text, then EOS [F]; None where the text would not come back from its tokens, or is empty.

        Special tokens that the text spells out are read as plain characters, but for an EOS at its end. A change by the
        tokenizer's own normaliser, and white space that it does not keep, do not count.
        """
        tokenizer, eos_id = self.tokenizer, self.tokenizer.eos_token_id
        text = text.removesuffix(str(tokenizer.eos_token))
        if not text.strip():
            return None
        try:
            ids = self._encode(text, split_special_tokens=True)
        except DataError:
            return None
        if not ids or tokenizer.unk_token_id in ids or eos_id in ids:
            return None
        back = str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        if back != text and self._normalised(back) != self._normalised(text):
            return None
        return torch.tensor([*ids, eos_id], dtype=torch.int64)

    def ask(self, wording: Callable[[Sequence[str]], str], untrusted: Sequence[str], ending: str = "") -> list[int]:
        """Ids of a user's message `wording(untrusted)` up to the answer, which `ending` begins; plain text without a template.

        Special tokens that the untrusted texts spell out are encoded as plain characters. Raises DataError.
        """
        return self._encode_around(lambda texts: self.question(wording(texts)) + ending, untrusted, begins=True)

    def question(self, text: str) -> str:
        """`text` as a user's message up to where the answer begins; the text itself without a chat template."""
        message = {"role": "user", "content": text}
        return self._template(Prompt("question"), [message]) if self.has_template else text

    def encode_question(self, text: str) -> list[int]:
        """Ids of what `question` returns, with the special tokens that a tokenizer puts before a plain text."""
        return self._encode(text) if self.has_template else self._encode_plain(text)

    def _template(self, prompt: Prompt, messages: Sequence[Said], *, opened: bool = True) -> str:
        """`opened`: up to where the student's next turn begins."""
        tools = {} if prompt.tools is None else {"tools": [dict(tool) for tool in prompt.tools]}
        options = self.template_kwargs | tools | {"tokenize": False, "add_generation_prompt": opened}
        try:
            return str(self.tokenizer.apply_chat_template([dict(message) for message in messages], **options))
        except Exception as error:  # a template raises whatever it likes
            raise TemplateError(f"the chat template refuses prompt {prompt.id}: {error}") from error

    def _check_shown(self, prompt: Prompt, before: Sequence[Said], new: Sequence[Said]) -> None:
        """Raises TemplateError for a message that the template leaves out, as many do with a role that they do not know."""
        roles = tuple(message["role"] for message in new)
        if roles in self._shown_roles:
            return
        slots = [_SLOT.format(index) for index in range(len(new))]
        shown = self._between(prompt, before, new, slots)
        for role, slot in zip(roles, slots, strict=True):
            if slot not in shown:
                raise TemplateError(
                    f"the chat template leaves a message of role {role!r} out, so the student would not read what its "
                    "environment says: give the message another role, or change chat_template in the tokenizer's configuration"
                )
        self._shown_roles.add(roles)

    def _between(self, prompt: Prompt, before: Sequence[Said], new: Sequence[Said], contents: Sequence[str]) -> str:
        """Text from the student's last message, the last of `before`, up to its next turn."""
        # stand-ins for the student's messages, whose own white space a template may well change
        told = [*(prompt.messages or ()), *map(_stand_in, before)]
        known = self._template(prompt, told[:-1]) + str(told[-1]["content"])
        filled = [{**message, "content": content} for message, content in zip(new, contents, strict=True)]
        whole = self._template(prompt, [*told, *filled])
        if not whole.startswith(known):
            follows = f"a message of role {new[0]['role']!r}" if new else "another turn"
            at = next(i for i, (one, other) in enumerate(zip(known, whole + "\0", strict=False)) if one != other)
            raise TemplateError(
                f"the chat template rewrites the student's earlier turns when {follows} follows: "
                f"{known[max(0, at - SHOWN_CHARS) :]!r} became {whole[max(0, at - SHOWN_CHARS) :][: 2 * SHOWN_CHARS]!r}. "
                "Several turns need a template that leaves them as they are (Qwen3's drops <think> blocks): change "
                "chat_template in the tokenizer's configuration"
            )
        return whole[len(known) :]

    def _terminator(self) -> set[int]:
        """The special token by which the template ends a student's turn, if it has one."""
        if not self.has_template:
            return set()
        try:
            text = self._template(Prompt("probe"), [_QUESTION, _stand_in({"role": "assistant"})], opened=False)
            _, found, rest = text.rpartition(str(_stand_in({"role": "assistant"})["content"]))
            ids = self._encode(rest) if found else []
        except DataError:
            return set()
        return {*ids[:1]} & self._special.keys()

    @cached_property
    def _opens_thinking(self) -> bool:
        """Whether the template itself writes the <think> of the student's turn."""
        try:
            return self.question("1").rstrip().endswith(_THINK)
        except DataError:
            return False

    def _split_reasoning(self, text: str) -> tuple[str | None, str]:
        """Reasoning, None where the template has no thinking mode or nothing was thought, and what follows it."""
        if _END_THINK not in str(self.tokenizer.chat_template):
            return None, text
        if _END_THINK not in text and not self._opens_thinking and not text.lstrip().startswith(_THINK):
            return None, text
        thought, _, rest = text.partition(_END_THINK)
        return thought.lstrip().removeprefix(_THINK).strip("\n"), rest.lstrip("\n")

    def _encode_around(
        self, render: Callable[[Sequence[str]], str], untrusted: Sequence[str], *, begins: bool = False
    ) -> list[int]:
        """Ids of `render(untrusted)`, a special token being one only in what `render` itself writes."""
        encode = self.encode_question if begins else self._encode
        together = "".join(untrusted)
        if not any(token in together for token in self._special.values()):
            return encode(render(untrusted))
        first, *rest = _SLOTS.split(render([_SLOT.format(index) for index in range(len(untrusted))]))
        ids = encode(first)
        for index, trusted in zip(rest[::2], rest[1::2], strict=True):
            ids += self._encode_untrusted(untrusted[int(index)])
            ids += self._encode(trusted)
        return ids

    def _encode_untrusted(self, text: str) -> list[int]:
        ids = self._encode(text, split_special_tokens=True)
        found = self._special.keys() & set(ids)
        if found:
            raise DataError(f"the text spells {self._special[min(found)]!r}, which the tokenizer cannot keep as text")
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        """With the special tokens that the tokenizer adds by itself, but an EOS at the end."""
        if self.tokenizer.num_special_tokens_to_add() == 0:
            return self._encode(text)
        ids, plain = self._encode(text, add_special_tokens=True), self._encode(text)
        closes_itself = ids[-1:] == [self.tokenizer.eos_token_id] and plain[-1:] != ids[-1:] and len(ids) > 1
        return ids[:-1] if closes_itself else ids

    def _encode(self, text: str, **options: bool) -> list[int]:
        try:
            with self._lock:
                return list(self.tokenizer(text, **({"add_special_tokens": False} | options))["input_ids"])
        except Exception as error:  # what `tokenizers` raises has no type of its own
            raise DataError(f"the tokenizer cannot encode {text[:SHOWN_CHARS]!r}: {error}") from error

    def _normalised(self, text: str) -> str:
        normaliser = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return "".join((text if normaliser is None else normaliser.normalize_str(text)).split())


def _stand_in(message: Said) -> Said:
    """The student's message with other words and the same parts, written as templates write them."""
    if message["role"] != "assistant":
        return message
    before, found, _ = str(message.get("content", "")).partition(_END_THINK)
    thought = f"1\n{_END_THINK}\n\n" if found else ""
    return {"role": "assistant", "content": (f"{_THINK}\n" if _THINK in before else "") + thought + "2"}


def _parse_call(match: re.Match[str]) -> ToolCall:
    text = match[1].strip()
    if not match[2]:
        return ToolCall(text, error="the call is not closed by </tool_call>")
    try:
        call = json.loads(text)
    except ValueError as error:
        return ToolCall(text, error=f"the call is no JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return ToolCall(text, error="the call has no name")
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return ToolCall(text, call["name"], error="the arguments are no JSON object")
    return ToolCall(text, call["name"], arguments)
