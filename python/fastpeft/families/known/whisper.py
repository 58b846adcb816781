"""Whisper: MLPs stand in the layers of encoder and decoder."""

from ..description import Spread, Together

_MLP = Spread(up=("fc1",), act="activation_fn", down="fc2", between="activation_dropout")

PARTS = {
    "WhisperAttention": Together(names=("q_proj", "k_proj", "v_proj"), other="key_value_states"),
    "WhisperEncoderLayer": _MLP,
    "WhisperDecoderLayer": _MLP,
}
