"""Write docs/families.md from the descriptions: `python tools/families_table.py [--check]`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

from fastpeft.families import known
from fastpeft.families.description import Attention, Mlp, Norm, Part, Together
from fastpeft.families.registry import families, parts
from made_files import write_or_check

TARGET = Path(__file__).resolve().parent.parent / "docs" / "families.md"
HEAD = """# Families of models

`fastpeft.accelerate(model)` makes the layers of a transformers model quicker where its family is described: one file
each in `python/fastpeft/families/known/`, which names the parts of the family's modules and holds no forward. The
forwards are the same for all of them (`attention.py`, `mlp.py`, `norms.py` beside that folder). What a description does
not cover stays transformers' own code; `print(fastpeft.accelerate(model))` counts it, with the reason. A family whose
modules torch computes in one kernel already (LayerNorm) has no entry for them. A forward that is a family's own gets
our attention all the same where it takes one from transformers' `AttentionInterface`. Experts are served in every
mixture that transformers marks (`use_experts_implementation`), and in Llama 4. `python tools/families_table.py` makes
this page.

A model that holds another family's text model is served with it: LLaVA and SmolVLM (Llama), Pixtral (Mistral),
PaliGemma (Gemma), InternVL (Qwen2). transformers 5.24 has every family of Liger-Kernel 0.8.5.

**A family of your own** is a file named as transformers names its folder, with `PARTS`: names of its classes and what
they are. The words are those of `python/fastpeft/families/description.py`.

**Packed rows and padding.** Several documents in a row (`position_ids` that start again, without an `attention_mask`
and a cache: `fastpeft train`, `DataCollatorWithFlattening`, TRL's `padding_free`), padding on either side, windows,
chunks and caches reach attention as a range of keys for each query. No mask of T x T elements is made on a CPU where
every layer's attention is served; a layer with code of its own gets transformers' mask, and so does the whole model
where a query does not see a range (holes in a mask, images that see themselves), in a static cache and in a compiled
graph (`masking.py`, `spans.py` beside that folder). Layers with a state (Mamba, linear attention, short convolutions)
run on from one document into the next, as they do without `accelerate`. A generated token sees all the keys and has no
mask: where transformers' fused attention has none, and in Gemma 2 and gpt-oss, whose own eager code adds a mask only if
it is given one. Padding and a full window bring it back.

| family | attention | MLP | norms |
|---|---|---|---|
"""


def own(part: Together) -> str:
    call = f"one call for {', '.join(f'`{name}`' for name in part.names)}"
    return "its own, around " + " and ".join(["our attention"] * part.attends + [call] * bool(part.names)) + (
        ", cross-attention" if part.other else "")  # fmt: skip


def attention(part: Part | None) -> str:
    if isinstance(part, Together):
        return own(part)
    if not isinstance(part, Attention):
        return "its own"
    words = ["fused q, k, v" if len(part.qkv) == 1 else "q, k, v in one call"]
    turns = {"halves": "rotary", "neighbours": "rotary of neighbours", None: "ALiBi" if part.alibi else "no rotation"}
    words.append(turns[part.turn] + (" in some layers" if part.turned else ""))
    if part.norms:
        words.append({"heads": "norms of heads", "whole": "norms of q and k", "turned": "norms after the rotation",
                      "apart": "a norm a head"}[part.normed])  # fmt: skip
    words += [word for word, has in (("soft cap", part.softcap), ("sinks", part.sinks), ("output gate", part.gated))
              if has]  # fmt: skip
    return ", ".join(words)


def mlp(part: Part | None) -> str:
    if isinstance(part, Together):
        return own(part)
    if not isinstance(part, Mlp):
        return "its own"
    return "plain" if len(part.up) == 1 and not part.halves else "gated, fused" if part.halves else "gated"


def norm(found: Iterable[Norm]) -> str:
    words = {("LayerNorm" if n.mean else "RMSNorm") + (" of 1 + weight" if n.offset else "") for n in found}
    return ", ".join(sorted(words)) or "torch's"


def table() -> str:
    rows = []
    for name in families():
        described = parts(name).values()
        attends = [p for p in described if isinstance(p, Attention) or (isinstance(p, Together) and p.attends)]
        mlps = [p for p in described if isinstance(p, Mlp) or (isinstance(p, Together) and not p.attends)]
        title = " ".join((importlib.import_module(f"{known.__name__}.{name}").__doc__ or "").split()).rstrip(".")
        cells = ("; ".join(map(attention, attends)) or "its own", mlp(next(iter(mlps), None)),
                 norm(p for p in described if isinstance(p, Norm)))  # fmt: skip
        rows.append(f"| `{name}`: {title} | {' | '.join(cells)} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(write_or_check({TARGET: table()}))
