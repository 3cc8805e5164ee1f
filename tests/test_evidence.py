"""Comparisons: the same numbers everywhere, nothing lost to a killed process, nothing run twice, nothing hidden."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from adaptive_lab import cells, evidence
from adaptive_lab.durable import NotWritten
from adaptive_lab.evidence import Cell, Comparison, compare
from adaptive_lab.statistics import holm, paired
from adaptive_lab.workers import LocalWorkers, run_cells

MEASURES = '''
import os, signal, sys, time
from pathlib import Path

def note(recipe, seed, what="run"):
    Path(recipe["folder"], f"{what}-{recipe['arm']}-{seed}-{time.time_ns()}").touch()

def noted(recipe, seed, what="run"):
    return any(Path(recipe["folder"]).glob(f"{what}-{recipe['arm']}-{seed}-*"))

def train(recipe, seed):
    "A short training in float32, from the global generator."
    import torch
    model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.Tanh(), torch.nn.Linear(96, 1))
    x = torch.randn(512, 64)
    y = x.square().mean(1, keepdim=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe["lr"])
    for _ in range(20):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    return {"loss": loss.item(), "threads": torch.get_num_threads()}

def quick(recipe, seed):
    note(recipe, seed)
    time.sleep(recipe.get("seconds", 0))
    return {"value": seed + recipe.get("shift", 0.)}

def killed(recipe, seed):
    "`once` and `always` kill their own process; the first time, `once` waits until its neighbour is under way."
    note(recipe, seed)
    deadline, arm = time.time() + 8, recipe["arm"]
    first = len(list(Path(recipe["folder"]).glob(f"run-{arm}-{seed}-*"))) == 1
    partner = {"once": "neighbour", "neighbour": "once"}.get(arm)
    while first and partner and not noted({**recipe, "arm": partner}, 0) and time.time() < deadline: time.sleep(.01)
    if arm == "neighbour": time.sleep(.6)    # still under way when `once` dies
    if arm == "always" or arm == "once" and first:
        time.sleep(.1)
        os.kill(os.getpid(), signal.SIGKILL)
    return {"value": float(seed)}

def awkward(recipe, seed):
    if recipe["do"] == "raise": raise RuntimeError("no `luck` | at <all>")
    if recipe["do"] == "exit": sys.exit(3)
    return {"nan": {"value": float("nan")}, "none": None, "text": {"value": "1"}, "good": {"value": 1., "extra": 2.},
            "other": {"else": 1.}}[recipe["do"]]
'''


@pytest.fixture(scope="module")
def measures(tmp_path_factory):
    "A folder with a module of measures, importable here and in workers."
    folder = tmp_path_factory.mktemp("measures")
    (folder / "measured.py").write_text(MEASURES)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def cluster(measures):
    distributed, dask = pytest.importorskip("distributed"), pytest.importorskip("dask")
    with dask.config.set({"distributed.scheduler.allowed-failures": 1}), distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address=None) as c:
        yield c.scheduler_address


def runs(folder, arm="*", seed="*"):
    return len(list(Path(folder).glob(f"run-{arm}-{seed}-*")))


def recipes(folder, **more):
    return {arm: dict(arm=arm, folder=str(folder), **more) for arm in ("a", "b")}


def metrics(result):
    return [(c.arm, c.seed, c.metrics) for c in result.cells]


def test_local_and_dask_give_the_same_bits(cluster, tmp_path):
    arms = {"slow": {"lr": 0.01}, "fast": {"lr": 0.1}}
    here = compare(arms, range(3), "measured:train", cache=tmp_path / "here", jobs=2, higher_is_better=False)
    there = compare(arms, range(3), "measured:train", cache=False, scheduler=cluster, higher_is_better=False)
    assert not any(c.error for c in here.cells)
    assert metrics(here) == metrics(there) and here.table() == there.table()
    assert here.made["device"] == there.made["device"] == cells.device_kind()
    assert {c.metrics["threads"] for c in here.cells} == {1.0}
    assert len({c.metrics["loss"] for c in here.cells}) == 6
    kept = compare(arms, range(3), "measured:train", cache=tmp_path / "here", jobs=2, higher_is_better=False)
    assert kept.cells == here.cells  # seconds too: they come from the files


@pytest.mark.parametrize("where", ["here", "dask"])
def test_a_killed_worker_costs_only_its_own_cell(request, measures, tmp_path, where):
    scheduler = request.getfixturevalue("cluster") if where == "dask" else None
    arms = {arm: dict(arm=arm, folder=str(tmp_path)) for arm in ("neighbour", "once", "always", "late")}
    result = compare(arms, [0], "measured:killed", cache=False, jobs=2, scheduler=scheduler)
    times = 2 if where == "dask" else 3  # Dask's scheduler was told to retry once
    assert {arm: runs(tmp_path, arm) for arm in arms} == {"neighbour": 1, "once": 2, "always": times, "late": 1}
    lost = {c.arm: c.error for c in result.cells if c.error}
    assert list(lost) == ["always"] and "WorkerLost" in lost["always"] and str(times) in lost["always"]
    assert "1 of 4 cells failed" in result.table() and "`always`, seed 0: `WorkerLost" in result.table()


SCRIPT = """
import signal, sys
from adaptive_lab.evidence import compare
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background with Ctrl-C ignored
sys.path.insert(0, sys.argv[1])
arms = {arm: dict(arm=arm, folder=sys.argv[2], seconds=.3) for arm in ("a", "b")}
if __name__ == "__main__":
    try:
        print("RESULT", len(compare(arms, range(8), "measured:quick", cache=sys.argv[3], jobs=2).cells))
    except KeyboardInterrupt as e:
        print("STOPPED", e)
"""


def test_interrupted_and_restarted(measures, tmp_path, monkeypatch):
    script, kept, noted = tmp_path / "script.py", tmp_path / "kept", tmp_path / "noted"
    script.write_text(SCRIPT)
    noted.mkdir()
    command = [sys.executable, str(script), str(measures), str(noted), str(kept)]
    finished = lambda: len(list(kept.glob("*.json")))

    def stopped_at(count, how):
        "Start, stop once `count` cells are kept, wait until every process has gone."
        before, started = finished(), runs(noted)
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        wait_until(lambda: finished() >= count)
        how(parent.pid)
        said, complaints = parent.communicate(timeout=30)
        assert wait_until(lambda: not _alive(parent.pid)), "workers outlive their parent"
        assert "Traceback" not in complaints
        assert count <= finished() < 16
        assert 0 <= runs(noted) - started - (finished() - before) <= 4  # run in vain: at most what was under way
        return said

    said = stopped_at(3, lambda pid: os.killpg(pid, signal.SIGINT))  # Ctrl-C in a terminal reaches the workers too
    assert f"STOPPED stopped with {finished()} of 16 cells done and kept in {kept}" in said
    stopped_at(finished() + 3, lambda pid: os.kill(pid, signal.SIGKILL))
    missing, started = 16 - finished(), runs(noted)
    monkeypatch.setattr(evidence, "LocalWorkers", Here)  # a third process: this one
    again = compare(recipes(noted, seconds=0.3), range(8), "measured:quick", cache=kept, jobs=1)
    assert len(again.cells) == 16 and not any(c.error for c in again.cells)
    assert runs(noted) - started == missing


def test_leaving_early_ends_the_cells_under_way(measures, tmp_path):
    slow, version = recipes(tmp_path, seconds=60), cells.code_version("measured:quick")
    results = run_cells(LocalWorkers(2), [("measured:quick", r, 0, version) for r in ({**slow["a"], "seconds": 0}, slow["b"])])
    assert next(results)[0] == 0 and wait_until(lambda: runs(tmp_path, "b"))
    results.close()
    assert wait_until(lambda: not any("LokyProcess" in text for text in _children()))


def _children():
    "The command lines of this process's children."
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == os.getpid():
                yield (stat.parent / "cmdline").read_text()
        except OSError:
            continue


def wait_until(happened, seconds=30):
    deadline = time.time() + seconds
    while not happened() and time.time() < deadline:
        time.sleep(0.01)
    return happened()


def _alive(group: int) -> bool:
    "Whether a process of that process group still runs."
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, pgrp = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(pgrp) == group and state != "Z":
            return True
    return False


class Here:
    "This process as the worker: for what is not about workers."

    n, retries = 1, 0

    def __init__(self, n):
        cells._held.clear()

    def __call__(self, *cell):
        return cells.run_cell(*cell)

    def close(self):
        pass


def test_what_a_kept_result_depends_on(measures, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "LocalWorkers", Here)
    (measures / "edited.py").write_text("from measured import quick as run\ndef quick(recipe, seed): return run(recipe, seed)\n")
    recipe = recipes(tmp_path)["a"]
    go = lambda seeds=(0,), **more: compare({"a": {**recipe, **more}}, seeds, "edited:quick", cache=tmp_path / "kept", jobs=1)
    go(), go()
    assert runs(tmp_path) == 1
    go(shift=1), go((0, 1))
    assert runs(tmp_path) == 3
    with open(measures / "edited.py", "a") as f:
        f.write("# changed\n")
    go((0, 1))
    assert runs(tmp_path) == 5
    with monkeypatch.context() as m:
        m.setattr(evidence, "device_kind", lambda: "another GPU")
        go((0, 1))
        assert runs(tmp_path) == 7
        m.setattr(cells.platform, "python_version", lambda: "3.99.0")
        go((0, 1))
        assert runs(tmp_path) == 9
    for f in (tmp_path / "kept").glob("*.json"):
        f.write_text(f.read_text()[:-20])
    assert [c.metrics for c in go((0, 1)).cells] == [{"value": 0.0}, {"value": 1.0}]
    assert runs(tmp_path) == 11


def test_failures_are_shown_and_cost_nothing_else(measures, tmp_path):
    arms = {do: {"do": do} for do in ("good", "raise", "exit", "nan", "none", "text", "other")}
    result = compare(arms, range(2), "measured:awkward", cache=tmp_path, jobs=2)
    errors = {c.arm: c.error for c in result.cells if c.seed == 1}
    assert errors["good"] is None is errors["other"]
    assert "metric 'value' is nan" in errors["nan"] and "SystemExit: 3" in errors["exit"] and "not None" in errors["none"]
    text = result.table()
    assert r"`RuntimeError: no 'luck' \| at <all>`" in text and "10 of 14 cells failed" in text
    verdicts = {(r.arm, r.metric): r.verdict for r in result.rows()}
    assert verdicts["other", "value"] == "not measured" and verdicts["raise", "value"] == "failed"
    assert "measured.py" in next(c.trace for c in result.cells if c.arm == "raise")
    assert len(list(tmp_path.glob("*.json"))) == 4  # failed cells are tried again
    result.draw()
    only = Comparison({"raise": {}}, [0], "m:f", ["raise"], True, [Cell("raise", 0, error="RuntimeError: no")])
    assert "failed" in only.table() and only.draw()


@pytest.mark.parametrize(
    "wrong, said",
    [
        (dict(arms={}), "at least one recipe"),
        (dict(arms=["adam"]), "at least one recipe"),
        (dict(arms={"a": "adam"}), "not a name (text) with a recipe"),
        (dict(arms={"a": {"betas": (0.9, 0.99)}}), "arms['a']"),
        (dict(arms={"a": {"lr": math.inf}}), "arms['a']"),
        (dict(arms={"a": {"f": print}}), "arms['a']"),
        (dict(seeds=[]), "seeds=[]"),
        (dict(seeds=[1, 2, 1]), "none of them twice"),
        (dict(seeds=[0.5]), "whole numbers"),
        (dict(baseline="A"), "is not an arm"),
        (dict(baseline=[]), "is not an arm"),
        (dict(higher_is_better="yes"), "higher_is_better='yes'"),
        (dict(higher_is_better={"value": 1}), "metric: bool"),
        (dict(measure=lambda recipe, seed: {}), "no name that another process can import"),
        (dict(measure="measured.quick"), "package.module:function"),
        (dict(measure="nowhere:quick"), "cannot be imported"),
        (dict(measure="measured:MEASURE"), "cannot be imported"),
        (dict(cache="/dev/null/kept"), "cache='/dev/null/kept' cannot be written"),
        (dict(jobs=0), "jobs=0"),
        (dict(scheduler="tcp://127.0.0.1:1"), "does not answer"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(measures, tmp_path, wrong, said, monkeypatch):
    distributed = pytest.importorskip("distributed")
    connect = distributed.Client
    monkeypatch.setattr(distributed, "Client", lambda address, **more: connect(address, **{**more, "timeout": 0.5}))
    given = dict(arms=recipes(tmp_path), measure="measured:quick", cache=tmp_path / "kept", jobs=1)
    with pytest.raises(ValueError) as e:
        compare(**{**given, **wrong})
    assert said in str(e.value) and runs(tmp_path) == 0


def test_a_full_disk_costs_only_the_keeping(measures, tmp_path, monkeypatch):
    def full(path, parts):
        raise NotWritten(f"{path} could not be written: the disk is full")

    monkeypatch.setattr(evidence, "LocalWorkers", Here)
    monkeypatch.setattr(cells, "write_durably", full)
    with pytest.warns(UserWarning, match="disk is full"):
        result = compare(recipes(tmp_path), range(2), "measured:quick", cache=tmp_path / "kept", jobs=1)
    assert len(result.rows()) == 2 and not any(c.error for c in result.cells)


def by_hand(values, **more):
    records = [Cell(arm, seed, {"x": float(v)}) for arm, vs in values.items() for seed, v in enumerate(vs) if v is not None]
    given = dict(arms={a: {} for a in values}, seeds=[*range(9)], measure="m:f", baseline=["a"], higher_is_better=True, cells=records)
    return Comparison(**{**given, **more})


def test_pairs_are_of_equal_seed_and_complete():
    a, b = [1, 2, 4, 8, 16, 32], [2, 4, None, 9, 19, 33]
    row = by_hand({"a": a, "b": b}).rows()[1]
    keep = [0, 1, 3, 4, 5]
    assert row.n == 5 == row.difference.n
    assert row.difference == paired([b[i] for i in keep], [a[i] for i in keep])
    # the order in which cells are listed does not matter
    c = by_hand({"a": a, "b": b})
    assert Comparison(**{**vars(c), "cells": c.cells[::-1]}).rows()[1] == row


def test_losers_are_published_and_the_strongest_baseline_is_used():
    base = np.arange(6.0)
    noise = np.array([0, 0.1, -0.1, 0.05, 0.02, -0.03])
    c = by_hand({"a": base, "b": base + 1, "ours": base + 0.5 + noise, "draw": base + 1 + noise}, baseline=["a", "b"])
    rows = {r.arm: r for r in c.rows()}
    assert {r.against for r in rows.values()} == {"b"}
    assert [rows[arm].verdict for arm in ("a", "b", "ours", "draw")] == ["baseline, not the strongest", "baseline", "worse", "undecided"]
    down = {r.arm: r for r in Comparison(**{**vars(c), "higher_is_better": {"x": False}}).rows()}
    assert down["ours"].against == "a" and down["ours"].verdict == "worse"


def test_named_baselines_are_not_tested_against_the_one_that_beat_them():
    rng, verdicts = np.random.default_rng(0), set()
    for _ in range(60):  # tables of equal arms, all of them named
        c = by_hand({arm: rng.normal(size=6) for arm in "abc"}, baseline=["a", "b", "c"])
        verdicts |= {(r.verdict, r.difference) for r in c.rows()}
    assert verdicts == {("baseline", None), ("baseline, not the strongest", None)}
    assert c.draw() and "only `better` is safe" in c.table() and "p corrected over 0" in c.table()
    neither = Comparison(**{**vars(c), "higher_is_better": {}}).rows()  # nothing was chosen by its values: the first is compared with
    assert [r.verdict for r in neither] == ["baseline", "undecided", "undecided"]


def test_no_claim_below_five_seeds_and_no_interval_of_one():
    four, one = by_hand({"a": [1, 2, 3, 4], "b": [2, 3, 4, 5.1]}).rows()[1], by_hand({"a": [1], "b": [2]}).rows()[1]
    assert four.verdict == one.verdict == "fewer than 5 seeds"
    assert four.difference.p < 1e-4 and math.isnan(one.difference.low) and one.difference.mean == 1
    assert "–" in by_hand({"a": [1], "b": [2]}).table()


def test_no_spread():
    row = by_hand({"a": [1, 2, 3, 4, 5], "b": [2, 3, 4, 5, 6], "c": [1, 2, 3, 4, 5]}).rows()
    assert (row[1].difference.low, row[1].difference.high, row[1].difference.p, row[1].verdict) == (1, 1, 2 * 0.5**5, "undecided")
    assert (row[2].difference.p, row[2].verdict) == (1, "undecided")
    assert by_hand({"a": [0] * 7, "b": [1] * 7}).rows()[1].verdict == "better"  # seven coins on one side: .016


@pytest.mark.parametrize("base", [np.zeros(5), np.arange(5.0), np.arange(5) / 3, np.arange(5) * 1e6])
def test_a_measure_that_ignores_its_seed_is_not_certified(base):
    for shift in (0.1, -7.3):
        found = paired(base + shift, base)  # equal differences, but for the rounding of floats
        assert found.p == 2 * 0.5**5 and math.isclose(found.mean, shift, abs_tol=1e-9)
    assert paired(base + 0.1 + 1e-6 * np.arange(5), base).p < 0.01  # a small spread is a spread


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=8))
def test_holm_is_its_definition(p):
    real = sorted(x for x in p if not math.isnan(x))
    for x, corrected in zip(p, holm(p)):
        if math.isnan(x):
            assert math.isnan(corrected)
        else:  # the last of equal p-values decides for none of them more than the first
            steps = [min(1, (len(real) - j) * q) for j, q in enumerate(real)]
            assert corrected in [max(steps[: j + 1]) for j, q in enumerate(real) if q == x]


def test_json_round_trip_and_refusals(tmp_path):
    c = by_hand({"a": [1, 2, 3], "b": [0.1, None, 0.3], "gone": []}, made={"at": "now"})
    c.to_json(tmp_path / "c.json")
    assert Comparison.from_json(tmp_path / "c.json") == c
    data = json.loads((tmp_path / "c.json").read_text())
    wrong = [{**data, "format": 99}, {k: v for k, v in data.items() if k != "cells"}, [], {**data, "cells": [{"arm": 1}]}]
    entries = dict(arms=[1], seeds=["0"], baseline="nobody", higher_is_better="yes", cells={}, measure=3, made=[])
    wrong += [{**data, name: value} for name, value in entries.items()]
    cell = data["cells"][0]
    for bad in (dict(metrics="abc"), dict(metrics={"x": "1"}), dict(metrics={}), dict(arm="nobody"), dict(seed=99), dict(error=3), dict(error="E"), dict(seconds="1")):
        wrong.append({**data, "cells": [{**cell, **bad}]})
    for i, content in enumerate(wrong):
        (tmp_path / "wrong.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="wrong.json"):
            print(i, Comparison.from_json(tmp_path / "wrong.json"))


def test_a_name_with_nan_in_it_stays(tmp_path):
    c = by_hand({"NaN guard": [1, 2, 3], "a": [2]})
    c.to_json(tmp_path / "c.json")
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert [r["arm"] for r in rows] == ["NaN guard", "a"] and rows[1]["sd"] is None


def test_names_are_text_everywhere():
    c = by_hand({"a": [1, 2], "<b>|`$x_": [2, 3]})
    assert r"`<b>\|'$x_`" in c.table()
    c.draw().canvas.draw()


def test_importing_is_light():
    heavy = ["torch", "scipy", "sklearn", "joblib", "distributed", "matplotlib", "tqdm"]
    code = f"import sys, adaptive_lab.evidence; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
