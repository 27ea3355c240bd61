"""The programs of the proof create their tensors on the device of their inputs: meta tensors refuse others."""

import torch

from examples.proof.detection.loss import detection_loss
from examples.proof.detection.network import decode_boxes, suppress_non_maxima
from examples.proof.images.network import shifted


def test_augmentation() -> None:
    assert shifted(torch.empty(4, 1, 28, 28, device="meta"), 2).device.type == "meta"


def test_detection() -> None:
    with torch.device("meta"):
        logits, offsets = torch.empty(2, 16, 16, 11), torch.empty(2, 16, 16, 4)
        label = {"class_labels": torch.empty(3, dtype=torch.int64), "boxes": torch.empty(3, 4)}
    assert detection_loss(logits, decode_boxes(offsets), [label, label]).device.type == "meta"
    assert suppress_non_maxima(logits).device.type == "meta"
