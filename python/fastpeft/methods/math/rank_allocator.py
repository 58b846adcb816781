"""AdaLoRA's budget: which ranks of which layers are kept while it falls to the target (arXiv 2303.10512).

The importance of a number is |p * grad|, smoothed over steps (beta1), times how far it strays from that (beta2). A
rank's importance is that of its E plus the means over its row of A and its column of B. Each allocation sets E to zero
for the ranks below the budget; a rank whose E grows again comes back at the next one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapted import AdaptedLayer

PARTS = ("lora_A", "lora_B", "lora_E")


class RankAllocator:
    """The importance of one adapter's ranks. layers: (name, adapter layer) of those that have the adapter."""

    def __init__(self, layers: Iterable[tuple[str, Any]], config: Any, adapter: str) -> None:
        self.layers, self.config, self.adapter = dict(layers), config, adapter
        self.init_bgt = sum(layer.lora_E[adapter].shape[0] for layer in self.layers.values())
        self.target_bgt = config.target_r * len(self.layers)
        self.reset_ipt()

    def set_total_step(self, total_step: int) -> None:
        self.config.total_step = total_step

    def reset_ipt(self) -> None:
        self.exp_avg_ipt: dict[tuple[str, str], Tensor] = {}
        self.exp_avg_unc: dict[tuple[str, str], Tensor] = {}

    def budget_schedule(self, step: int) -> tuple[int, bool]:
        """(ranks that are kept in all, whether to allocate now)."""
        c = self.config
        if step <= c.tinit:
            return self.init_bgt, False
        if step > c.total_step - c.tfinal:
            return self.target_bgt, True
        left = 1 - (step - c.tinit) / (c.total_step - c.tfinal - c.tinit)
        return int((self.init_bgt - self.target_bgt) * left**3 + self.target_bgt), step % c.deltaT == 0

    @torch.no_grad()
    def update_ipt(self) -> None:
        b1, b2 = self.config.beta1, self.config.beta2
        for name, layer in self.layers.items():
            for part in PARTS:
                p = getattr(layer, part)[self.adapter]
                if p.grad is None:
                    continue
                key, now = (name, part), (p * p.grad).abs()
                if key not in self.exp_avg_ipt or self.exp_avg_ipt[key].shape != p.shape:  # a file had other ranks
                    self.exp_avg_ipt[key], self.exp_avg_unc[key] = torch.zeros_like(p), torch.zeros_like(p)
                mean = self.exp_avg_ipt[key].lerp_(now, 1 - b1)
                self.exp_avg_unc[key].lerp_((now - mean).abs(), 1 - b2)

    def scores(self, name: str) -> Tensor:
        """The importance of each rank of a layer."""
        parts = []
        for part, dim in (("lora_E", 1), ("lora_A", 1), ("lora_B", 0)):
            if (name, part) in self.exp_avg_ipt:
                parts.append((self.exp_avg_ipt[name, part] * self.exp_avg_unc[name, part]).mean(dim))
        e = self.layers[name].lora_E[self.adapter]
        return torch.stack(parts).sum(0) if parts else e.new_zeros(len(e))

    @torch.no_grad()
    def mask_to_budget(self, budget: int) -> dict[str, list[bool]]:
        """Zero the E of the ranks that are least important. Returns what is kept, by layer."""
        scores = {name: self.scores(name) for name in self.layers}
        drop = self.init_bgt - budget
        device = next(iter(scores.values())).device
        every = torch.cat([score.to(device) for score in scores.values()])
        least = torch.kthvalue(every, drop).values.item() if drop > 0 else float("-inf")
        kept = {f"{name}.lora_E": (score > least).tolist() for name, score in scores.items()}
        self.mask_using_rank_pattern(kept)
        return kept

    @torch.no_grad()
    def mask_using_rank_pattern(self, rank_pattern: dict[str, list[bool]]) -> None:
        for name, layer in self.layers.items():
            e = layer.lora_E[self.adapter]
            kept = rank_pattern.get(f"{name}.lora_E", rank_pattern.get(f"{name}.lora_E.{self.adapter}"))
            if kept is not None and len(kept) == len(e):
                e.masked_fill_(~torch.tensor(kept, dtype=torch.bool, device=e.device)[:, None], 0.0)

    def update_and_allocate(self, step: int) -> None:
        last = self.config.total_step - self.config.tfinal
        if step > last:
            self.mask_using_rank_pattern(self.config.rank_pattern or {})
            return
        if step < last:
            self.update_ipt()
        budget, now = self.budget_schedule(step)
        if now or step == last:
            self.config.rank_pattern = self.mask_to_budget(budget)
        if step == last:
            self.reset_ipt()


# --- in a model ---------------------------------------------------------------------------------------------------


def update_and_allocate(tuner: Any, global_step: int) -> None:
    """Measure what matters and give the budget of this step out, for each active AdaLoRA that trains."""
    for adapter in tuner.active_adapters:
        config = tuner.peft_config[adapter]
        layers = [(n, m) for n, m in layers_of(tuner, adapter) if m.lora_E[adapter].requires_grad]
        if not layers:
            continue
        allocator = vars(tuner).setdefault("_allocators", {}).get(adapter)
        if allocator is None or allocator.config is not config:
            allocator = tuner._allocators[adapter] = RankAllocator(layers, config, adapter)
        allocator.update_and_allocate(global_step)


def resize_modules_by_rank_pattern(tuner: Any, rank_pattern: Mapping[str, Any], adapter_name: str) -> None:
    """Take the ranks that are not in the pattern out of the layers. Their parameters are new ones."""
    kept = by_layer(rank_pattern)
    for name, layer in layers_of(tuner, adapter_name):
        if name in kept:
            parts = {part: getattr(layer, part)[adapter_name] for part in PARTS}
            install(layer, adapter_name, {part: select(part, t.detach(), kept[name]) for part, t in parts.items()})


def layers_of(tuner: Any, adapter: str) -> list[tuple[str, Any]]:
    return [
        (name.removeprefix("model."), layer)
        for name, layer in tuner.adapter_layers()
        if adapter in getattr(layer, "lora_E", ())
    ]


def by_layer(rank_pattern: Mapping[str, Any]) -> dict[str, list[bool]]:
    """A pattern by the layers' names; PEFT's keys in memory end with the adapter's name."""
    return {key.rpartition(".lora_E")[0]: [bool(v) for v in kept] for key, kept in rank_pattern.items()}


def select(part: str, tensor: Tensor, kept: list[bool]) -> Tensor:
    index = torch.tensor([i for i, v in enumerate(kept) if v], dtype=torch.long, device=tensor.device)
    return tensor.index_select(1 if part == "lora_B" else 0, index)


def install(layer: AdaptedLayer, adapter: str, tensors: Mapping[str, Tensor]) -> None:
    for part, tensor in tensors.items():
        container = getattr(layer, part)
        container[adapter] = nn.Parameter(tensor, requires_grad=container[adapter].requires_grad)
    layer.r[adapter] = len(tensors["lora_E"])
    layer.changed()
