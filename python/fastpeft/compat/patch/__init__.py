"""PEFT's own layers in a model that somebody else built, computed by our methods and kernels."""
