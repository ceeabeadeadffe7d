"""A local teacher says what a plain forward of its model says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny_models import ARCHITECTURES, BUDGET, ROUNDING, letters, plain_logp, request, sample, scored, tiny
from understudy.engines import HFEngine
from understudy.errors import ScoreError, VocabularyError
from understudy.linear import score
from understudy.models import load_causal_lm, load_tokenizer, save_hf
from understudy.packing import attach_scores, pack
from understudy.teachers import TEACHERS, Local, LocalTeacher, Setup, local
from understudy.types import Need, Sample, Sampling

SAMPLED: frozenset[Need] = frozenset({"sampled"})
TOPK: frozenset[Need] = frozenset({"topk"})
FULL: frozenset[Need] = frozenset({"full"})


def samples() -> list[Sample]:
    """Prompts and responses of many lengths, one response empty, one prompt of a single token."""
    generator = torch.Generator().manual_seed(1)
    lengths = [(3, 5), (1, 4), (9, 2), (4, 0), (2, 11), (7, 1), (3, 5)]
    return [
        sample(f"p{i}", *(torch.randint(2, 37, (n,), generator=generator).tolist() for n in pair))
        for i, pair in enumerate(lengths)
    ]


def teacher(model: Any, **options: Any) -> LocalTeacher:
    return LocalTeacher(model, **{"name": "t", "vocab_size": model.config.vocab_size} | options)


def rows_of(model: Any, one: Sample, temperature: float = 1.0, vocab_size: int | None = None) -> Tensor:
    """[R, V] by a forward of this sample alone."""
    return plain_logp(model, one.token_ids, temperature, vocab_size)[one.prompt_length - 1 :]


def close(found: Tensor | None, expected: Tensor, atol: float = ROUNDING) -> None:
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("max_batch_tokens", [1, 16, 10_000])
def test_scores_are_those_of_each_sample_alone(name: str, max_batch_tokens: int) -> None:
    """peers 6: misaligned where prompt lengths differ. peers 7: one temperature. Packed rows do not see each other."""
    model = tiny(name, sharp=4.0)
    found = teacher(model, temperature=0.7, max_batch_tokens=max_batch_tokens).score(samples(), SAMPLED)
    for one, scores in zip(samples(), found, strict=True):
        logp = rows_of(model, one, 0.7)
        assert torch.equal(scores.token_ids, one.response_ids)
        close(scores.logprob, logp.gather(-1, one.response_ids[:, None]).squeeze(-1), BUDGET[name])
        close(scores.entropy, -(logp.exp() * logp).sum(-1), BUDGET[name])
        assert scores.topk_ids is None
        assert scores.hidden is None


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_topk_comes_from_the_full_softmax(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """peers 4: truncated probabilities are those of the whole row, not renormalised."""
    monkeypatch.setattr(local, "CHUNK_ELEMENTS", chunk * 40)
    model = tiny(sharp=4.0)
    found = teacher(model, temperature=1.3).score(samples(), TOPK, k=5)
    for one, scores in zip(samples(), found, strict=True):
        logp = rows_of(model, one, 1.3)
        top = logp.topk(5)
        assert scores.topk_ids is not None
        assert torch.equal(scores.topk_ids, top.indices)
        close(scores.topk_logprob, top.values)
        close(scores.logprob, logp.gather(-1, one.response_ids[:, None]).squeeze(-1))
        close(scores.entropy, -(logp.exp() * logp).sum(-1))


@pytest.mark.parametrize(("need", "k"), [(SAMPLED, None), (TOPK, 2)])
@pytest.mark.parametrize("foreign", [{}, {"absent": (3,)}, {"vocab_size": 37, "absent": (3,), "tail_size": 40}])
def test_samples_that_are_kept_bring_their_most_likely_tokens(
    need: frozenset[Need], k: int | None, foreign: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that the student has; no score changes in any bit, whoever is kept beside it."""
    monkeypatch.setattr(local, "CHUNK_ELEMENTS", 3 * 40)
    model = tiny(sharp=4.0)
    judge = teacher(model, **foreign)
    kept = [dataclasses.replace(one, keep_tokens=at in (0, 3, 4)) for at, one in enumerate(samples())]
    plain = judge.score(samples(), need, k=k)
    for one, scores, like in zip(kept, judge.score(kept, need, k=k), plain, strict=True):
        for name in ("logprob", "entropy", "topk_ids", "topk_logprob"):
            value, other = getattr(scores, name), getattr(like, name)
            assert (value is None and other is None) or torch.equal(value, other)
        if not one.keep_tokens:
            assert scores.likeliest_ids is scores.rank is None
            continue
        logp = rows_of(model, one, vocab_size=None if "tail_size" in foreign or not foreign else 40)
        whole = (
            logp
            if "tail_size" in foreign
            else logp.index_fill(-1, torch.tensor(foreign.get("absent", ())).long(), -1e9)
        )
        whole = whole.log_softmax(-1)
        named = whole[:, : foreign.get("vocab_size", 40)].clone()
        named[:, list(foreign.get("absent", ()))] = -torch.inf
        top = named.topk(5)
        assert scores.likeliest_ids is not None
        assert torch.equal(scores.likeliest_ids, top.indices)
        close(scores.likeliest_logprob, top.values)
        own = whole.gather(-1, one.response_ids[:, None])
        assert scores.rank is not None
        assert torch.equal(scores.rank, (whole > own).sum(-1) + 1)


def test_k_above_the_vocabulary_is_the_vocabulary() -> None:
    scores = teacher(tiny(), vocab_size=37).score(samples()[:1], TOPK, k=99)[0]
    assert scores.topk_ids is not None
    assert scores.topk_logprob is not None
    assert scores.topk_ids.shape == (5, 37)
    close(scores.topk_logprob.exp().sum(-1), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hidden_states_and_head_are_the_whole_row(name: str) -> None:
    model = tiny(name, sharp=4.0)
    judge = teacher(model, temperature=0.7, vocab_size=37)
    for one, scores in zip(samples(), judge.score(samples(), FULL), strict=True):
        assert scores.hidden is not None
        assert scores.logprob is None
        close(judge.head_for(None).logits(scores.hidden).log_softmax(-1), rows_of(model, one, 0.7, 37), BUDGET[name])


def test_everything_at_once_is_one_forward() -> None:
    model, calls = tiny(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    judge = teacher(model)
    calls.clear()
    kept = [dataclasses.replace(one, keep_tokens=True) for one in samples()]
    scores = judge.score(kept, frozenset({"topk", "full", "sampled"}), k=2)
    assert len(calls) == 1
    assert all(value is not None for one in scores for value in dataclasses.asdict(one).values())


def test_padding_rows_change_nothing() -> None:
    """peers 9 and 13 in miniature: 37 tokens, heads of 38 and 40 rows whose padding holds large numbers."""
    small, large = tiny(num_rows=38), tiny(num_rows=40)
    state = small.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name][:37], torch.full((3, 32), 50.0, dtype=torch.float64)])
    large.load_state_dict(state)
    with torch.no_grad():
        small.lm_head.weight[37:] = -70.0
    both = [
        teacher(model, vocab_size=37).score(samples(), frozenset({"topk", "full"}), k=37) for model in (small, large)
    ]
    for one, a, b in zip(samples(), *both, strict=True):
        assert bool((a.logprob == b.logprob).all())
        assert bool((a.entropy == b.entropy).all())
        assert bool((a.topk_ids == b.topk_ids).all())
        close(a.logprob, rows_of(small, one, 1.0, 37).gather(-1, one.response_ids[:, None]).squeeze(-1))
    with pytest.raises(VocabularyError, match=r"41 tokens.*40 rows"):
        teacher(large, vocab_size=41)


def test_bfloat16_softmax_is_in_float32() -> None:
    """peers 10. The weights stay in bfloat16; logits and all that follows are float32."""
    model = tiny(dtype="bfloat16", sharp=8.0)
    judge = teacher(model)
    for need, k in ((SAMPLED, None), (TOPK, 4)):
        scores = judge.score(samples(), need, k=k)[0]
        hidden = judge.score(samples(), FULL)[0].hidden
        assert hidden is not None
        assert scores.logprob is not None
        assert hidden.dtype == torch.bfloat16
        assert scores.logprob.dtype == torch.float32
        logp = (hidden.double() @ model.lm_head.weight.double().T).log_softmax(-1)
        expected = logp.gather(-1, samples()[0].response_ids[:, None]).squeeze(-1)
        # float32 sums of 32 products and 40 exponentials of size 1
        torch.testing.assert_close(scores.logprob.double(), expected, rtol=0, atol=1e-5)


def test_scores_pack_row_by_row() -> None:
    """Teacher scores and the student's own scoring pass over the same layout agree to the last bit of rounding."""
    model, made = tiny(sharp=4.0), samples()
    judge = teacher(model)
    batch = pack(scored(made, judge.score(made, TOPK, k=3)))
    hidden = torch.cat([scores.hidden for scores in judge.score(made, FULL) if scores.hidden is not None])
    logprob, entropy = score(hidden, judge.head_for(None), batch.target)
    close(batch.teacher_logprob, logprob)
    close(batch.teacher_entropy, entropy)


@pytest.mark.parametrize("offload", [False, True])
def test_the_model_is_left_as_it_was(offload: bool) -> None:
    model = tiny("gemma2")
    model.train()
    model.model.layers[0].eval()
    where = [parameter.data_ptr() for parameter in model.parameters()]
    judge = teacher(model, offload=offload, device="cpu")
    hidden = judge.score(samples(), FULL)[0].hidden
    assert hidden is not None
    assert not hidden.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert where == [parameter.data_ptr() for parameter in model.parameters()]
    assert model.training
    assert not model.model.layers[0].training


def test_offloaded_scores_are_the_same() -> None:
    """On a machine with one device the copy is the original; a device of its own takes the weights and gives them back."""
    model = tiny(sharp=4.0)
    for a, b in zip(
        teacher(model).score(samples(), SAMPLED), teacher(model, offload=True).score(samples(), SAMPLED), strict=True
    ):
        assert bool((a.logprob == b.logprob).all())


def test_offloaded_weights_come_back_after_an_error() -> None:
    model = tiny()
    judge = teacher(model, offload=True, device="meta")
    with pytest.raises((RuntimeError, NotImplementedError)):
        judge.score(samples(), SAMPLED)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    assert {buffer.device.type for buffer in model.buffers()} == {"cpu"}
    assert judge.head_for(None).weight.device.type == "meta"


def test_nothing_asked_nothing_done() -> None:
    model, calls = tiny(), []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    judge = teacher(model)
    calls.clear()
    for need in (frozenset[Need](), frozenset[Need]({"none"})):
        scores = judge.score(samples(), need)
        assert [one.token_ids.tolist() for one in scores] == [one.response_ids.tolist() for one in samples()]
        assert all(one.logprob is None for one in scores)
    assert judge.score([], SAMPLED) == []
    assert not calls


def test_refusals() -> None:
    judge = teacher(tiny(max_position_embeddings=12))
    with pytest.raises(ScoreError, match=r"cannot give \['verbal'\]"):
        judge.score(samples(), frozenset({"sampled", "verbal"}))
    with pytest.raises(ValueError, match="k is None"):
        judge.score(samples(), TOPK)
    judge.score(samples(), SAMPLED)
    with pytest.raises(ScoreError, match=r"long#0 has 14 tokens, but teacher 't' has 12 positions"):
        judge.score([sample("long", [3] * 7, [4] * 7)], SAMPLED)


def test_scores_of_other_ids_are_refused_where_they_are_packed() -> None:
    made = samples()
    scores = teacher(tiny()).score(made, SAMPLED)
    scores[2], scores[5] = scores[5], scores[2]
    with pytest.raises(ScoreError, match="p2#0"):
        attach_scores(made, scores, "error")


def test_nan_of_the_teacher_is_refused_where_it_is_packed() -> None:
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ScoreError, match=r"p0#0.*logprob is missing"):
        attach_scores(samples(), teacher(model).score(samples(), SAMPLED), "error")


def test_fingerprint_tells_whatever_changes_scores(tmp_path: Path) -> None:
    model = tiny()
    base = teacher(model).fingerprint
    assert base == teacher(tiny()).fingerprint == teacher(tiny(), name="other", max_batch_tokens=7).fingerprint
    save_hf(model, letters(), tmp_path)
    assert base == teacher(load_causal_lm(str(tmp_path))).fingerprint
    others = [
        teacher(model, temperature=0.5),
        teacher(model, vocab_size=39),
        teacher(tiny(dtype="float32")),
        teacher(tiny(rms_norm_eps=1e-3)),
    ]
    changed = tiny()
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-9
    others.append(teacher(changed))
    swapped = tiny()
    with torch.no_grad():
        weight = swapped.model.layers[1].mlp.up_proj.weight
        weight[20:22] = weight[20:22].flip(0)
    others.append(teacher(swapped))
    assert len({base, *(other.fingerprint for other in others)}) == len(others) + 1


def test_a_section_of_a_recipe_loads_a_teacher(tmp_path: Path) -> None:
    """The checkpoint's own precision unless told otherwise."""
    save_hf(tiny(dtype="bfloat16"), letters(), tmp_path)
    section = TEACHERS["local"](model=str(tmp_path))
    assert section == Local(model=str(tmp_path))
    judge = section.open(Setup(name="math", vocab_size=37, temperature=0.6))
    assert judge.name == "math"
    assert judge.head_for(None).weight.dtype == torch.bfloat16
    assert (judge.head_for(None).temperature, judge.head_for(None).num_tokens) == (0.6, 37)
    wide = dataclasses.replace(section, dtype="float64", offload=True).open(Setup(name="math", vocab_size=37))
    assert wide.head_for(None).weight.dtype == torch.float64


def test_real_weights_judge_their_own_samples(shared: Path) -> None:
    """A student that is its own teacher: the log-probabilities of both agree token by token, and it writes English."""
    path = str(shared / "models" / "stories260K")
    model, tokenizer = load_causal_lm(path, dtype="float32"), load_tokenizer(path)
    engine = HFEngine(model, tokenizer, seed=0, stop_ids=(2,), vocab_size=512)
    openings = ["Once upon a time", "Lily had a red ball. One day"]
    asked = [request(text, tokenizer(text)["input_ids"], index) for text in openings for index in range(3)]
    made = engine.generate(asked, Sampling(0.8, max_new_tokens=60), step=0)
    judged = teacher(model, vocab_size=512, temperature=0.8).score(made, SAMPLED)
    for one, scores in zip(made, judged, strict=True):
        assert one.rollout_logprob is not None
        assert scores.logprob is not None
        # float32, cached and uncached: rounding of logits up to 20 over five layers
        torch.testing.assert_close(one.rollout_logprob[one.prompt_length :], scores.logprob, rtol=0, atol=1e-4)
    assert sum(word in one.text for one in made for word in (" the ", " was ", " to ")) >= len(made)


def test_a_sequence_never_meets_a_cache() -> None:
    """With a cache, sequences side by side see each other: an error of order 1, without a word."""
    seen: list[Any] = []
    model = tiny()
    model.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs), with_kwargs=True)
    judge = teacher(model, max_batch_tokens=10_000)
    seen.clear()
    judge.score(samples(), SAMPLED)
    assert len(seen) == 1
    assert seen[0]["use_cache"] is False
    assert seen[0]["attention_mask"] is None


@pytest.mark.parametrize("architecture", ["opt", "bloom", "llama", "gpt2"])
def test_models_that_mix_packed_sequences_get_a_row_for_each(architecture: str) -> None:
    """Peers 6: some architectures ignore positions that restart; their scores must not depend on neighbours either."""
    from understudy.models import build_causal_lm, row_style

    sizes = {"architecture": architecture, "hidden_size": 16, "num_layers": 2, "num_heads": 2}
    model = build_causal_lm(sizes, vocab_size=37, eos_token_id=1, pad_token_id=0)
    assert row_style(model) == ("alone" if architecture == "bloom" else "shared")
    judge, need = teacher(model), frozenset({"sampled"})
    together = judge.score(samples(), need)
    for one, found in zip(samples(), together, strict=True):
        torch.testing.assert_close(found.logprob, judge.score([one], need)[0].logprob, rtol=1e-4, atol=1e-5)
