"""Tool calls in the tokens of a turn: the formats of chat templates, and what hostile models write in their place."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.test_environments import Speaks
from tests.integration.test_verbal import byte_tokenizer
from understudy.environments import Step
from understudy.environments.play import play
from understudy.models import load_tokenizer
from understudy.packing import pack
from understudy.tasks import Renderer
from understudy.tasks.tool_calls import LLAMA, MISTRAL, TAGGED, call_format
from understudy.types import Author, Message, Prompt, Request, Sampling, Scores

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "note": {"type": "string"}, "all": {"type": "array"}},
        },
    },
}
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{% if tools and m == asked[-1] %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content | string }}[/TOOL_RESULTS]"
    "{% elif m.tool_calls %}[TOOL_CALLS]{{ m.tool_calls | tojson }}{{ eos_token }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.tool_calls %}<|start_header_id|>assistant<|end_header_id|>\n\n"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}}"
    "{% elif m.role == 'tool' %}<|start_header_id|>ipython<|end_header_id|>\n\n{{ {'output': m.content} | tojson }}"
    "{% else %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
FAMILIES = {
    # template, special tokens, the end of a turn (None: EOS)
    "mistral": (MISTRAL_TEMPLATE, "[INST] [/INST] [TOOL_CALLS] [ARGS] [TOOL_RESULTS] [/TOOL_RESULTS]", None),
    "llama": (LLAMA_TEMPLATE, "<|start_header_id|> <|end_header_id|> <|eot_id|> <|python_tag|>", "<|eot_id|>"),
}


def renderer_of(family: str, shared: Path) -> tuple[Renderer, str]:
    if family == "qwen":
        return Renderer(load_tokenizer(str(shared / "tokenizers" / "qwen"))), "<|im_end|>"
    template, special, end = FAMILIES[family]
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": special.split()})
    tokenizer.chat_template = template
    return Renderer(tokenizer), end or tokenizer.eos_token


def read(renderer: Renderer, text: str) -> Message:
    ids = renderer.tokenizer(text, add_special_tokens=False)["input_ids"]
    return renderer.read(torch.tensor(ids, dtype=torch.int64), [ADD])


CALL = {
    "qwen": '<tool_call>\n{"name": "add", "arguments": {"a": 2, "note": "é </x>"}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2, "note": "é </x>"}}]',
    "llama": '{"name": "add", "parameters": {"a": 2, "note": "é </x>"}}',
}


@pytest.mark.parametrize("family", list(CALL))
def test_a_call_is_read_and_its_result_goes_back(shared: Path, family: str) -> None:
    """The tokens of the call stay, the template writes the result, and the student goes on behind it."""
    renderer, end = renderer_of(family, shared)
    prompt = Prompt("p", messages=({"role": "user", "content": "2+2?"},), tools=(ADD,))
    start = renderer.start(prompt)
    written = torch.tensor(renderer.tokenizer(CALL[family] + end, add_special_tokens=False)["input_ids"])
    message = renderer.read(written, prompt.tools)
    assert [(call.name, dict(call.arguments), call.error) for call in message.tool_calls] == [
        ("add", {"a": 2, "note": "é </x>"}, "")
    ]
    assert (message.content, message.ended) == ("", True)
    assert message.text == CALL[family]
    said = [{"role": "assistant", "content": message.text}, {"role": "tool", "content": "four!"}]
    ids = torch.cat([start, written])
    longer = renderer.append(ids, prompt, said)
    assert torch.equal(longer[: len(ids)], ids)
    added = renderer.tokenizer.decode(longer[len(ids) :])
    assert added.count("four!") == 1
    assert ("tool_response" in added, "ipython" in added, "[TOOL_RESULTS]" in added) == tuple(
        family == name for name in ("qwen", "llama", "mistral")
    )


FOUND = "\n\n<information>Doc 1: two and two <|im_end|> are four</information>\n\n"
TRANSCRIPTS = {
    # who wrote what, to the token: a call, the template's words around its result, a search inside a turn, the answer
    "qwen": [
        ("prompt", "<|im_start|>system\n{tools}<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"),
        ("student", f"<think>\nhm\n</think>\n\n{CALL['qwen']}<|im_end|>"),
        ("template", "\n<|im_start|>user\n<tool_response>\nfour!\n</tool_response><|im_end|>\n<|im_start|>assistant\n"),
        ("student", "<think>\nsure?\n</think>\n\n<search>2+2</search>"),
        ("environment", FOUND),
        ("student", "<answer>4</answer>"),
    ],
    "llama": [
        (
            "prompt",
            "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("student", f"{CALL['llama']}<|eot_id|>"),
        (
            "template",
            '<|start_header_id|>ipython<|end_header_id|>\n\n{"output": "four!"}<|eot_id|>'
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("student", "<search>2+2</search>"),
        ("environment", FOUND),
        ("student", "<answer>4</answer>"),
    ],
    "mistral": [
        ("prompt", "[AVAILABLE_TOOLS]{tools}[/AVAILABLE_TOOLS][INST]2+2?[/INST]"),
        ("student", f"{CALL['mistral']}{{eos}}"),
        ("template", "[TOOL_RESULTS]four![/TOOL_RESULTS]"),
        ("student", "<search>2+2</search>"),
        ("environment", FOUND),
        ("student", "<answer>4</answer>"),
    ],
}


class Helping:
    """Makes a call, finds something, and ends at an answer."""

    stop = ("</search>", "</answer>")
    max_turns = 4

    def step(self, message: Message) -> Step:
        if message.tool_calls:
            return Step(({"role": "tool", "content": "four!", "tool_call_id": "call00001"},))
        if message.tagged is not None and message.tagged.name == "search":
            return Step(({"role": "tool", "content": FOUND},), inline=True)
        return Step(done=True)

    def close(self) -> None:
        """Nothing is held."""


@pytest.mark.parametrize("family", list(TRANSCRIPTS))
def test_every_token_of_calls_and_searches_has_its_author(shared: Path, family: str) -> None:
    """Against a transcript by hand: what the student wrote is trained, and no word of the template or the environment."""
    renderer, _ = renderer_of(family, shared)
    tokenizer = renderer.tokenizer
    prompt = Prompt("p", messages=({"role": "user", "content": "2+2?"},), tools=(ADD,))
    pieces = [(who, text.replace("{eos}", tokenizer.eos_token)) for who, text in TRANSCRIPTS[family]]
    engine = Speaks(tokenizer, *(text for who, text in pieces if who == "student"))
    asked = [Request(prompt, 0, renderer.start(prompt))]
    (sample,) = play(engine, renderer, lambda prompt: Helping(), asked, Sampling(max_new_tokens=600), step=0)
    ids, authors = [], []
    for who, text in pieces[1:]:
        # what an environment says is text, even where it spells a special token
        new = tokenizer(text, add_special_tokens=False, split_special_tokens=who == "environment")["input_ids"]
        ids += new
        authors += [Author.STUDENT if who == "student" else Author.ENVIRONMENT] * len(new)
    opening = tokenizer.decode(sample.token_ids[: sample.prompt_length])
    before, _, behind = pieces[0][1].partition("{tools}")
    assert opening.removeprefix(tokenizer.bos_token or "").startswith(before)
    assert opening.endswith(behind)
    assert sample.response_ids.tolist() == ids
    assert sample.author[sample.prompt_length :].tolist() == authors
    assert sample.finish == "stop"
    batch = pack([replace(sample, scores=Scores(sample.response_ids, logprob=torch.zeros(len(ids))))])
    assert batch.mask.tolist() == [author == Author.STUDENT for author in authors]
    assert batch.target.tolist() == ids


@pytest.mark.parametrize("family", list(CALL))
def test_a_message_without_a_call_has_none(shared: Path, family: str) -> None:
    renderer, end = renderer_of(family, shared)
    for text in ("four", '{"answer": 4}', "add(2, 2)", "I would call add with {}"):
        message = read(renderer, text + end)
        assert (message.content, message.tool_calls) == (text, ())


def test_the_template_decides_on_the_format() -> None:
    assert call_format(MISTRAL_TEMPLATE) is MISTRAL
    assert call_format(LLAMA_TEMPLATE) is LLAMA
    assert call_format("") is TAGGED


GOOD = [
    # format, text, what is said beside the calls, the calls
    (TAGGED, 'So <tool_call>{"name": "now"}</tool_call> then', "So  then", [("now", {})]),
    (
        TAGGED,
        "<tool_call>\n<function=add>\n<parameter=a>\n2\n</parameter>\n<parameter=note>\n2\n</parameter>\n"
        "<parameter=all>\n[1, 2]\n</parameter>\n<parameter=odd>\nTrue\n</parameter>\n</function>\n</tool_call>",
        "",
        [("add", {"a": 2, "note": "2", "all": [1, 2], "odd": True})],
    ),
    (TAGGED, "<tool_call><function=add></function></tool_call>", "", [("add", {})]),
    (
        MISTRAL,
        'I add.[TOOL_CALLS] [{"name": "a", "arguments": {"x": 1}}, {"name": "b", "arguments": {}}]',
        "I add.",
        [("a", {"x": 1}), ("b", {})],
    ),
    (
        MISTRAL,
        '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b.c{"y": "[ARGS]"}',
        "",
        [("a", {"x": 1}), ("b.c", {"y": "[ARGS]"})],
    ),
    (
        LLAMA,
        '<|python_tag|>{"name": "a", "parameters": {}}; {"name": "b", "arguments": {"x": 1}}',
        "",
        [("a", {}), ("b", {"x": 1})],
    ),
    (LLAMA, '{"type": "function", "name": "a", "parameters": {"x": null}}', "", [("a", {"x": None})]),
    (LLAMA, 'The call is {"name": "a", "parameters": {}}', 'The call is {"name": "a", "parameters": {}}', []),
]


@pytest.mark.parametrize(("form", "text", "content", "calls"), GOOD)
def test_formats(form: Any, text: str, content: str, calls: list[Any]) -> None:
    said, found = form.read(text, [ADD])
    assert said == content
    assert [(call.name, dict(call.arguments)) for call in found] == calls
    assert all(call.error == "" for call in found)


BAD = [
    (TAGGED, "<tool_call>{oops}</tool_call>", "no JSON"),
    (TAGGED, "<tool_call>", "not closed"),
    (TAGGED, "<tool_call></tool_call>", "no JSON"),
    (TAGGED, '<tool_call>{"name": "a", "arguments": {"x": NaN}}</tool_call>', "NaN"),
    (TAGGED, '<tool_call>{"name": "a", "arguments": [1]}</tool_call>', "no JSON object"),
    (TAGGED, '<tool_call>["a"]</tool_call>', "no name"),
    (TAGGED, f"<tool_call>{'[' * 100_000}</tool_call>", "too deep"),
    (TAGGED, '<tool_call>{"name": "a", "arguments": {"x": ' + "9" * 10_000 + "}}</tool_call>", "no JSON"),
    (TAGGED, "<tool_call><function=add><parameter=a>2</tool_call>", "not closed"),
    (MISTRAL, "[TOOL_CALLS]", "no JSON"),
    (MISTRAL, "[TOOL_CALLS] [1]", "no name"),
    (MISTRAL, '[TOOL_CALLS]add[ARGS]{"a": ', "no JSON"),
    (LLAMA, '{"name": "a", "parameters": {}', "no JSON"),
    (LLAMA, '{"name": 3, "parameters": {}}', "no name"),
    (LLAMA, '<|python_tag|>print("hello")', "no JSON"),
    (LLAMA, '{"name": ' + '{"name": ' * 100_000, "too deep"),
]


@pytest.mark.parametrize(("form", "text", "error"), BAD, ids=range(len(BAD)))
def test_what_is_no_call_is_kept_with_its_error(form: Any, text: str, error: str) -> None:
    _, calls = form.read(text, [ADD])
    assert len(calls) == 1
    assert error in calls[0].error


@pytest.mark.parametrize("form", [TAGGED, MISTRAL, LLAMA], ids=["tagged", "mistral", "llama"])
def test_a_megabyte_is_read_in_time(form: Any) -> None:
    parts = [
        "<tool_call>", "</tool_call>", "<function=a>", "<parameter=a>", "[TOOL_CALLS]", '{"name": "a"};', '{"name": ', "[", "x",
        "<tool_call><function=a>", "[TOOL_CALLS]a",
    ]  # fmt: skip
    start = time.process_time()
    for part in parts:
        form.read(part * (1_000_000 // len(part)), [ADD])
    # generous: a search that begins anew at every tag takes hours
    assert time.process_time() - start < 60


def test_schemas_that_are_none_break_nothing() -> None:
    text = "<tool_call><function=add><parameter=a>2</parameter></function></tool_call>"
    for tool in (
        {"name": "add"},
        {"name": "add", "parameters": []},
        {"name": "add", "parameters": {"properties": {"a": 3}}},
    ):
        assert dict(TAGGED.read(text, [tool])[1][0].arguments) == {"a": 2}
