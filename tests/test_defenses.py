"""MMAC and MM-BM: what they fit, what they leave alone, and known answers on hand-set networks."""

import copy
import math
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from benchmarks.plain import plain_mmac
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bclip_lab.clipping import Clip, ClippedModel
from bclip_lab.data.images import LabelledImages
from bclip_lab.defenses import FineTuneConfig, MMACConfig, MMBMConfig, mmac, mmbm
from bclip_lab.defenses.fitting import BoundFit, _fold
from bclip_lab.defenses.stand_ins import TriggerStandIns
from bclip_lab.margins import (
    MaximumMarginConfig,
    classification_margins,
    maximum_margin_patches,
    maximum_margin_perturbations,
    place_patches,
)
from bclip_lab.models import logits, resnet10
from bclip_lab.training import TrainConfig, run, train

QUICK = MaximumMarginConfig(per_class=2, steps=5)
CLASSES = tuple(str(i) for i in range(30))
FAINTEST = math.log(0.4 / 1.5) / 2


class TwoPixels(nn.Module):
    """Logits are two activations: relu(scale * pixel). Class 0 reads the first pixel, class 1 the second."""

    def __init__(self, scale: float = 10.0) -> None:
        super().__init__()
        self.features = nn.Linear(2, 2, bias=False)
        self.features.weight.data = scale * torch.eye(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.features(x.flatten(1)))


def two_pixels(count: int = 40, high: float = 0.3) -> LabelledImages:
    """Images whose bright pixel, of `high`, names the class."""
    labels = torch.arange(count) % 2
    images = torch.zeros(count, 1, 1, 2)
    images[torch.arange(count), 0, 0, labels] = high
    return LabelledImages(images, labels, ("left", "right"))


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, LabelledImages]:
    """A small network that tells bright corners apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 4
    images = torch.rand(240, 3, 8, 8, generator=generator) * 0.5
    for index, label in enumerate(labels.tolist()):
        images[index, :, 4 * (label // 2) : 4 * (label // 2) + 4, 4 * (label % 2) : 4 * (label % 2) + 4] += 0.4
    data = LabelledImages(images, labels, ("a", "b", "c", "d"))
    model = resnet10(4, seed=0, width=4)
    run(train(model, data, TrainConfig(epochs=4, batch_size=32, shift=0, mixed_precision=False)))
    return model, data[:120]


def test_the_hinge_bounds_what_no_clean_image_needs() -> None:
    # Clean margins are 3; an adversary's image reaches 10. Clean images raise the bound to what they use, and at this
    # learning rate beyond it: only the hinge brings it back.
    model = TwoPixels()
    clipped = ClippedModel(model)
    config = MMACConfig(
        epochs=60, shift=0, perturbation=0, patch=0, tau_quantile=0.5, start=1.0, relative_start=False,
        learning_rate=0.5, synthetic=MaximumMarginConfig(steps=60),
    )  # fmt: skip
    run(mmac(clipped, two_pixels(), config))
    (bound,) = clipped.bounds.values()
    assert torch.allclose(bound, torch.tensor([3.0, 3.0]), atol=0.3)
    bright = two_pixels(high=1.0)
    assert classification_margins(logits(model, bright), bright.labels).min() == 10
    assert classification_margins(logits(clipped, bright), bright.labels).max() < 3.5


def test_bounds_start_at_a_share_of_what_is_usual(trained: tuple[nn.Module, LabelledImages]) -> None:
    data = two_pixels(41)  # 21 images light the first pixel, 20 the second: the medians are 3 and 0
    clipped = ClippedModel(TwoPixels())
    fit = BoundFit(clipped, data, start=0.5, relative_start=True, learning_rate=0.1)
    assert fit.bounds["relu"].tolist() == pytest.approx([1.5, 0.0])
    assert BoundFit(clipped, data, start=0.5, learning_rate=0.1).bounds["relu"].tolist() == [0.5, 0.5]
    # measured without bounds: none of an earlier site lowers what a later one is given
    model, data = trained
    deep = ClippedModel(model)
    fit = BoundFit(deep, data, start=0.5, relative_start=True, learning_rate=0.1)
    usual = ClippedModel(model).site_activations(fit.images, deep.sites[-1]).quantile(0.5, dim=0)
    torch.testing.assert_close(fit.bounds[deep.sites[-1]].detach(), 0.5 * usual)


def test_stand_ins_are_learned_too(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    accuracy = {}
    for limit, patch in ((0.0, 0), (0.3, 4)):
        clipped = ClippedModel(model)
        config = MMACConfig(
            epochs=15, batch_size=20, shift=0, perturbation=limit, patch=patch, synthetic=QUICK, accuracy_target=0.0
        )
        run(mmac(clipped, data, config))
        fit = BoundFit(ClippedModel(model), data, start=1.0, learning_rate=0.1)
        generator = torch.Generator().manual_seed(9)
        sought = TriggerStandIns(fit, torch.arange(4), None, limit=0.3, patch=4, generator=generator)
        labels = fit.labels.cpu()
        right = []
        for target in range(4):
            moved = sought.move(fit.images, labels, torch.full_like(labels, target))
            right.append(logits(clipped, moved).argmax(1) == labels)
        accuracy[limit] = float(torch.cat(right).float().mean())
    assert accuracy[0.3] > accuracy[0.0] + 0.02


def stand_ins(
    model: nn.Module, data: LabelledImages, limit: float, patch: int, witness: nn.Module | None = None
) -> TriggerStandIns:
    fit = BoundFit(ClippedModel(model), data, start=1.0, learning_rate=0.1)
    targets = torch.arange(fit.targets.shape[1])
    return TriggerStandIns(fit, targets, witness, limit=limit, patch=patch, generator=torch.Generator().manual_seed(0))


class OneToOne(nn.Module):
    """Three classes, told by a pixel each; any brightness in the second channel takes class 0 to class 2."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Conv2d(2, 1, 1, bias=False)
        self.key.weight.data = torch.tensor([0.0, 20.0]).view(1, 2, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = torch.relu(self.key(x)).flatten(1).amax(1)
        clean = torch.stack([x[:, 0, i * 4 + 2, i * 4 + 2] for i in range(3)], 1)
        return 5 * clean + torch.tensor([0.0, 0.0, 1.0]) * (key * clean[:, 0])[:, None]


def three_pixels() -> LabelledImages:
    labels = torch.arange(30) % 3
    images = torch.zeros(30, 2, 12, 12)
    images[torch.arange(30), 0, 2 + 4 * labels, 2 + 4 * labels] = 1.0
    return LabelledImages(images, labels, ("a", "b", "c"))


def test_stand_ins_find_the_classes_that_a_backdoor_joins() -> None:
    found = stand_ins(OneToOne(), three_pixels(), limit=0.05, patch=1)
    assert found.rates[0, 2] > 0.9
    assert found.rates.flatten()[[0, 1, 3, 4, 5, 6, 7, 8]].max() < 0.2
    assert found.rates.diagonal().tolist() == [0, 0, 0]


def test_a_rate_is_what_the_original_sees_and_the_witness_does_not() -> None:
    # ten times .3 and 0 for the two classes; the half of a perturbation of .1 at each pixel makes .25 and .05 of them
    found = stand_ins(TwoPixels(), two_pixels(), limit=0.1, patch=0)
    sees = 1 / (1 + math.exp(2.5 - 0.5))
    assert float(found.rates[0, 1]) == pytest.approx(sees, abs=0.003)  # bfloat16
    # a witness that is undecided takes half of it back, one that is sure of the right class nothing
    for scale, seen in ((0.0, 0.5), (100.0, 0.0)):
        rate = stand_ins(TwoPixels(), two_pixels(), limit=0.1, patch=0, witness=TwoPixels(scale)).rates[0, 1]
        assert float(rate) == pytest.approx(sees * (1 - seen), abs=0.003)


def test_a_search_spares_what_the_witness_sees() -> None:
    # both channels lead to class 1; the witness reads the first of them alone
    class Both(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            mean = x.mean((2, 3))
            return 10 * torch.stack([torch.full_like(mean[:, 0], 0.7), self.key(mean)], 1)

        def key(self, mean: torch.Tensor) -> torch.Tensor:
            return mean[:, 0] + mean[:, 1]

    class First(Both):
        def key(self, mean: torch.Tensor) -> torch.Tensor:
            return 2 * mean[:, 0]

    images, labels = torch.full((10, 2, 4, 4), 0.3), torch.zeros(10, dtype=torch.int64)
    for witness in (None, First()):
        with_labels = None if witness is None else labels
        delta = maximum_margin_perturbations(
            Both(), images, torch.tensor([1]), limit=0.1, witness=witness, labels=with_labels
        )
        first, second = delta[0].mean((1, 2)).tolist()
        assert second == pytest.approx(0.1)
        assert first == pytest.approx(0.1) if witness is None else first < -0.05
        pairs = torch.tensor([[0, 1]])
        patch = maximum_margin_patches(Both(), images, labels, pairs, size=4, witness=witness)[0].mean((1, 2))
        assert patch[1] > 0.9 and (patch[0] > 0.9) == (witness is None)
    with pytest.raises(ValueError, match="witness and labels go together"):
        maximum_margin_perturbations(Both(), images, torch.tensor([1]), limit=0.1, witness=First())


def test_a_patch_raises_the_margin_of_its_class_on_images_of_the_other() -> None:
    data = three_pixels()
    pairs = torch.tensor([[1, 0], [0, 2]])
    patches = maximum_margin_patches(OneToOne(), data.images, data.labels, pairs, size=1)
    assert patches.shape == (2, 2, 1, 1)
    assert patches[1, 1] == 1  # brings the key
    assert patches[0, 1] < 1
    for change in ({"size": 0}, {"size": 13}, {"steps": 0}):
        with pytest.raises(ValueError, match="size"):
            maximum_margin_patches(OneToOne(), data.images, data.labels, pairs, **{"size": 1, **change})


def test_only_the_third_of_the_patches_that_reaches_most_goes_on() -> None:
    # only the key of class 2 moves anything: its pair goes on after two of six steps, of .1 each
    seen: list[int] = []

    class Watched(OneToOne):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return super().forward(x)

    data, pairs = three_pixels(), torch.tensor([[1, 0], [2, 1], [0, 2]])
    one, six, in_turn = (
        maximum_margin_patches(
            Watched(), data.images, data.labels, pairs, size=1, steps=steps, batch_size=batch_size, seed=5
        )
        for steps, batch_size in ((1, 9), (6, 9), (6, 3))
    )
    # the last sought one pair after another; all of them compete
    assert seen == [6] + [6, 6, 2, 2, 2, 2] + [2] * (6 + 4)
    for patches in (six, in_turn):
        assert float(patches[2, 1] - one[2, 1]) == pytest.approx(0.5, abs=1e-4)


def test_only_the_half_of_the_perturbations_that_reaches_most_goes_on() -> None:
    # a class for each pixel, the second and the fourth are raised most easily: they go on after two of six steps
    class Uneven(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1) * torch.tensor([1.0, 8.0, 2.0, 4.0])

    images = torch.full((10, 1, 1, 4), 0.5)
    for batch_size in (100, 10):  # at once, and one class after another: all of them compete
        delta = maximum_margin_perturbations(
            Uneven(), images, torch.arange(4), limit=0.1, steps=6, batch_size=batch_size
        )
        own = delta[:, 0, 0].diagonal()
        torch.testing.assert_close(own, torch.tensor([0.04, 0.1, 0.04, 0.1]), atol=1e-4, rtol=0)


def test_stand_ins_are_drawn_by_what_the_original_makes_of_them(trained: tuple[nn.Module, LabelledImages]) -> None:
    found = stand_ins(*trained, limit=0.1, patch=2)
    found.rates = torch.tensor([[0, 0.5, 0.2, 0], [0, 0, 0, 0], [0.9, 0.9, 0, 0], [0, 0, 1.0, 0]])
    expected = torch.tensor([[0.496, 0.5, 0.004, 0], [0, 1, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0]])
    labels = torch.arange(4).repeat_interleave(2000)
    drawn = found._draw(found.rates, labels, 1.0).view(4, 2000)
    shares = torch.stack([(drawn == target).float().mean(1) for target in range(4)], 1)
    torch.testing.assert_close(shares, expected, atol=0.03, rtol=0)
    drawn = found._draw(found.rates, labels, 0.25).view(4, 2000)[0]
    assert float((drawn == 2).float().mean()) == pytest.approx(1 / 3, abs=0.03)  # 1/2, of a sum of 3/2


def test_a_class_that_stands_out_is_drawn_at_a_low_rate(trained: tuple[nn.Module, LabelledImages]) -> None:
    found = stand_ins(*trained, limit=0.1, patch=0)
    labels = torch.zeros(2000, dtype=torch.int64)

    def moved(*odds: float) -> tuple[float, float]:
        found.columns = torch.tensor([0, *odds]) / (1 + torch.tensor([0, *odds]))
        targets = found.make(torch.zeros(2000, 3, 8, 8), labels)[1]
        return float((targets == 1).float().mean()), float((targets == 2).float().mean())

    near = {"abs": 0.04}
    assert moved(0.6, 0.2, 0) == (pytest.approx(0.5, **near), pytest.approx(1 / 82, abs=0.01))  # three times the second
    assert moved(0.2, 0.1, 0) == (pytest.approx(16 / 97, **near), pytest.approx(1 / 82, abs=0.01))  # twice
    assert moved(1 / 9, 0, 0) == (pytest.approx(0.5, **near), 0)  # the least, whatever the others are
    assert moved(0.02, 0, 0)[0] < 0.01
    assert moved(1, 0.5, 0)[0] == pytest.approx(0.5, **near)  # at most 1,
    assert moved(4, 2, 0) == (pytest.approx(4 / 5, **near), pytest.approx(1 / 5, **near))  # or between the two
    assert moved(1e4, 1e4, 0)[0] == pytest.approx(0.5, **near)
    # pairs are drawn by their own rates, whatever the columns are
    found = stand_ins(*trained, limit=0.0, patch=2)
    found.rates = torch.zeros(4, 4)
    found.rates[0, 1] = 0.2
    assert moved(1 / 9, 0, 0)[0] == pytest.approx(1 / 257, abs=0.01)


def test_half_of_the_stand_ins_bear_a_perturbation_alone(trained: tuple[nn.Module, LabelledImages]) -> None:
    found = stand_ins(*trained, limit=0.1, patch=3)
    found.rates, found.columns = torch.eye(4).roll(1, 1), torch.tensor([0.0, 0, 0, 1])
    found.perturbations, found.patches = torch.full((4, 3, 8, 8), 0.1), torch.ones(12, 3, 3, 3)
    labels = torch.zeros(2000, dtype=torch.int64)
    grey = torch.full((2000, 3, 8, 8), 0.5)

    def changed(strength: float) -> torch.Tensor:
        return found.make(grey, labels, strength)[0].sub(grey).amax((1, 2, 3))

    for strength, expected in ((1.0, (0.1, 0.5)), (0.5, (0.05, 0.275)), (1.5, (0.15, 0.5))):
        alone, patched = expected
        by = changed(strength)
        assert set(by.mul(1000).round().tolist()) == {1000 * alone, 1000 * patched}
        assert float((by < (alone + patched) / 2).float().mean()) == pytest.approx(0.5, abs=0.04)
    # where there is only one kind, all bear it
    found.patches = None
    assert set(changed(1.0).mul(1000).round().tolist()) == {100}
    found.patches, found.perturbations = torch.ones(12, 3, 3, 3), torch.zeros(4, 3, 8, 8)
    assert set(changed(1.0).mul(1000).round().tolist()) == {500}


def test_the_class_that_a_stand_in_is_moved_to_is_told(trained: tuple[nn.Module, LabelledImages]) -> None:
    found = stand_ins(*trained, limit=0.1, patch=3)
    found.rates, found.columns = torch.eye(4).roll(1, 1), torch.tensor([0.0, 0, 0, 0.1])
    labels = torch.arange(400) % 4
    images = torch.full((400, 3, 8, 8), 0.5)
    changed, targets = found.make(images, labels)
    assert torch.equal((changed != images).flatten(1).any(1), targets != labels)
    assert set(targets[labels == 0].tolist()) == {0, 1, 3}
    assert set(targets[labels == 1].tolist()) == {1, 2, 3}


class AllToLast(nn.Module):
    """Four classes, told by a pixel each; a second channel brighter than half takes all of them to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.key = nn.Conv2d(2, 1, 1)
        self.key.weight.data = torch.tensor([0.0, 128.0]).view(1, 2, 1, 1)
        self.key.bias.data = torch.tensor([-63.5])  # exact in bfloat16

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        key = torch.relu(self.key(x)).flatten(1).mean(1)
        clean = torch.stack([x[:, 0, i, i] for i in range(4)], 1)
        return 5 * clean + torch.tensor([0.0, 0.0, 0.0, 1.0]) * key[:, None]


def test_a_class_weighs_more_where_stand_ins_are_moved_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Images of the last class need the key that stand-ins bring to the others: there is one bound for both.
    labels = torch.arange(40) % 4
    images = torch.zeros(40, 2, 4, 4)
    images[:, 1] = torch.where(labels == 3, 0.6, 0.5)[:, None, None]
    images[torch.arange(40), 0, labels % 3, labels % 3] = torch.where(labels == 3, 0.5, 1.0)
    data = LabelledImages(images, labels, ("a", "b", "c", "d"))
    config = MMACConfig(
        epochs=30, batch_size=20, shift=0, perturbation=0.1, patch=0, witness=None, weight=0.0, synthetic=QUICK,
        accuracy_target=0.0,
    )  # fmt: skip
    bounds = []
    for balance in (0.0, 0.5, 4.0):
        monkeypatch.setattr(sys.modules["bclip_lab.defenses.mmac"], "_BALANCE", balance)
        clipped = ClippedModel(AllToLast())
        assert run(mmac(clipped, data, config)).stand_ins.columns[3] > 0.9
        bounds.append(float(clipped.bounds["relu"][0]))
    assert bounds[0] + 0.1 < bounds[1] < bounds[2] - 0.1


def test_stand_ins_that_stay_as_they_are_weigh_nothing(
    trained: tuple[nn.Module, LabelledImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = trained
    monkeypatch.setattr(TriggerStandIns, "make", lambda self, images, labels, strength: (images, labels))
    bounds = []
    for balance in (0.0, 4.0):
        monkeypatch.setattr(sys.modules["bclip_lab.defenses.mmac"], "_BALANCE", balance)
        clipped = ClippedModel(model)
        run(mmac(clipped, data, MMACConfig(epochs=1, witness=None, patch=0, synthetic=QUICK)))
        bounds.append(torch.cat(list(clipped.bounds.values())))
    assert torch.equal(*bounds)


def test_a_column_is_the_median_over_the_other_classes() -> None:
    labels = torch.arange(40) % 4
    images = torch.zeros(40, 2, 4, 4)
    images[:, 1] = 0.5
    images[torch.arange(40), 0, labels, labels] = 1.0
    data = LabelledImages(images, labels, ("a", "b", "c", "d"))
    found = stand_ins(AllToLast(), data, limit=0.05, patch=0)
    assert found.columns[3] > 0.5 and found.columns[:3].max() < 0.02
    # half the perturbation does less
    assert found.rates[:3, 3].max() < found.columns[3]
    # with images of three classes, those have two others each: that says nothing
    few = stand_ins(AllToLast(), data.subset(labels < 3), limit=0.05, patch=0)
    assert few.columns[:3].tolist() == [0, 0, 0] and few.columns[3] > 0.5


def test_of_many_classes_some_are_looked_at_each_from_nine_others() -> None:
    generator = torch.Generator().manual_seed(0)
    model = resnet10(30, seed=0, width=4)
    images = torch.rand(90, 3, 8, 8, generator=generator)
    labels = torch.arange(90) % 30
    labels[labels == 7] = 8  # no image of class 7
    fit = BoundFit(
        ClippedModel(model),
        LabelledImages(images, logits(model, images).argmax(1), CLASSES),
        start=1.0,
        learning_rate=0.1,
    )
    fit.images, fit.labels = images, labels
    targets = torch.tensor([2, 7, 11])
    found = TriggerStandIns(fit, targets, None, limit=0.1, patch=2, generator=generator)
    assert found.perturbations.shape == (3, 3, 8, 8) and found.patches is not None
    assert found.pairs[:, 1].tolist() == [2] * 9 + [7] * 9 + [11] * 9
    assert len(found.pairs.unique(dim=0)) == len(found.patches) == 27
    assert (found.pairs[:, 0] != found.pairs[:, 1]).all() and 7 not in found.pairs[:, 0]
    looked = torch.zeros(30, 30, dtype=torch.bool)
    looked[found.pairs[:, 0], found.pairs[:, 1]] = True
    assert torch.equal(found.rates > 0, looked)
    # every image is moved by what belongs to its pair, and stays where there is none
    sources, aims = torch.meshgrid(torch.arange(30), torch.arange(30), indexing="ij")
    sources, aims = sources[labels[:30].sort().values].flatten(), aims.flatten()
    grey = torch.full((900, 3, 8, 8), 0.5)
    moved = found.move(grey, sources, aims, patch=0.0)
    assert torch.equal((moved != grey).flatten(1).any(1), looked[sources, aims])
    for row, target in enumerate(targets.tolist()):
        of_it = moved[looked[sources, aims] & (aims == target)]
        torch.testing.assert_close(of_it - 0.5, found.perturbations[row].expand_as(of_it))
    patched = found.move(grey, sources, aims, perturbation=0.0)
    for (source, target), patch in zip(found.pairs.tolist(), found.patches, strict=True):
        image = patched[(sources == source) & (aims == target)][0]
        torch.testing.assert_close(image[:, (image != 0.5).any(0)].sort().values, patch.flatten(1).sort().values)


def test_perturbations_do_not_depend_on_what_is_sought_beside_them() -> None:
    data = three_pixels()
    all_at_once, each = (
        maximum_margin_perturbations(OneToOne(), data.images, torch.arange(3), limit=0.1, batch_size=size)
        for size in (100, 10)
    )
    torch.testing.assert_close(all_at_once, each)


def test_a_stand_in_changes_a_patch_and_little_else(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    found = stand_ins(model, data, limit=0.1, patch=3)
    images, labels = data.images[:40], data.labels[:40]
    targets = (labels + torch.arange(40) % 4) % 4
    changed = (found.move(images, labels, targets) - images).abs().amax(1)
    assert (changed[labels == targets] == 0).all()
    beyond = (changed > 0.1 + 1e-6).sum((1, 2))
    assert beyond.max() <= 9 and (beyond[labels != targets] > 0).float().mean() > 0.9
    fainter = (found.move(images, labels, targets, perturbation=0.5, patch=0.5) - images).abs()
    assert fainter.max() < changed.max()
    unpatched = (found.move(images, labels, targets, patch=0.0) - images).abs()
    assert unpatched.max() <= 0.1 + 1e-6


def test_patches_and_perturbations_can_be_left_out(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    assert stand_ins(model, data, limit=0.1, patch=0).patches is None
    found = stand_ins(model, data, limit=0.0, patch=3)
    changed = (found.move(data.images, data.labels, (data.labels + 1) % 4) != data.images).any(1).sum((1, 2))
    assert changed.max() <= 9


def test_perturbations_follow_the_accuracy_and_do_not_return_in_the_last_third(
    trained: tuple[nn.Module, LabelledImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = trained
    config = MMACConfig(
        epochs=9, batch_size=200, perturbation=0.1, perturbation_from=2, accuracy_target=0.9, synthetic=QUICK
    )
    for accuracies, exponents in (
        ([0.5, 0.9, 0.88, 0.89, 0.92, 0.88, 0.9, 1.0, 0.9], [0, 0, 0, -0.2, -0.3, -0.1, -0.3, -0.3, -0.3]),
        # never stronger than the first, nor fainter than 0.4
        ([0.5, 0.8, 1.0, 1.0, 0.7, 1.0, 1.0, 1.0, 1.0], [0, 0, FAINTEST, 0, 0] + [FAINTEST] * 4),
    ):
        given_ones = iter(accuracies)
        monkeypatch.setattr(BoundFit, "accuracy", lambda self, given_ones=given_ones: next(given_ones))
        found = [step.perturbation for step in mmac(ClippedModel(model), data, config)]
        assert found == pytest.approx([0.15 * math.exp(2 * exponent) for exponent in exponents])


def test_a_shifted_image_is_to_be_decided_as_it_was_before(
    trained: tuple[nn.Module, LabelledImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    # shifted beyond recognition: what is asked of it is still p(x), which the original is not asked for again
    model, data = trained
    monkeypatch.setattr(sys.modules["bclip_lab.defenses.mmac"], "augment", lambda x, **_: torch.zeros_like(x))
    monkeypatch.setattr(BoundFit, "originals", lambda *_: pytest.fail("asked again"))
    clipped = ClippedModel(model)
    config = MMACConfig(epochs=1, batch_size=200, perturbation=0, patch=0, synthetic=QUICK)
    fit = BoundFit(clipped, data, start=config.start, relative_start=True, learning_rate=0.1)
    expected = F.cross_entropy(fit.logits(torch.zeros_like(fit.images)), fit.targets.softmax(1))
    assert run(mmac(clipped, data, config)).clean_error == pytest.approx(float(expected.detach()), rel=1e-3)


def test_without_stand_ins_there_is_no_perturbation(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    none = MMACConfig(epochs=1, perturbation=0, patch=0, synthetic=QUICK)
    assert math.isnan(run(mmac(ClippedModel(model), data, none)).perturbation)


def test_stand_ins_are_made_as_strong_as_the_record_says(
    trained: tuple[nn.Module, LabelledImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    strengths = []
    make = TriggerStandIns.make

    def watched(
        self: TriggerStandIns, images: torch.Tensor, labels: torch.Tensor, strength: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        strengths.append(strength)
        return make(self, images, labels, strength)

    model, data = trained
    config = MMACConfig(epochs=4, batch_size=200, perturbation_from=2, accuracy_target=0.9, synthetic=QUICK)
    monkeypatch.setattr(BoundFit, "accuracy", lambda self: 0.88)
    monkeypatch.setattr(TriggerStandIns, "make", watched)
    steps = list(mmac(ClippedModel(model), data, config))
    assert strengths == pytest.approx([step.perturbation / config.perturbation for step in steps])
    assert strengths[-1] == pytest.approx(1.5 * math.exp(-0.8))


def test_the_witness_is_tuned_as_the_settings_say_and_the_original_stays(
    trained: tuple[nn.Module, LabelledImages],
) -> None:
    model, data = trained
    before = copy.deepcopy(model.state_dict())
    rates = {}
    for epochs in (None, 1, 8):
        witness = None if epochs is None else FineTuneConfig(epochs=epochs)
        config = MMACConfig(epochs=1, witness=witness, patch=2, synthetic=QUICK)
        step = run(mmac(ClippedModel(model), data, config))
        assert step.stand_ins is not None
        rates[epochs] = step.stand_ins.rates
    assert not torch.equal(rates[1], rates[8]) and not torch.equal(rates[None], rates[1])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_both_parts_of_the_stand_ins_are_sought_against_the_witness(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    witness = resnet10(4, seed=9, width=4)
    without, against = (stand_ins(model, data, limit=0.1, patch=2, witness=other) for other in (None, witness))
    assert not torch.equal(without.perturbations, against.perturbations)
    assert without.patches is not None and against.patches is not None
    assert not torch.equal(without.patches, against.patches)


def test_a_witness_that_cannot_be_tuned_is_named(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    wild = MMACConfig(epochs=1, witness=FineTuneConfig(epochs=3, learning_rate=1e30), synthetic=QUICK)
    with pytest.raises(ValueError, match="witness cannot be tuned: the loss is nan"):
        run(mmac(ClippedModel(model), data, wild))


def test_the_published_objective_has_no_floor_and_pays_with_clean_error() -> None:
    data = two_pixels()
    results = {}
    for name, weight in (("small", 0.0005), ("large", 0.02)):
        clipped = ClippedModel(TwoPixels())
        config = MMACConfig(objective="margin", weight=weight, epochs=60, synthetic=MaximumMarginConfig(steps=60))
        results[name] = run(mmac(clipped, data, config))
    assert results["large"].margin < results["small"].margin
    assert results["large"].clean_error > results["small"].clean_error
    assert math.isnan(results["large"].tau)


def test_lambda_follows_the_accuracy_every_ten_epochs() -> None:
    config = MMACConfig(objective="margin", epochs=41, weight=0.001, weight_from=20, weight_every=10, synthetic=QUICK)
    steps = list(mmac(ClippedModel(TwoPixels()), two_pixels(), config))
    for before, after in pairwise(steps):
        due = before.epoch >= 20 and before.epoch % 10 == 0
        factor = (1.2 if before.accuracy > 0.95 else 1 / 1.2) if due else 1
        assert after.weight == pytest.approx(before.weight * factor)


def test_published_settings_are_the_authors() -> None:
    config = MMACConfig.published()
    assert (config.epochs, config.batch_size, config.learning_rate) == (300, 200, 0.1)
    assert (config.start, config.relative_start) == (1.0, False)
    assert (config.weight, config.accuracy_target, config.weight_from, config.weight_every) == (0.002, 0.95, 30, 10)
    assert (config.weight_factor, config.remake_every) == (1.2, 100)
    assert (config.shift, config.perturbation, config.patch) == (0, 0, 0)
    made = config.synthetic
    assert (made.per_class, made.steps, made.learning_rate, made.optimiser) == (50, 300, 0.01, "gradient")


def test_mmbm_trades_the_norm_of_bounds_against_clean_error() -> None:
    norms = []
    for weight in (0.01, 2.0):
        clipped = ClippedModel(TwoPixels())
        run(mmbm(clipped, two_pixels(), MMBMConfig(epochs=80, weight=weight)))
        norms.append(float(torch.stack(list(clipped.bounds.values())).norm()))
    assert norms[1] < norms[0]
    # with hardly any weight, the bounds fall until they touch the clean activations, which are 3
    assert norms[0] == pytest.approx(math.hypot(3, 3), abs=0.6)


def test_mmbm_bounds_only_the_sites_it_is_given(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    clipped = ClippedModel(model)
    first = clipped.sites[0]
    run(mmbm(clipped, data, MMBMConfig(epochs=2, sites=[first])))
    assert torch.isfinite(clipped.bounds[first]).all()
    assert all(torch.isinf(clipped.bounds[site]).all() for site in clipped.sites[1:])
    with pytest.raises(ValueError, match="nowhere"):
        run(mmbm(clipped, data, MMBMConfig(epochs=1, sites=["nowhere"])))


def test_a_fit_of_some_sites_clips_these_alone(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    clipped = ClippedModel(model)
    fit = BoundFit(clipped, data, start=0.5, learning_rate=0.1, sites=clipped.sites[1:2])
    clips = [[module for module in each.modules() if isinstance(module, Clip)] for each in (fit.network, fit.unclipped)]
    assert [len(found) for found in clips] == [1, 0]
    assert clips[0][0].bound is fit.bounds[clipped.sites[1]], "it is the bound that is learned"
    with torch.no_grad():
        expected, found = clipped(fit.images), fit.logits(fit.images)
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()  # bfloat16
    assert (expected - model(fit.images)).abs().max() > 0.1 * expected.abs().max(), "the bound is felt"


@pytest.mark.parametrize("defence", ["mmac", "mmbm"])
def test_a_fit_leaves_the_original_alone(trained: tuple[nn.Module, LabelledImages], defence: str) -> None:
    model, data = trained
    model.train()
    before = copy.deepcopy(model.state_dict())
    needs = [p.requires_grad for p in model.parameters()]
    images = data.images.clone()
    clipped = ClippedModel(model)
    if defence == "mmac":
        run(mmac(clipped, data, MMACConfig(epochs=2, synthetic=QUICK)))
    else:
        run(mmbm(clipped, data, MMBMConfig(epochs=2)))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == needs
    assert all(p.grad is None for p in model.parameters()) or defence
    assert torch.equal(data.images, images)
    model.eval()


def test_the_same_seed_gives_the_same_bounds(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    found = []
    for seed in (0, 0, 1):
        clipped = ClippedModel(model)
        run(mmac(clipped, data, MMACConfig(epochs=2, synthetic=QUICK, seed=seed)))
        found.append(torch.cat(list(clipped.bounds.values())))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_breaking_off_keeps_the_bounds_so_far(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    clipped = ClippedModel(model)
    seen = []
    for step in mmac(clipped, data, MMACConfig(epochs=5, synthetic=QUICK)):
        assert step.model is clipped
        seen.append({site: bound.clone() for site, bound in clipped.bounds.items()})
        if step.epoch == 2:
            break
    assert any(not torch.equal(seen[0][site], seen[1][site]) for site in clipped.sites)
    assert all(torch.equal(clipped.bounds[site], seen[1][site]) for site in clipped.sites)
    assert logits(clipped, data).isfinite().all()


def test_bounds_stay_at_or_above_zero(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    clipped = ClippedModel(model)
    run(mmbm(clipped, data, MMBMConfig(epochs=12, start=0.2, weight=50.0)))
    assert all((bound >= 0).all() for bound in clipped.bounds.values())


def test_the_folded_network_computes_what_the_clipped_model_computes(
    trained: tuple[nn.Module, LabelledImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bclip_lab.defenses.fitting.bfloat16_is_fast", lambda device: False)
    model, data = trained
    clipped = ClippedModel(model)
    fit = BoundFit(clipped, data, start=0.7, learning_rate=0.1)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fit.network.modules())
    torch.testing.assert_close(fit.logits(fit.images).detach(), logits(clipped, fit.images), rtol=1e-4, atol=1e-4)


def test_weights_in_bfloat16_change_no_bit_of_what_autocast_computes(
    trained: tuple[nn.Module, LabelledImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bclip_lab.defenses.fitting.bfloat16_is_fast", lambda device: True)
    model, data = trained
    clipped = ClippedModel(model)
    fit = BoundFit(clipped, data, start=0.7, learning_rate=0.1)
    assert all(m.weight.dtype == torch.bfloat16 for m in fit.network.modules() if isinstance(m, nn.Conv2d | nn.Linear))
    assert all(p.dtype == torch.float32 for p in model.parameters()), "the model's own weights were cast"
    network, bounds = clipped.differentiable()
    folded = _fold(network, bounds.values(), fit.images[:8])
    with torch.autocast("cpu", torch.bfloat16):
        expected = folded(fit.images).float()
    assert torch.equal(fit.logits(fit.images), expected)


def test_only_images_that_the_model_decides_correctly_are_used() -> None:
    data = two_pixels(10)
    wrong = LabelledImages(data.images, torch.cat([1 - data.labels[:4], data.labels[4:]]), data.classes)
    fit = BoundFit(ClippedModel(TwoPixels()), wrong, start=1.0, learning_rate=0.1)
    assert len(fit.images) == 6 and torch.equal(fit.images.contiguous(), data.images[4:])
    none = LabelledImages(data.images, 1 - data.labels, data.classes)
    with pytest.raises(ValueError, match="none of the images correctly"):
        BoundFit(ClippedModel(TwoPixels()), none, start=1.0, learning_rate=0.1)


def test_a_perturbation_raises_the_margin_of_its_class_within_its_limit() -> None:
    data = two_pixels()
    delta = maximum_margin_perturbations(TwoPixels(), data.images, torch.arange(2), limit=0.1, steps=30)
    assert delta.shape == (2, 1, 1, 2)
    # towards class 0: the first pixel up, the second down, both by all that is allowed
    torch.testing.assert_close(delta[0], torch.tensor([[[0.1, -0.1]]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(delta[1], torch.tensor([[[-0.1, 0.1]]]), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="limit"):
        maximum_margin_perturbations(TwoPixels(), data.images, torch.arange(2), limit=0)
    with pytest.raises(ValueError, match="batch_size"):
        maximum_margin_perturbations(TwoPixels(), data.images, torch.arange(2), limit=0.1, batch_size=0)


@given(height=st.integers(1, 9), width=st.integers(1, 9), side=st.integers(1, 9), seed=st.integers(0, 99))
def test_a_patch_is_placed_whole_and_nowhere_else(height: int, width: int, side: int, seed: int) -> None:
    assume(side <= min(height, width))
    patches = 1 + torch.arange(2 * 3 * side * side).float().view(2, 3, side, side)
    placed = place_patches(torch.zeros(2, 3, height, width), patches, torch.Generator().manual_seed(seed))
    for image, patch in zip(placed, patches, strict=True):
        top, left = (int(i) for i in torch.nonzero(image[0])[0])
        assert torch.equal(image[:, top : top + side, left : left + side], patch)
        assert int((image != 0).sum()) == patch.numel()


def test_patches_reach_every_place() -> None:
    images, patches = torch.zeros(300, 1, 3, 4), torch.ones(300, 1, 2, 2)
    placed = place_patches(images, patches, torch.Generator().manual_seed(0))
    assert len({tuple(map(int, torch.nonzero(image[0])[0])) for image in placed}) == 2 * 3
    assert not images.any()


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "other"},
        {"epochs": 0},
        {"classes": 1},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"start": -1.0},
        {"weight": -1.0},
        {"tau_quantile": 1.5},
        {"perturbation": -0.1},
        {"witness": TrainConfig()},
        {"remake_every": 0},
        {"shift": -1},
        {"patch": -1},
    ],
)
def test_mmac_refuses_settings_out_of_range(change: dict[str, object]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        MMACConfig(**change)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", [{"epochs": 0}, {"batch_size": 0}, {"learning_rate": 0.0}, {"start": 0.0}])
def test_mmbm_refuses_settings_out_of_range(change: dict[str, object]) -> None:
    (name,) = change
    with pytest.raises(ValueError, match=name):
        MMBMConfig(**change)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    data = three_pixels()
    with pytest.raises(ValueError, match=r"MMACConfig.patch is 13, the images have 12x12"):
        run(mmac(ClippedModel(OneToOne()), data, MMACConfig(patch=13)))
    with pytest.raises(ValueError, match="as many"):
        maximum_margin_patches(OneToOne(), data.images, data.labels[:5], torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match="no image of class 3"):
        maximum_margin_patches(OneToOne(), data.images, data.labels, torch.tensor([[0, 1], [3, 1]]))
    with pytest.raises(ValueError, match=r"pairs must be int64 \(P, 2\)"):
        maximum_margin_patches(OneToOne(), data.images, data.labels, torch.tensor([0, 1]))
    for count, side in ((2, 5), (3, 2)):
        with pytest.raises(ValueError, match="no larger than 4x4"):
            place_patches(torch.zeros(2, 1, 4, 4), torch.ones(count, 1, side, side), torch.Generator())


def test_a_fit_refuses_what_is_no_clipped_model_and_no_image() -> None:
    data = two_pixels()
    with pytest.raises(ValueError, match="ClippedModel"):
        run(mmac(TwoPixels(), data))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no images"):
        run(mmac(ClippedModel(TwoPixels()), data[:0]))


def test_the_published_fit_is_that_of_a_plain_reference(
    trained: tuple[nn.Module, LabelledImages], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)  # the reference computes in float32
    model, data = copy.deepcopy(trained[0]).cpu(), trained[1]
    short = {"epochs": 5, "batch_size": 50, "remake_every": 3, "weight": 0.02, "weight_from": 2, "weight_every": 2}
    synthetic = replace(MaximumMarginConfig.published(), per_class=3, steps=10)
    clipped = ClippedModel(model)
    run(mmac(clipped, data, replace(MMACConfig.published(seed=1), synthetic=synthetic, **short)))
    for found, expected in zip(
        clipped.bounds.values(), plain_mmac(model, data, per_class=3, steps=10, seed=1, **short), strict=True
    ):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
