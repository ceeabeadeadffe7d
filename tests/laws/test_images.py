"""Images through packing, scoring and writing: all of it equals transformers' own forward of one sequence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vision_models import FAMILIES, draw_image, save_vision_model
from understudy.engines.hf.engine import HFEngine
from understudy.models import (
    backbone_hidden,
    lm_head,
    load_causal_lm,
    load_tokenizer,
    load_vision,
    probe_head,
    probe_images,
    row_style,
    vision_of,
)
from understudy.models.vision import open_image
from understudy.packing import RowStyle, lay_out
from understudy.tasks import Renderer
from understudy.teachers import LocalTeacher
from understudy.types import IMAGE, Author, Image, Prompt, Request, Sample, Sampling

ROUNDING = 1e-6
"""Encoders normalise in float32, whatever the weights are in."""
KINDS = [kind if kind in ("qwen2_5_vl", "llava") else pytest.param(kind, marks=pytest.mark.slow) for kind in FAMILIES]
"""All families; those with positions in three dimensions and with a fixed number of tokens are tried first."""
SIZES = ((96, 64), (64, 96), (56, 56), (30, 150))


def loaded(folder: Path, kind: str, seed: int = 0) -> tuple[Any, Renderer]:
    path = save_vision_model(folder / f"{kind}-{seed}", kind, seed=seed)
    tokenizer = load_tokenizer(path)
    vision = load_vision(path, tokenizer)
    model: Any = load_causal_lm(path, dtype="float64", vision=vision)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10.0)
    return model, Renderer(tokenizer, vision=vision)


def prompts(folder: Path) -> list[Prompt]:
    """One image each, one without, and one with two of them between words."""
    pictures = [
        draw_image(folder / f"{n}.png", size, colour)
        for n, (size, colour) in enumerate(zip(SIZES, COLOURS, strict=True))
    ]
    asked = [(f"{IMAGE}What {'is it' * n}?", (picture,)) for n, picture in enumerate(pictures[:3])]
    asked += [("And without?", ()), (f"First {IMAGE} then {IMAGE}: same?", (pictures[3], pictures[0]))]
    return [
        Prompt(f"p{n}", messages=({"role": "user", "content": text},), images=images)
        for n, (text, images) in enumerate(asked)
    ]


COLOURS = ("red", "blue", "green", "black")


def sample(renderer: Renderer, prompt: Prompt, text: str) -> Sample:
    start = renderer.start(prompt)
    ids = torch.cat([start, renderer.response(prompt, text)])
    author = torch.full(ids.shape, int(Author.STUDENT), dtype=torch.uint8)
    author[: len(start)] = Author.PROMPT
    return Sample(prompt, 0, ids, author, len(start), "stop", text)


def plain_logits(model: Any, renderer: Renderer, prompt: Prompt, ids: Tensor) -> Tensor:
    """[L, V] by the processor and the model of transformers alone."""
    assert renderer.vision is not None
    processor, inputs = renderer.vision.processor, {}
    if prompt.images:
        text = processor.image_token * len(prompt.images)
        made = processor(text=[text], images=[open_image(image) for image in prompt.images], return_tensors="pt")
        inputs = {name: value for name, value in made.items() if name.startswith(("pixel", "image"))}
        types = torch.isin(ids, torch.tensor(processor.image_token_ids)).long()[None]
        kind = model.config.model_type
        inputs |= (
            {"token_type_ids": types} if kind == "gemma3" else {"mm_token_type_ids": types} if "qwen" in kind else {}
        )
    with torch.no_grad():
        return model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], **inputs).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_rows_are_the_plain_forward(kind: str, tmp_path: Path) -> None:
    model, renderer = loaded(tmp_path, kind)
    probe_head(model)
    probe_images(model)
    asked = prompts(tmp_path)
    # some have another response to the same prompt
    samples = [sample(renderer, asked[n], "4" * n + " so") for n in (0, 1, 2, 3, 4)]
    samples += [sample(renderer, asked[n], "no, " * n + "5") for n in (0, 4)]
    # transformers takes places in the row for places in the sequence where a window meets the block of an image
    every: list[RowStyle] = ["shared", "segments", "packed", "single", "alone"]
    styles = ["alone"] if kind == "gemma3" else every
    assert row_style(model) == styles[0]
    for style in styles:
        layout = lay_out(samples, style)
        assert len(layout.images) == (4 if style == "shared" else 6)
        with torch.no_grad():
            hidden = backbone_hidden(model, layout.input_ids, layout.position_ids, layout.images, layout.segments)
        found = lm_head(model).logits(hidden.flatten(0, 1)[layout.predicts]).split(layout.sizes)
        for one, logits in zip(samples, found, strict=True):
            expected = plain_logits(model, renderer, one.prompt, one.token_ids)[one.prompt_length - 1 : -1]
            torch.testing.assert_close(logits, expected, rtol=0, atol=ROUNDING * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_images_matter_and_are_told_apart(kind: str, tmp_path: Path) -> None:
    model, renderer = loaded(tmp_path, kind)
    one, other = (draw_image(tmp_path / f"{colour}.png", (64, 64), colour) for colour in ("red", "black"))
    asked = [
        Prompt(name, messages=({"role": "user", "content": f"{IMAGE}?"},), images=(image,))
        for name, image in (("a", one), ("b", other))
    ]
    first, second = (sample(renderer, prompt, "yes") for prompt in asked)
    assert torch.equal(first.token_ids, second.token_ids)
    scores = LocalTeacher(model, name="t", vocab_size=len(renderer.tokenizer)).score(
        [first, second], frozenset({"sampled"})
    )
    assert scores[0].logprob is not None
    assert scores[1].logprob is not None
    assert not torch.allclose(scores[0].logprob, scores[1].logprob)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_plain_forward(kind: str, tmp_path: Path) -> None:
    model, renderer = loaded(tmp_path, kind)
    samples = [sample(renderer, prompt, "maybe") for prompt in prompts(tmp_path)]
    size, absent = len(renderer.tokenizer), vision_of(model).image_ids  # type: ignore[union-attr]
    teacher = LocalTeacher(model, name="t", vocab_size=size, absent=absent, temperature=0.7)
    for one, scores in zip(samples, teacher.score(samples, frozenset({"sampled"})), strict=True):
        logits = plain_logits(model, renderer, one.prompt, one.token_ids)[one.prompt_length - 1 : -1] / 0.7
        logits[:, list(absent)] = -torch.inf
        expected = logits.log_softmax(-1).gather(-1, one.response_ids[:, None]).squeeze(-1)
        assert scores.logprob is not None
        torch.testing.assert_close(scores.logprob.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_with_a_cache_is_writing_without(kind: str, tmp_path: Path) -> None:
    model, renderer = loaded(tmp_path, kind)
    vision = vision_of(model)
    assert vision is not None
    engine = HFEngine(
        model,
        renderer.tokenizer,
        seed=3,
        stop_ids=renderer.stop_ids,
        vocab_size=len(renderer.tokenizer),
        absent=vision.image_ids,
    )
    requests = [Request(prompt, n, renderer.start(prompt)) for prompt in prompts(tmp_path) for n in range(2)]
    written = engine.generate(requests, Sampling(max_new_tokens=12), step=0)
    assert engine.style == ("padded", "")
    for one in written:
        assert not torch.isin(one.response_ids, torch.tensor(vision.image_ids)).any()
        logits = plain_logits(model, renderer, one.prompt, one.token_ids)[one.prompt_length - 1 : -1]
        logits[:, list(vision.image_ids)] = -torch.inf
        expected = logits.log_softmax(-1).gather(-1, one.response_ids[:, None]).squeeze(-1)
        assert one.rollout_logprob is not None
        found = one.rollout_logprob[one.prompt_length :].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    engine.style = ("none", "")
    again = engine.generate(requests, Sampling(max_new_tokens=12), step=0)
    assert [one.token_ids.tolist() for one in again] == [one.token_ids.tolist() for one in written]


def test_a_picture_as_bytes_is_the_picture_in_the_file(tmp_path: Path) -> None:
    model, _ = loaded(tmp_path, "qwen2_5_vl")
    image = draw_image(tmp_path / "a.png", (64, 64), "red")
    vision = vision_of(model)
    assert vision is not None
    assert image.path is not None
    one, other = vision.read(image), vision.read(Image(data=Path(image.path).read_bytes()))
    assert torch.equal(one.features["pixel_values"], other.features["pixel_values"])
    assert vision.read(image) is one
