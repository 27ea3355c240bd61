"""Canvases with garments of Fashion-MNIST at several scales, with overlap and clutter, in COCO's format."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from examples.proof.images.data import read
from examples.shared_directory import make_once

Pixels = npt.NDArray[np.uint8]

SIZE = 64  # pixels of a canvas in each direction
GARMENTS = (2, 6)  # smallest and largest number of garments that are tried on a canvas
SIDES = (14, 36)  # smallest and largest side of a scaled garment, in pixels; the originals have 28
FRAGMENTS = (4, 10)  # pieces of other garments
VISIBLE = 0.5  # the smallest fraction of each garment that stays visible
NAMES = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def write_canvases(directory: Path, sizes: dict[str, int], packages: Path) -> None:
    """Write a folder of images and a file of annotations for each split into `directory`: train/ and train.json.

    Training and validation have different garments of the training set of Fashion-MNIST, and the test split has those
    of its test set.

    Args:
        directory: if it is finished, with the same sizes, it is left as it is.
        sizes: the number of canvases of each split.
        packages: where the Debian package of the garments is.
    """

    def write(into: Path) -> None:
        into.mkdir()
        values = read(packages)
        known = {"train": slice(0, 55_000), "validation": slice(55_000, None), "test": slice(None)}
        for seed, (split, number) in enumerate(sizes.items()):
            source = "t10k" if split == "test" else "train"
            garments, kinds = (values[f"{source}-{part}"][known[split]] for part in ("images", "labels"))
            generators = (np.random.default_rng([seed, i]) for i in range(number))
            write_split(into, split, (canvas(garments, kinds, generator) for generator in generators))

    make_once(directory, sizes, write)


def write_split(into: Path, split: str, canvases: Iterable["Canvas"]) -> None:
    """Write the images and the annotations of a split."""
    (into / split).mkdir()
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    for number, one in enumerate(canvases):
        name = f"{number:05}.png"
        Image.fromarray(one.pixels).save(into / split / name)
        images.append({"id": number, "file_name": name, "width": SIZE, "height": SIZE})
        for kind, box in one.objects:
            place = {"id": len(objects) + 1, "image_id": number, "category_id": kind, "bbox": box}
            objects.append({**place, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": number, "name": name} for number, name in enumerate(NAMES)]
    content = {"images": images, "annotations": objects, "categories": categories}
    (into / f"{split}.json").write_text(json.dumps(content))


class Canvas:
    """A picture to which garments are added, each over the earlier ones.

    Args:
        pixels: the background, uint8 (SIZE, SIZE).
    """

    def __init__(self, pixels: Pixels) -> None:
        self.pixels = pixels
        self.objects: list[tuple[int, list[int]]] = []
        """The kind of each garment, and the left, top, width and height of all of it, also of what is covered."""
        self._owner = np.zeros(pixels.shape, int)  # the number of the object that is seen at a pixel, from 1
        self._areas: list[int] = []

    def add(self, garment: Pixels, kind: int | None, left: int, top: int) -> None:
        """Add a garment, or a fragment if `kind` is None. One that would hide too much of an object is left out."""
        height, width = garment.shape
        there = np.zeros(self.pixels.shape, bool)
        there[top : top + height, left : left + width] = garment > 0
        owner = np.where(there, len(self._areas) + 1 if kind is not None else 0, self._owner)
        seen = np.bincount(owner.ravel(), minlength=len(self._areas) + 1)[1 : len(self._areas) + 1]
        if not there.any() or any(seen < VISIBLE * np.array(self._areas)):
            return
        self._owner = owner
        self.pixels[top : top + height, left : left + width][garment > 0] = garment[garment > 0]
        if kind is not None:
            self._areas.append(int(there.sum()))
            rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
            first, last = (columns[0], rows[0]), (columns[-1] + 1, rows[-1] + 1)
            self.objects.append((kind, [int(n) for n in (*first, last[0] - first[0], last[1] - first[1])]))


def canvas(garments: Pixels, kinds: Pixels, generator: np.random.Generator) -> Canvas:
    """Draw a canvas: noise, fragments, garments, and two fragments in front.

    Args:
        garments: uint8 (N, 28, 28).
        kinds: the class of each garment, an index into NAMES, (N,).
        generator: draws all that is random.
    """
    noise = generator.normal(generator.uniform(10, 60), 12, (SIZE, SIZE))
    drawn = Canvas(noise.clip(0, 255).astype(np.uint8))
    for _ in range(generator.integers(*FRAGMENTS, endpoint=True)):
        place(drawn, fragment(garments, generator), None, generator)
    for _ in range(generator.integers(*GARMENTS, endpoint=True)):
        chosen = generator.integers(len(garments))
        place(drawn, scaled(garments[chosen], generator), int(kinds[chosen]), generator)
    for _ in range(2):
        place(drawn, fragment(garments, generator), None, generator)
    return drawn


def place(drawn: Canvas, garment: Pixels, kind: int | None, generator: np.random.Generator) -> None:
    """Add a garment at a random place, all of which is inside."""
    left, top = (int(generator.integers(SIZE - side, endpoint=True)) for side in reversed(garment.shape))
    drawn.add(garment, kind, left, top)


def fragment(garments: Pixels, generator: np.random.Generator) -> Pixels:
    """Return a small piece of a garment."""
    size = int(generator.integers(4, 9))
    left, top = generator.integers(28 - size, size=2)
    piece: Pixels = garments[generator.integers(len(garments))][top : top + size, left : left + size]
    return piece


def scaled(garment: Pixels, generator: np.random.Generator) -> Pixels:
    """Return a garment at a random scale and brightness, flipped or not. The smallest values count as background."""
    side = int(generator.integers(*SIDES, endpoint=True))
    pixels = np.asarray(Image.fromarray(garment).resize((side, side), Image.Resampling.BILINEAR), np.float32)
    pixels = np.where(pixels > 16, pixels * generator.uniform(0.5, 1.0), 0)
    flipped: Pixels = (pixels[:, ::-1] if generator.random() < 0.5 else pixels).astype(np.uint8)
    return flipped
