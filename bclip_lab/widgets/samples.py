"""The test images that an explorer looks at."""

from __future__ import annotations

import torch

from bclip_lab.data.images import Attack, LabelledImages, TriggeredImages

__all__ = ["sample"]


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
    if len(test) > images:
        order = torch.randperm(len(test), generator=torch.Generator().manual_seed(seed))
        test = test.subset(order[:images].sort().values)
    triggered = attack.triggered(test)
    if not len(triggered):
        raise ValueError(f"attack turns none of the {len(test)} test images")
    return test, triggered
