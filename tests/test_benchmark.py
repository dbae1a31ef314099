"""Rows and tables: what is measured is what is written, and the README shows it."""

import json
from pathlib import Path

import pytest
import torch

from bclip_lab import benchmark, zoo
from bclip_lab.clipping import ClippedModel
from bclip_lab.defenses import MMACConfig, mmac
from bclip_lab.detection import MMDF
from bclip_lab.evaluation import evaluate
from bclip_lab.margins import MaximumMarginConfig
from bclip_lab.training import run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> MMACConfig:
    """A defence of one epoch."""
    config = MMACConfig(epochs=1, synthetic=MaximumMarginConfig(per_class=1, steps=2), perturbation=0)
    monkeypatch.setitem(benchmark.DEFENCES, "mmac", lambda clipped, clean, seed: mmac(clipped, clean, config))
    return config


def test_a_row_is_what_the_parts_measure(quick: MMACConfig) -> None:
    checkpoint = zoo.load("patch", device="cpu")
    splits = checkpoint.splits()
    splits = type(splits)(splits.train[:10], splits.defender, splits.calibration, splits.test[:300])
    clean = zoo.load("clean-0", device="cpu").model
    row = run(benchmark.measure(checkpoint.model, splits, checkpoint.attack, "mmac", 0, clean))
    clipped = ClippedModel(checkpoint.model)
    run(mmac(clipped, splits.defender, quick))
    for when, model in (("before", checkpoint.model), ("after", clipped)):
        result = evaluate(model, splits.test, checkpoint.attack)
        assert row[when] == {
            "acc": result.acc, "asr": result.asr, "ra": result.ra, "clean": 300, "triggered": result.triggered
        }  # fmt: skip
    detector = MMDF(clipped).fit(splits.calibration)
    assert row["mmdf"]["fpr"] == pytest.approx(float(detector.detect(splits.test).float().mean()))
    assert row["ra_ceiling"] == evaluate(clean, splits.test, checkpoint.attack).ra
    assert [step["epoch"] for step in row["history"]] == [1]
    json.dumps(row, allow_nan=False)


def test_a_clean_model_has_neither_asr_nor_ceiling(quick: MMACConfig) -> None:
    checkpoint = zoo.load("clean-0", device="cpu")
    splits = checkpoint.splits()
    splits = type(splits)(splits.train[:10], splits.defender, splits.calibration, splits.test[:100])
    row = run(benchmark.measure(checkpoint.model, splits, None))
    assert set(row["after"]) == {"acc", "clean", "triggered"} and "ra_ceiling" not in row
    assert set(row["mmdf"]) == {"nominal_fpr", "fpr"}


def test_rows_are_read_back_and_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path))
    path = benchmark.write({"a": 1.5}, "mmac", "patch-0-fit-0")
    assert path == tmp_path / "results" / "mmac" / "patch-0-fit-0.json"
    assert benchmark.read("mmac", "patch-0-fit-0") == {"a": 1.5}
    assert benchmark.found("mmac", "patch-0-fit-*") == [{"a": 1.5}]
    with pytest.raises(FileNotFoundError, match="patch-0-fit-1"):
        benchmark.read("mmac", "patch-0-fit-1")
    path.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        benchmark.read("mmac", "patch-0-fit-0")
    with pytest.raises(ValueError, match="defence"):
        run(benchmark.measure(torch.nn.Identity(), None, None, "magic"))  # type: ignore[arg-type]


def test_the_readme_shows_the_recorded_rows() -> None:
    readme = Path(__file__).parents[1] / "README.md"
    text = readme.read_text()
    for name, table in benchmark.tables().items():
        if f"<!-- table {name} -->" in text:
            assert f"<!-- table {name} -->\n{table}\n<!-- end -->" in text, f"run `make tables`: {name} is out of date"


def test_tables_replace_only_what_is_between_their_marks(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("before\n<!-- table zoo -->\nold\n<!-- end -->\nafter\n")
    assert benchmark.update_readme(file) == ["zoo"]
    text = file.read_text()
    assert text.startswith("before\n<!-- table zoo -->\n| checkpoint |") and text.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in text
    file.write_text("<!-- table magic -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match="magic"):
        benchmark.update_readme(file)
