"""A random Llama of real widths, with LoRA on its seven projections, by four ways to compute it. Nothing is downloaded.

Weights of `ours` and of bitsandbytes' are the same codes, quantised by plain torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from peft_kernels import quantize_4bit, use_backend

from .. import subjects
from .device import Device
from .rows import RANK

WAYS = ("ours, accelerated", "ours", "PEFT + bnb", "PEFT + dense")
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "rope_theta": 5e5, "max_position_embeddings": 8192,
}  # fmt: skip
LAYERS_8B = 32
TINY: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPS = ("lora_linear", "lora_linear_stacked", "gated", "rms_norm")  # of ours, that such a model may call


def weights(device: Device) -> int:
    """The weights of a layer's seven projections."""
    shape = sizes(device)
    width, inner = int(shape["hidden_size"]), int(shape["intermediate_size"])
    cached = width * int(shape["num_key_value_heads"]) // int(shape["num_attention_heads"])
    return width * (2 * width + 2 * cached + 3 * inner)


def sizes(device: Device) -> dict[str, Any]:
    return TINY if device.small else LLAMA_8B


def refused(device: Device, way: str, direction: str, m: int) -> str | None:
    """Why a way is not measured: a package that is missing, or a kernel that the tests found wrong."""
    if way.startswith("PEFT"):
        needed = ("peft", "bitsandbytes") if way.endswith("bnb") else ("peft",)
        absent = [name for name in needed if find_spec(name) is None]
        return f"{absent[0]} is not installed" if absent else None
    for op in OPS:
        for backend in device.backends:
            if (why := device.wrong(op, backend, direction, "bf16", m)) is not None:
                return f"{op} by {backend} is wrong: {why}"
    return None


def base(device: Device, layers: int, vocabulary: int) -> nn.Module:
    """The dense model in bfloat16; with few words where only its layers are wanted."""
    import transformers

    config = transformers.LlamaConfig(num_hidden_layers=layers, vocab_size=vocabulary, attn_implementation="sdpa",
                                      **sizes(device))  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device.kind):
        model = transformers.LlamaForCausalLM(config)
    return model.to(torch.bfloat16)  # type: ignore[no-any-return]


def adapted(device: Device, way: str, layers: int, vocabulary: int = 256, loss: bool = False) -> Any:
    """The model of a way, its adapters' B not zero. loss: of the accelerated one, by chunks as well. Raises what the
    packages raise, ValueError where nothing can be accelerated."""
    model = base(device, layers, vocabulary)
    package: Any
    if way.startswith("ours"):
        import fastpeft as package

        with use_backend("reference"):
            package.quantize_model(model, "nf4", double_quant=True, skip=["lm_head"])
    else:
        import peft as package

        if way.endswith("bnb"):
            to_bnb(model)
    config = package.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, task_type="CAUSAL_LM")
    made = package.get_peft_model(model, config)
    g = torch.Generator(device.kind).manual_seed(1)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn(p.shape, generator=g, device=device.kind) * 0.01)
    if way == "ours, accelerated":
        package.accelerate(made, layers=True, loss=loss, huge_pages=False)
    return made


def to_bnb(model: nn.Module) -> None:
    """Replace the linear layers but the head by bitsandbytes'."""
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and name != "lm_head":
            with use_backend("reference"):
                q = quantize_4bit(module.weight.detach(), "nf4", nested=True)
            model.set_submodule(name, subjects.bnb_layer(q, torch.bfloat16))
