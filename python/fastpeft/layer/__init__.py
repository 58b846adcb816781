"""Several adapters in one layer: composing, merging, tensors that layers share."""
