"""`fastpeft.as_peft()`: from then on `import peft` is fastpeft, whether PEFT is installed or not."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from .peft_names import PACKAGE

VERSION = "0.22.0"  # what transformers 5.24 asks for at least; PEFT's own releases end before it
# Those that look for peft while they are imported, and keep its classes or that it was not there.
_TOO_EARLY = ("peft", "transformers", "diffusers", "trl")


def as_peft() -> None:
    """Let `import peft`, and every `peft.x.y`, be fastpeft in this process, with or without PEFT installed.

    `importlib.metadata.version("peft")` and `peft.__version__` then are 0.22.0. To be called before peft, transformers,
    diffusers and trl are imported: RuntimeError if one was, and nothing is changed. A second call does nothing.
    """
    package: Any = sys.modules[PACKAGE]
    if sys.modules.get("peft") is package:
        return
    if early := [name for name in _TOO_EARLY if sys.modules.get(name) is not None]:
        raise RuntimeError(
            f"fastpeft.as_peft() came too late: {', '.join(early)} was imported before it and keeps what it found of "
            "peft. Nothing was changed. Make `import fastpeft; fastpeft.as_peft()` the first lines of the program, "
            "before any import of peft, transformers, diffusers or trl, or start it with `fastpeft run SCRIPT ARGS...`."
        )
    sys.meta_path.insert(0, _StandIn())
    sys.modules["peft"] = package
    package.__version__ = VERSION


class _StandIn(metadata.DistributionFinder, Loader):
    """The finder of modules by PEFT's names, each of which is the module with our name, and of the distribution."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        package, _, inner = fullname.partition(".")
        found = importlib.util.find_spec(f"{PACKAGE}.{inner}") if package == "peft" and inner else None
        if found is None:
            return None
        spec = ModuleSpec(fullname, self, origin=found.origin)
        spec.submodule_search_locations = found.submodule_search_locations
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(spec.name.replace("peft", PACKAGE, 1))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing runs again. Python has just given the module the spec with PEFT's name: its own comes back."""
        if module.__spec__ is not None:
            module.__spec__ = module.__spec__.loader_state

    def find_distributions(
        self, context: metadata.DistributionFinder.Context = metadata.DistributionFinder.Context()  # noqa: B008
    ) -> Iterable[metadata.Distribution]:
        if context.name is None or re.sub(r"[-_.]+", "-", context.name).lower() == "peft":
            yield _Distribution()


class _Distribution(metadata.Distribution):
    """An installed peft, for `importlib.metadata`."""

    def read_text(self, filename: Any) -> str | None:
        head = f"Metadata-Version: 2.1\nName: peft\nVersion: {VERSION}\nSummary: fastpeft in the place of PEFT\n"
        return {"METADATA": head, "top_level.txt": "peft\n"}.get(str(filename))

    def locate_file(self, path: Any) -> Any:
        return Path(__file__).parent.parent / path
