"""What an engine's stub says, computed: a Hugging Face model, one sequence at a time, so that no batch shows.

Log-probabilities are natural logarithms in float32, as vLLM computes them.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

GREEDY_BELOW = 1e-5
"""vLLM's `_SAMPLING_EPS`."""
LEAST = -9999.0
"""vLLM writes this for minus infinity in a choice's log-probabilities."""


class StubModel:
    """A model and its tokenizer. Every forward holds the lock, so weights change between two tokens, never within one."""

    def __init__(self, directory: str | Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.directory = str(directory)
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.pieces = [self.tokenizer.decode([index]) for index in range(self.model.config.vocab_size)]
        eos = self.model.generation_config.eos_token_id
        self.eos_ids = frozenset([] if eos is None else [eos] if isinstance(eos, int) else eos)
        self.tied = bool(self.model.config.tie_word_embeddings)
        self.lock = Lock()
        self._old_head: Tensor | None = None

    @property
    def num_positions(self) -> int:
        return int(self.model.config.max_position_embeddings)

    def keep_head(self) -> None:
        """From now on the head is a copy of its own, which only `lm_head.weight` in a directory changes."""
        head = self.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        self._old_head = head.weight

    @torch.no_grad()
    def reload(self, directory: str | None) -> None:
        """Weights by name from every safetensors file; what is not there stays, as in vLLM."""
        folder = Path(directory or self.directory)
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"Cannot find any model weights with `{folder}`")
        given = {name: value for file in files for name, value in load_file(file).items()}
        with self.lock:
            own = dict(self.model.named_parameters(remove_duplicate=False))
            if self.tied and self._old_head is None:
                given.pop("lm_head.weight", None)
            for name, value in given.items():
                if own[name].shape != value.shape:
                    raise ValueError(f"{name}: {tuple(value.shape)} for {tuple(own[name].shape)}")
                own[name].copy_(value)

    @torch.no_grad()
    def clear(self) -> None:
        """Weights whose memory was given up."""
        with self.lock:
            for value in self.model.parameters():
                value.fill_(math.nan)

    @torch.no_grad()
    def prompt_logp(self, ids: Sequence[int]) -> Tensor:
        """Log-softmax for tokens 1 to L - 1, temperature 1. [L - 1, V]."""
        with self.lock:
            logits = self.model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1)


class Response:
    """One response that is being written."""

    def __init__(self, model: StubModel, prompt: Sequence[int], body: dict[str, Any], seed: str | int) -> None:
        self._model, self._body = model, body
        self._random = random.Random(seed)
        self._cache: Any = None
        self._unread = list(prompt)
        self.max_tokens = max(1, body["max_tokens"])
        self.ids: list[int] = []
        self.rows: list[Tensor] = []
        """Of each token the log-probabilities [V] that are reported."""
        self.finish: str | None = None
        self.stop_reason: int | str | None = None

    @torch.no_grad()
    def step(self) -> None:
        """One more token. Its end is EOS, a stop token or the length."""
        model = self._model
        with model.lock:
            out = model.model(input_ids=torch.tensor([self._unread]), past_key_values=self._cache, use_cache=True)
        self._cache = out.past_key_values
        token, reported = draw(out.logits[0, -1].float(), self._body, self._random.random())
        self.ids.append(token)
        self.rows.append(reported)
        self._unread = [token]
        if token in (self._body.get("stop_token_ids") or []):
            self.finish, self.stop_reason = "stop", token
        elif token in model.eos_ids and not self._body.get("ignore_eos"):
            self.finish = "stop"
        elif len(self.ids) >= self.max_tokens:
            self.finish = "length"
        if self.finish is None and self._body.get("stop"):
            text = model.tokenizer.decode(self.ids)
            self.stop_reason = next((one for one in self._body["stop"] if one in text), None)
            self.finish = None if self.stop_reason is None else "stop"


def draw(logits: Tensor, body: dict[str, Any], uniform: float) -> tuple[int, Tensor]:
    """A token, and the log-probabilities [V] that a server in the mode of `body` reports for its place."""
    plain = logits.log_softmax(-1)
    if bias := body.get("logit_bias"):
        logits = logits.index_add(0, torch.tensor([int(id_) for id_ in bias]), torch.tensor([*bias.values()]).float())
    temperature = 1.0 if body.get("temperature") is None else float(body["temperature"])
    greedy = temperature < GREEDY_BELOW
    processed = (logits if greedy else _filter(logits / temperature, body)).log_softmax(-1)
    cumulative = processed.double().exp().cumsum(-1)
    token = int(processed.argmax() if greedy else torch.searchsorted(cumulative, uniform * cumulative[-1], right=True))
    return token, processed if body["logprobs_mode"] == "processed_logprobs" else plain


def _filter(logits: Tensor, body: dict[str, Any]) -> Tensor:
    """Minus infinity for what min-p, top-k and top-p leave out."""
    min_p, top_k, top_p = (body.get(name) for name in ("min_p", "top_k", "top_p"))
    if min_p:
        logits = logits.masked_fill(logits < logits.max() + math.log(min_p), -math.inf)
    if top_k is not None and 0 < top_k < logits.numel():
        logits = logits.masked_fill(logits < logits.topk(top_k).values[-1], -math.inf)
    if top_p is not None and top_p < 1.0:
        ranked, order = logits.softmax(-1).sort(descending=True)
        outside = ranked.cumsum(-1) - ranked >= top_p
        outside[0] = False
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(0, order, outside), -math.inf)
    return logits


def entries(row: Tensor, token: int, top: int, pieces: Sequence[str]) -> dict[str, dict[str, Any]]:
    """vLLM's `{id: {logprob, rank, decoded_token}}`: the token itself, then the likeliest `top` (-1: all)."""
    ranked = row.topk(row.numel() if top == -1 else top).indices.tolist() if top else []
    rank = {id_: place + 1 for place, id_ in enumerate(ranked)}
    rank[token] = int((row > row[token]).sum()) + 1
    return {
        str(id_): {"logprob": max(float(row[id_]), LEAST), "rank": rank[id_], "decoded_token": pieces[id_]}
        for id_ in dict.fromkeys([token, *ranked])
    }
