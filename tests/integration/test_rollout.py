"""Sampling with a Hugging Face model: the same tokens and log-probabilities as the plain model, however it is batched."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny_models import ARCHITECTURES, EOS, NUM_ROWS, letters, plain_logp, request, tiny
from understudy import packing
from understudy.engines import HF, EngineSetup, HFEngine, sections
from understudy.engines.hf import decode, packed
from understudy.engines.hf import engine as hf_engine
from understudy.engines.hf.engine import plan_batches
from understudy.errors import DataError, RecipeError, TrainingError
from understudy.models import apply_lora, enable_gradient_checkpointing, has_bfloat16, row_style
from understudy.randomness import keyed_uniform
from understudy.types import Author, Request, Sample, Sampling

PROMPTS = [[5], [6, 7, 8, 9], [3, 4], [9, 8, 7, 6, 5, 4, 3], [2, 2, 2], [6, 7, 8, 9]]
DTYPES = {"gemma2": "float32"}
"""Its attention overflows on padding in float64 (the softmax is float32); all else here is in float64."""
BFLOAT16 = has_bfloat16(torch.device("cpu"))
FLOAT32 = 1e-6
"""`Sample.rollout_logprob` is kept in float32; log-probabilities here are below 10."""


def make_engine(model: Any, **options: Any) -> HFEngine:
    return HFEngine(
        model, letters(), **{"seed": 0, "stop_ids": (EOS,), "vocab_size": model.config.vocab_size} | options
    )


def requests(per_prompt: int = 4) -> list[Request]:
    return [request(f"p{number}", ids, index) for number, ids in enumerate(PROMPTS) for index in range(per_prompt)]


def check_logprob(model: Any, sample: Sample, temperature: float = 1.0, vocab_size: int | None = None) -> None:
    assert sample.rollout_logprob is not None
    logp = plain_logp(model, sample.token_ids, temperature, vocab_size)
    expected = logp.gather(-1, sample.token_ids[1:, None]).squeeze(-1).float()
    sampled = sample.author == Author.STUDENT
    torch.testing.assert_close(sample.rollout_logprob[sampled], expected[sampled[1:]], rtol=0, atol=FLOAT32)
    assert bool(sample.rollout_logprob[~sampled].isnan().all())


def same(a: Sample, b: Sample) -> bool:
    return torch.equal(a.token_ids, b.token_ids) and a.finish == b.finish and a.text == b.text


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logprob_is_that_of_a_forward_without_cache(name: str) -> None:
    """Left padding, rows that leave the cache, shared prompts, soft-cap and scale: none of it may show."""
    model = tiny(name, sharp=4.0, dtype=DTYPES.get(name, "float64"))
    made = make_engine(model).generate(requests(), Sampling(temperature=0.7, max_new_tokens=12), step=0)
    for sample in made:
        check_logprob(model, sample, temperature=0.7)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_contexts_side_by_side_are_those_of_padded_rows(name: str) -> None:
    """Attention by segments reads all contexts in one row, into a cache that is padded as ever."""
    model, sampling = tiny(name, sharp=4.0), Sampling(max_new_tokens=12)
    padded = make_engine(model)
    expected = padded.generate(requests(), sampling, step=0)
    assert padded.style == ("padded", "")
    assert row_style(model) == "shared"
    lengths, beside = list[tuple[int, ...]](), make_engine(model)
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(tuple((args or [kwargs["input_ids"]])[0].shape)), with_kwargs=True
    )
    made = beside.generate(requests(), sampling, step=0)
    assert beside.style == ("segments", "")
    assert (1, sum(map(len, PROMPTS[:-1]))) in lengths, "every distinct context once, without padding"
    for one, other in zip(expected, made, strict=True):
        assert same(one, other)
        check_logprob(model, other)


@pytest.mark.parametrize("ends", [[[5, 6], [7, 8, 9], []], [[5, 6], [7, 8], [9, 4]]], ids=["ragged", "equal"])
def test_what_contexts_begin_with_in_common_is_read_once(
    ends: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """17 tokens of 38 and 39: 9 + 3 + 3 + 2 where one context is the beginning of two others, and 11 + 2 + 2 + 2."""
    monkeypatch.setattr(packing, "LEAST_COMMON", 2)
    beginning = [3, 4, 5, 6, 7, 8, 9, 10]
    prompts = [*([*beginning, 11, *end] for end in ends), [*beginning[:4], 11, 12]]
    asked = [request(f"p{number}", ids, index) for number, ids in enumerate(prompts) for index in range(2)]
    model, sampling = tiny("qwen3", sharp=4.0), Sampling(max_new_tokens=12)
    expected = make_engine(model).generate(asked, sampling, step=0)
    assert row_style(model) == "shared"
    read: list[int] = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: read.append((args or [kwargs["input_ids"]])[0].numel()), with_kwargs=True
    )
    made = make_engine(model).generate(asked, sampling, step=0)
    assert 17 in read
    for one, other in zip(expected, made, strict=True):
        assert same(one, other)
        check_logprob(model, other)


@pytest.mark.parametrize("name", ["gemma2", "gemma3"])
def test_layers_with_a_window_have_padded_rows(name: str) -> None:
    """Their cache forgets, so it takes no contexts in one row."""
    model = tiny(name, sharp=4.0, dtype="float32")
    row_style(model)
    made = make_engine(model)
    made.generate(requests(1), Sampling(max_new_tokens=3), step=0)
    assert made.style == ("padded", "")


@pytest.mark.parametrize(
    "dtype",
    [None, pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not BFLOAT16, reason="the CPU has no bfloat16"))],
    ids=["own", "bfloat16"],
)
def test_products_by_onednn_are_the_plain_ones(dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bias, a cut vocabulary and adapters; and the model is left as it was."""
    pytest.importorskip("peft")
    model = apply_lora(tiny("llama", architecture="qwen2", sharp=4.0, dtype="float32"), rank=2, alpha=8.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "bias" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    plain = make_engine(model, vocab_size=37).generate(requests(), Sampling(max_new_tokens=8), step=0)
    calls, multiply = list[tuple[Any, ...]](), packed._multiply
    monkeypatch.setattr(packed, "MIN_ELEMENTS", 1)
    monkeypatch.setattr(hf_engine, "PACK_FROM", 8)

    def counted(*args: Any) -> Tensor:
        calls.append(args)
        return multiply(*args)

    monkeypatch.setattr(packed, "_multiply", counted)
    made = make_engine(model, vocab_size=37, dtype=dtype).generate(requests(), Sampling(max_new_tokens=8), step=0)
    # the head, the seven layers of both blocks, and two adapters of each
    assert len(calls) == 8 * (1 + 2 * 7 * 3)
    assert not any("forward" in vars(module) for module in model.modules())
    for one, other in zip(plain, made, strict=True):
        assert other.rollout_logprob is not None
        # bfloat16 has 8 bits: products of two layers move logits of up to 5
        budget = 0.1 if dtype == torch.bfloat16 else 1e-5
        logp = plain_logp(model, other.token_ids, 1.0, 37).gather(-1, other.token_ids[1:, None]).squeeze(-1)
        torch.testing.assert_close(
            other.rollout_logprob[other.prompt_length :], logp[other.prompt_length - 1 :], rtol=0, atol=budget
        )
        assert same(one, other) or dtype == torch.bfloat16


def test_a_precision_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def opened(dtype: str, weights: str = "float32") -> HFEngine:
        setup = EngineSetup(
            model=tiny(dtype=weights),
            tokenizer=letters(),
            vocab_size=NUM_ROWS,
            stop_ids=(EOS,),
            autocast=None,
            seed=0,
            sampling=Sampling(),
            max_new_tokens=4,
            run_dir=tmp_path,
        )
        return HF(dtype=dtype).open(setup)  # type: ignore[arg-type]

    monkeypatch.setattr(sections, "has_bfloat16", lambda device: True)
    assert opened("auto").dtype is None
    assert opened("bfloat16").dtype == torch.bfloat16
    with pytest.raises(RecipeError, match="rollout.dtype is bfloat16, but the student's weights are float64; leave"):
        opened("bfloat16", "float64")
    monkeypatch.setattr(sections, "has_bfloat16", lambda device: False)
    with pytest.raises(RecipeError, match="this CPU has no instructions for bfloat16"):
        opened("bfloat16")


def test_a_model_that_fails_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(dtype="float32")
    monkeypatch.setattr(packed, "MIN_ELEMENTS", 1)
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(TrainingError, match="not finite"):
        make_engine(model).generate(requests(), Sampling(max_new_tokens=32), step=0)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_sample_does_not_depend_on_its_batch(name: str) -> None:
    model = tiny(name, sharp=4.0, dtype=DTYPES.get(name, "float64"))
    wanted, sampling = requests(), Sampling(max_new_tokens=10)
    together = make_engine(model).generate(wanted, sampling, step=7)
    in_reverse = make_engine(model, max_batch_tokens=45).generate(wanted[::-1], sampling, step=7)[::-1]
    alone = [make_engine(model).generate([one], sampling, step=7)[0] for one in wanted]
    assert all(same(a, b) and same(a, c) for a, b, c in zip(together, in_reverse, alone, strict=True))
    assert len({sample.text for sample in together[:4]}) > 1


def test_rows_that_are_drawn_in_parts_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary is drawn from a few rows at a time, which bounds memory and changes nothing."""
    model, sampling = tiny(sharp=4.0), Sampling(max_new_tokens=8)
    whole = make_engine(model).generate(requests(), sampling, step=0)
    monkeypatch.setattr(decode, "LOGIT_ELEMENTS", 5 * model.config.vocab_size)
    parts = make_engine(model).generate(requests(), sampling, step=0)
    assert all(same(a, b) for a, b in zip(whole, parts, strict=True))


def test_draws_depend_on_seed_step_and_stream() -> None:
    model, wanted, sampling = tiny(), requests(), Sampling(max_new_tokens=10)
    base = make_engine(model).generate(wanted, sampling, step=1)
    again = make_engine(model).generate(wanted, sampling, step=1)
    assert all(same(a, b) for a, b in zip(base, again, strict=True))
    for other in (
        make_engine(model, seed=1).generate(wanted, sampling, step=1),
        make_engine(model).generate(wanted, sampling, step=2),
        make_engine(model).generate(wanted, sampling, step=1, stream="eval"),
    ):
        assert not any(same(a, b) for a, b in zip(base, other, strict=True))


def test_a_token_is_the_inverse_of_the_models_distribution() -> None:
    """The whole path at once: keyed number, temperature, cut vocabulary, cumulative probabilities of a plain forward."""
    model = tiny(sharp=4.0)
    made = make_engine(model, seed=5, vocab_size=37).generate(requests(), Sampling(0.8, max_new_tokens=6), step=3)
    for sample in made:
        uniform = keyed_uniform(5, "sample", 3, [sample.key], 6)[0]
        logp = plain_logp(model, sample.token_ids, 0.8, 37)[sample.prompt_length - 1 :]
        expected = torch.searchsorted(logp.exp().cumsum(-1), uniform[: len(logp), None], right=True).squeeze(-1)
        assert torch.equal(sample.response_ids, expected)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_that_of_generate(name: str) -> None:
    model = tiny(name, sharp=4.0, dtype=DTYPES.get(name, "float64"))
    made = make_engine(model).generate(requests(1), Sampling(temperature=0.0, max_new_tokens=12), step=0)
    for sample in made:
        prompt = sample.token_ids[None, : sample.prompt_length]
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12, eos_token_id=EOS
        )
        assert torch.equal(sample.token_ids, expected[0])
        check_logprob(model, sample)


@pytest.mark.parametrize(
    "sampling", [Sampling(0.9, top_k=3, max_new_tokens=8), Sampling(0.9, top_p=0.6, max_new_tokens=8)], ids=["k", "p"]
)
def test_filtered_logprob_is_unfiltered(sampling: Sampling) -> None:
    model = tiny(sharp=4.0)
    made = make_engine(model).generate(requests(), sampling, step=0)
    for sample in made:
        check_logprob(model, sample, temperature=0.9)
        if sampling.top_k:
            allowed = plain_logp(model, sample.token_ids)[sample.prompt_length - 1 :].topk(3).indices
            assert bool((allowed == sample.response_ids[:, None]).any(-1).all())


def test_every_stop_token_ends_a_response_and_is_part_of_it() -> None:
    """peers 12: the terminating EOS is a token like any other; a truncated response has none."""
    stops = (EOS, 4, 11)
    model = tiny()
    made = make_engine(model, stop_ids=stops).generate(requests(40), Sampling(max_new_tokens=16), step=0)
    assert {sample.finish for sample in made} == {"stop", "length"}
    for sample in made[::7]:
        check_logprob(model, sample)
    last = {int(sample.response_ids[-1]) for sample in made if sample.finish == "stop"}
    assert last == set(stops)
    for sample in made:
        ends = torch.isin(sample.response_ids, torch.tensor(stops))
        assert not bool(ends[:-1].any())
        assert bool(ends[-1]) == (sample.finish == "stop")
        assert sample.truncated == (sample.finish == "length")
        assert (sample.num_response_tokens == 16) or not sample.truncated
        written = sample.response_ids[: -1 if sample.finish == "stop" else None]
        assert sample.text == letters().decode(written, skip_special_tokens=True)


def test_a_stop_token_in_the_prompt_ends_nothing() -> None:
    model = tiny()
    made = make_engine(model).generate(
        [request("a", [EOS, 5, EOS], i) for i in range(20)], Sampling(max_new_tokens=5), step=0
    )
    assert all(sample.num_response_tokens >= 1 for sample in made)
    assert {sample.prompt_length for sample in made} == {3}


def test_a_prefix_is_the_teachers() -> None:
    model = tiny(sharp=4.0)
    wanted = [
        request("a", [5, 6], prefix=[7, 8, 9]),
        request("b", [5, 6, 7], prefix=[]),
        request("c", [5], prefix=[10]),
        request("d", [4, 4]),
    ]
    made = make_engine(model).generate(wanted, Sampling(max_new_tokens=6), step=0)
    for one, sample in zip(wanted, made, strict=True):
        prefix = [] if one.prefix_ids is None else one.prefix_ids.tolist()
        assert sample.prompt_length == one.token_ids.numel()
        assert sample.response_ids[: len(prefix)].tolist() == prefix
        num_sampled = sample.num_response_tokens - len(prefix)
        assert 1 <= num_sampled <= 6
        assert sample.author.tolist() == (
            [Author.PROMPT] * sample.prompt_length + [Author.TEACHER] * len(prefix) + [Author.STUDENT] * num_sampled
        )
        assert sample.text.startswith(letters().decode(prefix))
        check_logprob(model, sample)


def test_a_prefix_of_own_tokens_is_continued_with_the_same_draws() -> None:
    """The number of a token is that of its position in the response, whoever wrote what stands before it."""
    model = tiny(sharp=2.0)
    whole = make_engine(model, stop_ids=(99,)).generate(requests(1), Sampling(max_new_tokens=9), step=0)
    cut = [
        Request(one.prompt, one.index, one.token_ids, sample.response_ids[: number % 3 + 1])
        for number, (one, sample) in enumerate(zip(requests(1), whole, strict=True))
    ]
    again = make_engine(model, stop_ids=(99,)).generate(cut, Sampling(max_new_tokens=6), step=0)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a.token_ids[: b.token_ids.numel()], b.token_ids)


def test_each_sample_carries_its_facts() -> None:
    model = tiny()
    live = make_engine(model)
    live.push(None, 17)
    wanted = [replace(one, prompt=replace(one.prompt, teacher="math")) for one in requests(2)]
    made = live.generate(wanted, Sampling(max_new_tokens=5), step=0)
    for one, sample in zip(wanted, made, strict=True):
        assert sample.key == one.key
        assert sample.prompt is one.prompt
        assert sample.teacher == "math"
        assert torch.equal(sample.token_ids[: sample.prompt_length], one.token_ids)
        assert sample.policy_version is not None
        assert sample.policy_version.tolist() == [-1] * sample.prompt_length + [17] * sample.num_response_tokens
        shapes = {
            t.shape
            for t in (sample.token_ids, sample.author, sample.rollout_logprob, sample.policy_version)
            if t is not None
        }
        assert shapes == {(sample.prompt_length + sample.num_response_tokens,)}
    assert live.generate([], Sampling(), step=0) == []


def test_padding_rows_are_never_sampled() -> None:
    """peers 13, in miniature: 40 rows of head for 37 tokens, and the padding rows have the largest logits."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[37:] = 100 * model.lm_head.weight[36]
    for sampling in (Sampling(max_new_tokens=8), Sampling(top_k=40, max_new_tokens=8), Sampling(0.0, max_new_tokens=8)):
        made = make_engine(model, vocab_size=37).generate(requests(), sampling, step=0)
        assert max(int(sample.response_ids.max()) for sample in made) < 37
        for sample in made:
            check_logprob(model, sample, vocab_size=37)


def test_training_mode_dropout_and_checkpointing_do_not_reach_the_engine() -> None:
    model = tiny("qwen3", sharp=4.0, attention_dropout=0.5)
    engine = make_engine(model)
    expected = engine.generate(requests(), Sampling(max_new_tokens=8), step=0)
    enable_gradient_checkpointing(model)
    model.train()
    model.model.layers[0].eval()
    lengths = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    made = engine.generate(requests(), Sampling(max_new_tokens=8), step=0)
    assert all(same(a, b) for a, b in zip(expected, made, strict=True))
    assert set(lengths[1:]) == {1}
    assert model.training
    assert not model.model.layers[0].training
    assert made[0].rollout_logprob is not None
    assert not made[0].rollout_logprob.requires_grad


def test_the_model_is_live() -> None:
    model = tiny()
    live = make_engine(model)
    before = live.generate(requests(), Sampling(0.0, max_new_tokens=4), step=0)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    after = live.generate(requests(), Sampling(0.0, max_new_tokens=4), step=0)
    assert not any(same(a, b) for a, b in zip(before, after, strict=True))


def test_adapters_are_sampled_with() -> None:
    pytest.importorskip("peft")
    model = apply_lora(tiny(sharp=4.0), rank=2, alpha=8.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    for sample in make_engine(model).generate(requests(), Sampling(max_new_tokens=6), step=0):
        check_logprob(model, sample)


def test_bfloat16_logits_are_formed_in_float32() -> None:
    """peers 10: with a row of bfloat16 logits the probabilities would err by percents."""
    model = tiny(dtype="bfloat16", sharp=4.0)
    engine, seen = make_engine(model), list[Tensor]()
    # how contexts share a batch is found with the first one
    engine.generate([request("b", [5])], Sampling(max_new_tokens=1), step=0)
    model.model.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state[:, -1]))
    one = engine.generate([request("a", [5, 6])], Sampling(max_new_tokens=1), step=0)[0]
    assert one.rollout_logprob is not None
    logp = (seen[0].double() @ model.lm_head.weight.detach().double().T).log_softmax(-1)
    assert math.isclose(float(one.rollout_logprob[-1]), float(logp[0, one.token_ids[-1]]), abs_tol=FLOAT32)


def test_autocast_is_the_trainers_precision() -> None:
    model = tiny(dtype="float32", sharp=4.0)
    sample = make_engine(model, autocast=torch.bfloat16).generate(requests(1), Sampling(max_new_tokens=4), step=0)[3]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(sample.token_ids[None, :-1], use_cache=False).last_hidden_state[0]
    logp = (hidden.float() @ model.lm_head.weight.detach().T).log_softmax(-1).gather(-1, sample.token_ids[1:, None])
    assert sample.rollout_logprob is not None
    # a cached and an uncached forward in bfloat16: 8 bits of hidden state, logits up to 5
    torch.testing.assert_close(
        sample.rollout_logprob[sample.prompt_length :], logp[sample.prompt_length - 1 :, 0], rtol=0, atol=0.05
    )


def test_refusals_come_before_sampling() -> None:
    model = tiny(max_position_embeddings=16)
    with pytest.raises(RecipeError, match=r"p3#0: 7 prompt tokens and max_new_tokens 10 make 17.*16 positions"):
        make_engine(model).generate(requests(), Sampling(max_new_tokens=10), step=0)
    make_engine(model).generate(requests(1), Sampling(max_new_tokens=9), step=0)
    with pytest.raises(DataError, match="empty#0 has no prompt token"):
        make_engine(model).generate(
            [Request(request("empty", [1]).prompt, 0, torch.tensor([], dtype=torch.int64))], Sampling(), step=0
        )


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.0), Sampling(top_k=3)], ids=["plain", "greedy", "filtered"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_diverged_weights_are_named(sampling: Sampling, value: float) -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[5] = value
    with pytest.raises(TrainingError, match=r"p3#0 \(and 23 more\): the student's logits are not finite"):
        make_engine(model).generate(requests(), replace(sampling, max_new_tokens=3), step=0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 30), st.integers(1, 400))
def test_batches_keep_to_the_budget(lengths: list[int], num_new: int, max_tokens: int) -> None:
    groups = plan_batches(lengths, num_new, max_tokens)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) * (max(lengths[index] for index in group) + num_new) <= max_tokens or len(group) == 1
    padding = 0 if max_tokens < 100 else 20
    for group in plan_batches(lengths, num_new, max_tokens, max_padding=padding):
        longest = max(lengths[index] for index in group)
        assert sum(longest - lengths[index] for index in group) <= padding
    # no two neighbours would have fitted together
    for first, second in itertools.pairwise(groups):
        assert (len(first) + 1) * (lengths[first[0]] + num_new) > max_tokens
        assert min(lengths[i] for i in first) >= max(lengths[i] for i in second)
