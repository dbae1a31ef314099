"""What detectors of triggered images share: a threshold from the scores of clean images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bclip_lab.data.images import LabelledImages, check_images, to_float
from bclip_lab.models import device_of, images_at_once

__all__ = ["ImageDetector", "check_clean", "check_fpr", "empirical_threshold"]


def check_fpr(fpr: float) -> None:
    """Raise `ValueError` unless a nominal false-positive rate lies in (0, 0.5)."""
    if not 0 < fpr < 0.5:
        raise ValueError(f"fpr must lie in (0, 0.5), got {fpr}")


def check_clean(clean: LabelledImages, least: int = 2) -> None:
    """Raise `ValueError` where there are too few clean images to fit a detector on."""
    if len(clean) < least:
        raise ValueError(f"clean must hold at least {least} images, got {len(clean)}")


def empirical_threshold(scores: NDArray[np.float64], fpr: float) -> float:
    """The (1 - fpr) quantile of clean scores (N,), and of the two scores around it the higher one.

    At most the share `fpr` of these scores is above it. It is one of the scores, so it needs at least 1 / fpr of
    them to mean anything.

    Examples
    --------
    >>> empirical_threshold(np.array([3.0, 1.0, 2.0, 2.0, 2.0]), fpr=0.25)
    2.0
    """
    return float(np.quantile(scores, 1 - fpr, method="higher"))


class ImageDetector(ABC):
    """A detector of triggered images whose threshold is an empirical quantile of its scores of clean images.

    What its children (`STRIP`, `ScaleUp`, `IBDPSC`, `TeCo`) have in common; each adds `_score` and `fit`. An image is
    detected where its score **exceeds** the threshold. Coarse scores have ties, and the threshold is a score of a
    clean image: images that tie with it are, all of them, not detected. `RocCurve.rates_at` counts in the same way,
    so FPR and TPR at any threshold are a vertex of the ROC curve. Where more than the share `fpr` of the clean
    images has the largest score there is, no threshold keeps the rate, and nothing is detected.
    """

    scores_: NDArray[np.float64]
    threshold_: float

    def __init__(self, model: nn.Module, fpr: float) -> None:
        check_fpr(fpr)
        self.model, self.fpr = model, fpr

    @abstractmethod
    def _score(self, images: Tensor) -> Tensor:
        """Scores (N,) on the CPU of a batch (N, C, H, W), float32 in [0, 1], on the model's device."""

    def _score_all(self, images: Tensor | LabelledImages) -> Tensor:
        """The scores, batch by batch: memory does not grow with the number of images."""
        if isinstance(images, LabelledImages):
            images = images.images
        check_images(images)
        if not len(images):
            raise ValueError("images is empty")
        device = device_of(self.model)
        batches = images.split(images_at_once(images.shape))
        return torch.cat([self._score(to_float(batch.to(device))).float() for batch in batches])

    def _calibrate(self, clean: LabelledImages) -> Self:
        """Set the threshold on clean images."""
        self.scores_ = self._score_all(clean).double().numpy()
        self.threshold_ = empirical_threshold(self.scores_, self.fpr)
        return self

    def threshold(self, fpr: float) -> float:
        """The threshold for another nominal false-positive rate, from the same clean scores."""
        self._check_fitted()
        check_fpr(fpr)
        return empirical_threshold(self.scores_, fpr)

    def score(self, images: Tensor | LabelledImages) -> Tensor:
        """The scores: float32 (N,), on the CPU; higher is more suspicious. Each image is scored by itself."""
        self._check_fitted()
        return self._score_all(images)

    def detect(self, images: Tensor | LabelledImages) -> Tensor:
        """Boolean (N,): the images that score above the threshold."""
        return self.score(images) > self.threshold_

    def _check_fitted(self) -> None:
        if not hasattr(self, "threshold_"):
            raise ValueError("call fit with clean images first")
