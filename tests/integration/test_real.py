"""The script of the real weights, on tiny ones: its measures against formulas, and all of it with a stop in between."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import sample, tiny
from understudy.cli.app import app
from understudy.eval.estimators import Estimate
from understudy.models import build_causal_lm, drop_layers, load_causal_lm, save_hf

ROOT = Path(__file__).parents[2]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def real() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real", ROOT / "scripts" / "real.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["real"] = module
    spec.loader.exec_module(module)
    return module


def bytes_tokenizer() -> Any:
    """A token for every byte and the marks of ChatML: it reads any text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = ["<|im_end|>", "<|im_start|>", *alphabet]
    inner = Tokenizer(models.BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=CHATML, **ends)


def test_divergences_are_sums_by_definition(real: ModuleType) -> None:
    student, teacher = tiny(sharp=20.0), tiny("qwen3", sharp=20.0)
    one = sample("p", [3, 4, 5], [7, 8, 1])
    with torch.no_grad():
        found = real.divergences(student, teacher, one)
    wanted = dict.fromkeys(("reverse", "forward", "nll", "teacher_nll"), 0.0)
    for place in range(2, 5):
        rows = []
        for model in (student, teacher):
            with torch.no_grad():
                logits = model(input_ids=one.token_ids[None, : place + 1], use_cache=False).logits[0, -1].tolist()
            rows.append([value - math.log(sum(map(math.exp, logits))) for value in logits])
        own, other = rows
        wanted["reverse"] += sum(math.exp(s) * (s - t) for s, t in zip(own, other, strict=True))
        wanted["forward"] += sum(math.exp(t) * (t - s) for s, t in zip(own, other, strict=True))
        token = int(one.token_ids[place + 1])
        wanted["nll"] -= own[token]
        wanted["teacher_nll"] -= other[token]
    assert found.pop("tokens") == 3
    assert found == pytest.approx(wanted, rel=1e-9)
    assert wanted["reverse"] > 0.1


def test_a_choice_is_scored_as_in_a_sequence_of_its_own(real: ModuleType) -> None:
    tokenizer = bytes_tokenizer()
    model = build_causal_lm(
        {"architecture": "llama", "hidden_size": 32, "num_layers": 2, "num_heads": 4},
        vocab_size=len(tokenizer),
        eos_token_id=0,
        pad_token_id=0,
        dtype="float64",
    )
    choices = ["ice", "a much longer choice", "fire"]
    likely = []
    with torch.no_grad():
        for choice in choices:
            ids = torch.tensor(tokenizer(f"Question: Hot?\nAnswer: {choice}")["input_ids"])
            row = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])
            likely.append(float(row[-len(choice) - 1 :].sum()) / len(choice))
        best = likely.index(max(likely))
        for right in range(3):
            found = real.answer_problem(model, tokenizer, {"question": "Hot?", "choices": choices, "right": right})
            assert found["right"] == float(right == best)
    question = len(tokenizer("Question: Hot?\nAnswer:")["input_ids"])
    assert found["tokens"] == question - 1
    assert found["nll"] == pytest.approx(-float(row[: question - 1].sum()), rel=1e-9)


def test_a_mean_per_token_weighs_problems_by_their_tokens(real: ModuleType) -> None:
    found = real.per_token(([2.0, 3.0], [1.0, 4.0]))
    assert found.value == pytest.approx(5 / 5)
    assert (found.low, found.high) == pytest.approx((3 / 4, 2.0))
    same = np.arange(1.0, 9.0)
    paired = real.per_token((same + 1, same), (same, same))
    assert isinstance(paired, Estimate)
    assert paired.value == pytest.approx(8 / 36)
    assert paired.low is not None
    assert paired.low > 0.0


def test_layers_are_dropped_and_renumbered(tmp_path: Path) -> None:
    tokenizer = bytes_tokenizer()
    sizes = {"architecture": "llama", "hidden_size": 32, "num_layers": 4, "num_heads": 4}
    model = build_causal_lm(sizes, vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, dtype="float32")
    kept = [model.get_decoder().layers[index].mlp.up_proj.weight for index in (0, 3)]
    drop_layers(model, (1, 2))
    save_hf(model, tokenizer, tmp_path / "model")
    again: Any = load_causal_lm(str(tmp_path / "model"))
    for index, weight in enumerate(kept):
        assert torch.equal(again.get_decoder().layers[index].mlp.up_proj.weight, weight)
        assert again.get_decoder().layers[index].self_attn.layer_idx == index
    with pytest.raises(Exception, match="layers \\[0, 1\\] cannot be dropped; name some, not all, of 0 to 1"):
        drop_layers(again, (0, 1))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def world(tmp_path: Path, real: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Tiny weights and data, and the recipes with few and short steps. Returns the commands as they are given."""
    monkeypatch.chdir(tmp_path)
    tokenizer = bytes_tokenizer()
    sizes = {
        "architecture": "llama",
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "max_position_embeddings": 2048,
    }
    model = build_causal_lm(sizes, vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, dtype="float32")
    # answers that end by themselves within their few tokens
    with torch.no_grad():
        # hidden states lean one way, and so does the end: about one token in three
        model.get_input_embeddings().weight.add_(0.1)
        model.get_output_embeddings().weight.mul_(0.1)
        model.get_output_embeddings().weight[0] += 0.15
    save_hf(model, tokenizer, real.TEACHER)
    for path in (ROOT / "recipes/real").glob("*.yaml"):
        recipe = yaml.safe_load(path.read_text())
        recipe["train"] |= {"steps": 2, "prompts_per_step": 2, "save_every": 1}
        recipe["device"] = "cpu"
        recipe.setdefault("sampling", {})["max_new_tokens"] = 6
        if path.stem == "prompt":
            # a token is a byte here
            recipe["teacher"]["template"] = "Subjects are words.\n\n{prompt}"
        if "eval" in recipe:
            recipe["eval"] |= {"problems": 3, "sampling": {"temperature": 0.0, "max_new_tokens": 4}}
        (tmp_path / "recipes/real").mkdir(parents=True, exist_ok=True)
        (tmp_path / "recipes/real" / path.name).write_text(yaml.safe_dump(recipe, sort_keys=False))
    (tmp_path / "docs").mkdir()
    data = tmp_path / "data"
    write(data / real.SOURCES["questions"].file, [{"question": f"who is {n}?", "answer": ["x"]} for n in range(30)])
    asked = {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"num_words": None}]}
    spoken = {"instruction_id_list": ["language:response_language"], "kwargs": [{"language": "kn"}]}
    write(
        data / real.SOURCES["instructions"].file, [{"prompt": f"Say {n}."} | (asked if n else spoken) for n in range(4)]
    )
    exam = [{"question": f"{n}?", "choices": ["a", "bb"], "labels": ["A", "B"], "answer": "B"} for n in range(3)]
    write(data / real.SOURCES["exam"].file, exam)
    names = list(real.SUBJECTS)
    write(data / real.SOURCES["subjects"].file, [{"question": f"q{n}", "subject": names[n % 9]} for n in range(20)])
    for name, value in {"DROPPED": (1,), "NUM_QUESTIONS": 4, "NUM_SUBJECTS": 3, "NUM_EXAM": 3, "NUM_SHOWN": 2}.items():
        monkeypatch.setattr(real, name, value)
    given: list[tuple[str, ...]] = []

    def in_process(*arguments: str | Path) -> None:
        given.append(tuple(map(str, arguments)))
        if code := app([*map(str, arguments)], standalone_mode=False):
            raise SystemExit(code)

    def called(part: Callable[..., None], *arguments: object) -> None:
        part(*arguments)

    monkeypatch.setattr(real, "understudy", in_process)
    # a process of its own would not have what is changed here
    monkeypatch.setattr(real, "apart", called)
    monkeypatch.setattr(sys, "argv", ["real.py", "--data", str(data)])
    return given


@pytest.mark.slow
def test_from_weights_to_the_page_and_on_after_a_stop(
    tmp_path: Path, real: ModuleType, world: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sit_exam: Callable[..., None] = real.sit_exam

    def stopped(name: str, *arguments: Any) -> None:
        if name == "gkd":
            raise KeyboardInterrupt
        sit_exam(name, *arguments)

    monkeypatch.setattr(real, "sit_exam", stopped)
    with pytest.raises(KeyboardInterrupt):
        real.main()
    assert [command[1] for command in world if command[0] == "train"] == [
        f"recipes/real/{name}.yaml" for name in ("prompt", "warm", "gkd", "tropd", "sft")
    ]
    begun = (tmp_path / "docs/real.md").read_text()
    assert "| TrOPD - more imitation |" in begun
    assert "IFEval" not in begun
    before = len(world)
    # an evaluation that was stopped half-way begins again
    write(Path("runs/real/measured/pruned-instructions/step_000000.jsonl"), [{}])
    monkeypatch.setattr(real, "sit_exam", sit_exam)
    real.main()
    assert {command[0] for command in world[before:]} == {"eval"}
    assert len(world[before:]) == 6
    assert [path.name for path in Path("runs/real/gkd").glob("check*")] == []
    page = (tmp_path / "docs/real.md").read_text()
    with Path("docs/real/recover.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["row"] for row in rows if row["kind"] == "row"} == {
        "the whole",
        "pruned",
        "warm start",
        *real.ARMS.values(),
    }
    curves = {(row["row"], row["at"]) for row in rows if row["kind"] == "curve" and row["metric"] == "KL(S||T)"}
    assert curves == {
        (label, str(step * 2 * real.PASSES[arm])) for arm, label in real.ARMS.items() for step in range(3)
    }
    drawn = {row["row"] for row in rows if row["metric"] == "KL(S||T) of each step's samples"}
    assert {"reverse KL", "TrOPD"} <= drawn
    for text in (
        "| with the prompt |",
        "| after - before |",
        "| TrOPD - more imitation |",
        "**who is 0? Answer in one sentence.**",
    ):
        assert page.count(text) == 1
    for picture in ("prompt-accuracy", "recover-steps", "recover-reverse", "recover-forward"):
        assert f"(real/{picture}.svg)" in page
        assert Path(f"docs/real/{picture}.svg").read_text().startswith("<svg")
    # a third time nothing is made, and the page is drawn from its data alone
    before = len(world)
    monkeypatch.setattr(sys, "argv", ["real.py", "--draw"])
    real.main()
    assert (tmp_path / "docs/real.md").read_text() == page
    assert len(world) == before


def test_data_that_is_not_there_is_named(tmp_path: Path, real: ModuleType) -> None:
    with pytest.raises(SystemExit, match="put google/IFEval there as JSON lines, or leave --data out"):
        real.read_source("instructions", tmp_path)


def test_problems_of_the_hub_and_of_files_are_one(real: ModuleType) -> None:
    wanted = {"question": "?", "choices": ["x", "y"], "right": 1}
    nested = {"question": "?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    flat = {"question": "?", "choices": ["x", "y"], "labels": ["A", "B"], "answer": "B"}
    assert real.exam_problem(nested) == real.exam_problem(flat) == wanted
