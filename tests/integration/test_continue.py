"""Rejected samples that a teacher continues behind the accepted steps: what is kept, what is asked, who wrote what."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.chat_server import ChatServer, Request, Response, says
from tests.integration.test_responses import PROMPTS, Writer, ask, teacher_store
from tests.integration.test_rewards_train import Seen, events, graded, outcome
from tests.integration.test_verbal import CASES, SHORT, byte_tokenizer, case
from tests.runs import (
    BUILD,
    assert_same_run,
    grade_by_length,
    judge_by_length,
    metric_rows,
    train,
    train_in_two,
    weights,
)
from understudy import config, evaluate
from understudy.errors import DataError, RecipeError
from understudy.methods import OVD
from understudy.models import build_causal_lm, load_tokenizer, save_hf
from understudy.recipe import Recipe
from understudy.tasks import Arithmetic, build_tokenizer
from understudy.tasks.renderer import Renderer
from understudy.teachers import LocalTeacher
from understudy.teachers.judges.chat import ChatTeacher
from understudy.teachers.judges.verbal import VerbalTeacher
from understudy.teachers.judges.wording import Wording, accepted_part, rest_of
from understudy.teachers.stores.responses import TeacherResponses
from understudy.types import Author, Prompt, Sample, Verdict

PLAIN = Prompt("p", text="a")
CHAT = Prompt("p", messages=({"role": "user", "content": "2+2?"},))


# --- where steps begin, and the tokens before them --------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["a", "b c", " ", "", "7", "\n"]), max_size=6), st.sampled_from([";", "\n\n", ". "]))
def test_a_step_begins_where_its_question_says(parts: list[str], separator: str) -> None:
    sample = case("a", "", separator.join(parts))
    wording = Wording(step="{step}", separator=separator)
    starts, questions = wording.starts(sample, steps=True), wording.questions(sample, steps=True)
    assert len(starts) == len(questions)
    for start, question in zip(starts, questions, strict=True):
        (step,) = [piece.text for piece in question if piece.foreign]
        assert sample.text[start:].startswith(step)
    assert wording.starts(sample, steps=False) == (0,)


def test_steps_of_several_turns_begin_in_their_own_message() -> None:
    turns = [("assistant", "1;2"), ("user", "go;on"), ("assistant", "3")]
    sample = replace(CASES[0], messages=tuple({"role": role, "content": text} for role, text in turns))
    assert len(SHORT.questions(sample, steps=True)) == 3
    assert SHORT.starts(sample, steps=True) == (0, 2, 0)


TOKENIZERS = ("bytes", "addition", "words", "qwen", "stories")


def renderer_of(name: str, shared: Path) -> Renderer:
    if name == "bytes":
        return Renderer(byte_tokenizer(chat=True))
    if name == "qwen":
        return Renderer(load_tokenizer(str(shared / "tokenizers" / "qwen")))
    # SentencePiece, which begins a text with a space of its own
    stories = name == "stories"
    return Renderer(load_tokenizer(str(shared / "models" / "stories260K")) if stories else build_tokenizer(name))  # type: ignore[arg-type]


STEPS = {
    "addition": ("24=06;", "13=04#46"),
    "words": ("24 + 7 = 31 ;", " 31 - 5 = 26 # 26"),
    "bytes": ("Ünï 😀.\n\n", "Now 7."),
    "qwen": ("First, 2 + 2 = 4.\n\n", "So the answer is \\boxed{4}. 😀"),
    "stories": ("Lily ran.\n\n", "Then she fell. The end."),
}
"""An accepted beginning, and how it goes on."""


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_rest_of_its_own_response_gives_the_tokens_of_the_student(name: str, shared: Path) -> None:
    renderer = renderer_of(name, shared)
    prompt = CHAT if name in ("bytes", "qwen") else PLAIN
    ids = renderer.response(prompt, "".join(STEPS[name]))
    # a template may write more than the content
    said, after = renderer.decode(ids), STEPS[name][1]
    before = said[: said.index(after)]
    kept = renderer.cut(ids, before)
    assert torch.equal(kept, ids[: len(kept)])
    assert renderer.decode(kept).strip() == before.strip() != ""
    assert torch.equal(renderer.continuation(prompt, kept, before, after), ids[len(kept) :])


@pytest.mark.parametrize("name", ["bytes", "qwen", "stories"])
def test_as_much_is_kept_as_says_no_more(name: str, shared: Path) -> None:
    """Wherever the text is cut, inside words and characters of several tokens too, what is kept and what is written behind it
    say the text; one token more would say more than was accepted."""
    renderer = renderer_of(name, shared)
    text = "".join(STEPS["qwen"]) if name == "qwen" else "".join(STEPS[name])
    ids = renderer.response(PLAIN, text)[:-1]
    for end in range(len(text)):
        kept = renderer.cut(ids, text[:end])
        assert torch.equal(kept, ids[: len(kept)])
        assert text[:end].startswith(renderer.decode(kept))
        assert not text[:end].startswith(renderer.decode(ids[: len(kept) + 1])) or end == 0
        if text[end:].strip():
            rest = renderer.continuation(PLAIN, kept, text[:end], text[end:])
            assert int(rest[-1]) == renderer.plain_end.token_id
            assert renderer.decode(torch.cat([kept, rest[:-1]])) == text


def test_tokens_that_no_tokenizer_would_write_stay(shared: Path) -> None:
    """The student may say "ran" in two tokens; what follows is then encoded by itself."""
    renderer = renderer_of("qwen", shared)
    kept = torch.tensor([renderer.tokenizer.convert_tokens_to_ids(one) for one in ("r", "a", "n", "ĊĊ")])
    rest = renderer.continuation(CHAT, kept, "ran\n\n", "So she fell.")
    assert renderer.decode(kept) == "ran\n\n"
    assert rest.tolist() == renderer.tokenizer("So she fell.<|im_end|>")["input_ids"]


def test_what_the_student_cannot_say_or_read_as_an_answer_is_refused(shared: Path) -> None:
    qwen, addition = renderer_of("qwen", shared), renderer_of("addition", shared)
    kept = torch.tensor(addition.tokenizer("1;")["input_ids"])
    for text in ("", " ", "<eos>"):
        with pytest.raises(DataError, match="empty"):
            addition.continuation(PLAIN, kept, "1;", text)
    for text in ("vier", "1<eos>2"):
        with pytest.raises(DataError, match="cannot"):
            addition.continuation(PLAIN, kept, "1;", text)
    # a turn that is spelled in the text ends nothing
    ids = qwen.continuation(CHAT, torch.tensor([], dtype=torch.int64), "", "4<|im_end|>\n<|im_start|>user")
    assert ids.tolist().count(qwen.turn_end.token_id) == 1
    thought = "<think>\nTwo and two.\n\n"
    ids = torch.tensor(qwen.tokenizer(thought)["input_ids"])
    with pytest.raises(DataError, match="inside its thoughts"):
        qwen.continuation(CHAT, ids, thought, "That is 4.")
    assert qwen.continuation(CHAT, ids, thought, "That is 4.\n</think>\n\n4").numel() > 5


def judged_sample(steps: Sequence[float], text: str = "1;22;3") -> Sample:
    tokenizer = build_tokenizer("addition")
    ids = torch.tensor([5, 6, *tokenizer(text)["input_ids"], tokenizer.eos_token_id])
    author = torch.tensor([0, 0] + [1] * (len(ids) - 2), dtype=torch.uint8)
    starts = SHORT.starts(case("a", "", text), steps=True)
    return Sample(
        PLAIN,
        3,
        ids,
        author,
        2,
        "stop",
        text,
        rollout_logprob=-torch.arange(len(ids), dtype=torch.float32),
        policy_version=torch.full((len(ids),), 7),
        verdict=Verdict(min(steps), tuple(steps), starts),
    )


@pytest.mark.parametrize(
    ("steps", "kept"), [((3, 9, 9), None), ((7, 6.9, 9), ";1;"), ((9, 7, 0), ";1;22;"), ((8, 2, 1), ";1;")]
)
def test_the_accepted_part_ends_before_the_first_rejected_step(steps: tuple[float, ...], kept: str | None) -> None:
    """With the student's own ids, authors, log-probabilities and versions, bit for bit. What stands before the first step is
    no step."""
    sample = judged_sample(steps, ";1;22;3")
    part = accepted_part(sample, 7.0, Renderer(build_tokenizer("addition")))
    assert (None if part is None else part.text) == kept
    if part is not None:
        size = 2 + len(part.text)
        for name in ("token_ids", "author", "rollout_logprob", "policy_version"):
            assert torch.equal(getattr(part, name), getattr(sample, name)[:size])
        assert (part.key, part.verdict) == (sample.key, None)


# --- what the teacher is asked ------------------------------------------------------------------------------------------------


def test_the_question_shows_problem_and_beginning() -> None:
    """Within fences that neither can close."""
    question = rest_of(CHAT, "1;\n==== 00 ====").text or ""
    (fence,) = {line for line in question.splitlines() if line.startswith("==== ") and line != "==== 00 ===="}
    assert question.count(f"\n{fence}\n") == 4
    assert f"{fence}\n2+2?\n{fence}" in question
    assert f"{fence}\n1;\n==== 00 ====\n{fence}" in question
    assert rest_of(PLAIN, "1;", "{steps}|{problem}") == replace(PLAIN, text="1;|a", quoted=("1;", "a"))
    with pytest.raises(RecipeError, match=r"continue_template has no \{steps\}"):
        config.parse(TeacherResponses, {"continue_template": "{problem}"}, "responses")


def test_each_beginning_is_continued_once(tmp_path: Path) -> None:
    """For each (step, slot, beginning, template); what was written before is read again. A slot without a beginning holds
    what it holds without any."""
    writer = Writer()
    store = teacher_store(tmp_path, writer, continue_template="{steps}")
    requests = ask(PROMPTS[:1], 3)
    starts = {"a#0": judged_sample([9], "1;"), "a#1": judged_sample([9], "1;22;")}
    found = store.find(requests, 4, [0, 1, 2], {name: drop_end(start) for name, start in starts.items()})
    # the writer answers with the length of its question
    assert [None if ids is None else store._renderer.decode(ids) for ids in found] == ["2", "5", "3"]
    (asked,) = writer.asked
    assert [name.rpartition("/")[0] for name in asked] == ["a@4/0", "a@4/1", "a@4"]
    again = Writer()
    other = teacher_store(tmp_path, again, continue_template="{steps}")
    begun = {"a#0": drop_end(starts["a#0"])}
    assert torch.equal(other.find(requests[:1], 4, [0], begun)[0], found[0])  # type: ignore[arg-type]
    assert again.asked == []
    other.find(requests[:1], 4, [0], {"a#0": drop_end(starts["a#1"])})
    teacher_store(tmp_path, again, continue_template="{problem}{steps}").find(requests[:1], 4, [0], begun)
    assert [len(names) for names in again.asked] == [1, 1]
    mute = teacher_store(tmp_path / "mute", lambda prompts: ["vier"] * len(prompts))  # type: ignore[arg-type]
    assert mute.find(requests[:1], 4, [0], begun) == [None]
    assert mute.take_counts() == {"responses_missing": 1, "responses_unreadable": 1}


def drop_end(sample: Sample) -> Sample:
    length = len(sample.token_ids) - 1
    return replace(sample, token_ids=sample.token_ids[:length], author=sample.author[:length])


# --- runs -------------------------------------------------------------------------------------------------------------------


def number_of(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=2).digest(), "big")


def digit_of(text: str) -> int:
    """First steps are mostly good."""
    number = number_of(text)
    return 8 if text.startswith("|") and number % 4 else number % 10


def by_question(request: Request, before: int) -> Response:
    """A digit for a step, a response to a problem, the rest of a response: by the words of the question alone."""
    kind, _, text = request.question.partition("|")
    if kind == "judge":
        return says(str(digit_of(text)))
    rest = f"{number_of(request.question) % 1000}"
    return says(f"{rest};#{rest}" if kind == "go on" else f"{rest}=#{rest[::-1]}1")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


@contextmanager
def continuing(folder: Path, answer: Any = by_question, **keys: Any) -> Iterator[dict[str, Any]]:
    """Changes of a run whose chat teacher judges steps and continues them."""
    with ChatServer(answer) as server:
        judge = {"step_template": "judge|{steps}|{step}", "step_separator": ";", "constrain": "none"}
        keys["train"] = {"prompts_per_step": 8} | keys.get("train", {})
        changes = outcome(folder, "ovd", **{"threshold": 6, "steps": True, "on_reject": "continue"} | keys)
        changes |= {"teacher": {"type": "chat", "url": server.url, "model": "m", "max_concurrency": 2} | judge}
        changes |= {"responses": {"type": "teacher", "continue_template": "go on|{problem}{steps}"}}
        yield changes | {"task": {"num_solutions": 50}}


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> dict[str, Sample]:
    """Every sample that the judge read, with its verdict, by the step and its key."""
    found: dict[str, Sample] = {}
    plain = ChatTeacher.judge

    def judge(self: ChatTeacher, samples: Sequence[Sample], **options: Any) -> list[Verdict]:
        said = plain(self, samples, **options)
        found.update({one.key: replace(one, verdict=verdict) for one, verdict in zip(samples, said, strict=True)})
        return said

    monkeypatch.setattr(ChatTeacher, "judge", judge)
    return found


@pytest.mark.slow
def test_the_students_steps_stand_and_the_teacher_goes_on(
    tmp_path: Path, seen: Seen, written: dict[str, Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids, log-probabilities and versions of what is kept are the student's to the last bit; every token is trained, by its
    author, with the advantage of the whole response."""
    graded(monkeypatch, grade_by_length)
    renderer = Renderer(build_tokenizer("addition"))
    with continuing(tmp_path, train={"samples_per_prompt": 4, "steps": 1}) as changes:
        row = metric_rows(train(tmp_path, **changes))[0]
    (samples,) = seen.updates
    kinds = {"accepted": 0, "whole": 0, "continued": 0}
    kept_tokens = filled_tokens = 0
    for sample in samples:
        own = written[sample.key]
        part = None if own.verdict is None else own.verdict
        assert part is not None
        assert part.score is not None
        response = slice(sample.prompt_length, None)
        if part.score >= 6:
            kinds["accepted"] += 1
            assert torch.equal(sample.token_ids, own.token_ids)
            continue
        filled_tokens += sample.num_response_tokens
        start = accepted_part(own, 6, renderer)
        if start is None:
            kinds["whole"] += 1
            assert set(sample.author[response].tolist()) == {int(Author.TEACHER)}
            continue
        kinds["continued"] += 1
        size = len(start.token_ids)
        kept_tokens += start.num_response_tokens
        for name in ("token_ids", "author", "rollout_logprob", "policy_version"):
            expected = getattr(own, name)[:size]
            torch.testing.assert_close(getattr(sample, name)[:size], expected, rtol=0, atol=0, equal_nan=True)
        assert set(sample.author[sample.prompt_length : size].tolist()) == {int(Author.STUDENT)}
        assert set(sample.author[size:].tolist()) == {int(Author.TEACHER)}
        assert sample.rollout_logprob is not None
        assert sample.policy_version is not None
        assert bool(sample.rollout_logprob[size:].isnan().all())
        assert set(sample.policy_version[size:].tolist()) == {-1}
        assert sample.text.startswith(start.text)
        asked = number_of(f"go on|{sample.prompt.text}{start.text}") % 1000
        assert sample.text == f"{start.text}{asked};#{asked}"
        assert int(sample.token_ids[-1]) == renderer.plain_end.token_id
    assert min(kinds.values()) > 0
    for micro in seen.micros[0]:
        authors = torch.cat([sample.author[sample.prompt_length :] for sample in micro.samples])
        assert bool(micro.batch.mask.all())
        assert torch.equal(micro.batch.on_policy, authors == Author.STUDENT)
    assert row["continued"] == pytest.approx(kinds["continued"] / (kinds["continued"] + kinds["whole"]))
    assert row["kept_tokens"] == pytest.approx(kept_tokens / filled_tokens)
    assert row["filled"] == pytest.approx((len(samples) - kinds["accepted"]) / len(samples))


def without(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def first_step_is_bad(request: Request, before: int) -> Response:
    return says("0") if request.question.startswith("judge|") else by_question(request, before)


@pytest.mark.slow
def test_a_first_step_that_is_rejected_leaves_the_slot_to_the_teacher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run as on_reject: teacher, to the last bit."""
    graded(monkeypatch, grade_by_length)
    with continuing(tmp_path, first_step_is_bad) as changes:
        one = train(tmp_path / "continue", **changes)
        other = train(tmp_path / "teacher", **changes | {"method": changes["method"] | {"on_reject": "teacher"}})
    rows = metric_rows(one)
    assert all(row["continued"] == row["kept_tokens"] == 0.0 and row["filled"] == 1.0 for row in rows)
    assert without(rows, "continued", "kept_tokens") == metric_rows(other)
    assert_same_weights(one, other)


@pytest.mark.slow
def test_steps_that_are_all_accepted_leave_plain_ovd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graded(monkeypatch, grade_by_length)
    with continuing(tmp_path, lambda request, before: says("7")) as changes:
        one = train(tmp_path / "continue", **changes)
        changes |= {"method": changes["method"] | {"on_reject": "drop", "steps": False}, "responses": None}
        changes["teacher"] |= {"template": "judge|{response}"}
        other = train(tmp_path / "plain", **changes)
    assert all(row["accepted"] == 1.0 and row["filled"] == 0.0 for row in metric_rows(one))
    steps = ("signal_bytes_per_token", "responses_missing", "responses_unreadable")
    assert without(metric_rows(one), *steps) == without(metric_rows(other), *steps)
    assert_same_weights(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("overlap", [None, {"max_staleness": 0}], ids=["in turns", "overlapped"])
def test_continued_samples_go_on_after_a_resume(
    tmp_path: Path, overlap: dict[str, Any] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    graded(monkeypatch, grade_by_length)
    with continuing(tmp_path, kl_coef=0.0, train={"samples_per_prompt": 4, "steps": 4}) as changes:
        changes |= {"rollout": {"type": "hf", "copy": True}, "async": overlap}
        whole = train(tmp_path / "whole", **changes)
        assert_same_run(whole, train_in_two(tmp_path / "cut", 2, **changes))
    assert sum(row["continued"] for row in metric_rows(whole)) > 0


@pytest.mark.slow
def test_ahead_of_the_update_the_same_samples_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graded(monkeypatch, grade_by_length)
    with continuing(tmp_path, kl_coef=0.0, train={"samples_per_prompt": 4, "steps": 1}) as changes:
        changes |= {"rollout": {"type": "hf", "copy": True}}
        plain = train(tmp_path / "plain", **changes)
        ahead = train(tmp_path / "ahead", **changes | {"async": {"max_staleness": 1}})
    assert metric_rows(plain)[0]["continued"] > 0
    assert_same_run(plain, ahead)


@pytest.mark.slow
def test_a_teacher_that_says_nothing_leaves_the_slot_empty(
    tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what was accepted is trained; the empty slots are counted and told."""
    graded(monkeypatch, grade_by_length)

    def mute(request: Request, before: int) -> Response:
        return by_question(request, before) if request.question.startswith("judge|") else says("")

    with continuing(tmp_path, mute, train={"samples_per_prompt": 4}) as changes:
        run_dir = train(tmp_path, **changes)
    for row, samples in zip(metric_rows(run_dir), seen.updates, strict=True):
        assert row["slots_empty"] == 1.0
        assert "continued" not in row
        assert all(set(one.author[one.prompt_length :].tolist()) == {int(Author.STUDENT)} for one in samples)
    assert events(run_dir).count("places of rejected samples stay empty") == 1


@pytest.mark.slow
def test_the_digit_of_a_continued_sample_is_its_own(
    tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under reward: verbal the whole is judged again, the teacher's part included."""
    with continuing(tmp_path, reward="verbal", train={"samples_per_prompt": 4, "steps": 1}) as changes:
        train(tmp_path, **changes)
    wording = Wording(step="judge|{steps}|{step}", separator=";")
    for sample in seen.updates[0]:
        texts = ["".join(piece.text for piece in one) for one in wording.questions(sample, steps=True)]
        assert sample.reward == min(digit_of(text.removeprefix("judge|")) for text in texts) / 9
    assert any(len(set(one.author[one.prompt_length :].tolist())) == 2 for one in seen.updates[0])


@pytest.mark.slow
def test_a_judge_that_is_loaded_here_continues_in_words_of_its_own(
    tmp_path: Path, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a token for each byte and a chat template, the student the alphabet of the task: what its random weights write is
    read as text, which the student can say or not. An evaluation has it write too."""
    monkeypatch.setattr(VerbalTeacher, "judge", judge_by_length)
    graded(monkeypatch, grade_by_length)
    tokenizer = byte_tokenizer(chat=True)
    asked: list[str] = []

    def generate(self: LocalTeacher, prompts: Sequence[Prompt], **options: Any) -> list[str | None]:
        texts = respond(self, prompts, **options)
        assert len(texts) == len(prompts)
        asked.extend(str((prompt.messages or ({},))[0]["content"]) for prompt in prompts)
        return [None if text is None else f"{len(text)};#{len(text)}" for text in texts]

    respond = LocalTeacher.respond
    monkeypatch.setattr(LocalTeacher, "respond", generate)
    sizes = BUILD | {"max_position_embeddings": 256}
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    save_hf(build_causal_lm(sizes, vocab_size=len(tokenizer), **ends), tokenizer, tmp_path / "judge")
    keys = {"steps": True, "on_reject": "continue", "threshold": 6, "kl_coef": 0.0}
    changes = outcome(tmp_path, "ovd", **keys, train={"prompts_per_step": 8, "samples_per_prompt": 4, "steps": 2})
    changes |= {"teacher": {"type": "verbal", "model": str(tmp_path / "judge"), "step_separator": ";"}}
    section = {"type": "teacher", "max_new_tokens": 100, "continue_template": "go on|{problem}{steps}"}
    changes |= {"responses": section, "task": {"num_solutions": 50}}
    for how in ("continue", "revise"):
        rejection = {"problems": 10, "reject_below": 6, "on_reject": how, "max_attempts": 2}
        run_dir = train(tmp_path / how, **changes | {"eval": rejection})
        found = json.loads((run_dir / "eval" / "step_000002.json").read_text())["metrics"]
        assert {"assisted", "assisted_share"} <= found.keys() or {"revision@2", "attempts"} <= found.keys()
        assert sum(row["continued"] for row in metric_rows(run_dir)) > 0
        # the run's judge and its words
        again = evaluate(run_dir, quiet=True)
        assert {name: one.value for name, one in again.metrics.items()} == {
            name: found[name]["value"] for name in found
        }
    continued = [
        one for part in seen.updates for one in part if len(set(one.author[one.prompt_length :].tolist())) == 2
    ]
    assert continued
    assert all(
        f"go on|{one.prompt.text}{one.text.rpartition(';#')[0].rpartition(';')[0]};" in asked for one in continued
    )


# --- what is refused ----------------------------------------------------------------------------------------------------------


def test_steps_are_needed() -> None:
    with pytest.raises(ValueError, match="steps is false"):
        OVD(on_reject="continue")
    assert OVD(on_reject="continue", steps=True).uses(1).continues
    assert not OVD().uses(1).continues


CHAT_TEACHER = {"type": "chat", "url": "http://h/v1", "model": "m"}
REFUSED = {
    "no responses": ({"responses": None}, "no response does that was written before"),
    "solutions": ({"responses": {"type": "solutions"}}, "no response does that was written before"),
    "a judge that reads and writes no steps": ({"teacher": {"type": "verifier"}}, "reads whole responses"),
    "whole responses": ({"method": {"type": "ovd", "on_reject": "continue"}}, "steps is false"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_who_cannot_continue_is_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    changes, match = REFUSED[name]
    values = {
        "run_dir": str(tmp_path / "run"),
        "student": {"model": "nowhere"},
        "task": {"type": "arithmetic"},
        "teacher": CHAT_TEACHER,
        "responses": {"type": "teacher"},
        "method": {"type": "ovd", "on_reject": "continue", "steps": True},
        "train": {"steps": 1, "samples_per_prompt": 2},
    }
    config.parse(Recipe, values)
    with pytest.raises(RecipeError, match=match):
        config.parse(Recipe, {key: value for key, value in (values | changes).items() if value is not None})


def test_an_environment_would_have_to_answer_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "run_dir": str(tmp_path / "run"),
        "student": {"model": "nowhere"},
        "task": {"type": "mix", "parts": {"one": {"type": "arithmetic"}}},
        "teacher": CHAT_TEACHER,
        "responses": {"type": "teacher"},
        "method": {"type": "ovd", "on_reject": "continue", "steps": True},
        "train": {"steps": 1, "samples_per_prompt": 2},
    }
    config.parse(Recipe, values)
    monkeypatch.setattr(Arithmetic, "environment", lambda task, prompt: None)
    with pytest.raises(RecipeError, match="environment"):
        config.parse(Recipe, values)
