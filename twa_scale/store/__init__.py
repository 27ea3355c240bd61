"""The store: deltas of the local spans, beside the weights."""

from twa_scale.store.make import bytes_per_element, make_store
from twa_scale.store.protocol import Store

__all__ = ["Store", "bytes_per_element", "make_store"]
