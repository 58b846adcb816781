"""Functions and values that PEFT's users call and nothing here does: tables from the registry, PEFT's
`helpers`, `utils`, `tuners_utils` and `import_utils`."""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata, util
from typing import Any

import torch
from torch import Tensor, nn

from ..config.base import PeftConfig
from ..config.targets import match_targets
from ..config.types import SEQ_CLS_HEADS, PeftType
from ..layer.layer import AdapterLayer
from ..methods.ia3 import FEEDFORWARD
from ..methods.method import Method
from ..methods.registry import every_method, get_method, registry
from ..model.tuner import BaseTuner, tuner_class
from ..weights.find import weight_of

ALLOWED_COMPUTE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DUMMY_MODEL_CONFIG = {"model_type": "custom"}
EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
SEQ_CLS_HEAD_NAMES = list(SEQ_CLS_HEADS)
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING: dict[str, Any] = {}  # for versions of transformers before
TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING = {name: list(inner) for name, inner in FEEDFORWARD.items()}
_PACKAGES = {
    "aqlm": "aqlm", "bnb": "bitsandbytes", "bnb_4bit": "bitsandbytes", "diffusers": "diffusers", "eetq": "eetq",
    "gptqmodel": "gptqmodel", "hqq": "hqq", "inc": "neural_compressor", "optimum": "optimum",
    "te": "transformer_engine", "te_pytorch": "transformer_engine_torch", "torchao": "torchao",
}  # fmt: skip


class _Table(Mapping[PeftType, Any]):
    """A view of the registry, so that nothing stands twice."""

    def __init__(self, entry: Callable[[Method], Any]) -> None:
        self._entry = entry

    def __getitem__(self, key: PeftType | str) -> Any:
        method = every_method().get(PeftType(key)) if key in list(PeftType) else None
        if method is None:
            raise KeyError(key)
        return self._entry(method)

    def __iter__(self) -> Iterator[PeftType]:
        return iter(every_method())

    def __len__(self) -> int:
        return len(every_method())


PEFT_TYPE_TO_CONFIG_MAPPING = _Table(lambda method: method.config_class)
PEFT_TYPE_TO_TUNER_MAPPING = PEFT_TYPE_TO_MIXED_MODEL_MAPPING = _Table(
    lambda method: getattr(method, "encoder_class", None) or tuner_class(method)
)
PEFT_TYPE_TO_PREFIX_MAPPING = _Table(lambda method: method.prefix)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration object that a dictionary with `peft_type` describes."""
    return get_method(config_dict.get("peft_type")).config_class(**config_dict)


def check_target_module_exists(config: Any, key: str) -> bool:
    """True if a configuration adapts the module of this name."""
    return bool(match_targets(config, [key]).names)


def inspect_matched_modules(tuner: BaseTuner, adapter_name: str = "default") -> dict[str, list[str]]:
    """The names of a tuner's modules, "matched" and "unmatched" by the configuration of an adapter."""
    names = [name for name, _ in tuner.model.named_modules()]
    matched = match_targets(tuner.peft_config[adapter_name], [name for name in names if name]).names  # type: ignore[arg-type]
    found = set(matched)
    return {"matched": matched, "unmatched": [name for name in names if name not in found]}


def find_parameter_name_by_module(model: nn.Module, reference_module: nn.Module) -> str:
    """The name of a module in a model, "" if it is not there."""
    return next((name for name, module in model.named_modules() if module is reference_module), "")


def get_device_map(model: nn.Module) -> dict[str, Any]:
    """accelerate's map of devices by module, or the one device that a model without it is on."""
    found: dict[str, Any] = getattr(model, "hf_device_map", None) or {"": next(model.parameters()).device}
    return found


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """A weight as [out, in], of a layer that stores it [in, out] if `fan_in_fan_out`; a parameter stays one."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def dequantize_module_weight(module: nn.Module) -> Tensor:
    """The dense weight of a layer as its module holds it, dequantised if need be; of an adapter layer the base's.

    Raises TypeError for a module that is no such layer.
    """
    base = module.base if isinstance(module, AdapterLayer) else weight_of(module)
    if base is None:
        raise TypeError(f"{type(module).__name__} has no weight of a layer that adapters act on")
    w = base.read()[0]
    return w.T if base.fan_in_fan_out else w


def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """(parent, module, name in the parent) of a module by its name."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def check_if_peft_model(model_name_or_path: str) -> bool:
    """True if a folder, or a repository on the Hub, holds an adapter."""
    with contextlib.suppress(Exception):  # whatever is wrong with it, it is no adapter
        PeftConfig.from_pretrained(model_name_or_path)
        return True
    return False


def update_signature(model: Any, method: str = "all") -> None:
    """Give a PeftModel's `forward`, `generate` or both ("all") the base model's signature, for who inspects it."""
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    for name in ("forward", "generate") if method == "all" else (method,):
        own, base = getattr(model, name, None), getattr(type(model.get_base_model()), name, None)
        if own is None or base is None or not set(inspect.signature(own).parameters) <= {"args", "kwargs"}:
            continue

        def call(self: Any, *args: Any, _own: Any = own, **kwargs: Any) -> Any:
            return _own(*args, **kwargs)

        functools.update_wrapper(call, base, assigned=("__doc__", "__name__", "__annotations__"))
        setattr(model, name, types.MethodType(call, model))


update_forward_signature = functools.partial(update_signature, method="forward")
update_generate_signature = functools.partial(update_signature, method="generate")


class DoraCaching(contextlib.nullcontext[None]):
    """Accepted as in PEFT, where it keeps norms of DoRA's weights between calls. Here what of them stays the same is
    always kept, and the rest costs so little that nothing is left to turn on."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> None:
        self.enabled = enabled


class MontecloraTrainerMixin:
    """Put before a Trainer among the bases of a class: its loss then has MonteCLoRA's regulariser added."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        parent: Any = super()
        result = parent.compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        tuners = (m for m in model.modules() if isinstance(m, BaseTuner) and hasattr(m, "_get_monteclora_loss"))
        losses = [tuner._get_monteclora_loss() for tuner in tuners]
        added = sum(losses) / max(1, len(losses))
        return (result[0] + added, *result[1:]) if return_outputs else result + added


def is_xpu_available(check_device: bool = False) -> bool:
    """True if torch has an XPU; check_device: and can reach one."""
    if not check_device or not torch.xpu.is_available():
        return torch.xpu.is_available()
    with contextlib.suppress(RuntimeError):
        torch.empty(0, device="xpu")
        return True
    return False


@functools.cache
def _own_targets(method: type[Method]) -> Any:
    """A method's table, which it has for itself from now on: who adds a model type to it adds no other method's."""
    method.default_targets = dict(method.default_targets)
    return method.default_targets


def _is_at_least(package: str, name: str) -> bool:
    """True for an installed version of at least what a name as `is_torchao_ge_v0_18_0` says."""
    wanted = [int(part) for part in name.partition("_ge_v")[2].split("_")]
    return [int(part) for part in metadata.version(package).split("+")[0].split(".")[: len(wanted)]] >= wanted


def __getattr__(name: str) -> Any:
    """Names by pattern: `TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING`, a method's default targets by model
    type; `is_<package>_available()`; `is_transformers_ge_v5_4_0` and the like."""
    start, end = "TRANSFORMERS_MODELS_TO_", "_TARGET_MODULES_MAPPING"
    if name.startswith(start) and name.endswith(end):
        for peft_type, method in registry().items():
            if peft_type.value.replace("_", "") == name[len(start) : -len(end)]:
                return _own_targets(type(method))  # type: ignore[arg-type]  # mypy takes a class for its instances
    if name.startswith("is_transformers_ge_v"):
        return _is_at_least("transformers", name)
    if name.startswith("is_torchao_ge_v"):  # a function, unlike those of transformers
        return lambda: util.find_spec("torchao") is not None and _is_at_least("torchao", name)
    package = _PACKAGES.get(name.removeprefix("is_").removesuffix("_available"))
    if package is None or name != f"is_{name[3:-10]}_available":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return lambda: util.find_spec(package) is not None  # it is not imported to answer
