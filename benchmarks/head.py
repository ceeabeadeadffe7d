"""Loss and gradient of the head, ours beside its peers, on the same tensors in one run.

Prints seconds and peak memory over the inputs and the gradients that come out, the largest relative error of the loss and
of both gradients against float64, and the ratios that the README states. The variants take turns; each number is the
smallest of --repeats after two warm-ups, because what else runs on a machine only adds. Gradients start as None, as
`zero_grad` leaves them.

    python benchmarks/head.py                 # 1,024 tokens x 151,936, hidden 64; then 512 tokens, hidden 1,024
    python benchmarks/head.py --only 0 --json head.json

Needs `pip install understudy[bench]` for the peers; those that are not installed are left out and named.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from understudy.linear import LMHead, evaluate
from understudy.methods import GKD, OPD, TopK
from understudy.methods.base import Method
from understudy.types import TokenBatch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.definition import evaluate as evaluate_reference

VOCABULARY = 151_936
SIZES = ((1024, 64), (512, 1024))


@dataclass
class Case:
    """The inputs."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    batch: TokenBatch

    @staticmethod
    def make(num_tokens: int, width: int) -> Case:
        torch.manual_seed(0)
        # logits of standard deviation 3, so that softmax is neither flat nor one-hot
        weight, teacher_weight = (torch.randn(VOCABULARY, width) * 3 / width**0.5 for _ in range(2))
        hidden, teacher_hidden = torch.randn(num_tokens, width), torch.randn(num_tokens, width)
        ones = torch.ones(num_tokens, dtype=torch.bool)
        target = torch.randint(0, VOCABULARY, (num_tokens,))
        topk = (teacher_hidden @ teacher_weight.T).log_softmax(-1).topk(64)
        batch = TokenBatch(
            target=target,
            mask=ones,
            on_policy=ones,
            sequence=torch.arange(num_tokens) // 64,
            teacher_logprob=-torch.rand(num_tokens),
            topk_ids=topk.indices,
            topk_logprob=topk.values,
        )
        hidden.requires_grad_()
        weight.requires_grad_()
        return Case(hidden, weight, teacher_hidden, teacher_weight, batch)


Run = Callable[[Case], Tensor]


def products(case: Case) -> Tensor:
    """The matrix products that no exact method can avoid: both logits, d hidden, d weight; nothing in between."""
    hidden, weight = case.hidden.detach(), case.weight.detach()
    case.weight.grad, case.hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    out = torch.empty(256, len(weight))
    for start in range(0, len(hidden), 256):
        part = slice(start, start + 256)
        rows = out[: len(hidden[part])]
        torch.mm(case.teacher_hidden[part], case.teacher_weight.T, out=rows)
        torch.mm(hidden[part], weight.T, out=rows)
        case.hidden.grad[part].addmm_(rows, weight)
        case.weight.grad.addmm_(rows.T, hidden[part])
    return torch.zeros(())


def dense(case: Case) -> Tensor:
    """log_softmax of both, autograd through everything."""
    student = (case.hidden @ case.weight.T).log_softmax(-1)
    with torch.no_grad():
        teacher = (case.teacher_hidden @ case.teacher_weight.T).log_softmax(-1)
    loss = (student.exp() * (student - teacher)).sum(-1).mean()
    loss.backward()
    return loss.detach()


def ours(method: Method, *, full: bool = True, evaluation: Callable[..., object] = evaluate) -> Run:
    """`understudy.linear.evaluate` or the reference under a method."""

    def run(case: Case) -> Tensor:
        teacher = (case.teacher_hidden, LMHead(case.teacher_weight)) if full else None
        loss = evaluation(method, case.batch, case.hidden, LMHead(case.weight), step=0, rng=None, teacher=teacher).loss  # type: ignore[attr-defined]
        loss.backward()
        return loss.detach()

    return run


def trl(case: Case) -> Tensor:
    """TRL 1.16's chunked divergence, beta = 1."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    per_token, _ = ChunkedDivergenceFunction.apply(
        case.hidden, case.weight, None, case.teacher_hidden, case.teacher_weight, None, 1.0
    )
    loss = per_token.mean()
    loss.backward()
    return loss.detach()


def liger(case: Case) -> Tensor:
    """Liger's chunked Jensen-Shannon loss, beta = 1. On a CPU in our chunk size and not compiled: that needs a compiler."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    options = {} if case.hidden.is_cuda else {"compiled": False, "chunk_size": 256}
    module = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0, **options)
    loss = module(case.hidden, case.weight, case.teacher_hidden, case.teacher_weight, case.batch.target)
    loss.backward()
    return loss.detach()


VARIANTS: dict[str, Run] = {
    "bare products": products,
    "dense": dense,
    "reference": ours(GKD(), evaluation=evaluate_reference),
    "chunked (ours)": ours(GKD()),
    "TRL": trl,
    "Liger": liger,
    "chunked, sampled token": ours(OPD(), full=False),
    "chunked, top-64": ours(TopK(), full=False),
}
SAME_LOSS = ("dense", "reference", "chunked (ours)", "TRL", "Liger")


def exact(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Reverse KL and both gradients in float64, 64 rows at a time."""
    weight, teacher_weight = case.weight.detach().double(), case.teacher_weight.double()
    d_weight, d_hidden, total = torch.zeros_like(weight), [], torch.zeros((), dtype=torch.float64)
    for start in range(0, len(case.hidden), 64):
        part = slice(start, start + 64)
        hidden = case.hidden[part].detach().double()
        logp = (hidden @ weight.T).log_softmax(-1)
        gap = logp - (case.teacher_hidden[part].double() @ teacher_weight.T).log_softmax(-1)
        divergence = (logp.exp() * gap).sum(-1, keepdim=True)
        d_logits = logp.exp() * (gap - divergence) / len(case.hidden)
        total += divergence.sum() / len(case.hidden)
        d_hidden.append(d_logits @ weight)
        d_weight.addmm_(d_logits.T, hidden)
    return total, torch.cat(d_hidden), d_weight


def peak_gib(run: Run, case: Case) -> float:
    """Most that torch held at one time over the inputs and the gradients that come out, from its own record of every
    allocation: exact, and the same in every run. Scratch space of the matrix library is not seen."""
    case.hidden.grad = case.weight.grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run(case)
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    gradients = sum(value.numel() * value.element_size() for value in (case.hidden, case.weight))
    return (max(accumulate(sizes)) - gradients) / 2**30


def error(found: Tensor, truth: Tensor) -> float:
    """Largest deviation relative to the largest entry."""
    return float((found.double() - truth).abs().max() / truth.abs().max())


def seconds_of(run: Run, case: Case) -> float:
    """One timed run."""
    case.hidden.grad = case.weight.grad = None
    start = time.perf_counter()
    run(case)
    return time.perf_counter() - start


def bench(num_tokens: int, width: int, repeats: int, names: list[str]) -> dict[str, dict[str, float]]:
    """The variants on one case, in turns."""
    case = Case.make(num_tokens, width)
    truth = exact(case)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        try:
            case.hidden.grad = case.weight.grad = None
            loss = float(VARIANTS[name](case))
            found[name] = worst_error(name, case, loss, truth) | {"gib": peak_gib(VARIANTS[name], case)}
        except ImportError as problem:
            Console().print(f"left out: {name} ({problem})", markup=False)
    for _ in range(repeats):
        for name, row in found.items():
            row["seconds"] = min(row.get("seconds", float("inf")), seconds_of(VARIANTS[name], case))
    return found


def worst_error(name: str, case: Case, loss: float, truth: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    """The largest relative error, for variants that compute the same loss."""
    if name not in SAME_LOSS:
        return {}
    assert case.hidden.grad is not None
    assert case.weight.grad is not None
    values = (torch.tensor(loss), case.hidden.grad, case.weight.grad)
    return {"error": max(error(value, exact_value) for value, exact_value in zip(values, truth, strict=True))}


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    """The table and the ratios."""
    table = Table(title=title)
    for column in ("variant", "seconds", "peak GiB over inputs and gradients", "max relative error"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for name, row in found.items():
        table.add_row(
            name, f"{row['seconds']:.2f}", f"{row['gib']:.2f}", f"{row['error']:.1e}" if "error" in row else ""
        )
    Console().print(table)
    if "chunked (ours)" not in found:
        return
    mine = found["chunked (ours)"]["seconds"]
    for name in ("bare products", "dense", "TRL", "Liger"):
        if name in found:
            Console().print(f"chunked / {name}: {mine / found[name]['seconds']:.2f} x the time")
    for name in ("chunked, sampled token", "chunked, top-64"):
        if name in found:
            Console().print(f"{name} / chunked full: {found[name]['seconds'] / mine:.2f} x the time")


def main() -> None:
    """Parse, run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--only", type=int, choices=range(len(SIZES)))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="NAME")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = {}
    for num_tokens, width in SIZES if args.only is None else [SIZES[args.only]]:
        title = f"{num_tokens} tokens x {VOCABULARY}, hidden {width}, reverse KL, float32, {torch.get_num_threads()} threads"
        results[title] = bench(num_tokens, width, args.repeats, args.variants)
        show(title, results[title])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
