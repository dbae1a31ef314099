"""`TriggerDesigner`: paint a trigger, see it on images, and train a network on it, live."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import ipywidgets as ipw
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray
from torch import nn

from bclip_lab.attacks import BackdoorAttack
from bclip_lab.attacks.triggers import COLOURS
from bclip_lab.data.images import LabelledImages, Splits, to_float
from bclip_lab.evaluation import Evaluation
from bclip_lab.plots import CLEAN, TRIGGERED, GalleryDisplay
from bclip_lab.training import TrainConfig
from bclip_lab.widgets.designing import PRESETS, DesignStep, TriggerDesign
from bclip_lab.widgets.live import TITLE, Picture, Shell, label, on_loop, said
from bclip_lab.widgets.paint import Paint

__all__ = ["TriggerDesigner"]

_SHOWN = 8  # images of the gallery
_OTHERS = -1  # in the place of a source class: every class but the target
_BREATH = 0.02  # seconds between two steps of a training: one message takes the loop several turns
_TICK = 11
_EXPECTED = ValueError, FileNotFoundError  # what a user can put right

_STYLE = """<style>
.bclip-lab-design { display: flex; flex-wrap: wrap; gap: 4px 20px; line-height: 1.35; font-size: 13px; }
.bclip-lab-design b { font-size: 22px; font-variant-numeric: tabular-nums; }
.bclip-lab-design .name { font-size: 16px; font-weight: 600; }
.bclip-lab-runs { max-height: 150px; overflow-y: auto; line-height: 1.3; }
.bclip-lab-runs td, .bclip-lab-runs th { text-align: right; padding: 0 10px 0 0; font-variant-numeric: tabular-nums; }
</style>"""


class TriggerDesigner(Shell):
    """Paint a trigger, see what it does to images, and train a network on it while you watch.

    Shows itself as the last line of a notebook's cell. The drawing starts as a 3x3 patch. The pictures and the norms
    below it follow the hand. *Train* poisons the training images with the drawing as it is then, and trains a fresh
    network on them in small steps, between which the page is answered; ACC, ASR and RA are measured after each epoch.
    *Stop* keeps the network as it is. A training waits while a cell runs.

    There is one training at a time: a new designer, and so the same cell run again, stops the training of an earlier
    one, which keeps what it has. Nothing is trained before *Train* is pressed.

    Without a kernel (a notebook that is read on a web page) the picture of the last state remains.
    `bclip_lab.widgets` says what happens when the kernel restarts or the notebook is reopened.

    Parameters
    ----------
    splits
        `train` is poisoned and trained on, `test` judges and is shown.
    make_model, config, train_images, test_images, seed
        As `TriggerDesign`: a ResNet-10 of width 16, 6 epochs, 4,000 training and 500 test images. 66 s on one core of a
        busy machine; less than a minute on two.

    Attributes
    ----------
    state
        The `TriggerDesign` behind the controls. After changing it in a cell, call `refresh`.
    step
        The latest record of the latest training, a `DesignStep`, or None.
    runs
        The last record of every training that has ended, in order.
    widget
        The controls, an ipywidgets `VBox`.
    figure
        The picture, a matplotlib figure.

    Raises
    ------
    ValueError
        As `TriggerDesign`.
    """

    _purpose = "paint a trigger and to train on it"
    _training: ClassVar[TriggerDesigner | None] = None  # the one whose training runs

    def __init__(
        self,
        splits: Splits,
        *,
        make_model: Callable[[], nn.Module] | None = None,
        config: TrainConfig | None = None,
        train_images: int = 4000,
        test_images: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.state = TriggerDesign(
            splits,
            make_model=make_model,
            config=config,
            train_images=train_images,
            test_images=test_images,
            seed=seed,
        )
        if TriggerDesigner._training is not None:
            TriggerDesigner._training.stop()
        self.step: DesignStep | None = None
        self.runs: list[DesignStep] = []
        self._drawing = _Drawing(self.state)
        self.figure, self._picture = self._drawing.figure, self._drawing.picture
        self._steps: Generator[DesignStep] | None = None  # of the training that runs
        self._given: DesignStep | None = None  # its latest record
        self._began = 0.0

        state = self.state
        self.paint = Paint(state.pixels, _rgb(state.test_images), [_hex(rgb) for rgb in COLOURS.values()])
        self._undo, self._redo, self._clear = (
            _button(*about)
            for about in (
                ("Undo", "undo", "Take the latest change of the drawing back"),
                ("Redo", "repeat", "Make it again"),
                ("Clear", "trash", "Take everything off"),
            )
        )
        self._presets = {name: _button(name, "", f"Start from the package's trigger “{name}”") for name in PRESETS}
        self._upload = ipw.FileUpload(
            accept="image/*",
            description="Upload a PNG",
            tooltip="A picture, resized to the images; its alpha channel is the opacity",
            layout=ipw.Layout(width="auto"),
        )
        classes = [(name, index) for index, name in enumerate(state.classes)]
        self._source = _choice("source", [("every class but the target", _OTHERS), *classes])
        self._target = _choice("target", classes)
        self._rate = ipw.BoundedFloatText(
            value=100 * state.poison_rate,
            min=0.1,
            max=100,
            step=0.5,
            description="poison rate in %",
            tooltip="Of the training images that are used",
            style={"description_width": "110px"},
            layout=ipw.Layout(width="190px"),
        )
        self._train, self._stop = (
            _button("Train", "play", "Train a fresh network on the drawing as it is now"),
            _button("Stop", "stop", "Stop the training and keep what there is"),
        )
        self._progress = ipw.FloatProgress(max=state.config.epochs, layout=ipw.Layout(width="150px"))
        self._norms, self._course, self._numbers, self._table = (ipw.HTML() for _ in range(4))
        self.widget = self._laid_out()
        self._connect()
        on_loop(self.widget, self._loop)
        self._sync()
        self._compute()
        self._numbers.value = _numbers(None)

    @property
    def model(self) -> nn.Module | None:
        """The network of the latest training, as it is now, in evaluation mode; None before the first."""
        return None if self.step is None else self.step.model

    @property
    def attack(self) -> BackdoorAttack:
        """The attack that `model` was trained on; before the first training, the one that is designed.

        `state.attack` is always the one that is designed. Raises `ValueError` as that does.
        """
        return self.state.attack if self.step is None else self.step.attack

    def refresh(self) -> None:
        """Show `state`, after a cell has changed it."""
        self._changed()
        self._compute()

    def stop(self) -> None:
        """Stop the training, if one runs, and keep its network as it is."""
        if self._steps is None:
            return
        with self._reported(*_EXPECTED):
            self._steps.close()
            self._end("stopped")

    # --- controls ---

    def _laid_out(self) -> Any:
        state = self.state
        about = (
            f'<div style="line-height:1.4">Trains on {len(state.train_images):,} of {state.available[0]:,} training '
            f"images for {state.config.epochs} epochs; measured on {len(state.test_images):,} of "
            f"{state.available[1]:,} test images.</div>"
        )
        wrapped = ipw.Layout(flex_flow="row wrap")
        right = ipw.VBox(
            [
                ipw.HBox([self._undo, self._redo, self._clear, self._upload], layout=wrapped),
                ipw.HBox([ipw.Label("start from"), *self._presets.values()], layout=wrapped),
                self._norms,
                self._source,
                self._target,
                self._rate,
                self._status,
                ipw.HBox([self._train, self._stop, self._progress], layout=wrapped),
                ipw.HTML(about),
                self._course,
                self._numbers,
                self._table,
            ],
            layout=ipw.Layout(flex="1 1 420px", max_width="620px"),
        )
        left = ipw.Box([self.paint], layout=ipw.Layout(overflow="hidden"))
        return ipw.VBox(
            [
                ipw.HTML(self.STYLE + _STYLE),
                ipw.HBox([left, right], layout=ipw.Layout(flex_flow="row wrap", grid_gap="0 24px")),
                self._picture.widget,
            ]
        )

    def _connect(self) -> None:
        self.paint.on_paint(self._painted)
        for button, act in (
            (self._undo, self.state.undo),
            (self._redo, self.state.redo),
            (self._clear, self.state.clear),
            *((button, partial(self.state.load_preset, name)) for name, button in self._presets.items()),
        ):
            button.on_click(lambda _, act=act: self._change(act))
        self._upload.observe(self._uploaded, names="value")
        for control in (self._source, self._target, self._rate):
            self._on_value(control, lambda _: self._choose())
        self._train.on_click(lambda _: self._start())
        self._stop.on_click(lambda _: self.stop())

    def _painted(self, pixels: NDArray[np.uint8], stroke: float) -> None:
        self.state.paint(pixels, stroke=stroke)
        self._sync()
        self._later.ask()

    def _change(self, act: Callable[[], object]) -> None:
        with self._reported(*_EXPECTED):
            act()
            self._changed()

    def _uploaded(self, change: Any) -> None:
        for file in change["new"]:
            self._change(partial(self.state.load_png, bytes(file["content"])))
        self._upload.value = ()  # so that the same file can be chosen again

    def _choose(self) -> None:
        source = self._source.value
        self.state.source, self.state.target = None if source == _OTHERS else source, self._target.value
        self.state.poison_rate = self._rate.value / 100
        self._later.ask()

    def _changed(self) -> None:
        self.paint.pixels = self.state.pixels.tobytes()
        self._sync()
        self._later.ask()

    def _sync(self) -> None:
        """Set the controls to what the state is."""
        state, runs = self.state, self._steps is not None
        self._undo.disabled, self._redo.disabled = not state.can_undo, not state.can_redo
        self._train.disabled, self._stop.disabled = runs, not runs
        with self._said_by_us():
            self._source.value = _OTHERS if state.source is None else state.source
            self._target.value = state.target
            self._rate.value = round(100 * state.poison_rate, 6)

    # --- training ---

    def _start(self) -> None:
        if self._steps is not None:  # a second click, made before the first was handled
            return
        if TriggerDesigner._training is not None:
            TriggerDesigner._training.stop()
        with self._reported(*_EXPECTED):
            self._begin(self.state.train())

    def _begin(self, steps: Generator[DesignStep]) -> None:
        TriggerDesigner._training = self
        self._steps, self._given, self._began = steps, None, time.perf_counter()
        self._drawing.begin()
        self._progress.value = 0
        self._status.value, self._course.value = "", said("starting …")
        self._sync()
        if self._loop is None:
            while self._steps is not None:
                self._advance(steps)
        else:
            self._loop.call_later(_BREATH, self._advance, steps)

    def _advance(self, steps: Generator[DesignStep]) -> None:
        """Take one step of a training, unless it has been stopped, and ask for the next."""
        if steps is not self._steps:
            return
        try:
            step = next(steps, None)
            if step is None:
                self._end("trained")
                return
            if self._given is None:  # the numbers of the training before are not this one's
                self._numbers.value = _numbers(None)
            self.step = self._given = step
            self._show(step)
        except Exception as error:  # else it is seen in the kernel's log only
            self._end("failed", error)
            raise
        if self._loop is not None:
            self._loop.call_later(_BREATH, self._advance, steps)

    def _show(self, step: DesignStep) -> None:
        self._progress.value = step.epoch
        left = (time.perf_counter() - self._began) * (step.epochs / step.epoch - 1)
        text = f"epoch {step.epoch:.1f} of {step.epochs}, loss {step.loss:.3f}, about {left:.0f} s left"
        self._course.value = said(text)
        if step.evaluation is not None:
            self._numbers.value = _numbers(step.evaluation)
            self._drawing.add(step.epoch, step.evaluation)

    def _end(self, how: str, error: Exception | None = None) -> None:
        """Measure what there is, after a training has ended, and show it."""
        step, seconds = self._given, time.perf_counter() - self._began
        self._steps = TriggerDesigner._training = None
        self._sync()
        if error is not None:
            how = f"{how}: {type(error).__name__}: {error}; there is what was trained before"
        elif step is None:
            how = f"{how} before the first step"
        else:
            if step.evaluation is None:
                self.step = step = replace(step, evaluation=self.state.evaluate(step))
                self._show(step)
            how = f"{how}: {step.epoch:.3g} of {step.epochs} epochs in {seconds:.0f} s, loss {step.loss:.3f}"
            self.runs.append(step)
            self._table.value = _table(self.runs)
        self._course.value = said(how, wrong=error is not None)

    # --- what is shown ---

    def _compute(self) -> None:
        with self._reported(*_EXPECTED):
            self._drawing.draw()
            self._norms.value = _norms(self.state)
            self._say("")


def _button(name: str, icon: str, tip: str) -> Any:
    return ipw.Button(description=name, icon=icon, tooltip=tip, layout=ipw.Layout(width="auto"))


def _choice(name: str, options: list[tuple[str, int]]) -> Any:
    style, layout = {"description_width": "60px"}, ipw.Layout(width="320px")
    return ipw.Dropdown(options=options, description=name, style=style, layout=layout)


def _rgb(data: LabelledImages) -> NDArray[np.uint8]:
    """The first of the images: uint8 (H, W, 3)."""
    image = (to_float(data.images[:1]).cpu()[0] * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    return np.repeat(image, 3 // image.shape[2], axis=2)


def _hex(rgb: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in rgb)


def _norms(state: TriggerDesign) -> str:
    found = state.norms()
    psnr = f"{found.psnr:.1f} dB" if math.isfinite(found.psnr) else "∞"
    return (
        f'<div class="bclip-lab-norms"><b>{state.painted:,}</b> of {state.height * state.width:,} pixels painted<br>'
        f"L<sub>∞</sub> {found.l_inf:.3f} · L<sub>2</sub> {found.l_2:.2f} · PSNR {psnr} · SSIM {found.ssim:.3f}, "
        f"means over {found.images} images</div>"
    )


def _numbers(found: Evaluation | None) -> str:
    if found is None:
        return '<div class="bclip-lab-design">ACC, ASR and RA are measured after each epoch.</div>'
    cells = []
    for name, count, what in (
        ("acc", found.clean, "clean right"),
        ("asr", found.triggered, "triggered → target"),
        ("ra", found.triggered, "triggered right"),
    ):
        share = float(getattr(found, name))
        cells.append(
            f'<div><span class="name">{name.upper()}</span> <b class="bclip-lab-{name}">{share:.1%}</b><br>'
            f"{round(share * count):,} of {count:,} {what}</div>"
        )
    return f'<div class="bclip-lab-design">{"".join(cells)}</div>'


def _table(runs: list[DesignStep]) -> str:
    """All trainings so far, the latest first."""
    rows = []
    for number, step in reversed(list(enumerate(runs, 1))):
        mask = step.attack.trigger.mask  # type: ignore[attr-defined]
        found = step.evaluation
        cells = (number, int((mask > 0).sum()), f"{step.attack.poison_rate:.1%}", f"{step.epoch:.3g}")
        shares = (f"{found.acc:.1%}", f"{found.asr:.1%}") if found else ("", "")
        rows.append("".join(f"<td>{cell}</td>" for cell in (*cells, *shares)))
    head = "".join(f"<th>{name}</th>" for name in ("training", "pixels", "poison rate", "epochs", "ACC", "ASR"))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="bclip-lab-runs"><table><tr>{head}</tr>{body}</table></div>'


class _Drawing:
    """The picture: the drawing on a gallery of images, and the course of the training."""

    def __init__(self, state: TriggerDesign) -> None:
        self.state = state
        self.figure = Figure(figsize=(11.5, 3.9), dpi=100, facecolor="white")
        self.gallery, self.course = self.figure.subplots(
            1,
            2,
            gridspec_kw={"width_ratios": (2.35, 1), "left": 0.085, "right": 0.985, "top": 0.8, "bottom": 0.15},
        )
        self._pitch = state.height + 2, state.width + 2
        across = 3 * self._pitch[0], _SHOWN * self._pitch[1], 3
        self._image = self.gallery.imshow(np.ones(across), interpolation="nearest", aspect="equal")
        self.gallery.spines[:].set_visible(False)
        self.gallery.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=_TICK)
        self._labels: tuple[str, ...] = ()
        self._lay_out_course()
        self.picture = Picture(self.figure, [self._image, *self._lines.values()])

    def draw(self) -> None:
        """Bring the gallery to the state. Raises `ValueError` where the label map is none."""
        state = self.state
        attack = BackdoorAttack(state, state.label_map)
        found = GalleryDisplay.from_attack(attack, state.test_images, _SHOWN)
        mosaic = np.ones((3, self._pitch[0], _SHOWN, self._pitch[1], 3))
        tiles = found.images.reshape(3, found.columns, *found.images.shape[1:])
        mosaic[:, : state.height, : found.columns, : state.width] = tiles.transpose(0, 2, 1, 3, 4)
        self._image.set_data(mosaic.reshape(3 * self._pitch[0], -1, 3))
        names = [title.split("\n")[0] for title in found.titles[: found.columns]]
        labels = (*names, *found.row_labels, state.classes[state.target])
        if labels != self._labels:
            self._label(names, found.row_labels)
            self._labels = labels
        self.picture.update()

    def begin(self) -> None:
        """Start the course anew."""
        for line in self._lines.values():
            line.set_data([], [])
        self.picture.update()

    def add(self, epoch: float, found: Evaluation) -> None:
        """Draw one point more of the course."""
        for name, line in self._lines.items():
            x, y = line.get_data()
            line.set_data([*x, epoch], [*y, getattr(found, name)])
        self.picture.update()

    def _label(self, names: list[str], row_labels: tuple[str, ...]) -> None:
        height, width = self._pitch
        ax = self.gallery
        ax.set_xticks([index * width + (width - 3) / 2 for index in range(len(names))])
        ax.set_xticklabels([name.replace(" ", "\n", 1) for name in names])
        ax.set_yticks([index * height + (height - 3) / 2 for index in range(3)], row_labels)
        ax.set_title(f"What is to become “{self.state.classes[self.state.target]}”", fontsize=TITLE)
        self.picture.redraw()

    def _lay_out_course(self) -> None:
        ax, epochs = self.course, self.state.config.epochs
        self._lines = {
            "acc": ax.plot([], [], "-o", color=CLEAN, linewidth=2, label="ACC")[0],
            "asr": ax.plot([], [], "--s", color=TRIGGERED, linewidth=2, label="ASR")[0],
        }
        ax.set(xlim=(0, epochs + 0.1), ylim=(-0.04, 1.04))
        label(ax, "The training", "epoch", "", _TICK)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.grid(color="0.92")
        ax.legend(loc="center right", fontsize=_TICK)
