"""Compare TWA with other methods at equal cost: `make proof`.

Work is done in parts, whose results are kept below --out: the same command continues after an interruption. A final
seed reads the test split when all of its methods are finished. Other seeds are for development and never read it.
"""

import argparse
from importlib import import_module
from pathlib import Path

from examples.proof.page import PAGE, updated
from examples.proof.parts import run_parts
from examples.proof.table import tables

TASKS = {"language": "Language", "soup": "Soup"}  # the class in the module `task` of the folder


def main() -> None:
    """Run the parts that are missing, then print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, nargs="+", default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="*", help="the final ones when not given; none: only the tables")
    parser.add_argument("--size", choices=["full", "small", "tiny"], default="full")
    parser.add_argument("--out", type=Path, default=Path("runs/proof"))
    parser.add_argument("--packages", type=Path, default=Path("runs/proof/packages"), help="Debian packages of texts")
    parser.add_argument("--sentences", type=Path, help="source archive of vaderSentiment 3.3.2, for `soup`")
    parser.add_argument("--page", action="store_true", help=f"write the tables into {PAGE.name}")
    arguments = parser.parse_args()
    sources = {"language": arguments.packages, "soup": arguments.sentences}
    for task in arguments.task:
        out = arguments.out / task
        work = getattr(import_module(f"examples.proof.{task}.task"), TASKS[task])  # Soup loads transformers
        settings = work.read(arguments.size)
        for seed in settings["seeds"] if arguments.seeds is None else arguments.seeds:
            one = work(out, seed, settings, sources[task])
            run_parts(one.parts(), one.rows)
        written = tables(out, settings)
        print(written)
        if arguments.page:
            PAGE.write_text(updated(PAGE.read_text(), task, written))


if __name__ == "__main__":
    main()
