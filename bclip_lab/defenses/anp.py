"""ANP: prune the channels that mislead the network when their batch norm is perturbed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from bclip_lab.data.images import LabelledImages, to_float
from bclip_lab.models import bfloat16_is_fast, device_of
from bclip_lab.optimisers import SGD
from bclip_lab.training import augment, trainable_copy

__all__ = ["ANPConfig", "ANPStep", "anp"]


@dataclass(frozen=True)
class ANPConfig:
    """Hyper-parameters of `anp`; the defaults are the authors', but for `epochs` and `batch_size`.

    Parameters
    ----------
    epochs, batch_size
        The authors' code: 2,000 steps of 128 images, a quarter of an hour on one core. Here 960 steps of 32, as steps
        matter more than images. On development networks that are not in the zoo they left a patch ASR .36 and a blended
        trigger .16 at ACC .993 and .992, from 1.00 at .998, and a clean network ACC .997; 200 steps of 128 left the
        patch at 1.00. Masks do not settle at this learning rate: from epoch 30 to epoch 80 the blended trigger's ASR
        went to and fro between .08 and .69.
    perturbation
        epsilon: how far the perturbation may take a channel's weight and bias, as a share of these; 0.4.
    trade_off
        alpha: weight of the loss without perturbation, that of the loss with it being 1 - alpha; 0.2.
    learning_rate, momentum
        Of SGD on the masks: 0.2 and 0.9.
    threshold
        A channel is pruned where its mask is at most this: 0.2, fixed in advance. (The authors' code prints the ASR at
        many thresholds; to choose one by it would be to know the attack.)
    shift
        Augmentation: each image is moved by up to so many pixels in either direction, its edge repeated.
    mixed_precision
        Autocast to bfloat16 where the processor computes in it (other processors ignore this).
    seed
        Of order, augmentation and the start of the perturbations.
    """

    epochs: int = 60
    batch_size: int = 32
    perturbation: float = 0.4
    trade_off: float = 0.2
    learning_rate: float = 0.2
    momentum: float = 0.9
    threshold: float = 0.2
    shift: int = 2
    mixed_precision: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.shift < 0:
            raise ValueError(
                "epochs must be >= 1, batch_size >= 2 and shift >= 0, got "
                f"{self.epochs}, {self.batch_size}, {self.shift}"
            )
        if not (self.learning_rate > 0 and 0 <= self.momentum < 1 and self.perturbation >= 0):
            raise ValueError(
                "learning_rate must be positive, momentum lie in [0, 1) and perturbation be >= 0, got "
                f"{self.learning_rate}, {self.momentum}, {self.perturbation}"
            )
        if not (0 <= self.trade_off <= 1 and 0 <= self.threshold < 1):
            raise ValueError(
                f"trade_off must lie in [0, 1] and threshold in [0, 1), got {self.trade_off}, {self.threshold}"
            )


@dataclass(frozen=True)
class ANPStep:
    """Progress after one epoch.

    `clean_loss` and `perturbed_loss`: mean cross-entropy of the epoch without and with the perturbation; `masks`: for
    every batch norm, by its name, float32 (C,) in [0, 1]; `pruned`: its channels whose mask is at most the threshold.
    `model` is the copy with just these pruned, in evaluation mode.
    """

    epoch: int
    epochs: int
    clean_loss: float
    perturbed_loss: float
    masks: dict[str, Tensor] = field(repr=False)
    pruned: dict[str, tuple[int, ...]] = field(repr=False)
    model: nn.Module = field(repr=False)


def anp(model: nn.Module, clean: LabelledImages, config: ANPConfig | None = None) -> Iterator[ANPStep]:
    """Adversarial neuron pruning: learn masks under which perturbed channels cannot mislead the network.

    Wu, Wang, "Adversarial Neuron Pruning Purifies Backdoored Deep Models", arXiv 2110.14430: channels of a backdoor
    answer to perturbed weights as they do to the trigger. Every channel of every batch norm, of weight gamma and bias
    beta, computes with (m + delta) * gamma and (1 + xi) * beta. The masks m, at first 1 and always in [0, 1], are
    learned by

        min over m of  alpha * CE(m) + (1 - alpha) * max over |delta|, |xi| <= epsilon of CE(m, delta, xi),

    CE being the cross-entropy on clean images. The inner maximum is one step of the gradient's sign from a random
    start, brought back into the bounds (the authors' code leaves that out: on a patch and a blended trigger once worse,
    once better). As in the authors' code batch norm uses the statistics of the batch meanwhile, and a pruned channel
    loses its gamma and keeps its beta.

    Parameters
    ----------
    model
        Any classifier with batch norm that has weights; it stays as it is.
    clean
        The defender's clean images with their true labels.
    config
        `ANPConfig()` by default.

    Yields
    ------
    ANPStep
        One an epoch.

    Raises
    ------
    ValueError
        Fewer images than two, fewer classes in the model than in the images, or no batch norm with weights.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> from bclip_lab.training import run, trainable_copy
    >>> images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> clean = LabelledImages(images, torch.arange(20) % 2, ("a", "b"))
    >>> step = run(anp(resnet10(2, seed=0, width=4), clean, ANPConfig(epochs=2)))
    >>> step.epoch, step.masks["bn1"].shape
    (2, torch.Size([4]))
    """
    config = config or ANPConfig()
    private = trainable_copy(model, clean, least=2)
    norms = {
        name: module for name, module in private.named_modules() if isinstance(module, _BatchNorm) and module.affine
    }
    if not norms:
        raise ValueError("model has no batch norm with weights (affine=True), whose channels ANP could mask")
    # What is learned on, in training mode: its running statistics drift, and are thrown away.
    trained = copy.deepcopy(private).train().requires_grad_(False)
    gammas = {name: norm.weight.detach().clone() for name, norm in norms.items()}
    betas = {name: norm.bias.detach() for name, norm in norms.items()}
    masks = {name: torch.ones_like(gamma, requires_grad=True) for name, gamma in gammas.items()}
    optimiser = SGD(list(masks.values()), lr=config.learning_rate, momentum=config.momentum)
    generator = torch.Generator().manual_seed(config.seed)
    device = device_of(private)
    images, labels = clean.images.to(device), clean.labels.to(device)
    steps = math.ceil(len(clean) / config.batch_size)
    mixed = config.mixed_precision and bfloat16_is_fast(device)

    def loss(x: Tensor, y: Tensor, noise: dict[str, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        weights = {f"{name}.weight": masks[name] * gammas[name] for name in norms}
        if noise is not None:
            weights = {f"{name}.weight": (masks[name] + noise[name][0]) * gammas[name] for name in norms}
            weights |= {f"{name}.bias": (1 + noise[name][1]) * betas[name] for name in norms}
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            out: Tensor = functional_call(trained, weights, (x,))
        return F.cross_entropy(out.float(), y)

    def draw(like: Tensor) -> Tensor:
        start = torch.empty(like.shape).uniform_(-config.perturbation, config.perturbation, generator=generator)
        return start.to(device).requires_grad_()

    for epoch in range(1, config.epochs + 1):
        clean_loss = perturbed_loss = 0.0
        for rows in torch.randperm(len(clean), generator=generator).chunk(steps):
            rows = rows.to(device)
            x = augment(to_float(images[rows]), shift=config.shift, flip=False, generator=generator)
            x, y = x.contiguous(memory_format=torch.channels_last), labels[rows]
            noise = {name: (draw(gamma), draw(gamma)) for name, gamma in gammas.items()}
            parts = [part for both in noise.values() for part in both]
            for part, gradient in zip(parts, torch.autograd.grad(loss(x, y, noise), parts), strict=True):
                part.detach().add_(config.perturbation * gradient.sign()).clamp_(
                    -config.perturbation, config.perturbation
                )
            noise = {name: (delta.detach(), xi.detach()) for name, (delta, xi) in noise.items()}
            undisturbed, disturbed = loss(x, y), loss(x, y, noise)
            optimiser.zero_grad()
            (config.trade_off * undisturbed + (1 - config.trade_off) * disturbed).backward()
            optimiser.step()
            with torch.no_grad():
                for mask in masks.values():
                    mask.clamp_(0, 1)
            clean_loss += float(undisturbed.detach()) / steps
            perturbed_loss += float(disturbed.detach()) / steps
        with torch.no_grad():
            for name, norm in norms.items():
                norm.weight.copy_(gammas[name] * (masks[name] > config.threshold))
        yield ANPStep(
            epoch,
            config.epochs,
            clean_loss,
            perturbed_loss,
            {name: mask.detach().cpu().clone() for name, mask in masks.items()},
            {name: tuple(torch.nonzero(mask <= config.threshold).flatten().tolist()) for name, mask in masks.items()},
            private,
        )
