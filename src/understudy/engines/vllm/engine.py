"""Sampling by vLLM servers: token ids in, token ids out, with weights that are pushed and then checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from understudy.engines.hf.engine import context_of, room_of
from understudy.engines.probe import Probe
from understudy.engines.sections import PROCESSED, RAW, VLLM, check_temperature, logprobs_mode, promises
from understudy.engines.vllm.check import DisagreesError, PushCheck
from understudy.engines.vllm.gate import Gate
from understudy.engines.vllm.nccl import NCCLTransfer
from understudy.engines.vllm.replies import Draft, Part, read_parts, to_samples
from understudy.engines.vllm.servers import Servers
from understudy.engines.vllm.weights import WeightStore, engine_dtype, with_head
from understudy.errors import EngineError, RecipeError, WeightsLostError
from understudy.http import Refused
from understudy.models import unwrap
from understudy.randomness import hash_name
from understudy.types import Request, Sample, Sampling

FLOAT32_GAP = 1e-3
"""Nats between two engines of the same weights in float32, on average: 5e-7 was measured, other kernels may add up to 1e-4."""
HALF_GAP = 0.05
"""The same where one of them computes in 16 bits: 5e-3 was measured on a small model, and depth adds to it."""
MAX_BIASED = 1024
"""Rows beyond the vocabulary that are forbidden by `logit_bias`; a request with more would be mostly that."""
FORBID = -100.0
"""The lowest bias that vLLM takes; 4e-44 of a token's probability is left."""
MAX_FRUITLESS = 20
"""Replies in a row without a token, of which each push may cause a few."""


class VLLMEngine:
    """Writes samples on vLLM servers with the weights of the last push. Any thread may call it.

    A push ends what is being written, and the response goes on with the new weights: its tokens have the version that each
    was written by. Token ids from `vocab_size` on are never in a sample.
    """

    def __init__(
        self,
        section: VLLM,
        model: nn.Module,
        tokenizer: Any,
        *,
        seed: int,
        stop_ids: tuple[int, ...],
        vocab_size: int,
        sampling: Sampling,
        run_dir: Path,
        autocast: torch.dtype | None = None,
    ) -> None:
        """`sampling`: of the samples that are trained on; those for evaluation may differ, and have no log-probability where
        the servers do not give the one that is promised. Raises RecipeError for what vLLM cannot do."""
        check_temperature(sampling)
        needed = logprobs_mode(sampling)
        section = section.for_responses(sampling.max_new_tokens)
        self._section = section
        self._tokenizer = tokenizer
        self._seed = seed
        self._stop_ids = sorted(stop_ids)
        self._vocab_size = vocab_size
        self._sampling = sampling
        num_rows = int(unwrap(model).get_output_embeddings().weight.shape[0])
        padding = range(vocab_size, num_rows)
        self._bias = {str(row): FORBID for row in padding} if 0 < len(padding) <= MAX_BIASED else {}
        dtype = engine_dtype(section.dtype, model)
        exact = dtype == torch.float32 and unwrap(model).dtype == dtype and autocast in (None, torch.float32)
        # a bias shows in the log-probabilities of what is drawn, and in no others
        mode = needed or (PROCESSED if self._bias else RAW)
        precision = str(dtype).removeprefix("torch.")
        self._servers = Servers(section, run_dir, dtype=precision, mode=mode, seed=seed)
        tolerance = section.check_tolerance or (FLOAT32_GAP if exact else HALF_GAP)
        self._check = PushCheck(self._servers, dtype, tolerance, section.probe_tokens)
        deadline_s = section.retry_policy.deadline_s
        self._gate = Gate(deadline_s)
        self._pushing = Lock()
        self._closed = False
        self._last_probe: Probe | None = None
        self._written = False
        """Since the weights were last compared."""
        self._with_head = partial(with_head, model)
        self._transfer: NCCLTransfer | None = None
        if section.weights == "nccl":
            device = next(model.parameters()).device
            self._transfer = NCCLTransfer(self._servers, dtype, device, deadline_s)
        # made by the rank that pushes, which is the only one to write there
        self._make_store = partial(WeightStore, model, tokenizer, run_dir, dtype=dtype, place=_place(section, run_dir))
        self._store: WeightStore | None = None

    @property
    def concurrency(self) -> int:
        """As many as may be in flight."""
        return self._section.max_concurrency

    @property
    def remote(self) -> bool:
        """Servers."""
        return True

    @property
    def num_positions(self) -> int | None:
        """Tokens of prompt and response together; None where no server says, or none is started yet."""
        return None if self._servers.facts is None else self._servers.facts.max_length

    @property
    def last_gap(self) -> float:
        """Nats: the largest mean distance of a server's log-probabilities from the trainer's, when they were last compared."""
        return self._check.last_gap

    def health(self) -> str:
        """A line about the servers. Raises EngineError for one that does not answer."""
        if self._servers.facts is None:
            raise EngineError("the rollout engine has no weights yet")
        return self._servers.health()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, step: int, stream: str = "sample"
    ) -> list[Sample]:
        """One sample for each request, in their order.

        Raises DataError as HFEngine does, RecipeError for a response that would be longer than the servers allow, both
        before anything is sent, and EngineError for servers that give no right answer.
        """
        check_temperature(sampling)
        drafts = [
            Draft(request, context_of(request).tolist(), room_of(request, sampling.max_new_tokens))
            for request in requests
        ]
        with self._gate.passing():
            # the facts are there once weights are
            self._check_positions(requests, sampling.max_new_tokens)
        client, facts = self._servers.client, self._servers.facts
        assert client is not None
        assert facts is not None
        self._written = True
        left = self._groups(drafts)
        try:
            while left:
                client.each(left, lambda group: self._write(group, sampling, f"{self._seed}/{stream}/{step}"))
                left = [[draft] for group in left for draft in group if draft.finish is None]
        except EngineError:
            if not self._closed:
                self._servers.explain()
            raise
        return to_samples(drafts, self._tokenizer, with_logprob=promises(facts.logprobs_mode, sampling))

    def push(
        self, weights: Iterable[tuple[str, Tensor]] | None, version: int, probe: Probe | None = None
    ) -> float | None:
        """Gives every server the weights, by the names of the plain model; the first call starts the servers.

        Returns the mean distance of log-probabilities from those of `probe`, the largest of all servers, None where there is
        nothing to compare. None for weights: another rank has pushed them, and only the version is noted.
        Raises EngineError, after which nothing can be generated, for a server that fails or disagrees.
        """
        self.verify()
        with self._pushing:
            if self._closed:
                raise EngineError("the rollout engine is closed")
            try:
                if weights is None:
                    self._join()
                else:
                    self._replace(weights, version)
                gap = None if probe is None or weights is None else self._check.after_push(probe, version)
                self._last_probe = None if weights is None else probe
            except BaseException as error:
                self._gate.break_with(f"the rollout engine did not get version {version} of the weights: {error}")
                if isinstance(error, EngineError) and not self._closed:
                    # that it died says more than that it gave no answer
                    self._servers.explain()
                raise
            self._gate.open(version)
            return gap

    def verify(self) -> None:
        """Compares with the last probe again, where something was written since: a server that was started again has the
        weights that it was started with, and answers as if nothing had been."""
        with self._pushing:
            if self._last_probe is None or not self._written or self._closed:
                return
            self._written = False
            try:
                self._check.again(self._last_probe, self._gate.version)
            except DisagreesError as error:
                # said once: the push that follows is not to fail of it
                self._last_probe = None
                raise WeightsLostError(
                    f"the rollout engine lost its weights after they were pushed; was a server started again? {error}"
                ) from error
            except BaseException:
                # nobody knows, so it is asked again
                self._written = True
                raise

    def close(self) -> None:
        """Gives up what is in flight, stops the servers that are ours, and removes the weights. Twice does no harm."""
        self._closed = True
        self._gate.break_with("the rollout engine is closed")
        try:
            self._servers.close()
        finally:
            if self._store is not None:
                self._store.close()

    def __enter__(self) -> VLLMEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _join(self) -> None:
        """A rank that pushes nothing finds the servers of the one that does."""
        self._gate.close()
        if self._servers.facts is None:
            if self._servers.launches:
                raise RecipeError(
                    "rollout.launch starts servers for one rank alone; with several ranks start them yourself and give "
                    "rollout.url"
                )
            self._start(None)

    def _replace(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Puts the weights in place of the old ones, everywhere, while nothing is written."""
        weights = self._check.watch(self._with_head(weights))
        if self._servers.facts is None:
            if self._servers.launches:
                self._launch(weights)
                return
            self._start(None)
        with self._prepared(weights, version) as deliver:
            self._gate.close()
            try:
                self._servers.pause()
                self._gate.drain(self._servers.pause)
                deliver()
                self._servers.forget()
            except BaseException:
                with suppress(EngineError):
                    self._servers.resume()
                raise
            self._servers.resume()

    @contextmanager
    def _prepared(self, weights: Iterable[tuple[str, Tensor]], version: int) -> Iterator[Callable[[], None]]:
        """What gives the weights to the servers, as far as possible before they stand still."""
        if self._transfer is not None:
            yield partial(self._transfer.send, weights)
            return
        directory = self._open_store().write(weights, f"v{version}")
        try:
            yield partial(self._servers.reload, directory)
        finally:
            self._open_store().drop(directory)

    def _launch(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Servers of our own begin with the weights; configuration and tokenizer stay where they have read them."""
        directory = self._open_store().write(weights, "start")
        try:
            self._start(directory)
        finally:
            self._open_store().drop_tensors(directory)

    def _open_store(self) -> WeightStore:
        if self._store is None:
            self._store = self._make_store()
        return self._store

    def _start(self, directory: Path | None) -> None:
        self._servers.start(directory)
        facts = self._servers.facts
        assert facts is not None
        if not promises(facts.logprobs_mode, self._sampling):
            raise RecipeError(
                f"the rollout engine {self._servers.urls[0]} is in logprobs mode {facts.logprobs_mode}, and the recipe's "
                f"sampling needs {logprobs_mode(self._sampling) or RAW}: start it with --logprobs-mode"
            )

    def _check_positions(self, requests: Sequence[Request], max_new_tokens: int) -> None:
        limit = self.num_positions
        for request in requests:
            length = request.token_ids.numel()
            if limit is not None and length + max_new_tokens > limit:
                raise RecipeError(
                    f"request {request.key}: {length} prompt tokens and max_new_tokens {max_new_tokens} make "
                    f"{length + max_new_tokens}, but the rollout engine takes {limit} (its --max-model-len): lower "
                    "max_new_tokens, drop longer prompts, or start it with more"
                )

    def _groups(self, drafts: Sequence[Draft]) -> list[list[Draft]]:
        """Drafts that one request asks for: alone, or with those of the same context and room."""
        if not self._section.grouped:
            return [[draft] for draft in drafts]
        groups: dict[tuple[int, ...], list[Draft]] = {}
        for draft in drafts:
            groups.setdefault((draft.room, *draft.context), []).append(draft)
        return list(groups.values())

    def _write(self, group: list[Draft], sampling: Sampling, stream: str) -> None:
        """Requests and their replies until a single draft is finished; several are asked for once."""
        while True:
            with self._gate.passing() as version:
                parts = self._ask(self._body(group, sampling, stream), group[0].request.key)
            # also what was begun before the last comparison
            self._written = True
            for draft, part in zip(group, parts, strict=True):
                draft.add(part, version, self._vocab_size)
                if draft.num_fruitless > MAX_FRUITLESS:
                    raise EngineError(
                        f"request {draft.request.key}: {draft.num_fruitless} replies of the rollout engine in a row had no "
                        "token; somebody else pauses its servers"
                    )
            if len(group) > 1 or group[0].finish is not None:
                return

    def _ask(self, body: dict[str, Any], key: str) -> list[Part]:
        client = self._servers.client
        assert client is not None
        try:
            return client.request("/v1/completions", lambda reply: read_parts(reply, body), key=key, json=body)
        except Refused as refused:
            raise EngineError(f"the rollout engine refused request {key}: {refused}") from refused

    def _body(self, group: list[Draft], sampling: Sampling, stream: str) -> dict[str, Any]:
        """Everything is said, so that no default of a server or of the model's generation_config.json joins in."""
        first, facts = group[0], self._servers.facts
        assert facts is not None
        # a continuation draws other numbers than what it continues
        name = f"{stream}/{first.request.key}/{len(first.ids)}/{first.num_redrawn}"
        bias = {"logit_bias": self._bias} if self._bias else {}
        return bias | {
            "model": facts.model,
            "prompt": [*first.context, *first.ids],
            "max_tokens": first.room - len(first.ids),
            "n": len(group),
            "seed": hash_name(name) >> 2,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": self._stop_ids,
            "ignore_eos": True,
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }


def _place(section: VLLM, run_dir: Path) -> Path | Literal["shm"] | None:
    if section.weights_dir is not None:
        return Path(section.weights_dir).expanduser()
    if section.weights == "shm":
        return "shm"
    return None if section.weights == "auto" and section.is_local else run_dir / "weights"
