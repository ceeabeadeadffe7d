"""The process that compares two mathematical expressions; started as a script by `math_process`, never imported.

It reads one JSON object per line from stdin, `{"reference", "answer", "cpu_s", "wall_s"}`, and writes `{"equal": bool}`
or `{"error": str}`. It holds no secrets (the parent passes a bare environment) and limits itself through the kernel:
the timers' default action ends the process even inside one long C call, where Python's own signal handlers never run.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import signal
import sys
from dataclasses import replace
from typing import Any, TextIO

MEMORY_BYTES = 2 * 1024**3
"""Address space; importing sympy takes a tenth of it, and 9^(9^9) would take all of the machine's."""


def main() -> None:
    """Answer requests until stdin closes, which it does when the parent dies."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing that a library prints may pass for a reply
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError as error:
        _write(replies, {"error": str(error)})
        return
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Only LaTeX, of the whole expression: no number picked out of text, no unit cut off that may be a variable ("7t").
    latex = LatexExtractionConfig()
    latex = replace(latex, normalization_config=replace(latex.normalization_config, units=False))
    _write(replies, {"ready": True})
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["cpu_s"])
        signal.setitimer(signal.ITIMER_REAL, request["wall_s"])
        reply: dict[str, object]
        try:
            gold, answer = (
                parse(f"\\boxed{{{request[key]}}}", [latex], parsing_timeout=None, raise_on_error=True)
                for key in ("reference", "answer")
            )
            places = _decimal_places(gold[0])
            reply = {"equal": bool(verify(gold, answer, places, timeout_seconds=None, raise_on_error=True))}
        except Exception as error:
            reply = {"error": type(error).__name__}
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        _write(replies, reply)


def _decimal_places(gold: Any) -> int:
    """Places in which decimal fractions are compared: six significant digits of a small number, 0.0000672 is not 0.0000668."""
    try:
        size = abs(float(gold))
        return max(6, 5 - math.floor(math.log10(size)))
    except (TypeError, ValueError, OverflowError):  # not one real number, or 0
        return 6


def _write(replies: TextIO, reply: dict[str, object]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
