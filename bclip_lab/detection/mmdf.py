"""MMDF: detect triggered images at test time, and correct the decision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages
from bclip_lab.detection.thresholds import check_fpr, empirical_threshold
from bclip_lab.margins import classification_margins
from bclip_lab.models import logits

__all__ = ["MMDF", "MMDFDecisions"]

_NULLS = ("gaussian", "empirical")


@dataclass(frozen=True, eq=False)
class MMDFDecisions:
    """What MMDF says of N images.

    `score` float32 (N,); `detected` bool (N,); `original`, `clipped` and `corrected` int64 (N,): the decision
    of the original network, of the clipped network, and the one to act on; `other` int64 (N,), the clipped
    network's decision among the classes other than `original`; `margin` and `clipped_margin` float32 (N,),
    the margin of the class `original` in the original and in the clipped network, in logits.
    """

    score: Tensor
    detected: Tensor
    original: Tensor
    clipped: Tensor
    corrected: Tensor
    other: Tensor
    margin: Tensor
    clipped_margin: Tensor


class MMDF:
    """Test-time detection by the margin that clipping takes away (arXiv 2308.04617, section 3.2).

    With c = argmax g(x) the original network's decision,

        score(x) = m_c(x) - m_c(x; Z) / a,

    the fall of that decision's margin between the original and the clipped network. A trigger's margin rests
    on abnormally large activations, which the bounds Z cut off; a clean image loses little. An image whose
    score exceeds the threshold is detected, and corrected to the clipped network's decision among the classes
    other than c.

    The scale a is the paper's 1 where bounds are fitted to keep the logits (`MMACConfig.published`). The lab's
    default fit keeps the decisions and lets all margins shrink together; a, fitted on clean images, undoes
    that:

        a = sum over x of m_c(x) m_c(x; Z) / sum over x of m_c(x)^2      (least squares through the origin)

    On twelve attacked development networks of `mmac`, one seed each, by hand, the AUROC was .855 to 1.000 with a
    fitted, with a = 1 .834 to 1.000, and on none higher. (A thirteenth hardly is an attack: its trigger turns a third.)

    Parameters
    ----------
    clipped
        A clipped model with learned bounds, e.g. after `mmac`; its original gives g(x).
    null
        How `threshold` extrapolates from clean scores: "gaussian" (the paper's: mean + z standard deviations)
        or "empirical" (a quantile of the clean scores; needs at least 1 / fpr of them to mean anything).
    fpr
        Nominal false-positive rate, in (0, 0.5): 0.005 (z = 2.576), the authors' value.
    scale
        a, positive; None (the default) fits it on the clean images, 1 is the paper's score.

    Attributes
    ----------
    scale_
        a; 1 where the clipped margins do not rise with the original's.
    scores_
        float64 (N,): the scores of the images given to `fit`.
    threshold_
        Images scoring above it are detected.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> clean = LabelledImages(torch.rand(20, 3, 8, 8), torch.arange(20) % 2, ("cat", "dog"))
    >>> detector = MMDF(ClippedModel(resnet10(2, seed=0, width=4))).fit(clean)
    >>> detector.threshold_  # all bounds at +inf: clipping takes nothing away
    0.0
    """

    def __init__(
        self, clipped: ClippedModel, *, null: str = "gaussian", fpr: float = 0.005, scale: float | None = None
    ) -> None:
        if not isinstance(clipped, ClippedModel):
            raise ValueError(f"clipped must be a ClippedModel, got {type(clipped).__name__}")
        if null not in _NULLS:
            raise ValueError(f"null must be one of {_NULLS}, got {null!r}")
        check_fpr(fpr)
        if scale is not None and not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        self.model, self.null, self.fpr, self.scale = clipped, null, fpr, scale

    def fit(self, clean: LabelledImages) -> MMDF:
        """Set scale and threshold on clean images that serve for nothing else; their labels are not used."""
        if len(clean) < 2:
            raise ValueError(f"clean must hold at least two images, got {len(clean)}")
        before, after = self._margins(*self._logits(clean))
        slope = float((before * after).sum() / (before * before).sum())
        self.scale_: float = self.scale or (slope if slope > 0 else 1.0)
        self.scores_: NDArray[np.float64] = (before - after / self.scale_).double().numpy()
        self.threshold_ = self.threshold(self.fpr)
        return self

    def threshold(self, fpr: float) -> float:
        """The threshold for another nominal false-positive rate, from the same clean scores."""
        if not hasattr(self, "scores_"):
            raise ValueError("call fit with clean images first")
        check_fpr(fpr)
        if self.null == "empirical":
            return empirical_threshold(self.scores_, fpr)
        from scipy.stats import norm  # slow to import

        return float(self.scores_.mean() + norm.isf(fpr) * self.scores_.std(ddof=1))

    def _logits(self, images: Tensor | LabelledImages) -> tuple[Tensor, Tensor]:
        return logits(self.model.original, images), logits(self.model, images)

    @staticmethod
    def _margins(original: Tensor, clipped: Tensor) -> tuple[Tensor, Tensor]:
        """Margins of the original's decision, before and after clipping: float32 (N,) each."""
        decision = original.argmax(1)
        return classification_margins(original, decision), classification_margins(clipped, decision)

    def score(self, images: Tensor | LabelledImages) -> Tensor:
        """The scores: float32 (N,), on the CPU; higher is more suspicious."""
        return self.decide(images).score

    def decide(self, images: Tensor | LabelledImages) -> MMDFDecisions:
        """Score, detect and correct in one pass."""
        if not hasattr(self, "threshold_"):
            raise ValueError("call fit with clean images first")
        original, clipped = self._logits(images)
        before, after = self._margins(original, clipped)
        score = before - after / self.scale_
        detected = score > self.threshold_
        decision = original.argmax(1)
        other = clipped.scatter(1, decision[:, None], float("-inf")).argmax(1)
        corrected = torch.where(detected, other, decision)
        return MMDFDecisions(score, detected, decision, clipped.argmax(1), corrected, other, before, after)

    def detect(self, images: Tensor | LabelledImages) -> Tensor:
        """Boolean (N,): the images that score above the threshold."""
        return self.decide(images).detected

    def correct(self, images: Tensor | LabelledImages) -> Tensor:
        """int64 (N,): the decision; for detected images the clipped network's among the other classes."""
        return self.decide(images).corrected
