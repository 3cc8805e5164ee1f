"The gate grid and the controller's panel in a real page: click, drag, keys, a slow kernel, a training that goes on."
import json
import os
import time

import nbformat
import pytest

from adaptive_lab.bench.browser import browser_page, lab_server, open_notebook, python, run_all
from adaptive_lab.doctor import find_browser
from adaptive_lab.run import replay
from adaptive_lab.tape import load_session

if not find_browser() and not os.environ.get("CI"):
    pytest.skip("no browser was found: install Chromium, or run `make test`, which brings one", allow_module_level=True)

GRID = """
import time
import ipywidgets as w
from adaptive_lab.panels.gategrid import GateGrid, rows_of
from adaptive_lab.panels.picture import Picture

full = {(i, h): 1.0 for i in range(2) for h in (0, 1, 2, "ffn", "layer")}
grid, seen, slow = GateGrid(label="gates of a test"), [], 0.0
grid.show(full | {(1, 1): None})

def told(change):
    time.sleep(slow)
    seen.append(dict(asked=grid.wishes(), gesture=grid.gesture, held=grid.held))
    grid.show({**full, (1, 1): None, **held, **grid.wishes()}, grid.turn)
    held.update(grid.wishes())

held = {}
grid.observe(told, "turn")
root = w.VBox([grid, Picture()])
root.add_class("al-panel").add_class("al-first")
root
"""
PANEL = """
from adaptive_lab.tape import Recipe
from adaptive_lab.panels.controller import ControllerPanel

knobs = {"run.steps": 100000, "run.threads": 1, "run.eval_every": 1000, "data.limit": 50000, "data.context": 32, "data.batch_size": 4, "model.num_layers": 2, "model.dim": 32}
panel = ControllerPanel(Recipe("text", "adaptive_transformer", "adam", knobs))
panel
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    "A page with both cells run, and the notebook's folder."
    folder = tmp_path_factory.mktemp("gates") / "nbs"
    folder.mkdir()
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (GRID, PANEL)])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, folder / "gates.ipynb")
    with lab_server(folder / "gates.ipynb") as address, browser_page() as page:
        page.errors = []
        page.on("pageerror", lambda e: page.errors.append(str(e)))
        open_notebook(page, address, "nbs/gates.ipynb")
        run_all(page, ".al-panel:not(.al-first) .al-gates .cell")
        yield page, folder
        assert page.errors == []


@pytest.fixture
def page(project):
    "The page, the grid of the first cell as it was at first."
    page, _ = project
    python(page, "slow = 0.0; held.clear(); seen.clear(); grid.chosen = []; grid.locked = False; grid.show(full | {(1, 1): None}, grid.turn)")
    page.wait_for_function("() => !document.querySelector('.al-first .cell[aria-selected=true]') && !document.querySelector('.al-first .locked')")
    return page


def cell(page, row, column, panel=".al-first"):
    return page.locator(f'{panel} .cell[data-at="{row},{column}"]')


def label(page, row, column, panel=".al-first"):
    return cell(page, row, column, panel).get_attribute("aria-label")


def kernel(page, expression):
    return json.loads(python(page, f"import json; print(json.dumps({expression}))"))


def wait_for(page, expression, wanted, seconds=20):
    for _ in range(int(seconds * 20)):
        if (found := kernel(page, expression)) == wanted:
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{expression} is {found}, not {wanted}")


def drag(page, at, dx=0, dy=0, steps=6, up=True):
    box = cell(page, *at).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + dx, y + dy, steps=steps)
    if up:
        page.mouse.up()


def test_a_click_closes_a_gate_and_opens_it_again(page):
    cell(page, 0, 1).click()
    assert label(page, 0, 1) == "head 1 of layer 0, gate 0.00"
    wait_for(page, "grid.gates[0]", [1, 0, 1, 1, 1])
    cell(page, 0, 1).click()
    wait_for(page, "grid.gates[0]", [1, 1, 1, 1, 1])
    assert kernel(page, "[list(s['asked'].values()) for s in seen]") == [[0], [1]] and kernel(page, "grid.chosen") == [0, 1]
    assert kernel(page, "len({s['gesture'] for s in seen})") == 2


def test_a_drag_up_or_to_the_right_opens_and_is_one_gesture(page):
    drag(page, (1, 0), dy=48)
    wait_for(page, "grid.gates[1][0]", 0.5)
    drag(page, (0, 3), dx=-72)
    wait_for(page, "grid.gates[0][3]", 0.25)
    drag(page, (0, 3), dx=500)
    wait_for(page, "grid.gates[0][3]", 1)
    assert kernel(page, "len({s['gesture'] for s in seen})") == 3 and label(page, 1, 0) == "head 0 of layer 1, gate 0.50"
    wait_for(page, "grid.held", False)


def test_what_was_removed_can_be_chosen_and_not_moved(page):
    assert label(page, 1, 1) == "head 1 of layer 1, gate 0.00, removed"
    cell(page, 1, 1).click()
    drag(page, (1, 1), dy=-60)
    wait_for(page, "list(grid.part)", [1, 1])
    assert kernel(page, "seen") == [] and kernel(page, "grid.gates[1][1]") is None
    assert "removed" in cell(page, 1, 1).get_attribute("class") and page.locator(".al-first .told").inner_text().endswith("removed")


def test_keys_reach_every_gate_and_change_it_and_never_the_notebook(page):
    count = "() => document.querySelectorAll('.jp-Notebook .jp-Cell').length"
    cells = page.evaluate(count)
    cell(page, 0, 0).focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "-", "-", "+", "End", "0", "Home", " ", "ArrowUp", "ArrowUp", "Enter", "1", "ArrowLeft"):
        page.keyboard.press(key)
    wait_for(page, "grid.gates", [[1, 1, 1, 1, 1], [0, None, 0.9, 1, 0]])
    assert kernel(page, "grid.chosen") == [0, 0] and page.evaluate("() => document.activeElement.dataset.at") == "0,0"
    assert page.locator(".al-first .cell[tabindex='0']").count() == 1  # one stop of the tab key
    for key in ("a", "b", "x", "d", "d", "m", "j"):
        page.keyboard.press(key)
    assert page.evaluate(count) == cells and kernel(page, "grid.gates[0]") == [1] * 5
    assert page.locator(".al-first [tabindex]:not([data-lm-suppress-shortcuts=true])").count() == 0


def test_a_slow_kernel_gets_few_messages_all_places_and_the_last_values(page):
    python(page, "slow = 0.3")
    begun = time.perf_counter()
    cell(page, 0, 0).click()
    cell(page, 0, 1).click()
    drag(page, (1, 2), dy=1, up=False)
    box = cell(page, 1, 2).bounding_box()
    for i in range(40):
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2 + i + 5)
        page.wait_for_timeout(10)
    assert label(page, 1, 2) == "head 2 of layer 1, gate 0.54"  # the page does not wait for the kernel
    page.mouse.up()
    wait_for(page, "[grid.gates, grid.held]", [[[0, 0, 1, 1, 1], [1, None, 0.54, 1, 1]], False])
    assert kernel(page, "len(seen)") <= (time.perf_counter() - begun) / 0.3 + 2  # one at a time, and not one for each move
    python(page, "slow = 0.0")


def test_what_the_kernel_holds_takes_the_place_of_what_was_asked_for(page):
    python(page, "grid.unobserve_all('turn')")
    try:
        cell(page, 0, 2).click()
        page.wait_for_timeout(200)
        assert label(page, 0, 2) == "head 2 of layer 0, gate 0.00"  # asked for and not answered
        python(page, "grid.show(full | {(0, 2): 0.7}, grid.turn)")
        page.wait_for_function("() => document.querySelector('.al-first .cell[data-at=\"0,2\"]').getAttribute('aria-label').includes('0.70')")
        python(page, "grid.show(full | {(0, 2): 0.2, (0, 'layer'): 0.0}, grid.turn); grid.bars = [[.5] * 5] * 2; grid.notes = [['<b>n'] * 5] * 2; grid.locked = True")
        page.wait_for_function("() => document.querySelector('.al-first .cell[data-at=\"0,2\"]').title.includes('<b>n')")
        assert page.locator(".al-first .pale").count() == 4 and page.locator(".al-first b").count() == 0
        cell(page, 1, 0).click()
        assert label(page, 1, 0).startswith("head 0 of layer 1, gate 1.00")
    finally:
        python(page, "grid.observe(told, 'turn'); grid.bars = []; grid.notes = []; grid.locked = False")


MINE = ".al-panel:not(.al-first)"


def test_a_gate_moved_while_it_trains_is_on_the_tape_and_the_rest_follows(project):
    page, folder = project
    page.locator(MINE).evaluate("e => e.scrollIntoView()")
    page.locator(f"{MINE} button", has_text="Start").first.click()
    page.wait_for_function("() => document.querySelector('.al-passages')?.innerText.length > 60 && /held-out loss/.test(document.querySelector('.al-facts').innerText)", timeout=60_000)
    before = page.locator(".al-passages").inner_text()
    cell(page, 0, 1, MINE).click()
    cell(page, 1, 3, MINE).click()
    assert label(page, 0, 1, MINE).startswith("head 1 of layer 0, gate 0.00")
    page.wait_for_function("() => document.querySelector('.al-facts').innerText.includes('6 of 8')", timeout=60_000)
    page.locator(f"{MINE} button", has_text="Prune").click()
    page.wait_for_function("() => /6 there/.test(document.querySelector('.al-facts').innerText)", timeout=60_000)
    page.wait_for_function("() => document.querySelectorAll('.al-panel:not(.al-first) .cell.removed').length === 2")
    page.wait_for_function("() => document.querySelector('.al-passages').innerText.includes('6 heads open')", timeout=60_000)
    assert page.locator(".al-passages").inner_text() != before and "running" in page.locator(f"{MINE} .widget-html-content").first.inner_text()
    page.locator(f"{MINE} button", has_text="Undo gates").click()
    page.wait_for_function("() => document.querySelectorAll('.al-panel:not(.al-first) .cell.removed').length === 0")
    page.locator(f"{MINE} button", has_text="Pause").click()
    wait_for(page, "panel.live.state", "paused")
    python(page, f"from adaptive_lab.tape import save_session; save_session({str(folder / 's.json')!r}, panel.live.session())")
    done = load_session(folder / "s.json")
    words = " ".join(c.value for c in done.tape)
    assert "0.1=0.0" in words and "-0.1" in words and "+0.1" in words
    assert replay(done.recipe, done.tape, done.until).session().weights == done.weights


def test_in_a_pause_the_grid_shows_what_waits_and_the_loss_where_it_leads(project):
    page, _ = project
    wait_for(page, "panel.live.state", "paused")
    step = kernel(page, "panel.run.index")
    cell(page, 0, 4, MINE).click()
    page.wait_for_function("() => document.querySelector('.al-panel:not(.al-first) .widget-html-content').innerText.includes('0.ffn=0.0 waits')")
    wait_for(page, "[panel.watch.losses[-1][0], panel.watch.pause() is None]", [step, True])
    assert kernel(page, "[panel.run.index, float(panel.run.model.gate_ffn[0]), panel.grid.gates[0][4]]") == [step, 1, 0]
    assert label(page, 0, 4, MINE).startswith("feed-forward network of layer 0, gate 0.00")
    press_of = page.locator(f"{MINE} button", has_text="Good")
    assert press_of.is_disabled() and "no controller" in press_of.get_attribute("title")
