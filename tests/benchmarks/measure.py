"""What the benchmarks share: the budget, seconds of a fresh process, and the exponent of a growth curve."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
# As for the notebooks: on the small budget the long yardsticks are timed in part and extrapolated, curves are short.
SMALL = os.environ.get("BCLIP_LAB_BUDGET") == "small"


def fresh(code: str, **environment: str) -> list[float]:
    """The numbers that the last line of `code` prints, run by a new interpreter."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [float(number) for number in run.stdout.splitlines()[-1].split()]


def growth(sizes: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Exponent p and factor b of seconds = fixed + b * (size - smallest)**p, over the top eightfold of the range.

    Sizes and seconds both count from the smallest size, which takes the fixed cost out without guessing it: where time
    is fixed + b * size, p is 1.

    >>> sizes = [1, 4, 8, 16, 32]
    >>> exponent, factor = growth(sizes, [5 + 0.5 * n for n in sizes])
    >>> round(exponent, 6), round(factor, 6)
    (1.0, 0.5)
    """
    size, above = np.array(sizes[1:]) - sizes[0], np.array(seconds[1:]) - seconds[0]
    top = (np.array(sizes[1:]) * 8 >= sizes[-1]) & (above > 0)
    exponent, offset = np.polyfit(np.log(size[top]), np.log(above[top]), 1)
    return float(exponent), float(np.exp(offset))
