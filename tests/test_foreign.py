"""Strangers' checkpoints: what is read, what is refused, that nothing of them runs, and what a folder of them becomes."""
import ast
import io
import json
import os
import pickle
import subprocess
import sys
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from adaptive_lab import archive, foreign
from adaptive_lab.archive import Refused, look
from adaptive_lab.bench import hostile
from adaptive_lab.durable import NotWritten, StoreError
from adaptive_lab.foreign import Limits, import_folder, read_foreign
from adaptive_lab.store import Store
from adaptive_lab.tensorfile import Corrupt, Missing, load_state, save_state

HERE = Path(__file__).parent


class Call:
    def __init__(self, f, *args):
        self.call = f, args

    def __reduce__(self):
        return self.call


@pytest.fixture(autouse=True)
def nothing_is_run(tmp_path, monkeypatch):
    "Each test stands in a folder where a hostile file would leave a file of that name."
    monkeypatch.chdir(tmp_path)
    yield
    assert not list(tmp_path.rglob("sprung"))


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))


def same(a, b):
    if isinstance(b, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(torch.nan_to_num(a.float()) if a.is_floating_point() else a, torch.nan_to_num(b.detach().float()) if b.is_floating_point() else b)
    elif isinstance(b, dict):
        assert type(a) is type(b) and list(a) == list(b)
        for k in b:
            same(a[k], b[k])
    elif isinstance(b, (list, tuple)):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b):
            same(x, y)
    else:
        assert type(a) is type(b) and a == b


# --------------------------------------------------------------------------------------------------- what is read

def honest():
    "States as people save them."
    net = network()
    adam = torch.optim.Adam(net.parameters())
    net(torch.randn(8, 6)).sum().backward()
    adam.step()
    flat = torch.arange(40.)
    return {
        "state_dict": net.state_dict(),
        "nested": {"model": net.state_dict(), "optimizer": adam.state_dict(), "epoch": 3, "best": np.float64(.5), "seen": np.int64(7), "note": "ü", "raw": b"\0\xff", "z": 1 + 2j,
                   "sched": Counter({3: 2}), "size": torch.Size([2, 3]), "big": 10**30, "args": [1, (2., None, True), {"lr": .1}]},
        "types": {str(t): torch.ones(3).to(t) for t in (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.uint16, torch.float8_e4m3fn)},
        "views": {"flat": flat, "part": flat[8:16], "turned": flat.view(5, 8).T, "every other": flat[::2], "scalar": torch.tensor(3.), "none": torch.empty(0, 4)},
        "parameters": OrderedDict(w=torch.nn.Parameter(torch.ones(2)), frozen=torch.nn.Parameter(torch.ones(2), requires_grad=False)),
        "nan": {"w": torch.tensor([float("nan"), float("inf")])},
        "empty": {},
        "a tensor": torch.ones(2, 3),
    }


def test_what_people_save_is_read(tmp_path):
    states, paths = honest(), []
    for name, state in states.items():
        paths.append(tmp_path / f"{name}.pt")
        torch.save(state, paths[-1])
    for (name, state), back in zip(states.items(), foreign._read_archives(paths, Limits())):
        if isinstance(back, StoreError):
            raise back
        same(back, state)
    assert back.is_contiguous() and network().load_state_dict(read_foreign(paths[0]), strict=True)


def test_tied_tensors_stay_tied_and_others_apart(tmp_path):
    w = torch.randn(50, 50)
    torch.save({"in": w, "out": w, "clone": w.clone()}, tmp_path / "f.pt")
    back = read_foreign(tmp_path / "f.pt")
    assert back["in"] is back["out"] and back["clone"] is not back["in"] and torch.equal(back["clone"], w)


def test_large_tensors_outlive_the_scratch_folder(tmp_path):
    state = {"w": torch.randn(3_000_000), "v": torch.randn(10)}
    torch.save(state, tmp_path / "f.bin")
    (tmp_path / "scratch").mkdir()
    back = read_foreign(tmp_path / "f.bin", scratch=tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())
    same(back, state)
    back["w"].add_(1)    # its own memory, writable


def test_safetensors_of_others_and_of_ours(tmp_path):
    save_file({"layer.0/w": torch.ones(3).bfloat16(), "big": torch.arange(400_000), "nan": torch.tensor([float("nan")])}, tmp_path / "f.safetensors", {"format": "pt", "note": "é"})
    back = read_foreign(tmp_path / "f.safetensors")
    assert back["layer.0/w"].dtype == torch.bfloat16 and torch.equal(back["big"], torch.arange(400_000)) and back["nan"].isnan().all()
    save_state(tmp_path / "ours", {"w": (torch.ones(2), 3)})
    assert read_foreign(tmp_path / "ours")["w"][1] == 3    # by its content, not by its name
    (tmp_path / "ours.pt").write_bytes((tmp_path / "ours").read_bytes()[:-1] + b"!")
    with pytest.raises(Corrupt, match="changed"):
        read_foreign(tmp_path / "ours.pt")
    (tmp_path / "flags.safetensors").write_bytes(hostile.safetensors({"a": hostile.described("BOOL")}, b"\2"))
    with pytest.raises(Corrupt, match="boolean"):
        read_foreign(tmp_path / "flags.safetensors")
    with pytest.raises(Missing):
        read_foreign(tmp_path / "nothing.pt")


# ---------------------------------------------------------------------------------------------- what is refused

REFUSED = {
    "os.system": (lambda: {"w": Call(os.system, "touch sprung")}, "posix.system|nt.system"),
    "eval": (lambda: [Call(eval, "open('sprung', 'w')")], "eval"),
    "hub": (lambda: Call(torch.hub.load, "a/b", "c"), "torch.hub.load"),
    "nested": (lambda: OrderedDict(a=Call(torch._utils._rebuild_parameter, Call(exec, "open('sprung','w')"), True, OrderedDict())), "exec"),
    "a module": (network, "torch.nn.modules"),
    "a set": (lambda: {1, 2}, "set"),
    "a dtype": (lambda: {"d": torch.float32}, "torch.float32"),
    "sparse": (lambda: torch.eye(3).to_sparse(), "sparse"),
    "an array": (lambda: np.ones(3), "numpy"),
    "expanded": (lambda: torch.ones(1).expand(2**40), "expanded"),
    "rows twice": (lambda: torch.ones(4).expand(1000, 4), "expanded"),
    "laughs": (lambda: __import__("functools").reduce(lambda x, _: [x] * 10, range(30), []), "unfolds"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_says_what_is_wrong_and_starts_no_process(tmp_path, monkeypatch, name):
    make, word = REFUSED[name]
    torch.save(make(), tmp_path / "f.pt")
    assert (tmp_path / "f.pt").stat().st_size < 10_000
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(Refused, match=word) as e:
        read_foreign(tmp_path / "f.pt")
    assert "Ask for the weights" in str(e.value) and len(str(e.value)) < 1000
    assert str(pickle.loads(pickle.dumps(e.value))) == str(e.value)


def test_an_old_file_is_refused_with_advice(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "f.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(Refused, match="1.6.*weights_only=True"):
        read_foreign(tmp_path / "f.pt")


def test_hostile_files_are_refused_and_start_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    n = 0
    for name, suffix, raw in hostile.hostile_files():
        path = tmp_path / f"f{suffix}"
        path.write_bytes(raw)
        error = hostile.refusal(path)
        assert isinstance(error, StoreError), name
        assert len(str(error)) < 1500, name
        n += 1
    assert n >= 1000 and not (tmp_path / "sprung").exists()


def test_the_makers_of_hostile_files_can_make_honest_ones(tmp_path):
    "Else a mistake in the makers would be what is refused."
    (tmp_path / "a.pt").write_bytes(hostile.archive(b"\x80\x02" + hostile.tensor((3, 4), (4, 1)) + b"."))
    look(tmp_path / "a.pt")
    assert read_foreign(tmp_path / "a.pt").shape == (3, 4)
    (tmp_path / "b.pt").write_bytes(hostile.archive(b"\x80\x02" + hostile.call("os system", hostile.text("touch sprung")) + b"."))
    with open(tmp_path / "b.pt", "rb") as f:
        torch.load(f, weights_only=False)
    assert (tmp_path / "sprung").exists()    # the trap works
    (tmp_path / "sprung").unlink()
    (tmp_path / "c").write_bytes(hostile.safetensors({"a": hostile.described()}, b"x"))
    assert hostile.refusal(tmp_path / "c") is None


@pytest.mark.parametrize("seed", range(3))
def test_no_damage_makes_another_error(tmp_path, monkeypatch, seed):
    "Bytes of a good file are changed: it is refused, or the look is passed and the process that reads would be asked."
    monkeypatch.setattr(foreign, "_run", lambda jobs, folder, limits: None)
    torch.save({"model": network().state_dict(), "epoch": 3}, tmp_path / "good.pt")
    good, rng = (tmp_path / "good.pt").read_bytes(), np.random.default_rng(seed)
    with open(tmp_path / "good.pt", "rb") as f:
        entries = archive._entries(f)
    begin, size = entries["data.pkl"]
    for _ in range(400):
        raw = bytearray(good)
        at = begin + rng.integers(0, size + 60) if rng.random() < .7 else rng.integers(0, len(raw))
        raw[at] = rng.integers(0, 256)
        (tmp_path / "f.pt").write_bytes(raw)
        with pytest.raises(StoreError):
            read_foreign(tmp_path / "f.pt")


# ----------------------------------------------------------------------------------------- the process that reads

CHILD = """
import os, sys
from pathlib import Path
from adaptive_lab import foreign
for i, deed in enumerate(sys.argv[3:]):
    pid = os.fork()
    if not pid:
        try:
            foreign._give_up(Path(sys.argv[1]), 1000, foreign.Limits(seconds=2, memory=2**28))
            exec(deed, {"os": os, "mine": sys.argv[2], "sys": sys})
            os._exit(0)
        except BaseException:
            os._exit(3)
    print(os.waitpid(pid, 0)[1], flush=True)
"""
DEEDS = ["os.system('touch sprung')", "__import__('subprocess').run(['touch', 'sprung'])", "__import__('socket').socket()", "open('../sprung', 'w')",
         "open(os.path.expanduser('~/sprung'), 'a')", "os.remove(mine)", "os.rename(mine, 'x')", "os.fork()", "os.kill(os.getppid(), 0)", "os.execv('/bin/true', ['true'])",
         "os.symlink('/etc', 'x')", "bytearray(2**30)", "[0 for i in iter(int, 1)]", "open('big', 'wb').write(bytes(2**27))", "[open(mine) for i in range(99)]"]


def test_the_process_may_do_little(tmp_path):
    "The second wall, without the first: each deed ends the process or fails in it."
    (tmp_path / "in").mkdir()
    (tmp_path / "mine").write_text("mine")
    done = subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "in"), str(tmp_path / "mine"), "1", *DEEDS], cwd=tmp_path / "in", capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"})
    first, *others = map(int, done.stdout.split())
    assert first == 0 and len(others) == len(DEEDS), done.stderr[-2000:]
    assert [deed for deed, status in zip(DEEDS, others) if not status] == []
    assert (tmp_path / "mine").read_text() == "mine" and not Path("~/sprung").expanduser().exists()


def test_torch_alone_would_say_no_too(tmp_path, monkeypatch):
    "The child without any look: torch's restricted loading is a wall of its own. (In this process, without limits.)"
    monkeypatch.setattr(foreign, "look", lambda path: None)
    monkeypatch.setattr(foreign, "_give_up", lambda *args: None)
    torch.save({"w": Call(os.system, "touch sprung")}, tmp_path / "f.pt")
    assert foreign._convert(str(tmp_path / "f.pt"), str(tmp_path / "out"), Limits()) == 3
    assert "UnpicklingError" in (tmp_path / "out.why").read_text() and not (tmp_path / "out").exists()
    torch.save(torch.ones(1).expand(1000), tmp_path / "f.pt")
    assert foreign._convert(str(tmp_path / "f.pt"), str(tmp_path / "out"), Limits()) == 3
    assert "expanded" in (tmp_path / "out.why").read_text()


def test_little_memory_little_time_and_no_secrets(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(10)}, tmp_path / "f.pt")
    torch.save({"w": torch.zeros(2_000_000)}, tmp_path / "large.pt")
    with pytest.raises(Refused, match="more than 0 seconds"):
        read_foreign(tmp_path / "f.pt", Limits(seconds=0))
    with pytest.raises(Refused, match="memory"):
        read_foreign(tmp_path / "large.pt", Limits(memory=-4 * (tmp_path / "large.pt").stat().st_size))
    seen = {}
    real = subprocess.Popen
    monkeypatch.setenv("SECRET", "swordfish")
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **more: (seen.update(more), real(*args, **more))[1])
    same(read_foreign(tmp_path / "f.pt"), {"w": torch.ones(10)})
    assert "swordfish" not in str(seen["env"]) and seen["stdin"] == subprocess.DEVNULL


def test_a_reader_that_dies_takes_one_file_with_it(tmp_path, monkeypatch):
    "In this process: the second of three readers is killed, the third leaves nothing, the first is well."
    outs = [str(tmp_path / f"{i}.state") for i in range(3)]
    def convert(path, out, limits):
        if path == "kill":
            os.kill(os.getpid(), 9)
        if path == "good":
            save_state(Path(out), 1)
        return 0
    monkeypatch.setattr(foreign, "_convert", convert)
    monkeypatch.setattr(os, "cpu_count", os.cpu_count)    # put back afterwards, as the next
    monkeypatch.setattr(sys, "dont_write_bytecode", sys.dont_write_bytecode)
    foreign._serve(list(zip(("good", "kill", "nothing"), outs)), Limits())
    good, killed, nothing = (foreign._result(Path("f.pt"), Path(out)) for out in outs)
    assert good == 1 and "ended" in killed.why and "left nothing" in nothing.why


def test_what_the_process_leaves_is_not_believed(tmp_path, monkeypatch):
    torch.save({"w": torch.ones(10)}, tmp_path / "f.pt")
    for left in (b"", b"x" * 100, pickle.dumps(1), hostile.one(place=(5, 6))):
        monkeypatch.setattr(foreign, "_run", lambda jobs, folder, limits: Path(jobs[0][1]).write_bytes(left))
        with pytest.raises(Refused, match="cannot be right"):
            read_foreign(tmp_path / "f.pt")
    monkeypatch.undo()
    monkeypatch.setattr(foreign, "_START", "raise SystemExit('no such thing')")
    with pytest.raises(StoreError, match="no such thing"):
        read_foreign(tmp_path / "f.pt")


def test_only_the_child_loads_pickles():
    "torch.load stands once, in the function that runs in the child; pickle itself nowhere."
    found = []
    for module in ("archive", "foreign"):
        tree = ast.parse((HERE.parent / "adaptive_lab" / f"{module}.py").read_text())
        names = {a.name for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
        assert not names & {"pickle", "_pickle", "dill", "joblib", "loads"}
        for f in ast.walk(tree):
            if isinstance(f, ast.FunctionDef):
                found += [(f.name, ast.unparse(n)) for n in ast.walk(f) if isinstance(n, ast.Call) and ast.unparse(n.func) in ("torch.load", "eval", "exec", "np.load")]
    assert found == [("_convert", "torch.load(path, map_location='cpu', weights_only=True)")]


# ------------------------------------------------------------------------------------------------------- a folder

def test_a_folder_becomes_runs(tmp_path):
    zoo, store, net = tmp_path / "zoo", Store(tmp_path / "zoo" / "store"), network()
    (zoo / "a" / "deep er").mkdir(parents=True)
    (zoo / "A").mkdir()
    for step in (2, 10):
        torch.save(net.state_dict(), zoo / "a" / f"epoch_{step}.pt")
    (zoo / "a" / "epoch_2.json").write_text('{"loss": NaN, "accuracy": 0.5}')
    (zoo / "a" / "epoch_10.json").write_text('{"accuracy": 0.6, "accuracy": 0.7}')
    torch.save(net.state_dict(), zoo / "a" / "final.pth")
    torch.save(net.state_dict(), zoo / "a" / "deep er" / "x.bin")
    torch.save(net.state_dict(), zoo / "A" / "epoch_1.pt")    # differs from the run a only in capitals
    torch.save({"t": Call(os.system, "touch sprung")}, zoo / "a" / "epoch_3.pt")
    (zoo / "a" / "epoch_4.pt").write_bytes(b"")
    (zoo / "a" / "step_10.safetensors").write_bytes(b"junk")
    save_file(net.state_dict(), zoo / "solo_step_7.safetensors")
    torch.save({"d": network().state_dict(), "far": 1}, zoo / f"far_step_{10**12}.pt")
    (zoo / "link.pt").symlink_to(zoo / "a" / "final.pth")
    (zoo / "notes.txt").write_text("not a checkpoint")
    done = import_folder(zoo, store)
    assert not store.verify() and sorted(done.checkpoints, key=lambda c: (c.run, c.step)) == store.checkpoints()
    there = {(c.run, c.step): c.metrics for c in store.checkpoints()}
    upper = {k for k in there if k[0] == "A"}
    assert {k: v for k, v in there.items() if k[0] not in "Aa"} == {("a-deep-er", 0): None, ("solo", 7): None}
    assert len(upper) == 1 and not [k for k in there if k[0] == "a"] or there[("a", 2)] == {"accuracy": .5} and there[("a", 10)] is None and ("a", 11) in there
    assert {"a/epoch_3.pt", "a/epoch_4.pt", "a/epoch_10.json", "link.pt", f"far_step_{10**12}.pt", "a/step_10.safetensors"} <= set(done.refused)
    assert "system" in done.refused["a/epoch_3.pt"] and "twice" in done.refused["a/epoch_10.json"] and "link" in done.refused["link.pt"]
    back, good = store.load("solo"), net.state_dict()
    assert set(back) == set(good) and all(torch.equal(back[k], w) for k, w in good.items())
    before = store.checkpoints()
    again = import_folder(zoo, store)
    assert not again.checkpoints and store.checkpoints() == before


def test_one_run_by_name_and_bad_places(tmp_path):
    store = Store(tmp_path / "store")
    (tmp_path / "zoo" / "b").mkdir(parents=True)
    for i, name in enumerate(("x_9.safetensors", "x_10.safetensors", "b/last.safetensors", "b/y_9.safetensors")):
        save_file({"w": torch.full((2,), float(i))}, tmp_path / "zoo" / name)
    done = import_folder(tmp_path / "zoo", store, run="all")
    assert [(c.run, c.step, c.recipe["imported"]) for c in store.checkpoints()] == [("all", 9, "b/y_9.safetensors"), ("all", 10, "x_10.safetensors"), ("all", 11, "b/last.safetensors")]
    assert "already" in done.refused["x_9.safetensors"] and len(done.refused) == 1
    for run in ("../x", "a/b"):
        assert len(import_folder(tmp_path / "zoo", Store(tmp_path / "other"), run=run).refused) == 4
    assert not (tmp_path / "other" / "records").exists() and not (tmp_path / "x").exists()
    with pytest.raises(Missing, match="no folder"):
        import_folder(tmp_path / "none", store)


def test_a_full_disk_ends_an_import_and_keeps_what_came_before(tmp_path, monkeypatch):
    (tmp_path / "zoo").mkdir()
    for i in range(3):
        save_file({"w": torch.full((2,), float(i))}, tmp_path / "zoo" / f"x_{i}.safetensors")
    store, real = Store(tmp_path / "store"), Store.save
    def save(self, run, step, *args, **more):
        if step == 1:
            raise NotWritten("full")
        return real(self, run, step, *args, **more)
    with monkeypatch.context() as m:
        m.setattr(Store, "save", save)
        with pytest.raises(NotWritten):
            import_folder(tmp_path / "zoo", store)
    assert [c.step for c in store.checkpoints()] == [0]
    assert len(import_folder(tmp_path / "zoo", store).checkpoints) == 2 and not store.verify()


@pytest.mark.parametrize("text, metrics", [("{}", {}), ('{"a": NaN}', {}), ('{"a": {"b": NaN, "c": [NaN, 1]}}', {"a": {"c": [None, 1]}}), ('{"a": null}', {"a": None})])
def test_metrics_beside(tmp_path, text, metrics):
    (tmp_path / "x.json").write_text(text)
    assert foreign._metrics(tmp_path / "x.pt") == metrics


@pytest.mark.parametrize("raw", [b"[1]", b"{", b"\xff", b'{"a":1,"a":2}', b'{"a":' * 100_000, b'{"a":"' + b"x" * 2**20 + b'"}', b""])
def test_bad_metrics_are_named_and_the_weights_kept(tmp_path, raw):
    (tmp_path / "zoo").mkdir()
    save_file({"w": torch.ones(1)}, tmp_path / "zoo" / "x_1.safetensors")
    (tmp_path / "zoo" / "x_1.json").write_bytes(raw)
    done = import_folder(tmp_path / "zoo", Store(tmp_path / "store"))
    assert list(done.refused) == ["x_1.json"] and [c.metrics for c in done.checkpoints] == [None]
