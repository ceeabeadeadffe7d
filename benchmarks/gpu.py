"""What a GPU makes of it, in five minutes: the head beside its peers, a whole step, a push of the weights, memory.

Prints the card and tables. The head: reverse KL with a full-vocabulary teacher, forward and backward, bfloat16, 8,192 tokens,
151,936 entries. Peers' public figures on an H100 are 42 ms for the products, 167 ms for TRL's chunked cross-entropy and 192 ms
for Liger's. The step: 64 responses of 256 tokens, a student of 0.6 B parameters and a teacher of 4 B in Qwen3's shapes, random
weights.

    python benchmarks/gpu.py                  # on a GPU; peers need pip install understudy[bench]
    python benchmarks/gpu.py --smoke          # tiny, on a CPU: whether every line runs
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import torch
from head import Case, liger, trl
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from understudy.engines.hf.engine import HFEngine
from understudy.linear import LMHead, evaluate
from understudy.linear.rows import has_kernels
from understudy.methods import GKD, OPD, TopK
from understudy.methods.base import Method
from understudy.models import build_causal_lm, compile_blocks, lm_head, row_style
from understudy.packing import attach_scores
from understudy.teachers import LocalTeacher
from understudy.trainer.distributed import Ranks
from understudy.trainer.settings import Train
from understudy.trainer.update import Heads, Optimizer, StudentModel, accumulate_gradients, prepare
from understudy.types import Prompt, Request, Sampling, TokenBatch

QWEN = {"architecture": "qwen3", "num_kv_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
STUDENT = QWEN | {"hidden_size": 1024, "num_layers": 28, "num_heads": 16, "intermediate_size": 3072}
TEACHER = QWEN | {"hidden_size": 2560, "num_layers": 36, "num_heads": 32, "intermediate_size": 9728}
TINY = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "intermediate_size": 64}
SIZES: dict[str, Any] = {
    "vocabulary": 151_936,
    "tokens": 8_192,
    "hidden": (1_024, 4_096),
    "chunks": (256, 1_024),
    "prompts": 16,
    "samples": 4,
    "prompt_tokens": 128,
    "new_tokens": 256,
    "repeats": 5,
}
SMOKE = {"vocabulary": 300, "tokens": 24, "hidden": (16,), "chunks": (8,), "prompts": 2, "samples": 2} | {
    "prompt_tokens": 6,
    "new_tokens": 4,
    "repeats": 1,
}
PARTS = ("head", "step", "compiled", "push")
CONSOLE = Console(width=120)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    CONSOLE.print(table)


def show_machine(device: torch.device) -> None:
    """The card and the versions."""
    found = {"torch": torch.__version__, "CUDA": torch.version.cuda or "none", "Python": platform.python_version()}
    for name in ("triton", "trl", "liger-kernel", "transformers"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        size = f"{card.total_memory / 2**30:.0f} GiB, {card.multi_processor_count} multiprocessors"
        CONSOLE.print(
            f"{torch.cuda.device_count()} x {card.name}, {size}, compute capability {card.major}.{card.minor}"
        )
    else:
        CONSOLE.print(f"{platform.machine()}, {torch.get_num_threads()} threads: NOT A GPU, the numbers mean nothing")
    CONSOLE.print(", ".join(f"{name} {value}" for name, value in found.items()))


def measure(run: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Milliseconds, the smallest of some after two warm-ups, and the peak in GiB over what there was before."""
    for _ in range(2):
        run()
    wait(device)
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    found = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run()
        wait(device)
        found.append(1e3 * (time.perf_counter() - begun))
    return min(found), (peak_bytes(device) - before) / 2**30


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def head_case(width: int, sizes: dict[str, Any], device: torch.device) -> Case:
    """Logits of standard deviation 3, and the scores that a teacher server would have sent."""
    torch.manual_seed(0)
    vocabulary, tokens = sizes["vocabulary"], sizes["tokens"]
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    weight, teacher_weight = (torch.randn(vocabulary, width, **options) * 3 / width**0.5 for _ in range(2))
    hidden, teacher_hidden = (torch.randn(tokens, width, **options) for _ in range(2))
    everywhere = torch.ones(tokens, dtype=torch.bool, device=device)
    batch = TokenBatch(
        target=torch.randint(vocabulary, (tokens,), device=device),
        mask=everywhere,
        on_policy=everywhere,
        sequence=torch.arange(tokens, device=device) // 64,
        teacher_logprob=-torch.rand(tokens, device=device),
        topk_ids=torch.randint(vocabulary, (tokens, 64), device=device),
        topk_logprob=-8.0 - torch.rand(tokens, 64, device=device),
    )
    return Case(hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, batch)


def products(case: Case, chunk: int) -> None:
    """The four products that no exact method can avoid, in bfloat16 throughout."""
    hidden, weight = case.hidden.detach(), case.weight.detach()
    case.weight.grad, case.hidden.grad = torch.zeros_like(weight), torch.zeros_like(hidden)
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        _ = case.teacher_hidden[part] @ case.teacher_weight.T
        rows = hidden[part] @ weight.T
        case.hidden.grad[part] = rows @ weight
        case.weight.grad.addmm_(rows.T, hidden[part])


def ours(case: Case, method: Method, chunk: int, fused: bool) -> torch.Tensor:
    teacher = (case.teacher_hidden, LMHead(case.teacher_weight)) if "full" in method.needs else None
    options: dict[str, Any] = {"teacher": teacher, "chunk_tokens": chunk, "fused": fused}
    loss = evaluate(method, case.batch, case.hidden, LMHead(case.weight), **options).loss
    loss.backward()
    return loss.detach()


def bench_head(width: int, sizes: dict[str, Any], device: torch.device) -> None:
    """Milliseconds, memory and loss of each."""
    case, last = head_case(width, sizes, device), sizes["chunks"][-1]
    kernels = has_kernels(device) or os.environ.get("TRITON_INTERPRET") == "1"
    variants: dict[str, Callable[[], object]] = {"products": lambda: products(case, last)}
    for fused, name in ((True, "understudy"), (False, "understudy, no kernels")):
        if fused and not kernels:
            CONSOLE.print("left out: understudy's kernels (Triton is not installed, or there is no GPU)")
            continue
        for chunk in sizes["chunks"]:
            variants[f"{name}, chunks of {chunk}"] = lambda chunk=chunk, fused=fused: ours(case, GKD(), chunk, fused)
    variants |= {"TRL": lambda: trl(case), "Liger": lambda: liger(case)}
    variants["understudy, sampled token"] = lambda: ours(case, OPD(), last, kernels)
    variants["understudy, top 64"] = lambda: ours(case, TopK(k=64), last, kernels)
    rows, bare = [], 0.0
    for name, run in variants.items():

        def clean(run: Callable[[], object] = run) -> object:
            case.hidden.grad = case.weight.grad = None
            return run()

        try:
            loss = clean()
            took, peak = measure(clean, device, sizes["repeats"])
        except ImportError as problem:
            CONSOLE.print(f"left out: {name} ({problem})", markup=False)
            continue
        bare = bare or took
        shown = f"{float(loss):.6f}" if isinstance(loss, torch.Tensor) else ""
        rows.append([name, f"{took:.1f}", f"{took / bare:.2f}", f"{peak:.2f}", shown])
    title = f"head: {sizes['tokens']:,} tokens x {sizes['vocabulary']:,}, hidden {width:,}, bfloat16, reverse KL"
    show(title, ["", "ms", "x products", "GiB over inputs", "loss"], rows)


def build(config: dict[str, Any], sizes: dict[str, Any], device: torch.device) -> Any:
    """Random weights, made where they stay."""
    with device:
        return build_causal_lm(
            config, vocab_size=sizes["vocabulary"], eos_token_id=0, pad_token_id=0, dtype="bfloat16", device=device
        )


def bench_step(
    sizes: dict[str, Any], device: torch.device, pair: tuple[Any, Any], optimizer: Optimizer, compiled: bool
) -> None:
    """Seconds of each phase of three steps: the first two compile kernels."""
    model, teacher_model = pair
    if compiled:
        compile_blocks(model)
    words = Tokenizer(models.WordLevel({f"<{number}>": number for number in range(sizes["vocabulary"])}, "<0>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<0>")
    vocabulary = sizes["vocabulary"]
    engine = HFEngine(model, tokenizer, seed=0, stop_ids=(), vocab_size=vocabulary)
    teacher = LocalTeacher(teacher_model, name="teacher", vocab_size=vocabulary)
    student = StudentModel(model.train(), device, vocabulary, 1.0, None, style=row_style(model))
    prompts = torch.randint(vocabulary, (sizes["prompts"], sizes["prompt_tokens"]))
    requests = [
        Request(Prompt(id=str(number)), index, ids)
        for number, ids in enumerate(prompts)
        for index in range(sizes["samples"])
    ]
    rows = []
    for step in range(3):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        times = [time.perf_counter()]

        def lap(times: list[float] = times) -> None:
            wait(device)
            times.append(time.perf_counter())

        samples = engine.generate(requests, Sampling(max_new_tokens=sizes["new_tokens"]), step=step)
        lap()
        scores = teacher.score(samples, frozenset({"full"}))
        lap()
        scored = [one for one in attach_scores(samples, scores, "error") if one is not None]
        (micros,) = prepare(student, GKD(), scored, step=step, draw=(0, step), ranks=Ranks())
        accumulate_gradients(student, micros, heads=Heads({None: lm_head(teacher_model)}), step=step, ranks=Ranks())
        optimizer.clip()
        optimizer.step(step)
        optimizer.zero_grad()
        lap()
        phases = [later - earlier for earlier, later in pairwise(times)]
        total = times[-1] - times[0]
        rate = f"{sum(one.num_response_tokens for one in samples) / total:,.0f}"
        cells = [f"{seconds:.2f}" for seconds in [*phases, total]]
        rows.append([f"step {step + 1}", *cells, rate, f"{peak_bytes(device) / 2**30:.1f}"])
    many = f"{sizes['prompts']} prompts x {sizes['samples']} samples, {sizes['new_tokens']} new tokens"
    sized = " <- ".join(f"{sum(value.numel() for value in one.parameters()) / 1e9:.2f} B" for one in pair)
    title = f"step: {sized}, bfloat16, {many}{', compiled layers' if compiled else ''}"
    show(title, ["seconds", "generate", "score", "update", "step", "tokens/s", "peak GiB"], rows)


def join(rank: int, place: str, backend: str, device: torch.device) -> None:
    torch.distributed.init_process_group(backend, init_method=f"file://{place}", rank=rank, world_size=2)
    if device.type == "cuda":
        torch.cuda.set_device(device)


def receive(rank: int, place: str, backend: str, shapes: list[torch.Size]) -> None:
    """The engine's side: takes each tensor, as often as it is sent."""
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    join(rank, place, backend, device)
    for _ in range(3):
        for shape in shapes:
            torch.distributed.broadcast(torch.empty(shape, dtype=torch.bfloat16, device=device), 0)
        wait(device)
    torch.distributed.destroy_process_group()


def bench_push(model: Any, device: torch.device) -> None:
    """The student's weights, tensor by tensor as a run sends them, to a second process."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        CONSOLE.print("left out: a push by NCCL needs two GPUs")
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    tensors = [value.detach() for value in model.state_dict().values() if value.is_floating_point()]
    size = sum(tensor.nbytes for tensor in tensors)
    with tempfile.TemporaryDirectory() as folder:
        place = f"{folder}/meeting"
        shapes = [tensor.shape for tensor in tensors]
        other = torch.multiprocessing.get_context("spawn").Process(target=receive, args=(1, place, backend, shapes))
        other.start()
        join(0, place, backend, device)
        rows = []
        for turn in range(3):
            begun = time.perf_counter()
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)
            wait(device)
            took = time.perf_counter() - begun
            rows.append([f"push {turn + 1}", f"{1e3 * took:.0f}", f"{size / 1e9 / took:.1f}"])
        torch.distributed.destroy_process_group()
        other.join()
    show(f"push of {size / 1e9:.2f} GB by {backend}, {len(tensors)} tensors", ["", "ms", "GB/s"], rows)


def main() -> None:
    """All tables, each as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS)
    args = parser.parse_args()
    if not args.smoke and not torch.cuda.is_available():
        raise SystemExit("this machine has no GPU that torch can use; --smoke runs tiny sizes on a CPU")
    device, sizes = (torch.device("cpu"), SMOKE) if args.smoke else (torch.device("cuda", 0), SIZES)
    begun = time.perf_counter()
    show_machine(device)
    if "head" in args.only:
        for width in sizes["hidden"]:
            bench_head(width, sizes, device)
    if {"step", "compiled", "push"} & set(args.only):
        tiny = TINY if args.smoke else {}
        pair = (build(STUDENT | tiny, sizes, device), build(TEACHER | tiny, sizes, device))
        optimizer = Optimizer(pair[0], Train(steps=9))
        for name in ("step", "compiled"):
            if name in args.only:
                bench_step(sizes, device, pair, optimizer, name == "compiled")
        if "push" in args.only:
            bench_push(pair[0], device)
    CONSOLE.print(f"{time.perf_counter() - begun:.0f} s in all")


if __name__ == "__main__":
    main()
