"""The loss of a detector of objects by their centers."""

import torch
from torch import Tensor

SPREAD = 6.0  # an object is as large as so many standard deviations of the weight around its center


def detection_loss(logits: Tensor, boxes: Tensor, labels: list[dict[str, Tensor]]) -> Tensor:
    """Return the loss per object: the focal loss of the classes of all cells, and that of the boxes at the centers.

    As in CenterNet, cells near the center of an object count less as examples of "no object".

    Args:
        logits: (B, rows, columns, C + 1).
        boxes: (B, rows, columns, 4): center, width and height as fractions of the image.
        labels: for each image, `class_labels`, int64 (M,), and `boxes`, (M, 4).
    """
    shape = logits.shape[1:3]
    near = logits.new_zeros(logits.shape[:3])
    classes = torch.full(logits.shape[:3], logits.shape[-1] - 1, device=logits.device)
    cells, true = [], []
    for image, label in enumerate(labels):
        if len(label["boxes"]):
            near[image] = closeness(label["boxes"], *shape).amax(0)
            columns, rows = (label["boxes"][:, i].mul(shape[1 - i]).long().clamp(max=shape[1 - i] - 1) for i in (0, 1))
            classes[image, rows, columns] = label["class_labels"]
            cells.append(torch.stack([torch.full_like(rows, image), rows, columns]))
            true.append(label["boxes"])
    log_likely = logits.log_softmax(-1).gather(-1, classes[..., None])[..., 0]
    weight = torch.where(classes < logits.shape[-1] - 1, 1.0, (1 - near) ** 4)
    loss = -(weight * (1 - log_likely.exp()) ** 2 * log_likely).sum()
    if not cells:
        return loss
    at = torch.cat(cells, 1)
    return (loss + box_loss(boxes[at[0], at[1], at[2]], torch.cat(true)).sum()) / at.shape[1]


def closeness(boxes: Tensor, rows: int, columns: int) -> Tensor:
    """Return for each box and cell, (M, rows, columns), 1 at the center of the box, and less around it."""
    x, y = (torch.arange(count, device=boxes.device).add(0.5).div(count) for count in (columns, rows))
    across, down = (
        (SPREAD * (x - boxes[:, :1]) / boxes[:, 2:3]) ** 2,
        (SPREAD * (y - boxes[:, 1:2]) / boxes[:, 3:]) ** 2,
    )
    return torch.exp(-(across[:, None, :] + down[:, :, None]) / 2)


def box_loss(boxes: Tensor, true: Tensor) -> Tensor:
    """Return for each pair of boxes, (N, 4), one minus their IoU, and the differences of centers and sizes."""
    size, true_size = boxes[:, 2:], true[:, 2:]
    low = torch.maximum(boxes[:, :2] - size / 2, true[:, :2] - true_size / 2)
    high = torch.minimum(boxes[:, :2] + size / 2, true[:, :2] + true_size / 2)
    both = (high - low).clamp(min=0).prod(1)
    iou = both / (size.prod(1) + true_size.prod(1) - both)
    away = ((boxes[:, :2] - true[:, :2]) / true_size).abs() + (size / true_size).log().abs()
    return 1 - iou + away.sum(1)
