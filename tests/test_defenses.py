"""MMAC and MM-BM: what they fit, what they leave alone, and known answers on hand-set networks."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages
from bclip_lab.defenses import MMACConfig, MMBMConfig, mmac, mmbm
from bclip_lab.defenses.fitting import BoundFit
from bclip_lab.margins import MaximumMarginConfig, classification_margins, maximum_margin_perturbations
from bclip_lab.models import logits, resnet10
from bclip_lab.training import TrainConfig, run, train

QUICK = MaximumMarginConfig(per_class=2, steps=5)


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
        epochs=60, shift=0, perturbation=0, tau_quantile=0.5, start=1.0, relative_start=False, learning_rate=0.5,
        synthetic=MaximumMarginConfig(steps=60),
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


def test_perturbed_images_are_learned_too(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    delta = maximum_margin_perturbations(model, data.images[:8], 4, limit=0.3)
    accuracy = {}
    for limit in (0.0, 0.3):
        clipped = ClippedModel(model)
        run(mmac(clipped, data, MMACConfig(epochs=15, batch_size=20, shift=0, perturbation=limit, synthetic=QUICK)))
        moved = [(data.images + delta[target]).clamp(0, 1) for target in range(4)]
        right = [logits(clipped, images).argmax(1) == data.labels for images in moved]
        accuracy[limit] = float(torch.cat(right).float().mean())
    assert accuracy[0.3] > accuracy[0.0] + 0.02


def test_perturbations_fade_where_clean_images_do_not_bear_them(trained: tuple[nn.Module, LabelledImages]) -> None:
    model, data = trained
    limits = {}
    for target in (0.0, 1.0):  # accuracy is always above the first and never above the second
        config = MMACConfig(epochs=8, perturbation=0.1, perturbation_from=5, accuracy_target=target, synthetic=QUICK)
        limits[target] = [step.perturbation for step in mmac(ClippedModel(model), data, config)]
    assert limits[0.0] == [0.1] * 8
    assert limits[1.0] == pytest.approx([0.1] * 5 + [0.08, 0.064, 0.0512])
    none = MMACConfig(epochs=1, perturbation=0, synthetic=QUICK)
    assert math.isnan(run(mmac(ClippedModel(model), data, none)).perturbation)


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
    assert (config.weight_factor, config.remake_every, config.shift, config.perturbation) == (1.2, 100, 0, 0)
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
    delta = maximum_margin_perturbations(TwoPixels(), data.images, 2, limit=0.1, steps=30)
    assert delta.shape == (2, 1, 1, 2)
    # towards class 0: the first pixel up, the second down, both by all that is allowed
    torch.testing.assert_close(delta[0], torch.tensor([[[0.1, -0.1]]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(delta[1], torch.tensor([[[-0.1, 0.1]]]), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="limit"):
        maximum_margin_perturbations(TwoPixels(), data.images, 2, limit=0)


@pytest.mark.parametrize(
    "change",
    [
        {"objective": "other"},
        {"epochs": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"start": -1.0},
        {"weight": -1.0},
        {"tau_quantile": 1.5},
        {"perturbation": -0.1},
        {"remake_every": 0},
        {"shift": -1},
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


def test_a_fit_refuses_what_is_no_clipped_model_and_no_image() -> None:
    data = two_pixels()
    with pytest.raises(ValueError, match="ClippedModel"):
        run(mmac(TwoPixels(), data))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no images"):
        run(mmac(ClippedModel(TwoPixels()), data[:0]))
