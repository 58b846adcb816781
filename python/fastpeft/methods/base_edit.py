"""Edits of a base weight that come with an adapter (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ, KaSA).

A method's `make_state` puts a `BaseEdit` under the key `EDIT`; the layer carries it out when the adapter goes in, and
takes it back, byte for byte, when the adapter is deleted or unloaded.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

EDIT = "base_edit"


class BaseEdit:
    """used: attributes of the base layer that served to make the adapter, to be dropped once it is in. once: an equal
    edit of another adapter is not to be made again."""

    used: tuple[str, ...] = ()
    once = False

    def __call__(self, w: Tensor) -> Tensor:
        """The new W for W as the law names it, in at least float32."""
        raise NotImplementedError

    def removed_factors(self, w: Tensor) -> tuple[Tensor, Tensor] | None:
        """P [out, r] and Q [r, in] with W - P Q the new W, if there are such of a low rank."""
        return None


@dataclass(frozen=True)
class LowRankEdit(BaseEdit):
    """W - P Q, with P [out, r] and Q [r, in]."""

    p: Tensor
    q: Tensor
    used: tuple[str, ...] = ()

    def __call__(self, w: Tensor) -> Tensor:
        return w - (self.p.to(w) @ self.q.to(w)).reshape(w.shape)

    def removed_factors(self, w: Tensor) -> tuple[Tensor, Tensor]:
        return self.p.to(w), self.q.to(w)
