"""The task `customers`: to serve a customer with tools over a database, as tau-bench has it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from understudy.environments import Environment
from understudy.environments.tau import DOMAINS, Database, Service, UserModel, domain_tools, read_tables
from understudy.environments.tau.database import Tables
from understudy.errors import DataError, RecipeError, brief, check_range, nearest
from understudy.files import hash_values
from understudy.http.replies import check_key
from understudy.tasks.datasets import Named
from understudy.tasks.tool_calls import TAGGED
from understudy.types import Grade, Message, Prompt

TOLD_AT_ONCE = (
    "Here is my whole request, as it was written down for me. You hear nothing more from me: I confirm every action that your "
    "policy allows. Use the tools until all is done, and then tell me the outcome.\n\n{instruction}"
)
"""The words of a customer whom nobody plays."""
OPENING = "Hello, I need some help, please. (case {case})"
"""The first words of a customer whom a model plays. A number, because prompts that are equal count as repeated."""
POLICY = "policy.md"


@dataclass(frozen=True, kw_only=True)
class Customers(Named):
    """The task `customers`: conversations of tau-bench, a retail shop or an airline.

    The system message is the policy. An episode is right if its database ends as after the reference calls and the customer
    was told what the row says; one that is cut off before its end is wrong.
    """

    kind: ClassVar[str] = "customers"
    graded_by: ClassVar[str] = "database"
    """In the list of data sets, in place of the verifier."""

    domain: str = ""
    """`retail` or `airline`; empty: that of the data set."""
    database: str | None = None
    """Folder with the tables (`orders.json`, ...) and `policy.md`; null: `DOMAIN_db` beside the rows."""
    user: UserModel | None = None
    """A chat model that plays the customer; null: the customer says everything at the start and nothing more."""
    max_turns: int = 30
    """Messages that the student may write."""
    step_deadline_s: float = 120.0
    """Seconds for one answer of the customer or the tools."""
    tools_field: str | None = None
    """Not read: the tools are those of the domain."""

    def __post_init__(self) -> None:
        if not self.domain and (self.dataset or "").startswith("tau-"):
            object.__setattr__(self, "domain", str(self.dataset).removeprefix("tau-"))
        if self.domain not in DOMAINS:
            raise ValueError(f"domain is {self.domain!r}; {nearest(self.domain, DOMAINS)}")
        if not self.chat:
            raise ValueError("chat is false; tools and a policy need a chat")
        check_range(self, 1, "max_turns")
        check_range(self, 0, "step_deadline_s", above=True)
        super().__post_init__()

    @property
    def _folder(self) -> Path:
        if self.database is not None:
            return Path(self.database).expanduser()
        return Path(next(iter(self.local.values()))).expanduser().parent / f"{self.domain}_db"

    @property
    def _tables(self) -> Tables:
        return read_tables(str(self._folder), DOMAINS[self.domain].tables)

    @cached_property
    def _policy(self) -> str:
        path = self._folder / POLICY
        try:
            return path.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise RecipeError(
                f"cannot read {path}, the policy: {error}; set task.database to the folder with it"
            ) from error

    @cached_property
    def _schemas(self) -> tuple[Mapping[str, Any], ...]:
        return tuple(tool.schema for tool in domain_tools(self.domain, Database({})))

    def environment_files(self) -> Mapping[str, Mapping[str, str]]:
        # the policy is in the prompts
        return {"database": {"source": str(self._folder), "digest": hash_values(self._tables)}}

    def check_files(self) -> None:
        _ = self._policy
        _ = self._tables
        if self.user is not None:
            check_key(self.user.api_key_env, optional="OPENAI_API_KEY")
        super().check_files()

    def fields_read(self, row: Mapping[str, Any]) -> list[str | None]:
        return [*super().fields_read(row), "actions", "outputs"]

    def to_prompt(self, place: str, row: Mapping[str, Any]) -> Prompt:
        prompt = super().to_prompt(place, row)
        words = TOLD_AT_ONCE.format(instruction=row[self.prompt_field])
        if self.user is not None:
            words = OPENING.format(case=prompt.id.rpartition("/")[2][:8])
        messages = {"role": "system", "content": self._policy}, {"role": "user", "content": words}
        return replace(prompt, messages=messages, tools=self._schemas)

    def _references(self, place: str, row: Mapping[str, Any]) -> tuple[str, ...]:
        """All that the environment needs to grade and to play, as JSON."""
        actions, outputs = row.get("actions"), row.get("outputs")
        calls = actions if isinstance(actions, list) else [None]
        if not all(isinstance(call, dict) and {"name", "kwargs"} <= call.keys() for call in calls):
            raise DataError(f"{place}: field 'actions' is {brief(actions)}; it must be a list of {{name, kwargs}}")
        if not isinstance(outputs, list) or not all(isinstance(text, str) for text in outputs):
            raise DataError(f"{place}: field 'outputs' is {brief(outputs)}; it must be a list of strings")
        facts = {"actions": actions, "outputs": outputs, "instruction": row[self.prompt_field]}
        return (json.dumps(facts, ensure_ascii=False),)

    def environment(self, prompt: Prompt) -> Environment:
        """A customer with a database of its own."""
        if prompt.reference is None:
            raise DataError(f"prompt {prompt.id} has no reference calls; set task.reference_field")
        facts = json.loads(prompt.reference[0])
        options: dict[str, Any] = {}
        if (user := self.user) is not None:
            options["customer"] = lambda said: user.say(facts["instruction"], said, prompt.id)
            options["opening"] = str((prompt.messages or ())[-1]["content"])
        return Service(
            self.domain,
            self._tables,
            actions=facts["actions"],
            outputs=facts["outputs"],
            max_turns=self.max_turns,
            deadline_s=self.step_deadline_s,
            **options,
        )

    def gold(self, prompt: Prompt) -> Sequence[str]:
        """The reference calls in the format of Hermes and Qwen, and what the customer has to be told."""
        if prompt.reference is None:
            return ()
        facts = json.loads(prompt.reference[0])
        calls = [{"name": call["name"], "arguments": call["kwargs"]} for call in facts["actions"]]
        told = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
        return ("\n".join([*told, *facts["outputs"]]) or "I am sorry, I cannot do that for you.",)

    def grade_episode(self, prompt: Prompt, text: str) -> Grade:
        """The verdict after the calls in the text, one message each, and the rest of it as the last message."""
        said, calls = TAGGED.read(text, prompt.tools or ())
        episode = replace(self, user=None).environment(prompt)
        for call in calls:
            reward = episode.step(Message(call.text, "", tool_calls=(call,))).reward
            if isinstance(reward, Grade):
                return reward
        reward = episode.step(Message(said, said)).reward
        return reward if isinstance(reward, Grade) else Grade(0.0, note="the conversation has no end")

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """Episodes that come to their end are graded there, so this one did not."""
        return Grade(0.0, note="the conversation was cut off before its end")
