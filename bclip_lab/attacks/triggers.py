"""Triggers: what an attacker puts into an image. Each is a value; `embed` is deterministic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bclip_lab.data.images import check_images, to_float

__all__ = ["BlendedTrigger", "PatchTrigger", "SinusoidTrigger", "Trigger"]

_CORNERS = ("top left", "top right", "bottom left", "bottom right")


class Trigger(Protocol):
    """Anything that puts a trigger into images."""

    def embed(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W): same shape, dtype and range; the input stays as it is."""
        ...


def _like(triggered: Tensor, images: Tensor) -> Tensor:
    """Clip to [0, 1] and give back the dtype of `images`; uint8 is rounded, not cut."""
    triggered = triggered.clamp(0, 1)
    return (triggered * 255).round().to(torch.uint8) if images.dtype == torch.uint8 else triggered


@dataclass(frozen=True, kw_only=True)
class PatchTrigger:
    """A small square of random colours in a corner (BadNets, Gu et al., arXiv 1708.06733, section 4.1).

    x' = (1 - mask) * x + mask * pattern, with a mask of ones on the square.

    Parameters
    ----------
    size
        Side of the square in pixels: 3, the usual choice on 32x32 images.
    corner
        "top left", "top right", "bottom left" or "bottom right".
    distance
        Pixels between the square and the two edges of its corner.
    seed
        Of the pattern, whose values are 0 or 1 in every channel: saturated colours.

    Raises
    ------
    ValueError
        A size below 1, an unknown corner, or (by `embed`) an image smaller than square and distance.

    Examples
    --------
    >>> images = torch.full((1, 3, 8, 8), 0.5)
    >>> changed = (PatchTrigger(size=3).embed(images) != images).any(1)
    >>> int(changed.sum())
    9
    """

    size: int = 3
    corner: str = "bottom right"
    distance: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.size < 1 or self.distance < 0:
            raise ValueError(f"size must be >= 1 and distance >= 0, got {self.size} and {self.distance}")
        if self.corner not in _CORNERS:
            raise ValueError(f"corner must be one of {_CORNERS}, got {self.corner!r}")

    def pattern(self, channels: int = 3) -> Tensor:
        """The square: float32 (channels, size, size) of zeros and ones."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(0, 2, (channels, self.size, self.size), generator=generator).float()

    def embed(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W), uint8 or float32 in [0, 1]."""
        check_images(images)
        _, channels, height, width = images.shape
        if self.size + self.distance > min(height, width):
            raise ValueError(
                f"images of {height}x{width} pixels are too small for a patch of size {self.size} at "
                f"distance {self.distance}"
            )
        vertical, horizontal = self.corner.split()
        top = self.distance if vertical == "top" else height - self.distance - self.size
        left = self.distance if horizontal == "left" else width - self.distance - self.size
        pattern = _like(self.pattern(channels).to(images.device), images)
        triggered = images.clone()
        triggered[:, :, top : top + self.size, left : left + self.size] = pattern
        return triggered


@dataclass(frozen=True, kw_only=True)
class BlendedTrigger:
    """A whole-image pattern mixed in (blended injection, Chen et al., arXiv 1712.05526, section 4.2).

    x' = (1 - alpha) * x + alpha * pattern, with a pattern of uniform noise.

    Parameters
    ----------
    alpha
        Share of the pattern, in (0, 1]: 0.2, the paper's value, in training and at test time.
    seed
        Of the pattern.

    Examples
    --------
    >>> black = torch.zeros(1, 3, 4, 4)
    >>> bool(BlendedTrigger(alpha=0.2).embed(black).max() <= 0.2)
    True
    """

    alpha: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {self.alpha}")

    def pattern(self, channels: int, height: int, width: int) -> Tensor:
        """The pattern: float32 (channels, height, width), uniform in [0, 1]."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.rand((channels, height, width), generator=generator)

    def embed(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W), uint8 or float32 in [0, 1]."""
        check_images(images)
        _, channels, height, width = images.shape
        pattern = self.pattern(channels, height, width).to(images.device)
        return _like((1 - self.alpha) * to_float(images) + self.alpha * pattern, images)


@dataclass(frozen=True, kw_only=True)
class SinusoidTrigger:
    """A faint wave over the whole image (SIG, Barni et al., arXiv 1902.11237, section 3.1).

    x'[i, j] = clip(x[i, j] + delta * sin(2 pi j frequency / W)) for column j of W.

    Parameters
    ----------
    delta
        Amplitude in units of the image's range [0, 1]: 30/255, within the 20 to 40 of 255 of the paper.
    frequency
        Periods across the image: 6, the paper's value.

    Examples
    --------
    >>> grey = torch.full((1, 1, 2, 32), 0.5)
    >>> moved = SinusoidTrigger().embed(grey) - grey
    >>> round(float(moved.max()) * 255)
    30
    """

    delta: float = 30 / 255
    frequency: float = 6

    def __post_init__(self) -> None:
        if not 0 < self.delta <= 1 or not self.frequency > 0:
            raise ValueError(f"delta must lie in (0, 1] and frequency be > 0, got {self.delta}, {self.frequency}")

    def embed(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W), uint8 or float32 in [0, 1]."""
        check_images(images)
        width = images.shape[-1]
        column = torch.arange(width, device=images.device)
        wave = self.delta * torch.sin(2 * math.pi * self.frequency * column / width)
        return _like(to_float(images) + wave, images)
