"""An exported student under lm-eval: it says there, word for word, what it says in an evaluation here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from tests.runs import tiny_recipe

from understudy import api
from understudy.config import parse
from understudy.recipe import Recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("lm_eval") is None, reason="NO lm-eval: no student was evaluated by it; pip install 'lm-eval[hf]'"
    ),
]
NUM_NEW = 16
STARTS = (
    "Once upon a time, there was a little",
    "The cat sat on",
    "Tom and Mia went to the park. They",
    "One day, a big dog",
)


def test_a_student_says_under_lm_eval_what_it_says_here(tmp_path: Path, shared: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": start, "a": " girl named Lily"}) + "\n" for start in STARTS))
    data = {"type": "file", "path": str(rows), "prompt_field": "q", "solution_field": "a", "chat": False}
    student = {"model": str(shared / "models/stories260K"), "build": None}
    train = {"steps": 2, "prompts_per_step": 2, "lr": 1e-4}
    recipe = tiny_recipe(tmp_path, task=data, student=student, train=train)
    exported = api.train(parse(Recipe, recipe), quiet=True).student
    keys = [
        "task.type=file",
        f"task.path={rows}",
        "task.prompt_field=q",
        "task.chat=false",
        "eval.split=train",
        "device=cpu",
    ]
    keys += ["sampling.temperature=0", f"sampling.max_new_tokens={NUM_NEW}"]
    api.evaluate(exported, overrides=keys, out=tmp_path / "here", quiet=True)
    here = [json.loads(line) for line in (tmp_path / "here/step_000000.jsonl").read_text().splitlines()]
    assert len({row["response"] for row in here}) == len(STARTS)

    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"q": row["prompt"], "a": row["response"]}) + "\n" for row in here))
    task = {
        "task": "starts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(answers)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{a}}",
        "generation_kwargs": {"until": ["</s>"], "max_gen_toks": NUM_NEW, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/starts.yaml").write_text(yaml.safe_dump(task))
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={exported},dtype=float32"]
    command += ["--tasks", "starts", "--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--batch_size", "2"]
    command += ["--output_path", str(tmp_path / "there"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | offline)
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "there").rglob("samples_starts_*.jsonl")
    there = [json.loads(line) for line in samples.read_text().splitlines()]
    there.sort(key=lambda row: row["doc_id"])
    assert [row["resps"][0][0] for row in there] == [row["response"] for row in here]
    (results,) = (tmp_path / "there").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["starts"]["exact_match,none"] == 1.0
