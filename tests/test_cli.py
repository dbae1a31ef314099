"""The command line: thin, but what it says must be so."""

from pathlib import Path

import pytest
from PIL import Image

from bclip_lab import benchmark, zoo
from bclip_lab.cli import main
from bclip_lab.defenses import MMACConfig, mmac
from bclip_lab.margins import MaximumMarginConfig


def test_zoo_list_names_the_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "list"]) == 0
    assert capsys.readouterr().out.split() == [*zoo.list()]


def test_an_error_is_one_line_that_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["images", str(tmp_path / "none"), "--name", "mine"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "none" in error and "Traceback" not in error


def test_images_records_a_row_for_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path / "data"))
    for colour in ("red", "green", "blue", "white"):
        folder = tmp_path / "images" / colour
        folder.mkdir(parents=True)
        for number in range(40):
            Image.new("RGB", (16, 16), colour).rotate(number).save(folder / f"{number}.png")
    config = MMACConfig(epochs=1, synthetic=MaximumMarginConfig(per_class=1, steps=2), perturbation=0)
    monkeypatch.setitem(benchmark.DEFENCES, "mmac", lambda clipped, clean, seed: mmac(clipped, clean, config))
    words = ["images", str(tmp_path / "images"), "--name", "mine", "--epochs", "1", "--per-class", "2", "--ceiling"]
    assert main(words) == 0
    rows = benchmark.found("mine", "patch-mmac-fit-*")
    assert len(rows) == 3 and all(0 <= row["after"]["asr"] <= 1 for row in rows)
    assert rows[0]["attack"]["trigger"]["kind"] == "PatchTrigger" and set(rows[0]["training_seconds"]) == {
        "attacked",
        "clean",
    }
    assert len(benchmark.read("mine", "patch-mm-bd")["margins"]) == 4
