"""Memory and time of a training run by estimate, from a model's configuration and the headers of its files alone."""
