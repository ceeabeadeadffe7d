"""Writes files whole or not at all, and finds out beforehand whether they can be written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from understudy.errors import CheckpointError, RecipeError


def check_writable(folder: Path, key: str) -> None:
    """Raises RecipeError that names `key` where the directory cannot be made or written to. Leaves nothing behind."""
    try:
        with suppress(FileNotFoundError):
            folder.lstat()
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
        aside.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes JSON as `write_atomically`."""
    write_atomically(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Writes one JSON object a line as `write_atomically`."""
    write_atomically(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
