"""Stand-ins for the triggered images that a defender does not have."""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_lab.defenses.fitting import BoundFit, draw_seed
from bclip_lab.margins import maximum_margin_patches, maximum_margin_perturbations, place_patches
from bclip_lab.models import images_at_once

__all__ = ["TriggerStandIns"]

# Where the rates are measured the perturbations have half their strength: there a backdoor helps far more than the
# likeness of two classes does. Images of a pair: enough for a rate to within .1.
_FAINT, _RATED = 0.5, 20
# A class that most others reach is suspicious at a far lower rate than a pair is: see `TriggerStandIns`.
_USUAL = 4
# Classes s from which each class t is looked at: all of ten, so that time grows with the classes, not their square.
_SOURCES = 9


class TriggerStandIns:
    """Clean images with a perturbation and a patch that the unclipped network takes for another class.

    For an image of class s the class t is drawn with probability r^3 / (r^3 + (1 - r)^3), where r is the *rate* r_st
    or, where that is larger, four times the class's *usual rate*, the median of r_st over the classes s (at most 1).
    The rate of a pair is the probability that the original gives to t, mean over some images of class s that bear the
    patch P_st and half the perturbation delta_t. A backdoor makes its pairs of classes easy, and likeness of two
    classes does so, too, but less: the likest pair of a clean development network had a rate of .2 to .36, the easiest
    pair of an attacked one .3 to .7. The third power keeps the two apart (.2 is drawn in 2 cases of 100, .5 in 50).
    Where a backdoor takes all classes to one and its trigger is like no perturbation, no pair stands out but a whole
    column does: likeness is of a few classes, so that the largest usual rate of three clean networks was .02, and of
    those with a sinusoid or a blended image as the trigger .12 to .27. Where no class is drawn the image stays as it
    is; in a network without a backdoor nearly all do, and clean accuracy does not pay for stand-ins that teach nothing.

    Each class t of `targets` is looked at from at most nine classes s, drawn at random: from all of ten, so that time
    and memory grow with the targets and not with the square of the classes. With more classes a backdoor of a single
    one is found only where its pair is drawn.

    `targets` int64 (T,), the classes t, and `pairs` int64 (P, 2), the pairs (s, t) that were looked at;
    `perturbations` float32 (T, C, H, W) within [-limit, limit], see `maximum_margin_perturbations`; `patches` float32
    (P, C, S, S) in [0, 1], see `maximum_margin_patches`, or None; `rates` float32 (K, K) in [0, 1], 0 where a pair was
    not looked at; `usual` float32 (K,), the usual rate of each class, 0 where fewer than three others were looked at.
    A `limit` or a `patch` (the side S in pixels) of 0 leaves its part out.

    Examples
    --------
    >>> from bclip_lab.clipping import ClippedModel
    >>> from bclip_lab.data.images import LabelledImages
    >>> from bclip_lab.models import logits, resnet10
    >>> model = resnet10(3, seed=0, width=4)
    >>> images = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> clean = LabelledImages(images, logits(model, images).argmax(1), ("a", "b", "c"))
    >>> fit = BoundFit(ClippedModel(model), clean, start=1.0, learning_rate=0.1)
    >>> generator = torch.Generator().manual_seed(0)
    >>> found = TriggerStandIns(fit, torch.arange(3), limit=0.1, patch=2, generator=generator)
    >>> labels = clean.labels
    >>> found.move(fit.images, labels, found.draw(labels)).shape, found.rates.shape
    (torch.Size([12, 3, 8, 8]), torch.Size([3, 3]))
    """

    def __init__(self, fit: BoundFit, targets: Tensor, *, limit: float, patch: int, generator: torch.Generator) -> None:
        original, images, labels = fit.unclipped, fit.images, fit.labels.cpu()
        total = fit.targets.shape[1]
        self.generator = generator
        sources = labels.unique()
        self.targets = targets
        chosen = []
        for target in self.targets.tolist():
            others = sources[sources != target]
            others = others[torch.randperm(len(others), generator=generator)[:_SOURCES].sort().values]
            chosen.append(torch.stack([others, torch.full_like(others, target)], 1))
        self.pairs = torch.cat(chosen)
        # where the perturbation of a class and the patch of a pair are; -1 where the pair was not looked at
        self._perturbation = torch.full((total,), -1)
        self._perturbation[self.targets] = torch.arange(len(self.targets))
        self._pair = torch.full((total, total), -1)
        self._pair[self.pairs[:, 0], self.pairs[:, 1]] = torch.arange(len(self.pairs))
        self.perturbations = torch.zeros(len(self.targets), *images.shape[1:], device=images.device)
        self.patches = None
        if limit:
            self.perturbations = maximum_margin_perturbations(
                original, images, self.targets, limit=limit, seed=draw_seed(generator)
            )
        if patch:
            self.patches = maximum_margin_patches(
                original, images, labels, self.pairs, size=patch, seed=draw_seed(generator)
            )
        self.rates = torch.zeros(total, total)
        own = {}
        for source in sources.tolist():
            rows = torch.nonzero(labels == source).flatten()
            own[source] = rows[torch.randperm(len(rows), generator=generator)[:_RATED]]
        for some in self.pairs.split(max(1, images_at_once(images.shape) // _RATED)):
            rated = [own[source] for source in some[:, 0].tolist()]
            rows, counts = torch.cat(rated), torch.tensor([len(rows) for rows in rated])
            targets = some[:, 1].repeat_interleave(counts)
            moved = self.move(images[rows], labels[rows], targets, perturbation=_FAINT)
            reached = fit.originals(moved).softmax(1)[torch.arange(len(targets)), targets].cpu()
            self.rates[some[:, 0], some[:, 1]] = torch.stack([each.mean() for each in reached.split(counts.tolist())])
        self.usual = torch.zeros(total)
        for target in self.targets.tolist():
            rates = self.rates[self.pairs[self.pairs[:, 1] == target, 0], target]
            if len(rates) >= 3:
                self.usual[target] = rates.median()

    def move(
        self, images: Tensor, labels: Tensor, targets: Tensor, *, perturbation: float = 1.0, patch: float = 1.0
    ) -> Tensor:
        """Images of classes `labels` moved towards `targets`, by shares of both parts.

        An image stays as it is where the two are equal or their pair was not looked at.
        """
        pair = self._pair[labels.cpu(), targets.cpu()]
        found = self._perturbation[targets.cpu()].clamp(min=0)
        moved = (images + perturbation * self.perturbations[found]).clamp(0, 1)
        if self.patches is not None:
            placed = place_patches(moved, self.patches[pair.clamp(min=0)], self.generator)
            moved = moved + patch * (placed - moved)
        return torch.where((pair >= 0).to(images.device)[:, None, None, None], moved, images)

    def draw(self, labels: Tensor) -> Tensor:
        """int64 (N,): for each label a class to move towards, or the label itself where none is drawn."""
        rates = self.rates.maximum((_USUAL * self.usual).clamp(max=1)).fill_diagonal_(0)
        chance = rates**3 / (rates**3 + (1 - rates) ** 3)
        chance = chance / chance.sum(1, keepdim=True).clamp(min=1)
        chance = chance + torch.diag(1 - chance.sum(1))
        return torch.multinomial(chance[labels].clamp(min=0), 1, generator=self.generator)[:, 0]
