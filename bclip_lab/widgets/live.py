"""What every widget needs: its messages on one thread, the newest value only, a picture that is updated, a shell.

While a cell runs JupyterLab delivers a widget's messages to a second thread of the kernel (a *subshell*),
and `comm` fires IPython's `pre_execute` and `post_execute` there, upon which the inline backend shows and
closes the figures of the running cell. `on_loop` hands the messages over to the loop of the main thread,
where they wait for the cell, and leaves the two events out.
"""

from __future__ import annotations

import asyncio
import io
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any, ClassVar

import ipywidgets as ipw
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image as Pillow

__all__ = ["LABEL", "TITLE", "Newest", "Picture", "Shell", "label", "on_loop", "running_loop", "said"]

TITLE, LABEL = 13, 12  # font sizes of the pictures


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
        self, function: Callable[[], object], loop: asyncio.AbstractEventLoop | None, settle: float = 0.002
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

    `widget` shows it in the page while there is a kernel. `show` shows the still picture, which a notebook
    without a kernel is left with; JupyterLab cannot update it any more once the notebook has been closed and
    opened again. It has to come directly below the output that holds `widget`, which hides it while `widget`
    is there.

    Parameters
    ----------
    figure
        Not one of pyplot.
    moving
        The artists that change from picture to picture, in the order they are drawn. All others are drawn
        once, and again after `redraw`.
    """

    STYLE = """<style>
.jp-OutputArea-child:has(.bclip-lab-picture) + .jp-OutputArea-child:has(> .jp-RenderedImage) { display: none; }
</style>"""

    widget: Any

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
        self.widget = ipw.Image(format="png", layout=ipw.Layout(align_self="flex-start", max_width="100%"))
        self.widget.add_class("bclip-lab-picture")

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
        """Show the picture as it is now, in `widget` and wherever else it was shown."""
        image = self._image()
        self.widget.value = image.data
        self._update_still(image)

    def _update_still(self, image: Any) -> None:
        if self._shown:
            self._handle.update(image)  # type: ignore[no-untyped-call]

    def _image(self) -> Any:
        from IPython.display import Image

        return Image(data=self.png(), format="png")  # type: ignore[no-untyped-call]


class Shell(ABC):
    """What the four widgets share: `widget` is shown as a cell's last line, with the picture below it.

    A child sets `_picture` and `widget`, and shows its state in `_compute`; `_later` calls that for the newest state
    only.
    """

    STYLE = (
        "<style>.bclip-lab-error { color: var(--jp-error-color1, #b00020); font-weight: 600; }</style>" + Picture.STYLE
    )

    _purpose: ClassVar[str]  # what the cell is run for, for readers without a kernel
    _picture: Picture
    _first: bytes | None = None  # a still picture of the controls, for them
    widget: Any

    def __init__(self) -> None:
        self._quiet = False  # whether a control that changes is set by us
        self._loop = running_loop()
        self._later = Newest(self._compute, self._loop)
        self._status = ipw.HTML()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        bundle: dict[str, Any] = dict(self.widget._repr_mimebundle_())
        bundle["text/plain"] = f"{type(self).__name__}: run this cell in JupyterLab to {self._purpose}."
        if self._first is not None:
            bundle["image/png"] = self._first  # where there are no widgets: GitHub, nbconvert
        display(bundle, raw=True)  # type: ignore[no-untyped-call]
        self._picture.show()

    @abstractmethod
    def _compute(self) -> None:
        """Show the state as it is now."""

    def _on_value(self, control: Any, react: Callable[[Any], None], name: str = "value") -> None:
        """Have a function called with what the page makes of a control's trait."""

        def changed(change: Any) -> None:
            if not self._quiet:
                react(change["new"])

        control.observe(changed, names=name)

    @contextmanager
    def _said_by_us(self) -> Iterator[None]:
        """Within the block, controls that change are set by us, not by the page."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    @contextmanager
    def _reported(self, *expected: type[Exception]) -> Iterator[None]:
        """Show an error, which else is seen in the kernel's log only; one that is expected is only shown."""
        try:
            yield
        except Exception as error:
            known = isinstance(error, expected)
            self._say(str(error) if known else f"{type(error).__name__}: {error}", wrong=True)
            if not known:
                raise

    def _say(self, text: str, wrong: bool = False) -> None:
        self._status.value = said(text, wrong)


def said(text: str, wrong: bool = False) -> str:
    """A line of a widget's status, as HTML; nothing for no text."""
    mark = " bclip-lab-error" if wrong else ""
    return f'<span class="bclip-lab-status{mark}">{escape(text)}</span>' if text else ""


def label(ax: Axes, title: str, x: str, y: str, tick: int) -> None:
    """Label axes as all pictures of the widgets are; `tick` is the font size of the ticks."""
    ax.set_title(title, fontsize=TITLE)
    ax.set_xlabel(x, fontsize=LABEL)
    ax.set_ylabel(y, fontsize=LABEL)
    ax.tick_params(labelsize=tick)
    ax.spines[["top", "right"]].set_visible(False)
