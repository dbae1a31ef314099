"""bclip_lab.margins: the classification margin, and images of maximum margin."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bclip_lab.margins import (
    MaximumMarginConfig,
    MaximumMargins,
    classification_margins,
    maximum_margin_images,
)
from bclip_lab.models import logits, resnet

# --- the margin ---


def test_margins_by_hand() -> None:
    given_ = torch.tensor([[3.0, 1.0, 0.5], [3.0, 1.0, 0.5], [3.0, 1.0, 0.5], [2.0, 2.0, -1.0]])
    margins = classification_margins(given_, torch.tensor([0, 1, 2, 1]))
    assert margins.tolist() == [2.0, -2.0, -2.5, 0.0]
    assert classification_margins(given_[:0], torch.tensor([], dtype=torch.int64)).shape == (0,)


@given(
    rows=st.integers(2, 5).flatmap(
        lambda k: st.lists(
            st.tuples(st.lists(st.integers(-50, 50), min_size=k, max_size=k), st.integers(0, k - 1)),
            min_size=1,
            max_size=6,
        )
    ),
    constant=st.integers(-1000, 1000),
)
def test_a_margin_is_own_logit_less_the_best_other(rows: list[tuple[list[int], int]], constant: int) -> None:
    values, classes = torch.tensor([r[0] for r in rows]).float(), torch.tensor([r[1] for r in rows])
    before = values.clone()
    margins = classification_margins(values, classes)
    expected = [row[c] - max(v for k, v in enumerate(row) if k != c) for row, c in rows]
    assert margins.tolist() == expected
    assert torch.equal(values, before)
    assert torch.equal(classification_margins(values + constant, classes), margins)
    best = classification_margins(values, values.argmax(1))
    assert (best >= 0).all() and (margins <= best).all()


def test_the_gradient_goes_to_the_own_class_and_the_best_other() -> None:
    values = torch.tensor([[3.0, 1.0, 0.5], [3.0, 1.0, 0.5]], requires_grad=True)
    classification_margins(values, torch.tensor([0, 2])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[1, -1, 0], [-1, 0, 1]]


@pytest.mark.parametrize(
    ("values", "classes", "message"),
    [
        (torch.zeros(3), torch.tensor([0]), r"logits must have shape \(N, K\) with K >= 2, got \(3,\)"),
        (torch.zeros(2, 1), torch.tensor([0, 0]), r"K >= 2, got \(2, 1\)"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), r"classes must lie in \[0, 3\), got values from 0 to 3"),
        (torch.zeros(2, 3), torch.tensor([-1, 0]), "got values from -1 to 0"),
        (torch.zeros(2, 3), torch.tensor([0]), "logits and classes must be as many, got 2 and 1"),
        (torch.zeros(2, 3), torch.tensor([0, 1, 2]), "as many, got 2 and 3"),
        (torch.zeros(2, 3), torch.tensor([0.0, 1.0]), "classes must be an int64 tensor"),
    ],
)
def test_wrong_logits_and_classes_are_refused(values: Tensor, classes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_margins(values, classes)


# --- images of maximum margin ---


def linear(weight: Tensor, bias: Tensor) -> nn.Module:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return nn.Sequential(nn.Flatten(), layer)


def small() -> nn.Module:
    return resnet(3, seed=0, width=2, blocks=(1, 1))


SHAPE = (3, 6, 6)
QUICK = MaximumMarginConfig(per_class=2, steps=15)


@pytest.mark.parametrize("optimiser", ["adam", "gradient"])
@pytest.mark.parametrize(("shape", "batch_size"), [((3, 2, 2), 500), ((1, 3, 4), 5)])
def test_the_optimum_of_a_linear_model_is_a_corner_of_the_box(
    optimiser: str, shape: tuple[int, int, int], batch_size: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    sign = torch.randint(0, 2, (2, 12), generator=generator) * 2.0 - 1
    weight = sign * torch.tensor([[2.0], [3.0]])  # so that no difference of the two is 0
    bias = torch.tensor([0.25, -0.5])
    config = MaximumMarginConfig(per_class=3, steps=80, optimiser=optimiser)
    found = maximum_margin_images(linear(weight, bias), shape, 2, config, batch_size=batch_size)
    assert found.classes.tolist() == [0, 0, 0, 1, 1, 1]
    for c in range(2):
        slope = weight[c] - weight[1 - c]
        corner = (slope > 0).float()
        reached = found.classes == c
        assert torch.equal(found.images[reached].flatten(1), corner.expand(3, 12))
        optimum = float(slope.clamp(min=0).sum() + bias[c] - bias[1 - c])
        assert found.margins[reached].tolist() == pytest.approx([optimum] * 3, rel=1e-5)


def test_margins_grow_from_the_noise_and_images_stay_in_the_box() -> None:
    model = small()
    still = MaximumMarginConfig(per_class=4, steps=1, learning_rate=1e-12, seed=3)
    noise = maximum_margin_images(model, SHAPE, 3, still)
    assert 0 <= noise.images.min() < 0.02 and 0.98 < noise.images.max() <= 1
    assert float(noise.images.mean()) == pytest.approx(0.5, abs=0.03)
    for optimiser in ("adam", "gradient"):
        config = MaximumMarginConfig(per_class=4, steps=15, optimiser=optimiser, seed=3)
        found = maximum_margin_images(model, SHAPE, 3, config)
        assert (found.margins > noise.margins).all()
        assert found.images.min() >= 0 and found.images.max() <= 1
        assert found.images.shape == (12, *SHAPE) and found.images.dtype == torch.float32
        assert not found.images.requires_grad and not found.margins.requires_grad
        again = classification_margins(logits(model, found.images), found.classes)
        torch.testing.assert_close(found.margins, again, atol=1e-4, rtol=1e-4)


def test_more_steps_reach_more() -> None:
    few, many = (
        maximum_margin_images(small(), SHAPE, 3, MaximumMarginConfig(per_class=2, steps=steps)).margins
        for steps in (3, 30)
    )
    assert (many > few).all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_the_model_is_left_alone(training: bool, frozen: bool) -> None:
    model = small().train(training).requires_grad_(not frozen)
    model.get_submodule("fc").weight.grad = torch.full((3, 4), 7.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    maximum_margin_images(model, SHAPE, 3, QUICK)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training is training for module in model.modules())
    assert all(p.requires_grad is not frozen for p in model.parameters())
    graded = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(graded) == {"fc.weight"} and (graded["fc.weight"] == 7).all()


def test_the_seed_decides_and_the_batches_do_not() -> None:
    model = small()
    first = maximum_margin_images(model, SHAPE, 3, QUICK)
    again = maximum_margin_images(model, SHAPE, 3, QUICK)
    assert torch.equal(first.images, again.images) and torch.equal(first.margins, again.margins)
    other = maximum_margin_images(model, SHAPE, 3, MaximumMarginConfig(per_class=2, steps=15, seed=1))
    assert not torch.equal(first.images, other.images)
    parts = maximum_margin_images(model, SHAPE, 3, QUICK, batch_size=4)
    assert torch.equal(parts.classes, first.classes)
    torch.testing.assert_close(parts.margins, first.margins, atol=1e-3, rtol=1e-3)


def test_the_largest_of_each_class() -> None:
    found = MaximumMargins(
        torch.zeros(5, 1, 1, 1), torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1.0, 3.0, -2.0, 5.0, 4.0])
    )
    assert found.largest().tolist() == [3.0, -2.0, 5.0]


def test_the_published_recipe() -> None:
    config = MaximumMarginConfig.published(seed=4)
    assert (config.per_class, config.steps, config.learning_rate) == (50, 300, 0.01)
    assert config.optimiser == "gradient" and config.seed == 4


@settings(max_examples=20)
@given(wrong=st.sampled_from([{"per_class": 0}, {"steps": 0}, {"learning_rate": 0.0}, {"learning_rate": float("nan")}]))
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="per_class and steps must be >= 1 and learning_rate > 0"):
        MaximumMarginConfig(**wrong)  # type: ignore[arg-type]


def test_an_unknown_optimiser_is_refused() -> None:
    with pytest.raises(ValueError, match="optimiser must be 'adam' or 'gradient', got 'sgd'"):
        MaximumMarginConfig(optimiser="sgd")


@pytest.mark.parametrize(
    ("shape", "classes", "batch_size", "message"),
    [
        ((6, 6), 3, 500, r"shape must be \(C, H, W\), each at least 1, got \(6, 6\)"),
        ((3, 0, 6), 3, 500, r"shape must be .* got \(3, 0, 6\)"),
        (SHAPE, 1, 500, "classes must be >= 2 and batch_size >= 1, got 1 and 500"),
        (SHAPE, 3, 0, "batch_size >= 1, got 3 and 0"),
        (SHAPE, 4, 500, r"classes must lie in \[0, 3\), got values from 0 to 3"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    shape: tuple[int, int, int], classes: int, batch_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        maximum_margin_images(small(), shape, classes, QUICK, batch_size=batch_size)
