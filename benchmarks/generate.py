"""Where generation spends its time on a CPU: the contexts, a decoded token and its draw, each way beside its floor.

A student of SmolLM2's shape (random weights) writes 8 rows of ragged contexts. Processor seconds of one thread, which what
else runs changes little, in turns in one process; the smallest of --repeats. The last two rows are bounds: the bare products
of the contexts (without padding) and of each token, all weights and the head, and in place of the latter one read of them.

    python benchmarks/generate.py                     # 18 layers, 8 rows
    python benchmarks/generate.py --rows 32 --layers 6
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from understudy.engines.hf.decode import CacheStyle, Decoder
from understudy.engines.hf.packed import fast_products
from understudy.models import build_causal_lm, has_bfloat16, lm_head, row_style
from understudy.types import Sampling

SMOL = {"architecture": "llama", "hidden_size": 576, "num_heads": 9, "num_kv_heads": 3, "intermediate_size": 1536}
VOCAB, NUM_NEW, SHORTEST, LONGEST = 49_152, 48, 57, 137
BFLOAT16 = torch.bfloat16
WAYS: dict[str, tuple[torch.dtype | None, torch.dtype | None, bool]] = {
    "plain products": (None, None, False),
    "packed": (None, None, True),
    "packed, dtype: bfloat16": (BFLOAT16, None, True),
    "mixed precision, plain products": (None, BFLOAT16, False),
    "mixed precision, packed": (None, BFLOAT16, True),
}
"""Precision of the copies, that of autocast, and whether weights are packed."""


def seconds(run: Callable[[], Any]) -> float:
    begin = time.process_time()
    run()
    return time.process_time() - begin


class Ways:
    """The model, its contexts, and the ways to write behind them."""

    def __init__(self, layers: int, rows: int) -> None:
        sizes = SMOL | {"num_layers": layers, "tie_word_embeddings": True}
        self.model = build_causal_lm(sizes, vocab_size=VOCAB, eos_token_id=1, pad_token_id=0, dtype="float32").eval()
        row_style(self.model)
        self.head = lm_head(self.model)
        self.lengths = torch.linspace(SHORTEST, LONGEST, rows).long().tolist()
        self.contexts = [torch.randint(2, 500, (length,)) for length in self.lengths]
        self.uniform = torch.rand(rows, dtype=torch.float64)
        self.weights = [layer.weight for layer in self.model.model.modules() if isinstance(layer, nn.Linear)]

    @contextmanager
    def opened(self, way: str) -> Iterator[Callable[[CacheStyle], Decoder]]:
        dtype, autocast, is_packed = WAYS[way]
        if not is_packed:
            yield lambda style: Decoder(self.model, self.head, (), autocast, style)
            return
        with fast_products(self.model, self.head, dtype, autocast) as multiply:
            yield lambda style: Decoder(self.model, self.head, (), autocast, style, multiply)

    def measure(self, way: str) -> dict[str, float]:
        """Seconds of packing, of the contexts either way, of a token's forward and of its draw."""
        found: dict[str, float] = {}
        begin = time.process_time()
        with self.opened(way) as decoder_of:
            found["packing"] = time.process_time() - begin
            limits = self.contexts, NUM_NEW, LONGEST + NUM_NEW
            found["padded"] = seconds(partial(decoder_of("padded")._prefill, *limits))
            decoder = decoder_of("segments")
            found["segments"] = seconds(partial(decoder._prefill, *limits))
            token, states = torch.full((len(self.contexts), 1), 7), list[Tensor]()
            steps = [seconds(lambda: states.append(decoder._forward(token))) for _ in range(6)]
            draws = [seconds(lambda: decoder._draw(states[-1], self.uniform, Sampling())) for _ in range(4)]
            found |= {"forward": min(steps), "draw": min(draws)}
        return found

    def floors(self) -> dict[str, float]:
        """Seconds of the bare products of the contexts without padding, of those of a token, and of one read of the weights."""
        inputs = {weight.shape[1]: torch.randn(sum(self.lengths), weight.shape[1]) for weight in self.weights}
        every = [*self.weights, self.head.weight]

        def multiply(weights: Sequence[Tensor], rows: int) -> None:
            for weight in weights:
                nn.functional.linear(inputs[weight.shape[1]][:rows], weight)

        return {
            "contexts": seconds(lambda: multiply(self.weights, sum(self.lengths))),
            "token": seconds(lambda: multiply(every, len(self.lengths))),
            "read": seconds(lambda: [weight.sum() for weight in every]),
        }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=18)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ways = Ways(options.layers, options.rows)
    names = [name for name, way in WAYS.items() if BFLOAT16 not in way or has_bfloat16(torch.device("cpu"))]
    turns, floors = [], []
    for _ in range(options.repeats):
        floors.append(ways.floors())
        turns.append({name: ways.measure(name) for name in names})
    floor = {key: min(one[key] for one in floors) for key in floors[0]}
    tokens, slots = sum(ways.lengths), options.rows * LONGEST
    title = f"{options.rows} rows, {options.layers} layers: contexts of {tokens} tokens ({slots} slots padded), {NUM_NEW} new"
    table = Table("", "contexts, padded", "side by side", "packing", "token: forward", "draw", "in all, s", title=title)
    for name in names:
        best = {key: min(turn[name][key] for turn in turns) for key in turns[0][name]}
        token = best["forward"] + best["draw"]
        # both belong together: neither is what the engine does without the other
        contexts = best["segments" if WAYS[name][2] else "padded"]
        whole = contexts + best["packing"] + NUM_NEW * token
        cells = [f"{best[key]:.2f}" for key in ("padded", "segments", "packing")]
        table.add_row(name, *cells, f"{1e3 * best['forward']:.1f} ms", f"{1e3 * best['draw']:.1f} ms", f"{whole:.2f}")
    for key, name in {"token": "bare products", "read": "one read of the weights"}.items():
        whole = floor["contexts"] + NUM_NEW * floor[key]
        table.add_row(name, "", f"{floor['contexts']:.2f}", "", f"{1e3 * floor[key]:.1f} ms", "", f"{whole:.2f}")
    Console(width=128).print(table)


if __name__ == "__main__":
    main()
