"""`python -m understudy`, which `torchrun -m understudy` needs."""

from __future__ import annotations

from understudy.cli import entry

entry()
