// The page's half of BarStrip (strip.py): groups of bars, one of which is chosen by a click or the arrow keys.

const MARGIN = { left: 62, right: 24, top: 24, bottom: 20 }; // CSS pixels around the bars, as wide as DragLine's

function render({ model, el }) {
  const canvas = document.createElement("canvas");
  canvas.className = "bclip-lab-strip";
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "slider");
  canvas.dataset.lmSuppressShortcuts = "true"; // else JupyterLab takes the arrow keys
  canvas.style.cssText =
    `display: block; width: 100%; height: ${model.get("height")}px; cursor: pointer;` +
    "color: var(--jp-ui-font-color1, #222); font-family: var(--jp-ui-font-family, sans-serif);";
  el.append(canvas);

  let frame = 0;
  let under = -1; // the group under the pointer

  const count = () => model.get("names").length;
  const slot = () => (canvas.clientWidth - MARGIN.left - MARGIN.right) / Math.max(count(), 1);

  function at(event) {
    const index = Math.floor((event.offsetX - MARGIN.left) / slot());
    return index >= 0 && index < count() ? index : -1;
  }

  function choose(index) {
    model.set("chosen", Math.min(Math.max(index, -1), count() - 1));
    model.save_changes();
  }

  function key(event) {
    const chosen = model.get("chosen");
    const to = {
      ArrowRight: chosen + 1, ArrowLeft: Math.max(chosen - 1, 0), ArrowUp: chosen + 1, ArrowDown: Math.max(chosen - 1, 0),
      PageUp: chosen + 10, PageDown: Math.max(chosen - 10, 0), Home: 0, End: count() - 1, Escape: -1,
    }[event.key];
    if (to === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    choose(to);
  }

  function ask() {
    frame ||= requestAnimationFrame(paint);
  }

  function paint() {
    frame = 0;
    const [wide, high] = [canvas.clientWidth, canvas.clientHeight];
    if (!wide) return void watchSize(); // not laid out
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [wide, high].map((side) => Math.round(side * scale));
    // only then: each new size, even the same one, takes new memory
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const look = getComputedStyle(canvas);
    const c = canvas.getContext("2d");
    c.setTransform(scale, 0, 0, scale, 0, 0);
    c.fillStyle = look.getPropertyValue("--jp-layout-color0").trim() || "#fff";
    c.fillRect(0, 0, wide, high);
    const view = model.get("_heights");
    const heights = new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
    const largest = heights.reduce((a, b) => Math.max(a, b), 0) || 1;
    const [series, names, chosen] = [model.get("_series"), model.get("names"), model.get("chosen")];
    const bottom = high - MARGIN.bottom;
    const bar = (slot() * 0.8) / Math.max(series.length, 1);
    const x = (index) => MARGIN.left + slot() * index;
    c.fillStyle = look.color;
    for (const [index, alpha] of [[chosen, 0.3], [under, 0.15]]) {
      if (index < 0 || index >= count()) continue;
      c.globalAlpha = alpha;
      c.fillRect(x(index), MARGIN.top, slot(), bottom - MARGIN.top);
      c.globalAlpha = 1;
    }
    series.forEach(({ colour }, which) => {
      c.fillStyle = colour;
      for (let index = 0; index < count(); index++) {
        const height = (heights[which * count() + index] / largest) * (bottom - MARGIN.top - 2);
        c.fillRect(x(index) + slot() * 0.1 + bar * which, bottom - height, Math.max(bar, 0.7), height);
      }
    });
    c.fillStyle = look.color;
    c.fillRect(MARGIN.left, bottom, slot() * count(), 1);
    c.font = `12px ${look.fontFamily}`;
    c.textBaseline = "middle";
    c.textAlign = "left";
    c.fillText(model.get("title"), MARGIN.left, 11, wide - MARGIN.left - MARGIN.right);
    c.textAlign = "right";
    c.fillText(`${Number(largest.toPrecision(3))}`, MARGIN.left - 7, MARGIN.top + 4);
    c.fillText("0", MARGIN.left - 7, bottom);
    const shown = under >= 0 ? under : chosen;
    const label = names[shown] ?? model.get("none");
    c.textAlign = "center";
    c.font = `600 12px ${look.fontFamily}`;
    const half = c.measureText(label).width / 2;
    const middle = shown >= 0 ? x(shown) + slot() / 2 : MARGIN.left + half;
    c.fillText(label, Math.min(Math.max(middle, MARGIN.left + half), wide - MARGIN.right - half), bottom + 11);
    const said = { label: model.get("title"), valuemin: -1, valuemax: count() - 1, valuenow: chosen };
    said.valuetext = names[chosen] ?? model.get("none");
    for (const [name, what] of Object.entries(said)) canvas.setAttribute(`aria-${name}`, what);
  }

  canvas.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    canvas.focus({ preventScroll: true });
    if (event.button === 0 && at(event) >= 0) choose(at(event));
  });
  const hover = (event) => {
    under = event.type === "pointermove" ? at(event) : -1;
    ask();
  };
  canvas.addEventListener("pointermove", hover);
  canvas.addEventListener("pointerleave", hover);
  canvas.addEventListener("keydown", key);
  model.on("change", ask);
  const size = new ResizeObserver(ask);
  /** Have the observer call as soon as there is a size, even if it is the one it called for last. */
  function watchSize() { // JupyterLab hides the page, at a change of theme, and shows it again within one frame
    size.disconnect();
    size.observe(canvas);
  }
  watchSize();
  const theme = new MutationObserver(ask);
  theme.observe(document.body, { attributeFilter: ["data-jp-theme-name"] });
  return () => {
    model.off("change", ask);
    size.disconnect();
    theme.disconnect();
    cancelAnimationFrame(frame);
  };
}

export default { render };
