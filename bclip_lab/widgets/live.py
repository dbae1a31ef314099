"""What every widget needs: its messages on one thread, the newest value only, a picture that is updated.

While a cell runs JupyterLab delivers a widget's messages to a second thread of the kernel (a *subshell*),
and `comm` fires IPython's `pre_execute` and `post_execute` there, upon which the inline backend shows and
closes the figures of the running cell. `on_loop` hands the messages over to the loop of the main thread,
where they wait for the cell, and leaves the two events out.
"""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image as Pillow

__all__ = ["Newest", "Picture", "on_loop", "running_loop"]


def running_loop() -> asyncio.AbstractEventLoop | None:
    """The event loop that runs this code, as a kernel's does; None in a plain script."""
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def on_loop(widget: Any, loop: asyncio.AbstractEventLoop | None) -> None:
    """Handle the messages of a widget, and of the widgets in it, on this thread, which runs `loop`.

    A message that comes on this thread is handled at once; one that comes on another waits for the loop.
    """
    home = threading.get_ident()

    def handler(handle: Callable[[Any], None]) -> Callable[[Any], None]:
        def handle_msg(message: Any) -> None:
            if loop is None or threading.get_ident() == home:
                handle(message)
            else:
                loop.call_soon_threadsafe(handle, message)  # in this thread's context: it has the parent

        return handle_msg

    if widget.comm is not None:
        widget.comm.handle_msg = handler(widget._handle_msg)
    for child in getattr(widget, "children", ()):
        on_loop(child, loop)


class Newest:
    """Calls a function for the newest state only.

    `ask` asks for a call, which the loop makes after `settle` seconds; until then asking again changes
    nothing. The function takes no arguments: it looks at what is to be shown when it is called. Where there
    is no loop it is called at once. Any thread may ask.
    """

    def __init__(
        self, function: Callable[[], object], loop: asyncio.AbstractEventLoop | None, settle: float = 0.01
    ) -> None:
        self._function = function
        self._loop = loop
        self._settle = settle
        self._lock = threading.Lock()
        self._asked = False

    def ask(self) -> None:
        """Ask for a call."""
        with self._lock:
            before, self._asked = self._asked, True
        if self._loop is None:
            self._run()
        elif not before:
            # messages that came while the function ran are handled before it runs again
            self._loop.call_soon_threadsafe(self._loop.call_later, self._settle, self._run)

    def _run(self) -> None:
        with self._lock:
            self._asked = False
        self._function()


class Picture:
    """A figure in a notebook's output, updated in place and saved with the notebook.

    Parameters
    ----------
    figure
        Not one of pyplot.
    moving
        The artists that change from picture to picture, in the order they are drawn. All others are drawn
        once, and again after `redraw`.
    """

    def __init__(self, figure: Figure, moving: Sequence[Artist]) -> None:
        from IPython.display import DisplayHandle

        self.figure = figure
        self._canvas = FigureCanvasAgg(figure)
        self._moving = moving
        for artist in moving:
            artist.set_animated(True)  # left out by draw()
        self._still: Any = None
        self._handle = DisplayHandle()  # type: ignore[no-untyped-call]
        self._shown = False

    def redraw(self) -> None:
        """Draw everything for the next picture, not the moving artists only."""
        self._still = None

    def png(self) -> bytes:
        """The picture as it is now."""
        if self._still is None:
            self._canvas.draw()  # type: ignore[no-untyped-call]
            self._still = self._canvas.copy_from_bbox(self.figure.bbox)  # type: ignore[no-untyped-call]
        else:
            self._canvas.restore_region(self._still)  # type: ignore[no-untyped-call]
        for artist in self._moving:
            self.figure.draw_artist(artist)
        pixels = np.asarray(self._canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]
        out = io.BytesIO()
        Pillow.fromarray(np.ascontiguousarray(pixels)).save(out, "png", compress_level=1)
        return out.getvalue()

    def show(self) -> None:
        """Show the picture below the cell that runs; further calls show it there, too."""
        self._handle.display(self._image())  # type: ignore[no-untyped-call]
        self._shown = True

    def update(self) -> None:
        """Show the picture as it is now wherever it was shown."""
        if self._shown:
            self._handle.update(self._image())  # type: ignore[no-untyped-call]

    def _image(self) -> Any:
        from IPython.display import Image

        return Image(data=self.png(), format="png")  # type: ignore[no-untyped-call]
