// Saves any view of the panel it stands in as SVG or PNG. The page does it alone: nothing is asked of the kernel, and it may be busy.
//
// A view is an SVG picture, or an element with functions `alSVG`, which draws it as one, and `alName` (empty while there is nothing to be seen). What the page lends it (colours of the theme, the
// background) is written into the file, so that it looks the same elsewhere.
const NS = "http://www.w3.org/2000/svg";
const LOOK = ".al-keep { display:flex; flex-wrap:wrap; gap:6px; align-items:center; } .al-keep select { max-width:22em; } "
  + ".al-keep select, .al-keep button { font:inherit; color:inherit; background:var(--jp-layout-color1,#fff); border:1px solid var(--jp-border-color1,#bbb); border-radius:3px; padding:2px 8px; }";

const told = (svg) => (svg.getAttribute("aria-label") ?? "picture").split(". ")[0];

function views(root) {   // [name, () => svg] of what is to be seen, each once
  const found = [];
  for (const e of root.querySelectorAll(".al-live")) {
    if (!e.getClientRects().length) continue;
    if (e.alSVG) { if (e.alName()) found.push([e.alName(), e.alSVG]); continue; }
    for (const svg of e.querySelectorAll("svg")) if (!svg.parentElement.closest("svg") && svg.getClientRects().length) found.push([told(svg), () => svg]);
  }
  const seen = new Map();
  return found.map(([name, draw]) => { const n = (seen.get(name) ?? 0) + 1; seen.set(name, n); return [n > 1 ? `${name} (${n})` : name, draw]; });
}

function background(e) {
  for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (c && c !== "transparent" && !/, 0\)$/.test(c)) return c; }
  return "#fff";
}

function standalone(svg, place) {   // as text
  const copy = svg.cloneNode(true), look = getComputedStyle(place), box = svg.viewBox.baseVal, back = document.createElementNS(NS, "rect");
  const [x, y, w, h] = box?.width ? [box.x, box.y, box.width, box.height] : [0, 0, svg.clientWidth, svg.clientHeight];
  for (const [k, v] of Object.entries({ xmlns: NS, width: w, height: h, viewBox: `${x} ${y} ${w} ${h}` })) copy.setAttribute(k, v);
  for (const [k, v] of Object.entries({ x, y, width: w, height: h, fill: background(place) })) back.setAttribute(k, v);
  copy.querySelectorAll(".al-mark").forEach((e) => e.remove());
  copy.prepend(back);
  const text = new XMLSerializer().serializeToString(copy);
  return [text.replace(/var\((--[\w-]+)(?:,([^()]*(?:\([^()]*\)[^()]*)*))?\)/g, (_, name, otherwise) => look.getPropertyValue(name).trim() || otherwise || "currentColor"), w, h];
}

function give(blob, name) {
  const a = document.createElement("a");
  a.href = URL.createObjectURL(blob);
  a.download = name;
  a.click();
  setTimeout(() => URL.revokeObjectURL(a.href), 10_000);
}

function render({ model, el }) {
  const make = (tag, rest = {}) => { const e = Object.assign(document.createElement(tag), rest); e.setAttribute("data-lm-suppress-shortcuts", "true"); return e; };
  const menu = make("select", { title: "the picture that is saved" }), note = document.createElement("span"), style = document.createElement("style");
  const buttons = ["SVG", "PNG"].map((kind) => make("button", { type: "button", textContent: kind, title: `save the picture as ${kind}` }));
  menu.setAttribute("aria-label", "picture to be saved");
  note.setAttribute("role", "status");
  style.textContent = LOOK;
  el.classList.add("al-keep");
  el.append(style, "picture", menu, ...buttons, note);

  const root = () => { let found = el.closest(".al-panel"); while (found?.parentElement?.closest(".al-panel")) found = found.parentElement.closest(".al-panel"); return found ?? document.body; };
  let now = [];
  const refresh = () => {
    const before = menu.value, names = (now = views(root())).map(([name]) => name);
    if (names.join("\n") !== [...menu.options].map((o) => o.value).join("\n")) menu.replaceChildren(...names.map((name) => Object.assign(document.createElement("option"), { value: name, textContent: name })));
    if (names.includes(before)) menu.value = before;
  };
  for (const what of ["pointerenter", "focusin"]) el.addEventListener(what, refresh);

  async function save(kind) {
    refresh();
    const name = menu.value, draw = now.find(([n]) => n === name)?.[1];
    if (!draw) { note.textContent = "there is no picture yet"; return; }
    try {
      const svg = draw(), [text, w, h] = standalone(svg, svg.isConnected ? svg : root()), file = `${name.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "picture"}.${kind.toLowerCase()}`;
      const blob = new Blob([`<?xml version="1.0" encoding="UTF-8"?>\n${text}`], { type: "image/svg+xml" });
      if (kind === "SVG") give(blob, file);
      else {
        const image = new Image(), url = URL.createObjectURL(blob), canvas = document.createElement("canvas");
        image.src = url;
        await image.decode();
        Object.assign(canvas, { width: 2 * w, height: 2 * h });
        canvas.getContext("2d").drawImage(image, 0, 0, 2 * w, 2 * h);
        URL.revokeObjectURL(url);
        give(await new Promise((done) => canvas.toBlob(done, "image/png")), file);
      }
      note.textContent = `saved ${file}`;
    } catch (e) { note.textContent = `not saved: ${e.message ?? e}`; }
  }
  buttons.forEach((b) => b.addEventListener("click", () => save(b.textContent)));
  const timer = setTimeout(refresh, 1500);
  return () => clearTimeout(timer);
}

export default { render };
