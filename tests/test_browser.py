"A real JupyterLab in a real browser: open, run, slide, pause, step, export, reopen."
import json
import os
import re
import shutil
from pathlib import Path

import pytest

from adaptive_lab.bench.browser import browser_page, lab_server, open_notebook, panel_notebook, press, python, run_all, slider
from adaptive_lab.cli import main
from adaptive_lab.doctor import find_browser
from adaptive_lab.run import replay
from adaptive_lab.tape import load_session

if not find_browser() and not os.environ.get("CI"):  # in CI its absence is a failure
    pytest.skip("no browser was found: install Chromium, or run `make test`, which brings one", allow_module_level=True)

NBS = Path(__file__).parents[1] / "nbs"
KNOBS = {"run.steps": 3000, "run.threads": 1, "data.steps_per_task": 600, "optimizer.warmup_steps": 100, "optimizer.plasticity_k": 1.0}


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A folder with the workbench and a panel, a server for it, and a page."
    folder = tmp_path_factory.mktemp("project")
    (folder / "nbs").mkdir()
    shutil.copy(NBS / "workbench.ipynb", folder / "nbs")
    panel_notebook(folder / "nbs/panel.ipynb", KNOBS)
    with lab_server(folder / "nbs/panel.ipynb") as address, browser_page() as page:
        yield folder, address, page


def fresh_panel(page, address):
    "The panel's notebook, open, its cell run anew."
    open_notebook(page, address, "nbs/panel.ipynb")
    run_all(page)


def status(page):
    return page.locator(".al-panel .widget-html-content").first.inner_text()


def wait_status(page, text, seconds=60):
    page.wait_for_function("(t) => document.querySelector('.al-panel .widget-html-content')?.innerText.includes(t)", arg=text, timeout=seconds * 1000)


def gates(page):
    return next(p for p in pictures(page) if "gates at k" in p)


def pictures(page):
    return page.evaluate("() => [...document.querySelectorAll('.al-live')].map(e => e.innerHTML)")


def bench_page(page, address):
    "The workbench, whose training starts by itself."
    errors = []
    page.on("pageerror", lambda e: errors.append(str(e)))
    open_notebook(page, address, "nbs/workbench.ipynb")
    run_all(page)
    wait_bench(page, "running · step [1-9]")
    return errors


def wait_bench(page, pattern, seconds=60):
    page.wait_for_function("(p) => [...document.querySelectorAll('.al-panel .widget-html-content')].some((e) => new RegExp(p).test(e.innerText))", arg=pattern, timeout=seconds * 1000)


def test_the_workbench_runs_travels_and_refuses(project):
    folder, address, page = project
    errors = bench_page(page, address)
    first = pictures(page)
    page.wait_for_timeout(2500)
    assert pictures(page) != first
    press(page, "Pause")
    wait_bench(page, "paused · step")
    page.locator(".al-panel").get_by_text("Time travel", exact=True).first.click()
    scrub = page.locator(".al-film input[type=range]")
    page.wait_for_function("() => Number(document.querySelector('.al-film input[type=range]').max) >= 1", timeout=20_000)
    page.wait_for_timeout(1500)

    # the past is scrubbed in the page, with the keyboard, while the kernel is busy
    newest = page.locator(".al-film output").inner_text()
    page.evaluate("() => { const k = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel; k.requestExecute({code: 'import time; time.sleep(3)'}); }")
    scrub.focus()
    page.keyboard.press("Home")
    assert page.locator(".al-film output").inner_text() != newest and page.locator(".al-film svg").count() > 1
    page.wait_for_timeout(3500)

    # back to a step, and on in another way
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(500)
    press(page, "Branch here")
    page.wait_for_function("() => [...document.querySelectorAll('.al-pointer svg')].some((e) => e.getAttribute('aria-label').includes('split_digits-2'))", timeout=20_000)
    press(page, "Start")
    wait_bench(page, "running · step")
    press(page, "Pause")
    wait_bench(page, "paused · step")
    python(page, "bench.compose.around['heads'].value = True")
    page.locator(".al-panel").get_by_text("Compose", exact=True).first.click()
    press(page, "Build")
    wait_bench(page, "cannot run: .*needs an AdaptiveTransformer")
    assert not errors and python(page, "print(len(bench.tree.parents))").strip() == "2"

    # all of it replays, in another process
    python(page, "bench.save_branches()")
    wait_bench(page, "replay it")
    assert main(["replay", str(folder / "nbs/workbench/run.json")]) == 0


def test_what_is_typed_into_the_workbench_is_text(project):
    "Names and titles are neither HTML nor script, in the page and in the file."
    folder, address, page = project
    errors = bench_page(page, address)
    evil = "<img src=x onerror=window.__hurt=1><script>window.__hurt=1</script>"
    python(page, f"e = {evil!r}; bench.title.value = e; bench.compose.name.value = e; bench.compose.keep(); bench.tell(e); bench.travel.tell(e); bench.file.value = 'evil.html'; bench._record(); bench.save_page()")
    page.wait_for_timeout(800)
    assert page.evaluate("() => window.__hurt ?? 0") == 0 and page.locator(".al-panel img[src=x]").count() == 0
    press(page, "Pause")
    tab, asked = page.context.browser.new_page(), []
    tab.on("request", lambda r: asked.append(r.url))
    tab.on("pageerror", lambda e: errors.append(str(e)))
    tab.goto((folder / "nbs/workbench/evil.html").as_uri())
    tab.wait_for_selector("#film svg")
    assert tab.evaluate("() => window.__hurt ?? 0") == 0 and all(u.startswith("file:") for u in asked) and not errors
    tab.close()
    python(page, "bench.panel.live.stop()")


def test_a_session_by_hand_replays_to_identical_weights(project, monkeypatch):
    folder, address, page = project
    fresh_panel(page, address)
    press(page, "Step n")
    wait_status(page, "step 100 of")
    wait_status(page, "paused")
    page.locator(".al-panel button", has_text=re.compile("^Step$")).click()
    wait_status(page, "step 101 of")

    # slide while paused: the gates' picture shows where it leads, though no step was made
    before = gates(page)
    assert "gates at k = 1<" in before or "gates at k = 1," in before
    handle = slider(page, "plasticity_k")
    handle.focus()
    for _ in range(90):
        page.keyboard.press("ArrowRight")
    page.wait_for_function("() => [...document.querySelectorAll('.al-live')].some(e => e.innerHTML.includes('gates at k = 10'))", timeout=30_000)
    assert gates(page) != before and "step 101" in status(page) and "next step" in status(page)

    # slide while it runs
    press(page, "Resume")
    wait_status(page, "running")
    lr = slider(page, "lr")
    lr.focus()
    for _ in range(4):
        page.keyboard.press("ArrowRight")
        page.wait_for_timeout(120)
    press(page, "Pause")
    wait_status(page, "paused")
    page.get_by_text("Export", exact=True).click()
    press(page, "Save")
    page.wait_for_selector("text=adaptive-lab replay session.json")
    press(page, "Show Python")
    page.wait_for_function("() => document.querySelector('.al-panel textarea').value.includes('Tape([')")

    session = load_session(folder / "nbs/session.json")
    assert [c.knob for c in session.tape][0] == "optimizer.plasticity_k" and {c.knob for c in session.tape} == {"optimizer.plasticity_k", "optimizer.lr"}
    assert session.tape.changes[0].step == 101 and session.tape.changes[0].value == pytest.approx(10)
    assert replay(session.recipe, session.tape, session.until).session().weights == session.weights
    scope = {}
    exec(page.evaluate("() => document.querySelector('.al-panel textarea').value"), scope)
    assert scope["run"].session().weights == session.weights


def test_heat_maps_and_diagnosis_follow_the_training(project):
    "The images decode in the page and change with the training; the diagnosis comes when the first task is forgotten."
    _, address, page = project
    fresh_panel(page, address)
    decoded = """async () => { const found = [];
      for (const i of document.querySelectorAll('.al-live image')) { const p = new Image(); p.src = i.getAttribute('href'); await p.decode(); found.push([p.width, p.height]); }
      return found; }"""
    heat = lambda: next(p for p in pictures(page) if "gates of each layer" in p)
    n = page.locator(".al-panel input[type=number]").first
    n.fill("590")
    n.press("Enter")
    press(page, "Step n")
    wait_status(page, "paused · step 590 of")
    page.wait_for_timeout(300)
    before, sizes = heat(), page.evaluate(decoded)
    assert "after step 590" in before and [64, 64] in sizes and [64, 10] in sizes and [8, 8] in sizes
    assert page.locator(".al-advice").count() == 0
    n.fill("110")
    n.press("Enter")
    press(page, "Step n")
    wait_status(page, "paused · step 700 of")
    page.wait_for_selector(".al-advice >> text=forgets the old tasks", timeout=10_000)
    assert "increase plasticity_k (now 1)" in page.locator(".al-advice").inner_text()
    assert heat() != before and "after step 700" in heat()


def test_keys_typed_in_a_panel_never_reach_the_notebook(project):
    "a and b insert cells, dd deletes, arrows move, Enter edits: none of it from inside the panel."
    _, address, page = project
    fresh_panel(page, address)
    count = "() => document.querySelectorAll('.jp-Notebook .jp-Cell').length"
    cells = page.evaluate(count)
    spots = page.locator(".al-panel button:visible, .al-panel input:visible, .al-panel select:visible, .al-panel textarea:visible, .al-panel .noUi-handle:visible, .al-panel [contenteditable]:visible")
    assert spots.count() > 15
    for i in range(spots.count()):
        spots.nth(i).focus()
        for key in ("a", "b", "x", "ArrowDown", "d", "d", "m", "j"):
            page.keyboard.press(key)
        assert page.evaluate(count) == cells, spots.nth(i).evaluate("e => e.outerHTML")[:200]
    assert page.evaluate("() => document.querySelector('.jp-Notebook .jp-Cell').classList.contains('jp-CodeCell')")


def test_reset_and_refusal(project):
    _, address, page = project
    fresh_panel(page, address)
    python(page, "panel._turned('optimizer.lr', 5.0)")
    wait_status(page, "lr=5.0 is not allowed")
    press(page, "Reset")
    page.wait_for_function(  # the old status says ready too: the new one neither refuses nor builds
        "() => { const t = document.querySelector('.al-panel .widget-html-content')?.innerText ?? ''; return t.includes('ready') && !/allowed|building/.test(t) }"
    )
    assert "step 0 of" in status(page)
    press(page, "Stop")
    wait_status(page, "stopped")
    press(page, "Start")
    wait_status(page, "a reset starts it anew")


def test_a_reopened_notebook_shows_its_last_picture(project):
    folder, address, page = project
    fresh_panel(page, address)
    press(page, "Step n")
    wait_status(page, "paused · step 100 of")
    page.wait_for_timeout(800)
    page.evaluate("() => window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_timeout(1500)
    saved = json.loads((folder / "nbs/panel.ipynb").read_text())
    assert any("al-still" in "".join(o.get("data", {}).get("text/html", "")) for c in saved["cells"] for o in c["outputs"])
    page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
    open_notebook(page, address, "nbs/panel.ipynb")
    page.wait_for_timeout(1500)
    assert page.locator("text=model not found").filter(visible=True).count() == 0
    image = page.locator(".al-still img").first
    assert image.is_visible() and image.evaluate("e => e.naturalWidth") > 100
    assert "step 100" in page.locator(".al-still").inner_text()


def test_a_failed_run_says_why(project):
    _, address, page = project
    fresh_panel(page, address)
    python(page, "panel.run.data.train._streams[0].X[:] = float('nan')")
    press(page, "Start")
    wait_status(page, "NonFiniteLoss")
    assert "step 0" in status(page)


def test_a_restarted_kernel_is_told(project):
    _, address, page = project
    fresh_panel(page, address)
    press(page, "Start")
    wait_status(page, "running")
    page.evaluate("() => { window.jupyterapp.shell.currentWidget.sessionContext.restartKernel() }")
    page.wait_for_selector("text=run this cell again", timeout=30_000)
    idle = "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status === 'idle'"
    page.wait_for_function(idle, timeout=30_000)


def test_a_second_tab_and_a_reload_find_the_bench_running(project):
    "The run is the kernel's: it survives its pages, and each page shows it."
    folder, address, page = project
    errors = bench_page(page, address)
    python(page, "bench.panel.live.pace = 20")
    page.wait_for_timeout(3000)  # the notebook is saved when its panel has come
    where = f"{address}/doc/tree/nbs/workbench.ipynb?token=lab"
    two = page.context.browser.new_page(viewport=dict(width=1280, height=900))
    two.goto(where)
    wait_bench(two, "running · step [1-9]")
    press(two, "Pause")
    wait_bench(page, "paused · step")
    press(page, "Resume")
    wait_bench(two, "running · step")
    two.close()
    page.reload()
    wait_bench(page, "running · step")
    before = pictures(page)
    page.wait_for_timeout(2500)
    assert pictures(page) != before and python(page, "print(bench.panel.live.state)").strip() == "running" and not errors


def test_what_goes_wrong_is_told_and_nothing_is_lost(project):
    "A picture that fails ends no training; a training that fails keeps its checkpoints, and goes on from one."
    _, address, page = project
    bench_page(page, address)
    python(page, """bench.panel.live.pace = 100
def fall(live): raise RuntimeError('a picture <b id=bold>fell</b> over')
bench.panel.extra[0] = (bench.panel.extra[0][0], fall)""")
    wait_bench(page, "running .*\\n*RuntimeError: a picture <b id=bold>fell</b> over")
    first = int(python(page, "print(bench.panel.run.index)"))
    page.wait_for_timeout(1000)
    assert int(python(page, "print(bench.panel.run.index)")) > first and page.locator("#bold").count() == 0
    python(page, """def poison(run):
    import torch
    with torch.no_grad(): next(run.model.parameters()).fill_(float('nan'))
bench.panel.live.between(poison)""")
    wait_bench(page, "failed .*\\n*NonFiniteLoss")
    assert int(python(page, "bench.tree.written(); print(len(bench.tree.steps(bench.tree.current)))")) > 1
    python(page, "bench.travel.step.value = bench.tree.steps(bench.tree.current)[-1]; bench.travel.leave()")
    wait_bench(page, "ready · step [1-9]|paused · step [1-9]")
    press(page, "Start")
    wait_bench(page, "running · step [1-9]")
    python(page, "bench.panel.live.stop()")


def test_a_picture_is_taken_away(project):
    "As SVG and as PNG, with the page's colours in it; what it is called is text."
    folder, address, page = project
    errors = bench_page(page, address)
    press(page, "Pause")
    wait_bench(page, "paused · step")
    page.wait_for_timeout(1500)  # its last pictures
    python(page, "from adaptive_lab.draw import picture\nbench.panel.loss.svg = picture('', 300, 100, '<img src=x onerror=window.__hurt=1>/../evil')")
    page.locator(".al-panel").get_by_text("Share", exact=True).first.click()
    menu = page.locator(".al-keep select").last
    menu.focus()
    names = menu.locator("option").all_inner_texts()
    assert "accuracy on held-out data" in names and any("onerror" in n for n in names)
    for name, kind, begin in (("accuracy on held-out data", "SVG", b"<?xml"), ("accuracy on held-out data", "PNG", b"\x89PNG"), (next(n for n in names if "onerror" in n), "SVG", b"<?xml")):
        menu.select_option(name)
        with page.expect_download() as given:
            page.locator(".al-keep button", has_text=kind).last.click()
        data = Path(given.value.path()).read_bytes()
        assert data.startswith(begin) and b"var(--" not in data and re.fullmatch(r"[\w-]+\.(svg|png)", given.value.suggested_filename)
    assert page.evaluate("() => window.__hurt ?? 0") == 0 and not errors
    python(page, "bench.panel.live.stop()")


SCREENS = Path(os.environ.get("ADAPTIVE_LAB_SCREENS", NBS.parent / "runs/screens"))  # pictures of every panel, kept by the run
PANELS = {  # what stands on the stage, as code for the kernel; how it is known that it is there
    **{name: (f"bench = Workbench({name!r}, folder='looks/{name}'); root = bench.root; bench.panel.start()", "running · step [1-9]|finished|paused") for name in ("tasks", "labels", "heads", "levels", "everything")},
    "map": ("""bench = Workbench('labels', folder='looks/labels2')
for at in (100, 200): bench.tree.save(bench.panel.run.advance(at))
bench.put(bench.tree.at(bench.tree.current, 100), (bench.tree.current, 100)); bench.panel.run.change({'optimizer.lr': 0.02}); bench.tree.save(bench.panel.run.advance(200))
bench.map.chart(); root = ipywidgets.VBox([bench.map.root]); root.add_class('al-panel')""", "checkpoints of 2 branches"),
    "landscape": ("""import numpy as np
from adaptive_lab.branchmap import judge, kin
from adaptive_lab.epsilon_vae.landscape import run_plane
from adaptive_lab.panels.landscape import LandscapePanel
(p,) = kin(bench.tree.store.folder, bench.recipe())
panel = LandscapePanel(run_plane(p, p.runs[0]), judge(p.rows[0].recipe), 'looks/decoded', p.rows[0].recipe, n=11)
while panel.advance(): pass
panel.draw(); root = panel.root""", "measured"),
}
FIT = """() => { const wrong = [], root = document.querySelector('.al-panel');
  for (const e of [root, document.querySelector('.jp-WindowedPanel-outer') ?? root]) if (e.scrollWidth > e.clientWidth + 1) wrong.push(`${e.className} is ${e.scrollWidth} wide, and ${e.clientWidth} are seen`);
  for (const e of root.querySelectorAll('.widget-slider, .widget-checkbox, .widget-dropdown, .widget-text')) {
    if (!e.getClientRects().length) continue;
    const name = e.querySelector('.widget-label')?.textContent || e.querySelector('.widget-label-basic span')?.textContent;
    if (!name) wrong.push(`no label: ${e.outerHTML.slice(0, 120)}`); }
  for (const e of root.querySelectorAll('.al-live svg')) for (const t of e.querySelectorAll('text')) { const a = t.getBoundingClientRect(), b = e.getBoundingClientRect();
    if (a.width && b.width > 100 && (a.right > b.right + 3 || a.left < b.left - 3)) wrong.push(`text over the edge: ${t.textContent} in ${e.getAttribute('aria-label')?.slice(0, 40)}`); }
  for (const e of root.querySelectorAll('button, input, select, textarea, [tabindex]')) if (e.getClientRects().length && e.getAttribute('data-lm-suppress-shortcuts') !== 'true') wrong.push(`keys leak: ${e.outerHTML.slice(0, 120)}`);
  return wrong; }"""


@pytest.fixture(scope="module")
def stage(project):
    "A page as wide as a small laptop with an empty stage, on which panels are put."
    import nbformat

    folder, address, page = project
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import ipywidgets\nfrom adaptive_lab.panels.workbench import Workbench\nstage = ipywidgets.VBox()\nstage")])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, folder / "nbs/stage.ipynb")
    before = page.viewport_size
    page.set_viewport_size(dict(width=1280, height=720))
    open_notebook(page, address, "nbs/stage.ipynb")
    run_all(page, None)
    yield page
    theme(page, "Light")
    page.set_viewport_size(before)


def theme(page, name):
    page.evaluate(f"() => window.jupyterapp.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {name}'}})")
    page.wait_for_function(f"() => document.body.dataset.jpThemeLight === '{str(name == 'Light').lower()}'", timeout=20_000)


def by_keyboard(page):
    "A section opens by Enter; what is told of a control moves none of them, and check boxes are told, too."
    for name in ("Compose", "Export"):  # of the bench, and of the panel in it
        page.locator(".al-panel .jupyter-widget-Collapse-header", has_text=name).first.focus()
        page.keyboard.press("Enter")
        page.wait_for_function("(name) => [...document.querySelectorAll('.jupyter-widget-Collapse-header[aria-expanded=true]')].some((e) => e.innerText === name)", arg=name)
    tops = set()
    for name in ("lr", "coincidence", "warmup_steps"):
        slider(page, name).focus()
        page.wait_for_timeout(100)
        tops.add(page.evaluate("() => document.querySelector('.al-meaning').parentElement.children[1].offsetTop"))
    page.locator(".al-panel input[title=adaptive_threshold]").focus()
    page.wait_for_function("() => /threshold anew/.test(document.querySelector('.al-meaning').innerText)")
    assert len(tops) == 1


@pytest.mark.parametrize("name", PANELS)
def test_every_panel_is_seen_in_both_themes(stage, name):
    "Nothing is cut off at 1280 pixels, every control has a label, no key leaks; a picture is kept for whoever looks."
    code, there = PANELS[name]
    errors = []
    stage.on("pageerror", lambda e: errors.append(str(e)))
    said = python(stage, f"[c.close() for c in stage.children]\n{code}\nstage.children = [root]")
    assert "Error" not in said, said
    wait_bench(stage, there, 90)
    if name == "levels":
        stage.get_by_label("read along").check()
        stage.wait_for_function("() => document.querySelectorAll('.al-spheres .reader span.read').length > 1", timeout=60_000)
    stage.wait_for_timeout(3500 if code.endswith("start()") else 1000)  # a run goes on and draws more
    SCREENS.mkdir(parents=True, exist_ok=True)
    for look in ("Light", "Dark"):
        theme(stage, look)
        stage.set_viewport_size(dict(width=1280, height=min(2400, 200 + int(stage.locator(".al-panel").first.bounding_box()["height"]))))
        stage.wait_for_timeout(900)
        stage.evaluate("() => document.querySelector('.al-panel').scrollIntoView()")
        stage.screenshot(path=SCREENS / f"{name}-{look.lower()}.png")
        assert stage.evaluate(FIT) == []
    stage.set_viewport_size(dict(width=1280, height=720))
    if name == "tasks":
        by_keyboard(stage)
    python(stage, "bench.panel.live.stop()")
    assert not errors
