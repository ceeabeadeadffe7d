"""The script of the evidence on a claim of its own: models, runs, contrasts, and the page that is drawn from the data."""

from __future__ import annotations

import csv
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "evidence.py"
STUDENT = {"architecture": "llama", "hidden_size": 16, "num_layers": 1, "num_heads": 2, "max_position_embeddings": 64}
RUN = {
    "task": {"type": "arithmetic", "family": "addition", "digits": 1},
    "device": "cpu",
    "sampling": {"max_new_tokens": 12},
    "method": {"type": "sft"},
    "train": {"steps": 6, "prompts_per_step": 8, "lr": 1e-3, "save_samples_every": 0},
    "eval": {"every": 2, "problems": 4, "samples_per_prompt": 2},
}


@pytest.fixture
def evidence() -> ModuleType:
    spec = importlib.util.spec_from_file_location("evidence", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["evidence"] = module
    spec.loader.exec_module(module)
    return module


def test_a_claim_from_its_recipes_to_the_page(
    tmp_path: Path, evidence: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    claims = tmp_path / "recipes/evidence"
    start, student = "runs/evidence/world/start/student", {"student": {"model": "runs/evidence/world/start/student"}}
    claim = {
        "title": "A claim",
        "source": "this test",
        "models": ["world/start"],
        "merged": {"world/same": {"start": start, "experts": [start, start], "scale": 2.0}},
        "evaluated": {"start": start, "merged": "runs/evidence/world/same"},
        "problems": 5,
        "contrasts": [
            {"says": "likeliest tokens alone", "more": "low", "less": "start", "by": "greedy"},
            {"says": "merged with itself it is the start", "more": "merged", "less": "start"},
            {"says": "low ahead", "more": "low", "less": "high", "by": "pass@2"},
            {"says": "sooner", "more": "low", "less": "high", "by": "samples"},
        ],
    }
    grid = {
        "vary": {"rate": {"low": {"train": {"lr": 1e-4}}, "high": {"train": {"lr": 1e-2}}}},
        "seeds": 1,
        "target": None,
    }
    for name, values in {
        "world/start.yaml": RUN | {"student": {"build": STUDENT}, "run_dir": "runs/evidence/world/start"},
        "claim/run.yaml": RUN | student | {"run_dir": "runs/evidence/claim/run"},
        "claim/grid.yaml": grid,
        "claim/claim.yaml": claim,
    }.items():
        (claims / name).parent.mkdir(parents=True, exist_ok=True)
        (claims / name).write_text(yaml.safe_dump(values, sort_keys=False))
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/evidence.md").write_text(
        "top\n<!-- claims -->\n<!-- end of claims -->\nmiddle\n<!-- claim --><!-- end of claim -->end\n"
    )
    for _ in range(2):  # the second time nothing is made again, and the same is drawn
        monkeypatch.setattr(sys, "argv", ["evidence.py", "--jobs", "1"])
        evidence.main()
        page = (tmp_path / "docs/evidence.md").read_text()
        assert page.count("merged with itself it is the start") == page.count("| merged |") == 1
        assert page.startswith("top\n")
        assert page.endswith("end\n")
        assert "![claim: accuracy](evidence/claim-accuracy.svg)" in page
    with (tmp_path / "docs/evidence/claim.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {row["row"]: row for row in rows if row["kind"] == "contrast"}
    same = found["merged with itself it is the start"]
    assert (float(same["value"]), same["at"]) == (0.0, "not shown")
    assert found["likeliest tokens alone"]["metric"] == "greedy"
    evaluated = tmp_path / "runs/evidence/claim/models/start"
    assert len((evaluated / "final/step_000000.jsonl").read_text().splitlines()) == 10
    assert len((evaluated / "greedy/step_000000.jsonl").read_text().splitlines()) == 5
    assert found["sooner"]["metric"] == "samples"
    picture = (tmp_path / "docs/evidence/claim-accuracy.svg").read_text()
    assert picture.startswith("<svg")
    assert [">low</text>" in picture, ">high</text>" in picture] == [True, True]
    # over samples, whatever the steps: 8 a step, evaluated every other one
    accuracy = [int(row["at"]) for row in rows if row["kind"] == "curve" and row["metric"] == "accuracy"]
    assert accuracy == [0, 16, 32, 48] * 2
