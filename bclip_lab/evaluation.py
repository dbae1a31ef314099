"""ACC, ASR and RA of a model, the ROC of a detector, and how visible a trigger is."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import Attack, LabelledImages, TriggeredImages, check_images, to_float
from bclip_lab.models import logits

__all__ = ["Evaluation", "RocCurve", "SiteASR", "Visibility", "evaluate", "site_asr"]

_BATCH = 500  # images at once in `Visibility.from_images`; memory is bounded by it


@dataclass(frozen=True)
class Evaluation:
    """How a model does on clean and on triggered images.

    acc
        Accuracy (ACC): share of clean test images that get their true label.
    asr
        Attack success rate (ASR): share of triggered images that get the attacker's target. Images whose true
        label is already the target are not among them. `nan` without an attack.
    ra
        Recovered (robust) accuracy (RA): share of the same triggered images that get their *true* label; the
        authors' PACC (arXiv 2308.04617, section 4). `nan` without an attack.
    clean, triggered
        How many images the fractions count.

    Examples
    --------
    >>> Evaluation(acc=0.99, asr=0.5, ra=0.25, clean=100, triggered=80)
    Evaluation(ACC 0.990 of 100, ASR 0.500, RA 0.250 of 80)
    """

    acc: float
    asr: float
    ra: float
    clean: int
    triggered: int

    def __repr__(self) -> str:
        text = f"Evaluation(ACC {self.acc:.3f} of {self.clean}"
        return text + (f", ASR {self.asr:.3f}, RA {self.ra:.3f} of {self.triggered})" if self.triggered else ")")

    @classmethod
    def from_decisions(
        cls,
        clean: Tensor,
        labels: Tensor,
        triggered: Tensor | None = None,
        images: TriggeredImages | None = None,
    ) -> Evaluation:
        """Count decisions, int64 (N,) on clean images of true `labels` and (M,) on `images`.

        Examples
        --------
        >>> import torch
        >>> Evaluation.from_decisions(torch.tensor([0, 1]), torch.tensor([0, 0]))
        Evaluation(ACC 0.500 of 2)
        """
        acc = float((clean == labels.to(clean.device)).double().mean())
        if triggered is None or images is None:
            return cls(acc, float("nan"), float("nan"), len(clean), 0)
        asr = float((triggered == images.targets.to(triggered.device)).double().mean())
        ra = float((triggered == images.true_labels.to(triggered.device)).double().mean())
        return cls(acc, asr, ra, len(clean), len(triggered))


def evaluate(model: nn.Module, test: LabelledImages, attack: Attack | None = None) -> Evaluation:
    """ACC of a model on clean test images; with an attack, ASR and RA on triggered ones.

    Parameters
    ----------
    model
        Any classifier of images (N, C, H, W), float32 in [0, 1]; evaluated in evaluation mode, its mode is
        restored.
    test
        Clean images with their true labels.
    attack
        Makes the triggered images out of `test`.

    Raises
    ------
    ValueError
        `test` is empty, or the model knows fewer classes than the images have.
    """
    scores = logits(model, test)
    if scores.shape[1] < len(test.classes):
        raise ValueError(f"model has {scores.shape[1]} classes, the images have {len(test.classes)}")
    labels = test.labels.cpu()
    if attack is None:
        return Evaluation.from_decisions(scores.argmax(1), labels)
    triggered = attack.triggered(test)
    return Evaluation.from_decisions(scores.argmax(1), labels, logits(model, triggered.images).argmax(1), triggered)


@dataclass(frozen=True)
class SiteASR:
    """ASR with the bounds of one site taken by themselves.

    alone
        ASR where this site alone is clipped: near 0, its bounds are enough; near the unclipped network's, they do
        nothing by themselves.
    opened
        ASR where every site but this one is clipped: near the unclipped network's, the defence hangs on this site;
        near the clipped one's, the others do without it.
    """

    alone: float
    opened: float


def site_asr(clipped: ClippedModel, triggered: TriggeredImages) -> dict[str, SiteASR]:
    """Where the bounds act: for every site the ASR with its bounds alone, and with all others.

    Two numbers, since sites share the work: a backdoor that several sites hold back comes through none that is opened,
    and one that only all of them together hold back is stopped by none alone.

    Parameters
    ----------
    clipped
        With the bounds that are to be looked at; they are as before afterwards.
    triggered
        Of which no true label is the target, as an attack makes them.

    Returns
    -------
    dict
        For every site, in the order of the sites, `SiteASR`, each in [0, 1].

    Raises
    ------
    ValueError
        There are no triggered images.

    Examples
    --------
    >>> import torch
    >>> from bclip_lab.attacks import AllToOne, BackdoorAttack, PatchTrigger
    >>> from bclip_lab.models import resnet10
    >>> images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> clean = LabelledImages(images, torch.arange(8) % 4, ("a", "b", "c", "d"))
    >>> triggered = BackdoorAttack(PatchTrigger(), AllToOne(0), 0.1).triggered(clean)
    >>> list(site_asr(ClippedModel(resnet10(4, seed=0, width=4)), triggered))[:2]
    ['relu', 'stages.0.0.relu']
    """
    if not len(triggered.images):
        raise ValueError("triggered holds no images")
    learned = clipped.bounds
    opened = dict.fromkeys(learned, float("inf"))

    def asr(bounds: dict[str, Tensor | float]) -> float:
        clipped.set_bounds(bounds)
        decided = logits(clipped, triggered.images).argmax(1)
        return float((decided == triggered.targets.to(decided.device)).double().mean())

    try:
        return {
            site: SiteASR(asr({**opened, site: learned[site]}), asr({**learned, site: float("inf")}))
            for site in learned
        }
    finally:
        clipped.set_bounds(learned)


@dataclass(frozen=True, eq=False)
class RocCurve:
    """ROC of a detector whose score is higher on triggered images.

    Parameters
    ----------
    clean, triggered
        Scores, float (N,) and (M,), of clean and of triggered images.

    Attributes
    ----------
    false_positive_rate, true_positive_rate, thresholds
        float (T,): points of the curve, as `sklearn.metrics.roc_curve` gives them; an image is called
        triggered where its score is at least the threshold.
    auroc
        Area under the curve, in [0, 1].

    Raises
    ------
    ValueError
        Either part is empty, or a score is NaN or infinite.

    Examples
    --------
    >>> curve = RocCurve([0.0, 1.0, 2.0, 3.0], [2.5, 4.0])
    >>> curve.auroc, curve.tpr_at(0.0)
    (0.875, 0.5)
    """

    clean: NDArray[np.float64] = field(repr=False)
    triggered: NDArray[np.float64] = field(repr=False)
    false_positive_rate: NDArray[np.float64] = field(init=False, repr=False)
    true_positive_rate: NDArray[np.float64] = field(init=False, repr=False)
    thresholds: NDArray[np.float64] = field(init=False, repr=False)
    auroc: float = field(init=False)

    def __init__(self, clean: ArrayLike | Tensor, triggered: ArrayLike | Tensor) -> None:
        from sklearn.metrics import roc_auc_score, roc_curve  # slow to import, and few callers need it

        parts = {"clean": clean, "triggered": triggered}
        for name, given in parts.items():
            scores = np.asarray(given, dtype=np.float64).ravel()
            if not scores.size or not np.isfinite(scores).all():
                raise ValueError(
                    f"{name} must hold at least one score and finite ones only, got {scores.size} scores, "
                    f"{np.isfinite(scores).sum()} of them finite"
                )
            object.__setattr__(self, name, scores)
        scores = np.concatenate([self.clean, self.triggered])
        labels = np.repeat([0, 1], [self.clean.size, self.triggered.size])
        curve = roc_curve(labels, scores, drop_intermediate=False)
        for name, values in zip(("false_positive_rate", "true_positive_rate", "thresholds"), curve, strict=True):
            object.__setattr__(self, name, values)
        object.__setattr__(self, "auroc", float(roc_auc_score(labels, scores)))

    def tpr_at(self, fpr: float) -> float:
        """The largest true-positive rate at a false-positive rate of at most `fpr`, in [0, 1]."""
        if not 0 <= fpr <= 1:
            raise ValueError(f"fpr must lie in [0, 1], got {fpr}")
        return float(self.true_positive_rate[self.false_positive_rate <= fpr].max())

    def rates_at(self, threshold: float) -> tuple[float, float]:
        """False- and true-positive rate where images scoring above `threshold` are called triggered."""
        return float((self.clean > threshold).mean()), float((self.triggered > threshold).mean())


@dataclass(frozen=True)
class Visibility:
    """How much a trigger changes images: norms, and two measures of likeness.

    Of every image x in [0, 1] with its triggered copy x' the following is taken; a field is its mean over the images.

    l_inf
        max |x' - x|, the largest change of a value, in units of the range [0, 1].
    l_2
        sqrt(sum (x' - x)^2) over all values of an image, in the same units; it grows with the image's size.
    changed
        Share of pixels that differ in any channel.
    psnr
        Peak signal-to-noise ratio, 10 log10(1 / mean (x' - x)^2), in dB: higher is fainter. +inf where x' is x, so a
        single unchanged image makes the mean +inf. It is taken image by image, since an onlooker sees one image at a
        time; the ratio of a whole batch would follow its most changed images.
    ssim
        Structural similarity (Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity",
        IEEE Transactions on Image Processing 13(4), 2004): means, variances and covariance in a Gaussian window of
        11x11 pixels and standard deviation 1.5, each channel by itself. At most 1, which is x' = x.
    images
        How many images the means are over.

    Both measures are torchmetrics' (`torchmetrics.functional.image`), with its defaults and a data range of 1.

    Examples
    --------
    >>> Visibility(l_inf=0.2, l_2=1.5, changed=0.5, psnr=31.25, ssim=0.95, images=10)
    Visibility(L-inf 0.200, L2 1.50, changed 50.0 %, PSNR 31.2 dB, SSIM 0.950 of 10)
    """

    l_inf: float
    l_2: float
    changed: float
    psnr: float
    ssim: float
    images: int

    def __repr__(self) -> str:
        return (
            f"Visibility(L-inf {self.l_inf:.3f}, L2 {self.l_2:.2f}, changed {self.changed * 100:.1f} %, "
            f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.3f} of {self.images})"
        )

    @classmethod
    def from_images(cls, clean: Tensor, triggered: Tensor) -> Visibility:
        """Compare images (N, C, H, W), uint8 or float32 in [0, 1], with their triggered copies.

        Raises
        ------
        ValueError
            No images, a wrong dtype or range, copies of another shape or dtype, or images with a side below 6 pixels:
            the window of SSIM does not fit.

        Examples
        --------
        >>> from bclip_lab.attacks import CheckerboardTrigger
        >>> grey = torch.full((4, 3, 8, 8), 0.5)
        >>> Visibility.from_images(grey, CheckerboardTrigger(delta=0.1).embed(grey))
        Visibility(L-inf 0.100, L2 0.98, changed 50.0 %, PSNR 23.0 dB, SSIM 0.264 of 4)
        """
        from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

        check_images(clean, "clean")
        check_images(triggered, "triggered")
        if triggered.shape != clean.shape or triggered.dtype != clean.dtype:
            raise ValueError(
                f"triggered must be as clean, {clean.dtype} {tuple(clean.shape)}, "
                f"got {triggered.dtype} {tuple(triggered.shape)}"
            )
        if not len(clean):
            raise ValueError("clean is empty")
        if min(clean.shape[-2:]) < 6:
            raise ValueError(f"clean must be images of at least 6x6 pixels, got {clean.shape[-2]}x{clean.shape[-1]}")
        parts = []
        for before, after in zip(clean.split(_BATCH), triggered.split(_BATCH), strict=True):
            before, after = to_float(before), to_float(after)
            change = (after - before).abs()
            likeness = structural_similarity_index_measure(after, before, data_range=1.0, reduction="none")
            assert isinstance(likeness, Tensor)  # a pair only where the picture of it is asked for, too
            parts.append(
                torch.stack(
                    [
                        change.amax((1, 2, 3)),
                        change.square().sum((1, 2, 3)).sqrt(),
                        change.any(1).float().mean((1, 2)),
                        peak_signal_noise_ratio(after, before, data_range=1.0, reduction="none", dim=(1, 2, 3)),
                        likeness,
                    ]
                )
            )
        l_inf, l_2, changed, psnr, ssim = torch.cat(parts, 1).double().mean(1).tolist()
        return cls(l_inf, l_2, changed, psnr, ssim, len(clean))
