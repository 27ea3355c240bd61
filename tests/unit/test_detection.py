"""The task `object_detection`: boxes, losses and average precision of transformers' detection models."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch import nn
from transformers.models.yolos.modeling_yolos import YolosObjectDetectionOutput

from twa_scale.config import TaskConfig
from twa_scale.errors import ConfigError
from twa_scale.ranks import Group
from twa_scale.run.batches import make_batches
from twa_scale.run.evaluate import evaluate
from twa_scale.run.tasks import Task, build_task, stack
from twa_scale.run.tasks.coco import Annotated, Detections, average_precision

SIZE = 32
BACKBONE = {"embedding_size": 4, "hidden_sizes": [4, 4, 4, 4], "depths": [1, 1, 1, 1], "layer_type": "basic"}
DETR = {
    **dict.fromkeys(("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads"), 1),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 8),
    **{"num_queries": 5, "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None},
}
YOLOS = {
    **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
    **{"image_size": [SIZE, SIZE], "patch_size": 16, "num_detection_tokens": 5},
}
CATEGORIES = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
OBJECTS: list[dict[str, Any]] = [
    {"image_id": 11, "category_id": 3, "bbox": [6, 4, 30, 20], "area": 600, "iscrowd": 0},
    {"image_id": 11, "category_id": 7, "bbox": [50, 10, 30, 20], "area": 400, "iscrowd": 0},  # across the border
    {"image_id": 11, "category_id": 7, "bbox": [0, 0, 60, 40], "area": 2400, "iscrowd": 1},
    {"image_id": 4, "category_id": 7, "bbox": [5, 5, 0, 9], "area": 0, "iscrowd": 0},  # with zero width
    {"image_id": 4, "category_id": 7, "bbox": [5, 5, 8, 9], "area": 72, "iscrowd": 0},
]


def write_coco(root: Path, **changes: object) -> dict[str, str]:
    (root / "images").mkdir(exist_ok=True)
    images = []
    for i, size in {11: (60, 40), 4: (40, 48), 9: (30, 30)}.items():
        Image.new("RGB", size, (i * 20, 99, 7)).save(root / f"images/{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "width": size[0], "height": size[1]})
    content = {"images": images, "annotations": OBJECTS, "categories": CATEGORIES} | changes
    (root / "coco.json").write_text(json.dumps(content))
    return {"images": str(root / "images"), "annotations": str(root / "coco.json")}


def save_model(directory: Path, kind: str = "Yolos", names: tuple[str, ...] = ("dog", "bird", "cat")) -> str:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    own: dict[str, Any] = YOLOS
    if kind == "Detr":
        backbone = transformers.ResNetConfig(**BACKBONE, out_features=["stage4"])
        own = {**DETR, "backbone_config": backbone}
    getattr(transformers, f"{kind}Config")(**own, **labels).save_pretrained(directory)
    getattr(transformers, f"{kind}ImageProcessorPil")().save_pretrained(directory)
    return str(directory)


def task_of(model: str, root: Path, **options: object) -> Task:
    data = options.pop("validation", None) or write_coco(root)
    section = {"name": "object_detection", "model": model, "image_size": SIZE, "validation": data}
    return build_task(TaskConfig.model_validate(section | options))


@pytest.mark.parametrize("kind", ["Yolos", "Detr"])
def test_examples_and_losses_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    model = save_model(tmp_path / "m", kind)
    task: Any = task_of(model, tmp_path)
    data = task.dataset("validation")
    batch = stack([data[i] for i in range(3)])
    processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
    number = {3: 2, 7: 0}  # of the classes in the model
    labels = []
    for i, image in enumerate((11, 4, 9)):
        local = [o | {"category_id": number[o["category_id"]]} for o in OBJECTS if o["image_id"] == image]
        expected = processor(
            Image.open(tmp_path / f"images/{image}.png"),
            annotations={"image_id": image, "annotations": local},
            **{"size": {"height": SIZE, "width": SIZE}, "do_pad": False, "return_tensors": "pt"},
        )
        assert torch.equal(batch["images"][i], expected["pixel_values"][0])
        label = expected["labels"][0]
        used = batch["classes"][i] >= 0
        assert torch.equal(batch["classes"][i][used], label["class_labels"])
        torch.testing.assert_close(batch["boxes"][i][used], label["boxes"])
        assert batch["sizes"][i].tolist() == label["orig_size"].tolist()
        labels.append(dict(label))
    network = task.model().eval()
    outputs = network(pixel_values=batch["images"], labels=labels)
    assert task.loss(network, batch).item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert task.terms(stack([data[2]])) == 0
    total, count = task.metrics(network, batch)["loss"]
    assert count == 3 and total.item() == pytest.approx(3 * outputs.loss.item(), rel=1e-5)


class Finder(nn.Module):
    """A custom model that detects the objects of each image, some of them with errors."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, pixel_values: torch.Tensor, labels: list[dict[str, torch.Tensor]]) -> YolosObjectDetectionOutput:
        logits = torch.full((len(labels), 4, 9), -9.0)
        logits[..., -1] = 9.0
        boxes = torch.full((len(labels), 4, 4), 0.5)
        for i, label in enumerate(labels):
            for j, number in enumerate(label["class_labels"]):
                logits[i, j, number], logits[i, j, -1] = 9.0, -9.0
                boxes[i, j] = label["boxes"][j]
        boxes[..., 0] += self.shift
        return YolosObjectDetectionOutput(loss=self.shift.square(), logits=logits, pred_boxes=boxes)


@pytest.mark.parametrize("shift", [0.0, 0.03, 0.5])
def test_average_precision_of_a_model_of_ones_own(tmp_path: Path, shift: float) -> None:
    data = write_coco(tmp_path, annotations=[OBJECTS[0], OBJECTS[2], OBJECTS[4]])
    task = task_of(f"{__name__}:Finder", tmp_path, model_options={"shift": shift}, validation=data)
    batches = make_batches(task.dataset("validation"), "validation", 2, None, 0, 1, 0)
    metrics = evaluate(task, task.model(), batches, Group.world(), torch.device("cpu"))
    assert set(metrics) == {"loss", "ap", "ap50"}
    assert metrics["loss"] == pytest.approx(shift**2, rel=1e-5)
    match shift:
        case 0.0:
            assert metrics["ap"] > 0.99 and metrics["ap50"] > 0.99
        case 0.03:
            assert 0 < metrics["ap"] < metrics["ap50"]
        case _:
            assert metrics["ap"] == metrics["ap50"] == 0


def found(boxes: list[list[float]], at: list[list[float]]) -> Detections:
    count, positions = len(boxes), np.array(boxes).reshape(-1, 4)
    truth = Annotated(1, Path("x"), positions, np.ones(count, int), np.full(count, 9e3), np.zeros(count, bool))
    return Detections(truth, np.array(at).reshape(-1, 4), np.ones(len(at), int), np.linspace(0.9, 0.5, len(at)))


def test_average_precision_of_known_boxes() -> None:
    box, far = [10.0, 10.0, 100.0, 100.0], [300.0, 300.0, 100.0, 100.0]
    assert average_precision([found([box], [box])]) == {"ap": pytest.approx(1), "ap50": pytest.approx(1)}
    assert average_precision([found([box, far], [box])])["ap50"] == pytest.approx(51 / 101)  # of 101 recalls
    shifted = [10.0, 32.0, 100.0, 100.0]  # IoU 78 / 122 = 0.64: of ten thresholds it passes 0.5, 0.55 and 0.6
    assert average_precision([found([box], [shifted])])["ap"] == pytest.approx(0.3)
    assert average_precision([found([box], [])]) == {"ap": 0.0, "ap50": 0.0}
    with pytest.raises(ConfigError, match="none of the evaluated images has an object"):
        average_precision([found([], [box])])


def test_pycocotools_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is raised before candidates are read, not at the first evaluation."""
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ConfigError, match=r"pip install twa-scale\[detection\]"):
        task_of(save_model(tmp_path / "m"), tmp_path, validation=write_coco(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, r"coco\.json has no list 'images'"),
        ({"images": []}, r"annotations\[0\]: image_id 11 is not the id of an entry of `images`"),
        ({"annotations": [OBJECTS[0] | {"bbox": [1, 2]}]}, r"annotations\[0\]: bbox \[1, 2\] is not \[left, top"),
        ({"annotations": [OBJECTS[0] | {"category_id": 5}]}, r"annotations\[0\]: category_id 5 is not the id"),
        ({"annotations": [{"image_id": 11}]}, r"annotations\[0\]: 'category_id' is None"),
        (
            {"images": [{"id": 4, "file_name": "x.png"}], "annotations": []},
            r"x\.png, which .* names, does not",
        ),
        ({"categories": [*CATEGORIES, {"id": 8, "name": "cow"}]}, "label2id has no class 'cow'"),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        task_of(save_model(tmp_path / "m"), tmp_path, validation=write_coco(tmp_path, **changes))


def test_models_without_names_have_the_ids_of_the_categories(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m", names=("LABEL_0", "LABEL_1"))
    task = task_of(model, tmp_path)
    assert task.dataset("validation")[0]["classes"].tolist() == [3, 7, -1]
    made: Any = task.model()
    assert made.config.num_labels == 8
    with pytest.raises(ConfigError, match=r"task\.num_labels: is 4, but a category has the number 7"):
        task_of(model, tmp_path, num_labels=4)
