"""What a confusion matrix says of a segmentation: of integers, it is exact however the images were shared out."""

import numpy as np
import torch
from pairs import IGNORED
from torch import Tensor


def confusion(predicted: Tensor, mask: Tensor, classes: int) -> Tensor:
    """Count pixels by (true class, predicted class): (K, K) int64; ignored pixels do not count."""
    counted = mask != IGNORED
    numbers = mask[counted].long() * classes + predicted[counted]
    return torch.bincount(numbers, minlength=classes**2).view(classes, classes)


def class_iou(matrix: Tensor) -> list[float | None]:
    """Return intersection over union of each class, None for one that was neither there nor predicted."""
    unions = (matrix.sum(0) + matrix.sum(1) - matrix.diag()).tolist()
    return [hit / union if union else None for hit, union in zip(matrix.diag().tolist(), unions, strict=True)]


def mean_iou(matrix: Tensor) -> float:
    return float(np.mean([value for value in class_iou(matrix) if value is not None]))
