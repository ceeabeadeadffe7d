"""Problems from files, their wording for a tokenizer, and what is said about files that are wrong."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.runs import assert_same_run, distillation, train
from understudy.errors import DataError, RecipeError
from understudy.tasks import (
    TASKS,
    Arithmetic,
    Hub,
    Jsonl,
    Mix,
    Renderer,
    build_tokenizer,
    num_repeated,
    overlap,
    overlap_message,
)
from understudy.tasks.mix import PartSampling
from understudy.trainer.collect import given_sample
from understudy.types import Author, Prompt, Request

FIXTURES = Path(__file__).parents[1] / "fixtures"
GSM8K = {"prompt_field": "question", "reference_field": "answer", "reference_after": "####", "solution_field": "answer"}


def write(path: Path, rows: Iterable[object]) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(path)


def jsonl(path: Path, rows: Iterable[object], **settings: Any) -> Jsonl:
    return Jsonl(path=write(path, rows), **({"prompt_field": "q"} | settings))


# Files


def test_gsm8k_rows_become_prompts() -> None:
    task = Jsonl(path=str(FIXTURES / "gsm8k.jsonl"), system="Think.", template="{prompt}\nUse \\boxed{}.", **GSM8K)
    task.check_files()
    prompts = task.prompts("train")
    assert len(prompts) == 12
    first = prompts[0]
    assert first.reference == ("18",)
    assert first.solution is not None
    assert first.messages is not None
    assert first.messages[0] == {"role": "system", "content": "Think."}
    assert first.messages[1]["content"].startswith("Janet\u2019s ducks lay 16 eggs per day.")
    assert first.messages[1]["content"].endswith("\nUse \\boxed{}.")
    assert task.grade(first, first.solution).score == 1.0
    assert task.grade(first, "").score == 0.0
    assert len({prompt.id for prompt in prompts}) == 12


def test_the_id_is_that_of_the_problem(tmp_path: Path) -> None:
    """Not of its wording, its place or its row's other fields: randomness and pairing follow it."""
    rows = [{"q": "What is 1 + 1?"}, {"q": "What is 2 + 2?"}]
    plain = jsonl(tmp_path / "a.jsonl", rows).prompts("train")
    worded = jsonl(tmp_path / "a.jsonl", rows[::-1], template="Solve: {prompt}", chat=False).prompts("train")
    assert [prompt.id for prompt in plain] == [prompt.id for prompt in worded][::-1]


def test_nested_fields_messages_numbers_and_teachers(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "6*7?"}],
        "reward_model": {"ground_truth": 42},
        "a.b": "flat",
        "domain": "maths",
    }
    path = tmp_path / "rows.jsonl"
    task = jsonl(
        path,
        [row],
        prompt_field="prompt",
        reference_field="reward_model.ground_truth",
        solution_field="a.b",
        teacher_field="domain",
    )
    (prompt,) = task.prompts("train")
    assert prompt.messages == tuple(row["prompt"])
    assert (prompt.reference, prompt.solution, prompt.teacher) == (("42",), "flat", "maths")


def test_plain_text(tmp_path: Path) -> None:
    (prompt,) = jsonl(tmp_path / "rows.jsonl", [{"q": "1+1="}], chat=False, template="Q: {prompt} {x}").prompts("train")
    assert prompt.text == "Q: 1+1= {x}"
    assert prompt.messages is None


def test_splits_and_limit(tmp_path: Path) -> None:
    rows = [{"q": str(number)} for number in range(10)]
    task = jsonl(tmp_path / "train.jsonl", rows, test_path=write(tmp_path / "test.jsonl", [{"q": "t"}]), limit=3)
    assert [prompt.messages[0]["content"] for prompt in task.prompts("train")] == ["0", "1", "2"]  # type: ignore[index]
    assert len(task.prompts("test")) == 1
    with pytest.raises(RecipeError, match=r"no validation split; give it a source or set task\.validation_share"):
        task.prompts("validation")


def test_a_compressed_file_with_a_byte_order_mark_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress('\ufeff{"q": "\u00fc"}\r\n\r\n{"q": "b"}'.encode()))
    assert len(Jsonl(path=str(path), prompt_field="q").prompts("train")) == 2
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(DataError, match=r"rows\.jsonl\.gz: not a whole gzip file"):
        Jsonl(path=str(path), prompt_field="q", seed=1).prompts("train")


ROW = {"question": "1+1?", "answer": "2", "meta": {"level": 1}}
BAD_LINES: dict[str, tuple[object, str]] = {
    "cut off": ('{"question": "x"', r"rows\.jsonl:2: not a line of JSON"),
    "not utf-8": ("\udcff", r"rows\.jsonl:2: not a line of JSON"),
    "ten thousand brackets": ("[" * 10_000, r"rows\.jsonl:2: not a line of JSON"),
    "a list": ([1, 2], r"rows\.jsonl:2: \[1, 2\] is not a JSON object"),
    "no prompt": ({"questoin": "x"}, r"rows\.jsonl:2: no field 'question'; fields: questoin \(did you mean 'questoin'"),
    "no reference": ({"question": "x", "answers": 1}, r"jsonl:2: no field 'answer'.*did you mean 'answers'"),
    "prompt is a number": (
        {"question": 7, "answer": "1"},
        r"rows\.jsonl:2: field 'question' is 7; it must be a string",
    ),
    "prompt is no chat": ({"question": [{"role": "user"}], "answer": "1"}, r"message 1 \(user\) has the content null"),
    "reference is an object": (
        {"question": "x", "answer": {"value": "1", "aliases": ["one"]}},
        r"rows\.jsonl:2: field 'answer' is {.*}; it must be a string.*name a part of it with a dot: answer\.value",
    ),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(tmp_path: Path, name: str) -> None:
    line, message = BAD_LINES[name]
    path = tmp_path / "rows.jsonl"
    text = line if isinstance(line, str) else json.dumps(line)
    path.write_bytes(f"{json.dumps(ROW)}\n{text}\n".encode("utf-8", "surrogateescape"))
    task = Jsonl(path=str(path), prompt_field="question", reference_field="answer")
    with pytest.raises(DataError, match=message):
        task.prompts("train")
    with pytest.raises(DataError, match=message):
        task.check_files()


def test_a_missing_nested_field_and_mark_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no field 'meta\.levle'.*did you mean 'level'"):
        jsonl(tmp_path / "rows.jsonl", [ROW], prompt_field="question", reference_field="meta.levle").prompts("train")
    with pytest.raises(DataError, match=r"rows\.jsonl:1: field 'answer' does not contain '####'"):
        jsonl(tmp_path / "rows.jsonl", [ROW], **GSM8K).prompts("train")


def test_empty_and_missing_files(tmp_path: Path) -> None:
    empty = jsonl(tmp_path / "empty.jsonl", [" "])
    for call in (lambda: empty.prompts("train"), empty.check_files):
        with pytest.raises(DataError, match=r"empty\.jsonl.*empty; it must hold at least one row"):
            call()
    with pytest.raises(RecipeError, match=r"no file .*emtpy\.jsonl; did you mean 'empty\.jsonl'"):
        Jsonl(path=str(tmp_path / "emtpy.jsonl"), prompt_field="q").check_files()
    with pytest.raises(RecipeError, match="there is no folder"):
        Jsonl(path=str(tmp_path / "no" / "rows.jsonl"), prompt_field="q").check_files()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "no place"}, "must contain {prompt}"),
        ({"system": "x", "chat": False}, "put its text into template"),
        ({"validation_share": 1.0}, "less than 1"),
        ({"validation_share": 0.1, "validation_path": "x"}, "keep one"),
        ({"limit": 0}, "at least 1"),
        ({"reference_after": "####"}, "without reference_field"),
        ({"verifier": "maths"}, "did you mean 'math'"),
    ],
)
def test_settings_that_have_no_meaning(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Jsonl(path="x.jsonl", prompt_field="q", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"family": "adition"},
        {"digits": 0},
        {"family": "chain", "digits": 2},
        {"family": "chain", "ways": True},
        {"operations": 2},
        {"num_solutions": 0},
    ],
)
def test_arithmetic_settings_that_have_no_meaning(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Arithmetic(**settings)


def test_a_folder_of_files_as_a_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", [{"q": "a", "r": "1"}, {"q": "b", "r": "2"}])
    task = Hub(dataset=str(folder), prompt_field="q", reference_field="r")
    task.check_files()
    assert [prompt.reference for prompt in task.prompts("train")] == [("1",), ("2",)]
    with pytest.raises(DataError, match=r"\[train\] row 0: no field 'qq'"):
        Hub(dataset=str(folder), prompt_field="qq").prompts("train")
    with pytest.raises(DataError, match="cannot load split 'dev'"):
        Hub(dataset=str(folder), prompt_field="q", split_train="dev").prompts("train")


def test_a_hub_name_is_checked_without_the_network() -> None:
    Hub(dataset="openai/gsm8k", config="main", prompt_field="question").check_files()
    with pytest.raises(RecipeError, match="no such folder, and it is not a hub name"):
        Hub(dataset="./gsm8k-here", prompt_field="question").check_files()


def test_every_task_has_a_name_and_splits() -> None:
    settings = {
        "arithmetic": {},
        "file": {"path": "x", "prompt_field": "q"},
        "jsonl": {"path": "x", "prompt_field": "q"},
        "hub": {"dataset": "x", "prompt_field": "q"},
        "rows": {"train": "in-memory: 2 rows", "prompt_field": "q"},
        "math": {"dataset": "gsm8k"},
        "choice": {"dataset": "mmlu"},
        "instructions": {"dataset": "ifeval"},
        "code": {"dataset": "humaneval"},
        "calls": {"dataset": "bfcl", "path": "x"},
        "openenv": {"url": "http://127.0.0.1:1"},
        "verifiers": {"taskset": "wordle"},
        "customers": {"dataset": "tau-airline", "path": "x"},
        "qa": {"dataset": "nq"},
        "vision": {"dataset": "geometry3k"},
        "mix": {"parts": {"sums": Arithmetic()}},
    }
    for name, task in TASKS.items():
        assert isinstance(task(**settings[name]).name, str)


def test_a_prompt_of_a_mix_is_graded_by_the_part_that_it_is_of() -> None:
    """Its id begins with the part's name, which therefore holds no separator."""
    task = Mix(parts={"a.b": Arithmetic(digits=1), "chain": Arithmetic(family="chain")})
    for prompt in task.prompts("train")[:4]:
        assert task.grade(prompt, f"#{prompt.reference[0]}").right
    with pytest.raises(ValueError, match=r"a part is named 'a/b'; names have no '/'"):
        Mix(parts={"a/b": Arithmetic()})


def parts_of(task: Mix, split: str) -> str:
    return "".join(str(task.part_of(prompt)) for prompt in task.prompts(split))  # type: ignore[arg-type]


def numbered(folder: Path, **sizes: int) -> dict[str, Jsonl]:
    """A part of so many prompts for each name, the same for training and test."""
    rows = {
        name: write(folder / f"{name}.jsonl", [{"q": f"{name}{i}"} for i in range(num)]) for name, num in sizes.items()
    }
    return {name: Jsonl(path=path, test_path=path, prompt_field="q") for name, path in rows.items()}


def test_parts_alternate_by_their_weights(tmp_path: Path) -> None:
    parts = numbered(tmp_path, a=9, b=5)
    assert parts_of(Mix(parts=parts), "train") == "ab" * 5
    assert parts_of(Mix(parts=parts, weights={"a": 3, "b": 1}), "train") == "aaba" * 3
    assert parts_of(Mix(parts=parts, weights={"a": 0.75, "b": 0.25}), "train") == "aaba" * 3
    assert parts_of(Mix(parts=parts, weights={"a": 2, "b": 3}), "train") == "babab"
    task = Mix(parts=parts, weights={"a": 3, "b": 1})
    said = [prompt.messages[0]["content"] for prompt in task.prompts("train")]  # type: ignore[index]
    assert said == ["a0", "a1", "b0", "a2", "a3", "a4", "b1", "a5", "a6", "a7", "b2", "a8"]


def test_a_part_ends_its_responses_as_it_says(tmp_path: Path) -> None:
    parts = numbered(tmp_path, a=4, b=4)
    task = Mix(parts=parts, sampling={"b": PartSampling(max_new_tokens=3, stop=("7",))})
    first, second = task.prompts("train")[:2]
    assert (first.max_new_tokens, first.stop, first.room(10)) == (None, (), 10)
    assert (second.max_new_tokens, second.stop, second.room(10), second.room(2)) == (3, ("7",), 3, 2)
    with pytest.raises(ValueError, match="sampling is for 'c', which is no part"):
        Mix(parts=parts, sampling={"c": PartSampling(max_new_tokens=3)})
    for wrong, match in (({"max_new_tokens": 0}, "max_new_tokens is 0"), ({"stop": ("",)}, "an empty string")):
        with pytest.raises(ValueError, match=match):
            PartSampling(**wrong)


MIX = {
    "type": "mix",
    "parts": {"sums": {"type": "arithmetic", "digits": 1}, "long": {"type": "arithmetic", "digits": 2}},
}


@pytest.mark.slow
def test_a_part_that_is_cut_earlier_has_the_beginning_of_the_same_responses(tmp_path: Path) -> None:
    """With equal limits the run is that without them, bit for bit; with a shorter one the samples of its part alone are cut."""
    changes = distillation(tmp_path, task=MIX, sampling={"max_new_tokens": 12}, train={"save_samples_every": 1})
    plain = train(tmp_path / "plain", **changes)
    equal = {name: {"max_new_tokens": 12} for name in MIX["parts"]}
    same = train(tmp_path / "same", **changes | {"task": MIX | {"sampling": equal}})
    assert_same_run(plain, same)
    cut = train(tmp_path / "cut", **changes | {"task": MIX | {"sampling": {"long": {"max_new_tokens": 4}}}})
    whole, shorter = (
        {row["prompt_id"]: row["tokens"]["text"] for row in lines(run / "samples/step_000001.jsonl")}
        for run in (plain, cut)
    )
    assert whole.keys() == shorter.keys()
    for name, texts in whole.items():
        assert shorter[name] == (texts[:4] if name.startswith("long/") else texts)
    assert any(len(texts) > 4 for name, texts in whole.items() if name.startswith("long/"))
    with pytest.raises(RecipeError, match=r"max_new_tokens of 64, more than sampling\.max_new_tokens 12"):
        train(tmp_path / "more", **changes | {"task": MIX | {"sampling": {"long": {"max_new_tokens": 64}}}})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_left_of_a_part_is_measured_on_and_not_trained_on(tmp_path: Path) -> None:
    task = Mix(parts=numbered(tmp_path, a=2, b=4, c=3))
    assert parts_of(task, "train") == "abcabc"
    assert parts_of(task, "test") == "abcabcbbc"
    prompts = task.prompts("test")
    assert len({prompt.id for prompt in prompts}) == 9
    assert [prompt.id for prompt in prompts[:6]] == [prompt.id for prompt in task.prompts("train")]


def test_weights_that_have_no_meaning(tmp_path: Path) -> None:
    parts = numbered(tmp_path, a=2, b=4)
    for weights, message in (
        ({"a": 1}, "give each a weight"),
        ({"a": 1, "b": 0}, "must be above 0"),
        ({"a": 1, "b": float("inf")}, "must be above 0"),
        ({"a": 0.123456, "b": 1}, "make a round of"),
    ):
        with pytest.raises(ValueError, match=message):
            Mix(parts=parts, weights=weights)
    with pytest.raises(DataError, match="the part a has 2 prompts, of which one round of the mix takes 3"):
        Mix(parts=parts, weights={"a": 3, "b": 1}).prompts("train")


def test_a_prompt_without_reference_cannot_be_graded(tmp_path: Path) -> None:
    task = jsonl(tmp_path / "rows.jsonl", [{"q": "a"}])
    with pytest.raises(DataError, match=r"no reference to grade with; set task\.reference_field"):
        task.grade(task.prompts("train")[0], "1")


# Overlap


def test_overlap_is_found_in_spite_of_wording(tmp_path: Path) -> None:
    train = jsonl(tmp_path / "train.jsonl", [{"q": "What  is 1 + 1?"}, {"q": "b"}]).prompts("train")
    held_out = jsonl(
        tmp_path / "test.jsonl", [{"q": "what is 1 + 1? "}, {"q": "c"}], template="Q: {prompt}", chat=False
    ).prompts("train")
    found = overlap(train, held_out)
    assert found == [held_out[0].id]
    assert overlap(train, held_out[1:]) == []
    assert overlap(train[1:], held_out) == []
    assert "1 of 2 evaluation prompts are also in the training data" in overlap_message(found, 2)
    assert overlap_message([], 2).startswith("none of the 2")


def test_the_same_text_is_found_without_equal_ids() -> None:
    assert overlap([Prompt("a", text="Say hi")], [Prompt("b", text="say  HI")]) == ["b"]
    chat = Prompt("c", messages=({"role": "system", "content": "x"}, {"role": "user", "content": "say hi"}))
    assert overlap([Prompt("a", text="Say hi")], [chat]) == ["c"]


def test_repeated_prompts_are_counted_and_have_their_own_ids(tmp_path: Path) -> None:
    prompts = jsonl(tmp_path / "rows.jsonl", [{"q": "a"}, {"q": "A "}, {"q": "b"}, {"q": "a"}]).prompts("train")
    assert len({prompt.id for prompt in prompts}) == 4
    assert num_repeated(prompts) == 2


def test_arithmetic_does_not_overlap_itself() -> None:
    task = Arithmetic("chain", operations=2)
    assert overlap(task.prompts("train"), task.prompts("test")) == []


def test_known_overlap_of_dapo_and_math500_is_found(shared: Path) -> None:
    """The data set's own notes count 7 problems by letters and digits alone; one of them differs in an operator's sign."""
    settings = {"prompt_field": "problem", "reference_field": "answer"}
    train = Jsonl(path=str(shared / "data/dapo_math_17k/train.jsonl.gz"), **settings).prompts("train")
    held_out = Jsonl(path=str(shared / "data/math500/test.jsonl"), **settings).prompts("train")
    assert len(train) == 17_176
    assert len(overlap(train, held_out)) == 6


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("Let $x^{2}=4$. Find $x$.", True),
        ("let \\(x^2 = 4\\), find x!", True),
        ("Let $x^3=4$. Find $x$.", False),
        ("Let $x^2=-4$. Find $x$.", False),
        ("Let $x^2=.4$. Find $x$.", False),
        ("Let $x^2=0.4$. Find $x$.", False),
    ],
)
def test_typesetting_is_no_difference_and_signs_are(text: str, same: bool) -> None:
    assert bool(overlap([Prompt("a", text="Let $x^2=4$. Find $x$.")], [Prompt("b", text=text)])) == same


# Tokens


def tiny_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """One token per word."""
    words = ["<unk>", "<s>", "</s>", *"abcdef"]
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if settings.pop("template", False):
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>", **settings
    )


def test_text_keeps_its_bos_and_loses_an_eos_that_nobody_wrote() -> None:
    tokenizer = tiny_tokenizer(template=True)
    assert Renderer(tokenizer).start(Prompt("p", text="a b")).tolist() == [1, 3, 4]
    assert Renderer(tokenizer).start(Prompt("p", text="")).tolist() == [1]
    assert Renderer(tokenizer).response(Prompt("p", text="a"), "c d").tolist() == [5, 6, 2]


def test_a_prompt_is_never_empty() -> None:
    with pytest.raises(DataError, match="prompt p has no tokens"):
        Renderer(tiny_tokenizer()).start(Prompt("p", text=""))


def test_messages_need_a_template_that_takes_them() -> None:
    prompt = Prompt("p", messages=({"role": "user", "content": "a"},))
    with pytest.raises(RecipeError, match=r"has no chat template, and prompt p is a chat; set task\.chat to false"):
        Renderer(tiny_tokenizer()).start(prompt)
    refusing = tiny_tokenizer(chat_template="{{ raise_exception('no system role') }}")
    with pytest.raises(DataError, match="refuses prompt p: no system role"):
        Renderer(refusing).start(prompt)


def test_text_of_another_alphabet_is_named() -> None:
    with pytest.raises(DataError, match="cannot encode 'tom has'"):
        Renderer(build_tokenizer("addition")).start(Prompt("p", text="tom has"))


def test_a_solution_is_a_sample() -> None:
    task = Arithmetic()
    tokenizer = build_tokenizer("addition")
    prompt = task.prompts("train")[0]
    renderer = Renderer(tokenizer)
    sample = given_sample(renderer, Request(prompt, 3, renderer.start(prompt)))
    assert tokenizer.decode(sample.token_ids[: sample.prompt_length]) == prompt.text
    assert tokenizer.decode(sample.response_ids[:-1]) == prompt.solution == sample.text
    assert int(sample.token_ids[-1]) == tokenizer.eos_token_id
    assert sample.author.tolist() == [Author.PROMPT] * sample.prompt_length + [Author.TEACHER] * len(
        sample.response_ids
    )
    assert (sample.finish, sample.index, sample.truncated) == ("data", 3, False)
    assert sample.rollout_logprob is not None
    assert bool(sample.rollout_logprob.isnan().all())
    assert sample.token_ids.dtype == torch.int64


def test_a_prompt_without_solution_is_named() -> None:
    with pytest.raises(DataError, match="prompt p has no solution to imitate"):
        given_sample(Renderer(tiny_tokenizer()), Request(Prompt("p", text="a"), 0, torch.tensor([1])))


def test_a_written_eos_is_not_doubled() -> None:
    renderer, prompt = Renderer(tiny_tokenizer()), Prompt("p", text="b")
    assert renderer.response(prompt, "a</s>").tolist() == [3, 2]
    assert renderer.response(prompt, "").tolist() == [2]


@pytest.fixture
def qwen(shared: Path) -> Any:
    return AutoTokenizer.from_pretrained(shared / "tokenizers/qwen")


def test_chat_prompts_are_those_of_the_template(qwen: Any) -> None:
    task = Jsonl(path=str(FIXTURES / "gsm8k.jsonl"), system="Think.", **GSM8K)
    for prompt in task.prompts("train"):
        ids = Renderer(qwen).start(prompt)
        messages = [dict(message) for message in prompt.messages or ()]
        whole = qwen.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids.tolist() == list(whole)
        assert qwen.decode(ids).endswith("<|im_start|>assistant\n")


def test_settings_reach_the_template(qwen: Any) -> None:
    prompt = Prompt("p", messages=({"role": "user", "content": "hi"},))
    plain = qwen.decode(Renderer(qwen).start(prompt))
    quick = qwen.decode(Renderer(qwen, {"enable_thinking": False}).start(prompt))
    assert quick == plain + "<think>\n\n</think>\n\n"


def test_real_solutions_survive_the_tokenizer(qwen: Any) -> None:
    for name in ("gsm8k", "math500"):
        for line in (FIXTURES / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            text = row.get("solution", row["answer"])
            ids = Renderer(qwen).response(Prompt("p", text=""), text)
            assert qwen.decode(ids, skip_special_tokens=True) == text
            assert ids.tolist().count(qwen.eos_token_id) == 1
