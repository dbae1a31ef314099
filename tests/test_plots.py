import contextlib
import dataclasses
import functools
import io
import math
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from torch import nn
from tqdm import tqdm

from bclip_lab import benchmark, plots
from bclip_lab.attacks import AllToOne, BackdoorAttack, OneToOne
from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages, TriggeredImages
from bclip_lab.detection import MMBD, MMDF
from bclip_lab.evaluation import Evaluation, RocCurve, Visibility
from bclip_lab.plots import (
    CLEAN,
    TRIGGERED,
    AbnormalityDisplay,
    ActivationDisplay,
    BoundsDisplay,
    DecisionDisplay,
    EvaluationDisplay,
    GalleryDisplay,
    GridDisplay,
    HistoryDisplay,
    MarginDisplay,
    MaximumMarginDisplay,
    RocDisplay,
    ScoreDisplay,
    SiteDisplay,
    SweepDisplay,
    TradeOffDisplay,
    TriggerGalleryDisplay,
    live,
)

CLASSES = ("cat", "dog", "cow")


@pytest.fixture(autouse=True)
def no_figure_left_open():
    yield
    plt.close("all")


@dataclass(frozen=True)
class FirstChannel:
    """An attack with a known answer: the first channel becomes `value`, the target is class 1."""

    value: float = 1.0

    def triggered(self, data):
        rows = torch.nonzero(data.labels != 1).flatten()
        images = data.images[rows].clone()
        images[:, 0] = self.value
        labels = data.labels[rows]
        return TriggeredImages(images, labels, torch.ones_like(labels), rows, data.classes)


def pixels(*values):
    """Images of one RGB pixel."""
    return torch.tensor(values, dtype=torch.float32)[:, :, None, None]


@pytest.fixture
def data():
    images = pixels((0.1, 0.2, 0.3), (0.2, 0.4, 0.6), (0.0, 0.5, 0.2), (0.4, 0.1, 0.1))
    return LabelledImages(images, torch.tensor([0, 1, 2, 0]), CLASSES)


def linear(weight):
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight, dtype=torch.float32)
    return layer


@pytest.fixture
def clipped():
    """Activations (red, 2 green) at site "2" and their sum at "4"; logits (0, 10 sum - 5, -100)."""
    head = nn.Linear(1, 3)
    head.weight.data, head.bias.data = torch.tensor([[0.0], [10], [0]]), torch.tensor([0.0, -5, -100])
    layers = linear([[1, 0, 0], [0, 2, 0]]), nn.ReLU(), linear([[1, 1]]), nn.ReLU()
    return ClippedModel(nn.Sequential(nn.Flatten(), *layers, head))


def heights(container):
    return [bar.get_height() for bar in container]


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def axes(*shape):
    """Axes outside pyplot."""
    return Figure().subplots(*shape)


def close_to(expected):
    return pytest.approx(expected, rel=1e-6, abs=1e-6)


# --- the convention -----------------------------------------------------------------------------------------


def displays():
    evaluation = Evaluation(0.9, 0.5, 0.25, 100, 80)
    numbers, image = np.array([0.0, 1.0, 2.0]), np.zeros((2, 2, 3))
    return [
        GalleryDisplay(np.zeros((1, 2, 2, 3)), 1),
        TriggerGalleryDisplay(
            ("patch",), image, image[None], 0 * image[None], (1,), (Visibility(0, 0, 0, math.inf, 1, images=9),)
        ),
        ActivationDisplay("relu", 0, numbers, numbers, 1.5),
        AbnormalityDisplay({"relu": numbers}),
        BoundsDisplay({"relu": numbers}),
        MarginDisplay({"model": numbers}, {"model": numbers}),
        MaximumMarginDisplay(numbers, CLASSES, 0.01, 2),
        ScoreDisplay(numbers, numbers, 1.0),
        RocDisplay(RocCurve(numbers, numbers + 1), "MMDF", 1.0),
        EvaluationDisplay({"model": evaluation}, 0.8),
        HistoryDisplay(np.array([1.0, 2.0]), {"loss": np.array([3.0, 1.0])}),
    ]


@pytest.mark.parametrize("display", displays(), ids=lambda display: type(display).__name__)
def test_convention(display):
    given = axes()
    assert display.plot(given) is display
    drawn = display.axes_.ravel()[0] if hasattr(display, "axes_") else display.ax_
    assert drawn is given
    assert display.figure_ is given.figure
    assert not plt.get_fignums(), "with axes given, pyplot is left alone"

    display.plot()
    drawn = display.axes_.ravel()[0] if hasattr(display, "axes_") else display.ax_
    assert drawn is not given
    assert plt.get_fignums() == [display.figure_.number], "a figure that a notebook shows by itself"
    display.figure_.canvas.draw()

    assert repr(display).startswith(type(display).__name__ + "(") and len(repr(display)) < 200
    with pytest.raises(dataclasses.FrozenInstanceError):
        display.name = "other"


def test_clean_and_triggered_differ_by_more_than_colour():
    assert to_hex(CLEAN) != to_hex(TRIGGERED)
    ax = ScoreDisplay(np.zeros(3), np.ones(3), 0.5).plot(axes()).ax_
    clean, triggered = ax.containers
    assert {to_hex(bar.get_facecolor()) for bar in clean} == {CLEAN}
    assert {to_hex(bar.get_facecolor()) for bar in triggered} == {TRIGGERED}
    assert not any(bar.get_hatch() for bar in clean) and all(bar.get_hatch() for bar in triggered)


# --- images -------------------------------------------------------------------------------------------------


def test_gallery_fills_row_by_row_and_leaves_the_rest_empty():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 6) * 51
    display = GalleryDisplay.from_images(images, titles="abcde", columns=3).plot()
    assert display.axes_.shape == (2, 3)
    shown = [ax.images[0].get_array() for ax in display.axes_.flat[:5]]
    assert [array.shape for array in shown] == [(4, 6, 3)] * 5
    assert [float(array.max()) for array in shown] == close_to([0, 0.2, 0.4, 0.6, 0.8])
    assert [ax.get_title() for ax in display.axes_.flat] == ["a", "b", "c", "d", "e", ""]
    assert not display.axes_[1, 2].axison


def test_gallery_of_labelled_images_is_titled_with_their_classes(data):
    display = GalleryDisplay.from_images(data).plot()
    assert display.columns == 4
    assert [ax.get_title() for ax in display.axes_.flat] == ["cat", "dog", "cow", "cat"]
    assert not GalleryDisplay.from_images(data.images).titles


def test_gallery_of_grey_images_keeps_black_and_white():
    ax = GalleryDisplay.from_images(torch.full((1, 1, 2, 2), 0.25)).plot(axes()).axes_[0, 0]
    assert ax.images[0].get_array().shape == (2, 2)
    assert ax.images[0].get_clim() == (0, 1)


def test_gallery_of_an_attack_takes_classes_in_turn(data):
    before = data.images.clone()
    display = GalleryDisplay.from_attack(FirstChannel(0.6), data, count=3, magnify=2).plot()
    assert display.axes_.shape == (3, 3)
    # rows 0 and 3 are cats, 2 is a cow, 1 is of the target class already
    assert [ax.get_title() for ax in display.axes_[0]] == ["cat\n→ dog", "cow\n→ dog", "cat\n→ dog"]
    red = [[float(ax.images[0].get_array()[0, 0, 0]) for ax in row] for row in display.axes_]
    assert red[0] == close_to([0.1, 0.0, 0.4])
    assert red[1] == close_to([0.6, 0.6, 0.6])
    assert red[2] == close_to([1.0, 1.0, 0.9])  # 0.5 + 2 * 0.5, 0.5 + 2 * 0.6 cut off, 0.5 + 2 * 0.2
    green = display.axes_[2, 0].images[0].get_array()[0, 0, 1]
    assert green == 0.5, "what does not change is grey"
    assert [ax.get_ylabel() for ax in display.axes_[:, 0]] == ["clean", "triggered", "difference\n×2"]
    assert torch.equal(data.images, before)


@pytest.mark.parametrize(("moved", "factor"), [(0.1, "×5"), (0.2, "×2"), (0.9, "×1"), (0.0, "×1")])
def test_gallery_magnifies_by_a_whole_number_that_leaves_every_pixel_in_range(moved, factor):
    data = LabelledImages(torch.zeros(1, 3, 2, 2), torch.tensor([0]), CLASSES)
    display = GalleryDisplay.from_attack(FirstChannel(moved), data)
    assert display.row_labels[2].endswith(factor)
    assert display.columns == 1


def test_gallery_sees_all_classes_of_images_sorted_by_class():
    data = LabelledImages(torch.zeros(400, 3, 2, 2), torch.arange(400) // 200 * 2, CLASSES)
    display = GalleryDisplay.from_attack(FirstChannel(), data, count=2)
    assert display.titles[:2] == ("cat\n→ dog", "cow\n→ dog")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda data: GalleryDisplay.from_images(data.images[:0]), "images is empty"),
        (
            lambda data: GalleryDisplay.from_images(torch.zeros(1, 2, 4, 4)),
            "1 or 3 channels to be shown, got 2",
        ),
        (
            lambda data: GalleryDisplay.from_images(data, ["a"]),
            "titles must be as many as images, got 1 for 4",
        ),
        (lambda data: GalleryDisplay.from_images(data, columns=0), "columns must be at least 1, got 0"),
        (
            lambda data: GalleryDisplay.from_images(data).plot(axes(1, 2)),
            r"axes must be 4 axes \(1 x 4\), got 2",
        ),
        (lambda data: GalleryDisplay.from_attack(FirstChannel(), data, 0), "count must be at least 1, got 0"),
        (lambda data: GalleryDisplay.from_attack(FirstChannel(), data, magnify=0), "magnify must be above 0"),
    ],
)
def test_gallery_refuses(call, message, data):
    with pytest.raises(ValueError, match=message):
        call(data)


@dataclass(frozen=True)
class Redder:
    """A trigger with a known answer: red changes by `by` in the left half."""

    by: float

    def embed(self, images):
        triggered = images.clone()
        triggered[:, 0, :, : images.shape[3] // 2] += self.by
        return triggered


def shown(ax):
    return [np.asarray(image.get_array()) for image in ax.images]


def test_trigger_gallery_shows_every_trigger_on_the_same_image():
    images = torch.tensor([0.25, 0.5])[:, None, None, None].expand(2, 3, 6, 8).clone()
    before = images.clone()
    display = TriggerGalleryDisplay.from_triggers({"faint": Redder(0.02), "strong": Redder(0.4)}, images, shown=1)
    assert torch.equal(images, before)
    assert display.names == ("faint", "strong") and display.magnified == (25, 1)
    ax = display.plot(axes()).ax_
    left = [array[0, 0] for array in shown(ax)]
    right = [array[0, -1] for array in shown(ax)]
    assert [array.shape for array in shown(ax)] == [(6, 8, 3)] * 6
    for clean in (left[0], left[3], *(right[i] for i in (0, 1, 3, 4))):
        assert clean == close_to([0.5, 0.5, 0.5])
    assert left[1] == close_to([0.52, 0.5, 0.5]) and left[4] == close_to([0.9, 0.5, 0.5])
    # both differences as far from grey as the range allows; what does not change is grey
    assert left[2] == close_to([1, 0.5, 0.5]) and left[5] == close_to([0.9, 0.5, 0.5])
    assert right[2] == close_to([0.5, 0.5, 0.5]) and right[5] == close_to([0.5, 0.5, 0.5])


def test_trigger_gallery_keeps_the_sign_of_a_difference():
    images = torch.full((1, 3, 6, 8), 0.5)
    display = TriggerGalleryDisplay.from_triggers({"less": Redder(-0.1)}, images)
    assert display.difference[0, 0, 0] == close_to([-0.1, 0, 0])
    assert shown(display.plot(axes()).ax_)[2][0, 0] == close_to([0, 0.5, 0.5])


def test_trigger_gallery_prints_the_numbers_of_all_images():
    images = torch.full((3, 3, 6, 8), 0.5)
    display = TriggerGalleryDisplay.from_triggers({"none": Redder(0), "shift": Redder(0.1)}, images)
    assert display.visibility[1] == Visibility.from_images(images, Redder(0.1).embed(images))
    ax = display.plot(axes()).ax_
    texts = [text.get_text() for text in ax.texts]
    # mean square 0.1^2 / 6, as one of three channels changes in one half
    assert texts[:6] == ["×1", "0.0%", "0.000", "0.00", "∞", "1.000"]
    assert texts[6:11] == ["×5", "50.0%", "0.100", "0.49", "27.8"] and float(texts[11]) < 1
    assert [label.get_text() for label in ax.get_yticklabels()] == ["none", "shift"]
    heads = [label.get_text() for label in ax.get_xticklabels()]
    assert heads[:4] == ["clean", "triggered", "difference", "magnified"] and heads[-1] == "SSIM"
    # a number stands under its head and beside its own pictures
    assert [text.get_position()[0] for text in ax.texts] == close_to([*ax.get_xticks()[3:]] * 2)
    for row, place in enumerate(ax.get_yticks()):
        assert {text.get_position()[1] for text in ax.texts[6 * row : 6 * row + 6]} == {place}
        bottom, top = ax.images[3 * row].get_extent()[2:]
        assert top < place < bottom
    assert "3 images" in ax.get_title()


def test_trigger_gallery_of_grey_and_of_labelled_images():
    data = LabelledImages(torch.full((2, 1, 6, 6), 128, dtype=torch.uint8), torch.tensor([0, 1]), CLASSES)
    ax = TriggerGalleryDisplay.from_triggers({"same": Redder(0)}, data).plot(axes()).ax_
    assert [array.shape for array in shown(ax)] == [(6, 6)] * 3
    assert {image.get_clim() for image in ax.images} == {(0, 1)}


@pytest.mark.parametrize(
    ("triggers", "images", "shown", "message"),
    [
        ({}, torch.zeros(1, 3, 6, 6), 0, "triggers is empty"),
        ({"same": Redder(0)}, torch.zeros(0, 3, 6, 6), 0, "images is empty"),
        ({"same": Redder(0)}, torch.zeros(2, 3, 6, 6), 2, r"shown must lie in \[0, 2\), got 2"),
        ({"same": Redder(0)}, torch.zeros(2, 3, 6, 6), -1, r"shown must lie in \[0, 2\), got -1"),
        ({"same": Redder(0)}, torch.zeros(1, 2, 6, 6), 0, "1 or 3 channels to be shown, got 2"),
        ({"same": Redder(0)}, torch.zeros(1, 3, 5, 6), 0, "at least 6x6 pixels, got 5x6"),
    ],
)
def test_trigger_gallery_refuses(triggers, images, shown, message):
    with pytest.raises(ValueError, match=message):
        TriggerGalleryDisplay.from_triggers(triggers, images, shown)


# --- activations and bounds ---------------------------------------------------------------------------------


def test_activations_of_a_channel_and_of_all(clipped, data):
    triggered = FirstChannel().triggered(data)
    green = ActivationDisplay.from_model(clipped, data, triggered, "2", channel=1)
    assert green.clean.tolist() == close_to([0.4, 0.8, 1.0, 0.2])
    assert green.triggered.tolist() == close_to([0.4, 1.0, 0.2])
    largest = ActivationDisplay.from_model(clipped, data.images, triggered.images, "2")
    assert largest.clean.tolist() == close_to([0.4, 0.8, 1.0, 0.4])
    assert largest.triggered.tolist() == close_to([1.0, 1.0, 1.0])
    assert largest.bound == math.inf


def test_activations_are_drawn_in_per_cent_of_their_own_images_with_the_bound_as_a_line(clipped, data):
    clipped.set_bounds({"2": torch.tensor([0.5, 0.75])})
    display = ActivationDisplay.from_model(clipped, data, FirstChannel().triggered(data), "2", channel=1)
    ax = display.plot(axes()).ax_
    clean, triggered = ax.containers
    assert sum(heights(clean)) == close_to(100) and sum(heights(triggered)) == close_to(100)
    assert max(heights(clean)) == close_to(25) and max(heights(triggered)) == close_to(100 / 3)
    assert [list(line.get_xdata()) for line in ax.lines] == [[0.75, 0.75]]
    assert "bound: 0.75" in legend(ax)
    assert "channel 1" in ax.get_title() and ax.get_xlabel() and ax.get_ylabel()
    largest = ActivationDisplay.from_model(clipped, data, data, "2").plot(axes())
    assert largest.bound == 0.75
    assert "largest bound of the site: 0.75" in legend(largest.ax_)


def test_no_bound_no_line(clipped, data):
    ax = ActivationDisplay.from_model(clipped, data, data, "2", 0).plot(axes()).ax_
    assert not ax.lines and legend(ax) == ["clean (4 images)", "triggered (4 images)"]


@pytest.mark.parametrize(
    ("clean", "site", "channel", "message"),
    [
        (slice(None), "relu", None, "no site 'relu'; the sites are 2, 4"),
        (slice(None), "2", 2, r"channel must lie in \[0, 2\) at site '2', got 2"),
        (slice(None), "2", -1, r"channel must lie in \[0, 2\)"),
        (slice(0), "2", None, "clean is empty"),
    ],
)
def test_activations_refuse(clipped, data, clean, site, channel, message):
    with pytest.raises(ValueError, match=message):
        ActivationDisplay.from_model(clipped, data[clean], data, site, channel)


def test_abnormality_knows_the_worst_channel(clipped, data):
    display = AbnormalityDisplay.from_model(clipped, data, FirstChannel().triggered(data))
    # red: 1.0 after 0.4; green as before. Sums: 1.0 + 1.0 (the cow) after 0.2 + 0.8 (the dog)
    assert display.ratios["2"].tolist() == close_to([2.5, 1.0])
    assert display.worst() == [("2", 0, close_to(2.5)), ("4", 0, close_to(2.0))]


def test_abnormality_is_measured_on_the_model_as_given(clipped, data):
    clipped.set_bounds({"2": torch.tensor([0.4, torch.inf])})
    bounds = clipped.bounds
    display = AbnormalityDisplay.from_model(clipped, data, FirstChannel().triggered(data))
    assert display.ratios["2"].tolist() == close_to([2.5, 1.0]), "before the clip of the site itself"
    assert display.ratios["4"].tolist() == close_to([1.4]), "after the clips of those before it"
    assert all(torch.equal(clipped.bounds[site], bound) for site, bound in bounds.items())


def test_abnormality_is_drawn_sorted_with_no_cell_where_there_is_no_channel():
    ratios = {"relu": np.array([0.0, 8.0, 2.0]), "relu_1": np.array([0.5])}
    ax = AbnormalityDisplay(ratios).plot(axes()).ax_
    mesh = ax.collections[0]
    cells = np.ma.getdata(mesh.get_array()).reshape(2, 3)
    hidden = np.ma.getmaskarray(mesh.get_array()).reshape(2, 3)
    assert hidden.tolist() == [[False] * 3, [False, True, True]]
    assert cells[0].tolist() == [8.0, 2.0, 1 / 8], "below the end of the scale its last colour is drawn"
    assert cells[1, 0] == 0.5
    assert (mesh.norm.vmin, mesh.norm.vmax) == (1 / 8, 8.0), "centred at 1 on a logarithmic scale"
    assert mesh.norm(1.0) == close_to(0.5)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["relu", "relu_1"]
    assert [text.get_text() for text in ax.texts] == ["channel 1: ×8", "channel 0: ×0.5"]
    assert ratios["relu"].tolist() == [0.0, 8.0, 2.0]


def test_bounds_are_compared_with_the_clean_maximum_of_the_original(clipped, data):
    clipped.set_bounds({"2": torch.tensor([0.1, torch.inf]), "4": 0.5})
    display = BoundsDisplay.from_model(clipped, data)
    assert display.ratios["2"].tolist() == close_to([0.25, math.inf])
    assert display.ratios["4"].tolist() == close_to([0.5]), "0.5 of 1.0, though the first clip lowers that"


def test_bounds_of_silent_channels_and_sites_count_as_no_cut():
    bounds = {"relu": torch.tensor([0.5, 3.0]), "relu_1": [0.25]}
    display = BoundsDisplay.from_bounds(bounds, {"relu": [0.0, 4.0], "relu_1": [0.0]})
    assert {site: values.tolist() for site, values in display.ratios.items()} == {
        "relu": [12.5, 0.75],
        "relu_1": [0.25],
    }


def test_bounds_are_drawn_from_0_to_1_most_cut_first():
    ax = BoundsDisplay({"relu": np.array([np.inf, 0.5, -0.1])}).plot(axes()).ax_
    mesh = ax.collections[0]
    assert np.ma.getdata(mesh.get_array()).ravel().tolist() == [0.0, 0.5, 1.0]
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 1)
    assert [text.get_text() for text in ax.texts] == ["2 of 3 cut"]


@pytest.mark.parametrize(
    ("bounds", "maximum", "message"),
    [
        ({}, {}, "must have the same sites"),
        ({"relu": [1.0]}, {"relu_1": [1.0]}, r"same sites, got \['relu'\] and \['relu_1'\]"),
        ({"relu": [1.0]}, {"relu": [1.0, 2.0]}, r"site 'relu': .*\(1,\) and \(2,\)"),
    ],
)
def test_bounds_refuse(bounds, maximum, message):
    with pytest.raises(ValueError, match=message):
        BoundsDisplay.from_bounds(bounds, maximum)


# --- margins ------------------------------------------------------------------------------------------------


def test_margins_of_the_true_and_of_the_target_class(clipped, data):
    # sums .5, 1.0, 1.0, .6; logits (0, 10 sum - 5, -100)
    bounded = ClippedModel(clipped.original)
    bounded.set_bounds({"4": 0.25})
    models = {"before": clipped.original, "after": bounded}
    display = MarginDisplay.from_models(models, data, FirstChannel())
    assert display.clean["before"].tolist() == close_to([0.0, 5.0, -105.0, -1.0])
    assert display.triggered["before"].tolist() == close_to([9.0, 15.0, 7.0])
    assert display.clean["after"].tolist() == close_to([2.5, -2.5, -100.0, 2.5])
    assert display.triggered["after"].tolist() == close_to([-2.5] * 3)


def test_margins_are_drawn_on_one_scale_for_all_models():
    clean = {"a": np.array([1.0, 2.0]), "b": np.array([-1.0, 1.0])}
    triggered = {"a": np.array([9.0, 10.0]), "b": np.array([-2.0])}
    display = MarginDisplay(clean, triggered).plot(axes(2))
    assert display.axes_.shape == (2,)
    assert [ax.get_xlim() for ax in display.axes_] == [(-2.0, 10.0)] * 2
    assert [ax.get_title() for ax in display.axes_] == ["Margins, a", "Margins, b"]
    assert legend(display.axes_[1]) == [
        "clean (2 images): 50.0% right of 0",
        "triggered (1 images): 0.0% right of 0",
    ]
    assert "margin in logits" in display.axes_[1].get_xlabel()
    assert MarginDisplay(clean, triggered).plot().axes_[0].get_xlim() == (-2.0, 10.0)


def test_margins_refuse(clipped, data):
    with pytest.raises(ValueError, match="models is empty"):
        MarginDisplay.from_models({}, data, FirstChannel())
    with pytest.raises(ValueError, match="data is empty"):
        MarginDisplay.from_models({"a": clipped}, data[:0], FirstChannel())


def test_maximum_margins_with_and_without_a_target():
    detector = MMBD(nn.Identity())
    with pytest.raises(ValueError, match="not fitted"):
        MaximumMarginDisplay.from_detector(detector, "abcde")
    detector.judge(np.array([3.0, 200.0, 4.0, 5.0, 4.5]))
    with pytest.raises(ValueError, match="5 names, got 3"):
        MaximumMarginDisplay.from_detector(detector, CLASSES)
    ax = MaximumMarginDisplay.from_detector(detector, "abcde").plot(axes()).ax_
    bars = ax.containers[0]
    assert [bar.get_width() for bar in bars] == [3.0, 200.0, 4.0, 5.0, 4.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == list("abcde")
    assert [bool(bar.get_hatch()) for bar in bars] == [False, True, False, False, False]
    assert [to_hex(bar.get_facecolor()) == TRIGGERED for bar in bars] == [False, True, False, False, False]
    assert "target 'b'" in ax.get_title() and f"p = {detector.p_value_:.2g}" in ax.get_title()
    assert "assumes one target class" in ax.get_title()

    detector.judge(np.array([3.0, 5.5, 4.0, 5.0, 4.5]))
    ax = MaximumMarginDisplay.from_detector(detector, "abcde").plot(axes()).ax_
    assert "no attack found" in ax.get_title()
    assert not any(bar.get_hatch() for bar in ax.containers[0])


# --- detection ----------------------------------------------------------------------------------------------


class Redness:
    """A detector with a known answer: the score is the mean of the first channel."""

    def __init__(self, threshold=None):
        if threshold is not None:
            self.threshold_ = threshold

    def score(self, images):
        return images[:, 0].mean((1, 2))


def test_scores_and_the_rates_at_the_threshold(data):
    display = ScoreDisplay.from_detector(Redness(0.15), data, FirstChannel(0.3))
    assert display.clean.tolist() == close_to([0.1, 0.2, 0.0, 0.4])
    assert display.triggered.tolist() == close_to([0.3, 0.3, 0.3])
    ax = display.plot(axes()).ax_
    assert [list(line.get_xdata()) for line in ax.lines] == [[0.15, 0.15]]
    assert sorted(legend(ax)) == [
        "clean (4 images): FPR 0.500",
        "threshold: 0.15",
        "triggered (3 images): TPR 1.000",
    ]
    assert "Redness" in ax.get_title()


def test_scores_of_mmdf(clipped, data):
    with pytest.raises(ValueError, match="call fit"):
        ScoreDisplay.from_detector(MMDF(clipped), data, FirstChannel())
    clipped.set_bounds({"4": 0.5})
    detector = MMDF(clipped).fit(data)
    display = ScoreDisplay.from_detector(detector, data, FirstChannel())
    assert display.threshold == detector.threshold_ and display.name == "MMDF"
    # sums 1.4, 2.0, 1.2 fall to 0.5: the margin of class 1 from 9, 15, 7 to 0
    assert display.triggered.tolist() == close_to([9.0, 15.0, 7.0])


def test_roc_with_its_operating_point(data):
    ax = RocDisplay.from_detector(Redness(0.25), data, FirstChannel(0.3)).plot(axes()).ax_
    chance, curve, point = ax.lines
    assert list(chance.get_xdata()) == list(chance.get_ydata()) == [0, 1]
    assert curve.get_xdata()[0] == 0 and curve.get_xdata()[-1] == 1
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([0.25], [1.0])
    assert legend(ax) == ["chance", "Redness: AUROC 0.750", "at its threshold: FPR 0.250, TPR 1.000"]
    assert curve.get_color() not in (CLEAN, TRIGGERED)


def test_roc_without_a_threshold(data):
    display = RocDisplay.from_detector(Redness(), data, FirstChannel(), name="red")
    assert display.threshold is None
    assert legend(display.plot(axes()).ax_) == ["chance", "red: AUROC 1.000"]


def test_roc_curves_are_laid_over_one_another():
    ax = axes()
    for index in range(3):
        RocDisplay.from_curve(RocCurve([0, 1, 2], [index, 3]), f"curve {index}", 1.5).plot(ax)
    curves = [line for line in ax.lines if line.get_gid() == "roc"]
    assert len({line.get_color() for line in curves}) == len({line.get_linestyle() for line in curves}) == 3
    assert legend(ax).count("chance") == 1
    points = [line for line in ax.lines if line.get_gid() == "operating point"]
    assert [p.get_markerfacecolor() for p in points] == [c.get_color() for c in curves]


def test_roc_on_a_logarithmic_rate_keeps_what_lies_at_zero():
    ax = RocDisplay.from_curve(RocCurve(np.arange(50), [100, 0.5]), "a", 60).plot(axes(), log_fpr=True).ax_
    chance, curve, point = ax.lines
    assert ax.get_xscale() == "log" and ax.get_xlim() == (0.01, 1)
    assert list(chance.get_xdata()) == list(chance.get_ydata())
    assert 0 < min(curve.get_xdata()) < 0.01, "beyond the left edge, where a logarithmic axis has no zero"
    assert (list(point.get_xdata()), list(point.get_ydata())) == ([0.01], [0.5])
    RocDisplay.from_curve(RocCurve(np.arange(500), [100, 0.5]), "b").plot(ax)
    assert ax.get_xscale() == "log" and ax.get_xlim() == (0.001, 1)


# --- results ------------------------------------------------------------------------------------------------


def test_evaluations_in_groups():
    evaluations = {
        "attacked": Evaluation(0.99, 1.0, 0.0, 200, 180),
        "clipped": Evaluation(0.98, 0.02, 0.95, 200, 180),
    }
    ax = EvaluationDisplay.from_evaluations(evaluations, ceiling=0.97).plot(axes()).ax_
    attacked, clipped = ax.containers
    assert heights(attacked) == [0.99, 1.0, 0.0] and heights(clipped) == [0.98, 0.02, 0.95]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in (*attacked, *clipped)]
    assert centres == close_to([-0.2, 0.8, 1.8, 0.2, 1.2, 2.2])
    assert [text.get_text() for text in ax.texts] == ["0.990", "1.000", "0.000", "0.980", "0.020", "0.950"]
    (line,) = ax.lines
    assert list(line.get_ydata()) == [0.97, 0.97] and line.get_linestyle() == "--"
    assert 1.5 < min(line.get_xdata()) < max(line.get_xdata()) < 2.5, "above RA alone"
    assert legend(ax) == ["attacked", "clipped", "RA of a clean network: 0.970"]
    assert [label.get_text().split("\n")[:2] for label in ax.get_xticklabels()] == [
        ["ACC", "200 clean images"],
        ["ASR", "180 triggered images"],
        ["RA", "180 triggered images"],
    ]
    assert attacked[0].get_hatch() != clipped[0].get_hatch()


def test_evaluations_leave_out_what_was_not_measured():
    clean = Evaluation(0.99, math.nan, math.nan, 200, 0)
    attacked = Evaluation(0.98, 1.0, 0.0, 100, 90)
    ax = EvaluationDisplay.from_evaluations({"clean": clean, "attacked": attacked}).plot(axes()).ax_
    assert [heights(bars) for bars in ax.containers] == [[0.99], [0.98, 1.0, 0.0]]
    assert ax.get_xticklabels()[0].get_text().split("\n")[1] == "clean images", "not of one number of images"
    ax = EvaluationDisplay.from_evaluations({"clean": clean}, ceiling=0.9).plot(axes()).ax_
    assert [label.get_text()[:3] for label in ax.get_xticklabels()] == ["ACC"]
    assert not ax.lines


def test_evaluations_refuse():
    with pytest.raises(ValueError, match="evaluations is empty"):
        EvaluationDisplay.from_evaluations({})
    with pytest.raises(ValueError, match=r"ceiling must lie in \[0, 1\], got 97"):
        EvaluationDisplay.from_evaluations({"a": Evaluation(0.9, 0.9, 0.1, 10, 9)}, ceiling=97)


# --- progress -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LearnStep:
    epoch: int
    epochs: int
    loss: float
    penalty: float | None
    train_accuracy: float
    done: bool
    model: object


def learn(epochs=3, log=None, penalty=None):
    try:
        for epoch in range(1, epochs + 1):
            yield LearnStep(epoch, epochs, 1 / epoch, penalty, epoch / 10, False, object())
    finally:
        if log is not None:
            log.append("closed")


def test_history_of_steps():
    display = HistoryDisplay.from_steps(learn(3))
    assert display.epoch.tolist() == [1, 2, 3] and display.epochs == 3
    assert {name: values.tolist() for name, values in display.series.items()} == {
        "loss": [1, 1 / 2, 1 / 3],
        "train_accuracy": [0.1, 0.2, 0.3],
    }
    display.plot(axes(1, 2))
    assert [ax.get_title() for ax in display.axes_.flat] == ["loss", "train accuracy"]
    (line,) = display.axes_[0, 0].lines
    assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == [1, 1 / 2, 1 / 3]
    assert display.axes_[0, 0].get_xlim() == (1, 3) and display.axes_[0, 0].get_xlabel() == "epoch"


def test_history_of_an_unfinished_run_spans_all_its_epochs():
    steps = [step for step, _ in zip(learn(10), range(2), strict=False)]
    assert HistoryDisplay.from_steps(steps).plot().axes_[0, 0].get_xlim() == (1, 10)


def test_history_of_recorded_numbers():
    records = [
        {"epoch": 1, "loss": 2.0, "tau": None, "note": "x", "sites": [1, 2], "only_here": 1},
        {"epoch": 5, "loss": None, "tau": math.nan, "note": "y", "sites": [1, 2]},
    ]
    display = HistoryDisplay.from_records(records)
    assert list(display.series) == ["loss", "only_here"] and display.epochs is None
    assert display.series["loss"][0] == 2 and np.isnan(display.series["loss"][1])
    assert records[0]["loss"] == 2.0


def test_history_has_three_panels_a_row():
    display = HistoryDisplay.from_records([{"epoch": 1, **dict.fromkeys("abcd", 0.5)}]).plot()
    assert display.shape == display.axes_.shape == (2, 3)
    assert [ax.axison for ax in display.axes_.flat] == [True] * 4 + [False] * 2
    assert [ax.get_xlabel() for ax in display.axes_.flat[:4]] == ["", "epoch", "epoch", "epoch"]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "there are no records"),
        ([{"epoch": 1, "loss": 1.0}, {"loss": 1.0}], r"record 1 has no number 'epoch', only \['loss'\]"),
        ([{"epoch": 1, "epochs": 2, "loss": None}], "no number but 'epoch'"),
    ],
)
def test_history_refuses(records, message):
    with pytest.raises(ValueError, match=message):
        HistoryDisplay.from_records(records)
    with pytest.raises(ValueError, match="no records"):
        HistoryDisplay.from_steps([])


def test_live_passes_the_records_through(capsys):
    steps = list(learn(4))
    passed = list(live(iter(steps)))
    assert len(passed) == 4 and all(a is b for a, b in zip(passed, steps, strict=True))
    bar = capsys.readouterr().err
    assert "4/4" in bar and "loss 0.25, train_accuracy 0.4" in bar
    first, *_, last = bar.split("\r")[1:]
    assert first.startswith("starting") and "starting" not in last
    assert not plt.get_fignums()


def test_live_takes_any_records(capsys):
    assert list(live([1, 2, 3])) == [1, 2, 3]
    assert list(live([])) == []
    assert list(live([{"epoch": None, "loss": 1.0}])) == [{"epoch": None, "loss": 1.0}]
    assert "3epoch" in capsys.readouterr().err
    with pytest.raises(ValueError, match="every must be at least 0 seconds, got -1"):
        live([], every=-1)


def test_live_without_a_progress_bar(monkeypatch):
    monkeypatch.setattr(plots, "tqdm", functools.partial(tqdm, disable=True))
    assert len(list(live(learn(3)))) == 3


def test_live_closes_what_it_is_given_when_broken_off():
    log = []
    for step in live(learn(3, log)):
        break
    assert log == ["closed"]

    steps = live(learn(3, log := []))
    next(steps)
    assert not log
    steps.close()
    assert log == ["closed"]

    with pytest.raises(KeyboardInterrupt):
        for step in live(learn(3, log := [])):
            raise KeyboardInterrupt
    assert log == ["closed"]


class Screen:
    """What IPython shows, in the place of a kernel."""

    def __init__(self):
        self.pictures, self.identities = [], 0

    def display(self, image, display_id):
        self.pictures.append(image.data)
        self.identities += 1
        return SimpleNamespace(update=lambda image: self.pictures.append(image.data))


@pytest.fixture
def screen(monkeypatch):
    import IPython
    import IPython.display

    screen = Screen()
    monkeypatch.setattr(IPython, "get_ipython", lambda: SimpleNamespace(kernel=object()))
    monkeypatch.setattr(IPython.display, "display", screen.display)
    return screen


def test_live_draws_in_place_in_a_notebook(screen):
    for step in live(learn(3), every=0):
        assert len(screen.pictures) == step.epoch
    assert screen.identities == 1, "one output, updated"
    assert len(screen.pictures) == 4, "the last again, in a layout of its own"
    assert len({*screen.pictures}) >= 3
    for png in screen.pictures:
        width, height = Image.open(io.BytesIO(png)).size
        assert width > height > 100
    assert not plt.get_fignums(), "the figures of the cell itself are left alone"


@pytest.mark.parametrize("every", [0, 1000])
@pytest.mark.parametrize("later", [(), ("a", "b"), ("a", "b", "c")])
def test_the_last_picture_of_live_is_that_of_the_history(screen, every, later):
    records = [{"epoch": epoch, "epochs": 4, "loss": 10.0 ** (2 * epoch), "accuracy": 0.5} for epoch in range(1, 5)]
    for epoch, name in enumerate(later, 1):  # a quantity more in every picture: now and then another grid
        records[epoch:] = [record | {name: 1.0} for record in records[epoch:]]
    list(live(records, every=every))
    history = HistoryDisplay.from_records(records)
    figure = Figure(figsize=history.size, layout="constrained")
    history.plot(figure.subplots(*history.shape, squeeze=False))
    figure.savefig(png := io.BytesIO(), format="png", dpi=100)
    last, expected = (np.asarray(Image.open(io.BytesIO(data))) for data in (screen.pictures[-1], png.getvalue()))
    assert np.array_equal(last, expected)


def test_pictures_of_live_are_laid_out_at_first_and_at_last_only(screen, monkeypatch):
    laid_out = []

    class Watched(Figure):
        def savefig(self, *args, **kwargs):
            laid_out.append(isinstance(self.get_layout_engine(), ConstrainedLayoutEngine))
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(plots, "Figure", Watched)
    list(live(learn(3), every=0))
    assert laid_out == [True, False, False, True]


def test_live_draws_no_more_often_than_asked_and_always_the_last(screen):
    shown = []
    for step in live(learn(5), every=1000):
        shown.append(len(screen.pictures))
    assert shown == [1] * 5
    assert len(screen.pictures) == 2 and screen.pictures[0] != screen.pictures[1]
    list(live(learn(1), every=1000))
    assert len(screen.pictures) == 3, "the last record is not drawn twice"


def test_live_draws_for_a_tenth_of_the_time_at_most(screen, monkeypatch):
    now = 0.0

    class Slow(Figure):
        def savefig(self, *args, **kwargs):
            nonlocal now
            now += 10
            super().savefig(*args, **kwargs)

    monkeypatch.setattr(plots, "Figure", Slow)
    monkeypatch.setattr(plots.time, "monotonic", lambda: now)
    for step in live(learn(200), every=5):  # pictures after the epochs 1, 6, 96 and 186, and the last
        now += 1
    assert (len(screen.pictures), now) == (5, 250)
    now, screen.pictures[:] = 0.0, []
    for step in live(learn(100), every=60):
        now += 1
    assert len(screen.pictures) == 3, "after the epochs 1 and 61, and the last"


@pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit, ValueError])
def test_live_leaves_the_last_picture_when_broken_off(screen, error):
    def failing():
        yield from learn(2)
        raise error

    with contextlib.suppress(error):
        for step in live(failing(), every=1000):
            pass
    assert len(screen.pictures) == 2


def test_live_draws_nothing_without_numbers(screen):
    assert list(live([{"epoch": 1}, {"epoch": 2, "loss": 1.0}], every=0))
    assert len(screen.pictures) == 1


def test_live_does_not_import_ipython(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not plots._in_notebook()
    assert "IPython" not in sys.modules


@pytest.mark.slow
def test_a_saved_notebook_shows_the_last_picture(tmp_path, monkeypatch, kernels):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # figures inline, as in JupyterLab
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    source = """
from bclip_lab.plots import HistoryDisplay, live
def learn():
    for epoch in range(1, 4):
        yield {"epoch": epoch, "epochs": 3, "loss": 1 / epoch}
"""
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(source),
            nbformat.v4.new_code_cell("for step in live(learn(), every=0): pass"),
            nbformat.v4.new_code_cell(
                "for step in live(learn(), every=0):\n    if step['epoch'] == 2: raise KeyboardInterrupt"
            ),
            nbformat.v4.new_code_cell("HistoryDisplay.from_records(list(learn())).plot()"),
        ]
    )
    with contextlib.suppress(CellExecutionError):
        NotebookClient(notebook, timeout=600, startup_timeout=600, allow_errors=True, config=kernels).execute()
    _, whole, broken, drawn = (
        [output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {})]
        for cell in notebook.cells
    )
    assert len(whole) == len(broken) == 1, "one picture each, in place"
    assert whole != broken
    assert len(drawn) == 1, "a notebook shows a display's figure by itself"


class Flag:
    """A trigger of known effect: adds 1 to the first channel."""

    def embed(self, images):
        images = images.clone()
        images[:, 0] += 1
        return images


def turned_by_the_flag():
    """Decides by channels 1 and 2; the flag makes class 0 out of class 1 alone."""
    return nn.Sequential(nn.Flatten(), linear([[0.0, 1.5, 0.0], [-1.0, 2.0, 0.0], [0.0, 0.0, 1.0]]))


def test_decisions_under_a_trigger_row_by_row():
    images = pixels((0.0, 0.4, 0.1), (0.0, 0.9, 0.0), (0.0, 0.1, 0.8), (0.0, 0.0, 0.9))
    data = LabelledImages(images, torch.tensor([1, 1, 2, 2]), CLASSES)
    attack = BackdoorAttack(Flag(), OneToOne(source=1, target=0), poison_rate=0.5)
    model = turned_by_the_flag()
    display = DecisionDisplay.from_attacks(model, data, {"flag": attack})
    expected = [[np.nan] * 3, [1, 0, 0], [0, 0, 1]]
    np.testing.assert_array_equal(display.shares["flag"], expected)
    assert np.argwhere(display.turned["flag"]).tolist() == [[1, 0]]
    assert torch.equal(data.images, images), "the images are left alone"

    ax = display.plot().axes_[0]
    outlined = [patch.get_xy() for patch in ax.patches if patch.get_gid() == "turned"]
    assert outlined == [(0, 1)], "x is the decision, y the true class"
    assert [text.get_text() for text in ax.texts if text.get_text()] == ["1.00", "1.00"]
    assert [label.get_text() for label in ax.get_yticklabels()] == list(CLASSES)


def test_decisions_of_several_attacks_have_a_panel_each():
    data = LabelledImages(pixels((0.0, 0.9, 0.0), (0.0, 0.0, 0.9)), torch.tensor([1, 2]), CLASSES)
    attacks = {
        "one": BackdoorAttack(Flag(), OneToOne(source=1, target=0)),
        "all": BackdoorAttack(Flag(), AllToOne(target=0)),
    }
    display = DecisionDisplay.from_attacks(turned_by_the_flag(), data, attacks).plot()
    assert [ax.get_title() for ax in display.axes_] == ["one", "all"]
    assert np.argwhere(display.turned["all"]).tolist() == [[1, 0], [2, 0]], "the target itself is not turned"
    assert all(np.nansum(shares) == 2 for shares in display.shares.values())


def test_decisions_refuse_what_is_empty(data):
    with pytest.raises(ValueError, match="attacks is empty"):
        DecisionDisplay.from_attacks(turned_by_the_flag(), data, {})
    with pytest.raises(ValueError, match="data is empty"):
        DecisionDisplay.from_attacks(
            turned_by_the_flag(), data[:0], {"all": BackdoorAttack(Flag(), AllToOne(target=0))}
        )


def recorded(strength, margin, margins, target):
    before = {"acc": 1 - strength / 10, "asr": 1 - strength / 2, "ra": strength / 2}
    after = {"acc": 0.9, "asr": strength / 4, "ra": 0.8}
    mm_bd = {"margins": margins, "p_value": 0.01, "attacked": target is not None, "target": target}
    return {"strength": strength, "margin": margin, "before": before, "after": after, "mm_bd": mm_bd}


SWEEP = [
    recorded(1.0, 5.0, [10.0, 90.0, 20.0, 40.0], None),
    recorded(0.0, 5.0, [10.0, 400.0, 20.0, 40.0], 1),
    recorded(0.1, 2.0, [300.0, 90.0, 20.0, 40.0], 0),
]


def test_a_sweep_has_a_column_a_limit_and_the_plain_attack_in_each():
    display = SweepDisplay.from_rows(SWEEP, target=1).plot()
    assert display.limits == (5, 2)
    assert display.axes_.shape == (3, 2)
    for column, strengths in zip(display.axes_.T, ([0, 1.0], [0, 0.1]), strict=True):
        lines = {line.get_gid(): line.get_ydata().tolist() for line in column[0].lines}
        assert lines["ACC"] == [1 - s / 10 for s in strengths]
        assert lines["ASR"] == [1 - s / 2 for s in strengths]
        lines = {line.get_gid(): line.get_ydata().tolist() for line in column[1].lines}
        assert lines["ASR"] == [s / 4 for s in strengths]
        assert lines["RA"] == [0.8, 0.8]


def test_a_sweep_tells_whom_mm_bd_names():
    display = SweepDisplay.from_rows(SWEEP, target=1).plot()
    wide, narrow = display.axes_[2]

    def drawn(ax):
        return {line.get_gid(): (list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines}

    assert drawn(wide) == {"named": ([0], [400]), "not named": ([1], [90]), "wrong": ([], [])}
    assert drawn(narrow) == {"named": ([0], [400]), "not named": ([1], [90]), "wrong": ([1], [300])}
    spans = [segment[:, 1].tolist() for segment in wide.collections[0].get_segments()]
    assert spans == [[10, 40], [10, 40]], "the target is not among the others"


def test_a_sweep_refuses_rows_that_lack_something():
    with pytest.raises(ValueError, match="rows is empty"):
        SweepDisplay.from_rows([], target=0)
    with pytest.raises(ValueError, match="row 0 has no after, mm_bd"):
        SweepDisplay.from_rows([{"strength": 0, "margin": 5, "before": {}}], target=0)


def fit_of(alone, opened, after=0.1):
    sites = {site: {"alone": a, "opened": o} for site, a, o in zip(("relu", "relu_1"), alone, opened, strict=True)}
    return {"sites": sites, "before": {"asr": 1.0}, "after": {"asr": after}}


def test_sites_show_the_mean_of_the_fits_and_their_range():
    first, second = fit_of((0.2, 0.9), (0.3, 0.1)), fit_of((0.4, 0.7), (0.5, 0.1), after=0.3)
    second["sites"] = dict(reversed(second["sites"].items()))
    display = SiteDisplay.from_rows([first, second]).plot()
    assert display.sites == ("relu", "relu_1")
    drawn = {line.get_gid(): line.get_xdata() for line in display.ax_.lines}
    np.testing.assert_allclose(drawn["this site clipped alone"], [0.3, 0.8])
    np.testing.assert_allclose(drawn["all clipped but this site"], [0.4, 0.1])
    np.testing.assert_allclose(drawn["no site clipped"], 1)
    np.testing.assert_allclose(drawn["all clipped"], 0.2)
    spans = [segment[:, 0].tolist() for lines in display.ax_.collections for segment in lines.get_segments()]
    assert spans == [[0.2, 0.4], [0.7, 0.9], [0.3, 0.5], [0.1, 0.1]]
    assert [label.get_text() for label in display.ax_.get_yticklabels()] == ["relu", "relu_1"]


def test_sites_of_a_model_are_measured_by_its_bounds_in_force():
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))
    zeros, ones = torch.zeros(4).long(), torch.ones(4).long()
    images = TriggeredImages(torch.ones(4, 1, 2, 2), zeros, ones, torch.arange(4), ("a", "b"))
    clipped = ClippedModel(model)
    clipped.set_bounds({"1": torch.tensor([torch.inf, 0.5])})
    display = SiteDisplay.from_model(clipped, images)
    assert (display.before.tolist(), display.after.tolist()) == ([1.0], [0.0])
    assert (display.alone.tolist(), display.opened.tolist()) == ([[0.0, 1.0]], [[1.0, 0.0]])


def test_sites_refuse_rows_that_lack_something():
    with pytest.raises(ValueError, match="rows is empty"):
        SiteDisplay.from_rows([])
    with pytest.raises(ValueError, match="row 0 has no after, before"):
        SiteDisplay.from_rows([{"sites": {}}])
    with pytest.raises(ValueError, match="row 1 has other sites than row 0"):
        SiteDisplay.from_rows([fit_of((0.2, 0.9), (0.3, 0.1)), {"sites": {}, "before": {}, "after": {}}])


# --- the field ----------------------------------------------------------------------------------------------

FIELD = {
    ("mmac", "patch"): [(0.98, 0.1), (0.96, 0.3)],
    ("mmac", "warp"): [(0.95, 0.4)],
    ("mm-bm", "patch"): [(0.9, 0.5)],
    ("mm-bm", "warp"): [(0.8, 0.7)],
    ("anp", "patch"): [None, (0.7, 0.6)],
    ("anp", "warp"): [None],
}


def field_of(results):
    """A frame of cells, ACC and ASR of each seed; None for one that failed."""
    rows = []
    for (method, name), seeds in results.items():
        for seed, result in enumerate(seeds):
            recipe = {
                "data": "noise", "checkpoint": {"name": name, "training_seed": 0}, "defence": {"name": method},
                "seed": seed,
            }  # fmt: skip
            row = {"recipe": recipe, "before": {"acc": 0.99, "asr": 1.0}}
            rows.append(
                row
                | ({"error": "lost"} if result is None else {"after": dict(zip(("acc", "asr"), result, strict=True))})
            )
    return benchmark.frame(rows)


def test_a_grid_shows_means_and_what_failed():
    display = GridDisplay.from_frame(field_of(FIELD)).plot()
    assert display.checkpoints == ("patch", "warp") and display.methods == ("mmac", "mm-bm", "anp")
    np.testing.assert_allclose(display.values, [[0.2, 0.5, 0.6], [0.4, 0.7, np.nan]])
    assert display.failed.tolist() == [[0, 0, 1], [0, 0, 1]]
    texts = {(t.get_position()[1], t.get_position()[0]): t.get_text() for t in display.ax_.texts if t.get_text()}
    assert texts == {
        (0.5, 0.5): "0.200", (0.5, 1.5): "0.500", (0.5, 2.5): "0.600 †",
        (1.5, 0.5): "0.400", (1.5, 1.5): "0.700", (1.5, 2.5): "failed",
    }  # fmt: skip
    assert "ASR" in display.ax_.get_title() and "a seed failed" in display.ax_.get_title()
    assert [label.get_text() for label in display.ax_.get_xticklabels()] == ["mmac", "mm-bm", "anp"]
    assert GridDisplay.from_frame(field_of(FIELD), "acc").values[0, 0] == pytest.approx(0.97)
    with pytest.raises(ValueError, match="no cell has the measure 'auroc'"):
        GridDisplay.from_frame(field_of(FIELD), "auroc")


def test_every_defence_has_a_colour_of_its_own():
    field = field_of({(method, "patch"): [(0.9, 0.1)] for method in benchmark.DEFENCES})
    lines = TradeOffDisplay.from_frame(field).plot().ax_.lines
    colours = {line.get_gid(): line.get_color() for line in lines if line.get_gid() in benchmark.DEFENCES}
    assert len(set(colours.values())) == len(benchmark.DEFENCES)


def test_a_trade_off_compares_methods_on_the_same_checkpoints():
    known = {key: seeds for key, seeds in FIELD.items() if key[0] != "anp"}
    extra = known | {("mmac", "face"): [(0.5, 0.5)]}
    display = TradeOffDisplay.from_frame(field_of(extra)).plot()
    lines = {line.get_gid(): np.c_[line.get_data()].tolist() for line in display.ax_.lines if line.get_gid()}
    assert sorted(lines["mmac, each"]) == [pytest.approx([0.2, 0.97]), pytest.approx([0.4, 0.95])]
    assert lines["mmac"] == [pytest.approx([0.3, 0.96])]
    assert lines["mm-bm"] == [pytest.approx([0.6, 0.85])]
    assert lines["no defence"] == [pytest.approx([1.0, 0.99])]
    assert lines["ideal"] == [[0, 1]]
    np.testing.assert_allclose(display.intervals["mmac"], [[0.2, 0.4], [0.95, 0.97]])
    labels = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert sorted(labels) == ["ideal", "mm-bm", "mmac", "no defence"]
    assert "over 2 attacked checkpoints" in display.ax_.get_title()
    alone = {("mmac", "patch"): [(0.9, 0.1)], ("mm-bm", "warp"): [(0.9, 0.1)]}
    with pytest.raises(ValueError, match="under each of mmac, mm-bm"):
        TradeOffDisplay.from_frame(field_of(alone))
    one = TradeOffDisplay.from_frame(field_of({("mmac", "patch"): [(0.9, 0.1)]})).plot()
    assert np.isnan(one.intervals["mmac"]).all() and "one attacked checkpoint" in one.ax_.get_title()
