"""bclip_lab.data.files: tensors with a card, whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bclip_lab.data import files
from bclip_lab.data.files import (
    cache_dir,
    cached_tensors,
    data_dir,
    load_tensors,
    save_tensors,
    sha256,
    write_bytes,
)

TENSORS = {
    "bytes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    "half": torch.ones(2, dtype=torch.float16),
}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_tensors(tmp_path / "zoo" / "model.safetensors", TENSORS, {"data": "signs", "acc": 0.99})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fail(*_: Any, **__: Any) -> None:
    raise OSError("no space left on device")


def test_tensors_and_card_come_back(saved: Path) -> None:
    tensors, card = load_tensors(str(saved))
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    assert card == {"data": "signs", "acc": 0.99, "sha256": sha256(saved)}
    assert names(saved.parent) == ["model.json", "model.safetensors"]


def test_saving_again_replaces_both(saved: Path) -> None:
    save_tensors(saved, {"other": torch.zeros(1)}, {"data": "digits"})
    tensors, card = load_tensors(saved)
    assert list(tensors) == ["other"] and card["data"] == "digits"
    assert names(saved.parent) == ["model.json", "model.safetensors"]


def test_tensors_that_are_not_contiguous_or_need_gradients_are_saved(tmp_path: Path) -> None:
    weight = torch.arange(6.0).reshape(2, 3).t().requires_grad_()
    tensors, _ = load_tensors(save_tensors(tmp_path / "a.safetensors", {"weight": weight}, {}))
    assert torch.equal(tensors["weight"], weight)


@pytest.mark.parametrize(
    ("name", "card", "message"),
    [
        ("model.pt", {}, "path must end in .safetensors, got 'model.pt'"),
        ("model.safetensors", {"path": Path()}, "card: Object of type"),
        ("model.safetensors", {"acc": float("nan")}, "card: Out of range float"),
    ],
)
def test_what_cannot_be_saved_writes_nothing(tmp_path: Path, name: str, card: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save_tensors(tmp_path / name, TENSORS, card)
    assert names(tmp_path) == []


def test_an_interrupted_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: dict[str, Tensor], path: Path) -> None:
        save_file(tensors, path)
        path.write_bytes(path.read_bytes()[:20])
        raise KeyboardInterrupt

    monkeypatch.setattr(files, "save_file", half)
    with pytest.raises(KeyboardInterrupt):
        save_tensors(tmp_path / "model.safetensors", TENSORS, {})
    assert names(tmp_path) == []


def test_an_interrupted_write_leaves_the_former_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_tensors(saved, {"other": torch.zeros(1)}, {})
    assert load_tensors(saved)[0].keys() == TENSORS.keys()
    assert names(saved.parent) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_leaves_the_former_pair(saved: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    if room:  # for the tensors, but not for their card
        monkeypatch.setattr(Path, "write_bytes", fail)
    else:

        def full(*_: Any) -> None:
            raise SafetensorError("I/O error: no space left on device (os error 28)")  # no OSError

        monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_tensors(saved, {"other": torch.zeros(1)}, {"data": "digits"})
    tensors, card = load_tensors(saved)
    assert tensors.keys() == TENSORS.keys() and card["data"] == "signs"
    assert names(saved.parent) == ["model.json", "model.safetensors"]


def test_bytes_are_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "results.json"
    write_bytes(target, b"{}")
    assert target.read_bytes() == b"{}"
    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_bytes(target, b"[]")
    assert names(target.parent) == ["results.json"] and target.read_bytes() == b"{}"


@pytest.mark.parametrize("missing", [".safetensors", ".json"])
def test_a_missing_file_is_named(saved: Path, missing: str) -> None:
    saved.with_suffix(missing).unlink()
    with pytest.raises(FileNotFoundError, match=f"model{missing} does not exist"):
        load_tensors(saved)


def test_a_truncated_file_is_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors does not match the checksum on its card model.json"):
        load_tensors(saved)


def test_an_altered_file_is_refused(saved: Path) -> None:
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1
    saved.write_bytes(content)
    with pytest.raises(ValueError, match="does not match the checksum"):
        load_tensors(saved)


def test_the_card_of_another_file_is_refused(saved: Path) -> None:
    other = save_tensors(saved.with_name("other.safetensors"), {"other": torch.zeros(1)}, {})
    saved.with_suffix(".json").write_bytes(other.with_suffix(".json").read_bytes())
    with pytest.raises(ValueError, match="the file is damaged or the card belongs to another one"):
        load_tensors(saved)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"acc": 1}', '"text"', "\x80"])
def test_what_is_no_card_is_refused(saved: Path, text: str) -> None:
    saved.with_suffix(".json").write_bytes(text.encode("latin1"))
    with pytest.raises(ValueError, match=r"model.json is not a card"):
        load_tensors(saved)


def test_another_format_under_a_right_checksum_is_refused(saved: Path) -> None:
    saved.write_bytes(b"a pickle, say")
    saved.with_suffix(".json").write_text(json.dumps({"sha256": sha256(saved)}))
    with pytest.raises(ValueError, match=r"model.safetensors is not a safetensors file"):
        load_tensors(saved)


def test_a_cache_is_made_once_and_again_when_damaged_or_outdated(tmp_path: Path) -> None:
    path, made = tmp_path / "cache.safetensors", []

    def get(key: str) -> int:
        def make() -> tuple[dict[str, Tensor], dict[str, str]]:
            made.append(key)
            return {"a": torch.tensor([len(made)])}, {"note": "kept"}

        tensors, card = cached_tensors(path, key, make)
        assert card["note"] == "kept"
        return int(tensors["a"])

    assert [get("1"), get("1")] == [1, 1]
    assert [get("2"), get("2")] == [2, 2]
    path.write_bytes(path.read_bytes()[:-3])
    assert [get("2"), get("2")] == [3, 3]
    path.with_suffix(".json").unlink()
    assert [get("2"), get("2")] == [4, 4]
    assert names(tmp_path) == ["cache.json", "cache.safetensors"]


def test_a_cache_that_cannot_be_written_costs_a_warning_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "save_file", fail)
    with pytest.warns(UserWarning, match=r"cache.safetensors could not be written.*no space"):
        tensors, _ = cached_tensors(tmp_path / "cache.safetensors", "1", lambda: (TENSORS, {}))
    assert tensors is TENSORS
    assert names(tmp_path) == []


def test_the_data_folder_is_the_one_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path))
    assert data_dir() == tmp_path and cache_dir() == tmp_path / "cache"


def test_the_data_folder_is_the_checkouts_or_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BCLIP_LAB_DATA", raising=False)
    monkeypatch.setattr(files, "__file__", str(tmp_path / "bclip_lab" / "data" / "files.py"))
    monkeypatch.setattr(files.platformdirs, "user_cache_dir", lambda name: str(tmp_path / "user" / name))
    assert data_dir() == tmp_path / "user" / "bclip_lab"
    (tmp_path / "pyproject.toml").touch()
    assert data_dir() == tmp_path / "data"
