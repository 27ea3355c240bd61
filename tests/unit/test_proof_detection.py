"""The detection task of examples/proof: canvases, the detector's outputs and its loss."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from examples.proof.detection.canvases import SIZE, Canvas, canvas, write_split
from examples.proof.detection.loss import box_loss, closeness, detection_loss
from examples.proof.detection.network import Detector, DetectorOutput, decode_boxes, suppress_non_maxima
from twa_scale.config import load_config
from twa_scale.run.tasks import build_task
from twa_scale.run.tasks.task import stack

CONFIG = Path(__file__).resolve().parents[2] / "examples/proof/detection/config.yaml"
GRID = SIZE // 4


def square(side: int) -> Any:
    return np.full((side, side), 200, np.uint8)


def test_a_garment_that_would_hide_more_than_half_of_another_is_left_out() -> None:
    drawn = Canvas(np.zeros((SIZE, SIZE), np.uint8))
    drawn.add(square(10), 3, 20, 30)
    drawn.add(square(10), 4, 24, 30)  # covers 60 %
    drawn.add(square(10), None, 20, 36)  # covers 40 %
    drawn.add(square(10), 5, 20, 26)  # covers 60 % of the first, with all of the fragment
    drawn.add(square(10), 6, 40, 40)
    assert drawn.objects == [(3, [20, 30, 10, 10]), (6, [40, 40, 10, 10])]


class PerfectDetector(nn.Module):
    """A detector that knows the answer: it is certain of every object, and less certain in neighboring cells."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pixel_values: Tensor, labels: list[dict[str, Tensor]]) -> DetectorOutput:
        logits, boxes = torch.zeros(len(labels), GRID, GRID, 11), torch.zeros(len(labels), GRID, GRID, 4)
        logits[..., -1] = 20.0
        for image, label in enumerate(labels):
            for kind, box in zip(label["class_labels"], label["boxes"], strict=True):
                column, row = (int(box[i] * GRID) for i in (0, 1))
                for resident in range(max(0, column - 1), min(GRID, column + 2)):
                    logits[image, row, resident, kind] = 40.0 if resident == column else 21.0
                    boxes[image, row, resident] = box
        loss = self.scale * detection_loss(logits, boxes + 1e-6, labels)
        return DetectorOutput(loss, suppress_non_maxima(logits).flatten(1, 2), boxes.flatten(1, 2))


def test_a_detector_that_knows_all_objects_finds_each_once(tmp_path: Path) -> None:
    garments, kinds = np.stack([square(28)] * 10), np.arange(10, dtype=np.uint8)
    canvases = [canvas(garments, kinds, np.random.default_rng(seed)) for seed in range(12)]
    write_split(tmp_path, "test", canvases)
    location = [f"task.{split}.images={tmp_path}/test" for split in ("train", "validation", "test")]
    location += [f"task.{split}.annotations={tmp_path}/test.json" for split in ("train", "validation", "test")]
    options = ["task.model=tests.unit.test_proof_detection:PerfectDetector", "task.model_options={}"]
    task: Any = build_task(load_config(CONFIG, [*location, *options]).task)
    examples = task.dataset("test")
    batch = stack([examples[i] for i in range(len(examples))])
    assert (batch["classes"] >= 0).sum(1).tolist() == [len(drawn.objects) for drawn in canvases]
    metrics, actual = task.collect(task.model(), batch)
    assert task.summarize(actual)["ap"] > 0.95
    assert metrics["loss"][0] / metrics["loss"][1] < 0.5


@pytest.mark.parametrize("count", [0, 2])
def test_the_loss_of_a_detector_falls(count: int) -> None:
    torch.manual_seed(0)
    model = Detector(width=4, num_classes=10)
    images = torch.rand(2, 3, SIZE, SIZE)
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.31, 0.42, 0.5, 0.4]])[:count]  # centers in one cell
    labels = [{"class_labels": torch.tensor([1, 2])[:count], "boxes": boxes}] * 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(images, labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_boxes_decode_to_cell_centers_and_equal_boxes_have_zero_loss() -> None:
    boxes = decode_boxes(torch.zeros(1, 2, 4, 4))[0]
    assert boxes[1, 2].tolist() == [0.625, 0.75, 0.25, 0.25]
    assert closeness(boxes[1, 2][None], 2, 4)[0, 1, 2] == 1.0
    flat = boxes.flatten(0, 1)
    assert torch.allclose(box_loss(flat, flat), torch.zeros(8), atol=1e-6)
    far = box_loss(flat, flat + torch.tensor([0.125, 0.0, 0.0, 0.0]))
    assert torch.allclose(far, torch.full((8,), 1 - 1 / 3 + 0.5), atol=1e-5)
