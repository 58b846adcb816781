"""Our own 4-bit linear layer, and turning a model's linear layers into it.

`NF4Linear` holds the bytes that bitsandbytes would hold, as plain buffers: nothing hangs on a Parameter subclass, so
the layer pickles, deep-copies and moves like any module, and its scales survive `.to(dtype)`. Its state dict has
bitsandbytes' pre-quantised keys (`weight`, `weight.absmax`, `weight.quant_map`, `weight.quant_state.bitsandbytes__nf4`,
...), so a saved model loads in transformers with bitsandbytes, and theirs loads here without bitsandbytes.

Format and method: QLoRA (arXiv 2305.14314).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from peft_kernels import QuantWeight, lora_linear
from peft_kernels.formats import BLOCKSIZES, QUANT_TYPES

from .bnb_state import DTYPES, NESTED_BLOCKSIZE, bnb_state, copy_of, parse_bnb_state
from .checks import AdapterFileError, list_some

_SCALES = ("absmax", "nested_absmax", "nested_code", "offset")

Progress = Callable[[int, int, str], None]


class NF4Linear(nn.Module):
    """A frozen linear layer whose weight is stored in 4 bits: `y = x W^T + bias` with x of [..., in_features].

    Buffers: `weight` (packed bytes, [ceil(in * out / 2), 1], as bitsandbytes shapes them), `absmax`, and when nested
    `nested_absmax`, `nested_code`, `offset`. `bias` is a Parameter that needs no gradient until asked to. The output
    has x's dtype; sums are float32. With `compute_dtype` x is cast to it first, as bitsandbytes does.
    """

    weight: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    nested_code: Tensor | None
    offset: Tensor | None

    def __init__(
        self, weight: QuantWeight, bias: Tensor | None = None, compute_dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.register_buffer("weight", None)
        for name in _SCALES:
            self.register_buffer(name, None, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.set_quant_weight(weight)

    @classmethod
    def empty(
        cls, in_features: int, out_features: int, bias: bool = False, quant_type: str = "nf4", blocksize: int = 64,
        nested: bool = True, compute_dtype: torch.dtype | None = None, dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
    ) -> NF4Linear:  # fmt: skip
        """A layer to load a state dict into."""
        numel = in_features * out_features
        nblocks = -(-numel // blocksize)

        def scales(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        weight = QuantWeight(
            packed=torch.empty(((numel + 1) // 2, 1), dtype=torch.uint8, device=device),
            absmax=torch.empty(nblocks, dtype=torch.uint8 if nested else torch.float32, device=device),
            shape=(out_features, in_features), quant_type=quant_type, blocksize=blocksize, dtype=dtype,
            nested_absmax=scales(-(-nblocks // NESTED_BLOCKSIZE)) if nested else None,
            nested_code=scales(256) if nested else None,
            offset=scales() if nested else None,
        )  # fmt: skip
        return cls(weight, torch.empty(out_features, dtype=dtype, device=device) if bias else None, compute_dtype)

    @classmethod
    def from_bnb(cls, layer: nn.Module) -> NF4Linear:
        """A layer over the bytes of a bitsandbytes `Linear4bit` (shared, not copied)."""
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                "this bitsandbytes layer ran in eval mode on a CPU, which repacks its bytes; "
                "call fastpeft.bnb_weights.undo_cpu_packing(layer.weight) before converting it"
            )
        weight = QuantWeight.from_bnb(layer.weight)
        compute_dtype = layer.compute_dtype if isinstance(layer.compute_dtype, torch.dtype) else None
        return cls(weight, layer.bias if isinstance(layer.bias, Tensor) else None, compute_dtype)

    # --- the weight -------------------------------------------------------------------------------------------------

    def quant_weight(self) -> QuantWeight:
        """The weight as the kernels take it; shares the buffers and is rebuilt only when they were replaced."""
        cached: QuantWeight | None = self.__dict__.get("_quant_weight")
        if cached is None or cached.packed is not self.weight or cached.absmax is not self.absmax:
            cached = QuantWeight(
                packed=self.weight, absmax=self.absmax, shape=(self.out_features, self.in_features),
                quant_type=self.quant_type, blocksize=self.blocksize, dtype=self.dtype,
                nested_absmax=self.nested_absmax, nested_code=self.nested_code,
                nested_blocksize=self.nested_blocksize, offset=self.offset,
            )  # fmt: skip
            self.__dict__["_quant_weight"] = cached
        return cached

    def set_quant_weight(self, weight: QuantWeight) -> None:
        """Replace the weight. Its tensors are kept, not copied, so an old `quant_weight()` restores the exact bytes."""
        if self.sharded:
            raise ValueError("this NF4Linear is sharded: load, requantise or merge before `fully_shard_model`")
        if len(weight.shape) != 2:
            raise ValueError(f"NF4Linear needs a weight of shape (out_features, in_features), got {weight.shape}")
        self.out_features, self.in_features = (int(n) for n in weight.shape)
        self.quant_type, self.blocksize, self.dtype = weight.quant_type, weight.blocksize, weight.dtype
        self.nested_blocksize = weight.nested_blocksize
        self.weight = weight.packed.detach().view(-1, 1)
        self.absmax = weight.absmax
        self.nested_absmax, self.nested_code, self.offset = weight.nested_absmax, weight.nested_code, weight.offset
        self.__dict__.pop("_quant_weight", None)

    @property
    def nested(self) -> bool:
        return self.nested_absmax is not None

    @property
    def sharded(self) -> bool:
        """Whether `share_parameters` was called."""
        return "weight" in self._parameters

    def share_parameters(self) -> None:
        """Hold `weight` and `absmax` as frozen parameters from now on, which FSDP2 shards; buffers it would not."""
        for name in ("weight", "absmax"):
            if name in self._buffers:
                held = self._buffers.pop(name)
                self._non_persistent_buffers_set.discard(name)
                assert held is not None
                self._parameters[name] = nn.Parameter(held, requires_grad=False)
        self.__dict__.pop("_quant_weight", None)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight as a dense [out_features, in_features] tensor, by default in the dtype that it came in."""
        from peft_kernels import dequantize_4bit

        return dequantize_4bit(self.quant_weight(), dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is None or self.compute_dtype == x.dtype:
            return lora_linear(x, self.quant_weight(), bias=self.bias)
        return lora_linear(x.to(self.compute_dtype), self.quant_weight(), bias=self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        nested = ", nested" if self.nested else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self.quant_type}, blocksize={self.blocksize}{nested}"
        )

    # --- moving and copying -----------------------------------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> NF4Linear:
        # `model.half()` and `.to(bfloat16)` reach every floating buffer; a rounded scale would be another weight.
        held = {name: self._buffers.pop(name) for name in ("weight", *_SCALES) if name in self._buffers}
        names = [name for name in ("weight", "absmax") if name in self._parameters]
        frozen: dict[str, Any] = {name: self._parameters.pop(name) for name in names}
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._buffers.update(held)
            self._parameters.update(frozen)
        for name, old in (*held.items(), *frozen.items()):
            if old is not None:
                new = fn(old)
                new = new if new.dtype == old.dtype else old.to(new.device)
                if name in held:
                    self._buffers[name] = new
                else:
                    self._parameters[name] = nn.Parameter(new, requires_grad=False)
        self.__dict__.pop("_quant_weight", None)
        return self

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state.pop("_quant_weight", None)
        return state

    # --- bitsandbytes' keys -----------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "absmax", None)  # of a sharded layer; its key is bitsandbytes'
        destination.update({prefix + key: value for key, value in bnb_state(self.quant_weight()).items()})

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool,
        missing_keys: list[str], unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        mine = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix + "weight")}
        bias_key = prefix + "bias"
        if self.bias is not None and bias_key in state_dict:
            value = state_dict[bias_key]
            if value.shape != self.bias.shape:
                error_msgs.append(
                    f"size mismatch for {bias_key}: {list(value.shape)}, expected {list(self.bias.shape)}"
                )
            elif self.bias.is_meta or local_metadata.get("assign_to_params_buffers", False):
                self.bias = nn.Parameter(value.detach(), requires_grad=self.bias.requires_grad)
            else:
                self.bias.data.copy_(value)
        elif self.bias is not None:
            missing_keys.append(bias_key)
        elif bias_key in state_dict:
            unexpected_keys.append(bias_key)
        if "weight" not in mine:
            missing_keys.append(prefix + "weight")
            return
        try:
            weight = parse_bnb_state(mine, prefix)
            if tuple(weight.shape) != (self.out_features, self.in_features):
                raise AdapterFileError(
                    f"size mismatch for {prefix}weight: a 4-bit weight of {tuple(weight.shape)}, the layer is "
                    f"{(self.out_features, self.in_features)}"
                )
        except (AdapterFileError, ValueError, TypeError) as error:
            error_msgs.append(str(error))
            return
        if not (self.weight.is_meta or local_metadata.get("assign_to_params_buffers", False)):
            # As `load_state_dict` does for parameters: a copy on the layer's own device, not the caller's tensors.
            weight = copy_of(weight, self.weight.device)
        self.set_quant_weight(weight)


# --- whole models ---------------------------------------------------------------------------------------------


def quantize_model(
    model: nn.Module,
    quant_type: str = "nf4",
    blocksize: int = 64,
    double_quant: bool = True,
    skip: Iterable[str] = ("lm_head",),
    compute_dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Replace every `nn.Linear` (and GPT-2's `Conv1D`) of `model`, in place, by an `NF4Linear`; returns the model.

    skip: module names, whole or as dotted parts (`lm_head`, `layers.0.mlp`). Layers whose weight is shared with another
    module (a tied output head) stay dense whatever `skip` says. progress(done, total, name) is called per layer.
    First everything is checked, so that a bad layer leaves the model as it was; then one layer at a time is
    quantised and its dense weight released. A transformers model also gets the `quantization_config` and the attributes
    that Trainer and `save_pretrained` look for. Raises ValueError for unknown types, block sizes and NaN weights.
    """
    from peft_kernels import quantize_4bit

    if quant_type not in QUANT_TYPES or blocksize not in BLOCKSIZES:
        expected = f"one of {list(QUANT_TYPES)} at one of {BLOCKSIZES}"
        raise ValueError(f"quantize_model: {quant_type!r} at blocksize {blocksize!r}, expected {expected}")
    skip = [skip] if isinstance(skip, str) else list(skip)
    plan, kept = _plan(model, skip)
    if not plan:
        raise ValueError(f"quantize_model: no linear layer to quantise in {type(model).__name__} (skip={skip})")
    total, done = len(plan), 0
    while plan:
        name, parent, child = plan.popleft()
        layer: Any = parent._modules[child]
        dense = layer.weight.detach()
        dense = dense.t() if _is_conv1d(layer) else dense
        weight = quantize_4bit(dense.contiguous(), quant_type, blocksize, double_quant)
        new = NF4Linear(weight, layer.bias, compute_dtype).train(layer.training)
        parent._modules[child] = new
        del layer, dense
        done += 1
        if progress is not None:
            progress(done, total, name)
    from .integrations import transformers_nf4

    transformers_nf4.mark_quantized(model, quant_type, double_quant, compute_dtype, kept)
    return model


def _plan(model: nn.Module, skip: list[str]) -> tuple[deque[tuple[str, nn.Module, str]], list[str]]:
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    plan: deque[tuple[str, nn.Module, str]] = deque()
    kept: list[str] = []
    bad: list[str] = []
    for parent_name, parent in model.named_modules():
        for child, layer in parent.named_children():
            if not (type(layer) is nn.Linear or _is_conv1d(layer)):
                continue
            name = f"{parent_name}.{child}" if parent_name else child
            if owners[id(layer.weight)] > 1 or any(f".{part}." in f".{name}." for part in skip):
                kept.append(name)
                continue
            plan.append((name, parent, child))
            if layer.weight.is_meta:
                raise ValueError(f"quantize_model: {name} is on the meta device; load its weights first")
            if layer.weight.dtype not in DTYPES.values() or not _is_finite(layer.weight):
                bad.append(name)
    if bad:
        raise ValueError(f"quantize_model: NaN, infinite or not float32/16 weights in {list_some(bad)}")
    return plan, kept


def _is_finite(weight: Tensor) -> bool:
    # One pass and no mask; float64 holds the sum of any float32 values.
    return bool(torch.isfinite(weight.detach().sum(dtype=torch.float64)))


def _is_conv1d(layer: nn.Module) -> bool:
    # By name, so that transformers need not be imported: GPT-2's linear layer, which stores [in, out].
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace every `NF4Linear` by a dense `nn.Linear`, in place; returns the model."""
    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            if isinstance(layer, NF4Linear):
                with torch.device("meta"):
                    dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                dense.weight = nn.Parameter(layer.dequantize(dtype), requires_grad=False)
                if layer.bias is not None:
                    dense.bias = nn.Parameter(layer.bias.detach().to(dense.weight.dtype), requires_grad=False)
                parent._modules[child] = dense.train(layer.training)
    from .integrations import transformers_nf4

    transformers_nf4.unmark_quantized(model)
    return model


def from_bitsandbytes(model: nn.Module) -> nn.Module:
    """Replace every bitsandbytes `Linear4bit` of `model`, in place, by an `NF4Linear` over the same bytes."""
    for parent in list(model.modules()):
        for child, layer in list(parent.named_children()):
            if any(base.__name__ == "Linear4bit" for base in type(layer).__mro__):
                parent._modules[child] = NF4Linear.from_bnb(layer).train(layer.training)
    return model
