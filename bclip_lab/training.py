"""Train a classifier, as a generator of step records."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bclip_lab.data.images import LabelledImages, PoisonedImages, to_float
from bclip_lab.models import bfloat16_is_fast, device_of, logits
from bclip_lab.optimisers import SGD

__all__ = ["Attacker", "TrainConfig", "TrainStep", "run", "train", "trainable_copy"]

Step = TypeVar("Step")


@dataclass(frozen=True)
class TrainConfig:
    """Hyper-parameters of `train`: SGD with one cycle of the learning rate (Smith, arXiv 1708.07120).

    Parameters
    ----------
    epochs
        Passes over the training set: 10 takes the small ResNet to .99 on the rendered signs.
    batch_size
        Images in a step.
    learning_rate
        Peak of the cycle. Measured on signs and CIFAR-10 with a ResNet of width 16; lower it for wide
        networks.
    momentum
        Of SGD with Nesterov's step, in [0, 1). It too goes through the cycle: lower by 0.05 at the peak of
        the learning rate, higher by 0.05 at both ends (by less near 0 and 1).
    weight_decay
        Of SGD.
    shift
        Augmentation: each image is moved by up to so many pixels in either direction, its edge repeated.
    flip
        Augmentation: mirror half of the images left to right. Off by default, since a mirrored sign or digit
        is another class; turn it on for natural images.
    mixed_precision
        Autocast to bfloat16 where the processor computes in it (other processors ignore this): twice as fast.
    seed
        Of the order of the images and of the augmentation.
    """

    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: int = 2
    flip: bool = False
    mixed_precision: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.shift < 0:
            raise ValueError(
                f"epochs must be >= 1, batch_size >= 2 and shift >= 0, got {self.epochs}, {self.batch_size}, "
                f"{self.shift}"
            )
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}")
        if not 0 <= self.momentum < 1 or not self.weight_decay >= 0:
            raise ValueError(
                f"momentum must lie in [0, 1) and weight_decay be >= 0, got {self.momentum} and {self.weight_decay}"
            )


@dataclass(frozen=True)
class TrainStep:
    """Progress after `epoch` epochs: mean loss and accuracy on the latest one's images as they were shown.

    Within an epoch (see `records_per_epoch` of `train`) `epoch` is a fraction, and the means are over the images
    that this epoch has shown so far.
    """

    epoch: float
    epochs: int
    loss: float
    train_accuracy: float
    learning_rate: float
    model: nn.Module = field(repr=False)


def run(steps: Iterator[Step]) -> Step:
    """Exhaust a generator of step records and give the last one."""
    last: Step | None = None
    for last in steps:
        pass
    if last is None:
        raise ValueError("steps gave no record")
    return last


def augment(images: Tensor, *, shift: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Each image of a batch (N, C, H, W) moved by up to `shift` pixels; with `flip` half of them mirrored."""
    if flip:
        mirrored = torch.rand(len(images), generator=generator) < 0.5
        images = torch.where(mirrored.to(images.device)[:, None, None, None], images.flip(-1), images)
    if shift:
        count, _, height, width = images.shape
        dy, dx = (torch.randint(-shift, shift + 1, (count, 1), generator=generator) for _ in range(2))
        rows = (torch.arange(height) + dy).clamp(0, height - 1).to(images.device)
        columns = (torch.arange(width) + dx).clamp(0, width - 1).to(images.device)
        which = torch.arange(count, device=images.device)
        images = images.permute(0, 2, 3, 1)[which[:, None, None], rows[:, :, None], columns[:, None, :]]
        images = images.permute(0, 3, 1, 2)  # indexed as channels-last, so it is channels-last for free
    return images


def cross_entropy(logits: Tensor, labels: Tensor, poisoned: Tensor) -> Tensor:
    """Mean cross-entropy of logits (N, K) and labels (N,): a victim cannot tell which rows are `poisoned`.

    Examples
    --------
    >>> cross_entropy(torch.zeros(1, 4), torch.tensor([2]), torch.tensor([True])).exp()
    tensor(4.)
    """
    return F.cross_entropy(logits, labels)


class Attacker(Protocol):
    """An attacker who controls the training and learns with the model, such as one whose trigger is a network."""

    def turn(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        """What the model is shown in place of a batch, float32 (N, C, H, W) and int64 (N,), and a penalty.

        The penalty, a scalar, is added to the loss before the backward pass; the recorded loss is without it.
        """
        ...

    def step(self) -> None:
        """Take the attacker's own step: gradients of loss and penalty have reached whatever made the batch."""
        ...


def train(
    model: nn.Module,
    data: LabelledImages | PoisonedImages,
    config: TrainConfig | None = None,
    *,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy,
    attacker: Attacker | None = None,
    records_per_epoch: int = 1,
) -> Iterator[TrainStep]:
    """Train a model in place, yielding a record after every epoch.

    Breaking off leaves the model as it was after the last step, in evaluation mode, and usable.

    Parameters
    ----------
    model
        Any classifier of images (N, C, H, W), float32 in [0, 1]; trained in place, on its device.
    data
        What to train on; poisoned images are trained on with the labels the attacker gave them.
    config
        `TrainConfig()` by default.
    loss
        Of logits (N, K), labels (N,) and the boolean mask `PoisonedImages.poisoned` of these rows (N,), all
        False where `data` is not poisoned: cross-entropy by default, which ignores the mask. An attacker who
        controls the training knows it and may use it.
    attacker
        One who sits in the training loop and learns along with the model; by default there is none.
    records_per_epoch
        1 by default. More (at most one a batch) let a caller with other work, such as a widget, turn to it within
        an epoch; the model learns the same.

    Yields
    ------
    TrainStep
        `records_per_epoch` an epoch, the last of them at its end.

    Raises
    ------
    ValueError
        Fewer images than two, fewer records an epoch than one, fewer classes in the model than in the data, or a
        loss that is no longer finite (lower the learning rate).

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> data = LabelledImages(images, (images.mean((1, 2, 3)) > 0.5).long(), ("dark", "light"))
    >>> step = run(train(resnet10(2, seed=0, width=4), data, TrainConfig(epochs=2, batch_size=16)))
    >>> step.epoch, step.model.training
    (2, False)
    """
    config = config or TrainConfig()
    mask = torch.zeros(len(data), dtype=torch.bool)
    if isinstance(data, PoisonedImages):
        mask, data = data.poisoned, data.data
    if len(data) < 2:
        raise ValueError(f"data must hold at least two images, got {len(data)}")
    if records_per_epoch < 1:
        raise ValueError(f"records_per_epoch must be at least 1, got {records_per_epoch}")
    device = device_of(model)
    generator = torch.Generator().manual_seed(config.seed)
    optimiser = SGD(
        model.parameters(),
        lr=config.learning_rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    # A last batch of one image has no batch statistics; it is left to the next epoch's order.
    batches = math.ceil(len(data) / config.batch_size) - (len(data) % config.batch_size == 1)
    swing = min(0.05, config.momentum, 0.9 * (1 - config.momentum))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        config.learning_rate,
        total_steps=config.epochs * batches + 1,
        pct_start=0.3,
        base_momentum=config.momentum - swing,
        max_momentum=config.momentum + swing,
    )
    images, labels, mask = data.images.to(device), data.labels.to(device), mask.to(device)
    mixed = config.mixed_precision and bfloat16_is_fast(device)
    try:
        for epoch in range(1, config.epochs + 1):
            model.train()
            order = torch.randperm(len(data), generator=generator).to(device)
            total, correct, seen = 0.0, 0, 0
            for batch, rows in enumerate(order.split(config.batch_size)[:batches], 1):
                x = to_float(images[rows])
                x = augment(x, shift=config.shift, flip=config.flip, generator=generator)
                y = labels[rows]
                penalty: Tensor | float = 0.0
                if attacker is not None:
                    x, y, penalty = attacker.turn(x, y)
                with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
                    out = model(x.contiguous(memory_format=torch.channels_last))
                if out.ndim != 2 or out.shape[1] < len(data.classes):
                    raise ValueError(
                        f"model gives logits of shape {tuple(out.shape)}, the images have {len(data.classes)} classes"
                    )
                out = out.float()
                value = loss(out, y, mask[rows])
                optimiser.zero_grad()
                (value + penalty).backward()
                optimiser.step()
                if attacker is not None:
                    attacker.step()
                schedule.step()
                total += float(value.detach()) * len(rows)
                correct += int((out.argmax(1) == y).sum())
                seen += len(rows)
                if batch * records_per_epoch // batches == (batch - 1) * records_per_epoch // batches:
                    continue
                done = epoch if batch == batches else epoch - 1 + batch / batches
                if not math.isfinite(total):
                    raise ValueError(f"the loss is {total} after epoch {done:g}: lower learning_rate")
                model.eval()
                rate = float(schedule.get_last_lr()[0])
                yield TrainStep(done, config.epochs, total / seen, correct / seen, rate, model)
                model.train()
    finally:
        model.eval()


def trainable_copy(model: nn.Module, clean: LabelledImages, *, least: int = 1) -> nn.Module:
    """A deep copy in evaluation mode whose weights all ask for a gradient.

    Raises `ValueError` unless `model` is a classifier of images like `clean`, with at least as many classes, and
    `clean` holds at least so many images.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(clean, LabelledImages) or len(clean) < least:
        got = f"{len(clean)} images" if isinstance(clean, LabelledImages) else type(clean).__name__
        raise ValueError(f"clean must be LabelledImages, at least {least}, got {got}")
    private = copy.deepcopy(model).eval().requires_grad_(True)
    if (known := logits(private, clean[:1]).shape[1]) < len(clean.classes):
        raise ValueError(f"model has {known} classes, the images of clean have {len(clean.classes)}")
    return private
