"""Thresholds of detectors, and the images behind them: the state behind `DetectionExplorer`, without a kernel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bclip_lab.data.images import Attack, LabelledImages, TriggeredImages, to_float
from bclip_lab.evaluation import Evaluation, RocCurve
from bclip_lab.plots import Detector
from bclip_lab.widgets.samples import sample

__all__ = ["Confusion", "DetectionExploration", "Verdict"]

_BINS = 40


@dataclass(frozen=True)
class Confusion:
    """How many images a threshold sorts where: triggered ones `detected` or `missed`, clean ones `stopped` or `passed`.

    Examples
    --------
    >>> counts = Confusion(detected=9, missed=1, stopped=2, passed=98)
    >>> counts.tpr, counts.fpr
    (0.9, 0.02)
    """

    detected: int
    missed: int
    stopped: int
    passed: int

    @property
    def tpr(self) -> float:
        """True-positive rate: share of triggered images detected."""
        return self.detected / (self.detected + self.missed)

    @property
    def fpr(self) -> float:
        """False-positive rate: share of clean images stopped."""
        return self.stopped / (self.stopped + self.passed)


@dataclass(frozen=True)
class Verdict:
    """What a detector says of one image at a threshold.

    `true` is its true class, `target` the attacker's, None of a clean image; `detected`, whether `score` is
    above the threshold. `original` and `clipped` are the two networks' decisions, `margin` and
    `clipped_margin` those of the class `original` in each of them, `corrected` the decision to act on: all
    None where the detector gives a score alone.
    """

    true: int
    target: int | None
    score: float
    detected: bool
    original: int | None = None
    clipped: int | None = None
    margin: float | None = None
    clipped_margin: float | None = None
    corrected: int | None = None


@dataclass(frozen=True, eq=False)
class _Judged:
    """One detector's scores of all images, and its decisions, where it makes any."""

    fitted: float
    scores: NDArray[np.float64]
    curve: RocCurve
    decisions: dict[str, Tensor] = field(default_factory=dict)


class DetectionExploration:
    """Detectors, a threshold for each that can be moved, and the images that they sort.

    The clean images are a sample of `test`, the triggered ones what the attack makes of the same images. An
    image is named by its number: the clean ones come first, then the triggered ones. It is detected where its
    score is above the threshold.

    Parameters
    ----------
    detectors
        For a name a fitted detector: it has `score(images)` and `threshold_`. Decisions, margins and
        corrections are known of one that also has `decide(images)` as `MMDF` has.
    test
        The images.
    attack
        Makes the triggered images.
    images
        At most so many clean test images are used.
    seed
        Which ones, where there are more.

    Attributes
    ----------
    clean, triggered
        The images. `triggered.rows` are places in `clean`.
    name
        The detector that is looked at.
    chosen
        The image that is looked at: to start with as after `choose_at_threshold`.

    Raises
    ------
    ValueError
        No detector, one without `threshold_`, scores that are not finite, `images` below 1, or an attack that
        turns none of the test images.

    Examples
    --------
    >>> from bclip_lab.attacks import AllToOne, BackdoorAttack, PatchTrigger
    >>> from bclip_lab.data import signs
    >>> class Corner:
    ...     threshold_ = 0.9
    ...     def score(self, images):
    ...         return to_float(images)[:, :, -4:, -4:].amax((1, 2, 3))
    >>> test = signs(train=20, test=20, per_class=1, cache=False).test
    >>> attack = BackdoorAttack(PatchTrigger(), AllToOne(0))
    >>> state = DetectionExploration({"bright corner": Corner()}, test, attack)
    >>> state.set_threshold(0.0)
    >>> state.confusion
    Confusion(detected=18, missed=0, stopped=20, passed=0)
    """

    def __init__(
        self,
        detectors: Mapping[str, Detector],
        test: LabelledImages,
        attack: Attack,
        *,
        images: int = 500,
        seed: int = 0,
    ) -> None:
        if not detectors:
            raise ValueError("detectors must be at least one, got none")
        for name, detector in detectors.items():
            if not hasattr(detector, "threshold_"):
                raise ValueError(f"detectors[{name!r}] has no threshold_: call fit with clean images first")
        self.clean: LabelledImages
        self.triggered: TriggeredImages
        self.clean, self.triggered = sample(test, attack, images, seed)
        self._judged = {name: self._judge(detector) for name, detector in detectors.items()}
        self._thresholds = {name: judged.fitted for name, judged in self._judged.items()}
        self._true = torch.cat([self.clean.labels.cpu(), self.triggered.true_labels.cpu()])
        self.name = next(iter(self._judged))
        self.chosen = 0
        self._among: list[int] = []  # images of the bar that was chosen; none where an image was
        self.choose_at_threshold()

    def _judge(self, detector: Any) -> _Judged:
        parts = self.clean.images, self.triggered.images
        if hasattr(detector, "decide"):
            found = [detector.decide(images) for images in parts]
            names = "original", "clipped", "other", "margin", "clipped_margin"
            decisions = {name: torch.cat([getattr(each, name).cpu() for each in found]) for name in names}
            scores = [each.score for each in found]
        else:
            decisions, scores = {}, [detector.score(images) for images in parts]
        curve = RocCurve(*(each.detach().cpu() for each in scores))
        both = np.concatenate([curve.clean, curve.triggered])
        return _Judged(float(detector.threshold_), both, curve, decisions)

    # --- what there is ---

    @property
    def names(self) -> tuple[str, ...]:
        """The detectors."""
        return tuple(self._judged)

    @property
    def scores(self) -> NDArray[np.float64]:
        """The chosen detector's scores of all images: float64 (N + M,), the clean ones first."""
        return self._judged[self.name].scores

    @property
    def curve(self) -> RocCurve:
        """The chosen detector's ROC."""
        return self._judged[self.name].curve

    @property
    def decides(self) -> bool:
        """Whether the chosen detector makes decisions, too."""
        return bool(self._judged[self.name].decisions)

    @property
    def threshold(self) -> float:
        """The chosen detector's threshold, as it was moved."""
        return self._thresholds[self.name]

    @property
    def fitted(self) -> float:
        """The chosen detector's threshold, as it was fitted."""
        return self._judged[self.name].fitted

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """Which images are on the wrong side of the threshold: bool (N + M,)."""
        detected = self.scores > self.threshold
        detected[len(self.clean) :] ^= True
        return detected

    @property
    def confusion(self) -> Confusion:
        """The counts at the threshold."""
        clean, triggered = (part > self.threshold for part in (self.curve.clean, self.curve.triggered))
        return Confusion(int(triggered.sum()), int((~triggered).sum()), int(clean.sum()), int((~clean).sum()))

    @property
    def corrected(self) -> Evaluation | None:
        """ACC, ASR and RA of the corrected decisions; None where the detector makes none."""
        return self._evaluated(self._corrected()) if self.decides else None

    @property
    def uncorrected(self) -> Evaluation | None:
        """ACC, ASR and RA of the original network; None where the detector makes no decisions."""
        return self._evaluated(self._judged[self.name].decisions["original"]) if self.decides else None

    def histogram(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """Edges (B + 1,) over all scores and the threshold that was fitted, and the share of the clean and of the
        triggered images in each bin (B,)."""
        low, high = min(self.scores.min(), self.fitted), max(self.scores.max(), self.fitted)
        edges = np.linspace(low, high if high > low else low + 1, _BINS + 1)
        clean, triggered = (np.histogram(s, edges)[0] / len(s) for s in (self.curve.clean, self.curve.triggered))
        return edges, clean, triggered

    def verdict(self, image: int) -> Verdict:
        """What the chosen detector says of an image; raises `ValueError` for a number that none has."""
        self._check(image)
        place = image - len(self.clean)
        target = int(self.triggered.targets[place]) if place >= 0 else None
        score = float(self.scores[image])
        seen = Verdict(int(self._true[image]), target, score, score > self.threshold)
        if not self.decides:
            return seen
        made: dict[str, Any] = {
            name: values[image].item() for name, values in self._judged[self.name].decisions.items()
        }
        other = made.pop("other")
        return replace(seen, **made, corrected=other if seen.detected else made["original"])

    def pixels(self, image: int) -> Tensor:
        """An image: float32 (C, H, W) in [0, 1]."""
        self._check(image)
        place = image - len(self.clean)
        return to_float(self.clean.images[image] if place < 0 else self.triggered.images[place]).cpu()

    def original(self, image: int) -> int:
        """The number of a triggered image without its trigger; a clean image's own."""
        self._check(image)
        place = image - len(self.clean)
        return image if place < 0 else int(self.triggered.rows[place])

    # --- what is chosen ---

    def choose_detector(self, name: str) -> None:
        """Look at another detector; the image stays."""
        if name not in self._judged:
            raise ValueError(f"there is no detector {name!r}; the detectors are {', '.join(self.names)}")
        self.name, self._among = name, []

    def set_threshold(self, threshold: float) -> None:
        """Move the chosen detector's threshold; raises `ValueError` unless it is finite."""
        if not math.isfinite(threshold):
            raise ValueError(f"threshold must be finite, got {threshold}")
        self._thresholds[self.name] = float(threshold)

    def choose(self, image: int) -> None:
        """Look at an image; raises `ValueError` for a number that none has."""
        self._check(image)
        if image not in self._among:
            self._among = []
        self.chosen = image

    def choose_near(self, score: float, triggered: bool) -> None:
        """Look at the clean or the triggered image whose score is nearest."""
        part, first = self._part(triggered)
        self.choose(first + int(np.abs(part - score).argmin()))

    def choose_at_threshold(self) -> None:
        """Look at the bar of `histogram` that the threshold lies in, and there at the image of the nearest score.

        Beyond the ends that is the bar at the end. Where the bar has no images, look at the image, of either kind,
        whose score is nearest.
        """
        inner = self.histogram()[0][1:-1]
        places = np.searchsorted(inner, self.scores, "right")  # as numpy's histogram: the last bin has both its ends
        inside = np.flatnonzero(places == np.searchsorted(inner, self.threshold, "right"))
        self._among = inside[self.scores[inside].argsort(kind="stable")].tolist()
        some = inside if len(inside) else np.arange(len(self.scores))
        self.chosen = int(some[np.abs(self.scores[some] - self.threshold).argmin()])

    def choose_point(self, point: int) -> None:
        """Move the threshold to a point of the ROC, and look at the image that brings the curve there.

        Parameters
        ----------
        point
            Its place in `curve.thresholds`. The threshold lies half-way to the next score.
        """
        given = self.curve.thresholds
        if not 0 <= point < len(given):
            raise ValueError(f"point must lie in [0, {len(given)}), got {point}")
        if point == 0:  # nothing is detected
            self.set_threshold(given[1])
        elif point == len(given) - 1:
            self.set_threshold(float(np.nextafter(given[-1], -math.inf)))
        else:
            self.set_threshold((given[point] + given[point + 1]) / 2)
        self.choose(int(np.flatnonzero(self.scores == given[max(point, 1)])[0]))

    def step(self, by: int) -> None:
        """Look at another image of the same kind: so many places higher by score, as far as there are any."""
        order = self._order()
        place = order.index(self.chosen) + by
        self.choose(order[min(max(place, 0), len(order) - 1)])

    @property
    def bar(self) -> list[int]:
        """The images, of both kinds, of the bar that is looked at, the lowest score first; none where an image is."""
        return list(self._among)

    def neighbours(self, count: int) -> list[int]:
        """The chosen image among `count` with the nearest places by score, the lowest score first.

        They are images of `bar` where there are any, else images of the kind of the chosen one.
        """
        order = self._among or self._order()
        first = min(max(order.index(self.chosen) - count // 2, 0), max(len(order) - count, 0))
        return order[first : first + count]

    # --- inside ---

    def _part(self, triggered: bool) -> tuple[NDArray[np.float64], int]:
        """The scores of one kind of images, and the number of the first."""
        return (self.curve.triggered, len(self.clean)) if triggered else (self.curve.clean, 0)

    def _order(self) -> list[int]:
        part, first = self._part(self.chosen >= len(self.clean))
        return [first + int(i) for i in part.argsort(kind="stable")]

    def _corrected(self) -> Tensor:
        made = self._judged[self.name].decisions
        return torch.where(torch.from_numpy(self.scores > self.threshold), made["other"], made["original"])

    def _evaluated(self, decisions: Tensor) -> Evaluation:
        clean, triggered = decisions.split([len(self.clean), len(self.triggered)])
        return Evaluation.from_decisions(clean, self.clean.labels.cpu(), triggered, self.triggered)

    def _check(self, image: int) -> None:
        count = len(self.clean) + len(self.triggered)
        if not 0 <= image < count:
            raise ValueError(f"image must lie in [0, {count}), got {image}")
