"""Published data sets, downloaded by torchvision on first use and kept as tensors."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bclip_lab.data.files import cache_dir, cached_tensors
from bclip_lab.data.folder import decode, to_pixels
from bclip_lab.data.images import LabelledImages, Splits

__all__ = ["GTSRB_CLASSES", "cifar10", "cifar100", "gtsrb", "svhn"]

GTSRB_CLASSES = (
    "limit 20",
    "limit 30",
    "limit 50",
    "limit 60",
    "limit 70",
    "limit 80",
    "end of limit 80",
    "limit 100",
    "limit 120",
    "no passing",
    "no passing for trucks",
    "right of way at the next crossing",
    "priority road",
    "yield",
    "stop",
    "no vehicles",
    "no trucks",
    "no entry",
    "danger",
    "curve to the left",
    "curve to the right",
    "double curve",
    "bumpy road",
    "slippery road",
    "road narrows on the right",
    "road works",
    "traffic lights",
    "pedestrians",
    "children",
    "bicycles",
    "ice or snow",
    "wild animals",
    "end of all limits",
    "turn right",
    "turn left",
    "straight on",
    "straight on or right",
    "straight on or left",
    "keep right",
    "keep left",
    "roundabout",
    "end of no passing",
    "end of no passing for trucks",
)

# Raised whenever a change alters the tensors, so that an older cache is not taken for them.
_VERSION = "1"
_TIMEOUT = 30.0  # seconds without an answer; torchvision sets none and would wait for ever
_GTSRB_SIZES = {"train": 26640, "test": 12630}

_Tensors = dict[str, Tensor]


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Let new sockets give up after `seconds` without an answer."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _splits(
    name: str,
    read: Callable[[Path], tuple[_Tensors, tuple[str, ...]]],
    *,
    by_hand: str,
    folder: str = "",
    per_class: int,
    seed: int,
) -> Splits:
    """The splits of a data set from its cached tensors, or from what `read` downloads."""
    if per_class < 1:
        raise ValueError(f"per_class must be at least 1, got {per_class}")

    def make() -> tuple[_Tensors, dict[str, Any]]:
        root = cache_dir() / name
        place = root / folder
        try:
            place.mkdir(parents=True, exist_ok=True)
            with _timeout(_TIMEOUT):
                tensors, classes = read(root)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise FileNotFoundError(
                f"{name} could not be downloaded or read ({type(error).__name__}: {error}). Offline, "
                f"put {by_hand} into the folder {place} and call {name}() again."
            ) from error
        return tensors, {"data": name, "classes": classes}

    tensors, card = cached_tensors(cache_dir() / f"{name}.safetensors", _VERSION, make)
    classes = tuple(card["classes"])
    train, test = (
        LabelledImages(tensors[f"{part}.images"], tensors[f"{part}.labels"], classes) for part in ("train", "test")
    )
    return Splits.from_parts(train, test, per_class=per_class, seed=seed)


def _read_cifar(root: Path, dataset: str) -> tuple[_Tensors, tuple[str, ...]]:
    from torchvision import datasets

    tensors, classes = {}, ()
    for part in ("train", "test"):
        data = getattr(datasets, dataset)(root, train=part == "train", download=True)
        classes = tuple(data.classes)
        tensors[f"{part}.images"] = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        tensors[f"{part}.labels"] = torch.tensor(data.targets)
    return tensors, classes


def _read_svhn(root: Path) -> tuple[_Tensors, tuple[str, ...]]:
    from torchvision import datasets

    tensors = {}
    for part in ("train", "test"):
        data = datasets.SVHN(root, split=part, download=True)
        tensors[f"{part}.images"] = torch.from_numpy(np.ascontiguousarray(data.data))
        tensors[f"{part}.labels"] = torch.from_numpy(data.labels.astype(np.int64))
    return tensors, tuple("0123456789")


def _read_gtsrb(root: Path) -> tuple[_Tensors, tuple[str, ...]]:
    from torchvision import datasets

    tensors = {}
    for part, expected in _GTSRB_SIZES.items():
        data = datasets.GTSRB(root, split=part, transform=lambda picture: to_pixels(picture, 32), download=True)
        if len(data) != expected:
            raise RuntimeError(f"the {part} part has {len(data)} images in place of {expected}")
        labels = np.zeros(expected, np.int64)

        def read(row: int, data: Any = data, labels: Any = labels) -> Any:
            pixels, labels[row] = data[row]
            return pixels

        images, errors = decode(expected, read, 32)
        if errors:
            row, error = min(errors.items())
            raise RuntimeError(f"{len(errors)} images of the {part} part cannot be read, the first is {row}: {error}")
        tensors[f"{part}.images"], tensors[f"{part}.labels"] = images, torch.from_numpy(labels)
    return tensors, GTSRB_CLASSES


def cifar10(*, per_class: int = 50, seed: int = 0) -> Splits:
    """CIFAR-10: ten classes of animals and vehicles, 50,000 train and 10,000 test photographs, 32x32 RGB.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html. The first call downloads 170 MB with torchvision, which
    checks their MD5, and keeps the images as tensors with their checksum; later calls read those.

    Parameters
    ----------
    per_class
        Images of each class in the defender's and in the calibration part, out of the 1,000 of the test part:
        50, as in arXiv 2308.04617, section 4.
    seed
        The same seed gives the same parts.

    Returns
    -------
    Splits
        Images uint8 (N, 3, 32, 32): 50,000 in `train`; 9,000 are left in `test`.

    Raises
    ------
    FileNotFoundError
        It cannot be downloaded; the message says which file to put where by hand.
    ValueError
        `per_class` is below 1 or too large.

    Examples
    --------
    >>> splits = cifar10()  # doctest: +SKIP
    >>> len(splits.train), len(splits.defender), len(splits.test)  # doctest: +SKIP
    (50000, 500, 9000)
    """
    return _splits(
        "cifar10",
        lambda root: _read_cifar(root, "CIFAR10"),
        by_hand="cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        per_class=per_class,
        seed=seed,
    )


def cifar100(*, per_class: int = 25, seed: int = 0) -> Splits:
    """CIFAR-100: a hundred classes, 50,000 train and 10,000 test photographs, 32x32 RGB.

    Source: Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
    https://www.cs.toronto.edu/~kriz/cifar.html. The first call downloads 169 MB with torchvision, which
    checks their MD5, and keeps the images as tensors with their checksum; later calls read those.

    Parameters
    ----------
    per_class
        Images of each class in the defender's and in the calibration part; at most 49. The test part has only
        100 a class, so the default is 25, which leaves 50 to test on, not the 50 of the other data sets.
    seed
        The same seed gives the same parts.

    Returns
    -------
    Splits
        Images uint8 (N, 3, 32, 32): 50,000 in `train`; 5,000 are left in `test`. The labels are the 100 fine
        ones.

    Raises
    ------
    FileNotFoundError
        It cannot be downloaded; the message says which file to put where by hand.
    ValueError
        `per_class` is below 1 or too large.

    Examples
    --------
    >>> splits = cifar100()  # doctest: +SKIP
    >>> len(splits.train), len(splits.defender), len(splits.test)  # doctest: +SKIP
    (50000, 2500, 5000)
    """
    return _splits(
        "cifar100",
        lambda root: _read_cifar(root, "CIFAR100"),
        by_hand="cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html",
        per_class=per_class,
        seed=seed,
    )


def gtsrb(*, per_class: int = 15, seed: int = 0) -> Splits:
    """GTSRB: 43 classes of German road signs, 26,640 train and 12,630 test photographs, here 32x32 RGB.

    Source: Stallkamp, Schlipsing, Salmen and Igel, "Man vs. computer: Benchmarking machine learning
    algorithms for traffic sign recognition", Neural Networks 32, 2012,
    https://benchmark.ini.rub.de/gtsrb_news.html. The train part is torchvision's, the one of the online
    competition. The first call downloads 280 MB with torchvision, which checks their MD5; the whole pictures
    (15 to 250 pixels wide) are resized bilinearly with anti-aliasing and kept as tensors with their checksum;
    later calls read those.

    Parameters
    ----------
    per_class
        Images of each class in the defender's and in the calibration part; at most 29. The smallest classes
        have only 60 images in the test part, so the default is 15, which leaves them 30 to test on, not the
        50 of other sets.
    seed
        The same seed gives the same parts.

    Returns
    -------
    Splits
        Images uint8 (N, 3, 32, 32): 26,640 in `train`; 11,340 are left in `test`.

    Raises
    ------
    FileNotFoundError
        It cannot be downloaded; the message says which files to put where by hand.
    ValueError
        `per_class` is below 1 or too large.

    Examples
    --------
    >>> splits = gtsrb()  # doctest: +SKIP
    >>> len(splits.train), len(splits.defender), len(splits.test)  # doctest: +SKIP
    (26640, 645, 11340)
    """
    return _splits(
        "gtsrb",
        _read_gtsrb,
        by_hand="GTSRB-Training_fixed.zip, GTSRB_Final_Test_Images.zip and GTSRB_Final_Test_GT.zip (the call "
        "unpacks them; delete a folder GTSRB that was unpacked only in part first) from "
        "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/published-archive.html",
        folder="gtsrb",
        per_class=per_class,
        seed=seed,
    )


def svhn(*, per_class: int = 50, seed: int = 0) -> Splits:
    """SVHN: house numbers, ten classes of digits, 73,257 train and 26,032 test photographs, 32x32 RGB.

    Source: Netzer, Wang, Coates, Bissacco, Wu and Ng, "Reading Digits in Natural Images with Unsupervised
    Feature Learning", 2011, http://ufldl.stanford.edu/housenumbers/. The first call downloads 246 MB with
    torchvision, which checks their MD5, and keeps the images as tensors with their checksum; later calls read
    those.

    Parameters
    ----------
    per_class
        Images of each class in the defender's and in the calibration part: 50, as in arXiv 2308.04617,
        section 4.
    seed
        The same seed gives the same parts.

    Returns
    -------
    Splits
        Images uint8 (N, 3, 32, 32): 73,257 in `train`; 25,032 are left in `test`. Class k is the digit k.

    Raises
    ------
    FileNotFoundError
        It cannot be downloaded; the message says which files to put where by hand.
    ValueError
        `per_class` is below 1 or too large.

    Examples
    --------
    >>> splits = svhn()  # doctest: +SKIP
    >>> len(splits.train), len(splits.defender), len(splits.test)  # doctest: +SKIP
    (73257, 500, 25032)
    """
    return _splits(
        "svhn",
        _read_svhn,
        by_hand="train_32x32.mat and test_32x32.mat (format 2, cropped digits) from "
        "http://ufldl.stanford.edu/housenumbers/",
        per_class=per_class,
        seed=seed,
    )
