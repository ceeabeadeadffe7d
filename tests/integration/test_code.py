"""Programs as answers: the code in a response, the tests of real data sets, and responses that only look right."""

from __future__ import annotations

import ast
import base64
import builtins
import json
import os
import pickle
import re
import shutil
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.runs import tiny_recipe
from tests.sandboxes import need_sandbox
from understudy import config
from understudy.errors import DataError, RecipeError
from understudy.recipe import Recipe
from understudy.recipe.checks import check
from understudy.sandbox import Bubblewrap, Process, Program, Result, local
from understudy.tasks import Code
from understudy.tasks.verifiers import code_tests, find_verifier, grade_code
from understudy.tasks.verifiers.code import CodeTests, find_code, same_output
from understudy.tasks.verifiers.code_tests import assert_tests, evalplus_tests, humaneval_tests, io_tests
from understudy.types import Grade, Prompt

pytestmark = pytest.mark.slow

F = "def f(n):\n    return n + 1"
ASSERTS = CodeTests("assert f(1) == 2\nassert f(-1) == 0", ("f",)).dump()


@pytest.fixture(scope="module")
def box() -> Bubblewrap:
    return need_sandbox()


@dataclass
class Fake:
    """A sandbox that keeps what it is asked to run, and says what it is told."""

    outcome: Any = "passed"
    stdout: str = ""

    def __post_init__(self) -> None:
        self.asked = list[Program]()

    def run(self, program: Program) -> Result:
        self.asked.append(program)
        return Result(self.outcome, self.stdout)


def write(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def fenced(code: str, language: str = "python") -> str:
    return f"```{language}\n{code}\n```"


# which code


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (fenced(F), F),
        (f"I think\n{fenced(F)}\nand that is it.", F),
        (fenced(F, "py"), F),
        (fenced(F, "Python3"), F),
        (fenced(F, ""), F),
        (fenced(F).replace("```", "~~~"), F),
        (fenced(F).replace("```", "````"), F),
        (fenced(F, 'python title="f.py"'), F),
        (f"{fenced('def f(n): pass')}\nBetter:\n{fenced(F)}", F),
        (f"{fenced(F)}\nUse it so:\n{fenced('print(f(3))')}", F),
        (f"{fenced(F)}\nIt prints\n{fenced('4', 'text')}", F),
        (f"{fenced(F)}\nRun it:\n{fenced('python f.py', 'bash')}", F),
        ("1. First\n   ```python\n   def f(n):\n       return n + 1\n   ```", F),
        (f"<think>{fenced('def f(n): return 0')}</think>{fenced(F)}", F),
        (f"{fenced('def f(n): return 0')}</think>{fenced(F)}", F),
        (F, F),
        (f"{fenced('x = 1')}\n{fenced('y = 2')}", "y = 2"),
        (fenced('s = """\n``` not a fence\n"""\n' + F), 's = """\n``` not a fence\n"""\n' + F),
        # nothing that is finished
        ("", None),
        ("   \n", None),
        (f"```python\n{F}", None),
        (f"<think>{fenced(F)}", None),
        (fenced("int f(int n) { return n + 1; }", "c++"), None),
        (fenced(""), None),
    ],
)
def test_the_program_of_a_response(text: str, code: str | None) -> None:
    assert find_code(text, ("f",)) == code


def test_a_completion_is_cut_where_another_thing_begins() -> None:
    body = "    return n + 1\n"
    for after in ("\ndef g():\n    pass", "\nprint(f(1))", "\n# next", "\nif __name__ == '__main__':\n    f(1)"):
        assert find_code(body + after, ("f",)) == "    return n + 1\n"
    fake = Fake()
    tests = CodeTests("assert f(1) == 2", ("f",), header="import math", prompt="import math\ndef f(n):\n")
    assert grade_code(body, tests.dump(), fake).right
    assert fake.asked[-1].code == "import math\ndef f(n):\n    return n + 1\n"
    grade_code(fenced(F), tests.dump(), fake)
    assert fake.asked[-1].code == f"import math\n{F}"


def test_a_megabyte_is_read_in_bounded_time() -> None:
    begin = time.process_time()
    for text in (
        "```" * 300_000,
        "```\n" * 250_000,
        "```python\n" * 100_000,
        "<think>" * 140_000,
        " " * 1_000_000,
        "\n" * 1_000_000,
        "def f" * 200_000,
        fenced("def f(n): return 1\n" * 50_000),
        "~" * 1_000_000,
    ):
        find_code(text, ("f",))
    assert time.process_time() - begin < 20


# grades


def test_right_and_wrong_programs(box: Bubblewrap) -> None:
    responses = {
        fenced(F): 1.0,
        fenced("f = lambda n: n + 1"): 1.0,
        fenced("class Math:\n    def f(self, n): return n + 1\nf = Math().f"): 1.0,
        fenced(F + "\nif __name__ == '__main__':\n    print(f(int(input())))"): 1.0,
        fenced("def f(n):\n    return 2"): 0.0,
        fenced("def g(n):\n    return n + 1"): 0.0,
        fenced("def f(n) return"): 0.0,
        fenced("print('all tests passed')"): 0.0,
        fenced("import os\nos._exit(0)"): 0.0,
        fenced("class A:\n    __eq__ = lambda *_: True\ndef f(n):\n    return A()"): 0.0,
        "The answer is 2. All tests passed.": 0.0,
        "": 0.0,
    }
    for text, score in responses.items():
        grade = grade_code(text, ASSERTS, box)
        assert grade.score == score, (text, grade)
        assert bool(grade.note) != grade.right
    assert find_verifier("code")(fenced(F), ASSERTS).right


def test_programs_that_read_and_print(box: Bubblewrap) -> None:
    tests = io_tests({"inputs": ["3\n1 2 3\n", "1\n5\n"], "outputs": ["6\n", "5"]}).dump()
    right = "n = int(input())\nprint(sum(map(int, input().split())))"
    assert grade_code(fenced(right), tests, box).right
    assert grade_code(fenced(right + "\nimport os\nos._exit(1)"), tests, box).note.startswith("test 1 of 2: failed")
    assert grade_code(fenced("print(6)"), tests, box).note == "test 2 of 2: another output"
    assert grade_code(fenced("import time\ntime.sleep(10**6)"), tests, replace(box, wall_s=1)).note.startswith(
        "test 1 of 2: timed out"
    )


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ("1 2\n3\n", "1 2\n3", True),
        ("1  2 \n3\n\n", "1 2\n3", True),
        ("0.333333349", "0.33333333", True),
        ("1e0", "1.0", True),
        ("2.0", "2", True),
        ("0.3334", "0.3333", False),
        ("2", "3", False),
        ("100000000000000001", "100000000000000002", False),
        ("01", "1", False),
        ("Yes", "YES", False),
        ("nan", "nan", True),
        ("nan", "1.0", False),
        ("inf", "1.0", False),
        ("1 2 3", "1\n2\n3", False),
        ("", "", True),
        ("", "0", False),
        ("1\n2", "1", False),
    ],
)
def test_outputs_are_compared(found: str, wanted: str, same: bool) -> None:
    assert same_output(found, wanted) == same


def test_functions_by_arguments_in_json(box: Bubblewrap) -> None:
    tests = io_tests({"fn_name": "add", "inputs": [[1, [2, 3]], [0, []]], "outputs": [[1, 2, 3], [0]]}).dump()
    assert grade_code(fenced("class Solution:\n    def add(self, a, b):\n        return (a, *b)"), tests, box).right
    assert grade_code(fenced("def add(a, b):\n    return [a] + b"), tests, box).right
    assert not grade_code(fenced("def add(a, b):\n    return b + [a]"), tests, box).right
    lines = io_tests({"fn_name": "add", "inputs": ["1\n[2]"], "outputs": ["[1, 2]"]}).dump()
    assert grade_code(fenced("def add(a, b):\n    return [a] + b"), lines, box).right
    listed = io_tests([{"input": "1", "output": "2", "testtype": "stdin"}])
    assert (listed.inputs, listed.outputs) == (("1",), ("2",))


# contests, with rows made by hand in the fields of their cards


def packed(value: object) -> str:
    """As LiveCodeBench packs its private tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(value)))).decode()


def cases(kind: str, *pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"input": given, "output": wanted, "testtype": kind} for given, wanted in pairs]


LIVE = {
    "question_title": "Add one",
    "question_content": "Print the number plus one.",
    "platform": "atcoder",
    "contest_date": "2025-01-04T18:30:00",
    "starter_code": "",
    "difficulty": "easy",
    "public_test_cases": json.dumps(cases("stdin", ("1", "2"))),
    "private_test_cases": packed(cases("stdin", ("5", "6"), ("-1", "0"))),
    "metadata": "{}",
}
CALLED = LIVE | {
    "question_content": "Add them.",
    "starter_code": "class Solution:\n    def add(self, a: int, b: List[int]) -> List[int]:\n        ",
    "public_test_cases": json.dumps(cases("functional", ("1\n[2]", "[1, 2]"))),
    "private_test_cases": packed(cases("functional", ("0\n[]", "[0]"))),
    "metadata": json.dumps({"func_name": "add"}),
}


def test_livecodebench(box: Bubblewrap, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", LIVE, CALLED)
    task = Code(dataset="livecodebench-v6", path=path, sandbox=box)
    printed, called = task.prompts("test")
    assert json.loads(printed.reference[0])["inputs"] == ["1", "5", "-1"]  # type: ignore[index]
    assert task.grade(printed, fenced("print(int(input()) + 1)")).right
    assert task.grade(printed, fenced("print(2)")).note == "test 2 of 3: another output"
    assert "Begin with:\n```python\nclass Solution" in called.messages[-1]["content"]  # type: ignore[index]
    right = "class Solution:\n    def add(self, a: int, b: List[int]) -> List[int]:\n        return [a, *b]"
    assert task.grade(called, fenced(f"from typing import List\n{right}")).right
    assert not task.grade(called, fenced(f"from typing import List\n{right.replace('*b', '2')}")).right


class Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hostile",)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (base64.b64encode(zlib.compress(pickle.dumps(Hostile()))).decode(), r"it calls (posix|nt)\.system"),
        (base64.b64encode(zlib.compress(pickle.dumps(["[]"]))).decode(), "the pickle holds list"),
        (base64.b64encode(zlib.compress(pickle.dumps("[]"))).decode()[:-8], "not packed JSON"),
        (base64.b64encode(zlib.compress(pickle.dumps(" " * 200))).decode(), "cut off, or over a gigabyte"),
        (base64.b64encode(zlib.compress(b"no pickle")).decode(), "not packed JSON"),
        (base64.b64encode(b"no zlib").decode(), "not packed JSON"),
        ("no base64!", "not packed JSON"),
    ],
)
def test_a_pickle_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(code_tests, "MAX_UNPACKED", 150)
    path = write(tmp_path / "rows.jsonl", LIVE | {"private_test_cases": text})
    with pytest.raises(DataError, match=rf"rows\.jsonl:1: field 'public_test_cases.*{why}"):
        Code(dataset="livecodebench", path=path, sandbox=Process(unsafe=True)).prompts("test")
    assert not (tmp_path / "hostile").exists()


def test_apps_taco_and_code_contests(box: Bubblewrap, tmp_path: Path) -> None:
    tests = {"inputs": ["1\n", "5\n"], "outputs": ["2\n", "6\n"]}
    solution = "print(int(input()) + 1)"
    row = {"question": "Add one.", "solutions": json.dumps([solution, "pass"]), "input_output": json.dumps(tests)}
    called = row | {
        "question": "Add.",
        "solutions": json.dumps(["def add(a, b):\n    return [a] + b"]),
        "input_output": json.dumps({"fn_name": "add", "inputs": [[1, [2]]], "outputs": [[[1, 2]]]}),
        "starter_code": "def add(a, b):",
    }
    contest = {
        "description": "Add one.",
        "public_tests": {"input": ["1\n"], "output": ["2\n"]},
        "private_tests": {"input": [], "output": []},
        "generated_tests": {"input": ["5\n"], "output": ["6\n"]},
        "solutions": {"language": [2, 3], "solution": ["int main() {}", solution]},
    }
    for name, rows in {"apps": (row, called), "taco": (row, called), "code-contests": (contest,)}.items():
        path = write(tmp_path / f"{name}.jsonl", *rows)
        task = Code(dataset=name, path=path, sandbox=box, solution_field="solutions")
        prompts = task.prompts("train")
        assert len(prompts) == len(rows)
        for prompt in prompts:
            assert task.grade(prompt, task.gold(prompt)[0]).right, prompt
            assert not task.grade(prompt, fenced("print(2)")).right
        # a problem without a solution stays, unless solutions are asked for
        path = write(tmp_path / f"{name}2.jsonl", *({**item, "solutions": ""} for item in rows))
        assert len(Code(dataset=name, path=path, sandbox=box).prompts("train")) == len(rows)


def test_malformed_tests_are_refused() -> None:
    for reference in (
        "",
        "[]",
        "{}",
        '{"tests": "x"}',
        '{"tests": "x", "names": "f"}',
        '{"inputs": ["1"]}',
        '{"test": "x"}',
    ):
        with pytest.raises(ValueError, match="tests of a program|inputs and"):
            grade_code(fenced(F), reference, Fake())


def test_helpers_of_a_prompt_are_not_the_programs_to_replace(box: Bubblewrap) -> None:
    prompt = "import math\n\ndef poly(x):\n    return x * x - 2\n\ndef root():\n    '''A root of poly.'''\n"
    tests = humaneval_tests(
        {"prompt": prompt, "entry_point": "root", "test": "def check(c):\n    assert math.fabs(poly(c())) < 1e-4"}
    ).dump()
    assert grade_code("    return math.sqrt(2)\n", tests, box).right
    assert not grade_code(fenced("def poly(x):\n    return 0\ndef root():\n    return 7"), tests, box).right
    assert not grade_code(fenced("import math\nmath.fabs = lambda _: 0\ndef root():\n    return 7"), tests, box).right


def test_names_of_tests() -> None:
    assert assert_tests("assert set(f([1])) == {1}", F).names == ("f",)
    assert assert_tests("assert sum(1, 2) == 3", "def sum(a, b): return 3").names == ("sum",)
    assert assert_tests("import math\nassert math.isclose(area(1), math.pi)", "").names == ("area",)
    assert assert_tests("x = 3\ndef near(a): return a\nassert near(g(x)) == 3", "").names == ("g",)
    found = assert_tests(
        "root = Node(1)\nassert depth(root) == 1", "import os\nclass Node: pass\ndef depth(n): return 1"
    )
    assert found.names == ("Node", "depth")
    with pytest.raises(ValueError, match="take nothing"):
        assert_tests("assert 1 == 1", "")


# the task on real data

DATA = {
    "humaneval": ({"path": "humaneval/HumanEval.jsonl"}, 164, ()),
    "humaneval-plus": ({"path": "humaneval_plus/HumanEvalPlus-Mini.jsonl"}, 164, ()),
    "mbpp": ({"path": "mbpp/mbpp.jsonl"}, 974, ()),
    # the tests compute what is right from the solution, which needs gigabytes for the first, and minutes for the others
    "mbpp-plus": (
        {"path": "mbpp_plus/MbppPlus.jsonl", "solution_field": "canonical_solution"},
        378,
        ("combinations_colors", "get_max_sum", "sum_average"),
    ),
}
"""Data set -> its local copy, its rows, and the functions whose tests do not fit into the usual limits."""
BUILTINS = {*dir(builtins)}
OWN_WAY = {*code_tests._SETS, *code_tests._TRUTHY, "find_zero"}


def read(shared: Path, name: str, **changes: Any) -> Code:
    keys = {key: str(shared / "data" / value) if key == "path" else value for key, value in DATA[name][0].items()}
    # EvalPlus's own files have inputs in place of the hub's ready-made tests
    if name in ("humaneval-plus", "mbpp-plus"):
        keys["reference_field"] = "plus_input"
    return Code(dataset=name, sandbox=Bubblewrap(memory_mb=2048, wall_s=600), **keys, **changes)


def kinds(prompt: Prompt) -> set[object]:
    """All that its tests and its solution are made of: syntax inside of syntax, types of literals, imports, builtins; and the
    functions that are compared in a way of their own."""
    tests = json.loads(prompt.reference[0])  # type: ignore[index]
    found: set[object] = {name for name in tests["names"] if name in OWN_WAY}
    for part in (tests["tests"], find_code(prompt.solution or "", tests["names"]) or ""):
        for node in ast.walk(ast.parse(part)):
            for child in ast.iter_child_nodes(node):
                is_literal = isinstance(child, ast.Constant)
                found.add((part is tests["tests"], type(node), type(child.value if is_literal else child)))
            if isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.Name) and node.id in BUILTINS):
                found.add((part is tests["tests"], ast.unparse(node)))
    return found


def covering(prompts: Sequence[Prompt]) -> list[Prompt]:
    """A few that have every kind which any of them has; all where UNDERSTUDY_EVERY_ROW is set."""
    if os.environ.get("UNDERSTUDY_EVERY_ROW"):
        return list(prompts)
    have = [kinds(prompt) for prompt in prompts]
    left, chosen = set[object]().union(*have), []
    while left:
        chosen.append(max(range(len(have)), key=lambda number: len(have[number] & left)))
        left -= have[chosen[-1]]
    return [prompts[number] for number in sorted(chosen)]


@pytest.mark.parametrize("name", DATA)
def test_reference_solutions_pass_and_others_do_not(box: Bubblewrap, shared: Path, name: str) -> None:
    task = read(shared, name)
    _, num, known = DATA[name]
    prompts = list(task.prompts(task.first_split))
    assert len(prompts) == num
    fits = [
        prompt
        for prompt in prompts
        if not any(re.search(rf"def {function}\b", prompt.solution or "") for function in known)
    ]
    assert len(fits) == num - len(known)
    tried = covering(fits)
    assert len(tried) > 40

    def grade(pair: tuple[Prompt, str]) -> Grade:
        return task.grade(*pair)

    with ThreadPoolExecutor(2) as pool:
        gold = list(pool.map(grade, [(prompt, prompt.solution or "") for prompt in tried]))
        failed = [(prompt.solution, grade.note) for prompt, grade in zip(tried, gold, strict=True) if not grade.right]
        assert failed == []
        others = list(pool.map(grade, [(tried[n], tried[n + 20].solution or "") for n in range(20)]))
        assert not any(grade.right for grade in others)
    assert task.grade(prompts[0], "").score == 0.0


def test_what_the_student_reads(shared: Path) -> None:
    said = {name: read(shared, name).prompts("test")[0] for name in ("humaneval", "mbpp-plus")}
    said["mbpp"] = read(shared, "mbpp").prompts("train")[0]
    texts = {name: prompt.messages[-1]["content"] for name, prompt in said.items() if prompt.messages}
    assert texts["humaneval"].startswith(
        "Complete this function:\n```python\nfrom typing import List\n\n\ndef has_close"
    )
    assert texts["mbpp"].count("assert") == 1
    assert all(text.endswith("one block of Python code (```python ... ```).") for text in texts.values())
    raw = read(shared, "humaneval", chat=False, template="{prompt}").prompts("test")[0]
    assert raw.text is not None
    assert raw.text.startswith("from typing import List")
    assert raw.text.endswith('"""\n')


def test_types_that_json_lacks_are_read_from_the_assertions() -> None:
    row = {
        "entry_point": "f",
        "canonical_solution": "def f(*_): return 1",
        "assertion": "assert f((1, 2), [(3,), (4,)], {'a': (5,)}, 1j, {1}) == 1",
        "base_input": [[[1, 2], [[3], [4]], {"a": [5]}, "1j", [1]]],
        "plus_input": [[[], [[], [6, [7]]], {}, "(1+2j)", [2, 2]]],
        "atol": 0,
    }
    tests = evalplus_tests(row).tests
    assert "INPUTS = [[(1, 2), [(3,), (4,)], {'a': (5,)}, 1j, {1}], [(), [(), (6, (7,))], {}, (1+2j), {2}]]" in tests


def test_rows_of_ones_own(box: Bubblewrap, tmp_path: Path) -> None:
    rows = [
        {"q": "Add one.", "t": "assert f(1) == 2", "s": F},
        {"q": "Add one.", "t": ["assert f(1) == 2", "assert f(2) == 3"], "s": F},
        {"q": "Add one!", "t": {"inputs": ["1"], "outputs": ["2"]}, "s": "print(int(input()) + 1)"},
        {"q": "Add 1", "t": json.dumps({"inputs": [[1]], "outputs": [2], "fn_name": "f"}), "s": F},
        {
            "q": [{"role": "user", "content": "Add one?"}],
            "t": json.dumps([{"input": "1", "output": "2"}]),
            "s": f"[{json.dumps('print(int(input()) + 1)')}]",
        },
        {"q": "skipped", "t": {"inputs": [], "outputs": []}, "s": F},
    ]
    task = Code(
        path=write(tmp_path / "rows.jsonl", *rows),
        prompt_field="q",
        reference_field="t",
        solution_field="s",
        sandbox=box,
    )
    prompts = task.prompts("train")
    assert len(prompts) == 5
    assert task.intake("train").num_skipped == 1
    for prompt in prompts:
        assert prompt.solution is not None
        assert task.grade(prompt, prompt.solution).right, prompt
        assert not task.grade(prompt, fenced("def f(n): return 0")).right
    assert "reads from standard input" in prompts[2].messages[-1]["content"]  # type: ignore[index]
    for wrong in ("assert (", "{broken", {"inputs": ["1"]}, {"inputs": ["1"], "outputs": []}, 3, "x = 1"):
        bad = Code(
            path=write(tmp_path / f"{abs(hash(str(wrong)))}.jsonl", {"q": "?", "t": wrong}),
            prompt_field="q",
            reference_field="t",
        )
        with pytest.raises(DataError, match=r"jsonl:1: field 't' holds no tests that can be read"):
            bad.prompts("train")


def test_a_recipe_without_a_sandbox_is_refused_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "rows.jsonl", *({"q": f"Add {n}.", "t": f"assert f(1) == {n + 1}"} for n in range(20)))
    task = {
        "type": "code",
        "path": path,
        "prompt_field": "q",
        "reference_field": "t",
        "chat": False,
        "validation_share": 0.2,
    }
    values = tiny_recipe(
        tmp_path, task=task, student={"build": None, "model": str(tmp_path / "none")}, method={"type": "opd"}
    )
    values["teacher"] = {"type": "local", "model": "none"}
    monkeypatch.setattr(local, "_setup", local._setup.__wrapped__)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RecipeError, match="apt-get install bubblewrap"):
        check(config.parse(Recipe, values))
    with pytest.raises(RecipeError, match=r"task\.sandbox.*unsafe: true"):
        config.parse(Recipe, values | {"task": task | {"sandbox": {"type": "process"}}})
    with pytest.raises(RecipeError, match="none"):
        check(config.parse(Recipe, values | {"task": task | {"sandbox": {"type": "process", "unsafe": True}}}))
    written = config.parse(Recipe, values | {"task": task | {"sandbox": {"type": "bubblewrap", "cpu_s": 3}}})
    assert config.parse(Recipe, config.dump(written)) == written
