"""The command line: `understudy train | eval | sample | report | methods | init`."""

from __future__ import annotations

from .app import main

__all__ = ["main"]
