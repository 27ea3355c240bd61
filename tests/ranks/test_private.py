"""If private attributes of a library have changed, attaching is refused with its version and the missing attribute."""

from collections.abc import Callable
from typing import Any

import pytest

import twa_scale
from tests import models
from tests.pool import Pool
from twa_scale.engines.private_attributes import version


def fsdp2_group(model: Any) -> Any:
    state = model._get_fsdp_state()
    return (getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group])[0]


HOLDERS: dict[str, Callable[[Any], Any]] = {
    "model": lambda model: model,
    "group": fsdp2_group,
    "handle": lambda model: model._handle,
    "flat parameter": lambda model: model._handle.flat_param,
    "optimizer": lambda model: model.optimizer,
}
CASES = [
    ("ddp", "model", "require_forward_param_sync", "torch"),
    ("fsdp2", "group", "_partial_reduce_output", "torch"),
    ("fsdp1", "handle", "_prefetched", "torch"),
    ("fsdp1-flat", "flat parameter", "_numels_with_padding", "torch"),
    ("sharded-ddp", "model", "_grad_to_be_reduced", "fairscale"),
    ("zero1", "model", "micro_steps", "deepspeed"),
    ("zero1", "optimizer", "all_grad_tensors", "deepspeed"),
    ("zero2", "optimizer", "micro_step_id", "deepspeed"),
    ("zero3", "optimizer", "grad_partitions_flat_buffer", "deepspeed"),
]


def attach_to_another_version(engine: str, holder: str, attribute: str, library: str) -> str:
    model = models.wrap(models.build(scalar_shape=(1,)), engine)
    del vars(HOLDERS[holder](model))[attribute]
    actual = version(library)
    try:
        twa_scale.attach(model, models.candidates(scalar_shape=(1,)))
    except twa_scale.EngineError as error:
        assert f"{library} {actual} has no" in str(error), error
        return str(error)
    return ""


@pytest.mark.parametrize(("engine", "holder", "attribute", "library"), CASES)
def test_a_missing_attribute_is_named_with_the_version(
    ranks: Pool, engine: str, holder: str, attribute: str, library: str
) -> None:
    (messages,) = ranks(
        attach_to_another_version, 1, engine=engine, holder=holder, attribute=attribute, library=library
    )
    assert repr(attribute) in messages
