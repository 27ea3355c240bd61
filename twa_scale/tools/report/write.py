"""Read a run and write its report."""

from pathlib import Path

from twa_scale.base.paths import path_of
from twa_scale.errors import OutputError, StateError
from twa_scale.output.provenance import PROVENANCE
from twa_scale.output.publish import replace_file
from twa_scale.tools.report.page import page
from twa_scale.tools.report.run_data import read

REPORT = "report.html"
_BEGIN = b'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the report on a directory, and return the path of the page.

    Args:
        run: the output directory of `twa-scale run`, of an export, or of a trainer.
        out: the file. An older report is replaced. By default, report.html in the directory, or NAME-report.html next
            to an exported average, because `--overwrite` refuses directories with other files.

    Raises:
        StateError: there is nothing to report, or a file is damaged.
        OutputError: the page cannot be written, or its file was not written by twa_scale.
    """
    directory = path_of(run, StateError)
    data = read(directory)
    target = _default(directory.resolve()) if out is None else path_of(out, OutputError)
    if target.is_dir():
        raise OutputError(f"{target}: is a directory; name the file to write.")
    if target.exists() and not _is_page(target):
        raise OutputError(
            f"{target}: exists and is not a report of twa_scale; it was not changed. Choose another name."
        )
    replace_file(target, page(data).encode())
    return target


def _default(directory: Path) -> Path:
    is_output = (directory / PROVENANCE).exists()
    return directory.with_name(f"{directory.name}-{REPORT}") if is_output else directory / REPORT


def _is_page(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_BEGIN)) == _BEGIN
    except OSError:
        return False
