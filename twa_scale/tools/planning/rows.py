"""The memory and the communication of the corrections of rows (`groups: tensor+row`)."""

from math import prod
from typing import NamedTuple

from torch import nn

from twa_scale.average.rows import exchanged_bytes, row_bytes, row_lengths, row_moments
from twa_scale.config import RunConfig
from twa_scale.engines import ParameterInfo
from twa_scale.run.engines.run_engine import all_reduced


class RowBytes(NamedTuple):
    """The bytes of the corrections of rows."""

    stored: int
    """The bytes on a rank during the run, with those of the best average. A save adds a buffer of 4 MiB."""
    sent: int
    """The bytes that a rank sends to other pods in a step."""
    gathered: int
    """The bytes of the rounded gradients of all pods, which a rank holds in a step."""
    state: int
    """The bytes of the file of all rows of a state: the corrections, their moments and those of the best average."""

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes below the table."""
        size = f"{self.state / 1e6:.1f} MB"
        note = (
            f"each save of the run state writes {size} of rows; two such files are kept, and three exist during a save"
        )
        return (note,) * bool(self.state)


def rows_of_plan(
    config: RunConfig, model: nn.Module, parameters: dict[str, ParameterInfo], local: dict[str, int], n: int
) -> RowBytes:
    """Return the bytes of the corrections of rows; zeros without `+row`.

    Args:
        config: the settings of the run.
        model: the model on the meta device.
        parameters: the parameters of the model, as real tensors.
        local: the number of trained elements of each tensor on the first rank.
        n: the number of candidates.
    """
    if not config.has_rows:
        return RowBytes(0, 0, 0, 0)
    complex_names = {name for name, p in model.named_parameters() if p.is_complex()}
    shapes = {name: parameters[name].shape for name in local if name not in complex_names}
    lengths = row_lengths(model, shapes)
    count = sum(-(-local[name] // length) for name, length in lengths.items())
    of_all = sum(prod(shapes[name]) // length for name, length in lengths.items())
    exchanged = exchanged_bytes(config.row_exchange, n, count)
    rounds = config.pods > 1 and config.row_exchange != "float32"
    return RowBytes(
        # With the best ones, and the rounding errors.
        stored=row_bytes(config, n, count) + (1 + rounds) * 4 * n * count,
        sent=(config.pods - 1) * exchanged if rounds else all_reduced(exchanged, config.pods),
        gathered=config.pods * exchanged if rounds else 0,
        state=(2 + row_moments(config)) * 4 * n * of_all,
    )
