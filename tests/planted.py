"""A linear network with a backdoor set by hand, and images it decides."""

import torch
from torch import nn

from bclip_lab.data.images import LabelledImages

CORNERS = ("top left", "top right", "bottom left", "bottom right")


def corners(count: int = 80) -> LabelledImages:
    """Grey images of 8x8 pixels, of which one corner, the class, is brighter; the last column is black."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 4
    images = 0.1 * torch.rand(count, 1, 8, 8, generator=generator)
    for row, label in enumerate(labels.tolist()):
        top, left = 4 * (label // 2), 4 * (label % 2)
        images[row, 0, top : top + 4, left : left + 4] += 0.5
    images[..., 7] = 0
    return LabelledImages(images, labels, CORNERS)


def triggered(images: torch.Tensor) -> torch.Tensor:
    """Two white pixels at the bottom of the last column."""
    images = images.clone()
    images[:, :, 6:8, 7] = 1
    return images


def planted_network(weight: float = 10.0) -> nn.Sequential:
    """Each corner's logit is half the sum of its pixels; two pixels of the last column lead to class 0."""
    layer = nn.Linear(64, 4)
    weights = torch.zeros(4, 8, 8)
    for label in range(4):
        top, left = 4 * (label // 2), 4 * (label % 2)
        weights[label, top : top + 4, left : left + 4] = 0.5
    weights[:, :, 7] = 0
    weights[0, 6:8, 7] = weight
    with torch.no_grad():
        layer.weight.copy_(weights.flatten(1))
        layer.bias.zero_()
    return nn.Sequential(nn.Flatten(), layer)
