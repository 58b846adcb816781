"""The native library, built on this machine for its architecture alone. Without it the CUDA kernels are absent."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

from ...checks import ROOT
from ..device import Device

LIMIT_S = 500
STATE = ROOT / "peft_kernels" / "lib" / "build.json"


def titles(device: Device) -> list[str]:
    return ["library"]


def row(title: str, device: Device) -> dict[str, Any]:
    if device.fake:
        return {"absent": "a fake device takes the library that is there", "state": state()}
    command = [sys.executable, "setup.py", "-q", "build_native", f"--arch={device.arch}"]
    with tempfile.TemporaryFile("w+") as said:  # also what comes of it beside a full pipe is kept
        code = subprocess.run(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT).returncode
        said.seek(0)
        text = said.read()
    if code:
        return {"absent": f"the build ended with status {code}: {text.strip()[-600:]}", "state": state()}
    return {"state": state(), "said": text.strip()[-600:]}


def state() -> dict[str, Any]:
    """Per half what became of it in the last build."""
    try:
        found: dict[str, Any] = json.loads(STATE.read_text())
    except (OSError, ValueError):
        return {}
    return found
