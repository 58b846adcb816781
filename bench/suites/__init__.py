"""Suites: the issue's tables of layers, and the whole model."""

PARTS = ["forward", "train", "levels", "step", "decode", "dropout", "plain", "unet"]  # as --only names them
