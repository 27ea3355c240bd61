"""Tests of the code that the callbacks of all trainers share."""

from functools import partial

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.integrations.small import LEARN, SIZE, WINDOW, loss_of, network, rows
from tests.pool import Pool
from twa_scale import TwaError
from twa_scale.integrations.averaging import Averaging, repeated


def learn_from_uneven_data() -> str:
    """Return the error of learning from two batches on the first rank, and three on the second."""
    model = DistributedDataParallel(network())
    averaging = Averaging(window=WINDOW, learn=LEARN, learn_steps=9)
    averages = averaging._make(model)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
        averages.step()
    once = iter(rows().split(SIZE)[: 2 + dist.get_rank()])
    batches = repeated(once, lambda _: None)
    loss = partial(loss_of, model)
    try:
        with averages.learning(LEARN) as twa:
            averaging._train_coefficients(
                twa, model, batches, loss, accumulate=1, scaler=None, log_every=1, log=lambda _: None
            )
    except TwaError as error:
        return str(error)
    return ""


def test_all_ranks_raise_if_one_has_no_batches_left(ranks: Pool) -> None:
    assert all("yields no more batches" in messages for messages in ranks(learn_from_uneven_data, 2))
