"""The nouns of the data layer: labelled images, disjoint splits, poisoned and triggered images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "Attack",
    "LabelledImages",
    "PoisonedImages",
    "Splits",
    "TriggeredImages",
    "check_images",
    "check_labels",
    "to_float",
]


def check_images(images: Tensor, name: str = "images") -> None:
    """Raise `ValueError` unless `images` is (N, C, H, W), uint8 or float32 in [0, 1] without NaN."""
    if not isinstance(images, Tensor):
        raise ValueError(f"{name} must be a torch.Tensor, got {type(images).__name__}")
    if images.ndim != 4:
        raise ValueError(f"{name} must have shape (N, C, H, W), got {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return
    if images.dtype != torch.float32:
        raise ValueError(f"{name} must be uint8 or float32, got {images.dtype}")
    if images.numel():
        low, high = (float(v) for v in torch.aminmax(images))
        # written so that NaN, for which every comparison is false, is refused too
        if not (low >= 0 and high <= 1):
            raise ValueError(f"{name} of dtype float32 must lie in [0, 1], got [{low:g}, {high:g}]")


def check_labels(labels: Tensor, classes: int, name: str = "labels") -> None:
    """Raise `ValueError` unless `labels` is int64 of shape (N,) with values in [0, classes)."""
    if not isinstance(labels, Tensor) or labels.ndim != 1 or labels.dtype != torch.int64:
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"{name} must be an int64 tensor of shape (N,), got {got}")
    if labels.numel():
        low, high = (int(v) for v in torch.aminmax(labels))
        if low < 0 or high >= classes:
            raise ValueError(f"{name} must lie in [0, {classes}), got values from {low} to {high}")


def to_float(images: Tensor) -> Tensor:
    """Images as float32 in [0, 1]: uint8 is divided by 255, float32 passes unchanged.

    Examples
    --------
    >>> to_float(torch.tensor([0, 51, 255], dtype=torch.uint8))
    tensor([0.0000, 0.2000, 1.0000])
    """
    return images.float().div_(255) if images.dtype == torch.uint8 else images


@dataclass(frozen=True, eq=False)
class LabelledImages:
    """Images with their true labels.

    Parameters
    ----------
    images
        (N, C, H, W), uint8 in [0, 255] or float32 in [0, 1].
    labels
        int64 (N,), each in [0, len(classes)).
    classes
        The names of the classes; their number is the number of classes.

    Raises
    ------
    ValueError
        A wrong shape, dtype or range, or a label without a class.

    Examples
    --------
    >>> data = LabelledImages(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]), ("cat", "dog"))
    >>> len(data), len(data[1:3]), data.per_class(1).labels.tolist()
    (4, 2, [0, 1])
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(self.classes))
        check_images(self.images)
        check_labels(self.labels, len(self.classes))
        if len(self.images) != len(self.labels):
            raise ValueError(f"images and labels must be as many, got {len(self.images)} and {len(self.labels)}")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: slice | Tensor | np.ndarray | Sequence[int]) -> LabelledImages:
        return self.subset(rows)

    def subset(self, rows: slice | Tensor | np.ndarray | Sequence[int]) -> LabelledImages:
        """The given rows, as a slice, a boolean mask or indices."""
        if not isinstance(rows, slice):
            rows = torch.as_tensor(rows)
            if rows.ndim != 1:
                raise ValueError(f"rows must be a slice, a mask or a list of indices, got shape {tuple(rows.shape)}")
            if rows.is_floating_point() and len(rows):  # an empty list becomes a float tensor
                raise ValueError(f"rows must be indices or a mask, got {rows.dtype}")
            rows = rows.to(self.images.device) if rows.dtype == torch.bool else rows.to(self.images.device).long()
        return replace(self, images=self.images[rows], labels=self.labels[rows])

    def per_class(self, count: int, seed: int | None = None) -> LabelledImages:
        """`count` images of every class: the first ones, or random ones where a seed is given.

        Raises `ValueError` where a class has fewer.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        rows = []
        for index, name in enumerate(self.classes):
            own = torch.nonzero(self.labels.cpu() == index).flatten()
            if len(own) < count:
                raise ValueError(f"count: class {name!r} has {len(own)} images, {count} were asked for")
            order = torch.arange(len(own)) if generator is None else torch.randperm(len(own), generator=generator)
            rows.append(own[order[:count]])
        return self.subset(torch.cat(rows))

    def batches(self, size: int, generator: torch.Generator | None = None) -> Iterator[LabelledImages]:
        """Batches of at most `size` images, in order, or shuffled by `generator`."""
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for rows in torch.split(order, size):
            yield self.subset(rows)


@dataclass(frozen=True, eq=False)
class Splits:
    """Four pairwise disjoint parts of one data set.

    `train` is the attacker's. `defender` holds the few clean images a defender owns: whatever a defence must
    hold out it splits off from these. `calibration` sets the thresholds of detectors and serves for nothing
    else. `test` judges.

    Raises
    ------
    ValueError
        Classes differ between the parts, or a part is empty.
    """

    train: LabelledImages
    defender: LabelledImages
    calibration: LabelledImages
    test: LabelledImages

    def __post_init__(self) -> None:
        for name in ("train", "defender", "calibration", "test"):
            part: LabelledImages = getattr(self, name)
            if not len(part):
                raise ValueError(f"{name} is empty")
            if part.classes != self.train.classes:
                raise ValueError(f"{name} has classes {part.classes}, train has {self.train.classes}")
            if part.images.shape[1:] != self.train.images.shape[1:]:
                raise ValueError(
                    f"{name} has images of shape {tuple(part.images.shape[1:])}, "
                    f"train has {tuple(self.train.images.shape[1:])}"
                )

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.train.classes

    @classmethod
    def from_parts(cls, train: LabelledImages, test: LabelledImages, *, per_class: int = 50, seed: int = 0) -> Splits:
        """Take the defender's and the calibration images out of `test`: published sets have no such parts.

        Both get `per_class` images of every class (50, as in arXiv 2308.04617, section 4), drawn by `seed`;
        what is left of `test` judges. Taking them from the test part keeps the train part what the attacker's
        published recipes count their poison rate on.
        """
        if per_class < 1:
            raise ValueError(f"per_class must be at least 1, got {per_class}")
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(test), generator=generator)
        labels = test.labels.cpu()[order]
        rank = torch.zeros(len(test), dtype=torch.int64)
        for index, name in enumerate(test.classes):
            own = labels == index
            if int(own.sum()) <= 2 * per_class:
                raise ValueError(
                    f"per_class: class {name!r} has {int(own.sum())} test images; the defender's, the "
                    f"calibration and the test part need more than {2 * per_class}"
                )
            rank[own] = torch.arange(int(own.sum()))
        return cls(
            train=train,
            defender=test.subset(order[rank < per_class]),
            calibration=test.subset(order[(rank >= per_class) & (rank < 2 * per_class)]),
            test=test.subset(order[rank >= 2 * per_class]),
        )


@dataclass(frozen=True, eq=False)
class PoisonedImages:
    """A training set after the attack.

    `data` is what the victim trains on (labels as the attacker wants them), `poisoned` a boolean (N,) mask of
    the rows that carry the trigger and the attacker's label, `true_labels` the labels before the attack. `cover`
    is a mask of further rows, disjoint from these, that carry a trigger and their true label: none by default.
    """

    data: LabelledImages
    poisoned: Tensor
    true_labels: Tensor
    cover: Tensor = None  # type: ignore[assignment]  # a tensor once made

    def __post_init__(self) -> None:
        if self.cover is None:
            object.__setattr__(self, "cover", torch.zeros_like(self.poisoned))

    def __len__(self) -> int:
        return len(self.data)


@dataclass(frozen=True, eq=False)
class TriggeredImages:
    """Test images with the trigger: only rows that the attack can turn, so none is already of its target.

    `images` (M, C, H, W); `true_labels` and `targets` int64 (M,); `rows` int64 (M,) index into the images
    that were given, so that a triggered image can be shown beside its clean original.
    """

    images: Tensor
    true_labels: Tensor
    targets: Tensor
    rows: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


@runtime_checkable
class Attack(Protocol):
    """What evaluation asks of an attack: triggered versions of clean images."""

    def triggered(self, data: LabelledImages) -> TriggeredImages:
        """Triggered images of the sources, with true and target labels."""
        ...
