"""A cell of the grid: one defence or detector on one network with one seed, measured and written down.

A cell is a function of its recipe alone: data, checkpoint, method with all of its settings, seed, and what is measured.
It is stored as one JSON file with the recipe inside and, as `key`, the recipe's hash. A file whose key is another
one's, because a default has changed since, is stale: tables leave it out and the next run measures it again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bclip_lab import zoo
from bclip_lab.attacks import AttackSet, BackdoorAttack, MarginLimitedAttack
from bclip_lab.benchmark.memory import Peak
from bclip_lab.benchmark.methods import DEFENCES, DETECTORS, IMAGE_ATTACKS, Defence, Detector, named
from bclip_lab.clipping import ClippedModel, abnormality
from bclip_lab.data import image_folder
from bclip_lab.data.files import cache_dir, data_dir, load_tensors, save_tensors, write_bytes
from bclip_lab.data.images import Attack, LabelledImages, Splits
from bclip_lab.defenses import MMACConfig, MMACStep, MMBMConfig, mmbm
from bclip_lab.detection import MMDF
from bclip_lab.evaluation import RocCurve, evaluate, site_asr
from bclip_lab.margins import classification_margins
from bclip_lab.models import logits, resnet10
from bclip_lab.training import TrainConfig, TrainStep, run

__all__ = [
    "FPRS",
    "Cell",
    "Row",
    "Shipped",
    "Trained",
    "current",
    "failed",
    "fill",
    "found",
    "judge_images",
    "judge_model",
    "key_of",
    "measure",
    "read",
    "recipe_of",
    "recorded",
    "results_dir",
    "write",
]

Row = dict[str, Any]

FPRS = (0.01, 0.05)
"""The false-positive rates at which a detector's thresholds are set."""

_TPR = "tpr_at_fpr_0.01"
# What the rows of each kind hold. A new measure is a new recipe: rows without it are measured again.
_MEASURED = {
    "defence": ["evaluation", "mmdf"],
    "explained": ["evaluation", "mmdf", "sites", "margins", "stand-ins"],
    "images": ["auroc", "auroc_successful", "rates"],
    "models": ["verdict"],
}


# --- measuring ----------------------------------------------------------------------------------------------


def measure(
    model: nn.Module,
    splits: Splits,
    attack: Attack | None,
    defence: str | Defence = "mmac",
    seed: int = 0,
    clean_model: nn.Module | None = None,
    *,
    explained: bool = False,
) -> Iterator[Row]:
    """Fit a defence on the defender's images and judge it on the test images.

    Yields an empty record after every epoch of the fit, so that a caller can show progress, and at last the row:
    ACC, ASR, RA before and after; RA's ceiling (the accuracy of `clean_model` on the same triggered images); for every
    attack of an `AttackSet` ACC, ASR and RA before and after; the seconds of the fit, its peak memory (`memory.Peak`)
    and its history. Of a defence that clips, MMDF too, calibrated on `splits.calibration`: its AUROC, its TPR and FPR
    at the Gaussian threshold, and its accuracy on triggered images after correction.

    Where it is to be `explained`, of MMAC alone, also: under `sites`, for every site the ASR `alone` and `opened`
    (`site_asr`), and the `abnormality` of its most abnormal channel beside the clean test images; under `margins`, the
    quantiles .1, .5 and .9 of the margins of `clean` test images of their true class and of `triggered` ones of the
    target, before and after; and of its `stand_ins` the `rates` and `columns`.

    Raises
    ------
    ValueError
        An unknown defence, or one that is to be explained and is not MMAC.
    """
    if isinstance(defence, str) and defence not in DEFENCES:
        raise ValueError(f"defence must be one of {', '.join(DEFENCES)}, got {defence!r}")
    fit = DEFENCES[defence] if isinstance(defence, str) else defence
    if explained and not isinstance(fit.config, MMACConfig):
        raise ValueError(f"only fits of MMAC can be explained, got {defence!r}")
    row: Row = {"before": _plain(evaluate(model, splits.test, attack))}
    history: list[dict[str, float]] = []
    _warm_up()
    start, peak = time.perf_counter(), Peak()
    for step in fit(model, splits.defender, seed):
        history.append({k: v for k, v in vars(step).items() if isinstance(v, (int, float)) and math.isfinite(v)})
        yield {}
    row |= _cost(start, peak)
    row["history"] = history
    defended: nn.Module = step.model
    row["after"] = _plain(evaluate(defended, splits.test, attack))
    if isinstance(attack, AttackSet):
        judged = {"before": model, "after": defended}
        row["each"] = [
            {when: _plain(evaluate(judge, splits.test, part)) for when, judge in judged.items()}
            for part in attack.attacks
        ]
    if isinstance(defended, ClippedModel):
        row["mmdf"] = _mmdf(defended, splits, attack)
    if explained:
        row |= _explained(model, step, splits.test, attack)
    if attack is not None and clean_model is not None:
        row["ra_ceiling"] = evaluate(clean_model, splits.test, attack).ra
    yield row


def _explained(model: nn.Module, step: MMACStep, test: LabelledImages, attack: Attack | None) -> Row:
    """Which sites hold a backdoor back, how sure of itself it was, and what stood in for triggered images."""
    judged = {"clean": (test.images, test.labels)}
    told: Row = {}
    if attack is not None:
        triggered = attack.triggered(test)
        judged["triggered"] = (triggered.images, triggered.targets)
        unclipped = ClippedModel(model)
        ours, theirs = (unclipped.activations(images, quantiles=()) for images, _ in judged.values())
        ratios = abnormality(ours, theirs)
        told["sites"] = {
            site: {**asdict(asr), "abnormality": float(ratios[site].max())}
            for site, asr in site_asr(step.model, triggered).items()
        }
    told["margins"] = {
        kind: {
            when: _quantiles(classification_margins(logits(network, images), classes.cpu()))
            for when, network in (("before", model), ("after", step.model))
        }
        for kind, (images, classes) in judged.items()
    }
    if step.stand_ins is not None:
        told["stand_ins"] = {part: _plain_list(getattr(step.stand_ins, part)) for part in ("rates", "columns")}
    return told


def _plain_list(values: Tensor) -> list[Any]:
    """A tensor as JSON holds it, to three decimals."""
    listed: list[Any] = values.double().round(decimals=3).tolist()
    return listed


def _quantiles(values: Tensor) -> list[Any]:
    return _plain_list(values.double().quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)))


def _mmdf(clipped: ClippedModel, splits: Splits, attack: Attack | None) -> dict[str, float]:
    detector = MMDF(clipped).fit(splits.calibration)
    clean_scores = detector.score(splits.test)
    judged = {"nominal_fpr": detector.fpr, "fpr": float((clean_scores > detector.threshold_).float().mean())}
    if attack is None:
        return judged
    triggered = attack.triggered(splits.test)
    decisions = detector.decide(triggered.images)
    curve = RocCurve(clean_scores, decisions.score)
    return judged | {
        "auroc": curve.auroc,
        "tpr": curve.rates_at(detector.threshold_)[1],
        _TPR: curve.tpr_at(0.01),
        "ra_corrected": float((decisions.corrected == triggered.true_labels.cpu()).float().mean()),
    }


def judge_images(
    model: nn.Module, splits: Splits, attack: Attack | None, detector: str | Detector = "mmdf", seed: int = 0
) -> Row:
    """Fit a detector of triggered images on `splits.calibration` and judge it on the test images.

    The row: under `rates`, for each nominal rate of `FPRS`, the detector's own threshold for it, the measured FPR and
    the TPR; AUROC; the number of `clean` and of `triggered` images judged. TPR and AUROC also over the `successful`
    triggered images alone, those that `model` gives the attacker's target; where there is none they are left out.
    `seconds` and `memory` are those of the fit, a defence before it included.
    """
    kind = DETECTORS[detector] if isinstance(detector, str) else detector
    _warm_up()
    start, peak = time.perf_counter(), Peak()
    fitted = kind(model, splits.defender, seed).fit(splits.calibration)
    row = _cost(start, peak)
    clean = fitted.score(splits.test)
    parts: dict[str, Tensor] = {}
    if attack is not None:
        triggered = attack.triggered(splits.test)
        scores = fitted.score(triggered.images)
        hit = logits(model, triggered.images).argmax(1).cpu() == triggered.targets.cpu()
        parts = {"": scores, "_successful": scores[hit]}
        row |= {"triggered": len(scores), "successful": int(hit.sum())}
    row |= {"clean": len(clean), "rates": {}}
    curves = {part: RocCurve(clean, scores) for part, scores in parts.items() if len(scores)}
    row |= {f"auroc{part}": curve.auroc for part, curve in curves.items()}
    for fpr in FPRS:
        threshold = fitted.threshold(fpr)
        rates = {"threshold": threshold, "fpr": float((clean > threshold).double().mean())}
        rates |= {f"tpr{part}": curve.rates_at(threshold)[1] for part, curve in curves.items()}
        row["rates"][str(fpr)] = rates
    return row


def judge_model(model: nn.Module, clean: LabelledImages, detector: str | Detector = "mm-bd", seed: int = 0) -> Row:
    """The verdict of a detector of attacked models, as JSON holds it: its attributes after `fit`.

    Numbers and lists of numbers, these to two decimals; images and the like are left out.
    """
    kind = DETECTORS[detector] if isinstance(detector, str) else detector
    fitted = kind(model, clean, seed).fit(clean)
    row: Row = {}
    for name, value in vars(fitted).items():
        if not name.endswith("_") or name.startswith("_"):
            continue
        if isinstance(value, (np.generic, Tensor)) and value.ndim == 0:
            value = value.item()
        if isinstance(value, (np.ndarray, Tensor)) and value.ndim == 1:
            row[name.removesuffix("_")] = [round(float(number), 2) for number in value]
        elif value is None or isinstance(value, (bool, int, float)):
            row[name.removesuffix("_")] = value
    return row


@cache
def _warm_up() -> None:
    """Have torch load what the first fit of a process would: it took 160 MiB and 2.5 s, which are not the fit's."""
    images = torch.linspace(0, 1, 8 * 3 * 8 * 8).view(8, 3, 8, 8)
    model = resnet10(4, seed=0, width=4)
    clean = LabelledImages(images, logits(model, images).argmax(1).cpu(), tuple("abcd"))
    run(mmbm(ClippedModel(model), clean, MMBMConfig(epochs=1)))


def _cost(start: float, peak: Peak) -> Row:
    memory = peak.megabytes()
    return {"seconds": round(time.perf_counter() - start, 1)} | ({} if memory is None else {"memory": memory})


def _plain(value: Any) -> dict[str, float]:
    """An evaluation as JSON holds it: what is nan is left out."""
    return {k: v for k, v in asdict(value).items() if math.isfinite(v)}


# --- checkpoints --------------------------------------------------------------------------------------------


class Subject(NamedTuple):
    """What a cell is measured on; `extra` goes into its row."""

    model: nn.Module
    splits: Splits
    attack: Attack | None
    clean_model: nn.Module | None
    extra: Row


@dataclass(frozen=True)
class Shipped:
    """A checkpoint of the zoo, by name and training seed; the ceiling of RA is that of `clean-0`."""

    name: str
    training_seed: int

    def describe(self) -> Row:
        """Its part of a recipe: the checkpoint with the checksum of its weights, as on its card."""
        card = zoo.card(self.name, seed=self.training_seed)
        checkpoint = {"name": self.name, "training_seed": self.training_seed, "sha256": card["sha256"]}
        return {"data": card["recipe"]["data"], "checkpoint": checkpoint, "ceiling": zoo.card("clean-0")["sha256"]}

    def file(self, method: str, seed: int) -> tuple[str, str]:
        """Folder and name of a row."""
        return method, f"{self.name}-{self.training_seed}-fit-{seed}"

    def load(self) -> Subject:
        """The network, its images and its attack."""
        checkpoint = zoo.load(self.name, seed=self.training_seed)
        return Subject(checkpoint.model, checkpoint.splits(), checkpoint.attack, zoo.load("clean-0").model, {})


@lru_cache(maxsize=1)
def _folder(path: str, per_class: int) -> Splits:
    return image_folder(path, per_class=per_class)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A lab network, attacked and trained on a folder of images, and then kept in the cache.

    Parameters
    ----------
    images
        Names the images and the folder of the rows: in a recipe it stands for the pictures, so that a folder of
        others needs another name.
    path
        As in `data.image_folder`.
    attack, poison_rate
        One of `IMAGE_ATTACKS`.
    per_class
        Images a class for the defender, and as many to calibrate detectors.
    epochs, flip
        As in `TrainConfig`; `flip` is right for photographs.
    ceiling
        Train a clean network too, for the ceiling of RA.
    training_seed
        Of weights and order.
    """

    images: str
    path: str
    attack: str = "patch"
    poison_rate: float = 0.05
    per_class: int = 50
    epochs: int = 10
    flip: bool = False
    ceiling: bool = False
    training_seed: int = 0

    def __post_init__(self) -> None:
        if self.attack not in IMAGE_ATTACKS:
            raise ValueError(f"attack must be one of {', '.join(IMAGE_ATTACKS)}, got {self.attack!r}")

    def _splits(self) -> Splits:
        return _folder(str(self.path), self.per_class)

    def _attack(self) -> BackdoorAttack | MarginLimitedAttack:
        return IMAGE_ATTACKS[self.attack](len(self._splits().classes), self.poison_rate)

    def _recipe(self, attacked: bool) -> zoo.Recipe:
        config = TrainConfig(epochs=self.epochs, flip=self.flip)
        return zoo.Recipe(self._attack() if attacked else None, (self.training_seed,), config)

    def describe(self, attacked: bool = True) -> Row:
        """Its part of a recipe: how the network is trained."""
        how = {"name": self.attack if attacked else "clean", "training_seed": self.training_seed}
        how |= self._recipe(attacked).describe() | {"data": self.images, "per_class": self.per_class}
        return {"data": self.images, "checkpoint": how, "ceiling": self.ceiling}

    def file(self, method: str, seed: int) -> tuple[str, str]:
        """Folder and name of a row."""
        return self.images, f"{self.attack}-{method}-fit-{seed}"

    def _path(self, attacked: bool) -> Path:
        how = self.describe(attacked)["checkpoint"]
        return cache_dir() / "trained" / f"{self.images}-{how['name']}-{key_of(how)}.safetensors"

    def train(self) -> Iterator[TrainStep]:
        """Train what the cache does not hold, the attacked network and, for the ceiling, a clean one."""
        splits = self._splits()
        for attacked in (True, False) if self.ceiling else (True,):
            path, recipe = self._path(attacked), self._recipe(attacked)
            if path.is_file():
                continue
            model, data = self._network(), recipe.poisoned(splits.train)
            start = time.perf_counter()
            yield from recipe.steps(model, data, self.training_seed)
            seconds = round(time.perf_counter() - start, 1)
            save_tensors(path, model.state_dict(), {"checkpoint": self.describe(attacked), "seconds": seconds})

    def _network(self) -> nn.Module:
        splits = self._splits()
        return resnet10(len(splits.classes), seed=self.training_seed, channels=splits.train.images.shape[1])

    def load(self) -> Subject:
        """The network, its images and its attack; what is missing is trained first."""
        for _ in self.train():
            pass
        models: dict[str, nn.Module] = {}
        seconds = {}
        for name in ("attacked", "clean") if self.ceiling else ("attacked",):
            weights, card = load_tensors(self._path(name == "attacked"))
            models[name] = self._network()
            models[name].load_state_dict(weights)
            seconds[name] = card["seconds"]
        extra = {"training_seconds": seconds}
        return Subject(models["attacked"].eval(), self._splits(), self._attack(), models.get("clean"), extra)


# --- cells --------------------------------------------------------------------------------------------------


def recipe_of(on: Row, method: str, seed: int, explained: bool = False) -> Row:
    """The recipe of a cell, as JSON holds it, on what `Shipped.describe` or `Trained.describe` tells of."""
    how = named(method)
    kind = "defence" if isinstance(how, Defence) else "detector"
    if explained and not (isinstance(how, Defence) and isinstance(how.config, MMACConfig)):
        raise ValueError(f"only fits of MMAC can be explained, got {method!r}")
    recipe = on | {kind: {"name": method, **how.describe(seed)}, "seed": seed}
    if kind == "detector":  # it has no part in what a detector reaches
        recipe.pop("ceiling", None)
    recipe["measured"] = _MEASURED["explained" if explained else getattr(how, "judges", kind)]
    plain: Row = json.loads(json.dumps(recipe, allow_nan=False))  # tuples become lists, as they do in a file
    return plain


def key_of(recipe: Row) -> str:
    """Hash of a recipe: 12 hexadecimal digits of the SHA-256 of its JSON, keys in order and without spaces.

    Examples
    --------
    >>> key_of({"a": 1, "b": [2.5]}) == key_of({"b": [2.5], "a": 1}) != key_of({"a": 1, "b": [2]})
    True
    """
    text = json.dumps(recipe, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Cell:
    """A method, by its name in `DEFENCES` or `DETECTORS`, on a checkpoint with a seed.

    With `explained` more is measured, see `measure`, and the row has a folder of its own. `recipe` tells all that it is
    a function of.

    Examples
    --------
    >>> cell = Cell(Shipped("patch", 0), "mmac", seed=1)
    >>> cell.file, cell.recipe["defence"]["config"]["epochs"]
    (('mmac', 'patch-0-fit-1'), 9)
    """

    checkpoint: Shipped | Trained
    method: str
    seed: int
    explained: bool = False
    recipe: Row = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        recipe = recipe_of(self.checkpoint.describe(), self.method, self.seed, self.explained)
        object.__setattr__(self, "recipe", recipe)

    @property
    def file(self) -> tuple[str, str]:
        """Folder and name of its row, readable; there is one row for all versions of the recipe, the newest."""
        return self.checkpoint.file(self.method + "-explained" * self.explained, self.seed)

    def stored(self, folder: Path) -> Row | None:
        """Its row in a folder of results, if it is there and was measured by this recipe."""
        try:
            row = read(*self.file, folder=folder)
        except (FileNotFoundError, ValueError):  # a damaged file is measured again
            return None
        return row if row.get("key") == key_of(self.recipe) else None


def fill(cell: Cell, method: Defence | Detector) -> Row:
    """Measure a cell; an error becomes its row, so that it stops no other cell.

    `method` is what `cell.method` names, handed over so that another process has no need of the same tables.
    """
    try:
        if cell.checkpoint.describe()["checkpoint"] != cell.recipe["checkpoint"]:
            raise ValueError("this machine has another checkpoint of this name than the one that asks for the cell")
        on = cell.checkpoint.load()
        if isinstance(method, Defence):
            fit = measure(on.model, on.splits, on.attack, method, cell.seed, on.clean_model, explained=cell.explained)
            row = run(fit)
        elif method.judges == "images":
            row = judge_images(on.model, on.splits, on.attack, method, cell.seed)
        else:
            row = judge_model(on.model, on.splits.defender, method, cell.seed)
        row |= on.extra | _machine()
        json.dumps(row, allow_nan=False)  # a measure that is nan is an error of this cell, not of the run
    except Exception as error:
        return failed(cell, method, error)
    return _head(cell, method) | row | {"recipe": cell.recipe}


def failed(cell: Cell, method: Defence | Detector, error: BaseException) -> Row:
    """The row of a cell that could not be measured: the `error` in a line, and its `traceback`."""
    told = {"error": f"{type(error).__name__}: {error}", "traceback": "".join(traceback.format_exception(error))}
    return _head(cell, method) | told | {"recipe": cell.recipe}


def _head(cell: Cell, method: Defence | Detector) -> Row:
    kind = "defence" if isinstance(method, Defence) else "detector"
    return {"key": key_of(cell.recipe), kind: cell.method, "seed": cell.seed}


def _machine() -> Row:
    return {"machine": {"torch": torch.__version__, "processor": platform.machine(), "cores": os.cpu_count()}}


# --- files --------------------------------------------------------------------------------------------------


def results_dir() -> Path:
    """Where rows are kept: `results/` in the data folder."""
    return data_dir() / "results"


def write(row: Row, *name: str, folder: Path | None = None) -> Path:
    """Write a row to `FOLDER/NAME/NAME/....json`, `results_dir()` by default, whole or not at all."""
    path = (folder or results_dir()).joinpath(*name[:-1], f"{name[-1]}.json")
    write_bytes(path, (json.dumps(row, indent=1, allow_nan=False) + "\n").encode())
    return path


def read(*name: str, folder: Path | None = None) -> Row:
    """Read a row that `write` wrote.

    Raises `FileNotFoundError` where it is missing, and `ValueError` where it is not JSON.
    """
    path = (folder or results_dir()).joinpath(*name[:-1], f"{name[-1]}.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; `python -m bclip_lab bench` writes it")
    try:
        row: Row = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return row


def current(row: Row) -> bool:
    """Whether a row was measured by the recipe that is the lab's now.

    Its method's settings must be the defaults of today and, for a checkpoint of the zoo that is there, its checksum
    that on the card. (Further training seeds are not shipped; their rows count all the same.) How a network was trained
    on one's own images is not known here: `run` looks at that.
    """
    recipe = row.get("recipe")
    if recipe is None or row.get("key") != key_of(recipe):
        return False
    on = {name: recipe[name] for name in ("data", "checkpoint", "ceiling") if name in recipe}
    try:
        if "sha256" in on["checkpoint"]:
            with contextlib.suppress(FileNotFoundError):
                on = Shipped(on["checkpoint"]["name"], on["checkpoint"]["training_seed"]).describe()
        name = recipe.get("defence", recipe.get("detector"))["name"]
        today = recipe_of(on, name, recipe["seed"], recipe["measured"] == _MEASURED["explained"])
    except ValueError:  # a method or a checkpoint that the lab no longer has
        return False
    return bool(today == recipe)


def recorded(folder: str, pattern: str) -> list[Row]:
    """The current rows whose names fit a pattern, failed ones too, in order of name."""
    rows = [read(folder, path.stem) for path in sorted((results_dir() / folder).glob(f"{pattern}.json"))]
    return [row for row in rows if current(row)]


def found(folder: str, pattern: str) -> list[Row]:
    """The same without those that failed."""
    return [row for row in recorded(folder, pattern) if "error" not in row]
