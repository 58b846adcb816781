"""Initialisations of LoRA that read the base weight, or gradients or inputs of its layer. One file each.

What they have in common is here: which there are, what they need, and what the base weight gives up for the adapter
(`base_edit.py`), so that the model starts as what it was.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from torch import Tensor

from ..base_edit import EDIT, BaseEdit, LowRankEdit
from ..config import PeftWarning
from ..method import LayerInfo, State
from .corda import EIGENS, CordaConfig, CordaEigens, corda
from .eva import EvaConfig
from .loftq import LoftQConfig, loftq
from .loraga import GRADIENT, LoraGAConfig, lora_ga
from .olora import olora
from .pissa import pissa

SUB_CONFIGS: dict[str, type[Any]] = {"eva_config": EvaConfig, "corda_config": CordaConfig,
                                     "lora_ga_config": LoraGAConfig}  # fmt: skip
NAMES = ("pissa", "pissa_niter_<n>", "olora", "loftq", "eva", "corda", "lora_ga")
# Those with which the adapter takes over a part of the base weight.
RESIDUAL = ("pissa", "olora", "corda", "lora_ga")
MAX_ITERATIONS = 1000


def is_init(name: Any) -> bool:
    return name in NAMES or _niter(name) is not None


def _niter(name: Any) -> int | None:
    found = re.fullmatch(r"pissa_niter_(\d{1,9})", name) if isinstance(name, str) else None
    return int(found[1]) if found else None


def complete(config: Any) -> None:
    """Fill in and check a LoraConfig's configuration of its initialisation, when it is made."""
    init = config.init_lora_weights
    if isinstance(config.loftq_config, LoftQConfig):
        config.loftq_config = dict(vars(config.loftq_config))
    if config.loftq_config and not isinstance(config.loftq_config, dict):
        raise ValueError(f"`loftq_config` should be a LoftQConfig or a dictionary, got {config.loftq_config!r}")
    for name, cls in SUB_CONFIGS.items():
        if not isinstance(getattr(config, name), cls | None):
            raise TypeError(f"`{name}` must be a `{cls.__name__}`, a dict, or None.")
    if init == "loftq" and not config.loftq_config:
        raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
    if config.loftq_config and init != "loftq":
        _ignored("loftq_config", "loftq")
        config.loftq_config = {}
    for name, cls, of in (("eva_config", EvaConfig, "eva"), ("corda_config", CordaConfig, "corda")):
        value = getattr(config, name)
        if init == of and value is None:
            warnings.warn(f"`init_lora_weights` is '{of}' but `{name}` is not specified. Using its defaults.",
                          PeftWarning, stacklevel=4)  # fmt: skip
            setattr(config, name, cls())
        elif init != of and value is not None:
            _ignored(name, of)
    patterns = config.rank_pattern or config.alpha_pattern
    if config.use_rslora and patterns and str(init).startswith(RESIDUAL):
        warnings.warn(
            "With use_rslora and a rank_pattern or alpha_pattern, this adapter cannot be saved as a plain LoRA of the "
            "original base (`save_pretrained(path_initial_model_for_weight_conversion=...)`).",
            PeftWarning,
            stacklevel=4,
        )


def _ignored(name: str, init: str) -> None:
    warnings.warn(f"`{name}` specified but will be ignored when `init_lora_weights` is not '{init}'.", PeftWarning,
                  stacklevel=5)  # fmt: skip


def check_config(config: Any, loading: bool = False) -> None:
    init = config.init_lora_weights
    niter = _niter(init)
    if niter is not None and niter > MAX_ITERATIONS:
        raise ValueError(f"init_lora_weights={init!r}: at most {MAX_ITERATIONS} iterations")
    if config.lora_bias:
        raise ValueError(f"lora_bias=True is only supported with init_lora_weights=True or False, got {init!r}.")
    if init == "loftq":
        bits, iterations = config.loftq_config.get("loftq_bits", 4), config.loftq_config.get("loftq_iter", 1)
        if bits not in (4, 8):
            raise ValueError(f"loftq_bits should be 4 or 8, got {bits!r}")
        if not isinstance(iterations, int) or not 1 <= iterations <= MAX_ITERATIONS:
            raise ValueError(f"loftq_iter should be from 1 to {MAX_ITERATIONS}, got {iterations!r}")
    if init == "lora_ga" and config.lora_ga_config is None:
        raise ValueError("init_lora_weights='lora_ga' needs lora_ga_config=LoraGAConfig(...).")


def check_layer(config: Any, info: LayerInfo) -> None:
    """Raise ValueError where an initialisation makes no sense. Embeddings start as plain LoRAs, as in PEFT's files."""
    init, what = config.init_lora_weights, f"{info.name!r}, a {type(info.module).__name__}"
    if info.kind == "embedding":
        warnings.warn(f"init_lora_weights={init!r} is for linear layers: {what}, starts as a plain LoRA.", PeftWarning,
                      stacklevel=2)  # fmt: skip
        return
    if info.kind != "linear" or info.transient:
        raise ValueError(f"init_lora_weights={init!r} is for linear layers, it cannot start {what}.")
    most = min(info.out_features, info.in_features) // (2 if init == "lora_ga" else 1)
    if init != "eva" and config.r > most:
        raise ValueError(f"init_lora_weights={init!r} needs a rank of at most {most} for {what}, got r={config.r}.")


@torch.no_grad()
def initialise(config: Any, info: LayerInfo, scaling: float, a: Tensor, b: Tensor) -> State:
    """Set a new linear layer's A and B, and return what else its state has: the edit of the base.

    A and B on the meta device are for a file to fill; the base is edited all the same, as it was when they were made.
    """
    init, loading = config.init_lora_weights, a.is_meta
    if init == "eva":
        if not loading:
            b.zero_()
        return {}
    if init == "loftq" and info.quantized is not None:
        if loading:
            return {}
        raise ValueError(f"LoftQ needs the unquantised weight of {info.name!r}: use `replace_lora_weights_loftq`.")
    if init == "lora_ga" and not hasattr(info.module, GRADIENT):
        if not loading:
            raise ValueError(f"There is no gradient of {info.name!r}: run `preprocess_loraga` first.")
        warnings.warn(
            "A LoRA-GA adapter is loaded, but what it took from the base weight is in no file: the result is right "
            "only on the residual base model. Save it with `path_initial_model_for_weight_conversion` for any base.",
            PeftWarning,
            stacklevel=2,
        )
        return {}
    w = info.weight()
    if w.is_meta:
        raise ValueError(f"init_lora_weights={init!r} needs the weight of {info.name!r}, which is on the meta device.")
    made_a, made_b, edit = _start(config, info, scaling, w)
    if edit is None:
        # Rounded to how they are kept: what they lose so, the base keeps.
        made_a, made_b = made_a.to(info.dtype).to(w), made_b.to(info.dtype).to(w)
        used = {"corda": (EIGENS,), "lora_ga": (GRADIENT,)}.get(init, ())
        edit = LowRankEdit(scaling * made_b, made_a.clone(), used)
    if not loading:
        a.copy_(made_a)
        b.copy_(made_b)
    return {EDIT: edit}


def _start(config: Any, info: LayerInfo, scaling: float, w: Tensor) -> tuple[Tensor, Tensor, BaseEdit | None]:
    init, r = config.init_lora_weights, config.r
    if init == "olora":
        return *olora(w, r), None
    if init == "loftq":
        return loftq(w, r, config.loftq_config.get("loftq_bits", 4), config.loftq_config.get("loftq_iter", 1))
    if init == "corda":
        eigens = getattr(info.module, EIGENS, None)
        if eigens is None:
            raise ValueError(f"There are no components of {info.name!r}: run `preprocess_corda` first.")
        for name, shape in (("S_WC", (r,)), ("U_WC", (info.out_features, r)), ("V_WC", (info.in_features, r))):
            tensor = getattr(eigens, name)
            if tuple(tensor.shape) != shape or not torch.isfinite(tensor).all():
                raise ValueError(
                    f"{name} of {info.name!r} is {list(tensor.shape)}, expected {list(shape)} and finite numbers: run "
                    "`preprocess_corda` with the model and the configuration that get_peft_model is called with."
                )
        return *corda(CordaEigens(*(getattr(eigens, n).to(w) for n in ("S_WC", "U_WC", "V_WC"))), scaling), None
    if init == "lora_ga":
        gradient = getattr(info.module, GRADIENT).to(w)
        gradient = gradient.t() if info.base.fan_in_fan_out else gradient
        return *lora_ga(w, gradient, r, scaling, config.lora_ga_config), None
    return *pissa(w, r, scaling, _niter(init)), None
