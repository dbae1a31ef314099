import asyncio
import io
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import nn
from toys import CLASSES, Blue, Nothing, images

from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages, Splits, TriggeredImages
from bclip_lab.models import logits
from bclip_lab.widgets import ActivationExploration, ActivationExplorer


def network(channels=3):
    """Site "1": the pixels' red, green and blue, in so many channels; site "4": means; blue speaks for red."""
    first, second, head = nn.Conv2d(3, channels, 1, bias=False), nn.Linear(channels, 3), nn.Linear(3, 2)
    for layer in (first, second, head):
        nn.init.zeros_(layer.weight)
    for colour in range(3):
        first.weight.data[colour, colour] = second.weight.data[colour, colour] = 1
    head.weight.data = torch.tensor([[1.0, 0, 20], [0, 1, 0]])
    second.bias.data.zero_()
    head.bias.data.zero_()
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return nn.Sequential(first, nn.ReLU(), pool, second, nn.ReLU(), head)


BLUE = Blue(dark=0.5)
SPLITS = Splits(train=images(4, 0), defender=images(4, 1), calibration=images(4, 2), test=images(40, 3))


@pytest.fixture
def state():
    return ActivationExploration(network(), SPLITS, BLUE)


@pytest.fixture
def explorer():
    return ActivationExplorer(network(), SPLITS, BLUE)


# --- the state ----------------------------------------------------------------------------------------------


def test_the_most_abnormal_channel_is_chosen_first(state):
    test = SPLITS.test.images
    assert (state.site, state.channel, state.cell) == ("1", 2, (0, 0))
    assert state.maxima == (float(test[:, 2].max()), 1.0)
    assert state.ratio == pytest.approx(1 / float(test[:, 2].max()))
    assert state.order("1")[0] == 2 and sorted(state.order("1")) == [0, 1, 2]
    assert state.sites == ("1", "4")


def test_the_images_that_excite_a_channel_most(state):
    clean, triggered, original = state.excited(count=3)
    blue = SPLITS.test.images[:, 2].amax((1, 2))
    rows = blue.argsort(descending=True)[:3]
    assert torch.equal(clean.images, SPLITS.test.images[rows])
    assert torch.equal(clean.values, blue[rows])
    assert torch.equal(clean.labels, SPLITS.test.labels[rows])
    assert torch.equal(clean.maps, clean.images[:, 2])
    # the brightest corners are those of the last green images
    made = BLUE.triggered(SPLITS.test)
    assert torch.equal(triggered.images, made.images[[-1, -2, -3]])
    assert torch.equal(triggered.maps, triggered.images[:, 2]) and (triggered.values[0] == 1)
    assert triggered.labels.tolist() == [1, 1, 1] and triggered.decisions.tolist() == [0, 0, 0]
    assert torch.equal(original.images, SPLITS.test.images[made.rows[[-1, -2, -3]]])
    assert torch.equal(original.values, original.images[:, 2].amax((1, 2)))
    assert torch.equal(original.decisions, logits(network(), original.images).argmax(1))


def test_a_site_without_positions_has_no_maps(state):
    state.choose("4", 2)
    clean, triggered, original = state.excited(count=50)
    assert clean.maps is None and triggered.maps is None
    assert (len(clean.values), len(triggered.values), len(original.values)) == (40, 20, 20)
    torch.testing.assert_close(clean.values, clean.images[:, 2].mean((1, 2)))
    assert (clean.values.diff() <= 0).all()


def test_sample_of_the_test_images():
    state = ActivationExploration(network(), SPLITS, BLUE, images=9, seed=1)
    again = ActivationExploration(network(), SPLITS, BLUE, images=9, seed=1)
    other = ActivationExploration(network(), SPLITS, BLUE, images=9, seed=2)
    assert len(state.clean) == 9 and len(state.triggered) == int((state.clean.labels == 1).sum())
    assert torch.equal(state.clean.labels[state.triggered.rows], state.triggered.true_labels)
    assert torch.equal(state.clean.images, again.clean.images)
    assert not torch.equal(state.clean.images, other.clean.images)


def test_a_clipped_model_is_seen_without_its_bounds(state):
    clipped = ClippedModel(network())
    clipped.set_bounds({"1": 0.0})
    seen = ActivationExploration(clipped, SPLITS, BLUE)
    assert torch.equal(seen.ratios["1"], state.ratios["1"]) and torch.equal(seen.ratios["4"], state.ratios["4"])
    assert torch.equal(seen.excited()[1].decisions, state.excited()[1].decisions)
    assert (clipped.bounds["1"] == 0).all()


def test_images_of_bytes():
    test = SPLITS.test
    splits = Splits(*[LabelledImages((255 * test.images).byte(), test.labels, CLASSES)] * 4)

    class White(Blue):
        def triggered(self, data):
            made = super().triggered(LabelledImages(data.images.float() / 255, data.labels, data.classes))
            return TriggeredImages((255 * made.images).byte(), made.true_labels, made.targets, made.rows, CLASSES)

    clean, triggered, _ = ActivationExploration(network(), splits, White(0.5)).excited()
    assert clean.images.dtype == torch.float32 and float(triggered.images.max()) == 1
    assert triggered.values[0] == 1


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: ActivationExploration(network(), SPLITS, BLUE, images=0), "images must be at least 1, got 0"),
        (
            lambda: ActivationExploration(network(), SPLITS, BLUE, images=2001),
            "images must be at most 2000, got 2001",
        ),
        (lambda: ActivationExploration(network(), SPLITS, Nothing()), "attack turns none of the 40 test images"),
        (lambda: ActivationExploration(nn.Flatten(), SPLITS, BLUE), "no activation call"),
    ],
)
def test_refuses(do, message):
    with pytest.raises(ValueError, match=message):
        do()


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda s: s.choose("9"), "there is no site '9'; the sites are 1, 4"),
        (lambda s: s.choose("4", 3), r"channel must lie in \[0, 3\) at site '4', got 3"),
        (lambda s: s.choose("4", -1), r"channel must lie in \[0, 3\) at site '4', got -1"),
        (lambda s: s.order("9"), "there is no site '9'"),
        (lambda s: s.excited(0), "count must be at least 1, got 0"),
    ],
)
def test_a_refused_choice_changes_nothing(state, do, message):
    with pytest.raises(ValueError, match=message):
        do(state)
    assert (state.site, state.channel) == ("1", 2)


def test_cells_are_in_the_order_of_abnormality(state):
    for row, site in enumerate(state.sites):
        for column, channel in enumerate(state.ratios[site].argsort(descending=True, stable=True).tolist()):
            assert state.choose_cell(row, column)
            assert (state.site, state.channel, state.cell) == (site, channel, (row, column))
    assert not state.choose_cell(2, 0) and not state.choose_cell(0, 3) and not state.choose_cell(-1, 0)
    assert state.cell == (1, 2)


SHARED = ActivationExploration(network(channels=7), SPLITS, BLUE)  # rows of 7 and of 3 cells


@given(st.tuples(st.integers(0, 1), st.integers(0, 6)), st.integers(-3, 3), st.integers(-20, 20))
def test_steps_end_at_the_edges(cell, rows, columns):
    if SHARED.choose_cell(*cell):
        SHARED.step(rows, columns)
        row = min(max(cell[0] + rows, 0), 1)
        assert SHARED.cell == (row, min(max(cell[1] + columns, 0), (6, 2)[row]))


def test_the_model_is_left_alone():
    model = network().train()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = ActivationExploration(model, SPLITS, BLUE)
    state.excited()
    assert model.training and all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- the shell, without a kernel ----------------------------------------------------------------------------


def pixels(explorer):
    return np.asarray(Image.open(io.BytesIO(explorer._drawing.picture.png())))


def click(explorer, row, column):
    """Click the middle of a cell, as the page does it."""
    drawing = explorer._drawing
    place = drawing.heat.transData.transform((column + 0.5, row + 0.5))
    x, y = explorer.figure.transFigure.inverted().transform(place)
    drawing.picture.widget._handle_custom_msg({"x": float(x), "y": float(y)}, [])


def press(explorer, *keys):
    for key in keys:
        explorer._drawing.picture.widget._handle_custom_msg({"key": key}, [])


def test_a_click_chooses_a_cell(explorer):
    for cell in ((1, 2), (0, 1), (0, 0), (1, 0)):
        click(explorer, *cell)
        assert explorer.state.cell == cell
        assert (explorer._site.value, explorer._channel.value) == (explorer.state.site, explorer.state.channel)
        x, y = explorer._drawing._mark.get_xy()
        assert (y, x) == cell
        assert explorer._drawing.picture.widget.png == explorer._drawing.picture.png()
    explorer._drawing.picture.widget._handle_custom_msg({"x": 0.999, "y": 0.001}, [])
    assert explorer.state.cell == (1, 0)


def test_cells_that_a_site_does_not_have_cannot_be_clicked():
    explorer = ActivationExplorer(network(channels=7), SPLITS, BLUE)
    click(explorer, 1, 2)
    click(explorer, 1, 3)
    assert explorer.state.cell == (1, 2)
    press(explorer, "ArrowUp", "End")
    assert explorer.state.cell == (0, 6)
    assert explorer._channel.max == 6
    press(explorer, "ArrowDown")
    assert explorer.state.cell == (1, 2) and explorer._channel.max == 2


def test_keys_and_controls(explorer):
    press(explorer, "ArrowRight", "ArrowDown")
    assert explorer.state.cell == (1, 1)
    press(explorer, "End", "PageUp", "ArrowUp", "x")
    assert explorer.state.cell == (0, 0)
    explorer._site.value = "4"
    assert explorer.state.cell == (1, 0) and explorer._channel.value == explorer.state.order("4")[0]
    explorer._channel.value = 0
    assert (explorer.state.site, explorer.state.channel) == ("4", 0)
    label = explorer._drawing.picture.widget.label
    clean, triggered = explorer.state.maxima
    assert label.startswith(f"4, channel 0: at most {clean:.3g} on clean images, {triggered:.3g} on triggered")
    explorer.state.choose("1")
    explorer.refresh()
    assert explorer._site.value == "1" and "1, channel 2" in explorer._drawing.picture.widget.label


def test_the_map_lies_over_the_images(explorer):
    _, triggered, _ = explorer.state.excited()
    over = explorer._drawing._images[1][0].get_array()
    corner, elsewhere = over[0, 0], over[1:, 1:]
    assert corner.max() - corner.min() > 0.2  # in colour
    assert (elsewhere.max(-1) - elsewhere.min(-1)).max() < 0.2  # nearly grey
    explorer._maps.value = False
    plain = explorer._drawing._images[1][0].get_array()
    np.testing.assert_allclose(plain, triggered.images[0].permute(1, 2, 0))
    assert explorer._drawing._texts[1][0].get_text() == "1 · green\n→ red"


def test_the_picture_of_moved_artists_is_that_of_a_whole_drawing(explorer):
    press(explorer, "ArrowRight", "ArrowDown")
    quick = pixels(explorer)
    explorer._drawing.picture.redraw()
    assert np.array_equal(quick, pixels(explorer))


def test_fewer_images_than_places():
    explorer = ActivationExplorer(network(), SPLITS, BLUE, images=5)
    rows = [[image.get_visible() for image in row].count(True) for row in explorer._drawing._images]
    assert rows == [5, len(explorer.state.triggered), len(explorer.state.triggered)] and rows[1] < 5


def test_an_error_is_shown(explorer, monkeypatch):
    def fail(count):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(explorer.state, "excited", fail)
    with pytest.raises(RuntimeError):
        explorer.refresh()
    assert "out of &lt;memory&gt;" in explorer._status.value
    monkeypatch.undo()
    explorer.refresh()
    assert explorer._status.value == ""


def test_keys_from_another_thread_are_handled_on_the_loop_and_drawn_once():
    async def walk():
        explorer = ActivationExplorer(network(channels=30), SPLITS, BLUE)
        drawn = []
        draw = explorer._drawing.draw

        def counted(maps):
            drawn.append(threading.get_ident())
            return draw(maps)

        explorer._drawing.draw = counted
        widget = explorer._drawing.picture.widget

        def run():
            for _ in range(25):
                message = {"content": {"data": {"method": "custom", "content": {"key": "ArrowRight"}}}, "buffers": []}
                widget.comm.handle_msg(message)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert explorer.state.cell == (0, 0)  # the loop has not run yet: a cell is running
        while not drawn:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # and no more
        return explorer, drawn

    explorer, drawn = asyncio.run(walk())
    assert explorer.state.cell == (0, 25)
    assert drawn == [threading.get_ident()]
