"The controller as a newcomer's carelessness meets it: undo, thumbs, diverged models, and states that are not whole."
import copy
import io

import pytest
import torch
from torch.nn import functional as F

from adaptive_lab.controller import AdaptiveTransformer, EnhancedController
from adaptive_lab.controller.adaptation import Adaptation, Adapter
from adaptive_lab.controller.controlled_adam import Controlled, ControlledAdam
from adaptive_lab.controller.forward_steps import put
from adaptive_lab.controller.model import Gates
from adaptive_lab.controller.thumbs import Thumbs
from adaptive_lab.plasticity import SelectivePlasticityOptimizer
from adaptive_lab.training import train

X, Y = (torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(i)) for i in (0, 1))


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AdaptiveTransformer(2, 4, 32, 16).eval()


def controller(**knobs):
    return EnhancedController(2, 4, **(dict(remove_after=1, efficiency_factor=5.0, budget=0.25, candidates=9) | knobs))


def bits(m):
    return {k: t.clone() for k, t in m.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_all_that_a_controller_did_can_be_undone(model):
    before, c = bits(model), controller()
    adam = torch.optim.Adam(model.parameters())
    kinds = {c.decide(model, X, Y, step, adam).kind for step in range(12)}
    assert "prune" in kinds and not model.present_heads.all()
    states = [bits(model)]
    while model.undo(adam):
        states.append(bits(model))
        AdaptiveTransformer.from_state(states[-1])(X)  # whole at each step of the way
    assert same(bits(model), before) and len(states) > 4


def test_a_trial_leaves_nothing_to_undo(model):
    model.set_gate(0, 1, 0)
    model.prune()
    past, c = list(model._past), controller(remove_after=0, efficiency_factor=0.0, budget=0.9)
    for step in range(4):
        d = c.decide(model, X, Y, step)
        if d.kind != "keep":
            break
        assert model._past == past and not model.present_heads[0, 1]


@pytest.mark.parametrize("gate", [1.0, 0.3])
def test_a_thumb_down_brings_back_what_was_removed_since(model, gate):
    for layer in range(2):
        for head in range(4):
            model.set_gate(layer, head, gate)
    before, c = model(X), controller()
    (layer, head, _), = c.decide(model, X, Y).changes
    assert not model.is_present(layer, head)
    c.load_state_dict(copy.deepcopy(c.state_dict()))  # what the gate was is remembered
    assert c.thumb(model, False).changes == ((layer, head, pytest.approx(gate)),)
    assert torch.equal(model(X), before)


@pytest.mark.parametrize("up", [-1, "no", float("nan"), None, 1])
def test_a_thumb_is_true_or_false(model, up):
    c = controller()
    c.decide(model, X, Y)
    before, state = bits(model), str(c.state_dict())
    with pytest.raises(ValueError, match="up="):
        c.thumb(model, up)
    assert same(bits(model), before) and str(c.state_dict()) == state


def test_a_diverged_model_changes_nothing(model):
    c = controller()
    for step in range(3):
        c.decide(model, X, Y, step)
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    before, state = {k: t for k, t in bits(model).items() if k != "norm.weight"}, str(c.state_dict())
    with pytest.raises(ValueError, match="loss"):
        c.decide(model, X, Y, 3)
    assert same({k: t for k, t in bits(model).items() if k != "norm.weight"}, before) and str(c.state_dict()) == state


@pytest.mark.parametrize("x, y", [(None, Y), (X, None), (X, Y[:4]), (X[:0], Y[:0])])
def test_held_out_bytes_are_needed(model, x, y):
    with pytest.raises(ValueError):
        controller().decide(model, x, y)


@pytest.mark.parametrize("reward", [1e7, -1e300, float("inf"), float("nan")])
def test_a_reward_that_is_none_is_refused(reward):
    c = controller()
    state = str(c.state_dict())
    with pytest.raises(ValueError, match="reward"):
        c.update_policy(reward)
    assert str(c.state_dict()) == state


def broken(state):
    half = {k: t for k, t in state.items() if k != "removed.0.1.out"}
    return {
        "places.weight": state | {"places.weight": torch.zeros(8, 32)},
        "norm.weight": {k: t for k, t in state.items() if k != "norm.weight"},
        "gate_heads": state | {"gate_heads": torch.full((2, 4), 5.0)},
        "nan": state | {"gate_ffn": torch.tensor([float("nan"), 1.0])},
        "opens what was removed": state | {"gate_heads": torch.ones(2, 4)},
        "removed.0.1": half,
        "removed.9.9": state | {"removed.9.9.out": torch.zeros(1, 8, 32)},
        "removed.1.1": state | {"removed.1.1.out": state["removed.0.1.out"], "removed.1.1.qkv": state["removed.0.1.qkv"]},
        "removed.x.1.out": state | {"removed.x.1.out": torch.zeros(1)},
    }


@pytest.mark.parametrize("words", ["places.weight", "norm.weight", "gate_heads", "nan", "opens what was removed", "removed.0.1", "removed.9.9", "removed.1.1", "removed.x.1.out"])
def test_a_state_that_is_not_whole_changes_nothing(model, words):
    model.set_gate(0, 1, 0)
    model.prune()
    state = bits(model)
    with torch.no_grad():
        model.bytes.weight.add_(1)
    before = bits(model)
    with pytest.raises(ValueError, match=words):
        model.load_state_dict(broken(state)[words])
    assert same(bits(model), before)
    model.load_state_dict(state)
    assert same(bits(model), state)


def test_no_two_fresh_parts_are_alike(model):
    for part in (1, 2, "ffn"):
        for layer in (0, 1):
            model.set_gate(layer, part, 0)
    model.prune()
    for layer in (0, 1):
        for part in (1, 2, "ffn"):
            model.regrow(layer, part, fresh=True)
    q = [model.blocks[layer].attention.qkv[:, head] for layer in (0, 1) for head in (1, 2)]
    assert not any(torch.equal(a, b) for i, a in enumerate(q) for b in q[:i])
    assert not torch.equal(model.blocks[0].ffn.up.weight, model.blocks[1].ffn.up.weight)


def test_the_way_back_survives_saving_and_a_pruned_model_is_a_new_home(model):
    home, adapter = [g.clone() for g in model.gates], Adapter(model, Adaptation(budget=20))
    adapter._set(Gates(model.gate_heads * 0.5, model.gate_ffn.clone(), model.gate_layers.clone()), None)
    other = Adapter(copy.deepcopy(model))
    other.load_state_dict(adapter.state_dict())
    assert other.rollback() and all(torch.equal(a, b) for a, b in zip(other.model.gates, home))
    put(model, Gates(torch.zeros(2, 4), model.gate_ffn.clone(), model.gate_layers.clone()))
    adapter = Adapter(model)
    adapter._set(Gates(torch.zeros(2, 4), model.gate_ffn * 0.5, model.gate_layers.clone()), None)
    model.prune()
    before = bits(model)
    assert not adapter.rollback() and same(bits(model), before)


@pytest.mark.parametrize("state", [{}, dict(home=[], memory=[], count=0, setting=None), dict(memory=None)])
def test_a_state_of_no_adapter_is_refused(model, state):
    adapter = Adapter(model)
    before = str(adapter.state_dict())
    with pytest.raises(ValueError):
        adapter.load_state_dict(state)
    assert str(adapter.state_dict()) == before


@pytest.mark.parametrize("wrong", [dict(count="a"), dict(setting="a"), dict(setting=1.5), dict(used="a"), dict(liked=None), dict(number=[1])])
def test_numbers_of_an_adapter_are_numbers(model, wrong):
    adapter = Adapter(model)
    adapter.count = 1
    adapter._set(adapter.home, adapter._remember(model.gates))
    good = adapter.state_dict()
    before = str(good)
    bad = good | wrong if "count" in wrong or "setting" in wrong else good | dict(memory=[good["memory"][0] | wrong])
    with pytest.raises(ValueError, match="no state of an Adapter"):
        adapter.load_state_dict(bad)
    assert str(adapter.state_dict()) == before and len(good["memory"]) == 1
    adapter.load_state_dict(good)


@pytest.mark.parametrize("wrong", [None, 3, {}, "A", "b", "home", "generator", "pending", "sizes"])
def test_a_state_of_no_thumbs_changes_nothing(model, wrong):
    thumbs = Thumbs(model)
    thumbs.propose()
    good = copy.deepcopy(thumbs.state_dict())
    other = Thumbs(AdaptiveTransformer(3, 4, 32, 16)).state_dict()
    for state in (other,) if wrong == "sizes" else (good | {wrong: "a"}, good | {wrong: torch.ones(2)}) if isinstance(wrong, str) else (wrong,):
        with pytest.raises(ValueError, match="state"):
            thumbs.load_state_dict(state)
        assert str(thumbs.state_dict()) == str(good)
    thumbs.load_state_dict(good)
    assert str(thumbs.state_dict()) == str(good)


@pytest.mark.parametrize("kind", [Adapter, Thumbs])
@pytest.mark.parametrize("wrong", [None, 3, torch.nn.Linear(2, 2)])
def test_gates_are_those_of_an_adaptive_transformer(kind, wrong):
    with pytest.raises(TypeError, match=f"model is a {type(wrong).__name__}"):
        kind(wrong)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_too_coarse_to_adapt(model, dtype):
    model = model.to(dtype)
    adapter, text = Adapter(model, Adaptation(budget=2)), (X.repeat(4, 1), Y.repeat(4, 1))
    state, before = str(adapter.state_dict()), bits(model)
    if dtype == torch.float64:
        assert adapter.adapt(*text).passes <= 2
        return
    for act in (adapter.adapt, adapter.watch):
        with pytest.raises(ValueError, match=f"model is of {dtype}, too coarse"):
            act(*text)
    assert str(adapter.state_dict()) == state and same(bits(model), before)


def test_a_thumb_for_gates_that_are_none_is_refused(model):
    thumbs = Thumbs(model)
    for bad in (Gates(torch.full((2, 4), float("nan")), torch.ones(2), torch.ones(2)), Gates(torch.full((2, 4), 2.0), torch.ones(2), torch.ones(2))):
        with pytest.raises(ValueError, match="gates"):
            thumbs.reward(1, bad)
    with pytest.raises(ValueError, match="thumb"):
        thumbs.reward("up")
    thumbs.propose()


@pytest.mark.parametrize("x", [X - 300, X + 256, X.byte(), X.float(), X[0], [[1, 2]], b"ab"])
def test_what_is_no_bytes_is_refused(model, x):
    with pytest.raises(ValueError, match="x "):
        model(x)


def loss_on(m, pair):
    with torch.no_grad():
        return F.cross_entropy(m(pair[0]).flatten(0, 1), pair[1].flatten()).item()


@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.SGD])
def test_a_graph_that_is_still_alive_does_not_mind_the_next_step(model, make):
    m = model
    o = make(m.parameters(), 1e-3)
    for i in range(6):
        loss = F.cross_entropy(m(X).flatten(0, 1), Y.flatten())  # the last one's graph is alive meanwhile
        o.zero_grad()
        loss.backward()
        o.step()
        if i == 1:
            m.set_gate(0, 1, 0)
            m.prune(o)
        if i == 3:
            m.regrow(0, 1, optimizer=o)
    assert all(p.grad.shape == p.shape for p in m.parameters())


@pytest.mark.parametrize("knobs", [dict(), dict(fused=True), dict(foreach=True)])
def test_an_optimizer_that_was_not_told_of_surgery_does_not_step(model, knobs):
    m = model
    o = torch.optim.AdamW(m.parameters(), 1e-3, **knobs)
    learn = lambda: (o.zero_grad(), F.cross_entropy(m(X).flatten(0, 1), Y.flatten()).backward(), o.step())
    learn()
    m.set_gate(0, 1, 0)
    m.prune()
    before = {n: p.clone() for n, p in m.named_parameters()}
    with pytest.raises(ValueError, match="give the optimizer to prune"):
        learn()
    assert all(torch.equal(p, before[n]) for n, p in m.named_parameters())


def test_slow_weights_of_what_was_regrown_are_its_weights(model):
    m = model
    o = SelectivePlasticityOptimizer(m.named_parameters(), lr=3e-3, plasticity_k=0, slow=0.02)
    for _ in train(m, o, [(X, Y)] * 20, steps=20):
        pass
    m.set_gate(0, 1, 0)
    m.prune(o)
    rows = m.removed[0, 1]["out"].clone()
    m.regrow(0, 1, optimizer=o)
    with o.slow_weights():
        assert torch.equal(m.blocks[0].attention.out[1:2], rows) and rows.abs().max() > 0
        m.set_gate(0, 1, 0)
        with pytest.raises(ValueError, match="slow weights"):
            m.prune(o)
        assert m.is_present(0, 1)
    assert not o.swapped


def test_reading_and_regrowing_draw_no_random_number_and_dropout_can_be_given(model):
    m = model
    m.set_gate(0, 1, 0)
    m.prune()
    state, before = m.state_dict(), torch.get_rng_state()
    m.load_state_dict(state)
    assert AdaptiveTransformer.from_state(state, dropout=0.3).blocks[0].dropout.p == 0.3
    m.regrow(0, 1, fresh=True)
    assert torch.equal(before, torch.get_rng_state())


def test_what_a_decision_says_is_the_loss_of_the_model_with_its_own_gates(model):
    m = model
    for head in range(4):
        m.set_gate(0, head, 0.2)
    c = EnhancedController(2, 4, efficiency_factor=1.0)
    for step in range(6):
        d = c.decide(m, X, Y, step)
        assert d.loss == pytest.approx(loss_on(m, (X, Y)), abs=1e-5)
    assert any(d.kind == "prune" for d in c.decisions)


def test_heads_of_a_closed_layer_are_closed_and_left_alone(model):
    m = model
    m.set_gate(1, "layer", 0)
    c = EnhancedController(2, 4, efficiency_factor=1.0, budget=0.25, candidates=64)
    made = [c.decide(m, X, Y, i) for i in range(4)]
    assert max(d.kept for d in made) <= 4 and all(change[0] == 0 for d in made for change in d.changes)


def test_a_state_that_does_not_fit_changes_nothing(model):
    m = model
    other = EnhancedController(3, 4)
    c = EnhancedController(2, 4, budget=0.25, algorithm="ppo", rollout=1)
    c.decide(m, X, Y)
    good = c.state_dict()
    for state in (good, {**other.state_dict(), "_extra_state": {}}, {k: v for k, v in other.state_dict().items() if k != "_extra_state"}):
        before = io.BytesIO()
        torch.save(other.state_dict(), before)
        with pytest.raises(ValueError, match="nothing was changed"):
            other.load_state_dict(state)
        after = io.BytesIO()
        torch.save(other.state_dict(), after)
        assert before.getvalue() == after.getvalue()
    again = EnhancedController(2, 4)
    again.load_state_dict(good)
    assert again.knobs == c.knobs and again.stream.timing is again.knobs
    held = lambda c: [t.data_ptr() for s in c.optimizer.state.values() for t in s.values()]
    assert held(c) and not set(held(c)) & set(held(again))


def test_a_decision_is_the_same_without_gradients_and_in_autocast(model):
    seen = []
    for way in (torch.enable_grad(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16)):
        c, m = EnhancedController(2, 4, rollout=1), copy.deepcopy(model)
        with way:
            d = c.decide(m, X, Y)
        seen.append((d, [p.tolist() for p in c.policy.parameters()]))
    assert seen[0] == seen[1] == seen[2]


def test_what_was_taken_back_is_nothing_to_like(model):
    m = model
    c = EnhancedController(2, 4, efficiency_factor=1.0)
    while c.last_change() is None:
        c.decide(m, X, Y)
    c.thumb(m, False)
    for up in (True, False):
        with pytest.raises(ValueError, match="taken back"):
            c.thumb(m, up)


def test_controlled_adam_takes_no_state_of_plain_adam_and_is_not_deaf(model):
    m = model
    o = Controlled(m, ControlledAdam(every=2), (X, Y))
    with pytest.raises(ValueError, match="no loss was heard"):
        o.step()
    for _ in train(m, o, [(X, Y)] * 4, steps=4, loss=o.loss):
        pass
    before = copy.deepcopy(o.state_dict())
    plain = torch.optim.Adam(m.parameters(), 0.5)
    wrong = copy.deepcopy(before)
    wrong["state"][2]["exp_avg"] = torch.zeros([3] * wrong["state"][2]["exp_avg"].ndim)
    for state, said in ((plain.state_dict(), "of the mechanisms"), (wrong, "another pruning"), ({**before, "param_groups": []}, "param")):
        with pytest.raises(ValueError, match=said):
            o.load_state_dict(state)
        assert str(o.state_dict()) == str(before)
    o.load_state_dict(before)
