"""Fashion-MNIST from its Debian package: 70,000 images of 28 x 28 pixels of ten kinds of clothes."""

import gzip
from pathlib import Path

import numpy as np
import numpy.typing as npt

from examples.proof.packages import members
from examples.shared_directory import make_once

PACKAGE = "dataset-fashion-mnist"
HEADER = {"images": 16, "labels": 8}  # bytes of an IDX file before its values


def write_images(directory: Path, num_train: int, num_validation: int, packages: Path) -> None:
    """Write train.npz, validation.npz and test.npz into `directory`.

    Args:
        directory: if it is finished, with the same arguments, it is left as it is.
        num_train: how many of the 60,000 images of the training set to train on.
        num_validation: how many others of them are held out. The test set has 10,000 images.
        packages: where the Debian package is.
    """

    def write(into: Path) -> None:
        into.mkdir()
        values = read(packages)
        order = np.random.default_rng(0).permutation(len(values["train-labels"]))
        train, validation = order[:num_train], order[num_train : num_train + num_validation]
        for split, chosen in {"train": train, "validation": validation}.items():
            save(into / f"{split}.npz", values["train-images"][chosen], values["train-labels"][chosen])
        save(into / "test.npz", values["t10k-images"], values["t10k-labels"])

    make_once(directory, {"train": num_train, "validation": num_validation}, write)


def read(packages: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """Return the arrays of the package, for example `train-images`, (60000, 28, 28)."""
    found = {}
    for path, content in members(packages, PACKAGE):
        name = Path(path).name
        if name.endswith("-ubyte.gz"):
            which, kind = name.split("-")[:2]
            values = np.frombuffer(gzip.decompress(content), np.uint8, offset=HEADER[kind])
            found[f"{which}-{kind}"] = values.reshape(-1, 28, 28) if kind == "images" else values
    return found


def save(path: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> None:
    np.savez(path, images=images[:, None], labels=labels.astype(np.int64))
