"""`fastpeft serve`: one base model and the adapters of a directory behind an OpenAI-compatible HTTP server.

`batching` puts adapters, sampling and attention on a CPU into transformers' continuous batching; `engine` is that for
asyncio, with the adapters' slots; `api` is the HTTP application, `run` the process. `import fastpeft` imports none.
"""
