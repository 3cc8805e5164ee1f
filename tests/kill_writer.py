"""The writer of the kill test: `python kill_writer.py FOLDER ROUNDS SEED`, prints one JSON object.

torch is imported once. Each round forks a child that saves checkpoints in a loop and tells of each through a pipe:
B and the step when it begins, C when `save` has returned. The child is killed by SIGKILL at a random moment, and the
parent then looks at the store as a stranger would.
"""
import json
import os
import random
import signal
import sys
import time

import numpy as np
import torch

from adaptive_lab.store import Store

SIZE = 700_000    # float32 numbers of a state: 2.8 MB


def content(run: int, step: int) -> dict:
    "The state of a step: what was saved can be told from its place alone."
    w = np.arange(SIZE, dtype=np.float32)
    w += 1000 * run + step
    return {"w": torch.from_numpy(w), "step": step}


def write_forever(store: Store, run: int, pipe: int):
    for step in range(10**6):
        state = content(run, step)
        os.write(pipe, b"B%d\n" % step)
        store.save(f"run{run}", step, state, metrics={"step": step})
        os.write(pipe, b"C%d\n" % step)


def killed_child(store: Store, run: int, delay: float) -> tuple[set, bool]:
    "The steps that a child reported as committed, and whether the kill came inside `save`."
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(out)
            write_forever(store, run, into)
        finally:
            os._exit(1)
    os.close(into)
    first = os.read(out, 4096)    # it has begun
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, f"the writer ended by itself: {status}"
    with os.fdopen(out, "rb") as f:
        lines = (first + f.read()).decode().split()
    return {int(x[1:]) for x in lines if x[0] == "C"}, lines[-1][0] == "B"


def check(store: Store, run: int, reported: set) -> int:
    "Everything reported is there and right, and at most one more; gives how many more."
    name = f"run{run}"
    listed = {ck.step for ck in store.checkpoints(name)}
    assert reported <= listed, f"run {run}: lost {sorted(reported - listed)}"
    assert len(listed - reported) <= 1, f"run {run}: listed without a commit: {sorted(listed - reported)}"
    for step in listed:
        state, good = store.load(name, step), content(run, step)
        assert state["step"] == step and torch.equal(state["w"], good["w"]), f"run {run}: wrong content at step {step}"
    return len(listed - reported)


def main(folder: str, rounds: int, seed: int):
    torch.set_num_threads(1)
    store, rng = Store(folder), random.Random(seed)
    keeper = store.save("keeper", 0, content(0, 0))
    begin = time.perf_counter()
    for step in range(1, 6):
        store.save("timing", step, content(0, step))
    once = (time.perf_counter() - begin) / 5
    told = dict(rounds=rounds, inside=0, committed=0, unreported=0, temporary=0, orphans=0)
    for run in range(1, rounds + 1):
        reported, inside = killed_child(store, run, rng.uniform(0, 2 * once))
        told["inside"] += inside
        told["committed"] += len(reported)
        told["unreported"] += check(store, run, reported)
        told["temporary"] += any((store.folder / "scratch").iterdir())
        known = {ck.hash for ck in store.checkpoints()}
        told["orphans"] += any(p.stem not in known for p in (store.folder / "objects").iterdir())
        store.save(f"run{run}", 10**7, {"after": run})    # the next save works, and what is left is cleaned
        for ck in store.checkpoints(f"run{run}"):
            if ck.step != 10**7:
                store.delete(ck.run, ck.step)
        store.collect()
        assert not any((store.folder / "scratch").iterdir())
    assert not store.verify() and store.load("keeper")["step"] == 0 and store.checkpoints("keeper") == [keeper]
    assert [store.load(f"run{run}")["after"] for run in range(1, rounds + 1)] == list(range(1, rounds + 1))
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
