"""Refuse quantized weights: codes with scales, which cannot be averaged element by element."""

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from twa_scale.base.names import matches_any
from twa_scale.candidates.candidate import Candidate
from twa_scale.candidates.model_config import settings_of
from twa_scale.errors import CandidateError

_FLOAT8 = frozenset(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))
_INTEGERS = frozenset({torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32})
_LONG = frozenset({torch.int64, torch.uint64})
_CODES = re.compile(r"weight|codes|qdata|packed|quant|blocks|W_q|^_data$", re.IGNORECASE)
_SCALES = re.compile(r"scale|absmax|zero|scb|quant|codebook", re.IGNORECASE)
_SCALES_ALONE = re.compile(
    r"_?(scales?(_inv|_\w*weight)?|zeros?|zero_points?|absmax|scb|quant\w*|codebooks?)", re.IGNORECASE
)
_WEIGHT = re.compile(r"^(?!.*mask)(.*_)?q?weight(_|$)")
_ENDS_OF_CODES = re.compile(r"_(blocks|codes|packed|qdata|weight)$")
_FIX = (
    "Codes and scales cannot be averaged element by element: give the candidates from before quantization, "
    "or dequantize them (transformers: model.dequantize(), then save_pretrained)."
)


class _Method(NamedTuple):
    """The tensor names of a quantization method: the last parts of the names of codes, and of a tensor next to them."""

    name: str
    codes: str
    neighbor: str
    packs_long: bool = False
    """Whether codes may be packed into 64 bits, which are indices or counters otherwise."""


_METHODS = (
    _Method("bitsandbytes, 4 bits", r"weight", r"weight\.(absmax|quant_map|nested_absmax|quant_state\..+)"),
    _Method("bitsandbytes, 8 bits", r"weight", r"(weight\.)?SCB"),
    _Method("GPTQ", r"qweight", r"g_idx"),
    _Method("AWQ or GPTQ", r"qweight", r"qzeros"),
    _Method("SqueezeLLM", r"qweight", r"lookup_table"),
    _Method("Marlin", r"B(_24|_meta)?", r"s"),
    _Method("EXL2", r"q_weight", r"q_scale"),
    _Method("EXL3", r"trellis", r"su|suh|sv|svh"),
    _Method("QuIP#", r"Qidxs\w*", r"SU|SV", packs_long=True),
    _Method("SpQR", r"dense_weights", r"row_offsets|col_vals", packs_long=True),
    _Method("VPTQ", r"(\w+_)?indices", r"(\w+_)?centroids\.weight"),
    _Method("HQQ", r"W_q", r"(scale|zero|meta)"),
    _Method("AQLM", r"codes", r"codebooks"),
    _Method("compressed-tensors", r"weight_packed", r"weight_(scale|shape|zero_point)"),
    _Method("compressed-tensors", r"weight", r"(weight|input)_zero_point"),
    _Method("compressed-tensors, sparse", r"bitmask", r"compressed"),
)


def refuse_quantized(candidate: Candidate, ignore: Sequence[str] = (), known: Collection[str] = ()) -> None:
    """Check that a candidate has no quantized weights, and no quantization in its config.json.

    Args:
        candidate: the candidate to check.
        ignore: regular expressions of the tensors that are not read.
        known: the names of the model's tensors. Integers among them are not codes.

    Raises:
        CandidateError: naming the quantization and a tensor.
    """
    by_module = _by_module(candidate.names())
    for name in candidate.names():
        if name in known and candidate.dtype(name) not in _FLOAT8:
            continue
        if not matches_any(name, ignore) and (reason := _quantization(candidate, name, by_module)):
            raise CandidateError(f"{candidate.label}: tensor {name!r} is quantized ({reason}). {_FIX}")
    section = settings_of(candidate).get("quantization_config")
    if section:
        method = section.get("quant_method", "of no name") if isinstance(section, dict) else "of no name"
        raise CandidateError(
            f"{candidate.label}: its config.json has a quantization_config ({method}). {_FIX} If the weights are "
            "not quantized, remove that entry."
        )


def _quantization(candidate: Candidate, name: str, by_module: Mapping[str, Sequence[str]]) -> str | None:
    """Return the reason why a tensor is considered quantized, or None if it is not."""
    dtype = candidate.dtype(name)
    if dtype not in _FLOAT8 and dtype not in _INTEGERS and dtype not in _LONG:
        return None
    module, _, last = name.rpartition(".")
    prefix = f"{module}." if module else ""
    neighbors = {other.removeprefix(prefix): other for other in (*by_module[module], *_below(by_module, name))}
    kind = str(dtype).removeprefix("torch.")
    for method in _METHODS:
        if re.fullmatch(method.codes, last) and (method.packs_long or dtype not in _LONG):
            other = next((full for short, full in neighbors.items() if re.fullmatch(method.neighbor, short)), None)
            if other:
                return f"{method.name}: {kind} next to {other!r}"
    if dtype not in _LONG and _CODES.search(last) and (dtype in _FLOAT8 or len(candidate.shape(name)) > 1):
        stem = _ENDS_OF_CODES.sub("", last)
        other = next((full for short, full in neighbors.items() if full != name and _scales(short, stem)), None)
        if other:
            return f"{kind} codes next to {other!r}"
        if dtype not in _FLOAT8 and (last in ("weight", "qweight") or (dtype.itemsize == 1 and _WEIGHT.search(last))):
            return f"codes of type {kind}"
    return None


def _scales(name: str, stem: str) -> bool:
    """Return whether a name is one of scales, by itself or because it starts with the name of the codes."""
    return bool(_SCALES_ALONE.fullmatch(name) or (name.startswith(stem) and _SCALES.search(name)))


def _by_module(names: Sequence[str]) -> dict[str, list[str]]:
    result: dict[str, list[str]] = defaultdict(list)
    for name in names:
        result[name.rpartition(".")[0]].append(name)
    return result


def _below(by_module: Mapping[str, Sequence[str]], name: str) -> Iterator[str]:
    """Yield tensors below this one, such as `weight.absmax` and `weight.quant_state.x`, and centroids of its module."""
    module, _, last = name.rpartition(".")
    kind = last.removesuffix("indices")
    for inner in (name, f"{name}.quant_state", f"{module}.{kind}centroids"):
        yield from by_module.get(inner, ())
