"""The classification margin, and images that maximise it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bclip_lab.data.images import check_images, check_labels, to_float
from bclip_lab.models import bfloat16_is_fast, device_of, evaluating, images_at_once
from bclip_lab.optimisers import SGD, Adam

__all__ = [
    "MaximumMarginConfig",
    "MaximumMargins",
    "classification_margins",
    "maximum_margin_images",
    "maximum_margin_patches",
    "maximum_margin_perturbations",
    "place_patches",
]


# Images a step for each perturbation, and for each patch.
_PER_PERTURBATION, _PER_PATCH = 10, 2
# Of the witness's cross-entropy beside the model's margins: large enough that its decisions mostly stay.
_WITNESS_WEIGHT = 5.0


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


def _first(steps: int) -> int:
    """After how many steps of a search only the best of what is sought go on: two sevenths, rounded up."""
    return steps - steps * 5 // 7


def _seen(witness: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """What a search pays for each image that the witness decides in another way than by its label."""
    out = _ascent_logits(witness, images)
    return _WITNESS_WEIGHT * F.cross_entropy(out, labels.to(out.device), reduction="none")


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
    targets: Tensor | None = None,
    batch_size: int | None = None,
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
    targets
        int64 (T,): the classes t, in order; all of them by default.
    batch_size
        Images at once; by default 100 of up to 32x32 pixels, of larger ones fewer.

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
    batch_size = images_at_once(shape) if batch_size is None else batch_size
    if classes < 2 or batch_size < 1:
        raise ValueError(f"classes must be >= 2 and batch_size >= 1, got {classes} and {batch_size}")
    device = device_of(model)
    generator = torch.Generator().manual_seed(config.seed)
    targets = torch.arange(classes) if targets is None else targets.cpu()
    check_labels(targets, classes, "targets")
    targets = targets.repeat_interleave(config.per_class)
    images, margins = [], []
    with evaluating(model):
        for target in targets.split(batch_size):
            start = torch.rand((len(target), *shape), generator=generator)
            x = start.to(device).contiguous(memory_format=torch.channels_last).requires_grad_()
            optimiser = (
                Adam([x], lr=config.learning_rate) if config.optimiser == "adam" else SGD([x], lr=config.learning_rate)
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
    targets: Tensor,
    *,
    limit: float,
    witness: nn.Module | None = None,
    labels: Tensor | None = None,
    steps: int = 30,
    batch_size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """For each target class t, one perturbation that raises the margin m_t of *all* images.

    delta_t = argmax over |delta| <= limit of the mean over x of m_t(clip(x + delta, 0, 1)): a targeted
    universal perturbation (Moosavi-Dezfooli et al., arXiv 1610.08401). A trigger that is spread over the
    image is close to such a perturbation for its target class, and far from any image that
    `maximum_margin_images` finds.

    With a witness h, another network for the same images, delta_t maximises the mean of
    m_t(x') - 5 CE(y, h(x')), y the label of x: it may change only what the witness does not see, as a backdoor
    that the witness lacks.

    After two sevenths of the steps, rounded up, only the half of all classes goes on that has reached most, as a mean
    over these steps: few are the target of a backdoor, and another takes as long.

    Parameters
    ----------
    model
        Any classifier; its weights, their gradients and its mode are left alone.
    images
        (N, C, H, W), uint8 or float32 in [0, 1]: some clean images.
    targets
        int64 (T,): the classes t.
    limit
        Largest change of a pixel, in units of the range [0, 1].
    witness, labels
        A classifier of the same images, and their labels, int64 (N,): both or neither.
    steps
        Of Adam, each of limit / 5; it begins anew where only a half of the classes goes on.
    batch_size
        Images a step, ten for each class; so many classes are sought together. By default 100 of up to 32x32 pixels,
        of larger ones fewer.
    seed
        Of the images, which are drawn afresh for every step and are the same for all classes.

    Returns
    -------
    Tensor
        float32 (T, C, H, W) within [-limit, limit], on the model's device.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> delta = maximum_margin_perturbations(
    ...     resnet10(4, seed=0, width=4), torch.rand(3, 3, 8, 8), torch.arange(4), limit=0.1, steps=2
    ... )
    >>> delta.shape, bool(delta.abs().max() <= 0.1)
    (torch.Size([4, 3, 8, 8]), True)
    """
    check_images(images)
    if (witness is None) != (labels is None) or (labels is not None and len(labels) != len(images)):
        raise ValueError("witness and labels go together, and labels must be as many as the images")
    batch_size = images_at_once(images.shape) if batch_size is None else batch_size
    if not len(images) or not limit > 0 or steps < 1 or batch_size < 1:
        raise ValueError(
            "images must not be empty, limit > 0, steps and batch_size >= 1, got "
            f"{len(images)} images, {limit}, {steps}, {batch_size}"
        )
    device = device_of(model)
    clean, targets = to_float(images.to(device)), targets.cpu()
    generator = torch.Generator().manual_seed(seed)
    count = min(len(clean), _PER_PERTURBATION)
    shown = [torch.randperm(len(clean), generator=generator)[:count].to(device) for _ in range(steps)]
    deltas = torch.zeros(len(targets), 1, *clean.shape[1:], device=device)
    rest, first = torch.arange(len(targets)), _first(steps)
    with evaluating(model), evaluating(model if witness is None else witness):
        for phase in (shown[:first], shown[first:]):
            reached = torch.zeros(len(targets))
            for some in rest.split(max(1, batch_size // _PER_PERTURBATION)):
                delta = deltas[some].requires_grad_()
                optimiser = Adam([delta], lr=limit / 5)
                for rows in phase:
                    x = (clean[rows] + delta).clamp(0, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
                    gain = classification_margins(_ascent_logits(model, x), targets[some].repeat_interleave(count))
                    if witness is not None and labels is not None:
                        gain = gain - _seen(witness, x, labels[rows.to(labels.device)].repeat(len(some)))
                    reached[some] += gain.detach().view(len(some), -1).sum(1).cpu()
                    (delta.grad,) = torch.autograd.grad(-gain.sum() / count, delta)
                    optimiser.step()
                    with torch.no_grad():
                        delta.clamp_(-limit, limit)
                deltas[some] = delta.detach()
            rest = reached.topk((len(targets) + 1) // 2).indices.sort().values
    return deltas[:, 0]


def place_patches(images: Tensor, patches: Tensor, generator: torch.Generator) -> Tensor:
    """Each image with its patch at a random place.

    Parameters
    ----------
    images
        float32 (N, C, H, W); not altered.
    patches
        float32 (N, C, S, S), S no larger than H and W. Gradients flow back to them.
    generator
        Of the places, uniform over all where the patch lies within the image.

    Returns
    -------
    Tensor
        float32 (N, C, H, W).

    Raises
    ------
    ValueError
        Patches that do not fit into the images, or not as many of them.

    Examples
    --------
    >>> placed = place_patches(torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 2, 2), torch.Generator().manual_seed(0))
    >>> placed.sum()
    tensor(4.)
    """
    count, _, height, width = images.shape
    side = patches.shape[-1]
    if len(patches) != count or side > min(height, width):
        raise ValueError(
            f"patches must be as many as the {count} images and no larger than {height}x{width}, got {len(patches)} "
            f"of {side}x{side}"
        )
    # row[n, h]: the row of the patch that covers row h of image n; outside [0, side) none does
    row = torch.arange(height) - torch.randint(height - side + 1, (count, 1), generator=generator)
    column = torch.arange(width) - torch.randint(width - side + 1, (count, 1), generator=generator)
    covers = ((row >= 0) & (row < side))[:, None, :, None] & ((column >= 0) & (column < side))[:, None, None, :]
    image = torch.arange(count)[:, None, None]
    spread = patches[image, :, row.clamp(0, side - 1)[:, :, None], column.clamp(0, side - 1)[:, None, :]]
    return torch.where(covers.to(images.device), spread.permute(0, 3, 1, 2), images)


def maximum_margin_patches(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    pairs: Tensor,
    *,
    witness: nn.Module | None = None,
    size: int = 4,
    steps: int = 17,
    batch_size: int | None = None,
    seed: int = 0,
) -> Tensor:
    """For each pair of classes (s, t), one small patch that raises the margin m_t of images of class s.

    P_st = argmax over P in [0, 1] of the mean of m_t(x with P at a random place) over images x of class s: a
    targeted adversarial patch (Brown et al., arXiv 1712.09665), from one class to another. The patch of a BadNets
    trigger is close to such a patch, also where the backdoor acts on a single class. With a witness the patch
    maximises m_t(x') - 5 CE(s, h(x')), as in `maximum_margin_perturbations`.

    After two sevenths of the steps, rounded up, only the third of all pairs goes on that has reached most, as a mean
    over these steps: few pairs are like a backdoor, and a hopeless one takes as long as another.

    Parameters
    ----------
    model
        Any classifier; its weights, their gradients and its mode are left alone.
    images
        (N, C, H, W), uint8 or float32 in [0, 1]: some clean images.
    labels
        int64 (N,): their classes.
    pairs
        int64 (P, 2): the pairs (s, t). Of every s there is an image.
    witness
        A classifier of the same images, or None.
    size
        Side S of the patches in pixels.
    steps
        Of Adam, each of 0.1; it begins anew where only a third of the pairs goes on.
    batch_size
        Images a step, two of each pair; so many pairs are sought together. By default 180 of up to 32x32 pixels,
        of larger ones fewer.
    seed
        Of the first patches, uniform in [0, 1], of the images and the places.

    Returns
    -------
    Tensor
        float32 (P, C, S, S) in [0, 1], on the model's device.

    Raises
    ------
    ValueError
        No images, not as many labels, no step, a pair whose s has no image, or a size below 1 or larger than the
        images.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> images, pairs = torch.rand(4, 3, 8, 8), torch.tensor([[0, 1], [2, 1]])
    >>> maximum_margin_patches(resnet10(4, seed=0, width=4), images, torch.arange(4), pairs, size=2, steps=2).shape
    torch.Size([2, 3, 2, 2])
    """
    check_images(images)
    if len(labels) != len(images):
        raise ValueError(f"images and labels must be as many, got {len(images)} and {len(labels)}")
    batch_size = images_at_once(images.shape, 180) if batch_size is None else batch_size
    if not len(images) or steps < 1 or batch_size < 1 or not 1 <= size <= min(images.shape[-2:]):
        raise ValueError(
            "images must not be empty, steps and batch_size >= 1 and size between 1 and the images' side, got "
            f"{len(images)} images of {tuple(images.shape[-2:])}, {steps}, {batch_size}, {size}"
        )
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
        raise ValueError(f"pairs must be int64 (P, 2), got {pairs.dtype} {tuple(pairs.shape)}")
    generator = torch.Generator().manual_seed(seed)
    device = device_of(model)
    clean, labels, pairs = to_float(images.to(device)), labels.cpu(), pairs.cpu()
    members = {s: torch.nonzero(labels == s).flatten() for s in pairs[:, 0].unique().tolist()}
    if empty := [s for s, rows in members.items() if not len(rows)]:
        raise ValueError(f"pairs: there is no image of class {empty[0]}")
    patches = torch.rand(len(pairs), images.shape[1], size, size, generator=generator).to(device)
    rest, first = torch.arange(len(pairs)), _first(steps)
    with evaluating(model), evaluating(model if witness is None else witness):
        for length in (first, steps - first):
            reached = torch.zeros(len(pairs))
            for some in rest.split(max(1, batch_size // _PER_PATCH)):
                better = patches[some].requires_grad_()
                optimiser = Adam([better], lr=0.1)
                sources, targets = pairs[some].repeat(_PER_PATCH, 1).unbind(1)
                for _ in range(length):
                    rows = torch.stack([_one_of(members[s], generator) for s in sources.tolist()]).to(device)
                    x = place_patches(clean[rows], better.repeat(_PER_PATCH, 1, 1, 1), generator)
                    x = x.contiguous(memory_format=torch.channels_last)
                    gain = classification_margins(_ascent_logits(model, x), targets)
                    if witness is not None:
                        gain = gain - _seen(witness, x, sources)
                    reached[some] += gain.detach().view(_PER_PATCH, -1).sum(0).cpu()
                    (better.grad,) = torch.autograd.grad(-gain.sum(), better)
                    optimiser.step()
                    with torch.no_grad():
                        better.clamp_(0, 1)
                patches[some] = better.detach()
            rest = reached.topk((len(pairs) + 2) // 3).indices.sort().values
    return patches


def _one_of(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (), generator=generator)]
