"""MM-BD: is this model attacked, and to which class?"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import nn

from bclip_lab.data.images import LabelledImages
from bclip_lab.margins import MaximumMarginConfig, maximum_margin_images

__all__ = ["MMBD"]


class MMBD:
    """Detect a backdoored model by its maximum margins (arXiv 2205.06900, sections 3.2 and 3.3).

    For each class the largest margin over some noise starts is found; a gamma distribution is fitted to all
    but the largest of the K values r, and

        p = 1 - CDF(max r) ** K.

    The model is called attacked where p <= `significance`, with the class of the largest margin as target.
    **One target class is assumed.** An attack with many targets raises many margins and hides its own
    outlier; a defender cannot know which it is, so look at the spread of all K margins beside the verdict.

    Parameters
    ----------
    model
        Any classifier; it is not altered.
    config
        Starts a class and steps: 30 starts, as in the paper's section 4.1.
    significance
        0.05, as in the paper.

    Attributes
    ----------
    margins_
        float64 (K,): the largest margin of each class.
    p_value_, attacked_, target_
        The verdict; `target_` is None where the model is not called attacked.

    Examples
    --------
    >>> import torch
    >>> from bclip_lab.models import resnet10
    >>> clean = LabelledImages(torch.rand(4, 3, 8, 8), torch.arange(4), ("a", "b", "c", "d"))
    >>> verdict = MMBD(resnet10(4, seed=0, width=4), MaximumMarginConfig(per_class=2, steps=5)).fit(clean)
    >>> verdict.margins_.shape, 0 <= verdict.p_value_ <= 1
    ((4,), True)
    """

    def __init__(
        self, model: nn.Module, config: MaximumMarginConfig | None = None, *, significance: float = 0.05
    ) -> None:
        if not 0 < significance < 1:
            raise ValueError(f"significance must lie in (0, 1), got {significance}")
        self.model, self.significance = model, significance
        self.config = config or MaximumMarginConfig(per_class=30)

    def fit(self, clean: LabelledImages) -> MMBD:
        """Find the margins and the verdict. Of `clean` only the shape and the number of classes are used."""
        classes = len(clean.classes)
        if classes < 4:
            raise ValueError(f"MM-BD fits a distribution to K - 1 margins and needs K >= 4 classes, got {classes}")
        _, channels, height, width = clean.images.shape
        found = maximum_margin_images(self.model, (channels, height, width), classes, self.config)
        return self.judge(found.largest().double().numpy())

    def judge(self, margins: NDArray[np.float64]) -> MMBD:
        """The verdict on K margins that are already known."""
        from scipy.stats import gamma  # slow to import

        margins = np.asarray(margins, dtype=np.float64)
        if margins.ndim != 1 or len(margins) < 4 or not np.isfinite(margins).all():
            raise ValueError(f"margins must be at least 4 finite numbers, got {margins}")
        self.margins_ = margins
        # A maximum margin is positive unless a class is never decided for; the floor keeps the fit defined.
        null = np.maximum(np.sort(margins)[:-1], 1e-6)
        if null.std() > 1e-5 * null.mean():
            shape, _, scale = gamma.fit(null, floc=0)
        else:  # all but equal (a model that ignores its input): too narrow for the fit, so a spread of 1e-5
            shape, scale = 1e10, null.mean() / 1e10
        # 1 - (1 - s)^K, written so that a tiny survival s does not round to zero
        survival = float(gamma.sf(margins.max(), shape, scale=scale))
        self.p_value_ = float(-np.expm1(len(margins) * np.log1p(-survival))) if survival < 1 else 1.0
        self.attacked_ = self.p_value_ <= self.significance
        self.target_ = int(margins.argmax()) if self.attacked_ else None
        return self
