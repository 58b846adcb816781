"""A tensor that is made when it is asked for.

Code that does not know of it gets the real tensor, made at that moment and kept; what a subclass can answer without it
(`_lazily`) is answered without.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

plain = torch._C.DisableTorchFunctionSubclass  # within it torch sees the empty tensor itself
_GETTERS = (
    "shape", "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_cpu", "is_meta", "layout", "is_sparse",
    "is_quantized", "is_nested", "is_mps", "is_xpu", "is_leaf", "grad", "grad_fn", "_backward_hooks",
)  # fmt: skip
_OF_THE_SHELL = {getattr(Tensor, name).__get__ for name in _GETTERS} | {
    Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.is_floating_point, torch.is_floating_point,
    Tensor.is_complex, torch.is_complex, Tensor.get_device, Tensor.element_size, Tensor.is_contiguous, Tensor.__len__,
    Tensor.__hash__, Tensor.is_inference,
}  # fmt: skip


class LazyTensor(Tensor):
    """A tensor of which there are shape, dtype and device; `made` makes the rest."""

    _made: Tensor | None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF_THE_SHELL:
            with plain():
                return func(*args, **kwargs)
        if args and isinstance(args[0], LazyTensor) and not args[0]._stands():
            found = args[0]._lazily(func, args[1:], kwargs)
            if found is not NotImplemented:
                return found
        name = getattr(func, "__name__", str(func))
        writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or "out" in kwargs
        writes = writes or (name.startswith("__i") and name.endswith("__") and name not in ("__invert__", "__index__"))
        real = torch.utils._pytree.tree_map_only(LazyTensor, lambda t: t.made(name, writes), (args, kwargs))
        return func(*real[0], **real[1])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a plain function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Calls that come here by no function of torch (those of C++) get the real tensor, too."""
        real = torch.utils._pytree.tree_map_only(
            LazyTensor, lambda t: t.made(str(func), False).detach(), (args, kwargs or {})
        )
        return func(*real[0], **real[1])

    def _stands(self) -> bool:
        """True if the real tensor is there, which someone may have written to."""
        return self._made is not None

    def made(self, why: str, shared: bool = False) -> Tensor:
        """The real tensor. why: name of the function that needs it; shared: someone writes to it."""
        raise NotImplementedError

    def _lazily(self, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """func(self, *rest, **kwargs) where it can be had without the real tensor; NotImplemented where not."""
        return NotImplemented
