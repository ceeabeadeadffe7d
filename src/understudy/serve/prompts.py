"""Several responses to one prompt: the prompt is read once, and each response continues from its cache."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.models import backbone_hidden, unwrap
from understudy.models.backbone import evaluating

FILL = 0.75
"""A response shorter than this share of the longest beside it goes into another batch: padding is computed too."""
WORTH = 0.9
"""Share of the slots of whole sequences below which continuing from a cache is worth its copies."""
_BY_LENGTH = ("longrope", "dynamic")
"""Rotary embeddings whose frequencies depend on the length of the input: a prompt that is read alone has others than the
same prompt before its response."""
_TOLERANCE = {"torch.float64": 1e-4, "torch.float32": 1e-4, "torch.float16": 4e-3, "torch.bfloat16": 3e-2}
"""Error of a hidden state over the largest, in the probe: another kernel adds up in another order. float64 is as coarse as
float32, because a model with float64 weights may have norms or a softmax in float32 (Gemma 2)."""


def continued_batches(prompt: int, responses: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Returns indices that continue together, longest first. A batch's slots, copies of the prompt's cache included, are at
    most `max_tokens` unless it is one response alone."""
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(responses)), key=lambda index: (-responses[index], index)):
        fits = batches and (len(batches[-1]) + 1) * (prompt + longest) <= max_tokens
        if not fits or responses[index] < FILL * longest:
            batches.append([])
            longest = responses[index]
        batches[-1].append(index)
    return batches


def is_worth(prompt: int, responses: Sequence[int], max_tokens: int) -> bool:
    """Whether reading the prompt once takes clearly fewer slots than reading every sequence whole."""
    batches = continued_batches(prompt, responses, max_tokens)
    continued = prompt + sum(len(batch) * responses[batch[0]] for batch in batches)
    return continued < WORTH * (len(responses) * prompt + sum(responses))


@no_grad
def continued_hidden(
    model: nn.Module, prompt: Tensor, responses: Sequence[Tensor], max_tokens: int, device: torch.device
) -> list[Tensor]:
    """Returns the hidden states that predict the tokens of each response. [P], [R] each -> [R, H] each."""
    decoder = unwrap(model).get_decoder()
    num_prompt = len(prompt)
    places = torch.arange(num_prompt, device=device)[None]
    read: Any = decoder(input_ids=prompt.to(device)[None], position_ids=places, use_cache=True)
    first, cache = read.last_hidden_state[0, -1:], read.past_key_values
    found: list[Tensor] = [first[: len(response)] for response in responses]
    for batch in continued_batches(num_prompt, [len(response) for response in responses], max_tokens):
        # the last token of a response predicts nothing that is asked for
        width = len(responses[batch[0]]) - 1
        if width < 1:
            continue
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, index in enumerate(batch):
            ids[row, : len(responses[index]) - 1] = responses[index][:-1]
        places = torch.arange(num_prompt, num_prompt + width, device=device).expand(len(batch), -1)
        # a forward appends to its cache in place, and other batches need the prompt's alone
        own = deepcopy(cache)
        own.batch_repeat_interleave(len(batch))
        states = decoder(input_ids=ids.to(device), position_ids=places, past_key_values=own, use_cache=True)
        for row, index in enumerate(batch):
            rest = states.last_hidden_state[row, : max(0, len(responses[index]) - 1)]
            found[index] = torch.cat([found[index], rest])
    return found


def can_continue(model: nn.Module) -> bool:
    """Whether continuing gives the hidden states of whole sequences, tried with a few tokens: the caches of some
    architectures do not allow it. The lengths at which some rotary embeddings change are longer than any probe."""
    base = unwrap(model)
    # layers and configuration name the kind of their rotary embedding in nested mappings; any mention counts
    named = [getattr(module, "rope_type", None) for module in base.modules()]
    named += [getattr(base.config, name, None) for name in ("rope_parameters", "rope_scaling")]
    if any(kind in repr(named) for kind in _BY_LENGTH):
        return False
    weight = base.get_output_embeddings().weight
    ids = torch.arange(1, 17).remainder(weight.shape[0])
    prompt, responses = ids[:7], [ids[7:14], ids[10:13]]
    with evaluating(model), torch.no_grad():
        try:
            found = continued_hidden(model, prompt, responses, 2**20, weight.device)
        except Exception:  # whatever an architecture raises, it cannot, and whole sequences are read
            return False
        for states, response in zip(found, responses, strict=True):
            whole = torch.cat([prompt, response])[None, :-1].to(weight.device)
            places = torch.arange(whole.shape[1], device=weight.device)[None]
            expected = backbone_hidden(model, whole, places)[0, len(prompt) - 1 :]
            error = float((states - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
            if not error <= _TOLERANCE[str(base.dtype)]:
                return False
    return True
