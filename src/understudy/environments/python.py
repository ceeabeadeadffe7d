"""A tool that runs the student's Python programs in a sandbox."""

from __future__ import annotations

from typing import Annotated

from understudy.environments.tools import Tool
from understudy.sandbox import Program, Sandbox

MAX_ERROR_CHARS = 2000
"""The end of a traceback says what is wrong."""


def python_tool(sandbox: Sandbox) -> Tool:
    """The tool `python`. A program that fails is an error of the tool, with what it printed and the end of its traceback."""

    def python(code: Annotated[str, "The whole program."]) -> str:
        """Runs a Python program and returns what it prints. Each call begins anew: nothing is kept from earlier ones."""
        result = sandbox.run(Program(code))
        if result.passed:
            return result.stdout or "The program printed nothing."
        wrong = result.stderr[-MAX_ERROR_CHARS:].strip() or result.note or result.outcome
        raise ValueError(
            "\n".join(part for part in (result.stdout.strip(), f"the program {result.outcome}: {wrong}") if part)
        )

    return Tool.of(python)
