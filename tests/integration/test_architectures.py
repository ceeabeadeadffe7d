"""Models whose sequences cannot share a call as those of plain attention do, and the script that tries every model."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from transformers import BertGenerationConfig, BertGenerationDecoder, MambaConfig, MambaForCausalLM

from tests.tiny_models import EOS, NUM_ROWS, letters, plain_logp, request, sample
from understudy.engines import HFEngine
from understudy.errors import RecipeError
from understudy.models import backbone_hidden, build_causal_lm, probe_head, row_style
from understudy.packing import lay_out
from understudy.types import Author, Sampling

SCRIPT = Path(__file__).parents[2] / "scripts" / "architectures.py"
SWITCH = 12
ROUNDING = 1e-9
"""float64 weights; LongRoPE's frequencies and a norm here and there are in float32 on both sides alike."""


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules["architectures"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("llama", "works"),
        ("mixtral", "works"),
        ("gemma2", "works"),
        ("mamba", "works"),
        ("jamba", "works"),
        ("zamba2", "works"),
        ("deepseek_v4", "works"),
        ("lfm2", "works"),
        ("llama4_text", "works"),
        ("bert", "refused"),
        ("cpmant", "refused"),
    ],
)
def test_an_architecture(script: ModuleType, name: str, state: str) -> None:
    """Plain, mixture of experts, soft-capped, recurrent, hybrid; two whose cache computes something else, by itself or where it
    is padded; and two that are no causal language models."""
    result = script.examine(name)
    assert result.state == state, result


@pytest.fixture(scope="module")
def longrope() -> Any:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "original_max_position_embeddings": SWITCH,
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [1.0, 3.0, 6.0, 12.0],
    }
    sizes = {"architecture": "phi3", "hidden_size": 32, "num_layers": 2, "num_heads": 4, "rope_parameters": rope}
    sizes |= {"max_position_embeddings": 96, "original_max_position_embeddings": SWITCH}
    model = build_causal_lm(sizes, vocab_size=NUM_ROWS, eos_token_id=EOS, pad_token_id=0, dtype="float64")
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(6.0)
    return model


@torch.no_grad()
def test_short_sequences_are_not_read_with_the_frequencies_of_long_ones(longrope: Any) -> None:
    """Beside a sequence past the switch a short one would move: transformers goes by the longest of a call."""
    samples = [
        sample("long", range(2, 12), range(12, 30)),
        sample("short", [3, 4], [5, 6, 7]),
        sample("b", [8], [9, 10]),
    ]
    layout = lay_out(samples, row_style(longrope))
    found = backbone_hidden(longrope, layout.input_ids, layout.position_ids).flatten(0, 1)[layout.predicts]
    parts = []
    for one in samples:
        ids = one.token_ids[None, :-1]
        parts.append(backbone_hidden(longrope, ids, torch.arange(ids.shape[1])[None])[0, one.prompt_length - 1 :])
    expected = torch.cat(parts)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    packed = lay_out(samples, "packed")
    moved = longrope.model(
        input_ids=packed.input_ids, position_ids=packed.position_ids, use_cache=False
    ).last_hidden_state
    assert float((moved.flatten(0, 1)[packed.predicts] - expected).abs().max()) > 1e-3, (
        "nothing depends on the frequencies"
    )


def test_sampling_across_the_switch_reads_again_what_was_read_before(longrope: Any) -> None:
    """Each token's log-probability is that of a model which reads everything before it at once."""
    engine = HFEngine(longrope, letters(), seed=0, stop_ids=(), vocab_size=NUM_ROWS)
    requests = [request("a", [5, 6, 7], index) for index in range(3)] + [request("b", [9, 10, 11, 12, 13])]
    made = engine.generate(requests, Sampling(max_new_tokens=16), step=0)
    for one in made:
        assert one.num_response_tokens == 16
        assert one.rollout_logprob is not None
        for place in range(one.prompt_length, len(one.token_ids)):
            expected = plain_logp(longrope, one.token_ids[: place + 1])[-1, one.token_ids[place]]
            assert float(one.rollout_logprob[place]) == pytest.approx(float(expected), abs=1e-5)


def test_a_recurrent_models_sample_does_not_depend_on_its_batch() -> None:
    """Padding would enter the state, so only prompts of one length are written together."""
    torch.manual_seed(0)
    config = MambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=4, vocab_size=NUM_ROWS, eos_token_id=EOS, pad_token_id=0
    )
    model: Any = MambaForCausalLM(config).double().eval()
    with torch.no_grad():
        # large enough that what padding leaves in a state shows
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 1.5 / weight.shape[-1] ** 0.5)
    prompts = [[5], [6, 7, 8, 9], [3, 4, 5, 6, 7], [2, 3, 4, 5]]
    wanted = [request(str(number), ids, index) for number, ids in enumerate(prompts) for index in range(2)]
    engine = HFEngine(model, letters(), seed=0, stop_ids=(EOS,), vocab_size=NUM_ROWS)
    together = engine.generate(wanted, Sampling(max_new_tokens=10), step=0)
    alone = [engine.generate([one], Sampling(max_new_tokens=10), step=0)[0] for one in wanted]
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.token_ids, other.token_ids)
        sampled = one.author == Author.STUDENT
        expected = plain_logp(model, one.token_ids).gather(-1, one.token_ids[1:, None]).squeeze(-1)
        assert one.rollout_logprob is not None
        torch.testing.assert_close(one.rollout_logprob[sampled], expected[sampled[1:]].float(), rtol=0, atol=1e-5)


def test_a_model_that_reads_ahead_is_refused() -> None:
    config = BertGenerationConfig(
        vocab_size=NUM_ROWS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    with pytest.raises(RecipeError, match="depends on the tokens behind it"):
        probe_head(BertGenerationDecoder(config).eval())
