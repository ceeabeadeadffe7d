"""What the tests of engines stand on: the stub says what its model says, the proxy does what it is told, leaks are seen."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.engine_stub import EngineStub
from tests.faults import (
    DEAD,
    HALF,
    HANG,
    NAN,
    NULL,
    PASS,
    TRUNCATED,
    WRONG_IDS,
    FaultProxy,
    latency,
    reset,
    seeded,
    status,
)
from tests.leaks import nothing_left
from tests.processes import stub as stub_process
from tests.runs import BUILD
from tests.stub_scheduler import lognormal, uniform
from tests.tiny_models import EOS, letters, plain_logp
from tests.tiny_models import request as ask_for
from understudy.engines import HFEngine
from understudy.models import build_causal_lm, load_causal_lm, save_hf
from understudy.types import Sampling

pytestmark = pytest.mark.slow

CLOSE = 1e-5
PROMPTS = [[5, 6, 7], [8, 9], [4, 3, 2, 10, 11]]
PATIENCE_S = 20.0


def save(path: Path, *, tied: bool = False, seed: int = 0) -> str:
    model = build_causal_lm(
        BUILD | {"tie_word_embeddings": tied}, vocab_size=40, eos_token_id=EOS, pad_token_id=0, seed=seed
    )
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    save_hf(model, letters(), path)
    return str(path)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture
def stub(model_dir: str) -> Iterator[EngineStub]:
    with EngineStub(model_dir) as stub:
        yield stub


def post(url: str, client: httpx.Client, **body: Any) -> Any:
    """The JSON of a completion."""
    given = {"prompt": PROMPTS[0], "max_tokens": 12, "logprobs": 0, "return_token_ids": True, "seed": 1} | body
    return client.post(f"{url}/v1/completions", json=given).raise_for_status().json()


def push(stub: EngineStub, client: httpx.Client, directory: str) -> httpx.Response:
    body = {"method": "reload_weights", "kwargs": {"weights_path": directory}}
    return client.post(f"{stub.url}/collective_rpc", json=body)


def scores(url: str, client: httpx.Client, ids: list[int]) -> torch.Tensor:
    """Of tokens 1 to L - 1."""
    places = post(url, client, prompt=ids, max_tokens=1, prompt_logprobs=0)["choices"][0]["prompt_logprobs"]
    return torch.tensor([place[str(id_)]["logprob"] for id_, place in zip(ids[1:], places[1:], strict=True)])


def expected(model_dir: str, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    logp = plain_logp(load_causal_lm(model_dir), torch.tensor(ids), temperature)
    return logp.gather(-1, torch.tensor(ids)[1:, None]).squeeze(-1)


def test_scores_are_those_of_a_plain_forward(model_dir: str, stub: EngineStub, client: httpx.Client) -> None:
    reply = post(stub.url, client, prompt=PROMPTS, max_tokens=1, prompt_logprobs=5)
    model = load_causal_lm(model_dir)
    for ids, choice in zip(PROMPTS, reply["choices"], strict=True):
        assert choice["prompt_token_ids"] == ids
        first, *places = choice["prompt_logprobs"]
        assert first is None
        logp = plain_logp(model, torch.tensor(ids))
        for token, row, place in zip(ids[1:], logp, places, strict=True):
            assert next(iter(place)) == str(token)
            top = row.topk(5)
            assert set(map(int, place)) == {token, *top.indices.tolist()}
            for key, entry in place.items():
                assert entry["logprob"] == pytest.approx(float(row[int(key)]), abs=CLOSE)
                assert entry["rank"] == 1 + int((row > row[int(key)]).sum())


def test_greedy_tokens_are_those_of_our_own_engine(model_dir: str, stub: EngineStub, client: httpx.Client) -> None:
    engine = HFEngine(load_causal_lm(model_dir), letters(), seed=0, stop_ids=(EOS,), vocab_size=40)
    requests = [ask_for(str(number), ids) for number, ids in enumerate(PROMPTS)]
    ours = engine.generate(requests, Sampling(temperature=0.0, max_new_tokens=20), step=0)
    reply = post(stub.url, client, prompt=PROMPTS, max_tokens=20, temperature=0.0)
    for sample, choice in zip(ours, reply["choices"], strict=True):
        assert choice["token_ids"] == sample.token_ids[sample.prompt_length :].tolist()
        assert choice["finish_reason"] == sample.finish
        assert sample.rollout_logprob is not None
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(
            sample.rollout_logprob[sample.prompt_length :].tolist(), abs=CLOSE
        )


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_sampled_logprobs_follow_the_mode(mode: str, model_dir: str, stub: EngineStub, client: httpx.Client) -> None:
    stub.logprobs_mode = mode
    choice = post(stub.url, client, temperature=0.5)["choices"][0]
    ids = PROMPTS[0] + choice["token_ids"]
    wanted = expected(model_dir, ids, 0.5 if mode == "processed_logprobs" else 1.0)[len(PROMPTS[0]) - 1 :]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(wanted.tolist(), abs=CLOSE)


def test_a_seed_decides_and_children_differ(stub: EngineStub, client: httpx.Client) -> None:
    def tokens(**body: Any) -> list[list[int]]:
        return [choice["token_ids"] for choice in post(stub.url, client, **body)["choices"]]

    assert tokens(n=3) == tokens(n=3)
    assert tokens(n=3)[2] == tokens(seed=3)[0]
    assert len({str(ids) for ids in tokens(n=8)}) > 1
    assert tokens(seed=1) != tokens(seed=2)


def test_sampling_follows_the_distribution(model_dir: str, stub: EngineStub, client: httpx.Client) -> None:
    """Frequencies of first tokens under temperature and top-k; six standard errors."""
    count, top = 600, 4
    reply = post(stub.url, client, n=count, max_tokens=1, temperature=2.0, top_k=top)
    firsts = torch.tensor([choice["token_ids"][0] for choice in reply["choices"]])
    logits = plain_logp(load_causal_lm(model_dir), torch.tensor([*PROMPTS[0], 0]), 2.0)[-1]
    kept = logits.topk(top)
    assert set(firsts.tolist()) <= set(kept.indices.tolist())
    wanted = kept.values.softmax(-1)
    found = torch.stack([(firsts == index).float().mean() for index in kept.indices])
    assert bool(((found - wanted).abs() < 6 * (wanted * (1 - wanted) / count).sqrt() + 1e-9).all())


def test_a_bias_forbids_a_token(stub: EngineStub, client: httpx.Client) -> None:
    """vLLM's raw log-probabilities do not see it, its processed ones do."""
    free = post(stub.url, client, temperature=0.0)["choices"][0]
    first = free["token_ids"][0]
    biased = post(stub.url, client, temperature=0.0, logit_bias={str(first): -100.0}, logprobs=1)["choices"][0]
    assert biased["token_ids"][0] != first
    assert max(biased["logprobs"]["top_logprobs"][0].values()) == pytest.approx(free["logprobs"]["token_logprobs"][0])


def test_how_responses_end(stub: EngineStub, client: httpx.Client) -> None:
    whole = post(stub.url, client, ignore_eos=True)["choices"][0]
    assert (whole["finish_reason"], len(whole["token_ids"])) == ("length", 12)
    stop = whole["token_ids"][4]
    cut = post(stub.url, client, ignore_eos=True, stop_token_ids=[stop])["choices"][0]
    assert cut["token_ids"] == whole["token_ids"][: whole["token_ids"].index(stop) + 1]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", stop)
    ended = post(stub.url, client, n=40, max_tokens=30)["choices"]
    by_eos = [choice for choice in ended if choice["finish_reason"] == "stop"]
    assert by_eos
    assert all(choice["token_ids"][-1] == EOS and choice["stop_reason"] is None for choice in by_eos)


def test_echo_scores_the_prompt(model_dir: str, stub: EngineStub, client: httpx.Client) -> None:
    choice = post(stub.url, client, prompt=PROMPTS[2], echo=True, max_tokens=0, return_tokens_as_token_ids=True)
    logprobs = choice["choices"][0]["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{id_}" for id_ in PROMPTS[2]]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected(model_dir, PROMPTS[2]).tolist(), abs=CLOSE)


def test_wrong_requests_are_refused(stub: EngineStub, client: httpx.Client) -> None:
    def refusal(**body: Any) -> int:
        return client.post(f"{stub.url}/v1/completions", json={"prompt": [3], "max_tokens": 1} | body).status_code

    assert refusal() == 200
    assert refusal(model="other") == 404
    assert refusal(prompt=[3] * 64) == 400
    assert refusal(prompt=[40]) == 400
    assert refusal(prompt=[]) == 400
    assert refusal(prompt_logprobs=21) == 400
    assert client.get(f"{stub.url}/nothing").status_code == 404
    stub.api_key = "secret"
    assert refusal() == 401


def test_what_servers_say_of_themselves(stub: EngineStub, client: httpx.Client) -> None:
    assert client.get(f"{stub.url}/health").status_code == 200
    assert client.get(f"{stub.url}/version").json()["version"]
    card = client.get(f"{stub.url}/v1/models").json()["data"][0]
    assert (card["id"], card["max_model_len"]) == (stub.name, 64)
    info = client.get(f"{stub.url}/server_info", params={"config_format": "json"}).json()
    assert info["vllm_config"]["model_config"]["logprobs_mode"] == "raw_logprobs"
    assert [request.path for request in stub.requests] == ["/health", "/version", "/v1/models", "/server_info"]


def wait_for(condition: Any) -> None:
    until = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_abort_returns_what_there_is(model_dir: str, client: httpx.Client) -> None:
    """And a request that comes during the pause waits until it ends."""
    with EngineStub(model_dir, token_latency=uniform(0.05, 0.05)) as stub, ThreadPoolExecutor(2) as pool:
        early = pool.submit(post, stub.url, client, ignore_eos=True, max_tokens=50)
        wait_for(lambda: stub.scheduler.running)
        time.sleep(0.3)
        assert client.post(f"{stub.url}/pause").json() == {"status": "paused"}
        choice = early.result(PATIENCE_S)["choices"][0]
        assert choice["finish_reason"] == "abort"
        assert 0 < len(choice["token_ids"]) == len(choice["logprobs"]["token_logprobs"]) < 50
        assert client.get(f"{stub.url}/is_paused").json() == {"is_paused": True}
        stub.token_latency = None
        late = pool.submit(post, stub.url, client, ignore_eos=True)
        wait_for(lambda: stub.scheduler.waiting)
        client.post(f"{stub.url}/resume")
        whole = late.result(PATIENCE_S)["choices"][0]
        assert whole["finish_reason"] == "length"
        assert (
            choice["token_ids"]
            == post(stub.url, client, ignore_eos=True, max_tokens=50)["choices"][0]["token_ids"][
                : len(choice["token_ids"])
            ]
        )


@pytest.mark.parametrize("mode", ["wait", "keep"])
def test_pauses_that_lose_nothing(mode: str, model_dir: str, client: httpx.Client) -> None:
    with EngineStub(model_dir, token_latency=uniform(0.01, 0.01)) as stub, ThreadPoolExecutor(1) as pool:
        plain = post(stub.url, client, ignore_eos=True)["choices"][0]["token_ids"]
        reply = pool.submit(post, stub.url, client, ignore_eos=True)
        wait_for(lambda: stub.scheduler.running)
        client.post(f"{stub.url}/pause", params={"mode": mode})
        assert bool(stub.scheduler.running) == (mode == "keep")
        client.post(f"{stub.url}/resume")
        assert reply.result(PATIENCE_S)["choices"][0]["token_ids"] == plain


def test_a_client_that_leaves_ends_its_request(model_dir: str, client: httpx.Client) -> None:
    with EngineStub(model_dir, token_latency=uniform(0.2, 0.2)) as stub:
        with pytest.raises(httpx.ReadTimeout):
            client.post(f"{stub.url}/v1/completions", json={"prompt": [3], "max_tokens": 60}, timeout=0.1)
        wait_for(lambda: not stub.scheduler.running)


def test_a_limit_on_requests_at_a_time(model_dir: str, client: httpx.Client) -> None:
    with EngineStub(model_dir, concurrency=2, latency=uniform(0.05, 0.05)) as stub, ThreadPoolExecutor(6) as pool:
        replies = [pool.submit(post, stub.url, client, max_tokens=1) for _ in range(6)]
        most = 0
        while not all(reply.done() for reply in replies):
            most = max(most, len(stub.scheduler.running))
            time.sleep(0.002)
        assert most == 2


def test_latencies_are_a_function_of_the_number() -> None:
    for make in (lambda seed: uniform(1.0, 2.0, seed=seed), lambda seed: lognormal(1.0, 0.5, seed=seed)):
        assert [make(1)(n) for n in range(5)] == [make(1)(n) for n in range(5)] != [make(2)(n) for n in range(5)]
        assert min(make(0)(n) for n in range(100)) > 0


def test_new_weights(tmp_path: Path, stub: EngineStub, client: httpx.Client) -> None:
    other = save(tmp_path, seed=1)
    before = scores(stub.url, client, PROMPTS[2])
    stub.ignore_pushes = True
    assert push(stub, client, other).json() == {"results": [None]}
    assert torch.equal(scores(stub.url, client, PROMPTS[2]), before)
    stub.ignore_pushes = False
    push(stub, client, other)
    after = scores(stub.url, client, PROMPTS[2])
    torch.testing.assert_close(after, expected(other, PROMPTS[2]), rtol=0, atol=CLOSE)
    assert not torch.allclose(before, after, atol=0.01)
    assert push(stub, client, str(tmp_path / "none")).status_code == 500


def test_a_stale_tied_head(tmp_path: Path, client: httpx.Client) -> None:
    """The trap: a directory of a tied model has no `lm_head.weight`, and an engine with a copy of its own keeps that."""
    old, new = save(tmp_path / "old", tied=True), save(tmp_path / "new", tied=True, seed=1)
    state = load_file(Path(new) / "model.safetensors")
    assert "lm_head.weight" not in state
    complete = tmp_path / "complete"
    complete.mkdir()
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, complete / "model.safetensors")
    wanted = expected(new, PROMPTS[2])
    for stale in (False, True):
        with EngineStub(old, stale_tied_head=stale) as stub:
            push(stub, client, new)
            right = torch.allclose(scores(stub.url, client, PROMPTS[2]), wanted, atol=CLOSE)
            assert right is not stale
            push(stub, client, str(complete))
            torch.testing.assert_close(scores(stub.url, client, PROMPTS[2]), wanted, rtol=0, atol=CLOSE)


def test_as_a_process_it_can_be_killed(model_dir: str, tmp_path: Path, client: httpx.Client) -> None:
    with nothing_left(), stub_process(model_dir, tmp_path / "log", "--seed", "3") as server:
        url, wanted = server.url, expected(model_dir, PROMPTS[2])
        torch.testing.assert_close(scores(url, client, PROMPTS[2]), wanted, rtol=0, atol=CLOSE)
        server.kill()
        with pytest.raises(httpx.TransportError):
            client.get(f"{url}/health")
        server.start()
        assert server.url == url
        torch.testing.assert_close(scores(url, client, PROMPTS[2]), wanted, rtol=0, atol=CLOSE)


def test_nothing_is_left_of_stub_and_proxy(model_dir: str) -> None:
    with nothing_left(), EngineStub(model_dir) as stub, FaultProxy(stub.url, [HANG]) as proxy, httpx.Client() as client:
        with pytest.raises(httpx.ReadTimeout):
            client.get(f"{proxy.url}/health", timeout=0.1)
        assert client.get(f"{proxy.url}/health").status_code == 200


ERRORS: list[tuple[Any, type[Exception]]] = [
    (reset(), httpx.TransportError),
    (reset(middle=True), httpx.TransportError),
    (HALF, httpx.RemoteProtocolError),
    (HANG, httpx.ReadTimeout),
    (latency(5.0), httpx.ReadTimeout),
    (TRUNCATED, json.JSONDecodeError),
]


@pytest.mark.parametrize(("fault", "error"), ERRORS, ids=[fault.kind for fault, _ in ERRORS])
def test_faults_that_a_client_meets(fault: Any, error: type[Exception], stub: EngineStub, client: httpx.Client) -> None:
    with FaultProxy(stub.url, [fault]) as proxy:
        with pytest.raises(error):
            client.get(f"{proxy.url}/version", timeout=0.3).json()
        assert client.get(f"{proxy.url}/version").json() == client.get(f"{stub.url}/version").json()
        assert proxy.seen == {fault.kind: 1, "pass": 1}


def test_a_reset_is_a_reset(stub: EngineStub) -> None:
    with FaultProxy(stub.url, [reset()]) as proxy, socket.create_connection(("127.0.0.1", proxy.port)) as plain:
        plain.settimeout(PATIENCE_S)
        plain.sendall(b"GET /version HTTP/1.1\r\nHost: a\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            plain.recv(1)


def test_statuses(stub: EngineStub, client: httpx.Client) -> None:
    with FaultProxy(stub.url, [status(429, retry_after_s=2), status(500), status(503), latency(0.01)]) as proxy:
        replies = [client.get(f"{proxy.url}/version") for _ in range(4)]
    assert [reply.status_code for reply in replies] == [429, 500, 503, 200]
    assert replies[0].headers["Retry-After"] == "2"
    assert "Retry-After" not in replies[1].headers


def test_wrong_ids_and_numbers(stub: EngineStub, client: httpx.Client) -> None:
    body = {"prompt_logprobs": 2, "temperature": 0.0, "return_tokens_as_token_ids": True}
    with FaultProxy(stub.url, [WRONG_IDS, NAN, NULL], only="completions") as proxy:
        assert client.get(f"{proxy.url}/health").status_code == 200
        wrong, nan, null, right = (post(proxy.url, client, **body)["choices"][0] for _ in range(4))
    for name in ("token_ids", "prompt_token_ids"):
        assert wrong[name][:-1] == right[name][:-1]
        assert wrong[name][-1] != right[name][-1]
    assert wrong["logprobs"]["tokens"][-1] == f"token_id:{wrong['token_ids'][-1]}"
    last = PROMPTS[0][-1]
    assert str(last) in right["prompt_logprobs"][-1]
    assert next(iter(wrong["prompt_logprobs"][-1])) != str(last)
    assert len(wrong["prompt_logprobs"][-1]) == len(right["prompt_logprobs"][-1])
    assert nan["logprobs"]["token_logprobs"][-1] != nan["logprobs"]["token_logprobs"][-1]
    assert nan["prompt_logprobs"][-1][str(last)]["logprob"] != nan["prompt_logprobs"][-1][str(last)]["logprob"]
    assert null["logprobs"]["token_logprobs"][-1] is None is null["prompt_logprobs"][-1][str(last)]["logprob"]


def test_death_and_revival(stub: EngineStub, client: httpx.Client) -> None:
    with nothing_left(), FaultProxy(stub.url, [PASS, DEAD]) as proxy, httpx.Client() as mine:
        assert mine.get(f"{proxy.url}/health").status_code == 200
        with pytest.raises(httpx.TransportError):
            mine.get(f"{proxy.url}/health")
        wait_for(lambda: proxy._place is not None)
        with pytest.raises(httpx.ConnectError):
            mine.get(f"{proxy.url}/health")
        proxy.revive()
        assert mine.get(f"{proxy.url}/health").status_code == 200


def test_a_server_that_is_not_there_is_a_502(client: httpx.Client) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with FaultProxy(f"http://127.0.0.1:{taken.getsockname()[1]}") as proxy:
            assert client.get(f"{proxy.url}/health").status_code == 502


def test_seeded_faults_come_again() -> None:
    plan = seeded(3, [reset(), HALF], share=0.4)
    assert [plan(n, b"") for n in range(50)] == [plan(n, b"") for n in range(50)]
    kinds = [plan(n, b"").kind for n in range(500)]
    assert 0.3 < 1 - kinds.count("pass") / 500 < 0.5
    assert kinds.count("reset") > 50 < kinds.count("half")


def test_what_is_left_is_named() -> None:
    go_on = threading.Event()
    thread = threading.Thread(target=go_on.wait, args=(PATIENCE_S,), name="forgotten")
    with pytest.raises(AssertionError, match="thread forgotten"), nothing_left(0.1):
        thread.start()
    go_on.set()
    thread.join()

    process = None
    with pytest.raises(AssertionError, match=r"process \d+ .*sleep"), nothing_left(0.1):
        process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    assert process is not None
    process.kill()
    process.wait(PATIENCE_S)

    with socket.socket() as listening, pytest.raises(AssertionError, match="listens on port"), nothing_left(0.1):
        listening.bind(("127.0.0.1", 0))
        listening.listen()


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no shared memory in a directory here")
def test_shared_memory_that_is_left_is_named() -> None:
    segment = Path("/dev/shm/understudy-forgotten")
    try:
        with pytest.raises(AssertionError, match="understudy-forgotten"), nothing_left(0.1):
            segment.write_bytes(b"0")
    finally:
        segment.unlink()


def test_an_error_goes_before_what_is_left() -> None:
    with pytest.raises(KeyError), nothing_left():
        raise KeyError


def test_what_ends_in_time_is_not_left() -> None:
    with nothing_left():
        threading.Thread(target=time.sleep, args=(0.3,)).start()
