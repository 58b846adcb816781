"""Does a file's adapter fit this model? Answered from configuration and header, before anything is allocated."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .checks import PREFIX, TUNER, KeyMismatchError, list_some
from .safetensors_files import TensorInfo

if TYPE_CHECKING:
    from .inject import InjectionPlan


def check_fits(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], model: nn.Module, where: object = "the adapter",
    ignore_mismatched_sizes: bool = False,
) -> None:
    """Raise unless the tensors of a file are exactly those that `config` asks for on `model`, in names and shapes.

    model: the base model, with or without other adapters in it; it is not changed. The adapter is laid out on the meta
    device, so that a rank of any size costs nothing. Raises KeyMismatchError that lists what is missing, unexpected or
    of another size, and whatever a configuration that cannot be used raises.
    """
    plan = _plan(config, model)
    tensors = _stacked(plan, tensors)
    expected = expected_shapes(plan)
    plain = _plain_shapes(config, model) | _repeated_shapes(plan)
    missing = [key for key in expected if key not in tensors]
    biases = {key.replace(".base_layer.", ".") for key in tensors}
    missing += [key for key in _trained_biases(config, plan) if key not in biases]
    unexpected, mismatched, wrong = [], [], []
    for key, info in tensors.items():
        shape = expected.get(key, plain.get(key.replace(".base_layer.", ".")))
        if shape is None:
            if not plan.method.ignores(plan.config, key):
                unexpected.append(key)
        elif shape != info.shape:
            mismatched.append(_mismatch(key, info, shape))
        elif key in expected and not info.dtype.is_floating_point and _is_lora(config):
            wrong.append(f"{key} {info.dtype}")
    _raise_if_any(missing, unexpected, [] if ignore_mismatched_sizes else mismatched, wrong, where)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo], where: object) -> None:
    """Raise KeyMismatchError unless the tensors of a file are floating-point ones of exactly these names and shapes."""
    mismatched = [
        _mismatch(k, info, shapes[k]) for k, info in tensors.items() if k in shapes and info.shape != shapes[k]
    ]
    wrong = [f"{k} {info.dtype}" for k, info in tensors.items() if not info.dtype.is_floating_point]
    _raise_if_any([k for k in shapes if k not in tensors], [k for k in tensors if k not in shapes], mismatched, wrong,
                  where)  # fmt: skip


def _mismatch(key: str, info: TensorInfo, shape: tuple[int, ...]) -> str:
    return f"{key} {list(info.shape)}, expected {list(shape)}"


def _raise_if_any(
    missing: list[str], unexpected: list[str], mismatched: list[str], wrong: list[str], where: object
) -> None:
    found = {
        "missing": missing,
        "unexpected": unexpected,
        "size mismatch for": mismatched,
        "not floating-point": wrong,
    }
    problems = [f"{label}: {list_some(keys)}" for label, keys in found.items() if keys]
    if problems:
        raise KeyMismatchError(f"{where} does not fit the model. " + ". ".join(problems))


def _stacked(plan: InjectionPlan, tensors: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """What the tensors of a file are once experts that were modules are laid together."""
    from .experts import stacked_state

    metas = {key: torch.empty(info.shape, dtype=info.dtype, device="meta") for key, info in tensors.items()}
    state = stacked_state(plan.model, plan.config, metas)
    return {
        key: tensors[key] if metas.get(key) is t else TensorInfo(key, t.dtype, tuple(t.shape), 0, t.nbytes)
        for key, t in state.items()
    }


def _is_lora(config: Mapping[str, Any]) -> bool:
    return str(config.get("peft_type")).upper() == "LORA"


def _plan(config: Mapping[str, Any], model: nn.Module) -> InjectionPlan:
    from .config import PeftConfig
    from .inject import plan_injection

    with warnings.catch_warnings():
        # The warnings come again, for the user, when the adapter is put in.
        warnings.simplefilter("ignore")
        settings = PeftConfig.from_dict({k: v for k, v in config.items() if k != "runtime_config"})
        return plan_injection(model, settings, "default", low_cpu_mem_usage=True, loading=True, checking=True)


def expected_shapes(plan: InjectionPlan) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that a file of an adapter holds, by its key in the file."""
    tensors: dict[str, Tensor] = {}
    for name, value in plan.shared.items():
        for suffix, tensor in _entries(value) if getattr(value, "persistent", True) else ():
            tensors[f"{TUNER}{name}{suffix}"] = tensor
    for layer in plan.layers:
        for name in (*layer.method.tensors, *layer.method.others):
            for suffix, tensor in _entries(layer.state.get(name)) if layer.method.saves(layer.state, name) else ():
                key = layer.method.file_key(name + suffix)
                if key is not None:
                    tensors[f"{PREFIX}{layer.site.name}.{key}"] = tensor
    for saved in plan.saved:
        for key, tensor in saved.module.state_dict().items():
            tensors[f"{PREFIX}{saved.site.name}.{key}"] = tensor
    return {key: tuple(tensor.shape) for key, tensor in plan.method.pack(plan.config, tensors).items()}


def _repeated_shapes(plan: InjectionPlan) -> dict[str, tuple[int, ...]]:
    """What a file may hold once more for every layer."""
    names = [n for n, t in plan.shared.items() if isinstance(t, Tensor)] if plan.method.repeats_shared else []
    return {f"{PREFIX}{layer.site.name}.{n}": tuple(plan.shared[n].shape) for layer in plan.layers for n in names}


def _trained_biases(config: Mapping[str, Any], plan: InjectionPlan) -> list[str]:
    """The keys of the base model's biases that the adapter trains, without `base_layer`."""
    mode = config.get("bias", "none")
    if mode == "all":
        saved = tuple(f"{site.site.name}." for site in plan.saved)
        names = (n.replace(".base_layer.", ".") for n, _ in plan.model.named_parameters() if n.endswith(".bias"))
        return [
            PREFIX + n for n in names if not n.startswith(saved) and not re.search(r"\.lora_\w+\.|modules_to_save", n)
        ]
    if mode in (None, "none", False):
        return []
    own = [layer for layer in plan.layers if layer.method is plan.method]
    return [f"{PREFIX}{layer.site.name}.bias" for layer in own if layer.layer.info.has_bias]


def _entries(value: Any) -> list[tuple[str, Tensor]]:
    if isinstance(value, nn.Module):
        return [(f".{key}", tensor) for key, tensor in value.state_dict().items()]
    return [("", value)] if isinstance(value, Tensor) else []


def _plain_shapes(config: Mapping[str, Any], model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Tensors of the base model that a file may bring along: biases that were trained, and embeddings."""
    found: dict[str, tuple[int, ...]] = {}
    bias = config.get("bias", "none")
    for name, parameter in model.named_parameters():
        if bias not in (None, "none", False) and name.endswith("bias"):
            found[PREFIX + name.replace(".base_layer.", ".")] = tuple(parameter.shape)
    for name, tensor in embedding_tensors(model).items():
        found[PREFIX + name.replace(".base_layer.", ".")] = tuple(tensor.shape)
    return found


def embedding_tensors(model: nn.Module) -> dict[str, torch.nn.Parameter]:
    """The base weights of a transformers model's input and output embeddings, by their keys in memory."""
    if not hasattr(model, "get_input_embeddings"):
        return {}
    layers = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        getter: Any = getattr(model, name, None)
        try:
            layers.append(getter() if getter is not None else None)
        except (AttributeError, NotImplementedError):  # a model without such a layer
            continue
    bases = [getattr(layer, "base_layer", layer) for layer in layers if isinstance(layer, nn.Module)]
    return {
        f"{name}.{key}": tensor
        for name, module in model.named_modules()
        if any(module is base for base in bases)
        for key, tensor in module.named_parameters(recurse=False)
    }


def make_room(model: nn.Module, adapter_name: str, tensors: Mapping[str, Tensor]) -> None:
    """Let an adapter take the sizes of a file, where its method has such a thing (AdaLoRA's ranks)."""
    from .layer import AdapterLayer
    from .method import Method
    from .sites import adapter_modules

    for name, layer in adapter_modules(model):
        if not isinstance(layer, AdapterLayer) or adapter_name not in layer.methods:
            continue
        method = layer.methods[adapter_name]
        if type(method).make_room is Method.make_room:
            continue
        names = (f"{name}.", f"{PREFIX}{name}.", f"{name}.".removeprefix(PREFIX))
        found = {key: tensors[n + key] for _, key, _ in layer.adapter_state(adapter_name) for n in names
                 if n + key in tensors}  # fmt: skip
        method.make_room(layer, adapter_name, found)


def unpacked(model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by their keys in a file, from what the file holds."""
    from .experts import stacked_state
    from .method import method_of

    method = method_of(config)
    computed = [key for key in tensors if method.ignores(config, key)]
    if computed:
        warnings.warn(
            f"The configuration says that {list_some(computed)} are computed, so those of the file are passed over "
            "(save_projection=True would take them).",
            stacklevel=3,
        )
    kept = {key: value for key, value in tensors.items() if key not in computed}
    return method.unpack(config, stacked_state(model, config, kept))
