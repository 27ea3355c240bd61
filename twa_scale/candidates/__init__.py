"""Candidates, read by slices: safetensors, torch files, checkpoints of DeepSpeed and DCP, state dicts in memory."""

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.open import open_candidates
from twa_scale.candidates.open_together import open_together
from twa_scale.candidates.select import Wanted, asked_for

__all__ = ["Candidate", "Wanted", "asked_for", "open_candidates", "open_together"]
