"""Suites: the issue's tables of layers, and the whole model."""

# As --only names them; a suite may have more, which run where they are named alone.
PARTS = ["forward", "train", "levels", "formats", "step", "products", "decode", "dropout", "plain", "unet"]
