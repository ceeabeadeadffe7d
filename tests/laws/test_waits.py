"""How often the host waits for the device: counted on a CPU by the operations that would wait on a GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny_models import NUM_ROWS, sample, tiny
from tests.worlds import CASES, World
from understudy.linear import count_denominators
from understudy.methods import OPD
from understudy.methods.base import Method
from understudy.models import row_style
from understudy.trainer.distributed import Ranks
from understudy.trainer.settings import Train
from understudy.trainer.update import Heads, Optimizer, StudentModel, accumulate_gradients, prepare
from understudy.types import Scores

SIZED_BY_DATA = ("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave")
"""Operations whose result has a size that only the device knows."""
READ = ("_local_scalar_dense",)
"""`float`, `int`, `bool` and `item`."""
SENT = ("lift_fresh",)
"""`torch.tensor`: numbers of the host, which a GPU would be sent."""


class Waits(TorchDispatchMode):
    """Counts the operations inside that wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self._methods = _Methods(self.found)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if by_mask or name in SIZED_BY_DATA + READ + SENT:
            self.found[name] += 1
        return function(*args, **(kwargs or {}))

    def __enter__(self) -> Any:
        self._methods.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._methods.__exit__(*raised)


class _Methods(TorchFunctionMode):
    """Counts copies to the host, which are no operation on a CPU."""

    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in (torch.Tensor.tolist, torch.Tensor.cpu, torch.Tensor.numpy):
            self._found[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def waits(do: Callable[[], object]) -> Counter[str]:
    with Waits() as counted:
        do()
    return counted.found


@pytest.mark.parametrize(
    ("read", "name"),
    [
        (lambda x: float(x.sum()), "_local_scalar_dense"),
        (lambda x: x[x > 0], "index"),
        (lambda x: x.nonzero(), "nonzero"),
        (lambda x: x.tolist(), "tolist"),
        (lambda x: x + torch.tensor([1.0]), "lift_fresh"),
    ],
)
def test_what_waits_is_counted(read: Callable[[torch.Tensor], object], name: str) -> None:
    assert waits(lambda: read(torch.randn(3))) == {name: 1}
    assert not waits(lambda: torch.randn(3).softmax(-1).sum())


@pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
def test_an_evaluation_waits_as_often_for_many_chunks_as_for_one(method: Method) -> None:
    """For the trained rows, their missing scores, the metrics and the scale of the gradient; for the samples where a term is a
    mean over them."""
    world = World.make()
    batch = world.judged(method)
    counts = count_denominators([batch])
    one, many = (
        waits(lambda size=size: world.evaluate(method, batch=batch, counts=counts, chunk_tokens=size))
        for size in (100, 1)
    )
    assert one == many
    if method.scope == "batch":
        # its terms, of a whole step, go through its tokens on the host
        return
    assert one["tolist"] <= 2
    assert one["lift_fresh"] == 0
    assert one["nonzero"] == one["_local_scalar_dense"] == 1


@pytest.mark.parametrize("num_samples", [2, 6])
def test_an_update_waits_five_times_a_micro_batch_and_three_times(num_samples: int) -> None:
    """Five: as an evaluation, and where transformers looks for packed sequences. Three: for the loss, the norm of the gradient
    and the share of the update that survives."""
    draw = torch.Generator().manual_seed(0)
    model = tiny(dtype="float32")
    samples = [sample(str(n), range(2, 6), range(3, 9), rollout_logprob=torch.zeros(10)) for n in range(num_samples)]
    samples = [replace(one, scores=Scores(one.response_ids, logprob=-torch.rand(6, generator=draw))) for one in samples]
    student = StudentModel(model, torch.device("cpu"), NUM_ROWS, 1.0, None, 10, style=row_style(model))
    optimizer = Optimizer(model, Train(steps=1))
    (micros,) = prepare(student, OPD(), samples, step=0, draw=(0, 1), ranks=Ranks())
    assert len(micros) == num_samples

    def update() -> None:
        accumulate_gradients(student, micros, heads=Heads(), step=0, ranks=Ranks())
        optimizer.clip()
        optimizer.step(0)

    found = waits(update)
    assert found.total() == 5 * num_samples + 3, found
