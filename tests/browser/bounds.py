"""A network whose backdoor is known, its `BoundTuner` in a notebook, and a hand on the line."""

from types import SimpleNamespace

from bclip_lab.evaluation import Evaluation

# Red and green images; a blue corner turns green ones red, through channel 2 of site "2".
LESSON = """
import torch
from torch import nn
from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages, Splits
from bclip_lab.evaluation import evaluate
from bclip_lab.widgets import BoundTuner
from toys import Blue


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
attack = Blue(dark=0.6)
"""
TUNER = "tuner = BoundTuner(clipped, splits, attack)\ntuner"
NUMBERS = "[...document.querySelectorAll('.bclip-lab-numbers b')].map(each => each.innerText).join(' ')"
LINE = "document.querySelector('.bclip-lab-drag')"
STILL = "document.querySelector('.jp-RenderedImage img').src.trim().slice(-2000)"
TEXT = f"{LINE}.getAttribute('aria-valuetext')"


def shown(evaluation: Evaluation) -> str:
    return f"{evaluation.acc:.1%} {evaluation.asr:.1%} {evaluation.ra:.1%}"


class Hand:
    """A mouse on the line of a tuner's histogram: of the one of that name, the so-manieth of the page."""

    def __init__(self, notebook, name="tuner", place=0):
        self.notebook, self.mouse, self.name = notebook, notebook.page.mouse, name
        self.line = notebook.page.locator(".bclip-lab-drag").nth(place)
        self.line.scroll_into_view_if_needed()
        box = self.line.bounding_box()
        self.left, self.width = box["x"] + 62, box["width"] - 86  # the margins in drag.js
        self.y = box["y"] + 100

    def at(self, share):
        """A place on the axis, as a share of it, drawn to whole pixels as the mouse is."""
        return round(self.left + share * self.width), self.y

    def drag(self, *shares):
        """Drag the line through some places, and give the value at the last one."""
        self.value("high", "aria-valuemax")  # another channel, chosen just before, has another axis
        self.value()
        self.move(*shares)
        return self.value()

    def move(self, *shares):
        """Drag the line through some places."""
        self.mouse.move(*self.at(shares[0]))
        self.mouse.down()
        for share in shares:
            self.mouse.move(*self.at(share))
        self.mouse.up()

    def here(self, attribute="aria-valuenow"):
        """Where the line is in the page."""
        return float(self.line.get_attribute(attribute))

    def value(self, trait="value", attribute="aria-valuenow"):
        """Where the line is in the page, once the kernel has it, too."""
        self.notebook.next_frame()

        def both():
            return self.here(attribute), float(self.notebook.kernel(f"print({self.name}._line.{trait})"))

        self.notebook.until(lambda: len(set(both())) == 1, lambda: f"{trait} in the page and in the kernel: {both()}")
        return self.here(attribute)


def expect_kernel(notebook, expression, value):
    """Wait until an expression of Python prints as this in the kernel."""

    def found():
        return notebook.kernel(f"print({expression})")

    notebook.until(lambda: found() == value, lambda: f"{expression} is {found()}, not {value}")


def settings_tried(notebook):
    """How many settings the tuner has measured, once it has measured the last one."""
    expect_kernel(notebook, "tuner._stale or tuner._later._asked", "False")
    return notebook.kernel("print(len(tuner.state.trail))")


def eval_in_kernel(notebook):
    acc, asr, ra = eval(notebook.kernel("e = evaluate(clipped, splits.test, attack); print((e.acc, e.asr, e.ra))"))
    return SimpleNamespace(acc=acc, asr=asr, ra=ra)


def expect_pictures(notebook, name="tuner"):
    """Wait until the picture of the widget of that name is the kernel's, in the page and, hidden there, as saved."""
    code = f"import base64; print(base64.b64encode({name}._picture.png()).decode())"
    alive = """async () => {
        const picture = await fetch(document.querySelector(".bclip-lab-picture").src);
        const bytes = new Uint8Array(await picture.arrayBuffer());
        return btoa(bytes.reduce((text, byte) => text + String.fromCharCode(byte), ""));
    }"""
    pictures = {}

    def same():
        pictures.update(kernel=notebook.kernel(code), page=notebook.page.evaluate(alive))
        return pictures["kernel"] == pictures["page"]

    notebook.until(same, lambda: "the picture in the page is not the kernel's")
    assert not notebook.page.locator(".jp-RenderedImage img").is_visible()
    return pictures["kernel"][-2000:]
