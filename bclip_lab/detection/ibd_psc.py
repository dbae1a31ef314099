"""IBD-PSC: a triggered image keeps its confidence when batch-norm parameters are amplified."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bclip_lab.data.images import LabelledImages
from bclip_lab.detection.thresholds import ImageDetector, check_clean
from bclip_lab.models import logits

__all__ = ["IBDPSC"]


def _batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """The batch norms that have a weight and a bias, in the order in which the model registers them."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm) and module.affine]


class IBDPSC(ImageDetector):
    """Detect triggered images by parameter-oriented scaling consistency (Hou et al. 2024, arXiv 2405.09786, section 4).

    Let F_k be the network with weight and bias of its last k batch norms multiplied by omega, p its softmax, and
    c(x) the decision of the network as it is. On clean images k grows from 1 until the error of F_k exceeds xi; then

        score(x) = PSC(x) = 1/n sum over i = k, ..., k + n - 1 of p_c(x)(x; F_i),

    the mean confidence of the original's decision, in [0, 1]. It survives on triggered images.

    The last batch norms are those that the model registers last, as in the authors' code (which amplifies, in every
    F_i, one more of them). A ResNet-18 has 20. The lab's ResNet-10 has 12, and with all of them amplified the error of
    the checkpoints "patch" and "blended" is .55 and .28, below xi: one network is left.

    Parameters
    ----------
    model
        A classifier with batch norms that have weight and bias; it is not altered.
    factor
        omega, above 1: 1.5, the paper's.
    networks
        n: 5, the paper's. A network with fewer than k + n - 1 batch norms gives fewer.
    error
        xi, in (0, 1): 0.6, the paper's. Where no k exceeds it, all batch norms are amplified, in one network.
    fpr
        Nominal false-positive rate, in (0, 0.5): 0.005, as of `MMDF`. The paper's threshold is a score of 0.9, on
        every network alike.

    Attributes
    ----------
    amplified_
        The numbers of batch norms k, ..., k + n - 1 that are amplified.
    errors_
        Errors of F_1, ..., F_k on the clean images, as shares of them.
    scores_
        float64 (N,): the scores of the images given to `fit`.
    threshold_
        Images scoring above it are detected.

    Raises
    ------
    ValueError
        The model has no batch norm with weight and bias, or a setting is out of its range.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> clean = LabelledImages(torch.rand(20, 3, 8, 8), torch.arange(20) % 2, ("cat", "dog"))
    >>> detector = IBDPSC(resnet10(2, seed=0, width=4), error=0.1).fit(clean)
    >>> detector.amplified_
    (1, 2, 3, 4, 5)
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        factor: float = 1.5,
        networks: int = 5,
        error: float = 0.6,
        fpr: float = 0.005,
    ) -> None:
        super().__init__(model, fpr)
        if not _batch_norms(model):
            raise ValueError(f"model must have batch norms with weight and bias, {type(model).__name__} has none")
        if not 1 < factor < math.inf:
            raise ValueError(f"factor must be finite and above 1, got {factor}")
        if networks < 1:
            raise ValueError(f"networks must be at least 1, got {networks}")
        if not 0 < error < 1:
            raise ValueError(f"error must lie in (0, 1), got {error}")
        self.factor, self.networks, self.error = factor, networks, error

    def fit(self, clean: LabelledImages) -> IBDPSC:
        """Find k on clean images by their labels, and set the threshold on the same images."""
        check_clean(clean)
        batch_norms, labels = len(_batch_norms(self.model)), clean.labels.cpu()
        self.errors_: list[float] = []
        for first in range(1, batch_norms + 1):
            wrong = logits(self._amplify(first), clean).argmax(1) != labels
            self.errors_.append(float(wrong.double().mean()))
            if self.errors_[-1] > self.error:
                break
        self.amplified_ = tuple(range(first, min(first + self.networks - 1, batch_norms) + 1))
        return self._calibrate(clean)

    def _amplify(self, count: int) -> nn.Module:
        """A copy whose last `count` batch norms are amplified."""
        amplified = copy.deepcopy(self.model)
        with torch.no_grad():
            for module in _batch_norms(amplified)[-count:]:
                module.weight.mul_(self.factor)
                module.bias.mul_(self.factor)
        return amplified

    def _score(self, images: Tensor) -> Tensor:
        decision = logits(self.model, images).argmax(1, keepdim=True)
        confidences = [
            logits(self._amplify(count), images).softmax(1).gather(1, decision).squeeze(1) for count in self.amplified_
        ]
        return torch.stack(confidences).mean(0)
