"""A page of HTML about a run, which needs no other file and no network."""

import shlex
import time
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from twa_scale.average.measures import COEFFICIENTS, DISTANCE, EFFECTIVE
from twa_scale.base.sizes import size_text
from twa_scale.config import RunConfig, flattened
from twa_scale.run import comparison
from twa_scale.run.search import rows as rows_of_search
from twa_scale.tools.report.coefficient_section import coefficient_section, mean_distance
from twa_scale.tools.report.curves import Curve, Level, chart
from twa_scale.tools.report.elements import Content, Html, el, joined, table
from twa_scale.tools.report.run_data import CONFIG, RunData, dumped
from twa_scale.version import __version__

_MAX_CHARTS = 12
_STATUS = {"finished": "finished", "running": "still running", "stopped": "not finished"}


def page(run: RunData) -> str:
    """Return the page."""
    name = run.directory.resolve().name
    style = files("twa_scale.tools.report").joinpath("page.css").read_text(encoding="utf-8")
    made = time.strftime("%Y-%m-%d %H:%M")
    body = el(
        "main",
        _header(run, name),
        _tiles(run),
        _methods(run),
        _searched(run),
        _curves(run),
        coefficient_section(run),
        _cost(run),
        _configuration(run),
        _provenance(run),
        el("footer", f"Written by twa_scale {__version__}, {made}."),
    )
    head = el(
        "head",
        Html('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        el("title", f"{name}: twa_scale report"),
        Html(f"<style>\n{style}</style>"),
    )
    return f"<!doctype html>\n{el('html', head, el('body', body), lang='en')}\n"


def _header(run: RunData, name: str) -> Html:
    summary = run.summary
    verdict = summary and (summary.verdict or summary.exported_as)
    waits = None
    if run.status != "finished":
        waits = "The page shows the results so far. Create it again for newer results. A finished run has a comparison."
    return joined(
        el("h1", name),
        el("p", el("span", _STATUS[run.status], class_=f"status {run.status}"), run.progress),
        el("p", verdict, class_="lead") if verdict else None,
        el("p", summary.advice, class_="soft") if summary and summary.advice else None,
        el("p", waits, class_="soft") if waits else None,
    )


def _tiles(run: RunData) -> Html | None:
    tiles = [el("div", el("b", value), el("span", label), class_="tile") for value, label in _figures(run)]
    return el("div", *tiles, class_="tiles") if tiles else None


def _figures(run: RunData) -> Iterator[tuple[str, str]]:
    """Yield the most important numbers with their descriptions."""
    summary, coefficients = run.summary, run.coefficients
    if summary:
        candidate = comparison.compared_candidate(summary.comparison)
        exported, other = (summary.comparison.get(k, {}) for k in (comparison.EXPORTED, candidate))
        for key in list(exported)[:1]:
            yield f"{exported[key]:.5g}", f"{key} of the average"
            if key in other:
                yield f"{other[key]:.5g}", f"{key} of the {candidate}"
    if coefficients:
        yield f"{coefficients.effective:.2f} of {len(coefficients.labels)}", "effective candidates"
    if summary and summary.distance is not None:
        mean = mean_distance(summary.candidate_distances)
        compared = f" (candidates: {mean:.3g} on average)" if mean else ""
        yield f"{summary.distance:.3g}", f"distance from the center{compared}"
    if run.step is not None:
        yield f"{run.step}", "steps"
    if seconds := sum(record.get("seconds", 0.0) for record in run.records):
        yield _duration(seconds), "time of the recorded steps"


def _methods(run: RunData) -> Html | None:
    rows = _compared(run)
    if not rows:
        return None
    names = list(dict.fromkeys(name for _, metrics in rows for name in metrics))
    cells: list[list[Content]] = [
        [label, *(f"{metrics[name]:.6g}" if name in metrics else "" for name in names)] for label, metrics in rows
    ]
    exported = run.summary.exported_as if run.summary else None
    return joined(
        el("h2", "Methods on held-out data"),
        table(["weights", *names], cells, marked=len(rows) - 1),
        el("p", f"{exported[0].upper()}{exported[1:]}.", class_="note") if exported else None,
    )


def _searched(run: RunData) -> Html | None:
    search = run.search
    if search is None or not search.tried:
        return None
    cells: list[list[Content]] = [[label, f"{score:.6g}"] for label, score in rows_of_search(search.model_dump())]
    return joined(
        el("h2", f"Averages of a search: {len(search.tried)}, best first"),
        table(["average", search.metric], cells, marked=0),
    )


def _compared(run: RunData) -> list[tuple[str, dict[str, float]]]:
    """Return the rows of the table: those of a finished run, or the first and the last evaluation so far."""
    start = run.config.get("start", "center")
    first = next((metrics for step, metrics in _evaluations(run) if step == 0), None)
    if run.summary:
        rows = comparison.rows(run.summary.model_dump())
        if first and start != "center":
            rows.insert(-2 if len(rows) > 1 else 0, (f"start ({dumped(start)}), step 0", first))
        return rows
    evaluations = _evaluations(run)
    ends = [evaluations[0], evaluations[-1]] if len(evaluations) > 1 else evaluations
    return [(f"step {step}", metrics) for step, metrics in ends]


def _evaluations(run: RunData) -> list[tuple[int, dict[str, float]]]:
    result = []
    for record in run.records:
        metrics = {key: value for key, value in record.items() if "/" in key and not key.startswith(COEFFICIENTS)}
        if metrics:
            result.append((record["step"], metrics))
    return result


def _curves(run: RunData) -> Html | None:
    charts = [drawn for drawn in _charts(run) if drawn is not None]
    if not charts:
        return None
    left_out = len(charts) - _MAX_CHARTS
    note = f"{left_out} more metrics are in metrics.jsonl." if left_out > 0 else None
    return joined(
        el("h2", "Curves"),
        el("div", *charts[:_MAX_CHARTS], class_="charts"),
        el("p", note, class_="note") if note else None,
    )


def _charts(run: RunData) -> Iterator[Html | None]:
    records = run.records
    compared = run.summary.comparison if run.summary else {}
    by_metric: dict[str, list[str]] = {}
    for key in dict.fromkeys(key for _, metrics in _evaluations(run) for key in metrics):
        by_metric.setdefault(key.rpartition("/")[2], []).append(key)
    training = Curve("mean of the steps near", _points(records, "loss"), 5, smooth=True)
    band = "Band: lowest and highest value of nearby steps." if len(training.points) > 2 else None
    held_out = by_metric.pop("loss", [])
    # Separate from the training batches, whose losses differ more than the average improves.
    yield chart("Loss, evaluations", _of_keys(records, held_out), _levels(compared, held_out))
    yield chart("Loss, training batches", [training], (), band)
    for name, keys in by_metric.items():
        yield chart(name, _of_keys(records, keys), _levels(compared, keys))
    learned = [(record["twa_step"], record["twa_loss"]) for record in records if "twa_loss" in record]
    yield chart("Loss while the coefficients are learned", [Curve("training batches", learned, 5, smooth=True)])
    for title, key, color in (
        ("Effective number of candidates", EFFECTIVE, 0),
        ("Distance from the center", DISTANCE, 2),
        ("Learning rate", "lr", 3),
    ):
        yield chart(title, [Curve(key, _points(records, key), color)])


def _of_keys(records: Any, keys: list[str]) -> list[Curve]:
    return [Curve(key.rpartition("/")[0], _points(records, key), (1 + i) % 6) for i, key in enumerate(keys)]


def _points(records: Any, key: str) -> list[tuple[float, float]]:
    return [(record["step"], record[key]) for record in records if key in record]


def _levels(compared: Mapping[str, Mapping[str, float]], keys: list[str]) -> list[Level]:
    return [
        Level(name, compared[name][key], color)
        for key in keys[:1]
        for name, color in ((comparison.compared_candidate(compared), 3), (comparison.CENTER, 0))
        if key in compared.get(name, {})
    ]


def _cost(run: RunData) -> Html | None:
    summary = run.summary
    trained = sum(record.get("seconds", 0.0) for record in run.records)
    evaluations = len(_evaluations(run))
    rows: list[list[Content]] = []
    if run.is_run and run.step:
        rows.append(["steps", f"{run.step}"])
        rows.append(["evaluations", f"{evaluations}{' and 2 for the comparison' if _is_compared(run) else ''}"])
    if trained:
        rows.append(["time of the recorded steps", _duration(trained)])
    if summary:
        rows += [["ranks", f"{summary.ranks}"]]
        times = {"reading candidates": summary.attach_seconds, "writing the average": summary.export_seconds}
        rows += [[name, _duration(seconds)] for name, seconds in times.items() if seconds is not None]
        for name, per_rank in (
            ("read from candidates", summary.bytes_read_per_rank),
            ("deltas and center in memory", summary.store_bytes_per_rank),
            ("peak memory of a process", summary.peak_resident_bytes_per_rank),
        ):
            if per_rank:
                rows.append([f"{name}{', largest rank' if len(per_rank) > 1 else ''}", size_text(max(per_rank))])
    if not rows:
        return None
    return joined(el("h2", "Cost"), table([], rows), _step_cost(run))


def _step_cost(run: RunData) -> Html | None:
    summary = run.summary
    if not summary or not summary.cost or summary.forward_backward_seconds is None:
        return None
    total_seconds = summary.forward_backward_seconds
    parts = {"forward and backward": total_seconds, **{name: part.seconds for name, part in summary.cost.items()}}
    total = sum(parts.values()) or 1.0
    rows: list[list[Content]] = [
        [name, f"{seconds * 1e3:.2f}", f"{seconds / total:.1%}"] for name, seconds in parts.items()
    ]
    return joined(el("p", "One step of rank 0, without reading batches:"), table(["part", "ms", "share"], rows))


def _is_compared(run: RunData) -> bool:
    return run.summary is not None and comparison.LAST in run.summary.comparison


def _configuration(run: RunData) -> Html | None:
    if not run.config:
        return None
    defaults = dict(flattened(_defaults(RunConfig)))
    settings = dict(flattened(run.config))
    changed: list[list[Content]] = [
        [key, dumped(value), dumped(defaults[key]) if key in defaults else ""]
        for key, value in settings.items()
        if key not in defaults or defaults[key] != value
    ]
    table_rows: list[list[Content]] = [[key, dumped(value)] for key, value in settings.items()]
    return joined(
        el("h2", "Configuration"),
        el("div", table(["setting", "value", "default"], changed, first=3), class_="settings"),
        el(
            "details",
            el("summary", f"All {len(table_rows)} settings"),
            el("div", table(["setting", "value"], table_rows, first=2), class_="settings"),
        ),
    )


def _defaults(model: type[BaseModel]) -> dict[str, Any]:
    """Return the defaults of a section of the configuration, as JSON has them."""
    result = {}
    for name, field in model.model_fields.items():
        if not field.is_required():
            value = field.get_default(call_default_factory=True)
            result[name] = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    return result


def _provenance(run: RunData) -> Html:
    origin, summary = run.origin, run.summary
    version = (summary and summary.version) or (origin and origin.version)
    rows: list[list[Content]] = [["directory", str(run.directory)]]
    if version:
        rows.append(["written by", f"twa_scale {version}"])
    if origin:
        rows.append(["content", origin.wrote])
    if run.coefficients_of:
        rows.append(["coefficients", run.coefficients_of])
    paths = run.paths or (run.coefficients.labels if run.coefficients else ())
    listed = el("details", el("summary", f"{len(paths)} candidates"), el("pre", "\n".join(paths))) if paths else None
    return joined(
        el("h2", "Provenance"),
        table([], rows, first=2),
        listed,
        el("h2", "Reproduce"),
        *(joined(el("p", text), el("pre", command)) for text, command in _commands(run)),
    )


def _commands(run: RunData) -> Iterator[tuple[str, str]]:
    """Yield the sentences and commands that reproduce results."""
    directory, coefficients = str(run.directory), run.coefficients
    if run.is_run and run.config:
        ranks = run.summary.ranks if run.summary else 1
        program = f"torchrun --nproc-per-node {ranks} -m twa_scale" if ranks > 1 else "twa-scale"
        config = shlex.quote(str(Path(directory) / CONFIG))
        yield (
            "Train again with the same settings, in the directory in which the run was started:",
            f"{program} run {config} output={shlex.quote(directory + '-again')}",
        )
    if run.is_run and coefficients:
        yield (
            "Write the exact merge from the coefficients and the candidates, without the model:",
            f"twa-scale export {shlex.quote(directory)} --out merged",
        )
    if coefficients and coefficients.values.shape[1] == 1 and not run.corrects_rows:
        pairs = zip(run.paths or coefficients.labels, coefficients.values[:, 0].tolist(), strict=True)
        words = " \\\n  ".join(shlex.quote(f"{path}:{a!r}") for path, a in pairs)
        yield "The same average with fixed weights:", f"twa-scale average {words} \\\n  --out merged"
    yield "Create this page again:", f"twa-scale report {shlex.quote(directory)}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
