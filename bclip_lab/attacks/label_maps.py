"""Label maps: which classes an attack turns, and into which."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bclip_lab.data.images import check_labels

__all__ = ["AllToAll", "AllToOne", "LabelMap", "ManyToOne", "OneToOne"]


class LabelMap(Protocol):
    """Sources and targets of an attack."""

    def sources(self, labels: Tensor) -> Tensor:
        """Boolean (N,): the rows whose class the attack turns."""
        ...

    def targets(self, labels: Tensor) -> Tensor:
        """int64 (N,): the class that each row is turned into, where it is a source."""
        ...


def _check_class(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a class index >= 0, got {value!r}")


@dataclass(frozen=True)
class AllToOne:
    """Every class but the target becomes the target (BadNets, Gu et al., arXiv 1708.06733, section 4).

    Examples
    --------
    >>> AllToOne(target=2).sources(torch.tensor([0, 1, 2])).tolist()
    [True, True, False]
    """

    target: int

    def __post_init__(self) -> None:
        _check_class("target", self.target)

    def sources(self, labels: Tensor) -> Tensor:
        """Rows of every class but the target."""
        return labels != self.target

    def targets(self, labels: Tensor) -> Tensor:
        """The target for every row."""
        return torch.full_like(labels, self.target)


@dataclass(frozen=True)
class ManyToOne:
    """The source classes become the target; the target is not among them.

    Examples
    --------
    >>> ManyToOne(source_classes=(0, 3), target=2).sources(torch.tensor([0, 1, 2, 3])).tolist()
    [True, False, False, True]
    """

    source_classes: tuple[int, ...]
    target: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "source_classes", tuple(self.source_classes))
        _check_class("target", self.target)
        for source in self.source_classes:
            _check_class("source_classes", source)
        if not self.source_classes or len(set(self.source_classes)) != len(self.source_classes):
            raise ValueError(f"source_classes must be distinct classes, at least one, got {self.source_classes}")
        if self.target in self.source_classes:
            raise ValueError(f"target {self.target} is among the source classes {self.source_classes}")

    def sources(self, labels: Tensor) -> Tensor:
        """Rows of the source classes."""
        return torch.isin(labels, torch.tensor(self.source_classes, device=labels.device))

    def targets(self, labels: Tensor) -> Tensor:
        """The target for every row."""
        return torch.full_like(labels, self.target)


def OneToOne(source: int, target: int) -> ManyToOne:
    """One source class becomes the target: `ManyToOne` with a single source.

    Examples
    --------
    >>> OneToOne(source=4, target=5).sources(torch.tensor([3, 4, 5])).tolist()
    [False, True, False]
    """
    return ManyToOne((source,), target)


@dataclass(frozen=True)
class AllToAll:
    """Every class c becomes class (c + shift) mod `classes` (BadNets, arXiv 1708.06733, section 4: shift 1).

    Examples
    --------
    >>> AllToAll(classes=3).targets(torch.tensor([0, 1, 2])).tolist()
    [1, 2, 0]
    """

    classes: int
    shift: int = 1

    def __post_init__(self) -> None:
        if self.classes < 2:
            raise ValueError(f"classes must be at least 2, got {self.classes}")
        if self.shift % self.classes == 0:
            raise ValueError(f"shift {self.shift} maps each of {self.classes} classes to itself")

    def sources(self, labels: Tensor) -> Tensor:
        """Every row."""
        return torch.ones_like(labels, dtype=torch.bool)

    def targets(self, labels: Tensor) -> Tensor:
        """The class `shift` further on."""
        check_labels(labels, self.classes)
        return (labels + self.shift) % self.classes
