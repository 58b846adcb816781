"""How large a pool's stacks are.

A row, over all layers, is `row_bytes`: the sum of (in_features + out_features) times the size of the dtype. An adapter
takes a block of 8, 16, 32, 64 ... rows in every layer, whichever of them it acts on; ranks and scalings add 12 bytes
per slot and layer. Without a byte budget there are as many rows as the `max_resident` largest adapters of the directory
need, and at least one block of `max_rank`.

Prompts have tensors of their own, made when they come: `virtual_tokens` bounds them, as many as the `max_resident`
largest prompts of the directory have, and with a byte budget at most a quarter of it, which the rows then lack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..files.checks import list_some
from ..inject.modules import checked_info
from ..methods.lora.lora import LoraConfig
from ..weights.base import LayerInfo
from .blocks import SMALLEST, block_size
from .buffers import row_bytes, slot_bytes
from .files import Registry, read_config
from .layers import Selector
from .prompts import token_bytes

LARGEST_BY_DEFAULT = 256  # so that one folder that claims rank 60,000 does not size everybody's stacks
WITHOUT_ADAPTERS = 64
LONGEST_BY_DEFAULT = 2048  # virtual tokens of a prompt; of the size of cartridges
WITHOUT_PROMPTS = 128
STACKED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Sizes:
    """infos: of the pool's layers, by name, in the model's order. rows, slots, max_rank: of each stack.
    virtual_tokens: of all prompts in slots; max_virtual_tokens: of one; token_bytes: of one token."""

    infos: dict[str, LayerInfo]
    slots: int
    rows: int
    max_rank: int
    virtual_tokens: int
    max_virtual_tokens: int
    token_bytes: int


def plan_sizes(
    selector: Selector,
    registry: Registry,
    target_modules: str | Sequence[str] | None,
    max_resident: int | None,
    byte_budget: int | None,
    dtype: torch.dtype | None,
    max_rank: int | None,
    max_virtual_tokens: int | None = 0,
    **threads: int | None,
) -> Sizes:
    """Sizes from what the directory holds and what was asked for (see `AdapterPool`). threads: counts to check, too."""
    if dtype is not None and dtype not in STACKED:
        raise ValueError(f"AdapterPool: dtype must be one of {', '.join(map(str, STACKED))}, got {dtype}")
    asked = {"max_resident": max_resident, "byte_budget": byte_budget, "max_rank": max_rank, **threads}
    for name, value in asked.items():
        if value is not None and value < 1:
            raise ValueError(f"AdapterPool: {name} must be at least 1, got {value}")
    if max_virtual_tokens is not None and max_virtual_tokens < 0:
        raise ValueError(f"AdapterPool: max_virtual_tokens must not be negative, got {max_virtual_tokens}")
    found = _configs(registry, max_virtual_tokens != 0)
    configs = [config for config in found if isinstance(config, LoraConfig)]
    lengths = [int(config.num_virtual_tokens) for config in found if not isinstance(config, LoraConfig)]
    names = _names(selector, target_modules, configs, bool(lengths))
    infos = {name: checked_info(selector.sites[name]) for name in names}
    devices = {info.device for info in infos.values()}
    if len(devices) > 1:
        listed = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"AdapterPool: the layers are on several devices ({listed}), a pool serves those of one")
    tops = [max(config.r, *(config.rank_pattern or {}).values(), 1) for config in configs]
    given = byte_budget
    longest, tokens, a_token = _tokens(selector, lengths, max_virtual_tokens, max_resident, byte_budget)
    if byte_budget is not None:
        byte_budget -= tokens * a_token
    if max_rank is None:
        max_rank = max((top for top in tops if top <= LARGEST_BY_DEFAULT), default=WITHOUT_ADAPTERS)
    block = block_size(max_rank)
    row, slot = row_bytes(infos.values(), dtype), slot_bytes(len(infos))
    if max_resident is None:
        if byte_budget is None:
            raise ValueError("AdapterPool: give max_resident, byte_budget or both")
        max_resident = max(1, byte_budget // (SMALLEST * row + slot))
        rows = byte_budget // max(row, 1)  # limited below
    else:
        blocks = sorted((block_size(top) for top in tops if top <= max_rank), reverse=True)[:max_resident]
        rows = sum(blocks) + (max_resident - len(blocks)) * (blocks[0] if blocks else block)
    rows = max(rows, block)
    if byte_budget is not None and row:
        room = (byte_budget - max_resident * slot) // row // SMALLEST * SMALLEST
        if room < block:
            raise ValueError(
                f"AdapterPool: byte_budget={given} has room for {max(room, 0)} rows of {row} bytes beside "
                f"{max_resident} slots{f' and {tokens} virtual tokens' if tokens else ''}, one adapter of "
                f"max_rank={max_rank} takes {block}"
            )
        rows = min(rows, room)
    return Sizes(infos, max_resident, rows, max_rank, tokens, longest, a_token)


def _tokens(
    selector: Selector, lengths: list[int], longest: int | None, max_resident: int | None, byte_budget: int | None
) -> tuple[int, int, int]:
    """The virtual tokens that one prompt may have, those of all in slots, and the bytes of one. lengths: of the
    directory's prompts."""
    if longest == 0:
        return 0, 0, 0
    if longest is None:
        longest = max((n for n in lengths if n <= LONGEST_BY_DEFAULT), default=WITHOUT_PROMPTS)
    a_token = token_bytes(selector.model)
    largest = sorted((n for n in lengths if n <= longest), reverse=True)[:max_resident]
    each = largest[0] if largest else longest
    wanted = None if max_resident is None else sum(largest) + (max_resident - len(largest)) * each
    if byte_budget is not None:
        quarter = byte_budget // 4 // a_token
        wanted = quarter if wanted is None else min(wanted, quarter)
    return longest, max(longest, wanted or 0), a_token


def _configs(registry: Registry, prompts: bool) -> list[Any]:
    """The configurations of the adapters that have a usable one; what is wrong with others is said on `acquire`."""
    found = []
    for record in registry.records.values():
        try:
            found.append(read_config(record.folder, prompts))
        except (ValueError, TypeError, OSError, NotImplementedError):
            continue
    return found


def _names(
    selector: Selector, target_modules: str | Sequence[str] | None, configs: Sequence[LoraConfig], prompts: bool
) -> list[str]:
    """The pool's layers; none where the directory holds prompts alone."""
    if target_modules is not None:
        targets = target_modules if isinstance(target_modules, str) else list(target_modules)
        names = list(selector.names(LoraConfig(target_modules=targets)))
        if not names:
            raise ValueError(f"AdapterPool: target_modules={target_modules!r} select nothing in the model")
        refused = [why for why in map(selector.why_not, names) if why is not None]
        if refused:
            raise ValueError(f"AdapterPool: {list_some(refused, 3)}")
        return names
    wanted: set[str] = set()
    for config in configs:
        try:
            wanted.update(selector.names(config))
        except (ValueError, RuntimeError):  # of that adapter; it says so on `acquire`
            continue
    names = [name for name in selector.sites if name in wanted and selector.why_not(name) is None]
    if not names and not (prompts and not configs):
        raise ValueError(
            "AdapterPool: no adapter of the directory targets a layer of this model that can be served; give "
            "target_modules"
        )
    return names
