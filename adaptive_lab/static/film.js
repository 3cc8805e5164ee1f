// A film of a run: the pictures of some of its steps, scrubbed in the page alone. The same module is in the page that is exported.
//
// trait   type                             meaning
// film    [{step, label, pictures}, …]     what there is at the beginning; pictures are SVG, made by adaptive_lab.draw (all text in them is escaped there)
// step    number                           the step that is shown; set from both sides, -1 follows the newest
//
// message from the kernel                  meaning
// {type: "frame", frame}                   one more, or another in the place of one of the same step
// {type: "keep", steps}                    the others are dropped
// {type: "film", film}                     all there are, for a page that was opened later and has asked by {type: "film"}
const LOOK = `
.al-film .bar { display:flex; flex-wrap:wrap; gap:6px; align-items:center; padding:2px 0; }
.al-film .bar input { flex:1 1 160px; margin:0; accent-color:#0072b2; }
.al-film .bar button { font:inherit; color:inherit; background:var(--jp-layout-color1,#fff); border:1px solid var(--jp-border-color1,#bbb); border-radius:3px; padding:1px 8px; cursor:pointer; }
.al-film .bar output { flex:0 1 auto; min-width:9em; font-variant-numeric:tabular-nums; }
.al-film .pictures { display:flex; flex-wrap:wrap; gap:4px; }`;

function render({ model, el }) {
  const make = (tag, rest = {}, ...inner) => { const e = Object.assign(document.createElement(tag), rest); e.append(...inner); return e; };
  const frames = [...(model.get("film") ?? [])], before = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let timer = 0, asked = false;
  const scrub = make("input", { type: "range", min: 0, max: 0, value: 0, step: 1 }), when = make("output"), pictures = make("div", { className: "pictures" });
  const play = make("button", { type: "button", textContent: "▶", title: "play from here" }), newest = make("button", { type: "button", textContent: "newest", title: "show the newest, and follow it" });
  scrub.setAttribute("aria-label", "snapshot of the run");
  for (const e of [scrub, play, newest]) e.setAttribute("data-lm-suppress-shortcuts", "true");   // or JupyterLab takes the keys
  el.classList.add("al-film", "al-live");
  el.append(make("style", { textContent: LOOK }), make("div", { className: "bar" }, play, scrub, when, newest), pictures);

  const at = () => {   // the number of the frame that is to be seen
    const step = model.get("step");
    if (step < 0) return frames.length - 1;
    let found = 0;
    frames.forEach((f, i) => { if (f.step <= step) found = i; });
    return found;
  };
  let shown = null;
  function draw() {
    const i = at(), frame = frames[i];
    scrub.max = Math.max(0, frames.length - 1);
    scrub.disabled = play.disabled = frames.length < 2;
    if (Number(scrub.value) !== i) scrub.value = i;
    when.textContent = frame ? `step ${frame.step}${frame.label ? ` · ${frame.label}` : ""}` : "nothing was recorded yet";
    scrub.setAttribute("aria-valuetext", when.textContent);
    if (frame === shown) return;
    shown = frame;
    pictures.innerHTML = (frame?.pictures ?? []).map((svg) => `<div>${svg}</div>`).join("");
  }
  function goTo(i) {
    const frame = frames[Math.min(frames.length - 1, Math.max(0, i))];
    if (!frame) return;
    model.set("step", frame.step);
    draw();
    if (!asked) requestAnimationFrame(() => { asked = false; model.save_changes(); });
    asked = true;
  }
  function halt() { clearInterval(timer); timer = 0; play.textContent = "▶"; }
  scrub.addEventListener("input", () => { halt(); goTo(Number(scrub.value)); });
  play.addEventListener("click", () => {
    if (timer) return halt();
    if (at() >= frames.length - 1) goTo(0);
    play.textContent = "❚❚";
    timer = setInterval(() => (at() < frames.length - 1 ? goTo(at() + 1) : halt()), before ? 1000 : 250);
  });
  newest.addEventListener("click", () => { halt(); model.set("step", -1); model.save_changes(); draw(); });

  const told = (message) => {
    if (message.type === "frame") {
      const i = frames.findIndex((f) => f.step >= message.frame.step);
      if (i < 0) frames.push(message.frame); else frames.splice(i, frames[i].step === message.frame.step ? 1 : 0, message.frame);
    } else if (message.type === "keep") {
      const kept = new Set(message.steps);
      frames.splice(0, frames.length, ...frames.filter((f) => kept.has(f.step)));
    } else if (message.type === "film") frames.splice(0, frames.length, ...message.film);
    draw();
  };
  model.on("msg:custom", told);
  model.on("change:step", draw);
  model.send?.({ type: "film" });   // what was recorded before this page was opened
  draw();
  return () => { halt(); model.off("msg:custom", told); model.off("change:step", draw); };
}

export default { render };
