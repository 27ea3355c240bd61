"""Parameters that every rank holds whole: ranks exchange the parts that they have written, one bucket at a time."""

from unittest.mock import patch

import pytest
import torch

from tests.pool import Pool
from twa_scale.engines import replicated
from twa_scale.engines.replicated import ReplicatedParameters
from twa_scale.ranks import Group

BUCKET = 64  # elements
SHAPES = {"huge": (1001,), "small": (7,), "rows": (37, 5), "even": (20, 12), "one": (1,), "none": (0,), "whole": (63,)}


def publish() -> tuple[dict[str, torch.Tensor], int]:
    """Write i to element i of each part. Return the gathered parameters and the size of the largest all-gather."""
    gathered = [0]
    parameters = {name: torch.full(shape, -1.0) for name, shape in SHAPES.items()}
    stored = ReplicatedParameters(parameters, Group.world(), {"rows": 5, "even": 12})
    for span in stored.spans():
        stored.live(span).copy_(torch.arange(span.start, span.stop))

    def all_gather(self: Group, out: torch.Tensor, local: torch.Tensor) -> None:
        gathered.append(len(out))
        original(self, out, local)

    original = Group.all_gather
    with patch.object(replicated, "_BUCKET", BUCKET), patch.object(Group, "all_gather", all_gather):
        stored.publish(SHAPES)
    return parameters, max(gathered)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_parts_are_gathered_a_bucket_at_a_time(ranks: Pool, size: int) -> None:
    for parameters, gathered in ranks(publish, size):
        for name, value in parameters.items():
            assert torch.equal(value.flatten(), torch.arange(value.numel(), dtype=torch.float32)), name
        assert gathered <= 2 * BUCKET + 2 * size  # small ones until a bucket is full, each with its padding
