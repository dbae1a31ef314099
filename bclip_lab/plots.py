"""Displays: they hold numbers, `from_...` measures, `plot` draws; and `live` draws while a procedure learns.

Every display follows scikit-learn's convention: `plot` draws on the axes it is given, keeps them as `ax_` (or
`axes_`) with their figure as `figure_`, and returns the display. Without axes it makes a figure with
`matplotlib.pyplot.subplots`: a notebook shows such a figure below the cell by itself, a script calls
`matplotlib.pyplot.show()` or saves `figure_`. Beyond that no state of pyplot is touched.

Clean images are `CLEAN`, in plain bars and solid lines; triggered ones are `TRIGGERED`, hatched and dashed.
"""

from __future__ import annotations

import io
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, is_dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from bclip_lab.attacks import BackdoorAttack, Trigger
from bclip_lab.benchmark import summary
from bclip_lab.clipping import ClippedModel, abnormality
from bclip_lab.data.images import Attack, LabelledImages, TriggeredImages, check_images, to_float
from bclip_lab.detection import MMBD
from bclip_lab.evaluation import Evaluation, RocCurve, SiteASR, Visibility, site_asr
from bclip_lab.margins import classification_margins
from bclip_lab.models import logits

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "CLEAN",
    "TRIGGERED",
    "AbnormalityDisplay",
    "ActivationDisplay",
    "BoundsDisplay",
    "DecisionDisplay",
    "EvaluationDisplay",
    "GalleryDisplay",
    "GridDisplay",
    "HistoryDisplay",
    "MarginDisplay",
    "MaximumMarginDisplay",
    "RocDisplay",
    "ScoreDisplay",
    "SiteDisplay",
    "SweepDisplay",
    "TradeOffDisplay",
    "TriggerGalleryDisplay",
    "live",
]

_PALETTE: list[str] = list(sns.color_palette("colorblind").as_hex())
CLEAN: str = _PALETTE[0]
"""The colour of clean images on every plot: blue."""
TRIGGERED: str = _PALETTE[3]
"""The colour of triggered images on every plot: vermilion."""

# For what is neither clean nor triggered: models, detectors.
_OTHERS = [_PALETTE[i] for i in (2, 4, 7, 5, 9, 8)]
_HATCHES = ("", "///", "...", "xxx", "---", "\\\\\\")
_LINES = ("solid", "dashed", "dashdot", "dotted")
_HATCH = "////"
_GREY, _NEUTRAL = "0.35", _PALETTE[7]
_BINS = 40
_TITLE, _LABEL, _TICK = 13, 12, 11  # in points, on figures 7 to 10 inches wide: legible when projected

Images = Tensor | LabelledImages | TriggeredImages
Floats = NDArray[np.float64]
Step = TypeVar("Step")


class Detector(Protocol):
    """What `RocDisplay` and `ScoreDisplay` ask of a detector: a score that is higher on triggered images.

    `threshold_`, where there is one, is what a score must exceed to be detected.
    """

    def score(self, images: Tensor, /) -> Tensor:
        """The scores (N,) of images (N, C, H, W)."""
        ...


# --- shared -------------------------------------------------------------------------------------------------


def _tensor(images: Images, name: str) -> Tensor:
    tensor = images if isinstance(images, Tensor) else images.images
    check_images(tensor, name)
    if not len(tensor):
        raise ValueError(f"{name} is empty")
    return tensor


def _array(values: Tensor | ArrayLike) -> Floats:
    """A copy, so that a display keeps its numbers whatever becomes of what they were measured on."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.array(values, dtype=np.float64)


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    if ax is None:
        _, ax = plt.subplots(figsize=(width, height), layout="constrained")
    return ax


def _grid(axes: Any, rows: int, columns: int, width: float, height: float, sharex: bool = False) -> NDArray[Any]:
    """The given axes, one or an array, as an array (rows, columns); new ones where None is given."""
    if axes is None:
        _, axes = plt.subplots(
            rows, columns, figsize=(width, height), layout="constrained", squeeze=False, sharex=sharex
        )
    given = np.asarray(axes, dtype=object)
    if given.size != rows * columns:
        raise ValueError(f"axes must be {rows * columns} axes ({rows} x {columns}), got {given.size}")
    return given.reshape(rows, columns)


def _keep(display: object, **drawn: object) -> None:
    """Set what was drawn on a frozen display."""
    for name, value in drawn.items():
        object.__setattr__(display, name, value)


def _label(ax: Axes, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=_TITLE)
    ax.set_xlabel(x, fontsize=_LABEL)
    ax.set_ylabel(y, fontsize=_LABEL)
    ax.tick_params(labelsize=_TICK)


def _open(ax: Axes) -> None:
    """Leave out the frame's upper and right line."""
    ax.spines[["top", "right"]].set_visible(False)


def _edges(*values: Floats) -> Floats:
    return np.histogram_bin_edges(np.concatenate(values), bins=_BINS)


def _histogram(ax: Axes, clean: Floats, triggered: Floats, edges: Floats, notes: Sequence[str] = ("", "")) -> None:
    """Two histograms, each in per cent of its own images."""
    styles: tuple[dict[str, Any], ...] = (
        {"color": CLEAN, "alpha": 0.75},
        {"color": TRIGGERED, "alpha": 0.6, "hatch": _HATCH, "edgecolor": TRIGGERED},
    )
    for name, values, style, note in zip(("clean", "triggered"), (clean, triggered), styles, notes, strict=True):
        label = f"{name} ({len(values)} images){note}"
        sns.histplot(x=values, bins=edges, stat="percent", ax=ax, linewidth=0, label=label, **style)
    highest = max(bar.get_height() for container in ax.containers for bar in container)
    ax.set_ylim(0, 1.35 * highest)  # room for the legend
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    _open(ax)


def _heat_map(
    ax: Axes,
    rows: Mapping[str, Floats],
    notes: Sequence[str],
    *,
    norm: Normalize,
    bar: dict[str, Any],
    cmap: str,
) -> None:
    """One row of cells a site, hatched where a site has no more channels; a note to the right of each row."""
    widest = max(len(values) for values in rows.values())
    cells = np.full((len(rows), widest), np.nan)
    for row, values in zip(cells, rows.values(), strict=True):
        row[: len(values)] = values
    ax.set_facecolor("0.94")
    ax.patch.set(hatch="///", edgecolor="0.82")
    sns.heatmap(
        cells,
        ax=ax,
        mask=np.isnan(cells),
        norm=norm,
        cmap=cmap,
        xticklabels=False,
        yticklabels=list(rows),
        cbar_kws={"location": "bottom", "shrink": 0.6, "aspect": 40, "pad": 0.03, **bar},
    )
    ax.hlines(range(1, len(rows)), 0, widest, color="white", linewidth=1.5)
    ticks = [
        1,
        *(int(tick) for tick in MaxNLocator(6, integer=True).tick_values(1, widest) if 1 < tick <= widest),
    ]
    ax.set_xticks([tick - 0.5 for tick in ticks], [str(tick) for tick in ticks])
    ax.tick_params(axis="y", rotation=0, length=0)
    for index, note in enumerate(notes):
        ax.text(
            1.01,
            index + 0.5,
            note,
            transform=ax.get_yaxis_transform(),
            va="center",
            ha="left",
            fontsize=_TICK,
        )
    colours = ax.collections[0].colorbar
    assert colours is not None
    colours.minorticks_off()
    colours.ax.tick_params(labelsize=_TICK)
    colours.ax.xaxis.label.set_fontsize(_LABEL)


# --- images -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class GalleryDisplay:
    """Images in rows.

    `images` float64 (N, H, W, C) in [0, 1], row by row, `columns` in a row; `titles` one above each, or ();
    `row_labels` one to the left of each row, or ().
    """

    images: Floats = field(repr=False)
    columns: int
    titles: tuple[str, ...] = field(default=(), repr=False)
    row_labels: tuple[str, ...] = field(default=(), repr=False)
    axes_: NDArray[Any] = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_images(cls, images: Images, titles: Sequence[str] | None = None, columns: int = 8) -> GalleryDisplay:
        """Show images (N, C, H, W), grey or RGB, under titles: class names by default, where known.

        Raises
        ------
        ValueError
            No images, images of neither 1 nor 3 channels, other than N titles, or `columns` below 1.

        Examples
        --------
        >>> import torch
        >>> GalleryDisplay.from_images(torch.zeros(3, 3, 8, 8), ("a", "b", "c"), columns=2)
        GalleryDisplay(columns=2)
        """
        if titles is None and isinstance(images, LabelledImages):
            titles = [images.classes[label] for label in images.labels.tolist()]
        pixels = _pixels(images, "images")
        titles = tuple(titles or ())
        if titles and len(titles) != len(pixels):
            raise ValueError(f"titles must be as many as images, got {len(titles)} for {len(pixels)}")
        if columns < 1:
            raise ValueError(f"columns must be at least 1, got {columns}")
        return cls(pixels, min(columns, len(pixels)), titles)

    @classmethod
    def from_attack(
        cls, attack: Attack, data: LabelledImages, count: int = 6, magnify: float | None = None
    ) -> GalleryDisplay:
        """Show clean images, the same with the trigger, and what the trigger changes.

        Parameters
        ----------
        attack
            Makes the triggered images.
        data
            Clean images; the classes take turns, and within a class the first ones are shown.
        count
            Columns: at most so many images.
        magnify
            Factor of the difference, which is drawn about mid-grey: 0.5 + magnify * (triggered - clean). By
            default the largest whole number, at least 1, that leaves every pixel in range.

        Raises
        ------
        ValueError
            `count` below 1, `magnify` not above 0, images of neither 1 nor 3 channels, or no image that the
            attack turns.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        if magnify is not None and not magnify > 0:
            raise ValueError(f"magnify must be above 0, got {magnify}")
        made = attack.triggered(data)
        labels = made.true_labels.cpu().numpy()
        order = np.argsort(labels, kind="stable")
        turn = np.empty(len(labels), dtype=np.int64)  # how many of its class come before each image
        turn[order] = np.arange(len(labels)) - np.searchsorted(labels[order], labels[order])
        picked = np.lexsort((labels, turn))[:count].tolist()
        triggered = _pixels(made.images[picked], "data")
        clean = _pixels(data.images[made.rows[picked]], "data")
        difference = triggered - clean
        if magnify is None:
            magnify = _magnification(difference)
        targets = made.targets.tolist()
        titles = [f"{made.classes[labels[i]]}\n→ {made.classes[targets[i]]}" for i in picked]
        return cls(
            np.concatenate([clean, triggered, _about_grey(difference, magnify)]),
            len(picked),
            (*titles, *[""] * (2 * len(picked))),
            ("clean", "triggered", f"difference\n×{magnify:g}"),
        )

    def plot(self, axes: Any = None) -> GalleryDisplay:
        """Draw on as many axes as there are cells, or on a new figure of pyplot."""
        rows = math.ceil(len(self.images) / self.columns)
        side = min(1.5, 11 / self.columns)
        lines = max((title.count("\n") + 1 for title in self.titles if title), default=0)
        titled = rows if any(self.titles[self.columns :]) else 1
        height = rows * side + titled * lines * 0.2 + 0.2
        width = self.columns * side + (1.1 if self.row_labels else 0)
        grid = _grid(axes, rows, self.columns, width, height)
        for index, ax in enumerate(grid.flat):
            if index >= len(self.images):
                ax.set_axis_off()
                continue
            image = self.images[index]
            image = image[..., 0] if image.shape[-1] == 1 else image
            ax.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if self.titles:
                ax.set_title(self.titles[index], fontsize=_TICK)
        for ax, label in zip(grid[:, 0], self.row_labels, strict=False):
            ax.set_ylabel(label, fontsize=_LABEL, rotation=0, ha="right", va="center")
        _keep(self, axes_=grid, figure_=grid[0, 0].figure)
        return self


@dataclass(frozen=True, eq=False)
class TriggerGalleryDisplay:
    """Several triggers on the same image, what each of them changes there, and how visible they are.

    `clean` float64 (H, W, C) in [0, 1], one image; `triggered` (T, H, W, C), its copies with each trigger of `names`;
    `difference` (T, H, W, C), triggered - clean, in [-1, 1]; `magnified` (T,), the factor by which each difference is
    shown about mid-grey: 0.5 + magnified * difference; `visibility`, of each trigger over *all* images given.
    """

    names: tuple[str, ...]
    clean: Floats = field(repr=False)
    triggered: Floats = field(repr=False)
    difference: Floats = field(repr=False)
    magnified: tuple[int, ...] = field(repr=False)
    visibility: tuple[Visibility, ...] = field(repr=False)
    ax_: Axes = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_triggers(cls, triggers: Mapping[str, Trigger], images: Images, shown: int = 0) -> TriggerGalleryDisplay:
        """Embed each of the named triggers in images (N, C, H, W), grey or RGB.

        Parameters
        ----------
        triggers
            Anything with a method `embed`, by name, in the order of the rows.
        images
            Clean images: the numbers are means over all of them.
        shown
            Which of the images is shown: the first one by default.

        Every difference is magnified by the largest whole number, at least 1, that leaves all of its pixels in range.

        Raises
        ------
        ValueError
            No trigger, no such image, images of neither 1 nor 3 channels or with a side below 6 pixels, or whatever a
            trigger raises.

        Examples
        --------
        >>> import torch
        >>> from bclip_lab.attacks import CheckerboardTrigger, PatchTrigger
        >>> triggers = {"patch": PatchTrigger(), "checkerboard": CheckerboardTrigger(delta=0.1)}
        >>> display = TriggerGalleryDisplay.from_triggers(triggers, torch.full((2, 3, 8, 8), 0.5))
        >>> display.magnified, [round(found.changed, 2) for found in display.visibility]
        ((1, 5), [0.14, 0.5])
        """
        if not triggers:
            raise ValueError("triggers is empty")
        tensor = _tensor(images, "images")
        if not 0 <= shown < len(tensor):
            raise ValueError(f"shown must lie in [0, {len(tensor)}), got {shown}")
        clean = _pixels(tensor[shown : shown + 1], "images")[0]
        triggered, visibility = [], []
        for name, trigger in triggers.items():
            embedded = trigger.embed(tensor)
            visibility.append(Visibility.from_images(tensor, embedded))
            triggered.append(_pixels(embedded[shown : shown + 1], name)[0])
        copies = np.stack(triggered)
        difference = copies - clean
        factors = tuple(_magnification(own) for own in difference)
        return cls(tuple(triggers), clean, copies, difference, factors, tuple(visibility))

    def plot(self, ax: Axes | None = None) -> TriggerGalleryDisplay:
        """Draw on `ax`, or on a new figure of pyplot: a row a trigger; three pictures, then the numbers."""
        height = self.clean.shape[0] / self.clean.shape[1]  # of a picture that is one unit wide
        pitch = height + 0.08
        rows = len(self.names)
        ax = _axes(ax, 10, 0.92 * pitch * rows + 0.9)
        columns = {
            0.5: "clean",
            1.58: "triggered",
            2.66: "difference",
            3.65: "magnified",
            4.65: "pixels\nchanged",
            5.5: r"$L_\infty$",
            6.3: "$L_2$",
            7.15: "PSNR\nin dB",
            8.0: "SSIM",
        }
        places = list(columns)
        for row, (copy, change, factor, found) in enumerate(
            zip(self.triggered, self.difference, self.magnified, self.visibility, strict=True)
        ):
            top = row * pitch
            for place, picture in zip(places, (self.clean, copy, _about_grey(change, factor)), strict=False):
                picture = picture[..., 0] if picture.shape[-1] == 1 else picture
                extent = (place - 0.5, place + 0.5, top + height, top)
                ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest", extent=extent)
            numbers = (
                f"×{factor}",
                f"{found.changed:.1%}",
                f"{found.l_inf:.3f}",
                f"{found.l_2:.2f}",
                f"{found.psnr:.1f}" if math.isfinite(found.psnr) else "∞",
                f"{found.ssim:.3f}",
            )
            for place, number in zip(places[3:], numbers, strict=True):
                ax.text(place, top + height / 2, number, ha="center", va="center", fontsize=_TICK)
        ax.set(xlim=(0, 8.4), ylim=(rows * pitch, -0.04))
        images = self.visibility[0].images
        _label(ax, f"Triggers on one image (numbers: mean over {images} images)", "", "")
        ax.set_xticks(places, list(columns.values()))
        ax.set_yticks([row * pitch + height / 2 for row in range(rows)], self.names)
        ax.tick_params(length=0, labeltop=True, labelbottom=False)
        ax.spines[:].set_visible(False)
        _keep(self, ax_=ax, figure_=ax.figure)
        return self


def _magnification(difference: Floats) -> int:
    """The largest whole number, at least 1, by which a difference stays within half the range."""
    largest = float(np.abs(difference).max())
    return max(1, math.floor(0.5 / largest + 1e-3)) if largest else 1  # a little more: float32 has rounded


def _about_grey(difference: Floats, magnify: float) -> Floats:
    """A difference as it is shown: where nothing changes, mid-grey."""
    shown: Floats = np.clip(0.5 + magnify * difference, 0, 1)
    return shown


def _pixels(images: Images, name: str) -> Floats:
    """Images as matplotlib takes them: (N, H, W, C) in [0, 1]."""
    tensor = _tensor(images, name)
    if tensor.shape[1] not in (1, 3):
        raise ValueError(f"{name} must have 1 or 3 channels to be shown, got {tensor.shape[1]}")
    return _array(to_float(tensor).permute(0, 2, 3, 1))


# --- activations and bounds ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ActivationDisplay:
    """Of every image the largest activation at a site, clean against triggered, and the bound.

    `clean` float64 (N,) and `triggered` (M,); `channel` None is the maximum over all channels, and `bound`
    then the site's largest one. `bound` +inf is no bound.
    """

    site: str
    channel: int | None
    clean: Floats = field(repr=False)
    triggered: Floats = field(repr=False)
    bound: float = math.inf
    ax_: Axes = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_model(
        cls, clipped: ClippedModel, clean: Images, triggered: Images, site: str, channel: int | None = None
    ) -> ActivationDisplay:
        """Measure a site before its own clip, with the bounds of the sites before it in force.

        Raises `ValueError` for an unknown site, a channel that the site does not have, or no images.
        """
        if site not in clipped.channels:
            raise ValueError(f"there is no site {site!r}; the sites are {', '.join(clipped.sites)}")
        if channel is not None and not 0 <= channel < clipped.channels[site]:
            raise ValueError(f"channel must lie in [0, {clipped.channels[site]}) at site {site!r}, got {channel}")
        parts = []
        for images, name in ((clean, "clean"), (triggered, "triggered")):
            values = clipped.site_activations(_tensor(images, name), site)
            parts.append(_array(values.amax(1) if channel is None else values[:, channel]))
        bounds = clipped.bounds[site]
        bound = bounds.max() if channel is None else bounds[channel]
        return cls(site, channel, parts[0], parts[1], float(bound))

    def plot(self, ax: Axes | None = None) -> ActivationDisplay:
        """Draw on `ax`, or on a new figure of pyplot."""
        ax = _axes(ax, 8, 4.5)
        _histogram(ax, self.clean, self.triggered, _edges(self.clean, self.triggered))
        if math.isfinite(self.bound):
            name = "largest bound of the site" if self.channel is None else "bound"
            ax.axvline(self.bound, color="black", linestyle="dashed", label=f"{name}: {self.bound:.3g}")
        where = "the largest of all channels" if self.channel is None else f"channel {self.channel}"
        _label(
            ax,
            f"Largest activation of each image at {self.site}, {where}",
            "largest activation over positions",
            "share of images",
        )
        ax.legend(fontsize=_TICK)
        _keep(self, ax_=ax, figure_=ax.figure)
        return self


@dataclass(frozen=True, eq=False)
class AbnormalityDisplay:
    """How many times the largest clean activation triggered images reach: per site `ratios` float64 (C,)."""

    ratios: dict[str, Floats] = field(repr=False)
    ax_: Axes = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_model(cls, clipped: ClippedModel, clean: Images, triggered: Images) -> AbnormalityDisplay:
        """Measure with `bclip_lab.clipping.abnormality` on the model as it is given, its bounds in force.

        For the abnormality of the original network give a model whose bounds are all at +inf, as
        `ClippedModel(model)` is. Raises `ValueError` where there are no images.
        """
        ours, theirs = (
            clipped.activations(_tensor(images, name), quantiles=())
            for images, name in ((clean, "clean"), (triggered, "triggered"))
        )
        return cls({site: _array(values) for site, values in abnormality(ours, theirs).items()})

    def worst(self) -> list[tuple[str, int, float]]:
        """The most abnormal channel of every site, in the order of the sites: (site, channel, ratio).

        Examples
        --------
        >>> AbnormalityDisplay({"relu": np.array([1.0, 8.0]), "relu_1": np.array([2.0, 0.5])}).worst()
        [('relu', 1, 8.0), ('relu_1', 0, 2.0)]
        """
        return [(site, int(values.argmax()), float(values.max())) for site, values in self.ratios.items()]

    def plot(self, ax: Axes | None = None) -> AbnormalityDisplay:
        """Draw on `ax`, or on a new figure of pyplot; colours end at the largest ratio and its inverse."""
        if not self.ratios:
            raise ValueError("ratios is empty")
        ax = _axes(ax, 10, 2.2 + 0.36 * len(self.ratios))
        limit = max(2.0, *(ratio for _, _, ratio in self.worst()))
        lowest = min(float(values.min()) for values in self.ratios.values())
        _heat_map(
            ax,
            {site: np.sort(values)[::-1].clip(1 / limit) for site, values in self.ratios.items()},
            [f"channel {channel}: ×{ratio:.3g}" for _, channel, ratio in self.worst()],
            norm=LogNorm(1 / limit, limit),
            cmap="vlag",
            bar={
                "label": "triggered maximum / clean maximum",
                "extend": "min" if lowest < 1 / limit else "neither",
                "format": FuncFormatter(lambda ratio, _: f"×{ratio:.3g}"),
                "ticks": _around_one(limit),
            },
        )
        title = "How far above the clean maximum triggered images reach; on the right each site's worst channel"
        _label(ax, title, "channels of a site, most abnormal first (hatched: the site has no more)", "")
        _keep(self, ax_=ax, figure_=ax.figure)
        return self


def _around_one(limit: float) -> list[float]:
    """Ticks of a logarithmic scale from 1 / limit to limit."""
    above = [t * 10.0**e for e in range(math.ceil(math.log10(limit)) + 1) for t in (1, 2, 5)]
    above = [tick for tick in above if 1 < tick <= limit]
    if len(above) > 4:
        above = [tick for tick in above if math.log10(tick) % 1 == 0]
    return [*(1 / tick for tick in reversed(above)), 1.0, *above]


@dataclass(frozen=True, eq=False)
class BoundsDisplay:
    """Every bound as a share of the largest clean activation of its channel: per site `ratios` float64 (C,).

    Below 1 clean images are cut, at +inf (no bound) and from 1 on they are not.
    """

    ratios: dict[str, Floats] = field(repr=False)
    ax_: Axes = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_model(cls, clipped: ClippedModel, clean: Images) -> BoundsDisplay:
        """Compare the bounds in force with the clean maximum of the *original*, unclipped network."""
        statistics = ClippedModel(clipped.original).activations(_tensor(clean, "clean"), quantiles=())
        return cls.from_bounds(clipped.bounds, statistics.maximum)

    @classmethod
    def from_bounds(
        cls, bounds: Mapping[str, Tensor | ArrayLike], maximum: Mapping[str, Tensor | ArrayLike]
    ) -> BoundsDisplay:
        """Divide bounds by clean maxima, for every site both (C,).

        As in `bclip_lab.clipping.abnormality` a maximum counts as at least a hundredth of its site's largest,
        and as 1 where the site is silent. Raises `ValueError` where sites or shapes differ, or for no site.

        Examples
        --------
        >>> BoundsDisplay.from_bounds({"relu": [1.0, np.inf]}, {"relu": [4.0, 2.0]}).ratios
        {'relu': array([0.25,  inf])}
        """
        if not bounds or bounds.keys() != maximum.keys():
            raise ValueError(f"bounds and maximum must have the same sites, got {list(bounds)} and {list(maximum)}")
        ratios = {}
        for site, given in bounds.items():
            above, largest = _array(given), _array(maximum[site])
            if above.ndim != 1 or above.shape != largest.shape or not above.size:
                raise ValueError(
                    f"site {site!r}: bounds and maximum must be (C,), got {above.shape} and {largest.shape}"
                )
            peak = float(largest.max())
            ratios[site] = above / (np.maximum(largest, 0.01 * peak) if peak > 0 else 1)
        return cls(ratios)

    def plot(self, ax: Axes | None = None) -> BoundsDisplay:
        """Draw on `ax`, or on a new figure of pyplot; colours end at 0 and at 1."""
        ax = _axes(ax, 10, 2.2 + 0.36 * len(self.ratios))
        _heat_map(
            ax,
            {site: np.sort(values).clip(0, 1) for site, values in self.ratios.items()},
            [f"{np.sum(values < 1)} of {len(values)} cut" for values in self.ratios.values()],
            norm=Normalize(0, 1),
            cmap="rocket",
            bar={"label": "bound / clean maximum (1 and above: nothing is cut)", "extend": "max"},
        )
        title = "Bounds beside the largest clean activation; on the right how many channels are cut"
        _label(ax, title, "channels of a site, most cut first (hatched: the site has no more)", "")
        _keep(self, ax_=ax, figure_=ax.figure)
        return self


# --- margins ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MarginDisplay:
    """Classification margins under one or several models.

    For each model's name `clean` float64 (N,), the margin of the true class on clean images, and `triggered`
    (M,), the margin of the attacker's target on triggered ones. Above 0 that class is the decision.
    """

    clean: dict[str, Floats] = field(repr=False)
    triggered: dict[str, Floats] = field(repr=False)
    axes_: NDArray[Any] = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_models(cls, models: Mapping[str, nn.Module], data: LabelledImages, attack: Attack) -> MarginDisplay:
        """Measure named models on clean images and on those that the attack makes of them.

        Raises `ValueError` where there are no models or no images.
        """
        if not models:
            raise ValueError("models is empty")
        _tensor(data, "data")
        made = attack.triggered(data)
        clean, triggered = {}, {}
        for name, model in models.items():
            clean[name] = _array(classification_margins(logits(model, data), data.labels.cpu()))
            triggered[name] = _array(classification_margins(logits(model, made.images), made.targets.cpu()))
        return cls(clean, triggered)

    def plot(self, axes: Any = None) -> MarginDisplay:
        """Draw one panel a model, below one another, on that many axes or on a new figure of pyplot."""
        count = len(self.clean)
        grid = _grid(axes, count, 1, 8, 1 + 2.7 * count, sharex=True)
        edges = _edges(*self.clean.values(), *self.triggered.values())
        for ax, name in zip(grid[:, 0], self.clean, strict=True):
            clean, triggered = self.clean[name], self.triggered[name]
            notes = [f": {np.mean(values > 0):.1%} right of 0" for values in (clean, triggered)]
            _histogram(ax, clean, triggered, edges, notes)
            ax.axvline(0, color=_GREY, linestyle="dotted")
            ax.set_xlim(edges[0], edges[-1])
            _label(ax, f"Margins, {name}", "", "share of images")
            ax.legend(fontsize=_TICK)
        grid[-1, 0].set_xlabel(
            "classification margin in logits: of the true class on clean images,\nof the target class on "
            "triggered ones (right of 0 it is the decision)",
            fontsize=_LABEL,
        )
        _keep(self, axes_=grid[:, 0], figure_=grid[0, 0].figure)
        return self


@dataclass(frozen=True, eq=False)
class MaximumMarginDisplay:
    """The verdict of MM-BD and what it rests on: `margins` float64 (K,), the largest of each class."""

    margins: Floats = field(repr=False)
    classes: tuple[str, ...]
    p_value: float
    target: int | None
    ax_: Axes = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_detector(cls, detector: MMBD, classes: Sequence[str]) -> MaximumMarginDisplay:
        """Show what a fitted detector found; raises `ValueError` before `fit`, or for other than K names."""
        if not hasattr(detector, "margins_"):
            raise ValueError("detector is not fitted: call fit or judge first")
        if len(classes) != len(detector.margins_):
            raise ValueError(f"classes must be {len(detector.margins_)} names, got {len(classes)}")
        return cls(_array(detector.margins_), tuple(classes), detector.p_value_, detector.target_)

    def plot(self, ax: Axes | None = None) -> MaximumMarginDisplay:
        """Draw on `ax`, or on a new figure of pyplot; the target's bar is hatched."""
        count = len(self.margins)
        ax = _axes(ax, 8, 1.5 + 0.32 * count)
        bars = ax.barh(range(count), self.margins, color=_NEUTRAL)
        if self.target is not None:
            bars[self.target].set(facecolor=TRIGGERED, edgecolor="white", hatch=_HATCH)
        ax.bar_label(bars, [f"{margin:.3g}" for margin in self.margins], padding=4, fontsize=_TICK)
        ax.set_yticks(range(count), self.classes)
        ax.invert_yaxis()
        ax.margins(x=0.12)
        verdict = "no attack found" if self.target is None else f"attacked, target {self.classes[self.target]!r}"
        _label(
            ax,
            f"Maximum margins: {verdict}\n(p = {self.p_value:.2g}; MM-BD assumes one target class)",
            "largest margin of the class over all starts (logits)",
            "",
        )
        _open(ax)
        _keep(self, ax_=ax, figure_=ax.figure)
        return self


# --- detection ----------------------------------------------------------------------------------------------


def _scores(detector: Detector, data: LabelledImages, attack: Attack) -> tuple[Floats, Floats]:
    images = _tensor(data, "data")
    return _array(detector.score(images)), _array(detector.score(attack.triggered(data).images))


@dataclass(frozen=True, eq=False)
class ScoreDisplay:
    """A detector's scores, `clean` float64 (N,) and `triggered` (M,), and its `threshold`."""

    clean: Floats = field(repr=False)
    triggered: Floats = field(repr=False)
    threshold: float
    name: str = "detector"
    ax_: Axes = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_detector(cls, detector: Detector, data: LabelledImages, attack: Attack) -> ScoreDisplay:
        """Score clean images and what the attack makes of them; raises `ValueError` without `threshold_`."""
        threshold = getattr(detector, "threshold_", None)
        if threshold is None:
            raise ValueError("detector has no threshold_: call fit with clean images first")
        return cls(*_scores(detector, data, attack), float(threshold), type(detector).__name__)

    def plot(self, ax: Axes | None = None) -> ScoreDisplay:
        """Draw on `ax`, or on a new figure of pyplot."""
        ax = _axes(ax, 8, 4.5)
        fpr, tpr = (
            float(np.mean(self.clean > self.threshold)),
            float(np.mean(self.triggered > self.threshold)),
        )
        edges = _edges(self.clean, self.triggered)
        _histogram(ax, self.clean, self.triggered, edges, (f": FPR {fpr:.3f}", f": TPR {tpr:.3f}"))
        ax.axvline(self.threshold, color="black", linestyle="dashed", label=f"threshold: {self.threshold:.3g}")
        _label(
            ax,
            f"Scores of {self.name}: right of the threshold an image is detected",
            "score: higher is more suspicious",
            "share of images",
        )
        ax.legend(fontsize=_TICK)
        _keep(self, ax_=ax, figure_=ax.figure)
        return self


@dataclass(frozen=True, eq=False)
class RocDisplay:
    """The ROC of a detector; where `threshold` is given, the operating point that it makes."""

    curve: RocCurve = field(repr=False)
    name: str
    threshold: float | None = None
    ax_: Axes = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_detector(
        cls, detector: Detector, data: LabelledImages, attack: Attack, name: str | None = None
    ) -> RocDisplay:
        """Score clean images and what the attack makes of them; `threshold_`, if fitted, is marked."""
        threshold = getattr(detector, "threshold_", None)
        curve = RocCurve(*_scores(detector, data, attack))
        return cls.from_curve(curve, name or type(detector).__name__, threshold)

    @classmethod
    def from_curve(cls, curve: RocCurve, name: str, threshold: float | None = None) -> RocDisplay:
        """Show a curve that is already known."""
        return cls(curve, name, None if threshold is None else float(threshold))

    def plot(self, ax: Axes | None = None, *, log_fpr: bool = False) -> RocDisplay:
        """Draw on `ax`, or on a new figure of pyplot. On axes that hold curves already it is laid over them.

        With `log_fpr` (or where the axes are logarithmic already) the false-positive rate is drawn from half
        an image in N on; an operating point at 0 lies there.
        """
        ax = _axes(ax, 7, 5.5)
        before = [line for line in ax.lines if line.get_gid() == "roc"]
        log = log_fpr or (bool(before) and ax.get_xscale() == "log")
        colour = _OTHERS[len(before) % len(_OTHERS)]
        least = 1e-6 if log else 0.0  # a rate of 0, far left of the axes
        edge = 0.5 / len(self.curve.clean) if log else -0.01
        if not before:
            chance = np.geomspace(least, 1, 200) if log else np.array([0.0, 1.0])
            ax.plot(chance, chance, color=_GREY, linestyle="dotted", linewidth=1.2, label="chance")
        ax.plot(
            np.maximum(self.curve.false_positive_rate, least),
            self.curve.true_positive_rate,
            color=colour,
            linestyle=_LINES[len(before) % len(_LINES)],
            linewidth=2.5,
            label=f"{self.name}: AUROC {self.curve.auroc:.3f}",
            gid="roc",
        )
        if self.threshold is not None:
            fpr, tpr = self.curve.rates_at(self.threshold)
            ax.plot(
                max(fpr, edge),
                tpr,
                linestyle="none",
                marker="o",
                markersize=10,
                markerfacecolor=colour,
                markeredgecolor="black",
                label=f"at its threshold: FPR {fpr:.3f}, TPR {tpr:.3f}",
                gid="operating point",
                clip_on=False,
                zorder=3,
            )
        left = min(edge, ax.get_xlim()[0]) if before else edge
        ax.set(xscale="log" if log else "linear", xlim=(left, 1), ylim=(0, 1.01))
        _label(
            ax,
            "Detection of triggered images",
            "false-positive rate: share of clean images detected",
            "true-positive rate: share of triggered images detected",
        )
        _open(ax)
        ax.legend(fontsize=_TICK, loc="lower right")
        _keep(self, ax_=ax, figure_=ax.figure)
        return self


# --- results ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class EvaluationDisplay:
    """ACC, ASR and RA of one or several models; `ceiling` is the RA of a clean network, where known."""

    evaluations: dict[str, Evaluation]
    ceiling: float | None = None
    ax_: Axes = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_evaluations(cls, evaluations: Mapping[str, Evaluation], ceiling: float | None = None) -> EvaluationDisplay:
        """Show named evaluations; `ceiling` is a clean network's accuracy on the same triggered images.

        Raises `ValueError` where there is no evaluation, or `ceiling` lies outside [0, 1].

        Examples
        --------
        >>> attacked = Evaluation(acc=0.99, asr=1.0, ra=0.0, clean=100, triggered=90)
        >>> display = EvaluationDisplay.from_evaluations({"attacked": attacked})
        >>> [float(bar.get_height()) for bar in display.plot(Figure().subplots()).ax_.patches]
        [0.99, 1.0, 0.0]
        """
        if not evaluations:
            raise ValueError("evaluations is empty")
        if ceiling is not None and not 0 <= ceiling <= 1:
            raise ValueError(f"ceiling must lie in [0, 1], got {ceiling}")
        return cls(dict(evaluations), ceiling)

    def plot(self, ax: Axes | None = None) -> EvaluationDisplay:
        """Draw on `ax`, or on a new figure of pyplot: a group a metric, a bar a model, NaN left out."""
        found = self.evaluations.values()
        clean = _count({e.clean for e in found})
        triggered = _count({e.triggered for e in found if e.triggered})
        metrics = [
            ("ACC", f"{clean}clean images\ngiven their true class", [e.acc for e in found]),
            ("ASR", f"{triggered}triggered images\ngiven the attacker's target", [e.asr for e in found]),
            ("RA", f"{triggered}triggered images\ngiven their true class", [e.ra for e in found]),
        ]
        metrics = [metric for metric in metrics if not np.isnan(metric[2]).all()]
        ax = _axes(ax, max(8.0, 0.55 * len(metrics) * len(found)), 5)
        width = 0.8 / len(found)
        handles: list[Any] = []
        for index, name in enumerate(self.evaluations):
            values = [(place, v[index]) for place, (_, _, v) in enumerate(metrics) if not math.isnan(v[index])]
            places = [place - 0.4 + (index + 0.5) * width for place, _ in values]
            heights = [height for _, height in values]
            style: dict[str, Any] = {
                "color": _OTHERS[index % len(_OTHERS)],
                "hatch": _HATCHES[index % len(_HATCHES)],
            }
            bars = ax.bar(places, heights, 0.92 * width, label=name, edgecolor="white", linewidth=0, **style)
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # the ceiling may run through a number
            ax.bar_label(bars, [f"{height:.3f}" for height in heights], padding=2, fontsize=_TICK, bbox=behind)
            handles.append(bars)
        names = [name for name, _, _ in metrics]
        if self.ceiling is not None and "RA" in names:
            place = names.index("RA")
            handles += ax.plot(
                [place - 0.45, place + 0.45],
                [self.ceiling] * 2,
                color="black",
                linestyle="dashed",
                label=f"RA of a clean network: {self.ceiling:.3f}",
            )
        ax.set_xticks(range(len(metrics)), [f"{name}\n{meaning}" for name, meaning, _ in metrics])
        ax.set_xlim(-0.5, len(metrics) - 0.5)
        ax.set_ylim(0, 1.32)  # room for the legend
        ax.set_yticks(np.linspace(0, 1, 6))
        _label(ax, "Accuracy (ACC), attack success (ASR), recovered accuracy (RA)", "", "share of images")
        _open(ax)
        ax.legend(handles=handles, fontsize=_TICK, loc="upper center", ncols=3, frameon=False)
        _keep(self, ax_=ax, figure_=ax.figure)
        return self


def _count(counts: set[int]) -> str:
    """The number of images, where all evaluations have the same."""
    return f"{counts.pop()} " if len(counts) == 1 else ""


# --- progress -----------------------------------------------------------------------------------------------


def _numbers(record: object) -> dict[str, float]:
    """The numbers of a step record or of a mapping, None as NaN; whatever else it holds is left out."""
    items: Iterable[tuple[str, object]] = ()
    if isinstance(record, Mapping):
        items = record.items()
    elif is_dataclass(record) and not isinstance(record, type):
        items = ((f.name, getattr(record, f.name)) for f in fields(record))
    found = {}
    for name, value in items:
        if value is None:
            found[name] = math.nan
        elif isinstance(value, Real) and not isinstance(value, bool):
            found[name] = float(value)
    return found


@dataclass(frozen=True, eq=False)
class HistoryDisplay:
    """The numbers of a learning procedure against its epochs.

    `epoch` float64 (E,); `series` for each quantity (E,), NaN where a record has none; `epochs` how many were
    asked for, which the axes span, or None.
    """

    epoch: Floats = field(repr=False)
    series: dict[str, Floats] = field(repr=False)
    epochs: int | None = None
    axes_: NDArray[Any] = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_steps(cls, steps: Iterable[object]) -> HistoryDisplay:
        """Take every number of step records (`TrainStep` and its like) but `epoch` and `epochs`.

        Raises `ValueError` where there are no records, one has no `epoch`, or there is nothing else to draw.

        Examples
        --------
        >>> from bclip_lab.training import TrainStep
        >>> steps = [TrainStep(epoch, 2, 1 / epoch, 0.5, 0.1, None) for epoch in (1, 2)]
        >>> HistoryDisplay.from_steps(steps).series["loss"]
        array([1. , 0.5])
        """
        return cls.from_records([_numbers(step) for step in steps])

    @classmethod
    def from_records(cls, records: Sequence[Mapping[str, Any]]) -> HistoryDisplay:
        """Take the same from mappings, such as a history recorded as JSON; what is no number is left out."""
        if not records:
            raise ValueError("there are no records")
        rows = [_numbers(record) for record in records]
        for index, row in enumerate(rows):
            if math.isnan(row.get("epoch", math.nan)):
                raise ValueError(f"record {index} has no number 'epoch', only {sorted(row)}")
        names = [name for name in dict.fromkeys(name for row in rows for name in row)]
        series = {
            name: np.array([row.get(name, math.nan) for row in rows])
            for name in names
            if name not in ("epoch", "epochs")
        }
        series = {name: values for name, values in series.items() if not np.isnan(values).all()}
        if not series:
            raise ValueError("the records hold no number but 'epoch'")
        total = rows[-1].get("epochs", math.nan)
        return cls(np.array([row["epoch"] for row in rows]), series, None if math.isnan(total) else int(total))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of panels: as many as `plot` needs axes."""
        columns = min(3, len(self.series))
        return math.ceil(len(self.series) / columns), columns

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the figure in inches."""
        rows, columns = self.shape
        return max(4.5, 3.4 * columns), 0.3 + 2.5 * rows

    def plot(self, axes: Any = None) -> HistoryDisplay:
        """Draw one panel a quantity, on axes of `shape` or on a new figure of pyplot."""
        grid = _grid(axes, *self.shape, *self.size)
        _, columns = self.shape
        for index, ax in enumerate(grid.flat):
            if index >= len(self.series):
                ax.set_axis_off()
                continue
            name = list(self.series)[index]
            marker = "o" if len(self.epoch) <= 30 else ""
            ax.plot(self.epoch, self.series[name], color=_OTHERS[0], linewidth=2, marker=marker, markersize=4)
            last = index + columns >= len(self.series)  # nothing below it
            _label(ax, name.replace("_", " "), "epoch" if last else "", "")
            if self.epochs is not None and self.epochs > 1:
                ax.set_xlim(min(1.0, self.epoch.min()), max(self.epochs, self.epoch.max()))
            ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            ax.grid(axis="y", color="0.9")
            _open(ax)
        _keep(self, axes_=grid, figure_=grid[0, 0].figure)
        return self


def live(steps: Iterable[Step], *, every: float = 1.0) -> Iterator[Step]:
    """Pass the records of a learning generator through, and show its progress.

    A progress bar shows the epochs and the first numbers of the latest record. In a notebook a picture below
    it, updated in place and saved with the notebook, shows all numbers so far as a `HistoryDisplay`. Breaking
    off (`break`, `close`, an error, a keyboard interrupt) closes `steps` and leaves the last picture.

    Parameters
    ----------
    steps
        What `train`, `mmac` and the like give.
    every
        Seconds between pictures at least, and from the second on drawing takes at most a tenth of the time; until the
        last, pictures keep the layout of the first. The last record is drawn in any case. 0 draws every record,
        whatever it takes.

    Yields
    ------
    The records of `steps`, unchanged.

    Raises
    ------
    ValueError
        `every` is negative.
    """
    if not every >= 0:
        raise ValueError(f"every must be at least 0 seconds, got {every}")
    return _live(steps, every)


def _live(steps: Iterable[Step], every: float) -> Iterator[Step]:
    iterator = iter(steps)
    records: list[dict[str, float]] = []  # the numbers only: a record may hold a model
    with ExitStack() as stack:
        picture = _Picture(every) if _in_notebook() else None
        if picture is not None:
            stack.callback(lambda: picture.show(records, last=True))
        bar = stack.enter_context(tqdm(desc="starting", unit="epoch"))  # a fit seeks its synthetic images first
        close: Callable[[], object] | None = getattr(iterator, "close", None)
        if close is not None:
            stack.callback(close)
        for step in iterator:
            records.append(_numbers(step))
            _advance(bar, records[-1])
            if picture is not None:
                picture.show(records)
            yield step


def _advance(bar: tqdm[Any], numbers: dict[str, float]) -> None:
    """Show one record more."""
    total = numbers.get("epochs", math.nan)
    if not bar.disable and bar.total is None and not math.isnan(total):
        began = bar.start_t
        bar.reset(total=int(total))
        bar.start_t = bar.last_print_t = began  # the first epoch has taken time, too
    shown = [
        (name, value) for name, value in numbers.items() if name not in ("epoch", "epochs") and not math.isnan(value)
    ]
    bar.set_description_str(refresh=False)
    bar.set_postfix_str(", ".join(f"{name} {value:.3g}" for name, value in shown[:4]), refresh=False)
    epoch = numbers.get("epoch", math.nan)
    bar.update(1 if math.isnan(epoch) else int(epoch) - bar.n)


def _in_notebook() -> bool:
    """Whether a Jupyter kernel runs this."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class _Picture:
    """A history in a notebook's output, updated in place."""

    def __init__(self, every: float) -> None:
        self.every = every
        self.handle: Any = None
        self.axes: Any = None
        self.settled = True
        self.drawn = 0
        self.due = -math.inf

    def show(self, records: Sequence[Mapping[str, float]], last: bool = False) -> None:
        """Draw the records, unless they are drawn already, the last in a layout of their own, or it is too early."""
        if len(records) == self.drawn and (self.settled or not last):
            return
        if not last and time.monotonic() < self.due:
            return
        from IPython.display import Image, display

        try:
            history = HistoryDisplay.from_records(records)
        except ValueError:  # nothing to draw (yet)
            return
        began = time.monotonic()
        if self.axes is None or self.axes.shape != history.shape:
            # no pyplot: the cell's own figures stay what they are, and none is left open
            figure = Figure(figsize=history.size, layout="constrained")
            FigureCanvasAgg(figure)
            self.axes, self.settled = figure.subplots(*history.shape, squeeze=False), True
        else:  # in the layout of the first picture until the last: a layout takes as long as drawing does
            figure, self.settled = self.axes[0, 0].figure, last
            figure.set_layout_engine("constrained" if last else "none")
            for ax in self.axes.flat:
                ax.clear()
        history.plot(self.axes)
        png = io.BytesIO()
        figure.savefig(png, format="png", dpi=100)
        image = Image(data=png.getvalue(), format="png")  # type: ignore[no-untyped-call]
        if self.handle is None:
            self.handle = display(image, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self.handle.update(image)
        now = time.monotonic()
        took = now - began if self.drawn else 0.0  # the first picture loads fonts and the like besides
        self.due = now + (max(self.every, 9 * took) if self.every else 0)
        self.drawn = len(records)


# --- several attacks in one network, and attackers who adapt --------------------------------------------------


@dataclass(frozen=True, eq=False)
class DecisionDisplay:
    """What a model makes of each class under each of several triggers: a confusion matrix a trigger.

    For each name `shares` float64 (K, K): of the images of a row's class the share that is decided as a column's, NaN
    where a class has no image; `turned` bool (K, K): where the attack wants its sources to go.
    """

    shares: dict[str, Floats] = field(repr=False)
    turned: dict[str, NDArray[np.bool_]] = field(repr=False)
    classes: tuple[str, ...]
    axes_: NDArray[Any] = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_attacks(
        cls, model: nn.Module, data: LabelledImages, attacks: Mapping[str, BackdoorAttack]
    ) -> DecisionDisplay:
        """Put the trigger of each named attack into *every* image, whether or not its class is a source.

        Raises `ValueError` where there are no attacks or no images.
        """
        if not attacks:
            raise ValueError("attacks is empty")
        _tensor(data, "data")
        count = len(data.classes)
        every, true = torch.arange(count), data.labels.cpu().numpy()
        shares, turned = {}, {}
        for name, attack in attacks.items():
            decided = logits(model, attack.trigger.embed(data.images)).argmax(1).numpy()
            cells = np.zeros((count, count))
            np.add.at(cells, (true, decided), 1)
            images = cells.sum(1, keepdims=True)
            shares[name] = np.where(images > 0, cells / np.maximum(images, 1), np.nan)
            sources = every[attack.label_map.sources(every)]
            wanted = np.zeros((count, count), dtype=bool)
            wanted[sources.numpy(), attack.label_map.targets(sources).numpy()] = True
            turned[name] = wanted & ~np.eye(count, dtype=bool)
        return cls(shares, turned, data.classes)

    def plot(self, axes: Any = None) -> DecisionDisplay:
        """Draw one panel a trigger, side by side, on that many axes or on a new figure of pyplot.

        Shares of .05 and more are written into their cells; the cells the attacker wants are outlined.
        """
        count = len(self.shares)
        grid = _grid(axes, 1, count, 1.6 + 4.1 * count, 5.2)
        for index, (ax, (name, shares)) in enumerate(zip(grid[0], self.shares.items(), strict=True)):
            notes = np.array([[f"{s:.2f}".lstrip("0") if s >= 0.05 else "" for s in row] for row in shares])
            sns.heatmap(
                shares,
                ax=ax,
                mask=np.isnan(shares),
                vmin=0,
                vmax=1,
                cmap="rocket_r",
                annot=notes,
                fmt="",
                annot_kws={"fontsize": 8},
                square=True,
                cbar=False,
                linewidths=0.5,
                linecolor="0.9",
                xticklabels=list(self.classes),
                yticklabels=list(self.classes) if index == 0 else False,
            )
            for row, column in np.argwhere(self.turned[name]):
                ax.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=CLEAN, linewidth=2.5, gid="turned"))
            _label(ax, name, "decision", "true class" if index == 0 else "")
            ax.tick_params(axis="x", rotation=90)
            ax.tick_params(axis="y", rotation=0)
        _keep(self, axes_=grid[0], figure_=grid[0, 0].figure)
        return self


@dataclass(frozen=True, eq=False)
class SweepDisplay:
    """What an attacker who limits the margin pays, and what the defender loses.

    N attackers: `strength` and `margin` float64 (N,) of their penalties; `before` and `after` clipping float64 (N, 3),
    ACC, ASR and RA; `margins` float64 (N, K), the maximum margins that MM-BD finds, and `named`, the class that it
    calls the target of an attack, or None; `target`, the true one.
    """

    strength: Floats = field(repr=False)
    margin: Floats = field(repr=False)
    before: Floats = field(repr=False)
    after: Floats = field(repr=False)
    margins: Floats = field(repr=False)
    named: tuple[int | None, ...] = field(repr=False)
    target: int
    axes_: NDArray[Any] = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]], target: int) -> SweepDisplay:
        """Take the rows of a recorded sweep: `strength`, `margin`, `before`, `after` and `mm_bd` of each.

        Raises `ValueError` where there is no row, or one lacks any of these.
        """
        if not rows:
            raise ValueError("rows is empty")
        for index, row in enumerate(rows):
            if missing := {"strength", "margin", "before", "after", "mm_bd"} - row.keys():
                raise ValueError(f"row {index} has no {', '.join(sorted(missing))}")
        rows = sorted(rows, key=lambda row: (row["margin"], row["strength"]))
        metrics = ("acc", "asr", "ra")
        return cls(
            _array([row["strength"] for row in rows]),
            _array([row["margin"] for row in rows]),
            _array([[row["before"][metric] for metric in metrics] for row in rows]),
            _array([[row["after"][metric] for metric in metrics] for row in rows]),
            _array([row["mm_bd"]["margins"] for row in rows]),
            tuple(row["mm_bd"]["target"] for row in rows),
            target,
        )

    @property
    def limits(self) -> tuple[float, ...]:
        """The margins that attackers keep to, the widest first; a strength of 0 keeps to none."""
        kept = self.margin[self.strength > 0] if (self.strength > 0).any() else self.margin
        return tuple(sorted({float(m) for m in kept}, reverse=True))

    def plot(self, axes: Any = None) -> SweepDisplay:
        """Draw on 3 x `limits` axes or on a new figure of pyplot: a column a limit, the plain attack in each."""
        columns = len(self.limits)
        grid = _grid(axes, 3, columns, 1.2 + 4.3 * columns, 8.5)
        for column, limit in zip(grid.T, self.limits, strict=True):
            rows = np.flatnonzero((self.margin == limit) | (self.strength == 0))
            rows = rows[np.argsort(self.strength[rows], kind="stable")]
            _metric_lines(column[0], self.before[rows])
            _metric_lines(column[1], self.after[rows])
            self._verdicts(column[2], rows)
            for ax in column:
                ax.set_xticks(range(len(rows)), [f"{s:g}" if s else "0\n(plain)" for s in self.strength[rows]])
                ax.set_xlim(-0.4, len(rows) - 0.6)
                _open(ax)
            first = column[0] is grid[0, 0]
            _label(column[0], f"margins above {limit:g} are penalised", "", "before clipping:\nshare" * first)
            _label(column[1], "", "", "after MMAC:\nshare" * first)
            _label(column[2], "", "strength of the penalty", "maximum margin\n(logits)" * first)
        for ax in grid[2]:
            ax.set(yscale="log", ylim=(0.7 * max(self.margins.min(), 1), 1.4 * self.margins.max()))
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.yaxis.set_minor_locator(NullLocator())
        for ax in (grid[0, -1], grid[2, -1]):
            ax.legend(fontsize=_TICK, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        _keep(self, axes_=grid, figure_=grid[0, 0].figure)
        return self

    def _verdicts(self, ax: Axes, rows: NDArray[Any]) -> None:
        """The target's maximum margin among those of the other classes, and whom MM-BD names."""
        others = np.delete(self.margins[rows], self.target, axis=1)
        target = self.margins[rows, self.target]
        found = np.array([self.named[row] == self.target for row in rows])
        ax.vlines(range(len(rows)), others.min(1), others.max(1), color="0.75", linewidth=8, label="other classes")
        style: dict[str, Any] = {"color": TRIGGERED, "linestyle": "none", "marker": "D", "markersize": 9}
        ax.plot(np.flatnonzero(found), target[found], **style, label="target, named by MM-BD", gid="named")
        style |= {"markerfacecolor": "white", "markeredgewidth": 2}
        ax.plot(np.flatnonzero(~found), target[~found], **style, label="target, not named", gid="not named")
        wrong = [(i, row) for i, row in enumerate(rows) if self.named[row] not in (None, self.target)]
        values = [self.margins[row, self.named[row]] for _, row in wrong]
        places = [place for place, _ in wrong]
        ax.plot(places, values, "kx", markersize=8, markeredgewidth=2, label="another class, named", gid="wrong")


@dataclass(frozen=True, eq=False)
class SiteDisplay:
    """Where bounds hold a backdoor back: the ASR with each site clipped alone, and with each site opened alone.

    F fits on one network, S sites: `alone` and `opened` float64 (F, S), as in `bclip_lab.SiteASR`; `before` and `after`
    float64 (F,), the ASR with no site clipped and with all.
    """

    sites: tuple[str, ...]
    alone: Floats = field(repr=False)
    opened: Floats = field(repr=False)
    before: Floats = field(repr=False)
    after: Floats = field(repr=False)
    ax_: Axes = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_model(cls, clipped: ClippedModel, triggered: TriggeredImages) -> SiteDisplay:
        """Measure with `bclip_lab.site_asr`, by the bounds in force; raises `ValueError` where there are no images."""
        before, after = (
            float((logits(model, triggered.images).argmax(1).cpu() == triggered.targets.cpu()).double().mean())
            for model in (clipped.original, clipped)
        )
        return cls._from_fits([(site_asr(clipped, triggered), before, after)])

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> SiteDisplay:
        """Take recorded fits on one network: `sites`, `before` and `after` of each.

        Raises `ValueError` where there is no row, one lacks any of these, or their sites differ.

        Examples
        --------
        >>> from bclip_lab import benchmark
        >>> display = SiteDisplay.from_rows(benchmark.found("mmac-explained", "patch-0-fit-*"))
        >>> display.sites[0], display.alone.shape
        ('relu', (3, 9))
        """
        if not rows:
            raise ValueError("rows is empty")
        for index, row in enumerate(rows):
            if missing := {"sites", "before", "after"} - row.keys():
                raise ValueError(f"row {index} has no {', '.join(sorted(missing))}")
            if row["sites"].keys() != rows[0]["sites"].keys():
                raise ValueError(f"row {index} has other sites than row 0")
        return cls._from_fits(
            [
                (
                    {
                        site: SiteASR(row["sites"][site]["alone"], row["sites"][site]["opened"])
                        for site in rows[0]["sites"]
                    },
                    row["before"]["asr"],
                    row["after"]["asr"],
                )
                for row in rows
            ]
        )

    @classmethod
    def _from_fits(cls, fits: Sequence[tuple[Mapping[str, SiteASR], float, float]]) -> SiteDisplay:
        alone, opened = (
            _array([[getattr(asr, name) for asr in sites.values()] for sites, _, _ in fits])
            for name in ("alone", "opened")
        )
        before, after = _array([asr for _, asr, _ in fits]), _array([asr for _, _, asr in fits])
        return cls(tuple(fits[0][0]), alone, opened, before, after)

    def plot(self, ax: Axes | None = None) -> SiteDisplay:
        """Draw on `ax`, or on a new figure of pyplot: the mean over the fits, with a line from least to most."""
        ax = _axes(ax, 7, 2.2 + 0.36 * len(self.sites))
        for value, line, name in ((self.before, "solid", "no site clipped"), (self.after, "dotted", "all clipped")):
            ax.axvline(value.mean(), color=_GREY, linestyle=line, linewidth=1.5, label=name, gid=name)
        styles = (
            (self.alone, "o", TRIGGERED, -0.14, "this site clipped alone"),
            (self.opened, "D", "white", 0.14, "all clipped but this site"),
        )
        for values, marker, face, shift, name in styles:
            places = np.arange(len(self.sites)) + shift
            ax.hlines(places, values.min(0), values.max(0), color=TRIGGERED, linewidth=1.5)
            ax.plot(
                values.mean(0), places, linestyle="none", marker=marker, markersize=8, markeredgewidth=1.5,
                color=TRIGGERED, markerfacecolor=face, label=name, gid=name,
            )  # fmt: skip
        ax.set_yticks(range(len(self.sites)), self.sites)
        ax.set_ylim(len(self.sites) - 0.5, -0.5)
        ax.set_xlim(-0.04, 1.04)
        _label(ax, "Which site holds the backdoor back?", "attack success rate (ASR)", "activation site")
        _open(ax)
        ax.grid(axis="y", color="0.9")
        ax.legend(fontsize=_TICK, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2, frameon=False)
        _keep(self, ax_=ax, figure_=ax.figure)
        return self


def _metric_lines(ax: Axes, metrics: Floats) -> None:
    """ACC, ASR and RA (N, 3) from left to right."""
    styles = (("ACC", CLEAN, "o", "solid"), ("ASR", TRIGGERED, "s", "dashed"), ("RA", _GREY, "^", "dotted"))
    for values, (name, colour, marker, line) in zip(metrics.T, styles, strict=True):
        ax.plot(values, color=colour, marker=marker, linestyle=line, linewidth=2, markersize=7, label=name, gid=name)
    ax.set_ylim(-0.04, 1.04)
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.grid(axis="y", color="0.9")


# --- the field ----------------------------------------------------------------------------------------------

_MEASURES = {
    "acc": "accuracy on clean images (ACC)",
    "asr": "attack success rate (ASR)",
    "ra": "recovered accuracy (RA)",
    "auroc": "AUROC over all triggered images",
    "auroc_successful": "AUROC over the triggered images that succeed",
    "seconds": "seconds of a fit",
    "memory": "peak memory of a fit (MiB)",
}
_MARKERS = "osD^vPX<>hp*"
# grey is the network without a defence
_METHODS = [*(_PALETTE[i] for i in (2, 4, 5, 9, 1, 8, 6)), "#1f2a44", "#7f4a1e", "#9e2a2b"]


@dataclass(frozen=True, eq=False)
class GridDisplay:
    """A measure of every method on every checkpoint, as a heat map.

    `values` float64 (checkpoints, methods), means over the seeds, NaN where none is known; `failed` int64 of the same
    shape, how many seeds failed; `measure` a column of `benchmark.frame`.
    """

    values: Floats = field(repr=False)
    failed: NDArray[np.int64] = field(repr=False)
    checkpoints: tuple[str, ...]
    methods: tuple[str, ...]
    measure: str
    ax_: Axes = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_frame(cls, cells: pd.DataFrame, measure: str = "asr") -> GridDisplay:
        """Take a measure from `benchmark.frame`: checkpoints and methods in the order they come in.

        A checkpoint or method without a number and without a failure is left out.

        Raises `ValueError` where `cells` has no such column, or no cell a number.

        Examples
        --------
        >>> from bclip_lab import benchmark
        >>> rows = [row for name in ("mmac", "mm-bm") for row in benchmark.found(name, "patch-0-fit-*")]
        >>> GridDisplay.from_frame(benchmark.frame(rows))
        GridDisplay(checkpoints=('patch',), methods=('mmac', 'mm-bm'), measure='asr')
        """
        means = summary(cells, measure)
        if means.empty:
            raise ValueError(f"no cell has the measure {measure!r}")
        told = cells[cells[measure].notna() | cells["error"].notna()]
        names = _checkpoint_names(told)
        rows, columns = list(dict.fromkeys(names)), list(dict.fromkeys(told["method"]))
        values = np.full((len(rows), len(columns)), np.nan)
        for name, method, mean in zip(_checkpoint_names(means), means["method"], means["mean"], strict=True):
            values[rows.index(name), columns.index(method)] = mean
        failed = np.zeros(values.shape, dtype=np.int64)
        for name, method, error in zip(names, told["method"], told["error"], strict=True):
            failed[rows.index(name), columns.index(method)] += isinstance(error, str)
        return cls(values, failed, tuple(rows), tuple(columns), measure)

    def plot(self, ax: Axes | None = None) -> GridDisplay:
        """Draw on `ax`, or on a new figure of pyplot; what is not known is hatched."""
        ax = _axes(ax, 3.0 + 1.3 * len(self.methods), 1.6 + 0.34 * len(self.checkpoints))
        form = ".3f" if np.nanmax(self.values) <= 1 else ".0f"
        texts = np.array(
            [
                ("failed" if failed else "") if math.isnan(value) else f"{value:{form}}" + " †" * bool(failed)
                for value, failed in zip(self.values.flat, self.failed.flat, strict=True)
            ]
        ).reshape(self.values.shape)
        ax.set_facecolor("0.94")
        ax.patch.set(hatch="///", edgecolor="0.82")
        sns.heatmap(
            self.values,
            ax=ax,
            mask=np.isnan(self.values),
            annot=texts,
            fmt="",
            annot_kws={"fontsize": _TICK},
            cmap="cividis",
            linewidths=1.5,
            xticklabels=list(self.methods),
            yticklabels=list(self.checkpoints),
            cbar=False,
        )
        for row, column in np.argwhere(np.isnan(self.values) & (self.failed > 0)):
            ax.text(column + 0.5, row + 0.5, "failed", ha="center", va="center", fontsize=_TICK)
        note = "; †: a seed failed" if (~np.isnan(self.values) & (self.failed > 0)).any() else ""
        name = _MEASURES.get(self.measure, self.measure.replace("_", " "))
        _label(ax, f"{name}\nmean over the seeds{note}", "", "")
        ax.tick_params(axis="y", rotation=0, length=0)
        ax.tick_params(axis="x", rotation=30 if len(self.methods) > 4 else 0, length=0)
        _keep(self, ax_=ax, figure_=ax.figure)
        return self


def _checkpoint_names(cells: pd.DataFrame) -> list[str]:
    """Names of checkpoints, with the images and the training seed where names alone are ambiguous."""
    several = cells["data"].nunique() > 1
    seeds = cells.groupby(["data", "checkpoint"], sort=False)["training_seed"].transform("nunique")
    columns = (cells[name] for name in ("data", "checkpoint", "training_seed"))
    return [
        (f"{data}: " if several else "") + name + (f", training seed {seed}" if count > 1 else "")
        for data, name, seed, count in zip(*columns, seeds, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class TradeOffDisplay:
    """What each method leaves of the attack against what it leaves of the accuracy.

    `points`: for each method float64 (N, 2), ASR and ACC on the same N attacked checkpoints, means over the seeds;
    `before` (N, 2), the same of the attacked networks. `means` and `intervals`, of `before` too, under "no defence":
    float64 (2,) and (2, 2), ASR then ACC, low then high, by a bootstrap over the checkpoints; NaN for a single one.
    """

    points: dict[str, Floats] = field(repr=False)
    before: Floats = field(repr=False)
    means: dict[str, Floats]
    intervals: dict[str, Floats] = field(repr=False)
    ax_: Axes = field(init=False, repr=False)
    figure_: Figure | SubFigure = field(init=False, repr=False)

    @classmethod
    def from_frame(cls, cells: pd.DataFrame) -> TradeOffDisplay:
        """Take the defences of `benchmark.frame`, on the attacked checkpoints that all of them were measured on.

        Raises `ValueError` where there is no such checkpoint.
        """
        import pandas as pd

        known = cells.dropna(subset=["asr", "asr_before"])
        unit = ["data", "checkpoint", "training_seed"]
        methods = list(dict.fromkeys(known["method"]))
        shared = known.groupby(unit, sort=False)["method"].transform("nunique") == len(methods)
        known = known[shared]
        if known.empty:
            raise ValueError(f"no attacked checkpoint was measured under each of {', '.join(methods) or 'no method'}")
        first = known[known["method"] == methods[0]].assign(method="no defence")
        first = first.assign(asr=first["asr_before"], acc=first["acc_before"])
        every = pd.concat([first, known])
        found = {name: summary(every, name, ("method",)).set_index("method") for name in ("asr", "acc")}
        points = {
            method: _array(group.groupby(unit, sort=True)[["asr", "acc"]].mean().to_numpy())
            for method, group in every.groupby("method", sort=False)
        }
        means, intervals = {}, {}
        for method in points:
            means[method] = np.array([found[name].loc[method, "mean"] for name in ("asr", "acc")])
            ends = [[found[name].loc[method, end] for end in ("low", "high")] for name in ("asr", "acc")]
            intervals[method] = np.array(ends, dtype=np.float64)
        return cls(points, points.pop("no defence"), means, intervals)

    def plot(self, ax: Axes | None = None) -> TradeOffDisplay:
        """Draw on `ax`, or on a new figure of pyplot: a faint mark a checkpoint, a full one for the mean."""
        ax = _axes(ax, 9, 5.2)
        count = len(self.before)
        everything = {"no defence": self.before} | self.points
        for index, (method, points) in enumerate(everything.items()):
            colour = _GREY if method == "no defence" else _METHODS[(index - 1) % len(_METHODS)]
            marker = _MARKERS[index % len(_MARKERS)]
            ax.plot(*points.T, marker, color=colour, alpha=0.3, markersize=6, markeredgewidth=0, gid=f"{method}, each")
            mean, ends = self.means[method], self.intervals[method]
            error = np.abs(ends - mean[:, None])
            style: dict[str, Any] = {"color": colour, "capsize": 3, "markersize": 11, "markeredgecolor": "white"}
            style |= {"xerr": error[:1].T, "yerr": error[1:].T, "fmt": marker, "label": method, "zorder": 3}
            drawn = ax.errorbar(mean[:1], mean[1:], **style)
            drawn.lines[0].set_gid(method)
        ax.plot(0, 1, "*", color="black", markersize=18, clip_on=False, label="ideal", zorder=4, gid="ideal")
        ax.set_xlim(-0.03, 1.03)
        lowest = min(points[:, 1].min() for points in everything.values())
        ax.set_ylim(lowest - 0.1 * (1 - lowest) - 1e-3, 1 + 0.05 * (1 - lowest) + 1e-3)
        ax.grid(color="0.9")
        over = f"mean and 95 % interval over {count} attacked checkpoints" if count > 1 else "one attacked checkpoint"
        _label(ax, f"What a defence leaves: {over}", _MEASURES["asr"], _MEASURES["acc"])
        _open(ax)
        ax.legend(fontsize=_TICK, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        _keep(self, ax_=ax, figure_=ax.figure)
        return self
