"""Which images excite a channel, and where: the state behind `ActivationExplorer`, without a widget and a kernel."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from bclip_lab.clipping import ClippedModel, abnormality
from bclip_lab.data.images import Attack, LabelledImages, Splits, TriggeredImages, to_float
from bclip_lab.models import logits
from bclip_lab.widgets.samples import sample

__all__ = ["ActivationExploration", "Excited"]


@dataclass(frozen=True, eq=False)
class Excited:
    """Images, and what one channel does on them.

    `images` float32 (n, C, H, W) in [0, 1]; `values` float32 (n,), the channel's largest activation over
    positions; `maps` float32 (n, H', W'), its activations at all positions, None where the site has no rows
    and columns; `labels` and `decisions` int64 (n,), the true classes and what the network decides.
    """

    images: Tensor = field(repr=False)
    values: Tensor
    maps: Tensor | None = field(repr=False)
    labels: Tensor
    decisions: Tensor


class ActivationExploration:
    """How far triggered images exceed the clean maximum of every channel, and the images behind it.

    The clean images are a sample of `splits.test`, the triggered ones what the attack makes of the same
    images: what differs is the trigger's doing. The channels of a site are in the order of their abnormality,
    the most abnormal first; the first choice is the most abnormal channel of all.

    Parameters
    ----------
    model
        A classifier. Of a `ClippedModel` the original is looked at, without bounds.
    splits
        `test` gives the images.
    attack
        Makes the triggered images.
    images
        At most so many clean test images are used.
    seed
        Which ones, where there are more.

    Attributes
    ----------
    clean, triggered
        The images. `triggered.rows` are places in `clean`.
    ratios
        For every site float32 (C,): the largest triggered activation as a multiple of the largest clean one,
        `bclip_lab.clipping.abnormality`.
    site, channel
        What is chosen.

    Raises
    ------
    ValueError
        As `ClippedModel`; `images` is below 1 or above 2,000, or the attack turns none of the test images.

    Examples
    --------
    >>> from bclip_lab.attacks import AllToOne, BackdoorAttack, PatchTrigger
    >>> from bclip_lab.data import signs
    >>> splits = signs(train=20, test=20, per_class=1, cache=False)
    >>> model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    >>> exploration = ActivationExploration(model, splits, BackdoorAttack(PatchTrigger(), AllToOne(0)))
    >>> clean, triggered, original = exploration.excited(count=3)
    >>> triggered.values.shape, triggered.maps.shape
    (torch.Size([3]), torch.Size([3, 30, 30]))
    """

    def __init__(self, model: nn.Module, splits: Splits, attack: Attack, *, images: int = 500, seed: int = 0) -> None:
        self._clipped = ClippedModel(model.original if isinstance(model, ClippedModel) else model)
        self.clean: LabelledImages
        self.triggered: TriggeredImages
        if images > 2000:  # of more, the statistics keep no number of each
            raise ValueError(f"images must be at most 2000, got {images}")
        self.clean, self.triggered = sample(splits.test, attack, images, seed)
        both = (self.clean.images, self.clean.labels), (self.triggered.images, self.triggered.true_labels)
        clean, triggered = statistics = [self._clipped.activations(images, quantiles=()) for images, _ in both]
        self.ratios = abnormality(clean, triggered)
        self._orders = {site: values.argsort(descending=True, stable=True) for site, values in self.ratios.items()}
        self._clean, self._triggered = (
            _Part(images, labels.cpu(), logits(self._clipped, images).argmax(1), measured.per_image)
            for (images, labels), measured in zip(both, statistics, strict=True)
        )
        self.site = max(self.ratios, key=lambda site: float(self.ratios[site].max()))
        self.channel = self.order(self.site)[0]

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites, in the order they run."""
        return self._clipped.sites

    def order(self, site: str) -> list[int]:
        """The channels of a site, the most abnormal first."""
        self._check(site)
        return self._orders[site].tolist()

    @property
    def cell(self) -> tuple[int, int]:
        """The place of the chosen channel: that of its site, and its own in the order of the site."""
        return self.sites.index(self.site), self.order(self.site).index(self.channel)

    @property
    def maxima(self) -> tuple[float, float]:
        """The largest activation of the chosen channel on clean and on triggered images."""
        return self._clean.maximum(self.site, self.channel), self._triggered.maximum(self.site, self.channel)

    @property
    def ratio(self) -> float:
        """The abnormality of the chosen channel."""
        return float(self.ratios[self.site][self.channel])

    def choose(self, site: str, channel: int | None = None) -> None:
        """Choose a channel; without one the most abnormal of the site.

        Raises `ValueError` for an unknown site, or a channel that it does not have; the choice stays then.
        """
        self._check(site)
        count = len(self.ratios[site])
        if channel is None:
            channel = self.order(site)[0]
        elif not 0 <= channel < count:
            raise ValueError(f"channel must lie in [0, {count}) at site {site!r}, got {channel}")
        self.site, self.channel = site, channel

    def choose_cell(self, row: int, column: int) -> bool:
        """Choose by place, as in `cell`; False, and no other choice, where there is nothing."""
        if not (0 <= row < len(self.sites) and 0 <= column < len(self.ratios[self.sites[row]])):
            return False
        self.choose(self.sites[row], self.order(self.sites[row])[column])
        return True

    def step(self, rows: int = 0, columns: int = 0) -> None:
        """Go so many sites on and so many channels less abnormal, as far as there are any."""
        row, column = self.cell
        row = min(max(row + rows, 0), len(self.sites) - 1)
        column = min(max(column + columns, 0), len(self.ratios[self.sites[row]]) - 1)
        self.choose_cell(row, column)

    def excited(self, count: int = 6) -> tuple[Excited, Excited, Excited]:
        """The images on which the chosen channel is largest, the largest first, each with its activation map.

        Parameters
        ----------
        count
            How many of each kind; fewer where there are no more.

        Returns
        -------
        clean
            Of the clean images.
        triggered
            Of the triggered images.
        original
            The images of `triggered`, in the same order, without the trigger.

        Raises
        ------
        ValueError
            `count` is below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        clean, triggered = self._clean, self._triggered
        first, second = (part.largest(self.site, self.channel, count) for part in (clean, triggered))
        return (
            self._excited(clean, first),
            self._excited(triggered, second),
            self._excited(clean, self.triggered.rows.cpu()[second]),
        )

    def _excited(self, part: _Part, rows: Tensor) -> Excited:
        images = to_float(part.images[rows.to(part.images.device)].cpu())
        maps = self._clipped.activation_maps(images, self.site, self.channel)
        values = part.values[self.site][rows, self.channel]
        return Excited(images, values, maps if maps.ndim == 3 else None, part.labels[rows], part.decisions[rows])

    def _check(self, site: str) -> None:
        if site not in self.ratios:
            raise ValueError(f"there is no site {site!r}; the sites are {', '.join(self.sites)}")


@dataclass(frozen=True, eq=False)
class _Part:
    """Images, with per site the largest activations (N, C) of each."""

    images: Tensor
    labels: Tensor
    decisions: Tensor
    values: dict[str, Tensor]

    def maximum(self, site: str, channel: int) -> float:
        return float(self.values[site][:, channel].max())

    def largest(self, site: str, channel: int, count: int) -> Tensor:
        return self.values[site][:, channel].sort(descending=True, stable=True).indices[:count]
