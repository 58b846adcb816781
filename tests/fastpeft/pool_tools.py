"""Tools of the tests of AdapterPool: small adapters as files, and a model's answers with one of them alone."""

from __future__ import annotations

import copy
import functools
import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from fastpeft import AdapterPool, NF4Linear, PeftModel, quantize_model
from fastpeft.config.base import CONFIG_NAME
from fastpeft.saving.folder import SAFETENSORS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from peft_kernels.testing import assert_no_worse

tools = runpy.run_path(str(Path(__file__).with_name("model_tools.py")))
llama, X = tools["llama"], tools["X"]

Fill = Callable[[tuple[int, ...]], Tensor]


@functools.cache
def shapes() -> dict[str, tuple[int, int]]:
    """The linear layers of `llama()`."""
    return {n: m.weight.shape for n, m in llama().named_modules() if isinstance(m, nn.Linear)}


def random_fill(seed: int) -> Fill:
    g = torch.Generator().manual_seed(seed)
    return lambda shape: torch.randn(shape, generator=g) * 0.2


def write(
    folder: Path,
    fill: Fill | int,
    targets: Sequence[str] = ("q_proj", "v_proj"),
    r: int = 4,
    alpha: float = 6,
    dtype: torch.dtype = torch.float32,
    layers: Sequence[int] = (0, 1),
    ranks: dict[str, int] | None = None,
    **config: Any,
) -> Path:
    """A LoRA adapter for `llama()`, as PEFT would save it. fill: what makes a tensor, or a seed; ranks: by the end of a
    module's name, where not r."""
    fill = random_fill(fill) if isinstance(fill, int) else fill
    tensors = {}
    for name, (n, k) in shapes().items():
        if name.endswith(tuple(targets)) and int(name.split(".")[2]) in layers:
            rank = next((v for end, v in (ranks or {}).items() if name.endswith(end)), r)
            tensors[f"base_model.model.{name}.lora_A.weight"] = fill((rank, k)).to(dtype)
            tensors[f"base_model.model.{name}.lora_B.weight"] = fill((n, rank)).to(dtype)
    content = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "target_modules": list(targets), **config}
    if list(layers) != [0, 1]:
        content["layers_to_transform"] = list(layers)
    if ranks:
        content["rank_pattern"] = ranks
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / SAFETENSORS_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(content))
    return folder


def dense(dtype: torch.dtype = torch.float32) -> nn.Module:
    return llama().to(dtype)


DENSE = ("lm_head", "k_proj", "up_proj")  # in the 4-bit models: nobody targets them, and bitsandbytes' own forward
# on a CPU wants other sizes than these


def nf4() -> nn.Module:
    return quantize_model(llama(), skip=DENSE)


def bnb() -> nn.Module:
    """`nf4()` with bitsandbytes' layers, whose bytes are the same."""
    import bitsandbytes

    model = llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and not name.endswith(DENSE):
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
            )
            layer.load_state_dict({"weight": module.weight.detach()})
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.to("cpu"))
    return model.eval()


def widened(model: nn.Module) -> nn.Module:
    """The same model in float64, 4-bit weights decoded."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        own = isinstance(module, NF4Linear)
        if own or type(module).__name__ == "Linear4bit":
            layer = module if own else NF4Linear.from_bnb(module)
            plain = nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight.data = layer.dequantize(torch.float64)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    return model.double()


def logits(model: Any, ids: Tensor = X) -> Tensor:
    with torch.no_grad():
        answer: Tensor = model(ids).logits
    return answer


def assert_as_alone(rows: Tensor, make: Callable[[], nn.Module], folder: Path | None, ids: Tensor) -> None:
    """The rows are what `make()` with one adapter, as PeftModel loads it, answers (None: without one)."""
    alone, exact = make(), widened(make())
    if folder is not None:
        alone, exact = (PeftModel.from_pretrained(m, folder, autocast_adapter_dtype=False) for m in (alone, exact))
    true = logits(exact.double(), ids)
    # What rounding does in one layer goes through all that follow.
    assert_no_worse(rows, logits(alone, ids), true, 8 * (true.abs() + true.abs().mean()))


def content(pool: AdapterPool, slot: int) -> dict[str, tuple[Tensor, Tensor, float]]:
    """(A, B transposed, scaling) in a slot, of the layers where it acts."""
    found = {}
    for name, stack in pool._buffers.stacks.items():
        start, rank = int(stack.starts[slot]), int(stack.ranks[slot])
        if rank:
            found[name] = (stack.a[start : start + rank], stack.b[start : start + rank], float(stack.scaling[slot]))
    return found
