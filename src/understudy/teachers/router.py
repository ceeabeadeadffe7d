"""Several teachers: each sample names the one that scores it."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from difflib import get_close_matches

from understudy.errors import CheckpointError, RecipeError, ScoreError
from understudy.lazy import Tensor, nn, torch
from understudy.linear.head import LMHead
from understudy.teachers.base import Teacher, hash_facts
from understudy.types import Need, Prompt, Sample, Scores

SEPARATOR = "/"
"""Separates a teacher's name from its tensor names."""


def check_names(prompts: Iterable[Prompt], known: Collection[str]) -> None:
    """Raises RecipeError at the first prompt whose teacher is not in `known`."""
    for prompt in prompts:
        if prompt.teacher not in known:
            raise RecipeError(
                f"prompt {prompt.id} {_complaint(prompt.teacher, known)}. Every prompt needs one of these names, from the "
                "field that task.teacher_field says"
            )


def _complaint(name: str | None, known: Collection[str]) -> str:
    listed = f"the teachers are: {', '.join(sorted(known))}"
    if name is None:
        return f"names no teacher; {listed}"
    close = get_close_matches(name, known, n=1)
    return f"names the teacher {name!r}; {f'did you mean {close[0]!r}? ' if close else ''}{listed}"


class RoutedTeacher(Teacher):
    """`score(sample) = teachers[sample.teacher].score(sample)`, whatever the mix. No name falls back to another."""

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        for name in teachers:
            if not name or SEPARATOR in name:
                raise ValueError(f"a teacher is named {name!r}; names are not empty and have no {SEPARATOR!r}")
        if not teachers:
            raise ValueError("RoutedTeacher needs at least one teacher")
        self._teachers = dict(teachers)
        self.name = ", ".join(teachers)
        self.concurrency = min(teacher.concurrency for teacher in teachers.values())

    @property
    def collective(self) -> bool:  # type: ignore[override]
        return any(teacher.collective for teacher in self._teachers.values())

    @property
    def fingerprint(self) -> str:
        """Hash of all names and their teachers' fingerprints, in any order."""
        return hash_facts(sorted((name, teacher.fingerprint) for name, teacher in self._teachers.items()))

    def head_for(self, name: str | None) -> LMHead | None:
        if name is None or name not in self._teachers:
            raise ScoreError(f"a head was asked for that {_complaint(name, self._teachers)}")
        return self._teachers[name].head_for(name)

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """Returns one per sample, in order; calls each teacher once, with its own samples.

        Raises ScoreError for a sample whose teacher is missing or unknown, before any call, and if a teacher returns the
        wrong number of scores.
        """
        groups: dict[str, list[int]] = {name: [] for name in self._teachers if self.collective}
        for index, sample in enumerate(samples):
            if sample.teacher is None or sample.teacher not in self._teachers:
                raise ScoreError(f"sample {sample.key} {_complaint(sample.teacher, self._teachers)}")
            groups.setdefault(sample.teacher, []).append(index)
        found: dict[int, Scores] = {}
        for name, group in groups.items():
            scores = self._teachers[name].score([samples[index] for index in group], need, k=k)
            if len(scores) != len(group):
                raise ScoreError(f"teacher {name!r} returned {len(scores)} scores for {len(group)} samples")
            found.update(zip(group, scores, strict=True))
        return [found[index] for index in range(len(samples))]

    def members(self) -> dict[str, Teacher]:
        return dict(self._teachers)

    def uncached(self) -> RoutedTeacher:
        return RoutedTeacher({name: teacher.uncached() for name, teacher in self._teachers.items()})

    def close(self) -> None:
        """Closes every teacher, even if one raises; then raises."""
        with ExitStack() as all_of:
            for teacher in self._teachers.values():
                all_of.callback(teacher.close)

    def follow(self, student: nn.Module) -> None:
        for teacher in self._teachers.values():
            teacher.follow(student)

    def state(self) -> dict[str, Tensor]:
        """`{"name/tensor": ...}`."""
        return {
            f"{name}{SEPARATOR}{key}": value
            for name, teacher in self._teachers.items()
            for key, value in teacher.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError for the state of an unknown teacher."""
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in self._teachers}
        for key, value in state.items():
            name, _, rest = key.partition(SEPARATOR)
            if name not in parts:
                raise CheckpointError(
                    f"the checkpoint holds {key!r} of a teacher that this run lacks; the teachers are: "
                    f"{', '.join(sorted(parts))}. Resume with the recipe that wrote it"
                )
            parts[name][rest] = value
        for name, teacher in self._teachers.items():
            teacher.load_state(parts[name])


class WeightedTeacher(RoutedTeacher):
    """Every sample is scored by all teachers: `T(y) = sum_i w_i T_i(y)`, the weights divided by their sum.

    A mixture of the tokens' probabilities given the sampled prefix. A teacher of weight 0 is not called.
    """

    def __init__(self, teachers: Mapping[str, Teacher], weights: Mapping[str, float]) -> None:
        """Raises ValueError unless every teacher has a weight of at least 0, and one has more."""
        super().__init__(teachers)
        if weights.keys() != teachers.keys() or min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(
                f"weights are {dict(weights)}; give each of {', '.join(teachers)} one of at least 0, and one of them more"
            )
        self._weights = dict(weights)

    @property
    def fingerprint(self) -> str:
        """Hash of the teachers' and their weights."""
        return hash_facts([super().fingerprint, *sorted(self._weights.items())])

    def head_for(self, name: str | None) -> None:
        """None: a mixture has no single head."""

    def score(self, samples: Sequence[Sample], need: frozenset[Need], *, k: int | None = None) -> list[Scores]:
        """Raises ScoreError for more than the sampled tokens' scores."""
        if need != {"sampled"}:
            raise ScoreError(
                f"weighted teachers give the scores of sampled tokens alone, not {', '.join(sorted(need))}"
            )
        total = sum(self._weights.values())
        parts: list[list[Tensor]] = [[] for _ in samples]
        for name, weight in self._weights.items():
            if weight == 0:
                continue
            named = [replace(sample, teacher=name) for sample in samples]
            for part, sample, one in zip(parts, samples, super().score(named, need), strict=True):
                if one.logprob is None or not torch.equal(one.token_ids, sample.response_ids):
                    raise ScoreError(f"teacher {name!r} scored other tokens than those of sample {sample.key}")
                part.append(one.logprob + math.log(weight / total))
        return [
            Scores(sample.response_ids, logprob=torch.stack(part).logsumexp(0))
            for sample, part in zip(samples, parts, strict=True)
        ]

    def uncached(self) -> WeightedTeacher:
        return WeightedTeacher({name: one.uncached() for name, one in self.members().items()}, self._weights)
