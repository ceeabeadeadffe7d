"""Problems that stand both in the training data and in the evaluation, and problems that stand twice."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import islice

from understudy.tasks.chats import SYSTEM_ROLES, conversation_facts
from understudy.types import Prompt

NUM_EXAMPLES = 3
_TYPESETTING = re.compile(r"\\[()]|\.(?!\d)|[^\w+*/=<>^().-]|_")
"""Characters in which two copies of a problem differ: white space, mathematical markup, braces, commas and full stops."""


def problem_key(prompt: Prompt) -> str:
    """The part of a prompt's id that names the problem, whatever data set, template or repetition it comes in."""
    return prompt.id.rpartition("/")[2].partition("~")[0]


def normalise(text: str) -> str:
    """The text without letter case and white space, for comparing two prompts."""
    return " ".join(text.casefold().split())


def wording(prompt: Prompt) -> str | None:
    """The single question, as the model reads it; None for a chat of several turns or with tools."""
    if prompt.messages is None:
        return prompt.text
    asked = [message for message in prompt.messages if message["role"] not in SYSTEM_ROLES]
    return str(asked[0]["content"]) if len(asked) == 1 and prompt.tools is None else None


def overlap(train: Sequence[Prompt], evaluation: Sequence[Prompt], limit: int | None = None) -> list[str]:
    """Ids of the evaluation prompts that also stand in `train`, letter case, white space, typesetting and template aside.

    Looks at the first `limit` training prompts only, where it is given: a computed task may have millions.
    """
    keys = {key for prompt in islice(train, limit) for key in _keys(prompt)}
    return [prompt.id for prompt in evaluation if not keys.isdisjoint(_keys(prompt))]


def overlap_message(ids: Sequence[str], num_evaluation: int) -> str:
    """One sentence for the console and the report. `ids` as `overlap` returns them."""
    if not ids:
        return f"none of the {num_evaluation} evaluation prompts is in the training data"
    examples = ", ".join(ids[:NUM_EXAMPLES]) + (", ..." if len(ids) > NUM_EXAMPLES else "")
    return (
        f"{len(ids)} of {num_evaluation} evaluation prompts are also in the training data ({examples}): the accuracy "
        "measures memory too; remove them from one side"
    )


def num_repeated(prompts: Sequence[Prompt]) -> int:
    """How many prompts repeat an earlier one of the sequence."""
    return len(prompts) - len({problem_key(prompt) for prompt in prompts})


def _keys(prompt: Prompt) -> tuple[str, str]:
    """The problem as its id names it (without a template) and the wording as the model sees it; of images its id alone."""
    if prompt.images:
        return problem_key(prompt), problem_key(prompt)
    text = wording(prompt)
    if text is None:
        said = [message for message in prompt.messages or () if message["role"] not in SYSTEM_ROLES]
        text = json.dumps(conversation_facts(said, prompt.tools), sort_keys=True, ensure_ascii=False)
    return problem_key(prompt), _TYPESETTING.sub("", text.casefold()) or normalise(text)
