"""MM-BM: learn activation bounds that are small."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.nn import functional as F

from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages
from bclip_lab.defenses.fitting import BoundFit

__all__ = ["EARLY_SITES", "MMBMConfig", "MMBMStep", "mmbm"]

EARLY_SITES = ("relu", "stages.0.0.relu_1", "stages.1.0.relu_1")
"""The stem's and the first two stages' last activations of a lab ResNet, as the authors' code bounds them."""


@dataclass(frozen=True)
class MMBMConfig:
    """Hyper-parameters of `mmbm`; the defaults are the authors', but for `sites`.

    Parameters
    ----------
    epochs, batch_size, learning_rate, start
        50 epochs of Adam at 0.1, every bound from 8 (the authors' code).
    weight
        c, the weight of the bounds' norm: 0.5 at first.
    accuracy_target
        Every `weight_every` epochs c is multiplied by `weight_factor` where the accuracy on the clean images is
        above this, and divided by it elsewhere.
    weight_every, weight_factor
        See `accuracy_target`.
    sites
        The sites that are bounded; None bounds all. The authors' code bounds three: the stem and the first two
        stages of a ResNet-18; `EARLY_SITES` are those of a lab ResNet. With all sites the norm wins: the shipped
        "patch" network ends at an accuracy of 0.10, with the early ones at 0.95 on its clean images.
    seed
        Of the order of the images.
    """

    epochs: int = 50
    batch_size: int = 200
    learning_rate: float = 0.1
    start: float = 8.0
    weight: float = 0.5
    accuracy_target: float = 0.95
    weight_every: int = 10
    weight_factor: float = 1.2
    sites: Sequence[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError(f"epochs and batch_size must be >= 1, got {self.epochs} and {self.batch_size}")
        if not (self.learning_rate > 0 and self.start > 0 and self.weight >= 0):
            raise ValueError(
                "learning_rate and start must be positive and weight not negative, got "
                f"{self.learning_rate}, {self.start}, {self.weight}"
            )


@dataclass(frozen=True)
class MMBMStep:
    """Progress after one epoch.

    `clean_error`: mean squared error between clipped and original logits on clean images; `norm`: sum of the
    sites' Euclidean norms; `accuracy`: of the clipped network on the clean images of the fit; `weight`: c.
    `model` is the clipped model with the bounds so far.
    """

    epoch: int
    epochs: int
    clean_error: float
    norm: float
    accuracy: float
    weight: float
    model: ClippedModel = field(repr=False)


def mmbm(clipped: ClippedModel, clean: LabelledImages, config: MMBMConfig | None = None) -> Iterator[MMBMStep]:
    """Learn small upper bounds Z on the activations (MM-BM, arXiv 2205.06900, section 3.4; MMAC's baseline).

        minimise over Z:  MSE(g(x; Z), g(x)) + c * sum over sites l of ||Z_l||_2

    Parameters
    ----------
    clipped
        Its bounds are fitted, in place, and are the bounds so far after every epoch. Its original is not altered.
    clean
        The defender's clean images with their true labels; only those the model decides correctly are used.
    config
        `MMBMConfig()` by default.

    Yields
    ------
    MMBMStep
        One an epoch.

    Raises
    ------
    ValueError
        No images, none that the model decides correctly, or a site the model does not have.
    """
    config = config or MMBMConfig()
    fit = BoundFit(clipped, clean, start=config.start, learning_rate=config.learning_rate, sites=config.sites)
    generator = torch.Generator().manual_seed(config.seed)
    steps = math.ceil(len(fit.images) / config.batch_size)
    weight = config.weight
    try:
        for epoch in range(1, config.epochs + 1):
            error = 0.0
            for rows in torch.randperm(len(fit.images), generator=generator).chunk(steps):
                clean_error = F.mse_loss(fit.logits(fit.images[rows]), fit.targets[rows])
                norm = torch.stack([bound.norm() for bound in fit.bounds.values()]).sum()
                fit.step(clean_error + weight * norm)
                error += float(clean_error.detach()) / steps
            fit.write()
            accuracy = fit.accuracy()
            yield MMBMStep(epoch, config.epochs, error, float(norm.detach()), accuracy, weight, clipped)
            if epoch % config.weight_every == 0:
                weight *= config.weight_factor ** (1 if accuracy > config.accuracy_target else -1)
    finally:
        fit.write()
