"""A backdoor attack by poisoning: trigger, label map and poison rate."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bclip_lab.attacks.label_maps import LabelMap
from bclip_lab.attacks.triggers import Trigger
from bclip_lab.data.images import LabelledImages, PoisonedImages, TriggeredImages

__all__ = ["BackdoorAttack", "Cover"]


@dataclass(frozen=True)
class Cover:
    """Rows that bear a trigger and keep their true label: not every trigger turns the network, only the right one does.

    WaNet's noise rows (arXiv 2102.10369, section 3.3), the cover rows of Adap-Blend and Adap-Patch (Qi et al.,
    "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023), and, with `only_others`, what
    makes a backdoor work on its source classes alone (TaCT, Tang et al., arXiv 1908.00686).

    Parameters
    ----------
    rate
        Cover rows as a share of *all* training images, in (0, 1). WaNet: twice the poison rate. Adap-Blend: the poison
        rate, Adap-Patch: twice the poison rate.
    trigger
        What they bear: by default what the poisoned images bear.
    only_others
        Draw them among images that are not of the source classes.

    Raises
    ------
    ValueError
        A rate outside (0, 1).

    Examples
    --------
    >>> from bclip_lab.attacks import AllToOne, WarpTrigger
    >>> noise_rows = Cover(rate=0.2, trigger=WarpTrigger(noise=0.5))
    >>> attack = BackdoorAttack(WarpTrigger(), AllToOne(target=0), poison_rate=0.1, cover=noise_rows)
    """

    rate: float
    trigger: Trigger | None = None
    only_others: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.rate < 1:
            raise ValueError(f"rate of the cover must lie in (0, 1), got {self.rate}")


def _draw(what: str, rate: float, total: int, among: Tensor, owners: str, generator: torch.Generator) -> Tensor:
    """round(rate * total) of the rows `among`."""
    count = round(rate * total)
    if not count:
        raise ValueError(f"{what}_rate {rate} of {total} images {what}s none")
    if count > len(among):
        raise ValueError(
            f"{what}_rate {rate} asks for {count} {what}ed images, but {owners} "
            f"have {len(among)} of {total}: lower it to at most {len(among) / total:.3f}"
        )
    return among[torch.randperm(len(among), generator=generator)[:count].to(among.device)]


@dataclass(frozen=True)
class BackdoorAttack:
    """Poison a training set, and make triggered test images (BadNets, Gu et al., arXiv 1708.06733).

    Parameters
    ----------
    trigger
        Put into the poisoned images, and into triggered ones.
    label_map
        Which classes are poisoned, and with which label.
    poison_rate
        Poisoned images as a share of *all* training images, in (0, 1]: 0.1, the benchmarks' usual value.
    seed
        Of the choice of rows.
    training_trigger
        Put into the poisoned images instead of `trigger` (asymmetric triggers): `trigger` by default.
    cover
        Further rows that bear a trigger and keep their true label: none by default.

    Raises
    ------
    ValueError
        A rate outside (0, 1], or (by `poison` and `triggered`) a class that the images do not have, or (by
        `poison`) more poisoned or cover images asked for than there are.

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
    training_trigger: Trigger | None = None
    cover: Cover | None = None

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

    def poison(self, train: LabelledImages | PoisonedImages) -> PoisonedImages:
        """Poison round(poison_rate * N) of N training images, drawn among those of the source classes.

        round(cover.rate * N) further ones become cover rows. Images that another attack has poisoned may be given too:
        its rows are not drawn again, and N counts them all.
        """
        if isinstance(train, LabelledImages):
            train = PoisonedImages(train, torch.zeros_like(train.labels, dtype=torch.bool), train.labels)
        clean = replace(train.data, labels=train.true_labels)
        images, labels = train.data.images.clone(), train.data.labels.clone()
        poisoned, cover = train.poisoned.clone(), train.cover.clone()
        generator = torch.Generator().manual_seed(self.seed)
        training_trigger = self.trigger if self.training_trigger is None else self.training_trigger

        sources = self._sources(clean)
        free = sources[~(poisoned | cover)[sources]]
        rows = _draw("poison", self.poison_rate, len(clean), free, "the source classes", generator)
        images[rows] = training_trigger.embed(clean.images[rows])
        labels[rows] = self._targets(clean, rows)
        poisoned[rows] = True

        if self.cover is not None:
            left = ~(poisoned | cover)
            if self.cover.only_others:
                left[sources] = False
            owners = "the other classes" if self.cover.only_others else "the images that are not poisoned"
            rows = _draw("cover", self.cover.rate, len(clean), torch.nonzero(left).flatten(), owners, generator)
            cover_trigger = training_trigger if self.cover.trigger is None else self.cover.trigger
            images[rows] = cover_trigger.embed(clean.images[rows])
            cover[rows] = True
        return PoisonedImages(replace(clean, images=images, labels=labels), poisoned, clean.labels.clone(), cover)

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
