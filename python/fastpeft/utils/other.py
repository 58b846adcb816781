"""`peft.utils.other`."""

from . import *  # noqa: F403 (its __all__)
from . import __all__, __getattr__, _get_submodules

__all__ = [*__all__, "__getattr__", "_get_submodules"]
