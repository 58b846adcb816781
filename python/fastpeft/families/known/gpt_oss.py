"""gpt-oss: a logit of each head sees nothing, half of the layers have windows."""

from ..description import Attention, Norm, family

PARTS = family("GptOss", Attention(angles="once", sinks="sinks", eager=True), None, Norm())
