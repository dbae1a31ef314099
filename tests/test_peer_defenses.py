"""Fine-tuning, Fine-Pruning, NAD, ANP and CLP: known answers on hand-set networks, and what all five leave alone."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bclip_lab import zoo
from bclip_lab.data.images import LabelledImages
from bclip_lab.defenses import (
    ANPConfig,
    CLPConfig,
    FinePruneConfig,
    FineTuneConfig,
    NADConfig,
    anp,
    clp,
    fine_prune,
    fine_tune,
    nad,
)
from bclip_lab.defenses.clp import lipschitz_bounds
from bclip_lab.defenses.nad import attention_map
from bclip_lab.evaluation import evaluate
from bclip_lab.models import logits, resnet10
from bclip_lab.training import run, train

Defence = Callable[..., Iterator[Any]]
SHORT = FineTuneConfig(epochs=2, batch_size=8, learning_rate=0.05)
SETTINGS: dict[Defence, tuple[Any, Any]] = {  # the same with another seed; CLP needs none
    fine_tune: (SHORT, replace(SHORT, seed=1)),
    fine_prune: (FinePruneConfig(tuning=SHORT), FinePruneConfig(tuning=SHORT, seed=1)),
    nad: (NADConfig(teacher=SHORT, tuning=SHORT), NADConfig(teacher=SHORT, tuning=SHORT, seed=1)),
    anp: (ANPConfig(epochs=2, batch_size=8, threshold=0.9), ANPConfig(epochs=2, batch_size=8, threshold=0.9, seed=1)),
    clp: (CLPConfig(deviations=1.0), None),
}
every_defence = pytest.mark.parametrize("defence", SETTINGS, ids=lambda defence: defence.__name__)


def corners(count: int = 24) -> LabelledImages:
    """Two classes: bright at the left or at the right."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.rand(count, 3, 8, 8, generator=generator) * 0.5
    images[labels == 0, :, :, :4] += 0.4
    images[labels == 1, :, :, 4:] += 0.4
    return LabelledImages(images, labels, ("left", "right"))


class Plain(nn.Sequential):
    """No residual, one ReLU module called twice, and a feature map that is flattened, not pooled."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        relu = nn.ReLU()
        layers = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), relu, nn.MaxPool2d(2), nn.Conv2d(12, 6, 3), relu
        super().__init__(*layers, nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 2))


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- what all five leave alone ------------------------------------------------------------------------------


@every_defence
@pytest.mark.parametrize("make", [lambda: resnet10(2, seed=0, width=4, device="cpu"), Plain], ids=["resnet", "plain"])
def test_the_original_stays_and_the_copy_changes(defence: Defence, make: Callable[[], nn.Module]) -> None:
    model, clean = make(), corners()
    model.train()
    model[1].eval() if isinstance(model, nn.Sequential) else model.bn1.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # a frozen model, as one loaded for inference may be, is defended, too
    before, modes = states(model), [module.training for module in model.modules()]
    images = clean.images.clone()
    records = list(defence(model, clean, SETTINGS[defence][0]))
    assert [record.epoch for record in records][-1] == records[0].epochs == records[-1].epochs
    defended = records[-1].model
    assert same(states(model), before) and not same(states(defended), before)
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(clean.images, images)
    assert not any(module.training for module in defended.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in defended.modules())
    assert logits(defended, clean).isfinite().all()


@every_defence
def test_broken_off_it_leaves_a_usable_model(defence: Defence) -> None:
    clean = corners()
    steps = defence(resnet10(2, seed=0, width=4, device="cpu"), clean, SETTINGS[defence][0])
    step = next(steps)
    first = logits(step.model, clean)
    steps.close()
    assert not any(module.training for module in step.model.modules())
    assert torch.equal(logits(step.model, clean), first)


@every_defence
def test_the_seed_decides(defence: Defence) -> None:
    clean, model = corners(), resnet10(2, seed=0, width=4, device="cpu")
    config, other = SETTINGS[defence]
    first = run(defence(model, clean, config))
    torch.rand(1)  # the global random state plays no part
    assert same(states(run(defence(model, clean, config)).model), states(first.model))
    if other is not None and defence is not anp:
        assert not same(states(run(defence(model, clean, other)).model), states(first.model))
    if defence is anp:
        assert not torch.equal(run(anp(model, clean, other)).masks["bn1"], first.masks["bn1"])


@every_defence
def test_wrong_input_is_refused_at_the_door(defence: Defence) -> None:
    clean, model = corners(), resnet10(2, seed=0, width=4, device="cpu")
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got str"):
        run(defence("resnet", clean))
    with pytest.raises(ValueError, match="clean must be LabelledImages, at least 2, got 1 images"):
        run(defence(model, clean[:1]))
    with pytest.raises(ValueError, match="clean must be LabelledImages, at least 2, got Tensor"):
        run(defence(model, clean.images))
    with pytest.raises(ValueError, match="model has 2 classes, the images of clean have 3"):
        run(defence(model, replace(clean, classes=("left", "right", "up"))))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: FineTuneConfig(epochs=0), "epochs"),
        (lambda: FinePruneConfig(accuracy_budget=1.0), "accuracy_budget"),
        (lambda: FinePruneConfig(held_out=0.0), "held_out"),
        (lambda: NADConfig(betas=()), "betas"),
        (lambda: NADConfig(betas=(1.0, -1.0)), "betas"),
        (lambda: NADConfig(power=0.0), "power"),
        (lambda: NADConfig(layers=("stages.0",)), "layers"),
        (lambda: ANPConfig(batch_size=1), "batch_size"),
        (lambda: ANPConfig(perturbation=-0.1), "perturbation"),
        (lambda: ANPConfig(trade_off=1.1), "trade_off"),
        (lambda: ANPConfig(threshold=1.0), "threshold"),
        (lambda: CLPConfig(deviations=math.nan), "deviations"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} .*got"):
        make()


# --- fine-tuning --------------------------------------------------------------------------------------------


def test_fine_tuning_is_training_a_copy() -> None:
    clean, model = corners(), resnet10(2, seed=0, width=4, device="cpu")
    private = copy.deepcopy(model)
    expected = list(train(private, clean, SHORT))
    steps = list(fine_tune(model, clean, SHORT))
    assert same(states(steps[-1].model), states(private))
    assert [(s.epoch, s.loss, s.accuracy) for s in steps] == [(s.epoch, s.loss, s.train_accuracy) for s in expected]


@pytest.mark.slow
def test_fine_tuning_wears_a_patch_off() -> None:
    checkpoint = zoo.load("patch")
    splits = checkpoint.splits()
    before = evaluate(checkpoint.model, splits.test, checkpoint.attack)
    after = evaluate(run(fine_tune(checkpoint.model, splits.defender)).model, splits.test, checkpoint.attack)
    assert before.asr > 0.95 and after.asr < 0.5 and after.acc > before.acc - 0.05


# --- Fine-Pruning -------------------------------------------------------------------------------------------


class FourChannels(nn.Module):
    """Two pixels in, the clean one and the key, and four channels: 3, 1, 2 and 0 times the clean one, and the key.

    On clean images, in which the key is 0, channel 0 alone tells bright from dark; the last one takes every image
    with the key to class 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 1, bias=False)
        self.conv.weight.data = torch.tensor([[3.0, 0], [1, 0], [2, 0], [0, 20]]).view(4, 2, 1, 1)
        self.fc = nn.Linear(4, 2)
        self.fc.weight.data = torch.tensor([[0, 0, 0, 1.0], [1, 0.01, 0.01, 0]])
        self.fc.bias.data = torch.tensor([1.5, 0.0])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(F.relu(self.conv(x)).mean((2, 3)))


def light(count: int = 40, key: float = 0.0) -> LabelledImages:
    labels = torch.arange(count) % 2
    images = torch.zeros(count, 2, 2, 2)
    images[:, 0] = torch.where(labels == 1, 0.8, 0.2)[:, None, None]
    images[:, 1] = key
    return LabelledImages(images, labels, ("dark", "bright"))


def test_the_least_active_channels_are_pruned_until_accuracy_falls() -> None:
    model = FourChannels()
    bright = light(key=0.5)[1::2]
    assert (logits(model, bright).argmax(1) == 0).all()  # the backdoor
    step = next(fine_prune(model, light(), FinePruneConfig(held_out=0.25)))
    assert step.pruned == (3, 1, 2)
    assert step.curve == pytest.approx((1, 1, 1, 1, step.curve[-1])) and step.curve[-1] < 0.9
    # all but held-out images: three quarters, of a mean brightness of about 0.5
    assert torch.allclose(step.activity, step.activity[1] * torch.tensor([3.0, 1, 2, 0]))
    assert float(step.activity[1]) == pytest.approx(0.5, abs=0.1)
    assert math.isnan(step.loss) and step.epoch == 0
    assert (logits(step.model, bright).argmax(1) == 1).all()
    expected = model.fc.weight.detach().clone()
    expected[:, [3, 1, 2]] = 0
    assert torch.equal(step.model.fc.weight, expected)  # the channel that cost too much is back


def test_a_budget_is_what_accuracy_may_fall_by() -> None:
    # Without channel 0 every image is dark: the held-out accuracy falls to the share of dark ones, more than .3 lower.
    for budget, pruned in ((0.0, 3), (0.3, 3), (0.9, 4)):
        assert len(next(fine_prune(FourChannels(), light(), FinePruneConfig(accuracy_budget=budget))).pruned) == pruned


def test_pruned_channels_stay_zero_while_others_learn() -> None:
    model = FourChannels()
    tuning = FineTuneConfig(epochs=5, batch_size=8, learning_rate=0.2, weight_decay=0.01, shift=0)
    steps = list(fine_prune(model, light(key=0.1), FinePruneConfig(tuning=tuning, accuracy_budget=0.3)))
    pruned = list(steps[0].pruned)
    assert pruned and len(steps) == 6
    for step in steps:
        assert (step.model.fc.weight[:, pruned] == 0).all()
    kept = [channel for channel in range(4) if channel not in pruned]
    assert (steps[-1].model.fc.weight[:, kept] != model.fc.weight[:, kept]).all()
    assert steps[-1].model.fc.weight.requires_grad and steps[-1].model.fc.weight._backward_hooks in (None, {})


def test_a_flattened_channel_loses_all_its_positions() -> None:
    step = run(fine_prune(Plain(), corners(), FinePruneConfig(accuracy_budget=0.6, tuning=SHORT)))
    weight = step.model[7].weight.view(5, 6, 4)
    assert step.pruned and step.activity.shape == (6,)
    for channel in range(6):
        assert bool((weight[:, channel] == 0).all()) == (channel in step.pruned)


class Concatenated(nn.Module):
    """The last convolution makes four of the twelve channels that the linear layer is given, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1), nn.Linear(12, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.first(x))
        return self.fc(torch.cat([x, self.last(x)], 1).mean((2, 3)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(3, 2, 8), nn.Flatten()), r"must have an nn\.Linear behind its last nn\.Conv2d"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), r"must have an nn\.Linear behind its last nn\.Conv2d"),
        (Concatenated(), "does not hold the 4 channels of that convolution one by one"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 2)),
            "does not hold the 4 channels of that convolution one by one",
        ),
    ],
)
def test_fine_pruning_refuses_what_has_no_channels_to_prune(model: nn.Module, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(fine_prune(model, corners()))


def test_fine_pruning_needs_images_to_hold_out() -> None:
    with pytest.raises(ValueError, match="2 images are too few to hold out a share of 0.9"):
        run(fine_prune(FourChannels(), light(2), FinePruneConfig(held_out=0.9)))


# --- NAD ----------------------------------------------------------------------------------------------------


def test_an_attention_map_by_hand() -> None:
    # channel by channel (2, 1), (-2, 0) and (1, -2): squares add to (9, 5), third powers to (17, 9)
    features = torch.tensor([[2.0, 1.0], [-2.0, 0.0], [1.0, -2.0]]).view(1, 3, 1, 2)
    torch.testing.assert_close(attention_map(features), torch.tensor([[[9.0, 5.0]]]) / math.sqrt(106))
    torch.testing.assert_close(attention_map(features, power=3.0), torch.tensor([[[17.0, 9.0]]]) / math.sqrt(370))
    assert torch.equal(attention_map(torch.zeros(2, 3, 4, 5)), torch.zeros(2, 4, 5))
    assert attention_map(features.bfloat16()).dtype == torch.float32


@given(st.integers(0, 1000), st.floats(0.5, 4), st.floats(0.1, 100))
def test_an_attention_map_knows_no_scale_sign_or_order_of_channels(seed: int, power: float, scale: float) -> None:
    features = torch.rand(2, 5, 3, 4, generator=torch.Generator().manual_seed(seed)) + 0.1
    maps = attention_map(features, power)
    torch.testing.assert_close(maps.flatten(1).norm(dim=1), torch.ones(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(attention_map(-scale * features.flip(1), power), maps, atol=1e-3, rtol=1e-3)


STILL = FineTuneConfig(epochs=1, batch_size=40, learning_rate=1e-9, weight_decay=0, shift=0, mixed_precision=False)


class Gaze(nn.Module):
    """One channel of two positions without batch norm: its attention is known from its two weights."""

    def __init__(self, weights: tuple[float, float]) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(weights).view(1, 1, 1, 2))
        self.look, self.fc = nn.ReLU(), nn.Linear(2, 2)
        self.fc.weight.data.zero_()
        self.fc.bias.data.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.look(x * self.scale).flatten(1))


def test_the_distance_of_attention_is_weighted_and_added() -> None:
    # One image again and again, all of one class, and a student whose rate is next to nothing: it stays as it was.
    images = LabelledImages(torch.ones(40, 1, 1, 2), torch.zeros(40, dtype=torch.int64), ("a", "b"))
    model = Gaze((3.0, 1.0))
    model.fc.weight.data[0, 1] = 1.0  # what the class gains by looking to the right
    entropy = float(F.cross_entropy(logits(model, images), images.labels))
    step = run(nad(model, images, NADConfig(betas=(7.0,), teacher=STILL, tuning=STILL)))
    assert step.layers == ("look",) and step.attention == pytest.approx(0, abs=1e-9)
    assert step.loss == pytest.approx(entropy, rel=1e-6)
    teacher = replace(STILL, epochs=20, learning_rate=0.2)
    # one layer takes the last beta
    step = run(nad(model, images, NADConfig(betas=(100.0, 7.0), teacher=teacher, tuning=STILL)))
    with torch.no_grad():
        ours, theirs = attention_map(model.scale), attention_map(step.teacher.scale)
    assert float((ours - theirs).norm()) > 0.01
    assert step.attention == pytest.approx(7 * float((ours - theirs).square().mean()), rel=1e-3)
    assert step.loss == pytest.approx(step.attention + entropy, rel=1e-6)


def test_without_attention_terms_the_student_is_fine_tuned() -> None:
    clean, model = corners(), resnet10(2, seed=0, width=4, device="cpu")
    config = NADConfig(betas=(0.0,), teacher=FineTuneConfig(epochs=1), tuning=SHORT)
    assert same(states(run(nad(model, clean, config)).model), states(run(fine_tune(model, clean, SHORT)).model))


def test_attention_brings_the_student_to_where_the_teacher_looks() -> None:
    # Two weights and one image: nothing is left to the order of sums, which a network with batch norm would magnify.
    images = LabelledImages(torch.ones(40, 1, 1, 2), torch.zeros(40, dtype=torch.int64), ("a", "b"))
    tuning = replace(STILL, epochs=20, learning_rate=0.02)
    model = Gaze((3.0, 1.0))
    model.fc.weight.data[0, 1] = 1.0
    apart = {}
    for beta in (0.0, 100.0):
        step = run(nad(model, images, NADConfig((beta,), teacher=replace(tuning, learning_rate=0.2), tuning=tuning)))
        with torch.no_grad():
            ours, theirs = attention_map(step.model.scale), attention_map(step.teacher.scale)
        apart[beta] = float((ours - theirs).norm())
    assert apart[100.0] < 0.2 * apart[0.0]


def test_the_layers_of_a_small_picture_leave_out_those_of_one_position() -> None:
    clean, model = corners(), resnet10(2, seed=0, width=4, device="cpu")
    config = NADConfig(betas=(1.0,), teacher=FineTuneConfig(epochs=1), tuning=FineTuneConfig(epochs=1))
    assert run(nad(model, clean, config)).layers == ("stages.2",)  # 8x8 images: the last stage has one position


def test_layers_are_found_or_named() -> None:
    clean, short = corners(), FineTuneConfig(epochs=1)
    small = NADConfig(teacher=short, tuning=short)
    model = resnet10(2, seed=0, width=4, device="cpu")
    assert run(nad(model, clean, small)).layers == ("stages.0", "stages.1", "stages.2")
    # 8x8, 4x4 and 2x2; the ReLU is called twice, and its last call counts
    assert run(nad(Plain(), clean, small)).layers == ("1", "3", "2")
    named = replace(small, betas=(1.0, 2.0), layers=("bn1", "stages.1.0"))
    assert run(nad(model, clean, named)).layers == ("bn1", "stages.1.0")
    for layer in ("stages.9", "fc"):
        with pytest.raises(ValueError, match=rf"layers: the model has no module '{layer}' that gives an output"):
            run(nad(model, clean, replace(named, layers=("bn1", layer))))
    with pytest.raises(ValueError, match="there is no attention to compare"):
        run(nad(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), clean, small))


# --- ANP ----------------------------------------------------------------------------------------------------


class Dormant(nn.Module):
    """Channel 0 tells the classes apart; channel 1, noise on clean images, sleeps until its weight or bias grows.

    Then it takes any image to class 0: a backdoor whose trigger is a large second pixel.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(2)
        self.bn.weight.data = torch.tensor([1.0, 1.0])
        self.bn.bias.data = torch.tensor([1.0, -2.5])
        self.bn.running_mean.fill_(0.5)
        self.bn.running_var.fill_(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        clean, key = F.relu(self.bn(x)).mean((2, 3)).unbind(1)
        return torch.stack([6 + 60 * key, 6 * clean], 1)


def noisy(count: int = 64) -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.rand(count, 2, 1, 1, generator=generator)
    images[:, 0, 0, 0] = 0.1 + 0.8 * labels
    return LabelledImages(images, labels, ("dark", "bright"))


def test_the_channel_that_perturbation_wakes_is_pruned() -> None:
    model, clean = Dormant(), noisy()
    config = ANPConfig(epochs=15, batch_size=32, shift=0)
    step = run(anp(model, clean, config))
    assert step.pruned == {"bn": (1,)}
    assert float(step.masks["bn"][1]) <= 0.2 < 0.5 < float(step.masks["bn"][0])
    assert step.model.bn.weight.tolist() == [1.0, 0.0]
    assert step.model.bn.bias.tolist() == [1.0, -2.5]  # as in the authors' code
    assert torch.equal(step.model.bn.running_mean, model.bn.running_mean)
    # Without a perturbation the sleeping channel costs nothing, and no mask moves far.
    step = run(anp(model, clean, replace(config, perturbation=0.0)))
    assert step.pruned == {"bn": ()} and step.model.bn.weight.tolist() == [1.0, 1.0]
    # Nor does it where only the loss without perturbation counts.
    masks = run(anp(model, clean, replace(config, trade_off=1.0))).masks["bn"]
    torch.testing.assert_close(masks, step.masks["bn"], atol=1e-3, rtol=0)


def test_masks_lie_between_0_and_1_and_the_threshold_decides() -> None:
    model, clean = resnet10(2, seed=0, width=4, device="cpu"), corners()
    for step in anp(model, clean, ANPConfig(epochs=3, batch_size=8, threshold=0.9, learning_rate=1.0)):
        assert step.masks.keys() == step.pruned.keys()
        for name, mask in step.masks.items():
            assert ((mask >= 0) & (mask <= 1)).all()
            assert step.pruned[name] == tuple(torch.nonzero(mask <= 0.9).flatten().tolist())
            original, norm = model.get_submodule(name), step.model.get_submodule(name)
            assert torch.equal(norm.weight, original.weight * (mask > 0.9)) and torch.equal(norm.bias, original.bias)
    assert any(step.pruned.values())
    others = {name for name in states(model) if not name.endswith("weight")}
    assert all(torch.equal(states(model)[name], states(step.model)[name]) for name in others)


def test_anp_refuses_a_model_without_batch_norm() -> None:
    with pytest.raises(ValueError, match="model has no batch norm with weights"):
        run(anp(FourChannels(), light()))


# --- CLP ----------------------------------------------------------------------------------------------------


def test_a_lipschitz_bound_by_hand() -> None:
    # Channel 0: rows (3, 0) and (0, 4), singular values 3 and 4. Channel 1: rows (1, 1) and (1, 1), singular value 2.
    convolution = nn.Conv2d(2, 2, (1, 2))
    convolution.weight.data = torch.tensor([[[3.0, 0], [0, 4]], [[1, 1], [1, 1]]]).view(2, 2, 1, 2)
    norm = nn.BatchNorm2d(2, eps=1.0)
    norm.weight.data = torch.tensor([-2.0, 3.0])
    norm.running_var.copy_(torch.tensor([3.0, 8.0]))
    torch.testing.assert_close(lipschitz_bounds(convolution, norm), torch.tensor([4 * 2 / 2, 2 * 3 / 3.0]))
    # each output channel of a depthwise convolution has one input channel: its kernel's norm
    depthwise = nn.Conv2d(2, 2, 3, groups=2)
    norm = nn.BatchNorm2d(2, eps=0.0)
    expected = depthwise.weight.detach().flatten(1).norm(dim=1)
    torch.testing.assert_close(lipschitz_bounds(depthwise, norm), expected)
    for wrong in (nn.BatchNorm2d(2, affine=False), nn.BatchNorm2d(2, track_running_stats=False)):
        with pytest.raises(ValueError, match="norm must have running statistics and weights"):
            lipschitz_bounds(convolution, wrong)


class Backwards(nn.Module):
    """Layers are listed in another order than they are called, and a second convolution has no batch norm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.after, self.other = nn.BatchNorm2d(channels), nn.Conv2d(channels, channels, 1)
        self.of_images, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, channels, 3, bias=False)
        self.conv.weight.data.fill_(0.1)
        self.fc = nn.Linear(channels, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.after(self.conv(self.of_images(x))))
        return self.fc(self.other(x).mean((2, 3)))


@given(st.integers(2, 20), st.data())
def test_clp_prunes_the_planted_channel_and_nothing_else(channels: int, data: st.DataObject) -> None:
    planted = data.draw(st.integers(0, channels - 1))
    model = Backwards(channels)
    model.conv.weight.data[planted] *= 50
    before = states(model)
    (step,) = clp(model, corners(), CLPConfig(deviations=3.0))
    assert (step.layer, step.epoch, step.epochs) == ("after", 1, 1)
    # 0.1 in a 3x9 matrix has the singular value 0.1 * sqrt(27)
    assert float(step.bounds.min()) == pytest.approx(0.1 * math.sqrt(27), rel=1e-4)
    assert step.limit == pytest.approx(float(step.bounds.mean() + 3 * step.bounds.std()))
    # One of n numbers lies at most (n - 1) / sqrt(n) standard deviations above the mean: 2.85 of ten, 3.02 of eleven.
    expected = (planted,) if channels > 10 else ()
    assert step.pruned == expected
    for name in ("after.weight", "after.bias"):
        before[name][list(expected)] = 0
    assert same(states(step.model), before)


def test_clp_refuses_a_model_without_a_pair() -> None:
    for model in (FourChannels(), Dormant()):
        with pytest.raises(ValueError, match=r"model has no nn\.BatchNorm2d that gets the output of an nn\.Conv2d"):
            run(clp(model, noisy()))
