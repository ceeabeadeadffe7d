"""Student and teacher with different chat templates: whose rendering is read, where a turn ends, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.test_doctor import examined, levels, parts_of
from tests.integration.test_templates import GEMMA, with_tokens
from tests.integration.test_verbal import CHATML
from tests.runs import BUILD, metric_rows, tiny_recipe, train
from tests.serving import serve_beside
from tests.tiny_models import plain_logp
from understudy import config
from understudy.errors import CheckpointError, DataError, RecipeError, ScoreError, TemplateError, VocabularyError
from understudy.models import build_causal_lm, save_hf
from understudy.recipe import Recipe
from understudy.recipe.checks import check
from understudy.recipe.load import engine_setup
from understudy.serve import Scorer, Settings
from understudy.tasks import Renderer
from understudy.teachers import LocalTeacher, Setup
from understudy.teachers.remote.served import Served
from understudy.teachers.rendering import OwnRendering
from understudy.types import Author, Need, Prompt, Request, Sample

SPECIAL = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>"]
STUDENT, TEACHER = with_tokens(CHATML, SPECIAL, "<|im_end|>"), with_tokens(GEMMA, SPECIAL, "<|im_end|>")
NUM_TOKENS = len(STUDENT)
END, OTHER = STUDENT.convert_tokens_to_ids(["<|im_end|>", "<end_of_turn>"])
ALL: frozenset[Need] = frozenset({"sampled", "topk", "full"})
ROUNDING = 1e-12
"""float64: another order of sums."""


def setup(**changes: Any) -> Setup:
    values = {"name": "t", "vocab_size": NUM_TOKENS, "temperature": 0.7, "renderer": Renderer(STUDENT)}
    return Setup(**values | changes)


def model(**changes: Any) -> Any:
    sizes = BUILD | {"hidden_size": 32, "max_position_embeddings": 256} | changes
    built = build_causal_lm(sizes, vocab_size=NUM_TOKENS, eos_token_id=END, pad_token_id=0, dtype="float64")
    with torch.no_grad():
        built.get_output_embeddings().weight.mul_(8.0)
    return built


def answered(question: str, text: str) -> Sample:
    prompt = Prompt(question, messages=({"role": "user", "content": question},))
    renderer = Renderer(STUDENT)
    ids, response = renderer.start(prompt), renderer.response(prompt, text)
    author = torch.tensor([Author.PROMPT] * len(ids) + [Author.STUDENT] * len(response), dtype=torch.uint8)
    return Sample(prompt, 0, torch.cat([ids, response]), author, len(ids), "stop", text)


def own(inner: Any, **changes: Any) -> OwnRendering:
    told = setup(**changes)
    judge = LocalTeacher(inner, name="t", vocab_size=NUM_TOKENS, temperature=0.7)
    return OwnRendering(judge, told, Renderer(TEACHER))


def test_scores_are_of_the_response_behind_the_teachers_own_prompt() -> None:
    """By hand: the teacher's text as its template writes it, its end in place of the student's, token by token."""
    samples, base = [answered("2+2?", "4"), answered(" what is 10 + 10? ", "it is 20")], model()
    teacher = own(base)
    for sample, scores in zip(samples, teacher.score(samples, ALL, k=4), strict=True):
        messages = [dict(message) for message in sample.prompt.messages or ()]
        opened = TEACHER.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        said = [*messages, {"role": "assistant", "content": sample.text}]
        whole = torch.tensor(TEACHER.apply_chat_template(said, return_dict=False)[:-1])
        rows = plain_logp(base, whole, temperature=0.7)[len(opened) - 1 :]
        # the student's name for the end is the teacher's
        rows[:, [END, OTHER]] = rows[:, [OTHER, END]]
        picked = rows.gather(-1, sample.response_ids[:, None]).squeeze(-1)
        top = rows.topk(4)
        assert torch.equal(scores.token_ids, sample.response_ids)
        torch.testing.assert_close(scores.logprob, picked, atol=ROUNDING, rtol=0)
        assert scores.topk_ids is not None
        assert torch.equal(scores.topk_ids, top.indices)
        torch.testing.assert_close(scores.topk_logprob, top.values, atol=ROUNDING, rtol=0)
        head = teacher.head_for(None)
        assert head is not None
        assert scores.hidden is not None
        torch.testing.assert_close(head.logits(scores.hidden).log_softmax(-1), rows, atol=ROUNDING, rtol=0)
    assert teacher.num_prompt_tokens(samples[0]) == len(Renderer(TEACHER).start(samples[0].prompt))


def test_a_served_teacher_reads_its_own_too() -> None:
    """Whole rows included: the head that travels has its ends exchanged here."""
    samples, base = [answered("2+2?", "4"), answered("10+10?", "it is 20")], model().float()
    told = setup(teacher_tokenizer=TEACHER)
    expected = own(base).score(samples, ALL, k=4)
    with serve_beside(Scorer(base, TEACHER, name="tiny"), Settings(model="tiny", port=0)) as url:
        inner = Served(url=url, tokenizer="tiny", rendering="own").open(told)
        try:
            teacher = OwnRendering(inner, told, Renderer(TEACHER))
            head = teacher.head_for(None)
            assert head is not None
            for found, other in zip(teacher.score(samples, ALL, k=4), expected, strict=True):
                assert found.hidden is not None
                torch.testing.assert_close(found.logprob, other.logprob, atol=1e-4, rtol=0)
                assert found.topk_ids is not None
                assert torch.equal(found.topk_ids, other.topk_ids)
                rows = head.logits(found.hidden).log_softmax(-1)
                picked = rows.gather(-1, found.token_ids[:, None]).squeeze(-1)
                torch.testing.assert_close(picked, other.logprob, atol=1e-4, rtol=0)
        finally:
            inner.close()


def test_samples_data_and_stops_have_one_end(tmp_path: Path) -> None:
    """ChatML over a tokenizer whose EOS is another token: what is imitated, sampled and stopped at is <|im_end|>."""
    changes = chats(tmp_path, template=CHATML)
    for name in ("student", "teacher"):
        file = tmp_path / name / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<bos>"}))
    changes["responses"] = {"type": "solutions"}
    changes["method"] = {"type": "gkd", "on_policy_share": 0.5}
    recipe = recipe_of(tmp_path, **changes)
    with parts_of(recipe) as parts:
        collector = parts.rollouts.collector
        requests = [Request(prompt, 0, ids) for prompt, ids in parts.prompts[:4]]
        given = collector.given(requests, 0)
        assert {int(one.token_ids[-1]) for one in given if one is not None} == {END}
        assert {one.text for one in given if one is not None} == {str(request.prompt.solution) for request in requests}
        assert END in engine_setup(recipe, parts.loaded).stop_ids
        written = collector.play(requests, 0, "sample")
        stops = parts.loaded.renderer.stop_ids
        assert all(int(one.token_ids[-1]) in stops for one in written if one.finish == "stop")
    rows = metric_rows(train(tmp_path, **changes))
    assert len(rows) >= 2


def test_a_teacher_with_the_students_template_scores_as_without() -> None:
    samples, base = [answered("2+2?", "4")], model()
    plain = LocalTeacher(base, name="t", vocab_size=NUM_TOKENS, temperature=0.7)
    same = OwnRendering(plain, setup(), Renderer(STUDENT))
    (found,), (expected,) = same.score(samples, ALL, k=3), plain.score(samples, ALL, k=3)
    for name in ("logprob", "topk_ids", "topk_logprob", "hidden", "entropy"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert same.fingerprint != own(base).fingerprint


def test_a_prompt_that_becomes_too_long_has_no_score() -> None:
    sample = answered("2+2?", "4")
    # the student's whole sample fits; the teacher's template is longer
    teacher = own(model(max_position_embeddings=len(sample.token_ids) + 1))
    (found,) = teacher.score([sample], frozenset({"sampled"}))
    longer = Renderer(TEACHER).start(sample.prompt).numel() > sample.prompt_length + 2
    assert bool(torch.isnan(found.logprob).all()) == longer  # type: ignore[arg-type]


def test_what_cannot_be_aligned_is_refused() -> None:
    sample = answered("2+2?", "4")
    author = sample.author.clone()
    author[-2] = Author.ENVIRONMENT
    with pytest.raises(ScoreError, match="has several turns"):
        own(model()).score([replace(sample, author=author)], frozenset({"sampled"}))
    opened = with_tokens(CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}", SPECIAL, "<|im_end|>")
    with pytest.raises(
        RecipeError, match="student's prompts end with no thinking and those of teacher 't' with <think>"
    ):
        OwnRendering(LocalTeacher(model(), name="t", vocab_size=NUM_TOKENS), setup(), Renderer(opened))


EMPTY = "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"


def test_a_closed_block_and_no_block_both_ask_for_an_answer() -> None:
    """A student of Qwen2.5 and a teacher of Qwen3 whose thinking is off, and the other way round."""
    closed = with_tokens(CHATML + EMPTY, SPECIAL, "<|im_end|>")
    for student, teacher in ((STUDENT, closed), (closed, STUDENT)):
        reader = OwnRendering(
            LocalTeacher(model(), name="t", vocab_size=NUM_TOKENS), setup(renderer=Renderer(student)), Renderer(teacher)
        )
        sample = answered("2+2?", "4")
        shown = [*Renderer(teacher).start(sample.prompt).tolist(), *sample.response_ids.tolist()]
        assert reader._shown(sample).token_ids.tolist() == shown


def test_an_end_that_the_student_lacks_is_refused() -> None:
    """Also one between its tokens."""
    plain = LocalTeacher(model(), name="t", vocab_size=NUM_TOKENS)
    with pytest.raises(RecipeError, match=f"ends a turn with token {OTHER}, which the student lacks"):
        OwnRendering(plain, setup(absent=(OTHER,)), Renderer(TEACHER))


# --- a run -------------------------------------------------------------------------------------------------------------


def chats(folder: Path, *, template: str, teacher: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Changes that distil a chat teacher with that template into a ChatML student."""
    for name, tokenizer, hidden in (
        ("student", STUDENT, 16),
        ("teacher", with_tokens(template, SPECIAL, "<|im_end|>"), 32),
    ):
        sizes = BUILD | {"hidden_size": hidden, "max_position_embeddings": 512}
        save_hf(
            build_causal_lm(sizes, vocab_size=NUM_TOKENS, eos_token_id=END, pad_token_id=0), tokenizer, folder / name
        )
    rows = [{"q": f"{i}+{i}?", "a": str(2 * i), "s": f"It is {2 * i}."} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "student": {"model": str(folder / "student"), "build": None} | changes.pop("student", {}),
        "teacher": {"type": "local", "model": str(folder / "teacher")} | (teacher or {}),
        "task": {
            "type": "jsonl",
            "path": str(folder / "rows.jsonl"),
            "prompt_field": "q",
            "reference_field": "a",
            "solution_field": "s",
            "verifier": "exact",
        },
        "method": {"type": "gkd"},
        "sampling": {"max_new_tokens": 8},
        "train": {"steps": 2, "prompts_per_step": 4, "lr": 1e-3, "save_samples_every": 0},
    } | changes


def recipe_of(folder: Path, **changes: Any) -> Recipe:
    return config.parse(Recipe, tiny_recipe(folder, **changes))


def test_a_teacher_that_ends_turns_otherwise_has_to_read_its_own(tmp_path: Path) -> None:
    changes = chats(tmp_path, template=GEMMA)
    with pytest.raises(
        VocabularyError,
        match=r"end a turn with different tokens: '<\|im_end\|>' \(id \d+\) for the student, '<end_of_turn>' .*rendering: own",
    ):
        check(recipe_of(tmp_path, **changes))
    changes = chats(tmp_path, template=GEMMA, teacher={"rendering": "own"})
    found = examined(recipe_of(tmp_path, **changes))
    assert levels(found) == {}
    assert "the teacher's own template ends a turn with '<end_of_turn>'" in found["end of a response"].found
    shown = found["chat template"].found
    assert "<|im_start|>user" in shown
    assert "<start_of_turn>user" in shown
    rows = metric_rows(train(tmp_path, **changes))
    assert len(rows) >= 2


@pytest.mark.parametrize(
    ("template", "written"),
    [
        (
            CHATML.replace(
                "{{ m['content'] }}",
                "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
            ),
            r"'<think>\n\n</think>\n\n' before a response and '' before its end",
        ),
        (CHATML.replace("<|im_end|>", "\n<|im_end|>"), r"'' before a response and '\n' before its end"),
    ],
)
def test_what_a_teachers_own_template_has_around_a_response_is_named(
    tmp_path: Path, template: str, written: str
) -> None:
    """As of Qwen3 with thinking on, which puts an empty block before an answer, and of Apriel."""
    found = examined(recipe_of(tmp_path, **chats(tmp_path, template=template, teacher={"rendering": "own"})))
    assert found["chat template"].level == "warning"
    assert f"whose template writes {written}; the student's writes '' and ''" in found["chat template"].found


def test_another_template_with_the_same_end_is_shown(tmp_path: Path) -> None:
    template = CHATML.replace("<|im_start|>", "<start_of_turn>")
    found = examined(recipe_of(tmp_path, **chats(tmp_path, template=template)))
    assert found["chat template"].level == "warning"
    assert "rendering: own" in found["chat template"].advice
    assert "<|im_start|>user" in found["chat template"].found
    assert "<start_of_turn>user" in found["chat template"].found


def test_eos_that_no_template_writes_need_not_agree(tmp_path: Path) -> None:
    """A base student (EOS <|endoftext|>) and a chat teacher (EOS <|im_end|>) whose templates are one: Qwen2.5's."""
    changes = chats(tmp_path, template=CHATML)
    for name, eos in (("student", "<bos>"), ("teacher", "<|im_end|>")):
        file = tmp_path / name / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": eos}))
    assert "a response ends with '<|im_end|>', as the chat template ends a turn" in check(
        recipe_of(tmp_path, **changes)
    )
    plain = changes | {"task": changes["task"] | {"chat": False}}
    with pytest.raises(VocabularyError, match=r"EOS differs: '<bos>' \(id \d+\) for the student, '<\|im_end\|>'"):
        check(recipe_of(tmp_path, **plain))


ALTERNATING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + GEMMA


def test_data_that_a_teachers_own_template_cannot_show_is_found_before_the_run(tmp_path: Path) -> None:
    """As Gemma 2's, which has no system message; also far behind the first rows."""
    changes = chats(tmp_path, template=ALTERNATING, teacher={"rendering": "own"})
    asked = [{"q": f"{i}+{i}?", "a": str(2 * i), "s": "x"} for i in range(40)]
    told = {"q": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "1+1?"}], "a": "2", "s": "x"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*asked, told]))
    with pytest.raises(TemplateError, match=r"the teacher cannot be shown all data: .* no system here"):
        check(recipe_of(tmp_path, **changes))
    with pytest.raises(TemplateError, match=r"teacher 't' cannot read its own rendering: .* no system here"):
        prompt = replace(answered("2+2?", "4"), prompt=Prompt("p", messages=tuple(told["q"])))  # type: ignore[arg-type]
        OwnRendering(
            LocalTeacher(model(), name="t", vocab_size=NUM_TOKENS),
            setup(),
            Renderer(with_tokens(ALTERNATING, SPECIAL, "<|im_end|>")),
        ).score([prompt], frozenset({"sampled"}))
    # and what it leaves out is named
    (tmp_path / "teacher" / "chat_template.jinja").write_text(
        GEMMA.replace("for m in messages", "for m in messages[-1:]")
    )
    lines = " ".join(check(recipe_of(tmp_path, **changes)))
    assert "the teacher does not read messages of role 'system'" in lines
    assert "the student does not read" not in lines


def test_a_setting_that_no_template_reads_is_named(tmp_path: Path) -> None:
    changes = chats(tmp_path, template=CHATML + "{# enable_thinking #}")
    changes["student"]["template_kwargs"] = {"enable_thinking": False, "enable_thinkng": False}
    lines = " ".join(check(recipe_of(tmp_path, **changes)))
    assert "no chat template reads enable_thinkng of student.template_kwargs" in lines


def test_own_rendering_is_of_chats(tmp_path: Path) -> None:
    changes = chats(tmp_path, template=CHATML, teacher={"rendering": "own"})
    plain = changes | {"task": changes["task"] | {"chat": False}}
    with pytest.raises(RecipeError, match="teacher.rendering is own, but the problems of task are plain text"):
        check(recipe_of(tmp_path, **plain))
    for kind in ({"type": "served"}, {"type": "http", "api": "vllm", "model": "m"}):
        with pytest.raises(RecipeError, match="needs the teacher's chat template: set tokenizer"):
            recipe_of(tmp_path, **changes | {"teacher": kind | {"url": "http://h:1", "rendering": "own"}})


def test_solutions_without_room_are_found_before_the_run(tmp_path: Path) -> None:
    """Also behind the first rows."""
    template = CHATML + "{% if add_generation_prompt %}<think>\n{% endif %}"
    changes = chats(tmp_path, template=CHATML, method={"type": "sft"}, teacher=None) | {"teacher": None}
    (tmp_path / "student" / "chat_template.jinja").write_text(template)
    rows = [{"q": f"{i}+{i}?", "a": str(2 * i), "s": f"{i} twice\n</think>\n\n{2 * i}"} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert any("opens <think> for the student" in line for line in check(recipe_of(tmp_path, **changes)))
    file.write_text("".join(json.dumps(row | ({"s": "70"} if row["q"] == "35+35?" else {})) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"the response to prompt .* has no reasoning to stand in it"):
        check(recipe_of(tmp_path, **changes))


def test_the_model_says_which_role_ends_a_turn(tmp_path: Path) -> None:
    """The dry run, which loads no model, finds the end that the run has."""
    changes = chats(tmp_path, template=CHATML)
    template = (
        "{% for m in messages %}<{{ 'bos' if m['role'] == 'user' else '|im_start|' }}>{{ m['content'] }}{% endfor %}"
    )
    (tmp_path / "student" / "chat_template.jinja").write_text(template)
    (tmp_path / "teacher" / "chat_template.jinja").write_text(template)
    recipe = recipe_of(tmp_path, **changes)
    assert any(line.startswith("a response ends with '<|im_end|>', EOS: the chat template") for line in check(recipe))
    ends = {"eos_token_id": STUDENT.convert_tokens_to_ids(["<|im_end|>", "<bos>"])}
    (tmp_path / "student" / "generation_config.json").write_text(json.dumps(ends))
    assert "a response ends with '<bos>', as the chat template ends a turn" in check(recipe)
    assert "a response ends with '<bos>'" in examined(recipe)["end of a response"].found


def test_a_template_that_cannot_go_on_behind_a_tool_is_found_before_the_run(tmp_path: Path) -> None:
    """As Qwen3's without thinking, which takes the empty block in front of a turn away when a tool answers."""
    changes = chats(tmp_path, template=CHATML)
    for name in ("student", "teacher"):
        opened = "{% if add_generation_prompt %}<think>\n\n</think>\n\n{% endif %}"
        (tmp_path / name / "chat_template.jinja").write_text(CHATML + opened)
    fields = {"path": str(tmp_path / "rows.jsonl"), "prompt_field": "q", "reference_field": "a"}
    task = {"type": "math", **fields, "python": {"type": "process", "unsafe": True}}
    with pytest.raises(
        TemplateError, match="rewrites the student's earlier turns when a message of role 'tool' follows"
    ):
        check(recipe_of(tmp_path, **changes | {"task": task}))
    # a single turn is no matter of it
    assert check(recipe_of(tmp_path, **changes | {"task": task | {"python": None}}))
    changes["student"]["on_rewrite"] = "cut"
    lines = " ".join(check(recipe_of(tmp_path, **changes | {"task": task})))
    assert "task.train: an episode ends at the first reply of a tool, for the chat template rewrites" in lines


def test_ids_that_stand_for_no_end_are_none(tmp_path: Path) -> None:
    changes = chats(tmp_path, template=CHATML)
    for name in ("student", "teacher"):
        ends = {"eos_token_id": [END, None, -1]}
        (tmp_path / name / "generation_config.json").write_text(json.dumps(ends))
    assert examined(recipe_of(tmp_path, **changes))["end of a response"].level == "ok"
    with parts_of(recipe_of(tmp_path, **changes)) as parts:
        assert parts.loaded.renderer.stop_ids == (END,)


def test_a_resumed_run_refuses_another_chat_template(tmp_path: Path) -> None:
    changes = chats(tmp_path, template=CHATML, method={"type": "sft"}, teacher=None) | {"teacher": None}
    train(tmp_path, **changes)
    file = tmp_path / "student" / "chat_template.jinja"
    file.write_text(CHATML.replace("user", "human") + "{# another #}")
    with pytest.raises(
        CheckpointError, match=r"not what this run began with: chat template \(.*student\): another than before"
    ):
        train(tmp_path, resume=True, **changes)
    file.write_text(CHATML)
    train(tmp_path, resume=True, **changes)


DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y %H:%M:%S') }}.<|im_end|>\n" + CHATML


def test_a_run_has_one_clock_and_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.runs import assert_same_run, train_in_two
    from understudy import run as runs

    changes: dict[str, Any] = {"method": {"type": "sft"}, "teacher": None, "train": {"steps": 4, "save_every": 2}}
    ticks = iter(f"2026-01-0{day}T00:00:00" for day in range(1, 9))
    monkeypatch.setattr(runs, "now", lambda: next(ticks))

    def dated(folder: Path, **extra: Any) -> dict[str, Any]:
        values = chats(folder, template=CHATML) | changes | extra
        file = folder / "student" / "chat_template.jinja"
        assert file.is_file()
        file.write_text(DATED)
        return values

    for name in ("once", "twice", "given"):
        (tmp_path / name).mkdir()
    once = train(tmp_path / "once", **dated(tmp_path / "once"))
    assert config.read_yaml(once / "recipe.yaml")["student"]["template_date"] == "2026-01-01T00:00:00"
    # started on the second, resumed when the clock says the third
    twice = train_in_two(tmp_path / "twice", 2, **dated(tmp_path / "twice"))
    assert config.read_yaml(twice / "recipe.yaml")["student"]["template_date"] == "2026-01-02T00:00:00"
    given = dated(tmp_path / "given")
    given["student"] |= {"template_date": "2026-01-02"}
    assert_same_run(train(tmp_path / "given", **given), twice)
    assert metric_rows(once)[1]["loss"] != metric_rows(twice)[1]["loss"]
    lines = check(recipe_of(tmp_path / "given", **given))
    assert any("the chat template reads the clock: every prompt has 2026-01-02" in line for line in lines)
    with pytest.raises(RecipeError, match="template_date is 'soon'; it must be a date"):
        recipe_of(tmp_path, **given | {"student": given["student"] | {"template_date": "soon"}})
