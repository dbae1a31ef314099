"""What all tests share: a browser, deterministic Hypothesis, no windows, and the seconds of the notebooks."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

os.environ["MPLBACKEND"] = "Agg"

settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

# Benchmarks take minutes; `make bench` names the folder.
collect_ignore = ["benchmarks"]

BROWSERS = (
    "chromium",
    "chromium-browser",
    "google-chrome",
    "/Applications/Chromium.app/Contents/MacOS/Chromium",
    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome",
)


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
        terminalreporter.section(f"seconds of each notebook, {budget} budget")
        for row in sorted(rows, key=lambda row: str(row["notebook"])):
            terminalreporter.line(f"{row['seconds']:7.1f}  {row['notebook']}")
