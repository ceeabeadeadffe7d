"""The passes over a chunk of logits as Triton kernels, for a GPU: `rows.Visit` calls them in place of torch's own.

A row is read once for its log-sum-exp and entropy, once with the teacher's for a divergence, and once for its gradient,
which overwrites it. p is the student's row, q the teacher's, z and aux their logits. Nothing of size [C, V] is made.
Arithmetic is in the precision of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import triton
import triton.language as tl

from understudy.lazy import Tensor, torch
from understudy.linear.head import ABSENT, LMHead
from understudy.linear.rows import RowStats
from understudy.types import EXCLUDED

BLOCK = 4_096
"""Maximum block size of a program: 16 logits for each of its 256 threads."""
NUM_WARPS = 8

# a kernel reads globals only if they are constexpr
_LOW = tl.constexpr(-1e30)
"""Logit past the end of the row: its probability is exactly 0, and 0 times it is 0."""
_EXCLUDED = tl.constexpr(EXCLUDED)


def row_stats(z: Tensor) -> RowStats:
    """[C, V] -> [C], [C]."""
    lse, entropy = z.new_empty(len(z)), z.new_empty(len(z))
    _launch(_row_stats, (len(z),), z, lse, entropy)
    return RowStats(lse, entropy)


def log_tail(z: Tensor, ids: Tensor, lse: Tensor) -> Tensor:
    """Log of p's mass outside the tokens `ids`. [C, V], [C, K], [C] -> [C]."""
    inside = z.gather(-1, ids)
    z.scatter_(-1, ids, ABSENT)
    rest = row_stats(z).lse - lse
    z.scatter_(-1, ids, inside)
    return rest.clamp_min(math.log(torch.finfo(z.dtype).tiny))


def read_divergence(
    beta: float, floor: float | None, z: Tensor, lse: Tensor, aux: Tensor, aux_lse: Tensor
) -> dict[str, Tensor]:
    """The divergence of each row, and `mean`, E_p of its log-ratio, which the gradient needs unless beta is 0. [C, V] -> [C].

    `floor`: log q - log p where q excludes a token; None: it excludes none.
    """
    found = {"divergence": z.new_empty(len(z))} | ({} if beta == 0.0 else {"mean": z.new_empty(len(z))})
    given = (lse, aux, aux_lse, found["divergence"], found.get("mean"))
    _launch(_read_divergence, (len(z),), z, *given, **_constants(beta, floor))
    return found


def differentiate(
    z: Tensor,
    aux: Tensor | None,
    coef: Tensor,
    upstream: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    head: LMHead,
    beta: float | None,
    floor: float | None,
) -> None:
    """Overwrites the logits with `coef p` plus the gradients of entropy and divergence, times the slope of the soft-cap.

    `upstream`: gradients of "entropy" and "divergence" [C], those that there are; `values`: the "entropy", "lse",
    "teacher_lse" and "mean" of the rows [C]. z, aux [C, V], coef [C].
    """
    rows = (values["lse"], coef, upstream.get("entropy"), values["entropy"])
    beside = (upstream.get("divergence"), aux, values.get("teacher_lse"), values.get("mean"))
    cap = None if head.softcap is None else head.temperature / head.softcap
    grid = (len(z), triton.cdiv(z.shape[1], _block(z)))
    _launch(_differentiate, grid, z, *rows, *beside, CAP=cap, **_constants(beta or 0.0, floor))


def _block(z: Tensor) -> int:
    return min(BLOCK, int(triton.next_power_of_2(z.shape[1])))


def _launch(kernel: Any, grid: tuple[int, ...], z: Tensor, *given: Tensor | None, **constants: Any) -> None:
    # Triton launches on the current GPU, which may not hold the logits
    with torch.cuda.device(z.device) if z.is_cuda else nullcontext():
        kernel[grid](z, *given, z.shape[1], **constants, BLOCK=_block(z), num_warps=NUM_WARPS)


def _constants(beta: float, floor: float | None) -> dict[str, Any]:
    # compile-time constants, because Triton rounds float arguments to float32
    inside = 0.0 < beta < 1.0
    return {
        "BETA": beta,
        "FLOOR": floor if beta == 1.0 else None,
        "LOG_STUDENT": math.log1p(-beta) if inside else None,
        "LOG_TEACHER": math.log(beta) if inside else None,
    }


@triton.jit
def _load(row, start, V, BLOCK: tl.constexpr):
    columns = start + tl.arange(0, BLOCK)
    return tl.load(row + columns, mask=columns < V, other=_LOW)


@triton.jit
def _row_stats(z_ptr, lse_ptr, entropy_ptr, V, BLOCK: tl.constexpr):
    """Writes lse = log sum exp z and H = lse - E_p[z]; the sums are rescaled whenever a larger logit appears."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([], _LOW, z_ptr.dtype.element_ty)
    total = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
    weighted = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
    for start in range(0, V, BLOCK):
        z = _load(z_ptr + row * V, start, V, BLOCK)
        higher = tl.maximum(top, tl.max(z, 0))
        shrink = tl.exp(top - higher)
        e = tl.exp(z - higher)
        total = total * shrink + e
        weighted = weighted * shrink + e * z
        top = higher
    mass = tl.sum(total, 0)
    lse = top + tl.log(mass)
    tl.store(lse_ptr + row, lse)
    tl.store(entropy_ptr + row, lse - tl.sum(weighted, 0) / mass)


@triton.jit
def _log_ratios(z, aux, lse, aux_lse, FLOOR: tl.constexpr, LOG_STUDENT: tl.constexpr, LOG_TEACHER: tl.constexpr):
    """Returns log p - log q, floored; and log p - log m, m = (1 - beta) p + beta q, or again the first where beta is 0 or 1."""
    # subtract the large numbers first: log p - log q would carry the rounding error of both
    to_teacher = (z - aux) - (lse - aux_lse)
    if FLOOR is not None:
        to_teacher = tl.where(aux - aux_lse <= _EXCLUDED, -FLOOR, to_teacher)
    to_mixture = to_teacher
    if LOG_STUDENT is not None:
        logp = z - lse
        student = logp + LOG_STUDENT
        teacher = aux - aux_lse + LOG_TEACHER
        smaller = tl.exp(-tl.abs(student - teacher))
        to_mixture = logp - (tl.maximum(student, teacher) + tl.log(1.0 + smaller))
    return to_teacher, to_mixture


@triton.jit
def _read_divergence(
    z_ptr,
    lse_ptr,
    aux_ptr,
    aux_lse_ptr,
    divergence_ptr,
    mean_ptr,
    V,
    BETA: tl.constexpr,
    FLOOR: tl.constexpr,
    LOG_STUDENT: tl.constexpr,
    LOG_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """E_q[log q - log p] at beta = 0, E_p[log p - log q] at 1, else beta E_q[log q - log m] + (1 - beta) E_p[log p - log m]."""
    row = tl.program_id(0).to(tl.int64)
    lse = tl.load(lse_ptr + row)
    aux_lse = tl.load(aux_lse_ptr + row)
    of_teacher = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
    of_student = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
    mass = tl.zeros([BLOCK], z_ptr.dtype.element_ty)
    for start in range(0, V, BLOCK):
        z = _load(z_ptr + row * V, start, V, BLOCK)
        aux = _load(aux_ptr + row * V, start, V, BLOCK)
        to_teacher, to_mixture = _log_ratios(z, aux, lse, aux_lse, FLOOR, LOG_STUDENT, LOG_TEACHER)
        if BETA == 0.0:
            of_teacher -= tl.exp(aux - aux_lse) * to_teacher
        else:
            p = tl.exp(z - lse)
            mass += p
            of_student += p * to_mixture
        if LOG_STUDENT is not None:
            of_teacher += tl.exp(aux - aux_lse) * (to_mixture - to_teacher)
    value = tl.sum(of_teacher, 0)
    if BETA != 0.0:
        # 1 up to the rounding of lse, which would shift the whole mean
        mean = tl.sum(of_student, 0) / tl.sum(mass, 0)
        tl.store(mean_ptr + row, mean)
        value = mean if BETA == 1.0 else BETA * value + (1.0 - BETA) * mean
    tl.store(divergence_ptr + row, value)


@triton.jit
def _differentiate(
    z_ptr,
    lse_ptr,
    coef_ptr,
    d_entropy_ptr,
    entropy_ptr,
    d_divergence_ptr,
    aux_ptr,
    aux_lse_ptr,
    mean_ptr,
    V,
    BETA: tl.constexpr,
    FLOOR: tl.constexpr,
    LOG_STUDENT: tl.constexpr,
    LOG_TEACHER: tl.constexpr,
    CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Writes coef p - g_H p (log p + H) + g_D d: d = p - q at beta = 0, p (l - E_p l) at 1, else (1 - beta) p (l - E_p l)."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    z = _load(z_ptr + row * V, start, V, BLOCK)
    lse = tl.load(lse_ptr + row)
    p = tl.exp(z - lse)
    d = tl.load(coef_ptr + row) * p
    if d_entropy_ptr is not None:
        d -= tl.load(d_entropy_ptr + row) * p * (z - lse + tl.load(entropy_ptr + row))
    if d_divergence_ptr is not None:
        g = tl.load(d_divergence_ptr + row)
        aux = _load(aux_ptr + row * V, start, V, BLOCK)
        aux_lse = tl.load(aux_lse_ptr + row)
        if BETA == 0.0:
            d += g * (p - tl.exp(aux - aux_lse))
        else:
            _, ratio = _log_ratios(z, aux, lse, aux_lse, FLOOR, LOG_STUDENT, LOG_TEACHER)
            if BETA != 1.0:
                g *= 1.0 - BETA
            d += g * p * (ratio - tl.load(mean_ptr + row))
    if CAP is not None:
        d *= 1.0 - (z * CAP) * (z * CAP)
    columns = start + tl.arange(0, BLOCK)
    tl.store(z_ptr + row * V + columns, d, mask=columns < V)
