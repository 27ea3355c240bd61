"""Checks that a run replaces only what earlier runs have written into its output directory."""

import os
from collections.abc import Mapping
from pathlib import Path

from twa_scale.average.state import PREVIOUS, STATE, has_state
from twa_scale.base.names import quoted
from twa_scale.base.notices import ignore_notice
from twa_scale.candidates.find import find_sources
from twa_scale.config import RunConfig
from twa_scale.errors import OutputError
from twa_scale.output.publish import check_inputs_outside
from twa_scale.run.csv_file import CSV
from twa_scale.run.records import METRICS
from twa_scale.run.resume import AVERAGE, SUMMARY, read_object
from twa_scale.run.services import IDS, is_ids

CONFIG = "config.json"
PICTURE = "coefficients.png"
ROWS_PICTURE = "rows.png"
_REPLACED = (CONFIG, METRICS, CSV, STATE, PREVIOUS, SUMMARY, PICTURE, ROWS_PICTURE, IDS)
_KEYS = {"candidates", "output"}  # in the configuration of a run, not in that of a model


def require_own_files(output: Path) -> None:
    """Check that an earlier run has written the files that a run replaces.

    Its config.json shows this, or if that is damaged, its state.

    Raises:
        OutputError: names the files of others, for example the config.json of a model; or `output` is a file.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is a file; the output is a directory. Choose another name.")
    config = read_object(output / CONFIG)
    if (config is None and has_state(output)) or (config is not None and config.keys() >= _KEYS):
        return
    others = [name for name in _REPLACED if os.path.lexists(output / name)]
    if IDS in others and is_ids(read_object(output / IDS)):  # of a run that ended before it wrote its config.json
        others.remove(IDS)
    if others:
        raise OutputError(
            f"{output}: holds {quoted(others)}, which the run would replace, but no {CONFIG} of an earlier run. Choose "
            f"another output directory, such as {str(output / 'twa')!r}."
        )


def require_candidates_outside(output: Path, config: RunConfig) -> None:
    """Check that no candidate is `output`, or inside the directory of the average, which is replaced.

    Raises:
        OutputError: names the candidate.
        CandidateError, ConfigError: there are no candidates.
    """
    sources = find_sources(config.candidates, 1, ignore_notice, config.select)
    labels = [str(source) for source in sources if not isinstance(source, Mapping)]
    if str(output.resolve()) in {str(Path(label).resolve()) for label in labels}:
        raise OutputError(f"{output}: is a candidate. Choose another output directory.")
    check_inputs_outside(output / AVERAGE, labels)
