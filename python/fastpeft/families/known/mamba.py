"""Mamba: state spaces, which stay their own code, and norms."""

from ..description import Norm, family

PARTS = family("Mamba", None, None, Norm())
