"""No secret and no character that steers a terminal in anything that is shown or written; limits of what a recipe may hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.runs import tiny_recipe, write_recipe
from understudy import config
from understudy.engines.vllm.settings import VLLM
from understudy.errors import EngineError, RecipeError
from understudy.http.replies import check_key, check_variable, fill, read_key
from understudy.recipe import Recipe, load_recipe
from understudy.recipe.schema import check_same_recipe
from understudy.text import HIDDEN, is_secret_name, plain_tree, printable, visible, without_secrets

CANARY = "canary-3141592653"


@pytest.mark.parametrize(
    "text",
    [
        "api_key: {}",
        "api-key = {}",
        '{{"hub_token": "{}", "x": 1}}',
        "MY_TOKEN={}",
        "DBPASS: '{} and more'",
        "'dbPassword': \"{} and more\"",
        "--api-key {}",
        "--api-key={} --port 1",
        "['--hf-token', '{}']",
        "args:\n- --api-key\n- {}",
        "Authorization: Bearer {}",
        "rollout.launch.env.ANY={} x",
        "rollout.launch={{type: vllm, env: {{ANY: {}}}}}",
        "https://{}@host/v1",
        "https://me:{}@host/v1",
        "https://me:a/b,{})@host:8000/v1",
        "http://host/v1?k={}&x=1",
        "http://host/v1#{}",
        "http://host/0a1b2c3d4e5f{}/v1",
        "http://host/my-token-{}/v1",
        "wrong key sk-proj-0123456789abcdef{}",
        "x={} of the environment",
    ],
)
def test_a_secret_is_hidden_wherever_it_stands(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_OTHER_PASS", f"{CANARY} of the environment")
    shown = without_secrets(text.format(CANARY))
    assert CANARY not in shown
    assert HIDDEN in shown
    assert without_secrets(shown) == shown
    assert CANARY not in str(EngineError(text.format(CANARY)))


@pytest.mark.parametrize(
    "text",
    [
        "api_key: null, password: '', api_key_env: OPENAI_API_KEY, token_env: TEACHER",
        "HF_TOKEN: '{env:HF_TOKEN}', DBPASS={file:/run/pass}",
        "eos_token: </s> pad_token=<pad> max_new_tokens=512 limit_key: max_completion_tokens pass@4: 0.5",
        "write KEY=VALUE, such as method.k=64, or --vary KEY=V1,V2 (--token-env NAME)",
        "https://huggingface.co/Qwen/Qwen3-0.6B/resolve/main/config.json and http://127.0.0.1:8000/v1/chat/completions",
        "unknown key; the key is train.lr: 5 keys, one token, forward pass: 3",
        "teacher.api_key: unknown key; hub_token: unknown key; rollout.launch.env.HF_TOKEN: that variable is not set",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_no_key_of_a_recipe_is_taken_for_a_secret() -> None:
    names = {place.rpartition(".")[2] for place, _ in config.places(Recipe)}
    # a shell sets these to directories, which are in every path that a run shows
    names = [*names, "PWD", "OLDPWD"]
    assert not [name for name in names if is_secret_name(name)]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[2] / "recipes").rglob("*.yaml")), ids=str)
def test_the_recipes_of_the_project_are_written_as_they_are(path: Path) -> None:
    values = config.read_yaml(path)
    assert plain_tree(values) == values


def test_a_tree_without_secrets() -> None:
    env = {
        "HF_TOKEN": CANARY,
        "ANY": CANARY,
        "CUDA_VISIBLE_DEVICES": "{server}",
        "A": "{env:B}",
        "N": "4",
        "B": {"c": CANARY},
    }
    values = {
        "launch": {"env": env, "args": ["--api-key", CANARY, "--max-model-len", "4096", f"--hf-token={CANARY}"]},
        "template_kwargs": {"api_key": CANARY, "eos_token": "</s>", "secrets": [CANARY], "password": {"a": CANARY}},
        "task": {
            "env": {"taskset": {"size": 4, "words": [CANARY]}, "client": {"headers": {"X-Who": CANARY}}},
            "extra": {"headers": {"Cookie": CANARY, "X-Any": CANARY}},
        },
        "note": f"https://me:{CANARY}@host",
        "seed": 3,
        CANARY + "?": [None, True, 0.5],
    }
    written = plain_tree(values)
    assert plain_tree(written) == written
    assert str(written).count(CANARY) == 1, "only the key that is named like nothing"
    assert written["launch"]["env"] | {"HF_TOKEN": 0, "ANY": 0, "B": 0} == env | {"HF_TOKEN": 0, "ANY": 0, "B": 0}
    assert written["task"]["env"]["taskset"]["size"] == 4
    assert written["launch"]["args"][2:4] == ["--max-model-len", "4096"]
    assert (written["template_kwargs"]["eos_token"], written["seed"]) == ("</s>", 3)


def launched(**launch: Any) -> VLLM:
    section = {"type": "vllm", "launch": {"python": "python"} | launch}
    recipe = config.parse(Recipe, tiny_recipe(Path("runs"), rollout=section))
    assert isinstance(recipe.rollout, VLLM)
    return recipe.rollout


@pytest.mark.parametrize(
    ("launch", "words"),
    [
        ({"env": {"HF_TOKEN": CANARY}}, "env.HF_TOKEN holds a secret"),
        ({"env": {"DBPASS": CANARY}}, "env.DBPASS holds a secret"),
        ({"env": CANARY}, "rollout.launch.env is"),
        ({"env": {"ANY": {"x": CANARY}}}, "rollout.launch.env"),
        ({"args": ["--api-key", CANARY]}, "args holds a key"),
        ({"args": [f"--api-key={CANARY}"]}, "args holds a key"),
        ({"command": ["env", f"HF_TOKEN={CANARY}", "vllm", "{port}"]}, "command holds a key"),
    ],
)
def test_a_recipe_holds_no_secret_for_a_server(launch: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words) as raised:
        launched(**launch)
    assert CANARY not in str(raised.value)


def test_secrets_of_a_server_come_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text(f"{CANARY}-of-a-file\n")
    env = {
        "HF_TOKEN": "{env:OTHER}",
        "WANDB_API_KEY": f"{{file:{tmp_path / 'key'}}}",
        "CUDA_VISIBLE_DEVICES": "{server}",
    }
    section = launched(env=env)
    monkeypatch.setattr(
        "subprocess.run", lambda *_, **__: pytest.fail("nothing is tried before the variables are there")
    )
    with pytest.raises(RecipeError, match=r"rollout.launch.env.HF_TOKEN: the environment variable OTHER is not set"):
        section.check()
    monkeypatch.setenv("OTHER", CANARY)
    assert section.launch is not None
    filled = section.launch.filled(3)
    assert filled == {"HF_TOKEN": CANARY, "WANDB_API_KEY": f"{CANARY}-of-a-file", "CUDA_VISIBLE_DEVICES": "3"}
    assert CANARY not in without_secrets(f"the server said {CANARY}-of-a-file and {CANARY}")
    with pytest.raises(RecipeError, match="the file /no/such/file cannot be read"):
        fill("{file:/no/such/file}", "here")


def test_a_key_whose_variable_is_not_set_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_VARIABLE", raising=False)
    with pytest.raises(
        RecipeError, match="the environment variable JUDGE_VARIABLE, which is to hold a key, is not set"
    ):
        check_key("JUDGE_VARIABLE")
    check_key("")
    check_key("JUDGE_VARIABLE", optional="JUDGE_VARIABLE")
    monkeypatch.setenv("JUDGE_VARIABLE", f"{CANARY}-of-a-judge")
    check_key("JUDGE_VARIABLE")
    assert read_key("JUDGE_VARIABLE") not in without_secrets(f"no model for {CANARY}-of-a-judge")


@pytest.mark.parametrize("name", ["hf_AbCdEfGhIjKlMnOp", "hunter2", "sk-proj-1", "AKIAIOSFODNN7EXAMPLE", "A B"])
def test_a_key_in_place_of_the_name_of_its_variable_is_not_shown(name: str) -> None:
    with pytest.raises(ValueError, match="must be the NAME of an environment variable") as raised:
        check_variable(name, "api_key_env")
    assert name not in str(raised.value)


def test_a_recipe_that_a_run_wrote_says_which_value_it_lacks(tmp_path: Path) -> None:
    """Resume compares what is written; whoever starts from the written recipe gives what was hidden again."""
    section = {"type": "vllm", "launch": {"python": "python", "env": {"ANY": "something"}}}
    given = load_recipe(write_recipe(tmp_path, rollout=section))
    path = tmp_path / "run.yaml"
    path.write_text(config.write_yaml(plain_tree(config.dump(given))))
    assert "something" not in path.read_text()
    check_same_recipe(config.parse(Recipe, config.read_yaml(path)), given)
    with pytest.raises(RecipeError, match=r"rollout.launch.env.ANY holds \[hidden\]"):
        load_recipe(path)
    assert load_recipe(path, ["rollout.launch.env.ANY=something"]) == given


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\u200bb\ufeff", r"a\u200bb\ufeff"),
        ("\u202edlrow", r"\u202edlrow"),
        ("x\U000e0041\U000e0042", r"x\U000e0041\U000e0042"),
        ("a\u200db", r"a\u200db"),
        ("\U0001f468\u200d\U0001f469 \u0928\u092e\u0938\u094d\u200d\u0924\u0947", None),
        ("\x1b[31mred\x1b[0m \x1b]8;;http://x\x07link\x1b]8;;\x07 \x9b2J", "red link 2J"),
        ("line\u2028other", r"line\u2028other"),
        ("\u2764\ufe0f 1\ufe0f\u20e3 \u5170\ufe00", None),
        ("\U0001f600\ufe01\ufe02 a\ufe0f", "\U0001f600\ufe01" + r"\ufe02 a\ufe0f"),
        ("a\U0001d173", r"a\U0001d173"),
    ],
)
def test_characters_that_nobody_sees_are_written_out(text: str, shown: str | None) -> None:
    assert visible(text) == (text if shown is None else shown)
    assert visible(visible(text)) == visible(text)


def test_an_error_steers_no_terminal() -> None:
    assert str(RecipeError("no file \x1b[2J\u202ename")) == r"no file \u202ename"
    assert printable("\x1b]0;owned\x07x") == "x"


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 5,000 values, with those that aliases repeat"),
        (
            "".join(f"key{index}: 1\n" for index in range(20_000)),
            "more than 5,000 values|characters; a recipe has at most",
        ),
        ("a" * 200_001, "has 200,001 characters; a recipe has at most 200,000"),
        ("a: " + "[" * 60 + "]" * 60, "nested too deeply for a recipe, over 50 levels"),
        ("a: &a [1, *a]", r"\*a stands inside what it names at line 1"),
        ("a: &a {b: *a}", r"\*a stands inside what it names"),
        ("a: *b", "undefined alias"),
        ("a: " + "9" * 5_000, "a whole number of more than 64 bits at line 1, column 4"),
        ("a: 0x" + "f" * 5_000, "a whole number of more than 64 bits"),
        ("a: !!int foo", "not of the kind that its tag"),
        ("a: !!bool foo", "not of the kind that its tag"),
        ("a: !!timestamp 2026-13-45", "could not determine a constructor"),
        ("a: !!set {b}", "could not determine a constructor"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("? [a]\n: 1", "unhashable key"),
        ("a: \x07", "unacceptable character"),
    ],
)
def test_more_than_a_recipe_ever_holds_is_refused_before_it_is_built(text: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        config.load(text, "recipe.yaml")


def test_an_alias_counts_as_often_as_it_stands_for() -> None:
    text = "a: &a [1, 2]\nb: [*a, *a]\nc: {<<: {d: *a}}\n"
    assert config.load(text, "x") == yaml.safe_load(text)
    assert config.load("a: 2026-99-99", "x") == {"a": "2026-99-99"}


def test_a_bad_line_is_named_and_not_shown() -> None:
    with pytest.raises(RecipeError, match="at line 1, column") as raised:
        config.load(f"env: {{ANY: '{CANARY}", "recipe.yaml")
    assert CANARY not in str(raised.value)


def test_json_that_is_too_deep_or_too_long_is_a_value_error() -> None:
    for text in ("[" * 100_000 + "]" * 100_000, "9" * 5_000):
        with pytest.raises(ValueError, match="too deeply|limit"):
            config.load_json(text)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "a.",
        "a-",
        "a ",
        "://",
        "http://a",
        "x://a:b",
        "sk-",
        "eyJaaaaaaaaaa-",
        "env={",
        "--a ",
        "\x1b]",
        "key='",
        "a=",
        "\u200d",
    ],
)
def test_a_long_text_takes_time_in_proportion_to_its_length(text: str) -> None:
    """Each would take minutes where every beginning is followed to the end: its length is squared."""
    printable(text * (100_000 // len(text)))
