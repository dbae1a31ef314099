"""One honest row: a model under a defence, measured and written down; and the tables made of such rows.

A row is a function of data, attack, checkpoint, defence and seed alone, and is stored as one JSON file.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bclip_lab import zoo
from bclip_lab.attacks import (
    AllToAll,
    AllToOne,
    AttackSet,
    BackdoorAttack,
    BlendedTrigger,
    Cover,
    MarginLimitedAttack,
    PatchTrigger,
    WarpTrigger,
)
from bclip_lab.clipping import ClippedModel
from bclip_lab.data.files import data_dir, write_bytes
from bclip_lab.data.images import Attack, LabelledImages, Splits
from bclip_lab.data.signs import SIGN_CLASSES
from bclip_lab.defenses import MMACConfig, MMBMConfig, mmac, mmbm
from bclip_lab.detection import MMBD, MMDF
from bclip_lab.evaluation import RocCurve, evaluate

__all__ = [
    "DEFENCES",
    "IMAGE_ATTACKS",
    "judge_model",
    "measure",
    "read",
    "results_dir",
    "spread",
    "tables",
    "update_readme",
    "write",
]

_TPR = "tpr_at_fpr_0.01"

Fit = Callable[[ClippedModel, LabelledImages, int], Iterator[Any]]

# The stem's and the first two stages' last activations of a lab ResNet, as the authors' code bounds them (MM-BM).
_EARLY = ("relu", "stages.0.0.relu_1", "stages.1.0.relu_1")

DEFENCES: dict[str, Fit] = {
    "mmac": lambda clipped, clean, seed: mmac(clipped, clean, MMACConfig(seed=seed)),
    "mmac-published": lambda clipped, clean, seed: mmac(clipped, clean, MMACConfig.published(seed=seed)),
    "mm-bm": lambda clipped, clean, seed: mmbm(clipped, clean, MMBMConfig(sites=_EARLY, seed=seed)),
}


_FIRST = AllToOne(target=0)
_WARP, _NOISY_WARP = WarpTrigger(strength=1.0), WarpTrigger(strength=1.0, noise=2.0)

# Attacks on one's own images: of the number of classes and the poison rate.
IMAGE_ATTACKS: dict[str, Callable[[int, float], BackdoorAttack | MarginLimitedAttack]] = {
    "patch": lambda classes, rate: BackdoorAttack(PatchTrigger(), _FIRST, rate),
    "blended": lambda classes, rate: BackdoorAttack(BlendedTrigger(), _FIRST, rate),
    "all-to-all": lambda classes, rate: BackdoorAttack(PatchTrigger(), AllToAll(classes), rate),
    "warp": lambda classes, rate: BackdoorAttack(_WARP, _FIRST, rate, cover=Cover(2 * rate, _NOISY_WARP)),
    "margin-limited": lambda classes, rate: MarginLimitedAttack(BackdoorAttack(PatchTrigger(), _FIRST, rate)),
}


def results_dir() -> Path:
    """Where rows are kept: `results/` in the data folder."""
    return data_dir() / "results"


def measure(
    model: nn.Module,
    splits: Splits,
    attack: Attack | None,
    defence: str = "mmac",
    seed: int = 0,
    clean_model: nn.Module | None = None,
) -> Iterator[dict[str, Any]]:
    """Fit a defence on the defender's images, calibrate MMDF, and judge both on the test images.

    Yields an empty record after every epoch of the fit, so that a caller can show progress, and at last the row:
    ACC, ASR, RA before and after; RA's ceiling (the accuracy of `clean_model` on the same triggered images);
    MMDF's AUROC, its TPR and FPR at the Gaussian threshold, and its accuracy on triggered images after
    correction; for every attack of an `AttackSet` ACC, ASR and RA before and after; the seconds of the fit; and the
    fit's history.

    Raises
    ------
    ValueError
        An unknown defence.
    """
    if defence not in DEFENCES:
        raise ValueError(f"defence must be one of {', '.join(DEFENCES)}, got {defence!r}")
    row: dict[str, Any] = {
        "defence": defence,
        "seed": seed,
        "before": _plain(evaluate(model, splits.test, attack)),
    }
    clipped = ClippedModel(model)
    history: list[dict[str, float]] = []
    start = time.perf_counter()
    for step in DEFENCES[defence](clipped, splits.defender, seed):
        history.append({k: v for k, v in vars(step).items() if isinstance(v, (int, float)) and math.isfinite(v)})
        yield {}
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["history"] = history
    row["after"] = _plain(evaluate(clipped, splits.test, attack))
    if isinstance(attack, AttackSet):
        judged = {"before": model, "after": clipped}
        row["each"] = [
            {when: _plain(evaluate(judge, splits.test, part)) for when, judge in judged.items()}
            for part in attack.attacks
        ]
    detector = MMDF(clipped).fit(splits.calibration)
    clean_scores = detector.score(splits.test)
    row["mmdf"] = {
        "nominal_fpr": detector.fpr,
        "fpr": float((clean_scores > detector.threshold_).float().mean()),
    }
    if attack is not None:
        triggered = attack.triggered(splits.test)
        decisions = detector.decide(triggered.images)
        curve = RocCurve(clean_scores, decisions.score)
        row["mmdf"] |= {
            "auroc": curve.auroc,
            "tpr": curve.rates_at(detector.threshold_)[1],
            _TPR: curve.tpr_at(0.01),
            "ra_corrected": float((decisions.corrected == triggered.true_labels.cpu()).float().mean()),
        }
        if clean_model is not None:
            row["ra_ceiling"] = evaluate(clean_model, splits.test, attack).ra
    row["machine"] = {"torch": torch.__version__, "processor": platform.machine(), "cores": os.cpu_count()}
    yield row


def _plain(value: Any) -> dict[str, float]:
    """An evaluation as JSON holds it: what is nan is left out."""
    return {k: v for k, v in asdict(value).items() if math.isfinite(v)}


def judge_model(model: nn.Module, clean: LabelledImages) -> dict[str, Any]:
    """MM-BD's verdict, as JSON holds it."""
    verdict = MMBD(model).fit(clean)
    return {
        "margins": [round(float(m), 2) for m in verdict.margins_],
        "p_value": verdict.p_value_,
        "attacked": bool(verdict.attacked_),
        "target": verdict.target_,
    }


def write(row: dict[str, Any], *name: str) -> Path:
    """Write a row to `results/NAME/NAME/....json`, whole or not at all."""
    path = results_dir().joinpath(*name[:-1], f"{name[-1]}.json")
    write_bytes(path, (json.dumps(row, indent=1, allow_nan=False) + "\n").encode())
    return path


def read(*name: str) -> dict[str, Any]:
    """Read a row that `write` wrote.

    Raises `FileNotFoundError` where it is missing, and `ValueError` where it is not JSON.
    """
    path = results_dir().joinpath(*name[:-1], f"{name[-1]}.json")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; `python -m bclip_lab evaluate` writes it")
    try:
        row: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    return row


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation as a table shows them.

    Examples
    --------
    >>> spread([0.5, 0.6, 0.7]), spread([0.5])
    ('.600 ± .100', '.500')
    """
    text = f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")
    return text.replace("0.", ".").replace("-.", "−.")


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([_row(*header), _row(*["---"] * len(header)), *(_row(*cells) for cells in rows)])


def _cell(rows: Sequence[dict[str, Any]], *path: str) -> str:
    """Mean and spread over rows of the value at a path of keys; a dash where the rows have none."""
    values = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            values.append(float(value))
    return spread(values) if values else "–"


def _defended(label: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    before = " / ".join(_cell(rows[:1], "before", metric) for metric in ("acc", "asr", "ra"))
    after = [_cell(rows, "after", metric) for metric in ("acc", "asr", "ra")]
    detector = [_cell(rows, "mmdf", metric) for metric in ("auroc", "tpr", "fpr")]
    return [label, before, *after, _cell(rows[:1], "ra_ceiling"), *detector]


_HEADER = (
    "model", "before: ACC / ASR / RA", "ACC", "ASR", "RA", "ceiling of RA", "MMDF AUROC", "TPR", "FPR (nominal .005)"
)  # fmt: skip


def tables() -> dict[str, str]:
    """The README's tables, in Markdown, from the recorded rows and the cards of the zoo."""
    made = {}
    cards = {name: zoo.load(name).card for name in zoo.list()}
    made["zoo"] = _grid(
        ("checkpoint", "ACC", "ASR", "RA", "three training seeds: ACC", "ASR", "RA"),
        [
            [name, *(_cell([card["metrics"]], metric) for metric in ("acc", "asr", "ra"))]
            + [
                spread_of(card["training_seeds"].get(metric)) if len(zoo.RECIPES[name].seeds) > 1 else "–"
                for metric in ("acc", "asr", "ra")
            ]
            for name, card in cards.items()
        ],
    )
    for defence in DEFENCES:
        shipped, trained = [], []
        for name, recipe in zoo.RECIPES.items():
            fits = found(defence, f"{name}-{recipe.seeds[0]}-fit-*")
            if fits:
                shipped.append(_defended(name, fits))
            others = [row for seed in recipe.seeds for row in found(defence, f"{name}-{seed}-fit-0")]
            if len(others) > 1:
                trained.append(_defended(name, others))
        made[defence] = _grid(_HEADER, shipped)
        made[f"{defence}-training-seeds"] = _grid(_HEADER, trained)
    verdicts = [
        _verdict(name, row)
        for name, recipe in zoo.RECIPES.items()
        for row in found("mm-bd", f"{name}-{recipe.seeds[0]}")
    ]
    made["mm-bd"] = _grid(("model", "margin of the largest class", "the other classes", "p", "verdict"), verdicts)
    made["attacks"] = _grid(_ATTACKS_HEADER, [_attacked(name) for name in zoo.RECIPES if zoo.RECIPES[name].attack])
    for images in ("cifar10",):
        rows = []
        for attack in IMAGE_ATTACKS:
            for defence in DEFENCES:
                if fits := found(images, f"{attack}-{defence}-fit-*"):
                    rows.append([*_defended(f"{attack}, {defence}", fits), _seconds(fits)])
        made[images] = _grid((*_HEADER, "seconds: training, fit"), rows)
    return made


_ATTACKS_HEADER = (
    "attack", "before: ACC / ASR / RA", "MM-BD", "published: ACC / ASR / RA", "default: ACC", "ASR", "RA",
    "ceiling of RA", "MMDF AUROC", "TPR at FPR .01",
)  # fmt: skip


def _attacked(name: str) -> list[str]:
    """A shipped checkpoint's row in the table of attacks."""
    seed = zoo.RECIPES[name].seeds[0]
    default, published = (found(defence, f"{name}-{seed}-fit-*") for defence in ("mmac", "mmac-published"))
    verdict = found("mm-bd", f"{name}-{seed}")
    before, after = (
        " / ".join(_cell(rows, when, metric) for metric in ("acc", "asr", "ra"))
        for rows, when in ((default[:1], "before"), (published, "after"))
    )
    cells = [name, before, _verdict(name, verdict[0])[-1] if verdict else "–", after if published else "–"]
    cells += [_cell(default, "after", metric) for metric in ("acc", "asr", "ra")]
    return [*cells, _cell(default[:1], "ra_ceiling"), _cell(default, "mmdf", "auroc"), _cell(default, "mmdf", _TPR)]


def found(folder: str, pattern: str) -> list[dict[str, Any]]:
    """The recorded rows whose names fit a pattern, in order of name."""
    return [read(folder, path.stem) for path in sorted((results_dir() / folder).glob(f"{pattern}.json"))]


def spread_of(recorded: dict[str, float] | None) -> str:
    """Mean and standard deviation as a card records them."""
    if recorded is None:
        return "–"
    return f"{recorded['mean']:.3f} ± {recorded['standard_deviation']:.3f}".replace("0.", ".")


def _seconds(rows: Sequence[dict[str, Any]]) -> str:
    fit = np.mean([row["seconds"] for row in rows])
    return f"{rows[0]['training_seconds']['attacked']:.0f}, {fit:.0f}"


def _verdict(name: str, row: dict[str, Any]) -> list[str]:
    margins = sorted(row["margins"])
    said = f"attacked, target {SIGN_CLASSES[row['target']]!r}" if row["attacked"] else "not attacked"
    p = f"{row['p_value']:.1g}" if row["p_value"] < 0.01 else f"{row['p_value']:.2f}"
    return [name, f"{margins[-1]:.0f}", f"{margins[0]:.0f} to {margins[-2]:.0f}", p, said]


def update_readme(path: Path) -> list[str]:
    """Put the tables into a Markdown file, between `<!-- table NAME -->` and `<!-- end -->`; their names are returned.

    Raises `ValueError` where the file names a table that is not made.
    """
    text = path.read_text()
    made = tables()
    names = re.findall(r"<!-- table (\S+) -->", text)
    if unknown := [name for name in names if name not in made]:
        raise ValueError(f"{path} names the tables {unknown}; there are {', '.join(made)}")
    text = re.sub(
        r"(<!-- table (\S+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{made[match[2]]}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )
    write_bytes(path, text.encode())
    return names
