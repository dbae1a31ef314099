"""bclip_lab.widgets: `TriggerDesign`, and `TriggerDesigner` without a kernel."""

import asyncio
import io
import re
import threading
from datetime import UTC, datetime

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from bclip_lab.attacks import AllToOne, BackdoorAttack, MaskTrigger, OneToOne
from bclip_lab.data.images import LabelledImages, Splits
from bclip_lab.evaluation import Visibility, evaluate
from bclip_lab.training import TrainConfig, run, train
from bclip_lab.widgets import TriggerDesign, TriggerDesigner
from bclip_lab.widgets.designing import PRESETS
from bclip_lab.widgets.paint import Paint

CLASSES = ("red", "green", "blue")
YELLOW = (255, 255, 0, 255)


def images(count, seed, channels=3, size=(8, 10)):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = 0.6 * torch.rand((count, channels, *size), generator=generator)
    pixels[torch.arange(count), labels % channels] += 0.05
    return LabelledImages((255 * pixels).byte(), labels, CLASSES)


def splits(**shape):
    return Splits(images(60, 0, **shape), images(9, 1, **shape), images(9, 2, **shape), images(45, 3, **shape))


SPLITS = splits()
CONFIG = TrainConfig(epochs=2, batch_size=10, learning_rate=0.05)


def make_model():
    model = nn.Sequential(nn.Flatten(), nn.Linear(240, 3))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    return model


@pytest.fixture
def design():
    return TriggerDesign(SPLITS, make_model=make_model, config=CONFIG)


@pytest.fixture
def designer():
    return TriggerDesigner(SPLITS, make_model=make_model, config=CONFIG)


def drawn(**places):
    """Yellow where a name such as r2c3 says."""
    pixels = np.zeros((8, 10, 4), np.uint8)
    for name in places:
        row, column = re.fullmatch(r"r(\d)c(\d)", name).groups()
        pixels[int(row), int(column)] = YELLOW
    return pixels


# --- the state: the drawing ---------------------------------------------------------------------------------


def test_it_starts_with_the_patch(design):
    assert design.painted == 9 and not design.can_undo and not design.can_redo
    assert (design.attack.label_map, design.attack.poison_rate) == (AllToOne(0), 0.1)


def test_the_trigger_is_the_drawing(design):
    pixels = np.zeros((8, 10, 4), np.uint8)
    pixels[2, 3] = (255, 0, 0, 255)
    pixels[7, 9] = (0, 0, 0, 255)  # black is a colour
    pixels[0, 0] = (255, 255, 255, 51)
    design.paint(pixels)
    triggered = design.trigger.embed(torch.full((1, 3, 8, 10), 100, dtype=torch.uint8))[0]
    expected = torch.full((3, 8, 10), 100, dtype=torch.uint8)
    expected[:, 2, 3] = torch.tensor([255, 0, 0])
    expected[:, 7, 9] = 0
    expected[:, 0, 0] = 131  # 0.8 * 100 + 0.2 * 255
    assert torch.equal(triggered, expected)
    assert design.painted == 3


def test_a_pixel_without_opacity_is_none(design):
    pixels = drawn(r1c1=1)
    pixels[0] = (9, 9, 9, 0)
    design.paint(pixels)
    assert np.array_equal(design.pixels, drawn(r1c1=1))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_does_what_the_packages_trigger_does(design, name):
    design.load_preset(name)
    ours = design.embed(SPLITS.test.images)
    theirs = PRESETS[name](8, 10).embed(SPLITS.test.images)
    assert not torch.equal(theirs, SPLITS.test.images)
    assert int((ours.int() - theirs.int()).abs().max()) <= 1


def test_the_colours_of_a_grey_set_are_greys():
    design = TriggerDesign(splits(channels=1))
    pixels = np.zeros((8, 10, 4), np.uint8)
    pixels[0, :3] = [(255, 0, 0, 255), (255, 255, 255, 255), (0, 0, 255, 255)]
    design.paint(pixels)
    found = design.embed(torch.zeros(1, 1, 8, 10, dtype=torch.uint8))[0, 0, 0, :3].tolist()
    assert found == list(np.array(Image.fromarray(pixels[..., :3]).convert("L"))[0, :3])


def test_what_is_handed_out_and_in_is_a_copy(design):
    given = drawn(r1c1=1)
    design.paint(given)
    given[:] = 7
    design.pixels[:] = 7
    assert np.array_equal(design.pixels, drawn(r1c1=1))
    images = SPLITS.test.images.clone()
    design.clear()
    assert torch.equal(design.embed(images), images) and design.embed(images) is not images
    design.load_preset("patch")
    design.embed(images)
    assert torch.equal(images, SPLITS.test.images)


@given(st.binary(min_size=320, max_size=320))
@settings(max_examples=20)
def test_png_and_back(values):
    design = TriggerDesign(SPLITS)
    design.paint(np.frombuffer(values, np.uint8).reshape(8, 10, 4))
    before = design.pixels
    png = design.to_png()
    design.clear()
    design.load_png(png)
    assert np.array_equal(design.pixels, before)


def test_a_larger_picture_is_made_to_fit_as_the_trigger_does(design, tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (31, 20, 4), np.uint8)
    path = tmp_path / "mine.png"
    Image.fromarray(rgba).save(path)
    design.load_png(path)
    theirs = MaskTrigger.from_png(path, size=(8, 10))
    assert torch.allclose(design.trigger.mask, theirs.mask)
    assert torch.equal(design.embed(SPLITS.test.images), theirs.embed(SPLITS.test.images))
    Image.fromarray(rgba[..., :3]).save(path)  # without alpha it covers everything
    design.load_png(str(path))
    assert design.painted == 80 and bool((design.trigger.mask == 1).all())


def test_norms(design):
    clean = SPLITS.test.images
    assert design.norms() == Visibility.from_images(clean, design.trigger.embed(clean))
    design.clear()
    assert (design.norms().l_2, design.norms().changed) == (0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.paint(np.zeros((8, 8, 4), np.uint8)), r"pixels must be uint8 \(8, 10, 4\), got uint8 \(8, 8, 4\)"),
        (lambda d: d.paint(np.zeros((8, 10, 4))), r"got float64 \(8, 10, 4\)"),
        (lambda d: d.load_png(b"no picture"), "this file is not a picture that Pillow can read"),
        (lambda d: d.load_png(__file__), "test_designing.py is not a picture"),
        (lambda d: d.load_preset("moustache"), "there is no preset 'moustache'; the presets are patch, cross"),
    ],
)
def test_a_refused_change_changes_nothing(design, change, message):
    before = design.pixels
    with pytest.raises(ValueError, match=message):
        change(design)
    assert np.array_equal(design.pixels, before) and not design.can_undo


def test_half_a_png_is_refused(design):
    png = design.to_png()
    with pytest.raises(ValueError, match="this file is not a picture"):
        design.load_png(png[: len(png) // 2])


def test_no_such_file(design, tmp_path):
    with pytest.raises(FileNotFoundError):
        design.load_png(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ({"channels": 2}, {}, "1 or 3 channels and at least 6x6 pixels, got 2 channels of 8x10"),
        ({"size": (5, 9)}, {}, "got 3 channels of 5x9"),
        ({}, {"train_images": 1}, "train_images must be at least 2 and test_images at least 1, got 1 and 500"),
        ({}, {"test_images": 0}, "got 4000 and 0"),
    ],
)
def test_refuses(shape, arguments, message):
    with pytest.raises(ValueError, match=message):
        TriggerDesign(splits(**shape), **arguments)


# --- the state: undo and redo -------------------------------------------------------------------------------


def test_a_stroke_is_one_step(design):
    first = design.pixels
    design.paint(drawn(r1c1=1), stroke=1)
    design.paint(drawn(r1c1=1, r1c2=1), stroke=1)
    design.paint(drawn(r1c1=1, r1c2=1, r5c5=1), stroke=2)
    assert design.undo() and np.array_equal(design.pixels, drawn(r1c1=1, r1c2=1))
    design.paint(drawn(r3c3=1), stroke=2)  # nothing goes on with a stroke that was taken back
    assert design.undo() and np.array_equal(design.pixels, drawn(r1c1=1, r1c2=1))
    assert design.undo() and np.array_equal(design.pixels, first)
    assert not design.undo() and design.redo()


CHANGES = st.one_of(
    st.tuples(st.just("paint"), st.sampled_from(["r0c0", "r7c9", "r1c1"]), st.sampled_from([None, 1, 2])),
    st.tuples(st.just("clear")),
    st.tuples(st.just("load_preset"), st.sampled_from(["patch", "cross"])),
    st.tuples(st.just("undo")),
    st.tuples(st.just("redo")),
)
SHARED = TriggerDesign(SPLITS)


@settings(max_examples=100)
@given(st.lists(CHANGES, max_size=15))
def test_undo_and_redo(changes):
    """Against the list of all that was so far, and the place in it."""
    SHARED.__init__(SPLITS)
    states, place, open_stroke = [SHARED.pixels], 0, None
    for name, *arguments in changes:
        stroke = None
        if name == "paint":
            pixels = SHARED.pixels
            row, column = int(arguments[0][1]), int(arguments[0][3])
            pixels[row, column] = 0 if pixels[row, column, 3] else YELLOW
            stroke = arguments[1]
            SHARED.paint(pixels, stroke=stroke)
        else:
            getattr(SHARED, name)(*arguments)
        if name == "undo":
            moved, place = place > 0, max(place - 1, 0)
        elif name == "redo":
            moved, place = place < len(states) - 1, min(place + 1, len(states) - 1)
        else:
            moved = not np.array_equal(SHARED.pixels, states[place])
            if moved and stroke is not None and stroke == open_stroke:
                states[place:] = [SHARED.pixels]
            elif moved:
                states[place + 1 :] = [SHARED.pixels]
                place += 1
        open_stroke = stroke if moved else open_stroke
        assert np.array_equal(SHARED.pixels, states[place])
        assert (SHARED.can_undo, SHARED.can_redo) == (place > 0, place < len(states) - 1)


# --- the state: training ------------------------------------------------------------------------------------


def test_the_attack_is_the_design(design):
    design.source, design.target, design.poison_rate = 2, 1, 0.25
    attack = design.attack
    assert isinstance(attack, BackdoorAttack)
    assert (attack.label_map, attack.poison_rate, attack.seed) == (OneToOne(2, 1), 0.25, 0)
    assert torch.equal(attack.trigger.mask, design.trigger.mask)


def test_a_training_is_that_of_the_package(design):
    design.poison_rate = 0.3
    steps = list(design.train())
    poisoned = design.attack.poison(design.train_images)
    last = run(train(make_model(), poisoned, CONFIG))
    assert torch.equal(steps[-1].model[1].weight, last.model[1].weight)
    assert (steps[-1].epoch, steps[-1].epochs, steps[-1].loss) == (2, 2, last.loss)
    assert len(steps) == 12 and [step.epoch for step in steps if step.evaluation is not None] == [1, 2]
    found = evaluate(last.model, design.test_images, design.attack)
    assert steps[-1].evaluation == found == design.evaluate(steps[-1])
    assert found.clean == 45 and found.triggered == 30


def test_a_training_keeps_to_the_attack_it_began_with(design):
    steps = design.train()
    next(steps)
    design.clear()
    design.target = 2
    last = run(steps)
    assert last.attack.label_map == AllToOne(0) and int(last.attack.trigger.mask.sum()) == 9
    assert last.evaluation == evaluate(last.model, design.test_images, last.attack)


def test_every_training_starts_anew(design):
    first, second = run(design.train()), run(design.train())
    assert first.model is not second.model and torch.equal(first.model[1].weight, second.model[1].weight)


def test_a_sample_of_the_images():
    design = TriggerDesign(SPLITS, train_images=20, test_images=30, seed=1)
    assert (len(design.train_images), len(design.test_images), design.available) == (20, 30, (60, 45))
    again = TriggerDesign(SPLITS, train_images=20, test_images=30, seed=1)
    other = TriggerDesign(SPLITS, train_images=20, test_images=30, seed=2)
    assert torch.equal(design.train_images.images, again.train_images.images)
    assert not torch.equal(design.train_images.images, other.train_images.images)
    assert design._make_model()(torch.zeros(2, 3, 8, 10)).shape == (2, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"poison_rate": 0.9}, "lower it to at most 0.667"),
        ({"poison_rate": 0.0}, r"poison_rate must lie in \(0, 1\], got 0.0"),
        ({"source": 1, "target": 1}, "target 1 is among the source classes"),
        ({"target": 7}, "label_map gives class 7, but there are 3 classes"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_at_once(design, settings, message):
    for name, value in settings.items():
        setattr(design, name, value)
    with pytest.raises(ValueError, match=message):
        design.train()


def test_a_blank_drawing_is_no_trigger(design):
    design.clear()
    with pytest.raises(ValueError, match="nothing is painted"):
        design.train()


def test_no_image_of_the_source_to_judge_on():
    design = TriggerDesign(SPLITS, test_images=1)
    design.source = next(label for label in (1, 2) if label != int(design.test_images.labels[0]))
    with pytest.raises(ValueError, match="no image of the attack's source classes"):
        design.train()


# --- the shell, without a kernel ----------------------------------------------------------------------------


def stroke(designer, pixels, number):
    """What the page sends."""
    designer.paint._handle_custom_msg({"stroke": number}, [memoryview(pixels.tobytes())])


def shown(designer):
    """ACC, ASR and RA as the page has them."""
    return re.findall(r'<b class="bclip-lab-(?:acc|asr|ra)">([^<]*)</b>', designer._numbers.value)


def expected(evaluation):
    return [f"{share:.1%}" for share in (evaluation.acc, evaluation.asr, evaluation.ra)]


def test_paint_shows_and_takes_pixels():
    paint = Paint(drawn(r1c2=1), np.full((8, 10, 3), 7, np.uint8), ["#ffff00"])
    assert (paint.width, paint.height) == (10, 8)
    assert np.array_equal(np.frombuffer(paint.backdrop, np.uint8).reshape(8, 10, 4)[3, 4], [7, 7, 7, 255])
    got = []
    paint.on_paint(lambda pixels, stroke: got.append((pixels.copy(), stroke)))
    paint._handle_custom_msg({"stroke": 5}, [memoryview(drawn(r3c4=1).tobytes())])
    assert np.array_equal(got[0][0], drawn(r3c4=1)) and got[0][1] == 5
    assert paint.handled == 1 and paint.pixels == drawn(r3c4=1).tobytes()


def test_what_is_painted_is_in_the_state_the_norms_and_the_picture(designer):
    before = designer._drawing.picture.png()
    stroke(designer, drawn(r1c1=1), 1)
    stroke(designer, drawn(r1c1=1, r1c2=1), 1)
    assert np.array_equal(designer.state.pixels, drawn(r1c1=1, r1c2=1))
    assert "<b>2</b> of 80 pixels painted" in designer._norms.value
    assert f"{designer.state.norms().l_2:.2f}" in designer._norms.value
    assert designer._drawing.picture.png() != before
    tiles = designer._drawing._image.get_array()
    assert tiles[10 + 1, 1].tolist() == [1, 1, 0]  # the triggered image below the clean one
    designer._undo.click()
    assert designer.state.painted == 9 and designer._undo.disabled and not designer._redo.disabled
    assert designer.paint.pixels == designer.state.pixels.tobytes()


def test_buttons_and_upload(designer):
    designer._clear.click()
    assert designer.state.painted == 0 and set(designer.paint.pixels) == {0}
    designer._presets["cross"].click()
    assert designer.state.painted == 13
    png = io.BytesIO()
    Image.fromarray(drawn(r0c0=1)).save(png, "png")
    file = {"name": "a.png", "type": "image/png", "size": 1, "last_modified": datetime.now(UTC)}
    designer._upload.value = ({**file, "content": memoryview(png.getvalue())},)
    assert np.array_equal(designer.state.pixels, drawn(r0c0=1)) and designer._upload.value == ()
    designer._upload.value = ({**file, "content": memoryview(b"none")},)
    assert "not a picture" in designer._status.value and designer.state.painted == 1
    designer._redo.click()  # there is none
    designer._undo.click()
    assert designer.state.painted == 13 and designer._status.value == ""


def test_source_target_and_poison_rate(designer):
    designer._source.value, designer._target.value, designer._rate.value = 2, 1, 25
    assert designer.attack.label_map == OneToOne(2, 1) and designer.attack.poison_rate == 0.25
    assert designer._drawing._labels[0] == "blue" and designer._drawing._labels[-1] == "green"
    designer._target.value = 2
    assert "target 2 is among the source classes" in designer._status.value
    designer._source.value = -1
    assert designer.state.source is None and designer._status.value == ""


def test_train(designer):
    assert designer.model is None and designer.attack.poison_rate == 0.1
    designer._rate.value = 30
    designer._train.click()
    assert designer.step.epoch == 2 and designer._progress.value == 2
    found = evaluate(designer.model, designer.state.test_images, designer.attack)
    assert shown(designer) == expected(found)
    assert designer._course.value.startswith('<span class="bclip-lab-status">trained: 2 of 2 epochs in')
    course = designer._drawing._lines["asr"].get_xydata()
    assert course[:, 0].tolist() == [1, 2] and course[-1, 1] == found.asr
    assert "<td>9</td><td>30.0%</td><td>2</td>" in designer._table.value
    assert not designer._train.disabled and designer._stop.disabled
    designer._clear.click()
    assert int(designer.attack.trigger.mask.sum()) == 9  # what the model was trained on
    designer._presets["cross"].click()
    designer._train.click()
    assert int(designer.attack.trigger.mask.sum()) == 13 and len(designer.runs) == 2
    assert shown(designer) == expected(designer.runs[1].evaluation)
    assert designer._drawing._lines["asr"].get_xydata().shape == (2, 2)


def test_a_training_that_cannot_begin_says_why(designer):
    designer._clear.click()
    designer._train.click()
    assert "nothing is painted" in designer._status.value and designer.model is None
    designer._presets["patch"].click()
    assert designer._status.value == ""


def test_an_error_is_shown_and_raised():
    def fail():
        raise RuntimeError("out of <memory>")

    designer = TriggerDesigner(SPLITS, make_model=fail, config=CONFIG)
    with pytest.raises(RuntimeError):
        designer._start()
    assert "RuntimeError: out of &lt;memory&gt;" in designer._course.value
    assert not designer._train.disabled and designer.model is None and TriggerDesigner._training is None


def test_the_picture_of_moved_artists_is_that_of_a_whole_drawing(designer):
    designer._train.click()
    stroke(designer, drawn(r5c5=1), 1)
    designer._target.value = 1
    quick = designer._drawing.picture.png()
    designer._drawing.picture.redraw()
    assert designer._drawing.picture.png() == quick


def test_counts_are_stated():
    designer = TriggerDesigner(SPLITS, make_model=make_model, config=CONFIG, train_images=50, test_images=40)
    text = " ".join(str(getattr(child, "value", "")) for child in designer.widget.children[1].children[1].children)
    assert "50 of 60 training images for 2 epochs; measured on 40 of 45 test images" in text


# --- on a loop, as in a kernel ------------------------------------------------------------------------------


async def until(condition):
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came to this")


def on_a_loop(steps):
    """Run a test on a loop, with a designer whose training has no end."""

    async def main():
        endless = TrainConfig(epochs=10**6, batch_size=10, learning_rate=0.05)
        await steps(TriggerDesigner(SPLITS, make_model=make_model, config=endless))

    asyncio.run(main())


def test_the_loop_goes_on_between_steps_and_stop_keeps_the_model():
    async def steps(designer):
        turns = []
        ticking = asyncio.ensure_future(tick(turns))
        designer._train.click()
        assert designer.step is None  # not before the click has been handled
        await until(lambda: designer.step is not None and designer.step.epoch > 2)
        ticking.cancel()
        assert len(turns) > 12  # a turn a step at least
        stroke(designer, drawn(r1c1=1), 1)
        await until(lambda: "<b>1</b> of 80" in designer._norms.value)
        designer._stop.click()
        weight = designer.model[1].weight.detach().clone()
        found = evaluate(designer.model, designer.state.test_images, designer.attack)
        assert shown(designer) == expected(found) and designer.step.evaluation == found
        assert "stopped" in designer._course.value and designer.runs == [designer.step]
        await asyncio.sleep(0.1)
        assert torch.equal(designer.model[1].weight, weight) and not designer.model.training

    async def tick(turns):
        while True:
            turns.append(1)
            await asyncio.sleep(0)

    on_a_loop(steps)


def test_stopped_and_trained_again_at_once_one_training_runs():
    async def steps(designer):
        designer._train.click()
        await until(lambda: designer.step is not None)
        first = designer.model
        designer._stop.click()
        designer._train.click()
        designer._train.click()  # the second click of a quick hand
        await until(lambda: designer.model is not first)
        assert designer.step.evaluation is not None or shown(designer) == []  # not those of the first
        advanced = []
        original = designer._advance
        designer._advance = lambda steps: (advanced.append(designer.step.epoch), original(steps))
        await until(lambda: len(advanced) > 5)
        assert len(set(advanced)) == len(advanced)
        designer.stop()

    on_a_loop(steps)


def test_stopped_before_its_first_step_the_model_before_it_stays():
    async def steps(designer):
        designer._train.click()
        await until(lambda: designer.step is not None)
        designer._stop.click()
        kept, numbers = designer.step, shown(designer)
        designer._train.click()
        designer._stop.click()
        assert designer.step is kept and shown(designer) == numbers and designer.runs == [kept]
        assert "stopped before the first step" in designer._course.value

    on_a_loop(steps)


def test_a_new_designer_stops_the_training_of_an_old_one():
    async def steps(designer):
        designer._train.click()
        await until(lambda: designer.step is not None)
        other = TriggerDesigner(SPLITS, make_model=make_model, config=CONFIG)
        epoch = designer.step.epoch
        assert designer._steps is None and designer.step.evaluation is not None
        other._train.click()
        await until(lambda: other.runs)
        assert designer.step.epoch == epoch and other.step.epoch == 2

    on_a_loop(steps)


def test_messages_from_another_thread_are_handled_on_the_loop():
    async def steps(designer):
        content = {"data": {"method": "custom", "content": {"stroke": 1}}}

        def paint():
            for place in ("r1c1", "r2c2", "r3c3"):
                message = {"content": content, "buffers": [memoryview(drawn(**{place: 1}).tobytes())]}
                designer.paint.comm.handle_msg(message)

        painter = threading.Thread(target=paint)
        painter.start()
        painter.join()
        assert designer.state.painted == 9  # the loop has not run yet: a cell is running
        await until(lambda: "<b>1</b> of 80" in designer._norms.value)
        assert np.array_equal(designer.state.pixels, drawn(r3c3=1)) and designer.paint.handled == 3

    on_a_loop(steps)
