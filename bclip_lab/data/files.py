"""Files: where the lab's data lie, and tensors written whole with a card that carries their checksum."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
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


def _temporary(path: Path) -> Path:
    """An empty file beside `path`, so that a rename to `path` stays within one file system."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    os.close(handle)
    os.chmod(name, 0o644)  # mkstemp's 0600 would make a shared data folder unreadable to others
    return Path(name)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it: `path` never holds half a file."""
    part = _temporary(path)
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


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
        Another ending, or a card that JSON cannot hold. Nothing is written then.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path.name!r}")
    try:
        json.dumps(dict(card), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"card: {error}") from error
    part = _temporary(path)
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, part)
        part.chmod(0o644)  # save_file makes a file of its own, readable to its owner only
        text = json.dumps({**card, "sha256": sha256(part)}, indent=2, allow_nan=False)
        part.replace(path)
        write_bytes(path.with_suffix(".json"), (text + "\n").encode())
    finally:
        part.unlink(missing_ok=True)
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
    except (OSError, safetensors.SafetensorError) as error:
        warnings.warn(f"{path} could not be written, so the data will be made again: {error}", stacklevel=2)
    return tensors, card
