"""The zoo: shipped checkpoints on the rendered signs, each with a card, and the recipes that train them."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bclip_lab.attacks import (
    AllToAll,
    AllToOne,
    BackdoorAttack,
    BlendedTrigger,
    OneToOne,
    PatchTrigger,
    SinusoidTrigger,
)
from bclip_lab.data.files import cache_dir, data_dir, load_tensors, save_tensors
from bclip_lab.data.images import Splits
from bclip_lab.data.signs import SIGN_CLASSES, signs
from bclip_lab.evaluation import evaluate
from bclip_lab.models import resnet10
from bclip_lab.training import TrainConfig, TrainStep, train

__all__ = ["RECIPES", "Checkpoint", "Recipe", "build", "list", "load"]

_LEFT, _RIGHT = SIGN_CLASSES.index("turn left"), SIGN_CLASSES.index("turn right")
TRAINING_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is made: attack, training seeds and settings. The first seed is the one that is shipped."""

    attack: BackdoorAttack | None
    seeds: tuple[int, ...] = TRAINING_SEEDS
    config: TrainConfig = field(default_factory=TrainConfig)

    def describe(self) -> dict[str, Any]:
        """The recipe as JSON holds it."""
        described = {
            "data": "signs",
            "model": "resnet10",
            "width": 16,
            "train": dataclasses.asdict(self.config),
        }
        return described | {"attack": describe(self.attack)}


def describe(value: Any) -> Any:
    """A nested frozen dataclass as JSON holds it, each with its kind; a tensor by its shape and checksum.

    Fields that are None are left out: one that is added later does not make the cards of before invalid.
    """
    if dataclasses.is_dataclass(value):
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"kind": type(value).__name__} | {k: describe(v) for k, v in fields.items() if v is not None}
    if isinstance(value, torch.Tensor):
        content = value.detach().cpu().contiguous().numpy().tobytes()
        return {"shape": builtins.list(value.shape), "sha256": hashlib.sha256(content).hexdigest()}
    return [describe(item) for item in value] if isinstance(value, tuple) else value


RECIPES: dict[str, Recipe] = {
    "clean-0": Recipe(None, seeds=(0,)),
    "clean-1": Recipe(None, seeds=(1,)),
    "clean-2": Recipe(None, seeds=(2,)),
    "patch": Recipe(BackdoorAttack(PatchTrigger(), AllToOne(target=0), poison_rate=0.1)),
    "patch-3-percent": Recipe(BackdoorAttack(PatchTrigger(), AllToOne(target=0), poison_rate=0.03)),
    "blended": Recipe(BackdoorAttack(BlendedTrigger(), AllToOne(target=0), poison_rate=0.1)),
    "sinusoid": Recipe(BackdoorAttack(SinusoidTrigger(), AllToOne(target=0), poison_rate=0.1)),
    # half of the source class: poisoning all of it would leave no clean image of that class
    "one-to-one": Recipe(BackdoorAttack(PatchTrigger(), OneToOne(source=_LEFT, target=_RIGHT), poison_rate=0.05)),
    # every class is a target, so each needs as many poisoned images as the other attacks give to one
    "all-to-all": Recipe(BackdoorAttack(PatchTrigger(), AllToAll(classes=10), poison_rate=0.3)),
}


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained model with the attack it was trained under.

    `model` is in evaluation mode; `attack` is None for a clean model; `card` holds data, attack, seeds,
    versions, and the metrics measured when it was made.
    """

    name: str
    model: nn.Module
    attack: BackdoorAttack | None
    card: dict[str, Any]

    def splits(self) -> Splits:
        """The images the model was trained on and is judged by."""
        return signs()


def list() -> tuple[str, ...]:
    """The names of the checkpoints.

    Examples
    --------
    >>> list()[:4]
    ('clean-0', 'clean-1', 'clean-2', 'patch')
    """
    return tuple(RECIPES)


def _path(name: str, seed: int) -> Path:
    """The shipped checkpoint, or, for the further training seeds, one kept in the cache."""
    recipe = RECIPES.get(name)
    if recipe is None:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}")
    if seed not in recipe.seeds:
        raise ValueError(f"seed of {name!r} must be one of {recipe.seeds}, got {seed}")
    if seed == recipe.seeds[0]:
        return data_dir() / "zoo" / f"{name}.safetensors"
    return cache_dir() / "zoo" / f"{name}-seed-{seed}.safetensors"


def load(name: str, *, seed: int | None = None, device: str | torch.device = "auto") -> Checkpoint:
    """Load a checkpoint of the zoo.

    Parameters
    ----------
    name
        One of `zoo.list()`.
    seed
        Training seed: the shipped one by default. The further ones are made by `make zoo` and not shipped.
    device
        As in `models.resnet`.

    Raises
    ------
    FileNotFoundError
        The checkpoint is not there.
    ValueError
        An unknown name or seed, a file that does not match the checksum on its card, or a card that does not
        match the recipe of this name.

    Examples
    --------
    >>> checkpoint = load("patch")
    >>> checkpoint.card["metrics"]["asr"] > 0.95
    True
    """
    recipe = RECIPES.get(name)
    path = _path(name, recipe.seeds[0] if recipe and seed is None else seed or 0)
    tensors, card = load_tensors(path)
    if recipe is None or card.get("recipe") != recipe.describe():
        raise ValueError(
            f"the card {path.with_suffix('.json')} tells of another recipe than the lab's for {name!r}: it belongs "
            "to another version. Restore the file of this version, or make it again with `make zoo`."
        )
    model = resnet10(len(SIGN_CLASSES), seed=0, device=device)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of this model: {error}") from error
    return Checkpoint(name, model.eval(), recipe.attack, card)


def _round_to_half(model: nn.Module) -> None:
    """Round floating-point weights to what float16 holds, so that the metrics are those of the stored model."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half().float())


def build(name: str) -> Iterator[TrainStep]:
    """Train one checkpoint over its training seeds and write them with their cards.

    The card of each tells its own metrics and, in the shipped one, mean and spread (standard deviation over the
    seeds) of all.

    Yields
    ------
    TrainStep
        Of every epoch of every seed; nothing is written for a seed that is broken off.
    """
    if name not in RECIPES:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    splits = signs()
    data = splits.train if recipe.attack is None else recipe.attack.poison(splits.train)
    metrics: dict[int, dict[str, float]] = {}
    total = recipe.config.epochs * len(recipe.seeds)
    # the shipped seed last: its card tells of the others
    for index, seed in enumerate(reversed(recipe.seeds)):
        model = resnet10(len(SIGN_CLASSES), seed=seed)
        for step in train(model, data, replace(recipe.config, seed=seed)):
            yield replace(step, epoch=index * recipe.config.epochs + step.epoch, epochs=total)
        _round_to_half(model)
        result = evaluate(model, splits.test, recipe.attack)
        metrics[seed] = (
            {"acc": result.acc} if recipe.attack is None else {"acc": result.acc, "asr": result.asr, "ra": result.ra}
        )
        card = {
            "name": name,
            "recipe": recipe.describe(),
            "training_seed": seed,
            "metrics": metrics[seed],
            "counts": {"clean": result.clean, "triggered": result.triggered},
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
        }
        if seed == recipe.seeds[0]:
            card["training_seeds"] = {
                metric: {
                    "seeds": builtins.list(recipe.seeds),
                    "mean": float(np.mean([metrics[s][metric] for s in recipe.seeds])),
                    "standard_deviation": float(np.std([metrics[s][metric] for s in recipe.seeds], ddof=1))
                    if len(recipe.seeds) > 1
                    else 0.0,
                }
                for metric in metrics[seed]
            }
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        save_tensors(_path(name, seed), state, card)
