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
import logging
import os
import random
import re
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
import zlib
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import MISSING, fields, is_dataclass
from html.parser import HTMLParser
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parents[1]
CASES = {"recipes": 2_000, "teacher": 300, "texts": 100, "secrets": 69}
MOST_S, HANG_S = 5.0, 60
"""Seconds of the processor that a recipe may take, and of the clock after which it is given up."""
SHOWN = 10
"""Failures of a kind that are printed."""
Check = Callable[[], str | None]
"""Carries a case out; returns what did not hold."""


def main() -> int:
    """Returns 1 where something did not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(CASES)}; all where none is named")
    parser.add_argument("--cases", type=int, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(CASES):
        parser.error(f"there is no kind {', '.join(unknown)}; known: {', '.join(CASES)}")
    # of the tests, which build tiny models and servers
    sys.path.insert(0, str(ROOT))
    logging.disable(logging.WARNING)
    # idle connections by the thousand, with both of their ends in this process
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    failed = 0
    # a hub name would be looked up, where there is no network again and again
    with variables(HF_HUB_OFFLINE="1"):
        for kind in options.kinds or CASES:
            num = options.cases or CASES[kind]
            found = attack(kind, num, options.seed, say=lambda line: print(line, flush=True))
            print(f"{kind}: {num:,} cases, {len(found)} did not hold", flush=True)
            failed += len(found)
    return int(bool(failed))


@contextlib.contextmanager
def variables(**values: str) -> Iterator[None]:
    """Environment variables, for a while."""
    before = dict(os.environ)
    os.environ |= values
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


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
            return deepcopy(draw.choice(VALUES))
        return (
            draw.choice(TEXTS)
            if kind < 0.9
            else {draw.choice(TEXTS)[:200]: deepcopy(draw.choice(VALUES)) for _ in range(2)}
        )

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


# --- a served teacher ---------------------------------------------------------------------------------------------------

HONEST_S = 30.0
"""Seconds in which an honest client has its scores, with all that it asks again."""
LARGE = 24 * 2**20
IDLE = 10_000
"""Connections of one client that never ask, in the first of all cases."""


def teacher(folder: Path, num: int, draw: random.Random) -> Iterator[tuple[str, Check]]:
    """One attack after the other on one server; after each, and while its connections are open, an honest client asks."""
    import httpx
    from tests.integration.test_serve import ask, samples, serving
    from tests.tiny_models import tiny

    from understudy.teachers.remote.protocol import ABOUT, CONTENT_TYPE, HEAD, SCORE

    right = ask(samples()).encode()

    def message(method: str = "POST", path: str = SCORE, length: object = 0, more: str = "") -> bytes:
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {CONTENT_TYPE}\r\n"
        return f"{head}Content-Length: {length}\r\n{more}\r\n".encode("latin-1")

    def changed() -> bytes:
        """A right body with some bytes changed, cut off or put in."""
        body = bytearray(right)
        for _ in range(draw.randint(1, 6)):
            at, how = draw.randrange(len(body)), draw.random()
            # half of the changes in the header, which says what follows
            at = at if draw.random() < 0.5 else draw.randrange(min(600, len(body)))
            if how < 0.5:
                body[at] = draw.randrange(256)
            elif how < 0.7:
                del body[at : at + draw.choice([1, 4, 100, 10_000])]
            elif how < 0.9:
                body[at:at] = draw.choice([b"9" * 30, b"{", b"]", b"null", draw.randbytes(8), b'"a": 1,'])
            else:
                body[:8] = draw.choice(
                    [b"\xff" * 8, bytes(8), (2**40).to_bytes(8, "little"), len(body).to_bytes(8, "little")]
                )
            body = body or bytearray(b"x")
        return bytes(body)

    heads = [
        *(
            b"GET / HTTP/9.9\r\n\r\n",
            b"\r\n" * 500,
            b"\x16\x03\x01\x02\x00" * 20,
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"A" * 100_000,
        ),
        *(
            message("GET", ABOUT),
            message("DELETE", SCORE),
            message("GET", "/" + "x" * 10_000),
            message("GET", "/%ff/../..//"),
            message("OPTIONS", "*"),
        ),
        *(message(length=value) for value in (-1, "9" * 400, "1e3", "0x10", " ", LARGE * 100, "\u00b2")),
        *(
            message(length=5, more=f"{line}\r\n")
            for line in ("Content-Length: 6", "Transfer-Encoding: chunked", "Host: evil", "X:" + "y" * 70_000)
        ),
        message(length=5, more="Expect: 100-continue\r\n"),
        message(more="Transfer-Encoding: chunked\r\n").replace(b"Content-Length: 0\r\n", b"")
        + b"ffffffffffffffff\r\nx",
        message(more="Authorization: Bearer \xff\xfe\r\n"),
        b"".join(f"X-{index}: 1\r\n".encode() for index in range(3_000)),
    ]

    def attack() -> tuple[str, list[bytes], bool]:
        """Returns a name, the bytes for as many connections, and whether they are left open without the rest."""
        how = draw.random()
        if how < 0.45:
            body = changed()
            return "a body that was changed", [message(length=len(body)) + body], False
        if how < 0.6:
            return "a head that is none", [draw.choice(heads)] * draw.choice([1, 1, 20]), draw.random() < 0.5
        if how < 0.7:
            return (
                "idle connections",
                [draw.choice([b"", b"P", b"POST /v1/score HT"])] * draw.choice([50, 200, 500]),
                True,
            )
        if how < 0.8:
            return (
                "slow bodies",
                [message(length=LARGE) + draw.randbytes(draw.randint(0, 5_000))] * draw.choice([1, 20, 60]),
                True,
            )
        if how < 0.9:
            begin = draw.choice([b"", right[:600], (LARGE - 8).to_bytes(8, "little") + b'{"a":' * 1_000])
            body = begin + draw.choice([bytes, draw.randbytes])(LARGE - len(begin))
            return "a body of 24 MiB", [message(length=len(body)) + body], False
        if how < 0.95:
            return "replies that nobody takes", [message("GET", HEAD) * 3] * draw.choice([1, 30]), True
        return "many requests on one line", [(message(length=len(right)) + right) * 20 + b"x"], False

    with ExitStack() as opened:
        url = opened.enter_context(serving(tiny()))
        port = int(url.rpartition(":")[2])
        expected = httpx.post(url + SCORE, content=right, headers={"Content-Type": CONTENT_TYPE}).content

        def honest() -> str | None:
            until, said = time.monotonic() + HONEST_S, "nothing"
            while time.monotonic() < until:
                try:
                    with httpx.Client(trust_env=False, timeout=HONEST_S) as client:
                        reply = client.post(url + SCORE, content=right, headers={"Content-Type": CONTENT_TYPE})
                except httpx.TransportError as error:
                    return f"an honest client was cut off: {error!r}"
                if reply.status_code == 200:
                    return None if reply.content == expected else "an honest client got other scores"
                said = f"{reply.status_code} {reply.text[:200]}"
                if reply.status_code not in (429, 503):
                    break
                time.sleep(0.1)
            return f"an honest client got {said}"

        def attempt(sent: list[bytes], stays: bool) -> str | None:
            with ExitStack() as lines:
                for data in sent:
                    with contextlib.suppress(OSError):
                        line = lines.enter_context(socket.create_connection(("127.0.0.1", port), timeout=HONEST_S))
                        line.sendall(data)
                if stays:
                    return honest()
                answer = b""
                with contextlib.suppress(OSError):
                    line.shutdown(socket.SHUT_WR)
                    while more := line.recv(2**16):
                        answer = answer[-(2**16) :] + more
                        if re.search(rb"^HTTP/1.1 5(?!03)\d\d", answer, re.MULTILINE):
                            return f"answered {answer[:300]!r} to {sent[0][:600]!r}"
            return honest()

        for number in range(num):
            name, sent, stays = attack()
            if number == 0 and num == CASES["teacher"]:
                name, sent, stays = "idle connections", [b""] * IDLE, True
            yield f"teacher {number} ({name}, {len(sent)} times)", lambda sent=sent, stays=stays: attempt(sent, stays)


# --- texts --------------------------------------------------------------------------------------------------------------

HOSTILE = [
    *(
        "\x1b[2J\x1b[H",
        "\x1b]0;owned\x07",
        "\x1b]8;;http://x\x1b\\click\x1b]8;;\x1b\\",
        "\x1b]52;c;cm0gLXJm\x07",
        "\x1bP+q\x1b\\",
        "\x9b31m\x9d0;x\x9c",
    ),
    *(
        "\x1b",
        "\x1b[",
        "a\rb",
        "a\bb\x7f",
        "\x00\x01\x0e\x0f",
        "\u202egnp.exe",
        "\u2066a\u2069",
        "a\u200bb\u2060\ufeff",
        "\U000e0049\U000e0047",
    ),
    *(
        "a\u200db\u200c",
        "\ud800",
        "\u2028\u2029",
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "</pre></style><svg onload=alert(1)>",
    ),
    *(
        "'\" onmouseover=alert(1) x='",
        "{{ 7*7 }}{% raw %}",
        "javascript:alert(1)",
        "[red]x[/red] [link=http://x]y[/link]",
        "]]><!--",
        "&#x1b;[2J&lt;b&gt;",
    ),
]
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e0fff]"
)


class Tags(HTMLParser):
    """Names of the tags of a page with their handlers of events."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {tag, *(name for name, _ in attrs if name.startswith("on"))}
        self.found |= {
            value
            for name, value in attrs
            if value and name in ("href", "src") and value.lower().startswith("javascript:")
        }


def texts(folder: Path, num: int, draw: random.Random) -> Iterator[tuple[str, Check]]:
    written = {
        "page": on_page,
        "comparison": on_comparison,
        "terminal": on_terminal,
        "commands": in_commands,
        "card": on_card,
        "tracker": in_tracker,
    }
    pages = {name: Tags(written[name](folder / f"plain-{name}", "plain")).found for name in ("page", "comparison")}

    def attempt(place: str, text: str, where: Path) -> str | None:
        said = written[place](where, text)
        if found := UNSEEN.search(said):
            return f"{found[0]!r} in {said[max(0, found.start() - 60) : found.end() + 20]!r}"
        if place in pages and (more := Tags(said).found - pages[place]):
            return f"the page has {more}"
        return None

    for number in range(num):
        place = list(written)[number % len(written)]
        text = "".join(draw.sample(HOSTILE, draw.choice([1, 2, 3])))
        yield (
            f"text {number} ({place}) {text!r}",
            lambda place=place, text=text, number=number: attempt(place, text, folder / str(number)),
        )


def on_page(folder: Path, text: str) -> str:
    from tests.report_run import write_eval, write_lines, write_run

    from understudy import config
    from understudy.report.page import write_report

    run = write_run(folder, num_steps=10)
    for step in (0, 10):
        write_eval(run, step, {text: [0.0], "b": [1.0]}, prompt=text + "{id}", response=text, split=text)
    (run / "recipe.yaml").write_text(config.write_yaml({"teacher": {"template": text}}), errors="replace")
    (run / "run.json").write_text(json.dumps({"method": text, text: text, "status": "failed", "error": text}))
    write_lines(run / "events.jsonl", [{"step": 1, "kind": text, "text": text}])
    (run / "doctor.json").write_text(
        json.dumps({"findings": [dict.fromkeys(("name", "level", "found", "advice"), text)]})
    )
    write_lines(run / "metrics.jsonl", [{"step": step, text: step, "loss": 1.0} for step in (1, 2)])
    return write_report(run).read_text()


def on_comparison(folder: Path, text: str) -> str:
    from tests.integration.test_compare import cells

    from understudy.compare.outputs import write_outputs
    from understudy.compare.run import Comparison
    from understudy.compare.table import Outcome

    found = cells(folder, {text: {text: {}, "b": {}}}, seeds=1)
    outcomes = [
        Outcome(cell, "failed", text) for cell in found.compared({one: {} for one in found.grid.combinations()})
    ]
    page = write_outputs(Comparison(found, outcomes, (), {}, command=text)).read_text()
    for name in ("table.md", "cells.csv", "compare.json"):
        if name != "compare.json":
            assert not UNSEEN.search((found.out / name).read_text()), name
    return page


def on_terminal(folder: Path, text: str) -> str:
    """Returns the text that a terminal gets, without the colours and moves of a run's display."""
    from understudy.format import Interval
    from understudy.trainer.console import Console

    out = io.StringIO()
    with Console(out, live=False) as console:
        console.start(3)
        console.note(text)
        console.warn(text)
        console.table(text, [text, "b"], [[text, text]])
        console.evaluated(1, text, Interval(0.5, 0.4, 0.6))
        with console.progress(text, 2) as advance:
            advance(2)
    return out.getvalue()


def in_commands(folder: Path, text: str) -> str:
    """Errors of commands that are given such names, and what they say of such a file."""
    name = text.replace("\0", "").replace("/", "_")
    folder.mkdir()
    (folder / "data.jsonl").write_text(
        json.dumps({"prompt": text}) + "\n{" + text.encode("utf-8", "replace").decode() + "}\n"
    )
    recipe = {
        "run_dir": name,
        "student": {"model": name},
        "task": {"type": "file", "path": str(folder / "data.jsonl"), name: 1},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    data = [
        "run_dir=x",
        "student={model: x}",
        f"task={{type: file, path: {folder / 'data.jsonl'}, prompt_field: prompt}}",
        "method.type=sft",
        "train.steps=1",
    ]
    said = [command("train", "recipe-" + name, "--dry-run"), command("report", "run-" + name), command("methods", name)]
    said += [
        command("train", str(folder / "recipe.yaml"), "--dry-run"),
        command("train", str(folder / "recipe.yaml"), *data, "--dry-run"),
    ]
    return "".join(text for _, text in said)


def on_card(folder: Path, text: str) -> str:
    from tests.runs import tiny_recipe

    from understudy import config
    from understudy.export import model_card
    from understudy.recipe import Recipe
    from understudy.trainer.checkpoint import Progress

    values = tiny_recipe(folder) | {
        "run_dir": f"runs/{text}",
        "teacher": {"type": "chat", "url": "http://127.0.0.1:9", "model": text + "x"},
    }
    return model_card(config.parse(Recipe, values), Progress(), [])


def in_tracker(folder: Path, text: str) -> str:
    from understudy.trainer.loggers import make_loggers

    for logger in make_loggers(folder, ["tensorboard"], {"teacher": {"template": text, "note": [text]}}, warn=str):
        logger.close()
    # what TensorBoard shows of it is JSON, in which every such character is written out
    found = [path.read_bytes() for path in (folder / "tensorboard").iterdir()]
    start = b"".join(found).index(b"```json")
    return b"".join(found)[start:].partition(b"\n```")[0].decode()


# --- secrets ------------------------------------------------------------------------------------------------------------

CANARY = "canary-31415926535897932384"
FORMS = ("of the environment {}", "MY_TOKEN={}", "at http://user:{}@host/v1?k=1")


def secrets(folder: Path, num: int, draw: random.Random) -> Iterator[tuple[str, Check]]:
    """Every writer with every form; then all files that are there and all that was said are searched."""
    writers: list[Callable[[Path, str], str]] = [
        *(on_page, on_comparison, on_terminal, in_commands, on_card, in_tracker),
        *(
            in_wandb,
            in_error,
            in_traceback,
            in_saved_recipe,
            in_events,
            in_doctor,
            in_facts,
            in_request,
            in_reply,
            in_cell_log,
            in_cell_error,
        ),
        *(in_recording, in_hub_error, in_environment, in_tokens, in_watch, in_plan),
    ]

    def attempt(write: Callable[[Path, str], str], text: str, where: Path) -> str | None:
        said = write(where, text)
        if CANARY in said:
            at = said.index(CANARY)
            return f"said {said[max(0, at - 200) : at + 60]!r}"
        # the others were given the canary in files
        for path in () if write in (on_page, in_commands, in_cell_error, in_tokens, in_watch) else where.rglob("*"):
            if path.is_file() and path.name != "given.yaml" and CANARY.encode() in path.read_bytes():
                return f"{path.relative_to(where)} has it"
        return None

    for number in range(num):
        write, form = writers[number % len(writers)], FORMS[number // len(writers) % len(FORMS)]

        def check(
            write: Callable[[Path, str], str] = write, form: str = form, where: Path = folder / str(number)
        ) -> str | None:
            # without the variable the form alone has to give it away
            with variables(SOME_CANARY_KEY=CANARY) if form == FORMS[0] else contextlib.nullcontext():
                return attempt(write, form.format(CANARY), where)

        yield f"secret {number} ({write.__name__}: {form})", check


def in_wandb(folder: Path, text: str) -> str:
    from understudy.trainer.loggers import Dashboard, make_loggers

    places = {f"WANDB_{name}_DIR": str(folder / "home") for name in ("CONFIG", "CACHE", "DATA")}
    warned: list[str] = []
    with variables(WANDB_MODE="offline", WANDB_SILENT="true", **places):
        recipe = {"teacher": {"url": text, "api_key": CANARY}}
        for logger in make_loggers(folder / "run", ["wandb"], recipe, warn=warned.append):
            if isinstance(logger, Dashboard):
                logger.samples(1, [{"response": text, "messages": [{"role": "tool", "content": text}]}])
                logger.alert(text, text)
            logger.close()
    return "".join(warned)


def in_error(folder: Path, text: str) -> str:
    from understudy import config
    from understudy.errors import EngineError, RecipeError

    said = [str(EngineError(text))]
    section = {"type": "vllm", "launch": {"env": {"ANY": text}, "args": text}}
    for words in (
        [f"rollout={section}"],
        [f"rollout.launch.env.ANY={text}"],
        [f"teacher.api_key={text}"],
        [f"rollout.launch.env={text}"],
    ):
        try:
            config.parse(recipe_kind(), config.override({"run_dir": "x"}, words))
        except RecipeError as error:
            said.append("".join(traceback.format_exception(error)))
    # the source of this script is in a traceback, and no value
    return "\n".join(said)


def recipe_kind() -> Any:
    from understudy.recipe import Recipe

    return Recipe


def in_traceback(folder: Path, text: str) -> str:
    from understudy.report import page

    def fail(*_: object, **__: object) -> Path:
        raise KeyError(text)

    plain, page.write_report = page.write_report, fail
    try:
        return command("report", "run")[1]
    finally:
        page.write_report = plain


def in_saved_recipe(folder: Path, text: str) -> str:
    """A whole run: all that it wrote and said."""
    import yaml
    from tests.runs import tiny_recipe

    folder.mkdir()
    launch = {"python": "python", "env": {"ANY": text}}
    values = tiny_recipe(folder, train={"steps": 1, "prompts_per_step": 2}, rollout={"type": "vllm", "launch": launch})
    (folder / "given.yaml").write_text(yaml.safe_dump(values))
    said = command(
        "train",
        str(folder / "given.yaml"),
        "rollout=null",
        f"student.template_kwargs={{api_key: {CANARY}, note: '{text}'}}",
        "--no-doctor",
    )[1]
    assert (folder / "run" / "student" / "README.md").is_file(), said
    return said + command("report", str(folder / "run"))[1]


def in_events(folder: Path, text: str) -> str:
    from understudy.trainer.console import Console
    from understudy.trainer.loggers import JsonLines
    from understudy.trainer.observe import Observer

    out = io.StringIO()
    Observer(Console(out), files={"events": JsonLines(folder / "events.jsonl")}).warn(1, text)
    return out.getvalue()


def in_doctor(folder: Path, text: str) -> str:
    from understudy.recipe.checks import Finding
    from understudy.recipe.doctor import refuse, show, write_findings
    from understudy.trainer.console import Console

    found, out = [Finding(text, "error", text, name=text, checked=text)], io.StringIO()
    write_findings(folder / "doctor.json", found)
    show(Console(out), found)
    try:
        refuse(found)
    except Exception as error:
        return out.getvalue() + str(error)
    return out.getvalue()


def in_facts(folder: Path, text: str) -> str:
    from understudy.files import write_json
    from understudy.text import plain_tree

    facts = {"teacher": text, "error": text, "hub_token": CANARY}
    write_json(folder / "run.json", plain_tree(facts))
    return ""


def in_request(folder: Path, text: str) -> str:
    """The message about a server that is not there, whose address and request have it."""
    from understudy.errors import UnderstudyError
    from understudy.http.client import HttpClient, RetryPolicy

    said = ""
    for url in (
        "http://127.0.0.1:9/0a1b2c3d4e5f" + CANARY,
        f"http://127.0.0.1:9/v1?k={CANARY}",
        f"http://a:{CANARY}@h",
    ):
        try:
            policy = RetryPolicy(timeout_s=1, deadline_s=1, max_retries=0, max_concurrency=1, waits=False)
            with HttpClient([url], name="teacher", retry_policy=policy) as client:
                client.request("x", str, key=text)
        except UnderstudyError as error:
            said += str(error)
    return said


def in_reply(folder: Path, text: str) -> str:
    """Returns the answer of a server that was sent a key, whatever the name of the variable with it."""
    from understudy.http.replies import Reply, clip, read_key

    with variables(JUDGE=CANARY):
        read_key("JUDGE")
        body = json.dumps({"error": {"message": f"no {text} {CANARY}"}}).encode()
        return f"{Reply('u', 400, {}, body).outcome()} {Reply('u', 500, {}, body).outcome()} {clip(text)}"


def in_cell_log(folder: Path, text: str) -> str:
    from understudy.compare.processes import Job, work

    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        work(Job({"run_dir": text, "student": {"model": text}, "api_key": CANARY}, False, "log"))
        work(Job({"run_dir": text} | {1: object()}, False, "log"))  # type: ignore[dict-item]
    return out.getvalue()


def in_cell_error(folder: Path, text: str) -> str:
    from understudy.compare.processes import ending

    folder.mkdir()
    (folder / "data.jsonl").write_text(f"Traceback\nValueError: {text}\n")
    return str(ending(0, 1, folder / "data.jsonl"))


def in_recording(folder: Path, text: str) -> str:
    from understudy import config
    from understudy.files import write_atomically
    from understudy.text import plain_tree

    origin = plain_tree({"teacher": {"url": text, "api_key": CANARY, "extra_body": {"password": CANARY}}})
    write_atomically(folder / "recording.yaml", config.write_yaml(origin))
    return config.write_yaml(origin)


def in_hub_error(folder: Path, text: str) -> str:
    from understudy.errors import UnderstudyError

    return str(UnderstudyError(f"the hub did not take it: {text} (Authorization: Bearer {CANARY})"))


def with_tokens(folder: Path, text: str) -> Path:
    """A run that kept tokens, with the text and the canary in all that it says of them."""
    from tests.integration.test_tokens import token_row, write_tokens
    from tests.report_run import write_run

    pieces = [*text, "; MY_TOKEN=", *CANARY]
    facts = dict.fromkeys(("prompt", "method", "teacher", "finish"), text)
    facts |= {"missing": {"teacher_top": text}, "vocabulary": {str(at): one for at, one in enumerate(pieces)}}
    run = write_run(folder, num_steps=10)
    write_tokens(run, [token_row(5, text, len(pieces)) | facts])
    return run


def in_tokens(folder: Path, text: str) -> str:
    run = with_tokens(folder, text)
    return "".join(command("inspect", str(run), *more)[1] for more in ([], ["--list"], ["--prompt", text]))


def in_watch(folder: Path, text: str) -> str:
    """What a browser gets of a run that goes on, unpacked as its script does, with the tokens side by side."""
    from understudy.report.watch import Watch

    watch = Watch(with_tokens(folder, text))
    page = watch.html()
    packed = [json.loads(zlib.decompress(b64decode(one))) for one in re.findall(r'data-packed="([^"]+)"', page)]
    sides = ["".join(sample["texts"][at] for at in sample["columns"]["id"]) for sample in packed]
    return page + json.dumps([watch.changed({}), packed]) + "".join(sides)


def in_plan(folder: Path, text: str) -> str:
    """The plan of a recipe with such keys, and the errors of a recipe with such a model."""
    from tests.runs import distillation, tiny_recipe

    recipe = json.loads(json.dumps(tiny_recipe(folder, **distillation(folder))))
    recipe["student"]["template_kwargs"] = {"api_key": CANARY, "note": text}
    (folder / "given.yaml").write_text(json.dumps(recipe))
    said = command("plan", str(folder / "given.yaml"))[1]
    assert "memory of one GPU" in said, said
    return said + command("plan", str(folder / "given.yaml"), f"teacher.model={text}")[1]


def in_environment(folder: Path, text: str) -> str:
    """Variables of a server that the run starts: refused, or not set."""
    from tests.runs import tiny_recipe

    from understudy import config
    from understudy.errors import RecipeError

    said = ""
    for launch in (
        {"env": {"MY_TOKEN": text}},
        {"args": ["--api-key", CANARY]},
        {"command": ["{port}", f"DBPASS={CANARY}"]},
        {"env": CANARY},
    ):
        try:
            config.parse(
                recipe_kind(), tiny_recipe(folder, rollout={"type": "vllm", "launch": {"python": "x"} | launch})
            )
        except RecipeError as error:
            said += str(error)
            continue
        return f"{launch} was taken, with {CANARY}"
    return said


KINDS: Mapping[str, Callable[[Path, int, random.Random], Iterator[tuple[str, Check]]]] = {
    "recipes": recipes,
    "teacher": teacher,
    "texts": texts,
    "secrets": secrets,
}

if __name__ == "__main__":
    sys.exit(main())
