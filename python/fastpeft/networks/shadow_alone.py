"""A shadow without its base model: backbone, projection and head, as a model of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

from .shadow_head import loss_of_classes, loss_of_tokens, of_last_token

_OF_A_HEAD = ("logits_to_keep", "num_logits_to_keep")  # what `generate` gives a model with a head


class DetachedShadowModel(PreTrainedModel, GenerationMixin):
    """head(projection(backbone(x))): a causal language model that generates, or a classifier of sequences.

    input_embeddings: the table of a base model, used where the backbone has none. It is no module of this one and in no
    file of it. Without a head the projected states [batch, tokens, width] are returned.
    """

    main_input_name = "input_ids"
    base_model_prefix = "backbone"
    _supports_sdpa = _supports_flash_attn = _supports_flash_attn_2 = _supports_flex_attn = True
    _supports_attention_backend = _supports_cache_class = True

    def __init__(
        self, backbone: Any, projection: nn.Module | None = None, head: nn.Module | None = None,
        is_classification: bool = False, input_embeddings: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__(backbone.config)
        self.backbone = backbone
        self.shadow_hidden_projection = nn.Identity() if projection is None else projection
        self.head = head
        self.is_classification = is_classification
        self._embeddings = [input_embeddings]  # in a list, so that it is no submodule
        own = getattr(backbone, "generation_config", None)
        self.generation_config = own or GenerationConfig.from_model_config(self.config)

    def can_generate(self) -> bool:  # type: ignore[override]  # it depends on the head
        # transformers asks before `__init__` is done
        return getattr(self, "head", None) is not None and not getattr(self, "is_classification", False)

    def get_input_embeddings(self) -> Any:
        shared = self._embeddings[0]
        return self.backbone.get_input_embeddings() if shared is None else shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self._embeddings[0] is None:
            self.backbone.set_input_embeddings(value)
        else:
            self._embeddings[0] = value

    def get_output_embeddings(self) -> Any:
        return None if getattr(self, "is_classification", False) else self.head

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:  # fmt: skip
        kwargs = {name: value for name, value in kwargs.items() if name not in _OF_A_HEAD}
        if self._embeddings[0] is not None and kwargs.get("inputs_embeds") is None:
            if input_ids is None:
                raise ValueError("Either `input_ids` or `inputs_embeds` must be provided.")
            kwargs["inputs_embeds"], input_ids = self._embeddings[0](input_ids), None
        kwargs["return_dict"] = True
        out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        hidden = self.shadow_hidden_projection(out.last_hidden_state)
        if self.head is None:
            return hidden
        if self.is_classification:
            logits = self.head(of_last_token(hidden, attention_mask))
            loss = None if labels is None else loss_of_classes(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)
        logits = self.head(hidden)
        loss = None if labels is None else loss_of_tokens(logits, labels)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=getattr(out, "past_key_values", None))
