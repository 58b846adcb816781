"""`add_weighted_adapter`: a new adapter made of others, by weights.

The eleven ways of LoRA: sums of the factors ("linear" and its pruned kin), factors side by side ("cat", exact), and
sums of the updates, brought to a rank by an SVD ("svd" and its kin). Each layer combines the adapters that it has.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..config.base import check_ranks
from ..config.limits import MAX_SCALE
from ..config.types import PeftType, warn
from ..inject.modules import check_whole
from ..inject.tokens import embeddings_end
from ..layer.layer import AdapterLayer
from ..layer.saved_modules import ModulesToSaveWrapper
from ..methods.registry import get_method, method_of
from ..methods.trainable_tokens import FollowingTokens, TrainableTokens
from . import merge_math

FACTORS = ("linear", "ties", "dare_ties", "dare_linear", "magnitude_prune")
UPDATES = ("svd", "ties_svd", "dare_ties_svd", "dare_linear_svd", "magnitude_prune_svd")
Found = Sequence[tuple[str, float]]
Mix = Callable[[list[Tensor], Tensor], Tensor]


def add_weighted_lora(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str,
    combination_type: str = "svd", svd_rank: int | None = None, svd_clamp: float | None = None,
    svd_full_matrices: bool = True, svd_driver: str | None = None, density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
) -> None:  # fmt: skip
    """Add to a `BaseTuner` an adapter that is a weighted sum of LoRA adapters. It is not trained.

    weights: may be negative. combination_type: of `FACTORS` or `UPDATES`, or "cat". "svd" and "cat" are exact up to the
    rank (that of "cat" is the sum of all ranks); "linear", on the factors, is rough. svd_rank: of the result, the
    largest rank by default. svd_clamp: the quantile at which the factors are cut off. svd_full_matrices: accepted, of
    no effect. svd_driver: as in torch.linalg.svd. density: the share of values that pruning keeps.
    majority_sign_method: how "ties" elects signs.
    """
    configs: list[Any] = [tuner.peft_config[name] for name in adapters]
    for name, config in zip(adapters, configs, strict=True):
        if config.target_parameters:
            raise ValueError(
                f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{name}')"
            )
        method: Any = method_of(config)
        first: Any = method_of(configs[0])
        if method is not get_method("LORA") and method.combined_by is None:
            what = type(method).__name__
            raise ValueError(f"add_weighted_adapter adds plain LoRA adapters, and '{name}' is a {what}")
        field = method.combined_by or first.combined_by
        if field and getattr(config, field) != getattr(configs[0], field):
            raise ValueError(
                f"add_weighted_adapter combines adapters that act on the same tokens, and '{adapters[0]}' and '{name}' "
                f"differ in `{field}`"
            )
    if svd_rank is not None:
        check_ranks(svd_rank, field="svd_rank")
    for name, share in (("density", density), ("svd_clamp", svd_clamp)):
        if share is not None and not (share >= 0.0 if name == "density" else 0.0 <= share <= 1.0):
            raise ValueError(f"`{name}` should be a share from 0 to 1, got {share!r}")
    how = "linear" if len(adapters) == 1 else combination_type
    rank = _rank(how, configs, svd_rank)
    mix: Any = merge_math.task_arithmetic
    if how not in ("linear", "svd", "cat"):
        if density is None:
            raise ValueError(f"combination_type {how!r} prunes, and needs `density`: the share of values to keep")
        signs = {"majority_sign_method": majority_sign_method} if "ties" in how else {}
        mix = functools.partial(getattr(merge_math, how.removesuffix("_svd")), density=density, **signs)

    def combine(layer: AdapterLayer, found: Found) -> tuple[Tensor, Tensor]:
        """A and B of a layer's new adapter, whose scaling is one."""
        if how in FACTORS:
            return _mixed_factors(layer, found, mix)
        if layer.info.groups > 1:
            raise ValueError(f"combination_type {how!r} cannot combine {layer.layer_name!r}, a grouped convolution")
        if how == "cat" or (how == "svd" and svd_clamp is None):
            a, b = _side_by_side(layer, found)
            return (a, b) if how == "cat" else _cut(merge_math.svd_of_product(a.flatten(1), b.flatten(1)), rank, None)
        delta = mix([layer.get_delta_weight(n) for n, _ in found], torch.tensor([w for _, w in found]))
        delta = delta.t() if layer.base.transposed else delta.flatten(1)
        return _cut(tuple(torch.linalg.svd(delta, full_matrices=False, driver=svd_driver)), rank, svd_clamp)

    config = copy.copy(configs[0])
    edits_base = isinstance(config.init_lora_weights, str) and config.init_lora_weights != "gaussian"
    vars(config).update(
        r=rank, lora_alpha=rank, use_rslora=False, lora_bias=any(c.lora_bias for c in configs), rank_pattern={},
        alpha_pattern={}, target_modules=_union([c.target_modules for c in configs], "target"),
        init_lora_weights=True if edits_base else config.init_lora_weights,
        trainable_token_indices=_every_token(tuner.model, [c.trainable_token_indices for c in configs]),
    )  # fmt: skip
    with _added(tuner, adapters, weights, adapter_name, config) as layers:
        for layer, found in layers:
            if isinstance(layer.methods[adapter_name], TrainableTokens):
                _sum_rows(layer, adapter_name, found)
                continue
            for target, value in zip(factors_of(layer, adapter_name), combine(layer, found), strict=True):
                value = value.reshape(value.shape[0], -1, *target.shape[2:])  # an SVD saw the kernel flattened
                target.zero_()[tuple(slice(n) for n in value.shape)] = value.to(target.dtype)
            if config.lora_bias and layer.base.kind != "embedding":
                biases = [layer.lora_B[n].bias * (w * layer.scaling[n]) for n, w in found if layer.lora_bias[n]]
                layer.lora_B[adapter_name].bias.copy_(sum(biases, torch.zeros((), device=target.device)))


def _rank(how: str, configs: Sequence[Any], svd_rank: int | None) -> int:
    ranks: list[int] = [max([c.r, *(c.rank_pattern or {}).values()]) for c in configs]
    if how == "cat":
        return sum(ranks)
    if how in UPDATES:
        return max(ranks) if svd_rank is None else svd_rank
    if how not in FACTORS:
        raise ValueError(f"Invalid combination_type: {how}")
    if len(set(ranks)) != 1:
        raise ValueError(
            "All adapters must have the same r value when using combination_type linear, ties, dare_ties or "
            "dare_linear."
        )
    return ranks[0]


def factors_of(layer: AdapterLayer, adapter: str) -> tuple[Tensor, Tensor]:
    """A and B of a LoRA in a layer."""
    s = layer.view(adapter)
    if s.get("lora_embedding_A") is not None:
        return s.lora_embedding_A, s.lora_embedding_B
    return s.lora_A.weight, s.lora_B.weight


def _every_token(model: Any, wanted: Sequence[Any]) -> dict[str, list[int]] | None:
    """The rows that any of several adapters trains, by the ends of the names of their modules."""
    found: dict[str, dict[int, None]] = {}
    for indices in filter(None, wanted):
        for end, own in (indices if isinstance(indices, Mapping) else {embeddings_end(model): indices}).items():
            found.setdefault(end, {}).update(dict.fromkeys(own))
    return {end: list(own) for end, own in found.items()} or None


def _sum_rows(layer: AdapterLayer, adapter: str, found: Found) -> None:
    """Trained rows: those of the base weight, as the new adapter has them, and the weighted sum of the updates. (PEFT
    leaves them as they are in the base weight.)"""
    if isinstance(layer.methods[adapter], FollowingTokens):
        return  # they are another layer's
    if layer.merged_adapters:
        raise ValueError(f"{layer.layer_name!r} has merged rows: `unmerge_adapter` before combining them")
    s = layer.view(adapter)
    places, rows = {token: i for i, token in enumerate(s.token_indices)}, s.trainable_tokens_delta
    start = rows.clone()
    for name, weight in found:
        other = layer.view(name)
        at = [places[token] for token in other.token_indices]
        rows[at] += weight * (other.trainable_tokens_delta - start[at])


def _side_by_side(layer: AdapterLayer, found: Found) -> tuple[Tensor, Tensor]:
    pairs = [factors_of(layer, name) for name, _ in found]
    scaled = [a * weight * layer.scaling[name] for (a, _), (name, weight) in zip(pairs, found, strict=True)]
    return torch.cat(scaled, dim=0), torch.cat([b for _, b in pairs], dim=1)


def _mixed_factors(layer: AdapterLayer, found: Found, mix: Mix) -> tuple[Tensor, Tensor]:
    scales = [weight * float(layer.scaling[name]) for name, weight in found]
    roots = torch.tensor([math.sqrt(abs(scale)) for scale in scales])
    signs = torch.tensor([1.0 if scale >= 0 else -1.0 for scale in scales])
    a, b = zip(*(factors_of(layer, name) for name, _ in found), strict=True)
    if len({t.shape for t in a}) > 1:
        raise ValueError(f"the adapters' ranks differ in {layer.layer_name!r}: combine them by 'cat' or 'svd'")
    # Half of a weight on either side, its sign on one.
    return mix(list(a), (roots * signs).to(a[0].device)), mix(list(b), roots.to(b[0].device))


def _cut(svd: tuple[Tensor, ...], rank: int, clamp: float | None) -> tuple[Tensor, Tensor]:
    """A and B of the best approximation of a rank, cut off at a quantile of their values."""
    u, values, v = svd
    b, a = u[:, :rank] * values[:rank], v[:rank]
    if clamp is not None:
        every = torch.cat([b.flatten(), a.flatten()])
        end = float(np.quantile(every.float().cpu().numpy(), clamp))  # torch's takes no large tensors
        a, b = a.clamp(-end, end), b.clamp(-end, end)
    return a, b


def add_weighted_ia3(tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str) -> None:
    """Add an adapter whose vectors are the weighted sums of those of IA3 adapters. It is not trained."""
    configs: list[Any] = [tuner.peft_config[name] for name in adapters]
    config = copy.copy(configs[0])
    for field in ("target_modules", "feedforward_modules"):
        setattr(config, field, _union([getattr(c, field) for c in configs], field.partition("_")[0]))
    with _added(tuner, adapters, weights, adapter_name, config) as layers:
        for layer, found in layers:
            if len({layer.is_feedforward[name] for name in (adapter_name, *(n for n, _ in found))}) > 1:
                raise ValueError(f"{layer.layer_name!r} is a feedforward layer in some of the adapters only")
            layer.ia3_l[adapter_name].copy_(sum(layer.ia3_l[name] * weight for name, weight in found))


def _union(values: Sequence[Any], what: str) -> Any:
    if len({type(value) for value in values}) > 1:
        raise ValueError(
            f"all adapter configs should follow the same {what} modules type. Combining adapters with "
            f"`{what}_modules` type being a mix of list/set and string is not supported."
        )
    if isinstance(values[0], str):
        return "|".join(f"({value})" for value in values)
    if isinstance(values[0], set):
        return set().union(*values)
    raise TypeError(f"Invalid type {type(values[0])} found in {what}_modules")


@contextmanager
def _added(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], name: str, config: Any
) -> Iterator[list[tuple[AdapterLayer, Found]]]:
    """Put the new adapter in; its layers, each with what it combines. An error takes it out again."""
    wrappers = [m for _, m in tuner.adapter_modules() if isinstance(m, ModulesToSaveWrapper)]
    shared = [w for w in wrappers if sum(adapter in w.modules_to_save for adapter in adapters) > 1]
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(shared)} such instance(s)."
        )
    instead = "Save the adapters, combine them in a model that is whole, and load the result."
    check_whole((layer for _, layer in tuner.adapter_layers()), "add_weighted_adapter", instead)
    saved = [n for a in adapters for n in getattr(tuner.peft_config[a], "modules_to_save", None) or ()]
    vars(config).update(modules_to_save=list(dict.fromkeys(saved)) or None)
    if hasattr(config, "bias"):
        config.bias = "none"
    plan = tuner.add(name, config)
    try:
        with torch.no_grad():
            for _, module in tuner.adapter_modules():
                if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
                    for source in [a for a in adapters if a in module.modules_to_save]:
                        module.modules_to_save[name].load_state_dict(module.modules_to_save[source].state_dict())
            pairs = list(zip(adapters, weights, strict=True))
            yield [(layer, [(n, w) for n, w in pairs if n in layer.methods]) for _, layer in tuner.adapter_layers(name)]
    except BaseException:
        tuner.remove(plan)
        raise
    tuner.set_requires_grad(name, False)


COMBINES: dict[PeftType, Callable[..., None]] = {PeftType.LORA: add_weighted_lora, PeftType.IA3: add_weighted_ia3}


def add_weighted_adapter(
    tuner: Any, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, *args: Any, **options: Any
) -> None:  # fmt: skip
    """Add an adapter that combines others of one method by weights; a warning is all if there is one of the new name.

    LoRA's options are those of `add_weighted_lora`. Raises ValueError where adapters cannot be combined, with the model
    as it was.
    """
    if adapter_name in tuner.peft_config:  # PEFT says nothing, and scripts that add it twice go on
        warn(f"There is an adapter {adapter_name!r} already: it is left as it is.", 2)
        return
    for name in adapters:
        if name not in tuner.peft_config:
            raise ValueError(f"Adapter {name} does not exist")
    if not adapters:
        raise ValueError(f"Found no adapter matching the names in {list(adapters)}")
    if len(adapters) != len(weights):
        raise ValueError(f"{len(adapters)} adapters need as many weights, got {len(weights)}")
    if wrong := [w for w in weights if not abs(float(w)) <= MAX_SCALE]:
        raise ValueError(f"weights should be numbers of magnitude at most {MAX_SCALE:g}, got {wrong[0]!r}")
    methods = {str(getattr(tuner.peft_config[n].peft_type, "value", "")) for n in adapters}
    if len(methods) > 1:
        raise ValueError(f"add_weighted_adapter combines adapters of one method, got {', '.join(sorted(methods))}")
    method = get_method(tuner.peft_config[adapters[0]].peft_type)
    if method.peft_type not in COMBINES:
        raise TypeError(
            f"{method.peft_type.value} does not support add_weighted_adapter: only {' and '.join(COMBINES)} do."
        )
    COMBINES[method.peft_type](tuner, adapters, weights, adapter_name, *args, **options)
