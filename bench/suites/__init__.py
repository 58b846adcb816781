"""Suites: the issue's tables of layers, and the whole model."""
