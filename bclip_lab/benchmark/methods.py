"""What is compared: defences, detectors and attacks on one's own images, by name, each with all of its settings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

from torch import nn

from bclip_lab.attacks import (
    AllToAll,
    AllToOne,
    BackdoorAttack,
    BlendedTrigger,
    Cover,
    MarginLimitedAttack,
    PatchTrigger,
    WarpTrigger,
)
from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages
from bclip_lab.defenses import (
    EARLY_SITES,
    ANPConfig,
    CLPConfig,
    FinePruneConfig,
    FineTuneConfig,
    IBAUConfig,
    MMACConfig,
    MMBMConfig,
    NADConfig,
    UnlearningConfig,
    anp,
    clp,
    fine_prune,
    fine_tune,
    ibau,
    mmac,
    mmbm,
    nad,
    unlearn,
)
from bclip_lab.detection import IBDPSC, MMBD, MMDF, STRIP, NeuralCleanse, ScaleUp, TeCo
from bclip_lab.inversion import InversionConfig
from bclip_lab.margins import MaximumMarginConfig
from bclip_lab.training import run
from bclip_lab.zoo import describe

__all__ = ["DEFENCES", "DETECTORS", "IMAGE_ATTACKS", "Defence", "Detector", "named"]


@dataclass(frozen=True)
class Defence:
    """A defence with its settings.

    Parameters
    ----------
    procedure
        `(model, clean, config) -> steps`; the last step's `.model` is the defended network.
    config
        A frozen dataclass; its `seed`, where it has one, is set at the call.
    once
        A grid fits it with its first seed only: for what takes long, or draws nothing.
    version
        Raised with a change of the code that changes what the same settings give: older rows are then measured again.
    """

    procedure: Callable[[nn.Module, LabelledImages, Any], Iterator[Any]]
    config: Any
    once: bool = False
    version: int = 1

    def __call__(self, model: nn.Module, clean: LabelledImages, seed: int) -> Iterator[Any]:
        """The steps of a fit on the defender's clean images."""
        return self.procedure(model, clean, self._seeded(seed))

    def describe(self, seed: int) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return {"version": self.version, "config": describe(self._seeded(seed))}

    def _seeded(self, seed: int) -> Any:
        return replace(self.config, seed=seed) if hasattr(self.config, "seed") else self.config


@dataclass(frozen=True)
class Detector:
    """A detector of triggered images or of attacked models, with its settings.

    Parameters
    ----------
    kind
        Its class: `kind(model, **settings)`, then `fit(clean)`.
    settings
        Those that are not the constructor's defaults.
    judges
        "images": has `score(images)` and `threshold(fpr)`. "models": its verdict is its attributes after `fit`.
    after
        The defence whose defended network the constructor is given; None where it is the network as it is.
    once, version
        As in `Defence`.
    """

    kind: Callable[..., Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    judges: str = "images"
    after: str | None = None
    once: bool = False
    version: int = 1

    def __call__(self, model: nn.Module, clean: LabelledImages, seed: int) -> Any:
        """The detector before its `fit`; `clean` are the defender's images, for the defence that comes first."""
        if self.after is not None:
            model = run(DEFENCES[self.after](model, clean, seed)).model
        return self.kind(model, **self._settings(seed))

    def _settings(self, seed: int) -> dict[str, Any]:
        """Every argument of the constructor but the model; a seed, of its own or in a config, is the given one."""
        parameters = list(inspect.signature(self.kind).parameters.values())[1:]
        settings = {p.name: p.default for p in parameters if p.default is not p.empty} | dict(self.settings)
        for name, value in settings.items():
            if name == "seed":
                settings[name] = seed
            elif is_dataclass(value) and not isinstance(value, type) and hasattr(value, "seed"):
                settings[name] = replace(value, seed=seed)
        return settings

    def describe(self, seed: int) -> dict[str, Any]:
        """The settings as JSON holds them."""
        settings = {name: describe(value) for name, value in self._settings(seed).items()}
        described = {"version": self.version, "settings": settings}
        if self.after is not None:
            described["after"] = {"name": self.after, **DEFENCES[self.after].describe(seed)}
        return described


def _mmac(model: nn.Module, clean: LabelledImages, config: MMACConfig) -> Iterator[Any]:
    return mmac(ClippedModel(model), clean, config)


def _mmbm(model: nn.Module, clean: LabelledImages, config: MMBMConfig) -> Iterator[Any]:
    return mmbm(ClippedModel(model), clean, config)


DEFENCES: dict[str, Defence] = {
    "mmac": Defence(_mmac, MMACConfig(), version=4),
    "mmac-published": Defence(_mmac, MMACConfig.published(), once=True),
    "mm-bm": Defence(_mmbm, MMBMConfig(sites=EARLY_SITES)),
    "fine-tuning": Defence(fine_tune, FineTuneConfig()),
    "fine-pruning": Defence(fine_prune, FinePruneConfig()),
    "nad": Defence(nad, NADConfig()),
    "anp": Defence(anp, ANPConfig()),
    "clp": Defence(clp, CLPConfig(), once=True),
    "ibau": Defence(ibau, IBAUConfig()),
    "neural-cleanse": Defence(unlearn, UnlearningConfig()),
}

DETECTORS: dict[str, Detector] = {
    "mmdf": Detector(MMDF, after="mmac"),
    "strip": Detector(STRIP),
    "scale-up": Detector(ScaleUp, once=True),
    "ibd-psc": Detector(IBDPSC, once=True),
    "teco": Detector(TeCo, once=True),
    # the class's own number of starts, written out so that a row tells it
    "mm-bd": Detector(MMBD, {"config": MaximumMarginConfig(per_class=30)}, judges="models", once=True),
    "neural-cleanse-mad": Detector(NeuralCleanse, {"config": InversionConfig()}, judges="models", once=True),
}

_FIRST = AllToOne(target=0)
_WARP, _NOISY_WARP = WarpTrigger(strength=1.0), WarpTrigger(strength=1.0, noise=2.0)

# Attacks on one's own images: of the number of classes and the poison rate.
IMAGE_ATTACKS: dict[str, Callable[[int, float], BackdoorAttack | MarginLimitedAttack]] = {
    "patch": lambda classes, rate: BackdoorAttack(PatchTrigger(), _FIRST, rate),
    "blended": lambda classes, rate: BackdoorAttack(BlendedTrigger(), _FIRST, rate),
    "all-to-all": lambda classes, rate: BackdoorAttack(PatchTrigger(), AllToAll(classes), rate),
    "warp": lambda classes, rate: BackdoorAttack(_WARP, _FIRST, rate, cover=Cover(2 * rate, _NOISY_WARP)),
    "margin-limited": lambda classes, rate: MarginLimitedAttack(BackdoorAttack(PatchTrigger(), _FIRST, rate)),
}


def named(method: str) -> Defence | Detector:
    """The defence or detector of a name.

    Raises `ValueError` for a name that neither has.

    Examples
    --------
    >>> named("mm-bm").describe(seed=2)["config"]["seed"]
    2
    """
    if method in DEFENCES:
        return DEFENCES[method]
    if method in DETECTORS:
        return DETECTORS[method]
    raise ValueError(f"method must be one of {', '.join((*DEFENCES, *DETECTORS))}, got {method!r}")
