"""Cases of lora_tools that hypothesis draws."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from lora_tools import FLOATS, Case, make


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
