"""Sampling by vLLM servers: token ids in, token ids out, with weights that are pushed and then checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Condition, Lock
from typing import Any

from understudy.engines.base import Probe, Weights
from understudy.engines.requests import Response, open_responses, to_samples
from understudy.engines.sections import EngineSetup
from understudy.engines.vllm.check import DisagreesError, PushCheck
from understudy.engines.vllm.replies import read_choices
from understudy.engines.vllm.servers import Servers
from understudy.engines.vllm.settings import PROCESSED, RAW, VLLM, check_temperature, logprobs_modes, promises
from understudy.engines.vllm.weights import NCCLTransfer, WeightStore, with_head
from understudy.errors import EngineError, RecipeError, WeightsLostError
from understudy.http.replies import Refused
from understudy.lazy import torch
from understudy.models import unwrap
from understudy.randomness import hash_name
from understudy.types import Request, Sample, Sampling

FLOAT32_GAP = 1e-3
"""Mean nats between two engines with the same weights in float32: 5e-7 was measured, other kernels may add up to 1e-4."""
HALF_GAP = 0.05
"""The same where one of them computes in 16 bits: 5e-3 was measured on a small model, and depth adds to it."""
MAX_BIASED = 1024
"""Rows beyond the vocabulary that are forbidden by `logit_bias`; with more, the bias would be most of every request."""
FORBID = -100.0
"""The lowest bias that vLLM takes; 4e-44 of a token's probability is left."""
MAX_FRUITLESS = 20
"""Replies in a row without a token, of which each push may cause a few."""

REMIND_S = 0.5
"""Between two requests to pause while the last replies are waited for."""


class Gate:
    """Open: requests pass, and learn the version that answers them. Closed: they wait until it is open or broken."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._changed = Condition()
        self._open = False
        self._error: str | None = None
        self._num_inside = 0
        self.version = -1
        """Version of the weights; -1 before the first push."""

    @contextmanager
    def passing(self) -> Iterator[int]:
        """Yields the version. Raises EngineError if the gate is broken, or does not open in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._open or self._error is not None, self._timeout_s)
            if self._error is not None:
                raise EngineError(self._error)
            if not self._open:
                raise EngineError(f"no weights were pushed to the rollout engine within {self._timeout_s:g} s")
            self._num_inside += 1
            version = self.version
        try:
            yield version
        finally:
            with self._changed:
                self._num_inside -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """Lets nothing pass any more; requests that are inside go on."""
        with self._changed:
            self._open = False

    def drain(self, remind: Callable[[], None]) -> None:
        """Returns when nothing is inside; calls `remind` every `REMIND_S`. Raises EngineError when that takes too long."""
        until = time.monotonic() + self._timeout_s
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: self._num_inside == 0, REMIND_S):
                    return
                if self._error is not None:
                    raise EngineError(self._error)
            if time.monotonic() > until:
                raise EngineError(
                    f"{self._num_inside} requests to the rollout engine did not end in {self._timeout_s:g} s"
                )
            remind()

    def open(self, version: int) -> None:
        """Lets requests pass again, unless it is broken."""
        with self._changed:
            self.version, self._open = version, self._error is None
            self._changed.notify_all()

    def break_with(self, error: str) -> None:
        """Raises EngineError for all who wait or come later. The first reason stays."""
        with self._changed:
            self._open = False
            self._error = self._error or error
            self._changed.notify_all()


class VLLMEngine:
    """Writes samples on vLLM servers with the weights of the last push. Any thread may call it.

    A push interrupts what is being written, and the response goes on with the new weights: each token has the version that
    wrote it. Token ids from `vocab_size` on are never in a sample.
    """

    remote: bool = True

    def __init__(self, section: VLLM, setup: EngineSetup) -> None:
        """`setup.sampling`: of the samples that are trained on; those for evaluation may differ, and have no log-probability
        where the servers do not give the promised one. Raises RecipeError for a setting that vLLM cannot honour."""
        section.check_sampling(setup.sampling)
        self._section, self._setup = section, setup
        model = unwrap(setup.model)
        padding = [*setup.absent, *range(setup.vocab_size, int(model.get_output_embeddings().weight.shape[0]))]
        self._bias = {str(row): FORBID for row in padding} if 0 < len(padding) <= MAX_BIASED else {}
        # a precision that no engine has becomes float32
        own = model.dtype if model.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        self._dtype: torch.dtype = own if section.dtype == "auto" else getattr(torch, section.dtype)
        exact = self._dtype == torch.float32 == model.dtype and setup.autocast in (None, torch.float32)
        # where both modes serve: a bias shows in processed log-probabilities only
        modes = logprobs_modes(setup.sampling)
        mode = modes[0] if len(modes) == 1 else PROCESSED if self._bias else RAW
        policy = section.retry_policy(setup.max_new_tokens)
        self._servers = Servers(section, setup, policy, self._dtype, mode)
        tolerance = section.check_tolerance or (FLOAT32_GAP if exact else HALF_GAP)
        self._check = PushCheck(self._servers, self._dtype, tolerance, section.probe_tokens)
        self._gate = Gate(policy.deadline_s)
        self._pushing = Lock()
        self._closed = self._sleeps = False
        self._last_probe: Probe | None = None
        self._wrote_since_check = False
        self._store: WeightStore | None = None
        self._transfer: NCCLTransfer | None = None
        if section.weights == "nccl":
            device = next(model.parameters()).device
            if device.type != "cuda":
                raise RecipeError("rollout.weights is nccl, but the trainer has no GPU; use auto, shm or directory")
            self._transfer = NCCLTransfer(self._servers, self._dtype, device, policy.deadline_s)

    @property
    def concurrency(self) -> int:
        """Requests that may be in flight."""
        return self._section.max_concurrency

    @property
    def num_positions(self) -> int | None:
        """Tokens of prompt and response together; None where no server gives a limit, or none is started yet."""
        return self._servers.facts.max_length if self._servers.started else None

    def health(self) -> str:
        """A line about the servers. Raises EngineError for one that does not answer."""
        self._servers.explain(0.0)
        self._servers.everywhere("/health", method="GET")
        return f"vLLM at {', '.join(self._servers.urls)}"

    def push(self, weights: Weights | None, version: int, probe: Probe | None = None) -> float | None:
        """Gives every server the weights, by the names of the plain model; the first call starts the servers.

        Returns the largest mean distance of a server's log-probabilities from those of `probe`, None where nothing is
        compared. `weights` are read once, as they are sent; None where another rank has pushed them, and only the version is
        noted. Raises EngineError, after which nothing can be generated, for a server that fails or disagrees.
        """
        # First of all: once the new weights are there, nobody can tell whether a server lost the old ones in between, and
        # the samples that it wrote without them would be trained on.
        self.verify()
        with self._pushing, self._breaks_on_error(version):
            if self._closed:
                raise EngineError("the rollout engine is closed")
            if weights is None:
                self._gate.close()
                if not self._servers.started:
                    self._servers.start(None)
                self._last_probe = None
                self._gate.open(version)
                return None
            # The head goes along under a name of its own, because an engine may keep a copy of a tied one.
            named = self._check.noted(with_head(self._setup.model, weights))
            if not self._servers.started and self._section.launch is not None:
                # Servers of the run's own begin with these weights.
                with self._open_store().written(named, "start", keeps_config=True) as directory:
                    self._servers.start(directory)
            else:
                if not self._servers.started:
                    self._servers.start(None)
                # Files are written while the servers still write samples: it takes longest, and changes nothing yet.
                with nullcontext() if self._transfer else self._open_store().written(named, f"v{version}") as directory:
                    # No new request from here on: it would be answered by weights of an unknown version.
                    self._gate.close()
                    if self._sleeps:
                        # Weights before the cache, as there need not be room for the files' tensors beside both.
                        self._servers.wake("weights")
                    # Long responses are cut off where they are, not waited for.
                    with nullcontext() if self._sleeps else self._servers.paused():
                        # Every reply to the old weights has to be in before they go, so that its tokens get the old
                        # version. A request may reach a server after the pause did, which is therefore repeated.
                        self._gate.drain(self._servers.pause)
                        if self._transfer is not None:
                            self._transfer.send(named)
                        else:
                            assert directory is not None
                            self._servers.reload(directory)
                        # After the reload, or the last prefixes of the old weights could still get in, and before a
                        # request can read them.
                        self._servers.forget()
                    if self._sleeps:
                        self._servers.wake("kv_cache")
                        self._sleeps = False
            # After the servers resumed, because a paused one answers nothing, and while the gate is closed, because what is
            # computed beside a request changes the last bits of its numbers.
            gap = None if probe is None else self._check.after_push(probe, version)
            self._last_probe = probe
            # Last, so that no sample is ever written with weights that did not arrive.
            self._gate.open(version)
            return gap

    def verify(self) -> None:
        """Compares with the last probe again if anything was written since. A server that was started again has the weights
        it was started with, and answers as if nothing had happened: raises WeightsLostError."""
        with self._pushing:
            if self._last_probe is None or not self._wrote_since_check or self._closed:
                return
            self._wrote_since_check = False
            try:
                self._check.again(self._last_probe, self._gate.version)
            except DisagreesError as error:
                # reported once: the push that follows is the cure and must not fail of it
                self._last_probe = None
                raise WeightsLostError(
                    f"the rollout engine lost its weights after they were pushed; was a server started again? {error}"
                ) from error
            except BaseException:
                # no answer is no verdict, so the next call asks again
                self._wrote_since_check = True
                raise

    def sleep(self, *, asks: bool) -> bool:
        """Raises EngineError, after which nothing can be generated, for a server that does not obey."""
        if not self._section.sleep:
            return False
        with self._pushing, self._breaks_on_error(self._gate.version):
            self._gate.close()
            # there is nothing to compare with until the next push
            self._last_probe = None
            if asks:
                self._servers.sleep()
                self._sleeps = True
        return True

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        """One sample for each request, in order.

        Raises DataError as HFEngine does, RecipeError for a response that would be longer than the servers allow, both
        before anything is sent, and EngineError for servers that give no right answer.
        """
        check_temperature(sampling)
        # servers tell their limits once they have weights
        with self._gate.passing():
            facts = self._servers.facts
        owner = f"the rollout engine takes {facts.max_length} (start it with a larger --max-model-len)"
        responses = open_responses(requests, sampling.max_new_tokens, facts.max_length, owner)
        self._wrote_since_check = True
        groups = [[response] for response in responses]
        if self._section.grouped:
            same: dict[tuple[Any, ...], list[Response]] = {}
            for response in responses:
                same.setdefault((response.request.stop, response.room, *response.context), []).append(response)
            groups = list(same.values())
        write = partial(self._write, sampling=sampling, stream=f"{self._setup.seed}/{stream}/{step}")
        try:
            while groups:
                self._servers.client.each(groups, write)
                # a group that was interrupted has responses of different lengths, so each goes on alone
                groups = [[response] for group in groups for response in group if response.finish is None]
        except EngineError:
            if not self._closed:
                self._servers.explain()
            raise
        return to_samples(responses, self._setup.tokenizer, with_logprob=promises(facts.logprobs_mode, sampling))

    def close(self) -> None:
        """Cancels requests in flight, stops the run's own servers, and removes the weights. A second call does nothing."""
        self._closed = True
        self._gate.break_with("the rollout engine is closed")
        try:
            self._servers.close()
        finally:
            if self._store is not None:
                self._store.close()

    @contextmanager
    def _breaks_on_error(self, version: int) -> Iterator[None]:
        """After a failed push nobody knows which weights a server has, so nothing is generated any more."""
        try:
            yield
        except BaseException as error:
            self._gate.break_with(f"the rollout engine did not get version {version} of the weights: {error}")
            if isinstance(error, EngineError) and not self._closed:
                self._servers.explain()
            raise

    def _open_store(self) -> WeightStore:
        # not in __init__, because only the rank that pushes may take the folder
        if self._store is None:
            self._store = WeightStore(self._section, self._setup, self._dtype)
        return self._store

    def _write(self, group: list[Response], sampling: Sampling, stream: str) -> None:
        """Asks for a single response until it is finished, and for several once."""
        num_fruitless = 0
        while True:
            first, length = group[0], len(group[0].ids)
            with self._gate.passing() as version:
                body = self._body(group, sampling, stream)
                try:
                    choices = self._servers.client.request(
                        "/v1/completions", partial(read_choices, body=body), key=first.request.key, json=body
                    )
                except Refused as refused:
                    raise EngineError(f"the rollout engine refused request {first.request.key}: {refused}") from refused
            # again, because a comparison may have been made while the request was under way
            self._wrote_since_check = True
            for response, (ids, logprob, finish) in zip(group, choices, strict=True):
                # without a bias a token may be drawn that the tokenizer does not have: the response ends before it
                size, absent = self._setup.vocab_size, self._setup.absent
                keep = next((place for place, token in enumerate(ids) if token >= size or token in absent), len(ids))
                response.ids += ids[:keep]
                response.logprob += logprob[:keep]
                response.version += [version] * keep
                # here too: an interruption may split a string, of which each reply then has a part
                if response.cut(self._setup.tokenizer):
                    continue
                if keep < len(ids):
                    response.num_redrawn += 1
                    response.finish = "length" if response.ids else None
                elif finish == "stop":
                    response.finish = "stop"
                    response.stopped_by_text = ids[-1] not in self._setup.stop_ids
                elif finish == "length" or len(response.ids) >= response.room:
                    response.finish = "length"
            if len(group) > 1 or first.finish is not None:
                return
            num_fruitless = 0 if len(first.ids) > length else num_fruitless + 1
            if num_fruitless > MAX_FRUITLESS:
                raise EngineError(
                    f"request {first.request.key}: {num_fruitless} replies of the rollout engine in a row had no token; "
                    "somebody else pauses its servers"
                )

    def _body(self, group: list[Response], sampling: Sampling, stream: str) -> dict[str, Any]:
        """Everything is stated, so that no default of a server or of the model's generation_config.json joins in."""
        first = group[0]
        # a continuation draws other numbers than what it continues
        name = f"{stream}/{first.request.key}/{len(first.ids)}/{first.num_redrawn}"
        body: dict[str, Any] = {"logit_bias": self._bias} if self._bias else {}
        if first.request.stop:
            body |= {"stop": list(first.request.stop), "include_stop_str_in_output": True}
        return body | {
            "model": self._servers.facts.model,
            "prompt": [*first.context, *first.ids],
            "max_tokens": first.room - len(first.ids),
            "n": len(group),
            # vLLM takes a signed 64-bit seed, and adds the index of a choice
            "seed": hash_name(name) >> 2,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": sorted(self._setup.stop_ids),
            # the model's own EOS need not be among the trainer's stop tokens
            "ignore_eos": True,
            # none of the most likely tokens beside the sampled one
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }
