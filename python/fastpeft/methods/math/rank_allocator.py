"""AdaLoRA's budget: which ranks of which layers are kept while it falls to the target (arXiv 2303.10512).

The importance of a number is |p * grad|, smoothed over steps (beta1), times how far it strays from that (beta2). A
rank's importance is that of its E plus the means over its row of A and its column of B. Each allocation sets E to zero
for the ranks below the budget; a rank whose E grows again comes back at the next one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..method import AdaptedLayer

RANK_DIM = {"lora_A": 0, "lora_B": 1, "lora_E": 0}  # the trained tensors, and the dimension in which ranks are counted


class RankAllocator:
    """The budget of one adapter, and the importance of its ranks in its layers, which are given by name."""

    def __init__(self, layers: Mapping[str, Any], config: Any, adapter: str) -> None:
        self.layers, self.config, self.adapter = layers, config, adapter
        self.at_start = sum(len(layer.lora_E[adapter]) for layer in layers.values())
        self.averages: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}  # importance and uncertainty

    @torch.no_grad()
    def allocate(self, step: int) -> None:
        c = self.config
        last, target = c.total_step - c.tfinal, c.target_r * len(self.layers)
        if step > last:
            self._mask(c.rank_pattern or {})
            return
        if step < last:
            self._measure()
        if step == last or (step > c.tinit and step % c.deltaT == 0):
            left = 1 - (step - c.tinit) / (last - c.tinit)
            c.rank_pattern = self._most_important(int((self.at_start - target) * left**3 + target))
            self._mask(c.rank_pattern)
        if step == last:
            self.averages.clear()

    def _measure(self) -> None:
        for name, layer in self.layers.items():
            for part in RANK_DIM:
                p = getattr(layer, part)[self.adapter]
                if p.grad is None:
                    continue
                old = self.averages.get((name, part))
                if old is None or old[0].shape != p.shape:  # a file had other ranks
                    old = self.averages[name, part] = torch.zeros_like(p), torch.zeros_like(p)
                (mean, spread), now = old, (p * p.grad).abs()
                mean.lerp_(now, 1 - self.config.beta1)
                spread.lerp_((now - mean).abs(), 1 - self.config.beta2)

    def _most_important(self, budget: int) -> dict[str, list[bool]]:
        """True for each rank that the budget keeps, by layer."""
        scores = {}
        for name, layer in self.layers.items():
            found = [(part, self.averages.get((name, part))) for part in ("lora_E", "lora_A", "lora_B")]
            parts = [(two[0] * two[1]).mean(1 - RANK_DIM[part]) for part, two in found if two is not None]
            e = layer.lora_E[self.adapter]
            scores[name] = torch.stack(parts).sum(0) if parts else e.new_zeros(len(e))
        drop = self.at_start - budget
        device = next(iter(scores.values())).device
        every = torch.cat([score.to(device) for score in scores.values()])
        least = torch.kthvalue(every, drop).values.item() if drop > 0 else float("-inf")
        return {f"{name}.lora_E": (score > least).tolist() for name, score in scores.items()}

    def _mask(self, rank_pattern: Mapping[str, Any]) -> None:
        kept = by_layer(rank_pattern)
        for name, layer in self.layers.items():
            e, own = layer.lora_E[self.adapter], kept.get(name, [])
            if len(own) == len(e) > 0:
                e.masked_fill_(~torch.tensor(own, device=e.device)[:, None], 0.0)


def update_and_allocate(tuner: Any, global_step: int) -> None:
    """Measure what matters and give the budget of this step out, for each active AdaLoRA that trains."""
    for adapter in tuner.active_adapters:
        config = tuner.peft_config[adapter]
        layers = {n: m for n, m in layers_of(tuner, adapter) if m.lora_E[adapter].requires_grad}
        if layers:
            allocator = vars(tuner).setdefault("_allocators", {}).get(adapter)
            if allocator is None or allocator.config is not config:
                allocator = tuner._allocators[adapter] = RankAllocator(layers, config, adapter)
            allocator.allocate(global_step)


def resize_modules_by_rank_pattern(tuner: Any, rank_pattern: Mapping[str, Any], adapter_name: str) -> None:
    """Take the ranks that are not in the pattern out of the layers. Their parameters are new ones."""
    kept = by_layer(rank_pattern)
    for name, layer in layers_of(tuner, adapter_name):
        if name in kept:
            parts = {part: getattr(layer, part)[adapter_name].detach() for part in RANK_DIM}
            install(layer, adapter_name, {part: select(part, t, kept[name]) for part, t in parts.items()})


def layers_of(tuner: Any, adapter: str) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in tuner.adapter_layers() if adapter in getattr(m, "lora_E", ())]


def by_layer(rank_pattern: Mapping[str, Any]) -> dict[str, list[bool]]:
    """A pattern by the layers' names; PEFT's keys in memory end with the adapter's name."""
    return {key.rpartition(".lora_E")[0]: [bool(v) for v in kept] for key, kept in rank_pattern.items()}


def select(part: str, tensor: Tensor, kept: list[bool]) -> Tensor:
    index = torch.tensor([i for i, v in enumerate(kept) if v], dtype=torch.long, device=tensor.device)
    return tensor.index_select(RANK_DIM[part], index)


def install(layer: AdaptedLayer, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    """Have a layer train these tensors: new parameters, or the ones given."""
    for part, tensor in tensors.items():
        container = getattr(layer, part)
        is_new = not isinstance(tensor, nn.Parameter)
        container[adapter] = nn.Parameter(tensor, container[adapter].requires_grad) if is_new else tensor
    layer.r[adapter] = len(tensors["lora_E"])
    layer.changed()
