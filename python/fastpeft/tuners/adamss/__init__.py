"""`peft.tuners.adamss`."""

import sys
from typing import Any

from .. import attribute


def __getattr__(name: str) -> Any:
    return attribute(sys.modules[__name__], name)
