"The controller's panel without a page: edits, undo, a controller that acts meanwhile, what is measured and written."
import asyncio
import random
import re
import threading
from types import SimpleNamespace
from xml.etree.ElementTree import fromstring

import pytest
import torch

from adaptive_lab import gatewatch
from adaptive_lab.controller.edits import after, edit, edit_between, gates_of
from adaptive_lab.controller.model import AdaptiveTransformer
from adaptive_lab.gatepictures import Mark, front_picture, gate_picture, timeline
from adaptive_lab.gatewatch import SHARES, Watch
from adaptive_lab.knobs import KnobError, Knobs, knob
from adaptive_lab.live import Live
from adaptive_lab.panels import gateviews
from adaptive_lab.panels.controller import ControllerPanel, _gates_now, opened, pruned, regrown
from adaptive_lab.panels.gategrid import rows_of
from adaptive_lab.panels.training import TrainingPanel
from adaptive_lab.parts import part
from adaptive_lab.run import Run, replay
from adaptive_lab.tape import Recipe

KNOBS = {"run.steps": 400, "run.threads": 1, "run.eval_every": 10_000, "data.limit": 50_000, "data.context": 16, "data.batch_size": 4, "data.validation_windows": 16,
         "model.num_layers": 2, "model.dim": 16}


class Decision(SimpleNamespace):
    step, kind, changes, reward, loss, kept = 10, "prune", ((0, 1, 0.0),), 0.02, 2.5, 7


class Thumbs(Knobs):
    "Adam, with a controller that hears thumbs."

    lr: float = knob(1e-3, "learning rate", ge=0, le=1, log=True)
    thumbs_up: int = knob(0, "how often a person approved", ge=0, le=10**6, span=(0, 10))
    thumbs_down: int = knob(0, "how often a person did not", ge=0, le=10**6, span=(0, 10))


@part("optimizer", "test_heard", Thumbs)
def heard(knobs, model):
    made = torch.optim.Adam(model.parameters(), knobs.lr)
    made.param_groups[0] |= dict(thumbs_up=0, thumbs_down=0)
    made.controller = SimpleNamespace(decisions=[Decision()], archive=SimpleNamespace(points=[(8, 2.5), (7, 2.5), (8, 2.7)], front=lambda: [(7, 2.5)]))
    return made


def recipe(optimizer="adam", **more):
    return Recipe("text", "adaptive_transformer", optimizer, {**KNOBS, **more})


def ask(panel, *asked, gesture=None):
    "As the page does: what is wanted, and one request more."
    panel.grid.gesture = panel.grid.gesture + 1 if gesture is None else gesture
    panel.grid.asked = [list(map(float, a)) for a in asked]
    panel.grid.turn += 1


def run(panel, n=5):
    "Some steps."
    panel.step(n)
    panel.live.wait()
    panel.draw()


# --- gates as data -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_an_edit_leads_from_any_gates_to_any_others_and_back(seed):
    rng, layers, heads = random.Random(seed), 2, 3
    model = AdaptiveTransformer(layers, heads, heads, 2, 2)
    adam = torch.optim.Adam(model.parameters())
    for _ in range(12):
        before = gates_of(model)
        words = []
        for _ in range(rng.randint(1, 4)):  # a random edit that can be carried out
            sign, name = rng.choice("=-+"), f"{rng.randrange(layers)}.{rng.choice([*range(heads), 'ffn', 'layer'])}"
            word = f"{name}={rng.choice([0, 0, 1, 0.3])}" if sign == "=" else sign + name
            try:
                wanted = after(before, " ".join([*words, word]))
            except ValueError:
                continue
            words.append(word)
        if not words:
            continue
        text = edit_between(before, wanted := after(before, " ".join(words)))
        edit(model, text, adam)
        assert gates_of(model) == wanted and edit_between(wanted, wanted) == ""
        edit(model, edit_between(wanted, before), adam)
        assert gates_of(model) == before
        edit(model, " ".join(words), adam)
        assert gates_of(model) == wanted  # what `after` forecast is what happens


def test_asking_after_the_gates_draws_no_random_numbers():
    gates = gates_of(AdaptiveTransformer(2, 2, 2, 2, 2))
    state = torch.get_rng_state()
    after(gates, "0.1=0 -0.0")
    assert torch.equal(torch.get_rng_state(), state)


# --- from the page to the run ------------------------------------------------------------------------


def test_of_edits_that_wait_the_run_carries_out_the_sum_and_replays():
    panel = ControllerPanel(recipe())
    run(panel)
    ask(panel, (0, 1, 0.5))
    ask(panel, (0, 1, 0))
    panel.buttons["Prune"].click()
    ask(panel, (0, 2, 0), (1, 4, 0.25))
    assert panel.grid.gates[0] == [1, None, 0, 1, 1, 1] and panel.grid.gates[1][4] == 0.25 and panel.grid.heard == panel.grid.turn
    assert panel.run.model.gate_heads.min() == 1  # nothing has happened yet
    run(panel)
    assert panel.live.state == "paused" and gates_of(panel.run.model)[0, 1] is None and gates_of(panel.run.model)[0, 2] == 0
    assert [c.step for c in panel.run.tape] == [5]
    done = panel.live.session()
    assert replay(done.recipe, done.tape, done.until).session().weights == done.weights


def test_a_drag_is_undone_as_one_and_clicks_one_by_one():
    panel = ControllerPanel(recipe())
    for value in (0.9, 0.6, 0.3):
        ask(panel, (1, 3, value), gesture=7)
    ask(panel, (1, 3, 0.0), gesture=8)
    ask(panel, (0, 5, 0.0), gesture=9)
    shown = lambda: (panel.grid.gates[1][3], panel.grid.gates[0][5])
    seen = [shown()]
    for _ in range(4):
        panel.undo()
        seen.append(shown())
    assert seen == [(0, 0), (0, 1), (0.3, 1), (1, 1), (1, 1)] and "nothing was changed here" in panel.status.value
    run(panel)
    assert set(gates_of(panel.run.model).values()) == {1.0}


def test_undo_takes_back_structure_and_leaves_what_a_controller_did_meanwhile():
    panel = ControllerPanel(recipe())
    before = panel.run.model.blocks[0].attention.qkv.shape
    ask(panel, (0, 1, 0))
    panel.buttons["Prune"].click()
    run(panel, 1)
    edit(panel.run.model, "1.2=0 -1.2", panel.run.optimizer)  # the controller
    panel.undo()
    panel.undo()
    run(panel, 1)
    gates = gates_of(panel.run.model)
    assert gates[0, 1] == 1 and gates[1, 2] is None and panel.run.model.blocks[0].attention.qkv.shape == before


def test_regrow_needs_a_removed_part_and_brings_it_back_closed():
    panel = ControllerPanel(recipe())
    panel.buttons["Regrow"].click()
    assert "choose a removed part" in panel.status.value
    panel.grid.chosen = [1, 0]
    panel.buttons["Regrow"].click()
    assert "is there: choose one" in panel.status.value and not panel.run.waiting
    panel.buttons["Prune"].click()
    assert "no gate is closed" in panel.status.value
    ask(panel, (1, 5, 0.0))
    panel.buttons["Prune"].click()
    run(panel, 1)
    assert panel.grid.gates[1] == [None] * 6
    panel.buttons["Regrow"].click()
    panel.buttons["Regrow all"].click()
    panel.buttons["Open all"].click()
    run(panel, 1)
    assert set(gates_of(panel.run.model).values()) == {1.0} and panel.live.error is None


def test_what_a_page_asks_while_a_step_is_under_way_is_gathered_and_carried_out_after_it():
    async def main():
        panel = ControllerPanel(recipe())
        go, begun = threading.Event(), threading.Event()
        rows = panel.run.data.train.batch
        def batch(*a):  # a step that takes as long as this test wants
            if panel.run.index == 2:
                begun.set()
                go.wait(20)
            return rows(*a)
        panel.run.data.train.batch = batch
        panel.live._length = 1.0  # long steps are made in the thread
        panel.step(4)
        await asyncio.to_thread(begun.wait, 20)
        for i in range(5):
            ask(panel, (0, 1, i / 10), (1, 0, 0.5))
        assert panel._sending and not panel.run.waiting
        edit(panel.run.model, "0.1=0 -0.1", panel.run.optimizer)  # a controller removes the head in that very step
        go.set()
        await panel.live.rest()
        await asyncio.sleep(0.05)
        said = panel.live.state, panel.status.value
        panel.step(1)
        await panel.live.rest()
        return panel, *said

    panel, state, said = asyncio.run(main())
    assert state == "paused" and "was removed" in said  # refused, since the head is gone, and the run goes on
    assert panel.live.error is None and panel.grid.heard == panel.grid.turn and panel.run.index == 5


def test_clicks_that_come_in_another_thread_are_carried_home():
    async def main():
        panel, seen = ControllerPanel(recipe()), []
        send = panel._send
        panel._send = lambda *a, **k: (seen.append(threading.get_ident()), send(*a, **k))
        await asyncio.to_thread(ask, panel, (0, 0, 0.25))
        await asyncio.sleep(0.05)
        assert seen == [threading.get_ident()] and panel.run.waiting == {"model.edit": "0.0=0.25"}

    asyncio.run(main())


@pytest.mark.parametrize("made", [ControllerPanel, TrainingPanel])
def test_a_bad_edit_is_told_and_the_run_goes_on(made):
    panel = made(recipe())
    for wrong in ("0.9=0.5", "0.1=7", "close it", "-5.0"):
        panel.controls["model.edit"].value = wrong
        assert "allowed" in panel.status.value or "not understood" in panel.status.value
        assert not panel.run.waiting
    panel.controls["model.edit"].value = "0.1=0.5"
    run(panel)
    assert panel.live.state == "paused" and gates_of(panel.run.model)[0, 1] == 0.5
    with pytest.raises(KnobError, match="0.9=0"):
        panel.live.change({"model.edit": "0.9=0"})


def test_a_reset_opens_everything_also_with_other_heads():
    panel = ControllerPanel(recipe())
    ask(panel, (0, 1, 0))
    panel.buttons["Prune"].click()
    run(panel)
    panel.grid.chosen = [1, 5]
    panel.controls["model.num_heads"].value = 2
    panel.reset()
    panel.draw()
    assert panel.run.index == 0 and panel.grid.gates == [[1.0] * 4] * 2 and panel.grid.chosen == [] and panel.watch.run is panel.run
    panel.undo()
    assert "nothing was changed here" in panel.status.value


# --- the controller ----------------------------------------------------------------------------------


def test_decisions_their_front_and_thumbs():
    panel = ControllerPanel(recipe("test_heard"))
    panel.run.optimizer
    panel.draw()
    assert "step 10: prune 0.1 → 0; reward +0.020" in panel.timeline.svg and "3 seen, 1 on the front" in panel.front.svg
    for name, n in (("Good", 2), ("Bad", 1)):
        assert not panel.thumbs[name].disabled
        for _ in range(n):
            panel.thumbs[name].click()
    run(panel, 1)
    group = panel.run.optimizer.param_groups[0]
    assert (group["thumbs_up"], group["thumbs_down"]) == (2, 1) and {c.knob for c in panel.run.tape} == {"optimizer.thumbs_up", "optimizer.thumbs_down"}
    ask(panel, (1, 1, 0))
    run(panel, 1)
    panel.draw()
    assert "1 prune, 1 hand" in panel.timeline.svg


def test_without_a_controller_thumbs_say_why_they_cannot_be_given():
    panel = ControllerPanel(recipe())
    assert all(b.disabled and "'adam' has no controller" in b.tooltip and "controlled_adam" in b.tooltip for b in panel.thumbs.values())
    with pytest.raises(ValueError, match="no gates to show"):
        ControllerPanel(Recipe("digits", "mlp", "adam"))


# --- what is measured and written --------------------------------------------------------------------


def drained(watch):
    "All pieces of work that a paused run leaves, in their order."
    found = []
    while watch.pause() is not None:
        found.append(watch.piece())
    return found


def test_a_waiting_edit_is_shown_as_it_will_be():
    live = Live(recipe())
    live.run.advance(20)
    watch = Watch(live)
    drained(watch)
    live.change({"model.edit": "0.0=0 0.1=0 -0.0"})
    did = drained(watch)
    shown = watch.losses[-1]
    assert did.count("speed") == gatewatch.PAIRS and watch.size.heads == (6, 6, 8) and watch.size.speed_up > 0
    assert set(gates_of(live.run.model).values()) == {1.0}
    edit(live.run.model, "0.0=0 0.1=0 -0.0")
    assert shown == (20, pytest.approx(gatewatch.loss_on(live.run.model, watch.x[: watch._windows], watch.y[: watch._windows]), abs=1e-6))


def test_costs_are_what_closing_costs():
    live = Live(recipe())
    live.run.advance(60)
    watch = Watch(live)
    drained(watch)
    n, own = gatewatch.ROUNDS, live.run.model
    x, y = watch.x[:n], watch.y[:n]
    before = gatewatch.loss_on(own, x, y)
    for p in ((0, "layer"), (1, "ffn"), (0, 2)):
        edit(own, f"{p[0]}.{p[1]}=0")
        assert watch.costs[p] == pytest.approx(gatewatch.loss_on(own, x, y) - before, rel=0.15, abs=0.02)
        edit(own, f"{p[0]}.{p[1]}=1")


def test_each_kind_of_work_waits_until_its_share_allows_more(monkeypatch):
    live = Live(recipe())
    watch, clock, used = Watch(live), [0.0], dict.fromkeys(SHARES, 0.0)
    cost = dict(loss=0.02, costs=0.02, text=0.004)
    monkeypatch.setattr(gatewatch.time, "process_time", lambda: clock[0])
    watch._windows = 4

    def act(what):
        def done(self, model):
            clock[0] += cost[what]
            used[what] += cost[what]
        return done

    monkeypatch.setattr(gatewatch, "ACTS", {what: act(what) for what in cost})
    live.state = "running"
    while clock[0] < 60:
        live.run.position = dict(step=live.run.index + 1)
        if not watch.piece():
            clock[0] += watch.pause() + 1e-4
    assert all(0.5 * SHARES[what] < used[what] / 60 < 1.1 * SHARES[what] for what in cost)


def test_watching_changes_no_bit_of_the_run():
    live, alone = Live(recipe(**{"model.dropout": 0.1})), Run(recipe(**{"model.dropout": 0.1}))
    watch = Watch(live)
    for until in range(3, 31, 3):
        live.run.advance(until)
        for _ in range(3):
            watch.piece()
    assert live.run.session().weights == alone.advance(30).session().weights


def test_what_the_model_writes_is_escaped(monkeypatch):
    panel = ControllerPanel(recipe())
    monkeypatch.setattr(gatewatch, "stream", lambda *a, **k: iter(b"<script>alert(1)</script>"))
    drained(panel.watch)
    panel._show_text()
    assert "&lt;script&gt;" in panel.text.value and "<script" not in panel.text.value


def test_weights_that_are_not_finite_end_the_company_with_a_message():
    async def main():
        panel = ControllerPanel(recipe())
        panel.run.model.logits.weight.data[:] = float("nan")
        panel._accompany()
        await asyncio.wait_for(panel._company, 20)
        assert "not finite" in panel.status.value
        panel.draw()
        assert all(fromstring(p.svg) is not None for p in (panel.loss, panel.timeline, panel.front))

    asyncio.run(main())


def test_texts_and_losses_come_while_it_trains_and_after_an_edit_in_a_pause():
    async def main():
        panel = ControllerPanel(recipe())
        panel.start()
        while not (panel.watch.passages and panel.watch.passages[0].text and panel.watch.losses):
            await asyncio.sleep(0.02)
        panel.pause()
        await panel.live.rest()
        await panel._company
        assert panel.watch.passages[-1].done and panel.watch.losses[-1][0] == panel.run.index
        ask(panel, (1, 5, 0.0))
        await panel._company
        assert panel.watch.size.heads[0] == 4 and panel.watch.passages[-1].heads == 4 and "4 of 8" in panel.facts.value
        assert f"step {panel.run.index}, 4 heads open" in panel.text.value

    asyncio.run(main())


def test_what_stays_in_the_file_shows_the_gates():
    panel = ControllerPanel(recipe())
    ask(panel, (0, 1, 0))
    panel.draw()
    shown = panel._pictures()
    assert len(shown) == 4 and "7 of 8 heads open" in shown[0] and all(fromstring(s).tag.endswith("svg") for s in shown)


def test_the_training_panel_shows_a_model_of_bytes_too():
    panel = TrainingPanel(recipe(**{"run.eval_every": 5}))
    run(panel, 10)
    panel.draw()
    assert "accuracy on held-out data" in panel.accuracy.svg and len(panel.run.evaluations) == 2
    panel._turned("model.edit", "-0.1")
    assert "-0.1 waits" in panel.status.value
    run(panel, 1)
    assert not panel.run.model.is_present(0, 1)


# --- pictures ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers, heads", [(1, 1), (12, 12), (48, 64)])
def test_a_grid_of_any_size_is_drawn_within_its_width(layers, heads):
    gates = gates_of(AdaptiveTransformer(layers, heads, heads, 1, 1)) | {(0, 0): None}
    svg = fromstring(gate_picture(gates, width=340))
    assert len(svg.findall(".//{*}rect")) >= layers * (heads + 2) and float(svg.get("width")) >= 340
    assert len(rows_of(gates)) == layers and {len(r) for r in rows_of(gates)} == {heads + 2}


def test_pictures_of_nothing_and_of_nonsense_are_pictures():
    nan = float("nan")
    for svg in (timeline([]), timeline([Mark(3, "what", nan, "<b>")], 1), front_picture([], []), front_picture([(1, nan), (2, 3.0)], [(2, 3.0)], (nan, nan), 4)):
        assert fromstring(svg).tag.endswith("svg") and "nan" not in svg.replace("loss nan", "").replace("now nan", "") and "<b>" not in svg


def test_the_front_by_hand_is_that_of_the_last_steps():
    live = Live(recipe())
    watch = Watch(live)
    watch.points = [(8, 1.0, 0), (8, 2.0, 900), (6, 2.1, 900), (7, 2.2, 900)]
    live.run.position = dict(step=900)
    assert "3 seen, 2 on the front; now 7 heads and loss 2.200" in gateviews.front_view(watch)
    assert pruned(opened({(0, 0): 0.4, (0, "ffn"): 1.0, (0, "layer"): 1.0}) | {(0, 0): 0.0})[0, 0] is None


def test_a_run_that_is_over_takes_no_gate():
    p = ControllerPanel(recipe(**{"run.steps": 3}))
    p.live.start()
    p.live.wait()
    ask(p, (0, 1, 0.25))
    assert not p.run.waiting and "Reset starts it anew" in p.status.value and gates_of(p.run.model)[0, 1] == 1.0
    assert p._shown[0, 1] == 1.0


def test_an_edit_that_was_taken_back_does_not_wait():
    p = ControllerPanel(recipe())
    ask(p, (0, 1, 0.25))
    assert "0.1=0.25 waits" in p.status.value
    p.buttons["Undo gates"].click()
    p.draw()
    assert "waits" not in p.status.value


def test_a_layer_comes_back_as_the_model_brings_it_back():
    m = AdaptiveTransformer(2, 2, 16, 16)
    edit(m, "0.layer=0")
    m.prune()
    then = regrown(gates_of(m), (0, "layer"))
    edit(m, edit_between(gates_of(m), then))
    assert gates_of(m) == then and then[0, "layer"] == 0 and then[0, 0] == 1


def test_a_thumb_for_an_optimizer_that_cannot_hear_is_said():
    p = ControllerPanel(recipe())
    p.thumbs["Good"].click()
    assert "controlled_adam" in p.status.value


def test_a_wish_stays_in_the_picture_while_the_step_that_took_it_is_under_way():
    panel = ControllerPanel(recipe())
    panel._show_gates()
    live, old = panel.live, panel.live.look(_gates_now)
    ask(panel, (0, 1, 0.25))
    live._in_thread = True  # a step that takes long has begun, and has taken the edit
    next(live._steps)
    live._probes[_gates_now] = (0, old)  # nobody could look since
    assert live.run.waiting == {}
    panel._show_gates()
    assert panel.grid.gates[0][1] == 0.25
    live._in_thread = False
    panel._show_gates()
    assert panel.grid.gates[0][1] == gates_of(live.run.model)[0, 1] == 0.25
    panel.live.reset({"model.edit": ""})
    panel.draw()
    assert panel.grid.gates[0][1] == 1 and panel._edit == (-1, "")


def test_a_thumb_for_nothing_is_said_and_does_not_count():
    panel = ControllerPanel(recipe("controlled_adam"))
    panel.thumb("thumbs_up")
    assert "no change of the controller stands" in panel.status.value and panel.live.settings()["optimizer.thumbs_up"] == 0


def test_a_thumb_does_not_press_rewards_flat():
    rewards = [Mark(1, "prune", 0.03, "a"), Mark(2, "regrow", -0.02, "b")]
    heights = lambda svg: [float(y) for y in re.findall(r"V([\d.]+)\"", svg)]
    alone, beside = heights(timeline(rewards)), heights(timeline([*rewards, Mark(3, "thumb", -1.0, "c")]))
    assert beside[:2] == alone and beside[2] > max(alone)


def test_before_the_first_step_the_pictures_show_what_was_measured():
    async def look():
        panel = ControllerPanel(recipe("controlled_adam"))
        panel.draw()
        assert "now" not in panel.front.svg  # nothing was measured yet
        panel._accompany()
        while not panel.watch.losses or "now" not in panel.front.svg:
            await asyncio.sleep(0.02)
        return panel

    panel = asyncio.run(asyncio.wait_for(look(), 20))
    assert "decisions and their rewards" in panel.timeline.svg and "h0" in panel.loss.svg
