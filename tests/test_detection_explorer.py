import asyncio
import io
import re
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from toys import CLASSES, Blue, Nothing
from toys import images as toy_images

from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages, TriggeredImages
from bclip_lab.detection import MMDF
from bclip_lab.evaluation import Evaluation, RocCurve
from bclip_lab.widgets import DetectionExploration, DetectionExplorer
from bclip_lab.widgets.detections import Confusion


class Corner:
    """A detector that gives a score alone: the corner's blue."""

    threshold_ = 0.3

    def score(self, images):
        return images[:, 2, 0, 0]


class Wild(Corner):
    def score(self, images):
        return torch.full((len(images),), torch.nan)


def images(count, seed):
    """Red and green images of 4x4 whose blue corner is at most 0.5."""
    return toy_images(count, seed, noise=0.4, corner=1.25)


def clipped():
    """Means of red and of green, and the blue corner, which speaks for red, bounded at 0.2."""
    first, head = nn.Linear(48, 3, bias=False), nn.Linear(3, 2, bias=False)
    weight = torch.zeros(3, 3, 16)
    weight[0, 0], weight[1, 1], weight[2, 2, 0] = 1 / 16, 1 / 16, 1
    first.weight.data = weight.reshape(3, 48)
    head.weight.data = torch.tensor([[1.0, 0, 1.5], [0, 1, 0]])
    model = ClippedModel(nn.Sequential(nn.Flatten(), first, nn.ReLU(), head))
    model.set_bounds({"2": torch.tensor([torch.inf, torch.inf, 0.2])})
    return model


BLUE = Blue(dark=0.4)
TEST = images(60, 3)
MODEL = clipped()
DETECTORS = {"MMDF": MMDF(MODEL).fit(images(100, 1)), "corner": Corner()}


@pytest.fixture
def state():
    return DetectionExploration(DETECTORS, TEST, BLUE)


@pytest.fixture
def explorer():
    return DetectionExplorer(DETECTORS, TEST, BLUE)


# --- the state ----------------------------------------------------------------------------------------------


def test_starts_at_the_fitted_threshold(state):
    detector, triggered = DETECTORS["MMDF"], BLUE.triggered(TEST)
    assert state.names == ("MMDF", "corner") and state.name == "MMDF"
    assert state.threshold == state.fitted == detector.threshold_
    scores = torch.cat([detector.score(TEST), detector.score(triggered.images)])
    assert np.array_equal(state.scores, scores.double().numpy())
    assert state.chosen == int((scores.double() - detector.threshold_).abs().argmin())
    clean, stopped = detector.detect(TEST), detector.detect(triggered.images)
    assert state.confusion == Confusion(
        int(stopped.sum()), int((~stopped).sum()), int(clean.sum()), int((~clean).sum())
    )
    assert state.confusion.tpr > 0 and state.confusion.fpr < 1
    expected = Evaluation.from_decisions(
        detector.correct(TEST), TEST.labels, detector.correct(triggered.images), triggered
    )
    assert state.corrected == expected
    assert state.uncorrected.asr > expected.asr


@given(st.floats(-3, 3))
def test_counts_and_corrections_at_any_threshold(threshold):
    """Against the detector itself with that threshold."""
    detector = MMDF(MODEL).fit(images(100, 1))
    state = DetectionExploration({"MMDF": detector}, TEST, BLUE)
    state.set_threshold(threshold)
    found = state.confusion
    assert (found.fpr, found.tpr) == pytest.approx(state.curve.rates_at(threshold))
    assert int(state.wrong.sum()) == found.missed + found.stopped
    detector.threshold_ = threshold
    triggered = BLUE.triggered(TEST)
    clean, stopped = detector.decide(TEST), detector.decide(triggered.images)
    assert state.corrected == Evaluation.from_decisions(clean.corrected, TEST.labels, stopped.corrected, triggered)
    for image in (0, 7, 60, 65):
        seen, made, row = state.verdict(image), (clean if image < 60 else stopped), image % 60
        assert seen.detected == bool(made.detected[row]) and seen.corrected == int(made.corrected[row])
        assert (seen.original, seen.clipped) == (int(made.original[row]), int(made.clipped[row]))
        assert seen.score == float(made.score[row])


def test_a_verdict_by_hand(state):
    image = 60 + 29  # the brightest corner: 1, cut to 0.2
    green, red = (float(state.pixels(image)[c].mean()) for c in (1, 0))
    seen = state.verdict(image)
    assert (seen.true, seen.target, seen.original, seen.clipped, seen.corrected) == (1, 0, 0, 1, 1)
    assert seen.margin == pytest.approx(red + 1.5 - green, abs=1e-5)
    assert seen.clipped_margin == pytest.approx(red + 0.3 - green, abs=1e-5)
    assert seen.score == pytest.approx(seen.margin - seen.clipped_margin / DETECTORS["MMDF"].scale_, abs=1e-5)
    state.set_threshold(100)
    assert (state.verdict(image).detected, state.verdict(image).corrected) == (False, 0)


def test_a_detector_that_gives_a_score_alone(state):
    state.choose_detector("corner")
    assert not state.decides and state.corrected is None and state.uncorrected is None
    assert state.threshold == 0.3
    seen = state.verdict(60)
    assert (seen.score, seen.detected) == (pytest.approx(0.4), True)
    assert (seen.original, seen.clipped, seen.margin, seen.clipped_margin, seen.corrected) == (None,) * 5


def test_every_detector_keeps_its_threshold(state):
    state.set_threshold(0.25)
    state.choose_detector("corner")
    state.set_threshold(0.5)
    state.choose_detector("MMDF")
    assert state.threshold == 0.25 and state.fitted == DETECTORS["MMDF"].threshold_
    state.choose_detector("corner")
    assert state.threshold == 0.5 and Corner.threshold_ == 0.3


def test_images_of_both_kinds(state):
    triggered = BLUE.triggered(TEST)
    assert torch.equal(state.pixels(3), TEST.images[3]) and state.original(3) == 3
    assert torch.equal(state.pixels(60 + 4), triggered.images[4])
    assert state.original(60 + 4) == int(triggered.rows[4])
    as_bytes = LabelledImages((255 * TEST.images).byte(), TEST.labels, CLASSES)

    class Bytes(Corner):
        def score(self, images):
            return super().score(images / 255)

    class Brighter(Blue):
        def triggered(self, data):
            made = super().triggered(LabelledImages(data.images / 255, data.labels, data.classes))
            return TriggeredImages((255 * made.images).byte(), made.true_labels, made.targets, made.rows, CLASSES)

    seen = DetectionExploration({"corner": Bytes()}, as_bytes, Brighter(0.4)).pixels(60 + 29)
    assert seen.dtype == torch.float32 and float(seen.max()) == 1


def test_every_point_of_the_roc_can_be_reached(state):
    for name in state.names:
        state.choose_detector(name)
        for point in range(len(state.curve.thresholds)):
            state.choose_point(point)
            rates = state.curve.false_positive_rate[point], state.curve.true_positive_rate[point]
            assert state.curve.rates_at(state.threshold) == pytest.approx(rates)
            if point:  # the image is the last one that is detected there
                detected = state.scores[state.scores > state.threshold]
                assert state.scores[state.chosen] == detected.min()


def test_steps_and_neighbours_go_by_score(state):
    state.choose_near(10.0, triggered=True)
    highest = 60 + int(state.curve.triggered.argmax())
    assert state.chosen == highest
    state.step(1)
    assert state.chosen == highest
    assert state.neighbours(5)[-1] == highest and len(state.neighbours(5)) == 5
    state.step(-(10**9))
    assert state.scores[state.chosen] == state.curve.triggered.min()
    seen = [state.chosen]
    for _ in range(29):
        state.step(1)
        seen.append(state.chosen)
        assert state.chosen in state.neighbours(5)
    assert sorted(seen) == list(range(60, 90)) and (np.diff(state.scores[seen]) >= 0).all()
    assert (np.diff(state.scores[state.neighbours(7)]) >= 0).all()
    assert state.neighbours(500) == seen
    state.choose_near(state.scores[5], triggered=False)
    assert state.scores[state.chosen] == state.scores[5] and state.chosen < 60


def test_the_images_of_a_bar(state):
    """Every image is in the bar that numpy counts it in; the one nearest the threshold is chosen."""
    for name in state.names:
        state.choose_detector(name)
        edges, clean, triggered = state.histogram()
        counts = 60 * clean + 30 * triggered
        seen = []
        for place, count in enumerate(counts.round().astype(int)):
            state.set_threshold((edges[place] + edges[place + 1]) / 2)
            state.choose_at_threshold()
            assert len(state.bar) == count and (np.diff(state.scores[state.bar]) >= 0).all()
            if count:
                assert set(state.neighbours(7)) <= set(state.bar) and state.chosen in state.neighbours(7)
                nearest = np.abs(state.scores[state.bar] - state.threshold).min()
                assert abs(state.scores[state.chosen] - state.threshold) == nearest
            else:
                assert len(state.neighbours(7)) == 7
            seen += state.bar
        assert sorted(seen) == list(range(90))
    state.set_threshold(100)
    state.choose_at_threshold()
    assert state.scores.argmax() in state.bar


def test_an_image_of_the_bar_keeps_the_bar_and_another_one_leaves_it(state):
    state.set_threshold(float(np.median(state.curve.clean)))
    state.choose_at_threshold()
    bar = state.bar
    state.choose(bar[0])
    assert state.bar == bar and state.neighbours(90) == bar
    other = next(image for image in range(60) if image not in bar)
    state.choose(other)
    assert state.bar == [] and sorted(state.neighbours(90)) == list(range(60))


def test_histogram_counts_every_image(state):
    edges, clean, triggered = state.histogram()
    assert len(edges) == len(clean) + 1 == len(triggered) + 1
    assert clean.sum() == pytest.approx(1) and triggered.sum() == pytest.approx(1)
    state.choose_detector("corner")
    state.set_threshold(3.0)
    assert state.histogram()[0][-1] == 1  # the axis does not follow what is dragged on it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"detectors": {}}, "detectors must be at least one, got none"),
        ({"detectors": {"new": MMDF(MODEL)}}, r"detectors\['new'\] has no threshold_: call fit"),
        ({"detectors": {"wild": Wild()}}, "must hold at least one score and finite ones only"),
        ({"images": 0}, "images must be at least 1, got 0"),
        ({"attack": Nothing()}, "attack turns none of the 60 test images"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        DetectionExploration(**{"detectors": DETECTORS, "test": TEST, "attack": BLUE, **arguments})


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda s: s.choose_detector("x"), "there is no detector 'x'; the detectors are MMDF, corner"),
        (lambda s: s.set_threshold(float("nan")), "threshold must be finite, got nan"),
        (lambda s: s.choose(90), r"image must lie in \[0, 90\), got 90"),
        (lambda s: s.verdict(-1), r"image must lie in \[0, 90\), got -1"),
        (lambda s: s.choose_point(1000), "point must lie in"),
    ],
)
def test_a_refused_choice_changes_nothing(state, do, message):
    before = state.name, state.threshold, state.chosen
    with pytest.raises(ValueError, match=message):
        do(state)
    assert (state.name, state.threshold, state.chosen) == before


# --- the shell, without a kernel ----------------------------------------------------------------------------


def shown(explorer):
    """The numbers of the table."""
    return re.findall(r"<b>([^<]*)</b>", explorer._counts.value)


def expected(threshold, name="MMDF"):
    """The same, from the package's own."""
    detector, triggered = DETECTORS[name], BLUE.triggered(TEST)
    curve = RocCurve(detector.score(TEST.images), detector.score(triggered.images))
    stopped, detected = (int((part > threshold).sum()) for part in (curve.clean, curve.triggered))
    fpr, tpr = curve.rates_at(threshold)
    return [str(detected), str(30 - detected), f"{tpr:.1%}", str(stopped), str(60 - stopped), f"{fpr:.1%}"]


def pixels(explorer):
    return np.asarray(Image.open(io.BytesIO(explorer._drawing.picture.png())))


def click(explorer, ax, x, y):
    """Click a place in the data of some axes, as the page does it."""
    x, y = explorer.figure.transFigure.inverted().transform(ax.transData.transform((x, y)))
    explorer._drawing.picture.widget._handle_custom_msg({"x": float(x), "y": float(y)}, [])


def press(explorer, *keys):
    for key in keys:
        explorer._drawing.picture.widget._handle_custom_msg({"key": key}, [])


def test_dragging_the_line_moves_everything(explorer):
    state, before = explorer.state, pixels(explorer)
    assert shown(explorer)[:6] == expected(DETECTORS["MMDF"].threshold_)
    for threshold in (0.05, 0.9, 0.4):
        explorer._line.value = threshold
        assert state.threshold == explorer._threshold.value == threshold
        assert shown(explorer)[:6] == expected(threshold)
        assert shown(explorer)[6:] == [
            f"{share:.1%}" for share in (state.corrected.acc, state.corrected.asr, state.corrected.ra)
        ]
        fpr, tpr = state.curve.rates_at(threshold)
        assert explorer._drawing._now.get_xydata()[0].tolist() == [max(fpr, 0.5 / 60), tpr]
        assert explorer._drawing._threshold.get_xdata()[0] == threshold
        assert abs(state.scores[state.chosen] - threshold) == np.abs(state.scores - threshold).min()
    assert not np.array_equal(before, pixels(explorer))
    explorer._reset.click()
    assert explorer._line.value == state.threshold == DETECTORS["MMDF"].threshold_
    assert np.array_equal(before, pixels(explorer))


def test_a_typed_threshold(explorer):
    explorer._threshold.value = 0.5
    assert explorer._line.value == 0.5 and shown(explorer)[:6] == expected(0.5)
    explorer._threshold.value = float("inf")
    assert explorer._threshold.value == 0.5 and "must be finite" in explorer._status.value


def test_points_are_clicked(explorer):
    drawing, state = explorer._drawing, explorer.state
    for image in (4, 59, 60, 85):
        click(explorer, drawing.points, state.scores[image], drawing._heights[image])
        assert state.chosen == image
        assert drawing._ring.get_xydata()[0].tolist() == [state.scores[image], drawing._heights[image]]
        np.testing.assert_allclose(drawing._images[0].get_array(), state.pixels(image).permute(1, 2, 0))
        assert drawing._images[1].get_visible() == (image >= 60)
    neighbours = state.neighbours(9)
    for place in (8, 0):
        click(explorer, drawing._row[place], 0.5, 0.5)
        assert state.chosen == neighbours[place]
        neighbours = state.neighbours(9)


def test_points_of_the_roc_are_clicked(explorer):
    curve = explorer.state.curve
    for point in (0, 5, len(curve.thresholds) // 2, len(curve.thresholds) - 1):
        fpr, tpr = curve.false_positive_rate[point], curve.true_positive_rate[point]
        click(explorer, explorer._drawing.roc, max(fpr, 0.5 / 60), tpr)
        assert curve.rates_at(explorer.state.threshold) == pytest.approx((fpr, tpr))
        assert explorer._line.value == explorer.state.threshold


def test_keys(explorer):
    state = explorer.state
    press(explorer, "ArrowUp", "End")
    assert state.chosen == 60 + int(state.curve.triggered.argmax())
    press(explorer, "ArrowLeft", "x")
    assert state.scores[state.chosen] == np.sort(state.curve.triggered)[-2]
    press(explorer, "ArrowDown")
    assert state.chosen == int(state.curve.clean.argmax())
    press(explorer, "PageDown")
    assert state.scores[state.chosen] == np.sort(state.curve.clean)[-11]
    press(explorer, "Home", "PageUp")
    assert state.scores[state.chosen] == np.sort(state.curve.clean)[10]


def test_another_detector(explorer):
    explorer._name.value = "corner"
    assert shown(explorer) == expected(0.3, "corner")
    assert "gives a score alone" in explorer._counts.value
    assert "gives a score alone" in explorer._drawing.picture.widget.label
    assert explorer._line.value == 0.3 and explorer._line.high == 1
    assert explorer._drawing.roc.get_title().startswith(f"ROC, AUROC {explorer.state.curve.auroc:.3f}")
    quick = pixels(explorer)
    explorer._drawing.picture.redraw()
    assert np.array_equal(quick, pixels(explorer))


def test_an_image_is_said_in_words(explorer):
    explorer.state.choose(60 + 29)
    explorer.refresh()
    seen = explorer.state.verdict(60 + 29)
    assert explorer._drawing.picture.widget.label == (
        "triggered image, detected; class: green; the attacker’s target: red; "
        f"original network: red, with a margin of {seen.margin:.3g}; "
        f"clipped network: green; margin of red: {seen.clipped_margin:.3g}; "
        f"score {seen.score:.5g} > threshold {explorer.state.threshold:.5g}; corrected to green (right)"
    )


def test_an_error_is_shown(explorer, monkeypatch):
    def fail(count):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(explorer.state, "neighbours", fail)
    with pytest.raises(RuntimeError):
        explorer.refresh()
    assert "out of &lt;memory&gt;" in explorer._status.value


def test_moves_from_another_thread_are_handled_on_the_loop_and_drawn_once():
    async def drag():
        explorer = DetectionExplorer(DETECTORS, TEST, BLUE)
        drawn, draw = [], explorer._drawing.draw

        def counted(anew):
            drawn.append(threading.get_ident())
            return draw(anew)

        explorer._drawing.draw = counted

        def move():
            for value in np.linspace(0.1, 0.6, 30):
                state = {"method": "update", "state": {"value": float(value), "_over": explorer._line._drawn}}
                explorer._line.comm.handle_msg({"content": {"data": state}, "buffers": []})

        thread = threading.Thread(target=move)
        thread.start()
        thread.join()
        assert explorer.state.threshold == DETECTORS["MMDF"].threshold_  # the loop has not run yet
        while not drawn:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # and no more
        return explorer, drawn

    explorer, drawn = asyncio.run(drag())
    assert explorer.state.threshold == 0.6 and shown(explorer)[:6] == expected(0.6)
    assert drawn == [threading.get_ident()]
