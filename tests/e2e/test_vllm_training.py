"""Training with a real vLLM as rollout engine and as teacher follows the same curve as without it."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.leaks import nothing_left
from tests.runs import metric_rows, train
from tests.vllm_env import vllm_python

from understudy.engines.vllm.launch import ServerProcess, free_ports
from understudy.models import build_causal_lm, save_hf
from understudy.tasks import build_tokenizer

pytestmark = pytest.mark.slow

# heads of 32, which vLLM's kernels want
SIZES = {"architecture": "llama", "hidden_size": 64, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 64}
STEPS, SEEDS = 12, (0, 1, 2)
ARGS = ("--max-model-len", "64", "--max-num-seqs", "64", "--enforce-eager", "--dtype", "float32")
ARGS += ("--no-enable-chunked-prefill",)
ENV = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def save_model(path: Path, seed: int, sharp: float) -> str:
    tokenizer = build_tokenizer("addition")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_causal_lm(SIZES, vocab_size=len(tokenizer), seed=seed, **ends)
    with torch.no_grad():
        # far from uniform, so that there is something to learn
        model.get_output_embeddings().weight.mul_(sharp)
    save_hf(model, tokenizer, path)
    return str(path)


def losses(folder: Path, student: str, seed: int, teacher: dict[str, Any], **changes: Any) -> torch.Tensor:
    """[STEPS], top-8 divergence per token."""
    settings = {"steps": STEPS, "prompts_per_step": 32, "lr": 3e-3}
    method = {"type": "topk", "k": 8}
    given = {"student": {"model": student, "build": None}, "teacher": teacher, "method": method, "train": settings}
    # half of what the task needs: nothing has to be right here, and vLLM takes most of the time for each token
    given["sampling"] = {"max_new_tokens": 12}
    rows = metric_rows(train(folder, seed=seed, **given, **changes))
    assert all(row["sampler_gap"] < 1e-3 for row in rows if row["staleness"] == 0)
    return torch.tensor([row["loss"] for row in rows], dtype=torch.float64)


def vllm(python: str, model: str, log: Path) -> ServerProcess:
    """A server that the user starts."""
    port = free_ports(1)[0]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    return ServerProcess([*command, "--port", str(port), *ARGS], name=log.stem, port=port, log=log, env=ENV)


def test_vllm_as_engine_and_as_teacher_gives_the_same_curve(tmp_path: Path) -> None:
    """The mean of three seeds, step by step, within the noise of the plain engine's seeds."""
    python = vllm_python()
    student, teacher = save_model(tmp_path / "s", 1, 1.0), save_model(tmp_path / "t", 2, 24.0)
    with nothing_left(), ExitStack() as servers:
        rollout, scoring = (
            servers.enter_context(vllm(python, *of))
            for of in ((student, tmp_path / "engine.log"), (teacher, tmp_path / "teacher.log"))
        )
        plain = torch.stack(
            [losses(tmp_path / f"hf{seed}", student, seed, {"type": "local", "model": teacher}) for seed in SEEDS]
        )
        for server in (rollout, scoring):
            server.wait_ready()
        served = {"type": "http", "api": "vllm", "url": scoring.url, "model": teacher}
        given: dict[str, Any] = {"rollout": {"type": "vllm", "url": rollout.url, "dtype": "float32"}}
        given["async"] = {"max_staleness": 0, "timeout_s": 120}
        engine = torch.stack([losses(tmp_path / f"vllm{seed}", student, seed, served, **given) for seed in SEEDS])
    assert plain[:, -1].mean() < 0.8 * plain[:, 0].mean(), "nothing was learnt, so nothing was compared"
    # standard error of a difference of means over the seeds; 4 of them, and never less than 2 % of the loss
    noise = (plain.var(0) / len(SEEDS) + engine.var(0) / len(SEEDS)).sqrt()
    gap = (engine.mean(0) - plain.mean(0)).abs()
    print("plain ", [round(float(value), 4) for value in plain.mean(0)])
    print("engine", [round(float(value), 4) for value in engine.mean(0)])
    assert bool((gap <= torch.maximum(4 * noise, 0.02 * plain.mean(0))).all()), (plain, engine)
