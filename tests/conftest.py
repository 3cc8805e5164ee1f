"""Notebooks run in processes of their own, beside the other tests: two at a time as long as there are others, then three.

That is one more than there are cores, for each waits now and then: for a kernel to begin and to end, a page, a clock.
"""
import multiprocessing
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in what the tests start: threads that wait for a busy core spin
# Bytecode is kept, whatever the machine wants: else each process compiles the project anew, and pytest rewrites each test.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
AT_ONCE = 3
FEWER = "collectonly keyword markexpr deselect ignore ignore_glob lf stepwise".split()  # options under which not all of a folder's tests may run
STARTED = pytest.StashKey()


def start(config, notebooks):
    "Ask for these notebooks at once, the last first: they take the longest, and short ones at the end leave no core idle."
    from test_notebooks import Running, serve

    spawn, gate = multiprocessing.get_context("spawn"), threading.Semaphore(AT_ONCE - 1)
    mine, theirs = zip(*(spawn.Pipe() for _ in range(AT_ONCE)))
    process = spawn.Process(target=serve, args=(theirs,))
    process.start()
    for line in theirs:
        line.close()  # else nobody would see that the process has died
    free = list(mine)

    def run_in_turn(path):
        with gate:
            line = free.pop()
            line.send(path)
            found = line.recv()
            free.append(line)
            return found

    pool = ThreadPoolExecutor(AT_ONCE)

    def end():
        pool.shutdown(wait=False, cancel_futures=True)
        if len(free) == AT_ONCE:  # nothing is under way: it ends by itself
            for line in mine:
                line.close()
            process.join(10)
        process.terminate()  # with all that it has begun, where the tests are left early

    config.add_cleanup(end)
    config.stash[STARTED] = Running(gate, {p: pool.submit(run_in_turn, p) for p in reversed(notebooks)})


def pytest_collection(session):
    "Where all tests are asked for, the notebooks begin while the others are collected."
    options = session.config.option
    if Path(__file__).parent in [Path(a).resolve() for a in session.config.args] and not any(getattr(options, name, None) for name in FEWER):
        from test_notebooks import NOTEBOOKS

        start(session.config, NOTEBOOKS)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name == "test_notebooks.py")


@pytest.fixture(scope="session", autouse=True)
def running(request):
    "What becomes of the chosen notebooks, futures by path. Release `running.gate` when nothing else runs."
    chosen = [i.callspec.params["path"] for i in request.session.items if getattr(i, "originalname", "") == "test_notebook_runs"]
    if chosen and STARTED not in request.config.stash:
        start(request.config, chosen)
    return request.config.stash.get(STARTED, None)
