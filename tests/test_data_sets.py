"""Loaders: one's own image folders, digits, and the published sets, whose downloads are imitated."""

from __future__ import annotations

import itertools
import os
import socket
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from bclip_lab.data import downloads, folder
from bclip_lab.data.digits import digits
from bclip_lab.data.downloads import GTSRB_CLASSES, cifar10, cifar100, gtsrb, svhn
from bclip_lab.data.folder import image_folder, split_at_random, to_pixels
from bclip_lab.data.images import LabelledImages, Splits

PARTS = ("train", "defender", "calibration", "test")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path / "lab"))
    return tmp_path / "lab" / "cache"


def colour(number: int) -> tuple[int, int, int]:
    return number % 256, number // 256 % 256, 77


def pictures(root: Path, **counts: int) -> Path:
    """A folder with `counts` plain PNG pictures of each class, no two of the same colour."""
    number = itertools.count()
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for row in range(count):
            Image.new("RGB", (8, 6), colour(next(number))).save(root / name / f"{row:03}.png")
    return root


def contents(data: LabelledImages) -> list[bytes]:
    return [image.numpy().tobytes() for image in data.images]


def assert_disjoint(splits: Splits) -> None:
    found = [set(contents(getattr(splits, name))) for name in PARTS]
    assert sum(map(len, found)) == sum(len(getattr(splits, name)) for name in PARTS)
    assert all(not one & two for one, two in itertools.combinations(found, 2))


def assert_equal(one: Splits, two: Splits) -> None:
    for name in PARTS:
        assert torch.equal(getattr(one, name).images, getattr(two, name).images)
        assert torch.equal(getattr(one, name).labels, getattr(two, name).labels)


# --- image_folder ---


def test_a_flat_folder_is_split_by_seed(tmp_path: Path) -> None:
    root = pictures(tmp_path / "own", cat=20, dog=40)
    splits = image_folder(root, per_class=1, test_share=0.25, seed=3)
    assert splits.classes == ("cat", "dog")
    counts = [getattr(splits, name).labels.bincount().tolist() for name in PARTS]
    assert counts == [
        [15, 30],
        [1, 1],
        [1, 1],
        [3, 8],
    ]
    assert splits.train.images.shape == (45, 3, 32, 32) and splits.train.images.dtype == torch.uint8
    assert_disjoint(splits)
    assert_equal(splits, image_folder(str(root), per_class=1, test_share=0.25, seed=3, cache=False))
    other = image_folder(root, per_class=1, test_share=0.25, seed=4)
    assert contents(other.train) != contents(splits.train)


def test_a_folder_with_train_and_test_is_kept(tmp_path: Path) -> None:
    pictures(tmp_path / "own" / "train", cat=2, dog=3)
    pictures(tmp_path / "own" / "test", cat=4, dog=5)
    (tmp_path / "own" / "notes").mkdir()
    splits = image_folder(tmp_path / "own", per_class=1, size=5)
    assert splits.train.images.shape == (5, 3, 5, 5)
    assert splits.train.labels.tolist() == [0, 0, 1, 1, 1]
    assert splits.train.images[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]  # in the order of names
    assert [len(getattr(splits, name)) for name in PARTS] == [5, 2, 2, 5]


def test_every_format_and_mode_becomes_rgb(tmp_path: Path) -> None:
    root = pictures(tmp_path / "own", other=9)
    own = root / "modes"
    own.mkdir()
    expected = {}
    for name, mode, fill, seen in [
        ("0.png", "L", 100, (100, 100, 100)),
        ("1.PNG", "RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("2.png", "RGBA", (10, 20, 30, 51), (206, 208, 210)),  # a fifth of it, the rest white
        ("3.png", "I;16", 0x8000, (128, 128, 128)),
        ("4.png", "1", 1, (255, 255, 255)),
        ("5.png", "LA", (50, 255), (50, 50, 50)),
        ("6.gif", "L", 40, (40, 40, 40)),
        ("7.jpg", "CMYK", (0, 0, 0, 0), (255, 255, 255)),
        ("8.jpeg", "RGB", (90, 90, 90), (90, 90, 90)),
        ("9.bmp", "RGB", (1, 2, 3), (1, 2, 3)),
        ("a.ppm", "RGB", (4, 5, 6), (4, 5, 6)),
    ]:
        Image.new(mode, (50, 20), fill).save(own / name)  # type: ignore[arg-type]
        expected[name] = seen
    palette = Image.new("RGB", (9, 9), (200, 100, 50)).quantize(4)
    palette.save(own / "b.png")
    expected["b.png"] = (200, 100, 50)
    Image.new("RGB", (9, 9), (7, 8, 9)).save(own / "c.webp", lossless=True)
    expected["c.webp"] = (7, 8, 9)
    (own / "readme.txt").write_text("no image")
    (own / ".hidden.png").write_text("no image")
    (root / ".ipynb_checkpoints").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = image_folder(root, per_class=1, test_share=0.4)
    pixels = {tuple(image[:, 16, 16].tolist()) for name in PARTS for image in getattr(splits, name).images}
    assert pixels >= set(expected.values())
    assert sum(len(getattr(splits, name)) for name in PARTS) == 9 + len(expected)


def test_pictures_are_resized_whole_with_antialiasing() -> None:
    wide = np.zeros((4, 64, 3), np.uint8)
    wide[:, ::2] = 255  # stripes one pixel wide are grey from afar
    pixels = to_pixels(Image.fromarray(wide), 8)
    assert pixels.shape == (3, 8, 8) and pixels.dtype == np.uint8
    assert pixels.min() > 100 and pixels.max() < 155
    halves = np.zeros((10, 40, 3), np.uint8)
    halves[:, 20:] = 255
    pixels = to_pixels(Image.fromarray(halves), 4)
    assert (pixels[:, :, 0] == 0).all() and (pixels[:, :, 3] == 255).all()


def test_a_picture_taken_upright_stays_upright(tmp_path: Path) -> None:
    sideways = Image.new("RGB", (64, 64))
    sideways.paste((255, 255, 255), (0, 0, 32, 64))  # the left half, which the tag turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(tmp_path / "phone.jpg", exif=exif, quality=95)
    with Image.open(tmp_path / "phone.jpg") as picture:
        pixels = to_pixels(picture, 8)
    assert pixels[:, 0].min() > 200 and pixels[:, -1].max() < 50


def test_unreadable_images_are_named_and_the_rest_loads(tmp_path: Path) -> None:
    root = pictures(tmp_path / "own", cat=10, dog=10)
    whole = (root / "cat" / "003.png").read_bytes()
    (root / "cat" / "003.png").write_bytes(whole[:40])
    (root / "dog" / "000.png").write_bytes(b"not a picture")
    (root / "dog" / "010.jpg").touch()
    for _ in range(2):  # decoded, and from the cache
        with pytest.warns(UserWarning, match=r"3 of 21 images in .*own cannot be read") as caught:
            splits = image_folder(root, per_class=1, test_share=0.5)
        assert len(caught) == 1
        assert all(name in str(caught[0].message) for name in ("cat/003.png (", "dog/000.png (", "dog/010.jpg ("))
        assert sum(len(getattr(splits, name)) for name in PARTS) == 18
        found = {tuple(i[:, 0, 0].tolist()): int(lab) for i, lab in zip(*_rows(splits), strict=True)}
        assert found == {colour(k): int(k >= 10) for k in range(20) if k not in (3, 10)}
    (root / "cat" / "003.png").write_bytes(whole)
    with pytest.warns(UserWarning, match="2 of 21"):
        image_folder(root, per_class=1, test_share=0.5)


def _rows(splits: Splits) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [getattr(splits, name) for name in PARTS]
    return torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])


def test_a_long_list_of_unreadable_images_is_cut(tmp_path: Path) -> None:
    root = pictures(tmp_path / "own", cat=4, dog=4)
    for row in range(25):
        (root / "cat" / f"bad{row:02}.png").touch()
    with pytest.warns(UserWarning, match=r"25 of 33 .*bad19.png.*; and 5 more") as caught:
        image_folder(root, per_class=1, test_share=0.8, cache=False)
    assert "bad20.png" not in str(caught[0].message)


@pytest.mark.filterwarnings("ignore:.*cannot be read:UserWarning")
def test_a_class_without_a_readable_image_is_named(tmp_path: Path) -> None:
    root = pictures(tmp_path / "own", cat=4)
    (root / "dog").mkdir()
    (root / "dog" / "0.png").touch()
    with pytest.raises(ValueError, match="no image of class 'dog' in path of"):
        image_folder(root, per_class=1)


def test_missing_and_misshapen_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"path: .*nowhere does not exist"):
        image_folder(tmp_path / "nowhere")
    (tmp_path / "file.png").touch()
    with pytest.raises(ValueError, match=r"path must be a folder .* got the file"):
        image_folder(tmp_path / "file.png")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"at least two class folders, got \[\]"):
        image_folder(tmp_path / "none")
    with pytest.raises(ValueError, match=r"at least two class folders, got \['cat'\]"):
        image_folder(pictures(tmp_path / "one", cat=3))
    pictures(tmp_path / "empty", cat=3, dog=3, owl=0)
    with pytest.raises(ValueError, match=r"class folder .*owl holds no image"):
        image_folder(tmp_path / "empty")
    pictures(tmp_path / "two" / "train", cat=1, dog=1)
    pictures(tmp_path / "two" / "test", cat=3, owl=3)
    with pytest.raises(ValueError, match=r"same classes; only one has \['dog', 'owl'\]"):
        image_folder(tmp_path / "two")
    with pytest.raises(ValueError, match="per_class: class 'cat' has 2 test images"):
        image_folder(pictures(tmp_path / "few", cat=10, dog=10), per_class=1)


@pytest.mark.parametrize(
    "wrong",
    [{"size": 0}, {"per_class": 0}, {"test_share": 0.0}, {"test_share": 1.0}, {"test_share": float("nan")}],
)
def test_settings_out_of_range_are_named(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must"):
        image_folder(pictures(tmp_path / "own", cat=9, dog=9), **wrong)


def test_the_cache_is_used_until_a_file_changes(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def counting(count: int, read: Callable[[int], Any], size: int, decode: Any = folder.decode) -> Any:
        decoded.append(count)
        return decode(count, read, size)

    monkeypatch.setattr(folder, "decode", counting)
    root = pictures(tmp_path / "own", cat=10, dog=10)

    def load(size: int = 32) -> Splits:
        return image_folder(root, per_class=1, test_share=0.5, size=size)

    first = load()
    assert_equal(load(), first)
    assert decoded == [20]
    load(size=16)
    assert decoded == [20, 20]
    os.utime(root / "cat" / "000.png", ns=(0, 0))
    assert_equal(load(), first)
    assert decoded == [20] * 3
    Image.new("RGB", (8, 6), (9, 9, 9)).save(root / "dog" / "new.png")
    load()
    assert decoded == [20, 20, 20, 21]
    for path in (own_cache / "folders").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    load()
    assert decoded == [20, 20, 20, 21, 21]
    assert len(list((own_cache / "folders").iterdir())) == 4  # a file and a card for each of two sizes
    image_folder(root, per_class=1, test_share=0.5, cache=False)
    assert decoded == [20, 20, 20, 21, 21, 21]


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    counts=st.lists(st.integers(2, 30), min_size=1, max_size=4),
    share=st.floats(0.05, 0.95),
    seed=st.integers(0, 99),
)
def test_a_random_split_takes_the_share_of_every_class(counts: list[int], share: float, seed: int) -> None:
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    images = torch.arange(len(labels), dtype=torch.uint8).reshape(-1, 1, 1, 1)
    data = LabelledImages(images, labels, tuple("abcd"[: len(counts)]))
    train, test = split_at_random(data, share, seed)
    assert sorted(contents(train) + contents(test)) == sorted(contents(data))
    taken = test.labels.bincount(minlength=len(counts)).tolist()
    assert taken == [round(share * count) for count in counts]
    assert contents(split_at_random(data, share, seed)[1]) == contents(test)


# --- digits ---


def test_digits_are_enlarged_and_disjoint() -> None:
    from sklearn.datasets import load_digits

    splits = digits()
    assert splits.classes == tuple("0123456789")
    images, labels = _rows(splits)
    assert images.shape == (1797, 3, 32, 32) and images.dtype == torch.uint8
    assert images.min() == 0 and images.max() == 255
    assert torch.equal(images[:, 0], images[:, 1]) and torch.equal(images[:, 0], images[:, 2])
    assert splits.defender.labels.bincount().tolist() == splits.calibration.labels.bincount().tolist() == [20] * 10
    assert splits.test.labels.bincount().min() >= 29
    assert labels.bincount().tolist() == np.bincount(load_digits().target).tolist()
    assert_disjoint(splits)
    # enlarged fourfold, the mean brightness stays
    assert images.float().mean() / 255 == pytest.approx(load_digits().images.mean() / 16, abs=0.005)


def test_digits_follow_their_seed_and_refuse_too_many() -> None:
    assert_equal(digits(seed=1), digits(seed=1))
    assert contents(digits(seed=1).test) != contents(digits(seed=2).test)
    assert len(digits(per_class=34).defender) == 340
    with pytest.raises(ValueError, match=r"per_class: class '.' has 7. test images"):
        digits(per_class=50)


# --- published sets ---


def unique_images(count: int, first: int) -> np.ndarray:
    """`count` images (N, 32, 32, 3), no two equal and none symmetric."""
    images = np.random.default_rng(first).integers(0, 256, (count, 32, 32, 3), np.uint8)
    return images


class FakeCIFAR:
    """torchvision's CIFAR10 and CIFAR100 as far as they are used: 4 train and 8 test images a class."""

    classes_: tuple[str, ...] = ("airplane", "automobile")
    made: ClassVar[list[tuple[Path, bool]]] = []

    def __init__(self, root: Path, train: bool, download: bool) -> None:
        assert download
        self.made.append((root, train))
        self.classes = list(self.classes_)
        count = (4 if train else 8) * len(self.classes)
        self.data = unique_images(count, int(train))
        self.targets = [row % len(self.classes) for row in range(count)]


class FakeSVHN:
    def __init__(self, root: Path, split: str, download: bool) -> None:
        assert download
        count = 40 if split == "train" else 80
        self.data = unique_images(count, len(split)).transpose(0, 3, 1, 2)
        self.labels = np.arange(count, dtype=np.int64) % 10


@pytest.mark.parametrize(("load", "name"), [(cifar10, "CIFAR10"), (cifar100, "CIFAR100")])
def test_cifar_is_read_once_through_torchvision(
    load: Callable[..., Splits], name: str, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"torchvision.datasets.{name}", FakeCIFAR)
    monkeypatch.setattr(FakeCIFAR, "made", [])
    splits = load(per_class=2)
    assert splits.classes == FakeCIFAR.classes_
    assert [len(getattr(splits, part)) for part in PARTS] == [8, 4, 4, 8]
    assert torch.equal(splits.train.images, torch.from_numpy(unique_images(8, 1)).permute(0, 3, 1, 2))
    assert splits.train.labels.tolist() == [0, 1] * 4
    assert_disjoint(splits)
    assert_equal(load(per_class=2), splits)
    root = own_cache / name.lower()
    assert FakeCIFAR.made == [(root, True), (root, False)]
    damaged = root.with_suffix(".safetensors")
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert_equal(load(per_class=2), splits)
    assert len(FakeCIFAR.made) == 4
    assert contents(load(per_class=2, seed=1).defender) != contents(splits.defender)
    with pytest.raises(ValueError, match="per_class: class 'airplane' has 8 test images"):
        load()


def test_svhn_is_read_through_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.datasets.SVHN", FakeSVHN)
    splits = svhn(per_class=3)
    assert splits.classes == tuple("0123456789")
    assert [len(getattr(splits, part)) for part in PARTS] == [40, 30, 30, 20]
    assert torch.equal(splits.train.images, torch.from_numpy(unique_images(40, 5)).permute(0, 3, 1, 2))
    assert_disjoint(splits)


def gtsrb_folder(root: Path) -> None:
    """GTSRB as torchvision unpacks it, with two train and four test pictures a class."""
    number = itertools.count()
    lines = ["Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId"]
    test = root / "gtsrb" / "GTSRB" / "Final_Test" / "Images"
    test.mkdir(parents=True)
    for label in range(43):
        own = root / "gtsrb" / "GTSRB" / "Training" / f"{label:05}"
        own.mkdir(parents=True)
        for row in range(2):
            Image.new("RGB", (40 + label, 35), colour(next(number))).save(own / f"{row:05}.ppm")
    for row in range(4 * 43):
        Image.new("RGB", (20, 25), colour(next(number))).save(test / f"{row:05}.ppm")
        lines.append(f"{row:05}.ppm;20;25;5;5;15;20;{row % 43}")
    (root / "gtsrb" / "GT-final_test.csv").write_text("\n".join(lines) + "\n")


def test_gtsrb_put_there_by_hand_is_read_without_a_network(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gtsrb_folder(own_cache / "gtsrb")
    monkeypatch.setattr(downloads, "_GTSRB_SIZES", {"train": 86, "test": 172})
    splits = gtsrb(per_class=1)
    assert len(GTSRB_CLASSES) == len(set(GTSRB_CLASSES)) == 43 and splits.classes == GTSRB_CLASSES
    assert [len(getattr(splits, part)) for part in PARTS] == [86, 43, 43, 86]
    assert splits.train.images.shape[1:] == (3, 32, 32)
    assert splits.train.labels.tolist() == [row // 2 for row in range(86)]
    assert splits.train.images[:, 0, 0, 0].tolist() == list(range(86))
    images, labels = _rows(splits)
    rows = images[86:, 0, 0, 0].long() + 256 * images[86:, 1, 0, 0].long() - 86
    assert torch.equal(rows % 43, labels[86:])
    assert_disjoint(splits)
    for path in (own_cache / "gtsrb").rglob("*.ppm"):
        path.unlink()
    assert_equal(gtsrb(per_class=1), splits)


def test_gtsrb_in_part_or_damaged_is_refused_and_not_kept(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gtsrb_folder(own_cache / "gtsrb")
    with pytest.raises(FileNotFoundError, match=r"train part has 86 images in place of 26640.*unpacked only in part"):
        gtsrb()
    monkeypatch.setattr(downloads, "_GTSRB_SIZES", {"train": 86, "test": 172})
    (own_cache / "gtsrb" / "gtsrb" / "GTSRB" / "Training" / "00001" / "00001.ppm").write_bytes(b"P6")
    with pytest.raises(FileNotFoundError, match="1 images of the train part cannot be read, the first is 3"):
        gtsrb()
    (own_cache / "gtsrb" / "gtsrb" / "GT-final_test.csv").unlink()
    with pytest.raises(FileNotFoundError, match="gtsrb could not be downloaded or read"):
        gtsrb()
    assert not list(own_cache.glob("*.safetensors")) and not list(own_cache.rglob("*.part"))


@pytest.mark.parametrize(
    "error",
    [
        urllib.error.URLError("Name or service not known"),
        TimeoutError("timed out"),
        RuntimeError("File not found or corrupted."),
    ],
)
@pytest.mark.parametrize(
    ("load", "name", "place", "files"),
    [
        (
            cifar10,
            "CIFAR10",
            "cifar10",
            ["cifar-10-python.tar.gz", "https://www.cs.toronto.edu/~kriz/cifar.html"],
        ),
        (cifar100, "CIFAR100", "cifar100", ["cifar-100-python.tar.gz", "https://www.cs.toronto.edu/"]),
        (
            svhn,
            "SVHN",
            "svhn",
            ["train_32x32.mat", "test_32x32.mat", "http://ufldl.stanford.edu/housenumbers/"],
        ),
        (
            gtsrb,
            "GTSRB",
            "gtsrb/gtsrb",
            ["GTSRB-Training_fixed.zip", "GTSRB_Final_Test_GT.zip", "https://sid.erda.dk/"],
        ),
    ],
)
def test_offline_the_error_says_what_to_put_where(
    load: Callable[[], Splits],
    name: str,
    place: str,
    files: list[str],
    error: Exception,
    own_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    timeouts = []

    def offline(*_: Any, **__: Any) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise error

    monkeypatch.setattr(f"torchvision.datasets.{name}", offline)
    before = socket.getdefaulttimeout()
    with pytest.raises(FileNotFoundError) as caught:
        load()
    message = str(caught.value)
    assert all(part in message for part in [*files, f"into the folder {own_cache / place} ", str(error)])
    assert caught.value.__cause__ is error
    assert (own_cache / place).is_dir() and not list(own_cache.rglob("*.*"))
    assert timeouts == [30.0] and socket.getdefaulttimeout() == before


@pytest.mark.parametrize("load", [cifar10, cifar100, gtsrb, svhn])
def test_a_wrong_number_is_refused_before_a_download(load: Callable[..., Splits], own_cache: Path) -> None:
    with pytest.raises(ValueError, match="per_class must be at least 1, got 0"):
        load(per_class=0)
    assert not own_cache.exists()


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("CIFAR10", {"cifar-10-python.tar.gz"}),
        ("CIFAR100", {"cifar-100-python.tar.gz"}),
        ("SVHN", {"train_32x32.mat", "test_32x32.mat"}),
    ],
)
def test_the_files_named_are_those_torchvision_looks_for(name: str, files: set[str]) -> None:
    from torchvision import datasets

    source = getattr(datasets, name)
    parts = {source.split_list[part][1] for part in ("train", "test")} if name == "SVHN" else {source.filename}
    assert parts == files
