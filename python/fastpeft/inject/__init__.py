"""Modules that get a layer, and putting it in: a plan that changes nothing, then its commit."""
