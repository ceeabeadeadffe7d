"""Try every causal language model of the installed transformers at a tiny size, and write docs/architectures.md.

    python scripts/architectures.py                 all (about ten minutes on two cores)
    python scripts/architectures.py llama mamba     these only; prints the table and writes nothing

Each is built from its configuration with random weights and compared with plain transformers: logits from hidden states and
head, samples side by side as the trainer and the teachers lay them out, their gradient, log-probabilities of what the `hf`
engine samples, and weights that are saved and loaded.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import resource
import sys
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from understudy.engines import HFEngine
from understudy.errors import UnderstudyError
from understudy.models import backbone_hidden, lm_head, load_causal_lm, probe_head, row_style
from understudy.packing import lay_out
from understudy.types import Author, Prompt, Request, Sample, Sampling

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"
TIME_LIMIT_S = 60.0
MEMORY_BYTES = 8 * 1024**3
"""Address space of one process: a configuration whose parts are not made small would take all of the machine's."""
VOCAB, EOS = 48, 1
TOLERANCE = 2e-4
"""Nats between two orders of float32 sums, through four layers of random weights; a leak between samples is far above."""
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "width"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "attention_head_dim", "v_head_dim", "kv_channels"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 16),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "n_inner", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"), 256),
    **dict.fromkeys(("state_size", "mamba_d_state", "d_state"), 8),
    **dict.fromkeys(("linear_num_key_heads", "mamba_num_heads", "mamba_n_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("linear_num_value_heads",), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 2),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size"), 8),
    **dict.fromkeys(("lru_width", "conv_dim"), 64),
    "sliding_window": 8,
    "attention_chunk_size": 8,
    "time_step_rank": 4,
    "pad_token_id": 0,
    "eos_token_id": EOS,
    "bos_token_id": 2,
}
"""Small values for the keys of configurations, under all the names that they have."""
LATENT_ATTENTION = (
    *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa"),
    *("longcat_flash", "minicpm3", "youtu"),
)
LAYERS = ["mamba", "hybrid", "mamba", "hybrid"]
OWN: Mapping[str, Mapping[str, Any]] = {
    **{name: {"num_key_value_heads": 4} for name in LATENT_ATTENTION},
    **{name: {"rotary_dim": 8} for name in ("codegen", "gptj")},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["mamba", "attention"] * 2},
    "gemma3n_text": {"num_kv_shared_layers": 2, "layer_types": ["full_attention", "sliding_attention"] * 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
    "bamba": {"mamba_n_heads": 8, "attn_layer_indices": [1, 3]},
    "falcon_h1": {"mamba_d_ssm": 64},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "zamba2": {"layers_block_type": LAYERS, "n_mamba_heads": 8},
}
"""Keys of single architectures beside or in place of `SIZES`."""
PROMPTS = ([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [20, 21], [30, 31, 32, 33, 34])


@dataclass(frozen=True)
class Result:
    """Result of one architecture."""

    name: str
    state: str
    """works, refused, not built or WRONG."""
    note: str = ""


def build(name: str) -> Any:
    """A tiny model with random weights, far enough from uniform that a leak shows."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    if any(part.startswith(("vision", "audio", "vq")) for part in getattr(kind, "sub_configs", {})):
        raise UnderstudyError("a model of text and other inputs")
    # what the configuration computes by itself cannot be given
    given = default.to_dict().keys() | kind.attribute_map.keys()
    config = kind(**{key: value for key, value in SIZES.items() if key in given} | dict(OWN.get(name, {})))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 1.5 / weight.shape[-1] ** 0.5)
    return model


def tokenizer() -> Any:
    """A word for each id."""
    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({str(index): index for index in range(VOCAB)}, unk_token="0")  # noqa: S106 (id 0)
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=str(EOS))


def logp_alone(model: Any, ids: Tensor) -> Tensor:
    """Log-probabilities of each token but the first, by the plain model. [L] -> [L - 1]."""
    logits = model(input_ids=ids[None], use_cache=False).logits[0].float()
    return logits.log_softmax(-1)[:-1].gather(-1, ids[1:, None]).squeeze(-1)


def examine(name: str) -> Result:
    """Raises what the model raises."""
    try:
        model = build(name)
    except Exception as error:
        return Result(name, "not built", first_line(error))
    try:
        return compare(name, model)
    except UnderstudyError as error:
        return Result(name, "refused", first_line(error))


def compare(name: str, model: Any) -> Result:
    """Raises UnderstudyError for a model that is refused."""
    probe_head(model)
    style = row_style(model)
    samples = []
    # the first prompt has two responses
    for number, prompt in enumerate([*PROMPTS, PROMPTS[0]]):
        response = [(7 * number + 3 * place) % (VOCAB - 4) + 3 for place in range(9 - 2 * number)]
        ids = torch.tensor([*prompt, *response])
        author = torch.tensor([Author.PROMPT] * len(prompt) + [Author.STUDENT] * len(response), dtype=torch.uint8)
        samples.append(Sample(Prompt(str(number)), 0, ids, author, len(prompt), "stop", ""))
    gradients, values = [], []
    for route in ("side by side", "alone"):
        model.zero_grad()
        if route == "alone":
            found = [logp_alone(model, sample.token_ids)[sample.prompt_length - 1 :] for sample in samples]
        else:
            layout = lay_out(samples, style)
            states = backbone_hidden(model, layout.input_ids, layout.position_ids, segments=layout.segments)
            hidden = states.flatten(0, 1)[layout.predicts]
            logp = lm_head(model).logits(hidden).float().log_softmax(-1)
            target = torch.cat([sample.response_ids for sample in samples])
            found = [logp.gather(-1, target[:, None]).squeeze(-1)]
        total = torch.cat(found)
        total.sum().backward()
        values.append(total.detach())
        grads = [weight.grad.flatten() for weight in model.parameters() if weight.grad is not None]
        gradients.append(torch.cat(grads))
    packed = float((values[0] - values[1]).abs().max())
    slope = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())

    engine = HFEngine(model, tokenizer(), seed=0, stop_ids=(EOS,), vocab_size=VOCAB)
    requests = [Request(Prompt(str(n)), index, torch.tensor(ids)) for n, ids in enumerate(PROMPTS) for index in (0, 1)]
    sampled = 0.0
    with torch.no_grad():
        for sample in engine.generate(requests, Sampling(max_new_tokens=12), step=0):
            assert sample.rollout_logprob is not None
            expected = logp_alone(model, sample.token_ids)[sample.prompt_length - 1 :]
            sampled = max(sampled, float((sample.rollout_logprob[sample.prompt_length :] - expected).abs().max()))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            again = load_causal_lm(folder, dtype="float32")
            ids = samples[0].token_ids
            saved = float((logp_alone(again, ids) - logp_alone(model, ids)).abs().max())
    if sampled > TOLERANCE:
        raise UnderstudyError(f"sampled log-probabilities are off by {sampled:.1g} nats, which the doctor finds")
    if not saved <= TOLERANCE:
        return Result(
            name, "fails", f"log-probabilities are off by {saved:.1g} nats once transformers saved and loaded it"
        )
    errors = {"side by side": packed, "gradient": slope}
    # written so that NaN is wrong too
    wrong = [f"{key} {value:.1e}" for key, value in errors.items() if not value <= TOLERANCE]
    if wrong:
        return Result(name, "WRONG", ", ".join(wrong))
    notes = {"shared": [], "alone": ["a row for each sample"]}.get(style, ["rows with a mask"])
    rare = {"equal": ["prompts of one length sampled together"], "none": ["sampled without a cache"]}
    notes += [] if engine.style is None else rare.get(engine.style[0], [])
    return Result(name, "works", ", ".join(notes))


def first_line(error: BaseException) -> str:
    """A message in one line, short enough for a table."""
    text = " ".join((str(error).strip() or type(error).__name__).split()).replace("|", "/")
    return text if len(text) <= 160 else text[:157] + "..."


def _child(name: str, pipe: Any) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    try:
        result = examine(name)
    except Exception as error:
        result = Result(name, "fails", f"{type(error).__name__}: {first_line(error)}")
    pipe.send(result)


def run(name: str) -> Result:
    """Examines an architecture in a process of its own, under a time limit."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(name, theirs))
    process.start()
    theirs.close()
    try:
        if ours.poll(TIME_LIMIT_S):
            return ours.recv()  # type: ignore[no-any-return]
        return Result(name, "fails", f"took more than {TIME_LIMIT_S:g} s")
    except EOFError:
        process.join()
        return Result(name, "fails", f"its process ended with status {process.exitcode}")
    finally:
        process.kill()
        process.join()


def page(results: Sequence[Result], summary: str) -> str:
    """The page of the docs."""
    lines = [f"| `{one.name}` | {one.state} | {one.note} |" for one in results]
    return f"""# Architectures

Every causal language model of transformers {transformers.__version__}, built at a tiny size with random weights and
compared with plain transformers by `python scripts/architectures.py`, which writes this page: {summary}.

- **works**: logits are head times hidden states; samples side by side, their gradient, sampled log-probabilities, and
  weights that are saved and loaded agree with each sample alone, without a cache, to {TOLERANCE:.0e} nats in float32.
- **rows with a mask**: attention by segments does not suit the scores (soft-caps, sinks, chunks): a mask keeps samples apart.
- **a row for each sample**: the layers do not keep sequences of one row apart (states, ALiBi), so each has its own.
- **prompts of one length sampled together**: padding would enter the state of a recurrent layer.
- **sampled without a cache**: the model has a cache of its own kind, so everything is read again for each token: right,
  and slow.
- **refused**: a run with it ends before its first step, with the sentence that stands beside it.
- **fails**, **not built**: nothing is known of it; the script's small configuration does not suit it, or it needs more
  than text.

LongRoPE (Phi-3 and its kind) has other frequencies in sequences longer than `original_max_position_embeddings`.
Sequences on both sides are read apart, and a response that passes the limit while it is written is read again there; the
log-probabilities of its tokens up to the limit are those of the short frequencies that sampled them, while the trainer
reads the whole with the long ones. Dynamic RoPE changes past `max_position_embeddings`, where every sequence is refused.

| architecture | | |
|---|---|---|
{chr(10).join(lines)}
"""


def main() -> int:
    """Returns 1 where a number is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ARCHITECTURE")
    chosen = parser.parse_args().names
    names = chosen or sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = []
    with ThreadPoolExecutor(2) as threads:
        for number, result in enumerate(threads.map(run, names), start=1):
            print(f"{number:3}/{len(names)}  {result.name:28} {result.state:10} {result.note}", flush=True)
            results.append(result)
    counts = {state: sum(one.state == state for one in results) for state in sorted({one.state for one in results})}
    summary = ", ".join(f"{count} {state}" for state, count in counts.items())
    print(summary)
    if not chosen:
        PAGE.write_text(page(results, summary))
    return int("WRONG" in counts)


if __name__ == "__main__":
    sys.exit(main())
