"""Question and answer pairs from Python's own documentation, read from the running interpreter.

Every Python carries thousands of documented objects. One pair asks what ``module.name(signature)`` does and answers
with the first sentence of its docstring. Nothing is downloaded and nothing is stored in the repository; the same
interpreter always yields the same pairs in the same order.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import pkgutil
import re
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

# Importing these opens a browser, prints, needs a display or belongs to tests and installers.
_SKIPPED = (
    "antigravity", "crypt", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "msilib", "nis", "nturl2path",
    "ossaudiodev", "pydoc_data", "pyexpat", "readline", "rlcompleter", "spwd", "test", "this", "tkinter", "turtle",
    "turtledemo", "venv",
)  # fmt: skip
_ANSWER_CHARS = (18, 160)
_SIGNATURE_CHARS = 90
_HELD_OUT_IN = 10  # one pair in ten is held out


@dataclass(frozen=True)
class Pair:
    """One documented object: its qualified name with signature, and the first sentence of its docstring."""

    name: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"What does `{self.name}` do in Python?"


def pairs() -> list[Pair]:
    """All usable pairs, sorted by name; no prompt and no answer (up to case, digits and spacing) occurs twice."""
    found: dict[str, Pair] = {}
    names: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # looking at deprecated members warns
        collected = list(_all_pairs())
    for pair in sorted(collected, key=lambda p: (p.name.count("."), p.name)):
        key = _normal(pair.answer)
        if key not in found and pair.name not in names:
            found[key] = pair
            names.add(pair.name)
    return sorted(found.values(), key=lambda p: p.name)


def split(all_pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Divide pairs into (training, held out) by a hash of the answer.

    The hash is over the answer with case, digits and spacing removed, so objects that share a docstring fall on the
    same side however the pairs were collected, and a pair stays on its side when others come or go.
    """
    train: list[Pair] = []
    held_out: list[Pair] = []
    for pair in all_pairs:
        digest = hashlib.sha256(_normal(pair.answer).encode()).digest()
        (held_out if digest[0] % _HELD_OUT_IN == 0 else train).append(pair)
    return train, held_out


def choose(all_pairs: list[Pair], count: int, seed: int = 0) -> list[Pair]:
    """``count`` pairs spread over the whole list, chosen by hash: the same ones on every run, in a mixed order."""
    ranked = sorted(all_pairs, key=lambda p: hashlib.sha256(f"{seed}/{p.name}".encode()).digest())
    return ranked[:count]


def _normal(text: str) -> str:
    return re.sub(r"[\W\d_]+", " ", text.lower()).strip()


def _all_pairs() -> Iterator[Pair]:
    for module in _modules():
        for name, member in _members(module):
            if inspect.isclass(member):
                yield from _pair(f"{module.__name__}.{name}", member)
                for method, function in _members(member):
                    if callable(function):
                        yield from _pair(f"{module.__name__}.{name}.{method}", function)
            elif callable(member):
                yield from _pair(f"{module.__name__}.{name}", member)


def _modules() -> Iterator[ModuleType]:
    """Public modules of the standard library and their public submodules, by name."""
    for name in sorted(sys.stdlib_module_names):
        if name.startswith("_") or name in _SKIPPED:
            continue
        module = _import(name)
        if module is None:
            continue
        yield module
        for info in sorted(pkgutil.iter_modules(getattr(module, "__path__", [])), key=lambda i: i.name):
            if not info.name.startswith("_") and info.name not in _SKIPPED and info.name != "tests":
                submodule = _import(f"{name}.{info.name}")
                if submodule is not None:
                    yield submodule


def _import(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except Exception:  # a module for another platform or with a missing system library simply gives no pairs
        return None


def _members(owner: object) -> Iterator[tuple[str, object]]:
    """Public members defined by ``owner`` itself: re-exports and inherited methods would repeat other pairs."""
    for name in sorted(vars(owner)):
        if name.startswith("_"):
            continue
        member = vars(owner)[name]
        if isinstance(member, (staticmethod, classmethod)):
            member = member.__func__
        if inspect.ismodule(owner) and getattr(member, "__module__", None) != owner.__name__:
            continue
        yield name, member


def _pair(name: str, member: object) -> Iterator[Pair]:
    answer = _first_sentence(member, name.rpartition(".")[2])
    signature = _signature(member)
    if answer is not None and signature is not None:
        yield Pair(name + signature, answer)


def _signature(member: object) -> str | None:
    try:
        text = str(inspect.signature(member))  # type: ignore[arg-type]  # callers pass callables only
    except Exception:  # defaults of builtins are evaluated: on select.epoll.register 3.13 raises AttributeError
        return None
    if inspect.isclass(member) or len(text) > _SIGNATURE_CHARS:
        text = "(...)" if text != "()" else text
    return None if " at 0x" in text else text  # an address differs from run to run


def _first_sentence(member: object, short_name: str) -> str | None:
    """First sentence of the docstring on one line, or None where it says nothing about the object."""
    doc = getattr(member, "__doc__", None)
    if not isinstance(doc, str):
        return None
    paragraphs = re.split(r"\n\s*\n", inspect.cleandoc(doc))
    if paragraphs and (paragraphs[0].startswith(f"{short_name}(") or "->" in paragraphs[0]):
        paragraphs = paragraphs[1:]  # builtins repeat their signature first
    if not paragraphs:
        return None
    text = " ".join(paragraphs[0].split())
    sentence = re.match(r".*?[.!](?=\s+[A-Z]|$)", text)
    if sentence is None:  # no full stop: a heading, a list or a fragment
        return None
    text = sentence.group()
    if not text[:1].isalpha() or not text.isascii() or ">>>" in text or " at 0x" in text:
        return None
    return text if _ANSWER_CHARS[0] <= len(text) <= _ANSWER_CHARS[1] else None
