"""Cases of lora_tools and multi_tools that hypothesis draws; without it, as on some machine with a GPU, those serve."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from lora_tools import F32, FLOATS, Case, make
from multi_tools import MultiCase, make_stack


def draw_case(data: st.DataObject, m: int, k: int, dtype: torch.dtype) -> Case:
    """Any weight, features, adapter and dropout, for x [m, k] of `dtype`."""
    return make(
        m,
        data.draw(st.integers(1, 140)),
        k,
        dtype=dtype,
        quant=data.draw(st.sampled_from(("nf4", "fp4", "dense"))),
        blocksize=data.draw(st.sampled_from((32, 64, 128))),
        nested=data.draw(st.booleans()),
        w_dtype=data.draw(st.sampled_from(FLOATS)),
        r=data.draw(st.integers(0, 40)),
        ab=data.draw(st.sampled_from(FLOATS)),
        p=data.draw(st.sampled_from((0.0, 0.05, 0.9))),
        bias=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 2**20)),
    )


def draw_multi(data: st.DataObject, m: int, k: int, dtype: torch.dtype) -> MultiCase:
    """Any weight, features, adapters and dropout, for x [m, k] of `dtype`."""
    base = draw_case(data, m, k, dtype)
    ab = F32 if base.a is None else base.a.dtype
    ranks = data.draw(st.lists(st.integers(0, 20), max_size=6))
    extra = data.draw(st.integers(0, 3))
    stack = make_stack(base.n, k, ranks, ab, data.draw(st.integers(0, 99)), max(ranks, default=0) + extra)
    rows = data.draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=m, max_size=m))
    if base.p and base.seed is None:
        base.seed = torch.tensor([7])
    return MultiCase(replace(base, a=None, b=None), stack, torch.tensor(rows, dtype=torch.int64))
