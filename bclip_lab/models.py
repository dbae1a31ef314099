"""Small residual networks, and what every layer above needs of a model: its device and its logits."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bclip_lab.data.images import LabelledImages, check_images, to_float

__all__ = [
    "ResNet",
    "bfloat16_is_fast",
    "device_of",
    "evaluating",
    "images_at_once",
    "logits",
    "resnet",
    "resnet10",
    "resnet18",
]


def _keep_freed_memory() -> None:
    """Have the allocator of glibc keep what is freed, up to 128 MB, instead of giving it back to the system.

    As it is by default, the memory of most activations is asked for anew in every pass, page by page, which takes as
    long as the pass itself.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-1, 128 << 20)  # M_TRIM_THRESHOLD
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, the most that is taken


_keep_freed_memory()


class Normalise(nn.Module):
    """(x - mean) / std, so that the network itself takes images in [0, 1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch."""
        return (x - self.mean) / self.std


class Block(nn.Module):
    """Two 3x3 convolutions and a short cut (He et al., arXiv 1512.03385, figure 2, left)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, after its second ReLU."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.shortcut(x)
        return F.relu(y)


class ResNet(nn.Module):
    """A residual network for small images: 3x3 stem, stages of `Block`s, mean pooling, one linear layer.

    Takes images (N, C, H, W), float32 in [0, 1]; normalisation is its first layer. Every non-linearity is a
    ReLU. Use `resnet`, which also seeds the weights and chooses the device.
    """

    def __init__(
        self,
        classes: int,
        *,
        width: int = 16,
        blocks: Sequence[int] = (1, 1, 1, 1),
        channels: int = 3,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if classes < 2 or width < 1 or channels < 1 or not blocks or min(blocks) < 1:
            raise ValueError(
                "a ResNet needs classes >= 2, width >= 1, channels >= 1 and at least one block in every "
                f"stage, got classes={classes}, width={width}, channels={channels}, blocks={tuple(blocks)}"
            )
        self.normalise = Normalise(mean or [0.5] * channels, std or [0.25] * channels)
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            layers = []
            for block in range(count):
                layers.append(Block(inputs, outputs, 2 if stage and not block else 1))
                inputs = outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, classes) of images (N, C, H, W) in [0, 1]."""
        x = F.relu(self.bn1(self.conv1(self.normalise(x))))
        x = self.stages(x)
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def resnet(
    classes: int,
    *,
    seed: int,
    width: int = 16,
    blocks: Sequence[int] = (1, 1, 1, 1),
    channels: int = 3,
    device: str | torch.device = "auto",
) -> ResNet:
    """A ResNet with seeded weights on a device.

    Parameters
    ----------
    classes
        Number of classes, at least 2.
    seed
        Of the weights; the global random state is left as it was.
    width
        Channels of the first stage; each further stage doubles them. 16 is what two laptop cores train in
        seconds; the networks of the papers have 64.
    blocks
        Residual blocks in each stage, (1, 1, 1, 1) for ResNet-10 and (2, 2, 2, 2) for ResNet-18.
    channels
        Of the images: 3 for RGB, 1 for grey.
    device
        `"auto"` takes a CUDA device where there is one and the CPU elsewhere. This is the one place where a
        device is chosen: every tensor of the lab follows the model it is used with.

    Examples
    --------
    >>> model = resnet(10, seed=0, width=8)
    >>> sum(p.numel() for p in model.parameters())
    78002
    >>> model.eval()(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet(classes, width=width, blocks=blocks, channels=channels)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # channels-last is 2 to 3 times faster for convolutions on CPUs and changes no shape
    return model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def resnet10(
    classes: int, *, seed: int, width: int = 16, channels: int = 3, device: str | torch.device = "auto"
) -> ResNet:
    """`resnet` with one block in each of four stages: 0.31 million parameters at width 16."""
    return resnet(classes, seed=seed, width=width, channels=channels, device=device)


def resnet18(
    classes: int, *, seed: int, width: int = 16, channels: int = 3, device: str | torch.device = "auto"
) -> ResNet:
    """`resnet` with two blocks in each of four stages: 0.70 million parameters at width 16."""
    return resnet(classes, seed=seed, width=width, blocks=(2, 2, 2, 2), channels=channels, device=device)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU where it has none."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def bfloat16_is_fast(device: torch.device) -> bool:
    """Whether autocast to bfloat16 pays on this device: CUDA, or a CPU with the instructions."""
    return device.type == "cuda" or (device.type == "cpu" and torch.cpu._is_avx512_bf16_supported())


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode within the block; afterwards every submodule has the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def images_at_once(shape: Sequence[int], most: int = 100) -> int:
    """How many images of a shape (..., H, W) to compute at once: `most` of up to 32x32 pixels, of larger ones fewer.

    So that memory does not grow with their size. 100 by default: with 500 a pass through the zoo's ResNet, with its
    batch norm, takes up to twice as long on a processor.

    Examples
    --------
    >>> [images_at_once((3, side, side)) for side in (8, 32, 64, 900)]
    [100, 100, 25, 1]
    """
    return max(1, min(most, most * 32 * 32 // max(1, math.prod(shape[-2:]))))


@torch.no_grad()
def logits(model: nn.Module, images: Tensor | LabelledImages, batch_size: int | None = None) -> Tensor:
    """Logits of images, in evaluation mode and in batches.

    Parameters
    ----------
    model
        Any classifier from (N, C, H, W) float32 in [0, 1] to (N, K).
    images
        (N, C, H, W), uint8 or float32 in [0, 1], on any device.
    batch_size
        Images at once; by default as `images_at_once` has it.

    Returns
    -------
    Tensor
        float32 (N, K), on the CPU.
    """
    if isinstance(images, LabelledImages):
        images = images.images
    check_images(images)
    if not len(images):
        raise ValueError("images is empty")
    device = device_of(model)
    with evaluating(model):
        parts = []
        for batch in images.split(batch_size or images_at_once(images.shape)):
            x = to_float(batch.to(device)).contiguous(memory_format=torch.channels_last)
            parts.append(model(x).float().cpu())
    out = torch.cat(parts)
    if out.ndim != 2:
        raise ValueError(f"model must give logits of shape (N, K), got {tuple(out.shape)}")
    return out
