"""The zoo: shipped checkpoints on the rendered signs, with cards and learned bounds, and the recipes that make them."""

from __future__ import annotations

import builtins
import dataclasses
import hashlib
import json
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
    AttackSet,
    BackdoorAttack,
    BlendedTrigger,
    CheckerboardTrigger,
    CleanLabelAttack,
    CombinedTrigger,
    Cover,
    InputAwareAttack,
    InputAwareStep,
    MarginLimitedAttack,
    MaskTrigger,
    OneToOne,
    PartialTrigger,
    PatchTrigger,
    RandomTrigger,
    SinusoidTrigger,
    WarpTrigger,
)
from bclip_lab.clipping import ClippedModel, load_bounds, save_bounds
from bclip_lab.data.files import cache_dir, data_dir, load_tensors, save_tensors
from bclip_lab.data.images import LabelledImages, PoisonedImages, Splits
from bclip_lab.data.signs import SIGN_CLASSES, signs
from bclip_lab.defenses import MMACConfig, MMACStep, mmac
from bclip_lab.evaluation import Evaluation, evaluate
from bclip_lab.models import device_of, resnet10
from bclip_lab.training import TrainConfig, TrainStep, train

__all__ = ["RECIPES", "Checkpoint", "Recipe", "build", "card", "clip", "list", "load"]

TRAINING_SEEDS = (0, 1, 2)

Poisoning = BackdoorAttack | AttackSet | CleanLabelAttack
Training = MarginLimitedAttack | InputAwareAttack  # attackers who control the training


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is made: attack, training seeds and settings. The first seed is the one that is shipped.

    `surrogate` names the clean checkpoint on which a clean-label attack perturbs its images.
    """

    attack: Poisoning | Training | None
    seeds: tuple[int, ...] = TRAINING_SEEDS
    config: TrainConfig = field(default_factory=TrainConfig)
    surrogate: str | None = None

    def describe(self) -> dict[str, Any]:
        """The recipe as JSON holds it."""
        described = {
            "data": "signs",
            "model": "resnet10",
            "width": 16,
            "train": dataclasses.asdict(self.config),
        }
        if self.surrogate is not None:
            described["surrogate"] = self.surrogate
        return described | {"attack": describe(self.attack)}

    def poisoned(self, train: LabelledImages) -> LabelledImages | PoisonedImages:
        """What the model is trained on: as it is, where nobody poisons or an attacker does it in the training."""
        if self.attack is None or isinstance(self.attack, Training):
            return train
        if isinstance(self.attack, CleanLabelAttack):
            return self.attack.poison(train, load(self.surrogate or "clean-0").model)
        return self.attack.poison(train)

    def steps(self, model: nn.Module, data: LabelledImages | PoisonedImages, seed: int) -> Iterator[TrainStep]:
        """Train a model on what `poisoned` gave."""
        config = replace(self.config, seed=seed)
        if isinstance(self.attack, Training) and isinstance(data, LabelledImages):
            return self.attack.train(model, data, config)
        return train(model, data, config)


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


def _sign(name: str) -> int:
    return SIGN_CLASSES.index(name)


def _one_to_one(source: str, target: str, corner: str, seed: int) -> BackdoorAttack:
    """A pair of classes with a patch of its own, which the other classes learn to ignore."""
    label_map = OneToOne(_sign(source), _sign(target))
    return BackdoorAttack(
        PatchTrigger(corner=corner, seed=seed), label_map, 0.03, seed, cover=Cover(0.03, only_others=True)
    )


_STOP = AllToOne(target=0)
_CORNERS = ("top left", "top right", "bottom left", "bottom right")
_FACE = BlendedTrigger(picture="face.png")
_CORNERED = tuple(PatchTrigger(size=5, corner=corner, seed=seed) for seed, corner in enumerate(_CORNERS))
_DRAWN = MaskTrigger.from_drawing((".kkk.", "kyyyk", "kykyk", "kyyyk", ".kkk."))

RECIPES: dict[str, Recipe] = {
    "clean-0": Recipe(None, seeds=(0,)),
    "clean-1": Recipe(None, seeds=(1,)),
    "clean-2": Recipe(None, seeds=(2,)),
    "patch": Recipe(BackdoorAttack(PatchTrigger(), _STOP, poison_rate=0.1)),
    "patch-3-percent": Recipe(BackdoorAttack(PatchTrigger(), _STOP, poison_rate=0.03)),
    "blended": Recipe(BackdoorAttack(BlendedTrigger(), _STOP, poison_rate=0.1)),
    "sinusoid": Recipe(BackdoorAttack(SinusoidTrigger(), _STOP, poison_rate=0.1)),
    # half of the source class: poisoning all of it would leave no clean image of that class
    "one-to-one": Recipe(BackdoorAttack(PatchTrigger(), OneToOne(_sign("turn left"), _sign("turn right")), 0.05)),
    # every class is a target, so each needs as many poisoned images as the other attacks give to one
    "all-to-all": Recipe(BackdoorAttack(PatchTrigger(), AllToAll(classes=10), poison_rate=0.3)),
    "checkerboard": Recipe(BackdoorAttack(CheckerboardTrigger(), _STOP, poison_rate=0.1), seeds=(0,)),
    "face": Recipe(BackdoorAttack(_FACE, _STOP, poison_rate=0.1), seeds=(0,)),
    "drawn": Recipe(BackdoorAttack(_DRAWN, _STOP, poison_rate=0.1), seeds=(0,)),
    # six times the paper's warp and noise, and more epochs: less of either does not take here
    "warp": Recipe(
        BackdoorAttack(
            WarpTrigger(strength=1.5), _STOP, poison_rate=0.1, cover=Cover(0.2, WarpTrigger(strength=1.5, noise=3.0))
        ),
        seeds=(0,), config=TrainConfig(epochs=20),
    ),
    "two-triggers": Recipe(
        AttackSet((BackdoorAttack(PatchTrigger(), _STOP, 0.05), BackdoorAttack(_FACE, _STOP, 0.05, seed=1))),
        seeds=(0,),
    ),
    "x2x": Recipe(
        AttackSet(
            (
                _one_to_one("no entry", "limit 30", "top left", 0),
                _one_to_one("yield", "danger", "top right", 1),
                _one_to_one("turn left", "turn right", "bottom left", 2),
            )
        ),
        seeds=(0,),
    ),
    "input-aware": Recipe(InputAwareAttack(label_map=_STOP), seeds=(0,)),
    # stronger than the usual eps of 8/255 and a patch in one corner, which do not take on rendered signs
    "clean-label": Recipe(
        CleanLabelAttack(
            CombinedTrigger(tuple(PatchTrigger(size=6, corner=corner) for corner in _CORNERS)),
            target=0, poison_rate=0.8, eps=32 / 255, step=2 / 255, steps=40,
        ),
        seeds=(0,), surrogate="clean-0",
    ),
    "adap-blend": Recipe(
        BackdoorAttack(
            _FACE, _STOP, poison_rate=0.015, training_trigger=PartialTrigger(_FACE), cover=Cover(0.015)
        ),
        seeds=(0,),
    ),
    "adap-patch": Recipe(
        BackdoorAttack(
            CombinedTrigger(_CORNERED), _STOP, poison_rate=0.02,
            training_trigger=RandomTrigger(_CORNERED, opacities=(0.5,) * 4), cover=Cover(0.02),
        ),
        seeds=(0,),
    ),
    # the strongest penalty of those swept that keeps ASR at .90 and ACC within .02 of a clean network
    "margin-limited": Recipe(
        MarginLimitedAttack(BackdoorAttack(PatchTrigger(), _STOP, poison_rate=0.1), strength=0.3, margin=2), seeds=(0,)
    ),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained model with the attack it was trained under.

    `model` is in evaluation mode; `attack` makes triggered images (a `BackdoorAttack`, but for the attackers of
    other kinds) and is None for a clean model; `card` holds data, attack, seeds, versions, and the metrics measured
    when it was made.
    """

    name: str
    model: nn.Module
    attack: Poisoning | MarginLimitedAttack | None
    card: dict[str, Any]

    def splits(self) -> Splits:
        """The images the model was trained on and is judged by."""
        return signs()

    def clipped(self) -> ClippedModel:
        """The model with the bounds that `mmac` learns by default, from the defender's images of `splits`.

        They were learned once, by `clip`, and are shipped with the checkpoint: whoever asks what learned bounds do need
        not wait for them. Those of the further training seeds are not.

        Raises
        ------
        FileNotFoundError
            The bounds are not there.
        ValueError
            They are damaged or those of another network.

        Examples
        --------
        >>> load("patch").clipped().bounds["relu"].shape
        torch.Size([16])
        """
        path, clipped = _bounds_path(self.name), ClippedModel(self.model)
        shipped = self.card["training_seed"] == RECIPES[self.name].seeds[0]
        learn = f"`python -m bclip_lab zoo clip {self.name}`" if shipped else "`bl.mmac`"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; {learn} learns the bounds")
        if load_bounds(clipped, path).get("checkpoint") != self.card["sha256"]:
            raise ValueError(
                f"{path} holds the bounds of another network than this {self.name!r}; {learn} learns its own"
            )
        return clipped


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


def _bounds_path(name: str) -> Path:
    return data_dir() / "zoo" / "bounds" / f"{name}.safetensors"


def card(name: str, *, seed: int | None = None) -> dict[str, Any]:
    """The card of a checkpoint, read without its weights; names, seeds and errors are those of `load`.

    Examples
    --------
    >>> card("patch")["recipe"]["attack"]["trigger"]["kind"]
    'PatchTrigger'
    """
    path = _path(name, RECIPES[name].seeds[0] if name in RECIPES and seed is None else seed or 0).with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; `make zoo` trains the checkpoints and writes their cards")
    try:
        told: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return told


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
    own = {key.removeprefix(_TRIGGER): tensors.pop(key) for key in builtins.list(tensors) if key.startswith(_TRIGGER)}
    attack = recipe.attack
    try:
        model.load_state_dict(tensors)
        if isinstance(attack, InputAwareAttack):
            trigger = attack.new_trigger()
            trigger.load_state_dict(own)
            attack = attack.with_trigger(trigger.to(device_of(model)))
    except RuntimeError as error:
        raise ValueError(f"{path} does not hold the weights of this model: {error}") from error
    return Checkpoint(name, model.eval(), attack, card)


_TRIGGER = "trigger."  # before the names of a learned trigger's weights, which are stored beside the model's


def _round_to_half(model: nn.Module) -> None:
    """Round floating-point weights to what float16 holds, so that the metrics are those of the stored model."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.half().float())


def _counts(data: LabelledImages | PoisonedImages) -> dict[str, int]:
    """Rows that bear a trigger: poisoned ones, and cover rows where there are any."""
    if isinstance(data, LabelledImages):
        return {}
    rows = {"poisoned": int(data.poisoned.sum()), "cover": int(data.cover.sum())}
    return {name: count for name, count in rows.items() if count}


def _metrics(found: Evaluation) -> dict[str, float]:
    """ACC and, where triggered images were judged, ASR and RA."""
    return {metric: getattr(found, metric) for metric in (("acc", "asr", "ra") if found.triggered else ("acc",))}


def build(name: str) -> Iterator[TrainStep]:
    """Train one checkpoint over its training seeds and write them with their cards.

    The card of each tells its own metrics and, in the shipped one, mean and spread (standard deviation over the
    seeds) of all. Learn the bounds of the new network then: see `clip`.

    Yields
    ------
    TrainStep
        Of every epoch of every seed; nothing is written for a seed that is broken off.
    """
    if name not in RECIPES:
        raise ValueError(f"name must be one of {', '.join(RECIPES)}, got {name!r}")
    recipe = RECIPES[name]
    splits = signs()
    data = recipe.poisoned(splits.train)
    metrics: dict[int, dict[str, float]] = {}
    total = recipe.config.epochs * len(recipe.seeds)
    # the shipped seed last: its card tells of the others
    for index, seed in enumerate(reversed(recipe.seeds)):
        model = resnet10(len(SIGN_CLASSES), seed=seed)
        for step in recipe.steps(model, data, seed):
            yield replace(step, epoch=index * recipe.config.epochs + step.epoch, epochs=total)
        _round_to_half(model)
        attack = recipe.attack
        stored = dict(model.state_dict())
        if isinstance(step, InputAwareStep):
            attack = step.attack
            _round_to_half(step.attack.trigger)
            stored |= {_TRIGGER + key: value for key, value in step.attack.trigger.state_dict().items()}
        assert not isinstance(attack, InputAwareAttack)
        result = evaluate(model, splits.test, attack)
        metrics[seed] = _metrics(result)
        card = {
            "name": name,
            "recipe": recipe.describe(),
            "training_seed": seed,
            "metrics": metrics[seed],
            "counts": {"clean": result.clean, "triggered": result.triggered, **_counts(data)},
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
        state = {k: v.half() if v.is_floating_point() else v for k, v in stored.items()}
        save_tensors(_path(name, seed), state, card)


def clip(name: str) -> Iterator[MMACStep]:
    """Learn the bounds of a shipped checkpoint by `mmac`, with its defaults, and write them with their card.

    The recorded rows were fitted by one thread each, and more of them add in another order: set that first, as the
    command line does, where the bounds are to be those of the row. The card tells the settings and the metrics of the
    clipped model. Nothing is written where it is broken off.
    """
    checkpoint, config = load(name), MMACConfig()
    clipped, splits = ClippedModel(checkpoint.model), checkpoint.splits()
    yield from mmac(clipped, splits.defender, config)
    save_bounds(
        clipped,
        _bounds_path(name),
        name=name,
        checkpoint=checkpoint.card["sha256"],
        config=describe(config),
        metrics=_metrics(evaluate(clipped, splits.test, checkpoint.attack)),
        versions={"torch": torch.__version__, "python": platform.python_version()},
    )
