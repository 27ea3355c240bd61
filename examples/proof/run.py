"""Compare TWA with other methods at equal cost: `make proof`.

Work is done in parts, whose results are kept below --out: the same command continues after an interruption. A final
seed reads the test split when all of its methods are finished. Other seeds are for development and never read it: their
tables have losses on the validation split.
"""

import argparse
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from examples.proof.page import PAGE, updated
from examples.proof.parts import Row, check_rows, run_parts
from examples.proof.stored_rows import keep, kept_rows
from examples.proof.table import tables
from examples.proof.work import Settings, Work
from twa_scale.errors import ConfigError
from twa_scale.ranks import World

# The class in the module `task` of the folder.
TASKS = {
    "language": "Language",
    "images": "Images",
    "vit": "Vit",
    "detection": "Detection",
    "soup": "Soup",
    "adapters": "Adapters",
}
# The sizes whose tables the page has. Only the first has final seeds.
ON_PAGE = ("full", "trials", "oracle")


@dataclass(frozen=True)
class Comparison:
    """The seeds of one task that a command runs."""

    name: str
    """Of its tables on the page, and of the directory of its results."""
    kind: Any
    """The class of the work on one seed."""
    out: Path
    settings: Settings
    source: Path | None
    """The archive or directory that the data come from."""
    seeds: list[int]
    results: Path | None = None
    """The directory of the repository that keeps the rows of finished seeds, if any."""

    @property
    def final(self) -> list[int]:
        """Return the seeds by which no settings may be chosen."""
        seeds: list[int] = self.kind.read("full")["seeds"]
        return seeds

    @property
    def others(self) -> list[int]:
        """Return the seeds that the page does not have."""
        return [seed for seed in self.seeds if seed not in seeds_on_page(self.settings)]

    @property
    def shown(self) -> list[int]:
        """Return the seeds of the tables."""
        return self.others or seeds_on_page(self.settings)

    def work(self, seed: int) -> Work:
        made: Work = self.kind(self.out, seed, self.settings, self.source)
        return made

    def kept(self) -> dict[int, Mapping[str, Row]]:
        """Return the rows that the repository has of the seeds of the tables."""
        return {seed: kept_rows(path, self.work(seed).parts()) for seed, path in self._files(self.shown)}

    def keep(self) -> None:
        """Write the rows of the seeds that this command has run into the repository."""
        for seed, path in self._files(self.seeds):
            work = self.work(seed)
            keep(path, work.parts(), work.rows)

    def _files(self, seeds: list[int]) -> list[tuple[int, Path]]:
        return [(seed, self.results / f"seed-{seed}.json") for seed in seeds] if self.results else []


def main() -> None:
    """Run the parts that are missing, then print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", help="all of the page when not given; none: only the tables")
    parser.add_argument(
        "--size",
        choices=[*ON_PAGE, "large", "small", "tiny"],
        default="full",
        help="trials: settings of recipes, on other seeds; oracle: the best coefficients for the validation data; "
        "large: of models, for a GPU (language and images)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the models")
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument(
        "--packages", type=Path, default=Path("runs/proof/packages"), help="Debian packages of texts and images"
    )
    parser.add_argument("--sentences", type=Path, help="source archive of vaderSentiment 3.3.2, for soups")
    parser.add_argument(
        "--page", action="store_true", help=f"write the tables into {PAGE.name}, and keep the rows of --seeds"
    )
    arguments = parser.parse_args()
    if arguments.page and (arguments.size not in ON_PAGE or arguments.device != "cpu"):
        asked = f"--size {arguments.size} --device {arguments.device}"
        parser.error(f"--page: {PAGE.name} has no tables of {asked}; leave --page out")
    try:
        World.from_environment().device(arguments.device)
        comparisons = {task: comparison(task, arguments) for task in arguments.task}
    except ConfigError as error:
        parser.error(str(error))
    for one in comparisons.values():
        if message := wrong_seeds(one, arguments):
            parser.error(message)
    check(list(comparisons.values()), arguments.out)
    for one in comparisons.values():
        for seed in one.seeds:
            work = one.work(seed)
            run_parts(work.parts(), work.rows)
        if arguments.page:
            one.keep()
        written = tables(one.out, one.settings, one.shown, one.kept())
        print(written)
        if arguments.page:
            PAGE.write_text(updated(PAGE.read_text(), one.name, written))


def comparison(task: str, arguments: argparse.Namespace) -> Comparison:
    """Return what the arguments of the command ask of a task."""
    kind = getattr(import_module(f"examples.proof.{task}.task"), TASKS[task])  # Soup loads transformers
    settings = kind.read(arguments.size)
    source = getattr(arguments, kind.source)
    seeds = seeds_on_page(settings) if arguments.seeds is None else arguments.seeds
    name = task + ("" if arguments.size == "full" else f"-{arguments.size}")
    results = Path(__file__).with_name("results") / name if arguments.size in ON_PAGE else None
    if arguments.device != "cpu":  # the rows of the CPU do not have it among their settings
        settings["device"], name, results = arguments.device, f"{name}-{arguments.device}", None
    return Comparison(name, kind, arguments.out / name, settings, source, seeds, results)


def seeds_on_page(settings: Settings) -> list[int]:
    """Return the seeds whose tables the page has: the final ones, or for trials those of development."""
    seeds: list[int] = settings["seeds"] or settings.get("development", [])
    return seeds


def wrong_seeds(one: Comparison, arguments: argparse.Namespace) -> str | None:
    """Return why a command must not run the seeds of a task, if so."""
    known = numbers(seeds_on_page(one.settings))
    if arguments.page and one.others:
        return (
            f"--page: {one.name}: {PAGE.name} has the seeds {known}, not {numbers(one.others)}; give some of these, or "
            "leave --page out"
        )
    if arguments.size in ON_PAGE[1:] and (final := [seed for seed in one.others if seed in one.final]):
        return f"{one.name}: the final seeds {numbers(final)} are for the final methods alone; give some of {known}"
    return None


def numbers(seeds: list[int]) -> str:
    return ", ".join(map(str, seeds))


def check(comparisons: list[Comparison], out: Path) -> None:
    """Find before hours of work what would end it.

    Raises:
        SystemExit: a row was made with other settings, an input is missing, or the disk is too full.
    """
    num_bytes = 0
    for one in comparisons:
        one.kept()
        for seed in sorted({*one.seeds, *one.shown}):
            work = one.work(seed)
            check_rows(work.parts(), work.rows)
            if seed in one.seeds and work.missing():
                work.check_inputs()
                num_bytes += work.bytes_needed()
    check_space(out, num_bytes)


def check_space(out: Path, num_bytes: int) -> None:
    """Raise a SystemExit if less than `num_bytes` is free on the disk of `out`."""
    free = shutil.disk_usage(next(path for path in (out, *out.resolve().parents) if path.exists())).free
    if free < num_bytes:
        raise SystemExit(f"{out}: about {num_bytes / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free there")


if __name__ == "__main__":
    main()
