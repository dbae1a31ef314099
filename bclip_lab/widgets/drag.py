"""`DragLine`: histograms in the page, and one vertical line that is dragged over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets

__all__ = ["DragLine", "Steps"]


@dataclass(frozen=True, eq=False)
class Steps:
    """One step histogram: the heights (B,) of its bins, at least 0, and how it is drawn.

    `colour` is a CSS colour, such as `plots.CLEAN`; `hatched` tells a series apart without it.
    """

    name: str
    colour: str
    heights: Any
    hatched: bool = False


class DragLine(anywidget.AnyWidget):
    """Step histograms with one vertical line that is dragged in the page.

    The line follows the pointer in the browser, without the kernel (`drag.js` beside this file). `value`
    comes to the kernel at most once a frame, and the last one for certain; observe it. A press near the line
    takes hold of it, one elsewhere in the picture moves it there. The picture can be focused: the arrow keys
    move the line by `step`, Page Up and Page Down by ten steps, Home and End to the ends of the axis.

    A movement is of the histograms that the page shows when it begins. If the kernel has drawn others by the time it
    comes, because the kernel was busy, it is not taken and the line goes back.

    The picture is as wide as its container and takes its colours from JupyterLab's theme. Without a kernel it
    is blank: show a still picture beside it.

    All arguments are traits, of the names given here, and can be set later; the page follows. Set those
    that belong together within `with line.hold_sync():`.

    Parameters
    ----------
    value
        Where the line is. The page keeps it within [`low`, `high`]; what the kernel sets beyond is drawn at the end.
    low, high
        The ends of the axis, `low` below `high`.
    name
        What the line is, a word or two that stand beside it, and its name for screen readers.
    at_high
        What to say instead of the number when the line is at `high`, such as `"no bound"`.
    step
        Of the arrow keys, in units of the axis; 0 is a hundredth of the axis.
    title, x_label, y_label
        Texts of the picture.
    percent
        Whether the axis is labelled in per cent: 0.5 as 50 %.
    log_y
        Whether heights are drawn on a logarithmic scale. Bins of height 0 are empty then, too.
    height
        CSS pixels; as it is when the widget is shown.

    Attributes
    ----------
    gesture
        Counts the drags and the series of key presses: two values of one gesture belong to one movement of
        the hand, which `undo` should take back as one. Sent together with `value`.

    Examples
    --------
    >>> line = DragLine(value=0.5, low=0.0, high=2.0, name="threshold")
    >>> line.draw([Steps("clean", "#0173b2", [3, 1])], edges=[0.0, 1.0, 2.0])
    >>> line.value
    0.5
    """

    _esm = Path(__file__).with_name("drag.js")

    value = traitlets.Float(0.0).tag(sync=True)
    low = traitlets.Float(0.0).tag(sync=True)
    high = traitlets.Float(1.0).tag(sync=True)
    name = traitlets.Unicode("").tag(sync=True)
    at_high = traitlets.Unicode("").tag(sync=True)
    step = traitlets.Float(0.0).tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)
    x_label = traitlets.Unicode("").tag(sync=True)
    y_label = traitlets.Unicode("").tag(sync=True)
    percent = traitlets.Bool(False).tag(sync=True)
    log_y = traitlets.Bool(False).tag(sync=True)
    height = traitlets.Int(300).tag(sync=True)
    gesture = traitlets.Int(0).tag(sync=True)
    _series: Any = traitlets.List().tag(sync=True)
    _edges = traitlets.Bytes(b"").tag(sync=True)
    _heights = traitlets.Bytes(b"").tag(sync=True)
    _drawn = traitlets.Int(0, help="how often the histograms have been drawn").tag(sync=True)
    _over = traitlets.Int(0, help="`_drawn` as the page had it when the latest movement began").tag(sync=True)

    def __init__(self, **traits: Any) -> None:
        super().__init__(**traits)
        self.on_msg(self._settle)

    def _settle(self, _: object, content: Any, __: object) -> None:
        """The hand has come to rest: take the value, which may have come as an update already."""
        self.set_state(content)

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Take traits from the page, but no value of a movement over other histograms than there are now."""
        super().set_state({name: value for name, value in sync_data.items() if name != "value"})
        if "value" in sync_data and self._over == self._drawn:
            super().set_state({"value": sync_data["value"]})
        elif "value" in sync_data:
            self.send_state("value")

    def draw(self, series: Sequence[Steps], edges: Any) -> None:
        """Show other histograms; the line and the texts stay.

        Parameters
        ----------
        series
            Drawn in this order, the last one on top.
        edges
            (B + 1,) ascending, in units of the axis; shared by all series.

        Raises
        ------
        ValueError
            Edges that do not ascend or are not finite, or heights of another number of bins, below 0 or not
            finite.
        """
        edges = np.asarray(edges, dtype="<f4")
        if edges.ndim != 1 or len(edges) < 2 or not (np.isfinite(edges).all() and (np.diff(edges) > 0).all()):
            raise ValueError(f"edges must be at least 2 finite, ascending numbers, got {edges}")
        heights = [np.asarray(each.heights, dtype="<f4") for each in series]
        for each, values in zip(series, heights, strict=True):
            if values.shape != (len(edges) - 1,):
                raise ValueError(f"{each.name!r} must have {len(edges) - 1} heights, got shape {values.shape}")
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ValueError(f"the heights of {each.name!r} must be finite and at least 0")
        with self.hold_sync():
            self._series = [{"name": s.name, "colour": s.colour, "hatched": s.hatched} for s in series]
            self._drawn += 1
            self._edges = edges.tobytes()
            self._heights = b"".join(values.tobytes() for values in heights)
