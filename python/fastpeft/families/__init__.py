"""Families of models: a description each, and one set of quicker forwards over all of them."""
