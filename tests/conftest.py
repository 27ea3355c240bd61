"""Fixtures that every test can ask for."""

from collections.abc import Iterator

import pytest

from tests.pool import Pool


@pytest.fixture(scope="session")
def ranks() -> Iterator[Pool]:
    """Run a module-level function on real ranks: `ranks(function, world_size, **kwargs)`."""
    pool = Pool()
    yield pool
    pool.close()
