"""The weights among the tensors of a file: optimizer entries, other sets, quantized and tied ones, adapter factors."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file

from tests.old_torch import ALONE
from tests.slices import read
from twa_scale.candidates import Candidate, open_candidates
from twa_scale.candidates.select import Wanted
from twa_scale.errors import CandidateError

Tensors = dict[str, torch.Tensor]
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def weights(seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) for name, shape in {"a.weight": (4, 3), "b.bias": (4,)}.items()
    }


def save_safetensors(state: dict[str, Any], path: Path) -> Path:
    save_file({name: value.clone() for name, value in state.items()}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def save_torch(state: dict[str, Any], path: Path) -> Path:
    torch.save(state, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


def save_dcp(state: dict[str, Any], path: Path) -> Path:
    dcp.save(state, checkpoint_id=path, **ALONE)
    return path


def keep(state: dict[str, Any], path: Path) -> Any:
    return state


FLAT: list[Callable[..., Any]] = [save_safetensors, save_torch, save_dcp, keep]
NESTED: list[Callable[..., Any]] = [save_torch, save_dcp, keep]
each_flat = pytest.mark.parametrize("save", FLAT, ids=lambda save: save.__name__)
each_nested = pytest.mark.parametrize("save", NESTED, ids=lambda save: save.__name__)


def opened(specs: list[Any], **wanted: Any) -> tuple[list[Candidate], list[str]]:
    messages: list[str] = []
    return open_candidates(specs, 1, Wanted(**wanted), messages.append), messages


def refused(specs: list[Any], **wanted: Any) -> str:
    with pytest.raises(CandidateError) as error:
        opened(specs, **wanted)
    return str(error.value)


def holds(candidate: Candidate, state: Tensors) -> bool:
    return candidate.names() == sorted(state) and all(
        torch.equal(read(candidate, name, 0, value.numel()), value.reshape(-1)) for name, value in state.items()
    )


# Entries of an optimizer


@each_flat
@pytest.mark.parametrize(
    "entries",
    [
        ["optimizer.state.exp_avg.a.weight", "optimizer.state.exp_avg_sq.a.weight"],
        ["optim.a.weight", "optim.b.bias"],
        ["optimizer_state.a.weight.exp_avg", "a.weight.exp_avg_sq", "momentum_buffer.b.bias"],
        ["state.a.weight.exp_avg", "state.a.weight.step", "state.b.bias.sum", "param_groups.a.weight.lr"],
        ["app.optimizers.0.state.b.bias.square_avg"],
        ["optim.m.a.weight", "optim.v.a.weight"],
        ["opt.state.mu.a.weight", "opt.state.nu.a.weight"],
        ["model_optimizer.adam.mu.b.bias", "adamw.a.weight.mu", "optimizer_1.b.bias.nu"],
    ],
    ids=lambda entries: entries[0],
)
def test_entries_of_an_optimizer_are_left_out(tmp_path: Path, save: Callable[..., Any], entries: list[str]) -> None:
    states = [weights(0), weights(1)]
    specs = [save(s | {name: torch.ones(4) for name in entries}, tmp_path / f"{i}") for i, s in enumerate(states)]
    candidates, messages = opened(specs)
    assert all(holds(candidate, state) for candidate, state in zip(candidates, states, strict=True))
    assert (
        len(messages) == 1
        and "optimizer" in messages[0]
        and repr(sorted(entries)[0]) in messages[0]
        and "and 1 more" in messages[0]
    )


def test_tensors_of_the_model_are_not_optimizer_entries() -> None:
    state = weights() | {"optimizer.weight": torch.ones(2)}
    candidates, messages = opened([state], known={"optimizer.weight"})
    assert holds(candidates[0], state) and not messages
    assert "optimizer_state.x" in refused([{"optimizer_state.x": torch.ones(2)}])


@pytest.mark.parametrize("name", ["optim", "optimizer", "net.optims", "opt", "muon"])
def test_a_module_may_be_called_like_an_optimizer(name: str) -> None:
    for other in (f"{name}.weight", "bias"):
        state = weights() | {other: torch.ones(2), f"{name}.layers.0.bias": torch.ones(2)}
        candidates, messages = opened([state])
        assert holds(candidates[0], state) and not messages


@pytest.mark.parametrize("name", ["opt", "lion", "soap", "adam", "x_optim", "optim", "state"])
def test_names_of_weights_inside_of_a_module_that_is_called_like_an_optimizer(name: str) -> None:
    others = ["encoder.a.weight", "encoder.b.bias", "c.weight", "mu.a.weight", "logvar.a.weight"]
    state = weights() | {f"{name}.{other}": torch.ones(2) for other in others}
    candidates, messages = opened([state])
    assert holds(candidates[0], state) and not messages


def test_weights_under_an_optimizer_key_are_kept() -> None:
    kept = {"layers.0.a": torch.ones(2), "opt.head.weight": torch.ones(2)} | weights()
    states = {f"opt.{kind}.{name}": torch.ones(2) for kind in ("mu", "nu", "m", "v", "exp_avg") for name in weights()}
    candidates, messages = opened([kept | states | {"opt.count": torch.ones(())}])
    assert holds(candidates[0], kept) and "'opt.count'" in messages[0]


# Other sets


def sets(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


@each_nested
@pytest.mark.parametrize("other", ["model_ema", "ema.state_dict", "callbacks.ema.module", "teacher"])
def test_other_set_is_reported_and_can_be_selected(tmp_path: Path, save: Callable[..., Any], other: str) -> None:
    raw, ema = weights(0), weights(1)
    content = {"model": raw, **sets(other, ema), "optimizer": {"exp_avg": weights(2)}, "epoch": torch.tensor(3)}
    spec = save(content, tmp_path / "x")
    candidates, messages = opened([spec])
    assert holds(candidates[0], raw)
    assert (
        len(messages) == 1
        and "under 'model'" in messages[0]
        and repr(other) in messages[0]
        and "`weights_key`" in messages[0]
    )
    for key in (other, other.partition(".")[0]) if other != "callbacks.ema.module" else (other,):
        candidates, messages = opened([spec], weights_key=key)
        assert holds(candidates[0], ema) and not messages
    message = refused([spec], weights_key="model_em")
    assert "weights_key 'model_em'" in message and "'model'" in message


def test_averages_without_buffers_and_in_lists_are_reported() -> None:
    raw = weights(0) | {"norm.count": torch.tensor(3), "norm.scale": torch.ones(3), "norm.bias": torch.ones(3)}
    less = {name: value for name, value in raw.items() if "count" not in name}
    for other in (less, less | {"n_averaged": torch.tensor(1)}, list(less.values())):
        _, messages = opened([{"state_dict": raw, "shadow": other}])
        assert len(messages) == 1 and "'shadow'" in messages[0]
    for other in ({"a.weight": torch.ones(1)}, {"loss": torch.ones(4, 3)}):
        assert not opened([{"state_dict": raw, "shadow": other}])[1]


@each_flat
def test_a_key_may_be_a_prefix_of_names(tmp_path: Path, save: Callable[..., Any]) -> None:
    raw, ema = weights(0), weights(1)
    flat = {f"raw.{name}": value for name, value in raw.items()} | {f"ema.module.{n}": v for n, v in ema.items()}
    spec = save(flat, tmp_path / "x")
    assert holds(opened([spec], weights_key="raw")[0][0], raw)
    assert holds(opened([spec], weights_key="ema.module")[0][0], ema)
    assert holds(opened([spec], weights_key="ema")[0][0], ema)


def test_the_state_of_an_optimizer_is_no_candidate() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    message = refused([optimizer.state_dict()])
    assert "state of an optimizer only" in message and "weights_key" not in message


def test_errors_name_keys_with_tensors() -> None:
    message = refused([{"net": weights(), "ema": weights(1), "optimizer": {"m": weights()}}])
    assert "holds no tensors" in message and "'ema', 'net'" in message and "`weights_key`" in message


@each_nested
@pytest.mark.parametrize(
    ("content", "stray", "key"),
    [
        ({"net": weights(), "loss": torch.tensor(0.3)}, "loss", "net"),
        ({"D": weights(), "G": weights(1), "rng_state": torch.zeros(9, dtype=torch.uint8)}, "rng_state", "D"),
        ({"model": {"net": weights(), "step": torch.tensor(3)}}, "step", "model.net"),
        ({"tree": {"a": {"weight": torch.ones(2)}, "b": {"bias": torch.ones(2)}}, "lr": torch.ones(1)}, "lr", None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensor_next_to_the_weights_is_ignored(
    tmp_path: Path, save: Callable[..., Any], content: dict[str, Any], stray: str, key: str | None
) -> None:
    spec = save(content, tmp_path / "x")
    message = refused([spec])
    assert f"holds no tensors but {stray!r} where" in message and "`weights_key`" in message, message
    if key:
        assert repr(key) in message and holds(opened([spec], weights_key=key)[0][0], weights())


def test_tensor_next_to_the_set_of_a_key_is_ignored() -> None:
    content = {"model": weights(), "ema": {"shadow": weights(1), "decay": torch.tensor(0.9)}}
    message = refused([content], weights_key="ema")
    assert "no tensors but 'decay'" in message and "'ema.shadow'" in message


def test_small_sets_next_to_the_weights_are_ignored() -> None:
    content = weights() | {"metrics": {"loss": torch.ones(1)}, "optimizer": {"state": [torch.ones(2)] * 9}}
    assert holds(opened([content])[0][0], weights())


# Quantized weights

BYTES = torch.zeros(6, 1, dtype=torch.uint8)
INTS = torch.zeros(4, 3, dtype=torch.int32)
SCALE = torch.ones(4)
FLOAT8 = torch.zeros(4, 3).to(torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("tensors", "expected_message"),
    [
        ({"a.weight": BYTES, "a.weight.absmax": SCALE, "a.weight.quant_map": torch.ones(16)}, "bitsandbytes, 4 bits"),
        ({"a.weight": BYTES, "a.weight.quant_state.bitsandbytes__nf4": BYTES[:, 0]}, "bitsandbytes, 4 bits"),
        ({"a.weight": INTS.to(torch.int8), "a.SCB": SCALE, "a.weight_format": BYTES[0]}, "bitsandbytes, 8 bits"),
        ({"a.qweight": INTS, "a.qzeros": INTS, "a.scales": SCALE, "a.g_idx": INTS[0]}, "GPTQ"),
        ({"a.qweight": INTS, "a.qzeros": INTS, "a.scales": SCALE}, "AWQ"),
        ({"a.weight": FLOAT8, "a.weight_scale_inv": SCALE}, "float8_e4m3fn codes"),
        ({"a.weight": FLOAT8, "a.weight_scale": SCALE, "a.input_scale": SCALE}, "float8_e4m3fn codes"),
        ({"a.weight": FLOAT8, "a.scale_weight": SCALE}, "float8_e4m3fn codes"),
        ({"a.weight_packed": INTS, "a.weight_scale": SCALE, "a.weight_shape": INTS[0]}, "compressed-tensors"),
        ({"a.weight": INTS.to(torch.int8), "a.weight_scale": SCALE, "a.weight_zero_point": INTS[0]}, "compressed"),
        ({"a.codes": INTS, "a.codebooks": torch.ones(2, 2), "a.scales": SCALE}, "AQLM"),
        ({"a.W_q": BYTES, "a.scale": SCALE, "a.zero": SCALE}, "HQQ"),
        ({"a.experts_blocks": BYTES, "a.experts_scales": BYTES}, "uint8 codes"),
        ({"a._weight_qdata": INTS.to(torch.int8), "a._weight_scale": SCALE}, "int8 codes"),
        ({"a.weight": INTS.to(torch.int8)}, "codes of type int8"),
        ({"a.int_weight": INTS.to(torch.int8), "a.delta": SCALE}, "codes of type int8"),
        ({"a.bitmask": BYTES, "a.compressed": torch.ones(6)}, "compressed-tensors, sparse"),
        ({"a.weight": INTS.to(torch.uint32), "a.scales": SCALE, "a.biases": SCALE}, "uint32 codes"),
        ({"a.qweight": INTS, "a.lookup_table": torch.ones(4, 2)}, "SqueezeLLM"),
        ({"a.B": INTS, "a.s": SCALE}, "Marlin"),
        ({"a.trellis": INTS.to(torch.int16), "a.suh": SCALE}, "EXL3"),
        ({"a.Qidxs": INTS.long(), "a.SU": SCALE}, "QuIP#"),
        ({"a.res_indices": INTS.to(torch.int16), "a.res_centroids.weight": torch.ones(2, 2)}, "VPTQ"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quantized_weights_are_refused(tmp_path: Path, tensors: Tensors, expected_message: str) -> None:
    spec = save_safetensors(weights() | tensors, tmp_path / "x")
    message = refused([spec])
    assert message.startswith(str(spec)) and expected_message in message and repr(next(iter(tensors))) in message
    assert "dequantize" in message
    assert holds(opened([spec], ignore=[r"^a\.[^w]|^a\.weight"])[0][0], {"b.bias": weights()["b.bias"]})


@pytest.mark.parametrize(
    ("tensors", "expected_message"),
    [
        ({"a.weight": torch.empty(0), "a.bias": torch.ones(3)}, "no elements are in 'a.weight'"),
        ({"a": torch.empty(0), "b": torch.empty(0)}, "no elements are in 'a', 'b'"),
        ({"cpu": BYTES, "cuda": BYTES}, "no floating point numbers"),
    ],
    ids=["placeholder", "all empty", "random state"],
)
def test_candidates_without_numbers_are_refused(tensors: Tensors, expected_message: str) -> None:
    assert expected_message in refused([tensors])


def test_integers_and_float8_that_are_not_codes(tmp_path: Path) -> None:
    state = weights() | {
        "position_ids": torch.arange(8)[None],
        "norm.num_batches_tracked": torch.tensor(3),
        "attn.relative_position_index": torch.zeros(3, 3, dtype=torch.int64),
        "attn.logit_scale": torch.ones(3),
        "c.weight": FLOAT8,
        "q.codes": torch.zeros(4, 3, dtype=torch.int64),
        "q.codebooks": torch.ones(2, 2),
        "row_blocks": INTS,
        "logit_scale": torch.tensor(1.0),
        "token_weight": torch.zeros(4, 3, dtype=torch.int64),
    }
    assert holds(opened([save_safetensors(state, tmp_path / "x")])[0][0], state)


@pytest.mark.parametrize(("section", "name"), [({"quant_method": "gptq"}, "gptq"), ({"bits": 4}, "of no name")])
def test_a_configuration_of_quantization_is_refused(tmp_path: Path, section: dict[str, Any], name: str) -> None:
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": section}))
    message = refused([tmp_path])
    assert f"quantization_config ({name})" in message and "config.json" in message
    (tmp_path / "config.json").write_text("[" * 100_000)  # damaged, so that nothing is known
    assert opened([tmp_path])[0]


# Tied weights


def tied(seed: int, *, embed: bool = True, head: bool = True) -> Tensors:
    state = weights(seed) | {"zero.weight": torch.zeros(5, 4), "one.weight": torch.zeros(5, 4)}
    table = torch.randn(7, 4, generator=torch.Generator().manual_seed(seed))
    return state | ({"embed.weight": table} if embed else {}) | ({"lm_head.weight": table.clone()} if head else {})


@pytest.mark.parametrize("ties", [None, [("embed.weight", "lm_head.weight")]])
def test_tied_tensor_is_read_under_its_stored_name(tmp_path: Path, ties: Any) -> None:
    stored = [{"head": False}, {}, {"embed": False}]
    specs = [save_safetensors(tied(i, **options), tmp_path / f"{i}") for i, options in enumerate(stored)]
    candidates, messages = opened(specs, ties=ties)
    assert all(holds(candidate, tied(i)) for i, candidate in enumerate(candidates))
    assert (
        len(messages) == 2
        and "'lm_head.weight' is not stored; it is tied to 'embed.weight'" in messages[0] + messages[1]
    )


def test_tensors_that_differ_in_other_candidates_are_not_tied() -> None:
    whole = tied(0)
    for change in ({"lm_head.weight": whole["lm_head.weight"] + 1}, {"embed.weight": torch.ones(7, 4)}):
        message = refused([whole | change, tied(1) | change, tied(2, head=False)])
        assert "'lm_head.weight' is missing" in message and "state dict 2" in message
    lacking = tied(2)
    del lacking["zero.weight"]  # equal to another tensor of zeros
    assert "'zero.weight' is missing" in refused([tied(0), tied(1), lacking])


def test_a_candidate_of_another_model_is_refused_without_reading() -> None:
    """Only a few missing names are compared with other tensors."""
    generator = torch.Generator().manual_seed(0)
    state = {f"layers.{i}.weight": torch.randn(4, 4, generator=generator) for i in range(2000)}
    half = dict(list(state.items())[:1000])
    started = time.monotonic()
    assert "missing" in refused([state, half])
    assert time.monotonic() - started < 20


def test_an_extra_tensor_can_be_ignored() -> None:
    extra = "layers.0.rotary_emb.inv_freq"
    states = [weights(0), weights(1) | {extra: torch.ones(3)}, weights(2)]
    message = refused(states)
    assert repr(extra) in message and "`ignore`" in message and "did you mean" not in message
    candidates, _ = opened(states, ignore=["inv_freq"])
    assert all(holds(candidate, weights(i)) for i, candidate in enumerate(candidates))
    assert "every tensor is ignored" in refused(states, ignore=["."])


# Memory


def test_state_dicts_of_one_memory_are_refused() -> None:
    model = torch.nn.Linear(3, 2)
    message = refused([model.state_dict(), model.state_dict()])
    assert "state dict 1" in message and "state dict 0" in message and "clone()" in message
    copies = [{name: value.clone() for name, value in model.state_dict().items()} for _ in range(2)]
    shared = [{**weights(i), "frozen": model.weight} for i in range(2)]
    assert not opened(copies)[1] and not opened(shared)[1]


# Adapters


@pytest.mark.parametrize(
    "name",
    [
        "base_model.q.lora_A.weight",
        "q.lora_B.default.weight",
        "te_q.lora_down.weight",
        "q.lora.up.weight",
        "q.hada_w1_a",
    ],
)
def test_factors_of_adapters_are_reported(name: str) -> None:
    states = [weights(i) | {name: torch.ones(2, 2)} for i in range(2)]
    messages = opened(states)[1]
    assert len(messages) == 1 and repr(name) in messages[0] and "not the average of their products" in messages[0]
    assert not opened(states[:1])[1] and not opened([weights(0), weights(1)])[1]
