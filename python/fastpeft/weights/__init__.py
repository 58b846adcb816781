"""One base layer: reading, writing, quantising and saving its weight, whatever stores it."""
