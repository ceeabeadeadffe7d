"""Loading, building, splitting, comparing and saving models."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer, Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from understudy.errors import DataError, RecipeError, VocabularyError
from understudy.hub import unreachable
from understudy.models import (
    apply_lora,
    backbone_hidden,
    build_causal_lm,
    check_model_dir,
    compare_vocabularies,
    disable_dropout,
    enable_gradient_checkpointing,
    lm_head,
    load_causal_lm,
    load_tokenizer,
    probe_head,
    read_back,
    save_hf,
    stop_ids,
    vocabulary_size,
)
from understudy.tasks import Hub

SIZES = {"hidden_size": 32, "num_layers": 2, "num_heads": 4}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"architecture": "llama"},
    "llama-tied": {"architecture": "llama", "tie_word_embeddings": True},
    "qwen3": {"architecture": "qwen3", "num_kv_heads": 2},
    "gemma2": {"architecture": "gemma2", "final_logit_softcapping": 0.05, "sliding_window": 4},
    "gemma3": {"architecture": "gemma3_text", "sliding_window": 4},
    "cohere": {"architecture": "cohere", "logit_scale": 0.25},
    "granite": {"architecture": "granite", "logits_scaling": 8.0},
    "gpt2": {"architecture": "gpt2"},
    "phi": {"architecture": "phi"},
}


def tiny(name: str = "llama", dtype: str = "float32", vocab_size: int = 40, seed: int = 0) -> Any:
    return build_causal_lm(
        SIZES | ARCHITECTURES[name], vocab_size=vocab_size, eos_token_id=1, pad_token_id=0, dtype=dtype, seed=seed
    )


def words(tokens: list[str], eos: str = "</s>", template: str | None = None) -> Any:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=tokens[0]))
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=eos, chat_template=template)


TOKENS = ["<unk>", "</s>", "<|im_end|>", *"abcdefgh"]


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_backbone_and_head_give_the_models_logits(name: str, dtype: str) -> None:
    """peers 1: soft-cap, logit scale and head bias are part of the head."""
    model = tiny(name, dtype)
    if name == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    probe_head(model)
    ids = torch.randint(0, 40, (2, 7))
    positions = torch.arange(7).expand(2, 7)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        head = lm_head(model, temperature=0.5)
        found = head.logits(backbone_hidden(model, ids, positions)) * 0.5
    # float64: order of sums; bfloat16: the model rounds each logit to 8 bits, and soft-caps in bfloat16
    budget = {"float64": 1e-12, "bfloat16": 2e-2}[dtype] * float(expected.abs().max())
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=0, atol=budget)


@pytest.mark.parametrize(
    ("name", "field"), [("gemma2", "final_logit_softcapping"), ("cohere", "logit_scale"), ("granite", "logits_scaling")]
)
def test_probe_refuses_a_head_it_does_not_know(name: str, field: str) -> None:
    """A scale that the configuration does not tell must not pass unnoticed."""
    model = tiny(name, "float64")
    model.logit_scale = getattr(model, "logit_scale", None)

    class Doubled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2.0

    head = model.lm_head
    model.lm_head = Doubled(head.in_features, head.out_features, bias=False, dtype=torch.float64)
    model.lm_head.weight = head.weight
    assert getattr(model.config, field) is not None
    with pytest.raises(RecipeError, match=type(model).__name__):
        probe_head(model)


def test_probe_refuses_a_precision_that_a_model_cannot_run_in() -> None:
    """The experts of a mixture have kernels of their own, which know no float64."""
    model = build_causal_lm(
        SIZES | {"architecture": "mixtral", "num_local_experts": 4}, vocab_size=40, eos_token_id=1, dtype="float64"
    )
    with pytest.raises(RecipeError, match=r"MixtralForCausalLM \(mixtral\) cannot run in torch.float64: .*Double"):
        probe_head(model)


def test_head_is_live_and_cut_to_the_vocabulary() -> None:
    model = tiny("llama-tied", "float64")
    head = lm_head(model, vocab_size=37)
    assert head.weight is model.get_input_embeddings().weight
    assert head.num_tokens == 37
    with pytest.raises(VocabularyError, match=r"41 tokens.*40 rows"):
        lm_head(model, vocab_size=41)


def test_probe_leaves_modes_alone() -> None:
    model = tiny()
    model.train()
    model.model.layers[0].eval()
    probe_head(model)
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training


def test_build_is_seeded_and_leaves_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second, other = tiny(seed=1), tiny(seed=1), tiny(seed=2)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert isinstance(first, LlamaForCausalLM)
    assert first.config.intermediate_size == 128
    assert first.config.head_dim == 8


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"architecture": "lama", **SIZES}, "did you mean 'llama'"),
        ({"architecture": "llama", "hiden_size": 3}, "did you mean 'hidden_size'"),
        ({"architecture": "llama", "hidden_size": 8}, "needs hidden_size, num_layers and num_heads"),
        ({"architecture": "llama", "hidden_size": 9, "num_layers": 1, "num_heads": 2}, "cannot be divided"),
        (SIZES, "needs `architecture`"),
        ({"architecture": "llama", "rope_parameters": {"rope_type": "zzz"}, **SIZES}, "cannot build a model.*'zzz'"),
        (
            {"architecture": "phi3", "rope_parameters": {"rope_type": "yarn", "factor": 2.0}, **SIZES},
            "cannot build a phi3",
        ),
        ({"architecture": "llama", "hidden_act": "nope", **SIZES}, "cannot build a model.*'nope'"),
    ],
)
def test_build_refuses(config: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        build_causal_lm(config, vocab_size=10, eos_token_id=1)


def test_check_model_dir(tmp_path: Path) -> None:
    assert "hub name" in check_model_dir("Qwen/Qwen3-0.6B")
    with pytest.raises(RecipeError, match="no model directory"):
        check_model_dir(str(tmp_path / "absent"))
    with pytest.raises(RecipeError, match=r"no config\.json"):
        check_model_dir(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"no weights.*pytorch_model\.bin is another format"):
        check_model_dir(str(tmp_path))
    with pytest.raises(RecipeError, match="is a file"):
        check_model_dir(str(tmp_path / "config.json"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "x-1.safetensors"}}))
    with pytest.raises(RecipeError, match="lacks 1 of its 1 weight files"):
        check_model_dir(str(tmp_path))
    (tmp_path / "x-1.safetensors").write_bytes(b"")
    assert "are there" in check_model_dir(str(tmp_path))


def test_auto_dtype_is_the_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that computes in it; else float32, which holds the same numbers."""
    save_hf(tiny("llama", "bfloat16"), words(TOKENS), tmp_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert load_causal_lm(str(tmp_path)).dtype == torch.bfloat16
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False})
    assert load_causal_lm(str(tmp_path)).dtype == torch.float32
    assert load_causal_lm(str(tmp_path), dtype="float32").dtype == torch.float32


def test_load_refuses_missing_weights(tmp_path: Path) -> None:
    """A tensor that the file lacks would be random without a word."""
    model = tiny()
    state = {name: value for name, value in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(RecipeError, match="lack 3 tensors of LlamaForCausalLM"):
        load_causal_lm(str(tmp_path))


def _edit(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return edit


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 1}, r"hold 9 tensors .* first 'model\.layers\.1\.input_layernorm"),
        ({"vocab_size": 50}, r"'lm_head\.weight' is \[40, 32\] in the file and \[50, 32\]"),
        ({"rope_parameters": {"rope_type": "magic", "rope_theta": 1e4}}, "KeyError: 'magic'"),
        ({"model_type": "t5"}, "no causal language model of the kind T5"),
        ({"model_type": "llava"}, "no causal language model of the kind Llava"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}},
            "code from its directory, which is never run",
        ),
    ],
    ids=str,
)
def test_load_refuses_weights_and_configurations_that_do_not_fit(
    changes: dict[str, Any], says: str, tmp_path: Path
) -> None:
    tiny().save_pretrained(tmp_path)
    _edit(**changes)(tmp_path)
    with pytest.raises(RecipeError, match=says):
        load_causal_lm(str(tmp_path))


def test_load_refuses_to_leave_biases_out(tmp_path: Path) -> None:
    """A model with biases whose configuration says none would compute something else."""
    sizes = SIZES | {"architecture": "llama", "attention_bias": True}
    build_causal_lm(sizes, vocab_size=40, eos_token_id=1).save_pretrained(tmp_path)
    _edit(attention_bias=False)(tmp_path)
    with pytest.raises(RecipeError, match=r"hold 8 tensors .*k_proj\.bias"):
        load_causal_lm(str(tmp_path))


def test_a_head_beside_a_tied_flag_is_saved_as_it_acts(tmp_path: Path) -> None:
    """transformers keeps a stored head that differs from the embedding, whatever the flag says; an engine may tie the two."""
    tiny().save_pretrained(tmp_path / "start")
    _edit(tie_word_embeddings=True)(tmp_path / "start")
    model = load_causal_lm(str(tmp_path / "start"))
    save_hf(model, words(TOKENS), tmp_path / "saved")
    assert not json.loads((tmp_path / "saved" / "config.json").read_text())["tie_word_embeddings"]
    assert torch.equal(load_causal_lm(str(tmp_path / "saved")).lm_head.weight, tiny().lm_head.weight)


def test_what_does_not_load_as_it_was_saved_is_found(tmp_path: Path) -> None:
    """transformers empties the padding token's row of a Youtu embedding."""
    latent = dict.fromkeys(
        ("q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "head_dim"), 16
    )
    for name, extra in (("llama", {}), ("youtu", latent)):
        sizes = SIZES | extra | {"architecture": name}
        model = build_causal_lm(sizes, vocab_size=40, eos_token_id=1, pad_token_id=0)
        with torch.no_grad():
            model.get_input_embeddings().weight.normal_()
        save_hf(model, words(TOKENS), tmp_path / name)
        assert (read_back(model, tmp_path / name) > 1e-3) == (name == "youtu")


@pytest.mark.parametrize(
    ("architecture", "noise"),
    [
        ("opt", {"layerdrop": 0.5, "dropout": 0.5, "ffn_dim": 64}),
        ("mixtral", {"router_jitter_noise": 0.5}),
        ("persimmon", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_nothing_random_is_left_in_training(architecture: str, noise: dict[str, Any]) -> None:
    model = build_causal_lm(SIZES | {"architecture": architecture} | noise, vocab_size=40, eos_token_id=1)
    disable_dropout(model)
    ids, positions = torch.arange(12)[None], torch.arange(12)[None]
    with torch.no_grad():
        quiet = backbone_hidden(model.eval(), ids, positions)
        assert torch.equal(backbone_hidden(model.train(), ids, positions), quiet)


def test_load_refuses_garbage(tmp_path: Path) -> None:
    save_hf(tiny(), words(TOKENS), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(RecipeError, match="cannot load the model"):
        load_causal_lm(str(tmp_path))


def test_real_weights_load(shared: Path) -> None:
    path = str(shared / "models" / "stories260K")
    model, tokenizer = load_causal_lm(path), load_tokenizer(path)
    probe_head(model)
    assert compare_vocabularies(tokenizer, tokenizer) == {}
    assert vocabulary_size(tokenizer) == 512
    assert stop_ids(tokenizer, model) == (2,)


def test_stop_ids_from_every_source() -> None:
    model = tiny()
    assert stop_ids(words(TOKENS), model) == (1,)
    model.generation_config.eos_token_id = [1, 7]
    assert stop_ids(words(TOKENS), model) == (1, 7)


def test_stop_ids_of_a_chat_template() -> None:
    """peers 12: a turn ends at <|im_end|> though the tokenizer's EOS is another token."""
    tokenizer = words(TOKENS, template="{{ messages }}<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    assert stop_ids(tokenizer, tiny()) == (1, 2)
    tokenizer.chat_template = None
    assert stop_ids(tokenizer, tiny()) == (1,)


def test_no_eos_is_refused() -> None:
    model = tiny()
    model.config.eos_token_id = None
    model.generation_config.eos_token_id = None
    tokenizer = words(TOKENS)
    tokenizer.eos_token = None
    with pytest.raises(VocabularyError, match="no EOS"):
        stop_ids(tokenizer, model)


def test_qwen_stops(shared: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "qwen"))
    model = build_causal_lm(
        SIZES | {"architecture": "qwen3", "tie_word_embeddings": True},
        vocab_size=151_936,
        eos_token_id=tokenizer.eos_token_id,
    )
    assert stop_ids(tokenizer, model) == (151_643, 151_645)
    assert compare_vocabularies(tokenizer, tokenizer) == {}
    assert vocabulary_size(tokenizer) == 151_669


@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gpt2", "mistral", "deepseek_v3", "ernie4_5", "of_nobody"])
@pytest.mark.parametrize(
    "kind", ["TokenizersBackend", "Qwen2TokenizerFast", "LlamaTokenizerFast", "GPT2Tokenizer", None]
)
def test_tokenizers_need_no_class_of_a_model(tmp_path: Path, model_type: str, kind: str | None) -> None:
    """The class of the model is imported for its name alone: without it the tokenizer is that of AutoTokenizer."""
    bytewise = ByteLevelBPETokenizer()
    bytewise.train_from_iterator(["def f(x): return x"] * 9, vocab_size=270, special_tokens=["<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=bytewise._tokenizer, eos_token="<|im_end|>").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": kind}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    ours, theirs = load_tokenizer(str(tmp_path)), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours) is type(theirs)
    text = "Größe 12,345  <|im_end|>\n\tdef f(x): return x"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert str(ours.backend_tokenizer.to_str()) == str(theirs.backend_tokenizer.to_str())


def test_vocabularies_of_equal_size_are_not_equal() -> None:
    """peers 13: equal size is not equal vocabulary."""
    assert compare_vocabularies(words(TOKENS), words(TOKENS)) == {}
    swapped = [*TOKENS[:3], "b", "a", *TOKENS[5:]]
    with pytest.raises(
        VocabularyError, match=r"2 of the student's 11 tokens: 3 is 'a' for the student and 'b' for the teacher"
    ):
        compare_vocabularies(words(TOKENS), words(swapped))
    with pytest.raises(VocabularyError, match="11 is 'z' for the student and absent for the teacher"):
        compare_vocabularies(words([*TOKENS, "z"]), words(TOKENS))
    assert compare_vocabularies(words(TOKENS), words([*TOKENS, "z"])) == {11: "z"}


def test_at_most_five_differences_are_shown() -> None:
    with pytest.raises(VocabularyError) as error:
        compare_vocabularies(words(TOKENS), words([*TOKENS[:3], *"ABCDEFGH"]))
    assert "differ in 8 of the student's 11" in str(error.value)
    assert str(error.value).count("for the teacher") == 5


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_saved_model_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model, tokenizer = tiny(name), words(TOKENS)
    save_hf(model, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.randint(0, 40, (2, 5))
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()
    assert not list(tmp_path.glob("*.bin"))


def with_adapters(name: str = "llama-tied", **options: Any) -> Any:
    pytest.importorskip("peft")
    model = apply_lora(tiny(name), rank=2, alpha=4.0, **options)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_merging_on_the_side(name: str, tmp_path: Path) -> None:
    model = with_adapters(name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    save_hf(model, words(TOKENS), tmp_path, merged=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "adapter_config.json").exists()
    ids = torch.randint(0, 40, (2, 5))
    again = load_causal_lm(str(tmp_path))
    with torch.no_grad():
        adapted, plain = model(input_ids=ids).logits, tiny(name)(input_ids=ids).logits
    # (W + BA) x against W x + B (A x): order of sums in float32
    torch.testing.assert_close(again(input_ids=ids).logits, adapted, rtol=0, atol=2e-6)
    assert float((adapted - plain).abs().max()) > 0.01


def peft_model(**options: Any) -> Any:
    """A tied model with adapters as peft alone makes them, all of them away from their start."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, task_type="CAUSAL_LM", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny("llama-tied"), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"]},
    ],
    ids=str,
)
def test_adapters_on_a_tied_embedding_are_saved_as_they_act(options: dict[str, Any], tmp_path: Path) -> None:
    """Head and embedding differ once one of them is adapted: the configuration of what is saved says so."""
    model = peft_model(**options)
    ids = torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        live = model(input_ids=ids).logits
        save_hf(model, words(TOKENS), tmp_path)
        torch.testing.assert_close(model(input_ids=ids).logits, live, rtol=0, atol=0)
        # plain transformers ties the two where the configuration says so
        merged = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(merged(input_ids=ids).logits, live, rtol=0, atol=5e-6)
        adapted = load_causal_lm(_with_base(tmp_path / "adapter", tmp_path / "base"))
        torch.testing.assert_close(adapted(input_ids=ids).logits, live, rtol=0, atol=5e-6)
    assert merged.config.tie_word_embeddings == ("'target_modules': ['q_proj']}" in str(options))
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == merged.config.tie_word_embeddings


def _with_base(adapter: Path, base: Path) -> str:
    """The directory of an adapter that names the tied model as its base."""
    save_hf(tiny("llama-tied"), words(TOKENS), base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(base)}))
    return str(adapter)


def test_adapters_on_a_tied_embedding_untie_it() -> None:
    model = with_adapters(target_modules=["embed_tokens", "q_proj"])
    probe_head(model)
    assert not model.get_base_model().config.tie_word_embeddings
    assert torch.equal(lm_head(model).weight, tiny("llama-tied").lm_head.weight)
    assert with_adapters().get_base_model().config.tie_word_embeddings


def test_an_adapter_on_an_adapter_names_it(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    save_hf(with_adapters(), words(TOKENS), first, merged=False)
    loaded = load_causal_lm(_with_base(first, tmp_path / "base"))
    model = apply_lora(loaded, rank=2, alpha=4.0)
    save_hf(model, words(TOKENS), second, merged=False)
    ids = torch.randint(0, 40, (2, 5))
    assert torch.equal(load_causal_lm(str(second))(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_adapter_directory(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = with_adapters()
    save_hf(model, words(TOKENS), tmp_path, merged=False)
    again = peft.PeftModel.from_pretrained(tiny("llama-tied"), tmp_path).eval()
    ids = torch.randint(0, 40, (2, 5))
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, rtol=0, atol=1e-6)


def _rename(old: str, new: str | None) -> Any:
    """Renames the first tensor of an adapter whose name holds `old`, or removes it."""

    def edit(folder: Path) -> None:
        state = load_file(folder / "adapter_model.safetensors")
        name = next(name for name in sorted(state) if old in name)
        value = state.pop(name)
        save_file(
            state | ({} if new is None else {name.replace(old, new): value}), folder / "adapter_model.safetensors"
        )

    return edit


def _edit_adapter(**changes: Any) -> Any:
    def edit(folder: Path) -> None:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | changes))

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_rename("layers.1", "layers.9"), "1 tensors are missing and 1 have no place"),
        (_rename("layers.1", None), "1 tensors are missing and 0 have no place"),
        (_edit_adapter(target_modules=["k_proj"]), "4 tensors are missing and 4 have no place"),
        (_edit_adapter(target_modules=["nope"]), "cannot load the adapter.*nope"),
        (_edit_adapter(r=8), "cannot load the adapter"),
        (_edit_adapter(peft_type="XYZ"), "cannot load the adapter"),
        (_edit_adapter(peft_type="IA3"), "do not fit"),
        (_edit_adapter(peft_type="PREFIX_TUNING", num_virtual_tokens=3), "cannot load the adapter"),
        (_edit_adapter(base_model_name_or_path=None), "names None as its base"),
        (_edit_adapter(base_model_name_or_path="."), "names '.' as its base"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "cannot be read"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x"), "cannot load the adapter"),
        (
            lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
            "without adapter_model.safetensors",
        ),
    ],
)
def test_load_refuses_adapters_that_do_not_fit(
    edit: Any, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft alone loads what fits, and leaves out the rest."""
    adapter = tmp_path / "adapter"
    save_hf(with_adapters(target_modules=["q_proj"]), words(TOKENS), adapter, merged=False)
    _with_base(adapter, tmp_path / "base")
    load_causal_lm(str(adapter))
    edit(adapter)
    monkeypatch.chdir(adapter)
    with pytest.raises(RecipeError, match=says):
        load_causal_lm(str(adapter))


@pytest.mark.parametrize("options", [{"use_dora": True}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
def test_variants_of_lora_are_saved_as_they_act_or_refused(options: dict[str, Any], tmp_path: Path) -> None:
    model = peft_model(target_modules=["q_proj"], **options)
    ids = torch.randint(0, 40, (2, 5))
    live = model(input_ids=ids).logits
    if "use_rslora" in options:
        save_hf(model, words(TOKENS), tmp_path)
        torch.testing.assert_close(load_causal_lm(str(tmp_path))(input_ids=ids).logits, live, rtol=0, atol=5e-6)
        return
    with pytest.raises(RecipeError, match=r"another variant of LoRA.*merge_and_unload"):
        save_hf(model, words(TOKENS), tmp_path)
    if "lora_bias" in options:
        with pytest.raises(RecipeError, match="base layer has no bias"):
            load_causal_lm(_with_base(tmp_path / "adapter", tmp_path / "base"))
        return
    # as a directory it is merged by peft
    torch.testing.assert_close(
        load_causal_lm(_with_base(tmp_path / "adapter", tmp_path / "base"))(input_ids=ids).logits,
        live,
        rtol=0,
        atol=5e-6,
    )


def test_lora_goes_through_backbone_and_head() -> None:
    model = with_adapters()
    probe_head(model)
    ids = torch.randint(0, 40, (1, 6))
    hidden = backbone_hidden(model, ids, torch.arange(6)[None])
    torch.testing.assert_close(lm_head(model).logits(hidden), model(input_ids=ids).logits, rtol=0, atol=1e-5)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert not lm_head(model).weight.requires_grad


def test_lora_refusals() -> None:
    with pytest.raises(RecipeError, match="output layer"):
        with_adapters("llama", target_modules=["q_proj", "lm_head"])
    with pytest.raises(RecipeError, match="cannot add LoRA"):
        with_adapters("llama", target_modules=["nothing"])
    with pytest.raises(RecipeError, match=r"\['q_porj'\] match none of its layers; .*q_proj"):
        with_adapters("llama", target_modules=["q_porj", "v_proj"])


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_no_gradient(lora: bool) -> None:
    plain, again = (with_adapters("qwen3"), with_adapters("qwen3")) if lora else (tiny("qwen3"), tiny("qwen3"))
    again.load_state_dict(plain.state_dict())
    enable_gradient_checkpointing(again)
    ids, positions = torch.randint(0, 40, (1, 6)), torch.tensor([[0, 1, 2, 0, 1, 2]])
    grads = []
    for model in (plain, again):
        model.train()
        backbone_hidden(model, ids, positions).square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert grads[0]
    assert len(grads[0]) == len(grads[1])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_a_hub_name_without_the_hub_fails_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The libraries alone try for 23 s, two or three times in a row, and sleep between their tries."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    unreachable.cache_clear()
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    told = r"not in .* cache.*, and http://127.0.0.1:9 cannot be reached \(.*refused"
    with pytest.raises(RecipeError, match=rf"tokenizer from 'org/nothing': .*{told}"):
        load_tokenizer("org/nothing")
    with pytest.raises(RecipeError, match=rf"the model 'org/nothing': .*{told}"):
        load_causal_lm("org/nothing")
    with pytest.raises(DataError, match=rf"data set 'org/nothing': .*{told}"):
        Hub(dataset="org/nothing", prompt_field="text").prompts("train")
    assert sum(slept) < 5
    assert constants.HF_HUB_OFFLINE
    unreachable.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(RecipeError, match="and HF_HUB_OFFLINE is set"):
        load_tokenizer("org/nothing")
    unreachable.cache_clear()
