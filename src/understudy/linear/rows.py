"""Reading a chunk of logits and overwriting it with its gradient.

A chunk is visited in blocks of rows that fit in a processor's cache, so the passes over a row cost little beside the
products. p is the student's row, q the teacher's, z and z_t their logits. On a GPU the passes are the kernels of `fused`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

from understudy.lazy import Tensor, torch
from understudy.linear.columns import Columns, parts
from understudy.linear.head import LMHead
from understudy.linear.kept import Kept
from understudy.losses.divergences import log_mixture
from understudy.losses.terms import Reads, Rows
from understudy.types import EXCLUDED, TokenBatch, fill

BLOCK_ELEMENTS = 2 * 152_064
"""Logits per block and CPU thread: 1.2 MiB in float32, so that three such buffers fit in cache."""


def blocks(logits: Tensor, columns: Columns) -> Iterator[slice]:
    """Blocks of rows on a CPU; the whole chunk on a GPU, which streams it, and where every block would cost communication."""
    size = logits.shape[0]
    whole = logits.is_cuda or columns.slice is not None
    rows = size if whole else BLOCK_ELEMENTS * torch.get_num_threads() // logits.shape[1]
    return parts(size, max(1, rows))


class Buffers:
    """One buffer of logits [C, V] per model, reused by every chunk."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> None:
        self._size, self._options = (rows, columns), {"dtype": dtype, "device": device}
        self._made: dict[str, Tensor] = {}

    def of(self, whose: Literal["student", "teacher", "reference"], rows: int) -> Tensor:
        """The first rows of the buffer of a model."""
        if whose not in self._made:
            self._made[whose] = torch.empty(self._size, **self._options)  # type: ignore[call-overload]
        return self._made[whose][:rows]


@dataclass(frozen=True, eq=False)
class RowStats:
    """Log-sum-exp [B] and entropy [B] of a block's rows, over all columns."""

    lse: Tensor
    entropy: Tensor


@dataclass(frozen=True, eq=False)
class SoftmaxStats(RowStats):
    """`RowStats` plus the softmax itself, as `p * inverse` [B, V], [B].

    The softmax kernel sums a long row lane by lane and is off by 1e-5 at 150,000 entries; dividing by the
    pairwise sum of its result removes that error.
    """

    p: Tensor
    inverse: Tensor
    columns: Columns

    def mean(self, value: Tensor) -> Tensor:
        """`E_p[value]`. [B, V] -> [B]."""
        return self.columns.sum(torch.linalg.vecdot(self.p, value) * self.inverse)

    def write(self, out: Tensor) -> None:
        """The normalised row."""
        torch.mul(self.p, self.inverse[:, None], out=out)

    def log_tail(self, ids: Tensor) -> Tensor:
        """Log of p's mass outside the tokens `ids`. [B, K] -> [B]."""
        # summed without the K tokens: 1 - sum_K p would cancel where the tail is small
        inside = self.columns.at_here(self.p, ids)
        self.columns.add_at(self.p, ids, -inside)
        rest = self.columns.sum(self.p.sum(-1) * self.inverse)
        self.columns.add_at(self.p, ids, inside)
        return rest.clamp_min(torch.finfo(rest.dtype).tiny).log()


def softmax_stats(z: Tensor, columns: Columns) -> SoftmaxStats:
    """One exponential pass: `lse = max z - log max p`, `H = lse - sum p z`. Slice i has the share `exp(lse_i - lse)` of p."""
    p = torch.softmax(z, -1)
    inverse = 1.0 / p.sum(-1)
    lse = z.amax(-1) - (p.amax(-1) * inverse).log()
    mean = torch.linalg.vecdot(p, z) * inverse
    if columns.slice is not None:
        every_lse, every_mean = columns.slice.gather(torch.stack([lse, mean])).unbind(1)
        own, lse = lse, every_lse.logsumexp(0)
        inverse, mean = inverse * (own - lse).exp(), ((every_lse - lse).exp() * every_mean).sum(0)
    return SoftmaxStats(lse, lse - mean, p, inverse, columns)


def read_target(logits: Tensor, target: Tensor, columns: Columns, keep: Kept | None = None) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets and entropy of their rows. [C, V], [C] -> [C], [C]. `keep` records the teacher's rows."""
    logprob, entropy = logits.new_empty(len(target)), logits.new_empty(len(target))
    for block in blocks(logits, columns):
        stats = softmax_stats(logits[block], columns)
        logprob[block] = columns.at(logits[block], target[block, None]).squeeze(-1) - stats.lse
        entropy[block] = stats.entropy
        if keep is not None:
            keep.read_row("teacher", block, logits[block], stats.lse, target[block])
    return logprob, entropy


def floor_excluded_rows(q: Tensor, q_lse: Tensor, p: Tensor, p_lse: Tensor, min_log_ratio: float) -> None:
    """`divergences.floor_excluded` on logits, in place: `log P + min_log_ratio` where Q excludes a token. [B, V], [B]."""
    floor = p - (p_lse - q_lse - min_log_ratio)[:, None]
    q.copy_(torch.where(q <= q_lse[:, None] + EXCLUDED, floor, q))


def has_kernels(device: torch.device) -> bool:
    """Whether the kernels of `fused` run on the device: a GPU, with Triton installed."""
    return device.type == "cuda" and find_spec("triton") is not None


class Visit:
    """One chunk: `read` turns its logits into rows, `differentiate` turns the buffer into d loss / d raw logits."""

    def __init__(
        self,
        reads: Reads,
        logits: Tensor,
        teacher_logits: Tensor | None,
        batch: TokenBatch,
        columns: Columns,
        min_log_ratio: float | None = None,
        keep: Kept | None = None,
        *,
        fused: bool = False,
    ) -> None:
        """`batch` has this rank's rows. `min_log_ratio`: log-ratio of tokens that the teacher excludes; None: it excludes none.
        `keep` records numbers of single tokens. `fused`: the passes over the rows are Triton kernels."""
        self._reads, self._z, self._aux, self._batch, self._columns = reads, logits, teacher_logits, batch, columns
        self._target = columns.rows(batch.target)
        self._ids = None if reads.topk is None or batch.topk_ids is None else columns.rows(batch.topk_ids)
        self._min_log_ratio, self._keep = min_log_ratio, keep
        self._kernels: ModuleType | None = import_module("understudy.linear.fused") if fused else None
        self._capped: Tensor | None = None
        self._read: dict[str, Tensor] = {}
        self._leaves: Rows | None = None

    def read(self, *, keep_logits: bool) -> tuple[Rows, TokenBatch]:
        """This rank's rows, as leaves that require gradients, and the batch with the fields this pass computes. The buffer
        then holds p, or still the logits if `fused`."""
        if keep_logits and self._kernels is None:
            self._capped = self._z.clone()
        read = [self._read_block(block) for block in blocks(self._z, self._columns)]
        self._read = {name: torch.cat([part[name] for part in read]) for name in read[0]}
        self._ids = self._read.get("topk_ids", self._ids)
        merged = {name: self._columns.own(value) for name, value in self._read.items()}
        found = {name: merged[name] for name in ("topk_ids", "topk_logprob") if name in merged}
        self._batch = fill(
            replace(self._batch, **found),
            # clones, because the student's numbers become leaves
            student_logprob=merged["logprob"].clone(),
            student_entropy=merged["entropy"].clone(),
            teacher_logprob=merged.get("teacher_logprob"),
            teacher_entropy=merged.get("teacher_entropy"),
        )
        leaf = {item.name: merged[item.name].requires_grad_() for item in fields(Rows) if item.name in merged}
        self._leaves = Rows(**leaf)
        return self._leaves, self._batch

    def _read_block(self, block: slice) -> dict[str, Tensor]:
        z, aux = self._z[block], None if self._aux is None else self._aux[block]
        target = self._target[block, None]
        student: RowStats = softmax_stats(z, self._columns) if self._kernels is None else self._kernels.row_stats(z)
        read = {"lse": student.lse, "entropy": student.entropy}
        read["logprob"] = self._columns.at(z, target).squeeze(-1) - student.lse
        teacher: RowStats | None = None
        if aux is not None:
            teacher = softmax_stats(aux, self._columns) if self._kernels is None else self._kernels.row_stats(aux)
        if aux is not None and teacher is not None:
            read |= {"teacher_lse": teacher.lse, "teacher_entropy": teacher.entropy}
            read["teacher_logprob"] = self._columns.at(aux, target).squeeze(-1) - teacher.lse
        if self._keep is not None and self._columns.slice is None:
            self._keep.read_row("student", block, z, student.lse, target[:, 0])
            # an extrapolated teacher's rows were read before the target overwrote them
            if aux is not None and teacher is not None and self._reads.extrapolate is None:
                self._keep.read_row("teacher", block, aux, teacher.lse, target[:, 0])
        if self._reads.topk is not None:
            read |= self._read_topk(block, z, student, aux, teacher)
        beta, floor = self._reads.divergence, self._min_log_ratio
        if beta is not None and aux is not None and teacher is not None:
            if isinstance(student, SoftmaxStats) and isinstance(teacher, SoftmaxStats):
                if beta == 1.0 and floor is not None:
                    floor_excluded_rows(aux, teacher.lse, z, student.lse, floor)
                read |= _read_divergence(beta, z, student, aux, teacher)
            elif self._kernels is not None:
                read |= self._kernels.read_divergence(beta, floor, z, student.lse, aux, teacher.lse)
        if isinstance(student, SoftmaxStats):
            student.write(z)
        return read

    def _read_topk(
        self, block: slice, z: Tensor, student: RowStats, aux: Tensor | None, teacher: RowStats | None
    ) -> dict[str, Tensor]:
        read, columns = {}, self._columns
        if aux is not None and teacher is not None:
            support = aux if self._reads.topk == "teacher" else z
            read["topk_ids"] = ids = columns.topk(support, self._reads.k)
            read["topk_logprob"] = columns.at(aux, ids) - teacher.lse[:, None]
        else:
            assert self._ids is not None
            ids = self._ids[block]
        read["topk_logp"] = columns.at(z, ids) - student.lse[:, None]
        if self._reads.tail and ids.shape[-1] < columns.size:
            if isinstance(student, SoftmaxStats):
                read["tail_logp"] = student.log_tail(ids)
            elif self._kernels is not None:
                read["tail_logp"] = self._kernels.log_tail(z, ids, student.lse)
        return read

    def differentiate(self, loss: Tensor, head: LMHead) -> None:
        """Overwrites the logits with `d loss / d (hidden @ weight.T + bias)`."""
        assert self._leaves is not None
        leaves = {item.name: getattr(self._leaves, item.name) for item in fields(Rows)}
        leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
        found: list[Tensor | None] = [None] * len(leaves)
        if loss.requires_grad:
            found = list(torch.autograd.grad(loss, list(leaves.values()), allow_unused=True))
        if self._columns.slice is not None:
            # collective: if one rank's loss reads it, all ranks send it
            used = self._columns.sum(torch.tensor([float(grad is not None) for grad in found], device=self._z.device))
            pairs = zip(found, leaves.values(), used.tolist(), strict=True)
            found = [torch.zeros_like(leaf) if grad is None and ranks else grad for grad, leaf, ranks in pairs]
        factor = head.scale / head.temperature
        grads = {
            name: self._columns.rows(grad * factor)
            for name, grad in zip(leaves, found, strict=True)
            if grad is not None
        }
        for block in blocks(self._z, self._columns):
            self._differentiate_block(block, {name: grad[block] for name, grad in grads.items()}, head)
        if self._capped is not None and head.softcap is not None:
            # d softcap(x) / dx = 1 - (softcap(x) / cap)^2
            self._z.mul_(1.0 - (self._capped * (head.temperature / head.softcap)) ** 2)

    def _differentiate_block(self, block: slice, g: dict[str, Tensor], head: LMHead) -> None:
        z, target = self._z[block], self._target[block, None]
        ids = None if self._ids is None else self._ids[block]
        coef = torch.zeros_like(z[:, 0])
        sparse: list[tuple[Tensor, Tensor]] = []
        if "logprob" in g:  # e_y - p
            coef -= g["logprob"]
            sparse.append((target, g["logprob"][:, None]))
        if "topk_logp" in g:  # e_k - p
            assert ids is not None
            coef -= g["topk_logp"].sum(-1)
            sparse.append((ids, g["topk_logp"]))
        if "tail_logp" in g:  # [v outside K] p / tail - p
            assert ids is not None
            over = g["tail_logp"] / self._read["tail_logp"][block].detach().exp()
            coef += over - g["tail_logp"]
            p = (
                self._columns.at_here(z, ids)
                if self._kernels is None
                else self._read["topk_logp"][block].detach().exp()
            )
            sparse.append((ids, -over[:, None] * p))
        if self._kernels is not None:
            if head.softcap is not None:
                cap = head.temperature / head.softcap
                sparse = [(where, value * (1.0 - (z.gather(-1, where) * cap) ** 2)) for where, value in sparse]
            aux = None if self._aux is None else self._aux[block]
            names = [name for name in ("entropy", "lse", "teacher_lse", "mean") if name in self._read]
            values = {name: self._read[name][block].detach() for name in names}
            self._kernels.differentiate(z, aux, coef, g, values, head, self._reads.divergence, self._min_log_ratio)
        else:
            entropy_grad = None
            if "entropy" in g:  # -p (log p + H), and z holds p by now
                entropy = self._read["entropy"][block].detach()[:, None]
                entropy_grad = g["entropy"][:, None] * (torch.special.entr(z) - z * entropy)
            if "divergence" in g:
                self._add_divergence(block, coef, g["divergence"])
            else:
                z.mul_(coef[:, None])
            if entropy_grad is not None:
                z.add_(entropy_grad)
        for where, value in sparse:
            self._columns.add_at(z, where, value)

    def _add_divergence(self, block: slice, coef: Tensor, g: Tensor) -> None:
        """Forward: `g (p - q)`. Else, with S's log-ratio l to T or to the mixture: `g (1 - beta) p (l - E_p l)`."""
        z, beta = self._z[block], self._reads.divergence
        assert self._aux is not None
        assert beta is not None
        aux = self._aux[block]
        if beta == 0.0:
            # q - p first: equal rows then give exactly zero
            aux.sub_(z)
            z.mul_(coef[:, None]).addcmul_(aux, -g[:, None])
            return
        weight = g if beta == 1.0 else g * (1.0 - beta)
        aux.mul_(weight[:, None]).add_((coef - weight * self._read["mean"][block])[:, None])
        z.mul_(aux)


def _read_divergence(
    beta: float, z: Tensor, student: SoftmaxStats, aux: Tensor, teacher: SoftmaxStats
) -> dict[str, Tensor]:
    """The divergence of each row; leaves in `aux` what its gradient needs (see `Visit._add_divergence`)."""
    if beta == 0.0:
        aux.sub_(z)
        value = teacher.mean(aux) - teacher.lse + student.lse
        teacher.write(aux)
        return {"divergence": value}
    if beta == 1.0:
        # log p - log q up to a constant per row, which cancels in p (l - E_p l)
        torch.sub(z, aux, out=aux)
        mean = student.mean(aux)
        return {"divergence": mean - student.lse + teacher.lse, "mean": mean}
    logp, logq = z - student.lse[:, None], aux - teacher.lse[:, None]
    mixture = log_mixture(logp, logq, beta)
    to_teacher = teacher.mean(logq - mixture)
    torch.sub(logp, mixture, out=aux)
    mean = student.mean(aux)
    return {"divergence": beta * to_teacher + (1.0 - beta) * mean, "mean": mean}
