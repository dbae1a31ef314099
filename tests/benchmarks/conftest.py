"""The table of medians and ratios at the end of `make bench`, the same in its JSON, and the picture of the curves."""

import statistics
from collections.abc import Callable
from typing import Any

import matplotlib
import pytest
from benchmarks.measure import RESULTS, SMALL
from pytest_benchmark.fixture import BenchmarkFixture

matplotlib.use("Agg")

ROWS: list[dict[str, Any]] = []
CURVES: list[dict[str, Any]] = []


@pytest.fixture
def measure(benchmark: BenchmarkFixture) -> Callable[..., Any]:
    """Time a function, enter its median into the table, and give back what it returned last.

    `seconds` of the result, where a benchmark takes them itself (of a fresh process, or extrapolated), stand for the
    seconds of the calls. What `notes` names is printed and stored beside the median.
    """

    def run(
        group: str, name: str, function: Callable[[], Any], *, rounds: int = 1, warm: bool = False,
        seconds: Callable[[Any], float] | None = None, setup: Callable[[], None] | None = None,
        notes: Callable[[Any], dict[str, Any]] | None = None,
    ) -> Any:  # fmt: skip
        results = []
        benchmark.group = group
        benchmark.name = name
        benchmark.pedantic(
            lambda: results.append(function()), setup=setup, rounds=rounds, iterations=1, warmup_rounds=int(warm)
        )
        results = results[-rounds:]
        own = benchmark.stats.stats.data if seconds is None else [seconds(result) for result in results]
        row = {"group": group, "name": name, "median": statistics.median(own), "seconds": list(own)}
        first = next((other for other in ROWS if other["group"] == group), row)
        row["ratio"] = row["median"] / first["median"]
        row["notes"] = notes(results) if notes else {}
        benchmark.extra_info.update(row)
        ROWS.append(row)
        return results[-1]

    return run


@pytest.fixture
def draw_curve() -> Callable[..., None]:
    """Put a growth curve into the picture."""
    return lambda **curve: CURVES.append(curve)


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    output_json["bclip_lab"] = {"budget": "small" if SMALL else "full", "rows": ROWS, "curves": CURVES}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if ROWS:
        terminalreporter.section(f"medians and ratios, {'small' if SMALL else 'full'} budget")
        for group in dict.fromkeys(row["group"] for row in ROWS):
            terminalreporter.line(f"{group:<58} {'seconds':>9} {'ratio':>8}")
            for row in ROWS:
                if row["group"] == group:
                    notes = "  ".join(f"{name} {value}" for name, value in row["notes"].items())
                    line = f"  {row['name']:<56} {row['median']:9.3f} {row['ratio']:8.2f}  {notes}"
                    terminalreporter.line(line.rstrip())
    if CURVES:
        terminalreporter.line(f"growth curves: {draw(CURVES)}")


def draw(curves: list[dict[str, Any]]) -> str:
    """Seconds against sizes, one panel a curve, with the fitted power law. Gives the path of the picture."""
    import numpy as np
    import seaborn as sns
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * len(curves), 3.2), layout="constrained")
    palette = sns.color_palette("colorblind")
    for axes, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        sizes, seconds = np.array(curve["sizes"]), np.array(curve["seconds"])
        line = np.linspace(sizes[0], sizes[-1], 100)
        fitted = seconds[0] + curve["factor"] * (line - sizes[0]) ** curve["exponent"]
        axes.plot(line, fitted, color=palette[7], label="fixed cost + power law")
        axes.plot(sizes, seconds, "o", color=palette[0], label="measured")
        axes.set(xlabel=curve["label"], title=f"exponent {curve['exponent']:.2f}", xlim=(0, None), ylim=(0, None))
        sns.despine(ax=axes)
    figure.axes[0].set_ylabel("seconds of a fit")
    figure.axes[0].legend(frameon=False, loc="lower right")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "growth.png"
    figure.savefig(path, dpi=150)
    return str(path)
