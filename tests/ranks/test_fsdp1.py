"""FSDP1 with every way to wrap and to shard: compared with the reference, and refused if unsupported."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffload, FullyShardedDataParallel, MixedPrecision, ShardingStrategy
from torch.nn import functional as F

import twa_scale
from tests import flattened, reference
from tests.grid import rest_slow
from tests.pool import Pool
from tests.ranks import cases
from twa_scale import EngineError, Snapshots

STEPS = 5
CONFIG = {"groups": "tensor", "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9}}
FULL, GRAD_OP, NO, HYBRID = (
    ShardingStrategy.FULL_SHARD,
    ShardingStrategy.SHARD_GRAD_OP,
    ShardingStrategy.NO_SHARD,
    ShardingStrategy.HYBRID_SHARD,
)


class Layer(nn.Module):
    """Two linear layers of odd sizes, a factor of one element, and a frozen factor."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)
        self.factor = Factor()
        self.frozen = nn.Parameter(torch.full((5,), 0.8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.factor(self.down(torch.tanh(self.up(x))))
        return x + y * self.frozen.to(x.dtype)


class Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value


class Net(nn.Module):
    """An embedding tied to the head, two layers, and a parameter without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5)
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.unused = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(5, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(x)
        return logits


def build(seed: int = 0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Net()


def candidates() -> list[dict[str, Tensor]]:
    base, noise = build().state_dict(), torch.Generator().manual_seed(1)
    states = [{k: v + 0.1 * torch.randn(v.shape, generator=noise) for k, v in base.items()} for _ in range(3)]
    return [state | {"head.weight": state["embed.weight"]} for state in states]


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1).double(), tokens[:, 1:].flatten())


def batches(step: int, size: int) -> list[Tensor]:
    return list(torch.randint(9, (12, 6), generator=torch.Generator().manual_seed(step)).chunk(size))


def trainable(net: Any, kind: str) -> Any:
    """Freeze parameters. With "frozen-unit", all parameters of one layer are frozen, and no others."""
    if kind == "frozen-unit":
        net.layers[0].requires_grad_(False)
        net.layers[1].frozen.requires_grad_(True)
    return net


def wrap(kind: str, orig: bool) -> Any:
    """Return the net, wrapped with FSDP1 in the given way."""
    net: Any = trainable(build(seed=9), kind)
    # Without the original parameters, frozen ones must not be flattened with others.
    ignored = [] if orig or kind == "frozen-unit" else [layer.frozen for layer in net.layers]
    if kind == "ignored":
        ignored += net.layers[0].parameters()
    inner = outer = partial(
        FullyShardedDataParallel, use_orig_params=orig, device_id=torch.device("cpu"), ignored_states=ignored or None
    )
    match kind:
        case "shard-grad-op":
            inner = outer = partial(inner, sharding_strategy=GRAD_OP)
        case "no-shard":
            inner = outer = partial(inner, sharding_strategy=NO)
        case "strategies":
            inner = partial(inner, sharding_strategy=NO)
            net.layers[1] = outer(net.layers[1], sharding_strategy=GRAD_OP)
        case "hybrid":
            inner = outer = partial(
                inner, sharding_strategy=HYBRID, device_mesh=init_device_mesh("cpu", (2, dist.get_world_size() // 2))
            )
        case "deep":  # also a flat parameter of one element, most shards of which are empty
            for layer in net.layers:
                layer.up, layer.factor = inner(layer.up), inner(layer.factor)
        case "checkpointed":
            net.layers[0] = checkpoint_wrapper(net.layers[0])
        case "prefetching":
            inner = outer = partial(inner, forward_prefetch=True, limit_all_gathers=False, backward_prefetch=None)
        case "bf16":
            low = MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            inner = outer = partial(inner, mixed_precision=low)
    if kind != "ignored":
        for i, layer in enumerate(net.layers):
            net.layers[i] = layer if isinstance(layer, FullyShardedDataParallel) else inner(layer)
    if kind == "no-root":  # the embedding and what is unused remain ordinary parameters
        return net
    model: Any = outer(net)
    return torch.compile(model, backend="eager") if kind == "compiled" else model


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name.replace("_checkpoint_wrapped_module.", ""): value for name, value in flattened.whole(model).items()}


def train(kinds: list[str], orig: bool) -> dict[str, Any]:
    """Train each net. Return weights, coefficients, and the loss of candidate 1 after a forward with other weights."""
    rank, size = cases.where()
    results: dict[str, Any] = {}
    for kind in kinds:
        model = wrap(kind, orig)
        twa = twa_scale.attach(model, candidates(), CONFIG)
        for step in range(STEPS):
            loss(model, batches(step, size)[rank]).backward()
            twa.step()
            twa.zero_grad()
        with torch.no_grad():
            loss(model, batches(0, 1)[0])  # may leave gathered weights
            with twa.weights(1):
                displayed = loss(model, batches(0, 1)[0])
            restored_loss = loss(model, batches(0, 1)[0])
        inner = getattr(model, "_orig_mod", model)
        stored = sum(p.numel() for p in model.parameters())
        results[kind] = whole(inner), twa.coefficients, float(displayed), float(restored_loss), stored
        twa.close()
    return results


def expected(kind: str, size: int) -> dict[str, Tensor]:
    steps = [batches(step, size) for step in range(STEPS)]
    return reference.train(trainable(build(), kind), loss, candidates(), CONFIG, steps).weights[-1]


def loss_of(weights: Mapping[str, Tensor]) -> float:
    net = build()
    net.load_state_dict(dict(weights) | {"head.weight": weights["embed.weight"]})
    with torch.no_grad():
        return float(loss(net.double(), batches(0, 1)[0]))


KINDS = ["shard-grad-op", "no-shard", "strategies", "deep", "frozen-unit", "ignored", "checkpointed", "no-root"]


@pytest.mark.parametrize(
    ("size", "orig", "kinds"),
    rest_slow(
        [
            (1, True, ["deep", "no-root"]),
            (2, True, [*KINDS, "prefetching", "bf16", "compiled"]),
            (2, False, [*KINDS, "bf16"]),
            (3, True, ["deep", "no-shard", "ignored"]),
            (3, False, ["deep", "no-shard", "no-root"]),
            (4, True, ["hybrid"]),
            (4, False, ["hybrid"]),
        ],
        lambda size, orig, _: (size, orig) in ((2, True), (3, False), (4, True)),
    ),
)
def test_all_wrappings_match_the_reference(ranks: Pool, size: int, orig: bool, kinds: list[str]) -> None:
    results = ranks(train, size, kinds=kinds, orig=orig, timeout=120)
    for kind in kinds:
        target = expected(kind, size)
        fixed = {name for name, p in trainable(build(), kind).named_parameters() if not p.requires_grad}
        candidate = loss_of(candidates()[1] | {name: target[name] for name in fixed})
        tolerance = 3e-2 if kind == "bf16" else 1e-5
        for weights, coefficients, displayed, restored_loss, _ in (by_kind[kind] for by_kind in results):
            assert weights.keys() == target.keys()
            for name, value in target.items():
                assert weights[name].dtype == torch.float32
                assert (weights[name].double() - value).norm() <= tolerance * value.norm(), (kind, name)
            assert torch.equal(coefficients, results[0][kind][1]), kind
            assert displayed == pytest.approx(candidate, rel=tolerance), kind
            assert restored_loss == pytest.approx(loss_of(target), rel=tolerance), kind
    assert abs(candidate - loss_of(target)) > 0.035 * candidate, "the weights that are shown make no difference"
    if size == 2 and orig:  # weights are split, except where they should not be
        stored = {kind: results[0][kind][-1] + results[1][kind][-1] for kind in ("deep", "no-shard")}
        assert stored["no-shard"] == 2 * stored["deep"]


def unreduced(kind: str, orig: bool) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """Step on gradients of which some are not reduced, then continue without them."""
    rank, size = cases.where()
    message, ends = "", []
    for disturbed in (False, True):
        model: Any = wrap(kind, orig)
        twa = twa_scale.attach(model, candidates(), CONFIG)
        for step in range(2):
            if disturbed:
                with model.no_sync() if step == 0 else nullcontext():  # then reduced gradients come first
                    loss(model, batches(7, size)[rank]).backward()
                with model.no_sync():
                    loss(model, batches(8, size)[rank]).backward()
                message = cases.error_text(twa.step)
                twa.zero_grad()
            loss(model, batches(step, size)[rank]).backward()
            twa.step()
            twa.zero_grad()
        ends.append(whole(model))
    return message, ends[0], ends[1]


@pytest.mark.parametrize(
    ("kind", "orig"),
    rest_slow(
        product(["deep", "shard-grad-op", "no-shard"], [True, False]), lambda kind, orig: orig == (kind != "deep")
    ),
)
def test_unreduced_gradients_are_refused_and_kept(ranks: Pool, kind: str, orig: bool) -> None:
    for message, undisturbed, disturbed in ranks(unreduced, 2, kind=kind, orig=orig):
        assert "no_sync" in message
        for name, value in undisturbed.items():
            assert torch.equal(disturbed[name], value), name


def refused(kind: str) -> None:
    """Attach to an unsupported model."""
    size = dist.get_world_size()
    hold = partial(FullyShardedDataParallel, use_orig_params=True, device_id=torch.device("cpu"))
    net: Any = build()
    replicas = None
    match kind:
        case "CPUOffload":
            model: Any = hold(net, cpu_offload=CPUOffload(offload_params=True))
        case "replica_group":
            mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("pods", "shards"))
            model, replicas = hold(net, sharding_strategy=HYBRID, device_mesh=mesh), mesh.get_group("pods")
        case "one rank in a shard group":
            model = hold(net, sharding_strategy=HYBRID, device_mesh=init_device_mesh("cpu", (size, 1)))
        case "'picture.weight'":
            net.picture = nn.Conv2d(2, 3, 3)
            net.picture.to(memory_format=torch.channels_last)
            model = hold(net)
        case "different ranks":
            single = [dist.new_group([rank]) for rank in range(size)][dist.get_rank()]
            net.layers[0] = hold(net.layers[0], process_group=single)
            model = hold(net)
        case "only some modules":
            net.layers[0] = hold(net.layers[0], sharding_strategy=HYBRID, device_mesh=init_device_mesh("cpu", (2, 2)))
            group = net.layers[0].process_group
            model = hold(net, process_group=group)
        case _:  # as in another version of torch
            model = hold(net)
            del model._handle.flat_param._numels_with_padding
    twa_scale.attach(model, candidates(), CONFIG, replica_group=replicas)


@pytest.mark.parametrize(
    "kind",
    ["CPUOffload", "replica_group", "one rank in a shard group", "'picture.weight'", "different ranks",
     "only some modules", f"torch {torch.__version__} has no '_numels_with_padding'"],
)  # fmt: skip
def test_unsupported_models_are_refused_on_every_rank(ranks: Pool, kind: str) -> None:
    error = ranks.error(refused, 2 if kind != "only some modules" and kind != "replica_group" else 4, kind=kind)
    assert isinstance(error, EngineError) and kind in str(error), repr(error)


def snapshots(directory: Path, orig: bool) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """Train with an ordinary optimizer, write candidates, average them in the same model, and export."""
    rank, size = cases.where()
    model = wrap("deep", orig)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    shots = Snapshots(directory / "run", every_n_steps=1)
    kept = []
    for step in range(3):
        loss(model, batches(step, size)[rank]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            loss(model, batches(0, 1)[0])  # gathers
        shots.step(model, step + 1)
        kept.append(whole(model))
    twa = twa_scale.attach(model, str(directory / "run/step-*"), CONFIG)
    loss(model, batches(3, size)[rank]).backward()
    twa.step()
    twa.export(directory / "out")
    return whole(model), kept


@pytest.mark.parametrize("orig", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_snapshots_are_candidates_and_the_average_is_exported(ranks: Pool, tmp_path: Path, orig: bool) -> None:
    for weights, kept in ranks(snapshots, 3, directory=tmp_path, orig=orig):
        for i, target in enumerate(kept):
            stored = load_file(tmp_path / f"run/step-{i + 1:08d}/model.safetensors")
            assert stored.keys() == target.keys() and all(
                torch.equal(stored[name], value) for name, value in target.items()
            )
        assert not torch.equal(kept[0]["embed.weight"], kept[2]["embed.weight"])
        exported = load_file(tmp_path / "out/model.safetensors")
        assert all(torch.equal(exported[name], value) for name, value in weights.items())
