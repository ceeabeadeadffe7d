"""Writes files whole or not at all, locks directories, and finds the files of steps."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from understudy.errors import CheckpointError, RecipeError

LOCK = ".lock"
"""Name of the file in a directory that says which process writes there."""


@contextmanager
def locked(folder: Path, key: str, warn: Callable[[str], None] = lambda _: None) -> Iterator[Callable[[], None]]:
    """Makes the directory, and is the only process that has it locked until the context ends; gives a check that it still is.

    The lock (flock) ends with the process, however that ends. Directories that were made and stay empty are removed again.
    A file system without locks is warned of. Raises RecipeError that names `key` and the process that has the lock, and
    where the directory cannot be written to; the check raises CheckpointError where the directory was removed or replaced.
    """
    path = folder / LOCK
    check_writable(folder, key)
    made = [part for part in (folder, *folder.parents) if not part.exists()]
    handle = -1
    try:
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    holder = os.read(handle, 1_000).decode(errors="replace").strip() or "another process"
                    raise RecipeError(
                        f"{key} {folder} is in use by {holder}; wait until it has ended, or choose another directory"
                    ) from None
                warn(f"{folder} cannot be locked ({error.strerror}): see that no other process writes there")
            if _is_at(handle, path):
                break
            # its last owner removed it meanwhile
            os.close(handle)
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {platform.node()}\n".encode())
    except (OSError, RecipeError) as error:
        if handle >= 0:
            os.close(handle)
        if isinstance(error, RecipeError):
            raise
        reason = error.strerror or error
        raise RecipeError(f"{key} {folder} cannot be written to ({reason}); choose another directory") from error

    def check() -> None:
        if not _is_at(handle, path):
            raise CheckpointError(
                f"{key} {folder} was removed, moved or replaced while it was written to, so nothing more is written; begin "
                "again, in another directory if a process still writes there"
            )

    try:
        yield check
    finally:
        with suppress(OSError):
            if _is_at(handle, path):
                path.unlink()
            for part in made:
                part.rmdir()
        os.close(handle)


def _is_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def by_step(folder: Path, suffix: str = "") -> dict[int, Path]:
    """Everything in a directory whose name is exactly `step_000100` + `suffix`, by step; what has another name is not ours."""
    found = {}
    for path in folder.glob(f"step_*{suffix}"):
        digits = re.fullmatch(rf"step_([0-9]+){re.escape(suffix)}", path.name)
        if digits and path.name == f"step_{int(digits[1]):06d}{suffix}":
            found[int(digits[1])] = path
    return dict(sorted(found.items()))


Hashed = tuple[int, str]
"""Bytes and SHA-256 of a file."""


def hash_file(path: Path, size: int | None = None) -> Hashed:
    """Returns the length and hash of a file, or of its first `size` bytes."""
    digest, left = hashlib.sha256(), path.stat().st_size if size is None else size
    total = 0
    with path.open("rb") as file:
        while part := file.read(min(1 << 20, left)):
            digest.update(part)
            left -= len(part)
            total += len(part)
    return total, digest.hexdigest()


def compare_files(folder: Path, table: object, *, grows: str = "") -> dict[str, str]:
    """Says of each file that is not as the table `{name: [bytes, SHA-256]}` has it whether it is missing or was changed.

    Of the file `grows` only the beginning has to be the same.
    """
    if not isinstance(table, Mapping):
        return {"the table of the files": "was changed"}
    found = {}
    for name, known in table.items():
        path = folder / str(name)
        try:
            if list(hash_file(path, int(known[0]) if name == grows else None)) != list(known):
                found[str(name)] = "was changed"
        except FileNotFoundError:
            found[str(name)] = "is missing"
        except (OSError, TypeError, ValueError, LookupError):
            found[str(name)] = "was changed"
    return found


def hash_values(values: Mapping[str, Any]) -> str:
    """SHA-256 of plain values as JSON has them."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def check_writable(folder: Path, key: str) -> None:
    """Raises RecipeError that names `key` where the directory cannot be made or written to. Leaves nothing behind."""
    try:
        with suppress(FileNotFoundError):
            folder.lstat()
        if folder.is_symlink():
            # raises for one that leads nowhere, or to itself
            folder.stat()
        with tempfile.TemporaryFile(dir=next(part for part in (folder, *folder.parents) if part.exists())):
            pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RecipeError(f"{key} {folder} cannot be written to ({reason}); choose another directory") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes beside the path, syncs and renames; a string in UTF-8. Raises CheckpointError with the path if that fails."""
    aside = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}; free space or fix permissions"
        ) from error
    finally:
        # an error here would hide the one above
        with suppress(OSError):
            aside.unlink()


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON as `write_atomically`."""
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes one JSON object a line as `write_atomically`."""
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
