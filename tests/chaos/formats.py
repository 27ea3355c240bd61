"""Every supported format, written by its own library, and the values that reading must return."""

import importlib.util
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import nn

import twa_scale
from tests.old_torch import ALONE
from twa_scale.average.state import load_state, save_state
from twa_scale.candidates import open_candidates
from twa_scale.config import load_config

Values = dict[str, tuple[tuple[int, ...], torch.dtype, bytes]]
"""By name: shape, type and bytes of a tensor."""


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {f"layers.{i}.weight": torch.randn(9, 7, generator=generator) for i in range(4)}
    return made | {
        "embed.weight": torch.randn(40, 30, generator=generator),
        "half": torch.randn(5, 6, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator),
        "steps": torch.arange(5) + seed,
    }


def write_safetensors(path: Path, seed: int) -> None:
    path.mkdir(parents=True)
    save_file(tensors(seed), path / "model.safetensors")


def write_sharded(path: Path, seed: int, suffix: str = "safetensors", stem: str = "model") -> None:
    path.mkdir(parents=True)
    state = tensors(seed)
    weight_map: dict[str, str] = {}
    for i in range(2):
        file = f"{stem}-{i + 1:05d}-of-00002.{suffix}"
        part = {name: state[name] for name in sorted(state)[i::2]}
        save_file(part, path / file) if suffix == "safetensors" else torch.save(part, path / file)
        weight_map |= dict.fromkeys(part, file)
    (path / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_bins(path: Path, seed: int) -> None:
    write_sharded(path, seed, "bin", "pytorch_model")


def write_torch(path: Path, seed: int) -> None:
    path.mkdir(parents=True)
    torch.save({"model": tensors(seed), "step": 3}, path / "pytorch_model.bin")


def write_dcp(path: Path, seed: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": tensors(seed), "step": 3}, checkpoint_id=path, **ALONE)


def write_dcp_safetensors(path: Path, seed: int) -> None:
    state = {name: value for name, value in tensors(seed).items() if name != "scalar"}  # DCP writes it as zeros
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hf_storage = importlib.import_module("torch.distributed.checkpoint.hf_storage")
        writer = hf_storage.HuggingFaceStorageWriter(str(path), save_distributed=True)
        dcp.save(state, storage_writer=writer, **ALONE)


def write_state(path: Path, seed: int) -> None:
    candidates = [{"weight": torch.randn(3, 3), "bias": torch.randn(3)} for _ in range(2)]
    twa = twa_scale.attach(nn.Linear(3, 3), candidates)
    path.mkdir(parents=True)
    kept: dict[str, Any] = {"keep": "last", "kept": None, "finished": False, "course": {}, "candidates": ["a", "b"]}
    save_state(path, {"twa": twa.state_dict(), "step": seed, **kept})


def write_settings(path: Path, seed: int) -> None:
    path.mkdir(parents=True)
    (path / "x.yaml").write_text(
        f"candidates: [a, b]\noutput: out\ntask: {{name: causal_lm}}\nseed: {seed}\nsteps: 10\n"
        "basis: normalized\noptimizer: {name: adamw, lr: 3e-3}\n"
        "include: ['layers\\.[0-9]+']\n"
    )


def write_json_settings(path: Path, seed: int) -> None:
    path.mkdir(parents=True)
    settings = {"candidates": ["a", "b"], "output": "out", "task": {"name": "causal_lm"}, "seed": seed, "steps": 10}
    (path / "x.json").write_text(json.dumps(settings, indent=2))


def read_candidate(path: Path, others: list[Path]) -> Values:
    """Read all tensors of a candidate that is opened together with undamaged ones."""
    candidates = open_candidates([others[0], path, others[1]], notify=lambda _: None)
    try:
        return {name: _bytes_of(candidates[1], name) for name in candidates[1].names()}
    finally:
        for candidate in candidates:
            candidate.close()


def _bytes_of(candidate: Any, name: str) -> tuple[tuple[int, ...], torch.dtype, bytes]:
    shape, dtype = candidate.shape(name), candidate.dtype(name)
    out = torch.empty(torch.Size(shape).numel(), dtype=dtype)
    half = len(out) // 2
    candidate.read(name, 0, out[:half])
    candidate.read(name, half, out[half:])
    return shape, dtype, out.view(torch.uint8).numpy().tobytes()


def read_state(path: Path, _: list[Path]) -> Any:
    state = load_state(path)
    return state.step, state.twa.coefficients.tolist(), state.twa.fingerprint.checksums.tolist()


def read_settings(path: Path, _: list[Path]) -> Any:
    """Read settings. They have no checksum, so they must be valid or refused."""
    load_config(next(path.glob("x.*"), path / "x.yaml"))
    return None


def header_bytes(path: Path) -> int:
    """Return the offset of the data in a safetensors file."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def stored_bytes(original: Path, damaged: Path, values: Values) -> Values:
    """Return what `damaged` contains at the tensors of `original`. The data of safetensors has no checksum."""
    actual = dict(values)
    for file in original.glob("*.safetensors"):
        other = damaged / file.name
        raw = other.read_bytes() if other.is_file() else b""
        begin = header_bytes(file)
        header = json.loads(file.read_bytes()[8:begin])
        for name, entry in header.items():
            if name in values and raw:
                start, stop = entry["data_offsets"]
                shape, dtype, _ = values[name]
                actual[name] = (shape, dtype, raw[begin + start : begin + stop])
    return actual


@dataclass(frozen=True)
class Format:
    """A format: how to write and read it, and whether a change of its data can be detected."""

    write: Callable[[Path, int], None]
    read: Callable[[Path, list[Path]], Any] = read_candidate
    has_checksum: bool | None = True
    """None: of a part of the data."""


FORMATS = {
    "safetensors": Format(write_safetensors, has_checksum=False),
    "sharded": Format(write_sharded, has_checksum=False),
    "bin": Format(write_torch),
    "bins": Format(write_bins),
    "dcp": Format(write_dcp),
    "state": Format(write_state, read_state),
    "yaml": Format(write_settings, read_settings),
    "json": Format(write_json_settings, read_settings),
}
if importlib.util.find_spec("torch.distributed.checkpoint.hf_storage"):  # since torch 2.7
    FORMATS["dcp-safetensors"] = Format(write_dcp_safetensors, has_checksum=False)
