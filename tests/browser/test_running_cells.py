"""Widgets beside cells that run, beside one another, and after the kernel or the page has gone."""

import hashlib
import json
import os
from pathlib import Path

import pytest
from browser.bounds import LESSON, NUMBERS, TEXT, TUNER, Hand, eval_in_kernel, expect_kernel, expect_pictures, shown
from browser.conftest import STATE

import bclip_lab.widgets

PICTURES = 30 if os.environ.get("BCLIP_LAB_BUDGET") == "full" else 5
DRAWN = f"""
import time
import matplotlib.pyplot as plt

for number in range({PICTURES}):
    figure, axes = plt.subplots(figsize=(3, 2))
    for line in range(6):
        plt.plot([0, line + 1], [number, line])
        time.sleep(0.03)
    if number < {PICTURES} - 1:
        plt.show()
"""
SETTING = "@jupyterlab/apputils-extension:kernels-settings"
SHIPPED = json.loads(Path(bclip_lab.widgets.__file__).with_name("lab_overrides.json").read_text())[SETTING]
OUTPUTS = "window.jupyterapp.shell.currentWidget.content.widgets[{}].model.outputs.toJSON()"


@pytest.fixture(params=["as shipped", "JupyterLab's default"])
def setting(request, lab):
    """JupyterLab's setting of how widgets' messages are delivered."""
    chosen = SHIPPED if request.param == "as shipped" else {"commsOverSubshells": "perCommTarget"}
    folder, name = SETTING.split(":")
    file = lab.root.parent / "config" / "lab" / "user-settings" / folder / f"{name}.jupyterlab-settings"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(chosen))
    yield chosen["commsOverSubshells"]
    file.unlink()


def run_cell(notebook, index):
    """Start one cell; `window.ran` tells whether it has ended (the kernel's status is also that of a subshell)."""
    notebook.page.evaluate(
        """index => {
            window.ran = false;
            window.jupyterapp.shell.currentWidget.content.activeCellIndex = index;
            window.jupyterapp.commands.execute("notebook:run-cell").then(() => { window.ran = true; });
        }""",
        index,
    )


def pictures(notebook, index):
    """Hashes of the pictures that a cell has shown."""
    outputs = notebook.page.evaluate(OUTPUTS.format(index))
    return [hashlib.sha256(output["data"]["image/png"].encode()).hexdigest() for output in outputs]


@pytest.mark.browser
def test_figures_of_a_running_cell_while_a_line_and_a_slider_are_moved(open_notebook, lab, setting):
    """With BCLIP_LAB_BUDGET=full 30 pictures, else 5: none differs from a quiet run's, and the widget follows."""
    notebook = open_notebook(f"figures-{setting}.ipynb", [LESSON, TUNER, DRAWN])
    page = notebook.page
    notebook.run()
    notebook.expect(TEXT, "none")
    notebook.expect(f"{OUTPUTS.format(2)}.length", PICTURES)
    notebook.expect(STATE, "idle")
    quiet = pictures(notebook, 2)
    assert len(set(quiet)) == PICTURES
    kernel = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
    assert page.evaluate(f"{kernel}.commsOverSubshells") == setting

    Hand(notebook).drag(1.0, 0.9)  # the first message makes a thread in the kernel
    notebook.kernel(
        "seen = []\n"
        "for control in (tuner._line, tuner._all): control.observe(lambda change: seen.append(change), names='value')"
    )
    run_cell(notebook, 2)
    moves = 0
    while not page.evaluate("window.ran"):
        if moves % 4 == 3:
            page.locator(".noUi-handle").first.focus()
            page.keyboard.press("ArrowLeft" if moves % 8 == 3 else "ArrowRight")
        else:  # the page scrolls as pictures come: the line is looked for each time
            Hand(notebook).move(*((0.1 + 0.07 * (moves + step)) % 1 for step in range(5)))
        moves += 1
    came = int(notebook.kernel("print(len(seen))"))
    Hand(notebook).drag(0.6, 0.12)
    notebook.expect(NUMBERS, shown(eval_in_kernel(notebook)))
    moved = pictures(notebook, 2)
    wrong = sum(here != there for here, there in zip(moved, quiet, strict=False))
    print(f"\n{setting}: {wrong} of {len(moved)} pictures differ, in {moves} moves; {came} values came to the kernel")
    assert came >= moves / 2, "the hand missed the controls"
    assert moved == quiet
    assert notebook.faults() == []
    assert lab.complaints() == []


@pytest.mark.browser
def test_two_tuners_of_one_model(open_notebook, lab):
    """Each shows what its own bounds do; the model has those of the one that was moved last."""
    notebook = open_notebook("two.ipynb", [LESSON, TUNER, TUNER.replace("tuner", "second")])
    page = notebook.page
    notebook.run()
    notebook.expect("String(document.querySelectorAll('.bclip-lab-numbers').length)", "2")
    numbers = "[...document.querySelectorAll('.bclip-lab-numbers')[{}].querySelectorAll('b')]"
    first, second = (f"{numbers.format(place)}.map(each => each.innerText).join(' ')" for place in (0, 1))
    start = page.evaluate(second)
    scale = Hand(notebook).drag(1.0, 0.12)
    now = shown(eval_in_kernel(notebook))
    notebook.expect(first, now)
    assert page.evaluate(second) == start != now
    other = Hand(notebook, "second", 1).drag(1.0, 0.3)
    notebook.expect(second, shown(eval_in_kernel(notebook)))
    assert page.evaluate(first) == now
    ratio = "float(clipped.bounds['2'][2] / second.state.reference['2'][2])"
    found = notebook.kernel(f"print(tuner.state.scales['2'], second.state.scales['2'], {ratio})").split()
    assert [float(text) for text in found] == pytest.approx([scale, other, other])
    # the first again: all of its bounds are the model's
    page.get_by_role("button", name="Undo").first.click()
    notebook.expect(first, start)
    expect_kernel(notebook, "bool(clipped.bounds['2'].isinf().all())", "True")
    assert notebook.faults() == []
    assert page.locator(".bclip-lab-error").count() == 0
    assert lab.complaints() == []


@pytest.mark.browser
def test_its_cell_run_twice_its_kernel_restarted_its_notebook_closed(open_notebook, lab, tmp_path):
    notebook = open_notebook("again.ipynb", [LESSON, TUNER])
    page = notebook.page
    notebook.run()
    notebook.expect(TEXT, "none")
    start = page.evaluate(NUMBERS)
    scale = Hand(notebook).drag(1.0, 0.12)
    tuned = shown(eval_in_kernel(notebook))
    notebook.expect(NUMBERS, tuned)
    assert tuned != start

    # its cell alone, again: a new tuner that starts with the bounds that the model has
    notebook.kernel("old = tuner")
    run_cell(notebook, 1)
    expect_kernel(notebook, "tuner is old", "False")
    notebook.expect(NUMBERS, tuned)
    assert page.locator(".bclip-lab-drag").count() == 1
    assert float(notebook.kernel("print(tuner.state.scales['2'])")) == pytest.approx(scale, abs=1e-6)
    assert Hand(notebook).drag(0.12, 0.3) != scale
    here = shown(eval_in_kernel(notebook))
    notebook.expect(NUMBERS, here)

    # closed and opened again, with the kernel running: the same numbers and picture, and alive
    notebook.reopen()
    notebook.expect(NUMBERS, here)
    Hand(notebook).drag(0.3, 0.12)
    notebook.expect(NUMBERS, shown(eval_in_kernel(notebook)))
    page.screenshot(path=tmp_path / "reopened.png")
    expect_pictures(notebook)

    # the kernel restarted: what is left in the page does nothing, until the cells are run
    page.evaluate("window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.restart()")
    notebook.expect(STATE, "idle")
    Hand(notebook).move(0.12, 0.5)
    page.screenshot(path=tmp_path / "restarted.png")
    notebook.run()
    notebook.expect(NUMBERS, start)
    Hand(notebook).drag(1.0, 0.12)
    notebook.expect(NUMBERS, tuned)

    # opened again after the kernel has gone: the last picture
    expect_pictures(notebook)
    notebook.reopen(shut_down=True)
    page.locator(".jp-RenderedImage img").wait_for()
    page.screenshot(path=tmp_path / "gone.png")
    assert notebook.faults() == []
    assert lab.complaints() == []
