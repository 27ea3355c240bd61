"""The rounding error of a packed store and its coding are the same on all ranks, for any number of ranks."""

from functools import cache

import pytest

from tests.pool import Pool
from tests.ranks import cases
from tests.ranks.cases import Run
from twa_scale.candidates.rounding import Rounding


def roundings(engine: str) -> list[Rounding | None]:
    """Return the errors of the test candidates with both codings and with the automatic one."""
    actual = []
    for coding in ("center", "increments", "auto"):
        _, twa = cases.attach(engine, Run({"store": "packed4", "coding": coding}))
        actual.append(twa.rounding)
        twa.close()
    return actual


@cache
def alone() -> tuple[Rounding, ...]:
    return tuple(rounding for rounding in roundings("plain") if rounding)


@pytest.mark.parametrize(
    ("engine", "size", "room"),
    [("plain", 2, 1e-9), ("fsdp2", 2, 0.5), pytest.param("ddp", 3, 0.5, marks=pytest.mark.slow)],
)
def test_rounding_error_is_the_same_on_all_ranks(ranks: Pool, engine: str, size: int, room: float) -> None:
    """Replicas count once, and parts are summed. Boundaries of ranks divide many blocks of small tensors."""
    by_rank = ranks(roundings, size, engine=engine)
    assert all(result == by_rank[0] for result in by_rank)
    for actual, expected in zip(by_rank[0], alone(), strict=True):
        assert actual.coding == expected.coding and len(expected.errors) == 4
        assert actual.errors == pytest.approx(expected.errors, rel=room)
    center, increments, auto = alone()
    assert auto == min(center, increments, key=lambda rounding: sum(e * e for e in rounding.errors))
