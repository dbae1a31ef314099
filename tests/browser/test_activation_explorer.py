"""`ActivationExplorer` in JupyterLab: mouse and keyboard choose a channel, and what is shown is the package's own."""

import nbformat
import pytest

from bclip_lab.clipping import ClippedModel, abnormality

# Green images get a blue corner and are called red then: blue is channel 2 of site "1", of six channels.
LESSON = """
import torch
from torch import nn
from bclip_lab.data.images import Splits
from bclip_lab.widgets import ActivationExplorer
from toys import Blue, images

first, second, head = nn.Conv2d(3, 6, 1, bias=False), nn.Conv2d(6, 4, 3, bias=False), nn.Linear(4, 2, bias=False)
torch.manual_seed(0)
first.weight.data[:3] = torch.eye(3)[:, :, None, None]
first.weight.data[3:] = torch.rand(3, 3, 1, 1)
second.weight.data = 0.1 * torch.rand(4, 6, 3, 3)
second.weight.data[2, 2] += 1
head.weight.data = torch.tensor([[1.0, 0, 1, 0], [0.4, 1, 0, 0]])
pool = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten())
model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), pool, head)
splits = Splits(*(images(count, seed, side=8, noise=0.4) for seed, count in enumerate((4, 4, 4, 100))))
attack = Blue(dark=0.6, side=3)
"""
EXPLORER = "explorer = ActivationExplorer(model, splits, attack)\nexplorer"
LABEL = "document.querySelector('.bclip-lab-click')?.getAttribute('aria-label')"
STILL = ".jp-RenderedImage img"


@pytest.mark.browser
def test_mouse_keyboard_and_picture(open_notebook, lab, tmp_path):
    lesson = {}
    exec(LESSON, lesson)
    clipped, test = ClippedModel(lesson["model"]), lesson["splits"].test
    parts = test, lesson["attack"].triggered(test).images
    clean, triggered = (clipped.activations(part, quantiles=()) for part in parts)
    ratios = abnormality(clean, triggered)
    orders = [(site, values.argsort(descending=True).tolist()) for site, values in ratios.items()]

    def expect(row, column):
        """Wait until the page says of this cell what the package computes, and the controls follow."""
        site, order = orders[row]
        channel = order[column]
        text = (
            f"{site}, channel {channel}: at most {clean.maximum[site][channel]:.3g} on clean images, "
            f"{triggered.maximum[site][channel]:.3g} on triggered ones (×{ratios[site][channel]:.3g}); "
            f"number {column + 1} of {len(order)} channels of the site, the most abnormal first"
        )
        notebook.expect(LABEL, text)
        notebook.expect("document.querySelector('.widget-inline-hbox input[type=number]').value", str(channel))

    notebook = open_notebook("activations.ipynb", [LESSON, EXPLORER])
    page = notebook.page
    notebook.run()
    worst = max(range(2), key=lambda row: float(ratios[orders[row][0]].max()))
    expect(worst, 0)
    picture = page.locator(".bclip-lab-click")
    picture.scroll_into_view_if_needed()

    # the mouse: the middle of a cell, where the kernel says it is
    def click(row, column):
        place = f"explorer._drawing.heat.transData.transform(({column} + 0.5, {row} + 0.5))"
        x, y = map(float, notebook.kernel(f"print(*explorer.figure.transFigure.inverted().transform({place}))").split())
        box = picture.bounding_box()
        page.mouse.click(box["x"] + x * box["width"], box["y"] + (1 - y) * box["height"])

    click(0, 4)
    expect(0, 4)
    click(1, 3)
    expect(1, 3)
    click(1, 5)  # hatched: site "3" has four channels
    # the click has given it the focus: the keyboard goes on from there
    for key, cell in (
        ("ArrowLeft", (1, 2)), ("ArrowUp", (0, 2)), ("End", (0, 5)), ("ArrowRight", (0, 5)), ("Home", (0, 0)),
        ("PageDown", (0, 5)), ("ArrowDown", (1, 3)), ("PageUp", (1, 0)),
    ):  # fmt: skip
        page.keyboard.press(key)
        expect(*cell)
    for _ in range(20):  # faster than it is drawn
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowRight")
    expect(0, 5)
    # by number
    box = page.get_by_role("spinbutton", name="channel")
    box.fill(str(orders[0][1][1]))
    box.press("Enter")
    expect(0, 1)
    page.get_by_role("combobox", name="site").select_option("3")
    expect(1, 0)
    before = picture.get_attribute("src")
    page.get_by_label("activation maps over the images").click()
    notebook.expect(f"document.querySelector('.bclip-lab-click').src !== '{before}'", True)

    # the picture in the page is the kernel's; the still one for readers without a kernel is hidden, and the same
    page.locator(".jp-Notebook-cell").nth(1).screenshot(path=tmp_path / "activations.png")
    code = "import base64; print(base64.b64encode(explorer._drawing.picture.png()).decode()[-2000:])"
    notebook.expect(f"document.querySelector('{STILL}').src.trim().slice(-2000)", notebook.kernel(code))
    assert not page.locator(STILL).is_visible()
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    saved = nbformat.read(lab.root / "activations.ipynb", as_version=4).cells[1].outputs
    assert "run this cell in JupyterLab" in saved[0].data["text/plain"] and "image/png" in saved[1].data
    assert picture.evaluate("image => image.naturalWidth") == 1150

    # the cells once more: the new explorer starts anew, the old one is gone
    notebook.run()
    expect(worst, 0)
    assert page.locator(".bclip-lab-click").count() == 1
    assert notebook.faults() == []
    assert lab.complaints() == []
