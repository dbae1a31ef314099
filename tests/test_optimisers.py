"""bclip_lab.optimisers: to the last bit those of torch.optim."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bclip_lab import optimisers


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("Adam", {"lr": 0.1}),
        ("Adam", {"lr": 0.01, "betas": (0.5, 0.9)}),
        ("SGD", {"lr": 0.1}),
        ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4, "nesterov": True}),
    ],
)
def test_steps_are_those_of_torch_optim_under_a_schedule(name, settings):
    images, labels = torch.rand(8, 5, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    left = []
    for module in (optimisers, torch.optim):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
        optimiser = getattr(module, name)(model.parameters(), **settings)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, total_steps=10)
        for _ in range(9):
            optimiser.zero_grad()
            assert all(weight.grad is None for weight in model.parameters())
            F.cross_entropy(model(images), labels).backward()
            optimiser.step()
            schedule.step()
        left.append([*model.parameters(), torch.tensor(schedule.get_last_lr())])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*left, strict=True))
    assert all(weight.requires_grad for weight in left[0][:-1])
