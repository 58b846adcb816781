"""Make the golden files with PEFT and bitsandbytes: `python tests/golden/make_golden.py [all | CASE ...]`.

Written to this folder: the base models and their input, one adapter folder a case with what PEFT computes with it
(output and gradients, float32 and float64, and the output after merging), and the bytes bitsandbytes makes of fixed
weights. Tests read them without either library. Without an argument only cases that have no folder are made; all makes
everything anew, which follows a new version of PEFT; the versions go into `versions.json`.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

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


def prune(model: Any) -> None:
    """Train AdaLoRA over its whole schedule, so that ranks were taken away when it is saved."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for step in range(model.peft_config["default"].total_step):
        optimizer.zero_grad()
        (zoo.loss_of(model(zoo.inputs())) + 0).backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)


# What is done to the model of a case before it is saved.
PREPARE: dict[str, Callable[[Any], None]] = {"adalora_pruned": prune}


def run(model: torch.nn.Module, case: str, suffix: str) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = zoo.call(model, case)
    found = {f"output{suffix}": output.detach()}
    if not output.requires_grad:
        return found
    zoo.loss_of(output).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            found[f"grad{suffix}:{name}"] = parameter.grad.clone()
    return found


def configuration(options: dict[str, Any]) -> Any:
    options = {key: value for key, value in options.items() if key not in ("base", "call")}
    return peft.get_peft_config({"peft_type": "LORA", **options})


def load(name: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(
        zoo.base_model(dtype, name), zoo.HERE / "peft" / name, is_trainable=True
    ).eval()


def make_case(number: int, name: str) -> None:
    """Save an adapter whose numbers are random, and what PEFT computes with it once it has loaded it."""
    options = zoo.CASES[name]
    # The first cases have their numbers by their place.
    torch.manual_seed(1000 + number if number < 15 else zlib.crc32(name.encode()))
    model = peft.get_peft_model(zoo.base_model(case=name), configuration(options))
    randomise(model)
    PREPARE.get(name, lambda model: None)(model)
    model.eval()
    folder = zoo.HERE / "peft" / name
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    saved = zoo.call(model, name)
    model = load(name)
    expected = run(model, name, "")
    report(name, "loads otherwise", saved, expected["output"])
    report(name, "does nothing", zoo.call(zoo.base_model(case=name), name), expected["output"], differs=True)
    try:
        exact = run(load(name).double(), name, "64")
    except RuntimeError:  # it keeps tensors that `double` does not reach
        exact = run(load(name, torch.float64).double(), name, "64")
    report(name, "float64 differs", exact["output64"], expected["output"])
    expected |= exact
    try:
        merged = load(name).merge_and_unload()
        expected["merged"] = zoo.call(merged, name).detach()
        if report(name, "merged differs", expected["merged"], expected["output"]):
            del expected["merged"]
    except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
        print(f"{name}: not merged: {type(error).__name__} {error}")
    save_file(expected, folder / "expected.safetensors")


def report(name: str, what: str, a: torch.Tensor, b: torch.Tensor, differs: bool = False) -> bool:
    """Say where PEFT is not right with itself: such a case or entry must not be golden."""
    error = float((a - b).detach().abs().max())
    if (error > 1e-4) != differs:
        print(f"{name}: {what} ({error:.2g})")
        return True
    return False


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


def make_bases(everything: bool) -> None:
    for base, kind in zoo.BASES.items():
        if everything or not zoo.base_file(base).exists():
            torch.manual_seed(0 if base == "zoo" else zlib.crc32(base.encode()))
            save_file(kind().state_dict(), zoo.base_file(base))
            if base == "zoo":
                save_file({"ids": torch.randint(0, 20, (2, 6))}, zoo.HERE / "inputs.safetensors")


def main() -> None:
    everything = sys.argv[1:] == ["all"]
    wanted = sys.argv[1:] or [name for name in zoo.CASES if not (zoo.HERE / "peft" / name).exists()]
    if everything:
        wanted = list(zoo.CASES)
        shutil.rmtree(zoo.HERE / "peft", ignore_errors=True)
    torch.set_num_threads(1)
    make_bases(everything)
    if everything:
        make_bnb()
    for number, name in enumerate(zoo.CASES):
        if name in wanted:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                make_case(number, name)
    versions = {name: version(name) for name in ("torch", "peft", "bitsandbytes", "transformers", "safetensors")}
    (zoo.HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    for path in zoo.HERE.rglob("*.safetensors"):
        path.chmod(0o644)


if __name__ == "__main__":
    main()
