"""The tasks `calls` and `customers` on the real data: reference answers, and episodes through a real chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.chat_server import ChatServer, says
from tests.integration.test_verbal import CHATML, byte_tokenizer
from tests.runs import BUILD, metric_rows, train
from understudy.environments.play import play
from understudy.environments.tau import UserModel
from understudy.errors import DataError, RecipeError
from understudy.models import build_causal_lm, load_tokenizer, save_hf
from understudy.sandbox import Process
from understudy.tasks import DATASETS, Calls, Customers, Mathematics, Renderer
from understudy.tasks.audit import audit, cases
from understudy.tasks.overlap import num_repeated, overlap
from understudy.types import Author, Prompt, Request, Sample, Sampling

CATEGORIES = {
    "simple_python": 400,
    "live_simple": 258,
    "multiple": 200,
    "parallel": 200,
    "parallel_multiple": 200,
    "irrelevance": 240,
}


def calls(shared: Path, category: str) -> Calls:
    return Calls(dataset="bfcl", path=str(shared / "data" / "bfcl_v4" / f"{category}.jsonl"))


def key(prompt: Prompt) -> str:
    return prompt.id.rpartition("/")[2]


@pytest.mark.parametrize(("category", "num"), CATEGORIES.items())
def test_every_reference_answer_is_right(shared: Path, category: str, num: int) -> None:
    """But for known mistakes; an empty answer and that of another question are wrong."""
    task = calls(shared, category)
    prompts = task.prompts("test")
    assert len(prompts) == num
    golds = [task.gold(prompt)[0] for prompt in prompts]
    wrong = {key(prompt) for prompt, gold in zip(prompts, golds, strict=True) if not task.grade(prompt, gold).right}
    assert wrong <= DATASETS["bfcl"].mistakes.keys()
    assert not any(task.grade(prompt, "").right for prompt in prompts)
    shuffled = [*golds[1:], golds[0]]
    for prompt, gold, other in zip(prompts, golds, shuffled, strict=True):
        # some questions stand twice, and all questions without a function have the same answer
        if gold != other:
            assert not task.grade(prompt, other).right, (prompt.id, other)


@pytest.mark.parametrize("category", ["live_simple", "irrelevance"])
def test_an_audit_finds_known_mistakes_only(shared: Path, category: str) -> None:
    task = calls(shared, category)
    found = audit(task, list(cases(task, task.prompts("test"))))
    assert not found.failed
    # some questions share their accepted call
    wrong = [one for one in found.surprises if one.case.kind != "of another problem"]
    assert len(wrong) == (2 if category == "live_simple" else 0)


def test_rows_of_several_turns_are_refused(shared: Path) -> None:
    with pytest.raises(DataError, match=r"field 'question' has 4 turns, whose calls need simulated services"):
        calls(shared, "multi_turn_base").prompts("test")


@pytest.mark.parametrize(
    ("name", "file", "num"), [("tau-retail", "retail_test", 115), ("tau-airline", "airline_test", 50)]
)
def test_an_audit_plays_the_reference_calls(shared: Path, name: str, file: str, num: int) -> None:
    """Of some rows nothing changes the database: who says and does nothing is wrong there too."""
    task = Customers(dataset=name, test_path=str(shared / "data" / "tau_bench" / f"{file}.jsonl"))
    found = audit(task, list(cases(task, task.prompts("test"))))
    assert found.num_cases["gold"] == found.num_cases["empty"] == num
    assert [one for one in found.surprises if one.case.kind != "of another problem"] == []


def test_the_known_mistakes_are_of_the_data(shared: Path) -> None:
    found = {key(prompt) for category in CATEGORIES for prompt in calls(shared, category).prompts("test")}
    assert DATASETS["bfcl"].mistakes.keys() <= found


def options(arguments: dict[str, list[Any]]) -> Iterator[tuple[str, Any]]:
    """Every accepted value that is no object, whose values are lists of their own."""
    for name, values in arguments.items():
        for value in values:
            if value != "" and "{" not in json.dumps(value):
                yield name, value


@pytest.mark.parametrize("category", ["simple_python", "multiple"])
def test_every_accepted_value_is_accepted(shared: Path, category: str) -> None:
    task, refused, num = calls(shared, category), [], 0
    for prompt in task.prompts("test"):
        assert prompt.reference is not None
        ((_, arguments),) = json.loads(prompt.reference[0])[0].items()
        call = json.loads(task.gold(prompt)[0].removeprefix("<tool_call>\n").removesuffix("\n</tool_call>"))
        for name, value in options(arguments):
            changed = {**call, "arguments": {**call["arguments"], name: value}}
            grade = task.grade(prompt, f"<tool_call>{json.dumps(changed)}</tool_call>")
            num += 1
            if not grade.right:
                refused.append((key(prompt), grade.note))
    assert num > 700
    assert refused == []


def test_schemas_are_those_of_json(shared: Path) -> None:
    for category in CATEGORIES:
        for prompt in calls(shared, category).prompts("test"):
            for tool in prompt.tools or ():
                text = json.dumps(tool)
                assert tool["type"] == "function"
                assert not any(f'"type": "{kind}"' in text for kind in ("dict", "float", "tuple", "any"))


ROW = {
    "question": [[{"role": "user", "content": "Now?"}]],
    "function": [{"name": "now", "parameters": {"type": "dict", "properties": {"type": {"type": "float"}}}}],
    "ground_truth": [{"now": {"type": [1.0]}}],
}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"ground_truth": None}, "null"),
        ({"ground_truth": ["f(x)"]}, "must be a list of"),
        ({"ground_truth": [{"now": {"type": 1.0}}]}, "list of accepted values"),
        ({"ground_truth": "{oops"}, "not JSON"),
        ({"function": "{oops"}, "not JSON"),
        ({"function": [{"parameters": {}}]}, "with a name"),
        ({"question": [[{"role": "user", "content": "a"}], [{"role": "user", "content": "b"}]]}, "role and content"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, changes: dict[str, Any], match: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps(ROW | changes) + "\n")
    task = Calls(dataset="bfcl", path=str(path))
    if changes == {"ground_truth": None}:
        assert len(task.prompts("test")) == 1
        assert task.intake("test").num_skipped == 1
        return
    with pytest.raises(DataError, match=match):
        task.prompts("test")


def test_a_property_may_be_called_type(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROW))
    (prompt,) = Calls(dataset="bfcl", path=str(path)).prompts("test")
    assert prompt.tools is not None
    assert prompt.tools[0]["function"]["parameters"] == {"type": "object", "properties": {"type": {"type": "number"}}}


def test_data_that_is_on_no_hub_needs_a_path() -> None:
    with pytest.raises(ValueError, match="set path"):
        Calls(dataset="bfcl")
    with pytest.raises(ValueError, match="domain is 'tau'"):
        Customers(path="x", domain="tau", prompt_field="instruction")


class Scripted:
    """An engine whose student says given texts, turn by turn, whatever it reads."""

    def __init__(self, tokenizer: Any, turns: dict[str, list[str]]) -> None:
        self.tokenizer, self.turns = tokenizer, {name: iter(texts) for name, texts in turns.items()}

    def generate(self, requests: Sequence[Request], sampling: Sampling, **options: Any) -> list[Sample]:
        samples = []
        for request in requests:
            text = next(self.turns[request.prompt.id])
            prefix = [] if request.prefix_ids is None else request.prefix_ids.tolist()
            context = [*request.token_ids.tolist(), *prefix]
            new = self.tokenizer(text + "<|im_end|>", add_special_tokens=False)["input_ids"]
            author = torch.full((len(context) + len(new),), int(Author.STUDENT), dtype=torch.uint8)
            author[: len(context)] = int(Author.TEACHER)
            author[: request.token_ids.numel()] = int(Author.PROMPT)
            ids, length = torch.tensor([*context, *new]), request.token_ids.numel()
            samples.append(Sample(request.prompt, request.index, ids, author, length, "stop", text))
        return samples


def played(shared: Path, task: Any, prompts: Sequence[Prompt], turns: dict[str, list[str]]) -> list[Sample]:
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "qwen"))
    renderer = Renderer(tokenizer)
    requests = [Request(prompt, 0, renderer.start(prompt)) for prompt in prompts]
    sampling = Sampling(max_new_tokens=100_000)
    return play(Scripted(tokenizer, turns), renderer, task.environment, requests, sampling, step=0)


def as_call(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def test_calls_are_graded_by_their_environment(shared: Path) -> None:
    task = calls(shared, "parallel")
    prompts = task.prompts("test")[:4]
    turns = {prompt.id: [f"<think>\nhm\n</think>\n\n{task.gold(prompt)[0]}"] for prompt in prompts[:3]}
    turns[prompts[3].id] = ["<tool_call>{oops</tool_call>"]
    samples = played(shared, task, prompts, turns)
    assert [sample.grade.score for sample in samples if sample.grade] == [1, 1, 1, 0]
    assert samples[3].grade is not None
    assert "no JSON" in samples[3].grade.note


def customers(shared: Path, domain: str, **options: Any) -> Customers:
    path = shared / "data" / "tau_bench" / f"{domain}_test.jsonl"
    return Customers(dataset=f"tau-{domain}", test_path=str(path), **options)


@pytest.mark.parametrize(("domain", "num"), [("retail", 115), ("airline", 50)])
def test_customers_are_served(shared: Path, domain: str, num: int) -> None:
    """A student that makes the reference calls, one that does nothing, and one that stumbles, through Qwen's template."""
    task = customers(shared, domain)
    prompts = task.prompts("test")
    assert len(prompts) == num
    task.check_files()
    shown = [prompt for prompt in prompts if json.loads((prompt.reference or ("",))[0])["actions"]][:6]
    turns = {}
    for number, prompt in enumerate(shown):
        assert prompt.reference is not None
        facts = json.loads(prompt.reference[0])
        done = "Done: " + ", ".join(facts["outputs"])
        made = [as_call(call["name"], call["kwargs"]) for call in facts["actions"]]
        stumbling = ["<tool_call>{</tool_call>", as_call("fly", {})]
        turns[prompt.id] = [[*made, done], ["Sorry."], [*stumbling, *made, done]][number % 3]
    samples = played(shared, task, shown, turns)
    for number, sample in enumerate(samples):
        assert sample.finish == "stop"
        assert sample.grade is not None
        assert sample.grade.right == (number % 3 != 1), sample.grade.note
        errors = [message for message in sample.messages if message.get("error")]
        assert len(errors) >= 2 * (number % 3 == 2)
        environment = sample.author == int(Author.ENVIRONMENT)
        assert bool(environment.any()) == (number % 3 != 1)


def user_at(url: str) -> UserModel:
    return UserModel(url=url, model="m", extra_body={"top_p": 0.9})


def test_a_customer_that_a_model_plays(shared: Path) -> None:
    replies = iter(["I am Yusuf Rossi, 19122.", "###DONE###"])
    with ChatServer(lambda request, number: says(next(replies))) as server:
        task = customers(shared, "retail", user=user_at(server.url), limit=1)
        (prompt,) = task.prompts("test")
        assert prompt.messages is not None
        assert "case" in prompt.messages[-1]["content"]
        assert "Yusuf" not in prompt.messages[-1]["content"]
        (sample,) = played(shared, task, [prompt], {prompt.id: ["Who are you?", "All done."]})
        assert [message["role"] for message in sample.messages] == ["assistant", "user", "assistant"]
        assert sample.grade is not None
        assert not sample.grade.right
    assert num_repeated(customers(shared, "retail", user=user_at("http://host:1/v1")).prompts("test")) <= 1


def test_a_customer_that_cannot_be_reached_ends_its_episode_only(shared: Path) -> None:
    user = UserModel(url="http://127.0.0.1:1/v1", model="m", max_retries=0, deadline_s=1.0)
    task = customers(shared, "retail", user=user, limit=1)
    (prompt,) = task.prompts("test")
    (sample,) = played(shared, task, [prompt], {prompt.id: ["Who are you?"]})
    assert sample.finish == "environment"
    assert sample.grade is None


def test_out_of_turns_is_wrong(shared: Path) -> None:
    task = customers(shared, "airline", max_turns=2, limit=1)
    (prompt,) = task.prompts("test")
    (sample,) = played(shared, task, [prompt], {prompt.id: [as_call("list_all_airports", {})] * 2})
    assert (sample.finish, sample.grade) == ("length", None)
    assert task.grade(prompt, sample.text).score == 0.0


def test_train_and_test_customers_do_not_overlap(shared: Path) -> None:
    folder = shared / "data" / "tau_bench"
    train = Customers(
        dataset="tau-retail", path=str(folder / "retail_train.jsonl"), test_path=str(folder / "retail_test.jsonl")
    )
    assert overlap(train.prompts("train"), train.prompts("test")) == []


def test_a_missing_data_base_is_named(tmp_path: Path, shared: Path) -> None:
    task = customers(shared, "retail", database=str(tmp_path))
    with pytest.raises(RecipeError, match=r"policy\.md"):
        task.check_files()


def test_programs_run_before_the_answer(shared: Path) -> None:
    """What a program prints and why one fails goes back to the student; the last message is graded."""
    sandbox = Process(unsafe=True, wall_s=20.0)
    task = Mathematics(
        dataset="gsm8k", test_path=str(shared / "data" / "gsm8k" / "test.jsonl"), python=sandbox, limit=2
    )
    right, wrong = task.prompts("test")
    assert right.tools is not None
    assert right.tools[0]["function"]["name"] == "python"
    turns = {
        right.id: [as_call("python", {"code": "print(2 * (16 - 3 - 4))"}), "So it is \\boxed{18}."],
        wrong.id: [as_call("python", {"code": "print('a')\n1/0"}), as_call("python", {"code": "pass"}), "\\boxed{1}"],
    }
    samples = played(shared, task, [right, wrong], turns)
    replies = [[message for message in sample.messages if message["role"] == "tool"] for sample in samples]
    assert [reply["content"] for reply in replies[0]] == ["18\n"]
    assert replies[1][0]["error"]
    assert replies[1][0]["content"].startswith("Error: a\nthe program failed")
    assert "ZeroDivisionError" in replies[1][0]["content"]
    assert replies[1][1]["content"] == "The program printed nothing."
    assert [task.grade(sample.prompt, sample.text).score for sample in samples] == [1.0, 0.0]
    assert Mathematics(dataset="gsm8k").environment(right).max_turns == 1
    with pytest.raises(ValueError, match="needs a chat"):
        Mathematics(dataset="gsm8k", python=sandbox, chat=False)


def test_an_answer_that_a_tool_prints_is_not_the_students(shared: Path) -> None:
    """What is graded is the student's last message alone, whatever stood in a tool's reply before it."""
    task = Mathematics(
        dataset="gsm8k",
        test_path=str(shared / "data" / "gsm8k" / "test.jsonl"),
        python=Process(unsafe=True, wall_s=20.0),
        limit=3,
    )
    prompts = task.prompts("test")
    turns = {}
    for prompt, last in zip(prompts, ("I do not know.", "\\boxed{-1}", "As it says."), strict=True):
        (right,) = prompt.reference or ()
        program = f"print(r'The answer is \\boxed{{{right}}}. #### {right} <answer>{right}</answer>')"
        turns[prompt.id] = [as_call("python", {"code": program}), last]
    for sample in played(shared, task, list(prompts), turns):
        assert (sample.prompt.reference or ("",))[0] in sample.messages[1]["content"]
        assert task.grade(sample.prompt, sample.text).score == 0.0


@pytest.mark.slow
def test_a_run_trains_on_calls(tmp_path: Path, shared: Path) -> None:
    """Two tiny models of bytes, whose template shows the functions; the evaluation grades by the environment."""
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML
    models = {}
    for seed, name in enumerate(("student", "teacher")):
        sizes = BUILD | {"max_position_embeddings": 4096}
        ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
        model = build_causal_lm(sizes, vocab_size=len(tokenizer), seed=seed, **ids)
        models[name] = str(tmp_path / name)
        save_hf(model, tokenizer, models[name])
    rows = str(shared / "data" / "bfcl_v4" / "parallel.jsonl")
    run_dir = train(
        tmp_path,
        student={"model": models["student"], "build": None},
        teacher={"type": "local", "model": models["teacher"]},
        task={"type": "calls", "dataset": "bfcl", "path": rows, "test_path": rows},
        method={"type": "gkd"},
        sampling={"max_new_tokens": 6},
        train={"steps": 2, "prompts_per_step": 2, "save_samples_every": 1},
        eval={"every": 2, "problems": 3, "split": "test"},
    )
    assert len(metric_rows(run_dir)) == 2
    saved = [json.loads(line) for line in (run_dir / "samples" / "step_000001.jsonl").read_text().splitlines()]
    assert len(saved) == 2
    graded = [json.loads(line) for line in (run_dir / "eval" / "step_000002.jsonl").read_text().splitlines()]
    assert {row["score"] for row in graded} == {0.0}
