"""Turns conversations into token ids and back; the only module that uses chat templates."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from itertools import product
from os.path import commonprefix
from string import ascii_letters
from typing import TYPE_CHECKING, Any, Literal

from understudy.errors import DataError, RecipeError, RewriteError, TemplateError, VocabularyError
from understudy.lazy import Tensor, torch
from understudy.models.vocabulary import tokenizer_ends
from understudy.tasks.encoding import SHOWN_CHARS, SLOT, Encoder, Untrusted, fill
from understudy.tasks.tool_calls import CallFormat, Tools, call_format, parse_tag
from understudy.types import IMAGE, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from understudy.models import Vision

Said = Mapping[str, Any]
"""A message as chat templates take it: role and content."""
OnRewrite = Literal["refuse", "cut"]
"""An episode in which the chat template rewrites earlier turns ends there, or raises an error."""
_QUESTION, _ANSWER, _NEXT = "1029384756", "5647382910", "9182736450"
"""Contents of a conversation that shows what a template writes around them."""
_THINK, _END_THINK = "<think>", "</think>"
_CLOCK, _PERCENT = "strftime_now", "\ue002"
"""The function by which templates read the clock, and what stands for a percent sign in its formats."""
_MAX_CHARACTER_TOKENS = 4
"""Bytes of the longest character, each of which may be a token."""
_CALL_OPTIONS = frozenset(
    (
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "tokenize",
        "tokenizer_kwargs",
        "truncation",
    )
)
"""Arguments of `apply_chat_template` itself, which no template reads."""
_EMPTY_BLOCK = re.compile(r"[<[]\|?(?:START_)?([\w:]+?)\|?[>\]]\w*\s*[<[]\|?/?(?:END_)?\1\|?[>\]]\s*\Z")
"""A block of reasoning without any, at the end of a text: `<|channel>thought\\n<channel|>` of Gemma 4, `[THINK][/THINK]`."""
_IMAGES = re.compile(f"({IMAGE})")


def now() -> str:
    """The date and time, as ISO 8601 writes them, to the second."""
    return datetime.now().isoformat(timespec="seconds")


@dataclass(frozen=True)
class TurnEnd:
    """How a response ends: in a chat as its template ends a turn of the assistant, else with EOS."""

    token_id: int
    text: str = ""
    """From the end of the content to the token itself, which is the last of it; empty for an EOS that no template writes."""
    rest: str = ""
    """Everything that the template writes after the last turn of a conversation."""


class Renderer:
    """A tokenizer with its chat template and the settings of the template (`enable_thinking` of Qwen3).

    `stop_ids`: tokens that end a response; None: those that the tokenizer names. The token by which the template ends a
    turn is added to them. `date`: the date and time (ISO 8601) that a template reads from its clock; None: now. `vision`: the
    model's processor of images, for prompts that have some. `on_rewrite`: for `environments.play`.
    Raises RecipeError for settings that are no template's: its arguments of messages and of tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any] | None = None,
        stop_ids: Iterable[int] | None = None,
        date: str | None = None,
        vision: Vision | None = None,
        on_rewrite: OnRewrite = "refuse",
    ) -> None:
        self.tokenizer = tokenizer
        self.vision = vision
        self.on_rewrite = on_rewrite
        self.template_kwargs = dict(template_kwargs or {})
        if foreign := sorted(self.template_kwargs.keys() & _CALL_OPTIONS):
            raise RecipeError(
                f"template_kwargs has {', '.join(foreign)}, which no template reads: take it out; the template itself is "
                "chat_template in the tokenizer's configuration"
            )
        self.date = date or now()
        self._text = Encoder(tokenizer)
        self._shown_roles: set[tuple[str, ...]] = set()
        ends = tokenizer_ends(tokenizer) if stop_ids is None else set(stop_ids)
        self.plain_end = TurnEnd(tokenizer.eos_token_id)
        self.turn_end = self._find_end(ends) if self.has_template else self.plain_end
        self.stop_ids: tuple[int, ...] = tuple(sorted(ends | {self.turn_end.token_id} - {None}))
        self.notes: dict[str, None] = {}
        """Sentences on responses that the template would not write as the student samples them."""

    @property
    def special_ids(self) -> set[int]:
        """Tokens that no text may spell."""
        return set(self._text.special)

    @property
    def has_template(self) -> bool:
        """Whether messages can be rendered; without a chat template everything is plain text."""
        return bool(self.tokenizer.chat_template)

    def like(self, tokenizer: PreTrainedTokenizerBase) -> Renderer:
        """A renderer for another tokenizer of the same tokens: the same settings, clock, and tokens that may end a turn."""
        ends = {*tokenizer_ends(tokenizer), *self.stop_ids}
        return Renderer(tokenizer, self.template_kwargs, ends, date=self.date, vision=self.vision)

    @property
    def settings(self) -> list[Any]:
        """Everything besides the tokenizer that determines how messages are rendered."""
        return [self.tokenizer.chat_template, self.template_kwargs, self.date if self.reads_clock else None]

    @property
    def reads_clock(self) -> bool:
        """Whether the template may write the date or the time."""
        return _CLOCK in str(self.tokenizer.chat_template)

    def start(self, prompt: Prompt) -> Tensor:
        """Messages through the chat template, up to where the student's turn begins; text as the tokenizer encodes it. [P]

        Special tokens that the prompt spells out stay text; what the template writes itself are tokens. An image is as many
        tokens as the model's processor makes of it. An EOS that a tokenizer adds by itself is taken off: the response follows.
        Raises RecipeError for a chat without a template, and for images without a processor; DataError for messages that the
        template refuses, text that the tokenizer cannot encode or keep as text, an image that cannot be read, and a prompt of
        no tokens.
        """
        if prompt.messages is None:
            ids = self._text.plain(prompt.text or "", prompt.quoted)
        elif not self.has_template:
            raise RecipeError(
                f"the tokenizer {self.tokenizer.name_or_path or 'of the student'} has no chat template, and prompt "
                f"{prompt.id} is a chat; set task.chat to false, or use a model with a template"
            )
        else:
            ids = self._encode_around(
                lambda parts: self._template(replace(prompt, tools=parts[1]), parts[0]),
                (prompt.messages, prompt.tools),
                prompt,
            )
        if not ids:
            raise DataError(f"prompt {prompt.id} has no tokens; a response needs at least one to follow")
        return torch.tensor(ids, dtype=torch.int64)

    def spells_control(self, prompt: Prompt) -> bool:
        """Whether the data of a prompt spells a token that only a template may write."""
        texts = (
            list(prompt.quoted or (prompt.text or "",)) if prompt.messages is None else [prompt.messages, prompt.tools]
        )
        return any(self._text.spells(str(text)) for text in texts)

    def unused(self, prompt: Prompt) -> list[str]:
        """Names what the chat template leaves out of a prompt: its tools, parts of messages, all messages of a role."""
        messages = prompt.messages
        if messages is None or not self.has_template:
            return ["tools"] if prompt.tools else []
        shown = self._template(prompt, messages)

        def is_unused(prompt: Prompt, messages: Sequence[Said]) -> bool:
            try:
                return self._template(prompt, messages) == shown
            except TemplateError:
                return False

        found = ["tools"] if prompt.tools and is_unused(replace(prompt, tools=None), messages) else []
        for key in dict.fromkeys(key for message in messages for key in message):
            # the id of a call says again which call a result belongs to
            if key not in ("role", "content", "tool_call_id"):
                bare = [{name: value for name, value in message.items() if name != key} for message in messages]
                found += [key] if is_unused(prompt, bare) else []
        for role in dict.fromkeys(message["role"] for message in messages):
            other = [
                {**message, "content": f"{_ANSWER}{message['content']}"} if message["role"] == role else message
                for message in messages
            ]
            found += [f"messages of role {role!r}"] if is_unused(prompt, other) else []
        return found

    def append(self, ids: Tensor, prompt: Prompt, said: Sequence[Said], *, inline: bool = False) -> Tensor:
        """`ids` [L], kept as they are, then what stands between the student's last message and its next turn. [L + A]

        `said`: all messages since the prompt; those after the student's last one are new. Through a template that is the
        end of the student's turn, unless the student wrote it, the new messages, and the beginning of a turn; after a
        prompt of plain text, and `inline`, it is the contents of the new messages. A special token that a new message spells
        out is encoded as plain characters. Raises TemplateError for a template that leaves a new message out, RewriteError for
        one that changes what was said before: the student would be trained on a context that no later turn has; DataError
        for messages that cannot be encoded. Thoughts that the student forgot to open or to close are no matter of the template.
        """
        last = max(index for index, message in enumerate(said) if message["role"] == "assistant")
        # `error` is for those who count, and no key of a message that a template knows
        new = [{key: value for key, value in message.items() if key != "error"} for message in said[last + 1 :]]
        contents = [str(message["content"]) for message in new]
        if inline or prompt.messages is None:
            added = [index for content in contents for index in self._text.untrusted(content)]
        else:
            self._check_shown(prompt, said[: last + 1], new)
            written = int(ids[-1])

            def between(contents: Sequence[str]) -> str:
                text = self._between(prompt, said[: last + 1], new, contents)
                before, end, rest = text.partition(self._text.marks.get(written, SLOT))
                lead = self.turn_end.text.removesuffix(end).strip() if written == self.turn_end.token_id else ""
                return end + rest if end and before.strip() == lead and written in self.stop_ids else text

            added = self._encode_around(between, contents)
            # encoded with what follows, for a token may take the white space behind it along
            if added[:1] == [written] and written in self.stop_ids:
                added = added[1:]
        return torch.cat([ids, torch.tensor(added, dtype=torch.int64)])

    def read(self, ids: Tensor, tools: Tools | None = None) -> Message:
        """The student's message in the tokens of one turn [R], with its tool calls as the template writes calls.

        A call that cannot be parsed is kept with its error. `tools`: schemas, which say where a value without quotes is text.
        """
        ended = ids.numel() > 0 and int(ids[-1]) in self.stop_ids
        text = self._decode_around(ids[:-1] if ended else ids)
        reasoning, content = self._split_reasoning(text)
        content, calls = self._call_format.read(content, tools or ())
        return Message(text, content, reasoning, calls, parse_tag(text), ended)

    def _decode_around(self, ids: Tensor) -> str:
        """The text without special tokens, except those that mark a tool call."""
        special = {index: text for index, text in self._text.special.items() if text in self._call_format.marks}
        text, start = "", 0
        for at in [at for at, index in enumerate(ids.tolist()) if index in special] if special else []:
            text += self.decode(ids[start:at]) + special[int(ids[at])]
            start = at + 1
        return text + self.decode(ids[start:])

    def decode(self, ids: Tensor) -> str:
        """The text without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def end_of(self, prompt: Prompt) -> TurnEnd:
        """How a response to the prompt ends. Raises VocabularyError where no token ends it."""
        end = self.plain_end if prompt.messages is None else self.turn_end
        if end.token_id is None:
            raise VocabularyError(
                f"the tokenizer {self.tokenizer.name_or_path or 'of the student'} has no EOS, so no response would ever end; "
                "set eos_token in its configuration"
            )
        return end

    def response(self, prompt: Prompt, text: str) -> Tensor:
        """Ids by which the student itself would say `text` behind the prompt, with the token that ends it. [R]

        In a chat: the assistant's turn as the template writes it, cut behind the prompt of `start` and behind the
        token that ends a turn. Special tokens that the text spells out stay text; one that ends it gets no second end.
        Raises DataError for text that the tokenizer cannot encode, that has reasoning where the template leaves no room
        for it, and that has none where the template has opened a <think>; TemplateError where a turn of the assistant
        does not begin with the prompt of `start`, or is another text.
        """
        return torch.tensor(self._respond(prompt, text)[1], dtype=torch.int64)

    def faithful(self, prompt: Prompt, text: str) -> Tensor:
        """As `response`; also raises DataError for an empty text, and for one that would not come back from its tokens.

        A change by the tokenizer's own normaliser, and white space that it does not keep, do not count.
        """
        tokenizer = self.tokenizer
        if not self._without_end(text).strip():
            raise DataError(f"the response to prompt {prompt.id} is empty")
        told, ids = self._respond(prompt, text)
        if len(ids) == 1 or tokenizer.unk_token_id in ids[:-1] or not self._text.comes_back(told, ids[:-1]):
            back = str(tokenizer.decode(ids[:-1]))
            raise DataError(
                f"the tokenizer cannot say {text[:SHOWN_CHARS]!r}: it reads it back as {back[:SHOWN_CHARS]!r}"
            )
        return torch.tensor(ids, dtype=torch.int64)

    def cut(self, ids: Tensor, text: str) -> Tensor:
        """The most of `ids` [R] whose text is a beginning of `text`: a token that reaches past its end is left out."""
        behind = bisect_right(range(len(ids) + 1), len(text), key=lambda count: len(self.decode(ids[:count])))
        # the bytes of an unfinished character may decode to more characters than it is
        for count in range(min(behind + _MAX_CHARACTER_TOKENS, len(ids)), 0, -1):
            if text.startswith(self.decode(ids[:count])):
                return ids[:count]
        return ids[:0]

    def continuation(self, prompt: Prompt, ids: Tensor, so_far: str, text: str) -> Tensor:
        """Ids behind `ids` [N] by which a response that began with them says `so_far + text`, with the token that ends it. [R]

        `ids`, which stay as they are, say the first part of `so_far` (`cut`). Where the tokenizer reads the whole text as these
        ids and others, it is the others; else what `ids` do not say is encoded by itself. Special tokens that the text spells
        out stay text. Raises DataError for an empty text, for one that would not come back from its tokens (as `faithful`),
        and for a response that ends inside its thoughts.
        """
        text, end, known = self._without_end(text), self.end_of(prompt), ids.tolist()
        if not text.strip():
            raise DataError(f"the rest of the response to prompt {prompt.id} is empty")
        lead = end.text.removesuffix(self._text.marks.get(end.token_id, ""))

        def encode(text: str) -> list[int]:
            return self._encode_around(lambda text: text + lead, text)

        whole, new = encode(so_far + text), (so_far + text)[len(self.decode(ids)) :]
        # read with what stands before it, a word gets no space of the tokenizer's own
        rest = whole[len(known) :] if whole[: len(known)] == known else encode(new)
        kept = str(self.tokenizer.decode(known, clean_up_tokenization_spaces=False))
        is_kept = self._text.comes_back(kept + new + lead, [*known, *rest])
        if not rest or self.tokenizer.unk_token_id in rest or not is_kept:
            raise DataError(f"the tokenizer cannot say {new[:SHOWN_CHARS]!r} behind {so_far[-SHOWN_CHARS:]!r}")
        opened = prompt.messages is not None and (self.begins == _THINK or kept.lstrip().startswith(_THINK))
        if opened and _END_THINK not in kept + new:
            raise DataError(f"the response to prompt {prompt.id} ends inside its thoughts, without {_END_THINK}")
        return torch.tensor([*rest, end.token_id], dtype=torch.int64)

    def _respond(self, prompt: Prompt, text: str) -> tuple[str, list[int]]:
        """The text that is said, without its end, and its ids with it."""
        text, end = self._without_end(text), self.end_of(prompt)
        if prompt.messages is None:
            return text, [*self._text.untrusted(text), end.token_id]
        known = self._template(prompt, prompt.messages)

        def turn(text: str) -> str:
            thought, found, answer = text.partition(_END_THINK)
            parts = {"content": text}
            if found and self._reads_reasoning:
                thought = thought.lstrip().removeprefix(_THINK).strip("\n")
                parts = {"content": answer.lstrip("\n"), "reasoning_content": thought}
            said = [*(prompt.messages or ()), {"role": "assistant", **parts}]
            whole = self._template(prompt, said, opened=False)
            if whole.startswith(known) and whole.endswith(end.rest):
                told = whole[len(known) : len(whole) - len(end.rest)]
                # in a block that the prompt has opened or closed nothing but its rest may follow
                begins, opens_again = _last_tag(known), told.lstrip().startswith(_THINK)
                fits = not (begins and opens_again) and (begins != _THINK or _END_THINK in told)
                if fits and all(_squashed(part) in _squashed(told) for part in parts.values()):
                    return told
            return self._continued(prompt, known, whole, text)

        lead = end.text.removesuffix(self._text.marks.get(end.token_id, ""))
        told, spelled = self._text.hidden(lambda text: turn(text) + lead, text)
        ids = self._text.around(told, spelled)
        if not spelled:
            # a tokenizer may begin a text by itself with a space
            before, joined = self.start(prompt).tolist(), self._text.encode(self._expanded(known, prompt) + told)
            ids = joined[len(before) :] if joined[: len(before)] == before else ids
        return fill(told, spelled), [*ids, end.token_id]

    def _continued(self, prompt: Prompt, known: str, whole: str, text: str) -> str:
        """`text` as the student samples it behind `known`, where the template's own turn of the assistant is another.

        Right where only the thinking of the two differs: the template drops the reasoning of a turn, or writes in the
        prompt for the student what it does not write in a turn.
        """
        begins, thinks = _last_tag(known), text.lstrip().startswith(_THINK) or _END_THINK in text
        if begins == _THINK:
            if _END_THINK not in text:
                raise DataError(
                    f"the chat template opens {_THINK} for the student, but the response to prompt {prompt.id} has no "
                    f"reasoning to stand in it: begin it with {_THINK}...{_END_THINK}, or turn thinking off in "
                    "student.template_kwargs"
                )
            self.notes[
                f"the chat template opens {_THINK} for the student and writes an assistant's turn without it: responses "
                "are trained as the student samples them, from their reasoning on"
            ] = None
            rest = text.lstrip().removeprefix(_THINK)
            return text if rest == text.lstrip() else rest.removeprefix(known[len(known.rstrip()) :])
        closed = begins
        block = _EMPTY_BLOCK.search(known)
        if block is not None and not closed and not thinks and not whole.startswith(known):
            opening = known[: block.start()]
            if whole.startswith(opening) and _squashed(text) in _squashed(whole.removeprefix(opening)):
                closed = block[0].strip()
        if closed:
            if thinks:
                raise DataError(
                    f"the chat template closes {_END_THINK} before the student begins, but the response to prompt "
                    f"{prompt.id} has reasoning: turn thinking on in student.template_kwargs, or take it out"
                )
            self.notes[
                f"the chat template writes {closed} before the student begins and an assistant's turn without it: "
                "responses are trained as the student samples them, behind it"
            ] = None
            return text
        answer = text.rpartition(_END_THINK)[2]
        if thinks and whole.startswith(known) and _squashed(answer) in _squashed(whole[len(known) :]):
            self.notes[
                "the chat template drops the reasoning of an assistant's turn: responses are trained as the student samples "
                "them, with it"
            ] = None
            return text
        at = next((i for i, (one, other) in enumerate(zip(known, whole, strict=False)) if one != other), len(known))
        raise TemplateError(
            f"the chat template does not write the response to prompt {prompt.id} behind the prompt as the student would: "
            f"{known[max(0, at - SHOWN_CHARS) : at + SHOWN_CHARS]!r} became {whole[max(0, at - SHOWN_CHARS) :]!r}. Training on "
            "given responses needs a template whose turn of the assistant begins with its generation prompt and keeps the "
            "content: change chat_template in the tokenizer's configuration"
        )

    def _without_end(self, text: str) -> str:
        """The text without the end that it spells out."""
        for index in dict.fromkeys((self.turn_end.token_id, self.tokenizer.eos_token_id, *self.stop_ids)):
            end = self._text.marks.get(index)
            if end and text.rstrip().endswith(end):
                return text.rstrip().removesuffix(end)
        return text

    def ask(self, wording: Callable[[Sequence[str]], str], untrusted: Sequence[str], ending: str = "") -> list[int]:
        """Ids of a user's message `wording(untrusted)` up to the answer, which `ending` begins; plain text without a template.

        Special tokens that the untrusted texts spell out are encoded as plain characters. Raises DataError.
        """
        text, spelled = self._text.hidden(lambda texts: self.question(wording(texts)) + ending, untrusted)
        return self._text.around(text, spelled) if self.has_template else self._text.plain(fill(text, spelled))

    def question(self, text: str) -> str:
        """`text` as a user's message up to where the answer begins; the text itself without a chat template."""
        message = {"role": "user", "content": text}
        return self._template(Prompt("question"), [message]) if self.has_template else text

    def encode_question(self, text: str) -> list[int]:
        """Ids of what `question` returns, with the special tokens that a tokenizer puts before a plain text."""
        return self._text.encode(text) if self.has_template else self._text.plain(text)

    def _template(self, prompt: Prompt, messages: Sequence[Said], *, opened: bool = True) -> str:
        """`opened`: up to where the student's next turn begins."""
        tools = {} if prompt.tools is None else {"tools": [dict(tool) for tool in prompt.tools]}
        options = self.template_kwargs | tools | {"tokenize": False, "add_generation_prompt": opened}
        try:
            if self.reads_clock:
                options["chat_template"] = self._stopped_clock + self.tokenizer.get_chat_template(tools=prompt.tools)
            said = messages if self.vision is None else [self._in_parts(message) for message in messages]
            return str(self.tokenizer.apply_chat_template([dict(message) for message in said], **options))
        except Exception as error:  # a template raises whatever it likes
            raise TemplateError(f"the chat template refuses prompt {prompt.id}: {error}") from error

    def _in_parts(self, message: Said) -> Said:
        """The message as templates take one with images: a list of parts; any message where the template knows nothing else."""
        content = message.get("content")
        if not isinstance(content, str) or not (IMAGE in content or self._takes_parts_alone):
            return message
        parts = [
            {"type": "image"} if part == IMAGE else {"type": "text", "text": part} for part in _IMAGES.split(content)
        ]
        return {**message, "content": [part for part in parts if part.get("text") != ""]}

    @cached_property
    def _takes_parts_alone(self) -> bool:
        """Whether the chat template loses a content that is a string."""
        try:
            asked = [{"role": "user", "content": _QUESTION}]
            return _QUESTION not in str(
                self.tokenizer.apply_chat_template(asked, **self.template_kwargs, tokenize=False)
            )
        except Exception:  # as above
            return True

    def _expanded(self, text: str, prompt: Prompt) -> str:
        """The template's text of a prompt, with all tokens of every image in place of the one that the template has."""
        if not prompt.images:
            return text
        if self.vision is None:
            raise RecipeError(
                f"prompt {prompt.id} has images, and {self.tokenizer.name_or_path or 'the model'} was loaded for text alone"
            )
        parts = text.split(self.vision.image_token)
        if len(parts) != len(prompt.images) + 1:
            raise TemplateError(
                f"the chat template writes {len(parts) - 1} times {self.vision.image_token!r} for the {len(prompt.images)} "
                f"images of prompt {prompt.id}; take a template that writes each image of a message, and only these"
            )
        read = [self.vision.read(image).text for image in prompt.images]
        return parts[0] + "".join(image + part for image, part in zip(read, parts[1:], strict=True))

    @cached_property
    def _stopped_clock(self) -> str:
        """A macro in place of the clock that transformers gives to templates; a function cannot be handed to them."""
        moment = datetime.fromisoformat(self.date)
        flags = "-", "_", "0", "^", "#", "E", "O", ""
        directives = [f"%{flag}{letter}" for flag, letter in product(flags, ascii_letters)]
        pairs = [[one, moment.strftime(one)] for one in directives if moment.strftime(one) != one]
        # %% stands for %, and what follows it is no directive
        return (
            f"{{% macro {_CLOCK}(format) %}}{{%- set ns = namespace(text=format | replace('%%', '{_PERCENT}')) -%}}"
            f"{{%- for one, shown in {pairs} -%}}{{%- set ns.text = ns.text | replace(one, shown) -%}}{{%- endfor -%}}"
            f"{{{{- ns.text | replace('{_PERCENT}', '%') -}}}}{{% endmacro +%}}"
        )

    def _check_shown(self, prompt: Prompt, before: Sequence[Said], new: Sequence[Said]) -> None:
        """Raises TemplateError for a message that the template leaves out, as many do with a role that they do not know."""
        roles = tuple(message["role"] for message in new)
        if roles in self._shown_roles:
            return
        slots = [SLOT.format(index) for index in range(len(new))]
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
        told = [*(prompt.messages or ()), *map(self._stand_in, before)]
        opened, content = self._template(prompt, told[:-1]), str(told[-1]["content"])
        filled = [{**message, "content": content} for message, content in zip(new, contents, strict=True)]
        whole = self._template(prompt, [*told, *filled])
        # white space that a template puts before a turn (Mistral's) is the student's to write
        rest = whole.removeprefix(opened).lstrip()
        if not whole.startswith(opened) or not rest.startswith(content):
            known = opened + content
            follows = f"a message of role {new[0]['role']!r}" if new else "another turn"
            at = next(i for i, (one, other) in enumerate(zip(known, whole + "\0", strict=False)) if one != other)
            raise RewriteError(
                f"the chat template rewrites the student's earlier turns when {follows} follows: "
                f"{known[max(0, at - SHOWN_CHARS) :]!r} became {whole[max(0, at - SHOWN_CHARS) :][: 2 * SHOWN_CHARS]!r}. "
                "Several turns need a template that leaves them as they are (Qwen3's drops <think> blocks): change "
                "chat_template in the tokenizer's configuration, or end episodes there with student.on_rewrite: cut"
            )
        return rest.removeprefix(content)

    def _stand_in(self, message: Said) -> Said:
        """The student's message with other words, in the form that templates write: its thoughts opened and closed."""
        if message["role"] != "assistant":
            return message
        before, closed, _ = str(message.get("content", "")).partition(_END_THINK)
        thought = f"1\n{_END_THINK}\n\n"
        if self.begins != _THINK:
            thinks = closed and _THINK in before and self.begins != _END_THINK
            thought = f"{_THINK}\n{thought}" if thinks else ""
        return {"role": "assistant", "content": f"{thought}2"}

    def _find_end(self, ends: set[int]) -> TurnEnd:
        """The first token of its own behind the content of an assistant's turn, as the template writes it.

        Some templates end a turn only where another follows: a token that begins the user's turn then counts if the model or
        the tokenizer names it as an end. Of several that end every turn it is the first that is named (the last of
        <|END_RESPONSE|><|END_OF_TURN_TOKEN|>). EOS where the template ends turns with plain text, or refuses the conversation.
        """
        asked, answered = {"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}
        messages = [asked, answered, {"role": "user", "content": _NEXT}]
        try:
            last = self._template(Prompt("probe"), messages[:2], opened=False).rpartition(_ANSWER)[2]
            whole = self._template(Prompt("probe"), messages, opened=False)
        except DataError:
            return self.plain_end
        marks, written = self._text.marks, set(self._text.encode(whole))
        self._text.guard(index for index in written & marks.keys() if marks[index] not in (_THINK, _END_THINK))
        begins = self._text.encode(whole.partition(_QUESTION)[0])
        follows = whole.rpartition(_ANSWER)[2].rpartition(_NEXT)[0]
        named = marks.keys() & ends
        shared = commonprefix([last, follows])  # noqa: RUF071 -- character by character is meant
        for text, known in ((shared, named), (last, marks), (follows, marks)):
            index = next((index for index in self._text.encode(text) if index in known), None)
            if index is None:
                continue
            before, token, _ = text.partition(marks[index])
            if last.startswith(before + token) or (not before.strip() and (index in ends or index not in begins)):
                return TurnEnd(index, before + token, last)
        return replace(self.plain_end, rest=last)

    @cached_property
    def begins(self) -> str:
        """The tag of reasoning that the template writes right before the student's turn, `<think>` or `</think>`; or ""."""
        try:
            return _last_tag(self.question("1"))
        except DataError:
            return ""

    @property
    def thinks(self) -> bool:
        """Whether the template supports a reasoning block."""
        return _END_THINK in str(self.tokenizer.chat_template)

    @cached_property
    def _call_format(self) -> CallFormat:
        return call_format(str(self.tokenizer.chat_template))

    @cached_property
    def frame(self) -> tuple[str, str]:
        """The template's text between the prompt and a response, and between the response and the token that ends it."""
        try:
            told, _ = self._respond(Prompt("probe", messages=({"role": "user", "content": _QUESTION},)), _ANSWER)
        except DataError:
            return "", ""
        before, _, behind = told.partition(_ANSWER)
        return before, behind

    @property
    def _reads_reasoning(self) -> bool:
        """Whether the template has its own words around reasoning, which it takes from a part of the message (gpt-oss)."""
        template = str(self.tokenizer.chat_template)
        return not self.thinks and re.search(r"\b(reasoning_content|thinking)\b", template) is not None

    def _split_reasoning(self, text: str) -> tuple[str | None, str]:
        """Reasoning, None where the template has no thinking mode or nothing was thought, and what follows it."""
        if not self.thinks:
            return None, text
        if _END_THINK not in text and self.begins != _THINK and not text.lstrip().startswith(_THINK):
            return None, text
        thought, _, rest = text.partition(_END_THINK)
        return thought.lstrip().removeprefix(_THINK).strip("\n"), rest.lstrip("\n")

    def _encode_around(
        self, render: Callable[[Untrusted], str], untrusted: Untrusted, prompt: Prompt | None = None
    ) -> list[int]:
        """Ids of `render(untrusted)`, a control token being one only in what `render` itself writes, with its images."""
        text, spelled = self._text.hidden(render, untrusted)
        return self._text.around(text if prompt is None else self._expanded(text, prompt), spelled)


def _last_tag(text: str) -> str:
    """The tag of reasoning that the text ends with, or ""."""
    return next((tag for tag in (_THINK, _END_THINK) if text.rstrip().endswith(tag)), "")


def _squashed(text: str) -> str:
    """The text without white space and the tags around reasoning."""
    return re.sub(rf"\s|{_THINK}|{_END_THINK}", "", text)
