"""`Paint`: a small picture, magnified, that is painted in the page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import traitlets
from numpy.typing import NDArray

__all__ = ["Paint"]


class Paint(anywidget.AnyWidget):
    """A small RGBA picture, magnified over a backdrop, that is painted with the mouse or the keyboard.

    What is painted appears in the browser at once, without the kernel (`paint.js` beside this file); the pixels come
    to the kernel at most once a frame, and at the end of a stroke for certain (`on_paint`). The canvas can be focused:
    the arrow keys move a cursor, Space paints, Delete and Backspace erase.

    The page sends messages and does not set traits, since ipywidgets holds traits back while the kernel is busy: the
    end of a stroke would come after the click on a button that followed it.

    Parameters
    ----------
    pixels
        uint8 (H, W, 4), RGBA. Set the trait `pixels`, to its bytes, for another picture.
    backdrop
        uint8 (H, W, 3): what is shown, dimmed, behind the picture.
    colours
        CSS colours, "#rrggbb", to choose from with one click.

    Examples
    --------
    >>> paint = Paint(np.zeros((2, 3, 4), np.uint8), np.zeros((2, 3, 3), np.uint8), ["#ff0000"])
    >>> paint.width, paint.height, len(paint.pixels)
    (3, 2, 24)
    """

    _esm = Path(__file__).with_name("paint.js")

    width = traitlets.Int().tag(sync=True)
    height = traitlets.Int().tag(sync=True)
    pixels = traitlets.Bytes().tag(sync=True)
    backdrop = traitlets.Bytes().tag(sync=True)
    colours = traitlets.List(traitlets.Unicode()).tag(sync=True)
    handled = traitlets.Int(0, help="how many of the page's messages have been handled").tag(sync=True)

    def __init__(self, pixels: NDArray[np.uint8], backdrop: NDArray[np.uint8], colours: list[str]) -> None:
        height, width = pixels.shape[:2]
        opaque = np.dstack([backdrop, np.full((height, width, 1), 255, np.uint8)])
        super().__init__(
            width=width, height=height, pixels=pixels.tobytes(), backdrop=opaque.tobytes(), colours=colours
        )

    def on_paint(self, react: Callable[[NDArray[np.uint8], float], object]) -> None:
        """Have a function called with the pixels, uint8 (H, W, 4), and the number of their stroke."""

        def handle(_: Any, content: Any, buffers: Any) -> None:
            with self.hold_sync():  # one message back
                self.pixels = bytes(buffers[0])
                self.handled += 1
            pixels = np.frombuffer(self.pixels, np.uint8).reshape(self.height, self.width, 4)
            react(pixels, float(content["stroke"]))

        self.on_msg(handle)
