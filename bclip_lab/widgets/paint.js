// The page's half of Paint (paint.py): a small picture, magnified, that is painted with the mouse or the keyboard.
//
// `pixels` is the picture as this page has it. What is painted is drawn here at once; during a stroke the kernel gets
// it at most once a frame, and not before it has handled what it got before. A change that the kernel makes is taken
// over unless something painted here is still on its way to the kernel.

const SIDE = 416; // CSS pixels of the canvas' longer side, about
const BOX = "width: 46px; font: inherit; color: inherit; background: var(--jp-layout-color1, #fff);";

function render({ model, el }) {
  const [width, height] = [model.get("width"), model.get("height")];
  const zoom = Math.max(2, Math.floor(SIDE / Math.max(width, height)));
  const backdrop = picture(bytes(model.get("backdrop")), width, height);
  let pixels = bytes(model.get("pixels"));
  let cursor = null; // the pixel under the pointer, or where the arrow keys have gone: [column, row]
  let stroke = null; // while the pointer is down: what names its stroke
  let unsent = null; // the stroke that the kernel has yet to learn of
  let sent = model.get("handled"); // what `handled` will be when all that was sent has been handled
  let frame = 0; // the frame that is asked for

  // --- the canvas and the tools ---

  el.dataset.lmSuppressShortcuts = "true"; // else JupyterLab takes the arrow keys
  el.style.cssText = "font: 13px var(--jp-ui-font-family, sans-serif); color: var(--jp-ui-font-color1, #222);";
  const canvas = add(el, "canvas", {
    className: "bclip-lab-paint", width: width * zoom, height: height * zoom, tabIndex: 0, role: "application",
    ariaLabel: "Trigger: the arrow keys move the cursor, Space paints, Delete erases",
    style: "display: block; touch-action: none; image-rendering: pixelated; border: 1px solid #888; background: #808080;",
  });
  const tools = add(el, "div", {
    style: `display: flex; flex-wrap: wrap; gap: 6px; align-items: center; padding: 4px 0; width: ${width * zoom}px;`,
  });
  const colour = add(tools, "input", { type: "color", value: "#ff0000", title: "Any colour", ariaLabel: "colour" });
  for (const name of model.get("colours")) {
    const style = `width: 22px; height: 22px; padding: 0; border: 1px solid #888; background: ${name};`;
    const swatch = add(tools, "button", { title: name, ariaLabel: `colour ${name}`, style });
    swatch.onclick = () => { colour.value = name; eraser.checked = false; };
  }
  const eraser = add(add(tools, "label", { textContent: "eraser " }), "input", { type: "checkbox" });
  const number = (name, value, min, max, step, title) => {
    const label = add(tools, "label", { textContent: `${name} `, title });
    return add(label, "input", { type: "number", min, max, step, value, style: BOX });
  };
  const size = number("size", 1, 1, Math.min(width, height), 1, "Side of the square brush in pixels");
  const opacity = number("opacity %", 100, 5, 100, 5, "How much of the image the paint covers");
  const said = add(el, "div", { className: "bclip-lab-painted", role: "status" });

  // --- painting ---

  const limited = (box) => Math.min(Math.max(Number(box.value) || 0, Number(box.min)), Number(box.max));

  /** The corner of the brush, and its side, where it is held at a pixel. */
  function brush([column, row]) {
    const side = Math.round(limited(size));
    return [column - Math.floor((side - 1) / 2), row - Math.floor((side - 1) / 2), side];
  }

  function dab(at, erase) {
    const rgb = [1, 3, 5].map((start) => parseInt(colour.value.slice(start, start + 2), 16));
    const rgba = erase ? [0, 0, 0, 0] : [...rgb, Math.round(2.55 * limited(opacity))];
    const [left, top, side] = brush(at);
    for (let row = Math.max(top, 0); row < Math.min(top + side, height); row++) {
      for (let column = Math.max(left, 0); column < Math.min(left + side, width); column++) {
        pixels.set(rgba, 4 * (row * width + column));
      }
    }
  }

  /** Paint from where the pointer was to where it is: a quick hand leaves no gaps. */
  function line(from, to) {
    const steps = Math.max(Math.abs(to[0] - from[0]), Math.abs(to[1] - from[1]), 1);
    for (let step = 1; step <= steps; step++) {
      dab(from.map((start, axis) => Math.round(start + ((to[axis] - start) * step) / steps)), eraser.checked);
    }
    unsent = stroke;
  }

  const place = (event) => [Math.floor(event.offsetX / zoom), Math.floor(event.offsetY / zoom)];

  function press(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    stroke = Date.now();
    cursor = place(event);
    move(event);
  }

  function move(event) {
    const at = place(event);
    if (stroke !== null) line(cursor, at);
    cursor = at;
    ask();
  }

  function release(event) {
    if (stroke === null) return;
    if (event.type === "pointerup") move(event);
    stroke = null;
    if (unsent !== null) send(unsent); // at once: no frame comes to a page that is hidden meanwhile
  }

  function key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    const erase = event.key === "Delete" || event.key === "Backspace";
    if (!step && !erase && event.key !== " ") return;
    event.preventDefault();
    const last = [width - 1, height - 1];
    const at = cursor ?? last.map((end) => Math.floor(end / 2));
    cursor = at.map((start, axis) => Math.min(Math.max(start + (step?.[axis] ?? 0), 0), last[axis]));
    if (!step) {
      dab(cursor, erase || eraser.checked);
      send(Date.now());
    }
    ask();
  }

  // --- the kernel ---

  function send(stroke) {
    tell(model, { stroke }, undefined, [pixels.slice().buffer]);
    unsent = null;
    sent += 1;
  }

  function follow() {
    if (stroke === null && unsent === null && model.get("handled") >= sent) {
      pixels = bytes(model.get("pixels"));
      sent = model.get("handled");
    }
    ask();
  }

  // --- drawing ---

  const ask = () => (frame ||= requestAnimationFrame(draw));

  function draw() {
    frame = 0;
    if (unsent !== null && model.get("handled") >= sent) send(unsent); // else `follow` asks again
    const context = canvas.getContext("2d");
    const whole = [0, 0, canvas.width, canvas.height];
    context.imageSmoothingEnabled = false;
    context.clearRect(...whole);
    context.globalAlpha = 0.5;
    context.drawImage(backdrop, ...whole);
    context.globalAlpha = 1;
    context.drawImage(picture(pixels, width, height), ...whole);
    context.fillStyle = "rgba(128, 128, 128, 0.3)";
    for (let column = 1; column < width; column++) context.fillRect(column * zoom, 0, 1, canvas.height);
    for (let row = 1; row < height; row++) context.fillRect(0, row * zoom, canvas.width, 1);
    if (cursor) {
      const [left, top, side] = brush(cursor).map((edge) => edge * zoom);
      context.strokeStyle = "#fff";
      context.strokeRect(left + 0.5, top + 0.5, side, side);
      context.strokeStyle = "#000";
      context.strokeRect(left - 0.5, top - 0.5, side + 2, side + 2);
    }
    const inside = cursor?.every((place, axis) => place >= 0 && place < [width, height][axis]);
    said.textContent = inside ? describe(cursor) : "Paint with the mouse, or with the arrow keys, Space and Delete.";
  }

  function describe([column, row]) {
    const [r, g, b, a] = pixels.subarray(4 * (row * width + column));
    const hex = [r, g, b].map((value) => value.toString(16).padStart(2, "0")).join("");
    return `row ${row}, column ${column}: ${a ? `#${hex}, ${Math.round(a / 2.55)} %` : "nothing painted"}`;
  }

  const hands = { pointerdown: press, pointermove: move, pointerup: release, pointercancel: release, keydown: key };
  for (const [event, react] of Object.entries(hands)) canvas.addEventListener(event, react);
  size.addEventListener("input", ask);
  model.on("change", follow);
  ask();
  return () => {
    model.off("change", follow);
    cancelAnimationFrame(frame);
  };
}

/** A new element in another, with properties. */
function add(parent, tag, properties = {}) {
  return parent.appendChild(Object.assign(document.createElement(tag), properties));
}

/** A copy of the bytes that a trait holds. */
function bytes(view) {
  return new Uint8ClampedArray(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));
}

/** RGBA bytes as a canvas of their own size. */
function picture(rgba, width, height) {
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  canvas.getContext("2d").putImageData(new ImageData(rgba, width, height), 0, 0);
  return canvas;
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
