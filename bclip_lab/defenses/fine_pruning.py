"""Fine-Pruning: prune the channels that clean images leave idle, then fine-tune."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bclip_lab.data.images import LabelledImages
from bclip_lab.defenses.fine_tuning import FineTuneConfig
from bclip_lab.models import logits
from bclip_lab.training import train, trainable_copy

__all__ = ["FinePruneConfig", "FinePruneStep", "fine_prune"]


@dataclass(frozen=True)
class FinePruneConfig:
    """Hyper-parameters of `fine_prune`.

    Parameters
    ----------
    accuracy_budget
        Pruning goes on while the accuracy on held-out clean images has fallen by no more than this: 0.1 in
        BackdoorBench (Wu et al., arXiv 2206.12654; `acc_ratio` of its configuration `fp`).
    held_out
        Share of the clean images, drawn at random, that pruning is judged on. BackdoorBench judges it on the test
        images, which a defender does not have.
    tuning
        Of the fine-tuning afterwards, on all clean images; its seed is replaced by `seed`.
    seed
        Of what is held out, and of the fine-tuning.
    """

    accuracy_budget: float = 0.1
    held_out: float = 0.2
    tuning: FineTuneConfig = field(default_factory=FineTuneConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy_budget < 1:
            raise ValueError(f"accuracy_budget must lie in [0, 1), got {self.accuracy_budget}")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out must lie in (0, 1), got {self.held_out}")


@dataclass(frozen=True)
class FinePruneStep:
    """Progress: epoch 0 is after pruning, the others after as many epochs of fine-tuning.

    `loss` and `accuracy`: means over the clean images as they were shown in this epoch, nan at epoch 0; `activity`:
    float32 (C,), each channel's mean on the clean images that are not held out; `pruned`: channels in the order in
    which they were pruned; `curve`: accuracy on held-out images after 0, 1, 2, ... channels, the last one where it was
    too low. `model` is the copy so far, in evaluation mode.
    """

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    activity: Tensor = field(repr=False)
    pruned: tuple[int, ...] = field(repr=False)
    curve: tuple[float, ...] = field(repr=False)
    model: nn.Module = field(repr=False)


def fine_prune(
    model: nn.Module, clean: LabelledImages, config: FinePruneConfig | None = None
) -> Iterator[FinePruneStep]:
    """Prune the last convolution's channels that clean images activate least, then fine-tune.

    Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep Neural Networks", arXiv
    1805.12185: a backdoor hides in channels that are idle on clean images, and what pruning leaves of it fine-tuning
    wears off. Channels of the last feature map go in the order of their mean activation on clean images, the least one
    first, until the next would cost too much accuracy on clean images that are held out.

    A channel is pruned where the first linear layer behind the last convolution is given it: its weights there are 0,
    and fine-tuning leaves them so. In a residual network this is the sum of branch and short cut, as in BackdoorBench.

    Parameters
    ----------
    model
        Any classifier that hands the feature map of its last convolution, pooled or flattened, to a linear layer; it
        stays as it is.
    clean
        The defender's clean images with their true labels.
    config
        `FinePruneConfig()` by default.

    Yields
    ------
    FinePruneStep
        One after pruning and one an epoch of fine-tuning.

    Raises
    ------
    ValueError
        Images too few to hold some out, no linear layer behind the last convolution, or layers between the two that
        mix channels (as in DenseNet, whose last convolution makes few of the channels).

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> images = torch.rand(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> clean = LabelledImages(images, torch.arange(20) % 2, ("a", "b"))
    >>> step = next(fine_prune(resnet10(2, seed=0, width=4), clean))
    >>> step.epoch, step.activity.shape, len(step.curve) - len(step.pruned) in (1, 2)
    (0, torch.Size([32]), True)
    """
    config = config or FinePruneConfig()
    private = trainable_copy(model, clean, least=2)
    order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(config.seed))
    count = max(1, round(config.held_out * len(clean)))
    if count == len(clean):
        raise ValueError(f"clean: {len(clean)} images are too few to hold out a share of {config.held_out}")
    held_out, rest = clean[order[:count]], clean[order[count:]]
    linear, features = _classifier(private, rest)
    activity = features.mean((0, 2))
    weight = linear.weight.detach().view(len(linear.weight), len(activity), -1)  # (outputs, channels, positions)

    def accuracy() -> float:
        return float((logits(private, held_out).argmax(1) == held_out.labels.cpu()).double().mean())

    curve, pruned = [accuracy()], []
    for channel in activity.argsort(stable=True).tolist():
        before = weight[:, channel].clone()
        weight[:, channel] = 0
        curve.append(accuracy())
        if curve[-1] < curve[0] - config.accuracy_budget:
            weight[:, channel] = before
            break
        pruned.append(channel)

    def record(epoch: int, loss: float, accuracy: float) -> FinePruneStep:
        return FinePruneStep(
            epoch, config.tuning.epochs, loss, accuracy, activity, tuple(pruned), tuple(curve), private
        )

    yield record(0, math.nan, math.nan)
    kept = torch.ones_like(weight)
    kept[:, pruned] = 0
    # No gradient: neither momentum nor weight decay moves a weight that is 0.
    handle = linear.weight.register_hook(lambda gradient: gradient * kept.view_as(gradient))
    try:
        for step in train(private, clean, replace(config.tuning, seed=config.seed)):
            yield record(int(step.epoch), step.loss, step.train_accuracy)
    finally:
        handle.remove()


def _classifier(model: nn.Module, images: LabelledImages) -> tuple[nn.Linear, Tensor]:
    """The first linear layer behind the last convolution, and what it is given: float32 (N, C, positions)."""
    calls: list[tuple[nn.Module, Tensor]] = []

    def seen(module: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        calls.append((module, args[0].detach().float().cpu()) if isinstance(module, nn.Linear) else (module, out))

    def idle(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        """Silence every other channel."""
        return out * (torch.arange(out.shape[1], device=out.device) % 2 == 1)[:, None, None]

    def inputs(data: LabelledImages) -> tuple[nn.Module | None, nn.Module | None, Tensor]:
        """Last convolution called, linear layer called next, and all that this one was given."""
        calls.clear()
        logits(model, data)
        names = [isinstance(module, nn.Conv2d) for module, _ in calls]
        if True not in names or names[-1]:
            return None, None, torch.empty(0)
        last = len(names) - names[::-1].index(True)
        linear = calls[last][0]
        return calls[last - 1][0], linear, torch.cat([given for module, given in calls if module is linear])

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_hook(seen) for layer in layers]
    try:
        convolution, linear, given = inputs(images)
        if not isinstance(convolution, nn.Conv2d) or not isinstance(linear, nn.Linear):
            raise ValueError(
                "model must have an nn.Linear behind its last nn.Conv2d: Fine-Pruning prunes the channels that this "
                "layer is given"
            )
        channels = convolution.out_channels
        _, _, before = inputs(images[:1])
        handles.append(convolution.register_forward_hook(idle))
        _, _, after = inputs(images[:1])
    finally:
        for handle in handles:
            handle.remove()
    separate = given.ndim == 2 and given.shape[1] % channels == 0
    if separate:
        silenced = (before != after).view(channels, -1).any(1)
        separate = bool(silenced.any()) and not bool(silenced[1::2].any())
    if not separate:
        raise ValueError(
            f"model: what its linear layer behind the last convolution is given, of shape {tuple(given.shape)}, does "
            f"not hold the {channels} channels of that convolution one by one, so that none can be pruned there"
        )
    return linear, given.unflatten(1, (channels, -1))
