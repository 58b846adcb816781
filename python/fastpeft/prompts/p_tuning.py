"""P-tuning: the vectors before the input are made by a small network, which training needs alone (arXiv 2103.10385)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..config.base import PromptLearningConfig
from ..config.types import warn
from .encoder import BasePromptEncoder
from .method import PromptMethod


class PromptEncoderReparameterizationType(str, enum.Enum):
    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig, own_type="P_TUNING"):
    """encoder_reparameterization_type: "MLP" or "LSTM". encoder_hidden_size: its width (None: token_dim).
    encoder_num_layers, encoder_dropout: of the LSTM."""

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = PromptEncoderReparameterizationType.MLP
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0


class PromptEncoder(BasePromptEncoder):
    """An embedding [tokens, token_dim] and, in training, the network that the prompt comes out of."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, hidden = config.token_dim, config.encoder_hidden_size
        self.token_dim = self.input_size = self.output_size = width
        self.hidden_size, self.encoder_type = hidden, config.encoder_reparameterization_type
        self.total_virtual_tokens = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(self.total_virtual_tokens, width)
        if config.inference_mode:
            return
        if self.encoder_type == "LSTM":
            self.lstm_head = nn.LSTM(
                width, hidden, config.encoder_num_layers, dropout=config.encoder_dropout, bidirectional=True,
                batch_first=True,
            )  # fmt: skip
            self.mlp_head = nn.Sequential(nn.Linear(hidden * 2, hidden * 2), nn.ReLU(), nn.Linear(hidden * 2, width))
            return
        if config.encoder_num_layers != PromptEncoderConfig.encoder_num_layers:
            usual = PromptEncoderConfig.encoder_num_layers
            warn(f"for MLP, the argument `encoder_num_layers` is ignored. Exactly {usual} MLP layers are used.")
        self.mlp_head = nn.Sequential(
            nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, width)
        )

    def forward(self, indices: Tensor) -> Tensor:
        return self._made(self.embedding(indices))

    def prompt(self, task_ids: Tensor | None = None) -> Tensor:
        return self._made(self.embedding.weight)

    def _made(self, x: Tensor) -> Tensor:
        x = self.lstm_head(x)[0] if "lstm_head" in self._modules else x
        return self.mlp_head(x) if "mlp_head" in self._modules else x

    def drop_network(self) -> None:
        """Make room for what the network gave, in its place."""
        for name in ("mlp_head", "lstm_head"):
            self._modules.pop(name, None)


class PTuning(PromptMethod, config=PromptEncoderConfig):
    encoder_class = PromptEncoder

    def check_config(self, config: Any, loading: bool = False) -> None:
        super().check_config(config, loading)
        found = getattr(config.encoder_reparameterization_type, "value", config.encoder_reparameterization_type)
        if found not in ("MLP", "LSTM"):
            raise ValueError(
                "Prompt encoder type not recognized. Please use one of MLP (recommended) or LSTM, got "
                f"encoder_reparameterization_type={found!r}."
            )
