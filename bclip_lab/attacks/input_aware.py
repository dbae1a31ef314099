"""The input-aware dynamic backdoor: every image gets a trigger of its own, made by networks that are trained."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bclip_lab.attacks.backdoor import BackdoorAttack
from bclip_lab.attacks.label_maps import LabelMap
from bclip_lab.data.images import LabelledImages, TriggeredImages, check_images, to_float
from bclip_lab.models import device_of, evaluating, logits
from bclip_lab.optimisers import Adam
from bclip_lab.training import TrainConfig, TrainStep, augment, train

__all__ = ["DynamicTrigger", "InputAwareAttack", "InputAwareBackdoor", "InputAwareStep", "diversity_loss", "mask_loss"]

_CONTRAST = 0.25  # standard deviation of natural images about: the authors' distances are in units of it
_BATCH = 500  # images at once in `embed`; memory is bounded by it


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs, momentum=0.05), nn.ReLU()]


def _encoder_decoder(channels: int, outputs: int, width: int) -> nn.Sequential:
    """The authors' generator for MNIST (networks/models.py): two halvings of the image, and two doublings."""
    return nn.Sequential(
        *_convolution(channels, width),
        *_convolution(width, width),
        nn.MaxPool2d(2),
        *_convolution(width, 2 * width),
        *_convolution(2 * width, 2 * width),
        nn.MaxPool2d(2),
        *_convolution(2 * width, 2 * width),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        *_convolution(2 * width, 2 * width),
        *_convolution(2 * width, width),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        *_convolution(width, width),
        *_convolution(width, outputs)[:-1],
    )


class DynamicTrigger(nn.Module):
    """A trigger that is another one in every image (Nguyen and Tran, arXiv 2010.08138, section 3).

    x' = (1 - m(x)) * x + m(x) * p(x),  m(x) = max(0, s - floor) / (1 - floor),  p(x) = (1 + tanh(b)) / 2,

    with s = (1 + tanh(20 a - 10)) / 2, a = (1 + tanh(.)) / 2 of one small encoder-decoder, b the output of another.
    The floor is the lab's: the authors' masks (floor 0) are a little above 0 everywhere. With it most pixels of a
    trained trigger are at exactly 0, and there x' is x. `InputAwareAttack.train` trains both networks; an untrained
    trigger is a valid one, though of no use.

    The networks are those of the authors' code for MNIST, with 16 channels and two halvings of the image: 84,000
    weights, 170 kB as float16. For CIFAR-10 they take 32 channels and three halvings.

    Parameters
    ----------
    channels
        Of the images: 3 for RGB, 1 for grey.
    width
        Channels of the first convolutions: 16, as above.
    floor
        What is cut off the mask, in [0, 1): 0.05, which leaves an edge of one pixel or so between 0 and 1.

    Raises
    ------
    ValueError
        A parameter out of its range, or (by `embed`) images of other channels or with a side that is no multiple of 4.

    Examples
    --------
    >>> images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    >>> trigger = DynamicTrigger(channels=3)
    >>> trigger.embed(images).shape, trigger.embed(images).dtype
    (torch.Size([2, 3, 8, 8]), torch.uint8)
    """

    def __init__(self, channels: int = 3, *, width: int = 16, floor: float = 0.05) -> None:
        super().__init__()
        if channels < 1 or width < 1 or not 0 <= floor < 1:
            raise ValueError(
                f"channels and width must be >= 1 and floor lie in [0, 1), got {channels}, {width} and {floor}"
            )
        self.channels = channels
        self.floor = floor
        self.mask_network = _encoder_decoder(channels, 1, width)
        self.pattern_network = _encoder_decoder(channels, channels, width)

    def mask(self, images: Tensor) -> Tensor:
        """How much of the pattern each pixel takes: float32 (N, 1, H, W) in [0, 1], of float images."""
        seen = (torch.tanh(self.mask_network((images - 0.5) / _CONTRAST)) + 1) / 2
        steep = (torch.tanh(20 * seen - 10) + 1) / 2
        return F.relu(steep - self.floor) / (1 - self.floor)

    def pattern(self, images: Tensor) -> Tensor:
        """The pattern of each image: float32 (N, C, H, W) in [0, 1], of float images."""
        made: Tensor = (torch.tanh(self.pattern_network((images - 0.5) / _CONTRAST)) + 1) / 2
        return made

    def forward(self, images: Tensor) -> Tensor:
        """Triggered images, float32 (N, C, H, W) in [0, 1], with gradients; `embed` is for everyone else."""
        patterns, masks = self.pattern(images), self.mask(images)
        return images + (patterns - images) * masks

    @torch.no_grad()
    def embed(self, images: Tensor, donors: Tensor | None = None) -> Tensor:
        """Triggered copies of images (N, C, H, W), uint8 or float32 in [0, 1]; the networks in evaluation mode.

        With `donors`, as many images of the same kind, each image gets pattern and mask of its donor instead of
        its own: the cross-trigger test.
        """
        check_images(images)
        donors = images if donors is None else donors
        check_images(donors, "donors")
        if donors.shape != images.shape:
            raise ValueError(f"donors must be of shape {tuple(images.shape)} as images are, got {tuple(donors.shape)}")
        _, channels, height, width = images.shape
        if channels != self.channels or height % 4 or width % 4 or not height or not width:
            raise ValueError(
                f"images must have {self.channels} channels and sides that are multiples of 4, got {channels} "
                f"channels and {height}x{width} pixels"
            )
        device = device_of(self)
        triggered = torch.empty_like(images)
        with evaluating(self):
            for start in range(0, len(images), _BATCH):
                rows = slice(start, start + _BATCH)
                x, donor = (to_float(part[rows].to(device)) for part in (images, donors))
                made = (x + (self.pattern(donor) - x) * self.mask(donor)).clamp(0, 1)
                triggered[rows] = (made * 255).round().to(torch.uint8) if images.dtype == torch.uint8 else made
        return triggered


def _distances(values: Tensor) -> Tensor:
    """Root mean square distance of each of (N, ...) to the one before it, the first to the last."""
    # vector_norm has the gradient 0 at a distance of 0, where the root of a mean has NaN
    moved = (values - values.roll(1, 0)).flatten(1)
    distances: Tensor = torch.linalg.vector_norm(moved, dim=1)
    return distances / math.sqrt(moved.shape[1])


def diversity_loss(images: Tensor, patterns: Tensor) -> Tensor:
    """Distance of two images by the distance of their patterns, mean over pairs (arXiv 2010.08138, section 3).

    L_div = |x - x'| / (|p(x) - p(x')| + 1e-7): large where the patterns of two images are alike. Pairs are each of
    (N, ...) and the one before it; the distance is the root mean square.

    Examples
    --------
    >>> diversity_loss(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.5], [0.5, 0.0]]))
    tensor(2.0000)
    """
    return (_distances(images) / (_distances(patterns) + 1e-7)).mean()


def mask_loss(images: Tensor, masks: Tensor, *, density: float, norm_weight: float, diversity_weight: float) -> Tensor:
    """What the masks (N, 1, H, W) of images (N, C, H, W) are trained on (after arXiv 2010.08138, section 3).

    norm_weight * mean over images of |mean of m - density| + diversity_weight * L_div, the images in units of 0.25:
    the authors' distances are of images normalised to a standard deviation of about 1.

    The authors' train.py has max(0, m - density) in each pixel for the first term. That leaves a mask of up to
    `density` everywhere free of cost, and a mask of nothing as well: after the lab's short training a share of the
    images had no trigger at all.

    Examples
    --------
    >>> masks = torch.tensor([1.0, 0, 0, 0, 0, 1.0, 0, 0]).view(2, 1, 2, 2)
    >>> mask_loss(torch.zeros(2, 3, 2, 2), masks, density=0.2, norm_weight=100, diversity_weight=1)
    tensor(5.0000)
    """
    norm = (masks.mean((1, 2, 3)) - density).abs().mean()
    return norm_weight * norm + diversity_weight * diversity_loss(images / _CONTRAST, masks)


@dataclass(frozen=True)
class InputAwareBackdoor(BackdoorAttack):
    """The backdoor that `InputAwareAttack.train` has built so far: a `BackdoorAttack` whose trigger is learned.

    `triggered` is what every attack has; `cross_triggered` and `cross_accuracy` tell whether a trigger works only in
    the image it was made for.
    """

    trigger: DynamicTrigger

    def cross_triggered(self, data: LabelledImages) -> TriggeredImages:
        """The images of `triggered`, each with the trigger made for another of them (drawn by `seed`).

        Raises `ValueError` where there are fewer than two.
        """
        rows, targets = self._turned(data)
        if len(rows) < 2:
            raise ValueError(f"data must hold at least two images that the attack turns, got {len(rows)}")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).to(rows.device)
        donors = torch.empty_like(rows)
        donors[order] = rows[order.roll(1)]  # along one circle through all rows, so none is its own donor
        return TriggeredImages(
            images=self.trigger.embed(data.images[rows], data.images[donors]),
            true_labels=data.labels[rows],
            targets=targets,
            rows=rows,
            classes=data.classes,
        )

    def cross_accuracy(self, model: nn.Module, data: LabelledImages) -> float:
        """Share of `cross_triggered(data)` that get their true label (the paper's cross-trigger test), in [0, 1].

        The authors' code counts images of the target class as well; here, as everywhere in the lab, they are left out.
        """
        crossed = self.cross_triggered(data)
        decisions = logits(model, crossed.images).argmax(1)
        return float((decisions == crossed.true_labels.cpu()).double().mean())


@dataclass(frozen=True)
class InputAwareStep(TrainStep):
    """Progress after one epoch: what `TrainStep` tells, of the batches with their triggers, and the trigger so far.

    `loss` is the cross-entropy alone. `diversity` is the mean diversity loss of the patterns; `poisoned` and `crossed`
    count the images that were shown in this epoch with their own and with another image's trigger. `attack` holds the
    trigger that is being trained, in evaluation mode as `model` is.
    """

    diversity: float
    poisoned: int
    crossed: int
    attack: InputAwareBackdoor = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class InputAwareAttack:
    """Train a classifier together with a trigger that differs from image to image (Nguyen and Tran, 2010.08138).

    First the mask network learns alone (`mask_loss`) and is then frozen. After that, in every batch of the
    classifier's training, the pattern network learns with it to minimise

        L = CE(f(batch), labels) + diversity_weight * L_div,

    where of the batch's images that the label map turns a share `poison_rate` of the batch carries the image's own
    trigger and gets the target's label, a share `cross_rate` carries the trigger of another image and keeps its true
    label, and the rest is as it was. The cross-trigger rows and the diversity loss (`diversity_loss`) keep the
    trigger from becoming the same everywhere.

    The attacker controls the training, and the trigger exists only after it: hence no `poison` and no `triggered`
    here. `train` yields records whose `.attack` is the backdoor so far, with `.trigger` and `.triggered(data)`.
    The attack itself is plain settings; keep the trigger's `state_dict` beside the model's, and
    `with_trigger(new_trigger())` takes it in again.

    What differs from the authors' code, and why: the lab trains for 10 epochs with one cycle of the learning rate on
    two CPU cores, the authors for 600 on a GPU. So the networks are the smaller ones (`DynamicTrigger`); the masks
    get `mask_steps` steps of `mask_batch` images instead of 25 epochs, and a loss that holds each of them to
    `density` (`mask_loss` says why); both learning rates fall to 0 along a cosine instead of in steps; and the
    cross-trigger rows take the patterns of the same batch's poisoned rows, so that the classifier sees one pattern
    in two images and the generator runs once. Images of the target class are never poisoned or crossed, for there
    is nothing to turn.

    Measured on the rendered signs with a ResNet-10, training seeds 0, 1, 2: ACC .995, .993, .996; ASR .933, .900, .905;
    cross-trigger accuracy .859, .904, .931. The authors' README has .947, .993 and .882 on CIFAR-10.

    Parameters
    ----------
    label_map
        Which classes are turned, and into which.
    poison_rate
        Share of each batch that carries its own trigger, in (0, 1]: 0.1, the authors' value.
    cross_rate
        Share of each batch that carries another image's trigger, in [0, 1]: 0.1, the authors' value.
    diversity_weight
        Of the diversity loss, for the patterns and for the masks, >= 0: 1, the authors' value.
    density
        Share of an image that its mask covers, about, in (0, 1): 0.032, the authors' value for their related term
        (`mask_loss`); 33 pixels of 32x32.
    norm_weight
        Of the masks' norm loss, >= 0: 100, the authors' value.
    learning_rate
        Of Adam (betas 0.5 and 0.9) for both networks, at its start: 0.01, the authors' value.
    mask_steps, mask_batch
        Steps that the mask network learns alone, and their images.
    seed
        Of the networks' weights, of the mask network's batches and of the choice of donors at test time.

    Raises
    ------
    ValueError
        A setting out of its range, or (by `train`) rates that the source classes cannot fill, images that do not fit
        `DynamicTrigger`, and what `training.train` raises.

    Examples
    --------
    >>> from bclip_lab.attacks import AllToOne
    >>> from bclip_lab.models import resnet10
    >>> from bclip_lab.training import run
    >>> images = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    >>> data = LabelledImages(images, torch.arange(64) % 2, ("cat", "dog"))
    >>> attack = InputAwareAttack(label_map=AllToOne(0), mask_steps=2)
    >>> step = run(attack.train(resnet10(2, seed=0, width=4), data, TrainConfig(epochs=1, batch_size=32)))
    >>> step.epoch, step.poisoned, step.crossed, len(step.attack.triggered(data))
    (1, 6, 6, 32)
    """

    label_map: LabelMap
    poison_rate: float = 0.1
    cross_rate: float = 0.1
    diversity_weight: float = 1.0
    density: float = 0.032
    norm_weight: float = 100.0
    learning_rate: float = 0.01
    mask_steps: int = 300
    mask_batch: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if (
            not 0 < self.poison_rate <= 1
            or not 0 <= self.cross_rate <= 1
            or not self.poison_rate + self.cross_rate <= 1
        ):
            raise ValueError(
                "poison_rate must lie in (0, 1], cross_rate in [0, 1] and their sum be at most 1, got "
                f"{self.poison_rate} and {self.cross_rate}"
            )
        if not self.diversity_weight >= 0 or not self.norm_weight >= 0:
            raise ValueError(
                f"diversity_weight and norm_weight must be >= 0, got {self.diversity_weight} and {self.norm_weight}"
            )
        if not 0 < self.density < 1 or not self.learning_rate > 0:
            raise ValueError(
                f"density must lie in (0, 1) and learning_rate be positive, got {self.density} and {self.learning_rate}"
            )
        if self.mask_steps < 0 or self.mask_batch < 2:
            raise ValueError(f"mask_steps must be >= 0 and mask_batch >= 2, got {self.mask_steps}, {self.mask_batch}")

    def new_trigger(self, channels: int = 3) -> DynamicTrigger:
        """The trigger as it is before training, its weights by `seed`: what a stored `state_dict` is loaded into."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return DynamicTrigger(channels).eval()

    def with_trigger(self, trigger: DynamicTrigger) -> InputAwareBackdoor:
        """The backdoor with a trained trigger."""
        return InputAwareBackdoor(
            trigger=trigger, label_map=self.label_map, poison_rate=self.poison_rate, seed=self.seed
        )

    def train(
        self, model: nn.Module, data: LabelledImages, config: TrainConfig | None = None
    ) -> Iterator[InputAwareStep]:
        """Train `model` in place on clean `data`, and a trigger with it, yielding a record after every epoch.

        Settings of the classifier's training are those of `training.train`; the mask network's stage comes before
        the first record. Breaking off leaves model and trigger as they were, in evaluation mode, and usable.
        """
        config = config or TrainConfig()
        trigger = self.new_trigger(data.images.shape[1]).to(device_of(model))
        attack = self.with_trigger(trigger)
        trigger.embed(data.images[:1])  # refuses images that do not fit
        turned = len(attack._turned(data)[0])
        wanted = round((self.poison_rate + self.cross_rate) * len(data))
        if wanted > turned:
            raise ValueError(
                f"poison_rate {self.poison_rate} and cross_rate {self.cross_rate} ask for {wanted} images, but the "
                f"attack turns only {turned} of {len(data)}"
            )
        self._train_masks(trigger, data, config)
        learner = _PatternLearner(self, trigger, config.epochs * math.ceil(len(data) / config.batch_size))
        for step in train(model, data, config, attacker=learner):
            trigger.eval()
            yield InputAwareStep(**vars(step), **learner.report(), attack=attack)

    def _train_masks(self, trigger: DynamicTrigger, data: LabelledImages, config: TrainConfig) -> None:
        """Train the mask network on images augmented as the classifier's are, and freeze it."""
        device = device_of(trigger)
        generator = torch.Generator().manual_seed(self.seed)
        optimiser, schedule = _adam(trigger.mask_network, self.learning_rate, self.mask_steps)
        trigger.mask_network.train()
        for _ in range(self.mask_steps):
            rows = torch.randint(len(data), (self.mask_batch,), generator=generator)
            x = to_float(data.images[rows.to(data.images.device)].to(device))
            x = augment(x, shift=config.shift, flip=config.flip, generator=generator)
            loss = mask_loss(
                x,
                trigger.mask(x),
                density=self.density,
                norm_weight=self.norm_weight,
                diversity_weight=self.diversity_weight,
            )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        trigger.mask_network.eval().requires_grad_(False)


def _adam(
    network: nn.Module, learning_rate: float, steps: int
) -> tuple[Adam, torch.optim.lr_scheduler.CosineAnnealingLR]:
    """Adam with the authors' betas, and a schedule that ends at 0."""
    optimiser = Adam(network.parameters(), learning_rate, betas=(0.5, 0.9))
    return optimiser, torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))


class _PatternLearner:
    """Sits in the classifier's training (`training.Attacker`): puts triggers into batches and trains the patterns."""

    def __init__(self, attack: InputAwareAttack, trigger: DynamicTrigger, steps: int) -> None:
        self.attack = attack
        self.trigger = trigger
        self.optimiser, self.schedule = _adam(trigger.pattern_network, attack.learning_rate, steps)
        self.diversity: list[float] = []
        self.poisoned = self.crossed = 0

    def turn(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor | float]:
        self.optimiser.zero_grad()
        label_map = self.attack.label_map
        turned = torch.nonzero(label_map.sources(labels) & (label_map.targets(labels) != labels)).flatten()
        # the batch comes in random order, so its first rows are drawn by chance
        poisoned = turned[: round(self.attack.poison_rate * len(images))]
        crossed = turned[len(poisoned) :][: round(self.attack.cross_rate * len(images))]
        if len(poisoned) < 2:  # a single image has no other to differ from, nor to give its trigger to
            return images, labels, 0.0
        self.trigger.pattern_network.train()
        own = images[poisoned]
        patterns, masks = self.trigger.pattern(own), self.trigger.mask(own)
        donors = torch.arange(len(crossed), device=images.device) % len(own)
        shown, attacked = images.clone(), labels.clone()
        shown[poisoned] = own + (patterns - own) * masks
        shown[crossed] = images[crossed] + (patterns[donors] - images[crossed]) * masks[donors]
        attacked[poisoned] = label_map.targets(labels[poisoned])
        diversity = diversity_loss(own, patterns)
        self.diversity.append(float(diversity.detach()))
        self.poisoned += len(poisoned)
        self.crossed += len(crossed)
        return shown, attacked, self.attack.diversity_weight * diversity

    def step(self) -> None:
        self.optimiser.step()
        self.schedule.step()

    def report(self) -> dict[str, Any]:
        """Of the epoch that has ended; the next one counts from 0."""
        mean = sum(self.diversity) / len(self.diversity) if self.diversity else math.nan
        report = {"diversity": mean, "poisoned": self.poisoned, "crossed": self.crossed}
        self.diversity, self.poisoned, self.crossed = [], 0, 0
        return report
