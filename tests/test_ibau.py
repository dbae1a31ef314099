"""bclip_lab.defenses.ibau: the hypergradient where it is known, and a backdoor set by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import corners, planted_network, triggered
from torch import Tensor

from bclip_lab.data.images import LabelledImages
from bclip_lab.defenses import IBAUConfig, ibau
from bclip_lab.defenses.ibau import hypergradient
from bclip_lab.models import logits, resnet
from bclip_lab.training import run

QUICK = IBAUConfig(rounds=2, batch_size=40, ascent_passes=2)


# --- the hypergradient ---


@given(st.floats(0.2, 1.5), st.floats(-3, 3), st.floats(-2, 2), st.integers(1, 8))
def test_every_number_of_iterations_by_hand(curvature: float, slope: float, value: float, iterations: int) -> None:
    # inner a (delta - b theta)^2 / 2, outer delta^2 / 2 + 7 theta: phi shrinks by q = 1 - step a, and d phi / d theta
    # is step a b, so v = delta (1 + q + ... + q^(K - 1)) and the gradient 7 + step a b v
    theta = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    delta, step = slope * theta.detach(), 0.5
    (found,) = hypergradient(
        lambda delta: curvature * (delta - slope * theta) ** 2 / 2,
        lambda delta: delta**2 / 2 + 7 * theta,
        delta,
        [theta],
        step=step,
        iterations=iterations,
    )
    v = float(delta) * sum((1 - step * curvature) ** k for k in range(iterations))
    assert float(found) == pytest.approx(7 + step * curvature * slope * v)


@pytest.mark.parametrize("seed", range(3))
def test_many_iterations_give_the_gradient_through_the_minimum(seed: int) -> None:
    # inner (delta - M theta)^T A (delta - M theta) / 2 has its minimum at M theta, which autograd can go through
    generator = torch.Generator().manual_seed(seed)
    square, linear, target = (torch.randn(*size, generator=generator).double() for size in ((3, 3), (3, 2), (3,)))
    curvature = square @ square.T / 10 + torch.eye(3).double()
    theta = torch.randn(2, generator=generator).double().requires_grad_()

    def outer(delta: Tensor) -> Tensor:
        return (delta - target).square().sum() + (theta**3).sum()

    (expected,) = torch.autograd.grad(outer(linear @ theta), theta)
    (found,) = hypergradient(
        lambda delta: (delta - linear @ theta) @ curvature @ (delta - linear @ theta) / 2,
        outer,
        (linear @ theta).detach(),
        [theta],
        step=0.3,
        iterations=200,
    )
    torch.testing.assert_close(found, expected)


def test_parameters_that_do_not_matter_get_zero() -> None:
    used, unused = torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)
    found = hypergradient(
        lambda delta: (delta - used).square().sum(),
        lambda delta: delta.square().sum(),
        torch.ones(2),
        [used, unused],
        step=0.1,
        iterations=5,
    )
    assert found[0].abs().min() > 0
    assert found[1].tolist() == [0, 0, 0]


# --- the defence ---


def test_a_planted_backdoor_is_unlearned() -> None:
    model, data = planted_network(), corners()
    others = triggered(data[data.labels != 0].images)
    assert (logits(model, others).argmax(1) == 0).all()
    config = IBAUConfig(rounds=20, batch_size=20, ascent_passes=10, learning_rate=0.1, norm=1.5)
    steps = list(ibau(model, data, config))
    assert [s.epoch for s in steps] == list(range(1, 21))
    # at first the perturbation is the trigger: all of it lies in the two pixels
    first = steps[0].perturbation[0]
    assert first[6:8, 7].abs().min() > 0.5
    assert steps[0].fooled > 0.7
    assert (logits(steps[-1].model, others).argmax(1) == 0).float().mean() < 0.1
    assert steps[-1].accuracy == 1.0


def test_the_perturbation_stays_within_its_norm_and_is_unlearned() -> None:
    for step in ibau(planted_network(), corners(), IBAUConfig(rounds=3, norm=0.7, learning_rate=0.1)):
        assert step.norm == pytest.approx(float(step.perturbation.norm()))
        assert step.norm <= 0.7 + 1e-5
        assert 0 <= step.remaining <= 1
    strong = next(ibau(planted_network(), corners(), IBAUConfig(learning_rate=0.1, norm=1.5, unlearning_passes=60)))
    assert strong.remaining < strong.fooled


def test_the_model_is_left_alone_and_the_seed_decides() -> None:
    model = resnet(4, seed=0, width=2, blocks=(1, 1), channels=1).train().requires_grad_(False)
    state, data = copy.deepcopy(model.state_dict()), corners()
    images = data.images.clone()
    results = []
    for seed in (1, 1, 2):
        config = IBAUConfig(rounds=2, batch_size=30, ascent_passes=1, seed=seed)
        step = run(ibau(model, data, config))
        assert not step.model.training
        results.append(step.model.state_dict())
    assert model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(data.images, images)
    assert torch.equal(results[0]["fc.weight"], results[1]["fc.weight"])
    assert not torch.equal(results[0]["fc.weight"], results[2]["fc.weight"])
    # the weights move, the statistics of batch norm do not
    assert not torch.equal(results[0]["fc.weight"], state["fc.weight"])
    assert torch.equal(results[0]["bn1.running_mean"], state["bn1.running_mean"])


def test_a_generator_that_is_broken_off_leaves_a_defended_network() -> None:
    steps = ibau(planted_network(), corners(), QUICK)
    step = next(steps)
    steps.close()
    data = corners()
    assert step.accuracy == float((logits(step.model, data).argmax(1) == data.labels).float().mean())


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"norm": 0.0}, {"penalty": -1.0}, {"share": 0.0}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        IBAUConfig(**wrong)


def test_inputs_are_checked() -> None:
    data = corners()
    with pytest.raises(ValueError, match="clean must be LabelledImages, at least 1, got 0 images"):
        next(ibau(planted_network(), data[:0]))
    more = LabelledImages(data.images, data.labels, (*data.classes, "nowhere"))
    with pytest.raises(ValueError, match="model has 4 classes, the images of clean have 5"):
        next(ibau(planted_network(), more))
