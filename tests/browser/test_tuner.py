"""`BoundTuner` in JupyterLab: what it shows is what the package computes."""

import math
import random
from types import SimpleNamespace

import pytest
import torch

from bclip_lab.evaluation import Evaluation, evaluate

# Red and green images; a blue corner turns green ones red, through channel 2 of site "2".
LESSON = """
import torch
from torch import nn
from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages, Splits, TriggeredImages
from bclip_lab.evaluation import evaluate
from bclip_lab.widgets import BoundTuner


class Blue:
    def triggered(self, data):
        rows = torch.nonzero(data.labels == 1).flatten()
        images = data.images[rows].clone()
        images[:, 2, 0, 0] = 0.6 + 0.4 * torch.linspace(0, 1, len(rows))
        labels = data.labels[rows]
        return TriggeredImages(images, labels, torch.zeros_like(labels), rows, data.classes)


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 2
    pixels = 0.6 * torch.rand((count, 3, 4, 4), generator=generator)
    pixels[torch.arange(count), labels] += 0.4 * torch.rand((count, 1, 1), generator=generator)
    pixels[:, 2] *= 0.5
    return LabelledImages(pixels, labels, ("red", "green"))


first, second, head = nn.Linear(48, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False)
weight = torch.zeros(3, 3, 16)
weight[0, 0], weight[1, 1], weight[2, 2, 0] = 1 / 16, 1 / 16, 1
first.weight.data = weight.reshape(3, 48)
second.weight.data = torch.eye(3)
head.weight.data = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
clipped = ClippedModel(nn.Sequential(nn.Flatten(), first, nn.ReLU(), second, nn.ReLU(), head))
splits = Splits(images(4, 0), images(40, 1), images(4, 2), images(200, 3))
"""
TUNER = "tuner = BoundTuner(clipped, splits, Blue())\ntuner"
NUMBERS = "[...document.querySelectorAll('.bclip-lab-numbers b')].map(each => each.innerText).join(' ')"
LINE = "document.querySelector('.bclip-lab-drag')"
TEXT = f"{LINE}.getAttribute('aria-valuetext')"


def shown(evaluation: Evaluation) -> str:
    return f"{evaluation.acc:.1%} {evaluation.asr:.1%} {evaluation.ra:.1%}"


class Hand:
    """A mouse on the line of the tuner's histogram."""

    def __init__(self, notebook):
        self.notebook, self.mouse = notebook, notebook.page.mouse
        notebook.page.locator(".bclip-lab-drag").scroll_into_view_if_needed()
        box = notebook.page.locator(".bclip-lab-drag").bounding_box()
        self.left, self.width = box["x"] + 62, box["width"] - 86  # the margins in drag.js
        self.y = box["y"] + 100

    def at(self, share):
        """A place on the axis, as a share of it, drawn to whole pixels as the mouse is."""
        return round(self.left + share * self.width), self.y

    def drag(self, *shares):
        """Drag the line through some places, and give the value at the last one."""
        self.mouse.move(*self.at(shares[0]))
        self.mouse.down()
        for share in shares:
            self.mouse.move(*self.at(share))
        self.mouse.up()
        return self.value()

    def value(self):
        """Where the line is in the page, once the kernel has it, too."""
        here = float(self.notebook.page.evaluate(f"{LINE}.getAttribute('aria-valuenow')"))
        for _ in range(100):
            if float(self.notebook.kernel("print(tuner._line.value)")) == here:
                return here
            self.notebook.page.wait_for_timeout(50)
        raise AssertionError(f"the kernel did not get {here}")


@pytest.mark.browser
def test_dragging_typing_and_keys(open_notebook, lab, tmp_path):
    lesson = {}
    exec(LESSON, lesson)
    clipped, test, attack = lesson["clipped"], lesson["splits"].test, lesson["Blue"]()
    maxima = clipped.activations(lesson["splits"].defender).maximum
    seen = []

    def expect(bounds):
        """Wait until the page shows what the package computes for these bounds."""
        clipped.reset()
        clipped.set_bounds(bounds)
        text = shown(evaluate(clipped, test, attack))
        notebook.expect(NUMBERS, text)
        seen.append(text)

    notebook = open_notebook("tuner.ipynb", [LESSON, TUNER])
    page = notebook.page
    notebook.run()
    expect({})
    notebook.expect(TEXT, "none")
    hand = Hand(notebook)
    # the line of the most abnormal site is dragged: its scale
    scale = hand.drag(1.0, 0.6, 0.3, 0.12)
    expect({"2": scale * maxima["2"]})
    # nothing moves by itself
    evaluated = notebook.kernel("print(len(tuner.state.trail))")
    page.wait_for_timeout(500)
    assert notebook.kernel("print(len(tuner.state.trail))") == evaluated
    # keys move it on: the focus is on the line
    step = float(notebook.kernel("print(tuner._line.high / 100)"))
    for key in ("PageUp", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    assert hand.value() == pytest.approx(scale + 8 * step)
    expect({"2": hand.value() * maxima["2"]})
    page.keyboard.press("End")
    expect({})
    # all sites together, by keyboard
    page.locator(".noUi-handle").first.focus()
    page.keyboard.press("Home")
    expect({site: 0.0 for site in maxima})
    for _ in range(11):
        page.keyboard.press("PageUp")  # five steps
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect({site: 0.57 * values for site, values in maxima.items()})
    # the scale of a site is typed
    box = page.get_by_label("site, %", exact=True)
    box.fill("26")
    box.press("Enter")
    expect({"2": 0.26 * maxima["2"], "4": 0.57 * maxima["4"]})
    page.get_by_role("button", name="Reset all").click()
    expect({})
    # one channel: the strip's first, the trigger's, is clicked, and chosen by keys
    strip = page.locator(".bclip-lab-strip")
    place = strip.bounding_box()
    page.mouse.click(place["x"] + 62 + (place["width"] - 86) / 6, place["y"] + 60)
    title = "tuner._line.title"
    expect_kernel(notebook, title, "2, channel 2")
    page.keyboard.press("ArrowRight")
    expect_kernel(notebook, title, f"2, channel {notebook.kernel('print(tuner._order[1])')}")
    page.keyboard.press("Escape")
    expect_kernel(notebook, title, "2")
    page.keyboard.press("Home")
    expect_kernel(notebook, title, "2, channel 2")
    hand = Hand(notebook)
    bound = hand.drag(1.0, 0.4, 0.05)
    expect({"2": torch.tensor([math.inf, math.inf, bound])})
    box = page.get_by_label("channel", exact=True)
    box.fill("0.05")
    box.press("Enter")
    typed = {"2": torch.tensor([math.inf, math.inf, 0.05])}
    expect(typed)
    for _ in range(2):  # a drag is one step
        page.get_by_role("button", name="Undo").click()
    expect({})
    for _ in range(2):
        page.get_by_role("button", name="Redo").click()
    expect(typed)
    assert len(set(seen)) >= 5, f"too few different numbers to tell anything: {seen}"

    # saved, taken off, loaded
    page.get_by_role("button", name="Save", exact=True).click()
    notebook.expect("document.body.innerText.includes('written to bounds.safetensors') ? 'yes' : 'no'", "yes")
    page.get_by_role("button", name="Reset all").click()
    expect({})
    page.get_by_role("button", name="Load", exact=True).click()
    expect(typed)

    # the picture is that of the last state, and the kernel's model has its bounds
    code = "import base64; print(base64.b64encode(tuner._drawing.picture.png()).decode()[-2000:])"
    source = "document.querySelector('.jp-OutputArea-output img').src.trim().slice(-2000)"
    notebook.expect(source, notebook.kernel(code))
    numbers = notebook.kernel("print(evaluate(clipped, splits.test, Blue()))")
    assert numbers == repr(evaluate(clipped, test, attack))
    page.screenshot(path=tmp_path / "tuner.png")

    # learned bounds, with the page alive meanwhile; stopped before their end
    page.get_by_role("button", name="MM-BM", exact=True).click()
    notebook.expect("document.body.innerText.includes('MM-BM: epoch') ? 'yes' : 'no'", "yes")
    page.get_by_role("button", name="Stop", exact=True).click()
    notebook.expect("document.body.innerText.includes('MM-BM: bounds taken') ? 'yes' : 'no'", "yes")
    notebook.expect(NUMBERS, shown(eval_in_kernel(notebook)))

    # the cells once more: the new tuner starts anew, the old one is gone
    notebook.run()
    expect({})
    assert page.locator(".bclip-lab-numbers").count() == 1
    assert notebook.faults() == []
    assert page.locator(".bclip-lab-error").count() == 0
    assert "Traceback" not in lab.log.read_text()


def expect_kernel(notebook, expression, value):
    for _ in range(100):
        found = notebook.kernel(f"print({expression})")
        if found == value:
            return
        notebook.page.wait_for_timeout(50)
    raise AssertionError(f"{expression} is {found}, not {value}")


def eval_in_kernel(notebook):
    acc, asr, ra = eval(notebook.kernel("e = evaluate(clipped, splits.test, Blue()); print((e.acc, e.asr, e.ra))"))
    return SimpleNamespace(acc=acc, asr=asr, ra=ra)


@pytest.mark.browser
def test_quick_and_random_moves(open_notebook):
    """Twenty moves in 400 ms end on the last value; after many random ones page and kernel agree."""
    notebook = open_notebook("moves.ipynb", [LESSON, TUNER])
    page = notebook.page
    notebook.run()
    notebook.expect(TEXT, "none")
    hand = Hand(notebook)
    hand.mouse.move(*hand.at(1.0))
    hand.mouse.down()
    for move in range(20):
        hand.mouse.move(*hand.at(0.9 - 0.04 * move))
        page.wait_for_timeout(20)
    hand.mouse.up()
    scale = hand.value()
    notebook.expect(NUMBERS, shown(eval_in_kernel(notebook)))
    assert float(notebook.kernel("print(tuner.state.scales['2'])")) == scale
    assert notebook.kernel("print(tuner.state.undo(), tuner.state.bounded)") == "True []"
    notebook.kernel("tuner.refresh()")

    draw = random.Random(0)
    strip = page.locator(".bclip-lab-strip").bounding_box()
    for _ in range(40):
        what = draw.randrange(4)
        if what == 0:
            page.mouse.click(strip["x"] + 62 + draw.random() * (strip["width"] - 86), strip["y"] + 60)
        elif what == 1:
            page.keyboard.press(draw.choice(["Escape", "ArrowLeft", "ArrowRight", "Home", "End", "PageDown"]))
        else:
            hand.mouse.move(*hand.at(draw.random()))
            hand.mouse.down()
            for _ in range(5):
                hand.mouse.move(*hand.at(draw.random()))
            hand.mouse.up()
    hand.drag(0.5, 0.2)
    notebook.expect(NUMBERS, shown(eval_in_kernel(notebook)))
    same = "all(torch.equal(a, b) for a, b in zip(clipped.bounds.values(), tuner.state.bounds.values()))"
    assert notebook.kernel(f"print({same})") == "True"
    assert notebook.faults() == []
    assert page.locator(".bclip-lab-error").count() == 0
