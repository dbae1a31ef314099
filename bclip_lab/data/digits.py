"""Handwritten digits that come with scikit-learn: no download."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

from bclip_lab.data.folder import split_at_random
from bclip_lab.data.images import LabelledImages, Splits

__all__ = ["digits"]


def digits(*, per_class: int = 20, seed: int = 0) -> Splits:
    """Ten handwritten digits, scikit-learn's 1,797 images of 8x8, enlarged to 32x32: no download.

    The images are the test part of Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI
    Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49: grey values 0 to 16, here enlarged
    bilinearly, scaled to 0 to 255 and put into three equal channels. 60 % of every class (about 108 images)
    train; the other parts come out of the remaining 40 % (about 72).

    Parameters
    ----------
    per_class
        Images of each class in the defender's and in the calibration part; at most 34. 20 leaves about 32 a
        class to test on; the 50 of arXiv 2308.04617 are more than this small set can give.
    seed
        The same seed gives the same parts.

    Returns
    -------
    Splits
        Images uint8 (N, 3, 32, 32).

    Raises
    ------
    ValueError
        `per_class` is below 1 or too large.

    Examples
    --------
    >>> splits = digits()
    >>> splits.train.images.shape, len(splits.defender), len(splits.test)
    (torch.Size([1078, 3, 32, 32]), 200, 319)
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    grey = torch.from_numpy(source.images.astype(np.float32))[:, None]
    large = F.interpolate(grey, size=32, mode="bilinear", align_corners=False)
    images = (large * (255 / 16)).round().to(torch.uint8).repeat(1, 3, 1, 1)
    labels = torch.from_numpy(source.target.astype(np.int64))
    train, test = split_at_random(LabelledImages(images, labels, tuple("0123456789")), 0.4, seed)
    return Splits.from_parts(train, test, per_class=per_class, seed=seed)
