"""Stays: the one way to say that a layer's forward stays PEFT's own."""

from __future__ import annotations


class Stays(Exception):
    """A reason, as a report gives it, why PEFT's own forward computes a layer, or a call of one."""
