"""The Triton kernels are the definition too, for every method, head, precision and size, by Triton's interpreter on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.definition import evaluate as evaluate_definition
from tests.worlds import CASES, World
from understudy.linear import Kept, LMHead, evaluate
from understudy.methods import GKD, OPD, TopK
from understudy.methods.base import Method

# triton decides when it is imported whether it interprets, and asks again when a kernel runs
INTERPRET = "TRITON_INTERPRET"
os.environ[INTERPRET] = "1"
try:
    pytest.importorskip("triton.language", reason="TRITON IS NOT INSTALLED: kernels for GPUs are not tested")
    from understudy.linear import fused
finally:
    del os.environ[INTERPRET]

HEAD = {"with_bias": True, "softcap": 3.0, "scale": 1.7, "temperature": 1.3, "vocab_size": 6}
"""All that a head may do; one that does nothing is in the other tests."""


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(INTERPRET, "1")


@pytest.mark.parametrize("method", CASES.values(), ids=CASES.keys())
def test_kernels_equal_the_definition(method: Method) -> None:
    world = World.make(num_tokens=9, **HEAD)  # type: ignore[arg-type]
    definition = world.evaluate(method, run=evaluate_definition)
    world.evaluate(method, chunk_tokens=5, fused=True).same_as(definition)


@pytest.mark.parametrize("vocabulary", [2, 8, 17])
@pytest.mark.parametrize("method", [GKD(beta=0.0), GKD(beta=0.3), GKD(), TopK(k=3)], ids=["0", "0.3", "1", "top 3"])
def test_rows_of_any_length_in_several_blocks(method: Method, vocabulary: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes on both sides of a block's edge."""
    monkeypatch.setattr(fused, "BLOCK", 8)
    world = World.make(num_tokens=5, vocabulary=vocabulary)
    world.evaluate(method, fused=True).same_as(world.evaluate(method, run=evaluate_definition))


@pytest.mark.parametrize("method", [GKD(beta=0.0), GKD(beta=0.3), GKD()], ids=["0", "0.3", "1"])
def test_tokens_that_the_teacher_excludes(method: Method) -> None:
    world = World.make()
    states, head = world.teacher
    bias = torch.zeros(7, dtype=torch.float64)
    bias[[1, 4]] = -torch.inf
    world = replace(world, teacher=(states, replace(head, bias=bias)))
    found = world.evaluate(method, fused=True)
    assert found.d_weight.isfinite().all()
    found.same_as(world.evaluate(method, run=evaluate_definition))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_equal_rows_give_a_gradient_of_exactly_0(beta: float) -> None:
    world = World.make().with_teacher_equal_to_student()
    found = world.evaluate(GKD(beta), fused=True)
    assert (found.d_hidden == 0).all()
    assert (found.d_weight == 0).all()


def test_numbers_of_single_tokens_are_the_same() -> None:
    world, columns = World.make(), []
    for by_kernel in (False, True):
        keep = Kept(torch.ones_like(world.batch.mask))
        world.evaluate(GKD(), fused=by_kernel, keep=keep)
        columns.append(keep.columns())
    assert columns[0].keys() == columns[1].keys()
    for name, value in columns[0].items():
        torch.testing.assert_close(columns[1][name], value, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [GKD(), GKD(beta=0.0), OPD(), TopK(k=3)], ids=["reverse", "forward", "opd", "topk"])
def test_inputs_of_any_precision_are_computed_in_float32(method: Method, dtype: torch.dtype) -> None:
    """Loss and gradient agree with float64 on the same inputs to the rounding of logits up to 20, or of the result."""
    world = World.make(num_tokens=9, vocabulary=301, width=16, seed=3)

    def gradients(inner: torch.dtype, **options: object) -> tuple[torch.Tensor, ...]:
        hidden, weight, states, head = (
            value.to(dtype).to(inner)
            for value in (world.hidden, world.head.weight, world.teacher[0], world.teacher[1].weight)
        )
        hidden.requires_grad_()
        weight.requires_grad_()
        teacher = (states, LMHead(head)) if "full" in method.needs else None
        loss = evaluate(method, world.judged(method), hidden, LMHead(weight), teacher=teacher, **options).loss  # type: ignore[arg-type]
        loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return loss.detach(), hidden.grad, weight.grad

    for ours, exact in zip(gradients(dtype, fused=True), gradients(torch.float64), strict=True):
        error = (ours.double() - exact).abs().max() / exact.abs().max()
        assert error < max(4e-6, torch.finfo(ours.dtype).eps)


def test_float32_over_a_large_vocabulary() -> None:
    """Sums of 150,000 entries in float32 keep 2e-6, in several blocks of a row."""
    draw = torch.Generator().manual_seed(0)
    logits, other = (3 * torch.randn(1, 151_936, generator=draw) for _ in range(2))
    for dtype, limit in ((torch.float32, 2e-6), (torch.float64, 1e-12)):
        z, aux = logits.to(dtype), other.to(dtype)
        student, teacher = fused.row_stats(z), fused.row_stats(aux)
        logp, logq = logits.double().log_softmax(-1), other.double().log_softmax(-1)
        found = fused.read_divergence(1.0, None, z, student.lse, aux, teacher.lse)["divergence"]
        for value, exact in (
            (student.lse, logits.double().logsumexp(-1)),
            (student.entropy, -(logp.exp() * logp).sum(-1)),
            (found, (logp.exp() * (logp - logq)).sum(-1)),
        ):
            torch.testing.assert_close(value.double(), exact, rtol=limit, atol=0)


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from understudy.linear import fused

def check(kernel, absent=(), **constants):
    constants |= dict.fromkeys(absent) | {"BLOCK": fused.BLOCK}
    types = {name: "constexpr" if name in constants else "i32" if name == "V" else "*fp32" for name in kernel.arg_names}
    source = ASTSource(kernel, types, constants)
    assert compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": fused.NUM_WARPS}).asm["cubin"]

check(fused._row_stats)
for beta, floor in ((0.0, None), (0.3, None), (1.0, -20.0)):
    absent = ["mean_ptr"] if beta == 0 else []
    check(fused._read_divergence, absent, **fused._constants(beta, floor))
    check(fused._differentiate, absent, CAP=0.3, **fused._constants(beta, floor))
absent = ["d_entropy_ptr", "d_divergence_ptr", "aux_ptr", "aux_lse_ptr", "mean_ptr"]
check(fused._differentiate, absent, CAP=None, **fused._constants(0.0, None))
"""


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Down to machine code of an H100, which the interpreter does not try."""
    environment = {name: value for name, value in os.environ.items() if name != INTERPRET}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
