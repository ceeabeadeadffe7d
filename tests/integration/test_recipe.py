"""Bad input gets one sentence with its path in the recipe, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from tests.runs import distillation, save_tiny_model, tiny_recipe, write_recipe
from understudy import config
from understudy.cli.app import app
from understudy.compare.cells import Cells
from understudy.compare.grid import read_grid
from understudy.errors import CheckpointError, DataError, RecipeError, UnderstudyError, VocabularyError
from understudy.methods import GKD, TopK
from understudy.models import load_tokenizer
from understudy.recipe import Recipe, load_recipe
from understudy.recipe.checks import check
from understudy.recipe.names import OTHER_NAMES
from understudy.trainer.signals import ENDING

ROOT = Path(__file__).parents[2]


def parse(folder: Path, **changes: Any) -> Recipe:
    return config.parse(Recipe, tiny_recipe(folder, **changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methd": {"type": "sft"}}, "methd: unknown key; did you mean 'method'"),
        ({"train": {"step": 3}}, "train.step: unknown key; did you mean 'steps'"),
        ({"method": {"type": "gdk"}}, "method.type is 'gdk'; did you mean 'gkd'"),
        ({"method": {"type": "k1_loss"}}, "refused: .* expected gradient is zero"),
        ({"method": "sft"}, "method is 'sft'; it must be a mapping with a `type`: opd, gkd, topk, "),
        ({"method": {"beta": 1}}, "method.beta: unknown key; only the types .*gkd.* have it"),
        ({"method": {"type": None}}, "method.type is missing; known: "),
        ({"train": {"steps": "many"}}, "train.steps is 'many'; it must be a whole number"),
        ({"train": {"steps": True}}, "train.steps is true; it must be a whole number"),
        ({"train": {"steps": 0}}, "train: steps is 0; it must be at least 1"),
        ({"train": {"schedule": "cosin"}}, "train.schedule is 'cosin'; it must be one of .*did you mean 'cosine'"),
        ({"train": {"max_grad_norm": 0}}, "null does not clip, 0 would stop every update"),
        ({"sampling": {"top_p": 1.5}}, r"sampling: top_p is 1.5; it must lie in \[1e-06, 1\]"),
        ({"task": {"type": "arithmetic", "family": "adition"}}, "task.family is 'adition'.*addition"),
        ({"student": {"model": "x"}}, "student: give either model"),
        ({"method": {"type": "gkd"}}, "the method GKD needs a teacher"),
        ({"teachers": {"a": {"type": "local", "model": "x"}}}, "the method SFT uses no teacher"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"train": {"lr": float("nan")}}, "lr is nan; it must be at least 0"),
        ({"train": {"betas": [2, 3]}}, "betas is|betas are"),
        ({"train": {"stop_at": 7}}, "stop_at is 7"),
        ({"eval_task": {"type": "arithmetic"}}, "eval_task is given without a section eval"),
        ({"train": 3}, "train is 3; it must be a mapping of keys"),
        ({"train": {"compile": True, "gradient_checkpointing": True}}, "set one of them to false"),
        ({"train": None}, "train is missing"),
    ],
)
def test_what_a_recipe_may_not_say(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        parse(tmp_path, **changes)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learning_rate=1e-5", "learning_rate: unknown key; the key is train.lr$"),
        ("train.learning_rate=1e-5", "train.learning_rate: unknown key; the key is train.lr$"),
        ("train.gradient_accumulation_steps=4", "the key is train.micro_batch_tokens"),
        ("train.max_length=512", "the key is train.max_prompt_tokens, and sampling.max_new_tokens for the response"),
        ("sampling.max_completion_length=512", "the key is sampling.max_new_tokens$"),
        ("train.num_generations=8", "the key is train.samples_per_prompt"),
        ("per_device_train_batch_size=8", "the key is train.prompts_per_step"),
        ("output_dir=x", "the key is run_dir$"),
        ("num_train_epochs=3", "the key is train.steps; an epoch has as many as the data"),
        ("bf16=true", "the key is train.compute_dtype: bfloat16$"),
        ("task.train_path=x", "the key is task.path$"),
        ("eval.steps=3", "the key is eval.every$"),
        ("beta=1", "beta: unknown key; did you mean method.beta"),
        ("method.k=64", "method.k: unknown key; only the types topk, .* have it"),
        ("sampling.lr=1", "the key is train.lr$"),
        ("train.LR=1", "did you mean 'lr'"),
        ("train.torch_compile=true", "the key is train.compile$"),
        (
            "data={train_files: x, max_prompt_length: 8}",
            "train_files is task.path, max_prompt_length is train.max_prompt",
        ),
        (
            "actor_rollout_ref.rollout.n=8",
            "actor_rollout_ref: unknown key; of its keys, rollout.n is train.samples_per_p",
        ),
        ("train.zzz=1", "train.zzz: unknown key; known: betas, "),
        ("method.type=on-policy-distillation", "the type is gkd$"),
        ("task.type=json", "the type is file$"),
        ("rollout.n=8", "rollout.type is missing; of its keys, rollout.n is train.samples_per_prompt$"),
        ("train.max_new_tokens=8", "did you mean .*sampling.max_new_tokens"),
        ("sampling.stop=a", "no key sets it: a response ends as the chat template ends a turn"),
        ("train.optim=adamw_8bit", "no key sets it: the optimizer is AdamW$"),
        (
            "rollout={type: vllm, router_replay: true}",
            "no key sets it: the choices of a router are not replayed: .*vLLM 0.32",
        ),
        ("method=grpo", r"write method: {type: grpo}$"),
        ("method.type=[sft]", r"method.type is \['sft'\]"),
    ],
)
def test_names_of_other_toolkits_get_the_key(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(write_recipe(tmp_path), [override])


def test_every_unknown_key_of_a_section_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"(?s)train.learning_rate.*train.bf16"):
        load_recipe(write_recipe(tmp_path), ["train.learning_rate=1", "train.bf16=true"])


def test_the_keys_for_other_names_are_there() -> None:
    places = {place for place, _ in config.places(Recipe)}
    for name, key in OTHER_NAMES.items():
        assert key.startswith("--") or re.split(r"[^\w.]", key)[0] in places, name
        assert name not in places, f"{name} is a key of its own"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("eval.every=0", "every is 0; it must be at least 1; null evaluates before and after training only"),
        ("eval.problems=0", "null takes all; without a section eval nothing is evaluated"),
        ("train.max_grad_norm=0", "null does not clip"),
        ("train.save_every=0", "null saves at the end only"),
        ("student.lora.rank=0", "without a section lora all weights are trained"),
        ("sampling.top_p=0", "1 takes every token"),
        ("sampling.top_k=-1", "0 takes every token"),
        ("task.num_solutions=0", "null takes all problems"),
        ("train.lr=.inf", "lr is infinite; it must be at least 0 and finite"),
        ("train.lr=null", "train.lr is null; it must be a number; leave it out for its default, 1e-05$"),
        ("train.save_samples_every=null", "leave it out for its default, 50$"),
        ("loggers=null", r"it must be a list of strings; leave it out for its default, \[\]$"),
        ("sampling=null", "it must be a mapping of keys; leave it out for its defaults$"),
        ("eval=false", "eval is false; it must be a mapping of keys; null does without$"),
        ("student.lora=false", "student.lora is false; it must be a mapping of keys; null does without$"),
        ("student.lora.alpha=0", "alpha is 0; it must be above 0"),
        ("student.lora.alpha=nan", "alpha is nan; it must be above 0 and finite"),
        ("student.lora.dropout=-0.1", r"dropout is -0.1; it must lie in \[0, 0.99\]"),
        ("student.lora.dropout=1.0", r"it must lie in \[0, 0.99\]"),
        ("student.lora.target_modules=q_proj", "it must be one of all-linear or a list of strings or null"),
        ("student.lora.target_modules=[all-linear]", "write target_modules: all-linear, without a list"),
        ("student.lora.target_modules=[]", r"target_modules is \[\]; null takes every linear layer"),
        ("train.eps=0", "eps is 0; it must be above 0$"),
        ("null=1", "null: unknown key"),
        ("true=1", "true: unknown key"),
        ("train.betas=1", "train.betas is 1; it must be a list of 2 numbers$"),
        ("loggers=3", "loggers is 3; it must be a list of strings$"),
        ("eval={every: often}", "eval.every is 'often'; it must be a whole number or null$"),
    ],
)
def test_values_are_refused_in_the_words_of_a_recipe(tmp_path: Path, override: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        load_recipe(write_recipe(tmp_path, **distillation(tmp_path, eval={"every": 1})), [override])


def test_all_linear_is_a_value_of_target_modules(tmp_path: Path) -> None:
    """As peft spells it."""
    recipe = load_recipe(write_recipe(tmp_path), ["student.lora.target_modules=all-linear"])
    assert recipe.student.lora is not None
    assert recipe.student.lora.target_modules == "all-linear"


def test_yaml_is_read_as_other_tools_read_it(tmp_path: Path) -> None:
    plain = write_recipe(tmp_path).read_text()
    path = tmp_path / "traps.yaml"
    path.write_text(
        plain.replace("\n  lr: 0.003", "\n  lr: 1e-3").replace(
            "\n  steps: 6", "\n  steps: 010\n  <<: &shared {eps: 1e-7}"
        )
        + "eval: {every: 1e1, sampling: {top_p: .5, <<: {temperature: 0.5, top_p: 1}}}\n"
    )
    recipe = load_recipe(path)
    assert (recipe.train.lr, recipe.train.steps, recipe.train.eps) == (1e-3, 10, 1e-7)
    assert recipe.eval is not None
    assert recipe.eval.sampling is not None
    assert (recipe.eval.every, recipe.eval.sampling.temperature, recipe.eval.sampling.top_p) == (10, 0.5, 0.5)
    # a mapping without a type of its own has numbers too, and names that look like numbers stay names
    values = {"a": 1e-5, "b": "1e5", "c": "010", "d": "08", "e": "1:30", "f": 7}
    (tmp_path / "written.yaml").write_text(config.write_yaml(values))
    assert config.read_yaml(tmp_path / "written.yaml") == values


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n\tsteps: 2\n", "at line 2, column 1; indent with spaces, not with tabs$"),
        ("train:\n  steps: 2\n  steps: 3\n", "the key 'steps' stands twice at line 3, column 3"),
        ("train:\n  <<: {steps: 2}\n  <<: {steps: 3}\n", "the key '<<' stands twice"),
        ("a: " + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("train: {steps: 1:30}", "train.steps is '1:30'; it must be a whole number"),
        ("1: 2", "^1: unknown key"),
        ("# caf\xe9", "is not text in UTF-8"),
    ],
)
def test_traps_of_yaml_are_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=words):
        load_recipe(path)
    with pytest.raises(RecipeError, match=r"is a directory, and a recipe is a file; did you mean .*recipe.yaml\?$"):
        load_recipe(tmp_path)


def test_an_evaluation_on_one_file_is_one_key(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"q": "1+1", "a": "2"}\n')
    (tmp_path / "held.jsonl").write_text('{"q": "2+2", "a": "4"}\n{"q": "3+3", "a": "6"}\n')
    task = {"type": "jsonl", "path": str(tmp_path / "train.jsonl"), "prompt_field": "q", "reference_field": "a"}
    task |= {"limit": 1, "template": "Add {prompt}"}
    path = write_recipe(tmp_path, **distillation(tmp_path, task=task))
    recipe = load_recipe(path, [f"eval.path={tmp_path / 'held.jsonl'}"])
    prompts = recipe.held_out.prompts(recipe.eval.split)  # type: ignore[union-attr]
    assert [(prompt.reference, (prompt.messages or ())[-1]["content"]) for prompt in prompts] == [
        (("4",), "Add 2+2"),
        (("6",), "Add 3+3"),
    ]
    with pytest.raises(RecipeError, match="eval.path and eval_task are both given"):
        load_recipe(path, ["eval.path=x", "eval_task={type: arithmetic}"])
    with pytest.raises(RecipeError, match="write a section `eval_task"):
        load_recipe(write_recipe(tmp_path, **distillation(tmp_path)), ["eval.path=x"])


def test_a_greedy_student_cannot_learn_from_its_samples(tmp_path: Path) -> None:
    changes = distillation(tmp_path, sampling={"temperature": 0, "max_new_tokens": 8})
    with pytest.raises(RecipeError, match="sampling.temperature is 0"):
        parse(tmp_path, **changes)


def test_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-5 as a text; a recipe means the number."""
    path = write_recipe(tmp_path)
    recipe = load_recipe(path, ["train.lr=1e-5", "train.betas=[0.9, 0.99]"])
    assert recipe.train.lr == 1e-5
    assert recipe.train.betas == (0.9, 0.99)


def test_overrides(tmp_path: Path) -> None:
    changes = distillation(tmp_path, method={"type": "topk", "k": 8})
    path = write_recipe(tmp_path, **changes)
    assert load_recipe(path, ["method.k=3"]).method == TopK(k=3)
    assert load_recipe(path, ["method={type: gkd, beta: 0}"]).method == GKD(beta=0.0)
    assert load_recipe(path, ["eval.problems=null", "eval.every=2"]).eval.problems is None  # type: ignore[union-attr]
    for bad, words in {
        "method.k": "KEY=VALUE",
        "method.kk=3": "method.kk: unknown key",
        "train.steps.a=1": "not a section",
        "method.k=[": "not valid YAML",
    }.items():
        with pytest.raises(RecipeError, match=words):
            load_recipe(path, [bad])


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(RecipeError, match="'seed' stands twice.*line 2"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["a: [", "- 1\n- 2\n", "just words"])
def test_what_is_no_recipe(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match="bad.yaml"):
        load_recipe(path)


def test_the_resolved_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = parse(tmp_path, **distillation(tmp_path, eval={"every": 2}))
    text = config.write_yaml(config.dump(recipe))
    again = config.parse(Recipe, yaml.safe_load(text))
    assert again == recipe
    assert config.changes(config.dump(recipe), config.dump(again)) == {}
    assert "micro_batch_tokens: null" in text


def found_or_missing(recipe: Recipe) -> bool:
    """Whether a dry run finds nothing wrong, or nothing but a file or model that is not there."""
    try:
        return bool(check(recipe))
    except RecipeError as error:
        return "there is no file" in str(error) or "no model directory at" in str(error)


FILES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("path", [path for path in FILES if path.stem == "grid"], ids=lambda path: path.parent.name)
def test_every_claim_of_the_project_can_be_decided(path: Path, tmp_path: Path) -> None:
    """Each cell is a recipe of its own, the contrasts name rows that there are, and the models that are read are made."""
    base, claim = config.read_yaml(path.parent / "run.yaml"), config.read_yaml(path.parent / "claim.yaml")
    cells = Cells(read_grid(path, base), base, tmp_path)
    combinations = cells.grid.combinations()
    assert len(cells.tuning) == len(cells.grid.tunings()) * len(combinations) * bool(cells.grid.tune)
    rows = {combination.name for combination in combinations} | set(claim.get("evaluated", {}))
    assert {contrast[side] for contrast in claim["contrasts"] for side in ("more", "less")} <= rows
    made = {f"runs/evidence/{name}/student" for name in claim["models"]}
    made |= {f"runs/evidence/{name}" for name in claim.get("merged", {})}
    read = re.findall(r"runs/evidence/[\w/-]+/student", path.read_text() + (path.parent / "run.yaml").read_text())
    assert {*read, *claim.get("evaluated", {}).values()} <= made
    assert all((path.parents[1] / f"{name}.yaml").is_file() for name in claim["models"])


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.stem not in ("grid", "claim")], ids=lambda path: path.stem
)
def test_every_recipe_of_the_project_parses(path: Path) -> None:
    recipe = load_recipe(path)
    if path.parent.name == "recipes":
        assert check(recipe)
        return
    # these go on from another run or read files beside the project, and say which of them is not there yet
    assert found_or_missing(recipe)


def run(*arguments: str) -> tuple[int, str]:
    """Exit code and the sentence, as the command line gives them."""
    result = CliRunner().invoke(app, list(arguments))
    if result.exception is not None and not isinstance(result.exception, SystemExit | UnderstudyError):
        raise result.exception
    return result.exit_code, result.output + str(result.exception or "")


def jsonl_task(folder: Path, rows: str, **keys: Any) -> dict[str, Any]:
    file = folder / "data.jsonl"
    file.write_text(rows)
    return {"type": "jsonl", "path": str(file), "prompt_field": "q", "solution_field": "a", "chat": False} | keys


GOOD_ROW = '{"q": "1+2:", "a": "3"}\n'


@pytest.mark.parametrize(
    ("rows", "keys", "words"),
    [
        (GOOD_ROW + '{"q": \n', {}, r"data.jsonl:2: not a line of JSON"),
        (GOOD_ROW + '{"x": 1}\n', {}, r"data.jsonl:2: no field 'q'"),
        ("", {}, "data.jsonl is empty"),
        (GOOD_ROW, {"solution_field": None}, "imitates solutions, but task.solution_field"),
        (GOOD_ROW, {"path": "nowhere/else.jsonl"}, "there is no folder nowhere"),
        (GOOD_ROW, {"chat": True}, "no chat template"),
    ],
)
def test_bad_data_is_named_by_file_and_line(tmp_path: Path, rows: str, keys: dict[str, Any], words: str) -> None:
    task = jsonl_task(tmp_path, rows, **keys)
    model = save_tiny_model(tmp_path / "model", seed=0)
    recipe = config.parse(Recipe, tiny_recipe(tmp_path, task=task) | {"student": {"model": model}})
    with pytest.raises((RecipeError, DataError), match=words):
        check(recipe)
    assert not (tmp_path / "run").exists()


def test_tokenizers_that_differ_are_named_token_by_token(tmp_path: Path) -> None:
    """Peers 13: equal size is not equal vocabulary."""
    changes = distillation(tmp_path)
    changes["teacher"] = {"type": "local", "model": save_tiny_model(tmp_path / "other", seed=0, family="chain")}
    with pytest.raises(VocabularyError, match="the tokenizers differ in .* for the student and .* for the teacher"):
        check(parse(tmp_path, **changes))


def test_a_model_directory_without_weights(tmp_path: Path) -> None:
    changes = distillation(tmp_path)
    (tmp_path / "teacher" / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="teacher.*model.safetensors"):
        check(parse(tmp_path, **changes))


def test_no_eos(tmp_path: Path) -> None:
    changes = distillation(tmp_path)
    import json

    file = tmp_path / "student" / "tokenizer_config.json"
    file.write_text(
        json.dumps({key: value for key, value in json.loads(file.read_text()).items() if key != "eos_token"})
    )
    with pytest.raises(VocabularyError, match="no EOS"):
        check(parse(tmp_path, **changes))


def test_a_run_directory_that_exists(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "something").write_text("mine")
    code, text = run("train", str(path))
    assert code != 0
    assert "exists and is not empty" in text
    assert sorted(item.name for item in (tmp_path / "run").iterdir()) == ["something"]


def test_prompts_longer_than_the_budget(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, train={"max_prompt_tokens": 3})
    code, text = run("train", str(path))
    assert code != 0
    assert "longer than train.max_prompt_tokens (3)" in text
    assert not (tmp_path / "run").exists()


def test_resume_with_another_recipe_lists_the_keys(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, train={"steps": 1})
    assert run("train", str(path))[0] == 0
    code, text = run("train", str(path), "train.lr=0.5", "train.keep_last=1", "--resume")
    assert code != 0
    assert "train.lr was 0.003, is 0.5" in text
    assert "keep_last" not in text


def test_resume_without_a_run(tmp_path: Path) -> None:
    code, text = run("train", str(write_recipe(tmp_path)), "--resume")
    assert code != 0
    assert "no run to resume" in text


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    import safetensors.torch

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    from understudy import run
    from understudy.trainer.console import Console

    with pytest.raises(CheckpointError, match=r"cannot write .*step_000001.*free space"):
        run.train(parse(tmp_path, train={"steps": 1}), console=Console(quiet=True))
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_a_dry_run_finds_nothing_to_resume(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    code, text = run("train", str(path), "--dry-run", "--resume")
    assert code
    assert "there is no run to resume" in text
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(path.read_text())
    assert run("train", str(path), "--dry-run", "--resume")[0] == 0
    code, text = run("train", str(path), "train.lr=1", "--dry-run", "--resume")
    assert code
    assert "train.lr was 0.003, is 1" in text


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, **distillation(tmp_path, eval={"split": "test"}))
    before = sorted(tmp_path.rglob("*"))
    code, text = run("train", str(path), "--dry-run")
    assert code == 0
    assert "nothing was loaded or written" in text
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("targets", [None, "all-linear", ["q_proj", "mlp.up_proj"]])
def test_a_dry_run_finds_the_layers_for_lora(tmp_path: Path, targets: Any) -> None:
    assert check(parse(tmp_path, student={"lora": {"target_modules": targets}}))


def test_a_warm_up_longer_than_the_run_is_told(tmp_path: Path) -> None:
    recipe = parse(tmp_path, train={"steps": 10, "warmup_steps": 40, "lr": 1e-4})
    assert any("only reaches 2.5e-05 of 0.0001" in line for line in check(recipe))


def test_a_run_directory_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(tmp_path, run_dir="~/runs/x").run_dir == str(tmp_path / "runs" / "x")


def test_an_override_of_thousands_of_dots(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nested too deeply"):
        load_recipe(write_recipe(tmp_path), [f"{'a.' * 5000}b=1"])


def test_half_a_tokenizer(tmp_path: Path) -> None:
    for name, text in {"vocab.json": "{}", "merges.txt": ""}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match="no tokenizer_config.json that says which tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_loading_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    from understudy import run as runs
    from understudy.cli.app import main

    monkeypatch.setattr(runs, "assemble", lambda *_: signal.raise_signal(number))
    monkeypatch.setattr("sys.argv", ["understudy", "train", str(write_recipe(tmp_path))])
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, *ENDING)}
    # tests that run under nohup or in the background of a shell ignore them
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip().startswith("stopped by a signal")
    assert not (tmp_path / "run").exists()


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """2 for bad input, one line on stderr, no traceback."""
    from understudy.cli.app import main

    monkeypatch.setattr("sys.argv", ["understudy", "train", str(tmp_path / "no.yaml")])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no recipe")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("train r.yaml --learning-rate 1e-5", "no option --learning-rate; .*KEY=VALUE.*; the key is train.lr"),
        ("train r.yaml --train.lr=1e-5", "the key is train.lr"),
        ("sample r.yaml --temperature 1", "the key is sampling.temperature"),
        ("eval r.yaml --steps 3", "train.steps"),
        ("train r.yaml --dryrun", "--dry-run"),
        ("train r.yaml --gibberish", "No such option: --gibberish"),
        ("methods --learning-rate 1", "No such option: --learning-rate"),
    ],
)
def test_an_option_that_is_a_key_gets_the_key(options: str, words: str) -> None:
    code, text = run(*options.split())
    assert code != 0
    assert re.search(words, text), text


def test_methods_and_init(tmp_path: Path) -> None:
    code, text = run("methods")
    assert code == 0
    assert all(name in text for name in ("opd", "gkd", "topk", "sft"))
    assert "direction" in run("methods", "topk")[1]
    assert "forward, reverse" in run("methods", "topk")[1]
    assert "did you mean 'gkd'" in run("methods", "gkdd")[1]
    path = tmp_path / "mine.yaml"
    assert run("init", str(path), "--student", "a/b", "--teacher", "c/d")[0] == 0
    recipe = load_recipe(path)
    assert (recipe.student.model, recipe.teacher.model, recipe.run_dir) == ("a/b", "c/d", "runs/mine")  # type: ignore[union-attr]
    assert "exists" in run("init", str(path))[1]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"student": {"build": {"architecture": "llama", "hiden_size": 3}}},
            "'hiden_size' is unknown for llama; did you mean",
        ),
        ({"student": {"build": {"architecture": "llama", "hidden_size": "x"}}}, "'hidden_size' is 'x'"),
        ({"device": "cpu:x"}, "device is 'cpu:x'"),
        ({"run_dir": "$HOME/run"}, "variables are not replaced"),
        ({"train": {"steps": 10**12}}, "train: steps is 1,000,000,000,000; a run has at most"),
        (
            {"student": {"attn_implementation": "flash_attention2"}},
            "student.attn_implementation is .*did you mean 'flash_attention_2'",
        ),
        ({"student": {"attn_implementation": "flash_attention_3"}}, "the package flash-attn-3 is not installed"),
        (
            {"student": {"lora": {"target_modules": ["q_proj", "k_prj"]}}},
            "lora.target_modules names 'k_prj', .* did you mean 'k_proj'",
        ),
        ({"rollout": {"type": "vllm", "launch": {"python": "python3"}}}, "python3 has no package vllm"),
        ({"student": {"tokenizer": "./nowhere"}}, "no model directory at './nowhere'"),
        (
            {
                "eval": {"split": "test"},
                "eval_task": {"type": "jsonl", "path": "DATA", "test_path": "DATA", "prompt_field": "q"},
            },
            "no chat template",
        ),
    ],
)
def test_a_dry_run_finds_it(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    data = tmp_path / "chat.jsonl"
    data.write_text('{"q": "1+1"}\n')
    if "eval_task" in changes:
        changes = changes | {"eval_task": {**changes["eval_task"], "path": str(data), "test_path": str(data)}}
    with pytest.raises(UnderstudyError, match=words):
        check(parse(tmp_path, **changes))


@pytest.mark.parametrize(
    "changes", [{"sampling": {"max_new_tokens": 64}}, {"eval": {"sampling": {"max_new_tokens": 64}}}]
)
def test_limits_are_found_before_anything_is_written(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_recipe(tmp_path, **distillation(tmp_path, **changes))
    code, text = run("train", str(path))
    assert code != 0
    assert "64 positions" in text
    assert not (tmp_path / "run").exists()
    dry_code, dry_text = run("train", str(path), "--dry-run")
    assert (dry_code, "64 positions" in dry_text) == (code, True)


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_a_dry_run_measures_prompts_until_one_fits(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"student": {"tokenizer": save_tiny_model(tmp_path / "model", seed=0)}}
    for name, numbers in {"one fits": [9] * 20 + [1], "none fits": [9] * 20}.items():
        data = tmp_path / f"{name}.jsonl"
        data.write_text("".join(json.dumps({"q": "1+" * number + "1", "a": "1"}) + "\n" for number in numbers))
        task = {"type": "jsonl", "path": str(data), "prompt_field": "q", "solution_field": "a", "chat": False}
        changes |= {"task": task}
        if kind == "evaluation":
            del changes["task"]
            changes |= {"eval": {"problems": None}, "eval_task": task | {"test_path": str(data)}}
        recipe = parse(tmp_path, **changes, train={"max_prompt_tokens": 12})
        if name == "one fits":
            check(recipe)
            continue
        with pytest.raises(DataError, match=rf"all 20 {kind} prompts are longer than train.max_prompt_tokens \(12\)"):
            check(recipe)


@pytest.mark.parametrize("name", ["file", "file/run", "/proc/run", "x" * 300])
@pytest.mark.parametrize(
    "command", ["train", "train --dry-run", "eval --out", "sample --out", "record --out", "compare"]
)
def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path, name: str, command: str) -> None:
    (tmp_path / "file").write_text("")
    folder = str(tmp_path / name)
    changes = {"run_dir": folder if command.startswith("train") else str(tmp_path / "run"), "eval": {"problems": 1}}
    path = write_recipe(tmp_path, **distillation(tmp_path, method={"type": "opd"}, **changes))
    before = sorted(tmp_path.iterdir())
    words = command.split()
    if words[-1] == "--out":
        words.append(f"{folder}/x" if words[0] == "sample" else folder)
    if command == "compare":
        words += ["--vary", "train.lr=1e-3,1e-4", "--dry-run", "--out", folder]
    code, text = run(words[0], str(path), *words[1:])
    assert code != 0
    key = "run_dir" if words[0] == "train" else "--out"
    assert re.search(rf"{key} .*cannot be written to \(.*\); choose another directory", text, re.DOTALL), text
    assert sorted(tmp_path.iterdir()) == before


def test_names_with_special_characters_survive_init(tmp_path: Path) -> None:
    assert run("init", str(tmp_path / "odd.yaml"), "--student", "a: b")[0] == 0
    assert load_recipe(tmp_path / "odd.yaml").student.model == "a: b"


def test_a_model_directory_stands_where_a_run_does(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model", seed=0)
    code, text = run("sample", model, "--prompt", "1+1=")
    assert (code, "1+1=" in text) == (0, True), text
    code, text = run("eval", model, "task.type=arithmetic", "eval.problems=2", "--out", str(tmp_path / "out"))
    assert (code, "avg@1" in text) == (0, True), text
    assert json.loads(next((tmp_path / "out").glob("*.json")).read_text())["num_problems"] == 2
    code, text = run("doctor", model)
    assert (code, "nothing is wrong" in text, "between engine and trainer" in " ".join(text.split())) == (0, True, True)
    for command in ("eval", "sample"):
        code, text = run(command, model)
        assert (code, "which has no task; give one, such as task.type=file" in text) == (1, True), text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_the_doctor_takes_a_run(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, train={"steps": 1})
    assert run("train", str(path))[0] == 0
    code, text = run("doctor", str(tmp_path / "run"))
    assert (code, "nothing is wrong" in text) == (0, True), text


def test_a_teacher_that_nobody_asks_is_left_alone(tmp_path: Path) -> None:
    """So that one line changes the method."""
    changes = distillation(tmp_path, method={"type": "grpo"}, train={"steps": 1, "samples_per_prompt": 2})
    changes["teacher"] = changes["teacher"] | {"model": "org/nothing"}
    path = write_recipe(tmp_path, **changes)
    for arguments in (["--dry-run"], []):
        code, text = run("train", str(path), *arguments)
        assert code == 0, text
        assert "GRPO uses no teacher, so the section teacher is not loaded" in " ".join(text.split())
    assert (tmp_path / "run" / "student" / "config.json").is_file()


INIT_METHODS = ["gkd", "opd", "topk", "eopd", "aopd", "tropd", "grpo", "dapo", "kdrl", "sft", "gopd"]


# the section task is the same for every method, but for solutions, prefixes and rewards
@pytest.mark.parametrize(
    ("method", "source"),
    [(method, "data") for method in INIT_METHODS] + [(method, "task") for method in ("gkd", "tropd", "grpo", "sft")],
)
def test_what_init_writes_can_be_trained(tmp_path: Path, method: str, source: str) -> None:
    """As written: also for a student with few positions and without a chat template."""
    models, mark = distillation(tmp_path), "" if method == "sft" else "#### "
    data = tmp_path / "sums.jsonl"
    rows = [{"question": f"{n}+1=", "answer": f"{mark}{n + 1}"} for n in range(1, 90)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "recipe.yaml"
    given = ["--data", str(data)] if source == "data" else ["--task", "arithmetic"]
    named = ["--student", models["student"]["model"], "--teacher", models["teacher"]["model"]]
    code, text = run("init", str(path), *named, "--method", method, *given)
    assert code == 0, text
    code, text = run("train", str(path), "--dry-run")
    assert code == 0, text
    recipe = load_recipe(path)
    assert recipe.train.compute_dtype == "auto"
    assert [prompt.reference for prompt in recipe.task.prompts("train")[:1]] != [None]
    assert "#" not in str(recipe.task.prompts("train")[0].reference)


def test_init_says_what_it_lacks(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"x": 1, "y": 2}) + "\n")
    path = tmp_path / "recipe.yaml"
    assert "has the fields x, y" in run("init", str(path), "--data", str(data))[1]
    assert "there is no method" in run("init", str(path), "--method", "gdk")[1]
    assert "needs what only you can say" in run("init", str(path), "--task", "mix")[1]
    assert "--task arithmetic reads no --data" in run("init", str(path), "--task", "arithmetic", "--data", str(data))[1]
    data.write_text('{"question": "1+1"}\n')
    assert (
        "grpo needs a reference for each prompt" in run("init", str(path), "--method", "grpo", "--data", str(data))[1]
    )
    assert "sft needs a solution for each prompt" in run("init", str(path), "--method", "sft", "--data", str(data))[1]
    data.write_text("")
    assert "has no rows" in run("init", str(path), "--data", str(data))[1]
    assert "needs what only you can say" in run("init", str(path), "--method", "phases")[1]
    assert "there is no file" in run("init", str(path), "--data", str(tmp_path / "nothing.jsonl"))[1]
    assert not path.exists()
