"""A head in slices over ranks is the whole head, for every method and however few rows a rank has."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.processes import run_ranks
from tests.tiny_models import sample, tiny
from tests.worlds import CASES, World
from understudy.linear import LMHead, Slice, score
from understudy.models.parallel import can_slice, local, shard
from understudy.teachers.local import LocalTeacher
from understudy.trainer.distributed import Ranks

pytestmark = pytest.mark.slow

HEADS = {
    "plain": (12, {}),
    "everything": (100, {"with_bias": True, "softcap": 3.0, "scale": 1.7, "temperature": 1.3, "vocab_size": 8}),
}
"""Rows of a chunk, which are those of several in the first, and the head."""
SAMPLES = {2: ((0, 1, 3), (2,)), 4: ((0,), (), (1, 3), (2,))}
"""Samples of each rank; one of four has none."""


def compare() -> None:
    """What one of several ranks does: evaluates its rows with its slice, and all rows with the whole heads."""
    ranks = Ranks.from_environment(lambda: torch.device("cpu"))
    tokens = [torch.arange(16).view(4, 4)[list(names)].flatten() for names in SAMPLES[ranks.world]]
    parts = [part for part in tokens if len(part)]
    for head, (chunk_tokens, options) in HEADS.items():
        world = World.make(num_tokens=16, vocabulary=10, **options)  # type: ignore[arg-type]
        if head == "everything":
            world = excluding(world)
        size = world.head.num_tokens
        # as torch divides a tensor among ranks
        sizes = [len(part) for part in torch.arange(size).chunk(ranks.world)]
        start = [0, *accumulate(sizes)][ranks.rank]
        part = Slice(start, size, torch.distributed.group.WORLD)
        cut, rows = world.cut(part, sizes[ranks.rank]), slice(start, start + sizes[ranks.rank])
        own = tokens[ranks.rank]
        # but for two ranks and the first head, one method is enough for each way in which rows are read
        ways = {(method.reads, method.needs): name for name, method in CASES.items()}.values()
        for name in CASES if head == "plain" and ranks.world == 2 else ways:
            method = CASES[name]
            expected = world.evaluate_in_parts(method, parts)
            pieces, methods, counts = world.in_parts(method, tokens)
            here = cut.rows(own)
            found = here.evaluate(
                methods[ranks.rank],  # type: ignore[arg-type]
                batch=pieces[ranks.rank],
                counts=counts,
                chunk_tokens=chunk_tokens,
                **here.full(method),
            )
            total = ranks.sum_metrics(found.evaluation.metrics)
            loss = ranks.sum_counts({"loss": float(found.loss)})["loss"]
            said = (head, name, chunk_tokens)
            assert loss == pytest.approx(float(expected.loss), rel=1e-10, abs=1e-12), said
            close(found.d_hidden, expected.d_hidden[own], said)
            close(found.d_weight, expected.d_weight[rows], said)
            if found.d_bias is not None and expected.d_bias is not None:
                close(found.d_bias, expected.d_bias[rows], said)
            metrics = expected.evaluation.metrics
            assert total.keys() == metrics.keys(), said
            for key, metric in metrics.items():
                assert total[key].count == metric.count, (said, key)
                assert total[key].total == pytest.approx(metric.total, rel=1e-10, abs=1e-11), (said, key)
        for one, other in zip(
            score(here.hidden, cut.head, here.batch.target, chunk_tokens=5),
            score(world.hidden, world.head, world.batch.target),
            strict=True,
        ):
            close(one, other[own], (head, "score"))
    compare_teachers(ranks)
    ranks.close()


def compare_teachers(ranks: Ranks) -> None:
    """A teacher in shards scores each rank's samples with slices of its output layer as it does alone."""
    mesh = torch.distributed.device_mesh.init_device_mesh(
        "cpu", (1, ranks.world), mesh_dim_names=("replicate", "shard")
    )
    model = tiny()
    # with padding rows, and without an id that is no token
    options: dict[str, Any] = {
        "name": "teacher",
        "vocab_size": 38,
        "absent": (5,),
        "temperature": 1.3,
        "max_batch_tokens": 8,
    }
    teacher = LocalTeacher(model, **options)
    made = [sample(str(number), [2, 3], [4 + number, 6, 37][: 1 + number % 3]) for number in range(4)]
    own = [made[number] for number in SAMPLES[ranks.world][ranks.rank]]
    expected = teacher.score(own, frozenset({"sampled"}))
    assert can_slice(model, ranks.world, 38)
    assert not can_slice(model, ranks.world, 40 - 40 // ranks.world)
    shard(model, mesh, vocabulary=True)
    found = teacher.score(own, frozenset({"sampled"}))
    assert local(model.get_output_embeddings().weight).shape[0] == 40 // ranks.world
    for one, other in zip(found, expected, strict=True):
        for field in ("logprob", "entropy"):
            close(getattr(one, field), getattr(other, field), ("teacher", field))


def excluding(world: World) -> World:
    """Teacher and reference give some tokens no probability: one by its bias, one that is none of theirs."""

    def change(pair: tuple[Tensor, LMHead]) -> tuple[Tensor, LMHead]:
        hidden, head = pair
        assert head.bias is not None
        bias = head.bias.clone()
        bias[2] = -torch.inf
        return hidden, replace(head, bias=bias, absent=torch.tensor([5]))

    return replace(world, teacher=change(world.teacher), reference=change(world.reference))


def close(found: Tensor, expected: Tensor, said: object) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12, msg=lambda text: f"{said}: {text}")


@pytest.mark.parametrize("num_ranks", SAMPLES)
def test_slices_are_the_whole_head(tmp_path: Path, num_ranks: int) -> None:
    """Law 6 over ranks: loss, metrics and gradients of hidden states, weight and bias."""
    run_ranks(compare, folder=tmp_path, num_ranks=num_ranks)


def test_a_part_of_another_vocabulary_is_refused() -> None:
    head = World.make(vocabulary=9).head
    with pytest.raises(ValueError, match="no part of a vocabulary of 9"):
        head.cut(Slice(4, 8, None), 2)
    with pytest.raises(ValueError, match="no part"):
        head.cut(Slice(9, 9, None), 0)
