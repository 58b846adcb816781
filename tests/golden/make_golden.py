"""Make the golden files with PEFT and bitsandbytes: `python tests/golden/make_golden.py`.

Written to this folder: the base model and its input, one adapter folder a case with what PEFT computes with it (output
and gradients, float32 and float64), and the bytes bitsandbytes makes of fixed weights. Tests read them without either
library. Run again only to add a case or to follow a new version of PEFT; the versions go into `versions.json`.
"""

from __future__ import annotations

import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import bitsandbytes.functional as bnb
import peft
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
import zoo

QUANT_CASES = [
    (kind, nested, blocksize) for kind in ("nf4", "fp4") for nested in (False, True) for blocksize in (64, 128)
]


def randomise(model: torch.nn.Module) -> None:
    """Trainable tensors leave their initial values, so that no product with zero hides an error."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def run(model: torch.nn.Module, ids: torch.Tensor, suffix: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = model(ids)
    zoo.loss_of(output).backward()
    found = {f"output{suffix}": output.detach()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f"grad{suffix}:{name}"] = parameter.grad.clone()
    return found


def make_peft(ids: torch.Tensor) -> None:
    for number, (name, options) in enumerate(zoo.CASES.items()):
        torch.manual_seed(1000 + number)
        model = peft.get_peft_model(zoo.base_model(), peft.LoraConfig(**options))
        randomise(model)
        model.eval()
        folder = zoo.HERE / "peft" / name
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        expected = run(model, ids, "")
        expected |= run(model.double(), ids, "64")
        model.float()
        merged = model.merge_and_unload()
        expected["merged"] = merged(ids).detach()
        save_file(expected, folder / "expected.safetensors")


def make_bnb() -> None:
    torch.manual_seed(7)
    tensors = {"weight": torch.randn(24, 70), "x": torch.randn(3, 70)}
    tensors["weight"][3, 5] = 0.0
    tensors["weight"][4] = 0.0  # a whole block of zeros
    for kind, nested, blocksize in QUANT_CASES:
        packed, state = bnb.quantize_4bit(
            tensors["weight"], blocksize=blocksize, compress_statistics=nested, quant_type=kind
        )
        prefix = f"{kind}.{'nested' if nested else 'plain'}.{blocksize}."
        tensors[prefix + "weight"] = packed
        tensors |= {f"{prefix}weight.{key}": value.clone() for key, value in state.as_dict(packed=True).items()}
        tensors[prefix + "dequantized"] = bnb.dequantize_4bit(packed, state)
    layer = Linear4bit(70, 24, bias=True, quant_type="nf4", compress_statistics=True, compute_dtype=torch.float32)
    layer.load_state_dict({"weight": tensors["weight"], "bias": torch.randn(24)})
    layer = layer.to("cpu")
    tensors |= {f"layer.{key}": value.clone() for key, value in layer.state_dict().items()}
    layer.train()
    tensors["layer_output"] = layer(tensors["x"]).detach()
    save_file(tensors, zoo.HERE / "bnb.safetensors")


def main() -> None:
    shutil.rmtree(zoo.HERE / "peft", ignore_errors=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    save_file(zoo.Zoo().state_dict(), zoo.HERE / "base.safetensors")
    ids = torch.randint(0, 20, (2, 6))
    save_file({"ids": ids}, zoo.HERE / "inputs.safetensors")
    make_peft(ids)
    make_bnb()
    versions = {name: version(name) for name in ("torch", "peft", "bitsandbytes", "transformers", "safetensors")}
    (zoo.HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    for path in zoo.HERE.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
