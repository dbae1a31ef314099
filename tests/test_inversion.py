"""bclip_lab.inversion: the trigger of a network whose backdoor is set by hand is found where it is."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import corners, planted_network

from bclip_lab import inversion
from bclip_lab.data.images import LabelledImages
from bclip_lab.inversion import InversionConfig, InvertedTriggers, anomaly_indices, invert_triggers
from bclip_lab.models import logits, resnet
from bclip_lab.training import run

SHORT = InversionConfig(steps=30)


@pytest.fixture(scope="module")
def found() -> InvertedTriggers:
    return run(invert_triggers(planted_network(), corners(), InversionConfig(steps=300))).triggers


# --- the search ---


def test_the_planted_trigger_is_found_where_it_is(found: InvertedTriggers) -> None:
    # Two pixels of weight 10 must outweigh a corner's 4: a mask of 0.2 on either is enough, if the pattern is white.
    mask = found.masks[0]
    assert 0.4 < found.norms[0] < 1.0
    assert mask[6:8, 7].sum() > 0.7 * mask.sum()
    assert found.patterns[0, 0, 6:8, 7].min() > 0.9
    assert found.norms[1:].min() > 4 * found.norms[0]


def test_the_triggers_do_what_they_report(found: InvertedTriggers) -> None:
    data = corners()
    network = planted_network()
    assert (found.success_rates >= 0.98).all()
    for target in range(4):
        decisions = logits(network, found.embed(data.images, target)).argmax(1)
        assert (decisions == target).float().mean() >= 0.9
    np.testing.assert_allclose(found.norms, found.masks.double().sum((1, 2)).numpy())


def test_the_smallest_mask_that_succeeded_is_kept() -> None:
    steps = list(invert_triggers(planted_network(), corners(), InversionConfig(steps=150)))
    for target in range(4):
        reached = [s.norms[target] for s in steps if s.success[target] >= 0.98]
        assert steps[-1].triggers.norms[target] == min(reached)


def test_a_class_that_is_never_reached_keeps_its_last_mask() -> None:
    network = planted_network()
    with torch.no_grad():
        network[1].bias[2] = -1e4
    steps = list(invert_triggers(network, corners(), SHORT))
    assert steps[-1].success[2] == 0 and steps[-1].costs[2] == 0
    assert steps[-1].triggers.norms[2] == steps[-1].norms[2]
    assert steps[-1].triggers.success_rates[2] == 0


def test_a_finished_class_stays_as_it_is_and_the_search_ends_with_the_last() -> None:
    config = InversionConfig(steps=5000, patience=1, stop_after=2, check_every=2)
    steps = list(invert_triggers(planted_network(), corners(), config))
    assert steps[-1].step < 5000
    assert not steps[-1].running.any()
    for target in range(4):
        ended = next(i for i, s in enumerate(steps) if not s.running[target])
        assert {s.triggers.norms[target] for s in steps[ended:]} == {steps[ended].triggers.norms[target]}
        assert {(s.norms[target], s.success[target], s.costs[target]) for s in steps[ended:]} == {
            (steps[ended].norms[target], steps[ended].success[target], steps[ended].costs[target])
        }


def test_all_classes_at_once_are_each_class_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    together = run(invert_triggers(planted_network(), corners(), SHORT)).triggers
    monkeypatch.setattr(inversion, "images_at_once", lambda shape: 1)
    apart = run(invert_triggers(planted_network(), corners(), SHORT)).triggers
    torch.testing.assert_close(apart.masks, together.masks, atol=1e-4, rtol=0)
    torch.testing.assert_close(apart.patterns, together.patterns, atol=1e-4, rtol=0)


def test_steps_and_success_are_counted() -> None:
    steps = list(invert_triggers(planted_network(), corners(), InversionConfig(steps=12, check_every=5)))
    assert [s.step for s in steps] == [5, 10, 12]
    with torch.no_grad():
        always = planted_network()
        always[1].bias[1] = 1e4
    last = run(invert_triggers(always, corners(), InversionConfig(steps=12, check_every=5)))
    assert last.success.tolist() == [0, 1, 0, 0]


def test_model_and_images_stay_as_they_were() -> None:
    model = resnet(4, seed=0, width=2, blocks=(1, 1), channels=1).train()
    model.bn1.eval()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    data = corners()
    images = data.images.clone()
    for _ in invert_triggers(model, data, SHORT):
        assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(data.images, images)


def test_the_seed_decides() -> None:
    one, same, other = (
        run(invert_triggers(planted_network(), corners(), InversionConfig(steps=10, seed=seed))).triggers
        for seed in (3, 3, 4)
    )
    assert torch.equal(one.masks, same.masks) and torch.equal(one.patterns, same.patterns)
    assert not torch.equal(one.masks, other.masks)


def test_bytes_are_searched_as_floats_are() -> None:
    data = corners()
    as_bytes = LabelledImages((data.images * 255).round().byte(), data.labels, data.classes)
    as_floats = LabelledImages(as_bytes.images.float() / 255, data.labels, data.classes)
    one, other = (run(invert_triggers(planted_network(), d, SHORT)).triggers for d in (as_bytes, as_floats))
    assert torch.equal(one.masks, other.masks)


# --- the cost ---


def test_the_cost_by_hand() -> None:
    config = InversionConfig(success=0.9, cost=0.01, cost_factor=4.0, patience=2, stop_after=3)
    schedule = inversion._CostSchedule(1, config)
    rows = [  # success, norm: cost afterwards, better, finished
        (1.0, 9.0, 0.0, True, False),
        (0.0, 8.0, 0.0, False, False),  # the row of successes is broken
        (1.0, 8.0, 0.0, True, False),
        (0.9, 8.0, 0.01, False, False),  # two in a row: the cost begins
        (1.0, 7.0, 0.01, True, False),
        (1.0, 6.0, 0.04, True, False),  # two more: times 4
        (0.5, 5.0, 0.04, False, False),
        (0.5, 5.0, 0.005, False, False),  # two failures: divided by 4 to the 1.5
        (0.5, 5.0, 0.005, False, True),  # up and down, and three checks without a smaller mask that succeeds
        (1.0, 5.0, 0.005, True, True),
    ]
    for success, norm, cost, better, finished in rows:
        assert schedule.check(np.array([success]), np.array([norm])).tolist() == [better]
        assert schedule.costs == pytest.approx([cost])
        assert schedule.finished.tolist() == [finished]


# --- triggers and their norms ---


def test_embed_by_hand() -> None:
    mask = torch.tensor([[[0.0, 0.5, 1.0]]])
    pattern = torch.tensor([[[[0.2, 0.2, 0.2]]]])
    triggers = InvertedTriggers(mask, pattern, np.array([1.5]), np.array([1.0]))
    image = torch.tensor([[[[1.0, 1.0, 1.0]]]])
    torch.testing.assert_close(triggers.embed(image, 0), torch.tensor([[[[1.0, 0.6, 0.2]]]]))
    assert triggers.embed((image * 255).byte(), 0).flatten().tolist() == [255, 153, 51]
    assert image.unique().tolist() == [1.0]
    with pytest.raises(ValueError, match=r"target must lie in \[0, 1\), got 1"):
        triggers.embed(image, 1)
    with pytest.raises(ValueError, match=r"images must have shape \(N, 1, 1, 3\), got \(1, 1, 1, 2\)"):
        triggers.embed(image[..., :2], 0)


@given(st.integers(0, 2**31), st.booleans())
def test_embedded_images_keep_shape_dtype_and_range(seed: int, as_bytes: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks, patterns = torch.rand(2, 4, 4, generator=generator), torch.rand(2, 3, 4, 4, generator=generator)
    images = torch.rand(3, 3, 4, 4, generator=generator)
    images = (images * 255).byte() if as_bytes else images
    out = InvertedTriggers(masks, patterns, np.zeros(2), np.zeros(2)).embed(images, 1)
    assert out.shape == images.shape and out.dtype == images.dtype
    assert as_bytes or (out.min() >= 0 and out.max() <= 1)


def test_anomaly_indices_by_hand() -> None:
    # median 50, deviations 40, 0, 2, 2, 0 of median 2: 40 / (1.4826 * 2)
    indices = anomaly_indices([10.0, 50.0, 52.0, 48.0, 50.0])
    assert indices == pytest.approx([13.4898, 0.0, -0.674491, 0.674491, 0.0], abs=1e-4)
    assert anomaly_indices([5.0, 5.0, 5.0]).tolist() == [0, 0, 0]
    assert anomaly_indices([0.0, 0.0, 0.0]).tolist() == [0, 0, 0]
    assert anomaly_indices([5.0, 5.0, 5.0, 1.0])[3] > 1e3  # more than half are equal, one is far smaller


@given(st.lists(st.integers(8, 8000), min_size=3, max_size=20), st.floats(0.1, 10))
def test_anomaly_indices_have_no_unit(eighths: list[int], factor: float) -> None:
    norms = [each / 8 for each in eighths]  # equal, or so far apart that rounding does not change their order
    scaled = anomaly_indices(np.array(norms) * factor)
    np.testing.assert_allclose(scaled, anomaly_indices(norms), rtol=1e-3, atol=1e-3)
    assert scaled.argmax() == np.argmin(norms)


# --- errors ---


@pytest.mark.parametrize("norms", [[1.0, 2.0], [1.0, 2.0, float("nan")], [[1.0, 2.0, 3.0]]])
def test_norms_are_checked(norms: object) -> None:
    with pytest.raises(ValueError, match="norms must be at least 3 finite numbers"):
        anomaly_indices(norms)


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"patience": 0}, {"learning_rate": 0.0}, {"cost_factor": 1.0}, {"success": 1.5}]
)
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        InversionConfig(**wrong)


def test_inputs_are_checked() -> None:
    data = corners()
    with pytest.raises(ValueError, match="clean must be LabelledImages, at least 1, got 0 images"):
        next(invert_triggers(planted_network(), data[:0]))
    more = LabelledImages(data.images, data.labels, (*data.classes, "nowhere"))
    with pytest.raises(ValueError, match="model has 4 classes, the images of clean have 5"):
        next(invert_triggers(planted_network(), more))
