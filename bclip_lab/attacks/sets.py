"""Several attacks in one network."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch

from bclip_lab.attacks.backdoor import BackdoorAttack
from bclip_lab.data.images import LabelledImages, PoisonedImages, TriggeredImages

__all__ = ["AttackSet"]


@dataclass(frozen=True)
class AttackSet:
    """Several backdoor attacks on one training set: X2X, or several triggers with one target.

    X2X (Xiang et al., "UMD", arXiv 2305.18651): any sources, any targets. Here every pair has its own trigger, and
    `Cover(only_others=True)` in each attack ties its trigger to its source classes. `evaluate(model, test, attacks)`
    judges all at once, `evaluate(model, test, attacks.attacks[0])` one of them.

    Parameters
    ----------
    attacks
        Poison one after another; each draws its rows among those that the ones before it have left.

    Raises
    ------
    ValueError
        No attack, or (by `poison` and `triggered`) two that turn the same trigger on the same class into different
        targets, or whatever an attack raises.

    Examples
    --------
    >>> from bclip_lab.attacks import OneToOne, PatchTrigger
    >>> data = LabelledImages(torch.zeros(20, 3, 8, 8), torch.arange(20) % 4, ("cat", "dog", "owl", "bee"))
    >>> attacks = AttackSet(
    ...     (
    ...         BackdoorAttack(PatchTrigger(seed=0), OneToOne(source=0, target=1)),
    ...         BackdoorAttack(PatchTrigger(seed=1), OneToOne(source=2, target=3)),
    ...     )
    ... )
    >>> int(attacks.poison(data).poisoned.sum()), len(attacks.triggered(data))
    (4, 10)
    """

    attacks: tuple[BackdoorAttack, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "attacks", tuple(self.attacks))
        if not self.attacks:
            raise ValueError("attacks must be at least one, got none")

    def _check(self, classes: int) -> None:
        every = torch.arange(classes)
        for first, second in combinations(self.attacks, 2):
            if first.trigger != second.trigger:
                continue
            one, other = first.label_map, second.label_map
            torn = one.sources(every) & other.sources(every) & (one.targets(every) != other.targets(every))
            if torn.any():
                raise ValueError(
                    f"attacks turn class {int(torn.nonzero()[0])} with the same trigger into different targets: "
                    f"{one} and {other}"
                )

    def poison(self, train: LabelledImages | PoisonedImages) -> PoisonedImages:
        """Poison a training set by every attack in turn, each on rows of its own."""
        self._check(len((train.data if isinstance(train, PoisonedImages) else train).classes))
        for attack in self.attacks:
            train = attack.poison(train)
        assert isinstance(train, PoisonedImages)
        return train

    def triggered(self, data: LabelledImages) -> TriggeredImages:
        """The triggered images of every attack, one attack after another; `rows` may name a row more than once."""
        self._check(len(data.classes))
        parts = [attack.triggered(data) for attack in self.attacks]
        return TriggeredImages(
            images=torch.cat([part.images for part in parts]),
            true_labels=torch.cat([part.true_labels for part in parts]),
            targets=torch.cat([part.targets for part in parts]),
            rows=torch.cat([part.rows for part in parts]),
            classes=data.classes,
        )
