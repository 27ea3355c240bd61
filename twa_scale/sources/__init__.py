"""Candidates, read by slices: safetensors and torch files, whole or sharded, and state dicts in memory."""

from twa_scale.sources.open import open_candidates
from twa_scale.sources.protocol import Candidate

__all__ = ["Candidate", "open_candidates"]
