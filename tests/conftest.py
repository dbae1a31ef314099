"""What all tests share: a browser, deterministic Hypothesis, no windows, workers, and the seconds of the notebooks."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from traitlets.config import Config

os.environ["MPLBACKEND"] = "Agg"

if "PYTEST_XDIST_WORKER" in os.environ:
    # There are as many workers as cores: a second thread would only be in the way of another's first. Before torch is
    # imported; kernels and other processes inherit it.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

# Benchmarks take minutes; `make bench` names the folder.
collect_ignore = ["benchmarks"]

RUNS = "test_notebooks.py::test_runs["

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


@pytest.fixture
def kernels() -> Iterator[Config]:
    """Settings of a notebook's kernel: it listens on sockets in a folder.

    A TCP port is chosen before the kernel binds it, and the kernel of a test at the same time may bind it first.
    """
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: a socket's path has some hundred characters at most
        yield Config({"KernelManager": {"transport": "ipc", "ip": f"{folder}/kernel"}})


@pytest.fixture(scope="session")
def chromium() -> Path:
    """The browser's executable. Without one the test is skipped, but under CI it fails."""
    for name in BROWSERS:
        if found := shutil.which(name):
            return Path(found)
    reason = f"no Chromium found (looked for {', '.join(BROWSERS)})"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the notebooks where several workers share the tests: the short ones then fill the time up."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: RUNS not in item.nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Deal the notebooks to the workers one by one, and the other tests by file."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if RUNS in nodeid else super()._split_scope(nodeid)

    config.option.loadscopereorder = False  # else the files of many tests come first
    return Scheduling(config, log)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the seconds that each notebook took."""
    rows = [
        properties
        for outcome in ("passed", "failed")
        for report in terminalreporter.getreports(outcome)
        if "notebook" in (properties := dict(getattr(report, "user_properties", ())))
    ]
    if rows:
        budget = os.environ.get("BCLIP_LAB_BUDGET", "full")
        workers = terminalreporter.config.getoption("numprocesses", None)
        beside = f", {workers} at a time" if workers else ""
        terminalreporter.section(f"seconds of each notebook, {budget} budget{beside}")
        for row in sorted(rows, key=lambda row: str(row["notebook"])):
            terminalreporter.line(f"{row['seconds']:7.1f}  {row['notebook']}")
