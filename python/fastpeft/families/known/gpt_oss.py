"""gpt-oss: a logit of each head sees nothing, half of the layers have windows, experts cut their gates."""

from ..description import Attention, Experts, Norm, family

PARTS = family(
    "GptOss", Attention(angles="once", sinks="sinks", eager=True), None, Norm(),
    GptOssExperts=Experts(limit="limit", alpha="alpha", shift=1.0),
)  # fmt: skip
