"""One adapter in one layer: a file per method, its configuration and its mathematics. A new file is found by itself."""
