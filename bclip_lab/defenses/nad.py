"""NAD: fine-tune a student towards the attention maps of a fine-tuned teacher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bclip_lab.data.images import LabelledImages
from bclip_lab.defenses.fine_tuning import FineTuneConfig, fine_tune
from bclip_lab.models import logits
from bclip_lab.training import run, train, trainable_copy

__all__ = ["NADConfig", "NADStep", "attention_map", "nad"]


@dataclass(frozen=True)
class NADConfig:
    """Hyper-parameters of `nad`.

    Parameters
    ----------
    betas
        Weight of the attention distance at each layer, from the first to the last: 500, 1000, 1000 in BackdoorBench
        (Wu et al., arXiv 2206.12654; its configuration `nad`). A network with fewer layers than betas takes the last
        of these.
    power
        p of the attention maps: 2 in the paper and in the authors' code.
    layers
        Names of the modules whose outputs (N, C, H, W) are compared, as many as betas. By default the last module to
        give an output of each resolution above 1x1, of as many resolutions as there are betas and the lowest ones: in
        a residual network these are the outputs of its stages.
    teacher, tuning
        Fine-tuning of the teacher, then of the student; their seeds are replaced by `seed`. The authors' code takes 20
        epochs of 2,500 images from a learning rate of 0.1; see `FineTuneConfig` for what the lab's networks and 500
        images need. On development networks that are not in the zoo the defaults left a patch ASR .000 (its teacher
        .007) and a blended trigger .054 (.066), ACC .998 falling to .993 and .994.
    seed
        Of the order of the images and of the augmentation.
    """

    betas: Sequence[float] = (500.0, 1000.0, 1000.0)
    power: float = 2.0
    layers: Sequence[str] | None = None
    teacher: FineTuneConfig = field(default_factory=FineTuneConfig)
    tuning: FineTuneConfig = field(default_factory=FineTuneConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.betas or not all(beta >= 0 for beta in self.betas):
            raise ValueError(f"betas must be numbers that are not negative, one at least, got {tuple(self.betas)}")
        if not self.power > 0:
            raise ValueError(f"power must be positive, got {self.power}")
        if self.layers is not None and len(self.layers) != len(self.betas):
            raise ValueError(f"layers must be as many as betas, got {len(self.layers)} and {len(self.betas)}")


@dataclass(frozen=True)
class NADStep:
    """Progress after one epoch of the student; the teacher is ready before the first.

    `loss` (with the attention terms) and `accuracy`: means over the clean images as they were shown in this epoch,
    augmented; `attention`: mean over its batches of the weighted sum of attention distances. `layers` are the modules
    compared. `model` is the student so far and `teacher` the fine-tuned teacher, both in evaluation mode.
    """

    epoch: int
    epochs: int
    loss: float
    accuracy: float
    attention: float
    layers: tuple[str, ...] = field(repr=False)
    model: nn.Module = field(repr=False)
    teacher: nn.Module = field(repr=False)


def attention_map(features: Tensor, power: float = 2.0) -> Tensor:
    """Where a layer looks: sum over channels of |features|^power, scaled to a Euclidean norm of 1 for each image.

    Zagoruyko, Komodakis, arXiv 1612.03928, section 3.1; a map that is 0 everywhere stays so.

    Parameters
    ----------
    features
        (N, C, H, W) of any floating dtype.

    Returns
    -------
    Tensor
        float32 (N, H, W).

    Examples
    --------
    >>> attention_map(torch.tensor([[[[1.0, 0.0]], [[-1.0, 1.0]]]]))  # (2, 1) / sqrt(5)
    tensor([[[0.8944, 0.4472]]])
    """
    maps = features.float().abs().pow(power).sum(1)
    norm: Tensor = maps.flatten(1).norm(dim=1)
    return maps / (norm[:, None, None] + 1e-6)


def nad(model: nn.Module, clean: LabelledImages, config: NADConfig | None = None) -> Iterator[NADStep]:
    """Neural attention distillation: a student learns where a fine-tuned teacher looks.

    Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural Networks", arXiv 2101.05930.
    Teacher and student both are copies of the model. The teacher is fine-tuned, then the student, by

        cross-entropy + sum over layers l of beta_l * mean squared difference of attention maps,

    the maps being those of `attention_map` on the same augmented images (the mean as in the authors' code, over images
    and positions).

    Parameters
    ----------
    model
        Any classifier with modules that give outputs (N, C, H, W); it stays as it is.
    clean
        The defender's clean images with their true labels.
    config
        `NADConfig()` by default.

    Yields
    ------
    NADStep
        One an epoch of the student.

    Raises
    ------
    ValueError
        A layer the model does not have or that gives no (N, C, H, W), none that could be compared, or what `fine_tune`
        raises.

    Examples
    --------
    >>> from bclip_lab.models import resnet10
    >>> images = torch.rand(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    >>> clean = LabelledImages(images, torch.arange(20) % 2, ("a", "b"))
    >>> short = FineTuneConfig(epochs=1)
    >>> step = run(nad(resnet10(2, seed=0, width=4), clean, NADConfig(teacher=short, tuning=short)))
    >>> step.layers
    ('stages.1', 'stages.2', 'stages')
    """
    config = config or NADConfig()
    student = trainable_copy(model, clean, least=2)
    layers = _layers(student, clean, config)
    teacher = run(fine_tune(model, clean, replace(config.teacher, seed=config.seed))).model.requires_grad_(False)
    pair = _Pair(student, teacher, layers)
    distances: list[float] = []

    def loss(out: Tensor, labels: Tensor, poisoned: Tensor) -> Tensor:
        attention = torch.zeros((), device=out.device)
        for beta, ours, theirs in zip(config.betas[-len(layers) :], *pair.features, strict=True):
            distance = F.mse_loss(attention_map(ours, config.power), attention_map(theirs, config.power))
            attention = attention + beta * distance
        distances.append(float(attention.detach()))
        return F.cross_entropy(out, labels) + attention

    for step in train(pair, clean, replace(config.tuning, seed=config.seed), loss=loss):
        attention = sum(distances) / len(distances)
        distances.clear()
        pair.features = ()
        yield NADStep(
            int(step.epoch), config.tuning.epochs, step.loss, step.train_accuracy, attention, layers, student, teacher
        )


class _Pair(nn.Module):
    """The student, which also runs the teacher on its batch and keeps the outputs of both at some layers."""

    def __init__(self, student: nn.Module, teacher: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.student = student
        self.others = (teacher,)  # in a tuple: no submodule, so neither trained nor put into training mode
        self.layers = layers
        self.features: tuple[list[Tensor], ...] = ()

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the student."""
        out, ours = _outputs(self.student, self.layers, images)
        with torch.no_grad():
            _, theirs = _outputs(self.others[0], self.layers, images)
        self.features = ours, theirs
        return out


def _outputs(model: nn.Module, layers: Sequence[str], images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the output of each layer at its last call."""
    found: dict[str, Tensor] = {}
    handles = []
    for name in layers:
        handles.append(
            model.get_submodule(name).register_forward_hook(
                lambda module, args, out, name=name: found.__setitem__(name, out)
            )
        )
    try:
        return model(images), [found[name] for name in layers]
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: nn.Module, clean: LabelledImages, config: NADConfig) -> tuple[str, ...]:
    """Names of the modules whose attention is compared, from the first to the last."""
    shapes: dict[str, tuple[int, ...]] = {}  # in the order in which modules finish

    def seen(name: str, out: Any) -> None:
        shapes.pop(name, None)
        shapes[name] = tuple(out.shape) if isinstance(out, Tensor) else ()

    named = [(name, module) for name, module in model.named_modules() if name]
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: seen(name, out)) for name, module in named
    ]
    try:
        logits(model, clean[:1])
    finally:
        for handle in handles:
            handle.remove()
    if config.layers is not None:
        for name in config.layers:
            if len(shapes.get(name, ())) != 4:
                raise ValueError(f"layers: the model has no module {name!r} that gives an output (N, C, H, W)")
        return tuple(config.layers)
    last = {shape[2:]: name for name, shape in shapes.items() if len(shape) == 4 and max(shape[2:]) > 1}
    if not last:
        raise ValueError(
            "model has no module that gives an output (N, C, H, W) of more than one position: there is no attention "
            "to compare"
        )
    return tuple(last.values())[-len(config.betas) :]
