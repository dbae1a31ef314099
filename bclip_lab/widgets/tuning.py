"""Tuning bounds by hand: the state behind `BoundTuner`, without a widget and without a kernel."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from bclip_lab.clipping import ClippedModel, abnormality, load_bounds, save_bounds
from bclip_lab.data.images import Attack, LabelledImages, Splits, TriggeredImages
from bclip_lab.evaluation import Evaluation
from bclip_lab.margins import classification_margins
from bclip_lab.models import logits
from bclip_lab.widgets.rerun import Rerun
from bclip_lab.widgets.samples import some_rows
from bclip_lab.widgets.undo import Undoable

__all__ = ["BoundTuning", "Channel", "Measured"]

_ALL = object()  # what a change of all sites is of
_KEPT = 4  # sites whose activations are kept


@dataclass(frozen=True)
class Channel:
    """One channel of a site.

    `clean` is its largest activation on the defender's images, `triggered` on triggered test images, both
    without bounds; `ratio` is what `bclip_lab.clipping.abnormality` makes of them; `by_hand` tells whether
    its bound was set apart from its site's.
    """

    index: int
    clean: float
    triggered: float
    ratio: float
    bound: float
    by_hand: bool


@dataclass(frozen=True, eq=False)
class Measured:
    """What one set of bounds does.

    `clean_margins` float32 (N,) are of the true class on the clean images, `triggered_margins` (M,) of the
    attacker's target on the triggered ones. Above 0 that class is the decision.
    """

    evaluation: Evaluation
    clean_margins: Tensor = field(repr=False)
    triggered_margins: Tensor = field(repr=False)


@dataclass(frozen=True, eq=False)
class _Site:
    """Bounds of a site: `scale` times `base` (C,), +inf for none, but for the channels in `by_hand`."""

    scale: float
    base: Tensor
    by_hand: Mapping[int, float] = field(default_factory=dict)

    def equals(self, other: _Site) -> bool:
        """Whether nothing tells the two apart."""
        same = self.scale == other.scale and self.by_hand == other.by_hand
        return same and torch.equal(self.base, other.base)

    def bounds(self) -> Tensor:
        """float32 (C,)."""
        free = torch.full_like(self.base, torch.inf)
        # where the base has no bound, none results from a scale of 0 either
        bounds = free if math.isinf(self.scale) else torch.where(self.base.isinf(), free, self.scale * self.base)
        for channel, bound in self.by_hand.items():
            bounds[channel] = bound
        return bounds


class BoundTuning(Undoable[dict[str, _Site]]):
    """Bounds of a clipped model, moved by hand, and what they do to clean and triggered images.

    A site's bounds are `scale` times the largest activations of its channels on the defender's clean images,
    or times bounds that were loaded; a scale of +inf is no bound. A channel can have a bound of its own, which
    stays as it is when the scale moves.

    Every change goes to the clipped model at once (`ClippedModel.set_bounds`); `evaluate` measures it, and
    computes the network from the changed site onwards only (`Rerun`). To start with, the bounds are those
    that the model has. The original network is left as it is.

    Parameters
    ----------
    clipped
        The model whose bounds are tuned.
    splits
        `defender` gives the clean maxima, `test` the images that judge.
    attack
        Makes the triggered images out of `test`.
    images
        At most so many clean and so many triggered test images are used.
    seed
        Which ones, where there are more.
    memory
        Bytes that may be kept of what the network has computed.

    Attributes
    ----------
    clean, triggered
        The images that judge.
    defender
        The defender's clean images.
    reference
        For every site float32 (C,): the largest activations on the defender's images, at least 0.
    abnormality
        For every site float32 (C,): the largest triggered activation as a multiple of the largest clean one.
    unclipped
        What the network does without bounds.
    measured
        What it did at the latest `evaluate`.
    trail
        ACC, ASR and RA of everything that was evaluated, in order.

    Raises
    ------
    ValueError
        `clipped` is no `ClippedModel`, `images` is below 1, or the attack turns no test image.

    Examples
    --------
    >>> from torch import nn
    >>> from bclip_lab.attacks import AllToOne, BackdoorAttack, PatchTrigger
    >>> from bclip_lab.data import signs
    >>> splits = signs(train=20, test=20, per_class=1, cache=False)
    >>> attack = BackdoorAttack(PatchTrigger(), AllToOne(0))
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.ReLU(), nn.Linear(4, 10))
    >>> tuning = BoundTuning(ClippedModel(model), splits, attack)
    >>> tuning.set_scale("2", 0.5)
    >>> tuning.evaluate().triggered, tuning.scales, tuning.undo(), tuning.scales
    (18, {'2': 0.5}, True, {'2': inf})
    """

    def __init__(
        self,
        clipped: ClippedModel,
        splits: Splits,
        attack: Attack,
        *,
        images: int = 500,
        seed: int = 0,
        memory: int = 200_000_000,
    ) -> None:
        if not isinstance(clipped, ClippedModel):
            raise ValueError(f"clipped must be a ClippedModel, got {type(clipped).__name__}")
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        triggered = attack.triggered(splits.test)
        if not len(triggered):
            raise ValueError("attack turns no image of splits.test")
        generator = torch.Generator().manual_seed(seed)
        self.clipped = clipped
        self.clean: LabelledImages = splits.test.subset(some_rows(len(splits.test), images, generator))
        self.triggered = _subset(triggered, some_rows(len(triggered), images, generator))
        self.defender = splits.defender
        self.available = len(splits.test)

        self._original = ClippedModel(clipped.original)
        clean = self._original.activations(splits.defender, quantiles=())
        reached = self._original.activations(self.triggered.images, quantiles=())
        self.abnormality = abnormality(clean, reached)
        self.reference = {site: values.clamp(min=0) for site, values in clean.maximum.items()}
        self._reached = reached.maximum
        self._rerun = Rerun(clipped, [self.clean.images, self.triggered.images], memory=memory)
        self._kept: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

        super().__init__({site: self._recognised(site, bounds) for site, bounds in clipped.bounds.items()})
        self.trail: list[Evaluation] = []
        self.unclipped = self.measured = self._measured(
            logits(self._original, self.clean), logits(self._original, self.triggered.images)
        )
        if self.bounded:
            self.evaluate()
        else:
            self.trail.append(self.unclipped.evaluation)

    # --- what there is ---

    @property
    def bounds(self) -> dict[str, Tensor]:
        """The bounds: for every site a copy, float32 (C,)."""
        return {site: state.bounds() for site, state in self._state.items()}

    @property
    def scales(self) -> dict[str, float]:
        """The scale of every site, at least 0; +inf is no bound."""
        return {site: state.scale for site, state in self._state.items()}

    @property
    def bounded(self) -> list[str]:
        """The sites that have a bound on some channel."""
        return [site for site, bounds in self.bounds.items() if bool(bounds.isfinite().any())]

    def loaded(self, site: str) -> bool:
        """Whether the scale of a site is of bounds that were loaded, not of the clean maxima."""
        return self._site(site).base is not self.reference[site]

    def by_hand(self, site: str) -> dict[int, float]:
        """The channels of a site that have a bound of their own."""
        return dict(self._site(site).by_hand)

    def channels(self, site: str) -> list[Channel]:
        """The channels of a site, the most abnormal first."""
        state = self._site(site)
        bounds, ratios = state.bounds().tolist(), self.abnormality[site]
        clean, reached = self.reference[site].tolist(), self._reached[site].tolist()
        return [
            Channel(i, clean[i], reached[i], float(ratios[i]), bounds[i], i in state.by_hand)
            for i in ratios.argsort(descending=True, stable=True).tolist()
        ]

    def activations(self, site: str, channel: int | None = None) -> tuple[Tensor, Tensor]:
        """The largest activation of every image at a site, without bounds: clean (N,) and triggered (M,).

        Of one channel as it is; without a channel the largest multiple, over all channels, of what is 100 %
        for the channel: an image is clipped at this site where that is above the scale. There 100 % counts
        as at least a hundredth of the site's largest, as in `bclip_lab.clipping.abnormality`.
        """
        self._check(site, channel)
        if site not in self._kept:
            self._kept[site] = (
                self._original.site_activations(self.clean, site),
                self._original.site_activations(self.triggered.images, site),
            )
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        clean, triggered = self._kept[site]
        if channel is not None:
            return clean[:, channel], triggered[:, channel]
        unit = self._unit(site)
        return (clean / unit).amax(1), (triggered / unit).amax(1)

    # --- changes ---

    def set_scale(self, site: str, scale: float, *, merge: bool = False) -> None:
        """Scale the bounds of a site; its channels that were set by hand stay.

        Parameters
        ----------
        site
            Its name.
        scale
            At least 0; +inf is no bound.
        merge
            Make this one step, for `undo`, with the change before where that was of the same site: a drag is
            one step.
        """
        self._change({site: replace(self._site(site), scale=_checked(scale))}, site, merge)

    def scale_all(self, scale: float, *, merge: bool = False) -> None:
        """Give all sites the same scale; `merge` as in `set_scale`."""
        scale = _checked(scale)
        self._change({s: replace(state, scale=scale) for s, state in self._state.items()}, _ALL, merge)

    def set_bound(self, site: str, channel: int, bound: float | None, *, merge: bool = False) -> None:
        """Set the bound of one channel, +inf for none; None gives it back to the scale of its site.

        `merge` as in `set_scale`, where the change before was of the same channel.

        Raises
        ------
        ValueError
            An unknown site or channel, or a bound that `ClippedModel.set_bounds` refuses.
        """
        self._check(site, channel)
        state = self._state[site]
        by_hand = {c: b for c, b in state.by_hand.items() if c != channel}
        if bound is not None:
            by_hand[channel] = float(bound)
        self._change({site: replace(state, by_hand=by_hand)}, (site, channel), merge)

    def load(self, bounds: Mapping[str, Tensor | float]) -> None:
        """Take bounds, learned ones for example: they are 100 % of their sites then.

        Parameters
        ----------
        bounds
            As `ClippedModel.set_bounds` takes them. The sites not named stay as they are.

        Raises
        ------
        ValueError
            Bounds that `ClippedModel.set_bounds` refuses.
        """
        self.clipped.set_bounds(bounds)  # checks them
        taken = self.clipped.bounds
        self._change({site: self._recognised(site, taken[site]) for site in bounds})

    def reset(self, site: str | None = None) -> None:
        """Take the bounds off a site, or off all: 100 % is its clean maximum again."""
        if site is not None:
            self._check(site, None)
        self._change({s: _Site(math.inf, self.reference[s]) for s in (self._state if site is None else [site])})

    def save(self, path: str | Path) -> Path:
        """Write the bounds as `bclip_lab.clipping.save_bounds` does, which says what is raised."""
        self._apply()
        return save_bounds(self.clipped, path)

    def load_file(self, path: str | Path) -> None:
        """`load` the bounds that `save` has written; raises as `bclip_lab.clipping.load_bounds`."""
        load_bounds(self.clipped, path)
        self.load(self.clipped.bounds)

    def evaluate(self) -> Evaluation:
        """Measure the bounds on the test images: sets `measured`, adds to `trail`."""
        self._apply()  # others may have set other bounds since
        self.measured = self._measured(*self._rerun())
        self.trail.append(self.measured.evaluation)
        return self.measured.evaluation

    def prepare(self, site: str) -> None:
        """Compute ahead what the first change of a site needs, where memory allows to keep it."""
        self._check(site, None)
        self._apply()
        self._rerun.prepare(site)

    # --- inside ---

    def _measured(self, clean: Tensor, triggered: Tensor) -> Measured:
        labels, targets = self.clean.labels.cpu(), self.triggered.targets.cpu()
        return Measured(
            Evaluation.from_decisions(clean.argmax(1), labels, triggered.argmax(1), self.triggered),
            classification_margins(clean, labels),
            classification_margins(triggered, targets),
        )

    def _recognised(self, site: str, bounds: Tensor) -> _Site:
        """Bounds as a scale of the clean maxima where they are one, else as 100 % of themselves."""
        reference, bounds = self.reference[site], bounds.cpu()
        if bool(bounds.isposinf().all()):
            return _Site(math.inf, reference)
        if float(reference.max()) > 0:
            scale = float(bounds[reference.argmax()] / reference.max())
            if 0 <= scale < math.inf and torch.allclose(bounds, scale * reference, rtol=1e-5, atol=0):
                return _Site(round(scale, 6), reference)
        return _Site(1.0, bounds)

    def _unit(self, site: str) -> Tensor:
        """What 100 % are, at least a hundredth of the site's largest; a channel without a bound has +inf."""
        base = self._state[site].base
        finite = base[base.isfinite()]
        largest = float(finite.max()) if len(finite) else 0.0
        return base.clamp(min=0.01 * largest) if largest > 0 else torch.ones_like(base)

    def _site(self, site: str) -> _Site:
        self._check(site, None)
        return self._state[site]

    def _check(self, site: str, channel: int | None) -> None:
        if site not in self._state:
            raise ValueError(f"there is no site {site!r}; the sites are {', '.join(self._state)}")
        count = len(self.reference[site])
        if channel is not None and not 0 <= channel < count:
            raise ValueError(f"channel must lie in [0, {count}) at site {site!r}, got {channel}")

    def _change(self, changed: Mapping[str, _Site], of: object = None, merge: bool = False) -> None:
        if all(self._state[site].equals(state) for site, state in changed.items()):
            return
        after = self._state | dict(changed)
        self.clipped.set_bounds({site: state.bounds() for site, state in after.items()})  # refuses what cannot be
        self._become(after, of, merge)

    def _step(self, source: list[dict[str, _Site]], other: list[dict[str, _Site]]) -> bool:
        moved = super()._step(source, other)
        if moved:
            self._apply()
        return moved

    def _apply(self) -> None:
        self.clipped.set_bounds(self.bounds)


def _checked(scale: float) -> float:
    if not scale >= 0:
        raise ValueError(f"scale must be at least 0, got {scale}")
    return float(scale)


def _subset(made: TriggeredImages, rows: Tensor) -> TriggeredImages:
    rows = rows.to(made.images.device)
    return replace(
        made,
        images=made.images[rows],
        true_labels=made.true_labels[rows],
        targets=made.targets[rows],
        rows=made.rows[rows],
    )
