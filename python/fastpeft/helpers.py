"""`peft.helpers`: what scripts do to models beside training them."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .config import PeftConfig
from .layer import AdapterLayer
from .sites import adapter_modules
from .tuner import BaseTuner
from .weights.find import weight_of

MOE_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder, or a repository on the Hub, holds an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # whatever is wrong with it, it is no adapter
        return False
    return True


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


def update_forward_signature(model: Any) -> None:
    update_signature(model, "forward")


def update_generate_signature(model: Any) -> None:
    update_signature(model, "generate")


class DoraCaching:
    """Accepted as in PEFT, where it keeps norms of DoRA's weights between calls. Here what of them stays the same is
    always kept, and the rest costs so little that nothing is left to turn on."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: Any) -> None:
        pass

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


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within this, every adapter that has a scaling acts with `multiplier` times it."""
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers: list[Any] = [m for _, m in adapter_modules(model) if isinstance(m, AdapterLayer) and m._scaling]
    if not layers:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer, values in zip(layers, before, strict=True):
            # In place: fused calls look scalings up in this dictionary.
            layer.scaling.update({name: value * multiplier for name, value in values.items()})
        yield
    finally:
        for layer, values in zip(layers, before, strict=True):
            layer.scaling.update({name: value for name, value in values.items() if name in layer.scaling})


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within this, adapters take inputs as they are: something else (layerwise casting) brings the dtypes together."""
    layers = [m for _, m in adapter_modules(model) if isinstance(m, AdapterLayer)] if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
            layer.changed()
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled
            layer.changed()


class KappaTuneSelector:
    """Finds the weights with the lowest condition numbers, those that adapters change with the least harm
    (arXiv 2506.16289): linear layers, and stacks of experts' matrices by their parameters' names."""

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model, self.max_dim_size_to_analyze, self.show_progress = model, max_dim_size_to_analyze, show_progress
        self.moe_param_suffixes = moe_param_suffixes or MOE_SUFFIXES
        self._found: tuple[dict[str, float], dict[str, float]] | None = None

    def _kappas(self) -> tuple[dict[str, float], dict[str, float]]:
        """Condition numbers of modules and of parameters, by name."""
        if self._found is None:
            modules, parameters = {}, {}
            linear = [(n, m) for n, m in self.model.named_modules() if isinstance(m, nn.Linear) or _is_quantised(m)]
            for name, module in self._shown(linear, "Computing SVD (linear layers)"):
                base = weight_of(module)
                if base is not None and max(base.shape) <= self.max_dim_size_to_analyze:
                    modules[name] = _condition(base.read()[0])
            stacks = [(n, p) for n, p in self.model.named_parameters()
                      if p.dim() == 3 and n.endswith(self.moe_param_suffixes)]  # fmt: skip
            for name, stack in self._shown(stacks, "Computing SVD (MoE parameters)"):
                if max(stack.shape[1:]) <= self.max_dim_size_to_analyze:
                    parameters[name] = sum(_condition(w) for w in stack) / len(stack)
            self._found = modules, parameters
        return self._found

    def _shown(self, items: Sequence[Any], title: str) -> Iterable[Any]:
        if not self.show_progress:
            return items
        from tqdm import tqdm

        bar: Iterable[Any] = tqdm(items, desc=title)
        return bar

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of modules, best first: so many, or this share of them, or those below a condition number, or all."""
        return _best(self._kappas()[0], top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """The same of experts' parameters, for `target_parameters`."""
        return _best(self._kappas()[1], top_p, num_modules, threshold)


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """`target_modules` and `target_parameters` (None without experts) of the share `top_p` with the lowest condition
    numbers. Weights with a side above `max_dim_size_to_analyze` are passed over."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


def _is_quantised(module: nn.Module) -> bool:
    base = weight_of(module)
    return base is not None and base.quantized is not None


def _condition(w: Tensor) -> float:
    s = torch.linalg.svdvals(w.detach().float())
    return float(s[0] / (s[-1] + 1e-8))


def _best(kappas: dict[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    names = sorted(kappas, key=lambda name: kappas[name])
    if count is not None:
        return names[:count]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    return names if threshold is None else [name for name in names if kappas[name] <= threshold]
