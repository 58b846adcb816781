"""LoRA, its variants and its starts."""
