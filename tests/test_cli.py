"""The command line: thin, but what it says must be so."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

from bclip_lab import benchmark, zoo
from bclip_lab.benchmark import Defence
from bclip_lab.cli import main
from bclip_lab.clipping import ClippedModel
from bclip_lab.defenses import MMACConfig, MMACStep, mmac
from bclip_lab.margins import MaximumMarginConfig


def test_zoo_list_names_the_checkpoints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "list"]) == 0
    assert capsys.readouterr().out.split() == [*zoo.list()]


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads, whatever the suite computes with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_zoo_clip_learns_bounds_of_the_checkpoints_named_by_one_thread(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, two_threads: None
) -> None:
    clipped = []

    def clip(name: str) -> Iterator[MMACStep]:
        assert torch.get_num_threads() == 1
        clipped.append(name)
        yield MMACStep(1, 1, 0.0, 0.0, 0.9, 1.0, 0.0, 0.0, None, None)  # type: ignore[arg-type]

    monkeypatch.setattr(zoo, "clip", clip)
    assert main(["zoo", "clip", "patch", "face"]) == 0
    assert clipped == ["patch", "face"] and "patch: " in (out := capsys.readouterr().out) and "0.900" in out
    assert torch.get_num_threads() == 2, "what runs later in this process is as fast as before"


def test_an_error_is_one_line_that_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["images", str(tmp_path / "none"), "--name", "mine"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "none" in error and "Traceback" not in error


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defence of one epoch, and a detector of two steps."""
    few = MaximumMarginConfig(per_class=1, steps=2)
    config = MMACConfig(epochs=1, synthetic=few, perturbation=0)
    fit = Defence(lambda model, clean, config: mmac(ClippedModel(model), clean, config), config)
    monkeypatch.setitem(benchmark.DEFENCES, "mmac", fit)
    monkeypatch.setitem(benchmark.DEFENCES, "mm-bm", replace(fit, once=True))
    judge = replace(benchmark.DETECTORS["mm-bd"], settings={"config": few})
    monkeypatch.setitem(benchmark.DETECTORS, "mm-bd", judge)


def test_bench_fills_a_grid_in_and_writes_what_is_asked_for(
    quick: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "grid.toml"
    file.write_text('checkpoints = ["patch", "face"]\nmethods = ["mmac", "mm-bd"]\nseeds = [1]\n')
    words = ["bench", "patch", "--grid", str(file), "--out", str(tmp_path / "out"), "--jobs", "1"]
    words += ["--csv", str(tmp_path / "cells.csv"), "--latex", str(tmp_path / "cells.tex")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert (
        "mmac 1 on signs patch-0: ACC 0.995 ASR 1.000" in said and "2 cells, 2 of them measured now, 0 failed" in said
    )
    cells = pd.read_csv(tmp_path / "cells.csv")
    assert cells[["checkpoint", "method", "seed"]].values.tolist() == [["patch", "mmac", 1], ["patch", "mm-bd", 1]]
    assert cells["asr_before"][0] == 1 and "patch & 0 &" in (tmp_path / "cells.tex").read_text()
    row = benchmark.read("mmac", "patch-0-fit-1", folder=tmp_path / "out")
    assert benchmark.current(row) and row["ra_ceiling"] > 0.9
    assert main(words) == 0
    assert "2 cells, 0 of them measured now, 0 failed" in capsys.readouterr().out


def test_bench_explains_fits_of_mmac_in_rows_of_their_own(quick: None, tmp_path: Path) -> None:
    words = ["bench", "patch", "--seeds", "1", "--explained", "--out", str(tmp_path), "--jobs", "1"]
    assert main(words) == 0
    row = benchmark.read("mmac-explained", "patch-0-fit-1", folder=tmp_path)
    assert benchmark.current(row) and len(row["sites"]) == 9 and row["margins"].keys() == {"clean", "triggered"}
    assert [path.name for path in tmp_path.iterdir()] == ["mmac-explained"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "paper"], "needs --images"),
        (["--grid", "none.toml"], "none.toml does not exist"),
        (["magic"], "the grid small has no checkpoints magic"),
        (["patch", "--explained", "--methods", "mm-bm"], "only fits of mmac can be explained, got mm-bm"),
    ],
)
def test_bench_says_what_is_wrong_with_its_words(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_images_records_a_row_for_a_folder(quick: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path / "data"))
    for colour in ("red", "green", "blue", "white"):
        folder = tmp_path / "images" / colour
        folder.mkdir(parents=True)
        for number in range(40):
            Image.new("RGB", (16, 16), colour).rotate(number).save(folder / f"{number}.png")
    words = ["images", str(tmp_path / "images"), "--name", "mine", "--epochs", "1", "--per-class", "2", "--ceiling"]
    assert main([*words, "--jobs", "1"]) == 0
    rows = benchmark.found("mine", "patch-mmac-fit-*")
    assert len(rows) == 3 and all(0 <= row["after"]["asr"] <= 1 for row in rows)
    assert rows[0]["recipe"]["checkpoint"]["attack"]["trigger"]["kind"] == "PatchTrigger"
    assert set(rows[0]["training_seconds"]) == {"attacked", "clean"} and "ra_ceiling" in rows[0]
    assert len(benchmark.read("mine", "patch-mm-bd-fit-0")["margins"]) == 4
    kept = sorted((tmp_path / "data" / "cache" / "trained").glob("mine-*.safetensors"))
    assert [path.name.split("-")[1] for path in kept] == ["clean", "patch"]
    times = [path.stat().st_mtime_ns for path in kept]
    assert main([*words, "--jobs", "1", "--methods", "mm-bm"]) == 0
    assert [path.stat().st_mtime_ns for path in kept] == times, "trained once"
    assert benchmark.read("mine", "patch-mm-bm-fit-0")["before"] == rows[0]["before"]
