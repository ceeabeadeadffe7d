"""A judge that is the task's own verifier, mistaken at a known rate: what a judge's mistakes cost can be measured with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from understudy.errors import RecipeError, check_range
from understudy.randomness import hash_name, mix64
from understudy.teachers.base import Judge, RunFacts, ScoreForm, Setup, TeacherSection, hash_facts
from understudy.teachers.judges.wording import DIGITS, SIGNAL_BYTES
from understudy.types import Grade, Need, Prompt, Sample, Verdict


@dataclass(frozen=True, kw_only=True)
class Verifier(TeacherSection):
    """The section of a recipe for a judge that grades as the task does."""

    says_digits = True
    alone = True
    reads_images = True

    accuracy: float = 1.0
    """Share of the responses whose digit is the verifier's score; the others get that of the opposite."""

    def __post_init__(self) -> None:
        check_range(self, 0, "accuracy", high=1)

    @property
    def gives(self) -> frozenset[Need]:
        return frozenset({"none", "verbal"})

    @property
    def shown(self) -> str:
        return f"the task's verifier, right {100 * self.accuracy:g} % of the time"

    def check(self) -> str:
        return f"teacher: {self.shown}"

    def check_run(self, run: RunFacts) -> None:
        for where, part in run.parts.items():
            if "reference" not in part.carries and not part.rewards:
                raise RecipeError(
                    f"{run.where}.type is verifier, but {where} has no reference answers; set reference_field, or take a judge "
                    "that reads (verbal, chat)"
                )

    def open(self, setup: Setup) -> VerifierJudge:
        assert setup.grade is not None, "a run has a task"
        return VerifierJudge(self, setup.grade, name=setup.name, seed=setup.seed)


class VerifierJudge(Judge):
    """Says 9 times the verifier's score, or with probability 1 - accuracy 9 minus it.

    Whether it is mistaken about a text depends on seed, prompt and text alone, so that asking again does not help.
    """

    def __init__(
        self, section: Verifier, grade: Callable[[Prompt, str], Grade | None], *, name: str, seed: int = 0
    ) -> None:
        self._section = section
        self._grade = grade
        self._seed = seed
        self.name = name

    @property
    def fingerprint(self) -> str:
        return hash_facts(["verifier", self._section.accuracy, self._seed])

    def judge(self, samples: Sequence[Sample], *, score: ScoreForm = "argmax", steps: bool = False) -> list[Verdict]:
        """One for each sample, in order; without a score where the verifier has none. Raises RecipeError for `steps`."""
        if steps:
            raise RecipeError("a judge of type verifier reads whole responses; set method.steps to false")
        return [self._verdict(sample, SIGNAL_BYTES[score]) for sample in samples]

    def _verdict(self, sample: Sample, num_bytes: int) -> Verdict:
        grade = self._grade(sample.prompt, sample.text)
        if grade is None:
            return Verdict(None, note="the verifier has no score")
        chance = mix64(hash_name(f"{self._seed}/judge/{sample.prompt.id}/{sample.text}")) / 2**64
        right = grade.score if chance < self._section.accuracy else 1 - grade.score
        return Verdict(round(right * (len(DIGITS) - 1)), signal_bytes=num_bytes)
