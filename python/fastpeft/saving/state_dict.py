"""Adapters as state dicts.

The key rule: in memory `base_model.model.<module>.lora_A.<adapter>.weight`, in a file the adapter's name is left out.
Setting a state dict changes the model only after every tensor was found to fit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from ..files.checks import PREFIX, TUNER, KeyMismatchError, list_some, mismatch, read_json, report
from ..files.hub import known_file
from ..files.offloaded import keep, keeper, kept
from ..files.whole import copy_into, gathered, is_sharded, sharded_as, state_of_units, whole_shape
from ..inject.modules import WRAPPED, adapter_modules, iter_adapter_tensors
from ..inject.old_experts import JoinedExperts, find_joined, joined_state
from ..layer.layer import AdapterLayer
from ..layer.module_layer import ModuleLayer
from ..layer.shared_tensors import held_containers, reuse
from ..methods.method import Method
from ..methods.registry import method_of
from ..prompts.encoder import ENCODER
from ..prompts.encoders import PromptEncoders
from .fits import embedding_tensors, is_repeated


class IncompatibleKeys(NamedTuple):
    """Keys that one side lacks: the state dict (missing ones, as in memory) or the adapter (unexpected ones)."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default",
    unwrap_compiled: bool = False, save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:  # fmt: skip
    """One adapter's tensors by their file keys: its own, trained biases, modules_to_save, embeddings where asked.

    state_dict: take the values from here (keys as in memory), for models whose parameters are sharded elsewhere. Of a
    model that FSDP or ZeRO-3 shards the tensors are whole, on every process; all of them must call this. FSDP1: `model`
    is what FullyShardedDataParallel returned.
    save_embedding_layers: "auto" saves the embeddings that are targeted, else all if the vocabulary was resized.
    """
    model = getattr(model, "_orig_mod", model) if unwrap_compiled else model
    config = _configs(model)[adapter_name]
    given = state_of_units(model) if state_dict is None else state_dict
    pairs: dict[str, tuple[str, Tensor]] = {}
    for memory, file, tensor in iter_adapter_tensors(model, adapter_name, given):
        pairs.setdefault(memory, (file, tensor))
    plain = bias_tensors(model, config, given)
    if _saves_embeddings(model, config, save_embedding_layers):
        tensors = embedding_tensors(model, given)
        if not hasattr(model, "get_input_embeddings"):
            what = "Could not identify embedding layer(s) because the model is not a 🤗 transformers model."
            warnings.warn(f"{what} None is saved.", stacklevel=2)
        plain |= {key: tensor for key, tensor in tensors.items() if ".base_layer." in key} or tensors
    for memory, tensor in plain.items():
        pairs.setdefault(memory, (memory, tensor))
    if given is not None:
        _check_all_there(model, adapter_name, pairs)
    return method_of(config).pack(config, gathered({f: kept(*_place(model, m), t) for m, (f, t) in pairs.items()}))


def check_writable(model: nn.Module) -> None:
    """Raise ValueError for adapters of which this process has parts that only Megatron's own checkpoints join."""
    for name, layer in adapter_modules(model):
        base: Any = layer.base if isinstance(layer, AdapterLayer) else None
        if base is not None and base.parallel == "megatron" and base.group.size() > 1:
            raise ValueError(
                f"{base.group.size()} processes share {name!r}, a {type(base.module).__name__}, and its adapter: save "
                "each one's part (`get_peft_model_state_dict`) or let Megatron's checkpoints join them."
            )


def _check_all_there(model: nn.Module, adapter: str, found: Iterable[str]) -> None:
    """Raise KeyMismatchError if a state dict, of which these keys are the adapter's, lacks something of it."""
    there = {".".join(parts[:n]) for parts in (key.split(".") for key in found) for n in range(len(parts) + 1)}
    lacking = []
    for name, module in adapter_modules(model):
        containers = dict(module.containers())
        for held in containers.keys() - module.shared.keys():
            if any(p.requires_grad for p in containers[held].parameters_of(adapter)):
                lacking += [key for key in [".".join(filter(None, (name, held, adapter)))] if key not in there]
    if lacking:
        raise KeyMismatchError(f"the state dict lacks {list_some(sorted(lacking))} of adapter {adapter!r}")


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False, low_cpu_mem_usage: bool = False,
) -> IncompatibleKeys:  # fmt: skip
    """Put a state dict with file keys into the adapter `adapter_name`, which must be in the model already.

    Sizes are checked first, so that an error leaves the model as it was. Keys that the adapter lacks and that the
    state dict lacks are returned. low_cpu_mem_usage: take the tensors over instead of copying them (needed where the
    adapter was made on the meta device); they move to the device of their layer. Raises KeyMismatchError.
    """
    state = unpacked(find_joined(model), _configs(model)[adapter_name], peft_model_state_dict)
    return fill(model, adapter_name, state, ignore_mismatched_sizes, low_cpu_mem_usage)


def fill(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor], ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False, where: object = None,
) -> IncompatibleKeys:  # fmt: skip
    """`set_peft_model_state_dict` for a state dict that was `unpacked`.

    where: a file that the state dict comes from. It must then hold all that the adapter has and nothing else, with
    values that the methods accept, and takes the adapter's dtypes; else KeyMismatchError, with the model as it was.
    """
    with ExitStack() as undo:
        result = _fill(model, adapter_name, state, ignore_mismatched_sizes, low_cpu_mem_usage, where, undo)
        undo.pop_all()
    return result


def _fill(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor], ignore_mismatched_sizes: bool,
    low_cpu_mem_usage: bool, where: object, undo: ExitStack,
) -> IncompatibleKeys:  # fmt: skip
    layers = {n: m for n, m in adapter_modules(model) if isinstance(m, AdapterLayer) and adapter_name in m.methods}
    whole = state_of_units(model)
    if not any(is_sharded(p) for p in model.parameters()):  # else what there is keeps its size
        _make_room(layers, adapter_name, state, undo)
    following = sorted(n for n, m in layers.items() if type(m.methods[adapter_name]).filled is not Method.filled)
    if whole is not None and following:
        raise ValueError(
            f"What follows from the tensors of adapter {adapter_name!r} in {list_some(following)} needs base weights "
            "that FullyShardedDataParallel has sharded: load the adapter before the model is wrapped."
        )
    prompts = [m for _, m in adapter_modules(model) if isinstance(m, PromptEncoders) and adapter_name in m]
    for module in prompts if f"{TUNER}{ENCODER}.embedding.weight" in state else ():
        undo.callback(module.make_room(adapter_name))
    own = {file: (memory, tensor) for memory, file, tensor in iter_adapter_tensors(model, adapter_name, whole)}
    # A file has what its configuration says; a state dict may bring biases that another adapter trained.
    biases = _configs(model)[adapter_name] if where is not None else SimpleNamespace(bias="all")
    plain = bias_tensors(model, biases, whole) | embedding_tensors(model, whole)
    places = {key: (key, tensor) for key, tensor in plain.items()} | own
    found: dict[str, tuple[Tensor, Tensor]] = {}
    unexpected, mismatched, skipped = [], [], set()
    for key, value in state.items():
        names = (key, PREFIX + key, key.removeprefix(PREFIX), TUNER + key, key.removeprefix(TUNER))
        memory, target = next((places[name] for name in names if name in places), ("", None))
        if target is None:
            unexpected.append(key)
            continue
        if value.shape != whole_shape(target):
            mismatched.append(mismatch(key, value.shape, whole_shape(target)))
            skipped.add(id(target))
            continue
        if where is not None and value.is_floating_point():
            value = value.to(target.dtype)  # it may be taken over rather than copied
        found[memory] = (target, value)
    there = {id(target) for target, _ in found.values()}  # what layers share may be in a file once or often
    missing = [memory for memory, target in own.values() if id(target) not in there]
    if where is not None:
        config = _configs(model)[adapter_name]
        lacking = [key for key, (_, target) in own.items() if id(target) not in there | skipped]
        lacking = [key for key in lacking if not method_of(config).may_lack(config, key)]
        report(where, lacking, unexpected, [] if ignore_mismatched_sizes else mismatched)
        _check_values(layers, adapter_name, found, where)
    elif not ignore_mismatched_sizes:
        report("the state dict", [], [], mismatched)
    if mismatched:
        warnings.warn(f"ignored because of another size: {list_some(mismatched)}", stacklevel=4)
    new: dict[int, nn.Parameter] = {}  # by the old one's id: what layers share stays one
    if whole is not None:  # FSDP1's units put their shards of it in their places
        model.load_state_dict({memory: value for memory, (_, value) in found.items()}, strict=False)
    for memory, (target, value) in found.items() if whole is None else ():
        if is_sharded(target) and not target.is_meta:
            copy_into(target, value)
        elif target.is_meta and keeper(_place(model, memory)[0]) is not None:
            keep(*_place(model, memory), value.to(target.dtype))
        elif low_cpu_mem_usage or target.is_meta:
            _assign(model, memory, sharded_as(target, value), new)
        elif not isinstance(target, nn.Parameter):  # adapters may share a buffer
            _assign(model, memory, value.to(target.dtype, copy=True), new)
        else:
            copy_into(target, value)
    for layer in layers.values():
        layer.methods[adapter_name].filled(layer, adapter_name)
    reuse(held_containers(layers.values()), adapter_name)
    return IncompatibleKeys(missing, unexpected)


def _check_values(
    layers: Mapping[str, AdapterLayer], adapter: str, found: Mapping[str, tuple[Tensor, Tensor]], where: object
) -> None:
    for name, layer in layers.items():
        keys = {f"{name}.{memory}": file for memory, file, _ in layer.adapter_state(adapter)}
        values = {file: found[memory][1] for memory, file in keys.items() if memory in found}
        if len(values) < len(keys):  # one of another size was passed over
            continue
        try:
            layer.methods[adapter].check_tensors(layer.info, values)
        except ValueError as error:
            raise KeyMismatchError(f"{where}, {name}: {error}") from None


def _make_room(
    layers: Mapping[str, AdapterLayer], adapter: str, state: Mapping[str, Tensor], undo: ExitStack
) -> None:
    """Let an adapter take the sizes of a state dict, where its method has such a thing (AdaLoRA's ranks)."""
    for name, layer in layers.items():
        method = layer.methods[adapter]
        if type(method).make_room is not Method.make_room:
            names = (f"{name}.", f"{PREFIX}{name}.", f"{name}.".removeprefix(PREFIX))
            files = [file for _, file, _ in layer.adapter_state(adapter)]
            found = {f: state[n + f] for f in files for n in names if n + f in state}
            if take_back := method.make_room(layer, adapter, found):
                undo.callback(take_back)


def unpacked(joined: Sequence[JoinedExperts], config: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors by their keys in a file, from what the file holds. joined: the model's experts."""
    method = method_of(config)
    if computed := [key for key in tensors if method.ignores(config, key)]:
        warnings.warn(
            f"The configuration says that {list_some(computed)} are computed, so those of the file are passed over "
            "(save_projection=True would take them).",
            stacklevel=3,
        )
    left = {key: value for key, value in tensors.items() if key not in computed and not is_repeated(key)}
    return method.unpack(config, joined_state(joined, config, left))


def _configs(model: nn.Module) -> Mapping[str, Any]:
    configs: Mapping[str, Any] | None = getattr(model, "peft_config", None)
    if configs is None:
        raise ValueError(f"{type(model).__name__} carries no adapter (it has no peft_config)")
    return configs


def _parents(model: nn.Module, memory: str) -> tuple[list[Any], str]:
    """The modules on the way to a tensor, the last of which has it, and its name there."""
    *path, name = memory.split(".")
    parents: list[Any] = [model]
    for part in path:
        while unwrapped := [name for name in WRAPPED if name in parents[-1]._modules]:
            parents.append(parents[-1]._modules[unwrapped[0]])
        if isinstance(parents[-1], ModuleLayer) and part not in parents[-1]._modules:
            parents.append(parents[-1].base_layer)
        parents.append(parents[-1]._modules[part])
    return parents, name


def _place(model: nn.Module, memory: str) -> tuple[nn.Module, str]:
    parents, name = _parents(model, memory)
    return parents[-1], name


def _assign(model: nn.Module, memory: str, value: Tensor, new: dict[int, nn.Parameter]) -> None:
    """Make `value` the tensor at a dotted path; looked up in the modules' tables, since `train` may be an adapter."""
    parents, name = _parents(model, memory)
    module = parents[-1]
    near = (t for m in reversed(parents) for t in (*m.parameters(), *m.buffers()) if not t.is_meta)
    value = value.to(next((t.device for t in near), value.device))
    old = module._parameters.get(name)
    if name in module._buffers:
        module._buffers[name] = value
    elif old is not None and not old.is_meta and old.dtype == value.dtype:
        old.data = value  # the same parameter, which another layer may hold too
    elif old is not None:  # else it follows a tensor that is given, too
        module._parameters[name] = new.setdefault(id(old), nn.Parameter(value, requires_grad=old.requires_grad))


def bias_tensors(model: nn.Module, config: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The base model's biases that this adapter trains, which PEFT saves under their keys in memory.

    state: as for `iter_adapter_tensors`."""
    bias = getattr(config, "bias", "none")
    if bias in (None, "none", False):
        return {}
    named = [*(model.named_parameters() if state is None else state.items())]
    if bias != "all":  # "<method>_only": the biases of the layers that the adapter sits on
        return {name: p for name, p in named if name.endswith(".base_layer.bias")}
    own = {memory for name in _configs(model) for memory, _, _ in iter_adapter_tensors(model, name, state)}
    return {n: p for n, p in named if f".{n}".endswith(".bias") and n not in own}


def _saves_embeddings(model: nn.Module, config: Any, choice: bool | Literal["auto"]) -> bool:
    if choice != "auto":
        return bool(choice)
    if not hasattr(config, "target_modules"):
        return False
    trains_rows = any(getattr(config, name, None) for name in ("trainable_token_indices", "token_indices"))
    if not trains_rows and any(".base_layer." in name for name in embedding_tensors(model)):
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=3
        )
        return True
    base = getattr(config, "base_model_name_or_path", None)
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    file = known_file(base, "config.json", getattr(config, "revision", None)) if base and size is not None else None
    if file is None or read_json(file).get("vocab_size", size) == size:
        return False
    warnings.warn(
        "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.",
        stacklevel=3,
    )
    return True
