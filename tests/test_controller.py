"The controller as a newcomer's carelessness meets it: undo, thumbs, diverged models, and states that are not whole."
import copy

import pytest
import torch

from adaptive_lab.controller import AdaptiveTransformer, EnhancedController
from adaptive_lab.controller.adaptation import Adaptation, Adapter
from adaptive_lab.controller.forward_steps import put
from adaptive_lab.controller.model import Gates
from adaptive_lab.controller.thumbs import Thumbs

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
