"""Candidates at URLs: in fsspec's memory, on a web server, and in S3 if its libraries are installed.

`pip install s3fs 'moto[server]'` runs the tests of S3. They are no requirements of development, because they need an
older python-dateutil than it has.
"""

import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn
from torch.distributed.fsdp import fully_shard

import twa_scale
from tests.pool import Pool
from tests.slices import read
from tests.specs import found, refused
from twa_scale.base.spans import Span
from twa_scale.base.urls import Identity, Url
from twa_scale.candidates import open_candidates
from twa_scale.candidates.read_ahead import Reader
from twa_scale.config import RunConfig, validated
from twa_scale.errors import CandidateError, ConfigError, OutputError
from twa_scale.merge import average_fixed

Tensors = dict[str, torch.Tensor]


def state(seed: int) -> Tensors:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(70, 51), nn.Linear(51, 3)).state_dict()


def put(url: str, content: bytes | str) -> None:
    with fsspec.open(url, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)


def put_step(url: str, seed: int) -> None:
    put(f"{url}/model.safetensors", save(state(seed)))
    put(f"{url}/config.json", '{"model_type": "of-mine"}')
    put(f"{url}/optimizer.pt", "moments")


def run_at(base: str) -> str:
    for i, step in enumerate((2, 10, 100)):
        put_step(f"{base}/run/step-{step}", i)
    return f"{base}/run"


@pytest.fixture
def memory() -> Iterator[str]:
    """Return the URL of an empty directory in memory."""
    base = f"memory://{uuid4().hex}"
    yield base
    fsspec.filesystem("memory").rm(base.partition("://")[2], recursive=True)


def assert_average(out: Path) -> None:
    for name, value in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(value, sum(state(i)[name] for i in range(3)) / 3)


# Any file system of fsspec


def test_an_average_of_urls(memory: str, working_directory: Path) -> None:
    run = run_at(memory)
    put(f"{run}/step-100/ema.safetensors", save(state(7)))
    paths, messages = found(f"{run}/step-*")
    assert paths == [f"{run}/step-{step}" for step in (2, 10, 100)]
    assert "'ema.safetensors' next to it is not read" in messages[0]
    weights = average_fixed([f"{run}/step-*"], "out")
    assert [label for label, _ in weights] == paths
    assert_average(working_directory / "out")
    assert {path.name for path in Path("out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "twa_scale.json",
        "README.md",
    }
    assert paths[0] in Path("out/twa_scale.json").read_text()
    average_fixed([f"{run}/step-10:0.25", f"{run}/step-2:0.75"], "two")
    wanted = 0.75 * state(0)["0.bias"] + 0.25 * state(1)["0.bias"]
    torch.testing.assert_close(load_file("two/model.safetensors")["0.bias"], wanted)
    average_fixed([f"{run}/*"], "last", select=twa_scale.config.SelectConfig(start_step=5, every=10))
    with pytest.raises(OutputError, match="is a safetensors file at a URL, which --format same"):
        average_fixed([f"{run}/*"], "same", format="same")


def test_urls_of_files_and_shards(memory: str, working_directory: Path) -> None:
    first, second = dict(list(state(0).items())[:2]), dict(list(state(0).items())[2:])
    put(f"{memory}/a/model-00001-of-00002.safetensors", save(first))
    put(f"{memory}/a/model-00002-of-00002.safetensors", save(second))
    index = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in state(0)}
    put(f"{memory}/a/model.safetensors.index.json", json.dumps({"weight_map": index}))
    put(f"{memory}/b.safetensors", save(state(0)))
    (working_directory / "c.safetensors").write_bytes(save(state(0)))
    spec = [f"{memory}/a", f"{memory}/a/model.safetensors.index.json", f"{memory}/b.safetensors"]
    for candidate in open_candidates([*spec, "c.safetensors", f"file://{working_directory}/c.safetensors"]):
        for name, value in state(0).items():
            assert torch.equal(read(candidate, name, 3, value.numel()), value.reshape(-1)[3:])
        candidate.close()
    assert "holds a part of the tensors. Give its index" in refused(f"{memory}/a/model-00001-of-00002.safetensors")


def test_a_model_learns_from_urls(memory: str, working_directory: Path) -> None:
    run = run_at(memory)
    model = nn.Sequential(nn.Linear(70, 51), nn.Linear(51, 3))
    twa = twa_scale.attach(model, f"{run}/step-*", {"center": "last"})
    assert twa.bytes_read == 3 * sum(value.nbytes for value in state(0).values())
    assert torch.equal(model.get_parameter("0.weight"), state(2)["0.weight"])
    with pytest.raises(ConfigError, match="'mapped' needs candidates whose tensors are contiguous"):
        twa_scale.attach(model, f"{run}/step-*", {"store": "mapped"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("run/stop-*", "the pattern matches nothing"),
        ("run/nothing", "there is no such file, directory or bucket"),
        ("run/step-2/optimizer.pt", "is not a safetensors file. Only safetensors are read from URLs"),
        ("run/step-2/*", "also matches .*config.json', which holds no weights"),
        ("empty", "has no safetensors that a library would load: it holds 'config.json'"),
        ("dcp", "it is a checkpoint of torch.distributed.checkpoint. Only safetensors are read from URLs"),
        ("deepspeed", "it is a checkpoint of DeepSpeed"),
        ("bin", "pytorch_model.bin: is not a safetensors file"),
        ("cut", "model.safetensors: tensor .* ends at byte .*; it is truncated"),
    ],
)
def test_read_errors_name_the_url(memory: str, name: str, message: str) -> None:
    run_at(memory)
    put(f"{memory}/empty/config.json", "{}")
    put(f"{memory}/dcp/.metadata", "")
    put(f"{memory}/deepspeed/latest", "step1")
    put(f"{memory}/bin/pytorch_model.bin", "")
    put(f"{memory}/cut/model.safetensors", save(state(0))[:-1])
    with pytest.raises(CandidateError, match=message) as error:
        open_candidates([f"{memory}/{name}"], minimum=1)
    assert memory in str(error.value)


def test_a_file_that_changes_is_refused(memory: str) -> None:
    run = run_at(memory)
    (candidate,) = open_candidates([f"{run}/step-2"], minimum=1)
    put_step(f"{run}/step-2", 5)
    with pytest.raises(CandidateError, match=r"step-2/model.safetensors: tensor '0.bias' cannot be read: the file has"):
        read(candidate, "0.bias", 0, 51)
    put(f"{run}/step-2/model.safetensors", b"short")
    with pytest.raises(CandidateError, match="bytes when it was opened and has 5 now"):
        read(candidate, "0.bias", 0, 51)
    fsspec.filesystem("memory").rm(f"{run}/step-2/model.safetensors")
    with pytest.raises(CandidateError, match="there is no such file, directory or bucket"):
        read(candidate, "0.bias", 0, 51)


def test_part_of_many_ranges_checks_the_file_once(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    identity = Url.identity

    def counted(url: Url) -> Identity:
        asked.append(url.name)
        return identity(url)

    monkeypatch.setattr(Url, "identity", counted)
    put(f"{memory}/a.safetensors", save(state(0)))
    (candidate,) = open_candidates([f"{memory}/a.safetensors"], minimum=1)
    assert len(asked) == 2, "before the header and after it"
    columns = Span("0.weight", 10, 70 * 51 - 50, 10, 70)  # 51 ranges
    (part,) = Reader([candidate]).parts([(columns, [0])])
    assert torch.equal(part.sources[0].view(51, 10), state(0)["0.weight"][:, 10:20]) and len(asked) == 3
    put(f"{memory}/a.safetensors", save(state(1)))
    with pytest.raises(CandidateError, match=r"a.safetensors: tensor '0.weight' cannot be read: the file has"):
        list(Reader([candidate]).parts([(columns, [0])]))
    assert len(asked) == 4


def test_a_header_that_changes_while_it_is_read_is_refused(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    put(f"{memory}/a.safetensors", save(state(0)))

    def other(url: Url, start: int, stop: int) -> bytes:
        put(f"{memory}/a.safetensors", b"x" * len(save(state(0))))
        return b"x" * (stop - start)

    monkeypatch.setattr(Url, "read", other)
    with pytest.raises(CandidateError, match=r"a.safetensors: the header cannot be read: the file has been written"):
        open_candidates([f"{memory}/a.safetensors"], minimum=1)


def test_outputs_are_not_urls(memory: str) -> None:
    run = run_at(memory)
    with pytest.raises(OutputError, match=r"is a URL, and a path of this machine is needed here.* upload it"):
        average_fixed([f"{run}/*"], f"{memory}/out")
    with pytest.raises(ConfigError, match=r"output: .*is a URL"):
        validated(RunConfig, {"candidates": "a", "output": "s3://bucket/out", "task": "a:b"})


# A web server


class Served:
    """The files of a server, and the ranges that it has sent."""

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.sent: dict[str, list[tuple[int, int]]] = defaultdict(list)
        self.ranges = True


@pytest.fixture
def web() -> Iterator[tuple[str, Served]]:
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self, body: bool = True) -> None:
            content = served.content.get(self.path)
            start, stop = 0, len(content or b"")
            status = 404 if content is None else 200
            if content is not None and served.ranges and (asked := self.headers.get("Range")):
                first, last = asked.removeprefix("bytes=").split("-")
                start, stop, status = int(first), min(int(last) + 1, stop), 206
            sent = (content or b"")[start:stop]
            self.send_response(status)
            self.send_header("Content-Length", str(len(sent)))
            self.send_header("ETag", f'"{hash(content)}"')
            self.send_header("Content-Type", "text/html" if (content or b"").startswith(b"<html") else "binary/data")
            self.end_headers()
            if body:
                served.sent[self.path].append((start, stop))
                self.wfile.write(sent)

        def do_HEAD(self) -> None:
            self.do_GET(body=False)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", served
    server.shutdown()
    thread.join()
    server.server_close()


def attach_shards(urls: list[str]) -> int:
    model = nn.Sequential(nn.Linear(70, 51), nn.Linear(51, 3))
    fully_shard(model)
    twa = twa_scale.attach(model, urls, {"center": "last"})
    for name, value in model.state_dict().items():
        assert torch.equal(value.full_tensor(), state(1)[name])
    return twa.bytes_read


@pytest.mark.parametrize("slash", ["/", ""])
def test_a_pattern_matches_directories_of_a_server(web: tuple[str, Served], slash: str) -> None:
    """Servers list a directory with or without a slash after its name."""
    url, served = web
    served.content["/"] = "".join(["<html>", *(f'<a href="step-{i}{slash}">' for i in range(2)), "</html>"]).encode()
    for i in range(2):
        links = "".join(f'<a href="/step-{i}/{name}">' for name in ("model.safetensors", "logs" + slash))
        served.content |= dict.fromkeys((f"/step-{i}", f"/step-{i}/"), f"<html>{links}</html>".encode())
        served.content[f"/step-{i}/model.safetensors"] = save(state(i))
        served.content[f"/step-{i}/logs"] = b"<html></html>"
    candidates = open_candidates(f"{url}/step-*{slash}")
    assert [candidate.label for candidate in candidates] == [f"{url}/step-{i}" for i in range(2)]
    for candidate in candidates:
        candidate.close()


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ranks_read_each_byte_once(ranks: Pool, web: tuple[str, Served], size: int) -> None:
    url, served = web
    served.content = {f"/step-{i}.safetensors": save(state(i)) for i in range(2)}
    read_bytes = ranks(attach_shards, size, urls=[f"{url}/step-{i}.safetensors" for i in range(2)])
    data = sum(value.nbytes for value in state(0).values())
    assert sum(read_bytes) == 2 * data and max(read_bytes) < 2 * data * (1 / size + 0.1)
    # Each rank also reads headers, and samples for comparison: at most 8 times 16 numbers of each tensor.
    beside = size * (len(save(state(0))) - data + 8 * 16 * 4 * len(state(0)))
    for sent in served.sent.values():
        assert data <= sum(stop - start for start, stop in sent) <= data + beside


def test_large_tensors_take_few_requests(web: tuple[str, Served], working_directory: Path) -> None:
    url, served = web
    for i in range(2):
        served.content[f"/step-{i}.safetensors"] = save({"w": torch.full((5 << 18,), float(i))})
    average_fixed([f"{url}/step-{i}.safetensors" for i in range(2)], "out")
    assert torch.equal(load_file("out/model.safetensors")["w"], torch.full((5 << 18,), 0.5))
    large = [stop - start for start, stop in served.sent["/step-0.safetensors"] if stop - start > 1 << 16]
    assert large == [5 << 20]


def test_server_without_ranges_and_missing_file_raise(web: tuple[str, Served]) -> None:
    url, served = web
    served.content["/a.safetensors"] = save(state(0))
    served.ranges = False
    assert "it does not serve ranges" in refused([f"{url}/a.safetensors"])
    messages = refused([f"{url}/b.safetensors?key=secret"])
    assert f"{url}/b.safetensors: there is no such file" in messages and "secret" not in messages


# S3


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    fsspec.filesystem("s3").mkdir("bucket")
    yield "s3://bucket"
    server.stop()


def test_candidates_in_s3(s3: str, working_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_at(s3)
    assert found(f"{run}/step-*")[0] == [f"{run}/step-{step}" for step in (2, 10, 100)]
    average_fixed([f"{run}/step-*"], "out")
    assert_average(working_directory / "out")
    assert Path("out/config.json").exists()
    put_step(f"{run}/step-1000", 3)  # listings of the bucket are not cached
    assert len(found(f"{run}/step-*")[0]) == 4
    (candidate,) = open_candidates([f"{run}/step-2"], minimum=1)
    put_step(f"{run}/step-2", 5)
    with pytest.raises(CandidateError, match="the file has been written since it was opened"):
        read(candidate, "0.bias", 0, 51)
    assert "there is no such file, directory or bucket" in refused(["s3://nobody/model.safetensors"])
    assert "s3://nobody" in refused(["s3://nobody/run/*"])
    assert "s3://nobody/run" in refused(["s3://nobody/run"])
