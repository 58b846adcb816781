"""PEFT's module paths, and the functions that only PEFT's users call."""
