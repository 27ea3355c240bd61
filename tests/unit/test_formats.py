"""Outputs in the formats pt, dcp and same: torch reads them, and `same` changes only the values of the weights."""

import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import fully_shard

import twa_scale
from tests.limits import files_up_to
from tests.old_torch import ALONE
from tests.pool import Pool
from tests.ranks.test_stored_form import moe
from tests.slices import opened, read
from tests.states import save_run
from twa_scale.base.notices import TwaWarning
from twa_scale.candidates import open_candidates
from twa_scale.candidates.carry_over import CarriedFiles
from twa_scale.errors import CandidateError, ConfigError, OutputError, TwaError
from twa_scale.merge import Combination, average_fixed, export_run, merge
from twa_scale.output.formats import dcp as dcp_format
from twa_scale.output.formats import torch_api
from twa_scale.output.formats.choose import output_format
from twa_scale.output.options import OutputOptions
from twa_scale.ranks import Group

State = dict[str, torch.Tensor]
SAME = OutputOptions(form="same")


def state(value: float) -> State:
    """Return tensors of several types and layouts."""
    generator = torch.Generator().manual_seed(int(value))
    return {
        "rows": torch.randn(9, 4, generator=generator),
        "last": torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "scalar": torch.randn((), generator=generator, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "count": torch.tensor(int(value)),
    }


def optimizer(value: float) -> dict[str, Any]:
    return {"step": torch.tensor(value), "m": torch.full((3,), value)}


def write_ckpt(path: Path, value: float) -> None:
    torch.save({"epoch": value, "state_dict": state(value), "optimizer_states": [optimizer(value)], "rng": b"1"}, path)


def write_dcp(path: Path, value: float) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a process without a group
        content = {"model": state(value), "optim": optimizer(value), "step": int(value)}
        dcp.save(content, storage_writer=dcp.FileSystemWriter(path), **ALONE)


def write_hf(path: Path, value: float) -> None:
    path.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in state(value).items()}, path / "model.safetensors")


WRITE: dict[str, Callable[[Path, float], None]] = {"ckpt": write_ckpt, "dcp": write_dcp, "hf": write_hf}


@pytest.fixture
def candidates(working_directory: Path, request: pytest.FixtureRequest) -> list[str]:
    names = [f"step-{step}{'.ckpt' if request.param == 'ckpt' else ''}" for step in (2, 10)]
    for value, name in zip((1.0, 3.0), names, strict=True):
        WRITE[request.param](working_directory / name, value)
    return names


def load_dcp(path: Path, into: dict[str, Any]) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(into, storage_reader=dcp.FileSystemReader(path), **ALONE)
    return into


def zeros() -> State:
    return {name: torch.zeros_like(tensor) for name, tensor in state(0).items()}


def expected(candidates: list[str]) -> State:
    average_fixed(candidates, "expected", "ema:0.9")
    return load_file("expected/model.safetensors")


def assert_equal(found: State, wanted: State) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def work(candidates: list[str], out: str, form: str, **options: Any) -> None:
    average_fixed(candidates, out, "ema:0.9", format=form, **options)


def average_on_ranks(
    ranks: Pool,
    size: int,
    directory: Path,
    candidates: list[str],
    form: str,
    function: Callable[..., None] = work,
) -> None:
    paths = [str(directory / name) for name in candidates]
    ranks(function, size, candidates=paths, out=str(directory / "out"), form=form)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("candidates", "file", "keys"),
    [
        ("ckpt", "step-10.ckpt", ["state_dict"]),
        ("dcp", "pytorch_model.bin", ["model"]),
        ("hf", "pytorch_model.bin", []),
    ],
    indirect=["candidates"],
)
def test_torch_files(
    ranks: Pool, working_directory: Path, candidates: list[str], file: str, keys: list[str], size: int
) -> None:
    average_on_ranks(ranks, size, working_directory, candidates, "pt")
    actual: Any = torch.load(working_directory / "out" / file, weights_only=True)
    for key in keys:
        assert list(actual) == [key]
        actual = actual[key]
    assert_equal(actual, expected(candidates))
    assert zipfile.ZipFile(working_directory / "out" / file).testzip() is None  # the CRC of every tensor
    assert read(opened(working_directory / "out" / file), "count", 0, 1) == 3


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize(
    ("candidates", "key"), [("ckpt", "state_dict."), ("dcp", "model."), ("hf", "")], indirect=["candidates"]
)
def test_dcp(ranks: Pool, working_directory: Path, candidates: list[str], key: str, size: int) -> None:
    average_on_ranks(ranks, size, working_directory, candidates, "dcp", in_small_chunks)
    assert len(list((working_directory / "out").glob("*.distcp"))) > 2
    actual = load_dcp(working_directory / "out", {key + name: tensor for name, tensor in zeros().items()})
    assert_equal({name.removeprefix(key): tensor for name, tensor in actual.items()}, expected(candidates))
    assert read(opened(working_directory / "out"), "count", 0, 1) == 3


def in_small_chunks(**options: Any) -> None:
    before, dcp_format._CHUNK_BYTES = dcp_format._CHUNK_BYTES, 40
    try:
        work(**options, max_shard_size="100B")
    finally:
        dcp_format._CHUNK_BYTES = before


def members(path: str) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("candidates", ["ckpt"], indirect=True)
def test_format_same_of_a_torch_file(ranks: Pool, working_directory: Path, candidates: list[str], size: int) -> None:
    average_on_ranks(ranks, size, working_directory, candidates, "same")
    content: Any = torch.load("out/step-10.ckpt", weights_only=True)
    assert_equal(content["state_dict"], expected(candidates))
    assert content["state_dict"]["last"].stride() == state(3)["last"].stride()
    assert content["epoch"] == 3 and torch.equal(content["optimizer_states"][0]["m"], torch.full((3,), 3.0))
    before, after = members("step-10.ckpt"), members("out/step-10.ckpt")  # checks every CRC
    assert before.keys() == after.keys() and before["data.pkl"] == after["data.pkl"]
    assert sum(before[name] != after[name] for name in before) == 4  # rows, last, half, scalar


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("candidates", ["dcp"], indirect=True)
def test_format_same_of_dcp(ranks: Pool, working_directory: Path, candidates: list[str], size: int) -> None:
    Path("step-10/meta.pt").write_bytes(b"as it is")
    average_on_ranks(ranks, size, working_directory, candidates, "same")
    actual = load_dcp(working_directory / "out", {"model": zeros(), "optim": optimizer(0), "step": 0})
    assert_equal(actual["model"], expected(candidates))
    assert actual["step"] == 3 and torch.equal(actual["optim"]["m"], torch.full((3,), 3.0))
    assert Path("out/.metadata").read_bytes() == Path("step-10/.metadata").read_bytes()
    assert Path("out/meta.pt").read_bytes() == b"as it is"


def save_sharded(out: str, value: float) -> None:
    torch.manual_seed(int(value))
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    dcp.save({"model": model.state_dict(), "step": value}, checkpoint_id=out)


def export_sharded(candidates: list[str], out: str) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    fully_shard(model)
    twa = twa_scale.attach(model, candidates)
    for form in ("dcp", "pt", "same"):
        twa.export(f"{out}-{form}", format=form)
    loaded: dict[str, Any] = {"model": {name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}}
    for form in ("dcp", "same"):
        dcp.load(loaded, checkpoint_id=f"{out}-{form}")
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded["model"][name].to_local(), tensor.to_local())


def test_live_ranks_write_every_format(ranks: Pool, working_directory: Path) -> None:
    paths = [str(working_directory / f"step-{i}") for i in range(2)]
    for value, path in enumerate(paths):
        ranks(save_sharded, 3, out=path, value=float(value))
    ranks(export_sharded, 2, candidates=paths, out=str(working_directory / "out"))
    average_fixed(paths, "merged")
    wanted = load_file("merged/model.safetensors")
    assert_equal(torch.load("out-pt/pytorch_model.bin", weights_only=True)["model"], wanted)
    for form in ("dcp", "same"):
        into: dict[str, Any] = {"model": {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}}
        into |= {"step": 0.0} if form == "same" else {}
        actual = load_dcp(working_directory / f"out-{form}", into)
        assert_equal(actual["model"], wanted)
    assert actual["step"] == 1


def test_experts_in_separate_tensors_of_files(working_directory: Path) -> None:
    paths = [working_directory / f"step-{i}" for i in range(2)]
    for i, path in enumerate(paths):
        moe(i).save_pretrained(path)
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    twa = twa_scale.attach(moe(9), paths)
    for form in ("hf", "pt", "dcp", "same"):
        twa.export(f"live-{form}", format=form)
    save_run(twa, paths, working_directory / "run")
    for form in ("pt", "same"):
        export_run(working_directory / "run", f"exact-{form}", format=form)
    wanted = load_file("live-hf/model.safetensors")
    assert any(".experts.0." in name for name in wanted)
    for name in ("live-pt", "live-same", "exact-pt", "exact-same"):
        assert_equal(torch.load(f"{name}/pytorch_model.bin"), wanted)
    assert_equal(
        load_dcp(working_directory / "live-dcp", {name: torch.zeros_like(value) for name, value in wanted.items()}),
        wanted,
    )


def test_an_earlier_output_is_replaced_and_nothing_else(working_directory: Path) -> None:
    for value, name in ((1.0, "a.pt"), (3.0, "b.pt")):
        torch.save(state(value), name)
    for form in ("pt", "dcp", "same", "hf"):
        average_fixed(["a.pt", "b.pt"], "out", format=form, overwrite=True)
    average_fixed(["a.pt", "b.pt"], "out", format="same", overwrite=True)
    torch.save(state(1.0), "out/b.pt")  # by another program
    with pytest.raises(OutputError, match="no weights that twa_scale has written"):
        average_fixed(["a.pt", "b.pt"], "out", format="pt", overwrite=True)
    assert_equal(torch.load("out/b.pt"), state(1.0))


def test_tied_tensors_are_written_once(working_directory: Path) -> None:
    for value in (1.0, 3.0):
        head = torch.full((3, 2), value)
        torch.save({"embed": head, "head": head}, f"{value}.pt")
    average_fixed(["*.pt"], "out", format="same")
    actual = torch.load("out/3.0.pt")
    assert (
        torch.equal(actual["embed"], torch.full((3, 2), 2.0))
        and actual["head"].data_ptr() == actual["embed"].data_ptr()
    )
    torch.save({"embed": head, "head": head + 1}, "1.0.pt")
    with pytest.raises(
        CandidateError, match="'embed' and 'head' hold different values, but are one tensor in the files"
    ):
        average_fixed(["*.pt"], "again", format="same")
    assert not Path("again").exists()


def test_views_of_one_storage(working_directory: Path) -> None:
    for value in (1.0, 3.0):
        flat = torch.full((10,), value)
        flat[8:] = 7
        torch.save({"model": {"a": flat[:4], "b": flat[4:8]}, "all": flat, "rest": flat[8:]}, f"{value}.pt")
    with pytest.warns(TwaWarning, match="pt: 'all' are the same numbers in the file as weights"):
        average_fixed(["*.pt"], "out", format="same")
    actual = torch.load("out/3.0.pt")
    assert actual["all"].tolist() == [2.0] * 8 + [7, 7] and actual["model"]["b"].tolist() == [2.0] * 4


def in_part(flat: torch.Tensor) -> State:
    return {"a": flat[:4], "b": flat[2:]}


def in_other_strides(flat: torch.Tensor) -> State:
    return {"a": flat.view(2, 3), "b": flat.view(2, 3).t()}


@pytest.mark.parametrize("views", [in_part, in_other_strides])
def test_weights_that_overlap(working_directory: Path, views: Callable[[torch.Tensor], State]) -> None:
    for value in (1.0, 3.0):
        torch.save(views(torch.full((6,), value)), f"{value}.pt")
    with pytest.raises(OutputError, match="overlap in part, or in other strides"):
        average_fixed(["*.pt"], "out", format="same")


def test_tied_tensors_that_are_not_row_major(working_directory: Path) -> None:
    for value in (1.0, 3.0):
        head = torch.full((2, 3), value).t()
        torch.save({"embed": head, "head": head}, f"{value}.pt")
    average_fixed(["*.pt"], "out", format="same")
    assert torch.equal(torch.load("out/3.0.pt")["head"], torch.full((3, 2), 2.0))


@pytest.mark.parametrize("candidates", ["ckpt", "dcp"], indirect=True)
def test_ignored_tensors_keep_their_values(candidates: list[str]) -> None:
    average_fixed(candidates, "out", ignore=["rows"], format="same")
    out = opened(Path("out") / candidates[-1] if candidates[-1].endswith("ckpt") else Path("out"))
    assert torch.equal(read(out, "rows", 0, 36), state(3)["rows"].flatten())
    mean = (state(1)["scalar"] + state(3)["scalar"]) / 2
    torch.testing.assert_close(read(out, "scalar", 0, 1)[0], mean)


def test_sharded_torch_files(working_directory: Path) -> None:
    for value in (1.0, 3.0):
        folder = working_directory / f"step-{value:.0f}"
        folder.mkdir()
        torch.save({"a": torch.full((3,), value)}, folder / "pytorch_model-00001-of-00002.bin")
        torch.save({"b": torch.full((4,), value)}, folder / "pytorch_model-00002-of-00002.bin")
        (folder / "pytorch_model.bin.index.json").write_text(
            '{"weight_map": {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}}'
        )
        torch.save({"lr": value}, folder / "scheduler.pt")
    average_fixed(["step-*"], "out", format="same")
    assert torch.load("out/scheduler.pt") == {"lr": 3.0}
    assert read(opened(Path("out")), "b", 0, 4).tolist() == [2.0] * 4


def test_files_next_to_the_weights(working_directory: Path) -> None:
    for value in (1.0, 3.0):
        folder = working_directory / f"checkpoint-{value:.0f}"
        write_hf(folder, value)
        (folder / "config.json").write_text('{"dtype": "float32"}')
        (folder / "pytorch_model.bin").write_bytes(b"old")
        (folder / "model.py").write_text("")
        (folder / "loop").symlink_to("loop")
        for name in ("optimizer_0/.metadata", "checkpoint-2/model.safetensors", "runs/events", "old/twa_scale.json"):
            (folder / name).parent.mkdir()
            (folder / name).write_text(f"{value}")
        (folder / "trainer_state.json").write_text("{}")
        (folder / "outside").symlink_to("/etc/hostname")
    with pytest.warns(TwaWarning) as warned:
        average_fixed(["checkpoint-*"], "out", format="same")
    actual = {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()}
    own = {"model.safetensors", "twa_scale.json", "README.md"}
    assert actual == {*own, "config.json", "optimizer_0/.metadata", "trainer_state.json"}
    assert Path("out/optimizer_0/.metadata").read_text() == "3.0"
    messages = " ".join(str(warning.message) for warning in warned)
    assert "'checkpoint-2' (a separate checkpoint)" in messages and "'model.py' (code" in messages
    assert (
        "'pytorch_model.bin' (the weights before the average, in other files)" in messages
        and "'outside' (a link" in messages
    )
    average_fixed(["checkpoint-*"], "out", format="same", overwrite=True)
    Path("out/trainer_state.json").write_text("of another training")
    with pytest.raises(OutputError, match="out: holds 'trainer_state"):
        average_fixed(["checkpoint-*"], "out", format="same", overwrite=True)


def test_tensor_with_another_name_in_files(working_directory: Path) -> None:
    for value in (1.0, 3.0):
        torch.save({"ema.w": torch.full((2,), value)}, f"{value}-00001-of-00002.bin")
        torch.save({"w": torch.zeros(2)}, f"{value}-00002-of-00002.bin")
        Path(f"{value}.bin.index.json").write_text(
            f'{{"weight_map": {{"ema.w": "{value}-00001-of-00002.bin", "w": "{value}-00002-of-00002.bin"}}}}'
        )
    average_fixed(["*.index.json"], "hf", weights_key="ema")
    assert load_file(next(Path("hf").glob("*.safetensors")))["w"].tolist() == [2.0, 2.0]
    average_fixed(["*.index.json"], "out", weights_key="ema", format="same")
    assert torch.load("out/3.0-00001-of-00002.bin")["ema.w"].tolist() == [2.0, 2.0]
    assert torch.load("out/3.0-00002-of-00002.bin")["w"].tolist() == [0.0, 0.0]


def test_one_tensor_in_the_files_and_two_in_the_model(working_directory: Path) -> None:
    tensor = torch.ones(2, 2)
    for name in ("a.pt", "b.pt"):
        torch.save({"0.weight": tensor, "1.weight": tensor}, name)
    twa = twa_scale.attach(nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)), ["a.pt", "b.pt"])
    with pytest.raises(OutputError, match=r"'0.weight' and '1.weight' are one tensor in the files"):
        twa.export("out", format="same")
    twa.export("out", format="pt")
    assert torch.equal(torch.load("out/b.pt")["1.weight"], tensor)


def big(value: float) -> State:
    return {"w": torch.full((1 << 18,), value)}


def limited(form: str) -> None:
    with files_up_to(1 << 16):
        average_fixed(["a.pt", "b.pt"], "out", format=form)


@pytest.mark.parametrize("form", ["pt", "dcp", "same"])
def test_full_disk_leaves_no_files(working_directory: Path, form: str) -> None:
    for value, name in ((1.0, "a.pt"), (3.0, "b.pt")):
        torch.save(big(value), name)
    with pytest.raises(OutputError, match="ulimit -f"):
        limited(form)
    assert sorted(path.name for path in working_directory.iterdir()) == ["a.pt", "b.pt"]


@pytest.mark.parametrize(("form", "name"), [("pt", "skip_data"), ("dcp", "_StorageInfo")])
def test_torch_without_required_attributes(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch, form: str, name: str
) -> None:
    torch.save(state(1.0), "a.pt")
    monkeypatch.setitem(torch_api._PLACES, name, "torch.nothing")
    with pytest.raises(OutputError, match=f"need torch.nothing.{name}, which torch .* does not have; use torch"):
        average_fixed(["a.pt"], "out", format=form)
    average_fixed(["a.pt"], "out", format="same")


def complex_state(path: Path) -> None:
    torch.save({"w": torch.ones(2, dtype=torch.complex64)}, path)


def expanded_state(path: Path) -> None:
    torch.save({"w": torch.ones(1, 3).expand(2, 3)}, path)


def master_weights(path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "optimizer": {"fp32_from_fp16_groups": [torch.ones(2)]}}, path)


@pytest.mark.parametrize(
    ("write", "form", "message"),
    [
        (complex_state, "pt", "only --format hf .* writes complex tensors"),
        (complex_state, "same", "only --format hf .* writes complex tensors"),
        (expanded_state, "same", "so that elements share their place in the file"),
        (master_weights, "same", "the optimizer's copy of weights, from which training would resume"),
        (master_weights, "safetensors", "'safetensors' is not one of same, hf, dcp, pt"),
    ],
)
def test_formats_that_cannot_be_written_are_refused(
    working_directory: Path, write: Callable[[Path], None], form: str, message: str
) -> None:
    write(working_directory / "a.pt")
    write(working_directory / "b.pt")
    with pytest.raises(TwaError, match=message):
        average_fixed(["a.pt", "b.pt"], "out", format=form)
    assert not Path("out").exists()


def fsdp_file(folder: Path) -> None:
    torch.save(state(9), folder / "pytorch_model_fsdp.bin")


def fsdp_rank_file(folder: Path) -> None:
    torch.save({"flat": torch.ones(2)}, folder / "pytorch_model_fsdp_rank0.bin")


def fsdp_folder(folder: Path) -> None:
    write_dcp(folder / "pytorch_model_fsdp_0", 9)


def dcp_folder(folder: Path) -> None:
    write_dcp(folder / "training", 9)


def training_file(folder: Path) -> None:
    wrapped = {f"module._orig_mod.{name}": tensor for name, tensor in state(9).items()}
    torch.save([{"optimizer": {}}, {"model": wrapped}], folder / "training.pt")


def fp32_groups(folder: Path) -> None:
    torch.save({"state": {}, "fp32_from_fp16_groups": [[torch.ones(2)]]}, folder / "optimizer.pt")


def master_param(folder: Path) -> None:
    torch.save({"state": {0: {"master_param": torch.ones(2)}}}, folder / "optimizer.pt")


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (fsdp_file, "'pytorch_model_fsdp.bin' holds the weights too"),
        (fsdp_rank_file, "'pytorch_model_fsdp_rank0.bin' holds the weights too"),
        (fsdp_folder, "'pytorch_model_fsdp_0/.metadata' holds the weights too"),
        (dcp_folder, "'training/.metadata' holds the weights too"),
        (training_file, "'training.pt' holds the weights too"),
        (fp32_groups, "optimizer.pt holds 'fp32_from_fp16_groups.* the optimizer's copy of weights"),
        (master_param, "optimizer.pt holds 'state.0.master_param', the optimizer's copy of weights"),
    ],
)
def test_further_weights_that_training_would_resume_from(
    working_directory: Path, write: Callable[[Path], None], message: str
) -> None:
    write_hf(working_directory / "step-1", 1.0)
    write(working_directory / "step-1")
    with pytest.raises(OutputError, match=message):
        average_fixed(["step-1"], "out", format="same")
    assert not Path("out").exists()
    average_fixed(["step-1"], "out")


def test_kept_optimizer_state_is_reported(working_directory: Path) -> None:
    write_hf(working_directory / "step-1", 1.0)
    kept = {0: {"z": torch.ones(3), "exp_avg_sq": torch.ones(3)}, 1: {"slow_buffer": torch.ones(2)}}
    torch.save({"state": kept}, "step-1/optimizer.pt")
    torch.save(state(2), "step-1/ema.pt")
    Path("step-1/old.pt").write_bytes(b"a legacy file")
    with pytest.warns(TwaWarning) as warned:
        average_fixed(["step-1"], "out", format="same")
    messages = " ".join(str(warning.message) for warning in warned)
    assert "'state.0.z', 'state.1.slow_buffer' are weights that the optimizer keeps" in messages
    assert "'old.pt' cannot be read" in messages and "the state of the training is that of step-1, the last" in messages
    assert Path("out/ema.pt").read_bytes() == Path("step-1/ema.pt").read_bytes()


@pytest.mark.parametrize("candidates", ["hf"], indirect=True)
def test_the_state_is_that_of_the_last_candidate(candidates: list[str]) -> None:
    with pytest.warns(TwaWarning, match=r"that of step-10, the last candidate\.$"):
        average_fixed(candidates, "out", format="same")
    with pytest.warns(TwaWarning, match="that of step-2, the last candidate, though step-10 is of a later step"):
        average_fixed(candidates[::-1], "again", format="same")


def test_format_same_of_a_safetensors_file(working_directory: Path) -> None:
    for value, name in ((1.0, "step-2"), (3.0, "step-10")):
        save_file({"a": torch.full((4,), value), "b": torch.full((4,), value)}, f"{name}.safetensors")
    average_fixed(["*.safetensors"], "out", format="same", max_shard_size="16B")
    assert {path.name for path in Path("out").iterdir()} == {"step-10.safetensors", "twa_scale.json", "README.md"}
    assert load_file("out/step-10.safetensors")["b"].tolist() == [2.0] * 4
    with pytest.raises(OutputError, match=r"'a': is torch.bfloat16 .* Leave out dtype"):
        average_fixed(["*.safetensors"], "again", format="same", dtype="bfloat16")
    with pytest.raises(OutputError, match="tensors 'a': are in the file of the last candidate, but not in the output"):
        average_fixed(["*.safetensors"], "again", format="same", ignore=["a"])
    assert not Path("again").exists()


def test_one_tensor_with_two_coefficients(working_directory: Path) -> None:
    for value in (1.0, 3.0):
        head = torch.full((3, 2), value)
        torch.save({"embed": head, "head": head}, f"{value}.pt")
    opened = open_candidates(["*.pt"])
    weights = {"embed": [0.5, 0.5], "head": [0.25, 0.75]}
    with pytest.raises(CandidateError, match=r"'embed' and 'head' are one tensor .* have different coefficients"):
        merge(opened, "out", Combination(weights.__getitem__), Group.alone(), output=SAME)
    rows = {"head": lambda: torch.full((2, 3), 0.5, dtype=torch.float64)}
    with pytest.raises(CandidateError, match="have different coefficients"):
        merge(opened, "out", Combination(lambda _: [0.5, 0.5], row_weights=rows), Group.alone(), output=SAME)
    assert not Path("out").exists()


@pytest.mark.parametrize("candidates", ["ckpt"], indirect=True)
def test_a_candidate_that_is_replaced_before_it_is_copied(candidates: list[str]) -> None:
    opened = open_candidates(candidates)
    write_ckpt(Path("new"), 4.0)
    Path("new").replace(candidates[-1])
    with pytest.raises(OutputError, match="has changed since it was opened"):
        merge(opened, "out", Combination(lambda _: [1.0, 0.0]), Group.alone(), output=SAME)
    assert not Path("out").exists()


def test_format_same_needs_files_and_their_dtypes(working_directory: Path) -> None:
    last = open_candidates([state(1.0), state(2.0)])
    with pytest.raises(OutputError, match="state dict 1: is a state dict in memory, which --format same"):
        output_format("same", last, CarriedFiles())
    for value in (1.0, 3.0):
        torch.save({"w": torch.full((2,), value, dtype=torch.float64 if value == 1 else torch.float32)}, f"{value}.pt")
    with pytest.raises(OutputError, match=r"'w': is torch.bfloat16 .* Leave out dtype"):
        average_fixed(["*.pt"], "out", format="same", dtype="bfloat16")
    average_fixed(["*.pt"], "out", format="same")
    assert torch.load("out/3.0.pt")["w"].dtype == torch.float32
    (working_directory / "global_step5").mkdir()
    write_hf(working_directory / "with", 1.0)
    (working_directory / "with/latest").write_text("global_step5")
    with pytest.raises(OutputError, match="holds a checkpoint of DeepSpeed, from which training would resume"):
        average_fixed(["with", "with"], "again", format="same")
    with pytest.raises(ConfigError, match="format"):
        average_fixed(["*.pt"], "again", format="sam")
