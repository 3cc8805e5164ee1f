// Nested spheres: the levels of a model in three dimensions, turned, scrubbed and asked in the page.
//
// trait     type     meaning
// scene     object   title, levels (dim, kept, color, names, kinds), snapshots (step, label, c, s, sigma), near, narrow, wide: of `Scene.head`
// data      bytes    float16, for each snapshot and point: place (3 tangent coordinates), then `near` times number and distance; of `Scene.data`
// live      bool     a run listens: the sliders turn its knobs. Otherwise they turn the picture only
// now       object   the run's present moment, as one of the snapshots; {} for none
// now_data  bytes    its points
// asked     [[level, "c" | "s" | "sigma", value], …]  what the sliders want and the kernel has not yet heard of
// turn      integer  goes up with each request
// heard     integer  the last request that the kernel has dealt with: from there on `now` counts
// typed     string   a text whose neighbours are wanted
// search    integer  goes up with each text
// found     object   text, note, levels: places (each 3 tangent coordinates) and near ([name, distance, which place]) a level
// locked    bool     the run cannot be changed
// read      bool     the page reads along, and wants windows of the text
// reading   object   step, patches (each a string), levels (each a list of places, 3 tangent coordinates a patch): the window that was learnt from last
//
// A point is drawn at tanh(sqrt(c) s |v|) of its sphere's radius, a sphere at tanh(sqrt(c) s) of the one around it: the page knows c and s of
// each moment, so a slider is seen in the next frame, before the kernel has heard of it. The same module is in the page that is exported.
const STYLE = `
.al-spheres { display:flex; flex-wrap:wrap; align-items:flex-start; gap:8px 16px; font:12px/1.35 system-ui,sans-serif; color:var(--jp-ui-font-color1,#222); }
.al-spheres .main { flex:3 1 380px; min-width:260px; max-width:760px; }
.al-spheres .stage { position:relative; aspect-ratio:1.12; }
.al-spheres .reader { margin:6px 0; font:13px/1.9 ui-monospace,monospace; overflow-wrap:anywhere; } .al-spheres .reader small { font:12px system-ui,sans-serif; opacity:.75; display:block; }
.al-spheres .reader span { padding:2px 0; cursor:pointer; opacity:.5; background:color-mix(in srgb,#0072b2 14%,transparent); } .al-spheres .reader span:nth-of-type(odd) { background:color-mix(in srgb,#e69f00 18%,transparent); }
.al-spheres .reader span.read { opacity:1; } .al-spheres .reader span[aria-current=true] { outline:2px solid #d55e00; }
.al-spheres canvas { position:absolute; inset:0; width:100%; height:100%; cursor:grab; touch-action:none; border-radius:4px; }
.al-spheres canvas:active { cursor:grabbing; }
.al-spheres :focus-visible { outline:2px solid #d55e00; outline-offset:1px; }
.al-spheres .names { position:absolute; inset:0; overflow:hidden; pointer-events:none; }
.al-spheres .names span { position:absolute; left:0; top:0; white-space:nowrap; font-size:11px; text-shadow:0 0 3px var(--jp-layout-color0,#fff),0 0 3px var(--jp-layout-color0,#fff); }
.al-spheres .tip { position:absolute; left:0; top:0; max-width:250px; padding:4px 7px; border-radius:4px; pointer-events:none; visibility:hidden; overflow-wrap:anywhere;
  background:var(--jp-layout-color1,#fff); border:1px solid var(--jp-border-color1,#bbb); box-shadow:0 1px 4px rgba(0,0,0,.25); font-variant-numeric:tabular-nums; }
.al-spheres .tip b, .al-spheres .near b { font-weight:600; }
.al-spheres .side { flex:2 1 270px; min-width:250px; max-width:430px; }
.al-spheres fieldset { border:0; border-left:4px solid var(--level); margin:0 0 7px; padding:0 0 0 8px; }
.al-spheres legend { float:left; width:100%; padding:0; font-weight:600; }
.al-spheres legend small { font-weight:400; opacity:.75; }
.al-spheres .knob { display:flex; align-items:center; gap:6px; clear:both; }
.al-spheres .knob span { flex:0 0 62px; } .al-spheres .knob input { flex:1; min-width:60px; margin:0; } .al-spheres .knob output { flex:0 0 46px; text-align:right; font-variant-numeric:tabular-nums; }
.al-spheres .bar { display:flex; flex-wrap:wrap; align-items:center; gap:4px 10px; margin-bottom:6px; }
.al-spheres .bar input[type=range] { flex:1 1 110px; margin:0; } .al-spheres .bar input[type=search] { flex:1 1 120px; min-width:0; }
.al-spheres input[type=search], .al-spheres button { font:inherit; color:inherit; background:var(--jp-layout-color1,#fff); border:1px solid var(--jp-border-color1,#bbb); border-radius:3px; padding:2px 7px; }
.al-spheres button { cursor:pointer; } .al-spheres button:disabled { opacity:.5; cursor:default; }
.al-spheres input { accent-color:var(--level,#7f7f7f); }
.al-spheres input[type=range] { appearance:none; height:4px; border-radius:2px; background:color-mix(in srgb,currentColor 25%,transparent); cursor:pointer; }
.al-spheres input[type=range]::-webkit-slider-thumb { appearance:none; width:14px; height:14px; border-radius:50%; background:var(--level,#7f7f7f); }
.al-spheres input[type=range]::-moz-range-thumb { width:14px; height:14px; border:0; border-radius:50%; background:var(--level,#7f7f7f); }
.al-spheres input[type=range]:disabled { opacity:.4; cursor:default; }
.al-spheres .key { opacity:.75; margin-bottom:6px; }
.al-spheres .near { font-variant-numeric:tabular-nums; } .al-spheres .near ol { margin:1px 0 5px; padding-left:22px; }
.al-spheres .near span { display:inline-block; min-width:54px; opacity:.75; } .al-spheres .near i { font-style:normal; opacity:.65; } .al-spheres .near div { border-left:4px solid var(--level); padding-left:8px; }
.al-spheres .near button { border:0; background:none; padding:0; text-align:left; overflow-wrap:anywhere; } .al-spheres .near button:hover { text-decoration:underline; }
.al-spheres .note { opacity:.75; min-height:1.3em; }`;

const KNOBS = [["c", "curvature", 1e-3, 10], ["s", "scale", 1e-2, 10], ["sigma", "spread", 1e-2, 10]];
const SHAPES = { boundary: 0, descriptor: 1 }, SMALL = 2, MARK = 3, HALO = 4;   // how a kind of point is drawn; the others are small dots
const SIZES = [0.026, 0.028, 0.015, 0.04];
const CHOSEN = [0.835, 0.369, 0];   // the colour of what a person chose, #d55e00
const EYE = 3.4, LENS = 2.9;   // distance of the eye, and what it magnifies

const clamp = (v, low, high) => Math.min(high, Math.max(low, v));
const rgb = (css, pale = 0) => [1, 3, 5].map((i) => { const v = parseInt(css.slice(i, i + 2), 16) / 255; return v + pale * (1 - v); });
const half = (h) => {   // a float16
  const sign = h & 0x8000 ? -1 : 1, e = (h >> 10) & 31, f = h & 1023;
  return sign * (e === 31 ? (f ? NaN : Infinity) : e ? 2 ** (e - 25) * (1024 + f) : f * 2 ** -24);
};
const floats = (view) => {
  const out = new Float32Array((view?.byteLength ?? 0) >> 1);
  for (let i = 0; i < out.length; i++) out[i] = half(view.getUint16(2 * i, true));
  return out;
};
const three = (v) => (v === null || v === undefined ? "–" : `${+v.toPrecision(3)}`);
const times = (a, b) => a.map((_, i) => [0, 1, 2].reduce((sum, k) => sum + a[3 * Math.floor(i / 3) + k] * b[3 * k + (i % 3)], 0));   // 3 × 3, by rows
const about = (axis, angle) => {   // a rotation
  const [x, y, z] = axis, c = Math.cos(angle), s = Math.sin(angle), d = 1 - c;
  return [c + x * x * d, x * y * d - z * s, x * z * d + y * s, y * x * d + z * s, c + y * y * d, y * z * d - x * s, z * x * d - y * s, z * y * d + x * s, c + z * z * d];
};
const long = (v) => Math.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2]);
const HOME = times(about([1, 0, 0], 0.42), about([0, 1, 0], -0.6));
const apply = (m, [x, y, z]) => [m[0] * x + m[1] * y + m[2] * z, m[3] * x + m[4] * y + m[5] * z, m[6] * x + m[7] * y + m[8] * z];
const straight = (m) => {   // many small turns, and still a rotation (Gram-Schmidt)
  const norm = (v) => { const n = Math.hypot(...v); return v.map((x) => x / n); }, a = norm(m.slice(0, 3)), d = a.reduce((s, x, i) => s + x * m[3 + i], 0);
  const b = norm([3, 4, 5].map((k, i) => m[k] - d * a[i]));
  return [...a, ...b, a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]];
};

// Circles of the unit sphere, as pairs of points.
function wire(meridians, parallels, parts) {
  const out = [], at = (u, v) => [Math.cos(u) * Math.sin(v), Math.cos(v), Math.sin(u) * Math.sin(v)];
  const circle = (f) => { for (let i = 0; i < parts; i++) out.push(...f((2 * Math.PI * i) / parts), ...f((2 * Math.PI * (i + 1)) / parts)); };
  for (let k = 0; k < meridians; k++) circle((a) => at((Math.PI * k) / meridians, a));
  for (let k = 1; k <= parallels; k++) circle((a) => at(a, (Math.PI * k) / (parallels + 1)));
  return new Float32Array(out);
}

// --- painters: paint({turn, lens, ratio, wires, trails, dots, order, size, halos, marks}) ---
// dots    eight numbers a point: x, y, z before the turn, radius (to be multiplied by `size`), r, g, b, shape. As long as no point moves it is the same array, which the graphics card keeps
// order   numbers of the points, the farthest from the eye first
// halos, marks   [x, y, z, radius, r, g, b, shape] as the eye sees them, the farthest first
const DEEP = 4096;   // depths that are told apart
function byDepth(dots, turn, order, depths, counts) {   // a counting sort: a hundred thousand points in each frame
  const n = order.length, [, , , , , , a, b, c] = turn;
  counts.fill(0);
  for (let i = 0, o = 0; i < n; i++, o += 8) { const d = ((a * dots[o] + b * dots[o + 1] + c * dots[o + 2] + 1) * (DEEP / 2)) | 0; counts[depths[i] = d < 0 ? 0 : d < DEEP ? d : DEEP - 1]++; }
  for (let d = 0, sum = 0; d < DEEP; d++) { const many = counts[d]; counts[d] = sum; sum += many; }
  for (let i = 0; i < n; i++) order[counts[depths[i]]++] = i;
}
const turned = (turn, [x, y, z, ...rest]) => [...apply(turn, [x, y, z]), ...rest];
function* sprites({ turn, dots, order, size }) {   // the points one by one as the eye sees them
  for (const i of order) { const q = turned(turn, dots.subarray(8 * i, 8 * i + 8)); q[3] *= size; yield q; }
}

const VIEW = "uniform vec2 lens; vec4 see(vec3 p) { return vec4(lens * p.xy, -.4 * p.z, EYE - p.z); }".replace("EYE", EYE.toFixed(2));
const LINE = [`#version 300 es
in vec3 place; uniform mat3 turn; uniform float size; out float near; ${VIEW}
void main() { vec3 p = turn * place; near = p.z * .5 + .5; gl_Position = see(p * size); }`, `#version 300 es
precision mediump float; in float near; uniform vec4 color; out vec4 shown;
void main() { float a = color.a * mix(.25, 1., clamp(near, 0., 1.)); shown = vec4(color.rgb * a, a); }`];
const HEAD = `#version 300 es
in vec4 place; in vec4 kind; ${VIEW}`;
// A processor may have to draw this, so a dot has few words a pixel: its ink is ready at its corner, and its edge is as wide as `soft` says.
const DOT = [`${HEAD} uniform mat3 turn; uniform float pixels; flat out vec4 ink; flat out float soft, corners;
void main() {
  vec3 p = turn * place.xyz; gl_Position = see(p); float r = pixels * place.w / gl_Position.w, a = mix(.5, 1., clamp(p.z * .5 + .5, 0., 1.));
  gl_PointSize = 2. * r + 2.; soft = r + 1.; corners = kind.a == 1. ? 1. : 0.; ink = vec4(kind.rgb * a, a);
}`, `#version 300 es
precision mediump float; flat in vec4 ink; flat in float soft, corners; out vec4 shown;
void main() {
  vec2 p = abs(2. * gl_PointCoord - 1.) * soft; float d = soft - (corners > 0. ? p.x + p.y : length(p));   // pixels from the edge
  shown = ink * clamp(d, 0., 1.); shown.rgb *= d < .28 * soft ? .6 : 1.;
}`];
const INK = `#version 300 es
precision mediump float; in vec3 hue; flat in int shape; in vec2 at; out vec4 shown;
float edge(float d) { float w = fwidth(d); return 1. - smoothstep(1. - w, 1. + w, d); }
void main() {
  float d = length(at), a = edge(d);
  a *= shape == 3 ? 1. - edge(d / .62) + edge(d / .3) : mix(.045, .3, edge(.975 / max(d, .001)));
  shown = vec4(hue * (shape == 4 ? .9 : 1.) * a, a);
}`;
const BALL = [`${HEAD} in vec2 corner; out vec2 at; out vec3 hue; flat out int shape;   // spreads and marks: a sphere may be larger than a point can be
void main() { hue = kind.rgb; shape = int(kind.a); at = corner * 1.02; gl_Position = see(place.xyz + vec3(at * place.w, 0.)); }`, INK];

function glPainter(canvas) {
  const gl = canvas.getContext("webgl2", { antialias: false, alpha: true, depth: false, premultipliedAlpha: true, powerPreference: "low-power" });
  if (!gl) return null;
  const program = (texts) => {
    const p = gl.createProgram();
    texts.forEach((text, i) => { const s = gl.createShader(i ? gl.FRAGMENT_SHADER : gl.VERTEX_SHADER); gl.shaderSource(s, text); gl.compileShader(s); gl.attachShader(p, s); });
    gl.linkProgram(p);
    if (!gl.getProgramParameter(p, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(p) || "a shader does not compile");
    return { p, lens: gl.getUniformLocation(p, "lens"), u: (name) => gl.getUniformLocation(p, name), a: (name) => gl.getAttribLocation(p, name) };
  };
  const line = program(LINE), dot = program(DOT), ball = program(BALL), sphere = wire(6, 5, 40);
  const lineAt = ["turn", "size", "color"].map(line.u), [dotTurn, pixels] = ["turn", "pixels"].map(dot.u);
  const buffer = (values) => { const b = gl.createBuffer(); gl.bindBuffer(gl.ARRAY_BUFFER, b); if (values) gl.bufferData(gl.ARRAY_BUFFER, values, gl.STATIC_DRAW); return b; };
  const array = (b, fields, stride, each = 0) => {   // fields: [attribute, numbers, first]
    gl.bindBuffer(gl.ARRAY_BUFFER, b);
    for (const [at, n, first] of fields) { gl.enableVertexAttribArray(at); gl.vertexAttribPointer(at, n, gl.FLOAT, false, 4 * stride, 4 * first); gl.vertexAttribDivisor(at, each); }
  };
  const group = (fill) => { const v = gl.createVertexArray(); gl.bindVertexArray(v); const b = fill(); gl.bindVertexArray(null); return [v, b]; };
  const lines = (values) => group(() => { const b = buffer(values); array(b, [[line.a("place"), 3, 0]], 3); return b; });
  const [wires] = lines(sphere), [paths, pathBuffer] = lines(null);
  const points = (kind, each) => { const b = buffer(null); array(b, [[kind.a("place"), 4, 0], [kind.a("kind"), 4, 4]], 8, each); return b; };
  const orderBuffer = gl.createBuffer(), [dots, dotBuffer] = group(() => { const b = points(dot, 0); gl.bindBuffer(gl.ELEMENT_ARRAY_BUFFER, orderBuffer); return b; });
  let held = null;   // the points that the card has
  const [balls, ballBuffer] = group(() => { array(buffer(new Float32Array([-1, -1, 1, -1, -1, 1, 1, 1])), [[ball.a("corner"), 2, 0]], 2); return points(ball, 1); });
  gl.enable(gl.BLEND);
  gl.blendFunc(gl.ONE, gl.ONE_MINUS_SRC_ALPHA);
  return (picture) => {
    const { turn, lens, ratio } = picture, eye = [lens / ratio[0], lens / ratio[1]];
    gl.viewport(0, 0, canvas.width, canvas.height);
    gl.clear(gl.COLOR_BUFFER_BIT);
    const show = (kind, group, b, values) => {
      gl.useProgram(kind.p); gl.uniform2f(kind.lens, ...eye);
      gl.bindVertexArray(group); gl.bindBuffer(gl.ARRAY_BUFFER, b); const all = new Float32Array(8 * values.length);
      values.forEach((v, i) => all.set(v, 8 * i));
      gl.bufferData(gl.ARRAY_BUFFER, all, gl.STREAM_DRAW);
    };
    const large = (values) => { if (values.length) { show(ball, balls, ballBuffer, values); gl.drawArraysInstanced(gl.TRIANGLE_STRIP, 0, 4, values.length); } };
    large(picture.halos);
    gl.useProgram(line.p);
    gl.uniformMatrix3fv(lineAt[0], true, turn); gl.uniform2f(line.lens, ...eye);
    gl.bindVertexArray(wires);
    for (const [size, color] of picture.wires) { gl.uniform1f(lineAt[1], size); gl.uniform4f(lineAt[2], ...color, 0.55); gl.drawArrays(gl.LINES, 0, sphere.length / 3); }
    gl.uniform1f(lineAt[1], 1);
    gl.bindVertexArray(paths); gl.bindBuffer(gl.ARRAY_BUFFER, pathBuffer);
    for (const [places, color] of picture.trails) { gl.bufferData(gl.ARRAY_BUFFER, new Float32Array(places.flat()), gl.STREAM_DRAW); gl.uniform4f(lineAt[2], ...color, 0.9); gl.drawArrays(gl.LINE_STRIP, 0, places.length); }
    gl.useProgram(dot.p); gl.uniform2f(dot.lens, ...eye); gl.uniformMatrix3fv(dotTurn, true, turn);
    gl.uniform1f(pixels, (picture.size * lens * Math.min(canvas.width, canvas.height)) / 2);
    gl.bindVertexArray(dots);
    if (held !== picture.dots) { held = picture.dots; gl.bindBuffer(gl.ARRAY_BUFFER, dotBuffer); gl.bufferData(gl.ARRAY_BUFFER, held, gl.STATIC_DRAW); }
    gl.bufferData(gl.ELEMENT_ARRAY_BUFFER, picture.order, gl.STREAM_DRAW);
    gl.drawElements(gl.POINTS, picture.order.length, gl.UNSIGNED_INT, 0);   // one vertex each: an instance each takes a software renderer five times as long
    large(picture.marks);
  };
}

function flatPainter(canvas) {   // where there is no WebGL2
  const g = canvas.getContext("2d"), sphere = wire(4, 3, 40);
  return (picture) => {
    const { turn, lens, wires, trails, halos, marks } = picture;
    const w = canvas.width, h = canvas.height, k = (lens * Math.min(w, h)) / 2;
    const at = ([x, y, z]) => [w / 2 + (k * x) / (EYE - z), h / 2 - (k * y) / (EYE - z), k / (EYE - z)];
    const css = ([r, gr, b], a) => `rgba(${[r, gr, b].map((v) => Math.round(255 * v))},${a})`;
    const dots = (all) => { for (const [x, y, z, radius, r, gr, b, shape] of all) {
      const [px, py, scale] = at([x, y, z]), size = radius * scale, path = new Path2D();
      if (shape === 1) { path.moveTo(px, py - size); path.lineTo(px + size, py); path.lineTo(px, py + size); path.lineTo(px - size, py); path.closePath(); } else path.arc(px, py, size, 0, 7);
      g.fillStyle = css([r, gr, b], shape === HALO ? 0.045 : 0.5 + 0.25 * (z + 1));
      g.strokeStyle = css([r, gr, b], 0.9);
      if (shape !== MARK) g.fill(path);
      if (shape === MARK || shape === HALO) { g.lineWidth = shape === MARK ? 3 : 0.5; g.stroke(path); }
    } };
    g.clearRect(0, 0, w, h);
    dots(halos);
    g.lineWidth = 1;
    for (const [size, color] of wires) for (const front of [false, true]) {
      g.strokeStyle = css(color, front ? 0.5 : 0.16);
      g.beginPath();
      for (let i = 0; i < sphere.length; i += 6) {
        const a = apply(turn, sphere.subarray(i, i + 3)), b = apply(turn, sphere.subarray(i + 3, i + 6));
        if (a[2] + b[2] > 0 !== front) continue;
        g.moveTo(...at(a.map((v) => v * size)).slice(0, 2)); g.lineTo(...at(b.map((v) => v * size)).slice(0, 2));
      }
      g.stroke();
    }
    for (const [places, color] of trails) { g.strokeStyle = css(color, 0.8); g.beginPath(); places.forEach((p, i) => { const [x, y] = at(apply(turn, p)); i ? g.lineTo(x, y) : g.moveTo(x, y); }); g.stroke(); }
    dots(sprites(picture));
    dots(marks);
  };
}

// --- the widget -----------------------------------------------------------------------------------------------------

function render({ model, el }) {
  el.classList.add("al-live");
  const make = (tag, more = {}, ...inside) => {   // text is only ever put in as text
    const e = document.createElement(tag);
    for (const [k, v] of Object.entries(more)) if (k === "text") e.textContent = v; else if (k in e && k !== "role") e[k] = v; else e.setAttribute(k, v);
    if (/^(input|button|canvas)$/.test(tag)) e.setAttribute("data-lm-suppress-shortcuts", "true");   // or JupyterLab takes the keys
    e.append(...inside);
    return e;
  };
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  let canvas = make("canvas", { tabIndex: 0, role: "application" }), paint;
  try { paint = glPainter(canvas); } catch (e) { console.warn(e); canvas = make("canvas", { tabIndex: 0, role: "application" }); }
  paint ??= flatPainter(canvas);
  const names = make("div", { className: "names" }), tip = make("div", { className: "tip" });
  const stage = make("div", { className: "stage" }, canvas, names, tip), side = make("div", { className: "side" });
  const levels = make("div"), near = make("div", { className: "near" }), note = make("div", { className: "note", role: "status" });
  const scrub = make("input", { type: "range", min: 0, step: 1, "aria-label": "snapshot" }), when = make("output");
  const play = make("button", { text: "▶", title: "play the snapshots", "aria-label": "play the snapshots" });
  const box = (text, on, title) => { const i = make("input", { type: "checkbox", checked: on }); i.addEventListener("change", look); return [i, make("label", { title }, i, ` ${text}`)]; };
  const [spin, spinLabel] = box("turn", !still, "turn slowly"), [halos, halosLabel] = box("spread", false, "what lies within the spread of a boundary point");
  const [trails, trailsLabel] = box("trails", false, "the way of each point over the snapshots"), [words, wordsLabel] = box("names", false, "names of the boundary points");
  const text = make("input", { type: "search", placeholder: "a text, and its neighbours", "aria-label": "text whose nearest neighbours are wanted", spellcheck: false });
  const [along, alongLabel] = box("read along", false, "go through the text that is learnt from, patch by patch"), reader = make("div", { className: "reader", role: "group", "aria-label": "the text being read, in patches", hidden: true, tabIndex: 0 });
  reader.setAttribute("data-lm-suppress-shortcuts", "true");
  const back = make("button", { text: "as saved", title: "let the sliders show the saved values again", hidden: true });
  const film = make("div", { className: "bar" }, play, scrub, when), box2 = make("div", { className: "bar" }, spinLabel, halosLabel, trailsLabel, wordsLabel, alongLabel, back);
  const key = make("div", { className: "key", text: "● boundary points  ◆ descriptors  • other points; the colour is the level" });
  side.append(film, box2, key, levels, make("div", { className: "bar" }, text), near, note);
  el.append(make("div", { className: "al-spheres" }, make("style", { text: STYLE }), make("div", { className: "main" }, stage, reader), side));

  let scene, table, nowTable, width, first, turn = HOME, zoom = 1, at = 0, follow = true, dirty = false, frame = 0, drag = null, over = false, shown = true, last = 0, playing = 0;
  let seen = [], named = [], world = null, stale = true, pale = 0, hovered = null, pinned = null, rows = [], typing = 0, sending = 0;
  const open = new Map();   // "level,knob" -> [value, turn]: what is wanted and not yet heard of (by a page that nobody listens to, what it draws)
  const off = new Set();   // levels that are not shown

  // --- what is shown ---
  const live = () => model.get("live"), hasNow = () => live() && Boolean(model.get("now")?.c);
  const count = () => scene.snapshots.length + (hasNow() ? 1 : 0), isNow = () => hasNow() && at === count() - 1;
  const moment = (t = at) => scene.snapshots[t] ?? model.get("now");
  const rowOf = (t, point) => { const [all, i] = t < scene.snapshots.length ? [table, t * first.at(-1) + point] : [nowTable, point]; return all.subarray(i * width, (i + 1) * width); };
  const value = (level, knob, t = at) => (live() && t < scene.snapshots.length ? undefined : open.get(`${level},${knob}`)?.[0]) ?? moment(t)[knob][level];
  const shapeOf = (kind) => SHAPES[kind] ?? SMALL;
  const pullOf = (level, t = at) => Math.sqrt(value(level, "c", t)) * value(level, "s", t);
  function radii(t = at) {
    let r = 1;
    return scene.levels.map((_, i) => { const here = r; r *= clamp(Math.tanh(pullOf(i, t)), scene.narrow, scene.wide); return here; });
  }
  function put(v, radius, pull) {   // a tangent vector as a place of the picture; `pull` is sqrt(c) s
    const n = long(v), k = n ? (radius * Math.tanh(pull * n)) / n : 0;
    return [v[0] * k, v[1] * k, v[2] * k];
  }

  function arrange() {   // everything before it is turned; it stays as it is while one only looks at it from elsewhere
    const sizes = radii(), dots = [], marks = [], balls = [], ways = [];
    seen = [];
    const add = (p, color, shape, what, radius = SIZES[shape]) => {
      if (!Number.isFinite(p[0] + p[1] + p[2])) return;
      if (shape < MARK) dots.push(p[0], p[1], p[2], radius, color[0], color[1], color[2], shape); else (shape === MARK ? marks : balls).push([...p, radius, ...color, shape]);
      if (what) { what.at = p; seen.push(what); }
    };
    scene.levels.forEach((level, i) => {
      if (off.has(i)) return;
      const color = rgb(level.color, pale), c = value(i, "c"), pull = pullOf(i), sigma = value(i, "sigma"), t = sigma === null ? 0 : Math.tanh((Math.sqrt(c) * sigma) / 2);
      level.names.forEach((name, j) => {
        const v = rowOf(at, first[i] + j), kind = shapeOf(level.kinds[j]);
        if (!Number.isFinite(v[0])) return;
        const p = put(v, sizes[i], pull), length = long(v), rho = Math.tanh(pull * length), me = { level: i, point: j, name, kind: level.kinds[j], length, rho };
        add(p, color, kind, me);
        if (pinned?.level === i && pinned.point === j) add(p, CHOSEN, MARK);
        if (halos.checked && t && level.kinds[j] === "boundary") {
          const k = rho ? ((1 - t * t) / (1 - rho * rho * t * t)) : 1;
          add(p.map((x) => x * k), color, HALO, null, (sizes[i] * t * (1 - rho * rho)) / (1 - rho * rho * t * t));
        }
        if (trails.checked && at) {
          const way = [];
          for (let s = 0; s <= at; s++) { const w = rowOf(s, first[i] + j); if (Number.isFinite(w[0])) way.push(put(w, radii(s)[i], pullOf(i, s))); }
          if (way.length > 1) ways.push([way, color]);
        }
      });
      const way = reads ? reads.levels[i]?.slice(Math.max(0, patch - 6), patch + 1).map((v) => put(v, sizes[i], pull)) ?? [] : [];
      if (way.length) add(way.at(-1), CHOSEN, MARK, { level: i, mark: 0, name: reads.patches[patch], kind: "patch", length: long(reads.levels[i][patch]), rho: Math.tanh(pull * long(reads.levels[i][patch])) });
      if (way.length > 1) ways.push([way, CHOSEN]);
      const found = model.get("found");
      if (found?.text && found.text === model.get("typed")) (found.levels?.[i]?.places ?? []).forEach((v, j, all) =>
        add(put(v, sizes[i], pull), CHOSEN, MARK, { level: i, mark: j, name: all.length > 1 ? `${found.text} · patch ${j + 1}` : found.text, kind: "text", length: long(v), rho: Math.tanh(pull * long(v)) }));
    });
    const n = dots.length / 8, wires = scene.levels.map((level, i) => [sizes[i], rgb(level.color, pale)]).filter((_, i) => !off.has(i));
    named = seen.filter((p) => p.mark !== undefined || p.kind === "boundary");
    world = { dots: new Float32Array(dots), order: new Uint32Array(n), depths: new Uint16Array(n), counts: new Uint32Array(DEEP), marks, balls, ways, wires };
  }
  function compose() {   // as the eye sees it
    const [, red, green] = getComputedStyle(stage).color.match(/(\d+), (\d+)/) ?? [0, 0, 0], lighter = Number(red) + Number(green) > 255 ? 0.3 : 0;   // on a dark page all colours are lighter
    if (stale || lighter !== pale) { pale = lighter; stale = false; arrange(); }
    const w = stage.clientWidth || 1, h = stage.clientHeight || 1, least = Math.min(w, h), size = 1 / Math.sqrt(zoom), { dots, order, depths, counts, wires, ways } = world;
    byDepth(dots, turn, order, depths, counts);
    const halos_ = world.balls.map((v) => turned(turn, v)), marks = world.marks.map((v) => { const q = turned(turn, v); q[3] *= size; return q; });
    return { turn, lens: LENS * zoom, ratio: [w / least, h / least], wires, trails: ways, dots, order, size, halos: halos_, marks };
  }
  function onPage([x, y, z]) {   // pixels of the stage
    const w = stage.clientWidth, h = stage.clientHeight, k = (LENS * zoom * Math.min(w, h)) / 2 / (EYE - z);
    return [w / 2 + k * x, h / 2 - k * y];
  }
  function draw(time = 0) {
    frame = 0;
    const turning = spin.checked && shown && !drag && !over && !pinned;
    if (turning && last) { turn = straight(times(turn, about([0, 1, 0], Math.min(0.05, (time - last) * 2.2e-4)))); dirty = true; }
    last = turning ? time : 0;
    if (dirty && scene) {
      dirty = false;
      const density = Math.min(2, devicePixelRatio || 1), w = Math.round(stage.clientWidth * density), h = Math.round(stage.clientHeight * density);
      if (w && h) {
        if (canvas.width !== w || canvas.height !== h) { canvas.width = w; canvas.height = h; }
        paint(compose());
        label();
        pointOut();
      }
    }
    if (turning) look(false);
  }
  function look(changed = true) { if (changed !== false) dirty = stale = true; if (!frame) frame = requestAnimationFrame(draw); }
  function glance() { dirty = true; look(false); }   // from elsewhere, at the same

  function label() {   // names beside points
    const told = named.filter((p) => p.mark !== undefined || words.checked).slice(0, 60);
    while (names.children.length > told.length) names.lastChild.remove();
    told.forEach((p, i) => {
      const e = names.children[i] ?? names.appendChild(document.createElement("span")), place = apply(turn, p.at), [x, y] = onPage(place);
      const word = p.mark ? `${p.mark + 1}` : p.name;   // of the patches of a text, the first has its name
      if (e.textContent !== word) e.textContent = word;
      e.style.transform = `translate(${(x + 8).toFixed(1)}px,${(y - 7).toFixed(1)}px)`;
      e.style.opacity = 0.55 + 0.45 * clamp(place[2] * 0.5 + 0.5, 0, 1);
    });
  }
  const same = (a, b) => a && b && a.level === b.level && a.point === b.point && a.mark === b.mark;
  const tell = (p) => `level ${p.level} · ${p.kind} · radius ${three(2 * value(p.level, "s") * p.length)}, ${three(100 * p.rho)}% of the way to the surface`;
  function pointOut() {   // the box beside the point
    const p = (hovered && seen.find((q) => same(q, hovered))) ?? (pinned && seen.find((q) => same(q, pinned)));
    tip.style.visibility = p ? "visible" : "hidden";
    if (!p) return;
    tip.replaceChildren(make("b", { text: p.name }), make("div", { text: tell(p) }));
    const [x, y] = onPage(apply(turn, p.at)), right = x > stage.clientWidth - 200;
    tip.style.transform = `translate(${clamp(right ? x - tip.offsetWidth - 12 : x + 12, 0, Math.max(0, stage.clientWidth - tip.offsetWidth))}px,${clamp(y + 10, 0, Math.max(0, stage.clientHeight - tip.offsetHeight))}px)`;
  }
  function hit(event) {   // the point under the pointer, in front of others
    const b = stage.getBoundingClientRect(), x = event.clientX - b.left, y = event.clientY - b.top;
    let best = null, least = 14;
    for (const p of seen) { const place = apply(turn, p.at), [px, py] = onPage(place), d = Math.hypot(px - x, py - y) - 2 * place[2]; if (d < least) { least = d; best = p; } }
    return best;
  }

  // --- neighbours ---
  function list(title, levelsNear, more = "") {
    near.replaceChildren();
    if (!levelsNear.length) return;
    near.append(make("b", { text: title }), more);
    for (const [i, found] of levelsNear) {
      if (off.has(i)) continue;
      const o = make("ol");
      for (const [name, d, extra] of found) {
        const b = make("button", { text: name });
        b.addEventListener("click", () => choose(i, scene.levels[i].names.indexOf(name)));
        o.append(make("li", {}, make("span", { text: three(d) }), b, make("i", { text: extra ?? "" })));
      }
      near.append(make("div", { style: `--level:${scene.levels[i].color}` }, `level ${i}`, o));
    }
  }
  function choose(level, point) {
    if (point < 0 || !scene.levels[level]?.names[point]) { pinned = null; list("", []); return look(); }
    pinned = { level, point };
    const row = rowOf(at, first[level] + point), found = [];
    for (let k = 0; k < scene.near; k++) if (Number.isFinite(row[3 + 2 * k])) found.push([scene.levels[level].names[row[3 + 2 * k] - 0], row[4 + 2 * k]]);
    list(scene.levels[level].names[point], [[level, found]], found.length ? ": nearest to it" : ": no neighbours are known at this moment");
    look();
  }
  function answer() {   // of the kernel
    const found = model.get("found");
    if (!found?.text || found.text !== model.get("typed")) return;
    note.textContent = found.note ?? "";
    list(found.text, (found.levels ?? []).map((l, i) => [i, l.near.map(([name, d, which]) => [name, d, l.places.length > 1 ? ` to patch ${which + 1}` : ""])]), ": nearest to it");
    look();
  }
  function ask() {
    typing = 0;
    const asked = text.value;
    pinned = null;
    if (live()) { model.set({ typed: asked, search: model.get("search") + 1 }); model.save_changes(); if (!asked) { list("", []); note.textContent = ""; } return look(); }
    const low = asked.toLowerCase(), hits = [];
    scene.levels.forEach((l, i) => l.names.forEach((name, j) => { if (asked && name.toLowerCase().includes(low)) hits.push([i, j]); }));
    list("", []);
    if (hits.length) choose(...hits[0]);
    note.textContent = asked ? (hits.length ? `${hits.length} point${hits.length > 1 ? "s have" : " has"} this in the name` : "no point has this in its name; in this page there is no model to ask") : "";
  }
  text.addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(ask, 250); });
  text.addEventListener("keydown", (event) => { event.stopPropagation(); if (event.key === "Enter") { clearTimeout(typing); ask(); } });

  // --- the text being read ---
  const BEAT = 450;   // milliseconds a patch
  let reads = null, patch = 0, reads_on = 0;
  function readOn(to) {
    if (!reads) return;
    patch = clamp(to, 0, reads.patches.length - 1);
    [...reader.querySelectorAll("span")].forEach((e, i) => { e.classList.toggle("read", i <= patch); e.setAttribute("aria-current", i === patch); });
    look();
  }
  function takeText() {   // the newest window, from its beginning
    const given = model.get("reading");
    if (!along.checked || !given?.patches?.length) return;
    reads = given;
    reader.replaceChildren(make("small", { text: `read in step ${given.step}: ${given.patches.length} patches` }), ...given.patches.map((text, i) => { const e = make("span", { text }); e.addEventListener("click", () => { rest(); readOn(i); }); return e; }));
    readOn(0);
  }
  function rest() { clearInterval(reads_on); reads_on = 0; }
  function beat() {   // at the end the next window, if there is one
    if (patch < reads.patches.length - 1) readOn(patch + 1);
    else if (model.get("reading") !== reads) takeText();
  }
  function begin() {
    rest();
    reader.hidden = !along.checked;
    model.set({ read: along.checked });
    model.save_changes();
    reads = null;
    reader.replaceChildren(make("small", { text: "waiting for a window of text …" }));
    takeText();
    if (along.checked) reads_on = setInterval(() => reads && shown && beat(), BEAT);
    look();
  }
  along.addEventListener("change", begin);
  reader.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault(); event.stopPropagation();
    rest(); readOn(patch + by);
  });
  const arrived = () => { if (!reads) takeText(); };

  // --- sliders ---
  function build() {   // a row of controls a level
    levels.replaceChildren();
    rows = scene.levels.map((level, i) => {
      const on = make("input", { type: "checkbox", checked: !off.has(i), "aria-label": `show level ${i}` }), size = make("small");
      on.addEventListener("change", () => { if (on.checked) off.delete(i); else off.add(i); look(); });
      const field = make("fieldset", { style: `--level:${level.color}` }, make("legend", {}, make("label", {}, on, ` level ${i} `), size));
      const knobs = KNOBS.map(([key, word, low, high]) => {
        const input = make("input", { type: "range", step: "any", "aria-label": `${word} of level ${i}` }), out = make("output"), row = make("label", { className: "knob" }, make("span", { text: word }), input, out);
        input.min = Math.log10(low); input.max = Math.log10(high);
        const moved = (v) => turnKnob(i, key, Number((10 ** v).toPrecision(4)));
        input.addEventListener("input", () => moved(Number(input.value)));
        input.addEventListener("keydown", (event) => {
          const by = { ArrowLeft: -0.01, ArrowDown: -0.01, ArrowRight: 0.01, ArrowUp: 0.01, PageDown: -0.1, PageUp: 0.1 }[event.key];
          event.stopPropagation();
          if (by) { event.preventDefault(); moved(clamp(Math.log10(value(i, key)) + by, Number(input.min), Number(input.max))); }
        });
        field.append(row);
        return { key, input, out, row };
      });
      levels.append(field);
      knobs.size = size;
      return knobs;
    });
  }
  function turnKnob(level, knob, v) {
    if (live() && (model.get("locked") || !isNow())) return settle();
    if (knob === "sigma") halos.checked = true;   // what is turned is to be seen
    const turned = model.get("turn") + 1;
    model.set({ turn: turned });
    open.set(`${level},${knob}`, [v, turned]);
    if (live() && !sending) sending = requestAnimationFrame(send);
    settle();
    look();
  }
  function send() {   // once a frame at most
    sending = 0;
    model.set({ asked: [...open].map(([key, [v]]) => { const [level, knob] = key.split(","); return [Number(level), knob, v]; }) });
    model.save_changes();
  }
  function hear() { stage.dataset.heard = model.get("heard"); for (const [key, [, turned]] of open) if (turned <= model.get("heard")) open.delete(key); settle(); look(); }
  back.addEventListener("click", () => { open.clear(); settle(); look(); });

  function settle() {   // the controls show what the picture shows
    const t = count();
    film.hidden = t < 2;
    scrub.max = t - 1;
    if (Number(scrub.value) !== at) scrub.value = at;
    const m = moment(), told = `${isNow() ? "now, " : ""}${m.label ? `${m.label}, ` : ""}step ${m.step}`;
    if (when.textContent !== told) { when.textContent = told; scrub.setAttribute("aria-valuetext", told); }
    back.hidden = live() || !open.size;
    alongLabel.hidden = !live();
    const dead = live() && (model.get("locked") || !isNow());
    rows.forEach((knobs, i) => { knobs.size.textContent = `${scene.levels[i].dim} dimensions, 3 axes show ${Math.round(100 * scene.levels[i].kept)}%`; });
    rows.forEach((knobs, i) => knobs.forEach(({ key, input, out, row }) => {
      const v = value(i, key);
      row.style.display = v === null || v === undefined ? "none" : "";
      row.title = dead ? (model.get("locked") ? "the run cannot be changed" : "go to “now” to turn the running model") : "";
      if (v === null || v === undefined) return;
      const at10 = Math.log10(v);
      if (at10 < Number(input.min)) input.min = at10;
      if (at10 > Number(input.max)) input.max = at10;
      if (Number(input.value) !== at10) input.value = at10;
      input.disabled = dead;
      const shownValue = three(v);
      if (out.textContent !== shownValue) { out.textContent = shownValue; input.setAttribute("aria-valuetext", shownValue); }
    }));
    canvas.setAttribute("aria-label", `${scene.title}: ${scene.levels.length} nested spheres, ${told}. Arrow keys turn, plus and minus zoom, n and p go from point to point, 0 resets`);
  }

  // --- snapshots ---
  function goTo(t) { at = clamp(t, 0, count() - 1); follow = at === count() - 1; if (pinned) choose(pinned.level, pinned.point); settle(); look(); }
  scrub.addEventListener("input", () => { halt(); goTo(Number(scrub.value)); });
  scrub.addEventListener("keydown", (event) => event.stopPropagation());
  function halt() { clearInterval(playing); playing = 0; play.textContent = "▶"; }
  play.addEventListener("click", () => {
    if (playing) return halt();
    if (at >= count() - 1) at = -1;
    play.textContent = "❚❚";
    const next = () => { goTo(at + 1); if (at >= count() - 1) halt(); };
    playing = setInterval(next, 450);
    next();
  });

  function load() {   // another scene, or its first
    const size = scene?.levels.length;
    scene = model.get("scene");
    if (!scene?.levels) { scene = null; return; }
    width = 3 + 2 * scene.near;
    first = scene.levels.reduce((sums, l) => [...sums, sums.at(-1) + l.names.length], [0]);
    table = floats(model.get("data"));
    nowTable = floats(model.get("now_data"));
    at = follow ? count() - 1 : Math.min(at, count() - 1);
    if (pinned && !scene.levels[pinned.level]?.names[pinned.point]) pinned = null;
    if (size !== scene.levels.length || rows.length !== scene.levels.length) build();
    settle();
    look();
  }
  function renew() {
    if (!scene) return;
    nowTable = floats(model.get("now_data"));
    if (follow) at = count() - 1;
    settle();
    look(isNow());
  }

  // --- the hand ---
  const by = (dx, dy) => { turn = straight(times(times(about([0, 1, 0], dx), about([1, 0, 0], dy)), turn)); glance(); };
  const zoomBy = (k) => { zoom = clamp(zoom * k, 0.5, 12); glance(); };
  const fingers = new Map();
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0) return;
    canvas.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
    drag = { moved: false, x: event.clientX, y: event.clientY };
  });
  canvas.addEventListener("pointermove", (event) => {
    over = true;
    const before = fingers.get(event.pointerId);
    if (!before) { const p = hit(event); if (!same(p, hovered) || !p !== !hovered) { hovered = p; canvas.style.cursor = p ? "pointer" : ""; glance(); } return; }
    const dx = event.clientX - before[0], dy = event.clientY - before[1];
    if (fingers.size > 1) {   // two fingers zoom
      const other = [...fingers].find(([id]) => id !== event.pointerId)[1], far = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]);
      zoomBy(far([event.clientX, event.clientY]) / Math.max(1, far(before)));
    } else if (drag.moved || Math.hypot(event.clientX - drag.x, event.clientY - drag.y) > 3) {
      drag.moved = true;
      hovered = null;
      by(dx * 0.008, dy * 0.008);
    }
    fingers.set(event.pointerId, [event.clientX, event.clientY]);
  });
  const up = (event) => {
    fingers.delete(event.pointerId);
    if (!drag || fingers.size) return;
    const click = !drag.moved && event.type === "pointerup";
    drag = null;
    if (click) { const p = hit(event); if (p?.mark === undefined) choose(p?.level ?? -1, p?.point ?? -1); }
    look();
  };
  canvas.addEventListener("pointerup", up);
  canvas.addEventListener("pointercancel", up);
  canvas.addEventListener("pointerleave", () => { over = false; hovered = null; glance(); });
  canvas.addEventListener("wheel", (event) => {   // once the picture was clicked; else the page scrolls
    if (document.activeElement !== canvas && !el.getRootNode().activeElement?.isSameNode(canvas)) return;
    event.preventDefault();
    zoomBy(Math.exp(-clamp(event.deltaY, -120, 120) * 0.0016));
  }, { passive: false });
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    const step = event.shiftKey ? 0.3 : 0.08;
    const act = { ArrowLeft: () => by(-step, 0), ArrowRight: () => by(step, 0), ArrowUp: () => by(0, -step), ArrowDown: () => by(0, step), "+": () => zoomBy(1.15), "=": () => zoomBy(1.15), "-": () => zoomBy(1 / 1.15),
      0: () => { turn = HOME; zoom = 1; glance(); }, n: () => go(1), p: () => go(-1), "[": () => goTo(at - 1), "]": () => goTo(at + 1), " ": () => { spin.checked = !spin.checked; look(); }, Escape: () => choose(-1, -1) }[event.key];
    if (!act) return;
    event.preventDefault();
    event.stopPropagation();
    act();
  });
  function go(step) {   // from point to point, with the keys
    const all = seen.filter((p) => p.mark === undefined).sort((a, b) => a.level - b.level || a.point - b.point), here = all.findIndex((p) => same(p, pinned));
    if (!all.length) return;
    const p = all[(here + step + all.length + (here < 0 && step < 0 ? 1 : 0)) % all.length];
    choose(p.level, p.point);
    note.textContent = `${p.name}: ${tell(p)}`;
  }
  canvas.addEventListener("webglcontextlost", (event) => event.preventDefault());
  canvas.addEventListener("webglcontextrestored", () => { paint = glPainter(canvas) ?? paint; glance(); });

  el.alName = () => scene?.title ?? "";
  el.alSVG = () => {   // what is shown, as a picture, for whoever saves it
    const { namespaceURI } = new DOMParser().parseFromString("<svg></svg>", "text/html").querySelector("svg");   // no address stands in an exported page
    const make = (tag, more, text = "") => { const e = document.createElementNS(namespaceURI, tag); for (const [k, v] of Object.entries(more)) e.setAttribute(k, v); e.textContent = text; return e; };
    const w = stage.clientWidth, h = stage.clientHeight, picture = compose(), { wires, trails: ways, halos: balls, marks } = picture, k = (LENS * zoom * Math.min(w, h)) / 2, circles = wire(6, 5, 40);
    const css = ([r, g, b]) => `rgb(${[r, g, b].map((v) => Math.round(255 * v))})`, fixed = (x) => x.toFixed(1), at = ([x, y, z]) => [w / 2 + (k * x) / (EYE - z), h / 2 - (k * y) / (EYE - z)].map(fixed).join(" ");
    const svg = make("svg", { viewBox: `0 0 ${w} ${h}`, "aria-label": scene.title, "font-family": "system-ui,sans-serif", "font-size": 11, style: "color:var(--jp-ui-font-color1,#222)", fill: "currentColor" });
    const stroke = (color, opacity) => ({ fill: "none", stroke: css(color), "stroke-opacity": opacity });
    const dot = ([x, y, z, radius, r, g, b, shape]) => {
      const size = (radius * k) / (EYE - z), [cx, cy] = at([x, y, z]).split(" "), look = shape === MARK || shape === HALO ? { ...stroke([r, g, b], 1), "stroke-width": shape === MARK ? 3 : 0.5 } : { fill: css([r, g, b]), "fill-opacity": fixed(0.5 + 0.25 * (z + 1)) };
      svg.append(shape === 1 ? make("path", { d: `M${cx} ${cy}m0 ${fixed(-size)}l${fixed(size)} ${fixed(size)}l${fixed(-size)} ${fixed(size)}l${fixed(-size)} ${fixed(-size)}z`, ...look }) : make("circle", { cx, cy, r: fixed(size), ...look }));
    };
    balls.forEach(dot);
    for (const [size, color] of wires) for (const front of [false, true]) {
      let d = "";
      for (let i = 0; i < circles.length; i += 6) {
        const [a, b] = [0, 3].map((o) => apply(turn, circles.subarray(i + o, i + o + 3)));
        if (a[2] + b[2] > 0 === front) d += `M${at(a.map((v) => v * size))}L${at(b.map((v) => v * size))}`;
      }
      svg.append(make("path", { d, ...stroke(color, front ? 0.5 : 0.16) }));
    }
    for (const [places, color] of ways) svg.append(make("path", { d: places.map((p, i) => `${i ? "L" : "M"}${at(apply(turn, p))}`).join(""), ...stroke(color, 0.8) }));
    for (const q of sprites(picture)) dot(q);
    marks.forEach(dot);
    for (const e of names.children) { const [, x, y] = /translate\(([-\d.]+)px, *([-\d.]+)px\)/.exec(e.style.transform) ?? [0, 0, 0]; svg.append(make("text", { x, y: Number(y) + 11 }, e.textContent)); }
    return svg;
  };

  const sized = new ResizeObserver(glance), watched = new IntersectionObserver((list) => { shown = list.at(-1).isIntersecting; glance(); });
  sized.observe(stage);
  watched.observe(stage);
  const listeners = [["change:scene change:data", load], ["change:now change:now_data", renew], ["change:heard change:locked", hear], ["change:found", answer], ["change:reading", arrived]];
  listeners.forEach(([what, f]) => model.on(what, f));
  load();
  answer();
  return () => {
    cancelAnimationFrame(frame); cancelAnimationFrame(sending); clearTimeout(typing); halt(); rest();
    sized.disconnect(); watched.disconnect();
    listeners.forEach(([what, f]) => model.off(what, f));
    canvas.getContext("webgl2")?.getExtension("WEBGL_lose_context")?.loseContext();
  };
}

export default { render };
