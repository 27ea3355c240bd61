"""Process groups of early versions of torch remain for a while after they were destroyed."""

import time

import pytest
import torch
import torch.distributed as dist

from twa_scale.ranks.destroying import KEPT, SECONDS, destroy_process_group


@pytest.mark.parametrize(("version", "kept"), [("2.6.0", 2), ("2.7.1", 2), ("2.8.0", 0), ("2.14.1", 0)])
def test_groups_are_kept_until_their_threads_are_idle(monkeypatch: pytest.MonkeyPatch, version: str, kept: int) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(version))
    KEPT.clear()
    for late in (0.0, 2 * SECONDS):
        current = time.monotonic() + late
        monkeypatch.setattr(time, "monotonic", lambda now=current: now)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.new_group([0])
        destroy_process_group()
        assert not dist.is_initialized()
        assert [len(groups) for _, groups in KEPT] == [kept] * (kept > 0)
    KEPT.clear()
