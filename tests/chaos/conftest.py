"""What chaos tests share."""

import os

import pytest


@pytest.fixture
def chaos_seed() -> int:
    """The first seed: the same in each run, unless CHAOS_SEED gives another."""
    return int(os.environ.get("CHAOS_SEED", "1000"))
