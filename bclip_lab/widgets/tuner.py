"""`BoundTuner`: sliders for the bounds of a clipped model, and what they do, live."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from html import escape
from typing import Any

import ipywidgets as ipw
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, ScalarFormatter
from torch import Tensor

from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import Attack, Splits
from bclip_lab.plots import CLEAN, TRIGGERED
from bclip_lab.widgets.live import Newest, Picture, on_loop, running_loop
from bclip_lab.widgets.tuning import LIMIT, BoundTuning, Channel, Measured

__all__ = ["BoundTuner"]

_BINS = 40
_LARGEST = 5.0  # multiples of the clean maximum that the histogram of a site shows
_TITLE, _LABEL, _TICK = 13, 12, 11
_PAUSE = 1.0  # seconds: moves of one slider that follow one another faster are one step for undo
_ALL = -1  # in the place of a channel's number: all channels together
_NBSP = "\N{NO-BREAK SPACE}"

_STYLE = f"""<style>
.bclip-lab-slider .widget-readout {{ min-width: 40px; max-width: 40px; }}
.bclip-lab-site .widget-label {{ font-family: var(--jp-code-font-family, monospace); font-size: 12px; }}
.bclip-lab-channels select {{ font-family: var(--jp-code-font-family, monospace); font-size: 13px; }}
.bclip-lab-head {{ font-family: var(--jp-code-font-family, monospace); font-size: 13px; white-space: pre;
  padding-left: 6px; line-height: 1.3; }}
.bclip-lab-numbers {{ display: flex; flex-wrap: wrap; gap: 4px 40px; line-height: 1.35; font-size: 14px; }}
.bclip-lab-numbers b {{ font-size: 28px; font-variant-numeric: tabular-nums; }}
.bclip-lab-numbers .name {{ font-size: 18px; font-weight: 600; }}
.bclip-lab-numbers .before {{ opacity: 0.75; }}
.bclip-lab-bar {{ display: inline-block; height: 12px; background: {TRIGGERED}; vertical-align: middle; }}
.bclip-lab-error {{ color: var(--jp-error-color1, #b00020); font-weight: 600; }}
</style>"""


class BoundTuner:
    """Sliders for the bounds of a clipped model, with ACC, ASR and RA and a picture that follow.

    Shows itself as the last line of a notebook's cell. One slider a site goes from 0 to 150 % of the largest
    activations of its channels on the defender's clean images; at 150 % there is no bound. The table lists
    the channels of the chosen site, the most abnormal first; the bound of the chosen one is typed below it.

    Everything is measured on a sample of the test images, whose counts are shown. The bounds go to `clipped`
    itself: what the sliders show is what the next cell works with. Whatever else sets its bounds (a fit, a
    second tuner) is not seen here; `tuner.load(clipped.bounds)` takes such bounds over. Moves that are made
    while a cell runs take effect after it.

    Without a kernel (a notebook that is read on a web page) the picture of the last state remains.

    Parameters
    ----------
    clipped
        The model whose bounds are tuned, starting with those that it has.
    splits
        `defender` gives the clean maxima, `test` the images that judge.
    attack
        Makes the triggered images.
    images
        At most so many clean and so many triggered test images are used.
    seed
        Which ones, where there are more.

    Attributes
    ----------
    state
        The `BoundTuning` behind the sliders. After changing it in a cell, call `refresh`.
    widget
        The controls, an ipywidgets `VBox`.
    figure
        The picture, a matplotlib figure.

    Raises
    ------
    ValueError
        As `BoundTuning`.
    """

    def __init__(
        self, clipped: ClippedModel, splits: Splits, attack: Attack, *, images: int = 500, seed: int = 0
    ) -> None:
        self.state = BoundTuning(clipped, splits, attack, images=images, seed=seed)
        self._drawing = _Drawing(self.state)
        self.figure = self._drawing.figure
        self._quiet = False  # whether a control that changes is set by us
        self._key: object = None
        self._time = -math.inf
        self._stale = False  # whether the bounds have changed since they were measured
        self._anew = True  # whether other activations are to be drawn
        self._seconds = 0.0
        loop = running_loop()
        self._later = Newest(self._compute, loop)

        worst = max(self.state.abnormality, key=lambda site: float(self.state.abnormality[site].max()))
        self._site = ipw.Dropdown(
            options=[
                (f"{site}   (triggered ×{float(ratios.max()):.3g})", site)
                for site, ratios in self.state.abnormality.items()
            ],
            value=worst,
            description="site",
            layout=ipw.Layout(width="auto"),
        )
        self._channel = ipw.Select(
            options=[("", _ALL)],
            rows=11,
            tooltip="Channels of the chosen site, the most abnormal first",
            layout=ipw.Layout(width="auto"),
        )
        self._channel.add_class("bclip-lab-channels")
        # JupyterLab takes the arrow keys away from a list, but not from a box for numbers
        self._row = ipw.BoundedIntText(
            description="row",
            tooltip="Row of the table, 0 for all channels together; the arrow keys step through it",
            style={"description_width": "30px"},
            layout=ipw.Layout(width="110px"),
        )
        self._bound = ipw.Text(
            description="its bound",
            continuous_update=False,
            placeholder="a number, or: none",
            tooltip="A number; 'none' for no bound; empty: as the slider of the site says",
            style={"description_width": "70px"},
            layout=ipw.Layout(width="230px"),
        )
        self._all = _slider("all sites together")
        self._sliders = {site: _slider(site) for site in clipped.sites}
        for slider in self._sliders.values():
            slider.add_class("bclip-lab-site")
        self._notes = {site: ipw.Label(layout=ipw.Layout(width="92px")) for site in clipped.sites}
        self._undo, self._redo, self._reset_site, self._reset_all = (
            ipw.Button(description=name, icon=icon, tooltip=tip, layout=ipw.Layout(width="auto"))
            for name, icon, tip in (
                ("Undo", "undo", "Take the latest change back"),
                ("Redo", "repeat", "Make it again"),
                ("Reset site", "eraser", "Take all bounds off the chosen site"),
                ("Reset all", "trash", "Take all bounds off"),
            )
        )
        self._numbers, self._status = ipw.HTML(), ipw.HTML()
        self.widget = self._laid_out()
        self._connect()
        on_loop(self.widget, loop)
        self._list_channels()
        self._sync()
        self._draw()

    def load(self, bounds: Mapping[str, Tensor | float]) -> None:
        """Take bounds, such as those that a fit has learned (`BoundTuning.load`), and show them."""
        self.state.load(bounds)
        self.refresh()

    def refresh(self) -> None:
        """Measure the bounds of `state` and show them, after a cell has changed them."""
        self._stale = True
        self._list_channels()
        self._sync()
        self._compute()

    def _ipython_display_(self) -> None:
        from IPython.display import display

        bundle: dict[str, Any] = dict(self.widget._repr_mimebundle_())
        bundle["text/plain"] = "BoundTuner: run this cell in JupyterLab to move the bounds."
        display(bundle, raw=True)  # type: ignore[no-untyped-call]
        self._drawing.picture.show()

    # --- controls ---

    def _laid_out(self) -> Any:
        state = self.state
        largest = max(float(ratios.max()) for ratios in state.abnormality.values())
        rows = []
        for site, slider in self._sliders.items():
            ratio = float(state.abnormality[site].max())
            width = f"width:{50 * ratio / largest:.0f}px"
            bar = ipw.HTML(
                f'<span class="bclip-lab-bar" style="{width}"></span> ×{ratio:.3g}',
                layout=ipw.Layout(width="105px"),
            )
            rows.append(ipw.HBox([slider, self._notes[site], bar]))
        head = ipw.HBox(
            [
                ipw.Label("bound in % of the clean maximum", layout=ipw.Layout(width="422px")),
                ipw.Label("triggered ÷ clean", layout=ipw.Layout(width="115px")),
            ]
        )
        left = ipw.VBox(
            [head, self._all, ipw.VBox(rows, layout=ipw.Layout(max_height="420px", overflow="hidden auto"))],
            layout=ipw.Layout(width="540px"),
        )
        table_head = ipw.HTML(f'<div class="bclip-lab-head">{_HEAD}</div>')
        right = ipw.VBox(
            [self._site, table_head, self._channel, ipw.HBox([self._row, self._bound])],
            layout=ipw.Layout(flex="1 1 390px", max_width="520px"),
        )
        about = ipw.HTML(
            '<div style="line-height:1.4">'
            f"Measured on {len(state.clean):,} of {state.available:,} clean test images and on "
            f"{len(state.triggered):,} triggered ones. 100 % is a channel’s largest activation on the "
            f"defender’s {state.defenders:,} clean images; at 150 % there is no bound.</div>"
        )
        return ipw.VBox(
            [
                ipw.HTML(_STYLE),
                self._numbers,
                ipw.HBox([left, right], layout=ipw.Layout(flex_flow="row wrap", grid_gap="0 20px")),
                ipw.HBox([self._undo, self._redo, self._reset_site, self._reset_all, self._status]),
                about,
            ]
        )

    def _connect(self) -> None:
        for site, slider in self._sliders.items():
            self._on_value(slider, partial(self._slide, site))
        self._on_value(self._all, self._slide_all)
        self._on_value(self._site, lambda _: self._choose_site())
        self._on_value(self._channel, lambda _: self._choose_channel())
        self._on_value(self._row, self._choose_row)
        self._on_value(self._bound, self._type)
        self._undo.on_click(lambda _: self._click(self.state.undo))
        self._redo.on_click(lambda _: self._click(self.state.redo))
        self._reset_site.on_click(lambda _: self._click(lambda: self.state.reset(self._site.value)))
        self._reset_all.on_click(lambda _: self._click(self.state.reset))

    def _on_value(self, control: Any, react: Callable[[Any], None]) -> None:
        def changed(change: Any) -> None:
            if not self._quiet:
                react(change["new"])

        control.observe(changed, names="value")

    def _slide(self, site: str, per_cent: int) -> None:
        self.state.set_scale(site, per_cent / 100, merge=self._follows(site))
        if self._site.value != site:
            self._site.value = site  # which draws anew
        self._changed()

    def _slide_all(self, per_cent: int) -> None:
        self.state.scale_all(per_cent / 100, merge=self._follows("all"))
        self._changed()

    def _click(self, act: Callable[[], object]) -> None:
        self._key = None
        if act() is not False:  # there was something to undo
            self._changed()

    def _type(self, text: str) -> None:
        if self._chosen is None:
            return
        self._key = None
        try:
            self.state.set_bound(self._site.value, self._chosen, _parsed(text))
        except ValueError as error:
            self._sync()
            self._say(str(error), wrong=True)
            return
        self._changed()

    def _choose_site(self) -> None:
        self._list_channels(keep=False)
        self._choose_channel()

    def _choose_row(self, row: int) -> None:
        self._channel.index = row

    def _choose_channel(self) -> None:
        self._sync()
        self._anew = True
        self._later.ask()

    @property
    def _chosen(self) -> int | None:
        """The chosen channel; None for all together."""
        channel = int(self._channel.value)
        return None if channel == _ALL else channel

    def _follows(self, key: object) -> bool:
        """Whether this move goes on with the one before."""
        now = time.monotonic()
        follows = key == self._key and now - self._time < _PAUSE
        self._key, self._time = key, now
        return follows

    def _changed(self) -> None:
        self._stale = True
        self._sync()
        if self._seconds > 0.5:
            self._say("computing …")
        self._later.ask()

    # --- what is shown ---

    def _compute(self) -> None:
        start = time.perf_counter()
        try:
            if self._stale:
                self.state.evaluate()
                self._stale = False
                self._seconds = time.perf_counter() - start
            self._list_channels()
            self._draw()
        except Exception as error:  # else it is seen in the kernel's log only
            self._say(f"{type(error).__name__}: {error}", wrong=True)
            raise

    def _draw(self) -> None:
        state = self.state
        self._numbers.value = _numbers(state.measured, state.unclipped)
        self._drawing.draw(self._site.value, self._chosen, self._anew)
        self._anew = False
        self._drawing.picture.update()
        count = len(state.bounded)
        self._say(f"{count} of {len(self._sliders)} sites bounded")

    def _say(self, text: str, wrong: bool = False) -> None:
        mark = ' class="bclip-lab-error"' if wrong else ""
        self._status.value = f"<span{mark}>{escape(text)}</span>"

    def _list_channels(self, keep: bool = True) -> None:
        """Fill the table; the chosen channel stays chosen unless the site is another."""
        channels = self.state.channels(self._site.value)
        options = (("all channels together", _ALL), *((_row(c), c.index) for c in channels))
        chosen = self._channel.value if keep else _ALL
        self._quiet = True
        with self._channel.hold_sync():
            if options != tuple(self._channel.options):
                self._channel.options = options
            self._channel.value = chosen
        self._row.max = len(channels)
        self._quiet = False

    def _sync(self) -> None:
        """Set the controls to what the state is."""
        state, scales = self.state, self.state.scales
        self._quiet = True
        for site, slider in self._sliders.items():
            slider.value = _per_cent(scales[site])
            self._notes[site].value = _note(scales[site], state.loaded(site), len(state.by_hand(site)))
        if len(set(scales.values())) == 1:
            self._all.value = _per_cent(next(iter(scales.values())))
        self._row.value = self._channel.index
        self._bound.disabled = self._chosen is None
        if self._chosen is None:
            self._bound.value = ""
        else:
            bound = float(state.bounds[self._site.value][self._chosen])
            self._bound.value = f"{bound:.6g}" if math.isfinite(bound) else "none"
        self._undo.disabled, self._redo.disabled = not state.can_undo, not state.can_redo
        self._quiet = False


def _slider(name: str) -> Any:
    # whole numbers: the page rounds others that it is given and sends them back, as if the slider was moved
    slider = ipw.IntSlider(
        value=_per_cent(LIMIT),
        min=0,
        max=_per_cent(LIMIT),
        description=name,
        tooltip=f"{name}: arrow keys, Page Up and Page Down, Home and End move it, too",
        style={"description_width": "136px"},
        layout=ipw.Layout(width="330px"),
    )
    slider.add_class("bclip-lab-slider")
    return slider


def _per_cent(scale: float) -> int:
    return math.floor(100 * scale + 0.5)


def _note(scale: float, loaded: bool, by_hand: int) -> str:
    text = "no bound" if scale >= LIMIT else "% loaded" if loaded else "%"
    return text + (f" ✎{by_hand}" if by_hand else "")


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


_HEAD = "channel    clean  triggered    ratio    bound"


def _row(c: Channel) -> str:
    bound = f"{c.bound:.3g}" if math.isfinite(c.bound) else "none"
    ratio = f"×{c.ratio:.2f}"
    text = f"{c.index:7} {c.clean:8.3g} {c.triggered:10.3g} {ratio:>8} {bound:>8}{' ✎' if c.by_hand else ''}"
    return text.replace(" ", _NBSP)


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


class _Drawing:
    """The picture: activations of a site, margins of triggered images, and what was tried."""

    def __init__(self, state: BoundTuning) -> None:
        self.state = state
        self.figure = Figure(figsize=(11.5, 4.1), dpi=100, facecolor="white")
        grid = {"left": 0.07, "right": 0.98, "top": 0.9, "bottom": 0.2, "wspace": 0.3}
        self.activations, self.margins, self.trail = self.figure.subplots(
            1, 3, gridspec_kw={"width_ratios": (1.25, 1.15, 1), **grid}
        )
        self._bars: list[Any] = []
        ax = self.activations
        self._span = ax.axvspan(0, 0, color="black", alpha=0.18, linewidth=0)
        self._line = ax.axvline(0, color="black", linewidth=2.2)
        self._name = ax.text(
            0,
            0.98,
            "",
            transform=ax.get_xaxis_transform(),
            va="top",
            fontsize=_TICK,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        )
        self._lay_out_margins()
        self._lay_out_trail()
        moving = [self._span, self._line, self._name, self._after, self._before]
        self.picture = Picture(self.figure, [*moving, self._tried, self._now, self._said])

    def draw(self, site: str, channel: int | None, anew: bool) -> None:
        """Bring the artists to the state; `anew` where the activations are of another site or channel."""
        if anew:
            self._draw_activations(site, channel)
            self.picture.redraw()
        self._move_bound(site, channel)
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

    def _draw_activations(self, site: str, channel: int | None) -> None:
        clean, triggered = (values.numpy() for values in self.state.activations(site, channel))
        largest = max(float(clean.max()), float(triggered.max()))
        left = min(0.0, float(clean.min()), float(triggered.min()))
        ax = self.activations
        if channel is None:
            right = max(LIMIT, min(largest, _LARGEST))
            title, unit = site, "\nin % of the channel’s clean maximum"
            ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        else:
            right = largest if largest > left else left + 1
            title, unit = f"{site}, channel {channel}", ""
            ax.xaxis.set_major_formatter(ScalarFormatter())
        edges = np.linspace(left, right, _BINS + 1)
        heights = [_shares(values, edges) for values in (clean, triggered)]
        for bars in self._bars:
            bars.remove()
        hatched = {"facecolor": TRIGGERED, "edgecolor": TRIGGERED, "hatch": "////", "alpha": 0.6}
        self._bars = [
            ax.stairs(heights[0], edges, fill=True, color=CLEAN, alpha=0.75),
            ax.stairs(heights[1], edges, fill=True, **hatched),
        ]
        ax.set_xlim(left, right)
        ax.set_ylim(0, 1.5 * max(float(h.max()) for h in heights))
        names = f"clean ({len(clean):,})", f"triggered ({len(triggered):,})"
        ax.legend(self._bars, names, fontsize=_TICK, loc="upper right", bbox_to_anchor=(1, 0.91))
        _label(ax, title, f"largest activation of each image, without bounds{unit}", "share of images")

    def _move_bound(self, site: str, channel: int | None) -> None:
        ends = self.state.bound_range(site, channel)
        for artist in (self._span, self._line, self._name):
            artist.set_visible(ends is not None)
        if ends is None:
            return
        low, high = ends
        self._span.set(x=low, width=high - low)
        self._line.set_xdata([low, low])
        text = f"{low:.0%}" if channel is None else f"{low:.3g}"
        if high > 1.001 * low:
            text += f" to {high:.0%}"
        left, right = self.activations.get_xlim()
        side = "left" if low < (left + right) / 2 else "right"
        self._name.set(x=low, text=f" bound {text} ", horizontalalignment=side)

    def _lay_out_margins(self) -> None:
        ax = self.margins
        before = self.state.unclipped.triggered_margins.numpy()
        reach = 1.1 * max(float(np.abs(before).max()), 1e-6)
        self._edges = np.linspace(-reach, reach, _BINS + 1)
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
        _label(ax, "Margins of the target class", axis, "")

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
        ax.text(0, 0.9, "better ↖", ha="left", va="top", fontsize=_TICK, color="0.45")
        self._tried = ax.plot([], [], color="0.6", linewidth=1, marker="o", markersize=4)[0]
        self._now = ax.plot([], [], "o", color="black", markeredgecolor="white", markersize=13)[0]
        self._said = ax.text(0.5, 0.02, "", ha="center", va="bottom", fontsize=_LABEL, linespacing=1.4)
        ax.set(xlim=(-0.05, 1.05), ylim=(-0.05, 1.05))
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.grid(color="0.92")
        _label(ax, "What was tried", "ASR", "ACC")


def _shares(values: Any, edges: Any) -> Any:
    """The share of the values in each bin; those beyond the ends are in the bins at the ends."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values)


def _height(shares: Any) -> float:
    """Of an axis that holds the bars: one of a few, as every change draws the whole figure."""
    return next((height for height in (0.15, 0.3, 0.6) if 1.35 * shares.max() <= height), 1.35)


def _label(ax: Any, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=_TITLE)
    ax.set_xlabel(x, fontsize=_LABEL)
    ax.set_ylabel(y, fontsize=_LABEL)
    ax.tick_params(labelsize=_TICK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
