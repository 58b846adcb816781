"""Bytes on disk: checks of what is read, atomic writes, whole tensors out of shards."""
