"""`groups: expert`: which tensors stack experts, the messages, and the code that uses the groups."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import twa_scale
from tests.ranks.test_experts import EXPERTS, Mixture, SeparateExperts, states
from tests.states import save_run
from twa_scale import ConfigError, StateError
from twa_scale.base.names import group_names
from twa_scale.engines.parameters import named_parameters
from twa_scale.engines.stacked_experts import stacked_experts
from twa_scale.integrations.averaging import Averaging
from twa_scale.tools.report.run_data import read

pytestmark = pytest.mark.filterwarnings("ignore:groups. expert:UserWarning")
E = EXPERTS


class Holder(nn.Module):
    """A module with tensors of these shapes and further attributes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], **attributes: Any) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))
        for name, value in attributes.items():
            setattr(self, name, value)


def inside(*names: str, holder: nn.Module) -> nn.Module:
    for name in reversed(names):
        outer = nn.Module()
        outer.add_module(name, holder)
        holder = outer
    return holder


DEEP = {"up": (E, 5, 3), "bias": (E, 5), "scale": (5,)}
CASES = {
    "in experts": (inside("mlp", "experts", holder=Holder(DEEP)), {"mlp.experts.up", "mlp.experts.bias"}),
    "by attribute": (
        inside("mlp", "input_linear", holder=Holder({"weight": (E, 5, 3)}, num_experts=E)),
        {"mlp.input_linear.weight"},
    ),
    "rows of all experts": (
        inside("ffn", "experts", "mlp", holder=Holder({"w1": (E * 5, 3)}, moe_num_experts=E)),
        {"ffn.experts.mlp.w1"},
    ),
    "router beside experts": (
        inside("mlp", "experts", holder=Holder({"up": (E, 5, 3), "gate_up_bias": (E, 5), "router": (E, 3)})),
        {"mlp.experts.up", "mlp.experts.gate_up_bias"},
    ),
    "router": (inside("mlp", "gate", holder=Holder({"weight": (E, 3)}, num_experts=E)), set()),
    "shared": (inside("mlp", "shared_experts", holder=Holder(DEEP)), set()),
    "convolution": (inside("mlp", "experts", "conv", holder=nn.Conv1d(E, E, 3)), set()),
    "apart": (inside("mlp", "experts", holder=SeparateExperts()), set()),
    "another number": (inside("mlp", "experts", holder=Holder({"up": (3, 5, 3)}, num_experts=E)), set()),
}


@pytest.mark.parametrize("case", CASES)
def test_tensors_that_stack_experts_are_found(case: str) -> None:
    model, wanted = CASES[case]
    actual = stacked_experts(model, named_parameters(model)[1])
    assert actual.keys() == wanted
    assert all(item.number == E and item.path.endswith("experts") for item in actual.values())


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("h.0.attn.w", "h.0"),
        ("h.0.moe.experts.11.w", "h.0.moe.experts.11"),
        ("h.0.moe.shared_experts.0.w", "h.0"),
        ("h.1.local_experts.2.up.w", "h.1.local_experts.2"),
        ("h.1.mlp.experts.local_experts.0.w", "h.1.mlp.experts.local_experts.0"),
        ("h.1.deepspeed_moe.experts.deepspeed_experts.3.w", "h.1.deepspeed_moe.experts.deepspeed_experts.3"),
        ("h.1.mlp.experts.shared_expert.0.w", "h.1"),
        ("h.1.mlp.expert_gate.0.w", "h.1"),
        ("h.1.expert_choice_router.0.w", "h.1"),
        ("h.1.moe.expert_bias.0", "h.1"),
        ("h.1.mlp.gate_experts.0.w", "h.1.mlp.gate_experts.0"),
        ("head.w", "head"),
    ],
)
def test_expert_groups_of_names(name: str, group: str) -> None:
    assert group_names([name], "expert") == {name: group}


def test_tensors_that_disagree_about_the_number_of_experts_are_reported() -> None:
    model = inside("mlp", "experts", holder=Holder({"w1": (4, 8, 16), "w2": (8, 4, 16)}))
    with pytest.warns(twa_scale.TwaWarning, match=r"'mlp.experts.w2' next to stacked .* first size is 8, .* 4 experts"):
        twa_scale.attach(model, [model.state_dict()] * 2, {"groups": "expert"})


def test_message_lists_tensors_with_their_own_coefficients() -> None:
    text = (
        r"groups: expert: 8 experts in 2 layers \('blocks.0.experts', 'blocks.1.experts'\) have coefficients of their "
        r"own; the other 6 tensors \('blocks.0.router.weight', .* have the coefficients of their block"
    )
    with pytest.warns(UserWarning, match=text):
        twa_scale.attach(Mixture(), states(), {"groups": "expert"})


def test_a_model_without_trained_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"groups: 'expert' is set, but none of the 2 trained tensors .*'weight'"):
        twa_scale.attach(nn.Linear(2, 2), [nn.Linear(2, 2).state_dict()] * 2, {"groups": "expert"})
    with pytest.raises(ConfigError, match="none of the 2 trained tensors"):
        twa_scale.attach(Mixture(), states(), {"groups": "expert", "include": ["head"]})


def trained(groups: str = "expert") -> tuple[nn.Module, twa_scale.TrainableAverage]:
    model = Mixture()
    twa = twa_scale.attach(model, states(), {"groups": groups, "optimizer": {"name": "sgd", "lr": 0.1}})
    model(torch.ones(2, 3)).sum().backward()
    twa.step()
    return model, twa


def test_elements_of_groups_and_a_state_are_those_of_experts() -> None:
    model, twa = trained()
    assert sum(twa.elements) == sum(p.numel() for p in model.parameters())
    sizes = dict(zip(twa.layout.groups, twa.elements, strict=True))
    assert sizes["blocks.0.experts.2"] == sizes["blocks.1.experts.2"] == 3 * 5 * 2 + 5
    state, before = twa.state_dict(), {name: value.clone() for name, value in model.state_dict().items()}
    assert state["experts"]["blocks.0.experts.bias"] == [
        twa.layout.groups.index(f"blocks.0.experts.{i}") for i in range(E)
    ]
    twa.start_from("center")
    twa.load_state_dict(state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    state["experts"]["blocks.0.experts.bias"] = [0, 1, 2]
    with pytest.raises(StateError, match=r"experts: 'blocks.0.experts.bias' has 3 experts, which do not fit"):
        twa.load_state_dict(state)
    _, other = trained("tensor")
    with pytest.raises(StateError):
        other.load_state_dict(twa.state_dict())


def test_the_report_has_a_tensor_for_each_expert(tmp_path: Path) -> None:
    paths = [tmp_path / f"step-{i}.pt" for i in range(3)]
    for path, state in zip(paths, states(), strict=True):
        torch.save(state, path)
    twa = twa_scale.attach(Mixture(), paths, {"groups": "expert"})
    save_run(twa, paths, tmp_path)
    actual = read(tmp_path).coefficients
    assert actual is not None
    assert actual.elements == twa.elements
    names = {tensor.name: actual.groups[tensor.group] for tensor in actual.tensors}
    assert (
        names["blocks.0.experts.3.up"] == "blocks.0.experts.3"
        and names["blocks.1.experts.3.up"] == "blocks.1.experts.3"
    )
    assert actual.positions["blocks.0.experts.3.up"] == actual.positions["blocks.0.experts.2.up"]


@pytest.mark.parametrize(
    ("learn", "text"),
    [
        ({"optimizer": {"lr": "auto"}}, "lr: 'auto'"),
        ({"store": "mapped"}, "^store:"),
    ],
)
def test_a_callback_refuses_settings_of_learning_before_training(learn: dict[str, Any], text: str) -> None:
    averaging = Averaging(window={"every": 1, "keep": 2}, learn=learn, learn_steps=1)
    with pytest.raises(ConfigError, match=text):
        averaging._make(Mixture())
