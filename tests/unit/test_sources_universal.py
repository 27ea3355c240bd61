"""Universal checkpoints, written by DeepSpeed's converter and by these tests."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import twa_scale
from tests.slices import opened, read, refused
from twa_scale.candidates import open_candidates
from twa_scale.candidates.expand import versions_or_parts
from twa_scale.errors import CandidateError, OutputError
from twa_scale.merge import average_fixed

pytestmark = pytest.mark.xdist_group("written-by-deepspeed")

TYPES = (torch.float32, torch.float16, torch.bfloat16)


def universal(folder: Path, trained: dict[str, torch.Tensor], in_model: dict[str, torch.Tensor]) -> Path:
    """Write the files of a universal checkpoint that are read."""
    shapes = {name: value.shape for name, value in trained.items()}
    for name, value in trained.items():
        (folder / f"zero/{name}").mkdir(parents=True)
        torch.save({"param": value}, folder / f"zero/{name}/fp32.pt")
    torch.save({"module": in_model, "param_shapes": [shapes]}, folder / "mp_rank_00_model_states.pt")
    return folder


@pytest.mark.parametrize("dtype", TYPES)
def test_weights_are_compared_in_the_type_of_the_model(dtype: torch.dtype, tmp_path: Path) -> None:
    """Norms have similar values, so exchanges by `round_robin_gradients` may differ little."""
    a, b = 1 + 0.004 * torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    a[3] = torch.nan  # the weights are not finite, which is another error
    model = {"a.weight": a.to(dtype), "b.weight": b.to(dtype)}
    folder = universal(tmp_path / "same", {"a.weight": a, "b.weight": b}, model)
    assert torch.equal(read(opened(folder), "b.weight", 0, 300), b)
    neighbours = {name: torch.nextafter(value, 2 * value) for name, value in model.items()}
    opened(universal(tmp_path / "neighbours", {"a.weight": a, "b.weight": b}, neighbours))
    message = refused(universal(tmp_path / "exchanged", {"a.weight": b, "b.weight": a}, model))
    assert "a.weight/fp32.pt: holds other numbers than the file of the model has" in message


def test_only_universal_directories_are_versions(tmp_path: Path) -> None:
    both = [tmp_path / "run", tmp_path / "run_universal"]
    both[1].mkdir()
    assert versions_or_parts(both) is None
    (both[1] / "latest_universal").touch()
    assert "versions of one model" in (versions_or_parts(both) or "")


@pytest.mark.parametrize(
    ("case", "content", "message"),
    [
        ("2/u-2-bf16", None, "has no zero/'up.weight'/fp32.pt, the weights of a parameter"),
        ("2/u-2-bf16", {"exp_avg": torch.ones(11, 5)}, "up.weight/fp32.pt: holds no tensor 'param'"),
        (
            "2/u-2-bf16",
            {"param": torch.ones(5, 11)},
            r"holds a tensor of shape \(5, 11\), where the model has \(11, 5\)",
        ),
        ("2/u-3-fp32", torch.ones(56), r"holds a tensor of shape \(56,\), where the model has \(11, 5\)"),
    ],
)
def test_universal_checkpoints_without_a_weight_are_refused(
    written: Path, tmp_path: Path, case: str, content: Any, message: str
) -> None:
    folder = shutil.copytree(written / case, tmp_path / "run") / "step1"
    file = folder / "zero/up.weight/fp32.pt"
    file.unlink()
    if content is not None:
        torch.save(content, file)
    assert re.search(message, refused(folder.parent))


def test_exchanged_parameters_of_a_universal_checkpoint_are_refused(written: Path, tmp_path: Path) -> None:
    """DeepSpeed 0.19.8 writes such checkpoints of a run with `round_robin_gradients`."""
    folder = shutil.copytree(written / "2/u-2-bf16", tmp_path / "run") / "step1"
    up, down = (folder / f"zero/{name}.weight/fp32.pt" for name in ("up", "down"))
    values = torch.load(up)["param"].reshape(-1), torch.load(down)["param"].reshape(-1)
    torch.save({"param": values[1].view(11, 5)}, up)
    assert "up.weight/fp32.pt: holds other numbers than the file of the model has" in refused(folder)


def test_universal_checkpoints_next_to_their_originals(written: Path, tmp_path: Path) -> None:
    run = shutil.copytree(written / "2/2-bf16", tmp_path / "run")
    shutil.copytree(written / "2/u-2-bf16/step1", run / "global_step1_universal")
    shutil.copy(written / "2/u-2-bf16/latest_universal", run)
    both = [run / "global_step1", run / "global_step1_universal"]
    with pytest.raises(CandidateError, match=r"'global_step1_universal' in .* are versions of one model"):
        open_candidates(f"{run}/global_step*")
    with pytest.warns(twa_scale.TwaWarning, match="the same checksum in every tensor"):
        average_fixed(list(map(str, both)), tmp_path / "out")
    average = opened(tmp_path / "out")
    for name in (file.parent.name for file in both[1].glob("zero/*/fp32.pt")):
        (numel,) = {torch.Size(opened(path).shape(name)).numel() for path in both}
        assert torch.equal(read(average, name, 0, numel), read(opened(both[1]), name, 0, numel))
    with pytest.raises(OutputError, match="is a universal checkpoint of DeepSpeed, which --format same"):
        average_fixed([str(both[1])] * 2, tmp_path / "same", format="same")
    torch.save({"module": {}, "param_shapes": [{"../w": torch.Size([1])}]}, both[1] / "mp_rank_00_model_states.pt")
    assert "has no zero/'../w'/fp32.pt" in refused(both[1])
