"""Common corruptions of images, in five severities each (Hendrycks and Dietterich 2019, arXiv 1903.12261).

Fourteen of the fifteen of the paper's section 3, with the severities that its authors use for CIFAR-10-C, images of
32x32 pixels (`make_cifar_c.py` of their repository hendrycks/robustness); lengths are in pixels and meant for that
size. **Frost** is left out: it lays photographs of frost over the images, which the lab does not ship. Two things are
written otherwise than there: fog is made of octaves of smooth noise instead of the diamond-square algorithm, and
results are not rounded to 256 levels.

Every image of a call meets the same noise, shifts and angles, which the seed gives: what becomes of it does not
depend on the images beside it. Nothing is changed in place, and no severity builds on the one before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from bclip_lab.data.images import check_images, to_float

__all__ = ["CORRUPTIONS", "SEVERITIES", "corrupt"]

SEVERITIES = (1, 2, 3, 4, 5)


# --- helpers ------------------------------------------------------------------------------------------------


def _uniform(low: float, high: float, generator: Generator, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _normal_like(images: Tensor, generator: Generator) -> Tensor:
    """Standard normal noise of one image's shape."""
    return torch.randn(images.shape[1:], generator=generator).to(images.device)


def _convolve(images: Tensor, kernel: Tensor) -> Tensor:
    """Every channel with one kernel (odd height, odd width) of sum 1; beyond the edge its pixels are repeated."""
    channels, (height, width) = images.shape[1], kernel.shape
    padded = F.pad(images, (width // 2, width // 2, height // 2, height // 2), mode="replicate")
    return F.conv2d(padded, kernel.to(images).expand(channels, 1, height, width), groups=channels)


def _gaussian(sigma: float, radius: int) -> Tensor:
    """Kernel (2 radius + 1, 2 radius + 1) of sum 1."""
    line = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    return torch.outer(line, line) / line.sum() ** 2


def _blur(images: Tensor, sigma: float) -> Tensor:
    return _convolve(images, _gaussian(sigma, math.ceil(4 * sigma)))


def _along(images: Tensor, radius: int, sigma: float, angle: float) -> Tensor:
    """Motion along a direction in degrees: half a Gaussian over up to 2 radius + 1 pixels, as ImageMagick has it."""
    steps = torch.arange(2 * radius + 1)
    weights = torch.exp(-0.5 * (steps / sigma) ** 2)
    kernel = torch.zeros(4 * radius + 1, 4 * radius + 1)
    rows = (steps * math.sin(math.radians(angle))).round().long() + 2 * radius
    columns = (steps * math.cos(math.radians(angle))).round().long() + 2 * radius
    kernel.index_put_((rows, columns), weights / weights.sum(), accumulate=True)
    return _convolve(images, kernel)


def _sample(images: Tensor, affine: Tensor, displacement: Tensor | None = None) -> Tensor:
    """Bilinear, at (2, 3) @ (x, y, 1) + displacement (H, W, 2), in half image sizes; beyond the edge reflected."""
    grid = F.affine_grid(affine[None], [1, *images.shape[1:]], align_corners=False)
    if displacement is not None:
        grid = grid + displacement
    grid = grid.to(images).expand(len(images), -1, -1, -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _zoomed(images: Tensor, zoom: float) -> Tensor:
    """The middle of the images, enlarged."""
    return _sample(images, torch.tensor([[1 / zoom, 0, 0], [0, 1 / zoom, 0]]))


def _clouds(height: int, width: int, decay: float, generator: Generator) -> Tensor:
    """Noise (1, 1, H, W) in [0, 1] whose octaves lose `decay` of their height from one to the next."""
    clouds, octave, size = torch.zeros(1, 1, height, width), 0, 2
    while size <= 2 * max(height, width):
        noise = _uniform(-1, 1, generator, 1, 1, size, size)
        smooth = F.interpolate(noise, (height, width), mode="bilinear", align_corners=True)
        clouds, octave, size = clouds + smooth / decay**octave, octave + 1, size * 2
    return (clouds - clouds.min()) / (clouds.max() - clouds.min()).clamp(min=1e-12)


# --- noise --------------------------------------------------------------------------------------------------


def _gaussian_noise(images: Tensor, scale: float, generator: Generator) -> Tensor:
    return images + scale * _normal_like(images, generator)


def _shot_noise(images: Tensor, photons: float, generator: Generator) -> Tensor:
    # Poisson draws take a varying count of random numbers, so each image starts from the same state
    counts = [torch.poisson(image * photons, generator.clone_state()) for image in images.cpu()]
    return torch.stack(counts).to(images.device) / photons


def _impulse_noise(images: Tensor, share: float, generator: Generator) -> Tensor:
    draw = torch.rand(images.shape[1:], generator=generator).to(images.device)
    return torch.where(draw < share / 2, 0.0, torch.where(draw < share, 1.0, images))


# --- blur ---------------------------------------------------------------------------------------------------


def _defocus_blur(images: Tensor, radius_and_alias: tuple[float, float], generator: Generator) -> Tensor:
    radius, alias = radius_and_alias
    steps = torch.arange(-3, 4)
    disc = (steps[:, None] ** 2 + steps**2 <= radius**2).float()
    kernel = F.conv2d((disc / disc.sum())[None, None], _gaussian(alias, 1)[None, None], padding=1)[0, 0]
    return _convolve(images, kernel)


def _glass_blur(images: Tensor, sigma_and_rounds: tuple[float, int], generator: Generator) -> Tensor:
    sigma, rounds = sigma_and_rounds
    height, width = images.shape[2:]
    shuffled = _blur(images, sigma)
    for _ in range(rounds):  # each pixel is that of a neighbour, at most one above and one to the left
        up, left = torch.randint(0, 2, (2, height, width), generator=generator)
        rows = (torch.arange(height)[:, None] - up).clamp(min=0)
        columns = (torch.arange(width) - left).clamp(min=0)
        shuffled = shuffled[:, :, rows.to(images.device), columns.to(images.device)]
    return _blur(shuffled, sigma)


def _motion_blur(images: Tensor, radius_and_sigma: tuple[int, float], generator: Generator) -> Tensor:
    return _along(images, *radius_and_sigma, angle=_uniform(-45, 45, generator).item())


def _zoom_blur(images: Tensor, largest: float, generator: Generator) -> Tensor:
    zooms = [1 + step / 100 for step in range(round((largest - 1) * 100) + 1)]
    total = images
    for zoom in zooms:
        total = total + _zoomed(images, zoom)
    return total / (len(zooms) + 1)


# --- weather ------------------------------------------------------------------------------------------------


def _snow(images: Tensor, settings: tuple[float, ...], generator: Generator) -> Tensor:
    mean, deviation, zoom, least, radius, sigma, kept = settings
    height, width = images.shape[2:]
    flakes = _zoomed(mean + deviation * torch.randn((1, 1, height, width), generator=generator), zoom)
    flakes = torch.where(flakes < least, 0.0, flakes).clamp(0, 1)
    flakes = _along(flakes, int(radius), sigma, angle=_uniform(-135, -45, generator).item()).to(images.device)
    grey = images.mean(1, keepdim=True)
    paler = kept * images + (1 - kept) * torch.maximum(images, 1.5 * grey + 0.5)
    return paler + flakes + flakes.rot90(2, (2, 3))


def _fog(images: Tensor, amount_and_decay: tuple[float, float], generator: Generator) -> Tensor:
    amount, decay = amount_and_decay
    height, width = images.shape[2:]
    brightest = images.amax((1, 2, 3), keepdim=True)
    fogged = images + amount * _clouds(height, width, decay, generator).to(images.device)
    return fogged * brightest / (brightest + amount)


def _brightness(images: Tensor, more: float, generator: Generator) -> Tensor:
    value = images.amax(1, keepdim=True)  # of HSV: hue and saturation stay where all channels grow by one factor
    brighter = (value + more).clamp(max=1)
    return torch.where(value > 0, images * (brighter / value.clamp(min=1e-6)), brighter)


# --- digital ------------------------------------------------------------------------------------------------


def _contrast(images: Tensor, factor: float, generator: Generator) -> Tensor:
    mean = images.mean((2, 3), keepdim=True)
    return (images - mean) * factor + mean


def _elastic(images: Tensor, settings: tuple[float, float, float], generator: Generator) -> Tensor:
    shift, smoothness, corner = settings
    height, width = images.shape[2:]
    # where three points around the middle go: an affine map, here from the result back to the image
    third = 2 / 3
    points = torch.tensor([[third, third, 1], [third, -third, 1], [-third, -third, 1]])
    size = torch.tensor([width, height])
    moved = points[:, :2] + 2 * _uniform(-corner, corner, generator, 3, 2) / size
    affine = torch.linalg.solve(points, moved).T
    field = _uniform(-1, 1, generator, 2, 1, height, width)
    if smoothness > 0:
        field = _convolve(field, _gaussian(smoothness, max(1, round(3 * smoothness))))
    displacement = 2 * shift * field[:, 0].permute(1, 2, 0) / size
    return _sample(images, affine, displacement)


def _pixelate(images: Tensor, share: float, generator: Generator) -> Tensor:
    size = images.shape[2:]
    return F.interpolate(F.interpolate(images, [max(1, int(side * share)) for side in size], mode="area"), size)


def _jpeg(images: Tensor, quality: int, generator: Generator) -> Tensor:
    pixels = (images.cpu() * 255).round().byte().permute(0, 2, 3, 1).numpy()
    stored = []
    for image in pixels:
        file = BytesIO()
        Image.fromarray(image.squeeze(2) if image.shape[2] == 1 else image).save(file, "JPEG", quality=quality)
        stored.append(np.array(Image.open(file)).reshape(image.shape))
    return to_float(torch.from_numpy(np.stack(stored)).permute(0, 3, 1, 2).contiguous()).to(images.device)


# --- all ----------------------------------------------------------------------------------------------------

_TABLE: dict[str, tuple[Callable[[Tensor, Any, Generator], Tensor], tuple[Any, ...]]] = {
    # standard deviation
    "gaussian noise": (_gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    # photons of a white pixel
    "shot noise": (_shot_noise, (500, 250, 100, 75, 50)),
    # share of values that become 0 or 1
    "impulse noise": (_impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    # radius of the disc; standard deviation of the Gaussian that smooths it
    "defocus blur": (_defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    # standard deviation; rounds of taking a neighbour's pixel
    "glass blur": (_glass_blur, ((0.05, 1), (0.25, 1), (0.4, 1), (0.25, 2), (0.4, 2))),
    # radius; standard deviation
    "motion blur": (_motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    # largest zoom, in steps of 0.01
    "zoom blur": (_zoom_blur, (1.05, 1.10, 1.15, 1.20, 1.25)),
    # flakes: mean, standard deviation, zoom, threshold, radius and standard deviation of their motion; image kept
    "snow": (
        _snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    # amount; decay from one octave to the next
    "fog": (_fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    # added to the value of HSV
    "brightness": (_brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    # factor of the distance from the mean
    "contrast": (_contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    # pixels: largest shift before it is smoothed, standard deviation of that, shift of three points
    "elastic transform": (
        _elastic,
        ((0, 0, 2.56), (1.6, 6.4, 2.24), (2.56, 1.92, 1.92), (3.2, 1.28, 1.6), (3.2, 0.96, 0.96)),
    ),
    # share of the side's pixels that is left
    "pixelate": (_pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    # quality
    "jpeg compression": (_jpeg, (80, 65, 58, 50, 40)),
}

CORRUPTIONS = tuple(_TABLE)


def corrupt(images: Tensor, corruption: str, severity: int, *, seed: int = 0) -> Tensor:
    """Corrupted copies of images.

    Parameters
    ----------
    images
        (N, C, H, W), uint8 or float32 in [0, 1]; one or three channels.
    corruption
        One of `CORRUPTIONS`.
    severity
        1 to 5, as of CIFAR-10-C.
    seed
        Of noise, shifts and angles. Each corruption and severity has its own, the same for every image.

    Returns
    -------
    Tensor
        float32 (N, C, H, W) in [0, 1], on the images' device.

    Raises
    ------
    ValueError
        An unknown corruption or severity, images with other than one or three channels, or images that are not
        images of this lab.

    Examples
    --------
    >>> images = torch.full((2, 3, 32, 32), 0.5)
    >>> corrupt(images, "brightness", 2)[0, 0, 0, :2]
    tensor([0.6000, 0.6000])
    """
    check_images(images)
    if corruption not in _TABLE:
        raise ValueError(f"corruption must be one of {', '.join(CORRUPTIONS)}, got {corruption!r}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity must be one of {SEVERITIES}, got {severity}")
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have one or three channels, got {images.shape[1]}")
    function, values = _TABLE[corruption]
    generator = Generator().manual_seed(1000 * seed + 10 * CORRUPTIONS.index(corruption) + severity)
    return function(to_float(images).contiguous(), values[severity - 1], generator).clamp(0, 1)
