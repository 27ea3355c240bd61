"""The store: deltas of the local spans, beside the weights."""

from twa_scale.store.make import make_store, span_bytes
from twa_scale.store.offloaded import BUFFER
from twa_scale.store.protocol import Store

__all__ = ["BUFFER", "Store", "make_store", "span_bytes"]
