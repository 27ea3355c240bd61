"""Candidates, read by slices: safetensors, torch files, checkpoints of DeepSpeed and DCP, state dicts in memory."""

from twa_scale.sources.open import open_candidates
from twa_scale.sources.protocol import Candidate
from twa_scale.sources.select import Wanted, asked_for
from twa_scale.sources.together import open_together

__all__ = ["Candidate", "Wanted", "asked_for", "open_candidates", "open_together"]
