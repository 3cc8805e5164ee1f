"The pointer in a real page: click, drag, keys, a scaled picture, a slow kernel."
import json
import os

import nbformat
import pytest

from adaptive_lab.bench.browser import browser_page, lab_server, open_notebook, python, run_all
from adaptive_lab.doctor import find_browser
from adaptive_lab.maps import scatter

if not find_browser() and not os.environ.get("CI"):
    pytest.skip("no browser was found: install Chromium, or run `make test`, which brings one", allow_module_level=True)

CELL = """
import time
import ipywidgets as w
from adaptive_lab.maps import scatter
from adaptive_lab.panels.pointer import PointerPicture

svg, frame = scatter([(0, 0), (1, 1)], "map", view=((0, 1), (0, 1)))
pointer, seen, slow = PointerPicture(svg=svg, box=list(frame.box), label="latent"), [], 0.0

def told(change):
    time.sleep(slow)
    seen.append((change["name"], change["new"]))

pointer.observe(told, ["point", "held"])
root = w.VBox([pointer], layout=dict(width="400px"))
root.add_class("al-panel")
root
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pointer") / "nbs"
    folder.mkdir()
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, folder / "pointer.ipynb")
    with lab_server(folder / "pointer.ipynb") as address, browser_page() as page:
        open_notebook(page, address, "nbs/pointer.ipynb")
        run_all(page)
        yield page


def kernel(page, expression):
    return json.loads(python(page, f"import json; print(json.dumps({expression}))"))


def wait_for(page, expression, wanted, seconds=10):
    for _ in range(int(seconds * 20)):
        if (found := kernel(page, expression)) == wanted:
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"{expression} is {found}, not {wanted}")


def on_page(page, x, y):
    "The place of the page that shows a place of the picture."
    box = page.locator(".al-pointer svg").first.bounding_box()
    view = page.evaluate("() => { const v = document.querySelector('.al-pointer svg').viewBox.baseVal; return [v.width, v.height]; }")
    return box["x"] + x / view[0] * box["width"], box["y"] + y / view[1] * box["height"]


def mark(page):
    return page.evaluate("() => document.querySelector('.al-pointer .al-mark g')?.getAttribute('transform') ?? null")


def fresh(page):
    python(page, "slow = 0.0; pointer.point = []; pointer.held = False; seen.clear()")
    page.wait_for_function("() => !document.querySelector('.al-pointer .al-mark')")


def test_a_click_is_told_in_coordinates_of_the_picture_and_leads_to_the_data(page):
    fresh(page)
    _, frame = scatter([(0, 0), (1, 1)], "map", view=((0, 1), (0, 1)))
    width = page.locator(".al-pointer svg").first.bounding_box()["width"]
    assert width < 410 < 520  # the picture is scaled down
    page.mouse.click(*on_page(page, *frame.to_pixels((0.25, 0.75))))
    wait_for(page, "pointer.held or not pointer.point", False)
    assert kernel(page, "frame.to_data(*pointer.point)") == pytest.approx([0.25, 0.75], abs=0.005)
    assert kernel(page, "[n for n, _ in seen]") == ["point", "held", "held"] or kernel(page, "[n for n, _ in seen]") == ["point"]
    assert mark(page).startswith("translate(")


def test_a_click_beside_the_area_is_nothing_and_a_drag_beyond_it_ends_on_its_edge(page):
    fresh(page)
    page.mouse.click(*on_page(page, 500, 300))
    page.wait_for_timeout(200)
    assert kernel(page, "pointer.point") == [] and mark(page) is None
    page.mouse.move(*on_page(page, 200, 200))
    page.mouse.down()
    page.mouse.move(*on_page(page, 300, 250), steps=4)
    page.mouse.move(*on_page(page, 515, 375), steps=4)
    wait_for(page, "pointer.point", [454, 346])
    assert kernel(page, "pointer.held") is True
    page.mouse.up()
    wait_for(page, "pointer.held", False)
    page.mouse.move(*on_page(page, 100, 100))  # not held: nothing moves
    page.wait_for_timeout(200)
    assert kernel(page, "pointer.point") == [454, 346]


def test_a_slow_kernel_gets_few_messages_and_the_last_place(page):
    fresh(page)
    python(page, "slow = 0.2")
    page.mouse.move(*on_page(page, 100, 100))
    page.mouse.down()
    for i in range(60):
        page.mouse.move(*on_page(page, 100 + 5 * i, 100 + 3 * i))
        page.wait_for_timeout(10)
    assert mark(page) is not None and float(mark(page)[10:].split()[0]) > 380  # the page does not wait for the kernel
    page.mouse.up()
    page.wait_for_timeout(1500)
    wait_for(page, "[pointer.held, [round(v) for v in pointer.point]]", [False, [395, 277]])
    assert len([1 for name, _ in kernel(page, "seen") if name == "point"]) < 25


def test_arrows_move_the_mark_and_never_the_notebook(page):
    fresh(page)
    python(page, "pointer.point = [200.0, 200.0]; pointer.step = 4.0")
    page.wait_for_selector(".al-mark", state="attached")
    page.locator(".al-pointer").focus()
    for key in ("ArrowRight", "ArrowDown", "Shift+ArrowLeft"):
        page.keyboard.press(key)
    wait_for(page, "pointer.point", [184, 204])
    wait_for(page, "pointer.held", False)
    assert "latent: 184, 204" in page.locator(".al-pointer").get_attribute("aria-label")
    count = "() => document.querySelectorAll('.jp-Notebook .jp-Cell').length"
    cells = page.evaluate(count)
    for key in ("a", "b", "x", "d", "d", "m", "j"):
        page.keyboard.press(key)
    assert page.evaluate(count) == cells


def test_a_new_picture_keeps_the_mark(page):
    fresh(page)
    python(page, "pointer.point = [120.0, 80.0]")
    page.wait_for_selector(".al-mark", state="attached")
    python(page, "pointer.svg = scatter([(0, 0), (1, 1)], 'other', view=((0, 1), (0, 1)))[0]")
    page.wait_for_function("() => document.querySelector('.al-pointer').textContent.includes('other')")
    assert mark(page) == "translate(120 80)"
