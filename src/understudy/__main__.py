"""`python -m understudy`, which `torchrun -m understudy` needs."""

from __future__ import annotations

from .cli import entry

entry()
