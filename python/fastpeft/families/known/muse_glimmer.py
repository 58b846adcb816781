"""Muse Glimmer, the language part: a norm without weights for q and k, a gate of the output, by its own code."""

from ..description import Mlp, Norm, Together, family

PARTS = family(
    "MuseGlimmerText", Together(names=("q_proj", "k_proj", "v_proj", "gate_proj")), Mlp(), None,
    MuseGlimmerTextCenteredRMSNorm=Norm(eps="eps", offset=1.0), MuseGlimmerRMSNorm=Norm(eps="eps"),
)  # fmt: skip
