"""bclip_lab.data.signs: rendered road signs and their cache."""

from __future__ import annotations

import importlib
import itertools
import json
import warnings
from pathlib import Path

import pytest
import torch

from bclip_lab.data.images import LabelledImages, Splits
from bclip_lab.data.signs import SIGN_CLASSES, signs

# `bclip_lab.data.signs` is the function where the package is asked, and the module here.
module = importlib.import_module("bclip_lab.data.signs")

PARTS = ("train", "defender", "calibration", "test")
SMALL = {"train": 23, "test": 11, "per_class": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path / "lab"))
    return tmp_path / "lab" / "cache"


@pytest.fixture(scope="module")
def fresh() -> Splits:
    return signs(**SMALL, cache=False)


def same(one: Splits, two: Splits) -> bool:
    return all(
        torch.equal(getattr(one, name).images, getattr(two, name).images)
        and torch.equal(getattr(one, name).labels, getattr(two, name).labels)
        for name in PARTS
    )


def contents(data: LabelledImages) -> list[bytes]:
    return [image.numpy().tobytes() for image in data.images]


def no_rendering(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(module, "_render", fail)


# --- the images ---


def test_parts_are_as_large_as_asked_and_balanced(fresh: Splits) -> None:
    assert fresh.classes == SIGN_CLASSES and len(set(SIGN_CLASSES)) == 10
    assert [len(getattr(fresh, name)) for name in PARTS] == [23, 20, 20, 11]
    for name in PARTS:
        part = getattr(fresh, name)
        counts = part.labels.bincount(minlength=10)
        assert counts.max() - counts.min() <= 1
        assert part.images.shape[1:] == (3, 32, 32) and part.images.dtype == torch.uint8
    assert fresh.defender.labels.bincount().tolist() == [2] * 10
    assert fresh.calibration.labels.bincount().tolist() == [2] * 10


def test_no_two_images_are_equal(fresh: Splits) -> None:
    found = list(itertools.chain.from_iterable(contents(getattr(fresh, name)) for name in PARTS))
    assert len(set(found)) == len(found) == 74


def test_the_seed_decides_the_images_and_nothing_else_does(fresh: Splits) -> None:
    state = torch.get_rng_state()
    other = signs(**SMALL, seed=1, cache=False)
    assert torch.equal(torch.get_rng_state(), state)
    for name in PARTS:
        assert not set(contents(getattr(fresh, name))) & set(contents(getattr(other, name)))
    torch.rand(3)  # moves the global state
    assert same(fresh, signs(**SMALL, cache=False))


def test_the_pictures_are_those_of_their_labels() -> None:
    data = signs(train=400, test=1, per_class=1, cache=False).train
    pixels = data.images.float()
    centre = torch.stack([pixels[data.labels == c][..., 8:24, 8:24].mean((0, 2, 3)) for c in range(10)])
    red, green, blue = dict(zip(SIGN_CLASSES, centre[:, 0] - centre[:, 2], strict=True)), centre[:, 1], 2
    assert all(red[name] > 20 for name in ("stop", "no entry", "priority road"))
    assert all(red[name] < -20 for name in ("turn left", "turn right", "roundabout"))
    yellow = SIGN_CLASSES.index("priority road")
    assert green[yellow] - centre[yellow, blue] > 20
    assert float(pixels.std(0).mean()) > 30  # light, place and background vary


def test_the_ten_templates_differ_and_a_left_turn_mirrors_a_right_turn() -> None:
    templates = module._templates()
    assert templates.shape == (10, 4, 96, 96) and templates.min() >= 0 and templates.max() <= 1
    for one, two in itertools.combinations(templates, 2):
        assert float((one - two).abs().mean()) > 0.01
    left, right = templates[SIGN_CLASSES.index("turn left")], templates[SIGN_CLASSES.index("turn right")]
    assert float((left.flip(-1) - right).abs().mean()) < 0.01
    assert (templates[:, 3, 0, 0] == 0).all() and (templates[:, 3, 48, 48] == 1).all()


# --- the cache ---


def test_a_cache_hit_is_what_was_rendered(fresh: Splits, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert same(signs(**SMALL), fresh)
    files = sorted(own_cache.iterdir())
    assert [file.suffix for file in files] == [".json", ".safetensors"]
    assert json.loads(files[0].read_text())["data"] == "signs"
    no_rendering(monkeypatch)
    assert same(signs(**SMALL), fresh)
    for other in ({"seed": 1}, {"train": 24}, {"test": 12}, {"per_class": 3}):
        with pytest.raises(AssertionError, match="rendered again"):
            signs(**SMALL | other)
    with pytest.raises(AssertionError, match="rendered again"):
        signs(**SMALL, cache=False)


@pytest.mark.parametrize("damage", ["truncated", "altered", "no card", "card of another", "no images"])
def test_a_damaged_cache_is_rendered_again(
    damage: str, fresh: Splits, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signs(**SMALL)
    (file,) = own_cache.glob("*.safetensors")
    content, card = file.read_bytes(), file.with_suffix(".json")
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "altered":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no card":
        card.unlink()
    elif damage == "card of another":
        card.write_text(json.dumps(json.loads(card.read_text()) | {"sha256": "0" * 64}))
    else:
        file.unlink()
    assert same(signs(**SMALL), fresh)
    assert file.read_bytes() == content and len(list(own_cache.iterdir())) == 2
    no_rendering(monkeypatch)
    assert same(signs(**SMALL), fresh)


def test_the_pictures_of_an_older_version_are_rendered_again(fresh: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_VERSION", "0")
    monkeypatch.setattr(module, "_render", lambda labels, _: torch.zeros(len(labels), 3, 32, 32).byte())
    assert not signs(**SMALL).train.images.any()
    monkeypatch.undo()
    assert same(signs(**SMALL), fresh)


def test_a_folder_that_cannot_be_written_costs_a_warning_only(
    fresh: Splits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=r"signs-.*\.safetensors could not be written"):
        splits = signs(**SMALL)
    assert same(splits, fresh)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_without_a_cache_nothing_is_written(own_cache: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        signs(train=1, test=1, per_class=1, cache=False)
    assert not own_cache.parent.exists()


@pytest.mark.parametrize("name", ["train", "test", "per_class"])
@pytest.mark.parametrize("value", [0, -3])
def test_empty_parts_are_refused(name: str, value: int, own_cache: Path) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got {value}"):
        signs(**SMALL | {name: value})
    assert not own_cache.exists()
