"""Prompts: trained vectors before the input, or keys and values before those of all layers; a method is a file."""
