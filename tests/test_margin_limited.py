"""bclip_lab.attacks.margin_limited: a backdoor trained to win by little."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bclip_lab.attacks import AllToAll, AllToOne, BackdoorAttack, MarginLimitedAttack, PatchTrigger
from bclip_lab.data.images import Attack, LabelledImages
from bclip_lab.evaluation import evaluate
from bclip_lab.margins import classification_margins
from bclip_lab.models import logits
from bclip_lab.training import TrainConfig, run, train
from bclip_lab.zoo import describe

BACKDOOR = BackdoorAttack(PatchTrigger(), AllToOne(1), poison_rate=0.25)
CONFIG = TrainConfig(epochs=20, batch_size=16, learning_rate=0.1, shift=0, mixed_precision=False)


def dark_and_light() -> LabelledImages:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    images = 0.35 + 0.25 * labels.view(-1, 1, 1, 1) + 0.05 * torch.rand((64, 3, 8, 8), generator=generator)
    return LabelledImages(images, labels, ("dark", "light"))


def network() -> nn.Module:
    """Linear: it learns a patch of 3x3 pixels beside the mean of all within a second."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[1].bias)
    return model


def weights(model: nn.Module) -> Tensor:
    return torch.cat([value.detach().flatten().double() for value in model.state_dict().values()])


# --- the loss ---


def test_the_penalty_by_hand() -> None:
    # margins of the given labels: 7, 3, -4, 50
    out = torch.tensor([[10.0, 3.0, 0.0], [0.0, 2.0, 5.0], [4.0, 0.0, 0.0], [50.0, 0.0, -9.0]])
    labels = torch.tensor([0, 2, 1, 0])
    plain = float(F.cross_entropy(out, labels))

    def penalty(rows: list[int], strength: float, margin: float) -> float:
        mask = torch.tensor([row in rows for row in range(4)])
        attack = MarginLimitedAttack(BACKDOOR, strength=strength, margin=margin)
        return float(attack.loss(out, labels, mask)) - plain

    assert penalty([0], 1, 5) == pytest.approx(4, rel=1e-5)
    assert penalty([0, 1], 1, 5) == pytest.approx(2, rel=1e-5)  # the mean over triggered rows, not over the batch
    assert penalty([0, 1], 0.5, 2) == pytest.approx(0.5 * (25 + 1) / 2, rel=1e-5)
    assert penalty([0, 1, 2], 1, 5) == pytest.approx(4 / 3, rel=1e-5)  # a margin below the limit is not pushed up
    assert penalty([1, 2], 1, 5) == 0
    assert penalty([3], 0.1, 0) == pytest.approx(250, rel=1e-5)
    assert penalty([], 1, 0) == 0  # however large the margin of a clean row
    assert penalty([0, 1, 3], 0, 0) == 0


@settings(max_examples=60)
@given(
    rows=st.lists(
        st.tuples(st.lists(st.integers(-30, 30), min_size=4, max_size=4), st.integers(0, 3), st.booleans()),
        min_size=1,
        max_size=6,
    ),
    strength=st.sampled_from((0.0, 0.03, 0.5, 1.0)),
    margin=st.integers(0, 10),
)
def test_the_loss_is_cross_entropy_and_the_triggered_rows_mean_excess(
    rows: list[tuple[list[int], int, bool]], strength: float, margin: int
) -> None:
    out = torch.tensor([row[0] for row in rows]).float().requires_grad_()
    labels, mask = torch.tensor([row[1] for row in rows]), torch.tensor([row[2] for row in rows])
    value = MarginLimitedAttack(BACKDOOR, strength=strength, margin=margin).loss(out, labels, mask)
    excess = [
        max(0, scores[label] - max(v for k, v in enumerate(scores) if k != label) - margin) ** 2
        for scores, label, bears in rows
        if bears
    ]
    plain = F.cross_entropy(out, labels)
    expected = float(plain.detach()) + strength * sum(excess) / max(1, len(excess))
    assert float(value.detach()) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    gradient, usual = (torch.autograd.grad(loss, out, retain_graph=True)[0] for loss in (value, plain))
    assert torch.equal(gradient[~mask], usual[~mask])
    # down for the label, up for the runner-up, by as much
    torch.testing.assert_close(gradient.sum(1), usual.sum(1), atol=1e-4, rtol=0)
    own = labels[:, None]
    assert (gradient.gather(1, own) >= usual.gather(1, own) - 1e-6).all()


# --- train ---


def test_of_strength_zero_it_is_the_plain_backdoor() -> None:
    data = dark_and_light()
    images, labels = data.images.clone(), data.labels.clone()
    plain = list(train(network(), BACKDOOR.poison(data), CONFIG))
    limited = list(MarginLimitedAttack(BACKDOOR, strength=0).train(network(), data, CONFIG))
    assert torch.equal(weights(limited[-1].model), weights(plain[-1].model))
    assert [step.loss for step in limited] == [step.loss for step in plain]
    assert torch.equal(data.images, images) and torch.equal(data.labels, labels)


def test_the_penalty_lowers_the_triggered_margins_and_the_backdoor_stays() -> None:
    data = dark_and_light()
    triggered = BACKDOOR.triggered(data)
    medians = []
    for strength in (0, 0.1):
        attack = MarginLimitedAttack(BACKDOOR, strength=strength, margin=1)
        model = run(attack.train(network(), data, CONFIG)).model
        assert evaluate(model, data, attack).asr > 0.95 and evaluate(model, data).acc > 0.95
        medians.append(float(classification_margins(logits(model, triggered.images), triggered.targets).median()))
    assert medians[0] > 3 and 0 < medians[1] < 1.5


def test_the_seed_decides_the_weights() -> None:
    attack, data = MarginLimitedAttack(BACKDOOR), dark_and_light()
    config = TrainConfig(epochs=1, batch_size=16)
    models = [network(), network()]
    state = torch.get_rng_state()
    first, again = (weights(run(attack.train(model, data, config)).model) for model in models)
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), state)


def test_nothing_is_trained_before_the_first_step_is_asked_for() -> None:
    model = network()
    before = weights(model)
    steps = MarginLimitedAttack(BACKDOOR).train(model, dark_and_light())
    assert torch.equal(weights(model), before)
    step = next(steps)
    assert (step.epoch, step.epochs) == (1, TrainConfig().epochs) and step.model is model


def test_many_targets_are_limited_each_on_its_own() -> None:
    attack = MarginLimitedAttack(BackdoorAttack(PatchTrigger(), AllToAll(2), poison_rate=0.5), strength=1, margin=0)
    out = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    excess = attack.loss(out, torch.tensor([0, 1]), torch.tensor([True, True]))
    assert float(excess) == pytest.approx(float(F.cross_entropy(out, torch.tensor([0, 1]))) + 6.5)


# --- triggered, what is refused, and the card ---


def test_triggered_images_are_the_backdoors() -> None:
    attack, data = MarginLimitedAttack(BACKDOOR), dark_and_light()
    assert isinstance(attack, Attack)
    result, expected = attack.triggered(data), BACKDOOR.triggered(data)
    assert torch.equal(result.images, expected.images) and torch.equal(result.targets, expected.targets)
    assert torch.equal(result.rows, expected.rows)


@pytest.mark.parametrize("wrong", [{"strength": -0.1}, {"margin": -1}, {"strength": float("nan")}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"strength and margin must be >= 0, got"):
        MarginLimitedAttack(BACKDOOR, **wrong)


def test_a_rate_that_the_sources_cannot_fill_is_refused_at_the_call() -> None:
    attack = MarginLimitedAttack(BackdoorAttack(PatchTrigger(), AllToOne(1), poison_rate=0.9))
    with pytest.raises(ValueError, match="poison_rate 0.9 asks for 58 poisoned images"):
        attack.train(network(), dark_and_light())


def test_a_card_can_hold_it() -> None:
    described = json.loads(json.dumps(describe(MarginLimitedAttack(BACKDOOR, strength=0.3, margin=2))))
    assert described["kind"] == "MarginLimitedAttack" and described["strength"] == 0.3 and described["margin"] == 2
    assert described["backdoor"]["kind"] == "BackdoorAttack"
