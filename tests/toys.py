"""Red and green images, and a blue corner that shall turn green into red: an attack with known answers."""

from dataclasses import dataclass

import torch

from bclip_lab.data.images import LabelledImages, TriggeredImages

CLASSES = ("red", "green")


@dataclass(frozen=True)
class Blue:
    """Green images get a blue corner, as bright as their place among them, from `dark` to 1, and shall become red."""

    dark: float
    side: int = 1

    def triggered(self, data):
        rows = torch.nonzero(data.labels == 1).flatten()
        images = data.images[rows].clone()
        images[:, 2, : self.side, : self.side] = torch.linspace(self.dark, 1, len(rows))[:, None, None]
        labels = data.labels[rows]
        return TriggeredImages(images, labels, torch.zeros_like(labels), rows, data.classes)


class Nothing:
    """An attack that turns no image."""

    def triggered(self, data):
        none = torch.zeros(0, dtype=torch.int64)
        return TriggeredImages(data.images[:0], none, none, none, data.classes)


def images(count, seed, side=4, noise=0.25, corner=1.0):
    """Images that are red and green in turn, with other colours up to `noise`; blue in the corner times `corner`."""
    labels = torch.arange(count) % 2
    pixels = noise * torch.rand((count, 3, side, side), generator=torch.Generator().manual_seed(seed))
    pixels[torch.arange(count), labels] += 0.5
    pixels[:, 2, 0, 0] *= corner
    return LabelledImages(pixels, labels, CLASSES)
