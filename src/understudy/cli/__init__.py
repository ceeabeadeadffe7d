"""The command line: `understudy train | eval | sample | record | report | compare | methods | init`."""

from __future__ import annotations

from .entry import entry


def main() -> None:
    """Runs a command in this process."""
    from .app import main

    main()


__all__ = ["entry", "main"]
