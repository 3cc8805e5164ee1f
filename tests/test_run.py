"Recipes, tapes, runs: bad files, bit-identical replay and resume, atomic changes."
import json
import os
import threading

import pytest
import torch
import warm_python
from hypothesis import given, settings, strategies as st

from adaptive_lab.durable import NotWritten
from adaptive_lab.knobs import KnobError
from adaptive_lab.live import Live
from adaptive_lab.run import Run, replay, saved, weights_digest
from adaptive_lab.store import Store
from adaptive_lab.tape import Change, Recipe, RecipeError, Session, Tape, load_session, save_session
from adaptive_lab.tensorfile import save_state
from adaptive_lab.training import NonFiniteLoss

SHORT = {"data.steps_per_task": 20, "run.steps": 100, "run.eval_every": 10, "model.hidden": 16, "optimizer.warmup_steps": 10}


def recipe(**more):
    return Recipe("split_digits", "mlp", "plasticity", {**SHORT, **more})


changes = st.lists(
    st.tuples(st.integers(0, 99), st.sampled_from([
        ("optimizer.plasticity_k", 9.0), ("optimizer.lr", 0.01), ("training.clip", 0.5),
        ("optimizer.threshold_percentile", 50.0), ("optimizer.adaptive_threshold", False), ("run.eval_every", 7),
    ])), max_size=6)


@settings(max_examples=8, deadline=None)
@given(changes, st.integers(1, 99))
def test_a_session_replays_bit_for_bit_through_its_file(tmp_path_factory, moves, stop):
    "Knobs turned by hand at any steps; the file alone gives the same weights, losses and measurements."
    run = Run(recipe())
    for at, (knob, value) in sorted(moves, key=lambda m: m[0]):
        if at <= stop:
            run.advance(max(at, run.index))
            run.change({knob: value})
    run.advance(max(stop, run.index))
    path = tmp_path_factory.mktemp("session") / "s.json"
    save_session(path, run.session())
    session = load_session(path)
    again = replay(session.recipe, session.tape, session.until)
    assert weights_digest(again.model) == session.weights == weights_digest(run.model)
    assert (again.losses, again.evaluations) == (run.losses, run.evaluations)


def test_replay_in_another_process(tmp_path):
    run = Run(recipe()).advance(30)
    run.change({"optimizer.plasticity_k": 10.0, "optimizer.lr": 0.02})
    run.advance(70)
    save_session(tmp_path / "s.json", run.session())
    done = warm_python.run(["-m", "adaptive_lab.cli", "replay", tmp_path / "s.json"], 120)
    assert done.returncode == 0 and run.session().weights in done.stdout and "identical" in done.stdout, done.stdout + done.stderr


def test_knobs_matter():
    "A replay test cannot be passed by a tape that does nothing."
    plain = weights_digest(Run(recipe()).advance().model)
    for knob, value in (("optimizer.plasticity_k", 10.0), ("optimizer.lr", 0.01), ("training.clip", 0.01), ("optimizer.trace_decay", 0.9)):
        assert weights_digest(replay(recipe(), Tape([(50, knob, value)])).model) != plain, knob


def test_a_person_who_takes_over_drops_the_rest_of_the_tape():
    run = Run(recipe(), Tape([(10, "optimizer.lr", 0.01), (60, "optimizer.lr", 0.02)]))
    feed = run.steps()
    for _ in range(30):
        next(feed)
    run.change({"optimizer.plasticity_k": 1.0})
    for step in feed:
        pass
    assert run.tape == Tape([(10, "optimizer.lr", 0.01), (30, "optimizer.plasticity_k", 1.0)])
    assert weights_digest(replay(run.recipe, run.tape).model) == weights_digest(run.model)


@pytest.mark.parametrize("at", [1, 19, 20, 21, 55, 99])
def test_resume_is_bit_exact(tmp_path, at):
    tape = Tape([(15, "optimizer.lr", 0.01), (20, "optimizer.plasticity_k", 8.0), (55, "training.clip", 0.1)])
    straight = replay(recipe(), tape)
    store = Store(tmp_path)
    replay(recipe(), tape, at).save(store, "r")
    resumed = Run.resume(store, "r")
    assert resumed.index == at and resumed.tape == tape
    resumed.advance()
    assert weights_digest(resumed.model) == weights_digest(straight.model)
    assert (resumed.losses, resumed.evaluations) == (straight.losses, straight.evaluations)
    for a, b in zip(resumed.optimizer.state_dict()["state"].values(), straight.optimizer.state_dict()["state"].values()):
        assert all(torch.equal(torch.as_tensor(a[k]), torch.as_tensor(b[k])) for k in b)


def test_a_group_of_changes_is_all_or_nothing():
    run = Run(recipe())
    with pytest.raises(KnobError, match="plasticity_k=99"):
        run.change({"optimizer.lr": 0.5, "optimizer.plasticity_k": 99})
    assert not run.waiting
    run.advance(5)
    assert run.optimizer.param_groups[0]["lr"] == 0.001 and len(run.tape) == 0


@pytest.mark.parametrize("damage, message", [
    (lambda d: d["recipe"].update(format=2), "newer version"),
    (lambda d: d.update(format=99), "newer version"),
    (lambda d: d.pop("recipe"), "damaged"),
    (lambda d: d["recipe"].pop("knobs"), "lacks knobs"),
    (lambda d: d["recipe"].update(model="os.system"), "no model is called"),
    (lambda d: d["recipe"]["knobs"].update({"optimizer.lr": "fast"}), "lr='fast'"),
    (lambda d: d["recipe"]["knobs"].update({"optimizer.speed": 1}), "unknown knob"),
    (lambda d: d["tape"].append({"step": 3, "knob": "optimizer.lr", "value": 7}), "lr=7"),
    (lambda d: d["tape"].append({"step": -3, "knob": "optimizer.lr", "value": 0.1}), "step must be"),
    (lambda d: d["tape"].append({"step": 3, "knob": "model.hidden", "value": 8}), "reset"),
    (lambda d: d["tape"].append([1]), "damaged"),
    (lambda d: d.update(until=10**6), "until"),
])
def test_damaged_sessions_are_refused_by_name(tmp_path, damage, message):
    d = Session(recipe(), Tape(), 10).to_dict()
    damage(d)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(d))
    with pytest.raises(RecipeError, match=message) as e:
        load_session(path)
    assert "bad.json" in str(e.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"x"', "null", "[" * 100_000, "\x00"])
def test_files_that_are_no_sessions(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RecipeError, match="x.json"):
        load_session(tmp_path / "x.json")
    with pytest.raises(RecipeError, match="no such file"):
        load_session(tmp_path / "y.json")


def test_saving_a_session_over_another_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "s.json"
    save_session(path, Session(recipe(), Tape(), 10))
    before = path.read_bytes()
    monkeypatch.setattr("adaptive_lab.durable.sync_file", lambda f: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(NotWritten, match="disk is full"):
        save_session(path, Session(recipe(), Tape(), 20))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["s.json"]


def test_a_run_that_turns_nan_keeps_its_last_good_state(tmp_path):
    "Poison enters the data at step 30: the error says so, and the last checkpoint resumes there and is finite."
    run = Run(recipe(**{"run.eval_every": 1000}))
    store = Store(tmp_path)
    with pytest.raises(NonFiniteLoss) as e:
        for step in saved(run, store, "r", every=1):
            if step.index == 29:
                run.data.train._streams[1].X[:] = float("nan")
    assert e.value.step == 30 == run.index
    resumed = Run.resume(store, "r")
    assert resumed.index == 30 and weights_digest(resumed.model) == weights_digest(run.model)
    assert all(p.isfinite().all() for p in resumed.model.parameters())


def test_live_in_a_script_uses_a_thread():
    live = Live(recipe())
    live.step(30)
    live.wait()
    assert live.state == "paused" and live.run.index == 30
    live.change({"optimizer.lr": 0.02})
    live.start()
    live.wait()
    assert live.state == "finished" and live.run.tape.changes == [Change(30, "optimizer.lr", 0.02)]
    assert live.session().weights == weights_digest(replay(live.run.recipe, live.run.tape).model)


def test_live_says_what_failed():
    live = Live(recipe())
    live.run.data.train._streams[0].X[:] = float("nan")
    live.start()
    live.wait()
    assert live.state == "failed" and isinstance(live.error, NonFiniteLoss)
    with pytest.raises(RuntimeError, match="failed .*reset"):
        live.start()


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    run, store = Run(recipe()).advance(5), Store(tmp_path)
    run.save(store, "r")
    run.advance(6)
    next(run.model.parameters()).data[0, 0] = float("inf")
    with pytest.raises(ArithmeticError, match="1.weight is not finite.*last checkpoint stays"):
        run.save(store, "r")
    assert Run.resume(store, "r").index == 5


def test_a_tape_is_read_by_its_declarations(tmp_path):
    d = Session(recipe(), Tape([(3, "optimizer.lr", 0.5)]), 10).to_dict()
    d["tape"][0]["value"] = "0.25"
    (tmp_path / "s.json").write_text(json.dumps(d))
    assert load_session(tmp_path / "s.json").tape.changes[0].value == 0.25
    with pytest.raises(KnobError, match="reset"):
        Run(recipe(), Tape([(5, "model.hidden", 3)]))
    with pytest.raises(RecipeError, match="ends after 100 steps"):
        Run(recipe(), Tape([(500, "optimizer.lr", 0.1)]))
    with pytest.raises(KnobError, match="unknown knob"):
        Run(recipe()).change({"nodot": 1})
    with pytest.raises(RecipeError, match="name of a part"):
        Recipe(["a"], "mlp", "adam")


def test_other_data_under_the_same_name_are_noticed(tmp_path):
    from sklearn.datasets import load_wine
    import numpy as np

    X, y = load_wine(return_X_y=True)
    np.savez(tmp_path / "mine.npz", X=X, y=y)
    r = Recipe("table", "mlp", "adam", {"data.path": str(tmp_path / "mine.npz"), "run.steps": 20})
    run = Run(r).advance(10)
    run.save(Store(tmp_path), "r")
    assert Run.resume(Store(tmp_path), "r").index == 10
    np.savez(tmp_path / "mine.npz", X=X[:, ::-1], y=y)
    with pytest.raises(RecipeError, match="other data"):
        Run.resume(Store(tmp_path), "r")


def test_steps_asked_for_twice_are_made_twice():
    live = Live(recipe())
    live.step(30)
    live.step(30)
    live.wait()
    while live.run.index < 60 and live.state == "running":
        live.wait()
    assert live.state == "paused" and live.run.index == 60


def test_a_run_replays_though_others_are_built_beside_it():
    "Threads that build models, and put torch's generator back, do not change the dropout of a step that is under way."
    sizes = {"num_layers": 1, "num_heads": 2, "dim": 16, "dropout": 0.5}
    recipe = Recipe("dialect", "adaptive_transformer", "adam", {f"model.{k}": v for k, v in sizes.items()} | {"run.steps": 40, "run.threads": 1, "run.eval_every": 40, "data.limit": 20_000})
    alone = replay(recipe).session().weights
    ended = threading.Event()

    def disturb():
        while not ended.is_set():
            Run(recipe)

    others = [threading.Thread(target=disturb) for _ in range(2)]
    for t in others:
        t.start()
    together = [replay(recipe).session().weights for _ in range(2)]
    ended.set()
    for t in others:
        t.join()
    assert together == [alone, alone]


@pytest.fixture
def taught(tmp_path):
    "A file of weights that digits were learnt with."
    run = replay(Recipe("digits", "mlp", "adam", {"run.steps": 30, "run.threads": 1}))
    save_state(tmp_path / "taught.safetensors", run.model.state_dict())
    return run, tmp_path / "taught.safetensors"


def begun(file, **knobs):
    return Recipe("digits", "mlp", "adam", {"run.weights": str(file), "run.steps": 20, "run.threads": 1} | knobs)


def test_a_run_begins_with_given_weights(taught, tmp_path):
    run, file = taught
    torch.save(run.model.state_dict(), tmp_path / "taught.pt")
    save_state(tmp_path / "whole.safetensors", {"model": run.model.state_dict(), "step": 30})
    for path in (file, tmp_path / "taught.pt", tmp_path / "whole.safetensors"):
        assert weights_digest(Run(begun(path)).model) == weights_digest(run.model)
    first = replay(begun(file)).session()
    assert first.weights == replay(begun(file)).session().weights and first.made_with["weights"] == weights_digest(run.model)


def test_weights_that_do_not_fit_are_refused(taught, tmp_path):
    _, file = taught
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:200])
    save_state(tmp_path / "list.safetensors", [torch.zeros(3)])
    for recipe in (begun(tmp_path / "none.safetensors"), begun(tmp_path / "torn.safetensors"), begun(tmp_path / "list.safetensors"), begun(file, **{"model.hidden": 7})):
        with pytest.raises(RecipeError, match="run.weights=.*cannot be what this model begins with"):
            Run(recipe)


def test_a_checkpoint_needs_no_file_of_weights(taught, tmp_path):
    "What was committed is not lost with the file that the run began with."
    _, file = taught
    store, run = Store(tmp_path / "store"), Run(begun(file)).advance(10)
    run.save(store, "on")
    file.unlink()
    assert Run.resume(store, "on").advance().session().weights == run.advance().session().weights
    assert Run.resume(store, "on").session().made_with["weights"] == run.begun_with
