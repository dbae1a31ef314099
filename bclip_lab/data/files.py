"""Files: where the lab's data lie, and tensors written whole with a card that carries their checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import platformdirs
import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["cache_dir", "cached_tensors", "data_dir", "load_tensors", "save_tensors", "sha256", "write_bytes"]


def data_dir() -> Path:
    """The lab's data folder.

    `BCLIP_LAB_DATA` where it is set; else `data/` of the checkout the package is used from; else, for a
    package installed without its checkout, a folder in the user's cache.
    """
    if named := os.environ.get("BCLIP_LAB_DATA"):
        return Path(named).expanduser()
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return checkout / "data"
    return Path(platformdirs.user_cache_dir("bclip_lab"))


def cache_dir() -> Path:
    """Where rendered and downloaded images are kept: `cache/` in the data folder."""
    return data_dir() / "cache"


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, so that a rename to `path` stays within one file system; removed unless renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    try:
        os.chmod(name, 0o644)  # mkstemp's 0600 would make a shared data folder unreadable to others
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: `path` never holds half a file."""
    with _temporary(path) as part:
        part.write_bytes(content)
        part.replace(path)


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any]) -> Path:
    """Write `path` (safetensors) and, beside it, its card: JSON, with the tensors' SHA-256 under `"sha256"`.

    Parameters
    ----------
    path
        Ends in `.safetensors`; folders are made.
    tensors
        Names and tensors, any dtype and device.
    card
        What JSON can hold.

    Raises
    ------
    ValueError
        Another ending, or a card that JSON cannot hold.
    OSError
        They cannot be written, as on a full disk. In either case what was there before is left as it was.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path.name!r}")
    try:
        json.dumps(dict(card), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"card: {error}") from error
    card_path = path.with_suffix(".json")
    with _temporary(path) as part, _temporary(card_path) as card_part:
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
        part.chmod(0o644)  # save_file makes a file of its own, readable to its owner only
        text = json.dumps({**card, "sha256": sha256(part)}, indent=2, allow_nan=False)
        card_part.write_bytes((text + "\n").encode())
        part.replace(path)  # both are whole by now: where one of them had no room, neither is replaced
        card_part.replace(card_path)
    return path


def load_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and card of `save_tensors`.

    Raises
    ------
    FileNotFoundError
        The file or its card is missing.
    ValueError
        The card is no JSON, or the file's SHA-256 is not the one on the card (truncated, altered, or a card
        that belongs to another file).
    """
    path = Path(path)
    card_path = path.with_suffix(".json")
    for needed in (path, card_path):
        if not needed.is_file():
            raise FileNotFoundError(f"{needed} does not exist; {path.name} is stored with its card {card_path.name}")
    try:
        card = json.loads(card_path.read_text())
        expected = card["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{card_path} is not a card (JSON with the checksum under 'sha256'): {error}") from error
    if sha256(path) != expected:
        raise ValueError(
            f"{path} does not match the checksum on its card {card_path.name}: the file is damaged or the "
            "card belongs to another one. Restore both, or delete both and make them again."
        )
    try:
        return load_file(path), card
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error


def cached_tensors(
    path: Path, key: str, make: Callable[[], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    """Tensors and card kept at `path` if that card carries `key`; else those of `make`, which are then kept.

    A missing, damaged or outdated file is made again. Where the folder cannot be written to, a warning says
    so and the data are given all the same.
    """
    with contextlib.suppress(OSError, ValueError):
        kept = load_tensors(path)
        if kept[1].get("key") == key:
            return kept
    tensors, card = make()
    try:
        save_tensors(path, tensors, {**card, "key": key})
    except OSError as error:
        warnings.warn(f"{path} could not be written, so the data will be made again: {error}", stacklevel=2)
    return tensors, card
