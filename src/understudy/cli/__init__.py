"""The command line: `understudy train | eval | sample | record | report | compare | methods | init`."""

from __future__ import annotations

from understudy.cli.entry import entry


def main() -> None:
    """Runs a command in this process."""
    from understudy.cli.app import main

    main()


__all__ = ["entry", "main"]
