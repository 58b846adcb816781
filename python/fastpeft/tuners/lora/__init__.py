"""`peft.tuners.lora`."""

import sys
from typing import Any

from ...aliases import register
from .. import attribute

register(__name__, {
    "conversion": "convert", "corda": "init.corda", "eva": "init.eva", "loraga": "init.loraga",
})  # fmt: skip


def __getattr__(name: str) -> Any:
    return attribute(sys.modules[__name__], name)
