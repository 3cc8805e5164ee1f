"Gate, atlas, report, panel and command line of checkpoints: what the notebooks do not show."
import asyncio
import json
import os
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_lab.cli import main
from adaptive_lab.epsilon_vae.atlas import Charting, chart, direction_of
from adaptive_lab.epsilon_vae.behaviour import behaviour_of, moved
from adaptive_lab.epsilon_vae.gate import Refused, corrected_path, recalibrated, verify
from adaptive_lab.epsilon_vae.population import populations
from adaptive_lab.epsilon_vae.report import make_report, objectives_of
from adaptive_lab.epsilon_vae.weights import layout_of
from adaptive_lab.evaluator import Evaluator
from adaptive_lab.panels.atlas import AtlasPanel
from adaptive_lab.panels.landscape import LandscapePanel
from adaptive_lab.epsilon_vae.landscape import random_plane, run_plane
from adaptive_lab.foreign import import_folder
from adaptive_lab.run import Run, state_digest
from adaptive_lab.store import Store
from adaptive_lab.tape import Recipe
from adaptive_lab.zoo import Zoo, grow

SMALL = Charting(epochs=5, latent_dim=4, hidden_dim=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    for width, many in ((8, 4), (6, 2)):
        grow(folder, Zoo(runs=many, width=width, steps=120), many=4, workers=1, progress=False)
    return folder


@pytest.fixture(scope="module")
def atlas(folder):
    return chart(folder, SMALL, progress=False)


def test_every_checkpoint_decodes_to_itself(atlas):
    for i in (0, 9, 17, 23):
        state, k = atlas.decode(atlas.z[i])
        assert state_digest(state) == state_digest(atlas.state(i)) and atlas.at(i)[0] == k


def test_the_same_chart_twice_is_the_same_to_the_bit(folder, atlas):
    again = chart(folder, SMALL, progress=False)
    assert torch.equal(again.z, atlas.z) and np.array_equal(again.flat, atlas.flat)


def test_ends_of_ways_are_the_checkpoints(atlas):
    for i, j in ((0, 3), (0, 7), (2, 20)):  # in a run, between runs, between architectures
        for t, end in ((0, i), (1, j)):
            assert state_digest(atlas.between(i, j, t)[0]) == state_digest(atlas.state(end))
        assert np.isfinite(atlas.evaluators[atlas.between(i, j, 0.5)[1]].metrics(atlas.between(i, j, 0.5)[0])["loss"])
    assert state_digest(atlas.between(5, 5, 0.4)[0]) == state_digest(atlas.state(5))


def test_a_latent_far_from_the_data_is_told(atlas):
    assert atlas.distance(atlas.z[3]) == 0 and atlas.distance(atlas.z[3] + 100) > 10
    assert atlas.point(atlas.z[3] + 100).origin["distance"] > 10


@pytest.mark.parametrize("z", [[0.0], [float("nan")] * 4, torch.zeros(1, 4)])
def test_bad_latents(atlas, z):
    with pytest.raises(ValueError, match="4 finite numbers"):
        atlas.decode(torch.as_tensor(z))


def test_bad_places_and_objectives(atlas):
    with pytest.raises(IndexError, match="there are 24"):
        atlas.state(24)
    with pytest.raises(ValueError, match="t=2"):
        atlas.between(0, 1, 2)
    with pytest.raises(ValueError, match="run 'x' is not on this map"):
        atlas.frame("x")
    with pytest.raises(ValueError, match="bogus"):
        atlas.front({"bogus": "minimize"})
    with pytest.raises(ValueError, match="largest"):
        atlas.front({"accuracy": "largest"})
    with pytest.raises(ValueError, match="'gap' cannot be measured"):
        atlas.propose({"gap": "minimize"})
    with pytest.raises(ValueError, match="not a name with a word"):
        objectives_of(atlas, "accuracy")


def test_proposals_are_measured_and_on_the_front(atlas):
    objectives = {"accuracy": "maximize", "loss": "minimize"}
    new, _, tried = atlas.propose(objectives, 6)
    assert len(tried) == 6
    table = atlas.metrics(list(objectives))[0]
    for v in new:
        own = atlas.evaluators[[layout_of(v.state).signature == p.layout.signature for p in atlas.populations].index(True)].metrics(v.state)
        assert own == v.measured
        assert not ((table[:, 0] >= own["accuracy"]) & (table[:, 1] <= own["loss"]) & ((table[:, 0] > own["accuracy"]) | (table[:, 1] < own["loss"]))).any()


def test_missing_and_strange_metrics(folder, tmp_path):
    source, store = Store(folder), Store(tmp_path)
    for n, c in enumerate(source.checkpoints()):
        metrics = [dict(accuracy=c.metrics["accuracy"]), dict(accuracy="high", loss=float("nan")), None, dict(constant=1)][n % 4]
        store.save(c.run, c.step, source.load(c.run, c.step), metrics, c.recipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = chart(tmp_path, SMALL, progress=False)
    table, names = found.metrics()
    assert names == ["accuracy", "constant", "weights"] and np.isnan(table[:, 0]).sum() == 18
    assert len(found.front({"accuracy": "maximize"})) >= 1
    assert found.predict(found.state(0))["constant"] == (1.0, 1.0, 1.0)


def test_checkpoints_that_answer_different_questions(folder, tmp_path):
    store = Store(tmp_path)
    for k, classes in enumerate((2, 3)):
        for step in range(2):
            store.save(f"r{k}", step, nn.Linear(4, classes).state_dict(), dict(loss=step))
    judges = [Evaluator(lambda c=c: nn.Linear(4, c), torch.randn(9, 4), {"t": (torch.randn(5, 4), torch.zeros(5, dtype=torch.int64))}) for c in (2, 3)]
    found = sorted(populations(tmp_path), key=lambda p: p.layout.size)
    with pytest.raises(ValueError, match="answer different questions"):
        chart(found, SMALL, judges, progress=False)


def test_weights_alone_make_a_map_and_are_not_decoded(tmp_path):
    store = Store(tmp_path)
    for run in range(10):
        for step in range(2):
            store.save(f"r{run}", step, nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).state_dict(), dict(score=run + step))
    atlas = chart(tmp_path, SMALL, progress=False)
    assert len(atlas) == 20 and "score" in atlas.predict(atlas.state(0))
    with pytest.raises(ValueError, match="weights alone are known.*Evaluator"):
        atlas.decode(atlas.z[0] + 0.1)
    with pytest.raises(ValueError, match="nothing can be measured"):
        atlas.point(atlas.z[0])
    assert objectives_of(atlas) == {"score": "maximize"}
    panel = AtlasPanel(atlas, tmp_path / "kept")
    panel.choose(0.1, 0.1)
    assert "weights alone are known" in panel.status.value
    make_report(tmp_path, tmp_path / "out", SMALL, progress=False)
    assert "statistics" in (tmp_path / "out" / "report.html").read_text()


def test_one_checkpoint_and_one_run(folder, tmp_path):
    source, store = Store(folder), Store(tmp_path)
    first = source.checkpoints()[0]
    store.save("a", 1, source.load(first.run, first.step), first.metrics, first.recipe)
    with pytest.raises(ValueError, match="there is 1 checkpoint"):
        chart(tmp_path, SMALL, progress=False)
    store.save("a", 2, source.load(first.run, source.checkpoints(first.run)[-1].step), first.metrics, first.recipe)
    atlas = chart(tmp_path, SMALL, progress=False)
    assert atlas.predictor is None and atlas.point(atlas.z[0]).predicted == {}


# --- the gate


def judge_of(model=lambda: nn.Linear(2, 2)):
    X = torch.eye(2)
    return Evaluator(model, X, {"test": (X, torch.tensor([0, 1]))})


def test_what_the_gate_refuses():
    good = nn.Linear(2, 2).state_dict()
    for state, word in (({**good, "bias": torch.tensor([float("nan"), 0])}, "bias holds 1"), ({"weight": good["weight"]}, "missing: bias"),
                        ({**good, "weight": torch.full((2, 2), 3e38), "bias": torch.full((2,), 3e38)}, "not finite")):
        with pytest.raises(Refused, match=word):
            verify(state, judge_of())
    with pytest.raises(Refused, match="at least 2 was asked"):
        verify(good, judge_of(), least={"accuracy": 2})
    with pytest.raises(ValueError, match="least names 'f1'"):
        verify(good, judge_of(), least={"f1": 0})


def test_a_state_that_is_changed_after_the_gate_is_not_saved(tmp_path):
    v = verify(nn.Linear(2, 2).state_dict(), judge_of())
    v.state["bias"] += 1
    with pytest.raises(Refused, match="changed after it was verified"):
        v.save(Store(tmp_path), "a", 0)
    assert not Store(tmp_path).checkpoints()


def test_recalibration_leaves_the_rest_and_its_input_alone():
    build = lambda: nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    state = build().state_dict()
    before = state_digest(state)
    X = torch.randn(5000, 2)
    done = recalibrated(state, Evaluator(build, X, {}))
    assert state_digest(state) == before
    own = X @ state["0.weight"].T + state["0.bias"]
    assert torch.allclose(done["1.running_mean"], own.mean(0), atol=2e-3) and torch.allclose(done["1.running_var"], own.var(0), rtol=2e-2)
    assert all(torch.equal(done[n], state[n]) for n in state if "running" not in n)


def test_a_corrected_path_blends_what_is_missing():
    a, b = ({"weight": torch.full((1, 2), v)} for v in (1.0, 3.0))
    path = corrected_path(lambda t: {"weight": torch.full((1, 2), 5 * t * (1 - t))}, layout_of(a), a, b)
    assert torch.allclose(path(0.5)["weight"], torch.full((1, 2), 1.25 + 2.0))


def test_the_last_layer_moves_as_asked():
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    judge, state = Evaluator(build, torch.randn(200, 4), {}), build().state_dict()
    other = {**state, "2.weight": torch.randn(3, 6), "2.bias": torch.randn(3)}
    change = judge.outputs(other) - judge.outputs(state)
    made = moved(state, judge, change, ridge=1e-9)
    assert torch.allclose(judge.outputs(made), judge.outputs(other), atol=1e-3)
    assert torch.equal(made["0.weight"], state["0.weight"])


def test_codes_of_behaviour_keep_what_softmax_sees():
    logits = torch.randn(6, 30, 4)
    code = behaviour_of(logits, 5)
    assert torch.allclose(code.encode(logits + 7), code.encode(logits), atol=1e-4)
    back = torch.stack([code.decode(c) for c in code.encode(logits)]).float()
    assert torch.allclose(back, logits - logits.mean(-1, keepdim=True), atol=1e-4)
    with pytest.raises(ValueError, match="there is 1 checkpoint"):
        behaviour_of(logits[:1])


# --- faces


def test_the_command_writes_a_report_and_checkpoints(folder, tmp_path, capsys):
    argv = ["epsilon", "--checkpoint-dir", str(folder), "--epochs", "3", "--latent-dim", "4", "--save-dir", str(tmp_path), "--quiet"]
    assert main(argv) == 0
    page = (tmp_path / "report.html").read_text()
    assert "24 checkpoints" in capsys.readouterr().out and "<script" not in page and "src=\"http" not in page
    assert page.count("<svg") >= 5


@pytest.mark.parametrize("extra, word", [(["--latent-dim", "1"], "latent_dim=1"), (["--objectives", "accuracy=best"], "best"), (["--objectives", "x=minimize"], "metric 'x'")])
def test_bad_flags(folder, tmp_path, capsys, extra, word):
    assert main(["epsilon", "--checkpoint-dir", str(folder), "--save-dir", str(tmp_path), "--epochs", "2", "--quiet", *extra]) == 2
    assert word in capsys.readouterr().err and not (tmp_path / "report.html").exists()


def test_an_empty_and_a_missing_folder(tmp_path, capsys):
    for folder, word in ((tmp_path, "nothing in"), (tmp_path / "no", "there is no folder")):
        assert main(["epsilon", "--checkpoint-dir", str(folder), "--save-dir", str(tmp_path / "out")]) == 2
        assert word in capsys.readouterr().err


def test_a_folder_of_strangers_files(tmp_path, capsys):
    for run in "ab":
        (tmp_path / "in" / run).mkdir(parents=True)
        for step in range(3):
            torch.save({"state_dict": nn.Linear(3, 2).state_dict()}, tmp_path / "in" / run / f"step{step}.pt")
            (tmp_path / "in" / run / f"step{step}.json").write_text(json.dumps(dict(loss=1 / (1 + step))))
    (tmp_path / "in" / "b" / "step9.pt").write_bytes(b"no archive")
    assert main(["epsilon", "--checkpoint-dir", str(tmp_path / "in"), "--save-dir", str(tmp_path / "out"), "--epochs", "2", "--latent-dim", "2", "--quiet"]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "6 checkpoints" in page and "step9.pt" in page


def test_names_are_escaped_in_the_report(folder, tmp_path):
    source, store = Store(folder), Store(tmp_path / "s")
    for c in source.checkpoints():
        store.save(c.run, c.step, source.load(c.run, c.step), {"<script>alert(1)</script>": c.metrics["loss"], **c.metrics}, c.recipe)
    make_report(tmp_path / "s", tmp_path / "out", SMALL, "<script>alert(1)</script>=minimize,accuracy=maximize", progress=False)
    assert "<script" not in (tmp_path / "out" / "report.html").read_text()


def test_the_panel_measures_after_a_rest_and_saves_what_it_measured(atlas, tmp_path):
    async def drive():
        panel = AtlasPanel(atlas, tmp_path)
        for x in (0.0, 0.1, 0.2):
            panel.choose(x, 0.0)
            assert panel.verified is None and "–" in panel.numbers.value
        await asyncio.sleep(0.6)
        return panel

    panel = asyncio.run(drive())
    assert panel.verified is not None
    panel.save()
    kept = panel.store.checkpoints("mine")
    assert [c.step for c in kept] == [0] and kept[0].metrics == panel.verified.measured
    panel.run.value = "../x"
    panel.save()
    assert "not allowed" in panel.status.value and len(panel.store.checkpoints()) == 1


def test_the_slider_needs_two_marks_and_follows_them(atlas, tmp_path):
    panel = AtlasPanel(atlas, tmp_path)
    assert panel.t.disabled
    for letter, i in (("A", 0), ("B", 7)):
        panel.map.point = panel.frame.to_pixels(atlas.flat[i]).tolist()
        panel.mark(letter)
    assert not panel.t.disabled
    panel.t.value = 1.0
    assert state_digest(panel.state) == state_digest(atlas.state(panel.marked["B"]))
    panel.t.value = 0.5
    found = panel.measure()
    assert found.origin["t"] == 0.5 and [x["run"] for x in found.origin["between"]] == [atlas.rows[panel.marked[k]].run for k in "AB"]


def test_a_click_into_the_landscape_is_a_verified_checkpoint(folder, tmp_path):
    p = populations(folder)[0]
    panel = LandscapePanel(run_plane(p, p.runs[0]), p.evaluator(), tmp_path, p.rows[0].recipe, n=7)
    assert not panel.slice.done.all()
    while panel.advance():
        pass
    panel.draw()
    assert panel.slice.done.all() and "measured;" not in panel.progress.value
    panel.map.point = panel.frame.to_pixels((0.3, -0.2)).tolist()
    panel.save()
    kept = panel.store.load("mine")
    assert kept["origin"]["place"] == pytest.approx([0.3, -0.2]) and kept["verified"]["measured"] == panel.verified.measured
    assert state_digest(kept["model"]) == state_digest(panel.plane.point(*kept["origin"]["place"]))


def test_the_landscape_goes_on_in_the_event_loop(folder, tmp_path):
    p = populations(folder)[0]

    async def drive():
        panel = LandscapePanel(random_plane(p.state(0)), p.evaluator(), tmp_path, n=9)
        await asyncio.wait_for(panel.follow(), 60)
        return panel

    assert asyncio.run(drive()).slice.done.all()


# --- what a stranger found


def own_zoo(folder, build, runs=4, dtype=torch.float32, steps=3, classes=4):
    "Runs of a small model on random questions, without recipes; and what measures them."
    g = torch.Generator().manual_seed(0)
    X, W = torch.randn(300, 6, generator=g), torch.randn(6, classes, generator=g)
    y, store = (X @ W).argmax(1), Store(folder)
    judge = Evaluator(build, X[:80], {"test": (X[200:], y[200:])})
    for run in range(runs):
        torch.manual_seed(run)
        net = build()
        optimizer = torch.optim.Adam(net.parameters(), 0.02)
        for step in range(steps):
            for _ in range(15):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(X[:200]), y[:200]).backward()
                optimizer.step()
            state = {n: t.to(dtype) if t.is_floating_point() else t.clone() for n, t in net.eval().state_dict().items()}
            store.save(f"r{run}", step, state, judge.metrics(state))
            net.train()
    return judge


def plain():
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 4))


def test_a_checkpoint_with_normalisation_is_measured_as_it_is(tmp_path):
    judge = own_zoo(tmp_path, lambda: nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4)))
    atlas = chart(tmp_path, SMALL, [judge], progress=False)
    panel = AtlasPanel(atlas, tmp_path / "kept")
    for i in (0, 4, 11):
        v = atlas.point(atlas.z[i])
        assert state_digest(v.state) == state_digest(atlas.state(i)) and v.measured == judge.metrics(atlas.state(i))
        panel.choose(*atlas.flat[i])
        assert panel.measure().measured == v.measured


def test_one_architecture_on_two_questions_is_two_populations(tmp_path):
    for file, column in (("a", 0), ("b", 1)):
        X = np.random.default_rng(0).normal(size=(60, 4)).astype("float32")
        np.savez(tmp_path / f"{file}.npz", X=X, y=(X[:, column] > 0).astype(int))
        recipe = Recipe("table", "mlp", "adam", {"data.path": str(tmp_path / f"{file}.npz"), "model.hidden": 4, "run.steps": 20})
        Run(recipe).advance().save(Store(tmp_path / "s"), file)
    found = populations(tmp_path / "s")
    assert len(found) == 2 and found[0].layout.signature == found[1].layout.signature


def test_a_diverged_checkpoint_is_left_out_and_told(folder, tmp_path):
    source, store = Store(folder), Store(tmp_path / "s")
    for c in source.checkpoints():
        store.save(c.run, c.step, source.load(c.run, c.step), c.metrics, c.recipe)
    bad = source.load(c.run, c.step)
    bad["model"]["1.bias"][0] = float("nan")
    store.save(c.run, 10**6, bad, None, c.recipe)
    report = make_report(tmp_path / "s", tmp_path / "out", SMALL, progress=False)
    assert len(report.atlas) == 24 and "its training diverged" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_states_of_every_type_keep_it(tmp_path, dtype):
    judge = own_zoo(tmp_path, plain, dtype=dtype)
    atlas = chart(tmp_path, SMALL, [judge], progress=False)
    for state, _ in (atlas.between(2, 8, 0.5), atlas.decode(atlas.z[2] + 0.1)):
        assert {t.dtype for t in state.values()} == {dtype} and np.isfinite(judge.metrics(state)["loss"])


def test_a_model_that_is_no_sequence_has_ways_by_behaviour(tmp_path):
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 12), nn.Linear(12, 4)

        def forward(self, x):
            return self.b(torch.relu(self.a(x)))

    judge = own_zoo(tmp_path, Own)
    atlas = chart(tmp_path, SMALL, [judge], progress=False)
    assert judge.metrics(atlas.between(2, 8, 0.5)[0])["accuracy"] > 0.5
    assert state_digest(atlas.between(2, 8, 1)[0]) == state_digest(atlas.state(8))


def test_two_runs_make_a_map_without_predictions(tmp_path):
    atlas = chart(tmp_path, SMALL, [own_zoo(tmp_path, plain, runs=2)], progress=False)
    assert atlas.predict(atlas.state(0)) == {} and atlas.point(atlas.z[0]).measured


def test_outputs_that_are_no_scores_and_too_few_evaluators(tmp_path):
    judge = own_zoo(tmp_path, plain)
    squeezed = Evaluator(lambda: nn.Sequential(*plain(), nn.Flatten(0)), judge.probes, judge.tests)
    with pytest.raises(ValueError, match="scores of shape"):
        chart(tmp_path, SMALL, [squeezed], progress=False)
    with pytest.raises(ValueError, match="2 evaluators for 1 populations"):
        chart(tmp_path, SMALL, [judge, judge], progress=False)
    with pytest.raises(ValueError, match="no probes"):
        chart(tmp_path, SMALL, [Evaluator(plain, judge.probes[:0], judge.tests)], progress=False)


def test_far_places_are_flagged_and_far_latents_refused_with_their_distance(tmp_path):
    atlas = chart(tmp_path, SMALL, [own_zoo(tmp_path, plain)], progress=False)
    panel = AtlasPanel(atlas, tmp_path / "kept")
    panel.choose(1e6, 1e6)
    assert "far from every checkpoint" in panel.about
    try:
        assert atlas.point(torch.full((4,), 1e4)).origin["distance"] > 100
    except Refused as e:
        assert "far from every checkpoint" in str(e)
    with pytest.raises(ValueError, match="finite numbers are wanted"):
        atlas.point(torch.zeros(5))


def test_directions_of_objectives(atlas):
    assert [direction_of(n) for n in ("kl", "recon", "val_mse", "f1", "top5 accuracy", "energy")] == ["minimize"] * 3 + ["maximize"] * 2 + [None]
    with pytest.raises(ValueError, match="twice"):
        objectives_of(atlas, "accuracy=maximize,accuracy=minimize")


def test_a_pipe_in_the_folder_does_not_hang(tmp_path):
    (tmp_path / "in").mkdir()
    os.mkfifo(tmp_path / "in" / "a.pt")
    assert "no regular file" in import_folder(tmp_path / "in", Store(tmp_path / "s")).refused["a.pt"]


def test_the_command_takes_an_evaluator(tmp_path, monkeypatch):
    judge = own_zoo(tmp_path / "s", plain)
    module = types.ModuleType("my_evaluators")
    module.mine = lambda population: judge
    monkeypatch.setitem(sys.modules, "my_evaluators", module)
    assert main(["epsilon", "--checkpoint-dir", str(tmp_path / "s"), "--save-dir", str(tmp_path / "out"), "--epochs", "2", "--latent-dim", "3", "--quiet", "--evaluator", "my_evaluators:mine"]) == 0
    assert "New points" in (tmp_path / "out" / "report.html").read_text()
