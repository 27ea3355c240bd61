"""Token sequences: files, temporary files, and examples of tokens. Start with `sequence.py`."""

from twa_scale.run.tasks.tokens.files import Dtype, TokenFile
from twa_scale.run.tasks.tokens.sequence import Array, Concatenation, TokenArray, Tokens
from twa_scale.run.tasks.tokens.spool import Spool
from twa_scale.run.tasks.tokens.windows import IGNORED, Pieces, Windows

__all__ = [
    "IGNORED",
    "Array",
    "Concatenation",
    "Dtype",
    "Pieces",
    "Spool",
    "TokenArray",
    "TokenFile",
    "Tokens",
    "Windows",
]
