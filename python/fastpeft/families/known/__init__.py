"""One file a family, named as transformers names its folder; no forward is in it."""
