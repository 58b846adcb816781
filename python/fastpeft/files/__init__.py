"""Bytes on disk: checks of names, paths, json and safetensors files, atomic writes, whole tensors out of shards."""
