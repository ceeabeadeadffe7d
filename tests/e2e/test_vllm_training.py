"""Training with a real vLLM as rollout engine and as teacher follows the same curve as without it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.integration.test_search import SEARCHED, agent_run
from tests.leaks import nothing_left
from tests.runs import metric_rows, train
from tests.vllm_env import vllm_python

from understudy.engines.vllm.launch import ServerProcess, free_ports
from understudy.errors import EngineError
from understudy.models import build_causal_lm, save_hf
from understudy.tasks import build_tokenizer

pytestmark = pytest.mark.slow

# heads of 32, which vLLM's kernels want
SIZES = {"architecture": "llama", "hidden_size": 64, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 64}
EXPERTS = SIZES | {
    "architecture": "qwen3_moe",
    "num_layers": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
STEPS, SEEDS = 6, (0, 1, 2)
ARGS = ("--max-num-seqs", "64", "--enforce-eager", "--dtype", "float32", "--no-enable-chunked-prefill")
ENV = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


def save_model(path: Path, seed: int, sharp: float, sizes: dict[str, Any] = SIZES) -> str:
    tokenizer = build_tokenizer("addition")
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = build_causal_lm(sizes, vocab_size=len(tokenizer), seed=seed, **ends)
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


def vllm(python: str, model: str, log: Path, length: int = 64) -> ServerProcess:
    """A server that the user starts."""
    port = free_ports(1)[0]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--max-model-len", str(length), *ARGS]
    return ServerProcess(command, name=log.stem, port=port, log=log, env=ENV)


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


def test_a_student_with_experts_is_not_trained_on_what_lost_weights_wrote(tmp_path: Path) -> None:
    """A server that starts with the student routes as it does; where vLLM then loads experts wrong, the run stops.

    vLLM 0.32 packs experts for CPUs when it starts, and stores those that are loaded later without packing them.
    """
    student, teacher = save_model(tmp_path / "s", 1, 8.0, EXPERTS), save_model(tmp_path / "t", 2, 24.0)
    launch = {
        "python": vllm_python(),
        "env": {name: value for name, value in ENV.items() if name != "VLLM_SERVER_DEV_MODE"},
        "args": ["--max-model-len", "64", "--max-num-seqs", "64", "--enforce-eager", "--no-enable-chunked-prefill"],
    }
    with nothing_left(), pytest.raises(EngineError, match="after the push of version 1 the rollout engine's log-prob"):
        train(
            tmp_path,
            student={"model": student, "build": None},
            teacher={"type": "local", "model": teacher},
            method={"type": "topk", "k": 8},
            train={"steps": 3, "prompts_per_step": 32},
            sampling={"max_new_tokens": 12},
            rollout={"type": "vllm", "launch": launch},
        )
    (row,) = metric_rows(tmp_path / "run")
    # two routers in float32, over 300 tokens: one that chose otherwise for a few of them would be far above
    assert 0 < row["sampler_gap"] < 1e-5


def test_vllm_writes_the_turns_of_a_search_agent(tmp_path: Path) -> None:
    """It stops at the token that ends a query, and goes on behind what was found; two steps of training."""
    python = vllm_python()
    changes = agent_run(tmp_path / "m", steps=2)
    with nothing_left(), vllm(python, changes["student"]["model"], tmp_path / "engine.log", 512) as server:
        server.wait_ready()
        rollout = {"type": "vllm", "url": server.url, "dtype": "float32"}
        run_dir = train(tmp_path / "run", **changes, rollout=rollout)
    rows = metric_rows(run_dir)
    assert len(rows) == 2
    for row in rows:
        assert row["sampler_gap"] < 1e-3
        assert row["tool_calls"] > 0.5
        assert row["environment_tokens"] > 20
        assert row["environment_failed"] == 0
    samples = (run_dir / "samples" / "step_000001.jsonl").read_text().splitlines()
    talks = [row["messages"] for row in map(json.loads, samples) if "messages" in row]
    assert any(said[0]["content"] == SEARCHED for said in talks)
    for message in (message for said in talks for message in said if message["role"] == "assistant"):
        for end in ("</search>", "</answer>"):
            assert end not in message["content"] or message["content"].index(end) + len(end) == len(message["content"])
