"""A corpus of passages with a BM25 index, built once and kept on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

from understudy.errors import DataError, RecipeError, brief, nearest

ReadRows = Callable[[str], Iterator[tuple[str, Mapping[str, Any]]]]
"""The rows of a file, each with its place."""
_FORMAT = 1
"""Part of the fingerprint: a change of what the files hold or of how text is split makes other indices."""
_PASSAGES, _OFFSETS, _FACTS = "passages.jsonl", "offsets.npy", "facts.json"
_WORD = re.compile(r"(?u)\b\w+\b")
NUM_SHOWN = 3
"""Places of rows without text that are named."""


@dataclass(frozen=True)
class Passage:
    """One result of a search."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Source:
    """A file of passages, and how it is indexed."""

    path: str
    text_field: str
    title_field: str | None
    k1: float
    b: float

    def fingerprint(self) -> str:
        """Hash of the file's bytes and of all that decides what an index of them holds. Raises RecipeError for no file."""
        path = Path(self.path).expanduser()
        if not path.is_file():
            siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
            hint = nearest(path.name, siblings) if siblings else f"there is no folder {path.parent}"
            raise RecipeError(f"there is no corpus {path}; {hint}")
        stat = path.stat()
        digest = _read(path, (stat.st_size, stat.st_mtime_ns, stat.st_ino)).copy()
        facts = [_FORMAT, _bm25s().__version__, self.text_field, self.title_field, self.k1, self.b]
        digest.update(json.dumps(facts).encode())
        return digest.hexdigest()


@lru_cache(maxsize=8)
def _read(path: Path, stamp: object) -> blake2b:
    """The hash of a file, which is read again with another stamp: the corpora of papers have gigabytes."""
    digest = blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(2**22):
            digest.update(part)
    return digest


class Corpus:
    """Passages and their index, in a folder that `open_corpus` has made. Any thread may search."""

    def __init__(self, folder: Path) -> None:
        """Raises DataError for a folder that holds no whole index."""
        try:
            self.facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
            self._offsets = np.load(folder / _OFFSETS, mmap_mode="r")
            with (folder / _PASSAGES).open("rb") as file:
                self._passages = mmap(file.fileno(), 0, access=ACCESS_READ)
            self._index = _bm25s().BM25.load(folder, mmap=True, show_progress=False)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"the index in {folder} cannot be read ({error}); delete the folder, and it is built again"
            ) from error

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """The best passages for each query, in order; fewer where fewer share a word with it."""
        known = self._index.vocab_dict
        words = [[word for word in query if word in known] for query in _split(queries)]
        asked = [index for index, query in enumerate(words) if query]
        found: list[list[Passage]] = [[] for _ in queries]
        if asked:
            num = min(top_k, len(self))
            hits = self._index.retrieve([words[index] for index in asked], k=num, show_progress=False)
            for index, ids, scores in zip(asked, hits.documents, hits.scores, strict=True):
                found[index] = [self[int(id_)] for id_, score in zip(ids, scores, strict=True) if score > 0]
        return found

    def __getitem__(self, index: int) -> Passage:
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return Passage(*json.loads(self._passages[start:end]))


def open_corpus(source: Source, rows: ReadRows, cache_dir: str | None = None) -> Corpus:
    """The corpus of a file, from the cache where it is there. Rows without text are left out, counted and warned of.

    `cache_dir`: the folder with one index for each fingerprint; None: `understudy/search` in the user's cache. Raises
    RecipeError without such a file, and DataError for a row that cannot be read, lacks the field or has no text in it.
    """
    base = Path(cache_dir).expanduser() if cache_dir else _user_cache()
    folder = base / source.fingerprint()
    if not (folder / _FACTS).is_file():
        try:
            base.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix="building-", dir=base))
        except OSError as error:
            raise RecipeError(f"search.cache_dir {base} cannot be written to ({error.strerror or error})") from error
        try:
            _build(source, rows, aside)
            # another process may have been faster, with the same index
            with suppress(OSError):
                aside.rename(folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    corpus = Corpus(folder)
    if num_skipped := corpus.facts["num_skipped"]:
        warnings.warn(
            f"{source.path}: {num_skipped:,} of {len(corpus) + num_skipped:,} passages have no text and are left out, first "
            f"{'; '.join(corpus.facts['skipped'])}",
            stacklevel=2,
        )
    return corpus


def _build(source: Source, rows: ReadRows, folder: Path) -> None:
    skipped, offsets, texts = list[str](), [0], list[str]()
    num_skipped = 0
    with (folder / _PASSAGES).open("wb") as file:
        for place, row in rows(str(Path(source.path).expanduser())):
            if source.text_field not in row:
                raise DataError(
                    f"{place}: no field {source.text_field!r} ({nearest(source.text_field, row)}); set search.text_field"
                )
            text, title = row[source.text_field], row.get(source.title_field) if source.title_field else None
            for name, value in ((source.text_field, text), (source.title_field, title)):
                if value is not None and not isinstance(value, str):
                    raise DataError(f"{place}: field {name!r} is {brief(value)}; it must be a string")
            if not (text or "").strip():
                num_skipped += 1
                skipped += [place] if len(skipped) < NUM_SHOWN else []
                continue
            line = json.dumps([text, title or ""]).encode() + b"\n"
            file.write(line)
            offsets.append(offsets[-1] + len(line))
            texts.append(f"{title or ''} {text}")
    if not texts:
        raise DataError(f"{source.path}: none of the {num_skipped} passages has text in field {source.text_field!r}")
    np.save(folder / _OFFSETS, np.array(offsets, dtype=np.int64))
    index = _bm25s().BM25(k1=source.k1, b=source.b)
    index.index(_split(texts), show_progress=False)
    index.save(folder, show_progress=False)
    # last: an index with facts is whole
    facts = {"path": source.path, "num_passages": len(texts), "num_skipped": num_skipped, "skipped": skipped}
    (folder / _FACTS).write_text(json.dumps(facts), encoding="utf-8")


def _split(texts: Sequence[str]) -> list[list[str]]:
    """Lower-case words. Stop words stay: that they are common is what BM25 knows already, and names consist of them."""
    return [_WORD.findall(text.lower()) for text in texts]


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "understudy" / "search"


def _bm25s() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise RecipeError("a search over a corpus needs bm25s: pip install 'understudy[search]'") from error
    return bm25s
