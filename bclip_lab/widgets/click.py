"""`ClickPicture`: a matplotlib figure in the page that is clicked, and stepped through with the keyboard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import anywidget
import traitlets
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bclip_lab.widgets.live import Picture

__all__ = ["ClickPicture", "Clickable"]


class Clickable(anywidget.AnyWidget):
    """The picture in the page (`click.js` beside this file).

    `png` is what it shows, `label` what a screen reader says of it. The page sends `{"x": x, "y": y}` for a
    click, as shares of the width and the height from the lower left corner, and `{"key": key}` for an arrow
    key, Page Up, Page Down, Home, End, Enter or the space bar.
    """

    _esm = Path(__file__).with_name("click.js")

    png = traitlets.Bytes(b"").tag(sync=True)
    label = traitlets.Unicode("").tag(sync=True)


class ClickPicture(Picture):
    """A `Picture` that can be clicked, and stepped through with the keyboard.

    Parameters
    ----------
    figure, moving
        As for `Picture`.
    on_click
        Called with the axes that were clicked and the place in them, in units of their data.
    on_key
        Called with the name of a key, as JavaScript has it: `"ArrowLeft"`.
    """

    STYLE = """<style>
.bclip-lab-click:focus-visible { outline: 2px solid var(--jp-brand-color1, #0173b2); outline-offset: 1px; }
</style>"""

    def __init__(
        self,
        figure: Figure,
        moving: Sequence[Artist],
        on_click: Callable[[Axes, float, float], object],
        on_key: Callable[[str], object],
    ) -> None:
        super().__init__(figure, moving)
        self._on_click, self._on_key = on_click, on_key
        self.widget = Clickable()
        self.widget.on_msg(self._receive)

    def update(self, label: str = "") -> None:
        """Show the picture as it is now, in `widget` and wherever else it was shown; `label` says it in words."""
        image = self._image()
        with self.widget.hold_sync():
            self.widget.png, self.widget.label = image.data, label
        self._update_still(image)

    def _receive(self, _: Any, content: dict[str, Any], __: Any) -> None:
        if "key" in content:
            self._on_key(content["key"])
            return
        place = self.figure.transFigure.transform((content["x"], content["y"]))
        for ax in self.figure.axes:
            if ax.bbox.padded(4).contains(*place):  # pixels: points lie on the edge of axes, too
                x, y = ax.transData.inverted().transform(place)
                self._on_click(ax, float(x), float(y))
                return
