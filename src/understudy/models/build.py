"""Models from scratch: random weights of an architecture that transformers knows."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

from understudy.errors import RecipeError, first_line, nearest
from understudy.lazy import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ALIASES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}
"""Short names of keys in `student.build`."""


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
        made = default_config(str(config["architecture"]), **settings)
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
    default = default_config(str(config["architecture"]))
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


def default_config(architecture: str, **settings: Any) -> Any:
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
