"""The code path that a call takes: what its machine code depends on, as a tuple that is quick to make.

Of `Op.sizes` (`samples.py`): dtypes, what is absent, the format of the weight, flags, the class of the rows, and of the
other sizes what they are multiples of. Backends choose tiles and forms by these; calls that differ in nothing else run
the same code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Path = tuple[Any, ...]
_readers: dict[str, Callable[[Sequence[Any]], Path]] = {}


def of(op: Any, args: Sequence[Any]) -> Path:
    """The code path of a call of a `dispatch.Op`; of an operator of lists, one of each entry."""
    return (_readers.get(op.name) or _reader(op))(args)


def text(op: Any, path: Path) -> str:
    """A code path in words, the same in every process."""
    names = _fields(op)[0]
    each = path if op.operands.lists else (path,)
    said = " | ".join(" ".join(f"{n}={v}" for n, v in zip(names, one, strict=True)) for one in each)
    return said.replace("torch.", "")


def rows_class(m: int) -> int:
    """The class of a number of rows: each power of two, and the halves of what lies between two, up to 8192; the rest
    is one."""
    if not 0 < m <= 8192:
        return 56 if m else 0
    bits = m.bit_length()
    return 2 * (bits + (m - 1).bit_length()) + (m >= 3 << bits >> 2)


def _factor(size: int) -> int:
    """The largest power of two, up to 256, that a size is a multiple of: tiles fit, and loads are wide, by it."""
    return min(size & -size, 256)


def _rank(r: int) -> int:
    return (r - 1).bit_length() if r else -1


def _one(size: int) -> bool:
    return size == 1


_CLASSES: dict[str, Callable[[int], int]] = {
    "M": rows_class, "N": _factor, "K": _factor, "L": _factor, "R": _rank, "B": int, "F": int, "G": _one, "D": int,
    "I": int, "V": int, "X": int,
}  # fmt: skip
_NUMBERS = ("quant_type", "blocksize", "nested_blocksize", "terms", "nested", "transposed", "masked", "dtype", "act",
            "causal", "interleaved")  # fmt: skip


def _fields(op: Any) -> tuple[list[str], str]:
    """(what a code path is made of, Python source of the tuple of it, from a call's arguments `a`)."""
    from .samples import parse

    names, spec = list(op.operands.names), parse(op.sizes)
    may_lack = {names[i] for i in (*op.operands.optional, *op.operands.lists)}
    texts: dict[str, str] = {}
    for name, dims in spec:
        if not isinstance(dims, str) and name != "shape":
            at = f"a[{names.index(name)}]"
            texts[name] = f"None if {at} is None else {at}.dtype" if name in may_lack else f"{at}.dtype"
    for letter, class_of in _CLASSES.items():
        sources = []  # a tensor that is always there is the best one, then a number, then an optional tensor
        for name, dims in spec:
            at, call = f"a[{names.index(name)}]", class_of.__name__
            if dims == letter:
                sources.append((1, f"{call}({at})"))
            elif letter in dims and name not in ("weight", "packed", "shape"):
                size = f"{call}({at}.shape[{dims.index(letter) - len(dims)}])"
                sources.append((2, f"None if {at} is None else {size}") if name in may_lack else (0, size))
        if sources:
            texts[letter] = min(sources)[1]
    for i, name in enumerate(names):
        if name in _NUMBERS or name.startswith("need_"):
            texts[name] = f"a[{i}]"
        elif name in ("dropout_p", "window", "softcap"):
            texts[name.removesuffix("_p")] = f"a[{i}] > 0"
        elif name == "nested_absmax":
            texts["plain_scales"] = f"a[{i}] is None"
    if "nested_absmax" in names and "quant_type" in names:  # integers by group: their parts, and of what type
        at = {n: f"a[{names.index(n)}]" for n in ("quant_type", "absmax", "nested_absmax", "nested_code", "offset")}
        parts = ", ".join(f"None if {at[n]} is None else {at[n]}.dtype" for n in list(at)[1:])
        texts["parts"] = f"({parts}) if {at['quant_type']} in (3, 4, 5) else None"
    return list(texts), "(" + "".join(f"({source})," for source in texts.values()) + ")"


def _reader(op: Any) -> Callable[[Sequence[Any]], Path]:
    # One expression, compiled as a namedtuple's is: it runs before every launch, and a loop takes five times as long.
    names = {f.__name__: f for f in _CLASSES.values()}
    one: Callable[[Sequence[Any]], Path] = eval(f"lambda a: {_fields(op)[1]}", names)
    _readers[op.name] = reader = _each(one) if op.operands.lists else one
    return reader


def _each(one: Callable[[Sequence[Any]], Path]) -> Callable[[Sequence[Any]], Path]:
    def reader(args: Sequence[Any]) -> Path:
        count = next(len(v) for v in args if isinstance(v, list | tuple))
        return tuple(one([v[i] if isinstance(v, list | tuple) else v for v in args]) for i in range(count))

    return reader
