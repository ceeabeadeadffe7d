"""A teacher's responses: found by the problem, in the student's tokens, written once."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor

from understudy import config
from understudy.errors import DataError, RecipeError
from understudy.models import load_tokenizer
from understudy.tasks import Arithmetic, Jsonl, build_tokenizer
from understudy.tasks.renderer import Renderer
from understudy.teachers.stores import responses
from understudy.teachers.stores.responses import (
    RESPONSES,
    ResponseCache,
    ResponseSetup,
    ResponseStore,
    TeacherResponses,
    open_responses,
)
from understudy.types import Prompt, Request, Sampling

TOKENIZER = build_tokenizer("addition")
EOS = TOKENIZER.eos_token_id
PLAIN = Prompt("p", text="a")


@dataclass(frozen=True)
class Holder:
    responses: Any = config.choice(RESPONSES)


def section(**values: Any) -> Any:
    return config.parse(Holder, {"responses": values}).responses


def setup(folder: Path, **changes: Any) -> ResponseSetup:
    values = {
        "renderer": Renderer(TOKENIZER),
        "seed": 0,
        "run_dir": folder / "run",
        "sampling": Sampling(max_new_tokens=9),
    }
    return ResponseSetup(**values | changes)


def ask(prompts: Sequence[Prompt], per_prompt: int = 1) -> list[Request]:
    return [
        Request(prompt, index, torch.tensor([5, number]))
        for number, prompt in enumerate(prompts)
        for index in range(per_prompt)
    ]


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def say(found: Sequence[Tensor | None]) -> list[str | None]:
    """Each response as text; every one ends with its EOS and has no other."""
    for ids in found:
        assert ids is None or (ids.dtype == torch.int64 and (ids == EOS).nonzero().flatten().tolist() == [len(ids) - 1])
    return [None if ids is None else TOKENIZER.decode(ids[:-1]) for ids in found]


def from_file(folder: Path, rows: Sequence[dict[str, Any]], name: str = "r.jsonl", **changes: Any) -> ResponseStore:
    made = section(type="jsonl", path=write(folder / name, rows), prompt_field="q", response_field="a")
    assert made.check().startswith("responses: ")
    return open_responses(made, setup(folder, **changes))


def test_solutions_are_those_of_the_task(tmp_path: Path) -> None:
    prompts = Arithmetic(digits=2).prompts("train")[:4]
    store = open_responses(section(type="solutions"), setup(tmp_path))
    for ids, prompt in zip(store.find(ask(prompts), 0), prompts, strict=True):
        assert ids is not None
        assert torch.equal(ids, Renderer(TOKENIZER).response(prompt, prompt.solution or ""))
    without = [replace(prompts[0], solution=None), prompts[1]]
    assert say(store.find(ask(without), 0)) == [None, prompts[1].solution]
    store.check(without, "sums")
    assert store.take_counts() == {"responses_missing": 1, "responses_unreadable": 0}
    assert store.take_counts() == {"responses_missing": 0, "responses_unreadable": 0}


@pytest.mark.parametrize("name", ["r.jsonl", "r.jsonl.gz"])
def test_rows_are_matched_by_the_problem(tmp_path: Path, name: str) -> None:
    """The task words its problems with a template and a system message, in another order; the rows have the bare text."""
    source = write(tmp_path / "task.jsonl", [{"p": "What is  1+1?"}, {"p": "what is 2+2?"}, {"p": "What is 3+3?"}])
    task = Jsonl(path=source, prompt_field="p", template="{prompt} Think.", system="Be brief.")
    rows = [{"q": "What is 2+2?", "a": "4"}, {"q": [{"role": "user", "content": "WHAT is 1+1?"}], "a": "2"}]
    chatting = build_tokenizer("addition")
    chatting.chat_template = (
        "1:{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    store = from_file(tmp_path, rows, name, renderer=Renderer(chatting))
    prompts = task.prompts("train")
    assert say(store.find(ask(prompts), 0)) == ["2", "4", None]
    assert say(store.find(ask(replace(task, template="{prompt}", chat=False, system=None).prompts("train")), 0))[
        :2
    ] == [
        "2",
        "4",
    ]
    store.check(prompts, task.name)
    store.check(prompts, task.name, limit=1)
    with pytest.raises(RecipeError, match="none of the 1 prompts"):
        store.check(prompts[2:], task.name)
    repeated = [replace(prompts[0], id=f"{prompts[0].id}~2")]
    assert say(store.find(ask(repeated), 0)) == ["2"]


def test_computed_tasks_are_matched_by_their_text(tmp_path: Path) -> None:
    prompts = Arithmetic(digits=2).prompts("train")[:2]
    store = from_file(tmp_path, [{"q": prompts[1].text, "a": "11"}])
    assert say(store.find(ask(prompts), 0)) == [None, "11"]


def test_a_local_data_set_is_read(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    write(tmp_path / "set" / "train.jsonl", [{"q": "a?", "a": "1"}, {"q": "b?", "a": "2"}])
    made = section(type="hub", dataset=str(tmp_path / "set"), prompt_field="q", response_field="a")
    assert "set[train] (a)" in made.check()
    assert say(open_responses(made, setup(tmp_path)).find(ask([Prompt("x", text="B?")]), 0)) == ["2"]


def test_the_choice_among_several_is_keyed(tmp_path: Path) -> None:
    """By seed, step and request: not by what else is asked, and every response gets its turn."""
    rows = [{"q": "a?", "a": str(number)} for number in (1, 2, 3, 3)] + [{"q": "b?", "a": "9"}]
    store = from_file(tmp_path, rows)
    asked = ask([Prompt("x", text="a?"), Prompt("y", text="b?")], 40)
    base = say(store.find(asked, 5))
    assert base == say(store.find(asked, 5))
    assert base[::-1] == say(store.find(asked[::-1], 5))
    assert base[7:8] == say(store.find(asked[7:8], 5))
    assert set(base[:40]) == {"1", "2", "3"}
    assert set(base[40:]) == {"9"}
    assert base != say(store.find(asked, 6))
    other = open_responses(
        section(type="jsonl", path=str(tmp_path / "r.jsonl"), prompt_field="q", response_field="a"),
        setup(tmp_path, seed=1),
    )
    assert base != say(other.find(asked, 5))
    # three equal shares of 400 draws: 5 standard deviations are 47
    many = say(store.find(ask([Prompt("x", text="a?")], 400), 0))
    assert all(abs(many.count(text) - 400 / 3) < 47 for text in ("1", "2", "3"))


@pytest.mark.parametrize("step", [0, 5])
def test_slots_are_dealt_every_response_once(tmp_path: Path, step: int) -> None:
    """r slots of a prompt hold min(r, m) of its m responses, no two alike, whoever asks for which slot."""
    rows = [{"q": "a?", "a": str(number)} for number in range(5)] + [{"q": "b?", "a": "9"}, {"q": "b?", "a": "fünf"}]
    store = from_file(tmp_path, rows)
    a, b = ask([Prompt("x", text="a?")], 7), ask([Prompt("y", text="b?")], 2)
    dealt = say(store.find([*a, *b], step, [*range(7), 0, 1]))
    assert sorted(text for text in dealt[:5] if text) == ["0", "1", "2", "3", "4"]
    assert dealt[5:] == [None, None, "9", None]
    assert store.take_counts() == {"responses_missing": 3, "responses_unreadable": 1}
    for slot in range(7):
        # the sample that the slot belongs to is nothing
        assert say(store.find([a[6 - slot]], step, [slot])) == dealt[slot : slot + 1]


def test_the_order_in_which_responses_are_dealt_is_drawn(tmp_path: Path) -> None:
    """By (seed, step, prompt): each of three is the first in a third of the steps."""
    store = from_file(tmp_path, [{"q": "a?", "a": str(number)} for number in range(3)])
    firsts = [say(store.find(ask([Prompt("x", text="a?")]), step, [0]))[0] for step in range(400)]
    # 5 standard deviations of 400 draws are 47
    assert all(abs(firsts.count(text) - 400 / 3) < 47 for text in ("0", "1", "2"))


def test_texts_that_the_student_cannot_say_are_left_out(tmp_path: Path) -> None:
    rows = [{"q": "a?", "a": "vier"}, {"q": "a?", "a": "4"}, {"q": "b?", "a": "fünf"}, {"q": "c?", "a": "x"}]
    store = from_file(tmp_path, rows)
    prompts = [Prompt(name, text=f"{name}?") for name in "abcd"]
    assert [set(say(store.find(ask([prompt], 9), 0))) for prompt in prompts] == [{"4"}, {None}, {None}, {None}]
    assert store.take_counts() == {"responses_missing": 27, "responses_unreadable": 3}
    store.check(prompts, "sums")
    with pytest.raises(RecipeError, match="none of the 2 prompts"):
        store.check(prompts[1:], "sums", limit=2)
    with pytest.raises(
        RecipeError, match=r"none of the 2 prompts of task sums has a response in .*r\.jsonl \(a\): 1 have"
    ):
        store.check([prompts[1], prompts[3]], "sums")
    with pytest.raises(RecipeError, match=r"none of the 1 prompts of task sums .*r\.jsonl \(a\): compare the problems"):
        store.check(prompts[3:], "sums")


def test_faithful_encoding(shared: Path) -> None:
    """A real tokenizer with a normaliser and bytes for foreign letters, and one with whole words."""
    real = load_tokenizer(str(shared / "models" / "stories260K"))
    for text in ("Lily ran.", " a  b\n", "naïve 😀", "half</s> way"):
        ids = Renderer(real).faithful(PLAIN, text)
        assert ids.tolist().count(real.eos_token_id) == 1
        assert real.decode(ids[:-1]) == text
    ended = Renderer(real).faithful(PLAIN, "Lily ran.</s>")
    assert ended.tolist() == Renderer(real).response(PLAIN, "Lily ran.").tolist()
    words = build_tokenizer("words")
    spaced = Renderer(words).faithful(PLAIN, "24  + 7 ")
    assert words.decode(spaced[:-1]) == "24 + 7"
    for tokenizer, text in ((words, "24 plus 7"), (TOKENIZER, "1<eos>2")):
        with pytest.raises(DataError, match="tokenizer cannot"):
            Renderer(tokenizer).faithful(PLAIN, text)


def test_an_unknown_token_or_a_dropped_letter_is_no_text() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    def build(model: Any) -> Any:
        inner = Tokenizer(model)
        inner.normalizer = normalizers.Lowercase()
        inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        inner.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")

    vocabulary = {"</s>": 0, "a": 1, "b": 2, "<unk>": 3}
    dropping = build(models.BPE(vocabulary, []))
    knowing = build(models.BPE(vocabulary, [], unk_token="<unk>"))
    knowing.unk_token = "<unk>"
    for tokenizer in (dropping, knowing):
        assert Renderer(tokenizer).faithful(PLAIN, "ABba").tolist() == [1, 2, 2, 1, 0]
        with pytest.raises(DataError, match="reads it back as"):
            Renderer(tokenizer).faithful(PLAIN, "abc")


@dataclass
class Writer:
    """Answers with the length of a prompt's text; knows what it was asked."""

    asked: list[list[str]] = field(default_factory=list)

    def __call__(self, prompts: Sequence[Prompt]) -> list[str | None]:
        self.asked.append([prompt.id for prompt in prompts])
        return [None if prompt.id == "mute" else str(len(prompt.text or "")) for prompt in prompts]


PROMPTS = [Prompt(name, text=name * 3) for name in ("a", "bb", "ccc")]


def teacher_store(folder: Path, writer: Writer, changed: dict[str, Any] | None = None, **values: Any) -> ResponseStore:
    given = {"generate": writer, "fingerprint": "f"} | (changed or {})
    return open_responses(section(type="teacher", **values), setup(folder, **given))


def test_the_teacher_writes_once_and_only_what_is_needed(tmp_path: Path) -> None:
    writer = Writer()
    store = teacher_store(tmp_path, writer)
    store.check(PROMPTS, "sums")
    assert not writer.asked
    assert not (tmp_path / "run").exists()
    assert say(store.find(ask(PROMPTS[:2], 4), 0)) == ["3"] * 4 + ["6"] * 4
    assert say(store.find(ask(PROMPTS), 1)) == ["3", "6", "9"]
    assert writer.asked == [["a", "bb"], ["ccc"]]
    again = Writer()
    assert say(teacher_store(tmp_path, again).find(ask(PROMPTS), 7)) == ["3", "6", "9"]
    assert not again.asked


def test_the_teacher_writes_one_response_for_each_step_and_slot(tmp_path: Path) -> None:
    """Under a name of its own, which keys its random numbers; a resumed run reads what was written."""
    writer = Writer()
    store = teacher_store(tmp_path, writer)
    requests = ask(PROMPTS[:1], 3)
    store.find(requests, 0)
    store.find(requests, 0, [0, 1, 2])
    store.find(requests[:2], 1, [0, 1])
    assert writer.asked == [["a"], ["a@0/0", "a@0/1", "a@0/2"], ["a@1/0", "a@1/1"]]
    resumed = Writer()
    assert say(teacher_store(tmp_path, resumed).find(requests[1:], 1, [0, 1])) == ["3", "3"]
    assert not resumed.asked


@pytest.mark.parametrize(
    "changed",
    [
        {"fingerprint": "g"},
        {"seed": 1},
        {"sampling": Sampling(temperature=0.5, max_new_tokens=9)},
        {"sampling": Sampling(max_new_tokens=8)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_decides_a_text_keys_the_cache(tmp_path: Path, changed: dict[str, Any]) -> None:
    shared = str(tmp_path / "shared")
    teacher_store(tmp_path, Writer(), cache=shared).find(ask(PROMPTS), 0)
    same, other = Writer(), Writer()
    teacher_store(tmp_path / "elsewhere", same, cache=shared).find(ask(PROMPTS), 0)
    teacher_store(tmp_path, other, changed, cache=shared).find(ask(PROMPTS), 0)
    assert (same.asked, len(other.asked)) == ([], 1)


def test_a_prompt_that_is_rendered_otherwise_is_another(tmp_path: Path) -> None:
    writer = Writer()
    store = teacher_store(tmp_path, writer)
    store.find(ask(PROMPTS[:1]), 0)
    store.find([replace(one, token_ids=torch.tensor([6])) for one in ask(PROMPTS[:1])], 0)
    store.find([replace(one, prompt=replace(one.prompt, id="z")) for one in ask(PROMPTS[:1])], 0)
    assert writer.asked == [["a"], ["a"], ["z"]]


def test_a_teacher_that_gives_nothing_is_asked_once_a_run(tmp_path: Path) -> None:
    writer, mute = Writer(), Prompt("mute", text="?")
    store = teacher_store(tmp_path, writer)
    assert say(store.find(ask([mute, PROMPTS[0]]), 0)) == [None, "3"]
    assert say(store.find(ask([mute]), 1)) == [None]
    assert writer.asked == [["mute", "a"]]
    assert store.take_counts() == {"responses_missing": 2, "responses_unreadable": 0}
    with pytest.raises(DataError, match="1 responses to 2 prompts"):
        teacher_store(tmp_path, lambda prompts: ["1"], {"seed": 3}).find(ask(PROMPTS[:2]), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [1, 2, 7, 30])
def test_a_killed_write_loses_one_line(tmp_path: Path, cut: int) -> None:
    teacher_store(tmp_path, Writer()).find(ask(PROMPTS), 0)
    (file,) = (tmp_path / "run" / "responses").iterdir()
    file.write_bytes(file.read_bytes()[:-cut])
    after = Writer()
    assert say(teacher_store(tmp_path, after).find(ask(PROMPTS), 0)) == ["3", "6", "9"]
    # without its line end alone, the last line is still whole
    assert after.asked == ([] if cut == 1 else [["ccc"]])
    last = Writer()
    assert say(teacher_store(tmp_path, last).find(ask([*PROMPTS, Prompt("dddd", text="d")]), 0))[3] == "1"
    final = Writer()
    teacher_store(tmp_path, final).find(ask([*PROMPTS, Prompt("dddd", text="d")]), 0)
    assert (last.asked, final.asked) == ([["dddd"]], [])


def _add(folder: str, number: int) -> None:
    store = teacher_store(Path(folder), Writer(), cache=folder)
    for step in range(20):
        store.find(ask([Prompt(f"{number}/{step}", text="x" * 2000)]), step)


def test_runs_share_a_cache(tmp_path: Path) -> None:
    """Each writer has a file handle of its own, as in a process of its own."""
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda number: _add(str(tmp_path), number), range(3)))
    after = Writer()
    store = teacher_store(tmp_path, after, cache=str(tmp_path))
    for number in range(3):
        for step in range(20):
            store.find(ask([Prompt(f"{number}/{step}", text="x" * 2000)]), 0)
    assert not after.asked


@dataclass
class Alternating:
    """A text of its own at every call, and `between`, which happens while the teacher writes."""

    name: str
    between: Any = None
    calls: int = 0

    def __call__(self, prompts: Sequence[Prompt]) -> list[str | None]:
        self.calls += 1
        if self.between is not None:
            self.between()
        return [self.name] * len(prompts)


@pytest.mark.parametrize("locks", [True, False])
def test_what_another_process_wrote_is_read_before_the_teacher_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:
        monkeypatch.setattr(responses, "fcntl", None)
    one, other = Writer(), Writer()
    first, second = (teacher_store(tmp_path, writer) for writer in (one, other))
    first.find(ask(PROMPTS[:2]), 0)
    assert say(second.find(ask(PROMPTS), 0)) == ["3", "6", "9"]
    assert say(first.find(ask(PROMPTS), 1)) == ["3", "6", "9"]
    assert (one.asked, other.asked) == ([["a", "bb"]], [["ccc"]])


def test_the_first_text_of_the_file_counts_also_for_who_wrote_the_second(tmp_path: Path) -> None:
    """Two processes write to one prompt at the same time: both go on with one text, which a resumed run reads too."""
    earlier = teacher_store(tmp_path, Alternating("1"))  # type: ignore[arg-type]
    later = teacher_store(tmp_path, Alternating("2", between=lambda: earlier.find(ask(PROMPTS), 0)))  # type: ignore[arg-type]
    assert say(later.find(ask(PROMPTS), 0)) == ["1"] * 3
    resumed = Writer()
    assert say(teacher_store(tmp_path, resumed).find(ask(PROMPTS), 0)) == ["1"] * 3
    assert not resumed.asked


@pytest.mark.parametrize("locks", [True, False])
def test_a_second_text_in_the_file_counts_for_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    """Without locks another process may write between a look at the file and the own line."""
    cache, other = ResponseCache(tmp_path, {}), ResponseCache(tmp_path, {})
    cache.add([("z", "z", "0")])
    write = responses._write

    def late(file: Any, data: bytes) -> None:
        monkeypatch.setattr(responses, "_write", write)
        other.add([("a", "a", "1")])
        write(file, data)

    if locks:
        other.add([("a", "a", "1")])
    else:
        monkeypatch.setattr(responses, "fcntl", None)
        monkeypatch.setattr(responses, "_write", late)
    cache.add([("a", "a", "2"), ("b", "b", "3")])
    assert cache.texts == ResponseCache(tmp_path, {}).texts == {"z": "0", "a": "1", "b": "3"}
    assert cache.path.read_bytes().count(b'"key": "a"') == (1 if locks else 2)


def test_a_file_system_without_locks_serves_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        LOCK_EX = LOCK_SH = 0

        def flock(self, file: object, kind: int) -> None:
            raise OSError(38, "not implemented")

    monkeypatch.setattr(responses, "fcntl", Refusing())
    teacher_store(tmp_path, Writer()).find(ask(PROMPTS), 0)
    after = Writer()
    assert say(teacher_store(tmp_path, after).find(ask(PROMPTS), 0)) == ["3", "6", "9"]
    assert not after.asked


def test_lines_are_written_whole_and_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    write = responses._write
    monkeypatch.setattr(responses, "_write", lambda file, data: (written.append(data), write(file, data)))
    cache = ResponseCache(tmp_path, {})
    for number in range(3):
        cache.add([(f"{number}{name}", name, "x" * 20_000) for name in "abc"])
    assert len(written) == 3
    assert all(data.endswith(b"\n") for data in written)
    assert cache.path.read_bytes() == b"".join(written)
    assert [data.count(b"\n") for data in written] == [4, 3, 3]


def test_damaged_lines_are_told_once(tmp_path: Path) -> None:
    teacher_store(tmp_path, Writer()).find(ask(PROMPTS), 0)
    (file,) = (tmp_path / "run" / "responses").iterdir()
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + b'{"key": "to\n' + b"".join(lines[1:3]) + lines[3][:-9])
    after = Writer()
    store = teacher_store(tmp_path, after)
    store.find(ask(PROMPTS[:2]), 0)
    assert store.take_counts() == {"responses_missing": 0, "responses_unreadable": 0, "responses_damaged": 1}
    # the last line might have been under way; now that another stands behind it, it was not
    store.find(ask(PROMPTS), 1)
    assert after.asked == [["ccc"]]
    assert store.take_counts()["responses_damaged"] == 1
    store.find(ask(PROMPTS), 2)
    assert store.take_counts() == {"responses_missing": 0, "responses_unreadable": 0}


def test_a_line_under_way_is_read_when_it_is_whole(tmp_path: Path) -> None:
    cache = ResponseCache(tmp_path, {})
    cache.add([("a", "a", "1")])
    line = b'{"key": "b", "prompt": "b", "text": "2"}\n'
    for cut in range(1, len(line)):
        with cache.path.open("ab") as file:
            file.write(line[cut - 1 : cut])
        cache.refresh()
    assert cache.texts == {"a": "1", "b": "2"}
    assert cache.take_damaged() == 0


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no teacher here writes responses"):
        open_responses(TeacherResponses(), setup(tmp_path))
    with pytest.raises(RecipeError, match=r"responses.*max_new_tokens is 0"):
        section(type="teacher", max_new_tokens=0)
    with pytest.raises(RecipeError, match=r"responses\.type.*solutions"):
        section(type="solution")
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="which is a file"):
        section(type="teacher", cache=str(tmp_path / "file")).check()
    assert TeacherResponses(temperature=0.3).sampling(Sampling(1.0, top_k=5, max_new_tokens=7)) == Sampling(
        0.3, max_new_tokens=7
    )
    with pytest.raises(DataError, match="is empty"):
        section(type="jsonl", path=str(tmp_path / "file"), prompt_field="q", response_field="a").check()
    path = write(tmp_path / "r.jsonl", [{"q": "a", "a": "b"}])
    with pytest.raises(DataError, match=r"r\.jsonl:1: no field 'answer'"):
        section(type="jsonl", path=path, prompt_field="q", response_field="answer").check()
    with pytest.raises(RecipeError, match="there is no file"):
        section(type="jsonl", path=str(tmp_path / "none.jsonl"), prompt_field="q", response_field="a").check()


def test_threads_have_a_response_written_once_and_side_by_side(tmp_path: Path) -> None:
    """Two threads write two prompts at the same time; a third that wants one of them waits for it."""
    from concurrent.futures import ThreadPoolExecutor
    from threading import Barrier

    from understudy.teachers.stores.responses import ResponseCache, WrittenOnce

    together, asked = Barrier(2, timeout=20), []

    def generate(prompts: Sequence[Prompt]) -> list[str | None]:
        asked.extend(prompt.id for prompt in prompts)
        together.wait()
        return [f"to {prompt.id}" for prompt in prompts]

    texts = WrittenOnce(generate, ResponseCache(tmp_path, {"teacher": "t"}))
    requests = [Request(Prompt(id=name, text=name), 0, torch.tensor([1])) for name in ("a", "b", "a")]
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(lambda request: texts([request], [""]), requests))
    assert found == [[("to a",)], [("to b",)], [("to a",)]]
    assert sorted(asked) == ["a", "b"]


def test_a_response_that_another_thread_fails_to_get_is_asked_for_again(tmp_path: Path) -> None:
    """Not having been told is another thing than the teacher having none."""
    begun, go_on, asked = Event(), Event(), []

    def generate(prompts: Sequence[Prompt]) -> list[str | None]:
        asked.append(prompts[0].id)
        if len(asked) == 1:
            begun.set()
            assert go_on.wait(20)
            raise DataError("gone")
        return ["text"]

    texts = responses.WrittenOnce(generate, responses.ResponseCache(tmp_path, {"teacher": "t"}))
    request = Request(Prompt(id="a", text="a"), 0, torch.tensor([1]))
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(texts, [request], [""])
        assert begun.wait(20)
        second = threads.submit(texts, [request], [""])
        go_on.set()
        with pytest.raises(DataError, match="gone"):
            first.result(20)
        assert second.result(20) == [("text",)]
