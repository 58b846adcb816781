"""LoRA inside vLLM on this project's kernels: a general plugin that puts `LoraOps` before vLLM's punica wrapper.

vLLM computes the base itself and asks its punica wrapper to add LoRA to the finished y. Its stacks are lora_a
[S, 1, r, K] and lora_b [S, 1, N, r], of one slot an adapter: `peft_kernels.lora_shrink` and `lora_expand`. On a GPU
that is two launches of Triton for up to four slices of a layer (q, k and v), none of which waits for the device; the
rows are put in order of their adapters once a step, in `update_metadata`. On a CPU the native library serves.
Adapters of experts (MoE) stay with vLLM's own wrapper, which is the base class.

It acts only where `VLLM_PLUGINS` names it: `VLLM_PLUGINS=fastpeft vllm serve MODEL --enable-lora ...`. vLLM is imported
when `register` or `PunicaWrapper` is used. Signatures are those of vLLM 0.33.0 (tests/golden/vllm_punica_0.33.0.json);
of another version they are compared when the wrapper is made.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import logging
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from peft_kernels import RowGroups, lora_expand, lora_shrink

logger = logging.getLogger("fastpeft.vllm")

NAME = "fastpeft"  # of the entry point, for VLLM_PLUGINS
TESTED = "0.33.0"

_replaced: list[str] = []  # the qualified name of the platform's own wrapper, once registered


class LoraOps:
    """The methods of vLLM's `PunicaWrapperBase` that compute LoRA of linear layers, embeddings and heads.

    Rows of x are tokens, or for heads those that are sampled; what vLLM pads them with has no adapter. All write into
    y, whose rows without an adapter keep their values.
    """

    _token_lora_indices: Tensor
    _sampler_indices: Tensor
    indices_len: list[int | None]
    _rows: RowGroups | None = None  # of the tokens
    _sampled: RowGroups | None = None

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        super().__init__(max_num_batched_tokens, max_batches, device, **kwargs)  # type: ignore[call-arg]
        self._token_lora_indices.fill_(-1)
        self._sampler_indices.fill_(-1)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)  # type: ignore[misc]
        # The tensors stay in place for recorded graphs, which may have more rows than there are tokens now.
        self._token_lora_indices[self.indices_len[0] :].fill_(-1)
        self._sampler_indices[self.indices_len[1] :].fill_(-1)
        slots = len(lora_index_to_id)
        self._rows = _in_order(self._rows, self._token_lora_indices, slots, True)
        self._sampled = _in_order(self._sampled, self._sampler_indices, slots, True)

    def _of_tokens(self, stacks: tuple[Tensor, ...]) -> RowGroups:
        self._rows = _in_order(self._rows, self._token_lora_indices, stacks[0].shape[0])
        return self._rows

    def _of_sampled(self, stack: Tensor) -> RowGroups:
        self._sampled = _in_order(self._sampled, self._sampler_indices, stack.shape[0])
        return self._sampled

    def add_shrink(
        self, y: tuple[Tensor, ...] | Tensor, x: Tensor, lora_a_stacked: tuple[Tensor, ...], scale: float, **kwargs: Any
    ) -> Tensor | None:
        """y[i] [M, r] = scale * x A^T of slice i."""
        _write(y, _shrink(x, lora_a_stacked, self._of_tokens(lora_a_stacked), scale))
        return None

    def add_expand(
        self,
        y: Tensor,
        x: tuple[Tensor, ...] | Tensor,
        lora_b_stacked: tuple[Tensor, ...],
        output_slices: tuple[int, ...],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> Tensor | None:
        """Columns of y: += x[i] B^T of slice i, from `offset_start` on; without add_inputs: =."""
        low = [part.reshape(1, -1, part.shape[-1]) for part in x]
        _expand(y, low, lora_b_stacked, self._of_tokens(lora_b_stacked), output_slices, offset_start, add_inputs)
        return None

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> Tensor | None:
        """y += x B^T; x [M, r] are the rows of lora_a that the tokens look up."""
        return self.add_expand(y, (x,), (lora_b_stacked,), (0,), add_inputs=add_inputs)

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        *,
        buffer: tuple[Tensor, ...] | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """Columns of y: += scale * (x A^T) B^T of each slice. buffer: as for `add_shrink`, where vLLM wants x A^T."""
        rows, add = self._of_tokens(lora_a_stacked), kwargs.pop("add_inputs", True)
        low = _shrink(x, lora_a_stacked, rows, scale)
        if buffer is not None:
            _write(buffer, low)
        _expand(y, low.unbind(), lora_b_stacked, rows, output_slices, 0, add)
        return None

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: Any,
        *,
        buffer: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """y += scale * (x A^T) B^T for rows that are sampled."""
        rows = self._of_sampled(lora_a_stacked)
        low = _shrink(x, (lora_a_stacked,), rows, scale)
        if buffer is not None:
            _write((buffer,), low)
        _expand(y, low.unbind(), (lora_b_stacked,), rows, (0,))
        return None

    def apply_lora_full_linear(
        self, y: Tensor, x: Tensor, weight_stacked: Tensor, bias_stacked: Tensor, module_enabled: Tensor
    ) -> Tensor | None:
        """y = x W^T + bias of the row's slot, where that has a whole head of its own."""
        own = _shrink(x, (weight_stacked,), self._of_sampled(weight_stacked), 1.0)[0].sum(0)
        y.copy_(self._select_full_linear_output(y, own, bias_stacked, module_enabled))  # type: ignore[attr-defined]
        return None


# What vLLM's wrapper keeps: adapters of experts.
LEFT = frozenset({"moe_lora_align_block_size", "add_lora_fused_moe", "add_lora_w13", "add_lora_w2"})


def _in_order(rows: RowGroups | None, indices: Tensor, slots: int, changed: bool = False) -> RowGroups:
    """The rows in order of their adapters. Their tensors stay in place for recorded graphs."""
    if rows is None or rows.slots != slots:
        return RowGroups(indices, slots)
    if changed:
        rows.refresh()
    return rows


def _shrink(x: Tensor, a: tuple[Tensor, ...], rows: RowGroups, scale: float) -> Tensor:
    """scale * x A^T of each slice, [slices, parts, M, r]."""
    return lora_shrink(x.reshape(-1, x.shape[-1]), [t.squeeze(1) for t in a], rows, scale)


def _write(y: tuple[Tensor, ...] | Tensor, low: Tensor) -> None:
    """Into the first rows and columns of each slice of y, in its dtype."""
    for out, part in zip(y, low, strict=True):
        out = out.view(-1, out.shape[-1])  # never a copy: it is written into
        out[: part.shape[1], : part.shape[2]].copy_(part[0] if part.shape[0] == 1 else part.sum(0))


def _expand(
    y: Tensor, low: Sequence[Tensor], b: tuple[Tensor, ...], rows: RowGroups, widths: Sequence[int], offset: int = 0,
    add: bool = True,
) -> None:  # fmt: skip
    """low B^T of each slice into columns `offset` and following of y, rounded once; not `add`: in place of them.

    A head's y may be narrower than its stack, which is padded otherwise.
    """
    y = y.view(-1, y.shape[-1])[: low[0].shape[1]]  # never a copy: it is written into
    offsets = list(itertools.accumulate(widths[:-1], initial=offset))
    lora_expand(y, low, [t.squeeze(1) for t in b], rows, offsets, add)


def parameters(signature: inspect.Signature) -> list[tuple[str, str, Any]]:
    """(name, kind, default) of each parameter: what callers depend on."""
    return [
        (p.name, p.kind.name, None if p.default is p.empty else repr(p.default)) for p in signature.parameters.values()
    ]


def methods(cls: type) -> dict[str, inspect.Signature]:
    """The public methods of a class and its bases, and `__init__`."""
    return {
        name: inspect.signature(value)
        for name, value in inspect.getmembers(cls, inspect.isfunction)
        if name == "__init__" or not name.startswith("_")
    }


def disagreements(theirs: dict[str, list[tuple[str, str, Any]]]) -> list[str]:
    """Members of `PunicaWrapperBase`, given as the parameters of its methods, in which `LoraOps` differs."""
    ours = methods(LoraOps)
    wrong = [f"{name} is new" for name in theirs if name not in ours and name not in LEFT]
    for name, signature in ours.items():
        if name not in theirs:
            wrong.append(f"{name} is gone")
        elif parameters(signature) != theirs[name]:
            wrong.append(f"{name} takes {theirs[name]}, not {parameters(signature)}")
    return wrong


def _vllm(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = f"{__name__} needs vLLM (made for {TESTED}), whose {module} cannot be imported here"
        raise ImportError(f"{what}: {error}") from error


def wrapper_class(qualified_name: str) -> type:
    """A subclass of this wrapper of vLLM's with the methods of `LoraOps`. Raises RuntimeError where vLLM's differ."""
    module, _, name = qualified_name.rpartition(".")
    base = getattr(_vllm(module), name)
    contract = _vllm("vllm.lora.punica_wrapper.punica_base").PunicaWrapperBase
    wrong = disagreements({name: parameters(s) for name, s in methods(contract).items()})
    if wrong:
        found = getattr(_vllm("vllm"), "__version__", "unknown")
        raise RuntimeError(
            f"vLLM {found} has another PunicaWrapperBase than {TESTED}: {'; '.join(wrong)}. "
            f"Use vLLM {TESTED}, or leave {NAME!r} out of VLLM_PLUGINS"
        )
    return type("PunicaWrapper", (LoraOps, base), {"__module__": __name__})


def register() -> None:
    """vLLM's entry point, called in each of its processes, maybe more than once."""
    if NAME not in os.environ.get("VLLM_PLUGINS", "").split(","):
        logger.debug("not used: VLLM_PLUGINS does not name %r", NAME)
        return
    platform = type(_vllm("vllm.platforms").current_platform)
    current = platform.get_punica_wrapper()
    if current == f"{__name__}.PunicaWrapper":
        return
    _replaced[:] = [current]
    platform.get_punica_wrapper = classmethod(lambda cls: f"{__name__}.PunicaWrapper")
    logger.info("LoRA of linear layers, embeddings and heads: %s over %s", __name__, current)


def __getattr__(name: str) -> Any:
    """`PunicaWrapper`, by which vLLM finds the class: it exists once vLLM's platform is known."""
    if name != "PunicaWrapper":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _vllm("vllm")
    if not _replaced:
        raise RuntimeError(f"vLLM's platform is not known yet: set VLLM_PLUGINS={NAME} and call {__name__}.register()")
    globals()["PunicaWrapper"] = wrapper_class(_replaced[0])
    return globals()["PunicaWrapper"]
