"""Kills for the tests, in a process that has imported torch once and started no thread; prints one JSON object.

`python kill_writer.py random FOLDER KILLS NUMBERS`: writers of states of so many float32 numbers, killed at random moments.
`python kill_writer.py every FOLDER N [BROKEN]`: each deed of a store, ended at every N-th call; with a store that is broken on purpose.
"""
import json
import sys

import torch

from adaptive_lab import store as store_module
from adaptive_lab.bench import store as bench


def break_store(how: str):
    "Make the store wrong in one way."
    put, write = store_module._put, store_module.write_durably

    def commit(store, ck, code):
        path = store.folder / "records" / ck.run / f"{ck.step:012d}.json"
        write(path, [store_module.record_bytes(ck)], store.folder / "scratch")
        if how == "record first":
            put(store._object(ck.hash), code, store.folder / "scratch")

    def in_place(path, parts, scratch=None):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as f:
            for part in parts:
                f.write(part)

    if how == "written in place":
        store_module.write_durably = in_place
    else:
        store_module._commit = commit


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, folder, n, *more = sys.argv[1:]
    if what == "random":
        print(json.dumps(bench.random_kills(folder, int(n), numbers=int(more[0]))))
    else:
        deeds = dict(bench.DEEDS)
        if more:    # only what the broken store is asked for, on a template that was made by a good one
            template = bench._prepared

            def prepared(place):
                out = template(place)
                break_store(more[0])
                return out

            bench._prepared, bench.DEEDS = prepared, {"save": deeds["save"]}
        print(json.dumps(bench.every_kill(folder, int(n))))
