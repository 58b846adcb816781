"""Nemotron and Minitron: squared ReLU, a part of each head is turned, norms of LayerNorm multiply by one plus their weight."""

from ..description import Attention, Mlp, Norm, family

PARTS = family(
    "Nemotron", Attention(), Mlp(up=("up_proj",)), None, NemotronLayerNorm1P=Norm(eps="eps", offset=1.0, mean=True)
)
