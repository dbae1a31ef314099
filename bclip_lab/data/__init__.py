"""Images: labelled, split, and where they come from."""

from bclip_lab.data.digits import digits
from bclip_lab.data.downloads import cifar10, cifar100, gtsrb, svhn
from bclip_lab.data.folder import image_folder
from bclip_lab.data.images import (
    Attack,
    LabelledImages,
    PoisonedImages,
    Splits,
    TriggeredImages,
    to_float,
)
from bclip_lab.data.signs import signs

__all__ = [
    "Attack",
    "LabelledImages",
    "PoisonedImages",
    "Splits",
    "TriggeredImages",
    "cifar10",
    "cifar100",
    "digits",
    "gtsrb",
    "image_folder",
    "signs",
    "svhn",
    "to_float",
]
