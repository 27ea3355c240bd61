"""Tied tensors that are stored separately, masks of infinite values, and live tensors, with attach and average."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import twa_scale
from twa_scale import CandidateError, ConfigError, StateError, TwaWarning
from twa_scale.candidates import wanted_from_options
from twa_scale.merge import average_fixed
from twa_scale.tools.inspection import inspect

Tensors = dict[str, torch.Tensor]
INF = float("inf")


class Tied(nn.Module):
    """An embedding that is also the head, and masks as a frozen parameter and as a buffer."""

    bias_mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.lm_head = nn.Linear(3, 5, bias=False)
        self.lm_head.weight = self.embed.weight
        self.mask = nn.Parameter(torch.full((3, 3), -INF).triu(1), requires_grad=False)
        self.register_buffer("bias_mask", torch.full((2, 2), -INF).triu(1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.lm_head(self.embed(tokens))
        return logits


def state(seed: int) -> Tensors:
    torch.manual_seed(seed)
    return {name: value.clone() for name, value in Tied().state_dict().items()}


def written(path: Path, states: list[Tensors]) -> list[str]:
    for i, tensors in enumerate(states):
        (path / f"step-{i}").mkdir(parents=True)
        save_file(tensors, path / f"step-{i}/model.safetensors")
    return [str(path / f"step-{i}") for i in range(len(states))]


def exported(twa: twa_scale.TrainableAverage, path: Path) -> Tensors:
    twa.export(path)
    return load_file(path / "model.safetensors")


# Ties


def test_tied_tensors_that_are_equal_are_read_and_written_under_both_names(tmp_path: Path) -> None:
    paths, net = written(tmp_path, [state(0), state(1)]), Tied()
    twa = twa_scale.attach(net, paths)
    assert twa.bytes_read == 2 * sum(value.nbytes for value in state(0).values())
    actual = exported(twa, tmp_path / "out")
    assert torch.equal(actual["embed.weight"], actual["lm_head.weight"]) and actual.keys() == state(0).keys()
    average_fixed(paths, tmp_path / "merged")
    torch.testing.assert_close(load_file(tmp_path / "merged/model.safetensors"), actual)


def test_shared_storage_is_read_once() -> None:
    states = []
    for seed in range(2):
        tensors = state(seed)
        tensors["lm_head.weight"] = tensors["embed.weight"]
        states.append(tensors)
    twa = twa_scale.attach(Tied(), states)
    once = {name: value for name, value in state(0).items() if name != "lm_head.weight"}
    assert twa.bytes_read == 2 * sum(value.nbytes for value in once.values())


@pytest.mark.parametrize("odd", [0, 1])
def test_tied_tensors_that_differ_are_refused_by_attach(tmp_path: Path, odd: int) -> None:
    states = [state(0), state(1)]
    states[odd]["lm_head.weight"][0, 0] += 1
    paths = written(tmp_path, states)
    with pytest.raises(CandidateError, match=r"'embed.weight' and 'lm_head.weight' hold different values") as error:
        twa_scale.attach(Tied(), paths)
    assert str(error.value).startswith(paths[odd])
    twa_scale.attach(Tied(), paths, {"ignore": ["lm_head"]})


@pytest.mark.parametrize("lacking", [["lm_head.weight", ""], ["lm_head.weight", "embed.weight"], ["", "embed.weight"]])
def test_candidates_with_different_names_of_a_tied_tensor(tmp_path: Path, lacking: list[str]) -> None:
    states = [{n: v for n, v in state(i).items() if n != name} for i, name in enumerate(lacking)]
    with pytest.warns(TwaWarning, match="it is tied to"):
        twa = twa_scale.attach(Tied(), written(tmp_path / "a", states))
    whole = twa_scale.attach(Tied(), written(tmp_path / "b", [state(0), state(1)]))
    torch.testing.assert_close(exported(twa, tmp_path / "c"), exported(whole, tmp_path / "d"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("equal", "says", "refused"),
    [(1, None, True), (0, True, True), (0, None, False), (0, False, False), (2, True, False)],
)
def test_head_is_tied_if_values_or_the_configuration_indicate_it(
    tmp_path: Path, equal: int, says: bool | None, refused: bool
) -> None:
    states = [state(i) for i in range(2)]
    for tensors in states[equal:]:
        tensors["lm_head.weight"] = torch.randn(5, 3)
    paths = written(tmp_path, states)
    if says is not None:
        (tmp_path / "step-1/config.json").write_text(json.dumps({"tie_word_embeddings": says}))
    if not refused:
        average_fixed(paths, tmp_path / "out")
        return
    with pytest.raises(CandidateError, match=r"'embed.weight' and 'lm_head.weight' hold different values") as error:
        average_fixed(paths, tmp_path / "out")
    assert str(error.value).startswith(paths[equal]) and not (tmp_path / "out").exists()
    average_fixed(paths, tmp_path / "out", ignore=["lm_head"])
    assert "lm_head.weight" not in load_file(tmp_path / "out/model.safetensors")


def test_other_names_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    states = [state(0), state(1)]
    saved = twa_scale.attach(Tied(), written(tmp_path / "a", states)).state_dict()
    assert saved["tied"] == [["embed.weight", "lm_head.weight"]]
    for name in ("embed.weight", "lm_head.weight"):
        states[1][name] = states[1][name] + 1
    twa = twa_scale.attach(Tied(), written(tmp_path / "b", states))
    with pytest.raises(StateError, match="is not what it was"):
        twa.load_state_dict(saved)


def test_a_classifier_of_the_shape_of_token_types_is_not_tied(tmp_path: Path) -> None:
    """BERT's config.json has tied word embeddings for any head."""
    names = ("bert.embeddings.token_type_embeddings.weight", "bert.embeddings.position_embeddings.weight")
    states = [{name: torch.randn(2, 3) for name in (*names, "classifier.weight", "lm_head.weight")} for _ in range(2)]
    for path in (paths := written(tmp_path, states)):
        (Path(path) / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
    average_fixed(paths, tmp_path / "merged")
    for name, value in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(value, (states[0][name] + states[1][name]) / 2)


# Masks


def test_masks_that_are_equal_keep_their_bits(tmp_path: Path) -> None:
    states, net = [state(i) for i in range(3)], Tied()
    for tensors in states:
        tensors["mask"][0, 0] = INF
    with torch.no_grad():
        net.mask.zero_()
        net.bias_mask.zero_()
    paths = written(tmp_path, states)
    actual = exported(twa_scale.attach(net, paths), tmp_path / "out")
    average_fixed(paths, tmp_path / "merged", "ema:0.5")
    for stored in (dict(net.state_dict()), actual, load_file(tmp_path / "merged/model.safetensors")):
        for name in ("mask", "bias_mask"):
            assert torch.equal(stored[name], states[0][name])
    assert all(norm < 100 for norm in inspect(paths).norms)


def test_a_mask_is_averaged_where_it_is_finite(tmp_path: Path) -> None:
    states = [{"w": torch.tensor([-INF, float(i), INF, 2.0])} for i in range(3)]
    paths = written(tmp_path, states)
    average_fixed(paths, tmp_path / "out", dtype="float16")
    assert load_file(tmp_path / "out/model.safetensors")["w"].tolist() == [-INF, 1, INF, 2]


@pytest.mark.parametrize("value", [INF, float("nan"), 0.0])
def test_masks_that_differ_are_refused(tmp_path: Path, value: float) -> None:
    states = [state(i) for i in range(3)]
    states[1]["mask"][0, 1] = value
    paths = written(tmp_path, states)
    with pytest.raises(CandidateError, match=r"'mask' holds .* at element 1"):
        twa_scale.attach(Tied(), paths)
    with pytest.raises(CandidateError, match=r"'mask' holds .* at element 1"):
        average_fixed(paths, tmp_path / "out")


def test_nan_is_not_a_mask(tmp_path: Path) -> None:
    paths = written(tmp_path, [{"w": torch.tensor([float("nan"), 1.0])} for _ in range(2)])
    with pytest.raises(CandidateError, match=r"'w' holds nan at element 0.* leave the tensor out, with `ignore`"):
        average_fixed(paths, tmp_path / "out")


@pytest.mark.parametrize("store", ["dense32", "packed4", "mapped"])
def test_trained_mask_raises_with_a_fix(store: str) -> None:
    net = Tied()
    net.mask.requires_grad_(True)
    with pytest.raises(CandidateError, match=r"'mask' holds -inf at element 1, as do all candidates.*`exclude`"):
        twa_scale.attach(net, [state(0), state(1)], {"store": store})
    twa_scale.attach(net, [state(0), state(1)], {"store": store, "exclude": ["^mask$"]})
    assert torch.equal(net.mask, state(0)["mask"])


# Live tensors


def test_live_tensors_are_candidates_except_for_mapped() -> None:
    net = Tied()
    other = state(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for position in (0, 1):
        live = [other, net.state_dict()] if position else [net.state_dict(), other]
        with pytest.raises(
            ConfigError, match=rf"'embed.weight' of state dict {position} is in the memory of the model"
        ):
            twa_scale.attach(net, live, {"store": "mapped"})
        assert torch.equal(net.embed.weight, before["embed.weight"])
    twa = twa_scale.attach(net, [net.state_dict(), other])
    torch.testing.assert_close(net.embed.weight, (before["embed.weight"] + other["embed.weight"]) / 2)
    with twa.weights("first"):
        torch.testing.assert_close(net.embed.weight, before["embed.weight"])


def test_view_of_the_model_is_detected() -> None:
    net = nn.Linear(4, 4, bias=False)
    flat = torch.zeros(40)
    net.weight = nn.Parameter(flat[8:24].view(4, 4))
    for start, refused in ((0, True), (23, True), (24, False)):
        stored = [{"weight": torch.randn(4, 4)}, {"weight": flat[start : start + 16].view(4, 4)}]
        if refused:
            with pytest.raises(ConfigError, match="memory of the model"):
                twa_scale.attach(net, stored, {"store": "mapped"})
        else:
            twa_scale.attach(net, stored, {"store": "mapped"})


# Settings


def test_keys_and_patterns_reach_attach_average_and_inspect(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        ema = {name: value for name, value in state(i).items() if "mask" not in name}
        torch.save({"model": state(i + 2), "model_ema": ema}, tmp_path / f"{i}.pt")
        paths.append(str(tmp_path / f"{i}.pt"))
    net = Tied()
    del net.mask, net.bias_mask
    twa_scale.attach(net, paths, {"weights_key": "model_ema"})
    wanted = (state(0)["embed.weight"] + state(1)["embed.weight"]) / 2
    torch.testing.assert_close(net.embed.weight.detach(), wanted)
    average_fixed(paths, tmp_path / "out", weights_key="model_ema")
    torch.testing.assert_close(load_file(tmp_path / "out/model.safetensors")["embed.weight"], wanted)
    assert inspect(paths, wanted=wanted_from_options([], "model_ema")).tensors == [2, 2]
    with pytest.warns(TwaWarning, match="under 'model_ema'"):
        assert inspect(paths, wanted=wanted_from_options(["mask"], None)).tensors == [2, 2]
    for pattern, message in (("(", "is not a regular expression"), ("nothing", "'nothing' matches none")):
        with pytest.raises(ConfigError, match=message):
            average_fixed(paths, tmp_path / "out", weights_key="model_ema", ignore=[pattern])
