"""One's own images, from one folder a class."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from bclip_lab.data.files import cache_dir, cached_tensors
from bclip_lab.data.images import LabelledImages, Splits

__all__ = ["decode", "image_folder", "split_at_random", "to_pixels"]

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".webp"})
# Raised whenever a change alters the pixels, so that an older cache is not taken for them.
_VERSION = 1
_BAR = 2000  # no progress bar for fewer pictures: they take about a second
_NAMED = 20  # a warning names as many unreadable pictures, and counts the others


def to_pixels(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    """A picture of any mode and size as RGB: uint8 (3, size, size).

    The whole picture is resized, bilinearly with anti-aliasing, so one that is not square is squeezed, not
    cut. It is turned as its EXIF orientation says; transparent parts come on white; of 16-bit grey the upper
    8 bits are taken; of an animation the first frame.
    """
    picture.draft("RGB", (2 * size, 2 * size))  # a large JPEG is decoded at a fraction of its size
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(picture).transpose(2, 0, 1)


def decode(count: int, read: Callable[[int], NDArray[np.uint8]], size: int) -> tuple[Tensor, dict[int, str]]:
    """Pictures 0 to `count` as `read` gives them, in threads: uint8 (count, 3, size, size), and the failures.

    The rows of a picture whose `read` fails are zero; the dictionary has the error by row.
    """
    from tqdm.auto import tqdm

    images = np.zeros((count, 3, size, size), np.uint8)
    errors: dict[int, str] = {}

    def read_rows(rows: range) -> int:
        for row in rows:
            try:
                images[row] = read(row)
            except Exception as error:  # for damaged files Pillow raises OSError, SyntaxError and others
                errors[row] = f"{type(error).__name__}: {error}"
        return len(rows)

    Image.init()  # left to the threads, one of them may look a format up before another has registered it
    chunks = [range(start, min(start + 64, count)) for start in range(0, count, 64)]
    with (
        ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool,
        tqdm(total=count, unit="image", disable=count <= _BAR) as bar,
    ):
        for done in pool.map(read_rows, chunks):
            bar.update(done)
    return torch.from_numpy(images), errors


def split_at_random(data: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages]:
    """All but `share` of every class, and `share` of every class, drawn by `seed`; both in order."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    taken = torch.zeros(len(data), dtype=torch.bool)
    for label in range(len(data.classes)):
        own = order[data.labels[order] == label]
        taken[own[: round(share * len(own))]] = True
    return data.subset(~taken), data.subset(taken)


def _hidden(path: Path) -> bool:
    """Whether systems and archives leave such names behind: `.ipynb_checkpoints`, `._a.jpg`, `__MACOSX`."""
    return path.name.startswith((".", "__MACOSX"))


def _classes(folder: Path) -> dict[str, list[Path]]:
    """The image files of every class folder in `folder`, sorted by name."""
    classes = {}
    for own in sorted((p for p in folder.iterdir() if p.is_dir() and not _hidden(p)), key=lambda p: p.name):
        files = [p for p in own.iterdir() if p.suffix.lower() in _SUFFIXES and not _hidden(p)]
        if not files:
            raise ValueError(
                f"path: the class folder {own} holds no image ({', '.join(sorted(_SUFFIXES))}); expected are "
                "path/<class>/<images>, or path/train/<class>/<images> and path/test/<class>/<images>"
            )
        classes[own.name] = sorted(files, key=lambda p: p.name)
    return classes


def image_folder(
    path: str | os.PathLike[str],
    *,
    size: int = 32,
    per_class: int = 50,
    seed: int = 0,
    test_share: float = 0.2,
    cache: bool = True,
) -> Splits:
    """One's own images: a folder for each class, named as the class, with pictures of any size.

    Two layouts are taken: `path/<class>/*`, which is split at random into a train and a test part, and
    `path/train/<class>/*` with `path/test/<class>/*`, which are kept. The defender's and the calibration
    images come out of the test part. Classes and files are taken in the order of their names; what is not an
    image file (png, jpg, jpeg, bmp, webp, ppm, gif) or hidden is left aside, and so are folders within a
    class folder.

    Parameters
    ----------
    path
        The folder.
    size
        Height and width of the images in pixels: the whole picture is resized (bilinear, anti-aliased), so
        one that is not square is squeezed. 32 as in CIFAR-10. Grey, palette and 16-bit pictures become RGB,
        transparent parts white.
    per_class
        Images of each class in the defender's and in the calibration part: 50, as in arXiv 2308.04617,
        section 4. The test part must hold more than twice as many of every class.
    seed
        The same seed gives the same parts.
    test_share
        The share of every class that becomes the test part, before the defender's and the calibration images
        are taken from it; in (0, 1). Of no effect on a folder that has a test part.
    cache
        Keep the decoded images in the data folder, with a checksum. They are decoded again when a file was
        added, removed or changed (by name, size and time), or when the cache is damaged.

    Returns
    -------
    Splits
        Images uint8 (N, 3, size, size).

    Warns
    -----
    UserWarning
        Pictures that cannot be read, by name; the rest loads.

    Raises
    ------
    FileNotFoundError
        `path` does not exist.
    ValueError
        `path` is no folder, has fewer than two classes, a class without images (or without readable ones),
        different classes in train and test; too few images for `per_class`; `size`, `per_class` or
        `test_share` out of range.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for k in range(20):
    ...         picture = Path(folder, "cat" if k % 2 else "dog", f"{k}.png")
    ...         picture.parent.mkdir(exist_ok=True)
    ...         Image.new("RGB", (48, 40), (k, 0, 0)).save(picture)
    ...     splits = image_folder(folder, per_class=1, test_share=0.5, cache=False)
    >>> splits.classes, splits.train.images.shape, len(splits.defender), len(splits.test)
    (('cat', 'dog'), torch.Size([10, 3, 32, 32]), 2, 6)
    """
    for name, value in (("size", size), ("per_class", per_class)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not 0 < test_share < 1:
        raise ValueError(f"test_share must lie between 0 and 1, got {test_share}")
    root = Path(path).expanduser().resolve()
    if not root.exists():
        raise FileNotFoundError(f"path: {root} does not exist")
    if not root.is_dir():
        raise ValueError(f"path must be a folder with one folder a class, got the file {root}")

    kept_apart = (root / "train").is_dir() and (root / "test").is_dir()
    parts = [_classes(root / name) for name in ("train", "test")] if kept_apart else [_classes(root)]
    if differing := sorted(set(parts[0]) ^ set(parts[-1])):
        raise ValueError(f"path: train and test of {root} must have the same classes; only one has {differing}")
    classes = tuple(parts[0])
    if len(classes) < 2:
        raise ValueError(f"path must have at least two class folders, got {list(classes)} in {root}")
    files = [file for part in parts for own in part.values() for file in own]
    labels = torch.tensor([label for part in parts for label, own in enumerate(part.values()) for _ in own])
    in_test = torch.arange(len(files)) >= sum(map(len, parts[0].values()))
    names = [file.relative_to(root).as_posix() for file in files]

    def read(row: int) -> NDArray[np.uint8]:
        with Image.open(files[row]) as picture:
            return to_pixels(picture, size)

    def make() -> tuple[dict[str, Tensor], dict[str, Any]]:
        images, errors = decode(len(files), read, size)
        readable = torch.tensor([row not in errors for row in range(len(files))])
        card = {"folder": str(root), "unreadable": {names[row]: errors[row] for row in sorted(errors)}}
        return {"images": images if not errors else images[readable]}, card

    if cache:
        listing = hashlib.sha256(f"{_VERSION}".encode())
        for name, file in zip(names, files, strict=True):
            stat = file.stat()
            listing.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\0".encode())
        place = hashlib.sha256(f"{root}\0{size}".encode()).hexdigest()[:16]
        tensors, card = cached_tensors(cache_dir() / "folders" / f"{place}.safetensors", listing.hexdigest(), make)
    else:
        tensors, card = make()

    unreadable = card["unreadable"]
    if unreadable:
        some = "; ".join(f"{name} ({error})" for name, error in list(unreadable.items())[:_NAMED])
        more = f"; and {len(unreadable) - _NAMED} more" if len(unreadable) > _NAMED else ""
        warnings.warn(
            f"{len(unreadable)} of {len(files)} images in {root} cannot be read and are left out: {some}{more}",
            stacklevel=2,
        )
        readable = torch.tensor([name not in unreadable for name in names])
        labels, in_test = labels[readable], in_test[readable]
        for part_name, rows in (("train", ~in_test), ("test", in_test)) if kept_apart else (("path", ~in_test),):
            for label in set(range(len(classes))) - set(labels[rows].tolist()):
                raise ValueError(f"path: no image of class {classes[label]!r} in {part_name} of {root} can be read")
    data = LabelledImages(tensors["images"], labels, classes)
    if kept_apart:
        train, test = data.subset(~in_test), data.subset(in_test)
    else:
        train, test = split_at_random(data, test_share, seed)
    return Splits.from_parts(train, test, per_class=per_class, seed=seed)
