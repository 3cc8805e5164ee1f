"""Every notebook runs from top to bottom, two at a time, each in a kernel of its own.

Cells marked `#| eval: false`, or by a flag of `tst_flags` in settings.ini (notest, slow), are left out; name flags in
ADAPTIVE_LAB_FLAGS to run them all the same: ADAPTIVE_LAB_FLAGS=slow make test. The workbench is run by the browser tests.
"""
import os
import re
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if p.name != "workbench.ipynb" and ".ipynb_checkpoints" not in p.parts]
AT_ONCE, A_CELL = 2, 300  # notebooks, seconds


def left_out():
    "The directives whose cells are not run."
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return set(settings["DEFAULT"]["tst_flags"].split()) - set(os.environ.get("ADAPTIVE_LAB_FLAGS", "").split())


def is_run(cell, flags):
    "Is this cell part of the test?"
    marks = re.findall(r"(?m)^#\|\s*(.+?)\s*$", cell.source)
    return cell.cell_type == "code" and not any(re.fullmatch(r"eval:\s*false", m, re.I) or m.split()[0] in flags for m in marks)


def run(path, home):
    "Run a notebook; the failing cell and its error as text, or an empty string."
    nb = nbformat.read(path, as_version=4)
    flags = left_out()
    nb.cells = [c for c in nb.cells if is_run(c, flags)]
    # One thread a kernel, as two run at once; IPython's files in a folder of their own, so that no user's start-up script runs.
    env = {**os.environ, "IPYTHONDIR": str(home), "OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    quiet = ["--IPKernelApp.log_level=40"]  # else each kernel warns that it listens on a local port
    client = NotebookClient(nb, timeout=A_CELL, kernel_name="python3", extra_arguments=quiet, resources={"metadata": {"path": str(path.parent)}})
    try:
        client.execute(env=env)
    except CellExecutionError as e:
        return re.sub(r"\x1b\[[0-9;]*m", "", str(e))
    return ""


@pytest.fixture(scope="session")
def running(request, tmp_path_factory):
    "The notebooks chosen in this session, all started, as futures by path."
    chosen = [i.callspec.params["path"] for i in request.session.items if i.originalname == "test_notebook_runs"]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {p: pool.submit(run, p, tmp_path_factory.mktemp("ipython")) for p in chosen}
        pool.shutdown(wait=False, cancel_futures=True)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_notebook_runs(path, running):
    if error := running[path].result():
        pytest.fail(error, pytrace=False)


def test_a_failing_cell_is_reported_and_marked_ones_are_left_out(tmp_path):
    cell = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(cells=[cell("#| eval: false\n1/0"), cell("#| slow\n1/0"), cell("x = 2"), cell("assert x == 3, 'x is two'")])
    nbformat.write(nb, tmp_path / "wrong.ipynb")
    error = run(tmp_path / "wrong.ipynb", tmp_path)
    assert "x is two" in error and "1/0" not in error
