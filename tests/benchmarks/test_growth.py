"""How the seconds of a default fit grow: with images, classes sampled, width, resolution. Sizes are parameters."""

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from benchmarks.measure import SMALL, growth

import bclip_lab as bl

BASE = {"images": 200, "classes": 4 if SMALL else 10, "width": 8, "side": 16}
ALL_CLASSES = 32 if SMALL else 1000  # of the network, where the classes sampled vary
EPOCHS = 5
# The smallest gives the fixed cost; the exponent is fitted over those within an eightfold of the largest.
CURVES = {
    "images": ((100, 400, 800, 1600) if SMALL else (100, 800, 1600, 3200, 6400), "clean images"),
    "sampled": ((4, 8, 16, 32) if SMALL else (25, 125, 250, 500, 1000), f"classes sampled of {ALL_CLASSES:,}"),
    "width": ((4, 8, 16, 32) if SMALL else (4, 8, 16, 32, 64), "width of the network"),
    "side": ((8, 16, 32) if SMALL else (8, 16, 32, 64), "side of the images in pixels"),
}


def subject(*, images: int, classes: int, width: int, side: int) -> tuple[bl.ClippedModel, bl.LabelledImages]:
    """An untrained network and noise that it decides evenly, hence correctly."""
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
    model = bl.models.resnet10(classes, seed=0, width=width)
    with torch.no_grad():
        model.fc.bias -= bl.logits(model, pictures).mean(0).to(model.fc.bias.device)
    labels = bl.logits(model, pictures).argmax(1)
    return bl.ClippedModel(model), bl.LabelledImages(pictures, labels, tuple(map(str, range(classes))))


@pytest.mark.parametrize("what", CURVES)
def test_growth(measure: Callable[..., Any], draw_curve: Callable[..., None], what: str) -> None:
    sizes, label = CURVES[what]

    def curve() -> list[float]:
        seconds = []
        for size in sizes:
            if what == "sampled":
                config = bl.MMACConfig(epochs=EPOCHS, classes=size)
                clipped, clean = subject(**(BASE | {"classes": ALL_CLASSES}))
            else:
                config = bl.MMACConfig(epochs=EPOCHS)
                clipped, clean = subject(**(BASE | {what: size}))
            rounds = []
            for _ in range(1 if SMALL else 3):
                start = time.perf_counter()
                bl.run(bl.mmac(clipped, clean, config))
                rounds.append(time.perf_counter() - start)
            seconds.append(min(rounds))
        return seconds

    def notes(results: list[list[float]]) -> dict[str, Any]:
        exponent, factor = growth(sizes, results[-1])
        draw_curve(label=label, sizes=sizes, seconds=results[-1], exponent=exponent, factor=factor)
        return {"exponent": round(exponent, 3), "sizes": sizes, "seconds": [round(s, 2) for s in results[-1]]}

    wanted = f"growth of a fit, {EPOCHS} epochs (wanted: 1.1 for images, classes)"
    measure(wanted, f"{label}, {sizes[0]} to {sizes[-1]}", curve, notes=notes)
