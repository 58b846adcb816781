"""PEFT's module paths, each name from where it lives here, and the functions that only PEFT's users call."""
