"""Stand-ins for the triggered images that a defender does not have."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from bclip_lab.defenses.fitting import BoundFit, draw_seed
from bclip_lab.margins import maximum_margin_patches, maximum_margin_perturbations, place_patches
from bclip_lab.models import evaluating, images_at_once

__all__ = ["TriggerStandIns"]

# Beside a patch the perturbation has half its strength where rates are measured: there a backdoor helps far more than
# the likeness of two classes does. Images of a pair: enough for a rate to within .1.
_FAINT, _RATED = 0.5, 20
# The odds at which half of the images are moved by a perturbation alone: so many times those of the second largest
# column, and the least.
_APART, _LEAST = 3.0, 1 / 9
# Classes s from which each class t is looked at: all of ten, so that time grows with the classes, not their square.
_SOURCES = 9


class TriggerStandIns:
    """Clean images changed so that the unclipped network takes them for another class, and the witness does not.

    The witness is a copy of the network, fine-tuned on the clean images, that has lost most of a backdoor. Two classes
    that are alike are so for both; what takes the original to another class and leaves the witness where it is, is like
    a trigger. For every class t there is a perturbation delta_t of all pixels, and for every pair (s, t) a patch P_st;
    `maximum_margin_perturbations` and `maximum_margin_patches` seek them against the witness.

    Half of the images are to bear a perturbation alone, as triggers do that cover the image, and half a patch at a
    random place over a perturbation. The class t that an image of class s is moved to is drawn with probability
    o^4 / (o^4 + h^4), and where none is drawn the image stays as it is. o = r / (1 - r) are the odds of the *rate* r at
    which the change does what a trigger would: the mean over images of p_t(x'; original) (1 - p_t(x'; witness)), for a
    patch P_st with half the perturbation over images of class s (`rates`), for a perturbation alone over images of each
    other class, and of these the median (`columns`), since a trigger that covers the image mostly takes all classes to
    one. h is 1 for pairs: a rate of .5 is drawn for half of the images. What a trigger does, it does to one class; so
    for columns h depends on how far the largest stands out: three times the odds o'' of the second largest, but at
    least 1/9 and at most max(1, sqrt(o' o'')), where o' are the odds of the largest. A class that stands out is drawn
    at a rate as low as .1, as that of a clean-label attack; where many classes are reached as easily, the largest alone
    is. In three clean development networks the largest column is .28 to .38 (two seeds, by hand), its odds 1 to 5 times
    those of the second; in nine attacked ones whose trigger covers the image it is .20 to 1.0, and 2 to 1,000 times.
    Where the witness still obeys a trigger, the search finds other ways to its target at best: a backdoor that
    fine-tuning does not wear off may stay.

    Each class t of `targets` is looked at from at most nine classes s, drawn at random: from all of ten, so that time
    and memory grow with the targets and not with the square of the classes. With more classes a backdoor of a single
    pair is found only where its pair is drawn.

    `targets` int64 (T,), the classes t, and `pairs` int64 (P, 2), the pairs (s, t) that were looked at;
    `perturbations` float32 (T, C, H, W) within [-limit, limit]; `patches` float32 (P, C, S, S) in [0, 1], or None;
    `rates` float32 (K, K) in [0, 1], 0 where a pair was not looked at; `columns` float32 (K,) in [0, 1], 0 where fewer
    than three other classes were looked at. A `limit` or a `patch` (the side S in pixels) of 0 leaves its part out.
    Without a `witness` (None) the original alone is asked.

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
    >>> found = TriggerStandIns(fit, torch.arange(3), None, limit=0.1, patch=2, generator=generator)
    >>> changed, targets = found.make(fit.images, clean.labels)
    >>> changed.shape, targets.shape, found.rates.shape, found.columns.shape
    (torch.Size([12, 3, 8, 8]), torch.Size([12]), torch.Size([3, 3]), torch.Size([3]))
    """

    def __init__(
        self,
        fit: BoundFit,
        targets: Tensor,
        witness: nn.Module | None,
        *,
        limit: float,
        patch: int,
        generator: torch.Generator,
    ) -> None:
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
        self.patches: Tensor | None = None
        if limit:
            self.perturbations = maximum_margin_perturbations(
                original,
                images,
                self.targets,
                limit=limit,
                witness=witness,
                labels=None if witness is None else labels,
                seed=draw_seed(generator),
            )
        if patch:
            self.patches = maximum_margin_patches(
                original, images, labels, self.pairs, witness=witness, size=patch, seed=draw_seed(generator)
            )
        self._rate(fit, labels, witness)

    def _rate(self, fit: BoundFit, labels: Tensor, witness: nn.Module | None) -> None:
        """Measure `rates` and `columns` on some of the images."""
        total = len(self._perturbation)
        self.rates, alone = torch.zeros(total, total), torch.zeros(total, total)
        own = {}
        for source in labels.unique().tolist():
            rows = torch.nonzero(labels == source).flatten()
            own[source] = rows[torch.randperm(len(rows), generator=self.generator)[:_RATED]]
        # the partition has a part in what is drawn: another one makes other stand-ins of the same seed
        for some in self.pairs.split(max(1, images_at_once(fit.images.shape, 500) // _RATED)):
            rated = [own[source] for source in some[:, 0].tolist()]
            rows, counts = torch.cat(rated), torch.tensor([len(rows) for rows in rated])
            targets = some[:, 1].repeat_interleave(counts)
            for rates, perturbation, patch in ((self.rates, _FAINT, 1.0), (alone, 1.0, 0.0)):
                moved = self.move(fit.images[rows], labels[rows], targets, perturbation=perturbation, patch=patch)
                reached = fit.originals(moved).softmax(1)[torch.arange(len(targets)), targets]
                if witness is not None:
                    with evaluating(witness), torch.no_grad():
                        seen = witness(moved).float().softmax(1)[torch.arange(len(targets)), targets]
                    reached = reached * (1 - seen)
                means = [each.mean() for each in reached.cpu().split(counts.tolist())]
                rates[some[:, 0], some[:, 1]] = torch.stack(means)
        self.columns = torch.zeros(total)
        for target in self.targets.tolist():
            rates = alone[self.pairs[self.pairs[:, 1] == target, 0], target]
            if len(rates) >= 3:
                self.columns[target] = rates.median()

    def move(
        self,
        images: Tensor,
        labels: Tensor,
        targets: Tensor,
        *,
        perturbation: float = 1.0,
        patch: float | Tensor = 1.0,
    ) -> Tensor:
        """Images of classes `labels` moved towards `targets`, by a share of the perturbation and one of the patch.

        `patch` is a share for all, or one for each, float32 (N,). An image stays as it is where the two classes are
        equal or their pair was not looked at.
        """
        pair = self._pair[labels.cpu(), targets.cpu()]
        found = self._perturbation[targets.cpu()].clamp(min=0)
        moved = (images + perturbation * self.perturbations[found]).clamp(0, 1)
        if self.patches is not None:
            share = torch.as_tensor(patch, dtype=images.dtype, device=images.device).view(-1, 1, 1, 1)
            placed = place_patches(moved, self.patches[pair.clamp(min=0)], self.generator)
            moved = torch.lerp(moved, placed, share)
        return torch.where((pair >= 0).to(images.device)[:, None, None, None], moved, images)

    def make(self, images: Tensor, labels: Tensor, strength: float = 1.0) -> tuple[Tensor, Tensor]:
        """The stand-ins of images (N, C, H, W) of classes int64 (N,), with changes `strength` times as strong.

        A patch is at most whole, however large the strength. Also returned is the class that each is moved to, int64
        (N,), on the device of `labels`: its own where it stays as it is.
        """
        device = labels.device
        labels = labels.cpu()
        share = 1.0 if self.patches is None else 0.5 if self.perturbations.any() else 0.0
        alone = torch.rand(len(labels), generator=self.generator) < share
        columns = self.columns.expand(len(self.columns), -1)
        second, largest = (self.columns / (1 - self.columns).clamp(min=1e-6)).sort().values[-2:].tolist()
        half = max(_LEAST, min(_APART * second, max(1.0, math.sqrt(largest * second))))
        targets = torch.where(alone, self._draw(columns, labels, half), self._draw(self.rates, labels, 1.0))
        patch = torch.where(alone, 0.0, min(1.0, strength))
        return self.move(images, labels, targets, perturbation=strength, patch=patch), targets.to(device)

    def _draw(self, rates: Tensor, labels: Tensor, half: float) -> Tensor:
        """int64 (N,): for each label a class to move towards, or the label itself where none is drawn.

        A class of the odds `half` is drawn for half of them.
        """
        rates = rates.clone().fill_diagonal_(0)
        moved, stays = rates**4, (half * (1 - rates)) ** 4
        chance = moved / (moved + stays)
        chance = chance / chance.sum(1, keepdim=True).clamp(min=1)
        chance = chance + torch.diag(1 - chance.sum(1))
        return torch.multinomial(chance[labels].clamp(min=0), 1, generator=self.generator)[:, 0]
