"""Procedures over a model: measured starts, conversions, optimizers, a quicker model."""
