"""The task `object_detection`: a Hugging Face detection model or one of your own, on annotations in COCO's format."""

from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from twa_scale.base.inputs import named_errors
from twa_scale.base.paths import path_of
from twa_scale.config import Count, Section
from twa_scale.errors import ConfigError
from twa_scale.run.tasks import huggingface
from twa_scale.run.tasks.classification import require_split
from twa_scale.run.tasks.coco import Annotated, Detections, average_precision, pycocotools, read_annotations
from twa_scale.run.tasks.decoders import Decoder, Processor, Stretched, open_image
from twa_scale.run.tasks.import_path import import_function, model_from
from twa_scale.run.tasks.labels import default_names
from twa_scale.run.tasks.task import SPLITS, Batch, Metrics

_MAX_DETECTIONS = 100  # detections of an image that count, as in COCO's evaluation


class AnnotatedImages(Section):
    """Images and their annotations."""

    images: str = Field(description="Folder of the images.")
    annotations: str = Field(description="JSON file in the format of COCO (instances).")


class ObjectDetectionOptions(Section):
    """The options of the task `object_detection`."""

    model: str = Field(
        description="Hugging Face model directory (`AutoModelForObjectDetection`: DETR, YOLOS and others), or import "
        "path `package.module:function` of a function that returns a model with the same inputs and outputs."
    )
    model_options: dict[str, Any] = Field({}, description="Keyword arguments of that function.")
    train: AnnotatedImages | None = Field(None, description="Training data.")
    validation: AnnotatedImages | None = Field(None, description="Validation data.")
    test: AnnotatedImages | None = Field(None, description="Test data.")
    image_size: Count = Field(description="Size of the squares to which images are resized; their shape is not kept.")
    num_labels: Count | None = Field(
        None, description="Number of classes of a Hugging Face model. By default that of its configuration or the data."
    )

    @model_validator(mode="after")
    def _some_data(self) -> "ObjectDetectionOptions":
        if not (self.train or self.validation or self.test):
            raise ValueError("give data: at least one of `train`, `validation` and `test`")
        return self


class ObjectDetection:
    """The loss of a detection model, and its average precision (`ap`, `ap50`), computed by pycocotools.

    Categories have the numbers of the model's `label2id` if it contains all of their names, and their ids otherwise.
    There is no data augmentation.
    """

    main_metric = "ap"
    higher_is_better = True

    def __init__(self, options: ObjectDetectionOptions) -> None:
        """Read the annotations and the model's configuration. Images are read when they are accessed.

        Raises:
            ConfigError: a path, an annotation or the model cannot be used, or pycocotools is not installed.
        """
        pycocotools()  # so that a missing package is reported before the candidates are read
        self._options = options
        with named_errors(ConfigError):
            is_directory = path_of(options.model, ConfigError).is_dir()
        self._function = None if is_directory else import_function(options.model, "task.model")
        self._config = huggingface.load_config(options.model) if is_directory else None
        size = options.image_size
        self._processor = Processor(options.model, size={"height": size, "width": size}) if is_directory else None
        self._decoder: Decoder = self._processor or Stretched(size)
        self._images: dict[str, list[Annotated]] = {}
        names: dict[int, str] = {}
        for split in SPLITS:
            if data := getattr(options, split):
                folder = path_of(data.images, ConfigError)
                self._images[split], annotations = read_annotations(
                    path_of(data.annotations, ConfigError), folder, f"task.{split}.annotations"
                )
                names |= annotations
        self._class_of = _classes(names, self._config.label2id if self._config else {})
        self._category_of = {number: category for category, number in self._class_of.items()}
        if self._config:
            self._config.num_labels = self._num_labels(self._config)

    def model(self) -> nn.Module:
        """Return the Hugging Face model, randomly initialized, or the model from the model function.

        Raises:
            ConfigError: the function does not accept the options, or does not return a module.
        """
        if self._config:
            return huggingface.build_model("AutoModelForObjectDetection", self._config)
        assert self._function is not None
        return model_from(self._function, self._options.model_options, self._options.model)

    def dataset(self, split: str) -> "DetectionExamples":
        """Return the examples of a split. See `DetectionExamples`."""
        images = require_split(split, self._images)
        return DetectionExamples(images, SPLITS.index(split), self._class_of, self._decoder)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of the model.

        The losses of boxes are divided by the number of objects of the batch. The loss of classes may be a mean over
        other terms: in DETR and YOLOS, it is a weighted mean over all queries.
        """
        return self._outputs(model, batch).loss  # type: ignore[no-any-return]

    def terms(self, batch: Batch) -> int:
        """Return the number of objects, by which the model divides the losses of boxes."""
        return int((batch["classes"] >= 0).sum())

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        """Return the sum over the objects of `loss`."""
        return self.collect(model, batch)[0]

    def collect(self, model: nn.Module, batch: Batch) -> tuple[Metrics, list[Detections]]:
        """Return the metrics, and the objects that the model finds in each image."""
        outputs, terms = self._outputs(model, batch), self.terms(batch)
        detections = self._detect(outputs, batch["sizes"])
        indices = zip(batch["split"].tolist(), batch["index"].tolist(), strict=True)
        truth = [self._images[SPLITS[split]][index] for split, index in indices]
        return {"loss": (outputs.loss * terms, terms)}, [
            self._detections(image, result) for image, result in zip(truth, detections, strict=True)
        ]

    def summarize(self, detections: list[Detections]) -> dict[str, float]:
        """Return `ap` and `ap50` of the images of all ranks."""
        return average_precision(detections)

    def _outputs(self, model: nn.Module, batch: Batch) -> Any:
        used = [classes >= 0 for classes in batch["classes"]]
        labels = [
            {"class_labels": classes[u], "boxes": boxes[u]}
            for classes, boxes, u in zip(batch["classes"], batch["boxes"], used, strict=True)
        ]
        return model(pixel_values=batch["images"], labels=labels)

    def _detect(self, outputs: Any, sizes: Tensor) -> list[dict[str, Tensor]]:
        """Return `scores`, `labels` and `boxes` (left, top, right, bottom in pixels) of each image."""
        if self._processor:
            detections: list[dict[str, Tensor]] = self._processor.detections(outputs, sizes)
            return detections
        scores, labels = outputs.logits.softmax(-1)[..., :-1].max(-1)  # the last class means that there is no object
        center, size = outputs.pred_boxes.chunk(2, -1)
        scale = sizes.flip(-1).repeat(1, 2)[:, None]
        boxes = torch.cat([center - size / 2, center + size / 2], -1) * scale
        return [{"scores": s, "labels": c, "boxes": b} for s, c, b in zip(scores, labels, boxes, strict=True)]

    def _detections(self, image: Annotated, result: dict[str, Tensor]) -> Detections:
        best = result["scores"].float().argsort(descending=True)[:_MAX_DETECTIONS]
        scores, labels, boxes = (
            result[key][best].detach().float().cpu().numpy() for key in ("scores", "labels", "boxes")
        )
        known = np.array([int(label) in self._category_of for label in labels], bool)
        categories = np.array([self._category_of[int(label)] for label in labels[known]], np.int64)
        boxes = boxes[known].astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        return Detections(image, boxes, categories, scores[known])

    def _num_labels(self, config: Any) -> int:
        needed = max(self._class_of.values()) + 1
        number: int = self._options.num_labels or max(config.num_labels, needed)
        if needed > number:
            raise ConfigError(f"task.num_labels: is {number}, but a category has the number {needed - 1}. Raise it.")
        return number


class DetectionExamples:
    """Examples of images with boxes.

    "images" are float32 (3, size, size). "classes" are int64 (M,) for the largest number M of objects of an image, -1
    for none, and "boxes" float32 (M, 4): center, width and height as fractions of the image. "sizes" are int64 (2,),
    height and width of the file. "split" and "index" identify the image.
    """

    def __init__(self, images: list[Annotated], split: int, class_of: dict[int, int], decoder: Decoder) -> None:
        self._images, self._split, self._class_of, self._decoder = images, split, class_of, decoder
        self._most = max(1, *(len(image.boxes) for image in images))

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Batch:
        image = self._images[index]
        location = str(image.file)
        opened = open_image(image.file)
        width, height = opened.size
        corners = np.concatenate([image.boxes[:, :2], image.boxes[:, :2] + image.boxes[:, 2:]], 1)
        corners = np.clip(corners, 0, [width, height, width, height])
        used = ~image.crowd & (corners[:, 2] > corners[:, 0]) & (corners[:, 3] > corners[:, 1])
        corners = corners[used] / [width, height, width, height]
        boxes, classes = np.zeros((self._most, 4), np.float32), np.full(self._most, -1, np.int64)
        boxes[: len(corners)] = np.concatenate(
            [(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], 1
        )
        classes[: len(corners)] = [self._class_of[int(category)] for category in image.categories[used]]
        return {
            "images": self._decoder(opened, location),
            "boxes": torch.from_numpy(boxes),
            "classes": torch.from_numpy(classes),
            "sizes": torch.tensor([height, width]),
            "split": torch.tensor(self._split),
            "index": torch.tensor(index),
        }


def _classes(names: dict[int, str], known: dict[str, int]) -> dict[int, int]:
    """Return the number of the class of each category."""
    if set(names.values()) <= set(known):
        return {category: known[name] for category, name in names.items()}
    if known and not default_names(known):
        unknown = next(name for name in names.values() if name not in known)
        raise ConfigError(
            f"task: the model's label2id has no class {unknown!r}. Use the names of the categories of the data in "
            "config.json, so that their numbers are known."
        )
    return {category: category for category in names}
