"""Functions that ranks run: they train the test model and return plain tensors."""

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy

import twa_scale
from tests import flattened, meshes, models, zero
from tests.gathering import whole_tensors
from twa_scale import TwaError
from twa_scale.engines.zero import is_deepspeed

NUM_STEPS = 8
BATCH = 12


@dataclass
class Run:
    """One run: how the model is wrapped, what is trained, and the number of backward passes per step."""

    config: dict[str, Any]
    steps: int = NUM_STEPS
    scalar_shape: tuple[int, ...] = models.SCALAR_SHAPE
    accumulate: int = 1
    bf16: bool = False


@dataclass
class RunResult:
    """The result of a run on one rank: its weights, gathered, and its coefficients; or the error as text."""

    weights: dict[str, Tensor]
    coefficients: Tensor
    error: str = ""
    corrections: dict[str, Tensor] = field(default_factory=dict)
    """Those of the coefficients of rows."""
    distance: float = 0.0
    """That of the weights from the center."""


def train_all(engine: str, runs: Mapping[str, Run]) -> dict[str, RunResult]:
    """Do all runs, one after another, in this process group."""
    return {name: _try(engine, run) for name, run in runs.items()}


def _try(engine: str, run: Run) -> RunResult:
    try:
        return train(engine, run)
    except Exception:
        return RunResult({}, torch.empty(0), traceback.format_exc())


def train(engine: str, run: Run) -> RunResult:
    """Attach, train `run.steps` steps on this rank's part of each batch, and gather."""
    model, twa = attach(engine, run)
    for step in range(run.steps):
        one_step(model, twa, step, run.accumulate)
    result = RunResult(gathered(model), twa.coefficients.clone(), "", twa.row_corrections(), twa.distance())
    twa.close()
    return result


def attach(engine: str, run: Run, states: Sequence[Any] | None = None) -> tuple[nn.Module, Any]:
    """Return a new model with its own values, which attaching overwrites, and its average."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if run.bf16 else None
    shape = (1,) if engine in zero.ENGINES else run.scalar_shape  # DeepSpeed cannot broadcast a parameter of shape ()
    model: nn.Module = models.build(seed=99, scalar_shape=shape)
    if engine in zero.ENGINES:
        model = zero.wrap(model, engine, run.accumulate, run.bf16)
    else:
        model = models.wrap(model, engine, policy)
    states = models.candidates(scalar_shape=shape) if states is None else states
    return model, twa_scale.attach(model, candidates=states, config=dict(run.config))


def one_step(model: nn.Module, twa: Any, step: int, accumulate: int = 1) -> None:
    """Take one step on this rank's part of batch `step`."""
    rank, size = meshes.data_place(model, *where())
    for pass_ in range(accumulate):
        loss = models.loss(model, micro_batches(step, size, accumulate)[rank * accumulate + pass_])
        if is_deepspeed(model):  # DeepSpeed divides and counts by itself
            model.backward(loss)
            twa.step()
            twa.zero_grad()
        else:
            loss.div(accumulate).backward()
    if not is_deepspeed(model):
        twa.step()
        twa.zero_grad()


def micro_batches(step: int, size: int, accumulate: int = 1) -> list[models.Batch]:
    """Return the parts of batch `step`, in the order of ranks and, within a rank, of its backward passes."""
    data = models.batch(step, BATCH)
    return [models.part(data, i, size * accumulate) for i in range(size * accumulate)]


def where() -> tuple[int, int]:
    """Return this rank and the number of ranks; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def error_text(call: Callable[[], object]) -> str:
    """Return the error message of a call, or an empty text. pytest.raises would end a rank."""
    try:
        call()
    except TwaError as error:
        return str(error)
    return ""


def gathered(model: nn.Module) -> dict[str, Tensor]:
    """Return whole parameters by their plain names on every rank, as the next forward pass uses them."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    if is_deepspeed(model):
        return zero.whole(model)
    if isinstance(model, FullyShardedDataParallel):
        return flattened.whole(model)
    return whole_tensors({name.removeprefix("module."): p for name, p in model.named_parameters()})
