"""Properties of packing, for any samples: every response token once, predicted by the token before it, however split."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny_models import EOS, sample, scored, tiny
from understudy import packing
from understudy.errors import DataError, ScoreError
from understudy.linear import count_denominators, evaluate
from understudy.methods import GKD, OPD, SFT, Method
from understudy.models import backbone_hidden, lm_head
from understudy.packing import LOGPROB_TOLERANCE, RowStyle, ScoreField, attach_scores, lay_out, micro_batches, pack
from understudy.trainer.distributed import balanced
from understudy.types import Author, Sample, Scores

VOCABULARY = 12
STYLES: tuple[RowStyle, ...] = ("shared", "segments", "packed", "single", "alone")
AUTHORS = (Author.STUDENT, Author.STUDENT, Author.STUDENT, Author.TEACHER, Author.ENVIRONMENT)
ROUNDING = 1e-12
"""float64, another order of sums."""


@pytest.fixture(autouse=True, scope="module")
def prompts_in_common() -> Iterator[None]:
    """Beginnings of one token, too, are computed once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "LEAST_COMMON", 1)
        yield


tokens = st.integers(0, VOCABULARY - 1)


@st.composite
def one_sample(draw: st.DrawFn) -> Sample:
    response = draw(st.lists(tokens, max_size=7))
    wrote = draw(st.lists(st.sampled_from(AUTHORS), min_size=len(response), max_size=len(response)))
    return sample("", draw(st.lists(tokens, min_size=1, max_size=7)), response, author=[int(who) for who in wrote])


@st.composite
def many_samples(draw: st.DrawFn, min_size: int = 1) -> list[Sample]:
    made = draw(st.lists(one_sample(), min_size=min_size, max_size=8))
    # some share the prompt of the one before, or its beginning
    for number in range(1, len(made)):
        shares = draw(st.sampled_from(["nothing", "all", "beginning"]))
        if shares != "nothing":
            before, own = made[number - 1], made[number]
            prompt = before.token_ids[: before.prompt_length].tolist()
            if shares == "beginning":
                prompt = [*prompt[: draw(st.integers(0, len(prompt)))], *own.token_ids[: own.prompt_length].tolist()]
            author = own.author[own.prompt_length :].tolist()
            made[number] = sample("", prompt, own.response_ids.tolist(), author=author)
    return [replace(one, prompt=replace(one.prompt, id=f"p{number}")) for number, one in enumerate(made)]


def score_all(samples: Sequence[Sample], k: int = 3, seed: int = 0) -> list[Scores]:
    """Random scores of every response token."""
    draw = torch.Generator().manual_seed(seed)
    found = []
    for one in samples:
        logp = torch.randn(one.num_response_tokens, VOCABULARY, generator=draw, dtype=torch.float64).log_softmax(-1)
        top = logp.topk(k)
        at_token = logp.gather(-1, one.response_ids[:, None]).squeeze(-1)
        entropy = -(logp.exp() * logp).sum(-1)
        found.append(Scores(one.response_ids, at_token, top.indices, top.values, entropy))
    return found


@settings(max_examples=300, deadline=None)
@given(many_samples())
def test_every_response_token_is_predicted_by_the_token_before_it(samples: list[Sample]) -> None:
    """peers 6: off by one. Follows each predicting slot back to its own sequence, or to its segment and the prompt before."""
    for style in STYLES:
        layout = lay_out(samples, style)
        ids, positions = layout.input_ids.flatten(), layout.position_ids.flatten()
        assert layout.sizes == tuple(one.num_response_tokens for one in samples)
        assert layout.predicts.numel() == sum(layout.sizes)
        if style != "shared":
            assert layout.predicts.unique().numel() == layout.predicts.numel()
        for one, slots in zip(samples, layout.predicts.split(layout.sizes), strict=True):
            for token, slot in zip(range(one.prompt_length, one.token_ids.numel()), slots.tolist(), strict=True):
                assert int(positions[slot]) == token - 1
                history = ids[slot - token + 1 : slot + 1]
                for segment in layout.segments:
                    if segment.start <= slot < segment.stop:
                        before = [ids[slice(*span)] for span in segment.before]
                        history = torch.cat([*before, ids[segment.start : slot + 1]])
                # the whole history stands directly before the slot, in the same row
                assert torch.equal(history, one.token_ids[:token])
                assert layout.segments or slot % layout.input_ids.shape[1] >= token - 1


@settings(max_examples=300, deadline=None)
@given(many_samples(), st.sampled_from(STYLES[1:]))
def test_sequences_begin_at_zero_and_nothing_else_continues_them(samples: list[Sample], style: RowStyle) -> None:
    """What a free slot holds is a sequence by itself, so it is seen by none."""
    layout = lay_out(samples, style)
    starts = int((layout.position_ids == 0).sum())
    used = sum(one.token_ids.numel() - 1 for one in samples)
    num_sequences = sum(one.token_ids.numel() > 1 for one in samples)
    assert starts == num_sequences + layout.input_ids.numel() - used
    step = layout.position_ids[:, 1:] - layout.position_ids[:, :-1]
    assert bool(((step == 1) | (layout.position_ids[:, 1:] == 0)).all())
    assert bool((layout.position_ids[:, 0] == 0).all())


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(0, 40)), max_size=40),
    st.integers(1, 200),
    st.sampled_from(STYLES),
)
def test_micro_batches_cover_everything_within_the_budget(
    lengths: list[tuple[int, int]], max_tokens: int, style: RowStyle
) -> None:
    """Prompts of one length are one prompt."""
    made = [sample(str(number), [2] * prompt, [3] * length) for number, (prompt, length) in enumerate(lengths)]
    groups = micro_batches(made, max_tokens, style)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        layout = lay_out([made[index] for index in group], style)
        # a sequence beyond the budget is alone, but for those that need no slot
        fed = [len(made[index].token_ids) - 1 for index in group]
        assert layout.input_ids.numel() <= max_tokens or sum(map(bool, fed)) <= 1
        if layout.segments:
            assert [segment.start for segment in layout.segments[1:]] == [one.stop for one in layout.segments[:-1]]
            assert (layout.segments[0].start, layout.segments[-1].stop) == (0, layout.input_ids.numel())
    assert groups == micro_batches(made, max_tokens, style)


def test_the_samples_of_a_prompt_go_together_where_they_fit() -> None:
    made = [sample(str(number), [2 + number % 3] * 10, [9] * 5) for number in range(12)]
    # 10 + 4 * 4 slots a prompt, and two prompts a group
    assert [len(group) for group in micro_batches(made, 52, "shared")] == [8, 4]
    assert [len(group) for group in micro_batches(made, 30, "shared")] == [4, 4, 4]
    assert [
        lay_out([made[i] for i in group], "shared").input_ids.numel() for group in micro_batches(made, 20, "shared")
    ] == [
        18,
        18,
    ] * 3


def test_packing_wastes_little() -> None:
    """Lengths as in practice: less than one slot in ten is free."""
    lengths = (torch.rand(256, generator=torch.Generator().manual_seed(0)).pow(2) * 900 + 20).long().tolist()
    slots = 0
    made = [sample(str(number), [2], [3] * length) for number, length in enumerate(lengths)]
    for group in micro_batches(made, 8192):
        slots += lay_out([made[index] for index in group]).input_ids.numel()
    assert sum(lengths) > 0.9 * slots


@settings(max_examples=200, deadline=None)
@given(many_samples(min_size=0))
def test_a_batch_is_the_response_tokens_in_order(samples: list[Sample]) -> None:
    scores = score_all(samples)
    batch = pack(scored(samples, scores))
    expected = [
        (number, int(token), int(author))
        for number, one in enumerate(samples)
        for token, author in zip(one.response_ids, one.author[one.prompt_length :], strict=True)
    ]
    assert batch.sequence.tolist() == [number for number, _, _ in expected]
    assert batch.target.tolist() == [token for _, token, _ in expected]
    assert batch.on_policy.tolist() == [author == Author.STUDENT for _, _, author in expected]
    assert batch.mask.tolist() == [author in (Author.STUDENT, Author.TEACHER) for _, _, author in expected]
    if samples:
        assert batch.teacher_logprob is not None
        assert torch.equal(batch.teacher_logprob, torch.cat([one.logprob for one in scores if one.logprob is not None]))
        assert batch.topk_ids is not None
        assert torch.equal(batch.topk_ids, torch.cat([one.topk_ids for one in scores if one.topk_ids is not None]))
    assert pack(samples).teacher_logprob is None


def loss_and_gradients(model: Any, method: Method, samples: list[Sample], groups: list[list[int]], row: bool) -> Any:
    """One optimizer step, as a trainer would do it: denominators first, then a forward and backward a group."""
    model.zero_grad()
    parts = [[samples[index] for index in group] for group in groups]
    with_scores = scored(samples, score_all(samples))
    batches = [pack([with_scores[index] for index in group]) for group in groups]
    counts = count_denominators(batches)
    total, head = 0.0, lm_head(model)
    for part, batch in zip(parts, batches, strict=True):
        layout = lay_out(part, "single" if row else "packed")
        hidden = backbone_hidden(model, layout.input_ids, layout.position_ids).flatten(0, 1)[layout.predicts]
        judged = (hidden.detach().flip(-1) * 3, head) if "full" in method.needs else None
        found = evaluate(method, batch, hidden, head, teacher=judged, counts=counts)
        found.loss.backward()
        total += float(found.loss.detach())
    return total, [parameter.grad.clone() for parameter in model.parameters()]


MODEL = tiny(num_rows=VOCABULARY, sharp=4.0)


@pytest.mark.parametrize(
    "method", [OPD(), OPD(reduce="sequence"), GKD(), SFT()], ids=["opd", "per sequence", "gkd", "sft"]
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(samples=many_samples(min_size=2), data=st.data())
def test_no_split_changes_loss_or_gradient(method: Method, samples: list[Sample], data: st.DataObject) -> None:
    """peers 2: denominators. Any partition, any order, any row width: the same step."""
    whole = loss_and_gradients(MODEL, method, samples, [list(range(len(samples)))], row=False)
    order = data.draw(st.permutations(range(len(samples))))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(samples) - 1))))
    groups = [list(order[a:b]) for a, b in zip([0, *cuts], [*cuts, len(samples)], strict=True)]
    budget = micro_batches(samples, data.draw(st.integers(1, 40)))
    for split, row in ((groups, False), (groups, True), (budget, False)):
        loss, gradients = loss_and_gradients(MODEL, method, samples, split, row)
        assert math.isclose(loss, whole[0], abs_tol=ROUNDING)
        for found, expected in zip(gradients, whole[1], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def test_the_end_is_trained_also_where_padding_has_its_id() -> None:
    """peers 12: pad == EOS must not mask the end."""
    ended = sample("a", [5, 6], [7, EOS, 8, EOS])
    batch = pack([ended, sample("b", [EOS], [EOS])])
    assert batch.target.tolist() == [7, EOS, 8, EOS, EOS]
    assert bool(batch.mask.all())


def test_rollout_logprob_is_kept_and_absent_ones_are_nan() -> None:
    known = sample("a", [5, 6], [7, 8], rollout_logprob=torch.tensor([math.nan, math.nan, -0.5, -0.25]))
    found = pack([known, sample("b", [5], [6])]).rollout_logprob
    assert found is not None
    assert found[:2].tolist() == [-0.5, -0.25]
    assert bool(found[2].isnan())
    assert pack([sample("b", [5], [6])]).rollout_logprob is None


SAMPLES = [sample("a", [5, 6], [7, 8, 9]), sample("b", [5], [10, 11])]


def changed(**fields: Tensor | None) -> list[Scores]:
    """Good scores, those of the second sample with other fields."""
    good = score_all(SAMPLES)
    return [good[0], replace(good[1], **fields)]


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (score_all(SAMPLES)[:1], "1 scores came back for 2 samples"),
        (changed(token_ids=torch.tensor([10, 4])), r"b#0: response token 1 is 11, the teacher scored 4"),
        (changed(token_ids=torch.tensor([10])), r"b#0: 1 tokens were scored, the response has 2"),
        (changed(logprob=torch.tensor([-1.0])), r"b#0: logprob has shape \(1,\)"),
        (changed(topk_ids=torch.zeros(2, 2), topk_logprob=torch.zeros(2, 2)), r"b#0: topk_logprob has shape \(2, 2\)"),
        (changed(logprob=torch.tensor([-1.0, math.nan])), r"b#0, response token 1 .*: logprob is missing"),
        (changed(logprob=torch.tensor([math.inf, -1.0])), r"b#0, response token 0 .*: logprob is missing"),
        (
            changed(topk_logprob=torch.tensor([[-1.0, -2.0, -3.0], [-math.inf] * 3])),
            r"b#0, response token 1 .*: topk_logprob is missing",
        ),
        (changed(logprob=None), r"b#0, response token 0 \(and 1 more tokens\): logprob is missing"),
        (changed(topk_ids=None), r"b#0, response token 0 .*: topk_ids is missing"),
        (changed(entropy=torch.tensor([1.0, math.nan])), r"b#0, response token 1 .*: entropy is missing"),
        (changed(logprob=torch.tensor([-1.0, 0.01])), r"b#0, response token 1 .*: logprob is above 0"),
        (
            changed(topk_ids=torch.tensor([[0, 1, 2], [3, 4, 3]])),
            r"b#0, response token 1 .*: topk_ids names a token twice",
        ),
    ],
)
def test_scores_that_do_not_fit_are_refused(scores: list[Scores], says: str) -> None:
    """Never a 0.0 for a score that is missing; the message names the sample."""
    fields: tuple[ScoreField, ...] = ("scores", "reference_scores")
    for field in fields:
        with pytest.raises(ScoreError, match=says):
            attach_scores(SAMPLES, scores, "error", field=field)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"logprob": torch.tensor([-1.0, 0.01])}, "b#0, response token 1 .*: logprob is above 0"),
        ({"topk_ids": torch.tensor([[0, 1, 2], [3, 4, 3]])}, "b#0, response token 1 .*: topk_ids names a token twice"),
        ({"logprob": torch.tensor([-1.0])}, r"b#0: logprob has shape \(1,\)"),
    ],
)
def test_dropping_what_is_missing_excuses_nothing_else(fields: dict[str, Tensor], says: str) -> None:
    with pytest.raises(ScoreError, match=says):
        attach_scores(SAMPLES, changed(**fields), "drop")


def test_entropies_may_be_absent_but_not_missing() -> None:
    """Servers give none, and a batch may mix teachers."""
    attached = scored(SAMPLES, changed(entropy=None))
    assert pack(attached).teacher_entropy is None
    assert pack(attached[:1]).teacher_entropy is not None
    first, second = score_all(SAMPLES)
    bad = replace(first, entropy=torch.tensor([1.0, math.nan, 1.0]))
    with pytest.raises(ScoreError, match=r"a#0, response token 1 .*: entropy is missing"):
        attach_scores(SAMPLES, [bad, replace(second, entropy=None)], "error")


@pytest.mark.parametrize("field", ["scores", "reference_scores"])
def test_a_batch_has_scores_of_all_samples_or_of_none(field: str) -> None:
    half = [replace(SAMPLES[0], **{field: score_all(SAMPLES)[0]}), SAMPLES[1]]
    with pytest.raises(ScoreError, match=f"sample b#0 has no {field}"):
        pack(half)


def test_a_logprob_of_zero_is_a_certain_token() -> None:
    """Rounding may lift a log-probability of 0 a little above it."""
    batch = pack(scored(SAMPLES, changed(logprob=torch.tensor([0.0, LOGPROB_TOLERANCE / 2]))))
    assert batch.teacher_logprob is not None


def test_a_logprob_of_minus_infinity_is_a_token_that_the_teacher_excludes() -> None:
    top = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -math.inf, -math.inf]])
    batch = pack(scored(SAMPLES, changed(logprob=torch.tensor([-math.inf, -1.0]), topk_logprob=top)))
    assert batch.teacher_logprob is not None
    assert batch.teacher_logprob[-2:].tolist() == [-math.inf, -1.0]


def test_a_missing_score_of_an_untrained_token_is_none_of_our_business() -> None:
    """What the environment wrote is not trained."""
    theirs = [sample("a", [5], [6, 7, 8], author=[Author.STUDENT, Author.ENVIRONMENT, Author.STUDENT])]
    scores = [Scores(theirs[0].response_ids, torch.tensor([-1.0, math.nan, -2.0]))]
    batch = pack(scored(theirs, scores))
    assert batch.teacher_logprob is not None
    assert batch.mask.tolist() == [True, False, True]
    assert bool(batch.teacher_logprob[1].isnan())


def test_samples_without_scores_are_dropped_or_refused() -> None:
    broken = changed(logprob=torch.tensor([-1.0, math.nan]))
    kept, dropped = attach_scores(SAMPLES, broken, "drop")
    assert kept is not None
    assert (kept.key, kept.scores, dropped) == ("a#0", broken[0], None)
    assert None not in attach_scores(SAMPLES, score_all(SAMPLES), "error")
    with pytest.raises(ScoreError, match="b#0"):
        attach_scores(SAMPLES, broken, "error")
    with pytest.raises(ScoreError, match="b#0"):
        attach_scores(SAMPLES, changed(token_ids=torch.tensor([1, 2])), "drop")
    assert attach_scores([], [], "drop") == []


def test_layouts_that_cannot_be_are_refused() -> None:
    with pytest.raises(DataError, match="x#0 has no prompt token"):
        lay_out([replace(SAMPLES[0], prompt_length=0, prompt=replace(SAMPLES[0].prompt, id="x"))])
    with pytest.raises(ValueError, match="at least one sample"):
        lay_out([])
    with pytest.raises(ValueError, match="max_tokens is 0"):
        micro_batches(SAMPLES, 0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_row_styles(lengths: list[int]) -> None:
    """ "single" puts everything into one row, "alone" each sequence into its own; neither exceeds the budget of a group."""
    made = [sample(str(index), [2], [3] * length) for index, length in enumerate(lengths)]
    assert lay_out(made, style="single").input_ids.shape == (1, sum(lengths))
    alone = lay_out(made, style="alone").input_ids
    assert alone.shape == (len(lengths), max(lengths))
    for group in micro_batches(made, 12, "alone"):
        assert len(group) * max(lengths[index] for index in group) <= 12


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 30), st.integers(0, 90)), min_size=1, max_size=24),
    st.integers(1, 6),
)
def test_ranks_share_tokens_evenly_and_prompts_whole(sizes: list[tuple[int, int, int]], num_ranks: int) -> None:
    """No rank has more than the mean and one piece: a prompt with its samples, or one sample of a prompt that is too large."""
    lengths = {name: prompt for name, prompt, _ in sizes}
    items = [((name, lengths[name], response), at) for at, (name, _, response) in enumerate(sizes)]
    shares = balanced(items, num_ranks)
    assert sorted(at for share in shares for at in share) == list(range(len(items)))

    def cost(members: Sequence[int]) -> int:
        names = {items[at][0][0] for at in members}
        return sum(lengths[name] for name in names) + sum(items[at][0][2] for at in members)

    whole = {name: [at for at, ((other, _, _), _) in enumerate(items) if other == name] for name in lengths}
    mean = cost(range(len(items))) / num_ranks
    for name, members in whole.items():
        if cost(members) <= mean:
            assert any(set(members) <= set(share) for share in shares), name
    # a prompt that is cut is computed by each rank that has some of it
    pieces = [
        cost(members) if cost(members) <= mean else max(cost([at]) for at in members) for members in whole.values()
    ]
    again = sum(lengths[name] * len(members) for name, members in whole.items() if cost(members) > mean)
    assert all(cost(share) <= mean + again / num_ranks + max(pieces) for share in shares)
