"""STRIP: a triggered image keeps its decision when other images are laid over it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bclip_lab.data.images import LabelledImages, to_float
from bclip_lab.detection.thresholds import ImageDetector, check_clean
from bclip_lab.models import logits

__all__ = ["STRIP"]


class STRIP(ImageDetector):
    """Detect triggered images by the low entropy of their blends (Gao et al. 2019, arXiv 1902.06531, section 4).

    Onto an image x each of N clean images o_n is superposed, and the entropy of the decision is averaged:

        H(x) = 1/N sum over n of -sum over classes k of p_k(x + o_n) log2 p_k(x + o_n),     score(x) = -H(x),

    with p the softmax of the logits. The trigger wins over what is laid on it, so its entropy is low. The score is
    in bits, from -log2 K to 0.

    The clean images given to `fit` are parted by the seed: N are laid over, the others set the threshold, since an
    image laid over itself would score too high. Every image that is judged meets the same N, so that its score
    depends on it alone; the authors draw anew for each image.

    Parameters
    ----------
    model
        Any classifier; it is not altered.
    overlays
        N: 100, as in the paper's section 5.
    weight
        Of both images in a blend, positive: 1, as in the authors' code, so that a blend is the sum of the two. Here it
        is clipped to [0, 1], the range of images. The authors add standardised images, without clipping, which
        keeps the mean brightness; 0.5, the mean of the two images, does so here.
    fpr
        Nominal false-positive rate, in (0, 0.5): 0.005, the lowest of the paper's table 3 and the default of `MMDF`.
    seed
        Of the choice of the N images.

    Attributes
    ----------
    overlays_
        float32 (N, C, H, W): the clean images that are laid over.
    scores_
        float64 (M - N,): the scores of the other M - N images given to `fit`.
    threshold_
        Images scoring above it are detected.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> clean = LabelledImages(torch.rand(20, 3, 8, 8), torch.arange(20) % 2, ("cat", "dog"))
    >>> detector = STRIP(resnet10(2, seed=0, width=4), overlays=5).fit(clean)
    >>> detector.scores_.shape, -1 <= detector.threshold_ <= 0
    ((15,), True)
    """

    def __init__(
        self, model: nn.Module, *, overlays: int = 100, weight: float = 1.0, fpr: float = 0.005, seed: int = 0
    ) -> None:
        super().__init__(model, fpr)
        if overlays < 1:
            raise ValueError(f"overlays must be at least 1, got {overlays}")
        if not 0 < weight < math.inf:
            raise ValueError(f"weight must be positive and finite, got {weight}")
        self.overlays, self.weight, self.seed = overlays, weight, seed

    def fit(self, clean: LabelledImages) -> STRIP:
        """Draw N of the clean images and set the threshold on the others; their labels are not used."""
        check_clean(clean, self.overlays + 2)
        order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(self.seed))
        self.overlays_ = to_float(clean.subset(order[: self.overlays]).images)
        return self._calibrate(clean.subset(order[self.overlays :]))

    def _score(self, images: Tensor) -> Tensor:
        entropy = torch.zeros(len(images), dtype=torch.float64)
        for overlay in self.overlays_.to(images.device):  # one at a time: memory does not grow with N
            blend = (self.weight * (images + overlay)).clamp(0, 1)
            entropy += torch.special.entr(logits(self.model, blend).softmax(1)).sum(1)
        return -entropy / (self.overlays * math.log(2))
