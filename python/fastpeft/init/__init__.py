"""Procedures before or after LoRA's starts: measuring what they need, and giving the base back what they took."""
