// The gates of a model, to be clicked and dragged. The page shows a change at once; the kernel hears of it a moment later.
//
// trait    type             meaning
// gates    rows of numbers  a row a layer, heads then feed-forward network then the whole layer: a gate in [0, 1], null where it was removed
// bars     the same, or []  a second number in [0, 1] for each, drawn as a small bar; null for none
// notes    rows of strings  what is told of each beside its gate; [] for nothing
// scale    string           what the bars mean
// asked    [[row, column, gate], …]  what the page wants and the kernel has not yet heard of
// turn     integer          goes up with each request
// heard    integer          the last request that the kernel has dealt with: from there on `gates` counts
// gesture  integer          goes up with each click, drag or key: what belongs together is undone together
// chosen   [row, column]    the gate that has the focus, or had it last
// held     bool             true while a gate is dragged: more values will follow
// locked   bool             true when nothing can be changed
// label    string           what this is, read aloud
//
// Widget messages go one at a time: while the kernel is busy with one, newer values take the place of those that wait. So
// `asked` holds all that is not yet heard of, and is not only the last change.
const SPAN = 96;   // pixels of dragging from 0 to 1; with shift four times as many
const STYLE = `
.al-gates { --shut:#2f3640; --open:#4c9fd8; display:inline-block; max-width:100%; overflow-x:auto; padding:3px; font:11px/1.2 system-ui,sans-serif; color:var(--jp-ui-font-color1,#222); }
.al-gates .row { display:flex; gap:3px; margin-bottom:3px; align-items:center; }
.al-gates .name { flex:none; width:48px; padding-right:5px; text-align:right; opacity:.7; white-space:nowrap; }
.al-gates .head { flex:none; width:var(--w); text-align:center; opacity:.7; overflow:hidden; }
.al-gates .cell { flex:none; width:var(--w); height:var(--h); position:relative; box-sizing:border-box; border-radius:3px; overflow:hidden; cursor:pointer; touch-action:none; user-select:none;
  background:linear-gradient(to top, var(--open) calc(100% * var(--v)), var(--shut) 0); border:1px solid color-mix(in srgb, currentColor 30%, transparent); }
.al-gates .cell.removed { background:none; border-style:dashed; border-color:color-mix(in srgb, currentColor 50%, transparent); cursor:default; }
.al-gates .apart { margin-left:8px; }
.al-gates .pale { opacity:.35; }
.al-gates .cell[aria-selected=true] { outline:2px solid var(--jp-ui-font-color1,#222); outline-offset:1px; }
.al-gates .cell:focus-visible { outline:2px solid #d55e00 !important; outline-offset:1px; }
.al-gates .cell span { position:absolute; inset:0; display:grid; place-items:center; color:#fff; text-shadow:0 0 2px #000,0 0 2px #000; font-variant-numeric:tabular-nums; pointer-events:none; }
.al-gates .cell i { position:absolute; left:3px; bottom:2px; height:3px; max-width:calc(100% - 6px); background:#ffc33b; box-shadow:0 0 0 1px rgba(0,0,0,.55); border-radius:1px; pointer-events:none; }
.al-gates .told { min-height:2.5em; margin:5px 0 0 56px; width:0; min-width:calc(100% - 56px); opacity:.8; font-variant-numeric:tabular-nums; }
.al-gates .locked .cell { cursor:default; }`;

function render({ model, el }) {
  el.classList.add("al-live");
  const box = document.createElement("div"), style = document.createElement("style");
  const grid = document.createElement("div"), told = document.createElement("div");
  box.className = "al-gates";
  style.textContent = STYLE;
  told.className = "told";
  grid.setAttribute("role", "grid");
  box.append(style, grid, told);
  el.append(box);
  let cells = [], frame = 0, drag = null;
  const open = new Map();   // "row,column" -> [gate, turn]: what the page wants and the kernel has not heard of

  const many = () => (model.get("gates")[0] ?? []).length;
  const value = (r, c) => open.get(`${r},${c}`)?.[0] ?? model.get("gates")[r][c];
  const word = (c) => (c === many() - 1 ? "layer" : c === many() - 2 ? "ffn" : `${c}`);
  const name = (r, c) => (c === many() - 1 ? `layer ${r} as a whole` : c === many() - 2 ? `feed-forward network of layer ${r}` : `head ${c} of layer ${r}`);
  const part = (tag, cls, role, text = "") => { const e = document.createElement(tag); e.className = cls; e.setAttribute("role", role); e.textContent = text; return e; };

  function describe(r, c) {
    const v = value(r, c), note = model.get("notes")[r]?.[c];
    return `${name(r, c)}, gate ${(v ?? 0).toFixed(2)}${v === null ? ", removed" : ""}${note ? `, ${note}` : ""}`;
  }

  function build() {   // the cells, when there are other ones than before
    const rows = model.get("gates").length, columns = many(), width = columns > 26 ? 12 : columns > 16 ? 22 : columns > 10 ? 28 : 38;
    grid.replaceChildren();
    grid.style.setProperty("--w", `${width}px`);
    grid.style.setProperty("--h", `${rows > 12 ? 14 : rows > 6 ? 20 : rows > 3 ? 26 : 32}px`);
    const head = part("div", "row", "row");
    head.append(part("div", "name", "columnheader"));
    for (let c = 0; c < columns; c++) {
      const every = width < 20 ? 8 : 1, e = part("div", `head${c === columns - 2 ? " apart" : ""}`, "columnheader", c < columns - 2 && c % every ? "" : word(c));
      if (width < 28 && c >= columns - 2) e.textContent = word(c)[0];
      head.append(e);
    }
    grid.append(head);
    cells = [];
    for (let r = 0; r < rows; r++) {
      const row = part("div", "row", "row");
      row.append(part("div", "name", "rowheader", `layer ${r}`));
      cells.push([]);
      for (let c = 0; c < columns; c++) {
        const cell = part("div", `cell${c === columns - 2 ? " apart" : ""}`, "gridcell");
        cell.append(document.createElement("i"), document.createElement("span"));
        cell.tabIndex = -1;
        cell.setAttribute("data-lm-suppress-shortcuts", "true");   // or JupyterLab takes the keys
        cell.dataset.at = `${r},${c}`;
        row.append(cell);
        cells[r].push(cell);
      }
      grid.append(row);
    }
  }

  function paint(r, c) {
    const cell = cells[r]?.[c];
    if (!cell) return;
    const v = value(r, c), bar = model.get("bars")[r]?.[c], words = describe(r, c), [bars, text] = cell.children;
    const pale = c < many() - 1 && value(r, many() - 1) === 0;
    cell.classList.toggle("removed", v === null);
    cell.classList.toggle("pale", pale && v !== null);
    cell.style.setProperty("--v", v ?? 0);
    const shown = v !== null && v > 0 && v < 1 ? v.toFixed(2).slice(1) : "";
    if (text.textContent !== shown) text.textContent = shown;
    bars.style.width = `${100 * (bar ?? 0)}%`;
    bars.style.display = v === null || !(bar > 0.04) ? "none" : "";
    if (cell.getAttribute("aria-label") !== words) { cell.setAttribute("aria-label", words); cell.title = words; }
  }
  function choose() {
    const [row, column] = model.get("chosen");
    cells.forEach((cs, r) => cs.forEach((cell, c) => {
      const here = r === row && c === column;
      cell.tabIndex = here || (row === undefined && r === 0 && c === 0) ? 0 : -1;
      cell.setAttribute("aria-selected", here);
    }));
    tell();
  }
  function tell(at = model.get("chosen")) {
    told.textContent = cells[at[0]]?.[at[1]] ? describe(...at) : model.get("locked") ? "" : `click or drag a gate${model.get("scale") ? `; bars: ${model.get("scale")}` : ""}`;
  }
  function draw() {
    if (cells.length !== model.get("gates").length || (cells[0] ?? []).length !== many()) build();
    grid.setAttribute("aria-label", `${model.get("label")}${model.get("scale") ? `; bars: ${model.get("scale")}` : ""}. Arrow keys move, plus, minus, 0, 1 and space change`);
    grid.setAttribute("aria-readonly", model.get("locked"));
    grid.classList.toggle("locked", model.get("locked"));
    cells.forEach((cs, r) => cs.forEach((_, c) => paint(r, c)));
    choose();
  }
  function hear() {   // the kernel has dealt with requests up to `heard`
    for (const [key, [, turn]] of open) if (turn <= model.get("heard")) open.delete(key);
    draw();
  }

  function send() {   // once a frame at most
    frame = 0;
    model.set({ asked: [...open].map(([key, [v]]) => [...key.split(",").map(Number), v]), held: Boolean(drag?.moved) });
    model.save_changes();
  }
  function ask(r, c, v) {
    v = Math.round(Math.min(1, Math.max(0, v)) * 100) / 100;
    if (model.get("locked") || value(r, c) === null || value(r, c) === v) return;
    const turn = model.get("turn") + 1;
    model.set({ turn });
    open.set(`${r},${c}`, [v, turn]);
    if (c === many() - 1) cells[r].forEach((_, k) => paint(r, k)); else paint(r, c);
    tell([r, c]);
    if (!frame) frame = requestAnimationFrame(send);
  }
  function pick(r, c) {
    model.set({ chosen: [r, c] });
    choose();
    cells[r][c].focus({ preventScroll: true });
    if (!frame) frame = requestAnimationFrame(send);
  }
  const gesture = () => model.set({ gesture: model.get("gesture") + 1 });
  const toggle = (r, c) => ask(r, c, value(r, c) > 0 ? 0 : 1);
  const place = (event) => event.target.closest?.(".cell")?.dataset.at.split(",").map(Number);

  grid.addEventListener("pointerdown", (event) => {
    const at = place(event);
    if (event.button !== 0 || !at) return;
    event.preventDefault();   // no text is selected
    pick(...at);
    drag = { at, x: event.clientX, y: event.clientY, from: value(...at), axis: "", moved: false };
    event.target.closest(".cell").setPointerCapture(event.pointerId);
  });
  grid.addEventListener("pointermove", (event) => {
    if (!drag) { const at = place(event); if (at) tell(at); return; }
    const dx = event.clientX - drag.x, dy = drag.y - event.clientY;
    if (!drag.axis && Math.max(Math.abs(dx), Math.abs(dy)) < 4) return;
    drag.axis ||= Math.abs(dx) > Math.abs(dy) ? "x" : "y";
    if (!drag.moved) gesture();
    drag.moved = true;
    if (drag.from !== null) ask(...drag.at, drag.from + (drag.axis === "x" ? dx : dy) / (event.shiftKey ? 4 * SPAN : SPAN));
  });
  grid.addEventListener("pointerleave", () => { if (!drag) tell(); });
  const up = (event) => {
    if (!drag) return;
    const { at, moved } = drag;
    drag = null;
    if (!moved && event.type === "pointerup") { gesture(); toggle(...at); }
    if (moved && !frame) frame = requestAnimationFrame(send);
  };
  grid.addEventListener("pointerup", up);
  grid.addEventListener("pointercancel", up);
  grid.addEventListener("focusin", (event) => {
    const at = place(event), now = model.get("chosen");
    if (at && (at[0] !== now[0] || at[1] !== now[1])) pick(...at);
  });
  grid.addEventListener("keydown", (event) => {
    const at = place(event);
    if (!at || event.ctrlKey || event.altKey || event.metaKey) return;
    const [r, c] = at, last = many() - 1, v = value(r, c);
    const to = { ArrowLeft: [r, c - 1], ArrowRight: [r, c + 1], ArrowUp: [r - 1, c], ArrowDown: [r + 1, c], Home: [r, 0], End: [r, last] }[event.key];
    const set = { "+": v + 0.1, "=": v + 0.1, "-": v - 0.1, 0: 0, 1: 1 }[event.key];
    if (!to && set === undefined && event.key !== " " && event.key !== "Enter") return;
    event.preventDefault();
    event.stopPropagation();
    if (to) { if (cells[to[0]]?.[to[1]]) pick(...to); return; }
    gesture();
    if (set === undefined) toggle(r, c); else ask(r, c, set);
  });

  el.alName = () => model.get("label");
  el.alSVG = () => {   // the grid as a picture, for whoever saves it
    const make = (tag, more, text = "") => { const e = document.createElementNS("http://www.w3.org/2000/svg", tag); for (const [k, v] of Object.entries(more)) e.setAttribute(k, v); e.textContent = text; return e; };
    const all = grid.getBoundingClientRect(), svg = make("svg", { viewBox: `0 0 ${Math.ceil(all.width) + 8} ${Math.ceil(all.height) + 30}`, "aria-label": model.get("label"), "font-family": "system-ui,sans-serif", "font-size": 11,
      style: "color:var(--jp-ui-font-color1,#222)", fill: "currentColor" });
    const put = (e, dx = 4, dy = 22) => { const b = e.getBoundingClientRect(); return [b.left - all.left + dx, b.top - all.top + dy, b.width, b.height]; };
    svg.append(make("text", { x: 8, y: 13, "font-weight": 600 }, model.get("label")));
    grid.querySelectorAll(".head, .name").forEach((e) => { const [x, y, w, h] = put(e), right = e.classList.contains("name"); svg.append(make("text", { x: right ? x + w - 5 : x + w / 2, y: y + h / 2 + 4, "text-anchor": right ? "end" : "middle", "fill-opacity": 0.7 }, e.textContent)); });
    cells.forEach((row, r) => row.forEach((cell, c) => {
      const [x, y, width, height] = put(cell), v = value(r, c), bar = model.get("bars")[r]?.[c];
      if (v === null) { svg.append(make("rect", { x, y, width, height, rx: 3, fill: "none", stroke: "currentColor", "stroke-opacity": 0.5, "stroke-dasharray": "3 2" })); return; }
      svg.append(make("rect", { x, y, width, height, rx: 3, fill: "#2f3640" }), make("rect", { x, y: y + height * (1 - v), width, height: height * v, rx: 3, fill: "#4c9fd8" }));
      if (v > 0 && v < 1) svg.append(make("text", { x: x + width / 2, y: y + height / 2 + 4, "text-anchor": "middle", fill: "#fff" }, v.toFixed(2).slice(1)));
      if (bar > 0.04) svg.append(make("rect", { x: x + 3, y: y + height - 5, width: (width - 6) * bar, height: 3, fill: "#ffc33b" }));
    }));
    return svg;
  };

  model.on("change:gates change:bars change:notes change:label change:scale change:locked", draw);
  model.on("change:heard", hear);
  model.on("change:chosen", choose);
  draw();
  return () => {
    cancelAnimationFrame(frame);
    model.off("change:gates change:bars change:notes change:label change:scale change:locked", draw);
    model.off("change:heard", hear);
    model.off("change:chosen", choose);
  };
}

export default { render };
