"""256 candidate files: few are open at a time, and every reader of candidates supports them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import twa_scale
from twa_scale.merge import average_fixed
from twa_scale.tools.inspection import inspect

N = 256


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("candidates")
    for i in range(N):
        torch.manual_seed(i)
        save_file({"weight": torch.randn(8, 40), "bias": torch.randn(8)}, directory / f"step-{i}.safetensors")
    return directory


def mean(files: Path) -> torch.Tensor:
    return torch.stack([load_file(path)["weight"].double() for path in files.iterdir()]).mean(0)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize(("store", "groups"), [("dense32", "tensor"), ("packed1", "tensor+row"), ("mapped", "tensor")])
def test_attach(files: Path, store: str, groups: str) -> None:
    model = nn.Linear(40, 8)
    twa = twa_scale.attach(model, str(files / "step-*"), {"store": store, "groups": groups})
    assert twa.num_candidates == N
    torch.testing.assert_close(model.weight.detach().double(), mean(files), rtol=1e-5, atol=1e-6)
    model(torch.ones(1, 40)).sum().backward()
    twa.step()
    twa.close()


@pytest.mark.usefixtures("few")
def test_average_and_inspect(files: Path, tmp_path: Path) -> None:
    average_fixed([str(files / "step-*")], tmp_path / "out")
    written = load_file(tmp_path / "out/model.safetensors")["weight"].double()
    torch.testing.assert_close(written, mean(files), rtol=0, atol=N * 2**-24)  # sums of N numbers of size 1 / N
    assert inspect(str(files / "step-*")).cosines.shape == (N, N)
