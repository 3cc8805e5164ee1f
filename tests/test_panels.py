"Panels without a page: what a person does, from whichever thread the page's messages come."
import asyncio
import base64
import math
import re
import threading
from io import BytesIO
from typing import get_args

import numpy as np
import pytest
import torch

from adaptive_lab.heat import PALETTE, shades
from adaptive_lab.knobs import Knobs, knob, walk
from adaptive_lab.live import Live
from adaptive_lab.panels import training
from adaptive_lab.panels.controls import control, meant, place, same, words
from adaptive_lab.panels.training import TrainingPanel
from adaptive_lab.panels.views import (
    LEAST, VIEWS, course_view, eligibility_view, extreme_samples, gate_blocks, heat_view, history_lines, holders_view, phi_view, places_view, spared, value_holders,
)
from adaptive_lab.plasticity import Plasticity
from adaptive_lab.run import Run
from adaptive_lab.tape import Recipe, load_session
from adaptive_lab.value_kinds import Kinds
from adaptive_lab.valued_adam import VWPRAdam

KNOBS = {"data.steps_per_task": 60, "run.steps": 300, "run.eval_every": 10, "optimizer.warmup_steps": 20, "run.threads": 1}


def recipe(**more):
    return Recipe("split_digits", "mlp", "plasticity", {**KNOBS, **more})


def test_widget_events_of_another_thread_are_carried_home():
    "JupyterLab hands the messages of widgets to the kernel in a subshell: a thread of its own."
    async def main():
        panel = TrainingPanel(recipe())
        seen, turn = [], panel._turned
        panel._turned = lambda *a: (seen.append(threading.get_ident()), turn(*a))
        panel.draw = lambda *leave: seen.append(threading.get_ident())

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


def test_round_values_are_positions_and_the_left_end_of_powers_is_zero():
    class K(Knobs):
        coincidence: float = knob(0.0, "a", ge=0, span=(0, 120))
        decay: float = knob(0.9, "b", ge=0, lt=1)
        weight_decay: float = knob(0.0, "c", ge=0, le=1, log=True)

    a, b, c = (control(k, k.default) for k in walk(K))
    for made, value in ((a, 10.0), (a, 40.0), (b, 0.99)):
        steps = (value - made.min) / made.step
        assert abs(steps - round(steps)) < 1e-6
    k = list(walk(K))[2]
    assert same(c.value, words(k, 0.0)) and meant(k, c.value) == 0.0 and meant(k, 1e-3) == 1e-3 and "0 at the left end" in c.tooltip


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


def images(svg):
    "The pictures in a picture, as (rows, columns, 3) of uint8, read by another library."
    from matplotlib.image import imread

    return [np.rint(imread(BytesIO(base64.b64decode(d)))[..., :3] * 255).astype(np.uint8) for d in re.findall("base64,([^\"]+)", svg)]


def test_the_heat_maps_show_the_gates_of_the_weights():
    live = Live(recipe(**{"optimizer.plasticity_k": 12.0, "model.hidden": 40, "model.depth": 1}))
    assert "not known yet" in heat_view(live)
    live.run.advance(80)
    first, last, scale = images(heat_view(live))
    gates = {n: b for n, (b, _) in gate_blocks(live.run)[1].items()}
    assert first.shape == (40, 64, 3) and last.shape == (10, 40, 3)  # each weight a pixel
    assert (first == PALETTE[shades(gates["1.weight"], 0, 1)]).all() and (last == PALETTE[shades(gates["3.weight"], 0, 1)]).all()
    shut = (first.reshape(-1, 3) == PALETTE[0]).all(1).mean()
    assert 0.05 < shut < 0.5 and abs(shut - (gates["1.weight"] < 1 / 600).mean()) < 0.01  # dark is protected
    live.run.change({"optimizer.plasticity_k": 0.0})
    live.run.advance(81)
    assert (images(heat_view(live))[0] == PALETTE[254]).all() and "after step 81" in heat_view(live)


def test_the_eligibility_lies_over_the_batch_it_was_made_of():
    live = Live(recipe())
    live.run.advance(30)
    grey, mixed, _ = images(eligibility_view(live))
    x = live.run.data.train[29][0].mean(0).reshape(8, 8).numpy()
    assert grey.shape == mixed.shape == (8, 8, 3) and (np.argmax(grey[..., 0]) == np.argmax(x)) and (grey[..., 0] == grey[..., 1]).all()
    e = live.run.optimizer.get_param_eligibility(next(live.run.model.parameters())).mean(0).reshape(8, 8)
    green = mixed[..., 1] - 0.35 * grey[..., 1]  # what the scale adds; viridis grows in green all the way
    assert abs(green / 0.65 - PALETTE[shades(e, 0, e.max().item()), 1]).max() < 2
    assert e[0, 0] == 0 and (mixed[0, 0] == np.rint(0.65 * PALETTE[0])).all()  # a corner that is always black is never in use


def test_a_large_network_is_not_looked_at_every_step():
    class Shown:  # a run, as far as the probe knows
        def __init__(self, weights):
            self.model = torch.nn.Linear(weights, 1, bias=False)

    asked = []
    probe = spared(lambda run: asked.append(run.index) or run.index)
    for weights, wanted in ((1000, list(range(50))), (10**6, [0, 20, 40])):
        asked.clear()
        run = Shown(weights)
        for run.index in range(50):
            probe(run)
        assert asked == wanted
    run.index = 3  # steps were taken back
    assert probe(run) == 3


def test_every_knob_turns_while_the_training_runs():
    async def main():
        panel = TrainingPanel(recipe(**{"run.steps": 10**6}))
        panel.start()
        await asyncio.sleep(0.1)
        wanted = dict(lr=0.01, trace_decay=0.9, plasticity_k=2.0, threshold_percentile=50.0, warmup_steps=7, adaptive_threshold=False, eps=1e-6, floor=0.25)
        others = [k for k in walk(Plasticity) if k.live and k.name not in wanted]
        wanted |= {k.name: not k.default if k.type is bool else k.type(0.03) for k in others if not k.choices}
        assert set(wanted) == {k.name for k in walk(Plasticity) if k.live and not k.choices}
        for name, value in wanted.items():
            panel.controls[f"optimizer.{name}"].value = value
        at = panel.run.index
        while panel.run.index <= at + 5:
            await asyncio.sleep(0.01)
        panel.pause()
        await panel.live.rest()
        group = panel.run.optimizer.param_groups[0]
        assert {n: group[n] for n in wanted if not same(group[n], wanted[n])} == {}
        assert {c.knob for c in panel.run.tape} == {f"optimizer.{name}" for name in wanted} and panel.live.error is None

    asyncio.run(main())


def test_the_diagnosis_comes_with_its_symptom_and_goes_with_it():
    panel = TrainingPanel(recipe(**{"run.eval_every": 5}))
    panel.run.advance(60)
    panel.draw()
    assert panel.advice.value == ""
    panel.run.advance(110)
    panel.draw()
    assert "forgets the old tasks" in panel.advice.value and "task 0,1 fell" in panel.advice.value and "plasticity_k (now 5)" in panel.advice.value
    panel._turned("optimizer.plasticity_k", 7.0)
    assert "plasticity_k (now 7)" in panel.advice.value  # a knob that waits is named as if it held
    panel.reset()
    panel.draw()
    assert panel.advice.value == ""


def test_the_diagnosis_is_escaped_and_only_where_it_belongs(monkeypatch):
    panel = TrainingPanel(recipe())
    monkeypatch.setitem(training.ADVICE, "plasticity", lambda live: ["<img src=x onerror=alert(1)>"])
    panel.draw()
    assert "&lt;img" in panel.advice.value and "<img" not in panel.advice.value
    other = TrainingPanel(Recipe("digits", "mlp", "adam", {"run.threads": 1}))
    other.draw()
    assert other.advice.value == "" and other.extra == []


def test_a_failed_run_is_told_to_be_unstable():
    panel = TrainingPanel(recipe())
    panel.run.data.train._streams[0].X[:] = float("nan")
    panel.live.start()
    panel.live.wait()
    panel.draw()
    assert panel.live.state == "failed" and "its last loss was not finite" in panel.advice.value


def test_pictures_of_a_wide_layer_are_small():
    live = Live(recipe(**{"model.hidden": 784}))
    live.run.advance(2)
    assert all(len(view(live)) < 60_000 for view in VIEWS["plasticity"])


VALUED = {"run.steps": 60, "run.eval_every": 20, "run.threads": 1, "model.hidden": 16, "optimizer.alpha": 0.05}


def valued(granularity="sample", **more):
    return Recipe("noisy_digits", "mlp", "vwpr", {**VALUED, "optimizer.granularity": granularity, **more})


@pytest.mark.parametrize("granularity", get_args(Kinds))
def test_values_are_shown_before_while_and_after(granularity):
    from xml.etree.ElementTree import fromstring

    live = Live(valued(granularity))
    for until in (0, 1, 30, 60):
        live.run.advance(until)
        shown = [view(live) for view in VIEWS["vwpr"]]
        assert all(fromstring(svg).tag.endswith("svg") and len(svg) < 60_000 and not re.search(r"\bnan\b", re.sub("base64,[^\"]+", "", svg)) for svg in shown), until
    live.stop()
    assert [view(live) for view in VIEWS["vwpr"]] == shown
    live._in_thread, live._probes = True, {}  # a step is under way, and nothing was looked at yet
    assert all(fromstring(view(live)).tag.endswith("svg") for view in VIEWS["vwpr"])


def test_the_histogram_of_values_answers_to_its_sliders_at_once():
    async def main():
        panel = TrainingPanel(valued("unit", **{"optimizer.normalize_phi": False, "optimizer.alpha": 0.5}))
        panel.step(40)
        await panel.live.rest()
        histogram = next(p for p, view in panel.extra if view is phi_view)
        seen = [str(histogram.svg)]
        for name, value in (("phi_clip_value", 1.2), ("normalize_phi", True), ("phi_clip_value", 0.0)):
            panel.controls[f"optimizer.{name}"].value = value
            await asyncio.sleep(0.05)
            seen.append(str(histogram.svg))
        assert panel.run.index == 40 and len(set(seen)) == 4
        assert "at most 1.2" in seen[1] and "at most" not in seen[3] and "mean 1<" in seen[3]

    asyncio.run(main())


def test_every_knob_of_the_values_turns_while_the_training_runs():
    async def main():
        panel = TrainingPanel(valued(**{"run.steps": 10**6}))
        panel.start()
        await asyncio.sleep(0.1)
        wanted = {k.name: (not k.default if k.type is bool else "loss" if k.choices else 0.03) for k in walk(VWPRAdam) if k.live}
        assert {"alpha", "lr", "l1_lambda", "phi_clip_value", "normalize_phi", "relative", "memory", "margin"} < set(wanted)
        for name, value in wanted.items():
            panel.controls[f"optimizer.{name}"].value = value
        at = panel.run.index
        while panel.run.index <= at + 5:
            await asyncio.sleep(0.01)
        panel.pause()
        await panel.live.rest()
        group, k = panel.run.optimizer.param_groups[0], panel.run.optimizer.wrapper.knobs
        assert {n: group[n] for n in wanted if not same(group[n], wanted[n])} == {} and panel.live.error is None
        assert all(same(getattr(k, n), wanted[n]) for n in wanted if n in type(k).model_fields) and same(panel.run.optimizer.mechanisms["values"].phi.param_groups[0]["lr"], 0.03)

    asyncio.run(main())


def test_another_granularity_comes_with_a_reset_and_its_pictures():
    panel = TrainingPanel(valued())
    panel.run.advance(5)
    panel.draw()
    panel.controls["optimizer.granularity"].value = "feature"
    panel.reset()
    panel.draw()
    shown = {view: p.svg for p, view in panel.extra}
    assert "φ of 64 features" in shown[phi_view] and "mean of the batch" in shown[holders_view] and "most valued features" in shown[places_view]
    panel.controls["data.source"].value = "digits"
    other = TrainingPanel(Recipe("dialect", "adaptive_transformer", "vwpr", {"optimizer.granularity": "unit", "run.threads": 1, "data.limit": 20_000}))
    other.run.advance(3)
    other.controls["optimizer.granularity"].value = "sample"
    other.reset()
    assert "RecipeError" in other.status.value and "samples are numbered" in other.status.value and other.run.index == 3


def test_the_least_valued_samples_are_shown_as_they_are():
    live = Live(valued(**{"data.noise": 0.4, "run.steps": 300, "optimizer.alpha": 0.3, "optimizer.lr": 0.003}))
    live.run.advance()
    svg, found = places_view(live), extreme_samples(live.run)
    phi = live.run.optimizer.wrapper.phi_values()["samples"]
    order, X, y = phi.argsort(stable=True), live.run.data.train.X, live.run.data.train.y
    assert [v for *_, v in found] == [phi[i].item() for i in (*order[:LEAST], *order.flip(0)[: len(found) - LEAST])]
    for shown, i in zip(images(svg), order[:LEAST]):  # dark ink on white
        assert shown.shape == (8, 8, 3) and np.allclose(255 - shown[..., 0], 255 * X[i].reshape(8, 8) / X[i].max(), atol=1)
    assert [int(a) for a in re.findall(r">(\d) · ", svg)] == [int(y[i]) for i in (*order[:LEAST], *order.flip(0)[: len(found) - LEAST])]


def test_the_course_of_values_is_the_record():
    live = Live(valued("output"))
    live.run.advance(60)
    steps, rows = live.look(history_lines)
    assert steps == [0, 10, 20, 30, 40, 50, 60]
    phi = live.run.optimizer.wrapper.phi_values()["outputs"]
    assert rows[0] == {f"output {i}/mean": 1.0 for i in range(10)} and list(rows[-1].values()) == phi.tolist()
    assert live.look(value_holders)[1] == {f"output {i}": v for i, v in enumerate(phi.tolist())} and "output 9" in course_view(live)
