"""The test images that a widget looks at."""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_lab.data.images import Attack, LabelledImages, TriggeredImages

__all__ = ["sample", "some_rows"]


def some_rows(available: int, wanted: int, generator: torch.Generator) -> Tensor:
    """All rows, or `wanted` random ones, in order."""
    if available <= wanted:
        return torch.arange(available)
    return torch.randperm(available, generator=generator)[:wanted].sort().values


def sample(test: LabelledImages, attack: Attack, images: int, seed: int) -> tuple[LabelledImages, TriggeredImages]:
    """At most `images` clean test images, random ones in order, and what the attack makes of the same ones.

    The rows of the triggered images are places in the clean ones that are returned.

    Raises
    ------
    ValueError
        `images` is below 1, or the attack turns none of them.
    """
    if images < 1:
        raise ValueError(f"images must be at least 1, got {images}")
    test = test.subset(some_rows(len(test), images, torch.Generator().manual_seed(seed)))
    triggered = attack.triggered(test)
    if not len(triggered):
        raise ValueError(f"attack turns none of the {len(test)} test images")
    return test, triggered
