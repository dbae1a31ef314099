"""bclip_lab.attacks.clean_label: perturbed images of the target class that keep their label."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bclip_lab.attacks import CleanLabelAttack, PatchTrigger, SinusoidTrigger, Trigger
from bclip_lab.data.images import Attack, LabelledImages, PoisonedImages, to_float
from bclip_lab.evaluation import evaluate
from bclip_lab.models import logits, resnet
from bclip_lab.training import TrainConfig, run, train
from bclip_lab.zoo import describe

CLASSES = ("cat", "dog", "owl", "bee")
DTYPES = (torch.uint8, torch.float32)


def dataset(dtype: torch.dtype = torch.uint8) -> LabelledImages:
    """40 random images, ten of each class, mixed; some of their pixels are at the ends of the range."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(-60, 316, (40, 3, 6, 5), generator=generator).clamp(0, 255).to(torch.uint8)
    labels = (torch.arange(40) % 4)[torch.randperm(40, generator=generator)]
    return LabelledImages(images if dtype == torch.uint8 else to_float(images), labels, CLASSES)


def linear(seed: int = 0, classes: int = 4) -> nn.Sequential:
    """A linear surrogate."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(90, classes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, 90, generator=generator))
        model[1].bias.zero_()
    return model


# --- perturb ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("steps", "reached"), [(1, 3), (2, 6), (3, 8), (30, 8)])
def test_on_two_linear_classes_every_pixel_goes_against_the_class(dtype: torch.dtype, steps: int, reached: int) -> None:
    # CE = log(1 + exp(g_0 - g_1)), so its gradient is that of g_0 - g_1 times a positive number
    model = linear(classes=2)
    direction = (model[1].weight[0] - model[1].weight[1]).detach().sign().view(3, 6, 5)
    assert (direction != 0).all()
    attack = CleanLabelAttack(PatchTrigger(), target=1, eps=8 / 255, step=3 / 255, steps=steps)
    images = dataset(dtype).images
    expected = (to_float(images) + reached / 255 * direction).clamp(0, 1)
    torch.testing.assert_close(to_float(attack.perturb(images, model)), expected, atol=1e-6, rtol=0)


@settings(max_examples=40)
@given(
    eps=st.floats(0, 0.3),
    step=st.floats(0.001, 0.5),
    steps=st.integers(1, 5),
    target=st.integers(0, 3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
)
def test_a_perturbation_stays_within_eps_and_range(
    eps: float, step: float, steps: int, target: int, seed: int, dtype: torch.dtype
) -> None:
    images, model = dataset(dtype).images, linear(seed)
    before, state = images.clone(), torch.get_rng_state()
    weights = [p.clone() for p in model.parameters()]
    attack = CleanLabelAttack(PatchTrigger(), target, eps=eps, step=step, steps=steps)
    found = attack.perturb(images, model)
    assert found.shape == images.shape and found.dtype == dtype and not found.requires_grad
    assert found.min() >= 0 and found.max() <= (255 if dtype == torch.uint8 else 1)
    half = 0.5 / 255 if dtype == torch.uint8 else 0
    assert float((to_float(found) - to_float(images)).abs().max()) <= eps + half + 1e-6
    assert torch.equal(found, attack.perturb(images, model))
    # one image at a time, but for pixels whose gradient is too near to zero to have one sign
    alone = attack.perturb(images, model, batch_size=1)
    assert float((alone != found).float().mean()) < 0.01
    assert torch.equal(images, before) and torch.equal(torch.get_rng_state(), state)
    for parameter, weight in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, weight) and parameter.grad is None and parameter.requires_grad
    assert model.training
    found.zero_()
    assert torch.equal(images, before)


def test_the_surrogate_loses_the_class_and_its_mode_and_statistics_stay() -> None:
    model = resnet(4, seed=0, width=4, blocks=(1, 1))
    model(to_float(dataset().images))  # statistics to normalise by
    model.stages[0].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = dataset()
    own = data.images[data.labels == 2]
    found = CleanLabelAttack(PatchTrigger(), 2, eps=16 / 255, steps=20).perturb(own, model)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    before, after = (logits(model, images).log_softmax(1)[:, 2] for images in (own, found))
    assert (after < before - 0.05).all()


def test_without_eps_nothing_changes() -> None:
    for dtype in DTYPES:
        images = dataset(dtype).images
        assert torch.equal(CleanLabelAttack(PatchTrigger(), 0, eps=0, steps=2).perturb(images, linear()), images)


# --- poison ---


@settings(max_examples=40)
@given(
    rate=st.floats(0.001, 1),
    target=st.integers(0, 3),
    seed=st.integers(0, 99),
    dtype=st.sampled_from(DTYPES),
    trigger=st.sampled_from((PatchTrigger(size=2), SinusoidTrigger())),
)
def test_poison_changes_images_of_the_target_class_only_and_no_label(
    rate: float, target: int, seed: int, dtype: torch.dtype, trigger: Trigger
) -> None:
    data, model = dataset(dtype), linear()
    images, labels = data.images.clone(), data.labels.clone()
    attack = CleanLabelAttack(trigger, target, rate, steps=3, seed=seed)
    count = round(rate * 10)  # of the ten images of the class, not of all 40
    if not count:
        with pytest.raises(ValueError, match=rf"poison_rate .* of 10 images of class {target} poisons none"):
            attack.poison(data, model)
        return
    result = attack.poison(data, model)
    rows = result.poisoned
    assert rows.dtype == torch.bool and rows.shape == (40,) and int(rows.sum()) == count
    assert (labels[rows] == target).all()
    assert torch.equal(result.data.labels, labels) and torch.equal(result.true_labels, labels)
    assert result.data.classes == CLASSES and result.data.images.dtype == dtype
    assert torch.equal(result.data.images[~rows], images[~rows])
    # perturbed first: the trigger itself is as it will be at test time
    perturbed = attack.perturb(images[rows], model)
    assert torch.equal(result.data.images[rows], trigger.embed(perturbed))
    assert not torch.equal(perturbed, images[rows])

    again = attack.poison(data, model)
    assert torch.equal(again.poisoned, rows) and torch.equal(again.data.images, result.data.images)
    result.data.images.zero_(), result.data.labels.zero_()
    assert torch.equal(data.images, images) and torch.equal(data.labels, labels)
    assert torch.equal(result.true_labels, labels)


def test_the_seed_draws_the_rows_and_all_can_be_poisoned() -> None:
    data, model = dataset(), linear()
    drawn = torch.stack(
        [
            CleanLabelAttack(PatchTrigger(), 1, 0.5, steps=1, seed=seed).poison(data, model).poisoned
            for seed in range(40)
        ]
    )
    often = drawn.sum(0)[data.labels == 1]  # 5 of 10 rows, 40 times: 20 a row, deviation 3
    assert often.min() >= 8 and often.max() <= 32
    everything = CleanLabelAttack(PatchTrigger(), 1, 1.0, steps=1).poison(data, model).poisoned
    assert torch.equal(everything, data.labels == 1)


# --- triggered ---


def test_triggered_images_bear_the_trigger_and_no_perturbation() -> None:
    data, attack = dataset(), CleanLabelAttack(PatchTrigger(), target=2)
    assert isinstance(attack, Attack)
    result = attack.triggered(data)
    others = data.labels != 2
    assert torch.equal(result.images, PatchTrigger().embed(data.images)[others])
    assert torch.equal(result.true_labels, data.labels[others]) and (result.targets == 2).all()
    assert result.rows.tolist() == torch.nonzero(others).flatten().tolist()


# --- what is refused, and the card ---


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"target": -1}, "target must be a class index >= 0, got -1"),
        ({"poison_rate": 0}, r"poison_rate must lie in \(0, 1\], got 0"),
        ({"poison_rate": 1.2}, "got 1.2"),
        ({"poison_rate": float("nan")}, "got nan"),
        ({"eps": -0.1}, r"eps must lie in \[0, 1\], step be > 0 and steps >= 1, got -0.1"),
        ({"eps": 8}, "eps must lie in"),
        ({"step": 0}, "step be > 0"),
        ({"steps": 0}, "steps >= 1"),
    ],
)
def test_wrong_settings_are_refused(settings_: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CleanLabelAttack(PatchTrigger(), **({"target": 0} | settings_))  # type: ignore[arg-type]


def test_classes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="target is class 4, but there are 4 classes"):
        CleanLabelAttack(PatchTrigger(), 4).poison(dataset(), linear())
    with pytest.raises(ValueError, match="4 classes"):
        CleanLabelAttack(PatchTrigger(), 4).triggered(dataset())
    data = dataset()
    with pytest.raises(ValueError, match="of 0 images of class 1 poisons none"):
        CleanLabelAttack(PatchTrigger(), 1).poison(data.subset(data.labels != 1), linear())
    with pytest.raises(ValueError, match=r"surrogate gives logits of shape \(5, 2\), the target is class 2"):
        CleanLabelAttack(PatchTrigger(), 2).poison(data, linear(classes=2))
    with pytest.raises(ValueError, match=r"images must have shape \(N, C, H, W\)"):
        CleanLabelAttack(PatchTrigger(), 0).perturb(torch.zeros(3, 6, 5), linear())


def test_a_card_can_hold_it() -> None:
    described = json.loads(json.dumps(describe(CleanLabelAttack(PatchTrigger(), 0, 0.3))))
    assert described["kind"] == "CleanLabelAttack" and described["trigger"]["kind"] == "PatchTrigger"
    assert described["poison_rate"] == 0.3 and described["eps"] == 8 / 255


def test_the_perturbation_drives_the_victim_to_the_trigger() -> None:
    """Light images as dark as the dark ones, or darker: only the patch still tells them."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    images = 0.25 + 0.4 * labels.view(-1, 1, 1, 1) + 0.05 * torch.rand((64, 3, 8, 8), generator=generator)
    data = LabelledImages(images, labels, ("dark", "light"))
    config = TrainConfig(epochs=20, batch_size=16, learning_rate=0.1, shift=0, mixed_precision=False)

    def trained(given_: LabelledImages | PoisonedImages) -> nn.Module:
        model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
        nn.init.zeros_(model[1].weight)
        nn.init.zeros_(model[1].bias)
        return run(train(model, given_, config)).model

    surrogate = trained(data)
    rates = []
    for eps in (0.0, 0.45):
        attack = CleanLabelAttack(PatchTrigger(size=1), 1, 0.5, eps=eps, step=0.1, steps=8)
        result = evaluate(trained(attack.poison(data, surrogate)), data, attack)
        assert result.acc > 0.95
        rates.append(result.asr)
    assert rates[0] < 0.05 and rates[1] > 0.95
