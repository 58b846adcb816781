"""Comparison of this checkout (B) with another (A) in one run: the same rows in turns, beside A once more (A')."""
