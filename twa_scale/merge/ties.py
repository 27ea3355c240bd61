"""Tied weights in a merge, which knows no model: what it takes for tied has to be equal."""

from collections.abc import Sequence

from twa_scale.candidates import Candidate
from twa_scale.candidates.ties import likely_ties, says_tied
from twa_scale.errors import CandidateError
from twa_scale.merge.streamed import Checksums


def require_equal_ties(candidates: Sequence[Candidate], checksums: Checksums) -> None:
    """Refuse an embedding and a head that are one tensor by config.json or in some candidates, and are two in others.

    Raises:
        CandidateError: naming the candidate and both tensors.
    """
    for pair in likely_ties(candidates):
        found = [(i, sums[pair[0]] == sums[pair[1]]) for i, sums in enumerate(checksums) if sums.keys() >= set(pair)]
        tied = [candidates[i].label for i, equal in found if equal]
        if says_tied(candidates[-1]):
            tied.append(f"{candidates[-1].label}/config.json (tie_word_embeddings)")
        for i, equal in found:
            if tied and not equal:
                raise CandidateError(
                    f"{candidates[i].label}: tensors {pair[0]!r} and {pair[1]!r} hold different values, but are tied "
                    f"according to {tied[0]}. Leave this candidate out, name the tensor that is not meant in --ignore, "
                    "or correct config.json if they are not tied."
                )
