"""What a teacher's scores cost: one model loaded here, behind vLLM, and behind `understudy serve-teacher`, in one run.

A random Llama (hidden 256, 4 layers, 16,384 tokens) scores the same samples everywhere: 64 prompts of 32 tokens with
responses of 128. Tokens are response tokens; the time is the best of several turns; bytes are bodies in both directions.
Scores are compared with the local ones, so that what is fast is also right.

    make vllm                            # once: vLLM for CPUs
    python benchmarks/engines.py
    python benchmarks/engines.py --vllm-python /path/to/python --turns 5 --json engines.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from shapes import words

from understudy.engines.vllm.launch import ServerProcess, free_ports
from understudy.models import build_causal_lm, save_hf
from understudy.tasks.renderer import Renderer
from understudy.teachers import Http, Local, Served, Setup, Teacher
from understudy.types import Author, Need, Prompt, Sample

VOCAB, K, NUM_SAMPLES, PROMPT, RESPONSE = 16_384, 64, 64, 32, 128
SIZES = {"architecture": "llama", "hidden_size": 256, "num_layers": 4, "num_heads": 8, "max_position_embeddings": 256}
NUM_TOKENS = NUM_SAMPLES * RESPONSE
CLOSE = 1e-3
"""Nats; float32 on all sides."""


def make_model(folder: Path) -> Any:
    """Writes model and tokenizer; the tokenizer."""
    tokenizer = words(VOCAB)
    model = build_causal_lm(SIZES, vocab_size=VOCAB, eos_token_id=VOCAB - 1, pad_token_id=0, dtype="float32")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20.0)
    save_hf(model, tokenizer, folder)
    return tokenizer


def make_samples() -> list[Sample]:
    """Random tokens, the first of them the prompt."""
    generator = torch.Generator().manual_seed(0)
    author = torch.tensor([Author.PROMPT] * PROMPT + [Author.STUDENT] * RESPONSE, dtype=torch.uint8)
    rows = torch.randint(1, VOCAB - 1, (NUM_SAMPLES, PROMPT + RESPONSE), generator=generator)
    return [Sample(Prompt(f"p{n}"), 0, row, author, PROMPT, "length", "") for n, row in enumerate(rows)]


@contextlib.contextmanager
def vllm(python: str, model: Path, folder: Path) -> Iterator[str]:
    """The address of a server."""
    port = free_ports(1)[0]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--host", "127.0.0.1"]
    command += [
        "--port",
        str(port),
        "--dtype",
        "float32",
        "--max-model-len",
        "256",
        "--max-logprobs",
        str(K),
        "--enable-scale-out",
    ]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with ServerProcess(command, name="vLLM", port=port, log=folder / "vllm.log", env=env) as server:
        server.wait_ready()
        yield server.url


@contextlib.contextmanager
def own_server(model: Path, folder: Path, hidden_dtype: str) -> Iterator[str]:
    """The address of `understudy serve-teacher`."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "understudy", "serve-teacher", str(model), "--port", str(port)]
    command += ["--hidden-dtype", hidden_dtype]
    with ServerProcess(command, name="serve-teacher", port=port, log=folder / f"own-{hidden_dtype}.log") as server:
        server.wait_ready()
        yield server.url


def measure(teacher: Teacher, samples: list[Sample], need: Need, turns: int, local: Any) -> dict[str, float]:
    """Tokens a second, bytes a token, and how far from the local scores."""
    asked = frozenset({need})
    teacher.score(samples[:2], asked, k=K)
    if need == "full":
        teacher.head_for(None)
    before = _bytes(teacher)
    best, found = float("inf"), []
    for _ in range(turns):
        started = time.perf_counter()
        found = teacher.score(samples, asked, k=K)
        best = min(best, time.perf_counter() - started)
    numbers = {"tokens_per_s": NUM_TOKENS / best, "bytes_per_token": (_bytes(teacher) - before) / NUM_TOKENS / turns}
    field = "hidden" if need == "full" else "topk_logprob" if need == "topk" else "logprob"
    pairs = [
        (getattr(one, field).float(), getattr(other, field).float()) for one, other in zip(found, local, strict=True)
    ]
    numbers["largest_difference"] = max(float((one - other).abs().max()) for one, other in pairs)
    if need != "full":
        assert numbers["largest_difference"] < CLOSE, numbers
    return numbers


def _bytes(teacher: Any) -> float:
    stats = teacher.stats() if hasattr(teacher, "stats") else {}
    return float(stats.get("bytes_sent", 0) + stats.get("bytes_received", 0))


def compare(folder: Path, python: str | None, turns: int) -> dict[str, dict[str, float]]:
    """Every kind of teacher in turn, each alone on the machine."""
    tokenizer = make_model(folder / "model")
    samples = make_samples()
    setup = Setup(name="teacher", vocab_size=VOCAB, renderer=Renderer(tokenizer))
    needs: tuple[Need, ...] = ("sampled", "topk", "full")
    found: dict[str, dict[str, float]] = {}
    local = Local(model=str(folder / "model")).open(setup)
    scores = {need: local.score(samples, frozenset({need}), k=K) for need in needs}
    labels = {"sampled": "sampled token", "topk": f"top {K}", "full": "hidden states"}
    for need in needs:
        found[f"local, {labels[need]}"] = measure(local, samples, need, turns, scores[need])
    if python is not None:
        with vllm(python, folder / "model", folder) as url:
            section = Http(url=url, model=str(folder / "model"), api="vllm", k_max=K)
            with contextlib.closing(section.open(setup)) as teacher:
                for need in needs[:2]:
                    found[f"vLLM, JSON, {labels[need]}"] = measure(teacher, samples, need, turns, scores[need])
    for dtype in ("float32", "bfloat16"):
        with own_server(folder / "model", folder, dtype) as url, contextlib.closing(Served(url=url).open(setup)) as own:
            for need in needs if dtype == "float32" else needs[2:]:
                label = f"own server, {labels[need]}" + (f" in {dtype}" if need == "full" else "")
                found[label] = measure(own, samples, need, turns, scores[need])
    return found


def show(found: dict[str, dict[str, float]]) -> None:
    """The table, ratios to the local teacher of the same need."""
    print(f"{'':40} {'tokens/s':>9} {'of local':>9} {'bytes/token':>12} {'of 4 V':>8}")
    for label, numbers in found.items():
        like = f"local, {label.split(', ')[-1].split(' in ')[0]}"
        ratio = numbers["tokens_per_s"] / found[like]["tokens_per_s"]
        share = numbers["bytes_per_token"] / (4 * VOCAB)
        print(
            f"{label:40} {numbers['tokens_per_s']:9,.0f} {ratio:9.2f} {numbers['bytes_per_token']:12,.0f} {share:8.4f}"
        )


def default_python() -> str | None:
    """What `scripts/install_vllm.py` made."""
    script = Path(__file__).parents[1] / "scripts" / "install_vllm.py"
    done = subprocess.run([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> None:
    """Prints the table; --json writes all numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", default=os.environ.get("UNDERSTUDY_VLLM_PYTHON"))
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    python = args.vllm_python or default_python()
    if python is None:
        print("vLLM IS LEFT OUT: it could not be installed (make vllm says why)")
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), python, args.turns)
    show(found)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
