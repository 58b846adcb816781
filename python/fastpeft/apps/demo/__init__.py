"""The demonstration that needs no hub: a real small model, real data, and the quickstart that trains on them."""
