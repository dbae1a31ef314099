"""Unlearning: invert the triggers, and train the network to see through them (Neural Cleanse's mitigation)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import nn

from bclip_lab.data.images import LabelledImages
from bclip_lab.inversion import InversionConfig, InvertedTriggers, anomaly_indices, invert_triggers
from bclip_lab.training import TrainConfig, run, train, trainable_copy

__all__ = ["UnlearningConfig", "UnlearningStep", "unlearn"]


@dataclass(frozen=True, kw_only=True)
class UnlearningConfig:
    """Hyper-parameters of `unlearn`; the paper is Wang et al., IEEE S&P 2019.

    Parameters
    ----------
    inversion
        How triggers are sought.
    threshold
        Classes of a larger anomaly index are flagged: 2, as in the paper's section IV.A.
    classes
        Which triggers are unlearned; None, the default, takes the flagged ones.
    share
        Of the clean images, the share that gets a trigger: 0.2 (section VI.C).
    training
        The fine-tuning: 10 epochs of 32 images a step, at a peak learning rate of 0.01. The paper takes one epoch of
        a tenth of the training set, a hundred steps and more, which 500 images do not give: one epoch of theirs left
        ASR .07 and .13 on two development networks (patch, blended), ten .000 and .002, at no loss of accuracy.
    seed
        Of everything: it replaces the seeds of `inversion` and `training`.
    """

    inversion: InversionConfig = field(default_factory=InversionConfig)
    threshold: float = 2.0
    classes: tuple[int, ...] | None = None
    share: float = 0.2
    training: TrainConfig = field(default_factory=lambda: TrainConfig(epochs=10, batch_size=32, learning_rate=0.01))
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise ValueError(f"threshold must be positive, got {self.threshold}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must lie in (0, 1], got {self.share}")


@dataclass(frozen=True)
class UnlearningStep:
    """Progress: epoch 0 when the triggers are found, then one record an epoch of the fine-tuning.

    `loss` and `train_accuracy` are those of `TrainStep`, `nan` at epoch 0; `classes` those that are unlearned;
    `triggers` what was found. `model` is the defended network.
    """

    epoch: int
    epochs: int
    loss: float
    train_accuracy: float
    classes: tuple[int, ...]
    triggers: InvertedTriggers = field(repr=False)
    model: nn.Module = field(repr=False)


def unlearn(
    model: nn.Module, clean: LabelledImages, config: UnlearningConfig | None = None
) -> Iterator[UnlearningStep]:
    """Fine-tune on clean images of which some carry the inverted triggers and their true labels.

    Neural Cleanse's mitigation (Wang et al., IEEE S&P 2019, section VI.C): the triggers of the flagged classes
    are put into a share of the images, once for each flagged class (as in BackdoorBench's `defense/nc.py`). **Where
    no class is flagged the network stays as it is**, in the paper and in BackdoorBench, too: `unlearn` then ends at
    epoch 0. `UnlearningConfig.classes` unlearns given classes all the same. All ten took a development network with an
    all-to-all backdoor, of which none was flagged, from ASR .997 to .001 and ACC .998 to .994; a clean one paid .014.

    Parameters
    ----------
    model
        Any classifier; not altered.
    clean
        The defender's clean images with their true labels.
    config
        `UnlearningConfig()` by default.

    Yields
    ------
    UnlearningStep
        One when the triggers are found, one an epoch.

    Raises
    ------
    ValueError
        Fewer than three classes or two images, a class that does not exist, or fewer classes in the model than in
        `clean`.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> clean = LabelledImages(torch.rand(9, 3, 8, 8), torch.arange(9) % 3, ("a", "b", "c"))
    >>> config = UnlearningConfig(
    ...     inversion=InversionConfig(steps=5), classes=(1,), training=TrainConfig(epochs=2, batch_size=4)
    ... )
    >>> [(step.epoch, step.classes) for step in unlearn(resnet10(3, seed=0, width=4), clean, config)]
    [(0, (1,)), (1, (1,)), (2, (1,))]
    """
    config = config or UnlearningConfig()
    number = len(clean.classes)
    if number < 3 or len(clean) < 2:
        raise ValueError(f"clean must hold at least 2 images of at least 3 classes, got {len(clean)} of {number}")
    if config.classes is not None and not all(0 <= target < number for target in config.classes):
        raise ValueError(f"UnlearningConfig.classes must lie in [0, {number}), got {config.classes}")
    triggers = run(invert_triggers(model, clean, replace(config.inversion, seed=config.seed))).triggers
    flagged = np.flatnonzero(anomaly_indices(triggers.norms) > config.threshold).tolist()
    classes = tuple(flagged) if config.classes is None else tuple(config.classes)
    defended = trainable_copy(model, clean)
    epochs = config.training.epochs if classes else 0
    yield UnlearningStep(0, epochs, math.nan, math.nan, classes, triggers, defended)
    if not classes:
        return
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(config.seed))
    carriers = clean[order[: max(1, round(config.share * len(clean)))]]
    plain = clean[order[len(carriers) :]]
    mixed = LabelledImages(
        torch.cat([plain.images, *(triggers.embed(carriers.images, target) for target in classes)]),
        torch.cat([plain.labels, *(carriers.labels for _ in classes)]),
        clean.classes,
    )
    for step in train(defended, mixed, replace(config.training, seed=config.seed)):
        yield UnlearningStep(int(step.epoch), epochs, step.loss, step.train_accuracy, classes, triggers, defended)
