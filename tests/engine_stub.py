"""A stand-in for vLLM's server (0.20 to 0.32) around a real tiny model: every id and log-probability is true.

with EngineStub(directory) as stub: ... stub.url ...             in this process
with StubProcess(directory) as stub: ... stub.kill() ...         a process of its own
python -m tests.engine_stub DIRECTORY --port 8000                the same by hand
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from tests.loopback import JSONHandler, Loopback, has_left
from tests.stub_model import LEAST, Response, StubModel, entries
from tests.stub_scheduler import ClientGone, Latency, Scheduler, Ticket, lognormal, uniform

VERSION = "0.32.0"


@dataclass(frozen=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: dict[str, Any]
    at_s: float
    """By `time.monotonic`."""


class Refused(Exception):  # noqa: N818 (a reply)
    """An error reply as vLLM writes it."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError", param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": status}}


class EngineStub:
    """Runs inside a `with`. Public attributes may be set at any time, also while it runs.

    `latency` before the first token and `token_latency` before each are functions of the request's number.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        port: int = 0,
        seed: int = 0,
        latency: Latency | None = None,
        token_latency: Latency | None = None,
        concurrency: int | None = None,
        stale_tied_head: bool = False,
    ) -> None:
        self.model = StubModel(model_dir)
        self.name = str(model_dir)
        self.seed, self.latency, self.token_latency = seed, latency, token_latency
        self.logprobs_mode = "raw_logprobs"
        self.max_logprobs = 20
        self.scale_out = False
        """`--enable-scale-out`: opens the route for token ids."""
        self.api_key = ""
        self.healthy = True
        self.ignore_pushes = False
        """Says that weights were loaded, and keeps its own."""
        self.num_pushes = 0
        self.asleep: set[str] = set()
        """Parts without memory; weights that were given up are gone."""
        self.requests: list[Request] = []
        self.scheduler = Scheduler(concurrency)
        if stale_tied_head:
            self.model.keep_head()
        self._lock = Lock()
        self._num_completions = 0
        self._server = Loopback(type("Handler", (_Handler,), {"stub": self}), port)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> EngineStub:
        self._server.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.scheduler.close()
        self._server.close()

    def asked(self, path: str) -> list[Request]:
        """Requests to a path so far."""
        with self._lock:
            return [request for request in self.requests if request.path == path]

    def answer(self, request: Request, gone: Callable[[], bool]) -> tuple[int, Any]:
        """Status and body. Raises Refused."""
        with self._lock:
            self.requests.append(request)
        if (
            self.api_key
            and request.path.startswith(("/v1", "/inference"))
            and request.headers.get("Authorization") != (f"Bearer {self.api_key}")
        ):
            return 401, {"error": "Unauthorized"}
        route = self._routes().get((request.method, request.path))
        if route is None:
            return 404, {"detail": "Not Found"}
        return route(request, gone)

    def _routes(self) -> dict[tuple[str, str], Callable[[Request, Callable[[], bool]], tuple[int, Any]]]:
        card = {"id": self.name, "object": "model", "owned_by": "vllm", "root": self.model.directory}
        card["max_model_len"] = self.model.num_positions
        return {
            ("GET", "/health"): lambda *_: (200 if self.healthy else 503, b""),
            ("GET", "/version"): lambda *_: (200, {"version": VERSION}),
            ("GET", "/v1/models"): lambda *_: (200, {"object": "list", "data": [card]}),
            ("GET", "/server_info"): self._server_info,
            ("GET", "/is_paused"): lambda *_: (200, {"is_paused": self.scheduler.paused is not None}),
            ("POST", "/pause"): self._pause,
            ("POST", "/resume"): self._resume,
            ("POST", "/sleep"): self._sleep,
            ("POST", "/wake_up"): self._wake_up,
            ("GET", "/is_sleeping"): lambda *_: (200, {"is_sleeping": bool(self.asleep)}),
            ("POST", "/reset_prefix_cache"): lambda *_: (200, {"success": not self.scheduler.running}),
            ("POST", "/collective_rpc"): self._collective_rpc,
            ("POST", "/v1/completions"): self._completions,
            ("POST", "/inference/v1/generate"): self._generate,
        }

    def _server_info(self, request: Request, _: object) -> tuple[int, Any]:
        config: Any = {
            "model_config": {
                "model": self.model.directory,
                "max_model_len": self.model.num_positions,
                "logprobs_mode": self.logprobs_mode,
                "max_logprobs": self.max_logprobs,
                "dtype": str(self.model.model.dtype),
            }
        }
        as_json = request.query.get("config_format") == "json"
        return 200, {"vllm_config": config if as_json else str(config), "vllm_env": {}, "system_env": {}}

    def _pause(self, request: Request, _: object) -> tuple[int, Any]:
        mode = request.query.get("mode", "abort")
        if mode not in ("abort", "wait", "keep"):
            return 422, {"detail": [{"loc": ["query", "mode"], "msg": "Input should be 'abort', 'wait' or 'keep'"}]}
        self.scheduler.pause(mode)
        return 200, {"status": "paused"}

    def _resume(self, *_: object) -> tuple[int, Any]:
        self.scheduler.resume()
        return 200, {"status": "resumed"}

    def _sleep(self, request: Request, _: object) -> tuple[int, Any]:
        if self.scheduler.running or self.asleep:
            return 500, {"error": "requests are running, or it sleeps"}
        self.asleep = {"weights", "kv_cache"}
        if request.query.get("level", "1") == "2":
            self.model.clear()
        return 200, {"status": "sleeping", "level": int(request.query.get("level", "1"))}

    def _wake_up(self, request: Request, _: object) -> tuple[int, Any]:
        self.asleep.discard(request.query["tags"])
        return 200, {"status": "sleeping" if self.asleep else "awake", "tags": [request.query["tags"]]}

    def _collective_rpc(self, request: Request, _: object) -> tuple[int, Any]:
        """`weights_path`, by name or as the second argument, as the worker's `reload_weights` takes it."""
        if request.body.get("method") is None:
            return 400, {"detail": "Missing 'method' in request body"}
        if request.body["method"] != "reload_weights":
            raise Refused(501, f"Method {request.body['method']!r} is not implemented.", "NotImplementedError")
        if "weights" in self.asleep:
            raise Refused(500, "CUDA error: an illegal memory access was encountered", "InternalServerError")
        args, kwargs = request.body.get("args") or [], dict(request.body.get("kwargs") or {})
        kwargs |= dict(zip(("weights_iterator", "weights_path", "is_checkpoint_format"), args, strict=False))
        unknown = set(kwargs) - {"weights_iterator", "weights_path", "is_checkpoint_format"}
        if unknown:
            raise Refused(500, f"reload_weights() got an unexpected keyword argument {unknown.pop()!r}", "TypeError")
        if not self.ignore_pushes:
            self.model.reload(kwargs.get("weights_path"))
        self.num_pushes += 1
        return 200, {"results": [None]}

    def _completions(self, request: Request, gone: Callable[[], bool]) -> tuple[int, Any]:
        with self._lock:
            number = self._num_completions
            self._num_completions += 1
        if self.asleep:
            raise Refused(500, "CUDA error: an illegal memory access was encountered", "InternalServerError")
        body = {"n": 1, "echo": False, "logprobs": None, "prompt_logprobs": None} | request.body
        body["max_tokens"] = 16 if body.get("max_tokens") is None else body["max_tokens"]
        body["logprobs_mode"] = self.logprobs_mode
        prompts = self._prompts(body)
        top = body["prompt_logprobs"]
        if top is None and body["echo"]:
            top = body["logprobs"]
        ticket = Ticket(gone)
        try:
            self.scheduler.admit(ticket)
            going = self.scheduler.rest(ticket, self.latency(number) if self.latency else 0.0)
            scores = [self._score(ids, top) if going and top is not None else None for ids in prompts]
            responses = [
                [Response(self.model, ids, body, self._seed(body, number, place) + index) for index in range(body["n"])]
                for place, ids in enumerate(prompts)
            ]
            self._write(ticket, [one for group in responses for one in group], number)
        finally:
            self.scheduler.leave(ticket)
        choices = [
            self._choice(body, ids, response, score)
            for ids, group, score in zip(prompts, responses, scores, strict=True)
            for response in group
        ]
        read, written = sum(map(len, prompts)), sum(len(one.ids) for group in responses for one in group)
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        reply = {"id": f"cmpl-{number}", "object": "text_completion", "created": int(time.time()), "model": self.name}
        numbered = [{"index": index} | choice for index, choice in enumerate(choices)]
        return 200, reply | {"choices": numbered, "usage": usage}

    def _generate(self, request: Request, gone: Callable[[], bool]) -> tuple[int, Any]:
        """One sequence in and out as token ids."""
        if not self.scale_out:
            message = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
            raise Refused(403, message, "PermissionDeniedError")
        params = request.body["sampling_params"]
        body = {"model": request.body.get("model"), "prompt": request.body["token_ids"], "return_token_ids": True}
        status, reply = self._completions(replace(request, body=params | body), gone)
        scores = reply["choices"][0]["prompt_logprobs"]
        if not params.get("detokenize", True):
            scores = [
                row and {id_: entry | {"decoded_token": None} for id_, entry in row.items()} for row in scores or ()
            ]
        echoed = reply["choices"][0]["prompt_token_ids"] if request.body.get("return_token_ids") else None
        choices = [{name: one[name] for name in ("index", "finish_reason", "token_ids")} for one in reply["choices"]]
        found = {"choices": choices, "prompt_logprobs": scores or None, "prompt_token_ids": echoed}
        return status, found | {"prompt_token_id_logprobs": None, "model": self.name, "usage": reply["usage"]}

    def _seed(self, body: dict[str, Any], number: int, place: int) -> int:
        """vLLM gives every prompt of a request the same seed, and its n-th response that seed plus n."""
        if body.get("seed") is not None:
            return int(body["seed"])
        return random.Random(f"{self.seed}/{number}/{place}").getrandbits(60)

    def _write(self, ticket: Ticket, responses: list[Response], number: int) -> None:
        """All responses of a request side by side, until each has ended or the request is aborted."""
        token_s = self.token_latency(number) if self.token_latency else 0.0
        while live := [response for response in responses if response.finish is None]:
            if not self.scheduler.rest(ticket, token_s):
                for response in live:
                    response.finish = "abort"
                return
            for response in live:
                response.step()

    def _score(self, ids: list[int], top: int) -> list[dict[str, Any] | None]:
        rows = self.model.prompt_logp(ids)
        pieces = self.model.pieces
        return [None, *(entries(row, token, top, pieces) for row, token in zip(rows, ids[1:], strict=True))]

    def _choice(
        self, body: dict[str, Any], prompt: list[int], response: Response, scores: list[dict[str, Any] | None] | None
    ) -> dict[str, Any]:
        ids, places = response.ids, []
        if body["logprobs"] is not None:
            places = [
                entries(row, id_, body["logprobs"], self.model.pieces)
                for row, id_ in zip(response.rows, ids, strict=True)
            ]
        # vLLM writes one token for echo with max_tokens 0, and shows it in token_ids alone
        only_echo = body["echo"] and body["max_tokens"] == 0
        shown = prompt if only_echo else [*prompt, *ids] if body["echo"] else ids
        if body["echo"]:
            places = [*(scores or []), *([] if only_echo else places)]
        ended = response.finish == "stop" and not only_echo
        return {
            "text": self.model.tokenizer.decode(shown[:-1] if ended else shown, skip_special_tokens=True),
            "logprobs": None if body["logprobs"] is None else self._logprobs(body, shown, places),
            "finish_reason": response.finish,
            "stop_reason": response.stop_reason,
            "token_ids": ids if body.get("return_token_ids") else None,
            "prompt_logprobs": scores,
            "prompt_token_ids": prompt if body.get("return_token_ids") else None,
        }

    def _logprobs(self, body: dict[str, Any], ids: list[int], places: list[Any]) -> dict[str, Any]:
        as_id = body.get("return_tokens_as_token_ids")
        name: Callable[[int], str] = lambda id_: f"token_id:{id_}" if as_id else self.model.pieces[id_]  # noqa: E731
        tokens = [name(id_) for id_ in ids]
        value = [place and max(place[str(id_)]["logprob"], LEAST) for id_, place in zip(ids, places, strict=True)]
        top = [place and {name(int(key)): entry["logprob"] for key, entry in place.items()} for place in places]
        offsets = [sum(map(len, tokens[:index])) for index in range(len(tokens))]
        return {"tokens": tokens, "token_logprobs": value, "top_logprobs": top, "text_offset": offsets}

    def _prompts(self, body: dict[str, Any]) -> list[list[int]]:
        """Lists of ids. Raises Refused as vLLM's checks do."""
        if body.get("model") not in (None, self.name):
            raise Refused(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
        if body.get("stream"):
            raise Refused(400, "this stub does not stream")
        prompt = body.get("prompt")
        if not prompt:
            raise Refused(400, "Either prompt or prompt_embeds must be provided and non-empty.", param="prompt")
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        prompts = [
            self.model.tokenizer(one)["input_ids"] if isinstance(one, str) else one
            for one in (prompt if several else [prompt])
        ]
        if body["max_tokens"] < 1 and not body["echo"]:
            raise Refused(400, f"max_tokens must be at least 1, got {body['max_tokens']}.", param="max_tokens")
        limit, size = self.model.num_positions, len(self.model.pieces)
        for name in ("logprobs", "prompt_logprobs"):
            wanted = size if body[name] == -1 else body[name] or 0
            if self.max_logprobs != -1 and wanted > self.max_logprobs:
                message = f"Requested {name} of {wanted}, which is greater than max allowed: {self.max_logprobs}"
                raise Refused(400, message, param=name)
        for ids in prompts:
            if len(ids) + max(1, body["max_tokens"]) > limit:
                message = f"This model's maximum context length is {limit} tokens. However, you requested "
                message += f"{body['max_tokens']} output tokens and your prompt contains {len(ids)} input tokens."
                raise Refused(400, message, param="input_tokens")
            if max(ids) >= size:
                raise Refused(400, f"Token id {max(ids)} is out of vocabulary", param="prompt")
        return prompts


class _Handler(JSONHandler):
    stub: EngineStub

    def do_GET(self) -> None:  # noqa: N802
        self._answer("GET")

    def do_POST(self) -> None:  # noqa: N802
        self._answer("POST")

    def _answer(self, method: str) -> None:
        content = self.read_body()
        url = urlsplit(self.path)
        query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        try:
            body = json.loads(content) if content else {}
            request = Request(method, url.path, query, dict(self.headers), body, time.monotonic())
            status, reply = self.stub.answer(request, lambda: has_left(self.connection))
        except Refused as refused:
            status, reply = refused.status, refused.body
        except ClientGone:
            self.close_connection = True
            return
        except Exception as error:
            status, reply = 500, Refused(500, f"{type(error).__name__}: {error}", "InternalServerError").body
        self.send(status, reply)


def _latency(text: str) -> Latency:
    """`uniform:LOW:HIGH` or `lognormal:MEDIAN:SIGMA`, each with `:SEED`."""
    kind, *numbers = text.split(":")
    made = {"uniform": uniform, "lognormal": lognormal}[kind]
    return made(float(numbers[0]), float(numbers[1]), seed=int(numbers[2]) if numbers[2:] else 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.engine_stub", description="vLLM's server, as a stub.")
    parser.add_argument("model_dir")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--latency", type=_latency, help=_latency.__doc__)
    parser.add_argument("--token-latency", type=_latency, help=_latency.__doc__)
    parser.add_argument("--concurrency", type=int)
    parser.add_argument("--logprobs-mode", default="raw_logprobs")
    parser.add_argument("--max-logprobs", type=int, default=20)
    parser.add_argument("--stale-tied-head", action="store_true")
    parser.add_argument("--ignore-pushes", action="store_true")
    options = vars(parser.parse_args())
    late = {name: options.pop(name) for name in ("logprobs_mode", "max_logprobs", "ignore_pushes")}
    torch.set_num_threads(1)
    with EngineStub(options.pop("model_dir"), **options) as stub:
        for name, value in late.items():
            setattr(stub, name, value)
        print(f"ready {stub.url}", flush=True)
        Event().wait()


if __name__ == "__main__":
    main()
