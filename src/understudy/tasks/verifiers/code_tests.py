"""From rows of the usual data sets of programs to the tests that `grade_code` runs."""

from __future__ import annotations

import ast
import base64
import builtins
import io
import json
import pickle
import warnings
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from understudy.tasks.verifiers.code import CodeTests

SAME = '''
def same(found, wanted, atol):
    """Equal, or equal numbers within atol, in lists and tuples too."""
    if found == wanted or (found != found and wanted != wanted):
        return True
    number = (int, float)
    if isinstance(wanted, bool) or isinstance(found, bool):
        return False
    if isinstance(wanted, float) or (atol and isinstance(wanted, number)):
        atol = atol or 1e-6
        return isinstance(found, number) and abs(found - wanted) <= atol + 1e-7 * abs(wanted)
    if type(found) is type(wanted) and isinstance(wanted, (list, tuple)):
        return len(found) == len(wanted) and all(map(lambda a, b: same(a, b, atol), found, wanted))
    return False

def said_yes(value):
    return value if isinstance(value, bool) else value is not None
'''
"""How EvalPlus compares."""
_SETS = (
    "similar_elements",
    "find_char_long",
    "common_in_nested_lists",
    "extract_singly",
    "larg_nnum",
    "intersection_array",
    "find_dissimilar",
    "Diff",
)
"""Functions of MBPP+ whose elements have no order."""
_TRUTHY = ("check_str", "text_match_three", "text_starta_endb")
"""Functions of MBPP+ that may say yes by anything but None."""


MAX_UNPACKED = 1 << 30
"""Bytes of the tests of a problem when they are unpacked."""


def humaneval_tests(row: Mapping[str, Any]) -> CodeTests:
    """A row of HumanEval: `prompt`, `test` with a function `check`, `entry_point`. Raises KeyError, SyntaxError."""
    prompt, name = row["prompt"], row["entry_point"]
    header, helpers = _prompt_parts(prompt, name)
    return CodeTests(f"{helpers}\n{row['test']}\ncheck({name})\n", (name,), header, prompt)


def mbpp_tests(row: Mapping[str, Any]) -> CodeTests:
    """A row of MBPP: `test_list`, `test_setup_code` or `test_imports`, and the solution in `code`, whose names they test."""
    setup = "\n".join([*row.get("test_imports", ()), row.get("test_setup_code") or ""])
    # what it sets up may need the classes of the program
    return assert_tests("\n".join([setup, *row["test_list"]]), row["code"])


def evalplus_tests(row: Mapping[str, Any]) -> CodeTests:
    """A row of HumanEval+ or MBPP+: `base_input`, `plus_input`, `atol`, and a solution, which says what is right.

    Rows of MBPP+ have an `assertion`. It shows which lists of the JSON are tuples, sets or complex numbers in Python.
    """
    name, assertion = row["entry_point"], row.get("assertion", "")
    inputs, solution = [*row["base_input"], *row["plus_input"]], row["canonical_solution"]
    header, helpers, prompt = "", "", ""
    if assertion:
        calls = _calls(assertion, name)
        inputs = _typed(row["base_input"], calls, inputs)
        solution = "\n".join([*_imports(assertion), solution])
    else:
        prompt = row["prompt"]
        header, helpers = _prompt_parts(prompt, name)
        solution = prompt + solution
    compared = "same(found, wanted, ATOL)"
    if name == "find_zero":
        compared = "abs(poly(*inputs, found)) <= ATOL"
    elif assertion and name in _SETS:
        compared = "set(found) == set(wanted)"
    elif assertion and name in _TRUTHY:
        compared = "said_yes(found) == said_yes(wanted)"
    test = f"""
from copy import deepcopy
ATOL = {row["atol"]!r}
SOLUTION = {solution!r}
INPUTS = {inputs!r}
solved = dict(__name__="solution")
exec(SOLUTION, solved)
for inputs in INPUTS:
    wanted = solved[{name!r}](*deepcopy(inputs))
    found = {name}(*inputs)
    assert {compared}, inputs
"""
    # infinities and NaN have no literal
    names = "inf, nan = float('inf'), float('nan')\n"
    return CodeTests(f"{helpers}{names}{SAME}{test}", (name,), header, prompt)


class _TextUnpickler(pickle.Unpickler):
    """Reads pickles of strings, numbers and lists of them; one that names a class or a function could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it calls {module}.{name}")


def packed_tests(text: str) -> Any:
    """The value of JSON, or of JSON as LiveCodeBench packs it: base64 of zlib of a pickled string.

    Raises ValueError for anything else: what is more than `MAX_UNPACKED` bytes, or no pickled string.
    """
    if text.lstrip()[:1] in ("{", "["):
        return json.loads(text)
    try:
        inflater = zlib.decompressobj()
        data = inflater.decompress(base64.b64decode(text, validate=True), MAX_UNPACKED)
        if inflater.unconsumed_tail or not inflater.eof:
            raise ValueError("cut off, or over a gigabyte")
        said = _TextUnpickler(io.BytesIO(data)).load()
    except (ValueError, zlib.error, pickle.UnpicklingError, EOFError, LookupError, TypeError, MemoryError) as error:
        raise ValueError(f"not packed JSON: {error}") from error
    if not isinstance(said, str):
        raise ValueError(f"not packed JSON: the pickle holds {type(said).__name__}")
    return json.loads(said)


def contest_tests(values: Sequence[Any], fn_name: str | None = None) -> dict[str, Any]:
    """Tests in several fields as one `inputs` and `outputs`: LiveCodeBench's lists of `{input, output}`, and the lists `input`
    and `output` of CodeContests. Raises KeyError and TypeError for other values."""
    inputs, outputs = list[Any](), list[Any]()
    for value in values:
        if isinstance(value, Mapping):
            inputs += value["input"]
            outputs += value["output"]
        else:
            inputs += [case["input"] for case in value]
            outputs += [case["output"] for case in value]
    return {"inputs": inputs, "outputs": outputs} | ({"fn_name": fn_name} if fn_name else {})


def io_tests(row: str | Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> CodeTests:
    """Tests of APPS, LiveCodeBench and their like: `inputs` and `outputs`, and `fn_name` where a function is called.

    LiveCodeBench's list of `{input, output, testtype}` too, for which a called function's name stands in `fn_name`.
    Raises ValueError for other values.
    """
    values = json.loads(row) if isinstance(row, str) else row
    if not isinstance(values, Mapping):
        values = {"inputs": [case["input"] for case in values], "outputs": [case["output"] for case in values]}
    inputs, outputs, name = values["inputs"], values["outputs"], values.get("fn_name")
    if not name:
        return CodeTests(inputs=tuple(map(_text, inputs)), outputs=tuple(map(_text, outputs)))
    arguments = [[json.loads(line) for line in case.split("\n")] if isinstance(case, str) else case for case in inputs]
    results = [json.loads(case) if isinstance(case, str) else case for case in outputs]
    test = f"""
ATOL = 0
{SAME}
def plain(value):
    return list(map(plain, value)) if isinstance(value, (list, tuple)) else value
try:
    called = getattr(Solution(), {name!r})
except NameError:
    called = {name}
for inputs, wanted in zip({arguments!r}, {results!r}, strict=True):
    found = plain(called(*inputs))
    # some data sets wrap the result in a list
    assert same(found, wanted, ATOL) or same([found], wanted, ATOL), inputs
"""
    return CodeTests(f"inf, nan = float('inf'), float('nan')\n{test}", (name, "Solution"))


def _text(value: Any) -> str:
    """Input or output as text; some data sets have a list of lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _prompt_parts(prompt: str, name: str) -> tuple[str, str]:
    """The part of a prompt beside the wanted function: all of it, and what the tests may need: helpers with their imports.

    The tests run helpers of their own, so that a program cannot replace them.
    """
    tree = _parse(prompt + "    pass\n")
    rest = [node for node in tree.body if not (isinstance(node, ast.FunctionDef) and node.name == name)]
    has_helpers = any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in rest)
    header = "\n".join(map(ast.unparse, rest))
    return header, f"{header}\n" if has_helpers else ""


def _parse(code: str) -> ast.Module:
    """Without a word about escapes that Python will not read some day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(code)


def _imports(code: str) -> list[str]:
    return [ast.unparse(node) for node in _parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)]


def assert_tests(tests: str, solution: str) -> CodeTests:
    """Tests that are Python code, which calls what a solution defines; modules that it imports for them are theirs.

    Without a solution they call the first name that neither they nor Python define. Raises SyntaxError, and ValueError where
    they call nothing.
    """
    tree = _parse(solution)
    nodes = list(ast.walk(_parse(tests)))
    used = [node.id for node in nodes if isinstance(node, ast.Name)]
    defined, imported = list[str](), list[str]()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined += [target.id for target in targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound = {alias.asname or alias.name.partition(".")[0] for alias in node.names}
            if bound & set(used) or "*" in bound:
                imported.append(ast.unparse(node))
    names = [name for name in dict.fromkeys(used) if name in defined]
    if not names:
        known = {
            *dir(builtins),
            *(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)),
        }
        known |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        known |= {
            alias.asname or alias.name.partition(".")[0]
            for node in nodes
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        called = [node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        names = [name for name in called if name not in known][:1]
    return CodeTests("\n".join([*imported, tests]), tuple(names))


def _calls(assertion: str, name: str) -> list[list[Any]]:
    """The arguments of each call of a function whose arguments are literals."""
    found = []
    for node in ast.walk(_parse(assertion)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name:
            try:
                found.append((node.lineno, [ast.literal_eval(argument) for argument in node.args]))
            except ValueError:
                continue
    return [arguments for _, arguments in sorted(found, key=lambda item: item[0])]


def _typed(base: Sequence[Sequence[Any]], calls: Sequence[Sequence[Any]], inputs: Sequence[Sequence[Any]]) -> list[Any]:
    """Inputs from JSON with the types that the arguments of the calls have at the same places."""
    kinds = [_Kind() for _ in range(max(map(len, base), default=0))]
    for told, arguments in zip(base, calls, strict=False):
        for kind, value, argument in zip(kinds, told, arguments, strict=False):
            kind.learn(value, argument)
            # the whole argument: further inputs may need a complex one
            kind.is_number |= isinstance(argument, int | float | complex)
    return [[kind.apply(value) for kind, value in zip(kinds, case, strict=False)] for case in inputs]


class _Kind:
    """The type at a place of a nested value, of all elements of a list together."""

    def __init__(self) -> None:
        self.kind: type[Any] | None = None
        self.inner: _Kind | None = None
        self.is_number = False
        """Whether strings stand for numbers, which JSON cannot write."""

    def learn(self, value: Any, argument: Any) -> None:
        if isinstance(value, list | dict):
            if isinstance(argument, tuple | set | frozenset) or (isinstance(argument, list) and self.kind is None):
                self.kind = type(argument)
            self.inner = self.inner or _Kind()
            values = value.values() if isinstance(value, dict) else value
            arguments = argument.values() if isinstance(argument, dict) else argument
            for item, part in zip(values, arguments, strict=False):
                self.inner.learn(item, part)
        elif isinstance(value, str):
            self.is_number |= isinstance(argument, int | float | complex)

    def apply(self, value: Any, above: type[Any] = list) -> Any:
        if isinstance(value, str):
            return _as_number(value) if self.is_number else value
        # deeper than any example: as the list around it
        kind = self.kind or above
        inner = self.inner or _Kind()
        if isinstance(value, dict):
            return {key: inner.apply(item, kind) for key, item in value.items()}
        return kind(inner.apply(item, kind) for item in value) if isinstance(value, list) else value


def _as_number(text: str) -> str | float | complex:
    for kind in (float, complex):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
