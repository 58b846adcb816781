"""Arrow: every token goes through the top_k LoRA adapters of the layer whose updates it excites most, by the softmax of
its products with their prototypes (arXiv 2405.11157).

A prototype is the first right singular vector of B A, by 15 steps of power iteration, as in PEFT; it is kept while the
adapter stays as it is. With use_gks the mean of general adapters' A and B is subtracted from each adapter's first
(GenKnowSub, aclanthology.org/2025.acl-short.54): for routing and products alone, the adapters stay as they are.
Beside n LoRAs the router costs 2 n in FLOPs per token; one call of `lora_mixture` does the layer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ....config.base import check
from ....config.seen_as_peft import SeenAsPeft
from ....files.whole import is_apart
from ...fused import Fused
from ...math.cache import Cache
from ...math.mixture import Mixed, added, fused, layer_state, together
from ...method import AdaptedLayer, AdapterView, Inner, LayerInfo, State
from ..lora import Lora
from . import variant

TASK_ADAPTER_PREFIX = "task_"
GKS_ADAPTER_PREFIX = "gks_"
_GENERAL = re.compile(rf"{GKS_ADAPTER_PREFIX}\d+")


@dataclass
class ArrowConfig(SeenAsPeft):
    """top_k: adapters of each token. router_temperature: of the softmax over them. use_gks: subtract the mean of the
    general adapters. rng_seed: of the vectors that the power iteration starts from; None: the process' generator.
    task_adapter_names, gks_adapter_names: set by `create_arrow_model`."""

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, kw_only=True)
    gks_adapter_names: list[str] | None = field(default=None, kw_only=True)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        check(self, "top_k", type(self.top_k) is int and self.top_k > 0, "a positive integer")
        check(self, "router_temperature", self.router_temperature > 0, "greater than 0")
        check(self, "rng_seed", self.rng_seed is None or type(self.rng_seed) is int, "an integer or None")
        for name in ("task_adapter_names", "gks_adapter_names"):
            names = getattr(self, name)
            good = names is None or (isinstance(names, list) and all(isinstance(n, str) for n in names))
            check(self, name, good, "a list of names or None")


def _drawn(a: Tensor, seed: int | None) -> Tensor:
    """float32 [in] of an A [r, in]: where the power iteration starts."""
    generator = None
    if seed is not None:
        generator = torch.Generator(device=a.device.type)
        generator.manual_seed(seed)
    found: Tensor = torch.randn(a.shape[1], device=a.device, generator=generator)
    return found


def _direction(a: Tensor, b: Tensor, start: Tensor, iters: int = 15, eps: float = 1e-8) -> Tensor:
    """float32 [in]: the direction that B A stretches most, up to its sign, of A [r, in] and B [out, r]."""
    down, up = a.float(), b.float()
    gram = up.mT @ up
    v: Tensor = start.to(down.device)
    v = v / (v.norm() + eps)
    for _ in range(iters):
        v = down.mT @ (gram @ (down @ v))
        v = v / (v.norm() + eps)
    return v


# A graph has no generators: there it is an operator, which computes them in each call.
_ops: Any = torch.library.Library("fastpeft", "FRAGMENT")  # type: ignore[no-untyped-call]
_ops.define("arrow_directions(Tensor[] a, Tensor[] b, int? seed) -> Tensor",
            tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded))  # fmt: skip
_ops.impl(
    "arrow_directions",
    lambda a, b, seed: torch.stack([_direction(p, q, _drawn(p, seed)) for p, q in zip(a, b, strict=True)]),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "fastpeft::arrow_directions",
    lambda a, b, seed: a[0].new_empty((len(a), a[0].shape[1]), dtype=torch.float32), lib=_ops,
)  # fmt: skip


class ArrowLoraLinearLayer(nn.Module):
    """The router of one layer: settings, and what it keeps of the adapters. task_adapter_names: those of its last
    forward."""

    def __init__(self, config: ArrowConfig) -> None:
        super().__init__()
        self.top_k, self.temperature = config.top_k, config.router_temperature
        self.use_gks, self.rng_seed = config.use_gks, config.rng_seed
        self.task_adapter_names = list(config.task_adapter_names or ())
        self.gks_adapter_names = list(config.gks_adapter_names or ())
        self._prototypes, self._pure, self._joined = (Cache(by_version=True) for _ in range(3))
        self._starts: list[Tensor] = []  # drawn once, so that a prototype is another only where its adapter is

    def top_right_singular_vec_from_BA(
        self, A: Tensor, B: Tensor, iters: int = 15, eps: float = 1e-8, start: Tensor | None = None
    ) -> Tensor:
        """float32 [in]: the direction that B A stretches most, up to its sign. A: [r, in]. B: [out, r]. start: [in],
        drawn by default."""
        return _direction(A, B, _drawn(A, self.rng_seed) if start is None else start, iters, eps)

    def prototypes(self, state: tuple[int, ...], a: list[Tensor], b: list[Tensor]) -> Tensor:
        """[n, in] of n adapters of one rank. state: `layer_state`, as below."""

        def make() -> Tensor:
            if torch.compiler.is_compiling():
                found: Tensor = torch.ops.fastpeft.arrow_directions(a, b, self.rng_seed)
            else:
                self._starts += [_drawn(one, self.rng_seed) for one in a[len(self._starts) :]]
                each = zip(a, b, self._starts, strict=False)
                found = torch.stack([self.top_right_singular_vec_from_BA(p, q, start=v) for p, q, v in each])
            return found.to(a[0].dtype)

        kept: Tensor = self._prototypes.get([*a, *b], state, make)
        return kept

    def pure(
        self, state: tuple[int, ...], a: list[Tensor], b: list[Tensor], general: list[list[Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """A and B without the mean of the general adapters'."""
        every = [*a, *b, *general[0], *general[1]]

        def made() -> tuple[list[Tensor], list[Tensor]]:
            mean = [torch.stack(some).detach().mean(0) for some in general]
            return [t - mean[0] for t in a], [t - mean[1] for t in b]

        if torch.is_grad_enabled() and any(t.requires_grad for t in (*a, *b)):
            return made()
        found: tuple[list[Tensor], list[Tensor]] = self._pure.get(every, state, made)
        return found

    def weights(self, x: Tensor, prototypes: Tensor) -> Tensor:
        """[..., n] of tokens [..., in], zero for all but top_k; the sign of a prototype has no part in them."""
        sim = (x @ prototypes.to(x.dtype).mT).abs()
        top, index = sim.topk(self.top_k, dim=-1)
        chosen = torch.full_like(sim, float("-inf")).scatter(-1, index, top)
        return torch.softmax(chosen / self.temperature, dim=-1)


class _Experts(NamedTuple):
    """The adapters that a layer routes between, and the modules that have their A and B; general: those of the general
    adapters' A, and of their B, where they are subtracted."""

    views: list[AdapterView]
    a: list[Any]
    b: list[Any]
    general: list[list[Any]]


@variant("arrow_config", ArrowConfig)
class Arrow(Lora):
    examples: ClassVar[Any] = ()  # a layer needs other adapters for it to route between
    mergeable = False
    kernel = "lora_mixture"

    def make_state(self, config: Any, info: LayerInfo, shared: Any) -> State:
        return {**super().make_state(config, info, shared), "lora_arrow": ArrowLoraLinearLayer(config.arrow_config)}

    def mergeable_in(self, s: Any, info: LayerInfo) -> str | None:
        return "Cannot merge an active Arrow router adapter. Remove it first"

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        mixed = self._mixed(s, x, self._experts(s))
        delta: Tensor = s.lora_dropout(added(s.cast(x, mixed.a[0].dtype), mixed))
        return y + delta

    def fused(self, layer: AdaptedLayer, s: Any, shared: Any) -> Fused | None:
        drops = s.lora_dropout
        kept: list[tuple[tuple[int, ...], _Experts]] = []  # for as long as the layer does not change

        def of(x: Tensor) -> Mixed | None:
            if type(drops) is not nn.Identity and drops.training:
                return None
            if kept and kept[0][0] == layer_state(s) and not kept[0][1].a[0].weight.is_meta:  # once it is offloaded
                return self._mixed(s, x, kept[0][1])
            experts = self._experts(s)
            if not (torch.compiler.is_compiling() or is_apart(layer.lora_A) or is_apart(layer.lora_B)) and all(
                type(module) is nn.Linear for modules in (experts.a, experts.b, *experts.general) for module in modules
            ):
                kept[:] = [(layer_state(s), experts)]
            return self._mixed(s, x, experts)

        return fused(layer, of)

    def _mixed(self, s: Any, x: Tensor, experts: _Experts) -> Mixed:
        """The adapters and their weights for x."""
        router: ArrowLoraLinearLayer = s.lora_arrow
        state = layer_state(s)
        a, b = ([module.weight for module in modules] for modules in (experts.a, experts.b))
        if router.use_gks:
            general = [[module.weight for module in modules] for modules in experts.general]
            a, b = router.pure(state, a, b, general)
        mix = router.weights(s.cast(x, a[0].dtype), router.prototypes(state, a, b))
        scaling = [view.scaling for view in experts.views]
        return Mixed(*together(router._joined, state, a, b), mix, scaling, masked=True)

    def _experts(self, s: Any) -> _Experts:
        """The adapters of the layer. ValueError where they do not fit together."""
        router: ArrowLoraLinearLayer = s.lora_arrow
        others = {n: (m, view) for n, (m, view) in s.neighbours().items() if isinstance(m, Lora)}
        tasks, general = [], []
        for name, (method, _) in others.items():
            if name in router.gks_adapter_names or _GENERAL.fullmatch(name):
                general.append(name)
            elif not isinstance(method, Arrow):
                tasks.append(name)
        if router.task_adapter_names != tasks:
            router.task_adapter_names = tasks
        where = f"Arrow in {s.layer_shown}"
        if len(tasks) < router.top_k:
            raise ValueError(f"{where} has {len(tasks)} LoRA adapters, expected top_k={router.top_k} at least.")
        if router.use_gks and not general:
            raise ValueError(f"{where} has no general adapter ('{GKS_ADAPTER_PREFIX}0'), which use_gks=True subtracts.")
        parts = ("lora_A", "lora_B")
        a, b = (self._modules(where, others, tasks, name) for name in parts)
        of_general = [self._modules(where, others, general, name) for name in parts] if router.use_gks else []
        return _Experts([others[name][1] for name in tasks], a, b, of_general)

    @staticmethod
    def _modules(where: str, others: Any, names: list[str], part: str) -> list[nn.Module]:
        found = []
        for name in names:
            method, view = others[name]
            if type(method) is not Lora or view.lora_bias:
                what = "one with lora_bias" if type(method) is Lora else f"a {type(method).__name__}"
                raise ValueError(f"{where} mixes plain LoRA adapters, {name!r} is {what}.")
            found.append(getattr(view, part))
            if (r := view.r) != (first := others[names[0]][1].r):
                raise ValueError(f"{where}: [{name}] rank mismatch: {r} != {first} of [{names[0]}]")
        return found
