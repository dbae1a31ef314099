"""`ActivationExplorer`: a heat map of the channels, and the images that excite the chosen one, live."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from math import floor
from typing import Any

import ipywidgets as ipw
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import nn
from torch.nn.functional import interpolate

from bclip_lab.data.images import Attack, Splits
from bclip_lab.plots import CLEAN, TRIGGERED, AbnormalityDisplay
from bclip_lab.widgets.activations import ActivationExploration, Excited
from bclip_lab.widgets.click import ClickPicture
from bclip_lab.widgets.live import LABEL, Shell, on_loop

__all__ = ["ActivationExplorer"]

_SHOWN = 6  # images of each kind
_ROWS = (("clean\nimages", CLEAN), ("triggered\nimages", TRIGGERED), ("the same\nwithout\ntrigger", CLEAN))
_COLOURS = colormaps["inferno"]
# in the picture itself: it is all that a page without a kernel shows
_HOW = "Run this cell in JupyterLab; then click a cell of the heat map, or click once and walk with the arrow keys."
_TICK = 10
_STEPS = {
    "ArrowLeft": (0, -1), "ArrowRight": (0, 1), "ArrowUp": (-1, 0), "ArrowDown": (1, 0),
    "PageUp": (0, -10), "PageDown": (0, 10), "Home": (0, -10**6), "End": (0, 10**6),
}  # fmt: skip


class ActivationExplorer(Shell):
    """A heat map of sites and channels, and the images that excite the chosen channel most.

    Shows itself as the last line of a notebook's cell. A cell of the heat map is a channel, coloured by how
    far triggered images exceed its clean maximum. Click one, or walk with the arrow keys once the picture has
    the focus (Page Up and Page Down are ten channels, Home and End the ends of a row), or type its number.
    Below are the clean and the triggered images on which the channel is largest, and the same images without
    the trigger, with the activation map of the channel laid over them. All maps have one colour scale.

    Moves that are made while a cell runs take effect after it. Without a kernel the picture remains.
    `bclip_lab.widgets` says what happens when cells are run again, the kernel restarts or the notebook is reopened.

    Parameters
    ----------
    model
        A classifier. Of a `ClippedModel` the original is looked at, without bounds.
    splits
        `test` gives the images.
    attack
        Makes the triggered images.
    images
        At most so many clean test images, and what the attack makes of them, are used.
    seed
        Which ones, where there are more.

    Attributes
    ----------
    state
        The `ActivationExploration` behind it. After choosing in a cell, call `refresh`.
    widget
        The controls and the picture, an ipywidgets `VBox`.
    figure
        The picture, a matplotlib figure.

    Raises
    ------
    ValueError
        As `ActivationExploration`.
    """

    _picture: ClickPicture
    _purpose = "choose a channel"

    def __init__(self, model: nn.Module, splits: Splits, attack: Attack, *, images: int = 500, seed: int = 0) -> None:
        super().__init__()
        self.state = ActivationExploration(model, splits, attack, images=images, seed=seed)
        self._drawing = _Drawing(self.state, self._click, self._press)
        self.figure, self._picture = self._drawing.figure, self._drawing.picture

        self._site = ipw.Dropdown(options=self.state.sites, description="site", layout=ipw.Layout(width="300px"))
        self._channel = ipw.BoundedIntText(description="channel", layout=ipw.Layout(width="170px"))
        self._maps = ipw.Checkbox(value=True, description="activation maps over the images", indent=False)
        about = ipw.HTML(
            '<div style="line-height:1.4">'
            f"Measured on {len(self.state.clean):,} clean test images and on what the attack makes of them "
            f"({len(self.state.triggered):,} triggered images). Under each image stand the channel’s largest "
            "activation on it and its true class, and after the arrow what the network decides.</div>"
        )
        self.widget = ipw.VBox(
            [
                ipw.HTML(self.STYLE + ClickPicture.STYLE),
                ipw.HBox([self._site, self._channel, self._maps], layout=ipw.Layout(flex_flow="row wrap")),
                self._picture.widget,
                self._status,
                about,
            ]
        )
        self._on_value(self._site, self._choose_site)
        self._on_value(self._channel, self._choose_channel)
        self._on_value(self._maps, lambda _: self._later.ask())
        on_loop(self.widget, self._loop)
        self.refresh()

    def refresh(self) -> None:
        """Show what is chosen in `state`, after a cell has changed it."""
        self._sync()
        self._compute()

    # --- what is done ---

    def _choose_site(self, site: str) -> None:
        self.state.choose(site)
        self._chosen()

    def _choose_channel(self, channel: int) -> None:
        self.state.choose(self.state.site, channel)
        self._chosen()

    def _click(self, ax: Axes, x: float, y: float) -> None:
        if ax is self._drawing.heat and self.state.choose_cell(floor(y), floor(x)):
            self._chosen()

    def _press(self, key: str) -> None:
        if key in _STEPS:
            self.state.step(*_STEPS[key])
            self._chosen()

    def _chosen(self) -> None:
        self._sync()
        self._later.ask()

    # --- what is shown ---

    def _sync(self) -> None:
        """Set the controls to what the state is."""
        state = self.state
        with self._said_by_us():
            self._site.value = state.site
            self._channel.max = len(state.ratios[state.site]) - 1
            self._channel.value = state.channel

    def _compute(self) -> None:
        with self._reported():
            self._picture.update(self._drawing.draw(self._maps.value))
            self._say("")


class _Drawing:
    """The picture: the heat map, and below it the images."""

    def __init__(
        self,
        state: ActivationExploration,
        on_click: Callable[[Axes, float, float], object],
        on_key: Callable[[str], object],
    ) -> None:
        self.state = state
        heights = 1.5 + 0.24 * len(state.sites), 4.7, 0.25
        self.figure = Figure(figsize=(11.5, sum(heights)), dpi=100, facecolor="white", layout="constrained")
        parts: Any = self.figure.subfigures(3, 1, height_ratios=heights)
        upper, lower, bottom = parts
        bottom.text(0.01, 0.5, _HOW, fontsize=_TICK, color="0.35", va="center")
        self.heat = upper.add_subplot()
        AbnormalityDisplay({site: values.double().numpy() for site, values in state.ratios.items()}).plot(self.heat)
        frame = Rectangle((0, 0), 1, 1, fill=False, edgecolor="black", linewidth=2.5, clip_on=False)
        self._mark = self.heat.add_patch(frame)
        self._mark.set_path_effects([withStroke(linewidth=5, foreground="white")])

        self._head = lower.text(0.01, 0.955, "", fontsize=LABEL, va="center")
        scale = lower.add_axes((0.8, 0.935, 0.13, 0.035))
        scale.imshow(_COLOURS(np.linspace(0, 1, 100))[None, :, :3], aspect="auto", extent=(0, 1, 0, 1))
        scale.set(xticks=[], yticks=[])
        lower.text(0.79, 0.952, "maps: 0", fontsize=_TICK, va="center", ha="right")
        self._largest = lower.text(0.938, 0.952, "", fontsize=_TICK, va="center")
        self._images: list[list[Any]] = []
        self._texts: list[list[Any]] = []
        for row, (name, colour) in enumerate(_ROWS):
            low = 0.62 - 0.3 * row
            lower.text(0.01, low + 0.14, name, color=colour, fontsize=LABEL, weight="bold", va="center")
            axes = [lower.add_axes((0.1 + 0.15 * i, low + 0.085, 0.14, 0.205)) for i in range(_SHOWN)]
            self._images.append([ax.imshow(np.ones((1, 1, 3)), extent=(0, 1, 0, 1)) for ax in axes])
            self._texts.append(
                [ax.text(0.5, -0.05, "", transform=ax.transAxes, fontsize=_TICK, ha="center", va="top") for ax in axes]
            )
            for ax in axes:
                ax.set_axis_off()
        self.figure.draw_without_rendering()
        self.figure.set_layout_engine("none")  # else each whole drawing would shift things a little
        moving = [self._mark, self._head, self._largest, *chain(*self._images, *self._texts)]
        self.picture = ClickPicture(self.figure, moving, on_click, on_key)

    def draw(self, maps: bool) -> str:
        """Bring the artists to the state, and say what is chosen."""
        state = self.state
        row, column = state.cell
        self._mark.set_xy((column, row))
        clean, triggered = state.maxima
        count = len(state.ratios[state.site])
        said = (
            f"{state.site}, channel {state.channel}: at most {clean:.3g} on clean images, {triggered:.3g} on "
            f"triggered ones (×{state.ratio:.3g})"
        )
        self._head.set_text(said)
        shown = state.excited(_SHOWN)
        largest = max(clean, triggered)
        self._largest.set_text(f"{largest:.3g}")
        for excited, images, texts in zip(shown, self._images, self._texts, strict=True):
            pixels = _laid_over(excited, largest, maps)
            for i, (image, text) in enumerate(zip(images, texts, strict=True)):
                image.set_visible(i < len(pixels))
                text.set_visible(i < len(pixels))
                if i < len(pixels):
                    image.set_data(pixels[i])
                    text.set_text(self._caption(excited, i))
        return f"{said}; number {column + 1} of {count} channels of the site, the most abnormal first"

    def _caption(self, excited: Excited, i: int) -> str:
        true, decision = (self.state.clean.classes[int(each[i])] for each in (excited.labels, excited.decisions))
        return f"{float(excited.values[i]):.3g} · {true}\n→ {decision}"


def _laid_over(excited: Excited, largest: float, maps: bool) -> Any:
    """The images (n, H, W, 3) in [0, 1]; with `maps` in grey, the more under colour the larger the activation."""
    images = excited.images.permute(0, 2, 3, 1).double().numpy()
    grey = images.mean(-1, keepdims=True).repeat(3, -1)
    if not maps or excited.maps is None:
        return images if images.shape[-1] == 3 else grey
    height, width = excited.images.shape[2:]
    share = interpolate(excited.maps[:, None], (height, width), mode="nearest-exact")[:, 0].double().numpy()
    share = np.clip(share / largest, 0, 1) if largest > 0 else 0 * share
    opacity = 0.85 * share[..., None] ** 0.5  # the root: else a third of the largest would hardly be seen
    return (1 - opacity) * 0.8 * grey + opacity * _COLOURS(share)[..., :3]
