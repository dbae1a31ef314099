"""bclip_lab.clipping: where the clips are, what they do, and that nothing else changes."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision.models as tv
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torchvision.models import feature_extraction

from bclip_lab.clipping import (
    ActivationStatistics,
    ClippedModel,
    _trace,
    _Tracer,
    abnormality,
    load_bounds,
    save_bounds,
)
from bclip_lab.data.images import LabelledImages
from bclip_lab.models import resnet10, resnet18

INF = torch.inf


class Net(nn.Module):
    """One 1x1 convolution, then whatever a test does to its output; the first channels are the logits."""

    def __init__(self, body: Callable[[Tensor], Tensor], channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 1)
        nn.init.constant_(self.conv.bias, 0.5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.conv(x)).mean((2, 3))


def images(count: int = 4, size: int = 6, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


def two_pixels() -> nn.Sequential:
    """On images of two pixels a and b: p = relu(a + b), q = relu(a - b), logits 2 (p + q) and q."""
    return nn.Sequential(nn.Flatten(), linear([[1.0, 1.0], [1.0, -1.0]]), nn.ReLU(), linear([[2.0, 2.0], [0.0, 1.0]]))


def identical(model: nn.Module, clipped: nn.Module, x: Tensor) -> bool:
    """Bit for bit the same logits: with gradients, without, in channels-last memory, in bfloat16 autocast."""
    model.eval()
    same = torch.equal(model(x), clipped(x))
    with torch.no_grad():
        last = x.contiguous(memory_format=torch.channels_last)
        same &= torch.equal(model(x), clipped(x)) and torch.equal(model(last), clipped(last))
        with torch.autocast("cpu", torch.bfloat16):
            return same and torch.equal(model(x), clipped(x))


# --- architectures ------------------------------------------------------------------------------------------


class OldBlock(nn.Module):
    """The block much research code has: F.relu everywhere."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class OldResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        widths = (8, 8, 16, 32, 64)
        blocks = []
        for stage in range(4):
            blocks += [OldBlock(widths[stage], widths[stage + 1], 2 if stage else 1)]
            blocks += [OldBlock(widths[stage + 1], widths[stage + 1], 1)]
        self.layers = nn.Sequential(*blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        out = self.layers(F.relu(self.bn1(self.conv1(x))))
        out = F.avg_pool2d(out, out.shape[-1])
        out = out.view(out.size(0), -1)
        if return_features:
            return out
        return self.linear(out)


def small_convnext() -> nn.Module:
    config = tv.convnext.CNBlockConfig
    return tv.ConvNeXt([config(16, 32, 2), config(32, None, 1)], layer_scale=1.0, num_classes=10)


def small_vit() -> nn.Module:
    model = tv.VisionTransformer(32, 16, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10)
    nn.init.normal_(model.heads.head.weight)  # torchvision's is 0: all logits would be
    return model


def small_swin_v2() -> nn.Module:
    return tv.SwinTransformer(
        [4, 4], 16, [1, 1], [2, 2], [4, 4], block=tv.swin_transformer.SwinTransformerBlockV2, num_classes=10
    )


ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # the model, its sites, the images' size
    "lab resnet10": (partial(resnet10, 10, seed=0, width=8), 9, 32),
    "lab resnet18": (partial(resnet18, 10, seed=0, width=8), 17, 32),
    "resnet with F.relu": (OldResNet, 17, 32),
    "resnet18": (tv.resnet18, 17, 64),
    "vgg11_bn": (tv.vgg11_bn, 10, 32),
    "densenet": (partial(tv.DenseNet, 8, (2, 3), 16, num_classes=10), 13, 64),
    "mobilenet_v3_small": (tv.mobilenet_v3_small, 33, 64),
    "efficientnet_b0": (tv.efficientnet_b0, 49, 64),
    "shufflenet": (tv.shufflenet_v2_x0_5, 37, 64),
    "squeezenet": (tv.squeezenet1_1, 26, 64),
    "googlenet": (partial(tv.googlenet, init_weights=False), 57, 64),
    "convnext": (small_convnext, 3, 64),
    "vit": (small_vit, 2, 32),
    "swin_v2": (small_swin_v2, 2, 64),  # the ReLUs of its position bias see no image and are no sites
}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> tuple[nn.Module, int, Tensor]:
    build, sites, size = ARCHITECTURES[request.param]
    torch.manual_seed(0)
    return build(), sites, images(2, size)


def test_without_bounds_every_architecture_computes_the_same_bits(
    architecture: tuple[nn.Module, int, Tensor],
) -> None:
    model, sites, x = architecture
    clipped = ClippedModel(model)
    assert len(clipped.sites) == len(set(clipped.sites)) == sites
    assert identical(model, clipped, x)
    statistics = clipped.activations(x)
    assert {site: len(v) for site, v in statistics.maximum.items()} == clipped.channels
    # bounds at the largest activations clip nothing; smaller ones do
    x = x.contiguous(memory_format=torch.channels_last)  # as `activations` computes
    with torch.no_grad():  # attention takes another path where gradients are asked for
        clipped.set_bounds(statistics.maximum)
        assert torch.equal(clipped(x), model(x))
        clipped.set_bounds({site: v.clamp(min=0) / 2 for site, v in statistics.maximum.items()})
        assert clipped(x).isfinite().all() and not torch.equal(clipped(x), model(x))


def test_sites_have_torchvisions_names_in_the_order_they_run() -> None:
    clipped = ClippedModel(tv.resnet18())
    assert clipped.sites[:4] == ("relu", "layer1.0.relu", "layer1.0.relu_1", "layer1.1.relu")
    assert clipped.channels["relu"] == 64 and clipped.channels["layer4.1.relu_1"] == 512
    assert ClippedModel(resnet10(10, seed=0)).sites[:3] == ("relu", "stages.0.0.relu", "stages.0.0.relu_1")


@pytest.mark.parametrize("name", ["resnet18", "shufflenet_v2_x0_5", "convnext_tiny", "swin_t", "inception_v3", None])
def test_every_call_has_the_name_that_torchvision_gives_it(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    class Numbered(nn.Module):
        """Modules with numbers of their own, called twice and under two names, and functions of one name."""

        def __init__(self) -> None:
            super().__init__()
            self.conv_1, self.conv_2, self.act_1 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.ReLU()
            self.body = nn.Sequential(self.act_1, nn.ReLU(), self.conv_1)

        def forward(self, x_1: Tensor) -> Tensor:
            x = F.relu(self.conv_1(x_1))
            x = self.body(self.body(self.act_1(self.conv_2(x))))
            return F.relu(x + x.relu()).mean((2, 3))

    options = {"init_weights": True} if name == "inception_v3" else {}
    model = (Numbered() if name is None else tv.get_model(name, weights=None, **options)).eval()
    monkeypatch.setattr(feature_extraction.NodePathTracer, "proxy", _Tracer.proxy)  # it takes `x += y` for an add
    tracer = feature_extraction.NodePathTracer()
    tracer.trace(model)
    network, names = _trace(model)
    calls = ("call_module", "call_function", "call_method")
    expected = [path for node, path in tracer.node_to_qualname.items() if node.op in calls]
    assert [names[node] for node in network.graph.nodes if node.op in calls] == expected


# --- the original -------------------------------------------------------------------------------------------


def test_the_given_model_is_left_as_it_is_and_its_weights_are_shared() -> None:
    model = tv.resnet18().train()
    model.layer1.eval()
    model.fc.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    clipped = ClippedModel(model)
    clipped.activations(images(2, 32))
    assert clipped.original is model
    assert [module.training for module in model.modules()] == modes
    assert not model.fc.weight.requires_grad and model.fc.bias.requires_grad
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert {p.data_ptr() for p in clipped.parameters()} == {p.data_ptr() for p in model.parameters()}
    assert len(list(clipped.parameters())) == len(list(model.parameters()))
    assert len(clipped.state_dict()) == len(model.state_dict()) + len(clipped.sites)
    with torch.no_grad():
        model.fc.bias.add_(1)
        model.bn1.running_mean.add_(0.1)
    assert identical(model, clipped, images(2, 32))


def test_a_clipped_model_stays_in_evaluation_mode() -> None:
    clipped = ClippedModel(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.ReLU())).train()
    assert not any(module.training for module in clipped.modules())


def test_importing_clipping_does_not_import_torchvision() -> None:
    code = "import sys, bclip_lab.clipping; sys.exit('torchvision' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_a_deep_copy_has_bounds_and_weights_of_its_own() -> None:
    clipped = ClippedModel(two_pixels())
    clipped.set_bounds({"2": 1.0})
    other = copy.deepcopy(clipped)
    other.set_bounds({"2": 0.0})
    assert other.original is not clipped.original
    assert clipped.bounds["2"].tolist() == [1.0, 1.0] and other.bounds["2"].tolist() == [0.0, 0.0]
    own = {p.data_ptr() for p in other.parameters()}
    assert own == {p.data_ptr() for p in other.original.parameters()}
    assert own.isdisjoint(p.data_ptr() for p in clipped.parameters())


# --- known answers ------------------------------------------------------------------------------------------


def test_known_bounds_give_the_known_logits() -> None:
    clipped = ClippedModel(two_pixels())
    x = torch.tensor([[1.0, 0.25], [0.25, 1.0]]).view(2, 1, 1, 2)
    assert clipped(x).tolist() == [[4.0, 0.75], [2.5, 0.0]]  # hidden: 1.25, 0.75 and 1.25, 0
    clipped.set_bounds({"2": torch.tensor([1.0, 0.5])})
    assert clipped(x).tolist() == [[3.0, 0.5], [2.0, 0.0]]
    clipped.set_bounds({"2": torch.tensor([INF, 0.5])})
    assert clipped(x).tolist() == [[3.5, 0.5], [2.5, 0.0]]
    clipped.set_bounds({"2": 0.0})
    assert clipped(x).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    clipped.reset()
    assert clipped(x).tolist() == [[4.0, 0.75], [2.5, 0.0]]


def test_every_call_of_a_shared_module_has_its_own_bound() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(F.conv2d(x, torch.eye(3)[:, :, None, None]))
            return self.relu(x + x).mean((2, 3))

    clipped = ClippedModel(Twice())
    assert clipped.sites == ("relu", "relu_1")
    x = torch.full((1, 3, 2, 2), 0.5)
    clipped.set_bounds({"relu_1": torch.tensor([0.75, 1.0, INF])})
    assert clipped(x).tolist() == [[0.75, 1.0, 1.0]]
    clipped.set_bounds({"relu": torch.tensor([0.25, 0.5, 0.125])})
    assert clipped(x).tolist() == [[0.5, 1.0, 0.25]]


def test_gradients_of_bounds_are_those_worked_out_by_hand() -> None:
    clipped = ClippedModel(two_pixels())
    clipped.set_bounds({"2": torch.tensor([1.0, INF])})
    network, bounds = clipped.differentiable()
    x = torch.tensor([[1.0, 0.25], [0.25, 1.0], [0.5, 0.25], [0.5, 0.5]]).view(4, 1, 1, 2)
    # p = 1.25, 1.25, 0.75 and 1 against a bound of 1: two are clipped, and p weighs 2; at a tie the activation moves
    network(x)[:, 0].sum().backward()
    assert bounds["2"].grad is not None and bounds["2"].grad.tolist() == [2 + 2, 0]


def test_the_differentiable_network_shares_weights_but_no_gradients_and_no_bounds() -> None:
    clipped = ClippedModel(tv.resnet18(num_classes=3))
    clipped.set_bounds({"relu": 0.5})
    network, bounds = clipped.differentiable()
    x = images(2, 32)
    assert isinstance(network, fx.GraphModule) and tuple(bounds) == clipped.sites
    assert torch.equal(network(x), clipped(x))
    assert {p.data_ptr() for p in network.parameters()} == {p.data_ptr() for p in clipped.parameters()}
    assert not any(p.requires_grad for p in network.parameters())
    assert all(p.requires_grad for p in clipped.parameters())
    assert not any(b.requires_grad for b in clipped.buffers())
    assert all(b.is_leaf and b.requires_grad and b.dtype == torch.float32 for b in bounds.values())
    optimiser = torch.optim.SGD(list(bounds.values()), lr=0.1)
    network(x).square().sum().backward()
    optimiser.step()
    assert clipped.bounds["relu"].eq(0.5).all() and not bounds["relu"].eq(0.5).all()
    assert all(bounds[site].isposinf().all() for site in clipped.sites[1:])
    clipped.set_bounds(bounds)
    assert torch.equal(network(x), clipped(x))


@given(st.lists(st.floats(0, 4), min_size=3, max_size=3), st.integers(0, 5))
def test_bounds_at_or_above_the_largest_activation_change_nothing(above: list[float], seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU(), nn.Conv2d(3, 3, 3), nn.GELU(), nn.Flatten())
    clipped = ClippedModel(model.append(nn.Linear(12, 2)))
    x = images(3, 6, seed).contiguous(memory_format=torch.channels_last)  # as `activations` computes
    for site, maximum in clipped.activations(x).maximum.items():
        clipped.set_bounds({site: maximum + torch.tensor(above)})
    assert torch.equal(clipped(x), model.eval()(x))


# --- the channel axis ---------------------------------------------------------------------------------------


class Functional(nn.Module):
    """Functional layers over parameters of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        shapes = {
            "conv": (5, 3, 1, 1),
            "transpose": (3, 5, 1, 1),
            "linear": (5, 3),
            "norm": (3,),
            "layer": (3,),
        }
        self.kind = kind
        self.weight = nn.Parameter(torch.rand(shapes[kind]))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("variance", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv":
            x = F.conv2d(x, self.weight)
        elif self.kind == "transpose":
            x = F.conv_transpose2d(x, self.weight)
        elif self.kind == "linear":
            x = F.linear(x.permute(0, 2, 3, 1), self.weight)
        elif self.kind == "norm":
            x = F.batch_norm(x, self.mean, self.variance, self.weight)
        else:
            x = F.layer_norm(x.permute(0, 2, 3, 1), [3], self.weight)
        return F.relu(x).sum((1, 2, 3))[:, None]


class StandardisedConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias)


class Rows(nn.Module):
    """Images as tokens (N, T, 3), a linear layer, then whatever a test does."""

    def __init__(self, body: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.linear(x.flatten(2).transpose(1, 2)))


AXES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # model, channels, axis of the activation
    "convolution": (lambda: Net(F.relu), 4, 1),
    "transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.ReLU()), 5, 1),
    "group norm": (lambda: nn.Sequential(nn.GroupNorm(1, 3), nn.ReLU()), 3, 1),
    "instance norm": (lambda: nn.Sequential(nn.InstanceNorm2d(3), nn.ReLU()), 3, 1),
    "linear": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 7), nn.ReLU()), 7, 1),
    "linear, batch norm": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 7), nn.BatchNorm1d(7), nn.ReLU()), 7, 1
    ),
    "functional conv2d": (lambda: Functional("conv"), 5, 1),
    "functional conv_transpose2d": (lambda: Functional("transpose"), 5, 1),
    "functional linear": (lambda: Functional("linear"), 5, 3),
    "functional batch_norm": (lambda: Functional("norm"), 3, 1),
    "functional layer_norm": (lambda: Functional("layer"), 3, 3),
    "computed weight": (lambda: nn.Sequential(StandardisedConv(3, 6, 1), nn.ReLU()), 6, 1),
    "elementwise": (lambda: Net(lambda y: F.relu(2 * y - y / 3 + torch.tanh(y).float().contiguous())), 4, 1),
    "scale per channel": (lambda: Net(lambda y: F.relu(y * torch.rand(4, 1, 1))), 4, 1),
    "gate of one channel": (lambda: Net(lambda y: F.relu(y * torch.sigmoid(y.mean(1, keepdim=True)))), 4, 1),
    "dropout, pooling": (lambda: Net(lambda y: F.relu(F.max_pool2d(F.dropout(y, training=False), 2))), 4, 1),
    "pooling module": (lambda: Net(nn.Sequential(nn.Dropout(), nn.AvgPool2d(2), nn.ReLU())), 4, 1),
    "cat of channels": (lambda: Net(lambda y: F.relu(torch.cat((y, y + 1, y), 1))), 12, 1),
    "cat of positions": (lambda: Net(lambda y: F.relu(torch.cat((y, y), -1))), 4, 1),
    "permute": (lambda: Net(lambda y: F.relu(y.permute(0, 2, 3, 1))), 4, 3),
    "permute twice": (lambda: Net(lambda y: F.relu(y.permute(0, 2, 3, 1).permute([0, 3, 1, 2]))), 4, 1),
    "transpose": (lambda: Net(lambda y: F.relu(torch.transpose(y, 1, -1))), 4, 3),
    "mean over positions": (lambda: Net(lambda y: F.relu(y.mean((2, 3)))[:, :, None, None]), 4, 1),
    "flat positions": (lambda: Net(lambda y: F.relu(y.flatten(2))[..., None]), 4, 1),
    "tokens": (lambda: Rows(F.gelu), 5, 2),
    "tokens, transposed": (lambda: Rows(lambda y: F.relu(y.transpose(-1, -2))), 5, 1),
    "tokens, layer norm": (lambda: nn.Sequential(Rows(lambda y: y), nn.LayerNorm(5), nn.GELU()), 5, 2),
    "tokens, cat": (lambda: Rows(lambda y: F.relu(torch.cat((y, y), dim=1))), 5, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", AXES)
def test_the_channel_axis_is_that_of_the_layer(name: str) -> None:
    build, channels, axis = AXES[name]
    torch.manual_seed(0)
    clipped = ClippedModel(build())
    (site,) = clipped.sites
    seen = []
    assert clipped.channels == {site: channels}
    bounds = torch.arange(channels) / 1000
    clipped.set_bounds({site: bounds})
    _, clip = next(clipped._clips())
    clip.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    clipped(images())
    ((x, out),) = seen
    assert x.shape[axis] == channels
    shape = [-1 if d == axis else 1 for d in range(x.ndim)]
    assert torch.equal(out, torch.minimum(x, bounds.view(shape))) and not torch.equal(out, x)


@pytest.mark.parametrize(
    ("body", "operation"),
    [
        (lambda y: F.relu(y.view(y.size(0), 2, -1, 6)), "view"),
        (lambda y: F.relu(y.reshape(-1, 4)), "reshape"),
        (lambda y: F.relu(2 * y.flatten(1) + 1), "flatten"),
        (lambda y: F.relu(y[:, 1]), "getitem"),
        (lambda y: F.relu(y @ y), "matmul"),
        (lambda y: F.relu(F.pixel_shuffle(y, 2)), "pixel_shuffle"),
        (lambda y: F.relu(y + y.permute(0, 2, 3, 1)), "add"),
        (lambda y: F.relu(torch.cat((y, y.transpose(1, 2)), 1)), "cat"),
        (lambda y: F.relu(F.max_pool2d(y.permute(0, 2, 3, 1), 2)), "max_pool2d"),
    ],
)
def test_an_operation_that_hides_the_channels_is_named(body: Callable[[Tensor], Tensor], operation: str) -> None:
    with pytest.raises(ValueError, match=rf"site 'relu': .*lost in '{operation}' \(at '{operation}.*after the layer"):
        ClippedModel(Net(body))


def test_an_activation_of_the_images_themselves_has_no_channels() -> None:
    with pytest.raises(ValueError, match="site '0': .*no layer comes before '0'"):
        ClippedModel(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 2, 1)))


# --- which calls are sites ----------------------------------------------------------------------------------

RELUS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu in place": lambda y: F.relu(y, inplace=True),
    "F.relu_": lambda y: F.relu_(y),
    "F.relu by name": lambda y: F.relu(input=y),
    "torch.relu": torch.relu,
    "torch.relu_": lambda y: torch.relu_(y),
    "relu": lambda y: y.relu(),
    "relu_": lambda y: y.relu_(),
    "clamp": lambda y: y.clamp(0),
    "clamp_": lambda y: y.clamp_(min=0.0),
    "torch.clamp": lambda y: torch.clamp(y, min=0),
    "clip": lambda y: y.clip(min=0),
    "clamp_min": lambda y: y.clamp_min(0),
    "clamp_min_": lambda y: y.clamp_min_(0),
    "torch.clamp_min": lambda y: torch.clamp_min(y, 0),
    "F.threshold": lambda y: F.threshold(y, 0, 0),
    "F.relu6": F.relu6,
    "clamp to 6": lambda y: y.clamp(0, 6),
    "F.hardtanh": lambda y: F.hardtanh(y, 0, 6),
    "F.hardtanh_": lambda y: F.hardtanh_(y, min_val=0.0, max_val=6.0),
    "F.softplus": F.softplus,
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.gelu": F.gelu,
    "F.gelu, tanh": lambda y: F.gelu(y, approximate="tanh"),
    "F.silu": F.silu,
    "F.silu in place": lambda y: F.silu(y, inplace=True),
    "F.hardswish": F.hardswish,
    "F.leaky_relu": lambda y: F.leaky_relu(y, 0.2),
    "F.leaky_relu_": lambda y: F.leaky_relu_(y, 0.2),
    "F.prelu": lambda y: F.prelu(y, torch.tensor([0.25])),
    "F.rrelu": F.rrelu,
    "F.elu": F.elu,
    "F.elu_": lambda y: F.elu_(y),
    "F.selu": F.selu,
    "F.celu": F.celu,
    "F.mish": F.mish,
}
MODULES = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(),
    nn.Hardtanh(0, 6),
    nn.Hardtanh(0, 20),
    nn.Threshold(0, 0),
]
MODULES += [
    nn.Softplus(),
    nn.GELU(),
    nn.SiLU(),
    nn.SiLU(inplace=True),
    nn.Hardswish(),
    nn.LeakyReLU(),
    nn.PReLU(),
]
MODULES += [nn.RReLU(), nn.ELU(), nn.SELU(), nn.CELU(), nn.Mish()]
RELU_LIKE_MODULES = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold, nn.Softplus)
CALLS = [*RELUS.items(), *OTHERS.items(), *((repr(module), module) for module in MODULES)]


@pytest.mark.parametrize(("name", "body"), CALLS, ids=[name for name, _ in CALLS])
def test_activations_in_all_spellings_are_sites(name: str, body: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Net(body)
    clipped = ClippedModel(model)
    assert len(clipped.sites) == 1
    assert identical(model, clipped, images())
    if name in RELUS or isinstance(body, RELU_LIKE_MODULES):
        with pytest.raises(ValueError, match="at least 0.*got -0.5"):
            clipped.set_bounds(dict.fromkeys(clipped.sites, -0.5))
        assert all(bound.isposinf().all() for bound in clipped.bounds.values())
    else:
        clipped.set_bounds(dict.fromkeys(clipped.sites, -0.5))
        assert clipped(images()).max() <= -0.5


@pytest.mark.parametrize(
    "body",
    [
        torch.sigmoid,
        F.hardsigmoid,
        nn.Hardsigmoid(),
        torch.tanh,
        F.hardtanh,
        nn.Hardtanh(),
        partial(F.softmax, dim=1),
        partial(torch.clamp, min=0, max=1),
        partial(torch.clamp, min=0.1),
        partial(torch.clamp, max=6),
        partial(F.threshold, threshold=0.1, value=0),
    ],
)
def test_gates_and_ranges_are_no_sites(body: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ValueError, match="no activation call.*ReLU"):
        ClippedModel(Net(body))
    assert ClippedModel(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), Net(body))).sites == ("1",)


# --- in-place activations -----------------------------------------------------------------------------------


def discarded(y: Tensor) -> Tensor:
    F.relu_(y)
    return y


def discarded_twice(y: Tensor) -> Tensor:
    torch.relu_(y)
    y = y - 0.1
    y.relu_()
    return y


def discarded_behind_identity(y: Tensor) -> Tensor:
    z = nn.functional.dropout(y, training=False)
    z = y.mul_(2)
    F.relu_(z)
    return y


def read_before_and_after(y: Tensor) -> Tensor:
    before = y * 2
    z = F.relu(y, inplace=True)
    return before + y + z


def added_to_afterwards(y: Tensor) -> Tensor:
    z = y.relu_()
    z += 1
    return y * 2


def augmented_under_another_name(y: Tensor) -> Tensor:
    z = y
    z += 1
    z.relu_()
    return y


def view_that_is_read_before(y: Tensor) -> Tensor:
    total = y.permute(0, 2, 3, 1).sum()
    y.relu_()
    return y + total


def shape_that_is_read_later(y: Tensor) -> Tensor:
    shape = y.shape
    y.relu_()
    return y.view(shape[0], shape[1], shape[2], shape[3])


@pytest.mark.parametrize(
    ("body", "largest"),
    [
        (discarded, 0.125),
        (discarded_twice, 0.125),
        (discarded_behind_identity, 0.125),
        (read_before_and_after, None),
        (added_to_afterwards, 2.25),
        (augmented_under_another_name, 0.125),
        (view_that_is_read_before, None),
        (shape_that_is_read_later, 0.125),
        (nn.Sequential(nn.Identity(), nn.Dropout(), nn.ReLU(inplace=True)), 0.125),
    ],
)
def test_whoever_reads_an_in_place_activation_reads_it_clipped(
    body: Callable[[Tensor], Tensor], largest: float | None
) -> None:
    torch.manual_seed(0)
    model = Net(body)
    clipped = ClippedModel(model)
    assert identical(model, clipped, images())
    clipped.set_bounds(dict.fromkeys(clipped.sites, 0.125))
    assert not torch.equal(clipped(images()), model(images()))
    if largest is not None:
        assert clipped(images()).max() <= largest


def test_an_in_place_activation_clips_both_readers_by_the_known_amount() -> None:
    model = Net(read_before_and_after, channels=1)
    nn.init.constant_(model.conv.weight, 1.0)
    nn.init.zeros_(model.conv.bias)
    clipped = ClippedModel(model)
    clipped.set_bounds(dict.fromkeys(clipped.sites, 1.0))
    assert clipped(torch.ones(1, 3, 2, 2)).item() == 2 * 3 + 1 + 1


def relu_of_a_view(y: Tensor) -> Tensor:
    y.permute(0, 2, 3, 1).relu_()
    return y


def relu_under_a_view(y: Tensor) -> Tensor:
    z = y.permute(0, 2, 3, 1)
    y.relu_()
    return z


def relu_of_what_may_be_a_copy(y: Tensor) -> Tensor:
    z = y.contiguous()
    z.relu_()
    return y


class ReluOfAFlatView(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.view = nn.Sequential(nn.Identity(), nn.Flatten(2))

    def forward(self, y: Tensor) -> Tensor:
        F.relu_(self.view(y))
        return y


@pytest.mark.parametrize("body", [relu_of_a_view, relu_under_a_view, relu_of_what_may_be_a_copy, ReluOfAFlatView()])
def test_an_in_place_activation_that_reaches_past_its_clip_is_refused(
    body: Callable[[Tensor], Tensor],
) -> None:
    with pytest.raises(ValueError, match=r"site '(body\.)?relu_?': .*in place.*inplace=False"):
        ClippedModel(Net(body))


def test_an_activation_with_an_output_argument_is_refused() -> None:
    with pytest.raises(ValueError, match="site 'clamp' writes to out="):
        ClippedModel(Net(lambda y: torch.clamp(y, min=0, out=y)))


# --- models that are refused --------------------------------------------------------------------------------


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) if x.sum() > 0 else x


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.relu(x + y)


def hooked(kind: str) -> nn.Module:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 1)), nn.ReLU())
    getattr(model[0][0], f"register_{kind}")(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: "resnet18", "model must be a torch.nn.Module, got str"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 2)), "no activation call"),
        (Branching, r"cannot be traced by torch.fx \(TraceError.*Rewrite"),
        (TwoInputs, "images alone.* needs y"),
        (lambda: hooked("forward_hook"), "submodule '0.0' of the model has hooks.*remove"),
        (lambda: hooked("forward_pre_hook"), "submodule '0.0' of the model has hooks.*remove"),
        (lambda: hooked("full_backward_hook"), "submodule '0.0' of the model has hooks.*remove"),
        (lambda: nn.utils.weight_norm(nn.Conv2d(3, 2, 1)), "the model has hooks.*parametrizations"),
        (lambda: nn.TransformerEncoderLayer(8, 2), "nn.TransformerEncoderLayer.*out of reach"),
        (lambda: ClippedModel(Net(F.relu)), "the model is clipped already.*original"),
        (lambda: ClippedModel(Net(F.relu)).differentiable()[0], "clipped already"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_a_model_that_cannot_be_clipped_is_refused(build: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClippedModel(build())


def test_parametrised_weights_are_followed() -> None:
    model = Net(F.relu)
    nn.utils.parametrizations.weight_norm(model.conv)
    clipped = ClippedModel(model)
    assert identical(model, clipped, images())
    with torch.no_grad():
        model.conv.parametrizations.weight.original0.mul_(2)
    assert identical(model, clipped, images())


# --- bounds -------------------------------------------------------------------------------------------------


def test_bounds_are_copies() -> None:
    clipped = ClippedModel(two_pixels())
    clipped.bounds["2"].zero_()
    given = torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert clipped.bounds["2"].isposinf().all()
    clipped.set_bounds({"2": given})
    with torch.no_grad():
        given.zero_()
    assert clipped.bounds["2"].tolist() == [1.0, 1.0]
    assert clipped.bounds["2"].dtype == torch.float32 and not clipped.bounds["2"].requires_grad


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"1": 0.0, "4": 0.0}, "no site '4'; the sites are 1, 3"),
        ({"1": 0.0, "3": torch.ones(3)}, r"bounds\['3'\] must have shape \(2,\), got \(3,\)"),
        ({"1": 0.0, "3": torch.ones(2, 1)}, r"must have shape \(2,\), got \(2, 1\)"),
        ({"1": 0.0, "3": float("nan")}, "NaN"),
        ({"1": 0.0, "3": -INF}, "-inf"),
        ({"3": 0.0, "1": torch.tensor([1.0, 1.0, -1e-3])}, r"bounds\['1'\] must be at least 0.*got -0.001"),
        ({"1": 0.0, "3": "much"}, r"bounds\['3'\] must be a tensor or a number"),
        ([("1", 0.0)], "bounds must map sites to bounds, got list"),
    ],
)
def test_wrong_bounds_are_refused_and_change_nothing(bounds: dict[str, float], message: str) -> None:
    clipped = ClippedModel(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1), nn.GELU()))
    clipped.set_bounds({"1": 1.0, "3": -1.0})
    with pytest.raises(ValueError, match=message):
        clipped.set_bounds(bounds)
    assert clipped.bounds["1"].tolist() == [1.0] * 3 and clipped.bounds["3"].tolist() == [-1.0] * 2


# --- statistics ---------------------------------------------------------------------------------------------


def chain() -> ClippedModel:
    """relu(pixel), then relu of twice that, on images of one channel."""
    model = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.ReLU(), nn.Conv2d(1, 1, 1, bias=False), nn.ReLU())
    model.append(nn.Flatten())
    nn.init.constant_(model[0].weight, 1.0)
    nn.init.constant_(model[2].weight, 2.0)
    return ClippedModel(model)


def test_statistics_are_over_images_of_the_largest_activation_over_positions() -> None:
    x = torch.tensor([[0.0, 0.25], [0.5, 1.0], [0.75, 0.5]]).view(3, 1, 1, 2)
    statistics = chain().activations(x, quantiles=(0.0, 0.5, 1.0), batch_size=2)
    assert statistics.count == 3 and statistics.quantiles == (0.0, 0.5, 1.0)
    assert statistics.maximum["1"].tolist() == [1.0] and statistics.mean["1"].tolist() == [0.5]
    assert statistics.quantile["1"].tolist() == [[0.25], [0.75], [1.0]]
    assert statistics.quantile["3"].tolist() == [[0.5], [1.5], [2.0]]


def test_a_site_is_measured_before_its_own_clip_and_after_those_before_it() -> None:
    clipped = chain()
    clipped.set_bounds({"1": 0.5, "3": 0.25})
    x = LabelledImages(torch.tensor([[0, 51], [255, 0]]).byte().view(2, 1, 1, 2), torch.tensor([0, 1]), ("a", "b"))
    torch.testing.assert_close(clipped.site_activations(x, "1"), torch.tensor([[0.2], [1.0]]))
    torch.testing.assert_close(clipped.site_activations(x, "3", batch_size=1), torch.tensor([[0.4], [1.0]]))
    assert clipped.activations(x).maximum["3"].tolist() == [1.0]
    assert not any(clip._forward_pre_hooks for _, clip in clipped._clips())


def test_the_maps_of_a_channel_are_its_activations_at_every_position() -> None:
    clipped = chain()
    clipped.set_bounds({"1": 0.5, "3": 0.25})
    x = torch.tensor([[0.0, 0.25], [0.5, 1.0], [0.75, 0.5]]).view(3, 1, 1, 2)
    assert torch.equal(clipped.activation_maps(x, "1", 0), x[:, 0])
    assert torch.equal(clipped.activation_maps(x, "3", 0, batch_size=2), 2 * x[:, 0].clamp(max=0.5))
    assert not any(clip._forward_pre_hooks for _, clip in clipped._clips())
    with pytest.raises(ValueError, match="no site 'relu'"):
        clipped.activation_maps(x, "relu", 0)
    with pytest.raises(ValueError, match=r"channel must lie in \[0, 1\) at site '1', got 1"):
        clipped.activation_maps(x, "1", 1)


def test_maps_and_statistics_of_every_image_agree_wherever_the_channels_are() -> None:
    clipped = ClippedModel(small_convnext())  # GELU sites are (N, H, W, C)
    x = images(3, 64)
    statistics = clipped.activations(x)
    for site in clipped.sites:
        assert statistics.per_image[site].shape == (3, clipped.channels[site])
        assert torch.equal(statistics.per_image[site].amax(0), statistics.maximum[site])
        maps = clipped.activation_maps(x, site, 2)
        assert maps.ndim == 3
        assert torch.equal(maps.amax((1, 2)), statistics.per_image[site][:, 2])


def test_batches_do_not_change_statistics() -> None:
    clipped = ClippedModel(small_convnext())
    x = images(5, 64)
    one, all_ = clipped.activations(x, batch_size=2), clipped.activations(x)
    for site in clipped.sites:
        assert one.maximum[site].shape == (clipped.channels[site],)
        assert one.quantile[site].shape == (2, clipped.channels[site])
        torch.testing.assert_close(one.mean[site], all_.mean[site])
        torch.testing.assert_close(one.quantile[site], all_.quantile[site])


LEVELS = (0.0, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0)


def test_few_images_are_measured_exactly_and_many_by_histogram(monkeypatch: pytest.MonkeyPatch) -> None:
    clipped = ClippedModel(resnet10(3, seed=0, width=4))
    x = images(60, 8)
    few = clipped.activations(x, quantiles=LEVELS, batch_size=25)
    for site, values in few.quantile.items():
        assert torch.equal(values, torch.quantile(clipped.site_activations(x, site, 25), torch.tensor(LEVELS), dim=0))
    monkeypatch.setattr("bclip_lab.clipping.EXACT", 59)
    many = clipped.activations(x, quantiles=LEVELS, batch_size=25)
    for site in clipped.sites:
        assert torch.equal(many.maximum[site], few.maximum[site]) and torch.equal(many.mean[site], few.mean[site])
        span = few.quantile[site][-1] - few.quantile[site][0]
        error = (many.quantile[site] - few.quantile[site]).abs()
        assert (error <= span / 2000 + 1e-6).all() and error.any()
    assert clipped.activations(x, quantiles=()).quantile["relu"].shape == (0, 4)


def test_statistics_refuse_what_they_cannot_measure() -> None:
    clipped = chain()
    with pytest.raises(ValueError, match="quantiles must lie in"):
        clipped.activations(torch.zeros(1, 1, 1, 1), quantiles=(0.5, 99))
    with pytest.raises(ValueError, match="no site 'relu'; the sites are 1, 3"):
        clipped.site_activations(torch.zeros(1, 1, 1, 1), "relu")
    with pytest.raises(ValueError, match="empty"):
        clipped.activations(torch.zeros(0, 1, 1, 1))
    assert not any(clip._forward_pre_hooks for _, clip in clipped._clips())

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.linear(x.permute(0, 2, 3, 1).reshape(-1, 3))
            return F.relu(rows).view(x.size(0), -1)

    with pytest.raises(ValueError, match="site 'relu' has 16 rows for 4 images"):
        ClippedModel(Mixed()).activations(images(4, 2))


def statistics(maximum: dict[str, list[float]]) -> ActivationStatistics:
    values = {site: torch.tensor(v) for site, v in maximum.items()}
    return ActivationStatistics(values, values, {}, (), 1)


def test_abnormality_is_a_finite_ratio() -> None:
    clean = statistics({"a": [2.0, 0.0, 0.01], "b": [0.0, 0.0, 0.0]})
    triggered = statistics({"a": [1.0, 3.0, 0.0], "b": [0.0, 4.0, 0.0]})
    ratios = abnormality(clean, triggered)
    torch.testing.assert_close(ratios["a"], torch.tensor([0.5, 150.0, 0.0]))  # over at least 2 / 100
    assert ratios["b"].tolist() == [0.0, 4.0, 0.0]
    torch.testing.assert_close(abnormality(clean, triggered, floor=0.5)["a"], torch.tensor([0.5, 3.0, 0.0]))
    with pytest.raises(ValueError, match="of the same model"):
        abnormality(clean, statistics({"a": [1.0]}))
    with pytest.raises(ValueError, match="floor"):
        abnormality(clean, triggered, floor=0.0)


# --- files --------------------------------------------------------------------------------------------------


def test_bounds_come_back_with_infinity_and_card(tmp_path: Path) -> None:
    clipped = ClippedModel(two_pixels())
    clipped.set_bounds({"2": torch.tensor([0.5, INF])})
    path = save_bounds(clipped, tmp_path / "bounds.safetensors", method="mmac", acc=0.99)
    other = ClippedModel(two_pixels())
    card = load_bounds(other, path)
    assert other.bounds["2"].tolist() == [0.5, INF]
    assert card["sites"] == ["2"] and card["channels"] == {"2": 2} and card["version"]
    assert card["method"] == "mmac" and card["acc"] == 0.99
    with pytest.raises(ValueError, match=r"card must not have \['sites'\]"):
        save_bounds(clipped, path, sites=[])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            nn.Sequential(nn.Flatten(), nn.Linear(2, 3), nn.ReLU()),
            r"site '2' has bounds of shape \(2,\).*\(3,\)",
        ),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU()), "site '1' is missing; the model has no site '2'"),
    ],
)
def test_bounds_of_another_model_are_refused(tmp_path: Path, model: nn.Module, message: str) -> None:
    clipped = ClippedModel(two_pixels())
    clipped.set_bounds({"2": 0.5})
    path = save_bounds(clipped, tmp_path / "bounds.safetensors")
    other = ClippedModel(model)
    with pytest.raises(ValueError, match=message):
        load_bounds(other, path)
    assert all(bound.isposinf().all() for bound in other.bounds.values())


def test_altered_bounds_are_refused(tmp_path: Path) -> None:
    clipped = ClippedModel(two_pixels())
    path = save_bounds(clipped, tmp_path / "bounds.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        load_bounds(clipped, path)
    with pytest.raises(FileNotFoundError):
        load_bounds(clipped, tmp_path / "none.safetensors")
