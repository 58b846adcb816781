"""Procedures over a model: starts that measure it first, conversions, optimizers, a quicker Llama on CPUs."""
