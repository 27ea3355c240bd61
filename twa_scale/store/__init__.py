"""The store holds the deltas of a rank's spans. Start with `store.py`."""

from twa_scale.store.cost import staging_bytes, step_cost, store_bytes, update_bytes
from twa_scale.store.in_memory import InMemoryStore
from twa_scale.store.make import bits_of, make_store, span_bytes
from twa_scale.store.offloaded import OffloadedStore
from twa_scale.store.store import SegmentSums, Store

__all__ = [
    "InMemoryStore",
    "OffloadedStore",
    "SegmentSums",
    "Store",
    "bits_of",
    "make_store",
    "span_bytes",
    "staging_bytes",
    "step_cost",
    "store_bytes",
    "update_bytes",
]
