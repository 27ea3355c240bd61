"""Checkpoints that real DeepSpeed engines wrote, read by slices, compared with DeepSpeed's zero_to_fp32."""

import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import twa_scale
from tests.slices import opened, read, refused
from twa_scale.candidates import open_candidates
from twa_scale.candidates.formats.deepspeed import storages_in_deepspeed
from twa_scale.candidates.side_files import side_files
from twa_scale.errors import CandidateError, OutputError
from twa_scale.merge import average_fixed

pytestmark = pytest.mark.xdist_group("written-by-deepspeed")

TRAINED = {"embed.weight", "up.weight", "up.bias", "scale", "down.weight", "head.weight"}


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Return the tag folder of a copy that a test may damage."""

    def copy(case: str) -> Path:
        shutil.copytree(written / case, tmp_path / case)
        return tmp_path / case / "global_step1"

    return copy


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(file, weights_only=False)
    change(content)
    torch.save(content, file)


def test_slices_match_zero_to_fp32(written: Path) -> None:
    cases = sorted(written.glob("*/*.pt"))
    assert len(cases) == 21
    generator = random.Random(0)
    for case in cases:
        expected = torch.load(case)
        candidate = opened(case.with_suffix(""))
        assert candidate.names() == sorted(expected) and candidate.directory == case.with_suffix("")
        total = 0
        for name, wanted in expected.items():
            full = "fp32" in case.name or (name in TRAINED and not case.name.startswith("0"))
            if wanted.is_floating_point() and name != "mean":
                assert candidate.dtype(name) == (torch.float32 if full else torch.bfloat16), (case, name)
            assert candidate.shape(name) == tuple(wanted.shape)
            n = wanted.numel()
            parts = [sorted(generator.choices(range(n + 1), k=2)) for _ in range(8)]
            for start, stop in [(0, n), (0, 0), (n, n), *parts]:
                actual = read(candidate, name, start, stop)
                assert torch.equal(actual, wanted.reshape(-1)[start:stop].to(actual.dtype)), (case, name, start, stop)
                total += actual.nbytes
        assert candidate.bytes_read == total
        candidate.close()


@pytest.mark.parametrize("case", ["1-bf16", "2-fp32", "3-fp32", "3-bf16"])
def test_asynchronous_snapshots_of_a_step_hold_what_its_checkpoint_does(written: Path, case: str) -> None:
    """The engine continued to train while the snapshot was written."""
    (snapshot,) = open_candidates(str(written / f"2/{case}-snapshots/step-*"), minimum=1)
    checkpoint = opened(written / f"2/{case}")
    assert {*checkpoint.names()} - {*snapshot.names()} == {"head.weight"}  # tied to the embedding
    for name in snapshot.names():
        n = torch.Size(snapshot.shape(name)).numel()
        actual, wanted = read(snapshot, name, 0, n), read(checkpoint, name, 0, n)
        assert torch.equal(actual, wanted.to(actual.dtype)), name


@pytest.mark.parametrize("pattern", ["*.ckpt", "*.ckpt/checkpoint"])
@pytest.mark.parametrize("stage", [2, 3])
def test_directories_of_lightning_are_read_and_the_prefix_of_the_module_is_found(
    written: Path, stage: int, pattern: str
) -> None:
    pytest.importorskip("lightning")
    folder = written / f"lightning-{stage}"
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    with pytest.warns(UserWarning, match=r"names have the prefix 'net\.', which those of the model lack: removed"):
        average = twa_scale.attach(net, str(folder / pattern), {"center": "last"})
    labels = [str(Path(label).relative_to(folder)) for label in average.fingerprint.labels]
    assert labels == [pattern.replace("*", f"epoch={i}-step={2 * (i + 1)}") for i in range(2)]
    wanted = torch.load(folder / "epoch=1-step=4.ckpt.expected")
    assert all(torch.equal(value, wanted[f"net.{name}"]) for name, value in net.state_dict().items())
    first = torch.load(folder / "epoch=0-step=2.ckpt.expected")
    assert not torch.equal(first["net.0.weight"], wanted["net.0.weight"])
    average.close()


@pytest.mark.parametrize(
    ("first", "last"),
    [
        ("1/0-fp32", "2/0-fp32"),
        ("1/1-bf16", "2/1-bf16"),
        ("2/1-bf16-own", "3/1-bf16-own"),
        ("1/2-fp32", "2/2-fp32"),
        ("1/3-fp32", "3/3-fp32"),
        ("2/3-bf16", "2/3-bf16/global_step1"),
    ],
)
@pytest.mark.filterwarnings("ignore:--format same:UserWarning")
def test_format_same_replaces_every_copy_of_a_weight(written: Path, first: str, last: str, tmp_path: Path) -> None:
    """The candidates have another number of ranks. The output has the files of the last one."""
    average_fixed([str(written / first), str(written / last)], tmp_path / "out", format="same")
    actual = opened(tmp_path / "out")
    states = [torch.load(written / f"{case.removesuffix('/global_step1')}.pt") for case in (first, last)]
    for name, positions in storages_in_deepspeed(tmp_path / "out").items():
        wanted = sum(state[name].double() / 2 for state in states)
        if not states[1][name].is_floating_point() or name == "mean":
            wanted = states[1][name]
        values = read(actual, name, 0, wanted.numel())
        torch.testing.assert_close(
            values.double(),
            wanted.reshape(-1).double(),
            rtol=1e-6 if values.dtype == torch.float32 else 1e-2,
            atol=1e-6,
        )
        for place in positions:
            copy = torch.empty(wanted.numel(), dtype=place.dtype)
            place.read(0, copy, name)
            assert torch.equal(copy, values.to(place.dtype)), name


def test_optimizers_without_zero_that_have_their_own_copy_are_refused(written: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"model_states\.pt holds '.*fp32.*', the optimizer's copy of weights"):
        average_fixed([str(written / "2/0-bf16")] * 2, tmp_path / "out", format="same")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:--format same:UserWarning")
def test_frozen_parameters_are_replaced_where_deepspeed_loads_them_from(
    copied: Callable[[str], Path], written: Path, tmp_path: Path
) -> None:
    folder = copied("2/2-fp32")

    def apart(content: dict[str, Any]) -> None:
        """On a GPU, tensors that DeepSpeed moves to the CPU are copies."""
        content["frozen_param_fragments"] = {
            name: value.clone() for name, value in content["frozen_param_fragments"].items()
        }

    changed(folder / "mp_rank_00_model_states.pt", apart)
    average_fixed([str(written / "2/1-fp32"), str(folder.parent)], tmp_path / "out", format="same")
    before, after = (
        torch.load(root / "global_step1/mp_rank_00_model_states.pt", weights_only=False)
        for root in (folder.parent, tmp_path / "out")
    )
    assert {*after["frozen_param_fragments"]} == {"gain", "still.weight"}
    for name, value in after["frozen_param_fragments"].items():
        assert torch.equal(value, after["module"][name]) and not torch.equal(value, before["module"][name])


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_last_candidate_that_was_saved_again_is_refused(written: Path, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    shutil.copytree(written / "lightning-2", tmp_path / "runs")
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))
    average = twa_scale.attach(net, str(tmp_path / "runs/*.ckpt"), {"center": "last"})
    changed(next(tmp_path.glob("runs/epoch=1*/checkpoint/*optim_states.pt")), lambda content: content)
    with pytest.raises(OutputError, match=r"optim_states\.pt: has changed since it was opened"):
        average.export(tmp_path / "out", format="same")
    average.close()


@pytest.mark.parametrize("case", ["2/2-bf16", "2/3-fp32"])
def test_weights_kept_by_the_optimizer_are_reported(copied: Callable[[str], Path], case: str, tmp_path: Path) -> None:
    folder = copied(case)

    def slow(content: dict[str, Any]) -> None:
        content["optimizer_state_dict"]["slow_buffer"] = torch.ones(2)

    changed(min(folder.glob("*optim_states.pt")), slow)
    with pytest.warns(UserWarning, match=r"'optimizer_state_dict\.slow_buffer' are weights that the optimizer keeps"):
        average_fixed([str(folder.parent)], tmp_path / "out", format="same")


def test_a_file_in_the_folder_of_the_tag_that_holds_the_weights_is_refused(
    copied: Callable[[str], Path], written: Path, tmp_path: Path
) -> None:
    folder = copied("2/2-fp32")
    shutil.copy(written / "2/2-fp32.pt", folder / "model.pt")
    with pytest.raises(OutputError, match=r"'global_step1/model\.pt' holds the weights too"):
        average_fixed([str(folder.parent)], tmp_path / "out", format="same")


def test_accepted_paths(written: Path, tmp_path: Path) -> None:
    parent = written / "2/3-fp32"
    assert opened(parent).names() == opened(parent / "global_step1").names()
    for step in (10, 9):
        shutil.copytree(parent / "global_step1", tmp_path / f"global_step{step}")
    labels = [candidate.label for candidate in open_candidates(str(tmp_path / "global_step*"))]
    assert labels == [str(tmp_path / "global_step9"), str(tmp_path / "global_step10")]
    assert (parent / "zero_to_fp32.py").exists() and not side_files(parent)


@pytest.mark.parametrize("case", ["2/2-fp32", "2/3-fp32"])
def test_a_slice_opens_only_the_files_that_hold_it(copied: Callable[[str], Path], case: str) -> None:
    folder = copied(case)
    (last,) = folder.glob("zero_pp_rank_1_*_optim_states.pt")
    last.write_bytes(b"nothing that could be read")
    candidate = opened(folder)
    read(candidate, "embed.weight", 0, 17 if "3-" in case else 3)
    with pytest.raises(CandidateError, match=f"^{re.escape(str(last))}: "):
        for name in TRAINED:
            read(candidate, name, 0, torch.Size(candidate.shape(name)).numel())


def test_latest_file_names_a_folder(copied: Callable[[str], Path]) -> None:
    folder = copied("1/2-fp32")
    folder.rename(folder.with_name("global_step7"))
    message = refused(folder.parent)
    assert message.startswith(f"{folder.parent / 'latest'}: names 'global_step1'") and "'global_step7'" in message
    (folder.parent / "latest").write_text("../elsewhere")
    assert "'../elsewhere'" in refused(folder.parent)


@pytest.mark.parametrize("case", ["2/1-fp32", "2/2-bf16", "2/3-fp32"])
def test_a_file_is_missing(copied: Callable[[str], Path], case: str) -> None:
    folder = copied(case)
    next(folder.glob("*pp_rank_1_*_optim_states.pt")).unlink()
    message = refused(folder)
    assert message.startswith(f"{folder}: was saved by 2 ranks") and "ranks '1' are missing" in message
    next(folder.glob("*_optim_states.pt")).unlink()
    assert "saved with ZeRO, but has no *_optim_states.pt" in refused(folder)


def test_a_model_file_is_missing(copied: Callable[[str], Path]) -> None:
    folder = copied("2/3-fp32")
    (folder / "zero_pp_rank_1_mp_rank_00_model_states.pt").unlink()
    assert "no zero_pp_rank_1_mp_rank_00_model_states.pt" in refused(folder)
    (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").unlink()
    assert "is no candidate" in refused(folder)


@pytest.mark.parametrize("which", ["*pp_rank_0_*_optim_states.pt", "*pp_rank_1_*_optim_states.pt", "*model_states.pt"])
@pytest.mark.parametrize("case", ["2/1-bf16", "2/3-fp32"])
def test_a_file_is_truncated(copied: Callable[[str], Path], case: str, which: str) -> None:
    folder = copied(case)
    file = sorted(folder.glob(which))[0]
    file.write_bytes(file.read_bytes()[:-100])
    message = refused(folder)
    assert message.startswith(f"{file}: ") and "truncated" in message
    file.write_bytes(b"")
    assert refused(folder).startswith(f"{file}: ")


def test_files_of_another_save(copied: Callable[[str], Path], written: Path) -> None:
    folder = copied("3/3-fp32")
    shutil.copy(next((written / "2/3-fp32/global_step1").glob("*pp_rank_1_*_optim_states.pt")), folder)
    assert "elements on rank 1" in refused(folder)
    shutil.copy(next((written / "2/3-fp32/global_step1").glob("*pp_rank_0_*_optim_states.pt")), folder)
    assert "saved by 2 ranks" in refused(folder) and "there are 1 more" in refused(folder)
    folder = copied("2/2-fp32")
    shutil.copy(written / "2/2-bf16/global_step1/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt", folder)
    assert "holds both" in refused(folder)


@pytest.mark.parametrize(
    ("case", "held_in"),
    [
        ("2/2-fp32", "single_partition_of_fp32_groups"),
        ("2/3-fp32", "fp32_flat_groups"),
        ("2/3-fp32", "frozen_param_fragments"),
    ],
)
def test_ranks_with_different_dtypes(copied: Callable[[str], Path], case: str, held_in: str) -> None:
    def halve(content: dict[str, Any]) -> None:
        state = content.get("optimizer_state_dict", content)
        stored = state[held_in]
        for key in list(stored) if isinstance(stored, dict) else range(len(stored)):
            stored[key] = stored[key].half()

    folder = copied(case)
    which = "*pp_rank_1_*_model_states.pt" if "frozen" in held_in else "*pp_rank_1_*_optim_states.pt"
    (last,) = folder.glob(which)
    changed(last, halve)
    message = refused(folder)
    assert message.startswith(f"{last}: tensor '") and "float16" in message and "float32" in message, message


def test_shapes_that_the_partitions_do_not_fit(copied: Callable[[str], Path]) -> None:
    for case in ("2/2-fp32", "2/3-fp32"):
        folder = copied(case)
        file = sorted(folder.glob("*model_states.pt"))[0]
        changed(file, lambda content: content["param_shapes"][0].update(more=torch.Size([9])))
        assert "must come from the same save" in refused(folder)


@pytest.mark.parametrize(
    ("name", "expected_message"),
    [
        ("mp_rank_01_model_states.pt", "tensor or model parallelism"),
        ("layer_3_expert_0_mp_rank_00_model_states.pt", "experts (MoE)"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "experts (MoE)"),
        ("layer_01-model_00-model_states.pt", "a pipeline of stages"),
    ],
)
def test_unsupported_parallelism_is_refused(copied: Callable[[str], Path], name: str, expected_message: str) -> None:
    folder = copied("1/2-fp32")
    shutil.copy(folder / "mp_rank_00_model_states.pt", folder / name)
    message = refused(folder)
    assert f"holds '{name}'" in message and expected_message in message and "not supported" in message


def test_huge_number_of_ranks_is_refused_quickly(tmp_path: Path) -> None:
    """Numbers in a file do not determine how much time and memory reading takes."""
    torch.save({"module": {}, "param_shapes": [{"w": torch.Size([4])}]}, tmp_path / "mp_rank_00_model_states.pt")
    state = {"optimizer_state_dict": {"zero_stage": 2, "partition_count": 10**12}}
    torch.save(state, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "was saved by 1000000000000 ranks" in refused(tmp_path) and "'1', '2', '3', '4'" in refused(tmp_path)


def test_expert_groups_in_the_optimizer(copied: Callable[[str], Path]) -> None:
    folder = copied("2/2-fp32")
    file = folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    changed(file, lambda content: content["optimizer_state_dict"].update(partition_count=[2, 1]))
    assert "split over [2, 1] ranks" in refused(folder)


class Malicious:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return exec, ("raise SystemExit('it ran')",)


def test_user_classes_are_not_imported_or_run(copied: Callable[[str], Path], written: Path) -> None:
    folder = copied("2/3-fp32")
    for file in folder.glob("*.pt"):
        changed(file, lambda content: content.update(client=Malicious()))
    expected = torch.load(written / "2/3-fp32.pt")
    candidate = opened(folder)
    for name, wanted in expected.items():
        assert torch.equal(read(candidate, name, 0, wanted.numel()), wanted.reshape(-1))
