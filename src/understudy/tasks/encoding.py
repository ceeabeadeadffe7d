"""Text as token ids: control tokens only where a template or a wording writes them, never where data spells them out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

from understudy.errors import DataError, TemplateError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_CHARS = 60
_MARK = "\ue000"
SLOT = _MARK + "{}\ue001"
"""Stands for untrusted text while a template is rendered: private characters, which no template writes itself."""
_SLOTS = re.compile(_MARK + "([0-9]+)\ue001")

Untrusted = TypeVar("Untrusted")


class Encoder:
    """A tokenizer that threads may share, and the control tokens that no text of a user may become."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        # not every tokenizer marks the EOS that it names as special
        named = zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True)
        self.special = {index: token for index, token in named if index is not None} | {
            index: str(token) for index, token in added.items() if token.special
        }
        # words and runs of spaces, which some tokenizers add as tokens, mark nothing
        marks = {index: str(token) for index, token in added.items() if re.search(r"[^\w\s]", str(token))}
        self.marks = self.special | marks
        """Tokens that can mark something, special or not."""
        self._eats_before = {str(token) for token in added.values() if token.lstrip}
        self._eats_behind = {str(token) for token in added.values() if token.rstrip}
        # `split_special_tokens` is set on the tokenizer itself
        self._lock = Lock()
        self.guard(self.special)

    def guard(self, ids: Iterable[int]) -> None:
        """Takes the special tokens and these marks for control tokens."""
        self._controls = self.special | {index: self.marks[index] for index in ids}
        words = sorted(self._controls.values(), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, words)) or "(?!)")
        self._spelled = re.compile(f"{self._control.pattern}|{_MARK}")

    def spells(self, text: str) -> bool:
        """Whether the text spells a control token."""
        return self._control.search(text) is not None

    def encode(self, text: str, **options: bool) -> list[int]:
        """Ids of a text that is trusted. Raises DataError."""
        try:
            with self._lock:
                return list(self.tokenizer(text, **({"add_special_tokens": False} | options))["input_ids"])
        except Exception as error:  # what `tokenizers` raises has no type of its own
            raise DataError(f"the tokenizer cannot encode {text[:SHOWN_CHARS]!r}: {error}") from error

    def untrusted(self, text: str) -> list[int]:
        """Raises DataError where a control token that the text spells out cannot be kept as text."""
        if not self._spelled.search(text):
            return self.encode(text)
        ids = self.encode(text, split_special_tokens=True)
        found = self._controls.keys() & set(ids)
        if found:
            raise DataError(
                f"the text {text[:SHOWN_CHARS]!r} spells {self._controls[min(found)]!r}, which the tokenizer cannot keep as "
                "text: take it out of the data, or make it a special token in the tokenizer's configuration"
            )
        return ids

    def plain(self, text: str, quoted: Sequence[str] = ()) -> list[int]:
        """With the special tokens that the tokenizer adds by itself, but an EOS at the end.

        Control tokens that the text spells are text where they stand in one of `quoted`, or everywhere if nothing is.
        """
        if quoted and self.spells(text):
            spelled: list[str] = []
            parts = re.compile("|".join(re.escape(part) for part in sorted(quoted, key=len, reverse=True)))
            plain = self.around(parts.sub(lambda found: self._slotted(found[0], spelled), text), spelled)
            probe, bare = self.encode("1", add_special_tokens=True), self.encode("1")
            first = next(index for index in range(len(probe)) if probe[index : index + len(bare)] == bare)
            return [*probe[:first], *plain]
        plain = self.untrusted(text)
        if self.tokenizer.num_special_tokens_to_add() == 0:
            return plain
        ids = self.encode(text, add_special_tokens=True, split_special_tokens=bool(self._spelled.search(text)))
        closes_itself = ids[-1:] == [self.tokenizer.eos_token_id] and plain[-1:] != ids[-1:] and len(ids) > 1
        return ids[:-1] if closes_itself else ids

    def hidden(self, render: Callable[[Untrusted], str], untrusted: Untrusted) -> tuple[str, list[str]]:
        """`render(untrusted)` with a slot for every control token that a string in `untrusted` spells out, and these.

        Raises TemplateError for a template that looks at them: it would write something else.
        """
        spelled: list[str] = []

        def hide(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {hide(key): hide(item) for key, item in value.items()}
            if isinstance(value, list | tuple):
                return type(value)(map(hide, value))
            return self._slotted(value, spelled) if isinstance(value, str) else value

        hidden = hide(untrusted)
        if not spelled:
            return render(untrusted), []
        text = render(hidden)
        if fill(text, spelled) != render(untrusted):
            raise TemplateError(
                f"a text spells {spelled[0]!r}, and the chat template writes something else where it does; take it out of the "
                "data, or change chat_template in the tokenizer's configuration"
            )
        return text, spelled

    def around(self, text: str, spelled: Sequence[str]) -> list[int]:
        """Ids of a text with slots; what stands between two control tokens is read as plain text where it has one."""
        if not spelled:
            return self.encode(text)
        ids, trusted = list[int](), ""
        parts = re.split(f"({self._control.pattern})", text)
        for at, part in enumerate(parts):
            if not _SLOTS.search(part):
                trusted += part
                continue
            before, behind = (parts[i] if 0 <= i < len(parts) else "" for i in (at - 1, at + 1))
            part = part.lstrip() if before in self._eats_behind else part
            part = part.rstrip() if behind in self._eats_before else part
            ids += [*self.encode(trusted), *self.untrusted(fill(part, spelled))]
            trusted = ""
        return [*ids, *self.encode(trusted)]

    def comes_back(self, text: str, ids: Sequence[int]) -> bool:
        """Whether ids decode to the text, white space and the tokenizer's own normaliser aside."""
        back = str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        normaliser = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)

        def normalised(text: str) -> str:
            return "".join((text if normaliser is None else normaliser.normalize_str(text)).split())

        return back == text or normalised(back) == normalised(text)

    def _slotted(self, text: str, spelled: list[str]) -> str:
        """The text with a slot for every control token that it spells out; these are added to `spelled`."""

        def slot(match: re.Match[str]) -> str:
            spelled.append(match[0])
            return SLOT.format(len(spelled) - 1)

        return self._spelled.sub(slot, text)


def fill(text: str, spelled: Sequence[str]) -> str:
    """The text with what the slots stand for."""
    return _SLOTS.sub(lambda match: spelled[int(match[1])], text)
