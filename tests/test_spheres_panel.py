"The panel of the levels on a running model, without a page."
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_lab.knobs import KnobError, Knobs, knob
from adaptive_lab.panels import spheres as panels
from adaptive_lab.panels.spheres import SpheresPanel, SphereView, put
from adaptive_lab.parts import part
from adaptive_lab.run import Run, replay
from adaptive_lab.spheres import Level, Snapshot, scene_of
from adaptive_lab.spherewatch import measured
from adaptive_lab.tape import Recipe
from adaptive_lab.wubu.levels import WuBuConfig, WuBuLevels


class Small(nn.Module):
    "Predicts a byte from the one before, through levels with dropout."

    def __init__(self):
        super().__init__()
        self.bytes, self.out = nn.Embedding(256, 8), nn.Linear(9, 256)
        self.levels = WuBuLevels(WuBuConfig(num_levels=2, hyperbolic_dims=[6, 3], boundary_points_per_level=[3, 2]), 8)

    def forward(self, x):
        return self.out(self.levels(self.bytes(x)))

    def locate(self, text):
        if len(text) > 20:
            raise ValueError("too long <b>")
        return self.levels.states(self.bytes(torch.tensor(list(text))))

    def named_points(self):
        return [(["a", "<b>"], self.locate(b"ab")[i], ["word", "word"]) for i in range(2)]


class SmallKnobs(Knobs):
    "Levels."

    curvatures: str = knob("", "curvature of each level")
    scales: str = knob("", "scale of each level")
    spreads: str = knob("", "spread of each level")


@part("model", "test_levels", SmallKnobs)
def small(knobs, data, seed):
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return Small()


def check(model, name, value):
    if any(v != "-" and not 0 < float(v) < 100 for v in value.split()):
        raise KnobError(f"{name}={value!r} is not allowed")


def turn(model, name, value, optimizer):
    act = dict(curvatures=model.levels.set_curvature, scales=model.levels.set_scale, spreads=model.levels.set_spread)[name]
    for i, v in enumerate(value.split()):
        act(i, float(v)) if v != "-" else None


small.check, small.turn = check, turn
RECIPE = {"run.steps": 400, "run.threads": 1, "run.eval_every": 10_000, "data.limit": 20_000, "data.context": 8, "data.batch_size": 4, "data.validation_windows": 16}


def panel_of(**more):
    return SpheresPanel(Recipe("text", "test_levels", "adam", {**RECIPE, **more}))


def run(panel, n):
    panel.step(n)
    panel.live.wait()
    panel.draw()


def ask(panel, *wishes):
    panel.view.asked = [list(x) for x in wishes]
    panel.view.turn += 1


def test_sliders_turn_a_run_by_its_tape_and_it_replays():
    panel = panel_of()
    run(panel, 3)
    ask(panel, (0, "c", 2.0), (1, "s", 0.5))
    ask(panel, (1, "c", 3.0))
    assert panel.run.waiting == {"model.curvatures": "2 3", "model.scales": "- 0.5"} and panel.view.heard == panel.view.turn == 2
    assert panel.view.now["c"] == [2, 3] and panel.view.now["s"][1] == 0.5 and float(panel.run.model.levels.c[0].detach()) < 1.1  # drawn as it will be
    run(panel, 1)
    levels = panel.run.model.levels
    assert [round(v.item(), 1) for v in levels.c] == [2, 3] and round(levels.s[1].item(), 1) == 0.5
    ask(panel, (0, "sigma", 0.25))
    run(panel, 6)
    assert [(c.step, c.knob, c.value) for c in panel.run.tape] == [(3, "model.curvatures", "2 3"), (3, "model.scales", "- 0.5"), (4, "model.spreads", "0.25 -")]
    assert panel.view.now["c"] == [v.item() for v in levels.c] and panel.view.now["step"] == 10  # learned on from there
    done = panel.live.session()
    assert replay(done.recipe, done.tape, done.until).session().weights == done.weights


def test_refusals_are_told_and_the_run_goes_on():
    panel = panel_of()
    run(panel, 1)
    ask(panel, (0, "c", 500.0))
    assert "not allowed" in panel.status.value and panel.view.heard == 1 and not panel.run.waiting and panel.view.now["c"][0] < 2
    panel.stop()
    ask(panel, (0, "c", 2.0))
    assert "this run is stopped" in panel.status.value and panel.view.heard == 2
    with pytest.raises(ValueError, match="finished"):
        put(panel.run, {(0, "c"): 2.0}, "finished")
    with pytest.raises(ValueError, match="no knobs model.curvatures"):
        SpheresPanel(Recipe("digits", "mlp", "adam"))


def test_looking_changes_no_bit_of_the_run():
    panel, other = panel_of(), Run(Recipe("text", "test_levels", "adam", RECIPE))
    panel.view.typed, panel.view.search = "abba", 1
    for _ in range(5):
        panel._at = dict(words=-np.inf, text=-np.inf)  # it is time for a pass through the model
        run(panel, 3)
    (names, first, _), second = measured(panel.run.model)[0][0], measured(panel.run.model)[0][0][1]
    assert panel.run.model.training and names == ["a", "<b>"] and np.array_equal(first, second)  # without dropout
    assert panel._looked | dict(reading=0) == dict(words=15, text=15, reading=0) and panel.run.session().weights == other.advance(15).session().weights


def test_a_typed_text_its_neighbours_and_an_error():
    panel = panel_of()
    run(panel, 2)
    panel.view.typed, panel.view.search = "ab", 1
    found = panel.view.found
    assert found["text"] == "ab" and [len(x["places"]) for x in found["levels"]] == [2, 2]
    assert {tuple(x[:1] + x[2:]) for x in found["levels"][0]["near"][:2]} == {("a", 0), ("<b>", 1)} and found["levels"][0]["near"][0][1] < 1e-6
    v, = (x for x in [panel._places[1]])
    assert np.allclose(np.linalg.norm(found["levels"][1]["places"], axis=1), np.linalg.norm(v, axis=1), atol=1e-4)
    panel.view.typed, panel.view.search = "x" * 30, 2
    assert panel.view.found == dict(text="x" * 30, note="too long <b>", levels=[])
    panel.view.typed, panel.view.search = "", 3
    assert panel.view.found == {} and panel.live.error is None


def test_the_film_keeps_its_length_and_a_reset_begins_another(monkeypatch, tmp_path):
    monkeypatch.setattr(panels, "MOST", 4)
    monkeypatch.setattr(panels, "FIRST", 2)
    panel = panel_of()
    for _ in range(14):
        run(panel, 1)
    steps = [s.step for s in panel.film]
    assert panel.every == 4 and 3 <= len(steps) <= 4 and steps[0] <= 1 and min(np.diff(steps)) >= 4
    data = np.frombuffer(panel.view.data, "<f2").reshape(len(panel.film), -1, 9)
    assert data.shape[1] == 3 + 1 + 2 + 2 + 1 + 2 == sum(len(p) for p in panel.scene.points) and np.isfinite(data[-1, :, :3]).all()
    panel.page_name.value = str(tmp_path / "film.html")
    panel.export()
    panel.export()  # its own file may be renewed
    html = (tmp_path / "film.html").read_text(encoding="utf-8")
    assert f"{len(panel.film) + (steps[-1] < 14)} snapshots of a run of 14 steps" in html and "http:" not in html
    assert [s.step for s in panel.film] == steps  # nothing is lost by it
    (tmp_path / "mine.html").write_text("")
    panel.page_name.value = str(tmp_path / "mine.html")
    panel.export()
    assert "is there already" in panel.status.value and (tmp_path / "mine.html").read_text() == ""
    ask(panel, (0, "c", 5.0))
    panel.reset()
    panel.draw()
    assert [s.step for s in panel.film] == [0] and panel.view.now["c"][0] == pytest.approx(1) and panel.run.recipe["model.curvatures"] == ""


def test_requests_that_come_while_a_step_is_made_are_gathered():
    panel = panel_of()
    run(panel, 1)
    waits = []
    panel.live.between = lambda act: waits.append(SimpleNamespace(act=act, add_done_callback=lambda f: waits[-1].__dict__.update(done=f))) or waits[-1]
    ask(panel, (0, "c", 2.0))
    ask(panel, (0, "c", 2.5))
    ask(panel, (0, "c", 3.0), (1, "sigma", 0.7))
    assert len(waits) == 1 and panel._sending
    first = waits[0]
    result = first.act(panel.run)
    first.done(SimpleNamespace(exception=lambda: None, result=lambda: result))
    assert len(waits) == 2 and panel.view.heard == 1
    second = waits[1].act(panel.run)
    waits[1].done(SimpleNamespace(exception=lambda: None, result=lambda: second))
    assert panel.run.waiting == {"model.curvatures": "3 -", "model.spreads": "- 0.7"} and panel.view.heard == 3 and not panel._sending


def test_a_view_alone_shows_a_scene():
    view, scene = SphereView(), scene_of([Snapshot(0, "", [Level(1, 1, None, ["a", "b"], ["boundary"] * 2, np.eye(2))])])
    view.show(scene)
    assert view.scene == scene.head() and view.data == scene.data() and not view.live and json.dumps(view.scene)


def test_the_page_reads_along_with_the_run():
    "The window of the last batch, patch by patch, with a place in each level; nothing of it changes the run."
    sizes = {"local_hidden_size": 32, "decoder_memory_dim": 32, "hyperbolic_dims": [8, 4, 3], "context_window": 32, "n_gram_sizes": [], "num_encoder_layers": 0, "num_decoder_layers": 1, "num_encoder_heads": 2, "num_decoder_heads": 2}
    recipe = Recipe("text", "byte_model", "adam", {f"model.{k}": v for k, v in sizes.items()} | {"data.limit": 20_000, "data.context": 32, "data.batch_size": 2, "run.steps": 9, "run.eval_every": 9, "run.threads": 1})
    panel = SpheresPanel(recipe)
    run(panel, 4)
    panel.view.read = True
    panel.draw()
    found, window = panel.view.reading, panel.run.data.train[panel.run.position["batch"] - 1][0][0]
    assert found["step"] == 4 and len(found["patches"]) > 1 and [len(level) for level in found["levels"]] == [len(found["patches"])] * 3
    assert sum(map(len, found["patches"])) == len(window) and all(np.isfinite(found["levels"][0]).all(1))
    run(panel, 2)
    assert panel.view.reading["step"] == 4  # the next one when it is time for it
    run(panel, 3)
    panel._at["reading"] = -np.inf
    panel.draw()
    assert panel.view.reading["step"] == 9 and panel.run.session().weights == replay(recipe).session().weights
