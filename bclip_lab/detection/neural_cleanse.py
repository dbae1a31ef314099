"""Neural Cleanse: is this model attacked, and to which classes?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import nn

from bclip_lab.data.images import LabelledImages
from bclip_lab.inversion import InversionConfig, InvertedTriggers, anomaly_indices, invert_triggers
from bclip_lab.training import run

__all__ = ["NeuralCleanse"]


class NeuralCleanse:
    """Detect a backdoored model by a class that a small trigger leads to (Wang et al., IEEE S&P 2019, section IV).

    For each class the smallest trigger that takes the clean images to it is sought (`invert_triggers`). The norms of
    the masks are compared by `anomaly_indices`: a class whose mask is smaller than the median by more than
    `threshold` robust standard deviations is flagged; large masks never are. **Few target classes are assumed**, and
    a small trigger: an attack on all classes has no outlier, and a trigger as large as the image need not be found. No
    index can exceed the median over its deviation: where the masks of clean classes differ much, so does little
    stand out. The zoo's patch is found, 3 pixels against a median of 121, at an index of 2.0.
    See `norms_` beside the verdict.

    Parameters
    ----------
    model
        Any classifier; it is not altered.
    config
        Of the search: `InversionConfig()` by default.
    threshold
        2, as in the paper's section IV.A.

    Attributes
    ----------
    triggers_
        The `InvertedTriggers`; None where `judge` was called with norms alone.
    norms_
        float64 (K,): the norm of each class's mask, in pixels.
    anomaly_indices_
        float64 (K,): see `anomaly_indices`.
    anomaly_index_
        The largest of them, the score of the model: that of the smallest mask.
    flagged_
        The classes above the threshold, the smallest mask first.
    attacked_, target_
        The verdict; `target_` is the first of `flagged_`, None where the model is not called attacked.

    Examples
    --------
    >>> import torch
    >>> from bclip_lab.models import resnet10
    >>> clean = LabelledImages(torch.rand(4, 3, 8, 8), torch.arange(4), ("a", "b", "c", "d"))
    >>> verdict = NeuralCleanse(resnet10(4, seed=0, width=4), InversionConfig(steps=10)).fit(clean)
    >>> verdict.norms_.shape, verdict.triggers_.masks.shape
    ((4,), torch.Size([4, 8, 8]))
    >>> verdict.judge([40.0, 44.0, 42.0, 5.0]).flagged_
    (3,)
    """

    def __init__(self, model: nn.Module, config: InversionConfig | None = None, *, threshold: float = 2.0) -> None:
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, got {threshold}")
        self.model, self.threshold = model, threshold
        self.config = config or InversionConfig()

    def fit(self, clean: LabelledImages) -> NeuralCleanse:
        """Seek the triggers on clean images (their labels are not used) and reach the verdict."""
        if len(clean.classes) < 3:
            raise ValueError(f"Neural Cleanse compares at least 3 classes, got {len(clean.classes)}")
        triggers = run(invert_triggers(self.model, clean, self.config)).triggers
        return self._judge(triggers.norms, triggers)

    def judge(self, norms: ArrayLike) -> NeuralCleanse:
        """The verdict on the norms of K masks that are already known."""
        return self._judge(norms, None)

    def _judge(self, norms: ArrayLike, triggers: InvertedTriggers | None) -> NeuralCleanse:
        self.triggers_ = triggers
        self.norms_: NDArray[np.float64] = np.asarray(norms, dtype=np.float64)
        self.anomaly_indices_ = anomaly_indices(self.norms_)
        self.anomaly_index_ = float(self.anomaly_indices_.max())
        order = np.argsort(self.norms_, kind="stable")
        self.flagged_ = tuple(int(c) for c in order if self.anomaly_indices_[c] > self.threshold)
        self.attacked_ = bool(self.flagged_)
        self.target_ = self.flagged_[0] if self.flagged_ else None
        return self
