"""Rows of files: JSON, JSON lines, CSV, TSV, Parquet and Arrow, compressed or not; one file, a folder, or a pattern.

JSON and CSV are read here and not through a columnar format, which would fill rows up with nulls, read "007" as 7, and
know no line numbers.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import glob
import gzip
import io
import json
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import IO, Any

import numpy as np

from understudy.errors import DataError, RecipeError, brief, nearest

Row = tuple[str, Mapping[str, Any]]
"""The place of the row (file and line), and its fields."""

_SPLIT_WORDS = re.compile(
    r"(?:^|[^a-z])(train|training|test|testing|val|valid|validation|dev|eval|heldout|holdout|trainset|testset)(?:[^a-z]|$)"
)
_CSV_NULLS = ("", "nan", "null", "<na>")
"""Cells, in any letter case, by which programs write a missing value."""
_SURPLUS = "\0"
"""Key of the cells of a row that has more than the first line: no name has this character."""
_CSV_MAX_CHARS = 2**31 - 1
"""Longest cell of a CSV file, in characters; Python's own limit is 131,072."""


def _open_zstd(path: Path) -> IO[bytes]:
    import pyarrow as pa

    # pyarrow brings the codec, which Python has from 3.14 on
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


def _open_zip(path: Path) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise RecipeError(f"{path} holds {len(names)} files; unpack it, and name the one that is meant")
    return archive.open(names[0])


_OPENERS: Mapping[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
    ".zip": _open_zip,
}
"""Suffix of a compressed file -> how its bytes are read."""
_PACKED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst", b"BZh": ".bz2", b"\xfd7zXZ": ".xz"}
"""First bytes of a compressed file -> its suffix."""
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile)
"""Errors of the decompressors for a file that is damaged or cut off."""


def find_files(source: str) -> list[Path]:
    """The files that a path, a folder or a pattern (`data/train-*.parquet`) stands for, sorted.

    Raises RecipeError where there are none, for a folder with files of several kinds or splits, and for one file in two
    forms (`rows.jsonl` and `rows.jsonl.gz`).
    """
    if "://" in source:
        raise RecipeError(
            f"{source} is an address; name a file of this machine, or a data set of the hub with type: hub"
        )
    path = Path(source).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        # as a pattern would, without hidden files: macOS writes one beside every file
        files = [item for item in path.iterdir() if item.is_file() and not item.name.startswith(".")]
        found = sorted(item for item in files if _kind(item) is not None)
        if not found:
            below = (
                f"; a pattern reads the folders in it: {path}/**/*.jsonl"
                if any(map(Path.is_dir, path.iterdir()))
                else ""
            )
            raise RecipeError(f"{path} has no file that can be read; known: {', '.join(_READERS)}{below}")
        kinds = {str(_kind(item)) for item in found}
        # where one file names its split, those that name none are of another
        words = [_SPLIT_WORDS.search(item.name.lower()) for item in found]
        splits = {f"{word[1]}*" if word else item.name for word, item in zip(words, found, strict=True) if any(words)}
        for several in (sorted(kinds), sorted(splits)):
            if len(several) > 1:
                raise RecipeError(
                    f"{path} holds files of several kinds or splits ({', '.join(several)}); name those that are meant by a "
                    f"pattern, for example {path}/*{several[-1]}"
                )
        return _each_once(found)
    found = sorted(Path(item) for item in glob.glob(str(path), recursive=True) if Path(item).is_file())
    if found:
        return _each_once(found)
    if glob.has_magic(source):
        raise RecipeError(f"no file matches {source}")
    siblings = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    hint = nearest(path.name, siblings) if siblings else f"there is no folder {path.parent}"
    raise RecipeError(f"there is no file {path}; {hint}")


def _each_once(paths: list[Path]) -> list[Path]:
    """The paths. Raises RecipeError where two of them are one file in two forms."""
    known: dict[str, Path] = {}
    for path in paths:
        first = known.setdefault(f"{path.parent}/{bare_name(str(path))}", path)
        if first != path:
            raise RecipeError(f"{first} and {path.name} look like the same rows twice; name the one that is meant")
    return paths


def read_rows(source: str) -> Iterator[Row]:
    """The rows of all files that `source` stands for, in order, each with its place.

    Raises RecipeError for a missing or unreadable file and an unknown kind, DataError for a damaged one.
    """
    for path in find_files(source):
        # a file with another suffix, or none, is taken for JSON lines
        read, place = _READERS.get(_kind(path) or "", _read_json), "its start"
        try:
            with _OPENERS.get(path.suffix.lower(), _open_plain)(path) as file:
                if read is not _read_columns:
                    _check_text(file, path)
                for place, row in read(file, path):
                    yield place, row
        except DataError as error:
            if _kind(path) is not None:
                raise
            raise DataError(f"{error}. A file of another kind is read so; known: {', '.join(_READERS)}") from error
        except _BROKEN as error:
            packed = "gzip" if path.suffix.lower() == ".gz" else path.suffix.lower()[1:]
            raise DataError(f"{path}: not a whole {packed} file, after {place}: {error}") from error
        except OSError as error:
            raise RecipeError(f"cannot read {path}: {error}") from error


def bare_name(source: str) -> str:
    """Folder and name of a file without its suffixes, for display: "gsm8k/train"."""
    path = Path(source)
    name = path.name
    for suffix in (path.suffix, Path(path.stem).suffix):
        if suffix.lower() in {*_OPENERS, *_READERS}:
            name = name.removesuffix(suffix)
    return f"{path.parent.name}/{name}" if path.parent.name else name


def without_nulls(value: Any) -> Any:
    """The value without keys whose value is null, at any depth: a columnar format writes every key into every row.

    The content of a message stays null: a row without it is left out.
    """
    if isinstance(value, Mapping):
        kept = {"role": "content", "from": "value"}
        keep = {kept[key] for key in kept.keys() & value.keys()}
        return {key: without_nulls(item) for key, item in value.items() if item is not None or key in keep}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def padded(row: Mapping[str, Any], schema: Any) -> Mapping[str, Any]:
    """A row of a columnar format without the nulls inside its fields; a field that is null itself stays.

    `schema`: that of Arrow. A float of 32 bits becomes the shortest one that rounds to it: 0.1, not 0.10000000149011612.
    """
    kinds = dict(zip(schema.names, schema.types, strict=True))
    return {key: without_nulls(_shortest(value, kinds.get(key))) for key, value in row.items()}


def _shortest(value: Any, kind: Any) -> Any:
    """The value of a column of this type of Arrow, with the floats of fewer than 64 bits in it as they are written."""
    name = str(kind)
    # "float" stands in the names of all types that hold one
    if value is None or "float" not in name:
        return value
    if name in ("float", "halffloat"):
        return float(str((np.float32 if name == "float" else np.float16)(value)))
    if isinstance(value, Mapping) and hasattr(kind, "get_field_index"):
        kinds = {field.name: field.type for field in kind}
        return {key: _shortest(item, kinds.get(key)) for key, item in value.items()}
    if isinstance(value, list) and hasattr(kind, "value_type"):
        return [_shortest(item, kind.value_type) for item in value]
    return value


def _kind(path: Path) -> str | None:
    """The suffix that says how a file is read, without that of its compression; None: it is not read."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _OPENERS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _READERS else None


def _open_plain(path: Path) -> IO[bytes]:
    return path.open("rb")


def _check_text(file: Any, path: Path) -> None:
    """Raises DataError for bytes that are not UTF-8 text, and says what they are."""
    head = file.peek(512)
    for mark, suffix in _PACKED.items():
        if head.startswith(mark):
            raise DataError(f"{path} is compressed inside: give its name another {suffix} at the end, or unpack it")
    if head[257:262] == b"ustar":
        raise DataError(f"{path} is a tar archive: unpack it, and name the file that is meant")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in head[:2]:
        raise DataError(f"{path} is text in UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{path} is a pointer of Git LFS, not the data itself: fetch it with git lfs pull")


def _read_json(file: IO[bytes], path: Path) -> Iterator[Row]:
    """One object a line, or one array of objects."""
    is_first = True
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        if is_first and line.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            rows = _parse(line + file.read(), f"{path}: not an array of JSON")
            for index, row in enumerate(rows):
                yield f"{path} row {index}", _object(row, f"{path} row {index}")
            return
        is_first, place = False, f"{path}:{number}"
        opens = line.strip().rstrip(b",").endswith((b"{", b"[", b'":')) or line.strip() == b"{"
        hint = " (objects over several lines have to stand in one array, or one a line: jq -c .)" if opens else ""
        yield place, _object(_parse(line, f"{place}: not a line of JSON{hint}"), place)


def _parse(text: bytes, complaint: str) -> Any:
    try:
        return json.loads(text.decode("utf-8-sig"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # the encoding, the syntax, ten thousand brackets
        raise DataError(f"{complaint}: {error}{_to_utf8(error)}") from error


def _to_utf8(error: Exception) -> str:
    return "; save the file as UTF-8" if isinstance(error, UnicodeDecodeError) else ""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Fields as an object. Raises ValueError for a repeated name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        name = next(name for index, (name, _) in enumerate(pairs) if name in dict(pairs[:index]))
        raise ValueError(f"the name {name!r} stands twice in one object; keep one")
    return found


def _object(row: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise DataError(f"{place}: {brief(row)} is not a JSON object; a row is one object with named fields")
    return row


def _read_csv(file: IO[bytes], path: Path) -> Iterator[Row]:
    """Cells are text, as they are written; the first line names the fields."""
    csv.field_size_limit(_CSV_MAX_CHARS)
    delimiter = "\t" if _kind(path) == ".tsv" else ","
    reader = csv.DictReader(
        io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), restkey=_SURPLUS, strict=True, delimiter=delimiter
    )
    try:
        names = list(reader.fieldnames or ())
        # no recipe names a column without a name, which tables of pandas and R have for their indices
        named = [name for name in names if name]
        if len(set(named)) < len(named):
            raise DataError(f"{path}: the first line names a field twice: {', '.join(named)}")
        for row in reader:
            place = f"{path}:{reader.line_num}"
            if _SURPLUS in row:
                raise DataError(f"{place}: more cells than the {len(names)} fields that the first line names")
            yield place, {key: None if (cell or "").casefold() in _CSV_NULLS else cell for key, cell in row.items()}
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not {_kind(path)}, after line {reader.line_num}: {error}{_to_utf8(error)}") from error


def _read_columns(file: IO[bytes], path: Path) -> Iterator[Row]:
    """Parquet, or Arrow as a file or a stream."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    # both are read from their end; a compressed one, which is rare, is taken into memory
    data = pa.BufferReader(file.read()) if path.suffix.lower() in _OPENERS else str(path)
    try:
        if _kind(path) == ".parquet":
            opened = pq.ParquetFile(data)
            schema, batches = opened.schema_arrow, opened.iter_batches()
        else:
            source = pa.memory_map(data) if isinstance(data, str) else data
            try:
                batches = opened = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                opened = pa.ipc.open_file(source)
                batches = (opened.get_batch(index) for index in range(opened.num_record_batches))
            schema = opened.schema
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{path} has two columns of one name: {', '.join(schema.names)}")
        rows = chain.from_iterable(batch.to_pylist() for batch in batches)
        for index, row in enumerate(rows):
            yield f"{path} row {index}", padded(row, schema)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a whole {_kind(path)} file: {error}") from error


_READERS: Mapping[str, Callable[[IO[bytes], Path], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_columns,
    ".arrow": _read_columns,
}
"""Suffix of a file, that of its compression aside -> how its rows are read."""
