"""The training loop: draw prompts, generate, score, update, log, evaluate, checkpoint."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from understudy.errors import CheckpointError, TrainingError, WeightsLostError
from understudy.eval.estimators import RIGHT
from understudy.eval.summary import EvalSummary, sample_row, token_table
from understudy.files import Hashed, write_json_lines
from understudy.lazy import Tensor, torch
from understudy.linear import LMHead
from understudy.methods import Method
from understudy.models.parallel import gathered, local, snapshot
from understudy.randomness import hash_name
from understudy.trainer.checkpoint import Progress, RunDir, checkpoint_path, prune, save_checkpoint, save_shards
from understudy.trainer.distributed import Ranks
from understudy.trainer.observe import Clock, Observer, collected_metrics, nonfinite_record, peak_memory_gib
from understudy.trainer.overlap import Overlapped
from understudy.trainer.rollouts import Rollouts, replaces_flat
from understudy.trainer.settings import Eval, Train
from understudy.trainer.signals import Abandoned, Stopped, StopSignal
from understudy.trainer.tokens import StepTokens, TokenRecorder
from understudy.trainer.update import Heads, MicroBatch, Optimizer, StudentModel, accumulate_gradients, prepare
from understudy.types import Metric, Sample, add_metrics, map_tensors

MAX_SKIPPED = 3
"""Consecutive steps without a finite loss and gradient before the run stops."""
MAX_EMPTY = 20
"""Consecutive steps without a sample to train on before the run stops: a weak student may start with a few."""
MAX_HEALED = 3
"""Times in one step that an engine is sent weights it has lost."""
MAX_FLAT = 3
"""Consecutive steps in which all samples of each prompt get equal rewards before the run prints advice."""
MAX_SAVING_S = 30.0
"""Seconds that a failed run waits for a checkpoint being written."""
SAVED_SAMPLES = 32
"""Training samples in one file of `samples/`."""

Result = TypeVar("Result")
Ending = Literal["finished", "good enough", "did not learn", "stopped by a signal"]


@dataclass
class Trainer:
    """One run. Its state is the weights, the optimizer's state and `progress`."""

    student: StudentModel
    method: Method
    rollouts: Rollouts | Overlapped
    publish: Callable[[int, Sequence[Sample]], dict[str, float]]
    """Sends the engine the weights after that many updates, and may compare the two on samples; returns the measurements."""
    optimizer: Optimizer
    settings: Train
    evaluation: Eval | None
    evaluate: Callable[[int], EvalSummary]
    """Evaluates at a step, on every rank alike."""
    save_student: Callable[[Path, Iterable[tuple[str, Tensor]] | None], None]
    """Writes the student as a resumed run loads it, with these weights in place of its own where they are in shards."""
    observer: Observer
    run_dir: RunDir
    ranks: Ranks
    seed: int
    progress: Progress
    several_teachers: bool = False
    tokens: TokenRecorder | None = None
    """Records per-token values of updates."""
    live_weights: bool = True
    """Whether samples are written, or scored, with the weights that are trained."""
    _torn: bool = False
    """Whether the weights are ahead of `progress`, so that no checkpoint may be written."""
    _warned_of_slots: bool = False
    _signal: StopSignal | None = None
    """While the run goes on."""
    _flat_in_row: int = 0
    _saving: Future[None] | None = None
    """The checkpoint in shards that is being written."""
    _saving_group: Any = None
    """Process group by which ranks agree on what is written, beside those of training."""

    def run(self) -> Ending:
        """Trains from `progress` to the end, a good evaluation, or a signal; always leaves a checkpoint."""
        ends_early = self.settings.stop_at is not None
        self.observer.console.start(self.settings.steps, self.progress.step, ends_early=ends_early)
        with StopSignal() as self._signal, self._saved_on_failure():
            ending: Ending = "stopped by a signal"
            with suppress(Stopped):
                ending = self._steps()
            self._checkpoint()
            self._finish_saving()
        return ending

    def _steps(self) -> Ending:
        """Steps and evaluations, those too that a stop left out, until training ends."""
        self._evaluate_where_due()
        while (ending := self._ending()) is None:
            self._check_alarms()
            self._take_step()
            self._evaluate_where_due()
            if self._is_due(self.settings.save_every):
                self._checkpoint()
        if ending != "stopped by a signal" and self.evaluation is not None:
            self._evaluate()
        return ending

    def _ending(self) -> Ending | None:
        """Why training ends here; None: it goes on."""
        if self.ranks.any(self._signal is not None and self._signal.received):
            return "stopped by a signal"
        if self.progress.step >= self.settings.steps:
            return "finished"
        goal, best = self.settings.stop_at, self.progress.best_value
        return "good enough" if goal is not None and best is not None and best >= goal else None

    def _check_alarms(self) -> None:
        """Raises TrainingError, with everything saved, while an alarm is on that stops the run."""
        if "stop" not in self.settings.on_alarm.values():
            return
        names = self.ranks.gather(self.observer.alarms.stopping)[0]
        if names:
            self._checkpoint()
            self._finish_saving()
            raise TrainingError(
                f"alarm {' and '.join(names)} stops the run after step {self.progress.step} (train.on_alarm); it is saved. See "
                f"what to change: understudy report {self.run_dir.path}. To go on as it is: --resume "
                f"{' '.join(f'train.on_alarm.{name}=warn' for name in names)}"
            )

    def _breakable(self) -> AbstractContextManager[None]:
        """A context that a signal leaves at once, as what is in it is done again after a resume.

        Nothing is left between two updates of a step, nor while other ranks wait in a collective call.
        """
        if self._signal is None or self._torn or self.ranks.world > 1:
            return nullcontext()
        return self._signal.breaks()

    def _whole(self) -> AbstractContextManager[None]:
        """A context for whatever is done with the trained weights but an update."""
        return gathered(self.student.model) if self.live_weights else nullcontext()

    def _take_step(self) -> None:
        """Collects samples, trains on them, publishes the weights, and logs the numbers."""
        self.run_dir.check_kept()
        step, updates, clock = self.progress.step, self.progress.updates, Clock(self.student.device)
        empty_before = self.progress.empty_in_row
        # dropout draws from torch's own generator; this makes it a function of the step, as all other draws are
        torch.manual_seed(hash_name(f"{self.seed}/{step}/{self.ranks.rank}") >> 1)
        method, own_step = self.method.at(step)
        with self._breakable(), self._whole():
            collected = self._healed(lambda: self.rollouts.collect(self.progress, method, own_step, clock, self.tokens))
            collected = self.rollouts.score(collected, method, clock)
            sleeps = self.rollouts.collector.engine.sleep(asks=self.ranks.is_main)
        with clock("update_s"):
            tokens = None if self.tokens is None else self.tokens.begin(collected.samples, step + 1)
            numbers = self._update(collected.samples, method, own_step, tokens)
        metrics = self.ranks.sum_metrics(collected_metrics(collected, updates, by_teacher=self.several_teachers))
        numbers |= _means(metrics) | self.ranks.sum_counts(collected.counts) | {"peak_memory_gib": peak_memory_gib()}
        if len(self.method.members) > 1:
            numbers["phase"] = float(next(n for n, part in enumerate(self.method.members) if part is method))
        num_samples, num_tokens = int(metrics["response_tokens"].count), int(metrics["response_tokens"].total)
        self.progress = replace(
            self.progress,
            step=step + 1,
            position=collected.next_position,
            num_samples=self.progress.num_samples + num_samples,
            num_tokens=self.progress.num_tokens + num_tokens,
        )
        # the step is done: a failure from here on, that of the push too, loses nothing of it
        self._torn = False
        try:
            # servers that sleep have lost their weights, also where the step was skipped
            if self.progress.updates > updates or sleeps:
                if sleeps and self.student.device.type == "cuda":
                    torch.cuda.empty_cache()
                    self.ranks.barrier()
                with self._breakable():
                    numbers |= self._healed(lambda: self.publish(self.progress.updates, collected.samples))
        finally:
            self.progress = replace(self.progress, elapsed_s=self.progress.elapsed_s + clock.total_s())
            self.observer.step(self.progress, numbers | clock.rates(num_samples, num_tokens), collected.positions)
        self._save_samples([*collected.samples, *collected.rejected])
        if self.tokens is not None and tokens is not None:
            picture = self.tokens.write(tokens, method, step + 1)
            if picture is not None and self.ranks.is_main:
                self.observer.files["pictures"].write(picture)
        acceptance = method.plan(own_step).acceptance
        fills = acceptance is not None and acceptance.by_teacher
        if fills and numbers.get("slots_empty", 0.0) > 0 and not self._warned_of_slots:
            self._warned_of_slots = True
            self.observer.warn(
                self.progress.step,
                f"step {self.progress.step}: {numbers['slots_empty']:.0%} of the places of rejected samples stay empty, for "
                "nothing was left to fill them with. Each response of a teacher fills one place in a group: give more "
                "responses a prompt, raise responses.temperature where a teacher writes them, or lower "
                "method.threshold",
            )
        is_empty, is_flat = self.progress.empty_in_row > empty_before, False
        if "reward" in numbers:
            num_flat = numbers["prompts_flat"]
            # flat prompts that are replaced leave an empty step where all are flat
            replaced = replaces_flat(method.plan(own_step))
            is_flat = is_empty and num_flat > 0 if replaced else num_flat >= self.settings.prompts_per_step
            self._check_rewards(numbers["reward"], is_flat, skipped=is_empty)
        if is_empty and not is_flat:
            self.observer.warn(step + 1, f"step {step + 1} was skipped: no sample with a trained token is left")
        self._check_progress()

    def _check_progress(self) -> None:
        """Raises TrainingError where nothing has been learnt for too long."""
        step, folder = self.progress.step, self.run_dir.path
        if self.progress.empty_in_row >= MAX_EMPTY:
            raise TrainingError(
                f"no sample was left to train on in {MAX_EMPTY} steps in a row, last at step {step}: see accepted, "
                f"unscored, prompts_flat and samples_dropped in {folder / 'metrics.jsonl'} for the reason"
            )
        if self.progress.skipped_in_row >= MAX_SKIPPED:
            raise TrainingError(
                f"the loss or its gradient was not finite in {MAX_SKIPPED} steps in a row, last at step {step}; the batches "
                f"are in {folder / 'bad_batches'}. Lower train.lr, or look there for an unusual sample"
            )

    def _check_rewards(self, reward: float, is_flat: bool, skipped: bool) -> None:
        """Warns where the samples of every prompt are rewarded alike, so that no advantage says anything, and then says what
        may help."""
        if not is_flat:
            self._flat_in_row = 0
            return
        self._flat_in_row += 1
        step = self.progress.step
        if self._flat_in_row == 1:
            self.observer.warn(
                step,
                f"step {step}{' was skipped' if skipped else ''}: the samples of every prompt are rewarded alike (mean "
                f"{reward:.3g}): rewards teach nothing",
            )
        elif self._flat_in_row == MAX_FLAT:
            cause = (
                "take harder problems"
                if reward >= RIGHT
                else (
                    "read some in samples/: if right answers are graded wrong, see task.verifier; if they are cut, raise "
                    "sampling.max_new_tokens; else take easier problems, or train with sft or a teacher first"
                )
            )
            self.observer.warn(
                step,
                f"no prompt has samples of different reward since step {step - MAX_FLAT + 1}: {cause}; or raise "
                "train.samples_per_prompt or sampling.temperature, so that samples differ",
            )

    def _healed(self, do: Callable[[], Result]) -> Result:
        """Returns what `do` returns. An engine that has lost its weights gets them again, and what it wrote is forgotten."""
        if not self.rollouts.collector.engine.remote:
            return do()
        for _ in range(MAX_HEALED):
            lost: WeightsLostError | None = None
            try:
                found = do()
            except WeightsLostError as error:
                lost = error
            if not self.ranks.any(lost is not None):
                return found
            said = lost or "the rollout engine lost its weights, as another rank reports"
            text = f"{said}. It gets them again, and what it wrote since is written anew"
            self.observer.warn(self.progress.step, text)
            self.rollouts.reset()
            self.publish(self.progress.updates, ())
        return do()

    def _update(
        self, samples: Sequence[Sample], method: Method, own_step: int, tokens: StepTokens | None
    ) -> dict[str, float]:
        """Makes the updates of one step; returns the means of their loss, gradient norm and metrics."""
        settings, before = self.settings, self.progress
        with self._breakable():
            parts = prepare(
                self.student,
                method,
                samples,
                step=own_step,
                draw=(self.seed, before.step),
                ranks=self.ranks,
                num_minibatches=settings.minibatches,
                fix_old=settings.minibatches * settings.passes > 1,
                by_teacher=self.several_teachers,
            )
            heads = self.heads_of(method, samples)
        total: dict[str, Metric] = {}
        for part in parts * settings.passes:
            total = add_metrics(total, self._update_once(part, own_step, heads, tokens))
        if not total:
            self.progress = replace(self.progress, empty_in_row=before.empty_in_row + 1)
            return {}
        skipped = before.skipped_in_row + 1 if self.progress.updates == before.updates else 0
        self.progress = replace(self.progress, empty_in_row=0, skipped_in_row=skipped)
        return _means(total)

    def heads_of(self, method: Method, samples: Sequence[Sample]) -> Heads:
        """Returns the heads of the samples' teachers and of their references, where the method compares whole rows."""
        teacher, reference = self.rollouts.collector.teacher, self.rollouts.collector.reference
        if "full" not in method.needs:
            return Heads()
        names: Collection[str | None] = {sample.teacher for sample in samples} if self.several_teachers else {None}
        if self.several_teachers and teacher is not None and teacher.collective:
            # all ranks gather the same heads, in one order
            names = list(teacher.members())
        found = {} if teacher is None else {name: teacher.head_for(name) for name in names}
        heads = {name: head for name, head in found.items() if head is not None}
        if self.settings.minibatches * self.settings.passes > 1 and teacher is not None and teacher.state():
            # a teacher that follows the student would change the head under the hidden states of later updates
            heads = {name: map_tensors(head, torch.clone) for name, head in heads.items()}
        part = self.student.head()

        def like_student(head: LMHead) -> LMHead:
            # a copy, so that of a teacher's head no more than the slice stays
            return head if part.slice is None else map_tensors(head.cut(part.slice, part.num_tokens), torch.clone)

        heads = {name: like_student(head) for name, head in heads.items()}
        if "reference" not in method.needs or reference is None:
            return Heads(heads)
        # one head for all teachers with one reference: offloaded weights are copied to the device
        members = reference.members()
        named = {name: members.get(name or "", reference) for name in names}
        made = {one: one.head_for(name) for name, one in named.items()}
        references = {name: like_student(head) for name, one in named.items() if (head := made[one]) is not None}
        return Heads(heads, references)

    def _update_once(
        self, part: Sequence[MicroBatch], own_step: int, heads: Heads, tokens: StepTokens | None
    ) -> dict[str, Metric]:
        """Gradient, clip, optimizer step; an update whose loss or gradient is not finite changes nothing.

        Returns its metrics with loss, gradient norm and, unless it was skipped, those of `Optimizer.step`; nothing without
        a token.
        """
        step = self.progress.step
        self.optimizer.zero_grad()
        with self._breakable():
            loss, metrics = accumulate_gradients(
                self.student, part, heads=heads, step=own_step, ranks=self.ranks, tokens=tokens
            )
        if not self.student.is_sharded:
            self.ranks.sum_gradients(self.optimizer.parameters)
        norm = self.optimizer.clip()
        if not metrics:
            return {}
        metrics |= {"loss": Metric(loss, 1), "grad_norm": Metric(norm, 1)}
        if math.isfinite(loss) and math.isfinite(norm):
            self._torn = True
            metrics |= self.ranks.sum_metrics(self.optimizer.step(step))
            self.progress = replace(self.progress, updates=self.progress.updates + 1)
            if self.rollouts.collector.teacher is not None:
                self.rollouts.collector.teacher.follow(self.student.model)
        else:
            path = self._save_bad_batch(part)
            text = f"step {step + 1} was skipped: loss {loss}, gradient norm {norm}; its batch is in {path}"
            self.observer.warn(step + 1, text)
        self.optimizer.zero_grad()
        return metrics

    def _save_bad_batch(self, part: Sequence[MicroBatch]) -> Path:
        folder = self.run_dir.bad_batches
        name = f"step_{self.progress.step + 1:06d}_rank_{self.ranks.rank}"
        # one step may have several updates, and each of them may fail
        before = len(list(folder.glob(f"{name}*.jsonl")))
        path = folder / (f"{name}_{before + 1}.jsonl" if before else f"{name}.jsonl")
        write_json_lines(path, [nonfinite_record(sample) for micro in part for sample in micro.samples])
        return path

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.progress.step % every == 0

    def _evaluate_where_due(self) -> None:
        evaluation = self.evaluation
        if evaluation is not None and (self._is_due(evaluation.every) if self.progress.step else evaluation.at_start):
            self._evaluate()

    def _evaluate(self) -> None:
        """Evaluates the student as it is, unless that was done."""
        if self.observer.summaries and self.observer.summaries[-1].step == self.progress.step:
            return

        def evaluated() -> EvalSummary:
            summary = self.evaluate(self.progress.step)
            # an engine that was started again meanwhile has answered with other weights
            self.rollouts.collector.engine.verify()
            return summary

        started = time.perf_counter()
        with self._breakable(), self._whole():
            summary = self._healed(evaluated)
        shown = self.observer.evaluation(summary, time.perf_counter() - started)
        # the first rank's: a grader's time limit may strike on one rank and not on another
        value = self.ranks.gather((shown,))[0][0]
        if value is not None:
            self.progress = self.progress.evaluated(value)
            if self.settings.keep_best and self.progress.best_step == self.progress.step:
                self._checkpoint()

    def _checkpoint(self) -> None:
        named = self.student.model.named_parameters()
        own = [name for name, value in named if not bool(local(value).isfinite().all())]
        broken = sorted({name for part in self.ranks.gather(own) for name in part})
        if broken:
            raise TrainingError(
                f"{len(broken)} weights are not finite, first {broken[0]}: the run has diverged. No checkpoint was written "
                "or removed; lower train.lr and resume from an earlier step in a new run (student.model = a checkpoint's "
                "student/)"
            )
        self._finish_saving()
        folder, optimizer, progress = self.run_dir.checkpoints, self.optimizer.state(), self.progress
        is_there = self.ranks.gather(checkpoint_path(folder, progress.step).is_dir())[0]
        in_shards = self.student.is_sharded and not is_there
        if in_shards and self._saving_group is None:
            self._saving_group = torch.distributed.new_group(backend="gloo")
        weights = snapshot(self.student.model, self._saving_group) if in_shards else None
        files: dict[str, Hashed] = {}
        teacher: dict[str, Tensor] = {}
        if self.ranks.is_main:
            self.run_dir.check_kept()
            self.observer.sync()
            files = self.run_dir.hash_files()
            if self.rollouts.collector.teacher is not None:
                teacher = self.rollouts.collector.teacher.state()

        def write(optimizer: dict[str, Tensor] | Path) -> None:
            if self.ranks.is_main:
                save_checkpoint(
                    folder, progress, optimizer, lambda path: self.save_student(path, weights), teacher, files
                )
                prune(folder, self.settings.keep_last, progress.best_step if self.settings.keep_best else None)

        if not in_shards:
            write(optimizer)
            self.ranks.barrier()
            return
        # training goes on meanwhile, and moves the teacher too
        teacher = {name: value.detach().cpu().clone() for name, value in teacher.items()}
        wait = save_shards(folder, progress.step, optimizer, self._saving_group)

        def write_all() -> None:
            try:
                write(wait())
            finally:
                # the others send each tensor to the first rank, also where it cannot write them
                for _ in weights or ():
                    pass

        pool = ThreadPoolExecutor(1, "understudy-save")
        self._saving = pool.submit(write_all)
        pool.shutdown(wait=False)

    def _finish_saving(self) -> None:
        """Waits for the checkpoint that is being written. A collective call. Raises CheckpointError, on every rank, where it
        cannot be."""
        if not self.student.is_sharded:
            return
        saving, self._saving, problem = self._saving, None, ""
        try:
            if saving is not None:
                saving.result()
        except CheckpointError as error:
            problem = str(error)
        for said in self.ranks.gather(problem):
            if said:
                raise CheckpointError(said)

    def _save_samples(self, samples: Sequence[Sample]) -> None:
        every, step = self.settings.save_samples_every, self.progress.step
        if every and self.ranks.is_main and (step == 1 or step % every == 0):
            decode = self.rollouts.collector.renderer.tokenizer.decode
            shown = [(sample_row(one), token_table(one, decode)) for one in samples[:SAVED_SAMPLES]]
            rows = [row | {"tokens": tokens} for row, tokens in shown]
            write_json_lines(self.run_dir.samples / f"step_{step:06d}.jsonl", rows)
            # a cell of a dashboard's table is a text or a number
            plain = [{name: value for name, value in row.items() if name != "messages"} for row, _ in shown]
            self.observer.samples(step, plain)

    @contextmanager
    def _saved_on_failure(self) -> Iterator[None]:
        """Writes a checkpoint when an error ends the run between two steps, so that nothing learnt is lost."""
        try:
            yield
        except (CheckpointError, Abandoned):
            raise
        except BaseException:
            # with several ranks the others wait inside another collective call, so none can be made here
            if self.progress.step > 0 and not self._torn and self.ranks.world == 1:
                try:
                    self._checkpoint()
                except (CheckpointError, TrainingError, OSError) as problem:
                    # on a full disk the warning is no more than shown
                    with suppress(CheckpointError):
                        self.observer.warn(self.progress.step, f"no checkpoint could be written: {problem}")
            raise
        finally:
            if self._saving is not None:
                # what was begun may still be had, unless another rank is gone
                futures.wait([self._saving], timeout=MAX_SAVING_S)


def _means(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The mean of each metric that counted anything: one that was not measured is left out, never 0."""
    return {name: metric.value for name, metric in metrics.items() if metric.count}
