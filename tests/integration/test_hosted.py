"""Environments of the package verifiers: episodes in which it asks and the student answers, and what goes wrong in them."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.test_tool_tasks import as_call, played
from understudy.environments.endpoint import Asked, Conversation, Over, Played, Seat
from understudy.environments.verifiers import open_world
from understudy.errors import DataError, EngineError, RecipeError
from understudy.tasks import Verifiers
from understudy.tasks import hosted as hosted_task
from understudy.types import Message, ToolCall

PROMPT = {"role": "user", "content": "Guess a number."}
OPENING = Asked((PROMPT,), ())
Loop = Callable[[str, Conversation], None]


def ask(url: str, messages: list[Any], session: str = "a", **more: Any) -> httpx.Response:
    body = {"model": "student", "messages": messages, **more}
    headers = {"X-Session-ID": session}
    return httpx.post(f"{url}/chat/completions", json=body, headers=headers, timeout=20, trust_env=False)


def guessing(url: str, conversation: Conversation) -> None:
    """An environment of the kind that the package has: asks for a number until it is 7."""
    messages: list[Any] = [PROMPT]
    while True:
        reply = ask(url, messages)
        if reply.status_code != 200:
            return
        said = reply.json()["choices"][0]["message"]
        messages.append(said)
        if said["content"] == "7":
            conversation.events.put(Over(1.0))
            return
        messages.append({"role": "user", "content": [{"type": "text", "text": "another"}], "name": None})


@pytest.fixture
def seat() -> Iterator[Seat]:
    one = Seat()
    yield one
    one.close()


def episode(seat: Seat, loop: Loop, opening: Asked = OPENING, **options: Any) -> Played:
    def begin() -> Conversation:
        url, conversation = seat.take()
        threading.Thread(target=loop, args=(url, conversation), daemon=True).start()
        return conversation

    return Played(
        begin, seat.leave, opening, **({"low": 0.0, "high": 1.0, "max_turns": 5, "timeout_s": 10.0} | options)
    )


def test_the_student_is_the_model_that_is_asked(seat: Seat) -> None:
    one = episode(seat, guessing)
    first = one.step(Message("3", "3"))
    assert (first.done, first.messages) == (False, ({"role": "user", "content": "another"},))
    last = one.step(Message("7", "7"))
    assert (last.done, last.reward) == (True, 1.0)
    one.close()


def test_a_request_that_is_none_is_refused_and_nothing_is_said(seat: Seat, capsys: pytest.CaptureFixture[str]) -> None:
    url, conversation = seat.take()
    for body in (b"{", b"[" * 100_000, b"\xff"):
        assert httpx.post(f"{url}/chat/completions", content=body, trust_env=False).status_code == 400
    for address in (url.replace("/v1", "x/v1"), url.rpartition("/")[0].rpartition("/")[0] + "/0/v1"):
        assert httpx.post(f"{address}/chat/completions", json={"messages": []}, trust_env=False).status_code == 410
    assert conversation.events.empty()
    assert httpx.post(f"{url}/chat/completions", json=[1], trust_env=False).status_code == 410
    event = conversation.next(1.0)
    assert isinstance(event, Over)
    assert "a request that the student cannot read" in event.error
    assert "".join(capsys.readouterr()) == ""


def test_calls_go_there_as_they_were_written(seat: Seat) -> None:
    heard: list[Any] = []

    def loop(url: str, conversation: Conversation) -> None:
        heard.append(ask(url, [PROMPT], tools=[{"type": "function", "function": {"name": "add"}}]).json())
        conversation.events.put(Over(0.5))

    calls = (ToolCall("{}", "add", {"a": 1}), ToolCall("{oops", "add", error="no JSON"))
    opening = Asked((PROMPT,), ({"type": "function", "function": {"name": "add"}},))
    assert episode(seat, loop, opening).step(Message("x", "x", "hm", calls)).reward == 0.5
    said = heard[0]["choices"][0]["message"]
    assert (said["content"], said["reasoning_content"]) == ("x", "hm")
    assert [call["function"]["arguments"] for call in said["tool_calls"]] == ['{"a": 1}', "{oops"]
    assert len({call["id"] for call in said["tool_calls"]}) == 2
    assert heard[0]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_stream_is_the_same_message(seat: Seat) -> None:
    heard: list[str] = []

    def loop(url: str, conversation: Conversation) -> None:
        heard.append(ask(url, [PROMPT], stream=True).text)
        conversation.events.put(Over(1.0))

    episode(seat, loop).step(Message("7", "7"))
    frames = [line.removeprefix("data: ") for line in heard[0].splitlines() if line]
    assert frames[-1] == "[DONE]"
    deltas = [json.loads(frame)["choices"][0] for frame in frames[:-1]]
    assert (deltas[0]["delta"]["content"], deltas[1]["finish_reason"]) == ("7", "stop")


def asks(*requests: tuple[list[Any], str]) -> Loop:
    """A loop that only sends these requests, each from a session."""

    def loop(url: str, conversation: Conversation) -> None:
        for messages, session in requests:
            if ask(url, messages, session).status_code != 200:
                return

    return loop


SAID = {"role": "assistant", "content": "3"}


@pytest.mark.parametrize(
    ("second", "match"),
    [
        (([PROMPT, SAID, PROMPT], "b"), "two agents"),
        (([{"role": "user", "content": "other"}, SAID, PROMPT], "a"), "changes what was said before"),
        (([PROMPT], "a"), "changes what was said before"),
        (([PROMPT, SAID], "a"), "asks again for the same message"),
        (([PROMPT, SAID, PROMPT, SAID, PROMPT], "a"), "speaks for the student"),
        (([PROMPT, SAID, {"role": "user", "content": [{"type": "image_url"}]}], "a"), "part of type 'image_url'"),
        (([PROMPT, SAID, 5], "a"), "cannot read"),
    ],
)
def test_what_a_student_cannot_follow_is_named(seat: Seat, second: tuple[list[Any], str], match: str) -> None:
    one = episode(seat, asks(([PROMPT], "a"), second))
    with pytest.raises(EngineError, match=match):
        one.step(Message("3", "3"))
    one.close()


def test_other_beginnings_rewards_and_silence_are_named(seat: Seat) -> None:
    with pytest.raises(EngineError, match="begins otherwise"):
        episode(seat, asks(([SAID], "a"))).step(Message("3", "3"))
    with pytest.raises(EngineError, match=r"did not end within 0\.2 s"):
        episode(seat, lambda url, conversation: None, timeout_s=0.2).step(Message("3", "3"))

    def rewarded(reward: float | None, error: str = "") -> Loop:
        def loop(url: str, conversation: Conversation) -> None:
            ask(url, [PROMPT])
            conversation.events.put(Over(reward, error))

        return loop

    with pytest.raises(EngineError, match="not between reward_low"):
        episode(seat, rewarded(7.0)).step(Message("3", "3"))
    with pytest.raises(EngineError, match="the environment failed: TaskError: gone"):
        episode(seat, rewarded(None, "TaskError: gone")).step(Message("3", "3"))
    assert episode(seat, rewarded(-1.0), low=-2.0, high=2.0).step(Message("3", "3")).reward == 0.25


def test_an_episode_that_is_given_up_leaves_nobody_waiting(seat: Seat) -> None:
    status: list[int] = []
    url, conversation = seat.take()
    thread = threading.Thread(target=lambda: status.append(ask(url, [PROMPT]).status_code))
    thread.start()
    assert conversation.next(10.0) == OPENING
    seat.leave(conversation)
    thread.join(10)
    assert status == [410]
    assert ask(url, [PROMPT]).status_code == 410


# The package itself

TASKSET = '''
import verifiers.v1 as vf

class Adder(vf.Toolset[vf.ToolsetConfig]):
    TOOL_PREFIX = "sums"

    @vf.tool
    async def add(self, a: int, b: int) -> str:
        """The sum of two numbers."""
        return str(a + b)

class Sum(vf.TaskData):
    answer: str = ""

class SumTask(vf.Task[Sum]):
    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.assistant_messages[-1].content.strip() == self.data.answer)

class SumTaskset(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self):
        for a in range(8):
            yield SumTask(Sum(prompt=f"{a}+{a}?", system_prompt="Be brief.", answer=str(2 * a)), self.config.task)

    @classmethod
    def toolsets(cls, config):
        return [Adder(vf.ToolsetConfig())]

__all__ = ["SumTaskset"]

if __name__ == "__main__":
    Adder.run()
'''
needs_package = pytest.mark.skipif(
    find_spec("verifiers") is None,
    reason="NO verifiers: its environments were not played; pip install 'verifiers>=0.4'",
)


@pytest.fixture
def sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "sums-v1"\nversion = "0"\n')
    (tmp_path / "sums_v1.py").write_text(TASKSET)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    yield "sums-v1"
    open_world.cache_clear()
    hosted_task._opening.cache_clear()


@pytest.mark.slow
@needs_package
def test_an_environment_of_the_package_is_played(shared: Path, sums: str) -> None:
    task = Verifiers(taskset=sums, held_out=2)
    assert [len(task.prompts(split)) for split in ("train", "validation", "test")] == [4, 2, 2]
    prompts = task.prompts("train")[:3]
    assert [message["content"] for message in prompts[1].messages or ()] == ["Be brief.", "1+1?"]
    (tool,) = prompts[1].tools or ()
    assert tool["function"]["name"] == "sums_add"
    think = "<think>\nhm\n</think>\n\n"
    turns = {
        prompts[0].id: [f"{think}0"],
        prompts[1].id: [think + as_call("sums_add", {"a": 1, "b": 1}), f"{think}2"],
        prompts[2].id: [think + as_call("multiply", {"a": 2}), f"{think}5"],
    }
    samples = played(shared, task, prompts, turns)
    assert [sample.finish for sample in samples] == ["stop"] * 3
    assert [sample.grade.score for sample in samples if sample.grade] == [1.0, 1.0, 0.0]
    assert [message["role"] for message in samples[1].messages] == ["assistant", "tool", "assistant"]
    assert samples[1].messages[1]["content"] == "2"
    assert "no tool 'multiply'" in str(samples[2].messages[1]["content"])
    with pytest.raises(DataError, match="8 tasks, of which 200 are held out"):
        Verifiers(taskset=sums).prompts("train")


@pytest.mark.slow
@needs_package
def test_what_the_package_cannot_open_is_said(sums: str) -> None:
    with pytest.raises(RecipeError, match="cannot be opened: ModuleNotFoundError"):
        Verifiers(taskset="no-such-taskset").prompts("train")
    with pytest.raises(RecipeError, match=r"cannot be opened: it takes more than task\.timeout_s = 0\.001 s"):
        Verifiers(taskset=sums, timeout_s=0.001).prompts("train")
    shell = {"agent": {"harness": {"id": "bash"}}}
    with pytest.raises(RecipeError, match="the harness bash runs what the student writes on this machine"):
        Verifiers(taskset=sums, env=shell).prompts("train")


@pytest.mark.skipif(find_spec("verifiers") is not None, reason="verifiers is installed")
def test_without_the_package_a_recipe_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"pip install 'understudy\[verifiers\]'"):
        Verifiers(taskset="gsm8k-v1").check_files()
