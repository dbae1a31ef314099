"""Seconds of what a reader waits for: imports, the zoo, the signs, activations, detection, training, notebooks."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import test_notebooks
from benchmarks.measure import SMALL, fresh
from traitlets.config import Config

import bclip_lab as bl

ROUNDS = 1 if SMALL else 5
CLOCK = "import time; start = time.perf_counter(); {}; middle = time.perf_counter(); {}; end = time.perf_counter(); "
SHOW = "print(middle - start, end - middle)"
FIRST = {  # name: what comes before, what is timed
    "import bclip_lab, torch being there (wanted: 0.3)": ("import torch", "import bclip_lab"),
    "zoo.load (wanted: 0.2)": ("import bclip_lab as bl", "bl.zoo.load('patch')"),
    "signs() from its cache (wanted: 0.3)": ("import bclip_lab as bl; bl.data.signs()", "bl.data.signs()"),
    "signs() for the first time (wanted: 5)": ("import bclip_lab as bl", "bl.data.signs(cache=False)"),
}


def test_import_of_torch(measure: Callable[..., Any]) -> None:
    code = CLOCK.format("import torch", "pass") + SHOW
    measure("in a fresh process", "import torch", lambda: fresh(code)[0], rounds=ROUNDS, seconds=float)


@pytest.mark.parametrize("name", FIRST)
def test_first_use(measure: Callable[..., Any], name: str) -> None:
    code = CLOCK.format(*FIRST[name]) + SHOW
    measure("in a fresh process", name, lambda: fresh(code)[1], rounds=ROUNDS, seconds=float)


@pytest.mark.parametrize("count", [2000] if SMALL else [2000, 8000])
@pytest.mark.parametrize("name", ["logits of the original", "activations", "MMDF.score"])
def test_inference(measure: Callable[..., Any], name: str, count: int) -> None:
    checkpoint = bl.zoo.load("patch")
    splits = checkpoint.splits()
    images, clipped = splits.train.images[:count], bl.ClippedModel(checkpoint.model)
    clipped.set_bounds(dict.fromkeys(clipped.sites, 3.0))
    detector = bl.MMDF(clipped).fit(splits.calibration)
    run = {
        "logits of the original": lambda: bl.logits(checkpoint.model, images),
        "activations": lambda: clipped.activations(images),
        "MMDF.score": lambda: detector.score(images),
    }[name]
    measure(f"{count} images, one pass", name, run, rounds=ROUNDS, warm=True)


@pytest.mark.parametrize("mixed", [True, False], ids=["mixed precision", "float32"])
def test_training(measure: Callable[..., Any], mixed: bool, request: pytest.FixtureRequest) -> None:
    count = 1280 if SMALL else 8000
    splits = bl.data.signs()
    attack = bl.BackdoorAttack(bl.PatchTrigger(), bl.AllToOne(target=0), poison_rate=0.1)
    data, model = attack.poison(splits.train[:count]), bl.models.resnet10(10, seed=0)
    config = bl.TrainConfig(epochs=1, mixed_precision=mixed)
    measure(
        "training", f"an epoch of {count} images, {request.node.callspec.id}",
        lambda: bl.run(bl.train(model, data, config)), rounds=ROUNDS,
    )  # fmt: skip


@pytest.mark.parametrize("path", test_notebooks.PATHS)
def test_notebook(measure: Callable[..., Any], path: str, tmp_path: Path, kernels: Config) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        test_notebooks.execute(path, tmp_path, kernels)
        return time.perf_counter() - start

    measure("notebooks (wanted: 60 each, 300 together)", path, seconds, seconds=float)
