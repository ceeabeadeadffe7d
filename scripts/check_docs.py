"""Every path, command and link that the README and the docs name exists. Prints what does not, and exits with 1."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import typer.main

from understudy.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
FOLDERS = ("src/", "tests/", "recipes/", "benchmarks/", "scripts/", "docs/", ".ci/")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
QUOTED = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```(?:console|bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(text: str) -> Iterator[str]:
    """Lines of shell blocks that begin with `$ `, or all lines of a block without any."""
    for block in FENCE.findall(text):
        lines = [line for line in block.splitlines() if line.strip()]
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        yield from (line.partition(" #")[0] for line in prompted or lines)


def problems(page: Path) -> Iterator[str]:
    """What a page names that is not there."""
    text = page.read_text()
    for target in LINK.findall(text):
        if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists():
            yield f"link to {target}"
    for quoted in QUOTED.findall(text):
        path = quoted.split(":")[0]
        if path.startswith(FOLDERS) and " " not in path and "*" not in path and not (ROOT / path).exists():
            yield f"path {quoted}"
    for line in commands(text):
        yield from (f"{problem} in: {line}" for problem in command_problems(line))


def command_problems(line: str) -> Iterator[str]:
    """What is wrong with one shell command of this project."""
    words = shlex.split(line.rstrip("\\"))
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if words[:1] == ["make"]:
        yield from (f"no make target {word}" for word in words[1:] if "=" not in word and word not in targets)
    if words and Path(words[0]).name == "understudy":
        known = typer.main.get_command(app).commands  # type: ignore[attr-defined]
        if len(words) > 1 and not words[1].startswith("-"):
            if words[1] not in known:
                yield f"no command {words[1]}"
                return
            options = {name for item in known[words[1]].params for name in item.opts} | {"--help", "-h"}
            yield from (f"no option {word}" for word in words[2:] if word.startswith("-") and word not in options)
    for word in words:
        if word.startswith(FOLDERS) and not (ROOT / word).exists():
            yield f"no file {word}"


def main() -> int:
    """Checks all pages."""
    found = [f"{page.relative_to(ROOT)}: {problem}" for page in PAGES for problem in problems(page)]
    print("\n".join(found) or f"{len(PAGES)} pages: every path, link and command exists")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
