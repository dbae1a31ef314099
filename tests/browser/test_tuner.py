"""`BoundTuner` in JupyterLab: what it shows is what the package computes."""

import math
import os
import random
import time

import psutil  # ipykernel needs it, too
import pytest
import torch
from browser.bounds import (
    LESSON,
    NUMBERS,
    STILL,
    TEXT,
    TUNER,
    Hand,
    eval_in_kernel,
    expect_kernel,
    expect_pictures,
    settings_tried,
    shown,
)

from bclip_lab.evaluation import evaluate

FULL = os.environ.get("BCLIP_LAB_BUDGET") == "full"


@pytest.mark.browser
def test_dragging_typing_and_keys(open_notebook, lab, tmp_path):
    lesson = {}
    exec(LESSON, lesson)
    clipped, test, attack = lesson["clipped"], lesson["splits"].test, lesson["attack"]
    maxima = clipped.activations(lesson["splits"].defender).maximum
    seen = []

    def expect(bounds):
        """Wait until the page shows what the package computes for these bounds."""
        clipped.reset()
        clipped.set_bounds(bounds)
        text = shown(evaluate(clipped, test, attack))
        notebook.expect(NUMBERS, text)
        seen.append(text)

    notebook = open_notebook("tuner.ipynb", [LESSON, TUNER])
    page = notebook.page
    notebook.run()
    expect({})
    notebook.expect(TEXT, "none")
    hand = Hand(notebook)
    # the line of the most abnormal site is dragged: its scale
    scale = hand.drag(1.0, 0.6, 0.3, 0.12)
    expect({"2": scale * maxima["2"]})
    # nothing moves by itself
    evaluated = settings_tried(notebook)
    page.wait_for_timeout(500)
    assert settings_tried(notebook) == evaluated
    # keys move it on: the focus is on the line
    step = float(notebook.kernel("print(tuner._line.high / 100)"))
    for key in ("PageUp", "ArrowLeft", "ArrowLeft"):
        page.keyboard.press(key)
    assert hand.value() == pytest.approx(scale + 8 * step)
    expect({"2": hand.value() * maxima["2"]})
    page.keyboard.press("End")
    expect({})
    # all sites together, by keyboard
    page.locator(".noUi-handle").first.focus()
    page.keyboard.press("Home")
    expect({site: 0.0 for site in maxima})
    for _ in range(11):
        page.keyboard.press("PageUp")  # five steps
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect({site: 0.57 * values for site, values in maxima.items()})
    # the scale of a site is typed
    box = page.get_by_label("site, %", exact=True)
    box.fill("26")
    box.press("Enter")
    expect({"2": 0.26 * maxima["2"], "4": 0.57 * maxima["4"]})
    page.get_by_role("button", name="Reset all").click()
    expect({})
    # one channel: the strip's first, the trigger's, is clicked, and chosen by keys
    strip = page.locator(".bclip-lab-strip")
    place = strip.bounding_box()
    page.mouse.click(place["x"] + 62 + (place["width"] - 86) / 6, place["y"] + 60)
    title = "tuner._line.title"
    expect_kernel(notebook, title, "2, channel 2")
    page.keyboard.press("ArrowRight")
    expect_kernel(notebook, title, f"2, channel {notebook.kernel('print(tuner._order[1])')}")
    page.keyboard.press("Escape")
    expect_kernel(notebook, title, "2")
    page.keyboard.press("Home")
    expect_kernel(notebook, title, "2, channel 2")
    hand = Hand(notebook)
    bound = hand.drag(1.0, 0.4, 0.05)
    expect({"2": torch.tensor([math.inf, math.inf, bound])})
    box = page.get_by_label("channel", exact=True)
    box.fill("0.05")
    box.press("Enter")
    typed = {"2": torch.tensor([math.inf, math.inf, 0.05])}
    expect(typed)
    for _ in range(2):  # a drag is one step
        page.get_by_role("button", name="Undo").click()
    expect({})
    for _ in range(2):
        page.get_by_role("button", name="Redo").click()
    expect(typed)
    assert len(set(seen)) >= 5, f"too few different numbers to tell anything: {seen}"

    # saved, taken off, loaded
    page.get_by_role("button", name="Save", exact=True).click()
    notebook.expect("document.body.innerText.includes('written to bounds.safetensors') ? 'yes' : 'no'", "yes")
    page.get_by_role("button", name="Reset all").click()
    expect({})
    page.get_by_role("button", name="Load", exact=True).click()
    expect(typed)

    # the picture is that of the last state, and the kernel's model has its bounds
    notebook.expect(STILL, expect_pictures(notebook))
    numbers = notebook.kernel("print(evaluate(clipped, splits.test, attack))")
    assert numbers == repr(evaluate(clipped, test, attack))
    page.screenshot(path=tmp_path / "tuner.png")

    # learned bounds, with the page alive meanwhile; stopped before their end
    notebook.kernel(
        "from bclip_lab.defenses import MMBMConfig, mmbm; from bclip_lab.widgets import tuner as module\n"
        "module._LEARN['MM-BM'] = lambda model, clean: mmbm(model, clean, MMBMConfig(epochs=100_000))"
    )
    page.get_by_role("button", name="MM-BM", exact=True).click()
    notebook.expect("document.body.innerText.includes('MM-BM: epoch') ? 'yes' : 'no'", "yes")
    page.get_by_role("button", name="Stop").click()
    notebook.expect("document.body.innerText.includes('MM-BM: bounds taken') ? 'yes' : 'no'", "yes")
    notebook.expect(NUMBERS, shown(eval_in_kernel(notebook)))

    # a fit whose first step is long says so before it begins
    notebook.kernel(
        "import time, pathlib\n"
        "def slow(model, clean):\n"
        "    while not pathlib.Path('go-published').exists(): time.sleep(0.05)\n"
        "    yield from mmbm(model, clean, MMBMConfig(epochs=1))\n"
        "module._LEARN['MMAC, published'] = slow"
    )
    page.get_by_role("button", name="MMAC, published").click()
    notebook.expect("document.body.innerText.includes('MMAC, published: starting') ? 'yes' : 'no'", "yes")
    (lab.root / "go-published").touch()
    notebook.expect("document.body.innerText.includes('MMAC, published: bounds taken') ? 'yes' : 'no'", "yes")

    # the cells once more: the new tuner starts anew, the old one is gone
    notebook.run()
    expect({})
    assert page.locator(".bclip-lab-numbers").count() == 1
    assert notebook.faults() == []
    assert page.locator(".bclip-lab-error").count() == 0
    assert lab.complaints() == []


@pytest.mark.browser
def test_hidden_for_less_than_a_frame(open_notebook):
    """At a change of theme JupyterLab hides the page until the next frame, which a picture may have asked for."""
    notebook = open_notebook("hidden.ipynb", [LESSON, TUNER])
    notebook.run()
    notebook.expect(TEXT, "none")
    for name in ("drag", "strip"):
        canvas = f"document.querySelector('.bclip-lab-{name}')"
        pixel = f"String({canvas}.getContext('2d').getImageData(1, 1, 1, 1).data)"
        notebook.expect(f"({pixel}).endsWith(',255')", True)
        notebook.page.evaluate(
            f"""async () => {{
                const body = document.body, cell = {canvas}.closest(".jp-Cell");
                body.dataset.jpThemeName += " of the test";
                await null; // the picture has asked for a frame now
                body.style.setProperty("--jp-layout-color0", "rgb(0, 0, 99)");
                cell.style.display = "none";
                requestAnimationFrame(() => {{ cell.style.display = ""; }});
            }}"""
        )
        notebook.expect(pixel, "0,0,99,255")
        notebook.page.evaluate("document.body.style.removeProperty('--jp-layout-color0')")
    assert notebook.faults() == []


@pytest.mark.browser
def test_quick_moves(open_notebook):
    """Twenty moves in 400 ms end on the last value, and are one step back."""
    notebook = open_notebook("moves.ipynb", [LESSON, TUNER])
    page = notebook.page
    notebook.run()
    notebook.expect(TEXT, "none")
    hand = Hand(notebook)
    hand.mouse.move(*hand.at(1.0))
    hand.mouse.down()
    for move in range(20):
        hand.mouse.move(*hand.at(0.9 - 0.04 * move))
        page.wait_for_timeout(20)
    hand.mouse.up()
    scale = hand.value()
    notebook.expect(NUMBERS, shown(eval_in_kernel(notebook)))
    assert float(notebook.kernel("print(tuner.state.scales['2'])")) == scale
    assert notebook.kernel("print(tuner.state.undo(), tuner.state.bounded)") == "True []"
    assert notebook.faults() == []


def megabytes(notebook, browser):
    """What the kernel, the page's objects and its process hold, after all have thrown away what they can.

    The process fills a cache of decoded pictures, which it gives back when memory is short, and one of what the
    inspector of Playwright has seen, which it does not: that one is full after some 750 moves.
    """
    kernel = notebook.kernel("import gc, psutil; gc.collect(); print(psutil.Process().memory_info().rss)")
    page = notebook.page.context.new_cdp_session(notebook.page)
    for _ in range(2):
        page.send("HeapProfiler.collectGarbage")
    heap = page.send("Runtime.getHeapUsage")["usedSize"]
    nodes = page.send("Memory.getDOMCounters")["nodes"]
    page.send("Memory.simulatePressureNotification", {"level": "critical"})
    notebook.page.wait_for_timeout(3000)
    page.detach()
    session = browser.new_browser_cdp_session()
    processes = session.send("SystemInfo.getProcessInfo")["processInfo"]
    session.detach()
    process = sum(psutil.Process(each["id"]).memory_info().rss for each in processes if each["type"] == "renderer")
    return {"kernel": int(kernel) / 1e6, "objects": heap / 1e6, "process": process / 1e6, "nodes": nodes}


@pytest.mark.browser
def test_random_moves_queue_nothing_and_leak_nothing(open_notebook, browser, lab):
    """With BCLIP_LAB_BUDGET=full 500 moves after 1,000 others, and the page's process counts; else 60 after 30."""
    lesson = {}
    exec(LESSON, lesson)
    clipped, test, attack = lesson["clipped"], lesson["splits"].test, lesson["attack"]
    notebook = open_notebook("many-moves.ipynb", [LESSON, TUNER])
    page = notebook.page
    notebook.run()
    notebook.expect(TEXT, "none")
    draw, strip = random.Random(0), page.locator(".bclip-lab-strip")
    sites = page.locator(".bclip-lab-sites button")

    def move():
        what = draw.randrange(8)
        if what == 0:
            wide = strip.bounding_box()["width"]
            strip.click(position={"x": 62 + draw.random() * (wide - 86), "y": 60})
        elif what == 1:
            page.keyboard.press(draw.choice(["Escape", "ArrowLeft", "ArrowRight", "Home", "End", "PageDown"]))
        elif what == 2:
            sites.nth(draw.randrange(2)).click()
        elif what == 3:
            button = page.get_by_role("button", name=draw.choice(["Undo", "Redo", "Reset all"]))
            button.evaluate("button => button.click()")  # some are disabled
        elif what == 4:
            page.locator(".noUi-handle").first.focus()
            page.keyboard.press(draw.choice(["PageUp", "PageDown", "ArrowLeft"]))
        else:
            Hand(notebook).move(*(draw.random() for _ in range(6)))

    def settle():
        """End on a known setting; give the seconds from the hand's rest to the numbers of that setting."""
        page.get_by_role("button", name="Reset all").click()
        sites.first.click()
        strip.focus()
        page.keyboard.press("Escape")
        notebook.expect(TEXT, "none")
        hand = Hand(notebook)
        hand.value("high", "aria-valuemax")  # the site may have been another one
        hand.value()
        hand.move(1.0, 0.7, 0.5, 0.12)
        rest = time.monotonic()
        clipped.reset()
        clipped.set_bounds({"2": hand.here() * clipped.activations(lesson["splits"].defender).maximum["2"]})
        notebook.expect(NUMBERS, shown(evaluate(clipped, test, attack)))
        return time.monotonic() - rest

    first, moves = (1000, 500) if FULL else (30, 60)
    for _ in range(first):  # threads, caches, fonts
        move()
    settle()
    before = megabytes(notebook, browser)
    for _ in range(moves):
        move()
    seconds = settle()
    evaluated = settings_tried(notebook)
    page.wait_for_timeout(500)
    assert settings_tried(notebook) == evaluated, "moves were left in a queue"
    after = megabytes(notebook, browser)
    grown = {name: after[name] - before[name] for name in before}
    print(f"\n{moves} moves, {evaluated} settings measured; last numbers {seconds:.2f} s after the hand's rest; grown:")
    print(
        "   ".join(f"{name} {value:+.1f} to {after[name]:.1f}" for name, value in grown.items()),
        "(MB, number of nodes)",
    )
    assert grown["kernel"] < 50 and grown["objects"] < 50 and grown["nodes"] < 500
    assert not FULL or grown["process"] < 50
    same = "all(torch.equal(a, b) for a, b in zip(clipped.bounds.values(), tuner.state.bounds.values()))"
    assert notebook.kernel(f"print({same})") == "True"
    assert notebook.faults() == []
    assert page.locator(".bclip-lab-error").count() == 0
    assert lab.complaints() == []
