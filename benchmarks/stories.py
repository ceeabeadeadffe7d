"""On-policy distillation of real weights: stories260K, a model of TinyStories, teaches a student a third of its size.

The teacher writes stories from openings, a student from scratch is warm-started on them by SFT, then learns on its own
attempts (reverse KL over the whole vocabulary). Measured before and after: KL(S||T) per token on fresh samples of the
student, from openings whose names and phrases occur in no training opening.

    python benchmarks/stories.py                         # everything, from ../shared/models/stories260K
    python benchmarks/stories.py --teacher DIR           # where the weights lie elsewhere
    python benchmarks/stories.py --only measure          # of the students that are there
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from understudy.engines import HFEngine
from understudy.models import load_causal_lm, load_tokenizer
from understudy.randomness import hash_name
from understudy.types import Prompt, Request, Sample, Sampling

RUNS = Path("runs/stories")
TEACHER, OPENINGS, HELD_OUT = RUNS / "teacher", RUNS / "openings.jsonl", RUNS / "openings-held-out.jsonl"
WRITTEN, STORIES = RUNS / "written.jsonl", RUNS / "stories.jsonl"
BOS = "<s>"

GIRLS = ("Lily", "Sue", "Mia", "Anna", "Lucy", "Mary", "Sara", "Amy", "Jane", "Emma", "Kate", "Molly")
BOYS = ("Tom", "Tim", "Ben", "Max", "Sam", "Jack", "John", "Bob", "Tommy", "Jake", "Fred", "Bill")
NEW_GIRLS, NEW_BOYS = ("Lola", "Ella", "Daisy", "Rose", "Lisa"), ("Leo", "Mark", "Joe", "Peter", "Billy")
PHRASES = (
    "Once upon a time, there was a little {child} named {name}.",
    "Once upon a time, there was a {child} named {name} who loved to play.",
    "One day, {name} went to the park with {their} mom.",
    "One day, a {child} named {name} found a big box.",
    "{name} was a happy {child}. {They} had a red ball.",
    "{name} was sad. {They} could not find {their} toy.",
    "Once there was a {child} named {name}. {They} liked to run and jump.",
    "One sunny day, {name} wanted to go outside.",
    "{name} and {their} dad went to the store.",
    "{name} saw a small bird in the tree.",
    "{name} liked to help {their} mom in the garden.",
    "Once upon a time, a {child} named {name} had a little dog.",
)
NEW_PHRASES = (
    "One morning, {name} woke up and looked out of the window.",
    "{name} had a friend who was a cat.",
    "There was a {child} called {name} who was very brave.",
    "{name} wanted to make a cake for {their} friend.",
    "It was raining and {name} was bored.",
    "One night, {name} heard a strange noise.",
    "{name} got a new book from {their} grandma.",
    "Long ago, a young {child} named {name} lived near the sea.",
)
STORIES_PER_OPENING, SAMPLES_PER_OPENING = 4, 4
STORY_TOKENS = 470
"""With the longest opening this fills the teacher's 512 positions."""
LENGTHS = (224, STORY_TOKENS)
"""Tokens of a sample that are measured: those that distillation draws (`sampling.max_new_tokens`), and whole stories."""


def openings(phrases: Sequence[str], girls: Sequence[str], boys: Sequence[str]) -> list[str]:
    """Every phrase with every name. A story begins with BOS, which the tokenizer does not add by itself."""
    forms = [(name, {"child": "girl", "their": "her", "They": "She"}) for name in girls]
    forms += [(name, {"child": "boy", "their": "his", "They": "He"}) for name in boys]
    return [BOS + phrase.format(name=name, **words) for phrase, (name, words) in product(phrases, forms)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def prepare(source: Path) -> None:
    """Openings, and the teacher with the end of a story where it is: the weights never write </s>, but the next <s>."""
    if not (source / "model.safetensors").is_file():
        raise SystemExit(f"no weights in {source}; say where stories260K lies with --teacher DIR")
    shutil.rmtree(RUNS, ignore_errors=True)
    TEACHER.mkdir(parents=True)
    for name in ("model.safetensors", "tokenizer.json"):
        shutil.copyfile(source / name, TEACHER / name)
    for name, ending in (("config.json", {"eos_token_id": 1}), ("tokenizer_config.json", {"eos_token": BOS})):
        (TEACHER / name).write_text(json.dumps(json.loads((source / name).read_text()) | ending, indent=1))
    write_rows(OPENINGS, [{"prompt": text} for text in openings(PHRASES, GIRLS, BOYS)])
    write_rows(HELD_OUT, [{"prompt": text} for text in openings(NEW_PHRASES, NEW_GIRLS, NEW_BOYS)])


def keep_whole_stories() -> None:
    """SFT imitates responses to their end, so stories that were cut at the limit are left out."""
    rows = [json.loads(line) for line in WRITTEN.read_text().splitlines()]
    whole = [row for row in rows if row["finish"] == "stop"]
    write_rows(STORIES, whole)
    print(f"{len(whole)} of {len(rows)} stories ended within {STORY_TOKENS} tokens", flush=True)


def understudy(*arguments: str) -> None:
    """One command of the public command line."""
    print(f"\n$ understudy {' '.join(arguments)}", flush=True)
    code = subprocess.run([Path(sys.executable).with_name("understudy"), *arguments], check=False).returncode
    if code:
        raise SystemExit(code)


def train() -> None:
    """Samples of the teacher, warm start, distillation."""
    recipe = "recipes/stories/distil.yaml"
    num = str(len(OPENINGS.read_text().splitlines()))
    sample = ["sample", recipe, f"sampling.max_new_tokens={STORY_TOKENS}", "--model", str(TEACHER)]
    understudy(*sample, "--num", num, "--samples", str(STORIES_PER_OPENING), "--out", str(WRITTEN))
    keep_whole_stories()
    understudy("train", "recipes/stories/start.yaml")
    understudy("train", recipe)


@dataclass(frozen=True)
class Found:
    """What fresh samples of one student say, by opening: sums over the tokens of its samples. [P] each."""

    kl: NDArray[np.float64]
    """sum_t KL(S || T), nats."""
    entropy: NDArray[np.float64]
    tokens: NDArray[np.float64]
    ended: NDArray[np.float64]
    """How many samples ended by themselves."""


def log_probs(model: Any, sample: Sample) -> Tensor:
    """Log-softmax at the response tokens, by the model's own forward. [R, V] float64."""
    logits: Tensor = model(input_ids=sample.token_ids[None, :-1], use_cache=False).logits[0]
    return logits[sample.prompt_length - 1 :].log_softmax(-1)


@torch.no_grad()
def measure(student_dir: str) -> dict[int, Found]:
    """The definition in float64: every token of the vocabulary, every response token, the one that ends it included.

    By how many tokens of a sample count: a sample's first n tokens are those of a sample that is cut at n.
    """
    tokenizer = load_tokenizer(str(TEACHER))
    student, teacher = (load_causal_lm(path, dtype="float64") for path in (student_dir, str(TEACHER)))
    engine = HFEngine(student, tokenizer, seed=0, stop_ids=(tokenizer.eos_token_id,), vocab_size=len(tokenizer))
    texts = [json.loads(line)["prompt"] for line in HELD_OUT.read_text().splitlines()]
    ids = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    requests = [
        Request(Prompt(id=text, text=text), index, row)
        for text, row in zip(texts, ids, strict=True)
        for index in range(SAMPLES_PER_OPENING)
    ]
    samples = engine.generate(requests, Sampling(max_new_tokens=STORY_TOKENS), step=0, stream="stories/measure")
    rows = np.array([sums(student, teacher, sample) for sample in samples])
    by_opening = rows.reshape(len(texts), SAMPLES_PER_OPENING, len(LENGTHS), -1).sum(1)
    return {length: Found(*by_opening[:, index].T) for index, length in enumerate(LENGTHS)}


def sums(student: Any, teacher: Any, sample: Sample) -> list[list[float]]:
    """KL, entropy, tokens and whether it ended, of the first tokens of one sample, for each of LENGTHS."""
    own, other = log_probs(student, sample), log_probs(teacher, sample)
    kl, entropy = (own.exp() * (own - other)).sum(-1), -(own.exp() * own).sum(-1)
    ends_at = sample.num_response_tokens if sample.finish == "stop" else STORY_TOKENS + 1
    return [
        [float(kl[:length].sum()), float(entropy[:length].sum()), float(len(kl[:length])), float(ends_at <= length)]
        for length in LENGTHS
    ]


def resampled(num: int) -> NDArray[np.float64]:
    """[10,000, P] how often each opening is drawn: the openings are what is independent, not the tokens."""
    rng = np.random.Generator(np.random.Philox(key=hash_name("stories/bootstrap")))
    return rng.multinomial(num, np.full(num, 1 / num), size=10_000).astype(np.float64)


def with_interval(point: float, draws: NDArray[np.float64], form: str) -> str:
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{point:{form}}  [{low:{form}}, {high:{form}}]"


def show(start: Found, end: Found, length: int) -> None:
    """KL per token before and after, and its change, with 95 % intervals over openings."""
    num = len(start.tokens)
    draws = resampled(num)
    print(f"\n{num} held-out openings, {SAMPLES_PER_OPENING} samples of each, their first {length} tokens")
    for name in ("kl", "entropy"):
        for when, found in (("before", start), ("after", end)):
            total = getattr(found, name)
            ratio = (draws @ total) / (draws @ found.tokens)
            print(f"  {name:8} {when:7} {with_interval(total.sum() / found.tokens.sum(), ratio, '.4f')} nats a token")
    for when, found in (("before", start), ("after", end)):
        per = num * SAMPLES_PER_OPENING
        print(f"  length   {when:7} {found.tokens.sum() / per:.0f} tokens, {found.ended.sum() / per:.0%} ended")
    before = (draws @ start.kl) / (draws @ start.tokens)
    after = (draws @ end.kl) / (draws @ end.tokens)
    point = (end.kl.sum() / end.tokens.sum()) / (start.kl.sum() / start.tokens.sum()) - 1
    print(f"  change of the KL {with_interval(point, after / before - 1, '+.1%')}")


def main() -> None:
    """Prepares, trains and measures, and says how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, default=Path("../shared/models/stories260K"))
    parser.add_argument("--only", choices=("prepare", "train", "measure"))
    parser.add_argument("--before", type=Path, default=RUNS / "start" / "student")
    parser.add_argument("--after", type=Path, default=RUNS / "distil" / "student")
    args = parser.parse_args()
    begun = time.perf_counter()
    if args.only in (None, "prepare"):
        prepare(args.teacher)
    if args.only in (None, "train"):
        train()
    if args.only in (None, "measure"):
        before, after = measure(str(args.before)), measure(str(args.after))
        for length in LENGTHS:
            show(before[length], after[length], length)
    print(f"\n{time.perf_counter() - begun:.0f} s")


if __name__ == "__main__":
    main()
