"""Environments behind a URL with the interface of OpenEnv: episodes, rewards, and servers that misbehave."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.integration.test_tool_tasks import played
from understudy.environments.openenv import Remote, Server, Session
from understudy.errors import EngineError
from understudy.tasks import OpenEnv
from understudy.types import Message

Answer = Callable[[dict[str, Any], dict[str, Any]], Any]


def guessing(asked: dict[str, Any], state: dict[str, Any]) -> Any:
    """A number from 0 to 9 to be guessed; each session has its own."""
    if asked["type"] == "reset":
        state["number"] = asked["data"]["seed"] % 10
        return seen({"text": f"Guess a number (episode {asked['data']['seed']})."})
    guess = asked["data"]["guess"].strip()
    if guess == str(state["number"]):
        return seen({"text": "right"}, reward=1.0, done=True)
    return seen({"text": "higher" if guess < str(state["number"]) else "lower"}, reward=-0.1)


def seen(observation: Any, reward: Any = None, done: bool = False) -> Any:
    return {"type": "observation", "data": {"observation": observation, "reward": reward, "done": done}}


@contextmanager
def served(answer: Answer) -> Iterator[str]:
    from websockets.sync.server import serve

    def session(socket: Any) -> None:
        state: dict[str, Any] = {}
        for text in socket:
            asked = json.loads(text)
            if asked["type"] == "close":
                return
            reply = answer(asked, state)
            socket.send(reply if isinstance(reply, str) else json.dumps(reply))

    with serve(session, "127.0.0.1", 0) as server:
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join(5)


def task_at(url: str, **options: Any) -> OpenEnv:
    fields = {"action_field": "guess", "observation_field": "text", "reward_low": -1.0, "timeout_s": 5.0}
    return OpenEnv(url=url, **fields | options)


def test_episodes_are_played_side_by_side(shared: Path) -> None:
    with served(guessing) as url:
        task = task_at(url, system="Answer with a number.")
        prompts = task.prompts("train")[3:6]
        assert [prompt.messages[-1]["content"] for prompt in prompts if prompt.messages] == [
            f"Guess a number (episode {seed})." for seed in (3, 4, 5)
        ]
        turns = {prompts[0].id: ["1", "9", "3"], prompts[1].id: ["4"], prompts[2].id: ["0"] * 20}
        samples = played(shared, task, prompts, turns)
    assert [sample.finish for sample in samples] == ["stop", "stop", "length"]
    assert [message["content"] for message in samples[0].messages] == ["1", "higher", "9", "lower", "3"]
    scores = [sample.grade.score for sample in samples if sample.grade is not None]
    assert scores == pytest.approx([(0.8 + 1) / 2, 1.0, 0.0], abs=1e-12)


def test_splits_have_seeds_of_their_own() -> None:
    with served(guessing) as url:
        task = task_at(url, episodes=4, held_out=2)
        ids = [prompt.id for split in ("train", "validation", "test") for prompt in task.prompts(split)]
    assert len(set(ids)) == 8
    assert task.prompts("train") is not None


@pytest.mark.parametrize(
    ("reply", "match"),
    [
        ({"type": "error", "data": {"message": "full", "code": "CAPACITY_REACHED"}}, "full"),
        (seen({"other": 1}), "no field 'text'; fields: other"),
        (seen({"text": "a"}, reward="high"), "no number"),
        (seen({"text": "a"}, reward=7.0), "not between reward_low"),
        (seen({"text": "a"}, reward=float("nan")), "not between reward_low"),
        ({"type": "observation", "data": {}}, "no observation"),
        ([], "no observation"),
        ("{oops", "cannot be asked"),
    ],
)
def test_servers_that_misbehave_are_named(reply: Any, match: str) -> None:
    with served(lambda asked, state: seen({"text": "go"}) if asked["type"] == "reset" else reply) as url:
        environment = task_at(url).environment(task_at(url).prompts("train")[0])
        with pytest.raises(EngineError, match=match):
            environment.step(Message("1", "1"))
        environment.close()


def test_a_server_that_is_silent_or_gone_is_named() -> None:
    def silent(asked: Any, state: Any) -> Any:
        Thread(target=lambda: None).start()
        import time

        time.sleep(1.5)
        return seen({"text": "late"})

    with served(silent) as url:
        session = Session(Server(url=url, timeout_s=0.3))
        with pytest.raises(EngineError, match=r"no answer to a reset within 0\.3 s"):
            session.reset({})
        session.close()
    with pytest.raises(EngineError, match="cannot be asked for a reset"):
        Remote(Server(url="http://127.0.0.1:1", timeout_s=1.0), {}).step(Message("1", "1"))


def test_an_observation_without_a_field_is_json() -> None:
    with served(lambda asked, state: seen({"board": [1, 2]})) as url:
        server = Server(url=url)
        session = Session(server)
        assert server.text(session.reset({})) == '{"board": [1, 2]}'
        session.close()
