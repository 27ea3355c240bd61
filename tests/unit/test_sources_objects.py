"""Torch files with objects: their code does not run, and no weights are inferred from them."""

import argparse
import collections
import datetime
import enum
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import twa_scale
from tests.old_torch import ALONE
from tests.slices import read
from twa_scale.base.notices import TwaWarning
from twa_scale.candidates import Candidate, open_candidates
from twa_scale.candidates.formats import torch_file as module
from twa_scale.candidates.select import Wanted
from twa_scale.errors import CandidateError
from twa_scale.merge import average_fixed

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


class Kind(enum.Enum):
    SGD = 1


class Settings(dict[str, Any]):
    """A class like the configuration classes of mmengine, easydict and Lightning."""


class Holder:
    def __init__(self, value: object) -> None:
        self.value = value


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: object) -> None:
        self.value = value


class Called:
    """The result of calling a class with arguments. It would run if anything was called."""

    def __init__(self, *_: object) -> None:
        self.args = _

    def __reduce__(self) -> Any:
        return Called, self.args


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"a.weight": torch.randn(4, 3, generator=generator), "a.bias": torch.randn(4, generator=generator)}


def opened(path: Any, **wanted: Any) -> tuple[Candidate, list[str]]:
    messages: list[str] = []
    (candidate,) = open_candidates([path], 1, Wanted(**wanted), messages.append)
    return candidate, messages


def refused(path: Any, **wanted: Any) -> str:
    with pytest.raises(CandidateError) as error:
        opened(path, **wanted)
    return str(error.value)


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def holds(candidate: Candidate, state: dict[str, torch.Tensor]) -> bool:
    return candidate.names() == sorted(state) and all(
        torch.equal(read(candidate, name, 0, value.numel()), value.reshape(-1)) for name, value in state.items()
    )


# Objects next to the weights

HARMLESS = {
    "timm's arguments": argparse.Namespace(model="vit", lr=[0.1, 1e-3], path=Path("x"), device=torch.device("cpu")),
    "a namespace": types.SimpleNamespace(a=1),
    "a configuration": Settings(a=Settings(b=1)),
    "numbers of numpy": {"best": np.float64(0.5), "rng": np.random.RandomState(0).get_state()},
    "dates, paths, enums": [datetime.datetime(2026, 1, 1), Path("x"), Kind.SGD, complex(1, 2), range(3), slice(1)],
    "functions": [functools.partial(print, 1), torch.relu, len],
    "containers": [collections.Counter("aab"), collections.deque([1]), collections.defaultdict(list, a=[1]), {1, 2}],
    "what is called": Called(1, 2),
    "a schedule": Holder(lambda_ := None),
    "an optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9),
    "a criterion": nn.CrossEntropyLoss(weight=torch.ones(3)),
}


@pytest.mark.parametrize("name", HARMLESS)
@pytest.mark.parametrize("suffix", [".pth", ".ckpt"])
def test_objects_next_to_the_weights_are_not_used(tmp_path: Path, name: str, suffix: str) -> None:
    path = saved(tmp_path / f"x{suffix}", {"state_dict": weights(), "args": HARMLESS[name], "epoch": 3})
    candidate, messages = opened(path)
    assert holds(candidate, weights()) and not messages


def test_pth_tar_files_are_read(tmp_path: Path) -> None:
    """timm writes such files."""
    for i in range(2):
        saved(tmp_path / f"checkpoint-{i}.pth.tar", {"state_dict": weights(i), "args": argparse.Namespace(lr=0.1)})
    candidates = open_candidates(str(tmp_path / "*.tar"))
    assert all(holds(candidate, weights(i)) for i, candidate in enumerate(candidates))


def test_a_default_dict_is_a_dict(tmp_path: Path) -> None:
    state: collections.defaultdict[str, Any] = collections.defaultdict(list, weights())
    assert holds(opened(saved(tmp_path / "x.pt", state))[0], weights())


@pytest.mark.parametrize(
    "make", [Holder, Slotted, Called, lambda value: Settings(a=value), lambda value: [Holder([value])]]
)
def test_tensors_of_an_object_are_never_weights(tmp_path: Path, make: Callable[[object], object]) -> None:
    inner = make(weights(1))
    content = {"model": weights(), "ema": inner[0] if isinstance(inner, list) else inner}
    candidate, messages = opened(saved(tmp_path / "x.pt", content))
    assert holds(candidate, weights()) and len(messages) == 1 and "under 'ema'" in messages[0]
    message = refused(tmp_path / "x.pt", weights_key="ema")
    assert "is an object of class" in message and "test_sources_objects" in message and "state_dict()" in message


@pytest.mark.parametrize(
    ("content", "expected_message"),
    [
        (nn.Linear(2, 2), "holds an object of class torch.nn.modules.linear.Linear, not a dict"),
        ({"epoch": 3, "model": nn.Linear(2, 2), "ema": None}, "'model' (torch.nn.modules.linear.Linear)"),
        ({"model": weights() | {"b": Holder(torch.ones(2))}}, "'b' among the weights is an object of class"),
        (Settings(weights()), "holds an object of class"),
        ({"state_dict": Settings(weights())}, "'state_dict' (tests.unit.test_sources_objects.Settings)"),
        ({"model": {"w": np.ones(3)}}, "'model.w' (numpy.ndarray)"),
        ({"q.scale": torch.ones(1), "q._packed_params._packed_params": (torch.ones(2), None)}, "quantized modules of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_weights_in_objects_are_refused(tmp_path: Path, content: object, expected_message: str) -> None:
    message = refused(saved(tmp_path / "x.pt", content))
    assert message.startswith(f"{tmp_path / 'x.pt'}: ") and expected_message in message and "state_dict()" in message


def test_lists_among_the_weights_are_not_read(tmp_path: Path) -> None:
    """A metric of torchmetrics with `add_state(.., persistent=True)` has such a list in the state dict."""
    lists = {"metric.preds": [torch.ones(2)] * 9, "q._packed_params": [torch.ones(2)]}
    path = saved(tmp_path / "x.ckpt", {"state_dict": weights() | lists})
    assert "'q._packed_params' among the weights" in refused(path)
    candidate, messages = opened(path, ignore=["q\\._packed"], must_match=True)
    assert holds(candidate, weights()) and len(messages) == 1 and "'metric.preds' among the weights" in messages[0]
    candidate, messages = opened(path, ignore=["metric.*", "q\\._packed"], must_match=True)
    assert holds(candidate, weights()) and not messages


@pytest.mark.parametrize(
    ("content", "expected_message"),
    [
        (torch.ones(2), "holds a single tensor, not a dict"),
        ([weights()], "holds list, not a dict"),
        (
            weights() | {"q": torch.ones(2).untyped_storage()},
            "'q' among the weights is an object of class torch.st",
        ),
        (weights() | {"q": nn.UninitializedParameter()}, "torch.nn.parameter.UninitializedParameter"),
        (weights() | {"q": torch.ones(2, device="meta")}, "'q' is a torch._utils._rebuild_meta_tensor_no_storage"),
        ({0: torch.ones(2), "0": torch.zeros(2)}, "two tensors are called '0'"),
        ({b"a": torch.ones(2)}, "holds no tensors"),  # its text differs between processes
        ({"model": weights() | {b"c": torch.ones(2)}}, "the tensor under the key b'c' has no name"),
        ({"model": weights() | {Kind.SGD: torch.ones(2)}}, "the tensor under a Kind as key has no name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_values_that_are_not_plain_tensors_are_refused(tmp_path: Path, content: object, expected_message: str) -> None:
    message = refused(saved(tmp_path / "x.pt", content))
    assert message.startswith(f"{tmp_path / 'x.pt'}: ") and expected_message in message


@pytest.mark.parametrize(
    ("key", "message"), [(b"c", "the key b'c'"), (("c", 1), "a tuple as key"), (Kind.SGD, "a Kind")]
)
def test_a_tensor_without_a_name_in_a_state_dict(key: object, message: str) -> None:
    assert f"the tensor under {message}" in refused({**weights(), key: torch.ones(2)})


def test_keys_that_are_not_text_next_to_the_weights(tmp_path: Path) -> None:
    beside = {"keyed": {b"a": Path("a"), "b": Path("b"), Kind.SGD: 1}, "bytes": {b"a": torch.ones(1), "b": 1}}
    content = {"model": weights(), **beside, "optimizer": {torch.ones(1): torch.ones(2), "step": torch.ones(1)}}
    for inputs in (content, saved(tmp_path / "x.pt", content)):
        assert holds(opened(inputs)[0], weights())


def test_torchscript_programs_are_refused(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "x.pt")
    assert "a program of torch.jit (TorchScript): save the state_dict()" in refused(tmp_path / "x.pt")


def test_array_among_the_weights_is_reported(tmp_path: Path) -> None:
    candidate, messages = opened(saved(tmp_path / "x.pt", weights() | {"mean": np.ones(3), "best": np.float32(1)}))
    assert holds(candidate, weights()) and len(messages) == 1 and "'mean' among the weights" in messages[0]


def test_array_in_a_state_dict_is_reported() -> None:
    candidate, messages = opened(weights() | {"mean": np.ones(3), "best": np.float32(1)})
    assert holds(candidate, weights()) and len(messages) == 1 and "'mean' among the weights" in messages[0]
    assert "'w' (numpy.ndarray)" in refused({"w": np.ones(3)})


def test_an_optimizer_among_the_weights_is_left_out(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.pt", weights() | {"optimizer": HARMLESS["an optimizer"]})
    candidate, messages = opened(path)
    assert holds(candidate, weights()) and not messages


def test_number_of_values_in_objects_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = list(range(100))
    path = saved(tmp_path / "x.pt", {"model": weights(), "objects": [Holder(shared) for _ in range(100)]})
    monkeypatch.setattr(module, "_MAX_VALUES", 1000)
    assert "more than 1000 values" in refused(path)


# Lists of tensors without names


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 4)


def net(seed: int) -> Net:
    torch.manual_seed(seed)
    made = Net()
    for p in made.parameters():
        nn.init.normal_(p)
    nn.init.normal_(made.get_buffer("norm.running_mean"))
    return made


def ema_of(model: nn.Module) -> dict[str, Any]:
    """Return the EMA as torch_ema and diffusers save it."""
    shadow = [2 * p.detach() for p in model.parameters()]
    return {"decay": 0.9, "num_updates": 3, "shadow_params": shadow, "collected_params": None}


def averaged(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state of the model after the EMA was copied into it."""
    parameters = dict(model.named_parameters())
    return {name: 2 * value if name in parameters else value for name, value in model.state_dict().items()}


@pytest.mark.parametrize("key", ["ema.shadow_params", "ema"])
def test_ema_list_has_the_names_of_the_state_dict_in_the_file(tmp_path: Path, key: str) -> None:
    model = net(0)
    content = {"model": model.state_dict(), "ema": ema_of(model)}
    if key == "ema":
        content["ema"] = content["ema"]["shadow_params"]
    for spec in (content, saved(tmp_path / "x.pt", content)):
        candidate, messages = opened(spec, weights_key=key)
        assert holds(candidate, averaged(model))
        assert (
            len(messages) == 1
            and f"the list {key!r} has no names: its 6 tensors are taken for the parameters" in messages[0]
        )


def test_ema_list_has_the_names_of_the_model(tmp_path: Path) -> None:
    models = [nn.Linear(3, 4) for _ in range(2)]
    paths = [saved(tmp_path / f"{i}.pt", ema_of(model)) for i, model in enumerate(models)]
    live = nn.Linear(3, 4)
    with pytest.warns(TwaWarning, match="the parameters of the model, in their order"):
        twa_scale.attach(live, paths, {"weights_key": "shadow_params"}).close()
    expected = models[0].weight + models[1].weight
    assert torch.allclose(live.weight, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("content", "expected_message"),
    [
        (lambda ema: {"ema": ema}, "there is no state dict next to it"),
        (
            lambda ema: {"model": net(0).first.state_dict(), "ema": ema},
            "has 6 tensors, and there are 2 parameters in the",
        ),
        (
            lambda ema: {"model": dict(reversed(net(0).state_dict().items())), "ema": ema},
            "its tensor 0 has shape (4, 3)",
        ),
    ],
)
def test_ema_list_without_matching_names_is_refused(
    tmp_path: Path, content: Callable[[Any], dict[str, Any]], expected_message: str
) -> None:
    path = saved(tmp_path / "x.pt", content(ema_of(net(0))))
    message = refused(path, weights_key="ema.shadow_params")
    assert (
        message.startswith(f"{path}: 'ema.shadow_params' is a list of tensors without names")
        and expected_message in message
    )
    assert "copy_to" in message
    with pytest.raises(CandidateError, match="without names"):
        average_fixed([str(path)], tmp_path / "out", weights_key="ema.shadow_params")


def test_order_of_a_distributed_checkpoint_is_not_used(tmp_path: Path) -> None:
    """Its metadata does not keep the order of the state dict."""
    model = net(0)
    dcp.save({"model": model.state_dict(), "ema": ema_of(model)["shadow_params"]}, checkpoint_id=tmp_path, **ALONE)
    assert "no state dict next to it" in refused(tmp_path, weights_key="ema")
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    candidate, _ = opened(tmp_path, weights_key="ema", parameters=parameters)
    assert holds(candidate, {name: 2 * p for name, p in model.named_parameters()})
