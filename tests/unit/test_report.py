"""The page of a run, and the values that describe an average."""

import json
import re
import subprocess
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest
import torch

from tests.reports import MARKUP, write_run
from twa_scale import OutputError, StateError
from twa_scale.average.measures import effective_candidates, mean_coefficients
from twa_scale.average.state import save_state
from twa_scale.output import DirectoryLock
from twa_scale.tools.report import write_report
from twa_scale.tools.report.coefficients import OUTSIDE, merged, positions
from twa_scale.tools.report.curves import Curve, Level, chart, ticks


class Page(HTMLParser):
    """The elements, attributes and text of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(path.read_text())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words += data + " "


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report"))


@pytest.fixture
def run(source: Path, tmp_path: Path) -> Path:
    """Return a copy of a run that a test may damage."""
    (tmp_path / "run").mkdir()
    for file in source.iterdir():
        (tmp_path / "run" / file.name).write_bytes(file.read_bytes())
    return tmp_path / "run"


def test_the_page_of_a_run_that_has_not_ended(run: Path) -> None:
    path = write_report(run)
    page = Page(path)
    assert path == run / "report.html"
    assert "not finished" in page.words and "step 8 of 20" in page.words
    assert "0.7500" in page.words and "-0.5000" in page.words  # coefficients
    assert f"{1 / (0.75**2 + 0.5**2 + 0.25**2 + 0.5**2):.2f} effective candidates of 4" in page.words
    assert "6 of 24 coefficients are negative" in page.words
    assert {"by step", "by depth", "by kind"} <= set(re.findall(r"by step|by depth|by kind", page.words))
    assert "twa-scale export" in page.words
    assert not any("nan" in (value or "") for _, value in page.attributes)  # a loss that is not finite is not drawn


def test_text_of_files_is_not_markup(run: Path) -> None:
    (run / "summary.json").write_text("{}")  # of an earlier run, because this one has not ended
    page = Page(write_report(run))
    assert MARKUP in page.words
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert not {"src", "href"} & {name for name, _ in page.attributes}
    assert not any(name.startswith("on") for name, _ in page.attributes)
    assert "url(" not in (run / "report.html").read_text() and "@import" not in (run / "report.html").read_text()


def test_running_run_is_named(run: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with DirectoryLock(run) as lock:
        lock.take()
        assert "still running" in Page(write_report(run)).words
        owner = json.loads((run / ".lock").read_text())
    (run / ".lock").write_text(json.dumps({**owner, "pid": ended.pid}))
    assert "still running" not in Page(write_report(run)).words
    (run / ".lock").write_text(json.dumps({**owner, "pid": ended.pid, "host": "another"}))
    assert "still running" in Page(write_report(run)).words


def test_run_without_a_state(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert "step 1" in Page(write_report(tmp_path)).words


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", b"{", "is not valid JSON"),
        ("config.json", b"[]", "not a mapping"),
        ("state.pt", b"torn", "state.pt: is not a run state"),
        ("average/twa_scale.json", b'{"candidates": ["a"], "weights": [0.5, 0.5]}', "one coefficient for each"),
    ],
)
def test_damaged_files_are_named(run: Path, name: str, content: bytes, message: str) -> None:
    damaged = run if name != "average/twa_scale.json" else run.parent / "merged"
    (damaged / name).parent.mkdir(parents=True, exist_ok=True)
    (damaged / name).write_bytes(content)
    with pytest.raises(StateError, match=re.escape(message)):
        write_report(damaged)
    assert not (damaged / "report.html").exists()


def test_directories_without_a_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StateError, match="output directory of a run"):
            write_report(path)


def test_only_reports_are_replaced(run: Path, tmp_path: Path) -> None:
    local = tmp_path / "mine.html"
    local.write_text("<!doctype html><p>mine")
    with pytest.raises(OutputError, match="not a report"):
        write_report(run, local)
    assert local.read_text() == "<!doctype html><p>mine"
    with pytest.raises(OutputError, match="is a directory"):
        write_report(run, tmp_path)
    first = write_report(run, tmp_path / "new/page.html")
    assert write_report(run, first) == first


def test_an_exported_average(tmp_path: Path) -> None:
    origin = {"version": "0.1.0", "wrote": "an average", "candidates": ["a/x-1", "a/y-2"], "weights": [1.25, -0.25]}
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged/twa_scale.json").write_text(json.dumps(origin))
    path = write_report(tmp_path / "merged")
    page = Page(path)
    assert path == tmp_path / "merged-report.html"  # next to the output, so that `--overwrite` of the average allows it
    assert "a/x-1:1.25" in page.words and "a/y-2:-0.25" in page.words and "1 of 2 coefficients" in page.words


def test_averages_of_a_search(run: Path, tmp_path: Path) -> None:
    tried = [{"label": "ema:0.9", "score": 0.75}, {"label": "lawa:4", "score": 0.5}, {"label": "lawa:1", "score": 0.25}]
    summary = {"metric": "validation/accuracy", "num_candidates": 4, "tried": tried}
    for place in (run / "search", tmp_path / "alone/search"):
        (place / "average").mkdir(parents=True)
        (place / "summary.json").write_text(json.dumps(summary))
        origin = {"candidates": ["a-1", "a-2"], "weights": [0.25, 0.75]}
        (place / "average/twa_scale.json").write_text(json.dumps(origin))
    for place in (run, tmp_path / "alone", tmp_path / "alone/search"):
        words = " ".join(Page(write_report(place)).words.split())
        assert "validation/accuracy ema:0.9 0.75 mean of all 0.5 last candidate 0.25" in words
    (run / "search/summary.json").write_text(json.dumps({**summary, "tried": [1]}))
    with pytest.raises(StateError, match=r"search/summary\.json: tried\.0"):
        write_report(run)


def test_metrics_logged_by_a_trainer(tmp_path: Path) -> None:
    for step in (9, 10):
        history = [{"step": s, "loss": s / 2, "learning_rate": 0.1} for s in range(1, step)]
        history += [{"step": step, "eval_loss": 0.5, "epoch": 1.0}]
        learned = {"twa_loss": 0.5, "twa_distance": 0.25, "twa_coefficients/0": 1.0}
        history += [{"step": step, "twa_step": i, **learned} for i in (1, 2, 3)]
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text(json.dumps({"log_history": history}))
    page = Page(write_report(tmp_path))
    assert "eval/loss" in page.words and "step 10" in page.words and "Learning rate" in page.words
    assert "Loss while the coefficients are learned" in page.words and "coefficients/0" not in page.words


def test_effective_candidates() -> None:
    uniform, first, both = torch.full((5, 1), 0.2), torch.eye(5)[:, :1], torch.tensor([[1.5], [-0.5]])
    assert effective_candidates(uniform, [7]) == pytest.approx(5)
    assert effective_candidates(first, [7]) == pytest.approx(1)
    assert effective_candidates(both, [7]) == pytest.approx(1 / (1.5**2 + 0.5**2))
    assert effective_candidates(3 * uniform, [7]) == pytest.approx(5)  # with any sum
    two = torch.cat([uniform, first], 1)
    assert effective_candidates(two, [30, 10]) == pytest.approx(1 / (0.75 / 5 + 0.25))
    assert effective_candidates(torch.tensor([[1.0], [-1.0]]), [7]) == 0
    assert effective_candidates(torch.cat([first, torch.zeros(5, 1)], 1), [7, 0]) == pytest.approx(1)
    assert mean_coefficients(two, [30, 10]).tolist() == pytest.approx([0.4, 0.15, 0.15, 0.15, 0.15])


def test_positions_of_tensors() -> None:
    names = ["embed.weight", "h.0.mlp.up.weight", "h.11.mlp.experts.3.up.weight", "head.0"]
    actual = positions(names)
    assert [actual[name].block for name in names] == [OUTSIDE, "0", "11", OUTSIDE]
    assert [actual[name].kind for name in names[1:3]] == ["mlp.up.weight", "mlp.experts.*.up.weight"]
    assert positions(["encoder.0.a", "decoder.0.a"])["decoder.0.a"].block == "decoder.0"


def test_charts_of_odd_numbers() -> None:
    assert chart("none", [Curve("a", [(0, float("nan"))])], [Level("b", 1.0)]) is None
    for points in ([(3, 2.0)], [(0, 1.0), (1, 1.0)], [(0, -1e30), (5, 1e30)], [(i, i % 7) for i in range(5000)]):
        drawn = chart("t", [Curve("a", points, smooth=True), Curve("b", points)], [Level("c", float("inf"))])
        assert drawn is not None and len(drawn) < 60_000 and "nan" not in drawn and "inf" not in drawn
    assert ticks(0, 1, 4) == pytest.approx([0, 0.5, 1]) and ticks(2, 2, 4) == [2]
    assert merged({str(i): [float(i)] for i in range(5)}, 3) == {"0 to 1": [0.5], "2 to 3": [2.5], "4": [4.0]}


def test_the_figures_are_those_of_the_closing_table(run: Path) -> None:
    body = (run / "state.pt").read_bytes().partition(b"\n")[2]
    state = torch.load(BytesIO(body), weights_only=True)
    save_state(run, {**state, "finished": True, "course": {"steps": 20}})
    summary = {"steps": 20, "exported_step": 8, "verdict": "The average is better.", "exported_as": "exported: step 8"}
    methods = {"last candidate": 1.25, "center": 1.5, "trained": 1.125, "exported": 1.0625}
    summary["comparison"] = {name: {"validation/loss": value} for name, value in methods.items()}
    (run / "summary.json").write_text(json.dumps(summary))
    page = Page(write_report(run))
    cells = re.sub(r"\s+", " ", page.words)
    assert "last candidate 1.25 center 1.5" in cells and "trained, step 20 1.125 exported, step 8 1.0625" in cells
    assert "start (last), step 0 1.5" in cells and "The average is better." in cells
    (run / "summary.json").write_text(json.dumps({**summary, "comparison": 3}))
    with pytest.raises(StateError, match=r"summary\.json: comparison"):
        write_report(run)
