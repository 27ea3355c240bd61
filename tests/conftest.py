"""Fixtures that every test can ask for."""

from collections.abc import Iterator

import pytest
import torch

from tests.pool import Pool

torch.set_num_threads(1)  # on tensors this small, more threads only cost


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Run a module-level function on real ranks: `ranks(function, world_size, **kwargs)`."""
    pool = Pool()
    yield pool
    pool.close()
