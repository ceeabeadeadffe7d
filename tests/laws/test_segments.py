"""Attention by segments and shared prompts: hidden states, losses, gradients and metrics are those of rows with a mask."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import BUDGET, NUM_ROWS, sample, scored, tiny
from tests.worlds import CASES
from understudy import packing
from understudy.methods.base import Method
from understudy.models import (
    apply_lora,
    attention,
    backbone_hidden,
    compile_blocks,
    enable_gradient_checkpointing,
    lm_head,
    row_style,
    unwrap,
)
from understudy.models.attention import attention_name
from understudy.packing import RowStyle, lay_out
from understudy.teachers import LocalTeacher
from understudy.trainer.distributed import Ranks
from understudy.trainer.update import Heads, StudentModel, accumulate_gradients, prepare
from understudy.types import Author, Grade, Sample, Scores

ROUNDING = 1e-10
"""float64: other orders of sums, through two layers and back."""
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"architecture": "qwen2", "num_kv_heads": 2},
    "qwen3": {},
    "mistral": {"architecture": "mistral", "num_kv_heads": 1, "sliding_window": 4},
    "gemma3": {},
    "gpt2": {},
    "gpt_neox": {"architecture": "gpt_neox"},
}


def family(name: str) -> Any:
    plain = "llama" if "architecture" in FAMILIES[name] else name
    return in_float64(tiny(plain, sharp=4.0, **FAMILIES[name]))


def in_float64(model: Any) -> Any:
    """The model with its norms in float64. transformers casts to float32 and back there, gradients too: a prompt's would be
    rounded as one sum, or sample by sample."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            eps = getattr(module, "variance_epsilon", None) or module.eps
            scale = (lambda weight: 1 + weight) if "Gemma" in type(module).__name__ else (lambda weight: weight)
            module.forward = partial(rms_norm, module=module, eps=eps, scale=scale)
    return model


def rms_norm(states: Tensor, module: Any, eps: float, scale: Callable[[Tensor], Tensor]) -> Tensor:
    return scale(module.weight) * states * (states.square().mean(-1, keepdim=True) + eps).rsqrt()


@pytest.fixture(autouse=True)
def prompts_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short beginnings, too, are computed once."""
    monkeypatch.setattr(packing, "LEAST_COMMON", 2)


def some_samples() -> list[Sample]:
    """Five prompts of one to three samples, four of which begin alike; a guided prefix; several turns; a response
    of one token, and of none."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, NUM_ROWS, (count,), generator=draw).tolist()

    first, third = ids(9), ids(1)
    second = [*first[:6], *ids(2)]
    fourth = [*second[:7], *ids(3)]
    turns = [Author.STUDENT] * 4 + [Author.ENVIRONMENT] * 3 + [Author.STUDENT] * 4
    guided = [Author.TEACHER] * 3 + [Author.STUDENT] * 5
    made = [
        sample("a", first, ids(7)),
        sample("b", second, ids(6)),
        sample("c", third, ids(1)),
        sample("a", first, ids(8), author=guided),
        sample("c", third, ids(12)),
        sample("a", first, ids(11), author=turns),
        sample("d", fourth, []),
        sample("e", [*fourth[:9], *ids(2)], ids(4)),
    ]
    return [replace(one, index=number) for number, one in enumerate(made)]


def hidden_of(model: Any, samples: list[Sample], style: RowStyle) -> Tensor:
    layout = lay_out(samples, style)
    states = backbone_hidden(model, layout.input_ids, layout.position_ids, layout.images, layout.segments)
    return states.flatten(0, 1)[layout.predicts]


def hidden_and_gradients(model: Any, samples: list[Sample], style: RowStyle) -> list[Tensor]:
    model.zero_grad()
    hidden = hidden_of(model, samples, style)
    weights = torch.randn(hidden.shape, dtype=hidden.dtype, generator=torch.Generator().manual_seed(1))
    (hidden.tanh() * weights).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_all_close(found: list[Tensor], expected: list[Tensor], atol: float = ROUNDING) -> None:
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=atol * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("block", [512, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_segments_are_rows_with_a_mask(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 4 tokens end inside prompt and response; blocks of 3 queries cut both."""
    monkeypatch.setattr(attention, "BLOCK", block)
    model = family(name)
    expected = hidden_and_gradients(model, some_samples(), "packed")
    assert row_style(model) == "shared"
    assert row_style(model, share_prompts=False) == "segments"
    assert attention_name(model) == "sdpa"
    assert_all_close(hidden_and_gradients(model, some_samples(), "packed"), expected)
    for style in ("segments", "shared"):
        assert_all_close(hidden_and_gradients(model, some_samples(), style), expected)


def test_the_beginning_that_prompts_share_stands_once() -> None:
    """Prompts of 9, 8, 10, 11 and 1 tokens: 6 of the first begin the second, 7 of that the third, 9 of that the fourth."""
    samples = some_samples()
    layout = lay_out(samples, "shared")
    whole = {one.prompt.id: one.prompt_length for one in samples}
    responses = sum(max(0, one.num_response_tokens - 1) for one in samples)
    assert sum(whole.values()) == 39
    # the prompt without a response does not feed its last token
    assert layout.input_ids.numel() == responses + 39 - 6 - 7 - 9 - 1
    assert max(len(one.before) for one in layout.segments) > 1


@pytest.mark.parametrize("lora", [False, True])
def test_layers_that_are_computed_again_have_their_segments(lora: bool) -> None:
    model = family("qwen3")
    if lora:
        model = apply_lora(model, rank=2, alpha=4)
        with torch.no_grad():
            for name, value in model.named_parameters():
                if "lora_B" in name:
                    value.normal_(generator=torch.Generator().manual_seed(3))
    expected = hidden_and_gradients(model, some_samples(), "packed")
    assert row_style(model) == "shared"
    enable_gradient_checkpointing(model)
    model.train()
    for style in ("segments", "shared"):
        assert_all_close(hidden_and_gradients(model, some_samples(), style), expected)


@pytest.mark.parametrize(
    ("name", "extra", "style"),
    [
        ("gemma2", {}, "packed"),
        ("llama", {"architecture": "llama4_text", "attention_chunk_size": 4}, "packed"),
        ("llama", {"architecture": "bloom"}, "alone"),
    ],
    ids=["soft-cap", "chunks", "ALiBi"],
)
def test_what_segments_cannot_keeps_its_mask(name: str, extra: dict[str, Any], style: RowStyle) -> None:
    model = tiny(name, **extra)
    before = attention_name(model)
    assert row_style(model) == style
    assert unwrap(model).config._attn_implementation == before


def test_memory_is_not_that_of_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """No [T, T] of one row: no mask is made at all, but for blocks behind a window or a prompt in other slots."""
    model, shapes = family("llama"), []
    monkeypatch.setattr(packing, "LEAST_COMMON", 16)
    assert row_style(model) == "shared"
    plain = attention._band
    monkeypatch.setattr(attention, "_band", lambda *sizes: (shapes.append(sizes[:2]), plain(*sizes))[1])
    hidden_of(model, some_samples(), "segments")
    assert not shapes
    hidden_of(model, some_samples(), "shared")
    # one for each response behind another's prompt of 9 tokens, in each of two layers
    assert sorted(set(shapes)) == [(6, 15), (7, 16)]


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_scores_of_a_shared_prompt_are_those_of_whole_sequences(name: str) -> None:
    samples = some_samples()
    need = frozenset({"sampled", "topk", "full"})
    shared, apart = (LocalTeacher(tiny(name, sharp=4.0), name="t", vocab_size=NUM_ROWS) for _ in range(2))
    apart.model.load_state_dict(shared.model.state_dict())
    apart.style = "alone"
    for one, other in zip(shared.score(samples, need, k=3), apart.score(samples, need, k=3), strict=True):
        for field in ("logprob", "entropy", "topk_logprob", "hidden"):
            torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=0, atol=100 * BUDGET[name])
        assert torch.equal(one.topk_ids, other.topk_ids)


STUDENT, TEACHER, REFERENCE = (in_float64(tiny(name, sharp=4.0)) for name in ("qwen3", "llama", "gpt2"))


def judged() -> list[Sample]:
    """With all that any method reads."""
    need = frozenset({"sampled", "topk", "full"})
    samples = some_samples()
    scores, others = (
        LocalTeacher(model, name="t", vocab_size=NUM_ROWS).score(samples, need, k=3) for model in (TEACHER, REFERENCE)
    )
    draw = torch.Generator().manual_seed(2)
    made = []
    for number, (one, reference) in enumerate(zip(scored(samples, scores), others, strict=True)):
        rollout = torch.randn(len(one.token_ids), generator=draw).abs().neg()
        rollout = torch.where(one.author == Author.STUDENT, rollout, torch.nan)
        advantage = float(torch.randn((), generator=draw))
        made.append(
            replace(
                one,
                rollout_logprob=rollout,
                reference_scores=Scores(**vars(reference)),
                advantage=advantage,
                grade=Grade(float(number % 2)),
            )
        )
    return made


JUDGED = judged()


def update(method: Method, style: RowStyle, max_tokens: int) -> tuple[list[Tensor], dict[str, float]]:
    """Loss and gradient, and the metrics, of one update in micro-batches of so many tokens."""
    STUDENT.zero_grad()
    assert row_style(STUDENT) == "shared"
    student = StudentModel(STUDENT, torch.device("cpu"), NUM_ROWS, 1.0, None, max_tokens, style=style)
    heads = Heads({None: lm_head(TEACHER)}, {None: lm_head(REFERENCE)})
    (micros,) = prepare(student, method, JUDGED, step=0, draw=(0, 1), ranks=Ranks())
    loss, metrics = accumulate_gradients(student, micros, heads=heads, step=0, ranks=Ranks())
    gradients = [value.grad.clone() for value in STUDENT.parameters()]
    return [torch.tensor(loss), *gradients], {name: metric.value for name, metric in metrics.items()}


@pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
def test_a_shared_prompt_changes_no_loss_gradient_or_metric(method: Method) -> None:
    """Cut so that a prompt is in several micro-batches."""
    expected, values = update(method, "alone", 10_000)
    found, others = update(method, "shared", 30)
    assert_all_close(found, expected)
    assert others.keys() == values.keys()
    for name, value in values.items():
        assert others[name] == pytest.approx(value, abs=ROUNDING, nan_ok=True), name


@pytest.mark.parametrize("name", ["gkd reverse", "tropd", "kdrl"])
def test_no_cut_of_shared_prompts_changes_the_update(name: str) -> None:
    expected, values = update(CASES[name], "shared", 10_000)
    for max_tokens in (1, 20, 50):
        found, others = update(CASES[name], "shared", max_tokens)
        assert_all_close(found, expected)
        assert others == pytest.approx(values, abs=ROUNDING, nan_ok=True)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_compiled_blocks_change_no_gradient_and_are_compiled_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By segments or with a mask, whatever the lengths are. As traced: a compiler changes the order of sums."""
    plain = tiny(name, sharp=4.0)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    compiled = tiny(name, sharp=4.0)
    compiled.load_state_dict(plain.state_dict())
    style = row_style(compiled)
    compile_blocks(compiled)
    assert row_style(plain) == style
    samples, numbers = some_samples(), []
    for some in (samples, samples[:3], samples[1:]):
        grads = []
        for model in (plain, compiled.train()):
            model.zero_grad()
            hidden_of(model, some, style).square().sum().backward()
            grads.append([value.grad for value in model.parameters() if value.grad is not None])
        assert_all_close(*grads)
        numbers.append(len(graphs))
    assert numbers[0] > 0
    assert numbers[-1] == numbers[0]
    before = len(graphs)
    hidden_of(compiled.eval(), samples, style)
    assert len(graphs) == before
    copied = deepcopy(compiled)
    torch.nn.init.zeros_(unwrap(copied).get_input_embeddings().weight)
    assert not torch.equal(hidden_of(copied, samples, style), hidden_of(compiled, samples, style))
