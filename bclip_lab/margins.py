"""The classification margin, and images that maximise it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bclip_lab.data.images import check_images, check_labels, to_float
from bclip_lab.models import bfloat16_is_fast, device_of, evaluating

__all__ = [
    "MaximumMarginConfig",
    "MaximumMargins",
    "classification_margins",
    "maximum_margin_images",
    "maximum_margin_perturbations",
]


def classification_margins(logits: Tensor, classes: Tensor) -> Tensor:
    """m_c(x) = g_c(x) - max over k != c of g_k(x) (arXiv 2205.06900, section 3).

    Parameters
    ----------
    logits
        float (N, K), K >= 2.
    classes
        int64 (N,): the class c of each row.

    Returns
    -------
    Tensor
        float (N,): positive where c is the decision.

    Examples
    --------
    >>> classification_margins(torch.tensor([[3.0, 1.0, 0.5]]), torch.tensor([0]))
    tensor([2.])
    >>> classification_margins(torch.tensor([[3.0, 1.0, 0.5]]), torch.tensor([1]))
    tensor([-2.])
    """
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits must have shape (N, K) with K >= 2, got {tuple(logits.shape)}")
    check_labels(classes, logits.shape[1], "classes")
    if len(classes) != len(logits):  # gather would take fewer, and broadcast them
        raise ValueError(f"logits and classes must be as many, got {len(logits)} and {len(classes)}")
    classes = classes.to(logits.device)[:, None]
    own = logits.gather(1, classes)[:, 0]
    others = logits.scatter(1, classes, float("-inf")).amax(1)
    return own - others


@dataclass(frozen=True)
class MaximumMarginConfig:
    """How images of maximum margin are sought.

    Parameters
    ----------
    per_class
        Images a class, from as many noise starts.
    steps
        Steps of gradient ascent.
    learning_rate
        Of each step.
    optimiser
        "adam", or "gradient": x + learning_rate * gradient, as in the authors' code, where the optimiser is
        built anew at every step, so that its momentum never acts.
    seed
        Of the noise, uniform in [0, 1].
    """

    per_class: int = 10
    steps: int = 40
    learning_rate: float = 0.1
    optimiser: str = "adam"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.per_class < 1 or self.steps < 1 or not self.learning_rate > 0:
            raise ValueError(
                "per_class and steps must be >= 1 and learning_rate > 0, got "
                f"{self.per_class}, {self.steps}, {self.learning_rate}"
            )
        if self.optimiser not in ("adam", "gradient"):
            raise ValueError(f"optimiser must be 'adam' or 'gradient', got {self.optimiser!r}")

    @classmethod
    def published(cls, seed: int = 0) -> MaximumMarginConfig:
        """The authors' recipe for MMAC: 50 images a class, 300 plain steps of 0.01 (`train_mmac.py`)."""
        return cls(per_class=50, steps=300, learning_rate=0.01, optimiser="gradient", seed=seed)


def _ascent_logits(model: nn.Module, images: Tensor) -> Tensor:
    """Logits to climb by: in bfloat16 where that is fast, since only the direction matters."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bfloat16_is_fast(images.device)):
        out: Tensor = model(images)
    return out.float()


@dataclass(frozen=True, eq=False)
class MaximumMargins:
    """Images that maximise the margin of each class.

    `images` float32 (K * n, C, H, W) in [0, 1]; `classes` int64 (K * n,), the class whose margin each one
    maximises; `margins` float32 (K * n,), what was reached.
    """

    images: Tensor
    classes: Tensor
    margins: Tensor

    def largest(self) -> Tensor:
        """float32 (K,): the largest margin of each class over its starts."""
        return torch.stack([self.margins[self.classes == c].max() for c in self.classes.unique()])


def maximum_margin_images(
    model: nn.Module,
    shape: tuple[int, int, int],
    classes: int,
    config: MaximumMarginConfig | None = None,
    *,
    batch_size: int = 500,
) -> MaximumMargins:
    """For each class t, images x in [0, 1] that maximise m_t(x).

    Gradient ascent from uniform noise (arXiv 2205.06900, equation 2; 2308.04617, section 3.1); after each
    step the images are put back into [0, 1]. No image of the data is needed. In a backdoored network the
    target class reaches a far larger margin than the others.

    Parameters
    ----------
    model
        Any classifier; used in evaluation mode, its weights, their gradients and its mode are left alone.
    shape
        (C, H, W) of the images.
    classes
        Number of classes K of the model.
    config
        `MaximumMarginConfig()` by default: all classes in one batch under Adam, 40 steps, which finds the
        same outlying class as the published 300 plain steps in a thirtieth of the time.
    batch_size
        Images at once; memory is bounded by it.

    Raises
    ------
    ValueError
        `shape` is no (C, H, W), or `classes` is below 2 or more than the model has.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> config = MaximumMarginConfig(per_class=2, steps=3)
    >>> found = maximum_margin_images(resnet10(4, seed=0, width=4), (3, 8, 8), 4, config)
    >>> found.images.shape, found.classes.tolist()
    (torch.Size([8, 3, 8, 8]), [0, 0, 1, 1, 2, 2, 3, 3])
    """
    config = config or MaximumMarginConfig()
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"shape must be (C, H, W), each at least 1, got {tuple(shape)}")
    if classes < 2 or batch_size < 1:
        raise ValueError(f"classes must be >= 2 and batch_size >= 1, got {classes} and {batch_size}")
    device = device_of(model)
    generator = torch.Generator().manual_seed(config.seed)
    noise = torch.rand((classes * config.per_class, *shape), generator=generator)
    targets = torch.arange(classes).repeat_interleave(config.per_class)
    images, margins = [], []
    with evaluating(model):
        for start, target in zip(noise.split(batch_size), targets.split(batch_size), strict=True):
            x = start.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
            optimiser = (
                torch.optim.Adam([x], lr=config.learning_rate)
                if config.optimiser == "adam"
                else torch.optim.SGD([x], lr=config.learning_rate)
            )
            for _ in range(config.steps):
                loss = -classification_margins(_ascent_logits(model, x), target).sum()
                (x.grad,) = torch.autograd.grad(loss, x)
                optimiser.step()
                with torch.no_grad():
                    x.clamp_(0, 1)
            with torch.no_grad():
                margins.append(classification_margins(model(x), target).float().cpu())
            images.append(x.detach().cpu())
    return MaximumMargins(torch.cat(images), targets, torch.cat(margins))


def maximum_margin_perturbations(
    model: nn.Module,
    images: Tensor,
    classes: int,
    *,
    limit: float,
    steps: int = 40,
    batch_size: int = 500,
) -> Tensor:
    """For each class t, one perturbation that raises the margin m_t of *all* images.

    delta_t = argmax over |delta| <= limit of the mean over x of m_t(clip(x + delta, 0, 1)): a targeted
    universal perturbation (Moosavi-Dezfooli et al., arXiv 1610.08401). A trigger that is spread over the
    image is close to such a perturbation for its target class, and far from any image that
    `maximum_margin_images` finds.

    Parameters
    ----------
    model
        Any classifier; its weights, their gradients and its mode are left alone.
    images
        (N, C, H, W), uint8 or float32 in [0, 1]: some clean images; two a class suffice.
    classes
        Number of classes K of the model.
    limit
        Largest change of a pixel, in units of the range [0, 1].
    steps
        Of Adam, each of limit / 5.
    batch_size
        Images at once; memory is bounded by it.

    Returns
    -------
    Tensor
        float32 (K, C, H, W) within [-limit, limit], on the model's device.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> delta = maximum_margin_perturbations(
    ...     resnet10(4, seed=0, width=4), torch.rand(3, 3, 8, 8), 4, limit=0.1, steps=2
    ... )
    >>> delta.shape, bool(delta.abs().max() <= 0.1)
    (torch.Size([4, 3, 8, 8]), True)
    """
    check_images(images)
    if not len(images) or not limit > 0 or steps < 1:
        raise ValueError(
            f"images must not be empty, limit > 0 and steps >= 1, got {len(images)} images, {limit}, {steps}"
        )
    device = device_of(model)
    clean = to_float(images.to(device))
    found = []
    with evaluating(model):
        for targets in torch.arange(classes).split(max(1, batch_size // len(clean))):
            delta = torch.zeros(len(targets), 1, *clean.shape[1:], device=device, requires_grad=True)
            optimiser = torch.optim.Adam([delta], lr=limit / 5)
            for _ in range(steps):
                x = (clean + delta).clamp(0, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
                out = _ascent_logits(model, x)
                margins = classification_margins(out, targets.repeat_interleave(len(clean)))
                (delta.grad,) = torch.autograd.grad(-margins.sum() / len(clean), delta)
                optimiser.step()
                with torch.no_grad():
                    delta.clamp_(-limit, limit)
            found.append(delta.detach()[:, 0])
    return torch.cat(found)
