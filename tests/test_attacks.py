"""bclip_lab.attacks: triggers, label maps, poisoned training sets and triggered test images."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bclip_lab.attacks import (
    AllToAll,
    AllToOne,
    BackdoorAttack,
    BlendedTrigger,
    LabelMap,
    ManyToOne,
    OneToOne,
    PatchTrigger,
    SinusoidTrigger,
    Trigger,
)
from bclip_lab.data.images import Attack, LabelledImages, to_float

CLASSES = ("cat", "dog", "owl", "bee")
CORNERS = ("top left", "top right", "bottom left", "bottom right")

seeds = st.integers(0, 99)
triggers = st.one_of(
    st.builds(
        PatchTrigger,
        size=st.integers(1, 3),
        corner=st.sampled_from(CORNERS),
        distance=st.integers(0, 2),
        seed=seeds,
    ),
    st.builds(BlendedTrigger, alpha=st.floats(0.01, 1), seed=seeds),
    st.builds(SinusoidTrigger, delta=st.floats(0.01, 1), frequency=st.floats(0.1, 12)),
)
label_maps = st.one_of(
    st.builds(AllToOne, st.integers(0, 3)),
    st.permutations(range(4)).map(lambda order: OneToOne(order[0], order[1])),
    st.tuples(st.permutations(range(4)), st.integers(1, 3)).map(
        lambda drawn: ManyToOne(tuple(drawn[0][1 : 1 + drawn[1]]), drawn[0][0])
    ),
    st.builds(AllToAll, st.just(4), st.integers(-9, 9).filter(lambda shift: shift % 4)),
)


@st.composite
def pictures(draw: st.DrawFn) -> Tensor:
    """uint8 (N, C, H, W), a few, of 5 to 9 pixels."""
    shape = [draw(st.integers(1, 4)), draw(st.sampled_from((1, 3))), *(draw(st.integers(5, 9)) for _ in "hw")]
    generator = torch.Generator().manual_seed(draw(seeds))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def dataset(count: int = 40, seed: int = 0, dtype: torch.dtype = torch.uint8) -> LabelledImages:
    """Random images, no two equal, in four classes of equal size whose rows are mixed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 6, 5), dtype=torch.uint8, generator=generator)
    labels = (torch.arange(count) % 4)[torch.randperm(count, generator=generator)]
    return LabelledImages(images if dtype == torch.uint8 else to_float(images), labels, CLASSES)


def copy(data: LabelledImages) -> tuple[Tensor, Tensor]:
    return data.images.clone(), data.labels.clone()


# --- triggers ---


@settings(max_examples=60)
@given(trigger=triggers, images=pictures())
def test_a_trigger_keeps_shape_dtype_and_range_and_mutates_nothing(trigger: Trigger, images: Tensor) -> None:
    for given_ in (images, to_float(images)):
        before, state = given_.clone(), torch.get_rng_state()
        triggered = trigger.embed(given_)
        assert triggered.shape == given_.shape and triggered.dtype == given_.dtype
        assert triggered.min() >= 0 and triggered.max() <= (255 if given_ is images else 1)
        assert torch.equal(given_, before)
        assert torch.equal(torch.get_rng_state(), state)
        triggered.zero_()  # a result that shared memory would now show
        assert torch.equal(given_, before)


@settings(max_examples=60)
@given(trigger=triggers, images=pictures())
def test_a_trigger_is_deterministic_and_treats_every_image_alone(trigger: Trigger, images: Tensor) -> None:
    triggered = trigger.embed(images)
    assert torch.equal(triggered, trigger.embed(images))
    assert torch.equal(triggered, torch.cat([trigger.embed(image[None]) for image in images]))
    assert trigger.embed(images[:0]).shape == (0, *images.shape[1:])


@settings(max_examples=60)
@given(trigger=triggers, images=pictures())
def test_bytes_and_floats_agree_within_half_a_level(trigger: Trigger, images: Tensor) -> None:
    levels = trigger.embed(to_float(images)) * 255
    assert float((levels - trigger.embed(images).float()).abs().max()) <= 0.5 + 1e-3


@settings(max_examples=40)
@given(
    images=pictures(),
    size=st.integers(1, 3),
    corner=st.sampled_from(CORNERS),
    distance=st.integers(0, 2),
    seed=seeds,
)
def test_a_patch_is_its_square_and_nothing_else(
    images: Tensor, size: int, corner: str, distance: int, seed: int
) -> None:
    trigger = PatchTrigger(size=size, corner=corner, distance=distance, seed=seed)
    height, width = images.shape[2:]
    top = distance if "top" in corner else height - distance - size
    left = distance if "left" in corner else width - distance - size
    expected = images.clone()
    expected[:, :, top : top + size, left : left + size] = (trigger.pattern(images.shape[1]) * 255).byte()
    assert torch.equal(trigger.embed(images), expected)


def test_a_patchs_black_pixels_count_too() -> None:
    trigger = PatchTrigger(size=3, seed=1)
    black, white = torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8)
    on_black, on_white = trigger.embed(black) != black, trigger.embed(white) != white
    assert on_black.any() and on_white.any()
    square = torch.zeros(8, 8, dtype=torch.bool)
    square[4:7, 4:7] = True
    assert torch.equal(on_black ^ on_white, square.expand(1, 3, 8, 8))


@pytest.mark.parametrize("distance", [0, 1])
def test_a_patch_may_fill_the_image_but_not_more(distance: int) -> None:
    trigger = PatchTrigger(size=3, distance=distance, corner="top left")
    assert trigger.embed(torch.zeros(1, 3, 3 + distance, 3 + distance)).any()
    for shape in ((1, 3, 2 + distance, 9), (1, 3, 9, 2 + distance)):
        with pytest.raises(ValueError, match="too small for a patch of size 3"):
            trigger.embed(torch.zeros(shape))


def test_a_blend_by_hand() -> None:
    trigger = BlendedTrigger(alpha=0.25, seed=3)
    pattern = trigger.pattern(3, 6, 5)
    assert pattern.shape == (3, 6, 5) and 0 <= pattern.min() < 0.2 and 0.8 < pattern.max() <= 1
    images = to_float(dataset(4).images)
    torch.testing.assert_close(trigger.embed(images), 0.75 * images + 0.25 * pattern)
    whole = BlendedTrigger(alpha=1.0, seed=3).embed(images)
    torch.testing.assert_close(whole, pattern.expand_as(images))


def test_a_sinusoid_by_hand() -> None:
    trigger = SinusoidTrigger(delta=0.1, frequency=1)
    for level, row in [(0.5, [0.5, 0.6, 0.5, 0.4]), (0.0, [0, 0.1, 0, 0]), (1.0, [1, 1, 1, 0.9])]:
        triggered = trigger.embed(torch.full((2, 3, 5, 4), level))
        torch.testing.assert_close(triggered, torch.tensor(row).expand(2, 3, 5, 4), atol=1e-6, rtol=0)
    # a fifth of a period a column: no column is left out, and the wave closes
    wave = SinusoidTrigger(delta=0.1, frequency=2).embed(torch.full((1, 1, 1, 10), 0.5))[0, 0, 0] - 0.5
    assert float(wave.sum()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(wave[:5], wave[5:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("make", [PatchTrigger, BlendedTrigger])
def test_another_seed_is_another_pattern(make: type[PatchTrigger] | type[BlendedTrigger]) -> None:
    images = torch.full((1, 3, 8, 8), 0.5)
    assert not torch.equal(make(seed=0).embed(images), make(seed=1).embed(images))
    assert torch.equal(make(seed=1).embed(images), make(seed=1).embed(images))


@pytest.mark.parametrize(
    ("make", "settings_", "message"),
    [
        (PatchTrigger, {"size": 0}, "size must be >= 1 and distance >= 0, got 0 and 1"),
        (PatchTrigger, {"distance": -1}, "got 3 and -1"),
        (PatchTrigger, {"corner": "middle"}, "corner must be one of .* got 'middle'"),
        (BlendedTrigger, {"alpha": 0.0}, r"alpha must lie in \(0, 1\], got 0.0"),
        (BlendedTrigger, {"alpha": 1.5}, "got 1.5"),
        (BlendedTrigger, {"alpha": float("nan")}, "got nan"),
        (SinusoidTrigger, {"delta": 0}, r"delta must lie in \(0, 1\]"),
        (SinusoidTrigger, {"delta": 20}, "got 20"),
        (SinusoidTrigger, {"frequency": 0}, "frequency be > 0"),
    ],
)
def test_a_trigger_refuses_wrong_settings(make: type, settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**settings_)


@pytest.mark.parametrize("trigger", [PatchTrigger(), BlendedTrigger(), SinusoidTrigger()])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 8, 8), r"images must have shape \(N, C, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), "images must be uint8 or float32, got torch.float64"),
        (torch.full((1, 3, 8, 8), 255.0), r"images of dtype float32 must lie in \[0, 1\]"),
        ([[0.0]], "images must be a torch.Tensor, got list"),
    ],
)
def test_a_trigger_refuses_what_is_no_image(trigger: Trigger, images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trigger.embed(images)


# --- label maps ---


@given(label_map=label_maps, labels=st.lists(st.integers(0, 3), max_size=20))
def test_label_maps_turn_every_source_into_another_class(label_map: LabelMap, labels: list[int]) -> None:
    given_ = torch.tensor(labels, dtype=torch.int64)
    sources, targets = label_map.sources(given_), label_map.targets(given_)
    assert given_.tolist() == labels
    assert sources.dtype == torch.bool and targets.dtype == torch.int64
    assert sources.shape == targets.shape == given_.shape
    for label, source, target in zip(labels, sources.tolist(), targets.tolist(), strict=True):
        if isinstance(label_map, AllToAll):
            assert source and target == (label + label_map.shift) % 4 and target in range(4)
        elif isinstance(label_map, ManyToOne):
            assert source == (label in label_map.source_classes) and target == label_map.target
        else:
            assert isinstance(label_map, AllToOne)
            assert source == (label != label_map.target) and target == label_map.target
        assert not source or target != label


def test_all_to_all_is_a_permutation() -> None:
    for shift in (1, 3, -1, 7):
        targets = AllToAll(5, shift).targets(torch.arange(5))
        assert sorted(targets.tolist()) == list(range(5))
    assert AllToAll(5).targets(torch.arange(5)).tolist() == [1, 2, 3, 4, 0]
    assert AllToAll(5, -2).targets(torch.arange(5)).tolist() == [3, 4, 0, 1, 2]


def test_one_to_one_is_many_to_one_of_one() -> None:
    assert OneToOne(source=2, target=1) == ManyToOne((2,), 1)
    assert ManyToOne([2, 3], 1) == ManyToOne((2, 3), 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AllToOne(-1), "target must be a class index >= 0, got -1"),
        (lambda: AllToOne("0"), "target .* got '0'"),  # type: ignore[arg-type]
        (lambda: AllToOne(True), "target .* got True"),
        (lambda: AllToOne(1.0), "target .* got 1.0"),  # type: ignore[arg-type]
        (lambda: OneToOne(-2, 0), "source_classes must be a class index >= 0, got -2"),
        (lambda: OneToOne(1, 1), r"target 1 is among the source classes \(1,\)"),
        (lambda: ManyToOne((), 0), r"source_classes must be distinct classes, at least one, got \(\)"),
        (lambda: ManyToOne((1, 2, 1), 0), "source_classes must be distinct"),
        (lambda: ManyToOne((1, 2), 2), "target 2 is among"),
        (lambda: AllToAll(1), "classes must be at least 2, got 1"),
        (lambda: AllToAll(4, 0), "shift 0 maps each of 4 classes to itself"),
        (lambda: AllToAll(4, -8), "shift -8 maps each"),
        (
            lambda: AllToAll(3).targets(torch.tensor([0, 3])),
            r"labels must lie in \[0, 3\), got values from 0",
        ),
    ],
)
def test_label_maps_refuse_what_is_no_class(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


# --- poison ---


@settings(max_examples=80)
@given(
    label_map=label_maps,
    rate=st.floats(0.001, 1),
    seed=seeds,
    trigger=triggers,
    dtype=st.sampled_from((torch.uint8, torch.float32)),
)
def test_poison_changes_as_many_source_rows_as_asked_and_no_other(
    label_map: LabelMap, rate: float, seed: int, trigger: Trigger, dtype: torch.dtype
) -> None:
    train = dataset(dtype=dtype)
    images, labels = copy(train)
    attack = BackdoorAttack(trigger, label_map, poison_rate=rate, seed=seed)
    sources, count = label_map.sources(labels), round(rate * 40)
    if not count or count > int(sources.sum()):
        with pytest.raises(ValueError, match="^poison_rate"):
            attack.poison(train)
        return
    state = torch.get_rng_state()
    result = attack.poison(train)
    rows = result.poisoned
    assert rows.dtype == torch.bool and rows.shape == (40,) and int(rows.sum()) == count
    assert not (rows & ~sources).any()
    assert torch.equal(result.true_labels, labels)
    assert torch.equal(result.data.labels[rows], label_map.targets(labels)[rows])
    assert torch.equal(result.data.images[rows], trigger.embed(images)[rows])
    assert torch.equal(result.data.labels[~rows], labels[~rows])
    assert torch.equal(result.data.images[~rows], images[~rows])
    assert result.data.classes == CLASSES and len(result) == 40 and result.data.images.dtype == dtype

    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(train.images, images) and torch.equal(train.labels, labels)
    again = attack.poison(train)
    assert torch.equal(again.poisoned, rows) and torch.equal(again.data.images, result.data.images)
    result.data.images.zero_(), result.data.labels.zero_()
    assert torch.equal(train.images, images) and torch.equal(train.labels, labels)
    assert torch.equal(result.true_labels, labels)


def test_the_seed_draws_the_rows() -> None:
    train = dataset()
    drawn = [
        BackdoorAttack(PatchTrigger(), AllToOne(0), poison_rate=0.25, seed=seed).poison(train).poisoned
        for seed in range(40)
    ]
    assert not torch.equal(drawn[0], drawn[1])
    often = torch.stack(drawn).sum(0)[train.labels != 0]  # 10 of 30 rows, 40 times: 13.3 a row, deviation 3
    assert often.min() >= 2 and often.max() <= 26


def test_all_images_can_be_poisoned() -> None:
    train = dataset()
    result = BackdoorAttack(PatchTrigger(), AllToAll(4), poison_rate=1.0).poison(train)
    assert result.poisoned.all()
    assert torch.equal(result.data.labels, (train.labels + 1) % 4)


@pytest.mark.parametrize(
    ("label_map", "rate", "message"),
    [
        (AllToOne(1), 0.76, "asks for 30 .* have 30"),
        (OneToOne(0, 1), 0.26, "asks for 10 .* have 10"),
        (ManyToOne((0, 2), 1), 0.5, "asks for 20 .* have 20"),
    ],
)
def test_a_rate_that_fits_exactly_is_taken_and_one_more_image_refused(
    label_map: LabelMap, rate: float, message: str
) -> None:
    train = dataset()
    available = int(label_map.sources(train.labels).sum())
    result = BackdoorAttack(PatchTrigger(), label_map, poison_rate=available / 40).poison(train)
    assert torch.equal(result.poisoned, label_map.sources(train.labels))
    too_high = (available + 1) / 40
    with pytest.raises(
        ValueError,
        match=f"asks for {available + 1} poisoned images, but the source classes have {available} of 40: "
        f"lower it to at most {available / 40:.3f}",
    ):
        BackdoorAttack(PatchTrigger(), label_map, poison_rate=too_high).poison(train)


@pytest.mark.parametrize("rate", [0, -0.1, 1.01, float("nan")])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match=r"poison_rate must lie in \(0, 1\], got"):
        BackdoorAttack(PatchTrigger(), AllToOne(0), poison_rate=rate)


def test_a_rate_that_poisons_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"poison_rate 0.01 of 40 images poisons none"):
        BackdoorAttack(PatchTrigger(), AllToOne(0), poison_rate=0.01).poison(dataset())


@pytest.mark.parametrize(
    ("label_map", "message"),
    [
        (AllToOne(4), "label_map gives class 4, but there are 4 classes"),
        (OneToOne(0, 7), "label_map gives class 7"),
        (OneToOne(4, 0), "label_map turns class 4, but there are 4 classes"),
        (ManyToOne((0, 9), 1), "label_map turns class 9"),
        (AllToAll(5), "label_map gives class 4"),
        (AllToAll(3), r"labels must lie in \[0, 3\)"),
    ],
)
def test_classes_that_the_images_do_not_have_are_refused(label_map: LabelMap, message: str) -> None:
    attack = BackdoorAttack(PatchTrigger(), label_map, poison_rate=0.2)
    with pytest.raises(ValueError, match=message):
        attack.poison(dataset())
    with pytest.raises(ValueError, match=message):
        attack.triggered(dataset())


# --- triggered ---


@dataclass(frozen=True)
class EverythingToOne:
    """A label map of one's own, whose sources include the target's own images."""

    target: int = 1

    def sources(self, labels: Tensor) -> Tensor:
        return torch.ones_like(labels, dtype=torch.bool)

    def targets(self, labels: Tensor) -> Tensor:
        return torch.full_like(labels, self.target)


@settings(max_examples=60)
@given(label_map=label_maps | st.just(EverythingToOne()), trigger=triggers, seed=seeds)
def test_triggered_holds_every_row_that_can_be_turned(label_map: LabelMap, trigger: Trigger, seed: int) -> None:
    data = dataset(seed=seed)
    images, labels = copy(data)
    attack = BackdoorAttack(trigger, label_map, poison_rate=0.01)  # the rate has no say in testing
    assert isinstance(attack, Attack)
    result = attack.triggered(data)
    turned = label_map.sources(labels) & (label_map.targets(labels) != labels)
    assert result.rows.tolist() == torch.nonzero(turned).flatten().tolist()
    assert len(result) == int(turned.sum()) and result.classes == CLASSES
    assert torch.equal(result.true_labels, labels[turned])
    assert torch.equal(result.targets, label_map.targets(labels)[turned])
    assert (result.targets != result.true_labels).all()
    assert torch.equal(result.images, trigger.embed(images)[turned])
    assert torch.equal(data.images, images) and torch.equal(data.labels, labels)


@pytest.mark.parametrize("label_map", [AllToOne(2), OneToOne(0, 1), EverythingToOne(2)])
def test_images_that_cannot_be_turned_are_refused(label_map: LabelMap) -> None:
    data = dataset()
    with pytest.raises(ValueError, match="data holds no image of the attack's source classes"):
        BackdoorAttack(PatchTrigger(), label_map).triggered(data.subset(data.labels == 2))
