"""Candidates, read by byte ranges from any format. Start with `candidate.py`, the interface, then read `open.py`."""

from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.open import open_candidates
from twa_scale.candidates.open_together import open_together
from twa_scale.candidates.select import Wanted, wanted_from_options

__all__ = ["Candidate", "Wanted", "open_candidates", "open_together", "wanted_from_options"]
