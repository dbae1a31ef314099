// The page's half of ClickPicture (click.py): a picture that says where it was clicked and which key was pressed.

const KEYS = [
  "ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "PageUp", "PageDown", "Home", "End", "Enter", " ",
];

function render({ model, el }) {
  const image = document.createElement("img");
  image.className = "bclip-lab-click bclip-lab-picture";
  image.tabIndex = 0;
  image.draggable = false;
  image.setAttribute("role", "application"); // else a screen reader keeps the arrow keys to itself
  image.dataset.lmSuppressShortcuts = "true"; // else JupyterLab takes them
  image.style.cssText = "display: block; max-width: 100%; cursor: pointer;";
  el.append(image);

  function draw() {
    const before = image.src;
    image.src = URL.createObjectURL(new Blob([model.get("png")], { type: "image/png" }));
    if (before) URL.revokeObjectURL(before);
  }

  function name() {
    image.alt = model.get("label");
    image.setAttribute("aria-label", model.get("label"));
  }

  function press(event) {
    if (event.button !== 0) return;
    const box = image.getBoundingClientRect();
    const share = (at, from, length) => Math.min(Math.max((at - from) / length, 0), 1);
    // from the lower left corner, as matplotlib counts
    tell(model, {
      x: share(event.clientX, box.left, box.width),
      y: 1 - share(event.clientY, box.top, box.height),
    });
  }

  function key(event) {
    if (!KEYS.includes(event.key) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault(); // else the page scrolls
    tell(model, { key: event.key });
  }

  image.addEventListener("click", press);
  image.addEventListener("keydown", key);
  model.on("change:png", draw);
  model.on("change:label", name);
  draw();
  name();

  return () => {
    model.off("change:png", draw);
    model.off("change:label", name);
    URL.revokeObjectURL(image.src);
  };
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
