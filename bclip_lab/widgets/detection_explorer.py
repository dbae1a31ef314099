"""`DetectionExplorer`: a detector's threshold to drag, what it means, and the images behind every point, live."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as ipw
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from bclip_lab.data.images import Attack, LabelledImages
from bclip_lab.evaluation import Evaluation
from bclip_lab.plots import CLEAN, TRIGGERED, Detector
from bclip_lab.widgets.click import ClickPicture
from bclip_lab.widgets.detections import Confusion, DetectionExploration, Verdict
from bclip_lab.widgets.drag import DragLine, Steps
from bclip_lab.widgets.live import LABEL, TITLE, Shell, label, on_loop

__all__ = ["DetectionExplorer"]

_SHOWN = 9  # images in a row
_TICK = 10
# in the picture itself: it is all that a page without a kernel shows
_HOW = (
    "Run this cell in JupyterLab; then click a point or an image, or click once and walk with the arrow keys: "
    "left and right by score, up and down to the other kind."
)
_STEPS = {"ArrowLeft": -1, "ArrowRight": 1, "PageUp": 10, "PageDown": -10, "Home": -(10**9), "End": 10**9}

_STYLE = """<style>
.bclip-lab-counts td, .bclip-lab-counts th { padding: 1px 14px 1px 0; text-align: left; }
.bclip-lab-counts { font-size: 14px; line-height: 1.4; }
.bclip-lab-counts b { font-size: 20px; font-variant-numeric: tabular-nums; }
</style>"""


class DetectionExplorer(Shell):
    """The scores of a detector, its threshold to drag, and the images behind them.

    Shows itself as the last line of a notebook's cell. On top the scores of clean and of triggered images:
    the line is the threshold, dragged with the mouse or, once it has the focus, moved with the arrow keys. The
    counts, the operating point on the ROC and the corrected decisions follow, and the images of the bar under
    the line are shown, those of the nearest scores: a press on a bar shows its images. In the picture below
    every image is a point: click one, or a point of the ROC, whose threshold is taken then. The arrow keys go
    from image to image by score (Page Up and Page Down ten images, Home and End the ends), up and down to the
    other kind of images.

    Thresholds that are moved stay here: the detectors are left as they are. Moves that are made while a cell
    runs take effect after it. Without a kernel the picture remains. `bclip_lab.widgets` says what happens when
    cells are run again, the kernel restarts or the notebook is reopened.

    Parameters
    ----------
    detectors
        For a name a fitted detector: it has `score(images)` and `threshold_`. Decisions, margins and
        corrections are shown of one that also has `decide(images)` as `MMDF` has.
    test
        The images.
    attack
        Makes the triggered images.
    images
        At most so many clean test images, and what the attack makes of them, are used.
    seed
        Which ones, where there are more.

    Attributes
    ----------
    state
        The `DetectionExploration` behind it. After changing it in a cell, call `refresh`.
    widget
        The controls and the pictures, an ipywidgets `VBox`.
    figure
        The picture below, a matplotlib figure.

    Raises
    ------
    ValueError
        As `DetectionExploration`.
    """

    _picture: ClickPicture
    _purpose = "move the threshold"

    def __init__(
        self,
        detectors: Mapping[str, Detector],
        test: LabelledImages,
        attack: Attack,
        *,
        images: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.state = DetectionExploration(detectors, test, attack, images=images, seed=seed)
        self._drawing = _Drawing(self.state, self._click, self._press)
        self.figure, self._picture = self._drawing.figure, self._drawing.picture
        self._anew = True  # whether another detector is to be drawn

        self._name = ipw.Dropdown(options=self.state.names, description="detector", layout=ipw.Layout(width="300px"))
        self._threshold = ipw.FloatText(description="threshold", layout=ipw.Layout(width="190px"))
        self._reset = ipw.Button(
            description="as fitted",
            icon="undo",
            tooltip="The detector’s own threshold",
            layout=ipw.Layout(width="auto"),
        )
        self._line = DragLine(
            name="threshold",
            title="Scores: right of the line an image is detected",
            x_label="score: higher is more suspicious",
            y_label="% of images",
            height=230,
        )
        self._counts = ipw.HTML()
        about = ipw.HTML(
            '<div style="line-height:1.4">'
            f"{len(self.state.clean):,} of {len(test):,} clean test images, and what the attack makes of them "
            f"({len(self.state.triggered):,} triggered images).</div>"
        )
        self.widget = ipw.VBox(
            [
                ipw.HTML(self.STYLE + _STYLE + ClickPicture.STYLE),
                ipw.HBox([self._name, self._threshold, self._reset], layout=ipw.Layout(flex_flow="row wrap")),
                self._counts,
                ipw.Box([self._line], layout=ipw.Layout(max_width="1150px", display="block")),
                self._picture.widget,
                self._status,
                about,
            ]
        )
        self._on_value(self._name, self._choose)
        self._on_value(self._threshold, self._move)
        self._on_value(self._line, self._move)
        self._reset.on_click(lambda _: self._move(self.state.fitted))
        on_loop(self.widget, self._loop)
        self.refresh()

    def refresh(self) -> None:
        """Show `state` as it is, after a cell has changed it."""
        self._anew = True
        self._draw_histogram()
        self._sync()
        self._compute()

    # --- what is done ---

    def _choose(self, name: str) -> None:
        self.state.choose_detector(name)
        self._draw_histogram()  # at once: a drag over the detector before is not this one's
        self._anew = True
        self._changed()

    def _move(self, threshold: float) -> None:
        try:
            self.state.set_threshold(threshold)
        except ValueError as error:
            self._sync()
            self._say(str(error), wrong=True)
            return
        self.state.choose_at_threshold()
        self._changed()

    def _click(self, ax: Axes, x: float, y: float) -> None:
        place = self._drawing.hit(ax, x, y)
        if place is None:
            return
        if ax is self._drawing.roc:
            self.state.choose_point(place)
        else:
            self.state.choose(place)
        self._changed()

    def _press(self, key: str) -> None:
        if key in _STEPS:
            self.state.step(_STEPS[key])
        elif key in ("ArrowUp", "ArrowDown"):
            self.state.choose_near(self.state.scores[self.state.chosen], triggered=key == "ArrowUp")
        else:
            return
        self._changed()

    def _changed(self) -> None:
        self._sync()
        self._later.ask()

    # --- what is shown ---

    def _sync(self) -> None:
        """Set the controls to what the state is."""
        state = self.state
        with self._said_by_us():
            self._name.value = state.name
            self._threshold.value = float(f"{state.threshold:.6g}")
            self._line.value = state.threshold

    def _compute(self) -> None:
        with self._reported():
            text = self._drawing.draw(self._anew)
            self._anew = False
            self._counts.value = _counts(self.state.confusion, self.state.corrected, self.state.uncorrected)
            self._picture.update(text)
            self._say("")

    def _draw_histogram(self) -> None:
        edges, clean, triggered = self.state.histogram()
        series = [
            Steps(f"clean ({len(self.state.clean):,})", CLEAN, 100 * clean),
            Steps(f"triggered ({len(self.state.triggered):,})", TRIGGERED, 100 * triggered, hatched=True),
        ]
        with self._line.hold_sync():
            self._line.low, self._line.high = float(edges[0]), float(edges[-1])
            self._line.draw(series, edges)


def _counts(found: Confusion, after: Evaluation | None, before: Evaluation | None) -> str:
    rows = (
        ("triggered images", (found.detected, found.missed), ("detected", "missed"), "TPR", found.tpr),
        ("clean images", (found.stopped, found.passed), ("stopped", "let through"), "FPR", found.fpr),
    )
    cells = "".join(
        f"<tr><th>{kind}</th>"
        + "".join(f"<td><b>{count:,}</b> {word}</td>" for count, word in zip(counts, words, strict=True))
        + f"<td>{name} <b>{rate:.1%}</b></td></tr>"
        for kind, counts, words, name, rate in rows
    )
    if after is None or before is None:
        last = '<td colspan="3">this detector gives a score alone, and corrects nothing</td>'
    else:
        last = "".join(
            f"<td>{name} <b>{getattr(after, name.lower()):.1%}</b> (before {getattr(before, name.lower()):.1%})</td>"
            for name in ("ACC", "ASR", "RA")
        )
    return f'<table class="bclip-lab-counts">{cells}<tr><th>after correction</th>{last}</tr></table>'


class _Drawing:
    """The picture: every image as a point, the ROC, and the chosen image among its neighbours."""

    def __init__(
        self,
        state: DetectionExploration,
        on_click: Callable[[Axes, float, float], object],
        on_key: Callable[[str], object],
    ) -> None:
        self.state = state
        self.figure = Figure(figsize=(11.5, 7.2), dpi=100, facecolor="white")
        self.points, self.roc = (self.figure.add_axes((x, 0.58, w, 0.36)) for x, w in ((0.08, 0.5), (0.68, 0.3)))
        moving = [*self._lay_out_points(), *self._lay_out_roc(), *self._lay_out_images()]
        self.picture = ClickPicture(self.figure, moving, on_click, on_key)

    def draw(self, anew: bool) -> str:
        """Bring the artists to the state, `anew` where the detector is another one; say what is chosen."""
        state = self.state
        if anew:
            self._draw_detector()
            self.picture.redraw()
        threshold, wrong, chosen = state.threshold, state.wrong, state.chosen
        self._threshold.set_xdata([threshold, threshold])
        self._wrong.set_data(state.scores[wrong], self._heights[wrong])
        self._ring.set_data([state.scores[chosen]], [self._heights[chosen]])
        fpr, tpr = state.curve.rates_at(threshold)
        self._now.set_data([max(fpr, self._least)], [tpr])
        self._rates.set_text(f"FPR {fpr:.3f}\nTPR {tpr:.3f}")
        return self._draw_images()

    def hit(self, ax: Axes, x: float, y: float) -> int | None:
        """What is at a place: on the ROC the number of a point, elsewhere that of an image, if any."""
        if ax in self._row:
            shown = self.state.neighbours(_SHOWN)
            place = self._row.index(ax)
            return shown[place] if place < len(shown) else None
        if ax is self.points:
            data = self.state.scores, self._heights
        elif ax is self.roc:
            curve = self.state.curve
            data = np.maximum(curve.false_positive_rate, self._least), curve.true_positive_rate
        else:
            return None
        pixels = ax.transData.transform(np.column_stack(data)) - ax.transData.transform((x, y))
        return int(np.hypot(*pixels.T).argmin())

    def _lay_out_points(self) -> list[Any]:
        ax, state = self.points, self.state
        clean, count = len(state.clean), len(state.clean) + len(state.triggered)
        # spread over a lane for each kind: steps of the golden ratio leave no gaps and repeat nothing
        self._heights = 0.1 + 0.8 * (np.arange(count) * 0.618034 % 1) + (np.arange(count) >= clean)
        options: dict[str, Any] = {"linestyle": "none", "markersize": 4.5, "alpha": 0.6, "markeredgewidth": 0}
        self._dots = [
            ax.plot([], [], marker=marker, color=colour, **options)[0]
            for marker, colour in (("o", CLEAN), ("^", TRIGGERED))
        ]
        self._threshold = ax.axvline(0, color="black", linewidth=2)
        empty: dict[str, Any] = {"linestyle": "none", "marker": "o", "color": "black", "markerfacecolor": "none"}
        self._wrong = ax.plot([], [], **empty, markersize=7, label="on the wrong side")[0]
        self._ring = ax.plot([], [], **empty, markersize=15, markeredgewidth=2.5, label="shown below")[0]
        ax.set(ylim=(-0.3, 2))  # room for the legend
        ax.set_yticks([0.5, 1.5], ["clean", "triggered"], rotation=90, va="center")
        for tick, colour in zip(ax.get_yticklabels(), (CLEAN, TRIGGERED), strict=True):
            tick.set(color=colour, weight="bold")
        ax.legend(handles=[self._wrong, self._ring], fontsize=_TICK, loc="lower right", ncols=2, frameon=False)
        label(ax, "Every image is a point: click one", "score: higher is more suspicious", "", _TICK)
        return [self._threshold, self._wrong, self._ring]

    def _lay_out_roc(self) -> list[Any]:
        ax = self.roc
        self._least = 0.5 / len(self.state.clean)  # where a rate of 0 is drawn
        chance = np.geomspace(self._least, 1, 100)
        ax.plot(chance, chance, color="0.35", linestyle="dotted", linewidth=1.2)
        self._curve = ax.plot([], [], color="0.35", linewidth=2.2)[0]
        self._now = ax.plot([], [], "o", color="black", markeredgecolor="white", markersize=12, clip_on=False)[0]
        self._rates = ax.text(0.05, 0.6, "", transform=ax.transAxes, va="center", fontsize=LABEL)
        ax.set(xscale="log", xlim=(self._least, 1), ylim=(0, 1.02))
        label(ax, "", "false-positive rate (clean images stopped)", "true-positive rate", _TICK)
        return [self._now, self._rates]

    def _lay_out_images(self) -> list[Any]:
        figure = self.figure
        large = [figure.add_axes((x, 0.25, 0.135, 0.2156)) for x in (0.08, 0.235)]
        self._row = [figure.add_axes((0.08 + 0.1 * i, 0.065, 0.085, 0.1358)) for i in range(_SHOWN)]
        self._images = [ax.imshow(np.ones((1, 1, 3)), extent=(0, 1, 0, 1)) for ax in (*large, *self._row)]
        for ax in (*large, *self._row):
            ax.set_axis_off()
        text: dict[str, Any] = {"va": "top", "fontsize": _TICK, "ha": "center"}
        self._below = figure.text(0.3025, 0.245, "the same without the trigger", **text)
        self._captions = [figure.text(0.1225 + 0.1 * i, 0.053, "", **text) for i in range(_SHOWN)]
        self._head = figure.text(0.4, 0.463, "", va="top", fontsize=TITLE, weight="bold")
        self._detail = figure.text(0.4, 0.42, "", va="top", fontsize=LABEL, linespacing=1.5)
        figure.text(0.02, 0.008, _HOW, fontsize=_TICK, color="0.35")
        self._side = figure.text(0.065, 0.133, "", rotation=90, va="center", ha="right", fontsize=_TICK)
        self._side.set_multialignment("center")
        self._frame = Rectangle((0, 0), 0.091, 0.1454, fill=False, linewidth=2.5, transform=figure.transFigure)
        figure.add_artist(self._frame)
        return [*self._images, self._below, self._side, *self._captions, self._head, self._detail, self._frame]

    def _draw_detector(self) -> None:
        state = self.state
        clean = len(state.clean)
        for dots, part in zip(self._dots, (slice(None, clean), slice(clean, None)), strict=True):
            dots.set_data(state.scores[part], self._heights[part])
        edges = state.histogram()[0]
        room = 0.02 * (edges[-1] - edges[0])
        self.points.set_xlim(edges[0] - room, edges[-1] + room)
        curve = state.curve
        self._curve.set_data(np.maximum(curve.false_positive_rate, self._least), curve.true_positive_rate)
        self.roc.set_title(f"ROC, AUROC {curve.auroc:.3f}: click a point", fontsize=TITLE)

    def _draw_images(self) -> str:
        state = self.state
        chosen, shown = state.chosen, state.neighbours(_SHOWN)
        original = state.original(chosen)
        for image, number in zip(self._images, [chosen, original, *shown], strict=False):
            image.set_data(_pixels(state.pixels(number)))
        for place, image in enumerate(self._images[2:]):
            image.set_visible(place < len(shown))
        for part in (self._images[1], self._below):
            part.set_visible(original != chosen)
        for place, caption in enumerate(self._captions):
            clean = place < len(shown) and shown[place] < len(state.clean)
            text = f"{'●' if clean else '▲'} {state.scores[shown[place]]:.4g}" if place < len(shown) else ""
            caption.set(text=text, color=CLEAN if clean else TRIGGERED)
        bar = len(state.bar)
        self._side.set_text(f"{len(shown)} of {bar} images\nof the bar" if bar else "its neighbours\nby score")
        self._frame.set_xy((0.077 + 0.1 * shown.index(chosen), 0.0602))
        seen = state.verdict(chosen)
        head, *lines = _said(seen, state.threshold, state.clean.classes)
        self._head.set(text=head, color=CLEAN if seen.target is None else TRIGGERED)
        self._detail.set_text("\n".join(lines))
        return "; ".join([head, *lines, *([f"one of {bar} images of the bar under the line"] if bar else [])])


def _said(seen: Verdict, threshold: float, classes: tuple[str, ...]) -> list[str]:
    """What is known of an image, line by line."""
    if seen.target is None:
        lines = [f"clean image, {'stopped' if seen.detected else 'let through'}", f"class: {classes[seen.true]}"]
    else:
        lines = [
            f"triggered image, {'detected' if seen.detected else 'missed'}",
            f"class: {classes[seen.true]}; the attacker’s target: {classes[seen.target]}",
        ]
    if seen.original is not None and seen.clipped is not None and seen.corrected is not None:
        decision = classes[seen.original]
        lines += [
            f"original network: {decision}, with a margin of {seen.margin:.3g}",
            f"clipped network: {classes[seen.clipped]}; margin of {decision}: {seen.clipped_margin:.3g}",
        ]
    sign = ">" if seen.detected else "≤"
    lines.append(f"score {seen.score:.5g} {sign} threshold {threshold:.5g}")
    if seen.corrected is None:
        lines.append("this detector gives a score alone")
    else:
        right = "right" if seen.corrected == seen.true else "wrong"
        lines.append(f"{'corrected to' if seen.detected else 'decision kept:'} {classes[seen.corrected]} ({right})")
    return lines


def _pixels(image: Tensor) -> Any:
    """An image as matplotlib takes it: (H, W, 3) in [0, 1]."""
    pixels = image.permute(1, 2, 0).double().numpy()
    return pixels if pixels.shape[-1] == 3 else pixels.mean(-1, keepdims=True).repeat(3, -1)
