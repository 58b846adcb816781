"""Stacks of LoRA adapters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AdapterStack:
    """Several LoRA adapters of one linear layer, whose ranks may differ, packed by rank.

    a: [P, K] floating point; rows starts[i] .. starts[i] + ranks[i] are adapter i's lora_A. b: [P, N]; the same rows
    are its lora_B **transposed**. starts, ranks: int64 [S]; ranks[i] = 0 is a free slot, which acts as the base alone.
    scaling: float32 [S]. max_rank: an upper bound of ranks, which sizes kernels: it does not follow the values.
    Adapters share no rows; rows that no adapter owns are never read. A padded stack [S, R, K] is its view(-1, K) with
    starts = arange(S) * R. Tensors may be overwritten in place between calls. `multi_lora_linear` checks all of it.
    """

    a: Tensor
    b: Tensor
    starts: Tensor
    ranks: Tensor
    scaling: Tensor
    max_rank: int

    @classmethod
    def pack(cls, adapters: Sequence[tuple[Tensor, Tensor, float]]) -> AdapterStack:
        """The stack of (lora_A [r, K], lora_B [N, r], scaling) each, one after the other; differentiable in A and B.

        Ranks may be 0. Raises ValueError where there is none, or shapes do not fit.
        """
        if not adapters:
            raise ValueError("AdapterStack.pack: adapters must be at least one (A, B, scaling), got none")
        k, n = adapters[0][0].shape[-1], adapters[0][1].shape[0]
        for i, (a, b, _) in enumerate(adapters):
            if a.dim() != 2 or a.shape[1] != k or tuple(b.shape) != (n, a.shape[0]):
                raise ValueError(
                    f"AdapterStack.pack: adapters[{i}] must be A [r, {k}] and B [{n}, r] like the first, "
                    f"got {tuple(a.shape)} and {tuple(b.shape)}"
                )
        ranks = [a.shape[0] for a, _, _ in adapters]
        starts = [sum(ranks[:i]) for i in range(len(ranks))]
        device = adapters[0][0].device
        return cls(
            a=torch.cat([a for a, _, _ in adapters]),
            b=torch.cat([b.t() for _, b, _ in adapters]),
            starts=torch.tensor(starts, dtype=torch.int64, device=device),
            ranks=torch.tensor(ranks, dtype=torch.int64, device=device),
            scaling=torch.tensor([scaling for _, _, scaling in adapters], dtype=torch.float32, device=device),
            max_rank=max(ranks),
        )
