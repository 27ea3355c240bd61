"""The space in which adapters are averaged: their factors separately, or the products of their factors."""

from collections.abc import Iterable, Mapping, Sequence
from math import sqrt
from typing import Literal

from twa_scale.base.names import quoted
from twa_scale.candidates.adapters.adapter_config import ADAPTER_CONFIG, PREFIX, AdapterConfig, adapter_config
from twa_scale.candidates.adapters.concatenated import concatenated
from twa_scale.candidates.adapters.lora_factors import factors_in, other_parts, rank_of
from twa_scale.candidates.adapters.rescaled import Rescaled
from twa_scale.candidates.adapters.same_meaning import require_same_meaning
from twa_scale.candidates.candidate import Candidate
from twa_scale.errors import CandidateError

Space = Literal["auto", "factors", "product"]
"""The setting `space`. `auto` is `factors` with a notice."""
_PATTERNS = ("rank_pattern", "alpha_pattern")
_FACTORS = "Average their factors with `space: factors` (--space factors)"
_MERGED = "or merge each adapter into its base model (merge_and_unload) and average those"


def in_space(candidates: Sequence[Candidate], space: Space) -> tuple[list[Candidate], list[str]]:
    """Return candidates as they are averaged in a space, and notices for the user.

    In the space of factors, candidates that are not adapters are unchanged, and adapters are multiplied so that all
    have the scaling of the last one.

    Raises:
        CandidateError: the candidates are adapters of several kinds, or adapters and full weights; the ranks differ in
            the space of factors; or a candidate has no products of two factors in the space of products.
    """
    configs = [adapter_config(candidate) for candidate in candidates]
    _require_one_kind(candidates, configs)
    adapters = [config for config in configs if config]
    products = _products(candidates, configs) if space == "product" else None
    require_same_meaning(adapters)
    if products is not None:
        return products, []
    if not adapters or adapters[-1].kind != "LORA":
        return list(candidates), []
    return _factors(candidates, adapters), [_formatted(candidates)] if space == "auto" and len(candidates) > 1 else []


def scalings(candidate: Candidate, looked_up: Mapping[str, str] | None = None) -> dict[str, float]:
    """Return the scaling of every module of a LoRA adapter; empty for other candidates.

    Args:
        candidate: the adapter.
        looked_up: the names that PEFT compares with patterns, by the names of the modules in a model.

    Raises:
        CandidateError: the configuration does not give a scaling.
    """
    config = adapter_config(candidate)
    if config is None or config.kind != "LORA":
        return {}
    known = looked_up or {}
    return {
        module: config.scaling(module, known.get(module.removeprefix(PREFIX)))
        for module in factors_in(candidate.names())
    }


def described(candidate: Candidate) -> str | None:
    """Return a text with the kind of an adapter, and for LoRA its ranks and scalings; None for other candidates."""
    config = adapter_config(candidate)
    if config is None:
        return None
    modules = factors_in(candidate.names()) if config.kind == "LORA" else {}
    possible = [item for module in modules for item in config.possible_scalings(module).items()]
    if not possible:
        return config.kind
    ranks, scales = _range(rank for _, rank in possible), _range(scale for scale, _ in possible)
    return f"{config.kind}, rank {ranks}, scaling {scales}"


def _range(numbers: Iterable[float]) -> str:
    ordered = sorted(numbers)
    return f"{ordered[0]:.3g}" if ordered[0] == ordered[-1] else f"{ordered[0]:.3g} to {ordered[-1]:.3g}"


def _require_one_kind(candidates: Sequence[Candidate], configs: Sequence[AdapterConfig | None]) -> None:
    last = configs[-1]
    for candidate, config in zip(candidates, configs, strict=True):
        if (config is None) != (last is None):
            adapter, other = (candidates[-1], candidate) if config is None else (candidate, candidates[-1])
            raise CandidateError(
                f"{adapter.label}: is an adapter of PEFT, but {other.label} has no {ADAPTER_CONFIG} next to its "
                "weights. Candidates are of one kind: give adapters only, as directories, or merge the adapters into "
                "their base models first (merge_and_unload)."
            )
        if config and last and config.kind != last.kind:
            raise CandidateError(
                f"{config.path}: peft_type is {config.kind}, that of {candidates[-1].label} is {last.kind}. Adapters "
                "are averaged with others of their kind: leave this one out."
            )


def _factors(candidates: Sequence[Candidate], configs: Sequence[AdapterConfig]) -> list[Candidate]:
    """Return LoRA adapters with the scaling of the last one: both factors are multiplied by the root of the quotient.

    Raises:
        CandidateError: the ranks differ, a scaling is not known, or the scalings of OLoRA differ.
    """
    _require_equal_ranks(candidates)
    if all(config.scaling_settings == configs[-1].scaling_settings for config in configs):
        return list(candidates)
    reference = scalings(candidates[-1])
    result: list[Candidate] = []
    for candidate, config in zip(candidates, configs, strict=True):
        current = scalings(candidate)
        if config.changes_base == "olora":
            _require_equal_scalings(config, current, configs[-1], reference)
        scales: dict[str, float] = {}
        for module, scaling in current.items():
            quotient, pair = scaling / reference.get(module, scaling), factors_in(candidate.names())[module]
            scales |= {pair.a: sqrt(abs(quotient)), pair.b: sqrt(abs(quotient)) * (1 if quotient > 0 else -1)}
            scales |= {pair.bias: quotient} if pair.bias else {}
        result.append(_rescaled(candidate, scales))
    return result


def _require_equal_scalings(
    config: AdapterConfig, current: Mapping[str, float], last: AdapterConfig, reference: Mapping[str, float]
) -> None:
    """Check the scalings of OLoRA, because loading subtracts the scaled factors of the base weight from it.

    Raises:
        CandidateError: names the module and both scalings.
    """
    for module, scaling in current.items():
        if scaling != reference.get(module, scaling):
            raise CandidateError(
                f"{config.path}: OLoRA scales {module!r} by {scaling:g}, and by {reference[module]:g} in {last.path}. "
                "Loading subtracts the scaled factors of the base weight from it, so adapters of other scalings belong "
                "to other base weights. Convert them first (save_pretrained(path_initial_model_for_weight_conversion="
                f"..)), {_MERGED}."
            )


def _require_equal_ranks(candidates: Sequence[Candidate]) -> None:
    last = {module: candidates[-1].shape(pair.a)[:1] for module, pair in factors_in(candidates[-1].names()).items()}
    for candidate in candidates[:-1]:
        for module, pair in factors_in(candidate.names()).items():
            rank = candidate.shape(pair.a)[:1]
            if rank != last.get(module, rank):
                raise CandidateError(
                    f"{candidate.label}: the factors of {module!r} have rank {rank[0]}, those of "
                    f"{candidates[-1].label} {last[module][0]}. Factors of different ranks have no average, but their "
                    "products do: use `space: product` (--space product)."
                )


def _products(candidates: Sequence[Candidate], configs: Sequence[AdapterConfig | None]) -> list[Candidate]:
    """Return LoRA adapters as points of the space of products."""
    result: list[Candidate] = []
    for candidate, config in zip(candidates, configs, strict=True):
        if config is None:
            raise CandidateError(
                f"{candidate.label}: space: product needs LoRA adapters of PEFT, directories with {ADAPTER_CONFIG}, "
                f"which gives the scaling of products; there is none. Leave `space` out."
            )
        _require_products(candidate, config)
        factors = factors_in(candidate.names())
        scales = {
            name: scaling
            for module, scaling in scalings(candidate).items()
            for name in (factors[module].b, factors[module].bias)
            if name
        }
        result.append(_rescaled(candidate, scales))
    return concatenated(result, _experts(candidates, configs))


def _experts(candidates: Sequence[Candidate], configs: Sequence[AdapterConfig | None]) -> dict[str, int]:
    """Return the number of stacked matrices in the factors of each module, which PEFT stacks for `target_parameters`.

    Raises:
        CandidateError: a rank differs from that of the configuration, or the numbers of experts differ.
    """
    result: dict[str, int] = {}
    for candidate, config in zip(candidates, configs, strict=True):
        assert config is not None
        stacked = config.settings.get("target_parameters")
        for module, pair in factors_in(candidate.names()).items():
            experts, rest = divmod(rank_of(candidate, pair), config.rank(module))
            if rest or (experts > 1 and not stacked) or result.setdefault(module, experts) != experts:
                raise CandidateError(
                    f"{candidate.label}: the factors of {module!r} have rank {rank_of(candidate, pair)}, and "
                    f"{config.path} says {config.rank(module)}. {_FACTORS}, {_MERGED}."
                )
    return result


def _require_products(candidate: Candidate, config: AdapterConfig) -> None:
    """Check that the update of an adapter is s B A.

    Raises:
        CandidateError: names the other kind of update.
    """
    factors = factors_in(candidate.names())
    others = other_parts(candidate.names(), factors.values())
    reason = None
    if config.kind != "LORA":
        reason = f"{config.kind} adapters have no product of two factors A and B"
    elif config.settings.get("use_dora"):
        reason = "DoRA (use_dora) scales the sum of base weight and product, which averages of products do not"
    elif config.changes_base:
        reason = (
            f"init_lora_weights is {config.changes_base!r}: loading subtracts a product of the original rank from the "
            "base weights. Convert it first (save_pretrained(path_initial_model_for_weight_conversion=..))"
        )
    elif config.settings.get("target_parameters") and any(map(config.settings.get, _PATTERNS)):
        reason = (
            f"{' and '.join(filter(config.settings.get, _PATTERNS))} with target_parameters have names of "
            "parameters, which files of weights do not have"
        )
    elif others:
        reason = f"{quoted(others, 2)} are neither A nor B of LoRA"
    elif not factors:
        reason = "it holds no factors of LoRA"
    if reason:
        raise CandidateError(f"{config.path}: space: product is not possible: {reason}. {_FACTORS}, {_MERGED}.")


def _rescaled(candidate: Candidate, scales: Mapping[str, float]) -> Candidate:
    return candidate if all(scale == 1 for scale in scales.values()) else Rescaled(candidate, scales)


def _formatted(candidates: Sequence[Candidate]) -> str:
    return (
        f"{candidates[-1].label}: LoRA adapters are averaged in the space of their factors: A and B one by one, which "
        "is not the average of the products B A. `space: product` (--space product) averages those; `space: factors` "
        "removes this notice."
    )
