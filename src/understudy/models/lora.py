"""LoRA adapters: put on a model, merged into its weights, and checked by its configuration."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from understudy.errors import RecipeError, first_line, nearest
from understudy.lazy import Tensor, nn, no_grad, torch
from understudy.models.backbone import decoder_of, unwrap, vision_of
from understudy.models.files import ADAPTER, config_on_disk

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PART_OF_ADAPTED = re.compile(r"\.base_layer\.|\.modules_to_save\.[^.]+\.")
"""Parts that peft inserts into the names of weights."""


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
    untie_adapted(adapted)
    return adapted


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


def merge_adapter(base: PreTrainedModel, directory: Path) -> PreTrainedModel:
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
            untie_adapted(adapted)
            merged = None if result.missing_keys or result.unexpected_keys else adapted.merge_and_unload()
    except Exception as error:
        # as above: its files may make any part of peft raise
        text = f"{type(error).__name__}: {first_line(error)}"
        raise RecipeError(
            f"cannot load the adapter {str(directory)!r} on its base {base.name_or_path!r}: {text}"
        ) from error
    if merged is None:
        raise RecipeError(
            f"the weights of the adapter {str(directory)!r} do not fit its {ADAPTER} and its base {base.name_or_path!r}: "
            f"{len(result.missing_keys)} tensors are missing and {len(result.unexpected_keys)} have no place, first "
            f"{sorted([*result.missing_keys, *result.unexpected_keys])[0]!r}"
        )
    # an adapter that is trained on top names this one as its base, not the model beneath
    merged.name_or_path = str(directory)
    return cast("PreTrainedModel", merged.eval())


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


@contextmanager
def _quiet_about_tying() -> Iterator[None]:
    """Without peft's warning about adapters on tied layers, which `untie_adapted` takes care of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"(?s).*tie_word_embeddings")
        yield


def untie_adapted(model: nn.Module) -> None:
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
