"""Designing a trigger by hand: the state behind `TriggerDesigner`, without a widget and without a kernel."""

from __future__ import annotations

import io
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor, nn

from bclip_lab.attacks import (
    AllToOne,
    BackdoorAttack,
    BlendedTrigger,
    LabelMap,
    MaskTrigger,
    OneToOne,
    PatchTrigger,
    Trigger,
)
from bclip_lab.data.images import LabelledImages, PoisonedImages, Splits
from bclip_lab.evaluation import Evaluation, Visibility, evaluate
from bclip_lab.models import resnet10
from bclip_lab.training import TrainConfig, train
from bclip_lab.widgets.undo import Undoable

__all__ = ["PRESETS", "DesignStep", "TriggerDesign"]

PRESETS: Mapping[str, Callable[[int, int], Trigger]] = {
    "patch": lambda height, width: PatchTrigger(),
    "cross": lambda height, width: MaskTrigger.from_drawing(
        ["y...y", ".yky.", ".kyk.", ".yky.", "y...y"], size=(height, width), corner="top left"
    ),
    "face, blended": lambda height, width: BlendedTrigger(picture="face.png"),
    "noise, blended": lambda height, width: BlendedTrigger(),
}
"""Triggers of the package to start from, by name, for images of a height and a width."""

_JUDGED = 100  # images that `norms` is a mean over
_RECORDS = 16  # an epoch: 0.2 s each for 4,000 images on two cores, so that the page does not wait
_GREY = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601), as Pillow turns a picture grey

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DesignStep:
    """Progress of a training on a design.

    `epoch` is a fraction within an epoch; `loss` as in `bclip_lab.training.TrainStep`. `evaluation`, at the end of an
    epoch and None within it, is what the model does on `TriggerDesign.test_images`. `attack` is the one it is trained
    on, whatever has been painted since.
    """

    epoch: float
    epochs: int
    loss: float
    evaluation: Evaluation | None
    model: nn.Module = field(repr=False)
    attack: BackdoorAttack = field(repr=False)


class TriggerDesign(Undoable[Pixels]):
    """A trigger painted pixel by pixel, who it turns into whom, and a training on it.

    The drawing is RGBA. A pixel of opacity a and colour p makes x' = (1 - a) x + a p of the image's pixel x
    (`bclip_lab.attacks.MaskTrigger`). It starts with the preset "patch".

    Parameters
    ----------
    splits
        `train` is poisoned and trained on, `test` judges.
    make_model
        Makes a fresh network for each training: `resnet10` of width 16 with seeded weights by default.
    config
        Of the training: `TrainConfig(epochs=6)` by default, as in notebook 01.
    train_images, test_images
        At most so many training and test images are used, random ones: 4,000 and 500 by default, so that a training
        takes less than a minute on two cores.
    seed
        Of the choice of the images and of the poisoned rows, and of the default network and config.

    Attributes
    ----------
    source
        The class that is turned; None for every class but the target.
    target
        The class that it becomes.
    poison_rate
        Poisoned images as a share of the training images that are used, in (0, 1].
    train_images, test_images
        The images that are trained on (before they are poisoned), and those that judge.

    Raises
    ------
    ValueError
        Images of neither 1 nor 3 channels or with a side below 6 pixels, or fewer than one test or two training
        images asked for.

    Examples
    --------
    >>> from bclip_lab.data import signs
    >>> design = TriggerDesign(signs(train=20, test=20, per_class=1, cache=False))
    >>> design.clear()
    >>> pixels = design.pixels
    >>> pixels[30, 30] = (255, 255, 0, 255)
    >>> design.paint(pixels)
    >>> design.painted, design.undo(), design.painted
    (1, True, 0)
    """

    def __init__(
        self,
        splits: Splits,
        *,
        make_model: Callable[[], nn.Module] | None = None,
        config: TrainConfig | None = None,
        train_images: int = 4000,
        test_images: int = 500,
        seed: int = 0,
    ) -> None:
        channels, height, width = splits.train.images.shape[1:]
        if channels not in (1, 3) or min(height, width) < 6:
            raise ValueError(
                f"splits must hold images of 1 or 3 channels and at least 6x6 pixels, got {channels} channels of "
                f"{height}x{width}"
            )
        if train_images < 2 or test_images < 1:
            raise ValueError(
                f"train_images must be at least 2 and test_images at least 1, got {train_images} and {test_images}"
            )
        self.channels, self.height, self.width = int(channels), int(height), int(width)
        self.classes = splits.classes
        self.available = len(splits.train), len(splits.test)
        generator = torch.Generator().manual_seed(seed)
        self.train_images = _sample(splits.train, train_images, generator)
        self.test_images = _sample(splits.test, test_images, generator)
        self.config = config or TrainConfig(epochs=6, seed=seed)
        self.seed = seed
        self.source: int | None = None
        self.target = 0
        self.poison_rate = 0.1
        self._make_model = make_model or (lambda: resnet10(len(self.classes), seed=seed, channels=self.channels))
        super().__init__(self._preset("patch"))

    # --- what there is ---

    @property
    def pixels(self) -> Pixels:
        """The drawing: a copy, uint8 (H, W, 4), RGBA. Where its opacity is 0 a pixel is 0 throughout."""
        return self._state.copy()

    @property
    def painted(self) -> int:
        """How many pixels are painted, in full or in part."""
        return int((self._state[..., 3] > 0).sum())

    @property
    def trigger(self) -> MaskTrigger:
        """The drawing as a trigger; for images of one channel its colours are turned to grey.

        Raises `ValueError` where nothing is painted.
        """
        if not self.painted:
            raise ValueError("nothing is painted: paint a trigger, or take a preset")
        rgba = torch.from_numpy(self._state.astype(np.float32) / 255).permute(2, 0, 1)
        colours = rgba[:3]
        if self.channels == 1:
            colours = (colours * torch.tensor(_GREY)[:, None, None]).sum(0, keepdim=True).clamp(max=1)
        return MaskTrigger(colours, rgba[3])

    @property
    def label_map(self) -> LabelMap:
        """Who becomes whom. Raises `ValueError` where source and target are one class."""
        return AllToOne(self.target) if self.source is None else OneToOne(self.source, self.target)

    @property
    def attack(self) -> BackdoorAttack:
        """The attack as it is designed now. Raises `ValueError` as `trigger`, `label_map` and the attack itself."""
        return BackdoorAttack(self.trigger, self.label_map, poison_rate=self.poison_rate, seed=self.seed)

    def embed(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) with the drawing; where nothing is painted they are copies."""
        return self.trigger.embed(images) if self.painted else images.clone()

    def norms(self) -> Visibility:
        """How much the drawing changes images, as a mean over at most 100 of `test_images`."""
        clean = self.test_images.images[:_JUDGED]
        return Visibility.from_images(clean, self.embed(clean))

    def to_png(self) -> bytes:
        """The drawing as a PNG file, which `load_png` and `MaskTrigger.from_png` read."""
        out = io.BytesIO()
        Image.fromarray(self._state).save(out, "png")
        return out.getvalue()

    # --- changes ---

    def paint(self, pixels: Any, *, stroke: object = None) -> None:
        """Make the drawing these pixels.

        Parameters
        ----------
        pixels
            uint8 (H, W, 4), RGBA.
        stroke
            Whatever names a movement of the hand: pixels painted one after another in the same one are one step for
            `undo`. None for a step of its own.

        Raises
        ------
        ValueError
            A wrong shape or dtype.
        """
        pixels = np.asarray(pixels)
        if pixels.shape != self._state.shape or pixels.dtype != np.uint8:
            raise ValueError(f"pixels must be uint8 {self._state.shape}, got {pixels.dtype} {pixels.shape}")
        pixels = np.where(pixels[..., 3:] > 0, pixels, 0).astype(np.uint8)
        if np.array_equal(pixels, self._state):
            return
        self._become(pixels, stroke)

    def clear(self) -> None:
        """Take everything off."""
        self.paint(np.zeros_like(self._state))

    def load_preset(self, name: str) -> None:
        """Make the drawing one of `PRESETS`, with its values rounded to 255ths.

        Raises
        ------
        ValueError
            An unknown name, or images that are too small for it.
        FileNotFoundError
            The picture of the preset is not in the data folder.
        """
        self.paint(self._preset(name))

    def load_png(self, png: bytes | str | Path) -> None:
        """Make the drawing a PNG (or what else Pillow reads), resized to the images; its alpha is the opacity.

        Parameters
        ----------
        png
            The bytes of the file, or its path.

        Raises
        ------
        ValueError
            Bytes or a file that are no picture.
        FileNotFoundError
            No such file.
        """
        try:
            with Image.open(io.BytesIO(png) if isinstance(png, bytes) else png) as picture:
                size = (self.width, self.height)
                pixels = np.array(picture.convert("RGBA").resize(size, Image.Resampling.BILINEAR))
        except FileNotFoundError:
            raise
        except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
            name = "this file" if isinstance(png, bytes) else str(png)
            raise ValueError(f"{name} is not a picture that Pillow can read") from error
        self.paint(pixels)

    # --- training ---

    def train(self) -> Generator[DesignStep]:
        """Train a fresh network on the attack as it is now: a generator of records, several an epoch.

        Broken off, it leaves the model of the latest record as it was then, and usable.

        Raises
        ------
        ValueError
            At once: as `attack`, more poisoned images asked for than there are, or no test image that it turns.
        """
        attack = self.attack
        poisoned = attack.poison(self.train_images)
        attack.triggered(self.test_images)
        return self._records(attack, poisoned)

    def evaluate(self, step: DesignStep) -> Evaluation:
        """What the model of a record does on `test_images`, clean and with the trigger it was trained on."""
        return evaluate(step.model, self.test_images, step.attack)

    # --- inside ---

    def _records(self, attack: BackdoorAttack, poisoned: PoisonedImages) -> Generator[DesignStep]:
        for step in train(self._make_model(), poisoned, self.config, records_per_epoch=_RECORDS):
            whole = step.epoch == int(step.epoch)
            found = evaluate(step.model, self.test_images, attack) if whole else None
            yield DesignStep(step.epoch, step.epochs, step.loss, found, step.model, attack)

    def _preset(self, name: str) -> Pixels:
        if name not in PRESETS:
            raise ValueError(f"there is no preset {name!r}; the presets are {', '.join(PRESETS)}")
        black_and_white = torch.stack([torch.zeros(3, self.height, self.width), torch.ones(3, self.height, self.width)])
        black, white = PRESETS[name](self.height, self.width).embed(black_and_white)
        opacity = 1 - (white - black).mean(0)  # of x' = (1 - a) x + a p: a p on black, 1 - a more on white
        colours = torch.where(opacity > 0, black / opacity.clamp(min=1e-6), 0)
        rgba = torch.cat([colours, opacity[None]]).clamp(0, 1)
        return (rgba * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def _sample(data: LabelledImages, count: int, generator: torch.Generator) -> LabelledImages:
    return data.subset(torch.randperm(len(data), generator=generator)[:count])
