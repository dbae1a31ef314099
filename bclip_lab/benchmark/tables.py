"""Tables of rows: a tidy frame, intervals and paired differences, LaTeX, and the README's Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bclip_lab import zoo
from bclip_lab.benchmark.cells import FPRS, Row, current, found, recorded
from bclip_lab.benchmark.methods import DEFENCES, DETECTORS, IMAGE_ATTACKS
from bclip_lab.data.files import write_bytes
from bclip_lab.data.signs import SIGN_CLASSES

if TYPE_CHECKING:
    import pandas as pd  # slow to import, so inside the functions that need it

__all__ = ["Paired", "frame", "latex", "paired", "spread", "summary", "tables", "update_readme"]

_TPR = "tpr_at_fpr_0.01"
_RESAMPLES = 9999
_UNIT = ["data", "checkpoint", "training_seed"]


# --- frames -------------------------------------------------------------------------------------------------


def frame(rows: Iterable[Row]) -> pd.DataFrame:
    """One line a cell, one column a measure; NaN where a cell has no such measure.

    The columns: `data`, `checkpoint`, `training_seed`, `method`, `seed`; `error`, None unless it failed; `current`,
    whether it was measured by today's recipe; of defences `acc_before`, `asr_before`, `ra_before`, `acc`, `asr`, `ra`
    and `ra_ceiling`; of detectors of images `auroc` and `auroc_successful`, and at each nominal rate `fpr_at_0.01`,
    `tpr_at_0.01`, `tpr_successful_at_0.01`; of detectors of models `p_value` and `attacked`; `seconds` and `memory`
    (2**20 bytes) of the fit.

    Raises `ValueError` for a row without a recipe.

    Examples
    --------
    >>> rows = found("mmac", "patch-0-fit-*")
    >>> frame(rows)[["checkpoint", "method", "seed"]].values.tolist()
    [['patch', 'mmac', 0], ['patch', 'mmac', 1], ['patch', 'mmac', 2]]
    """
    import pandas as pd

    metrics = ("acc", "asr", "ra")
    columns = [*_UNIT, "method", "seed", "error", "current", *(f"{metric}_before" for metric in metrics), *metrics]
    columns += ["ra_ceiling", "auroc", "auroc_successful"]
    rates = [(f"{name}_at_{fpr}", str(fpr), name) for fpr in FPRS for name in ("fpr", "tpr", "tpr_successful")]
    columns += [*(name for name, _, _ in rates), "p_value", "attacked", "seconds", "memory"]
    lines = []
    for row in rows:
        recipe = row.get("recipe")
        if recipe is None:
            raise ValueError(f"rows must hold the recipes they were measured by, got one with {sorted(row)}")
        line = {name: row[name] for name in columns if name in row}
        line |= {"data": recipe["data"], "checkpoint": recipe["checkpoint"]["name"], "current": current(row)}
        line |= {"training_seed": recipe["checkpoint"]["training_seed"], "seed": recipe["seed"]}
        line["method"] = recipe.get("defence", recipe.get("detector"))["name"]
        for when, ending in (("before", "_before"), ("after", "")):
            line |= {metric + ending: row[when][metric] for metric in metrics if metric in row.get(when, {})}
        line |= {
            name: row["rates"][fpr][rate] for name, fpr, rate in rates if rate in row.get("rates", {}).get(fpr, {})
        }
        lines.append(line)
    return pd.DataFrame(lines, columns=columns)


def _interval(values: ArrayLike, level: float, seed: int) -> tuple[float, float]:
    """Percentile bootstrap of the mean; NaN for fewer than two values."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float("nan"), float("nan")
    means = np.random.default_rng(seed).choice(values, (_RESAMPLES, len(values))).mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def summary(
    cells: pd.DataFrame,
    measure: str = "asr",
    by: Sequence[str] = ("data", "checkpoint", "training_seed", "method"),
    *,
    level: float = 0.95,
    seed: int = 0,
) -> pd.DataFrame:
    """Mean of a measure with its percentile bootstrap interval: columns `by`, `mean`, `low`, `high`, `cells`.

    By checkpoint (the default) what is drawn again is the seeds. Three seeds have only ten different means: such an
    interval shows their range and no more. Otherwise, as by `("method",)`, a checkpoint counts once, as the mean over
    its seeds, and what is drawn again is the checkpoints.

    Parameters
    ----------
    cells
        As `frame` makes it; cells that have no such measure are left out.
    measure
        One of its columns of numbers.
    level
        Coverage of the interval, in (0, 1).
    seed
        Of the bootstrap, 9,999 times.

    Raises
    ------
    ValueError
        No such column, or a level outside (0, 1).
    """
    import pandas as pd

    known = _known(cells, measure, level)
    if "checkpoint" not in by:
        known = known.groupby(list(dict.fromkeys([*by, *_UNIT])), sort=False)[measure].mean().reset_index()
    lines = []
    for names, group in known.groupby(list(by), sort=False):
        low, high = _interval(group[measure], level, seed)
        lines.append((*names, group[measure].mean(), low, high, len(group)))
    return pd.DataFrame(lines, columns=[*by, "mean", "low", "high", "cells"])


def _known(cells: pd.DataFrame, measure: str, level: float) -> pd.DataFrame:
    """The cells that have a measure, as a number."""
    if measure not in cells:
        raise ValueError(f"measure must be a column of cells ({', '.join(map(str, cells))}), got {measure!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    return cells.dropna(subset=[measure]).astype({measure: float})


@dataclass(frozen=True)
class Paired:
    """`first` minus `second` on the same checkpoints: the mean difference of a measure, with its interval.

    `differences` is one number a checkpoint, over the seeds' means.
    """

    first: str
    second: str
    measure: str
    mean: float
    low: float
    high: float
    differences: tuple[float, ...]

    def __repr__(self) -> str:
        return (
            f"Paired({self.measure.upper()}, {self.first} - {self.second}: {self.mean:+.3f} "
            f"[{self.low:+.3f}, {self.high:+.3f}] over {len(self.differences)} checkpoints)"
        )


def paired(
    cells: pd.DataFrame, first: str, second: str, measure: str = "asr", *, level: float = 0.95, seed: int = 0
) -> Paired:
    """How much one method is above another, checkpoint by checkpoint, with a percentile bootstrap interval.

    A pair is a checkpoint that both were measured on; each counts as the mean over its seeds, since the seeds of two
    methods have nothing in common. The checkpoints are drawn again: the interval is for other attacks such as these.

    Raises
    ------
    ValueError
        No checkpoint that both have, no such column, or a level outside (0, 1).

    Examples
    --------
    >>> rows = [row for name in ("mmac", "mm-bm") for row in found(name, "patch-0-fit-*")]
    >>> difference = paired(frame(rows), "mmac", "mm-bm", "acc")
    >>> len(difference.differences)
    1
    """
    known = _known(cells, measure, level)
    means = {
        method: known[known["method"] == method].groupby(_UNIT, sort=False)[measure].mean()
        for method in (first, second)
    }
    differences = (means[first] - means[second]).dropna()
    if differences.empty:
        raise ValueError(f"{first!r} and {second!r} have no checkpoint in common on which {measure} is known")
    low, high = _interval(differences, level, seed)
    return Paired(first, second, measure, float(differences.mean()), low, high, tuple(differences.tolist()))


def latex(cells: pd.DataFrame, measure: str = "asr") -> str:
    """A table for a paper (booktabs): checkpoints x methods, mean and standard deviation over the seeds.

    Raises `ValueError` where no cell has the measure.

    Examples
    --------
    >>> print(latex(frame(found("mm-bm", "patch-0-fit-0")), "acc").splitlines()[4])
    signs & patch & 0 & .945 \\\\
    """
    known = _known(cells, measure, 0.5)
    if known.empty:
        raise ValueError(f"no cell has the measure {measure!r}")
    text = known.groupby([*_UNIT, "method"], sort=False)[measure].agg(
        lambda values: spread(values.tolist()).replace("±", r"$\pm$").replace("−", "$-$")
    )
    table = text.unstack("method", fill_value="--").reset_index().astype(str)
    escaped = table.rename(columns=_escape).map(lambda cell: cell if "$" in cell else _escape(cell))
    made: str = escaped.to_latex(index=False)
    return made


def _escape(text: str) -> str:
    return text.replace("_", r"\_").replace("%", r"\%").replace("&", r"\&")


# --- Markdown -----------------------------------------------------------------------------------------------


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


def _cell(rows: Sequence[Row], *path: str) -> str:
    """Mean and spread over rows of the value at a path of keys; a dash where the rows have none."""
    values = []
    for row in rows:
        value: Any = row
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            values.append(float(value))
    return spread(values) if values else "–"


def _measured(label: str, rows: Sequence[Row]) -> tuple[str, list[Row]]:
    """The rows that did not fail, and a label that tells how many did."""
    measured = [row for row in rows if "error" not in row]
    failed = len(rows) - len(measured)
    return label + (f" ({failed} of {len(rows)} failed)" if failed else ""), measured


def _defended(label: str, rows: Sequence[Row]) -> list[str]:
    label, rows = _measured(label, rows)
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
            if fits := recorded(defence, f"{name}-{recipe.seeds[0]}-fit-*"):
                shipped.append(_defended(name, fits))
            others = [row for seed in recipe.seeds for row in found(defence, f"{name}-{seed}-fit-0")]
            if len(others) > 1:
                trained.append(_defended(name, others))
        made[defence] = _grid(_HEADER, shipped)
        made[f"{defence}-training-seeds"] = _grid(_HEADER, trained)
    verdicts = [
        _verdict(name, row)
        for name, recipe in zoo.RECIPES.items()
        for row in found("mm-bd", f"{name}-{recipe.seeds[0]}-fit-0")
    ]
    made["mm-bd"] = _grid(("model", "margin of the largest class", "the other classes", "p", "verdict"), verdicts)
    attacked = [name for name, recipe in zoo.RECIPES.items() if recipe.attack]
    made["attacks"] = _grid(_ATTACKS_HEADER, [_attacked(name) for name in attacked])
    judges = [name for name, detector in DETECTORS.items() if detector.judges == "images"]

    def on_signs(name: str, method: str) -> list[Row]:
        return recorded(method, f"{name}-{zoo.RECIPES[name].seeds[0]}-fit-*")

    made["sites"] = _grid(
        _SITES_HEADER,
        [_where(name, fits) for name in attacked if (fits := _measured("", on_signs(name, "mmac-explained"))[1])],
    )

    def on_cifar10(name: str, method: str) -> list[Row]:
        return recorded("cifar10", f"{name}-{method}-fit-*")

    made["peers"] = _compared(
        DEFENCES, attacked, on_signs, lambda rows: " / ".join(_cell(rows, "after", metric) for metric in ("acc", "asr"))
    )
    made["detectors"] = _compared(judges, attacked, on_signs, _both_aurocs)
    rows = []
    for attack in IMAGE_ATTACKS:
        for defence in DEFENCES:
            if fits := on_cifar10(attack, defence):
                rows.append([*_defended(f"{attack}, {defence}", fits), _seconds(fits)])
    made["cifar10"] = _grid((*_HEADER, "seconds: training, fit"), rows)
    made["cifar10-detectors"] = _compared(judges, IMAGE_ATTACKS, on_cifar10, _both_aurocs)
    return made


_ATTACKS_HEADER = (
    "attack", "before: ACC / ASR / RA", "MM-BD", "published: ACC / ASR / RA", "default: ACC", "ASR", "RA",
    "ceiling of RA", "MMDF AUROC", "TPR at FPR .01",
)  # fmt: skip


def _attacked(name: str) -> list[str]:
    """A shipped checkpoint's row in the table of attacks."""
    seed = zoo.RECIPES[name].seeds[0]
    default, published = (found(defence, f"{name}-{seed}-fit-*") for defence in ("mmac", "mmac-published"))
    verdict = found("mm-bd", f"{name}-{seed}-fit-0")
    before, after = (
        " / ".join(_cell(rows, when, metric) for metric in ("acc", "asr", "ra"))
        for rows, when in ((default[:1], "before"), (published, "after"))
    )
    cells = [name, before, _verdict(name, verdict[0])[-1] if verdict else "–", after if published else "–"]
    cells += [_cell(default, "after", metric) for metric in ("acc", "asr", "ra")]
    return [*cells, _cell(default[:1], "ra_ceiling"), _cell(default, "mmdf", "auroc"), _cell(default, "mmdf", _TPR)]


_SITES_HEADER = (
    "attack", "ASR left", "median margin before: triggered", "clean", "most abnormal site",
    "ASR, one site clipped: least", "ASR, one site opened: most", "stand-ins: largest column", "largest pair",
)  # fmt: skip


def _where(name: str, fits: Sequence[Row]) -> list[str]:
    """Where a backdoor is held back, how sure of itself it was, and how loud its stand-ins: means over `fits`."""

    def at(measure: str, best: Callable[[dict[str, float]], str]) -> str:
        means = {site: float(np.mean([fit["sites"][site][measure] for fit in fits])) for site in fits[0]["sites"]}
        site = best(means)
        return f"{means[site]:.2f}".removeprefix("0") + f" ({site})"

    def largest(part: str) -> str:
        return spread([float(np.max(fit["stand_ins"][part])) for fit in fits])

    def most(means: dict[str, float]) -> str:
        return max(means, key=means.__getitem__)

    margins = [f"{fits[0]['margins'][kind]['before'][1]:.1f}" for kind in ("triggered", "clean")]
    least = at("alone", lambda means: min(means, key=means.__getitem__))
    acts = [at("abnormality", most), least, at("opened", most)]
    return [name, _cell(fits, "after", "asr"), *margins, *acts, largest("columns"), largest("rates")]


def _compared(
    methods: Collection[str],
    names: Collection[str],
    rows_of: Callable[[str, str], list[Row]],
    cell: Callable[[Sequence[Row]], str],
) -> str:
    """Attacks x methods, those that were measured; `rows_of` an attack and a method gives the rows."""
    every = {(name, method): rows_of(name, method) for name in names for method in methods}
    names, methods = (dict.fromkeys(pair[axis] for pair, rows in every.items() if rows) for axis in (0, 1))
    lines = []
    for name in names:
        line = [name]
        for method in methods:
            note, rows = _measured("", every[name, method])
            line.append((cell(rows) if rows else "–") + note)
        lines.append(line)
    return _grid(("attack", *methods), lines)


def _both_aurocs(rows: Sequence[Row]) -> str:
    return f"{_cell(rows, 'auroc')} / {_cell(rows, 'auroc_successful')}"


def spread_of(recorded: dict[str, float] | None) -> str:
    """Mean and standard deviation as a card records them."""
    if recorded is None:
        return "–"
    return f"{recorded['mean']:.3f} ± {recorded['standard_deviation']:.3f}".replace("0.", ".")


def _seconds(rows: Sequence[Row]) -> str:
    _, rows = _measured("", rows)
    return (
        f"{rows[0]['training_seconds']['attacked']:.0f}, {np.mean([r['seconds'] for r in rows]):.0f}" if rows else "–"
    )


def _verdict(name: str, row: Row) -> list[str]:
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
