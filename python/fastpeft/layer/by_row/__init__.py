"""A different adapter for each row of a batch, in one pass over the base layer."""
