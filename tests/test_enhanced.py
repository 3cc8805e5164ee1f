"The controller where something is missing: no head, no sound state, no data in time; and whom a thumb teaches what."
import copy
import types

import pytest
import torch

from adaptive_lab.controller import AdaptiveTransformer, EnhancedController
from adaptive_lab.controller.policy_gradient import masked

TEXT = torch.randint(0, 256, (2, 16, 16), generator=torch.Generator().manual_seed(0))


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AdaptiveTransformer(2, 4, 16, context=16)


def drawn(**knobs):
    "A controller that has decided a few times."
    c = EnhancedController(2, 4, **dict(efficiency_factor=0.2, budget=0.25) | knobs)
    m = model()
    for step in range(6):
        c.decide(m, *TEXT, step)
    return c, m


@pytest.mark.parametrize("layers, frozen", [(False, False), (False, True), (True, False)])
def test_where_no_head_is_left_it_keeps_or_brings_one_back(layers, frozen):
    m, c = model(), EnhancedController(2, 4)
    for layer in range(2):
        for part in ["layer"] if layers else range(4):
            m.set_gate(layer, part, 0)
    m.prune()
    m.requires_grad_(not frozen)
    made = [c.decide(m, *TEXT, step) for step in range(3)]
    assert {d.kind for d in made} <= ({"keep"} if layers else {"keep", "regrow"}) and made[0].loss > 0


def test_a_model_in_double_precision_is_decided_on():
    m = model()
    one, two = (EnhancedController(2, 4).decide(copy.deepcopy(m).to(kind), *TEXT) for kind in (torch.float32, torch.float64))
    assert one.loss == pytest.approx(two.loss, abs=1e-4)


def pruned_then_kept(many=8):
    "Controllers whose last decision kept all as it is, after one that pruned a head."
    found = []
    for seed in range(100):
        c, m = EnhancedController(2, 4, seed, efficiency_factor=0.2, budget=0.75), model()
        for step in range(12):
            c.decide(m, *TEXT, step)
            if [d.kind for d in c.decisions[-2:]] == ["prune", "keep"]:
                found.append((c, m))
                break
        if len(found) == many:
            return found
    raise AssertionError("too few of them kept after they had pruned")


@pytest.mark.parametrize("up", [True, False])
def test_a_thumb_is_for_the_change_where_it_was_made(up):
    for c, m in pruned_then_kept():
        (layer, head, _), (seen, may) = c.last_change().changes[0], c._last
        assert seen[layer, head, 2] == 1 and m.gate_heads[layer, head] == 0  # it was open when it was pruned
        chance = lambda: torch.log_softmax(masked(c.policy(seen)[0], may), -1)[layer * 4 + head].item()
        before = chance()
        c.thumb(m, up)
        assert (chance() > before) == up


DAMAGE = [(("pending",), [3]), (("baseline", "sum"), float("nan")), (("baseline", "weight"), 2.0), (("knobs", "budget"), 0.01), (("closed",), [[9, 9, 1]]), (("decisions", 0, "changes"), [[0, 4, 0.0]]),
          (("decisions", 0, "reward"), float("nan")), (("points",), [[3, float("inf")]]), (("heard",), [float("nan"), 1.0]), (("pending", 0, "seen"), torch.zeros(3, 4, 6)), (("pending", 0, "action"), 9),
          (("last",), [torch.zeros(2, 4, 6), torch.ones(8, dtype=torch.bool)]), (("optimizer", "state", 0, "exp_avg"), torch.zeros(3))]


@pytest.mark.parametrize("where, value", DAMAGE, ids=lambda v: ".".join(map(str, v)) if isinstance(v, tuple) else "")
def test_a_damaged_state_is_refused(where, value):
    c, _ = drawn()
    before, state = str(c.state_dict()), c.state_dict()
    inner = copy.deepcopy(state["_extra_state"])
    place = inner
    for name in where[:-1]:
        place = place[name]
    place[where[-1]] = value
    with pytest.raises(ValueError, match="no state of a controller"):
        c.load_state_dict({**state, "_extra_state": inner})
    assert str(c.state_dict()) == before
    c.load_state_dict(state)  # whole, it is taken


def test_weights_that_are_not_finite_are_refused():
    c, _ = drawn()
    state = {name: torch.full_like(v, torch.nan) if name == "policy.value.bias" else v for name, v in c.state_dict().items()}
    with pytest.raises(ValueError, match="not finite"):
        c.load_state_dict(state)
    assert all(p.isfinite().all() for p in c.parameters())


def test_bad_held_out_data_change_nothing_in_a_stream():
    m, c = model(), EnhancedController(2, 4, every=1, feedback="continuous", rollout=1)
    step = lambda: types.SimpleNamespace(model=m, loss=3.0, index=0, optimizer=None)
    c.follow(step(), *TEXT)
    before = copy.deepcopy((c._pending, c.baseline.value, c.policy.state_dict(), c.generator.get_state()))
    with pytest.raises(ValueError):
        c.follow(step(), TEXT[0], TEXT[1][:, :5])
    after = (c._pending, c.baseline.value, c.policy.state_dict(), c.generator.get_state())
    assert str(before) == str(after)


@pytest.mark.parametrize("seed", ["a", 1.5, None, True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ValueError, match="seed="):
        EnhancedController(2, 4, seed=seed)


def test_a_decision_is_the_same_in_inference_mode():
    one, two = (EnhancedController(2, 4, rollout=1) for _ in range(2))
    m = model()
    twin = copy.deepcopy(m)
    made = [one.decide(m, *TEXT, step) for step in range(3)]
    with torch.inference_mode():
        text = TEXT.clone()
        assert made == [two.decide(twin, *text, step) for step in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


def test_a_diverged_model_teaches_a_stream_nothing():
    m, c = model(), EnhancedController(2, 4, every=1, feedback="continuous", rollout=1)
    with torch.no_grad():
        m.logits.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        c.follow(types.SimpleNamespace(model=m, loss=3.0, index=0, optimizer=None), *TEXT)
    assert not c._pending and not c.decisions and (m.gate_heads == 1).all()


def test_lbfgs_cannot_be_cut_and_is_told_so():
    m = model()
    lbfgs = torch.optim.LBFGS(m.parameters())
    m.set_gate(0, 1, 0)
    with pytest.raises(ValueError, match="LBFGS"):
        m.prune(lbfgs)
    assert m.present_heads.all() and m.prune() == [(0, 1)]
