"""Names of kernels out of the linker's names: as much of the C++ ABI's mangling as kernels' names and their template
arguments use (no tool for it comes with Triton)."""

from __future__ import annotations

import re

_BUILTIN = {"f": "float", "d": "double", "i": "int", "j": "unsigned", "l": "int64", "m": "uint64", "b": "bool",
            "h": "uint8", "a": "int8", "c": "char", "s": "int16", "t": "uint16", "v": "void"}  # fmt: skip
_SHORT = {"__nv_bfloat16": "bf16", "__half": "f16", "float": "f32"}


class _Reader:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def take(self, pattern: str) -> re.Match[str] | None:
        m = re.compile(pattern).match(self.text, self.at)
        if m:
            self.at = m.end()
        return m

    def word(self) -> str | None:
        """`17dequantize_kernel`."""
        m = self.take(r"\d+")
        if m is None:
            return None
        start = self.at
        self.at += int(m[0])
        return self.text[start : self.at]

    def name(self) -> tuple[str, tuple[str, ...]]:
        """A name and the template arguments of its last part."""
        nested = self.take("N") is not None
        parts: list[str] = []
        arguments: tuple[str, ...] = ()
        while True:
            if word := self.word():
                parts.append(word)
                arguments = ()
            elif self.take("I"):
                arguments = self.arguments()
            elif not self.take(r"S[0-9A-Z]*_|St|[KVrRO]"):
                break
            if not nested and not self.text.startswith("I", self.at):
                break
        if nested:
            self.take("E")
        return "::".join(p for p in parts if not p.startswith("_GLOBAL__N_")), arguments

    def arguments(self) -> tuple[str, ...]:
        found = []
        while not self.take("E"):
            found.append(self.argument())
        return tuple(found)

    def argument(self) -> str:
        while self.take("[PKRO]"):  # pointers and qualifiers tell no kernels apart
            pass
        if self.take("L"):
            self.take("[a-z]") or self.name()
            m = self.take(r"(n?)(\d+)E")
            if m is None:
                raise ValueError(f"not a literal: {self.text[self.at :]}")
            return ("-" if m[1] else "") + m[2]
        if m := self.take("[a-z]"):
            text = _BUILTIN.get(m[0], m[0])
        else:
            before = self.at
            text, inner = self.name()
            if self.at == before:
                raise ValueError(f"not a template argument: {self.text[self.at :]}")
            text = _SHORT.get(text, text) + (f"<{', '.join(inner)}>" if inner else "")
        return _SHORT.get(text, text)


def demangle(name: str) -> tuple[str, tuple[str, ...]]:
    """`_ZN..17dequantize_kernelI13__nv_bfloat16EEv..` -> ("dequantize_kernel", ("bf16",)): name, template arguments.

    Anonymous namespaces are left out. What is not mangled stays as it is, without arguments.
    """
    if not name.startswith("_Z"):
        return name, ()
    return _Reader(name[2:]).name()
