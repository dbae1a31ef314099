"""Every notebook is committed without outputs and runs from top to bottom."""

import os
import shutil
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from traitlets.config import Config

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PATHS = [
    path.relative_to(NOTEBOOKS).as_posix()
    for folder in (NOTEBOOKS, NOTEBOOKS / "solutions")
    for path in sorted(folder.glob("*.ipynb"))
]
SECONDS = 600  # stops a kernel or a cell that hangs; what a notebook really takes is in the table at the end


@pytest.mark.parametrize("path", PATHS)
def test_committed_without_outputs(path):
    notebook = nbformat.read(NOTEBOOKS / path, as_version=4)
    nbformat.validate(notebook)
    assert "widgets" not in notebook.metadata, "holds the state of widgets: run nbstripout"
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "code":
            assert not cell.outputs, f"cell {number} holds outputs: run nbstripout"
            assert cell.execution_count is None, f"cell {number} holds an execution count: run nbstripout"


def execute(path: str, folder: Path, config: Config) -> None:
    """Run a notebook in a copy of its folder, so that nothing a cell writes lands in the checkout."""
    copy = folder / "notebooks"
    shutil.copytree(NOTEBOOKS, copy, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    notebook = nbformat.read(copy / path, as_version=4)
    resources = {"metadata": {"path": (copy / path).parent}}
    client = NotebookClient(notebook, timeout=SECONDS, startup_timeout=SECONDS, resources=resources, config=config)
    # Figures are drawn inline as in JupyterLab, and no start-up file of the user's takes part.
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    client.execute(env=env | {"IPYTHONDIR": str(folder / "ipython")})


@pytest.mark.slow
@pytest.mark.parametrize("path", PATHS)
def test_runs(path, tmp_path, record_property, kernels):
    record_property("notebook", path)
    start = time.perf_counter()
    error = None
    try:
        execute(path, tmp_path, kernels)
    except CellExecutionError as failure:
        error = str(failure)
    finally:
        record_property("seconds", time.perf_counter() - start)
    if error:
        pytest.fail(error, pytrace=False)  # the cell and its traceback, without nbclient's own
