"""PEFT adapters on several ranks: DDP and FSDP2 train like a plain model, and read only the adapters."""

import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy
from torch.nn.parallel import DistributedDataParallel

import twa_scale
from tests import adapters, zero
from tests.pool import Pool
from twa_scale import TwaError
from twa_scale.candidates import Wanted
from twa_scale.config import RunConfig, validated
from twa_scale.engines import choose_engine
from twa_scale.merge import average_fixed
from twa_scale.ranks import World
from twa_scale.run.engines import run_engine
from twa_scale.tools.inspection import inspect

BATCHES = torch.stack([adapters.IDS, adapters.IDS.flip(1)])
MIXED: list[dict[str, Any]] = [
    {"modules_to_save": ["ln_f"], "r": r, "lora_alpha": a} for r, a in ((4, 8), (3, 2), (2, 5))
]


def is_trained_layer(module: nn.Module) -> bool:
    """Tell FSDP1 which modules to wrap, as PEFT recommends for use_orig_params=False."""
    weight = getattr(module, "weight", None)
    return not list(module.children()) and isinstance(weight, nn.Parameter) and weight.requires_grad


def wrapped(model: Any, engine: str) -> Any:
    if engine == "zero3":
        return zero.wrap(model, engine)
    if engine == "fsdp1":
        policy = partial(lambda_auto_wrap_policy, lambda_fn=is_trained_layer)
        return FullyShardedDataParallel(
            model, auto_wrap_policy=policy, use_orig_params=False, device_id=torch.device("cpu")
        )
    if engine == "fsdp2":
        for block in model.get_base_model().transformer.h:
            fully_shard(block)
        return fully_shard(model)
    return DistributedDataParallel(model) if engine == "ddp" else model


def trained(engine: str, start: str, paths: list[str], space: str, out: str) -> tuple[Tensor, int]:
    """Take two steps on this rank's batches. Return coefficients and bytes read."""
    torch.manual_seed(0)
    model = wrapped(adapters.load(start, trainable=True), engine)
    config = {"space": space, "groups": "block", "optimizer": {"name": "sgd", "lr": 10.0}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twa = twa_scale.attach(model, paths, config)
    model.eval()
    batches = BATCHES if engine == "plain" else BATCHES[torch.distributed.get_rank()][None]
    for _ in range(2):
        for batch in batches:
            loss = model(batch, labels=batch).loss / len(batches)
            model.backward(loss) if engine == "zero3" else loss.backward()
        twa.step()
    twa.export(out)
    result = twa.coefficients.clone(), twa.bytes_read
    twa.close()
    return result


@pytest.mark.parametrize("space", ["factors", "product"])
def test_ranks_train_what_one_process_trains(space: str, ranks: Pool, tmp_path: Path) -> None:
    settings = MIXED if space == "product" else MIXED[:1] * 3
    paths = [adapters.save(adapters.adapted(seed=i, **s), tmp_path / f"step-{i}") for i, s in enumerate(settings)]
    start = paths[-1]
    if space == "product":
        start = str(tmp_path / "start")
        average_fixed(paths, start, space="product")
    nbytes = sum(t.nbytes for path in paths for t in load_file(f"{path}/adapter_model.safetensors").values())
    plain, read = trained("plain", start, paths, space, str(tmp_path / "plain"))
    assert read == nbytes
    expected = adapters.logits(adapters.load(tmp_path / "plain"))
    assert float((plain - 1 / 3).abs().max()) > 1e-3  # the coefficients have changed
    for engine in ("fsdp2", "ddp" if space == "product" else "zero3"):
        out = str(tmp_path / engine)
        (first, read_first), (second, read_second) = ranks(
            trained, 2, engine=engine, start=start, paths=paths, space=space, out=out, timeout=120
        )
        assert torch.equal(first, second)
        assert read_first + read_second == nbytes and read_first < nbytes
        torch.testing.assert_close(first, plain, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapters.logits(adapters.load(out)), expected, rtol=1e-4, atol=1e-4)


def test_flat_parameters_train_what_one_process_trains(ranks: Pool, tmp_path: Path) -> None:
    settings = MIXED[0] | {"target_modules": ["c_attn"]}
    paths = [adapters.save(adapters.adapted(seed=i, **settings), tmp_path / f"step-{i}") for i in range(3)]
    outs = [str(tmp_path / name) for name in ("plain", "fsdp1")]
    plain, _ = trained("plain", paths[-1], paths, "factors", outs[0])
    actual, _ = ranks(trained, 2, engine="fsdp1", start=paths[-1], paths=paths, space="factors", out=outs[1])
    torch.testing.assert_close(actual[0], plain, rtol=1e-4, atol=1e-5)
    wanted, loaded = (adapters.logits(adapters.load(out)) for out in outs)
    torch.testing.assert_close(loaded, wanted, rtol=1e-4, atol=1e-4)


def written(engine: str, start: str, out: Path) -> None:
    """Write a running average, a snapshot of a window, and a snapshot of an adapter."""
    model = wrapped(adapters.load(start, trainable=True), engine)
    averages = twa_scale.RunningAverages(model, window={"every": 1, "keep": 2, "store": "dense32"})
    inner = choose_engine(model)
    for _ in range(2):
        with torch.no_grad():
            for span in inner.spans():
                if inner.parameters[span.name].trainable:
                    inner.live(span).add_(1)
        if engine == "zero3":
            model.global_steps += 1
        averages.step()
    averages.export(out / "mean", "mean")
    averages.save(out)
    twa_scale.Snapshots(out / "live", every_n_steps=2).step(model, 2)


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2", "zero3"])
def test_ranks_write_adapters_of_a_training(engine: str, ranks: Pool, tmp_path: Path) -> None:
    modules = {"target_modules": ["c_attn"]} if engine == "fsdp1" else {}  # embeddings cannot be wrapped separately
    start = adapters.save(adapters.adapted(**(MIXED[0] | modules)), tmp_path / "start")
    ranks(written, 2, engine=engine, start=start, out=tmp_path / "out", timeout=120)
    wanted = load_file(f"{start}/adapter_model.safetensors")
    added = {"mean": 1.5, "step-00000001": 1.0, "step-00000002": 2.0, "live/step-00000002": 2.0}
    for path, by in added.items():
        actual = load_file(tmp_path / "out" / path / "adapter_model.safetensors")
        assert actual.keys() == wanted.keys()
        for name, value in actual.items():
            torch.testing.assert_close(value, wanted[name] + by)
        adapters.load(tmp_path / "out" / path)


def written_prompts(engine: str, out: Path) -> list[str]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(adapters.base(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        path = twa_scale.Snapshots(out, every_n_steps=1).save(wrapped(model, engine), 1)
    return sorted(load_file(path / "model.safetensors"))


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_ranks_write_learned_prompts_with_the_base_model(engine: str, ranks: Pool, tmp_path: Path) -> None:
    """PEFT runs the encoder of the prompts to save them, which gathers weights."""
    (names, _) = ranks(written_prompts, 2, engine=engine, out=tmp_path / "out")
    assert {"prompt_encoder.default.embedding.weight", "base_model.transformer.wpe.weight"} <= set(names)


def fail_on_one(out: Path) -> str:
    """Write a snapshot where the second rank has no temporary directory."""
    model = wrapped(adapters.adapted(), "fsdp2")
    if torch.distributed.get_rank() == 1:
        tempfile.tempdir = str(out / "missing")
    try:
        twa_scale.Snapshots(out, every_n_steps=1).save(model, 1)
    except (TwaError, OSError) as error:
        return str(error)
    finally:
        tempfile.tempdir = None
    return ""


def test_only_the_first_rank_makes_the_configuration_of_an_adapter(ranks: Pool, tmp_path: Path) -> None:
    assert ranks(fail_on_one, 2, out=tmp_path) == ["", ""]


def merged(paths: list[str], out: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        average_fixed(paths, out, [0.5, 0.75, -0.25], space="product", rank=3)


def compared(paths: list[str]) -> tuple[list[float], list[float]]:
    actual = inspect(paths, wanted=Wanted(space="product"))
    return actual.norms, actual.delta_norms


def test_ranks_share_the_modules(ranks: Pool, tmp_path: Path) -> None:
    paths = [adapters.save(adapters.adapted(seed=i, **s), tmp_path / f"step-{i}") for i, s in enumerate(MIXED)]
    merged(paths, str(tmp_path / "alone"))
    ranks(merged, 2, paths=paths, out=str(tmp_path / "shared"))
    single, shared = (load_file(tmp_path / f"{name}/adapter_model.safetensors") for name in ("alone", "shared"))
    assert all(torch.equal(tensor, shared[name]) for name, tensor in single.items())
    expected = compared(paths)
    for actual in ranks(compared, 2, paths=paths):
        assert [pytest.approx(values, rel=1e-12) for values in expected] == list(actual)


class AdapterTask:
    """A task whose model is the base model with an adapter."""

    def __init__(self, start: str) -> None:
        self.start = start

    def model(self) -> Any:
        return adapters.load(self.start, trainable=True)


def built(engine: str, start: str, paths: list[str]) -> Tensor:
    """Return the output of the model of a run with the last of its candidates."""
    seen = paths if torch.distributed.get_rank() == 0 else ["elsewhere/*"]  # rank 0 searches for all ranks
    settings = {
        "candidates": seen,
        "task": {"name": "a:b"},
        "output": "out",
        "engine": engine,
        "steps": 1,
        "batch_size": 2,
    }
    config = validated(RunConfig, settings)
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size(), 0)
    if engine == "zero3":
        zero.forget_groups()
    model = run_engine(config, world).build(AdapterTask(start), world, torch.device("cpu"))  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twa = twa_scale.attach(model, paths, config)
    with twa.weights("last"):
        actual = adapters.logits(model)
    twa.close()
    return actual


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_runs_have_the_weights_of_the_base_model(engine: str, ranks: Pool, tmp_path: Path) -> None:
    """Runs build models without values, which candidates fill in. Adapters need those of the base model."""
    paths = [adapters.save(adapters.adapted(seed=i), tmp_path / f"step-{i}") for i in range(2)]
    expected = adapters.logits(adapters.load(paths[-1]))
    for actual in ranks(built, 2, engine=engine, start=paths[0], paths=paths, timeout=120):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
