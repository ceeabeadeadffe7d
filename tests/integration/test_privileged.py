"""A teacher that is shown more than the student scores the student's own tokens, behind another prompt."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import EOS, plain_logp, scored, tiny
from understudy.config import dump, parse
from understudy.errors import CheckpointError, DataError, RecipeError, ScoreError
from understudy.models import apply_lora, load_causal_lm, save_hf
from understudy.packing import attach_scores, pack
from understudy.tasks.renderer import Renderer
from understudy.teachers import LocalTeacher, Setup, Teacher
from understudy.teachers.privileged import MovingAverage, Privileged, PrivilegedTeacher, reword
from understudy.types import Author, Grade, Need, Prompt, Sample

ROUNDING = 1e-12
"""float64: another order of sums."""
SAMPLED: frozenset[Need] = frozenset({"sampled"})
EVERYTHING: frozenset[Need] = frozenset({"sampled", "topk", "full"})
FIELDS = ("logprob", "entropy", "topk_ids", "topk_logprob", "hidden")
ALPHABET = [chr(code) for code in range(32, 127)] + ["\n"]
NUM_TOKENS = len(ALPHABET) + 2
CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}<assistant>"
    "{% if think %}[think]{% endif %}"
)


def spelling() -> Any:
    """A tokenizer of single characters with a chat template."""
    vocabulary = {"<unk>": 0, "</s>": EOS} | {char: index + 2 for index, char in enumerate(ALPHABET)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", chat_template=CHAT)


def model(**extra: Any) -> Any:
    return tiny(**{"num_rows": NUM_TOKENS, "sharp": 4.0} | extra)


def setup(**changes: Any) -> Setup:
    return replace(
        Setup(name="t", vocab_size=NUM_TOKENS, temperature=0.7, renderer=Renderer(spelling(), {"think": True})),
        **changes,
    )


def answered(prompt: Prompt, text: str, index: int = 0) -> Sample:
    """A response that a student wrote to the prompt as the task states it."""
    ids = Renderer(spelling(), {"think": True}).start(prompt)
    response = torch.tensor([*spelling()(text)["input_ids"], EOS])
    return Sample(
        prompt=prompt,
        index=index,
        token_ids=torch.cat([ids, response]),
        author=torch.tensor([int(Author.PROMPT)] * len(ids) + [int(Author.STUDENT)] * len(response), dtype=torch.uint8),
        prompt_length=len(ids),
        finish="stop",
        text=text,
        rollout_logprob=torch.full((len(ids) + len(response),), -1.0),
        policy_version=torch.zeros(len(ids) + len(response), dtype=torch.int64),
    )


def samples() -> list[Sample]:
    """Text and chats, of many lengths."""
    chat = (
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "3+3?"},
    )
    prompts = [
        Prompt(id="a", text="1+1=", reference=("2",), solution="1+1 is 2"),
        Prompt(id="b", messages=chat, reference=("6",), solution="3 and 3 are {prompt} \\boxed{6}"),
        Prompt(id="c", messages=chat[:1], reference=("4", "four"), solution="count"),
    ]
    return [answered(prompt, text) for prompt, text in zip(prompts, ("2", "it is 6", "44444"), strict=True)]


def privileged(inner: nn.Module | None = None, told: Setup | None = None, **keys: Any) -> PrivilegedTeacher:
    told = setup() if told is None else told
    section = Privileged(**keys)
    judge = LocalTeacher(
        model() if inner is None else inner, name=told.name, vocab_size=told.vocab_size, temperature=told.temperature
    )
    return PrivilegedTeacher(judge, section, told)


def all_equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def scores_of(judge: Teacher) -> dict[str, Tensor]:
    found = judge.score(samples(), EVERYTHING, k=5)
    return {f"{i}.{name}": getattr(one, name) for i, one in enumerate(found) for name in FIELDS}


def test_shown_the_prompt_alone_it_is_the_local_teacher() -> None:
    plain = LocalTeacher(model(), name="t", vocab_size=NUM_TOKENS, temperature=0.7)
    judge = privileged(template="{prompt}")
    assert all_equal(scores_of(judge), scores_of(plain))
    assert torch.equal(judge.head_for("t").weight, plain.head_for("t").weight)
    assert judge.score(samples(), frozenset())[0].logprob is None


def test_scores_are_of_the_response_behind_what_is_shown() -> None:
    """By hand: the text that the teacher reads, letter by letter, and a plain forward over it."""
    judged, base = privileged(template="{prompt}|{reference}|{solution}", system=None), model()
    shown = [
        "1+1=|2|1+1 is 2",
        "<user>2+2?\n<assistant>4\n<user>3+3?|6|3 and 3 are {prompt} \\boxed{6}\n<assistant>[think]",
        "<user>2+2?|4|count\n<assistant>[think]",
    ]
    found = judged.score(samples(), SAMPLED)
    for one, text, scores in zip(samples(), shown, found, strict=True):
        ids = torch.tensor([*spelling()(text)["input_ids"], *one.response_ids.tolist()])
        logp = plain_logp(base, ids, 0.7)[len(text) - 1 :]
        expected = logp.gather(-1, one.response_ids[:, None]).squeeze(-1)
        torch.testing.assert_close(scores.logprob, expected, rtol=0, atol=ROUNDING)
        assert torch.equal(scores.token_ids, one.response_ids)
    batch = pack(scored(samples(), found))
    assert torch.equal(batch.target, torch.cat([one.response_ids for one in samples()]))


def test_the_samples_stay_as_they_are() -> None:
    made = samples()
    before = copy.deepcopy(made)
    privileged(system="Be kind.").score(made[1:], SAMPLED)
    for one, old in zip(made, before, strict=True):
        assert one.prompt == old.prompt
        assert torch.equal(one.token_ids, old.token_ids)


def test_rewording_a_chat() -> None:
    """The last message of the user is reworded, the others stay; a system message goes behind the chat's own."""
    one = samples()[1]
    messages = reword(one, "<{prompt}>", "See {solution}.").messages
    assert messages is not None
    assert [dict(message) for message in messages] == [
        {"role": "system", "content": "See {solution}."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "<3+3?>"},
    ]
    ruled = replace(one.prompt, messages=({"role": "system", "content": "Rules."}, *(one.prompt.messages or ())))
    messages = reword(replace(one, prompt=ruled), "{prompt}", "More.").messages
    assert messages is not None
    assert messages[0] == {"role": "system", "content": "Rules.\n\nMore."}
    assert len(messages) == 4
    assert ruled.messages is not None
    assert ruled.messages[0]["content"] == "Rules."


def test_what_the_template_asks_for_must_be_there() -> None:
    bare = answered(Prompt(id="bare", text="1+1="), "2")
    for template, lacking in (("{prompt}{solution}", "solution"), ("{prompt}{reference}", "reference")):
        with pytest.raises(DataError, match=rf"prompt bare has nothing for {{{lacking}}}"):
            privileged(template=template).score([bare], SAMPLED)
    with pytest.raises(DataError, match=r"bare has nothing for {feedback}.*verifier"):
        privileged(template="{prompt}{feedback}").score([bare], SAMPLED)
    graded = replace(bare, grade=Grade(0.0, "3", "3 is not 2"))
    assert reword(graded, "{prompt} {feedback}").text == "1+1= 3 is not 2"
    assert reword(replace(bare, grade=Grade(1.0, "2")), "{prompt}[{feedback}]").text == "1+1=[]"
    with pytest.raises(DataError, match=r"bare is no chat.*teacher\.template"):
        privileged(template="{prompt}", system="Hi").score([bare], SAMPLED)
    silent = replace(bare, prompt=Prompt(id="silent", messages=({"role": "system", "content": "x"},)))
    with pytest.raises(DataError, match=r"silent has no message of the user"):
        privileged(template="{prompt}").score([silent], SAMPLED)


def test_a_prompt_that_becomes_too_long_leaves_its_sample_unscored() -> None:
    """Exactly what fits is scored: the last token is never fed. The others keep their scores."""
    one = samples()[0]
    short = replace(one, prompt=replace(one.prompt, solution=""))
    length = len("1+1=|1+1 is 2") + one.num_response_tokens
    keys = {"template": "{prompt}|{solution}"}
    (fits,) = privileged(model(max_position_embeddings=length - 1), **keys).score([one], SAMPLED)
    assert fits.logprob is not None
    assert bool(fits.logprob.isfinite().all())
    judge = privileged(model(max_position_embeddings=length - 2), **keys)
    lost, kept = judge.score([one, short], EVERYTHING, k=5)
    (alone,) = judge.score([short], EVERYTHING, k=5)
    assert all(torch.equal(getattr(kept, name), getattr(alone, name)) for name in FIELDS)
    assert lost.topk_ids is not None
    assert bool((lost.topk_ids == -1).all())
    assert all(bool(getattr(lost, name).isnan().all()) for name in FIELDS if name != "topk_ids")
    first, second = attach_scores([one, short], [lost, kept], "drop")
    assert first is None
    assert second is not None
    assert (second.key, second.scores) == (short.key, kept)
    says = rf"a#0, .*the prompt that it is shown, of 13 tokens, .* make {length} tokens.*{length - 2} positions"
    with pytest.raises(ScoreError, match=says):
        attach_scores([one, short], [lost, kept], "error")


def test_sections() -> None:
    section = parse(Privileged, {"ema": 0.5, "template": "{prompt} \\frac{a}{b} {answer_box}", "system": "x"})
    assert parse(Privileged, dump(section)) == section
    assert "solution" in Privileged().check()
    assert Privileged().shows == {"prompt", "solution"}
    assert {"none"} | EVERYTHING == Privileged().gives
    for values, message in (
        ({"template": "Solve: {solution}"}, r"teacher: template has no {prompt}"),
        ({"template": "{prompt} {soluton}"}, r"{soluton}, .*did you mean {solution}"),
        ({"ema": 1.0}, r"ema is 1\.0"),
        ({"ema": -0.1}, r"ema is -0\.1"),
        ({"ema": 0.5, "model": "x"}, "model must be left out"),
        ({"revision": "v1"}, "revision is that of model"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse(Privileged, values, "teacher")
    with pytest.raises(RecipeError, match="no model directory"):
        Privileged(model="./nowhere").check()


def test_opening(tmp_path: Path) -> None:
    save_hf(model(), spelling(), tmp_path)
    keys = {"template": "{prompt} {solution}"}
    expected = scores_of(privileged(**keys))
    student = load_causal_lm(str(tmp_path))
    live = setup(start=str(tmp_path), student=student)
    for section in (Privileged(**keys), Privileged(model=str(tmp_path), **keys), Privileged(ema=0.5, **keys)):
        judge = section.open(live)
        assert judge.name == "t"
        assert all_equal(scores_of(judge), expected)
        assert judge.model is not student
    for section in (Privileged(), Privileged(ema=0.5)):
        with pytest.raises(RecipeError, match=r"built from scratch.*set t\.model"):
            section.open(setup(student=student, fresh_student=model))

    adapted = apply_lora(load_causal_lm(str(tmp_path)), rank=2, alpha=8.0)
    told = replace(live, student=adapted)
    judge = Privileged(**keys).open(told)
    assert judge.model is adapted
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            value.add_(0.3 if "lora_" in name else 0.0)
    for name, value in scores_of(judge).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=ROUNDING)
    with pytest.raises(RecipeError, match=r"needs full fine-tuning.*student\.lora"):
        Privileged(ema=0.5).open(told)


def test_fingerprint_tells_how_prompts_are_reworded() -> None:
    other_chat = spelling()
    other_chat.chat_template = CHAT + " "
    judges = [
        privileged(),
        privileged(system="x"),
        privileged(template="{prompt}"),
        privileged(told=setup(renderer=Renderer(spelling()))),
        privileged(told=setup(renderer=Renderer(other_chat, {"think": True}))),
        privileged(model(rms_norm_eps=1e-3)),
    ]
    assert len({judge.fingerprint for judge in judges}) == len(judges)
    assert privileged().fingerprint == privileged().fingerprint


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def moved(module: nn.Module, by: float) -> Any:
    """A student after some updates."""
    other = copy.deepcopy(module)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in other.parameters():
            value.add_(torch.randn(value.shape, generator=generator).to(value.dtype) * by)
    return other


@pytest.mark.parametrize(("decay", "step"), [(0.9, 0.1), (0.5, 0.5), (0.0, 1.0)])
def test_the_average_moves_towards_the_student_by_one_minus_the_decay(decay: float, step: float) -> None:
    """peers 21: an inverted rate. At 0.9 it moves a tenth of the way; at 0 it is the student."""
    teacher = model()
    student, start = moved(teacher, 0.5), weights(teacher)
    MovingAverage(teacher, decay).follow(student)
    for name, value in weights(teacher).items():
        target = dict(student.named_parameters())[name].detach()
        torch.testing.assert_close(value, start[name] + step * (target - start[name]), rtol=0, atol=ROUNDING)
        if decay == 0.0:
            assert torch.equal(value, target)


def test_the_teacher_follows_the_student(tmp_path: Path) -> None:
    """At decay 0 its scores are those of the student as it is now; a frozen one stays. Student and teacher share no weight."""
    save_hf(model(), spelling(), tmp_path)
    student = load_causal_lm(str(tmp_path))
    told = setup(start=str(tmp_path), student=student)
    still, moving = Privileged().open(told), Privileged(ema=0.0).open(told)
    before, first = scores_of(still), moving.fingerprint
    student.load_state_dict(moved(student, 0.5).state_dict())
    assert all_equal(scores_of(moving), before)
    for judge in (still, moving):
        judge.follow(student)
    assert all_equal(scores_of(still), before)
    assert all_equal(scores_of(moving), scores_of(privileged(student)))
    assert moving.fingerprint != first
    assert moving.fingerprint == privileged(student).fingerprint
    assert not any(value.requires_grad for value in moving.model.parameters())


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_a_resumed_average_is_bit_equal(dtype: Any, offload: bool, tmp_path: Path) -> None:
    """Small steps add up in float32, whatever the weights are kept in."""
    save_hf(model(dtype="float32", tie_word_embeddings=True), spelling(), tmp_path)
    student = load_causal_lm(str(tmp_path))
    told = setup(start=str(tmp_path), student=student)
    section, later = Privileged(ema=0.99, dtype=dtype, offload=offload), moved(student, 0.05)
    straight = section.open(told)
    start = {name: value.clone() for name, value in straight.state().items()}
    assert all(name.startswith("ema.") and value.dtype == torch.float32 for name, value in start.items())
    for step in range(20):
        straight.follow(later)
        if step == 7:
            saved = {name: value.clone() for name, value in straight.state().items()}
            then = scores_of(straight)
    resumed = section.open(replace(told, student=later))
    resumed.load_state(saved)
    assert all_equal(scores_of(resumed), then)
    for _ in range(12):
        resumed.follow(later)
    assert all_equal(resumed.state(), straight.state())
    assert all_equal(scores_of(resumed), scores_of(straight))
    assert resumed.fingerprint == straight.fingerprint
    share = 1 - 0.99**20
    for name, value in weights(later).items():
        expected = start[f"ema.{name}"] + share * (value - start[f"ema.{name}"])
        # twenty float32 roundings of numbers of size 1
        torch.testing.assert_close(straight.state()[f"ema.{name}"], expected, rtol=0, atol=4e-6)
    for name, value in straight.model.named_parameters():
        assert torch.equal(value, straight.state()[f"ema.{name}"].to(value.dtype))


def test_the_average_starts_from_all_that_the_start_holds(tmp_path: Path) -> None:
    """Not from weights that were rounded to bfloat16 first."""
    save_hf(model(dtype="float32"), spelling(), tmp_path)
    student = load_causal_lm(str(tmp_path))
    judge = Privileged(ema=0.9, dtype="bfloat16").open(setup(start=str(tmp_path), student=student))
    assert all_equal({f"ema.{name}": value for name, value in weights(student).items()}, judge.state())
    assert judge.head_for(None).weight.dtype == torch.bfloat16


def test_steps_below_bfloat16_add_up() -> None:
    """A step of 1/1000 of the way is less than bfloat16 resolves; a thousand of them go 63 % of the way."""
    teacher = model(dtype="bfloat16", num_layers=1)
    student, start = moved(teacher, 0.05), weights(teacher)
    average = MovingAverage(teacher, 0.999)
    for _ in range(1000):
        average.follow(student)
    for name, target in weights(student).items():
        expected = (start[name].float() + (1 - 0.999**1000) * (target.float() - start[name].float())).bfloat16()
        assert average.state()[f"ema.{name}"].dtype == torch.float32
        # bfloat16: half a unit in the last place, of numbers around 1 at most 2^-8
        torch.testing.assert_close(weights(teacher)[name], expected, rtol=2**-7, atol=1e-4)


def test_state_of_another_recipe_is_refused(tmp_path: Path) -> None:
    save_hf(model(), spelling(), tmp_path)
    told = setup(start=str(tmp_path), student=load_causal_lm(str(tmp_path)))
    moving, still = Privileged(ema=0.9).open(told), Privileged().open(told)
    state = dict(moving.state())
    assert still.state() == {}
    still.load_state({})
    with pytest.raises(CheckpointError, match=r"has no ema"):
        still.load_state(state)
    with pytest.raises(CheckpointError, match=r"'lm_head\.weight' of the checkpoint"):
        moving.load_state({name: value for name, value in state.items() if "lm_head" not in name})
    with pytest.raises(RecipeError, match=r"of the student is not as in the teacher"):
        moving.follow(model(num_layers=3))
