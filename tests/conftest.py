"Notebooks run in processes of their own, beside the other tests: one at a time as long as there are others, then two."
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, here and in what the tests start: threads that wait for a busy core spin
AT_ONCE = 2


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name == "test_notebooks.py")


@pytest.fixture(scope="session", autouse=True)
def running(request, tmp_path_factory):
    "What becomes of the chosen notebooks, futures by path; all are asked for at once. Release `running.gate` when nothing else runs."
    chosen = [i.callspec.params["path"] for i in request.session.items if getattr(i, "originalname", "") == "test_notebook_runs"]
    if not chosen:
        yield
        return
    from test_notebooks import Running, begin, run_in_turn

    spawn = multiprocessing.get_context("spawn")
    gate = spawn.Semaphore(1)
    pool = ProcessPoolExecutor(AT_ONCE, spawn, begin, (gate,))
    yield Running(gate, {p: pool.submit(run_in_turn, p, tmp_path_factory.mktemp("ipython")) for p in chosen})
    pool.shutdown(wait=False, cancel_futures=True)
