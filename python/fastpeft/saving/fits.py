"""Fit of a file's adapter to a model, checked by its header before anything is allocated."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..config.types import PeftType, warn
from ..files.checks import PREFIX, TUNER, list_some, mismatch, report
from ..inject.modules import unwrapped_name
from ..inject.old_experts import joined_state
from ..inject.plan import InjectionPlan
from ..methods.computed import Computed
from ..methods.tied import embeddings_of
from ..prompts.encoder import ENCODER


def check_fits(
    plan: InjectionPlan, tensors: Mapping[str, Tensor], where: object, ignore_mismatched_sizes: bool = False
) -> None:
    """Raise KeyMismatchError unless the tensors of a file are exactly those of an adapter, in names and shapes.

    plan: the adapter, laid out on the meta device, so that a rank of any size costs nothing.
    """
    tensors = joined_state(plan.joined, plan.config, tensors)  # experts that were modules are laid together
    expected = expected_shapes(plan)
    base, trained = _base_shapes(plan)
    shared = {n: t for n, t in plan.shared.items() if isinstance(t, (Tensor, Computed)) and plan.method.repeats_shared}
    every = [layer.site.name for layer in plan.layers]  # a file may repeat for each what they share
    plain = base | {f"{PREFIX}{layer}.{n}": tuple(t.shape) for layer in every for n, t in shared.items()}
    missing = [key for key in expected if key not in tensors]
    excused = {key: reason for key in missing if (reason := plan.method.may_lack(plan.config, key))}
    for reason in dict.fromkeys(excused.values()):
        lost = list_some([key for key in excused if excused[key] == reason])
        warn(f"{where} lacks {lost}, which stay as they start, at random: {reason}. Train it again and save it here.")
    missing = [key for key in missing if key not in excused]
    biases = {_bare(key) for key in tensors}
    missing += [key for key in trained if key not in biases]
    copied = tuple(f"{PREFIX}{copy.site.name}." for copy in plan.saved)  # whose counters are no floats
    unexpected, mismatched, wrong = [], [], []
    for key, info in tensors.items():
        if (shape := expected.get(key, plain.get(_bare(key)))) is None:
            if not plan.method.ignores(plan.config, key) and not is_repeated(key):
                unexpected.append(key)
        elif shape != info.shape:
            mismatched.append(mismatch(key, info.shape, shape))
        elif key in expected and not info.dtype.is_floating_point and plan.config.peft_type == PeftType.LORA:
            wrong += [] if key.startswith(copied) else [f"{key} {info.dtype}"]
    report(where, missing, unexpected, [] if ignore_mismatched_sizes else mismatched, wrong)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], where: object) -> None:
    """Raise KeyMismatchError unless the tensors of a file are floating-point ones of exactly these names and shapes."""
    mismatched = [mismatch(k, t.shape, shapes[k]) for k, t in tensors.items() if shapes.get(k, t.shape) != t.shape]
    wrong = [f"{k} {t.dtype}" for k, t in tensors.items() if not t.dtype.is_floating_point]
    missing, unexpected = [k for k in shapes if k not in tensors], [k for k in tensors if k not in shapes]
    report(where, missing, unexpected, mismatched, wrong)


def expected_shapes(plan: InjectionPlan) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a file of an adapter holds, by its key in the file."""
    saved = [(f"{TUNER}{n}", value) for n, value in plan.shared.items() if getattr(value, "persistent", True)]
    saved += [(f"{PREFIX}{copy.site.name}", copy.module) for copy in plan.saved]
    tensors = {f"{key}{suffix}": tensor for key, value in saved for suffix, tensor in _entries(value)}
    if plan.encoder is not None:
        tensors |= {f"{TUNER}{ENCODER}.{key}": tensor for key, tensor in plan.encoder.state_dict().items()}
    for layer in plan.layers:
        for name, value in layer.state.items():
            for suffix, tensor in _entries(value) if layer.method.saves(layer.state, name) else ():
                if (key := layer.method.file_key(name + suffix)) is not None:
                    tensors[f"{PREFIX}{layer.site.name}.{key}"] = tensor
    return {key: tuple(tensor.shape) for key, tensor in plan.method.pack(plan.config, tensors).items()}


def _base_shapes(plan: InjectionPlan) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Tensors of the base model that a file may hold, biases and embeddings, and the biases that it must hold, which
    the adapter trains. Keys are without `base_layer`."""
    mode = getattr(plan.config, "bias", "none") or "none"
    named = plan.model.named_parameters() if mode != "none" else ()
    tensors: dict[str, Tensor] = {n: p for n, p in named if n.endswith("bias")}
    tensors |= embedding_tensors(plan.model)
    found = {plan.method.base_key(PREFIX + _bare(name)): tuple(tensor.shape) for name, tensor in tensors.items()}
    if mode == "all":
        other = tuple(f"{PREFIX}{site.site.name}." for site in plan.saved)
        trained = [key for key in found if key.endswith(".bias") and not key.startswith(other)]
        return found, [key for key in trained if not re.search(r"\.lora_\w+\.|modules_to_save", key)]
    own = [layer for layer in plan.layers if layer.method is plan.method and mode != "none"]
    return found, [f"{PREFIX}{layer.site.name}.bias" for layer in own if layer.layer.info.has_bias]


def is_repeated(key: str) -> bool:
    """True for the bias of a module in `modules_to_save` that PEFT writes once more with bias="all"."""
    return key.endswith(".modules_to_save.bias")


def _bare(key: str) -> str:
    """A base tensor's key as it was before adapters were put in."""
    return key.replace(".base_layer.", ".").replace(".original_module.", ".")


def _entries(value: Any) -> list[tuple[str, Tensor]]:
    if isinstance(value, nn.Module):
        return [(f".{key}", tensor) for key, tensor in value.state_dict().items()]
    if isinstance(value, Computed):
        value = value.tensor(empty=True)
    return [("", value)] if isinstance(value, Tensor) else []


def embedding_tensors(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The base weights of a transformers model's input and output embeddings, by their keys in memory.

    state: as for `iter_adapter_tensors`."""
    layers = [embeddings_of(model, side) for side in ("input", "output")]
    bases = [getattr(layer, "base_layer", layer) for layer in layers if layer is not None]
    held = {unwrapped_name(n): m for n, m in model.named_modules() if any(m is base for base in bases)}
    if state is not None:
        return {key: tensor for key, tensor in state.items() if key.rpartition(".")[0] in held}
    return {f"{name}.{key}": p for name, module in held.items() for key, p in module.named_parameters(recurse=False)}
