"""Compare TWA with other methods at equal cost: `make proof`.

Work is done in parts, whose results are kept below --out: the same command continues after an interruption. A final
seed reads the test split when all of its methods are finished. Other seeds are for development and never read it.
"""

import argparse
from pathlib import Path

from examples.proof.language.task import Language, read_settings
from examples.proof.page import PAGE, updated
from examples.proof.parts import run_parts
from examples.proof.table import tables

TASKS = {"language": Language}


def main() -> None:
    """Run the parts that are missing, then print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", help="the final ones when not given; none: only the tables")
    parser.add_argument("--size", choices=["full", "small", "tiny"], default="full")
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--packages", type=Path, default=Path("runs/proof/packages"))
    parser.add_argument("--page", action="store_true", help=f"write the tables into {PAGE.name}")
    arguments = parser.parse_args()
    for task in arguments.task:
        settings = read_settings(arguments.size)
        out = arguments.out / task
        seeds = settings["seeds"] if arguments.seeds is None else arguments.seeds
        for seed in seeds:
            work = TASKS[task](out, seed, arguments.size, arguments.packages)
            run_parts(work.parts(), work.rows)
        written = tables(out, settings)
        print(written)
        if arguments.page:
            PAGE.write_text(updated(PAGE.read_text(), task, written))


if __name__ == "__main__":
    main()
