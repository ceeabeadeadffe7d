"""Load models (checked first, safetensors only, no remote code), build them from scratch, add LoRA adapters, save them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from understudy import given
from understudy.config import load_json
from understudy.errors import RecipeError, nearest
from understudy.hub import unreachable
from understudy.lazy import Tensor, importing, nn, no_grad, torch
from understudy.models.attention import NAME as SEGMENTS
from understudy.models.attention import attention_name
from understudy.models.backbone import decoder_of, evaluating, positions_of, unwrap, vision_of
from understudy.models.parallel import own_class
from understudy.models.vision import Vision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DType = Literal["auto", "float32", "float16", "bfloat16", "float64"]
_PART_OF_ADAPTED = re.compile(r"\.base_layer\.|\.modules_to_save\.[^.]+\.")
"""Parts that peft inserts into the names of weights."""
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_READ = (".safetensors", ".json", ".model", ".txt", ".jinja")
"""Endings of the files that models and tokenizers are read from."""
_HASHED_AT_ONCE = 8
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
"""Settings of a processor of images."""
_ATTENTION_PACKAGES = {
    "flash_attention_2": ("flash_attn", "flash-attn"),
    "flash_attention_3": ("flash_attn_interface", "flash-attn-3"),
}
"""Attention -> the module that it needs, and its package. The package kernels fetches them from the hub."""
ALIASES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
"""Short names of keys in `student.build`."""


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
    if (directory / _ADAPTER).is_file():
        base = _adapter_base(directory)
        if not (directory / _ADAPTER_WEIGHTS).is_file():
            raise RecipeError(f"{str(directory)!r} is an adapter without {_ADAPTER_WEIGHTS}; save it as safetensors")
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


def load_causal_lm(
    path_or_name: str,
    *,
    dtype: DType = "auto",
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
    revision: str | None = None,
    copy: bool = False,
    vision: Vision | None = None,
) -> PreTrainedModel:
    """A causal language model in evaluation mode, an adapter merged into the base that it names.

    `dtype="auto"` keeps the checkpoint's own precision, but for bfloat16 on a device that lacks its instructions: float32.
    `copy`: of a model that was given from Python, not itself. `vision`: the model's own (`load_vision`), to read images with;
    without it a model of images and text is loaded for text alone, where transformers can.

    Raises RecipeError when the directory is incomplete, nothing can be loaded, or weights and configuration do not fit: some
    would be random, or left out.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if (pair := given.find(path_or_name)) is not None:
        return _loaded_before(deepcopy(pair[0]) if copy else pair[0], path_or_name, dtype, device, attn_implementation)
    check_model_dir(path_or_name)
    local = Path(path_or_name).expanduser()
    if (local / _ADAPTER).is_file():
        base = load_causal_lm(
            _adapter_base(local), dtype=dtype, device=device, attn_implementation=attn_implementation, vision=vision
        )
        return _merge_adapter(base, local)
    source, offline = locate(path_or_name)
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    kind = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
    try:
        model, info = kind.from_pretrained(
            source,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            revision=revision or "main",
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # they are refused below, by name
            ignore_mismatched_sizes=True,
            **options,
        )
    except Exception as error:
        # a configuration or a file may make any part of transformers raise
        raise RecipeError(f"cannot load the model {path_or_name!r}: {_why_not(error, offline)}") from error
    _check_weights(model, path_or_name, info)
    _untie_separate(model)
    if vision is not None:
        model.vision = vision
    if dtype == "auto" and model.dtype == torch.bfloat16 and not has_bfloat16(torch.device(device)):
        model = model.float()
    return cast("PreTrainedModel", model.to(device).eval())


def drop_layers(model: PreTrainedModel, dropped: Collection[int]) -> None:
    """Takes these layers, counted from 0, out of a decoder whose layers are a plain list, such as Llama's and Qwen's.

    Raises RecipeError for layers that it does not have, and where none would be left.
    """
    decoder: Any = model.get_decoder()
    config: Any = model.config.get_text_config()
    if not set(dropped) < set(range(len(decoder.layers))):
        raise RecipeError(
            f"layers {sorted(dropped)} cannot be dropped; name some, not all, of 0 to {len(decoder.layers) - 1}"
        )
    kept = [layer for index, layer in enumerate(decoder.layers) if index not in dropped]
    for index, layer in enumerate(kept):
        # the cache of keys and values is kept by this number
        layer.self_attn.layer_idx = index
    decoder.layers = nn.ModuleList(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [kind for index, kind in enumerate(config.layer_types) if index not in dropped]
    config.num_hidden_layers = len(kept)


def load_vision(path_or_name: str, tokenizer: Any, *, revision: str | None = None) -> Vision:
    """The processor by which a model reads images, with a tokenizer that was loaded. It processes with Pillow, so that it gives
    the same on every machine.

    Raises RecipeError for a model of text, a processor that cannot be loaded, and one without a token for images.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as KNOWN
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.utils import cached_file

    if importlib.util.find_spec("PIL") is None:
        raise RecipeError("images need the package Pillow; run: pip install 'understudy[vision]'")
    if (pair := given.find(path_or_name)) is not None:
        vision = getattr(pair[0], "vision", None)
        if vision is None:
            raise RecipeError(
                f"{path_or_name} was given without a processor of images; name its directory in its place"
            )
        return cast("Vision", vision)
    local = Path(path_or_name).expanduser()
    if (local / _ADAPTER).is_file():
        return load_vision(_adapter_base(local), tokenizer)
    source, offline = locate(path_or_name)
    options = {"revision": revision or "main", "trust_remote_code": False}
    try:
        config = transformers.AutoConfig.from_pretrained(source, **options)
        if config.model_type not in KNOWN or not PROCESSOR_MAPPING_NAMES.get(config.model_type):
            raise RecipeError(
                f"{path_or_name!r} is a model of text ({config.model_type}), and the prompts have images; choose a model that "
                "reads both (qwen2_5_vl, qwen3_vl, gemma3, llava, ...), or take task.image_field out"
            )
        own: Any = getattr(transformers, PROCESSOR_MAPPING_NAMES[config.model_type])

        class ForImages(own):  # type: ignore[misc]
            """The processor without its part for videos, which needs more packages."""

            def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> None:
                """Takes None for what is left out."""

        ForImages.__name__ = own.__name__
        parts = {
            "image_processor": transformers.AutoImageProcessor.from_pretrained(source, backend="pil", **options),
            # a copy: some processors add tokens to theirs
            "tokenizer": deepcopy(tokenizer),
        }
        settings, _ = own.get_processor_dict(source, revision=options["revision"])
        processor = ForImages.from_args_and_dict([parts.get(name) for name in own.get_attributes()], settings)
        found = {
            name: cached_file(source, name, revision=options["revision"], _raise_exceptions_for_missing_entries=False)
            for name in _PROCESSOR_FILES
        }
        files = {name: Path(path).read_text(encoding="utf-8") for name, path in found.items() if path}
    except RecipeError:
        raise
    except Exception as error:
        # settings and packages of dozens of processors
        raise RecipeError(
            f"cannot load the processor of images of {path_or_name!r}: {said_by(error, offline)}"
        ) from error
    if not tokenizer.chat_template:
        # some keep it with the processor
        tokenizer.chat_template = processor.chat_template
    token = getattr(processor, "image_token", None)
    special = {str(one) for one in tokenizer.added_tokens_decoder.values() if one.special}
    if token not in special:
        raise RecipeError(
            f"{own.__name__} of {path_or_name!r} marks an image with {token!r}, which is no special token of its tokenizer, so "
            "a prompt could spell it; choose another model"
        )
    return Vision(processor, files)


def _merge_adapter(base: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Raises RecipeError for an adapter that cannot be loaded or merged, or whose file and configuration do not fit."""
    try:
        from peft import PeftModel
    except ImportError as error:
        raise RecipeError(f"{directory} is a LoRA adapter; run: pip install 'understudy[lora]'") from error
    try:
        with _quiet_about_tying():
            adapted: Any = PeftModel.from_pretrained(base, str(directory))
            # the first call loads what fits and tells nobody of the rest
            result = adapted.load_adapter(str(directory), "default", torch_device=str(base.device))
            _untie_adapted(adapted)
            merged = None if result.missing_keys or result.unexpected_keys else adapted.merge_and_unload()
    except Exception as error:
        # as above: its files may make any part of peft raise
        text = f"{type(error).__name__}: {first_line(error)}"
        raise RecipeError(
            f"cannot load the adapter {str(directory)!r} on its base {base.name_or_path!r}: {text}"
        ) from error
    if merged is None:
        raise RecipeError(
            f"the weights of the adapter {str(directory)!r} do not fit its {_ADAPTER} and its base {base.name_or_path!r}: "
            f"{len(result.missing_keys)} tensors are missing and {len(result.unexpected_keys)} have no place, first "
            f"{sorted([*result.missing_keys, *result.unexpected_keys])[0]!r}"
        )
    # an adapter that is trained on top names this one as its base, not the model beneath
    merged.name_or_path = str(directory)
    return cast("PreTrainedModel", merged.eval())


def _why_not(error: Exception, offline: str | None) -> str:
    text = said_by(error, offline)
    if text.startswith("Unrecognized configuration class"):
        kind = text.partition("'>")[0].rpartition(".")[2].removesuffix("Config")
        return (
            f"transformers has no causal language model of the kind {kind} (an encoder, an encoder with a decoder, or a model "
            "that reads more than text); choose a causal language model"
        )
    if "custom code" in text:
        return (
            "it needs code from its directory, which is never run here; choose a model that transformers has by itself"
        )
    return (
        text
        if isinstance(error, (OSError, ValueError, ImportError, RuntimeError))
        else f"{type(error).__name__}: {text}"
    )


def _check_weights(model: Any, name: str, info: Mapping[str, Any]) -> None:
    """Raises RecipeError for weights that the model needs and lacks, that have another shape, or that belong to a part of it
    and would be left out. Parts that it does not have, such as a value head or a vision tower, may be left out: their tensors
    are in `model.left_out`, which the doctor tells of."""
    kind = type(model).__name__
    if info["mismatched_keys"]:
        first, stored, wanted = sorted(info["mismatched_keys"])[0]
        raise RecipeError(
            f"the weights of {name!r} do not fit its config.json: {first!r} is {list(stored)} in the file and {list(wanted)} "
            f"by the configuration ({len(info['mismatched_keys'])} tensors differ)"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise RecipeError(
            f"the weights of {name!r} lack {len(missing)} tensors of {kind}, first {missing[0]!r}: they would be random. Is it "
            "a checkpoint of another kind of model?"
        )
    own = {part for part, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}
    # "layers.4.mlp.up_proj" belongs to a model with "layers.0.mlp.up_proj", whose configuration says fewer layers
    left_out = sorted(
        key
        for key in info["unexpected_keys"]
        if own & {key.rpartition(".")[0], re.sub(r"\.\d+\.", ".0.", key.rpartition(".")[0])}
    )
    if left_out:
        raise RecipeError(
            f"the weights of {name!r} hold {len(left_out)} tensors that its config.json has no place for, first "
            f"{left_out[0]!r}: {kind} would run without them. Correct config.json (layers, biases, quantization), "
            "or choose another model"
        )
    model.left_out = sorted(info["unexpected_keys"])


def _untie_separate(model: Any) -> None:
    """Says in the configuration that embedding and output layer are not tied where the file holds both and they differ:
    transformers keeps them apart then, and an engine that goes by the configuration would not."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    weights = [getattr(layer, "weight", None) for layer in (embedding, head)]
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if is_tied and None not in weights and weights[0] is not weights[1]:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; without them it is emulated, at a fraction of float32's speed."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    instructions = torch.cpu.get_capabilities()
    # the first two of x86, the third of ARM
    return any(instructions.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _loaded_before(
    model: Any, name: str, dtype: DType, device: str | torch.device, attn_implementation: str | None
) -> PreTrainedModel:
    """A model that was given from Python: itself, or a copy where another precision is asked for."""
    attention = attention_name(model)
    if attn_implementation not in (None, attention):
        raise RecipeError(
            f"{name} has the attention {attention!r}; load it with {attn_implementation!r}, or leave attn_implementation out"
        )
    wanted = model.dtype if dtype == "auto" else getattr(torch, dtype)
    return cast("PreTrainedModel", (model if wanted == model.dtype else deepcopy(model).to(wanted)).to(device).eval())


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
    if (directory / _ADAPTER).is_file():
        base = fingerprint_files(_adapter_base(directory)) or {}
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
        return _default_config(str(build["architecture"]), **check_build(build)).get_text_config()
    folder = Path(path or "").expanduser()
    if path is not None and (folder / _ADAPTER).is_file():
        return config_on_disk(_adapter_base(folder))
    if path is None or not (folder / "config.json").is_file():
        return None
    try:
        return AutoConfig.from_pretrained(str(folder), trust_remote_code=False).get_text_config()
    except Exception as error:
        # each configuration validates in its own way
        raise RecipeError(f"cannot read {folder / 'config.json'}: {first_line(error)}") from error


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


def check_attention(name: str | None, place: str) -> None:
    """Raises RecipeError for an attention that transformers does not know, or whose package is not installed."""
    # a name with a slash is a kernel of the hub
    if name is None or "/" in name or "|" in name:
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = {"eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()} - {SEGMENTS}
    known -= {one for one in ALL_ATTENTION_FUNCTIONS if "|" in one}
    if name not in known:
        raise RecipeError(f"{place}.attn_implementation is {name!r}; {nearest(name, known)}")
    package, install = _ATTENTION_PACKAGES.get(name, ("torch", ""))
    if not any(map(importlib.util.find_spec, (package, "kernels"))):
        raise RecipeError(
            f"{place}.attn_implementation is {name!r}, but the package {install} is not installed; install it, or take sdpa"
        )


def check_lora_targets(path: str | None, build: Mapping[str, Any] | None, targets: Sequence[str]) -> None:
    """Raises RecipeError for a target that names no layer of the model, by its configuration; a hub name is not checked."""
    from transformers import AutoModelForCausalLM

    config = config_on_disk(path, build)
    if config is None:
        return
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (ValueError, KeyError, AttributeError, TypeError, RuntimeError, ImportError):
        # some architectures cannot be made without their weights; loading will say
        return
    names = [name for name, module in model.named_modules() if hasattr(module, "weight")]
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            lasts = {name.rpartition(".")[2] for name in names}
            hint = nearest(target, lasts)
            raise RecipeError(f"student.lora.target_modules names {target!r}, but the model has no such layer; {hint}")


def _adapter_base(directory: Path) -> str:
    """Raises RecipeError where the adapter's configuration names no model, or the adapter's own directory."""
    try:
        base = load_json((directory / _ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{directory / _ADAPTER} cannot be read ({error!r}); save the adapter again") from error
    if not isinstance(base, str) or not base.strip() or Path(base).expanduser().resolve() == directory.resolve():
        raise RecipeError(
            f"{directory / _ADAPTER} names {base!r} as its base model; base_model_name_or_path must be the hub name or the "
            "directory of the model that the adapter was trained on, and an adapter lies in a directory of its own"
        )
    return base


def said_by(error: BaseException, offline: str | None) -> str:
    """`offline` for what is missing on this machine; of other errors of a library, which may be a page long, the first line."""
    return offline if offline is not None and isinstance(error, OSError) else first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error of a library."""
    return (str(error).strip() or type(error).__name__).partition("\n")[0]


def build_causal_lm(
    config: Mapping[str, Any],
    *,
    vocab_size: int,
    eos_token_id: int,
    pad_token_id: int | None = None,
    bos_token_id: int | None = None,
    dtype: str = "float32",
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> PreTrainedModel:
    """A randomly initialised model: `{architecture: llama, hidden_size: 64, num_layers: 2, num_heads: 4, ...}`.

    Keys are those of the architecture's configuration or `num_layers`, `num_heads`, `num_kv_heads`. Where they are not
    given, heads share nothing (`num_kv_heads = num_heads`), `head_dim = hidden_size / num_heads`, and the feed-forward
    layer is 4 times as wide as the model. The same seed gives the same weights and leaves torch's generator alone.

    Raises RecipeError for an unknown architecture or key and for sizes that do not fit.
    """
    from transformers import AutoModelForCausalLM

    settings = check_build(config) | {
        "vocab_size": vocab_size,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "bos_token_id": bos_token_id,
    }
    try:
        made = _default_config(str(config["architecture"]), **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(made, dtype=getattr(torch, dtype), trust_remote_code=False)
    except RecipeError:
        raise
    except Exception as error:
        # sizes that do not fit make any part of a model raise
        text = f"{type(error).__name__}: {first_line(error)}"
        raise RecipeError(f"cannot build a model from {dict(config)}: {text}") from error
    return cast("PreTrainedModel", model.to(device).eval())


def check_build(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `build_causal_lm` by their names in the configuration, with sizes that follow from others filled in.

    Raises RecipeError for an unknown architecture or key and for sizes that do not fit.
    """
    if "architecture" not in config:
        raise RecipeError(
            f"a model from scratch needs `architecture` (llama, qwen3, gpt2, ...); given: {sorted(config)}"
        )
    default = _default_config(str(config["architecture"]))
    settings = {}
    for key, value in config.items():
        name = ALIASES.get(key, key)
        if key == "architecture":
            continue
        if not hasattr(default, name):
            known = [*ALIASES, *default.to_dict()]
            raise RecipeError(f"model key {key!r} is unknown for {config['architecture']}; {nearest(key, known)}")
        settings[name] = value
    for name in ("hidden_size", "num_attention_heads", "num_hidden_layers"):
        value = settings.get(name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise RecipeError(f"model key {name!r} is {value!r}; it must be a whole number of at least 1")
    hidden, heads = settings.get("hidden_size"), settings.get("num_attention_heads")
    if hidden is None or heads is None or "num_hidden_layers" not in settings:
        raise RecipeError("a model from scratch needs hidden_size, num_layers and num_heads")
    if hidden % heads and "head_dim" not in settings:
        raise RecipeError(f"hidden_size {hidden} cannot be divided among {heads} heads; give head_dim or other sizes")
    derived = {"num_key_value_heads": heads, "head_dim": hidden // heads, "intermediate_size": 4 * hidden}
    derived |= {"query_pre_attn_scalar": settings.get("head_dim", hidden // heads)}
    return {name: value for name, value in derived.items() if hasattr(default, name)} | settings


def _default_config(architecture: str, **settings: Any) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if architecture not in KNOWN:
        close = get_close_matches(architecture, KNOWN, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "llama, qwen3, gemma2, mistral and gpt2 are common ones"
        raise RecipeError(f"architecture {architecture!r} is no causal language model of transformers; {hint}")
    try:
        return AutoConfig.for_model(architecture, **settings)
    except Exception as error:
        # each configuration validates in its own way
        given_keys = ", ".join(f"{key}: {value!r}" for key, value in settings.items())
        text = str(error).strip().splitlines() or [type(error).__name__]
        raise RecipeError(f"cannot build a {architecture} model with {given_keys}: {text[-1].strip()}") from error


def apply_lora(
    model: nn.Module,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: str | Sequence[str] = "all-linear",
    seed: int = 0,
) -> nn.Module:
    """The model with adapters `W + alpha / rank * B A` on `target_modules`; all else frozen, the output layer too. Of a model
    that reads images only the language model gets some.

    Adapters on an embedding that is tied to the output layer untie the two: the output layer stays as it was.

    Raises RecipeError when peft is not installed, when a module name matches nothing, or when it is the output layer.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise RecipeError("LoRA needs the package peft: pip install 'understudy[lora]'") from error
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    names = [name for name, _ in model.named_modules()]
    if vision_of(model) is not None:
        inside = set(decoder_of(model).modules())
        own = [name for name, layer in model.named_modules() if layer in inside and isinstance(layer, nn.Linear)]
        wanted = [""] if targets == "all-linear" else [f".{target}" for target in targets]
        named = [name for name in own if any(f".{name}".endswith(end) for end in wanted)]
        targets = named or targets
    absent = [one for one in targets if not any(f".{name}".endswith(f".{one}") for name in names)]
    if absent and not isinstance(targets, str):
        head = unwrap(model).get_output_embeddings()
        linear = {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer is not head}
        known = sorted({name.rpartition(".")[2] for name in linear})
        raise RecipeError(
            f"cannot add LoRA to {type(model).__name__}: target_modules {absent} match none of its layers; its linear layers "
            f"are {', '.join(known)}"
        )
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none", task_type="CAUSAL_LM"
    )
    try:
        with torch.random.fork_rng(devices=[]), _quiet_about_tying():
            torch.manual_seed(seed)
            adapted: nn.Module = get_peft_model(model, config)
    except ValueError as error:
        raise RecipeError(f"cannot add LoRA to {type(model).__name__}: {first_line(error)}") from error
    if hasattr(unwrap(adapted).get_output_embeddings(), "base_layer"):
        raise RecipeError(
            f"LoRA on the output layer is not supported (target_modules {target_modules!r}): losses read its weight"
        )
    _untie_adapted(adapted)
    return adapted


@contextmanager
def _quiet_about_tying() -> Iterator[None]:
    """Without peft's warning about adapters on tied layers, which `_untie_adapted` takes care of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*tie_word_embeddings")
        yield


def _untie_adapted(model: nn.Module) -> None:
    """Unties embedding and output layer where adapters or trained copies set the two apart.

    The configuration must say so too: else whatever loads the merged weights would put one in place of the other.
    """
    base = unwrap(model)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    is_apart = any(hasattr(layer, name) for layer in (embedding, head) for name in ("base_layer", "modules_to_save"))
    if not (is_apart and base.config.get_text_config().tie_word_embeddings):
        return
    base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False
    plain: Any = getattr(head, "base_layer", getattr(head, "original_module", head))
    plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)


ADAPTER_DIR = "adapter"
"""Folder of the adapter beside the model that it is merged into."""


def save_hf(
    model: nn.Module,
    tokenizer: Any,
    directory: str | Path,
    *,
    merged: bool = True,
    stop_ids: Sequence[int] | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """A directory that `AutoModelForCausalLM` (`merged`) or PEFT (an adapter) loads, with the tokenizer. Safetensors.

    The model keeps its generation settings; `stop_ids` are saved in them, so that whoever serves it stops where the run did.

    Merging forms `W + delta` on the side: the live model and its adapters stay as they are, and the adapters are saved
    too, in `ADAPTER_DIR`.

    `weights`: the model's state dict, where the model has a part of it only; not to be merged.
    """
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    base: Any = unwrap(model)
    adapted: Any = model
    if base is adapted:
        with own_class(model):
            base.save_pretrained(target, state_dict=weights)
    else:
        # the embedding has its own size, so peft need not look for that of the base on the hub, nor save it whole
        adapted.save_pretrained(
            target / ADAPTER_DIR if merged else target, save_embedding_layers=False, state_dict=weights
        )
        if merged:
            _untie_adapted(model)
            base.save_pretrained(target, state_dict=merged_state_dict(model))
    settings = target / "generation_config.json"
    if stop_ids is not None and settings.is_file():
        # in the file: transformers refuses to save settings like `top_k` without `do_sample` once one of them was changed
        values = json.loads(settings.read_text()) | {"eos_token_id": list(stop_ids), "_from_model_config": False}
        settings.write_text(json.dumps(values, indent=2))
    tokenizer.save_pretrained(target)
    if (vision := vision_of(model)) is not None:
        for name, text in vision.files.items():
            (target / name).write_text(text, encoding="utf-8")


@no_grad
def read_back(model: nn.Module, directory: str | Path) -> float:
    """The largest difference between the logits of the model and of what was saved in the directory, over the largest logit.

    Some architectures do not load as they were saved: transformers empties the embedding's row of the padding token of one.
    Raises RecipeError for what cannot be loaded.
    """
    base = unwrap(model)
    dtype = str(base.dtype).removeprefix("torch.")
    # on the CPU: a GPU may have no room for a second copy
    again = load_causal_lm(str(directory), dtype=cast("DType", dtype), vision=vision_of(model))
    rows, limit = base.get_output_embeddings().weight.shape[0], positions_of(base.config.get_text_config())
    # the first ids are most often the special ones
    ids = torch.arange(min(16, rows, limit or 16))[None]
    with evaluating(model):
        live = base(input_ids=ids.to(base.device), use_cache=False).logits.float().cpu()
    saved = again(input_ids=ids, use_cache=False).logits.float()
    return float((saved - live).abs().max() / live.abs().max().clamp_min(1e-30))


@no_grad
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the plain model: trained copies in place of what they replace, and every adapter added to a copy of
    the weight that it belongs to. Raises RecipeError for adapters that change more than a weight."""
    base = unwrap(model)
    module: Any
    state: dict[str, Tensor] = {
        _PART_OF_ADAPTED.sub(".", name): value
        for name, value in base.state_dict().items()
        if ".lora_" not in name and ".original_module." not in name
    }
    for name, module in base.named_modules():
        if not hasattr(module, "get_delta_weight"):
            continue
        if any(getattr(module, "lora_variant", {})) or any(getattr(module, "lora_bias", {}).values()):
            raise RecipeError(
                f"{name} has DoRA, a bias or another variant of LoRA, which is no change of a weight alone; merge it with "
                "merge_and_unload and save the result"
            )
        weight = state[f"{name}.weight"]
        # at least float32, so that a small delta is rounded once, with the sum
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for adapter in module.active_adapters:
            total = total + module.get_delta_weight(adapter).to(total.dtype)
        state[f"{name}.weight"] = total.to(weight.dtype)
    return state
