"""What the README and the docs name exists. Prints what does not, and exits with 1.

Checked are paths, commands, links and their anchors on every page; on the pages of the methods that every method has one,
that its keys and defaults are those of the code, that its metrics are logged somewhere and that its recipes parse; on those
of teachers, tasks, sandboxes and engines the keys and defaults of their sections, the named data sets, and that recipes
parse; on the page for users of other toolkits that the keys it names exist; on that of the papers' settings what their
recipes say.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import papers
import typer.main
import yaml

from understudy import config
from understudy.cli.app import app
from understudy.engines import ENGINES
from understudy.engines.vllm.settings import Launch
from understudy.environments.search import SEARCHES
from understudy.errors import RecipeError
from understudy.launchers import Ray
from understudy.methods import METHODS
from understudy.methods.base import PolicyMethod, ScoreMethod
from understudy.recipe import Recipe
from understudy.sandbox import SANDBOXES, Sandbox
from understudy.tasks import DATASETS, TASKS
from understudy.tasks.records import Records
from understudy.teachers import TEACHERS
from understudy.trainer.settings import Async, Parallel

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
OVERVIEW = ROOT / "docs" / "methods.md"
COMING_FROM = ROOT / "docs" / "coming-from.md"
TASKS_PAGE = ROOT / "docs" / "tasks.md"
SECTION_PAGES: Mapping[Path, Mapping[str, type[Any]]] = {
    ROOT / "README.md": {},
    COMING_FROM: {},
    ROOT / "docs" / "teachers.md": TEACHERS,
    TASKS_PAGE: {**TASKS, "records": Records},
    ROOT / "docs" / "sandboxes.md": {**SANDBOXES, "sandbox": Sandbox},
    ROOT / "docs" / "environments.md": SEARCHES,
    ROOT / "docs" / "engines.md": {**ENGINES, "launch": Launch, "async": Async},
    ROOT / "docs" / "scaling.md": {"parallel": Parallel, "launcher": Ray},
}
"""What a heading with such a name describes in the tables below it."""
METHOD_PAGES = sorted((ROOT / "docs" / "methods").glob("*.md"))
FOLDERS = ("src/", "tests/", "recipes/", "examples/", "benchmarks/", "scripts/", "docs/", ".ci/")
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]*)(?:#([^)\s]+))?[^)]*\)")
QUOTED = re.compile(r"`([^`\n]+)`")
FENCE = re.compile(r"^```(?:console|bash|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)
YAML_FENCE = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
ANY_FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SECTIONS = (
    "Source",
    "Open in the sources",
    "When to use it",
    "Keys",
    "What it needs",
    "Metrics",
    "Recipe",
    "Limits",
    "Evidence",
)
"""Headings of a method's page, in this order, after its name and its formula."""
SHARED = (ScoreMethod, PolicyMethod, Records, Sandbox)
"""Kinds whose keys stand once for all kinds of them."""
ELSEWHERE = "see below"
"""In place of a default that is too long for a table."""
REST_OF_RECIPE: Mapping[str, Any] = {
    "run_dir": "runs/docs",
    "student": {"model": "student"},
    "task": {"type": "arithmetic"},
    "train": {"steps": 200},
}
"""What a recipe on a page leaves out."""
REST_OF_SECTION: Mapping[str, Any] = {"method": {"type": "opd"}, "teacher": {"type": "local", "model": "teacher"}}
"""The same where the page is not a method's."""


@dataclass(frozen=True)
class Table:
    """A table of a page: its header, and the cells of each row by the header's words."""

    header: Sequence[str]
    rows: Sequence[Mapping[str, str]]


def commands(text: str) -> Iterator[str]:
    """Lines of shell blocks that begin with `$ `, or all lines of a block without any."""
    for block in FENCE.findall(text):
        lines = [line for line in block.splitlines() if line.strip()]
        prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        yield from (line.partition(" #")[0] for line in prompted or lines)


def tables(text: str) -> Iterator[Table]:
    """The tables outside of fenced blocks."""
    for block in re.findall(r"(?:^\|.*\n?)+", ANY_FENCE.sub("", text), re.MULTILINE):
        cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in block.splitlines()]
        yield Table(cells[0], [dict(zip(cells[0], row, strict=False)) for row in cells[2:]])


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = HEADING.findall(ANY_FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def problems(page: Path) -> Iterator[str]:
    """What a page names that is not there."""
    text = page.read_text()
    for target, anchor in LINK.findall(text):
        if "://" in target or target.startswith("mailto:"):
            continue
        found = page.parent / target if target else page
        if not found.exists():
            yield f"link to {target}"
        elif anchor and found.suffix == ".md" and anchor not in anchors(found):
            yield f"link to {target}#{anchor}: no such heading"
    for quoted in QUOTED.findall(text):
        path = quoted.split(":")[0]
        if (
            path.startswith(FOLDERS)
            and not any(mark in path for mark in (" ", "*", "NAME"))
            and not (ROOT / path).exists()
        ):
            yield f"path {quoted}"
    for line in commands(text):
        yield from (f"{problem} in: {line}" for problem in command_problems(line))
    if page in METHOD_PAGES:
        yield from method_problems(page, text)
    if page in SECTION_PAGES:
        yield from section_problems(text, SECTION_PAGES[page])
    if page == TASKS_PAGE:
        yield from dataset_problems(text)
    if page == COMING_FROM:
        yield from named_key_problems(text)
    if page == papers.PAGE and papers.drawn(text) != text:
        yield "differs from recipes/papers: run python scripts/papers.py"
    if page == OVERVIEW:
        yield from key_problems(text, {"default": PolicyMethod})
        yield from metric_problems(text)


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
            command = known[words[1]]
            command = getattr(command, "commands", {}).get(words[2] if len(words) > 2 else "", command)
            options = {name for item in command.params for name in item.opts} | {"--help", "-h"}
            yield from (f"no option {word}" for word in words[2:] if word.startswith("-") and word not in options)
    for word in words:
        if word.startswith(FOLDERS) and not (ROOT / word).exists():
            yield f"no file {word}"


def named_key_problems(text: str) -> Iterator[str]:
    """Keys in the columns headed "understudy" that no recipe has, or not with the method that is named behind them."""
    for row in (row for table in tables(text) for row in table.rows):
        cell = row.get("understudy", "")
        for key, method in re.findall(r"`method\.(\w+)[^`]*` of `(\w+)`", cell):
            if not is_key([key], [METHODS[method]]):
                yield f"{method} has no key {key}"
        for quoted in QUOTED.findall(cell):
            if quoted not in METHODS and not is_key(quoted.partition(":")[0].split("."), [Recipe]):
                yield f"no key {quoted}"


def is_key(path: Sequence[str], kinds: Sequence[type[Any]]) -> bool:
    """Whether a section of one of these kinds has the key."""
    if path == ["type"] and len(kinds) > 1:
        return True
    for kind in kinds:
        for item in fields(kind):
            if item.name.removesuffix("_") == path[0]:
                hint = get_type_hints(kind)[item.name]
                choice = item.metadata.get("choice")
                within = [part for part in (hint, *get_args(hint)) if is_dataclass(part)]
                if len(path) == 1 or is_key(path[1:], list(choice.table.values()) if choice else within):
                    return True
    return False


def title_methods(page: Path) -> list[str]:
    """The methods that a page's title names."""
    return QUOTED.findall(page.read_text().partition("\n")[0].partition(":")[0])


def coverage_problems() -> Iterator[str]:
    """Methods without a page, or with two; pages that the overview or the site's navigation does not name."""
    named = [name for page in METHOD_PAGES for name in title_methods(page)]
    yield from (
        f"docs/methods: {named.count(name)} pages have {name} in their title"
        for name in METHODS
        if named.count(name) != 1
    )
    navigation = (ROOT / "zensical.toml").read_text()
    yield from (
        f"zensical.toml: the navigation lacks {name}"
        for page in (ROOT / "docs").rglob("*.md")
        if f'"{(name := page.relative_to(ROOT / "docs").as_posix())}"' not in navigation
    )
    linked = {target for target, _ in LINK.findall(OVERVIEW.read_text())}
    yield from (
        f"docs/methods.md: no link to {page.name}" for page in METHOD_PAGES if f"methods/{page.name}" not in linked
    )


def method_problems(page: Path, text: str) -> Iterator[str]:
    """What is wrong with the page of a method, or of methods that share one."""
    names = title_methods(page)
    unknown = [name for name in names if name not in METHODS]
    if unknown or page.stem not in names:
        yield f"the title names {names}; it must name methods, {page.stem} among them"
        return
    sections = tuple(re.findall(r"^## (.+)$", ANY_FENCE.sub("", text), re.MULTILINE))
    if sections != SECTIONS:
        yield f"the headings are {sections}, not {SECTIONS}"
    columns = {"default": METHODS[names[0]]} if len(names) == 1 else {f"`{name}`": METHODS[name] for name in names}
    yield from key_problems(text, columns)
    yield from metric_problems(text)
    yield from recipe_problems(text, names)


def section_problems(text: str, kinds: Mapping[str, type[Any]]) -> Iterator[str]:
    """Sections of a recipe without a heading, or with other keys and defaults; recipes that do not parse."""
    headings, parts = HEADING.findall(ANY_FENCE.sub("", text)), HEADING.split(ANY_FENCE.sub("", text))[2::2]
    found = {name: part for heading, part in zip(headings, parts, strict=True) for name in QUOTED.findall(heading)}
    for name, kind in kinds.items():
        yield from key_problems(found[name], {"default": kind}) if name in found else (f"no heading with `{name}`",)
    yield from (problem for _, problem in recipes(text, REST_OF_SECTION) if problem)


def recipes(text: str, rest: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Of each recipe of a page, once the rest is filled in, the type of its method and what is wrong, empty for nothing."""
    for block in YAML_FENCE.findall(text):
        try:
            values = {**REST_OF_RECIPE, **rest} | yaml.safe_load(block)
            values["train"] = {**REST_OF_RECIPE["train"], **values["train"]}
            if "teachers" in values:
                values.pop("teacher", None)
            # a stored teacher is read where it is named
            if values.get("teacher", {}).get("type") != "stored":
                config.parse(Recipe, values)
        except (RecipeError, yaml.YAMLError) as error:
            yield "", f"recipe: {error}"
        else:
            yield values["method"]["type"], ""


def dataset_problems(text: str) -> Iterator[str]:
    """Named data sets that the table lacks, has too many or describes otherwise than the code."""
    said = {row["data set"].strip("`"): row for table in tables(text) for row in table.rows if "data set" in row}
    yield from (f"the data set {name} stands in one of table and code only" for name in said.keys() ^ DATASETS.keys())
    for name in said.keys() & DATASETS.keys():
        row, data = said[name], DATASETS[name]
        splits = ", ".join(f"{split} {data.sizes[split]:,}" if split in data.sizes else split for split in data.splits)
        hub = f"`{data.hub}`" if data.hub else "local files"
        found = {"type": f"`{data.task}`", "hub": hub, "splits and rows": splits, "licence": data.licence}
        yield from (f"{name}: {key} is {row[key]}, not {value}" for key, value in found.items() if row[key] != value)


def key_problems(text: str, columns: Mapping[str, type[Any]]) -> Iterator[str]:
    """Keys and defaults that differ from those of the dataclasses, each with a column of the table."""
    rows = [row for table in tables(text) if table.header[0] == "key" for row in table.rows]
    for column, kind in columns.items():
        bases = [base for base in SHARED if issubclass(kind, base) and kind not in SHARED]
        left_out = {item.name for base in bases for item in fields(base)}
        items = {item.name: item for item in fields(kind) if item.init and item.name not in left_out}
        keys = [row["key"].strip("`") for row in rows]
        if sorted(keys) != sorted(items):
            yield f"the keys are {sorted(keys)}; {kind.__name__} has {sorted(items)}"
        for row in rows:
            item = items.get(row["key"].strip("`"))
            cell = row.get(column, "").strip("`")
            if item is None:
                continue
            default: Any = item.default if item.default_factory is MISSING else item.default_factory()
            if (default is MISSING and cell == "required") or cell == ELSEWHERE:
                continue
            said = yaml.safe_load(cell)
            default = list(default) if isinstance(default, tuple) else default
            if said != default or isinstance(said, bool) != isinstance(default, bool):
                yield f"{row['key']} of {kind.__name__} is {cell}; the default is {default!r}"


def metric_problems(text: str) -> Iterator[str]:
    """Metrics that nothing logs: no string or keyword of the code is the name, what follows its slash, or begins with what
    precedes it."""
    source = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    for table in tables(text):
        names = [name for row in table.rows if table.header[0] == "metric" for name in QUOTED.findall(row["metric"])]
        for name in names:
            first, _, last = name.rpartition("/")
            logged = f'"{last}"' in source or re.search(rf"\b{re.escape(last)}=", source)
            if not logged and not (first and f'"{first}/' in source):
                yield f"metric {name}"


def recipe_problems(text: str, names: Sequence[str]) -> Iterator[str]:
    """Recipes that do not parse, with the rest of a recipe around them; a page without one for its method."""
    found = list(recipes(text, {}))
    yield from (problem for _, problem in found if problem)
    used = {method for method, _ in found}
    yield from (f"no recipe with {name}" for name in names if name not in used)


def main() -> int:
    """Checks all pages."""
    found = [f"{page.relative_to(ROOT)}: {problem}" for page in PAGES for problem in problems(page)]
    found += coverage_problems()
    done = f"{len(PAGES)} pages: every path, link and command exists; {len(METHODS)} methods are as the code has them"
    print("\n".join(found) or done)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
