"""Annotations of objects in the format of COCO, and average precision."""

import contextlib
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twa_scale.base.inputs import brief, open_regular
from twa_scale.base.names import quoted
from twa_scale.errors import ConfigError
from twa_scale.run.tasks.packages import require_module

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Annotated:
    """An image and its objects."""

    identity: int
    """The id of the image in the COCO file."""
    file: Path
    boxes: Array
    """float64 (N, 4): left, top, width and height in pixels."""
    categories: Array
    """int64 (N,): the category of each box."""
    areas: Array
    """float64 (N,): the area of each object in pixels."""
    crowd: Array
    """bool (N,): whether a box contains a group of objects, which training ignores."""


@dataclass(frozen=True)
class Detections:
    """The objects that a model finds in an image, and the annotated objects."""

    truth: Annotated
    boxes: Array
    """float64 (N, 4): left, top, width and height in pixels."""
    categories: Array
    """int64 (N,): the category of each box."""
    scores: Array
    """float64 (N,): the score of each box, by which boxes are ranked."""


def read_annotations(path: Path, images: Path, setting: str) -> tuple[list[Annotated], dict[int, str]]:
    """Return the images of a COCO file in its order, and the name of each category.

    Args:
        path: the JSON file, with `images`, `annotations` and `categories`.
        images: the folder of the images.
        setting: the setting in error messages.

    Raises:
        ConfigError: the file cannot be read, or an entry lacks a key or has a value of another kind.
    """
    try:
        with os.fdopen(open_regular(path, ConfigError), encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{setting}: {path} cannot be read as JSON: {error}.") from error
    parts = content if isinstance(content, dict) else {}
    lacking = [key for key in ("images", "annotations", "categories") if not isinstance(parts.get(key), list)]
    if lacking:
        raise ConfigError(
            f"{setting}: {path} has no list {quoted(lacking)}. Write it in the format of COCO (instances)."
        )
    names = {_entry(c, "id", int, path, "categories", i): str(c.get("name")) for i, c in enumerate(parts["categories"])}
    objects: dict[int, list[dict[str, Any]]] = {}
    for i, image in enumerate(parts["images"]):
        objects[_entry(image, "id", int, path, "images", i)] = []
    for i, annotation in enumerate(parts["annotations"]):
        _check_object(annotation, objects, names, path, i)
        objects[annotation["image_id"]].append(annotation)
    annotated = [
        _annotated(image["id"], images / _entry(image, "file_name", str, path, "images", i), objects[image["id"]])
        for i, image in enumerate(parts["images"])
    ]
    if not annotated:
        raise ConfigError(f"{setting}: {path} has no images.")
    if gone := next((image.file for image in annotated if not image.file.is_file()), None):
        raise ConfigError(f"{setting}: {gone}, which {path} names, does not exist. Set the folder `images`.")
    return annotated, names


def pycocotools() -> tuple[Any, Any]:
    """Return the modules `coco` and `cocoeval` of pycocotools.

    Raises:
        ConfigError: it is not installed.
    """
    coco, cocoeval = (
        require_module(f"pycocotools.{name}", "task: the average precision needs pycocotools", "twa-scale[detection]")
        for name in ("coco", "cocoeval")
    )
    return coco, cocoeval


def average_precision(images: Sequence[Detections]) -> dict[str, float]:
    """Return the mean average precision over IoU 0.5 to 0.95 (`ap`) and at IoU 0.5 (`ap50`), as pycocotools.

    Raises:
        ConfigError: pycocotools is not installed, or no image has an object.
    """
    coco, cocoeval = pycocotools()
    unique = {detections.truth.identity: detections for detections in images}
    ordered = [unique[identity] for identity in sorted(unique)]
    truth, detected = _truth(ordered), _detected(ordered)
    if not any(not annotation["iscrowd"] for annotation in truth["annotations"]):
        raise ConfigError("task: none of the evaluated images has an object. Evaluate more of them.")
    if not detected:
        return {"ap": 0.0, "ap50": 0.0}
    with contextlib.redirect_stdout(io.StringIO()):
        expected = coco.COCO()
        expected.dataset = truth
        expected.createIndex()
        evaluation = cocoeval.COCOeval(expected, expected.loadRes(detected), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {"ap": float(evaluation.stats[0]), "ap50": float(evaluation.stats[1])}


def _truth(detections_of_images: list[Detections]) -> dict[str, Any]:
    annotations: list[dict[str, Any]] = []
    for image in (detections.truth for detections in detections_of_images):
        for box, category, area, crowd in zip(image.boxes, image.categories, image.areas, image.crowd, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image.identity,
                    "category_id": int(category),
                    "bbox": box.tolist(),
                    "area": float(area),
                    "iscrowd": int(crowd),
                }
            )
    categories = sorted(
        {a["category_id"] for a in annotations} | {int(c) for d in detections_of_images for c in d.categories}
    )
    images = [{"id": detections.truth.identity} for detections in detections_of_images]
    return {"images": images, "annotations": annotations, "categories": [{"id": c} for c in categories]}


def _detected(detections_of_images: list[Detections]) -> list[dict[str, Any]]:
    return [
        {"image_id": d.truth.identity, "category_id": int(category), "bbox": box.tolist(), "score": float(score)}
        for d in detections_of_images
        for box, category, score in zip(d.boxes, d.categories, d.scores, strict=True)
    ]


def _annotated(identity: int, file: Path, objects: list[dict[str, Any]]) -> Annotated:
    boxes = np.array([entry["bbox"] for entry in objects], np.float64).reshape(-1, 4)
    areas = [float(entry.get("area", box[2] * box[3])) for entry, box in zip(objects, boxes, strict=True)]
    return Annotated(
        identity,
        file,
        boxes,
        np.array([entry["category_id"] for entry in objects], np.int64),
        np.array(areas, np.float64),
        np.array([bool(entry.get("iscrowd", 0)) for entry in objects], bool),
    )


def _check_object(annotation: Any, images: dict[int, Any], names: dict[int, str], path: Path, i: int) -> None:
    image, category = (_entry(annotation, key, int, path, "annotations", i) for key in ("image_id", "category_id"))
    box = _entry(annotation, "bbox", list, path, "annotations", i)
    location = f"{path}, annotations[{i}]"
    if len(box) != 4 or not all(isinstance(n, int | float) and np.isfinite(n) for n in box):
        raise ConfigError(f"{location}: bbox {brief(box)} is not [left, top, width, height] in pixels.")
    for key, value, part, known in (
        ("image_id", image, "images", images),
        ("category_id", category, "categories", names),
    ):
        if value not in known:
            raise ConfigError(f"{location}: {key} {value} is not the id of an entry of `{part}`.")


def _entry(entry: Any, key: str, kind: type, path: Path, part: str, i: int) -> Any:
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        kind_name = {int: "an integer", str: "a text", list: "a list"}[kind]
        raise ConfigError(f"{path}, {part}[{i}]: {key!r} is {brief(value)}. The format of COCO has {kind_name} there.")
    return value
