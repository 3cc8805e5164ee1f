"Panels without a page: what a person does, from whichever thread the page's messages come."
import asyncio
import math
import threading

import pytest

from adaptive_lab.panels.controls import control, place, same
from adaptive_lab.panels.training import TrainingPanel
from adaptive_lab.knobs import Knobs, knob, walk
from adaptive_lab.run import Run
from adaptive_lab.tape import Recipe, load_session

KNOBS = {"data.steps_per_task": 60, "run.steps": 300, "run.eval_every": 10, "optimizer.warmup_steps": 20, "run.threads": 1}


def recipe(**more):
    return Recipe("split_digits", "mlp", "plasticity", {**KNOBS, **more})


def test_widget_events_of_another_thread_are_carried_home():
    "JupyterLab hands the messages of widgets to the kernel in a subshell: a thread of its own."
    async def main():
        panel = TrainingPanel(recipe())
        seen, turn = [], panel._turned
        panel._turned = lambda *a: (seen.append(threading.get_ident()), turn(*a))
        panel.draw = lambda: seen.append(threading.get_ident())

        def page():
            panel.controls["optimizer.plasticity_k"].value = 2.0
            panel.buttons["Step n"].click()

        await asyncio.to_thread(page)
        for _ in range(6000):
            if panel.run.index >= 100:
                break
            await asyncio.sleep(0.01)
        assert panel.run.tape.changes[0].value == 2.0
        assert set(seen) == {threading.get_ident()} and len(seen) >= 2

    asyncio.run(main())


def test_a_dragged_slider_ends_on_its_last_value_and_is_taped_once():
    async def main():
        panel = TrainingPanel(recipe())
        for k in (1.0, 3.0, 7.0, 9.0):
            panel.controls["optimizer.plasticity_k"].value = k
        panel.step(10)
        await panel.live.rest()
        assert [(c.step, c.value) for c in panel.run.tape] == [(0, 9.0)]

    asyncio.run(main())


def test_a_refused_value_leaves_the_control_on_what_holds():
    panel = TrainingPanel(recipe())
    panel._turned("optimizer.lr", 7.0)
    assert "lr=7.0 is not allowed" in panel.status.value and same(panel.controls["optimizer.lr"].value, 0.001)
    assert not panel.run.waiting


def test_text_in_the_status_is_escaped():
    panel = TrainingPanel(recipe())
    panel._say("<img src=x onerror=alert(1)>")
    assert "<img" not in panel.status.value


def test_saving_never_replaces_a_file_of_somebody_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    panel = TrainingPanel(recipe())
    panel.save()
    panel.save()  # its own file may be renewed
    assert load_session(tmp_path / "session.json").until == 0
    (tmp_path / "mine.json").write_text("precious")
    for name, said in (("mine.json", "choose another name"), ("workbench.ipynb", "end in .json"), ("no/such/x.json", "no folder")):
        panel.file.value = name
        panel.save()
        assert said in panel.status.value
    assert (tmp_path / "mine.json").read_text() == "precious" and sorted(p.name for p in tmp_path.iterdir()) == ["mine.json", "session.json"]


def test_a_message_stays_until_the_next_action():
    async def main():
        panel = TrainingPanel(recipe())
        panel.step(50)
        panel._turned("optimizer.lr", 7.0)
        await panel.live.rest()
        await asyncio.sleep(0.3)
        assert "lr=7.0 is not allowed" in panel.status.value
        panel.step(1)
        assert "not allowed" not in panel.status.value

    asyncio.run(main())


def test_a_cell_that_runs_again_pauses_its_first_training():
    async def main():
        first = TrainingPanel(recipe(**{"run.steps": 10**6}))
        first.start()
        await asyncio.sleep(0.05)
        second = TrainingPanel(recipe())
        await first.live.rest()
        assert first.live.state == "paused" and second.live.state == "ready"
        assert second.earlier == [first] and "panel.earlier[0]" in second.status.value

    asyncio.run(main())


def test_plasticity_k_changes_the_gates_and_the_next_tasks_curves():
    "The same run, k moved from 1 to 10 at step 130: gates and later accuracies differ visibly; earlier ones not at all."
    runs = {}
    for k in (1.0, 10.0):
        run = Run(recipe(**{"optimizer.plasticity_k": 1.0})).advance(130)
        run.change({"optimizer.plasticity_k": k})
        runs[k] = run.advance()
    curve = {k: [[e[f"accuracy/{t}"] for t in r.data.tests] for e in r.evaluations] for k, r in runs.items()}
    gap = [max(abs(a - b) for a, b in zip(x, y)) for x, y in zip(curve[1.0], curve[10.0])]
    assert max(gap[:13]) == 0 and max(gap[13:]) > 0.05
    mean = {k: r.optimizer.get_diagnostics()["gate_mean"] for k, r in runs.items()}
    assert mean[10.0] < mean[1.0] - 0.05


@pytest.mark.parametrize("value", [0.0123, 1e-4, 0.5])
def test_a_value_off_the_grid_is_on_the_slider_exactly(value):
    "A slider snaps to its grid and reports that as a person's wish: the grid must go through every value it is given."
    class K(Knobs):
        a: float = knob(value, "a", ge=0, le=1, log=True)
        b: float = knob(value, "b", ge=0, le=1)

    for k, start in zip(walk(K), (1e-8, 0)):
        made = control(k, value)
        at = value if k.name == "b" else math.log10(value)
        steps = (at - made.min) / made.step
        assert abs(steps - round(steps)) < 1e-6
        place(made, k, value / 3)
        assert same(made.value, value / 3)


def test_a_reset_builds_beside_the_loop_and_a_failed_one_leaves_the_run(monkeypatch):
    "A slow download must not freeze the page; what went wrong is told, and the paused run goes on."
    import time

    async def main():
        panel = TrainingPanel(recipe())
        panel.step(20)
        await panel.live.rest()

        def slow(changes):
            time.sleep(0.3)
            raise OSError("no network")

        monkeypatch.setattr(panel.live, "build", slow)
        panel.reset()
        ticks = 0
        while not panel._building.done():
            assert panel.buttons["Start"].disabled
            await asyncio.sleep(0.01)
            ticks += 1
        assert ticks > 5 and "OSError: no network" in panel.status.value and not panel.buttons["Start"].disabled
        panel.step(5)
        await panel.live.rest()
        assert panel.run.index == 25

    asyncio.run(main())
