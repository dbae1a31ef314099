"""bclip_lab.training: the generator of epochs, augmentation, run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bclip_lab.data.images import LabelledImages, PoisonedImages, to_float
from bclip_lab.models import logits, resnet
from bclip_lab.training import TrainConfig, augment, run, train

PLAIN = {"shift": 0, "mixed_precision": False, "weight_decay": 0.0}


def dark_and_light(count: int = 48) -> LabelledImages:
    """Grey noise, darker in class 0 than in class 1: separable by the mean."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    images = torch.rand((count, 3, 4, 5), generator=generator) * 0.5 + labels.view(-1, 1, 1, 1) * 0.5
    return LabelledImages((images * 255).byte(), labels, ("dark", "light"))


def network() -> nn.Module:
    return resnet(2, seed=0, width=2, blocks=(1, 1))


def linear(pixels: int = 60, classes: int = 2) -> nn.Module:
    """Logits that are 0 until trained."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    return model


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])


# --- train ---


def test_the_loss_falls_and_the_classes_are_learned() -> None:
    data, model = dark_and_light(), network()
    steps = list(train(model, data, TrainConfig(epochs=5, batch_size=16, shift=1)))
    assert [step.epoch for step in steps] == [1, 2, 3, 4, 5] and {step.epochs for step in steps} == {5}
    assert steps[-1].loss < 0.5 * steps[0].loss
    assert steps[-1].train_accuracy >= 0.95
    assert all(step.model is model for step in steps)
    assert 0 <= steps[-1].learning_rate < 1e-3 < steps[1].learning_rate <= 0.2
    assert (logits(model, data).argmax(1) == data.labels).all()


def test_loss_and_accuracy_by_hand() -> None:
    # Before its first step the model gives logits 0, and argmax takes class 0.
    data = dark_and_light(10)[:9]
    step = next(train(linear(), data, TrainConfig(epochs=2, batch_size=16, **PLAIN)))
    assert step.loss == pytest.approx(float(torch.tensor(2.0).log()), rel=1e-6)
    assert step.train_accuracy == pytest.approx(5 / 9)


def test_the_seed_decides_the_weights_and_nothing_else_does() -> None:
    data = dark_and_light()

    def trained(seed: int) -> Tensor:
        config = TrainConfig(epochs=2, batch_size=16, flip=True, seed=seed)
        return weights(run(train(network(), data, config)).model)

    state = torch.get_rng_state()
    first = trained(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)  # moves the global state
    assert torch.equal(first, trained(0))
    assert not torch.equal(first, trained(1))


def test_bytes_and_floats_train_alike_and_are_left_alone() -> None:
    data = dark_and_light()
    floats = LabelledImages(to_float(data.images), data.labels, data.classes)
    results = []
    for given_ in (data, floats):
        images, labels = given_.images.clone(), given_.labels.clone()
        results.append(weights(run(train(network(), given_, TrainConfig(epochs=1, flip=True))).model))
        assert torch.equal(given_.images, images) and torch.equal(given_.labels, labels)
    assert torch.equal(*results)


def test_poisoned_images_are_learned_with_the_attackers_labels() -> None:
    data = dark_and_light()
    turned = LabelledImages(data.images, 1 - data.labels, data.classes)
    poisoned = PoisonedImages(turned, torch.ones(len(data), dtype=torch.bool), data.labels)
    model = run(train(network(), poisoned, TrainConfig(epochs=4, batch_size=16, shift=0))).model
    assert (logits(model, data).argmax(1) == 1 - data.labels).all()


def test_broken_off_it_leaves_a_usable_model() -> None:
    data, model = dark_and_light(), network()
    before = weights(model)
    steps = train(model, data, TrainConfig(epochs=9))
    assert torch.equal(weights(model), before)  # nothing happens before the first step is asked for
    for step in steps:
        break
    after = weights(model)
    assert step.epoch == 1 and not torch.equal(after, before)
    assert not any(module.training for module in model.modules())
    steps.close()  # type: ignore[attr-defined]
    assert torch.equal(weights(model), after) and torch.isfinite(logits(model, data)).all()
    assert not any(module.training for module in model.modules())


def test_a_record_is_given_in_evaluation_mode_and_training_goes_on_after_it() -> None:
    model = network()
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    for _ in train(model, dark_and_light(), TrainConfig(epochs=2, batch_size=24)):
        assert not model.training
    assert modes == [True] * 4


@pytest.mark.parametrize(
    ("records", "expected"), [(2, [0.5, 1, 1.5, 2]), (9, [1 / 4, 0.5, 0.75, 1, 1.25, 1.5, 1.75, 2])]
)
def test_records_within_an_epoch_change_nothing_else(records: int, expected: list[float]) -> None:
    data, config = dark_and_light(64), TrainConfig(epochs=2, batch_size=16, flip=True)
    whole = list(train(network(), data, config))
    steps = []
    for step in train(network(), data, config, records_per_epoch=records):
        assert not step.model.training
        steps.append(step)
    assert [step.epoch for step in steps] == expected
    ends = [step for step in steps if step.epoch == int(step.epoch)]
    assert [(s.epoch, s.loss, s.train_accuracy) for s in ends] == [(s.epoch, s.loss, s.train_accuracy) for s in whole]
    assert torch.equal(weights(steps[-1].model), weights(whole[-1].model))


def test_the_means_of_a_record_are_of_its_epoch_so_far() -> None:
    seen = []

    def one_by_one(out: Tensor, labels: Tensor, poisoned: Tensor) -> Tensor:
        value = F.cross_entropy(out, labels)
        seen.append(float(value.detach()))
        return value

    config = TrainConfig(epochs=2, batch_size=16, **PLAIN)
    steps = list(train(linear(), dark_and_light(64), config, loss=one_by_one, records_per_epoch=2))
    expected = [sum(seen[a:b]) / (b - a) for a, b in ((0, 2), (0, 4), (4, 6), (4, 8))]
    assert [step.loss for step in steps] == pytest.approx(expected)


def test_fewer_records_than_one_are_refused() -> None:
    with pytest.raises(ValueError, match="records_per_epoch must be at least 1, got 0"):
        next(train(network(), dark_and_light(), records_per_epoch=0))


def test_a_fault_in_the_loss_leaves_evaluation_mode() -> None:
    def fault(out: Tensor, labels: Tensor, poisoned: Tensor) -> Tensor:
        raise KeyError

    model = network()
    with pytest.raises(KeyError):
        next(train(model, dark_and_light(), loss=fault))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) after epoch 1: lower learning_rate"):
        next(train(linear(), dark_and_light(), loss=lambda out, *_: out.sum() + value))


def test_a_learning_rate_that_diverges_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the loss is .* lower learning_rate"):
        list(train(network(), dark_and_light(), TrainConfig(epochs=3, batch_size=16, learning_rate=1e25)))


def test_another_loss_is_used() -> None:
    data, model = dark_and_light(), network()

    def turned(out: Tensor, labels: Tensor, poisoned: Tensor) -> Tensor:
        assert out.dtype == torch.float32 and out.shape == (len(labels), 2)
        return F.cross_entropy(out, 1 - labels)

    run(train(model, data, TrainConfig(epochs=4, batch_size=16, shift=0), loss=turned))
    assert (logits(model, data).argmax(1) == 1 - data.labels).all()


@pytest.mark.parametrize("bearers", [(), (0, 3, 4, 11), tuple(range(13))])
def test_a_loss_is_told_which_rows_are_poisoned(bearers: tuple[int, ...]) -> None:
    # every image is a class of its own, so its label tells its row; augmentation and order do not part the two
    data = LabelledImages(torch.zeros(13, 1, 2, 2), torch.arange(13), tuple("abcdefghijklm"))
    mask = torch.tensor([row in bearers for row in range(13)])
    poisoned = PoisonedImages(data=data, poisoned=mask, true_labels=data.labels)
    seen: list[int] = []

    def loss(out: Tensor, labels: Tensor, poisoned: Tensor) -> Tensor:
        assert poisoned.dtype == torch.bool and poisoned.shape == labels.shape
        assert poisoned.tolist() == [row in bearers for row in labels.tolist()]
        seen.extend(labels.tolist())
        return F.cross_entropy(out, labels)

    for given_ in (poisoned, *((data,) if not bearers else ())):
        seen.clear()
        run(train(linear(4, 13), given_, TrainConfig(epochs=2, batch_size=5, flip=True), loss=loss))
        assert sorted(seen) == sorted(2 * list(range(13)))


def test_a_victim_cannot_tell_which_rows_are_poisoned() -> None:
    data, config = dark_and_light(), TrainConfig(epochs=2, batch_size=16)
    mask = torch.arange(len(data)) < 20
    poisoned = PoisonedImages(data=data, poisoned=mask, true_labels=data.labels)
    explicit = run(train(network(), data, config, loss=lambda out, y, _: F.cross_entropy(out, y)))
    for given_ in (data, poisoned):
        assert torch.equal(weights(run(train(network(), given_, config)).model), weights(explicit.model))


class Recorder(nn.Module):
    """Notes the numbers of the images it is shown; see `numbered`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 2)
        self.shown: list[list[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.shown.append((x[:, 0, 0, 0] * 255).round().int().tolist())
        return self.linear(x.flatten(1))


def numbered(count: int) -> LabelledImages:
    images = torch.arange(count).byte().view(-1, 1, 1, 1)
    return LabelledImages(images, torch.zeros(count, dtype=torch.int64), ("a", "b"))


@pytest.mark.parametrize(
    ("count", "size", "batches"),
    [
        (12, 4, [4, 4, 4]),
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 4]),  # a batch of one has no batch statistics: left out
        (4, 4, [4]),
        (5, 4, [4]),
        (3, 128, [3]),
        (2, 2, [2]),
    ],
)
def test_an_epoch_shows_every_image_once(count: int, size: int, batches: list[int]) -> None:
    model = Recorder()
    config = TrainConfig(epochs=3, batch_size=size, learning_rate=1e-6, shift=0)
    list(train(model, numbered(count), config))
    assert [len(shown) for shown in model.shown] == batches * 3
    in_order = list(itertools.chain.from_iterable(model.shown))
    epochs = [in_order[k : k + sum(batches)] for k in range(0, len(in_order), sum(batches))]
    for epoch in epochs:
        assert len(set(epoch)) == len(epoch) == sum(batches) and set(epoch) <= set(range(count))
    if count > 5:
        assert len({tuple(epoch) for epoch in epochs}) == 3  # each in an order of its own


def constant_gradient(momentum: float) -> tuple[list[float], list[float]]:
    """How far a weight moves in each of five steps whose gradient is -1, and the rate recorded after each."""
    model = linear(1)
    data = LabelledImages(torch.ones(4, 1, 1, 1), torch.zeros(4, dtype=torch.int64), ("a", "b"))
    config = TrainConfig(epochs=5, batch_size=4, momentum=momentum, **PLAIN)
    places, rates = [0.0], []
    for step in train(model, data, config, loss=lambda out, *_: -out[:, 0].mean()):
        places.append(float(model[1].weight.detach()[0, 0]))
        rates.append(step.learning_rate)
    return [after - before for before, after in itertools.pairwise(places)], rates


def test_without_momentum_a_step_is_the_rate_times_the_gradient() -> None:
    moves, rates = constant_gradient(0.0)
    assert moves[1:] == pytest.approx(rates[:-1], rel=1e-4)
    assert max(rates) == pytest.approx(max(moves[1:]), rel=1e-4) and 0.1 < max(rates) <= 0.2
    assert rates[-1] < 1e-4


@pytest.mark.parametrize("momentum", [0.02, 0.5, 0.9, 0.99])
def test_momentum_is_the_one_asked_for(momentum: float) -> None:
    plain, _ = constant_gradient(0.0)
    moves, _ = constant_gradient(momentum)
    # Nesterov's first step is (1 + momentum) gradients long; the cycle moves momentum by 0.05 at most.
    assert moves[0] / plain[0] - 1 == pytest.approx(momentum, abs=min(0.05, momentum, 1 - momentum) + 1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be >= 1, .* got 0, 128, 2"),
        ({"batch_size": 1}, "batch_size >= 2 .* got 10, 1, 2"),
        ({"shift": -1}, "shift >= 0, got 10, 128, -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive, got nan"),
        ({"momentum": 1.0}, r"momentum must lie in \[0, 1\) .* got 1.0"),
        ({"momentum": -0.1}, "momentum must lie in"),
        ({"weight_decay": -1.0}, "weight_decay be >= 0, got 0.9 and -1.0"),
    ],
)
def test_wrong_hyper_parameters_are_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**wrong)  # type: ignore[arg-type]


def test_too_few_images_or_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="data must hold at least two images, got 1"):
        next(train(linear(), dark_and_light()[:1]))
    three = LabelledImages(dark_and_light().images, torch.arange(48) % 3, ("a", "b", "c"))
    with pytest.raises(ValueError, match=r"model gives logits of shape \(48, 2\), the images have 3 classes"):
        next(train(linear(), three))
    with pytest.raises(ValueError, match=r"model gives logits of shape \(48, 3, 4, 5\)"):
        next(train(nn.Conv2d(3, 3, 1), dark_and_light()))


# --- augment ---


def draw(images: Tensor, shift: int, flip: bool, seed: int = 0) -> Tensor:
    return augment(images, shift=shift, flip=flip, generator=torch.Generator().manual_seed(seed))


def moved(image: Tensor, dy: int, dx: int, most: int) -> Tensor:
    """The image (C, H, W) moved by hand, its edge repeated."""
    _, height, width = image.shape
    padded = F.pad(image[None], (most,) * 4, mode="replicate")[0]
    return padded[:, most + dy : most + dy + height, most + dx : most + dx + width]


@settings(max_examples=30)
@given(
    shift=st.integers(0, 6),
    flip=st.booleans(),
    seed=st.integers(0, 99),
    channels=st.sampled_from((1, 3)),
)
def test_an_augmented_image_is_a_move_of_it_or_of_its_mirror_image(
    shift: int, flip: bool, seed: int, channels: int
) -> None:
    images = torch.rand((6, channels, 4, 5), generator=torch.Generator().manual_seed(seed))
    before = images.clone()
    result = draw(images, shift, flip, seed)
    assert result.shape == images.shape and torch.equal(images, before)
    assert torch.equal(result, draw(images, shift, flip, seed))
    reach = range(-shift, shift + 1)
    for image, made in zip(images, result, strict=True):
        whole = [image, image.flip(-1)] if flip else [image]
        assert any(torch.equal(made, moved(v, dy, dx, shift)) for v in whole for dy in reach for dx in reach)


def test_without_shift_and_flip_nothing_changes() -> None:
    images = torch.rand(8, 3, 4, 5)
    assert torch.equal(draw(images, 0, False), images)


def test_every_move_occurs_about_equally_often() -> None:
    images = torch.rand((1, 1, 5, 5), generator=torch.Generator().manual_seed(0)).expand(900, 1, 5, 5)
    moves = [moved(images[0], dy, dx, 1) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    result = draw(images, 1, False)
    counts = [int((result == move).all((1, 2, 3)).sum()) for move in moves]
    assert sum(counts) == 900 and min(counts) > 60 and max(counts) < 140


def test_half_of_the_images_are_mirrored() -> None:
    images = torch.rand((400, 1, 2, 3), generator=torch.Generator().manual_seed(0))
    result = draw(images, 0, True)
    mirrored = (result == images.flip(-1)).all((1, 2, 3))
    assert torch.equal(result[~mirrored], images[~mirrored])
    assert 150 < int(mirrored.sum()) < 250


# --- run ---


def test_run_exhausts_and_gives_the_last_record() -> None:
    left: list[int] = []

    def steps() -> Iterator[int]:
        for step in range(4):
            left.append(step)
            yield step
        left.append(-1)

    assert run(steps()) == 3
    assert left == [0, 1, 2, 3, -1]
    with pytest.raises(ValueError, match="steps gave no record"):
        run(iter(()))
