"""What fits of activation bounds share: a frozen private network, its clean targets, and how bounds come back."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from bclip_lab.clipping import Clip, ClippedModel
from bclip_lab.data.images import LabelledImages, to_float
from bclip_lab.models import bfloat16_is_fast, device_of, images_at_once, logits
from bclip_lab.optimisers import Adam

__all__ = ["BoundFit", "draw_seed"]


def draw_seed(generator: torch.Generator) -> int:
    """A seed for noise of its own, from the one generator of a fit."""
    return int(torch.randint(2**31, (), generator=generator))


def _clipped_by(bounds: Iterable[Tensor], network: fx.GraphModule) -> fx.GraphModule:
    """The same network, sharing its weights, with these of its bounds alone: none leaves every activation as it is."""
    kept = {id(bound) for bound in bounds}
    plain = fx.GraphModule(network, copy.deepcopy(network.graph))
    for node in list(plain.graph.nodes):
        module = plain.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(module, Clip) and id(module.bound) not in kept:
            node.replace_all_uses_with(node.args[0])
            plain.graph.erase_node(node)
    plain.recompile()
    return plain


def _fold(network: fx.GraphModule, bounds: Iterable[Tensor], images: Tensor) -> nn.Module:
    """A copy with batch norm folded into the convolutions and the same bounds; the network itself where that fails."""
    called = [node.target for node in network.graph.nodes if node.op == "call_module"]
    if len(called) != len(set(called)):  # a layer called twice must not take up the batch norm behind one call
        return network
    with torch.no_grad():
        expected = network(images)
        private = copy.deepcopy(network, {id(bound): bound for bound in bounds})
        folded: nn.Module = fuse(private, inplace=True, no_trace=True)
        error = (folded(images) - expected).abs().max()
    return folded if error <= 1e-3 * expected.abs().max().clamp(min=1) else network


class _Fast(nn.Module):
    """A frozen network's float32 logits, computed in bfloat16 where that is fast: bit for bit as by autocast alone.

    Convolutions and linear layers have their weights in bfloat16 for good. Autocast would convert them in every pass,
    since it keeps only what asks for a gradient.
    """

    def __init__(self, network: nn.Module, device: torch.device) -> None:
        super().__init__()
        self.network, self.device, self.enabled = network, device.type, bfloat16_is_fast(device)
        if self.enabled:
            for module in network.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    module.bfloat16()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.enabled):
            out: Tensor = self.network(images)
        return out.float()


class BoundFit:
    """A network whose bounds can be differentiated, the clean images it must keep, and an Adam over the bounds.

    Weights are frozen and the original's logits computed once, since neither changes; only the bounds come back
    to the clipped model, through `write`. Of `clean` only the images are used which the original decides
    correctly (as in the authors' code).

    Every bound of `sites` (all by default) begins at `start`; with `relative_start` at `start` times what is usual
    for its channel, the median over the images of the largest activation in an image.

    `images` float32 (M, C, H, W), `labels` int64 (M,) and `targets` float32 (M, K), the original's logits, are on
    the model's device. `network` is the network clipped at `sites` alone, `unclipped` the original, both private and
    frozen, with batch norm folded into the convolutions where that can be done.
    """

    def __init__(
        self,
        clipped: ClippedModel,
        clean: LabelledImages,
        *,
        start: float,
        learning_rate: float,
        relative_start: bool = False,
        sites: Iterable[str] | None = None,
    ) -> None:
        if not isinstance(clipped, ClippedModel):
            raise ValueError(f"clipped must be a ClippedModel, got {type(clipped).__name__}")
        if not len(clean):
            raise ValueError("clean holds no images")
        device = device_of(clipped.original)
        targets = logits(clipped.original, clean)
        correct = targets.argmax(1) == clean.labels.cpu()
        if not bool(correct.any()):
            raise ValueError(
                "clean: the model decides none of the images correctly; are they in [0, 1], and do their labels "
                "belong to this model?"
            )
        self.clipped = clipped
        self.images = to_float(clean.images[correct.to(clean.images.device)].to(device))
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.labels, self.targets = (
            clean.labels[correct.to(clean.labels.device)].to(device),
            targets[correct].to(device),
        )
        fitted = clipped.sites if sites is None else tuple(sites)
        clipped.set_bounds(dict.fromkeys(clipped.sites, math.inf) | dict.fromkeys(fitted, start))
        if relative_start:
            clipped.reset()
            usual = clipped.activations(self.images, quantiles=(0.5,)).quantile
            clipped.set_bounds({site: (start * usual[site][0]).clamp(min=0) for site in fitted})
        network, bounds = clipped.differentiable()
        self.bounds = {site: bounds[site] for site in fitted}
        both = [_fold(_clipped_by(some, network), some, self.images[:8]) for some in (tuple(self.bounds.values()), ())]
        self.network, self.unclipped = (_Fast(each, device) for each in both)  # after both: they may share weights
        self.optimiser = Adam(list(self.bounds.values()), lr=learning_rate)

    def folded(self, model: nn.Module) -> nn.Module:
        """A copy of another classifier of these images for speed: frozen, its batch norm folded where that can be."""
        network = _fold(_clipped_by((), ClippedModel(model).differentiable()[0]), (), self.images[:8])
        return _Fast(network, self.images.device)

    @torch.no_grad()
    def originals(self, images: Tensor) -> Tensor:
        """float32 logits of the original for images on its device, without a gradient; precise as in `logits`."""
        out: Tensor = self.unclipped(images)
        return out

    def logits(self, images: Tensor) -> Tensor:
        """float32 logits of the clipped network, differentiable by the bounds.

        Computed in bfloat16 where that is fast: the bounds are learned a little noisier, while every decision
        that is reported comes from the clipped model itself, in float32.
        """
        out: Tensor = self.network(images)
        return out

    def step(self, loss: Tensor) -> None:
        """One step of Adam down `loss`; bounds stay at or above zero, where a ReLU can still pass nothing."""
        bounds = list(self.bounds.values())
        for bound, gradient in zip(bounds, torch.autograd.grad(loss, bounds), strict=True):
            bound.grad = gradient
        self.optimiser.step()
        with torch.no_grad():
            for bound in bounds:
                bound.clamp_(min=0)

    @torch.no_grad()
    def decisions(self, images: Tensor) -> Tensor:
        """int64 (N,): what the clipped network decides for images on its device."""
        batches = images.split(images_at_once(images.shape, 500))  # without batch norm larger ones are faster
        return torch.cat([self.logits(batch).argmax(1) for batch in batches])

    def accuracy(self) -> float:
        """Accuracy of the clipped network on the images of the fit."""
        return float((self.decisions(self.images) == self.labels).float().mean())

    def write(self) -> None:
        """Give the bounds to the clipped model."""
        self.clipped.set_bounds({site: bound.detach() for site, bound in self.bounds.items()})
