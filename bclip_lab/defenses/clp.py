"""CLP: prune the channels that are most sensitive to their input, without any data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bclip_lab.data.images import LabelledImages
from bclip_lab.models import logits
from bclip_lab.training import trainable_copy

__all__ = ["CLPConfig", "CLPStep", "clp", "lipschitz_bounds"]


@dataclass(frozen=True)
class CLPConfig:
    """Hyper-parameters of `clp`.

    Parameters
    ----------
    deviations
        u: a channel is pruned where its bound lies more than so many standard deviations above the mean of its layer.
        3 in the paper, for a ResNet-18 of width 64. Of n numbers none lies more than (n - 1) / sqrt(n) above: with u =
        3 layers of up to 10 channels lose none, and the lab's first ones have 16. Development networks that are not in
        the zoo decided, by clean accuracy: 2.5 is the lowest of 2.25, 2.5, 2.75 and 3 at which each of three clean
        ones lost less than .01. On eight attacked ones 3 left a mean ASR of .98, 2.5 of .82, 2.25 of .58 (ACC down to
        .81).
    """

    deviations: float = 2.5

    def __post_init__(self) -> None:
        if not self.deviations >= 0:
            raise ValueError(f"deviations must be >= 0, got {self.deviations}")


@dataclass(frozen=True)
class CLPStep:
    """Progress after one layer; `epoch` counts layers, in the order in which they compute.

    `layer`: name of the batch norm; `bounds`: float32 (C,), one upper bound a channel; `limit`: mean plus u standard
    deviations of these; `pruned`: channels of this layer above it. `model` is the copy pruned so far, in evaluation
    mode.
    """

    epoch: int
    epochs: int
    layer: str
    bounds: Tensor = field(repr=False)
    limit: float
    pruned: tuple[int, ...]
    model: nn.Module = field(repr=False)


def lipschitz_bounds(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """Upper bounds of the channels' Lipschitz constants of a convolution and the batch norm behind it.

    Zheng, Tang, Li, Liu, "Data-free Backdoor Removal based on Channel Lipschitzness", arXiv 2208.03111:
    the largest singular value of the channel's kernel, as a matrix of input channels times positions, once batch norm
    is folded into it,

        sigma_k = |gamma_k| / sqrt(variance_k + epsilon) * largest singular value of W_k.

    (The authors' code leaves out epsilon, without which a channel that is always silent has no finite bound.)

    Returns
    -------
    Tensor
        float32 (C,), not negative.

    Examples
    --------
    >>> convolution = nn.Conv2d(2, 1, (1, 2), bias=False)
    >>> convolution.weight.data = torch.tensor([[3.0, 0.0], [0.0, 4.0]]).view(1, 2, 1, 2)
    >>> norm = nn.BatchNorm2d(1, eps=0.0)
    >>> norm.running_var.fill_(4.0)
    tensor([4.])
    >>> lipschitz_bounds(convolution, norm)  # 4 / sqrt(4)
    tensor([2.])
    """
    if norm.running_var is None or not norm.affine:
        raise ValueError("norm must have running statistics and weights (affine=True): CLP folds and prunes them")
    kernels = convolution.weight.detach().flatten(2)
    scale = norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
    largest: Tensor = torch.linalg.matrix_norm(kernels, 2)
    return largest * scale


def clp(model: nn.Module, clean: LabelledImages, config: CLPConfig | None = None) -> Iterator[CLPStep]:
    """Prune channels whose Lipschitz constant has an outlying upper bound (arXiv 2208.03111).

    In every layer of a convolution with a batch norm behind it, the channels are pruned (weight and bias of batch norm
    set to 0) whose bound, see `lipschitz_bounds`, exceeds

        mean + u * standard deviation

    of the layer's bounds. Nothing is learned, and no seed is needed.

    Parameters
    ----------
    model
        Any classifier in which some `nn.BatchNorm2d` gets the output of an `nn.Conv2d` as it is; convolutions without
        one are left alone, as in the authors' code. Which belongs to which is seen in one pass of one image, not by
        the order in which modules are listed. The model stays as it is.
    clean
        Only here because every defence takes it: the method needs no data. Of the images only the shape is used.
    config
        `CLPConfig()` by default.

    Yields
    ------
    CLPStep
        One a layer.

    Raises
    ------
    ValueError
        No convolution with a batch norm behind it, or such a batch norm without weights or running statistics.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> from bclip_lab.training import run, trainable_copy
    >>> model = resnet10(2, seed=0, width=16)
    >>> model.bn1.weight.data[5] = 9.0
    >>> clean = LabelledImages(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), ("a", "b"))
    >>> step = next(clp(model, clean))
    >>> step.layer, step.pruned, step.epochs
    ('bn1', (5,), 12)
    """
    config = config or CLPConfig()
    private = trainable_copy(model, clean, least=2)
    pairs = _pairs(private, torch.zeros_like(clean.images[:1]))
    if not pairs:
        raise ValueError(
            "model has no nn.BatchNorm2d that gets the output of an nn.Conv2d: CLP bounds channels of such pairs only"
        )
    bounds = [lipschitz_bounds(convolution, norm) for _, convolution, norm in pairs]
    for epoch, ((layer, _, norm), values) in enumerate(zip(pairs, bounds, strict=True), 1):
        limit = float(values.mean() + config.deviations * values.std())
        pruned = torch.nonzero(values > limit).flatten()
        with torch.no_grad():
            norm.weight[pruned] = 0
            norm.bias[pruned] = 0
        yield CLPStep(epoch, len(pairs), layer, values.cpu(), limit, tuple(pruned.tolist()), private)


def _pairs(model: nn.Module, image: Tensor) -> list[tuple[str, nn.Conv2d, nn.BatchNorm2d]]:
    """Every batch norm, with its name, that is called on what a convolution has just given, in order of the calls."""
    made: list[tuple[Tensor, nn.Conv2d]] = []  # keeps the outputs alive, so that `is` tells them apart
    found: dict[str, tuple[str, nn.Conv2d, nn.BatchNorm2d]] = {}

    def after(module: nn.Conv2d, args: Any, out: Tensor) -> None:
        made.append((out, module))

    def before(name: str, norm: nn.BatchNorm2d, args: tuple[Tensor]) -> None:
        for out, convolution in made:
            if args[0] is out:
                found.setdefault(name, (name, convolution, norm))

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(after))
        elif isinstance(module, nn.BatchNorm2d):
            handles.append(module.register_forward_pre_hook(lambda norm, args, name=name: before(name, norm, args)))
    try:
        logits(model, image)
    finally:
        for handle in handles:
            handle.remove()
    return list(found.values())
