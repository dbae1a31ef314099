"""Invert triggers: for each class the smallest change that takes every image to it (Neural Cleanse's search)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bclip_lab.data.images import LabelledImages, check_images, to_float
from bclip_lab.models import bfloat16_is_fast, device_of, images_at_once
from bclip_lab.optimisers import Adam
from bclip_lab.training import trainable_copy

__all__ = ["InversionConfig", "InversionStep", "InvertedTriggers", "anomaly_indices", "invert_triggers"]


@dataclass(frozen=True, kw_only=True)
class InversionConfig:
    """Hyper-parameters of `invert_triggers`; the schedule is the authors', its length the lab's.

    Sources: the paper (Wang et al., IEEE S&P 2019), section IV; the authors' code (`visualizer.py` and
    `gtsrb_visualize_example.py`), whose long search is `InversionConfig.published()`; BackdoorBench's
    `defense/nc.py`. For ten classes of 32x32 pixels and a ResNet-10 of width 16 the lab's search ends by itself after
    500 to 700 steps, 30 to 40 s on one core. On development networks the verdicts at 300 steps were the same, and the
    largest masks a tenth larger; so were they at 400 steps of 20 images (52 s).

    Parameters
    ----------
    steps
        Of Adam, at most: 1,000. BackdoorBench takes some 400, the authors' code up to 31,000.
    batch_size
        Clean images a step, the same for all classes: 8 (32 in the authors' code).
    learning_rate
        Of Adam: 0.1, with its decays at 0.5 and 0.9, all from the authors' code.
    success
        What the trigger of a class must reach, as a share of the images: 0.98 (BackdoorBench); 0.99 in the paper.
    cost
        The weight of the mask's norm is 0 until this success has held for `patience` checks, then this: 0.001.
    cost_factor
        After `patience` checks at which the success is reached in a row the cost is multiplied by this (2); after as
        many at which it is not, divided by its power of 1.5.
    check_every
        Steps between checks: 12. Success is counted over the images of these steps, 96 (authors: 992).
    patience, stop_after
        Checks: 2 and 8 (authors: 5 and 25). A class is finished when its cost has gone up and down and its norm has
        not fallen for `stop_after` checks.
    seed
        Of the first masks and patterns, uniform in [0, 1], and of the order of the images.
    """

    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 0.1
    success: float = 0.98
    cost: float = 1e-3
    cost_factor: float = 2.0
    check_every: int = 12
    patience: int = 2
    stop_after: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.batch_size, self.check_every, self.patience, self.stop_after) < 1:
            raise ValueError(
                "steps, batch_size, check_every, patience and stop_after must be >= 1, got "
                f"{self.steps}, {self.batch_size}, {self.check_every}, {self.patience}, {self.stop_after}"
            )
        if not (self.learning_rate > 0 and self.cost > 0 and self.cost_factor > 1):
            raise ValueError(
                "learning_rate and cost must be positive and cost_factor above 1, got "
                f"{self.learning_rate}, {self.cost}, {self.cost_factor}"
            )
        if not 0 < self.success <= 1:
            raise ValueError(f"success must lie in (0, 1], got {self.success}")

    @classmethod
    def published(cls, seed: int = 0) -> InversionConfig:
        """The authors' search (`gtsrb_visualize_example.py`): up to 1,000 checks, each after 31 steps of 32 images."""
        return cls(steps=31_000, batch_size=32, success=0.99, check_every=31, patience=5, stop_after=25, seed=seed)


@dataclass(frozen=True, eq=False)
class InvertedTriggers:
    """One trigger for each of K classes: x' = (1 - mask) * x + mask * pattern.

    `masks` float32 (K, H, W) and `patterns` float32 (K, C, H, W), in [0, 1]; `norms` float64 (K,), the sum of each
    mask, in pixels; `success_rates` float64 (K,): the share of the images shown before the check at which this
    trigger was kept that were taken to its class.
    """

    masks: Tensor
    patterns: Tensor
    norms: NDArray[np.float64]
    success_rates: NDArray[np.float64]

    def embed(self, images: Tensor, target: int) -> Tensor:
        """Copies of images (N, C, H, W) with the trigger of class `target`: same shape, dtype and range.

        Raises `ValueError` for an unknown class or images of another shape.
        """
        check_images(images)
        if not 0 <= target < len(self.masks):
            raise ValueError(f"target must lie in [0, {len(self.masks)}), got {target}")
        if images.shape[1:] != self.patterns.shape[1:]:
            raise ValueError(
                f"images must have shape (N, {', '.join(map(str, self.patterns.shape[1:]))}), got {tuple(images.shape)}"
            )
        mask, pattern = self.masks[target].to(images.device), self.patterns[target].to(images.device)
        triggered = torch.lerp(to_float(images), pattern, mask).clamp(0, 1)
        return (triggered * 255).round().to(torch.uint8) if images.dtype == torch.uint8 else triggered


@dataclass(frozen=True, eq=False)
class InversionStep:
    """Progress at a check, after `step` of at most `steps` steps of Adam.

    float64 (K,) each: `norms` of the masks as they are now, in pixels; `success`, the share of the images since the
    last check that were taken to the class; `costs`. `running` bool (K,): the classes that are still sought (of the
    others the three values are those of their last check). `triggers`: the best so far.
    """

    step: int
    steps: int
    norms: NDArray[np.float64]
    success: NDArray[np.float64]
    costs: NDArray[np.float64]
    running: NDArray[np.bool_]
    triggers: InvertedTriggers = field(repr=False)


def anomaly_indices(norms: ArrayLike) -> NDArray[np.float64]:
    """How far each norm lies below the median, in robust standard deviations.

    (median - norm) / (1.4826 * median of |norm - median|): Neural Cleanse (section IV.A), with the sign that makes
    *small* norms large indices. Above 2 a class is flagged: some 2 % of normally distributed norms are.

    Parameters
    ----------
    norms
        (K,): K >= 3 finite norms of masks.

    Returns
    -------
    NDArray
        float64 (K,).

    Examples
    --------
    >>> anomaly_indices([10.0, 50.0, 52.0, 48.0, 50.0]).round(1).tolist()
    [13.5, 0.0, -0.7, 0.7, 0.0]
    """
    norms = np.asarray(norms, dtype=np.float64)
    if norms.ndim != 1 or len(norms) < 3 or not np.isfinite(norms).all():
        raise ValueError(f"norms must be at least 3 finite numbers, got {norms}")
    below: NDArray[np.float64] = np.median(norms) - norms
    # the floor keeps the index defined where more than half of the norms are equal
    deviation = max(1.4826 * float(np.median(np.abs(below))), 1e-6 * float(np.abs(norms).max()), 1e-300)
    return below / deviation


def _unit(raw: Tensor) -> Tensor:
    """What Adam moves, as values in [0, 1]."""
    return (torch.tanh(raw) + 1) / 2


class _CostSchedule:
    """The weight of the mask's norm, for each class on its own (the authors' `visualizer.py`)."""

    def __init__(self, classes: int, config: InversionConfig) -> None:
        self.config = config
        self.costs = np.zeros(classes)
        self.best = np.full(classes, np.inf)
        self.above, self.below, self.stale = (np.zeros(classes, dtype=int) for _ in range(3))
        self.raised, self.lowered, self.finished = (np.zeros(classes, dtype=bool) for _ in range(3))

    def check(self, success: NDArray[np.float64], norms: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Set the costs by the success and the norms (K,) since the last check; where did the norm fall?"""
        config = self.config
        reached = success >= config.success
        better = reached & (norms < self.best)
        self.best = np.where(better, norms, self.best)
        self.stale = np.where(better, 0, self.stale + 1)
        self.above = np.where(reached, self.above + 1, 0)
        self.below = np.where(reached, 0, self.below + 1)
        up, down, begun = self.above >= config.patience, self.below >= config.patience, self.costs > 0
        self.raised |= up & begun
        self.lowered |= down & begun
        factors = np.where(up, config.cost_factor, np.where(down, config.cost_factor**-1.5, 1.0))
        costs = np.where(up & ~begun, config.cost, self.costs * factors)
        self.costs = np.where(self.finished, self.costs, costs)
        self.above[up] = 0
        self.below[down] = 0
        self.finished |= self.raised & self.lowered & np.isfinite(self.best) & (self.stale >= config.stop_after)
        return better


def _batches(images: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches without end, shuffled anew on every pass."""
    while True:
        for rows in torch.randperm(len(images), generator=generator).split(size):
            yield images[rows.to(images.device)]


def invert_triggers(
    model: nn.Module, clean: LabelledImages, config: InversionConfig | None = None
) -> Iterator[InversionStep]:
    """For each class t, seek a small mask m and a pattern p that take all images to t.

        minimise over m, p in [0, 1]:  mean over x of CE(g((1 - m) * x + m * p), t) + cost_t * |m|_1

    (Neural Cleanse, Wang et al., IEEE S&P 2019, equations 2 and 3). m and p are (1 + tanh(.)) / 2 of what Adam
    moves; the cost of each class follows its success (`InversionConfig`), and the smallest mask with that success is
    kept. A class no trigger was found for keeps its last mask.

    All classes are sought at once, on the same images: a step of ten classes is one batch of 80 images.

    Parameters
    ----------
    model
        Any classifier; not altered (the search runs on a frozen copy, in evaluation mode).
    clean
        Clean images; labels are not used, since a trigger shall take the images of every class, as in the authors'
        code.
    config
        `InversionConfig()` by default.

    Yields
    ------
    InversionStep
        One every `check_every` steps.

    Raises
    ------
    ValueError
        No images, or fewer classes in the model than in `clean`.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> from bclip_lab.training import run
    >>> clean = LabelledImages(torch.rand(6, 3, 8, 8), torch.arange(6) % 3, ("a", "b", "c"))
    >>> found = run(invert_triggers(resnet10(3, seed=0, width=4), clean, InversionConfig(steps=10))).triggers
    >>> found.masks.shape, found.patterns.shape, found.norms.shape
    (torch.Size([3, 8, 8]), torch.Size([3, 3, 8, 8]), (3,))
    """
    config = config or InversionConfig()
    network = trainable_copy(model, clean).requires_grad_(False)
    classes = len(clean.classes)
    device = device_of(network)
    images = to_float(clean.images.to(device))
    shape = images.shape[1:]
    generator = torch.Generator().manual_seed(config.seed)
    raw_masks, raw_patterns = (
        torch.atanh((2 * torch.rand((classes, *size), generator=generator) - 1) * (1 - 1e-6)).to(device)
        for size in ((1, *shape[1:]), shape)
    )
    optimiser = Adam([raw_masks, raw_patterns], lr=config.learning_rate, betas=(0.5, 0.9))
    schedule = _CostSchedule(classes, config)
    norms, success, seen = np.zeros(classes), np.zeros(classes), 0
    best = InvertedTriggers(_unit(raw_masks).cpu()[:, 0], _unit(raw_patterns).cpu(), norms, success)
    hits = torch.zeros(classes, dtype=torch.int64, device=device)
    batches = _batches(images, config.batch_size, generator)
    for step in range(1, config.steps + 1):
        x = next(batches)
        running = torch.from_numpy(~schedule.finished).to(device)
        costs = torch.from_numpy(schedule.costs).float().to(device)
        raw_masks.grad, raw_patterns.grad = torch.zeros_like(raw_masks), torch.zeros_like(raw_patterns)
        for some in torch.nonzero(running).flatten().split(max(1, images_at_once(shape) // len(x))):
            own = raw_masks[some].requires_grad_(), raw_patterns[some].requires_grad_()
            masks, patterns = _unit(own[0])[:, None], _unit(own[1])[:, None]
            triggered = torch.lerp(x, patterns, masks).flatten(0, 1).contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16_is_fast(device)):
                out = network(triggered)
            targets = some.repeat_interleave(len(x))
            loss = F.cross_entropy(out.float(), targets, reduction="sum") / len(x)
            loss = loss + (costs[some] * masks.flatten(1).sum(1)).sum()
            raw_masks.grad[some], raw_patterns.grad[some] = torch.autograd.grad(loss, own)
            hits[some] += (out.argmax(1) == targets).view(len(some), -1).sum(1)
        optimiser.step()
        seen += len(x)
        if step % config.check_every and step < config.steps:
            continue
        masks, patterns = _unit(raw_masks).cpu()[:, 0], _unit(raw_patterns).cpu()
        sought = ~schedule.finished
        norms = np.where(sought, masks.double().sum((1, 2)).numpy(), norms)
        success = np.where(sought, hits.cpu().numpy() / seen, success)
        hits.zero_()
        seen = 0
        better = schedule.check(success, norms) | (np.isinf(schedule.best) & sought)
        kept = torch.from_numpy(better)
        best = InvertedTriggers(
            torch.where(kept[:, None, None], masks, best.masks),
            torch.where(kept[:, None, None, None], patterns, best.patterns),
            np.where(better, norms, best.norms),
            np.where(better, success, best.success_rates),
        )
        yield InversionStep(step, config.steps, norms, success, schedule.costs, ~schedule.finished, best)
        if schedule.finished.all():
            return
