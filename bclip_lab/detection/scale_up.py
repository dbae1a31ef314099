"""SCALE-UP: a triggered image keeps its decision when its pixel values are multiplied."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bclip_lab.data.images import LabelledImages, to_float
from bclip_lab.detection.thresholds import ImageDetector, check_clean
from bclip_lab.models import logits

__all__ = ["ScaleUp"]


class ScaleUp(ImageDetector):
    """Detect triggered images by scaled prediction consistency (Guo et al. 2023, arXiv 2302.03251, section 4).

    With c(x) the decision on x, and pixel values multiplied by each n of a set S and clipped,

        score(x) = SPC(x) = share of the n in S with c(min(n x, 1)) = c(x).

    The scores are multiples of 1 / |S|, so many images tie (see `ImageDetector`).

    Parameters
    ----------
    model
        Any classifier; only its decisions are used.
    scales
        S, each above 1: 3, 5, 7, 9, 11, as in the paper's section 5.1.
    per_class
        False (the default) is the paper's data-free score above. True is its data-limited one (equations 3 and 4),
        which subtracts the mean and divides by the standard deviation of the SPC of the clean images of the class
        c(x). Here these are the images given to `fit` on which the decision is c; the standard deviation counts as
        at least 1 / |S|, a class with fewer than two such images takes mean and standard deviation of them all.
    fpr
        Nominal false-positive rate, in (0, 0.5): 0.005, as of `MMDF`. The paper leaves the threshold to the defender.

    Attributes
    ----------
    means_, deviations_
        float64 (K,), with `per_class`: mean and standard deviation of the clean SPC of each class.
    scores_
        float64 (N,): the scores of the images given to `fit`.
    threshold_
        Images scoring above it are detected.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> clean = LabelledImages(torch.rand(20, 3, 8, 8), torch.arange(20) % 2, ("cat", "dog"))
    >>> detector = ScaleUp(resnet10(2, seed=0, width=4)).fit(clean)
    >>> bool(((0 <= detector.scores_) & (detector.scores_ <= 1)).all())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scales: Sequence[float] = (3, 5, 7, 9, 11),
        per_class: bool = False,
        fpr: float = 0.005,
    ) -> None:
        super().__init__(model, fpr)
        if not scales or not all(1 < scale < math.inf for scale in scales):
            raise ValueError(f"scales must be at least one finite number above 1, got {tuple(scales)}")
        self.scales, self.per_class = tuple(scales), per_class

    def fit(self, clean: LabelledImages) -> ScaleUp:
        """Set the threshold, and with `per_class` means and deviations, on clean images; labels are not used."""
        check_clean(clean)
        if self.per_class:
            decisions, consistency = self._consistency(to_float(clean.images))
            of_class = [consistency[decisions == index] for index in range(len(clean.classes))]
            of_class = [own if len(own) > 1 else consistency for own in of_class]
            self.means_ = torch.stack([own.mean() for own in of_class])
            self.deviations_ = torch.stack([own.std() for own in of_class]).clamp(min=1 / len(self.scales))
        return self._calibrate(clean)

    def _consistency(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Decisions int64 (N,), and the share of scales that keep them, float64 (N,)."""
        decision = logits(self.model, images).argmax(1)
        kept = [logits(self.model, (images * scale).clamp(max=1)).argmax(1) == decision for scale in self.scales]
        return decision, torch.stack(kept).double().mean(0)

    def _score(self, images: Tensor) -> Tensor:
        decision, consistency = self._consistency(images)
        if self.per_class:
            consistency = (consistency - self.means_[decision]) / self.deviations_[decision]
        return consistency
