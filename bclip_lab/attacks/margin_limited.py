"""An attacker who knows the defence, controls the training and keeps the backdoor's margin small."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from bclip_lab.attacks.backdoor import BackdoorAttack
from bclip_lab.data.images import LabelledImages, TriggeredImages
from bclip_lab.margins import classification_margins
from bclip_lab.training import TrainConfig, TrainStep, cross_entropy, train

__all__ = ["MarginLimitedAttack"]


@dataclass(frozen=True)
class MarginLimitedAttack:
    """Train a backdoor whose margin is not abnormally large: an adaptive attacker against margins and bounds.

    MM-BD and MMAC (arXiv 2205.06900 and 2308.04617) live on one symptom, the target class's outlying margin. This
    attacker adds to the cross-entropy a penalty on the rows T of the batch that bear the trigger,

        loss = CE + strength * mean over x in T of max(0, m_t(x) - margin)^2,

    m_t being the classification margin of the label t that the attacker gave the row. The penalty is zero where the
    backdoor wins by no more than `margin`; squared, it weighs most where the backdoor over-fits most. The form is
    the lab's own.

    **What is not limited.** The margins of clean rows, the target's own among them, are what cross-entropy makes
    them: they are the crowd in which the backdoor hides, and lowering all alike would leave the target as far
    outside. Nor are margins limited off the training images: an image that maximises m_t, with many copies of the
    trigger, may still reach more than any triggered one. An attacker could go after these as well, at the price of
    a search for such images in every step.

    Parameters
    ----------
    backdoor
        Trigger, label map, poison rate and the rows' seed.
    strength
        Weight of the penalty, >= 0: 0 is the plain backdoor. The larger, the more ASR and ACC the attacker pays.
    margin
        What the triggered rows' margins may reach without penalty, in units of the logits, >= 0: 5, half of
        what clean and triggered images alike have at the median in a plainly backdoored network on the signs.

    Raises
    ------
    ValueError
        A negative setting, and what `BackdoorAttack.poison` and `train` raise.

    Examples
    --------
    >>> import torch
    >>> from bclip_lab.attacks import AllToOne, PatchTrigger
    >>> from bclip_lab.models import resnet10
    >>> from bclip_lab.training import run
    >>> data = LabelledImages(torch.rand(40, 3, 8, 8), torch.arange(40) % 2, ("cat", "dog"))
    >>> attack = MarginLimitedAttack(BackdoorAttack(PatchTrigger(), AllToOne(1)), strength=0.1, margin=5)
    >>> step = run(attack.train(resnet10(2, seed=0, width=4), data, TrainConfig(epochs=1)))
    >>> step.epoch, len(attack.triggered(data))
    (1, 20)
    """

    backdoor: BackdoorAttack
    strength: float = 0.1
    margin: float = 5.0

    def __post_init__(self) -> None:
        if not self.strength >= 0 or not self.margin >= 0:
            raise ValueError(f"strength and margin must be >= 0, got {self.strength} and {self.margin}")

    def loss(self, logits: Tensor, labels: Tensor, poisoned: Tensor) -> Tensor:
        """The attacker's loss of a batch: logits (N, K), labels (N,) and the mask (N,) of triggered rows.

        Examples
        --------
        >>> import torch
        >>> from bclip_lab.attacks import AllToOne, PatchTrigger
        >>> attack = MarginLimitedAttack(BackdoorAttack(PatchTrigger(), AllToOne(0)), strength=0.5, margin=1)
        >>> logits, labels = torch.tensor([[50.0, 47.0], [50.0, 47.0]]), torch.tensor([0, 0])
        >>> plain = attack.loss(logits, labels, torch.tensor([False, False]))
        >>> attack.loss(logits, labels, torch.tensor([True, False])) - plain
        tensor(2.)
        """
        value = cross_entropy(logits, labels, poisoned)
        if not self.strength or not poisoned.any():  # the mean over no row would be NaN
            return value
        excess = (classification_margins(logits[poisoned], labels[poisoned]) - self.margin).clamp_min(0)
        return value + self.strength * excess.square().mean()

    def train(self, model: nn.Module, data: LabelledImages, config: TrainConfig | None = None) -> Iterator[TrainStep]:
        """Poison `data` and train `model` on it in place, as `training.train` does, with this attacker's loss."""
        return train(model, self.backdoor.poison(data), config, loss=self.loss)

    def triggered(self, data: LabelledImages) -> TriggeredImages:
        """The backdoor's triggered images."""
        return self.backdoor.triggered(data)
