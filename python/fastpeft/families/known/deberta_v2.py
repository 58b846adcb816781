"""DeBERTa-v2 and v3: scores have parts by position, so attention is its own code."""

from ..description import Spread, Together

PARTS = {
    "DisentangledSelfAttention": Together(names=("query_proj", "key_proj", "value_proj"), attends=False),
    "DebertaV2Layer": Spread(
        up=("intermediate.dense",), act="intermediate.intermediate_act_fn", down="output.dense"
    ),
}  # fmt: skip
