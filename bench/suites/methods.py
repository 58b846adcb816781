"""Every method at PEFT's defaults on one frozen linear layer: what it costs over the layer alone, and beside PEFT;
mixtures of adapters (mixtures.py), and prompts before a small model (prompts.py).

Linear 2048, 512 tokens, float32, dropout as the defaults have it, training. FLOPs of forward and backward (gradients of
x and of the adapter) over the frozen layer's, bytes kept for the backward over those of x, and times.
"""

from __future__ import annotations

import argparse
import copy
import functools
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..flops import flops_of, saved_bytes
from ..measure import Candidate
from ..results import Claim, Row
from . import mixtures, prompts

WIDTH, TOKENS = 2048, 512
# What PEFT's defaults need on this layer to run at all, or to be what is meant.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 100}, "VBLORA": {"vector_length": 256}, "IA3": {"feedforward_modules": []},
    "FROD": {"progressbar": False},
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {"LORA": {}, "LORA dropout": {"lora_dropout": 0.05}, "DORA": {"use_dora": True},
            "DORA dropout": {"use_dora": True, "lora_dropout": 0.05}, "KASA": {"kasa_config": {}},
            "MICA": {"init_lora_weights": "mica"},
            "BDLORA": {"use_bdlora": {"target_modules_bd_a": ["lin"], "nblocks": 2}}, "QALORA": {"use_qalora": True},
            "VELORA": {"velora_config": {}}, "MONTECLORA": {"monteclora_config": {"buffer_size": 8}}}  # fmt: skip
# The bounds on FLOPs; methods that are not named need more by their math, which their files derive.
CHEAP = {"LORA", "DORA", "KASA", "MICA", "BDLORA", "QALORA", "VELORA", "MONTECLORA", "ADALORA", "BOFT", "HRA", "OFT",
         "LOHA", "LOKR", "FOURIERFT", "WAVEFT", "C3A", "MISS", "PSOFT", "IA3", "ROAD", "SHIRA"}  # fmt: skip
FASTER = {"BOFT": 5.0, "HRA": 5.0, "OSF": 5.0, "LOHA": 2.0, "LOKR": 2.0, "FOURIERFT": 2.0, "WAVEFT": 2.0}
# Not on a linear layer alone, or not called with x alone: some of them are in mixtures.py.
ELSEWHERE = {"ADAPTION_PROMPT", "LN_TUNING", "POLY", "SHADOW", "TRAINABLE_TOKENS", "XLORA"}


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.lin = layer
        self.config = {"model_type": "custom"}

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x)  # type: ignore[no-any-return]


def layer() -> Holder:
    torch.manual_seed(0)
    return Holder(nn.Linear(WIDTH, WIDTH))


def adapted(package: Any, peft_type: str, arguments: dict[str, Any]) -> nn.Module:
    """A model of one frozen layer with one adapter, by `package` (fastpeft or peft)."""
    config = package.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](target_modules=["lin"], **copy.deepcopy(arguments))
    model: nn.Module = package.get_peft_model(layer(), config)
    return model


def trained(model: nn.Module) -> nn.Module:
    """The model in training, away from its start."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.02)
    return model.train()


def step(model: nn.Module, x: Tensor, dy: Tensor, **given: Any) -> Callable[[], object]:
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return lambda: torch.autograd.grad(model(x, **given), wanted, dy, allow_unused=True)


def costs(model: nn.Module, x: Tensor, dy: Tensor, **given: Any) -> tuple[int, int]:
    # the counter's hooks do not take autograd.grad
    flops = flops_of(lambda: torch.autograd.backward(model(x, **given), dy))
    with saved_bytes(model, x) as kept:
        model(x, **given)
    return flops, kept[0]


def row(name: str, make: mixtures.Make, x: Tensor, dy: Tensor, **given: Any) -> Row:
    """The row of a method. given: arguments of a forward beside x."""
    import fastpeft
    import peft

    frozen, kind, notes, models = layer().requires_grad_(False), name.split()[0], list[str](), dict[str, nn.Module]()
    base_flops, _ = costs(frozen, x, dy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models["ours"] = trained(make(fastpeft))
        try:
            models["PEFT"] = trained(make(peft))
        except Exception as error:
            notes.append(f"{name}: PEFT does not run it: {error}")
    extra: dict[str, dict[str, Any]] = {"FLOPs/frozen": {}, "kept/x": {}}
    for who, model in models.items():
        flops, kept = costs(model, x, dy, **given)
        extra["FLOPs/frozen"][who] = f"{flops / base_flops:.3f}"
        extra["kept/x"][who] = f"{kept / (x.numel() * 4):.2f}"
    # with dropout DoRA needs W x and W drop(x): two products with the base
    if kind in CHEAP and name != "DORA dropout" and float(extra["FLOPs/frozen"]["ours"]) > 1.10:
        notes.append(f"{name}: {extra['FLOPs/frozen']['ours']}x the FLOPs of the frozen layer: MISSED 1.10x")
    if float(extra["kept/x"]["ours"]) > 1.5:
        notes.append(f"{name}: keeps {extra['kept/x']['ours']}x the bytes of x: above 1.5x")
    candidates = [Candidate("frozen", [step(frozen, x, dy)])]
    candidates += [Candidate(who, [step(model, x, dy, **given)]) for who, model in models.items()]
    claims = [Claim("PEFT", ["ours"], ["PEFT"], FASTER.get(kind, 1.0)), Claim("the layer", ["ours"], ["frozen"])]
    return Row(name, {"suite": "methods", "method": name, "width": WIDTH, "tokens": TOKENS}, {}, claims,
               extra=extra, notes=notes, candidates=candidates)  # fmt: skip


def rows(args: argparse.Namespace) -> Iterator[Row]:
    import fastpeft

    x, dy = torch.randn(TOKENS, WIDTH, requires_grad=True), torch.randn(TOKENS, WIDTH)
    types = [t.value for t in fastpeft.PEFT_TYPE_TO_CONFIG_MAPPING]

    def chosen(kind: str) -> bool:
        return args.methods is None or kind.lower() in {m.lower() for m in args.methods}

    names = {**VARIANTS, **{name: ARGUMENTS.get(name, {}) for name in types if name not in prompts.ARGUMENTS}}
    for name, arguments in names.items():
        kind = name.split()[0]
        if kind in ELSEWHERE or not chosen(kind):
            continue
        peft_type = "LORA" if name in VARIANTS else kind
        yield row(name, functools.partial(adapted, peft_type=peft_type, arguments=arguments), x, dy)
    rows_of_x = [t.detach().view(mixtures.TASKS, -1, WIDTH) for t in (x, dy)]  # Poly has a task for each
    with tempfile.TemporaryDirectory() as folder:
        for name, make, given in mixtures.on_a_layer(layer, chosen, Path(folder)):
            yield row(name, make, rows_of_x[0].requires_grad_(), rows_of_x[1], **given)
    yield from mixtures.rows(chosen)
    yield from prompts.rows([name for name in types if name in prompts.ARGUMENTS and chosen(name)])
