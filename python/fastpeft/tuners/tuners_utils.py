"""`peft.tuners.tuners_utils`."""

from ..layer import AdapterLayer as BaseTunerLayer
from ..tuner import BaseTuner

__all__ = ["BaseTuner", "BaseTunerLayer"]
