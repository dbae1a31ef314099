"""The grid: checkpoints x methods x seeds, filled in cell by cell on as many processes as there are."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from bclip_lab import zoo
from bclip_lab.benchmark.cells import Cell, Row, Shipped, Trained, failed, fill, results_dir, write
from bclip_lab.benchmark.methods import DEFENCES, DETECTORS, Defence, Detector, named

__all__ = ["SEEDS", "Grid", "missing", "run"]

SEEDS = (0, 1, 2)
"""The seeds of the fits, where a grid names no others."""


@dataclass(frozen=True)
class Grid:
    """Every method on every checkpoint, with every seed; methods marked `once` with the first seed only.

    Parameters
    ----------
    checkpoints
        `Shipped` ones of the zoo, and networks `Trained` on one's own images.
    methods
        Names of `DEFENCES` and `DETECTORS`; None is all of them.
    seeds
        Of the methods: three by default.
    explained
        Measure more of each fit of MMAC, the only method then: see `measure`.

    Raises
    ------
    ValueError
        No checkpoint, method or seed, or an unknown one; or another method than MMAC is to be explained.

    Examples
    --------
    >>> grid = Grid((Shipped("patch", 0),), ("mmac", "mm-bd"))
    >>> [cell.file for cell in grid.cells()]
    [('mmac', 'patch-0-fit-0'), ('mmac', 'patch-0-fit-1'), ('mmac', 'patch-0-fit-2'), ('mm-bd', 'patch-0-fit-0')]
    """

    checkpoints: tuple[Shipped | Trained, ...]
    methods: tuple[str, ...] | None = None
    seeds: tuple[int, ...] = SEEDS
    explained: bool = False

    def __post_init__(self) -> None:
        every = ("mmac",) if self.explained else (*DEFENCES, *DETECTORS)
        methods = every if self.methods is None else tuple(self.methods)
        if self.explained and methods != ("mmac",):
            raise ValueError(f"only fits of mmac can be explained, got {', '.join(methods)}")
        object.__setattr__(self, "methods", methods)
        for name in ("checkpoints", "methods", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for method in methods:
            named(method)
        for checkpoint in self.checkpoints:
            if isinstance(checkpoint, Shipped) and checkpoint.name not in zoo.RECIPES:
                raise ValueError(f"checkpoints must be of the zoo ({', '.join(zoo.list())}), got {checkpoint.name!r}")

    @classmethod
    def small(cls) -> Grid:
        """Every shipped checkpoint of the zoo x every method x three seeds."""
        return cls(tuple(_shipped(name) for name in zoo.list()))

    @classmethod
    def training_seeds(cls) -> Grid:
        """The further training seeds, which `make zoo` leaves in the cache, under MMAC with one seed."""
        further = tuple(Shipped(name, seed) for name, recipe in zoo.RECIPES.items() for seed in recipe.seeds[1:])
        return cls(further, ("mmac",), (0,))

    @classmethod
    def paper(cls, path: str) -> Grid:
        """Patch and blended attacks on CIFAR-10 x every method, one seed; `path` is its folder (`data.image_folder`).

        The networks are trained first, 8 epochs each, with one training seed.
        """
        attacks = ("patch", "blended")
        return cls(
            tuple(Trained(images="cifar10", path=path, attack=name, epochs=8, flip=True) for name in attacks),
            seeds=(0,),
        )

    @classmethod
    def from_file(cls, path: Path) -> Grid:
        """A grid from a TOML file.

            checkpoints = ["patch", "blended"]         # of the zoo
            methods = ["mmac", "mm-bm", "mmdf"]        # all by default
            seeds = [0, 1]                             # three by default

            [[images]]                                 # the fields of `Trained`; any number of these tables
            images = "mine"
            path = "my/images"
            attack = "patch"

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ValueError
            It is not TOML, or has a key that is none of these.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; --grid takes small, paper, training-seeds or a TOML file")
        try:
            told = tomllib.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is not TOML: {error}") from error
        _only(told, {"checkpoints", "methods", "seeds", "images"}, path)
        for table in told.get("images", ()):
            _only(table, {f.name for f in fields(Trained)}, path)
            if needed := {"images", "path"} - table.keys():
                raise ValueError(f"{path}: an [[images]] table has no {' and no '.join(sorted(needed))}")
        checkpoints = [_shipped(name) for name in told.get("checkpoints", ())]
        trained = [Trained(**table) for table in told.get("images", ())]
        methods = tuple(told["methods"]) if "methods" in told else None
        return cls((*checkpoints, *trained), methods, tuple(told.get("seeds", SEEDS)))

    def cells(self) -> Iterator[Cell]:
        """The cells, checkpoint by checkpoint."""
        for checkpoint in self.checkpoints:
            for method in self.methods or ():
                for seed in self.seeds[:1] if named(method).once else self.seeds:
                    yield Cell(checkpoint, method, seed, self.explained)

    def __len__(self) -> int:
        each = [1 if named(method).once else len(self.seeds) for method in self.methods or ()]
        return len(self.checkpoints) * sum(each)


def _shipped(name: str) -> Shipped:
    if name not in zoo.RECIPES:
        raise ValueError(f"checkpoints must be of the zoo ({', '.join(zoo.list())}), got {name!r}")
    return Shipped(name, zoo.RECIPES[name].seeds[0])


def _only(table: dict[str, Any], known: set[str], path: Path) -> None:
    if unknown := sorted(table.keys() - known):
        raise ValueError(f"{path} has the keys {unknown}; known are {sorted(known)}")


def missing(grid: Grid, folder: Path | None = None, *, retry: bool = False) -> list[Cell]:
    """The cells that `run` would measure: not there, stale, or, with `retry`, failed."""
    rows = ((cell, cell.stored(folder or results_dir())) for cell in grid.cells())
    return [cell for cell, row in rows if row is None or (retry and "error" in row)]


def run(
    grid: Grid, folder: Path | None = None, *, jobs: int = -1, address: str | None = None, retry: bool = False
) -> Iterator[Row]:
    """Fill in a grid: first the rows that are there, at once, then every other as it is finished.

    A row is written as soon as its cell is measured, so a run that is broken off or killed goes on where it was. Two
    runs on one folder do no harm: a row is the same whoever writes it, and a cell is looked up again before it is
    begun. What does not fit on the disk raises the `OSError` of the system; the rows before it are whole.

    Parameters
    ----------
    grid
        The cells.
    folder
        Of the rows: `results_dir()` by default.
    jobs
        Processes, as joblib counts them: -1 is one a core, 1 is this process. joblib gives each its share of the
        cores' threads. One that is killed (as for want of memory) ends the run, and the next one goes on.
    address
        Of a Dask scheduler ("tcp://host:8786"): its workers are used instead (`pip install 'bclip_lab[cluster]'`). A
        cell whose worker dies goes to another one, and is recorded as failed where that happens again and again. They
        need this version of the lab, its zoo, and one thread each (`dask worker --nthreads 1`): the memory of a fit is
        that of its process. Networks `Trained` here must lie in the same cache there, or are trained there anew.
    retry
        Measure anew what failed.

    Yields
    ------
    dict
        A row, of a failed cell with its `error`.
    """
    folder = folder or results_dir()
    waiting = missing(grid, folder, retry=retry)
    again = {cell.file for cell in waiting}
    for cell in grid.cells():
        row = None if cell.file in again else cell.stored(folder)
        if row is not None:
            yield row
    for checkpoint in dict.fromkeys(cell.checkpoint for cell in waiting):
        if isinstance(checkpoint, Trained):  # once, before several processes would do it
            for _ in checkpoint.train():
                pass
    work = [(cell, named(cell.method), folder) for cell in waiting]
    if not work:
        return
    if address is not None:
        yield from _on_cluster(work, address)
        return
    from joblib import Parallel, delayed  # slow to import

    parallel = Parallel(n_jobs=jobs, batch_size=1, return_as="generator_unordered")
    yield from parallel(delayed(_fill_here)(*job, os.getpid()) for job in work)


def _fill(cell: Cell, method: Defence | Detector, folder: Path) -> Row:
    """The cell's row, unless another run has measured it since it was looked for."""
    row = cell.stored(folder)
    return fill(cell, method) if row is None or "error" in row else row


def _fill_here(cell: Cell, method: Defence | Detector, folder: Path, master: int) -> Row:
    """The same on this machine, for the process `master`, and written at once."""
    if master not in (os.getpid(), os.getppid()):
        os._exit(1)  # the run was killed, and its workers would go on with the cells they were handed
    row = _fill(cell, method, folder)
    write(row, *cell.file, folder=folder)
    return row


def _on_cluster(work: list[tuple[Cell, Defence | Detector, Path]], address: str) -> Iterator[Row]:
    """On the workers of a Dask scheduler; rows are written here, as the workers may have no disk in common with us."""
    # not joblib's Dask backend: it waits for ever for a task whose worker dies each time
    try:
        from distributed import Client, as_completed
    except ImportError as missed:
        raise ValueError("address needs Dask: pip install 'bclip_lab[cluster]'") from missed
    with Client(address, set_as_default=False) as client:  # type: ignore[no-untyped-call]
        futures = {client.submit(_fill, *job, pure=False): job for job in work}
        for future in as_completed(list(futures), loop=client.loop):  # type: ignore[no-untyped-call]
            cell, method, folder = futures.pop(future)
            error = future.exception()
            row = future.result() if error is None else failed(cell, method, error)
            write(row, *cell.file, folder=folder)
            yield row
