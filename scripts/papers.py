"""The settings of the papers: the page about recipes/papers, and a short run of every line of each of them.

    python scripts/papers.py                     draws the tables of docs/papers.md from the recipes
    python scripts/papers.py --try               trains every miniature on this machine, some seconds each
    python scripts/papers.py --try tropd-math    this one only

A miniature, NAME.mini.yaml, has the keys of NAME.yaml. Its models are random and tiny, and its rows are sums in the fields of
the data sets that the paper's recipe names.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

from understudy import config
from understudy.methods import TrOPD
from understudy.recipe import Recipe, load_recipe
from understudy.recipe.plan import CARDS, PASSES_SHARE, operations
from understudy.tasks import DATASETS
from understudy.tasks.fields import Condition

ROOT = Path(__file__).resolve().parents[1]
RECIPES, PAGE = ROOT / "recipes" / "papers", ROOT / "docs" / "papers.md"
PARTS = Path("runs/papers/parts")
"""Models and rows of the miniatures, relative to the working directory."""


# --- cost ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """Sizes from which a model's arithmetic is counted."""

    parameters: float
    """Those that one token goes through: of a mixture of experts the active ones."""
    layers: int
    width: int
    """Heads times the size of a head."""

    def forward(self, tokens: float, length: float) -> float:
        """As `understudy.recipe.plan.operations`."""
        return operations(self.parameters, self.layers, self.width, tokens, length)


MODELS: Mapping[str, Size] = {
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Size(1.78e9, 28, 1536),
    "Qwen/Qwen2.5-Math-1.5B": Size(1.54e9, 28, 1536),
    "Qwen/Qwen3-1.7B": Size(1.72e9, 28, 2048),
    "Qwen/Qwen3-4B": Size(4.02e9, 36, 4096),
    "Qwen/Qwen3-8B": Size(8.19e9, 36, 4096),
    "Keven16/Qwen3-4B-Non-Thinking-RL-Math-Step500": Size(4.02e9, 36, 4096),
    "Skywork/Skywork-OR1-Math-7B": Size(7.62e9, 28, 3584),
    "Skywork/Skywork-OR1-7B": Size(7.62e9, 28, 3584),
    "Qwen/Qwen3-30B-A3B-Instruct-2507": Size(3.3e9, 48, 4096),
    "Qwen/Qwen2.5-VL-7B-Instruct": Size(7.62e9, 28, 3584),
    "Qwen/Qwen2.5-VL-32B-Instruct": Size(32.8e9, 64, 5120),
    "Qwen/Qwen2.5-3B-Instruct": Size(3.09e9, 36, 2048),
    "Keven16/Qwen3-4B-Non-Thinking-RL-Code-Step300": Size(4.02e9, 36, 4096),
    "Qwen/QwQ-32B": Size(32.8e9, 64, 5120),
}
WRITING = 0.1
"""Share of the peak that writing token by token reaches; `understudy plan`, which knows the servers, counts reads."""


def hours(recipe: Recipe) -> float:
    """H100 hours of a run whose every response is as long as it may be: writing, scoring, updates and evaluations.

    Prompts, the servers' idle time, loading, and what a judge writes are left out.
    """
    student, length, train = MODELS[str(recipe.student.model)], recipe.sampling.max_new_tokens, recipe.train
    guided = isinstance(recipe.method, TrOPD) and recipe.uses.prefixes and recipe.method.guided == "beside"
    tokens = train.steps * train.prompts_per_step * (train.samples_per_prompt + guided) * length
    written = student.forward(tokens, length)
    teachers = [MODELS[section.model] for section in recipe.all_teachers.values()]
    # each sample is read by the one teacher that its prompt names
    read = sum(teacher.forward(tokens, length) for teacher in teachers) / len(teachers)
    if recipe.uses.prefixes:
        written += sum(teacher.forward(train.steps * train.prompts_per_step * length, length) for teacher in teachers)
    for section in recipe.all_references.values():
        read += MODELS[getattr(section, "model", None) or str(recipe.student.model)].forward(tokens, length)
    # the student's own log-probabilities; an update is a forward and twice as much backward
    passes = 1 + 3 * train.passes + train.passes * train.gradient_checkpointing
    read += passes * student.forward(tokens, length)
    if recipe.eval is not None:
        times = 2 + (train.steps - 1) // recipe.eval.every if recipe.eval.every else 2
        limit = (recipe.eval.sampling or recipe.sampling).max_new_tokens
        answers = times * (recipe.eval.problems or 0) * recipe.eval.samples_per_prompt
        written += student.forward(answers * limit, limit)
    return (written / WRITING + read / PASSES_SHARE) / CARDS["h100"].flops / 3600


def rounded(value: float) -> str:
    """To two digits: "190"."""
    digits = 1 - math.floor(math.log10(value))
    return f"{round(value, digits):,.{max(0, digits)}f}"


# --- the page ------------------------------------------------------------------------------------------------------------


def recipes() -> dict[str, Path]:
    """The papers' recipes by their names."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml")) if not path.stem.endswith(".mini")}


def said(path: Path) -> dict[str, str]:
    """Reads the comment at a recipe's head: its source, what is open in it, its cost."""
    lines = [line[1:].strip() for line in path.read_text().splitlines()[1:] if line.startswith("#")]
    found = re.findall(r"(Source|Open|Cost): (.*?)(?= (?:Source|Open|Cost): |$)", " ".join(lines))
    return dict(found)


def table_row(name: str, recipe: Recipe) -> str:
    """A row of the table."""
    train, sampling = recipe.train, recipe.sampling
    teachers = ", ".join(f"`{section.model}`" for section in recipe.all_teachers.values())
    cells = [
        f"`recipes/papers/{name}.yaml`",
        f"`{config.dump(recipe)['method']['type']}`",
        f"`{recipe.student.model}`",
        teachers,
        ", ".join(dict.fromkeys(part.name for part in recipe.task.places().values())),
        f"{train.prompts_per_step:,} x {train.samples_per_prompt}",
        f"{sampling.max_new_tokens:,}",
        f"{train.lr:g}",
        f"{train.steps}",
        rounded(hours(recipe)),
    ]
    return f"| {' | '.join(cells)} |"


def blocks() -> dict[str, str]:
    """The texts of the page about the recipes, by the names of their places."""
    names = [
        "recipe",
        "method",
        "student",
        "teacher",
        "data",
        "prompts x samples",
        "response",
        "lr",
        "steps",
        "H100 hours",
    ]
    table = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    texts = []
    for name, path in recipes().items():
        table.append(table_row(name, load_recipe(path)))
        about = said(path)
        texts.append(f"**`{name}`.** {about['Source']}.\n*Open:* {about['Open']}.")
    return {"recipes": "\n".join(table), "sources": "\n\n".join(texts)}


def drawn(page: str) -> str:
    """The page with what the recipes say today. Raises ValueError for a page without the places."""
    for name, block in blocks().items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        before, found, rest = page.partition(begin)
        if not found or end not in rest:
            raise ValueError(f"{PAGE} lacks {begin} and {end}")
        page = f"{before}{begin}\n\n{block}\n\n{end}{rest.partition(end)[2]}"
    return page


# --- miniatures ----------------------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n<tools>\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}</tools>\n"
    'Call a function as <tool_call>\n{"name": NAME, "arguments": ARGUMENTS}\n</tool_call><|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SIZES: Mapping[str, int] = {"student": 32, "teacher": 48, "base": 48}
NUM_ROWS = 24
END_LOGIT = 3.0
"""Logit of the token that ends a response; the others are near 0. A teacher that hardly ever ended would give no prefix."""


def build_tokenizer() -> Any:
    """One token a byte, with the chat template of Qwen3 as far as it concerns single questions and tools."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    end, pad = "<|im_end|>", "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=end, pad_token=pad, chat_template=TEMPLATE)


def used(values: Any) -> set[tuple[str, str]]:
    """The names of the data sets, or of the files, that a section of a miniature reads, each with its file."""
    if not isinstance(values, Mapping):
        return set()
    found = set[tuple[str, str]]().union(*map(used, values.values()))
    paths = [str(values[key]) for key in ("path", "test_path") if key in values]
    return found | {(values.get("dataset") or Path(path).stem, path) for path in paths}


def rows(name: str, file: str) -> Iterator[dict[str, Any]]:
    """Rows of a file with sums in the fields of a data set, each of which meets its conditions."""
    data = DATASETS.get(name)
    keys: Mapping[str, Any] = {"prompt_field": "prompt"} if data is None else data.keys
    if name.startswith("openthoughts3"):
        keys = {"prompt_field": "conversations", "where": [f"domain = {name.rpartition('-')[2]}"]}
    for index in range(NUM_ROWS):
        first, second = 10 + index, 7 * index % 90
        # two files have no problem in common
        asked, answer = f"{first} + {second} ({file})", str(first + second)
        found: dict[str, Any] = {}
        if keys["prompt_field"] == "conversations":
            found["conversations"] = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        else:
            put(found, keys["prompt_field"], asked)
        if field := keys.get("solution_field"):
            put(found, field, f"\\boxed{{{answer}}}")
        task = None if data is None else data.task
        if task == "choice":
            put_options(found, keys, first + second)
        elif task == "qa":
            found[keys["reference_field"]] = [answer]
        elif task == "code":
            put_program(found, keys, f"add_{index}", index)
        elif task == "instructions":
            found |= {keys["reference_field"]: ["punctuation:no_comma"], keys["kwargs_field"]: [{}]}
        elif field := keys.get("reference_field"):
            put(found, field, json.dumps([answer]) if data is not None and data.listed else answer)
        if field := keys.get("image_field"):
            put(found, field, [f"{draw_image(index).name}"])
        for condition in (one for one in map(Condition.read, keys.get("where", ())) if one.sign != "!="):
            put(found, condition.field, condition.values[0])
        yield found


def put_program(found: dict[str, Any], keys: Mapping[str, str], name: str, number: int) -> None:
    """Sets a function to write and its tests, as HumanEval and MBPP have them, or inputs and outputs, as Eurus and
    LiveCodeBench have."""
    head, body = f"def {name}(a):\n", f"    return a + {number}\n"
    if keys["reference_field"] == "reward_model.ground_truth":
        tests = {"inputs": ["1\n"], "outputs": [f"{1 + number}\n"]}
        found["prompt"] = [{"role": "user", "content": f"Add {number} to a number."}]
        put(found, keys["reference_field"], json.dumps(tests))
    elif "," in keys["reference_field"]:
        cases = json.dumps([{"input": "1\n", "output": f"{1 + number}\n", "testtype": "stdin"}])
        found |= dict.fromkeys(re.split(", *", keys["reference_field"]), cases)
    elif keys.get("solution_field") == "canonical_solution":
        check = f"def check(candidate):\n    assert candidate(1) == {1 + number}\n"
        found |= {"prompt": head, "canonical_solution": body, "entry_point": name, "test": check}
    else:
        found |= {"code": head + body, "test": f"assert {name}(1) == {1 + number}"}


def draw_image(index: int) -> Path:
    """Draws a picture that differs from others beside the rows."""
    from PIL import Image

    path = PARTS / f"{index}.png"
    Image.new("RGB", (56 + 28 * (index % 3), 56), (10 * index, 90, 200)).save(path)
    return path


def put_options(found: dict[str, Any], keys: Mapping[str, str], answer: int) -> None:
    """Sets four options, in one field or in several, of which the first is right."""
    options = [str(answer + shift) for shift in (0, 1, 2, 3)]
    fields = [field.strip() for field in keys["choices_field"].split(",")]
    if len(fields) > 1:
        found |= dict(zip(fields, options, strict=True))
    else:
        found |= {fields[0]: options, keys["reference_field"]: 0}


def put(found: dict[str, Any], field: str, value: object) -> None:
    """Sets a field that may be nested, `a.b`."""
    *folders, last = field.split(".")
    for folder in folders:
        found = found.setdefault(folder, {})
    found[last] = value


def make_parts() -> None:
    """Writes the models and rows that the miniatures name, anew."""
    shutil.rmtree(PARTS, ignore_errors=True)
    # the benchmarks build models of a shape, the tests tiny ones of every family that reads images
    sys.path.insert(0, str(ROOT))
    from benchmarks.shapes import save_model

    tokenizer = build_tokenizer()
    for seed, (name, hidden) in enumerate(SIZES.items()):
        shape = {"architecture": "qwen3", "hidden_size": hidden, "num_layers": 2, "num_heads": 2}
        save_model(PARTS / name, shape | {"max_position_embeddings": 1024}, tokenizer, seed=seed, end_logit=END_LOGIT)
    if importlib.util.find_spec("PIL"):
        from tests.vision_models import save_vision_model

        for seed, name in enumerate(("student", "teacher")):
            save_vision_model(PARTS / f"vision-{name}", "qwen2_5_vl", seed=seed)
    for mini in RECIPES.glob("*.mini.yaml"):
        for name, path in used(config.read_yaml(mini)):
            Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows(name, Path(path).stem)))


@contextmanager
def servers() -> Iterator[str]:
    """The address of a chat model and of a search service. Asked for a digit the model says one by the length of the question,
    else it solves the sum, each time in other words; the service finds one passage for every query."""
    ways = itertools.count(1)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if "queries" in body:
                passage = {"document": {"title": "Sums", "text": "Sums are what they are."}}
                self.reply({"result": [[passage] for _ in body["queries"]]})
                return
            question = body["messages"][0]["content"]
            numbers = re.search(r"(\d+) \+ (\d+)", question)
            total = sum(map(int, numbers.groups())) if numbers else 0
            solved = f"Way {next(ways)}: \\boxed{{{total}}} <answer> {total} </answer>"
            text = str(len(question) % 10) if body["max_tokens"] <= 8 else solved
            choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            self.reply({"object": "chat.completion", "choices": [choice]})

        def reply(self, body: Mapping[str, Any]) -> None:
            text = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Silent."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def overrides(path: Path, address: str) -> list[str]:
    """Keys that a miniature needs beside its file: the address of its judge and of its search service, if it asks any."""
    asked = [key for key in config.flatten(config.read_yaml(path)) if key.endswith(".url")]
    return [f"{key}={address}" for key in asked]


def try_out(names: list[str]) -> None:
    """Trains the miniatures through the command line; ends at the first that fails."""
    make_parts()
    with servers() as address:
        for name in names:
            path, started = RECIPES / f"{name}.mini.yaml", time.monotonic()
            command = [sys.executable, "-m", "understudy", "train", str(path), *overrides(path, address)]
            shutil.rmtree(load_recipe(path).run_dir, ignore_errors=True)
            if code := subprocess.run(command, check=False).returncode:  # noqa: S603
                sys.exit(code)
            print(f"{name}: {time.monotonic() - started:.0f} s\n", flush=True)


def main() -> None:
    """Draws the page, or tries the miniatures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--try", dest="tried", nargs="*", choices=list(recipes()), help="train these miniatures, or all"
    )
    tried = parser.parse_args().tried
    if tried is None:
        PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        try_out(tried or list(recipes()))


if __name__ == "__main__":
    main()
