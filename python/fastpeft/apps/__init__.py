"""Programs that use the public names alone: command line, training, server, demos, vLLM's plugin."""
