"Branches, presets, the film, the bench and the report, without a browser."
import json
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from adaptive_lab.branches import Branches, sessions_from_dict
from adaptive_lab.cli import main, recipe_from_flags
from adaptive_lab.durable import StoreError
from adaptive_lab.film import Frame, added, page
from adaptive_lab.panels.controller import ControllerPanel
from adaptive_lab.panels.training import PANELS, TrainingPanel
from adaptive_lab.panels.workbench import Workbench
from adaptive_lab.presets import PRESETS, Saved, preset
from adaptive_lab.run import Run, replay, weights_digest
from adaptive_lab.store import Store
from adaptive_lab.tape import Recipe, RecipeError, recipe_code, recipe_command
from adaptive_lab.tensorfile import save_state

KNOBS = {"run.steps": 120, "run.eval_every": 20, "run.threads": 1, "data.steps_per_task": 30, "optimizer.warmup_steps": 10}
EVIL = "<img src=x onerror=alert(1)></script><script>alert(1)</script>"


def tasks(mechanisms=(), **more):
    return Recipe("split_digits", "mlp", "plasticity", KNOBS | more, mechanisms)


@pytest.fixture
def bench(tmp_path):
    return Workbench(tasks(), tmp_path / "bench", pace=None, start=False)


# --- branches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mechanisms", [(), ("rate",), ("values",)], ids=["", "rate", "values"])
def test_every_branch_of_branches_replays_to_the_last_bit(tmp_path, mechanisms):
    tree = Branches(Store(tmp_path))
    run = Run(tasks(mechanisms))
    tree.begin(run)
    for step in tree.kept(run, every=10):
        if run.index % 17 == 0:
            run.change({"optimizer.plasticity_k": float(run.index % 7), "optimizer.lr": 0.001 + run.index / 1e5})
    for name, at in (("main", 41), ("main-2", 77), ("main", 0), ("main-3", 90)):
        other = tree.branch(name, at)
        assert other.index == at and list(other.losses) == tree.seen(name)["losses"][:at]
        other.change({"optimizer.coincidence": float(at)})
        for _ in tree.kept(other, every=10):
            pass
    assert list(tree.parents) == ["main", "main-2", "main-3", "main-4", "main-5"] and tree.parents["main-3"] == ("main-2", 77)
    for name, s in sessions_from_dict(json.loads(json.dumps(tree.to_dict()))).items():
        assert replay(s.recipe, s.tape, s.until).session().weights == s.weights, name
    again = Branches(Store(tmp_path))  # by another process
    assert weights_digest(again.at("main-3", 100).model) == weights_digest(tree.at("main-3", 100).model)


def test_a_damaged_checkpoint_is_passed_over_and_none_is_told(tmp_path):
    tree = Branches(Store(tmp_path))
    run = Run(tasks())
    tree.begin(run)
    for until in (40, 80, 120):
        tree.save(run.advance(until))
    weights = weights_digest(tree.at("main", 100).model)
    records = {c.step: c for c in tree.store.checkpoints("main")}
    for step in (80, 40, 0):
        path = tree.store._object(records[step].hash)
        path.write_bytes(path.read_bytes()[:-5])
        if step:
            assert weights_digest(tree.at("main", 100).model) == weights
    with pytest.raises(StoreError, match="before step 100 is whole"):
        tree.at("main", 100)
    for wrong in (-1, 121):
        with pytest.raises(ValueError, match="is not allowed"):
            tree.at("main", wrong)


def test_a_broken_tree_says_so_and_names_are_not_taken_twice(tmp_path):
    tree = Branches(Store(tmp_path))
    tree.store.save("main", 3, {"x": torch.zeros(1)})  # a run of somebody else
    assert tree.begin(Run(tasks())) == "main-2"
    tree.path.write_text('{"main-2": 5}')
    with pytest.raises(StoreError, match="cannot be read"):
        tree.parents


def test_a_file_of_branches_replays_by_the_command_and_damage_is_named(tmp_path, capsys):
    tree = Branches(Store(tmp_path / "runs"))
    run = Run(tasks())
    tree.begin(run)
    tree.save(run.advance(20))
    tree.save(tree.branch("main", 10).advance(30))
    (tmp_path / "b.json").write_text(json.dumps(tree.to_dict()))
    assert main(["replay", str(tmp_path / "b.json"), "--store", str(tmp_path / "again")]) == 0
    out = capsys.readouterr().out
    assert out.count("identical") == 2 and "branch main-2  step 30" in out and len(Store(tmp_path / "again").checkpoints("replay-main-2")) == 1
    wrong = tree.to_dict()
    wrong["branches"]["main"]["session"]["weights"] = "0" * 64
    (tmp_path / "b.json").write_text(json.dumps(wrong))
    assert main(["replay", str(tmp_path / "b.json")]) == 1
    for damage in ({"format": 1, "branches": 3}, {"format": 99, "branches": {}}, {"format": 1, "branches": {"a": {}}}):
        (tmp_path / "b.json").write_text(json.dumps(damage))
        assert main(["replay", str(tmp_path / "b.json")]) == 2 and "b.json" in capsys.readouterr().err


def test_a_damaged_branch_is_named(tmp_path):
    tree = Branches(Store(tmp_path))
    tree.begin(Run(tasks()))
    record = tree.to_dict()
    record["branches"]["main"]["session"]["recipe"]["knobs"]["run.steps"] = -1
    with pytest.raises(RecipeError, match="branch 'main': steps=-1"):
        sessions_from_dict(record)


def test_two_processes_do_not_lose_each_others_branches(tmp_path):
    trees = [Branches(Store(tmp_path)) for _ in range(4)]
    run = Run(tasks())
    with ThreadPoolExecutor(4) as pool:
        names = list(pool.map(lambda tree: [tree.begin(run) for _ in range(5)], trees))
    assert set(sum(names, [])) == set(trees[0].parents) and len(trees[0].parents) == 20


def test_checkpoints_of_a_long_run_are_farther_apart(tmp_path, monkeypatch):
    monkeypatch.setattr("adaptive_lab.branches.SHARE", 1e9)  # as if they cost nothing
    tree = Branches(Store(tmp_path))
    run = Run(tasks(**{"run.steps": 600, "data.steps_per_task": 120}))
    tree.begin(run)
    for _ in tree.kept(run, every=1):
        tree.written()
    steps = tree.steps("main")
    assert all(b - a <= max(1, b // 50) for a, b in zip(steps, steps[1:])) and 100 < len(steps) < 250


def test_a_run_whose_folder_is_deleted_goes_on_and_says_so(tmp_path):
    tree = Branches(Store(tmp_path / "runs"))
    run = Run(tasks())
    tree.begin(run)
    shutil.rmtree(tmp_path / "runs")
    for _ in tree.kept(run, every=10):
        pass
    assert run.index == 120 and "branch 'main' is gone" in tree.trouble and not (tmp_path / "runs").exists()
    with pytest.raises(StoreError, match="is gone"):
        tree.save(run)
    assert tree.begin(run) == "main" and tree.steps("main") == [120]
    tree.save_beside(run)
    tree.written()
    assert tree.trouble == ""


# --- presets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_composition_is_three_lines_and_a_command(name):
    recipe = preset(name)
    assert recipe_from_flags(shlex.split(recipe_command(recipe))[2:])[1] == recipe
    assert recipe_from_flags(["--preset", name])[1] == recipe
    found = {}
    exec(recipe_code(recipe).replace(".advance()", ""), found)
    assert found["run"].recipe == recipe


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_and_its_mechanisms_too(name):
    run = Run(preset(name)).advance(2)
    assert run.index == 2 and all(m in run.optimizer.mechanisms for m in run.recipe.mechanisms)


def test_a_saved_preset_is_a_recipe_and_nothing_else(tmp_path):
    saved = Saved(tmp_path / "p")
    for bad in ("", "../x", "a/b", "x" * 70, " a", "a.", EVIL):
        with pytest.raises(RecipeError, match="is not allowed"):
            saved.save(bad, tasks())
    assert not (tmp_path / "p").exists()
    saved.save("Übung 1", tasks())
    assert saved.load("Übung 1") == tasks() and saved.names() == ["Übung 1"]
    (tmp_path / "p/broken.json").write_text('{"format": 1}')
    with pytest.raises(RecipeError, match="broken.json"):
        saved.load("broken")


# --- the film ----------------------------------------------------------------------------------------


def test_a_film_stays_even_and_ends_with_the_newest():
    frames = []
    for step in (*range(0, 3000, 7), 5, 2993):
        frames, _ = added(frames, Frame(step, "", []), 20)
    steps = [f.step for f in frames]
    gaps = [b - a for a, b in zip(steps, steps[1:])]
    assert len(frames) == 20 and steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 2996 - 2996 % 7 and max(gaps) < 4 * sorted(gaps)[10]


def test_a_page_holds_hostile_text_as_text():
    html = page(EVIL, [Frame(1, EVIL, ["<svg/>"])], EVIL)
    assert html.count("<script") == 2 and "onerror=alert(1)>" not in html.replace("\\u003c", "<SAFE>").replace("<SAFE>img src=x onerror=alert(1)>", "") and "default-src 'none'" in html


# --- the bench ---------------------------------------------------------------------------------------


def test_thirty_changes_and_two_branches_replay_from_the_saved_file(bench):
    for i in range(22):
        bench.panel.run.advance(2 * i + 2)
        bench.panel.controls["optimizer.plasticity_k"].value = 1.0 + i / 4
    bench._save(), bench._record(), bench.travel.refresh()
    bench.travel.step.value = 30
    bench.travel.leave()
    assert bench.tree.current == "split_digits-2" and bench.panel.run.index == 30
    for i in range(22):
        bench.panel.run.advance(33 + 2 * i)
        bench.panel.controls["optimizer.lr"].value = -3.0 + i / 20
    bench.panel.run.advance()
    bench.save_branches()
    sessions = sessions_from_dict(json.loads((bench.folder / "run.json").read_text()))
    assert sum(len(s.tape) for s in sessions.values()) >= 30 and len(sessions) == 2
    assert main(["replay", str(bench.folder / "run.json")]) == 0


def test_another_composition_leaves_no_widgets_and_no_panel_behind(bench):
    import ipywidgets as w

    many = lambda: len(w.Widget._instances if hasattr(w.Widget, "_instances") else w.widgets.widget._instances)
    bench.put(Run(tasks()))
    before, panels = many(), len(PANELS)
    for _ in range(3):
        bench.put(Run(tasks()))
    assert many() <= before + 3 and len(PANELS) <= panels


def test_a_composition_that_cannot_run_leaves_what_runs(bench):
    panel = bench.panel
    bench.compose.around["heads"].value = True
    bench.compose.build()
    assert bench.panel is panel and "needs an AdaptiveTransformer" in bench.compose.message.value and len(bench.tree.parents) == 1
    bench.compose.choose("heads")
    bench.compose.build()
    assert isinstance(bench.panel, ControllerPanel) and bench.compose.message.value == "" and bench.panel.run.recipe == preset("heads")


def test_knobs_undo_redo_and_go_home(bench):
    panel = bench.panel
    panel.run.advance(3)
    k, lr = panel.controls["optimizer.plasticity_k"], panel.controls["optimizer.lr"]
    k.value, k.value = 6.0, 7.0  # one turn: the hand went on
    lr.value = -2.0
    panel.undo_turn()
    assert panel.live.settings()["optimizer.lr"] == pytest.approx(0.001) and k.value == 7.0
    panel.undo_turn()
    assert k.value == 5.0
    panel.undo_turn()
    assert "left to undo" in panel.status.value
    panel.redo_turn()
    assert k.value == 7.0
    panel.redo_turn()
    panel.run.advance(5)
    panel.defaults()
    panel.run.advance(6)
    assert all(panel.live.settings()[a] == panel.run.recipe[a] for a, d in panel.declared.items() if d.live)
    panel.undo_turn()
    assert panel.live.settings() != {a: panel.run.recipe[a] for a in panel.live.settings()}
    assert replay(panel.run.recipe, panel.run.tape, panel.run.index).session().weights == panel.run.session().weights


def test_turns_and_gates_are_undone_apart(tmp_path):
    panel = Workbench("heads", tmp_path, pace=None, start=False).panel
    panel.controls["optimizer.lr"].value = 0.01
    panel.buttons["Undo gates"].click()
    assert panel.live.settings()["optimizer.lr"] == pytest.approx(0.01)
    panel.buttons["Undo"].click()
    assert panel.live.settings()["optimizer.lr"] == pytest.approx(0.002)


def test_a_reset_leaves_a_ghost(bench):
    panel = bench.panel
    panel.run.advance(60)
    plain = TrainingPanel(tasks())
    panel.reset()
    panel.run.advance(30)
    panel.draw()
    assert 'stroke-opacity=".35"/>' in panel.loss.svg.replace('stroke-opacity=".35"/><text', "") and panel.live.ghost[0]
    plain.run.advance(30)
    plain.draw()
    assert len(plain.accuracy.svg) < len(panel.accuracy.svg)


def test_what_is_typed_is_text_and_files_of_others_are_safe(bench):
    (bench.folder / "mine.html").write_text("precious")
    for name, said in (("mine.html", "did not write it"), ("a.exe", "must end in .html"), ("nowhere/up.html", "there is no folder")):
        bench.file.value = name
        bench._guarded(bench.save_page)
        assert said in bench.shared.value
    assert (bench.folder / "mine.html").read_text() == "precious"
    bench.tell(EVIL), bench.travel.tell(EVIL)
    assert "<script" not in bench.message.value + bench.travel.message.value


def test_a_checkpoint_that_cannot_be_written_is_told(bench, monkeypatch):
    bench.panel.run.advance(10)
    monkeypatch.setattr(Store, "save", lambda *a, **k: (_ for _ in ()).throw(StoreError("the disk is full")))
    bench._save()
    assert "no checkpoint: the disk is full" in bench.message.value
    assert bench.panel.run.advance(12).index == 12


def test_a_composition_by_hand_is_no_preset_and_begins_with_its_seed(bench, tmp_path):
    bench.compose.choose("tasks")
    assert bench.compose.presets.value == "tasks" and bench.compose.about.value
    bench.compose.menus["optimizer"].value = "sgd"
    assert bench.compose.presets.value == "–" and not bench.compose.about.value and "'sgd'" in bench.compose.code.value.replace("&#x27;", "'")
    bench.compose.choose("tasks")
    assert bench.compose.menus["optimizer"].value == "plasticity"
    path = tmp_path / "w.safetensors"
    save_state(path, bench.panel.run.model.state_dict())
    bench.put(Run(tasks(**{"run.weights": str(path)})))
    assert bench.recipe()["run.weights"] and not bench.compose.recipe["run.weights"]
    assert bench.recipe().but([])["run.weights"] and not bench.recipe().but(model="cnn")["run.weights"]


def test_branches_are_saved_though_their_folder_is_gone(bench):
    bench.panel.run.advance(10)
    shutil.rmtree(bench.tree.store.folder)
    bench.save_branches()
    assert main(["replay", str(bench.folder / "run.json")]) == 0
    bench.file.value = ""
    bench.save_branches()
    assert "is not allowed" in bench.shared.value


# --- the report --------------------------------------------------------------------------------------


def test_the_report_is_a_page_and_its_flags_are_checked_before_anything_runs(tmp_path, capsys):
    flags = ["report", "--data", "noisy_digits", "--model", "mlp", "--optimizer", "adam", "--mechanisms", "values", "--run.steps", "40", "--title", EVIL]
    assert main([*flags, "--out", str(tmp_path / "r.html"), "--frames", "3", "--quiet"]) == 0 and not capsys.readouterr().err
    html = (tmp_path / "r.html").read_text()
    assert html.count("<script") == 2 and "replay(recipe" in html and len(html) < 300_000
    for wrong, said in ((["--out", str(tmp_path / "no/r.html")], "in a folder that exists"), (["--out", str(tmp_path / "s.html"), "--frames", "1"], "2 to 1000"),
                        (["--out", str(tmp_path / "r.html")], "--overwrite")):
        assert main([*flags, *wrong]) == 2 and said in capsys.readouterr().err


# --- the map -----------------------------------------------------------------------------------------


def two_branches(bench, **turned):
    "Main to its end, and a branch that left it half-way."
    bench.tree.save(bench.panel.run.advance(60))
    bench.tree.save(bench.panel.run.advance())
    run = bench.tree.at(bench.tree.current, 60)
    run.change(turned or {"optimizer.lr": 0.01})
    bench.put(run, (bench.tree.current, 60))
    bench.tree.save(bench.panel.run.advance())


def marked(map_):
    "The ends of the two branches, as A and B."
    panel = map_.panel
    for letter, i in zip("AB", panel.atlas.populations[0].last()):
        panel.map.point = panel.frame.to_pixels(panel.atlas.flat[int(i)]).tolist()
        panel.mark(letter)
    return panel


def test_a_run_goes_on_from_between_two_branches_and_replays_from_elsewhere(bench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench.folder = bench.map.folder.parent
    two_branches(bench)
    bench.map.folder = bench.map.folder.relative_to(tmp_path)  # as in a notebook, whose folder is where the kernel is
    bench.map.chart()
    assert "2 branches" in bench.map.message.value
    panel = marked(bench.map)
    panel.slide(0.5)
    panel.train_on()
    assert bench.tree.current == "decoded" and bench.panel.run.begun_with == panel.verified.weights and bench.panel.run.index == 0
    bench.panel.run.advance(40)
    bench.save_branches()
    monkeypatch.chdir("/")
    assert main(["replay", str(tmp_path / "bench/run.json")]) == 0


def test_a_map_needs_two_branches_and_says_so(bench):
    bench.map.chart()
    assert "a map needs two branches" in bench.map.message.value and not bench.map.draw.disabled and bench.map.panel is None


def test_between_transformers_is_a_straight_line_where_their_shapes_are_one(tmp_path):
    sizes = {"model.num_layers": 2, "model.num_heads": 2, "model.dim": 16, "run.steps": 20, "run.threads": 1, "run.eval_every": 20, "data.limit": 20_000}
    bench = Workbench(Recipe("dialect", "adaptive_transformer", "adam", sizes), tmp_path / "bench", pace=None, start=False)
    bench.tree.save(bench.panel.run.advance())
    for change in ({"optimizer.lr": 0.02}, {"model.edit": "-0.1"}):
        run = Run(bench.recipe())
        run.change(change)
        bench.put(run)
        bench.tree.save(bench.panel.run.advance())
    bench.map.chart()
    atlas = bench.map.panel.atlas
    ends = {atlas.rows[i].run: i for i in range(len(atlas)) if atlas.rows[i].step == 20}
    a, b, pruned = (ends[n] for n in ("dialect", "dialect-2", "dialect-3"))
    middle, _ = atlas.between(a, b, 0.5)
    assert torch.allclose(middle["bytes.weight"], (atlas.state(a)["bytes.weight"] + atlas.state(b)["bytes.weight"]) / 2)
    with pytest.raises(ValueError, match="other heads or sizes"):
        atlas.between(a, pruned, 0.5)
    k, _ = atlas.at(pruned)
    assert set(atlas.evaluators[k].metrics(atlas.state(pruned))) == {"accuracy", "loss"}
    bench.map.panel.marked = {"A": a, "B": b}
    bench.map.panel.slide(0.5)
    assert "bits per byte" in bench.map.panel.samples.svg


# --- what was found by those who tried ----------------------------------------------------------------


def test_a_reset_begins_a_branch_of_its_own(bench):
    bench.panel.run.advance(50)
    bench.panel.controls["run.seed"].value = 7
    bench.panel.reset()
    assert list(bench.tree.parents) == ["split_digits", "split_digits-2"] and bench.tree.current == "split_digits-2" and bench.panel.run.recipe["run.seed"] == 7
    bench.panel.run.advance(20)
    bench._save()
    assert bench.tree.steps("split_digits") == [0, 50] and bench.tree.steps("split_digits-2") == [0, 20]
    assert bench.tree.session("split_digits").recipe["run.seed"] == 0 and bench.tree.session("split_digits-2").weights == bench.panel.run.session().weights


def test_a_branch_that_cannot_be_saved_is_none(bench, monkeypatch):
    bench.panel.run.advance(10)
    before, panel = bench.tree.parents, bench.panel

    def full(*args, **more):
        raise StoreError("the disk is full")

    monkeypatch.setattr(Store, "save", full)
    bench.compose.choose("labels")
    bench.compose.build()
    assert "the disk is full" in bench.compose.message.value and bench.tree.parents == before and bench.tree.current == "split_digits" and bench.panel is panel


def test_weights_that_are_not_finite_are_refused_before_anything_is_built(bench, tmp_path):
    state = {n: t.fill_(float("nan")) for n, t in Run(tasks()).model.state_dict().items()}
    save_state(tmp_path / "nan.safetensors", state)
    with pytest.raises(RecipeError, match="not finite"):
        Run(tasks(**{"run.weights": str(tmp_path / "nan.safetensors")}))


def test_the_end_of_a_run_is_no_place_to_leave_it(bench):
    bench.panel.run.advance()
    bench._save(), bench.travel.refresh()
    bench.travel.step.value = 120
    bench.travel.leave()
    assert "is the end of this run" in bench.travel.message.value and len(bench.tree.parents) == 1


def test_a_replay_goes_on_after_a_branch_that_cannot_be(bench, tmp_path, capsys):
    bench.panel.run.advance(10)
    bench.save_branches()
    record = json.loads((bench.folder / "run.json").read_text())
    lost = json.loads(json.dumps(record["branches"]["split_digits"]))
    lost["session"]["recipe"]["knobs"]["run.weights"] = "gone.safetensors"
    record["branches"] = {"lost": lost} | record["branches"]
    (tmp_path / "both.json").write_text(json.dumps(record))
    assert main(["replay", str(tmp_path / "both.json")]) == 2
    said = capsys.readouterr()
    assert "branch lost cannot be replayed" in said.err and "identical to the recorded weights" in said.out
    (tmp_path / "none.json").write_text(json.dumps(record | {"branches": {}}))
    assert main(["replay", str(tmp_path / "none.json")]) == 2


def test_the_command_line_says_which_combination_makes_no_sense(capsys):
    assert main(["train", "--data", "digits", "--optimizer", "adam", "--mechanisms", "heads", "--run.steps", "5"]) == 2
    assert "needs an AdaptiveTransformer" in capsys.readouterr().err
