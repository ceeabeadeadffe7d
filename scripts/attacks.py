"""Attacks on this package, hundreds of seeded cases of each kind, and what did not hold.

    python scripts/attacks.py                    all kinds (make attacks)
    python scripts/attacks.py recipes --cases 200 --seed 7

recipes   hostile recipes and overrides through `train --dry-run`: no traceback, none over 5 s, nothing written
teacher   a served teacher under malformed messages, slow and idle clients and large bodies, beside honest clients
texts     escape sequences, hidden characters and markup in pages, on a terminal, in cards and trackers
secrets   a canary through every writer, error and log

It returns 1 where something did not hold. Everything happens in a directory that is thrown away; servers listen on loopback,
at ports that are free.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
# a hub name would otherwise be looked up, and asked for again and again where there is no network
os.environ |= {"HF_HUB_OFFLINE": "1", "UNDERSTUDY_STARTED": "1"}

CASES = {"recipes": 2_000, "teacher": 300, "texts": 100, "secrets": 60}
MOST_S, HANG_S = 5.0, 60
"""Seconds of the processor that a recipe may take, and of the clock after which it is given up."""
SHOWN = 10
"""Failures of a kind that are printed."""
Check = Callable[[], str | None]
"""Carries a case out; returns what did not hold."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*CASES], help="all where none is named")
    parser.add_argument("--cases", type=int, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    failed = 0
    for kind in options.kinds or CASES:
        failed += len(
            attack(kind, options.cases or CASES[kind], options.seed, say=lambda line: print(line, flush=True))
        )
    return int(bool(failed))


def attack(kind: str, num: int, seed: int, say: Callable[[str], object] = lambda _: None) -> list[str]:
    """Carries out `num` cases of a kind; returns what did not hold, with the case."""
    failures, done, began = [], 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder, inside(Path(folder)):
        for name, check in KINDS[kind](Path(folder), num, random.Random(f"{kind}/{seed}")):  # noqa: S311 (repeatable)
            if (found := check()) is not None:
                failures.append(f"{name}: {found}")
                if len(failures) <= SHOWN:
                    say(f"  {failures[-1][:2_000]}")
            done += 1
            if done % max(1, num // 10) == 0:
                say(
                    f"{kind}: {done:,} of {num:,} cases in {time.monotonic() - began:.0f} s, {len(failures)} did not hold"
                )
    assert done == num, f"{kind} has {done} cases, not {num}"
    return failures


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Relative names are names in the folder."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def command(*words: str) -> tuple[int, str]:
    """Runs a command of the program in this process; its exit code and all that it printed."""
    from understudy.cli.app import main as run

    out, argv = io.StringIO(), sys.argv
    sys.argv = ["understudy", *words]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            run()
        code: Any = 0
    except SystemExit as ending:
        code = ending.code or 0
    finally:
        sys.argv = argv
    return int(code), out.getvalue()


# --- recipes ------------------------------------------------------------------------------------------------------------

TEXTS = [
    *(
        "",
        " ",
        "x",
        "null",
        "~",
        "~nobody/x",
        "$HOME/x",
        "{",
        "{0}",
        "%s",
        "../" * 40,
        "/",
        "/dev/null",
        "/dev/zero",
        "/proc/self/mem",
    ),
    *(
        "n" * 300,
        "a/" * 3_000,
        "\0",
        "a\0b",
        "\u202e\u200b\U000e0041",
        "\x1b[2J\x1b]0;x\x07",
        "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    ),
    *(
        "2026-13-45",
        "2026-02-30T25:61:61",
        "1e999",
        "-0",
        ".nan",
        "9" * 5_000,
        "0x" + "f" * 5_000,
        "1_000",
        "NaN",
        "model",
        "data.jsonl",
    ),
    *(
        "in-memory: x",
        "http://[",
        "http://a:99999999/",
        "https://u:p@h/?k#f",
        "file:///etc/passwd",
        "hf://x",
        "a" * 100_000,
        "*",
        "(" * 500,
    ),
]
VALUES: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        3,
        2**31,
        2**63 - 1,
        2**64 - 1,
        -(2**63),
        0.0,
        -0.0,
        1e-320,
        1e308,
        float("inf"),
        float("nan"),
        0.5,
    ),
    *(
        [],
        {},
        [[]],
        [{}],
        {"type": []},
        {"type": {}},
        {"type": None},
        {"type": "x"},
        {"": ""},
        {"a": {"b": {"c": 1}}},
        [None],
        [1, "a", 2.5],
    ),
    *([0] * 500, ["x" * 300] * 3, {"type": "n" * 300}, {"x" * 300: 1}, {"a.b": 1}, [[[[[[[[1]]]]]]]]),
]
SNIPPETS = [
    *(
        "&a ",
        "*a",
        "&a [*a]",
        "!!int foo",
        "!!float x",
        "!!timestamp 2026-13-45",
        "!!binary =",
        "!!set {a}",
        "!!python/name:os.system ''",
    ),
    *(
        "<<: *a",
        "<<: [1]",
        "<<: {<<: {a: 1}}",
        "? [1]\n: 2",
        "? {a: 1}",
        "\t",
        "\x00",
        "\x85",
        "\ufeff",
        "---",
        "...",
        "%YAML 9.9\n",
        "|",
        ">-",
        "'",
        '"',
    ),
    *(
        "{" * 200,
        "[" * 2_000,
        "- " * 500,
        ": " * 50,
        "9" * 6_000,
        "#",
        "@",
        "`",
        "!<tag:yaml.org,2002:int> x",
        "\\U00110000",
        '"\\ud800"',
    ),
    "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)),
    "".join(f"k{i}: {i}\n" for i in range(4_000)),
]


def recipes(folder: Path, num: int, draw: random.Random) -> Iterator[tuple[str, Check]]:
    import yaml
    from tests.runs import distillation, save_tiny_model, tiny_recipe

    from understudy import config
    from understudy.recipe import Recipe

    save_tiny_model(folder / "model", seed=0)
    (folder / "data.jsonl").write_text('{"prompt": "1+1=", "reference": "2", "solution": "2"}\n' * 3)
    own = [tiny_recipe(folder), tiny_recipe(folder, **distillation(folder / "models"))]
    own = [json.loads(json.dumps(base)) | {"run_dir": "run"} for base in own]
    others = [config.read_yaml(path) for path in sorted((ROOT / "recipes").rglob("*.yaml")) if "grid" not in path.stem]
    others = [one for one in others if "student" in one]
    keys = [place for place, _ in config.places(Recipe)]
    types: dict[str, list[str]] = {}
    for place, kind in config.places(Recipe):
        if kind and "." in place:
            types.setdefault(place.rpartition(".")[0], []).append(kind)

    def value() -> Any:
        kind = draw.random()
        if kind < 0.5:
            return draw.choice(VALUES)
        return draw.choice(TEXTS) if kind < 0.9 else {draw.choice(TEXTS)[:200]: draw.choice(VALUES) for _ in range(2)}

    def put(values: dict[str, Any], place: str, new: Any) -> None:
        *parents, last = place.split(".")
        for part in parents:
            inner = values.get(part)
            values[part] = inner if isinstance(inner, dict) else {}
            values = values[part]
        values[last] = new

    def typed(hint: Any) -> Any:
        """A value of the kind that a key takes, often a hostile one."""
        hint = draw.choice(get_args(hint)) if get_origin(hint) in (Union, UnionType) else hint
        origin, inner = get_origin(hint), [item for item in get_args(hint) if item is not Ellipsis]
        if is_dataclass(hint):
            return part(hint)
        if origin is Literal:
            return draw.choice(inner)
        if hint is int:
            return draw.choice([0, 1, 2, 3, 8, 24, -1, 1_000, 2**31, 10**15, 2**63 - 1, 2**64 - 1])
        if hint is float:
            return draw.choice([0.0, 0.5, 1.0, 2.0, -1.0, 1e-320, 1e-5, 1e30, 1e308, float("inf"), float("nan")])
        if hint is bool:
            return draw.random() < 0.5
        if hint is str:
            names = [
                "data.jsonl",
                "models/student",
                "http://127.0.0.1:9",
                "prompt",
                "reference",
                "{problem}{response}",
                "test",
                "cpu",
            ]
            return draw.choice(TEXTS if draw.random() < 0.5 else names)
        if origin in (tuple, list, Sequence):
            return [typed(inner[0] if inner else str) for _ in range(draw.randint(0, 3))]
        if origin is Mapping:
            return {
                str(typed(str))[:300]: typed(inner[1]) if len(inner) > 1 else value() for _ in range(draw.randint(0, 2))
            }
        return None if hint is type(None) else value()

    def part(kind: Any, few: bool = True) -> dict[str, Any]:
        """A section with what it must have and a few of its other keys."""
        hints, made = get_type_hints(kind), dict[str, Any]()
        for item in fields(kind):
            required = item.default is MISSING and item.default_factory is MISSING
            if item.init and (required or draw.random() < (0.1 if few else 0.3)):
                chosen = item.metadata.get("choice")
                one = typed(hints[item.name]) if chosen is None else select(chosen)
                made[config.key_of(item)] = {"a": one} if chosen is not None and chosen.named else one
        return made

    def select(chosen: Any) -> dict[str, Any]:
        name = draw.choice(list(chosen.table))
        return {"type": name, **part(chosen.table[name])}

    def typed_text() -> str:
        """A recipe that is right but for one or two sections."""
        values = json.loads(json.dumps(draw.choice(own)))
        hints = get_type_hints(Recipe)
        for item in draw.sample([item for item in fields(Recipe) if item.init], draw.choice([1, 1, 1, 2])):
            key, chosen = config.key_of(item), item.metadata.get("choice")
            inner = next((one for one in (hints[item.name], *get_args(hints[item.name])) if is_dataclass(one)), None)
            if chosen is not None:
                one = select(chosen)
                values[key] = {"a": one} if chosen.named else one
            elif inner is not None:
                values[key] = (values.get(key) or {}) | dict(
                    draw.sample(sorted(part(inner, few=False).items()), 1) or []
                )
            else:
                values[key] = typed(hints[item.name])
        return config.write_yaml(values)

    def text() -> str:
        if draw.random() < 0.6:
            with contextlib.suppress(ValueError):
                return typed_text()
        values = json.loads(json.dumps(draw.choice(own if draw.random() < 0.8 else others)))
        how = draw.random()
        for _ in range(draw.randint(1, 3)):
            place = draw.choice(list(config.flatten(values)) if draw.random() < 0.5 else keys)
            if draw.random() < 0.3:
                place = place.rpartition(".")[0] or place
            section = place.rpartition(".")[0]
            if section in types and draw.random() < 0.5:
                put(values, f"{section}.type", draw.choice(types[section]))
            put(values, place, value())
        written: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        if how < 0.35:
            for _ in range(draw.randint(1, 4)):
                at, snippet = draw.randrange(len(written) + 1), draw.choice(SNIPPETS)
                if draw.random() < 0.4:
                    at = written.rfind("\n", 0, at) + 1
                end = at + draw.choice([0, 0, 1, 5, 40])
                written = written[:at] + snippet + written[end:]
        return written

    def overrides() -> list[str]:
        made = []
        for _ in range(draw.choice([0, 0, 0, 1, 2])):
            new = draw.choice([draw.choice(SNIPPETS), draw.choice(TEXTS), json.dumps(draw.choice(VALUES))])[:120_000]
            key = draw.choice([*keys, *TEXTS[:20], "a." * 30, "..", "student.model.x", "train"])
            made.append(f"{key}={new}" if draw.random() < 0.95 else new)
        # an argument of a program has no zero character, and what begins with a dash is an option
        return [word.replace("\0", "") for word in made if not word.startswith("-")]

    for number in range(num):
        written, words = text().encode("utf-8", "surrogatepass"), overrides()
        if draw.random() < 0.05:
            written = written[: draw.randrange(len(written))] + draw.randbytes(4)
        (folder / "recipe.yaml").write_bytes(written)
        yield f"recipe {number} {[word[:80] for word in words]}", lambda words=words: try_recipe(folder, words)


class OutOfTime(BaseException):  # nobody who catches errors catches it
    """A case took too long."""


def try_recipe(folder: Path, overrides: list[str]) -> str | None:
    def out_of_time(*_: object) -> None:
        raise OutOfTime

    before = sorted(folder.rglob("*"))
    old, began = signal.signal(signal.SIGALRM, out_of_time), time.process_time()
    signal.alarm(HANG_S)
    try:
        code, said = command("train", "recipe.yaml", *overrides, "--dry-run")
    except OutOfTime:
        code, said = -1, f"Traceback:\n{traceback.format_exc(-8)}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    took_s, recipe = time.process_time() - began, (folder / "recipe.yaml").read_bytes()[:600]
    if "Traceback" in said or code not in (0, 1, 2):
        return f"exit code {code}: ...{said[-1_500:]}\n  of {recipe!r}"
    if code and not said.strip():
        return f"exit code {code} without a word, of {recipe!r}"
    if len(said) > 20_000:
        return f"{len(said):,} characters were said: {said[:200]} of {recipe!r}"
    if took_s > MOST_S:
        return f"{took_s:.1f} s of the processor, of {recipe!r}: {said[:200]}"
    if wrote := set(folder.rglob("*")) - set(before):
        return f"wrote {wrote}, of {recipe!r}"
    return None


KINDS: Mapping[str, Callable[[Path, int, random.Random], Iterator[tuple[str, Check]]]] = {"recipes": recipes}

if __name__ == "__main__":
    sys.exit(main())
