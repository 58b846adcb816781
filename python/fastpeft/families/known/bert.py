"""BERT, and the many sentence encoders that take its classes."""

from ..description import Spread, Together

NAMES = ("query", "key", "value")

PARTS = {
    "BertSelfAttention": Together(names=NAMES),
    "BertCrossAttention": Together(names=NAMES, other="encoder_hidden_states"),
    "BertLayer": Spread(
        up=("intermediate.dense",), act="intermediate.intermediate_act_fn", down="output.dense",
        method="feed_forward_chunk",
    ),
}  # fmt: skip
