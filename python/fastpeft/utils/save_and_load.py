"""`peft.utils.save_and_load`."""

from ..checkpoint import get_peft_model_state_dict, set_peft_model_state_dict

__all__ = ["get_peft_model_state_dict", "set_peft_model_state_dict"]
