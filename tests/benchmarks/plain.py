"""The published fit of MMAC, from its equations, with nothing optimised: yardstick of speed, oracle for the engine.

Eager float32, batch norm as it is, weights that go on asking for gradients, synthetic images one class after another:
what is in the docstring of `mmac` and in `MMACConfig.published()`, and no more. Random numbers are drawn in the order
of the lab's engine, so that a seed gives the same bounds up to rounding. Nothing is there to slow it down: the memory
layout is the model's, the logits to keep are those that tell which images are decided correctly, and of the spellings
of min(a, Z) it has the one with the fastest backward pass.
"""

import copy

import torch
from torch import Tensor
from torch.nn import functional as F

from bclip_lab.data.images import LabelledImages, to_float
from bclip_lab.models import ResNet


def clipped_logits(model: ResNet, x: Tensor, bounds: list[Tensor]) -> Tensor:
    """g(x; Z): the network with min(activation, Z) after every ReLU, in the order they run."""
    rest = iter(bounds)

    def relu(x: Tensor) -> Tensor:
        x, bound = F.relu(x), next(rest)[:, None, None]
        return torch.where(x > bound, bound, x)

    x = relu(model.bn1(model.conv1(model.normalise(x))))
    for stage in model.stages:
        for block in stage:
            y = relu(block.bn1(block.conv1(x)))
            x = relu(block.bn2(block.conv2(y)) + block.shortcut(x))
    return model.fc(x.mean((2, 3)))


def margins(logits: Tensor, target: Tensor) -> Tensor:
    """m_t(x) = g_t(x) - max over k != t of g_k(x)."""
    own = F.one_hot(target, logits.shape[1]).bool()
    return logits[own] - logits.masked_fill(own, -torch.inf).amax(1)


def synthetic_images(model: ResNet, noise: Tensor, steps: int = 300, rate: float = 0.01) -> Tensor:
    """For every class t images in [0, 1] that maximise m_t, from `noise` (K, n, C, H, W) by plain gradient steps."""
    made = []
    for target, x in enumerate(noise):
        for _ in range(steps):
            x = x.detach().requires_grad_()
            margins(model(x), torch.full((len(x),), target)).sum().backward()
            x = (x + rate * x.grad).clamp(0, 1)
        made.append(x.detach())
    return torch.cat(made)


def plain_mmac(
    model: ResNet, clean: LabelledImages, *, epochs: int = 300, steps: int = 300, per_class: int = 50,
    batch_size: int = 200, remake_every: int = 100, weight: float = 0.002, weight_from: int = 30,
    weight_every: int = 10, seed: int = 0,
) -> list[Tensor]:  # fmt: skip
    """The bounds of `mmac(ClippedModel(model), clean, MMACConfig.published(seed=seed))`, site by site."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        kept = model(to_float(clean.images))
    correct = kept.argmax(1) == clean.labels
    images, labels, kept = to_float(clean.images)[correct], clean.labels[correct], kept[correct]
    sites = [model.bn1, *(norm for stage in model.stages for block in stage for norm in (block.bn1, block.bn2))]
    bounds = [torch.ones(norm.num_features, requires_grad=True) for norm in sites]
    optimiser = torch.optim.Adam(bounds, lr=0.1)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(kept.shape[1]).repeat_interleave(per_class)
    batches = -(-len(images) // batch_size)
    for epoch in range(epochs):
        if epoch % remake_every == 0:
            draw = torch.Generator().manual_seed(int(torch.randint(2**31, (), generator=generator)))
            noise = torch.rand((len(targets), *images.shape[1:]), generator=draw)
            synthetic = synthetic_images(model, noise.view(-1, per_class, *images.shape[1:]), steps)
        order = torch.randperm(len(images), generator=generator).chunk(batches)
        others = torch.randperm(len(synthetic), generator=generator)
        for batch, rows in enumerate(order):
            made = others[batch::batches][:batch_size]
            error = F.mse_loss(clipped_logits(model, images[rows], bounds), kept[rows])
            margin = margins(clipped_logits(model, synthetic[made], bounds), targets[made]).sum()
            optimiser.zero_grad()
            (error + weight * margin).backward()
            optimiser.step()
            with torch.no_grad():
                for bound in bounds:
                    bound.clamp_(min=0)
        if epoch + 1 >= weight_from and (epoch + 1) % weight_every == 0:
            with torch.no_grad():
                decisions = clipped_logits(model, images, bounds).argmax(1)
            weight *= 1.2 if (decisions == labels).float().mean() > 0.95 else 1 / 1.2
    return [bound.detach() for bound in bounds]
