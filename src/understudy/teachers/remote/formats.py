"""Wire formats: how each kind of server is asked for the scores of given tokens, and how its reply is read.

    vllm         POST /inference/v1/generate with `prompt_logprobs` where the server has it, else POST /v1/completions
    sglang       POST /generate with `return_logprob`
    completions  POST /v1/completions with `echo` and `logprobs`, as OpenAI first had it

A new format is a subclass of `WireFormat`, a line in `FORMATS`, which makes its name a value of `teacher.api`, and a test
beside those of the others in tests/integration/test_http_teacher.py. Nothing else knows the formats. A format only
translates: retries, batches and replicas are `HttpTeacher`'s, and `score_check` decides which numbers are scores.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from understudy.http.replies import BadReply, Refused
from understudy.teachers.remote.score_check import RawScores, number
from understudy.types import Need, Sample

_UNKNOWN_FIELD = frozenset({400, 422})
_NO_ROUTE = frozenset({403, 404, 405})
"""Statuses of a path that does not exist, or that a server was not told to open."""


class WireFormat(ABC):
    """One kind of server. It must score at temperature 1, as all that are known do whatever a request says."""

    path: ClassVar[str]
    """Behind the base URL."""
    gives: ClassVar[frozenset[Need]] = frozenset({"none", "sampled", "topk"})
    default_k_max: ClassVar[int | None] = None
    """Largest top-k that the server returns unless told otherwise; None: no limit."""
    version_path: ClassVar[str | None] = None
    """Path whose reply has a "version"; None: the server does not tell."""
    single: ClassVar[bool] = False
    """Whether a request holds one sample only."""

    def __init__(self, model: str, tokenizer: Any = None) -> None:
        """`model`: its name at the server. `tokenizer`: the student's, None where it is unknown."""
        self.model = model
        self.tokenizer = tokenizer

    @abstractmethod
    def body(self, samples: Sequence[Sample], num_top: int) -> dict[str, Any]:
        """The JSON of a request. `num_top`: likeliest tokens of each row, 0 for none."""

    @abstractmethod
    def parts(self, reply: Any) -> list[Any]:
        """The parts of a reply's JSON, one for each sample, in order."""

    @abstractmethod
    def read(self, sample: Sample, part: Any) -> RawScores:
        """Reads one sample's part. Raises BadReply; any LookupError, TypeError, ValueError or AttributeError becomes one."""

    def fallback(self, refused: Refused) -> WireFormat | None:
        """Returns the format to use instead if this server does not know the route or a field; None: it is an error.

        Not asked about a refusal of a sample that is too long.
        """
        return None


class _OverCompletions(WireFormat):
    """A server's /v1/completions: ids in, one choice for each sample."""

    path = "/v1/completions"

    def _prompts(self, samples: Sequence[Sample]) -> dict[str, Any]:
        ids = [sample.token_ids.tolist() for sample in samples]
        # some servers generate at least one token; it is cut off
        return {"model": self.model, "prompt": ids, "max_tokens": 1, "temperature": 0.0}

    def parts(self, reply: Any) -> list[Any]:
        choices = sorted(reply["choices"], key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(len(choices))):
            raise BadReply("choices are numbered otherwise than the samples")
        return choices


class VLLMCompletions(_OverCompletions):
    """vLLM's `prompt_logprobs` of completions. Tested with 0.32; it uses nothing that is newer than 0.20.

    The server writes the text of every token of every row. One that only scores may be started with
    `--skip-tokenizer-init`, which spares that; it then no longer refuses ids past its vocabulary but crashes.
    """

    default_k_max = 20
    version_path = "/version"

    def body(self, samples: Sequence[Sample], num_top: int) -> dict[str, Any]:
        return self._prompts(samples) | {"prompt_logprobs": num_top, "return_token_ids": True}

    def read(self, sample: Sample, part: Any) -> RawScores:
        """`prompt_logprobs`: None, then for each token a mapping from ids, its own and the likeliest, to numbers."""
        ids, start = sample.token_ids.tolist(), sample.prompt_length
        if (said := part.get("prompt_token_ids")) is not None and said != ids:
            raise BadReply("the prompt that was scored is not the one that was sent")
        rows = part["prompt_logprobs"]
        if len(rows) != len(ids):
            raise BadReply(f"{len(rows)} places for {len(ids)} tokens")
        values = [{int(token): number(entry["logprob"]) for token, entry in row.items()} for row in rows[start:]]
        if lacking := [token for token, row in zip(ids[start:], values, strict=True) if token not in row]:
            raise BadReply(f"token {lacking[0]} was sent, and other tokens were scored in its place")
        # likeliest first, and NaN before everything, so that a missing number is never cut off with the rest of a row
        top = [sorted(row.items(), key=lambda item: -math.inf if math.isnan(item[1]) else -item[1]) for row in values]
        ranks = [row[str(token)].get("rank") for token, row in zip(ids[start:], rows[start:], strict=True)]
        return RawScores(ids[start:], [row[token] for token, row in zip(ids[start:], values, strict=True)], top, ranks)


class VLLMTokens(VLLMCompletions):
    """vLLM's route for token ids, which `--enable-scale-out` opens: one sequence a request, and no text is written."""

    path = "/inference/v1/generate"
    single = True

    def body(self, samples: Sequence[Sample], num_top: int) -> dict[str, Any]:
        (sample,) = samples
        params = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "prompt_logprobs": num_top}
        ids = sample.token_ids.tolist()
        return {"model": self.model, "token_ids": ids, "sampling_params": params, "return_token_ids": True}

    def parts(self, reply: Any) -> list[Any]:
        return [dict(reply)]

    def fallback(self, refused: Refused) -> WireFormat | None:
        return VLLMCompletions(self.model) if refused.status in _NO_ROUTE | _UNKNOWN_FIELD else None


class SGLang(WireFormat):
    """SGLang's native route (`GenerateReqInput` in its io_struct.py). Scores begin behind the prompt, whose keys and values
    its prefix cache shares among the samples of a group."""

    path = "/generate"
    version_path = "/get_server_info"

    def body(self, samples: Sequence[Sample], num_top: int) -> dict[str, Any]:
        return {
            "input_ids": [sample.token_ids.tolist() for sample in samples],
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
            "return_logprob": True,
            # the first place that is asked for has no number, so that is the prompt's last token
            "logprob_start_len": [sample.prompt_length - 1 for sample in samples],
            "top_logprobs_num": num_top,
            "return_text_in_logprobs": False,
            "stream": False,
        }

    def parts(self, reply: Any) -> list[Any]:
        return list(reply)

    def read(self, sample: Sample, part: Any) -> RawScores:
        """`meta_info`: lists of [logprob, id, text]."""
        facts: Mapping[str, Any] = part["meta_info"]
        length, size = sample.token_ids.numel(), sample.num_response_tokens
        if facts.get("prompt_tokens", length) != length:
            raise BadReply(f"{facts['prompt_tokens']} tokens were read of {length}")
        places, rows = facts["input_token_logprobs"], facts.get("input_top_logprobs") or None
        for name, found in (("input_token_logprobs", places), ("input_top_logprobs", rows)):
            if found is not None and len(found) != size + 1:
                raise BadReply(f"{name} has {len(found) - 1} places for {size} response tokens")
        return RawScores(
            [place[1] for place in places[1:]],
            [number(place[0]) for place in places[1:]],
            None if rows is None else [[(entry[1], number(entry[0])) for entry in row or ()] for row in rows[1:]],
        )


class Completions(_OverCompletions):
    """Any server with `echo` and `logprobs` of OpenAI's first completions, which writes tokens as text."""

    # tokens are named by text, which several tokens may share, so there is no top-k
    gives = frozenset({"none", "sampled"})

    def __init__(self, model: str, tokenizer: Any = None, *, as_ids: bool = True) -> None:
        """`as_ids`: asks for ids in place of text, which vLLM knows, and a strict server refuses as an unknown field."""
        super().__init__(model, tokenizer)
        self._as_ids = as_ids
        self._spellings: dict[int, frozenset[str]] = {}

    def body(self, samples: Sequence[Sample], num_top: int) -> dict[str, Any]:
        body = self._prompts(samples) | {"echo": True, "logprobs": 1}
        return body | {"return_tokens_as_token_ids": True} if self._as_ids else body

    def read(self, sample: Sample, part: Any) -> RawScores:
        """`logprobs`: `tokens` and `token_logprobs`, the first of which is None."""
        ids, start = sample.token_ids.tolist(), sample.prompt_length
        tokens, numbers = part["logprobs"]["tokens"], part["logprobs"]["token_logprobs"]
        if len(tokens) not in (len(ids), len(ids) + 1) or len(numbers) != len(tokens):
            raise BadReply(f"{len(tokens)} tokens and {len(numbers)} numbers came back for {len(ids)} tokens")
        for token, said in zip(ids, tokens, strict=False):
            if not self._is_spelled(token, said):
                raise BadReply(f"token {token} was sent, and {said!r} was scored in its place")
        return RawScores(ids[start:], [number(value) for value in numbers[start : len(ids)]])

    def fallback(self, refused: Refused) -> WireFormat | None:
        unknown = self._as_ids and refused.status in _UNKNOWN_FIELD
        return Completions(self.model, self.tokenizer, as_ids=False) if unknown else None

    def _is_spelled(self, token: int, said: str) -> bool:
        """Whether a server may write the token like this. Bytes of a character have no text, so any replacement will do."""
        if said.startswith("token_id:"):
            return said == f"token_id:{token}"
        if self.tokenizer is None:
            raise BadReply("tokens came back as text, and no tokenizer is there to compare it with")
        if token not in self._spellings:
            piece = str(self.tokenizer.convert_ids_to_tokens(token))
            # decoding drops the space that SentencePiece writes as U+2581
            texts = {self.tokenizer.decode([token]), piece, piece.replace("\u2581", " ")}
            self._spellings[token] = frozenset(texts)
        known = self._spellings[token]
        partial = any("\ufffd" in text for text in known)
        return said in known or (partial and (said.startswith("bytes:") or "\ufffd" in said))


FORMATS: Mapping[str, type[WireFormat]] = {"vllm": VLLMTokens, "sglang": SGLang, "completions": Completions}
"""`teacher.api` in a recipe -> its format."""
