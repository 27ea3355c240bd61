"""Code that finds a projected gradient in `.grad` works as with zeros, and needs no memory of a gradient."""

import copy
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import twa_scale
from twa_scale import EngineError, TwaWarning
from twa_scale.engines.projected_gradients import ProjectedGradients


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


@pytest.fixture
def projected(linear: nn.Linear) -> Iterator[twa_scale.TrainableAverage]:
    """Yield the average of a model after one backward pass."""
    twa = attach(linear)
    linear(torch.ones(1, 6)).square().sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TwaWarning)
        yield twa


def attach(model: nn.Module) -> twa_scale.TrainableAverage:
    states = [
        {name: p.detach() + 0.1 * (i + 1) * p.detach().cos() for name, p in model.named_parameters()} for i in (0, 1)
    ]
    return twa_scale.attach(model, states)


def mark(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None and ProjectedGradients.is_mark(parameter.grad)
    return parameter.grad


def test_copies_and_pickles_are_zeros(linear: nn.Linear, projected: twa_scale.TrainableAverage) -> None:
    gradient, zeros = mark(linear.weight), torch.zeros(4, 6)
    for copied in (copy.deepcopy(gradient), pickle.loads(pickle.dumps(gradient))):
        assert type(copied) is Tensor and torch.equal(copied, zeros)
    changed = gradient.detach().add_(1)
    assert torch.equal(changed, zeros + 1) and not gradient.any()


def test_texts_and_lists_are_of_zeros(linear: nn.Linear, projected: twa_scale.TrainableAverage) -> None:
    gradient = mark(linear.bias)
    assert repr(gradient) == repr(torch.zeros(4)) and gradient.tolist() == [0.0] * 4
    assert not gradient.numpy().any() and not np.asarray(gradient).any()


def test_there_is_no_address(linear: nn.Linear, projected: twa_scale.TrainableAverage) -> None:
    for read in (Tensor.data_ptr, torch.utils.dlpack.to_dlpack):
        with pytest.raises(RuntimeError, match="Cannot access data pointer"):
            read(mark(linear.weight))


def test_memory_that_a_conversion_gives_to_a_mark_is_freed(linear: nn.Linear) -> None:
    twa = attach(linear)
    linear(torch.ones(1, 6)).square().sum().backward()
    linear.double().float()
    assert mark(linear.weight).untyped_storage().nbytes()
    with pytest.warns(TwaWarning, match="was written"):
        twa.step()
    linear(torch.ones(1, 6)).square().sum().backward()
    assert not mark(linear.weight).untyped_storage().nbytes()
    twa.close()


def test_other_libraries_get_zeros(linear: nn.Linear, projected: twa_scale.TrainableAverage) -> None:
    for parameter in linear.parameters():
        zeros = torch.zeros_like(parameter)
        assert torch.equal(torch.from_dlpack(mark(parameter)), zeros)
        assert torch.equal(torch.from_numpy(np.from_dlpack(mark(parameter))), zeros)


def test_a_module_can_be_shared_before_a_step(linear: nn.Linear, projected: twa_scale.TrainableAverage) -> None:
    """torch copies the bytes of the storage, also of a gradient."""
    linear.share_memory()
    mark(linear.weight)
    assert projected.step()


def test_clipping_needs_no_memory(
    linear: nn.Linear, projected: twa_scale.TrainableAverage, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, zeros = [], torch.zeros

    def recorded(size: torch.Size | tuple[()], **options: torch.dtype | torch.device) -> Tensor:
        sizes.append(size)
        return zeros(size, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(torch, "zeros", recorded)
    assert nn.utils.clip_grad_norm_(linear.parameters(), 1.0) == 0
    nn.utils.clip_grad_value_(linear.parameters(), 1.0)
    linear.zero_grad(set_to_none=False)
    assert sizes and set(sizes) == {()}
    assert projected.step()


def test_a_norm_is_reported(linear: nn.Linear) -> None:
    """Code that clips only above a norm does not use the gradients otherwise."""
    twa = attach(linear)
    linear(torch.ones(1, 6)).square().sum().backward()
    with pytest.warns(TwaWarning, match="their norm is 0, and clipping"):
        assert nn.utils.get_total_norm([p.grad for p in linear.parameters() if p.grad is not None]) == 0
        assert all(p.grad is not None and p.grad.norm() == 0 for p in linear.parameters())
    twa.close()


def test_clipping_is_reported(linear: nn.Linear) -> None:
    twa = attach(linear)
    linear(torch.ones(1, 6)).square().sum().backward()
    with pytest.warns(TwaWarning, match="has no effect"):
        nn.utils.clip_grad_norm_(linear.parameters(), 1.0)
    twa.close()


def test_operators_on_a_gradient(linear: nn.Linear, projected: twa_scale.TrainableAverage) -> None:
    """Numbers have no effect, as reported by the warning. A tensor that takes the place of the gradient is refused."""
    weight: Any = linear.weight
    gradient = mark(weight)
    weight.grad += 1.0
    weight.grad *= 0.5
    assert weight.grad is gradient
    weight.grad += torch.ones(4, 6)
    with pytest.raises(EngineError, match=r"'weight' was discarded or replaced"):
        projected.step()


def test_a_gradient_that_a_mark_would_lose_is_refused(linear: nn.Linear, projected: twa_scale.TrainableAverage) -> None:
    """`to()` of a module with DTensors removes the hooks of parameters."""
    assert linear.weight._backward_hooks is not None
    linear.weight._backward_hooks.clear()
    with pytest.raises(EngineError, match="the hooks of the parameter are gone"):
        linear(torch.ones(1, 6)).square().sum().backward()


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has gradients of the parameter's type only")
def test_gradients_of_another_type_than_their_parameter(linear: nn.Linear) -> None:
    linear.bfloat16()
    for parameter in linear.parameters():
        parameter.grad_dtype = torch.float32
    twa = attach(linear)
    for _ in range(2):
        linear(torch.ones(1, 6, dtype=torch.bfloat16)).square().sum().backward()
        assert mark(linear.weight).dtype == torch.float32
    assert twa.step()
