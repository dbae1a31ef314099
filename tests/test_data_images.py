"""bclip_lab.data.images: labelled images, splits and the checks at the door."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bclip_lab.data.images import LabelledImages, Splits, check_images, check_labels, to_float

CLASSES = ("cat", "dog", "owl")


def numbered(count: int, classes: int = 3, first: int = 0) -> LabelledImages:
    """Images whose four pixels spell their number, so that no two are equal; labels 0, 1, 2, 0, 1, ..."""
    number = torch.arange(first, first + count)
    pixels = torch.stack([(number // 256**k) % 256 for k in range(4)], dim=1).to(torch.uint8)
    return LabelledImages(pixels.reshape(count, 1, 2, 2), torch.arange(count) % classes, CLASSES[:classes])


def numbers(data: LabelledImages) -> list[int]:
    """The numbers that the pixels of `numbered` spell."""
    return [sum(value * 256**k for k, value in enumerate(row)) for row in data.images.flatten(1).tolist()]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([[0.0]], "torch.Tensor, got list"),
        (torch.zeros(3, 8, 8), r"\(N, C, H, W\), got \(3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.float64), "uint8 or float32, got torch.float64"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "uint8 or float32, got torch.int64"),
        (torch.full((1, 3, 8, 8), 1.5), r"\[0, 1\], got \[1.5, 1.5\]"),
        (torch.full((1, 3, 8, 8), -0.1), r"\[0, 1\], got \[-0.1, -0.1\]"),
        (torch.full((1, 3, 8, 8), float("nan")), r"\[0, 1\], got \[nan, nan\]"),
        (torch.full((1, 3, 8, 8), float("inf")), r"\[0, 1\], got \[inf, inf\]"),
    ],
)
def test_bad_images_are_refused_by_name(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=r"^photos.*" + message):
        check_images(images, "photos")
    with pytest.raises(ValueError, match=r"^images.*" + message):
        LabelledImages(images, torch.zeros(1, dtype=torch.int64), CLASSES)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "int64 tensor of shape .*, got list"),
        (torch.zeros(2), "got torch.float32"),
        (torch.zeros(2, dtype=torch.int32), "got torch.int32"),
        (torch.zeros(2, 1, dtype=torch.int64), r"got torch.int64 \(2, 1\)"),
        (torch.tensor([0, 3]), r"\[0, 3\), got values from 0 to 3"),
        (torch.tensor([-1, 2]), r"\[0, 3\), got values from -1 to 2"),
    ],
)
def test_bad_labels_are_refused_by_name(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=r"^truth.*" + message):
        check_labels(labels, 3, "truth")
    with pytest.raises(ValueError, match=r"^labels.*" + message):
        LabelledImages(torch.zeros(2, 3, 4, 4), labels, CLASSES)


def test_images_and_labels_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="images and labels must be as many, got 2 and 1"):
        LabelledImages(torch.zeros(2, 3, 4, 4), torch.tensor([0]), CLASSES)


def test_empty_and_boundary_values_are_taken() -> None:
    check_images(torch.empty(0, 3, 4, 4))
    check_images(torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2))
    check_labels(torch.empty(0, dtype=torch.int64), 0)


def test_to_float_scales_bytes_and_leaves_floats_alone() -> None:
    bytes_ = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_float(bytes_), torch.arange(256) / 255)
    floats = torch.rand(2, 3)
    assert to_float(floats) is floats
    assert bytes_.tolist() == list(range(256))


def test_rows_by_slice_mask_and_index() -> None:
    data = numbered(9)
    assert numbers(data[2:5]) == [2, 3, 4]
    assert numbers(data[::4]) == [0, 4, 8]
    assert numbers(data[[7, 1, 1]]) == [7, 1, 1]
    assert numbers(data.subset(data.labels == 2)) == [2, 5, 8]
    assert numbers(data.subset((data.labels == 2).numpy())) == [2, 5, 8]
    assert data[[7, 1]].labels.tolist() == [1, 1]
    assert len(data[[]]) == 0 and data[[]].classes == CLASSES


@pytest.mark.parametrize("rows", [3, [[0, 1]], [0.5, 1.0]])
def test_rows_of_another_kind_are_refused(rows: object) -> None:
    with pytest.raises(ValueError, match="^rows must be"):
        numbered(4)[rows]  # type: ignore[index]


@settings(deadline=None)
@given(count=st.integers(1, 40), size=st.integers(1, 50), seed=st.none() | st.integers(0, 9))
def test_batches_hold_every_row_once(count: int, size: int, seed: int | None) -> None:
    data = numbered(count)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = list(data.batches(size, generator))
    assert [len(batch) for batch in batches] == [min(size, count - k) for k in range(0, count, size)]
    seen = [number for batch in batches for number in numbers(batch)]
    assert sorted(seen) == list(range(count))
    assert seed is not None or seen == list(range(count))
    if generator is not None:
        again = data.batches(size, generator.manual_seed(seed))
        assert seen == [number for batch in again for number in numbers(batch)]


def test_a_batch_holds_at_least_one_row() -> None:
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        next(numbered(4).batches(0))


@settings(deadline=None)
@given(per_class=st.integers(1, 5), classes=st.integers(1, 3), seed=st.none() | st.integers(0, 9))
def test_per_class_gives_as_many_of_each(per_class: int, classes: int, seed: int | None) -> None:
    data = numbered(5 * classes, classes)
    few = data.per_class(per_class, seed)
    assert few.labels.bincount().tolist() == [per_class] * classes
    assert len(set(numbers(few))) == len(few)
    assert numbers(few) == numbers(data.per_class(per_class, seed))
    assert seed is not None or set(numbers(few)) == set(range(per_class * classes))


def test_per_class_refuses_more_than_there_are() -> None:
    with pytest.raises(ValueError, match="count: class 'owl' has 1 images, 2 were asked for"):
        numbered(5).per_class(2)
    with pytest.raises(ValueError, match="count must be at least 1, got -1"):
        numbered(5).per_class(-1)


@settings(deadline=None)
@given(per_class=st.integers(1, 4), surplus=st.integers(1, 5), seed=st.integers(0, 99))
def test_splits_are_disjoint_of_the_right_size_and_the_same_by_seed(per_class: int, surplus: int, seed: int) -> None:
    train, test = numbered(7, first=1000), numbered(3 * (2 * per_class + surplus))
    splits = Splits.from_parts(train, test, per_class=per_class, seed=seed)
    defender, calibration, rest = (set(numbers(p)) for p in (splits.defender, splits.calibration, splits.test))
    assert defender | calibration | rest == set(numbers(test))
    assert (len(defender), len(calibration), len(rest)) == (3 * per_class, 3 * per_class, 3 * surplus)
    assert splits.defender.labels.bincount().tolist() == [per_class] * 3
    assert splits.calibration.labels.bincount().tolist() == [per_class] * 3
    assert splits.train is train and splits.classes == CLASSES
    for part in (splits.defender, splits.calibration, splits.test):
        assert part.labels.tolist() == [number % 3 for number in numbers(part)]
    again = Splits.from_parts(train, test, per_class=per_class, seed=seed)
    for name in ("defender", "calibration", "test"):
        assert numbers(getattr(again, name)) == numbers(getattr(splits, name))


def test_another_seed_gives_other_splits() -> None:
    first, second = (Splits.from_parts(numbered(3), numbered(300), per_class=20, seed=s) for s in (0, 1))
    assert numbers(first.defender) != numbers(second.defender)


@pytest.mark.parametrize("per_class", [5, 50])
def test_splits_refuse_a_class_with_too_few_test_images(per_class: int) -> None:
    with pytest.raises(ValueError, match=f"per_class: class 'cat' has 10 .* more than {2 * per_class}"):
        Splits.from_parts(numbered(3), numbered(30), per_class=per_class)


@pytest.mark.parametrize("per_class", [0, -1])
def test_splits_refuse_parts_without_images(per_class: int) -> None:
    with pytest.raises(ValueError, match=f"per_class must be at least 1, got {per_class}"):
        Splits.from_parts(numbered(3), numbered(30), per_class=per_class)


def test_parts_must_fit_together() -> None:
    three, two = numbered(6), numbered(6, classes=2)
    with pytest.raises(ValueError, match="calibration is empty"):
        Splits(three, three, three[:0], three)
    with pytest.raises(ValueError, match=r"test has classes \('cat', 'dog'\), train has"):
        Splits(three, three, three, two)
    large = LabelledImages(torch.zeros(3, 1, 4, 4), torch.arange(3), CLASSES)
    with pytest.raises(ValueError, match=r"defender has images of shape \(1, 4, 4\), train has \(1, 2, 2\)"):
        Splits(three, large, three, three)
