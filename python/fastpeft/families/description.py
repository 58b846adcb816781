"""The words that describe a family of models: which classes have which parts, and under what names.

A description is data. `attention.py`, `mlp.py` and `norms.py` compute what it says; a family's file (`known/`) holds no
forward. What a class of transformers does beyond these words stays its own code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

Module = Any  # of transformers: its attributes are what a description names


@dataclass(frozen=True)
class Part:
    """A class of a family's modules. served: says of a module that it is as described; None: each is."""

    name: ClassVar[str] = ""  # in reports
    served: Callable[[Module], bool] | None = None


@dataclass(frozen=True)
class Attention(Part):
    """Self-attention. Fields are names of attributes of the module, "" where the family has no such thing.

    qkv: the projections of its input: three, or one whose output is all of them. order, of one: "parts", the heads of
    q, then those of k, then of v; "heads", a head's q, k and v side by side, or those of a group of heads with its k
    and v. out: the projection of its output. head_size: features of a head. norms: of q and of k; normed: which
    vectors, "heads" (each head), "whole" (all heads at once), "turned" (each head, after the rotation), "apart" (a norm
    a head, whose module takes [B, H, T, D]). heads_first: norms that take any shape get [B, H, T, D] from transformers'
    code, and so who listens to them.
    turn: how a head is rotated: its halves are the pairs, its neighbours are, or not at all. angles: where that
    differs, what the model's cosines are: "halves" (of the halves, for neighbours), "once" (each angle once). turned:
    says of a module that it rotates. scale: factor of the scores, "" for one by the root of the head's size.
    key_scale: factor of k. dropout: of probabilities; after: dropout of the output. softcap, sinks: of the scores.
    gated: q has a gate of the output beside it, head by head.
    alibi: an argument of the forward that is None or biases by ALiBi (arXiv 2108.12409); slopes are the paper's.
    residual: the forward's second argument is added to the output, after dropout of that probability.
    eager: transformers' fused attention cannot compute it, so a model's attention is "eager" by default.
    """

    name: ClassVar[str] = "attention"
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    order: Literal["parts", "heads"] | Callable[[Module], str] = "parts"
    out: str = "o_proj"
    head_size: str = "head_dim"
    norms: tuple[str, str] | None = None
    normed: Literal["heads", "whole", "turned", "apart"] = "heads"
    heads_first: bool = False
    turn: Literal["halves", "neighbours"] | None = "halves"
    angles: Literal["", "halves", "once"] = ""
    turned: Callable[[Module], bool] | None = None
    scale: str = "scaling"
    key_scale: str = ""
    dropout: str = "attention_dropout"
    after: str = ""
    softcap: str = ""
    sinks: str = ""
    gated: bool = False
    alibi: str = ""
    residual: str = ""
    eager: bool = False


@dataclass(frozen=True)
class Mlp(Part):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))`.

    up: the projections of the input: gate and up, one that makes both (`halves`), or a single one. act: the module of
    the activation, or the operator's name of a function that the code calls. limit: the number at which gate is cut
    above, and up on both sides. between: dropout of what down takes; after: of the output. residual: as of Attention.
    cast: down is given its input in the dtype of its weight.
    """

    name: ClassVar[str] = "mlp"
    up: tuple[str, ...] = ("gate_proj", "up_proj")
    down: str = "down_proj"
    act: str = "act_fn"
    halves: bool = False
    limit: str = ""
    between: str = ""
    after: str = ""
    residual: str = ""
    cast: bool = False


@dataclass(frozen=True)
class Spread(Mlp):
    """An MLP without a class of its own: its layers stand one after another in a method of a larger module.

    The method stays the family's code, around the MLP as one call. up, down, act: paths from the module, such as
    "output.dense".
    """

    method: str = "forward"


@dataclass(frozen=True)
class Norm(Part):
    """`x / rms(x) * (offset + weight)`, or, with mean, `(x - mean(x)) / std(x) * weight + bias`.

    eps: attribute with the number under the root.
    """

    name: ClassVar[str] = "norm"
    eps: str = "variance_epsilon"
    offset: float = 0.0
    mean: bool = False


@dataclass(frozen=True)
class Together(Part):
    """A module of its own forward, in which several projections of one input are one call. names: those layers.

    other: an argument that all of them but the first read where it is given: cross-attention. attends: the forward
    looks its attention up in transformers' `AttentionInterface`, and finds ours: caches, biases and masks are its own
    affair; eager: as of Attention.
    """

    name: ClassVar[str] = "stack"
    names: tuple[str, ...] = ()
    other: str = ""
    attends: bool = True
    eager: bool = False


@dataclass(frozen=True)
class Experts(Part):
    """All experts of a layer as 3-D parameters. transformers' own attributes say how they lie, so most need no words.

    limit, alpha, shift: of a gate of the family's own: `act(gate) * up` with gate and up cut at a number, silu's factor
    in the exponential, and a number added to up. every: the forward takes rows for every expert in turn, which are
    zero where a token has not chosen it; they lie as [E, in, out], gate and up as halves.
    """

    name: ClassVar[str] = "experts"
    limit: str = ""
    alpha: str = ""
    shift: float = 0.0
    every: bool = False


Family = Mapping[str, Part]  # name of a class -> what it is


def family(prefix: str, attention: Attention | Together | None, mlp: Mlp | None, norm: Norm | None,
           **others: Part) -> Family:  # fmt: skip
    """A family with the usual names: `<prefix>Attention`, `<prefix>MLP`, `<prefix>RMSNorm` (`<prefix>LayerNorm`).

    others: classes with other names, or more of them.
    """
    norm_name = f"{prefix}{'LayerNorm' if norm is not None and norm.mean else 'RMSNorm'}"
    usual = {f"{prefix}Attention": attention, f"{prefix}MLP": mlp, norm_name: norm}
    return {name: part for name, part in usual.items() if part is not None} | others
