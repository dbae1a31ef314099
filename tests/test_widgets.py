import asyncio
import io
import json
import math
import re
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages, Splits, TriggeredImages
from bclip_lab.evaluation import evaluate
from bclip_lab.margins import classification_margins
from bclip_lab.models import logits
from bclip_lab.widgets import BoundTuner, BoundTuning
from bclip_lab.widgets.live import Newest

ROOT = Path(__file__).parents[1]
CLASSES = ("red", "green")


class Blue:
    """An attack with a known answer: green images get a blue corner and shall become red."""

    def triggered(self, data):
        rows = torch.nonzero(data.labels == 1).flatten()
        images = data.images[rows].clone()
        images[:, 2, 0, 0] = 1
        labels = data.labels[rows]
        return TriggeredImages(images, labels, torch.zeros_like(labels), rows, data.classes)


def images(count, seed):
    """Red and green images, with a little blue that grows from image to image."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = torch.rand((count, 3, 4, 4), generator=generator) * 0.3
    pixels[torch.arange(count), labels] += 0.6
    pixels[:, 2] = torch.linspace(0, 0.2, count)[:, None, None]
    return LabelledImages(pixels, labels, CLASSES)


def network():
    """Site "2": mean of red and of green, blue corner (bounded at 0.2 the trigger loses); site "4": the same."""
    first = nn.Linear(48, 3, bias=False)
    weight = torch.zeros(3, 3, 16)
    weight[0, 0], weight[1, 1], weight[2, 2, 0] = 1 / 16, 1 / 16, 1
    first.weight.data = weight.reshape(3, 48)
    second, head = nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)
    second.weight.data = torch.eye(3)
    head.weight.data = torch.tensor([[1.0, 0, 2], [0, 1, 0]])
    return nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), head)


SPLITS = Splits(train=images(4, 0), defender=images(40, 1), calibration=images(4, 2), test=images(60, 3))


@pytest.fixture
def clipped():
    return ClippedModel(network())


@pytest.fixture
def tuning(clipped):
    return BoundTuning(clipped, SPLITS, Blue())


@pytest.fixture
def tuner(clipped):
    return BoundTuner(clipped, SPLITS, Blue())


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# --- the state: what it starts with -------------------------------------------------------------------------


def test_starts_without_bounds(tuning, clipped):
    assert tuning.scales == {"2": 1.5, "4": 1.5}
    assert tuning.bounded == [] and not tuning.can_undo and not tuning.can_redo
    assert all(bounds.isinf().all() for bounds in clipped.bounds.values())
    assert tuning.measured is tuning.unclipped
    assert tuning.trail == [evaluate(clipped, SPLITS.test, Blue())]
    assert tuning.trail[0].asr == 1.0


def test_reference_is_the_defenders(tuning, clipped):
    expected = clipped.activations(SPLITS.defender).maximum
    assert same(tuning.reference, expected)
    assert float(tuning.reference["2"][2]) == pytest.approx(0.2)
    assert float(tuning.abnormality["2"][2]) == pytest.approx(5)


def test_sample_of_the_test_images(clipped):
    tuning = BoundTuning(clipped, SPLITS, Blue(), images=7, seed=1)
    assert len(tuning.clean) == len(tuning.triggered) == 7
    assert (tuning.available, tuning.defenders) == (60, 40)
    again = BoundTuning(clipped, SPLITS, Blue(), images=7, seed=1)
    other = BoundTuning(clipped, SPLITS, Blue(), images=7, seed=2)
    assert torch.equal(tuning.clean.images, again.clean.images)
    assert torch.equal(tuning.triggered.rows, again.triggered.rows)
    assert not torch.equal(tuning.clean.images, other.clean.images)
    assert torch.equal(SPLITS.test.labels[tuning.triggered.rows], tuning.triggered.true_labels)
    assert tuning.evaluate() == tuning.unclipped.evaluation


def test_starts_with_the_bounds_of_the_model(clipped):
    first = BoundTuning(clipped, SPLITS, Blue())
    first.set_scale("2", 0.62)
    learned = torch.tensor([0.5, math.inf, 0.1])
    clipped.set_bounds({"4": learned})
    before = clipped.bounds
    second = BoundTuning(clipped, SPLITS, Blue())
    assert second.scales == {"2": 0.62, "4": 1.0}  # recognised; not a multiple of the clean maxima
    assert (second.loaded("2"), second.loaded("4")) == (False, True)
    assert torch.equal(second.bounds["4"], learned)
    assert same(clipped.bounds, before)
    assert second.unclipped.evaluation.asr == 1.0
    assert second.trail == [evaluate(clipped, SPLITS.test, Blue())]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clipped": network()}, "clipped must be a ClippedModel, got Sequential"),
        ({"images": 0}, "images must be at least 1, got 0"),
    ],
)
def test_refuses(clipped, arguments, message):
    given = {"clipped": clipped, "splits": SPLITS, "attack": Blue(), **arguments}
    with pytest.raises(ValueError, match=message):
        BoundTuning(**given)


def test_refuses_an_attack_that_turns_nothing(clipped):
    red = SPLITS.test[SPLITS.test.labels == 0]
    splits = Splits(SPLITS.train, SPLITS.defender, SPLITS.calibration, red)
    with pytest.raises(ValueError, match="attack turns no image"):
        BoundTuning(clipped, splits, Blue())


# --- the state: changes -------------------------------------------------------------------------------------


def test_scale(tuning, clipped):
    tuning.set_scale("2", 0.5)
    assert torch.equal(clipped.bounds["2"], 0.5 * tuning.reference["2"])
    assert clipped.bounds["4"].isinf().all() and tuning.bounded == ["2"]
    result = tuning.evaluate()
    assert result == evaluate(clipped, SPLITS.test, Blue()) == tuning.trail[-1]
    margins = classification_margins(logits(clipped, tuning.triggered.images), tuning.triggered.targets)
    assert torch.equal(tuning.measured.triggered_margins, margins)
    tuning.set_scale("2", 1.7)
    assert tuning.scales["2"] == 1.5 and clipped.bounds["2"].isinf().all()


def test_a_bound_on_the_trigger_removes_it(tuning):
    tuning.set_bound("2", 2, 0.0)
    assert tuning.evaluate().asr == 0.0
    assert (tuning.measured.evaluation.ra, tuning.measured.evaluation.acc) == (1.0, 1.0)
    assert (tuning.measured.triggered_margins < 0).all()
    assert (tuning.unclipped.triggered_margins > 0).all()


def test_all_sites_together(tuning, clipped):
    tuning.scale_all(0.8)
    assert tuning.scales == {"2": 0.8, "4": 0.8}
    tuning.undo()
    assert tuning.bounded == []


def test_a_bound_by_hand_stays(tuning, clipped):
    tuning.set_bound("2", 1, 0.3)
    tuning.set_scale("2", 0.5)
    expected = 0.5 * tuning.reference["2"]
    expected[1] = 0.3
    assert torch.equal(clipped.bounds["2"], expected)
    assert tuning.by_hand("2") == {1: 0.3}
    tuning.set_bound("2", 1, math.inf)
    assert clipped.bounds["2"][1] == math.inf
    tuning.set_bound("2", 1, None)
    assert torch.equal(clipped.bounds["2"], 0.5 * tuning.reference["2"])


def test_loaded_bounds_are_100_per_cent(tuning, clipped):
    learned = torch.tensor([0.4, math.inf, 0.05])
    tuning.set_bound("2", 0, 7.0)
    tuning.load({"2": learned})
    assert tuning.scales == {"2": 1.0, "4": 1.5} and tuning.loaded("2") and not tuning.by_hand("2")
    tuning.set_scale("2", 0.5)
    assert clipped.bounds["2"].tolist() == pytest.approx([0.2, math.inf, 0.025])
    tuning.set_scale("2", 0)
    assert clipped.bounds["2"].tolist() == [0, math.inf, 0]
    tuning.reset("2")
    assert not tuning.loaded("2") and clipped.bounds["2"].isinf().all()


def test_own_bounds_come_back_after_another_tuner(tuning, clipped):
    tuning.set_scale("2", 0.5)
    other = BoundTuning(clipped, SPLITS, Blue())
    other.set_scale("2", 0.1)
    tuning.evaluate()
    assert same(clipped.bounds, tuning.bounds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.set_scale("9", 1), "there is no site '9'; the sites are 2, 4"),
        (lambda t: t.set_scale("2", -0.1), "scale must be at least 0, got -0.1"),
        (lambda t: t.scale_all(math.nan), "scale must be at least 0, got nan"),
        (lambda t: t.set_bound("2", 3, 1), r"channel must lie in \[0, 3\) at site '2', got 3"),
        (lambda t: t.set_bound("2", 0, -1), "must be at least 0, as its activation is never negative"),
        (lambda t: t.set_bound("2", 0, math.nan), "must be finite or"),
        (lambda t: t.load({"2": torch.zeros(4)}), r"must have shape \(3,\)"),
        (lambda t: t.load({"9": 1.0}), "there is no site '9'"),
        (lambda t: t.reset("9"), "there is no site '9'"),
        (lambda t: t.activations("9"), "there is no site '9'"),
    ],
)
def test_a_refused_change_changes_nothing(tuning, clipped, change, message):
    tuning.set_scale("2", 0.5)
    bounds = tuning.bounds
    with pytest.raises(ValueError, match=message):
        change(tuning)
    assert same(tuning.bounds, bounds) and same(clipped.bounds, bounds)
    assert tuning.undo() and not tuning.can_undo


def test_a_drag_is_one_step(tuning):
    for scale in (1.4, 1.2, 1.0):
        tuning.set_scale("2", scale, merge=True)
    tuning.set_scale("4", 0.9, merge=True)  # another site: another step
    tuning.set_scale("4", 0.8)  # not merged
    steps = []
    while tuning.undo():
        steps.append(tuning.scales)
    assert steps == [{"2": 1.0, "4": 0.9}, {"2": 1.0, "4": 1.5}, {"2": 1.5, "4": 1.5}]
    assert tuning.redo() and tuning.scales == {"2": 1.0, "4": 1.5}
    tuning.set_scale("2", 0.9, merge=True)  # nothing merges with what was done again
    assert tuning.undo() and tuning.scales["2"] == 1.0


CHANGES = st.one_of(
    st.tuples(st.just("set_scale"), st.sampled_from(["2", "4"]), st.sampled_from([0, 0.5, 1, 1.5])),
    st.tuples(st.just("scale_all"), st.sampled_from([0, 0.7, 1.5])),
    st.tuples(st.just("set_bound"), st.sampled_from(["2", "4"]), st.integers(0, 2), st.sampled_from([None, 0.1, 9])),
    st.tuples(st.just("load"), st.just({"2": 0.3})),
    st.tuples(st.just("reset")),
    st.tuples(st.just("reset"), st.just("4")),
    st.tuples(st.just("undo")),
    st.tuples(st.just("redo")),
)
SHARED = BoundTuning(ClippedModel(network()), SPLITS, Blue())


def snapshot():
    sites = SHARED.scales
    bounds = [values.tolist() for values in SHARED.bounds.values()]
    return SHARED.scales, [(SHARED.loaded(site), SHARED.by_hand(site)) for site in sites], bounds


@settings(max_examples=60)
@given(st.lists(CHANGES, max_size=12))
def test_undo_and_redo(changes):
    """Against the list of all that was so far, and the place in it."""
    SHARED.__init__(SHARED.clipped, SPLITS, Blue())
    states, place = [snapshot()], 0
    for name, *arguments in changes:
        getattr(SHARED, name)(*arguments)
        if name == "undo":
            place = max(place - 1, 0)
        elif name == "redo":
            place = min(place + 1, len(states) - 1)
        elif snapshot() != states[place]:
            states[place + 1 :] = [snapshot()]
            place += 1
        assert snapshot() == states[place]
        assert (SHARED.can_undo, SHARED.can_redo) == (place > 0, place < len(states) - 1)
        assert same(SHARED.clipped.bounds, SHARED.bounds)


def test_the_original_is_left_alone(clipped):
    model = clipped.original
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits(model, SPLITS.test)
    model.train()
    tuning = BoundTuning(clipped, SPLITS, Blue())
    tuning.scale_all(0.3)
    tuning.evaluate()
    tuning.activations("2")
    assert model.training and same(model.state_dict(), weights)
    assert torch.equal(logits(model, SPLITS.test), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    for measured in (tuning.measured, tuning.unclipped):
        assert not measured.clean_margins.requires_grad and not measured.triggered_margins.requires_grad


# --- the state: what is shown -------------------------------------------------------------------------------


def test_channels_the_most_abnormal_first(tuning):
    tuning.set_scale("2", 0.5)
    tuning.set_bound("2", 0, math.inf)
    rows = tuning.channels("2")
    assert rows[0].index == 2 and rows[0].triggered == 1.0
    assert rows[0].clean == pytest.approx(0.2) and rows[0].bound == pytest.approx(0.1)
    assert [row.ratio for row in rows] == sorted((row.ratio for row in rows), reverse=True)
    assert [(row.bound, row.by_hand) for row in rows if row.index == 0] == [(math.inf, True)]


def test_activations_in_multiples_of_the_clean_maximum(tuning, clipped):
    clean, triggered = tuning.activations("2", 2)
    assert torch.equal(clean, clipped.site_activations(SPLITS.test, "2")[:, 2])
    assert (triggered == 1).all()
    clean, triggered = tuning.activations("2")
    assert clean.shape == (60,) and triggered.shape == (30,)
    assert torch.allclose(triggered, torch.full((30,), 5.0))
    assert float(clean.max()) < 1.5
    tuning.scale_all(0.1)
    assert torch.equal(tuning.activations("4", 2)[1], triggered * 0 + 1)  # without bounds, whatever they are


def test_bound_range(tuning):
    assert tuning.bound_range("2") is None and tuning.bound_range("2", 1) is None
    tuning.set_scale("2", 0.5)
    assert tuning.bound_range("2") == pytest.approx((0.5, 0.5))
    assert tuning.bound_range("2", 2) == pytest.approx((0.1, 0.1))
    tuning.set_bound("2", 2, 0.3)
    assert tuning.bound_range("2") == pytest.approx((0.5, 1.5))


# --- the shell, without a kernel ----------------------------------------------------------------------------


def shown(tuner):
    """ACC, ASR and RA as the page has them."""
    return re.findall(r"<b [^>]*>([^<]*)</b>", tuner._numbers.value)


def expected(evaluation):
    return [f"{share:.1%}" for share in (evaluation.acc, evaluation.asr, evaluation.ra)]


def pixels(tuner):
    return np.asarray(Image.open(io.BytesIO(tuner._drawing.picture.png())))


def test_a_slider_moves_the_bounds_the_numbers_and_the_picture(tuner, clipped):
    assert shown(tuner) == expected(tuner.state.unclipped.evaluation)
    before = pixels(tuner)
    tuner._sliders["2"].value = 30
    result = evaluate(clipped, SPLITS.test, Blue())
    assert torch.equal(clipped.bounds["2"], 0.3 * tuner.state.reference["2"])
    assert shown(tuner) == expected(result)
    assert f"{round(30 * result.ra)} of 30 triggered images right" in tuner._numbers.value
    assert "1 of 2 sites bounded" in tuner._status.value
    drawing = tuner._drawing
    assert drawing._line.get_xdata()[0] == pytest.approx(0.3)
    assert drawing._now.get_xydata()[0].tolist() == [result.asr, result.acc]
    assert drawing._tried.get_xydata().shape == (2, 2)
    assert not np.array_equal(pixels(tuner), before)


def test_the_picture_of_moved_artists_is_that_of_a_whole_drawing(tuner):
    for value in (120, 60, 20):
        tuner._sliders["4"].value = value
    quick = pixels(tuner)
    tuner._drawing.picture.redraw()
    assert np.array_equal(quick, pixels(tuner))


def test_a_moved_slider_chooses_its_site(tuner):
    tuner._sliders["4"].value = 90
    assert tuner._site.value == "4" and tuner.figure.axes[0].get_title() == "4"
    tuner._sliders["2"].value = 90
    assert tuner._site.value == "2" and tuner.figure.axes[0].get_title() == "2"


def test_all_sites_together_moves_every_slider(tuner):
    tuner._all.value = 45
    assert [slider.value for slider in tuner._sliders.values()] == [45, 45]
    assert tuner.state.scales == {"2": 0.45, "4": 0.45}
    tuner._undo.click()
    assert tuner._all.value == 150 and tuner.state.bounded == []
    assert tuner._undo.disabled and not tuner._redo.disabled
    tuner._redo.click()
    assert tuner._all.value == 45


def test_reset_of_a_site_and_of_all(tuner):
    tuner._all.value = 45
    tuner._site.value = "4"
    tuner._reset_site.click()
    assert tuner.state.scales == {"2": 0.45, "4": 1.5}
    assert tuner._notes["4"].value == "no bound"
    tuner._reset_all.click()
    assert tuner.state.bounded == [] and "0 of 2 sites" in tuner._status.value


def test_the_bound_of_a_channel_is_typed(tuner, clipped):
    tuner._site.value = "2"
    assert tuner._bound.disabled
    assert tuner._channel.options[1][1] == 2  # the trigger's channel comes first
    tuner._channel.value = 2
    assert (tuner._bound.disabled, tuner._bound.value) == (False, "none")
    tuner._bound.value = "0.05"
    assert clipped.bounds["2"][2] == pytest.approx(0.05)
    assert shown(tuner) == ["100.0%", "0.0%", "100.0%"]
    assert tuner._channel.value == 2 and "0.05" in tuner._channel.options[1][0]
    assert tuner._drawing._line.get_xdata()[0] == pytest.approx(0.05)
    tuner._bound.value = "much"
    assert "not &#x27;much&#x27;" in tuner._status.value and tuner._bound.value == "0.05"
    tuner._bound.value = "-1"
    assert "at least 0" in tuner._status.value and tuner._bound.value == "0.05"
    tuner._sliders["2"].value = 50
    tuner._channel.value = 2
    tuner._bound.value = ""
    assert tuner._bound.value == "0.1"
    tuner._bound.value = "none"
    assert clipped.bounds["2"][2] == math.inf


def test_the_table_is_walked_through_by_row(tuner):
    channels = [channel.index for channel in tuner.state.channels(tuner._site.value)]
    tuner._row.value = 2
    assert tuner._channel.value == channels[1] and not tuner._bound.disabled
    assert tuner.figure.axes[0].get_title().endswith(f", channel {channels[1]}")
    tuner._row.value = 0
    assert tuner._bound.disabled and tuner.figure.axes[0].get_title() == tuner._site.value
    tuner._channel.index = 3
    assert tuner._row.value == 3 == tuner._row.max
    tuner._site.value = next(site for site in tuner._sliders if site != tuner._site.value)
    assert tuner._row.value == tuner._channel.index == 0


def test_moves_that_follow_one_another_are_one_step(tuner):
    for value in (140, 130, 120):
        tuner._sliders["2"].value = value
    tuner._undo.click()
    assert tuner.state.scales["2"] == 1.5


def test_a_slider_shows_whole_per_cents(tuner):
    """The page rounds others and sends them back, and the bounds would change by themselves."""
    for scale, per_cent in ((0.57, 57), (0.6254, 63), (0.625, 63)):
        tuner.state.set_scale("2", scale)
        tuner.refresh()
        assert tuner._sliders["2"].value == per_cent and tuner.state.scales["2"] == scale
    tuner.state.scale_all(0.57)
    tuner.refresh()
    assert isinstance(tuner._all.value, int) and tuner._all.value == 57


def test_load_and_refresh(tuner, clipped):
    tuner.load({"2": torch.tensor([9.0, 9.0, 0.01])})
    assert shown(tuner) == expected(evaluate(clipped, SPLITS.test, Blue()))
    assert tuner._sliders["2"].value == 100 and tuner._notes["2"].value == "% loaded"
    tuner.state.set_scale("4", 0.25)
    tuner.refresh()
    assert tuner._sliders["4"].value == 25
    assert shown(tuner) == expected(evaluate(clipped, SPLITS.test, Blue()))


def test_an_error_is_shown(tuner, monkeypatch):
    def fail():
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(tuner.state, "evaluate", fail)
    with pytest.raises(RuntimeError):
        tuner._sliders["2"].value = 50
    assert "RuntimeError: out of &lt;memory&gt;" in tuner._status.value
    monkeypatch.undo()
    tuner._later.ask()
    assert shown(tuner) == expected(evaluate(tuner.state.clipped, SPLITS.test, Blue()))


def test_counts_and_reference_are_stated(clipped):
    tuner = BoundTuner(clipped, SPLITS, Blue(), images=20)
    text = " ".join(child.value for child in tuner.widget.children if hasattr(child, "value"))
    assert "20 of 60 clean test images and on 20 triggered ones" in text
    assert "defender’s 40 clean images" in text


# --- threads ------------------------------------------------------------------------------------------------


def message(value):
    return {"content": {"data": {"method": "update", "state": {"value": value}}}, "buffers": []}


def test_messages_from_another_thread_are_handled_on_the_loop(clipped, monkeypatch):
    async def drag():
        tuner = BoundTuner(clipped, SPLITS, Blue())
        threads = []
        evaluate_bounds = tuner.state.evaluate

        def evaluated():
            threads.append(threading.get_ident())
            return evaluate_bounds()

        monkeypatch.setattr(tuner.state, "evaluate", evaluated)
        slider = tuner._sliders["2"]

        def move():
            for value in range(149, 19, -1):
                slider.comm.handle_msg(message(value))

        mover = threading.Thread(target=move)
        mover.start()
        mover.join()
        assert slider.value == 150  # the loop has not run yet: a cell is running
        await asyncio.sleep(0.3)
        return tuner, threads

    tuner, threads = asyncio.run(drag())
    assert threads == [threading.get_ident()]  # once, for the newest
    assert tuner.state.scales["2"] == 0.2
    assert shown(tuner) == expected(evaluate(clipped, SPLITS.test, Blue()))


def test_newest_asks_again_while_it_runs():
    async def run():
        calls = []

        def function():
            calls.append(len(calls))
            if len(calls) < 3:
                newest.ask()

        newest = Newest(function, asyncio.get_running_loop(), settle=0)
        for _ in range(5):
            newest.ask()
        assert calls == []
        await asyncio.sleep(0.1)
        return calls

    assert asyncio.run(run()) == [0, 1, 2]


def test_the_setting_of_jupyterlab_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shared = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    source = {target: source for source, target in shared.items()}
    path = ROOT / source["share/jupyter/lab/settings/overrides.d/bclip_lab.json"]
    chosen = json.loads(path.read_text(encoding="utf-8"))
    assert chosen["@jupyterlab/apputils-extension:kernels-settings"] == {"commsOverSubshells": "disabled"}
