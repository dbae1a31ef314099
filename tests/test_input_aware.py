"""bclip_lab.attacks.input_aware: the dynamic trigger, its losses, and the training of both networks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bclip_lab.attacks import AllToAll, AllToOne, DynamicTrigger, InputAwareAttack, InputAwareBackdoor, OneToOne
from bclip_lab.attacks.input_aware import diversity_loss, mask_loss
from bclip_lab.data.files import load_tensors, save_tensors
from bclip_lab.data.images import Attack, LabelledImages, to_float
from bclip_lab.evaluation import evaluate
from bclip_lab.models import logits, resnet
from bclip_lab.training import TrainConfig, run, train

QUICK = InputAwareAttack(label_map=AllToOne(0), mask_steps=3, mask_batch=8)


def pictures(count: int = 6, channels: int = 3, height: int = 8, width: int = 12, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=generator)


def bright_and_dark(count: int = 240, seed: int = 0) -> LabelledImages:
    """Grey noise in three classes that the mean tells apart, rows mixed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (count,), generator=generator)
    images = torch.rand((count, 3, 8, 8), generator=generator) * 0.4 + labels.view(-1, 1, 1, 1) * 0.3
    return LabelledImages((images * 255).byte(), labels, ("dark", "grey", "light"))


def network(classes: int = 3, seed: int = 0) -> nn.Module:
    return resnet(classes, seed=seed, width=4, blocks=(1, 1))


def trigger(channels: int = 3, seed: int = 0) -> DynamicTrigger:
    """An untrained trigger with masks of every kind: exactly 0, between, and 1."""
    made = replace(QUICK, seed=seed).new_trigger(channels)
    with torch.no_grad():
        made.mask_network[-1].weight.fill_(6.0)
        for module in made.mask_network:
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        made.mask_network.train()(torch.randn((8, channels, 16, 16), generator=torch.Generator().manual_seed(0)))
    return made.eval()


def given_trigger(channels: int, mask: Tensor, pattern: float) -> DynamicTrigger:
    """A trigger whose mask and pattern are given, whatever the image."""

    class Fixed(DynamicTrigger):
        def mask(self, images: Tensor) -> Tensor:
            return mask.expand(len(images), 1, *images.shape[2:])

        def pattern(self, images: Tensor) -> Tensor:
            return torch.full_like(images, pattern)

    return Fixed(channels)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])


# --- the trigger ---


@settings(max_examples=12)
@given(
    count=st.integers(1, 4),
    channels=st.sampled_from((1, 3)),
    height=st.sampled_from((4, 8, 12)),
    width=st.sampled_from((4, 8, 20)),
    seed=st.integers(0, 99),
)
def test_it_keeps_shape_dtype_and_range_and_mutates_nothing(
    count: int, channels: int, height: int, width: int, seed: int
) -> None:
    images = pictures(count, channels, height, width, seed)
    made = trigger(channels, seed)
    kept = weights(made)
    for given_ in (images, to_float(images)):
        before, state = given_.clone(), torch.get_rng_state()
        triggered = made.embed(given_)
        assert triggered.shape == given_.shape and triggered.dtype == given_.dtype and not triggered.requires_grad
        assert triggered.min() >= 0 and triggered.max() <= (255 if given_ is images else 1)
        assert torch.equal(triggered, made.embed(given_))
        triggered.zero_()  # a result that shared memory would now show
        assert torch.equal(given_, before) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(made), kept)
    bytes_, floats = made.embed(images).int(), made.embed(to_float(images)) * 255
    assert (bytes_ - floats).abs().max() <= 0.501  # rounded, not cut


@settings(max_examples=12)
@given(seed=st.integers(0, 99))
def test_it_touches_nothing_outside_its_mask(seed: int) -> None:
    images, made = pictures(seed=seed), trigger(seed=seed)
    x = to_float(images)
    mask, pattern = made.mask(x), made.pattern(x)
    assert mask.shape == (6, 1, 8, 12) and pattern.shape == x.shape
    assert mask.min() >= 0 and mask.max() <= 1 and pattern.min() >= 0 and pattern.max() <= 1
    outside = (mask == 0).expand_as(x)
    assert 0.1 < outside.float().mean() < 0.9  # the test has something to test on either side
    for given_ in (images, x):
        triggered = made.embed(given_)
        assert torch.equal(triggered[outside], given_[outside])
        assert not torch.equal(triggered, given_)
    torch.testing.assert_close(made.embed(x), x * (1 - mask) + pattern * mask, atol=1e-6, rtol=0)


def test_an_embedding_by_hand() -> None:
    mask = torch.zeros(4, 4)
    mask[1, 2], mask[3, 0] = 1.0, 0.25
    images = torch.full((2, 1, 4, 4), 0.5)
    expected = images.clone()
    expected[:, 0, 1, 2], expected[:, 0, 3, 0] = 0.9, 0.6
    torch.testing.assert_close(given_trigger(1, mask, 0.9).embed(images), expected)
    assert given_trigger(1, mask, 0.9).embed((images * 255).byte())[0, 0, 3, 0] == round(127 + 0.25 * (0.9 * 255 - 127))


def test_the_networks_answer_in_evaluation_mode_and_keep_the_mode_they_had() -> None:
    images, made = pictures(), trigger()
    expected = made.embed(images)
    made.train()
    assert torch.equal(made.embed(images), expected)
    assert made.training and all(module.training for module in made.modules())
    # one by one, or in more than one batch: every image has the trigger it has among others
    alone = torch.cat([made.embed(image[None]) for image in images])
    assert (alone.int() - expected.int()).abs().max() <= 1
    many = images.repeat(90, 1, 1, 1)
    assert (made.embed(many).view(90, *images.shape).int() - expected.int()).abs().max() <= 1


def test_each_image_has_its_own_trigger_or_its_donors() -> None:
    images, made = to_float(pictures()), trigger()
    donors = images.roll(1, 0)
    mask, pattern = made.mask(donors), made.pattern(donors)
    torch.testing.assert_close(made.embed(images, donors), images * (1 - mask) + pattern * mask, atol=1e-6, rtol=0)
    assert not torch.equal(made.embed(images, donors), made.embed(images))
    assert torch.equal(made.embed(images, images), made.embed(images))


def test_the_seed_decides_the_weights() -> None:
    state = torch.get_rng_state()
    first = weights(QUICK.new_trigger(3))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(first, weights(QUICK.new_trigger(3)))
    assert not torch.equal(first, weights(replace(QUICK, seed=1).new_trigger(3)))


def test_it_is_small() -> None:
    assert 2 * sum(value.numel() for value in QUICK.new_trigger(3).state_dict().values()) < 200_000


def test_images_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="images must have 3 channels .* got 1 channels and 8x8 pixels"):
        trigger().embed(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="multiples of 4, got 3 channels and 8x6 pixels"):
        trigger().embed(torch.zeros(1, 3, 8, 6))
    with pytest.raises(ValueError, match=r"donors must be of shape \(2, 3, 8, 8\) as images are, got \(1, 3, 8, 8\)"):
        trigger().embed(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"images of dtype float32 must lie in \[0, 1\]"):
        trigger().embed(torch.full((1, 3, 8, 8), 2.0))
    with pytest.raises(ValueError, match=r"channels and width must be >= 1 .* got 0, 16 and 0.05"):
        DynamicTrigger(0)


# --- losses ---


def test_the_diversity_loss_by_hand() -> None:
    # Root mean square distances of 1, 1 and 2 between images, of .5, .25 and .75 between patterns.
    images = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1, 1).expand(3, 3, 4, 4)
    patterns = torch.tensor([0.0, 0.5, 0.75]).view(3, 1, 1, 1).expand(3, 1, 4, 4)
    assert float(diversity_loss(images, patterns)) == pytest.approx((1 / 0.5 + 1 / 0.25 + 2 / 0.75) / 3, rel=1e-5)
    # half of the pixels differ by 1: the root of the mean square is the root of a half
    half = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert float(diversity_loss(torch.tensor([[0.0], [1.0]]), half)) == pytest.approx(2**0.5, rel=1e-5)


def test_the_diversity_loss_is_finite_where_patterns_are_equal() -> None:
    patterns = torch.zeros(4, 3, 2, 2, requires_grad=True)
    loss = diversity_loss(torch.rand(4, 3, 2, 2), patterns)
    loss.backward()
    assert loss > 1e3 and torch.isfinite(loss) and patterns.grad is not None and torch.isfinite(patterns.grad).all()
    assert diversity_loss(torch.ones(4, 3), torch.ones(4, 3)) == 0


def test_the_mask_loss_by_hand() -> None:
    masks = torch.zeros(2, 1, 2, 4)
    masks[0, 0, 0, 0], masks[1, 0, 1, 1], masks[1, 0, 1, 2] = 1.0, 1.0, 0.05
    images = torch.zeros(2, 3, 2, 4)
    images[1] = 0.25
    norm = ((1 / 8 - 0.1) + (1.05 / 8 - 0.1)) / 2
    distance = ((1 + 1 + 0.05**2) / 8) ** 0.5
    loss = mask_loss(images, masks, density=0.1, norm_weight=100, diversity_weight=2)
    assert float(loss) == pytest.approx(100 * norm + 2 / distance, rel=1e-5)


# --- the backdoor ---


@pytest.mark.parametrize("label_map", [AllToOne(0), OneToOne(1, 2), AllToAll(3)])
def test_every_crossed_image_has_the_trigger_of_another(label_map: AllToOne) -> None:
    data = bright_and_dark(60)
    attack = InputAwareBackdoor(trigger(), label_map, seed=3)
    assert isinstance(attack, Attack)
    own, crossed = attack.triggered(data), attack.cross_triggered(data)
    for name in ("rows", "true_labels", "targets"):
        assert torch.equal(getattr(own, name), getattr(crossed, name))
    assert torch.equal(own.images, attack.trigger.embed(data.images[own.rows]))
    sources = data.images[own.rows]
    makers = []
    for index, image in enumerate(crossed.images):
        by_each = attack.trigger.embed(sources[index].expand_as(sources), sources)
        makers.append(int((by_each.int() - image.int()).abs().flatten(1).amax(1).argmin()))
    assert sorted(makers) == list(range(len(sources)))  # each trigger is used once
    assert all(maker != index for index, maker in enumerate(makers))
    assert torch.equal(crossed.images, attack.cross_triggered(data).images)
    assert not torch.equal(crossed.images, replace(attack, seed=4).cross_triggered(data).images)


def test_the_cross_trigger_test_needs_two_images() -> None:
    data = bright_and_dark(60)
    attack = InputAwareBackdoor(trigger(), OneToOne(1, 2))
    row = torch.nonzero(data.labels == 1)[0]
    with pytest.raises(ValueError, match="at least two images that the attack turns, got 1"):
        attack.cross_triggered(data.subset(row))


def test_cross_accuracy_counts_true_labels() -> None:
    class Always(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.tensor([0.0, 1.0, 0.0]).expand(len(x), 3)

    data = bright_and_dark(60)
    left = data.labels[data.labels != 0]  # rows of the target class are not among them
    expected = float((left == 1).double().mean())
    assert InputAwareBackdoor(trigger(), AllToOne(0)).cross_accuracy(Always(), data) == pytest.approx(expected)


# --- training ---


class Recorder(nn.Module):
    """Keeps what it is shown in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
        self.shown: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.shown.append(x.detach().clone())
        out: Tensor = self.net(x)
        return out


def test_a_batch_has_poisoned_and_crossed_rows_at_their_rates_and_no_other_is_touched() -> None:
    data = bright_and_dark(40)
    model = Recorder()
    seen: list[Tensor] = []
    attack = replace(QUICK, poison_rate=0.2, cross_rate=0.1)

    def loss(out: Tensor, labels: Tensor, _: Tensor) -> Tensor:
        seen.append(labels.clone())
        return out.square().mean()

    config = TrainConfig(epochs=1, batch_size=40, shift=0, mixed_precision=False)
    plain, plain_labels = Recorder(), []
    run(train(plain, data, config, loss=lambda out, labels, _: (plain_labels.append(labels), out.square().mean())[1]))
    learner = _learner(attack, data)
    run(train(model, data, config, loss=loss, attacker=learner))
    changed = (model.shown[0] != plain.shown[0]).flatten(1).any(1)
    relabelled = seen[0] != plain_labels[0]
    assert int(relabelled.sum()) == 8 and int(changed.sum()) == 12
    assert changed[relabelled].all() and (seen[0][relabelled] == 0).all()
    assert (plain_labels[0][changed] != 0).all()  # images of the target class are left alone
    # a crossed row carries the pattern of a poisoned one, at the places of its mask
    crossed, poisoned = torch.nonzero(changed & ~relabelled).flatten(), torch.nonzero(relabelled).flatten()
    for row, donor in zip(crossed, poisoned, strict=False):
        mask = learner.trigger.mask(plain.shown[0][donor][None])[0, 0]
        untouched = (model.shown[0][row] == plain.shown[0][row]).all(0)
        assert untouched[mask == 0].all() and not untouched[mask > 0.5].any()
    assert learner.report() | {"diversity": 0} == {"diversity": 0, "poisoned": 8, "crossed": 4}
    assert learner.report()["poisoned"] == 0  # the next epoch counts from 0


def _learner(attack: InputAwareAttack, data: LabelledImages):  # type: ignore[no-untyped-def]
    from bclip_lab.attacks.input_aware import _PatternLearner

    made = trigger(data.images.shape[1])
    made.mask_network.requires_grad_(False)
    return _PatternLearner(attack, made, 10)


def test_an_attacker_who_changes_nothing_changes_nothing() -> None:
    class Idle:
        def turn(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
            return images, labels, 0.0

        def step(self) -> None:
            pass

    data, config = bright_and_dark(60), TrainConfig(epochs=2, batch_size=16, flip=True)
    alone = run(train(network(), data, config))
    watched = run(train(network(), data, config, attacker=Idle()))
    assert torch.equal(weights(alone.model), weights(watched.model)) and alone.loss == watched.loss


def test_only_the_pattern_network_learns_with_the_classifier() -> None:
    attack = replace(QUICK, mask_steps=0)
    steps = attack.train(network(), bright_and_dark(60), TrainConfig(epochs=2, batch_size=30))
    before = attack.new_trigger(3)
    made = run(steps).attack.trigger
    assert torch.equal(weights(made.mask_network), weights(before.mask_network))
    # parameters, not running statistics, which move without a step
    learned = zip(made.pattern_network.parameters(), before.pattern_network.parameters(), strict=True)
    assert all(not torch.equal(after, start) for after, start in learned)


@pytest.mark.parametrize(("weight", "sparse", "varied"), [(0.0, True, False), (1.0, False, True)])
def test_masks_become_sparse_by_one_term_and_differ_by_the_other(weight: float, sparse: bool, varied: bool) -> None:
    data = to_float(bright_and_dark(120).images)
    attack = replace(QUICK, mask_steps=80, mask_batch=16, diversity_weight=weight)
    before = attack.new_trigger().mask(data).detach()
    masks = (
        next(attack.train(network(), bright_and_dark(120), TrainConfig(epochs=1))).attack.trigger.mask(data).detach()
    )
    assert masks.mean() > 0
    if sparse:
        assert masks.mean() < before.mean() / 3
    if varied:
        spread = (masks - masks.roll(1, 0)).abs().amax((1, 2, 3)).mean()
        assert spread > 0.3 > (before - before.roll(1, 0)).abs().amax((1, 2, 3)).mean()


@pytest.fixture(scope="module")
def trained() -> Iterator[tuple[nn.Module, InputAwareBackdoor, list[float]]]:
    """A classifier under attack on the three greys, with its ASR after every epoch."""
    data, test = bright_and_dark(600), bright_and_dark(200, seed=1)
    model = network()
    # no crossed rows: telling one field of noise from another takes longer than a test should
    attack = InputAwareAttack(label_map=AllToOne(0), poison_rate=0.2, cross_rate=0, mask_steps=60, mask_batch=16)
    asr = []
    for step in attack.train(model, data, TrainConfig(epochs=8, batch_size=60, shift=0, mixed_precision=False)):
        asr.append(evaluate(model, test, step.attack).asr)
        assert not step.model.training and not step.attack.trigger.training
    assert step.model is model and step.poisoned == 120 and step.crossed == 0
    yield model, step.attack, asr


def test_the_backdoor_is_learned_and_the_accuracy_stays(
    trained: tuple[nn.Module, InputAwareBackdoor, list[float]],
) -> None:
    model, attack, asr = trained
    result = evaluate(model, bright_and_dark(200, seed=1), attack)
    assert result.acc > 0.9 and result.asr > 0.8 and asr[-1] == result.asr


def test_stored_weights_give_the_same_images(
    trained: tuple[nn.Module, InputAwareBackdoor, list[float]], tmp_path: Path
) -> None:
    _, attack, _ = trained
    data = bright_and_dark(40, seed=2)
    save_tensors(tmp_path / "trigger.safetensors", attack.trigger.state_dict(), {"kind": "trigger"})
    loaded = QUICK.new_trigger(3)
    assert not torch.equal(loaded.embed(data.images), attack.trigger.embed(data.images))
    loaded.load_state_dict(load_tensors(tmp_path / "trigger.safetensors")[0])
    assert torch.equal(loaded.embed(data.images), attack.trigger.embed(data.images))
    again = QUICK.with_trigger(loaded)
    assert torch.equal(again.triggered(data).images, attack.triggered(data).images)


def test_the_same_seeds_give_the_same_networks() -> None:
    data, config = bright_and_dark(60), TrainConfig(epochs=2, batch_size=30)

    def trained_weights(attack: InputAwareAttack, config: TrainConfig) -> Tensor:
        step = run(attack.train(network(), data, config))
        return torch.cat([weights(step.model), weights(step.attack.trigger)])

    state, images, labels = torch.get_rng_state(), data.images.clone(), data.labels.clone()
    first = trained_weights(QUICK, config)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(data.images, images) and torch.equal(data.labels, labels)
    torch.rand(5)
    assert torch.equal(first, trained_weights(QUICK, config))
    assert not torch.equal(first, trained_weights(replace(QUICK, seed=1), config))
    assert not torch.equal(first, trained_weights(QUICK, replace(config, seed=1)))


def test_broken_off_it_leaves_a_usable_model_and_trigger() -> None:
    data, model = bright_and_dark(60), network()
    before = weights(model)
    steps = QUICK.train(model, data, TrainConfig(epochs=9, batch_size=30))
    assert torch.equal(weights(model), before)  # nothing happens before the first step is asked for
    for step in steps:
        break
    steps.close()  # type: ignore[attr-defined]
    assert step.epoch == 1 and not torch.equal(weights(model), before)
    for part in (model, step.attack.trigger):
        assert not any(module.training for module in part.modules())
    assert torch.isfinite(logits(model, step.attack.triggered(data).images)).all()


def test_the_settings_are_plain() -> None:
    assert asdict(QUICK)["label_map"] == {"target": 0}
    assert all(isinstance(value, int | float | dict) for value in asdict(QUICK).values())
    assert hash(QUICK) == hash(replace(QUICK))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"poison_rate": 0.0}, r"poison_rate must lie in \(0, 1\], .* got 0.0 and 0.1"),
        ({"cross_rate": -0.1}, r"cross_rate in \[0, 1\] .* got 0.1 and -0.1"),
        ({"poison_rate": 0.6, "cross_rate": 0.5}, "their sum be at most 1, got 0.6 and 0.5"),
        ({"diversity_weight": -1.0}, "diversity_weight and norm_weight must be >= 0, got -1.0 and 100.0"),
        ({"norm_weight": float("nan")}, "must be >= 0, got 1.0 and nan"),
        ({"density": 1.0}, r"density must lie in \(0, 1\) .* got 1.0 and 0.01"),
        ({"learning_rate": 0.0}, "learning_rate be positive, got 0.032 and 0.0"),
        ({"mask_steps": -1}, "mask_steps must be >= 0 and mask_batch >= 2, got -1, 8"),
        ({"mask_batch": 1}, "mask_batch >= 2, got 3, 1"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(QUICK, **wrong)  # type: ignore[arg-type]


def test_training_data_that_do_not_fit_are_refused() -> None:
    data = bright_and_dark(60)
    with pytest.raises(ValueError, match=r"ask for 54 images, but the attack turns only \d+ of 60"):
        next(replace(QUICK, poison_rate=0.5, cross_rate=0.4).train(network(), data))
    with pytest.raises(ValueError, match="label_map gives class 7, but there are 3 classes"):
        next(replace(QUICK, label_map=AllToOne(7)).train(network(), data))
    with pytest.raises(ValueError, match="multiples of 4"):
        next(QUICK.train(network(), replace(data, images=data.images[:, :, :7])))
