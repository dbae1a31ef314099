"""`BarStrip`: groups of bars in the page, one of which is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import anywidget
import numpy as np
import traitlets

from bclip_lab.widgets.drag import Steps

__all__ = ["BarStrip"]


class BarStrip(anywidget.AnyWidget):  # type: ignore[misc]
    """Groups of bars side by side; a click or the arrow keys choose one, Escape none.

    Parameters
    ----------
    names
        What the groups are called; that of the chosen one, or the one under the pointer, stands below it.
    chosen
        Index of a group, -1 for none. Observe it.
    none
        What stands there when none is chosen.
    title
        Stands above.
    height
        CSS pixels; as it is when the widget is shown.

    Examples
    --------
    >>> strip = BarStrip(title="maximum", none="all")
    >>> strip.draw([Steps("clean", "#0173b2", [3.0, 1.0])], names=["a", "b"])
    >>> strip.chosen
    -1
    """

    _esm = Path(__file__).with_name("strip.js")

    names = traitlets.List().tag(sync=True)
    chosen = traitlets.Int(-1).tag(sync=True)
    none = traitlets.Unicode("").tag(sync=True)
    title = traitlets.Unicode("").tag(sync=True)
    height = traitlets.Int(130).tag(sync=True)
    _series = traitlets.List().tag(sync=True)
    _heights = traitlets.Bytes(b"").tag(sync=True)

    def draw(self, series: Sequence[Steps], names: Sequence[str], chosen: int = -1) -> None:
        """Show other groups: of every series one bar a group, of the given heights (G,), at least 0.

        Raises
        ------
        ValueError
            Heights of another number of groups, or `chosen` is none of them.
        """
        heights = [np.asarray(each.heights, dtype="<f4") for each in series]
        for each, values in zip(series, heights, strict=True):
            if values.shape != (len(names),):
                raise ValueError(f"{each.name!r} must have {len(names)} heights, got shape {values.shape}")
        if not -1 <= chosen < len(names):
            raise ValueError(f"chosen must lie in [-1, {len(names)}), got {chosen}")
        with self.hold_sync():
            self._series = [{"name": s.name, "colour": s.colour} for s in series]
            self._heights = b"".join(values.tobytes() for values in heights)
            self.names, self.chosen = list(names), chosen
