"""Check that tied weights are equal in a merge, which has no model that defines the ties."""

from collections.abc import Sequence

from twa_scale.candidates import Candidate
from twa_scale.candidates.ties import has_tied_embeddings, likely_ties
from twa_scale.errors import CandidateError
from twa_scale.merge.streamed import Checksums


def require_equal_ties(candidates: Sequence[Candidate], checksums: Checksums) -> None:
    """Check that an embedding and a head that are tied in config.json or in one candidate are equal in all.

    Raises:
        CandidateError: names the candidate and both tensors.
    """
    for pair in likely_ties(candidates):
        comparisons = [
            (i, sums[pair[0]] == sums[pair[1]]) for i, sums in enumerate(checksums) if sums.keys() >= set(pair)
        ]
        tied = [candidates[i].label for i, equal in comparisons if equal]
        if has_tied_embeddings(candidates[-1]):
            tied.append(f"{candidates[-1].label}/config.json (tie_word_embeddings)")
        for i, equal in comparisons:
            if tied and not equal:
                raise CandidateError(
                    f"{candidates[i].label}: tensors {pair[0]!r} and {pair[1]!r} hold different values, but are tied "
                    f"according to {tied[0]}. Leave this candidate out, name one of the tensors in --ignore, "
                    "or correct config.json if they are not tied."
                )
