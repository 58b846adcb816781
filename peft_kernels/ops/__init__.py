"""One folder per op: `__init__.py` holds the contract (schema, check, fake, reference, autograd, public function),
`native.py`, `triton.py` and `cuda.py` one backend each."""
