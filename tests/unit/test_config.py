"""Settings in files and overrides, and the messages for invalid ones."""

import copy
import inspect
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from twa_scale.average.optimizer import check_optimizer, make_optimizer
from twa_scale.base.names import REST, group_names, selected
from twa_scale.base.spans import share
from twa_scale.config import (
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TwaConfig,
    candidate_index,
    center_weights,
    dump,
    load_config,
    of_sum_one,
    validated,
)
from twa_scale.config.optimizers import FLAGS, OPTIONS
from twa_scale.errors import ConfigError
from twa_scale.run.schedule import factor, set_rates

MINIMAL = {"candidates": "step-*", "task": {"name": "causal_lm"}, "output": "out", "steps": 3}


def write(directory: Path, data: Any, name: str = "run.yaml") -> Path:
    path = directory / name
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return path


def refusal(directory: Path, *overrides: str, **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(write(directory, MINIMAL | changes), list(overrides))
    return str(caught.value)


# Files


def test_a_file_with_defaults_filled_in(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert (config.basis, config.groups, config.center, config.units) == ("normalized", "global", "mean", "delta")
    assert config.optimizer.name == "adamw" and config.optimizer.options == {"weight_decay": 0.0}
    assert RunConfig.model_validate_json(dump(config)) == config


def test_a_config_is_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(ConfigError, match="steps: settings are frozen"):
        config.steps = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": "blok"}, "groups: .*'tensor[+]row' or a valid list [(]got 'blok'[)]; did you mean 'block'[?]"),
        ({"groups": 3}, "groups: Input should be 'global', .*'tensor[+]row' or a valid list [(]got 3[)]"),
        ({"groups": ["a", 1]}, "groups[.]1: Input should be a valid string [(]got 1[)]"),
        ({"start": "bset"}, "start: .* or a valid integer [(]got 'bset'[)]; did you mean 'best'[?]"),
        ({"buffers": "averag"}, "buffers: .* or a valid integer [(]got 'averag'[)]; did you mean 'average'[?]"),
        ({"optimizer": {"lr": "atuo"}}, "optimizer[.]lr: .*number or 'auto' [(]got 'atuo'[)]; did you mean 'auto'[?]"),
        ({"optimizer": {"lr": -1}}, "optimizer[.]lr: Input should be greater than 0 or 'auto' [(]got -1[)]"),
        ({"center": {}}, "center: Input should be a valid string or a valid integer or a valid list [(]got {}[)]"),
    ],
)
def test_invalid_value_of_a_union_is_one_message(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validated(TwaConfig, settings)
    assert re.fullmatch(f"config: {message}", str(caught.value)), caught.value


UNTYPED: Any = TwaConfig  # calls that the type checker refuses


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNTYPED(basis="pcaa"), r"TwaConfig: basis: .*'pca'.*got 'pcaa'"),
        (lambda: UNTYPED(basis="pcaa"), r"; did you mean 'pca'\?$"),
        (lambda: TwaConfig(center="meen"), r"; did you mean 'mean'\?$"),
        (lambda: UNTYPED(gruops="block"), "TwaConfig: unknown key 'gruops'; did you mean 'groups'"),
        (lambda: UNTYPED(optimizer={"lr": -1}), r"TwaConfig: optimizer\.lr: .*greater than 0"),
        (lambda: TwaConfig(num_components=2), "TwaConfig: num_components is for basis 'pca'"),
        (lambda: UNTYPED({"basis": "pca"}), "TwaConfig: give settings by name"),
        (lambda: ScheduleConfig(name="step"), "ScheduleConfig: schedule 'step' needs"),
        (lambda: ScheduleConfig(every=3), "`every` is for schedule step; the schedule is 'cosine'"),
        (lambda: ScheduleConfig(name="linear", milestones=[0.5]), "`milestones` is for schedule step"),
        (lambda: ScheduleConfig(name="constant", final=0.1), "`final` is for schedule cosine and linear"),
        (lambda: RunConfig(candidates="a"), "RunConfig: task: Field required"),  # type: ignore[call-arg]
    ],
)
def test_invalid_arguments_raise_config_error(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_settings_are_copied_and_pickled_as_they_are() -> None:
    config = TwaConfig(basis="pca", num_components=2, optimizer=OptimizerConfig(name="sgd", momentum=0.9))
    for other in (
        pickle.loads(pickle.dumps(config)),
        copy.copy(config),
        copy.deepcopy(config),
        TwaConfig(**config.model_dump()),
        TwaConfig.model_validate_json(config.model_dump_json()),
        validated(TwaConfig, config),
    ):
        assert type(other) is TwaConfig and other == config and other.optimizer.options == {"momentum": 0.9}


@pytest.mark.parametrize("value", [{"basis": "pcaa"}, {"optimizer": 3}, {"num_components": 2}])
def test_copies_that_were_changed_are_checked_when_they_are_used(value: dict[str, Any]) -> None:
    for config in (TwaConfig().model_copy(update=value), TwaConfig.model_construct(**value)):
        with pytest.raises(ConfigError, match="config: "):
            validated(TwaConfig, config)


def test_copies_that_were_changed_get_the_types_of_settings() -> None:
    config = validated(TwaConfig, TwaConfig().model_copy(update={"read_chunk": 1e6, "include": ("a",)}))
    assert type(config.read_chunk) is int and config.include == ["a"]


@pytest.mark.parametrize("value", [[], "", 0, False, "run.yaml"])
def test_configuration_must_be_a_mapping(value: Any) -> None:
    with pytest.raises(ConfigError, match="valid dictionary or instance of TwaConfig"):
        validated(TwaConfig, value)


@pytest.mark.parametrize("indent", [None, 2, "\t"])
def test_json_is_read_however_it_is_indented(tmp_path: Path, indent: Any) -> None:
    data = MINIMAL | {"optimizer": {"lr": 1e-05}}
    config = load_config(write(tmp_path, json.dumps(data, indent=indent), "run.json"))
    assert config.optimizer.lr == 1e-5 and config.steps == 3


@pytest.mark.parametrize("text", ["3e-3", "3E-3", "0.003", ".003", "3.e-3", "+3e-3"])
def test_floats_in_every_spelling(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, yaml.safe_dump(MINIMAL) + f"optimizer: {{lr: {text}, eps: {text}}}\n")
    for config in (load_config(path), load_config(path, [f"optimizer.lr={text}", f"optimizer.eps={text}"])):
        assert config.optimizer.lr == 0.003 and config.optimizer.options["eps"] == 0.003


def test_text_that_resembles_numbers_stays_text(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, yaml.safe_dump(MINIMAL) + "include: [1e, e5, 3.7.1, layers.0, -]\n"))
    assert config.include == ["1e", "e5", "3.7.1", "layers.0", "-"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "NoneType"),
        (b"- a\n- b\n", "list"),
        (b"steps: [1\n", "YAML"),
        (b"\xff\xfe\x00\x81", "run.yaml"),
        (b"steps: !!python/object/apply:os.system ['true']\n", "YAML"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path)
    assert "run.yaml" in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.yaml", tmp_path):
        with pytest.raises(ConfigError, match="cannot be read"):
            load_config(path)


# Overrides


def test_overrides_replace_and_add(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, MINIMAL | {"optimizer": {"name": "sgd", "momentum": 0.5}}),
        [
            "optimizer.lr=3e-3",
            "optimizer.momentum=0.9",
            "groups=[^a, '^b=c']",
            "max_grad_norm=1",
            "task.model={byte_gpt: {n_layer: 2}}",
            "task.fractions.train=0.5",
            "center=ema:0.9",
            "output=out=1",
            "num_components=null",
        ],
    )
    assert config.optimizer.options == {"momentum": 0.9} and config.optimizer.lr == 0.003
    assert config.groups == ["^a", "^b=c"] and config.max_grad_norm == 1 and config.center == "ema:0.9"
    assert config.task.options == {"model": {"byte_gpt": {"n_layer": 2}}, "fractions": {"train": 0.5}}
    assert config.output == "out=1" and config.num_components is None


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lr=fast"], "override 'optimizer.lr=fast': optimizer.lr: "),
        (["steps=3", "grups=block"], "override 'grups=block': unknown key 'grups'; did you mean 'groups'?"),
        (["optimizer=adamw"], "override 'optimizer=adamw': optimizer: "),
        (["schedule.name=step"], "override 'schedule.name=step': schedule: "),
        (["groups=block", "epochs=2"], " with 'groups=block', 'epochs=2': give exactly one of"),
        (["task.name=3"], "override 'task.name=3': task.name: "),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    assert message in refusal(tmp_path, *overrides)


def test_errors_of_file_and_override_are_both_named(tmp_path: Path) -> None:
    text = refusal(tmp_path, "optimizer.lr=fast", basis="nrmalized")
    assert f"{write(tmp_path, {})}: basis: " in text and "override 'optimizer.lr=fast': optimizer.lr: " in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "key=value"),
        ("=3", "key=value"),
        ("steps.=3", "key=value"),
        ("steps.more=3", "'steps' holds 3"),
        ("groups=[a", "groups=[a"),
        ("optimizer..lr=3", "optimizer"),
    ],
)
def test_malformed_overrides_are_refused(tmp_path: Path, override: str, message: str) -> None:
    assert message in refusal(tmp_path, override)


# Mistakes


@pytest.mark.parametrize(
    ("changes", "key", "nearest"),
    [
        ({"basiss": "pca"}, "'basiss'", "'basis'"),
        ({"batchsize": 4}, "'batchsize'", "'batch_size'"),
        ({"batch-size": 4}, "'batch-size'", "'batch_size'"),
        ({"micro batch": 4}, "'micro batch'", "'micro_batch_size'"),
        ({"checkpoint_evry": 4}, "'checkpoint_evry'", "'checkpoint_every'"),
        ({"schedule": {"warmpu": 0.1}}, "'schedule.warmpu'", "'warmup'"),
        ({"schedule": {"name": "step", "evry": 2}}, "'schedule.evry'", "'every'"),
    ],
)
def test_unknown_key_suggests_nearest(tmp_path: Path, changes: dict[str, Any], key: str, nearest: str) -> None:
    message = refusal(tmp_path, **changes)
    assert f"unknown key {key}" in message and f"did you mean {nearest}?" in message


def test_unknown_key_lists_known_keys(tmp_path: Path) -> None:
    message = refusal(tmp_path, schedule={"zzz": 1})
    assert "'schedule.zzz'" in message and "every, factor, final, milestones, name, warmup" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"basis": "pcaa"}, ["basis", "'pca'", "'pcaa'"]),
        ({"store": "dense8"}, ["store", "'dense32'"]),
        ({"schedule": {"name": "cos"}}, ["schedule.name", "'cosine'", "'cos'"]),
        ({"schedule": {"warmup": 1.0}}, ["schedule.warmup", "less than 1"]),
        ({"schedule": {"name": "step"}}, ["schedule", "`every`"]),
        ({"optimizer": {"lr": 0}}, ["optimizer.lr", "greater than 0"]),
        ({"optimizer": {"lr": "fast"}}, ["optimizer.lr", "'fast'"]),
        ({"steps": 0}, ["steps", "greater than 0"]),
        ({"steps": None}, ["`steps` and `epochs`"]),
        ({"epochs": 2}, ["`steps` and `epochs`"]),
        ({"num_components": 2}, ["num_components", "pca"]),
        ({"center": "ema"}, ["center", "'ema'", "ema:DECAY"]),
        ({"center": "ema:1.5"}, ["center", "0 < DECAY < 1"]),
        ({"center": "median"}, ["center", "'median'"]),
        ({"groups": "layer"}, ["groups", "'layer'", "'block'"]),
        ({"start": "middle"}, ["start", "'middle'"]),
        ({"task": {}}, ["task.name"]),
        ({"engine": "zero"}, ["engine", "'fsdp2'"]),
        ({"max_shard_size": 5}, ["max_shard_size"]),
        ({"optimizer": {"name": "SparseAdam"}}, ["optimizer.name", "'SparseAdam'", "sparse gradients"]),
        ({"optimizer": {"name": "lbfgs"}}, ["optimizer.name", "'lbfgs'", "closure"]),
        ({"optimizer": {"name": "adamm"}}, ["optimizer.name", "'adamm'", "adamw"]),
        ({"optimizer": {"name": "sgd", "momentun": 0.9}}, ["optimizer", "'momentun'", "lr, momentum"]),
        ({"optimizer": {"name": "sgd", "betas": [0.9, 0.99]}}, ["optimizer", "'betas'"]),
        ({"optimizer": {"betas": [0.9]}}, ["optimizer", "'betas'", "list of 2 numbers", "[0.9]"]),
        ({"optimizer": {"eps": "tiny"}}, ["optimizer", "'eps'", "finite number", "'tiny'"]),
        ({"optimizer": {"name": "sgd", "momentum": math.nan}}, ["optimizer", "'momentum'", "finite number"]),
        ({"optimizer": {"name": "sgd", "nesterov": 1}}, ["optimizer", "'nesterov'", "true or false"]),
        ({"optimizer": {"lr": math.inf}}, ["optimizer.lr", "finite"]),
        ({"optimizer": {"lr": math.nan}}, ["optimizer.lr", "nan"]),
        ({"optimizer": {"lr": True}}, ["optimizer.lr", "True"]),
        ({"max_grad_norm": math.inf}, ["max_grad_norm", "finite"]),
        ({"optimizer": {"name": "adafactor", "eps": 1e-3}}, ["'eps' of adafactor", "list of two numbers", "0.001"]),
        ({"optimizer": {"name": "adafactor", "eps": [1e-30, None]}}, ["'eps' of adafactor", "first", "None"]),
        ({"optimizer": {"name": "adafactor", "eps": [1e-3]}}, ["'eps' of adafactor"]),
        ({"optimizer": {"name": "adamw", "eps": [1e-30, 1e-3]}}, ["'eps' of adamw", "finite number"]),
        ({"steps": True}, ["steps", "integer", "True"]),
        ({"steps": "3"}, ["steps", "integer", "'3'"]),
        ({"output": " "}, ["output", "not a path"]),
        ({"output": "a\0b"}, ["output", "not a path"]),
        ({"output": "~nobody-of-this-name/a"}, ["output", "Write the path out"]),
        ({"steps": 2.5}, ["steps", "integer", "2.5"]),
        ({"resume": "yes"}, ["resume", "boolean", "'yes'"]),
        ({"seed": -1}, ["seed", "greater than or equal to 0"]),
        ({"seed": 2**64}, ["seed", "less than"]),
        ({"center": -1}, ["center", "-1", "start at 0", "`last`"]),
        ({"center": True}, ["center", "True"]),
        ({"center": [0.5, 0.6]}, ["center", "sum 1.1"]),
        ({"start": -1}, ["start", "-1", "`last`"]),
        ({"buffers": -2}, ["buffers", "-2", "`last`"]),
    ],
)
def test_invalid_values_are_named_with_valid_ones(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    message = refusal(tmp_path, **changes)
    assert all(word in message for word in words), message


def test_numbers_and_home_directories(tmp_path: Path) -> None:
    """YAML 1.1 reads 0100 as 64, and 1:30 as 90."""
    text = yaml.safe_dump(MINIMAL).replace("steps: 3", "steps: 0100").replace("output: out", "output: ~/out")
    config = load_config(write(tmp_path, text))
    assert config.steps == 100 and config.output == str(Path.home() / "out")
    with pytest.raises(ConfigError, match=r"steps.*integer.*'1:30'"):
        load_config(write(tmp_path, text.replace("0100", "1:30")))
    assert load_config(write(tmp_path, text), ["steps=0x10"]).steps == 16


def test_non_string_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="string"):
        load_config(write(tmp_path, MINIMAL | {1: 2}))


def test_all_errors_are_in_one_message(tmp_path: Path) -> None:
    message = refusal(tmp_path, basis="x", steps=-1, typo=3)
    assert all(word in message for word in ("basis", "steps", "'typo'")) and "\n" not in message


def test_validated_accepts_arguments_of_attach() -> None:
    config = TwaConfig(basis="pca")
    assert validated(TwaConfig, config) is config and validated(TwaConfig, None) == TwaConfig()
    with pytest.raises(ConfigError, match="'basis'"):
        validated(TwaConfig, {"bases": "pca"})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.yaml", "steps: 3\nbasis: pca\nsteps: 4\n", ["'steps' is given twice", "lines 1 and 3"]),
        ("a.yaml", "steps: 3\noptimizer: {lr: 1, name: sgd, lr: 2}\n", ["'lr' is given twice", "lines 2 and 2"]),
        ("a.yaml", "schedule: {name: step, 'name': linear}", ["'name' is given twice"]),
        ("a.json", '{"steps": 3, "optimizer": {"lr": 1, "lr": 1}}', ["'lr' is given twice"]),
    ],
)
def test_repeated_key_raises(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text, name))
    assert all(word in str(caught.value) for word in (name, *words)), caught.value
    assert "given twice" in refusal(tmp_path, "optimizer={lr: 1, lr: 2}")


def test_keys_of_an_anchor_may_be_replaced(tmp_path: Path) -> None:
    text = (
        "optimizer: &o {lr: 1, name: sgd}\nschedule: &s {<<: {warmup: 0.5}, warmup: 0}\ntask: {<<: *o, <<: *s, lr: 2}\n"
    )
    task = {"name": "sgd", "warmup": 0, "lr": 2}
    data = {key: value for key, value in MINIMAL.items() if key != "task"}
    assert load_config(write(tmp_path, yaml.safe_dump(data) + text)).task.model_dump() == task


def test_integral_floats_are_integers_and_tuples_are_lists() -> None:
    config = validated(RunConfig, MINIMAL | {"steps": 1e3, "read_chunk": 8192.0, "center": (0.5, 0.5)})
    assert (config.steps, config.read_chunk, config.center) == (1000, 8192, [0.5, 0.5])


def test_optimizer_option_of_a_later_torch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Adam(torch.optim.Adam):
        def __init__(self, params: Any, lr: float, betas: Any = (0.9, 0.999)) -> None:
            super().__init__(params, lr=lr, betas=betas)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    config = validated(TwaConfig, {"optimizer": {"name": "adam", "decoupled_weight_decay": True}})
    with pytest.raises(ConfigError, match=r"optimizer\.decoupled_weight_decay: adam of torch .* later torch"):
        check_optimizer(config)


def test_the_known_optimizers_are_those_of_torch() -> None:
    """Each optimizer takes a step with each of its options. The other optimizers cannot train on a CPU."""
    classes = {n.lower(): c for n, c in vars(torch.optim).items() if isinstance(c, type) and n != "Optimizer"}
    classes = {n: c for n, c in classes.items() if issubclass(c, torch.optim.Optimizer)}
    assert classes.keys() - {"lbfgs", "sparseadam"} <= OPTIONS.keys()
    left_out = {"params", "lr", "capturable", "differentiable", "adjust_lr_fn"}
    for name in classes.keys() & OPTIONS.keys():
        signature = inspect.signature(classes[name]).parameters
        options = set(OPTIONS[name].split())
        later = options - signature.keys()  # an option that an older torch does not have is refused when it is used
        assert not later or torch.__version__ < "2.13", name
        assert options - later == signature.keys() - left_out, name
        for option in options - later:
            value = signature[option].default
            value = list(value) if isinstance(value, tuple) else True if option in FLAGS else value
            needed = {"momentum": 0.5} if option == "nesterov" else {}
            config = validated(TwaConfig, {"optimizer": {"name": name, **needed, option: value}})
            x = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
            optimizer = make_optimizer(config, x)
            x.grad = torch.ones_like(x)
            optimizer.step()
            assert not torch.equal(x, torch.ones_like(x)), (name, option)


# The center


@pytest.mark.parametrize(
    ("center", "expected"),
    [
        ("mean", [0.25] * 4),
        ("linear", [0.25] * 4),
        ("first", [1, 0, 0, 0]),
        ("last", [0, 0, 0, 1]),
        (2, [0, 0, 1, 0]),
        ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4]),
        ([2, -1, 0, 0], [2, -1, 0, 0]),
        ("ema:0.5", [1 / 15, 2 / 15, 4 / 15, 8 / 15]),
        (" EMA : 0.5", [1 / 15, 2 / 15, 4 / 15, 8 / 15]),
        ("ema-torch:0.5", [1 / 8, 1 / 8, 1 / 4, 1 / 2]),
        ("uniform", [0.25] * 4),
        ("lawa:3", [0, 1 / 3, 1 / 3, 1 / 3]),
        (" 2 ", [0, 0, 1, 0]),
        ("[0.1, 0.2,0.3 0.4]", [0.1, 0.2, 0.3, 0.4]),
        ("minus-sqrt", [0.5, math.sqrt(0.5) - 0.5, math.sqrt(0.75) - math.sqrt(0.5), 1 - math.sqrt(0.75)]),
    ],
    ids=str,
)
def test_center_weights(center: Any, expected: list[float]) -> None:
    chosen = TwaConfig(center=center).center
    assert center_weights(chosen, 4) == pytest.approx(expected, abs=1e-12)
    assert sum(center_weights(chosen, 4)) == pytest.approx(1)


@pytest.mark.parametrize("shape", ["linear", "minus-sqrt"])
def test_decay_shapes_equal_decayed_learning_rate(shape: str) -> None:
    """WSM: with steps g_1..g_n between candidates, sum_i b_i w_i = w_0 + sum_j rate_j g_j with the decayed rates."""
    n = 7
    steps = torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = torch.tensor(center_weights(shape, n), dtype=torch.float64)
    rates = [1 - (j / n) ** (1.0 if shape == "linear" else 0.5) for j in range(n)]
    torch.testing.assert_close(weights @ steps.cumsum(0), torch.tensor(rates, dtype=torch.float64) @ steps)


@pytest.mark.parametrize(
    "center", [4, -5, [0.5, 0.5], [0.5] * 4, [], [math.nan, 1, 0, 0], [math.inf, -math.inf, 1, 0]], ids=str
)
def test_invalid_centers_are_refused(center: Any) -> None:
    with pytest.raises(ConfigError, match="center"):
        center_weights(validated(TwaConfig, {"center": center}).center, 4)


def test_ema_torch_is_the_ema_of_torch() -> None:
    values = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for value in values:
        model.weight.data.copy_(value)
        averaged.update_parameters(model)
    weights = torch.tensor(center_weights("ema-torch:0.8", 6), dtype=torch.float64)
    torch.testing.assert_close(weights @ values, averaged.get_parameter("module.weight")[0].detach())


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 3], [0.25, 0.75]),
        ([3, -1], [1.5, -0.5]),
        ([1.5e308, -1e308], [3.0, -2.0]),
        ([5e-324], [1.0]),
        ([0, 2], [0, 1]),
    ],
    ids=str,
)
def test_normalized_weights(weights: list[float], expected: list[float]) -> None:
    assert of_sum_one(weights, normalize=True) == pytest.approx(expected, rel=1e-15)


@pytest.mark.parametrize(
    "weights", [[], [0, 0], [1, -1], [1, -1 + 1e-9], [-1, -3], [1.5e308] * 2, [math.nan, 1], [math.inf, 1]], ids=str
)
def test_weights_that_cannot_be_normalized_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"sum|finite"):
        of_sum_one(weights, normalize=True)


def test_rounded_weights_sum_to_one_exactly() -> None:
    assert math.fsum(of_sum_one([0.3333337, 0.3333333, 0.3333333])) == pytest.approx(1, abs=1e-15)


def test_candidate_indices() -> None:
    assert [candidate_index(i, 3, "start") for i in ("first", "last", 0, 2, -1, -3)] == [0, 2, 0, 2, 2, 0]
    with pytest.raises(ConfigError, match=r"start: .* 3 .*0 to 2"):
        candidate_index(3, 3, "start")


# The schedule


def rates(num_steps: int, **settings: Any) -> list[float]:
    config = ScheduleConfig(**settings)
    return [factor(config, step, num_steps) for step in range(num_steps)]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_the_warmup_rises_linearly_to_one(name: str) -> None:
    assert rates(20, name=name, warmup=0.2)[:4] == pytest.approx([0.25, 0.5, 0.75, 1])
    assert max(rates(20, name=name, warmup=0.2)) == 1


def test_shapes_after_the_warmup() -> None:
    assert rates(4, name="constant", warmup=0) == [1] * 4
    assert rates(10, name="linear", warmup=0.2)[2:] == pytest.approx([i / 8 for i in range(8, 0, -1)])
    assert rates(10, name="linear", warmup=0.2, final=0.5)[-1] == pytest.approx(0.5 + 0.5 / 8)
    cosine = rates(10, name="cosine", warmup=0.2, final=0.1)
    assert cosine[2] == 1 and cosine[6] == pytest.approx(0.55)
    assert rates(1, name="cosine", warmup=0.2) == rates(1, name="linear", warmup=0.2) == [1]
    assert cosine[1:] == sorted(cosine[1:], reverse=True)
    assert rates(9, name="step", warmup=0, every=3, factor=0.5) == [1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25]
    assert rates(8, name="step", warmup=0, milestones=[0.5, 0.75]) == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)


def test_scheduler_sets_the_rates_of_the_optimizer() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    schedule = ScheduleConfig(name="linear", warmup=0.2)
    seen = []
    for step in range(10):
        assert set_rates(optimizer, [0.5], schedule, step, 10) == optimizer.param_groups[0]["lr"]
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.5 * rate for rate in rates(10, name="linear", warmup=0.2)])


# Names and spans

NAMES = ["embedding.weight", "blocks.0.a.weight", "blocks.0.b.3.bias", "blocks.10.a.weight", "norm.weight", "scale"]


def test_group_names() -> None:
    assert set(group_names(NAMES, "global").values()) == {"global"}
    assert group_names(NAMES, "tensor") == {name: name for name in NAMES}
    assert list(group_names(NAMES, "block").values()) == [
        "embedding", "blocks.0", "blocks.0", "blocks.10", "norm", "scale",
    ]  # fmt: skip
    chosen = group_names(NAMES, [r"\.a\.", r"blocks"])
    assert list(chosen.values()) == [REST, r"\.a\.", "blocks", r"\.a\.", REST, REST]


def test_selecting_names() -> None:
    assert selected(NAMES, [], []) == NAMES
    assert selected(NAMES, ["blocks", "norm"], ["bias$"]) == [NAMES[1], NAMES[3], NAMES[4]]


@pytest.mark.parametrize("key", ["include", "exclude", "groups"])
def test_patterns_that_match_nothing_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}.*'blcks'.*matches none.*'embedding.weight'"):
        match key:
            case "groups":
                group_names(NAMES, ["norm", "blcks"])
            case _:
                selected(NAMES, **{"include": [], "exclude": [], key: ["norm", "blcks"]})


@pytest.mark.parametrize("numel", [0, 1, 2, 3, 7, 12, 100])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_cover_all_elements_once(numel: int, size: int) -> None:
    parts = [share(numel, rank, size) for rank in range(size)]
    assert [i for start, stop in parts for i in range(start, stop)] == list(range(numel))
    assert all(stop - start <= parts[0][1] for start, stop in parts)


def test_keys_of_a_run_are_named_as_such() -> None:
    with pytest.raises(ConfigError, match=r"'steps' is a key of RunConfig, for `twa-scale run`; TwaConfig does not"):
        validated(TwaConfig, {"recipe": "tail", "steps": 5})
    with pytest.raises(ConfigError, match="unknown key 'group'; did you mean 'groups'"):
        validated(TwaConfig, {"group": "block"})
