"""Record what vLLM asks of a punica wrapper: `python tests/golden/vllm_punica.py FOLDER VERSION`.

FOLDER holds the package `vllm` of that version, installed or as unpacked sources, which are read and not imported.
Written to this folder: vllm_punica_VERSION.json, the parameters (name, kind, default) of the methods of each class;
PunicaWrapperBase inherits from PunicaWrapperABC, and the platforms' from it.
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

CLASSES = {
    "PunicaWrapperABC": "punica_base.py",
    "PunicaWrapperBase": "punica_base.py",
    "PunicaWrapperCPU": "punica_cpu.py",
    "PunicaWrapperGPU": "punica_gpu.py",
}


def parameters(node: ast.FunctionDef) -> list[list[str | None]]:
    args = node.args
    found: list[list[str | None]] = [[a.arg, "POSITIONAL_OR_KEYWORD", None] for a in args.posonlyargs + args.args]
    for place, default in zip(reversed(found), reversed(args.defaults), strict=False):
        place[2] = ast.unparse(default)
    if args.vararg:
        found.append([args.vararg.arg, "VAR_POSITIONAL", None])
    for a, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        found.append([a.arg, "KEYWORD_ONLY", None if default is None else ast.unparse(default)])
    if args.kwarg:
        found.append([args.kwarg.arg, "VAR_KEYWORD", None])
    return found


def methods(path: Path, cls: str) -> dict[str, list[list[str | None]]]:
    body = next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == cls).body
    return {
        n.name: parameters(n)
        for n in body
        if isinstance(n, ast.FunctionDef)
        and (n.name == "__init__" or not n.name.startswith("_"))
        and not any(isinstance(d, ast.Name) and d.id == "property" for d in n.decorator_list)
    }


def main(folder: str, version: str) -> None:
    wrappers = Path(folder) / "vllm" / "lora" / "punica_wrapper"
    found = {cls: methods(wrappers / file, cls) for cls, file in CLASSES.items()}
    out = Path(__file__).parent / f"vllm_punica_{version}.json"
    lines = [
        f"  {json.dumps(cls)}: {{\n"
        + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in each.items())
        + "\n  }"
        for cls, each in found.items()
    ]
    out.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
