import asyncio
import io
import json
import math
import re
import threading
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ipywidgets import HTML
from PIL import Image
from torch import nn
from toys import CLASSES, Blue

from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages, Splits
from bclip_lab.evaluation import evaluate
from bclip_lab.margins import classification_margins
from bclip_lab.models import logits, resnet10
from bclip_lab.widgets import BoundTuner, BoundTuning, DragLine, Steps
from bclip_lab.widgets import tuner as tuner_module
from bclip_lab.widgets.live import Newest
from bclip_lab.widgets.rerun import Rerun
from bclip_lab.widgets.strip import BarStrip

ROOT = Path(__file__).parents[1]
BLUE = Blue(dark=1)


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
    return BoundTuning(clipped, SPLITS, BLUE)


@pytest.fixture
def tuner(clipped):
    return BoundTuner(clipped, SPLITS, BLUE)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


# --- the state: what it starts with -------------------------------------------------------------------------


def test_starts_without_bounds(tuning, clipped):
    assert tuning.scales == {"2": math.inf, "4": math.inf}
    assert tuning.bounded == [] and not tuning.can_undo and not tuning.can_redo
    assert all(bounds.isinf().all() for bounds in clipped.bounds.values())
    assert tuning.measured is tuning.unclipped
    assert tuning.trail == [evaluate(clipped, SPLITS.test, BLUE)]
    assert tuning.trail[0].asr == 1.0


def test_reference_is_the_defenders(tuning, clipped):
    expected = clipped.activations(SPLITS.defender).maximum
    assert same(tuning.reference, expected)
    assert float(tuning.reference["2"][2]) == pytest.approx(0.2)
    assert float(tuning.abnormality["2"][2]) == pytest.approx(5)


def test_sample_of_the_test_images(clipped):
    tuning = BoundTuning(clipped, SPLITS, BLUE, images=7, seed=1)
    assert len(tuning.clean) == len(tuning.triggered) == 7
    assert (tuning.available, len(tuning.defender)) == (60, 40)
    again = BoundTuning(clipped, SPLITS, BLUE, images=7, seed=1)
    other = BoundTuning(clipped, SPLITS, BLUE, images=7, seed=2)
    assert torch.equal(tuning.clean.images, again.clean.images)
    assert torch.equal(tuning.triggered.rows, again.triggered.rows)
    assert not torch.equal(tuning.clean.images, other.clean.images)
    assert torch.equal(SPLITS.test.labels[tuning.triggered.rows], tuning.triggered.true_labels)
    assert tuning.evaluate() == tuning.unclipped.evaluation


def test_starts_with_the_bounds_of_the_model(clipped):
    first = BoundTuning(clipped, SPLITS, BLUE)
    first.set_scale("2", 0.62)
    learned = torch.tensor([0.5, math.inf, 0.1])
    clipped.set_bounds({"4": learned})
    before = clipped.bounds
    second = BoundTuning(clipped, SPLITS, BLUE)
    assert second.scales == {"2": 0.62, "4": 1.0}  # recognised; not a multiple of the clean maxima
    assert (second.loaded("2"), second.loaded("4")) == (False, True)
    assert torch.equal(second.bounds["4"], learned)
    assert same(clipped.bounds, before)
    assert second.unclipped.evaluation.asr == 1.0
    assert second.trail == [evaluate(clipped, SPLITS.test, BLUE)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clipped": network()}, "clipped must be a ClippedModel, got Sequential"),
        ({"images": 0}, "images must be at least 1, got 0"),
    ],
)
def test_refuses(clipped, arguments, message):
    given = {"clipped": clipped, "splits": SPLITS, "attack": BLUE, **arguments}
    with pytest.raises(ValueError, match=message):
        BoundTuning(**given)


def test_refuses_an_attack_that_turns_nothing(clipped):
    red = SPLITS.test[SPLITS.test.labels == 0]
    splits = Splits(SPLITS.train, SPLITS.defender, SPLITS.calibration, red)
    with pytest.raises(ValueError, match="attack turns no image"):
        BoundTuning(clipped, splits, BLUE)


# --- the state: changes -------------------------------------------------------------------------------------


def test_scale(tuning, clipped):
    tuning.set_scale("2", 0.5)
    assert torch.equal(clipped.bounds["2"], 0.5 * tuning.reference["2"])
    assert clipped.bounds["4"].isinf().all() and tuning.bounded == ["2"]
    result = tuning.evaluate()
    assert result == evaluate(clipped, SPLITS.test, BLUE) == tuning.trail[-1]
    margins = classification_margins(logits(clipped, tuning.triggered.images), tuning.triggered.targets)
    assert torch.equal(tuning.measured.triggered_margins, margins)
    tuning.set_scale("2", math.inf)
    assert clipped.bounds["2"].isinf().all()


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
    assert tuning.scales == {"2": 1.0, "4": math.inf} and tuning.loaded("2") and not tuning.by_hand("2")
    tuning.set_scale("2", 0.5)
    assert clipped.bounds["2"].tolist() == pytest.approx([0.2, math.inf, 0.025])
    tuning.set_scale("2", 0)
    assert clipped.bounds["2"].tolist() == [0, math.inf, 0]
    tuning.reset("2")
    assert not tuning.loaded("2") and clipped.bounds["2"].isinf().all()


def test_own_bounds_come_back_after_another_tuner(tuning, clipped):
    tuning.set_scale("2", 0.5)
    other = BoundTuning(clipped, SPLITS, BLUE)
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
    assert steps == [{"2": 1.0, "4": 0.9}, {"2": 1.0, "4": math.inf}, {"2": math.inf, "4": math.inf}]
    assert tuning.redo() and tuning.scales == {"2": 1.0, "4": math.inf}
    tuning.set_scale("2", 0.9, merge=True)  # nothing merges with what was done again
    assert tuning.undo() and tuning.scales["2"] == 1.0


CHANGES = st.one_of(
    st.tuples(st.just("set_scale"), st.sampled_from(["2", "4"]), st.sampled_from([0, 0.5, 1, math.inf])),
    st.tuples(st.just("scale_all"), st.sampled_from([0, 0.7, math.inf])),
    st.tuples(st.just("set_bound"), st.sampled_from(["2", "4"]), st.integers(0, 2), st.sampled_from([None, 0.1, 9])),
    st.tuples(st.just("load"), st.just({"2": 0.3})),
    st.tuples(st.just("reset")),
    st.tuples(st.just("reset"), st.just("4")),
    st.tuples(st.just("undo")),
    st.tuples(st.just("redo")),
)
SHARED = BoundTuning(ClippedModel(network()), SPLITS, BLUE)


def snapshot():
    sites = SHARED.scales
    bounds = [values.tolist() for values in SHARED.bounds.values()]
    return SHARED.scales, [(SHARED.loaded(site), SHARED.by_hand(site)) for site in sites], bounds


@settings(max_examples=60)
@given(st.lists(CHANGES, max_size=12))
def test_undo_and_redo(changes):
    """Against the list of all that was so far, and the place in it."""
    SHARED.__init__(SHARED.clipped, SPLITS, BLUE)
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
    SHARED.evaluate()
    full = [logits(SHARED.clipped, images) for images in (SHARED.clean, SHARED.triggered.images)]
    assert torch.equal(classification_margins(full[0], SHARED.clean.labels), SHARED.measured.clean_margins)
    assert torch.equal(classification_margins(full[1], SHARED.triggered.targets), SHARED.measured.triggered_margins)


def test_the_original_is_left_alone(clipped):
    model = clipped.original
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = logits(model, SPLITS.test)
    model.train()
    tuning = BoundTuning(clipped, SPLITS, BLUE)
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


def test_activations_in_multiples_of_loaded_bounds(tuning):
    tuning.load({"2": torch.tensor([math.inf, math.inf, 0.5])})
    clean, triggered = tuning.activations("2")
    assert torch.allclose(triggered, torch.full((30,), 2.0)) and float(clean.max()) < 0.5


def test_save_and_load_file(tuning, clipped, tmp_path):
    tuning.set_scale("2", 0.5)
    tuning.set_bound("4", 1, 0.25)
    before, path = tuning.bounds, tuning.save(tmp_path / "mine.safetensors")
    tuning.reset()
    tuning.load_file(path)
    assert same(tuning.bounds, before) and same(clipped.bounds, before)
    assert tuning.undo() and tuning.bounded == []
    with pytest.raises(FileNotFoundError):
        tuning.load_file(tmp_path / "other.safetensors")
    assert tuning.bounded == []


# --- from the changed site onwards --------------------------------------------------------------------------


class Shortcut(nn.Module):
    """A residual network: what the shortcut carries past a site is needed behind it, too."""

    def __init__(self, in_place=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1)] + [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)])
        self.head = nn.Linear(4, 2)
        self.in_place = in_place

    def forward(self, x):
        x = self.layers[0](x).relu()
        for layer in self.layers[1:]:
            y = layer(x).relu()
            if self.in_place:
                x += y
            else:
                x = x + y
            x = x.relu()
        return self.head(x.mean((2, 3)))


SITES = ("relu", "relu_1", "relu_2", "relu_3", "relu_4", "relu_5", "relu_6")


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.sampled_from(SITES), st.sampled_from([0.0, 0.05, 0.2, math.inf]), st.booleans()), max_size=8),
    st.sampled_from([0, 20_000, 10**9]),
    st.booleans(),
)
def test_rerun_equals_a_whole_pass(moves, memory, in_place):
    network = Shortcut(in_place)
    clipped = ClippedModel(network)
    assert clipped.sites == SITES
    sets = [SPLITS.test.images, SPLITS.defender.images]
    rerun = Rerun(clipped, sets, memory=memory, batch_size=25)
    for number, (site, bound, prepare) in enumerate(moves):
        if prepare:
            rerun.prepare(site)
        clipped.set_bounds({site: bound})
        if number == 4:
            with torch.no_grad():
                network.layers[1].weight.mul_(1.5)
        found = rerun()
        expected = [logits(clipped, images, batch_size=25) for images in sets]
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
        assert rerun.kept <= memory


def test_rerun_starts_at_the_changed_site():
    clipped = ClippedModel(Shortcut())
    rerun = Rerun(clipped, [SPLITS.test.images])
    starts = []
    moves = [("relu_2", 1.0), ("relu_2", 0.5), ("relu_2", 0.4), ("relu_5", 0.3), ("relu_5", 0.2), ("relu_2", 0.1)]
    for site, bound in [*moves, ("relu_5", 0.1), ("relu_5", 0.2)]:
        clipped.set_bounds({site: bound})
        rerun()
        starts.append(rerun.start)
    assert starts == [-1, -1, 2, 2, 5, 2, 2, 5]
    calls = []
    handle = clipped.network.get_submodule("layers.0").register_forward_hook(lambda *_: calls.append(1))
    clipped.set_bounds({"relu_5": 0.3})
    rerun()
    handle.remove()
    assert calls == []
    rerun.prepare("relu_3")
    clipped.set_bounds({"relu_3": 0.3})
    rerun()
    assert rerun.start == 3


def test_rerun_keeps_no_more_than_it_may():
    clipped = ClippedModel(Shortcut())
    rerun = Rerun(clipped, [SPLITS.test.images], memory=0)
    for bound in (1.0, 0.5, 0.2):
        clipped.set_bounds({"relu_2": bound})
        rerun()
        assert (rerun.start, rerun.kept) == (-1, 0)


def test_only_the_rerun_that_was_called_last_keeps_something():
    clipped = ClippedModel(Shortcut())
    first, second = (Rerun(clipped, [SPLITS.test.images]) for _ in range(2))
    for rerun in (first, second, first):
        for bound in (1.0, 0.5):
            clipped.set_bounds({"relu_2": bound})
            (found,) = rerun()
            assert torch.equal(found, logits(clipped, SPLITS.test))
        rerun.prepare("relu_2")
        assert rerun.kept > 0 and sum(each.kept for each in (first, second)) == rerun.kept


# --- the shell, without a kernel ----------------------------------------------------------------------------


def shown(tuner):
    """ACC, ASR and RA as the page has them."""
    return re.findall(r"<b [^>]*>([^<]*)</b>", tuner._numbers.value)


def expected(evaluation):
    return [f"{share:.1%}" for share in (evaluation.acc, evaluation.asr, evaluation.ra)]


def pixels(tuner):
    return np.asarray(Image.open(io.BytesIO(tuner._drawing.picture.png())))


def drag(tuner, *values):
    """Move the line as the page does: one gesture."""
    for value in values:
        with tuner._line.hold_trait_notifications():
            tuner._line.gesture += value is values[0]
            tuner._line.value = value


def series(line):
    count = len(line._series)
    heights = np.frombuffer(line._heights, "<f4").reshape(count, -1)
    return np.frombuffer(line._edges, "<f4"), heights


def test_starts_at_the_most_abnormal_site(tuner):
    assert tuner._site.value == "2" and tuner._line.title == "2"
    assert "×5" in dict((site, name) for name, site in tuner._site.options)["2"]
    assert tuner._line.value == tuner._line.high and tuner._line.at_high == "none"
    edges, (clean, triggered) = series(tuner._line)
    assert (edges[0], edges[-1]) == (tuner._line.low, tuner._line.high) == (0, pytest.approx(5))
    assert float(clean.sum()) == float(triggered.sum()) == pytest.approx(1)
    assert triggered[-1] == 1  # all of them at 5


def test_a_dragged_line_moves_the_bounds_the_numbers_and_the_picture(tuner, clipped):
    assert shown(tuner) == expected(tuner.state.unclipped.evaluation)
    before = pixels(tuner)
    drag(tuner, 0.9, 0.5, 0.3)
    result = evaluate(clipped, SPLITS.test, BLUE)
    assert torch.equal(clipped.bounds["2"], 0.3 * tuner.state.reference["2"])
    assert shown(tuner) == expected(result)
    assert f"{round(30 * result.ra)} of 30 triggered images right" in tuner._numbers.value
    assert "1 of 2 sites bounded" in tuner._status.value and tuner._scale.value == "30"
    assert tuner._drawing._now.get_xydata()[0].tolist() == [result.asr, result.acc]
    assert not np.array_equal(pixels(tuner), before)
    drag(tuner, tuner._line.high)
    assert clipped.bounds["2"].isinf().all() and tuner._scale.value == "none"
    tuner._undo.click()
    assert tuner._line.value == 0.3 and tuner.state.scales["2"] == 0.3
    tuner._undo.click()  # a drag is one step
    assert tuner.state.bounded == [] and tuner._undo.disabled


def test_the_picture_of_moved_artists_is_that_of_a_whole_drawing(tuner):
    drag(tuner, 1.2, 0.6, 0.2)
    quick = pixels(tuner)
    tuner._drawing.picture.redraw()
    assert np.array_equal(quick, pixels(tuner))


def test_a_channel_is_chosen_in_the_strip_and_dragged(tuner, clipped):
    assert tuner._strip.names[0].startswith("channel 2: ×5") and tuner._bound.disabled
    tuner._strip.chosen = 0
    assert tuner._line.title == "2, channel 2" and not tuner._line.percent
    assert tuner._line.high == pytest.approx(1.05)
    drag(tuner, 0.5, 0.05)
    assert clipped.bounds["2"].tolist() == [math.inf, math.inf, pytest.approx(0.05)]
    assert shown(tuner) == ["100.0%", "0.0%", "100.0%"] and tuner._bound.value == "0.05"
    tuner._strip.chosen = 1
    drag(tuner, 0.7)
    tuner._undo.click()
    assert tuner.state.by_hand("2") == {2: 0.05}
    tuner._strip.chosen = -1
    assert tuner._line.title == "2" and tuner._line.percent
    tuner._strip.chosen = 2
    tuner._together.click()
    assert tuner._strip.chosen == -1
    tuner._strip.chosen = 0
    tuner._site.value = "4"
    assert tuner._strip.chosen == -1 and tuner._line.title == "4"


def test_bounds_are_typed(tuner, clipped):
    tuner._scale.value = "50"
    assert tuner.state.scales["2"] == 0.5 and tuner._line.value == 0.5
    tuner._strip.chosen = 0
    assert tuner._line.value == pytest.approx(0.1)
    tuner._bound.value = "0.05"
    assert clipped.bounds["2"][2] == pytest.approx(0.05) and tuner._line.value == pytest.approx(0.05)
    tuner._bound.value = "much"
    assert "not &#x27;much&#x27;" in tuner._status.value and tuner._bound.value == "0.05"
    tuner._bound.value = "-1"
    assert "at least 0" in tuner._status.value and tuner._bound.value == "0.05"
    tuner._bound.value = ""
    assert tuner._bound.value == "0.1"
    tuner._bound.value = "7"  # beyond all activations: a bound all the same
    assert tuner._line.value == 7 < tuner._line.high
    tuner._bound.value = "none"
    assert clipped.bounds["2"][2] == math.inf and tuner._line.value == tuner._line.high
    tuner._scale.value = "none"
    assert tuner._scale.value == "none" and math.isinf(tuner.state.scales["2"])


def test_the_slider_for_all_sites(tuner):
    tuner._all.value = 60
    tuner._all.value = 45
    assert tuner.state.scales == {"2": 0.45, "4": 0.45} and tuner._line.value == 0.45
    tuner._undo.click()
    assert tuner._all.value == 150 and tuner.state.bounded == []
    assert tuner._undo.disabled and not tuner._redo.disabled
    tuner._redo.click()
    assert tuner._all.value == 45


def test_reset_of_a_site_and_of_all(tuner):
    tuner._all.value = 45
    tuner._site.value = "4"
    tuner._reset_site.click()
    assert tuner.state.scales == {"2": 0.45, "4": math.inf}
    tuner._reset_all.click()
    assert tuner.state.bounded == [] and "0 of 2 sites" in tuner._status.value


def test_load_and_refresh(tuner, clipped):
    tuner.load({"2": torch.tensor([9.0, 9.0, 0.01])})
    assert shown(tuner) == expected(evaluate(clipped, SPLITS.test, BLUE))
    assert tuner._line.value == 1.0 and tuner._line.x_label.endswith("loaded bound")
    tuner.state.set_scale("2", 0.25)
    tuner.refresh()
    assert tuner._line.value == 0.25
    assert shown(tuner) == expected(evaluate(clipped, SPLITS.test, BLUE))


def test_save_and_load(tuner, tmp_path):
    drag(tuner, 0.4)
    tuner._file.value = str(tmp_path / "mine.safetensors")
    tuner._save.click()
    assert "written to" in tuner._status.value
    tuner._reset_all.click()
    tuner._open.click()
    assert tuner.state.scales["2"] == pytest.approx(0.4)
    tuner._file.value = str(tmp_path / "no.safetensors")
    tuner._open.click()
    assert "no.safetensors" in tuner._status.value and tuner.state.scales["2"] == pytest.approx(0.4)


@dataclass
class Step:
    epoch: int
    epochs: int = 3
    accuracy: float = 1.0


def learn(clipped, clean):
    """Bounds that come down from epoch to epoch; stopped, it leaves those so far."""
    assert len(clean) == 40
    for epoch in range(1, 4):
        clipped.set_bounds({"2": 1.0 / epoch})
        yield Step(epoch)


def test_learned_bounds_are_one_step(tuner, clipped, monkeypatch):
    monkeypatch.setitem(tuner_module._LEARN, "MMAC", learn)
    tuner._learn["MMAC"].click()
    assert clipped.bounds["2"].tolist() == pytest.approx([1 / 3] * 3)
    assert shown(tuner) == expected(evaluate(clipped, SPLITS.test, BLUE))
    assert tuner._stop.disabled and not tuner._learn["MMAC"].disabled
    tuner._undo.click()
    assert tuner.state.bounded == []


def test_the_tuner_is_the_users_while_an_epoch_is_computed(clipped, monkeypatch):
    ended, may_go_on, closed = threading.Event(), threading.Event(), threading.Event()

    def slow(model, clean):
        assert threading.current_thread() is not threading.main_thread()
        try:
            model.set_bounds({"2": 0.25})
            yield Step(1)
            model.set_bounds({"2": 0.1})  # half an epoch
            ended.set()
            assert may_go_on.wait(10)
            yield Step(2)
        finally:
            closed.set()

    monkeypatch.setitem(tuner_module._LEARN, "MMAC", slow)

    async def run():
        tuner = BoundTuner(clipped, SPLITS, BLUE)
        tuner._learn["MMAC"].click()
        while not ended.is_set() or "epoch 1" not in tuner._progress.value:
            await asyncio.sleep(0.005)
        drag(tuner, 0.5)
        assert clipped.bounds["2"][0] == pytest.approx(float(0.5 * tuner.state.reference["2"][0]))
        assert tuner._learn["MM-BM"].disabled and not tuner._stop.disabled
        tuner._stop.click()  # the epoch that is being computed is not waited for
        assert clipped.bounds["2"].tolist() == [0.25] * 3
        assert not tuner._learn["MMAC"].disabled and tuner._stop.disabled
        tuner._undo.click()
        assert tuner.state.scales["2"] == 0.5
        tuner._redo.click()
        may_go_on.set()
        while not closed.is_set():
            await asyncio.sleep(0.005)
        assert "bounds taken" in tuner._progress.value

        # stopped before there is an epoch: nothing changes
        monkeypatch.setitem(tuner_module._LEARN, "MM-BM", lambda model, clean: iter_after(may_start))
        tuner._learn["MM-BM"].click()
        tuner._stop.click()
        assert "before the first epoch" in tuner._progress.value and clipped.bounds["2"].tolist() == [0.25] * 3
        may_start.set()

    def iter_after(event):
        assert event.wait(10)
        yield Step(1)

    may_start = threading.Event()
    asyncio.run(run())


def test_a_fit_that_fails_in_its_thread_is_told(clipped, monkeypatch):
    def fails(model, clean):
        yield Step(1)
        raise ValueError("no <images>")

    monkeypatch.setitem(tuner_module._LEARN, "MMAC", fails)

    async def run():
        told = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context["exception"]))
        tuner = BoundTuner(clipped, SPLITS, BLUE)
        tuner._learn["MMAC"].click()
        while not told:
            await asyncio.sleep(0.005)
        assert "MMAC: no &lt;images&gt;" in tuner._status.value and not tuner._learn["MMAC"].disabled
        assert [str(error) for error in told] == ["no <images>"]

    asyncio.run(run())


def test_an_error_is_shown(tuner, monkeypatch):
    def fail():
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(tuner.state, "evaluate", fail)
    with pytest.raises(RuntimeError):
        drag(tuner, 0.5)
    assert "RuntimeError: out of &lt;memory&gt;" in tuner._status.value
    monkeypatch.undo()
    tuner._later.ask()
    assert shown(tuner) == expected(evaluate(tuner.state.clipped, SPLITS.test, BLUE))


def test_counts_and_reference_are_stated(clipped):
    tuner = BoundTuner(clipped, SPLITS, BLUE, images=20)
    text = " ".join(child.value for child in tuner.widget.children if isinstance(child, HTML))
    assert "20 of 60 clean test images and on 20 triggered ones" in text
    assert "defender’s 40 clean images" in text


def test_a_still_picture_for_pages_without_a_kernel(tuner):
    assert Image.open(io.BytesIO(tuner._first)).size[0] > 600


# --- the pictures that are dragged --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heights", "edges", "message"),
    [
        ([1, 2], [0, 1], "'a' must have 1 heights, got shape"),
        ([1], [1, 0], "edges must be at least 2 finite, ascending numbers"),
        ([1], [0, math.nan], "edges must be"),
        ([-1], [0, 1], "heights of 'a' must be finite and at least 0"),
    ],
)
def test_drag_line_refuses(heights, edges, message):
    with pytest.raises(ValueError, match=message):
        DragLine().draw([Steps("a", "red", heights)], edges)


def test_the_value_at_rest_comes_without_the_queue_of_updates():
    line = DragLine(value=0.2)
    seen = []
    line.observe(lambda change: seen.append((line.gesture, change["new"])), names="value")
    rest = {"method": "custom", "content": {"value": 0.7, "gesture": 4}}
    for _ in range(2):
        line.comm.handle_msg({"content": {"data": rest}, "buffers": []})
    assert seen == [(4, 0.7)]


def test_a_movement_over_other_histograms_is_not_taken(tuner, clipped):
    """A channel is chosen and the line dragged before the page shows the channel's histogram."""
    line, stale = tuner._line, message(tuner._line, 0.3)
    tuner._strip.chosen = 0
    sent = []
    line.comm.send = lambda data=None, **_: sent.append(data)
    line.comm.handle_msg(stale)
    rest = {"value": 0.3, "gesture": 1, "_over": line._drawn - 1}
    line.comm.handle_msg({"content": {"data": {"method": "custom", "content": rest}}, "buffers": []})
    assert tuner.state.bounded == [] and line.value == line.high
    back = [data["state"] for data in sent if data["method"] == "update"]
    assert back == [{"value": line.high}] * 2  # the page's line goes back
    line.comm.handle_msg(message(line, 0.3))
    assert tuner.state.by_hand("2") == {2: 0.3}


def test_mmbm_bounds_the_early_sites_where_there_are_any(clipped):
    assert tuner_module._mmbm_config(clipped).sites is None
    config = tuner_module._mmbm_config(ClippedModel(resnet10(2, seed=0)))
    assert config.sites == ("relu", "stages.0.0.relu_1", "stages.1.0.relu_1")


def test_bar_strip_refuses():
    with pytest.raises(ValueError, match="'a' must have 2 heights"):
        BarStrip().draw([Steps("a", "red", [1])], ["x", "y"])
    with pytest.raises(ValueError, match=r"chosen must lie in \[-1, 1\), got 1"):
        BarStrip().draw([Steps("a", "red", [1])], ["x"], chosen=1)


# --- threads ------------------------------------------------------------------------------------------------


def message(line, value):
    """A move of the line as the page sends it."""
    state = {"value": value, "_over": line._drawn}
    return {"content": {"data": {"method": "update", "state": state}}, "buffers": []}


def test_messages_from_another_thread_are_handled_on_the_loop(clipped, monkeypatch):
    async def drag():
        tuner = BoundTuner(clipped, SPLITS, BLUE)
        threads = []
        evaluate_bounds = tuner.state.evaluate

        def evaluated():
            threads.append(threading.get_ident())
            return evaluate_bounds()

        monkeypatch.setattr(tuner.state, "evaluate", evaluated)
        line = tuner._line

        def move():
            for value in range(149, 19, -1):
                line.comm.handle_msg(message(line, value / 100))

        mover = threading.Thread(target=move)
        mover.start()
        mover.join()
        assert line.value == line.high  # the loop has not run yet: a cell is running
        while not threads:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # and no more
        return tuner, threads

    tuner, threads = asyncio.run(drag())
    assert threads == [threading.get_ident()]  # once, for the newest
    assert tuner.state.scales["2"] == 0.2
    assert shown(tuner) == expected(evaluate(clipped, SPLITS.test, BLUE))


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
        while len(calls) < 3:
            await asyncio.sleep(0)
        await asyncio.sleep(0.1)  # and no more
        return calls

    assert asyncio.run(run()) == [0, 1, 2]


def test_the_setting_of_jupyterlab_is_installed():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    shared = project["tool"]["hatch"]["build"]["targets"]["wheel"]["shared-data"]
    source = {target: source for source, target in shared.items()}
    path = ROOT / source["share/jupyter/lab/settings/overrides.d/bclip_lab.json"]
    chosen = json.loads(path.read_text(encoding="utf-8"))
    assert chosen["@jupyterlab/apputils-extension:kernels-settings"] == {"commsOverSubshells": "disabled"}
