"""A JupyterLab of its own for the browser tests, and a page in Chromium to drive it with."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from playwright.sync_api import Browser, Page, TimeoutError, sync_playwright

SETTINGS = {
    # no pop-up that asks for news, and no cell that is left out because it is scrolled away
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
STATE = """(() => {
    const panel = window.jupyterapp?.shell.currentWidget;
    return panel?.context?.isReady ? panel.sessionContext.session?.kernel?.status ?? "no kernel" : "not open";
})()"""
SECONDS = 600 if os.environ.get("CI") else 180  # stops what hangs; a machine under load takes minutes to start


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, the folder it shows and the file it logs to."""

    url: str
    root: Path
    log: Path

    def complaints(self) -> list[str]:
        """The tracebacks in the log, each with the lines around it.

        Not those that Python writes while a kernel ends, for what it cannot raise any more: a coroutine of
        ipykernel's that is thrown away then is warned of on a stream that is closed already.
        """
        lines = self.log.read_text().splitlines()
        return [
            "\n".join(lines[max(0, index - 3) : index + 25])
            for index, line in enumerate(lines)
            if "Traceback (most recent" in line and "Exception ignored in" not in lines[index - 1]
        ]


@pytest.fixture(scope="session")
def lab(chromium: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab on 127.0.0.1 without a token, in temporary folders; not without a browser."""
    base = tmp_path_factory.mktemp("jupyterlab")
    folders = {name: base / name for name in ("root", "config", "data", "runtime", "ipython", "home")}
    for folder in folders.values():
        folder.mkdir()
    (folders["config"] / "labconfig").mkdir()
    (folders["config"] / "labconfig" / "default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # figures are drawn inline, as for a user
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env |= {f"JUPYTER_{name.upper()}_DIR": str(folders[name]) for name in ("config", "data", "runtime")}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), env.get("PYTHONPATH")]))  # toys
    env |= {"IPYTHONDIR": str(folders["ipython"]), "HOME": str(folders["home"])}
    command = [
        *(sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
        *(f"--port={port}", "--IdentityProvider.token=", f"--ServerApp.root_dir={folders['root']}"),
        "--LabApp.expose_app_in_browser=True",
    ]
    url, log = f"http://127.0.0.1:{port}", base / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, cwd=folders["root"], stdout=out, stderr=out)
        try:
            wait_for_server(url, process, log)
            yield Lab(url, folders["root"], log)
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_for_server(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            direct.open(f"{url}/api", timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()}")


# not for the whole session: while Playwright runs, its event loop counts as running in every other test
@pytest.fixture(scope="module")
def browser(chromium: Path) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=chromium, headless=True, args=FLAGS)


class Notebook:
    """A notebook that is open in a page."""

    def __init__(self, page: Page, lab: Lab, name: str, cells: list[str], shots: Path) -> None:
        self.shots = shots
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, lab.root / name)
        self.page = page
        self.errors: list[str] = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.set_default_timeout(1000 * SECONDS)
        self.url = f"{lab.url}/lab/workspaces/{Path(name).stem}/tree/{name}"  # no tab of another test
        self.open()

    def open(self) -> None:
        """Open it in the page, and wait for its kernel."""
        self.page.goto(self.url)
        self.expect(STATE, "idle")

    def reopen(self, shut_down: bool = False) -> None:
        """Save it, close the page, with the kernel too if wanted, and open it again."""
        self.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
        if shut_down:
            self.page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.goto("about:blank")
        self.open()

    def run(self) -> None:
        """Run all cells."""
        assert self.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")

    def expect(self, expression: str, value: str) -> None:
        """Wait until an expression of JavaScript has a value."""
        try:
            self.page.wait_for_function(f"value => ({expression}) === value", arg=value)
        except TimeoutError:
            self.page.screenshot(path=self.shots / "failure.png")
            pytest.fail(f"{expression}\nis      {self.page.evaluate(expression)}\ninstead {value}")

    def until(self, holds: Callable[[], bool], otherwise: Callable[[], str]) -> None:
        """Wait until something holds that takes more than the page to tell."""
        end = time.monotonic() + SECONDS
        while not holds():
            if time.monotonic() > end:
                self.page.screenshot(path=self.shots / "failure.png")
                pytest.fail(otherwise())
            self.page.wait_for_timeout(50)

    def next_frame(self) -> None:
        """Wait until the page shows what it has learned of until now."""
        self.page.evaluate(
            """limit => Promise.race([
                new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))),
                new Promise((_, fail) => setTimeout(() => fail(new Error("the page drew no frame")), limit)),
            ])""",
            1000 * SECONDS,
        )

    def kernel(self, code: str) -> str:
        """What the kernel prints for some code, after all that it has to do already."""
        text: str = self.page.evaluate(
            """async code => {
                const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
                const future = kernel.requestExecute({code, store_history: false});
                let text = "";
                future.onIOPub = message => {
                    text += message.content.text ?? message.content.traceback?.join("\\n") ?? "";
                };
                await future.done;
                return text;
            }""",
            code,
        )
        return text.strip()

    def faults(self) -> list[str]:
        """Errors of the page, and what the cells wrote to stderr or raised."""
        kinds = ("application/vnd.jupyter.stderr", "application/vnd.jupyter.error")
        selector = ", ".join(f"[data-mime-type='{kind}']" for kind in kinds)
        return self.errors + self.page.locator(selector).all_inner_texts()


@pytest.fixture
def open_notebook(browser: Browser, lab: Lab, tmp_path: Path) -> Iterator[Any]:
    """Opens a notebook of the given cells in a page of its own; its kernel ends with the test."""
    contexts = []

    def opened(name: str, cells: list[str]) -> Notebook:
        context = browser.new_context(viewport={"width": 1400, "height": 1250})
        contexts.append(context)
        return Notebook(context.new_page(), lab, name, cells, tmp_path)

    yield opened
    for context in contexts:
        for page in context.pages:
            page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        context.close()
