"""Doubles for a grid that is filled in within seconds; a module of its own, since other processes import it, too."""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn

from bclip_lab.attacks import AllToOne, BackdoorAttack, PatchTrigger
from bclip_lab.benchmark import Defence
from bclip_lab.benchmark.cells import Subject
from bclip_lab.data.images import LabelledImages, Splits


@dataclass(frozen=True)
class Tiny:
    """A linear network on 80 images of noise, four classes; `weights` stands for the checksum of a checkpoint."""

    name: str = "tiny"
    weights: str = "first"

    def describe(self):
        return {"data": "noise", "checkpoint": {"name": self.name, "training_seed": 0, "weights": self.weights}}

    def file(self, method, seed):
        return method, f"{self.name}-fit-{seed}"

    def load(self):
        generator = torch.Generator().manual_seed(0)
        parts = [
            LabelledImages(torch.rand(20, 3, 8, 8, generator=generator), torch.arange(20) % 4, tuple("abcd"))
            for _ in range(4)
        ]
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
        with torch.no_grad():
            model[1].weight.copy_(torch.randn(4, 192, generator=generator))
            model[1].bias.zero_()
        attack = BackdoorAttack(PatchTrigger(size=2), AllToOne(target=0), 0.1)
        return Subject(model.eval(), Splits(*parts), attack, None, {})


@dataclass(frozen=True)
class Idle:
    """Settings of `idle`: `log` is a file.

    The first fits go on once `together` of them have begun; those of the seeds in `held` once `release(log)` has been
    called.
    """

    log: str
    wait: float = 0.0
    together: int = 0
    held: tuple[int, ...] = ()
    fails: tuple[int, ...] = ()
    kills: tuple[int, ...] = ()
    seed: int = 0


def idle(model, clean, config):
    """A defence that does nothing but write its seed down, wait, and fail or kill its process for some seeds."""
    path = Path(config.log)
    with open(config.log, "a") as log:
        log.write(f"{config.seed}\n")
    while len(begun(path)) < config.together or (config.seed in config.held and not released(path).exists()):
        time.sleep(0.01)
    time.sleep(config.wait)
    if config.seed in config.fails:
        raise RuntimeError(f"seed {config.seed} fails")
    if config.seed in config.kills:
        os.kill(os.getpid(), 9)
    yield SimpleNamespace(epoch=1, epochs=1, process=os.getpid(), threads=torch.get_num_threads(), model=model)


def idling(log, **settings):
    """`idle` as an entry of `DEFENCES`."""
    return Defence(idle, Idle(str(log), **settings))


def released(log):
    return log.with_suffix(".go")


def release(log):
    """Let the fits go on that are held."""
    released(log).touch()


def begun(log):
    """The seeds whose fit was begun, in order."""
    return [int(line) for line in log.read_text().split()] if log.exists() else []
