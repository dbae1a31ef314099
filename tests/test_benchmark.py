"""Rows and tables: what is measured is what is written, and the README shows it."""

import json
from pathlib import Path

import pytest
import torch

from bclip_lab import benchmark, zoo
from bclip_lab.attacks import MarginLimitedAttack
from bclip_lab.clipping import ClippedModel
from bclip_lab.data.images import LabelledImages
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


def test_every_attack_of_a_set_is_judged_alone(quick: MMACConfig) -> None:
    checkpoint = zoo.load("x2x", device="cpu")
    splits = checkpoint.splits()
    splits = type(splits)(splits.train[:10], splits.defender, splits.calibration, splits.test[:300])
    row = run(benchmark.measure(checkpoint.model, splits, checkpoint.attack))
    assert len(row["each"]) == 3
    for when in ("before", "after"):
        parts = [part[when] for part in row["each"]]
        assert sum(part["triggered"] for part in parts) == row[when]["triggered"]
        hits = sum(part["asr"] * part["triggered"] for part in parts)
        assert hits == pytest.approx(row[when]["asr"] * row[when]["triggered"])


def test_the_table_of_attacks_says_what_each_row_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = {name: zoo.load(name) for name in zoo.list()}
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path))
    monkeypatch.setattr(zoo, "load", recorded.__getitem__)  # the cards stay where they are
    rates = {"acc": 0.9, "asr": 0.25, "ra": 0.5}
    for seed, asr in enumerate((0.1, 0.3)):
        row = {"before": rates, "after": rates | {"asr": asr}, "mmdf": {"auroc": 0.75, "tpr_at_fpr_0.01": 0.5}}
        benchmark.write(row | {"ra_ceiling": 0.625}, "mmac", f"patch-0-fit-{seed}")
    benchmark.write({"margins": [1, 2, 9], "p_value": 0.04, "attacked": True, "target": 2}, "mm-bd", "patch-0")
    lines = benchmark.tables()["attacks"].splitlines()
    assert len(lines) == 2 + sum(recipe.attack is not None for recipe in zoo.RECIPES.values())
    (line,) = (line for line in lines if line.startswith("| patch |"))
    assert line.split(" | ")[1:] == [
        ".900 / .250 / .500", "attacked, target 'yield'", "–", ".900 ± .000", ".200 ± .141", ".500 ± .000", ".625",
        ".750 ± .000", ".500 ± .000 |",
    ]  # fmt: skip


@pytest.mark.parametrize("name", benchmark.IMAGE_ATTACKS)
def test_attacks_on_own_images_poison_at_the_given_rate(name: str) -> None:
    images = LabelledImages(torch.rand(40, 3, 8, 8), torch.arange(40) % 4, tuple("abcd"))
    attack = benchmark.IMAGE_ATTACKS[name](4, 0.1)
    backdoor = attack.backdoor if isinstance(attack, MarginLimitedAttack) else attack
    assert int(backdoor.poison(images).poisoned.sum()) == 4
    assert len(attack.triggered(images)) == (40 if name == "all-to-all" else 30)


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
