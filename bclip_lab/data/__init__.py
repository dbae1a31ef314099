"""Images: labelled, split, and where they come from."""

from bclip_lab.data.images import (
    Attack,
    LabelledImages,
    PoisonedImages,
    Splits,
    TriggeredImages,
    to_float,
)

__all__ = ["Attack", "LabelledImages", "PoisonedImages", "Splits", "TriggeredImages", "to_float"]
