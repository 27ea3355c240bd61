"""Plans of a Hugging Face model: activations, bytes of each store, and which store fits."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig
from typer.testing import CliRunner

import twa_scale
from twa_scale import ConfigError
from twa_scale.base.process_memory import free_memory, machine_memory
from twa_scale.cli import app
from twa_scale.config import RunConfig, validated
from twa_scale.config.kinds import STORES
from twa_scale.ranks import World
from twa_scale.run.engines import blocks_of
from twa_scale.run.tasks import build_task, stack
from twa_scale.store import store_bytes, update_bytes
from twa_scale.tools.bench import forecast, planned_work, timing
from twa_scale.tools.planning import choose_store, make_plan
from twa_scale.tools.planning.activations import activation_bytes

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def settings(root: Path, *, tied: bool = False, experts: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Write two candidates; return the settings of a run of them."""
    config: PreTrainedConfig = LlamaConfig(vocab_size=256, tie_word_embeddings=tied, **SIZES)
    if experts:
        config = MixtralConfig(vocab_size=256, num_local_experts=experts, num_key_value_heads=2, **SIZES)
    for step in range(2):
        torch.manual_seed(step)
        AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(root / f"step-{step}")
    (root / "tokens.bin").write_bytes(Path(__file__).read_bytes())
    tokens = {"train": str(root / "tokens.bin")}
    task: dict[str, Any] = {
        "name": "causal_lm",
        "model": str(root / "step-0"),
        "tokens": tokens,
        "token_dtype": "uint8",
    }
    task |= {"context": 16, "fractions": {"train": 1, "validation": 0, "test": 0}}
    return {"candidates": f"{root}/step-*", "task": task, "output": str(root / "out"), "steps": 1, "batch_size": 4}


@pytest.mark.parametrize(("tied", "context"), [(True, 16), (False, 16), (False, 400)])
def test_activations_are_estimated_on_meta_device(tmp_path: Path, tied: bool, context: int) -> None:
    # The model reads values before it chooses a mask.
    actual = settings(tmp_path, tied=tied)
    actual["task"]["context"] = context
    config = validated(RunConfig, actual)
    plan = make_plan(config, 2)
    assert plan.notes == ()

    sizes = really_kept(config, 2)
    real = sum(sizes) + 2 * max(sizes)
    assert 0.95 * real <= plan.step["activations"] <= 1.05 * real


def test_activations_of_a_classifier_are_estimated(bert: str, tmp_path: Path) -> None:
    """Its batches are shortened to their texts, which have no length on the meta device."""
    (tmp_path / "train.csv").write_text("text,label\n" + "a film,good\nno film,bad\n" * 4)
    options = {"name": "sequence_classification", "model": bert, "train": str(tmp_path / "train.csv"), "max_length": 16}
    config = validated(RunConfig, {"candidates": bert, "task": options, "output": "o", "steps": 1, "batch_size": 4})
    task = build_task(config.task)
    with torch.device("meta"):
        model = task.model()
    examples = task.dataset("train")
    activations, notes = activation_bytes(task, model, config, stack([examples[i] for i in range(4)]))
    assert notes == () and activations["activations"] > 0


def really_kept(config: RunConfig, examples: int, of_block: int | None = None) -> list[int]:
    """Return the bytes that autograd saves in a forward pass, or in one block of it."""
    task = build_task(config.task)
    model = task.model()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, outside = {}, of_block is not None

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not outside:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    def pass_border(*_: object) -> None:
        nonlocal outside
        outside = not outside

    if of_block is not None:
        block = blocks_of(model)[of_block]
        block.register_forward_pre_hook(pass_border)
        block.register_forward_hook(pass_border)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        task.loss(model, stack([task.dataset("train")[0]] * examples))
    return [tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights]


def test_recomputed_activations_are_not_kept_but_those_of_one_block(tmp_path: Path) -> None:
    actual = settings(tmp_path)
    actual["task"]["context"] = 64
    config = validated(RunConfig, actual)
    kept = make_plan(config, 1)
    actual["task"]["recompute_activations"] = True
    repeated = make_plan(validated(RunConfig, actual), 1)
    assert repeated.step["activations"] < 0.6 * kept.step["activations"]
    block = sum(really_kept(config, 4, of_block=1))
    assert 0.9 * block <= repeated.step["activations of the block computed again"] <= 1.1 * block
    assert kept.notes == repeated.notes == ()


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_bytes_of_every_store(tmp_path: Path, dtype: torch.dtype) -> None:
    config = validated(RunConfig, settings(tmp_path, dtype=dtype) | {"exclude": ["norm"]})
    plan = make_plan(config, 1)
    choices = choose_store(plan)
    assert [choice.store for choice in choices.stores] == list(STORES) and len(STORES) == 7
    for choice in choices.stores:
        model = build_task(config.task).model()
        twa = twa_scale.attach(model, config.candidates, config.model_copy(update={"store": choice.store}))
        assert twa.store_bytes == choice.nbytes, choice.store
        cost = twa.cost(1)
        assert choice.moved == {part: cost[part]["bytes"] for part in ("project", "combine")}, choice.store
        assert choice.peak - choice.nbytes == plan.peak - plan.memory["store (dense32)"]
        assert choice.page_cache == (2 * dtype.itemsize * plan.local_elements if choice.store == "mapped" else 0)
        twa.close()
    d, moved = plan.local_elements, {choice.store: choice.moved for choice in choices.stores}
    assert moved["dense16"] == {"project": 2 * 2 * d + 4 * d, "combine": 2 * 2 * d + 8 * d}
    read = 2 * dtype.itemsize * d  # and the center from host memory, each time
    assert moved["mapped"] == {"project": read + 8 * d, "combine": read + 8 * d}
    assert plan.local_elements == plan.trained_elements < sum(p.numel() for p in model.parameters())


@pytest.mark.filterwarnings("ignore:groups. expert:UserWarning")
def test_each_expert_has_rows_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An expert of the first projections has one and a half tiles of `packed1`, so that partial tiles count."""
    settled = settings(tmp_path, experts=3) | {"groups": "expert", "store": "packed1", "device": "cpu"}
    config = validated(RunConfig, settled)
    plan = make_plan(config, 1)
    twa = twa_scale.attach(build_task(config.task).model(), config.candidates, config)
    assert plan.num_groups == len(twa.layout.groups) == 2 * (3 + 1) + 2
    actual = {choice.store: choice.nbytes for choice in choose_store(plan).stores}
    assert actual["packed1"] == twa.store_bytes
    monkeypatch.setattr(timing, "_MIN_SECONDS", 0.0)
    work = planned_work(plan, config, [], None, World(0, 1, 0))
    measured, files = work.measure(None, None)
    project, *_, combine, _ = forecast(plan, measured, files).stores["packed1"]
    assert work.groups == plan.num_groups
    wanted = update_bytes(twa.store_bytes, plan.local_elements)
    assert {row.name: row.nbytes for row in measured.stores["packed1"][:2]} == wanted
    assert {row.name: row.nbytes for row in (project, combine)} == wanted


def test_reads_of_urls_are_larger_and_come_through_the_memory_of_their_library(tmp_path: Path) -> None:
    actual = settings(tmp_path) | {"device": "cpu", "read_chunk": 4096}
    fsspec.filesystem("memory").put(f"{tmp_path}/step-*", f"/{tmp_path.name}/", recursive=True)
    working_directory, there = (
        make_plan(validated(RunConfig, actual | {"candidates": f"{location}/step-*"}), 1)
        for location in (tmp_path, f"memory://{tmp_path.name}")
    )
    longest = 4 * 256 * SIZES["hidden_size"]
    assert there.attach["streaming"] - working_directory.attach["streaming"] == 2 * 2 * (longest - 4096) + 2 * longest
    assert there.bytes_read == working_directory.bytes_read


def test_bytes_of_corrections_of_rows(tmp_path: Path) -> None:
    """The bytes that a run holds after a step; in pods, those that it averages."""
    config = validated(RunConfig, settings(tmp_path) | {"groups": "tensor+row"})
    task = build_task(config.task)
    model = task.model()
    twa = twa_scale.attach(model, config.candidates, config)
    data = task.dataset("train")
    task.loss(model, stack([data[0]])).backward()
    twa.step()
    best = twa.copy_values()
    assert best.rows is not None
    stored, place = best.rows.nbytes, twa.state_dict(tmp_path, best=best)["rows"]["stored"]["directory"]
    content = (tmp_path / place / "rows.safetensors").read_bytes()
    plan = make_plan(config, 1)
    assert plan.memory["corrections of rows"] == 6 * stored
    assert len(content) == 8 + int.from_bytes(content[:8], "little") + 4 * stored, "y, two moments and the best"
    size = f"{4 * stored / 1e6:.1f} MB"
    wanted = f"each save of the run state writes {size} of rows; two such files are kept, and three exist during a save"
    assert plan.notes == (wanted,)
    assert not plan.wire_between_pods
    pods = make_plan(config.model_copy(update={"engine": "plain", "pods": 2}), 2)
    assert pods.wire_between_pods["corrections of rows, from every rank"] == stored
    rounded = make_plan(config.model_copy(update={"engine": "plain", "pods": 2, "row_exchange": "bfloat16"}), 2)
    assert rounded.wire_between_pods["corrections of rows, from every rank"] == stored / 2
    assert rounded.memory["corrections of rows"] == 7 * stored


def test_store_fits_exact_memory(tmp_path: Path) -> None:
    plan = make_plan(validated(RunConfig, settings(tmp_path) | {"store": "packed4"}), 1)
    needs = {choice.store: choice.peak + choice.page_cache for choice in choose_store(plan).stores}
    assert needs["packed4"] == plan.peak
    for need in needs.values():
        for memory in (need, need - 1):
            choices = choose_store(plan, memory)
            assert [choice.store for choice in choices.stores if choice.fits] == [
                s for s in STORES if needs[s] <= memory
            ]
            assert choices.most_exact == next((s for s in STORES if needs[s] <= memory), None)
    assert choose_store(plan, needs["dense32"]).verdict == "the most exact store that fits is dense32"
    assert choose_store(plan, needs["packed2"]).verdict.endswith(
        "does not fit; the most exact store that fits is packed2"
    )
    assert "no store fits" in choose_store(plan, 1).verdict


def test_mapped_needs_a_cpu(tmp_path: Path) -> None:
    plan = make_plan(validated(RunConfig, settings(tmp_path) | {"device": "cuda"}), 1)
    mapped = next(choice for choice in choose_store(plan, 10**15).stores if choice.store == "mapped")
    assert not mapped.fits and "CPU" in mapped.obstacle


def test_an_offloaded_store_counts_for_the_host(tmp_path: Path) -> None:
    data = settings(tmp_path) | {"device": "cuda", "store": "packed4"}
    resident, far, cpu = (
        make_plan(validated(RunConfig, data | more), 1)
        for more in ({}, {"store_device": "cpu"}, {"store_device": "cpu", "device": "cpu"})
    )
    store, buffers = resident.memory["store (packed4)"], far.memory["buffers of the store"]
    assert far.host == {"store (packed4)": store} | resident.attach and resident.host == cpu.host == {}
    assert set(cpu.memory) == set(resident.memory) and "store (packed4)" not in far.memory and 0 < buffers < store
    assert sum(far.memory.values()) - sum(resident.memory.values()) == pytest.approx(buffers - store, abs=1 << 24)
    choices = choose_store(far, far.peak)
    configured = choices.configured_choice
    assert configured.fits and configured.host == sum(far.host.values()) and configured.peak == far.peak
    assert not choose_store(far, far.peak - 1).configured_choice.fits
    assert choose_store(far, far.peak, configured.host).configured_choice.fits
    assert not choose_store(far, far.peak, configured.host - 1).configured_choice.fits
    for choice in choices.stores:
        assert choice.host - configured.host == choice.nbytes - configured.nbytes
    sizes = (machine_memory(),)  # elements: the center alone needs four times the memory
    large = replace(far, span_sizes=sizes, host={"store (packed4)": store_bytes("packed4", 2, sizes)})
    assert not any(choice.fits for choice in choose_store(large, 10**15).stores)


def test_exit_code_and_verdict_of_plan(tmp_path: Path) -> None:
    data = settings(tmp_path) | {"store": "packed8"}
    (tmp_path / "run.json").write_text(json.dumps(data))

    def said(*words: str) -> str:
        result = CliRunner().invoke(app, ["plan", str(tmp_path / "run.json"), *words], catch_exceptions=False)
        assert result.exit_code == 0
        return result.output

    actual = json.loads(said("--memory", "1MB", "--json"))
    assert actual["stores"]["memory"] == 10**6 and actual["stores"]["assumed"] == ""
    assert actual["stores"]["most_exact"] is None and not any(row["fits"] for row in actual["stores"]["stores"])
    assert "packed8, as configured, does not fit; no store fits" in said("--memory", "1MB")
    assert "most exact store that fits is dense32" in said("--memory", "1TB")
    offloaded = ["--memory", "1TB", "store_device=cpu", "device=cuda"]
    assert "does not fit; no store fits" in said(*offloaded, "--host-memory", "10kB")
    assert "most exact store that fits is dense32" in said(*offloaded, "--host-memory", "1TB")
    shared = json.loads(said("--ranks", "2", "--json", "device=cpu"))["stores"]
    assert shared["memory"] == machine_memory() // 2 and "all 2 ranks share" in shared["assumed"]
    with pytest.raises(ConfigError, match=r"--memory.*'plenty'"):
        said("--memory", "plenty")


@pytest.mark.parametrize(
    ("line", "files", "limit"),
    [
        ("0::/job/step", {"job/memory.max": "5000", "job/step/memory.max": "max"}, 5000),
        ("0::/job", {"memory.max": "7000", "job/memory.max": "9000"}, 7000),
        ("4:cpu,memory:/job", {"memory/job/memory.limit_in_bytes": "6000", "job/memory.max": "1"}, 6000),
        ("3:cpuset:/job", {"job/memory.max": "1", "memory/job/memory.limit_in_bytes": "1"}, None),
    ],
)
def test_a_cgroup_limits_the_memory_of_a_machine(
    tmp_path: Path, line: str, files: dict[str, str], limit: int | None
) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(line + "\n")
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    assert machine_memory(tmp_path) == (limit or machine_memory(tmp_path / "nowhere"))
    assert 0 < free_memory() <= machine_memory()


AVERAGES = {
    "ema": {"decays": [0.9, 0.99], "bema": True, "use_buffers": True},
    "window": {"every": 1, "keep": 5, "store": "packed2"},
}


def test_running_averages_are_planned_before_there_are_candidates(tmp_path: Path) -> None:
    """The bytes that averages of the same model use, and half of them on each of two ranks."""
    from tests.commands.small_runs import TEXT

    config = tmp_path / "run.json"
    config.write_text(
        json.dumps({"candidates": "none/*", "task": TEXT, "output": "out", "steps": 1, "engine": "fsdp2"})
    )

    def planned(*words: str) -> Any:
        messages = CliRunner().invoke(app, ["plan", str(config), "--averages", json.dumps(AVERAGES), "--json", *words])
        assert messages.exit_code == 0, messages.exception
        return json.loads(messages.output)

    single = planned("engine=plain")
    model = build_task(validated(RunConfig, json.loads(config.read_text())).task).model()
    averages = twa_scale.RunningAverages(model, **AVERAGES)  # type: ignore[arg-type]
    averages.step()
    *stored, copy = single["averages"].values()
    assert sum(stored) == averages.nbytes and single["sum"] == sum(stored) + copy
    with averages.weights("mean"):
        assert single["sum"] == averages.nbytes
    assert 0.5 * single["sum"] <= planned("--ranks", "2")["sum"] < 0.52 * single["sum"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{emma: 0.9}", "unknown key 'emma'.*'ema'"),
        ("{}", "--averages: give ema"),
        ("3", "--averages: 3; give settings"),
        ("{ema: [", "--averages: is not valid YAML"),
        ("{window: {every: 1}}", "keep"),
    ],
)
def test_invalid_averages_raise(tmp_path: Path, text: str, words: str) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"candidates": "none/*", "task": {"name": "causal_lm"}, "output": "out", "steps": 1}))
    messages = CliRunner().invoke(app, ["plan", str(config), "--averages", text])
    assert isinstance(messages.exception, ConfigError) and re.search(words, str(messages.exception)), messages.exception
