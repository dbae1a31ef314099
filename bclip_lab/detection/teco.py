"""TeCo: a triggered image is robust to some corruptions and not to others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bclip_lab.data.images import LabelledImages
from bclip_lab.detection.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from bclip_lab.detection.thresholds import ImageDetector, check_clean
from bclip_lab.models import logits

__all__ = ["TeCo"]


class TeCo(ImageDetector):
    """Detect triggered images by corruption robustness consistency (Liu et al. 2023, arXiv 2303.18191, section 4).

    For each corruption t, let s_t(x) be the first severity of 1 to 5 at which the decision differs from that on x,
    and 6 where none does;

        score(x) = standard deviation of s_t(x) over the corruptions.

    A corruption that spoils the trigger turns the decision early, one that does not leaves it; a clean image is
    robust to all in a like manner. Scores are of few values and many images tie (see `ImageDetector`).

    Every severity corrupts the image as it is. (The authors' code corrupts what the severities before have left, and
    takes the severities of ImageNet-C; both make it more sensitive.) An image that has turned is not corrupted
    further.

    Parameters
    ----------
    model
        Any classifier of images with one or three channels; only its decisions are used.
    corruptions
        At least two of `corruptions.CORRUPTIONS`: all 14 by default. The paper has 15; frost is missing.
    fpr
        Nominal false-positive rate, in (0, 0.5): 0.005, as of `MMDF`. The paper leaves the threshold to the defender.
    seed
        Of the corruptions.

    Attributes
    ----------
    scores_
        float64 (N,): the scores of the images given to `fit`.
    threshold_
        Images scoring above it are detected.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> clean = LabelledImages(torch.rand(20, 3, 8, 8), torch.arange(20) % 2, ("cat", "dog"))
    >>> detector = TeCo(resnet10(2, seed=0, width=4), corruptions=("brightness", "contrast")).fit(clean)
    >>> bool(((0 <= detector.scores_) & (detector.scores_ <= 2.5)).all())
    True
    """

    def __init__(
        self, model: nn.Module, *, corruptions: Sequence[str] = CORRUPTIONS, fpr: float = 0.005, seed: int = 0
    ) -> None:
        super().__init__(model, fpr)
        unknown = [name for name in corruptions if name not in CORRUPTIONS]
        if len(set(corruptions)) < 2 or unknown:
            raise ValueError(f"corruptions must be at least two of {', '.join(CORRUPTIONS)}, got {tuple(corruptions)}")
        self.corruptions, self.seed = tuple(corruptions), seed

    def fit(self, clean: LabelledImages) -> TeCo:
        """Set the threshold on clean images; their labels are not used."""
        check_clean(clean)
        return self._calibrate(clean)

    def _first_flips(self, images: Tensor) -> Tensor:
        """s_t: int64 (corruptions, N), each in 1 to 6."""
        decision = logits(self.model, images).argmax(1)
        flips = torch.full((len(self.corruptions), len(images)), len(SEVERITIES) + 1)
        for own, corruption in zip(flips, self.corruptions, strict=True):
            kept = torch.arange(len(images))
            for severity in SEVERITIES:
                corrupted = corrupt(images[kept.to(images.device)], corruption, severity, seed=self.seed)
                turned = logits(self.model, corrupted).argmax(1) != decision[kept]
                own[kept[turned]] = severity
                kept = kept[~turned]
                if not len(kept):
                    break
        return flips

    def _score(self, images: Tensor) -> Tensor:
        return self._first_flips(images).double().std(0, correction=0)
