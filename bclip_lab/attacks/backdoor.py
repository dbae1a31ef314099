"""A backdoor attack by poisoning: trigger, label map and poison rate."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bclip_lab.attacks.label_maps import LabelMap
from bclip_lab.attacks.triggers import Trigger
from bclip_lab.data.images import LabelledImages, PoisonedImages, TriggeredImages

__all__ = ["BackdoorAttack"]


@dataclass(frozen=True)
class BackdoorAttack:
    """Poison a training set, and make triggered test images (BadNets, Gu et al., arXiv 1708.06733).

    Parameters
    ----------
    trigger
        Put into the poisoned images.
    label_map
        Which classes are poisoned, and with which label.
    poison_rate
        Poisoned images as a share of *all* training images, in (0, 1]: 0.1, the benchmarks' usual value.
    seed
        Of the choice of rows.

    Raises
    ------
    ValueError
        A rate outside (0, 1], or (by `poison` and `triggered`) a class that the images do not have, or (by
        `poison`) more images asked for than the source classes have.

    Examples
    --------
    >>> from bclip_lab.attacks import AllToOne, PatchTrigger
    >>> data = LabelledImages(torch.zeros(20, 3, 8, 8), torch.arange(20) % 2, ("cat", "dog"))
    >>> attack = BackdoorAttack(PatchTrigger(), AllToOne(target=1), poison_rate=0.2)
    >>> poisoned = attack.poison(data)
    >>> int(poisoned.poisoned.sum()), int((poisoned.data.labels == 1).sum())
    (4, 14)
    >>> len(attack.triggered(data))
    10
    """

    trigger: Trigger
    label_map: LabelMap
    poison_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.poison_rate <= 1:
            raise ValueError(f"poison_rate must lie in (0, 1], got {self.poison_rate}")

    def _sources(self, data: LabelledImages) -> Tensor:
        highest = max(getattr(self.label_map, "source_classes", (0,)))
        if highest >= len(data.classes):
            raise ValueError(f"label_map turns class {highest}, but there are {len(data.classes)} classes")
        return torch.nonzero(self.label_map.sources(data.labels)).flatten()

    def _targets(self, data: LabelledImages, sources: Tensor) -> Tensor:
        targets = self.label_map.targets(data.labels[sources])
        if len(targets) and int(targets.max()) >= len(data.classes):
            raise ValueError(f"label_map gives class {int(targets.max())}, but there are {len(data.classes)} classes")
        return targets

    def poison(self, train: LabelledImages) -> PoisonedImages:
        """Poison round(poison_rate * N) of N training images, drawn among those of the source classes."""
        sources = self._sources(train)
        count = round(self.poison_rate * len(train))
        if not count:
            raise ValueError(f"poison_rate {self.poison_rate} of {len(train)} images poisons none")
        if count > len(sources):
            raise ValueError(
                f"poison_rate {self.poison_rate} asks for {count} poisoned images, but the source classes "
                f"have {len(sources)} of {len(train)}: lower it to at most {len(sources) / len(train):.3f}"
            )
        generator = torch.Generator().manual_seed(self.seed)
        rows = sources[torch.randperm(len(sources), generator=generator)[:count].to(sources.device)]
        images, labels = train.images.clone(), train.labels.clone()
        images[rows] = self.trigger.embed(train.images[rows])
        labels[rows] = self._targets(train, rows)
        poisoned = torch.zeros(len(train), dtype=torch.bool, device=rows.device)
        poisoned[rows] = True
        return PoisonedImages(replace(train, images=images, labels=labels), poisoned, train.labels.clone())

    def _turned(self, data: LabelledImages) -> tuple[Tensor, Tensor]:
        """The rows of the source classes and their targets, but for rows that are of their target already."""
        sources = self._sources(data)
        targets = self._targets(data, sources)
        turned = targets != data.labels[sources]
        return sources[turned], targets[turned]

    def triggered(self, data: LabelledImages) -> TriggeredImages:
        """Every image of a source class with the trigger, but for rows that are of their target already."""
        rows, targets = self._turned(data)
        if not len(rows):
            raise ValueError("data holds no image of the attack's source classes")
        return TriggeredImages(
            images=self.trigger.embed(data.images[rows]),
            true_labels=data.labels[rows],
            targets=targets,
            rows=rows,
            classes=data.classes,
        )
