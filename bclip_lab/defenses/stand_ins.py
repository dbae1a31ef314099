"""Stand-ins for the triggered images that a defender does not have."""

from __future__ import annotations

import torch
from torch import Tensor

from bclip_lab.defenses.fitting import BoundFit, draw_seed
from bclip_lab.margins import maximum_margin_patches, maximum_margin_perturbations, place_patches

__all__ = ["TriggerStandIns"]

# Where the rates are measured the perturbations have half their strength: there a backdoor helps far more than the
# likeness of two classes does. Images of a pair: enough for a rate to within .1.
_FAINT, _RATED = 0.5, 20


class TriggerStandIns:
    """Clean images with a perturbation and a patch that the unclipped network takes for another class.

    For an image of class s the class t is drawn with probability r^3 / (r^3 + (1 - r)^3), where the *rate* r of the
    pair (s, t) is the probability that the original gives to t, mean over some images of class s that bear the patch
    P_st and half the perturbation delta_t. A backdoor makes its pairs of classes easy, and likeness of two classes
    does so, too, but less: the likest pair of a clean development network had a rate of .2 to .36, the easiest pair of
    an attacked one .3 to .7. The third power keeps the two apart (.2 is drawn in 2 cases of 100, .5 in 50). Where no
    class is drawn the image stays as it is; in a network without a backdoor nearly all do, and clean accuracy does not
    pay for stand-ins that teach nothing.

    `perturbations` float32 (K, C, H, W) within [-limit, limit], see `maximum_margin_perturbations`; `patches` float32
    (K, K, C, S, S) in [0, 1], see `maximum_margin_patches`; `rates` float32 (K, K) in [0, 1], 0 on the diagonal.
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
    >>> found = TriggerStandIns(fit, limit=0.1, patch=2, generator=torch.Generator().manual_seed(0))
    >>> labels = clean.labels
    >>> found.move(fit.images, labels, found.draw(labels)).shape, found.rates.shape
    (torch.Size([12, 3, 8, 8]), torch.Size([3, 3]))
    """

    def __init__(self, fit: BoundFit, *, limit: float, patch: int, generator: torch.Generator) -> None:
        original, images, labels = fit.unclipped, fit.images, fit.labels.cpu()
        classes = fit.targets.shape[1]
        self.generator = generator
        some = torch.randperm(len(images), generator=generator)[: 2 * classes]
        self.perturbations = torch.zeros(classes, *images.shape[1:], device=images.device)
        self.patches = None
        if limit:
            self.perturbations = maximum_margin_perturbations(original, images[some], classes, limit=limit)
        if patch:
            self.patches = maximum_margin_patches(
                original, images, labels, classes, size=patch, seed=draw_seed(generator)
            )
        self.rates = torch.zeros(classes, classes)
        for source in labels.unique().tolist():
            own = torch.nonzero(labels == source).flatten()
            own = own[torch.randperm(len(own), generator=generator)[:_RATED]]
            targets = torch.tensor([target for target in range(classes) if target != source])
            pairs, targets = own.repeat(len(targets)), targets.repeat_interleave(len(own))
            moved = self.move(images[pairs], labels[pairs], targets, perturbation=_FAINT)
            reached = fit.originals(moved).softmax(1)[torch.arange(len(targets)), targets].cpu()
            self.rates[source, targets.unique()] = reached.view(-1, len(own)).mean(1)

    def move(
        self, images: Tensor, labels: Tensor, targets: Tensor, *, perturbation: float = 1.0, patch: float = 1.0
    ) -> Tensor:
        """Images of classes `labels` moved towards `targets`, by shares of both parts; where the two are equal none."""
        moved = (images + perturbation * self.perturbations[targets]).clamp(0, 1)
        if self.patches is not None:
            placed = place_patches(moved, self.patches[labels, targets], self.generator)
            moved = moved + patch * (placed - moved)
        return torch.where((labels != targets).to(images.device)[:, None, None, None], moved, images)

    def draw(self, labels: Tensor) -> Tensor:
        """int64 (N,): for each label a class to move towards, or the label itself where none is drawn."""
        chance = self.rates**3 / (self.rates**3 + (1 - self.rates) ** 3)
        chance = chance / chance.sum(1, keepdim=True).clamp(min=1)
        chance = chance + torch.diag(1 - chance.sum(1))
        return torch.multinomial(chance[labels].clamp(min=0), 1, generator=self.generator)[:, 0]
