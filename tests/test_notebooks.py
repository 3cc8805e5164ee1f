"""Every notebook runs from top to bottom, each in a kernel of its own; `conftest.py` starts them.

Cells marked `#| eval: false`, or by a flag of `tst_flags` in settings.ini (notest, slow), are left out; name flags in
ADAPTIVE_LAB_FLAGS to run them all the same: ADAPTIVE_LAB_FLAGS=slow make test. The workbench is run by the browser tests.

A kept output is a claim too. Where it must come out the same on any machine (see SAME), the text is compared with the fresh one.
"""
import importlib.util
import multiprocessing
import os
import re
import sys
import tempfile
import threading
import traceback
from configparser import ConfigParser
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pytest
from jupyter_client.provisioning import LocalProvisioner
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if p.name != "workbench.ipynb" and ".ipynb_checkpoints" not in p.parts]
A_CELL = 300  # seconds
HEAVY = """ipykernel.kernelapp ipykernel.debugger matplotlib.figure matplotlib.axes torch._dynamo torch.utils.data scipy.stats
scipy.optimize sklearn.datasets sklearn.linear_model sklearn.ensemble pandas pydantic accelerate joblib gymnasium tyro ipywidgets anywidget
requests pooch filelock safetensors.torch blake3 tqdm.auto""".split()  # what notebooks import: CPU-seconds each time. Nothing of the project
# Notebooks whose texts depend on no processor, no library's version and no file of the system: whole numbers, messages, short floats.
SAME = set("00_knobs 01_parts 02_data.streams 03_data.files 04_data.tables 06_data.digits 11_durable 14_store".split())


def left_out():
    "The directives whose cells are not run."
    settings = ConfigParser(delimiters=["="], interpolation=None)
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    return set(settings["DEFAULT"]["tst_flags"].split()) - set(os.environ.get("ADAPTIVE_LAB_FLAGS", "").split())


def is_run(cell, flags):
    "Is this cell part of the test?"
    marks = re.findall(r"(?m)^#\|\s*(.+?)\s*$", cell.source)
    return cell.cell_type == "code" and not any(re.fullmatch(r"eval:\s*false", m, re.I) or m.split()[0] in flags for m in marks)


def shown(cell):
    "The text that a cell's outputs show: what it printed and its values, without pictures and warnings."
    printed = "".join(o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stdout")
    values = [o.data.get("text/plain", "") for o in cell.outputs if "data" in o and "image/png" not in o.data]
    return "\n".join([printed.rstrip(), *values]).strip()


def run(path, home):
    "Run a notebook; the failing cell and its error as text or an empty string, and what has changed in the outputs."
    nb = nbformat.read(path, as_version=4)
    flags = left_out()
    nb.cells = [c for c in nb.cells if is_run(c, flags)]
    kept = [shown(c) for c in nb.cells]
    # One thread a kernel, as several run at once; IPython's files in a folder of their own, so that no user's start-up script runs.
    env = {**os.environ, "IPYTHONDIR": str(home), "OMP_NUM_THREADS": "1", "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    quiet = ["--IPKernelApp.log_level=40"]  # else each kernel warns that it listens on a local port
    client = NotebookClient(nb, timeout=A_CELL, kernel_name="python3", extra_arguments=quiet, resources={"metadata": {"path": str(path.parent)}})
    try:
        client.execute(env=env)
    except CellExecutionError as e:
        return re.sub(r"\x1b\[[0-9;]*m", "", str(e)), ""
    changed = [f"{c.source}\n--- kept\n{old}\n--- fresh\n{shown(c)}" for c, old in zip(nb.cells, kept) if shown(c) != old]
    return "", "\n\n".join(changed)


async def launch_warm(self, cmd, *, env, cwd, **_):
    "In the place of `LocalProvisioner.launch_kernel`: a fork of the process that `begin` started."
    import warm_kernel  # of its function only the name goes there

    p = self.process = multiprocessing.get_context("forkserver").Process(target=warm_kernel.kernel, args=(cmd[3:], env, cwd))
    p.start()
    p.poll, p.wait, p.send_signal = lambda: p.exitcode, p.join, lambda number: os.kill(p.pid, number)  # as of a Popen
    p.stdin = p.stdout = p.stderr = None
    self.pid, self.cwd = p.pid, cwd
    return self.connection_info


def begin():
    "In the process that runs notebooks: its kernels start warm, where a process with torch in it can be forked."
    if sys.platform == "linux":
        os.environ |= dict(OMP_NUM_THREADS="1", MPLBACKEND="module://matplotlib_inline.backend_inline", PYDEVD_DISABLE_FILE_VALIDATION="1")  # read when they are imported
        multiprocessing.get_context("forkserver").set_forkserver_preload(HEAVY)
        forkserver.ensure_running()
        LocalProvisioner.launch_kernel = launch_warm


def serve(lines):
    "The process that runs notebooks: as many at once as there are lines, on which their paths come and what `run` gives goes back."
    def answer(line):
        while True:
            try:
                path = line.recv()
            except EOFError:
                return
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
                try:
                    found = run(path, home)
                except Exception:  # a kernel that dies, a cell without an end: else nobody would hear of it
                    found = traceback.format_exc(), ""
            line.send(found)

    begin()
    threads = [threading.Thread(target=answer, args=(line,)) for line in lines]
    for t in threads:
        t.start()
    for t in threads:
        t.join()


class Running(NamedTuple):
    "All chosen notebooks."

    gate: Any  # a semaphore: how many more may run at once
    found: dict  # path -> future of what `run` gives


@pytest.fixture(scope="session")
def found(running):
    "The notebooks as futures by path; by now nothing else runs, so that one more may run at once."
    running.gate.release()
    return running.found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_notebook_runs(path, found):
    error, changed = found[path].result()
    if error:
        pytest.fail(error, pytrace=False)
    if changed and path.stem in SAME:
        pytest.fail(f"{path.name} shows other outputs than it keeps: run it again and keep its outputs\n\n{changed}", pytrace=False)


def test_all_that_kernels_are_forked_with_is_there():
    assert [name for name in HEAVY if importlib.util.find_spec(name) is None] == []  # else it is passed over in silence


def test_a_failing_cell_is_reported_and_marked_ones_are_left_out(tmp_path):
    cell = nbformat.v4.new_code_cell
    nb = nbformat.v4.new_notebook(cells=[cell("#| eval: false\n1/0"), cell("#| slow\n1/0"), cell("x = 2"), cell("assert x == 3, 'x is two'")])
    nbformat.write(nb, tmp_path / "wrong.ipynb")
    error, _ = run(tmp_path / "wrong.ipynb", tmp_path)
    assert "x is two" in error and "1/0" not in error


def test_a_runner_that_fails_is_heard_of_and_goes_on(monkeypatch):
    def fails(path, home):
        if path == "good":
            return "", ""
        raise RuntimeError("the kernel died")

    monkeypatch.setitem(globals(), "run", fails)
    monkeypatch.setitem(globals(), "begin", lambda: None)
    mine, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=([theirs],))
    thread.start()
    mine.send("bad")
    error, _ = mine.recv()
    mine.send("good")
    assert "the kernel died" in error and mine.recv() == ("", "")
    mine.close()
    thread.join(30)
    assert not thread.is_alive()


def test_a_stale_output_is_found(tmp_path):
    new = nbformat.v4
    kept = lambda text: [new.new_output("execute_result", {"text/plain": text})]
    printed = [new.new_output("stream", name="stdout", text="a\nb\n"), *kept("3")]
    cells = [new.new_code_cell("6 * 7", outputs=kept("42")), new.new_code_cell("6 * 8", outputs=kept("42")), new.new_code_cell("x = 1", outputs=kept("1"))]
    cells += [new.new_code_cell("print('a'); print('b'); 3", outputs=printed), new.new_code_cell("import warnings; warnings.warn('no output'); 2", outputs=kept("2"))]
    nbformat.write(new.new_notebook(cells=cells), tmp_path / "stale.ipynb")
    error, changed = run(tmp_path / "stale.ipynb", tmp_path)
    assert error == "" and changed == "6 * 8\n--- kept\n42\n--- fresh\n48\n\nx = 1\n--- kept\n1\n--- fresh\n"
    assert SAME <= {p.stem for p in NOTEBOOKS}
