"""Clipped models: an upper bound per channel after every activation call of a classifier."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from bclip_lab.data.files import load_tensors, save_tensors
from bclip_lab.data.images import LabelledImages, check_images
from bclip_lab.models import device_of, images_at_once, logits
from bclip_lab.quantiles import EXACT, Histogram, Rows

__all__ = ["ActivationStatistics", "ClippedModel", "abnormality", "load_bounds", "save_bounds"]


class _Minimum(torch.autograd.Function):
    """`torch.minimum` with a fast backward pass: its own takes two thirds of the time of a fit.

    What decides where gradients go is `bound - x`, not the mask `x > bound`: comparing, and filling by a mask, are not
    vectorised on CPUs, and the second forgets that memory is channels-last, which slows down all layers before it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: Tensor) -> Tensor:
        ctx.shape = bound.shape
        bound = torch.empty_like(x[:1]).copy_(bound)  # one bound per position, so that only images are broadcast over
        ctx.save_for_backward(bound - x)
        return torch.minimum(x, bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (room,) = ctx.saved_tensors
        (gradient,) = gradients
        # 0 where there is no room; at a tie, which a threshold just below 0 lets pass, the activation is what moves
        passed = torch.ops.aten.threshold_backward(gradient, room, -1e-38)
        # what was clipped moves with the bound
        return passed, (gradient - passed).sum_to_size(ctx.shape)


class Clip(nn.Module):
    """`min(x, bound)` with one bound per channel, in the dtype of `x`.

    `axis` is the channel axis of `x`, negative where it is counted from the last.
    """

    bound: Tensor

    def __init__(self, channels: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.register_buffer("bound", torch.full((channels,), torch.inf))

    def forward(self, x: Tensor) -> Tensor:
        """Clip a batch."""
        behind = -self.axis - 1 if self.axis < 0 else x.ndim - self.axis - 1
        # the cast keeps a bfloat16 activation (autocast) in bfloat16: torch.minimum would promote it
        bound = self.bound.to(x.dtype).view(-1, *[1] * behind)
        return _Minimum.apply(x, bound) if bound.requires_grad else torch.minimum(x, bound)


def _largest(x: Tensor) -> Tensor:
    """The maxima (N, C) over positions of (N, P, C).

    Of several positions at once, up to 256 numbers: what is reduced is vectorised along the last axis, and a few
    channels do not fill a vector.
    """
    count, positions, channels = x.shape
    if not x.is_contiguous():  # the channels are not the last axis in memory: this would copy, and is fast without
        return x.amax(1)
    together = math.gcd(positions, max(1, 256 // channels))
    return x.view(count, positions // together, together * channels).amax(1).view(count, together, channels).amax(1)


class ClippedModel(nn.Module):
    """A classifier with an upper bound per channel after every activation call.

    Computes the given network with `min(activation, Z)` in the place of every activation, Z the bound of its
    channel (Wang et al., arXiv 2308.04617, section 3). All bounds start at +inf; the logits are then bit
    for bit those of the given model in evaluation mode. A clipped model always is in evaluation mode.

    A site is a call, not a module: a ReLU module that is called twice has two sites with a bound each. Sites
    are the calls of ReLU (as module, function or method; `clamp` from 0 is one), ReLU6, GELU, SiLU,
    Hardswish, LeakyReLU, PReLU, RReLU, ELU, SELU, CELU, Mish and Softplus; a `clamp` or `Hardtanh` from 0 to
    more than 1 counts as a ReLU with a ceiling. Gates (Sigmoid, Hardsigmoid), Tanh and softmax are no sites.
    A formula such as `x * sigmoid(x)` is not seen as the activation that it is, nor is an activation inside a
    function under `torch.fx.wrap`.

    The channel axis is that of the layer that makes the channels: axis 1 after a convolution or a batch norm,
    the last one after Linear and LayerNorm, as in the channels-last blocks of ConvNeXt and ViT.

    Parameters
    ----------
    model
        A classifier from images (N, C, H, W), float32 in [0, 1], to logits (N, K). Its weights and buffers
        are shared, not copied: train it further and the clipped model follows. Its structure and its device
        are taken as they are now: move the model first, then clip it. The model itself is left as it is.

    Attributes
    ----------
    sites
        The names of the activation calls in the order they run, as torchvision's feature extraction names
        them (`"layer1.0.relu_1"`).
    channels
        The number of channels of every site.
    original
        The given model.

    Raises
    ------
    ValueError
        `model` is no module, is clipped already, has hooks, has no activation call, cannot be traced by
        `torch.fx`, or has an activation whose channel axis or in-place effect cannot be told. The message
        says what to do.

    Examples
    --------
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.ReLU())
    >>> clipped = ClippedModel(model)
    >>> clipped.sites, clipped.channels
    (('2',), {'2': 2})
    >>> clipped.set_bounds({"2": 0.0})
    >>> clipped(torch.rand(1, 3, 1, 1)).tolist()
    [[0.0, 0.0]]
    """

    sites: tuple[str, ...]
    channels: dict[str, int]
    original: nn.Module

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _check_model(model)
        # past nn.Module's registration: state_dict and parameters would list everything twice
        object.__setattr__(self, "original", model)
        network, names = _trace(model)
        activations = _activations(network)
        if not activations:
            raise ValueError(
                "model has no activation call to clip. A ClippedModel needs ReLU, GELU, SiLU or another one "
                "that its documentation names, called as a module of torch.nn, a function of torch or a "
                "tensor method"
            )
        layouts = _layouts(network, names, model)
        self.sites = tuple(names[node] for node in activations)
        self.channels = {}
        clips = {}
        for node, site in zip(activations, self.sites, strict=True):
            axis, count = layouts[node].axis, layouts[node].count
            if axis is None or count is None:
                raise ValueError(
                    f"site {site!r}: cannot tell which axis holds the channels, or how many there are: "
                    f"{_why_unknown(node, layouts, names, network)}. Call the activation directly after the "
                    "layer that makes the channels (convolution, linear or normalisation)"
                )
            self.channels[site] = count
            clips[node] = Clip(count, axis).to(device_of(model))
        self._never_negative = frozenset(names[node] for node, name in activations.items() if name in _RELU_LIKE)
        _insert(network, clips, names)
        self.network = network
        self.eval()

    def train(self, mode: bool = True) -> ClippedModel:
        """Stay in evaluation mode: the graph is that of evaluation."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K) of float images (N, C, H, W)."""
        return self.network(images)  # type: ignore[no-any-return]

    def _clips(self) -> Iterator[tuple[str, Clip]]:
        for index, site in enumerate(self.sites):
            clip = self.network.get_submodule(f"{_CLIPS}.{index}")
            assert isinstance(clip, Clip)
            yield site, clip

    def _check_site(self, site: str) -> None:
        if site not in self.channels:
            raise ValueError(f"there is no site {site!r}; the sites are {', '.join(self.sites)}")

    @property
    def bounds(self) -> dict[str, Tensor]:
        """The bounds in force: for every site a copy, float32 (C,)."""
        return {site: clip.bound.detach().float().clone() for site, clip in self._clips()}

    def set_bounds(self, bounds: Mapping[str, Tensor | float]) -> None:
        """Set the bounds of some sites or of all; the others stay.

        Parameters
        ----------
        bounds
            For a site (C,) numbers, or one number for all its channels. +inf is no bound.

        Raises
        ------
        ValueError
            An unknown site, a wrong shape, NaN, -inf, or a bound below 0 at a site whose activation is never
            negative (ReLU, ReLU6, Softplus). No bound is changed then.
        """
        if not isinstance(bounds, Mapping):
            raise ValueError(f"bounds must map sites to bounds, got {type(bounds).__name__}")
        checked: dict[str, Tensor] = {}
        for site, given in bounds.items():
            self._check_site(site)
            try:
                value = torch.as_tensor(given, dtype=torch.float32).detach()
            except (TypeError, ValueError, RuntimeError) as error:
                raise ValueError(f"bounds[{site!r}] must be a tensor or a number: {error}") from error
            if value.ndim and value.shape != (self.channels[site],):
                raise ValueError(f"bounds[{site!r}] must have shape ({self.channels[site]},), got {tuple(value.shape)}")
            if torch.isnan(value).any() or torch.isneginf(value).any():
                raise ValueError(f"bounds[{site!r}] must be finite or +inf, got NaN or -inf")
            if site in self._never_negative and (value < 0).any():
                raise ValueError(
                    f"bounds[{site!r}] must be at least 0, as its activation is never negative, "
                    f"got {float(value.min()):g}"
                )
            checked[site] = value
        with torch.no_grad():
            for site, clip in self._clips():
                if site in checked:
                    clip.bound.copy_(checked[site])

    def reset(self) -> None:
        """Set all bounds to +inf: no clipping."""
        self.set_bounds(dict.fromkeys(self.sites, torch.inf))

    def differentiable(self) -> tuple[fx.GraphModule, dict[str, Tensor]]:
        """A private network to fit the bounds on by gradient.

        Returns
        -------
        network
            Computes what this model computes, in evaluation mode. Its weights share this model's memory and
            ask for no gradient.
        bounds
            For every site the network's own bounds: a leaf tensor, float32 (C,), that asks for one. Change it
            in place, as an optimiser does, and the network follows; this model does not until `set_bounds`.
            Where an activation equals its bound the activation gets the gradient; a bound of +inf gets 0.

        Examples
        --------
        >>> clipped = ClippedModel(nn.Sequential(nn.Flatten(), nn.Linear(3, 2), nn.Softplus()))
        >>> clipped.set_bounds({"2": torch.tensor([0.0, torch.inf])})
        >>> network, bounds = clipped.differentiable()
        >>> network(torch.rand(5, 3, 1, 1)).sum().backward()
        >>> bounds["2"].grad
        tensor([5., 0.])
        """
        clips = dict(self._clips())
        bounds = {site: bound.requires_grad_() for site, bound in self.bounds.items()}
        memo: dict[int, Any] = {id(buffer): buffer.detach() for buffer in self.network.buffers()}
        for parameter in self.network.parameters():
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        memo |= {id(clip.bound): bounds[site] for site, clip in clips.items()}
        return copy.deepcopy(self.network, memo).eval(), bounds

    def activations(
        self, images: Tensor | LabelledImages, quantiles: Sequence[float] = (0.5, 0.99), batch_size: int | None = None
    ) -> ActivationStatistics:
        """Statistics of every site's activations, before the clip of the site itself.

        The bounds are in force: a site is measured as the clips of the sites before it leave it. `reset`
        first for the activations of the original.

        One pass, and memory that does not grow with the number of images: maximum and mean are exact, quantiles
        exact for up to 2,000 images and taken from a histogram of 2,048 bins a channel beyond. They are then off by
        at most 1/2,000 of what lies between the channel's smallest and largest number, and the levels 0 and 1 exact.

        Parameters
        ----------
        images
            (N, C, H, W), uint8 or float32 in [0, 1].
        quantiles
            Which quantiles over the images, each in [0, 1].
        batch_size
            Images at once; by default as `bclip_lab.models.images_at_once` has it.

        Raises
        ------
        ValueError
            No images, images of a wrong shape, dtype or range, or a quantile outside [0, 1].
        """
        quantiles = tuple(float(q) for q in quantiles)
        if not all(0 <= q <= 1 for q in quantiles):
            raise ValueError(f"quantiles must lie in [0, 1], got {quantiles}")
        images = _tensor(images)
        kind = Rows if len(images) <= EXACT else Histogram
        seen = {site: kind(channels) for site, channels in self.channels.items()}
        means = self._measure(images, batch_size, {site: values.add for site, values in seen.items()})
        return ActivationStatistics(
            maximum={site: values.maximum() for site, values in seen.items()},
            mean=means,
            quantile={site: values.quantiles(quantiles) for site, values in seen.items()},
            quantiles=quantiles,
            count=len(images),
            per_image={site: values.joined() for site, values in seen.items() if isinstance(values, Rows)},
        )

    def site_activations(self, images: Tensor | LabelledImages, site: str, batch_size: int | None = None) -> Tensor:
        """Of every image, the largest activation over positions at one site: float32 (N, C), on the CPU.

        Measured as in `activations`: before the clip of the site, with those of the sites before it in force.
        """
        self._check_site(site)
        rows = Rows(self.channels[site])
        self._measure(_tensor(images), batch_size, {site: rows.add})
        return rows.joined()

    def activation_maps(
        self, images: Tensor | LabelledImages, site: str, channel: int, batch_size: int | None = None
    ) -> Tensor:
        """Of every image, the activations of one channel at all positions of a site: float32, on the CPU.

        (N, H, W) where the site has rows and columns, (N, T) where it has tokens, (N,) where it has no
        positions, as after Linear. Measured as in `activations`; raises `ValueError` for an unknown site or
        channel.

        Examples
        --------
        >>> layers = nn.Conv2d(3, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        >>> clipped = ClippedModel(nn.Sequential(*layers))
        >>> clipped.activation_maps(torch.rand(5, 3, 8, 8), "1", channel=0).shape
        torch.Size([5, 6, 6])
        """
        self._check_site(site)
        if not 0 <= channel < self.channels[site]:
            raise ValueError(f"channel must lie in [0, {self.channels[site]}) at site {site!r}, got {channel}")
        maps: list[Tensor] = []

        def observe(clip: Clip, args: tuple[Tensor]) -> None:
            maps.append(args[0].detach().float().movedim(clip.axis, -1)[..., channel].cpu())

        handle = dict(self._clips())[site].register_forward_pre_hook(observe)
        try:
            logits(self, images, batch_size)
        finally:
            handle.remove()
        return torch.cat(maps)

    def _measure(
        self, images: Tensor, batch_size: int | None, seen: Mapping[str, Callable[[Tensor], None]]
    ) -> dict[str, Tensor]:
        """Give `seen` of each site the maxima over positions (n, C) of every batch; per site the means (C,) of all."""
        sums: dict[str, Tensor] = {site: torch.zeros(self.channels[site], dtype=torch.float64) for site in seen}
        rows = dict.fromkeys(seen, 0)

        def observer(site: str) -> Callable[[Clip, tuple[Tensor]], None]:
            def observe(clip: Clip, args: tuple[Tensor]) -> None:
                x = args[0].detach().float().movedim(clip.axis, -1).unsqueeze(1).flatten(1, -2)
                seen[site](_largest(x).cpu())
                sums[site] += x.mean(1).double().sum(0).cpu()
                rows[site] += len(x)

            return observe

        handles = []
        try:
            for site, clip in self._clips():
                if site in seen:
                    handles.append(clip.register_forward_pre_hook(observer(site)))
            batch_size = batch_size or images_at_once(images.shape)
            for batch in images.split(batch_size):
                logits(self, batch, batch_size)
        finally:
            for handle in handles:
                handle.remove()
        for site, count in rows.items():
            if count != len(images):
                raise ValueError(
                    f"site {site!r} has {count} rows for {len(images)} images: the model mixes images and "
                    "positions in its first axis, so that no activation belongs to one image"
                )
        return {site: (total / len(images)).float() for site, total in sums.items()}


@dataclass(frozen=True, eq=False)
class ActivationStatistics:
    """Per site and channel, the activations of some images, as `ClippedModel.activations` measures them.

    `maximum` (C,) and `quantile` (Q, C) are over images, of each image's maximum over positions: what a bound
    must clear to leave the image as it is. `mean` (C,) is over images and positions. `quantiles` are the Q
    levels, `count` is the number of images. `per_image` (N, C), kept of up to 2,000 images, is each image's maximum
    over positions. All tensors are float32 on the CPU.
    """

    maximum: dict[str, Tensor]
    mean: dict[str, Tensor]
    quantile: dict[str, Tensor]
    quantiles: tuple[float, ...]
    count: int
    per_image: dict[str, Tensor] = field(default_factory=dict)


def abnormality(clean: ActivationStatistics, triggered: ActivationStatistics, floor: float = 0.01) -> dict[str, Tensor]:
    """The largest triggered activation as a multiple of the largest clean one: per site (C,).

    Parameters
    ----------
    clean, triggered
        Statistics of the same model.
    floor
        A channel's clean maximum counts as at least this share of its site's largest: the ratio of a channel
        that is silent on clean images would be infinite. Where the whole site is silent, the ratio is to 1.

    Raises
    ------
    ValueError
        The statistics have different sites or channels, or `floor` is not above 0.

    Examples
    --------
    >>> def statistics(maximum):
    ...     values = {"relu": torch.tensor(maximum)}
    ...     return ActivationStatistics(values, values, {}, (), 1)
    >>> abnormality(statistics([1.0, 2.0, 0.0]), statistics([5.0, 2.0, 0.1]))
    {'relu': tensor([5., 1., 5.])}
    """
    if not floor > 0:
        raise ValueError(f"floor must be above 0, got {floor}")
    ours, theirs = ({site: len(v) for site, v in s.maximum.items()} for s in (clean, triggered))
    if ours != theirs:
        raise ValueError(f"clean and triggered must be of the same model, got channels {ours} and {theirs}")
    ratios = {}
    for site, values in clean.maximum.items():
        largest = float(values.max())
        base = values.clamp(min=floor * largest) if largest > 0 else torch.ones_like(values)
        ratios[site] = triggered.maximum[site] / base
    return ratios


def save_bounds(clipped: ClippedModel, path: str | Path, **card: Any) -> Path:
    """Write the bounds of a model: safetensors, with a JSON card beside it. +inf is kept.

    Parameters
    ----------
    clipped
        The model.
    path
        Ends in `.safetensors`.
    card
        More to write on the card, what JSON can hold. `sites`, `channels` and `version` (of this package) are
        written anyway.

    Raises
    ------
    ValueError
        Another ending, a card that JSON cannot hold, or one that has `sites`, `channels` or `version`.
        Nothing is written then.
    """
    own = {"sites": list(clipped.sites), "channels": clipped.channels, "version": version("bclip_lab")}
    if taken := sorted(own.keys() & card.keys()):
        raise ValueError(f"card must not have {taken}: save_bounds writes them itself")
    return save_tensors(path, clipped.bounds, {**card, **own})


def load_bounds(clipped: ClippedModel, path: str | Path) -> dict[str, Any]:
    """Set the bounds of a model to those that `save_bounds` wrote, and return the card.

    Raises
    ------
    FileNotFoundError
        The file or its card is missing.
    ValueError
        The file is damaged, or its bounds are of a model with other sites or channels. No bound is changed
        then.
    """
    bounds, card = load_tensors(path)
    wrong = [f"site {site!r} is missing" for site in clipped.sites if site not in bounds]
    wrong += [f"the model has no site {site!r}" for site in bounds if site not in clipped.channels]
    for site, count in clipped.channels.items():
        if site in bounds and bounds[site].shape != (count,):
            wrong.append(f"site {site!r} has bounds of shape {tuple(bounds[site].shape)}, the model's has ({count},)")
    if not wrong and (card.get("sites") != list(clipped.sites) or card.get("channels") != clipped.channels):
        wrong.append(f"the card lists the sites {card.get('sites')} with channels {card.get('channels')}")
    if wrong:
        raise ValueError(f"{path} does not hold bounds of this model: {'; '.join(wrong)}")
    clipped.set_bounds(bounds)
    return card


def _tensor(images: Tensor | LabelledImages) -> Tensor:
    images = images.images if isinstance(images, LabelledImages) else images
    check_images(images)
    return images


# --- tracing ------------------------------------------------------------------------------------------------


class _Tracer(fx.Tracer):
    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)


class _Proxy(fx.Proxy):
    """A traced value for which `x += y` changes x, as it does a tensor; fx would record `x = x + y`."""


def _augmented(function: Callable[[Any, Any], Any]) -> Callable[[_Proxy, Any], fx.Proxy]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _function in (operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ipow):
    setattr(_Proxy, f"__{_function.__name__}__", _augmented(_function))

# Modules that tracing keeps whole although they have activations inside.
_OPAQUE = (
    nn.Transformer,
    nn.TransformerEncoder,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoder,
    nn.TransformerDecoderLayer,
    nn.RNN,
    nn.RNNCell,
)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        place = f"submodule {name!r} of the model" if name else "the model"
        if isinstance(module, (ClippedModel, Clip)):
            raise ValueError(f"{place} is clipped already: give the .original of the ClippedModel")
        if isinstance(module, _OPAQUE):
            raise ValueError(
                f"{place} is an nn.{type(module).__name__}, with activations out of reach: write it out as "
                "attention, linear layers and activation calls"
            )
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        if any(getattr(module, kind) for kind in hooks):
            raise ValueError(
                f"{place} has hooks, which the rewritten graph would not run: remove them first. Weight and "
                "spectral norm are hooks, too, in torch.nn.utils, but not in torch.nn.utils.parametrizations"
            )


def _trace(model: nn.Module) -> tuple[fx.GraphModule, dict[fx.Node, str]]:
    """The graph of a model in evaluation mode, over the model's own weights, and the path of every node."""
    others = list(inspect.signature(model.forward).parameters.values())[1:]
    # an optional argument (return_features=False) is fixed: an `if` on it could not be traced
    fixed = {p.name: p.default for p in others if p.default is not p.empty}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if required := [p.name for p in others if p.name not in fixed and p.kind not in variadic]:
        raise ValueError(f"model must take images alone, its forward method also needs {', '.join(required)}")
    try:
        # a copy of the modules around the same tensors: evaluation mode must not touch the given model
        tensors = (*model.parameters(), *model.buffers())
        private = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors}).eval()
        graph = _Tracer().trace(private, concrete_args=fixed or None)
        network = fx.GraphModule(private, graph, type(model).__name__)
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(
            f"model cannot be traced by torch.fx ({type(error).__name__}: {error}). Its forward method must "
            "not branch or loop on the values or the shape of a tensor, nor make numbers or arrays of them. "
            "Rewrite such code, or put it into a function without activations, marked with torch.fx.wrap"
        ) from error
    return network, _paths(network.graph)


def _paths(graph: fx.Graph) -> dict[fx.Node, str]:
    """The path of every node: of the module it calls, or of the module around it and the function that it calls.

    Numbered from the second of a name on, as torchvision's feature extraction does it, whose import alone takes longer
    than everything else here.
    """
    paths: dict[str, fx.Node] = {}
    for node in graph.nodes:
        around = [path for path, _ in node.meta.get("nn_module_stack", {}).values()][-1:]
        function = [] if node.op == "call_module" else [node.name]
        name = re.sub(r"_[0-9]+$", "", ".".join(filter(None, around + function)))  # fx numbers over the whole graph
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        paths[next(path for path in itertools.chain([name], numbered) if path not in paths)] = node
    return {node: path for path, node in paths.items()}


# --- what a node calls --------------------------------------------------------------------------------------

_CALLS = ("call_module", "call_function", "call_method")
# Activations whose output is never negative: a bound below 0 would make a constant of the channel.
_RELU_LIKE = {"clamp", "clamp_min", "clip", "hardtanh", "relu", "relu6", "softplus", "threshold"}
_ACTIVATIONS = _RELU_LIKE | {
    "celu", "elu", "gelu", "hardswish", "leaky_relu", "mish", "prelu", "rrelu", "selu", "silu",
}  # fmt: skip
# Modules that tracing keeps whole, and the function that each one calls.
_MODULES: dict[type[nn.Module], str] = {
    nn.CELU: "celu", nn.ELU: "elu", nn.GELU: "gelu", nn.Hardswish: "hardswish", nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh", nn.LeakyReLU: "leaky_relu", nn.Mish: "mish", nn.PReLU: "prelu", nn.ReLU: "relu",
    nn.RReLU: "rrelu", nn.SELU: "selu", nn.SiLU: "silu", nn.Softplus: "softplus", nn.Threshold: "threshold",
}  # fmt: skip
_AUGMENTED = {"iadd", "imul", "ipow", "isub", "itruediv"}
# Calls that may give back their input itself, as dropout does in evaluation mode, and calls that give a view.
_MAYBE_INPUT = {
    "alpha_dropout", "bfloat16", "contiguous", "cpu", "cuda", "detach", "double", "dropout", "dropout1d",
    "dropout2d", "dropout3d", "feature_alpha_dropout", "feature_dropout", "float", "half", "pos",
    "stochastic_depth", "to", "type", "type_as",
}  # fmt: skip
_VIEWS = {
    "H", "T", "as_strided", "broadcast_to", "chunk", "data", "diagonal", "dsplit", "expand", "expand_as",
    "flatten", "getitem", "hsplit", "mH", "mT", "movedim", "moveaxis", "narrow", "permute", "ravel", "real",
    "reshape", "reshape_as", "select", "split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t",
    "tensor_split", "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as", "vsplit",
}  # fmt: skip


def _operation(node: fx.Node, network: nn.Module) -> tuple[str, bool]:
    """What a node calls (without the underscore of an in-place spelling), and whether it works in place.

    A function from outside PyTorch and torchvision, of which nothing is known, has the name "".
    """
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        names = (name for kind, name in _MODULES.items() if isinstance(module, kind))
        return next(names, type(module).__name__), getattr(module, "inplace", False) is True
    if node.op == "call_method":
        name = str(node.target)
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        package = (getattr(node.target, "__module__", None) or "torch").partition(".")[0]
        if package not in ("torch", "torchvision", "_operator", "builtins"):
            return "", False
        if name == "getattr":
            return str(node.args[1]), False
        if name in _AUGMENTED or _inplace_argument(node):
            return name, True
    else:
        return "", False
    return name.strip("_"), name.endswith("_")  # F.threshold is _threshold


def _inplace_argument(node: fx.Node) -> bool:
    try:
        signature = inspect.signature(node.target)  # type: ignore[arg-type]
        return signature.bind(*node.args, **node.kwargs).arguments.get("inplace") is True
    except (TypeError, ValueError):  # a built-in function, which has no signature and no such argument
        return False


def _argument(node: fx.Node, position: int, *names: str, default: Any = None) -> Any:
    """An argument of a call, by position or by any of its names."""
    if position < len(node.args):
        return node.args[position]
    return next((node.kwargs[name] for name in names if name in node.kwargs), default)


def _source(node: fx.Node) -> fx.Node | None:
    """The tensor that a call works on: its first argument."""
    first = _argument(node, 0, "input") if node.op in _CALLS else None
    return first if isinstance(first, fx.Node) else None


def _activations(network: fx.GraphModule) -> dict[fx.Node, str]:
    """The activation calls in graph order, with what each one calls."""
    found: dict[fx.Node, str] = {}
    of_images: set[fx.Node] = set()
    for node in network.graph.nodes:
        # what is computed from weights alone (Swin's position bias) is no activation of an image
        if node.op == "placeholder" or any(other in of_images for other in node.all_input_nodes):
            of_images.add(node)
            name, _ = _operation(node, network)
            if name in _ACTIVATIONS and _is_activation(node, name, network):
                found[node] = name
    return found


def _is_activation(node: fx.Node, name: str, network: nn.Module) -> bool:
    """Whether the limits of a clamp, hardtanh or threshold make it a ReLU."""
    module = network.get_submodule(str(node.target)) if node.op == "call_module" else None
    low: Any = 0
    high: Any = None
    if name == "hardtanh":
        low = _argument(node, 1, "min_val", default=-1) if module is None else module.min_val
        high = _argument(node, 2, "max_val", default=1) if module is None else module.max_val
    elif name in ("clamp", "clip", "clamp_min"):
        low, high = _argument(node, 1, "min"), _argument(node, 2, "max")
    elif name == "threshold":
        limits = {_argument(node, 1, "threshold"), _argument(node, 2, "value")}
        low = 0 if (limits if module is None else {module.threshold, module.value}) == {0} else None
    if not isinstance(low, (int, float)) or low != 0:
        return False
    # [0, 1] is the range of a gate or an image
    return high is None or (isinstance(high, (int, float)) and high > 1)


# --- where the channels are ---------------------------------------------------------------------------------

_SAME_SHAPE = _ACTIVATIONS | _MAYBE_INPUT | {
    "abs", "channel_shuffle", "clone", "exp", "hardsigmoid", "local_response_norm", "log", "log_softmax",
    "neg", "normalize", "rsqrt", "sigmoid", "softmax", "softsign", "sqrt", "square", "tanh",
}  # fmt: skip
_BROADCAST = _AUGMENTED | {
    "add", "div", "divide", "maximum", "minimum", "mul", "multiply", "pow", "sub", "subtract", "true_divide",
    "truediv",
}  # fmt: skip


@dataclass(frozen=True)
class _Layout:
    """The channel axis of a value, the number of channels and of axes; None is unknown.

    `axis` is counted from the last (negative) wherever `ndim` is known.
    """

    axis: int | None = None
    count: int | None = None
    ndim: int | None = None

    @staticmethod
    def at(axis: int, count: int | None, ndim: int | None) -> _Layout:
        return _Layout(axis - ndim if ndim is not None and axis >= 0 else axis, count, ndim)

    @property
    def channels_first(self) -> bool:
        """Whether the channels are at axis 1."""
        return self.axis is not None and (self.axis if self.axis > 0 else self.axis + (self.ndim or 0)) == 1

    @property
    def known(self) -> bool:
        return self.axis is not None and self.count is not None


def _layouts(network: fx.GraphModule, names: Mapping[fx.Node, str], model: nn.Module) -> dict[fx.Node, _Layout]:
    """The layout of every value of a graph, from the layers that make the channels and in graph order."""
    known: dict[fx.Node, _Layout] = {}
    for node in network.graph.nodes:
        source = _source(node)
        x = _Layout() if source is None else known[source]
        if node.op == "placeholder":
            known[node] = _Layout(-3, None, 4)  # images (N, C, H, W)
        elif node.op == "call_module":
            known[node] = _of_module(network.get_submodule(str(node.target)), x)
        elif node.op in _CALLS:
            known[node] = _of_call(node, x, known, network, names, model)
        else:
            known[node] = _Layout()
    return known


def _of_module(m: nn.Module, x: _Layout) -> _Layout:
    if isinstance(m, nn.modules.conv._ConvNd):
        return _Layout.at(1, m.out_channels, len(m.kernel_size) + 2)
    if isinstance(m, nn.modules.batchnorm._NormBase):  # instance norm, too
        return _Layout.at(1, m.num_features, x.ndim)
    if isinstance(m, nn.GroupNorm):
        return _Layout.at(1, m.num_channels, x.ndim)
    if isinstance(m, nn.Linear):
        return _Layout.at(-1, m.out_features, x.ndim)
    if isinstance(m, (nn.LayerNorm, nn.RMSNorm)):
        return _Layout.at(-1, m.normalized_shape[0], x.ndim) if len(m.normalized_shape) == 1 else x
    if isinstance(m, nn.Flatten):
        return _flattened(x, m.start_dim, m.end_dim)
    kind = type(m).__module__.removeprefix("torch.nn.modules.")
    if kind in ("pooling", "padding", "upsampling"):
        return x if x.channels_first else _Layout()
    if kind in ("activation", "dropout", "channelshuffle") and not isinstance(m, (nn.MultiheadAttention, nn.GLU)):
        return x
    return x if isinstance(m, (nn.Identity, nn.LocalResponseNorm)) else _Layout()


def _of_call(
    node: fx.Node,
    x: _Layout,
    known: Mapping[fx.Node, _Layout],
    network: nn.Module,
    names: Mapping[fx.Node, str],
    model: nn.Module,
) -> _Layout:
    name, _ = _operation(node, network)
    if name in _SAME_SHAPE:
        return x
    if name in _BROADCAST:
        return _broadcast([v for v in node.all_input_nodes if not _is_number(v, network)], known)
    if re.fullmatch(r"conv(_transpose)?[123]d|linear", name):
        return _by_weight(node, name, x, network, names, model)
    if name in ("batch_norm", "group_norm", "instance_norm"):
        tensors = [_attribute(value, network) for value in node.all_input_nodes]
        own = x.count if x.channels_first else None
        return _Layout.at(1, next((len(t) for t in tensors if t is not None and t.ndim == 1), own), x.ndim)
    if name in ("layer_norm", "rms_norm"):
        shape = _argument(node, 1, "normalized_shape")
        if not isinstance(shape, (tuple, list)) or not all(isinstance(n, int) for n in shape):
            return _Layout()
        return _Layout.at(-1, shape[0], x.ndim) if len(shape) == 1 else x
    if "pool" in name or name in ("interpolate", "upsample"):
        return x if x.channels_first else _Layout()
    if name == "flatten":
        return _flattened(x, _argument(node, 1, "start_dim", default=0), _argument(node, 2, "end_dim", default=-1))
    if name in ("mean", "sum", "amax"):
        return _reduced(x, _argument(node, 1, "dim"), _argument(node, 2, "keepdim", default=False))
    if name == "permute":
        dims = _argument(node, 1, "dims")
        return _permuted(x, dims if isinstance(dims, (tuple, list)) else node.args[1:])
    if name in ("transpose", "swapaxes", "swapdims"):
        return _transposed(x, _argument(node, 1, "dim0", "axis0"), _argument(node, 2, "dim1", "axis1"))
    if name in ("cat", "concat", "concatenate"):
        return _joined(_argument(node, 0, "tensors"), _argument(node, 1, "dim", "axis", default=0), known)
    return _Layout()


def _attribute(value: fx.Node, network: nn.Module) -> Tensor | None:
    """The parameter or buffer that a node reads; None for every other node."""
    if value.op != "get_attr":
        return None
    owner, _, name = str(value.target).rpartition(".")
    found = getattr(network.get_submodule(owner), name)
    return found if isinstance(found, Tensor) else None


def _is_number(value: fx.Node, network: nn.Module) -> bool:
    tensor = _attribute(value, network)
    return tensor is not None and tensor.numel() == 1


def _by_weight(
    node: fx.Node, name: str, x: _Layout, network: nn.Module, names: Mapping[fx.Node, str], model: nn.Module
) -> _Layout:
    """A functional convolution or linear layer."""
    given = _argument(node, 1, "weight")
    weight = _attribute(given, network) if isinstance(given, fx.Node) else None
    transposed = "transpose" in name
    if weight is not None:
        count = weight.shape[1] * _argument(node, 6, "groups", default=1) if transposed else weight.shape[0]
    else:  # a computed weight (standardised, quantised): ask the layer whose code this call is in
        layer = model.get_submodule(names[node].rpartition(".")[0])
        count = getattr(layer, "out_features" if name == "linear" else "out_channels", None)
    if name == "linear":
        return _Layout.at(-1, count, x.ndim)
    return _Layout.at(1, count, int(name[-2]) + 2)  # conv2d: images, channels and 2 axes of positions


def _broadcast(operands: Sequence[fx.Node], known: Mapping[fx.Node, _Layout]) -> _Layout:
    """Operands that agree. What is unknown, or has one channel, must fit to those that have several."""
    layouts = [known[operand] for operand in operands]
    several = [x for x in layouts if x.known and x.count != 1]
    if not several and all(x.known for x in layouts):
        several = layouts
    if len({(x.axis, x.count) for x in several}) == 1:
        return several[0]
    ndims = [x.ndim for x in layouts if x.ndim is not None]
    return _Layout(ndim=max(ndims)) if ndims else _Layout()


def _flattened(x: _Layout, start: Any, end: Any) -> _Layout:
    if x.ndim is None or not isinstance(start, int) or not isinstance(end, int):
        return _Layout()
    start, end = start % x.ndim, end % x.ndim
    ndim = x.ndim - (end - start)
    axis = None if x.axis is None else x.axis + x.ndim
    if axis is None or start <= axis <= end:
        # one axis alone stays what it is; channels joined with positions are channels no more
        return x if start == end else _Layout(ndim=ndim)
    return _Layout.at(axis if axis < start else axis - (end - start), x.count, ndim)


def _reduced(x: _Layout, dims: Any, keepdim: Any) -> _Layout:
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    if x.axis is None or x.ndim is None or not all(isinstance(dim, int) for dim in dims):
        return _Layout()
    axis, gone = x.axis + x.ndim, {dim % x.ndim for dim in dims}
    if axis in gone:
        return _Layout()
    return x if keepdim else _Layout.at(axis - sum(dim < axis for dim in gone), x.count, x.ndim - len(gone))


def _permuted(x: _Layout, dims: Sequence[Any]) -> _Layout:
    ndim = len(dims)
    if x.axis is None or not all(isinstance(dim, int) for dim in dims):
        return _Layout(ndim=ndim)
    return _Layout.at([dim % ndim for dim in dims].index(x.axis % ndim), x.count, ndim)


def _transposed(x: _Layout, first: Any, second: Any) -> _Layout:
    if x.axis is None or not isinstance(first, int) or not isinstance(second, int):
        return _Layout(ndim=x.ndim)
    if x.ndim is not None:
        first, second = first % x.ndim - x.ndim, second % x.ndim - x.ndim
    elif (first < 0) != (x.axis < 0) or (second < 0) != (x.axis < 0):
        return _Layout()  # one counts from the front and one from the back, of nobody knows how many
    return replace(x, axis={first: second, second: first}.get(x.axis, x.axis))


def _joined(tensors: Any, dim: Any, known: Mapping[fx.Node, _Layout]) -> _Layout:
    if not isinstance(tensors, (tuple, list)) or not all(isinstance(t, fx.Node) for t in tensors):
        return _Layout()
    parts = [known[t] for t in tensors]
    x = parts[0]
    counts = [part.count for part in parts if part.count is not None]
    if x.axis is None or len({part.axis for part in parts}) > 1 or len(counts) < len(parts):
        return _Layout(ndim=x.ndim)
    if x.ndim is not None and isinstance(dim, int):
        dim = dim % x.ndim - x.ndim
    if dim == x.axis:
        return replace(x, count=sum(counts))
    same_side = isinstance(dim, int) and (dim < 0) == (x.axis < 0)
    return x if same_side and len(set(counts)) == 1 else _Layout(ndim=x.ndim)


def _why_unknown(
    node: fx.Node, layouts: Mapping[fx.Node, _Layout], names: Mapping[fx.Node, str], network: nn.Module
) -> str:
    """The operation on the way to a node that hid the channels."""
    while not any(layouts[other].known for other in node.all_input_nodes):
        before = [other for other in node.all_input_nodes if other.op in _CALLS]
        if not before:
            return f"no layer comes before {names[node]!r}"
        node = before[0]
    name = _operation(node, network)[0] or getattr(node.target, "__name__", str(node.target))
    return f"they are lost in {name!r} (at {names[node]!r})"


# --- rewriting ----------------------------------------------------------------------------------------------

_CLIPS = "_clips_of_sites"


def _insert(network: fx.GraphModule, clips: Mapping[fx.Node, Clip], names: Mapping[fx.Node, str]) -> None:
    """Put a clip behind every activation, so that whoever reads it afterwards reads it clipped."""
    nodes = list(network.graph.nodes)
    order = {node: float(index) for index, node in enumerate(nodes)}
    # of the values so far, `memory` groups those that may share memory, `tensor` those that are one tensor
    memory: dict[fx.Node, fx.Node] = {}
    tensor: dict[fx.Node, fx.Node] = {}
    targets = {node: f"{_CLIPS}.{index}" for index, node in enumerate(clips)}
    for node in nodes:
        base, same = _shares(node, network)
        if node in clips:
            if "out" in node.kwargs:
                raise ValueError(f"site {names[node]!r} writes to out=: use the tensor that the call returns")
            readers = [(node, reader) for reader in node.users]
            if base is not node:  # in place: `relu_(y); return y` reads the activation by its input's name
                alike = [other for other in memory if memory[other] is memory[base]]
                readers += [(a, reader) for a in alike for reader in a.users if order[reader] > order[node]]
            network.add_submodule(targets[node], clips[node])
            with network.graph.inserting_after(node):
                clipped = network.graph.call_module(targets[node], (node,))
            for value, reader in readers:
                if value is not node and tensor[value] is not tensor[base]:
                    where = names.get(reader, "the output")
                    raise ValueError(
                        f"site {names[node]!r}: the activation works in place, on memory that may also be "
                        f"that of {names.get(value, value.name)!r}, which {where!r} reads later, past the "
                        "clip. Make the activation out-of-place (inplace=False, relu for relu_), or clone "
                        "its input"
                    )
                reader.replace_input_with(value, clipped)
            order[clipped] = order[node] + 0.5
            memory[clipped] = tensor[clipped] = clipped
        memory[node] = memory.get(base, node)
        tensor[node] = tensor.get(base, node) if same else node
    network.graph.lint()
    network.recompile()


def _shares(node: fx.Node, network: nn.Module) -> tuple[fx.Node, bool]:
    """The value whose memory a value may share (mostly itself), and whether the two surely are one tensor."""
    source = _source(node) or node
    name, in_place = _operation(node, network)
    if node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if in_place or isinstance(module, (nn.Identity, nn.modules.dropout._DropoutNd)):
            return source, True
        return (source, False) if isinstance(module, (nn.Flatten, nn.Unflatten)) else (node, True)
    if in_place:
        return source, True
    # a function without a name is one of which nothing is known
    return (source, False) if name in _MAYBE_INPUT | _VIEWS or not name else (node, True)
