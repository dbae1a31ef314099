"""Rows and tables: what is measured is what is written, and the README shows it."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bclip_lab import benchmark, zoo
from bclip_lab.attacks import MarginLimitedAttack
from bclip_lab.benchmark import Cell, Defence, Detector, Shipped, Trained
from bclip_lab.clipping import ClippedModel, abnormality
from bclip_lab.data.images import LabelledImages, TriggeredImages
from bclip_lab.defenses import MMACConfig, mmac
from bclip_lab.detection import MMDF
from bclip_lab.evaluation import evaluate, site_asr
from bclip_lab.margins import MaximumMarginConfig, classification_margins
from bclip_lab.models import logits
from bclip_lab.training import run


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> MMACConfig:
    """A defence of one epoch."""
    config = MMACConfig(epochs=1, synthetic=MaximumMarginConfig(per_class=1, steps=2), perturbation=0)
    fit = Defence(lambda model, clean, config: mmac(ClippedModel(model), clean, config), config)
    monkeypatch.setitem(benchmark.DEFENCES, "mmac", fit)
    return config


def recorded_row(cell: Cell, **measured: Any) -> dict[str, Any]:
    """A row of a cell, as if measured now."""
    return {"key": benchmark.key_of(cell.recipe), "seed": cell.seed, **measured, "recipe": cell.recipe}


def test_a_row_is_what_the_parts_measure(quick: MMACConfig) -> None:
    checkpoint = zoo.load("patch", device="cpu")
    splits = checkpoint.splits()
    splits = type(splits)(splits.train[:10], splits.defender, splits.calibration, splits.test[:300])
    clean = zoo.load("clean-0", device="cpu").model
    row = run(benchmark.measure(checkpoint.model, splits, checkpoint.attack, "mmac", 0, clean, explained=True))
    clipped = ClippedModel(checkpoint.model)
    step = run(mmac(clipped, splits.defender, quick))
    assert step.stand_ins is not None and checkpoint.attack is not None
    triggered = checkpoint.attack.triggered(splits.test)
    for when, model in (("before", checkpoint.model), ("after", clipped)):
        result = evaluate(model, splits.test, checkpoint.attack)
        margins = classification_margins(logits(model, triggered.images), triggered.targets)
        assert row["margins"]["triggered"][when][1] == pytest.approx(float(margins.median()), abs=0.05)
        assert row["margins"]["triggered"][when] == sorted(row["margins"]["triggered"][when])
        margins = classification_margins(logits(model, splits.test), splits.test.labels)
        assert row["margins"]["clean"][when][2] == pytest.approx(float(margins.quantile(0.9)), abs=1e-3)
        assert row[when] == {
            "acc": result.acc, "asr": result.asr, "ra": result.ra, "clean": 300, "triggered": result.triggered
        }  # fmt: skip
    detector = MMDF(clipped).fit(splits.calibration)
    assert row["mmdf"]["fpr"] == pytest.approx(float(detector.detect(splits.test).float().mean()))
    assert row["ra_ceiling"] == evaluate(clean, splits.test, checkpoint.attack).ra
    unclipped = ClippedModel(checkpoint.model)
    both = (unclipped.activations(images, quantiles=()) for images in (splits.test, triggered.images))
    largest = {site: float(ratios.max()) for site, ratios in abnormality(*both).items()}
    assert row["sites"] == {
        site: {"alone": asr.alone, "opened": asr.opened, "abnormality": largest[site]}
        for site, asr in site_asr(clipped, triggered).items()
    }
    np.testing.assert_allclose(row["stand_ins"]["rates"], step.stand_ins.rates, atol=5e-4)
    np.testing.assert_allclose(row["stand_ins"]["columns"], step.stand_ins.columns, atol=5e-4)
    assert [step["epoch"] for step in row["history"]] == [1]
    json.dumps(row, allow_nan=False)


def test_a_clean_model_has_neither_asr_nor_ceiling(quick: MMACConfig) -> None:
    checkpoint = zoo.load("clean-0", device="cpu")
    splits = checkpoint.splits()
    splits = type(splits)(splits.train[:10], splits.defender, splits.calibration, splits.test[:100])
    row = run(benchmark.measure(checkpoint.model, splits, None, explained=True))
    assert set(row["after"]) == {"acc", "clean", "triggered"} and "ra_ceiling" not in row
    assert set(row["mmdf"]) == {"nominal_fpr", "fpr"}
    assert set(row["margins"]) == {"clean"} and "sites" not in row


@pytest.mark.parametrize("method", ["nad", "mmdf"])
def test_only_fits_of_mmac_can_be_explained(method: str) -> None:
    with pytest.raises(ValueError, match=f"only fits of MMAC can be explained, got '{method}'"):
        Cell(Shipped("patch", 0), method, 0, explained=True)


def test_a_fit_that_cannot_be_explained_is_not_begun() -> None:
    checkpoint = zoo.load("patch", device="cpu")
    with pytest.raises(ValueError, match="only fits of MMAC can be explained, got 'nad'"):
        next(benchmark.measure(checkpoint.model, checkpoint.splits(), None, "nad", explained=True))


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
    on = Shipped("patch", 0)
    fits, verdict = [Cell(on, "mmac", seed) for seed in range(3)], Cell(on, "mm-bd", 0)
    recorded = {name: zoo.load(name) for name in zoo.list()}
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path))
    monkeypatch.setattr(zoo, "load", recorded.__getitem__)  # the cards stay where they are
    rates = {"acc": 0.9, "asr": 0.25, "ra": 0.5}
    for cell, asr in zip(fits, (0.1, 0.3, 0.9), strict=True):
        row = {"before": rates, "after": rates | {"asr": asr}, "mmdf": {"auroc": 0.75, "tpr_at_fpr_0.01": 0.5}}
        row = recorded_row(cell, ra_ceiling=0.625, **row)
        if asr == 0.9:  # measured under another default
            row["recipe"] = row["recipe"] | {"defence": row["recipe"]["defence"] | {"version": 0}}
            row["key"] = benchmark.key_of(row["recipe"])
        benchmark.write(row, *cell.file)
    said = {"margins": [1, 2, 9], "p_value": 0.04, "attacked": True, "target": 2}
    benchmark.write(recorded_row(verdict, **said), *verdict.file)
    lines = benchmark.tables()["attacks"].splitlines()
    assert len(lines) == 2 + sum(recipe.attack is not None for recipe in zoo.RECIPES.values())
    (line,) = (line for line in lines if line.startswith("| patch |"))
    assert line.split(" | ")[1:] == [
        ".900 / .250 / .500", "attacked, target 'yield'", "–", ".900 ± .000", ".200 ± .141", ".500 ± .000", ".625",
        ".750 ± .000", ".500 ± .000 |",
    ]  # fmt: skip


def test_the_table_of_sites_names_the_extremes_of_the_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = {name: zoo.load(name) for name in zoo.list()}
    cells = [Cell(Shipped("patch", 0), "mmac", seed, explained=True) for seed in (0, 1)]
    first = Cell(Shipped("patch", 0), "mmac", 0)
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path))
    monkeypatch.setattr(zoo, "load", recorded.__getitem__)
    # by one fit alone another site would be named than by the mean
    sites = {"relu": [(0.5, 0.3, 1.5), (0.3, 0.4, 1.5)], "relu_1": [(0.25, 0.9, 3.0), (0.75, 0.1, 3.0)]}
    for index, cell in enumerate(cells):
        told = {
            site: dict(zip(("alone", "opened", "abnormality"), fits[index], strict=True))
            for site, fits in sites.items()
        }
        margins = {"triggered": {"before": [1.0, 12.25, 20.0]}, "clean": {"before": [2.0, 7.5, 9.0]}}
        stand_ins = {"columns": [0.0, 0.25], "rates": [[0.0, 0.5], [0.125, 0.0]]}
        row = {"before": {"asr": 1.0}, "after": {"asr": 0.25}, "margins": margins, "stand_ins": stand_ins}
        benchmark.write(recorded_row(cell, sites=told, **row), *cell.file)
    benchmark.write(recorded_row(first, before={"asr": 1.0}, after={"asr": 0.125}), *first.file)
    header, _, line = benchmark.tables()["sites"].splitlines()
    assert header.count("|") == line.count("|")
    assert line.strip("| ").split(" | ") == [
        "patch", ".250 ± .000", "12.2", "7.5", "3.00 (relu_1)", ".40 (relu)", ".50 (relu_1)",
        ".250 ± .000", ".500 ± .000",
    ]  # fmt: skip


@pytest.mark.parametrize("name", benchmark.IMAGE_ATTACKS)
def test_attacks_on_own_images_poison_at_the_given_rate(name: str) -> None:
    images = LabelledImages(torch.rand(40, 3, 8, 8), torch.arange(40) % 4, tuple("abcd"))
    attack = benchmark.IMAGE_ATTACKS[name](4, 0.1)
    backdoor = attack.backdoor if isinstance(attack, MarginLimitedAttack) else attack
    assert int(backdoor.poison(images).poisoned.sum()) == 4
    assert len(attack.triggered(images)) == (40 if name == "all-to-all" else 30)


def test_rows_are_read_back_and_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Cell(Shipped("patch", 0), "mmac", 1)
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path))
    path = benchmark.write({"a": 1.5}, "mmac", "patch-0-fit-0")
    assert path == tmp_path / "results" / "mmac" / "patch-0-fit-0.json"
    assert benchmark.read("mmac", "patch-0-fit-0") == {"a": 1.5}
    assert benchmark.found("mmac", "patch-0-fit-*") == [], "nobody knows how it was measured"
    row = recorded_row(cell, a=2.5)
    benchmark.write(row, *cell.file)
    assert benchmark.found("mmac", "patch-0-fit-*") == [row]
    with pytest.raises(FileNotFoundError, match="patch-0-fit-2"):
        benchmark.read("mmac", "patch-0-fit-2")
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


# --- recipes ------------------------------------------------------------------------------------------------


def test_every_recorded_row_is_measured_by_the_recipe_of_today() -> None:
    stale = [
        f"{path.parent.name}/{path.stem}"
        for path in sorted(benchmark.results_dir().glob("*/*.json"))
        if not benchmark.current(benchmark.read(path.parent.name, path.stem))
    ]
    assert not stale, "run `python -m bclip_lab bench`"


def test_a_recipe_names_what_its_row_depends_on() -> None:
    recipe = Cell(Shipped("patch", 0), "mmac", 2).recipe
    assert recipe["checkpoint"]["sha256"] == zoo.load("patch").card["sha256"]
    assert recipe["ceiling"] == zoo.load("clean-0").card["sha256"]
    config = recipe["defence"]["config"]
    assert config == zoo.describe(MMACConfig(seed=2)) and config["synthetic"]["per_class"] == 5
    judged = Cell(Shipped("patch", 0), "mmdf", 2).recipe["detector"]
    assert judged["settings"] == {"null": "gaussian", "fpr": 0.005, "scale": None}
    assert judged["after"]["config"] == config, "MMDF rests on the bounds of MMAC"


def test_another_default_seed_checkpoint_or_version_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    def key() -> str:
        return benchmark.key_of(Cell(Shipped("patch", 0), "mmac", 0).recipe)

    first = key()
    keys = {first, benchmark.key_of(Cell(Shipped("patch", 0), "mmac", 1).recipe)}
    keys.add(benchmark.key_of(Cell(Shipped("face", 0), "mmac", 0).recipe))
    mine = benchmark.DEFENCES["mmac"]
    for other in (replace(mine, config=MMACConfig(epochs=26)), replace(mine, version=mine.version + 1)):
        monkeypatch.setitem(benchmark.DEFENCES, "mmac", other)
        keys.add(key())
    monkeypatch.setitem(benchmark.DEFENCES, "mmac", mine)
    assert len(keys) == 5 and key() == first


# --- judges -------------------------------------------------------------------------------------------------


class Brightness:
    """A detector with a known answer: the score is the mean of the first channel."""

    def __init__(self, model: torch.nn.Module, *, seed: int = 0) -> None:
        self.seed = seed

    def fit(self, clean: LabelledImages) -> "Brightness":
        self.scores_ = self.score(clean.images)
        return self

    def score(self, images: Any) -> torch.Tensor:
        images = images if isinstance(images, torch.Tensor) else images.images
        return images[:, 0].mean((1, 2))

    def threshold(self, fpr: float) -> float:
        return float(torch.quantile(self.scores_, 1 - fpr))


@dataclass(frozen=True)
class Bright:
    """An attack on two images that sets the first channel to the image's own value; the target is class 1."""

    values: tuple[float, float]

    def triggered(self, data: LabelledImages) -> TriggeredImages:
        images = data.images[:2].clone()
        images[:, 0] = torch.tensor(self.values)[:, None, None]
        return TriggeredImages(images, data.labels[:2], torch.ones(2, dtype=torch.int64), torch.arange(2), data.classes)


def test_a_detector_is_judged_over_all_and_over_the_successful_images() -> None:
    def grey(*values: float) -> LabelledImages:
        images = torch.tensor(values)[:, None, None, None].expand(-1, 3, 4, 4).clone()
        return LabelledImages(images, torch.zeros(len(values), dtype=torch.int64), ("a", "b"))

    class Decides(torch.nn.Module):
        """Class 1 where the first channel is above .7."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            bright = images[:, 0].mean((1, 2))
            return torch.stack([0.7 - bright, bright - 0.7], 1)

    calibration = grey(*(i / 200 for i in range(101)))  # 0 to .5: thresholds .495 and .475
    splits = SimpleNamespace(defender=grey(0.1), calibration=calibration, test=grey(0.2, 0.485, 0.5, 0.1))
    detector = Detector(Brightness)
    row = benchmark.judge_images(Decides(), splits, Bright((0.3, 0.9)), detector)  # type: ignore[arg-type]
    assert (row["clean"], row["triggered"], row["successful"]) == (4, 2, 1)
    assert row["auroc"] == (2 + 4) / 8 and row["auroc_successful"] == 1
    assert row["rates"]["0.01"] == pytest.approx(
        {"threshold": 0.495, "fpr": 1 / 4, "tpr": 1 / 2, "tpr_successful": 1}, rel=1e-5
    )
    assert row["rates"]["0.05"]["fpr"] == 2 / 4
    failed_attack = benchmark.judge_images(Decides(), splits, Bright((0.3, 0.6)), detector)  # type: ignore[arg-type]
    assert failed_attack["successful"] == 0 and "auroc_successful" not in failed_attack
    clean = benchmark.judge_images(Decides(), splits, None, detector)  # type: ignore[arg-type]
    assert "auroc" not in clean and clean["rates"]["0.01"]["fpr"] == 1 / 4


def test_a_detector_is_given_its_seed_and_a_defended_network() -> None:
    given: list[torch.nn.Module] = []

    class Keeps(Brightness):
        def __init__(self, model: torch.nn.Module, *, seed: int = 0) -> None:
            given.append(model)
            super().__init__(model, seed=seed)

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(32, 2))
    clean = LabelledImages(torch.rand(4, 3, 4, 4), torch.arange(4) % 2, ("a", "b"))
    assert Detector(Keeps)(model, clean, 7).seed == 7 and given[-1] is model
    clip = Defence(lambda model, clean, config: iter([SimpleNamespace(model=ClippedModel(model))]), MMACConfig())
    benchmark.DEFENCES["clip"] = clip
    try:
        Detector(Keeps, after="clip")(model, clean, 0)
    finally:
        del benchmark.DEFENCES["clip"]
    assert isinstance(given[-1], ClippedModel) and given[-1].original is model


def test_a_verdict_on_a_model_holds_numbers_and_leaves_pictures_out() -> None:
    class Judge:
        def __init__(self, model: torch.nn.Module) -> None:
            self.norms_ = torch.tensor([1.234, 5.0])
            self.masks_ = torch.zeros(2, 4, 4)
            self.anomaly_, self.attacked_, self.target_, self.note = np.float64(2.5), True, None, "no attribute of fit"

        def fit(self, clean: LabelledImages) -> "Judge":
            return self

    row = benchmark.judge_model(torch.nn.Identity(), None, Detector(Judge, judges="models"))  # type: ignore[arg-type]
    assert row == {"norms": [1.23, 5.0], "anomaly": 2.5, "attacked": True, "target": None}
    json.dumps(row)


# --- frames -------------------------------------------------------------------------------------------------


def cells_of(asr: dict[str, dict[str, list[float]]]) -> pd.DataFrame:
    """A frame of methods, checkpoints and their ASR over the seeds."""
    return benchmark.frame(
        {
            "seed": seed,
            "after": {"acc": 0.5, "asr": value, "ra": 1 - value},
            "before": {"acc": 0.9, "asr": 1.0, "ra": 0.0},
            "recipe": {
                "data": "noise", "checkpoint": {"name": name, "training_seed": 0}, "seed": seed,
                "defence": {"name": method},
            },
        }
        for method, checkpoints in asr.items()
        for name, values in checkpoints.items()
        for seed, value in enumerate(values)
    )  # fmt: skip


ASR = {
    "a": {"patch": [0.1, 0.3], "warp": [0.6], "face": [0.5]},
    "b": {"patch": [0.5], "warp": [0.7, 0.9]},
}


def test_a_frame_has_a_line_a_cell_and_tells_what_failed() -> None:
    cells = cells_of(ASR)
    assert cells[["method", "checkpoint", "seed", "asr"]].values.tolist() == [
        ["a", "patch", 0, 0.1], ["a", "patch", 1, 0.3], ["a", "warp", 0, 0.6], ["a", "face", 0, 0.5],
        ["b", "patch", 0, 0.5], ["b", "warp", 0, 0.7], ["b", "warp", 1, 0.9],
    ]  # fmt: skip
    assert cells["ra"].tolist() == [1 - asr for asr in cells["asr"]] and (cells["asr_before"] == 1).all()
    assert not cells["current"].any() and cells["error"].isna().all()
    recipe = Cell(Shipped("patch", 0), "mmdf", 1).recipe
    rates = {"0.01": {"fpr": 0.02, "tpr": 0.5}, "0.05": {"fpr": 0.04, "tpr": 0.75, "tpr_successful": 1.0}}
    rows = [
        {"key": benchmark.key_of(recipe), "auroc": 0.8, "rates": rates, "seconds": 3.0, "recipe": recipe},
        {"key": benchmark.key_of(recipe), "error": "RuntimeError: lost", "recipe": recipe},
    ]
    judged, lost = benchmark.frame(rows).to_dict("records")
    assert (judged["method"], judged["seed"], judged["auroc"], judged["seconds"]) == ("mmdf", 1, 0.8, 3.0)
    assert (judged["fpr_at_0.01"], judged["tpr_at_0.05"], judged["tpr_successful_at_0.05"]) == (0.02, 0.75, 1.0)
    assert judged["current"] and lost["error"] == "RuntimeError: lost"
    with pytest.raises(ValueError, match="recipes"):
        benchmark.frame([{"seed": 0}])


def test_a_pair_is_a_checkpoint_and_counts_once() -> None:
    pair = benchmark.paired(cells_of(ASR), "a", "b")
    assert pair.differences == pytest.approx((0.2 - 0.5, 0.6 - 0.8)) and pair.mean == pytest.approx(-0.25)
    assert (pair.low, pair.high) == pytest.approx((-0.3, -0.2)), "two checkpoints: the interval is their range"
    assert "ASR, a - b: -0.250" in repr(pair) and "2 checkpoints" in repr(pair)
    with pytest.raises(ValueError, match="no checkpoint in common"):
        benchmark.paired(cells_of({"a": {"patch": [0]}, "b": {"warp": [0]}}), "a", "b")
    with pytest.raises(ValueError, match="measure must be a column"):
        benchmark.paired(cells_of(ASR), "a", "b", "magic")


@settings(max_examples=15)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.lists(st.floats(0, 1), min_size=2, max_size=8))
def test_a_difference_turns_round_with_its_pair(first: list[float], second: list[float]) -> None:
    cells = cells_of(
        {
            "a": {f"checkpoint {i}": [value] for i, value in enumerate(first)},
            "b": {f"checkpoint {i}": [value] for i, value in enumerate(second)},
        }
    )
    there, back = benchmark.paired(cells, "a", "b"), benchmark.paired(cells, "b", "a")
    assert there.mean == pytest.approx(-back.mean)
    assert len(there.differences) == min(len(first), len(second))
    assert min(there.differences) - 1e-12 <= there.low <= there.mean + 1e-12
    assert there.mean - 1e-12 <= there.high <= max(there.differences) + 1e-12


def test_a_summary_over_seeds_and_over_checkpoints() -> None:
    by_checkpoint = benchmark.summary(cells_of(ASR)).set_index(["method", "checkpoint"])
    assert by_checkpoint.loc[("a", "patch"), ["mean", "low", "high", "cells"]].tolist() == pytest.approx(
        [0.2, 0.1, 0.3, 2]
    )
    assert np.isnan(by_checkpoint.loc[("a", "warp"), "low"]), "one seed has no interval"
    by_method = benchmark.summary(cells_of(ASR), "asr", ("method",)).set_index("method")
    assert by_method["mean"].to_dict() == pytest.approx({"a": (0.2 + 0.6 + 0.5) / 3, "b": (0.5 + 0.8) / 2})
    assert by_method["cells"].to_dict() == {"a": 3, "b": 2}
    values = [0.0, 1.0] * 50
    many = benchmark.summary(cells_of({"a": {f"c{i}": [v] for i, v in enumerate(values)}}), "asr", ("method",))
    # the standard error of 100 coin tosses is .05
    assert many[["low", "high"]].values[0] == pytest.approx([0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05], abs=0.01)
    with pytest.raises(ValueError, match="level"):
        benchmark.summary(cells_of(ASR), level=95)


def test_latex_has_a_line_a_checkpoint_and_escapes_names() -> None:
    text = benchmark.latex(cells_of({"a_b": {"50 %": [0.25, 0.75]}, "c": {"50 %": [0.5], "warp": [0.125]}}))
    assert r"noise & 50 \% & 0 & .500 $\pm$ .354 & .500 \\" in text
    assert r"noise & warp & 0 & -- & .125 \\" in text and r"a\_b" in text
    with pytest.raises(ValueError, match="no cell has the measure 'auroc'"):
        benchmark.latex(cells_of(ASR), "auroc")


def test_a_failed_cell_is_counted_in_the_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = [Cell(Shipped("patch", 0), "mmac", seed) for seed in range(2)]
    recorded = {name: zoo.load(name) for name in zoo.list()}
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path))
    monkeypatch.setattr(zoo, "load", recorded.__getitem__)
    rates = {"acc": 0.9, "asr": 0.25, "ra": 0.5}
    benchmark.write(recorded_row(fits[0], before=rates, after=rates, mmdf={}), *fits[0].file)
    benchmark.write(recorded_row(fits[1], error="RuntimeError: lost"), *fits[1].file)
    made = benchmark.tables()
    assert "| patch (1 of 2 failed) | .900 / .250 / .500 | .900 | .250 | .500 |" in made["mmac"]
    assert "| patch | .900 / .250 (1 of 2 failed) |" in made["peers"]
    assert [row["seed"] for row in benchmark.found("mmac", "*")] == [0]
    assert [row["seed"] for row in benchmark.recorded("mmac", "*")] == [0, 1]


def test_tables_compare_what_was_measured_on_own_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCLIP_LAB_DATA", str(tmp_path))
    monkeypatch.setattr(zoo, "list", list)  # no checkpoint: their cards are not there
    monkeypatch.setattr(Trained, "_splits", lambda self: SimpleNamespace(classes=tuple("0123456789")))
    patch, warp = (Trained(images="cifar10", path="", attack=attack) for attack in ("patch", "warp"))
    for on, method, auroc in ((patch, "strip", 0.25), (patch, "teco", 0.5), (warp, "teco", 0.75)):
        cell = Cell(on, method, 0)
        benchmark.write(recorded_row(cell, auroc=auroc, auroc_successful=1.0), *cell.file)
    lines = benchmark.tables()["cifar10-detectors"].splitlines()
    assert [line for line in lines if "---" not in line] == [
        "| attack | strip | teco |",
        "| patch | .250 / 1.000 | .500 / 1.000 |",
        "| warp | – | .750 / 1.000 |",
    ]
    assert benchmark.tables()["detectors"].splitlines()[0] == "| attack |"
