"""One optimizer update: packed micro-batches, one loss and its gradient, AdamW."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from understudy.errors import CheckpointError
from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.linear import CutTerms, LMHead, count_denominators, count_own, cut_terms, evaluate, score
from understudy.linear.plan import FullTeacher, TermsOf
from understudy.losses.schedules import learning_rate
from understudy.losses.terms import Reads
from understudy.methods import Method
from understudy.models import backbone_hidden, lm_head
from understudy.models.backbone import evaluating
from understudy.models.parallel import like, local, reduce_gradients, shards_of, sum_head_gradients, whole
from understudy.packing import Layout, RowStyle, ScoreField, lay_out, micro_batches, pack
from understudy.randomness import keyed_uniform
from understudy.trainer.distributed import Ranks
from understudy.trainer.settings import Train
from understudy.trainer.tokens import StepTokens
from understudy.types import Metric, Prompt, Sample, Scores, TokenBatch, add_metrics, fill, map_tensors

MICRO_BATCH_TOKENS = {"cpu": 2_048}
MICRO_BATCH_TOKENS_ELSEWHERE = 16_384
NUM_MEASURED = 4_096
"""Weights of each tensor on which `update_survives` is measured."""
_MASTER = "master"


@dataclass(frozen=True)
class StudentModel:
    """The model in training and its forward-pass settings."""

    model: nn.Module
    device: torch.device
    vocab_size: int
    temperature: float
    compute_dtype: torch.dtype | None
    micro_batch_tokens: int | None = None
    absent: tuple[int, ...] = ()
    """Ids below `vocab_size` that are no tokens of the student, but of a teacher."""
    style: RowStyle = "packed"
    fused_kernels: bool = True
    """Whether losses use the kernels of `linear.fused` where these run."""

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a shard of the weights: every forward is then a collective call."""
        return shards_of(self.model) is not None

    @property
    def is_sliced(self) -> bool:
        """Whether each rank holds a slice of the head: every use of it is then a collective call."""
        shards = shards_of(self.model)
        return shards is not None and shards.head is not None

    def head(self) -> LMHead:
        """The head at the rollout temperature, over the tokens that exist."""
        return lm_head(self.model, temperature=self.temperature, vocab_size=self.vocab_size, absent=self.absent)

    def lay_out(self, samples: Sequence[Sample]) -> Layout:
        """Returns the samples in rows as this model takes them, on its device."""
        return map_tensors(lay_out(samples, self.style), lambda value: value.to(self.device))

    def hidden(self, layout: Layout) -> Tensor:
        """Returns the hidden states that predict the response tokens, in the order of `pack`. [T, H]."""
        # weights may be float32 while the arithmetic is mixed precision
        with torch.autocast(self.device.type, dtype=self.compute_dtype, enabled=self.compute_dtype is not None):
            states = backbone_hidden(self.model, layout.input_ids, layout.position_ids, layout.images, layout.segments)
        return states.flatten(0, 1)[layout.predicts]


@dataclass(frozen=True)
class Heads:
    """Heads of the models whose whole rows are compared with the student's; empty where a method needs none."""

    teachers: Mapping[str | None, LMHead] = field(default_factory=dict)
    """By the name that samples have for the teacher; None: the only one."""
    references: Mapping[str | None, LMHead] = field(default_factory=dict)
    """By the same names."""


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """The input of one forward and backward."""

    samples: Sequence[Sample]
    layout: Layout
    """Layout of the samples, on the student's device: every forward over them uses it."""
    batch: TokenBatch
    terms: TermsOf
    counts: Mapping[str, float]
    """Its part of the denominators (`count_denominators`), counted before the batch went to the device."""
    teacher: str | None = None
    """Name of the samples' teacher where there are several: one micro-batch, one teacher."""


def prepare(
    student: StudentModel,
    method: Method,
    samples: Sequence[Sample],
    *,
    step: int,
    draw: tuple[int, int],
    ranks: Ranks,
    num_minibatches: int = 1,
    fix_old: bool = False,
    by_teacher: bool = False,
) -> list[list[MicroBatch]]:
    """Returns the micro-batches of each of `num_minibatches` updates; `by_teacher`: each has samples of one teacher.

    `step` is the method's own; `draw`, the run's seed and step, is what random draws are keyed by.

    `fix_old`: S_old is computed now, because the student will have moved when it is needed. A method of scope "batch"
    gets all samples of all updates and ranks at once.
    """
    parts = [_micro_batches(student, method, part, draw, by_teacher) for part in ranks.divide(samples, num_minibatches)]
    if student.is_sharded:
        # every forward is a collective call, so all ranks make the same number of them
        numbers = [max(found) for found in zip(*ranks.gather([len(part) for part in parts]), strict=True)]
        parts = [part + [_nothing(student, method)] * (n - len(part)) for part, n in zip(parts, numbers, strict=True)]
    if fix_old or method.scope == "batch":
        parts = [[_score_old(student, micro) for micro in part] for part in parts]
    if method.scope == "batch":
        batches = [micro.batch for part in parts for micro in part if micro.samples]
        everywhere = ranks.gather([batch.to(torch.device("cpu")) for batch in batches] if ranks.world > 1 else [])
        others = [batch for rank, part in enumerate(everywhere) if rank != ranks.rank for batch in part]
        elsewhere = [batch.to(student.device) for batch in others]
        terms = iter(cut_terms(method, batches, step, elsewhere=elsewhere) if batches else ())
        parts = [[replace(micro, terms=next(terms)) if micro.samples else micro for micro in part] for part in parts]
    return parts


def _micro_batches(
    student: StudentModel, method: Method, samples: Sequence[Sample], draw: tuple[int, int], by_teacher: bool
) -> list[MicroBatch]:
    default = MICRO_BATCH_TOKENS.get(student.device.type, MICRO_BATCH_TOKENS_ELSEWHERE)
    max_tokens = student.micro_batch_tokens or default
    names = [sample.teacher if by_teacher else None for sample in samples]
    made = []
    for teacher in dict.fromkeys(names):
        own = [sample for sample, name in zip(samples, names, strict=True) if name == teacher]
        for group in micro_batches(own, max_tokens, student.style):
            chosen = [own[index] for index in group]
            uniform = None
            if "uniform" in method.requires:
                # the same for a sample whatever batch it is in
                sizes = [sample.num_response_tokens for sample in chosen]
                draws = keyed_uniform(draw[0], "trust", draw[1], [sample.key for sample in chosen], max(sizes))
                uniform = torch.cat([row[:size] for row, size in zip(draws, sizes, strict=True)])
            made.append(_micro_batch(student, chosen, pack(chosen, uniform=uniform), method, teacher))
    return made


def _micro_batch(
    student: StudentModel, samples: Sequence[Sample], batch: TokenBatch, terms: TermsOf, teacher: str | None = None
) -> MicroBatch:
    counts = count_denominators([batch])
    return MicroBatch(samples, student.lay_out(samples), batch.to(student.device), terms, counts, teacher)


def _nothing(student: StudentModel, method: Method) -> MicroBatch:
    """A micro-batch of one token that is not trained: its loss and its gradient are 0. A head in slices is read for it as for
    those of other ranks."""
    ids = torch.zeros(2, dtype=torch.int64)
    sample = Sample(Prompt(id=""), 0, ids, torch.zeros_like(ids, dtype=torch.uint8), 1, "data", "")
    batch, terms = pack([sample]), CutTerms([], Reads())
    if student.is_sliced:
        terms = CutTerms([], method.reads, min_log_ratio=method.min_log_ratio)
        if method.reads.topk is not None and "full" not in method.needs:
            top = torch.arange(method.reads.k)[None]
            batch = replace(batch, topk_ids=top, topk_logprob=torch.zeros(top.shape))
    return replace(_micro_batch(student, [sample], batch, terms), samples=())


@no_grad
def _score_old(student: StudentModel, micro: MicroBatch) -> MicroBatch:
    """The micro-batch with log S_old and the entropy of S_old at every token."""
    # without dropout: S_old is the policy that the ratio is taken against
    with evaluating(student.model):
        hidden = student.hidden(micro.layout)
    logprob, entropy = score(hidden, student.head(), micro.batch.target)
    return replace(micro, batch=fill(micro.batch, student_logprob=logprob, student_entropy=entropy))


def accumulate_gradients(
    student: StudentModel,
    micros: Sequence[MicroBatch],
    *,
    heads: Heads,
    step: int,
    ranks: Ranks,
    tokens: StepTokens | None = None,
) -> tuple[float, dict[str, Metric]]:
    """Adds the gradient of the update's loss to the parameters; returns the loss and the metrics, of all ranks.

    `tokens` records the numbers of single tokens.

    The denominators are counted over all samples of all ranks before the first forward, so neither the cut into
    micro-batches nor the number of ranks changes the loss.
    """
    counts = {name: sum(micro.counts[name] for micro in micros) for name in count_denominators([])}
    own = [(micro.batch, micro.terms) for micro in micros if isinstance(micro.terms, CutTerms)]
    if own:
        counts |= count_own(*zip(*own, strict=True))
    counts = ranks.sum_counts(counts)
    losses, total = list[Tensor](), dict[str, Metric]()
    for number, micro in enumerate(micros, 1):
        reduce_gradients(student.model, now=number == len(micros))
        keep = tokens.begin(micro.samples, micro.batch.target.device) if tokens is not None and micro.samples else None
        evaluation = evaluate(
            micro.terms,
            micro.batch,
            student.hidden(micro.layout),
            student.head(),
            step=step,
            teacher=_whole_rows(micro, "scores", heads.teachers.get(micro.teacher)),
            reference=_whole_rows(micro, "reference_scores", heads.references.get(micro.teacher)),
            counts=counts,
            keep=keep,
            fused=None if student.fused_kernels else False,
        )
        if tokens is not None and keep is not None:
            tokens.end(micro.samples, keep)
        evaluation.loss.backward()
        losses.append(evaluation.loss.detach())
        total = add_metrics(total, evaluation.metrics)
        if micro.teacher is not None:
            named = {f"teacher/{micro.teacher}/{name}": metric for name, metric in evaluation.metrics.items()}
            total = add_metrics(total, named)
    sum_head_gradients(student.model)
    loss = sum(torch.stack(losses).tolist()) if losses else 0.0
    return ranks.sum_counts({"loss": loss})["loss"], ranks.sum_metrics(total)


def _whole_rows(micro: MicroBatch, which: ScoreField, head: LMHead | None) -> FullTeacher | None:
    """Hidden states and head, from which whole rows of a teacher are computed."""
    given: list[Scores | None] = [getattr(sample, which) for sample in micro.samples]
    if head is not None and not given:
        # without samples only heads in slices have a part to play
        return None if head.slice is None else (head.weight.new_zeros(len(micro.batch), head.weight.shape[1]), head)
    if head is None or None in given:
        return None
    hidden = [score.hidden for score in given if score is not None and score.hidden is not None]
    return torch.cat(hidden).to(micro.batch.target.device), head


class Optimizer:
    """AdamW (arXiv 1711.05101); matrices decay, vectors (norms, biases) do not. Its state is keyed by parameter names.

    With `master_weights` it updates float32 copies of the trained weights in 16 bits, which are the copies rounded: most
    updates are smaller than what 16 bits resolve, and would be lost. Gradients are summed in float32 then.
    """

    def __init__(self, model: nn.Module, settings: Train) -> None:
        self._settings = settings
        self._named = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._masters = {
            name: _master_of(value)
            for name, value in self._named.items()
            if settings.master_weights and value.element_size() < torch.float32.itemsize
        }
        self._updated = self._named | self._masters
        matrices = [value for value in self.parameters if value.dim() >= 2]
        vectors = [value for value in self.parameters if value.dim() < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=True,
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The tensors that it updates, which hold the gradients: the trained parameters or their master weights."""
        return list(self._updated.values())

    def zero_grad(self) -> None:
        """Clears all gradients."""
        for value in self.parameters:
            value.grad = None

    def clip(self) -> float:
        """Returns the 2-norm of the gradient before clipping; scales a larger gradient down to `max_grad_norm`."""
        limit = self._settings.max_grad_norm
        norm = whole(nn.utils.get_total_norm([value.grad for value in self.parameters if value.grad is not None]))
        if limit is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, limit, norm)
        return float(norm)

    @no_grad
    def step(self, step: int) -> dict[str, Metric]:
        """One update with the learning rate of optimizer step `step`; returns `lr` and `update_survives`."""
        settings = self._settings
        rate = learning_rate(
            step,
            peak=settings.lr,
            num_steps=settings.steps,
            warmup_steps=settings.warmup_steps,
            shape=settings.schedule,
            final_share=settings.final_lr_share,
        )
        for group in self._adamw.param_groups:
            group["lr"] = rate
        before = [_some_of(value).clone() for value in self.parameters]
        self._adamw.step()
        for name, master in self._masters.items():
            self._named[name].copy_(master)
        return {"lr": Metric(rate, 1), "update_survives": self._survives(before)}

    def _survives(self, before: Sequence[Tensor]) -> Metric:
        """Share of AdamW's requested update, summed as |change|, that falls on weights that changed.

        Rounding to a weight's precision can remove its change. Measures a subset of each tensor's weights on this rank.
        """
        sums = []
        decay = {value: group["weight_decay"] for group in self._adamw.param_groups for value in group["params"]}
        (first_beta, second_beta), eps = self._settings.betas, self._settings.eps
        rate = float(self._adamw.param_groups[0]["lr"])
        for value, old in zip(self.parameters, before, strict=True):
            if value.grad is None:
                continue
            state = self._adamw.state[value]
            count = state["step"].double()
            first = _some_of(state["exp_avg"]).double() / (1 - first_beta**count)
            second = _some_of(state["exp_avg_sq"]).double() / (1 - second_beta**count)
            asked = rate * (first / (second.sqrt() + eps) + decay[value] * old.double()).abs()
            kept = torch.where(_some_of(value) != old, asked, 0.0)
            # a tensor counts by its size, however many of its weights were looked at
            sums.append(torch.stack([kept.sum(), asked.sum()]).mul(local(value).numel() / max(1, old.numel())))
        return Metric(*torch.stack(sums).sum(0).tolist()) if sums else Metric(0.0, 0.0)

    def state(self) -> dict[str, Tensor]:
        """`{parameter name/key: tensor}`, master weights by the key "master"."""
        moments = {
            f"{name}/{key}": value.contiguous()
            for name, parameter in self._updated.items()
            for key, value in self._adamw.state.get(parameter, {}).items()
        }
        return moments | {f"{name}/{_MASTER}": value.detach() for name, value in self._masters.items()}

    @no_grad
    def load(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` returned; nothing from an empty one. Raises CheckpointError where it belongs to other
        parameters."""
        names = {name.rpartition("/")[0] for name in state}
        differing = sorted(names - set(self._named))
        if differing:
            raise CheckpointError(f"the optimizer state belongs to other parameters, first {differing[0]!r}")
        masters = {name.rpartition("/")[0] for name in state if name.endswith(f"/{_MASTER}")}
        if state and masters != set(self._masters):
            raise CheckpointError(
                f"the checkpoint has float32 master weights of {len(masters)} parameters, and the run of "
                f"{len(self._masters)}: resume with the student.dtype and train.master_weights that wrote it"
            )
        for key, value in state.items():
            name, _, field = key.rpartition("/")
            parameter = self._updated[name]
            if field == _MASTER:
                parameter.copy_(value)
            else:
                # the number of steps is the same on all ranks
                self._adamw.state[parameter][field] = (
                    value.to(parameter.device) if value.dim() == 0 else like(value, parameter)
                )


def _master_of(parameter: nn.Parameter) -> nn.Parameter:
    """A float32 copy that takes over every gradient of the parameter as soon as a backward has formed it."""
    master = nn.Parameter(parameter.detach().float())

    def take_over(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    parameter.register_post_accumulate_grad_hook(take_over)
    return master


def _some_of(tensor: Tensor) -> Tensor:
    """About `NUM_MEASURED` entries of this rank's part, evenly spaced. [n]"""
    part = local(tensor.detach())
    return part.reshape(-1)[:: max(1, part.numel() // NUM_MEASURED)]
