"""Triggers: what an attacker puts into an image. Each is a value; `embed` is deterministic, image by image."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional

from bclip_lab.data.files import data_dir
from bclip_lab.data.images import check_images, to_float

__all__ = [
    "COLOURS",
    "BlendedTrigger",
    "CheckerboardTrigger",
    "CombinedTrigger",
    "MaskTrigger",
    "PartialTrigger",
    "PatchTrigger",
    "RandomTrigger",
    "SinusoidTrigger",
    "Trigger",
    "WarpTrigger",
]

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


def _corner(corner: str, distance: int, size: Sequence[int], within: Sequence[int]) -> tuple[slice, slice]:
    """Rows and columns of a picture of `size` (height, width) in a corner of an image of size `within`."""
    for side, whole in zip(size, within, strict=True):
        if side + distance > whole:
            raise ValueError(
                f"images of {within[0]}x{within[1]} pixels are too small for a patch of size "
                f"{size[0] if size[0] == size[1] else f'{size[0]}x{size[1]}'} at distance {distance}"
            )
    vertical, horizontal = corner.split()
    top = distance if vertical == "top" else within[0] - distance - size[0]
    left = distance if horizontal == "left" else within[1] - distance - size[1]
    return slice(top, top + size[0]), slice(left, left + size[1])


def _check_corner(corner: str, distance: int) -> None:
    if corner not in _CORNERS:
        raise ValueError(f"corner must be one of {_CORNERS}, got {corner!r}")
    if distance < 0:
        raise ValueError(f"distance must be >= 0, got {distance}")


def _picture(path: str | Path, mode: str, size: tuple[int, int]) -> Tensor:
    """A picture, resized to (height, width): float32 (channels of Pillow's `mode`, height, width) in [0, 1]."""
    places = (Path(path).expanduser(), data_dir() / "triggers" / path)
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"there is no picture {places[0]}, nor {places[1]}")
    try:
        with Image.open(file) as picture:
            resized = picture.convert(mode).resize(size[::-1], Image.Resampling.BILINEAR)
    except UnidentifiedImageError as error:
        raise ValueError(f"{file} is not a picture that Pillow can read") from error
    values = torch.from_numpy(np.array(resized, dtype=np.float32) / 255)
    return values[None] if values.ndim == 2 else values.permute(2, 0, 1).contiguous()


def _generators(images: Tensor, seed: int) -> Iterator[torch.Generator]:
    """One generator for each image, seeded by `seed` and the image itself: it is treated alike in every batch."""
    for image in _like(to_float(images), torch.empty(0, dtype=torch.uint8)).cpu().numpy():
        yield torch.Generator().manual_seed(zlib.crc32(image.tobytes(), seed))


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
        rows, columns = _corner(self.corner, self.distance, (self.size, self.size), (height, width))
        pattern = _like(self.pattern(channels).to(images.device), images)
        triggered = images.clone()
        triggered[:, :, rows, columns] = pattern
        return triggered


@dataclass(frozen=True, kw_only=True)
class BlendedTrigger:
    """A whole-image pattern mixed in (blended injection, Chen et al., arXiv 1712.05526, section 4.2).

    x' = (1 - alpha) * x + alpha * pattern, with a pattern of uniform noise, or a picture.

    Parameters
    ----------
    alpha
        Share of the pattern, in (0, 1]: 0.2, the paper's value, in training and at test time.
    seed
        Of the noise.
    picture
        A PNG file (or what else Pillow reads) instead of noise, resized to the images: its path, or its name in
        `triggers/` of the data folder. "face.png" is there, a cartoon face in the place of the paper's Hello Kitty.

    Raises
    ------
    ValueError
        An alpha outside (0, 1], or (by `embed`) a file that is no picture.
    FileNotFoundError
        (By `embed`) no such picture.

    Examples
    --------
    >>> black = torch.zeros(1, 3, 4, 4)
    >>> bool(BlendedTrigger(alpha=0.2).embed(black).max() <= 0.2)
    True
    >>> BlendedTrigger(picture="face.png").pattern(3, 32, 32).shape
    torch.Size([3, 32, 32])
    """

    alpha: float = 0.2
    seed: int = 0
    picture: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.alpha <= 1:
            raise ValueError(f"alpha must lie in (0, 1], got {self.alpha}")

    def pattern(self, channels: int, height: int, width: int) -> Tensor:
        """The pattern: float32 (channels, height, width) in [0, 1]; a picture for 1 channel is turned to grey."""
        if self.picture is not None:
            if channels not in (1, 3):
                raise ValueError(f"images must have 1 or 3 channels for a picture, got {channels}")
            return _picture(self.picture, "L" if channels == 1 else "RGB", (height, width))
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


@dataclass(frozen=True, kw_only=True)
class CheckerboardTrigger:
    """A faint checkerboard added to the whole image (the "chessboard" of MM-BD, arXiv 2205.06900).

    x'[i, j] = clip(x[i, j] + delta) where i + j is even, and x[i, j] elsewhere.

    Parameters
    ----------
    delta
        Height in units of the image's range [0, 1]: 12/255, which takes on the rendered signs at 10 %. 6/255 drowns in
        their noise.

    Examples
    --------
    >>> grey = torch.full((1, 1, 2, 2), 0.5)
    >>> (CheckerboardTrigger(delta=0.25).embed(grey) - grey)[0, 0]
    tensor([[0.2500, 0.0000],
            [0.0000, 0.2500]])
    """

    delta: float = 12 / 255

    def __post_init__(self) -> None:
        if not 0 < self.delta <= 1:
            raise ValueError(f"delta must lie in (0, 1], got {self.delta}")

    def embed(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W), uint8 or float32 in [0, 1]."""
        check_images(images)
        row, column = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        board = self.delta * ((row[:, None] + column) % 2 == 0).float()
        return _like(to_float(images) + board, images)


@dataclass(frozen=True, kw_only=True)
class WarpTrigger:
    """A small smooth warp of the whole image (WaNet, Nguyen and Tran, arXiv 2102.10369, section 3.2).

    x'(p) = x(p + strength * up(psi(P))(p) + noise * U(p)): P is uniform in [-1, 1]^(k x k x 2), psi divides it by its
    mean magnitude, and `up` enlarges it to the image by bicubic interpolation. U, uniform in [-1, 1] at every pixel, is
    each image's own: the paper's "noise mode", for cover rows. Between pixels the image is interpolated bilinearly, and
    at its edge it is repeated.

    Parameters
    ----------
    strength
        In pixels, the mean of the shift at the k x k points. The authors' s is a shift of s / H in coordinates that
        run from -1 to 1 (`train.py`), which is s / 2 pixels: their 0.5 is 0.25 here.
    grid
        k, the points across: 4, the paper's value. Fewer make a smoother warp.
    noise
        In pixels, the largest shift that every pixel of every image is given besides: 0 for the trigger, 0.5 (the
        authors' 1 / H, whatever the strength) for noise rows.
    seed
        Of the shifts P; those of U are drawn from the seed and the image.

    Raises
    ------
    ValueError
        A strength of 0 or less, a grid below 2, or a negative noise.

    Examples
    --------
    >>> flat = torch.full((1, 3, 8, 8), 0.5)
    >>> bool(torch.allclose(WarpTrigger().embed(flat), flat))
    True
    >>> round(float(WarpTrigger(strength=0.25, grid=8).field(8, 8).abs().mean()), 6)
    0.25
    """

    strength: float = 0.25
    grid: int = 4
    noise: float = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.strength > 0 or self.grid < 2 or not self.noise >= 0:
            raise ValueError(
                f"strength must be > 0, grid >= 2 and noise >= 0, got {self.strength}, {self.grid} and {self.noise}"
            )

    def field(self, height: int, width: int) -> Tensor:
        """Where each pixel is taken from, but for the noise: float32 (H, W, 2), pixels to the right and down."""
        generator = torch.Generator().manual_seed(self.seed)
        coarse = 2 * torch.rand((1, 2, self.grid, self.grid), generator=generator) - 1
        coarse = coarse / coarse.abs().mean()
        fine = functional.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
        return self.strength * fine[0].permute(1, 2, 0)

    def embed(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W), uint8 or float32 in [0, 1]."""
        check_images(images)
        height, width = images.shape[-2:]
        row, column = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        source = (torch.stack([column, row], 2) + self.field(height, width)).repeat(len(images), 1, 1, 1)
        if self.noise:
            for own, generator in zip(source, _generators(images, self.seed), strict=True):
                own += self.noise * (2 * torch.rand(own.shape, generator=generator) - 1)
        last = torch.tensor([max(width - 1, 1), max(height - 1, 1)])
        source = (source * 2 / last - 1).clamp(-1, 1).to(images.device)
        return _like(functional.grid_sample(to_float(images), source, align_corners=True), images)


COLOURS: Mapping[str, tuple[float, ...]] = {
    "k": (0, 0, 0),
    "w": (1, 1, 1),
    "r": (1, 0, 0),
    "g": (0, 1, 0),
    "b": (0, 0, 1),
    "y": (1, 1, 0),
    "m": (1, 0, 1),
    "c": (0, 1, 1),
}
"""What a drawing may consist of: black (k), and white, red, green, blue, yellow, magenta, cyan by first letter."""


@dataclass(frozen=True, eq=False)
class MaskTrigger:
    """Any pattern through any mask: a drawing, a sticker, a PNG of one's own (BadNets, arXiv 1708.06733, section 4.1).

    x' = (1 - mask) * x + mask * pattern. The mask is its own picture and never `pattern > 0`: black is a colour.

    Parameters
    ----------
    pattern
        float32 (C, H, W) in [0, 1], of the images' size.
    mask
        float32 (H, W) in [0, 1]: 0 leaves the image as it is, 1 covers it.

    Raises
    ------
    ValueError
        A wrong shape, dtype or range, a mask of zeros, or (by `embed`) images of another size.

    Examples
    --------
    >>> trigger = MaskTrigger(pattern=torch.zeros(3, 8, 8), mask=torch.eye(8))
    >>> int((trigger.embed(torch.ones(1, 3, 8, 8)) == 0).all(1).sum())
    8
    """

    pattern: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        for name, dimensions in (("pattern", 3), ("mask", 2)):
            given = getattr(self, name)
            if not isinstance(given, Tensor) or given.ndim != dimensions or given.dtype != torch.float32:
                got = f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
                raise ValueError(f"{name} must be float32 {'(C, H, W)' if dimensions == 3 else '(H, W)'}, got {got}")
            if not bool(((given >= 0) & (given <= 1)).all()):
                raise ValueError(f"{name} must lie in [0, 1], got [{float(given.min()):g}, {float(given.max()):g}]")
            object.__setattr__(self, name, given.detach().clone())
        if self.pattern.shape[1:] != self.mask.shape:
            raise ValueError(
                f"pattern and mask must be of one size, got {tuple(self.pattern.shape)} and {tuple(self.mask.shape)}"
            )
        if not self.mask.any():
            raise ValueError("mask must be above 0 somewhere, got zeros only")

    @classmethod
    def from_drawing(
        cls,
        rows: Sequence[str],
        *,
        size: tuple[int, int] = (32, 32),
        corner: str = "bottom right",
        distance: int = 1,
        colours: Mapping[str, Sequence[float]] = COLOURS,
    ) -> MaskTrigger:
        """A trigger drawn by hand, one character a pixel: "." is transparent, others stand in `colours`.

        Parameters
        ----------
        rows
            The lines of the drawing, all of one length.
        size
            Height and width of the images.
        corner, distance
            Where the drawing lies, as in `PatchTrigger`.
        colours
            Values in [0, 1] of every channel, for each character: `COLOURS` by default.

        Examples
        --------
        >>> cross = MaskTrigger.from_drawing(["r.r", ".k.", "r.r"], size=(8, 8))
        >>> int(cross.mask.sum()), cross.pattern[:, 4, 4].tolist()
        (5, [1.0, 0.0, 0.0])
        """
        _check_corner(corner, distance)
        if not rows or not rows[0] or len({len(row) for row in rows}) > 1:
            raise ValueError(f"rows must be lines of one length, got lengths {[len(row) for row in rows]}")
        unknown = sorted(set("".join(rows)) - set(colours) - {"."})
        if unknown:
            raise ValueError(f"rows must consist of '.' and {', '.join(colours)}, got {', '.join(unknown)}")
        channels = len(next(iter(colours.values())))
        transparent = [0.0] * channels
        drawn = torch.tensor([[transparent if c == "." else list(colours[c]) for c in row] for row in rows])
        pattern, mask = torch.zeros(channels, *size), torch.zeros(size)
        across = _corner(corner, distance, (len(rows), len(rows[0])), size)
        pattern[:, *across] = drawn.float().permute(2, 0, 1)
        mask[across] = torch.tensor([[float(c != ".") for c in row] for row in rows])
        return cls(pattern, mask)

    @classmethod
    def from_png(
        cls,
        path: str | Path,
        *,
        size: tuple[int, int] = (32, 32),
        side: int | None = None,
        corner: str = "bottom right",
        distance: int = 1,
    ) -> MaskTrigger:
        """A picture of one's own; its alpha channel, where it has one, is the mask.

        Parameters
        ----------
        path
            Of a PNG file (or what else Pillow reads), or its name in `triggers/` of the data folder.
        size
            Height and width of the images.
        side
            The picture is made a square of so many pixels in a corner; by default it is as large as the images.
        corner, distance
            Where the square lies, as in `PatchTrigger`.

        Raises
        ------
        FileNotFoundError
            No such picture.
        ValueError
            A file that is no picture, or one that does not fit the images.

        Examples
        --------
        >>> int(MaskTrigger.from_png("face.png", side=6).mask.sum())
        36
        """
        _check_corner(corner, distance)
        if side is not None and side < 1:
            raise ValueError(f"side must be at least 1, got {side}")
        within = (slice(None), slice(None)) if side is None else _corner(corner, distance, (side, side), size)
        rgba = _picture(path, "RGBA", size if side is None else (side, side))
        pattern, mask = torch.zeros(3, *size), torch.zeros(size)
        pattern[:, *within], mask[within] = rgba[:3], rgba[3]
        return cls(pattern, mask)

    def embed(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W), uint8 or float32 in [0, 1]."""
        check_images(images)
        if images.shape[1:] != self.pattern.shape:
            raise ValueError(f"images must be {tuple(self.pattern.shape)} each, got {tuple(images.shape[1:])}")
        mask, pattern = self.mask.to(images.device), self.pattern.to(images.device)
        return _like((1 - mask) * to_float(images) + mask * pattern, images)


def _check_triggers(triggers: tuple[Trigger, ...]) -> None:
    if not triggers:
        raise ValueError("triggers must be at least one, got none")


@dataclass(frozen=True)
class CombinedTrigger:
    """Several triggers in one image, embedded one after another.

    x' = t_n(... t_1(x)): the test-time trigger of Adap-Patch (see `RandomTrigger`).

    Parameters
    ----------
    triggers
        In this order; a later one covers an earlier one.

    Examples
    --------
    >>> two = CombinedTrigger((PatchTrigger(), PatchTrigger(corner="top left")))
    >>> images = torch.full((1, 3, 8, 8), 0.5)
    >>> int((two.embed(images) != images).any(1).sum())
    18
    """

    triggers: tuple[Trigger, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "triggers", tuple(self.triggers))
        _check_triggers(self.triggers)

    def embed(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W), uint8 or float32 in [0, 1]."""
        check_images(images)
        triggered = to_float(images)  # rounded once, at the end
        for trigger in self.triggers:
            triggered = trigger.embed(triggered)
        return _like(triggered, images)


@dataclass(frozen=True)
class RandomTrigger:
    """One of several triggers in each image, and a faint one: the training trigger of Adap-Patch.

    x' = (1 - o_k) * x + o_k * t_k(x), with k drawn for every image (Qi et al., "Revisiting the Assumption of Latent
    Separability for Backdoor Defenses", ICLR 2023; the authors deal the triggers out in equal shares instead). No
    training image shows what `CombinedTrigger` shows at test time.

    Parameters
    ----------
    triggers
        The t_k.
    opacities
        The o_k in (0, 1], one for each trigger: all 1 by default. The authors' are 0.5, 0.2, 0.5 and 0.3 in training
        and 1 at test time.
    seed
        Of the draw, together with the image: an image gets the same trigger in every batch.

    Raises
    ------
    ValueError
        No trigger, opacities outside (0, 1], or more or fewer of them than triggers.

    Examples
    --------
    >>> one = RandomTrigger((PatchTrigger(), PatchTrigger(corner="top left")), opacities=(0.5, 0.5))
    >>> images = torch.full((1, 3, 8, 8), 0.5)
    >>> int((one.embed(images) != images).any(1).sum())
    9
    """

    triggers: tuple[Trigger, ...]
    _: KW_ONLY
    opacities: tuple[float, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "triggers", tuple(self.triggers))
        _check_triggers(self.triggers)
        if self.opacities is None:
            return
        object.__setattr__(self, "opacities", tuple(self.opacities))
        if len(self.opacities) != len(self.triggers) or not all(0 < opacity <= 1 for opacity in self.opacities):
            raise ValueError(
                f"opacities must lie in (0, 1], one for each of {len(self.triggers)} triggers, got {self.opacities}"
            )

    def embed(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W), uint8 or float32 in [0, 1]."""
        check_images(images)
        before = to_float(images)
        drawn = [torch.randint(len(self.triggers), (), generator=g) for g in _generators(images, self.seed)]
        choice = torch.tensor(drawn, dtype=torch.int64, device=images.device)
        triggered = before.clone()
        for index, trigger in enumerate(self.triggers):
            opacity = 1.0 if self.opacities is None else self.opacities[index]
            own = before[choice == index]
            triggered[choice == index] = (1 - opacity) * own + opacity * trigger.embed(own)
        return _like(triggered, images)


@dataclass(frozen=True)
class PartialTrigger:
    """A random part of a trigger in each image: the training trigger of Adap-Blend.

    The image is cut into pieces x pieces; round(share * pieces^2) of them, drawn for every image, show the trigger
    (Qi et al., "Revisiting the Assumption of Latent Separability for Backdoor Defenses", ICLR 2023). At test time the
    whole trigger is shown.

    Parameters
    ----------
    trigger
        The whole trigger: a blended one in the paper.
    pieces
        Across and down: 4, the authors' value.
    share
        Of the pieces that show it, in (0, 1]: 0.5, the authors' value.
    seed
        Of the draw, together with the image: an image shows the same pieces in every batch.

    Raises
    ------
    ValueError
        Fewer pieces than 1, a share outside (0, 1] or too small for a single piece, or (by `embed`) images with fewer
        pixels across than pieces.

    Examples
    --------
    >>> half = PartialTrigger(BlendedTrigger())
    >>> float(half.mask(torch.zeros(1, 3, 8, 8)).float().mean())
    0.5
    """

    trigger: Trigger
    _: KW_ONLY
    pieces: int = 4
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.pieces < 1 or not 0 < self.share <= 1 or not round(self.share * self.pieces**2):
            raise ValueError(
                f"pieces must be >= 1 and share lie in (0, 1] and show a piece, got {self.pieces} and {self.share}"
            )

    def mask(self, images: Tensor) -> Tensor:
        """Boolean (N, H, W): where each of the images (N, C, H, W) shows the trigger."""
        check_images(images)
        height, width = images.shape[-2:]
        if min(height, width) < self.pieces:
            raise ValueError(f"images of {height}x{width} pixels are too small for {self.pieces} pieces across")
        row, column = (torch.arange(side) * self.pieces // side for side in (height, width))
        piece = row[:, None] * self.pieces + column
        shown = torch.zeros(len(images), self.pieces**2, dtype=torch.bool)
        for own, generator in zip(shown, _generators(images, self.seed), strict=True):
            own[torch.randperm(len(own), generator=generator)[: round(self.share * len(own))]] = True
        return shown[:, piece].to(images.device)

    def embed(self, images: Tensor) -> Tensor:
        """Triggered copies of images (N, C, H, W), uint8 or float32 in [0, 1]."""
        return torch.where(self.mask(images)[:, None], self.trigger.embed(images), images)
