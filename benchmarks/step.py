"""Whole optimizer steps (generate, score, update) beside TRL's DistillationTrainer and beside the floor, in one run.

The same student distils from the same teacher with the same objective in both: full-vocabulary reverse KL at temperature 1,
float32, AdamW, no logging or saving between. Weights are random; prompts and lengths are the same in both. Every number is that
of the fastest step after a warm-up, because what else runs on a machine only adds; each side has a process of its own.

The floor of a step is what no exact step can do without, measured in the same run: the bare matrix products of the same shapes
and numbers of tokens, each prompt once; for every position that is decoded one read of the student's weights, or the
products of its tokens where these take longer. Attention, norms, softmax, draws and the optimizer count nothing.

    python benchmarks/step.py                      # needs pip install understudy[bench]; every case, about half an hour
    python benchmarks/step.py real-8-fixed qwen    # one case, and all whose name begins with qwen
    python benchmarks/step.py --sides understudy floor --json step.json
    python benchmarks/step.py --processor          # processor seconds of one thread, where others compute too

The cases of `qwen` read the Qwen tokenizer and the problems of GSM8K (docs/real-input.md); where they are absent, made-up words
stand in.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

PHASES = ("generate", "score", "update", "step")
WARM_UP_TOKENS = 4
"""Length of the responses of the first step, which is not counted."""
LR = 1e-5
SMOL = {"hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True}
QWEN = {"architecture": "qwen3", "num_layers": 2, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Shape:
    """A student, its teacher and the samples of a step."""

    title: str
    student: dict[str, Any]
    teacher: dict[str, Any]
    vocab_size: int
    samples: int
    """Samples of a step."""
    tokens: int
    """Of a response where all are of one length."""
    ragged: tuple[int, int]
    """The shortest and the longest response where they differ."""
    prompt: tuple[int, int] = (57, 137)
    """The shortest and the longest prompt, those of GSM8K."""
    steps: int = 1
    """Steps that are measured."""


SHAPES = {
    "quickstart": Shape(
        "quickstart pair: student 0.13 M, teacher 0.5 M, 17 entries",
        {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 64},
        {"hidden_size": 128, "num_layers": 2, "num_heads": 8, "max_position_embeddings": 64},
        vocab_size=17,
        samples=64,
        tokens=26,
        ragged=(8, 32),
        prompt=(8, 8),
        steps=20,
    ),
    "qwen": Shape(
        "Qwen vocabulary, GSM8K: hidden 32 and 64, 2 layers, 151,669 entries",
        QWEN | {"hidden_size": 32, "num_heads": 2},
        QWEN | {"hidden_size": 64, "num_heads": 4},
        vocab_size=151_669,
        samples=16,
        tokens=64,
        ragged=(16, 512),
        steps=2,
    ),
    "real": Shape(
        "SmolLM2's shape: student 92 M (18 layers), teacher 135 M (30 layers), 49,152 entries",
        SMOL | {"num_layers": 18},
        SMOL | {"num_layers": 30},
        vocab_size=49_152,
        samples=8,
        tokens=48,
        ragged=(16, 512),
    ),
}


@dataclass(frozen=True)
class Case:
    """A shape, so many samples a prompt, and lengths that are fixed or ragged."""

    shape: Shape
    samples_per_prompt: int
    ragged: bool

    @property
    def lengths(self) -> list[int]:
        """Tokens of each response of a step; ragged ones grow by the same factor, eight of them over the range."""
        shape = self.shape
        if not self.ragged:
            return [shape.tokens] * shape.samples
        low, high = shape.ragged
        return [round(low * (high / low) ** (number % 8 / 7)) for number in range(shape.samples)]

    @property
    def num_prompts(self) -> int:
        return self.shape.samples // self.samples_per_prompt


CASES = {
    f"{name}-{samples}-{'ragged' if ragged else 'fixed'}": Case(shape, samples, ragged)
    for name, shape in SHAPES.items()
    for samples in (1, 8)
    for ragged in (False, True)
}


def prepare(case: Case, folder: Path, tokenizer_path: Path, problems: Path) -> None:
    """Writes student, teacher and prompts."""
    from shapes import save_model, words
    from transformers import AutoTokenizer

    shape = case.shape
    is_qwen = shape is SHAPES["qwen"] and tokenizer_path.is_dir() and problems.is_file()
    if is_qwen:
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
        # plain text on both sides
        tokenizer.chat_template = None
        texts = [json.loads(line)["question"] for line in problems.read_text().splitlines()]
    else:
        tokenizer = words(shape.vocab_size)
        draw = random.Random(0)
        count = range(shape.prompt[0], shape.prompt[1] + 1)
        texts = [
            " ".join(f"t{draw.randrange(1, shape.vocab_size - 1)}" for _ in range(draw.choice(count)))
            for _ in range(2000)
        ]
    fitting = [text for text in texts if len(tokenizer(text)["input_ids"]) <= shape.prompt[1]]
    num = shape.steps * case.num_prompts
    # those of the warm-up are short
    write_prompts(
        folder,
        [{"prompt": text[:40]} for text in fitting[: case.num_prompts]] + [{"prompt": text} for text in fitting[:num]],
    )
    save_model(folder / "student", shape.student, tokenizer, seed=1)
    save_model(folder / "teacher", shape.teacher, tokenizer, seed=2)


def write_prompts(folder: Path, rows: list[dict[str, str]]) -> None:
    """Writes the rows so that a run, which shuffles them, draws them in this order."""
    from understudy.tasks.lazy import Permutation

    place_of = Permutation(len(rows), "0/order/0")
    shuffled = {place_of(place): row for place, row in enumerate(rows)}
    lines = [json.dumps(shuffled[place]) for place in range(len(rows))]
    (folder / "prompts.jsonl").write_text("\n".join(lines))


def read_prompts(folder: Path) -> list[str]:
    """The prompts in the order in which a run draws them."""
    from understudy.tasks.lazy import Permutation

    lines = (folder / "prompts.jsonl").read_text().splitlines()
    place_of = Permutation(len(lines), "0/order/0")
    return [json.loads(lines[place_of(place)])["prompt"] for place in range(len(lines))]


def run_ours(case: Case, folder: Path, **sections: Any) -> list[dict[str, float]]:
    """Seconds by phase of each step, from the metrics.jsonl of a run; `sections` replace those of its recipe."""
    from understudy import Recipe, train
    from understudy.engines.hf import engine

    opened, calls = engine.open_responses, [0]

    def cut(*args: Any, **kwargs: Any) -> list[Any]:
        responses: list[Any] = opened(*args, **kwargs)
        lengths = case.lengths if calls[0] else [WARM_UP_TOKENS] * len(responses)
        calls[0] += 1
        for response, length in zip(responses, lengths, strict=True):
            response.room = length
        return responses

    engine.open_responses = cut
    recipe = {
        "run_dir": str(folder / "run"),
        "student": {"model": str(folder / "student")},
        "teacher": {"type": "local", "model": str(folder / "teacher")},
        "task": {"type": "jsonl", "path": str(folder / "prompts.jsonl"), "prompt_field": "prompt", "chat": False},
        "method": {"type": "gkd", "beta": 1.0},
        "sampling": {"max_new_tokens": max(case.lengths)},
        "train": {
            "steps": case.shape.steps + 1,
            "prompts_per_step": case.num_prompts,
            "samples_per_prompt": case.samples_per_prompt,
            "lr": LR,
            "save_samples_every": 0,
        },
    } | sections
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    # without the doctor, whose rehearsal would take the memory of a step before it
    train(Recipe.load(path), examine=False, quiet=True)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert round(rows[-1]["response_tokens"] * case.shape.samples) == sum(case.lengths), rows[-1]
    # time_s is the clock of the run: a step is what lies between two lines
    return [
        {
            "step": row["time_s"] - before["time_s"],
            "gib": row["peak_memory_gib"],
            "gib_before": before["peak_memory_gib"],
        }
        | {name: row[f"{name}_s"] for name in PHASES[:-1]}
        for before, row in pairwise(rows)
    ]


def run_trl(case: Case, folder: Path) -> list[dict[str, float]]:
    """Seconds of each step by the trainer's callbacks; generation is timed around its own method."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList, TrainerCallback
    from trl import DistillationConfig, DistillationTrainer

    shape = case.shape
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    rows: list[dict[str, float]] = []
    generate_s, num_tokens = [], []

    class Cut(LogitsProcessor):  # type: ignore[misc]
        """Ends each response at its length."""

        def __init__(self, lengths: list[int]) -> None:
            self._lengths, self._written = torch.tensor(lengths), 0

        def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
            self._written += 1
            full = self._lengths == self._written
            if bool(full.any()):
                scores[full] = float("-inf")
                scores[full, tokenizer.eos_token_id] = 0.0
            return scores

    class Timed(DistillationTrainer):  # type: ignore[misc]
        """Times generation."""

        def _generate(self, prompts: list[object]) -> object:
            lengths = case.lengths if generate_s else [WARM_UP_TOKENS] * shape.samples
            generate = self.model.generate
            self.model.generate = lambda **kwargs: generate(
                **kwargs, logits_processor=LogitsProcessorList([Cut(lengths)])
            )
            begun = time.perf_counter()
            found = super()._generate(prompts)
            generate_s.append(time.perf_counter() - begun)
            self.model.generate = generate
            num_tokens.append(sum(len(ids) for ids in found[1]))
            return found

    class Clock(TrainerCallback):  # type: ignore[misc]
        """From the end of a step to the end of the next."""

        last: float | None = None

        def on_step_end(self, *_: object, **__: object) -> None:
            now = time.perf_counter()
            if self.last is not None:
                rows.append({"step": now - self.last, "generate": generate_s[-1], "gib": peak_gib()})
            self.last = now

    prompts = [text for text in read_prompts(folder) for _ in range(case.samples_per_prompt)]
    arguments = DistillationConfig(
        output_dir=str(folder / "trl"),
        per_device_train_batch_size=shape.samples,
        gradient_accumulation_steps=1,
        max_steps=shape.steps + 1,
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_completion_length=max(case.lengths),
        shuffle_dataset=False,
        temperature=1.0,
        beta=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "float32"},
    )
    trainer = Timed(
        model=str(folder / "student"),
        teacher_model=str(folder / "teacher"),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.train()
    assert num_tokens[-1] == sum(case.lengths), (num_tokens, case.lengths)
    return rows


def use_processor_seconds() -> None:
    """Lets every clock of this process count processor seconds of its one thread, which what else runs changes little."""
    torch.set_num_threads(1)
    time.perf_counter = time.process_time


def peak_gib() -> float:
    """The largest resident set of this process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Bare:
    """The matrices of a model, and its products with so many rows."""

    def __init__(self, folder: Path) -> None:
        from understudy.models import load_causal_lm

        model = load_causal_lm(str(folder), dtype="float32")
        head = model.get_output_embeddings()
        self.head = head.weight.detach()
        layers = (part for part in model.modules() if isinstance(part, nn.Linear) and part is not head)
        self.layers = [layer.weight.detach() for layer in layers]

    def read(self) -> float:
        """Seconds to read every weight once."""
        return fastest(lambda: [weight.sum() for weight in [*self.layers, self.head]])

    def forward(self, num_rows: int, *, head: bool = False) -> float:
        return fastest(lambda: [rows @ weight.T for rows, weight in self._with_rows(num_rows, head)])

    def backward(self, num_rows: int) -> float:
        """The gradients of inputs and weights of all layers."""

        def products() -> None:
            for rows, weight in self._with_rows(num_rows, head=False):
                out = rows.new_ones(len(rows), len(weight))
                out @ weight, out.T @ rows

        return fastest(products)

    def _with_rows(self, num_rows: int, head: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Each matrix, with rows for it; those of the head in the chunks of head.py, as nobody keeps all logits."""
        for weight in self.layers:
            yield torch.ones(num_rows, weight.shape[1]), weight
        for rows in torch.ones(num_rows if head else 0, self.head.shape[1]).split(256):
            yield rows, self.head


def fastest(run: Callable[[], object]) -> float:
    """The least seconds of three, or of as many as take two seconds."""
    found: list[float] = []
    while len(found) < 3 and sum(found) < 2.0:
        begun = time.perf_counter()
        run()
        found.append(time.perf_counter() - begun)
    return min(found)


@torch.no_grad()
def run_floor(case: Case, folder: Path) -> list[dict[str, float]]:
    """Seconds by phase of a step of the mean number of prompt tokens."""
    from head import Case as Head
    from head import products
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    lengths = [len(tokenizer(text)["input_ids"]) for text in read_prompts(folder)[case.num_prompts :]]
    num_prompt = round(sum(lengths) / len(lengths) * case.num_prompts)
    num_new = sum(case.lengths)
    student, teacher = Bare(folder / "student"), Bare(folder / "teacher")
    hidden = [torch.randn(num_new, model.head.shape[1]) for model in (student, teacher)]
    # the gradient of the head's weight has a place of its own, as in head.py
    head = Head(hidden[0], student.head.clone(), hidden[1], teacher.head, batch=None)  # type: ignore[arg-type]
    decoded = max(max(case.lengths) * student.read(), student.forward(num_new, head=True))
    numbers = {
        "generate": student.forward(num_prompt) + decoded,
        "score": teacher.forward(num_prompt + num_new),
        "update": student.forward(num_prompt + num_new)
        + student.backward(num_prompt + num_new)
        + fastest(lambda: products(head)),
    }
    return [numbers | {"step": sum(numbers.values()), "gib": peak_gib()}]


SIDES: dict[str, Callable[[Case, Path], list[dict[str, float]]]] = {
    "understudy": run_ours,
    "TRL": run_trl,
    "floor": run_floor,
}


def measure(side: str, name: str, folder: Path, *, processor: bool) -> dict[str, float]:
    """The fastest step of a side, in a process of its own."""
    out = folder / f"{side}.json"
    command = [sys.executable, __file__, name, "--side", side, "--folder", str(folder), "--json", str(out)]
    command += ["--processor"] * processor
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {side} failed:\n{done.stderr[-3000:]}")
    rows: list[dict[str, float]] = json.loads(out.read_text())
    return min(rows, key=lambda row: row["step"])


def better(one: dict[str, float] | None, other: dict[str, float]) -> dict[str, float]:
    """The one with the shorter step."""
    return other if one is None or other["step"] < one["step"] else one


Found = dict[str, dict[str, dict[str, float]]]
"""By case and side."""


def show(found: Found) -> None:
    """Seconds by phase, and what they come to, as tables in Markdown."""
    console = Console(width=160)
    table = Table("case", "", *PHASES, "samples/s", "peak GiB", box=box.MARKDOWN)
    ratios = Table("case", "rate / TRL", "step / floor", *PHASES[:-1], "memory / TRL", box=box.MARKDOWN)
    for name, sides in sorted(found.items(), key=lambda item: [*CASES].index(item[0])):
        for side, row in sides.items():
            seconds = [f"{row[phase]:.3g}" if phase in row else "" for phase in PHASES]
            gib = "" if side == "floor" else f"{row['gib']:.2f}"
            table.add_row(name, side, *seconds, f"{CASES[name].shape.samples / row['step']:.3g}", gib)
        if set(sides) == set(SIDES):
            mine, floor, trl = (sides[side] for side in ("understudy", "floor", "TRL"))
            phases = [f"{mine[phase] / floor[phase]:.2f}" for phase in PHASES[:-1]]
            numbers = [trl["step"] / mine["step"], mine["step"] / floor["step"]]
            ratios.add_row(name, *(f"{number:.2f}" for number in numbers), *phases, f"{mine['gib'] / trl['gib']:.2f}")
    for shape in SHAPES.values():
        console.print(f"{shape.title}; {shape.samples} samples a step", highlight=False)
    console.print(table, ratios)


def main() -> None:
    """Measures one case after the other, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"beginnings of names, of {', '.join(CASES)}")
    parser.add_argument("--turns", type=int, default=1, help="processes of each side, of which the fastest step counts")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=[*SIDES], help="those that are measured; all by default"
    )
    parser.add_argument(
        "--processor", action="store_true", help="processor seconds of one thread, where others compute too"
    )
    parser.add_argument(
        "--json", type=Path, help="where the numbers go; those of other cases that are there stay and are shown"
    )
    parser.add_argument("--tokenizer", type=Path, default=Path("../shared/tokenizers/qwen"))
    parser.add_argument("--problems", type=Path, default=Path("../shared/data/gsm8k/train.jsonl"))
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.processor:
        use_processor_seconds()
    if args.side:
        args.json.write_text(json.dumps(SIDES[args.side](CASES[args.cases[0]], args.folder)))
        return
    chosen = [name for name in CASES if not args.cases or name.startswith(tuple(args.cases))]
    if not chosen:
        parser.error(f"no case begins with {' or '.join(args.cases)}; the cases are {', '.join(CASES)}")
    found: Found = json.loads(args.json.read_text()) if args.json and args.json.is_file() else {}
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder:
            prepare(CASES[name], Path(folder), args.tokenizer, args.problems)
            best: dict[str, dict[str, float]] = {}
            for _ in range(args.turns):
                for side in args.sides:
                    best[side] = better(best.get(side), measure(side, name, Path(folder), processor=args.processor))
                    print(f"{name}, {side}: {best[side]['step']:.3g} s a step", flush=True)
        found[name] = found.get(name, {}) | best
        if args.json:
            args.json.write_text(json.dumps(found, indent=1))
    show(found)


if __name__ == "__main__":
    main()
