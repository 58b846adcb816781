"""Three ways of documenting functions, read from what is installed: Python's, numpy's and torch's own docstrings.

The question is always "What does `sort` do?"; Python's library answers with a sentence, numpy with sections underlined
by dashes, torch with a signature and ``Args:``. One adapter for each makes the styles visible side by side.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from types import ModuleType

from . import pydocs

# Asked after training, and left out of it: functions that a reader knows, whichever library has them.
SHOWN = ("sort", "round", "split", "repeat", "shuffle", "clip", "mean", "log2", "copy", "dot")
_NUMPY = ("numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.char", "numpy.ma")
_TORCH = ("torch", "torch.linalg", "torch.special", "torch.fft", "torch.nn.functional")
_SUMMARY = (18, 130)  # characters
_LINE = 90


def pairs() -> dict[str, list[pydocs.Pair]]:
    """The usable pairs of each style, sorted by name; no short name occurs twice in a style, and none of `SHOWN`."""
    collected = {
        "python": ((p.name.partition("(")[0].rpartition(".")[2], p.answer) for p in pydocs.pairs()),
        "numpy": _collect(_NUMPY, _numpy),
        "torch": _collect(_TORCH, _torch),
    }
    return {style: _distinct(found) for style, found in collected.items()}


def prompt(name: str) -> str:
    return f"What does `{name}` do?"


def _distinct(found: Iterator[tuple[str, str]]) -> list[pydocs.Pair]:
    by_name: dict[str, pydocs.Pair] = {}
    answers: set[str] = set()
    for name, answer in found:
        if name not in by_name and name not in SHOWN and answer not in answers:
            by_name[name] = pydocs.Pair(name, answer)
            answers.add(answer)
    return [by_name[name] for name in sorted(by_name)]


def _collect(modules: tuple[str, ...], text: Callable[[str, str], str | None]) -> Iterator[tuple[str, str]]:
    for module_name in modules:
        module: ModuleType = importlib.import_module(module_name)
        for name in sorted(vars(module)):
            doc = None if name.startswith("_") else getattr(vars(module)[name], "__doc__", None)
            if isinstance(doc, str) and callable(vars(module)[name]):
                answer = text(name, inspect.cleandoc(doc))
                if answer is not None and answer.isascii():
                    yield name, answer


def _summary(paragraph: str) -> str | None:
    """The first sentence on one line, where it says something."""
    sentence = re.match(r".*?[.](?=\s|$)", " ".join(paragraph.split()))
    text = sentence.group() if sentence else ""
    return text if _SUMMARY[0] <= len(text) <= _SUMMARY[1] and text[0].isupper() else None


def _numpy(name: str, doc: str) -> str | None:
    """The summary, and the section of parameters with the first of them."""
    found = re.search(r"(?m)^Parameters\n-+\n(\S.* : .*)\n( +\S.*[.])$", doc)
    paragraphs = [p for p in doc.split("\n\n") if not p.startswith(f"{name}(")]
    summary = _summary(paragraphs[0]) if found and paragraphs else None
    if found is None or summary is None or max(map(len, found.groups())) > _LINE:
        return None
    return f"{summary}\n\nParameters\n----------\n{found[1]}\n{found[2]}"


def _torch(name: str, doc: str) -> str | None:
    """The signature, the summary, and the first argument."""
    signature, _, rest = doc.partition("\n")
    found = re.search(r"(?m)^Args:\n( +\S.*)$", rest)
    summary = _summary(rest.strip().split("\n\n")[0])
    if "->" not in signature or len(signature) > _LINE or found is None or len(found[1]) > _LINE or summary is None:
        return None
    return f"{signature}\n\n{summary}\n\nArgs:\n{found[1]}"
