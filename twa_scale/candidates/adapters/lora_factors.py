"""Find the factors of LoRA among the tensors of a candidate, by their names."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from twa_scale.candidates.candidate import Candidate
from twa_scale.errors import CandidateError

_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(embedding_)?(?P<factor>[AB])(\.(?!weight$|bias$)[^.]+)?(\.(?P<kind>weight|bias))?"
)
_LORA_TENSOR = re.compile(r"(^|\.)lora_")


@dataclass(frozen=True)
class Factors:
    """The names of the tensors of one module. Its update is s B A, with A (r, in, ..) and B (out, r, ..)."""

    module: str
    a: str
    b: str
    bias: str | None = None
    """The bias of B (`lora_bias`): s times the bias is added to the output."""


def factors_in(names: Iterable[str]) -> dict[str, Factors]:
    """Return the factors of LoRA by module. Other tensors, such as `modules_to_save`, are left out."""
    result: dict[str, dict[str, str]] = {}
    for name in names:
        if match := _FACTOR.fullmatch(name):
            part = "bias" if match["kind"] == "bias" else match["factor"]
            result.setdefault(match["module"], {})[part] = name
    return {
        module: Factors(module, parts["A"], parts["B"], parts.get("bias"))
        for module, parts in result.items()
        if parts.keys() >= {"A", "B"}
    }


def other_parts(names: Iterable[str], factors: Iterable[Factors]) -> list[str]:
    """Return the tensors of LoRA that are neither A nor B, such as the magnitudes of DoRA."""
    known = {name for pair in factors for name in (pair.a, pair.b, pair.bias)}
    return [name for name in names if _LORA_TENSOR.search(name) and name not in known]


def rank_of(candidate: Candidate, factors: Factors) -> int:
    """Return the rank of the factors, from their shapes.

    Raises:
        CandidateError: the shapes are not those of two factors of one product.
    """
    a, b = candidate.shape(factors.a), candidate.shape(factors.b)
    if len(a) < 2 or len(b) < 2 or a[0] != b[1] or prod(b[2:]) != 1:
        raise CandidateError(
            f"{candidate.label}: {factors.a!r} of shape {a} and {factors.b!r} of shape {b} are not the factors A (r, "
            "in) and B (out, r) of one product, as those of grouped convolutions are not. Use `space: factors`."
        )
    return a[0]
