"""Create the corrections of the rows of a model, if the configuration requests them."""

from math import prod

from twa_scale.average.basis import Basis
from twa_scale.average.layout import Layout
from twa_scale.average.rows.corrections import RowCorrections
from twa_scale.average.rows.shapes import row_lengths
from twa_scale.average.rows.slots import RowSlots
from twa_scale.config import TwaConfig
from twa_scale.engines import Engine
from twa_scale.errors import ConfigError
from twa_scale.kernels import RowMap
from twa_scale.ranks import Pods, Reduction


def make_rows(
    config: TwaConfig, engine: Engine, pods: Pods, reduction: Reduction, layout: Layout, basis: Basis, coding: RowMap
) -> RowCorrections | None:
    """Return the corrections of the rows of all trained tensors, or None without `+row`. Collective.

    Raises:
        ConfigError: no trained tensor has rows, or the spans differ between pods; on every rank.
    """
    if not config.has_rows:
        return None
    excluded = engine.complex_names  # tensors that are stored as pairs of real numbers
    lengths = row_lengths(
        engine.module, {name: engine.parameters[name].shape for name in layout.group_of if name not in excluded}
    )
    spans = {span: layout.group(span) for span in engine.spans() if span.name in layout.group_of}
    with pods.agree():
        if not lengths:
            raise ConfigError(
                f"groups: {config.groups!r} is set, but no trained tensor has more than one row. Use "
                f"{str(config.groups).removesuffix('+row')!r}."
            )
        if engine.replica_group.size < 1:
            raise ConfigError(_PODS)
    spans_of_ranks = engine.replica_group.gather(tuple(spans))
    with pods.agree():
        if any(others != spans_of_ranks[0] for others in spans_of_ranks):
            raise ConfigError(_PODS)
    sizes = {name: prod(engine.parameters[name].shape) for name in lengths}
    slots = RowSlots(spans, lengths, sizes, engine.shard_group, engine.device)
    return RowCorrections(config, slots, basis, coding, reduction, engine.device)


_PODS = (
    "groups: corrections per row are averaged over pods rank by rank, so the replica_group of each rank must hold its "
    "counterparts, with the same spans in every pod. Use pods of equal size, or groups without '+row'."
)
