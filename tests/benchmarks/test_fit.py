"""Seconds of a fit: the default, the published schedule on the lab's engine, and the plain reference.

On the full budget all three run whole, over three seeds on one checkpoint and once on two more, which takes hours on
two cores. On the small one the two long ones are timed in part and extrapolated, and defend nothing.
"""

import math
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from benchmarks.measure import SMALL, fresh
from benchmarks.plain import plain_mmac, synthetic_images
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import bclip_lab as bl
from bclip_lab.defenses.fitting import BoundFit
from bclip_lab.models import bfloat16_is_fast

Fit = Callable[[bl.zoo.Checkpoint, int], tuple[bl.ClippedModel, float | None]]
CHECKPOINTS = {"patch": 1} if SMALL else {"patch": 3, "blended": 1, "all-to-all": 1}  # and seeds
STEPS, EPOCHS = 4, 3  # of 300 each, on the small budget


def default(checkpoint: bl.zoo.Checkpoint, seed: int) -> tuple[bl.ClippedModel, None]:
    clipped = bl.ClippedModel(checkpoint.model)
    bl.run(bl.mmac(clipped, checkpoint.splits().defender, bl.MMACConfig(seed=seed)))
    return clipped, None


def published(checkpoint: bl.zoo.Checkpoint, seed: int) -> tuple[bl.ClippedModel, float | None]:
    clipped, clean, config = bl.ClippedModel(checkpoint.model), checkpoint.splits().defender, bl.MMACConfig.published()
    if not SMALL:
        bl.run(bl.mmac(clipped, clean, replace(config, seed=seed)))
        return clipped, None
    start = time.perf_counter()
    short = replace(config, epochs=1 + EPOCHS, synthetic=replace(config.synthetic, steps=STEPS))
    times = [time.perf_counter() - start for _ in bl.mmac(clipped, clean, short)]
    epoch = (times[-1] - times[0]) / EPOCHS
    return clipped, config.epochs * epoch + 3 * config.synthetic.steps / STEPS * (times[0] - epoch)


def plain(checkpoint: bl.zoo.Checkpoint, seed: int) -> tuple[bl.ClippedModel, float | None]:
    clipped, clean, model = bl.ClippedModel(checkpoint.model), checkpoint.splits().defender, checkpoint.model
    if not SMALL:
        bounds = plain_mmac(model, clean, seed=seed)
        clipped.set_bounds(dict(zip(clipped.sites, bounds, strict=True)))
        return clipped, None
    plain_mmac(model, clean, epochs=1, steps=1)  # a first optimiser of torch.optim loads the compiler, once
    times = [time.perf_counter()]
    for epochs in (1, 1 + EPOCHS):
        plain_mmac(model, clean, epochs=epochs, steps=1)
        times.append(time.perf_counter())
    synthetic_images(model, torch.rand(10, 50, 3, 32, 32), steps=STEPS)
    times.append(time.perf_counter())
    one, more, sought = (after - before for before, after in pairwise(times))
    return clipped, 300 * (more - one) / EPOCHS + 3 * 300 / STEPS * sought


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("fit", [default, published, plain], ids=lambda fit: fit.__name__)
def test_fit(measure: Callable[..., Any], name: str, fit: Fit) -> None:
    checkpoint, seeds = bl.zoo.load(name), iter(range(CHECKPOINTS[name]))
    checkpoint.splits()

    def quality(results: list[tuple[bl.ClippedModel, float | None]]) -> dict[str, Any]:
        if results[0][1] is not None:
            return {"extrapolated from": f"{EPOCHS} of 300 epochs, {STEPS} of 900 steps"}
        found = [bl.evaluate(clipped, checkpoint.splits().test, checkpoint.attack) for clipped, _ in results]
        return {k.upper(): round(sum(getattr(e, k) for e in found) / len(found), 4) for k in ("acc", "asr", "ra")}

    short = SMALL and fit is not default
    measure(
        f"fit of {name!r} (wanted: published 12, plain 50)", fit.__name__, lambda: fit(checkpoint, next(seeds)),
        rounds=CHECKPOINTS[name], seconds=(lambda result: result[1]) if short else None, notes=quality,
    )  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts floating-point operations; FlopCounterMode fails where torch.autograd.grad is called."""

    total = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def test_share_of_the_peak(measure: Callable[..., Any]) -> None:
    """The fit's floating-point operations a second against those of one large matrix product in the fastest dtype."""
    checkpoint = bl.zoo.load("patch")
    clean, config = checkpoint.splits().defender, bl.MMACConfig(epochs=2) if SMALL else bl.MMACConfig()
    dtype = torch.bfloat16 if bfloat16_is_fast(torch.device("cpu")) else torch.float32
    matrix = torch.rand(2048, 2048).to(dtype)

    def peak() -> float:
        start = time.perf_counter()
        for _ in range(3):
            matrix @ matrix
        return 3 * 2 * 2048**3 / (time.perf_counter() - start)

    def fit() -> bl.MMACStep:
        return bl.run(bl.mmac(bl.ClippedModel(checkpoint.model), clean, config))

    with Operations() as counter:
        fit()
    fastest = max(peak() for _ in range(3))

    def share(results: list[float]) -> dict[str, Any]:
        rate = counter.total / min(results)
        return {
            "10^9 operations": round(counter.total / 1e9),
            "a second": round(rate / 1e9, 1),
            f"peak ({dtype})": round(fastest / 1e9, 1),
            "share": f"{rate / fastest:.1%}",
        }

    def timed() -> float:
        start = time.perf_counter()
        fit()
        return time.perf_counter() - start

    measure("share of the cores' peak", f"default, {config.epochs} epochs", timed, notes=share)


@pytest.mark.parametrize("engine", ["eager", "torch.compile"])
def test_torch_compile(measure: Callable[..., Any], engine: str) -> None:
    """Steps of the fit's network, forward and backward, for a whole default fit; the compiler's own time is in it."""
    checkpoint, config = bl.zoo.load("patch"), bl.MMACConfig()
    if engine == "torch.compile" and not shutil.which("g++"):
        pytest.skip("torch.compile needs a C++ compiler")
    clipped = bl.ClippedModel(checkpoint.model)
    fit = BoundFit(clipped, checkpoint.splits().defender, start=1.0, learning_rate=0.1)
    if engine == "torch.compile":
        fit.network = torch.compile(fit.network)
    steps = config.epochs * math.ceil(len(fit.images) / config.batch_size)
    images = fit.images[torch.arange(config.batch_size) % len(fit.images)]

    def step() -> float:
        start = time.perf_counter()
        fit.step(fit.logits(images).square().mean())
        return time.perf_counter() - start

    def both() -> list[float]:
        return [step() for _ in range(1 + (10 if SMALL else steps))]

    def notes(results: list[list[float]]) -> dict[str, Any]:
        first, *others = results[-1]
        return {"first step": f"{first:.1f} s", "a step": f"{1e3 * sorted(others)[len(others) // 2]:.0f} ms"}

    measure(
        f"{steps} steps of a fit, its first included", engine, both,
        seconds=lambda times: times[0] + steps * sorted(times[1:])[len(times) // 2], notes=notes,
    )  # fmt: skip


def test_memory(measure: Callable[..., Any]) -> None:
    """Peak resident memory of a fit, less what the process held with its images loaded."""
    if not sys.platform.startswith("linux"):  # ru_maxrss, which other systems have, keeps the peak of the parent
        pytest.skip("reads /proc/self/status")
    classes, side = (20, 16) if SMALL else (1000, 64)
    code = f"""
import re, sys, time
sys.path.insert(0, "tests")
from benchmarks.test_growth import subject
import bclip_lab as bl
def gigabytes(key):
    return int(re.search(key + r":\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1e6
clipped, clean = subject(images=2 * {classes}, classes={classes}, width=16, side={side})
before, start = gigabytes("VmRSS"), time.perf_counter()
bl.run(bl.mmac(clipped, clean, bl.MMACConfig(epochs=2)))
print(time.perf_counter() - start, gigabytes("VmHWM") - before)
"""
    measure(
        "peak memory of a fit (wanted: 1 GB for 1,000 classes)", f"{classes} classes of {side}x{side}, 2 epochs",
        lambda: fresh(code), seconds=lambda result: result[0], notes=lambda results: {"GB": round(results[-1][1], 3)},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["default", "published"])
def test_maximum_margin_images(measure: Callable[..., Any], name: str) -> None:
    model = bl.zoo.load("patch").model
    config = bl.MaximumMarginConfig() if name == "default" else bl.MaximumMarginConfig.published()
    part = STEPS if SMALL and name == "published" else config.steps

    def sought() -> float:
        start = time.perf_counter()
        bl.maximum_margin_images(model, (3, 32, 32), 10, replace(config, steps=part))
        return config.steps / part * (time.perf_counter() - start)

    notes = {} if part == config.steps else {"extrapolated from": f"{part} of {config.steps} steps"}
    measure("maximum-margin images", name, sought, rounds=1 if SMALL else 3, seconds=float, notes=lambda _: notes)
