// The page's half of DragLine (drag.py): step histograms, and one vertical line that is dragged over them.
//
// The line follows the pointer here, in the page; the kernel gets its value at most once a frame.

const MARGIN = { left: 62, right: 24, top: 46, bottom: 46 }; // around the plot; title and legend are above it
const GRAB = 8; // so near to the line a press takes hold of it; farther away the line jumps to the pointer
const PAUSE = 1000; // ms: keys that follow one another faster are one gesture

function render({ model, el }) {
  const canvas = document.createElement("canvas");
  canvas.className = "bclip-lab-drag";
  canvas.tabIndex = 0;
  canvas.setAttribute("role", "slider");
  canvas.setAttribute("aria-orientation", "horizontal");
  canvas.dataset.lmSuppressShortcuts = "true"; // else JupyterLab takes the arrow keys
  canvas.style.cssText =
    `display: block; width: 100%; height: ${model.get("height")}px; cursor: ew-resize; touch-action: pan-y;` +
    "color: var(--jp-ui-font-color1, #222); font-family: var(--jp-ui-font-family, sans-serif);";
  el.append(canvas);

  let value = model.get("value");
  let grip = null; // while dragging: how far right of the line it was taken
  let unsent = false; // whether the kernel has yet to learn of `value`
  let frame = 0; // the frame that is asked for, if any
  let lastKey = -Infinity;

  /** Where the plot is, and how the axis maps to it. */
  function axis() {
    const [low, high] = [model.get("low"), model.get("high")];
    const [left, width] = [MARGIN.left, canvas.clientWidth - MARGIN.left - MARGIN.right];
    const [top, height] = [MARGIN.top, canvas.clientHeight - MARGIN.top - MARGIN.bottom];
    return {
      low, high, left, top, width, height, right: left + width, bottom: top + height,
      within: (x) => Math.min(Math.max(x, low), high),
      toPixel: (x) => left + ((x - low) / (high - low)) * width,
      toValue: (pixel) => low + ((pixel - left) / width) * (high - low),
    };
  }

  const number = (x, digits) =>
    model.get("percent") ? `${Number((100 * x).toPrecision(digits))} %` : `${Number(x.toPrecision(digits))}`;
  const text = () => (value >= model.get("high") && model.get("at_high")) || number(value, 3);

  // --- moves, of the hand and of the kernel ---

  const ask = () => void (frame ||= requestAnimationFrame(paint));
  const drag = (event) => void (grip !== null && move(axis().toValue(event.offsetX - grip)));

  function beginGesture() { // sent with the next value
    model.set("gesture", model.get("gesture") + 1);
    model.set("_over", model.get("_drawn"));
  }

  function move(x) {
    value = axis().within(x);
    unsent = true;
    ask();
  }

  function send() {
    unsent = false;
    model.set("value", value);
    model.save_changes();
  }

  function press(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    beginGesture();
    const offset = event.offsetX - axis().toPixel(axis().within(value));
    grip = Math.abs(offset) <= GRAB ? offset : 0;
    if (grip !== offset) move(axis().toValue(event.offsetX));
  }

  function release(event) {
    if (grip === null && event.type !== "keyup") return;
    grip = null;
    send(); // at once: a page that is hidden meanwhile gets no frame
    // and past ipywidgets' queue of one, which waits for the kernel's "idle" and hangs where that is lost
    tell(model, { value, gesture: model.get("gesture"), _over: model.get("_over") });
  }

  function key(event) {
    const { low, high, within } = axis();
    const step = model.get("step") || (high - low) / 100;
    const steps = { ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1, PageUp: 10, PageDown: -10 }[event.key];
    const to = { Home: low, End: high }[event.key] ?? within(value) + step * steps;
    if (Number.isNaN(to) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    if (event.timeStamp - lastKey > PAUSE || model.get("_over") !== model.get("_drawn")) beginGesture();
    lastKey = event.timeStamp;
    move(to);
  }

  function follow() {
    if (grip === null && !unsent) value = model.get("value"); // the hand on the line comes first
    ask();
  }

  // --- drawing ---

  function paint() {
    if (unsent) send(); // while `frame` is set, so that no other frame is asked for
    frame = 0;
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight].map((side) => Math.round(side * scale));
    if (!width) return void watchSize(); // not laid out
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height];
    const look = getComputedStyle(canvas);
    const c = canvas.getContext("2d");
    c.setTransform(scale, 0, 0, scale, 0, 0);
    // not as the style of the canvas: Chromium does not repaint that when the theme changes
    const ground = look.getPropertyValue("--jp-layout-color0").trim() || "#fff";
    c.fillStyle = ground;
    c.fillRect(0, 0, canvas.clientWidth, canvas.clientHeight);
    const pen = { c, ink: look.color, ground, font: (weight, size) => `${weight} ${size}px ${look.fontFamily}` };
    const places = axis();
    drawPlot(pen, places);
    drawLine(pen, places);
    const [valuemin, valuemax] = [places.low, places.high];
    const said = { label: model.get("name"), valuemin, valuemax, valuenow: value, valuetext: text() };
    for (const [name, what] of Object.entries(said)) canvas.setAttribute(`aria-${name}`, what);
  }

  function drawPlot({ c, ink, font }, { low, high, left, top, width, height, right, bottom, toPixel }) {
    const [edges, heights] = ["_edges", "_heights"].map((name) => floats(model.get(name)));
    const series = model.get("_series");
    const bins = edges.length - 1;
    // heights: from `least`, which is above 0 on a logarithmic scale, to `most`
    const log = model.get("log_y");
    const positive = heights.filter((y) => y > 0);
    const most = positive.reduce((a, b) => Math.max(a, b), 0) * (log ? 1.5 : 1.08) || 1;
    const least = log ? positive.reduce((a, b) => Math.min(a, b), most) / 1.5 : 0;
    const share = (y) => (log ? Math.log(y / least) / Math.log(most / least) : y / most);
    const toY = (y) => bottom - (y > least ? share(y) : 0) * height;

    c.save();
    c.clip(new Path2D(`M${left} ${top}h${width}v${height}h${-width}z`));
    series.forEach(({ colour, hatched }, index) => {
      const steps = new Path2D();
      steps.moveTo(toPixel(edges[0]), bottom);
      for (let bin = 0; bin < bins; bin++) {
        const y = toY(heights[index * bins + bin]);
        steps.lineTo(toPixel(edges[bin]), y);
        steps.lineTo(toPixel(edges[bin + 1]), y);
      }
      steps.lineTo(toPixel(edges[bins]), bottom);
      fill(c, steps, colour, hatched, [left, top, width, height]);
    });
    c.restore();
    c.fillStyle = ink;
    c.font = font(400, 12);
    c.fillRect(left, bottom - 0.5, width, 1);
    c.fillRect(left - 0.5, top, 1, height);
    c.textBaseline = "middle";
    c.textAlign = "center";
    for (const x of ticks(low, high, width / 70)) {
      c.fillRect(toPixel(x) - 0.5, bottom, 1, 4);
      c.fillText(number(x, 6), toPixel(x), bottom + 13);
    }
    c.fillText(model.get("x_label"), left + width / 2, bottom + 34);
    c.textAlign = "right";
    const levels = log ? ticks(Math.log10(least), Math.log10(most), 1) : ticks(0, most, height / 40);
    for (const y of log ? levels.filter(Number.isInteger).map((power) => 10 ** power) : levels) {
      c.fillRect(left - 4, toY(y) - 0.5, 4, 1);
      c.fillText(`${Number(y.toPrecision(6))}`, left - 7, toY(y));
    }
    c.save();
    c.translate(10, top + height / 2);
    c.rotate(-Math.PI / 2);
    c.textAlign = "center";
    c.fillText(model.get("y_label"), 0, 0);
    c.restore();
    c.textAlign = "left";
    c.font = font(600, 14);
    c.fillText(model.get("title"), left, 12, right - left);
    c.font = font(400, 12);
    let x = left;
    for (const { name, colour, hatched } of series) {
      const swatch = new Path2D(`M${x} 27h22v11h-22z`);
      fill(c, swatch, colour, hatched, [x, 27, 22, 11]);
      c.fillStyle = ink;
      c.fillText(name, x + 28, 33);
      x += 46 + c.measureText(name).width;
    }
  }

  function drawLine({ c, ink, ground, font }, { top, height, right, bottom, within, toPixel }) {
    const x = toPixel(within(value));
    const label = `${model.get("name")} ${text()}`;
    c.fillStyle = ink;
    c.fillRect(x - 1.25, top, 2.5, height);
    c.beginPath();
    c.arc(x, (top + bottom) / 2, 6, 0, 2 * Math.PI); // a handle: it can be taken
    c.fill();
    c.font = font(600, 13);
    const wide = c.measureText(label).width + 8;
    const start = x + 5 + wide > right ? x - 5 - wide : x + 5;
    c.fillStyle = ground;
    c.fillRect(start, top + 2, wide, 18);
    c.fillStyle = ink;
    c.fillText(label, start + 4, top + 11);
  }

  const hands = { pointerdown: press, pointermove: drag, keydown: key };
  for (const [event, react] of Object.entries(hands)) canvas.addEventListener(event, react);
  for (const event of ["pointerup", "pointercancel", "keyup"]) canvas.addEventListener(event, release);
  model.on("change", follow);
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
    model.off("change", follow);
    size.disconnect();
    theme.disconnect();
    cancelAnimationFrame(frame);
  };
}

/** The numbers in the bytes of a little-endian float32 array. */
const floats = (view) => new Float32Array(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));

/** Round numbers in [from, to], about `count` of them. */
function ticks(from, to, count) {
  const rough = (to - from) / Math.max(count, 3);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((factor) => factor * power >= rough) ?? 10);
  const found = [];
  for (let n = Math.ceil(from / step - 1e-9); n * step <= to * (1 + 1e-9); n++) found.push(n * step);
  return found.map((x) => Number(x.toPrecision(6)));
}

/** Fill a path inside a box, plainly or with a hatch, and draw its outline. */
function fill(c, path, colour, hatched, [x, y, width, height]) {
  c.save();
  c.clip(path);
  c.fillStyle = c.strokeStyle = colour;
  c.globalAlpha = hatched ? 0.2 : 0.6;
  c.fillRect(x, y, width, height);
  c.globalAlpha = 1;
  c.beginPath();
  for (let start = x - height; hatched && start < x + width; start += 6) {
    c.moveTo(start, y + height);
    c.lineTo(start + height, y);
  }
  c.stroke();
  c.restore();
  c.strokeStyle = colour;
  c.stroke(path);
}

/** Send a message. Once the kernel has been restarted no one takes it: JupyterLab shows that beside the widget. */
function tell(model, ...message) {
  try {
    model.send(...message);
  } catch (error) {
    console.warn("bclip_lab:", error);
  }
}

export default { render };
