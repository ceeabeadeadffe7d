"""Plays episodes: the student writes, its environment answers. The only caller of `Engine.generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from itertools import repeat
from threading import Event, Thread
from typing import Any, TypeVar

from understudy.engines import Generates
from understudy.environments.base import DEADLINE_S, SINGLE_TURN, Environment, Step
from understudy.errors import DataError, RewriteError, TemplateError
from understudy.lazy import Tensor, torch
from understudy.tasks.renderer import Renderer, Said
from understudy.types import Author, Finish, Grade, Prompt, Request, Sample, Sampling

MAX_STEPS_AT_ONCE = 32
"""Environments that answer at the same time, each in a thread: most wait for a search, a tool or a process."""

Result = TypeVar("Result")
EnvironmentOf = Callable[[Prompt], Environment]


@dataclass(frozen=True)
class _Episode:
    """An episode between two turns."""

    request: Request
    environment: Environment
    sample: Sample
    """All turns so far, the environment's answers included."""
    turn_start: int
    """The first token of the last turn."""
    said: tuple[Said, ...] = ()
    next_ids: Tensor | None = None
    """[L] the context of the next turn; None: the episode is over."""


def play(
    engine: Generates,
    renderer: Renderer,
    environment_of: EnvironmentOf,
    requests: Sequence[Request],
    sampling: Sampling,
    *,
    step: int,
    stream: str = "sample",
) -> list[Sample]:
    """Returns one sample for each request, in order: a whole episode with all of its turns.

    Episodes go on in lockstep: each turn asks the engine once, for all that are not over. An engine that takes several calls
    at a time is asked for each prompt by itself, so that nobody waits for the turns of another prompt's episodes.
    `sampling.max_new_tokens`, or fewer tokens where the prompt says so, bound the whole response, the environment's tokens
    included. An episode is cut ("length") where they are used up or its environment's `max_turns` are; an environment that
    raises, or gives no answer by its deadline, ends its own episode ("environment"), and so does a chat template that rewrites
    earlier turns ("rewritten") where `renderer.on_rewrite` is "cut".
    Raises TemplateError for any other chat template that cannot continue a conversation, and as the engine.
    """
    with ExitStack() as open_environments:
        environments = []
        for request in requests:
            environments.append(environment_of(request.prompt))
            if environments[-1] is not SINGLE_TURN:
                open_environments.callback(_close, environments[-1])
            if hasattr(environments[-1], "training_step"):
                environments[-1].training_step = step
        requests = [
            replace(request, stop=(*request.stop, *request.prompt.stop, *getattr(environment, "stop", ())))
            for request, environment in zip(requests, environments, strict=True)
        ]
        steps = open_environments.enter_context(ThreadPoolExecutor(MAX_STEPS_AT_ONCE, "understudy-environment"))
        failed = Event()

        def talk(indices: Sequence[int]) -> list[Sample]:
            def write(asked: Sequence[Request], stream: str) -> list[Sample]:
                return _write(engine, asked, sampling, step, stream)

            asked = [(requests[index], environments[index]) for index in indices]
            return _talk(asked, renderer, write, stream, sampling.max_new_tokens, steps, failed)

        has_turns = any(environment is not SINGLE_TURN for environment in environments)
        num_calls = getattr(engine, "concurrency", 1) if has_turns else 1
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(request.prompt.id if num_calls > 1 else "", []).append(index)
        if len(groups) < 2:
            talks = [talk(indices) for indices in groups.values()]
        else:
            calls = ThreadPoolExecutor(min(num_calls, len(groups)), "understudy-episodes")
            try:
                # in a copy of the context: whoever cancels the caller's requests cancels these
                futures = [calls.submit(copy_context().run, talk, indices) for indices in groups.values()]
                for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                    future.result()
                talks = [future.result() for future in futures]
            finally:
                # after an error or Ctrl-C the others end with their turn, or when the engine is closed; nobody waits for them
                failed.set()
                calls.shutdown(wait=False, cancel_futures=True)
    places = (index for indices in groups.values() for index in indices)
    played = dict(zip(places, (sample for samples in talks for sample in samples), strict=True))
    return [_graded_if_unfinished(played[index], renderer) for index in range(len(requests))]


def _talk(
    asked: Sequence[tuple[Request, Environment]],
    renderer: Renderer,
    write: Callable[[Sequence[Request], str], list[Sample]],
    stream: str,
    max_new_tokens: int,
    steps: ThreadPoolExecutor,
    failed: Event,
) -> list[Sample]:
    """Whole episodes in lockstep; no further turn once others `failed`. Environments answer in the threads of `steps`."""
    samples = write([request for request, _ in asked], stream)
    episodes = {
        place: _Episode(request, environment, sample, turn_start=sample.prompt_length)
        for place, ((request, environment), sample) in enumerate(zip(asked, samples, strict=True))
        if environment is not SINGLE_TURN
    }
    going, turn = list(episodes), 1
    while going and not failed.is_set():
        spoken = [episodes[place] for place in going]
        episodes |= zip(going, steps.map(_answer, spoken, repeat(renderer), repeat(max_new_tokens)), strict=True)
        going = [place for place in going if episodes[place].next_ids is not None]
        turn += 1
        if going:
            # another stream: a later turn draws other numbers than the first, whatever the engine keys its draws by
            written = write([_continuation(episodes[place]) for place in going], f"{stream}/turn{turn}")
            episodes |= {place: _join(episodes[place], part) for place, part in zip(going, written, strict=True)}
    return [episodes[place].sample if place in episodes else sample for place, sample in enumerate(samples)]


def _graded_if_unfinished(sample: Sample, renderer: Renderer) -> Sample:
    """The sample, graded 0 if it ends inside thoughts that the template began: its text does not show it to a verifier."""
    prompt = sample.prompt
    if (
        sample.grade is not None
        or prompt.reference is None
        or prompt.messages is None
        or sample.finish == "environment"
    ):
        return sample
    if renderer.begins != "<think>" or "</think>" in sample.text:
        return sample
    # some tokenizers have the tag as a special token, which the text leaves out
    if "</think>" in renderer.tokenizer.decode(sample.token_ids[sample.prompt_length :]):
        return sample
    return replace(sample, grade=Grade(0.0, note="no final answer: the response ends inside its thoughts"))


def _write(engine: Generates, requests: Sequence[Request], sampling: Sampling, step: int, stream: str) -> list[Sample]:
    """Asks the engine for one turn. Raises DataError where samples and requests do not fit together."""
    samples = engine.generate(requests, sampling, step=step, stream=stream)
    expected, found = [request.key for request in requests], [sample.key for sample in samples]
    if expected != found:
        wrong = next((key for key, other in zip(expected, found, strict=False) if key != other), expected[-1])
        raise DataError(
            f"the engine returned {len(found)} samples for {len(expected)} requests, and not that of {wrong} in its place"
        )
    return samples


def _answer(episode: _Episode, renderer: Renderer, max_new_tokens: int) -> _Episode:
    """Returns the episode after its environment has answered the last message of the student."""
    sample, environment = episode.sample, episode.environment
    message = renderer.read(sample.token_ids[episode.turn_start :], sample.prompt.tools)
    said = (*episode.said, {"role": "assistant", "content": message.text})
    over = replace(episode, sample=replace(sample, text=message.text, messages=said), said=said, next_ids=None)
    if sample.finish != "stop":
        return over
    try:
        reply = _within(getattr(environment, "deadline_s", DEADLINE_S), lambda: environment.step(message))
        if not isinstance(reply, Step):
            raise TypeError(f"step returned {reply!r}, which is no Step")
    # other people's code: a bad episode is data. Ctrl-C reaches only the main thread; an exit() in a tool that runs the
    # student's code would end the run as if it had finished
    except BaseException as error:
        return _failed(over, error)
    if reply.reward is not None:
        # the answer is what majority votes count
        grade = (
            reply.reward if isinstance(reply.reward, Grade) else Grade(reply.reward, message.content.strip() or None)
        )
        # as of every verifier, the note of a right answer is empty: teachers are shown it as feedback
        grade = grade if grade.right or grade.note else replace(grade, note="graded by the environment")
        over = replace(over, sample=replace(over.sample, grade=grade))
    if reply.done:
        return over
    if sum(one["role"] == "assistant" for one in said) >= environment.max_turns:
        return replace(over, sample=replace(over.sample, finish="length"))
    # copies: an environment may use one dictionary for all of its answers
    said = (*said, *map(dict, reply.messages))
    try:
        ids = renderer.append(sample.token_ids, sample.prompt, said, inline=reply.inline)
    except TemplateError as error:
        if not isinstance(error, RewriteError) or renderer.on_rewrite == "refuse":
            raise
        return _failed(over, error, "rewritten")
    except DataError as error:
        return _failed(over, error)
    if ids.numel() - sample.prompt_length >= sample.prompt.room(max_new_tokens):
        return replace(over, sample=replace(over.sample, finish="length"))
    return replace(over, said=said, next_ids=ids)


def _failed(episode: _Episode, error: BaseException, finish: Finish = "environment") -> _Episode:
    said = (*episode.said, {"role": "error", "content": f"{type(error).__name__}: {error}"})
    return replace(episode, sample=replace(episode.sample, finish=finish, messages=said), said=said)


def _continuation(episode: _Episode) -> Request:
    assert episode.next_ids is not None
    return replace(episode.request, prefix_ids=episode.next_ids[episode.sample.prompt_length :])


def _join(episode: _Episode, written: Sample) -> _Episode:
    """Returns the episode with one more turn. The engine takes its prefix for a teacher's: here it is known who wrote it."""
    assert episode.next_ids is not None
    before, start = episode.sample, episode.next_ids.numel()
    joined, num_added = dict[str, Any](), start - before.token_ids.numel()
    for name, added in (("author", Author.ENVIRONMENT), ("rollout_logprob", torch.nan), ("policy_version", -1)):
        old, new = getattr(before, name), getattr(written, name)
        known = old is not None and new is not None
        joined[name] = torch.cat([old, old.new_full((num_added,), added), new[start:]]) if known else None
    sample = replace(before, token_ids=written.token_ids, finish=written.finish, **joined)
    return replace(episode, sample=sample, turn_start=start, next_ids=None)


def _within(deadline_s: float, call: Callable[[], Result]) -> Result:
    """The result of a call, in a thread that is left behind where it takes too long. Raises TimeoutError, and as the call.

    A thread of a pool would be waited for when the pool ends, and at the end of the program.
    """
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True, name="understudy-step").start()
    if not wait([future], timeout=deadline_s).done:
        raise TimeoutError(f"no answer within {deadline_s:g} s")
    return future.result()


def _close(environment: Environment) -> None:
    # the sample is there: what its environment leaves behind is no reason to lose it
    with suppress(Exception):
        _within(getattr(environment, "deadline_s", DEADLINE_S), environment.close)
