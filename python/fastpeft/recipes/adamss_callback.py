"""Adaptive subspace allocation in transformers' Trainer."""

from typing import Any

from transformers import TrainerCallback


class AdamssAsaCallback(TrainerCallback):
    """Calls `model.base_model.update_and_allocate(step)` in every optimizer step; the configuration says the rest."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs.get("model")
        update = getattr(getattr(model, "base_model", model), "update_and_allocate", None)
        if update is not None:
            update(state.global_step)
