"""`DetectionExplorer` in JupyterLab: dragged, clicked and typed, it shows the package's own numbers."""

import nbformat
import numpy as np
import pytest

from bclip_lab.evaluation import RocCurve

# Green images get a blue corner and are called red then; a bound on the corner takes that margin away.
LESSON = """
import torch
from torch import nn
from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import Splits
from bclip_lab.detection import MMDF
from bclip_lab.widgets import DetectionExplorer
from toys import Blue, images


class Corner:
    threshold_ = 0.3

    def score(self, images):
        return images[:, 2, 0, 0]


first, head = nn.Linear(192, 3, bias=False), nn.Linear(3, 2, bias=False)
weight = torch.zeros(3, 3, 64)
weight[0, 0], weight[1, 1], weight[2, 2, 0] = 1 / 64, 1 / 64, 1
first.weight.data = weight.reshape(3, 192)
head.weight.data = torch.tensor([[1.0, 0, 1.5], [0, 1, 0]])
clipped = ClippedModel(nn.Sequential(nn.Flatten(), first, nn.ReLU(), head))
clipped.set_bounds({"2": torch.tensor([torch.inf, torch.inf, 0.3])})
counts = enumerate((4, 4, 60, 100))
splits = Splits(*(images(count, seed, side=8, noise=0.4, corner=1.5) for seed, count in counts))
attack = Blue(dark=0.5)
detectors = {"MMDF": MMDF(clipped).fit(splits.calibration), "corner": Corner()}
"""
EXPLORER = "explorer = DetectionExplorer(detectors, splits.test, attack)\nexplorer"
COUNTS = "[...document.querySelectorAll('.bclip-lab-counts b')].map(each => each.innerText).join(' ')"
LABEL = "document.querySelector('.bclip-lab-click').getAttribute('aria-label')"
STILL = ".jp-RenderedImage img"


@pytest.mark.browser
def test_line_points_and_numbers(open_notebook, lab, tmp_path):
    lesson = {}
    exec(LESSON, lesson)
    detectors, test, attack = lesson["detectors"], lesson["splits"].test, lesson["attack"]
    triggered = attack.triggered(test)

    def numbers(name, threshold):
        """The table, from what the package computes."""
        detector = detectors[name]
        curve = RocCurve(detector.score(test.images), detector.score(triggered.images))
        stopped, detected = (int((part > threshold).sum()) for part in (curve.clean, curve.triggered))
        fpr, tpr = curve.rates_at(threshold)
        text = f"{detected} {50 - detected} {tpr:.1%} {stopped} {100 - stopped} {fpr:.1%}"
        if name == "corner":
            return text
        fitted, detector.threshold_ = detector.threshold_, threshold
        clean, found = detector.correct(test), detector.correct(triggered.images)
        detector.threshold_ = fitted
        acc, asr, ra = (
            float((decisions == labels).float().mean())
            for decisions, labels in (
                (clean, test.labels), (found, triggered.targets), (found, triggered.true_labels),
            )
        )  # fmt: skip
        return f"{text} {acc:.1%} {asr:.1%} {ra:.1%}"

    def at():
        """The kernel's threshold, of which the page shows the numbers."""
        threshold = float(notebook.kernel("print(explorer.state.threshold)"))
        notebook.expect(COUNTS, numbers(notebook.kernel("print(explorer.state.name)"), threshold))
        return threshold

    notebook = open_notebook("detections.ipynb", [LESSON, EXPLORER])
    page = notebook.page
    notebook.run()
    fitted = detectors["MMDF"].threshold_
    notebook.expect(COUNTS, numbers("MMDF", fitted))

    # the line, dragged: where the pointer lets it go is the threshold
    line = page.locator(".bclip-lab-drag")
    line.scroll_into_view_if_needed()
    low, high = map(float, notebook.kernel("print(explorer._line.low, explorer._line.high)").split())
    box = line.bounding_box()
    left, right = box["x"] + 62, box["x"] + box["width"] - 24  # the plot's margins in drag.js

    def pixel(score):
        return left + (score - low) / (high - low) * (right - left)

    page.mouse.move(pixel(fitted), box["y"] + 120)
    page.mouse.down()
    for share in (0.2, 0.4, 0.6, 0.8):
        page.mouse.move(left + share * (right - left), box["y"] + 120, steps=5)
    page.mouse.up()
    notebook.expect("Number(document.querySelector('.bclip-lab-drag').ariaValueNow) > 0", True)
    dragged = at()
    assert dragged == pytest.approx(low + 0.8 * (high - low), abs=1.5 * (high - low) / (right - left))
    scores = {
        name: [*d.score(test.images).tolist(), *d.score(triggered.images).tolist()] for name, d in detectors.items()
    }
    # a press on the fullest bar: its images are shown
    counts, edges = np.histogram(scores["MMDF"], np.linspace(low, high, 41))
    fullest = int(counts.argmax())
    page.mouse.click(pixel((edges[fullest] + edges[fullest + 1]) / 2), box["y"] + 120)
    notebook.expect(f"({LABEL}).endsWith('; one of {counts.max()} images of the bar under the line')", True)
    at()
    # by keyboard, the line having the focus
    page.keyboard.press("Home")
    page.keyboard.press("PageUp")
    page.keyboard.press("ArrowRight")
    notebook.expect(COUNTS, numbers("MMDF", low + 0.11 * (high - low)))
    assert at() == pytest.approx(low + 0.11 * (high - low))
    assert page.locator(".bclip-lab-drag").evaluate("line => line === document.activeElement")

    # the points, by mouse: the ends of the triggered images' scores
    picture = page.locator(".bclip-lab-click")
    picture.scroll_into_view_if_needed()

    def click(ax, x, y):
        place = f"explorer._drawing.{ax}.transData.transform(({x}, {y}))"
        x, y = map(float, notebook.kernel(f"print(*explorer.figure.transFigure.inverted().transform({place}))").split())
        where = picture.bounding_box()
        page.mouse.click(where["x"] + x * where["width"], where["y"] + (1 - y) * where["height"])

    def said(image):
        """What the page says of an image, from what the detector decides."""
        threshold = float(notebook.kernel("print(explorer.state.threshold)"))
        made = detectors["MMDF"].decide(test.images if image < 100 else triggered.images)
        row, names = image % 100, test.classes
        score, original = float(made.score[row]), names[made.original[row]]
        caught = score > threshold
        words = ("triggered", "detected", "missed") if image >= 100 else ("clean", "stopped", "let through")
        true = int((triggered.true_labels if image >= 100 else test.labels)[row])
        decision = int((made.other if caught else made.original)[row])
        target = f"; the attacker’s target: {names[0]}" if image >= 100 else ""
        return (
            f"{words[0]} image, {words[1] if caught else words[2]}; class: {names[true]}{target}; "
            f"original network: {original}, with a margin of {made.margin[row]:.3g}; "
            f"clipped network: {names[made.clipped[row]]}; margin of {original}: {made.clipped_margin[row]:.3g}; "
            f"score {score:.5g} {'>' if caught else '≤'} threshold {threshold:.5g}; "
            f"{'corrected to' if caught else 'decision kept:'} {names[decision]} "
            f"({'right' if decision == true else 'wrong'})"
        )

    for image in (100, 149, 17):
        click("points", scores["MMDF"][image], f"explorer._drawing._heights[{image}]")
        notebook.expect(LABEL, said(image))
    # and by keyboard: the least suspicious clean image, the next one, the triggered one of the nearest score
    order = sorted(range(100), key=lambda image: scores["MMDF"][image])
    for key, image in (
        ("Home", order[0]),
        ("ArrowRight", order[1]),
        ("ArrowUp", min(range(100, 150), key=lambda i: abs(scores["MMDF"][i] - scores["MMDF"][order[1]]))),
        ("End", max(range(100, 150), key=lambda i: scores["MMDF"][i])),
    ):
        page.keyboard.press(key)
        notebook.expect(LABEL, said(image))
    # a point of the ROC gives its threshold: all triggered images, as few clean ones as that takes
    curve = RocCurve(scores["MMDF"][:100], scores["MMDF"][100:])
    point = int((curve.true_positive_rate == 1).argmax())
    click("roc", max(curve.false_positive_rate[point], 0.005), 1)
    notebook.expect(f"({COUNTS}).startsWith('50 0 100.0% {round(100 * curve.false_positive_rate[point])} ')", True)
    at()

    # another detector, and a threshold that is typed
    page.get_by_role("combobox", name="detector").select_option("corner")
    notebook.expect(COUNTS, numbers("corner", 0.3))
    box = page.get_by_role("spinbutton", name="threshold")
    box.fill("0.45")
    box.press("Enter")
    notebook.expect(COUNTS, numbers("corner", 0.45))
    page.get_by_role("button", name="as fitted").click()
    notebook.expect(COUNTS, numbers("corner", 0.3))
    page.get_by_role("combobox", name="detector").select_option("MMDF")
    at()

    page.locator(".jp-Notebook-cell").nth(1).screenshot(path=tmp_path / "detections.png")
    code = "import base64; print(base64.b64encode(explorer._drawing.picture.png()).decode()[-2000:])"
    notebook.expect(f"document.querySelector('{STILL}').src.trim().slice(-2000)", notebook.kernel(code))
    assert not page.locator(STILL).is_visible()
    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    saved = nbformat.read(lab.root / "detections.ipynb", as_version=4).cells[1].outputs
    assert "run this cell in JupyterLab" in saved[0].data["text/plain"] and "image/png" in saved[1].data
    assert float(notebook.kernel("print(detectors['MMDF'].threshold_)")) == fitted

    # the cells once more: the new explorer starts anew, the old one is gone
    notebook.run()
    notebook.expect(COUNTS, numbers("MMDF", fitted))
    assert page.locator(".bclip-lab-counts").count() == 1
    assert notebook.faults() == []
    assert page.locator(".bclip-lab-error").count() == 0
    assert lab.complaints() == []
