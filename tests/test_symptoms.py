"Diagnosis from the curves: each symptom on a real training that has it, none on trainings that are well, and no flicker."
import math
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaptive_lab.plasticity import Plasticity
from adaptive_lab.run import Run
from adaptive_lab.symptoms import CURES, History, cures, diagnose, forgetting, held, lag, task_now, unrest
from adaptive_lab.tape import Recipe

UNSTABLE, LAGS, FORGETS = CURES
KNOBS = {"run.steps": 600, "run.eval_every": 10, "run.threads": 1, "data.steps_per_task": 300, "optimizer.warmup_steps": 50}
FEW = {"data.tasks": 2, "data.degrees": 15.0}


def trained(data, knobs=None, change=None, steps=600):
    "History and final knobs of a run; `change` comes at step 300."
    given = {**KNOBS, **(knobs or {}), "run.steps": steps}
    if data in ("digits", "noisy_digits"):  # one task
        del given["data.steps_per_task"]
    run = Run(Recipe(data, "mlp", "plasticity", given)).advance(300)
    run.change(change or {})
    return History.of(run.advance()), run.knobs["optimizer"]


def shown(h, knobs, every=10):
    "step -> names of the symptoms, judged as a panel would have."
    return {s: [x.name for x in diagnose(h.until(s), knobs)] for s in range(every, h.step + 1, every)}


@pytest.mark.parametrize("data, knobs", [("rotated_digits", FEW), ("digits", {}), ("noisy_digits", {})])
def test_a_training_that_is_well_shows_nothing(data, knobs):
    h, now = trained(data, knobs)
    assert set(map(tuple, shown(h, now).values())) == {()}
    assert h.evaluations[-1]["accuracy"] > 0.8


@pytest.mark.parametrize("lr", [0.0, 1e-6])
def test_a_frozen_training_does_not_learn(lr):
    h, now = trained("split_digits", change={"optimizer.lr": lr})
    found = shown(h, now)
    assert all(found[s] == [LAGS] for s in range(510, 601, 10)) and not any(found[s] for s in range(10, 491, 10))
    text = str(diagnose(h, now)[0])
    assert f"Try to decrease plasticity_k (now 5) or increase lr (now {lr:g})." in text and "task 2,3 reached 0" in text


def test_a_training_whose_gates_are_shut_does_not_learn():
    "k = 20 and every weight above the threshold: the third task finds hardly a weight that may move."
    h, now = trained("split_digits", {"optimizer.plasticity_k": 20.0, "optimizer.threshold_percentile": 0.0}, steps=850)
    assert all(LAGS in names for s, names in shown(h, now).items() if s >= 800)
    assert "decrease plasticity_k (now 20)" in str(diagnose(h, now)[0])


def test_it_forgets():
    h, now = trained("split_digits", {"optimizer.plasticity_k": 0.0})
    found = shown(h, now)
    assert all(found[s] == [FORGETS] for s in range(400, 601, 10)) and not any(found[s] for s in range(10, 301, 10))
    text = str(diagnose(h, now)[0])
    assert "task 0,1 fell from 1.00 to 0.00. Try to increase coincidence (now 0) or increase plasticity_k (now 0)." in text
    acting = Plasticity(plasticity_k=5, warmup_steps=50)
    gates = ("increase plasticity_k (now 5)", "increase trace_decay (now 0.99)")
    assert diagnose(h, acting)[0].cures == ("increase coincidence (now 0)", *gates)
    assert diagnose(replace(h, attached=False), acting)[0].cures == gates


@pytest.mark.parametrize("data, knobs, at", [("digits", {"optimizer.lr": 0.5}, 0), ("digits", {}, 300), ("split_digits", {"optimizer.lr": 0.5}, 0)])
def test_it_is_unstable(data, knobs, at):
    h, now = trained(data, knobs, {"optimizer.lr": 0.5} if at else {})
    found = shown(h, now)
    assert all(found[s] == [UNSTABLE] for s in range(at + 30, at + 191, 10)) and not any(found[s] for s in range(10, at, 10))
    text = str(diagnose(h.until(at + 100), now)[0])
    assert "increase warmup_steps (now 50) or decrease plasticity_k (now 5)" in text and "the loss jumped" in text


def test_no_flicker():
    "Symptoms come and go a few times in five tasks, not at every measurement."
    knobs = {"data.steps_per_task": 100}
    for change in ({"optimizer.lr": 1e-5}, {"optimizer.lr": 0.1}):
        h, now = trained("split_digits", knobs, change)
        found = shown(h, now)
        for name in CURES:
            turns = [k for k, _ in groupby(name in names for names in found.values())]
            assert len(turns) <= 9, (change, name, turns)


def history(losses=(), accuracies=(), boundaries=(), tests=("a",), classes=10, every=10, **more):
    "A history made by hand; `accuracies` has a row a test."
    rows = list(zip(*accuracies))
    evaluations = [dict(step=every * (i + 1), accuracy=float(np.mean(r)), **{f"accuracy/{t}": a for t, a in zip(tests, r)}) for i, r in enumerate(rows)]
    losses = list(losses) or [1.0] * (every * len(rows))
    return History(len(losses), losses, evaluations, list(tests), list(boundaries), classes, **more)


def test_forgetting_is_that_of_the_field():
    "Mean over the earlier tasks of best minus present (Chaudhry et al. 2018), by hand; a single bad measurement does not count."
    h = history(accuracies=[[0.5, 0.9, 0.4, 0.4, 0.4, 0.4], [0, 0, 0.8, 0.7, 0.6, 0.6], [0, 0, 0, 0.1, 0.9, 0.9]], boundaries=[20, 40], tests="abc")
    assert forgetting(h).round(2).tolist() == [0, 0, 0, 0.5, 0.5, 0.35]  # the raw values are 0, 0, .5, .5, .35, .35
    dip = history(accuracies=[[0.9, 0.9, 0.9, 0.1, 0.9, 0.9], [0, 0, 0.9, 0.9, 0.9, 0.9]], boundaries=[20], tests="ab")
    assert forgetting(dip).max() == 0


def test_lag_compares_at_the_same_age():
    h = history(accuracies=[[0.6, 0.8, 0.9, 0.9, 0.9], [0, 0, 0, 0.2, 0.45]], boundaries=[30], tests="ab")
    assert lag(h).age.tolist() == [10, 20] and lag(h).standard.tolist() == [0.6, 0.8]
    assert np.allclose(lag(h).lag, [(0.6 - 0.2) / 0.5, (0.8 - 0.45) / 0.7])


def test_a_boundary_belongs_to_the_task_before():
    h = history(accuracies=[[0.9] * 6, [0.0] * 6], boundaries=[30], tests="ab")
    assert task_now(h.until(30)) == (0, 0, 30) and task_now(h.until(31)) == (1, 30, 30)


def test_a_higher_loss_of_a_new_task_is_no_unrest():
    h = history([0.1] * 300 + [9.0] * 10 + [1.0] * 290, [[0.9] * 60, [0.0] * 60], [300], "ab")
    assert all(UNSTABLE not in names for names in shown(h, Plasticity()).values())
    same = history([0.1] * 300 + [9.0] * 10 + [1.0] * 290, [[0.9] * 60], tests="a")
    assert UNSTABLE in shown(same, Plasticity())[310]


def test_a_level_that_rises_and_skipped_steps_are_unrest():
    slow = history(np.linspace(0.5, 2.0, 400), [[0.9] * 40])
    assert unrest(slow)[0].max() == 0 and unrest(slow)[1][-1] > 0.5 and diagnose(slow, Plasticity())[0].name == UNSTABLE
    quiet = [0.5] * 400
    assert not diagnose(history(quiet, [[0.9] * 40], skipped=4), Plasticity())
    assert "5 of its steps were skipped" in str(diagnose(history(quiet, [[0.9] * 40], skipped=5), Plasticity())[0])


def test_cures_that_cannot_act_are_not_named():
    acting, warming, without = Plasticity(warmup_steps=10), Plasticity(), Plasticity(plasticity_k=0, warmup_steps=10)
    assert cures(LAGS, acting, 100) == ["decrease plasticity_k (now 5)", "increase lr (now 0.001)"]
    assert cures(LAGS, warming, 100) == cures(LAGS, without, 100) == ["increase lr (now 0.001)"]
    assert cures(FORGETS, warming, 100) == ["decrease warmup_steps (now 1000)"] and cures(FORGETS, without, 100) == ["increase plasticity_k (now 0)"]
    assert cures(UNSTABLE, without, 100) == ["decrease lr (now 0.001)"]
    assert cures(LAGS, Plasticity(lr=0.5, warmup_steps=10), 100) == ["decrease plasticity_k (now 5)"]
    more = ["increase coincidence (now 5)"]  # acts with gates, without, and during warm-up; and is of no use against another symptom
    for without_it in (dict(warmup_steps=10), dict(), dict(plasticity_k=0)):
        least = cures(FORGETS, Plasticity(**without_it), 100)
        assert cures(FORGETS, Plasticity(coincidence=5, **without_it), 100, attached=True) == more + least
        assert cures(FORGETS, Plasticity(coincidence=1000, **without_it), 100, attached=True) == least
    assert cures(LAGS, acting, 100, attached=True) == cures(LAGS, acting, 100)
    assert cures(FORGETS, Plasticity(plasticity_k=20, warmup_steps=10), 100) == ["increase trace_decay (now 0.99)"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1e30), max_size=80), st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=8),
    st.sets(st.integers(1, 70), max_size=2), st.integers(1, 3), st.integers(0, 90),
)
@example([0.0] * 10, [(0.0, 0.0)], {1}, 1, 0)  # fewer tests than tasks
def test_any_history_is_judged_without_an_error(losses, rows, boundaries, tests, step):
    names = "abc"[:tests]
    evaluations = [dict(step=10 * (i + 1), accuracy=a, **{f"accuracy/{t}": b for t in names}) for i, (a, b) in enumerate(rows)]
    h = History(len(losses), losses, [e for e in evaluations if e["step"] <= len(losses)], list(names), sorted(boundaries), 10)
    for part in (h, h.until(min(step, h.step))):
        assert all(math.isfinite(part.step) and str(s).endswith(".") for s in diagnose(part, Plasticity()))


@given(st.lists(st.floats(0, 1)))
def test_held_is_a_schmitt_trigger(values):
    last = [v for v in values if v > 0.5 or v <= 0.2]  # between both ends nothing changes
    assert held(values, 0.5, 0.2) == bool(last and last[-1] > 0.5)
