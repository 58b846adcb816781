"""One adapter in one layer: a file per method, with its configuration and mathematics."""
