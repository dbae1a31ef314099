"""The field on one page: every defence and detector on every checkpoint, measured cell by cell, and tables of it."""

from bclip_lab.benchmark.cells import (
    Cell,
    Shipped,
    Trained,
    current,
    found,
    judge_images,
    judge_model,
    key_of,
    measure,
    read,
    recipe_of,
    recorded,
    results_dir,
    write,
)
from bclip_lab.benchmark.grid import Grid, missing, run
from bclip_lab.benchmark.methods import DEFENCES, DETECTORS, IMAGE_ATTACKS, Defence, Detector
from bclip_lab.benchmark.tables import Paired, frame, latex, paired, spread, summary, tables, update_readme

__all__ = [
    "DEFENCES",
    "DETECTORS",
    "IMAGE_ATTACKS",
    "Cell",
    "Defence",
    "Detector",
    "Grid",
    "Paired",
    "Shipped",
    "Trained",
    "current",
    "found",
    "frame",
    "judge_images",
    "judge_model",
    "key_of",
    "latex",
    "measure",
    "missing",
    "paired",
    "read",
    "recipe_of",
    "recorded",
    "results_dir",
    "run",
    "spread",
    "summary",
    "tables",
    "update_readme",
    "write",
]
