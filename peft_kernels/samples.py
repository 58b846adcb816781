"""Small calls of any operator: its arguments by the sizes that it says of them (`Op.sizes`), nothing by hand.

`Op.sizes` names the tensors whose sizes a call may choose, each with its dimensions as letters, and the numbers that
are sizes: "x[M,K] weight[N,K] a[R,K] b[N,R] out_features=N". A weight that may be 4-bit stands for all of its parts.
In an operator of lists every entry has sizes of its own. A letter means the same everywhere:

    M rows of x, which choose code paths    T rows that choose none     N, K features    R rank
    D features that a program holds whole   B, G, F blocks of a rotation: their size, their number, factors
    S adapters of a batch, P their ranks    Z batch, H heads, U heads of keys, C: 1 or Z
    I adapters of a mixture    L half of a pair    Y groups of rows
    J keys, V features of a value, X features that are turned, Q the two ends of a span
    A parts of a sum    W the N of all entries of lists side by side, O of those before
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .formats import format_of
from .row_groups import RowGroups
from .testing import random_affine_weight, random_quant_weight

MOST_ROWS = 8193  # of M: beyond every number of rows where a code path ends
_PARTS = ("absmax", "nested_absmax", "nested_code", "offset", "quant_type", "blocksize", "nested_blocksize")
FIXED = frozenset({"absmax", "nested_absmax", "nested_code", "offset"})  # float32 whatever the dtype of the rest is
Sizes = dict[str, int]
# How a call is made where nobody made one before: the sizes, and the arguments that are no tensors.
SIZES: Sizes = {"M": 8, "T": 8, "N": 64, "K": 128, "R": 16, "D": 32, "B": 4, "G": 32, "F": 1, "S": 2, "I": 2, "Z": 1,
                "H": 4, "U": 2, "C": 1, "L": 16, "J": 8, "V": 32, "X": 32, "Q": 2, "A": 1, "W": 64, "O": 0,
                "Y": 3}  # fmt: skip
NUMBERS: dict[str, Any] = {"quant_type": 1, "blocksize": 64, "nested_blocksize": 256, "scaling": 1.0, "dropout_p": 0.0,
                           "eps": 1e-5, "scale": 0.2, "terms": 0, "nested": True, "transposed": False,
                           "parts": 1, "add": True, "interleaved": False, "window": 0, "softcap": 0.0, "act": 0,
                           "alpha": 1.0, "offset": 0.0, "limit": 0.0, "shift": 0.0, "fused": 0}  # fmt: skip
_OWN_DTYPE = frozenset({"x", "y", "dy", "w", "gate", "up", "dh", "h", "q", "k", "v"})  # of the call; float32 the others


def parse(sizes: str) -> list[tuple[str, tuple[str, ...] | str]]:
    """(argument, its dimensions, or the letter whose size it is) of each word of `Op.sizes`."""
    found: list[tuple[str, tuple[str, ...] | str]] = []
    for word in sizes.split():
        name, _, dims = word.replace("]", "").partition("[" if "[" in word else "=")
        found.append((name, tuple(dims.split(",")) if "[" in word else dims))
    return found


def entries(names: Sequence[str], args: Sequence[Any]) -> list[dict[str, Any]]:
    """A call's arguments by name: once, or for an operator of lists for each entry."""
    lengths = [len(v) for n, v in zip(names, args, strict=True) if isinstance(v, list | tuple) and n != "shape"]
    if not lengths:
        return [dict(zip(names, args, strict=True))]
    return [
        {n: v[i] if isinstance(v, list | tuple) and n != "shape" else v for n, v in zip(names, args, strict=True)}
        for i in range(min(lengths))
    ]


def sizes_of(spec: str, named: dict[str, Any]) -> Sizes:
    """The size of each letter in a call. Leading dimensions beyond those named count as one."""
    found: Sizes = {}
    for name, dims in parse(spec):
        value = named[name]
        if isinstance(dims, str):
            found.setdefault(dims, int(value))
        elif name == "offsets":
            found["Y"] = len(value) - 1
        elif isinstance(value, Tensor) and (name not in ("weight", "packed") or not named.get("quant_type")):
            shape = (1,) * (len(dims) - value.dim()) + tuple(value.shape)
            head = math.prod(shape[: len(shape) - len(dims) + 1])
            for letter, size in zip(dims, (head, *shape[len(shape) - len(dims) + 1 :]), strict=True):
                found.setdefault(letter, int(size))
        elif isinstance(value, list | tuple):  # `shape`
            found.setdefault(dims[-1], int(value[-1]) if value else 1)
            found.setdefault(dims[0], math.prod(map(int, value[:-1])))
    return found


def shrunk(sizes: Sizes, blocksize: int, features: int) -> Sizes:
    """Smaller sizes of the same code paths: what is left over by a tile stays, and about `features` of K."""

    def cut(size: int, least: int) -> int:
        return size if size < 2 * least else least + size % least

    new = {k: v for k, v in sizes.items() if k in "RDBFCLAIVXQ" and v}
    most = {"M": MOST_ROWS, "T": 80, "J": 80, "S": 4, "Z": 2, "U": 2, "Y": 4}
    new.update({k: min(sizes[k], most[k]) for k in most if k in sizes})
    if "N" in sizes:
        new["N"] = cut(sizes["N"], 256)
    if "R" in sizes:
        new["R"] = cut(sizes["R"], 64)
    if "H" in sizes:
        new["H"] = sizes["H"] // max(1, sizes["U"]) * new["U"]
    if "C" in sizes:
        new["C"] = 1 if sizes["C"] == 1 else new["Z"]
    unit = 1
    if "B" in sizes:
        unit = sizes["B"] << (sizes.get("F", 1) - 1)
    elif "L" in sizes:
        new["L"] = min(sizes["L"], 128)
        unit = 2 * new["L"]
    if "K" in sizes:
        least = max(features, blocksize)
        new["K"] = cut(sizes["K"], least) if unit == 1 else unit * max(1, min(sizes["K"], least) // unit)
    if "G" in sizes:
        new["G"] = 1 if sizes["G"] == 1 else new["K"] // sizes["B"] if "K" in new else min(sizes["G"], 8)
    if "P" in sizes:
        new["P"] = sum(_ranks(new))
    return new


def _ranks(sizes: Sizes) -> list[int]:
    """Ranks of S adapters, of which one is a free slot and R the largest."""
    r = sizes["R"]
    return [(r, max(r // 2, min(r, 1)), 0, r)[i % 4] for i in range(sizes["S"])]


class _Maker:
    """Tensors of a call, on its device, out of a generator of its own."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32, factor: float = 1.0) -> Tensor:
        t = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return (t * factor).to(dtype)

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, sizes: Sizes) -> Tensor:
        """Values of the size that these arguments have in a layer."""
        make = _SPECIAL.get(name)
        if make is not None:
            return make(self, shape, sizes).to(dtype)
        factor = 1.0 if name not in _FAN_IN or len(shape) < 2 else max(shape[-1], 1) ** -0.5
        return self.normal(*shape, dtype=dtype, factor=factor)

    def weight(
        self, n: int, k: int, quant_type: int, blocksize: int, nested_blocksize: int | None,
        like: dict[str, Any] | None = None,
    ) -> list[Any]:  # fmt: skip
        """Parts of a quantised weight in the order of schemas; nested_blocksize: None where it is not nested.

        like: arguments of a call, whose integers by group have the same parts of the same types.
        """
        nested, of = nested_blocksize is not None, format_of("samples", quant_type).name
        if like is not None and of in ("int4", "int8", "uint8"):
            zeros = like["nested_absmax"]
            w = random_affine_weight(
                n, k, of, blocksize, shifts=like["offset"] is not None, act_order=like["nested_code"] is not None,
                zeros=None if zeros is None else "codes" if zeros.dtype is torch.uint8 else "values",
                scales=like["absmax"].dtype,
            )  # fmt: skip
        else:
            w = random_quant_weight(n, k, quant_type=of, blocksize=blocksize, nested=nested)
        parts = list(w.flatten())
        if w.nested and nested_blocksize is not None:
            assert w.absmax is not None
            parts[2] = 0.02 + 0.01 * torch.rand(-(-w.absmax.numel() // nested_blocksize))
            parts[7] = nested_blocksize
        return [t.to(self.device) if isinstance(t, Tensor) else t for t in parts]


_KEPT = frozenset({"s", "gain", "lse", "mix"})  # in the dtype of sums
_INDICES = frozenset({"adapters", "starts", "ranks", "offsets"})
_PLACES = frozenset({"order", "bounds"})  # of rows in order of their adapters
_FAN_IN = frozenset({"weight", "a", "b", "u", "v"})


def _turns(d: _Maker, shape: tuple[int, ...], _: Sizes) -> Tensor:
    return torch.eye(shape[-1], device=d.device) + d.normal(*shape, factor=0.3 * shape[-1] ** -0.5)


def _skew(d: _Maker, shape: tuple[int, ...], _: Sizes) -> Tensor:
    full = d.normal(*shape, factor=0.5 * max(shape[-1], 1) ** -0.5)
    return full - full.mT


def _angles(of: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def make(d: _Maker, shape: tuple[int, ...], _: Sizes) -> Tensor:
        steps = torch.arange(shape[1] * (shape[2] // 2), device=d.device).view(1, shape[1], -1) * 0.37
        return of(steps).repeat(shape[0], 1, 2)

    return make


def _integers(of: Callable[[Sizes], list[int]]) -> Callable[..., Tensor]:
    return lambda d, shape, sizes: torch.tensor(of(sizes), dtype=torch.int64, device=d.device).view(shape)


def _offsets(d: _Maker, _: tuple[int, ...], sizes: Sizes) -> Tensor:
    """Groups of rows that grow; the second has none, and the last row is no group's."""
    groups, rows = sizes["Y"], max(sizes["M"] - 1, 0)
    ends = [0, *(rows * e * e // groups**2 for e in range(1, groups + 1))]
    if groups > 2:
        ends[2] = ends[1]
    return torch.tensor(ends, dtype=torch.int64, device=d.device)


def _groups(d: _Maker, sizes: Sizes) -> Any:
    return RowGroups(_SPECIAL["adapters"](d, (sizes["M"],), sizes), sizes["S"])


_SPECIAL: dict[str, Callable[[_Maker, tuple[int, ...], Sizes], Tensor]] = {
    "blocks": _turns,
    "skew": _skew,
    "cos": _angles(torch.cos),
    "sin": _angles(torch.sin),
    "keep": lambda d, shape, _: torch.ones(shape, dtype=torch.bool, device=d.device).tril(),
    "spans": lambda d, shape, sizes: torch.tensor([0, sizes["J"]], device=d.device).expand(shape),
    "lse": lambda d, shape, _: d.normal(*shape, factor=0.1) + math.log(max(shape[-1], 1)),
    "mix": lambda d, shape, _: d.normal(*shape, factor=0.5).clamp(min=0.0),  # with weights of zero
    "gain": lambda d, shape, _: 1 + d.normal(*shape, factor=0.1),
    "magnitude": lambda d, shape, _: 1 + d.normal(*shape, factor=0.1),
    "base_sq": lambda d, shape, _: 1 + d.normal(*shape, factor=0.1).double().square(),
    "adapters": _integers(lambda s: [i % (s["S"] + 1) - 1 for i in range(s["M"])]),
    "starts": _integers(lambda s: [sum(_ranks(s)[:i]) for i in range(s["S"])]),
    "ranks": _integers(_ranks),
    "offsets": _offsets,
    "order": lambda d, shape, sizes: _groups(d, sizes).order,
    "bounds": lambda d, shape, sizes: _groups(d, sizes).bounds,
}


def _entry(spec: str, named: dict[str, Any], sizes: Sizes, d: _Maker) -> dict[str, Any]:
    """Arguments like the named ones, at other sizes: dtypes, what is absent, and numbers that are no sizes stay."""
    new = dict(named)
    for name, dims in parse(spec):
        value = named[name]
        if isinstance(dims, str):
            new[name] = sizes[dims]
        elif name in ("weight", "packed") and named.get("quant_type"):
            nested = named["nested_blocksize"] if named["nested_absmax"] is not None else None
            rows = math.prod(sizes[c] for c in dims[:-1])
            parts = d.weight(rows, sizes[dims[-1]], named["quant_type"], named["blocksize"], nested, named)
            new.update(zip((name, *_PARTS), (*parts[:7], named["nested_blocksize"]), strict=True))
        elif isinstance(value, Tensor):
            special = "skew" if name == "q" and "B" in dims else name
            new[name] = d.tensor(special, tuple(sizes[c] for c in dims), value.dtype, sizes)
        elif isinstance(value, list | tuple):
            new[name] = [sizes[c] for c in dims]
    if isinstance(named.get("scaling"), float):
        new["scaling"] = 0.5  # of a call's zero nothing would be seen
    if isinstance(seed := named.get("seed"), Tensor):
        new["seed"] = torch.full_like(seed, 1234567)
    return new


def _joined(names: Sequence[str], args: Sequence[Any], made: list[dict[str, Any]]) -> list[Any]:
    lists = [isinstance(v, list | tuple) and n != "shape" for n, v in zip(names, args, strict=True)]
    return [[e[n] for e in made] if many else made[0][n] for n, many in zip(names, lists, strict=True)]


def like(names: Sequence[str], spec: str, args: Sequence[Any], features: int = 256, seed: int = 0) -> list[Any]:
    """Arguments of a small call that takes the code paths of the call with `args`, on its device.

    names: of the arguments. spec: `Op.sizes`. features: about so many of K.
    """
    first = next(v for v in args if isinstance(v, Tensor))
    named, made, d = entries(names, args), [], _Maker(first.device, seed)
    each = [shrunk(sizes_of(spec, one), int(one.get("blocksize") or 1), features) for one in named]
    for i, sizes in enumerate(each):  # an operator of lists has one x, and one y
        sizes.update({k: each[0][k] for k in "K" if k in sizes})
        sizes.update(W=sum(s.get("N", 0) for s in each), O=sum(s.get("N", 0) for s in each[:i]))
    for one, sizes in zip(named, each, strict=True):
        entry = _entry(spec, one, sizes, d)
        made.append(entry if not made else {**entry, "x": made[0]["x"]} if "x" in entry else entry)
    return _joined(names, args, made)


def call(schema: Any, spec: str, dtype: torch.dtype, device: torch.device | str = "cpu") -> list[Any]:
    """Arguments of a small call out of nothing, as training makes it: NF4 with nested scales, float32 adapters.

    schema: torch's, of the operator. dtype: of x, and of what is like it.
    """
    spoken, types = dict(parse(spec)), {a.name: str(a.type) for a in schema.arguments}
    like_x = _OWN_DTYPE - {"v"} if "u" in spoken else _OWN_DTYPE  # a reflection's v is no activation
    named: dict[str, Any] = {}
    for name, kind in types.items():
        dims = spoken.get(name, "")
        if "Tensor" not in kind:
            named[name] = [] if name == "shape" else dtype if name == "dtype" else NUMBERS.get(name, "bool" in kind)
        elif (dims == "" and name not in _PARTS) or name in ("bias", "keep", "base_sq", "spans", "slopes", "sinks"):
            named[name] = None
        else:
            own = name in like_x and "B" not in dims
            integers = torch.int64 if name in _INDICES else torch.int32 if name in _PLACES else None
            kept = torch.promote_types(dtype, torch.float32) if name in _KEPT else torch.float32
            of = integers or (dtype if own else kept)
            named[name] = torch.empty((0,) * len(dims), dtype=of, device=device)
    sizes = {**SIZES, "P": sum(_ranks(SIZES))}
    if "Y" in {dim for dims in spoken.values() for dim in dims}:
        sizes["N"] = 128  # a group's weight has whole blocks of nested scales
    entry = _entry(spec, named, sizes, _Maker(torch.device(device), 0))
    return [[entry[n]] if "List" in kind and n != "shape" else entry[n] for n, kind in types.items()]
