"""Trainable tokens: some rows of an embedding (or of an output head) are replaced by trained ones.

W[token_indices] -> delta, by rows of the table. In an embedding the rows that were looked up are replaced, found by a
binary search per token; in a linear layer the outputs of these rows. The table is never copied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.base import HasInitWeights, TargetConfig
from ..weights.dense import scaled
from .method import Inner, LayerInfo, Method, State
from .tied import embedding_name, tied_names


@dataclass
class TrainableTokensConfig(HasInitWeights, TargetConfig, own_type="TRAINABLE_TOKENS"):
    """token_indices: the rows to train. init_weights: start from the rows as they are, or random (False)."""

    not_in_peft = ("exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")

    token_indices: list[int] = field(default_factory=list)


class TrainableTokens(Method, config=TrainableTokensConfig):
    tensors = ("trainable_tokens_delta",)
    kinds = frozenset({"embedding", "linear"})
    examples = ({"token_indices": [3, 17, 0]}, {"token_indices": [5], "init_weights": False})

    def check_config(self, config: TrainableTokensConfig, loading: bool = False) -> None:
        tokens: Any = config.token_indices
        if not isinstance(tokens, (list, tuple)) or not tokens or any(type(i) is not int or i < 0 for i in tokens):
            raise ValueError(f"token indices should be a list of non-negative integers, got {tokens!r}")
        if len(set(tokens)) < len(tokens):
            raise ValueError("token indices should name each token once")

    def check_layer(self, config: TrainableTokensConfig, info: LayerInfo) -> None:
        super().check_layer(config, info)
        rows = info.in_features if info.kind == "embedding" else info.out_features
        outside = [i for i in config.token_indices if i >= rows]
        if outside:
            raise ValueError(f"token_indices holds {outside[0]}, but {info.name!r} has {rows} rows")

    def open_fields(self, config: TrainableTokensConfig, model: nn.Module, model_type: str | None) -> dict[str, Any]:
        return {} if config.target_modules is not None else {"target_modules": embedding_name(model) or "embed_tokens"}

    def followers(self, config: Any, model: nn.Module) -> Mapping[str, str]:
        return tied_names(model)

    def make_state(self, config: TrainableTokensConfig, info: LayerInfo, shared: Any) -> State:
        tokens = list(config.token_indices)
        width = info.out_features if info.kind == "embedding" else info.in_features
        # Never on the meta device: layers share rows that are few, and their order is in no file.
        rows = torch.empty(len(tokens), width, dtype=info.dtype, device="cpu")
        w, kept = info.base.read()[0], {}
        if not w.is_meta:
            found = (w.t() if info.kind == "embedding" else w)[tokens].detach().clone()
            kept["trainable_tokens_original"] = nn.Buffer(found, persistent=False)  # for PEFT's users alone
        if not config.init_weights:
            rows.normal_()
        elif kept:
            rows = found.clone()
        index = torch.tensor(tokens, dtype=torch.long, device="cpu")
        order = nn.Buffer(torch.stack(torch.sort(index)), persistent=False)
        state = {"trainable_tokens_delta": nn.Parameter(rows), "token_indices": tokens, "trainable_tokens_order": order}
        return {**state, **kept}

    def check_together(self, views: Sequence[Any]) -> None:
        seen: set[int] = set()
        for s in views:
            if twice := seen.intersection(s.token_indices):
                raise ValueError(
                    f"Token indices of adapter {s._name} are already defined and would result in undefined merging "
                    f"behavior: another adapter trains {sorted(twice)} too. Only one adapter can be set at a time for "
                    "TrainableTokensWrapper where adapters train the same rows."
                )
            seen.update(s.token_indices)

    def tie(self, config: Any, adapter: str, layers: Mapping[str, Any], leaders: Mapping[str, str]) -> None:
        for name, leader in leaders.items():
            layers[name].trainable_tokens_delta[adapter] = layers[leader].trainable_tokens_delta[adapter]

    def merged(self, s: Any, shared: Any, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows, places = s.trainable_tokens_order
        delta = s.trainable_tokens_delta[places].to(w.dtype)
        embedding = s._layer.base.kind == "embedding"
        return (w.index_copy(1, rows, delta.t()) if embedding else w.index_copy(0, rows, delta)), b

    def output(self, s: Any, shared: Any, x: Tensor, y: Tensor, inner: Inner) -> Tensor:
        delta, (rows, places) = s.trainable_tokens_delta, s.trainable_tokens_order
        info = inner.info
        if info.kind == "embedding":
            at = torch.searchsorted(rows, x).clamp_(max=len(rows) - 1)
            # As nn.Embedding, whose padding row gets no gradient.
            padding: Any = info.module.padding_idx
            place = s.token_indices.index(padding) if padding in s.token_indices else None
            mine = scaled(info.module, F.embedding(places[at], delta, place))
            return torch.where((rows[at] == x).unsqueeze(-1), mine.to(y.dtype), y)
        bias = inner.bias()
        mine = F.linear(x.to(delta.dtype), delta[places], None if bias is None else bias[rows].to(delta.dtype))
        return y.index_copy(-1, rows, mine.to(y.dtype))


class FollowingTokens(TrainableTokens):
    """Rows that another layer trains and that are in files with it alone."""

    def file_key(self, key: str) -> str | None:
        return None
