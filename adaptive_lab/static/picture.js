// One live picture. The kernel writes an SVG string into the trait `svg`; the page shows the newest one.
//
// trait  type    meaning
// svg    string  the picture, made by adaptive_lab.draw (all text in it is escaped there)
// tips   object  name of a control -> what it means, for check boxes, whose tooltip ipywidgets does not show
// arrive bool    bring the panel to the top of what is seen, once; the page sets it back
//
// The picture also guards its panel: JupyterLab runs its shortcuts for every key pressed in an output (a and b insert
// cells, the arrows move between them) unless the focused element itself is marked. A mark on a parent does not help,
// so each focusable element of the panel is marked, those added later as well. And it tells, in the panel's line of meanings, what the control
// that is pointed at or has the focus is for.
const FOCUSABLE = "a[href], button, input, select, textarea, summary, [tabindex], [contenteditable]";
const MARK = "data-lm-suppress-shortcuts";

// What a control means: its name, and the tooltip that it was given.
function told(e) {
  const control = e.closest?.(".widget-inline-hbox"), text = (x) => x.textContent.replaceAll("\u200b", "").trim();
  const name = [...(control?.querySelectorAll(".widget-label, .widget-label-basic") ?? [])].map(text).find(Boolean);
  const tip = [control, ...(control?.querySelectorAll("[title]") ?? [])].map((x) => x?.getAttribute("title")).find((t) => t && t !== "null" && t !== name)
    ?? [...document.querySelectorAll(".al-panel")].map((root) => root.contains(e) && root.alTips?.[name]).find(Boolean);
  return tip && name ? `${name}: ${tip}` : "";
}

// A column of controls may be longer than the page: the line comes along to the upper edge of what is seen, or below the control that it would hide.
function follow(line, control) {
  const seen = line.closest(".jp-WindowedPanel-outer")?.getBoundingClientRect().top ?? 0;
  line.style.transform = "";
  const home = line.getBoundingClientRect(), at = control.getBoundingClientRect();
  line.style.background = "var(--jp-layout-color0)";
  line.style.zIndex = 2;
  if (home.top >= seen || !line.parentElement.contains(control)) return;
  line.style.transform = `translateY(${(at.top < seen + home.height ? at.bottom : seen) - home.top}px)`;
}

// A reload finds the panel again, live, if the notebook's file has it: JupyterLab would save it within two minutes.
function keep(root) {
  const app = window.jupyterapp, notebook = app?.shell.currentWidget;
  if (notebook?.node.contains(root)) app.commands.execute("docmanager:save").catch(() => {});
}

// ipywidgets opens its sections by mouse only: their headers become buttons.
const HEADER = ".jupyter-widget-Collapse-header";
function heads(root) {
  root.querySelectorAll(HEADER).forEach((e) => {
    const open = String(!!e.parentElement.classList.contains("jupyter-widget-Collapse-open"));
    if (e.tabIndex !== 0) e.tabIndex = 0;
    if (e.getAttribute("role") !== "button") e.setAttribute("role", "button");
    if (e.getAttribute("aria-expanded") !== open) e.setAttribute("aria-expanded", open);
  });
}

function guard(root) {
  if (root.dataset.alGuarded) return;
  root.dataset.alGuarded = "true";
  const mark = () => { heads(root); root.querySelectorAll(FOCUSABLE).forEach((e) => {
    if (e.getAttribute(MARK) !== "true") e.setAttribute(MARK, "true");
    if (e.getAttribute("role") === "slider" && !e.hasAttribute("aria-label")) e.setAttribute("aria-label", told(e));
  }); };
  mark();
  root.tabIndex = -1;   // a click on a picture puts the focus here, not on the cell, whose shortcuts the next key would run
  root.style.outline = "none";
  root.setAttribute(MARK, "true");
  root.addEventListener("keydown", (event) => {
    const header = event.target.closest?.(HEADER);
    if (!header || event.defaultPrevented || (event.key !== "Enter" && event.key !== " ")) return;   // a panel in another has done it already
    event.preventDefault();
    header.click();
  });
  setTimeout(() => keep(root), 1500);
  for (const what of ["focusin", "pointerover"]) root.addEventListener(what, (event) => {
    const line = root.querySelector(".al-meaning .widget-html-content"), text = told(event.target);
    if (!line || !text) return;
    if (line.textContent !== text) line.textContent = text;
    line.style.lineHeight = "1.35";
    follow(line.closest(".al-meaning"), event.target.closest(".widget-inline-hbox"));
  });
  let due = 0;   // a moment later, not before the frame that the page is about to paint
  new MutationObserver(() => { due ||= setTimeout(() => { due = 0; mark(); }, 60); }).observe(root, { subtree: true, childList: true, attributes: true, attributeFilter: ["tabindex", "contenteditable", "class"] });
}

// When the kernel is restarted the controls are dead, which nothing else on the page says.
function mourn(el) {
  const root = el.closest(".al-panel");
  if (!root || root.querySelector(".al-gone")) return;
  const note = document.createElement("div");
  note.className = "al-gone";
  note.setAttribute("role", "alert");
  note.style.cssText = "color:#d55e00;font-weight:600;padding:4px";
  note.textContent = "The kernel was restarted or has ended: run this cell again. The pictures show where the run was.";
  root.prepend(note);
}

function render({ model, el }) {
  el.classList.add("al-live");
  const draw = () => { el.innerHTML = model.get("svg"); if (el.firstElementChild) el.firstElementChild.style.height = "auto"; };   // narrower than it was made for, it keeps its shape
  const gone = () => mourn(el);
  model.on("change:svg", draw);
  model.on("comm_live_update", gone);
  draw();
  const find = () => {   // the panel is attached to the page a moment after its parts are made
    const root = el.closest(".al-panel");
    if (!root) return tries-- > 0 && setTimeout(find, 50);
    for (let r = root; r; r = r.parentElement.closest(".al-panel")) {   // a panel may stand in another
      guard(r);
      r.alTips = { ...r.alTips, ...model.get("tips") };
    }
    if (!model.get("arrive")) return;
    model.set("arrive", false);
    model.save_changes();
    setTimeout(() => root.scrollIntoView({ block: "start" }), 300);   // JupyterLab itself goes to the last cell that was run
  };
  let tries = 100;
  find();
  return () => { model.off("change:svg", draw); model.off("comm_live_update", gone); };
}

export default { render };
