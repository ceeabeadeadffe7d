"""Whether the student and its teachers mean the same thing: tokens, ends, templates, temperature, lengths."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from understudy.errors import UnderstudyError
from understudy.format import count
from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.models import backbone_hidden, lm_head, name_tokens, num_positions, unwrap
from understudy.models.backbone import evaluating
from understudy.models.vocabulary import named_ids
from understudy.recipe.checks.parts import AS_SAID, HEALTH_S, Check, Finding, Parts, Side, within
from understudy.recipe.load import prompt_limit
from understudy.tasks.renderer import Renderer
from understudy.trainer.collect import TOKEN_SCORES
from understudy.types import Author, ImageSpan, Prompt, Sample

NUM_COMPARED = 4
"""First prompts that are rendered with every side's chat template."""
PADDING_MASS = 1e-3
"""Probability on tokens that do not exist, above which somebody should know."""
_UNCHANGED: Mapping[str, object] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
}
"""Generation settings at values that change nothing."""
_NO_DISTRIBUTION = re.compile(
    r"^_|^(max_|use_|output_|return_|transformers_|cache_)|^(do_sample|dtype|(bos|eos|pad)_token_id)$"
)
"""Generation settings that leave the distribution of a token alone."""
_SHOWN_TOKENS = 24
"""On each side of a difference."""


def _health(parts: Parts) -> Iterator[Finding]:
    for label, health in parts.servers.items():
        try:
            yield Finding(within(HEALTH_S, f"the {label}", health), name=label)
        except UnderstudyError as error:
            yield Finding(str(error), "error", AS_SAID, name=label)


def _padding(parts: Parts) -> Iterator[Finding]:
    size = parts.loaded.vocab_size
    own = {side.label: side.section.vocabulary for side in parts.sides if side.section.vocabulary is not None}
    for label, model in parts.models.items():
        base = unwrap(model)
        rows = {int(base.get_input_embeddings().weight.shape[0]), int(base.get_output_embeddings().weight.shape[0])}
        if min(rows) < size:
            advice = "this model belongs to another tokenizer; choose another model or student.tokenizer"
            yield Finding(f"the {label} has {min(rows):,} rows for {size:,} tokens", "error", advice)
            continue
        if max(rows) == size:
            yield Finding(f"the {label} has a row for each of {size:,} tokens")
            continue
        mass = _mass_past(model, size, parts)
        held = "" if mass is None else f" and had {mass:.2g} of the probability"
        found = (
            f"the {label} has {max(rows):,} rows, {max(rows) - size:,} past the {size:,} tokens; they are cut off{held}"
        )
        advice = (
            "scores are renormalised over the tokens that exist; an engine that does not cut them samples some, so see "
            "whether the tokenizer is the model's own"
        )
        if label in own and (extra := parts.loaded.tokenizers.other(own[label])[1]):
            found = f"{found}; {len(extra)} are tokens that the student lacks: {name_tokens(extra)}"
            advice = (
                f"the {label} wants tokens there that the student does not have: give the student the {label}'s tokenizer, or "
                "prompts and a template that do not call for them"
            )
        yield Finding(found, "warning" if mass is not None and mass > PADDING_MASS else "ok", advice)


@no_grad
def _mass_past(model: nn.Module, size: int, parts: Parts) -> float | None:
    """Mean probability of rows from `size` on, at the last tokens of the first prompts; None for weights that are away."""
    head = lm_head(model)
    if head.num_tokens <= size:
        return 0.0
    side = next((side for side in parts.sides if side.teacher.model is model), None)
    if side is not None and side.section.weights is not None and side.section.weights.offload:
        return None
    found = []
    with evaluating(model):
        for prompt, ids in parts.prompts[:NUM_COMPARED]:
            row = ids[None].to(head.weight.device)
            images = [ImageSpan(0, len(ids), prompt.images)] if prompt.images else []
            hidden = backbone_hidden(model, row, torch.arange(row.shape[1], device=row.device)[None], images)
            found.append(head.logits(hidden[0, -1:]).softmax(-1)[:, size:].sum())
    return float(torch.stack(found).mean())


def _ends(parts: Parts) -> Iterator[Finding]:
    renderer = parts.loaded.renderer
    tokenizer, stops, end = renderer.tokenizer, set(renderer.stop_ids), renderer.end_of(parts.prompts[0][0]).token_id

    def named(ids: set[int]) -> str:
        return ", ".join(f"{tokenizer.convert_ids_to_tokens(index)!r} ({index})" for index in sorted(ids))

    own = f"a response ends with {named({end})}; the student's stop at {named(stops)}"
    advice = "no response would ever end; set eos_token in the tokenizer's configuration"
    yield Finding(own, "ok" if any(index < parts.loaded.vocab_size for index in stops) else "error", advice)
    for side in parts.sides:
        its = side.teacher.own_end
        if its is not None:
            stands = (
                "" if its == end else f", for which the student's {named({end})} stands in what it reads and scores"
            )
            yield Finding(f"the {side.label}'s own template ends a turn with {named({its})}{stands}")
            continue
        if side.teacher.model is None:
            continue
        base, ends = unwrap(side.teacher.model), set[int]()
        settings = getattr(base, "generation_config", None)
        # all that an engine which serves the model would stop at
        for owner in (base.config, base.config.get_text_config(), settings):
            ends |= named_ids(getattr(owner, "eos_token_id", None))
        found = f"the {side.label}'s at {named(ends) if ends else 'no token that its configuration names'}"
        if ends and not ends & stops:
            # a configuration alone may hold its architecture's default, which nobody chose
            chosen = getattr(settings, "_from_model_config", True) is False
            advice = (
                f"the {side.label} ends with tokens that the student never writes, so it would disapprove of every ending and "
                "lengths would explode: take the teacher's tokenizer (student.tokenizer), a teacher of the student's kind, or "
                "correct eos_token_id in its configuration"
            )
            yield Finding(found, "error" if chosen else "warning", advice)
        elif ends and end not in ends:
            advice = (
                f"the student ends with {named({end})}, which the {side.label} may not expect there, so it would disapprove of "
                "endings and lengths would grow: take a teacher of the student's kind, or add the token to eos_token_id of its "
                "generation_config.json where it does end its turns so"
            )
            yield Finding(found, "warning", advice)
        else:
            advice = (
                f"the student does not stop at {named(ends - stops)}; where the {side.label} wants that token next, the "
                "student writes on: add it to eos_token_id of the student's generation_config.json"
            )
            yield Finding(found, "warning" if ends - stops else "ok", advice)


def _generation_settings(parts: Parts) -> Iterator[Finding]:
    """Compares the settings that the student brings for whoever serves it with those by which it is evaluated."""
    recipe, settings = parts.recipe, getattr(unwrap(parts.loaded.model), "generation_config", None)
    asked = {
        name: value
        for name, value in sorted(({} if settings is None else settings.to_diff_dict()).items())
        if value is not None and _UNCHANGED.get(name, ...) != value and not _NO_DISTRIBUTION.search(name)
    }
    if not asked:
        return

    def listed(names: Iterable[str]) -> str:
        return ", ".join(f"{name}: {asked[name]}" for name in names)

    sampling = None if recipe.eval is None else recipe.eval.sampling or recipe.sampling
    keys = [name for name in asked if hasattr(recipe.sampling, name)]
    others = [name for name in asked if name not in keys]
    differing = others or any(getattr(sampling, name, None) != asked[name] for name in keys)
    advice = "the saved student keeps its settings: "
    advice += f"to evaluate it as it will be served set eval.sampling: {{{listed(keys)}}}" if keys else ""
    if others:
        advice += f"{'; ' if keys else ''}{', '.join(others)} can only be taken out of its generation_config.json"
    yield Finding(
        f"the student's generation_config.json asks for {listed(asked)}; training samples ignore that, for they come from "
        "the distribution that is trained, and the evaluation has sampling settings of its own",
        "warning" if sampling is not None and differing else "ok",
        advice,
    )


def _left_out(parts: Parts) -> Iterator[Finding]:
    """Names tensors of files that belong to no part of the model, which transformers leaves out."""
    for label, model in parts.models.items():
        names = getattr(unwrap(model), "left_out", [])
        if names:
            found = (
                f"the {label}'s file holds {count(len(names), 'tensor')} that {type(unwrap(model)).__name__} has no part for, "
                f"first {names[0]!r}; they are left out"
            )
            advice = (
                "the saved student lacks them: copy a vision tower or a value head from the old file where you need it"
            )
            yield Finding(found, "warning" if label == "student" else "ok", advice)


def _templates(parts: Parts) -> Iterator[Finding]:
    if parts.prompts[0][0].messages is None:
        return
    for side in parts.sides:
        if side.section.vocabulary is None:
            continue
        renderer = parts.loaded.renderer.like(parts.loaded.tokenizers.other(side.section.vocabulary)[0])
        differences = (_difference(parts, *item, renderer, side.label) for item in parts.prompts[:NUM_COMPARED])
        difference = next((found for found in differences if found is not None), None)
        advice = (
            "prompts are rendered with the student's, so the teacher judges text in a form that it may not know, which can "
            "cost tenths of a nat per token: have it read its own (rendering: own), use models of one family, or the teacher's "
            "tokenizer (student.tokenizer)"
        )
        found = difference or f"the {side.label}'s template gives the student's tokens"
        if side.section.rendering == "own":
            found += f"; the {side.label} reads its own"
        is_meant = difference is None or side.section.rendering == "own"
        (before, behind), (its_before, its_behind) = parts.loaded.renderer.frame, renderer.frame
        if side.section.rendering == "own" and (before.strip(), behind) != (its_before.strip(), its_behind):
            is_meant = False
            found += (
                f", whose template writes {its_before!r} before a response and {its_behind!r} before its end; the student's "
                f"writes {before!r} and {behind!r}"
            )
            advice = (
                "the teacher expects that around a response and would disapprove of its first or last token: set what turns "
                "thinking off in its template (student.template_kwargs), or rendering: student"
            )
        yield Finding(found, "ok" if is_meant else "warning", advice)


def _difference(parts: Parts, prompt: Prompt, ids: Tensor, renderer: Renderer, label: str) -> str | None:
    """Shows both renderings from before the first token at which they differ; None where none does."""
    try:
        other = renderer.start(prompt).tolist()
    except UnderstudyError as error:
        return f"the {label} cannot render prompt {prompt.id}: {error}"
    ours = ids.tolist()
    if ours == other:
        return None
    pairs = enumerate(zip(ours, other, strict=False))
    at = next((i for i, (one, two) in pairs if one != two), min(len(ours), len(other)))

    def around(tokens: list[int]) -> str:
        part = tokens[max(0, at - _SHOWN_TOKENS) : at + _SHOWN_TOKENS]
        return repr(parts.loaded.renderer.tokenizer.decode(part)) if at < len(tokens) else "the end"

    return (
        f"prompt {prompt.id} has {len(ours)} tokens for the student and {len(other)} for the {label}; the first that differs "
        f"is token {at}: {around(ours)} for the student, {around(other)} for the {label}"
    )


def _temperature(parts: Parts) -> Iterator[Finding]:
    if not parts.sides or not parts.recipe.method.needs & (TOKEN_SCORES | {"reference"}):
        return
    wanted = parts.trainer.student.temperature
    yield Finding(f"the student samples at {wanted:g}")
    for side in parts.sides:
        found = side.teacher.temperature
        told = "does not say at which temperature it scores" if found is None else f"scores at {found:g}"
        advice = "log-ratios compare distributions at one temperature; score at the student's"
        yield Finding(f"the {side.label} {told}", "ok" if found in (None, wanted) else "error", advice)


def _lengths(parts: Parts) -> Iterator[Finding]:
    recipe, own = parts.recipe, parts.recipe.uses.own_samples
    new = recipe.sampling.max_new_tokens if own else 0
    limit = (
        prompt_limit(recipe, recipe.sampling, map(num_positions, parts.models.values()))
        if own
        else recipe.train.max_prompt_tokens
    )
    lengths = [len(ids) for _, ids in parts.prompts]
    kept = [length for length in lengths if length <= limit]
    if not kept:
        advice = "raise train.max_prompt_tokens, or lower sampling.max_new_tokens"
        yield Finding(f"all are longer than {limit} tokens, the shortest {min(lengths)}", "error", advice)
        return
    need = max(kept) + new
    yield Finding(f"{max(kept)} prompt tokens and {new} new ones make {need}")
    rooms = {"student": num_positions(parts.loaded.model)}
    for side in parts.sides:
        rooms[side.label] = within(HEALTH_S, f"the {side.label}", lambda side=side: side.teacher.max_tokens)  # type: ignore[misc]
    rooms["rollout engine"] = parts.rollouts.collector.engine.num_positions
    for label, room in rooms.items():
        if room is not None:
            advice = f"too little room in the {label}; lower sampling.max_new_tokens or train.max_prompt_tokens"
            yield Finding(f"the {label} has {room:,} positions", "error" if room < need else "ok", advice)
    if len(kept) < len(lengths):
        left_out = f"{len(lengths) - len(kept)} of {len(lengths)} prompts are longer than {limit} and left out"
        advice = "longer prompts are left out; raise train.max_prompt_tokens, or take models with more positions"
        yield Finding(left_out, "warning", advice)
    for side in parts.sides:
        room, shown = rooms[side.label], _longest_shown(parts, side)
        if shown is None or room is None:
            continue
        found = f"the {side.label} is shown up to {shown} tokens and has {room} positions"
        advice = "long responses could not be scored: shorten the teacher's template, or max_new_tokens"
        yield Finding(found, "warning" if shown + new > room else "ok", advice)


def _longest_shown(parts: Parts, side: Side) -> int | None:
    """Tokens of the longest prompt as a teacher reads it that rewords them; None where it does not, or needs samples."""
    if side.section.needs_grades:
        return None
    longest = None
    for prompt, ids in parts.prompts:
        if side.name is not None and prompt.teacher != side.name:
            continue
        author = torch.full_like(ids, Author.PROMPT, dtype=torch.uint8)
        shown = side.teacher.num_prompt_tokens(Sample(prompt, 0, ids, author, len(ids), "data", ""))
        if shown != len(ids):
            longest = max(shown, longest or 0)
    return longest


CHECKS = (
    Check("health", "loaded", "whether its server answers", _health),
    Check("vocabulary", "loaded", "rows of embedding and head against the tokens that exist", _padding),
    Check("end of a response", "loaded", "tokens that end a response, on every side", _ends),
    Check(
        "generation settings", "advice", "the student's generation_config against eval.sampling", _generation_settings
    ),
    Check("weights", "advice", "tensors of each model's file against the parts of the model", _left_out),
    Check("chat template", "advice", f"{NUM_COMPARED} prompts in the template of every side", _templates),
    Check("temperature", "loaded", "that of the scores against the student's", _temperature),
    Check("lengths", "loaded", "first prompts and max_new_tokens against all positions", _lengths),
)
