"""bclip_lab.defenses.unlearning: a backdoor set by hand is unlearned; what is trained on, by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from planted import corners, planted_network
from torch import nn

import bclip_lab as bl
from bclip_lab.data.images import LabelledImages
from bclip_lab.defenses import UnlearningConfig, UnlearningStep, unlearn, unlearning
from bclip_lab.inversion import InversionConfig
from bclip_lab.models import logits, resnet
from bclip_lab.training import TrainConfig, run

QUICK = InversionConfig(steps=200)
TRAINING = TrainConfig(epochs=20, batch_size=16, learning_rate=0.1, shift=0, mixed_precision=False)


def test_a_planted_backdoor_is_unlearned() -> None:
    model, data = planted_network(), corners()
    steps = list(unlearn(model, data, UnlearningConfig(inversion=QUICK, training=TRAINING)))
    assert [s.epoch for s in steps] == list(range(21))
    assert all(s.classes == (0,) and s.epochs == 20 for s in steps)
    last = steps[-1]
    # The trigger that was found is as faint as works, and fainter than the attacker's: it is what is unlearned.
    others = last.triggers.embed(data[data.labels != 0].images, 0)
    assert (logits(model, others).argmax(1) == 0).float().mean() > 0.9
    assert (logits(last.model, others).argmax(1) == 0).float().mean() < 0.05
    before, after = (m.state_dict()["1.weight"][0].view(8, 8)[6:8, 7] for m in (model, last.model))
    assert (after < before).all() and after.sum() < before.sum() - 1
    assert (logits(last.model, data).argmax(1) == data.labels).all()
    assert not last.model.training


@pytest.mark.slow
def test_the_patch_of_the_zoo_is_unlearned() -> None:
    checkpoint = bl.zoo.load("patch")
    splits = checkpoint.splits()
    before = bl.evaluate(checkpoint.model, splits.test, checkpoint.attack)
    config = UnlearningConfig(inversion=InversionConfig(steps=200), classes=(0,))
    defended = run(unlearn(checkpoint.model, splits.defender, config)).model
    after = bl.evaluate(defended, splits.test, checkpoint.attack)
    assert before.asr > 0.95
    assert after.asr < 0.1
    assert after.acc > before.acc - 0.02


def test_the_first_record_has_the_triggers_and_the_network_as_it_was() -> None:
    model = planted_network()
    first = next(unlearn(model, corners(), UnlearningConfig(inversion=QUICK)))
    assert first.epoch == 0 and math.isnan(first.loss)
    assert first.triggers.norms.argmin() == 0
    assert first.model is not model
    assert torch.equal(first.model.state_dict()["1.weight"], model.state_dict()["1.weight"])


def test_where_no_class_is_flagged_the_network_stays_as_it_is() -> None:
    model = planted_network(weight=0)
    (step,) = unlearn(model, corners(), UnlearningConfig(inversion=QUICK))
    assert (step.epoch, step.epochs, step.classes) == (0, 0, ())
    assert torch.equal(step.model.state_dict()["1.weight"], model.state_dict()["1.weight"])


def test_what_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def no_training(model: nn.Module, data: LabelledImages, config: TrainConfig) -> Iterator[UnlearningStep]:
        given.extend((data, config))
        yield from ()

    monkeypatch.setattr(unlearning, "train", no_training)
    data = corners(50)
    config = UnlearningConfig(inversion=InversionConfig(steps=5), classes=(2, 1), share=0.1, seed=5)
    (step,) = unlearn(planted_network(), data, config)
    mixed, training = given
    assert training.seed == 5
    # 45 images as they are, and 5 twice: with the trigger of class 2 and with that of class 1
    assert len(mixed) == 55
    rows = [(data.images == image).all((1, 2, 3)).nonzero().item() for image in mixed.images[:45]]
    assert len(set(rows)) == 45
    assert torch.equal(mixed.labels[:45], data.labels[rows])
    rest = [row for row in range(50) if row not in rows]
    for part, target in ((mixed[45:50], 2), (mixed[50:], 1)):
        expected = step.triggers.embed(data.images[rest], target)
        order = [(expected == image).all((1, 2, 3)).nonzero().item() for image in part.images]
        assert sorted(order) == list(range(5))
        assert torch.equal(part.labels, data.labels[rest][order])


def test_the_model_is_left_alone_and_the_seed_decides() -> None:
    model = resnet(4, seed=0, width=2, blocks=(1, 1), channels=1).train().requires_grad_(False)
    state = copy.deepcopy(model.state_dict())
    results = []
    for seed in (1, 1, 2):
        training = TrainConfig(epochs=1, batch_size=16, learning_rate=0.01, mixed_precision=False)
        config = UnlearningConfig(inversion=InversionConfig(steps=5), classes=(3,), training=training, seed=seed)
        results.append(run(unlearn(model, corners(), config)).model.state_dict())
    assert model.training and not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(results[0]["fc.weight"], results[1]["fc.weight"])
    assert not torch.equal(results[0]["fc.weight"], results[2]["fc.weight"])
    assert not torch.equal(results[0]["fc.weight"], state["fc.weight"])


def test_inputs_are_checked() -> None:
    data = corners()
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got 0"):
        UnlearningConfig(share=0)
    with pytest.raises(ValueError, match="threshold must be positive"):
        UnlearningConfig(threshold=-1)
    with pytest.raises(ValueError, match=r"UnlearningConfig.classes must lie in \[0, 4\), got \(4,\)"):
        next(unlearn(planted_network(), data, UnlearningConfig(classes=(4,))))
    with pytest.raises(ValueError, match="at least 2 images of at least 3 classes, got 0 of 4"):
        next(unlearn(planted_network(), data[:0]))
