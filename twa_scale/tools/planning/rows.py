"""The memory and the communication of the corrections of rows (`groups: tensor+row`)."""

from math import prod
from typing import NamedTuple

from torch import nn

from twa_scale.average.rows import row_bytes, row_lengths
from twa_scale.config import RunConfig
from twa_scale.engines import ParameterInfo


class RowBytes(NamedTuple):
    """The bytes of the corrections of rows."""

    held: int
    """All that a rank holds of them during the run."""
    gradient: int
    """The gradient of the corrections of a rank."""
    state: int
    """The corrections of all rows and their moments, which each rank holds while a state is saved."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What to say below the table."""
        return (f"each save of the run state takes {self.state / 1e6:.1f} MB of each rank's memory",) * bool(self.state)


def rows_of_plan(
    config: RunConfig, model: nn.Module, parameters: dict[str, ParameterInfo], local: dict[str, int], n: int
) -> RowBytes:
    """Return the bytes of the corrections of rows; zeros without `+row`.

    Args:
        config: the settings of the run.
        model: on the meta device.
        parameters: of the model, as real tensors.
        local: the number of trained elements of each tensor on the first rank.
        n: the number of candidates.
    """
    if not config.has_rows:
        return RowBytes(0, 0, 0)
    complex_names = {name for name, p in model.named_parameters() if p.is_complex()}
    shapes = {name: parameters[name].shape for name in local if name not in complex_names}
    lengths = row_lengths(model, shapes)
    count = sum(-(-local[name] // length) for name, length in lengths.items())
    of_all = sum(prod(shapes[name]) // length for name, length in lengths.items())
    return RowBytes(row_bytes(config, n, count), 4 * n * count, row_bytes(config, n, of_all) - 2 * 4 * n * of_all)
