"""A step on 8, 64 and 1,024 GPUs by the formulas of `understudy plan`, and a simulation of its pipeline: docs/scaling.md.

The simulation is compared with what `benchmarks/overlap.py` measured before it says anything about GPUs.

    python scripts/scaling.py           prints the tables
    python scripts/scaling.py --write   puts them into docs/scaling.md
"""

from __future__ import annotations

import heapq
import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, repeat
from pathlib import Path
from statistics import fmean
from typing import Any

from understudy import config
from understudy.linear.chunked import CHUNK_ELEMENTS
from understudy.recipe import Recipe
from understudy.recipe.plan import (
    CARDS,
    DECODE_SHARE,
    NETWORK,
    Machine,
    Planned,
    Shape,
    collectives,
    plan,
    read_shape,
    server_rows,
)

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN, END = "<!-- begin: python scripts/scaling.py --write -->", "<!-- end -->"
QWEN3 = {"architecture": "qwen3", "head_dim": 128, "num_kv_heads": 8, "vocab_size": 151_936}
STUDENT = QWEN3 | {"hidden_size": 4096, "num_layers": 36, "num_heads": 32, "intermediate_size": 12_288}
TEACHER = QWEN3 | {"hidden_size": 5120, "num_layers": 64, "num_heads": 64, "intermediate_size": 25_600}
"""Qwen3-8B and Qwen3-32B, by their configurations."""
PROMPT, RESPONSE, LONGEST, SPREAD = 200, 4_000, 16_384, 0.6
"""Tokens: of a prompt and of a response on average, of the longest; the spread of a response's logarithm, an assumption."""
PER_GPU, FIXED = 16, 1_024
"""Samples a step: for each GPU, and where the batch does not grow."""
GPUS = (8, 64, 1_024)
REPLY_BYTES = {"sampled token": 17, "top 64": 529, "hidden states": 2 * 5120 + 9}
"""Bytes a token from a served teacher: the first two as measured, the last by the same format (docs/engines.md)."""
REQUEST_TOKENS = 16_384
"""The most that a teacher is asked for at once (`batch_tokens`)."""
STEPS, WARM_UP = 12, 3
STALENESS = (None, 0, 1, 2)
MEASURED = {
    "generation is slower": (0.300, 1.53, 0.64, (1.42, 1.45, 0.76, 0.66)),
    "about equal": (0.450, 0.86, 0.73, (1.85, 1.89, 1.05, 0.87)),
    "scoring is slower": (0.700, 0.59, 1.14, (1.52, 1.53, 0.87, 0.59)),
}
"""`python benchmarks/overlap.py`: median of the set delays of a request to the teacher (s); seconds to generate, and to score
and update; and a step over the longer of the two, in turn and with a staleness of 0, 1 and 2."""


# --- the simulation -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """The parts of a run."""

    samples: int
    """Of a step."""
    engines: int
    rows: int
    """Samples that an engine writes at a time."""
    token_s: float
    """Seconds for one more token of all samples that an engine writes, without what their keys and values take."""
    row_s: float
    """What each of these samples adds."""
    teachers: int
    """Requests that are scored at a time."""
    request_s: Callable[[], float]
    score_s: float
    """Seconds of a request, beside those of each of its tokens."""
    request_tokens: float
    update_s: float
    push_s: float


@dataclass(eq=False)
class Engine:
    """Writes a token of all its samples at a time: a clock that counts tokens, the slower the more samples there are."""

    speeds: Speeds
    tokens: float = 0.0
    at: float = 0.0
    """When it had counted so many; in a pause, when it goes on."""
    ends: list[tuple[float, int, int, float]] = field(default_factory=list)
    """Of each sample the count at its end, its number, step and length."""
    busy: float = 0.0
    turn: int = 0
    """Samples came or went so often."""

    @property
    def rate(self) -> float:
        return self.speeds.token_s + self.speeds.row_s * len(self.ends)

    def settle(self, now: float) -> None:
        """Counts until now."""
        if now > self.at:
            if self.ends:
                self.tokens += (now - self.at) / self.rate
                self.busy += now - self.at
            self.at = now

    def next_end(self) -> float:
        return self.at + (self.ends[0][0] - self.tokens) * self.rate


def simulate(speeds: Speeds, lengths: Iterator[float], staleness: int | None) -> tuple[float, float, float, float]:
    """Seconds of a step, the first ones left out, and the shares of the time in which engines, teachers and the trainer work.

    `staleness` None: one after the other. Else as `understudy.trainer.overlap`: at the start of a step the prompts of so many
    further ones are sent too, and a sample is scored as soon as it is written.
    """
    number, ahead = count(), staleness or 0
    engines = [Engine(speeds) for _ in range(speeds.engines)]
    waiting: deque[tuple[int, float]] = deque()
    unscored: deque[tuple[int, float]] = deque()
    events: list[tuple[float, int, str, Any]] = []
    written, scored = [0] * (STEPS + ahead + 1), [0] * (STEPS + ahead + 1)
    free, sent, now, updating, begins = speeds.teachers, 0, 0.0, False, [0.0]
    scoring_s = 0.0

    def give(engine: Engine, name: int) -> None:
        # the next samples that wait, and when the first of its samples is done
        engine.settle(now)
        while waiting and len(engine.ends) < speeds.rows:
            step, length = waiting.popleft()
            heapq.heappush(engine.ends, (engine.tokens + length, next(number), step, length))
        engine.turn += 1
        if engine.ends:
            heapq.heappush(events, (engine.next_end(), next(number), "written", (name, engine.turn)))

    def spread() -> None:
        # to the engines with the fewest samples
        places = [(len(engine.ends), name) for name, engine in enumerate(engines)]
        heapq.heapify(places)
        touched = set()
        while waiting and places[0][0] < speeds.rows:
            held, name = heapq.heappop(places)
            engines[name].settle(now)
            step, length = waiting.popleft()
            heapq.heappush(engines[name].ends, (engines[name].tokens + length, next(number), step, length))
            heapq.heappush(places, (held + 1, name))
            touched.add(name)
        for name in sorted(touched):
            give(engines[name], name)

    while len(begins) <= STEPS:
        step = len(begins) - 1
        if sent <= step + ahead and not updating:
            while sent <= step + ahead:
                waiting.extend((sent, next(lengths)) for _ in range(speeds.samples))
                sent += 1
            spread()
        while unscored and free and (staleness is not None or written[step] == speeds.samples):
            part = [unscored.popleft()]
            while unscored and sum(size for _, size in part) + unscored[0][1] <= speeds.request_tokens:
                part.append(unscored.popleft())
            free -= 1
            took = speeds.request_s() + speeds.score_s * sum(size for _, size in part)
            scoring_s += took
            heapq.heappush(events, (now + took, next(number), "scored", [one for one, _ in part]))
        if not updating and scored[step] == speeds.samples:
            updating = True
            heapq.heappush(events, (now + speeds.update_s, next(number), "updated", None))
        now, _, what, about = heapq.heappop(events)
        if what == "written":
            name, turn = about
            engine = engines[name]
            # an older event: samples came since
            if turn == engine.turn:
                engine.settle(now)
                _, _, one, length = heapq.heappop(engine.ends)
                written[one] += 1
                unscored.append((one, length))
                give(engine, name)
        elif what == "scored":
            free += 1
            for one in about:
                scored[one] += 1
        elif what == "updated":
            for name, engine in enumerate(engines):
                engine.settle(now)
                engine.at = now + speeds.push_s
                give(engine, name)
            heapq.heappush(events, (now + speeds.push_s, next(number), "pushed", None))
        else:
            updating = False
            begins.append(now)
    step_s = (begins[-1] - begins[WARM_UP]) / (STEPS - WARM_UP)
    busy = sum(engine.busy for engine in engines) / speeds.engines / now
    return step_s, busy, scoring_s / speeds.teachers / now, STEPS * speeds.update_s / now


def measured_case(name: str) -> list[float]:
    """A step's seconds for the parts that were measured: the update and a token take what the measured times leave."""
    request_s, generate, rest, _ = MEASURED[name]
    longest = random.Random(name)  # noqa: S311 (no secret)
    slowest = fmean(max(longest.lognormvariate(0, 0.3) for _ in range(16)) for _ in range(1_000))
    found = []
    for staleness in STALENESS:
        draw = random.Random(f"{name}/{staleness}")  # noqa: S311
        speeds = Speeds(
            samples=16,
            engines=1,
            rows=16,
            token_s=generate / (24 * slowest),
            row_s=0.0,
            teachers=16,
            request_s=lambda draw=draw: request_s * draw.lognormvariate(0, 0.3),  # type: ignore[misc]
            score_s=0.0,
            request_tokens=math.inf,
            # the mean of a request is 1.046 medians
            update_s=rest - 1.046 * request_s,
            push_s=0.0,
        )
        found.append(simulate(speeds, (24 * draw.lognormvariate(0, 0.3) for _ in repeat(None)), staleness)[0])
    return found


def response_lengths() -> Iterator[float]:
    """Endless, on average RESPONSE."""
    draw, middle = random.Random(0), math.log(RESPONSE) - SPREAD**2 / 2  # noqa: S311
    while True:
        yield min(float(LONGEST), draw.lognormvariate(middle, SPREAD))


# --- the tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A number of GPUs with its best layout."""

    recipe: Recipe
    shapes: dict[str, Shape]
    machine: Machine
    best: Planned
    samples: int

    @property
    def times(self) -> dict[str, float]:
        return {phase.name: phase.seconds for phase in self.best.phases}

    def speeds(self) -> Speeds:
        """The speeds that the plan's seconds come from."""
        layout, card, student, times = self.best.layout, self.machine.card, self.shapes["student"], self.times
        bandwidth = layout.server_gpus * card.bandwidth * DECODE_SHARE
        length = self.machine.prompt_tokens + self.machine.response_tokens / 2
        return Speeds(
            samples=self.samples,
            engines=layout.servers,
            # those of the next steps come on top
            rows=server_rows(student, self.machine, layout, len(STALENESS) * self.samples),
            token_s=student.active * 2 / bandwidth,
            row_s=length * student.size.cache_elements * 2 / bandwidth,
            teachers=layout.teachers,
            request_s=lambda: 0.0,
            score_s=times["score"] * layout.teachers / (self.samples * RESPONSE),
            request_tokens=REQUEST_TOKENS,
            update_s=times["update"],
            push_s=times["weights"],
        )


def cases(per_gpu: bool) -> list[Case]:
    """Of every number of GPUs. The teacher is served, so that the pipeline can overlap."""
    shapes = {"student": read_shape(None, STUDENT, "float32"), "teacher": read_shape(None, TEACHER, "bfloat16")}
    found = []
    for gpus in GPUS:
        samples = PER_GPU * gpus if per_gpu else FIXED
        values = {
            "run_dir": "runs/scaling",
            "student": {"model": "Qwen/Qwen3-8B"},
            "teacher": {"type": "local", "model": "Qwen/Qwen3-32B"},
            "task": {"type": "arithmetic"},
            "method": {"type": "gkd"},
            "rollout": {"type": "vllm", "url": "http://127.0.0.1:8000"},
            "sampling": {"max_new_tokens": LONGEST},
            "train": {"steps": 100, "prompts_per_step": samples, "gradient_checkpointing": True, "lr": 1e-6},
            "async": {"max_staleness": 1},
        }
        recipe = config.parse(Recipe, values)
        machine = Machine(gpus=gpus, card=CARDS["h100"], prompt_tokens=PROMPT, response_tokens=RESPONSE)
        served = (one for one in plan(recipe, machine, shapes) if one.fits and one.layout.teachers)
        found.append(Case(recipe, shapes, machine, next(served), samples))
    return found


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def seconds(value: float) -> str:
    if value >= 0.1:
        return f"{value:,.0f} s" if value >= 100 else f"{value:.3g} s"
    return f"{value * 1e3:.2g} ms" if value else "0"


def step_table(found: list[Case]) -> str:
    rows = []
    for case in found:
        layout, times = case.best.layout, case.times
        shares = f"{layout.shard} x {layout.replicate}, {layout.servers} x {layout.server_gpus}, {layout.teachers}"
        slowest = max(times, key=times.__getitem__)
        hours = case.best.seconds * layout.gpus / 3600 / case.samples * 1000
        names = ("generate", "score", "update", "weights")
        rows.append(
            [f"{layout.gpus:,}", f"{case.samples:,}", shares]
            + [f"**{seconds(times[name])}**" if name == slowest else seconds(times[name]) for name in names]
            + [f"{hours:.2f}"]
        )
    columns = ["GPUs", "samples", "trainer (shard x replicate), servers x GPUs, teachers"]
    return table([*columns, "generate", "score", "update", "weights", "GPU hours for 1,000 samples"], rows)


def link_table(found: list[Case]) -> str:
    """What goes over links and network in a step."""
    rows = []
    for case in found:
        layout, student, tokens = case.best.layout, case.shapes["student"], case.samples * RESPONSE
        moved = collectives(case.recipe, student, case.machine, layout, case.samples)
        head = 2 * student.head * (layout.shard - 1) / layout.shard / case.machine.link(layout.shard)
        chunks = math.ceil(tokens / layout.ranks / max(1, CHUNK_ELEMENTS // 151_936))
        replies = [
            tokens * size / layout.ranks / min(NETWORK, case.machine.link(case.machine.gpus))
            for size in REPLY_BYTES.values()
        ]
        arithmetic = next(iter(next(one for one in case.best.phases if one.name == "update").bounds.values()))
        numbers = [arithmetic, *moved.values(), head, chunks * head, *replies]
        rows.append([f"{layout.gpus:,}", f"{case.samples:,}", *map(seconds, numbers)])
    columns = ["GPUs", "samples", "update's arithmetic", *moved, "the head, gathered once", "the head for each chunk"]
    return table([*columns, *(f"teacher's replies: {one}" for one in REPLY_BYTES)], rows)


def checked_table() -> str:
    rows = []
    for name, (_, generate, rest, ratios) in MEASURED.items():
        made = [one / max(generate, rest) for one in measured_case(name)]
        rows.append([name, *(f"{real:.2f}; {sim:.2f}" for real, sim in zip(ratios, made, strict=True))])
    return table(["measured; simulated", "in turn", *(f"`max_staleness: {one}`" for one in STALENESS[1:])], rows)


def pipeline_table(found: list[Case]) -> str:
    rows = []
    for case in found:
        speeds, line = case.speeds(), [f"{case.machine.gpus:,}", f"{case.samples:,}", seconds(max(case.times.values()))]
        for staleness in STALENESS:
            step_s, *shares = simulate(speeds, response_lengths(), staleness)
            line.append(f"{seconds(step_s)} ({', '.join(f'{one:.0%}' for one in shares)})")
        rows.append(line)
    columns = ["GPUs", "samples", "slowest phase", "in turn", *(f"`max_staleness: {one}`" for one in STALENESS[1:])]
    return table(columns, rows)


def tables() -> str:
    """All of them, as the page has them."""
    growing, fixed = cases(per_gpu=True), cases(per_gpu=False)
    parts = [
        f"**A step**, {PER_GPU} samples for each GPU:",
        step_table(growing),
        f"The same with {FIXED:,} samples, however many GPUs:",
        step_table(fixed),
        "**Links and network**, time of a step in which they move something, beside the update's arithmetic:",
        link_table(growing + fixed[-1:]),
        "**The simulation beside the measurement**: a step over the longer of (generate) and (score + update).",
        checked_table(),
        "**The pipeline**: a step, and the shares of it in which engines, teachers and the trainer work.",
        pipeline_table(growing + fixed[-1:]),
    ]
    return "\n\n".join(parts)


def main() -> None:
    """Prints the tables, or writes them."""
    found = tables()
    if sys.argv[1:] != ["--write"]:
        print(found)
        return
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{found}\n\n{END}{after}")


if __name__ == "__main__":
    main()
