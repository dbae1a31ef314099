"""`BoundTuner` in JupyterLab: what it shows is what the package computes."""

import math

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


def shown(evaluation: Evaluation) -> str:
    return f"{evaluation.acc:.1%} {evaluation.asr:.1%} {evaluation.ra:.1%}"


@pytest.mark.browser
def test_sliders_numbers_and_picture(open_notebook, lab, tmp_path):
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
    # all sites together, by keyboard: to 0 % and up again
    everything, slider = (page.locator(".noUi-handle").nth(index) for index in (0, 1))
    everything.focus()
    page.keyboard.press("Home")
    expect({site: 0.0 for site in maxima})
    for _ in range(11):
        page.keyboard.press("PageUp")  # five steps
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect({site: 0.57 * values for site, values in maxima.items()})
    # nothing moves by itself
    evaluated = notebook.kernel("print(len(tuner.state.trail))")
    page.wait_for_timeout(500)
    assert notebook.kernel("print(len(tuner.state.trail))") == evaluated
    # one site: a little less, and no bound at the upper end
    slider.focus()
    for _ in range(6):
        page.keyboard.press("PageDown")
    page.keyboard.press("ArrowLeft")
    expect({"2": 0.26 * maxima["2"], "4": 0.57 * maxima["4"]})
    page.keyboard.press("End")
    expect({"4": 0.57 * maxima["4"]})
    # one channel: the table's first, the trigger's, chosen by keyboard, too
    page.get_by_role("button", name="Reset all").click()
    expect({})
    page.get_by_role("spinbutton", name="row").focus()
    page.keyboard.press("ArrowUp")
    box = page.get_by_placeholder("a number, or: none")
    notebook.expect("document.querySelector('[placeholder^=\"a number\"]').value", "none")
    box.fill("0.05")
    box.press("Enter")
    bound = {"2": torch.tensor([math.inf, math.inf, 0.05])}
    expect(bound)
    page.get_by_role("button", name="Undo").click()
    expect({})
    page.get_by_role("button", name="Redo").click()
    expect(bound)
    assert len(set(seen)) == 5, f"too few different numbers to tell anything: {seen}"

    # the picture is that of the last state, and the kernel's model has its bounds
    code = "import base64; print(base64.b64encode(tuner._drawing.picture.png()).decode()[-2000:])"
    source = "document.querySelector('.jp-OutputArea-output img').src.trim().slice(-2000)"
    notebook.expect(source, notebook.kernel(code))
    numbers = notebook.kernel("print(evaluate(clipped, splits.test, Blue()))")
    assert numbers == repr(evaluate(clipped, test, attack))
    page.screenshot(path=tmp_path / "tuner.png")

    # the cells once more: the new tuner starts anew, the old one is gone
    notebook.run()
    expect({})
    assert page.locator(".bclip-lab-numbers").count() == 1
    assert notebook.faults() == []
    assert page.locator(".bclip-lab-error").count() == 0
    assert "Traceback" not in lab.log.read_text()
