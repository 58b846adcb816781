"""Adapters in folders and state dicts: keys, checks against a model, loading, swapping, export."""
