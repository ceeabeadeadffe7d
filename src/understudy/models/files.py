"""Files of a model: where they are, what they say before anything is loaded, and their hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from understudy import given
from understudy.config import load_json
from understudy.errors import RecipeError, first_line
from understudy.hub import unreachable
from understudy.lazy import importing
from understudy.models.build import check_build, default_config

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READ = (".safetensors", ".json", ".model", ".txt", ".jinja")
"""Endings of the files that models and tokenizers are read from."""
_HASHED_AT_ONCE = 8


def check_model_dir(path: str) -> str:
    """Checks a model without loading it, a complete directory or a hub name; returns a line about it.

    Raises RecipeError for a path that exists and is no directory, or lacks config.json or weights, and for what looks
    like a path but does not exist.
    """
    if given.find(path) is not None:
        return f"{path}: given from Python"
    directory = Path(path).expanduser()
    if not directory.exists():
        if path.startswith((".", "/", "~")) or path.count("/") > 1 or not path.strip():
            raise RecipeError(
                f"no model directory at {path!r}; give an existing directory or a hub name like 'org/name'"
            )
        return f"{path}: looks like a hub name, not checked offline"
    if not directory.is_dir():
        raise RecipeError(f"{path!r} is a file; a model is a directory with config.json and {_WEIGHTS}")
    if (directory / ADAPTER).is_file():
        base = adapter_base(directory)
        if not (directory / ADAPTER_WEIGHTS).is_file():
            raise RecipeError(f"{str(directory)!r} is an adapter without {ADAPTER_WEIGHTS}; save it as safetensors")
        return f"{path}: a LoRA adapter on {check_model_dir(base)}"
    if not (directory / "config.json").is_file():
        raise RecipeError(f"{path!r} has no config.json, so it is no model directory; write one with `save_pretrained`")
    index = directory / _INDEX
    if index.is_file():
        try:
            shards = set(load_json(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise RecipeError(f"{index} cannot be read ({error}); download the model again") from error
        missing = sorted(shard for shard in shards if not (directory / shard).is_file())
        if missing:
            raise RecipeError(
                f"{str(directory)!r} lacks {len(missing)} of its {len(shards)} weight files: {missing[0]}"
            )
    elif not (directory / _WEIGHTS).is_file():
        other = sorted(file.name for file in directory.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".gguf"))
        hint = f"; {other[0]} is another format, save it with `save_pretrained` as safetensors" if other else ""
        raise RecipeError(f"{str(directory)!r} has no weights: neither {_WEIGHTS} nor {_INDEX}{hint}")
    return f"{path}: config.json and weights are there"


def locate(path_or_name: str) -> tuple[str, str | None]:
    """The directory, or the hub name of what is not one, and then why the hub cannot be asked, if it cannot."""
    local = Path(path_or_name).expanduser()
    if local.exists():
        return str(local), None
    reason = unreachable()
    return path_or_name, reason and f"it is no directory and not in the hub's cache, and {reason}"


def fingerprint_files(path_or_name: str, revision: str | None = None) -> dict[str, str] | None:
    """`{file: SHA-256}` of a model's directory and of the base that an adapter in it names, or `{"commit": ...}` of the hub.

    Reads all weights once, several files at a time. None where nothing is known: the hub's model is not in its cache, or
    the model was given from Python, by a name that holds a hash of it.
    """
    from huggingface_hub import try_to_load_from_cache

    if given.find(path_or_name) is not None:
        return None
    directory = Path(path_or_name).expanduser()
    if not directory.is_dir():
        found = try_to_load_from_cache(path_or_name, "config.json", revision=revision)
        return {"commit": Path(found).parent.name} if isinstance(found, str) else None
    files = sorted(file for file in directory.iterdir() if file.suffix in _READ and file.is_file())
    with ThreadPoolExecutor(_HASHED_AT_ONCE, "hash") as pool:
        facts = {file.name: digest for file, digest in zip(files, pool.map(_hash_file, files), strict=True)}
    if (directory / ADAPTER).is_file():
        base = fingerprint_files(adapter_base(directory)) or {}
        facts |= {f"base {name}": digest for name, digest in base.items()}
    return facts


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def config_on_disk(path: str | None, build: Mapping[str, Any] | None = None) -> Any:
    """The configuration of the language model in a directory, or of `build`; None for a hub name.

    Raises RecipeError for one that transformers does not know.
    """
    with importing():
        from transformers import AutoConfig

    if path is not None and (pair := given.find(path)) is not None:
        return pair[0].config.get_text_config()
    if build is not None:
        return default_config(str(build["architecture"]), **check_build(build)).get_text_config()
    folder = Path(path or "").expanduser()
    if path is not None and (folder / ADAPTER).is_file():
        return config_on_disk(adapter_base(folder))
    if path is None or not (folder / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False).get_text_config()
    except Exception as error:
        # each configuration validates in its own way
        raise RecipeError(f"cannot read {folder / 'config.json'}: {first_line(error)}") from error


def positions_of(config: Any) -> int | None:
    """The positions that a language model of this configuration has; None where nothing limits them."""
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


def positions_on_disk(path: str | None, build: Mapping[str, Any] | None = None) -> int | None:
    """The positions that a model in a directory has, or one of `build`; None for a hub name and where nothing limits them.

    Raises as `config_on_disk`, which is asked only where config.json does not say it: its import takes seconds.
    """
    written = read_settings(Path(path or "").expanduser() / "config.json")
    limit = written.get("max_position_embeddings")
    if build is None and isinstance(limit, int) and "text_config" not in written and given.find(path or "") is None:
        return limit
    return positions_of(config_on_disk(path, build))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a JSON file of a model; empty where there is none, or none that can be read."""
    try:
        settings = load_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def adapter_base(directory: Path) -> str:
    """Raises RecipeError where the adapter's configuration names no model, or the adapter's own directory."""
    try:
        base = load_json((directory / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{directory / ADAPTER} cannot be read ({error!r}); save the adapter again") from error
    if not isinstance(base, str) or not base.strip() or Path(base).expanduser().resolve() == directory.resolve():
        raise RecipeError(
            f"{directory / ADAPTER} names {base!r} as its base model; base_model_name_or_path must be the hub name or the "
            "directory of the model that the adapter was trained on, and an adapter lies in a directory of its own"
        )
    return base


def said_by(error: BaseException, offline: str | None) -> str:
    """`offline` for what is missing on this machine; of other errors of a library, which may be a page long, the first line."""
    return offline if offline is not None and isinstance(error, OSError) else first_line(error)
