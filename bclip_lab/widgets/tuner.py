"""`BoundTuner`: the bounds of a clipped model, dragged in a picture, and what they do, live."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ipywidgets as ipw
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import Attack, Splits
from bclip_lab.defenses import EARLY_SITES, MMACConfig, MMBMConfig, mmac, mmbm
from bclip_lab.plots import CLEAN, TRIGGERED
from bclip_lab.widgets.drag import DragLine, Steps
from bclip_lab.widgets.live import LABEL, Picture, Shell, label, on_loop
from bclip_lab.widgets.strip import BarStrip
from bclip_lab.widgets.tuning import BoundTuning, Measured

__all__ = ["BoundTuner"]

_BINS = 60
_FURTHEST = 5.0  # multiples of 100 % that the histogram of a site shows
_NO_BOUND = 150  # per cent: the end of the slider for all sites
_TICK = 11
_PAUSE = 1.0  # seconds: moves of the slider that follow one another faster are one step for undo
_LEARN: Mapping[str, Callable[[ClippedModel, Any], Any]] = {
    "MM-BM": lambda clipped, clean: mmbm(clipped, clean, _mmbm_config(clipped)),
    "MMAC, published": lambda clipped, clean: mmac(clipped, clean, MMACConfig.published()),
    "MMAC": mmac,
}

_STYLE = """<style>
.bclip-lab-sites button { font-family: var(--jp-code-font-family, monospace); font-size: 12px; text-align: left;
  white-space: pre; width: 100%; }
.bclip-lab-numbers { display: flex; flex-wrap: wrap; gap: 4px 40px; line-height: 1.35; font-size: 14px; }
.bclip-lab-numbers b { font-size: 28px; font-variant-numeric: tabular-nums; }
.bclip-lab-numbers .name { font-size: 18px; font-weight: 600; }
.bclip-lab-numbers .before { opacity: 0.75; }
</style>"""


@dataclass
class _Learning:
    """A fit that runs, and the bounds after its latest whole epoch."""

    name: str
    model: ClippedModel
    steps: Generator[Any, None, None]
    bounds: dict[str, Tensor] | None = None


class BoundTuner(Shell):
    """The bounds of a clipped model to drag, with ACC, ASR and RA and a picture that follow.

    Shows itself as the last line of a notebook's cell. On the left are the sites, with the largest triggered
    activation of each as a multiple of the largest clean one. For the chosen site the histogram shows the
    largest activation of every test image, without bounds, over all channels or at one; the line in it is the
    bound and can be dragged, or moved by the arrow keys. At the right end there is no bound. Over all channels
    the line is the scale of the site: 100 % are the channels' largest activations on the defender's clean
    images, or bounds that were loaded. Below, a strip of the site's channels, the most abnormal first, to
    choose one by a click or the arrow keys; Escape chooses all of them.

    Everything is measured on a sample of the test images, whose counts are shown. The bounds go to `clipped`
    itself: what is shown is what the next cell works with. Whatever else sets its bounds (a fit, a second
    tuner) is not seen here; `tuner.load(clipped.bounds)` takes such bounds over. Moves that are made while a
    cell runs take effect after it. Bounds that a button learns are taken when its fit ends, or at *Stop* those of the
    latest whole epoch; meanwhile the tuner can be used.

    Without a kernel (a notebook that is read on a web page) pictures of the first and of the last state remain.
    `bclip_lab.widgets` says what happens when cells are run again, the kernel restarts or the notebook is reopened.

    Parameters
    ----------
    clipped
        The model whose bounds are tuned, starting with those that it has.
    splits
        `defender` gives the clean maxima and the images to learn from, `test` the images that judge.
    attack
        Makes the triggered images.
    images
        At most so many clean and so many triggered test images are used.
    seed
        Which ones, where there are more.
    memory
        Bytes that may be kept so that only the network behind the moved bound is computed again.

    Attributes
    ----------
    state
        The `BoundTuning` behind the controls. After changing it in a cell, call `refresh`.
    widget
        The controls, an ipywidgets `VBox`.
    figure
        The picture, a matplotlib figure.

    Raises
    ------
    ValueError
        As `BoundTuning`.
    """

    _purpose = "move the bounds"

    def __init__(
        self,
        clipped: ClippedModel,
        splits: Splits,
        attack: Attack,
        *,
        images: int = 500,
        seed: int = 0,
        memory: int = 200_000_000,
    ) -> None:
        super().__init__()
        self.state = BoundTuning(clipped, splits, attack, images=images, seed=seed, memory=memory)
        self._drawing = _Drawing(self.state)
        self.figure, self._picture = self._drawing.figure, self._drawing.picture
        self._gesture: object = None  # the movement of the hand that the latest change belongs to
        self._slid = -math.inf
        self._stale = False  # whether the bounds have changed since they were measured
        self._seconds = 0.0
        self._learning: _Learning | None = None

        ratios = {site: float(values.max()) for site, values in self.state.abnormality.items()}
        self._site = ipw.ToggleButtons(
            options=[(_site_row(site, ratio, max(ratios.values())), site) for site, ratio in ratios.items()],
            value=max(ratios, key=lambda site: ratios[site]),
            tooltips=[f"largest triggered activation: {ratio:.3g} × the clean maximum" for ratio in ratios.values()],
            style={"button_width": "auto"},
            layout=ipw.Layout(width="100%"),
        )
        self._site.add_class("bclip-lab-sites")
        self._channel: int | None = None  # None for all channels together
        self._line = DragLine(name="bound", at_high="none", height=270)
        self._strip = BarStrip(none="all channels together")
        self._order: list[int] = []  # the channels as the strip shows them
        self._scale = _box("site, %", "Scale of the chosen site in per cent, or 'none'")
        self._bound = _box("channel", "Bound of the chosen channel: a number, 'none', or empty for that of the site")
        self._together = ipw.Button(description="All channels", tooltip="Choose all channels together")
        self._all = ipw.IntSlider(
            value=_NO_BOUND,
            min=0,
            max=_NO_BOUND,
            description="all sites, %",
            tooltip=f"all sites together; at {_NO_BOUND} % there is no bound",
            style={"description_width": "82px"},
            layout=ipw.Layout(width="310px"),
        )
        self._undo, self._redo, self._reset_site, self._reset_all = (
            ipw.Button(description=name, icon=icon, tooltip=tip, layout=ipw.Layout(width="auto"))
            for name, icon, tip in (
                ("Undo", "undo", "Take the latest change back"),
                ("Redo", "repeat", "Make it again"),
                ("Reset site", "eraser", "Take all bounds off the chosen site"),
                ("Reset all", "trash", "Take all bounds off"),
            )
        )
        self._learn = {
            name: ipw.Button(description=name, tooltip=f"Learn bounds by {name}", layout=ipw.Layout(width="auto"))
            for name in _LEARN
        }
        self._stop = ipw.Button(
            description="Stop", icon="stop", tooltip="Keep the bounds learned so far", disabled=True,
            layout=ipw.Layout(width="auto"),
        )  # fmt: skip
        self._file = ipw.Text(value="bounds.safetensors", tooltip="File for bounds", layout=ipw.Layout(width="180px"))
        self._save, self._open = (
            ipw.Button(description=name, layout=ipw.Layout(width="auto")) for name in ("Save", "Load")
        )
        self._numbers, self._progress = ipw.HTML(), ipw.HTML()
        self.widget = self._laid_out()
        self._connect()
        on_loop(self.widget, self._loop)
        self.state.prepare(self._site.value)
        self._show_site()
        self._draw()
        self._first = _still(self.state, self._site.value)

    def load(self, bounds: Mapping[str, Tensor | float]) -> None:
        """Take bounds, such as those that a fit has learned (`BoundTuning.load`), and show them."""
        self.state.load(bounds)
        self.refresh()

    def refresh(self) -> None:
        """Measure the bounds of `state` and show them, after a cell has changed them."""
        self._stale = True
        self._show_site()
        self._compute()

    # --- controls ---

    def _laid_out(self) -> Any:
        state = self.state
        row = ipw.Layout(flex_flow="row wrap")
        left = ipw.VBox(
            [
                ipw.Label("site, and triggered ÷ clean maximum"),
                ipw.VBox([self._site], layout=ipw.Layout(max_height="330px", overflow="hidden auto")),
                self._all,
            ],
            layout=ipw.Layout(flex="1 1 300px", max_width="330px"),
        )
        right = ipw.VBox(
            [self._line, self._strip, ipw.HBox([self._scale, self._bound, self._together], layout=row)],
            layout=ipw.Layout(flex="2 1 480px"),
        )
        about = ipw.HTML(
            '<div style="line-height:1.4">'
            f"Measured on {len(state.clean):,} of {state.available:,} clean test images and on "
            f"{len(state.triggered):,} triggered ones. 100 % is a channel’s largest activation on the "
            f"defender’s {len(state.defender):,} clean images, or its bound that was loaded.</div>"
        )
        return ipw.VBox(
            [
                ipw.HTML(self.STYLE + _STYLE),
                self._numbers,
                ipw.HBox([left, right], layout=ipw.Layout(flex_flow="row wrap", grid_gap="0 12px")),
                ipw.HBox([self._undo, self._redo, self._reset_site, self._reset_all, self._status], layout=row),
                ipw.HBox([ipw.Label("Learn:"), *self._learn.values(), self._stop, self._progress], layout=row),
                ipw.HBox([ipw.Label("Bounds:"), self._file, self._save, self._open], layout=row),
                about,
                self._picture.widget,
            ]
        )

    def _connect(self) -> None:
        self._on_value(self._line, self._drag)
        self._on_value(self._all, self._slide_all)
        self._on_value(self._site, lambda _: self._choose(None))
        self._on_value(self._strip, lambda place: self._choose(self._order[place] if place >= 0 else None), "chosen")
        self._on_value(self._scale, lambda text: self._act(lambda: self._type_scale(text)))
        self._on_value(self._bound, lambda text: self._act(lambda: self._type_bound(text)))
        self._together.on_click(lambda _: self._choose(None))
        self._undo.on_click(lambda _: self._act(self.state.undo))
        self._redo.on_click(lambda _: self._act(self.state.redo))
        self._reset_site.on_click(lambda _: self._act(lambda: self.state.reset(self._site.value)))
        self._reset_all.on_click(lambda _: self._act(self.state.reset))
        for name, button in self._learn.items():
            button.on_click(lambda _, name=name: self._start(name))
        self._stop.on_click(lambda _: self._finish())
        self._save.on_click(lambda _: self._write())
        self._open.on_click(lambda _: self._act(lambda: self.state.load_file(Path(self._file.value))))

    def _drag(self, value: float) -> None:
        bound = math.inf if value >= self._line.high else value
        gesture = (self._line.gesture, self._site.value, self._channel)
        merge, self._gesture = gesture == self._gesture, gesture
        if self._channel is None:
            self.state.set_scale(self._site.value, bound, merge=merge)
        else:
            self.state.set_bound(self._site.value, self._channel, bound, merge=merge)
        self._changed(dragged=True)

    def _slide_all(self, per_cent: int) -> None:
        now = time.monotonic()
        merge, self._slid = self._gesture == "all" and now - self._slid < _PAUSE, now
        self._gesture = "all"
        self.state.scale_all(math.inf if per_cent == _NO_BOUND else per_cent / 100, merge=merge)
        self._changed(slid=True)

    def _act(self, act: Callable[[], object]) -> None:
        """Make a change that is a step of its own, or say why not."""
        self._gesture = None
        try:
            act()
        except (ValueError, OSError) as error:
            self._sync()
            self._say(str(error), wrong=True)
            return
        self._show_site()
        self._changed()

    def _type_scale(self, text: str) -> None:
        number = _parsed(text)
        self.state.set_scale(self._site.value, math.inf if number is None else number / 100)

    def _type_bound(self, text: str) -> None:
        if self._channel is not None:
            self.state.set_bound(self._site.value, self._channel, _parsed(text))

    def _choose(self, channel: int | None) -> None:
        self._channel = channel
        self._show_site()
        self._later.ask()

    def _changed(self, dragged: bool = False, slid: bool = False) -> None:
        self._stale = True
        self._sync(dragged, slid)
        if self._seconds > 0.5:
            self._say("computing …")
        self._later.ask()

    def _write(self) -> None:
        try:
            self._say(f"written to {self.state.save(Path(self._file.value))}")
        except (ValueError, OSError) as error:
            self._say(str(error), wrong=True)

    # --- learned bounds: a generator that is stepped in a thread which only computes, so that the page is answered ---

    def _start(self, name: str) -> None:
        model = ClippedModel(self.state.clipped.original)
        self._learning = _Learning(name, model, _LEARN[name](model, self.state.defender))
        self._progress.value = f"{name}: starting; the first epoch takes longest …"
        self._enable()
        self._step(self._learning)

    def _step(self, learning: _Learning) -> None:
        if self._loop is not None:
            step = self._loop.run_in_executor(None, next, learning.steps, None)
            step.add_done_callback(lambda done: self._stepped(learning, done.result))
        while self._loop is None and learning is self._learning:
            self._stepped(learning, lambda: next(learning.steps, None))

    def _stepped(self, learning: _Learning, result: Callable[[], Any]) -> None:
        if learning is not self._learning:  # stopped meanwhile
            with suppress(Exception):
                result()
            learning.steps.close()
            return
        try:
            step = result()
        except Exception as error:
            self._learning = None
            self._enable()
            self._say(f"{learning.name}: {error}", wrong=True)
            raise
        if step is None:
            self._finish()
            return
        learning.bounds = learning.model.bounds
        self._progress.value = (
            f"{learning.name}: epoch {step.epoch} of {step.epochs}, clean accuracy {step.accuracy:.3f}"
        )
        if self._loop is not None:
            self._step(learning)

    def _finish(self) -> None:
        """End learning and take the bounds of the latest whole epoch, as one step."""
        if (learning := self._learning) is None:
            return
        self._learning = None
        self._enable()
        if (bounds := learning.bounds) is None:
            self._progress.value = f"{learning.name}: stopped before the first epoch"
            return
        self._progress.value = f"{learning.name}: bounds taken"
        self._act(lambda: self.state.load(bounds))

    def _enable(self) -> None:
        self._stop.disabled = self._learning is None
        for button in self._learn.values():
            button.disabled = self._learning is not None

    # --- what is shown ---

    def _compute(self) -> None:
        start = time.perf_counter()
        with self._reported():
            if self._stale:
                self.state.evaluate()
                self._stale = False
                self._seconds = time.perf_counter() - start
            else:
                self.state.prepare(self._site.value)
            self._draw()

    def _draw(self) -> None:
        state = self.state
        self._numbers.value = _numbers(state.measured, state.unclipped)
        self._drawing.draw()
        self._picture.update()
        tried = len(state.trail)  # last: a page that shows it shows the numbers and the picture, too
        self._say(f"{len(state.bounded)} of {len(state.reference)} sites bounded; {tried} settings tried")

    def _show_site(self) -> None:
        """Fill the histogram and the strip for the chosen site and channel."""
        state, site, channel = self.state, self._site.value, self._channel
        channels = state.channels(site)
        self._order = [each.index for each in channels]
        low, high, edges, heights = _histogram(state, site, channel)
        with self._said_by_us(), self._line.hold_sync():
            self._line.low, self._line.high, self._line.percent = low, high, channel is None
            self._line.title = site if channel is None else f"{site}, channel {channel}"
            self._line.x_label = _x_label(state, site, channel)
            self._line.y_label = "share of images"
            self._line.draw(
                [
                    Steps(f"clean ({len(state.clean):,})", CLEAN, heights[0]),
                    Steps(f"triggered ({len(state.triggered):,})", TRIGGERED, heights[1], hatched=True),
                ],
                edges,
            )
            self._strip.title = f"{site}: maximum of each channel, clean and triggered, the most abnormal first"
            self._strip.draw(
                [
                    Steps("clean", CLEAN, [each.clean for each in channels]),
                    Steps("triggered", TRIGGERED, [max(each.triggered, 0.0) for each in channels]),
                ],
                [f"channel {each.index}: ×{each.ratio:.3g}" for each in channels],
                -1 if channel is None else self._order.index(channel),
            )
        self._sync()

    def _sync(self, dragged: bool = False, slid: bool = False) -> None:
        """Set the controls to what the state is, but for the one that the hand is on."""
        state, site, scales = self.state, self._site.value, self.state.scales
        with self._said_by_us():
            bound = scales[site] if self._channel is None else float(state.bounds[site][self._channel])
            if not dragged:
                self._line.value = min(bound, self._line.high)
            per_cents = {min(scale * 100, _NO_BOUND) for scale in scales.values()}
            if len(per_cents) == 1 and not slid:
                self._all.value = math.floor(per_cents.pop() + 0.5)
            self._scale.value = f"{100 * scales[site]:.4g}" if math.isfinite(scales[site]) else "none"
            self._bound.disabled = self._channel is None
            self._bound.value = "" if self._channel is None else f"{bound:.6g}" if math.isfinite(bound) else "none"
            self._undo.disabled, self._redo.disabled = not state.can_undo, not state.can_redo


def _mmbm_config(clipped: ClippedModel) -> MMBMConfig:
    """The early sites, as published, where the model has them: with all sites MM-BM ruins a lab ResNet."""
    return MMBMConfig(sites=EARLY_SITES if set(EARLY_SITES) <= set(clipped.sites) else None)


def _box(name: str, tip: str) -> Any:
    return ipw.Text(
        description=name,
        continuous_update=False,
        placeholder="a number, or: none",
        tooltip=tip,
        style={"description_width": "60px"},
        layout=ipw.Layout(width="190px"),
    )


def _site_row(site: str, ratio: float, largest: float) -> str:
    return f"{site:20} {'█' * max(1, round(8 * ratio / largest)):8} ×{ratio:.3g}"


def _parsed(text: str) -> float | None:
    text = text.strip().lower()
    if not text:
        return None
    if text in ("none", "no bound", "inf", "∞"):
        return math.inf
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"a bound is a number, 'none' or empty, not {text!r}") from None


def _histogram(state: BoundTuning, site: str, channel: int | None) -> tuple[float, float, Any, list[Any]]:
    """Ends of the axis, edges, and the shares of clean and triggered images; the last bin has all beyond it."""
    clean, triggered = (values.numpy() for values in state.activations(site, channel))
    largest = float(max(clean.max(), triggered.max()))
    low = min(0.0, float(clean.min()), float(triggered.min()))
    if channel is None:
        high, bound = max(1.5, min(1.05 * largest, _FURTHEST)), state.scales[site]
    else:
        high, bound = low + max(1.05 * (largest - low), 1e-3), float(state.bounds[site][channel])
    if math.isfinite(bound):  # the end is no bound, and this is one
        low, high = min(low, bound), max(high, 1.05 * bound)
    edges = np.linspace(low, high, _BINS + 1)
    return low, high, edges, [_shares(values, edges) for values in (clean, triggered)]


def _x_label(state: BoundTuning, site: str, channel: int | None) -> str:
    what = "largest activation of each image, without bounds"
    unit = "loaded bound" if state.loaded(site) else "clean maximum"
    return what if channel is not None else f"{what}, in % of its channel’s {unit}"


def _numbers(now: Measured, before: Measured) -> str:
    cells = []
    for name, what in (
        ("acc", "clean images right"),
        ("asr", "triggered images → target"),
        ("ra", "triggered images right"),
    ):
        count = now.evaluation.clean if name == "acc" else now.evaluation.triggered
        share, first = float(getattr(now.evaluation, name)), float(getattr(before.evaluation, name))
        cells.append(
            f'<div><span class="name">{name.upper()}</span> <b class="bclip-lab-{name}">{share:.1%}</b><br>'
            f"{round(share * count):,} of {count:,} {what}<br>"
            f'<span class="before">without bounds {first:.1%} ({round(first * count):,})</span></div>'
        )
    return f'<div class="bclip-lab-numbers">{"".join(cells)}</div>'


def _still(state: BoundTuning, site: str) -> bytes:
    """A picture of the histogram and the strip, for a page without a kernel."""
    figure = Figure(figsize=(11.5, 3.9), dpi=80, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2)
    _, _, edges, heights = _histogram(state, site, None)
    left.stairs(heights[0], edges, fill=True, color=CLEAN, alpha=0.75, label="clean")
    hatched = {"facecolor": TRIGGERED, "edgecolor": TRIGGERED, "hatch": "////", "alpha": 0.6}
    left.stairs(heights[1], edges, fill=True, label="triggered", **hatched)
    if math.isfinite(state.scales[site]):
        left.axvline(state.scales[site], color="black", linewidth=2.2)
    left.legend(fontsize=_TICK)
    left.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _label(left, site, "largest activation of each image\nin % of its channel’s 100 %", "share of images")
    channels = state.channels(site)
    places = np.arange(len(channels))
    right.bar(places - 0.2, [each.clean for each in channels], 0.4, color=CLEAN)
    right.bar(places + 0.2, [each.triggered for each in channels], 0.4, color=TRIGGERED)
    _label(right, "Maximum of each channel, the most abnormal first", "channels of the site", "activation")
    right.yaxis.set_major_formatter("{x:g}")
    right.set_xticks([])
    figure.suptitle("Still picture: run this cell in JupyterLab to drag the bounds", fontsize=LABEL, color="0.35")
    out = io.BytesIO()
    FigureCanvasAgg(figure).print_png(out)  # type: ignore[no-untyped-call]
    return out.getvalue()


class _Drawing:
    """The picture: margins of triggered images, and what was tried."""

    def __init__(self, state: BoundTuning) -> None:
        self.state = state
        self.figure = Figure(figsize=(11.5, 3.4), dpi=100, facecolor="white")
        grid = {"left": 0.07, "right": 0.98, "top": 0.9, "bottom": 0.22, "wspace": 0.18}
        self.margins, self.trail = self.figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.5, 1), **grid})
        self._lay_out_margins()
        self._lay_out_trail()
        self.picture = Picture(self.figure, [self._after, self._before, self._tried, self._now, self._said])

    def draw(self) -> None:
        """Bring the artists to the state."""
        shares = _shares(self.state.measured.triggered_margins.numpy(), self._edges)
        self._after.set_data(shares)
        height = max(_height(shares), self._height)
        if height != self.margins.get_ylim()[1]:
            self.margins.set_ylim(0, height)
            self.picture.redraw()
        tried = self.state.trail
        now = self.state.measured.evaluation
        self._tried.set_data([e.asr for e in tried], [e.acc for e in tried])
        self._now.set_data([now.asr], [now.acc])
        self._said.set_text(f"ACC {now.acc:.1%}\nASR {now.asr:.1%}\nRA {now.ra:.1%}")

    def _lay_out_margins(self) -> None:
        ax = self.margins
        before = self.state.unclipped.triggered_margins.numpy()
        reach = 1.1 * max(float(np.abs(before).max()), 1e-6)
        self._edges = np.linspace(-reach, reach, 41)
        shares = _shares(before, self._edges)
        self._height = _height(shares)
        self._before = ax.stairs(
            shares, self._edges, color="0.2", linewidth=1.8, linestyle=(0, (3, 1.5)), label="without bounds"
        )
        self._after = ax.stairs(
            shares, self._edges, fill=True, facecolor=TRIGGERED, alpha=0.75, label="with these bounds"
        )
        ax.axvline(0, color="0.35", linestyle="dotted")
        ax.set_xlim(-reach, reach)
        ax.legend(fontsize=_TICK, loc="upper left")
        axis = "margin of triggered images in logits\n(right of 0 the attack succeeds)"
        _label(ax, "Margins of the target class", axis, "share of triggered images")

    def _lay_out_trail(self) -> None:
        ax = self.trail
        start = self.state.unclipped.evaluation
        ax.plot([start.asr], [start.acc], "s", markersize=11, markerfacecolor="none", color="0.3")
        ax.annotate(
            "without\nbounds",
            (start.asr, start.acc),
            (6, -10) if start.asr > 0.5 else (-6, -10),
            textcoords="offset points",
            ha="right" if start.asr > 0.5 else "left",
            va="top",
            fontsize=_TICK,
            color="0.3",
        )
        self._tried = ax.plot([], [], color="0.6", linewidth=1, marker="o", markersize=4)[0]
        self._now = ax.plot([], [], "o", color="black", markeredgecolor="white", markersize=13)[0]
        self._said = ax.text(0.5, 0.02, "", ha="center", va="bottom", fontsize=LABEL, linespacing=1.4)
        ax.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.grid(color="0.92")
        _label(ax, "What was tried (better: ↖)", "ASR", "ACC")


def _shares(values: Any, edges: Any) -> Any:
    """The share of the values in each bin; those beyond the ends are in the bins at the ends."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)


def _height(shares: Any) -> float:
    """Of an axis that holds the bars: one of a few, as every change draws the whole figure."""
    return next((height for height in (0.15, 0.3, 0.6) if 1.35 * shares.max() <= height), 1.35)


def _label(ax: Any, title: str, x: str, y: str) -> None:
    label(ax, title, x, y, _TICK)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
