"""GGUF files of other architectures as they lie: the model that was written, what transformers decodes, adapters."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastpeft import (
    LoraConfig,
    accelerate,
    adapter_modules,
    export_gguf_lora,
    get_peft_model,
    gguf_config,
    load_gguf_model,
    save_merged_gguf,
)  # fmt: skip
from fastpeft.apps.training.models import load_tokenizer, resolve
from fastpeft.files.checks import AdapterFileError
from fastpeft.files.gguf_file import read_gguf
from fastpeft.weights.gguf_config import ARCHITECTURES
from fastpeft.weights.gguf_names import GGUFNames
from fastpeft.weights.nf4_experts import packed_parameters
from fastpeft.weights.nf4_store import NF4Store
from forms import matrix

from peft_kernels import dequantize_4bit, use_backend
from peft_kernels.testing import assert_no_worse, assert_same_bits

gguf = pytest.importorskip("gguf")
transformers = pytest.importorskip("transformers")
from gguf_families import FAMILIES, tiny_model, write_family  # noqa: E402  # imports gguf

IDS = torch.arange(24).reshape(2, 12)
SHORT = ("gemma3", "qwen3moe")
SOME_TYPES = {"attn_": "Q5_0", "ffn_down": "Q8_0", "": "Q4_1"}
# Sizes that transformers takes for those of every file, as it does not read their keys.
AS_READ: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 128}, "gpt2": {"n_positions": 1024},
    "gemma2": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256},
    "qwen2moe": {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632},
    "qwen3moe": {"moe_intermediate_size": 768, "head_dim": 128},
}  # fmt: skip


def rounded(model: Any, quant: str) -> Any:
    """The model with the weights that its file in one type holds: blocks lie in rows, so their order is no matter."""
    made, kind = copy.deepcopy(model), gguf.GGMLQuantizationType[quant]
    for key, value in made.named_parameters():
        if value.dim() == 1 or 1 in value.shape:
            continue
        turned = type(made.get_submodule(key.rpartition(".")[0])).__name__ == "Conv1D"
        w = value.detach().T if turned else value.detach()
        back = gguf.quants.dequantize(gguf.quants.quantize(w.contiguous().numpy(), kind), kind)
        value.data.copy_(torch.from_numpy(back).T if turned else torch.from_numpy(back))
    return made


def assert_computes(model: Any, right: Any) -> None:
    """No worse than `right`, transformers' own in float32, against it in float64; also once it is accelerated."""
    exactly = copy.deepcopy(right).double()
    exactly.config._experts_implementation = "eager"  # torch's grouped product has no float64
    with torch.no_grad():
        eager, exact = right(IDS).logits, exactly(IDS, output_hidden_states=True)
        terms = exact.hidden_states[-1].abs() @ exactly.get_output_embeddings().weight.abs().T
        # the worst of them, as each has the rounding of several layers behind it
        worst = (exact.logits + (eager.double() - exact.logits).abs().max()).float()
        assert_no_worse(model(IDS).logits, worst, exact.logits, terms)
        accelerate(model)
        assert_no_worse(model(IDS).logits, worst, exact.logits, terms)


@pytest.mark.parametrize("name", matrix(FAMILIES, SHORT))
def test_it_is_the_model_that_was_written(tmp_path: Path, name: str) -> None:
    """Sizes, too, that transformers does not read."""
    made = tiny_model(name)
    model = load_gguf_model(write_family(name, made, tmp_path / "x.gguf", types="Q8_0"))
    assert name == "mistral" or type(model) is type(made)  # llama.cpp has no other name for it than llama
    assert_computes(model, rounded(made, "Q8_0"))


@pytest.mark.parametrize("name", matrix([n for n in FAMILIES if n != "mixtral"], ("qwen2",)))
def test_it_is_what_transformers_decodes(tmp_path: Path, name: str) -> None:
    path = write_family(name, tiny_model(name, **AS_READ.get(name, {})), tmp_path / "x.gguf", types=SOME_TYPES)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        str(tmp_path), gguf_file=path.name, dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    ).eval()  # fmt: skip
    model = load_gguf_model(path)
    assert type(model) is type(theirs)
    assert_computes(model, theirs)
    held = packed_parameters(model)
    with use_backend("reference"):
        for key, value in theirs.named_parameters(remove_duplicate=False):
            module: Any = held.get(key) or model.get_submodule(key.rpartition(".")[0])
            blocks = isinstance(module, NF4Store) and not key.endswith("bias")
            own = dequantize_4bit(module.quant_weight(), torch.float32) if blocks else model.get_parameter(key)
            turned = blocks and type(theirs.get_submodule(key.rpartition(".")[0])).__name__ == "Conv1D"
            assert_same_bits(own.detach(), value.detach().T.contiguous() if turned else value.detach())


@pytest.mark.parametrize("name", matrix(FAMILIES, ("gpt2",)))
def test_a_lora_adds_to_the_files_tensors_what_it_adds_to_the_models(tmp_path: Path, name: str) -> None:
    """Names and rows by the converter of these tests, from a file and from a folder."""
    made = tiny_model(name)
    base = write_family(name, made, tmp_path / "x.gguf")
    linear = ["q_proj", "k_proj", "v_proj", "o_proj"] if hasattr(made.config, "num_experts_per_tok") else "all-linear"
    config = LoraConfig(r=4, lora_alpha=8, target_modules=linear, init_lora_weights=False)
    model = get_peft_model(load_gguf_model(base), config)
    made.config.save_pretrained(tmp_path / "folder")
    said = export_gguf_lora(model, base, tmp_path / "lora.gguf")
    export_gguf_lora(model, tmp_path / "folder", tmp_path / "other.gguf")
    assert (tmp_path / "lora.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()
    read = {t.name: torch.from_numpy(t.data.copy()) for t in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}
    assert said["tensors"] == list(read)
    names, layers = GGUFNames.of(base), dict(adapter_modules(model))
    assert len(read) == 2 * len(layers) > 0
    for path, layer in layers.items():
        key = names.name(path.removeprefix("base_model.model."))
        assert key is not None
        [a, b] = (getattr(layer, part)["default"].weight.detach() for part in ("lora_A", "lora_B"))
        exact, size = (layer.scaling["default"] * torch.matmul(*pair) for pair in ((b.double(), a.double()),
                                                                                   (b.abs(), a.abs())))  # fmt: skip
        turned = type(made.get_submodule(path.removeprefix("base_model.model."))).__name__ == "Conv1D"

        def in_file(w: torch.Tensor) -> torch.Tensor:
            own = (w.T if turned else w).numpy()  # noqa: B023
            [found] = FAMILIES[name].convert(key, own, made.config).values()  # noqa: B023
            return torch.from_numpy(np.ascontiguousarray(found))

        found = read[f"{key}.lora_b"] @ read[f"{key}.lora_a"] * (said["alpha"] / said["r"])
        eager = layer.scaling["default"] * (b @ a)
        assert_no_worse(found, in_file(eager), in_file(exact), in_file(size))


@pytest.mark.parametrize("name", matrix(FAMILIES, ("qwen3moe",)))
def test_a_merged_model_as_a_file(tmp_path: Path, name: str) -> None:
    """A tensor at a time: those with an adapter are the merged ones, rounded once; the model stays as it was."""
    made = tiny_model(name)
    base, out = write_family(name, made, tmp_path / "x.gguf"), tmp_path / "merged.gguf"
    ends = ("q_proj", "k_proj", "qkv_proj", "c_attn", "query_key_value")
    targets = [path for path, _ in made.named_modules() if path.endswith(ends)]
    model = get_peft_model(load_gguf_model(base), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    before = model(IDS).logits
    said = save_merged_gguf(model, base, out, "F16")
    assert_same_bits(model(IDS).logits, before)
    old, new = read_gguf(base), read_gguf(out)
    assert (said["changed"], said["tensors"]) == (len(targets), len(old.tensors))
    merged = load_gguf_model(out)
    for path, layer in adapter_modules(model):
        own = merged.get_submodule(path.removeprefix("base_model.model.")).weight.detach()
        want = layer.merged_apart()[0].half().float()
        turned = type(made.get_submodule(path.removeprefix("base_model.model."))).__name__ == "Conv1D"
        assert_same_bits(own.T.contiguous() if turned else own, want)
    changed = {name for name in old.tensors if new.tensors[name].quant != old.tensors[name].quant}
    assert len(changed) == len(targets)
    for one in old.tensors.keys() - changed:
        assert_same_bits(new.bytes_of(one), old.bytes_of(one))


@pytest.mark.parametrize("name", matrix(FAMILIES, ("llama", "gemma3")))
def test_its_tokenizer_is_the_one_of_transformers(tmp_path: Path, name: str) -> None:
    path = write_family(name, tiny_model(name), tmp_path / "x.gguf")
    own: Any = load_tokenizer(resolve(str(path), "gguf"))
    theirs: Any = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=path.name)
    assert type(own) is type(theirs)
    assert own.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()
    assert own.special_tokens_map == theirs.special_tokens_map
    assert own("a b, c") == theirs("a b, c")


def test_experts_are_blocks_and_go_in_and_out(tmp_path: Path) -> None:
    """Those of down_proj where the file has them."""
    path = write_family("qwen3moe", tiny_model("qwen3moe"), tmp_path / "x.gguf", types=SOME_TYPES)
    model = load_gguf_model(path)
    held = packed_parameters(model)
    assert {key.rpartition(".")[2]: store.quant_type for key, store in held.items()} == {
        "gate_up_proj": "q4_1", "down_proj": "q8_0",
    }  # fmt: skip
    whole = {key: store.weight.untyped_storage().nbytes() == path.stat().st_size for key, store in held.items()}
    assert all(mapped == key.endswith("down_proj") for key, mapped in whole.items())
    other = load_gguf_model(write_family("qwen3moe", tiny_model("qwen3moe", seed=1), tmp_path / "y.gguf",
                                         types=SOME_TYPES))  # fmt: skip
    other.load_state_dict(model.state_dict())
    assert_same_bits(other(IDS).logits, model(IDS).logits)
    empty = load_gguf_model(path, device="meta")
    assert {n: t.shape for n, t in empty.state_dict().items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_adapters_of_experts_train_and_merge(tmp_path: Path) -> None:
    path = write_family("mixtral", tiny_model("mixtral"), tmp_path / "x.gguf")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=parameters, init_lora_weights=False)
    model = get_peft_model(load_gguf_model(path), config)
    accelerate(model)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert grads
    assert all(g is not None and g.isfinite().all() for g in grads)
    want = model(IDS).logits
    model.merge_adapter()
    assert not torch.equal(model(IDS).logits, model.base_model.model(IDS).logits * 0)
    model.unmerge_adapter()
    for key, t in model.state_dict().items():
        assert_same_bits(t, before[key])
    assert_same_bits(model(IDS).logits, want)


# --- settings that transformers' table of keys has no line for -------------------------------------------------------

THETA = {"rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}
LONG, NEAR = [1.0 + i / 2 for i in range(8)], [1.0 + i / 16 for i in range(8)]
SCALED = "rope.scaling."
# family -> (settings of the model, keys of the file beside, or tensors)
SETTINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "linear": ("llama", {"rope_parameters": {**THETA, "rope_type": "linear", "factor": 4.0}},
               {f"{SCALED}type": "linear", f"{SCALED}factor": 4.0}),
    "yarn": ("qwen2", {"rope_parameters": {**THETA, "rope_type": "yarn", **YARN}},
             {f"{SCALED}type": "yarn", f"{SCALED}factor": 4.0, f"{SCALED}original_context_length": 64}),
    "windows": ("gemma3", {"rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {**THETA, "rope_type": "default"},
    }}, {f"{SCALED}type": "linear", f"{SCALED}factor": 8.0}),
    "long": ("phi3", {"original_max_position_embeddings": 128, "rope_parameters": {
        **THETA, "rope_type": "longrope", "long_factor": LONG, "short_factor": NEAR, "attention_factor": 1.25,
        "original_max_position_embeddings": 128,
    }}, {f"{SCALED}attn_factor": 1.25, f"{SCALED}original_context_length": 128}),
    "some columns": ("phi3", {"rope_parameters": {**THETA, "rope_type": "default", "partial_rotary_factor": 0.75}}, {}),
    "base": ("starcoder2", {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}, {}),
    "caps": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5},
             {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", matrix(SETTINGS, ("windows", "long")))
def test_settings_that_transformers_does_not_read(tmp_path: Path, name: str) -> None:
    family, settings, values = SETTINGS[name]
    made = tiny_model(family, **settings)
    factors = {"long": LONG, "short": NEAR} if name == "long" else {}
    more = {f"rope_factors_{k}.weight": (np.array(v, np.float32), "F32") for k, v in factors.items()}
    path = write_family(family, made, tmp_path / "x.gguf", values=values, change=lambda t: t.update(more))
    assert_computes(load_gguf_model(path), rounded(made, "Q8_0"))


def test_the_frequencies_of_llama_3(tmp_path: Path) -> None:
    """The file says what they are divided by."""
    made, plain = tiny_model("llama", rope_parameters={**THETA, **LLAMA3}), tiny_model("llama")
    factors = (plain.model.rotary_emb.inv_freq / made.model.rotary_emb.inv_freq).numpy()
    path = write_family("llama", made, tmp_path / "x.gguf",
                        change=lambda t: t.update({"rope_freqs.weight": (factors, "F32")}))  # fmt: skip
    assert_computes(load_gguf_model(path), rounded(made, "Q8_0"))
    path = write_family("llama", made, tmp_path / "y.gguf",
                        change=lambda t: t.update({"rope_freqs.weight": (factors[1:], "F32")}))  # fmt: skip
    with pytest.raises(AdapterFileError, match=r"rope_freqs\.weight has 7 values, and 8 frequencies"):
        load_gguf_model(path)


UP, GATE = "blk.1.ffn_up_exps.weight", "blk.1.ffn_gate_exps.weight"
REFUSED: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "scaling": ("llama", {f"{SCALED}type": "su"}, None, "positions are scaled by 'su'"),
    "columns": ("llama", {"attention.key_length": 32}, None, "turns 16 columns of 32 of a head"),
    "two types": ("qwen3moe", {}, lambda t: t.update({UP: (t[UP][0], "Q5_0")}), f"{UP} are in Q5_0 and Q8_0"),
    "lacks": ("qwen3moe", {}, lambda t: t.pop(GATE), f"it has no tensor {GATE}"),
    "size": ("qwen3moe", {}, lambda t: t.update({UP: (t[UP][0][:, 1:], "Q8_0")}), f"size mismatch for {UP}"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(tmp_path: Path, name: str) -> None:
    family, values, change, message = REFUSED[name]
    path = write_family(family, tiny_model(family), tmp_path / "x.gguf", values=values, change=change)
    with pytest.raises(AdapterFileError, match=message):
        load_gguf_model(path)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    for load in (gguf_config, load_gguf_model):
        with pytest.raises(AdapterFileError, match=f"architecture is 'mamba', and those .* {', '.join(ARCHITECTURES)}"):
            load(tmp_path / "x.gguf")
    assert {FAMILIES[name].arch for name in FAMILIES} == set(ARCHITECTURES)
    assert {FAMILIES[name].model_type for name in FAMILIES} == {f for fs in ARCHITECTURES.values() for f in fs}
