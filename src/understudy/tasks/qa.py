"""The task `qa`: questions with short answers, with or without a search engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from understudy import config
from understudy.environments import SINGLE_TURN, Environment
from understudy.environments.search import SEARCHES, Search, SearchEnvironment, open_search
from understudy.tasks.datasets import Named
from understudy.tasks.rows import read_rows
from understudy.tasks.verifiers.qa import Score, grade_answer
from understudy.types import Grade, Prompt

ANSWERING = (
    "Answer the given question. Reason step by step, and give the final answer, as short as possible, inside <answer> and "
    "</answer>. For example, <answer> Beijing </answer>. Question: {prompt}"
)
SEARCHING = (
    "Answer the given question. You must conduct reasoning inside <think> and </think> first every time you get new "
    "information. After reasoning, if you find you lack some knowledge, you can call a search engine by <search> query "
    "</search> and it will return the top searched results between <information> and </information>. You can search as many "
    "times as you want. If you find no further external knowledge needed, you can directly provide the answer inside <answer> "
    "and </answer>, without detailed illustrations. For example, <answer> Beijing </answer>. Question: {prompt}"
)
"""The wording of Search-R1 (arXiv 2503.09516, table 1)."""


@dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Named):
    """The task `qa`: NQ, TriviaQA, PopQA, HotpotQA, 2WikiMultihopQA, MuSiQue and Bamboogle by name, or a file of questions.

    With `search` the student may search while it writes: `<search>query</search>` ends its turn, and what was found stands
    behind it as `<information>...</information>`. The answer is what stands in the last `<answer>...</answer>`, if the
    template asks for that, else all of the response behind its thoughts.
    """

    kind: ClassVar[str] = "qa"

    search: Search | None = config.choice(SEARCHES, optional=True)
    """Who finds passages; None: the student answers from memory."""
    template: str = ""
    """The wording around the question; empty: that of Search-R1, or without a search a shorter one."""
    verifier: str = "em"
    """`em`: exact match with one of the answers; `f1`: the words that are shared with it; or another verifier."""

    def __post_init__(self) -> None:
        if not self.template:
            object.__setattr__(self, "template", SEARCHING if self.search else ANSWERING)
        super().__post_init__()

    def grade(self, prompt: Prompt, text: str) -> Grade:
        """The verifier's verdict; EM, F1 and cover match stand beside it. Raises DataError for a prompt without reference."""
        if self.verifier not in ("em", "f1") or prompt.reference is None:
            return super().grade(prompt, text)
        return grade_answer(text, prompt.reference, cast(Score, self.verifier), tagged="<answer>" in self.template)

    def gold(self, prompt: Prompt) -> Sequence[str]:
        """Each accepted answer, in its tag where the template asks for one."""
        if "<answer>" not in self.template:
            return super().gold(prompt)
        return [f"<answer>{answer}</answer>" for answer in prompt.reference or ()]

    def environment(self, prompt: Prompt) -> Environment:
        """The search engine of one episode, which is opened with the first; nobody where there is none."""
        if self.search is None:
            return SINGLE_TURN
        before, _, behind = self.template.partition("{prompt}")
        asked = prompt.text or str((prompt.messages or ({"content": ""},))[-1]["content"])
        question = asked.removeprefix(before).removesuffix(behind)
        answer = "" if prompt.reference is None else prompt.reference[0]
        return SearchEnvironment(self.search, open_search(self.search, read_rows), question, answer)

    def environment_files(self) -> Mapping[str, Mapping[str, str]]:
        file = None if self.search is None else self.search.file
        return {} if file is None else {"search": file}

    def check_files(self) -> None:
        super().check_files()
        if self.search is not None:
            self.search.check()
