"""Clean-label poisoning: images of the target class, made hard to classify, bear the trigger and keep their label."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bclip_lab.attacks.backdoor import BackdoorAttack
from bclip_lab.attacks.label_maps import AllToOne
from bclip_lab.attacks.triggers import Trigger
from bclip_lab.data.images import LabelledImages, PoisonedImages, TriggeredImages, check_images, to_float
from bclip_lab.models import device_of, evaluating

__all__ = ["CleanLabelAttack"]


@dataclass(frozen=True)
class CleanLabelAttack:
    """Poison without changing a label (Turner, Tsipras and Madry, "Label-Consistent Backdoor Attacks", 1912.02771).

    Only images of the target class t are poisoned. Each is first perturbed so that a surrogate g, a network that
    the attacker trained on clean images, loses its class:

        x_0 = x,  x_k+1 = P(x_k + step * sign(grad CE(g(x_k), t))),

    where P puts back into [x - eps, x + eps] and [0, 1] (projected gradient descent, Madry et al., arXiv 1706.06083);
    then it bears the trigger. As its own features no longer tell its class, the victim learns the trigger instead.
    The better the perturbation carries over from g to the victim, the more this holds; the benchmarks take a g that
    was itself trained on such perturbed images (BackdoorBench, `craft_adv_dataset.py`). Any g does here.

    Parameters
    ----------
    trigger
        Put into the perturbed images, and, on its own, into the test images.
    target
        The class whose images are poisoned, and which the trigger calls up.
    poison_rate
        Poisoned images as a share of *the target class* (the `poisoning_proportion` of the authors' code), in
        (0, 1]. It is not `BackdoorAttack`'s share of all images: a tenth of CIFAR-10 is the whole target class.
    eps
        Largest change of a pixel, in units of the range [0, 1]: 8/255, as in BackdoorBench.
    step
        Length of a step, in the same units: 1.5/255, as in BackdoorBench.
    steps
        100, as in BackdoorBench.
    seed
        Of the choice of rows. The perturbation starts from the image itself, so nothing else is drawn.

    Raises
    ------
    ValueError
        A setting out of its range, or (by `poison` and `triggered`) a target that the images do not have, or (by
        `poison`) a rate that poisons no image, or a surrogate with too few classes.

    Examples
    --------
    >>> from bclip_lab.attacks import PatchTrigger
    >>> from bclip_lab.models import resnet10
    >>> data = LabelledImages(torch.full((20, 3, 8, 8), 0.5), torch.arange(20) % 2, ("cat", "dog"))
    >>> attack = CleanLabelAttack(PatchTrigger(), target=1, poison_rate=0.5, steps=2)
    >>> poisoned = attack.poison(data, resnet10(2, seed=0, width=4))
    >>> int(poisoned.poisoned.sum()), torch.equal(poisoned.data.labels, data.labels)
    (5, True)
    """

    trigger: Trigger
    target: int
    poison_rate: float = 0.5
    eps: float = 8 / 255
    step: float = 1.5 / 255
    steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        AllToOne(self.target)  # refuses what is no class
        if not 0 < self.poison_rate <= 1:
            raise ValueError(f"poison_rate must lie in (0, 1], got {self.poison_rate}")
        if not 0 <= self.eps <= 1 or not self.step > 0 or self.steps < 1:
            raise ValueError(
                f"eps must lie in [0, 1], step be > 0 and steps >= 1, got {self.eps}, {self.step}, {self.steps}"
            )

    def perturb(self, images: Tensor, surrogate: nn.Module, *, batch_size: int = 500) -> Tensor:
        """Images of the target class that the surrogate no longer takes for it; without the trigger.

        Parameters
        ----------
        images
            (N, C, H, W), uint8 or float32 in [0, 1].
        surrogate
            Any classifier; used in evaluation mode, its weights, their gradients and its mode are left alone.
        batch_size
            Images at once; memory is bounded by it.

        Returns
        -------
        Tensor
            Like `images`, each pixel within `eps`; of uint8 images within `eps` rounded to a grey level.
        """
        check_images(images)
        device = device_of(surrogate)
        found = []
        with evaluating(surrogate):
            for batch in images.split(batch_size):
                clean = to_float(batch.to(device)).contiguous(memory_format=torch.channels_last)
                low, high = (clean - self.eps).clamp_min(0), (clean + self.eps).clamp_max(1)
                labels = torch.full((len(batch),), self.target, device=device)
                x = clean
                for _ in range(self.steps):
                    x = x.detach().requires_grad_()
                    out = surrogate(x).float()
                    if out.ndim != 2 or out.shape[1] <= self.target:
                        raise ValueError(
                            f"surrogate gives logits of shape {tuple(out.shape)}, the target is class {self.target}"
                        )
                    (gradient,) = torch.autograd.grad(F.cross_entropy(out, labels, reduction="sum"), x)
                    with torch.no_grad():
                        x = torch.minimum(torch.maximum(x + self.step * gradient.sign(), low), high)
                x = x.detach()
                found.append((x * 255).round().to(torch.uint8) if images.dtype == torch.uint8 else x)
        return torch.cat(found).to(images.device).contiguous()

    def poison(self, train: LabelledImages, surrogate: nn.Module) -> PoisonedImages:
        """Poison round(poison_rate * N) of the N training images of the target class; every label stays."""
        if self.target >= len(train.classes):
            raise ValueError(f"target is class {self.target}, but there are {len(train.classes)} classes")
        own = torch.nonzero(train.labels == self.target).flatten()
        count = round(self.poison_rate * len(own))
        if not count:
            raise ValueError(f"poison_rate {self.poison_rate} of {len(own)} images of class {self.target} poisons none")
        generator = torch.Generator().manual_seed(self.seed)
        rows = own[torch.randperm(len(own), generator=generator)[:count].to(own.device)]
        images = train.images.clone()
        images[rows] = self.trigger.embed(self.perturb(train.images[rows], surrogate))
        poisoned = torch.zeros(len(train), dtype=torch.bool, device=rows.device)
        poisoned[rows] = True
        return PoisonedImages(
            data=replace(train, images=images, labels=train.labels.clone()),
            poisoned=poisoned,
            true_labels=train.labels.clone(),
        )

    def triggered(self, data: LabelledImages) -> TriggeredImages:
        """Every image of another class with the trigger alone: at test time nothing is perturbed."""
        return BackdoorAttack(self.trigger, AllToOne(self.target)).triggered(data)
