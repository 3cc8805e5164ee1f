// A picture that can be pointed at. The page moves the mark at once; the kernel hears of the newest place.
//
// trait  type           meaning
// svg    string         the picture, made by adaptive_lab.draw (all text in it is escaped there)
// point  [x, y] or []   the chosen place in the coordinates of the picture's viewBox; set from both sides
// box    [l, t, r, b]   the area that can be pointed at, in the same coordinates; [] is the whole picture
// held   bool           true while the pointer is down or an arrow key is held: more places will follow
// step   number         how far an arrow key goes, with shift five times as far
// label  string         what the place is, read aloud
//
// Widget messages go one at a time: while the kernel is busy with one, newer values take the place of those that wait.
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function render({ model, el }) {
  el.classList.add("al-live", "al-pointer");
  el.tabIndex = 0;
  el.setAttribute("data-lm-suppress-shortcuts", "true");   // or JupyterLab takes the arrows
  el.setAttribute("role", "application");
  el.style.touchAction = "none";
  const picture = document.createElement("div");
  el.append(picture);
  const svg = () => picture.querySelector("svg");
  let frame = 0, waiting = null;

  const area = () => {
    const given = model.get("box"), view = svg()?.viewBox.baseVal;
    return given.length === 4 ? given : view ? [view.x, view.y, view.x + view.width, view.y + view.height] : null;
  };
  const place = (event) => {   // from the page to the picture, however it is scaled
    const matrix = svg()?.getScreenCTM();
    if (!matrix) return null;
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(matrix.inverse());
    return [at.x, at.y];
  };
  const inside = ([x, y], [l, t, r, b]) => x >= l && x <= r && y >= t && y <= b;
  const clamp = ([x, y], [l, t, r, b]) => [Math.min(r, Math.max(l, x)), Math.min(b, Math.max(t, y))];

  function mark() {
    svg()?.querySelector(".al-mark")?.remove();
    const at = waiting?.point ?? model.get("point");
    const told = at.length === 2 ? `${at[0].toFixed(0)}, ${at[1].toFixed(0)}` : "no place chosen";
    el.setAttribute("aria-label", `${model.get("label")}: ${told}. Click, drag, or use the arrow keys`);
    if (!svg() || at.length !== 2) return;
    const g = document.createElementNS("http://www.w3.org/2000/svg", "g");
    g.setAttribute("class", "al-mark");
    g.setAttribute("pointer-events", "none");
    g.innerHTML = `<g transform="translate(${at[0]} ${at[1]})" fill="none"><circle r="8" stroke="var(--jp-layout-color0,#fff)" stroke-width="5"/>`
      + '<path d="M-13 0h7m12 0h7M0 -13v7m0 12v7" stroke="var(--jp-layout-color0,#fff)" stroke-width="4"/><circle r="8" stroke="#d55e00" stroke-width="2.5"/>'
      + '<path d="M-13 0h7m12 0h7M0 -13v7m0 12v7" stroke="#d55e00" stroke-width="2"/></g>';
    svg().append(g);
  }
  function draw() {
    picture.innerHTML = model.get("svg");
    if (svg()) svg().style.height = "auto";   // narrower than it was made for, it keeps its shape
    mark();
  }
  function send() {   // once a frame at most
    frame = 0;
    if (!waiting) return;
    model.set(waiting);
    waiting = null;
    model.save_changes();
  }
  function tell(point, held) {
    waiting = { point: point ?? waiting?.point ?? model.get("point"), held };
    mark();
    if (!held) { cancelAnimationFrame(frame); send(); } else if (!frame) frame = requestAnimationFrame(send);
  }

  let down = false;
  const move = (event) => { const at = place(event), box = area(); if (at && box) tell(clamp(at, box), true); };
  el.addEventListener("pointerdown", (event) => {
    const at = place(event), box = area();
    if (event.button !== 0 || !at || !box || !inside(at, box)) return;
    event.preventDefault();   // no text is selected
    el.focus({ preventScroll: true });
    el.setPointerCapture(event.pointerId);
    down = true;
    move(event);
  });
  el.addEventListener("pointermove", (event) => { if (down) move(event); });
  const up = () => { if (down) { down = false; tell(null, false); } };
  el.addEventListener("pointerup", up);
  el.addEventListener("pointercancel", up);
  el.addEventListener("keydown", (event) => {
    const to = KEYS[event.key], box = area();
    if (!to || !box || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    const now = waiting?.point ?? model.get("point"), from = now.length === 2 ? now : [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2];
    const far = model.get("step") * (event.shiftKey ? 5 : 1);
    tell(clamp([from[0] + far * to[0], from[1] + far * to[1]], box), true);
  });
  const rest = () => { if (!down && (waiting?.held ?? model.get("held"))) tell(null, false); };
  el.addEventListener("keyup", (event) => { if (KEYS[event.key]) rest(); });
  el.addEventListener("blur", rest);

  model.on("change:svg", draw);
  model.on("change:point change:label", mark);
  draw();
  return () => { cancelAnimationFrame(frame); model.off("change:svg", draw); model.off("change:point change:label", mark); };
}

export default { render };
