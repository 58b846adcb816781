"""T5 and Flan-T5: scores have a bias by distance and no scale."""

from ..description import Mlp, Norm, Together

PARTS = {
    "T5Attention": Together(names=("q", "k", "v"), other="key_value_states"),
    "T5DenseActDense": Mlp(up=("wi",), down="wo", act="act", between="dropout", cast=True),
    "T5DenseGatedActDense": Mlp(up=("wi_0", "wi_1"), down="wo", act="act", between="dropout", cast=True),
    "T5LayerNorm": Norm(),
}
