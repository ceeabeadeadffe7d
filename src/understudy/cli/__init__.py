"""The program `understudy`: settings that the C libraries read when a process starts, then the command line.

Without a GPU a step is thousands of small operations. By default glibc maps fresh pages for every tensor of a few MiB and
unmaps them at once, and OpenMP's threads wait for each other by spinning, which costs a whole core when something else runs.
The settings below keep freed memory of up to 32 MiB a piece in huge pages (larger buffers are returned, or the peak of a
large vocabulary would be several times the memory in use) and let threads sleep. Variables that the user has set stay.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Mapping
from pathlib import Path

FOR_CPU = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "MALLOC_TOP_PAD_": "268435456",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "GOMP_SPINCOUNT": "2000",
}
DONE = "UNDERSTUDY_STARTED"
"""Set in the process that has the settings; set it beforehand to leave them as they are."""


def settings_for(environment: Mapping[str, str], *, linux: bool, gpu: bool) -> dict[str, str]:
    """Returns the variables to add to the environment; empty where the process can stay as it is."""
    if DONE in environment or gpu or not linux:
        return {}
    return {DONE: "1"} | {name: value for name, value in FOR_CPU.items() if name not in environment}


def entry() -> None:
    """Starts the process again with the settings (the same process id, arguments and files), then runs a command."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # the next file that is opened would take the place of a closed stream, and get what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    added = settings_for(os.environ, linux=sys.platform == "linux", gpu=Path("/dev/nvidia0").exists())
    if added:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | added)  # noqa: S606 (itself)
    status = [1]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # torch keeps the process groups of shards, and a thread of gloo may abort an interpreter that finalizes. Registered
        # first, these run after all other functions of `atexit`, the last of them first
        atexit.register(lambda: os._exit(status[0]))
        for stream in filter(None, (sys.stdout, sys.stderr)):
            atexit.register(stream.flush)
    from understudy.cli.app import main

    try:
        main()
    except SystemExit as ending:
        status[0] = ending.code if isinstance(ending.code, int) else int(ending.code is not None)
        raise
