"""Time and memory of a forward and backward over samples: rows with a mask, segments, and segments with each prompt once.

Time: processor seconds of one thread, which what else runs changes little; a student of SmolLM2's shape (random weights), in
turns in one process; the smallest of --repeats: one prompt and eight responses, and eight prompts with one response each that
begin with so many tokens in common. Memory: a tiny model reads so many tokens; the
largest resident set of a process of its own over that of loading it.

    python benchmarks/prompts.py                          # a prompt of 90 tokens, responses of 48 each and of 16 to 80
    python benchmarks/prompts.py --layers 4 --prompt 400
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table

from understudy.models import backbone_hidden, build_causal_lm, row_style
from understudy.packing import RowStyle, lay_out
from understudy.types import Sample

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny_models import sample

SMOL = {"hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536, "tie_word_embeddings": True}
TINY = {"hidden_size": 64, "num_layers": 2, "num_heads": 4}
NAMES = {"packed": "rows with a mask", "segments": "segments", "shared": "segments, prompt once"}
LONG = {"sixteen sequences": ([1_024] * 15 + [8_192], 0), "one prompt, eight responses": ([1_024] * 8, 8_192)}
"""Lengths of responses and of the prompt that they share."""


def build(sizes: dict[str, Any], vocab_size: int) -> Any:
    return build_causal_lm(
        {"architecture": "llama"} | sizes, vocab_size=vocab_size, eos_token_id=1, pad_token_id=0, dtype="float32"
    )


COMMON = (0, 16, 32, 64)
"""Tokens with which eight prompts begin in common."""


def make(prompt: int, responses: list[int], common: int | None = None) -> list[Sample]:
    """Samples of one prompt, or of as many whose first `common` tokens are the same."""
    draw = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(2, 500, (count,), generator=draw).tolist()

    shared = ids(prompt if common is None else common)
    rest = 0 if common is None else prompt - common
    return [sample(str(number), (shared + ids(rest)) or ids(1), ids(length)) for number, length in enumerate(responses)]


def compare(model: Any, samples: list[Sample], styles: list[RowStyle], repeats: int) -> list[tuple[int, float]]:
    """Slots and smallest seconds of each style, in turns after a first one."""
    turns = [[step(model, samples, style) for style in styles] for _ in range(repeats + 1)][1:]
    return [(turns[0][number][0], min(turn[number][1] for turn in turns)) for number in range(len(styles))]


def step(model: Any, samples: list[Sample], style: RowStyle) -> tuple[int, float]:
    """Slots of the layout, and processor seconds of a forward and backward over it."""
    model.zero_grad()
    begin = time.process_time()
    layout = lay_out(samples, style)
    states = backbone_hidden(model, layout.input_ids, layout.position_ids, segments=layout.segments)
    states.flatten(0, 1)[layout.predicts].square().mean().backward()
    return layout.input_ids.numel(), time.process_time() - begin


def peak(style: RowStyle, name: str, pipe: Any) -> None:
    responses, prompt = LONG[name]
    torch.set_num_threads(1)
    model = build(TINY | {"max_position_embeddings": 40_000}, 512)
    row_style(model)
    samples = make(prompt, responses)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, seconds = step(model, samples, style)
    pipe.send(((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20, seconds))


def memory(style: RowStyle, name: str) -> tuple[float, float]:
    """GiB and seconds, in a process of its own."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=peak, args=(style, name, theirs))
    process.start()
    found: tuple[float, float] = ours.recv()
    process.join()
    return found


def main() -> None:
    assert set(NAMES) < set(get_args(RowStyle))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--prompt", type=int, default=90)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-memory", action="store_true")
    options = parser.parse_args()
    styles: list[RowStyle] = ["packed", "segments", "shared"]
    torch.set_num_threads(1)
    console, model = Console(width=120), build(SMOL | {"num_layers": options.layers}, 49_152)
    row_style(model)
    for title, responses in {"48 each": [48] * 8, "16 to 80": [16, 80, 24, 72, 32, 64, 40, 56]}.items():
        found = compare(model, make(options.prompt, responses), styles, options.repeats)
        table = Table("", "slots", "seconds", "of a mask's", title=f"{options.prompt} tokens and 8 responses, {title}")
        for style, (slots, seconds) in zip(styles, found, strict=True):
            table.add_row(NAMES[style], str(slots), f"{seconds:.2f}", f"{seconds / found[0][1]:.2f}")
        console.print(table)
    table = Table(
        "in common", "slots", "seconds", "of segments'", title=f"8 prompts of {options.prompt} tokens, 48 each"
    )
    for common in COMMON:
        samples = make(options.prompt, [48] * 8, common)
        (_, apart), (slots, seconds) = compare(model, samples, styles[1:], options.repeats)
        table.add_row(str(common), str(slots), f"{seconds:.2f}", f"{seconds / apart:.2f}")
    console.print(table)
    for name in [] if options.no_memory else LONG:
        table = Table("", "GiB", "seconds", title=f"{name}: {LONG[name]}")
        for style in styles:
            gib, seconds = memory(style, name)
            table.add_row(NAMES[style], f"{gib:.2f}", f"{seconds:.1f}")
        console.print(table)


if __name__ == "__main__":
    main()
