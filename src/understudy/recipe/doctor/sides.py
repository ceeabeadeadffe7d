"""Whether the student and those who judge it speak of the same thing: tokens, ends, templates, temperature, lengths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from understudy.errors import UnderstudyError
from understudy.models import backbone_hidden, compare_vocabularies, lm_head, num_positions, unwrap
from understudy.models.backbone import evaluating
from understudy.recipe import load
from understudy.recipe.doctor.findings import Finding, Level, within, worst
from understudy.recipe.doctor.parts import HEALTH_S, NUM_COMPARED, Check, Parts, Side, uncached
from understudy.tasks.renderer import Renderer
from understudy.teachers import Privileged
from understudy.teachers.privileged import reword
from understudy.trainer.collect import TOKEN_SCORES
from understudy.types import Author, Prompt, Sample

PADDING_MASS = 1e-3
"""Probability on tokens that do not exist, above which somebody should know."""
_SHOWN_TOKENS = 4
"""On each side of a difference."""


def checks(parts: Parts) -> list[Check]:
    """Those that apply."""
    found: list[Check] = []
    if parts.tokenizers:
        found.append(("tokenizer", "tokens of both sides, one by one", lambda: _tokens(parts)))
    found += [
        ("vocabulary", "rows of embedding and head against the tokens that exist", lambda: _padding(parts)),
        ("end of a response", "tokens that end a response, on every side", lambda: _ends(parts)),
    ]
    if parts.tokenizers and parts.prompts[0][0].messages is not None:
        found.append(
            ("chat template", f"{NUM_COMPARED} prompts in the template of every side", lambda: _templates(parts))
        )
    if parts.sides and parts.recipe.method.needs & (TOKEN_SCORES | {"reference"}):
        found.append(("temperature", "that of the scores against the student's", lambda: _temperature(parts)))
    found.append(("lengths", "first prompts and max_new_tokens against all positions", lambda: _lengths(parts)))
    return found


def _tokens(parts: Parts) -> Iterator[Finding]:
    checked, lines = "tokens of both sides, one by one", []
    for side in parts.sides:
        if side.label in parts.tokenizers:
            size = compare_vocabularies(parts.loaded.renderer.tokenizer, parts.tokenizers[side.label])
            lines.append(f"the {side.label} ({side.source}) shares all {size:,} tokens and EOS with the student")
    yield Finding("tokenizer", "ok", checked, "; ".join(lines))


def _models(parts: Parts) -> dict[str, nn.Module]:
    found = {"student": parts.loaded.model}
    return found | {side.label: side.model for side in parts.sides if side.model is not None}


def _padding(parts: Parts) -> Iterator[Finding]:
    size, lines = parts.loaded.vocab_size, list[str]()
    level: Level = "ok"
    for label, model in _models(parts).items():
        base = unwrap(model)
        rows = {int(base.get_input_embeddings().weight.shape[0]), int(base.get_output_embeddings().weight.shape[0])}
        if min(rows) < size:
            level = "error"
            lines.append(f"the {label} has {min(rows):,} rows for {size:,} tokens")
        elif max(rows) == size:
            lines.append(f"the {label} has a row for each of {size:,} tokens")
        else:
            mass = _mass_past(model, size, parts)
            if mass is not None and mass > PADDING_MASS and level == "ok":
                level = "warning"
            held = "" if mass is None else f" and had {mass:.2g} of the probability"
            lines.append(
                f"the {label} has {max(rows):,} rows, {max(rows) - size:,} past the {size:,} tokens; they are cut off{held}"
            )
    advice = {
        "ok": "",
        "warning": "scores are renormalised over the tokens that exist; an engine that does not cut them samples some, so "
        "see whether the tokenizer is the model's own",
        "error": "this model belongs to another tokenizer; choose another model or student.tokenizer",
    }
    yield Finding(
        "vocabulary",
        level,
        "rows of embedding and head against the tokens that exist",
        "; ".join(lines),
        advice[level],
    )


@torch.no_grad()
def _mass_past(model: nn.Module, size: int, parts: Parts) -> float | None:
    """Mean probability of rows from `size` on, at the last tokens of the first prompts; None for weights that are away."""
    head = lm_head(model)
    if head.num_tokens <= size:
        return 0.0
    side = next((side for side in parts.sides if side.model is model), None)
    if side is not None and _offloaded(side, parts):
        return None
    found = []
    with evaluating(model):
        for _, ids in parts.prompts[:NUM_COMPARED]:
            row = ids[None].to(head.weight.device)
            hidden = backbone_hidden(model, row, torch.arange(row.shape[1], device=row.device)[None])
            found.append(head.logits(hidden[0, -1:]).softmax(-1)[:, size:].sum())
    return float(torch.stack(found).mean())


def _offloaded(side: Side, parts: Parts) -> bool:
    section: Any = (
        parts.recipe.judges.get(side.name or "teacher") if side.label != "reference" else parts.recipe.reference
    )
    return bool(getattr(section, "offload", False))


def own_ends(model: nn.Module) -> set[int]:
    """EOS of a model's configurations, as an engine that serves it would stop at."""
    base = unwrap(model)
    owners = (base.config, base.config.get_text_config(), getattr(base, "generation_config", None))
    found: set[int] = set()
    for owner in owners:
        value = getattr(owner, "eos_token_id", None)
        found |= set() if value is None else {value} if isinstance(value, int) else set(value)
    return found


def _chose_ends(model: nn.Module) -> bool:
    """Whether there are generation settings of its own, not made of its configuration."""
    settings = getattr(unwrap(model), "generation_config", None)
    return getattr(settings, "_from_model_config", True) is False


def _ends(parts: Parts) -> Iterator[Finding]:
    tokenizer, stops = parts.loaded.renderer.tokenizer, set(parts.loaded.renderer.stop_ids)
    named = _named(tokenizer, stops)
    level: Level = "ok"
    advice = ""
    lines = [
        f"the student's tokenizer ends with {_named(tokenizer, {tokenizer.eos_token_id})}, its responses at {named}"
    ]
    if not any(index < parts.loaded.vocab_size for index in stops):
        level, advice = "error", "no response would ever end; set eos_token in the tokenizer's configuration"
    for side in parts.sides:
        if side.model is None:
            continue
        ends = own_ends(side.model)
        lines.append(
            f"the {side.label}'s at {_named(tokenizer, ends) if ends else 'no token that its configuration names'}"
        )
        if ends and not ends & stops:
            # a configuration alone may hold its architecture's default, which nobody chose
            level = "error" if _chose_ends(side.model) else worst([level, "warning"])
            advice = (
                f"the {side.label} ends with tokens that the student never writes, so it would disapprove of every ending and "
                "lengths would explode: take the teacher's tokenizer (student.tokenizer), a teacher of the student's kind, or "
                "correct eos_token_id in its configuration"
            )
        elif ends - stops and level == "ok":
            level = "warning"
            advice = (
                f"the student does not stop at {_named(tokenizer, ends - stops)}; where the {side.label} wants that token "
                "next, the student writes on: add it to eos_token_id of the student's generation_config.json"
            )
    yield Finding("end of a response", level, "tokens that end a response, on every side", "; ".join(lines), advice)


def _named(tokenizer: Any, ids: set[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(index)!r} ({index})" for index in sorted(ids))


def _templates(parts: Parts) -> Iterator[Finding]:
    checked, lines = f"{NUM_COMPARED} prompts in the template of every side", list[str]()
    level: Level = "ok"
    for label, tokenizer in parts.tokenizers.items():
        difference = None
        for prompt, ids in parts.prompts[:NUM_COMPARED]:
            difference = _difference(parts, prompt, ids, tokenizer, label)
            if difference is not None:
                break
        if difference is not None:
            level = "warning"
        lines.append(difference or f"the {label}'s template gives the student's tokens")
    advice = (
        "prompts are rendered with the student's, so the teacher judges text in a form that it may not know, which can cost "
        "tenths of a nat per token: use models of one family, or the teacher's tokenizer (student.tokenizer)"
    )
    yield Finding("chat template", level, checked, "; ".join(lines), "" if level == "ok" else advice)


def _difference(parts: Parts, prompt: Prompt, ids: Tensor, tokenizer: Any, label: str) -> str | None:
    """Where the other side's rendering first differs; None where it does not."""
    try:
        other = Renderer(tokenizer, parts.recipe.student.template_kwargs).start(prompt).tolist()
    except UnderstudyError as error:
        return f"the {label} cannot render prompt {prompt.id}: {error}"
    ours = ids.tolist()
    if ours == other:
        return None
    at = next(
        (i for i, pair in enumerate(zip(ours, other, strict=False)) if pair[0] != pair[1]), min(len(ours), len(other))
    )

    def around(tokens: list[int]) -> str:
        part = tokens[max(0, at - _SHOWN_TOKENS) : at + _SHOWN_TOKENS]
        return repr(parts.loaded.renderer.tokenizer.decode(part)) if at < len(tokens) else "the end"

    return (
        f"prompt {prompt.id} has {len(ours)} tokens for the student and {len(other)} for the {label}; the first that differs "
        f"is token {at}: {around(ours)} for the student, {around(other)} for the {label}"
    )


def _temperature(parts: Parts) -> Iterator[Finding]:
    wanted, lines = parts.trainer.student.temperature, list[str]()
    level: Level = "ok"
    for side in parts.sides:
        found = _temperature_of(side)
        if found is None:
            lines.append(f"the {side.label} does not say at which temperature it scores")
        else:
            level = level if found == wanted else "error"
            lines.append(f"the {side.label} scores at {found:g}")
    advice = "" if level == "ok" else "log-ratios compare distributions at one temperature; score at the student's"
    text = f"the student samples at {wanted:g}; {'; '.join(lines)}"
    yield Finding("temperature", level, "that of the scores against the student's", text, advice)


def _temperature_of(side: Side) -> float | None:
    teacher = uncached(side.teacher)
    known = getattr(teacher, "temperature", None)
    if known is None:
        head = teacher.head_for(side.name)
        known = None if head is None else head.temperature
    return None if known is None else float(known)


def _lengths(parts: Parts) -> Iterator[Finding]:
    recipe, prompts = parts.recipe, parts.prompts
    checked = f"the first {len(prompts)} prompts and max_new_tokens against all positions"
    models, new = _models(parts), recipe.sampling.max_new_tokens if parts.samples_own else 0
    limit = recipe.train.max_prompt_tokens
    if parts.samples_own:
        limit = load.prompt_limit(recipe, recipe.sampling, *models.values())
    lengths = [len(ids) for _, ids in prompts]
    kept = [length for length in lengths if length <= limit]
    if not kept:
        yield Finding("lengths", "error", checked, f"all are longer than {limit} tokens, the shortest {min(lengths)}",
                      "raise train.max_prompt_tokens, or lower sampling.max_new_tokens")  # fmt: skip
        return
    need, advice = max(kept) + new, ""
    level: Level = "ok"
    rooms = {label: num_positions(model) for label, model in models.items()}
    # a served teacher or an engine may say how much it takes
    rooms |= {side.label: _room(uncached(side.teacher)) for side in parts.sides if side.model is None}
    rooms["rollout engine"] = _room(parts.collector.engine)
    lines = [f"{max(kept)} prompt tokens and {new} new ones make {need}"]
    lines += [f"the {label} has {room:,} positions" for label, room in rooms.items() if room is not None]
    short = [label for label, room in rooms.items() if room is not None and room < need]
    if len(kept) < len(lengths):
        level, advice = (
            "warning",
            "longer prompts are left out; raise train.max_prompt_tokens, or take models with more positions",
        )
        lines.append(f"{len(lengths) - len(kept)} of {len(lengths)} prompts are longer than {limit} and left out")
    if shown := _longest_shown(parts):
        lines.append(f"a privileged teacher is shown up to {shown[0]} tokens and has {shown[1]} positions")
        if shown[0] + new > shown[1]:
            level, advice = (
                "warning",
                "long responses could not be scored: shorten the teacher's template, or max_new_tokens",
            )
    if short:
        level, advice = (
            "error",
            f"too little room in: {', '.join(short)}; lower sampling.max_new_tokens or train.max_prompt_tokens",
        )
    yield Finding("lengths", level, checked, "; ".join(lines), advice)


def _room(one: Any) -> int | None:
    """`num_positions` of an engine, or `max_length` of a served teacher's `info()`; None where nobody says."""
    found = getattr(one, "num_positions", None)
    if found is None and callable(info := getattr(one, "info", None)):
        found = within(HEALTH_S, "a server", info).get("max_length")
    return found if isinstance(found, int) else None


def _longest_shown(parts: Parts) -> tuple[int, int] | None:
    """Tokens of the longest privileged prompt and positions of its teacher; None where there are none."""
    found = []
    for side in parts.sides:
        section: Any = parts.recipe.judges.get(side.name or "teacher")
        if side.label == "reference" or not isinstance(section, Privileged) or "feedback" in section.shows:
            continue
        assert side.model is not None
        room = num_positions(side.model)
        if room is not None:
            found += [(length, room) for length in _shown_lengths(parts, section, side.name)]
    return max(found, key=lambda pair: pair[0] - pair[1], default=None)


def _shown_lengths(parts: Parts, section: Privileged, name: str | None) -> list[int]:
    lengths = []
    for prompt, ids in parts.prompts:
        if name is not None and prompt.teacher != name:
            continue
        empty = Sample(prompt, 0, ids, torch.full_like(ids, Author.PROMPT, dtype=torch.uint8), len(ids), "data", "")
        shown = reword(replace(empty, prompt=prompt), section.template, section.system)
        lengths.append(len(parts.loaded.renderer.start(shown)))
    return lengths


__all__ = ["checks", "own_ends"]
