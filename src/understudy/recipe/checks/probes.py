"""A rehearsal on two prompts, and what its samples say about teacher, engine and trainer. Nothing is changed by it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace

from understudy.lazy import Tensor, torch
from understudy.linear import score
from understudy.linear.rows import has_kernels
from understudy.models import has_bfloat16, unwrap
from understudy.models.backbone import evaluating
from understudy.recipe.checks.parts import Check, Finding, Level, Parts, precision
from understudy.teachers import LocalTeacher, Teacher
from understudy.trainer.collect import TOKEN_SCORES
from understudy.trainer.distributed import Ranks
from understudy.trainer.update import StudentModel, accumulate_gradients, prepare
from understudy.types import Author, Sample, Scores

NUM_PROMPTS = 2
MAX_SAMPLES = 2
"""Samples of each prompt: rewards are compared within a prompt."""
MAX_NEW_TOKENS = 64
"""Length of a rehearsed response: enough to see a difference, and quick."""
LIMITS = {"torch.float64": 1e-5, "torch.float32": 1e-3, "torch.float16": 1e-2, "torch.bfloat16": 5e-2}
"""Mean |difference| of log-probabilities that a precision explains, in nats: 5e-7 and 5e-3 were measured between two
engines on small models in float32 and bfloat16; large ones sum more, and sampled log-probabilities are kept in float32."""
WORTH = 1.1
"""Times the processor time of float32, from which on mixed precision is said to be slower."""
SAME = 1e-2
"""Relative difference of a loss, and of a gradient's norm, that the rounding of 16 bits explains."""
GROSS = 10.0
"""Times the limit: no precision explains this."""


@dataclass(frozen=True)
class Gap:
    """Between two lists of log-probabilities: [T], [T]."""

    mean: float
    largest: float
    num_missing: int
    """Tokens of which one of the two has no finite number; -inf on both sides is a token that both exclude."""

    @staticmethod
    def of(one: Tensor, other: Tensor) -> Gap:
        """Over the tokens that both have."""
        alike = one == other
        known = alike | (one.isfinite() & other.isfinite())
        if not bool(known.any()):
            return Gap(math.nan, math.nan, len(one))
        apart = torch.where(alike, 0.0, (one.double() - other.double()).abs())[known]
        return Gap(float(apart.mean()), float(apart.max()), int((~known).sum()))

    def level(self, dtype: torch.dtype, *, explained: float = 0.0, may_lack: bool = False) -> Level:
        """By what the precision explains: its limit, or what was measured on these samples, if that is more.

        `may_lack`: a run goes on without what is missing.
        """
        limit = max(LIMITS[str(dtype)], explained)
        if (self.num_missing and not may_lack) or self.mean > GROSS * limit:
            return "error"
        return "ok" if self.mean <= limit and not self.num_missing else "warning"

    def __str__(self) -> str:
        missing = f", {self.num_missing} tokens without a finite number" if self.num_missing else ""
        return f"{self.mean:.1e} nats in the mean, {self.largest:.1e} at most{missing}"


@contextmanager
def _unchanged(parts: Parts) -> Iterator[None]:
    """Generators, training modes and gradients are after it as before."""
    model, device = parts.trainer.student.model, parts.trainer.student.device
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, training in modes:
            module.training = training
        parts.trainer.optimizer.zero_grad()


def _rehearse(parts: Parts) -> Iterator[Finding]:
    """Draws, writes, rewards, scores, packs, and takes loss and gradient. Keeps the samples for the probes."""
    trainer = parts.trainer
    method, step = trainer.method.at(0)
    plan = method.plan(step)
    if plan.rewards is not None:
        # further prompts in place of flat ones would cost time and show nothing
        plan = replace(plan, rewards=replace(plan.rewards, dynamic_sampling=False))
    with _unchanged(parts), parts.short(NUM_PROMPTS, MAX_SAMPLES, MAX_NEW_TOKENS) as collector:
        rollouts = replace(parts.rollouts, collector=collector, ranks=Ranks())
        found = parts.bounded("writing and rewarding", lambda: rollouts.write(trainer.progress.position, plan, 0))
        scores = parts.bounded("scoring", lambda: collector.score(found.samples, method))
        parts.rehearsed = found = found.with_scores(scores)
        facts = f"{len(found.written)} samples of {sum(sample.num_response_tokens for sample in found.written)} tokens"
        rewards = [sample.reward for sample in found.samples if sample.reward is not None]
        if rewards:
            facts += f", mean reward {sum(rewards) / len(rewards):.2f}"
        if found.rejected:
            facts += f", {len(found.rejected)} turned down by the judge"
        if num_dropped := found.counts["samples_dropped"]:
            facts += f", {num_dropped} without scores dropped"
        if not found.samples:
            advice = "a weak student's first samples may all be turned down: look at who did it"
            yield Finding(f"{facts}; none is left to learn from", "warning", advice)
            return
        loss, norm = _gradient(parts, trainer.student, found.samples)
    text = f"{facts}; loss {loss:.4g}, gradient norm {norm:.3g}"
    if not (math.isfinite(loss) and math.isfinite(norm)):
        yield Finding(text, "error", "look at the teacher's scores and the weights' precision")
    elif norm == 0 and plan.rewards is None:
        yield Finding(text, "warning", "nothing is learnt from these samples: is the teacher the student itself?")
    else:
        yield Finding(text if norm else f"{text}, for all samples of a prompt were rewarded alike")


def _gradient(parts: Parts, student: StudentModel, samples: Sequence[Sample]) -> tuple[float, float]:
    """Loss and 2-norm of the gradient, which is left in the parameters."""
    trainer = parts.trainer
    method, step = trainer.method.at(0)
    micros = prepare(
        student,
        method,
        samples,
        step=step,
        draw=(trainer.seed, 0),
        ranks=Ranks(),
        fix_old=trainer.settings.minibatches * trainer.settings.passes > 1,
        by_teacher=trainer.several_teachers,
    )[0]
    heads = trainer.heads_of(method, samples)
    loss, _ = accumulate_gradients(student, micros, heads=heads, step=step, ranks=Ranks())
    gradients = [value.grad for value in trainer.optimizer.parameters if value.grad is not None]
    return loss, float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0


def _speed(parts: Parts) -> Iterator[Finding]:
    """Measures mixed precision against float32 on a CPU, and finds bfloat16 that the device has to emulate."""
    student, samples = parts.trainer.student, [] if parts.rehearsed is None else parts.rehearsed.samples
    if student.compute_dtype is not None and student.device.type == "cpu" and samples:
        took = []
        with _unchanged(parts):
            for dtype in (student.compute_dtype, None):
                # processor time: what else runs on the machine does not count
                started = time.process_time()
                _gradient(parts, replace(student, compute_dtype=dtype), samples)
                took.append(time.process_time() - started)
        found = (
            f"a gradient takes {took[0]:.2g} s of processor time in {student.compute_dtype}, {took[1]:.2g} s without"
        )
        advice = "mixed precision is slower here; leave train.compute_dtype out"
        slower = took[0] > WORTH * took[1]
        yield Finding(found.replace("torch.", ""), "warning" if slower else "ok", advice)
    for label, model in parts.models.items():
        if precision(model) == torch.bfloat16 and not has_bfloat16(student.device):
            found = f"the {label}'s weights are bfloat16, which {student.device} has no instructions for"
            yield Finding(
                found, "warning", f"emulating it takes several times as long; set float32 as the {label}'s dtype"
            )


def _kernels(parts: Parts) -> Iterator[Finding]:
    """Compares loss and gradient by the fused kernels, where a run uses them, with those by operations of torch."""
    student, rehearsed = parts.trainer.student, parts.rehearsed
    if not (student.fused_kernels and has_kernels(student.device)) or rehearsed is None or not rehearsed.samples:
        return
    found = []
    for one in (student, replace(student, fused_kernels=False)):
        with _unchanged(parts):
            found.append(_gradient(parts, one, rehearsed.samples))
    (loss, norm), (plain_loss, plain_norm) = found
    facts = f"loss {loss:.6g}, by operations of torch {plain_loss:.6g}; gradient norm {norm:.6g} and {plain_norm:.6g}"
    # a loss of rewards that are compared within a group may be 0 but for rounding, and its gradient is not
    scale = max(abs(plain_loss), plain_norm)
    is_close = max(abs(loss - plain_loss), abs(norm - plain_norm)) <= SAME * scale
    yield Finding(facts, "ok" if is_close else "error", "set train.fused_kernels: false, and report card and versions")


def _sampling(parts: Parts) -> Iterator[Finding]:
    """Says why the student's architecture keeps the engine of this process from writing prompts of all lengths together, and
    the trainer from reading rows without a mask."""
    rows = {"packed": "a mask keeps the samples of a row apart", "alone": "each sample has a row of its own"}
    if (reading := parts.trainer.student.style) in rows:
        name = type(unwrap(parts.loaded.model)).__name__
        yield Finding(f"in training {rows[reading]}: the attention of {name} cannot go by segments")
    tried = getattr(parts.rollouts.collector.engine, "style", None)
    if tried is None:
        return
    (style, reason), name = tried, type(unwrap(parts.loaded.model)).__name__
    if style == "none":
        advice = (
            "right, and slow: the time grows with the square of the length; lower sampling.max_new_tokens, or let a server "
            "write (rollout: vllm)"
        )
        yield Finding(
            f"{name} reads everything again for each token, without a cache, because {reason}", "warning", advice
        )
    elif style == "equal":
        yield Finding(f"{name} writes prompts of one length together, because {reason}")


def _determinism(parts: Parts) -> Iterator[Finding]:
    """Asks the teacher again, in another order and for one sample alone, and compares its scores."""
    rehearsed, teacher = parts.rehearsed, parts.teachers.teacher
    if rehearsed is None or teacher is None or teacher.recording is not None:
        return
    method, samples = parts.trainer.method.at(0)[0], rehearsed.samples
    scores = [sample.scores for sample in samples if sample.scores is not None]
    need = method.needs & TOKEN_SCORES
    if not need or not scores:
        return
    asked, k = teacher.uncached(), method.reads.k or None

    def ask(chosen: list[Sample]) -> Tensor:
        with _unchanged(parts):
            return _logprobs(asked, chosen, parts.bounded("scoring", lambda: asked.score(chosen, need, k=k)))

    first = _logprobs(asked, samples, scores)
    sizes = [sample.num_response_tokens for sample in samples]
    gaps = {
        "differences of log T: again": Gap.of(first, ask(samples)),
        "in another order": Gap.of(first, torch.cat(ask(samples[::-1]).split(sizes[::-1])[::-1])),
        "alone": Gap.of(first[: sizes[0]], ask(samples[:1])),
    }
    dtypes = [precision(side.teacher.model) for side in parts.sides if not side.label.startswith("reference")]
    dtype = max(dtypes, key=lambda dtype: LIMITS[str(dtype)])
    may_lack = parts.trainer.settings.on_missing_score == "drop"
    advice = (
        f"more than {str(dtype).removeprefix('torch.')} explains, so the student would chase noise: is there dropout or "
        "sampling in the teacher, do replicas hold other weights, are sequences mixed up in a batch?"
    )
    for name, gap in gaps.items():
        yield Finding(f"{name} {gap}", gap.level(dtype, may_lack=may_lack), advice)


def _logprobs(teacher: Teacher, samples: Sequence[Sample], scores: Sequence[Scores]) -> Tensor:
    """Log T of every response token, from whole rows where that is what the teacher gives. [T]."""
    found = []
    for sample, given in zip(samples, scores, strict=True):
        if given.logprob is not None:
            found.append(given.logprob.cpu())
            continue
        head = teacher.head_for(sample.teacher)
        assert given.hidden is not None
        assert head is not None
        hidden = given.hidden.to(head.weight.device)
        found.append(score(hidden, head, sample.response_ids.to(hidden.device))[0].cpu())
    return torch.cat(found)


def _own_scores(parts: Parts) -> Iterator[Finding]:
    """Compares the log-probabilities of the student's tokens as the trainer, the engine and a teacher compute them.

    A teacher knows no mixed precision, so it is compared with the trainer without it. How far that moves these samples is
    measured: the engine may be twice as far from a trainer of the same mixed precision, in which both are rounded.
    """
    student, teacher = parts.trainer.student, parts.teachers.teacher
    written = [] if parts.rehearsed is None else parts.rehearsed.written
    samples = [sample for sample in written if bool((sample.author == Author.STUDENT).any())]
    if not samples or student.temperature != parts.recipe.temperature:
        return
    wrote = torch.cat([sample.author[sample.prompt_length :] for sample in samples]) == Author.STUDENT
    target = torch.cat([sample.response_ids for sample in samples]).to(student.device)
    dtype, moved = precision(student.model, student.compute_dtype), None

    def trained_in(compute_dtype: torch.dtype | None) -> Tensor:
        states = replace(student, compute_dtype=compute_dtype).hidden(student.lay_out(samples))
        return score(states, student.head(), target)[0].cpu()[wrote]

    with _unchanged(parts):
        with torch.no_grad(), evaluating(student.model):
            trained = plain = trained_in(student.compute_dtype)
            if student.compute_dtype is not None:
                plain = trained_in(None)
                moved = Gap.of(trained, plain)
                yield Finding(f"{student.compute_dtype} moves log S by {moved}".replace("torch.", ""))
        if teacher is not None:
            copy = LocalTeacher(
                student.model,
                name="the student",
                vocab_size=student.vocab_size,
                absent=student.absent,
                temperature=student.temperature,
                device=student.device,
                around=nullcontext,
            )
            gap = Gap.of(plain, _logprobs(copy, samples, copy.score(samples, frozenset({"sampled"})))[wrote])
            found = f"log S / T of a teacher that is the student, which should be 0: {gap}"
            advice = "scoring and training do not compute the same distribution for this model; report it"
            yield Finding(found, gap.level(precision(student.model)), advice)
    if teacher is None or teacher.recording is None:
        # NaN where the engine gives no log-probabilities
        given = [
            torch.full((sample.num_response_tokens,), math.nan)
            if sample.rollout_logprob is None
            else sample.rollout_logprob[sample.prompt_length :]
            for sample in samples
        ]
        named = parts.recipe.engine.dtype
        of_engine = precision(parts.loaded.model) if named == "auto" else getattr(torch, named)
        gap = Gap.of(trained, torch.cat(given)[wrote])
        advice = (
            "the engine does not draw from what is trained: compare its weights, temperature, precision and what its "
            "log-probabilities refer to (before or after temperature and filters)"
        )
        coarsest = max(dtype, of_engine, key=lambda dtype: LIMITS[str(dtype)])
        level = gap.level(coarsest, explained=0.0 if moved is None else 2 * moved.mean)
        yield Finding(f"between engine and trainer: {gap}", level, advice)


CHECKS = (
    Check("rehearsal", "rehearsed", "draw, write, reward, score, pack, loss and gradient on two prompts", _rehearse),
    Check(
        "kernels", "rehearsed", "loss and gradient by Triton's kernels and by operations of torch, on a GPU", _kernels
    ),
    Check("precision", "rehearsed", "bfloat16 against float32, on this device", _speed),
    Check("sampling", "rehearsed", "how the student in this process writes a batch", _sampling),
    Check("teacher's scores", "rehearsed", "the same samples scored again, in another order, and alone", _determinism),
    Check(
        "log-probabilities",
        "rehearsed",
        "the engine's, the trainer's, and those of a teacher that is the student",
        _own_scores,
    ),
)
