"""Room for the student's weights in shared memory, and a folder there that nobody else can write to."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO

from understudy.errors import RecipeError

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where the kernel keeps it)


def memory_left(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that this process may still take before something is killed; None where the kernel does not say.

    The least of what the machine has and what the limit of each of our control groups leaves. Cached files count as free: the
    kernel drops them first.
    """
    found = []
    with suppress(OSError, ValueError):
        found.append(1024 * _entries(proc / "meminfo")["MemAvailable"])
    for folder in _groups(proc, cgroups):
        with suppress(OSError, ValueError):
            limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
            if limit != "max":
                cached = _entries(folder / "memory.stat")
                files = cached.get("active_file", 0) + cached.get("inactive_file", 0)
                found.append(max(0, int(limit) - int(used) + files))
    return min(found, default=None)


def make_private(folder: Path) -> None:
    """A folder that is ours alone. Raises RecipeError for one that was there and need not be: /dev/shm is everybody's."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = True
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:
        made = False
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        wrong = "is a link" if stat.S_ISLNK(found.st_mode) else "is no folder"
    # a network's file system may give what we make to somebody else
    elif not made and found.st_uid != os.geteuid():
        wrong = f"belongs to another user ({found.st_uid})"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        wrong = "may be written to by others"
    else:
        return
    raise RecipeError(
        f"{folder}, where the student's weights were to go, {wrong}, and nothing is written there: see who made it and remove "
        "it, or set rollout.weights_dir"
    )


def open_lock(path: Path) -> IO[bytes]:
    """A file to be locked. Raises RecipeError where it is a link."""
    try:
        number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise RecipeError(f"cannot open {path}: {error.strerror}; see who made it and remove it") from error
    return os.fdopen(number, "r+b")


def _groups(proc: Path, cgroups: Path) -> list[Path]:
    """Ours in the hierarchy of version 2, and those above it."""
    with suppress(OSError):
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            if line.startswith("0::"):
                own = Path(line.removeprefix("0::").strip("/"))
                return [cgroups / part for part in (own, *own.parents)]
    return []


def _entries(path: Path) -> dict[str, int]:
    """Of lines such as `MemAvailable: 1024 kB` and `active_file 4096`."""
    words = [line.replace(":", " ").split() for line in path.read_text().splitlines()]
    return {name: int(value) for name, value, *_ in words if value.isdigit()}
