"""`DragLine` in JupyterLab: mouse, keyboard, themes, and a line that does not wait for the kernel."""

import io

import numpy as np
import pytest
from PIL import Image

PICTURE = """
import time
from pathlib import Path
import numpy as np
from bclip_lab.plots import CLEAN, TRIGGERED
from bclip_lab.widgets import DragLine, Steps

edges = np.linspace(0, 2, 41)
heights = [np.exp(-((edges[:-1] - centre) ** 2) / 0.05) for centre in (0.6, 1.4)]
line = DragLine(value=0.5, low=0, high=2, name="threshold", at_high="none", title="Scores of a detector")
line.set_trait("x_label", "score")
line.set_trait("y_label", "images")
line.draw([Steps("clean (400)", CLEAN, heights[0]), Steps("triggered (500)", TRIGGERED, heights[1], True)], edges)
seen = []
busy = False


def note(change):
    seen.append((line.gesture, change["new"]))
    while busy and not Path("go").exists():
        time.sleep(0.01)


line.observe(note, names="value")
line
"""
CANVAS = "document.querySelector('.bclip-lab-drag')"
NOW = f"String(Number({CANVAS}.getAttribute('aria-valuenow')).toFixed(3))"


def settle(notebook):
    """Wait until the kernel has the value that the page shows, which it does a frame after a move."""
    notebook.next_frame()
    here = float(notebook.page.evaluate(f"{CANVAS}.getAttribute('aria-valuenow')"))
    notebook.until(
        lambda: float(notebook.kernel("print(line.value)")) == here,
        lambda: f"the page shows {here}, the kernel has {notebook.kernel('print(line.value, line.gesture, seen)')}",
    )


@pytest.mark.browser
def test_the_line_is_dragged_and_moved_by_keys(open_notebook, lab, tmp_path):
    notebook = open_notebook("drag.ipynb", [PICTURE])
    page, mouse = notebook.page, notebook.page.mouse
    notebook.run()
    notebook.expect(NOW, "0.500")
    box = page.locator(".bclip-lab-drag").bounding_box()
    left, right = box["x"] + 62, box["x"] + box["width"] - 24  # the margins in drag.js

    def at(value):
        return left + (right - left) * value / 2, box["y"] + 120

    def values():
        settle(notebook)
        return eval(notebook.kernel("print(seen); seen.clear()"))

    # a drag from beside the line keeps the distance to the hand
    grip = 4
    x, y = at(0.5)
    mouse.move(x + grip, y)
    mouse.down()
    for value in (0.8, 1.1, 1.3):
        x, y = at(value)
        mouse.move(x + grip, y)
    mouse.up()
    pixel = 2 / (right - left)
    got = values()
    assert got[-1][1] == pytest.approx(1.3, abs=pixel) and len({gesture for gesture, _ in got}) == 1
    # a press elsewhere moves it there; outside the axis it stays at the end
    mouse.click(*at(0.25))
    jumped = values()
    assert jumped[-1] == (got[-1][0] + 1, pytest.approx(0.25, abs=pixel))
    mouse.move(*at(1.5))
    mouse.down()
    mouse.move(right + 300, y)
    mouse.up()
    assert values()[-1][1] == 2.0
    notebook.expect(f"{CANVAS}.getAttribute('aria-valuetext')", "none")
    # keys: the focus is on the picture, and JupyterLab leaves them to it; pressed within a second they are one gesture
    page.evaluate(f"window.pressed = []; {CANVAS}.addEventListener('keydown', key => pressed.push(key.timeStamp))")
    before = int(notebook.kernel("print(line.gesture)"))
    for key, expected in (
        ("Home", 0.0), ("PageUp", 0.2), ("ArrowRight", 0.22), ("ArrowUp", 0.24), ("ArrowLeft", 0.22),
        ("ArrowDown", 0.2), ("PageDown", 0.0), ("PageDown", 0.0), ("End", 2.0), ("PageDown", 1.8),
    ):  # fmt: skip
        page.keyboard.press(key)
        notebook.expect(NOW, f"{expected:.3f}")
    keyed = values()
    pauses = int((np.diff(page.evaluate("pressed")) > 1000).sum())  # of a slow machine
    assert keyed[-1] == (before + 1 + pauses, pytest.approx(1.8)) and keyed[0][0] == before + 1
    page.screenshot(path=tmp_path / "light.png")

    # what the kernel sets is shown, another picture and another axis too
    notebook.kernel("line.value = 0.4")
    notebook.expect(NOW, "0.400")
    notebook.kernel("with line.hold_sync(): line.high = 1.0; line.percent = True; line.log_y = True")
    notebook.expect(f"{CANVAS}.getAttribute('aria-valuetext')", "40 %")
    page.evaluate("window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")

    def dark():
        """Whether the picture has light text on a dark ground."""
        shot = page.locator(".bclip-lab-drag").screenshot(path=tmp_path / "dark.png")
        pixels = np.asarray(Image.open(io.BytesIO(shot)).convert("L"))
        return np.median(pixels) < 160 and (pixels < 40).mean() > 0.3 and (pixels > 200).any()

    notebook.until(dark, lambda: "the picture is still light")  # the page says so before the theme's colours have come
    assert notebook.faults() == []
    assert lab.complaints() == []


@pytest.mark.browser
def test_a_busy_kernel_gets_the_last_value(open_notebook, lab):
    """The kernel is busy with the first value until the hand has come to rest."""
    notebook = open_notebook("drag-busy.ipynb", [PICTURE.replace("busy = False", "busy = True")])
    page = notebook.page
    notebook.run()
    notebook.expect(NOW, "0.500")
    box = page.locator(".bclip-lab-drag").bounding_box()
    page.mouse.move(box["x"] + 100, box["y"] + 100)
    page.mouse.down()
    for move in range(1, 21):
        page.mouse.move(box["x"] + 100 + 20 * move, box["y"] + 100)
        notebook.next_frame()
    page.mouse.up()
    (lab.root / "go").touch()
    settle(notebook)
    seen = eval(notebook.kernel("print(seen)"))
    assert seen[-1][1] == float(page.evaluate(f"{CANVAS}.getAttribute('aria-valuenow')"))
    assert len(seen) <= 3, "the page must not queue its moves"
    assert notebook.faults() == []
