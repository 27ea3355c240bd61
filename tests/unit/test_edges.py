"""Edge cases of the public API in which errors could remain unnoticed."""

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import twa_scale
from twa_scale import CandidateError, EngineError, Snapshots, TwaError
from twa_scale.base.notices import TwaWarning
from twa_scale.engines import Consume
from twa_scale.engines.plain import PlainEngine
from twa_scale.ranks import Group

SGD = {"optimizer": {"name": "sgd", "lr": 0.1}}


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def candidates(n: int = 4, size: float = 0.1) -> list[dict[str, Tensor]]:
    base = model().state_dict()
    generator = torch.Generator().manual_seed(1)
    return [{k: v + size * torch.randn(v.shape, generator=generator) for k, v in base.items()} for _ in range(n)]


def backward(net: nn.Module, seed: int = 2) -> None:
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
    net(x).square().mean().backward()


def after_one_step(net: nn.Module, **config: Any) -> Tensor:
    twa = twa_scale.attach(net, candidates(), {**SGD, **config})
    backward(net)
    twa.step()
    return twa.coefficients


def test_gradients_from_before_attach_are_ignored() -> None:
    clean, stale = model(), model()
    backward(stale, seed=9)
    torch.testing.assert_close(after_one_step(stale), after_one_step(clean), rtol=0, atol=0)


def test_candidate_that_equals_the_center_has_no_effect() -> None:
    """Its delta is a rounding error, which a direction of unit norm would amplify by seven orders of magnitude."""
    first, second, *_ = candidates()
    mean = {k: (first[k] + second[k]) / 2 for k in first}
    net = model()
    twa = twa_scale.attach(net, [first, second, mean], SGD)
    for seed in range(20):
        backward(net, seed)
        twa.step()
    a = twa.coefficients
    assert a.abs().max() < 100
    for name, weights in net.state_dict().items():
        exact = sum(a[i, 0] * c[name].double() for i, c in enumerate([first, second, mean]))
        torch.testing.assert_close(weights.double(), exact, rtol=1e-5, atol=1e-6)


class OddTensors(nn.Module):
    """Tensors that float32 cannot represent: they are frozen, or buffers."""

    seventh: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(5))
        self.third = nn.Parameter(torch.tensor([1 / 3], dtype=torch.float64), requires_grad=False)
        self.large = nn.Parameter(torch.tensor([2**40 + 1]), requires_grad=False)
        self.register_buffer("seventh", torch.tensor([1 / 7], dtype=torch.float64))
        self.register_buffer("count", torch.tensor(2**53 + 1))


def test_tensors_that_are_not_trained_keep_their_bits(tmp_path: Path) -> None:
    source, net = OddTensors(), OddTensors()
    with torch.no_grad():
        for tensor in (net.third, net.large, net.seventh, net.count):
            tensor.zero_()
    stored = [{**source.state_dict(), "weight": torch.full((5,), float(i))} for i in range(3)]
    twa = twa_scale.attach(net, stored)
    assert all(torch.equal(net.state_dict()[k], source.state_dict()[k]) for k in ("third", "large", "seventh", "count"))
    twa.export(tmp_path / "out")


def test_a_buffer_that_candidates_lack_is_named_unless_it_is_ignored() -> None:
    net = nn.BatchNorm1d(4)
    stored = [{k: v for k, v in net.state_dict().items() if "running_var" not in k} for _ in range(2)]
    stored[1]["weight"] = stored[1]["weight"] + 1
    with pytest.raises(CandidateError, match="running_var"):
        twa_scale.attach(net, stored)
    twa_scale.attach(net, stored, {"ignore": ["running_var"]})


def test_a_state_in_memory_can_be_loaded_twice() -> None:
    net = model()
    twa = twa_scale.attach(net, candidates(), {"optimizer": {"name": "adamw", "lr": 0.1}})
    backward(net)
    twa.step()
    state = twa.state_dict()
    ends = []
    for _ in range(2):
        twa.load_state_dict(state)
        for seed in range(3):
            backward(net, seed)
            twa.step()
        ends.append(twa.coefficients)
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_an_export_reports_gradients_that_no_step_has_used(tmp_path: Path) -> None:
    net = model()
    twa = twa_scale.attach(net, candidates())
    optimizer = torch.optim.AdamW(net.parameters())
    for _ in range(2):
        backward(net)
        optimizer.step()
    with pytest.warns(TwaWarning, match="no step was taken"):
        twa.export(tmp_path / "out")
    backward(net)
    twa.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twa.export(tmp_path / "out", overwrite=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_of_torchscript_is_refused() -> None:
    traced = torch.jit.trace(model(), torch.randn(2, 6))
    for net in (traced, nn.Sequential(traced)):
        with pytest.raises(EngineError, match=r"before torch\.jit\.script"):
            twa_scale.attach(net, candidates())


def test_a_step_inside_weights_is_refused() -> None:
    net = model()
    twa = twa_scale.attach(net, candidates())
    with twa.weights("last"), pytest.raises(TwaError, match="inside weights"):
        twa.step()


def test_attaching_twice_is_refused() -> None:
    net = model()
    first = twa_scale.attach(net, candidates())
    twa_scale.attach(net, candidates())
    with pytest.raises(EngineError, match="close"):
        backward(net)
    first.close()


def test_candidates_that_are_refused_are_closed(tmp_path: Path) -> None:
    """Some of their bytes have been read before."""
    states = candidates(3)
    states[2]["2.bias"][1] = float("nan")
    for i, state in enumerate(states):
        save_file(state, tmp_path / f"{i}.safetensors")
    with pytest.raises(CandidateError, match="nan"):
        twa_scale.attach(model(), str(tmp_path / "*.safetensors"))
    links = [
        path for path in Path("/proc/self/fd").iterdir() if path.is_symlink()
    ]  # without the directory listing itself
    assert links and not any(path.readlink().is_relative_to(tmp_path) for path in links)


def test_snapshots_of_a_later_run_are_not_deleted(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, every_n_steps=1, keep_last=2)
    for step in (1000, 2000, 10, 20, 30):
        assert snapshots.save(model(), step).exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}" for s in (20, 30, 1000, 2000)]


def test_an_export_over_its_own_candidates_is_refused(tmp_path: Path) -> None:
    snapshots = Snapshots(tmp_path, every_n_steps=1)
    paths = []
    for step, stored in enumerate(candidates(2), 1):
        net = model()
        net.load_state_dict(stored)
        paths.append(snapshots.save(net, step))
    twa = twa_scale.attach(model(), paths)
    with pytest.raises(TwaError, match="holds the candidate"):
        twa.export(paths[0], overwrite=True)
    assert all((path / "model.safetensors").exists() for path in paths)


def test_from_pretrained_reads_the_average_of_hugging_face_directories(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=True, **settings)
    for step in range(3):
        torch.manual_seed(step)
        transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / f"step-{step}", max_shard_size="20kB")
    net = transformers.LlamaForCausalLM(config)
    twa = twa_scale.attach(net, str(tmp_path / "step-*"), {"groups": "block", "optimizer": {"lr": 0.3}})
    tokens = torch.arange(24).view(2, 12)
    net(input_ids=tokens, labels=tokens).loss.backward()
    twa.step()
    twa.export(tmp_path / "average", max_shard_size="20kB")
    assert (tmp_path / "average" / "model.safetensors.index.json").exists()
    repeated = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "average")
    with torch.no_grad():
        torch.testing.assert_close(repeated(tokens).logits, net(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("part", ["parameter", "buffer"])
def test_a_model_without_memory_is_refused(part: str) -> None:
    model = nn.BatchNorm1d(3)
    states = [{name: value + i for name, value in model.state_dict().items()} for i in range(2)]
    if part == "parameter":
        model.weight = nn.Parameter(model.weight.to("meta"))
    else:
        model.running_mean = torch.empty(3, device="meta")
    with pytest.raises(EngineError, match=r"meta device.*to_empty"):
        twa_scale.attach(model, states)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.LazyLinear(3), "'weight' is uninitialized"),
        (
            lambda: torch.inference_mode()(lambda: nn.Linear(3, 3))(),
            r"'weight' was created in torch.inference_mode\(\)",
        ),
        (lambda: sharing(slice(0, 2)), "parameters 'other' and 'weight' share memory"),
        (lambda: sharing(slice(None)), "parameters 'other' and 'weight' share memory"),
        (lambda: sharing((slice(None), slice(0, 2))), "parameter 'other' is not contiguous"),
    ],
    ids=["lazy", "inference", "overlapping", "the same memory", "columns"],
)
def test_parameters_that_cannot_be_written_are_refused(model: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        twa_scale.attach(model(), [nn.Linear(3, 3).state_dict()] * 2)
    with pytest.raises(EngineError, match=message):
        twa_scale.RunningAverages(model(), ema=[0.9])


def test_a_buffer_that_is_not_saved_may_come_from_inference_mode() -> None:
    model = nn.Linear(3, 3)
    with torch.inference_mode():
        model.register_buffer("cache", torch.zeros(3), persistent=False)
    twa_scale.RunningAverages(model, ema=[0.9])


def sharing(part: slice | tuple[slice, ...]) -> nn.Module:
    model = nn.Linear(3, 3)
    model.other = nn.Parameter(model.weight.detach()[part])
    return model


def test_the_state_dict_of_a_lazy_module_is_refused() -> None:
    with pytest.raises(CandidateError, match="tensor 'bias' is uninitialized"):
        twa_scale.attach(nn.Linear(3, 3), [nn.LazyLinear(3).state_dict()] * 2)


def test_calls_in_inference_mode_do_what_they_do_outside() -> None:
    """Tensors created in inference mode could not be trained or written later."""

    def trained(inside: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(3, 3)
        averages = None
        for source in ("attach", "learn"):
            with torch.inference_mode(inside):
                if source == "attach":
                    twa = twa_scale.attach(model, [nn.Linear(3, 3).state_dict() for _ in range(3)])
                else:
                    twa.close()
                    averages = twa_scale.RunningAverages(model, ema=[0.9], window={"every": 1, "keep": 3})
                    averages.step()
                    nn.init.ones_(model.bias)
                    averages.step()
                    averages.load_state_dict(averages.state_dict())
                    with averages.weights("ema"):
                        pass
                    twa = averages.learn()
                with twa.weights("last"):
                    pass
                twa.load_state_dict(twa.state_dict())
            for _ in range(2):
                model(torch.ones(2, 3)).square().sum().backward()
                with torch.inference_mode(inside):
                    assert twa.step()
                    twa.zero_grad(set_to_none=True)
        weights = model.weight.detach().clone()
        with torch.inference_mode(inside):
            assert averages is not None
            averages.restore()
        return torch.cat([weights, model.weight.detach()])

    assert torch.equal(trained(inside=True), trained(inside=False))


def test_changes_of_what_is_trained_are_refused_or_reported() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    twa = twa_scale.attach(model, [copy.deepcopy(model).state_dict() for _ in range(2)], {"exclude": ["^1[.]"]})
    model[1].requires_grad_(False)  # not trained
    model[0].requires_grad_(True)
    model(torch.ones(3)).sum().backward()
    with pytest.warns(TwaWarning, match=r"'0\.weight', '0\.bias' did not require a gradient at attach"):
        twa.step()
    model[2].bias.requires_grad_(False)
    model(torch.ones(3)).sum().backward()
    with pytest.raises(EngineError, match=r"parameter '2\.bias' no longer requires a gradient"):
        twa.step()


def test_an_export_reports_weights_that_other_code_has_changed(tmp_path: Path) -> None:
    net: Any = model()
    twa = twa_scale.attach(net, candidates(), SGD)
    for _ in range(2):  # reported once by steps, and by each export
        with torch.no_grad():
            net[0].weight.clamp_(max=0.1)
        with pytest.warns(TwaWarning, match=r"'0\.weight' was written.*The export has the weights as they are now"):
            twa.export(tmp_path / "clamped", overwrite=True)
        assert "coefficients" not in json.loads((tmp_path / "clamped/twa_scale.json").read_text())
        backward(net)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            twa.step()
    net.load_state_dict(net.state_dict())  # the same values
    with warnings.catch_warnings():
        warnings.simplefilter("error", TwaWarning)
        twa.export(tmp_path / "same")
    assert "coefficients" in json.loads((tmp_path / "same/twa_scale.json").read_text())
    wanted = net[0].weight.detach().clone()
    net[0].weight = nn.Parameter(torch.zeros(8, 6))
    with pytest.warns(TwaWarning, match=r"'0\.weight' was replaced.*The export has the weights that the average wrote"):
        twa.export(tmp_path / "replaced")
    assert torch.equal(load_file(tmp_path / "replaced/model.safetensors")["0.weight"], wanted)


@pytest.mark.parametrize(("dtype", "is_equal"), [(torch.float64, True), (torch.float16, False)])
def test_an_export_of_converted_weights_has_coefficients_if_they_are_equal(
    tmp_path: Path, dtype: torch.dtype, is_equal: bool
) -> None:
    net = model()
    twa = twa_scale.attach(net, candidates(), SGD)
    net.to(dtype)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        twa.export(tmp_path / "converted")
    assert any("as they are now" in str(warning.message) for warning in caught) != is_equal
    assert ("coefficients" in json.loads((tmp_path / "converted/twa_scale.json").read_text())) == is_equal


class HalfGradients(PlainEngine):
    """An engine that passes on the first half of each gradient."""

    def watch(self, consume: Consume) -> None:
        super().watch(lambda span, gradient: consume(span, gradient[: len(gradient) // 2].clone()))


def test_a_gradient_of_another_length_than_its_span_is_refused() -> None:
    net = model()
    twa_scale.attach(HalfGradients(net, Group.alone()), candidates(), SGD)
    with pytest.raises(EngineError, match=r"has the shape \(1,\), but this rank holds 3 elements"):
        backward(net)


@pytest.mark.parametrize("size", [2, 9])
def test_a_parameter_of_another_size_is_refused(size: int, tmp_path: Path) -> None:
    """Kernels would write outside of its memory."""
    net: Any = model()
    twa = twa_scale.attach(net, candidates(), SGD)
    state = twa.state_dict()
    backward(net)
    net[0].weight.data = torch.zeros(size, 6)
    calls: list[Callable[[], object]] = [
        twa.step,
        lambda: twa.start_from("last"),
        lambda: twa.load_state_dict(state),
        lambda: twa.export(tmp_path / "out"),
        lambda: twa.weights("last").__enter__(),  # after which the average is lost
    ]
    for call in calls:
        with pytest.raises(EngineError, match=r"'0\.weight' was replaced since attach"):
            call()
    assert not net[0].weight.any() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kernels", ["torch", "auto"])
def test_a_graph_from_before_a_step_is_refused_as_with_optimizers_of_torch(kernels: str) -> None:
    model = nn.Linear(3, 3)
    twa = twa_scale.attach(model, [nn.Linear(3, 3).state_dict() for _ in range(2)], {"kernels": kernels})
    loss = model(model(torch.ones(3))).sum()
    loss.backward(retain_graph=True)
    twa.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_module_that_was_replaced_is_refused_and_one_that_was_wrapped_is_not() -> None:
    net: Any = model()
    twa = twa_scale.attach(net, candidates(), SGD)
    net[0] = nn.Sequential(net[0])
    backward(net)
    assert twa.step()
    net.append(nn.Linear(3, 3))
    net[1].scale = nn.Parameter(torch.ones(1))
    backward(net)
    with pytest.warns(TwaWarning, match=r"added since attach: '1\.scale', '3\.weight', '3\.bias'"):
        twa.step()
    backward(net)
    assert twa.step()  # reported once
    net[2] = nn.Linear(8, 3)
    for _ in range(2):  # not only once
        backward(net)
        with pytest.raises(EngineError, match=r"parameter '2\.weight' was replaced"):
            twa.step()


def test_sparse_gradients_are_those_of_dense_ones() -> None:
    def trained(sparse: bool) -> Tensor:
        torch.manual_seed(0)
        states = [nn.Embedding(5, 3).state_dict() for _ in range(3)]
        net: Any = nn.Embedding(5, 3, sparse=sparse)
        twa = twa_scale.attach(net, states, SGD)
        net(torch.tensor([1, 1, 3])).square().sum().backward()
        twa.step()
        return twa.coefficients

    assert torch.equal(trained(sparse=True), trained(sparse=False))


def test_default_device_is_not_used() -> None:
    net, states = model(), candidates()
    expected = after_one_step(model())
    with torch.device("meta"):
        twa = twa_scale.attach(net, states, SGD)
        twa.zero_grad()
    backward(net)
    with torch.device("meta"):
        twa.step()
        twa.load_state_dict(twa.state_dict())
        coefficients = twa.coefficients
        with twa.weights("last"):
            last = {name: value.clone() for name, value in net.state_dict().items()}
    assert torch.equal(coefficients, expected)
    for name, value in candidates()[-1].items():
        torch.testing.assert_close(last[name], value)


def test_default_device_is_not_used_by_averages_of_a_training(tmp_path: Path) -> None:
    net = nn.Linear(6, 4)
    averages = twa_scale.RunningAverages(net, ema=[0.5], window={"every": 1, "keep": 3})
    snapshots = twa_scale.Snapshots(tmp_path / "snapshots", every_n_steps=1, asynchronous=True)
    with torch.device("meta"):
        for step in (1, 2):
            with torch.no_grad():
                net.weight.add_(1.0)
            averages.step()
            snapshots.step(net, step)
        snapshots.close()
        for name in (*averages.names, "lawa:2"):
            with averages.weights(name):
                pass
        averages.load_state_dict(averages.state_dict())
        averages.save_state(tmp_path)
        assert averages.load_state(tmp_path)
        averages.save(tmp_path / "window")
        averages.export(tmp_path / "mean", "mean")
    wanted = net.weight.detach() - 0.5
    torch.testing.assert_close(load_file(tmp_path / "mean/model.safetensors")["weight"], wanted)
    for directory in ("snapshots", "window"):
        actual = load_file(tmp_path / directory / "step-00000002/model.safetensors")["weight"]
        torch.testing.assert_close(actual, net.weight.detach())
