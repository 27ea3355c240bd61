"""The mean loss of a global batch over terms whose number differs between micro-batches and ranks."""

from typing import Any

import pytest
import torch

from tests.pool import Pool
from twa_scale.ranks import Group
from twa_scale.run.batches import make_batches
from twa_scale.run.shares import with_divisors
from twa_scale.run.tasks import Batch


class NumberedTask:
    """A task whose batches are their numbers of terms."""

    def terms(self, batch: Any) -> int | None:
        number: int | None = batch
        return number


def divisors_of_ranks(terms: list[list[int | None]]) -> list[float]:
    group = Group.world()
    batches: Any = terms[group.rank]
    task: Any = NumberedTask()
    return [divisor for _, divisor in with_divisors(batches, task, 2, group, torch.device("cpu"))]


@pytest.mark.parametrize("unknown", [(0, 0), (0, 1), (1, 1)])
def test_batches_count_equally_if_one_has_no_number(ranks: Pool, unknown: tuple[int, int]) -> None:
    terms: list[list[int | None]] = [[3, 4], [5, 6]]
    terms[unknown[0]][unknown[1]] = None
    assert ranks(divisors_of_ranks, 2, terms=terms) == [[2, 2], [2, 2]]


class SummedTask:
    """A task whose loss is the mean of the numbers of a batch."""

    def loss(self, _: object, batch: Batch) -> torch.Tensor:
        count = self.terms(batch)
        return batch["x"].sum() / count if count else torch.tensor(7.0)  # the mean of nothing must not count

    def terms(self, batch: Batch) -> int:
        return int((batch["x"] != 0).sum())


def mean_of_ranks(micro_batch_size: int) -> float:
    group = Group.world()
    examples: Any = [{"x": torch.tensor([float(i % 3 == 0 < i), float(i), 0.0])} for i in range(12)]
    task: Any = SummedTask()
    batches = make_batches(examples, "train", 12, micro_batch_size, group.rank, group.size, 0)
    divided = with_divisors(batches.training(0), task, batches.num_micro, group, torch.device("cpu"))
    loss = sum((task.loss(None, batch) / divisor for batch, divisor in divided), torch.zeros(()))
    return float(group.sum_(loss.double())) / group.size


@pytest.mark.parametrize(("size", "micro"), [(1, 12), (1, 1), (3, 2)])
def test_the_mean_depends_on_no_number_of_ranks(ranks: Pool, size: int, micro: int) -> None:
    for result in ranks(mean_of_ranks, size, micro_batch_size=micro):
        assert result == pytest.approx((3 + sum(range(12))) / (3 + 11))
