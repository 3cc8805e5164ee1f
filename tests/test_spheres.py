"Nested spheres: the scene, its stable axes, the files, and the page in a real browser."
import base64
import json
import os
from xml.etree.ElementTree import fromstring

import numpy as np
import pytest
import torch

from adaptive_lab.doctor import find_browser
from adaptive_lab.spherepictures import disk_svg, film, remember, seen, spheres_svg, write_pictures
from adaptive_lab.spheres import EXPORT, MANY, STATIC, Level, Snapshot, axes_of, distance, exp0, kept, moment, neighbours, page, placed, plain, radii, reach, scene_of, thinned, unit

EVIL = ['</script><script>document.title="owned"</script>', '<img src=x onerror="document.title=\'owned\'">', '"&\'<b>', "a\x00\n\u202eb", "\ud800", "x" * 5000]
DIMS = (12, 8, 4)


def moments(many=3, names=("king", "queen", *EVIL), seed=0, dims=DIMS):
    "Snapshots of levels that drift, with boundary points, a descriptor and named points."
    g = np.random.default_rng(seed)
    n = 3 + 1 + len(names)
    start, ways = ([g.normal(size=(n, d)) / np.sqrt(d) for d in dims] for _ in range(2))
    told, kinds = ["boundary 0", "boundary 1", "boundary 2", "descriptor", *names], ["boundary"] * 3 + ["descriptor"] + ["word"] * len(names)
    level = lambda i, t: Level(1 + 0.5 * i, 0.9 - 0.1 * i, None if i == 2 else 0.6, told, kinds, start[i] + 0.1 * t * ways[i])
    return [Snapshot(10 * t, f"epoch {t}", [level(i, t) for i in range(len(dims))]) for t in range(many)]


# --- arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_geometry_is_that_of_the_levels(seed):
    from adaptive_lab.wubu.geometry import dist0, expmap0, tangent_dist

    g = np.random.default_rng(seed)
    u, v = g.normal(size=(2, 40, 6)) * 10 ** g.uniform(-2, 1, (2, 40, 1))
    c, s = g.uniform(0.1, 3, 2)
    tensor = lambda *a: [torch.tensor(x, dtype=torch.float64) for x in a]
    assert np.allclose(distance(u, v, c, s), tangent_dist(*tensor(u, v, c, s)), rtol=1e-9, atol=1e-12)
    assert np.allclose(exp0(v / 10, c, s), expmap0(*tensor(v / 10, c, s)), rtol=1e-10)
    assert np.allclose(distance(v / 10, 0 * v, c, s), dist0(expmap0(*tensor(v / 10, c, s)), torch.tensor(c)), rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 128])
def test_radii_are_kept_in_any_number_of_dimensions(n):
    v = np.random.default_rng(n).normal(size=(7, n)) * 3
    v[2], v[3] = 0, np.nan
    axes = axes_of(v)
    places, ok = placed(v, axes), np.arange(7) != 3
    assert np.allclose(np.linalg.norm(places, axis=1)[ok], np.linalg.norm(v, axis=1)[ok]) and np.isnan(places[3]).all()
    assert np.isclose(kept(v[ok], axes), 1) if n <= 3 else 0 < kept(v[ok], axes) < 1
    odd = np.zeros((1, n + 3))
    odd[0, -1] = 2.5  # a direction that no axis shows
    assert np.isclose(np.linalg.norm(placed(odd, np.eye(n + 3)[:, :3])), 2.5)


def test_the_points_do_not_jump_when_a_film_grows():
    g = np.random.default_rng(0)
    first = g.normal(size=(60, 16)) * ([1.02, 1.01, 1.0] + [0.1] * 13)
    shots, scene, worst, anew = [], None, 0.0, 0.0
    for t in range(12):
        bent = first + 0.02 * t * g.normal(size=first.shape)
        bent[: 4 * t] *= [1, 1, 1 + 0.05 * t] + [1] * 13  # the order of the variances changes on the way
        shots.append(Snapshot(t, "", [Level(1, 1, None, [str(j) for j in range(60)], ["word"] * 60, bent)]))
        before, scene = scene, scene_of(shots, before=scene)
        if before is not None:
            moved = lambda axes: np.linalg.norm(placed(first, axes) - placed(first, before.axes[0]), axis=1).mean() / np.linalg.norm(first, axis=1).mean()
            worst, anew = max(worst, moved(scene.axes[0])), max(anew, moved(scene_of(shots).axes[0]))
    assert worst < 0.05 and anew > 4 * worst
    places = [placed(s.levels[0].tangent, scene.axes[0]) for s in shots]
    assert np.array_equal(scene.rows(shots[3])[:, :3], places[3].astype(np.float16))  # one basis for every snapshot


def test_a_point_that_is_missing_is_not_drawn_and_takes_nobodys_place():
    a, b = Level(1, 1, None, ["x", "y"], ["boundary"] * 2, np.eye(3)[:2]), Level(1, 1, None, ["y", "z"], ["boundary", "word"], np.eye(3)[1:])
    scene = scene_of([Snapshot(0, "", [a]), Snapshot(5, "", [b])])
    tables = [scene.rows(s).astype(float) for s in scene.snapshots]
    assert [n for n, _ in scene.points[0]] == ["x", "y", "z"] and np.isnan(tables[0][2]).all() and np.isnan(tables[1][0]).all()
    assert tables[1][2, 3] == 1 and np.isclose(tables[1][2, 4], distance(np.eye(3)[2], np.eye(3)[1], 1, 1), rtol=1e-3)


def test_deep_points_and_points_that_are_not_finite_have_a_picture():
    level = Level(4, 2, 0.5, ["deep", "nan", "inf"], ["boundary"] * 3, np.array([[1e9, 0], [np.nan, 1], [np.inf, 0]]))
    scene = scene_of([Snapshot(0, "", [level])])
    rows = scene.rows(scene.snapshots[0]).astype(float)
    assert np.isfinite(rows[0, :3]).all() and reach(level.tangent, 4, 2)[0] == 1
    for svg in (spheres_svg(scene), disk_svg(level)):
        assert "nan" not in svg.replace(">nan", "") and fromstring(svg) is not None


@pytest.mark.parametrize(
    "make, word",
    [
        (lambda: Level(np.nan, 1, None, [], [], np.zeros((0, 2))), "c=nan"),
        (lambda: Level(1, 1, -1.0, [], [], np.zeros((0, 2))), "sigma=-1"),
        (lambda: Level(1, 1, None, ["a"], ["b"], np.zeros(3)), "shape (3,)"),
        (lambda: scene_of([]), "give one or more"),
        (lambda: scene_of([*moments(1), *moments(1, dims=(12, 8))]), "same levels"),
        (lambda: scene_of([Snapshot(0, "", [Level(1, 1, None, ["a", "a"], ["b", "b"], np.eye(2))])]).data(), "'a'"),
        (lambda: neighbours(moments(1)[0].levels[0], np.zeros(5)), "5 dimensions"),
    ],
)
def test_bad_input_is_named(make, word):
    with pytest.raises(ValueError, match=word.replace("(", r"\(").replace(")", r"\)")):
        make()


# --- pages and files ---------------------------------------------------------------------------------


def test_a_page_asks_for_nothing_and_names_are_text():
    html = page(scene_of(moments(), EVIL[0]), EVIL[1])
    assert not any(word in html.lower() for word in ("http:", "https:", "//www", "@import", "url(", "fetch(", "xmlhttp", "importscripts"))
    assert html.count("<script") == html.count("</script") == 2 and "default-src 'none'" in html and "<img" not in html
    assert len(html) < 120_000 and EXPORT in (STATIC / "spheres.js").read_text(encoding="utf-8")
    assert plain("a\x00\n\u202eb") == "a␀␊\ufffdb" and len(plain("x" * 5000)) == 61


def test_pictures_are_xml_whatever_the_names():
    scene = scene_of(moments())
    for svg in (spheres_svg(scene), *(disk_svg(level, EVIL[0], labels=20) for level in scene.snapshots[-1].levels)):
        root = fromstring(svg)
        assert not [e for e in root.iter() if e.tag.endswith(("script", "img"))]


def test_a_film_survives_a_kill_and_goes_on_from_a_checkpoint(tmp_path):
    shots = moments(6)
    for s in shots[:5]:
        remember(tmp_path, s)
    (tmp_path / "snapshots.jsonl.tmp").write_text('{"step": 99')  # what a killed process left beside it
    files = write_pictures(tmp_path, moments(4, seed=1)[3], "epoch_3")
    kept_now = film(tmp_path)
    assert [s.step for s in kept_now] == [0, 10, 20, 30] and np.allclose(kept_now[3].levels[0].tangent, moments(4, seed=1)[3].levels[0].tangent, atol=1e-6)
    assert kept_now[0].levels[0].names == shots[0].levels[0].names
    assert [f.name for f in files] == ["nested_spheres_epoch_3.png", "nested_spheres.html", *(f"poincare_disk_level_{i}_epoch_3.svg" for i in range(3))] and all(f.stat().st_size > 500 for f in files)
    assert [s.step for s in remember(tmp_path, shots[5], most=3)] == [0, 20, 50] and thinned([1], 3) == [1]


# --- the page in a browser ---------------------------------------------------------------------------

needs_browser = pytest.mark.skipif(not find_browser() and not os.environ.get("CI"), reason="no browser was found: install Chromium, or run `make test`, which brings one")
LIVE = """<!doctype html><meta charset="utf-8"><div id="a"></div><script type="module">SOURCE
const raw = GIVEN, heard = {}, bytes = (t) => new DataView(Uint8Array.from(atob(t), (ch) => ch.charCodeAt(0)).buffer);
const held = { ...raw, data: bytes(raw.data), now_data: bytes(raw.now_data) };
window.kernel = { held, saved: [], set(more) { Object.assign(held, more); for (const k in more) (heard[`change:${k}`] ?? []).forEach((f) => f()); } };
const model = { get: (k) => held[k], set: (v) => Object.assign(held, v), save_changes: () => kernel.saved.push(JSON.parse(JSON.stringify([held.asked, held.turn, held.typed, held.search]))),
  on: (names, f) => names.split(" ").forEach((n) => (heard[n] ??= []).push(f)), off() {} };
window.end = render({ model, el: document.getElementById("a") });
</script>"""


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    from adaptive_lab.bench.browser import FLAGS

    with sync_playwright() as p:
        made = p.chromium.launch(executable_path=find_browser(), headless=True, args=FLAGS)
        yield made
        made.close()


def shown(browser, path, html, motion="reduce", without=""):
    "A page with this text, its errors and requests."
    path.write_text(html, encoding="utf-8", errors="surrogatepass") if isinstance(html, str) else None
    tab = browser.new_page(viewport=dict(width=1000, height=700), reduced_motion=motion)
    tab.set_default_timeout(10_000)
    tab.errors, tab.requests = [], []
    tab.on("pageerror", lambda e: tab.errors.append(str(e)))
    tab.on("console", lambda m: tab.errors.append(m.text) if m.type == "error" else None)
    tab.on("request", lambda r: tab.requests.append(r.url))
    tab.add_init_script("window.frames_drawn = 0; for (const [P, f] of [[WebGL2RenderingContext, 'clear'], [CanvasRenderingContext2D, 'clearRect']]) { const g = P.prototype[f]; P.prototype[f] = function (...a) { window.frames_drawn++; return g.apply(this, a); }; }")
    tab.add_init_script(without)
    tab.goto(path.as_uri())
    tab.wait_for_function("() => window.frames_drawn > 0")
    return tab


def place(tab, scene, level, point, at=-1, **other):
    "Where on the page a point is drawn, by Python's reckoning."
    s = scene.snapshots[at]
    levels = [Level(**{**{k: getattr(x, k) for k in ("c", "s", "sigma", "names", "kinds", "tangent")}, **(other if i == level else {})}) for i, x in enumerate(s.levels)]
    x, v = levels[level], levels[level].tangent[point]
    p = unit(placed(v, scene.axes[level])) * reach(v, x.c, x.s) * radii(levels)[level]
    (a, b), _ = seen(p, np.degrees(-0.6), np.degrees(0.42))
    box = tab.locator(".stage").bounding_box()
    half = min(box["width"], box["height"]) / 2
    return box["x"] + box["width"] / 2 + half * a, box["y"] + box["height"] / 2 - half * b


def tip(tab):
    return tab.evaluate("() => { const e = document.querySelector('.tip'); return e.style.visibility === 'visible' ? e.textContent : ''; }")


def hover(tab, xy, wanted):
    "Point there and wait for the name, or for none."
    tab.mouse.move(*xy)
    tab.wait_for_function("(t) => { const e = document.querySelector('.tip'), on = e.style.visibility === 'visible'; return t ? on && e.textContent.includes(t) : !on; }", arg=wanted)
    if wanted:  # the box stands beside the point, at its right or left, or at the picture's edge
        tip, stage = tab.locator(".tip").bounding_box(), tab.locator(".stage").bounding_box()
        at_edge = tip["x"] < stage["x"] + 1 or tip["x"] + tip["width"] > stage["x"] + stage["width"] - 1
        assert at_edge or min(abs(tip["x"] - 12 - xy[0]), abs(tip["x"] + tip["width"] + 12 - xy[0])) < 1.5
        assert abs(tip["y"] - 10 - xy[1]) < 1.5 or tip["y"] + tip["height"] > stage["y"] + stage["height"] - 2


def alone(scene, level, at=-1):
    "A named point of the level that has no other one near it on the screen."
    flat = []
    for i, (x, axes, r) in enumerate(zip(scene.snapshots[at].levels, scene.axes, radii(scene.snapshots[at].levels))):
        p, _ = seen(unit(placed(x.tangent, axes)) * reach(x.tangent, x.c, x.s)[:, None] * r, np.degrees(-0.6), np.degrees(0.42))
        flat += [(i, j, *q) for j, q in enumerate(p)]
    far = lambda q: min(np.hypot(q[2] - o[2], q[3] - o[3]) for o in flat if o[:2] != q[:2])
    return max((q for q in flat if q[0] == level), key=far)[1]


@needs_browser
@pytest.mark.parametrize("without", ["", "const f = HTMLCanvasElement.prototype.getContext; HTMLCanvasElement.prototype.getContext = function (k, ...a) { return k === 'webgl2' ? null : f.call(this, k, ...a); };"])
def test_the_page_names_what_is_pointed_at(browser, tmp_path, without):
    scene = scene_of(moments(), EVIL[0])
    tab = shown(browser, tmp_path / "a.html", page(scene), without=without)
    for level in range(3):
        j = alone(scene, level)
        hover(tab, place(tab, scene, level, j), scene.snapshots[-1].levels[level].names[j])
        assert f"level {level}" in tip(tab)
    assert abs(float(tip(tab).split("radius ")[1].split(",")[0]) - 2 * scene.snapshots[-1].levels[2].s * np.linalg.norm(scene.snapshots[-1].levels[2].tangent[j])) < 0.01
    box = tab.locator(".stage").bounding_box()
    hover(tab, (box["x"] + 3, box["y"] + 3), "")
    assert tab.title() != "owned" and tab.locator(".al-spheres img").count() == 0 and tab.requests == [(tmp_path / "a.html").as_uri()] and tab.errors == []
    tab.close()


@needs_browser
def test_levels_snapshots_sliders_and_names_of_the_page(browser, tmp_path):
    scene = scene_of(moments(names=("king", "queen")))
    tab = shown(browser, tmp_path / "b.html", page(scene))
    j = alone(scene, 0)
    name = scene.points[0][j][0]
    hover(tab, place(tab, scene, 0, j), name)
    tab.get_by_label("show level 0").uncheck()
    hover(tab, place(tab, scene, 0, j), "")
    tab.get_by_label("show level 0").check()
    tab.get_by_label("snapshot", exact=True).press("Home")  # the first one
    k = alone(scene, 0, 0)
    hover(tab, place(tab, scene, 0, k, at=0), scene.points[0][k][0])
    assert "epoch 0, step 0" in tab.locator(".bar output").inner_text()
    slider = tab.get_by_label("scale of level 0")
    for _ in range(5):
        slider.press("PageDown")  # a tenth of a decade each
    hover(tab, place(tab, scene, 0, k, at=0, s=scene.snapshots[0].levels[0].s * 10**-0.5), scene.points[0][k][0])
    assert float(slider.locator("xpath=../output").inner_text()) == pytest.approx(0.9 * 10**-0.5, rel=0.01)
    tab.get_by_role("button", name="as saved").click()
    hover(tab, place(tab, scene, 0, k, at=0), scene.points[0][k][0])
    assert tab.get_by_label("spread of level 2").count() == 1 and not tab.get_by_label("spread of level 2").is_visible()  # it has none
    tab.get_by_label("text whose nearest").fill("quee")
    tab.wait_for_selector(".near li")
    near = neighbours(scene.snapshots[0].levels[0], scene.snapshots[0].levels[0].tangent[5], 4)[1:]  # without itself
    assert tab.locator(".near li button").all_inner_texts() == [scene.points[0][i][0] for i, _, _ in near] and "3 points have" in tab.locator(".note").inner_text()
    tab.locator("canvas").focus()
    tab.keyboard.press("Escape")
    for key in ("n", "n", "p"):
        tab.keyboard.press(key)
    assert scene.points[0][0][0] in tab.locator(".note").inner_text()
    focusable = "() => [...document.querySelectorAll('.al-spheres input, .al-spheres button, .al-spheres canvas, .al-spheres [tabindex]')].filter(e => e.getAttribute('data-lm-suppress-shortcuts') !== 'true').length"
    assert tab.evaluate(focusable) == 0 and tab.errors == []
    tab.close()


@needs_browser
@pytest.mark.parametrize("motion", ["reduce", "no-preference"])
def test_it_turns_by_itself_only_where_motion_is_welcome(browser, tmp_path, motion):
    scene = scene_of(moments(1, names=()))
    tab = shown(browser, tmp_path / "c.html", page(scene), motion)
    drawn = lambda: tab.evaluate("() => new Promise((done) => setTimeout(() => { const n = window.frames_drawn; setTimeout(() => done(window.frames_drawn - n), 250); }, 100))")
    assert (drawn() > 1) == (motion == "no-preference")
    tab.locator("canvas").focus()
    tab.keyboard.press(" ")  # and the other way round when it is asked for
    assert (drawn() > 1) == (motion == "reduce")
    tab.close()


@needs_browser
def test_sliders_of_a_live_page_ask_and_follow(browser, tmp_path):
    *shots, now = moments(4, names=("king", "<queen>"))
    scene = scene_of(shots)
    pack = lambda b: base64.b64encode(b).decode()
    given = dict(scene=scene.head(), data=pack(scene.data()), live=True, now={}, now_data=pack(scene.rows(now).tobytes()), asked=[], turn=0, heard=0, typed="", search=0, found={}, locked=False)
    html = LIVE.replace("SOURCE", (STATIC / "spheres.js").read_text(encoding="utf-8").replace(EXPORT, "")).replace("GIVEN", json.dumps(given).replace("<", "\\u003c"))
    tab = shown(browser, tmp_path / "d.html", html)
    assert tab.get_by_label("curvature of level 1").is_disabled() and "epoch 2" in tab.locator(".bar output").inner_text()  # nothing is heard of the run yet
    tab.evaluate("(now) => kernel.set({ now })", moment(now))
    assert "now, epoch 3, step 30" in tab.locator(".bar output").inner_text()
    slider, value = tab.get_by_label("curvature of level 1"), tab.get_by_label("curvature of level 1").locator("xpath=../output")
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    tab.wait_for_function("() => kernel.saved.length > 0 && kernel.held.turn === 2")
    tab.wait_for_function("() => kernel.saved.at(-1)[1] === 2")
    (level, key, wish), = tab.evaluate("kernel.saved.at(-1)[0]")
    assert (level, key) == (1, "c") and wish == pytest.approx(1.5 * 10**0.02, rel=1e-3) and float(value.inner_text()) == pytest.approx(wish, rel=1e-2)
    tab.evaluate("() => kernel.set({ heard: 1 })")
    assert float(value.inner_text()) == pytest.approx(wish, rel=1e-2)  # the second wish is still open
    tab.evaluate("() => kernel.set({ now: { ...kernel.held.now, c: [1, 7, 2] }, heard: 2 })")
    assert float(value.inner_text()) == 7  # from now on it shows what the run says
    tab.get_by_label("snapshot", exact=True).press("Home")
    assert slider.is_disabled() and "step 0" in tab.locator(".bar output").inner_text()
    tab.evaluate("() => kernel.set({ now: { ...kernel.held.now, step: 31 } })")
    assert "epoch 0, step 0" in tab.locator(".bar output").inner_text()  # a running model does not drag one out of the past
    tab.get_by_label("snapshot", exact=True).press("End")
    assert not slider.is_disabled()
    tab.evaluate("() => kernel.set({ locked: true })")
    assert slider.is_disabled()
    tab.get_by_label("text whose nearest").fill("a<b>")
    tab.wait_for_function("() => kernel.held.search === 1 && kernel.held.typed === 'a<b>'")
    found = dict(text="a<b>", note="as the model was", levels=[dict(places=[[0.1, 0.2, 0.3], [0.3, 0, 0]], near=[["<queen>", 1.25, 1]])] * 3)
    tab.evaluate("(found) => kernel.set({ found })", found)
    assert "<queen> to patch 2" in tab.locator(".near li").first.inner_text() and "1.25" in tab.locator(".near li").first.inner_text()
    tab.wait_for_function("() => [...document.querySelectorAll('.names span')].some((e) => e.textContent.includes('a<b>'))")
    tab.evaluate("() => kernel.set({ found: { ...kernel.held.found, text: 'older' } })")  # an answer to another question
    assert tab.locator(".near li").count() == 3
    tab.evaluate("end()")
    assert tab.errors == []
    tab.close()


def test_a_hundred_thousand_points_make_a_page_without_their_distances():
    from adaptive_lab.bench.spheres import drifting

    level = drifting(MANY, 1, (4,))[0].levels[0]
    html = page(scene_of([Snapshot(0, "", [level])]))
    assert level.near == [[]] * len(level.tangent) and "far" not in level.__dict__ and html.count("boundary") > 5
    assert len(Level(1, 1, None, [*"ab"], ["x"] * 2, np.eye(2)).near[0]) == 1
