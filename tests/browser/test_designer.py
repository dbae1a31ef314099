"""`TriggerDesigner` in JupyterLab: what is painted is what the kernel has, and what it shows is what it trained."""

import io

import numpy as np
import pytest
from browser.bounds import STILL, expect_pictures
from PIL import Image

# Red, green and blue images of 16x16 pixels, and a linear classifier.
LESSON = """
import torch
from torch import nn
from bclip_lab.data.images import LabelledImages, Splits
from bclip_lab.evaluation import evaluate
from bclip_lab.training import TrainConfig
from bclip_lab.widgets import TriggerDesigner


def images(count, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    pixels = 0.6 * torch.rand((count, 3, 16, 16), generator=generator)
    pixels[torch.arange(count), labels] += 0.05
    return LabelledImages((255 * pixels).byte(), labels, ("red", "green", "blue"))


splits = Splits(images(240, 0), images(30, 1), images(30, 2), images(120, 3))
epochs = globals().get("epochs", 3)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
"""
DESIGNER = """
config = TrainConfig(epochs=epochs, batch_size=16, learning_rate=0.05)
designer = TriggerDesigner(splits, make_model=make_model, config=config)
designer
"""
PAINTED = "document.querySelector('.bclip-lab-norms b')?.innerText"
NUMBERS = "[...document.querySelectorAll('.bclip-lab-design b')].map(each => each.innerText).join(' ')"
STATUS = "document.querySelector('.bclip-lab-status')?.innerText.split(/[: ]/)[0]"
MEASURED = """
found = evaluate(designer.model, designer.state.test_images, designer.attack)
print(f"{found.acc:.1%} {found.asr:.1%} {found.ra:.1%}")
"""
SEEN = """(([column, row]) => {{
    const canvas = document.querySelector('.bclip-lab-paint');
    const zoom = canvas.width / 16;
    const [x, y] = [column, row].map(place => Math.floor((place + 0.5) * zoom));
    return String(canvas.getContext('2d').getImageData(x, y, 1, 1).data);
}})([{}, {}])"""


def centre(page, column, row):
    """A pixel of the drawing on the screen."""
    box = page.locator(".bclip-lab-paint").bounding_box()
    zoom = (box["width"] - 2) / 16
    return box["x"] + 1 + (column + 0.5) * zoom, box["y"] + 1 + (row + 0.5) * zoom


def stroke(page, *places):
    page.mouse.move(*centre(page, *places[0]))
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*centre(page, *place))
    page.mouse.up()


def expect_drawing(notebook, expected, within=0):
    """Wait until the kernel has these pixels, which it may learn of later than the page."""

    def off():
        pixels = bytes.fromhex(notebook.kernel("print(designer.state.pixels.tobytes().hex())"))
        return np.abs(np.frombuffer(pixels, np.uint8).reshape(16, 16, 4).astype(int) - expected)

    notebook.until(
        lambda: off().max() <= within,
        lambda: f"the kernel has other pixels at {np.argwhere((off() > within).any(axis=2)).tolist()}",
    )


def click(page, name):
    page.locator(".jp-OutputArea").get_by_role("button", name=name).click()


@pytest.mark.browser
def test_paint(open_notebook, lab, tmp_path):
    notebook = open_notebook("paint.ipynb", [LESSON, DESIGNER])
    page = notebook.page
    notebook.run()
    notebook.expect(PAINTED, "9")  # the patch
    click(page, "Clear")
    notebook.expect(PAINTED, "0")
    expected = np.zeros((16, 16, 4), np.uint8)
    expect_drawing(notebook, expected)

    # a stroke of the mouse, quicker than the pointer's events: no gap
    click(page, "colour #00ff00")
    stroke(page, (2, 3), (9, 3), (9, 6))
    expected[3, 2:10] = expected[3:7, 9] = (0, 255, 0, 255)
    notebook.expect(PAINTED, "11")
    expect_drawing(notebook, expected)
    notebook.expect(SEEN.format(5, 3), "0,255,0,255")  # as it is on the screen
    first = expected.copy()

    # a larger brush, half-transparent, over the edge; then the eraser
    click(page, "colour #ff00ff")
    page.get_by_role("spinbutton", name="size").fill("3")
    page.get_by_role("spinbutton", name="opacity").fill("50")
    stroke(page, (15, 15), (15, 15))
    expected[14:, 14:] = (255, 0, 255, 127)
    notebook.expect(PAINTED, "15")
    expect_drawing(notebook, expected, within=1)  # 127.5
    page.get_by_role("checkbox", name="eraser").check()
    page.get_by_role("spinbutton", name="size").fill("1")
    stroke(page, (9, 3), (9, 6))
    expected[3:7, 9] = 0
    notebook.expect(PAINTED, "11")

    # a stroke is one step back
    for count in ("15", "11"):
        click(page, "Undo")
        notebook.expect(PAINTED, count)
    expect_drawing(notebook, first)
    notebook.expect(SEEN.format(9, 6), "0,255,0,255")
    click(page, "Redo")
    notebook.expect(PAINTED, "15")
    click(page, "Undo")
    notebook.expect(PAINTED, "11")

    # by keyboard, from where the pointer was; JupyterLab takes none of the keys
    page.get_by_role("checkbox", name="eraser").uncheck()
    page.get_by_role("spinbutton", name="opacity").fill("100")
    page.locator(".bclip-lab-paint").focus()
    for name in ("ArrowUp", "ArrowUp", "ArrowLeft", "Space", "ArrowRight", "Delete", "ArrowRight", "Space"):
        page.keyboard.press(name)
    first[4, 8] = first[4, 10] = (255, 0, 255, 255)
    first[4, 9] = 0
    notebook.expect("document.querySelector('.bclip-lab-painted').innerText", "row 4, column 10: #ff00ff, 100 %")
    notebook.expect(PAINTED, "12")
    expect_drawing(notebook, first)
    page.screenshot(path=tmp_path / "paint.png")

    # a picture from a file, and a preset
    rgba = np.random.default_rng(0).integers(0, 256, (16, 16, 4), np.uint8)
    rgba[:8, :, 3] = 0
    rgba[8:, :, 3] |= 1
    png = io.BytesIO()
    Image.fromarray(rgba).save(png, "png")
    with page.expect_file_chooser() as chooser:
        click(page, "Upload a PNG (0)")
    chooser.value.set_files([{"name": "mine.png", "mimeType": "image/png", "buffer": png.getvalue()}])
    notebook.expect(PAINTED, "128")
    expect_drawing(notebook, np.where(rgba[..., 3:] > 0, rgba, 0))
    click(page, "cross")
    notebook.expect(PAINTED, "13")

    # the picture is that of the last state
    notebook.expect(STILL, expect_pictures(notebook, "designer"))
    # what is saved for a reader without a kernel: a line that says how to run it, and that picture
    saved = page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets[1].model.outputs.toJSON()")
    assert "run this cell in JupyterLab" in saved[0]["data"]["text/plain"] and "image/png" in saved[1]["data"]
    assert notebook.faults() == []
    assert lab.complaints() == []


@pytest.mark.browser
def test_train(open_notebook, lab, tmp_path):
    notebook = open_notebook("train.ipynb", [LESSON, DESIGNER])
    page = notebook.page
    notebook.run()
    notebook.expect(PAINTED, "9")
    assert notebook.kernel("print(designer.model)") == "None"

    # what cannot be trained on is said
    click(page, "Clear")
    notebook.expect(PAINTED, "0")
    click(page, "Train")
    wrong = "document.querySelector('.bclip-lab-error')?.innerText"
    notebook.expect(wrong, "nothing is painted: paint a trigger, or take a preset")
    click(page, "patch")
    notebook.expect(PAINTED, "9")
    notebook.expect(f"{wrong} ?? 'none'", "none")

    # to the end
    page.get_by_label("target").select_option("blue")
    click(page, "Train")
    notebook.expect(STATUS, "trained")
    numbers = notebook.kernel(MEASURED)
    notebook.expect(NUMBERS, numbers)
    assert notebook.kernel("print(designer.attack.label_map.target, designer.step.epoch)") == "2 3"
    page.screenshot(path=tmp_path / "trained.png")

    # the cell once more, with a training without end: the page stays alive, and Stop keeps what there is
    notebook.kernel("epochs = 100000; old = designer")
    notebook.run()
    notebook.expect(NUMBERS, "")
    click(page, "Train")
    notebook.expect(STATUS, "epoch")
    page.locator(".bclip-lab-paint").focus()
    page.keyboard.press("Space")
    notebook.expect(PAINTED, "10")
    assert notebook.kernel("print(designer.step is not None, designer._steps is not None)") == "True True"
    click(page, "Stop")
    notebook.expect(STATUS, "stopped")
    notebook.expect(NUMBERS, notebook.kernel(MEASURED))
    weights = "print(float(designer.model[1].weight.detach().double().sum()))"
    kept = notebook.kernel(weights)
    page.wait_for_timeout(300)
    assert notebook.kernel(weights) == kept  # nothing goes on behind it
    assert notebook.kernel("print(int((designer.attack.trigger.mask > 0).sum()), designer.state.painted)") == "9 10"

    # a training that runs when its cell is run again
    click(page, "Train")
    notebook.expect(STATUS, "epoch")
    notebook.kernel("old = designer")
    notebook.run()
    notebook.expect(f"String({STATUS})", "undefined")
    notebook.expect(PAINTED, "9")
    assert notebook.kernel("print(old._steps, designer._steps, old.step.evaluation is not None)") == "None None True"
    click(page, "Train")
    notebook.expect(STATUS, "epoch")
    click(page, "Stop")
    notebook.expect(STATUS, "stopped")
    assert page.locator(".bclip-lab-paint").count() == 1
    assert notebook.faults() == []
    assert page.locator(".bclip-lab-error").count() == 0
    assert lab.complaints() == []
