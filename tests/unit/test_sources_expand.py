"""Unusual paths and patterns: links, names with brackets, parts of models, and patterns that a shell has expanded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file

from tests.specs import found, refused
from twa_scale.candidates import open_candidates, open_together
from twa_scale.errors import CandidateError
from twa_scale.ranks import Group


def write(path: Path, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {"w": torch.full((2,), value)}
    torch.save(state, path) if path.suffix.lower().startswith((".p", ".b")) else save_file(state, path)
    return path


def steps(folder: Path) -> Path:
    for i in (1, 2):
        write(folder / f"step-{i}/model.safetensors", i)
    return folder


# Names


@pytest.mark.parametrize("name", ["lr=0.1,seed=[1]", "run[a]", "what?", "a*b", "ein schöner ordner ☃", "[", "{1,2}"])
def test_folders_that_exist_are_no_patterns(working_directory: Path, name: str) -> None:
    steps(working_directory / name)
    expected = [f"{name}/step-1", f"{name}/step-2"]
    assert found(f"{name}/step-*") == (expected, []) == found(expected)
    assert found(str(working_directory / name / "step-*"))[0] == [str(working_directory / path) for path in expected]


@pytest.mark.parametrize("name", ["MODEL.SAFETENSORS", "Model.Safetensors", "X.PT", "x.Bin"])
def test_suffixes_in_capitals(working_directory: Path, name: str) -> None:
    write(working_directory / "a" / name)
    assert open_candidates([f"a/{name}"], minimum=1)[0].names() == ["w"]
    assert found(f"a/{name[:2]}*") == ([f"a/{name}"], [])
    if name.lower().endswith("safetensors"):
        assert open_candidates(["a"], minimum=1)[0].names() == ["w"]


def test_a_folder_may_be_called_like_a_file(working_directory: Path) -> None:
    write(working_directory / "1.safetensors/model.safetensors")
    write(working_directory / "2.safetensors")
    assert len(open_candidates("*.safetensors")) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "'' is not a path. Is a variable of the shell empty?"),
        ("a\0b", "is not a path"),
        ("x" * 5000, "File name too long"),
        ("x" * 5000 + "*", "File name too long"),
        ("~nobody-of-this-name/x", "Write the path out"),
        ("run/step-{1,2}", "Braces are expanded by the shell only"),
        ("run/step-1,run/step-2", "Give the paths one by one"),
        ("s3://bucket/run", "Install `s3fs`, or download the candidates|there is no such file|cannot be read"),
        ("nothing://bucket/run", "Protocol not known: nothing. Give a URL of a file system of fsspec"),
        ("file:///none-of-this-name", "/none-of-this-name: there is no such file or directory"),
        ("someone/some-model-7B", "`hf download someone/some-model-7B --local-dir DIR`"),
        ("run/step-[", "matches nothing"),
        ("run/**x", "is no pattern|matches nothing"),
        ("run/stop-1", "no such file or directory"),
    ],
)
def test_missing_candidates_raise(working_directory: Path, spec: str, message: str) -> None:
    steps(working_directory / "run")
    for inputs in (spec, ["run/step-1", spec]):
        assert any(part in refused(inputs) for part in message.split("|")), refused(inputs)
    with pytest.raises(CandidateError):  # as the ranks of a run see it
        open_together(["run/step-1", spec], Group.alone())


# Links, and what cannot be read


def dangling(link: Path) -> None:
    link.symlink_to("nothing")


def circle(link: Path) -> None:
    link.symlink_to(link.name)


@pytest.mark.parametrize("make", [dangling, circle])
def test_broken_links_are_refused(working_directory: Path, make: Callable[[Path], None]) -> None:
    steps(working_directory / "run")
    make(working_directory / "run/step-3")
    for spec in ("run/step-*", "run/step-3", ["run/step-1", "run/step-3"]):
        assert "'run/step-3'" in refused(spec) or refused(spec).startswith("run/step-3: "), refused(spec)
        assert "a broken link" in refused(spec)
    make(working_directory / "run/step-1/extra.json")
    assert found("run/step-[12]")[0] == ["run/step-1", "run/step-2"]
    (working_directory / "run/step-1/model.safetensors").unlink()
    make(working_directory / "run/step-1/model.safetensors")
    assert "'model.safetensors' exists, but is not a regular file" in refused(["run/step-1"])


def test_cyclic_links_of_folders_are_not_followed(working_directory: Path) -> None:
    """For code that follows links, two of them make a tree of 2^40 paths."""
    steps(working_directory / "run")
    for name in ("again", "once-more"):
        (working_directory / "run" / name).symlink_to(".")
    assert found("run/**/model.safetensors")[0] == ["run/step-1/model.safetensors", "run/step-2/model.safetensors"]


@pytest.mark.parametrize("closed", ["run/step-1", "run/step-1/model.safetensors", "run"])
def test_unreadable_candidates_raise(working_directory: Path, closed: str, request: pytest.FixtureRequest) -> None:
    steps(working_directory / "run")
    for folder in (
        working_directory,
        *working_directory.parents[:3],
        working_directory / "run",
        working_directory / "run/step-1",
        working_directory / "run/step-2",
    ):
        folder.chmod(0o777)
    for file in working_directory.glob("run/*/*"):
        file.chmod(0o666)
    (working_directory / closed).chmod(0)
    request.getfixturevalue("nobody")
    for spec in (["run/step-1", "run/step-2"], ["run/step-1/model.safetensors"]):
        message = refused(spec)
        assert message.startswith("run/step-1") and "Permission denied" in message, message


# Parts of one model


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["consolidated.00.pth", "consolidated.01.pth"], "*.pth"),
        (["iter_10/mp_rank_00/model.pt", "iter_10/mp_rank_01/model.pt"], "iter_10/*/model.pt"),
        (["model_rank_0.pt", "model_rank_1.pt", "model_rank_2.pt"], "*.pt"),
        (["checkpoint-shard0.pt", "checkpoint-shard1.pt"], "*"),
        (["tp-1/model.safetensors", "tp-2/model.safetensors"], "*/*"),
        (["a-Rank0.pt", "a-Rank1.pt"], "*"),
    ],
    ids=str,
)
def test_parts_of_ranks_are_not_candidates(working_directory: Path, names: list[str], pattern: str) -> None:
    """Their shapes are often equal, so that an average would look valid."""
    for name in names:
        write(working_directory / name)
    message = refused(pattern)
    assert f"'{pattern}'" in message and "parts of one model" in message and repr(names[0]) in message
    paths, messages = found(names)  # as a shell expands the pattern
    assert paths == names and len(messages) == 1 and "parts of one model" in messages[0]


@pytest.mark.parametrize(
    "names",
    [["rank-8.pt", "rank-16.pt"], ["rank0-step1.pt", "rank0-step2.pt"], ["tp1.pt"], ["crank0.pt", "crank1.pt"]],
    ids=str,
)
def test_candidates_with_numbers_of_ranks(working_directory: Path, names: list[str]) -> None:
    for name in names:
        write(working_directory / name)
    assert found("*.pt") == (names, [])


def test_versions_in_a_list_are_reported(working_directory: Path) -> None:
    """As if a shell has expanded `*.pt`."""
    names = [write(working_directory / name).name for name in ("1.pt", "1_ema.pt")]
    paths, messages = found(names)
    assert paths == names and len(messages) == 1 and "versions of one model" in messages[0]


# Folders of folders


@pytest.mark.parametrize(
    ("files", "inner"),
    [
        (["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"], "'unet', 'vae'"),
        (["snapshots/0a1b/model.safetensors"], "'snapshots/0a1b'"),
        (["weights_0/.metadata", "optimizer_0/.metadata"], "'optimizer_0', 'weights_0'"),
        (["global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt"], "'global_step5'"),
    ],
    ids=str,
)
def test_folders_with_weights_in_them_are_named(working_directory: Path, files: list[str], inner: str) -> None:
    for name in ("1", "2"):
        for file in files:
            (working_directory / name / file).parent.mkdir(parents=True, exist_ok=True)
            (working_directory / name / file).write_bytes(b"x")
    message = refused("*")
    assert message.startswith("1: is no candidate") and f"There are weights in {inner}" in message
    assert found("*") == (["1", "2"], [])  # not the same, because neither has a file
    (working_directory / "1/args.pkl").write_bytes(b"x")
    assert refused("*") == message  # a file that is not read does not change this


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["step-100", "step-150"], "step-*"),
        (["step_10_hf", "step_20_hf"], "*"),
        (["epoch=1-step=10", "epoch=2-step=20"], "*"),
    ],
    ids=str,
)
def test_a_pattern_that_matches_all_steps_is_proposed(working_directory: Path, names: list[str], pattern: str) -> None:
    for name in names:
        (working_directory / "run" / name).mkdir(parents=True)
        (working_directory / "run" / name / "model.safetensors").write_bytes(b"x")
    assert f"write 'run/{pattern}'" in refused("run")


# Formats that are not read


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("m.gguf", "a file of llama.cpp (GGUF)"),
        ("flax_model.msgpack", "a file of Flax (JAX)"),
        ("tf_model.h5", "a file of Keras or TensorFlow"),
        ("m.npz", "an archive of numpy arrays"),
        ("model.onnx", "an exported program (ONNX)"),
        ("__0_0.distcp", "whose `.metadata` is not there"),
    ],
)
def test_formats_that_are_not_read_are_named(working_directory: Path, name: str, message: str) -> None:
    for step in ("1", "2"):
        (working_directory / step).mkdir()
        (working_directory / step / name).write_bytes(b"x")
    assert refused("*").startswith("1: is no candidate") and message in refused("*")
    for spec in (f"*/{name}", f"1/{name}"):
        assert f"1/{name}" in refused(spec) and message in refused(spec)


@pytest.mark.parametrize("name", ["model.tar", "model.pkl"])
def test_torch_files_with_other_suffixes_are_refused_with_a_fix(working_directory: Path, name: str) -> None:
    for step in ("1", "2"):
        (working_directory / step).mkdir()
        torch.save({"w": torch.ones(2)}, working_directory / step / name)
    for spec in ("1", f"*/{name}", f"1/{name}"):
        assert f"{name!r} is an archive as torch.save writes it" in refused(spec) and "'model.pt'" in refused(spec)
    (working_directory / "1" / name).write_bytes(b"x")
    assert "torch.save writes it" not in refused("1")


_FILE = save({"w": torch.ones(2)})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.safetensors", b"", "is empty"),
        ("m.bin", b"", "is empty"),
        ("m.bin", b"GGUF\x03\0\0\0", "a file of llama.cpp (GGUF)"),
        ("m.bin", b"<!DOCTYPE html><p>404", "is a web page"),
        ("m.safetensors", b"<!DOCTYPE html><p>404", "is a web page"),
        ("m.bin", b"version https://git-lfs.github.com/spec/v1\n", "is a Git LFS pointer"),
        ("m.bin", _FILE, "is a safetensors file with the name of a file of torch"),
        ("m.safetensors", b"PK\x03\x04" + bytes(100), "with the name of a safetensors file"),
        ("m.safetensors", save({"w": torch.ones(2)}, {"format": "flax"}), "is of Flax (JAX) by its header"),
    ],
)
def test_contents_that_differ_from_the_suffix(working_directory: Path, name: str, content: bytes, message: str) -> None:
    (working_directory / name).write_bytes(content)
    assert refused(name).startswith(f"{name}: ") and message in refused(name)
