"""Episodes of several turns: who wrote each token, what is trained, and that every path through a run carries them."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import pre_tokenizers

import understudy
from tests.engine_stub import EngineStub
from tests.integration.test_overlap import ahead
from tests.integration.test_renderer import ASKED
from tests.integration.test_verbal import CHATML, byte_tokenizer
from tests.integration.test_vllm_engine import check_logprob, make_engine, push
from tests.runs import assert_same_run, distillation, grade_by_length, metric_rows, train, train_in_two
from tests.tiny_models import EOS, NUM_ROWS, letters, plain_logp, request, tiny
from understudy.engines import Generates, HFEngine
from understudy.engines.hf.decode import Decoder
from understudy.engines.requests import find_stop
from understudy.environments import SINGLE_TURN, Step
from understudy.environments.play import MAX_STEPS_AT_ONCE, play
from understudy.errors import DataError, TemplateError
from understudy.models import load_tokenizer
from understudy.packing import pack
from understudy.tasks import Arithmetic, Renderer
from understudy.teachers import Setup
from understudy.teachers.judges.wording import Wording, as_text
from understudy.teachers.local import LocalTeacher
from understudy.teachers.stores.recording import ScoredMeta, Stored, write_scored
from understudy.trainer.collect import Collected
from understudy.trainer.observe import collected_metrics
from understudy.types import Author, Grade, Message, Prompt, Request, Sample, Sampling, Scores, ToolCall

pytestmark = pytest.mark.slow

SHORT = Sampling(max_new_tokens=120)
TOKENIZER = letters()
TOKENIZER.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
STUDENT, TEACHER, ENVIRONMENT = (int(who) for who in (Author.STUDENT, Author.TEACHER, Author.ENVIRONMENT))
SAYS = "#1;"
"""In the alphabet of additions."""


class Scripted:
    """Answers the first message with `says`, and grades the episode by the length of the second."""

    max_turns = 2

    def __init__(self, says: str = "HI", max_turns: int = 2) -> None:
        self.says, self.max_turns = says, max_turns
        self.heard: list[str] = []
        self.num_closed = 0

    def step(self, message: Message) -> Step:
        self.heard.append(message.text)
        if len(self.heard) == 1:
            return Step(({"role": "user", "content": self.says},))
        return Step(done=True, reward=len(message.text) % 4 / 3)

    def close(self) -> None:
        self.num_closed += 1


class Broken(Scripted):
    """Fails for every other episode, by what the student said."""

    def step(self, message: Message) -> Step:
        if len(message.text) % 2:
            raise RuntimeError("the tool is gone")
        return super().step(message)


def requests(num_prompts: int = 4, per_prompt: int = 3) -> list[Request]:
    """Prompts of plain text, a letter and a number of letters."""
    return [
        replace(made, prompt=Prompt(made.prompt.id, text="A"))
        for number in range(num_prompts)
        for index in range(per_prompt)
        for made in [request(f"p{number}", [2 + number, *range(5, 5 + number)], index)]
    ]


def model_of() -> Any:
    return tiny(dtype="float32", sharp=3.0)


@contextmanager
def engine_of(kind: str, model: Any, folder: Path) -> Iterator[Generates]:
    if kind == "hf":
        yield HFEngine(model, TOKENIZER, seed=0, stop_ids=(EOS,), vocab_size=NUM_ROWS)
        return
    with make_engine(model, folder, sampling=SHORT) as (engine, _):
        push(engine, model, 3)
        yield engine


def played(
    engine: Generates, make: Callable[[], Any] = Scripted, sampling: Sampling = SHORT, given: Sequence[Request] = ()
) -> tuple[list[Sample], list[Any]]:
    """Samples, and the environments in the order of the requests."""
    made: list[Any] = []

    def environment_of(prompt: Prompt) -> Any:
        made.append(make())
        return made[-1]

    return play(engine, Renderer(TOKENIZER), environment_of, given or requests(), sampling, step=0), made


def response_authors(sample: Sample) -> list[int]:
    return [int(who) for who in sample.author[sample.prompt_length :]]


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_every_token_has_its_author(tmp_path: Path, kind: str) -> None:
    """The student's tokens have the log-probabilities that a forward over the whole conversation gives them."""
    model = model_of()
    says = TOKENIZER("HI")["input_ids"]
    with engine_of(kind, model, tmp_path) as engine:
        samples, environments = played(engine)
        again, _ = played(engine)
    assert [sample.token_ids.tolist() for sample in samples] == [sample.token_ids.tolist() for sample in again]
    whole = [sample for sample in samples if sample.finish == "stop"]
    assert len(whole) >= 6
    for asked, sample, environment in zip(requests(), samples, environments, strict=True):
        assert sample.key == asked.key
        assert torch.equal(sample.token_ids[: sample.prompt_length], asked.token_ids)
        assert sample.num_response_tokens <= SHORT.max_new_tokens
        check_logprob(model, sample)
        assert sample.policy_version is not None
        student = sample.author == STUDENT
        assert set(sample.policy_version[student].tolist()) == {0 if kind == "hf" else 3}
        assert bool((sample.policy_version[~student] == -1).all())
        assert environment.num_closed == 1
    for sample, environment in zip(samples, environments, strict=True):
        if sample.finish != "stop":
            continue
        response = sample.response_ids.tolist()
        first = response.index(EOS) + 1
        authors = [STUDENT] * first + [ENVIRONMENT] * 2 + [STUDENT] * (len(response) - first - 2)
        assert response_authors(sample) == authors
        assert response[first : first + 2] == says
        assert sample.text == environment.heard[1] == TOKENIZER.decode(response[first + 2 : -1])
        assert [message["role"] for message in sample.messages] == ["assistant", "user", "assistant"]
        assert [message["content"] for message in sample.messages] == [environment.heard[0], "HI", environment.heard[1]]
        assert sample.grade is not None
        assert sample.grade.score == len(sample.text) % 4 / 3
        assert sample.num_written_tokens == len(response) - 2


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_a_later_turn_draws_other_numbers(tmp_path: Path, kind: str) -> None:
    """An environment that says nothing, before a model that cares for nothing: equal draws would give equal turns."""
    model = model_of()
    with torch.no_grad():
        for weight in model.model.parameters():
            weight.zero_()
    with engine_of(kind, model, tmp_path) as engine:
        _, environments = played(engine, lambda: Scripted(says=""), Sampling(max_new_tokens=200))
    heard = [environment.heard for environment in environments if len(environment.heard) == 2]
    assert len(heard) >= 6
    assert sum(first == second for first, second in heard) < len(heard) / 2


def test_a_teacher_may_begin_the_first_turn() -> None:
    model = model_of()
    given = [replace(one, prefix_ids=torch.tensor([7, 8])) for one in requests()]
    with engine_of("hf", model, Path()) as engine:
        samples, environments = played(engine, given=given)
    for sample, environment in zip(samples, environments, strict=True):
        authors = response_authors(sample)
        assert authors[:2] == [TEACHER, TEACHER]
        assert TEACHER not in authors[2:]
        if environment.heard:
            assert environment.heard[0].startswith(TOKENIZER.decode([7, 8]))


def test_nobody_answers_in_a_single_turn() -> None:
    """The engine's own samples, to the last object."""
    with engine_of("hf", model_of(), Path()) as engine:
        plain = engine.generate(requests(), SHORT, step=0)
        samples = play(engine, Renderer(TOKENIZER), lambda prompt: SINGLE_TURN, requests(), SHORT, step=0)
    assert [sample.token_ids.tolist() for sample in samples] == [sample.token_ids.tolist() for sample in plain]
    assert all(sample.messages == () and ENVIRONMENT not in response_authors(sample) for sample in samples)
    assert play(engine, Renderer(TOKENIZER), lambda prompt: SINGLE_TURN, [], SHORT, step=0) == []


@pytest.mark.parametrize("inline", [False, True], ids=["turns", "inline"])
def test_teachers_score_the_conversation_and_the_environment_is_not_trained(inline: bool) -> None:
    """Over the flat ids, as a direct forward; what the environment said is context."""
    model, teacher = model_of(), tiny("qwen3")
    with engine_of("hf", model, Path()) as engine:
        samples, _ = played(engine, Searching if inline else Scripted)
    scorer = LocalTeacher(teacher, name="t", vocab_size=NUM_ROWS)
    scores = scorer.score(samples, frozenset({"sampled"}))
    for sample, score in zip(samples, scores, strict=True):
        rows = plain_logp(teacher, sample.token_ids)[sample.prompt_length - 1 :]
        expected = rows.gather(-1, sample.response_ids[:, None]).squeeze(-1)
        assert score.logprob is not None
        torch.testing.assert_close(score.logprob.double(), expected.double(), rtol=0, atol=1e-5)
    batch = pack([replace(sample, scores=score) for sample, score in zip(samples, scores, strict=True)])
    authors = torch.tensor([who for sample in samples for who in response_authors(sample)])
    assert torch.equal(batch.mask, authors == STUDENT)
    assert torch.equal(batch.on_policy, batch.mask)
    assert bool((authors == ENVIRONMENT).any())


def test_an_environment_that_fails_ends_its_own_episode() -> None:
    with engine_of("hf", model_of(), Path()) as engine:
        samples, environments = played(engine, Broken)
    finishes = [sample.finish for sample in samples]
    assert {"stop", "environment"} <= set(finishes)
    for sample, environment in zip(samples, environments, strict=True):
        assert environment.num_closed == 1
        if sample.finish == "environment":
            assert sample.messages[-1] == {"role": "error", "content": "RuntimeError: the tool is gone"}
            assert sample.grade is None
            assert int(sample.token_ids[-1]) == EOS


class Everywhere(Scripted):
    """Never ends an episode."""

    def step(self, message: Message) -> Step:
        self.heard.append(message.text)
        return Step(({"role": "user", "content": self.says},))


def test_an_episode_has_an_end() -> None:
    """By its turns, or by its tokens; then the last token is the student's."""
    with engine_of("hf", model_of(), Path()) as engine:
        by_turns, environments = played(engine, lambda: Everywhere("", max_turns=3), Sampling(max_new_tokens=400))
        by_tokens, _ = played(engine, lambda: Everywhere("HELLO", max_turns=999))
        full, _ = played(engine, lambda: Everywhere("H" * SHORT.max_new_tokens))
    assert [len(environment.heard) for environment in environments] == [3] * 12
    assert {sample.finish for sample in by_turns + by_tokens + full} == {"length"}
    for sample in by_tokens:
        assert sample.num_response_tokens <= SHORT.max_new_tokens
        assert response_authors(sample)[-1] == STUDENT
    assert all(ENVIRONMENT not in response_authors(sample) for sample in full)


class Says:
    """An engine that writes the same texts in every episode, one a turn."""

    def __init__(self, renderer: Renderer, *texts: str) -> None:
        self.turns = iter([renderer.response(Prompt("p", text=""), text) for text in texts])

    def generate(self, requests: Sequence[Request], *_: object, **__: object) -> list[Sample]:
        ids = next(self.turns)
        return [self._sample(one, ids) for one in requests]

    def _sample(self, asked: Request, ids: torch.Tensor) -> Sample:
        context = torch.cat(
            [asked.token_ids, torch.zeros(0, dtype=torch.int64) if asked.prefix_ids is None else asked.prefix_ids]
        )
        author = torch.tensor([0] * len(context) + [STUDENT] * len(ids), dtype=torch.uint8)
        return Sample(asked.prompt, asked.index, torch.cat([context, ids]), author, len(asked.token_ids), "stop", "")


def test_a_template_that_rewrites_ends_the_run() -> None:
    """It would do so in every episode."""
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = CHATML.replace("m['content']", "(m['content'] if loop.last else 'cut')")
    renderer, environment = Renderer(tokenizer), Scripted()
    asked = [Request(ASKED, 0, renderer.start(ASKED))]
    with pytest.raises(TemplateError, match="rewrites"):
        play(Says(renderer, "4"), renderer, lambda prompt: environment, asked, SHORT, step=0)
    assert environment.num_closed == 1


def test_an_episode_is_cut_where_its_template_rewrites() -> None:
    """What was written until then is the sample; it is counted, and the conversation ends with the reason."""
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = CHATML.replace("m['content']", "(m['content'] if loop.last else 'cut')")
    renderer, environment = Renderer(tokenizer, on_rewrite="cut"), Scripted()
    asked = [Request(ASKED, 0, renderer.start(ASKED))]
    (sample,) = play(Says(renderer, "4"), renderer, lambda prompt: environment, asked, SHORT, step=0)
    assert environment.num_closed == 1
    assert (sample.finish, sample.text, sample.truncated) == ("rewritten", "4", False)
    assert sample.token_ids.tolist() == [*asked[0].token_ids.tolist(), *renderer.response(Prompt("p", text=""), "4")]
    assert [message["role"] for message in sample.messages] == ["assistant", "error"]
    assert "the chat template rewrites the student's earlier turns" in sample.messages[-1]["content"]
    metrics = collected_metrics(Collected([sample], [sample]), 0)
    assert (metrics["rewritten"].value, metrics["environment_failed"].value) == (1.0, 0.0)


def test_the_tool_of_the_pages_is_called(shared: Path) -> None:
    """The example in docs/environments.md, through the template of Qwen3."""
    page = (Path(__file__).parents[2] / "docs" / "environments.md").read_text()
    names: dict[str, Any] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "qwen"))
    renderer = Renderer(tokenizer)
    prompt = Prompt("p", messages=({"role": "user", "content": "2+2?"},), tools=(names["ADD"],))
    call, broken = (
        f"<tool_call>\n{json.dumps({'name': 'add', 'arguments': a})}\n</tool_call>" for a in ({"numbers": [2, 2]}, {})
    )
    engine = Says(renderer, f"<think>\nadd\n</think>\n\n{call}", broken, "<tool_call>oops</tool_call>", "4")
    room = Sampling(max_new_tokens=400)
    asked = [Request(prompt, 0, renderer.start(prompt))]
    sample = play(engine, renderer, lambda prompt: names["Adding"](), asked, room, step=0)[0]
    assert (sample.finish, sample.text) == ("stop", "4")
    assert [message["role"] for message in sample.messages] == ["assistant", "tool"] * 3 + ["assistant"]
    answers = [message["content"] for message in sample.messages if message["role"] == "tool"]
    assert answers[:2] == ["4", "add failed: KeyError('numbers')"]
    assert "no JSON" in answers[2]
    whole = tokenizer.apply_chat_template(
        [*map(dict, prompt.messages or ()), *sample.messages], tools=[names["ADD"]], tokenize=False
    )
    assert whole.startswith(tokenizer.decode(sample.token_ids).split("4<|im_end|>")[0])


def test_samples_that_do_not_fit_their_requests_are_refused() -> None:
    with engine_of("hf", model_of(), Path()) as engine:

        class Swapping:
            def generate(self, requests: Sequence[Request], *args: Any, **options: Any) -> list[Sample]:
                return engine.generate(requests, *args, **options)[::-1]

        with pytest.raises(DataError, match="12 samples for 12 requests, and not that of p0#0"):
            played(Swapping())


def test_prompts_wait_for_no_other_prompt_where_the_engine_takes_several_calls() -> None:
    """The first prompt's first turn is written when the second prompt's episodes are over; in lockstep it never would be."""
    with engine_of("hf", model_of(), Path()) as engine:
        plain, _ = played(engine)
        over, lock = threading.Event(), threading.Lock()

        class Several:
            concurrency = 8

            def generate(self, requests: Sequence[Request], *args: Any, step: int, stream: str) -> list[Sample]:
                assert len({one.prompt.id for one in requests}) == 1
                if requests[0].prompt.id == "p0":
                    assert over.wait(60)
                if requests[0].prompt.id == "p1" and "turn2" in stream:
                    over.set()
                with lock:
                    return engine.generate(requests, *args, step=step, stream=stream)

        samples, environments = played(Several())
        assert [sample.key for sample in samples] == [sample.key for sample in plain]
        assert [sample.token_ids.tolist() for sample in samples] == [sample.token_ids.tolist() for sample in plain]
        assert all(environment.num_closed == 1 for environment in environments)

        class Failing(Several):
            def generate(self, requests: Sequence[Request], *args: Any, **options: Any) -> list[Sample]:
                if requests[0].prompt.id == "p2":
                    raise DataError("it is gone")
                return super().generate(requests, *args, **options)

        with pytest.raises(DataError, match="it is gone"):
            played(Failing())


def test_a_step_is_checked() -> None:
    with pytest.raises(ValueError, match="must lie in"):
        Step(reward=2.0)
    for message in (
        {"role": "user"},
        {"role": 3, "content": "4"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": None},
    ):
        with pytest.raises(ValueError, match="role and content"):
            Step((message,))


@pytest.mark.parametrize("answer", [None, "HI", SystemExit(0)], ids=["none", "text", "exit"])
def test_nonsense_ends_its_own_episode(answer: Any) -> None:
    """Also an exit() in a tool that runs the student's code: it would end the run as if it had finished."""

    class Nonsense(Scripted):
        def step(self, message: Message) -> Any:
            if isinstance(answer, SystemExit):
                raise answer
            return answer

    with engine_of("hf", model_of(), Path()) as engine:
        samples, _ = played(engine, Nonsense)
    failed = [sample for sample in samples if sample.finish != "length"]
    assert {sample.finish for sample in failed} == {"environment"}
    error = "SystemExit: 0" if isinstance(answer, SystemExit) else f"TypeError: step returned {answer!r}"
    assert all(sample.messages[-1]["content"].startswith(error) for sample in failed)


def test_an_environment_may_use_its_dictionary_again() -> None:
    class Counting(Scripted):
        def __init__(self) -> None:
            super().__init__(max_turns=3)
            self.answer = {"role": "user", "content": ""}

        def step(self, message: Message) -> Step:
            self.heard.append(message.text)
            self.answer["content"] = "ABC"[len(self.heard) - 1]
            return Step((self.answer,), done=len(self.heard) == 3)

    with engine_of("hf", model_of(), Path()) as engine:
        samples, environments = played(engine, Counting, Sampling(max_new_tokens=400))
    assert any(len(environment.heard) == 3 for environment in environments)
    for sample in samples:
        said = [message["content"] for message in sample.messages if message["role"] == "user"]
        assert said == ["A", "B"][: len(said)]


@pytest.mark.parametrize("environment", [SINGLE_TURN, Scripted(max_turns=1)])
@pytest.mark.parametrize(("text", "graded"), [("so \\boxed{5}", True), ("so</think>\\boxed{5}", False)])
def test_a_response_that_ends_inside_the_thoughts_of_the_template_has_no_answer(
    text: str, graded: bool, environment: Any
) -> None:
    opened = byte_tokenizer(chat=True)
    opened.chat_template = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}{# </think> #}"
    prompt = Prompt("p", messages=({"role": "user", "content": "2+3?"},), reference=("5",))
    ids = torch.tensor([1, *opened(text)["input_ids"]])
    author = torch.full(ids.shape, STUDENT, dtype=torch.uint8)

    class Engine:
        def generate(self, requests: Sequence[Request], sampling: Sampling, **options: Any) -> list[Sample]:
            return [Sample(prompt, 0, ids, author, 1, "length", text)]

    (sample,) = play(Engine(), Renderer(opened), lambda _: environment, [Request(prompt, 0, ids[:1])], SHORT, step=0)  # type: ignore[arg-type]
    assert (sample.grade is not None) == graded
    if sample.grade is not None:
        assert (sample.grade.score, sample.grade.answer) == (0.0, None)
        assert "inside its thoughts" in sample.grade.note


def test_a_reward_is_a_grade_like_a_verifiers() -> None:
    """With an answer to vote on, and without a note where it is right: teachers are shown it as feedback."""
    with engine_of("hf", model_of(), Path()) as engine:
        samples, _ = played(engine)
    grades = [(sample.grade, sample.text) for sample in samples if sample.grade is not None]
    assert any(grade.right for grade, _ in grades)
    for grade, text in grades:
        assert grade.answer == (text.strip() or None)
        assert (grade.note == "") == grade.right


def test_a_recorded_episode_keeps_its_reward_and_its_messages(tmp_path: Path) -> None:
    with engine_of("hf", model_of(), Path()) as engine:
        samples, _ = played(engine)
    scorer = LocalTeacher(tiny("qwen3"), name="t", vocab_size=NUM_ROWS)
    setup = Setup(name="t", vocab_size=NUM_ROWS, renderer=Renderer(TOKENIZER))
    meta = ScoredMeta.of(scorer, setup, "big")
    write_scored(tmp_path, meta, zip(samples, scorer.score(samples, frozenset({"sampled"})), strict=True))
    again = Stored(path=str(tmp_path)).open(setup).samples_for(requests())
    assert any(sample.grade is not None for sample in samples)
    for sample, found in zip(samples, again, strict=True):
        assert found is not None
        assert (found.grade, found.messages, found.finish) == (sample.grade, sample.messages, sample.finish)


def test_a_judge_reads_the_whole_conversation() -> None:
    with engine_of("hf", model_of(), Path()) as engine:
        samples, environments = played(engine)
    sample, (first, last) = next(
        (sample, environment.heard)
        for sample, environment in zip(samples, environments, strict=True)
        if len(environment.heard) == 2
    )
    whole = as_text(Wording().questions(sample, steps=False)[0])
    assert f"assistant: {first}\n\nuser: HI\n\nassistant: {last}" in whole
    steps = [as_text(question) for question in Wording().questions(sample, steps=True)]
    assert len(steps) == 2
    assert f"{first}\n\nuser: HI\n" in steps[1]
    assert "HI" not in steps[0]


# Strings that end a turn, and what stands in the student's own turn


class Searching(Scripted):
    """Answers in the student's own turn."""

    stop = ("C", "DE")

    def step(self, message: Message) -> Step:
        self.heard.append(message.text)
        return Step(({"role": "tool", "content": self.says},), done=len(self.heard) == 2, inline=True)


def test_where_rows_are_looked_at_decides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU looks for strings every few tokens: what was sampled behind one is dropped, and the draws stay."""

    def looking(every: int) -> list[Sample]:
        plain = Decoder.__init__

        def init(self: Decoder, *args: Any, **options: Any) -> None:
            plain(self, *args, **options)
            self._check_every = every

        with monkeypatch.context() as patch, engine_of("hf", model_of(), Path()) as engine:
            patch.setattr(Decoder, "__init__", init)
            given = [replace(one, stop=Searching.stop) for one in requests(num_prompts=8)]
            return engine.generate(given, SHORT, step=0)

    often, seldom = looking(1), looking(8)
    assert [one.token_ids.tolist() for one in often] == [one.token_ids.tolist() for one in seldom]
    assert [(one.finish, one.text) for one in often] == [(one.finish, one.text) for one in seldom]
    assert len({one.num_response_tokens % 8 for one in often if one.finish == "stop"}) > 2
    for one, other in zip(often, seldom, strict=True):
        assert torch.allclose(one.rollout_logprob, other.rollout_logprob, atol=1e-5, equal_nan=True)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["hf", "vllm"])
def test_a_string_ends_a_turn(tmp_path: Path, kind: str) -> None:
    """At the token that completes it; until then the draws are those of an engine that knows no such string."""
    model, given = model_of(), requests(num_prompts=8)
    with engine_of(kind, model, tmp_path) as engine:
        plain = engine.generate(given, SHORT, step=0)
        stopped = engine.generate([replace(one, stop=Searching.stop) for one in given], SHORT, step=0)
        samples, environments = played(engine, Searching, given=given)
    shorter = [one.token_ids.numel() < whole.token_ids.numel() for one, whole in zip(stopped, plain, strict=True)]
    assert sum(shorter) >= 6
    for sample, whole in zip(stopped, plain, strict=True):
        response = whole.response_ids.tolist()
        texts = [TOKENIZER.decode(response[:num]) for num in range(1, len(response) + 1)]
        ends = [num for num, text in enumerate(texts, 1) if any(one in text for one in Searching.stop)]
        length = min(ends, default=len(response))
        assert sample.response_ids.tolist() == response[:length]
        assert sample.finish == ("stop" if ends else whole.finish)
        assert sample.text == TOKENIZER.decode(response[:length], skip_special_tokens=True)
        check_logprob(model, sample)
    for sample, environment in zip(samples, environments, strict=True):
        check_logprob(model, sample)
        student = sample.token_ids[sample.author == STUDENT]
        said = "".join(environment.heard)
        assert TOKENIZER.decode(student, skip_special_tokens=True).startswith(said)
        for heard in environment.heard:
            assert not any(one in heard[:-1] for one in Searching.stop)


def test_a_string_is_found_at_the_token_that_completes_it() -> None:
    """Also where a token holds more than its end, and where bytes of a character are split."""
    tokenizer = byte_tokenizer(chat=False)
    ids = tokenizer("\u00e9</search> more </answer>")["input_ids"]
    assert tokenizer.decode(ids[: find_stop(ids, ("</answer>", "</search>"), tokenizer)]) == "\u00e9</search>"
    assert find_stop(ids[:10], ("</search>",), tokenizer) is None
    assert find_stop(ids, (), tokenizer) is None
    assert find_stop([], ("a",), tokenizer) is None
    assert find_stop(ids, ("\u00e9",), tokenizer) == 2


def test_a_token_that_holds_more_than_the_string_stays(shared: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "qwen"))
    ids = tokenizer("<search>moon</search>\n\n<answer>1")["input_ids"]
    num = find_stop(ids, ("</search>",), tokenizer)
    assert tokenizer.decode(ids[:num]) == "<search>moon</search>\n\n"
    found = Renderer(tokenizer).read(torch.tensor(ids[:num])).tagged
    assert found == ToolCall("moon", "search")


@pytest.mark.parametrize("grouped", [False, True])
def test_an_interruption_may_split_a_string(tmp_path: Path, grouped: bool) -> None:
    """Each reply then has a part of it, and no server sees the whole."""
    model, given = model_of(), [replace(one, stop=("CC", "E")) for one in requests(num_prompts=6)]
    slow = {"token_latency": lambda _: 0.01}
    with make_engine(model, tmp_path, sampling=SHORT, stub=slow, grouped=grouped) as (engine, _):
        push(engine, model, 1)
        plain = engine.generate(given, SHORT, step=0)
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(engine.generate, given, SHORT, step=0)
            for version in range(2, 6):
                time.sleep(0.1)
                push(engine, model, version)
            samples = writing.result()
        assert any("CC" in one.text or "E" in one.text for one in plain)
    for sample in samples:
        check_logprob(model, sample)
        for stop in ("CC", "E"):
            assert stop not in TOKENIZER.decode(sample.response_ids[:-1], skip_special_tokens=True)


class Speaks:
    """An engine that writes the tokens of the same texts in every episode, one a turn, and nothing behind them."""

    def __init__(self, tokenizer: Any, *texts: str) -> None:
        self.turns = iter([torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts])
        self.asked: list[Request] = []

    def generate(self, requests: Sequence[Request], *_: object, **__: object) -> list[Sample]:
        ids = next(self.turns)
        self.asked += requests
        samples = []
        for one in requests:
            prefix = torch.zeros(0, dtype=torch.int64) if one.prefix_ids is None else one.prefix_ids
            context = torch.cat([one.token_ids, prefix])
            author = torch.tensor([0] * len(context) + [STUDENT] * len(ids), dtype=torch.uint8)
            tokens = torch.cat([context, ids])
            samples.append(Sample(one.prompt, one.index, tokens, author, len(one.token_ids), "stop", ""))
        return samples


TRANSCRIPT = [
    (STUDENT, "<think>who?</think><search>moon landing</search>"),
    (ENVIRONMENT, "\n\n<information>Doc 1(Title: Apollo 11) July 1969<|im_end|></information>\n\n"),
    (STUDENT, "more <search>Apollo 17</search>"),
    (ENVIRONMENT, "\n\n<information>Doc 1(Title: Apollo 17) December 1972</information>\n\n"),
    (STUDENT, "<answer>1972</answer>"),
]
"""A search agent's response: who wrote what."""


class Reading:
    """Says what the transcript says."""

    stop = ("</search>", "</answer>")
    max_turns = 4

    def __init__(self) -> None:
        self.replies = [text for author, text in TRANSCRIPT if author == ENVIRONMENT]

    def step(self, message: Message) -> Step:
        assert message.tagged is not None
        if message.tagged.name == "answer":
            return Step(done=True)
        return Step(({"role": "tool", "content": self.replies.pop(0)},), inline=True)

    def close(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize("name", ["qwen", "bytes", "plain"])
def test_every_token_of_a_transcript_has_its_author(shared: Path, name: str) -> None:
    """In the student's own turn no word of the template stands between; only what the student wrote is trained."""
    tokenizer = (
        load_tokenizer(str(shared / "tokenizers" / name)) if name == "qwen" else byte_tokenizer(chat=name == "bytes")
    )
    renderer = Renderer(tokenizer)
    chat = renderer.has_template
    prompt = Prompt("p", messages=({"role": "user", "content": "when?"},)) if chat else Prompt("p", text="when?")
    engine = Speaks(tokenizer, *(text for author, text in TRANSCRIPT if author == STUDENT))
    asked = [Request(prompt, 0, renderer.start(prompt))]
    (sample,) = play(engine, renderer, lambda prompt: Reading(), asked, Sampling(max_new_tokens=400), step=0)
    expected_ids, expected_authors = renderer.start(prompt).tolist(), [0] * len(renderer.start(prompt))
    for author, text in TRANSCRIPT:
        # a special token that the environment spells is plain text
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=author == ENVIRONMENT)["input_ids"]
        expected_ids += ids
        expected_authors += [author] * len(ids)
    assert sample.token_ids.tolist() == expected_ids
    assert sample.author.tolist() == expected_authors
    assert (sample.finish, sample.text) == ("stop", "<answer>1972</answer>")
    assert {one.stop for one in engine.asked} == {Reading.stop}
    scores = Scores(sample.response_ids, logprob=torch.zeros(sample.num_response_tokens))
    batch = pack([replace(sample, scores=scores)])
    assert batch.mask.tolist() == [author == STUDENT for author in expected_authors[sample.prompt_length :]]
    assert batch.target[batch.mask].tolist() == [
        token for token, author in zip(expected_ids, expected_authors, strict=True) if author == STUDENT
    ]


@pytest.mark.parametrize(
    ("text", "name", "inside", "error"),
    [
        ("hm <search> moon </search>", "search", "moon", ""),
        ("I write <search>: <search>moon</search>\n", "search", "moon", ""),
        ("<search>a</search><answer>b</answer>", "search", "a", ""),
        ("<answer>b</answer><search>a</search>", "answer", "b", ""),
        ("moon</search>", "search", "moon", "there is no <search> before </search>"),
        ("<search></search>", "search", "", ""),
        ("<search>moon", None, "", ""),
        ("<SEARCH>moon</SEARCH>", None, "", ""),
    ],
)
def test_the_tags_of_a_search_agent_are_read(text: str, name: str | None, inside: str, error: str) -> None:
    tokenizer = byte_tokenizer(chat=True)
    found = Renderer(tokenizer).read(torch.tensor(tokenizer(text)["input_ids"])).tagged
    assert found == (None if name is None else ToolCall(inside, name, error=error))


# Whole runs


@pytest.fixture
def talking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The task of additions answers the student once."""
    monkeypatch.setattr(Arithmetic, "environment", lambda task, prompt: Scripted(SAYS))


EVAL = {"every": 3, "problems": 8, "at_start": True}


def test_a_run_trains_on_episodes(tmp_path: Path, talking: None) -> None:
    run_dir = train(tmp_path, **distillation(tmp_path / "m", train={"save_samples_every": 1}, eval=EVAL), examine=True)
    for row in metric_rows(run_dir):
        assert 0 < row["environment_tokens"] <= 3
        assert 1 < row["turns"] <= 2
        assert row["environment_failed"] == 0
        assert (row["tool_calls"], row["tool_errors"]) == (0, 0)
        assert row["tokens/student"] == pytest.approx(row["response_tokens"])
        assert row["tokens/teacher"] == 0
        assert row["turn_tokens"] == pytest.approx(row["response_tokens"] / row["turns"])
        # what the student wrote, not what it read
        assert row["student_tokens"] == pytest.approx(8 * row["response_tokens"])
    saved = [json.loads(line) for line in (run_dir / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert any(f"user: {SAYS}" in row["response"] for row in saved)
    talks = [row["messages"] for row in saved if "messages" in row]
    assert talks
    assert all([message["role"] for message in said][:2] == ["assistant", "user"] for said in talks)
    graded = [json.loads(line) for line in (run_dir / "eval" / "step_000006.jsonl").read_text().splitlines()]
    assert any(row["note"] == "graded by the environment" and row["score"] > 0 for row in graded)


def test_a_resumed_run_is_the_same_to_the_last_bit(tmp_path: Path, talking: None) -> None:
    changes = distillation(tmp_path / "m", eval=EVAL)
    whole = train(tmp_path / "whole", **changes)
    assert_same_run(whole, train_in_two(tmp_path / "parts", 3, **changes))


def test_rewards_of_the_environment_are_learnt_from(tmp_path: Path, talking: None) -> None:
    changes = distillation(tmp_path / "m", teacher=None, method={"type": "grpo"}, train={"samples_per_prompt": 4})
    rows = metric_rows(train(tmp_path, **changes))
    assert all(0 < row["reward"] < 1 for row in rows)
    assert all("environment_tokens" in row for row in rows)


def test_episodes_are_played_ahead(tmp_path: Path, talking: None) -> None:
    """Beside the update, with no staleness the same samples as without."""
    plain = metric_rows(train(tmp_path / "plain", **distillation(tmp_path / "m")))
    fresh = metric_rows(train(tmp_path / "fresh", **ahead(tmp_path / "m", 0)))
    assert [row["loss"] for row in plain[:1]] == [row["loss"] for row in fresh[:1]]
    rows = metric_rows(train(tmp_path / "ahead", **ahead(tmp_path / "m", 2)))
    assert all(row["turns"] > 1 for row in rows)
    assert max(row["staleness"] for row in rows) > 0


def test_a_run_with_servers_plays_episodes(tmp_path: Path, talking: None) -> None:
    models = distillation(tmp_path / "m")
    with EngineStub(models["student"]["model"]) as stub:
        rollout = {"type": "vllm", "url": stub.url, "dtype": "float32"}
        rows = metric_rows(train(tmp_path / "run", **models, rollout=rollout))
    assert all(row["turns"] > 1 and row["environment_tokens"] > 0 for row in rows)


@pytest.mark.parametrize("environment", [Broken, lambda says: Scripted("why?")], ids=["raises", "no tokens"])
def test_broken_environments_are_counted_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: Callable[[str], Any]
) -> None:
    monkeypatch.setattr(Arithmetic, "environment", lambda task, prompt: environment(SAYS))
    rows = metric_rows(train(tmp_path, **distillation(tmp_path / "m")))
    assert len(rows) == 6
    assert any(row["environment_failed"] > 0 for row in rows)


def test_a_failed_environment_is_not_the_students_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its episode has no reward, rather than the verifier's 0 for a message that was no answer."""
    monkeypatch.setattr(Arithmetic, "environment", lambda task, prompt: Broken(SAYS))
    monkeypatch.setattr(Arithmetic, "grade", grade_by_length)
    changes = distillation(tmp_path / "m", teacher=None, method={"type": "grpo"}, train={"samples_per_prompt": 4})
    rows = metric_rows(train(tmp_path, **changes, eval=EVAL))
    assert all(row["unrewarded"] == pytest.approx(row["environment_failed"]) for row in rows)
    assert all(row["environment_failed"] > 0 for row in rows)
    lines = (tmp_path / "run" / "eval" / "step_000006.jsonl").read_text().splitlines()
    failed = [row for row in map(json.loads, lines) if row["finish"] == "environment"]
    assert failed
    assert {(row["score"], row["note"]) for row in failed} == {(None, "not graded: the environment failed")}


def test_only_environments_ask_an_engine() -> None:
    root = Path(understudy.__file__).parent
    callers = {
        path.relative_to(root).parts[0]
        for path in root.rglob("*.py")
        if re.search(r"\bengine\.generate\(", path.read_text())
    }
    assert callers - {"engines"} == {"environments"}


class Hanging(Scripted):
    """Never answers a message of odd length, and hangs again when it is closed."""

    deadline_s = 0.2

    def __init__(self) -> None:
        super().__init__()
        self.gone = threading.Event()

    def step(self, message: Message) -> Step:
        if len(message.text) % 2:
            self.gone.wait()
        return super().step(message)

    def close(self) -> None:
        super().close()
        self.gone.wait(None if any(len(text) % 2 for text in self.heard) else 0)


def test_an_environment_that_hangs_ends_its_own_episode() -> None:
    """More of them than threads answer at a time, so none of them holds its place."""
    many = requests(num_prompts=4, per_prompt=2 * MAX_STEPS_AT_ONCE // 4)
    with engine_of("hf", model_of(), Path()) as engine:
        samples, environments = played(engine, Hanging, given=many)
    finishes = [sample.finish for sample in samples]
    assert {"stop", "environment"} <= set(finishes)
    for sample, environment in zip(samples, environments, strict=True):
        assert environment.num_closed == 1
        if sample.finish == "environment":
            assert sample.messages[-1] == {"role": "error", "content": "TimeoutError: no answer within 0.2 s"}
        environment.gone.set()


def test_a_reward_may_be_a_grade() -> None:
    class Graded(Scripted):
        def step(self, message: Message) -> Step:
            return Step(done=True, reward=Grade(0.5, "half", "the other half is missing"))

    with engine_of("hf", model_of(), Path()) as engine:
        samples, _ = played(engine, Graded)
    grades = [sample.grade for sample in samples if sample.finish == "stop"]
    assert grades
    assert all(grade == Grade(0.5, "half", "the other half is missing") for grade in grades)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        Step(reward=Grade(1.5))
