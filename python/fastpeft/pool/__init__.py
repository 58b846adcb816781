"""AdapterPool: thousands of LoRA adapters on disk, few in memory, any for any row.

    pool = AdapterPool(model, "adapters/", max_resident=32)
    with pool.using(["alice", "bob", None]):        # an adapter, or None for the base, per row of the next forwards
        model(input_ids)

A server does the same step by step: `prefetch` when a request arrives (a thread reads and checks the file), `acquire`
or `try_acquire` between two forwards (copies it into its slot; the slot stays while someone holds it), `assign` for the
slots of the next forward's rows or tokens, `release` when the request has ended. All methods may be called from any
thread, except that `assign` belongs to the one that runs the model.
"""

from .adapter_pool import AdapterPool, Lease, PoolFull
from .files import AdapterLoadError, UnknownAdapterError
from .slots import PoolStats

__all__ = ["AdapterLoadError", "AdapterPool", "Lease", "PoolFull", "PoolStats", "UnknownAdapterError"]
