// One live picture. The kernel writes an SVG string into the trait `svg`; the page shows the newest one.
//
// trait  type    meaning
// svg    string  the picture, made by adaptive_lab.draw (all text in it is escaped there)
//
// The picture also guards its panel: JupyterLab runs its shortcuts for every key pressed in an output (a and b insert
// cells, the arrows move between them) unless the focused element itself is marked. A mark on a parent does not help,
// so each focusable element of the panel is marked, those added later as well.
const FOCUSABLE = "a[href], button, input, select, textarea, summary, [tabindex], [contenteditable]";
const MARK = "data-lm-suppress-shortcuts";

function guard(root) {
  if (root.dataset.alGuarded) return;
  root.dataset.alGuarded = "true";
  const mark = () => root.querySelectorAll(FOCUSABLE).forEach((e) => {
    if (e.getAttribute(MARK) !== "true") e.setAttribute(MARK, "true");
  });
  mark();
  new MutationObserver(mark).observe(root, { subtree: true, childList: true, attributes: true, attributeFilter: ["tabindex", "contenteditable"] });
}

function render({ model, el }) {
  el.classList.add("al-live");
  const draw = () => { el.innerHTML = model.get("svg"); };
  model.on("change:svg", draw);
  draw();
  const find = () => {   // the panel is attached to the page a moment after its parts are made
    const root = el.closest(".al-panel");
    if (root) guard(root); else if (tries-- > 0) setTimeout(find, 50);
  };
  let tries = 100;
  find();
  return () => model.off("change:svg", draw);
}

export default { render };
